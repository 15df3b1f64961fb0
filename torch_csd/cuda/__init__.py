"""The GPU path: pages packed on the card, moved between card and drive, and attended to there; weights brought there.

Imported only when tokens on a CUDA device meet a store, or a store or a model's weights are to use one; importing it
loads neither CuPy nor kvikio.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_csd.config import StoreConfig
from torch_csd.cuda.calibrate import measure_rates
from torch_csd.cuda.card import Card
from torch_csd.cuda.device import Device, Kernel
from torch_csd.errors import GpuUnavailableError

if TYPE_CHECKING:
    from torch_csd.cuda.gds import GdsTransfer
    from torch_csd.cuda.transfer import Transfer


def check_available(config: StoreConfig) -> None:
    """Whether what the settings insist on can be had, before anything is stored.

    Raises:
        GpuUnavailableError: it cannot; the text says why.
    """
    wanted = 'executor="gpu"' if config.executor == "gpu" else 'gpu_io="gds"'
    if not torch.cuda.is_available():
        raise GpuUnavailableError(f"{wanted} needs a CUDA device; there is none (torch {torch.__version__})")
    _check_packages(wanted)
    if config.gpu_io == "gds":
        from torch_csd.cuda.probe import probe_gpu_io

        verdict = probe_gpu_io(config.directory, torch.cuda.current_device())
        if verdict.path != "gds":
            raise GpuUnavailableError(f'gpu_io="gds": {verdict.reason}')


def _check_packages(wanted: str) -> None:
    if importlib.util.find_spec("cupy") is None:
        raise GpuUnavailableError(f"{wanted} needs CuPy: pip install torch_csd[cuda], or cupy-cuda13x alone")


_devices: dict[torch.device, Device] = {}  # one each: they keep what they have compiled


def open_device(device: torch.device) -> Device:
    """The card that tokens are on, or that a model computes on.

    Raises:
        GpuUnavailableError: there is no such card, CuPy is missing, or kernels cannot be compiled for the card.
    """
    if device.index is None and torch.cuda.is_available():
        device = torch.device(device.type, torch.cuda.current_device())
    if device in _devices:
        return _devices[device]
    wanted = f'device="{device}"'
    if not torch.cuda.is_available():
        raise GpuUnavailableError(
            f'{wanted} needs a CUDA device; there is none (torch {torch.__version__}): use device="cpu", or a torch '
            f"that is built for CUDA and a driver"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise GpuUnavailableError(f"{wanted}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    _check_packages(wanted)
    from torch_csd.cuda.cuda_device import CudaDevice

    try:
        card = CudaDevice(device)
        card.prepare(Kernel("checksum", "csd::checksum"))  # what is wrong with CuPy, NVRTC or an old card shows here
    except (ImportError, RuntimeError) as error:
        raise GpuUnavailableError(f"{device} cannot run the kernels: {error}") from error
    return _devices.setdefault(device, card)


def choose_transfer(card: Device, drive: Tensor, config: StoreConfig, writable: bool) -> tuple[Transfer, str]:
    """How bytes move between the drive and the card, and why so."""
    from torch_csd.cuda import probe  # not above: it is run as a program, too

    transfer = probe.choose_transfer(card, drive, config.directory, config.gpu_io, writable=writable)
    if config.gpu_io == "pinned":
        return transfer, "pinned memory, as asked"
    return transfer, probe.probe_gpu_io(config.directory, card.torch_device.index or 0).reason


def choose_direct(card: Device, directory: str, gpu_io: str) -> tuple[GdsTransfer | None, str]:
    """GPUDirect Storage for files of a directory that are only read; None: they go by pinned memory. And why so.

    Raises:
        GpuUnavailableError: it was asked for and is not active.
    """
    from torch_csd.cuda import probe

    transfer = probe.open_direct(card, directory, gpu_io)
    if gpu_io == "pinned":
        return transfer, "pinned memory, as asked"
    return transfer, probe.probe_gpu_io(directory, card.torch_device.index or 0).reason


def open_card(device: torch.device, drive: Tensor, config: StoreConfig, *, writable: bool) -> Card:
    """A drive's share on a card.

    Raises:
        GpuUnavailableError: a package is missing, or GPUDirect Storage was asked for and is not active.
    """
    card = open_device(device)
    transfer, reason = choose_transfer(card, drive, config, writable)
    try:
        rates = measure_rates(card, config, direct=transfer.name == "gds") if config.executor == "auto" else None
        return Card(
            card,
            transfer,
            path=config.directory,
            transfer_reason=reason,
            rates=rates,
            executor=config.executor,
            budget_bytes=config.gpu_budget_bytes,
            staging_bytes=config.gpu_staging_bytes,
            checksums=config.checksums,
        )
    except BaseException:
        transfer.close()
        raise
