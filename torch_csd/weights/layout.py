"""Which bytes of which files a tensor is made of, and how its elements come out of them. Pure: reads nothing.

A `Region` is a strided view of one file, as torch's own tensors are of their memory, so torch works the views out (on
the meta device). A `Join` is several layouts one after another along a dimension, `Codes`, `Scaled` and
`Packed` weights of less precision. All are immutable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.weights.widening import widen_fp8, widen_mxfp4

aten = torch.ops.aten

# A region is read as one range while at least this share of the range is wanted; else by its rows.
_WANTED_SHARE = 0.5
# And while its rows are this near to each other: each would take a block or two of its own.
_PITCH_BYTES = 2 * BLOCK_BYTES


class InputFile(NamedTuple):
    """A file that is open to be read."""

    path: str
    number: int  # the reader's
    byte_count: int
    mtime_ns: int
    device: int
    inode: int


class Range(NamedTuple):
    """Bytes of a file."""

    file: InputFile
    offset: int
    byte_count: int


@dataclass(frozen=True, eq=False)
class Region:
    """Elements of one file: ``meta`` says which, counted in elements of its dtype from byte ``offset`` on."""

    file: InputFile
    offset: int
    meta: Tensor

    @staticmethod
    def make(file: InputFile, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Region:
        """Row-major elements from ``offset`` on."""
        return Region(file, offset, torch.empty(tuple(shape), dtype=dtype, device="meta"))

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @cached_property
    def key(self) -> tuple:
        """Equal for regions of the same elements."""
        meta = self.meta
        return (self.file.number, self.offset, meta.dtype, meta.shape, meta.stride(), meta.storage_offset())

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> Region | list[Region] | None:
        """The region that a view op of torch makes of this one; None where there is none."""
        try:
            out = func(self.meta, *args, **kwargs)
        except RuntimeError:
            if func is aten.view.default:
                return None  # it would have to copy
            raise
        if isinstance(out, (list, tuple)):
            regions = [self._of(each) for each in out]
            return None if None in regions else regions
        return self._of(out)

    def _of(self, meta: Tensor) -> Region | None:
        same_memory = meta.untyped_storage()._cdata == self.meta.untyped_storage()._cdata
        plain = not (meta.is_conj() or meta.is_neg()) and all(step >= 0 for step in meta.stride())
        if not (same_memory and plain):
            return None
        region = Region(self.file, self.offset, meta)
        # as_strided of a meta tensor goes anywhere.
        return region if region.span[1] * region.dtype.itemsize <= meta.untyped_storage().nbytes() else None

    # ---- reading -----------------------------------------------------------------------------------------------------

    @cached_property
    def span(self) -> tuple[int, int]:
        """First element and the one after the last, counted as storage_offset is."""
        if self.meta.numel() == 0:
            return 0, 0
        begin = self.meta.storage_offset()
        reach = sum((size - 1) * step for size, step in zip(self.meta.shape, self.meta.stride(), strict=True))
        return begin, begin + reach + 1

    @cached_property
    def leaves(self) -> tuple[Region, ...]:
        """What is read each as one range."""
        begin, end = self.span
        steps = self.meta.stride()
        distinct = math.prod(size for size, step in zip(self.meta.shape, steps, strict=True) if step > 0)
        if end - begin <= 1 or distinct >= _WANTED_SHARE * (end - begin):
            return (self,)
        widest = self._widest
        if steps[widest] * self.dtype.itemsize < _PITCH_BYTES:
            return (self,)
        return tuple(
            leaf
            for index in range(self.meta.shape[widest])
            for leaf in Region(self.file, self.offset, self.meta.select(widest, index)).leaves
        )

    @property
    def _widest(self) -> int:
        """The dimension whose steps in the file are the longest."""
        steps = self.meta.stride()
        return max(range(len(steps)), key=lambda dim: steps[dim] if self.meta.shape[dim] > 1 else -1)

    @property
    def range(self) -> Range:
        """Of a leaf."""
        begin, end = self.span
        size = self.dtype.itemsize
        return Range(self.file, self.offset + begin * size, (end - begin) * size)

    def elements(self, memory: Tensor) -> Tensor:
        """A leaf's elements, from its range's bytes: a view of them where torch can make one."""
        begin, _ = self.span
        if memory.storage_offset() % self.dtype.itemsize or memory.data_ptr() % self.dtype.itemsize:
            memory = memory.clone()  # not where an element may lie
        return memory.view(self.dtype).as_strided(
            self.meta.shape, self.meta.stride(), memory.storage_offset() // self.dtype.itemsize + self._lead(begin)
        )

    def _lead(self, begin: int) -> int:
        return self.meta.storage_offset() - begin if self.meta.numel() else 0

    def assemble(self, leaves: Iterator[Tensor]) -> Tensor:
        """The elements, from those of the leaves in order."""
        if len(self.leaves) == 1:
            return next(leaves)
        widest = self._widest
        parts = [
            Region(self.file, self.offset, self.meta.select(widest, index)).assemble(leaves)
            for index in range(self.meta.shape[widest])
        ]
        return torch.stack(parts, dim=widest)


@dataclass(frozen=True, eq=False)
class Join:
    """Layouts one after another along ``dim``."""

    parts: tuple[Layout, ...]
    dim: int

    @staticmethod
    def make(parts: Sequence[Layout], dim: int) -> Layout:
        """Raises ValueError where they do not fit together."""
        if not parts:
            raise ValueError("torch.cat of stored tensors wants at least one")
        rank = len(parts[0].shape)
        dim = _positive(dim, rank)
        for part in parts:
            fits = len(part.shape) == rank and all(part.shape[i] == parts[0].shape[i] for i in range(rank) if i != dim)
            if not fits or part.dtype != parts[0].dtype:
                raise ValueError(
                    f"stored tensors of shapes {[list(part.shape) for part in parts]} and dtypes "
                    f"{[part.dtype for part in parts]} do not fit together along dim {dim}"
                )
        parts = [part for part in parts if part.shape[dim] > 0] or parts[:1]
        flat = [
            inner for part in parts for inner in (part.parts if isinstance(part, Join) and part.dim == dim else (part,))
        ]
        return flat[0] if len(flat) == 1 else Join(tuple(flat), dim)

    @cached_property
    def shape(self) -> torch.Size:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @cached_property
    def key(self) -> tuple:
        return (self.dim, *(part.key for part in self.parts))

    @cached_property
    def leaves(self) -> tuple[Region, ...]:
        return tuple(leaf for part in self.parts for leaf in part.leaves)

    def assemble(self, leaves: Iterator[Tensor]) -> Tensor:
        return torch.cat([part.assemble(leaves) for part in self.parts], dim=self.dim)

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> Layout | list[Layout] | None:
        handler = _JOIN_VIEWS.get(func)
        return None if handler is None else handler(self, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantised weight [..., out, in]: ``rows`` holds its codes, uint8 [..., out, row_bytes]
    (csrc/kernels/weights.h). Not read as it is: `ops.quantised_linear` takes the rows.
    """

    rows: Layout
    bits: int
    in_features: int
    dtype: torch.dtype  # of the weight that it stands for
    transposed: bool = False  # [..., in, out]

    @cached_property
    def shape(self) -> torch.Size:
        *batch, out_features, _ = self.rows.shape
        ends = (out_features, self.in_features)
        return torch.Size((*batch, *(reversed(ends) if self.transposed else ends)))

    @property
    def key(self) -> tuple:
        return (self.bits, self.in_features, self.transposed, *self.rows.key)

    @property
    def leaves(self) -> tuple[Region, ...]:
        return self.rows.leaves

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> Layout | list[Layout] | None:
        handler = _ROWS_VIEWS.get(func)
        return None if handler is None else handler(self, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A weight [..., out, in] stored as ``values`` of less precision and a grid of ``scales`` [..., rows, columns], of
    which each covers a block: value * scale (DeepSeek-V3, 2412.19437, section 3.3.2, with blocks of 128 x 128)."""

    values: Layout
    scales: Layout
    block: tuple[int, int]
    dtype: torch.dtype  # of the product
    begin: tuple[int, int] = (0, 0)  # of the first element, in its block

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def key(self) -> tuple:
        return (self.dtype, self.begin, self.values.key, self.scales.key)

    @cached_property
    def leaves(self) -> tuple[Region, ...]:
        return self.values.leaves + self.scales.leaves

    def stored(self, leaves: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Values and scales."""
        return self.values.assemble(leaves), self.scales.assemble(leaves)

    def assemble(self, leaves: Iterator[Tensor]) -> Tensor:
        return widen_fp8(*self.stored(leaves), block=self.block, begin=self.begin, dtype=self.dtype)

    def rows(self, values: Tensor, scales: Tensor, begin: int, end: int, out: Tensor | None) -> Tensor:
        """Output features [begin, end) of what is [out, in], from all values and scales; perhaps in ``out``."""
        side, first = self.block[0], self.begin[0] + begin
        scales = scales[first // side : -(-(self.begin[0] + end) // side)]
        return widen_fp8(
            values[begin:end], scales, block=self.block, begin=(first % side, self.begin[1]), dtype=self.dtype, out=out
        )

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> Layout | list[Layout] | None:
        handler = _SCALED_VIEWS.get(func)
        return None if handler is None else handler(self, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [..., out, in] in MXFP4 (OCP MX specification 1.0): ``values`` are uint8 [..., out, in / 2], two E2M1
    elements to a byte, the first in the low bits; ``scales`` are uint8 [..., out, in / 32], exponents of 2 plus 127.
    """

    values: Layout
    scales: Layout
    dtype: torch.dtype
    transposed: bool = False  # [..., in, out]

    @cached_property
    def shape(self) -> torch.Size:
        *batch, out_features, byte_count = self.values.shape
        ends = (out_features, 2 * byte_count)
        return torch.Size((*batch, *(reversed(ends) if self.transposed else ends)))

    @property
    def key(self) -> tuple:
        return (self.dtype, self.transposed, self.values.key, self.scales.key)

    @cached_property
    def leaves(self) -> tuple[Region, ...]:
        return self.values.leaves + self.scales.leaves

    def stored(self, leaves: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Values and scales."""
        return self.values.assemble(leaves), self.scales.assemble(leaves)

    def assemble(self, leaves: Iterator[Tensor]) -> Tensor:
        weight = widen_mxfp4(*self.stored(leaves), dtype=self.dtype)
        return weight.mT if self.transposed else weight

    def rows(self, values: Tensor, scales: Tensor, begin: int, end: int, out: Tensor | None) -> Tensor:
        """The same, of what is not transposed."""
        return widen_mxfp4(values[begin:end], scales[begin:end], dtype=self.dtype, out=out)

    def apply(self, func: Callable, args: tuple, kwargs: dict) -> Layout | list[Layout] | None:
        handler = _ROWS_VIEWS.get(func)
        return None if handler is None else handler(self, *args, **kwargs)


Layout = Region | Join | Codes | Scaled | Packed


def numel(layout: Layout) -> int:
    return math.prod(layout.shape)


def byte_count(layout: Layout) -> int:
    """Of its elements as stored."""
    if isinstance(layout, Codes):
        return byte_count(layout.rows)
    if isinstance(layout, Scaled | Packed):
        return byte_count(layout.values)
    if isinstance(layout, Join):
        return sum(byte_count(part) for part in layout.parts)
    return numel(layout) * layout.dtype.itemsize


def as_read(layout: Layout) -> Region | Join | Scaled | Packed:
    """What is read for it."""
    return layout.rows if isinstance(layout, Codes) else layout


def narrow(layout: Layout, dim: int, begin: int, end: int) -> Layout:
    return layout.apply(aten.slice.Tensor, (dim, begin, end), {})


def element(layout: Layout, place: Sequence[int]) -> Layout:
    """[1]: the one at this place."""
    for index in place:
        layout = layout.apply(aten.select.int, (0, index), {})
    return layout.apply(aten.unsqueeze.default, (0,), {})


def _positive(dim: int, rank: int) -> int:
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise IndexError(f"dimension must be from {-rank} to {rank - 1}, got {dim}")
    return dim % rank if rank else 0


# ---- views of joins --------------------------------------------------------------------------------------------------

_JOIN_VIEWS: dict[Callable, Callable] = {}


def _join_view(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _JOIN_VIEWS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _each(join: Join, func: Callable, args: tuple, dim: int) -> Layout | None:
    parts = [part.apply(func, args, {}) for part in join.parts]
    return None if None in parts else Join.make(parts, dim)


@_join_view(aten.detach.default, aten.alias.default)
def _same(join: Join) -> Layout:
    return join


@_join_view(aten.slice.Tensor)
def _slice(join: Join, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Layout | None:
    dim = _positive(dim, len(join.shape))
    if dim != join.dim:
        return _each(join, aten.slice.Tensor, (dim, start, end, step), join.dim)
    begin, end, step = slice(start, end, step).indices(join.shape[dim])
    parts, part_begin = [], 0
    for part in join.parts:
        size = part.shape[dim]
        first = begin if begin >= part_begin else begin + -(-(part_begin - begin) // step) * step
        if first < min(end, part_begin + size):
            inner = (dim, first - part_begin, min(end - part_begin, size), step)
            parts.append(part.apply(aten.slice.Tensor, inner, {}))
        part_begin += size
    if not parts:  # of no elements
        parts = [join.parts[0].apply(aten.slice.Tensor, (dim, 0, 0, 1), {})]
    return None if None in parts else Join.make(parts, dim)


@_join_view(aten.select.int)
def _select(join: Join, dim: int, index: int) -> Layout | None:
    dim = _positive(dim, len(join.shape))
    if dim != join.dim:
        return _each(join, aten.select.int, (dim, index), join.dim - (dim < join.dim))
    size = join.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension {dim} with size {size}")
    index %= size
    for part in join.parts:
        if index < part.shape[dim]:
            return part.apply(aten.select.int, (dim, index), {})
        index -= part.shape[dim]
    raise AssertionError("unreachable: the index lies in one of the parts")


@_join_view(aten.permute.default)
def _permute(join: Join, dims: Sequence[int]) -> Layout | None:
    dims = [_positive(dim, len(join.shape)) for dim in dims]
    return _each(join, aten.permute.default, (dims,), dims.index(join.dim))


@_join_view(aten.transpose.int)
def _transpose(join: Join, dim0: int, dim1: int) -> Layout | None:
    dim0, dim1 = (_positive(dim, len(join.shape)) for dim in (dim0, dim1))
    dim = {dim0: dim1, dim1: dim0}.get(join.dim, join.dim)
    return _each(join, aten.transpose.int, (dim0, dim1), dim)


@_join_view(aten.t.default)
def _t(join: Join) -> Layout | None:
    return _transpose(join, 0, 1) if len(join.shape) == 2 else join


@_join_view(aten.unsqueeze.default)
def _unsqueeze(join: Join, dim: int) -> Layout | None:
    dim = _positive(dim, len(join.shape) + 1)
    return _each(join, aten.unsqueeze.default, (dim,), join.dim + (dim <= join.dim))


@_join_view(aten.squeeze.dim)
def _squeeze(join: Join, dim: int) -> Layout | None:
    dim = _positive(dim, len(join.shape))
    if dim == join.dim or join.shape[dim] != 1:
        return join
    return _each(join, aten.squeeze.dim, (dim,), join.dim - (dim < join.dim))


@_join_view(aten.unbind.int)
def _unbind(join: Join, dim: int = 0) -> list[Layout]:
    return [_select(join, dim, index) for index in range(join.shape[dim])]


@_join_view(aten.split.Tensor)
def _split(join: Join, split_size: int, dim: int = 0) -> list[Layout]:
    size = join.shape[dim]
    return [_slice(join, dim, begin, begin + split_size) for begin in range(0, max(size, 1), max(split_size, 1))]


@_join_view(aten.split_with_sizes.default)
def _split_with_sizes(join: Join, split_sizes: Sequence[int], dim: int = 0) -> list[Layout]:
    ends = torch.tensor(split_sizes).cumsum(0).tolist()
    return [_slice(join, dim, end - size, end) for size, end in zip(split_sizes, ends, strict=True)]


@_join_view(aten.view.default, aten._unsafe_view.default)
def _view(join: Join, shape: Sequence[int]) -> Layout | None:
    """Only dimensions of size 1 may come and go, other than the one that is joined along."""
    wanted = list(torch.empty(join.shape, device="meta").view(tuple(shape)).shape)
    if [size for size in wanted if size != 1] != [size for size in join.shape if size != 1]:
        return None
    layout: Layout | None = join
    for dim in reversed(range(len(join.shape))):
        if isinstance(layout, Join) and layout.shape[dim] == 1:
            layout = _squeeze(layout, dim)
    for dim, size in enumerate(wanted):
        if size == 1 and isinstance(layout, Join):
            layout = _unsqueeze(layout, dim)
    return layout


# ---- views of weights by rows: Codes and Packed ----------------------------------------------------------------------

_ROWS_VIEWS: dict[Callable, Callable] = {}
_Rows = TypeVar("_Rows", Codes, Packed)


def _rows_view(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _ROWS_VIEWS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _of_parts(layout: _Rows, func: Callable, args: tuple) -> _Rows | None:
    """The same view of all that it is made of: all but the last dimension are the weight's own."""
    names = ("rows",) if isinstance(layout, Codes) else ("values", "scales")
    parts = {name: getattr(layout, name).apply(func, args, {}) for name in names}
    return None if None in parts.values() else replace(layout, **parts)


@_rows_view(aten.detach.default, aten.alias.default)
def _same_rows(layout: _Rows) -> _Rows:
    return layout


@_rows_view(aten.transpose.int)
def _transpose_rows(layout: _Rows, dim0: int, dim1: int) -> _Rows | None:
    rank = len(layout.shape)
    if {_positive(dim0, rank), _positive(dim1, rank)} != {rank - 2, rank - 1}:
        return None
    return replace(layout, transposed=not layout.transposed)


@_rows_view(aten.t.default)
def _t_rows(layout: _Rows) -> _Rows | None:
    return _transpose_rows(layout, 0, 1) if len(layout.shape) == 2 else None


@_rows_view(aten.select.int)
def _select_rows(layout: _Rows, dim: int, index: int) -> _Rows | None:
    dim = _positive(dim, len(layout.shape))
    return None if dim >= len(layout.shape) - 2 else _of_parts(layout, aten.select.int, (dim, index))


@_rows_view(aten.slice.Tensor)
def _slice_rows(
    layout: _Rows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> _Rows | None:
    """Of experts or output features: any. Of input features: only all of them."""
    rank = len(layout.shape)
    dim = _positive(dim, rank)
    if dim == (rank - 2 if layout.transposed else rank - 1):
        size = layout.shape[dim]
        return layout if slice(start, end, step).indices(size) == (0, size, 1) else None
    rows_dim = rank - 2 if dim >= rank - 2 else dim
    return _of_parts(layout, aten.slice.Tensor, (rows_dim, start, end, step))


@_rows_view(aten.unbind.int)
def _unbind_rows(layout: _Rows, dim: int = 0) -> list[_Rows] | None:
    parts = [_select_rows(layout, dim, index) for index in range(layout.shape[dim])]
    return None if None in parts else parts


# ---- views of scaled weights -----------------------------------------------------------------------------------------

_SCALED_VIEWS: dict[Callable, Callable] = {}


def _scaled_view(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _SCALED_VIEWS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_scaled_view(aten.detach.default, aten.alias.default)
def _same_scaled(scaled: Scaled) -> Scaled:
    return scaled


@_scaled_view(aten.transpose.int)
def _transpose_scaled(scaled: Scaled, dim0: int, dim1: int) -> Scaled | None:
    rank = len(scaled.shape)
    if {_positive(dim0, rank), _positive(dim1, rank)} != {rank - 2, rank - 1}:
        return None
    values, scales = (each.apply(aten.transpose.int, (-2, -1), {}) for each in (scaled.values, scaled.scales))
    return replace(scaled, values=values, scales=scales, block=scaled.block[::-1], begin=scaled.begin[::-1])


@_scaled_view(aten.t.default)
def _t_scaled(scaled: Scaled) -> Scaled | None:
    return _transpose_scaled(scaled, 0, 1) if len(scaled.shape) == 2 else None


def _both(scaled: Scaled, func: Callable, args: tuple) -> Scaled | None:
    values, scales = (each.apply(func, args, {}) for each in (scaled.values, scaled.scales))
    return None if values is None or scales is None else replace(scaled, values=values, scales=scales)


@_scaled_view(aten.select.int)
def _select_scaled(scaled: Scaled, dim: int, index: int) -> Scaled | None:
    dim = _positive(dim, len(scaled.shape))
    return None if dim >= len(scaled.shape) - 2 else _both(scaled, aten.select.int, (dim, index))


@_scaled_view(aten.unsqueeze.default)
def _unsqueeze_scaled(scaled: Scaled, dim: int) -> Scaled | None:
    dim = _positive(dim, len(scaled.shape) + 1)
    return None if dim > len(scaled.shape) - 2 else _both(scaled, aten.unsqueeze.default, (dim,))


@_scaled_view(aten.slice.Tensor)
def _slice_scaled(
    scaled: Scaled, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Scaled | None:
    rank = len(scaled.shape)
    dim = _positive(dim, rank)
    if dim < rank - 2:
        return _both(scaled, aten.slice.Tensor, (dim, start, end, step))
    start, end, step = slice(start, end, step).indices(scaled.shape[dim])
    if step != 1:
        return None
    side = dim - (rank - 2)
    block, begin = scaled.block[side], list(scaled.begin)
    first, last = begin[side] + start, begin[side] + max(end, start)
    begin[side] = first % block
    return replace(
        scaled,
        values=narrow(scaled.values, dim, start, max(end, start)),
        scales=narrow(scaled.scales, dim, first // block, -(-last // block)),
        begin=tuple(begin),
    )


@_scaled_view(aten.unbind.int)
def _unbind_scaled(scaled: Scaled, dim: int = 0) -> list[Scaled] | None:
    parts = [_select_scaled(scaled, dim, index) for index in range(scaled.shape[dim])]
    return None if None in parts else parts
