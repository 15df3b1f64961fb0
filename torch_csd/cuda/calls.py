"""One attention as a card sees it: what was asked, and which pages of which rows it needs. Moves nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS
from torch_csd.cuda.layout import PageLayout

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """The arguments of ops.attend, with what was left out filled in."""

    handle: Tensor
    q: Tensor  # [batch, num_heads, q_len, head_dim_k]
    scale: float
    head_dim_v: int
    mask: Tensor | None  # [batch or 1, num_heads or 1, q_len or 1, kv_len or 1]
    sinks: Tensor | None  # [num_heads]
    alibi_slopes: Tensor | None  # [num_heads]
    causal: int
    window: int
    softcap: float
    row_begin: int
    kv_begin: int
    kv_end: int  # -1: each row to its own length
    ends: np.ndarray  # int64 [batch]: where each row ends

    @property
    def first_positions(self) -> np.ndarray:
        """int64 [batch]: of query 0 of each row."""
        if self.causal == ops.CAUSAL_UPPER_LEFT:
            return np.full_like(self.ends, self.kv_begin)
        return self.ends - self.q.shape[2]

    @functools.cached_property
    def additive_mask(self) -> Tensor | None:
        """float32, on q's device."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return None if self.mask is None else self.mask.to(self.q.device, torch.float32)
        mask = self.mask.to(self.q.device)
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)

    def is_plain(self, layout: PageLayout, row_count: int) -> bool:
        """Whether a card can take part: not in what is wrong, which the drive has words for, nor in what is rare.

        Rare are queries that stand at the beginning of the tokens, unless that is the end, too.
        """
        if self.q.dim() != 4 or self.q.numel() == 0 or self.q.dtype not in QUERY_DTYPES:
            return False
        batch, num_heads, q_len, head_dim = self.q.shape
        if head_dim != layout.head_dim_k or self.head_dim_v != layout.head_dim_v or num_heads % layout.num_kv_heads:
            return False
        if self.row_begin < 0 or self.row_begin + batch > row_count or self.kv_begin < 0:
            return False
        if any(x is not None and x.numel() != num_heads for x in (self.sinks, self.alibi_slopes)):
            return False
        if self.mask is not None:
            whole = (batch, num_heads, q_len, int(self.ends.max()) - self.kv_begin)
            if self.mask.dim() != 4 or any(
                size not in (1, full) for size, full in zip(self.mask.shape, whole, strict=True)
            ):
                return False
        return self.causal != ops.CAUSAL_UPPER_LEFT or bool((self.ends - q_len == self.kv_begin).all())


class Uses(NamedTuple):
    """Pages that rows of a call need, as arrays of one length. Rows that share a page have a use of it each."""

    pages: np.ndarray  # int64: ops.PAGE
    rows: np.ndarray  # int64: of the call
    indices: np.ndarray  # int64: a page's first token is at 64 * index
    places: np.ndarray  # int64: in the lease's table
    file_offsets: np.ndarray  # int64; -1: in host memory when the lease was taken

    @staticmethod
    def of(table: np.ndarray, call: Call, end_page: int) -> Uses:
        """Those of a lease's pages before ``end_page`` that a query may see, by row and index."""
        rows, indices = table[:, ops.ROW] - call.row_begin, table[:, ops.INDEX]
        first = call.first_positions[rows]
        seen = indices < end_page
        if call.window > 0:
            seen &= (indices + 1) * PAGE_TOKENS > first - call.window + 1
        if call.causal != ops.CAUSAL_NONE:
            seen &= indices * PAGE_TOKENS < first + call.q.shape[2]
        places = np.flatnonzero(seen)
        return Uses(table[places, ops.PAGE], rows[places], indices[places], places, table[places, ops.FILE_OFFSET])

    def some(self, which: np.ndarray | slice) -> Uses:
        return Uses(*(values[which] for values in self))
