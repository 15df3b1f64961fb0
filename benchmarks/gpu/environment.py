"""What this machine is: everything that a number depends on."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess

import torch

from gpu.run import Run
from gpu.table import Row


def measure(run: Run) -> None:
    for name, read in {
        "card": card,
        "driver": driver,
        "torch": lambda run: f"{torch.__version__}, CUDA {torch.version.cuda}",
        "CuPy": lambda run: version("cupy"),
        "kvikio": lambda run: version("kvikio"),
        "transformers": lambda run: version("transformers"),
        "processor": processor,
    }.items():
        try:
            run.add(Row(name, text=read(run)))
        except Exception as error:  # a fact less, no more
            run.fail(name, error)
    paths(run)


def card(run: Run) -> str:
    properties = torch.cuda.get_device_properties(run.device.torch_device)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} "
        f"multiprocessors, L2 {properties.L2_cache_size / 2**20:.0f} MiB, sm_{properties.major}{properties.minor}"
    )


def driver(run: Run) -> str:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max",
        "--format=csv,noheader",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    number, generation, width = (part.strip() for part in found.split(","))
    return f"{number}, PCIe {generation} x{width}"


def version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib import metadata

    for name in metadata.packages_distributions().get(package, [package]):
        return f"{name} {metadata.version(name)}"
    return "installed"


def processor(run: Run) -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo") as file:
        memory_gib = int(file.readline().split()[1]) / 2**20
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, load "
        f"{os.getloadavg()[0]:.1f}, Linux {platform.release()}, Python {platform.python_version()}"
    )


def paths(run: Run) -> None:
    import torch_csd
    from torch_csd import ops

    found = torch_csd.probe(run.directory)
    free_gib = found["free_bytes"] / 2**30
    run.add(
        Row("directory", text=f"{found['file_system']} on {found['device'].split(',')[0]}, {free_gib:.0f} GiB free")
    )
    direct = "O_DIRECT" if found["direct_io"] else "through the page cache"
    run.add(Row("I/O engine", text=f"{found['io_engine']}, {direct}", reason=found["reason"]))
    run.add(Row("drive to card", text=found["gpu_io"], reason=found["gpu_reason"]))
    run.add(Row("instructions", text=ops.supported_simd()[-1]))
