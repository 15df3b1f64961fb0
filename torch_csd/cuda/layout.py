"""How a page's bytes lie, as csrc/store/FORMAT.md has it: the Python twin of PageLayout in csrc/base/types.h."""

from __future__ import annotations

from typing import NamedTuple

import torch

from torch_csd.catalogue import BLOCK_BYTES, PAGE_TOKENS


class PageLayout(NamedTuple):
    """`num_kv_heads` tiles of one page. `code_bits` 0: elements of `dtype`; 8 or 4: codes, then float16 parameters."""

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: torch.dtype
    code_bits: int

    @property
    def bits(self) -> int:
        return self.code_bits or 8 * self.dtype.itemsize

    @property
    def k_bytes(self) -> int:
        return self.head_dim_k * PAGE_TOKENS * self.bits // 8

    @property
    def v_bytes(self) -> int:
        return self.head_dim_v * PAGE_TOKENS * self.bits // 8

    @property
    def tile_bytes(self) -> int:
        parameters = 4 * (self.head_dim_k + PAGE_TOKENS) if self.code_bits else 0
        return (
            -(-(self.k_bytes + self.v_bytes + parameters) // 64) * 64 if self.code_bits else self.k_bytes + self.v_bytes
        )

    @property
    def page_bytes(self) -> int:
        return -(-self.num_kv_heads * self.tile_bytes // BLOCK_BYTES) * BLOCK_BYTES
