"""Storage-backed tensors for PyTorch: the KV cache lives on NVMe, and attention runs where its bytes are.

    cache = torch_csd.StorageCache(model.config, directory="/nvme/kv")
    model.generate(**inputs, past_key_values=cache)

Importing this registers ``attn_implementation="csd"`` with transformers, where it is installed.
"""

from __future__ import annotations

import importlib.util

from torch_csd import reference
from torch_csd.dispatch import attention
from torch_csd.errors import (
    MemoryBudgetError,
    StaleTensorError,
    StoreClosedError,
    StoreError,
    StoreFullError,
)
from torch_csd.store import KVStore, probe
from torch_csd.tensor import StorageTensor
from torch_csd.version import __version__

__all__ = [
    "KVStore",
    "MemoryBudgetError",
    "StaleTensorError",
    "StorageTensor",
    "StoreClosedError",
    "StoreError",
    "StoreFullError",
    "__version__",
    "attention",
    "probe",
    "reference",
]

if importlib.util.find_spec("transformers") is not None:
    from torch_csd.hf import StorageCache, swap_attention

    __all__ += ["StorageCache", "swap_attention"]
