"""The table from torch ops to what is done with tensors in files. Brings nothing large into memory as a whole.

Two doors, as for stored K and V (torch_csd/dispatch.py). ``__torch_function__`` (:func:`call_function`) sees
``linear``, ``embedding`` and products as they were written; ``__torch_dispatch__`` (:func:`call_aten`) sees aten ops:
views stay lazy, and what is left runs on small tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_csd import ops
from torch_csd.weights.layout import Codes, Join, Layout, Packed, Scaled, as_read, aten, byte_count
from torch_csd.weights.quantised import dense, linear_on_card, quantised_linear
from torch_csd.weights.tensor import FileTensor
from torch_csd.weights.widening import scratch

# Norms, biases and the like: they meet every kind of op, and are a thousandth of a model.
SMALL_BYTES = 2**20

# Of a weight that torch may copy to multiply by it, as it does with one in memory.
_COPIED_BYTES_MAX = 2**18

_FUNCTIONS: dict[Callable, Callable] = {}
_ATEN: dict[Callable, Callable] = {}
_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__


def call_function(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``__torch_function__`` of FileTensor, subclass handling already off."""
    if func == _DATA:  # torch's own loses what it does not know of
        return args[0].detach()
    if func == _SET_DATA:
        tensor, value = args
        if not (isinstance(tensor, FileTensor) and isinstance(value, FileTensor)):
            raise NotImplementedError("FileTensor: .data of what is in a file and of what is in memory do not mix")
        tensor.become(value)
        return func(tensor, value)
    if func.__name__ in ("__get__", "__set__"):  # shape, dtype, requires_grad ...
        return func(*args, **kwargs)
    handler = _FUNCTIONS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    return func(*args, **kwargs)


def call_aten(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``__torch_dispatch__`` of FileTensor."""
    handler = _ATEN.get(func)
    if handler is not None:
        return handler(*args, **kwargs)
    # Under inference_mode composite ops (flatten, einsum, to) arrive whole; what they consist of may be in the table.
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    if _is_view(func) and isinstance(args[0], FileTensor):
        return _lazy_view(func, args, kwargs)
    if any(isinstance(value, FileTensor) for value in _mutated(func, args, kwargs)):
        raise NotImplementedError(
            f"FileTensor: {func} would change it, and files are only read; use .write_(), or .to_dense() first"
        )
    args, kwargs = _small(func, args), _small(func, kwargs)
    return func(*args, **kwargs)


def _is_view(func: Callable) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _mutated(func: Callable, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    values = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            values += value if isinstance(value, (list, tuple)) else [value]
    return values


def _lazy_view(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    layouts = tensor._layout.apply(func, args[1:], kwargs)
    parts = layouts if isinstance(layouts, list) else [layouts]
    # What is converted as it is read has no bytes to be seen as another dtype.
    if None in parts or (tensor._casts and any(part.dtype != tensor._layout.dtype for part in parts)):
        raise NotImplementedError(
            f"FileTensor: {func} of {tensor!r} cannot be a view of the file; use .to_dense() first"
        )
    views = [tensor.with_layout(part) for part in parts]
    return views if isinstance(layouts, list) else views[0]


def _small(func: Callable, values: Any) -> Any:
    """The values, with small stored tensors brought into memory."""
    if isinstance(values, FileTensor):
        if byte_count(values._layout) > SMALL_BYTES:
            raise NotImplementedError(
                f"FileTensor: {func} does not run on what is in a file, other than tensors of at most {SMALL_BYTES} "
                f"bytes, got {values!r}; use .to_dense() first to bring it into memory"
            )
        return _kept(values)
    if isinstance(values, dict):
        return {name: _small(func, value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_small(func, value) for value in values)
    return values


def _kept(tensor: FileTensor | None) -> Tensor | None:
    """An ordinary tensor for what is small; what is ordinary stays as it is."""
    if not isinstance(tensor, FileTensor):
        return tensor
    return as_computed(tensor._stream.keep(as_read(tensor._layout)), tensor)


def as_computed(stored: Tensor, tensor: FileTensor) -> Tensor:
    """What was read of a tensor, on its device and with its dtype: converted there."""
    return tensor.converted(dense(stored.to(tensor.device), tensor._layout, on_card=is_on_card(tensor)))


def is_on_card(tensor: FileTensor) -> bool:
    return tensor._stream.card is not None or tensor.device.type != "cpu"


def _function(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _FUNCTIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _aten(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _ATEN.update(dict.fromkeys(functions, handler))
        return handler

    return register


class _NoBackward(torch.autograd.Function):
    """A result that torch takes to depend on what requires a gradient, until someone wants it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, anchor: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            "FileTensor: results are not differentiable, and an input or a weight requires a gradient; run inference "
            "under torch.no_grad(), use .requires_grad_(False), or train with .to_dense() tensors"
        )


