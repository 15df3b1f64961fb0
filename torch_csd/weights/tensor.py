"""FileTensor: a torch.Tensor whose elements are in a file, and where it comes from."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_csd.config import as_int
from torch_csd.errors import CheckpointError, StoreError
from torch_csd.tensor import StorageTensor
from torch_csd.weights.files import SAFETENSORS_DTYPES, reach_bytes, read_header
from torch_csd.weights.layout import Codes, Join, Layout, Region, as_read, element, numel
from torch_csd.weights.stream import Stream

# Of tensors that belong to no model: enough to keep a drive busy while one piece is computed with.
DEFAULT_BUDGET_BYTES = 256 * 2**20


class FileTensor(StorageTensor):
    """A tensor that is a range of a file, and lazy views of it.

    Slicing and the other views, ``torch.cat`` and ``torch.stack`` of such tensors, and ``to`` another dtype or device
    read nothing. ``linear``, ``matmul``, ``embedding``, norms and the other ops that weights meet (`functions`) read
    what they need into bounded memory, ahead where the order is known. Small tensors (`functions.SMALL_BYTES`) go
    through any op, and stay in memory; for others, what is not known raises ``NotImplementedError``.

    The file is read when its elements are wanted, never before: if it was changed since it was opened, that raises
    :class:`StoreError`.
    """

    _layout: Layout
    _stream: Stream
    _casts: tuple[torch.dtype, ...]  # what elements are converted to as they are read, one after another
    _routed: bool  # used when something calls for it (an expert), not in every pass
    _writable: bool

    @staticmethod
    def __new__(
        cls,
        layout: Layout,
        stream: Stream,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        routed: bool = False,
        writable: bool = False,
        requires_grad: bool = False,
    ) -> FileTensor:
        # Never an inference tensor: torch makes no views of the one kind in the mode of the other.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return FileTensor(
                    layout,
                    stream,
                    dtype=dtype,
                    device=device,
                    routed=routed,
                    writable=writable,
                    requires_grad=requires_grad,
                )
        # Contiguous strides, whatever the view: there is no memory for them to describe, and reshape stays a view.
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, layout.shape, dtype=dtype or layout.dtype, device=device, requires_grad=requires_grad
        )
        tensor._layout = layout
        tensor._stream = stream
        tensor._casts = () if dtype in (None, layout.dtype) else (dtype,)
        tensor._routed = routed
        tensor._writable = writable
        return tensor

    def with_layout(
        self, layout: Layout, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> FileTensor:
        """Another view of the same files, converted as this one unless another dtype or device is named."""
        with torch._C.DisableTorchFunctionSubclass():
            before = self.dtype if self._casts else layout.dtype
            view = FileTensor(
                layout,
                self._stream,
                dtype=dtype or before,
                device=device or self.device,
                routed=self._routed,
                writable=self._writable,
            )
            view._casts = self._casts if dtype in (None, before) else (*self._casts, dtype)
            return view

    def become(self, other: FileTensor) -> None:
        """What ``tensor.data = other`` does, as far as torch does not know of it."""
        self.__dict__.update({name: other.__dict__[name] for name in FileTensor.__annotations__})

    def converted(self, stored: Tensor) -> Tensor:
        """What was read of it, with this tensor's dtype and on its device."""
        with torch._C.DisableTorchFunctionSubclass():
            stored = stored.to(self.device)
            for dtype in self._casts:
                stored = stored.to(dtype)
            return stored

    def to_dense(self) -> Tensor:
        """All elements, read into memory: an ordinary tensor of this shape, dtype and device.

        Raises:
            StoreError: reading failed, or the file was changed since it was opened.
        """
        with torch._C.DisableTorchFunctionSubclass():
            stored = self._stream.load(as_read(self._layout))
            return functions.as_computed(stored, self)

    def sample(self, step: int) -> Tensor:
        """Every ``step``-th element in row-major order (of a quantised weight: of its codes), read into memory."""
        with torch._C.DisableTorchFunctionSubclass():
            layout = as_read(self._layout)
            places = torch.arange(0, numel(layout), step)
            index = torch.unravel_index(places, layout.shape)
            elements = [element(layout, place) for place in zip(*(each.tolist() for each in index), strict=True)]
            if not elements:
                return torch.empty(0, dtype=self.dtype)
            stored = self._stream.load(Join.make(elements, 0))
            return stored if isinstance(self._layout, Codes) else stored.to(self.dtype)

    def write_(self, values: Tensor) -> FileTensor:
        """Writes ``values`` ([this shape], converted to the dtype that the file has) over the elements in the file.

        Returns when the file has them; like any write, they are on the drive for good after ``os.fsync``. Nothing may
        read the file meanwhile.

        Raises:
            ValueError: another shape. StoreError: it is not of :func:`from_file` (checkpoints are only read), or of
            ``mode="r"``, or writing failed: part of it may be written then.
        """
        with torch._C.DisableTorchFunctionSubclass():
            write_elements(self, values)
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        with torch._C.DisableTorchFunctionSubclass():
            leaf = self._layout.leaves[0]
            more = f" and {len(self._layout.leaves) - 1} more" if len(self._layout.leaves) > 1 else ""
            where = f"{leaf.file.path!r} at byte {leaf.range.offset}{more}"
            return f"FileTensor(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}', {where})"

    def __copy__(self) -> FileTensor:
        """Another tensor of the same elements: they are never changed through this one."""
        with torch._C.DisableTorchFunctionSubclass():
            copy = self.with_layout(self._layout).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            return copy

    def __deepcopy__(self, memo: dict) -> FileTensor:
        copy = memo[id(self)] = self.__copy__()
        return copy

    # ---- what torch asks of a subclass -----------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return functions.call_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return functions.call_aten(func, args, kwargs or {})


