"""StorageTensor: a torch.Tensor whose elements are on a drive. Shape, dtype, device and a handle; no data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.sparse import Sparse
from torch_csd.store import KVStore

# The dimensions that stored K or V can have. R is the repetition of each kv head by repeat_kv.
ROW, HEAD, REPEAT, TOKEN, CHANNEL = "row", "head", "repeat", "token", "channel"

# Of a layer's K and V as they are handed out.
PLAIN_AXES = ((ROW,), (HEAD,), (TOKEN,), (CHANNEL,))


class View(NamedTuple):
    """Which part of a layer a StorageTensor shows, and how its dimensions are laid out.

    ``axes`` names, for each dimension of the tensor, the stored dimensions merged into it in row-major order: ``()``
    for a dimension of size 1, ``(HEAD, REPEAT)`` for heads expanded by repeat_kv.
    """

    values: bool  # V, else K
    row_begin: int
    row_count: int
    head_begin: int
    head_count: int
    num_kv_heads: int
    kv_begin: int
    kv_count: int
    head_dim: int
    repeat: int = 1
    axes: tuple[tuple[str, ...], ...] = PLAIN_AXES

    def size(self, name: str) -> int:
        return {
            ROW: self.row_count,
            HEAD: self.head_count,
            REPEAT: self.repeat,
            TOKEN: self.kv_count,
            CHANNEL: self.head_dim,
        }[name]

    def shape(self) -> tuple[int, ...]:
        if self.axes is PLAIN_AXES:  # twice per layer and token
            return (self.row_count, self.head_count, self.kv_count, self.head_dim)
        return tuple(self.axis_size(names) for names in self.axes)

    def axis_size(self, names: tuple[str, ...]) -> int:
        size = 1
        for name in names:
            size = size * self.size(name)
        return size

    def replace(self, **changes: object) -> View:
        return self._replace(**changes)


@dataclass
class Pair:
    """What K and V of one layer share: the snapshot they stand for, and halves of an append by ``torch.cat``."""

    handle: Tensor  # [3], int64: drive, layer, epoch
    dtype: torch.dtype  # of the tensors; asking a tensor for its own goes through __torch_function__
    device: torch.device
    sparse: Sparse | None = None  # how attention chooses among the tokens
    pending: dict[bool, Tensor] = field(default_factory=dict)  # by View.values


class StorageTensor(torch.Tensor):
    """A tensor whose elements are on a drive: shape, dtype, device and where they are; no data.

    :class:`KVTensor` (stored K or V) and :class:`torch_csd.weights.FileTensor` (a range of a file). Ops on it go to the
    executor or stay lazy; any that can do neither raises ``NotImplementedError``. Only :meth:`to_dense` brings the
    elements into memory. Results are not differentiable.
    """

    def to_dense(self) -> Tensor:
        """All elements, read into memory: an ordinary tensor of this shape, dtype and device."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        raise TypeError("a StorageTensor cannot be pickled: its elements are on a drive; use .to_dense() first")

    @staticmethod
    def pair(
        store: KVStore,
        layer: int,
        *,
        state: ops.LayerState | None = None,
        kv_begin: int | None = None,
        kv_end: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        new_k: Tensor | None = None,
        new_v: Tensor | None = None,
        exact: bool = False,
    ) -> tuple[KVTensor, KVTensor]:
        """K and V of a layer: ``[batch, num_kv_heads, kv_end - kv_begin, head_dim_k]`` and ``[..., head_dim_v]``.

        Args:
            store, layer: what to show; the rows must be at least ``kv_end`` long (without it: of one length).
            state: of the layer, if it is known, as after :meth:`KVStore.append`; default: as it is now.
            kv_begin, kv_end: absolute positions; default: all that is readable.
            dtype, device: what the tensors are, for the ops that meet them; default: as appended.
            new_k, new_v: the same tokens in memory, if they are all of ``[kv_begin, kv_end)``. Ops then use these:
                the attention of a prompt over itself costs what it costs without a store.
            exact: attention is exact even if the store is set to be sparse.
        """
        stored = store.layer(layer)
        epoch, begin, lengths = ops.layer_info(stored.handle) if state is None else state
        kv_begin = begin if kv_begin is None else kv_begin
        if kv_end is None:
            if len(set(lengths)) != 1:
                raise ValueError(
                    f"the rows of layer {layer} have lengths {lengths}; a tensor needs one: pass kv_end, "
                    f"or use KVStore.attend, which takes each row's own"
                )
            kv_end = lengths[0]
        if not begin <= kv_begin <= kv_end <= min(lengths):
            raise ValueError(
                f"tokens [{kv_begin}, {kv_end}) must lie within [{begin}, {min(lengths)}) of layer {layer}"
            )
        # By position, which costs half of what names do: this runs for every layer and token.
        heads, rows, tokens = stored.num_kv_heads, len(lengths), kv_end - kv_begin
        k_view = View(False, 0, rows, 0, heads, heads, kv_begin, tokens, stored.head_dim_k)
        v_view = View(True, 0, rows, 0, heads, heads, kv_begin, tokens, stored.head_dim_v)
        for view, new in ((k_view, new_k), (v_view, new_v)):
            if new is not None and tuple(new.shape) != view.shape():
                raise ValueError(f"new tokens must be {list(view.shape())}, got {list(new.shape)}")
        if device is None:
            device = stored.device
        elif isinstance(device, str):
            device = torch.device(device)
        pair = Pair(stored.at(epoch), dtype or stored.dtype, device, None if exact else store.sparse)
        return KVTensor(k_view, pair, new_tokens=new_k), KVTensor(v_view, pair, new_tokens=new_v)


