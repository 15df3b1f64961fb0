"""Device memory for what is on its way, in chunks, and the requests that fill and empty them. Knows no pages.

Nothing runs by itself: requests go on when somebody asks for a chunk, or pumps. Not thread-safe.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.cuda.device import Device, Event
from torch_csd.cuda.transfer import Completion, Request, Slab, Transfer
from torch_csd.errors import MemoryBudgetError, StoreError

# A chunk costs the host some 0.3 ms, in which PCIe 5 moves 16 MiB: larger ones keep it busy, smaller ones begin sooner.
CHUNK_BYTES_MAX = 32 << 20
CHUNKS_WANTED = 8
CHUNKS_MIN = 2  # one is filled while another is emptied


@dataclass
class Chunk:
    """A part of the staging memory, one user's at a time."""

    begin: int  # in the slab
    memory: Tensor  # uint8, on the device
    free: Event | None = None  # on the device: what its last user issued is done after it


class Staging:
    """``byte_count`` of device memory and the transfer that serves it."""

    def __init__(self, device: Device, transfer: Transfer, byte_count: int):
        self.transfer = transfer
        self._device = device
        self._slab: Slab = transfer.register(byte_count // BLOCK_BYTES * BLOCK_BYTES)
        self._host = self._slab.host
        self._chunks: list[Chunk] = []
        self._free: deque[Chunk] = deque()
        self._queued: deque[Request] = deque()  # until the transfer has room for them
        self._awaited: deque[tuple[Event, Callable[[], None]]] = deque()
        self.chunk_bytes = 0
        self._divide(min(CHUNK_BYTES_MAX, byte_count // CHUNKS_WANTED))

    @property
    def byte_count(self) -> int:
        return self._slab.memory.numel()

    def fit(self, page_bytes: int) -> None:
        """Makes chunks large enough for a page.

        Raises:
            MemoryBudgetError: there is no memory for two of them.
        """
        if page_bytes <= self.chunk_bytes:
            return
        if page_bytes * CHUNKS_MIN > self.byte_count:
            raise MemoryBudgetError(
                f"gpu_staging of {self.byte_count} bytes is too small for two pages of {page_bytes} bytes; raise it"
            )
        while len(self._free) < len(self._chunks):
            if not self.pump(wait=True):
                raise RuntimeError("the staging memory cannot be divided anew while somebody keeps a part of it")
        self._divide(page_bytes)

    def _divide(self, chunk_bytes: int) -> None:
        for chunk in self._chunks:
            if chunk.free is not None:
                chunk.free.synchronize()
        self.chunk_bytes = max(chunk_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES
        begins = range(0, self.byte_count - self.chunk_bytes + 1, self.chunk_bytes)
        self._chunks = [Chunk(begin, self._slab.memory[begin : begin + self.chunk_bytes]) for begin in begins]
        self._free = deque(self._chunks)

    @property
    def free_count(self) -> int:
        return len(self._free)

    def take(self) -> Chunk | None:
        """A chunk whose last user has issued all that it will; see ``Chunk.free``."""
        return self._free.popleft() if self._free else None

    def give_back(self, chunk: Chunk, free: Event | None) -> None:
        chunk.free = free
        self._free.append(chunk)

    def host(self, chunk: Chunk) -> Tensor:
        """Pinned host memory of a chunk's own: ``Chunk.free`` must have passed before it is written to."""
        if self._host is None:
            with torch.inference_mode(False):  # it outlives the mode that it is made in
                self._host = self._device.new_pinned_memory(self.byte_count)
        return self._host[chunk.begin : chunk.begin + self.chunk_bytes]

    # ---- requests ------------------------------------------------------------------------------------------------

    def move(
        self,
        chunk: Chunk,
        offset: int,
        *,
        write: bool,
        file_offset: int,
        byte_count: int,
        after: Event | None,
        done: Callable[[Completion], None],
    ) -> None:
        """Moves a range of the file into a chunk, or back. ``done`` is called by a later :meth:`pump`."""
        self._queued.append(Request(write, file_offset, byte_count, self._slab, chunk.begin + offset, done, after))
        self._submit()

    def when(self, event: Event, done: Callable[[], None]) -> None:
        """``done`` is called by a :meth:`pump` after the event has passed; events pass in the order of these calls."""
        self._awaited.append((event, done))

    def pump(self, *, wait: bool = False) -> bool:
        """Takes note of what is done, and goes on. wait: until something was. False: nothing was, or is under way."""
        self._submit()
        found = self._take_note(wait=False)
        if not found and wait:
            if self.transfer.in_flight > 0:
                found = self._take_note(wait=True)
            elif self._awaited:
                self._awaited[0][0].synchronize()
                found = self._take_note(wait=False)
        self._submit()
        return found

    def _take_note(self, *, wait: bool) -> bool:
        completions = self.transfer.reap(wait=wait)
        for completion in completions:
            completion.request.tag(completion)
        found = bool(completions)
        while self._awaited and self._awaited[0][0].query():
            self._awaited.popleft()[1]()
            found = True
        return found

    def _submit(self) -> None:
        while self._queued and self.transfer.in_flight < self.transfer.depth:
            request = self._queued.popleft()
            try:
                self.transfer.submit(request)
            except (ValueError, StoreError) as error:  # the file was cut short, or closed
                request.tag(Completion(request, OSError(errno.EIO, str(error)), None))

    def close(self) -> None:
        """What is under way is awaited; nobody is told of it."""
        self._queued.clear()
        self._awaited.clear()
        self.transfer.close()