# ---- where they come from --------------------------------------------------------------------------------------------

_default_lock = threading.Lock()
_default: tuple[int, Stream] | None = None  # of this process


def default_stream() -> Stream:
    """The one of tensors that belong to no model."""
    global _default
    with _default_lock:
        if _default is None or _default[0] != os.getpid():
            _default = (os.getpid(), Stream(DEFAULT_BUDGET_BYTES))
        return _default[1]


def from_file(
    path: str | os.PathLike[str],
    dtype: torch.dtype,
    shape: Sequence[int],
    offset: int = 0,
    *,
    mode: str = "r+",
) -> FileTensor:
    """A tensor whose elements are in a file, row-major from byte ``offset`` on, in the machine's byte order.

    Args:
        path: of the file.
        dtype: of its elements: any that torch has, of a byte or more.
        shape: of the tensor.
        offset: bytes before the first element; any number.
        mode: as of `numpy.memmap`. "r+": :meth:`FileTensor.write_` may write to it; until then it is only read. "r":
            never. "w+": as "r+", and it is created, or made as long as the tensor needs: new bytes are zero.

    Raises:
        CheckpointError: the file is shorter than the tensor. StoreError: it cannot be read.
        TypeError, ValueError: bad arguments.

    Example:
        >>> table = torch_csd.from_file("table.bin", torch.bfloat16, [1_000_000, 512])
        >>> table[10:20].to_dense()
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    if dtype not in SAFETENSORS_DTYPES.values() and dtype != torch.complex128:
        raise ValueError(f"dtype must be of whole bytes and not quantised, got {dtype}")
    if mode not in ("r", "r+", "w+"):
        raise ValueError(f'mode must be "r", "r+" or "w+", got {mode!r}')
    sizes = [as_int(size, "a size in shape", low=0) for size in shape]
    if reach_bytes(dtype, sizes) >= 2**63:
        raise ValueError(f"shape must be that of a tensor, got {sizes}")
    offset = as_int(offset, "offset", low=0)
    wanted = offset + dtype.itemsize * math.prod(sizes)
    stream = default_stream()
    if mode == "w+":
        _make_file(path, wanted, stream)
    file = stream.open(path)
    if file.byte_count < wanted:
        raise CheckpointError(
            f"{file.path}: {list(sizes)} elements of {dtype} from byte {offset} on go to byte {wanted}, the file has "
            f"{file.byte_count} bytes"
        )
    return FileTensor(Region.make(file, dtype, sizes, offset), stream, writable=mode != "r")


def from_safetensors(path: str | os.PathLike[str], name: str) -> FileTensor:
    """The tensor ``name`` of a safetensors file, whose elements stay there.

    Raises:
        KeyError: the file has no such tensor. CheckpointError: it is not a safetensors file, cut short, or its header
        is wrong. StoreError: it cannot be read.
    """
    header = read_header(path)
    if name not in header.entries:
        names = ", ".join(list(header.entries)[:8]) + (", ..." if len(header.entries) > 8 else "")
        raise KeyError(f"{os.fspath(path)}: no tensor {name!r}; it has {names or 'none'}")
    stream = default_stream()
    entry = header.entries[name]
    return FileTensor(Region.make(stream.open(path), entry.dtype, entry.shape, entry.offset), stream)


def _make_file(path: str | os.PathLike[str], byte_count: int, stream: Stream) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except OSError as error:
        raise StoreError(f"{os.fspath(path)}: making the file failed: {error.strerror}") from None
    file = stream.open(path)
    if file.byte_count < byte_count:
        with stream.writing(file) as descriptor:
            os.ftruncate(descriptor, byte_count)


def write_elements(tensor: FileTensor, values: Tensor) -> None:
    layout = tensor._layout
    if not tensor._writable:
        where = layout.leaves[0].file.path
        raise StoreError(f'{where}: opened to be read only; open it by from_file(..., mode="r+") to write to it')
    if tuple(values.shape) != tuple(layout.shape):
        raise ValueError(f"values must be {list(layout.shape)}, got {list(values.shape)}")
    if isinstance(values, StorageTensor):
        values = values.to_dense()
    if not isinstance(layout, Region):
        raise NotImplementedError("FileTensor: write_ to a tensor that was put together; write to its parts")
    if _overlaps(layout.meta):
        raise ValueError(f"write_ wants each element to have a place of its own, {tensor!r} repeats some")
    dense = values.detach().to("cpu", layout.dtype).resolve_conj().resolve_neg()
    with tensor._stream.writing(layout.file) as descriptor:
        for region, part in _runs(layout, dense):
            _write_all(descriptor, part, region.range.offset)


def _overlaps(meta: Tensor) -> bool:
    """Whether some elements may share their place."""
    reach = 0
    for step, size in sorted(zip(meta.stride(), meta.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return meta.numel() > 0
            reach += (size - 1) * step
    return False


def _runs(layout: Region, dense: Tensor):
    """Regions of adjacent bytes, each with what goes there."""
    meta = layout.meta
    if meta.numel() == 0:
        return
    order = sorted(range(meta.dim()), key=lambda dim: -meta.stride(dim))
    meta, dense = meta.permute(order), dense.permute(order)
    stack = [(meta, dense)]
    while stack:
        meta, dense = stack.pop()
        if meta.is_contiguous():
            yield Region(layout.file, layout.offset, meta), dense.contiguous()
        else:
            stack += [(meta[index], dense[index]) for index in reversed(range(meta.shape[0]))]


def _write_all(descriptor: int, part: Tensor, offset: int) -> None:
    adjacent = torch.empty(part.numel(), dtype=part.dtype).copy_(part.reshape(-1))
    data = memoryview(adjacent.view(torch.uint8).numpy())
    while data:
        count = os.pwrite(descriptor, data[: 2**30], offset)
        data, offset = data[count:], offset + count


from torch_csd.weights import functions  # noqa: E402  the table needs the class above
