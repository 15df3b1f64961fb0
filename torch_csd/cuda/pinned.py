"""Between drive and device by way of pinned host memory: the drive's own I/O engine, and copy streams.

A slab has a mirror of the same size in pinned memory. A read goes into the mirror, then the device copies it from
there; a write the other way round. One stream for each direction: a card has a copy engine for each, and what a read
must wait for on the device must not hold back writes.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from torch_csd import ops
from torch_csd.cuda.device import Device, Event, Stream
from torch_csd.cuda.transfer import Completion, OpenFile, Request, Slab, closed_error, io_error
from torch_csd.errors import StoreClosedError, StoreError

PIECE_BYTES = 4 << 20  # of a larger request at once: while the drive reads one piece, the device copies another


@dataclass(eq=False)
class _Flight:
    """A request that was submitted."""

    request: Request
    pieces_left: int
    error: OSError | None = None
    ready: Event | None = None  # of a read: after its last copy so far
    waited_for: bool = False  # the copy stream knows of request.after


@dataclass(eq=False)
class _Piece:
    """A part of a request, and of its slab's mirror."""

    flight: _Flight
    begin: int  # in the request, bytes
    end: int
    copied: Event | None = None  # of a write: after its copy into the mirror

    @property
    def slab(self) -> Slab:
        return self.flight.request.slab

    @property
    def place(self) -> slice:
        """In the slab and in its mirror."""
        offset = self.flight.request.slab_offset
        return slice(offset + self.begin, offset + self.end)

    def overlaps(self, slab: Slab, place: slice) -> bool:
        own = self.place
        return slab is self.slab and own.start < place.stop and place.start < own.stop


@dataclass(eq=False)
class _Copy:
    """A copy out of the mirror that may still be under way, after its request's completion too."""

    slab: Slab
    place: slice
    done: Event


