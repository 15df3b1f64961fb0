"""Moving bytes between the drive's file and slabs of device memory. Knows nothing of attention.

Two implementations, one contract (tests/cuda/test_transfer.py): `gds.GdsTransfer`, by kvikio and GPUDirect Storage, and
`pinned.PinnedTransfer`, by the drive's own I/O engine, pinned host memory and a copy stream. `probe` finds out which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from torch_csd.cuda.device import Event


@dataclass(frozen=True)
class Slab:
    """Memory of our own that requests move bytes to and from."""

    memory: Tensor  # uint8 [byte_count], on the device
    # The same bytes on the host, where they pass through it: valid while a write is under way, and from the completion
    # of a read until its part of the slab is read into anew. None: they never touch host memory.
    host: Tensor | None


@dataclass(frozen=True)
class Request:
    """One range of the file and one of a slab. All numbers are multiples of 4096."""

    write: bool
    file_offset: int
    byte_count: int
    slab: Slab
    slab_offset: int
    tag: object  # comes back with the completion
    # On the device: before it, a write's bytes are not there yet, and what a read would overwrite is still in use.
    after: Event | None = None


class Completion(NamedTuple):
    request: Request
    error: OSError | None  # with the errno; None: all of it was moved
    ready: Event | None  # of a read: the slab has its bytes after it; None: it has them now


class Transfer(Protocol):
    """Not thread-safe: one call at a time. A request's slab and event are kept alive until it is reaped."""

    name: str  # "gds" or "pinned"
    depth: int  # requests in flight at most
    read_bytes: int  # moved so far
    written_bytes: int

    def register(self, byte_count: int) -> Slab:
        """A new slab."""

    def submit(self, request: Request) -> None:
        """Begins a request. Raises RuntimeError when `depth` are in flight, and what makes it impossible to begin; it
        is not in flight then. Short counts are resumed: a completion is always the whole request, or an error."""

    def reap(self, *, wait: bool = False) -> list[Completion]:
        """Requests that are done, in any order. wait: until there is at least one, unless none is in flight."""

    @property
    def in_flight(self) -> int: ...

    def drain(self) -> list[Completion]:
        """Waits for everything in flight, copies included."""

    def close(self) -> None:
        """Drains, and lets go of the file and the slabs. Idempotent."""
