"""Weights on a card: device memory that they are brought to ahead of their use, and two ways there.

The one way: the reader of files fills pieces of pinned host memory, and a stream of its own copies each to the card.
The other, where GPUDirect Storage is active: straight from the drive. `torch_csd.weights.stream` says what is read
next. Nothing here has a thread: what has come is noticed, and goes on, whenever that stream is used.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import torch_csd.cuda
from torch_csd import ops
from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.cuda.device import Device, Event
from torch_csd.cuda.transfer import Completion, ForeignFile, Request, Slab
from torch_csd.errors import MemoryBudgetError, StoreClosedError, StoreError
from torch_csd.weights.layout import InputFile, Range
from torch_csd.weights.staging import Staging

if TYPE_CHECKING:
    from torch_csd.cuda.gds import GdsTransfer
    from torch_csd.weights.unit import Unit


def open_weight_card(device: torch.device, *, staging_bytes: int, directory: str, gpu_io: str) -> WeightCard:
    """Memory on a card for weights, most of which are in files of ``directory``.

    Raises:
        GpuUnavailableError: there is no such card, or a package is missing, or ``gpu_io="gds"`` and GPUDirect Storage
        is not active. MemoryBudgetError: the card has no memory for staging.
    """
    card = torch_csd.cuda.open_device(device)
    transfer, reason = torch_csd.cuda.choose_direct(card, directory, gpu_io)
    try:
        return WeightCard(card, staging_bytes=staging_bytes, transfer=transfer, reason=reason)
    except BaseException:
        if transfer is not None:
            transfer.close()
        raise


@dataclass(eq=False)
class Reading:
    """A unit on its way to the card."""

    ranges: tuple[Range, ...]
    places: tuple[int, ...]  # of the ranges' covering blocks in the unit
    byte_count: int  # of these blocks
    target: Tensor  # uint8, on the device
    after: list[Event]  # on the device: what still uses the target, or writes to it
    way: Pinned | Direct
    done: bool = False  # the device has it after `ready`, or it has failed
    ready: Event | None = None
    error: BaseException | None = None
    dropped: bool = False  # nobody wants it any more
    # By pinned memory:
    host: Tensor | None = None  # its piece of it
    ticket: int | None = None  # the reader's
    awaited: bool = False  # a thread waits for the ticket
    # Directly:
    requests_left: int = 0

    def finish(self, *, ready: Event | None = None, error: BaseException | None = None) -> None:
        self.done, self.ready, self.error = True, ready, error


class WeightCard:
    """Staging on the device and in pinned memory, and what moves bytes there. Thread-safe.

    The ring, like its base class, is the caller's to lock.
    """

    def __init__(self, device: Device, *, staging_bytes: int, transfer: GdsTransfer | None, reason: str) -> None:
        """
        Args:
            staging_bytes: on the device; of pinned memory as much, or half where most weights do not pass through it.
            transfer: for files that it can open; this object's from now on. None: all go by pinned memory.
            reason: why so, for reports.
        """
        self.torch_device = device.torch_device
        self._device = device
        self._transfer = transfer
        self._reason = reason
        self._files: dict[int, ForeignFile] = {}  # by the reader's number: those that the transfer reads
        self._is_full = False
        with torch.inference_mode(False):  # they outlive the mode that they are made in
            slab = transfer.register(staging_bytes) if transfer else Slab(device.new_memory(staging_bytes), None)
            host_bytes = staging_bytes if transfer is None else staging_bytes // 2 // BLOCK_BYTES * BLOCK_BYTES
            self.ring = Ring(slab.memory)
            self.host = Staging(device.new_pinned_memory(host_bytes))
        self._pinned = Pinned(device, self.host)
        self._direct = None if transfer is None else Direct(device, transfer, slab, self._files)

    @property
    def byte_count(self) -> int:
        """Of both kinds of staging."""
        return self.ring.byte_count + self.host.byte_count

    def start(self, reader: Tensor) -> None:
        """The reader of files, before the first is opened."""
        self._pinned.reader = reader

    def open(self, file: InputFile) -> None:
        """The reader has this file. Where it can be read directly, it is from now on."""
        if self._transfer is None:
            return
        try:
            opened = self._transfer.open(os.path.realpath(file.path))
        except StoreError as error:  # though it works for files beside it: not silently
            warnings.warn(f"{file.path}: going by pinned memory: {error}", stacklevel=3)
            return
        if opened.version == (file.byte_count, file.mtime_ns, file.device, file.inode):
            self._files[file.number] = opened  # else the reader says what became of it

    def refresh(self, file: InputFile) -> None:
        """The file was written to, and is taken as it is now."""
        if file.number in self._files:
            self._files[file.number].refresh()

    def new_memory(self, byte_count: int) -> Tensor | None:
        """Device memory for what stays. None: the card has none left, which is told once."""
        if self._is_full:
            return None
        try:
            with torch.inference_mode(False):
                return self._device.new_memory(byte_count)
        except MemoryBudgetError as error:
            self._is_full = True
            warnings.warn(f"fewer weights than memory_budget allows stay on the card: {error}", stacklevel=2)
            return None

    # ---- units ---------------------------------------------------------------------------------------------------

    def read(self, unit: Unit, *, background: bool) -> Reading:
        """Begins to bring a unit to its memory; returns at once. background: behind what others wait for."""
        direct = self._direct is not None and all(each.file.number in self._files for each in unit.ranges)
        way = self._direct if direct else self._pinned
        reading = Reading(
            unit.ranges, unit.places, unit.byte_count, unit.memory, self.ring.users(unit.memory), way
        )  # fmt: skip
        if unit.byte_count == 0:
            reading.finish()
        else:
            way.begin(reading, background=background)
        return reading

    def wait(self, unit: Unit, reading: Reading) -> None:
        """Returns when the host has nothing left to do for it: `in_use` makes the device wait for the rest.

        Raises:
            StoreError: reading failed, or a file was changed. RuntimeError: the device has failed.
        """
        if not reading.done:
            reading.way.wait(reading)
        if reading.error is not None:
            raise reading.error
        unit.ready = reading.ready

    def drop(self, reading: Reading) -> None:
        """Nobody wants it: no memory of it is written to afterwards, but for a copy that the device has already."""
        reading.way.drop(reading)
        if reading.ready is not None:
            self.ring.mark(reading.target, reading.ready)

    @contextmanager
    def in_use(self, unit: Unit) -> Iterator[None]:
        """What is issued to the current stream inside sees the unit, and its memory is not reused before that is
        done."""
        self._pinned.pump()  # so that the next are copied while this is computed with
        if self._direct is not None:
            self._direct.pump()
        if unit.ready is not None:
            self._device.current_stream().wait_event(unit.ready)
        memory = unit.memory
        try:
            yield
        finally:
            self.ring.mark(memory, self._device.current_stream().record_event())

    @contextmanager
    def in_host_memory(self, unit: Unit) -> Iterator[None]:
        """The unit, read now, in pinned memory until the end of the block: for what the host picks rows from."""
        unit.memory = self._pinned.take(unit.byte_count)
        ticket = None
        try:
            ticket = _begin_read(self._pinned.reader, unit.ranges, unit.places, unit.memory, background=False)
            ops.reader_wait(self._pinned.reader, ticket)
            yield
        finally:
            if ticket is not None:
                ops.reader_drop(self._pinned.reader, ticket)  # forgotten already, unless waiting was interrupted
            self._pinned.give_back(unit.memory)
            unit.memory = None

    # ---- the rest ------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | str]:
        return {
            "gpu": self._device.name,
            "gpu_io": "pinned" if self._direct is None else "gds",
            "gpu_reason": self._reason,
            "gpu_copied_bytes": self._pinned.copied_bytes,
            "gpu_direct_bytes": 0 if self._transfer is None else self._transfer.read_bytes,
            "pinned_bytes": self.host.byte_count,
        }

    def renew_locks(self) -> None:
        """In a forked child, where a thread that had one is not there any more. Reading raises there."""
        self.ring.renew_locks()
        self._pinned.renew_locks()
        if self._direct is not None:
            self._direct.renew_locks()

    def close(self) -> None:
        """Waits for what is under way. Before the reader is closed. Idempotent."""
        try:
            self._pinned.close()
        finally:
            if self._direct is not None:
                self._direct.close()


class _Mark(NamedTuple):
    begin: int  # addresses
    end: int
    event: Event
    memory: Tensor  # kept alive until then


class Ring(Staging):
    """Staging on the device. A piece that is given back may still be used there: `users` says by what."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__(memory)
        self._marks: deque[_Mark] = deque()
        self._lock = threading.Lock()  # of the marks

    def renew_locks(self) -> None:
        self._lock = threading.Lock()

    def take(self, byte_count: int) -> Tensor | None:
        with torch.inference_mode(False):
            return super().take(byte_count)

    def mark(self, memory: Tensor, event: Event) -> None:
        """The memory, of the ring or not, is used by what is issued before the event."""
        begin = memory.data_ptr()
        with self._lock:
            while self._marks and _has_passed(self._marks[0].event):
                self._marks.popleft()
            self._marks.append(_Mark(begin, begin + memory.numel(), event, memory))

    def users(self, memory: Tensor) -> list[Event]:
        """What must pass before the memory is written to."""
        begin = memory.data_ptr()
        end = begin + memory.numel()
        with self._lock:
            return [
                mark.event
                for mark in self._marks
                if mark.begin < end and begin < mark.end and not _has_passed(mark.event)
            ]


