"""What people do with `generate` and a DynamicCache gives the same with a StorageCache."""

from __future__ import annotations

import copy

import pytest
import torch

from .models import (
    FAMILIES,
    assert_same_generation,
    generate,
    implementations,
    make_model,
    model_of,
    prompts,
    stock_cache,
    stock_implementation,
)

# Plain, windowed, both with a soft-cap, ALiBi, sinks, latents; each as one would run it with us.
CHOSEN = ["llama", "mistral", "gemma2", "falcon", "gpt_oss", "deepseek_v3"]
SHORT = {"max_new_tokens": 12}


def make_pair(family):
    """(the model as it runs on our cache, the same model as transformers runs it)."""
    implementation = implementations(family)[0]
    return model_of(family, implementation), model_of(family, stock_implementation(family, implementation))


@pytest.fixture(params=CHOSEN)
def pair(request):
    return make_pair(request.param)


@pytest.fixture(params=FAMILIES)
def any_pair(request):
    return make_pair(request.param)


def assert_same(pair, new_cache, inputs, **options):
    model, stock = pair
    torch.manual_seed(0)
    ours = generate(model, inputs, new_cache(model.config), **SHORT | options)
    torch.manual_seed(0)
    theirs = generate(stock, inputs, stock_cache(stock), **SHORT | options)
    assert_same_generation(ours, theirs)


def test_beam_search_is_that_of_a_dynamic_cache(any_pair, new_cache):
    assert_same(any_pair, new_cache, prompts(70, 3), num_beams=4)


def test_beams_can_all_be_returned(pair, new_cache):
    assert_same(pair, new_cache, prompts(30, 9), num_beams=3, num_return_sequences=3)


def test_beams_under_the_models_own_implementations(new_cache):
    for implementation in ("sdpa", "eager"):
        model = model_of("mistral", implementation)
        assert_same((model, model), new_cache, prompts(70, 3), num_beams=4)


def test_sampling_with_a_seed_draws_the_same_tokens(pair, new_cache):
    assert_same(pair, new_cache, prompts(70, 3), do_sample=True, top_k=20, temperature=0.9)


def test_several_samples_of_one_prompt_are_the_same(pair, new_cache):
    assert_same(pair, new_cache, prompts(66), do_sample=True, num_return_sequences=4)


@pytest.mark.parametrize("chunk", [1, 32, 64, 100])
def test_a_prompt_may_come_in_chunks(any_pair, chunk, new_cache):
    lengths = (40, 7) if chunk == 1 else (200, 90)
    assert_same(any_pair, new_cache, prompts(*lengths), prefill_chunk_size=chunk)


def test_an_assistant_model_may_guess_ahead(any_pair, new_cache):
    model, stock = any_pair
    # Weights near the model's own, so that some guesses are right and some are wrong.
    assistant = copy.deepcopy(stock)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    for length in (1, 90):
        inputs = prompts(length)
        ours = generate(model, inputs, new_cache(model.config), assistant_model=assistant, max_new_tokens=32)
        theirs = generate(stock, inputs, stock_cache(stock), assistant_model=assistant, max_new_tokens=32)
        assert_same_generation(ours, theirs)
        greedy, _ = generate(stock, inputs, stock_cache(stock), max_new_tokens=32)
        assert torch.equal(ours[0], greedy)


def test_the_prompt_may_be_looked_up_for_guesses(pair, new_cache):
    inputs = prompts(8)
    inputs = {name: value.repeat(1, 12) for name, value in inputs.items()}
    assert_same(pair, new_cache, inputs, prompt_lookup_num_tokens=4, max_new_tokens=32)


def test_a_conversation_goes_on_from_the_cache_it_left(pair, new_cache):
    model, stock = pair
    cache, other = new_cache(model.config), stock_cache(stock)
    ours = theirs = prompts(50, 20)
    for turn in range(3):
        tokens, logits = generate(model, ours, cache, **SHORT)
        stock_tokens, stock_logits = generate(stock, theirs, other, **SHORT)
        assert_same_generation((tokens, logits), (stock_tokens, stock_logits))
        question = prompts(15, 15, seed=10 + turn)
        ours, theirs = (
            {
                "input_ids": torch.cat([said, question["input_ids"]], dim=1),
                "attention_mask": torch.cat(
                    [inputs["attention_mask"], torch.ones(2, SHORT["max_new_tokens"] + 15, dtype=torch.long)],
                    dim=1,
                ),
            }
            for said, inputs in ((tokens, ours), (stock_tokens, theirs))
        )
    assert cache.get_seq_length() == other.get_seq_length()


def test_a_shared_prefix_is_computed_once_and_forked(pair, new_cache):
    model, stock = pair
    prefix = prompts(100)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(**prefix, past_key_values=cache)
    for seed in (5, 6):
        question = prompts(20, seed=seed)
        inputs = {name: torch.cat([prefix[name], question[name]], dim=1) for name in prefix}
        with copy.deepcopy(cache) as fork:
            ours = generate(model, inputs, fork, **SHORT)
        assert_same_generation(ours, generate(stock, inputs, stock_cache(stock), **SHORT))
    assert cache.get_seq_length() == 100


def test_a_reset_cache_starts_over_with_another_batch(pair, new_cache):
    model, stock = pair
    cache = new_cache(model.config)
    for lengths in ((80, 3), (5, 70, 1)):
        inputs = prompts(*lengths)
        ours = generate(model, inputs, cache, **SHORT)
        assert_same_generation(ours, generate(stock, inputs, stock_cache(stock), **SHORT))
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_cache_without_a_config_makes_its_layers_as_they_are_used(new_cache):
    # Without a config nothing is known of windows: all is kept, and the mask alone makes the window.
    for family in ("llama", "mistral", "gemma2"):
        implementation = implementations(family)[0]
        model, stock = (
            model_of(family, implementation),
            model_of(family, stock_implementation(family, implementation)),
        )
        cache = new_cache()
        ours = generate(model, prompts(90, 4), cache, **SHORT)
        assert_same_generation(ours, generate(stock, prompts(90, 4), stock_cache(stock), **SHORT))
        assert len(cache) == model.config.num_hidden_layers


def test_an_encoder_decoder_model_stores_its_self_attention(new_cache):
    from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache

    config = BartConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=256,
        forced_eos_token_id=None,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    stock = BartForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    stock.eval()
    inputs = prompts(40, 11)
    theirs = generate(stock, inputs, max_new_tokens=80)
    for implementation in ("csd", "sdpa"):
        stock.set_attn_implementation(implementation)
        cache = EncoderDecoderCache(new_cache(), DynamicCache())
        assert_same_generation(generate(stock, inputs, cache, max_new_tokens=80), theirs)


def test_make_model_gives_the_same_weights_to_every_implementation():
    one, other = make_model("llama", "sdpa"), make_model("llama", "csd")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
