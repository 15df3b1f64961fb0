"""A drive's share on a card, on an emulated one: who does what, what is moved, and what goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import emulated_card
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_attention_equal, random_kv

import torch_csd
import torch_csd.cuda
from torch_csd import (
    GpuUnavailableError,
    KVStore,
    MemoryBudgetError,
    PageTopK,
    StorageTensor,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    ops,
    reference,
)
from torch_csd.cuda.pinned import PinnedTransfer
from torch_csd.cuda.transfer import Completion

HEADS, HEAD_DIM_K, HEAD_DIM_V = 2, 16, 24  # one geometry: each takes seconds to compile
PAGE_BYTES = 4 * HEADS * (HEAD_DIM_K + HEAD_DIM_V) * 64  # of float32


class FaultyTransfer(PinnedTransfer):
    """Fails reads or writes when it is told to, and counts what is under way."""

    made: list[FaultyTransfer] = []

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.failing: dict[bool, int] = {}  # by write: errno
        self.bytes_max = 0
        self._bytes = 0
        FaultyTransfer.made.append(self)

    def submit(self, request):
        super().submit(request)
        self._bytes += request.byte_count
        self.bytes_max = max(self.bytes_max, self._bytes)

    def reap(self, *, wait=False):
        completions = []
        for completion in super().reap(wait=wait):
            request = completion.request
            self._bytes -= request.byte_count
            code = self.failing.get(request.write)
            error = completion.error if code is None else OSError(code, os.strerror(code))
            completions.append(Completion(request, error, completion.ready))
        return completions


@pytest.fixture
def install(monkeypatch):
    def install(**settings: object) -> None:
        FaultyTransfer.made.clear()
        emulated_card.install(monkeypatch, make_transfer=FaultyTransfer, **settings)

    return install


def kv(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    return random_kv(batch, HEADS, tokens, HEAD_DIM_K, HEAD_DIM_V, dtype=dtype, seed=seed)


def query(batch: int, q_len: int = 1, num_heads: int = 4) -> torch.Tensor:
    return torch.randn(batch, num_heads, q_len, HEAD_DIM_K)


def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, y], dim=2)


# ---- what is moved ---------------------------------------------------------------------------------------------------


def test_pages_of_the_drive_are_read_to_the_card_and_tails_stay_near(install, make_store):
    install()
    store = make_store(resident=False)
    store.append(0, *kv(2, 700))
    q = query(2)
    assert_attention_equal(store.attend(0, q)[0], reference.attention(q, *kv(2, 700))[0])
    stats = store.stats()
    assert stats["gpu_drive_read_bytes"] == 2 * 10 * PAGE_BYTES
    assert stats["gpu_host_read_bytes"] == 0
    assert stats["gpu_written_bytes"] == stats["gpu_packed_bytes"] == 2 * 10 * PAGE_BYTES
    assert stats["drive_read_bytes"] == stats["gpu_drive_read_bytes"]
    assert (stats["gpu_attends"], stats["near_attends"]) == (1, 0)
    assert (stats["gpu"], stats["gpu_io"], stats["gpu_reason"]) == ("emulation", "pinned", "emulated")


def test_pages_of_host_memory_are_copied_to_the_card(install, make_store):
    install()
    store = make_store(resident=True)
    store.append(0, *kv(2, 700))
    store.attend(0, query(2))
    stats = store.stats()
    assert (stats["gpu_drive_read_bytes"], stats["gpu_host_read_bytes"]) == (0, 2 * 10 * PAGE_BYTES)
    assert stats["gpu_packed_bytes"] == stats["gpu_to_host_bytes"] == 2 * 10 * PAGE_BYTES
    assert stats["gpu_written_bytes"] == 0


@pytest.mark.parametrize("executor", ["near", "gpu", "auto"])
@pytest.mark.parametrize("resident", [True, False])
def test_what_stays_on_the_card_moves_once(install, make_store, executor, resident):
    install(executor=executor, gpu_budget=2 * 5 * PAGE_BYTES)
    store = make_store(resident=resident)
    store.append(0, *kv(2, 650))
    moved = []
    for step in range(4):
        q = query(2)
        assert_attention_equal(store.attend(0, q)[0], reference.attention(q, *store.read(0))[0])
        stats = store.stats()
        moved.append(stats["gpu_drive_read_bytes"] + stats["gpu_host_read_bytes"])
        assert stats["gpu_resident_bytes"] == 2 * 5 * PAGE_BYTES, "half of ten pages in each of two rows"
        if executor == "near":
            assert moved[-1] == 2 * 5 * PAGE_BYTES
        store.append(0, *kv(2, 1, seed=step))
    if executor == "gpu":
        assert [after - before for before, after in zip(moved, moved[1:], strict=False)] == [2 * 5 * PAGE_BYTES] * 3


def test_a_budget_is_divided_among_layers(install, make_store):
    install(gpu_budget=12 * PAGE_BYTES)
    store = make_store(resident=False)
    for layer in range(4):
        store.append(layer, *kv(1, 640))
    for layer in range(4):
        store.attend(layer, query(1))
    assert store.stats()["gpu_resident_bytes"] == 12 * PAGE_BYTES
    before = store.stats()["gpu_drive_read_bytes"]
    for layer in range(4):
        store.attend(layer, query(1))
    stats = store.stats()
    ahead = stats["gpu_read_ahead_wasted_bytes"]
    assert stats["gpu_drive_read_bytes"] - before - ahead <= (40 - 12) * PAGE_BYTES + 10 * PAGE_BYTES
    store.free(2)
    assert store.stats()["gpu_resident_bytes"] == 9 * PAGE_BYTES


def test_the_next_layers_pages_are_read_ahead(install, make_store):
    install(gpu_staging="1MiB")
    store = make_store(resident=False)
    layers = {layer: kv(1, 640, seed=layer) for layer in range(3)}
    for layer, (k, v) in layers.items():
        store.append(layer, k, v)
    for step in range(4):
        for layer, (k, v) in layers.items():
            q = query(1)
            assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, k, v)[0])
            layers[layer] = tuple(both(old, new) for old, new in zip((k, v), kv(1, 1, seed=step), strict=True))
            store.append(layer, *(x[:, :, -1:] for x in layers[layer]))
    stats = store.stats()
    assert stats["gpu_read_ahead_bytes"] > 0 and stats["gpu_read_ahead_wasted_bytes"] == 0
    assert stats["gpu_drive_read_bytes"] <= (12 * 10 + 10) * PAGE_BYTES, "nothing is read twice"


def test_pages_that_a_mask_or_a_window_hides_are_not_read(install, make_store):
    install()
    store = make_store(resident=False)
    k, v = kv(2, 640)
    store.append(0, k, v)
    q = query(2)
    mask = torch.zeros(2, 1, 1, 640, dtype=torch.bool)
    mask[0, ..., 70:80] = mask[1, ..., 300] = True
    assert_attention_equal(store.attend(0, q, mask=mask)[0], reference.attention(q, k, v, mask=mask)[0])
    assert store.stats()["gpu_drive_read_bytes"] == 2 * PAGE_BYTES
    rules = dict(causal=True, window=100)
    assert_attention_equal(store.attend(0, q, **rules)[0], reference.attention(q, k, v, **rules)[0])
    assert store.stats()["gpu_drive_read_bytes"] == (2 + 2 * 2) * PAGE_BYTES


def test_rows_that_share_pages_are_read_once(install, make_store):
    install()
    store = make_store(resident=False)
    k, v = kv(1, 640)
    store.append(0, k, v)
    store.reorder(0, [0, 0, 0])
    q = query(3)
    expected = reference.attention(q, *(x.expand(3, -1, -1, -1) for x in (k, v)))[0]
    assert_attention_equal(store.attend(0, q)[0], expected)
    assert store.stats()["gpu_drive_read_bytes"] == 10 * PAGE_BYTES


# ---- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_pages_packed_on_the_card_are_those_of_the_drives_packer(tmp_path, monkeypatch, kv_dtype, resident):
    dtype = torch.bfloat16 if kv_dtype == "bfloat16" else torch.float32
    k, v = kv(2, 3000, dtype=dtype)
    splits = (0, 10, 64, 700, 701, 1500, 3000)
    with KVStore(tmp_path, kv_dtype=kv_dtype, memory_budget="16MiB") as plain:
        for begin, end in zip(splits, splits[1:], strict=False):
            plain.append(0, k[:, :, begin:end], v[:, :, begin:end])
        assert "gpu" not in plain.stats()
        emulated_card.install(monkeypatch, gpu_staging="1MiB")
        with KVStore(tmp_path, kv_dtype=kv_dtype, memory_budget="16MiB", resident=resident) as store:
            for begin, end in zip(splits, splits[1:], strict=False):
                store.append(0, k[:, :, begin:end], v[:, :, begin:end])
            assert store.stats()["gpu_packed_bytes"] > 0
            for ours, theirs in zip(store.read(0), plain.read(0), strict=True):
                assert torch.equal(ours, theirs)


def test_what_is_on_its_way_is_bounded(install, make_store):
    install(gpu_staging="1MiB")
    store = make_store(resident=False, memory_budget="32MiB")
    k, v = kv(1, 64 * 400)
    store.append(0, k, v)
    store.append(1, v[..., :16].contiguous(), k.repeat(1, 1, 1, 2)[..., :24].contiguous())
    assert torch.equal(store.read(0)[1], v)
    assert store.stats()["gpu_packed_bytes"] == 800 * PAGE_BYTES
    assert FaultyTransfer.made[0].bytes_max <= 2**20


def test_an_append_returns_before_its_pages_are_on_the_drive(install, make_store, monkeypatch):
    install()
    store = make_store(resident=False)
    finished = []
    real = ops.finish_reserved
    monkeypatch.setattr(ops, "finish_reserved", lambda *args: (finished.append(args), real(*args)))
    store.append(0, *kv(1, 640))
    early = len(finished)
    store.flush()
    assert early == 0 < len(finished)


def test_appends_that_others_have_to_see_are_left_to_the_drive(install, make_store):
    install()
    store = make_store(sparse=PageTopK(fraction=0.5), resident=False)
    k, v = kv(2, 640)
    store.append(0, k, v)  # summaries are made of pages as they are packed
    q = query(2)
    out = store.attend(0, q)[0]
    store.sparse = None
    ragged = make_store(resident=False)
    ragged.append(0, k, v, lengths=[640, 100])
    assert store.stats()["gpu_packed_bytes"] == ragged.stats()["gpu_packed_bytes"] == 0
    assert out.isfinite().all()
    for row, length in enumerate((640, 100)):
        expected = reference.attention(q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length])[0]
        assert_attention_equal(ragged.attend(0, q)[0][row : row + 1], expected)


# ---- attention -------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn):
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
    q_len = draw(st.sampled_from([1, 1, 2, 5]))
    length = min(lengths)
    return {
        "lengths": lengths,
        "q_len": min(q_len, length),
        "causal": draw(st.sampled_from([False, "lower_right"])),
        "window": draw(st.none() | st.integers(1, 300)),
        "softcap": draw(st.none() | st.just(5.0)),
        "mask": draw(st.sampled_from([None, "bool", "float", "row"])),
        "sinks": draw(st.booleans()),
        "alibi": draw(st.booleans()),
        "kv_begin": draw(st.integers(0, length - 1)) if draw(st.booleans()) else 0,
        "executor": draw(st.sampled_from(["near", "gpu"])),
        "budget_pages": draw(st.sampled_from([0, 2, 100])),
        "resident": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(call=calls())
@settings(max_examples=60)
def test_attention_in_several_places_is_attention(tmp_path, call):
    with pytest.MonkeyPatch.context() as monkeypatch:
        emulated_card.install(
            monkeypatch, executor=call["executor"], gpu_budget=call["budget_pages"] * PAGE_BYTES, gpu_staging="1MiB"
        )
        torch.manual_seed(call["seed"])
        lengths, kv_begin = call["lengths"], call["kv_begin"]
        batch, longest = len(lengths), max(lengths)
        k, v = kv(batch, longest, seed=call["seed"])
        with KVStore(tmp_path, memory_budget="4MiB", resident=call["resident"]) as store:
            if len(set(lengths)) == 1:
                store.append(0, k, v)
            else:
                store.append(0, k, v, lengths=lengths)
            q = query(batch, call["q_len"])
            rules = {"causal": call["causal"], "window": call["window"], "softcap": call["softcap"]}
            if call["sinks"]:
                rules["sinks"] = torch.randn(4)
            if call["alibi"]:
                rules["alibi_slopes"] = torch.rand(4)
            mask = None
            if call["mask"] == "bool":
                mask = torch.rand(batch, 1, 1, longest - kv_begin) > 0.4
            elif call["mask"] == "float":
                mask = torch.randn(1, 4, call["q_len"], longest - kv_begin)
            elif call["mask"] == "row":
                mask = torch.rand(batch, 1, 1, 1) > 0.3
            for _ in range(2):  # the second time with what stayed on the card
                out, lse = store.attend(0, q, mask=mask, kv_begin=kv_begin, **rules)
                for row, length in enumerate(lengths):
                    part = slice(row, row + 1)
                    row_mask = None
                    if mask is not None:
                        row_mask = mask[part if mask.shape[0] > 1 else slice(0, 1)]
                        row_mask = row_mask[..., : length - kv_begin] if row_mask.shape[3] > 1 else row_mask
                    expected, expected_lse = reference.attention(
                        q[part], k[part, :, kv_begin:length], v[part, :, kv_begin:length], mask=row_mask, **rules
                    )
                    assert_attention_equal(out[part], expected)
                    torch.testing.assert_close(lse[part].double(), expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("executor", ["near", "gpu", "auto"])
def test_tokens_may_be_reordered_cropped_and_trimmed_under_a_share(install, make_store, executor):
    install(executor=executor, gpu_budget="32MiB")
    store = make_store(resident=False)
    k, v = kv(3, 700)
    store.append(0, k, v)

    def check(begin: int = 0) -> None:
        q = query(k.shape[0])
        assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k[:, :, begin:], v[:, :, begin:])[0])

    check()
    store.reorder(0, [2, 0, 2])
    k, v = k[[2, 0, 2]], v[[2, 0, 2]]
    check()
    store.truncate(0, 130)
    k, v = k[:, :, :130], v[:, :, :130]
    check()
    new = kv(3, 500, seed=7)
    store.append(0, *new)
    k, v = both(k, new[0]), both(v, new[1])
    check()
    fork = store.fork()
    fork.append(0, *kv(3, 300, seed=8))
    store.append(0, *new)
    k, v = both(k, new[0]), both(v, new[1])
    check()
    fork.attend(0, query(3))
    fork.close()
    store.trim(0, 200)
    check(200)
    store.free(0)
    assert store.stats()["gpu_resident_bytes"] == 0


def test_a_share_is_given_anew_when_its_tokens_are_gone(install, make_store):
    install(gpu_budget="32MiB")
    store = make_store(resident=False)
    store.append(0, *kv(1, 700))
    store.attend(0, query(1))
    store.truncate(0, 130)
    store.append(0, *kv(1, 500, seed=7))
    moved = []
    for _ in range(3):
        store.attend(0, query(1))
        moved.append(store.stats()["gpu_drive_read_bytes"])
    assert moved[0] == moved[1] == moved[2]


def test_stored_tensors_go_to_the_card_too(install, make_store):
    install()
    store = make_store(resident=False)
    k, v = kv(2, 700)
    store.append(0, k, v)
    K, V = StorageTensor.pair(store, 0)
    q = query(2, 700)
    for causal in (True, False):
        expected = reference.attention(q, k, v, causal="upper_left" if causal else False)[0]
        ours = torch.nn.functional.scaled_dot_product_attention(q, K, V, is_causal=causal, enable_gqa=True)
        assert_attention_equal(ours, expected)
    assert store.stats()["gpu_attends"] == 2
    torch.testing.assert_close(q @ K.repeat_interleave(2, dim=1).transpose(2, 3), q @ k.repeat_interleave(2, 1).mT)


def test_a_mask_that_leaves_only_the_lowest_number_is_a_mean_over_all(install, make_store):
    install()
    store = make_store(resident=False)
    k, v = kv(1, 200)
    store.append(0, k, v)
    q = query(1, 2)
    mask = torch.full((1, 1, 2, 200), torch.finfo(torch.float32).min)
    mask[..., 1, 50:] = 0
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(store.attend(0, q, mask=mask)[0], expected, atol=2e-5, rtol=0)


def test_threads_may_share_a_card(install, make_store):
    install(executor="auto", gpu_budget="1MiB")
    store = make_store(resident=False)
    errors = []

    def work(layer: int) -> None:
        try:
            k, v = kv(1, 300, seed=layer)
            store.append(layer, k, v)
            for step in range(4):
                new = kv(1, 70, seed=10 * layer + step)
                store.append(layer, *new)
                k, v = both(k, new[0]), both(v, new[1])
                q = query(1)
                assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, k, v)[0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_made_in_inference_mode_serves_outside_of_it(install, make_store, resident):
    install(gpu_budget=4 * PAGE_BYTES)
    k, v = kv(1, 700)
    q = query(1)
    with torch.inference_mode():
        store = make_store(resident=resident)
        store.append(0, k, v)
        store.attend(0, q)
    expected = reference.attention(q, k, v)[0]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_attention_equal(store.attend(0, q)[0], expected)
    store.append(0, k, v)
    with torch.inference_mode():
        assert_attention_equal(store.attend(0, q)[0], reference.attention(q, both(k, k), both(v, v))[0])


def test_queries_that_ask_for_gradients_are_answered_without(install, make_store):
    install()
    store = make_store(resident=False)
    store.append(0, *kv(1, 700))
    q = query(1).requires_grad_()
    out, _ = store.attend(0, q)
    assert_attention_equal(out.detach(), reference.attention(q.detach(), *kv(1, 700))[0])
    with pytest.raises(NotImplementedError, match="not differentiable"):
        out.sum().backward()


# ---- what outlives the process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["float32", "int4"])
def test_what_a_card_wrote_is_committed_and_found_again(install, tmp_path, kv_dtype):
    install()
    k, v = kv(1, 1000)
    q = query(1)
    with KVStore(tmp_path, durable=True, name="a", kv_dtype=kv_dtype, memory_budget="16MiB", resident=False) as store:
        store.append(0, k, v)
        store.commit()
        out = store.attend(0, q)[0]
        stored = store.read(0)
    assert torch_csd.verify(tmp_path) == []
    for read_only in (True, False):
        with KVStore.open(tmp_path, "a", read_only=read_only, memory_budget="16MiB", resident=False) as again:
            for ours, theirs in zip(again.read(0), stored, strict=True):
                assert torch.equal(ours, theirs)
            torch.testing.assert_close(again.attend(0, q)[0], out, atol=1e-6, rtol=0)
            assert again.stats()["gpu_drive_read_bytes"] > 0


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, expected", [(errno.EIO, StoreError), (errno.ENOSPC, StoreFullError)])
def test_a_write_that_fails_undoes_its_append(install, make_store, code, expected):
    install()
    store = make_store(resident=False)
    k, v = kv(2, 200)
    store.append(0, k, v)
    store.append(1, k, v)
    store.flush()
    transfer = FaultyTransfer.made[0]
    transfer.failing[True] = code
    store.append(0, *kv(2, 600, seed=1))
    with pytest.raises(expected, match=rf"failed at byte \d+ .*undone.*{os.strerror(code)}"):
        store.attend(0, query(2))
    transfer.failing.clear()
    assert store.lengths(0) == [200, 200] == store.lengths(1)
    for layer in (0, 1):
        q = query(2)
        assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, k, v)[0])
    new = kv(2, 600, seed=2)
    store.append(0, *new)
    assert torch.equal(store.read(0)[0], both(k, new[0]))


@pytest.mark.parametrize("completions_before", [0, 1])
def test_a_write_that_fails_takes_a_models_cache_back_to_before_its_forward(install, tmp_path, completions_before):
    from hf.models import model_of, prompts

    install()
    model = model_of("llama", "csd")
    with torch.no_grad(), torch_csd.StorageCache(model.config, tmp_path, memory_budget="8MiB", resident=False) as cache:
        model(**prompts(300), past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.store.flush()
        held = [layer.keys.to_dense() for layer in cache.layers]
        transfer = FaultyTransfer.made[0]
        real = transfer.reap
        failing = iter([False] * completions_before + [True])  # the pages of one layer

        def reap(*, wait: bool = False):
            completions = real(wait=wait)
            failed = completions and completions[0].request.write and next(failing, False)
            return [c._replace(error=OSError(errno.EIO, "gone")) for c in completions] if failed else completions

        transfer.reap = reap
        more = prompts(400, seed=2)["input_ids"]
        with pytest.raises(StoreError, match="append is undone"):
            model(input_ids=more, past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [301] * len(held)
        for layer, keys in zip(cache.layers, held, strict=True):
            assert torch.equal(layer.keys.to_dense(), keys)
        ours = model(input_ids=more, past_key_values=cache).logits
        stock = transformers.DynamicCache(config=model.config)
        for ids in (prompts(300)["input_ids"], torch.tensor([[5]]), more):
            expected = model(input_ids=ids, past_key_values=stock).logits
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)


def test_a_read_that_fails_is_an_error_and_not_the_end(install, make_store):
    install(gpu_budget="1MiB")
    store = make_store(resident=False)
    k, v = kv(2, 700)
    store.append(0, k, v)
    store.flush()
    transfer = FaultyTransfer.made[0]
    transfer.failing[False] = errno.EIO
    with pytest.raises(StoreError, match=r"reading pages for the card failed at byte \d+: Input/output error"):
        store.attend(0, query(2))
    transfer.failing.clear()
    q = query(2)
    assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k, v)[0])


def test_a_file_that_is_cut_short_is_an_error_and_nothing_hangs(install, tmp_path):
    install()
    with KVStore(tmp_path, durable=True, name="a", memory_budget="16MiB", resident=False) as store:
        for layer in (0, 1):
            store.append(layer, *kv(1, 2000))
        store.commit()
        for _ in range(2):
            for layer in (0, 1):
                store.attend(layer, query(1))
        os.truncate(tmp_path / "torch_csd-durable" / "pages.csd", 2**20 + 3 * PAGE_BYTES)
        try:
            store.attend(0, query(1))  # may have been read ahead
        except StoreError:
            pass
        for layer in (1, 0, 1):
            with pytest.raises(StoreError, match="reading pages for the card failed"):
                store.attend(layer, query(1))


@pytest.mark.parametrize("gpu_budget", [0, "1MiB"])
def test_a_damaged_page_is_an_error_whenever_it_is_read(install, tmp_path, gpu_budget):
    install(gpu_budget=gpu_budget)
    k, v = kv(1, 700)
    with KVStore(tmp_path, durable=True, name="a", memory_budget="16MiB", resident=False) as store:
        store.append(0, k, v)
        store.commit()
        with open(tmp_path / "torch_csd-durable" / "pages.csd", "r+b") as file:
            place = 2**20 + 3 * PAGE_BYTES + 5
            good = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([good[0] ^ 1]), place)
            for _ in range(2):
                with pytest.raises(StoreCorruptError, match=f"checksum mismatch at byte {2**20 + 3 * PAGE_BYTES}"):
                    store.attend(0, query(1))
            os.pwrite(file.fileno(), good, place)
        q = query(1)
        assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k, v)[0])


def test_a_store_may_be_closed_with_pages_on_their_way(install, tmp_path):
    install()
    store = KVStore(tmp_path, memory_budget="4MiB", resident=False)
    for layer in range(3):
        store.append(layer, *kv(1, 2000))
        store.attend(layer, query(1))
    store.append(0, *kv(1, 2000))
    store.close()
    store.close()
    assert os.listdir(tmp_path) == []


def test_a_store_may_go_in_the_middle_of_a_call_on_another(install, make_store, monkeypatch):
    """As when the garbage collector finds it there: in the same thread."""
    install(gpu_budget=4 * PAGE_BYTES)
    store = make_store(resident=False)
    k, v = kv(1, 700)
    store.append(0, k, v)
    forks = []
    real = PinnedTransfer.submit

    def submit(self, request):
        if forks:
            forks.pop().close()
        real(self, request)

    monkeypatch.setattr(PinnedTransfer, "submit", submit)
    for step in range(4):
        fork = store.fork()
        fork.append(0, *kv(1, 640, seed=step))
        fork.attend(0, query(1))
        forks.append(fork)
        q = query(1)
        assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k, v)[0])
        assert not forks


def test_a_dropped_layer_takes_its_pages_along(install, make_store):
    install(gpu_budget="1MiB")
    store = make_store(resident=False)
    store.append(0, *kv(1, 640))
    store.append(1, *kv(1, 640))
    for _ in range(3):
        for layer in (0, 1):
            store.attend(layer, query(1))
    store.append(0, *kv(1, 640))
    store.free(0)
    store.append(0, *kv(2, 640, seed=3))
    q = query(2)
    assert_attention_equal(store.attend(0, q)[0], reference.attention(q, *kv(2, 640, seed=3))[0])


@pytest.mark.parametrize("error", [GpuUnavailableError("the card is too old"), MemoryBudgetError("no memory is free")])
def test_without_a_card_it_goes_on_near_the_drive_unless_one_was_asked_for(install, make_store, monkeypatch, error):
    install(executor="auto")

    def open_device(device):
        raise error

    monkeypatch.setattr(torch_csd.cuda, "open_device", open_device)
    store = make_store(resident=False)
    k, v = kv(1, 700)
    q = query(1)
    for layer in (0, 1):
        store.append(layer, k, v)
        assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, k, v)[0])
    stats = store.stats()
    assert stats["gpu_reason"] == str(error) and "gpu" not in stats
    with pytest.raises(type(error), match=str(error)):
        make_store(executor="gpu").append(0, k, v)


# ---- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("wanted", [{"executor": "gpu"}, {"gpu_io": "gds"}])
def test_what_needs_a_gpu_says_that_there_is_none(tmp_path, wanted):
    with pytest.raises(GpuUnavailableError, match="needs a CUDA device; there is none"):
        KVStore(tmp_path, **wanted)
    with pytest.raises(GpuUnavailableError, match="needs a CUDA device; there is none"):
        KVStore(tmp_path, durable=True, name="a", **wanted)


@pytest.mark.parametrize("wanted", [{"executor": "cpu"}, {"gpu_io": "nvlink"}, {"gpu_staging": "1KiB"}])
def test_settings_of_the_card_are_checked(tmp_path, wanted):
    with pytest.raises(ValueError, match=next(iter(wanted))):
        KVStore(tmp_path, **wanted)


def test_tokens_on_the_cpu_bring_nothing_of_a_gpu_in(tmp_path):
    script = (
        "import sys, torch, torch_csd\n"
        "store = torch_csd.KVStore(sys.argv[1], memory_budget='4MiB', gpu_budget='1GiB')\n"
        "store.append(0, torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16))\n"
        "store.attend(0, torch.randn(1, 4, 1, 16))\n"
        "cuda = [name for name in sys.modules if name.startswith('torch_csd.cuda')]\n"
        "loaded = {name.partition('.')[0] for name in sys.modules} & {'kvikio', 'cupy', 'numba'}\n"
        "print(cuda, sorted(loaded), torch.cuda.is_initialized())"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[] [] False\n"
