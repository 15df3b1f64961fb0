"""Between drive and device directly: kvikio over cuFile, GPUDirect Storage.

Made only where `probe` has seen it work: without a driver kvikio may hang for ever, and without GPUDirect Storage its
compat mode is slower than `pinned`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.cuda.device import Device
from torch_csd.cuda.transfer import (
    Completion,
    ForeignFile,
    OpenFile,
    Request,
    Slab,
    closed_error,
    end_of_file_error,
    io_error,
)
from torch_csd.errors import StoreError

_CODES = {os.strerror(code): code for code in sorted(errno.errorcode, reverse=True)}
# raw_read loses errno: it takes cuFile's -1 for one, and says this whatever went wrong (kvikio 26.10, file_handle.cpp).
_LOST_ERRNO = os.strerror(errno.EPERM)


def errno_of(text: str) -> int:
    """The errno that a text of kvikio's ends with; EIO where it has none, or one that cannot be believed."""
    ending = re.split(r":\s*(?=[^:]*$)", text.strip())[-1]
    code = _CODES.get(ending, errno.EIO)
    return errno.EIO if ending == _LOST_ERRNO else code


_defaults_lock = threading.Lock()


@contextmanager
def compat_mode_off() -> Iterator[None]:
    """What kvikio opens and registers inside goes through cuFile or fails. (The mode is the process's: others' is put
    back.)"""
    import kvikio
    import kvikio.defaults

    with _defaults_lock, kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF):
        yield


def _open(path: str, name: str, flags: str) -> object:
    """kvikio.CuFile. name: for the error."""
    import kvikio

    try:
        with compat_mode_off():
            return kvikio.CuFile(path, flags)
    except RuntimeError as error:
        raise StoreError(f"{name}: kvikio cannot open it for GPUDirect Storage: {error}") from None