def _forward_only(function: Callable) -> Callable:
    """The forward works wherever torch records it; the backward says why it cannot."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if not torch.is_grad_enabled() or not any(isinstance(each, Tensor) and each.requires_grad for each in values):
            return function(*args, **kwargs)
        with torch.no_grad():
            result = function(*args, **kwargs)
        if result is NotImplemented:
            return NotImplemented
        return _NoBackward.apply(result, torch.empty(0, requires_grad=True))

    return run


# ---- products --------------------------------------------------------------------------------------------------------


@_function(functional.linear)
@_forward_only
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, [..., in] with a stored weight [out, in], cut into what fits into staging."""
    if not isinstance(weight, FileTensor) or isinstance(input, FileTensor):
        return NotImplemented
    bias = _kept(bias)
    if input.dim() > 2 and byte_count(weight._layout) > _COPIED_BYTES_MAX:
        # Of strides that have gaps (a prompt's last token) torch makes batches, and copies the weight for them.
        return linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])
    if isinstance(weight._layout, Codes):
        return _linear_of_codes(input, weight, bias)
    stream = weight._stream
    dim, pieces = stream.pieces(weight._layout)
    if len(pieces) == 1:
        return _linear_of_piece(input, weight, pieces[0], bias)
    if dim == 0 and weight.dim() > 1:
        outs, begin = [], 0
        for piece in pieces:
            end = begin + piece.shape[0]
            outs.append(_linear_of_piece(input, weight, piece, None if bias is None else bias[begin:end]))
            begin = end
        return torch.cat(outs, dim=-1)
    return _sum_over_pieces(input, weight, pieces, bias)


# Of a widened weight: it is still in the cache when the GEMM reads it, and in the same memory each time. Milliseconds
# of two threads for so many rows of x: as a whole in fresh memory, in blocks of 8 MiB in fresh memory, and as here (AMD
# EPYC, Zen 5 with AVX-512, 2 cores, busy, 2026-11-26, torch 2.13). Most of the difference are page faults. 4 and 16 MiB
# are within a third of 8; 1 and 2 MiB take up to twice as long in bfloat16.
#
#   rows of x                           1                  16                  64
#   fp8 [2048, 7168]    float32    28   29   1.7      70   41   8.1      78   53    22
#   fp8 [7168, 2048]    bfloat16  8.0  3.0   2.7     7.3   15   3.5     9.7   14   6.4
#   MXFP4 [5760, 2880]  float32    23   17   1.7      33   14    11      46   38    36
#
# Of these shapes, and of their transposes, torch's bfloat16 products of blocks are those of the whole, to the bit; of
# float32 some are added up in another order, so what is not large stays whole.
_BLOCK_BYTES = 8 * 2**20
_WHOLE_BYTES_MAX = 16 * 2**20


# Rows of x up to which our kernel on MXFP4 as it is stored is faster. Milliseconds, ours and widening in blocks with
# torch's GEMM, of two threads for [5760, 2880] (as above); in float32 and float16 as for int4 (quantised.py).
#
#   rows of x       1             4             8            16            32            64
#   bfloat16   0.4   1.7     0.8   1.7     1.6   2.0     2.7   2.5     5.3   3.9    10.6  11.9
#   float16    0.4   2.2     0.9    12     1.6    20     2.6    28
_MXFP4_X_ROWS_MAX = {torch.float32: 1024, torch.bfloat16: 12, torch.float16: 1024}

