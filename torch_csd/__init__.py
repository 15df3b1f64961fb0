"""Storage-backed tensors for PyTorch: the KV cache lives on NVMe, and attention runs where its bytes are.

    cache = torch_csd.StorageCache(model.config, directory="/nvme/kv")
    model.generate(**inputs, past_key_values=cache)

Importing this registers ``attn_implementation="csd"`` with transformers, where it is installed: at once if its models
are imported already, else when they are.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from torch_csd import reference
from torch_csd.dispatch import attention
from torch_csd.durable import DamagedPage, collect_garbage, list_sequences, remove_sequence, verify
from torch_csd.errors import (
    CheckpointError,
    GpuUnavailableError,
    MemoryBudgetError,
    StaleTensorError,
    StoreBusyError,
    StoreClosedError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
)
from torch_csd.registration import register_with_transformers
from torch_csd.sparse import Adaptive, PageTopK, SparF
from torch_csd.store import KVStore, PrefixMatch, probe
from torch_csd.tensor import StorageTensor
from torch_csd.version import __version__
from torch_csd.weights.tensor import FileTensor, from_file, from_safetensors

if TYPE_CHECKING:
    from torch_csd.hf import StorageCache, fingerprint, guess_queries, load_checkpoint, swap_attention

__all__ = [
    "Adaptive",
    "CheckpointError",
    "DamagedPage",
    "FileTensor",
    "GpuUnavailableError",
    "KVStore",
    "MemoryBudgetError",
    "PageTopK",
    "PrefixMatch",
    "SparF",
    "StaleTensorError",
    "StorageTensor",
    "StoreBusyError",
    "StoreClosedError",
    "StoreCorruptError",
    "StoreError",
    "StoreFullError",
    "StoreMismatchError",
    "__version__",
    "attention",
    "collect_garbage",
    "from_file",
    "from_safetensors",
    "list_sequences",
    "probe",
    "reference",
    "remove_sequence",
    "verify",
]

_HF_NAMES = ("StorageCache", "fingerprint", "guess_queries", "load_checkpoint", "swap_attention")

if importlib.util.find_spec("transformers") is not None:
    __all__ += ["StorageCache", "fingerprint", "guess_queries", "load_checkpoint", "swap_attention"]
    register_with_transformers()


def __getattr__(name: str) -> object:
    if name in _HF_NAMES and name in __all__:
        return getattr(importlib.import_module("torch_csd.hf"), name)
    hint = "; it needs transformers: pip install transformers" if name in _HF_NAMES else ""
    raise AttributeError(f"module 'torch_csd' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
