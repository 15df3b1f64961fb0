"""Streams that take their time: what is not waited for is not there yet, or is gone already.

An emulated device does everything at once, which hides an event that nobody waits for. These do not: work stays undone
until something that was waited for needs it, or, where a stream is given dice, until they fall so.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LateEvent:
    def __init__(self, stream: LateStream, place: int) -> None:
        self._stream, self._place = stream, place

    def query(self) -> bool:
        self._stream.progress()
        return self._stream.done >= self._place

    def synchronize(self) -> None:
        self._stream.run(self._place)


class LateStream:
    """Does what it was given when an event behind it is waited for; with dice, some of it when it is looked at, too."""

    def __init__(self, dice: random.Random | None = None) -> None:
        self.work: list[Callable[[], object] | None] = []
        self.done = 0
        self._dice = dice

    def add(self, work: Callable[[], object]) -> None:
        self.work.append(work)

    def run(self, end: int) -> None:
        while self.done < end:
            work, self.work[self.done] = self.work[self.done], None
            self.done += 1
            work()

    def progress(self) -> None:
        if self._dice is not None and self._dice.random() < 0.5:
            self.run(self._dice.randint(self.done, len(self.work)))

    def record_event(self) -> LateEvent:
        return LateEvent(self, len(self.work))

    def wait_event(self, event) -> None:
        self.add(event.synchronize)

    def synchronize(self) -> None:
        self.run(len(self.work))


class PromptStream(LateStream):
    """Does everything at once."""

    def add(self, work: Callable[[], object]) -> None:
        super().add(work)
        self.synchronize()


class LateCopies(TorchDispatchMode):
    def __init__(self, stream: LateStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self._stream.add(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))
