"""A directory's durable sequences as a whole: what there is, whether it is intact, and taking it away."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS, Catalogue, SequenceInfo
from torch_csd.config import StoreConfig
from torch_csd.drive import DurableDrive, find_store, open_writer
from torch_csd.errors import StoreError

_MEMORY_BUDGET = "256MiB"  # of what is opened here: pages are only looked at


@dataclass(frozen=True)
class DamagedPage:
    """A page that the drive does not give back as it was written."""

    sequence: str
    layer: int
    row: int
    index: int  # it holds the tokens from position 64 * index on
    file_offset: int
    reason: str

    def __str__(self) -> str:
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
    damaged = []
    try:
        for sequence in [name] if name is not None else drive.catalogue.names():
            layers, _ = drive.load(sequence, torch.device("cpu"))
            try:
                for number, stored in sorted(layers.items()):
                    for page in ops.verify(stored.handle):
                        reason = os.strerror(page.error) if page.error else "other bytes than were written"
                        damaged.append(DamagedPage(sequence, number, page.row, page.index, page.file_offset, reason))
            finally:
                for stored in layers.values():
                    ops.drop_layer(stored.handle)
    finally:
        drive.release()
    return damaged


def remove_sequence(directory: str | os.PathLike[str], name: str) -> None:
    """Removes a durable sequence. Its space serves others; :func:`collect_garbage` gives it back.

    Raises:
        StoreError: there is none of this name. StoreBusyError: it is open, or another process has the store.
    """
    drive = open_writer(_config(directory), create=False, any_settings=True)
    try:
        drive.remove(name)
    finally:
        drive.release()


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
