"""The table from torch ops to the executor. Computes nothing itself; brings nothing into memory.

Two doors. ``__torch_function__`` (:func:`call_function`) sees an op as it was written, so attention, products and
``torch.cat`` are caught there before they decompose. ``__torch_dispatch__`` (:func:`call_aten`) sees aten ops: views
stay lazy, ``bmm`` streams, and whatever is not in the table raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.store import attend_layer
from torch_csd.tensor import CHANNEL, HEAD, PLAIN_AXES, REPEAT, ROW, TOKEN, KVTensor, View

aten = torch.ops.aten

_FUNCTIONS: dict[Callable, Callable] = {}
_ATEN: dict[Callable, Callable] = {}


def call_function(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``__torch_function__`` of KVTensor, subclass handling already off."""
    if func.__name__ == "__get__":  # shape, dtype, device ...
        return func(*args, **kwargs)
    stored = _stored_in((*args, *kwargs.values()))
    if stored and all(tensor.new_tokens is not None for tensor in stored):
        args, kwargs = _in_memory(args), _in_memory(kwargs)
        return func(*args, **kwargs)
    handler = _FUNCTIONS.get(func)
    return func(*args, **kwargs) if handler is None else handler(*args, **kwargs)


def call_aten(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``__torch_dispatch__`` of KVTensor."""
    handler = _ATEN.get(func)
    if handler is not None:
        return handler(*args, **kwargs)
    # Under inference_mode composite ops (flatten, einsum, to) arrive whole; what they consist of may be in the table.
    result = func.decompose(*args, **kwargs)
    if result is not NotImplemented:
        return result
    raise NotImplementedError(
        f"StorageTensor: {func} does not run on the drive; use .to_dense() first to bring the tokens into memory"
    )


def attention(
    q: Tensor,
    k: KVTensor,
    v: KVTensor,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over stored ``k`` and ``v``: ``(out, lse)``, as :meth:`KVStore.attend` has it.

    Exact, unless the tensors come from a store or cache that is set to be sparse.

    ``k`` and ``v`` are the two StorageTensors of one layer, or the same views of both: ``[batch, num_kv_heads, kv_len,
    head_dim]``, or expanded to ``[batch, num_heads, ...]`` by repeat_kv.

    Raises:
        ValueError: q's batch, heads, head_dim, dtype or device do not fit.
        NotImplementedError: a view of k or v that the executor cannot stream.
        StaleTensorError: the tokens were reordered, truncated or freed since k and v were made.
    """
    for name, tensor in (("k", k), ("v", v)):
        if not isinstance(tensor, KVTensor):
            raise NotImplementedError(
                f"{name} is an ordinary tensor while the other is stored; append both to a store, or use .to_dense()"
            )
        _check_layout(tensor, PLAIN_AXES, "attention")
    k_view, v_view = k._view, v._view
    if k_view.values or not v_view.values or _tokens(k_view) != _tokens(v_view):
        raise ValueError(f"k and v must be the same tokens of one layer, got {k!r} and {v!r}")
    if not torch.compiler.is_compiling() and k._pair is not v._pair and not torch.equal(k._handle, v._handle):
        raise ValueError("k and v must come from the same layer at the same time; take both anew")
    _check_query(q, k, "q")
    out, lse, _ = attend_layer(
        k._handle,
        q,
        head_dim_v=v_view.head_dim,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        mask=mask,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        row_begin=k_view.row_begin,
        kv_begin=k_view.kv_begin,
        kv_end=k_view.kv_begin + k_view.kv_count,
        sparse=k._pair.sparse,
    )
    return out, lse


# ---- functions ----------------------------------------------------------------------------------------------------


def _function(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _FUNCTIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_function(torch.nn.functional.scaled_dot_product_attention)
def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if isinstance(query, KVTensor):
        raise NotImplementedError("StorageTensor: a stored query cannot be attended with; use .to_dense() first")
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"attention over stored K and V is for inference; dropout_p must be 0, got {dropout_p}"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other, as in torch; fold one into the other")
    batched = query.dim() == 4
    if query.dim() == 3:
        query, key, value = query.unsqueeze(0), _with_row_axis(key), _with_row_axis(value)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(0)
    if isinstance(key, KVTensor) and not enable_gqa and query.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True for grouped heads"
        )
    out, _ = attention(query, key, value, scale=scale, causal="upper_left" if is_causal else False, mask=attn_mask)
    return out if batched else out.squeeze(0)


@_function(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if isinstance(a, KVTensor) or not isinstance(b, KVTensor):
        raise NotImplementedError(
            "StorageTensor: a stored tensor can be the right factor of a product (q @ k^T, p @ v), not the left; "
            "use .to_dense() first"
        )
    batched = a.dim() == 4
    left, right = a, b
    if a.dim() == 3:
        left, right = _unmerge(a, b)
    if right._view.values:
        product = _weighted_sum(left, right)
    else:
        product = _scores(left, right)
    return product if batched else product.flatten(0, 1) if len(b._view.axes[0]) > 1 else product.squeeze(0)


@_function(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    product = _matmul(batch1, batch2) * alpha
    return product if beta == 0 else product + input * beta


@_function(torch.repeat_interleave, torch.Tensor.repeat_interleave)
def _repeat_interleave(
    tensor: KVTensor, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> KVTensor:
    view = tensor._view
    if dim is not None and isinstance(repeats, int) and view.axes[dim] == (HEAD,) and view.repeat == 1:
        axes = list(view.axes)
        axes[dim] = (HEAD, REPEAT)
        return tensor.with_view(view.replace(repeat=repeats, axes=tuple(axes)))
    raise NotImplementedError(
        "StorageTensor: repeat_interleave repeats kv heads by an int; use .to_dense() first for the rest"
    )


@_function(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: list[Tensor], dim: int = 0) -> KVTensor:
    """``torch.cat([past, new], dim=-2)``: an append. It is done when both K and V have been given their new tokens."""
    past, *rest = tensors
    if not isinstance(past, KVTensor) or len(rest) != 1 or isinstance(rest[0], KVTensor):
        raise NotImplementedError(
            "StorageTensor: torch.cat appends one tensor of new tokens to stored ones: torch.cat([stored, new], dim=-2)"
        )
    new = rest[0]
    view = past._view
    if view.axes != PLAIN_AXES or dim not in (2, -2):
        raise NotImplementedError(
            "StorageTensor: torch.cat appends along dim -2 of [batch, num_kv_heads, kv_len, head_dim]"
        )
    _, _, lengths = ops.layer_info(past._handle)
    if any(length != view.kv_begin + view.kv_count for length in lengths) or len(lengths) != view.row_count:
        raise NotImplementedError(
            f"StorageTensor: torch.cat must start from all stored tokens; {past!r} is not at the end of its layer"
        )
    pending = past._pair.pending
    if view.values in pending:
        part, other = ("V", "K") if view.values else ("K", "V")
        raise NotImplementedError(
            f"StorageTensor: {part} was given new tokens already; torch.cat those of {other} too, then go on from the "
            f"tensors that torch.cat returned"
        )
    pending[view.values] = new
    if len(pending) == 2:
        ops.append(past._handle, pending.pop(False).detach(), pending.pop(True).detach())
    return past.with_view(view.replace(kv_count=view.kv_count + new.shape[2]))


@_function(torch.Tensor.share_memory_, torch.Tensor.__dlpack__)
def _memory(tensor: KVTensor, *args: Any, **kwargs: Any) -> Any:
    """They look where torch says that the elements are, and a stored tensor has none there."""
    raise NotImplementedError(f"{tensor!r} has no memory of its own; use .to_dense() first")


@_function(torch.Tensor.contiguous)
def _contiguous(tensor: KVTensor, memory_format: torch.memory_format | None = None) -> KVTensor:
    return tensor


# ---- the two products of an eager attention -----------------------------------------------------------------------


def _scores(q: Tensor, k: KVTensor) -> Tensor:
    _check_layout(k, ((ROW,), (HEAD,), (CHANNEL,), (TOKEN,)), "q @ k^T")
    _check_query(q, k, "q")
    view = k._view
    return ops.scores(
        k._handle,
        q,
        row_begin=view.row_begin,
        kv_begin=view.kv_begin,
        kv_end=view.kv_begin + view.kv_count,
    )


def _weighted_sum(p: Tensor, v: KVTensor) -> Tensor:
    _check_layout(v, PLAIN_AXES, "p @ v")
    _check_query(p, v, "p")
    view = v._view
    return ops.weighted_sum(
        v._handle,
        p,
        row_begin=view.row_begin,
        kv_begin=view.kv_begin,
        kv_end=view.kv_begin + view.kv_count,
        head_dim_v=view.head_dim,
    )


def _unmerge(a: Tensor, b: KVTensor) -> tuple[Tensor, KVTensor]:
    """The 4-D form of a 3-D product, whose leading dimension is rows x heads (bmm) or heads alone."""
    view = b._view
    if len(view.axes) == 3 and view.axes[0][:2] == (ROW, HEAD):
        heads = view.axes[0][1:]
        axes = ((ROW,), heads, *view.axes[1:])
        return a.unflatten(0, (view.row_count, -1)), b.with_view(view.replace(axes=axes))
    return a.unsqueeze(0), _with_row_axis(b)


def _with_row_axis(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, KVTensor):
        return tensor.unsqueeze(0)
    view = tensor._view
    present = any(ROW in names for names in view.axes)
    return tensor if present else tensor.with_view(view.replace(axes=((ROW,), *view.axes)))


def _check_layout(tensor: KVTensor, axes: tuple[tuple[str, ...], ...], what: str) -> None:
    view = tensor._view
    if view.axes is axes and view.head_count == view.num_kv_heads:
        return
    plain = tuple((HEAD,) if names == (HEAD, REPEAT) else names for names in view.axes)
    if plain != axes or view.head_count != view.num_kv_heads:
        raise NotImplementedError(
            f"StorageTensor: {what} wants dimensions {_names(axes)} with all kv heads, got {_names(view.axes)} and "
            f"{view.head_count} of {view.num_kv_heads} kv heads; use .to_dense() first"
        )


def _check_query(q: Tensor, stored: KVTensor, name: str) -> None:
    view = stored._view
    if q.dim() != 4 or q.shape[0] != view.row_count:
        raise ValueError(
            f"{name} must be [{view.row_count}, num_heads, q_len, ...] for {view.row_count} stored rows, "
            f"got shape {list(q.shape)}"
        )
    if q.shape[1] % view.num_kv_heads != 0 or (view.repeat > 1 and q.shape[1] != view.num_kv_heads * view.repeat):
        heads = f"{view.num_kv_heads * view.repeat}" if view.repeat > 1 else f"a multiple of {view.num_kv_heads}"
        raise ValueError(f"{name} must have {heads} heads, got {q.shape[1]}")
    dtype, device = stored._pair.dtype, stored._pair.device
    if q.dtype != dtype or q.device != device:
        raise ValueError(
            f"{name} must be {dtype} on {device} like the stored tensor, got {q.dtype} on {q.device}; "
            f"convert with .to()"
        )


# ---- lazy views ---------------------------------------------------------------------------------------------------


def _aten(*overloads: Callable) -> Callable[[Callable], Callable]:
    def register(handler: Callable) -> Callable:
        _ATEN.update(dict.fromkeys(overloads, handler))
        return handler

    return register


@_aten(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _same(tensor: KVTensor) -> KVTensor:
    return tensor.with_view(tensor._view)


@_aten(aten.bmm.default)
def _aten_bmm(a: Tensor, b: Tensor) -> Tensor:
    return _matmul(a, b)


@_aten(aten.slice.Tensor)
def _slice(tensor: KVTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> KVTensor:
    view = tensor._view
    names = view.axes[dim]
    size = view.axis_size(names)
    begin, stop, _ = slice(start, end).indices(size)
    if step == 1 and begin == 0 and stop == size:
        return tensor.with_view(view)
    if step != 1 or len(names) != 1 or names[0] not in (ROW, HEAD, TOKEN):
        raise NotImplementedError(
            f"StorageTensor: slices of {_names((names,))} with step {step}; rows, kv heads and tokens can be sliced "
            f"with step 1, use .to_dense() first for the rest"
        )
    return tensor.with_view(_narrow(view, names[0], begin, max(0, stop - begin)))


@_aten(aten.select.int)
def _select(tensor: KVTensor, dim: int, index: int) -> KVTensor:
    view = tensor._view
    names = view.axes[dim]
    axes = list(view.axes)
    del axes[dim]
    if names == ():
        return tensor.with_view(view.replace(axes=tuple(axes)))
    if names not in ((ROW,), (HEAD,), (TOKEN,)):
        raise NotImplementedError(
            f"StorageTensor: an index into {_names((names,))}; rows, kv heads and tokens can be selected, "
            f"use .to_dense() first for the rest"
        )
    size = view.axis_size(names)
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for dimension {dim} of size {size}")
    index = index + size if index < 0 else index
    return tensor.with_view(_narrow(view, names[0], index, 1).replace(axes=tuple(axes)))


@_aten(aten.unsqueeze.default)
def _unsqueeze(tensor: KVTensor, dim: int) -> KVTensor:
    axes = list(tensor._view.axes)
    axes.insert(dim if dim >= 0 else dim + len(axes) + 1, ())
    return tensor.with_view(tensor._view.replace(axes=tuple(axes)))


@_aten(aten.squeeze.dim)
def _squeeze(tensor: KVTensor, dim: int) -> KVTensor:
    view = tensor._view
    if view.axis_size(view.axes[dim]) != 1:
        return tensor.with_view(view)
    axes = list(view.axes)
    del axes[dim]
    return tensor.with_view(view.replace(axes=tuple(axes)))


@_aten(aten.squeeze.default)
def _squeeze_all(tensor: KVTensor) -> KVTensor:
    view = tensor._view
    return tensor.with_view(view.replace(axes=tuple(names for names in view.axes if view.axis_size(names) != 1)))


@_aten(aten.unbind.int)
def _unbind(tensor: KVTensor, dim: int = 0) -> tuple[KVTensor, ...]:
    return tuple(_select(tensor, dim, index) for index in range(tensor._view.axis_size(tensor._view.axes[dim])))


@_aten(aten.split.Tensor)
def _split(tensor: KVTensor, split_size: int, dim: int = 0) -> tuple[KVTensor, ...]:
    size = tensor._view.axis_size(tensor._view.axes[dim])
    return tuple(_slice(tensor, dim, begin, begin + split_size) for begin in range(0, size, split_size))


@_aten(aten.transpose.int)
def _transpose(tensor: KVTensor, dim0: int, dim1: int) -> KVTensor:
    axes = list(tensor._view.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return tensor.with_view(tensor._view.replace(axes=tuple(axes)))


@_aten(aten.permute.default)
def _permute(tensor: KVTensor, dims: list[int]) -> KVTensor:
    axes = tensor._view.axes
    return tensor.with_view(tensor._view.replace(axes=tuple(axes[dim] for dim in dims)))


@_aten(aten.expand.default)
def _expand(tensor: KVTensor, sizes: list[int], *, implicit: bool = False) -> KVTensor:
    view = tensor._view
    axes = list(view.axes)
    if len(sizes) == len(axes):
        grown = [
            dim for dim, size in enumerate(sizes) if size not in (-1, view.axis_size(axes[dim])) and axes[dim] == ()
        ]
        kept = [size in (-1, view.axis_size(axes[dim])) for dim, size in enumerate(sizes)]
        if kept.count(False) == 0:
            return tensor.with_view(view)
        # repeat_kv: the dimension of size 1 after the heads becomes their repetition.
        if len(grown) == kept.count(False) == 1 and view.repeat == 1 and grown[0] > 0 and axes[grown[0] - 1] == (HEAD,):
            axes[grown[0]] = (REPEAT,)
            return tensor.with_view(view.replace(repeat=sizes[grown[0]], axes=tuple(axes)))
        # Multi-query heads: one kv head stands for all query heads.
        one_head = [dim for dim, same in enumerate(kept) if not same]
        if len(one_head) == 1 and axes[one_head[0]] == (HEAD,) and view.head_count == 1 and view.repeat == 1:
            axes[one_head[0]] = (HEAD, REPEAT)
            return tensor.with_view(view.replace(repeat=sizes[one_head[0]], axes=tuple(axes)))
    raise NotImplementedError(
        f"StorageTensor: expand of {list(view.shape())} ({_names(view.axes)}) to {list(sizes)}; kv heads can be "
        f"repeated (repeat_kv), use .to_dense() first for the rest"
    )


@_aten(aten.view.default, aten._unsafe_view.default)
def _view(tensor: KVTensor, shape: list[int]) -> KVTensor:
    """Regroups the stored dimensions, which keep their order, into the wanted sizes."""
    view = tensor._view
    wanted = list(shape)
    if -1 in wanted:
        known = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(view.shape()) // max(known, 1)
    names = [name for axis in view.axes for name in axis if name != REPEAT or view.repeat != 1]
    axes: list[tuple[str, ...]] = []
    # From the right, so that of stored dimensions of size 1 tokens are matched before heads, and heads before rows.
    for size in reversed(wanted):
        axis: list[str] = []
        filled = 1
        while names and (filled != size or (size == 1 and not axis and view.size(names[-1]) == 1)):
            filled = filled * view.size(names[-1])
            axis.insert(0, names.pop())
            if axis[0] == REPEAT and names and names[-1] == HEAD and view.head_count == 1:
                axis.insert(0, names.pop())  # a single kv head stays with its repetition
        if filled != size:
            raise NotImplementedError(
                f"StorageTensor: view of {list(view.shape())} ({_names(view.axes)}) as {list(shape)} splits a stored "
                f"dimension; use .to_dense() first"
            )
        axes.insert(0, tuple(axis))
    if names:  # of size 1, for which no dimension was wanted
        axes[0] = (*names, *axes[0])
    return tensor.with_view(view.replace(axes=tuple(axes)))


def _narrow(view: View, name: str, begin: int, count: int) -> View:
    if name == ROW:
        return view.replace(row_begin=view.row_begin + begin, row_count=count)
    if name == HEAD:
        return view.replace(head_begin=view.head_begin + begin, head_count=count)
    return view.replace(kv_begin=view.kv_begin + begin, kv_count=count)


def _tokens(view: View) -> tuple[int, ...]:
    return (view.row_begin, view.row_count, view.kv_begin, view.kv_count, view.repeat)


def _names(axes: tuple[tuple[str, ...], ...]) -> str:
    return "[" + ", ".join("*".join(names) or "1" for names in axes) + "]"


def _stored_in(values: Iterable[Any]) -> list[KVTensor]:
    stored: list[KVTensor] = []
    for value in values:
        if isinstance(value, KVTensor):
            stored.append(value)
        elif isinstance(value, (list, tuple)):
            stored.extend(_stored_in(value))
    return stored


def _in_memory(values: Any) -> Any:
    if isinstance(values, KVTensor):
        return values.new_tokens
    if isinstance(values, dict):
        return {name: _in_memory(value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_in_memory(value) for value in values)
    return values
