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
from torch_csd.cuda.kernels import Rules
from torch_csd.cuda.layout import PageLayout

# As in attend_pass.h.
SEARCHED_QUERIES_MAX = 16

# Float32 has 24 bits: from 2**24 on, the log of a count of keys is lost.
LOWEST_MERGED = -(2.0**20)

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
        return self.ends - self.q.shape[2]

    @functools.cached_property
    def rules(self) -> Rules:
        """What the kernels do to scores; on q's device."""
        device = self.q.device
        mask = self.mask
        if mask is not None and mask.dtype == torch.bool:
            shown = mask.to(device)
            mask = torch.zeros(shown.shape, device=device).masked_fill_(~shown, -torch.inf)
        if mask is not None and mask.shape[3] == 1:
            mask = mask.expand(-1, -1, -1, int(self.ends.max()) - self.kv_begin)
        return Rules(
            scale=self.scale,
            kv_end=torch.from_numpy(self.ends.astype(np.int32)).to(device, non_blocking=True),
            kv_begin=self.kv_begin,
            softcap=self.softcap or None,
            positions=torch.from_numpy(self.first_positions.astype(np.int32)).to(device, non_blocking=True),
            causal=self.causal != ops.CAUSAL_NONE,
            window=self.window or None,
            mask=None if mask is None else mask.to(device, torch.float32),
            mask_begin=self.kv_begin,
            alibi_slopes=None if self.alibi_slopes is None else self.alibi_slopes.to(device),
        )

    @functools.cached_property
    def seen_pages(self) -> np.ndarray | None:
        """bool [batch or 1, pages from that of kv_begin on]: the mask lets some query see of it. None: it may be any.

        Of few queries only: many see everything between them, and each may have a mask of its own to be searched.
        """
        if self.mask is None or self.mask.shape[3] == 1 or self.q.shape[2] > SEARCHED_QUERIES_MAX:
            return None
        seen = self.mask if self.mask.dtype == torch.bool else self.mask != -torch.inf
        seen = seen.any(1).any(1)
        before = self.kv_begin % PAGE_TOKENS
        seen = torch.nn.functional.pad(seen, (before, -(before + seen.shape[1]) % PAGE_TOKENS))
        return seen.view(seen.shape[0], -1, PAGE_TOKENS).any(2).cpu().numpy()

    def has_tiny_rows(self) -> bool:
        """Whether the mask has nothing for some query but numbers so low that the log of a count changes none of them.

        Its attention is then a mean over all keys; parts of it cannot be merged, since lse hides how many each had.
        """
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        best = self.mask.amax(-1)
        return bool(((best < LOWEST_MERGED) & (best > -torch.inf)).any())

    def is_plain(self, layout: PageLayout, row_count: int) -> bool:
        """Whether a card can take part: not in what is wrong, which the drive has words for, nor in what is rare.

        Rare are queries that stand at the beginning of the tokens, unless that is the end, too: then "lower right" says
        the same, and goes on saying it for a part of the tokens.
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
            if self.mask.dim() != 4 or self.has_tiny_rows():
                return False
            if any(size not in (1, full) for size, full in zip(self.mask.shape, whole, strict=True)):
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
        if call.seen_pages is not None:
            masked = np.broadcast_to(call.seen_pages, (call.q.shape[0], call.seen_pages.shape[1]))
            seen &= masked[rows, np.minimum(indices - call.kv_begin // PAGE_TOKENS, masked.shape[1] - 1)]
        places = np.flatnonzero(seen)
        return Uses(table[places, ops.PAGE], rows[places], indices[places], places, table[places, ops.FILE_OFFSET])

    def some(self, which: np.ndarray | slice) -> Uses:
        return Uses(*(values[which] for values in self))
