"""What the GPU path needs of a card: memory, streams, events and kernels. Knows nothing of pages or files.

`torch.cuda.Stream` and `torch.cuda.Event` are a `Stream` and an `Event`. Everything in this package goes through a
`Device`, so that the tests run all of it, kernels included, on a machine without a GPU: see tests/emulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Waits for that."""


class Stream(Protocol):
    """Work that the device does in order."""

    def record_event(self) -> Event: ...

    def wait_event(self, event: Event) -> None:
        """What is issued from now on waits, on the device, for the event."""

    def synchronize(self) -> None: ...


class Kernel(NamedTuple):
    """An instance of a kernel template of kernels/<source>.cu: `Kernel("attend", "csd::attend<8, 128, 128, 4>")`."""

    source: str
    expression: str


class Device(Protocol):
    """A card, and how to give it work. Memory stays alive as long as the tensor that stands for it."""

    torch_device: torch.device
    name: str  # for reports: "NVIDIA H200"
    multiprocessor_count: int

    def current_stream(self) -> Stream:
        """The stream of the caller's torch ops."""

    def new_stream(self) -> Stream:
        """One that no other waits for, not even the default stream."""

    def use(self, stream: Stream) -> AbstractContextManager:
        """Torch ops inside are issued to the stream."""

    def new_memory(self, byte_count: int) -> Tensor:
        """uint8 [byte_count] on the device: an allocation of its own, at least 4096-aligned, not of torch's pool."""

    def new_pinned_memory(self, byte_count: int) -> Tensor:
        """uint8 [byte_count] in host memory, 4096-aligned, that the device copies to and from by itself."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[object],
        *,
        stream: Stream,
        shared_bytes: int = 0,
    ) -> None:
        """Issues a kernel. arguments: a Tensor or None passes its address, numpy scalars (int32, int64, float32) their
        value. The caller keeps tensors alive until the kernel is done."""
