"""Moving bytes between files and slabs of device memory. Knows nothing of attention, nor of weights.

Two implementations, one contract (tests/cuda_transfer/test_contract.py): `gds.GdsTransfer`, by kvikio and GPUDirect
Storage, and `pinned.PinnedTransfer`, by the drive's own I/O engine, pinned host memory and copy streams. `probe` finds
out which. Both serve a drive's file; the first also files that others wrote (`gds.GdsTransfer.open`).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES, DATA_OFFSET
from torch_csd.cuda.device import Event
from torch_csd.errors import StoreClosedError


@dataclass(frozen=True, eq=False)
class Slab:
    """Memory of our own that requests move bytes to and from."""

    memory: Tensor  # uint8 [byte_count], on the device
    # The same bytes on the host, where they pass through it: valid while a write is under way, and from the completion
    # of a read until its part of the slab is read into anew. None: they never touch host memory.
    host: Tensor | None


@dataclass(frozen=True, eq=False)
class Request:
    """One range of a file and one of a slab. All numbers are multiples of 4096: the last block of a file that others
    wrote may be less, and what its part of the slab holds then is not said.

    While it is in flight nobody else touches its part of the slab, but for what `after` waits for.
    """

    write: bool
    file_offset: int
    byte_count: int
    slab: Slab
    slab_offset: int
    tag: object  # comes back with the completion
    # On the device: before it, a write's bytes are not there yet, and what a read would overwrite is still in use.
    after: Event | None = None
    file: OpenFile | None = None  # None: the transfer's own, a drive's


class Completion(NamedTuple):
    request: Request
    error: OSError | None  # with the errno; None: all of it was moved
    # Of a read: the slab has its bytes after it, or where that failed, nothing is written to it any more. None: now.
    ready: Event | None


class Transfer(Protocol):
    """Not thread-safe: one call at a time. A request's slab and event are kept alive until it is reaped.

    Whoever makes one closes it before the drive; what is called after either is closed raises StoreClosedError.
    """

    name: str  # "gds" or "pinned"
    depth: int  # requests in flight at most: submitted and not reaped
    read_bytes: int  # moved so far
    written_bytes: int

    def register(self, byte_count: int) -> Slab:
        """A new slab."""

    def submit(self, request: Request) -> None:
        """Begins a request; returns without waiting for it. Raises RuntimeError when `depth` are in flight, and
        ValueError for numbers that are not aligned or lie outside of the slab or of the file's pages; it is not in
        flight then. Short counts are resumed: a completion is always the whole request, or an error."""

    def reap(self, *, wait: bool = False) -> list[Completion]:
        """Requests that are done, in any order. wait: until there is at least one, unless none is in flight."""

    @property
    def in_flight(self) -> int: ...

    def drain(self) -> list[Completion]:
        """Waits for everything in flight, copies included."""

    def close(self) -> None:
        """Drains, and lets go of the file and the slabs. Idempotent."""


# ---- what both implementations share ---------------------------------------------------------------------------------


def check_request(request: Request, begin: int, end: int) -> None:
    """Raises ValueError for a request that is not aligned, or lies outside of its slab or of bytes [begin, end)."""
    numbers = (
        ("file_offset", request.file_offset),
        ("byte_count", request.byte_count),
        ("slab_offset", request.slab_offset),
    )
    for name, value in numbers:
        if value % BLOCK_BYTES or value < 0:
            raise ValueError(f"{name} must be a multiple of {BLOCK_BYTES}, got {value}")
    slab_bytes = request.slab.memory.numel()
    if not 0 < request.byte_count <= slab_bytes - request.slab_offset:
        raise ValueError(
            f"a request must lie in its slab of {slab_bytes} bytes, got {request.byte_count} bytes from "
            f"{request.slab_offset} on"
        )
    if not begin <= request.file_offset <= end - request.byte_count:
        raise ValueError(
            f"a request must lie in bytes {begin} to {end} of the file, got {request.byte_count} bytes from "
            f"{request.file_offset} on"
        )


def io_error(request: Request, code: int, detail: str = "") -> OSError:
    """What a completion says of a request that failed; detail: what the library says of it."""
    verb = "writing" if request.write else "reading"
    file = "the KV file" if request.file is None else request.file.path
    text = f"{os.strerror(code)}: {verb} {request.byte_count} bytes at byte {request.file_offset} of {file} failed"
    return OSError(code, f"{text} ({detail})" if detail else text)


class OpenFile:
    """A drive's file, by a path: it grows, so its length is looked at again when that is too short."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._bytes = 0

    def check(self, request: Request) -> None:
        """As `check_request`, of the pages that the file has."""
        if request.file_offset + request.byte_count > self._bytes:
            try:
                self._bytes = os.stat(self.path).st_size
            except FileNotFoundError:  # the drive's descriptor is gone
                raise closed_error() from None
        check_request(request, DATA_OFFSET, self._bytes)

    def existing_bytes(self, request: Request) -> int:
        """Of the request: those that the file has."""
        return request.byte_count

    def close(self) -> None:
        """Idempotent."""


class ForeignFile(OpenFile):
    """A file that others wrote, as it was when it was opened: only read, from its first byte to its last.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.version = self._version()

    @property
    def descriptor_path(self) -> str:
        """By which another opener of this process gets this file, whatever has its name by now."""
        return f"/proc/self/fd/{self._descriptor}"

    def check(self, request: Request) -> None:
        if request.write:
            raise ValueError(f"{self.path}: is only read, got a request to write")
        check_request(request, 0, -(-self.version[0] // BLOCK_BYTES) * BLOCK_BYTES)

    def existing_bytes(self, request: Request) -> int:
        return min(request.byte_count, self.version[0] - request.file_offset)

    def is_as_it_was(self) -> bool:
        return self._version() == self.version

    def refresh(self) -> None:
        """Takes the file as it is now."""
        self.version = self._version()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _version(self) -> tuple[int, int, int, int]:
        """Bytes, when it was last written to, in ns, and which file it is."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


def closed_error() -> StoreClosedError:
    return StoreClosedError("this transfer between drive and GPU is closed; open a new one")


def end_of_file_error(request: Request) -> OSError:
    return io_error(request, errno.EIO, "end of file")
