"""Every family generates from a StorageCache what it generates from a DynamicCache."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from torch_csd.hf.cache import StorageLayer
from torch_csd.tensor import StorageTensor

from .models import (
    FAMILIES,
    HYBRIDS,
    assert_same_generation,
    generate,
    implementations,
    make_model,
    model_of,
    prompts,
    stock_cache,
    stock_implementation,
)

# Around the page of 64 tokens, around the windows of 24 and 40, and long beside short.
PROMPT_LENGTHS = [(1, 2, 5), (23, 65, 40), (500, 1, 129)]

PAIRS = [(family, implementation) for family in FAMILIES for implementation in implementations(family)]
HYBRID_PAIRS = [(family, implementation) for family in HYBRIDS for implementation in implementations(family)]


@functools.cache
def stock_generation(family, implementation, lengths):
    model = model_of(family, stock_implementation(family, implementation))
    return generate(model, prompts(*lengths), stock_cache(model))


@pytest.mark.parametrize("lengths", PROMPT_LENGTHS, ids=str)
@pytest.mark.parametrize("family, implementation", PAIRS)
def test_greedy_generation_from_left_padded_prompts_is_that_of_a_dynamic_cache(
    family, implementation, lengths, new_cache
):
    model = model_of(family, implementation)
    ours = generate(model, prompts(*lengths), new_cache(model.config))
    assert_same_generation(ours, stock_generation(family, implementation, lengths))


@pytest.mark.parametrize("family, implementation", HYBRID_PAIRS)
def test_layers_that_are_not_attention_keep_their_state_beside_ours(family, implementation, new_cache):
    model = model_of(family, implementation)
    cache = new_cache(model.config)
    ours = generate(model, prompts(200, 65, 3), cache)
    assert_same_generation(ours, stock_generation(family, implementation, (200, 65, 3)))
    kinds = {type(layer) for layer in cache.layers}
    assert StorageLayer in kinds and LinearAttentionLayer in kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_one_long_forward_are_those_of_a_dynamic_cache(family, new_cache):
    implementation = implementations(family)[0]
    model, stock = (
        model_of(family, implementation),
        model_of(family, stock_implementation(family, implementation)),
    )
    inputs = prompts(300, 300)
    cache, other = new_cache(model.config), stock_cache(stock)
    with torch.no_grad():
        for begin, end in ((0, 170), (170, 171), (171, 300)):
            step = {
                "input_ids": inputs["input_ids"][:, begin:end],
                "attention_mask": inputs["attention_mask"][:, :end],
            }
            ours = model(**step, past_key_values=cache).logits
            theirs = stock(**step, past_key_values=other).logits
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1000, 129, 128, 2])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_any_window_gives_what_a_dynamic_cache_gives(family, window, new_cache):
    implementation = implementations(family)[0]
    model = make_model(family, implementation, sliding_window=window)
    stock = make_model(family, stock_implementation(family, implementation), sliding_window=window)
    inputs = prompts(128, 70)
    assert_same_generation(
        generate(model, inputs, new_cache(model.config)), generate(stock, inputs, stock_cache(stock))
    )


@pytest.mark.parametrize("family, implementation", [("llama", "csd"), ("llama", "sdpa"), ("gemma2", "csd")])
def test_half_precision_models_generate_what_they_do_in_memory(family, implementation, new_cache):
    model = make_model(family, implementation).to(torch.bfloat16)
    stock = make_model(family, stock_implementation(family, implementation)).to(torch.bfloat16)
    inputs = prompts(130, 7)
    with torch.no_grad():
        ours = model(**inputs, past_key_values=new_cache(model.config)).logits
        theirs = stock(**inputs, past_key_values=stock_cache(stock)).logits
    # bfloat16 has 8 bits: some units in the last place of logits of up to 8, after two layers.
    torch.testing.assert_close(
        ours[inputs["attention_mask"] == 1], theirs[inputs["attention_mask"] == 1], atol=0.2, rtol=0
    )


def test_a_stored_type_narrower_than_the_models_changes_logits_by_its_rounding_only(new_cache):
    model = model_of("llama", "csd")
    inputs = prompts(200)
    _, ours = generate(model, inputs, new_cache(model.config, kv_dtype="bfloat16"), max_new_tokens=2)
    _, exact = generate(model, inputs, stock_cache(model), max_new_tokens=2)
    assert torch.equal(ours[:, 0], exact[:, 0]), "the prompt is computed before it is stored"
    assert 0 < (ours[:, 1] - exact[:, 1]).abs().max() < 0.2


def test_only_latent_attention_reads_the_cache_into_memory_and_says_so_once(new_cache):
    from torch_csd.hf import cache as module

    module._warn_latents_are_read.cache_clear()
    model = model_of("deepseek_v3", "csd")
    with pytest.warns(UserWarning, match="latents") as warned:
        cache = new_cache(model.config)
        generate(model, prompts(70), cache, max_new_tokens=3)
    assert sum("latents" in str(warning.message) for warning in warned) == 1
    layer = cache.layers[0]
    assert isinstance(layer.keys, StorageTensor) and layer.keys.shape == (1, 1, 72, 32)
    assert isinstance(layer.values, StorageTensor) and layer.values.shape == (1, 1, 72, 16)
