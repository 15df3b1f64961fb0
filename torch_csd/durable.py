"""A directory's durable sequences as a whole: what there is, whether it is intact, and taking it away."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS, Catalogue, SequenceInfo, StoreDirectory
from torch_csd.config import StoreConfig
from torch_csd.drive import DurableDrive, find_store, open_writer
from torch_csd.errors import StoreCorruptError, StoreError

_MEMORY_BUDGET = "256MiB"  # of what is opened here: pages are only looked at


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


def list_sequences(directory: str | os.PathLike[str]) -> list[SequenceInfo]:
    """The durable sequences of a directory, by name; also while a process writes there. Empty if it has no store.

    Raises:
        StoreError: the directory cannot be read. StoreCorruptError: the catalogue is damaged.
    """
    config = _config(directory)
    try:
        store = find_store(config.directory)
    except StoreError:
        if not os.path.isdir(config.directory):
            raise StoreError(f"{config.directory}: no such directory") from None
        return []
    catalogue = Catalogue.open(store.catalogue_path, read_only=True)
    try:
        return sorted(catalogue.infos(), key=lambda info: info.name)
    finally:
        catalogue.close()


def verify(directory: str | os.PathLike[str], name: str | None = None) -> list[DamagedPage]:
    """Reads every page of a directory's sequences (or of one) and compares it with its checksum.

    Returns:
        The pages that are damaged; none if all is well.

    Raises:
        StoreError: there is no store, or no such sequence. StoreCorruptError: its tables are damaged.
    """
    config = _config(directory)
    drive = DurableDrive(config, find_store(config.directory), read_only=True)
    drive.acquire()
    try:
        names = drive.catalogue.names() if name is None else [name]
        return [page for sequence in names for page in _verify_sequence(drive, sequence)]
    finally:
        drive.release()


def _verify_sequence(drive: DurableDrive, name: str) -> list[DamagedPage]:
    try:
        layers, _ = drive.load(name, torch.device("cpu"))
    except StoreCorruptError as error:
        return [DamagedPage(name, str(error))]
    try:
        return [
            DamagedPage(
                name,
                os.strerror(page.error) if page.error else "other bytes than were written",
                number,
                page.row,
                page.index,
                page.file_offset,
            )
            for number, stored in sorted(layers.items())
            for page in ops.verify(stored.handle)
        ]
    finally:
        for stored in layers.values():
            ops.drop_layer(stored.handle)


def remove_sequence(directory: str | os.PathLike[str], name: str) -> None:
    """Removes a durable sequence. Its space serves others; :func:`collect_garbage` gives it back.

    Raises:
        StoreError: there is none of this name. StoreBusyError: it is open, or another process has the store.
    """
    config = _config(directory)
    try:
        drive = open_writer(config, create=False, any_settings=True)
    except StoreCorruptError:
        _remove_unread(find_store(config.directory), name)
        return
    try:
        drive.remove(name)
    finally:
        drive.release()


def _remove_unread(store: StoreDirectory, name: str) -> None:
    """From a catalogue that names what cannot be read; it may be this."""
    store.lock_writer()
    try:
        catalogue = Catalogue.open(store.catalogue_path)
        try:
            catalogue.remove(name)
        finally:
            catalogue.close()
    finally:
        store.unlock()


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
