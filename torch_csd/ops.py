"""The native ops: typed wrappers, fake kernels for tracing, errors as types. The only user of ``torch.ops.torch_csd``.

A handle is an int64 CPU tensor ``[drive, layer, epoch]`` (see csrc/ops.cpp). Positions are absolute tokens of a row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

import torch_csd._C  # noqa: F401  (loading it registers the ops)
from torch_csd.catalogue import ENTRY_BYTES, PAGE_TOKENS
from torch_csd.config import simd_name
from torch_csd.errors import (
    MemoryBudgetError,
    StaleTensorError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
)
from torch_csd.sparse import SparseArguments

_ops = torch.ops.torch_csd
_P = ParamSpec("_P")
_R = TypeVar("_R")

CAUSAL_NONE, CAUSAL_LOWER_RIGHT, CAUSAL_UPPER_LEFT = 0, 1, 2

_ERROR_TAG = re.compile(r"\[csd:(\w+)\] ([^\n]*)")
_ERRORS: dict[str, type[Exception]] = {
    "value": ValueError,
    "store": StoreError,
    "closed": StoreClosedError,
    "forked": StoreClosedError,
    "stale": StaleTensorError,
    "nospace": StoreFullError,
    "budget": MemoryBudgetError,
    "corrupt": StoreCorruptError,
    "internal": RuntimeError,
}


def _call(op: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Calls an op; its errors come back as the types of errors.py (the ABI carries nothing but their text)."""
    try:
        return op(*args, **kwargs)
    except MemoryError:
        raise MemoryError("no memory is left; lower memory_budget, or raise the process's limit (ulimit -v)") from None
    except RuntimeError as error:
        match = _ERROR_TAG.search(str(error))
        if match is None:
            raise
        raise _ERRORS[match.group(1)](match.group(2)) from None


# ---- cards --------------------------------------------------------------------------------------------------------


class Card(Protocol):
    """Who has a share in layers whose tokens are on a GPU (cuda/card.py); the others have none.

    ``append`` and ``attend`` return None where the drive is to do it, as it does everything else.
    """

    def append(self, handle: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None) -> LayerState | None: ...

    def attend(self, handle: Tensor, q: Tensor, **rules: object) -> tuple[Tensor, Tensor] | None: ...

    def settle(self, handle: Tensor | None = None) -> None:
        """Waits until what was appended to the layer, or to any, is where it goes; raises what went wrong with it."""

    def share(self, source: Tensor, handle: Tensor) -> None:
        """The layer is a fork of the source."""

    def keep_summary(self, handle: Tensor) -> None:
        """The layer keeps summaries of the pages that it fills, which the drive's own packer makes."""

    def forget(self, handle: Tensor) -> None:
        """The layer goes."""

    def close(self) -> None: ...


_drive_cards: dict[int, list[Card]] = {}  # by drive
_cards: dict[int, Card] = {}  # by layer


def add_card(drive: Tensor, card: Card) -> None:
    """Closed with the drive."""
    _drive_cards.setdefault(int(drive[0]), []).append(card)


def attach_card(handle: Tensor, card: Card) -> None:
    """The card has a share in the layer from now on, and in its forks."""
    _cards[int(handle[1])] = card


def _card_of(handle: Tensor) -> Card | None:
    return _cards.get(int(handle[1])) if _cards else None


def settle(handle: Tensor) -> None:
    """Until what the layer's card packed has arrived. Raises what went wrong; that append is undone then."""
    card = _card_of(handle)
    if card is not None:
        card.settle(handle)


# ---- stores and layers ------------------------------------------------------------------------------------------


_drive_numbers = itertools.count()
_layer_numbers = itertools.count()
_queue_numbers = itertools.count()
_reader_numbers = itertools.count()


def open_drive(
    directory: str,
    *,
    io_engine: str,
    simd: str,
    memory_budget_bytes: int,
    threads: int,
    queue_depth: int,
    read_ahead_bytes: int | None,
    resident: bool,
    checksums: bool,
    max_bytes: int = 0,
    durable_path: str = "",
    mode: str = "",
    store_id: bytes = bytes(16),
) -> Tensor:
    """A new drive's handle. ``mode`` ("create", "write", "read") and ``store_id`` are of a durable one's file."""
    drive = torch.tensor([next(_drive_numbers), -1, -1])
    read_ahead = -1 if read_ahead_bytes is None else read_ahead_bytes
    settings = (io_engine, simd, memory_budget_bytes, threads, queue_depth, read_ahead, resident, checksums, max_bytes)
    _call(_ops.open, drive, directory, *settings, durable_path, mode, _bytes_tensor(store_id))
    return drive


