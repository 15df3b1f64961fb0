"""What every benchmark shares: the machine's name, its roofs measured in the same run, medians, rows."""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

MIB = 2**20
HUGE_PAGE_BYTES = 2 * MIB


@dataclass
class Row:
    """One result: what was measured, against which roof. ratios are medians over interleaved pairs."""

    name: str
    value: float
    unit: str
    ratios: dict[str, float] = field(default_factory=dict)
    roofs: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Report:
    """Prints rows as they come, and all of them as JSON if asked to."""

    def __init__(self, title: str, as_json: bool) -> None:
        self.as_json = as_json
        self.machine = machine()
        self.title = title
        self.rows: list[Row] = []
        self._say(f"{title}\n{self.machine}\n")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        ratios = "  ".join(f"{ratio:.2f} of {name} ({row.roofs[name]:.2f})" for name, ratio in row.ratios.items())
        self._say(f"{row.name:<44} {row.value:8.2f} {row.unit:<6} {ratios}  {row.note}".rstrip())

    def finish(self) -> None:
        if self.as_json:
            rows = [asdict(row) for row in self.rows]
            print(json.dumps({"title": self.title, "machine": self.machine, "rows": rows}, indent=1))

    def _say(self, text: str) -> None:
        if not self.as_json:
            print(text, flush=True)


def machine() -> str:
    model = platform.processor()
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo") as file:
        memory_gib = int(file.readline().split()[1]) / 2**20
    date = time.strftime("%Y-%m-%d")
    processor = names[0] if names else model
    return f"{date}, {processor}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, torch {torch.__version__}"


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_ratio(values: Sequence[float], roofs: Sequence[float]) -> float:
    """Median of value / roof over pairs measured one after the other: what drifts, drifts for both."""
    return statistics.median(value / roof for value, roof in zip(values, roofs, strict=True))


class DriveRoof:
    """How fast one file on the drive can be read with O_DIRECT, past the page cache. Writes the file, removes it.

    fio reads into ordinary 4 KiB pages, as its defaults are. huge_pages() is our own reader, into huge pages: on
    drives that take few segments a request (virtio) that alone is worth a factor, so both are worth knowing.
    """

    def __init__(self, directory: str, file_bytes: int) -> None:
        self.path = os.path.join(directory, f".torch_csd-roof-{os.getpid()}")
        self.file_bytes = file_bytes // (4 * MIB) * 4 * MIB
        buffer = mmap.mmap(-1, MIB)
        buffer.write(os.urandom(MIB))
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(file, 0, self.file_bytes)
            for _ in range(self.file_bytes // MIB):
                os.write(file, buffer)
            os.fsync(file)
        finally:
            os.close(file)

    def __enter__(self) -> DriveRoof:
        return self

    def __exit__(self, *exception: object) -> None:
        os.unlink(self.path)

    def fio(self) -> float:
        """GB/s of fio, sequential 1 MiB reads: the better of 1 job x depth 32 and 4 jobs x depth 8."""
        return max(self._fio(jobs, depth) for jobs, depth in ((1, 32), (4, 8)))

    def _fio(self, jobs: int, depth: int) -> float:
        share = self.file_bytes // jobs
        command = [
            "fio", "--name=roof", f"--filename={self.path}", "--rw=read", "--bs=1M", "--direct=1", f"--size={share}",
            f"--offset_increment={share}", f"--numjobs={jobs}", f"--iodepth={depth}", "--ioengine=io_uring",
            "--group_reporting", "--output-format=json", "--allow_file_create=0",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)["jobs"][0]["read"]["bw_bytes"] / 1e9

    def huge_pages(self, threads: int = 4) -> float:
        """GB/s of ``threads`` threads of blocking 1 MiB reads into huge pages, each its own part of the file."""
        share = self.file_bytes // threads
        barrier = threading.Barrier(threads + 1)

        def read(part: int) -> None:
            # Private: shared anonymous memory is shmem, which gets no huge pages.
            memory = mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            view = memoryview(memory)
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            begin = -address % HUGE_PAGE_BYTES
            target = view[begin : begin + MIB]
            file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            try:
                barrier.wait()
                for offset in range(part * share, (part + 1) * share, MIB):
                    os.preadv(file, [target], offset)
            finally:
                os.close(file)
                barrier.wait()

        readers = [threading.Thread(target=read, args=(part,)) for part in range(threads)]
        for reader in readers:
            reader.start()
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        elapsed = time.perf_counter() - start
        for reader in readers:
            reader.join()
        return self.file_bytes / elapsed / 1e9


def has_fio() -> bool:
    return shutil.which("fio") is not None


def memory_read_gbs(tensor: torch.Tensor) -> float:
    """GB/s at which torch's threads read a tensor's bytes: the roof of anything that reads them once."""
    words = tensor.view(torch.int64).flatten()
    return words.nbytes / seconds(words.sum) / 1e9
