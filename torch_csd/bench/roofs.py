"""How fast the drive and the memory are, measured in the run that needs to know."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import threading

import torch

from torch_csd.bench.timing import seconds

MIB = 2**20
HUGE_PAGE_BYTES = 2 * MIB
FIO = "fio, 1 MiB O_DIRECT, best of 1x32 and 4x8"
OWN = "our O_DIRECT reader, 4 threads, huge pages"
MEMORY = "plain read of the same bytes"


def has_fio() -> bool:
    return shutil.which("fio") is not None


class FileRoof:
    """How fast one file on the drive can be read with O_DIRECT, past the page cache. Only reads it.

    fio reads into ordinary 4 KiB pages, as its defaults are. `own` is our own reader, into huge pages: on drives that
    take few segments a request (virtio) that alone is worth a factor, so both are worth knowing.

    Raises OSError where the file system has no O_DIRECT.
    """

    def __init__(self, path: str, file_bytes: int) -> None:
        """file_bytes: that are read of it; at least 32 MiB."""
        self.path = path
        self.file_bytes = max(file_bytes // (32 * MIB), 1) * 32 * MIB  # whole shares of 8 jobs x 4 MiB

    def __enter__(self) -> FileRoof:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self) -> dict[str, float]:
        """GB/s by name: FIO where fio is installed, and OWN."""
        measured = {FIO: max(self.fio(jobs=1, depth=32), self.fio(jobs=4, depth=8))} if has_fio() else {}
        return measured | {OWN: self.own()}

    def fio(self, *, jobs: int, depth: int, block_bytes: int = MIB, engine: str = "io_uring") -> float:
        """GB/s of fio reading the file once, each job its share of it from front to back."""
        share = self.file_bytes // jobs
        command = [
            "fio", "--name=roof", f"--filename={self.path}", "--rw=read", f"--bs={block_bytes}", "--direct=1",
            f"--size={share}", f"--offset_increment={share}", f"--numjobs={jobs}", f"--iodepth={depth}",
            f"--ioengine={engine}", "--group_reporting", "--output-format=json", "--allow_file_create=0",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise OSError(f"fio: {(result.stderr or result.stdout).strip()}")
        output = result.stdout[result.stdout.index("{") :]  # warnings may come first
        return json.loads(output)["jobs"][0]["read"]["bw_bytes"] / 1e9

    def own(self, *, threads: int = 4, block_bytes: int = MIB) -> float:
        """GB/s of ``threads`` threads of blocking reads into huge pages, each its own part of the file."""
        share = self.file_bytes // threads
        barrier = threading.Barrier(threads + 1)

        def read(part: int) -> None:
            # Private: shared anonymous memory is shmem, which gets no huge pages.
            memory = mmap.mmap(
                -1, HUGE_PAGE_BYTES + max(block_bytes, HUGE_PAGE_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            memory.madvise(mmap.MADV_HUGEPAGE)
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            begin = -address % HUGE_PAGE_BYTES
            target = memoryview(memory)[begin : begin + block_bytes]
            file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            try:
                barrier.wait()
                for offset in range(part * share, (part + 1) * share, block_bytes):
                    os.preadv(file, [target], offset)
            finally:
                os.close(file)
                barrier.wait()

        readers = [threading.Thread(target=read, args=(part,)) for part in range(threads)]
        for reader in readers:
            reader.start()
        barrier.wait()
        elapsed_s = seconds(barrier.wait)
        for reader in readers:
            reader.join()
        return share * threads / elapsed_s / 1e9


class DriveRoof(FileRoof):
    """The same of a file in the directory, which it writes and removes."""

    def __init__(self, directory: str, file_bytes: int) -> None:
        super().__init__(os.path.join(directory, f".torch_csd-roof-{os.getpid()}"), file_bytes)
        buffer = mmap.mmap(-1, 4 * MIB)
        buffer.write(os.urandom(4 * MIB))
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(file, 0, self.file_bytes)
            for _ in range(self.file_bytes // (4 * MIB)):
                os.write(file, buffer)
            os.fsync(file)
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(file)

    def __exit__(self, *exception: object) -> None:
        os.unlink(self.path)


def drive_roof_name(roofs: dict[str, float]) -> str:
    """The roof that bars are set on: fio's rate where there is one."""
    return FIO if FIO in roofs else OWN


def read_memory(tensors: list[torch.Tensor]) -> None:
    """Reads every byte once with torch's threads: the roof of anything that does so."""
    for tensor in tensors:
        tensor.view(-1).view(torch.int64).sum()


def heap_bytes() -> int | None:
    """Bytes that malloc has given out in this process; None where the C library cannot tell."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        ]

    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident_set_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