def close_drive(drive: Tensor) -> None:
    """Idempotent. Waits for I/O in flight; every handle of the drive is dead afterwards."""
    for card in _drive_cards.pop(int(drive[0]), ()):
        card.close()
    _call(_ops.close, drive)


def create_layer(
    drive: Tensor,
    *,
    number: int,
    num_kv_heads: int,
    head_dim_k: int,
    head_dim_v: int,
    dtype: torch.dtype,
    code_bits: int,
) -> Tensor:
    """A new, empty layer's handle. ``code_bits`` 8 or 4: all but the newest pages are quantised; 0: none.

    ``number`` is what errors call it.
    """
    handle = torch.tensor([int(drive[0]), next(_layer_numbers), -1])
    _call(_ops.create_layer, handle, num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits, number)
    return handle


def layer_handle(handle: Tensor, layer: int) -> Tensor:
    """The handle of a layer of the same drive, as it is now."""
    return torch.tensor([int(handle[0]), layer, -1])


def fork_layer(source: Tensor) -> Tensor:
    """The handle of a new layer that shares the source's pages."""
    settle(source)
    handle = torch.tensor([int(source[0]), next(_layer_numbers), -1])
    _call(_ops.fork_layer, handle, source)
    card = _card_of(source)
    if card is not None:
        attach_card(handle, card)
        card.share(source, handle)
    return handle


def drop_layer(handle: Tensor) -> None:
    card = _cards.pop(int(handle[1]), None)
    if card is not None:
        card.forget(handle)
    _call(_ops.drop_layer, handle)


def keep_summary(handle: Tensor, kind: int) -> None:
    """From now on the layer keeps what passes choose pages by (``kind``: SUMMARY_... of sparse.py)."""
    card = _card_of(handle)
    if card is not None:
        card.keep_summary(handle)
    _call(_ops.keep_summary, handle, kind)


class LayerState(NamedTuple):
    """What a layer holds at one moment."""

    epoch: int  # changes whenever a token can no longer be read at its place
    begin: int  # the first position that can be read
    lengths: list[int]  # of each row, in absolute tokens; empty before the first append


def layer_info(handle: Tensor) -> LayerState:
    epoch, begin, *lengths = _call(_ops.layer_info, handle).tolist()
    return LayerState(epoch, begin, lengths)


