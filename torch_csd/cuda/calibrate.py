"""The rates that the cost model starts from, measured in a fraction of a second; it learns better ones later."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from torch_csd import ops
from torch_csd.config import StoreConfig
from torch_csd.cuda.cost import Rates
from torch_csd.cuda.device import Device
from torch_csd.errors import StoreError

MEASURED_BYTES = 32 << 20
ROUNDS = 3
# Where it cannot be measured, bytes/s: of one NVMe drive, and of attention on a few cores (README, "Measured").
GUESSED_DRIVE_RATE = 3e9
GUESSED_CPU_RATE = 30e9
# Attention reads what a copy reads and writes; it gets as much of the memory's rate as the kernels are held to.
KERNEL_SHARE = 0.7


def measure_rates(device: Device, config: StoreConfig, *, direct: bool) -> Rates:
    """Rates of this card and of the directory's drive. direct: reads reach the card without passing host memory."""
    drive_rate, cpu_rate = _host_rates(os.stat(config.directory).st_dev, config)
    copy_rate, memory_rate = _card_rates(device)
    return Rates(
        drive_bytes_per_s=drive_rate,
        cpu_bytes_per_s=cpu_rate,
        copy_bytes_per_s=copy_rate,
        card_bytes_per_s=KERNEL_SHARE * memory_rate,
        drive_to_card_bytes_per_s=drive_rate if direct else None,
    )


def _host_rates(device_number: int, config: StoreConfig) -> tuple[float, float]:
    try:
        return _measured_host_rates(device_number, config.directory, config.io_engine, config.simd, config.threads)
    except StoreError:  # nothing can be written there: it is full, or may only be read
        return GUESSED_DRIVE_RATE, GUESSED_CPU_RATE


@functools.lru_cache(maxsize=16)
def _measured_host_rates(
    device_number: int, directory: str, io_engine: str, simd: str, threads: int
) -> tuple[float, float]:
    """Bytes/s of attention over pages of the drive, and of memory, one query a kv head. Once a device."""
    del device_number
    k = torch.zeros(1, 8, 2048, 128, dtype=torch.bfloat16)
    q = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
    rules = dict(scale=1.0, head_dim_v=128)
    appends = MEASURED_BYTES // (2 * k.numel() * k.element_size())
    rates = []
    for resident in (False, True):
        drive = ops.open_drive(
            directory,
            io_engine=io_engine,
            simd=simd,
            memory_budget_bytes=4 * MEASURED_BYTES,
            threads=threads,
            queue_depth=32,
            read_ahead_bytes=0,
            resident=resident,
            checksums=True,
        )
        try:
            layer = ops.create_layer(
                drive, number=0, num_kv_heads=8, head_dim_k=128, head_dim_v=128, dtype=k.dtype, code_bits=0
            )
            for _ in range(appends):
                ops.append_on_drive(layer, k, k)
            ops.flush(drive)
            rates.append(MEASURED_BYTES / _median_s(lambda layer=layer: ops.attend(layer, q, **rules)))
        finally:
            ops.close_drive(drive)
    return rates[0], rates[1]


def _card_rates(device: Device) -> tuple[float, float]:
    """Bytes/s of copies from pinned host memory, and of copies on the card, read and written counted."""
    host = device.new_pinned_memory(MEASURED_BYTES)
    here, there = device.new_memory(MEASURED_BYTES), device.new_memory(MEASURED_BYTES)
    stream = device.new_stream()

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        with device.use(stream):
            target.copy_(source, non_blocking=True)
        stream.synchronize()

    copy(here, host)
    copy_s, memory_s = _median_s(lambda: copy(here, host)), _median_s(lambda: copy(there, here))
    return MEASURED_BYTES / copy_s, 2 * MEASURED_BYTES / memory_s


def _median_s(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(ROUNDS):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return sorted(times_s)[ROUNDS // 2]
