"""Weights as checkpoints store them, of less precision than is computed with, to dense ones: by our kernels where they
know the dtype, else by torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_csd import ops, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Scratch(threading.local):
    memory: Tensor | None = None


_scratch = _Scratch()


def scratch(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory to widen into, this thread's and the same at each call: fresh memory comes in page faults, which take
    longer than the widening and the product together (functions.py has the numbers)."""
    byte_count = torch.Size(shape).numel() * dtype.itemsize
    if _scratch.memory is None or _scratch.memory.numel() < byte_count:
        with torch.inference_mode(False):  # whose tensors may not be written to after it
            _scratch.memory = torch.empty(byte_count, dtype=torch.uint8)
    return _scratch.memory[:byte_count].view(dtype).view(*shape)


def widen_mxfp4(values: Tensor, scales: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """MXFP4 ``values`` uint8 [..., in / 2] with ``scales`` uint8 [..., in / 32]: ``dtype`` [..., in].

    out: memory [rows, in] that the result may be put into.
    """
    if dtype not in _DTYPES or not values.is_cpu:
        return reference.widen_mxfp4(values, scales).to(dtype)
    weight = ops.widen_mxfp4(_matrix(values), _matrix(scales), dtype=dtype, out=out)
    return weight.view(*values.shape[:-1], -1)


def widen_fp8(
    values: Tensor,
    scales: Tensor,
    *,
    block: tuple[int, int],
    begin: tuple[int, int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``values`` [..., out, in] times the ``scales`` [..., rows, columns] of their blocks: ``dtype`` [..., out, in].

    out: as of `widen_mxfp4`.
    """
    scales = reference.widen_e8m0(scales) if scales.dtype == torch.uint8 else scales.float()
    if values.dtype not in ops.FP8_DTYPES or dtype not in _DTYPES or not values.is_cpu:
        return reference.widen_fp8(values, scales, block=block, begin=begin).to(dtype)
    if values.dim() > 2:
        weights = [
            widen_fp8(each, grid, block=block, begin=begin, dtype=dtype)
            for each, grid in zip(values, scales, strict=True)
        ]
        return torch.stack(weights) if weights else values.new_empty(values.shape, dtype=dtype)
    if values.stride(-2) == 1 and values.stride(-1) > 1:  # a transposed view: its columns are the rows as stored
        return widen_fp8(values.mT, scales.mT, block=block[::-1], begin=begin[::-1], dtype=dtype).mT
    return ops.widen_fp8(_adjacent(values), _adjacent(scales), block=block, begin=begin, dtype=dtype, out=out)


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns], a view where it can be."""
    return _adjacent(tensor.flatten(0, -2))


def _adjacent(matrix: Tensor) -> Tensor:
    """The same with adjacent elements in each row."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
