"""Brings ranges of files into bounded memory, ahead of their use, in the order in which they are used.

One pass of a model uses its weights in the same order as the one before. So the order is learned (from what it is said
to be, then from what happens), and while one weight is computed with, those after it are read into what is left of the
staging memory: after the last comes the first of the next pass, and the drive never idles. A fixed share of the weights
stays in memory after its first use: a scan over everything defeats a cache (FlexGen, 2303.06865, has percentages for
the same reason). Experts of a mixture are read when they are routed to, and kept by use.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.config import as_int, parse_io_engine
from torch_csd.errors import MemoryBudgetError
from torch_csd.weights.layout import InputFile, Join, Layout, Range, Region, byte_count, narrow
from torch_csd.weights.staging import HUGE_PAGE_BYTES, Staging, new_memory

if TYPE_CHECKING:
    from torch_csd.cuda.device import Event
    from torch_csd.cuda.weights import Reading, WeightCard

MIB = 2**20
_R = TypeVar("_R")
_thread = threading.local()  # baton: that this thread computes with, in lockstep
STAGING_BYTES_MIN = 4 * MIB
# Requests of 32 MiB in flight keep a drive busy; one piece is computed with meanwhile, and two more of the largest size
# wait. More staging makes nothing faster and leaves less for what is resident.
STAGING_BYTES_MAX = 256 * MIB
_PIECES = 4  # that fit into staging at once, at least
_AHEAD_UNITS = 256  # at most: of small ones, looking further costs more than it gives
_SKIPPED_MAX = 8  # a unit so far ahead is still ahead, however short the order is
_AGING_USES = 4096  # of routed units, until all counts are halved


@dataclass(eq=False)
class Unit:
    """What is read, waited for and given back as one: a weight, or a part of a large one."""

    layout: Layout
    ranges: tuple[Range, ...]
    places: tuple[int, ...]  # of the ranges' covering blocks in the unit's memory
    byte_count: int  # of these blocks
    kept: bool = False  # stays in memory from its first use on
    routed: bool = False  # used when something calls for it: not one of the order
    memory: Tensor | None = None
    ticket: int | Reading | None = None  # of the read into it
    ready: Event | None = None  # on a card: its elements are there after it
    loaded: bool = False
    awaited: bool = False  # a thread waits for it already
    users: int = 0
    index: int | None = None  # in the order
    expected: bool = True  # in the next pass: it was used in the last one
    use_count: float = 0.0  # of a routed one
    awaits: set[int] = field(default_factory=set)  # threads in lockstep that are still to use it in this pass

    @staticmethod
    def of(layout: Layout) -> Unit:
        return Unit.of_ranges(layout, tuple(leaf.range for leaf in layout.leaves))

    @staticmethod
    def of_ranges(layout: Layout, ranges: tuple[Range, ...]) -> Unit:
        places = [0]
        for each in ranges:
            places.append(places[-1] + covering_bytes(each.offset, each.byte_count))
        return Unit(layout, ranges, tuple(places[:-1]), places[-1])

    def elements(self) -> Tensor:
        """The layout's, out of its memory."""
        leaves = (
            leaf.elements(self.memory[place + each.offset % BLOCK_BYTES :][: each.byte_count])
            for leaf, each, place in zip(self.layout.leaves, self.ranges, self.places, strict=True)
        )
        return self.layout.assemble(leaves)


