"""The stream of weights: what it reads ahead and what it keeps, how it learns the order, that it stays within its
budget, and that neither threads nor errors leave it in a state that hangs or gives wrong bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_csd import MemoryBudgetError, StoreClosedError, StoreError, ops
from torch_csd.weights.layout import Layout, Region, byte_count, narrow
from torch_csd.weights.staging import Staging
from torch_csd.weights.stream import STAGING_BYTES_MIN, Stream

BLOCK, MIB = 4096, 2**20


@pytest.fixture
def make_stream(io_engine) -> Iterator[Callable[..., Stream]]:
    streams = []

    def make(budget_bytes: int = 4 * MIB, **settings: object) -> Stream:
        streams.append(Stream(budget_bytes, **{"io_engine": io_engine} | settings))
        return streams[-1]

    yield make
    for stream in streams:
        stream.close()


class Weights:
    """Matrices of bytes in one file, one after another from an odd byte on."""

    def __init__(self, stream: Stream, path, count: int, unit_bytes: int = 200_000) -> None:
        self.stream, self.path, self.unit_bytes = stream, path, unit_bytes
        self.data = numpy.random.default_rng(count).integers(0, 256, 5 + count * unit_bytes, dtype=numpy.uint8)
        path.write_bytes(self.data.tobytes())
        self.open()

    def open(self) -> None:
        file = self.stream.open(self.path)
        count = len(self.data) // self.unit_bytes
        self.layouts = [
            Region.make(file, torch.uint8, (100, self.unit_bytes // 100), 5 + number * self.unit_bytes)
            for number in range(count)
        ]

    def check(self, number: int, *, routed: bool = False) -> bool:
        """Uses one; whether it was in memory already."""
        unit = self.stream._units.get(self.layouts[number].key)
        was_there = unit is not None and unit.memory is not None
        with self.stream.use(self.layouts[number], routed=routed) as memory:
            begin = 5 + number * self.unit_bytes
            assert numpy.array_equal(memory.numpy().reshape(-1), self.data[begin : begin + self.unit_bytes])
        return was_there

    def walk(self, order: list[int]) -> int:
        """Uses them in this order; how many were in memory, or under way, before they were asked for."""
        return sum(self.check(number) for number in order)

    def unit(self, number: int):
        return self.stream._units[self.layouts[number].key]


def settled(stream: Stream) -> bool:
    """Nothing of staging has a user, and what has memory is known by it."""
    staged = sum(-(-unit.byte_count // BLOCK) * BLOCK for unit in stream._staged.values())
    stats = stream.stats()
    return all(unit.users == 0 for unit in stream._units.values()) and stats["staged_bytes"] == staged


def assert_within_budget(stream: Stream) -> None:
    stats = stream.stats()
    assert stats["staged_bytes"] <= stats["staging_bytes"]
    assert stats["staging_bytes"] + stats["resident_bytes"] <= stats["memory_budget_bytes"], stats


def in_threads(*tasks: Callable[[], None], seconds: float = 60) -> None:
    """Runs them together; fails if one fails, or if they wait for each other."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    if errors:
        raise errors[0]