def _closed_error() -> StoreClosedError:
    return StoreClosedError("the files of these weights are closed; load them again")


def _has_passed(event: Event) -> bool:
    try:
        return event.query()
    except RuntimeError:  # the device has failed: whoever computes on it is told, and nothing may wait for it
        return True


def _begin_read(
    reader: Tensor, ranges: tuple[Range, ...], places: tuple[int, ...], memory: Tensor, *, background: bool
) -> int:
    return ops.reader_read(
        reader,
        files=[each.file.number for each in ranges],
        offsets=[each.offset for each in ranges],
        byte_counts=[each.byte_count for each in ranges],
        memory=memory,
        memory_offsets=list(places),
        background=background,
    )


# ---- by pinned memory --------------------------------------------------------------------------------------------


class Pinned:
    """Readings by way of pinned memory: queued for a piece of it, read, copied. Thread-safe.

    A piece goes back when its copy is done, so what may have to be waited for is the drive and copies, no more.
    """

    reader: Tensor

    def __init__(self, device: Device, host: Staging) -> None:
        self.copied_bytes = 0
        self._device = device
        self._host = host
        self._copies = device.new_stream()
        self._changed = threading.Condition()  # of all below
        self._queued: deque[Reading] = deque()
        self._reading: list[Reading] = []  # in the order asked for
        self._copying: deque[tuple[Event, Tensor]] = deque()  # pieces, in the order of their stream
        self._is_closed = False

    def renew_locks(self) -> None:
        self._changed = threading.Condition()

    def begin(self, reading: Reading, *, background: bool) -> None:
        if reading.byte_count > self._host.byte_count:
            reading.finish(error=self._too_large(reading.byte_count))
            return
        with self._changed:
            if background:
                self._queued.append(reading)
            else:
                self._queued.appendleft(reading)
            self._pump()

    def wait(self, reading: Reading) -> None:
        """Until it is done."""
        with self._changed:
            if reading in self._queued:
                self._queued.remove(reading)
                self._queued.appendleft(reading)
            self._pump()
            while not reading.done:
                self._wait_for(reading)
                self._pump()

    def drop(self, reading: Reading) -> None:
        with self._changed:
            reading.dropped = True
            if reading in self._queued:
                self._queued.remove(reading)
            elif reading in self._reading and not reading.awaited:  # else whoever waits takes note
                self._reading.remove(reading)
                ops.reader_drop(self.reader, reading.ticket)
                self._give_back(reading.host)
            self._changed.notify_all()

    def take(self, byte_count: int) -> Tensor:
        """A piece of the pinned memory, for the host alone. Waits for one."""
        if byte_count > self._host.byte_count:
            raise self._too_large(byte_count)
        with self._changed:
            while True:
                self._take_note()
                with torch.inference_mode(False):
                    piece = self._host.take(byte_count)
                if piece is not None:
                    return piece
                self._wait_for(None)

    def give_back(self, piece: Tensor) -> None:
        with self._changed:
            self._give_back(piece)
            self._pump()

    def pump(self) -> None:
        with self._changed:
            self._pump()

    def close(self) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            for reading in [*self._queued, *(each for each in self._reading if not each.awaited)]:
                if reading.ticket is not None:
                    ops.reader_drop(self.reader, reading.ticket)
                reading.dropped = True
            self._queued.clear()
            self._changed.notify_all()
        try:
            self._copies.synchronize()
        except RuntimeError:
            pass  # the device has failed: no copy is under way

    def _too_large(self, byte_count: int) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"{byte_count} bytes are wanted at once, pinned memory has {self._host.byte_count}; raise memory_budget"
        )

    # ---- called with the lock held -------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Takes every reading as far as it gets without waiting. What goes wrong is the reading's error."""
        self._take_note()
        while self._queued and not self._is_closed:
            with torch.inference_mode(False):
                piece = self._host.take(self._queued[0].byte_count)
            if piece is None:
                return
            reading = self._queued.popleft()
            try:
                # In the background all of them: the order is that of the queue, and who waits changes it.
                reading.ticket = _begin_read(self.reader, reading.ranges, reading.places, piece, background=True)
            except Exception as error:
                self._give_back(piece)
                reading.finish(error=error)
            else:
                reading.host = piece
                self._reading.append(reading)

    def _take_note(self) -> None:
        """Of copies that are done, and of what has been read."""
        while self._copying and _has_passed(self._copying[0][0]):
            self._give_back(self._copying.popleft()[1])
        for reading in [each for each in self._reading if not each.awaited]:
            try:
                if not ops.reader_is_done(self.reader, reading.ticket):
                    break  # nor are those behind it
                ops.reader_wait(self.reader, reading.ticket)
            except Exception as error:
                self._read(reading, error)
            else:
                self._read(reading)

    def _read(self, reading: Reading, error: BaseException | None = None) -> None:
        """Its bytes are in host memory, or will not be."""
        self._reading.remove(reading)
        if error is not None or reading.dropped:
            ops.reader_drop(self.reader, reading.ticket)  # forgotten already, unless waiting was interrupted
            self._give_back(reading.host)
            reading.finish(error=error)
            return
        try:
            with torch.inference_mode(False), torch.no_grad(), self._device.use(self._copies):
                for event in reading.after:
                    self._copies.wait_event(event)
                count = reading.byte_count
                reading.target[:count].copy_(reading.host[:count], non_blocking=True)
            ready = self._copies.record_event()
        except Exception as refused:
            self._give_back(reading.host)
            reading.finish(error=refused)
            return
        self._copying.append((ready, reading.host))
        self.copied_bytes += reading.byte_count
        reading.finish(ready=ready)

    def _wait_for(self, reading: Reading | None) -> None:
        """Until something happened that lets a reading go on: this one, if the drive has it; without the lock."""
        if self._is_closed:
            raise _closed_error()
        if reading is None or reading.ticket is None or reading.done:
            reading = next((each for each in self._reading if not each.awaited), None)
            if self._copying:  # nearer to its end than what is read
                event, _ = self._copying[0]
                self._changed.release()
                try:
                    event.synchronize()
                except RuntimeError:
                    pass  # taken note of as passed
                finally:
                    self._changed.acquire()
                return
        if reading is None or reading.awaited:
            self._changed.wait()
            return
        reading.awaited = True
        error: BaseException | None = None
        self._changed.release()
        try:
            ops.reader_wait(self.reader, reading.ticket)
        except BaseException as raised:
            error = raised
        finally:
            self._changed.acquire()
            reading.awaited = False
        self._read(reading, error)
        self._changed.notify_all()
        if error is not None and not isinstance(error, Exception):
            raise error  # KeyboardInterrupt

    def _give_back(self, piece: Tensor) -> None:
        self._host.give_back(piece)
        self._changed.notify_all()


