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
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.config import as_int, parse_io_engine
from torch_csd.errors import MemoryBudgetError, StoreError
from torch_csd.weights.layout import InputFile, Join, Layout, Range, Region, byte_count, narrow
from torch_csd.weights.lockstep import Lockstep, baton_passed
from torch_csd.weights.staging import Staging, new_memory
from torch_csd.weights.unit import Unit, kept_bytes

if TYPE_CHECKING:
    from torch_csd.cuda.weights import WeightCard

MIB = 2**20
_R = TypeVar("_R")
# Reads in flight, of 1 MiB. Steps of a 6.2 GB model in turn: 3.11 GB/s with 8, 3.39 with 16, 3.45 with 32, 3.52 with 64
# (virtio drive whose best was 3.54, AMD EPYC, 2 cores, 2026-11-26).
QUEUE_DEPTH = 64
STAGING_BYTES_MIN = 4 * MIB
# A quarter of it is in flight, another is computed with, and two more pieces of the largest size wait. More staging
# makes nothing faster and leaves less for what is resident.
STAGING_BYTES_MAX = 256 * MIB
_PIECES = 4  # that fit into staging at once, at least
_AHEAD_UNITS = 256  # at most: of small ones, looking further costs more than it gives
_SKIPPED_MAX = 8  # a unit so far ahead is still ahead, however short the order is
_ROWS_BYTES_MAX = MIB  # of rows in memory of their own, until they are copied
_UNITS_MAX = 2**16  # that are remembered, before those are forgotten that were not used for long
_AGING_USES = 4096  # of routed units, until all counts are halved


class Forecast(NamedTuple):
    """Bytes that a pass reads."""

    dense_bytes: int  # used in every pass
    routed_bytes: int  # of all that may be routed to, and do not stay in memory


