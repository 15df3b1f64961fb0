"""Drives: the native file of pages that stores share, and for sequences that outlive the process its catalogue."""

from __future__ import annotations

import importlib
import itertools
import os
import secrets
import struct
import threading
import time
import weakref
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import (
    BLOCK_BYTES,
    DATA_OFFSET,
    ENTRY_BYTES,
    PAGE_TOKENS,
    Catalogue,
    LayerTable,
    RowTable,
    Sequence,
    StoreDirectory,
    page_spans,
)
from torch_csd.config import StoreConfig, parse_kv_dtype
from torch_csd.errors import GpuUnavailableError, MemoryBudgetError, StoreBusyError, StoreCorruptError, StoreError

CODE_BITS = {torch.int8: 8, torch.int4: 4}

_snapshot_numbers = itertools.count()


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_card(device: torch.device) -> bool:
    """Whether tokens on this device have a card that can work on their layers."""
    return device.type == "cuda"


@dataclass(frozen=True)
class StoredLayer:
    """One layer as the store knows it: its native handle, and what it was created with."""

    handle: Tensor  # [3], int64
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    kv_dtype: torch.dtype  # on the drive
    dtype: torch.dtype  # of what is appended
    device: torch.device  # of what is appended
    # The newest handle of one state, by epoch: what K and V handed out in the same state share.
    _snapshots: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def layout(self) -> tuple[int, int, int, torch.dtype, int]:
        """Of its full pages: kv heads, head_dim of K and V, dtype of elements, bits of codes."""
        bits = CODE_BITS.get(self.kv_dtype, 0)
        return self.num_kv_heads, self.head_dim_k, self.head_dim_v, self.dtype if bits else self.kv_dtype, bits

    def at(self, epoch: int) -> Tensor:
        """The layer's handle in one state: ops that are given it refuse to run in another."""
        handle = self._snapshots.get(epoch)
        if handle is None:
            with torch.inference_mode(False):  # it outlives the mode it is made in
                handle = self.handle.clone()
                handle[2] = epoch
            self._snapshots.clear()
            self._snapshots[epoch] = handle
        return handle


