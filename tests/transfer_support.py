"""For the tests of what moves bytes between drive and device: memory, a device in host memory, stubs of NVIDIA's."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import threading
from collections import deque
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

BLOCK = 4096


def aligned_memory(byte_count: int, fill: int = 0) -> torch.Tensor:
    """uint8 [byte_count], its address a multiple of 4096."""
    memory = torch.full((byte_count + BLOCK,), fill, dtype=torch.uint8)
    return memory[-memory.data_ptr() % BLOCK :][:byte_count]


def random_bytes(byte_count: int, seed: int = 0) -> torch.Tensor:
    memory = aligned_memory(byte_count)
    memory.random_(generator=torch.Generator().manual_seed(seed))
    return memory


# ---- a device whose memory is the host's, and whose work is done when the test says so -------------------------------


class HostEvent:
    """A place in a stream. `synchronize` lets its stream work until there, as a card would go on by itself."""

    def __init__(self, stream: HostStream) -> None:
        self.stream = stream
        self.passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.stream.run(until=self)


class ProducerEvent:
    """An event of work that is not the test's device: passed when `finish` is called, from any thread."""

    def __init__(self) -> None:
        self._passed = threading.Event()

    def finish(self) -> None:
        self._passed.set()

    def query(self) -> bool:
        return self._passed.is_set()

    def synchronize(self) -> None:
        assert self._passed.wait(30), "nobody finished the producer's work"


class HostStream:
    """Copies, and events to wait for and to pass, in order. They run at once, unless the device is held."""

    def __init__(self, device: HostDevice) -> None:
        self.device = device
        self.work: deque = deque()

    def issue(self, item: object) -> None:
        self.work.append(item)
        if not self.device.held:
            self.run(block=False)

    def record_event(self) -> HostEvent:
        event = HostEvent(self)
        self.issue(event)
        return event

    def wait_event(self, event: object) -> None:
        self.issue(("wait", event))

    def synchronize(self) -> None:
        self.run()

    def run(self, *, until: HostEvent | None = None, block: bool = True) -> None:
        while self.work and not (until is not None and until.passed):
            item = self.work[0]
            if isinstance(item, HostEvent):
                item.passed = True
            elif isinstance(item, tuple):
                if not block and not item[1].query():
                    return
                item[1].synchronize()
            else:
                item()
            self.work.popleft()


class _Issue(TorchFunctionMode):
    """Torch's copies inside go to a stream."""

    def __init__(self, stream: HostStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            to, source = (tensor.as_subclass(torch.Tensor) for tensor in args)
            assert kwargs == {"non_blocking": True}
            self.stream.issue(lambda: to.copy_(source))
            return args[0]
        return function(*args, **(kwargs or {}))


class HostDevice:
    """A `Device` without kernels. held: its streams do nothing until they are waited for, or `run` is called."""

    torch_device = torch.device("cpu")
    name = "host memory"
    multiprocessor_count = 1

    def __init__(self) -> None:
        self.held = False
        self.streams: list[HostStream] = []

    def new_stream(self) -> HostStream:
        self.streams.append(HostStream(self))
        return self.streams[-1]

    def use(self, stream: HostStream) -> _Issue:
        return _Issue(stream)

    def new_memory(self, byte_count: int) -> torch.Tensor:
        return aligned_memory(byte_count, fill=0xEE)

    def new_pinned_memory(self, byte_count: int) -> torch.Tensor:
        return aligned_memory(byte_count, fill=0xDD)

    def run(self) -> None:
        """What the streams can do now."""
        for stream in self.streams:
            stream.run(block=False)


# ---- the device of tests/native/stub_cuda.c, in a process that has it and stub_cufile.c for its libraries ------------


class StubTensor(torch.Tensor):
    """Host memory that kvikio takes for a device's."""

    @property
    def __cuda_array_interface__(self) -> dict:
        assert self.dtype == torch.uint8 and self.is_contiguous()
        return {"shape": tuple(self.shape), "typestr": "|u1", "data": (self.data_ptr(), False), "version": 3}


def stub_memory(byte_count: int) -> torch.Tensor:
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_device_memory.restype = ctypes.c_void_p
    address = library.stub_device_memory(ctypes.c_size_t(byte_count))
    memory = torch.frombuffer((ctypes.c_uint8 * byte_count).from_address(address), dtype=torch.uint8)
    return memory.as_subclass(StubTensor)


class StubDevice(HostDevice):
    name = "stub of libcuda"

    def new_memory(self, byte_count: int) -> torch.Tensor:
        return stub_memory(byte_count).fill_(0xEE)


def build_stubs(directory: Path) -> None:
    """libcuda.so.1 and libcufile.so.0 of tests/native."""
    sources = Path(__file__).parent / "native"
    for source, library in (("stub_cuda.c", "libcuda.so.1"), ("stub_cufile.c", "libcufile.so.0")):
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{library}"]
        subprocess.run(["cc", *flags, str(sources / source), "-o", str(directory / library)], check=True)


def stub_environment(stubs: Path, **more: str) -> dict[str, str]:
    """For a process that finds those libraries, and kvikio in them. (AUTO wants a readable /run/udev, too.)"""
    path = os.pathsep.join(filter(None, [str(stubs), os.environ.get("LD_LIBRARY_PATH")]))
    return os.environ | {"LD_LIBRARY_PATH": path, "KVIKIO_COMPAT_MODE": "OFF", STUBS_LOADED: "1"} | more


STUBS_LOADED = "TORCH_CSD_TEST_STUBS"


def why_no_kvikio() -> str | None:
    """What to say where kvikio cannot run over the stubs."""
    if torch.version.cuda is not None:
        return "torch is built for CUDA, and would load the stub of libcuda itself"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build the stubs of libcuda and libcufile"
    for name in ("kvikio", "libkvikio", "rapids_logger", "cuda.pathfinder"):
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{name} is not installed (make test installs it)"
    return None
