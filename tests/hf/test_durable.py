"""Durable caches: after reopening, generation goes on as if the process had never ended."""

from __future__ import annotations

import copy

import pytest
import torch

import torch_csd
from torch_csd import StorageCache, StoreBusyError, StoreError, StoreFullError, StoreMismatchError

from .models import (
    FAMILIES,
    HYBRIDS,
    VOCABULARY,
    assert_same_generation,
    generate,
    implementations,
    make_config,
    model_of,
    prompts,
)

SETTINGS = {"memory_budget": "8MiB", "threads": 1}
SHORT = {"max_new_tokens": 12}


def new_cache(model, directory, name="a", **settings):
    return StorageCache(model.config, directory, durable=True, name=name, **SETTINGS | settings)


def open_cache(model, directory, name="a", **settings):
    return StorageCache.open(directory, name, config=model.config, **SETTINGS | settings)


def ids_of(generated: tuple) -> torch.Tensor:
    return generated[0]


def go_on(model, sequences, cache):
    """Generates from what is there: the ids so far, of which the cache holds all but the last."""
    inputs = {"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
    return generate(model, inputs, cache, **SHORT)


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_after_reopening(family, kv_dtype, tmp_path):
    model = model_of(family, implementations(family)[0])
    never_closed = StorageCache(model.config, tmp_path, kv_dtype=kv_dtype, **SETTINGS)
    first = ids_of(generate(model, prompts(70, 70), never_closed, **SHORT))
    expected = go_on(model, first, never_closed)
    never_closed.close()

    cache = new_cache(model, tmp_path, kv_dtype=kv_dtype)
    assert torch.equal(ids_of(generate(model, prompts(70, 70), cache, **SHORT)), first)
    cache.commit(first)
    length = cache.get_seq_length()
    cache.close()
    for _ in range(2):  # opening changes nothing
        with open_cache(model, tmp_path) as cache:
            assert cache.get_seq_length() == length
            assert_same_generation(go_on(model, first, cache), expected)
    with open_cache(model, tmp_path) as cache:
        final = go_on(model, first, cache)
        cache.commit()
    with open_cache(model, tmp_path) as cache:
        assert cache.get_seq_length() == ids_of(final).shape[1] - 1
    assert torch_csd.verify(tmp_path) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_prefix_is_computed_once(family, tmp_path):
    model = model_of(family, implementations(family)[0])
    torch.manual_seed(1)
    system = torch.randint(1, VOCABULARY, (1, 150))
    prompt = [torch.cat([system, torch.randint(1, VOCABULARY, (1, 20 + i))], 1) for i in range(3)]
    plain = [
        ids_of(generate(model, {"input_ids": ids}, StorageCache(model.config, tmp_path, **SETTINGS), **SHORT))
        for ids in prompt
    ]
    with new_cache(model, tmp_path, "system") as cache:
        with torch.no_grad():
            model(system, past_key_values=cache)
        cache.commit(system)
    for number, ids in enumerate(prompt):
        with new_cache(model, tmp_path, f"{number}") as cache:
            match = cache.match_prefix(ids)
            assert match.length == 150  # of the system's own, or of a conversation that began with it
            cache.use_prefix(match)
            assert cache.get_seq_length() == 150
            found = ids_of(generate(model, {"input_ids": ids}, cache, **SHORT))
            assert torch.equal(found, plain[number])
            cache.commit(found)
    with new_cache(model, tmp_path, "again") as cache:
        # All of a prompt that was there before, but for the token to begin with; a window may have gone past it.
        match = cache.match_prefix(prompt[1])
        windowed = family != "llama"
        assert match == (("system", 150) if windowed else ("1", prompt[1].shape[1] - 1))
        cache.use_prefix(match)
        assert torch.equal(ids_of(generate(model, {"input_ids": prompt[1]}, cache, **SHORT)), plain[1])
        assert cache.match_prefix(torch.randint(1, VOCABULARY, (30,)) * 0) is None
        with pytest.raises(ValueError, match="one prompt"):
            cache.match_prefix(torch.cat([system, system]))


def test_prefixes_of_other_models_and_precisions_are_not_taken(tmp_path):
    model = model_of("llama", "csd")
    ids = torch.arange(1, 90)[None] % VOCABULARY
    for name, settings in (("weights", {"fingerprint": "other"}), ("precision", {"kv_dtype": "int8"})):
        with new_cache(model, tmp_path, name, **settings) as cache, torch.no_grad():
            model(ids, past_key_values=cache)
            cache.commit(ids)
    with new_cache(model, tmp_path, "b") as cache:
        assert cache.match_prefix(ids) is None
    with new_cache(model, tmp_path, "c", fingerprint="other") as cache:
        assert cache.match_prefix(ids) == ("weights", 88)
    other = model_of("qwen2", "csd")
    with new_cache(other, tmp_path, "d", fingerprint="other") as cache:
        assert cache.match_prefix(ids) is None


def test_another_models_configuration_is_refused_and_named(tmp_path):
    model = model_of("llama", "csd")
    with new_cache(model, tmp_path, fingerprint="x") as cache, torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
        cache.commit()
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    with pytest.raises(StoreMismatchError, match="num_key_value_heads is 2, not 4"):
        StorageCache.open(tmp_path, "a", config=config, **SETTINGS)
    with pytest.raises(StoreMismatchError, match="model_type"):
        open_cache(model_of("qwen2", "csd"), tmp_path)
    with pytest.raises(StoreMismatchError, match="other weights.*'x', not 'y'"):
        open_cache(model, tmp_path, fingerprint="y")
    with pytest.raises(TypeError, match="config"):
        StorageCache.open(tmp_path, "a", config={})
    # Nothing was taken by those that failed, and what says nothing of keys and values does not matter.
    config = copy.deepcopy(model.config)
    config.transformers_version, config.use_cache, config.eos_token_id = "9.9", False, 7
    StorageCache.open(tmp_path, "a", config=config, fingerprint="x", **SETTINGS).close()
    with StorageCache.open(tmp_path, "a", **SETTINGS) as cache, torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == 6


def test_weights_have_a_fingerprint():
    model = model_of("llama", "csd")
    before = torch_csd.fingerprint(model)
    assert before == torch_csd.fingerprint(copy.deepcopy(model)) != torch_csd.fingerprint(model_of("qwen2", "csd"))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    assert torch_csd.fingerprint(changed) != before
    assert torch_csd.fingerprint(copy.deepcopy(model).to(torch.bfloat16)) != before


def test_forks_with_and_without_a_name(tmp_path):
    model = model_of("llama", "csd")
    ids = torch.arange(1, 80)[None] % VOCABULARY
    with new_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        cache.commit(ids)
        with cache.fork("b") as fork:
            model(ids[:, :3], past_key_values=fork)
            fork.commit()
            assert fork.get_seq_length() == 82 and cache.get_seq_length() == 79
        with copy.deepcopy(cache) as scratch:
            model(ids[:, :3], past_key_values=scratch)
            with pytest.raises(StoreError, match="no name"):
                scratch.commit()
        with pytest.raises(StoreBusyError):
            open_cache(model, tmp_path)
    with open_cache(model, tmp_path, "b") as cache:
        assert cache.get_seq_length() == 82
        assert cache.store.token_ids is None


def test_a_commit_in_the_middle_of_a_forward_is_refused(tmp_path):
    model = model_of("llama", "csd")
    with new_cache(model, tmp_path) as cache:
        states = torch.randn(1, 2, 10, 16)
        cache.update(states, states, 0)
        with pytest.raises(StoreError, match="between forwards"):
            cache.commit()
        cache.update(states, states, 1)
        cache.commit()


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_cache_that_keeps_more_than_keys_and_values_cannot_be_durable(family, tmp_path):
    with pytest.raises(NotImplementedError, match="cannot be durable"):
        StorageCache(make_config(family), tmp_path, durable=True, name="a", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_cache_can_be_looked_at(tmp_path):
    model = model_of("llama", "csd")
    ids = torch.arange(1, 80)[None] % VOCABULARY
    with new_cache(model, tmp_path) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        cache.commit(ids)
        with open_cache(model, tmp_path, read_only=True) as reader:
            k = reader.layers[0].keys
            q = torch.randn(1, 4, 1, k.shape[3])
            out = torch.nn.functional.scaled_dot_product_attention(q, k, reader.layers[0].values, enable_gqa=True)
            assert out.shape == (1, 4, 1, k.shape[3])
            with pytest.raises(StoreError, match="read only"):
                model(ids[:, :1], past_key_values=reader)


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "scratch"])
def test_a_prompt_without_room_is_refused_before_it_is_computed(durable, tmp_path):
    model = model_of("llama", "csd")
    settings = {"durable": True, "name": "a"} if durable else {"resident": False}
    with StorageCache(model.config, tmp_path, max_bytes="2MiB", **SETTINGS, **settings) as cache, torch.no_grad():
        model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
        with pytest.raises(StoreFullError, match="wanted room for [0-9]+ bytes.*max_bytes=2097152"):
            model(torch.ones(1, 9000, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == 100
        model(torch.ones(1, 100, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == 200