# ---- staging --------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_pieces_of_staging_never_overlap_and_all_come_back(data):
    blocks = data.draw(st.integers(1, 40))
    staging = Staging(torch.zeros(blocks * BLOCK, dtype=torch.uint8))
    taken: list[torch.Tensor] = []
    for number in range(data.draw(st.integers(1, 40))):
        if taken and data.draw(st.booleans()):
            staging.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            wanted = data.draw(st.integers(1, 12 * BLOCK))
            piece = staging.take(wanted)
            if piece is None:
                free = staging.free_bytes
                assert free < -(-wanted // BLOCK) * BLOCK or taken, "a whole region has room for what fits into it"
                continue
            assert piece.numel() == -(-wanted // BLOCK) * BLOCK
            assert (piece.data_ptr() - staging.memory.data_ptr()) % BLOCK == 0
            assert not piece.any(), "no other piece has it"
            piece.fill_(1 + number % 255)
            taken.append(piece)
        assert staging.free_bytes + sum(piece.numel() for piece in taken) == staging.byte_count
        for piece in taken:
            assert (piece == piece[0]).all()
        mask = torch.ones(blocks * BLOCK, dtype=torch.bool)
        for piece in taken:
            begin = piece.storage_offset()
            mask[begin : begin + piece.numel()] = False
        staging.memory[mask] = 0
    for piece in taken:
        staging.give_back(piece)
    assert staging.free_bytes == staging.byte_count
    assert staging.take(staging.byte_count).numel() == staging.byte_count, "in one piece"


# ---- reading ahead --------------------------------------------------------------------------------------------------


def test_nothing_is_read_when_it_is_expected(make_stream, tmp_path):
    stream = make_stream(16 * MIB)
    weights = Weights(stream, tmp_path / "file", 30)
    stream.expect(weights.layouts, small_bytes=1000)
    stats = stream.stats()
    assert stats["request_count"] == stats["resident_bytes"] == stats["staged_bytes"] == 0
    weights.check(0)
    assert stream.stats()["staged_bytes"] + stream.stats()["resident_bytes"] > 200_000, "but now it is"


@pytest.mark.parametrize("expected", [True, False])
def test_after_a_pass_each_is_under_way_before_it_is_asked_for(make_stream, tmp_path, expected):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 40)
    order = list(range(40))
    if expected:
        stream.expect(weights.layouts, keep=False)
    first = weights.walk(order)
    assert first >= 39 if expected else first <= 3
    for _ in range(3):
        read = stream.stats()["bytes_read"]
        assert weights.walk(order) == 40
        # Each is read once in a pass, but for what is on its way at the ends of it.
        assert stream.stats()["bytes_read"] - read <= 40 * 200_000 + STAGING_BYTES_MIN
    assert settled(stream)
    assert_within_budget(stream)


def test_an_order_that_differs_from_what_was_expected_is_learned(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 40)
    stream.expect(weights.layouts, keep=False)
    order = list(range(40))
    random.Random(1).shuffle(order)
    for _ in range(8):
        hits = weights.walk(order)
    assert hits >= 36, hits


def test_what_is_skipped_is_not_read_until_it_is_used_again(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 60)
    order = list(range(60))
    weights.walk(order)
    skipping = [number for number in order if number % 3]
    weights.walk(skipping)
    read = stream.stats()["bytes_read"]
    assert weights.walk(skipping) >= len(skipping) - 1
    assert stream.stats()["bytes_read"] - read <= len(skipping) * 200_000 + STAGING_BYTES_MIN
    weights.walk(order)
    assert weights.walk(order) >= 59


def test_one_that_moves_is_found_in_its_new_place(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 40)
    order = list(range(40))
    weights.walk(order)
    moved = [*order[:5], 39, *order[5:39]]
    for _ in range(4):
        hits = weights.walk(moved)
    assert hits >= 38


def test_a_tower_that_is_used_once_and_a_text_model_that_is_used_often(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 60)
    stream.expect(weights.layouts, keep=False)
    vision, text = list(range(30)), list(range(30, 60))
    weights.walk(vision)
    weights.walk(text)
    weights.walk(text)
    for _ in range(3):
        read = stream.stats()["bytes_read"]
        assert weights.walk(text) >= 29
        assert stream.stats()["bytes_read"] - read <= 30 * 200_000 + STAGING_BYTES_MIN, "the tower is not read"
    weights.walk(vision)
    assert weights.walk(text) >= 20


def test_two_orders_by_turns_are_never_much_slower_than_reading_when_asked(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 40)
    one, other = list(range(40)), list(reversed(range(40)))
    weights.walk(one)
    moved = stream.stats()["bytes_moved"]
    for _ in range(3):
        weights.walk(one)
        weights.walk(other)
    moved = stream.stats()["bytes_moved"] - moved
    assert moved <= 3 * 6 * 40 * 210_000, "no more than some for nothing"
    for _ in range(4):
        hits = weights.walk(one)
    assert hits >= 36


@given(data=st.data())
def test_any_order_of_uses_gives_the_right_bytes_within_the_budget(tmp_path, io_engine, data):
    budget = data.draw(st.sampled_from([4 * MIB, 6 * MIB, 16 * MIB]), label="budget")
    stream = Stream(budget, io_engine=io_engine)
    weights = Weights(stream, tmp_path / "file", 24, data.draw(st.sampled_from([100, 50_000, 400_000]), label="bytes"))
    if data.draw(st.booleans(), label="expected"):
        stream.expect(weights.layouts[:12], keep=data.draw(st.booleans()), routed_bytes=10**6, small_bytes=5000)
    numbers = st.lists(st.integers(0, 23), max_size=60)
    for number in data.draw(numbers, label="order"):
        kind = number % 5
        if kind == 0 and data.draw(st.booleans(), label="announce"):
            stream.announce([weights.layouts[each] for each in data.draw(st.sets(st.integers(18, 23)))])
        weights.check(number, routed=number >= 18)
        assert_within_budget(stream)
    assert settled(stream)
    stream.close()


# ---- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_what_stays_is_spread_evenly_over_a_pass_and_read_once(make_stream, tmp_path, share):
    count, unit_bytes = 40, 400_000
    stream = make_stream(4 * MIB + int(share * count * unit_bytes), staging_bytes=4 * MIB)
    weights = Weights(stream, tmp_path / "file", count, unit_bytes)
    stream.expect(weights.layouts)
    kept = [weights.unit(number).kept for number in range(count)]
    assert share * count * 0.85 - 1 <= sum(kept) <= share * count + 1
    for begin in range(0, count, 10):
        assert abs(sum(kept[begin : begin + 10]) - share * 10) <= 2, kept
    weights.walk(list(range(count)))
    weights.walk(list(range(count)))
    read = stream.stats()["bytes_read"]
    weights.walk(list(range(count)))
    # What is read ahead of the next pass at its end was read before it at its beginning.
    assert abs(stream.stats()["bytes_read"] - read - (count - sum(kept)) * unit_bytes) <= STAGING_BYTES_MIN
    assert_within_budget(stream)


def test_all_stays_where_it_fits_and_nothing_is_read_any_more(make_stream, tmp_path):
    stream = make_stream(32 * MIB)
    weights = Weights(stream, tmp_path / "file", 30)
    stream.expect(weights.layouts)
    weights.walk(list(range(30)))
    read = stream.stats()["bytes_read"]
    assert read == 30 * 200_000
    assert weights.walk(list(range(30))) == 30
    assert stream.stats()["bytes_read"] == read
    # What stays is used even where its file is gone.
    os.truncate(tmp_path / "file", 0)
    assert weights.walk(list(range(30))) == 30


@pytest.mark.parametrize("announced", [True, False])
def test_those_routed_to_most_are_kept(make_stream, tmp_path, announced):
    stream = make_stream(4 * MIB + 5 * 204_800, staging_bytes=4 * MIB)
    weights = Weights(stream, tmp_path / "file", 30)
    stream.expect([], routed_bytes=30 * 200_000)
    choose = random.Random(2)

    def use(numbers):
        if announced:
            stream.announce([weights.layouts[number] for number in numbers])
        for number in numbers:
            weights.check(number, routed=True)
        assert_within_budget(stream)

    for _ in range(40):  # four that are popular, and others
        use([0, 1, 2, 3, choose.randrange(4, 30)])
    kept = {
        number for number in range(30) if weights.layouts[number].key in stream._units and weights.unit(number).kept
    }
    assert {0, 1, 2, 3} <= kept and len(kept) <= 5
    read = stream.stats()["bytes_read"]
    use([3, 2, 1, 0])
    assert stream.stats()["bytes_read"] == read
    for _ in range(100):  # fashions change
        use([20, 21, 22, 23, choose.randrange(4, 20)])
    assert all(weights.unit(number).kept for number in (20, 21, 22, 23))


def test_what_is_announced_is_read_in_that_order_before_it_is_used(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 40)
    stream.expect([], routed_bytes=0)
    stream.announce([weights.layouts[number] for number in (7, 3, 30)])
    assert all(weights.unit(number).memory is not None for number in (7, 3, 30))
    assert weights.check(7, routed=True) and weights.check(3, routed=True) and weights.check(30, routed=True)
    # More than there is room for, and a call that fails in between.
    stream.announce([weights.layouts[number] for number in range(40)])
    for number in range(5):
        weights.check(number, routed=True)
    stream.announce([weights.layouts[number] for number in range(20, 40)])
    for number in range(20, 40):
        assert weights.check(number, routed=True)
    assert_within_budget(stream)


# ---- memory ---------------------------------------------------------------------------------------------------------

RSS = """
import sys, torch
from torch_csd.weights.stream import Stream
from torch_csd.weights.layout import Region, narrow

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def check(memory):  # without a copy of it
    words = memory.view(torch.int64)
    assert words.min() == words.max() == int.from_bytes(b"\\x07" * 8, "little")

stream = Stream(8 * 2**20, io_engine=sys.argv[2])
whole = Region.make(stream.open(sys.argv[1]), torch.uint8, (1024, 65536), 0)
_, pieces = stream.pieces(whole)
stream.expect(pieces)
with stream.use(pieces[0]) as memory:
    check(memory)
before, most = resident(), 0
for _ in range(3):
    for piece in pieces:
        with stream.use(piece) as memory:
            check(memory)
            most = max(most, resident())
print((most - before) / 2**20)
"""


def test_a_file_of_64_mib_passes_through_8(tmp_path, io_engine):
    (tmp_path / "file").write_bytes(b"\x07" * (64 * MIB))
    result = subprocess.run(
        [sys.executable, "-c", RSS, str(tmp_path / "file"), io_engine], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    # The budget; and huge pages, which are there as a whole when one byte of them is.
    assert float(result.stdout) <= 8 + 6, result.stdout


def test_a_budget_that_is_too_small_is_refused(io_engine):
    with pytest.raises(MemoryBudgetError, match="at least 4194304 bytes"):
        Stream(4 * MIB - 1, io_engine=io_engine)


def test_what_is_wanted_at_once_must_fit_into_staging_and_nothing_is_stuck_otherwise(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 30)
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 8 * MIB)
    large = Region.make(stream.open(tmp_path / "large"), torch.uint8, (8 * MIB,), 0)
    for _ in range(2):
        with pytest.raises(MemoryBudgetError, match="raise memory_budget"), stream.use(large):
            pass
        weights.walk(list(range(30)))
    assert weights.walk(list(range(30))) == 30, "and what follows it is read ahead"
    assert settled(stream)
    _, pieces = stream.pieces(large)
    assert sum(byte_count(piece) for piece in pieces) == 8 * MIB
    assert all(byte_count(piece) <= stream.piece_bytes for piece in pieces)


@given(
    rows=st.integers(1, 3000),
    columns=st.integers(1, 3000),
    transposed=st.booleans(),
    begin=st.integers(0, 2),
    step=st.integers(1, 3),
)
def test_pieces_are_all_of_it_and_fit_into_staging(tmp_path, rows, columns, transposed, begin, step):
    stream = Stream(4 * MIB, io_engine="pread")
    path = tmp_path / "zeros"
    path.touch()
    os.truncate(path, 40 * MIB)
    layout: Layout = Region.make(stream.open(path), torch.float32, (rows, columns), 3)
    layout = layout.apply(torch.ops.aten.slice.Tensor, (0, begin, None, step), {})
    if transposed:
        layout = layout.apply(torch.ops.aten.t.default, (), {})
    dim, pieces = stream.pieces(layout)
    assert sum(piece.shape[dim] for piece in pieces) == layout.shape[dim]
    for piece in pieces:
        assert [size for i, size in enumerate(piece.shape) if i != dim] == [
            size for i, size in enumerate(layout.shape) if i != dim
        ]
        assert byte_count(piece) <= stream.piece_bytes
    stream.close()


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("unit_bytes", [50_000, 900_000])
def test_threads_use_the_same_and_others_at_once(make_stream, tmp_path, threads, unit_bytes):
    stream = make_stream(6 * MIB, staging_bytes=4 * MIB)
    weights = Weights(stream, tmp_path / "file", 16, unit_bytes)
    stream.expect(weights.layouts[:12])

    def same():
        for _ in range(6):
            weights.walk(list(range(12)))
            assert_within_budget(stream)

    def others(seed):
        choose = random.Random(seed)
        for _ in range(60):
            number = choose.randrange(16)
            weights.check(number, routed=number >= 12)
            if number == 3:
                stream.announce([weights.layouts[each] for each in (12, 14)])
            if number == 5:
                part = narrow(weights.layouts[5], 0, seed, seed + 20)
                assert stream.load(part).numel() == 20 * unit_bytes // 100
                index = torch.tensor([seed, 7, 99])
                begin = 5 + 5 * unit_bytes
                rows = weights.data[begin : begin + unit_bytes].reshape(100, -1)[index.numpy()]
                assert numpy.array_equal(stream.rows(weights.layouts[5], index).numpy(), rows)

    in_threads(*[same if number % 2 else (lambda number=number: others(number)) for number in range(threads)])
    in_threads(*[same] * threads)
    assert settled(stream)


def test_more_threads_than_staging_has_room_for_wait_for_each_other_and_go_on(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 10, 1_000_000)
    assert stream.stats()["staging_bytes"] < 6 * 1_000_000

    def use(seed):
        choose = random.Random(seed)
        for _ in range(25):
            weights.check(choose.randrange(10))

    in_threads(*[lambda seed=seed: use(seed) for seed in range(6)])
    assert settled(stream)
    # All at the same one, which has to be given memory while others hold it all.
    for number in range(10):
        in_threads(*[lambda number=number: weights.check(number)] * 6)
    assert settled(stream)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_is_an_error_where_it_is_used_and_nowhere_else(make_stream, tmp_path):
    stream = make_stream(5 * MIB, staging_bytes=4 * MIB)
    bad, good = Weights(stream, tmp_path / "bad", 20), Weights(stream, tmp_path / "good", 21)
    layouts = [each for pair in zip(bad.layouts, good.layouts, strict=False) for each in pair]
    stream.expect(layouts)
    kept = [number for number in range(20) if bad.unit(number).kept]
    assert kept

    def walk():
        for number in range(20):
            bad.check(number)
            good.check(number)

    walk()
    walk()
    os.truncate(bad.path, 100)
    for attempt in range(3):
        failures = 0
        for number in range(20):
            try:
                bad.check(number)
                assert number in kept or attempt == 0, "read ahead before"
            except StoreError as error:
                assert str(error).startswith(f"{bad.path}: changed while it was in use")
                failures += 1
            good.check(number)
        assert failures == 20 - len(kept) or (attempt == 0 and failures > 0)
        assert settled(stream)
        assert_within_budget(stream)
    bad.path.write_bytes(bad.data.tobytes())
    bad.open()  # anew
    bad.walk(list(range(20)))
    bad.walk(list(range(20)))
    good.walk(list(range(20)))
    assert settled(stream)


def test_threads_that_wait_for_what_fails_all_get_the_error(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 8, 900_000)
    weights.walk(list(range(8)))
    os.truncate(weights.path, 5 + 4 * 900_000)

    def use(seed):
        choose = random.Random(seed)
        for _ in range(20):
            with pytest.raises(StoreError, match="changed while it was in use"):
                weights.check(choose.randrange(8))

    in_threads(*[lambda seed=seed: use(seed) for seed in range(4)])
    assert settled(stream)


def test_an_error_of_who_computes_gives_the_memory_back(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 30)
    for _ in range(3):
        for number in range(30):
            with pytest.raises(ZeroDivisionError), stream.use(weights.layouts[number]):
                raise ZeroDivisionError
    assert settled(stream)
    assert weights.walk(list(range(30))) == 30


def test_a_stream_that_is_closed_says_so_and_is_not_waited_for(make_stream, tmp_path):
    stream = make_stream()
    weights = Weights(stream, tmp_path / "file", 30)
    weights.walk(list(range(30)))
    (tmp_path / "other").touch()
    stream.close()
    stream.close()
    for use in (
        lambda: weights.check(20),
        lambda: stream.load(weights.layouts[3]),
        lambda: stream.rows(weights.layouts[3], torch.tensor([1])),
        lambda: stream.open(tmp_path / "other"),
        stream.stats,
    ):
        with pytest.raises(StoreClosedError):
            use()


def test_closing_while_others_read_ends_them(make_stream, tmp_path):
    for _ in range(3):
        stream = make_stream()
        weights = Weights(stream, tmp_path / "file", 20, 900_000)

        def use(weights=weights):
            with pytest.raises(StoreClosedError):
                while True:
                    weights.walk(list(range(20)))

        def close(stream=stream):
            time.sleep(0.05)
            stream.close()

        in_threads(use, use, close)


def test_a_stream_that_nobody_holds_is_closed(tmp_path, io_engine):
    stream = Stream(4 * MIB, io_engine=io_engine)
    Weights(stream, tmp_path / "file", 5).walk([0, 1, 2])
    reader = stream.reader
    del stream
    with pytest.raises(StoreClosedError):
        ops.reader_stats(reader)


def test_the_engine_is_the_one_that_was_asked_for(make_stream, tmp_path, io_engine):
    stream = make_stream()
    Weights(stream, tmp_path / "file", 3).walk([0, 1, 2])
    assert stream.stats()["io_engine"] == io_engine


def test_a_child_that_is_forked_while_a_thread_has_the_lock_does_not_hang(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(2**16))
    stream = Stream(4 * 2**20)
    layout = Region.make(stream.open(file), torch.uint8, [2**16], 0)
    with stream._changed:  # as another thread's
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(20)
                with pytest.raises(StoreClosedError, match="child"), stream.use(layout):
                    pass
                status = 0
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with stream.use(layout) as elements:
        assert elements.shape == (2**16,)
    stream.close()


def test_layouts_that_are_used_once_are_forgotten(tmp_path, monkeypatch):
    from torch_csd.weights import stream as module

    monkeypatch.setattr(module, "_UNITS_MAX", 64)
    file = tmp_path / "file"
    file.write_bytes(random.Random(0).randbytes(2**20))
    data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    with Stream(4 * 2**20) as stream:
        layout = Region.make(stream.open(file), torch.uint8, [1024, 1024], 0)
        for index in [*range(1024), *range(1000, 1010), 3, 4]:
            with stream.use(narrow(layout, 0, index, index + 1)) as row:
                assert torch.equal(row[0], data[index * 1024 : (index + 1) * 1024])
        assert len(stream._units) <= 128 and len(stream._order) <= 128 and len(stream._pieces) <= 64
        assert [unit.index for unit in stream._order] == list(range(len(stream._order)))
