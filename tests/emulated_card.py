"""A card for machines without a GPU: tokens on the CPU are taken for tokens on a card whose memory is the host's.

All of torch_csd/cuda then runs as on a GPU, the kernels' own sources included (tests/emulation), but for CudaDevice and
GPUDirect Storage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import torch_csd.cuda
import torch_csd.cuda.prefill
import torch_csd.drive
from torch_csd import KVStore, StorageCache
from torch_csd.config import StoreConfig
from torch_csd.cuda.device import Device
from torch_csd.cuda.pinned import PinnedTransfer
from torch_csd.cuda.transfer import Transfer

sys.path.append(str(Path(__file__).parent / "emulation"))

from emulated_device import EmulatedDevice, compiler  # noqa: E402

MakeTransfer = Callable[[Device, Tensor], Transfer]


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    executor: str = "gpu",
    gpu_budget: int | str = 0,
    gpu_staging: int | str = "4MiB",
    make_transfer: MakeTransfer = PinnedTransfer,
) -> None:
    """Every store that is opened from now on has a card, and these for its settings where it is given no others."""
    if compiler() is None:
        pytest.skip("no C++ compiler to compile the kernels for the CPU")

    def choose_transfer(card: Device, drive: Tensor, config: StoreConfig, writable: bool) -> tuple[Transfer, str]:
        return make_transfer(card, drive), "emulated"

    monkeypatch.setattr(torch_csd.drive, "is_card", lambda device: True)
    monkeypatch.setattr(torch_csd.cuda, "check_available", lambda config: None)
    monkeypatch.setattr(torch_csd.cuda, "open_device", lambda device: EmulatedDevice())
    monkeypatch.setattr(torch_csd.cuda, "choose_transfer", choose_transfer)
    monkeypatch.setattr(torch_csd.cuda.prefill, "PACKED_PAGES_MIN", 1)  # so that tests are small
    settings = {"executor": executor, "gpu_budget": gpu_budget, "gpu_staging": gpu_staging}
    for opens in (KVStore.__init__, KVStore.open, StorageCache.__init__, StorageCache.open):
        defaults = getattr(opens, "__func__", opens).__kwdefaults__
        for name, value in settings.items():
            monkeypatch.setitem(defaults, name, value)
