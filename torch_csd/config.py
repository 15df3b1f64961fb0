"""Settings: how they are written, what they default to. The environment is read here and nowhere else."""

from __future__ import annotations

import operator
import os
import re
import tempfile
from dataclasses import dataclass

import torch

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter + "IB"] = _UNITS[_letter] = 1024**_power
    _UNITS[_letter + "B"] = 1000**_power

_KV_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": torch.int4,
}

_INT_MAX = 2**62  # of positions and sizes: sums of two still fit the native side's 64 bits

IO_ENGINES = ("auto", "io_uring", "pread")
EXECUTORS = ("auto", "near", "gpu")
GPU_IO_PATHS = ("auto", "gds", "pinned")


def parse_bytes(size: int | str) -> int:
    """Number of bytes meant by ``size``: an int, or text such as ``"128MiB"``, ``"1.5 GiB"``, ``"2GB"``.

    ``KiB``, ``MiB``, ``GiB``, ``TiB`` (or ``K``, ``M``, ``G``, ``T``) are powers of 1024, ``KB`` ... ``TB`` of 1000.

    Raises:
        ValueError: if it is not a size, or negative.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return as_int(size, "a size in bytes", low=0)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match.group(2).upper() not in _UNITS:
        raise ValueError(f'a size must be a number of bytes or text such as "512MiB" or "2GiB", got {size!r}')
    return as_int(int(float(match.group(1)) * _UNITS[match.group(2).upper()]), f"size {size!r} in bytes")


def as_int(value: object, name: str, *, low: int = -_INT_MAX, high: int = _INT_MAX) -> int:
    """``value`` as an int from ``low`` to ``high``.

    Raises:
        TypeError: it is not an integer. ValueError: it is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not low <= number <= high:
        wanted = f"at least {low}" if number < low else f"at most {high}"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def parse_kv_dtype(kv_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype that K and V are stored in; ``None`` stays ``None``: as they come.

    Raises:
        ValueError: if it is not float32, bfloat16, float16, int8 or int4.
    """
    if kv_dtype is None or kv_dtype in _KV_DTYPES.values():
        return kv_dtype
    if isinstance(kv_dtype, str) and kv_dtype.lower() in _KV_DTYPES:
        return _KV_DTYPES[kv_dtype.lower()]
    raise ValueError(f"kv_dtype must be one of {', '.join(_KV_DTYPES)} or None (as the model's), got {kv_dtype!r}")


def parse_io_engine(io_engine: str) -> str:
    """``"auto"`` falls back to ``$TORCH_CSD_IO_ENGINE``.

    Raises:
        ValueError: if it is not auto, io_uring or pread.
    """
    if io_engine == "auto":
        io_engine = os.environ.get("TORCH_CSD_IO_ENGINE") or "auto"
    if io_engine not in IO_ENGINES:
        raise ValueError(f"io_engine must be one of {', '.join(IO_ENGINES)}, got {io_engine!r}")
    return io_engine


def directory_path(directory: str | os.PathLike[str]) -> str:
    """The absolute path of a directory, as text that can be passed on.

    Raises:
        ValueError: its name is not valid UTF-8. TypeError: it is not a path.
    """
    path = os.path.abspath(os.fspath(directory))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"directory must be a name in UTF-8, got {path!r}; choose another") from None
    return path


def simd_name(simd: str | None) -> str:
    """The instruction set to force, or ``"auto"``: ``simd``, else ``$TORCH_CSD_SIMD``. The kernels check what it names.

    Raises:
        TypeError: it is not text.
    """
    if simd is not None and not isinstance(simd, str):
        raise TypeError(f'simd must be text such as "avx2", or None, got {simd!r}')
    return simd or os.environ.get("TORCH_CSD_SIMD") or "auto"


def scratch_directory(directory: str | os.PathLike[str] | None) -> str:
    """The absolute path of ``directory``, which falls back to ``$TORCH_CSD_DIRECTORY``, then to the temporary one."""
    return directory_path(directory or os.environ.get("TORCH_CSD_DIRECTORY") or tempfile.gettempdir())


@dataclass(frozen=True)
class StoreConfig:
    """Everything a drive is opened with. Frozen: nothing changes behind an open store."""

    directory: str
    memory_budget_bytes: int
    kv_dtype: torch.dtype | None
    io_engine: str
    simd: str
    threads: int
    queue_depth: int
    read_ahead_bytes: int | None
    resident: bool
    max_bytes: int | None
    checksums: bool
    executor: str
    gpu_budget_bytes: int
    gpu_staging_bytes: int
    gpu_io: str

    @staticmethod
    def make(
        directory: str | os.PathLike[str] | None,
        *,
        memory_budget: int | str,
        kv_dtype: torch.dtype | str | None,
        io_engine: str,
        simd: str | None,
        threads: int | None,
        queue_depth: int,
        read_ahead: int | str | None,
        resident: bool,
        max_bytes: int | str | None = None,
        checksums: bool = True,
        executor: str = "auto",
        gpu_budget: int | str = 0,
        gpu_staging: int | str = "256MiB",
        gpu_io: str = "auto",
    ) -> StoreConfig:
        """Validates what a user passed and fills in defaults.

        ``directory`` falls back to ``$TORCH_CSD_DIRECTORY``, then to the temporary directory; ``simd`` to
        ``$TORCH_CSD_SIMD``, then to the fastest the processor has; ``io_engine`` ``"auto"`` to
        ``$TORCH_CSD_IO_ENGINE``; ``threads`` to torch's.
        """
        io_engine = parse_io_engine(io_engine)
        for name, value, known in (("executor", executor, EXECUTORS), ("gpu_io", gpu_io, GPU_IO_PATHS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if threads is None:
            threads = torch.get_num_threads()
        return StoreConfig(
            directory=scratch_directory(directory),
            memory_budget_bytes=parse_bytes(memory_budget),
            kv_dtype=parse_kv_dtype(kv_dtype),
            io_engine=io_engine,
            simd=simd_name(simd),
            threads=as_int(threads, "threads", low=1, high=1024),
            queue_depth=as_int(queue_depth, "queue_depth", low=2, high=1024),
            read_ahead_bytes=None if read_ahead is None else parse_bytes(read_ahead),
            resident=bool(resident),
            max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
            checksums=bool(checksums),
            executor=executor,
            gpu_budget_bytes=parse_bytes(gpu_budget),
            gpu_staging_bytes=as_int(parse_bytes(gpu_staging), "gpu_staging in bytes", low=2**20),
            gpu_io=gpu_io,
        )