# ---- directly ----------------------------------------------------------------------------------------------------


class Direct:
    """Readings by GPUDirect Storage, the covering blocks of each range as a request. Thread-safe."""

    def __init__(self, device: Device, transfer: GdsTransfer, ring: Slab, files: dict[int, ForeignFile]) -> None:
        self._transfer = transfer
        self._ring = ring
        self._files = files
        self._fences = device.new_stream()  # does nothing but wait: a request waits for one event only
        self._lock = threading.Lock()  # of all below, and of the transfer
        self._queued: deque[Request] = deque()
        self._under_way: list[Reading] = []
        self._is_closed = False

    def renew_locks(self) -> None:
        self._lock = threading.Lock()

    def begin(self, reading: Reading, *, background: bool) -> None:
        with self._lock:
            if self._is_closed:
                reading.finish(error=_closed_error())
                return
            try:
                requests = self._requests(reading)
            except RuntimeError as error:  # the device has failed
                reading.finish(error=error)
                return
            reading.requests_left = len(requests)
            self._under_way.append(reading)
            if background:
                self._queued.extend(requests)
            else:
                self._queued.extendleft(reversed(requests))
            self._pump()

    def wait(self, reading: Reading) -> None:
        with self._lock:
            mine = [each for each in self._queued if each.tag is reading]
            self._queued = deque([*mine, *(each for each in self._queued if each.tag is not reading)])
            self._drain(reading)

    def drop(self, reading: Reading) -> None:
        """What has begun is waited for."""
        with self._lock:
            left = [each for each in self._queued if each.tag is not reading]
            reading.requests_left -= len(self._queued) - len(left)
            self._queued = deque(left)
            if reading.requests_left == 0:
                self._finish(reading)
            self._drain(reading)

    def pump(self) -> None:
        with self._lock:
            self._pump()

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queued.clear()
            self._transfer.close()
            for reading in self._under_way:
                reading.finish(error=_closed_error())
            self._under_way.clear()

    # ---- called with the lock held -------------------------------------------------------------------------------

    def _requests(self, reading: Reading) -> list[Request]:
        after = None
        if reading.after:
            for event in reading.after:
                self._fences.wait_event(event)
            after = self._fences.record_event()
        slab, begin = Slab(reading.target, None), 0  # what stays has memory of its own
        if _is_part(reading.target, self._ring.memory):
            slab, begin = self._ring, reading.target.data_ptr() - self._ring.memory.data_ptr()
        requests = []
        for each, place in zip(reading.ranges, reading.places, strict=True):
            first = each.offset // BLOCK_BYTES * BLOCK_BYTES
            last = -(-(each.offset + each.byte_count) // BLOCK_BYTES) * BLOCK_BYTES
            if each.byte_count > 0:
                file = self._files[each.file.number]
                requests.append(Request(False, first, last - first, slab, begin + place, reading, after, file))
        return requests

    def _pump(self) -> None:
        if self._is_closed:
            return
        self._take_note(self._transfer.reap())
        while self._queued and self._transfer.in_flight < self._transfer.depth:
            request = self._queued.popleft()
            try:
                self._transfer.submit(request)
            except (ValueError, StoreError) as error:
                self._take_note([Completion(request, OSError(0, str(error)), None)])

    def _drain(self, reading: Reading) -> None:
        while not reading.done:
            self._pump()
            if not reading.done:
                self._take_note(self._transfer.reap(wait=True))

    def _take_note(self, completions: list[Completion]) -> None:
        for request, error, _ in completions:
            reading: Reading = request.tag
            reading.requests_left -= 1
            if error is None and not request.file.is_as_it_was():
                reading.error = StoreError(f"{request.file.path}: changed while it was in use; load it again")
            elif error is not None:
                why = os.strerror(error.errno) if error.errno else error.args[1]
                reading.error = StoreError(
                    f"{request.file.path}: reading {request.byte_count} bytes at byte {request.file_offset} for the "
                    f"card failed: {why}"
                )
                reading.error.__cause__ = error
            if reading.requests_left == 0:
                self._finish(reading)

    def _finish(self, reading: Reading) -> None:
        reading.done = True
        if reading in self._under_way:
            self._under_way.remove(reading)


def _is_part(memory: Tensor, whole: Tensor) -> bool:
    return 0 <= memory.data_ptr() - whole.data_ptr() < whole.numel()