class Drive:
    """The native drive that a store and its forks share; closed when the last of them is."""

    durable = False
    read_only = False

    def __init__(self, config: StoreConfig, *, path: str = "", mode: str = "", store_id: bytes = bytes(16)) -> None:
        self.config = config
        if config.executor == "gpu" or config.gpu_io == "gds":
            cuda().check_available(config)
        self.handle = ops.open_drive(
            config.directory,
            io_engine=config.io_engine,
            simd=config.simd,
            memory_budget_bytes=config.memory_budget_bytes,
            threads=config.threads,
            queue_depth=config.queue_depth,
            read_ahead_bytes=config.read_ahead_bytes,
            resident=config.resident,
            checksums=config.checksums,
            max_bytes=config.max_bytes or 0,
            durable_path=path,
            mode=mode,
            store_id=store_id,
        )
        self._lock = self._make_lock()
        self._users = 0
        self._cards: dict[torch.device, ops.Card | None] = {}
        self.gpu_reason = ""  # why there is no card where there might be one
        self._finalizer = weakref.finalize(self, _close_quietly, self.handle, os.getpid())

    def _make_lock(self) -> threading.RLock:
        return threading.RLock()  # a finalizer may run in the middle of acquire()

    def attach_card(self, stored: StoredLayer) -> None:
        """Gives the card that a layer's tokens are on its share in the layer.

        Raises:
            GpuUnavailableError: it cannot have one, and was asked for. MemoryBudgetError: it has no memory for one.
        """
        if not is_card(stored.device):
            return
        with self._lock:
            if stored.device not in self._cards:
                self._cards[stored.device] = self._open_card(stored.device)
            card = self._cards[stored.device]
        if card is not None:
            card.adopt(stored.handle, *stored.layout)
            ops.attach_card(stored.handle, card)

    def _open_card(self, device: torch.device) -> ops.Card | None:
        try:
            with torch.inference_mode(False):  # its memory outlives the mode that it is made in
                card = cuda().open_card(device, self.handle, self.config, writable=not self.read_only)
        except (GpuUnavailableError, MemoryBudgetError) as error:
            if self.config.executor == "gpu" or self.config.gpu_io == "gds":
                raise
            self.gpu_reason = str(error)
            return None
        ops.add_card(self.handle, card)
        return card

    def stats(self) -> dict[str, int | float | str | bool]:
        stats = ops.stats(self.handle)
        for card in self._cards.values():
            if card is None:
                continue
            of_card = card.stats()
            # Bytes by path, whoever moved them.
            stats["drive_read_bytes"] += of_card["gpu_drive_read_bytes"]
            stats["resident_read_bytes"] += of_card["gpu_host_read_bytes"]
            stats["drive_written_bytes"] += of_card["gpu_written_bytes"]
            stats |= of_card
        if self.gpu_reason:
            stats["gpu_reason"] = self.gpu_reason
        return stats

    def acquire(self) -> None:
        with self._lock:
            self._users += 1

    def release(self, name: str | None = None) -> None:
        """One user less; ``name`` is that of the sequence that it had open."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._finalizer()


def cuda() -> ModuleType:
    """The GPU path, which is not imported before it is asked for."""
    return importlib.import_module("torch_csd.cuda")


def _close_quietly(handle: Tensor, process: int) -> None:
    # A forked child must not tear down what belongs to its parent.
    if os.getpid() == process:
        ops.close_drive(handle)


class DurableDrive(Drive):
    """A drive whose sequences are kept: its file of pages has a name, and a catalogue beside it.

    At most one process has it open for writing, once: the stores of one process share it (:func:`open_writer`). The
    space of what the catalogue names is held by *snapshots*, numbers that the native drive knows; one is let go when a
    later transaction no longer names that space and no reader may still have an older catalogue.
    """

    durable = True

    def __init__(self, config: StoreConfig, directory: StoreDirectory, *, read_only: bool = False) -> None:
        self.directory = directory
        self.read_only = read_only
        self._snapshots: dict[str, int] = {}  # by name: of what the catalogue has
        # Of commits that failed, but may have come through: (committed_s, snapshot).
        self._in_doubt: dict[str, list[tuple[float, int]]] = {}
        self._outdated: list[int] = []
        self._open_names: set[str] = set()
        self._sequences: dict[str, Sequence] = {}  # of a reader: what it has opened, whatever is committed meanwhile
        self.damaged: dict[str, StoreCorruptError] = {}  # by name: sequences that cannot be opened
        directory.lock_reader() if read_only else directory.lock_writer()
        try:
            if not read_only:
                directory.await_writes()
            if not read_only and not os.path.lexists(directory.catalogue_path):
                # Of a process that ended while it made the store: the catalogue comes last.
                if os.path.lexists(directory.pages_path):
                    os.unlink(directory.pages_path)
                store_id = secrets.token_bytes(16)
                super().__init__(config, path=directory.pages_path, mode="create", store_id=store_id)
                self.catalogue = Catalogue.create(directory.catalogue_path, store_id)
                sequences = []
            else:
                self.catalogue = Catalogue.open(directory.catalogue_path, read_only=read_only)
                # Before the file is opened: what a writer commits meanwhile may lie behind the end that is seen here.
                sequences = self._load_sequences()
                super().__init__(
                    config,
                    path=directory.pages_path,
                    mode="read" if read_only else "write",
                    store_id=self.catalogue.store_id,
                )
            self._finalizer.detach()
            self._finalizer = weakref.finalize(
                self, _close_durable, self.handle, os.getpid(), self.catalogue, self.directory
            )
            self._adopt(sequences)
        except BaseException:
            if hasattr(self, "handle"):
                ops.close_drive(self.handle)
            if hasattr(self, "catalogue"):
                self.catalogue.close()
            directory.unlock()
            raise

    def _make_lock(self) -> threading.RLock:
        return _durable_lock

    def _load_sequences(self) -> list[Sequence]:
        if not self.read_only:
            self.directory.check_pages()
            return self.catalogue.load_all()
        for sequence in self.catalogue.load_all(token_ids=True, damaged=self.damaged):
            end = max((offset + size for offset, size in page_spans(_entries(sequence)).items()), default=0)
            file_bytes = self.directory.check_pages()
            if end > file_bytes:
                self.damaged[sequence.name] = StoreCorruptError(
                    f"{self.directory.pages_path}: cut short: has {file_bytes} bytes, the pages of sequence "
                    f"{sequence.name!r} go to byte {end}; remove it (torch-csd rm) and prefill it anew"
                )
            else:
                self._sequences[sequence.name] = sequence
        return list(self._sequences.values())

    def _adopt(self, sequences: list[Sequence]) -> None:
        entries = [_entries(sequence) for sequence in sequences]
        self._snapshots = {sequence.name: next(_snapshot_numbers) for sequence in sequences}
        numbers = list(self._snapshots.values())
        if not self.read_only and self.directory.has_readers():
            # They may have an older catalogue, which names pages in what is free by this one.
            numbers.append(next(_snapshot_numbers))
            self._outdated.append(numbers[-1])
            entries.append(_free_entries(b"".join(entries), self.directory.check_pages()))
        counts = [len(table) // ENTRY_BYTES for table in entries]
        refused = ops.adopt(self.handle, numbers, counts, b"".join(entries))
        for name, snapshot in self._snapshots.items():
            if snapshot in refused:
                self.damaged[name] = StoreCorruptError(
                    f"{self.directory.path}: the page tables of sequence {name!r} are damaged: pages lie outside of "
                    f"the file, or over those of others; remove it (torch-csd rm) and prefill it anew"
                )

    # ---- sequences -----------------------------------------------------------------------------------------------

    def claim(self, name: str, *, new: bool) -> None:
        """Makes a name this caller's until :meth:`release`.

        Raises:
            StoreBusyError: another store of this process has it. StoreError: a new one exists already.
        """
        with self._lock:
            if name in self._open_names:
                raise StoreBusyError(f"sequence {name!r} is open in this process already; close it first, or fork it")
            if new and name in self._snapshots:
                raise StoreError(
                    f"{self.directory.path}: there is a sequence {name!r} already; open it instead, remove it, or "
                    f"choose another name"
                )
            if not self.read_only:
                self._open_names.add(name)

    def release(self, name: str | None = None) -> None:
        with self._lock:
            if name is not None:
                self._open_names.discard(name)
            super().release()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def names(self) -> list[str]:
        """Of the sequences that there were when this was opened, the damaged ones of a reader included."""
        return sorted({*self._snapshots, *self.damaged})

    def layers(self, name: str) -> tuple[LayerTable, ...]:
        """The tables of a reader's sequence."""
        return self._sequences[name].layers

    def begins(self, name: str) -> dict[int, int]:
        """By layer, the first position of a committed sequence that can be read."""
        return {layer.number: layer.begin for layer in self.catalogue.load(name).layers}

    def load(self, name: str, device: torch.device) -> tuple[dict[int, StoredLayer], Sequence]:
        """The layers of a committed sequence, to be appended to and dropped by the caller.

        Raises:
            StoreError: there is no such sequence. StoreCorruptError: it is damaged.
        """
        with self._lock:
            if name in self.damaged:
                raise self.damaged[name]
            # Not what a reader's catalogue has by now: its pages may lie where this drive knows of none.
            sequence = self._sequences.get(name) or self.catalogue.load(name)
            came_through = dict(self._in_doubt.get(name, ()))
            snapshot = came_through.get(sequence.committed_s, self._snapshots.get(name))
            if snapshot is None:
                raise StoreError(f"{self.directory.path}: sequence {name!r} was committed after this was opened")
            layers: dict[int, StoredLayer] = {}
            try:
                for table in sequence.layers:
                    layers[table.number] = self._restore(table, snapshot, device)
            except BaseException:
                for stored in layers.values():
                    ops.drop_layer(stored.handle)
                raise
        return layers, sequence

    def _restore(self, table: LayerTable, snapshot: int, device: torch.device) -> StoredLayer:
        kv_dtype, dtype = parse_kv_dtype(table.kv_dtype), getattr(torch, table.dtype)
        handle = ops.restore_layer(
            self.handle,
            num_kv_heads=table.num_kv_heads,
            head_dim_k=table.head_dim_k,
            head_dim_v=table.head_dim_v,
            dtype=dtype if kv_dtype in CODE_BITS else kv_dtype,
            code_bits=CODE_BITS.get(kv_dtype, 0),
            number=table.number,
            begin=table.begin,
            first_pages=[row.first_page for row in table.rows],
            lengths=[row.length for row in table.rows],
            entries=b"".join(row.entries for row in table.rows),
            snapshot=snapshot,
        )
        geometry = (table.num_kv_heads, table.head_dim_k, table.head_dim_v)
        stored = StoredLayer(handle, *geometry, kv_dtype, dtype, device)
        try:
            self.attach_card(stored)
        except BaseException:
            ops.drop_layer(handle)
            raise
        return stored

    def commit(
        self, name: str, layers: Mapping[int, StoredLayer], metadata: dict, token_ids: tuple[array, ...] | None
    ) -> None:
        """Makes what these layers hold the sequence of this name, for good."""
        with self._lock:
            snapshot = next(_snapshot_numbers)
            numbers = sorted(layers)
            tables = ops.commit(self.handle, snapshot, [layers[number].handle for number in numbers])
            committed_s = time.time()
            try:
                self.catalogue.commit(
                    Sequence(
                        name=name,
                        metadata=metadata,
                        layers=tuple(
                            _table(number, layers[number], table) for number, table in zip(numbers, tables, strict=True)
                        ),
                        token_ids=token_ids,
                        created_s=committed_s,
                        committed_s=committed_s,
                    )
                )
            except BaseException:
                # It may have come through all the same: its space stays held until a later commit did.
                self._in_doubt.setdefault(name, []).append((committed_s, snapshot))
                raise
            self._forget(name)
            self._snapshots[name] = snapshot
            self._release_outdated()

    def remove(self, *names: str) -> None:
        """Removes sequences from the catalogue, all or none; pages that no other has are free.

        Raises:
            StoreBusyError: one is open. StoreError: there is none of such a name.
        """
        with self._lock:
            for name in names:
                if name in self._open_names:
                    raise StoreBusyError(f"sequence {name!r} is open in this process; close it first")
            self.catalogue.remove(*names)
            for name in names:
                self.damaged.pop(name, None)
                self._forget(name)
            self._release_outdated()

    def shrink(self) -> int:
        """Gives the unused end of the file of pages back to the file system; the bytes that it was."""
        with self._lock:
            self._release_outdated()
            return ops.shrink(self.handle)

    def _forget(self, name: str) -> None:
        """The catalogue names other pages under this name now, or none."""
        self._outdated += [snapshot for _, snapshot in self._in_doubt.pop(name, ())]
        if name in self._snapshots:
            self._outdated.append(self._snapshots.pop(name))

    def _release_outdated(self) -> None:
        if not self._outdated or self.directory.has_readers():
            return
        while self._outdated:
            ops.release(self.handle, self._outdated.pop())


