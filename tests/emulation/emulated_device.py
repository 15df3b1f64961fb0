"""A device for machines without one: the kernels' own sources, compiled by g++ and run thread by thread (shim.h)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torch_csd.cuda.device import Kernel
from torch_csd.cuda.kernels.source import source_text

SHIM = Path(__file__).resolve().with_name("shim.h")
# No -ffast-math and no contraction: the kernels' arithmetic is compared bit for bit.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC")
PROGRAM = """#include "{shim}"
{source}
extern "C" const char* csd_launch(const dim3* grid, const dim3* threads, void** arguments) {{
  return emulation::launch(&{expression}, *grid, *threads, arguments);
}}
"""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def compiled(kernel: Kernel) -> ctypes._CFuncPtr:
    """The launcher of a kernel's instance, compiled once per machine and source: processes share a directory."""
    program = PROGRAM.format(shim=SHIM, source=source_text(kernel.source), expression=kernel.expression)
    key = hashlib.sha256("\0".join((program, SHIM.read_text(), *FLAGS)).encode()).hexdigest()[:24]
    directory = Path(tempfile.gettempdir(), f"torch_csd-emulation-{os.getuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    library = directory / f"{kernel.source}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            source, target = Path(scratch, f"{kernel.source}.cpp"), Path(scratch, library.name)
            source.write_text(program)
            command = [compiler(), *FLAGS, str(source), "-o", str(target)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{kernel.expression}: {result.stderr[:4000]}")
            target.rename(library)  # atomic: another process sees all of it, or nothing
    launch = ctypes.CDLL(str(library)).csd_launch
    launch.restype = ctypes.c_char_p
    return launch


class EmulatedEvent:
    """Always passed: an EmulatedStream does everything at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class EmulatedStream:
    def record_event(self) -> EmulatedEvent:
        return EmulatedEvent()

    def wait_event(self, event: EmulatedEvent) -> None:
        pass

    def synchronize(self) -> None:
        pass


class EmulatedDevice:
    """A `torch_csd.cuda.device.Device` whose memory is the host's."""

    torch_device = torch.device("cpu")
    name = "emulation"
    multiprocessor_count = 2  # few: splits are many blocks, and each block costs time here

    def __init__(self) -> None:
        self.launches: list[Kernel] = []
        self._stream = EmulatedStream()

    def current_stream(self) -> EmulatedStream:
        return self._stream

    def new_stream(self) -> EmulatedStream:
        return EmulatedStream()

    @contextlib.contextmanager
    def use(self, stream: EmulatedStream) -> Iterator[None]:
        yield

    def new_memory(self, byte_count: int) -> Tensor:
        """Holds NaN, whatever it is read as. What reads beyond its last page of memory is a crash."""
        pages = -(-byte_count // mmap.PAGESIZE)
        region = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        memory = torch.frombuffer(region, dtype=torch.uint8)
        guard = ctypes.c_void_p(memory.data_ptr() + pages * mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0  # PROT_NONE
        return memory[:byte_count].fill_(0xFF)

    new_pinned_memory = new_memory

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[object],
        *,
        stream: EmulatedStream,
        shared_bytes: int = 0,
    ) -> None:
        assert shared_bytes == 0, "the emulation has static shared memory only"
        self.launches.append(kernel)
        values = [self._value(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        problem = compiled(kernel)((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), addresses)
        if problem is not None:
            raise RuntimeError(f"{kernel.expression}: {problem.decode()}")

    @staticmethod
    def _value(argument: object) -> np.ndarray:
        if argument is None or isinstance(argument, Tensor):
            return np.array([0 if argument is None else argument.data_ptr()], dtype=np.int64)
        assert isinstance(argument, (np.int32, np.int64, np.float32)), f"{argument!r} has no size of its own"
        return np.array([argument])