class PinnedTransfer:
    """A `Transfer`. It works in `submit` and `reap`: between them the drive and the device go on with what they have.

    drive: its handle. depth: requests in flight, and pieces that the drive's engine has at once.
    """

    name = "pinned"

    def __init__(self, device: Device, drive: Tensor, *, depth: int = 32) -> None:
        self.depth = depth
        self.read_bytes = 0
        self.written_bytes = 0
        self._process = os.getpid()
        self._device = device
        self._file = OpenFile(ops.file_path(drive))
        self._queue: Tensor | None = ops.io_open(drive, depth=depth)
        self._to_device = device.new_stream()
        self._to_host = device.new_stream()
        self._slabs: list[Slab] = []
        self._flights: set[_Flight] = set()  # submitted, not done
        self._done: list[Completion] = []  # not reaped
        # A piece of a read: waiting, moving, gone. Of a write: waiting, copying, copied, moving, gone.
        self._waiting: deque[_Piece] = deque()
        self._copying: deque[_Piece] = deque()  # in the order of their stream
        self._copied: deque[_Piece] = deque()
        self._moving: dict[int, _Piece] = {}  # by tag: the drive's engine has them
        self._tags = itertools.count()
        self._copies: deque[_Copy] = deque()  # in the order of their stream

    # ---- the contract --------------------------------------------------------------------------------------------

    def register(self, byte_count: int) -> Slab:
        """Raises StoreClosedError, and what the device raises where memory is short."""
        self._check_open()
        slab = Slab(self._device.new_memory(byte_count), self._device.new_pinned_memory(byte_count))
        self._slabs.append(slab)
        return slab

    def submit(self, request: Request) -> None:
        self._check_open()
        if self.in_flight >= self.depth:
            raise RuntimeError(f"more than the depth of {self.depth} requests in flight; reap first")
        if request.file is not None:
            raise ValueError(f"{request.file.path}: this transfer serves one drive's file only")
        self._file.check(request)
        begins = range(0, request.byte_count, PIECE_BYTES)
        flight = _Flight(request, len(begins))
        self._flights.add(flight)
        self._waiting.extend(_Piece(flight, begin, min(begin + PIECE_BYTES, request.byte_count)) for begin in begins)
        try:
            self._pump()
        except BaseException:  # the drive is closed, or the device has failed
            self._flights.discard(flight)
            self._waiting = deque(piece for piece in self._waiting if piece.flight is not flight)
            raise

    def reap(self, *, wait: bool = False) -> list[Completion]:
        self._check_open()
        self._pump()
        while wait and not self._done and self._flights:
            self._wait()
            self._pump()
        done, self._done = self._done, []
        return done

    @property
    def in_flight(self) -> int:
        return len(self._flights) + len(self._done)

    def drain(self) -> list[Completion]:
        done = []
        while self.in_flight:
            done += self.reap(wait=True)
        self._to_device.synchronize()
        self._copies.clear()
        return done

    def close(self) -> None:
        if self._queue is None or os.getpid() != self._process:
            return
        try:
            self.drain()
        except StoreClosedError:
            # The drive went first, and drained its queue: only the copies are left.
            self._to_host.synchronize()
            self._to_device.synchronize()
        finally:
            ops.io_close(self._queue)
            self._queue = None
            for each in (self._flights, self._done, self._waiting, self._copying, self._copied, self._moving):
                each.clear()
            self._copies.clear()
            self._slabs.clear()

    # ---- pieces on their way -------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Takes every piece as far as it gets without waiting."""
        if self._moving:
            self._take(ops.io_reap(self._queue))
        while self._copies and self._copies[0].done.query():
            self._copies.popleft()
        while self._copying and self._copying[0].copied.query():
            self._copied.append(self._copying.popleft())
        while self._copied and self._has_room():
            self._move(self._copied[0])
            self._copied.popleft()
        while self._waiting:
            piece = self._waiting[0]
            if piece.flight.error is not None:
                self._finish(piece)
            elif self._mirror_is_used(piece):
                break
            elif piece.flight.request.write:
                self._copy_to_host(piece)
            elif self._has_room():
                self._move(piece)
            else:
                break
            self._waiting.popleft()

    def _wait(self) -> None:
        """Until something happened that lets a piece go on. The drive first: it answers whatever the device does."""
        if self._moving:
            self._take(ops.io_reap(self._queue, wait=True))
        elif self._copying:
            self._copying[0].copied.synchronize()
        else:
            self._copies[0].done.synchronize()

    def _has_room(self) -> bool:
        return len(self._moving) < self.depth

    def _mirror_is_used(self, piece: _Piece) -> bool:
        """Whether the mirror's part is still read from, or written to, by what was submitted before."""
        place = piece.place
        before = itertools.chain(self._moving.values(), self._copying, self._copied)
        return any(other.overlaps(piece.slab, place) for other in before) or any(
            piece.overlaps(copy.slab, copy.place) for copy in self._copies
        )

    def _move(self, piece: _Piece) -> None:
        """Gives a piece to the drive's engine."""
        request = piece.flight.request
        tag = next(self._tags)
        try:
            ops.io_submit(
                self._queue,
                write=request.write,
                file_offset=request.file_offset + piece.begin,
                memory=request.slab.host,
                offset=piece.place.start,
                byte_count=piece.end - piece.begin,
                tag=tag,
            )
        except StoreClosedError:
            raise
        except (ValueError, StoreError) as error:  # the file has shrunk, or may only be read
            self._finish(piece, io_error(request, errno.EIO, str(error)))
        else:
            self._moving[tag] = piece

    def _take(self, completions: list[tuple[int, int]]) -> None:
        """What the drive's engine is done with."""
        for tag, code in completions:
            piece = self._moving.pop(tag)
            request = piece.flight.request
            if code != 0:
                # The range was there when the request was submitted, so that the engine's end of file is an EIO too.
                self._finish(piece, io_error(request, code))
            elif request.write or piece.flight.error is not None:
                self._finish(piece)
            else:
                self._copy_to_device(piece)
                self._finish(piece)

    def _copy_to_host(self, piece: _Piece) -> None:
        self._wait_on_device(self._to_host, piece.flight)
        slab, place = piece.slab, piece.place
        with self._device.use(self._to_host):
            slab.host[place].copy_(slab.memory[place], non_blocking=True)
        piece.copied = self._to_host.record_event()
        self._copying.append(piece)

    def _copy_to_device(self, piece: _Piece) -> None:
        self._wait_on_device(self._to_device, piece.flight)
        slab, place = piece.slab, piece.place
        with self._device.use(self._to_device):
            slab.memory[place].copy_(slab.host[place], non_blocking=True)
        done = self._to_device.record_event()
        piece.flight.ready = done
        self._copies.append(_Copy(slab, place, done))

    @staticmethod
    def _wait_on_device(stream: Stream, flight: _Flight) -> None:
        if flight.request.after is not None and not flight.waited_for:
            stream.wait_event(flight.request.after)
            flight.waited_for = True

    def _finish(self, piece: _Piece, error: OSError | None = None) -> None:
        flight = piece.flight
        flight.error = flight.error or error
        flight.pieces_left -= 1
        if flight.pieces_left > 0:
            return
        request = flight.request
        if flight.error is None and request.write:
            self.written_bytes += request.byte_count
        elif flight.error is None:
            self.read_bytes += request.byte_count
        self._flights.remove(flight)
        self._done.append(Completion(request, flight.error, flight.ready))

    def _check_open(self) -> None:
        if self._queue is None or os.getpid() != self._process:
            raise closed_error()