def _entries(sequence: Sequence) -> bytes:
    return b"".join(row.entries for layer in sequence.layers for row in layer.rows)


def _free_entries(used: bytes, file_bytes: int) -> bytes:
    """Entries that cover what no entry of ``used`` does."""
    block_count_max = 2**16 - 1
    entries = []
    free = DATA_OFFSET
    for offset, size in [*sorted(page_spans(used).items()), (file_bytes // BLOCK_BYTES * BLOCK_BYTES, 0)]:
        while free < offset:
            block_count = min((offset - free) // BLOCK_BYTES, block_count_max)
            entries.append(struct.pack("<QIHBB", free, 0, block_count, 0, 0))
            free += block_count * BLOCK_BYTES
        free = max(free, offset + size)
    return b"".join(entries)


def _table(number: int, stored: StoredLayer, table: ops.CommittedLayer) -> LayerTable:
    rows = []
    begin = 0
    for first_page, length in table.rows:
        end = begin + (-(-length // PAGE_TOKENS) - first_page) * ENTRY_BYTES
        rows.append(RowTable(first_page, length, table.entries[begin:end]))
        begin = end
    return LayerTable(
        number=number,
        num_kv_heads=stored.num_kv_heads,
        head_dim_k=stored.head_dim_k,
        head_dim_v=stored.head_dim_v,
        kv_dtype=dtype_text(stored.kv_dtype),
        dtype=dtype_text(stored.dtype),
        begin=table.begin,
        rows=tuple(rows),
    )


def _close_durable(handle: Tensor, process: int, catalogue: Catalogue, directory: StoreDirectory) -> None:
    if os.getpid() != process:
        return
    try:
        ops.close_drive(handle)
    finally:
        catalogue.close()
        directory.unlock()


# ---- one writer in this process ------------------------------------------------------------------------------------

_writers: weakref.WeakValueDictionary[str, DurableDrive] = weakref.WeakValueDictionary()  # by path of the store
# One for all durable drives: a finalizer that lets go of one may run while another is being opened.
_durable_lock = threading.RLock()


def _forget_parents_writers() -> None:
    global _durable_lock
    _durable_lock = threading.RLock()
    _writers.clear()


os.register_at_fork(after_in_child=_forget_parents_writers)


def open_writer(config: StoreConfig, *, create: bool, any_settings: bool = False) -> DurableDrive:
    """The drive that this process writes the durable store below ``config.directory`` with, acquired.

    ``any_settings``: where it is open already, its own settings will do.

    Raises:
        StoreBusyError: another process has it open. StoreError: there is none, and none is to be made.
        ValueError: this process has it open with other settings.
    """
    config = replace(config, kv_dtype=None)  # that is a sequence's own
    with _durable_lock:
        directory = StoreDirectory.create(config.directory) if create else find_store(config.directory)
        key = os.path.realpath(directory.path)
        drive = _writers.get(key)
        if drive is None or drive.closed:
            drive = DurableDrive(config, directory)
            _writers[key] = drive
        elif drive.config != config and not any_settings:
            raise ValueError(
                f"{directory.path} is open in this process with other settings ({_differences(drive.config, config)}); "
                f"open it with the same, or close it first"
            )
        drive.acquire()
        return drive


def remove_sequences(directory: str, names: Iterable[str]) -> None:
    """Removes durable sequences, damaged or not; all or none.

    Raises:
        StoreBusyError: one is open, or another process has the store. StoreError: there is none of such a name.
    """
    with _durable_lock:
        store = find_store(directory)
        drive = _writers.get(os.path.realpath(store.path))
        if drive is not None and not drive.closed:
            drive.remove(*names)
            return
        # No drive: a sequence whose pages it would refuse must go, too. Readers that have this one open are seen by
        # whoever writes next.
        store.lock_writer()
        try:
            with Catalogue.open(store.catalogue_path) as catalogue:
                catalogue.remove(*names)
        finally:
            store.unlock()


def find_store(directory: str) -> StoreDirectory:
    """Raises StoreError where there is none."""
    found = StoreDirectory.find(directory)
    if found is None or not os.path.lexists(found.catalogue_path):
        raise StoreError(f"{directory}: no durable store here; make one with durable=True, or name another directory")
    return found


def _differences(there: StoreConfig, wanted: StoreConfig) -> str:
    pairs = ((name, value, vars(wanted)[name]) for name, value in vars(there).items())
    return ", ".join(f"{name} {value!r}, not {other!r}" for name, value, other in pairs if value != other)