@dataclass(eq=False)
class _Flight:
    request: Request
    tasks_left: int
    error: OSError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class GdsTransfer:
    """A `Transfer`. cuFile's calls block, so threads of its own make them, `task_bytes` at a time.

    path: of a drive's file (`ops.file_path`); None: it has no file of its own, only those of `open`. writable: False
    opens it to be read only.

    Raises:
        StoreError: kvikio cannot open the file for GPUDirect Storage.
    """

    name = "gds"

    def __init__(
        self,
        device: Device,
        path: str | None,
        *,
        depth: int = 32,
        threads: int = 8,
        task_bytes: int = 8 << 20,
        writable: bool = True,
    ) -> None:
        if task_bytes < BLOCK_BYTES or task_bytes % BLOCK_BYTES:
            raise ValueError(f"task_bytes must be a multiple of {BLOCK_BYTES}, got {task_bytes}")
        import kvikio.buffer

        self.depth = depth
        self.read_bytes = 0
        self.written_bytes = 0
        self._process = os.getpid()
        self._buffer = kvikio.buffer
        self._device = device
        self._task_bytes = task_bytes
        self._own = None if path is None else OpenFile(path)
        self._files: dict[OpenFile, object] = {}  # kvikio.CuFile of each
        if self._own is not None:
            self._files[self._own] = _open(path, path, "r+" if writable else "r")
        self._pool = ThreadPoolExecutor(threads, "torch_csd-gds", self._enter_thread)
        self._slabs: list[tuple[Slab, bool]] = []  # with whether cuFile knows them
        self._in_flight = 0
        self._done: list[Completion] = []  # not reaped
        self._arrived = threading.Condition()  # of the three above, and of the counters
        self._closed = False

    def open(self, path: str) -> ForeignFile:
        """A file that others wrote, for requests that read of it. It stays open until this is closed.

        Raises:
            StoreError: it cannot be opened, or not for GPUDirect Storage.
        """
        self._check_open()
        try:
            file = ForeignFile(path)
        except OSError as error:
            raise StoreError(f"{path}: opening it failed: {error.strerror}") from None
        try:
            self._files[file] = _open(file.descriptor_path, path, "r")
        except StoreError:
            file.close()
            raise
        return file

    # ---- the contract --------------------------------------------------------------------------------------------

    def register(self, byte_count: int) -> Slab:
        """Raises StoreClosedError, and what the device raises where memory is short."""
        self._check_open()
        slab = Slab(self._device.new_memory(byte_count), None)
        try:
            with compat_mode_off():
                self._buffer.memory_register(slab.memory)
            registered = True
        except RuntimeError as error:  # cuFile then copies through registered memory of its own
            registered = False
            warnings.warn(
                f"cuFile cannot register {byte_count} bytes of the GPU, so I/O is slower: {error}", stacklevel=2
            )
        self._slabs.append((slab, registered))
        return slab

    def submit(self, request: Request) -> None:
        self._check_open()
        if self.in_flight >= self.depth:
            raise RuntimeError(f"more than the depth of {self.depth} requests in flight; reap first")
        file = request.file or self._own
        if file not in self._files:
            raise ValueError("a request must name a file that this transfer has opened")
        file.check(request)
        begins = range(0, request.byte_count, self._task_bytes)
        flight = _Flight(request, len(begins))
        with self._arrived:
            self._in_flight += 1
        for begin in begins:
            self._pool.submit(self._carry_out, flight, begin, min(begin + self._task_bytes, request.byte_count))

    def reap(self, *, wait: bool = False) -> list[Completion]:
        self._check_open()
        with self._arrived:
            if wait and self._in_flight > 0:
                self._arrived.wait_for(lambda: self._done)
            done, self._done = self._done, []
            self._in_flight -= len(done)
        return done

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def drain(self) -> list[Completion]:
        done = []
        while self.in_flight:
            done += self.reap(wait=True)
        return done

    def close(self) -> None:
        if self._closed or os.getpid() != self._process:
            return
        self.drain()
        self._closed = True
        self._pool.shutdown()
        with compat_mode_off():
            for slab, registered in self._slabs:
                if registered:
                    self._buffer.memory_deregister(slab.memory)
        self._slabs.clear()
        for file, cufile in self._files.items():
            cufile.close()
            file.close()
        self._files.clear()

    # ---- in the threads ------------------------------------------------------------------------------------------

    def _enter_thread(self) -> None:
        # kvikio synchronises the default stream of the calling thread's device.
        if self._device.torch_device.type == "cuda":
            torch.cuda.set_device(self._device.torch_device)

    def _carry_out(self, flight: _Flight, begin: int, end: int) -> None:
        request = flight.request
        error = None
        try:
            if flight.error is None:
                if request.after is not None:
                    request.after.synchronize()
                error = self._move(request, begin, end)
        except Exception as unexpected:
            error = io_error(request, errno.EIO, f"{type(unexpected).__name__}: {unexpected}")
        with flight.lock:
            flight.error = flight.error or error
            flight.tasks_left -= 1
            if flight.tasks_left > 0:
                return
        with self._arrived:
            if flight.error is None and request.write:
                self.written_bytes += request.byte_count
            elif flight.error is None:
                self.read_bytes += request.byte_count
            self._done.append(Completion(request, flight.error, None))
            self._arrived.notify_all()

    def _move(self, request: Request, begin: int, end: int) -> OSError | None:
        file = request.file or self._own
        call = self._files[file].raw_write if request.write else self._files[file].raw_read
        existing = min(end, file.existing_bytes(request))  # whole blocks are asked for all the same
        place = begin
        beyond = 0  # bytes behind place that the last call moved, to be moved again
        retried = False
        while place < existing:
            text, count = None, 0
            try:
                count = call(request.slab.memory, end - place, request.file_offset + place, request.slab_offset + place)
            except RuntimeError as error:
                text = str(error)
            if text is not None:
                code = errno_of(text)
                if code == errno.EIO and not retried:
                    retried = True  # the medium may give or take it the second time
                    continue
                return io_error(request, code, text)
            if count >= existing - place:
                return None
            if count <= beyond:  # however often it is asked
                return end_of_file_error(request)
            # Direct I/O starts on a block.
            beyond = count % BLOCK_BYTES
            place += count - beyond
        return None

    def _check_open(self) -> None:
        if self._closed or os.getpid() != self._process:  # a forked child has none of the threads
            raise closed_error()
