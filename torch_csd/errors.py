"""What can go wrong, as types. Texts say what was wanted, what came and what to do."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The drive or its file failed: an I/O error, a directory that cannot be used."""


class StoreClosedError(StoreError):
    """A store, or a layer of it, was used after it was closed or freed, or from a forked child process."""


class StoreBusyError(StoreError):
    """Another process, or another store of this one, holds the lock that is needed."""


class StoreFullError(StoreError):
    """The drive has no room for more pages. What was stored before can still be attended to."""


class StaleTensorError(StoreError):
    """A StorageTensor stands for tokens that were reordered, truncated or trimmed since it was made."""


class StoreCorruptError(StoreError):
    """What the drive holds is not what was written there: a damaged page, file or catalogue."""


class StoreMismatchError(StoreError, ValueError):
    """A sequence was made by another model than the one it is opened with."""


class CheckpointError(StoreError, ValueError):
    """A checkpoint's files are not what they should be: one is missing, cut short, or says what cannot be."""


class GpuUnavailableError(StoreError):
    """What was asked of a GPU cannot be had: there is none, a package is missing, GPUDirect Storage is not active."""


class MemoryBudgetError(ValueError):
    """``memory_budget`` is smaller than what must be in memory: a few pages, what sparse attention chooses by."""
