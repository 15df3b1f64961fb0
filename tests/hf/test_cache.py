"""StorageCache does to its tokens what DynamicCache does, and refuses what does not fit."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import threading

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import torch_csd
from torch_csd.errors import StoreClosedError
from torch_csd.hf.cache import StorageLayer, StorageSlidingLayer
from torch_csd.tensor import StorageTensor

from .models import generate, make_config, model_of, prompts

WINDOW = 24
LAYERS = 2  # of gemma2: one with a window, one without


def states(tokens, batch=2, heads=2, head_dim=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + tokens)
    return [torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype) for _ in range(2)]


class Both:
    """A StorageCache and a DynamicCache to which the same is done."""

    def __init__(self, ours, stock):
        self.ours, self.stock = ours, stock

    def __getattr__(self, name):
        def call(*args):
            results = [getattr(cache, name)(*args) for cache in (self.ours, self.stock)]
            return results[1]

        return call

    def update(self, tokens, batch=2, seed=0):
        k, v = states(tokens, batch, seed=seed)
        for layer in range(LAYERS):
            ours, stock = self.ours.update(k, v, layer), self.stock.update(k, v, layer)
            for mine, theirs in zip(ours, stock, strict=True):
                assert isinstance(mine, StorageTensor)
                assert torch.equal(mine.to_dense(), theirs)

    def assert_same(self):
        for layer in range(LAYERS):
            assert self.ours.get_seq_length(layer) == self.stock.get_seq_length(layer)
            assert self.ours.get_max_length(layer) == self.stock.get_max_length(layer)
            assert self.ours.is_sliding[layer] == self.stock.is_sliding[layer]
            for q_len in (1, 7, 100):
                assert self.ours.get_mask_sizes(q_len, layer) == self.stock.get_mask_sizes(q_len, layer)
            mine, theirs = self.ours.layers[layer], self.stock.layers[layer]
            assert mine.is_initialized == theirs.is_initialized
            if theirs.is_initialized:
                assert torch.equal(mine.keys.to_dense(), theirs.keys)
                assert torch.equal(mine.values.to_dense(), theirs.values)


@pytest.fixture
def both(new_cache):
    config = make_config("gemma2", sliding_window=WINDOW)
    return Both(new_cache(config), DynamicCache(config=config))


def test_layers_of_plain_attention_are_ours(new_cache):
    cache = new_cache(make_config("gemma2"))
    assert [type(layer) for layer in cache.layers] == [StorageSlidingLayer, StorageLayer]
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer) and isinstance(cache.layers[1], DynamicLayer)
    assert isinstance(cache, DynamicCache)
    assert cache.layers[0].keys is None and cache.layers[0].values is None
    assert len(cache) == 2 and not cache.is_compileable and cache.is_croppable and cache.batch_size == -1


@pytest.mark.parametrize("steps", [(1, 1, 1), (10, 13, 1, 1, 1), (23, 1), (24, 1), (200, 1, 70, 1)], ids=str)
def test_updates_hand_out_what_a_dynamic_cache_does(steps, both):
    both.assert_same()
    for seed, tokens in enumerate(steps):
        both.update(tokens, seed=seed)
        both.assert_same()


def test_what_the_window_left_behind_is_given_back(new_cache):
    cache = new_cache(make_config("mistral", sliding_window=64))
    for _ in range(20):
        cache.update(*states(64), 0)
    assert cache.store.begin(0) == 19 * 64 - 63


@pytest.mark.parametrize("removed", [0, -1, -5, -100])
def test_crop_forgets_the_newest_tokens(removed, both):
    both.activate_past_recording()
    both.update(90)
    both.update(5, seed=1)
    if removed == -100:  # more than there is; only full attention can go back that far
        for cache in (both.ours, both.stock):
            cache.layers[1].crop(removed)
        assert both.ours.get_seq_length(1) == both.stock.get_seq_length(1) == 0
        return
    both.crop(removed)
    both.assert_same()
    both.update(3, seed=2)
    both.crop(-2)
    both.assert_same()
    both.update(40, seed=3)
    both.update(40, seed=4)
    both.assert_same()


def test_crop_before_the_window_is_full_needs_no_recording(both):
    both.ours.crop(0)  # of an empty cache; the stock window layer trips over its own None there
    both.update(20)
    both.crop(-6)
    both.assert_same()
    both.update(30, seed=1)
    both.assert_same()


@pytest.mark.parametrize("tokens, removed", [(10, 4), (90, 4), (90, -4), (90, 0)])
def test_crop_is_refused_in_the_words_of_a_dynamic_cache(tokens, removed, both):
    both.update(tokens)
    errors = []
    for cache in (both.ours, both.stock):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            cache.crop(removed)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    both.assert_same()


def test_rows_are_reordered_selected_and_repeated(both):
    both.update(90)
    both.reorder_cache(torch.tensor([1, 0]))
    both.assert_same()
    both.update(1, seed=1)
    both.batch_repeat_interleave(3)
    both.assert_same()
    both.update(70, batch=6, seed=2)
    both.batch_select_indices(torch.tensor([5, 0, 0]))
    both.assert_same()
    both.update(2, batch=3, seed=3)
    both.batch_select_indices(torch.tensor([True, False, True]))
    both.assert_same()
    both.batch_select_indices(torch.tensor([-1]))
    both.update(2, batch=1, seed=4)
    both.assert_same()


def test_rows_of_an_empty_cache_may_be_reordered(both):
    both.reorder_cache(torch.tensor([1, 0]))
    both.batch_repeat_interleave(2)
    both.batch_select_indices(torch.tensor([0]))
    both.update(3, batch=5)
    both.assert_same()


def test_a_reset_cache_takes_another_batch_and_other_heads(both):
    both.update(90)
    both.reset()
    both.assert_same()
    assert both.ours.layers[0].keys is None
    both.update(30, batch=3)
    both.assert_same()
    both.ours.reset()
    both.ours.update(*states(4, heads=1, head_dim=64, dtype=torch.bfloat16), 0)


def test_a_deep_copy_is_a_fork_that_goes_its_own_way(both):
    both.update(90)
    fork = Both(copy.deepcopy(both.ours), copy.deepcopy(both.stock))
    assert fork.ours.store is not both.ours.store
    assert all(layer.store is fork.ours.store for layer in fork.ours.layers)
    fork.assert_same()
    fork.update(5, seed=1)
    both.update(70, seed=2)
    fork.reorder_cache(torch.tensor([1, 1]))
    fork.assert_same()
    both.assert_same()
    both.ours.close()
    fork.update(2, seed=3)
    fork.assert_same()
    fork.ours.close()


def test_a_fork_of_a_cache_without_a_config_makes_its_layers_in_its_own_store(new_cache):
    cache = new_cache()
    fork = copy.deepcopy(cache)
    fork.update(*states(3), 1)
    assert len(fork) == 2 and len(cache) == 0
    assert all(layer.store is fork.store for layer in fork.layers)
    fork.close()


def test_a_layer_may_be_copied_alone(new_cache):
    cache = new_cache()
    k, v = states(70)
    cache.update(k, v, 0)
    layer = copy.deepcopy(cache.layers[0])
    layer.update(*states(1), 0)
    assert layer.get_seq_length() == 71 and cache.get_seq_length() == 70
    assert torch.equal(cache.layers[0].keys.to_dense(), k)
    layer.store.close()


def test_early_initialisation_keeps_nothing(new_cache):
    cache = new_cache(make_config("gemma2"))
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    assert cache.layers[0].keys.numel() == 0
    cache.update(*states(5), 0)
    assert cache.get_seq_length() == 5


def test_iterating_yields_keys_values_and_window(both):
    both.update(5)
    for mine, theirs in zip(both.ours, both.stock, strict=True):
        assert torch.equal(mine[0].to_dense(), theirs[0]) and torch.equal(mine[1].to_dense(), theirs[1])
        assert (mine[2] is None) == (theirs[2] is None)


def test_offload_and_prefetch_of_a_layer_do_nothing(both):
    both.update(5)
    for layer in both.ours.layers:
        layer.offload()
        layer.prefetch()
    both.assert_same()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch": 3}, "batch of 2 sequences, got 3"),
        ({"heads": 4}, "num_kv_heads"),
        ({"head_dim": 24}, "head_dim"),
        ({"head_dim": 12}, "multiple of 8, got 12"),
        ({"dtype": torch.bfloat16}, "torch.float32.*torch.bfloat16"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(wrong, message, both):
    both.update(90)
    for layer in range(LAYERS):
        with pytest.raises(ValueError, match=message):
            both.ours.update(*states(3, **wrong), layer)
    both.assert_same()
    both.update(4, seed=1)
    both.assert_same()


def test_a_first_update_that_does_not_fit_leaves_an_empty_cache(both):
    with pytest.raises(ValueError, match="multiple of 8"):
        both.ours.update(*states(3, head_dim=4), 0)
    with pytest.raises(ValueError, match="agree"):
        both.ours.update(states(3)[0], states(4)[1], 0)
    with pytest.raises(ValueError, match="agree"):
        both.ours.update(states(3)[0][0], states(3)[1][0], 0)
    both.assert_same()
    both.update(3)
    both.assert_same()


def test_another_device_is_refused(new_cache):
    cache = new_cache()
    cache.update(*states(3), 0)
    with pytest.raises(ValueError, match="cpu.*meta"):
        cache.update(*(tensor.to("meta") for tensor in states(3)), 0)
    assert cache.get_seq_length() == 3


def test_a_batch_of_another_size_is_refused_by_generate(new_cache):
    model = model_of("llama", "csd")
    cache = new_cache(model.config)
    generate(model, prompts(9, 9), cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="batch of 2 sequences, got 3"), torch.no_grad():
        model(prompts(4, 4, 4)["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("config", ["/nvme/kv", {"num_hidden_layers": 2}, 3])
def test_a_config_that_is_none_is_refused(config, tmp_path):
    with pytest.raises(TypeError, match="model.config"):
        torch_csd.StorageCache(config, tmp_path)


def test_a_model_in_place_of_its_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        torch_csd.StorageCache(model_of("llama", "csd"), tmp_path)


def test_a_configuration_of_sparse_attention_says_that_nothing_is_stored(new_cache):
    from transformers import DeepseekV32Config

    with pytest.warns(UserWarning, match="stays in memory"):
        new_cache(DeepseekV32Config(num_hidden_layers=2))


def test_a_closed_cache_refuses_every_use(new_cache):
    cache = new_cache(make_config("gemma2"))
    with cache as same:
        assert same is cache
        cache.update(*states(90), 0)
        assert cache.stats()["directory"] == cache.store.directory
    cache.close()
    for use in (
        lambda: cache.update(*states(1), 0),
        lambda: cache.get_seq_length(),
        lambda: cache.get_mask_sizes(1, 0),
        lambda: cache.reorder_cache(torch.tensor([0, 1])),
        lambda: cache.crop(-1),
        lambda: cache.reset(),
        lambda: cache.layers[0].keys,
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(StoreClosedError):
            use()


def test_pickling_says_what_to_do_instead(new_cache):
    with pytest.raises(TypeError, match="deepcopy"):
        pickle.dumps(new_cache())


def test_nothing_is_left_in_the_directory(tmp_path):
    cache = torch_csd.StorageCache(directory=tmp_path, memory_budget="8MiB", resident=False)
    cache.update(*states(300), 0)
    del cache
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_drive_that_fills_up_in_the_middle_of_a_forward_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]).returncode != 0:
        pytest.skip("mount refused (container without CAP_SYS_ADMIN)")
    try:
        model = model_of("llama", "csd")
        with torch_csd.StorageCache(model.config, tmp_path, memory_budget="1MiB", resident=False) as cache:
            inputs = prompts(200, 200)
            with torch.no_grad():
                model(**inputs, past_key_values=cache)
                held = [layer.keys.to_dense() for layer in cache.layers]
                more = prompts(6000, 6000)
                more["attention_mask"] = torch.ones(2, 6200, dtype=torch.long)
                with pytest.raises(torch_csd.StoreFullError, match="wanted room for"):
                    model(**more, past_key_values=cache)  # refused at once
                # As if another process took the room after that.
                monkeypatch.setattr(cache.store, "check_room", lambda *args, **kwargs: None)
                with pytest.raises(torch_csd.StoreFullError, match="No space left"):
                    model(**more, past_key_values=cache)
                assert [layer.get_seq_length() for layer in cache.layers] == [200] * len(held)
                for layer, keys in zip(cache.layers, held, strict=True):
                    assert torch.equal(layer.keys.to_dense(), keys)
                step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(2, 201)}
                assert model(**step, past_key_values=cache).logits.isfinite().all()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---- what a layer holds is asked of the store, whoever changed it ---------------------------------------------------


def direct_append(cache, k, v):
    cache.store.append(0, k, v)


def raw_append(cache, k, v):
    torch.ops.torch_csd.append(cache.store.layer(0).handle, k, v)


def append_by_cat(cache, k, v):
    torch.cat([cache.layers[0].keys, k], dim=-2)
    torch.cat([cache.layers[0].values, v], dim=-2)


@pytest.mark.parametrize("append", [direct_append, raw_append, append_by_cat])
def test_tokens_appended_past_the_cache_are_seen_by_the_next_update(append, new_cache):
    cache = new_cache()
    parts = [states(1, seed=seed) for seed in range(5)]
    cache.update(*parts[0], 0)
    cache.update(*parts[1], 0)
    append(cache, *parts[2])
    assert cache.get_seq_length() == cache.layers[0].keys.shape[2] == 3
    keys, _ = cache.update(*parts[3], 0)
    assert torch.equal(keys.to_dense(), torch.cat([k for k, _ in parts[:4]], dim=2))
    cache.store.truncate(0, 1)
    assert cache.get_seq_length() == 1
    with pytest.raises(torch_csd.StaleTensorError):
        keys.to_dense()
    keys, _ = cache.update(*parts[4], 0)
    assert torch.equal(keys.to_dense(), torch.cat([parts[0][0], parts[4][0]], dim=2))


def test_rows_changed_past_the_cache_are_seen_by_the_next_update(new_cache):
    cache = new_cache()
    k, v = states(1, batch=2)
    cache.update(k, v, 0)
    cache.update(k, v, 0)
    cache.store.reorder(0, [1, 0])
    keys, _ = cache.update(k, v, 0)
    assert torch.equal(keys.to_dense(), torch.cat([k.flip(0), k.flip(0), k], dim=2))
    cache.store.reorder(0, [0, 0, 1])
    with pytest.raises(ValueError, match="3 rows, got a batch of 2"):
        cache.update(k, v, 0)
    assert cache.get_seq_length() == 3
    cache.update(k[[0, 0, 1]], v[[0, 0, 1]], 0)
    cache.store.free(0)
    assert cache.get_seq_length() == 0
    keys, _ = cache.update(k, v, 0)
    assert torch.equal(keys.to_dense(), k)


def test_an_update_of_many_tokens_and_back_is_checked_again(new_cache):
    cache = new_cache()
    for tokens in (1, 1, 70, 1, 1):
        cache.update(*states(tokens), 0)
    for wrong in ({"batch": 3}, {"heads": 4}, {"head_dim": 24}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError):
            cache.update(*states(1, **wrong), 0)
    k, v = states(1)
    with pytest.raises(ValueError):
        cache.update(k, v.to(torch.bfloat16), 0)
    assert cache.get_seq_length() == 74


def test_two_threads_that_update_one_layer_are_each_handed_their_own_token(new_cache):
    cache = new_cache()
    cache.update(*states(70, batch=1), 0)
    mistakes = []

    def run(seed):
        for step in range(200):
            k, v = states(1, batch=1, seed=1000 * seed + step)
            keys, values = cache.update(k, v, 0)
            if not torch.equal(keys[:, :, -1:].to_dense(), k) or not torch.equal(values[:, :, -1:].to_dense(), v):
                mistakes.append((seed, step))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mistakes == [] and cache.get_seq_length() == 470
