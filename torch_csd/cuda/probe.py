"""How bytes get between a directory's drive and a GPU, found out by doing it.

Three layers may each fall back without a word, and kvikio may hang for ever where libcufile has no driver. So a process
of its own tries, with a time limit, and what it finds is remembered for each device and file system.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.config import GPU_IO_PATHS
from torch_csd.cuda.device import Device
from torch_csd.cuda.transfer import Transfer
from torch_csd.errors import GpuUnavailableError, StoreError

if TYPE_CHECKING:
    from torch_csd.cuda.gds import GdsTransfer

LIMIT_S = 20.0  # for kvikio to answer; it does in two where it works
STARTUP_LIMIT_S = 60.0  # for Python, torch and CUDA before that: cold, from a network drive
TRIED_BYTES = 1 << 20


@dataclass(frozen=True)
class GpuIoVerdict:
    """What a directory and a device can do."""

    path: str  # "gds", "pinned" or "none"
    reason: str  # one sentence
    verdicts: tuple[str, ...] = ()  # a line for each thing tried
    versions: dict[str, str] = field(default_factory=dict)  # by library


def probe_gpu_io(directory: str | os.PathLike[str], device_index: int, *, limit_s: float = LIMIT_S) -> GpuIoVerdict:
    """The best way between a directory's drive and a device. Costs seconds, once for each device and file system.

    Without CUDA nothing is started or imported. Leaves nothing behind.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not torch.cuda.is_available():
        return GpuIoVerdict("none", f"no CUDA device (torch {torch.__version__})")
    key = (device_index, os.stat(directory).st_dev)
    if importlib.util.find_spec("kvikio") is None:
        return GpuIoVerdict("pinned", "kvikio is not installed; install torch_csd[cuda] for GPUDirect Storage")
    with _verdicts_lock:
        if key not in _verdicts:
            _verdicts[key] = _ask(os.fspath(directory), device_index, limit_s)
        return _verdicts[key]


_verdicts: dict[tuple[int, int], GpuIoVerdict] = {}
_verdicts_lock = threading.Lock()


def choose_transfer(
    device: Device, drive: Tensor, directory: str, gpu_io: str, *, depth: int = 32, writable: bool = True
) -> Transfer:
    """A transfer between a drive (its handle, and where its file is) and a device.

    gpu_io: "gds", "pinned", or "auto": "gds" where it is proved to work. writable: False where the drive only reads.

    Raises:
        GpuUnavailableError: "gds" was asked for and does not work here. ValueError: gpu_io is none of these.
    """
    from torch_csd.cuda.pinned import PinnedTransfer

    direct = open_direct(device, directory, gpu_io, drive=drive, depth=depth, writable=writable)
    return PinnedTransfer(device, drive, depth=depth) if direct is None else direct


def open_direct(
    device: Device,
    directory: str,
    gpu_io: str,
    *,
    drive: Tensor | None = None,
    depth: int = 32,
    writable: bool = False,
) -> GdsTransfer | None:
    """A transfer by GPUDirect Storage; None where it is not wanted, or does not work. Arguments and errors are those
    of :func:`choose_transfer`; without a drive it is for files that others wrote."""
    if gpu_io not in GPU_IO_PATHS:
        raise ValueError(f"gpu_io must be one of {', '.join(GPU_IO_PATHS)}, got {gpu_io!r}")
    if gpu_io == "pinned":
        return None
    verdict = probe_gpu_io(directory, device.torch_device.index or 0)
    if verdict.path != "gds":
        if gpu_io == "gds":
            raise GpuUnavailableError(
                f"{directory}: gpu_io='gds' does not work here: {verdict.reason}; use gpu_io='auto' for what does"
            )
        return None
    from torch_csd.cuda.gds import GdsTransfer

    try:
        path = None if drive is None else ops.file_path(drive)
        return GdsTransfer(device, path, depth=depth, writable=writable)
    except StoreError as error:
        if gpu_io == "gds":
            raise
        # Though it worked for a file beside it: not silently.
        warnings.warn(f"{directory}: going by pinned memory: {error}", stacklevel=3)
        return None


# ---- asking ----------------------------------------------------------------------------------------------------------


