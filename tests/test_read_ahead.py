"""Reading ahead: attention stays exact whatever was foreseen, nothing is read twice, and space is given back."""

from __future__ import annotations

import os
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import assert_attention_equal, random_kv

from torch_csd import KVStore, MemoryBudgetError, StorageTensor, StoreError, reference

MIB = 2**20
HEADS, DIM = 2, 64
PAGE_BYTES = HEADS * 64 * 2 * DIM * 4


def attend_and_check(store, layer, kv, **options):
    """One decode step's attention on a layer, against the dense tensors."""
    k, v = kv
    q = torch.randn(k.shape[0], 2 * k.shape[1], options.pop("q_len", 1), k.shape[3])
    out, _ = store.attend(layer, q, **options)
    assert_attention_equal(out, reference.attention(q, k, v, **options)[0])


def extend(store, layer, kv, tokens, seed=0):
    """Appends to a layer, and to its dense copy."""
    k, v = kv
    new_k, new_v = random_kv(k.shape[0], k.shape[1], tokens, k.shape[3], v.shape[3], seed=seed)
    store.append(layer, new_k, new_v)
    return torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)


def fill(store, layers, tokens, batch=1, heads=HEADS, dim=DIM):
    dense = []
    for layer in range(layers):
        empty = torch.empty(batch, heads, 0, dim)
        dense.append(extend(store, layer, (empty, empty), tokens, seed=layer))
    store.flush()
    return dense


def read_bytes(store):
    return store.stats()["drive_read_bytes"]


def test_a_decode_loop_finds_its_pages_read_and_reads_none_twice(make_store, io_engine):
    layers, tokens, steps = 4, 64 * 40, 6
    store = make_store(io_engine=io_engine, resident=False, memory_budget="64MiB", threads=2)
    dense = fill(store, layers, tokens)
    for step in range(2):  # the first step teaches the order
        for layer in range(layers):
            dense[layer] = extend(store, layer, dense[layer], 1, seed=step)
            attend_and_check(store, layer, dense[layer])
    before = store.stats()
    for step in range(steps):
        for layer in range(layers):
            dense[layer] = extend(store, layer, dense[layer], 1, seed=step)
            attend_and_check(store, layer, dense[layer])
    after = store.stats()
    needed = steps * layers * (tokens // 64) * PAGE_BYTES
    assert after["drive_read_bytes"] - before["drive_read_bytes"] == needed
    assert after["read_ahead_bytes"] - before["read_ahead_bytes"] == needed, "all of it fits the window"
    assert after["read_ahead_wasted_bytes"] == 0


def test_a_cache_larger_than_the_window_reads_what_it_needs(make_store, io_engine):
    layers, tokens = 3, 64 * 100
    store = make_store(io_engine=io_engine, resident=False, memory_budget="8MiB", threads=2)
    dense = fill(store, layers, tokens)
    for _ in range(2):
        for layer in range(layers):
            attend_and_check(store, layer, dense[layer])
    before = store.stats()
    for _ in range(3):
        for layer in range(layers):
            attend_and_check(store, layer, dense[layer])
    after = store.stats()
    assert after["drive_read_bytes"] - before["drive_read_bytes"] == 3 * layers * (tokens // 64) * PAGE_BYTES
    assert after["read_ahead_bytes"] - before["read_ahead_bytes"] > 3 * layers * MIB
    assert after["read_ahead_wasted_bytes"] == 0
    assert after["memory_used_bytes"] <= 8 * MIB


def test_nothing_is_read_ahead_where_that_is_switched_off(make_store):
    store = make_store(resident=False, read_ahead=0)
    dense = fill(store, 3, 640)
    for _ in range(3):
        for layer in range(3):
            attend_and_check(store, layer, dense[layer])
    stats = store.stats()
    assert stats["read_ahead_bytes"] == 0
    assert stats["drive_read_bytes"] == 9 * 10 * PAGE_BYTES


def test_pages_in_memory_are_never_read_ahead(make_store):
    store = make_store(memory_budget="64MiB")
    dense = fill(store, 3, 640)
    for _ in range(3):
        for layer in range(3):
            attend_and_check(store, layer, dense[layer])
    assert read_bytes(store) == 0


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 2], [0, 0, 1, 2], [1]], ids=str)
def test_a_changed_order_wastes_reads_and_nothing_else(make_store, io_engine, order):
    store = make_store(io_engine=io_engine, resident=False, threads=2)
    dense = fill(store, 3, 640)
    for layer in [0, 1, 2] * 3 + order * 4 + [0, 1, 2] * 3:
        attend_and_check(store, layer, dense[layer])
    stats = store.stats()
    assert stats["read_ahead_bytes"] > 0
    assert stats["read_ahead_bytes"] + stats["read_ahead_wasted_bytes"] <= stats["drive_read_bytes"]


