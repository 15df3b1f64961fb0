"""Aligned host memory with known bytes, for the tests of what moves them."""

from __future__ import annotations

import torch

BLOCK = 4096


def aligned_memory(byte_count: int, fill: int = 0) -> torch.Tensor:
    """uint8 [byte_count], its address a multiple of 4096."""
    memory = torch.full((byte_count + BLOCK,), fill, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BLOCK :][:byte_count]


def random_bytes(byte_count: int, seed: int = 0) -> torch.Tensor:
    memory = aligned_memory(byte_count)
    memory.random_(generator=torch.Generator().manual_seed(seed))
    return memory
