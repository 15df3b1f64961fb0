"""A directory's durable sequences as a whole: what there is, whether it is intact, and taking it away."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from torch_csd import ops
from torch_csd.catalogue import (
    DATA_OFFSET,
    DIRECTORY_NAME,
    PAGE_TOKENS,
    Catalogue,
    SequenceInfo,
    StoreDirectory,
    Writer,
    layer_bytes,
)
from torch_csd.config import StoreConfig
from torch_csd.drive import DurableDrive, find_store, open_writer
from torch_csd.drive import remove_sequences as remove_from_drive
from torch_csd.errors import StoreBusyError, StoreCorruptError, StoreError

_MEMORY_BUDGET = "256MiB"  # of what is opened here: pages are only looked at


# ---- what there is --------------------------------------------------------------------------------------------------


def list_sequences(directory: str | os.PathLike[str]) -> list[SequenceInfo]:
    """The durable sequences of a directory, by name; also while a process writes there. Empty if it has no store.

    Raises:
        StoreError: the directory, or the store in it, cannot be read. StoreCorruptError: the catalogue is damaged.
    """
    store = _find(directory)
    if store is None or not os.path.lexists(store.catalogue_path):
        return []
    with Catalogue.open(store.catalogue_path, read_only=True) as catalogue:
        return sorted(catalogue.infos(), key=lambda info: info.name)


@dataclass
class StoreSurvey:
    """A durable store as it can be seen from outside, damaged or not."""

    path: str  # of its directory
    writer: Writer | None = None  # who has it open for writing
    sequences: list[SequenceInfo] = field(default_factory=list)  # by name, those that are sound
    damaged: dict[str, str] = field(default_factory=dict)  # by name of a sequence: what is wrong with its tables
    problems: list[str] = field(default_factory=list)  # with the store as a whole
    file_bytes: int = 0  # of the file of pages
    used_bytes: int = 0  # of it, by what the sequences hold; pages that they share count once

    @property
    def free_bytes(self) -> int:
        """Of the file of pages: what no sequence holds. A writer may be filling it."""
        return max(0, self.file_bytes - DATA_OFFSET - self.used_bytes)


def survey(directory: str | os.PathLike[str]) -> StoreSurvey | None:
    """The durable store of a directory, None if it has none. Keeps nobody from writing there.

    Raises:
        StoreError: the directory cannot be read. StoreBusyError: another process kept the catalogue locked.
    """
    try:
        store = _find(directory)
    except StoreError as error:
        if not os.path.isdir(directory):
            raise
        return StoreSurvey(os.path.join(os.path.abspath(os.fspath(directory)), DIRECTORY_NAME), problems=[str(error)])
    if store is None:
        return None
    found = StoreSurvey(store.path)
    store_id = None
    try:
        found.writer = store.writer()
    except StoreError as error:
        found.problems.append(str(error))
    try:
        with Catalogue.open(store.catalogue_path, read_only=True) as catalogue:
            store_id = catalogue.store_id
            told = catalogue.survey()
        found.sequences, found.damaged, found.used_bytes = told.infos, told.damaged, told.used_bytes
    except StoreBusyError:
        raise
    except StoreError as error:
        found.problems.append(str(error))
    try:
        found.file_bytes = store.check_pages()
        header = ops.read_header(store.pages_path)
        if not header.durable or store_id not in (None, header.store_id):
            raise StoreCorruptError(f"{store.pages_path}: belongs to another store than the catalogue beside it")
    except StoreError as error:
        found.problems.append(str(error))
    return found


# ---- whether it is intact -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DamagedPage:
    """A page that the drive does not give back as it was written, or a whole sequence whose tables are damaged."""

    sequence: str
    reason: str
    layer: int | None = None  # None, as all that follows: the sequence
    row: int | None = None
    index: int | None = None  # it holds the tokens from position 64 * index on
    file_offset: int | None = None

    def __str__(self) -> str:
        if self.index is None:
            return f"sequence {self.sequence!r}: {self.reason}"
        begin = self.index * PAGE_TOKENS
        return (
            f"sequence {self.sequence!r}, layer {self.layer}, row {self.row}, page {self.index} (tokens {begin} to "
            f"{begin + PAGE_TOKENS - 1}), byte {self.file_offset}: {self.reason}"
        )


class Verification:
    """One pass over the pages of a directory's sequences, or of one: iterate to make it.

    Raises:
        StoreError: there is no store, or no such sequence. StoreCorruptError: nothing of it can be read.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        config = _config(directory)
        self._drive = DurableDrive(config, find_store(config.directory), read_only=True)
        self._drive.acquire()
        try:
            known = self._drive.names()
            if name is not None and name not in known:
                self._drive.catalogue.load(name)  # says which there are
            wanted = [name] if name is not None else known
        except BaseException:
            self._drive.release()
            raise
        self.damaged = {key: str(error) for key, error in self._drive.damaged.items() if key in wanted}  # their tables
        self.sequences = [key for key in wanted if key not in self.damaged]
        self.total_bytes = sum(layer_bytes(layer) for key in self.sequences for layer in self._drive.layers(key))

    def __iter__(self) -> Iterator[tuple[int, list[DamagedPage]]]:
        """Of one layer of a sequence after another: its bytes, and its pages that are damaged."""
        for sequence in self.sequences:
            layers, _ = self._drive.load(sequence, torch.device("cpu"))
            try:
                for table in self._drive.layers(sequence):
                    damaged = []
                    for page in ops.verify(layers[table.number].handle):
                        reason = os.strerror(page.error) if page.error else "other bytes than were written"
                        damaged.append(
                            DamagedPage(sequence, reason, table.number, page.row, page.index, page.file_offset)
                        )
                    yield layer_bytes(table), damaged
            finally:
                for stored in layers.values():
                    ops.drop_layer(stored.handle)

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drive.release()


