"""A cache that is set to be sparse: where it chooses everything, models generate what they do with a DynamicCache."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import torch_csd
from torch_csd import Adaptive, PageTopK, SparF

from .models import (
    assert_same_generation,
    generate,
    implementations,
    model_of,
    prompts,
    stock_cache,
    stock_implementation,
)

# Plain, soft-capped beside windows, sinks beside windows, ALiBi, latents.
CHOSEN = ["llama", "gemma2", "gpt_oss", "falcon", "deepseek_v3"]
EVERYTHING = {
    "pages": PageTopK(fraction=1.0, local=0, sink=0),
    "adaptive": Adaptive(mass=0.999999, provable=True, heads_per_choice=2),
    "sparf": SparF(channels=1000, tokens=10_000),
    "sketch": SparF(channels=1000, tokens=10_000, step1="sketch"),
}
SHORT = {"max_new_tokens": 12}


def make_pair(family):
    implementation = implementations(family)[0]
    return model_of(family, implementation), model_of(family, stock_implementation(family, implementation))


@functools.cache
def stock_generation(family, lengths, num_beams):
    stock = make_pair(family)[1]
    return generate(stock, prompts(*lengths), stock_cache(stock), num_beams=num_beams, **SHORT)


@pytest.mark.parametrize("sparse", EVERYTHING)
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("family", CHOSEN)
def test_a_choice_of_everything_generates_what_a_dynamic_cache_does(family, num_beams, sparse, new_cache):
    lengths = (300, 3, 129)
    model = make_pair(family)[0]
    cache = new_cache(model.config, sparse=EVERYTHING[sparse])
    ours = generate(model, prompts(*lengths), cache, num_beams=num_beams, **SHORT)
    assert_same_generation(ours, stock_generation(family, lengths, num_beams))
    # Latents are read into memory, and attended to there.
    assert (cache.stats()["sparse_attends"] > 0) == (family != "deepseek_v3")


@pytest.mark.parametrize("sparse", ["pages", "sparf"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_assistant_may_guess_ahead(family, sparse, new_cache):
    model, stock = make_pair(family)
    assistant = copy.deepcopy(stock)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in assistant.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    inputs = prompts(190)
    ours = generate(
        model, inputs, new_cache(model.config, sparse=EVERYTHING[sparse]), assistant_model=assistant, max_new_tokens=24
    )
    theirs = generate(stock, inputs, stock_cache(stock), assistant_model=assistant, max_new_tokens=24)
    assert_same_generation(ours, theirs)


def test_a_cache_may_become_sparse_and_exact_again_between_forwards(new_cache):
    model, stock = make_pair("llama")
    inputs = prompts(400)["input_ids"]
    cache, other = new_cache(model.config, read_ahead=0), stock_cache(stock)
    settings = [None, PageTopK(tokens=64, local=0, sink=0), None, EVERYTHING["pages"], EVERYTHING["sparf"], None]
    with torch.no_grad():
        model(inputs, past_key_values=cache)
        stock(inputs, past_key_values=other)
        for step, sparse in enumerate(settings):
            cache.sparse = sparse
            assert cache.sparse == sparse
            token = torch.tensor([[7 + step]])
            ours = model(token, past_key_values=cache).logits
            theirs = stock(token, past_key_values=other).logits
            if step != 1:
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            else:
                assert (ours - theirs).abs().max() > 1e-3, "little was attended to"
                cache.crop(-1)  # what the second layer holds comes from it
                cache.sparse = None
                model(token, past_key_values=cache)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_layers_with_a_window_are_exact(family, new_cache):
    model = make_pair(family)[0]
    cache = new_cache(model.config, sparse=PageTopK(tokens=64))
    generate(model, prompts(200), cache, max_new_tokens=9)
    windows = sum(kind == "sliding_attention" for kind in model.config.layer_types)
    stats = cache.stats()
    full = model.config.num_hidden_layers - windows
    assert windows > 0 and stats["sparse_attends"] == 8 * full and stats["attend_calls"] >= 8 * (full + windows)


def test_a_quarter_of_the_pages_is_less_to_read(tmp_path):
    model = model_of("llama", "csd")
    inputs = prompts(1000)
    reads = []
    for choice in (None, PageTopK(fraction=0.25)):
        with torch_csd.StorageCache(
            model.config, tmp_path, sparse=choice, resident=False, read_ahead=0, memory_budget="8MiB", threads=2
        ) as cache:
            tokens, _ = generate(model, inputs, cache, **SHORT)
            assert tokens.shape == (1, 1012)
            cache.store.flush()
            stats = cache.stats()
            assert (stats["missing_mass_mean"] > 0) == (choice is not None) and stats["missing_mass_max"] <= 1
            reads.append(stats["drive_read_bytes"])
    assert 0 < reads[1] < 0.6 * reads[0]


def test_a_sketch_that_cannot_fit_is_refused_before_a_prefill_stores_anything(tmp_path):
    model = model_of("llama", "csd")
    inputs = prompts(4000, 4000, 4000, 4000)
    with torch_csd.StorageCache(
        model.config, tmp_path, sparse=Adaptive(), memory_budget="1MiB", read_ahead=0, threads=2
    ) as cache:
        with pytest.raises(torch_csd.MemoryBudgetError, match="4000 tokens of 4 rows in 2 layers"), torch.no_grad():
            model(**inputs, past_key_values=cache)
        assert cache.stats()["appended_tokens"] == 0 and cache.get_seq_length() == 0
        tokens, _ = generate(model, prompts(200), cache, **SHORT)
        assert tokens.shape == (1, 212)


def test_what_keeps_nothing_to_choose_by_is_not_refused(tmp_path):
    """A layer with a window comes first, of another shape than the layers that are attended to sparsely."""
    config = make_pair("gemma2")[0].config
    with torch_csd.StorageCache(
        config, tmp_path, sparse=Adaptive(), memory_budget="8MiB", read_ahead=0, threads=1
    ) as cache:
        for _ in range(2):
            wide, narrow = torch.randn(2, 4, 16, 6400, 16), torch.randn(2, 4, 2, 6400, 16)
            cache.update(*wide, 0)
            cache.update(*narrow, 1)
        assert cache.store.lengths(0) == cache.store.lengths(1) == [12800] * 4


@pytest.mark.parametrize("asked", [True, False], ids=["refused", "failed"])
def test_a_sketch_that_finds_no_room_behind_other_layers_leaves_the_cache_as_it_was(tmp_path, monkeypatch, asked):
    config = make_pair("gemma2")[0].config
    with torch_csd.StorageCache(
        config, tmp_path, sparse=Adaptive(), memory_budget="1MiB", read_ahead=0, threads=1
    ) as cache:
        if not asked:
            monkeypatch.setattr(cache.store, "check_room", lambda *args, **kwargs: None)
        first, much = torch.randn(2, 4, 2, 100, 16), torch.randn(2, 4, 2, 64 * 120, 16)
        for layer in range(2):
            cache.update(*first, layer)
        cache.update(*much, 0)
        with pytest.raises(torch_csd.MemoryBudgetError, match="bytes of summaries" if asked else "has no room for a"):
            cache.update(*much, 1)
        assert [cache.store.lengths(layer) for layer in range(2)] == [[100] * 4] * 2
        for layer in range(2):
            cache.update(*first, layer)
        assert [cache.store.lengths(layer) for layer in range(2)] == [[200] * 4] * 2


def test_copies_keep_the_setting(new_cache):
    model, stock = make_pair("llama")
    sparse = EVERYTHING["pages"]
    cache = new_cache(model.config, sparse=sparse)
    prefix = prompts(150)
    with torch.no_grad():
        model(**prefix, past_key_values=cache)
    more = {name: torch.cat([value, value[:, :20]], dim=1) for name, value in prefix.items()}
    theirs = generate(stock, more, stock_cache(stock), **SHORT)
    for make in (copy.deepcopy, lambda cache: cache.fork()):
        with make(cache) as other:
            assert other.sparse == sparse
            other.sparse = None
            assert cache.sparse == sparse
            other.sparse = EVERYTHING["sparf"]
            assert_same_generation(generate(model, more, other, **SHORT), theirs)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_durable_cache_may_be_opened_to_be_sparse(tmp_path, read_only):
    model, stock = make_pair("llama")
    inputs = prompts(300)
    settings = {"memory_budget": "8MiB", "threads": 2}
    with torch_csd.StorageCache(model.config, tmp_path, durable=True, name="one", **settings) as cache:
        tokens, _ = generate(model, inputs, cache, **SHORT)
        cache.commit(tokens)
    for sparse in EVERYTHING.values():
        with torch_csd.StorageCache.open(
            tmp_path, "one", config=model.config, sparse=sparse, read_only=read_only, **settings
        ) as cache:
            assert cache.sparse == sparse
            if read_only:  # what is there, by the last layer's query
                q = torch.randn(1, 4, 1, 16)
                for ours, exact in zip(cache.store.attend(1, q), cache.store.attend(1, q, sparse=None), strict=True):
                    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-5)
                continue
            more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            ours = generate(model, more, cache, **SHORT)
            assert_same_generation(ours, generate(stock, more, stock_cache(stock), **SHORT))


def test_a_shared_prefix_is_attended_to_sparsely(tmp_path):
    model, stock = make_pair("llama")
    inputs = prompts(260)
    settings = {"memory_budget": "8MiB", "threads": 2, "durable": True}
    with torch_csd.StorageCache(model.config, tmp_path, name="one", **settings) as cache:
        generate(model, inputs, cache, **SHORT)
        cache.crop(260 - cache.get_seq_length())
        cache.commit(inputs["input_ids"])
        with torch_csd.StorageCache(
            model.config, tmp_path, name="two", sparse=EVERYTHING["pages"], **settings
        ) as other:
            other.use_prefix(other.match_prefix(inputs["input_ids"]))
            assert other.get_seq_length() == 259
            ours = generate(model, inputs, other, **SHORT)
    assert_same_generation(ours, generate(stock, inputs, stock_cache(stock), **SHORT))