class Stream:
    """Files, the memory for what is read of them, and what is read next. Thread-safe.

    A thread uses one layout at a time: one that waits for room while it holds another could wait for itself.
    """

    def __init__(
        self,
        memory_budget_bytes: int,
        *,
        io_engine: str = "auto",
        queue_depth: int = QUEUE_DEPTH,
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
        self._pieces: dict[tuple, tuple[int, list[Layout]]] = {}
        self._order: list[Unit] = []
        self._position = -1  # in it: of the last unit that was used
        self._uses = 0  # of its units
        self._staged: dict[int, Unit] = {}  # by id: those with memory of staging
        self._announced: deque[Unit] = deque()
        self._small: dict[tuple, tuple[Layout, Tensor]] = {}  # whole small tensors, the last used last
        self._small_bytes = 0  # of them
        self._small_bytes_max = memory_budget_bytes - self._staging_bytes
        self._kept_bytes = 0  # in memory of their own
        self._routed_bytes = 0  # of all routed units
        self._routed_bytes_left = 0  # that they may still keep
        self._routed_uses = 0
        self._lockstep = Lockstep(self._changed)
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
        _streams.add(self)

    def __deepcopy__(self, memo: dict) -> Stream:
        return self  # as copies of its tensors use it too

    # ---- files -------------------------------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str]) -> InputFile:
        """The file, open to be read; the same one for the same path, while there is the same file, unchanged.

        Raises:
            StoreError: it cannot be read.
        """
        path = os.path.abspath(os.fspath(path))
        with self._changed:
            file = self._files.get(path)
            if file is None or not _is_there(file):
                file = self._files[path] = _input_file(path, ops.reader_add_file(self.reader, path))
                if self.card is not None:
                    self.card.open(file)
            return file

    @contextmanager
    def writing(self, file: InputFile) -> Iterator[int]:
        """A descriptor to write to the file with. Afterwards it is what it is then; nothing may read it meanwhile.

        Raises:
            StoreError: it cannot be opened, or was changed since it was opened to be read, or what the block does to it
            fails.
        """
        try:
            descriptor = os.open(file.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                with self._changed:
                    current = self._files.get(file.path)
                    if current is None or current.number != file.number or not _is_there(current):
                        raise StoreError(f"{file.path}: changed since it was opened; open it anew to write to it")
                try:
                    yield descriptor
                finally:
                    self.refresh(file)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(f"{file.path}: writing failed: {error.strerror}") from None

    def refresh(self, file: InputFile) -> None:
        """Takes the file as it is now: it was written to. What was read of it is read again.

        Raises:
            StoreError: it is shorter than it was.
        """
        with self._changed:
            self._files[file.path] = _input_file(file.path, ops.reader_refresh_file(self.reader, file.number))
            if self.card is not None:
                self.card.refresh(file)
            self._forget(file)

    def _forget(self, file: InputFile) -> None:
        for unit in self._units.values():
            if unit.memory is not None and any(each.file.number == file.number for each in unit.ranges):
                if unit.users == 0:
                    self._release(unit)
                else:
                    unit.stale = True
        for layout, _ in list(self._small.values()):
            if any(leaf.file.number == file.number for leaf in layout.leaves):
                self._drop_small(layout.key)

    def close(self) -> None:
        """Waits for what is being read, and lets go of the files. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- what is used ------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, layout: Layout, *, routed: bool = False) -> Iterator[Tensor]:
        """The layout's elements, of its dtype, in memory until the end of the block. At most `piece_bytes` of them.

        With a card they are on it, for what is issued to the current stream inside of the block.

        routed: used when something calls for it, not once in every pass.

        Raises:
            StoreError: reading failed, or the file was changed.
        """
        with self._using(layout, routed) as unit:
            yield unit.elements()

    @contextmanager
    def use_leaves(self, layout: Layout, *, routed: bool = False) -> Iterator[Iterator[Tensor]]:
        """The same, as it is stored: the elements of each of the layout's leaves."""
        with self._using(layout, routed) as unit:
            yield unit.leaves()

    @contextmanager
    def _using(self, layout: Layout, routed: bool) -> Iterator[Unit]:
        unit = self._begin(layout, routed)
        try:
            if not unit.loaded:
                with baton_passed():
                    self._load(unit)
            with self._in_use(unit):
                yield unit
        finally:
            self._end(unit)

    def _in_use(self, unit: Unit) -> AbstractContextManager:
        return nullcontext() if self.card is None else self.card.in_use(unit)

    def keep(self, layout: Layout) -> Tensor:
        """The elements, in memory from now on: for small tensors that any op may meet. The ones last used, where there
        are more of them than were expected, or than the budget allows."""
        with self._changed:
            found = self._small.pop(layout.key, None)
            if found is not None:
                self._small[layout.key] = found
                return found[1]
        dense = self.load(layout)
        if self.card is not None:
            dense = dense.to(self.card.torch_device)
        with self._changed:
            if layout.key not in self._small:
                self._small[layout.key] = (layout, dense)
                self._small_bytes += byte_count(layout)
            while self._small_bytes > self._small_bytes_max:
                self._drop_small(next(iter(self._small)))
        return dense

    def _drop_small(self, key: tuple) -> None:
        layout, _ = self._small.pop(key)
        self._small_bytes -= byte_count(layout)

    def load(self, layout: Layout) -> Tensor:
        """The elements in host memory of their own, beside the budget: the caller's to keep or to drop."""
        unit = Unit.of(layout)
        wasted = unit.byte_count > 2 * byte_count(layout) + STAGING_BYTES_MIN
        dim, pieces = self.pieces(layout) if wasted else (0, [layout])
        if len(pieces) > 1:
            return torch.cat([self.load(piece) for piece in pieces], dim)
        unit.memory = new_memory(unit.byte_count)
        unit.ticket = self._read_to_host(unit, background=False)
        ops.reader_wait(self.reader, unit.ticket)
        elements = unit.elements()
        lean = elements.untyped_storage().nbytes() <= 2 * (byte_count(layout) + BLOCK_BYTES)
        return elements if lean else elements.contiguous()

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
        if not (isinstance(layout, Region) and _has_whole_rows(layout.meta)):
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
            with baton_passed():
                with self._changed:
                    unit.users = 1
                    unit.kept = unit.byte_count <= _ROWS_BYTES_MAX  # what was read ahead need not go for a few rows
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
        cut = self._pieces.get(layout.key)
        if cut is None:
            if len(self._pieces) >= _UNITS_MAX:
                self._pieces.clear()
            cut = self._pieces[layout.key] = self._find_pieces(layout)
        return cut

    def _find_pieces(self, layout: Layout) -> tuple[int, list[Layout]]:
        if isinstance(layout, Join) and layout.dim == 0 and layout.leaves:
            return 0, [piece for part in layout.parts for piece in self._cut(part, 0)]
        dim = 0
        if isinstance(layout, Region) and layout.meta.dim() > 1:
            steps = layout.meta.stride()
            dim = max(range(len(steps)), key=lambda each: (steps[each] if layout.shape[each] > 1 else -1, -each))
        return dim, self._cut(layout, dim)

    def _cut(self, layout: Layout, dim: int) -> list[Layout]:
        size = layout.shape[dim] if layout.shape else 1
        count = -(-max(byte_count(layout), Unit.of(layout).byte_count - 2 * BLOCK_BYTES) // self.piece_bytes)
        if count <= 1:
            return [layout]
        step = max(size // count, 1)
        pieces = [narrow(layout, dim, begin, min(begin + step, size)) for begin in range(0, size, step)]
        return [layout] if None in pieces else pieces

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
            self._small_bytes_max = max(small_bytes, MIB)
            left = self.memory_budget_bytes - self._staging_bytes - small_bytes
            share = min(max(left, 0) / max(sum(kept_bytes(unit) for unit in self._order), 1), 1.0)
            due = 0.0
            for unit in self._order:
                size = kept_bytes(unit)
                due += share * size
                if due >= size / 2 and size <= left:
                    unit.kept = True
                    due -= size
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
        self._uses = 0
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
            for unit in self._announced:
                if unit.routed and not unit.counted:
                    self._count_use(unit)
                    unit.counted = True
            self._read_ahead()

    # ---- what a pass costs -------------------------------------------------------------------------------------------

    def forecast(self) -> Forecast:
        """What the next pass is expected to read, once what stays has been read."""
        with self._changed:
            dense = sum(unit.byte_count for unit in self._order if not unit.kept and unit.expected)
            return Forecast(dense, max(self._routed_bytes - self._routed_bytes_left, 0))

    def measure_rate(self) -> float:
        """Bytes/s of the drive, reading what is used next anyway: as much as is read ahead."""
        self._finish_ahead()  # into memory that is new to the kernel, which takes its time
        with self._changed:
            for unit in [unit for unit in self._staged.values() if unit.users == 0]:
                self._release(unit)
        begin_s = time.perf_counter()
        byte_count = self._finish_ahead()
        return max(byte_count, 1) / (time.perf_counter() - begin_s)

    def _finish_ahead(self) -> int:
        """Reads as much ahead as memory holds, and returns when it is there: bytes."""
        with self._changed:
            self._read_ahead()
            ahead = [unit for unit in self._order if unit.ticket is not None]
            for unit in ahead:
                unit.users += 1
        try:
            for unit in ahead:
                self._load(unit)
        finally:
            with self._changed:
                for unit in ahead:
                    unit.users -= 1
        return sum(unit.byte_count for unit in ahead)

    # ---- lockstep ----------------------------------------------------------------------------------------------------

    def lockstep(self, tasks: Sequence[Callable[[], _R]]) -> list[_R | BaseException]:
        """Runs the tasks, each in a thread of its own, one computing at a time, so that each weight is read once for
        all of them (FlexGen, 2303.06865, section 4.1: a block of several batches). Their results or errors, in order.

        A weight stays in staging until all have used it; the first waits when staging is full of such. Each must use
        weights in the order of the passes of one model, and begin with the first of a pass.
        """
        return self._lockstep.run(tasks, position=lambda: self._position, leave=self._leave)

    def _leave(self) -> None:
        """A thread uses nothing any more: the others do not keep anything for it."""
        with self._changed:
            self._release_used()
            self._read_ahead()
            self._changed.notify_all()

    def _keep_pace(self, unit: Unit) -> bool:
        """Whether this use of the unit moves the order on: not that of a thread that follows others in lockstep."""
        unit.step = max(unit.step, self._lockstep.advance(unit.index, len(self._order)))
        return self._lockstep.pace() is None or self._lockstep.leads()

    def _is_held(self, unit: Unit) -> bool:
        """Whether a thread in lockstep is still to use what others have used."""
        return self._lockstep.is_behind(unit.step)

    def _release_used(self) -> None:
        """What all threads in lockstep have used."""
        for unit in list(self._staged.values()):
            if unit.step >= 0:
                self._release_unused(unit)

    # ---- units -------------------------------------------------------------------------------------------------------

    def _unit(self, layout: Layout, *, routed: bool = False) -> Unit:
        unit = self._units.get(layout.key)
        if unit is None:
            if len(self._units) >= _UNITS_MAX:
                self._forget_old()
            unit = self._units[layout.key] = Unit.of(layout)
            unit.routed = routed
        return unit

    def _begin(self, layout: Layout, routed: bool) -> Unit:
        with self._changed:
            unit = self._unit(layout, routed=routed)
            self._check_size(unit)
            if unit.routed:
                if not unit.counted:
                    self._count_use(unit)
                unit.counted = False
            elif self._keep_pace(unit):
                self._advance(unit)
            unit.users += 1
            self._used_bytes += byte_count(layout)
            return unit

    def _end(self, unit: Unit) -> None:
        with self._changed:
            unit.users -= 1
            self._release_unused(unit)
            if self._lockstep:
                self._release_used()
            self._read_ahead()
            self._changed.notify_all()

    def _release_unused(self, unit: Unit) -> None:
        if unit.users > 0 or unit.memory is None:
            return
        if unit.stale or not (unit.kept or self._is_held(unit)):
            self._release(unit)

    def _load(self, unit: Unit) -> None:
        """Returns when its elements are in its memory."""
        retried = False
        while True:
            with self._changed:
                while unit.awaited:  # by another thread
                    self._lockstep.wait()
                if unit.loaded:
                    return
                unit.awaited = True  # from here on: who waits for room lets go of the lock
                try:
                    if unit.memory is None:
                        self._make_room(unit)
                    ahead = unit.ticket is not None
                    if not ahead:
                        self._submit(unit, background=False)
                    self._read_ahead()
                except BaseException:
                    unit.awaited = False
                    self._changed.notify_all()
                    raise
            try:
                self._await(unit)
            except BaseException as error:
                with self._changed:
                    unit.awaited = False
                    unit.ticket = None
                    self._changed.notify_all()
                if isinstance(error, StoreError) and ahead and not retried:
                    retried = True  # what went wrong then may be over now
                    continue
                raise
            with self._changed:
                unit.awaited = False
                unit.ticket = None
                unit.loaded = True
                self._changed.notify_all()

    def _submit(self, unit: Unit, *, background: bool) -> None:
        read = self._read_to_host if self.card is None else self.card.read
        unit.ticket = read(unit, background=background)

    def _await(self, unit: Unit) -> None:
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
        self._check_size(unit)
        # Another thread may read it meanwhile, ahead or because it uses it too.
        while unit.memory is None and not self._place(unit):
            waits = self._lockstep.waits_for_others()
            idle = [each for each in self._staged.values() if each.users == 0 and not (waits and self._is_held(each))]
            if idle:
                self._release(max(idle, key=self._distance))
            else:
                self._lockstep.wait()

    def _check_size(self, unit: Unit) -> None:
        if not unit.kept and unit.byte_count > self._staging.byte_count:
            raise MemoryBudgetError(
                f"{unit.byte_count} bytes are wanted at once, staging has {self._staging.byte_count}; raise "
                f"memory_budget"
            )

    def _distance(self, unit: Unit) -> int:
        """Units until this thread uses it."""
        if unit.index is None:
            return 0  # announced
        pace = self._lockstep.pace()
        return (unit.index - (self._position if pace is None else pace.position)) % len(self._order)

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
        unit.view = None
        unit.ticket = None
        unit.loaded = False
        unit.step = -1
        unit.stale = False

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
            if least is None or least.use_count >= unit.use_count or kept_bytes(least) + self._routed_bytes_left < size:
                return
            self._release(least)
            least.kept = False
            self._routed_bytes_left += kept_bytes(least)
        unit.kept = True
        self._routed_bytes_left -= size

    # ---- the order ---------------------------------------------------------------------------------------------------

    def _advance(self, unit: Unit) -> None:
        """The unit is used now: goes on to it in the order, which learns from it."""
        self._uses += 1
        unit.last_use = self._uses
        unit.expected = True
        if unit.index is None:
            self._insert(unit)
            return
        count = len(self._order)
        distance = (unit.index - self._position) % count
        # Else it rather comes earlier now than that all of a pass is skipped.
        near = distance <= max(_SKIPPED_MAX, count // 2)
        gone = True
        for step in range(1, distance):
            skipped = self._order[(self._position + step) % count]
            unused = self._uses - skipped.last_use > count
            gone = gone and unused
            if near or unused:
                skipped.expected = False
                if skipped.users == 0 and not self._is_held(skipped) and id(skipped) in self._staged:
                    self._release(skipped)
        if gone:
            self._position = unit.index
            return
        # What it came before is used after it, if at all.
        del self._order[unit.index]
        if unit.index <= self._position:
            self._position -= 1
        self._insert(unit, moved_from=unit.index)

    def _insert(self, unit: Unit, *, moved_from: int | None = None) -> None:
        self._position += 1
        self._order.insert(self._position, unit)
        begin = self._position if moved_from is None else min(self._position, moved_from)
        for index in range(begin, len(self._order)):
            self._order[index].index = index

    def _forget_old(self) -> None:
        """Units that were not used for long, of tensors that may not be there any more."""
        long_ago = self._uses - _UNITS_MAX // 4
        for key, unit in list(self._units.items()):
            if unit.users == 0 and not unit.kept and unit.last_use < long_ago and unit.use_count < 1:
                if unit.memory is not None:
                    self._release(unit)
                del self._units[key]
                unit.forgotten = True
        current = self._order[self._position] if self._order else None
        self._order = [unit for unit in self._order if not unit.forgotten]
        for index, unit in enumerate(self._order):
            unit.index = index
        self._position = -1 if current is None or current.forgotten else current.index
        self._pieces.clear()

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

    def stats(self) -> dict:
        """What was read and what is in memory: `ops.reader_stats`, and bytes of memory by use."""
        with self._changed:
            mine = {
                "staging_bytes": self._staging_bytes,
                "staged_bytes": self._staging.byte_count - self._staging.free_bytes,
                "resident_bytes": self._kept_bytes + self._small_bytes,
                "used_bytes": self._used_bytes,
                "memory_budget_bytes": self.memory_budget_bytes,
            }
        if self.card is not None:
            mine |= self.card.stats()
        return ops.reader_stats(self.reader) | mine


def _has_whole_rows(meta: Tensor) -> bool:
    """Whether each row of the first dimension is adjacent elements, that no other row has."""
    return meta[0].is_contiguous() and meta.stride(0) >= meta[0].numel()


def _input_file(path: str, file: ops.InputFile) -> InputFile:
    return InputFile(path, file.number, file.size_bytes, file.mtime_ns, file.device, file.inode)


def _is_there(file: InputFile) -> bool:
    """Whether its path still leads to it, as it was."""
    try:
        info = os.stat(file.path)
    except OSError:
        return False
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns) == (
        file.device,
        file.inode,
        file.byte_count,
        file.mtime_ns,
    )


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child, where a thread that had one is not there any more. Reading raises there."""
    for stream in _streams:
        stream._changed = threading.Condition()
        stream._lockstep = Lockstep(stream._changed)
        if stream.card is not None:
            stream.card.renew_locks()


os.register_at_fork(after_in_child=_renew_locks)


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
