"""The drive's rates, by a few lines of Python: O_DIRECT where there is any, in 4 threads, 4 MiB at a time."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

BLOCK_BYTES = 4 << 20
THREADS = 4


class _Scratch:
    """A file without a name in a directory, and how it is opened."""

    def __init__(self, directory: str, file_bytes: int) -> None:
        self.file_bytes = max(file_bytes // (THREADS * BLOCK_BYTES), 1) * THREADS * BLOCK_BYTES
        self.direct = True
        self._path = os.path.join(directory, f".bench_gpu-roof-{os.getpid()}")
        created = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(created, 0, self.file_bytes)
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_DIRECT)
            except OSError:  # not every file system has it
                self._file, self.direct = os.open(self._path, os.O_RDWR), False
        finally:
            os.close(created)
            os.unlink(self._path)
        self._buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(THREADS)]
        for buffer in self._buffers:
            buffer.write(os.urandom(BLOCK_BYTES))

    @property
    def name(self) -> str:
        how = "O_DIRECT" if self.direct else "the page cache"
        return f"our own {self.verb}, {how}, {THREADS} threads"

    verb = ""

    def _in_threads(self, work: Callable[[int, memoryview], object]) -> None:
        """work(offset, buffer) for every block of the file."""
        share = self.file_bytes // THREADS
        errors: list[OSError] = []

        def part(number: int) -> None:
            try:
                for offset in range(number * share, (number + 1) * share, BLOCK_BYTES):
                    work(offset, memoryview(self._buffers[number]))
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=part, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def write(self) -> None:
        self._in_threads(lambda offset, buffer: os.pwrite(self._file, buffer, offset))

    def read(self) -> None:
        self._in_threads(lambda offset, buffer: os.preadv(self._file, [buffer], offset))

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


class ReadRoof(_Scratch):
    verb = "reads"

    def __init__(self, directory: str, file_bytes: int) -> None:
        super().__init__(directory, file_bytes)
        self.write()


class WriteRoof(_Scratch):
    verb = "writes"
