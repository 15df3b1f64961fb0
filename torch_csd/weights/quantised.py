"""The linear layer on quantised rows: by whichever of two ways is faster for so many rows of x, or on a card."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_csd import ops
from torch_csd.weights.layout import Codes, Layout

# Rows of x up to which our kernel is faster than dequantising and torch's GEMM. Milliseconds, ours and torch's, of int4
# rows with two threads (AMD EPYC, Zen 5 with AVX-512, 2 cores, 2026-11-26, torch 2.13; int8 is at most a tenth slower):
#
#                             1            16            32            40            64          1024
#   bfloat16 [8192, 3072]   0.3   2.7     2.0   3.0     4.0   4.2     5.0   4.4     7.9   5.6
#   bfloat16 [3072, 8192]   0.3   3.3     2.0   4.0     3.9   4.7     5.0   5.1     8.0   6.1
#   float32  [8192, 3072]   0.3   2.9     2.0  10.1                                 8.2  21.9      157   282
#   float32  [3072, 8192]   0.3   5.2     2.0  11.2                                 7.9  21.8      183   277
#   float16  [8192, 3072]   0.3   2.2     2.0  14.4                                 8.0  53.3
#
# torch multiplies bfloat16 with instructions for it, and takes over at 34 and at 42 rows. In float32 it does not at any
# number that was tried: its GEMM reaches 100 GFLOP/s a core, ours 160 to 190. float16 is slow in it.
X_ROWS_MAX = {torch.float32: 1024, torch.bfloat16: 36, torch.float16: 1024}

# Of dequantised rows at a time: they are still in the cache when the GEMM reads them. 64 rows of x take 5.8 ms with 8
# MiB, 6.7 with 2 and 7.4 with 4 (bfloat16 [8192, 3072], as above; the GEMM alone 4.3).
BLOCK_BYTES = 8 * 2**20
# The same on a card, in float32: some passes over these are made, so as many as its caches may hold.
CARD_BLOCK_BYTES = 32 * 2**20

GROUP = 64  # input features that share a scale and a zero point


def quantised_linear(
    x: Tensor,
    rows: Tensor,
    *,
    bits: int,
    in_features: int,
    bias: Tensor | None = None,
    simd: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias``: ``[..., out_features]`` in x's dtype.

    For few rows of x in float32 until it is rounded to x's dtype. For many the weight is rounded to x's dtype first,
    and torch multiplies as it does.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        rows: uint8 ``[out_features, row_bytes]``, contiguous, at any address (csrc/kernels/weights.h).
        bias: ``[out_features]`` in x's dtype.
        simd: as in :class:`KVStore`.

    Raises:
        ValueError: a shape, a dtype or ``bits`` does not fit.
    """
    if x.shape[-1] != in_features:
        raise ValueError(f"x must have {in_features} features, as the weight, got {x.shape[-1]}")
    x_rows = x.numel() // in_features
    if x_rows <= X_ROWS_MAX.get(x.dtype, x_rows):
        return ops.quantised_linear(x, rows, bits=bits, bias=bias, simd=simd)
    out = x.new_empty((*x.shape[:-1], rows.shape[0]))
    step = max(1, BLOCK_BYTES // (in_features * x.element_size()))
    for begin in range(0, rows.shape[0], step):
        block = slice(begin, begin + step)
        weight = ops.dequantise_rows(rows[block], bits=bits, in_features=in_features, dtype=x.dtype, simd=simd)
        out[..., block] = F.linear(x, weight, None if bias is None else bias[block])
    return out


def linear_on_card(
    x: Tensor, rows: Tensor, *, bits: int, in_features: int, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """The same in torch's own ops, on any device: as for many rows of x, with a weight of ``dtype``."""
    if x.shape[-1] != in_features:
        raise ValueError(f"x must have {in_features} features, as the weight, got {x.shape[-1]}")
    outs = []
    for begin, block in _blocks(rows, in_features):
        weight = unpack_rows(block, bits=bits, in_features=in_features, dtype=dtype)
        outs.append(F.linear(x, weight, None if bias is None else bias[begin : begin + block.shape[0]]))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def unpack_rows(rows: Tensor, *, bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """As `ops.dequantise_rows`, in torch's ops, on the rows' device: ``[out_features, in_features]`` of ``dtype``."""
    out_features, groups = rows.shape[0], -(-in_features // GROUP)
    code_bytes = groups * GROUP * bits // 8
    codes = rows[:, :code_bytes].reshape(out_features, groups, -1)
    if bits == 4:  # byte j of a group has code j in its low half, code j + 32 in its high one
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    # Cloned: rows may begin at any byte, elements of two may not.
    params = rows[:, code_bytes : code_bytes + 4 * groups].clone(memory_format=torch.contiguous_format)
    params = params.view(torch.float16).view(out_features, groups, 2).float()
    values = codes.float().mul_(params[..., :1]).add_(params[..., 1:])  # scale * code is exact: 11 bits by 8
    return values.view(out_features, -1)[:, :in_features].to(dtype)


def _blocks(rows: Tensor, in_features: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, CARD_BLOCK_BYTES // (4 * in_features))
    for begin in range(0, rows.shape[0], step):
        yield begin, rows[begin : begin + step]


def dense(stored: Tensor, layout: Layout, *, on_card: bool = False) -> Tensor:
    """The layout's elements, from what was read for it: the same, unless these are codes. on_card: by torch's ops."""
    if not isinstance(layout, Codes):
        return stored
    rows = stored.reshape(-1, stored.shape[-1])
    how = dict(bits=layout.bits, in_features=layout.in_features, dtype=layout.dtype)
    if on_card or not rows.is_cpu:
        blocks = [unpack_rows(block, **how) for _, block in _blocks(rows, layout.in_features)]
        weight = torch.cat(blocks) if blocks else rows.new_empty((0, layout.in_features), dtype=layout.dtype)
    else:
        weight = ops.dequantise_rows(rows, **how)
    weight = weight.view(*stored.shape[:-1], layout.in_features)
    return weight.mT if layout.transposed else weight