def test_a_pass_reads_its_pages_although_reads_ahead_fill_the_queue(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, threads=1, queue_depth=2, memory_budget="16MiB")
    expected = []
    q = torch.randn(1, 2 * HEADS, 1, DIM)
    for k, v in fill(store, 3, 64 * 80):
        expected.append(reference.attention(q, k, v)[0])
    for _ in range(60):
        order = [0, 1, 2, 0, 1, 2, 0, 0]  # the last finds nothing of its own, and layer 1 on its way
        for layer, out in [(layer, store.attend(layer, q)[0]) for layer in order]:
            assert_attention_equal(out, expected[layer])


def test_callers_in_random_order_stop_wasting_reads(make_store):
    store = make_store(resident=False)
    dense = fill(store, 8, 640)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        layer = int(torch.randint(8, (), generator=generator))
        attend_and_check(store, layer, dense[layer])
    stats = store.stats()
    assert stats["read_ahead_wasted_bytes"] < stats["drive_read_bytes"] / 4


@pytest.mark.parametrize("budget", ["1MiB", "3MiB", "16MiB"])
@pytest.mark.parametrize("threads", [1, 2, 7, 40])
def test_any_budget_and_any_number_of_threads_will_do(make_store, io_engine, budget, threads):
    store = make_store(io_engine=io_engine, memory_budget=budget, threads=threads)
    dense = fill(store, 3, 700, batch=2)
    for step in range(3):
        for layer in range(3):
            dense[layer] = extend(store, layer, dense[layer], 33, seed=step)
            attend_and_check(store, layer, dense[layer], causal=True, q_len=2)


def test_layers_of_different_shapes_follow_each_other(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, threads=2, memory_budget="32MiB")
    shapes = [(1, 16), (4, 128), (16, 256), (2, 64), (3, 8)]
    dense = []
    for layer, (heads, dim) in enumerate(shapes):
        empty = torch.empty(2, heads, 0, dim)
        dense.append(extend(store, layer, (empty, empty), 400))
    for step in range(4):
        for layer in range(len(shapes)):
            dense[layer] = extend(store, layer, dense[layer], 20, seed=step)
            attend_and_check(store, layer, dense[layer])
    assert store.stats()["read_ahead_bytes"] > 0


def test_windows_and_padding_masks_read_what_they_see(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, threads=2, memory_budget="32MiB")
    dense = fill(store, 4, 64 * 30, batch=2)
    for step in range(5):
        for layer in range(4):
            dense[layer] = extend(store, layer, dense[layer], 1, seed=step)
            kv_len = dense[layer][0].shape[2]
            padding = torch.arange(kv_len)[None, None, None, :] >= torch.tensor([0, 700])[:, None, None, None]
            options = [dict(window=300, causal=True), dict(mask=padding), dict(causal=True), dict(kv_begin=640)][layer]
            if "kv_begin" in options:
                k, v = (t[:, :, 640:] for t in dense[layer])
                q = torch.randn(2, 4, 1, DIM)
                assert_attention_equal(store.attend(3, q, kv_begin=640)[0], reference.attention(q, k, v)[0])
            else:
                attend_and_check(store, layer, dense[layer], **options)
    stats = store.stats()
    assert stats["read_ahead_bytes"] > 0
    assert stats["read_ahead_wasted_bytes"] == 0


def test_many_queries_go_over_the_pages_block_by_block(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, threads=2, memory_budget="2MiB")
    dense = fill(store, 2, 900)
    for _ in range(3):
        for layer in range(2):
            attend_and_check(store, layer, dense[layer], causal=True, q_len=600)
    stats = store.stats()
    assert stats["read_ahead_bytes"] > 2 * 14 * PAGE_BYTES, "the passes of one call read ahead of each other"


def test_an_eager_attention_reads_ahead_too(make_store):
    store = make_store(resident=False, memory_budget="64MiB")
    dense = fill(store, 3, 640)
    for _ in range(4):
        for layer in range(3):
            k, v = dense[layer]
            q = torch.randn(1, HEADS, 1, DIM)
            stored_k, stored_v = StorageTensor.pair(store, layer)
            scores = q @ stored_k.transpose(2, 3)
            torch.testing.assert_close(scores, q @ k.transpose(2, 3), atol=1e-4, rtol=1e-4)
            p = scores.softmax(-1)
            torch.testing.assert_close(p @ stored_v, p @ v, atol=1e-4, rtol=1e-4)
    stats = store.stats()
    assert stats["read_ahead_bytes"] > stats["drive_read_bytes"] / 2
    assert stats["read_ahead_wasted_bytes"] == 0