def verify(directory: str | os.PathLike[str], name: str | None = None) -> list[DamagedPage]:
    """Reads every page of a directory's sequences (or of one) and compares it with its checksum.

    A process may go on writing there: what is looked at is what was committed when this began.

    Returns:
        The sequences whose tables are damaged, and the pages that are; none if all is well.

    Raises:
        StoreError: there is no store, or no such sequence. StoreCorruptError: nothing of it can be read.
    """
    with Verification(directory, name) as verification:
        unread = [DamagedPage(sequence, reason) for sequence, reason in verification.damaged.items()]
        return unread + [page for _, damaged in verification for page in damaged]


# ---- taking it away -------------------------------------------------------------------------------------------------


def remove_sequence(directory: str | os.PathLike[str], name: str) -> None:
    """Removes a durable sequence, damaged or not. Its space serves others; :func:`collect_garbage` gives it back.

    Raises:
        StoreError: there is none of this name. StoreBusyError: it is open, or another process has the store.
    """
    remove_sequences(directory, [name])


def remove_sequences(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """:func:`remove_sequence` for several: all or none."""
    remove_from_drive(_config(directory).directory, names)


def collect_garbage(directory: str | os.PathLike[str]) -> int:
    """Gives the unused end of a directory's file of pages back to the file system; returns its bytes.

    Raises:
        StoreError: there is no store. StoreBusyError: another process has it open for writing.
    """
    drive = open_writer(_config(directory), create=False, any_settings=True)
    try:
        return drive.shrink()
    finally:
        drive.release()


def _find(directory: str | os.PathLike[str]) -> StoreDirectory | None:
    path = _config(directory).directory
    if not os.path.isdir(path):
        raise StoreError(f"{path}: no such directory")
    return StoreDirectory.find(path)


def _config(directory: str | os.PathLike[str] | None) -> StoreConfig:
    return StoreConfig.make(
        directory,
        memory_budget=_MEMORY_BUDGET,
        kv_dtype=None,
        io_engine="auto",
        simd=None,
        threads=None,
        queue_depth=32,
        read_ahead=None,
        resident=True,
    )
