"""KVStore: keys and values that live on a drive, layer by layer, row by row. Knows no model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS, check_name, page_bytes
from torch_csd.config import IO_ENGINES, StoreConfig, as_int, directory_path
from torch_csd.drive import CODE_BITS, Drive, DurableDrive, StoredLayer, dtype_text, find_store, open_writer
from torch_csd.errors import StoreClosedError, StoreError
from torch_csd.sparse import QUERIES_MAX, Sparse, check_sparse, op_arguments, summary_kinds

CAUSAL = {
    False: ops.CAUSAL_NONE,
    True: ops.CAUSAL_LOWER_RIGHT,
    "lower_right": ops.CAUSAL_LOWER_RIGHT,
    "upper_left": ops.CAUSAL_UPPER_LEFT,
}


class PrefixMatch(NamedTuple):
    """A committed sequence that begins like some tokens."""

    name: str
    length: int  # tokens that agree


class KVStore:
    """Keys and values on a drive, and exact attention computed where they are.

    A store holds layers, numbered by the caller and created by the first :meth:`append`; a layer holds ``batch`` rows
    (sequences), which may differ in length. Token positions are absolute: trimming old tokens does not renumber.
    The file is *scratch*: nothing is left in ``directory`` however the process ends. With ``durable`` and a ``name`` it
    is kept: :meth:`commit` makes all that was appended so far survive the process, kill -9 and power loss, and
    :meth:`open` finds it again. The durable sequences of a directory share a file, which one process at a time writes.

    Args:
        directory: where the file lives; ``None``: ``$TORCH_CSD_DIRECTORY``, else the temporary directory.
        memory_budget: bounds the memory for pages, reads in flight and partial results, whatever the context length.
            An int (bytes) or text such as ``"512MiB"``. What fits stays in memory and is never read.
        kv_dtype: dtype on the drive (float32, bfloat16, float16, int8, int4 or their names); ``None``: as appended.
            int8 and int4 quantise all but the newest 65 to 128 tokens of a row: K per channel over a page of 64
            tokens, V per token, each value off by at most half a step: (max - min) / 255 / 2 or / 15 / 2 of its group.
        io_engine: ``"auto"``, ``"io_uring"`` or ``"pread"``. Where the kernel refuses io_uring later on (a container's
            seccomp filter), the store goes on with pread and warns once.
        threads: workers for reading and arithmetic; ``None``: ``torch.get_num_threads()``.
        queue_depth: reads in flight during a call, all workers together.
        read_ahead: memory for what is read before it is needed, while the caller computes: attention that goes over
            the layers in the same order again and again finds its next pages there. Part of ``memory_budget``.
            ``None``: as much as a call reads, up to 256 MiB and 3/8 of the budget, or half of that, up to 3/4 of the
            budget; ``0``: nothing is read ahead.
        simd: ``"serial"``, ``"avx2"``, ``"avx512"``, ``"avx512vnni"``; ``None``: ``$TORCH_CSD_SIMD``, else the fastest
            there is.
        resident: ``False`` sends every full page to the drive even if there is room in memory (cold benchmarks).
        max_bytes: what the file may take on the drive, that of all sequences if it is durable; ``None``: any.
        durable: keeps what is committed. The stores of a process that share a directory share their settings, too.
        name: of the durable sequence that this is to become; must be new. At most 200 characters, no "/".
        metadata: what JSON can hold, kept with a durable sequence for its readers; the store does not look at it.
        checksums: ``False`` does not compare pages with their checksums when they are read from the drive.
        sparse: how attention chooses among the stored tokens where nothing else is asked for; ``None``: it is exact.
            May be assigned between calls. What it chooses by is kept in memory, within ``memory_budget``, from the
            beginning; where it was not, the first sparse call reads all pages once.
        executor: where exact attention of queries on a GPU is computed: ``"near"`` the drive, by the processor;
            ``"gpu"``: on the card, to which pages are brought; ``"auto"``: wherever it is estimated to be faster, by
            rates that are measured while it runs. Tails are attended to near the drive in any case.
        gpu_budget: GPU memory for a fixed share of the pages, which is then never read or moved again.
        gpu_staging: GPU memory for pages on their way, and as much pinned host memory where they go through it; both
            besides ``memory_budget``. At least two pages.
        gpu_io: ``"gds"``: GPUDirect Storage by kvikio; ``"pinned"``: the I/O engine and pinned memory; ``"auto"``: gds
            where a probe proved that it moves bytes directly (see ``torch-csd probe``).

    Raises:
        StoreError: the directory is missing, is not one, or cannot be written; there is a sequence ``name`` already.
        StoreBusyError: another process has the directory's durable store open for writing.
        StoreFullError: the drive is full.
        MemoryBudgetError: the budget is below the minimum.
        GpuUnavailableError: ``executor="gpu"`` or ``gpu_io="gds"`` cannot be had here; the text says why.
        ValueError: any other bad setting.

    Example:
        >>> store = KVStore("/nvme/kv", memory_budget="512MiB")
        >>> store.append(0, k, v)                       # [batch, num_kv_heads, tokens, head_dim]
        >>> out, lse = store.attend(0, q, causal=True)  # [batch, num_heads, q_len, head_dim]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        memory_budget: int | str = "1GiB",
        kv_dtype: torch.dtype | str | None = None,
        io_engine: str = "auto",
        threads: int | None = None,
        queue_depth: int = 32,
        read_ahead: int | str | None = None,
        simd: str | None = None,
        resident: bool = True,
        max_bytes: int | str | None = None,
        durable: bool = False,
        name: str | None = None,
        metadata: dict | None = None,
        checksums: bool = True,
        sparse: Sparse | None = None,
        executor: str = "auto",
        gpu_budget: int | str = 0,
        gpu_staging: int | str = "256MiB",
        gpu_io: str = "auto",
    ) -> None:
        check_sparse(sparse)
        config = StoreConfig.make(
            directory,
            memory_budget=memory_budget,
            kv_dtype=kv_dtype,
            io_engine=io_engine,
            simd=simd,
            threads=threads,
            queue_depth=queue_depth,
            read_ahead=read_ahead,
            resident=resident,
            max_bytes=max_bytes,
            checksums=checksums,
            executor=executor,
            gpu_budget=gpu_budget,
            gpu_staging=gpu_staging,
            gpu_io=gpu_io,
        )
        if not durable and (name is not None or metadata is not None):
            raise ValueError("only a durable store has a name and metadata; pass durable=True with them")
        if durable and name is None:
            raise ValueError('a durable store needs a name: pass name="..."')
        metadata = _checked_metadata(metadata)
        if not durable:
            drive = Drive(config)
            drive.acquire()
        else:
            check_name(name)
            drive = open_writer(config, create=True)
            try:
                drive.claim(name, new=True)
            except BaseException:
                drive.release()
                raise
        self._attach(drive, config.kv_dtype, name, metadata)
        self._sparse = sparse

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | None,
        name: str,
        *,
        read_only: bool = False,
        device: torch.device | str = "cpu",
        memory_budget: int | str = "1GiB",
        io_engine: str = "auto",
        threads: int | None = None,
        queue_depth: int = 32,
        read_ahead: int | str | None = None,
        simd: str | None = None,
        resident: bool = True,
        max_bytes: int | str | None = None,
        checksums: bool = True,
        sparse: Sparse | None = None,
        executor: str = "auto",
        gpu_budget: int | str = 0,
        gpu_staging: int | str = "256MiB",
        gpu_io: str = "auto",
    ) -> KVStore:
        """The sequence ``name`` as it was last committed, bit for bit.

        Args:
            read_only: needs no lock: several processes may read while one writes. Appending and committing are errors.
                What the writer commits meanwhile is not seen.
            device: of the tokens that will be appended, and of what is read.
            Others as for the class; ``kv_dtype`` is that of the sequence.

        Raises:
            StoreError: there is no such store or sequence, or it is of another version of the format.
            StoreBusyError: another process has the store open for writing, or another store here the sequence.
            StoreCorruptError: its files are damaged.
        """
        config = StoreConfig.make(
            directory,
            memory_budget=memory_budget,
            kv_dtype=None,
            io_engine=io_engine,
            simd=simd,
            threads=threads,
            queue_depth=queue_depth,
            read_ahead=read_ahead,
            resident=resident,
            max_bytes=max_bytes,
            checksums=checksums,
            executor=executor,
            gpu_budget=gpu_budget,
            gpu_staging=gpu_staging,
            gpu_io=gpu_io,
        )
        check_name(name)
        check_sparse(sparse)
        if read_only:
            drive = DurableDrive(config, find_store(config.directory), read_only=True)
            drive.acquire()
        else:
            drive = open_writer(config, create=False)
        claimed = False
        try:
            drive.claim(name, new=False)
            claimed = True
            layers, sequence = drive.load(name, torch.device(device))
        except BaseException:
            drive.release(name if claimed else None)
            raise
        store = cls.__new__(cls)
        kv_dtypes = {stored.kv_dtype for stored in layers.values()}
        kv_dtype = kv_dtypes.pop() if len(kv_dtypes) == 1 else None
        store._attach(drive, kv_dtype, name, sequence.metadata)
        store._layers.update(layers)
        store._token_ids = sequence.token_ids
        store.sparse = sparse
        return store

    def _attach(self, drive: Drive, kv_dtype: torch.dtype | None, name: str | None, metadata: dict) -> None:
        """Takes over one use of the drive, and the claim on the name."""
        self._drive = drive
        self._kv_dtype = kv_dtype
        self._name = name
        self.metadata = metadata
        self._token_ids: tuple[array, ...] | None = None  # of what is committed
        self._layers: dict[int, StoredLayer] = {}
        self._sparse: Sparse | None = None
        # Numbers of layers for which nothing is kept to choose by, because they are attended to exactly.
        self.exact_layers: frozenset[int] = frozenset()
        self._lock = threading.RLock()  # of _layers
        self._finalizer = weakref.finalize(self, _release, drive, self._layers, name, os.getpid())

    # ---- what is stored ----------------------------------------------------------------------------------------

    @property
    def directory(self) -> str:
        return self._drive.config.directory

    @property
    def kv_dtype(self) -> torch.dtype | None:
        return self._kv_dtype

    @property
    def sparse(self) -> Sparse | None:
        """How attention chooses among the stored tokens; None: it is exact."""
        return self._sparse

    @sparse.setter
    def sparse(self, sparse: Sparse | None) -> None:
        self._check_open()
        self._sparse = check_sparse(sparse)
        with self._lock:
            for number, stored in self._layers.items():
                self._keep_summary(number, stored.handle)

    def _keep_summary(self, number: int, handle: Tensor) -> None:
        if self._sparse is not None and number not in self.exact_layers:
            for kind in summary_kinds(self._sparse):
                ops.keep_summary(handle, kind)

    @property
    def durable(self) -> bool:
        return self._drive.durable

    @property
    def name(self) -> str | None:
        """Of a durable sequence; None for a scratch store, and for a fork that was given none."""
        return self._name

    @property
    def token_ids(self) -> list[list[int]] | None:
        """The ids that were last committed with this sequence, row by row."""
        return None if self._token_ids is None else [list(ids) for ids in self._token_ids]

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def layers(self) -> list[int]:
        """Numbers of the layers that hold rows."""
        return sorted(self._layers)

    def layer(self, layer: int) -> StoredLayer:
        """Handle and geometry of a layer.

        Raises:
            KeyError: nothing was appended to it.
            StoreClosedError: the store is closed.
        """
        self._check_open()
        if layer not in self._layers:
            raise KeyError(f"layer {layer} holds nothing; append to it first (layers with rows: {self.layers()})")
        return self._layers[layer]

    def lengths(self, layer: int) -> list[int]:
        """Absolute length in tokens of each row; empty before the first append."""
        self._check_open()
        return ops.layer_info(self._layers[layer].handle)[2] if layer in self._layers else []

    def begin(self, layer: int) -> int:
        """First position that can still be read (see :meth:`trim`)."""
        self._check_open()
        return ops.layer_info(self._layers[layer].handle)[1] if layer in self._layers else 0

    # ---- changing it -------------------------------------------------------------------------------------------

    def append(
        self, layer: int, k: Tensor, v: Tensor, *, lengths: Sequence[int] | Tensor | None = None
    ) -> ops.LayerState:
        """Adds tokens to every row of a layer; returns what it then holds. All or nothing: an error changes nothing.

        Args:
            layer: any int; the first append to it fixes its geometry, dtype, device and batch.
            k: ``[batch, num_kv_heads, tokens, head_dim_k]``, v: ``[batch, num_kv_heads, tokens, head_dim_v]``, of one
                dtype (float32, bfloat16, float16). head_dims are multiples of 8 from 8 to 576 and may differ.
            lengths: ``[batch]``; only the first ``lengths[b]`` of row b's tokens count. ``None``: all.

        Raises:
            ValueError: shape, dtype, device or batch differ from the layer's.
            StoreFullError: the drive is full. StoreError: a write failed. MemoryBudgetError: the budget is too small.
            StoreCorruptError: the page to go on from had left memory, and came back damaged.
        """
        self._check_open()
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} must be [batch, num_kv_heads, tokens, head_dim], got shape {list(tensor.shape)}"
                )
        if k.dtype != v.dtype or k.device != v.device:
            raise ValueError(
                f"k and v must agree in dtype and device, got {k.dtype} on {k.device} and {v.dtype} on {v.device}"
            )
        if k.is_meta:
            raise ValueError("k and v on the meta device hold no tokens; append tensors on cpu or cuda")
        if lengths is not None:
            lengths = _ints(lengths, "lengths", low=0)
        if k.requires_grad or v.requires_grad:
            k, v = k.detach(), v.detach()
        with self._lock:
            return self._append(layer, k, v, lengths)

    def _append(self, layer: int, k: Tensor, v: Tensor, lengths: list[int] | None) -> ops.LayerState:
        stored = self._layers.get(layer)
        is_new = stored is None
        if stored is None:
            stored = self._create_layer(layer, k, v)
        elif k.dtype != stored.dtype or k.device != stored.device:
            raise ValueError(
                f"layer {layer} takes {stored.dtype} on {stored.device}, got {k.dtype} on {k.device}; "
                f"convert with .to(), or free the layer first"
            )
        try:
            state = ops.append(stored.handle, k, v, lengths)
        except BaseException:
            if is_new:
                ops.drop_layer(stored.handle)
            raise
        self._layers[layer] = stored
        return state

    def _create_layer(self, number: int, k: Tensor, v: Tensor) -> StoredLayer:
        kv_dtype = self.kv_dtype or k.dtype
        handle = ops.create_layer(
            self._drive.handle,
            number=number if isinstance(number, int) and 0 <= number < 2**62 else -1,
            **_geometry(k, v, kv_dtype),
        )
        stored = StoredLayer(handle, k.shape[1], k.shape[3], v.shape[3], kv_dtype, k.dtype, k.device)
        try:
            self._drive.attach_card(stored)
            self._keep_summary(number, handle)
        except BaseException:
            ops.drop_layer(handle)
            raise
        return stored

    def truncate(self, layer: int, length: int | Sequence[int]) -> None:
        """Forgets the tokens at positions ``length`` and after: one length for all rows, or one per row."""
        lengths = _ints(length, "length", low=0) if isinstance(length, (Sequence, Tensor)) else None
        ops.truncate(self.layer(layer).handle, lengths or [as_int(length, "length", low=0)])

    def trim(self, layer: int, begin: int) -> None:
        """Forgets the tokens before position ``begin`` of every row (sliding windows); the others keep their places."""
        ops.trim(self.layer(layer).handle, as_int(begin, "begin", low=0))

    def reorder(self, layer: int, index: Sequence[int] | Tensor) -> None:
        """New row i is what row ``index[i]`` was. Selects, repeats and permutes; rows that come twice share pages."""
        ops.reorder(self.layer(layer).handle, _ints(index, "index"))

    def fork(self, name: str | None = None) -> KVStore:
        """A store with the same contents on the same drive. Full pages are shared; the two go on independently.

        Args:
            name: of the durable sequence that the fork is to become when it is committed; must be new.

        Raises:
            StoreError: there is a sequence of this name already. StoreBusyError: it is open.
        """
        self._check_open()
        drive = self._drive
        if name is not None:
            if not drive.durable or drive.read_only:
                raise StoreError("only the fork of a durable store that is open for writing can have a name")
            drive.claim(check_name(name), new=True)
        drive.acquire()
        other = KVStore.__new__(KVStore)
        other._attach(drive, self._kv_dtype, name, copy.deepcopy(self.metadata))
        other._sparse = self._sparse
        other.exact_layers = self.exact_layers
        with self._lock:
            for number, stored in self._layers.items():
                other._layers[number] = dataclasses.replace(stored, handle=ops.fork_layer(stored.handle))
        return other

    def commit(self, token_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None) -> None:
        """Makes everything that the store holds now survive the process, kill -9 and power loss, under its name.

        All or nothing: after an error the sequence is, on the drive, what it was after the commit before.

        Args:
            token_ids: ``[batch, tokens]``, or ``[tokens]`` for one row: the ids that the stored tokens stand for, so
                that :meth:`prefix_matches` can find them. Those beyond a row's length are left out. ``None``: the
                sequence has none any more, whatever the commit before gave.

        Raises:
            StoreError: the store is scratch, has no name, or is read only; a write failed.
            StoreFullError: there is no room. ValueError: token_ids do not fit.
        """
        self._check_open()
        if not self._drive.durable:
            raise StoreError("a scratch store cannot be committed; make it with durable=True and a name")
        if self._name is None:
            raise StoreError("this fork has no name to be committed under; make it by fork(name)")
        if self._drive.read_only:
            raise StoreError(f"sequence {self._name!r} was opened to be read only; open it without read_only")
        with self._lock:
            ids = None if token_ids is None else self._checked_ids(token_ids)
            self._drive.commit(self._name, self._layers, _checked_metadata(self.metadata), ids)
            self._token_ids = ids

    def _checked_ids(self, token_ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> tuple[array, ...]:
        values = torch.as_tensor(token_ids)
        if values.dim() == 1:
            values = values[None]
        if values.dim() != 2 or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(f"token_ids must be integers [batch, tokens], got {values.dtype} {list(values.shape)}")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**31:
            raise ValueError("token_ids must be from 0 to 2**31 - 1")
        lengths = [max(row) for row in zip(*(self.lengths(number) for number in self.layers()), strict=True)]
        if len(values) != len(lengths) or any(length > values.shape[1] for length in lengths):
            raise ValueError(
                f"token_ids must be [batch, tokens] with an id for each stored token, rows of {lengths}; "
                f"got {list(values.shape)}"
            )
        return tuple(array("i", ids[:length].tolist()) for ids, length in zip(values, lengths, strict=True))

    def prefix_matches(
        self, token_ids: Sequence[int] | Tensor, *, wants: Callable[[dict], bool] | None = None
    ) -> list[PrefixMatch]:
        """The committed sequences of this directory that begin like ``token_ids``, longest match first.

        Only those of one row, committed with their token ids, are looked at.

        Args:
            token_ids: ``[tokens]``.
            wants: given a sequence's metadata, whether it is to be looked at.
        """
        self._check_open()
        if not self._drive.durable:
            raise StoreError("a scratch store has no committed sequences; make it with durable=True and a name")
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        matches = self._drive.catalogue.match_prefix(ids, wants or (lambda metadata: True))
        return [PrefixMatch(name, length) for name, length in matches if length > 0]

    def committed_begins(self, name: str) -> dict[int, int]:
        """By layer of a committed sequence of this directory, the first position that can be read."""
        self._check_open()
        return self._drive.begins(name)

    def check_room(self, k: Tensor, v: Tensor, *, layer_count: int = 1, exact_count: int | None = None) -> None:
        """Whether tokens like these can be appended to so many layers, before any is.

        What counts is the free space of the device, ``max_bytes``, and unless the store is durable the memory that is
        left of the budget; and with ``sparse``, that memory can hold what it chooses by. For the latter's sake nothing
        is refused that would have found room; where little is missing, an append may still find none.

        Args:
            exact_count: of these layers, for which nothing is kept to choose by; ``None``: all ``exact_layers``.

        Raises:
            StoreFullError: the drive has no room. MemoryBudgetError: memory has none. Their texts have the numbers.
        """
        self._check_open()
        batch, num_kv_heads, tokens, head_dim_k = k.shape
        kv_dtype = self.kv_dtype or k.dtype
        size = page_bytes(num_kv_heads, head_dim_k, v.shape[3], dtype_text(kv_dtype))
        ops.check_room(self._drive.handle, layer_count * batch * (tokens // PAGE_TOKENS) * size)
        sparse_count = layer_count - (len(self.exact_layers) if exact_count is None else exact_count)
        if self._sparse is None or sparse_count <= 0:
            return
        with self._lock:
            ops.check_summary_room(
                self._drive.handle,
                **_geometry(k, v, kv_dtype),
                kinds=summary_kinds(self._sparse),
                layers=[stored.handle for number, stored in self._layers.items() if number not in self.exact_layers],
                layer_count=sparse_count,
                row_count=batch,
                q_len=tokens,
            )

    def use_prefix(self, match: PrefixMatch, *, device: torch.device | str = "cpu") -> None:
        """Fills this store, which must be empty, with the first ``match.length`` tokens of a committed sequence.

        Its full pages are shared: nothing is copied or read.

        Raises:
            StoreError: there is no such sequence. ValueError: it is shorter, or has trimmed tokens that are needed.
        """
        self._check_open()
        with self._lock:
            if self._layers:
                raise ValueError(f"a prefix goes into an empty store; this one holds layers {self.layers()}")
            layers, _ = self._drive.load(match.name, torch.device(device))
            try:
                for stored in layers.values():
                    lengths = ops.layer_info(stored.handle).lengths
                    if any(length < match.length for length in lengths):
                        raise ValueError(f"sequence {match.name!r} has {min(lengths)} tokens, wanted {match.length}")
                    ops.truncate(stored.handle, [match.length])
            except BaseException:
                for stored in layers.values():
                    ops.drop_layer(stored.handle)
                raise
            self._layers.update(layers)
            for number, stored in layers.items():
                self._keep_summary(number, stored.handle)

    def free(self, layer: int | None = None) -> None:
        """Forgets a layer's rows, or all layers'. The number may be used again, for any batch and geometry."""
        self._check_open()
        with self._lock:
            for number in [layer] if layer is not None else self.layers():
                if number in self._layers:
                    ops.drop_layer(self._layers.pop(number).handle)

    def settle(self, layer: int) -> None:
        """Waits until what a GPU packed of the last append to a layer is where it goes; what comes next does so anyway.

        Raises:
            StoreError: it could not be written; the append is undone. StoreFullError: because the drive is full.
        """
        ops.settle(self.layer(layer).handle)

    def flush(self) -> None:
        """Waits until every page that is on its way to the drive has arrived, and left memory.

        Raises:
            StoreError: one of those writes failed; its pages are still in memory and nothing is lost.
        """
        self._check_open()
        ops.flush(self._drive.handle)

    def close(self) -> None:
        """Gives everything back. Idempotent; any other use afterwards raises :class:`StoreClosedError`."""
        self._finalizer()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, object]) -> KVStore:
        return self.fork()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a KVStore cannot be pickled: its tokens are on a drive of this process; use read()")

    # ---- computing from it -------------------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float | None = None,
        causal: bool | str = False,
        window: int | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        row_begin: int = 0,
        kv_begin: int | None = None,
        kv_end: int | None = None,
        sparse: Sparse | str | None = "default",
        return_missing: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Attention of ``q`` over the rows ``row_begin ... row_begin + batch`` of a layer: exact, or ``sparse``.

        Formulas: :func:`torch_csd.reference.attention`, and those that the sparse settings name.

        Args:
            q: ``[batch, num_heads, q_len, head_dim_k]``; num_heads is a multiple of the layer's num_kv_heads.
            scale: multiplies the scores; ``head_dim_k ** -0.5`` if None.
            causal: ``"lower_right"`` (True): query i stands at position ``kv_end - q_len + i``; ``"upper_left"``: at
                ``kv_begin + i`` (torch's ``is_causal``); False: every query sees every token.
            window: sees keys at positions > position - window.
            softcap: ``softcap * tanh(score / softcap)``, before masks.
            mask: bool (True: attend) or additive float, broadcastable to ``[batch, num_heads, q_len, kv_len]``.
            sinks: ``[num_heads]`` logits that take part in the softmax and attend to nothing.
            alibi_slopes: ``[num_heads]``; adds ``slope * (key position - query position)``.
            kv_begin, kv_end: the tokens to attend to; default: from the first readable one to each row's own length.
            sparse: reads a choice of the tokens; ``None``: all; default: as the store is set. Calls of more than 16
                queries are exact.
            return_missing: returns ``missing`` besides.

        Returns:
            ``out [batch, num_heads, q_len, head_dim_v]`` in q's dtype and on its device, and
            ``lse [batch, num_heads, q_len]``, float32, natural log, of all that ``out`` is made of (so that partials
            merge). A query that sees nothing: 0 and -inf. ``missing``, shaped as lse: an estimate of the probability
            mass that was left out, or went to wrong tokens where means stand for some; 0 where attention was exact.

        Raises:
            ValueError: shapes or settings that do not fit. StoreError: a read failed. StoreCorruptError: the drive
            returned other bytes than were written.
        """
        stored = self.layer(layer)
        out, lse, missing = attend_layer(
            stored.handle,
            q,
            head_dim_v=stored.head_dim_v,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            mask=mask,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            row_begin=as_int(row_begin, "row_begin", low=0),
            kv_begin=-1 if kv_begin is None else as_int(kv_begin, "kv_begin", low=0),
            kv_end=-1 if kv_end is None else as_int(kv_end, "kv_end", low=0),
            sparse=self._sparse_or_default(sparse),
        )
        if not return_missing:
            return out, lse
        return out, lse, torch.zeros_like(lse) if missing is None else missing

    def prefetch(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        row_begin: int = 0,
        kv_begin: int | None = None,
        kv_end: int | None = None,
        sparse: Sparse | str | None = "default",
    ) -> None:
        """Begins to read what sparse attention of ``q`` would choose, while something else is computed.

        For a guess at queries that will come (of the next layer, say): what it has right is there when
        :meth:`attend` chooses it, and what it has wrong is read for nothing; results are the same. ``stats()`` counts
        ``guessed_bytes`` and of these ``guessed_used_bytes``; a layer whose guesses were used by less than half is
        left alone for 64 calls at a time. What another layer's attention finds unused it lets go.

        Nothing is read where attention is exact (that reads ahead by itself), for ``SparF``, for more than 16 queries,
        with ``read_ahead=0``, or where pages would have to be read to choose by. Arguments are those of :meth:`attend`.

        Raises:
            ValueError: shapes or settings that do not fit. StoreClosedError: the store is closed.
        """
        stored = self.layer(layer)
        _check_query(q, softcap)
        sparse = self._sparse_or_default(sparse)
        if sparse is None or q.shape[2] > QUERIES_MAX:
            return
        ops.prefetch(
            stored.handle,
            q,
            op_arguments(sparse),
            scale=q.shape[3] ** -0.5 if scale is None else float(scale),
            softcap=softcap or 0.0,
            row_begin=as_int(row_begin, "row_begin", low=0),
            kv_begin=-1 if kv_begin is None else as_int(kv_begin, "kv_begin", low=0),
            kv_end=-1 if kv_end is None else as_int(kv_end, "kv_end", low=0),
        )

    def read(self, layer: int, *, kv_begin: int | None = None, kv_end: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V of all rows, dense: ``[batch, num_kv_heads, kv_end - kv_begin, head_dim]``, in the dtype appended.

        This brings tokens into memory. Without ``kv_end`` the rows must be of one length.
        """
        stored = self.layer(layer)
        _, begin, lengths = ops.layer_info(stored.handle)
        if kv_end is None:
            if len(set(lengths)) > 1:
                raise ValueError(f"rows have different lengths {lengths}; pass kv_end, at most {min(lengths)}")
            kv_end = lengths[0]
        kv_end = as_int(kv_end, "kv_end", low=0)
        kv_begin = begin if kv_begin is None else as_int(kv_begin, "kv_begin", low=0, high=kv_end)
        k, v = (
            ops.read(
                stored.handle,
                values=values,
                dtype=stored.dtype,
                row_begin=0,
                row_count=len(lengths),
                kv_begin=kv_begin,
                kv_end=kv_end,
                num_kv_heads=stored.num_kv_heads,
                head_dim=stored.head_dim_v if values else stored.head_dim_k,
            ).to(stored.device)
            for values in (False, True)
        )
        return k, v

    # ---- reporting ---------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float | str | bool]:
        """What the drive did: which engine and why, bytes by path, time waiting for I/O against computing.

        Bytes that were moved and ``*_s`` count from the opening of the drive and include all forks. ``io_wait_s`` and
        ``compute_s`` are summed over workers. ``metadata_bytes`` is what page tables take, besides ``memory_budget``;
        ``staging_bytes`` is the part of the budget that reads in flight and ahead have at the moment.
        """
        self._check_open()
        return self._drive.stats()

    def _sparse_or_default(self, sparse: Sparse | str | None) -> Sparse | None:
        return self._sparse if isinstance(sparse, str) and sparse == "default" else check_sparse(sparse)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise StoreClosedError("this store is closed; open a new one")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"layers={len(self._layers)}"
        return f"KVStore(directory={self.directory!r}, {state})"


def _release(drive: Drive, layers: dict[int, StoredLayer], name: str | None, process: int) -> None:
    if os.getpid() != process:
        return
    try:
        for stored in layers.values():
            ops.drop_layer(stored.handle)
    finally:
        layers.clear()
        drive.release(name)


def _checked_metadata(metadata: dict | None) -> dict:
    """A copy, as JSON gives it back."""
    try:
        checked = json.loads(json.dumps({} if metadata is None else metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be a dict of what JSON can hold: {error}") from None
    if not isinstance(checked, dict):
        raise ValueError(f"metadata must be a dict, got {metadata!r}")
    return checked


def _geometry(k: Tensor, v: Tensor, kv_dtype: torch.dtype) -> dict[str, int | torch.dtype]:
    """Of a layer that holds tokens like these, as the native ops take it."""
    return {
        "num_kv_heads": k.shape[1],
        "head_dim_k": k.shape[3],
        "head_dim_v": v.shape[3],
        "dtype": k.dtype if kv_dtype in CODE_BITS else kv_dtype,
        "code_bits": CODE_BITS.get(kv_dtype, 0),
    }


def _ints(values: Sequence[int] | Tensor, name: str, *, low: int = -(2**62)) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype == torch.bool or values.is_floating_point():
            raise ValueError(
                f"{name} must be a 1-D tensor of integers, got {values.dtype} of shape {list(values.shape)}"
            )
        values = values.tolist()
    return [as_int(value, name, low=low) for value in values]


def _check_query(q: Tensor, softcap: float | None) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, num_heads, q_len, head_dim], got shape {list(q.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None, got {softcap}")


def attend_layer(
    handle: Tensor,
    q: Tensor,
    *,
    head_dim_v: int,
    scale: float | None,
    causal: bool | str,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    row_begin: int,
    kv_begin: int,
    kv_end: int,
    sparse: Sparse | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`KVStore.attend` on a bare handle, which is all that a StorageTensor has: out, lse, and if it was sparse
    what is missing."""
    _check_query(q, softcap)
    if causal not in CAUSAL:
        raise ValueError(f'causal must be False, True, "lower_right" or "upper_left", got {causal!r}')
    if window is not None:
        window = as_int(window, "window in tokens", low=1)
    if mask is not None:
        if mask.dim() > 4:
            raise ValueError(f"mask must have at most 4 dimensions, got shape {list(mask.shape)}")
        mask = mask[(None,) * (4 - mask.dim())]
    if sparse is not None and q.shape[2] <= QUERIES_MAX:
        attend = functools.partial(ops.attend_sparse, settings=op_arguments(sparse))
    else:
        attend = ops.attend
    out, lse, *missing = attend(
        handle,
        q,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        head_dim_v=head_dim_v,
        mask=mask,
        sinks=None if sinks is None else sinks.detach().float().flatten().contiguous(),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.detach().float().flatten().contiguous(),
        causal=CAUSAL[causal],
        window=window or 0,
        softcap=softcap or 0.0,
        row_begin=row_begin,
        kv_begin=kv_begin,
        kv_end=kv_end,
    )
    return out, lse, missing[0] if missing else None


def probe(
    directory: str | os.PathLike[str], io_engine: str = "auto"
) -> dict[str, int | str | bool | list[str] | dict[str, str]]:
    """How a directory's device can be reached: a real write and read-back by each engine, with and without O_DIRECT.

    Returns ``directory``, ``file_system``, ``device``, ``free_bytes``, the choice that a store would make
    (``io_engine``, ``direct_io``, ``reason``) and ``verdicts``, one line for each combination tried. Then the way
    between the drive and the current GPU (``gpu_io``: "gds", "pinned" or "none"; ``gpu_reason``, ``gpu_verdicts``,
    ``gpu_versions`` of libraries), which takes seconds where there is one.
    """
    from torch_csd.cuda.probe import probe_gpu_io

    if io_engine not in IO_ENGINES:
        raise ValueError(f"io_engine must be one of {', '.join(IO_ENGINES)}, got {io_engine!r}")
    directory = directory_path(directory)
    verdict = ops.probe(directory, io_engine)
    gpu = probe_gpu_io(directory, torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return {
        "directory": directory,
        "free_bytes": shutil.disk_usage(directory).free,
        **verdict,
        "gpu_io": gpu.path,
        "gpu_reason": gpu.reason,
        "gpu_verdicts": list(gpu.verdicts),
        "gpu_versions": dict(gpu.versions),
    }