def test_beams_truncation_and_trims_invalidate_what_they_touch(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, threads=2)
    dense = fill(store, 3, 640, batch=3)

    def attend_all():
        for layer in range(3):
            attend_and_check(store, layer, dense[layer])

    def each(operation):
        for layer in range(3):
            dense[layer] = operation(layer, *dense[layer])

    def reorder(layer, k, v):
        store.reorder(layer, [2, 2, 0])
        return k[[2, 2, 0]], v[[2, 2, 0]]

    def truncate(layer, k, v):
        store.truncate(layer, 300)
        return k[:, :, :300], v[:, :, :300]

    def append(layer, k, v):
        return extend(store, layer, (k, v), 90, seed=layer + k.shape[2])

    for operation in (append, reorder, append, append, truncate, append, reorder, truncate, append, append):
        each(operation)
        attend_all()
        attend_all()
    for layer in range(3):
        store.trim(layer, 200)
        dense[layer] = tuple(t[:, :, 200:] for t in dense[layer])
    attend_all()
    attend_all()
    fork = store.fork()
    each(append)
    for layer in range(3):
        attend_and_check(store, layer, dense[layer])
        k, v = dense[layer]
        attend_and_check(fork, layer, (k[:, :, :-90], v[:, :, :-90]))
    fork.close()
    attend_all()


def test_space_is_given_back_although_it_was_read_ahead(make_store, io_engine):
    store = make_store(io_engine=io_engine, resident=False, memory_budget="64MiB")
    other = fill(store, 2, 6400)
    for _ in range(3):
        for layer in range(2):
            attend_and_check(store, layer, other[layer])
    file_bytes = store.stats()["file_bytes"]
    for round_ in range(4):
        store.free(1) if round_ % 2 else store.truncate(1, 0)
        empty = torch.empty(1, HEADS, 0, DIM)
        other[1] = extend(store, 1, (empty, empty), 6400, seed=round_)
        store.flush()
        for layer in (0, 1, 0, 1, 0):  # the last one reads ahead of layer 1
            attend_and_check(store, layer, other[layer])
    assert store.stats()["file_bytes"] == file_bytes, "what was freed is used again"


def test_an_explicit_size_is_memory_on_top_of_what_a_pass_reads_through(make_store):
    store = make_store(memory_budget="64MiB", read_ahead="8MiB", resident=False)
    dense = fill(store, 2, 6400)
    for _ in range(3):
        for layer in range(2):
            attend_and_check(store, layer, dense[layer])
    stats = store.stats()
    assert stats["read_ahead_bytes"] > 0 and stats["memory_used_bytes"] <= 64 * MIB
    with pytest.raises(MemoryBudgetError, match="less than half"):
        make_store(memory_budget="64MiB", read_ahead="20MiB")
    with pytest.raises(ValueError, match="size"):
        make_store(read_ahead="much")


def decode(store, dense, steps):
    for step in range(steps):
        for layer, kv in enumerate(dense):
            dense[layer] = extend(store, layer, kv, 1, seed=step)
            attend_and_check(store, layer, dense[layer])
            stats = store.stats()
            assert stats["memory_used_bytes"] <= stats["memory_budget_bytes"]


def test_memory_for_reads_grows_with_what_a_pass_reads_and_is_given_back(make_store, io_engine):
    store = make_store(io_engine=io_engine, memory_budget="16MiB", threads=2)
    before = store.stats()["staging_bytes"]
    dense = fill(store, 2, 64 * 448)  # 28 MiB each
    resident = store.stats()["pages_resident"]
    decode(store, dense, 16)
    stats = store.stats()
    assert before < stats["staging_bytes"] <= 12 * MIB and stats["pages_resident"] < resident
    assert stats["tail_spills"] == 0
    for layer in range(2):
        store.free(layer)
    dense = fill(store, 2, 64 * 40)  # all of it fits
    assert store.stats()["staging_bytes"] == before
    decode(store, dense, 3)
    assert store.stats()["pages_on_drive"] == 0