class KVTensor(StorageTensor):
    """Stored K or V of one layer as a tensor: ``[batch, num_kv_heads, kv_len, head_dim]``, and lazy views of it.

    ``scaled_dot_product_attention``, ``matmul`` against it, slicing, ``expand``, ``reshape``, ``transpose`` and
    ``torch.cat`` with new tokens (an append) go to the executor or stay lazy; every other op raises
    ``NotImplementedError``. Only :meth:`to_dense` brings the elements into memory.

    It is a snapshot: tokens appended later are not in it, and once its tokens are reordered or truncated any use raises
    :class:`StaleTensorError` (:class:`StoreClosedError` once they are freed, or the store is closed). Results are not
    differentiable.
    """

    _view: View
    _pair: Pair
    # The tokens themselves where they are still in memory because they were just computed: all of this tensor or None.
    new_tokens: Tensor | None

    @staticmethod
    def __new__(cls, view: View, pair: Pair, *, new_tokens: Tensor | None = None) -> KVTensor:
        # Never an inference tensor: torch makes no views of the one kind in the mode of the other.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return KVTensor(view, pair, new_tokens=new_tokens)
        # Contiguous strides, whatever the view: there is no memory for them to describe, and reshape stays a view.
        tensor = torch.Tensor._make_wrapper_subclass(cls, view.shape(), dtype=pair.dtype, device=pair.device)
        tensor._view = view
        tensor._pair = pair
        tensor.new_tokens = new_tokens
        return tensor

    def with_view(self, view: View) -> KVTensor:
        """The same layer, seen through another view."""
        return KVTensor(view, self._pair)

    def to_dense(self) -> Tensor:
        if self.new_tokens is not None:
            return self.new_tokens
        view = self._view
        dense = ops.read(
            self._pair.handle,
            values=view.values,
            dtype=self.dtype,
            row_begin=view.row_begin,
            row_count=view.row_count,
            kv_begin=view.kv_begin,
            kv_end=view.kv_begin + view.kv_count,
            num_kv_heads=view.num_kv_heads,
            head_dim=view.head_dim,
        )
        dense = dense[:, view.head_begin : view.head_begin + view.head_count]
        order = [name for names in view.axes for name in names]
        stored = [name for name in (ROW, HEAD, TOKEN, CHANNEL)]
        for name in [name for name in stored if name not in order]:  # selected by an index: of size 1
            dense = dense.squeeze(stored.index(name))
            stored.remove(name)
        dense = dense.permute([stored.index(name) for name in order if name != REPEAT])
        if REPEAT in order:
            place = order.index(REPEAT)
            dense = dense.unsqueeze(place).expand(*[view.size(name) for name in order])
        return dense.reshape(view.shape()).to(self.device)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        view = self._view
        part = "V" if view.values else "K"
        tokens = f"tokens [{view.kv_begin}, {view.kv_begin + view.kv_count})"
        return (
            f"StorageTensor({part}, shape={list(view.shape())}, {tokens}, dtype={self.dtype}, device='{self.device}')"
        )

    # ---- what torch asks of a subclass -------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return dispatch.call_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch.call_aten(func, args, kwargs or {})

    def __tensor_flatten__(self):
        # Sizes that follow from the outer shape are left out: a graph must not be tied to a kv_len.
        view = self._view
        derived = {ROW: "row_count", TOKEN: "kv_count"}
        loose = tuple(derived[names[0]] for names in view.axes if len(names) == 1 and names[0] in derived)
        pair = self._pair
        return ["_handle"], (view.replace(**dict.fromkeys(loose, 0)), loose, pair.dtype, pair.device, pair.sparse)

    @property
    def _handle(self) -> Tensor:
        return self._pair.handle

    def _stable_hash_for_caching(self) -> str:
        return repr(self.__tensor_flatten__()[1])

    @staticmethod
    def __tensor_unflatten__(inner_tensors, context, outer_size, outer_stride):
        view, loose, dtype, device, sparse = context
        names = {"row_count": ROW, "kv_count": TOKEN}
        sizes = {field: outer_size[view.axes.index((names[field],))] for field in loose}
        return KVTensor(view.replace(**sizes), Pair(inner_tensors["_handle"], dtype, device, sparse))


from torch_csd import dispatch  # noqa: E402  the table needs the class above