# What is smaller takes little time in any way; by torch's GEMM it is to the bit what the widened weight gives.
_MXFP4_ELEMENTS_MIN = 2**20


def _is_for_mxfp4(input: Tensor, weight: FileTensor, piece: Packed) -> bool:
    rows = input.numel() // max(input.shape[-1], 1)
    return (
        rows <= _MXFP4_X_ROWS_MAX.get(input.dtype, -1)
        and piece.shape.numel() >= _MXFP4_ELEMENTS_MIN
        and input.shape[-1] == piece.shape[-1]
        and input.dtype == piece.dtype == weight.dtype
        and input.is_cpu
        and weight.device.type == "cpu"
    )


def _linear_of_piece(input: Tensor, weight: FileTensor, piece: Layout, bias: Tensor | None) -> Tensor:
    """The same for what fits into staging."""
    by_rows = isinstance(piece, Scaled) or (isinstance(piece, Packed) and not piece.transposed)
    if not by_rows or len(piece.shape) != 2 or weight._stream.card is not None:
        with weight._stream.use(piece, routed=weight._routed) as dense:
            return functional.linear(input, weight.converted(dense), bias)
    with weight._stream.use_leaves(piece, routed=weight._routed) as leaves:
        values, scales = piece.stored(leaves)
        if isinstance(piece, Packed) and _is_for_mxfp4(input, weight, piece):
            return ops.mxfp4_linear(input, values, scales, bias=bias)
        row_bytes = piece.shape[1] * piece.dtype.itemsize
        if values.stride(1) != 1:  # columns of what is stored are no rows
            return functional.linear(input, weight.converted(piece.rows(values, scales, 0, piece.shape[0], None)), bias)
        whole = row_bytes * piece.shape[0] <= _WHOLE_BYTES_MAX
        step = max(1, piece.shape[0] if whole else _BLOCK_BYTES // row_bytes)
        outs = []
        for begin in range(0, max(piece.shape[0], 1), step):
            end = min(begin + step, piece.shape[0])
            memory = scratch((end - begin, piece.shape[1]), piece.dtype)
            block = weight.converted(piece.rows(values, scales, begin, end, memory))
            outs.append(functional.linear(input, block, None if bias is None else bias[begin:end]))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _linear_of_codes(input: Tensor, weight: FileTensor, bias: Tensor | None) -> Tensor:
    """The same for a quantised weight: no more of it than a few MiB is ever dequantised."""
    codes = weight._layout
    if codes.transposed:  # as no model asks for it: then it must be dense
        return functional.linear(input, weight.to_dense().to(input.dtype), bias)
    outs, begin = [], 0
    for piece in weight._stream.pieces(codes.rows)[1]:
        end = begin + piece.shape[0]
        part = None if bias is None else bias[begin:end]
        with weight._stream.use(piece, routed=weight._routed) as rows:
            how = dict(bits=codes.bits, in_features=codes.in_features, bias=part)
            if is_on_card(weight):
                outs.append(linear_on_card(input, rows.to(weight.device), dtype=input.dtype, **how))
            else:
                outs.append(quantised_linear(input, rows, **how))
        begin = end
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _sum_over_pieces(input: Tensor, weight: FileTensor, pieces: list[Layout], bias: Tensor | None) -> Tensor:
    """A weight whose input features are the rows of the file: partial sums, half precision added in float32."""
    total, begin = None, 0
    for piece in pieces:
        end = begin + piece.shape[-1]
        with weight._stream.use(piece, routed=weight._routed) as dense:
            part = functional.linear(input[..., begin:end], weight.converted(dense))
        if part.dtype in (torch.bfloat16, torch.float16):
            part = part.float()
        total = part if total is None else total.add_(part)
        begin = end
    if bias is not None:
        total = total + bias
    return total.to(input.dtype)


@_function(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def _matmul(input: Tensor, other: Tensor) -> Tensor:
    """``input @ other`` where one of them is stored."""
    if isinstance(input, FileTensor):
        if isinstance(other, FileTensor) or input.dim() != 2 or other.dim() > 2:
            return NotImplemented
        return linear(other.t() if other.dim() == 2 else other, input).t()
    if other.dim() == 2:
        return linear(input, other.t())
    if other.dim() == 1 or input.dim() != other.dim():
        return NotImplemented
    return _batched(input, other)


@_function(torch.Tensor.__rmatmul__)
def _rmatmul(other: Tensor, input: Tensor) -> Tensor:
    return _matmul(input, other)


@_function(torch.bmm, torch.Tensor.bmm)
def _batched(input: Tensor, other: Tensor) -> Tensor:
    """[..., n, k] @ stored [..., k, m], one batch after another."""
    if isinstance(input, FileTensor) or not isinstance(other, FileTensor) or input.shape[:-2] != other.shape[:-2]:
        return NotImplemented
    if other.dim() == 2:
        return linear(input, other.t())
    if 0 in other.shape[:-2]:
        return input.new_zeros((*input.shape[:-1], other.shape[-1]))
    return torch.stack([_batched(each, stored) for each, stored in zip(input, other, strict=True)])


@_function(torch.addmm, torch.Tensor.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not isinstance(mat2, FileTensor) or isinstance(mat1, FileTensor):
        return NotImplemented
    input = _kept(input)
    if beta == 1 and alpha == 1 and input.dim() == 1:
        return linear(mat1, mat2.t(), input)
    return torch.add(beta * input, linear(mat1, mat2.t()), alpha=alpha)


@_function(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _batched(batch1, batch2)
    if product is NotImplemented:
        return NotImplemented
    return torch.add(beta * _kept(input), product, alpha=alpha)


@_forward_only
def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows [offs[e - 1], offs[e]) of ``mat_a`` [rows, in] by the stored ``mat_b[e]`` [in, out]: the experts of a
    mixture. Those that have no rows are not read; those that have are announced, all at once."""
    if not isinstance(mat_b, FileTensor) or mat_b.dim() != 3 or mat_a.dim() != 2 or bias is not None or offs is None:
        return NotImplemented
    ends = offs.tolist()
    spans = [(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    routed = {expert: mat_b[expert].t() for expert, (begin, end) in enumerate(spans) if end > begin}
    mat_b._stream.announce(
        [piece for each in routed.values() for piece in mat_b._stream.pieces(as_read(each._layout))[1]]
    )
    # Rows behind the last group are nobody's: as torch leaves them, but not with what was in memory.
    out = mat_a.new_zeros((mat_a.shape[0], mat_b.shape[2]), dtype=out_dtype or mat_a.dtype)
    for expert, weight in routed.items():
        begin, end = spans[expert]
        out[begin:end] = linear(mat_a[begin:end], weight)
    return out


if hasattr(functional, "grouped_mm"):
    _function(functional.grouped_mm)(_grouped_mm)
if hasattr(torch, "_grouped_mm"):

    @_function(torch._grouped_mm)
    def _old_grouped_mm(
        input: Tensor,
        mat2: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return _grouped_mm(input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _register_convolution(convolution: Callable) -> None:
    @_function(convolution)
    @_forward_only
    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """A stored kernel, such as that of a vision tower's patches, as a whole: at most what fits into staging."""
        if not isinstance(weight, FileTensor) or isinstance(input, FileTensor):
            return NotImplemented
        stream = weight._stream
        _, pieces = stream.pieces(as_read(weight._layout))
        if len(pieces) > 1 or isinstance(weight._layout, Codes):
            return NotImplemented
        with stream.use(pieces[0], routed=weight._routed) as dense:
            return convolution(input, weight.converted(dense), _kept(bias), *args, **kwargs)


for _convolution in (torch.conv1d, torch.conv2d, torch.conv3d):
    _register_convolution(_convolution)


# ---- rows ------------------------------------------------------------------------------------------------------------


@_function(functional.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a stored weight: only these are read."""
    if not isinstance(weight, FileTensor):
        return NotImplemented
    if max_norm is not None:
        raise NotImplementedError("FileTensor: embedding with max_norm changes its weight, and files are only read")
    return _rows(weight, input)


@_forward_only
def _rows(tensor: FileTensor, index: Tensor) -> Tensor:
    """tensor[index]: [*index.shape, *tensor.shape[1:]]."""
    flat = index.reshape(-1).to("cpu", torch.int64)
    count = tensor.shape[0]
    if flat.numel() and not (0 <= int(flat.min()) and int(flat.max()) < count):
        raise IndexError(f"index out of range: wanted rows of [0, {count}), got {flat.min()} to {flat.max()}")
    if byte_count(tensor._layout) <= SMALL_BYTES:
        rows = _kept(tensor)[flat.to(tensor.device)]
    else:
        rows = as_computed(tensor._stream.rows(as_read(tensor._layout), flat), tensor)
    return rows.view(*index.shape, *tensor.shape[1:])


@_function(torch.index_select, torch.Tensor.index_select)
def _index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    if not isinstance(input, FileTensor) or dim not in (0, -input.dim()):
        return NotImplemented
    return _rows(input, index)


@_aten(aten.index.Tensor)
def _index(tensor: FileTensor, indices: list[Tensor | None]) -> Tensor:
    first, *others = indices
    if isinstance(tensor, FileTensor) and first is not None and all(each is None for each in others):
        if first.dtype == torch.bool:
            first = first.nonzero().squeeze(-1) if first.dim() == 1 else None
        if first is not None:
            if first.dim() == 0:
                return tensor.select(0, int(first))
            return _rows(tensor, torch.where(first < 0, first + tensor.shape[0], first))
    return aten.index.Tensor(*_small(aten.index.Tensor, (tensor, indices)))


# ---- what looks into memory -----------------------------------------------------------------------------------------


def _register_in_memory(function: Callable) -> None:
    @_function(function)
    def in_memory(tensor: FileTensor, *args: Any, **kwargs: Any) -> Any:
        return function(_small(function.__qualname__, tensor).clone(), *args, **kwargs)


# They look where torch says that the elements are, and a stored tensor has none there.
for _name in ("numpy", "__array__", "tolist", "__dlpack__"):
    _register_in_memory(getattr(torch.Tensor, _name))


@_function(torch.Tensor.share_memory_, torch.Tensor.untyped_storage, torch.Tensor.storage)
def _no_memory(tensor: Tensor) -> Tensor:
    raise NotImplementedError(f"FileTensor: {tensor!r} has no memory of its own; use .to_dense() first")


# ---- what stays lazy -------------------------------------------------------------------------------------------------


@_aten(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(tensor: FileTensor) -> FileTensor:
    return tensor.with_layout(tensor._layout)


@_aten(aten.clone.default)
def _clone(tensor: FileTensor, *, memory_format: torch.memory_format | None = None) -> FileTensor:
    """The same elements: nobody changes them through this tensor."""
    return tensor.with_layout(tensor._layout)


@_function(torch.Tensor.contiguous)
def _contiguous(tensor: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    return tensor  # it has no memory to be in another order


@_aten(aten._to_copy.default)
def _to_copy(
    tensor: FileTensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> FileTensor:
    """Converted when it is read."""
    if device is not None and device.type == "cuda" and tensor.device.type != "cuda" and tensor._stream.card is None:
        tensor._stream.warn_once(
            f"weights that were loaded for {tensor.device} are read and copied to {device} one after another, with "
            f'nothing overlapped; torch_csd.load_checkpoint(..., device="{device}") reads them for it'
        )
    return tensor.with_layout(tensor._layout, dtype=dtype, device=device)


@_function(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    tensors = tuple(tensors)
    if not _all_alike(tensors):
        return NotImplemented
    return tensors[0].with_layout(Join.make([tensor._layout for tensor in tensors], dim))


@_function(torch.stack)
def _stack(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
    tensors = tuple(tensors)
    if not _all_alike(tensors):
        return NotImplemented
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _all_alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether they are all stored, by one stream, as what they seem."""
    if not all(isinstance(tensor, FileTensor) for tensor in tensors):
        return False
    first = tensors[0]
    return all(
        tensor._stream is first._stream
        and not isinstance(tensor._layout, Codes)
        and tensor._casts == first._casts
        and tensor._layout.dtype == first._layout.dtype
        for tensor in tensors
    )