def test_nothing_is_set_aside_for_reads_ahead_before_there_are_any(make_store):
    store = make_store(memory_budget="192MiB")
    dense = fill(store, 1, 64 * 64, heads=32, dim=128)  # 128 MiB of 136
    assert store.stats()["pages_on_drive"] == 0
    dense = [extend(store, 0, dense[0], 64 * 16)]  # 160 MiB
    before = store.stats()
    for _ in range(30):
        dense = [extend(store, 0, dense[0], 1)]
        store.attend(0, torch.randn(1, 32, 1, 128))
    after = store.stats()
    assert after["pages_on_drive"] > before["pages_on_drive"] > 0
    assert after["staging_bytes"] > before["staging_bytes"] and after["memory_used_bytes"] <= 192 * MIB


def test_memory_for_reads_leaves_room_for_the_tails(make_store):
    store = make_store(memory_budget="16MiB", threads=2)
    dense = fill(store, 2, 64 * 20, batch=20)  # 25 MiB each, tails of 1.25 MiB each
    decode(store, dense, 6)
    stats = store.stats()
    assert stats["staging_bytes"] <= 16 * MIB - 2 * MIB - 2 * 40 * PAGE_BYTES
    assert stats["tail_spills"] == 0


def grown_store(make_store, budget, tokens):
    """A store whose memory for reads has grown to all that it may be, 3/4 of the budget, for a long layer 0."""
    store = make_store(memory_budget=budget, threads=2)
    fill(store, 1, tokens)
    for _ in range(100):
        store.append(0, *random_kv(1, HEADS, 1, DIM))
        store.attend(0, torch.zeros(1, HEADS, 1, DIM))
        store.flush()
        if store.stats()["staging_bytes"] * 4 == store.stats()["memory_budget_bytes"] * 3:
            return store
    raise AssertionError("the memory for reads did not grow")


def test_memory_for_reads_leaves_room_for_a_layer_of_larger_pages(make_store):
    store = grown_store(make_store, "24MiB", 64 * 760)
    empty = torch.empty(1, 13, 0, 512)
    dense = extend(store, 1, (empty, empty), 1)  # a page takes 3.25 MiB, where 3 are left
    store.reorder(1, [0, 0])
    dense = extend(store, 1, tuple(t[[0, 0]] for t in dense), 70)
    attend_and_check(store, 1, dense)
    assert store.stats()["memory_used_bytes"] <= 24 * MIB


@pytest.mark.parametrize(
    ("budget", "layers", "batch", "dims"),
    [("16MiB", 1, 24, [128]), ("24MiB", 26, 1, [128]), ("2MiB", 5, 1, [8, 16, 24, 40, 48])],
    ids=["a large batch", "many layers", "many sizes"],
)
def test_memory_for_reads_leaves_room_for_tails_that_come_later(make_store, budget, layers, batch, dims):
    store = grown_store(make_store, budget, 64 * 760)
    for step in range(8):
        for layer in range(1, layers + 1):
            store.append(layer, *random_kv(batch, HEADS, 1, dims[(layer - 1) % len(dims)], seed=step))
    assert store.stats()["tail_spills"] <= 1


def test_memory_that_reads_were_to_get_is_pages_again_when_they_need_it_no_more(make_store):
    store = make_store(memory_budget="16MiB", threads=2)
    dense = fill(store, 1, 64 * 640)
    for _ in range(3):  # pages leave memory a little at a time
        dense = [extend(store, 0, dense[0], 1)]
        attend_and_check(store, 0, dense[0])
    assert store.stats()["staging_bytes"] <= 6 * MIB, "this test is about the time before it has grown"
    store.free(0)
    fill(store, 2, 64 * 60)  # 7.5 MiB of 8
    assert store.stats()["pages_on_drive"] == 0


def test_a_store_is_closed_while_reads_are_under_way(make_store, io_engine):
    for _ in range(5):
        store = make_store(io_engine=io_engine, resident=False, memory_budget="64MiB", threads=2)
        dense = fill(store, 4, 3200)
        for layer in (0, 1, 2, 3, 0, 1):
            attend_and_check(store, layer, dense[layer])
        store.close()


