"""Memory that files are read into: huge pages, and pieces of a region of them."""

from __future__ import annotations

import bisect
import mmap

import torch
from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.errors import MemoryBudgetError

HUGE_PAGE_BYTES = 2 * 2**20


def new_memory(byte_count: int) -> Tensor:
    """uint8 [byte_count], zeroed and 4096-aligned, that goes back to the system with the tensor.

    On huge pages where it is large enough: a 1 MiB O_DIRECT read into one is one segment to the device, not 256, which
    decides the drive's rate (csrc/base/mapped_memory.h has the numbers).
    """
    huge = byte_count >= HUGE_PAGE_BYTES
    try:
        mapped = mmap.mmap(
            -1, max(byte_count, 1) + (HUGE_PAGE_BYTES if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise MemoryBudgetError(
            f"no memory for {byte_count} bytes of weights: {error.strerror}; lower memory_budget, or raise the "
            f"process's limit"
        ) from None
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    if not huge:
        return memory[:byte_count]
    mapped.madvise(mmap.MADV_HUGEPAGE)
    begin = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[begin : begin + byte_count]


class Staging:
    """One region of memory, given out in pieces of whole blocks, the first place that is free. Not thread-safe."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._begins = [0]  # of free places, ascending; no two touch
        self._ends = [memory.numel()]

    @property
    def byte_count(self) -> int:
        return self.memory.numel()

    def take(self, byte_count: int) -> Tensor | None:
        """A piece of memory; None where no place is large enough."""
        wanted = -(-byte_count // BLOCK_BYTES) * BLOCK_BYTES
        for index, (begin, end) in enumerate(zip(self._begins, self._ends, strict=True)):
            if end - begin >= wanted:
                if end - begin == wanted:
                    del self._begins[index], self._ends[index]
                else:
                    self._begins[index] = begin + wanted
                return self.memory[begin : begin + wanted]
        return None

    def give_back(self, piece: Tensor) -> None:
        begin = piece.storage_offset() - self.memory.storage_offset()
        end = begin + piece.numel()
        index = bisect.bisect_left(self._begins, begin)
        if index < len(self._begins) and self._begins[index] == end:
            end = self._ends.pop(index)
            del self._begins[index]
        if index > 0 and self._ends[index - 1] == begin:
            self._ends[index - 1] = end
        else:
            self._begins.insert(index, begin)
            self._ends.insert(index, end)

    @property
    def free_bytes(self) -> int:
        return sum(self._ends) - sum(self._begins)
