"""What sparse attention keeps in memory, over the lives of layers: summaries of pages, and tiles that were chosen."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import random_kv
from test_checksums import DATA_OFFSET, ScratchFile
from test_sparse import (
    ALL_PAGES,
    PROVABLE,
    assert_near,
    bytes_read,
    fill,
    layout,
    missing_mass,
    peaked,
    tail_begin,
)

from torch_csd import Adaptive, KVStore, MemoryBudgetError, PageTopK, SparF, StoreCorruptError, StoreError, reference

PAGE = 64
HEADS, HEAD_DIM = 2, 16
EVERYTHING = SparF(channels=HEAD_DIM, tokens=10**6, step1="sketch")


class Lives(RuleBasedStateMachine):
    """A store that keeps all kinds of summaries from its beginning, in whatever way it grows and shrinks."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.stores: list[KVStore] = []
        self.seed = 0

    def keep(self, store: KVStore) -> KVStore:
        self.stores.append(store)
        if not store.layers():
            store.append(0, *self.tokens(self.batch, 1))
        for sparse in (EVERYTHING, PROVABLE):  # all kinds from now on
            store.sparse = sparse
        return store

    def tokens(self, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seed += 1
        k, v = random_kv(batch, HEADS, count, HEAD_DIM, seed=self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        level = torch.rand(batch, HEADS, 1, 1, generator=generator)
        return self.offset + (0.1 + 3 * level) * self.direction + 0.1 * k, v

    @initialize(
        kind=st.sampled_from([None, "int8", "int4"]),
        resident=st.booleans(),
        batch=st.integers(1, 3),
        offset=st.sampled_from([0.0, 6.0]),
        seed=st.integers(0, 100),
    )
    def begin(self, kind, resident, batch, offset, seed):
        self.seed = 1000 * seed
        self.batch = batch
        generator = torch.Generator().manual_seed(seed)
        self.direction = torch.randn(HEAD_DIM, generator=generator)
        self.offset = offset * torch.randn(HEAD_DIM, generator=generator)
        self.durable = dict(memory_budget="8MiB", threads=1, resident=resident, read_ahead=0)
        self.store = self.keep(KVStore(self.directory.name, durable=True, name="life", kv_dtype=kind, **self.durable))
        self.store.append(0, *self.tokens(batch, 700))
        self.check()

    @rule(counts=st.lists(st.integers(1, 200), min_size=1, max_size=4))
    def append(self, counts):
        for count in counts:
            self.store.append(0, *self.tokens(len(self.store.lengths(0)), count))
        self.check()

    @rule(count=st.integers(1, 1500), share=st.floats(0, 1))
    def append_to_rows_of_different_lengths(self, count, share):
        batch = len(self.store.lengths(0))
        lengths = [int(count * share ** (row % 3)) for row in range(batch)]
        self.store.append(0, *self.tokens(batch, count), lengths=lengths)
        self.check()

    @rule(share=st.floats(0.3, 1))
    def crop(self, share):
        begin = self.store.begin(0)
        self.store.truncate(0, [begin + int((length - begin) * share) for length in self.store.lengths(0)])
        self.check()

    @rule(share=st.floats(0, 0.4))
    def trim(self, share):
        begin, end = self.store.begin(0), min(self.store.lengths(0))
        self.store.trim(0, begin + int((end - begin) * share))
        self.check()

    @rule(index=st.lists(st.integers(0, 10), min_size=1, max_size=4))
    def reorder(self, index):
        batch = len(self.store.lengths(0))
        self.store.reorder(0, [i % batch for i in index])
        self.check()

    @rule(stays=st.booleans())
    def fork(self, stays):
        fork = self.store.fork(None)
        self.stores.append(fork)
        fork.append(0, *self.tokens(len(fork.lengths(0)), 150))
        if stays and len(self.stores) < 5:
            self.check(fork)
            self.check()
        else:
            self.stores.remove(fork)
            fork.close()

    @precondition(lambda self: self.store.name is not None)
    @rule()
    def reopen(self):
        self.store.commit()
        self.stores.remove(self.store)
        for other in self.stores:
            other.close()
        self.stores.clear()
        self.store.close()
        self.store = self.keep(KVStore.open(self.directory.name, "life", **self.durable))
        self.check(from_the_beginning=False)

    def check(self, store=None, *, from_the_beginning=True):
        store = store or self.store
        store.flush()
        rows = len(store.lengths(0))
        q = torch.randn(rows, 2 * HEADS, 2, HEAD_DIM, generator=torch.Generator().manual_seed(self.seed))
        q = self.direction + 0.3 * q
        exact = [result.double() for result in store.attend(0, q, sparse=None)]
        for sparse in (ALL_PAGES, EVERYTHING):
            first, ours = self.moved(store, q, sparse)
            assert_near(ours, exact, store_kind(store))
            if from_the_beginning:
                assert first == self.moved(store, q, sparse)[0], "nothing is read to catch up"
        said, left_out = missing_mass(store, q, sparse=PROVABLE)
        assert (said + 1e-5 >= left_out).all(), (left_out - said).max()
        assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]

    def moved(self, store, q, sparse):
        """(bytes that an attention goes over, its results)."""
        before = store.stats()
        results = store.attend(0, q, sparse=sparse)
        after = store.stats()
        return sum(after[name] - before[name] for name in ("drive_read_bytes", "resident_read_bytes")), results

    def teardown(self):
        for store in self.stores:
            store.close()
        self.directory.cleanup()


def store_kind(store: KVStore) -> str:
    return str(store.kv_dtype).removeprefix("torch.") if store.kv_dtype is not None else "float32"


TestLives = hypothesis.settings(max_examples=12, stateful_step_count=12)(Lives).TestCase


@pytest.mark.parametrize("kind", [None, "int4"])
@pytest.mark.parametrize("count", [17, 64, 100])
def test_summaries_may_take_all_the_memory_there_is(make_store, kind, count):
    """Then tails leave it, too, even one that an append is about to fill; it comes back for that."""
    k, v = random_kv(2, HEADS, 64 * 150, HEAD_DIM)
    store = make_store(memory_budget="1MiB", kv_dtype=kind, threads=2, sparse=EVERYTHING)
    end = 0
    try:
        while end + count <= k.shape[2]:
            store.append(0, k[:, :, end : end + count], v[:, :, end : end + count])
            end += count
    except MemoryBudgetError as error:
        assert "raise it" in str(error)
    else:
        assert kind is not None, "what summaries leave is less than the tails of full precision take"
    assert store.lengths(0) == [end, end]
    held = store.read(0)
    assert kind is not None or torch.equal(held[0], k[:, :, :end]) and torch.equal(held[1], v[:, :, :end])
    q = torch.randn(2, 4, 1, HEAD_DIM)
    assert_near(store.attend(0, q, sparse=None), reference.attention(q, *held), kind)
    store.truncate(0, 64 * 5 + 3)
    store.append(0, k[:, :, : 64 * 2], v[:, :, : 64 * 2])
    assert_near(store.attend(0, q), reference.attention(q, *store.read(0)), kind)


# ---- that they are complete after every append, whatever else has to leave memory ----

ONE_KIND_OR_TWO = [PageTopK(fraction=0.02), PageTopK(fraction=0.02, by="sketch"), SparF(channels=4, tokens=64)]


def read_to_catch_up(store, q) -> int:
    """Bytes of pages and tiles that the first of two equal attentions goes over, and the second does not."""

    def moved():
        before = store.stats()
        store.attend(0, q)
        after = store.stats()
        return sum(after[name] - before[name] for name in ("drive_read_bytes", "resident_read_bytes"))

    store.flush()
    return moved() - moved()


@pytest.mark.parametrize("sparse", ONE_KIND_OR_TWO, ids=repr)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("step", [25600, 5000, 1000])
def test_small_budgets_hold_the_summaries_that_large_ones_do(make_store, kind, sparse, step):
    """Pages that leave memory while an append makes room for summaries are summarised before, and full blocks turn to
    codes at once: what is filling takes three times as much."""
    k, v = random_kv(2, HEADS, 25600, HEAD_DIM, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    q = torch.randn(2, 4, 1, HEAD_DIM).to(k.dtype)
    taken = {}
    for budget in ("2MiB", "4MiB", "8MiB", "16MiB", "64MiB"):
        for resident in (False, True):
            with make_store(
                memory_budget=budget,
                kv_dtype=kind if kind.startswith("int") else None,
                resident=resident,
                sparse=sparse,
                read_ahead=0,
                threads=1,
            ) as store:
                for piece in zip(k.split(step, dim=2), v.split(step, dim=2), strict=True):
                    store.append(0, *piece)
                taken[budget, resident] = store.stats()["summary_bytes"]
                assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]
                if not resident:  # else the second finds tiles that the first has kept
                    assert read_to_catch_up(store, q) == 0, budget
                store.attend(0, q)
                assert store.stats()["summary_bytes"] == taken[budget, resident]
    assert len(set(taken.values())) == 1, taken
    if sparse == ONE_KIND_OR_TWO[1]:
        pages = tail_begin(25600, kind) // PAGE
        sketch = HEADS * (576 + 4)  # of a page: codes and scales, and a checksum
        sums = 12288 + 64 * HEADS * 4  # of 64 pages
        assert taken["64MiB", False] == 2 * (pages * sketch + -(-pages // 64) * sums)


@pytest.mark.parametrize("sparse", ONE_KIND_OR_TWO, ids=repr)
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_rows_that_share_the_pages_that_fill_know_of_all_of_them(make_store, kind, sparse):
    """The last of them may come to one when it has left memory."""
    quantised = kind if kind in ("int8", "int4") else None
    for batch, count, seed in [(2, 64, 0), (8, 64, 1), (8, 130, 2), (4, 700, 3)]:
        generator = torch.Generator().manual_seed(seed)
        with make_store(
            memory_budget="1MiB", kv_dtype=quantised, resident=False, sparse=sparse, read_ahead=0, threads=1
        ) as store:
            store.append(0, *random_kv(1, HEADS, 4000, HEAD_DIM))
            store.reorder(0, [0] * batch)
            q = torch.randn(batch, 4, 1, HEAD_DIM, generator=generator)
            for step in range(4 if count == 700 else 10):
                store.append(0, *random_kv(batch, HEADS, count, HEAD_DIM, seed=step))
                assert read_to_catch_up(store, q) == 0, (batch, count, step)
                store.reorder(0, torch.randint(batch, (batch,), generator=generator).tolist())


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_an_append_that_fails_leaves_summaries_as_they_were(make_store, kind):
    """It may have filled blocks that others had begun, and many of its own."""
    k, v = random_kv(2, HEADS, 64 * 200, HEAD_DIM)
    q = torch.randn(2, 4, 1, HEAD_DIM)
    ways = (PageTopK(fraction=0.2, by="sketch"), PageTopK(fraction=0.2), SparF(channels=4, tokens=64))
    settings = dict(kv_dtype=kind if kind != "float32" else None, resident=False, read_ahead=0, threads=1)
    stores = [make_store(memory_budget=budget, sparse=ways[0], **settings) for budget in ("1MiB", "16MiB")]
    for store in stores:
        for sparse in ways:  # all kinds from now on
            store.append(0, k[:, :, :5], v[:, :, :5])
            store.attend(0, q, sparse=sparse)
    end = 0
    for count in (700, 63, 1, 300):
        taken = stores[0].stats()["summary_bytes"]
        with pytest.raises(MemoryBudgetError):
            stores[0].append(0, k[:, :, end:], v[:, :, end:])
        assert stores[0].stats()["summary_bytes"] == taken
        for store in stores:
            store.append(0, k[:, :, end : end + count], v[:, :, end : end + count])
        end += count
        for sparse in ways:
            for ours, wanted in zip(*(store.attend(0, q, sparse=sparse) for store in stores), strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)  # what is read at once differs
    assert stores[0].stats()["summary_bytes"] == stores[1].stats()["summary_bytes"]


# ---- whether there is room for them, asked before anything is stored ----

BY_BOUNDS, BY_SKETCH = PageTopK(fraction=0.5), PageTopK(fraction=0.5, by="sketch")


def finds_room(store, k, v, layer_count) -> bool:
    try:
        store.check_room(k, v, layer_count=layer_count)
    except MemoryBudgetError:
        return False
    return True


def appends(store, layers, k, v) -> bool:
    try:
        for layer in layers:
            store.append(layer, k, v)
    except MemoryBudgetError:
        return False
    return True


@pytest.mark.parametrize("sparse, layer_count", [(BY_SKETCH, 4), (BY_BOUNDS, 26), (EVERYTHING, 3)])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("read_ahead", [None, "128KiB"])
def test_a_prefill_is_refused_only_where_it_would_have_failed(make_store, kind, sparse, layer_count, read_ahead):
    k, v = random_kv(2, HEADS, 64 * 100 + 5, HEAD_DIM)
    outcomes = []
    for budget in [*range(2**20, 2**20 * 11 // 4, 2**18), 2**24]:
        with make_store(memory_budget=budget, kv_dtype=kind, threads=1, sparse=sparse, read_ahead=read_ahead) as store:
            try:
                store.check_room(k, v, layer_count=layer_count)
                said = True
            except MemoryBudgetError as error:
                said, wanted = False, int(str(error).split(" bytes of summaries")[0].split()[-1])
            assert store.layers() == [] and store.stats()["memory_used_bytes"] == 0
            outcomes.append((said, appends(store, range(layer_count), k, v)))
            taken = store.stats()["summary_bytes"]
    assert (False, True) not in outcomes, outcomes
    assert outcomes[0] == (False, False) and outcomes[-1] == (True, True)
    assert 0.9 * wanted < taken < 1.1 * wanted, "checksums and chunks are the rest"


def test_no_append_to_a_store_in_any_state_is_refused_that_would_have_succeeded(make_store):
    outcomes = {outcome for seed in range(8) for outcome in outcomes_of_a_life(make_store, seed)}
    assert {(True, True), (False, False)} <= outcomes and (False, True) not in outcomes


def outcomes_of_a_life(make_store, seed):
    """(what check_room said, what an append did) in a store that grows and shrinks at random."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    sparse = pick([BY_BOUNDS, BY_SKETCH, EVERYTHING])
    batch = pick([1, 2, 3])
    kept = store = make_store(
        memory_budget=pick([2**20, 2**21]), kv_dtype=pick([None, "int8", "int4"]), threads=1, sparse=sparse
    )
    for _ in range(40):
        match pick(["append"] * 8 + ["crop", "trim", "reorder", "fork", "exact", "free"]):
            case "append":
                layers = pick([[0], [1], [0, 1, 2], [2, 3], [*range(6)]])
                k, v = random_kv(batch, HEADS, pick([1, 63, 64, 65, 400, 64 * 30, 64 * 90]), HEAD_DIM)
                said = finds_room(store, k, v, len(layers))
                yield said, appends(store, layers, k, v)
            case "crop":
                for layer in store.layers():
                    store.truncate(layer, max(store.begin(layer), store.lengths(layer)[0] // 3))
            case "trim":
                for layer in store.layers():
                    store.trim(layer, (store.begin(layer) + min(store.lengths(layer))) // 2)
            case "reorder":
                for layer in store.layers():
                    store.reorder(layer, [0] * batch)
            case "fork":
                if store is not kept:
                    store.close()
                store = kept.fork()
            case "exact":  # what is appended meanwhile is summarised later, if ever
                store.sparse = pick([None, sparse])
            case "free":
                if store.layers():
                    store.free(pick(store.layers()))
    store.close()
    kept.close()


def test_the_refusal_says_how_much_is_wanted_and_what_to_do(make_store):
    k, v = random_kv(2, HEADS, 64 * 100, HEAD_DIM)
    store = make_store(memory_budget="1MiB", sparse=BY_SKETCH)
    with pytest.raises(MemoryBudgetError) as raised:
        store.check_room(k, v, layer_count=4)
    sketch, sums = 2 * 576 * 100, 12288 * 2  # of a row: two heads' codes and scales; two blocks of sums of V
    text = str(raised.value)
    assert "memory_budget of 1048576 bytes" in text and "6400 tokens of 2 rows in 4 layers" in text
    wanted = int(text.split(" bytes of summaries")[0].split()[-1])
    assert 8 * (sketch + sums) <= wanted <= 1.1 * 8 * (sketch + sums)
    assert f"{2**19} bytes" in text, "what reads and partial results leave"
    assert "raise memory_budget, choose by bounds instead of a sketch, or attend exactly" in text
    store.sparse = BY_BOUNDS
    with pytest.raises(MemoryBudgetError, match="; raise memory_budget, or attend exactly"):
        store.check_room(k, v, layer_count=100)
    store.sparse = None
    store.check_room(k, v, layer_count=100)


def test_layers_that_are_exact_need_no_room(make_store):
    k, v = random_kv(2, HEADS, 64 * 100, HEAD_DIM)
    store = make_store(memory_budget="8MiB", sparse=BY_SKETCH)
    assert not finds_room(store, k, v, 20)
    store.check_room(k, v, layer_count=20, exact_count=16)
    store.exact_layers = frozenset(range(16))
    with pytest.raises(MemoryBudgetError, match="in 24 layers"):
        store.check_room(k, v, layer_count=40)
    assert finds_room(store, k, v, 20) and appends(store, range(20), k, v)


def test_layers_of_another_shape_are_not_taken_for_those_that_are_checked(make_store):
    """They may need less: 16 times so much would not fit."""
    store = make_store(memory_budget="1MiB", sparse=BY_SKETCH)
    k, v = random_kv(1, 1, 64 * 8, 16)
    store.append(0, k, v)
    store.check_room(*random_kv(1, 16, 64 * 70, 16), layer_count=1)


@pytest.mark.parametrize("kind", [None, "int4"])
def test_tokens_of_an_opened_store_that_are_summarised_later_need_no_room_now(tmp_path, kind):
    k, v = random_kv(2, HEADS, 64 * 100, HEAD_DIM)
    settings = dict(memory_budget="1MiB", threads=1)
    with KVStore(tmp_path, durable=True, name="one", kv_dtype=kind, **settings) as store:
        for layer in range(4):
            store.append(layer, k[:, :, :200], v[:, :, :200])
        store.commit()
    with KVStore.open(tmp_path, "one", sparse=BY_SKETCH, **settings) as store:
        assert finds_room(store, k, v, 4) and appends(store, range(4), k, v)
        assert store.stats()["summary_bytes"] == 0
        assert not finds_room(store, k, v, 8) and not appends(store, range(4, 8), k, v)


def test_forks_share_the_room(make_store):
    k, v = random_kv(2, HEADS, 64 * 100, HEAD_DIM)
    store = make_store(memory_budget="8MiB", sparse=BY_SKETCH)

    def appends_little_by_little(store):  # so that nothing is left to be summarised later
        pieces = zip(k.split(640, dim=2), v.split(640, dim=2), strict=True)
        return all(appends(store, range(7), *piece) for piece in pieces)

    assert finds_room(store, k, v, 7) and appends_little_by_little(store)
    with store.fork() as fork:
        assert finds_room(fork, k, v, 7) and appends_little_by_little(fork)
        assert not finds_room(store, k, v, 7)
        with store.fork() as third:
            assert not appends_little_by_little(third)
    assert finds_room(store, k, v, 7) and appends_little_by_little(store)


@pytest.mark.parametrize("kind", [None, "int8"])
def test_what_was_read_ahead_counts_once(make_store, io_engine, kind):
    """Exact attention reads ahead; a choice that takes pages on both sides of what is there already reads around it."""
    k, v = random_kv(1, 2, 64 * 40, 16)
    q = torch.randn(1, 4, 1, 16)
    store = make_store(memory_budget="1MiB", threads=2, resident=False, kv_dtype=kind, io_engine=io_engine)
    fill(store, k, v)
    exact = reference.attention(q, *store.read(0))
    for begin in range(0, 64 * 30, 64):
        for sparse in (ALL_PAGES, SparF(channels=16, tokens=10**6)):
            for _ in range(3):
                store.attend(0, q, kv_begin=begin, kv_end=begin + 64 * 2)
            assert_near(store.attend(0, q, sparse=sparse), exact, kind)
    assert store.stats()["read_ahead_bytes"] > 0


# ---- stores that outlive the process ----


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_store_that_is_opened_again_makes_its_summaries_by_one_pass(tmp_path, io_engine, kind, read_only):
    q, k, v = peaked(64 * 40 + 7, batch=2)
    settings = dict(memory_budget="16MiB", read_ahead=0, resident=False, io_engine=io_engine, threads=2)
    ways = (
        PageTopK(fraction=0.3),
        PROVABLE,
        SparF(channels=16, tokens=70),
        SparF(channels=64, tokens=70, step1="sketch"),
    )
    with KVStore(tmp_path, durable=True, name="one", kv_dtype=kind, sparse=ways[0], **settings) as store:
        fill(store, k, v)
        expected = [store.attend(0, q, sparse=sparse) for sparse in ways]
        store.commit()
    with KVStore.open(tmp_path, "one", read_only=read_only, sparse=ways[0], **settings) as store:
        assert store.sparse == ways[0]
        dense = bytes_read(store, lambda: store.attend(0, q, sparse=None))
        first = bytes_read(store, lambda: store.attend(0, q))
        second = bytes_read(store, lambda: store.attend(0, q))
        tail = (k.shape[2] - tail_begin(k.shape[2], kind)) / PAGE  # is on the drive, too, and not summarised
        page = layout(kind, 2, 64)[1]
        full = 2 * page * (tail_begin(k.shape[2], kind) // PAGE)
        assert first - second == full and dense >= full and tail > 0
        for sparse, (out, lse) in zip(ways, expected, strict=True):
            ours = store.attend(0, q, sparse=sparse)
            torch.testing.assert_close(ours[0], out, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(ours[1], lse, atol=2e-4, rtol=1e-4)


# ---- damage ----

SELECTIVE = PageTopK(tokens=64 * 9, local=0, sink=64 * 9)  # the first nine pages


@contextlib.contextmanager
def scratch_file(directory):
    file = ScratchFile(directory)
    yield file
    os.close(file.fd)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_a_damaged_tile_is_an_error_that_names_it(make_store, tmp_path, io_engine, kind):
    k, v = random_kv(1, 3, 64 * 20, 24)
    q = torch.randn(1, 6, 1, 24)
    store = make_store(kv_dtype=kind, resident=False, read_ahead=0, io_engine=io_engine, sparse=SELECTIVE)
    fill(store, k, v)
    tile, page = layout(kind, 3, 24)
    with scratch_file(tmp_path) as file:
        before = store.attend(0, q)
        for index in (0, 5, 8):
            for head in (0, 1, 2):
                at = DATA_OFFSET + index * page + head * tile
                for byte in (0, tile // 2, tile - 1):
                    file.flip(at + byte)
                    named = rf"layer 0, row 0, page {index}: checksum mismatch at byte {at} .*token {64 * index} "
                    with pytest.raises(StoreCorruptError, match=named):
                        store.attend(0, q)
                    file.flip(at + byte)
        file.flip(DATA_OFFSET + 9 * page)
        for _ in range(2):
            for ours, wanted in zip(store.attend(0, q), before, strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sparse", [SELECTIVE, Adaptive(mass=0.9), SparF(channels=24, tokens=5)], ids=repr)
def test_a_page_without_a_summary_is_compared_with_its_checksum(make_store, tmp_path, sparse):
    """A crop leaves a page that is on the drive, and not full any more."""
    k, v = random_kv(1, 3, 64 * 8, 24)
    q = torch.randn(1, 6, 1, 24)
    store = make_store(resident=False, read_ahead=0, sparse=sparse)
    fill(store, k, v)
    store.truncate(0, 64 * 7 + 9)
    store.attend(0, q)
    tile, page = layout("float32", 3, 24)
    with scratch_file(tmp_path) as file:
        for head in range(3):
            at = DATA_OFFSET + 7 * page + head * tile + 100
            file.flip(at)
            with pytest.raises(StoreCorruptError, match="layer 0, row 0, page 7: checksum mismatch"):
                store.attend(0, q)
            file.flip(at)
        store.attend(0, q)


@pytest.mark.parametrize(
    "sparse", [SELECTIVE, SparF(channels=4, tokens=1), SparF(channels=4, tokens=1, step1="sketch")]
)
def test_damage_is_found_while_summaries_are_made(make_store, tmp_path, io_engine, sparse):
    k, v = random_kv(2, 3, 64 * 20, 24)
    q = torch.randn(2, 6, 1, 24)
    for checksums in (True, False):
        with make_store(resident=False, read_ahead=0, io_engine=io_engine, checksums=checksums) as store:
            fill(store, k, v)
            store.sparse = sparse
            page = layout("float32", 3, 24)[1]
            with scratch_file(tmp_path) as file:
                file.flip(DATA_OFFSET + 13 * page + 77)
                if not checksums:
                    store.attend(0, q)
                    continue
                for _ in range(2):
                    with pytest.raises(
                        StoreCorruptError, match=r"layer 0, row \d, page \d+: checksum mismatch at byte"
                    ):
                        store.attend(0, q)
                file.flip(DATA_OFFSET + 13 * page + 77)
                out, lse = store.attend(0, q, sparse=ALL_PAGES)
                assert_near((out, lse), reference.attention(q, k, v))
                store.attend(0, q)


# ---- tiles that are kept from step to step ----


def decoding(make_store, *, layers=3, tokens=64 * 160, **settings):
    """A store of more than it has memory for; its tokens; a query for each layer, which keeps looking at the same."""
    tokens_of = [random_kv(1, 4, tokens, 64, dtype=torch.bfloat16, seed=layer) for layer in range(layers)]
    store = make_store(
        **{"memory_budget": "12MiB", "read_ahead": 0, "threads": 2} | {"sparse": PageTopK(fraction=0.08)} | settings
    )
    for layer, (k, v) in enumerate(tokens_of):
        store.append(layer, k, v)
    store.flush()
    return store, tokens_of, [torch.randn(1, 8, 1, 64).bfloat16() for _ in range(layers)]


def test_what_is_chosen_again_is_not_read_again(make_store, io_engine):
    store, tokens_of, queries = decoding(make_store, io_engine=io_engine)
    reads = []
    for _ in range(12):
        reads.append(bytes_read(store, lambda: [store.attend(layer, q) for layer, q in enumerate(queries)]))
        store.flush()
    assert reads[0] > 0 and reads[-1] == 0, reads
    assert store.stats()["reused_bytes"] > 0
    assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]
    for layer, q in enumerate(queries):
        k, v = tokens_of[layer]
        with make_store(memory_budget="64MiB") as other:
            other.append(0, k, v)
            wanted = other.attend(0, q, sparse=store.sparse)
        torch.testing.assert_close(store.attend(layer, q)[1], wanted[1], atol=1e-4, rtol=1e-4)
        assert_near(store.attend(layer, q, sparse=ALL_PAGES), reference.attention(q, k, v))


@pytest.mark.parametrize("kind", [None, "int4"])
def test_kept_tiles_are_never_those_of_other_tokens(make_store, kind):
    store, tokens_of, queries = decoding(make_store, kv_dtype=kind, tokens=64 * (90 if kind is None else 250))
    settings = store.sparse
    other = make_store(kv_dtype=kind, memory_budget="512MiB", sparse=settings)
    for layer, (k, v) in enumerate(tokens_of):
        other.append(layer, k, v)
    generator = torch.Generator().manual_seed(3)

    def check():
        for _ in range(2):
            for layer in sorted(set(store.layers()) & set(range(3))):
                batch = len(store.lengths(layer))
                q = queries[layer].expand(batch, -1, -1, -1)
                for ours, wanted in zip(store.attend(layer, q), other.attend(layer, q), strict=True):
                    torch.testing.assert_close(ours, wanted, atol=2e-2, rtol=1e-2)
        assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]

    check()
    for step in range(12):
        layer = step % 3
        for each in (store, other):
            if step % 4 == 0:
                each.truncate(layer, each.lengths(layer)[0] // 3)
            elif step % 4 == 1:
                each.reorder(layer, [0, 0] if len(each.lengths(layer)) == 1 else [1])
            elif step % 4 == 2:
                each.free(layer)
            else:
                each.trim(layer, each.begin(layer) + 64 * 7 + 3)
        shape = 1 if layer not in store.layers() else len(store.lengths(layer))
        count = int(torch.randint(64 * 20, 64 * 60, (1,), generator=generator))
        k, v = random_kv(shape, 4, count, 64, dtype=torch.bfloat16, seed=100 + step)
        store.append(layer, k, v)
        other.append(layer, k, v)
        store.flush()
        check()
    assert store.stats()["reused_bytes"] > 0


def test_a_fork_shares_kept_tiles_and_goes_on_by_itself(make_store):
    store, tokens_of, queries = decoding(make_store)
    for _ in range(5):
        expected = [store.attend(layer, q) for layer, q in enumerate(queries)]
        store.flush()
    with store.fork() as fork:
        for layer, q in enumerate(queries):
            torch.testing.assert_close(fork.attend(layer, q)[1], expected[layer][1], atol=1e-4, rtol=1e-4)
        for layer in range(3):
            fork.truncate(layer, 64 * 10)
            fork.append(layer, *random_kv(1, 4, 64 * 40, 64, dtype=torch.bfloat16, seed=9))
            fork.attend(layer, queries[layer])
        for layer, q in enumerate(queries):
            torch.testing.assert_close(store.attend(layer, q)[1], expected[layer][1], atol=1e-4, rtol=1e-4)
    store.free(0)
    for layer, q in enumerate(queries[1:], start=1):
        torch.testing.assert_close(store.attend(layer, q)[1], expected[layer][1], atol=1e-4, rtol=1e-4)


def test_a_read_that_fails_leaves_no_tile_half_filled(make_store, tmp_path, io_engine):
    store, tokens_of, queries = decoding(make_store, layers=1, io_engine=io_engine)
    with scratch_file(tmp_path) as file:
        with file.cut(DATA_OFFSET + 2**20):
            for _ in range(3):
                with pytest.raises(StoreError):
                    store.attend(0, queries[0])
        k, v = tokens_of[0]
        for _ in range(3):
            assert_near(store.attend(0, queries[0], sparse=ALL_PAGES), reference.attention(queries[0], k, v))
            store.flush()


def test_a_budget_that_gets_crowded_takes_kept_tiles_back(make_store):
    store, tokens_of, queries = decoding(make_store)
    for _ in range(5):
        for layer, q in enumerate(queries):
            store.attend(layer, q)
        store.flush()
    for layer in range(3, 40):  # tails
        store.append(layer, *random_kv(1, 4, 70, 64, dtype=torch.bfloat16, seed=layer))
    assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]
    for layer, q in enumerate(queries):
        assert_near(store.attend(layer, q, sparse=ALL_PAGES), reference.attention(q, *tokens_of[layer]))


TURNS = """
import sys, torch
from torch_csd import KVStore, PageTopK

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

torch.manual_seed(0)
store = KVStore(sys.argv[1], memory_budget="24MiB", read_ahead=0, threads=1, sparse=PageTopK(fraction=0.3))
k, v = torch.randn(2, 1, 8, 6400, 16)
for layer in range(4):
    store.append(layer, k, v)
    store.flush()
queries = torch.randn(2, 1, 8, 1, 16)
for turns in (500, 6000):
    before = resident_bytes(), store.stats()
    for _ in range(turns):
        for q in queries:
            store.attend(0, q)
    store.flush()
after = store.stats()
assert after["reused_bytes"] > before[1]["reused_bytes"] and after["drive_read_bytes"] == before[1]["drive_read_bytes"]
print(resident_bytes() - before[0])
"""


def test_taking_turns_at_tiles_takes_no_memory(tmp_path):
    """Two queries that want other tiles, and room for all of them: nothing has to go, and nothing may pile up."""
    run = subprocess.run([sys.executable, "-c", TURNS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**21, f"grew by {run.stdout} bytes"