def test_a_read_ahead_that_fails_is_no_error_until_its_pages_are_needed(make_store, io_engine, tmp_path):
    store = make_store(io_engine=io_engine, resident=False, memory_budget="64MiB", threads=2)
    dense = fill(store, 2, 3200)
    for layer in (0, 1, 0, 1):
        attend_and_check(store, layer, dense[layer])
    opened = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    path = next(fd for fd in opened if os.path.exists(fd) and os.readlink(fd).startswith(str(tmp_path)))
    time.sleep(0.5)  # what is in flight lands
    with open(path, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        cut = 3 * MIB  # inside layer 0, whose pages lie before those of layer 1
        file.seek(cut)
        rest = file.read(size - cut)
        os.ftruncate(file.fileno(), cut)
        # What was staged before the cut is what the pages held; what is read ahead after it fails.
        for layer in (0, 1):
            attend_and_check(store, layer, dense[layer])
        for layer in (0, 1, 0):
            with pytest.raises(StoreError, match="reading KV pages"):
                attend_and_check(store, layer, dense[layer])
        file.seek(cut)
        file.write(rest)
    for layer in (0, 1, 0, 1):
        attend_and_check(store, layer, dense[layer])


class AheadMachine(RuleBasedStateMachine):
    """Any order of operations on several layers and a fork, against dense tensors."""

    def __init__(self):
        super().__init__()
        self.stores = []

    @initialize(
        engine=st.sampled_from(["auto", "pread"]),
        threads=st.sampled_from([1, 2, 5]),
        budget=st.sampled_from(["1MiB", "2MiB", "8MiB"]),
        resident=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def open(self, engine, threads, budget, resident, seed):
        settings_ = dict(io_engine=engine, threads=threads, memory_budget=budget, resident=resident)
        self.generator = torch.Generator().manual_seed(seed)
        self.stores = [KVStore(**settings_)]
        self.dense = [{}]
        for layer in range(3):
            self._append(0, layer, 400)

    def _append(self, index, layer, tokens):
        heads, dim = [(2, 64), (1, 16), (3, 64)][layer]
        k, v = self.dense[index].get(layer, (torch.empty(2, heads, 0, dim),) * 2)
        new = [torch.randn(2, heads, tokens, dim, generator=self.generator) for _ in range(2)]
        self.stores[index].append(layer, *new)
        self.dense[index][layer] = (torch.cat([k, new[0]], 2), torch.cat([v, new[1]], 2))

    def _store(self, data):
        return data.draw(st.integers(0, len(self.stores) - 1))

    def _layer(self, data, index):
        return data.draw(st.sampled_from(sorted(self.dense[index])))

    @rule(data=st.data(), tokens=st.integers(1, 200))
    def append(self, data, tokens):
        index = self._store(data)
        self._append(index, data.draw(st.integers(0, 2)), tokens)

    @rule(data=st.data(), steps=st.integers(1, 3), causal=st.booleans(), window=st.sampled_from([None, 100]))
    def decode(self, data, steps, causal, window):
        for _ in range(steps):
            for index, store in enumerate(self.stores):
                for layer in sorted(self.dense[index]):
                    if self.dense[index][layer][0].shape[2] < 1000:
                        self._append(index, layer, 1)
                    self._attend(store, index, layer, causal=causal, window=window)

    def _attend(self, store, index, layer, **options):
        k, v = self.dense[index][layer]
        q = torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=self.generator)
        out, _ = store.attend(layer, q, **options)
        assert_attention_equal(out, reference.attention(q, k, v, **options)[0])

    @rule(data=st.data())
    def attend_one(self, data):
        index = self._store(data)
        if self.dense[index]:
            self._attend(self.stores[index], index, self._layer(data, index))

    @rule(data=st.data(), share=st.floats(0.1, 1.0))
    def truncate(self, data, share):
        index = self._store(data)
        for layer, (k, v) in self.dense[index].items():
            length = int(k.shape[2] * share)
            self.stores[index].truncate(layer, length)
            self.dense[index][layer] = (k[:, :, :length], v[:, :, :length])

    @rule(data=st.data(), order=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, data, order):
        index = self._store(data)
        for layer, (k, v) in self.dense[index].items():
            self.stores[index].reorder(layer, order)
            self.dense[index][layer] = (k[order], v[order])

    @rule(data=st.data())
    def free(self, data):
        index = self._store(data)
        if self.dense[index]:
            layer = self._layer(data, index)
            self.stores[index].free(layer)
            del self.dense[index][layer]

    @precondition(lambda self: 0 < len(self.stores) < 3)
    @rule()
    def fork(self):
        self.stores.append(self.stores[0].fork())
        self.dense.append(dict(self.dense[0]))

    def teardown(self):
        for index, store in enumerate(self.stores):
            for layer, (k, v) in self.dense[index].items():
                assert torch.equal(store.read(layer)[0], k) and torch.equal(store.read(layer)[1], v)
            store.close()


TestAheadMachine = AheadMachine.TestCase
TestAheadMachine.settings = settings(max_examples=25, stateful_step_count=15)