def append(handle: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> LayerState:
    """The layer as this append left it: :func:`layer_info` without another call, or another thread in between."""
    counts = None if lengths is None else list(lengths)
    card = _card_of(handle)
    if card is not None:
        state = card.append(handle, k, v, counts)
        if state is not None:
            return state
        k, v = k.cpu(), v.cpu()  # not to the op of their device, which would ask the card again
    return append_on_drive(handle, k, v, counts)


def append_on_drive(handle: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None = None) -> LayerState:
    """:func:`append` that no card has a share in."""
    epoch, begin, *row_lengths = _call(_ops.append.default, handle, k, v, lengths).tolist()
    return LayerState(epoch, begin, row_lengths)


# ---- pages that somebody outside of the drive works with ---------------------------------------------------------

_lease_numbers = itertools.count()

# Columns of a table of leased pages, int64. PAGE: a number that tells it from others while it is leased; rows may share
# one. FILE_OFFSET: -1 if it is in memory. CHECKSUM: of its bytes on the drive.
PAGE, ROW, INDEX, FILE_OFFSET, CHECKSUM = range(5)


def new_lease(drive: Tensor) -> Tensor:
    """The handle of a lease that is still to be taken: ``drive`` is the handle of a drive or of a layer."""
    return torch.tensor([int(drive[0]), next(_lease_numbers), -1])


def lease(lease: Tensor, handle: Tensor, *, row_begin: int, row_count: int, kv_begin: int, kv_end: int) -> Tensor:
    """The full pages of a span of a layer, ``[pages, 5]``: they stay as they are until :func:`end_lease`.

    By row and index; each row's up to the first that may still change.
    """
    return _call(_ops.lease, lease, handle, row_begin, row_count, kv_begin, kv_end)


def copy_leased(lease: Tensor, places: Sequence[int], target: Tensor, offset: int) -> Tensor:
    """Copies pages of a lease (by place in its table) to ``target``, uint8, one behind another from ``offset`` on.

    Only those that are in memory: the others' places are left. Returns ``[pages, 2]``: -1 or the file offset, checksum.
    """
    return _call(_ops.copy_leased, lease, list(places), target, offset)


def append_reserved(
    lease: Tensor, handle: Tensor, k: Tensor, v: Tensor, *, reserved_begin: int, reserved_count: int
) -> tuple[LayerState, Tensor]:
    """:func:`append` of k and v with ``reserved_count`` tokens more from token ``reserved_begin`` of the append on.

    Those take whole pages, which the caller fills: the lease's table, by row and index, tells where each is to go.
    Nothing else can be done to the layer before each of them was given to :func:`fill_reserved` (in memory) or
    :func:`finish_reserved` (on the drive).
    """
    state, table = _call(_ops.append_reserved, lease, handle, k, v, reserved_begin, reserved_count)
    epoch, begin, *lengths = state.tolist()
    return LayerState(epoch, begin, lengths), table


def fill_reserved(lease: Tensor, places: Sequence[int], source: Tensor, offset: int) -> None:
    """The bytes of reserved pages in memory: ``source``, uint8, has them one behind another from ``offset`` on."""
    _call(_ops.fill_reserved, lease, list(places), source, offset)


def finish_reserved(lease: Tensor, places: Sequence[int], checksums: Sequence[int]) -> None:
    """Reserved pages of the drive are written; their checksums."""
    _call(_ops.finish_reserved, lease, list(places), list(checksums))


def end_lease(lease: Tensor) -> None:
    """Idempotent. An append whose reserved pages are not all filled is undone."""
    _call(_ops.end_lease, lease)


def truncate(handle: Tensor, lengths: Sequence[int]) -> None:
    settle(handle)
    _call(_ops.truncate, handle, list(lengths))


def trim(handle: Tensor, begin: int) -> None:
    settle(handle)
    _call(_ops.trim, handle, begin)


def reorder(handle: Tensor, index: Sequence[int]) -> None:
    settle(handle)
    _call(_ops.reorder, handle, list(index))


def flush(drive: Tensor) -> None:
    for card in _drive_cards.get(int(drive[0]), ()):
        card.settle()
    _call(_ops.flush, drive)


# ---- what outlives the process ----------------------------------------------------------------------------------


def adopt(drive: Tensor, snapshots: Sequence[int], counts: Sequence[int], entries: bytes) -> list[int]:
    """The space that committed sequences take: ``counts[i]`` page entries of ``entries`` are those of snapshot i.

    Returns the snapshots whose pages lie outside the file, or over others'.
    """
    return _call(_ops.adopt, drive, list(snapshots), list(counts), _bytes_tensor(entries)).tolist()


def restore_layer(
    drive: Tensor,
    *,
    num_kv_heads: int,
    head_dim_k: int,
    head_dim_v: int,
    dtype: torch.dtype,
    code_bits: int,
    number: int,
    begin: int,
    first_pages: Sequence[int],
    lengths: Sequence[int],
    entries: bytes,
    snapshot: int,
) -> Tensor:
    """The handle of a layer as a snapshot has it."""
    handle = torch.tensor([int(drive[0]), next(_layer_numbers), -1])
    geometry = (num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits)
    rows = (list(first_pages), list(lengths), _bytes_tensor(entries))
    _call(_ops.restore_layer, handle, *geometry, number, begin, *rows, snapshot)
    return handle


class CommittedLayer(NamedTuple):
    begin: int
    rows: list[tuple[int, int]]  # first page, length in tokens
    entries: bytes  # of the pages of all rows


def commit(drive: Tensor, snapshot: int, handles: Sequence[Tensor]) -> list[CommittedLayer]:
    """Puts what these layers hold on the drive for good. Its space is held by the snapshot until :func:`release`."""
    for handle in handles:
        settle(handle)
    numbers, entries = _call(_ops.commit, drive, snapshot, [int(handle[1]) for handle in handles])
    values, entries = iter(numbers.tolist()), entries.numpy().tobytes()
    tables = []
    place = 0
    for _ in handles:
        begin, row_count = next(values), next(values)
        rows = [(next(values), next(values)) for _ in range(row_count)]
        page_count = sum(-(-length // PAGE_TOKENS) - first_page for first_page, length in rows)
        tables.append(CommittedLayer(begin, rows, entries[place : place + ENTRY_BYTES * page_count]))
        place += ENTRY_BYTES * page_count
    return tables


def release(drive: Tensor, snapshot: int) -> None:
    _call(_ops.release, drive, snapshot)


class BadPage(NamedTuple):
    row: int
    index: int
    file_offset: int
    error: int  # errno of a read that failed; 0: it came back with other bytes than were written


def verify(handle: Tensor) -> list[BadPage]:
    """Pages of a layer that the drive does not give back as they were written."""
    settle(handle)
    return [BadPage(*page) for page in _call(_ops.verify, handle).tolist()]


def shrink(drive: Tensor) -> int:
    """Gives the unused end of the file back to the file system. Returns its bytes."""
    return int(_call(_ops.shrink, drive))


def check_room(drive: Tensor, size_bytes: int) -> None:
    """Raises StoreFullError, with the numbers, if so many bytes of pages more cannot be stored."""
    _call(_ops.check_room, drive, size_bytes)


def check_summary_room(
    drive: Tensor,
    *,
    num_kv_heads: int,
    head_dim_k: int,
    head_dim_v: int,
    dtype: torch.dtype,
    code_bits: int,
    kinds: Sequence[int],
    layers: Sequence[Tensor],
    layer_count: int,
    row_count: int,
    q_len: int,
) -> None:
    """Raises MemoryBudgetError, with the numbers, if memory cannot hold the summaries of ``q_len`` tokens more in each
    row of ``layer_count`` layers: of ``layers`` (handles of those that there are), and new ones."""
    geometry = (num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits)
    numbers = [int(handle[1]) for handle in layers]
    _call(_ops.check_summary_room, drive, *geometry, list(kinds), numbers, layer_count, row_count, q_len)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


# ---- computing --------------------------------------------------------------------------------------------------


def attend(
    handle: Tensor,
    q: Tensor,
    *,
    scale: float,
    head_dim_v: int,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal: int = CAUSAL_NONE,
    window: int = 0,
    softcap: float = 0.0,
    row_begin: int = 0,
    kv_begin: int = 0,
    kv_end: int = -1,
) -> tuple[Tensor, Tensor]:
    """Exact attention of ``q`` over stored tokens; see :meth:`KVStore.attend`.

    ``kv_begin=-1``: from the first readable token on; ``kv_end=-1``: to each row's own length.
    """
    rules = (mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end, head_dim_v)
    card = None if torch.compiler.is_compiling() else _card_of(handle)
    if card is not None:
        card.settle(handle)
        if not (torch.is_grad_enabled() and q.requires_grad):
            return _attend_with_card(card, handle, q, *rules)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _call(_ops.attend.default, handle, q, *rules)
    # Past the Python that refuses a backward (the end of this file), which costs as much as the rest of the op.
    with torch._C._AutoDispatchBelowAutograd():
        return _call(_ops.attend.default, handle, q, *rules)


def _attend_with_card(
    card: Card, handle, q, mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end,
    head_dim_v,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result = card.attend(
        handle,
        q,
        scale=scale,
        head_dim_v=head_dim_v,
        mask=mask,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        causal=causal,
        window=window,
        softcap=softcap,
        row_begin=row_begin,
        kv_begin=kv_begin,
        kv_end=kv_end,
    )
    if result is not None:
        return result
    rules = (mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end, head_dim_v)
    return _attend_copies(handle, q, *rules)


def _attend_copies(handle: Tensor, q: Tensor, *rules: object) -> tuple[Tensor, Tensor]:
    """Beside the drive: q goes to the processor, out and lse come back."""
    out, lse = _call(_ops.attend.default, handle, q.detach().cpu(), *map(_on_cpu, rules))
    return out.to(q.device), lse.to(q.device)


def attend_on_drive(
    handle: Tensor,
    q: Tensor,
    *,
    scale: float,
    head_dim_v: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    causal: int,
    window: int,
    softcap: float,
    row_begin: int,
    kv_begin: int,
    kv_end: int,
) -> tuple[Tensor, Tensor]:
    """:func:`attend` of tensors on the CPU, all of it beside the drive."""
    rules = (mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end, head_dim_v)
    with torch._C._AutoDispatchBelowAutograd():
        return _call(_ops.attend.default, handle, q, *rules)


def attend_sparse(
    handle: Tensor,
    q: Tensor,
    settings: SparseArguments,
    *,
    scale: float,
    head_dim_v: int,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    causal: int = CAUSAL_NONE,
    window: int = 0,
    softcap: float = 0.0,
    row_begin: int = 0,
    kv_begin: int = 0,
    kv_end: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over a choice of the stored tokens: ``(out, lse, missing)``; see :meth:`KVStore.attend`."""
    what = (mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end, head_dim_v)
    if not torch.compiler.is_compiling():
        settle(handle)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _call(_ops.attend_sparse.default, handle, q, *what, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return _call(_ops.attend_sparse.default, handle, q, *what, *settings)


def prefetch(
    handle: Tensor,
    q: Tensor,
    settings: SparseArguments,
    *,
    scale: float,
    softcap: float = 0.0,
    row_begin: int = 0,
    kv_begin: int = 0,
    kv_end: int = -1,
) -> None:
    """Begins to read what `attend_sparse` would choose for ``q``; see :meth:`KVStore.prefetch`."""
    settle(handle)
    _call(_ops.prefetch, handle, q.detach(), scale, softcap, row_begin, kv_begin, kv_end, *settings)


def scores(handle: Tensor, q: Tensor, *, row_begin: int, kv_begin: int, kv_end: int) -> Tensor:
    """``q @ K^T``: ``[batch, num_heads, q_len, kv_end - kv_begin]`` in q's dtype, unscaled."""
    if not torch.compiler.is_compiling():
        settle(handle)
    return _call(_ops.scores, handle, q, row_begin, kv_begin, kv_end)


def weighted_sum(handle: Tensor, p: Tensor, *, row_begin: int, kv_begin: int, kv_end: int, head_dim_v: int) -> Tensor:
    """``p @ V``: ``[batch, num_heads, q_len, head_dim_v]`` in p's dtype."""
    if not torch.compiler.is_compiling():
        settle(handle)
    return _call(_ops.weighted_sum, handle, p, row_begin, kv_begin, kv_end, head_dim_v)


def read(
    handle: Tensor,
    *,
    values: bool,
    dtype: torch.dtype,
    row_begin: int,
    row_count: int,
    kv_begin: int,
    kv_end: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """Stored K, or with ``values`` V: ``[row_count, num_kv_heads, kv_end - kv_begin, head_dim]``, dense, on the CPU."""
    if not torch.compiler.is_compiling():
        settle(handle)
    return _call(_ops.read, handle, values, dtype, row_begin, row_count, kv_begin, kv_end, num_kv_heads, head_dim)


# ---- quantised weights of linear layers (csrc/kernels/weights.h) --------------------------------------------------

# simd: as in KVStore; None: $TORCH_CSD_SIMD, else the fastest this processor has.


def weight_row_bytes(bits: int, in_features: int) -> int:
    """Bytes of one row (output feature) of ``in_features`` codes of ``bits`` bits, with their scales and zeros."""
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if in_features < 1:
        raise ValueError(f"in_features must be at least 1, got {in_features}")
    group_count = -(-in_features // 64)
    return -(-group_count * (64 * bits // 8 + 4) // 64) * 64


def quantise_rows(weight: Tensor, bits: int, *, simd: str | None = None) -> Tensor:
    """A weight ``[out_features, in_features]`` (float32, bfloat16, float16) as uint8 ``[out_features, row_bytes]``.

    Groups of 64 input features have a scale and a zero point each (FlexGen, 2303.06865, section 4): no value is off by
    more than half its group's scale. A group that is not all finite, or spans more than float32 can, becomes NaN.
    """
    return _call(_ops.quantise_rows.default, weight.detach(), bits, simd_name(simd))


def dequantise_rows(
    rows: Tensor, *, bits: int, in_features: int, dtype: torch.dtype, simd: str | None = None
) -> Tensor:
    """``[out_features, in_features]`` of ``dtype`` from what :func:`quantise_rows` made, or any slice of its rows."""
    return _call(_ops.dequantise_rows.default, rows, bits, in_features, dtype, simd_name(simd))


def quantised_linear(
    x: Tensor, rows: Tensor, *, bits: int, bias: Tensor | None = None, simd: str | None = None
) -> Tensor:
    """``x @ weight.T + bias``: ``[..., out_features]`` in x's dtype, in float32 until then.

    For few rows of x; weights/quantised.py knows where another way is faster.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        rows: uint8 ``[out_features, row_bytes]``, contiguous, at any address.
        bias: ``[out_features]`` in x's dtype.

    Raises:
        ValueError: a shape, a dtype or ``bits`` does not fit.
    """
    flat = x.reshape(-1, x.shape[-1])
    arguments = (flat, rows, bits, bias, simd_name(simd))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = _call(_ops.quantised_linear.default, *arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():  # as in attend
            out = _call(_ops.quantised_linear.default, *arguments)
    return out.view(*x.shape[:-1], rows.shape[0])


# ---- the drive's I/O, for memory of others ------------------------------------------------------------------------


def io_open(drive: Tensor, *, depth: int) -> Tensor:
    """A new queue of the drive's own I/O engine over its file. It ends with :func:`io_close`, or with the drive.

    Thread-safe, one call at a time; no call waits for what else the drive does.
    """
    queue = torch.tensor([int(drive[0]), next(_queue_numbers), -1])
    _call(_ops.io_open, queue, drive, depth)
    return queue


def io_submit(
    queue: Tensor, *, write: bool, file_offset: int, memory: Tensor, offset: int, byte_count: int, tag: int
) -> None:
    """Begins to move bytes between the file and ``memory`` (uint8, CPU, contiguous), which is kept alive until then.

    ``file_offset``, ``byte_count`` and the address of ``memory[offset]`` are multiples of 4096.

    Raises:
        ValueError: they are not, or the range lies outside of the memory, or of where the file has pages.
        StoreError: a write, but the drive only reads. RuntimeError: as many requests are in flight as it is deep.
    """
    if not memory.is_cpu:
        raise ValueError(f"memory must be in host memory, got a tensor on {memory.device}")
    _call(_ops.io_submit, queue, write, file_offset, memory, offset, byte_count, tag)


def io_reap(queue: Tensor, *, wait: bool = False) -> list[tuple[int, int]]:
    """Requests that are done: ``(tag, errno)``, 0 for success; EIO was tried twice. wait: at least one, if there is any
    in flight."""
    return [(tag, error) for tag, error in _call(_ops.io_reap, queue, wait).tolist()]


def io_close(queue: Tensor) -> None:
    """Waits for what is in flight; its completions are lost. Idempotent."""
    _call(_ops.io_close, queue)


def file_path(drive: Tensor) -> str:
    """By which another opener of this process reaches the drive's file, which may have no name."""
    return _text(_call(_ops.file_path, drive))


# ---- files that are not ours ---------------------------------------------------------------------------------------


class InputFile(NamedTuple):
    """A file that a reader has opened, as it was then or when it was refreshed."""

    number: int  # by which the reader knows it
    size_bytes: int
    mtime_ns: int
    direct_io: bool
    device: int  # st_dev and st_ino: the same for two paths to one file
    inode: int


def reader_open(*, io_engine: str = "auto", queue_depth: int = 32, staging: Tensor | None = None) -> Tensor:
    """A reader of files that others wrote, into memory that the caller owns, in the background. It never writes.

    It ends with :func:`reader_close`. Thread-safe; what waits does not keep other Python threads from running. Each
    function of it raises StoreClosedError when it is closed, and in a forked child.

    Args:
        io_engine: ``"auto"``, ``"io_uring"`` or ``"pread"``.
        queue_depth: Requests of at most 1 MiB that are in flight at once.
        staging: Memory that is mostly read to (uint8, CPU, contiguous): registered with io_uring where that is
            possible, and kept until the reader is closed.
    """
    reader = torch.tensor([next(_reader_numbers), -1, -1])
    if staging is not None and not staging.is_cpu:
        raise ValueError(f"staging must be in host memory, got a tensor on {staging.device}")
    _call(_ops.reader_open, reader, io_engine, queue_depth, staging)
    return reader


def reader_add_file(reader: Tensor, path: str) -> InputFile:
    """Opens a regular file, through symbolic links if need be. It stays this file when another takes its name.

    Raises:
        StoreError: it is not there, no regular file or may not be read, or the I/O engine does not work on it.
    """
    return _input_file(_call(_ops.reader_add_file, reader, path))


def reader_refresh_file(reader: Tensor, number: int) -> InputFile:
    """Takes the file as it is now: what was done to it up to here is no change to those who wait for it.

    What of it is being read meanwhile may be of before or after.

    Raises:
        StoreError: it is shorter than it was. ValueError: there is no such file.
    """
    return _input_file(_call(_ops.reader_refresh_file, reader, number))


def _input_file(values: Tensor) -> InputFile:
    number, size_bytes, mtime_ns, direct_io, device, inode = values.tolist()
    return InputFile(number, size_bytes, mtime_ns, direct_io == 1, device, inode)


def reader_read(
    reader: Tensor,
    *,
    files: Sequence[int],
    offsets: Sequence[int],
    byte_counts: Sequence[int],
    memory: Tensor,
    memory_offsets: Sequence[int],
    background: bool = False,
) -> int:
    """Begins to read ranges of files, one for each entry, and returns the number of a ticket at once.

    The 4096-byte blocks that cover a range come to ``memory`` (uint8, CPU, contiguous, kept until then) from
    ``memory_offsets[i]`` on, an address that is a multiple of 4096: the first byte asked for to ``memory_offsets[i] +
    offsets[i] % 4096``. The room behind the end of a file, up to a multiple of 4096, may or may not be written to.

    Tickets are read in the order asked for; those in the ``background`` while no other has anything left to begin.

    Raises:
        ValueError: a range is not in its file, or its blocks not in the memory, or not aligned. Nothing is read then.
    """
    if not memory.is_cpu:
        raise ValueError(f"memory must be in host memory, got a tensor on {memory.device}")
    return _call(_ops.reader_read, reader, files, offsets, byte_counts, memory, memory_offsets, background)


def reader_wait(reader: Tensor, ticket: int) -> None:
    """Returns when all of the ticket is there, which is then in the foreground; forgets it.

    Raises:
        StoreError: something could not be read (EIO was tried twice), or a file has changed since it was added.
        ValueError: there is no such ticket (any more).
    """
    _call(_ops.reader_wait, reader, ticket)


def reader_is_done(reader: Tensor, ticket: int) -> bool:
    """Whether :func:`reader_wait` would return, or raise, at once."""
    return _call(_ops.reader_is_done, reader, ticket)


def reader_drop(reader: Tensor, ticket: int) -> None:
    """Forgets the ticket. What has not begun is never read, what has is waited for: no memory is touched afterwards.

    Does nothing for a ticket that is not there, or a reader that is closed.
    """
    _call(_ops.reader_drop, reader, ticket)


def reader_close(reader: Tensor) -> None:
    """Waits for what is in flight; whoever waits for what has not begun gets StoreClosedError. Idempotent."""
    _call(_ops.reader_close, reader)


def reader_stats(reader: Tensor) -> dict[str, int | float | str]:
    """``io_engine`` and why (``io_reason``), ``file_count`` and ``direct_file_count``, ``bytes_read`` of whole tickets
    as they were asked for, ``bytes_moved`` and ``request_count`` with their blocks, ``wait_s`` that callers were
    blocked in :func:`reader_wait`, ``busy_s`` with something in flight."""
    return json.loads(_text(_call(_ops.reader_stats, reader)))


# ---- reporting --------------------------------------------------------------------------------------------------


def _text(characters: Tensor) -> str:
    return bytes(characters.tolist()).decode()


def stats(drive: Tensor) -> dict[str, int | float | str | bool]:
    return json.loads(_text(_call(_ops.stats, drive)))


def probe(directory: str, io_engine: str) -> dict[str, str | bool | list[str]]:
    file_system, device, engine, direct_io, reason, *verdicts = _text(_call(_ops.probe, directory, io_engine)).split(
        "\n"
    )
    return {
        "file_system": file_system,
        "device": device,
        "io_engine": engine,
        "direct_io": direct_io == "1",
        "reason": reason,
        "verdicts": verdicts,
    }


class Header(NamedTuple):
    """What the first bytes of a file of pages say."""

    durable: bool  # else a scratch file
    store_id: bytes  # the same as in the catalogue; zeros in a scratch file


def read_header(path: str) -> Header:
    """Raises StoreCorruptError for a file that is none, StoreError for one that cannot be read or is too new."""
    lifetime, *store_id = _call(_ops.read_header, path).tolist()
    return Header(lifetime == 1, bytes(store_id))


def supported_simd() -> list[str]:
    """Instruction sets this processor runs, slowest first."""
    return _text(_call(_ops.supported_simd)).split(",")


# ---- tracing: shapes without data ---------------------------------------------------------------------------------


@torch.library.register_fake("torch_csd::layer_info")
def _(handle):
    return handle.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("torch_csd::append")
def _(handle, k, v, lengths=None):
    return handle.new_empty(2 + k.shape[0])


for _name in (
    "open",
    "close",
    "create_layer",
    "fork_layer",
    "drop_layer",
    "keep_summary",
    "truncate",
    "trim",
    "reorder",
    "flush",
    "io_open",
    "io_submit",
    "io_close",
):

    @torch.library.register_fake(f"torch_csd::{_name}")
    def _(*args, **kwargs):
        return None


@torch.library.register_fake("torch_csd::io_reap")
def _(queue, wait):
    return queue.new_empty(torch.library.get_ctx().new_dynamic_size(), 2)


for _name in ("stats", "probe", "read_header", "supported_simd", "file_path"):

    @torch.library.register_fake(f"torch_csd::{_name}")
    def _(*args):
        return torch.empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("torch_csd::attend")
def _(
    handle,
    q,
    mask,
    sinks,
    alibi_slopes,
    scale,
    causal,
    window,
    softcap,
    row_begin,
    kv_begin,
    kv_end,
    head_dim_v,
):
    return q.new_empty((*q.shape[:-1], head_dim_v)), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("torch_csd::attend_sparse")
def _(
    handle, q, mask, sinks, alibi_slopes, scale, causal, window, softcap, row_begin, kv_begin, kv_end, head_dim_v, *_
):
    per_query = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], head_dim_v)), per_query, torch.empty_like(per_query)


@torch.library.register_fake("torch_csd::prefetch")
def _(handle, q, *_):
    return None


@torch.library.register_fake("torch_csd::scores")
def _(handle, q, row_begin, kv_begin, kv_end):
    return q.new_empty((*q.shape[:-1], kv_end - kv_begin))


@torch.library.register_fake("torch_csd::weighted_sum")
def _(handle, p, row_begin, kv_begin, kv_end, head_dim_v):
    return p.new_empty((*p.shape[:-1], head_dim_v))


@torch.library.register_fake("torch_csd::read")
def _(handle, values, dtype, row_begin, row_count, kv_begin, kv_end, num_kv_heads, head_dim):
    return torch.empty((row_count, num_kv_heads, kv_end - kv_begin, head_dim), dtype=dtype)


@torch.library.register_fake("torch_csd::quantise_rows")
def _(weight, bits, simd):
    return weight.new_empty((weight.shape[0], weight_row_bytes(bits, weight.shape[1])), dtype=torch.uint8)


@torch.library.register_fake("torch_csd::dequantise_rows")
def _(rows, bits, in_features, dtype, simd):
    return rows.new_empty((rows.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("torch_csd::quantised_linear")
def _(x, rows, bits, bias, simd):
    return x.new_empty((x.shape[0], rows.shape[0]))


# ---- tensors on other devices: the query goes to the drive, the output comes back ----------------------------------


def _on_cpu(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value


# A graph calls these without the wrappers above, so a card is asked here, too.
@torch.library.impl("torch_csd::append", "CUDA")
def _(handle, k, v, lengths=None):
    card = _card_of(handle)
    state = None if card is None else card.append(handle, k, v, lengths)
    if state is not None:
        return torch.tensor([state.epoch, state.begin, *state.lengths])
    return _ops.append(handle, k.cpu(), v.cpu(), lengths)


@torch.library.impl("torch_csd::attend", "CUDA")
def _(handle, q, *args):
    card = _card_of(handle)
    if card is None:
        return _attend_copies(handle, q, *args)
    card.settle(handle)
    return _attend_with_card(card, handle, q, *args)


@torch.library.impl("torch_csd::attend_sparse", "CUDA")
def _(handle, q, *args):
    settle(handle)
    return tuple(result.to(q.device) for result in _ops.attend_sparse(handle, q.cpu(), *map(_on_cpu, args)))


@torch.library.impl("torch_csd::prefetch", "CUDA")
def _(handle, q, *args):
    settle(handle)
    _ops.prefetch(handle, q.cpu(), *args)


@torch.library.impl("torch_csd::scores", "CUDA")
def _(handle, q, *args):
    settle(handle)
    return _ops.scores(handle, q.cpu(), *args).to(q.device)


@torch.library.impl("torch_csd::weighted_sum", "CUDA")
def _(handle, p, *args):
    settle(handle)
    return _ops.weighted_sum(handle, p.cpu(), *args).to(p.device)


# ---- gradients: the forward works wherever torch records it, the backward says why it cannot -----------------------


def _no_backward(ctx, *gradients):
    raise NotImplementedError(
        "attention over stored K and V is not differentiable: the cache on the drive holds no graph; "
        "run inference under torch.no_grad(), or train with tensors in memory"
    )


def _no_linear_backward(ctx, *gradients):
    raise NotImplementedError(
        "a linear layer on quantised rows is not differentiable; run inference under torch.no_grad(), or use "
        "dequantise_rows and torch.nn.functional.linear"
    )


for _name in ("attend", "attend_sparse", "scores", "weighted_sum"):
    torch.library.register_autograd(f"torch_csd::{_name}", _no_backward)
torch.library.register_autograd("torch_csd::quantised_linear", _no_linear_backward)
