"""A real card, by torch.cuda and CuPy. The contract is in device.py."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES
from torch_csd.cuda.device import Kernel
from torch_csd.cuda.nvrtc import compile_kernel, import_cupy
from torch_csd.errors import MemoryBudgetError

_SHARED_BYTES_MAX = 48 * 1024  # what every card gives a block without being asked


class CudaDevice:
    """One CUDA device. Thread-safe."""

    def __init__(self, device: torch.device | str | int = "cuda") -> None:
        """Raises ImportError without CuPy, RuntimeError without such a device."""
        self._cupy = import_cupy()
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.multiprocessor_count = properties.multi_processor_count
        self._capability = 10 * properties.major + properties.minor
        self._functions: dict[Kernel, object] = {}  # cupy.cuda.function.Function
        self._lock = threading.Lock()

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)  # non-blocking: torch makes all of its pool so

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def new_memory(self, byte_count: int) -> Tensor:
        cupy = self._cupy
        with cupy.cuda.Device(self.torch_device.index):
            memory = cupy.cuda.MemoryPointer(self._allocate(byte_count), 0)
            array = cupy.ndarray((byte_count,), dtype=np.uint8, memptr=memory)
            return torch.as_tensor(array, device=self.torch_device)  # shares the memory, and keeps the array

    def _allocate(self, byte_count: int) -> object:
        """By cudaMalloc, of no pool. Raises MemoryBudgetError."""
        cupy = self._cupy
        try:
            return cupy.cuda.Memory(byte_count)
        except cupy.cuda.memory.OutOfMemoryError:
            torch.cuda.empty_cache()  # what torch's pool has and does not use
        try:
            return cupy.cuda.Memory(byte_count)
        except cupy.cuda.memory.OutOfMemoryError:
            free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
            raise MemoryBudgetError(
                f"{self.name}: wanted {byte_count} bytes of GPU memory, {free_bytes} are free; lower gpu_budget or "
                f"gpu_staging"
            ) from None

    def new_pinned_memory(self, byte_count: int) -> Tensor:
        memory = torch.empty(byte_count + BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        return memory[-memory.data_ptr() % BLOCK_BYTES :][:byte_count]

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[object],
        *,
        stream: torch.cuda.Stream,
        shared_bytes: int = 0,
    ) -> None:
        if shared_bytes > _SHARED_BYTES_MAX:
            raise ValueError(f"dynamic shared memory is at most {_SHARED_BYTES_MAX} bytes, got {shared_bytes}")
        values = tuple(
            np.int64(0 if argument is None else argument.data_ptr())
            if argument is None or isinstance(argument, Tensor)
            else argument
            for argument in arguments
        )
        cupy = self._cupy
        with cupy.cuda.Device(self.torch_device.index), cupy.cuda.Stream.from_external(stream):
            self._function(kernel)(grid, block, values, shared_mem=shared_bytes)

    def prepare(self, kernel: Kernel) -> None:
        """Compiles a kernel before it is needed. Raises RuntimeError where this card or NVRTC cannot have it."""
        with self._cupy.cuda.Device(self.torch_device.index):
            self._function(kernel)

    def _function(self, kernel: Kernel) -> object:
        """Compiled by the first that needs it. Called with the device current."""
        with self._lock:
            if kernel not in self._functions:
                compiled = compile_kernel(kernel, self._capability)
                module = self._cupy.cuda.function.Module()
                module.load(compiled.code)
                self._functions[kernel] = module.get_function(compiled.name)  # keeps its module
            return self._functions[kernel]