def _ask(directory: str, device_index: int, limit_s: float) -> GpuIoVerdict:
    command = [sys.executable, "-m", "torch_csd.cuda.probe", directory, str(device_index), str(limit_s)]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = child.communicate(timeout=STARTUP_LIMIT_S + limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        try:
            child.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            pass  # in the kernel, for good: left behind rather than waited for
        return GpuIoVerdict("pinned", f"the probe did not end within {STARTUP_LIMIT_S + limit_s:g} s")
    if child.returncode == -signal.SIGALRM:
        return GpuIoVerdict("pinned", f"kvikio did not answer within {limit_s:g} s (libcufile without a driver hangs)")
    if child.returncode < 0:
        return GpuIoVerdict("pinned", f"the probe of kvikio was ended by {signal.Signals(-child.returncode).name}")
    if child.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return GpuIoVerdict("pinned", f"the probe of kvikio failed: {last}")
    found = json.loads(output.strip().splitlines()[-1])
    return GpuIoVerdict(found["path"], found["reason"], tuple(found["verdicts"]), found["versions"])


# ---- the process that tries ------------------------------------------------------------------------------------------


class _Refused(Exception):
    """What is tried does not work; says why."""


def _try(directory: str, device_index: int, limit_s: float) -> GpuIoVerdict:
    verdicts: list[str] = []
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    try:
        if not torch.cuda.is_available():
            raise _Refused(f"no CUDA device in a new process (torch {torch.__version__})")
        # Before kvikio, which hangs where it cannot begin with CUDA itself.
        torch.cuda.init()
        torch.cuda.set_device(device_index)
        # From here on code that this process cannot interrupt may never return: the kernel ends it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        _import_kvikio(verdicts, versions)
        how = _move_and_compare(directory, torch.device("cuda", device_index), verdicts)
    except _Refused as refused:
        return GpuIoVerdict("pinned", str(refused), tuple(verdicts), versions)
    reason = f"kvikio {versions['kvikio']} with cuFile {versions['cufile']} moves bytes without host memory, by {how}"
    return GpuIoVerdict("gds", reason, tuple(verdicts), versions)


def _import_kvikio(verdicts: list[str], versions: dict[str, str]) -> None:
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except Exception as error:  # the libraries that it loads raise what they like
        raise _Refused(
            f"kvikio cannot be imported ({_one_line(error)}); install torch_csd[cuda] for GPUDirect Storage"
        ) from None
    versions["kvikio"] = kvikio.__version__
    versions["cufile"] = ".".join(map(str, kvikio.cufile_driver.libcufile_version()))
    preferred = kvikio.defaults.is_compat_mode_preferred()
    verdicts.append(
        f"kvikio {versions['kvikio']}, cuFile {versions['cufile']}: compat mode {'on' if preferred else 'off'}"
    )
    if preferred:
        raise _Refused(
            "kvikio prefers its compat mode (KVIKIO_COMPAT_MODE, no libcufile, WSL, or /run/udev cannot be read)"
        )


def _move_and_compare(directory: str, device: torch.device, verdicts: list[str]) -> str:
    """Writes a file from the device and reads it back. Returns what carried the bytes."""
    import kvikio

    from torch_csd.cuda.gds import compat_mode_off

    try:
        from cuda.bindings import cufile
    except Exception as error:
        raise _Refused(
            f"cuda.bindings.cufile cannot tell which way bytes go ({_one_line(error)}); install cuda-bindings"
        ) from None
    wanted = torch.randint(0, 256, (TRIED_BYTES,), dtype=torch.uint8)
    try:
        written = torch.empty(TRIED_BYTES, dtype=torch.uint8, device=device)
        read = torch.empty(TRIED_BYTES, dtype=torch.uint8, device=device)
        written.copy_(wanted)
        read.zero_()
        torch.cuda.synchronize()
        with compat_mode_off(), _Scratch(directory) as path, kvikio.CuFile(path, "r+") as file:
            cufile.set_stats_level(3)
            cufile.stats_start()
            before = _counts(cufile)
            counts = file.raw_write(written, TRIED_BYTES, 0, 0), file.raw_read(read, TRIED_BYTES, 0, 0)
            moved = {name: count - before[name] for name, count in _counts(cufile).items()}
    except Exception as error:
        verdicts.append(f"1 MiB by cuFile: {_one_line(error)}")
        raise _Refused(f"cuFile does not work in {directory}: {_one_line(error)}") from None
    told = ", ".join(f"{name} {count}" for name, count in moved.items())
    verdicts.append(f"1 MiB written and read back by cuFile: {told}")
    if counts != (TRIED_BYTES, TRIED_BYTES):
        raise _Refused(f"cuFile moved {counts[0]} and {counts[1]} bytes of {TRIED_BYTES} to {directory} and back")
    if not torch.equal(read.cpu(), wanted):
        raise _Refused(f"cuFile read other bytes than it wrote in {directory}")
    for verb in ("writes", "reads"):
        if moved[f"posix {verb}"] or not moved[f"nvidia-fs {verb}"] + moved[f"PCI P2P {verb}"]:
            raise _Refused(f"cuFile went by host memory in {directory} ({told})")
    return "nvidia-fs" if moved["nvidia-fs reads"] else "PCI peer-to-peer DMA"


def _counts(cufile: object) -> dict[str, int]:
    """By way: how many operations cuFile has done so."""
    stats = cufile.StatsLevel3()
    ctypes.memset(stats.ptr, 0, cufile.stats_level3_dtype.itemsize)  # it may be filled only as far as there are devices
    cufile.get_stats_l3(stats.ptr)
    ways = (("nvidia-fs", "nvfs"), ("PCI P2P", "p2p"), ("posix", "posix"))
    return {
        f"{name} {verb}": int(sum(getattr(stats.per_gpu_stats, f"n_{key}_{verb}")))
        for name, key in ways
        for verb in ("writes", "reads")
    }


class _Scratch:
    """A path to a file of TRIED_BYTES in a directory, without a name where that is possible, as stores have it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._descriptor = -1

    def __enter__(self) -> str:
        try:
            self._descriptor = os.open(self.directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:  # not every file system has it
            self._descriptor, name = tempfile.mkstemp(dir=self.directory)
            os.unlink(name)
        os.posix_fallocate(self._descriptor, 0, TRIED_BYTES)
        return f"/proc/self/fd/{self._descriptor}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> None:
    directory, device_index, limit_s = sys.argv[1:]
    print(json.dumps(asdict(_try(directory, int(device_index), float(limit_s)))), flush=True)
    # Libraries without a driver may hang as they go, too.
    os._exit(0)


if __name__ == "__main__":
    main()