def kept_bytes(unit: Unit) -> int:
    """Of memory that is its own."""
    multiple = HUGE_PAGE_BYTES if unit.byte_count >= HUGE_PAGE_BYTES else BLOCK_BYTES
    return -(-unit.byte_count // multiple) * multiple


def covering_bytes(offset: int, count: int) -> int:
    """Of the blocks that hold bytes [offset, offset + count)."""
    if count == 0:
        return 0
    return (offset + count + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES - offset // BLOCK_BYTES * BLOCK_BYTES


class Forecast(NamedTuple):
    """Bytes that a pass reads."""

    dense_bytes: int  # used in every pass
    routed_bytes: int  # of all that may be routed to, and do not stay in memory


@dataclass(eq=False)
class Pace:
    """How far a thread in lockstep is."""

    position: int = -1  # in the order
    steps: int = 0  # units since it began
    stopped: bool = False  # it uses no more


class Stream:
    """Files, the memory for what is read of them, and what is read next. Thread-safe.

    A thread uses one layout at a time: one that waits for room while it holds another could wait for itself.
    """

    def __init__(
        self,
        memory_budget_bytes: int,
        *,
        io_engine: str = "auto",
        queue_depth: int = 32,
        staging_bytes: int = 0,
        device: torch.device | None = None,
        gpu_io: str = "auto",
        directory: str = ".",
    ) -> None:
        """
        Args:
            memory_budget_bytes: of everything that is read: staging and what stays, in host memory and on a card.
            staging_bytes: of them, for reads under way and ahead; 0: a quarter, at most 256 MiB. With a card, on it,
                and as much pinned memory.
            device: a card that elements are brought to, ahead of their use; None: they are in host memory.
            gpu_io: as in :class:`KVStore`. directory: where most files are: "auto" is decided there.

        Raises:
            MemoryBudgetError: it is less than 4 MiB. GpuUnavailableError: the card, or ``gpu_io``, cannot be had.
        """
        if memory_budget_bytes < STAGING_BYTES_MIN:
            raise MemoryBudgetError(
                f"memory_budget must be at least {STAGING_BYTES_MIN} bytes for weights on the drive, got "
                f"{memory_budget_bytes}"
            )
        least_bytes = STAGING_BYTES_MIN if device is None else STAGING_BYTES_MIN // 2  # with a card, twice
        staging_bytes = staging_bytes or min(max(memory_budget_bytes // 4, least_bytes), STAGING_BYTES_MAX)
        staging_bytes = staging_bytes // BLOCK_BYTES * BLOCK_BYTES
        self.memory_budget_bytes = memory_budget_bytes
        self.piece_bytes = staging_bytes // _PIECES - 2 * BLOCK_BYTES  # of one unit: what a large weight is cut into
        self.card = None if device is None else _open_card(device, staging_bytes, directory, gpu_io)
        self._staging = Staging(new_memory(staging_bytes)) if self.card is None else self.card.ring
        self._changed = threading.Condition()  # of everything below
        self._files: dict[str, InputFile] = {}
        self._units: dict[tuple, Unit] = {}
        self._order: list[Unit] = []
        self._position = -1  # in it: of the last unit that was used
        self._staged: dict[int, Unit] = {}  # by id: those with memory of staging
        self._announced: deque[Unit] = deque()
        self._dense: dict[tuple, Tensor] = {}  # whole small tensors
        self._kept_bytes = 0  # in memory of their own
        self._routed_bytes = 0  # of all routed units
        self._routed_bytes_left = 0  # that they may still keep
        self._routed_uses = 0
        self._paces: dict[int, Pace] = {}  # of the threads in lockstep, by ident
        self._used_bytes = 0  # of units that were asked for, wherever they were
        self._has_warned = False
        self.reader = ops.reader_open(
            io_engine=parse_io_engine(io_engine),
            queue_depth=as_int(queue_depth, "queue_depth", low=1, high=1024),
            staging=(self._staging if self.card is None else self.card.host).memory,
        )
        if self.card is not None:
            self.card.start(self.reader)
        self._finalizer = weakref.finalize(self, _close_reader, self.reader, self.card, os.getpid())

    # ---- files -------------------------------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str]) -> InputFile:
        """The file, open to be read; the same one for the same path.

        Raises:
            StoreError: it cannot be read.
        """
        path = os.path.abspath(os.fspath(path))
        with self._changed:
            if path not in self._files:
                self._files[path] = InputFile(path, *ops.reader_add_file(self.reader, path)[:3])
                if self.card is not None:
                    self.card.open(self._files[path])
            return self._files[path]

    def close(self) -> None:
        """Waits for what is being read, and lets go of the files. Idempotent."""
        self._finalizer()

    # ---- what is used ------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, layout: Layout, *, routed: bool = False) -> Iterator[Tensor]:
        """The layout's elements, of its dtype, in memory until the end of the block. At most `piece_bytes` of them.

        With a card they are on it, for what is issued to the current stream inside of the block.

        routed: used when something calls for it, not once in every pass.

        Raises:
            StoreError: reading failed, or the file was changed.
        """
        unit = self._begin(layout, routed)
        try:
            if not unit.loaded:
                with _baton_passed():
                    self._load(unit)
            with self._in_use(unit):
                yield unit.elements()
        finally:
            self._end(unit)

    def _in_use(self, unit: Unit) -> AbstractContextManager:
        return nullcontext() if self.card is None else self.card.in_use(unit)

    def keep(self, layout: Layout) -> Tensor:
        """The elements, in memory from now on: for small tensors that any op may meet."""
        with self._changed:
            dense = self._dense.get(layout.key)
        if dense is None:
            dense = self.load(layout)
            if self.card is not None:
                dense = dense.to(self.card.torch_device)
            with self._changed:
                if layout.key not in self._dense:
                    self._kept_bytes += byte_count(layout)
                dense = self._dense.setdefault(layout.key, dense)
        return dense

    def load(self, layout: Layout) -> Tensor:
        """The elements in host memory of their own, beside the budget: the caller's to keep or to drop."""
        unit = Unit.of(layout)
        unit.memory = new_memory(unit.byte_count)
        unit.ticket = self._read_to_host(unit, background=False)
        ops.reader_wait(self.reader, unit.ticket)
        return unit.elements()

    def rows(self, layout: Layout, index: Tensor) -> Tensor:
        """[len(index), ...]: those rows of the first dimension, and no others, read now into host memory. index: int64
        [rows] on the CPU, within bounds."""
        if index.numel() == 0:
            return torch.empty((0, *layout.shape[1:]), dtype=layout.dtype)
        row_bytes = max(byte_count(layout) // max(layout.shape[0], 1), 1)
        step = max(self.piece_bytes // (row_bytes + 2 * BLOCK_BYTES), 1)
        distinct, inverse = torch.unique(index, return_inverse=True)
        gathered = torch.cat([self._gather(layout, some.tolist()) for some in distinct.split(step)])
        return gathered if torch.equal(distinct, index) else gathered[inverse]

    def _gather(self, layout: Layout, index: list[int]) -> Tensor:
        """Copies of these rows, which are distinct and ascending."""
        if not (isinstance(layout, Region) and layout.meta[0].is_contiguous()):
            rows = Join.make([narrow(layout, 0, row, row + 1) for row in index], 0)
            with self._temporary(Unit.of(rows)) as unit:
                return unit.elements().clone()
        row_bytes = byte_count(layout) // layout.shape[0]
        first = layout.offset + layout.meta.storage_offset() * layout.dtype.itemsize
        step = layout.meta.stride(0) * layout.dtype.itemsize
        runs: list[list[int]] = []  # begin and end, of rows whose blocks touch
        for row in index:
            begin = first + row * step
            if runs and begin - runs[-1][1] < BLOCK_BYTES and begin >= runs[-1][1]:
                runs[-1][1] = begin + row_bytes
            else:
                runs.append([begin, begin + row_bytes])
        ranges = tuple(Range(layout.file, begin, end - begin) for begin, end in runs)
        with self._temporary(Unit.of_ranges(layout, ranges)) as unit:
            rows, run = [], 0
            for row in index:
                begin = first + row * step
                while begin >= runs[run][1]:
                    run += 1
                start = unit.places[run] + ranges[run].offset % BLOCK_BYTES + begin - ranges[run].offset
                rows.append(unit.memory[start : start + row_bytes])
            return torch.cat(rows).view(layout.dtype).view(len(index), *layout.shape[1:])

    @contextmanager
    def _temporary(self, unit: Unit) -> Iterator[Unit]:
        """The unit, read now, in host memory until the end of the block; nothing remembers it."""
        if self.card is not None:
            with self.card.in_host_memory(unit):
                yield unit
            return
        try:
            with _baton_passed():
                with self._changed:
                    unit.users = 1
                    self._make_room(unit)
                    self._submit(unit, background=False)
                    self._read_ahead()
                ops.reader_wait(self.reader, unit.ticket)
            yield unit
        finally:
            with self._changed:
                unit.users = 0
                self._release(unit)
                self._read_ahead()
                self._changed.notify_all()

    def pieces(self, layout: Layout) -> tuple[int, list[Layout]]:
        """The layout, cut along one dimension into what fits into staging: that dimension, and the pieces in order."""
        if isinstance(layout, Join) and layout.dim == 0 and layout.leaves:
            return 0, [piece for part in layout.parts for piece in self._cut(part, 0)]
        dim = 0
        if isinstance(layout, Region) and layout.meta.dim() > 1:
            steps = layout.meta.stride()
            dim = max(range(len(steps)), key=lambda each: (steps[each] if layout.shape[each] > 1 else -1, -each))
        return dim, self._cut(layout, dim)

    def _cut(self, layout: Layout, dim: int) -> list[Layout]:
        size = layout.shape[dim] if layout.shape else 1
        count = -(-byte_count(layout) // self.piece_bytes)
        if count <= 1:
            return [layout]
        step = max(size // count, 1)
        return [narrow(layout, dim, begin, min(begin + step, size)) for begin in range(0, size, step)]

    # ---- what is expected --------------------------------------------------------------------------------------------

    def expect(
        self, layouts: Sequence[Layout], *, keep: bool = True, routed_bytes: int = 0, small_bytes: int = 0
    ) -> None:
        """The order in which the next pass will use these, each once, and which of them stay in memory: as many as the
        budget allows, spread evenly, so that no part of a pass waits for the drive more than another. Reads nothing,
        and forgets what was expected and kept before.

        keep: whether any stay. routed_bytes: of all units that are routed to: they get what the others leave.
        small_bytes: that `keep` will take.
        """
        with self._changed:
            self._forget_order()
            for layout in layouts:
                for piece in self.pieces(layout)[1]:
                    unit = self._unit(piece)
                    if unit.index is None:
                        unit.index = len(self._order)
                        self._order.append(unit)
            if not keep:
                return
            left = self.memory_budget_bytes - self._staging_bytes - small_bytes
            total = sum(unit.byte_count for unit in self._order)
            share = min(max(left, 0) / max(total, 1), 1.0)
            due = 0.0
            for unit in self._order:
                due += share * unit.byte_count
                size = kept_bytes(unit)
                if share == 1.0 or (due >= unit.byte_count / 2 and size <= left):
                    unit.kept = True
                    due -= unit.byte_count
                    left -= size
            self._routed_bytes = routed_bytes
            self._routed_bytes_left = max(min(left, routed_bytes), 0)

    def _forget_order(self) -> None:
        for unit in self._units.values():
            unit.index = None
            if unit.users == 0:
                if unit.memory is not None:
                    self._release(unit)
                unit.kept = False
        self._units = {key: unit for key, unit in self._units.items() if unit.users > 0}
        self._order = []
        self._announced.clear()
        self._position = -1
        self._routed_bytes_left = 0

    @property
    def _staging_bytes(self) -> int:
        return self._staging.byte_count if self.card is None else self.card.byte_count

    def announce(self, layouts: Sequence[Layout]) -> None:
        """These are used next, in this order: routed ones, which no order tells."""
        with self._changed:
            for unit in self._announced:  # of a call that failed
                if unit.users == 0 and not unit.kept and unit.memory is not None:
                    self._release(unit)
            self._announced = deque(self._unit(layout, routed=True) for layout in layouts)
            self._read_ahead()

    # ---- what a pass costs -------------------------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        """What the next pass is expected to read, once what stays has been read."""
        with self._changed:
            dense = sum(unit.byte_count for unit in self._order if not unit.kept and unit.expected)
            return Forecast(dense, max(self._routed_bytes - self._routed_bytes_left, 0))

    def measure_rate(self) -> float:
        """Bytes/s of the drive, reading what is used next anyway: as much as is read ahead."""
        before = self._moved_bytes()
        begin_s = time.perf_counter()
        with self._changed:
            self._read_ahead()
            ahead = [unit for unit in self._order if unit.ticket is not None]
            for unit in ahead:
                unit.users += 1
        try:
            for unit in ahead:
                self._load(unit)
            elapsed_s = time.perf_counter() - begin_s
        finally:
            with self._changed:
                for unit in ahead:
                    unit.users -= 1
        return max(self._moved_bytes() - before, 1) / elapsed_s

    def _moved_bytes(self) -> int:
        direct_bytes = 0 if self.card is None else self.card.stats()["gpu_direct_bytes"]
        return ops.reader_stats(self.reader)["bytes_moved"] + direct_bytes

    # ---- lockstep ----------------------------------------------------------------------------------------------------

    def lockstep(self, tasks: Sequence[Callable[[], _R]]) -> list[_R | BaseException]:
        """Runs the tasks, each in a thread of its own, one computing at a time, so that each weight is read once for
        all of them (FlexGen, 2303.06865, section 4.1: a block of several batches). Their results or errors, in order.

        A weight stays in staging until all have used it; the first waits when staging is full of such. Each must use
        weights in the order of the passes of one model, and begin with the first of a pass.
        """
        baton = threading.Lock()
        results: list[_R | BaseException] = [RuntimeError("not run")] * len(tasks)
        start = threading.Barrier(len(tasks))

        def run(number: int) -> None:
            try:
                with self._changed:
                    self._paces[threading.get_ident()] = Pace(self._position)
                start.wait()
                with baton:
                    _thread.baton = baton
                    results[number] = tasks[number]()
            except BaseException as error:  # also KeyboardInterrupt: the caller decides
                results[number] = error
            finally:
                _thread.baton = None
                self._leave()

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(tasks))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # KeyboardInterrupt comes to this thread alone
            with self._changed:
                for pace in self._paces.values():
                    pace.stopped = True
            for thread in threads:
                thread.join()
            raise
        return results

    def _leave(self) -> None:
        """This thread uses nothing any more: the others do not keep anything for it."""
        with self._changed:
            ident = threading.get_ident()
            self._paces.pop(ident, None)
            for unit in self._units.values():
                if ident in unit.awaits:
                    unit.awaits.remove(ident)
                    self._release_unused(unit)
            self._read_ahead()
            self._changed.notify_all()

    def _keep_pace(self, unit: Unit) -> bool:
        """Whether this use of the unit moves the order on: not that of a thread that follows others in lockstep."""
        ident = threading.get_ident()
        pace = self._paces.get(ident)
        if pace is None:
            return True
        if pace.stopped:
            raise InterruptedError("stopped, with the tasks that it was in lockstep with")
        if ident in unit.awaits:
            unit.awaits.remove(ident)
        else:  # the first of this pass
            unit.awaits = set(self._paces) - {ident}
        if unit.index is not None and self._order:
            pace.steps += (unit.index - pace.position) % len(self._order)
            pace.position = unit.index
        return self._leads(ident)

    def _leads(self, ident: int) -> bool:
        first = max(self._paces, key=lambda each: (self._paces[each].steps, each), default=None)
        return first is None or first == ident

    # ---- units -------------------------------------------------------------------------------------------------------

    def _unit(self, layout: Layout, *, routed: bool = False) -> Unit:
        unit = self._units.get(layout.key)
        if unit is None:
            unit = self._units[layout.key] = Unit.of(layout)
            unit.routed = routed
        return unit

    def _begin(self, layout: Layout, routed: bool) -> Unit:
        with self._changed:
            unit = self._unit(layout, routed=routed)
            if unit.routed:
                self._count_use(unit)
            elif self._keep_pace(unit):
                self._advance(unit)
            unit.users += 1
            self._used_bytes += byte_count(layout)
            return unit

    def _end(self, unit: Unit) -> None:
        with self._changed:
            unit.users -= 1
            self._release_unused(unit)
            self._read_ahead()
            self._changed.notify_all()

    def _release_unused(self, unit: Unit) -> None:
        if unit.users == 0 and not unit.awaits and not unit.kept and unit.memory is not None:
            self._release(unit)

    def _load(self, unit: Unit) -> None:
        """Returns when its elements are in its memory."""
        while True:
            with self._changed:
                while unit.awaited:  # by another thread
                    self._changed.wait()
                if unit.loaded:
                    return
                if unit.memory is None:
                    self._make_room(unit)
                if unit.ticket is None:
                    self._submit(unit, background=False)
                unit.awaited = True
                self._read_ahead()
            try:
                self._wait(unit)
            except BaseException:
                with self._changed:
                    unit.awaited = False
                    unit.ticket = None
                    self._changed.notify_all()
                raise
            with self._changed:
                unit.awaited = False
                unit.ticket = None
                unit.loaded = True
                self._changed.notify_all()

    def _submit(self, unit: Unit, *, background: bool) -> None:
        read = self._read_to_host if self.card is None else self.card.read
        unit.ticket = read(unit, background=background)

    def _wait(self, unit: Unit) -> None:
        if self.card is None:
            ops.reader_wait(self.reader, unit.ticket)
        else:
            self.card.wait(unit, unit.ticket)

    def _read_to_host(self, unit: Unit, *, background: bool) -> int:
        return ops.reader_read(
            self.reader,
            files=[each.file.number for each in unit.ranges],
            offsets=[each.offset for each in unit.ranges],
            byte_counts=[each.byte_count for each in unit.ranges],
            memory=unit.memory,
            memory_offsets=list(unit.places),
            background=background,
        )

    def _place(self, unit: Unit) -> bool:
        """Gives the unit memory, if there is some."""
        if unit.kept:
            unit.memory = (new_memory if self.card is None else self.card.new_memory)(kept_bytes(unit))
            if unit.memory is not None:
                self._kept_bytes += unit.memory.numel()
                return True
            unit.kept = False  # the card has less memory than was planned with
        unit.memory = self._staging.take(unit.byte_count)
        if unit.memory is None:
            return False
        self._staged[id(unit)] = unit
        return True

    def _make_room(self, unit: Unit) -> None:
        """Gives the unit memory: what was read ahead and is used last must make room, or what other threads use."""
        if not unit.kept and unit.byte_count > self._staging.byte_count:
            raise MemoryBudgetError(
                f"{unit.byte_count} bytes are wanted at once, staging has {self._staging.byte_count}; raise "
                f"memory_budget"
            )
        while not self._place(unit):
            # Of threads in lockstep only the first waits for the others: so one of them always goes on.
            leads = self._leads(threading.get_ident())
            idle = [each for each in self._staged.values() if each.users == 0 and not (leads and each.awaits)]
            if idle:
                self._release(max(idle, key=self._distance))
            else:
                self._changed.wait()

    def _distance(self, unit: Unit) -> int:
        """Units until it is used."""
        if unit.index is None:
            return 0  # announced
        return (unit.index - self._position) % len(self._order)

    def _release(self, unit: Unit) -> None:
        """Takes the unit's memory back."""
        if unit.ticket is not None and self.card is None:
            ops.reader_drop(self.reader, unit.ticket)
        elif unit.ticket is not None:
            self.card.drop(unit.ticket)
        if self._staged.pop(id(unit), None) is not None:
            self._staging.give_back(unit.memory)
        elif unit.memory is not None:
            self._kept_bytes -= unit.memory.numel()
        unit.memory = None
        unit.ticket = None
        unit.loaded = False

    def _count_use(self, unit: Unit) -> None:
        """Decides, before a routed unit is read, whether it stays: the most used do."""
        self._routed_uses += 1
        if self._routed_uses % _AGING_USES == 0:
            for each in self._units.values():
                each.use_count /= 2
        unit.use_count += 1
        if unit.kept or unit.memory is not None:
            return
        size = kept_bytes(unit)
        if size > self._routed_bytes_left:
            others = (each for each in self._units.values() if each.routed and each.kept and each.users == 0)
            least = min(others, key=lambda each: each.use_count, default=None)
            if least is None or least.use_count >= unit.use_count or kept_bytes(least) < size:
                return
            self._release(least)
            least.kept = False
            self._routed_bytes_left += kept_bytes(least)
        unit.kept = True
        self._routed_bytes_left -= size

    # ---- the order ---------------------------------------------------------------------------------------------------

    def _advance(self, unit: Unit) -> None:
        """The unit is used now: goes on to it in the order, which learns from it."""
        unit.expected = True
        if unit.index is None:
            self._insert(unit)
            return
        count = len(self._order)
        distance = (unit.index - self._position) % count
        if distance > max(_SKIPPED_MAX, count // 2):  # rather one that comes earlier now than all of a pass skipped
            del self._order[unit.index]
            if unit.index <= self._position:
                self._position -= 1
            self._insert(unit)
            return
        for step in range(1, distance):
            skipped = self._order[(self._position + step) % count]
            skipped.expected = False
            if skipped.users == 0 and id(skipped) in self._staged:
                self._release(skipped)
        self._position = unit.index

    def _insert(self, unit: Unit) -> None:
        self._position += 1
        self._order.insert(self._position, unit)
        for index in range(len(self._order)):
            self._order[index].index = index

    def _read_ahead(self) -> None:
        """Begins to read what is used next, as far as memory goes."""
        while self._announced:
            unit = self._announced[0]
            if unit.memory is None and unit.users == 0:
                if not self._place(unit):
                    return
                self._submit(unit, background=True)
            self._announced.popleft()
        count = len(self._order)
        for step in range(1, min(count, _AHEAD_UNITS) + 1):
            unit = self._order[(self._position + step) % count]
            if unit.memory is not None or not unit.expected:
                continue
            if not self._place(unit):
                return
            self._submit(unit, background=True)

    # ---- the rest ----------------------------------------------------------------------------------------------------

    def warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(text, stacklevel=2)

    def forget(self, file: InputFile) -> None:
        """What was read of the file ahead of its use is read again: it was written to."""
        with self._changed:
            for unit in list(self._units.values()):
                if unit.users == 0 and unit.memory is not None and any(each.file == file for each in unit.ranges):
                    self._release(unit)
            for key in [key for key, _ in self._dense.items() if key[0] == file.number]:
                del self._dense[key]

    def stats(self) -> dict:
        """What was read and what is in memory: `ops.reader_stats`, and bytes of memory by use."""
        with self._changed:
            mine = {
                "staging_bytes": self._staging_bytes,
                "staged_bytes": self._staging.byte_count - self._staging.free_bytes,
                "resident_bytes": self._kept_bytes,
                "used_bytes": self._used_bytes,
                "memory_budget_bytes": self.memory_budget_bytes,
            }
        if self.card is not None:
            mine |= self.card.stats()
        return ops.reader_stats(self.reader) | mine


@contextmanager
def _baton_passed() -> Iterator[None]:
    """Lets another thread in lockstep compute while this one waits. Not to be left with the stream's lock held: who
    has the baton may want that."""
    baton = getattr(_thread, "baton", None)
    if baton is None:
        yield
        return
    baton.release()
    try:
        yield
    finally:
        baton.acquire()


def _open_card(device: torch.device, staging_bytes: int, directory: str, gpu_io: str) -> WeightCard:
    from torch_csd.cuda.weights import open_weight_card  # the GPU path is there for those who use it

    return open_weight_card(device, staging_bytes=staging_bytes, directory=directory, gpu_io=gpu_io)


def _close_reader(reader: Tensor, card: WeightCard | None, process: int) -> None:
    if os.getpid() != process:
        return
    try:
        if card is not None:
            card.close()
    finally:
        ops.reader_close(reader)
