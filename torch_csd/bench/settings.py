"""What all benchmarks take, checked before anything is measured."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass

import torch

from torch_csd.config import parse_bytes, parse_kv_dtype
from torch_csd.store import KVStore

CODES = (torch.int8, torch.int4)


@dataclass(frozen=True)
class Settings:
    directory: str
    memory_budget: str  # of cold rows; hot rows take what they need
    threads: int
    io_engine: str
    rounds: int
    quick: bool
    kv_dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def make(
        directory: str | os.PathLike[str] | None,
        *,
        memory_budget: str,
        threads: int | None,
        io_engine: str,
        rounds: int,
        quick: bool,
        kv_dtypes: str,
    ) -> Settings:
        """Raises ValueError or StoreError for what cannot work. Sets torch's threads, so that peers have as many."""
        names = [name.strip() for name in kv_dtypes.split(",") if name.strip()]
        if not names:
            raise ValueError("kv_dtype must name at least one type, such as bfloat16,int8,int4")
        chosen = tuple(dict.fromkeys(parse_kv_dtype(name) for name in names))
        parse_bytes(memory_budget)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        threads = torch.get_num_threads()
        with KVStore(directory, memory_budget=memory_budget, io_engine=io_engine, threads=threads) as store:
            directory = store.directory
        return Settings(directory, memory_budget, threads, io_engine, rounds, quick, chosen)

    @property
    def base(self) -> torch.dtype:
        """The float type that models and peers work in: the first one asked for, else bfloat16."""
        return next((dtype for dtype in self.kv_dtypes if dtype not in CODES), torch.bfloat16)

    @property
    def stored(self) -> tuple[torch.dtype, ...]:
        """The base and every other type asked for, in this order."""
        return (self.base, *(dtype for dtype in self.kv_dtypes if dtype != self.base))

    @property
    def budget_bytes(self) -> int:
        return parse_bytes(self.memory_budget)

    def store(self, kv_dtype: torch.dtype | None, *, memory_budget: int | str, resident: bool) -> KVStore:
        return KVStore(self.directory, kv_dtype=kv_dtype, **self.drive_options(memory_budget, resident))

    def drive_options(self, memory_budget: int | str, resident: bool) -> dict:
        """Keyword arguments of `KVStore` and `StorageCache` alike."""
        return {
            "memory_budget": memory_budget,
            "io_engine": self.io_engine,
            "threads": self.threads,
            "resident": resident,
        }

    def require(self, *, drive_bytes: int = 0, memory_bytes: int = 0) -> None:
        """Raises ValueError if there is not so much room, before it is half used up."""
        free_bytes = shutil.disk_usage(self.directory).free
        if drive_bytes > free_bytes:
            raise ValueError(
                f"{self.directory} has {free_bytes / 2**30:.1f} GiB free, this run needs "
                f"{drive_bytes / 2**30:.1f} GiB; choose a smaller --context, or another --directory"
            )
        available_bytes = available_memory_bytes()
        if memory_bytes > available_bytes:
            raise ValueError(
                f"{available_bytes / 2**30:.1f} GiB of memory are available, this run needs "
                f"{memory_bytes / 2**30:.1f} GiB; choose a smaller --context"
            )


def available_memory_bytes() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def parse_count(text: str) -> int:
    """Tokens meant by "32768", "32k" or "1M"; k and M are powers of 1024.

    Raises:
        ValueError: it is not a count above zero.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", text)
    if match is None or int(match.group(1)) == 0:
        raise ValueError(f'a number of tokens must be text such as "32768", "32k" or "1M", got {text!r}')
    return int(match.group(1)) * {"": 1, "k": 1024, "m": 1024**2}[match.group(2).lower()]


def parse_counts(text: str) -> list[int]:
    """ "1k,4k" -> [1024, 4096], in order and each once."""
    return sorted({parse_count(part) for part in text.split(",") if part.strip()})


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_bytes(dtype: torch.dtype) -> int:
    """Of one element; codes count as one byte, which is an upper bound."""
    return 1 if dtype in CODES else dtype.itemsize


def tokens_text(tokens: int) -> str:
    """32768 -> "32k", 1000 -> "1000"."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
