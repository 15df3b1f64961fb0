"""What a section is given: the card, clocks, sizes' limits, and where its rows go."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from gpu.table import Row
from torch_csd.cuda.device import Device

T = TypeVar("T")

ROUNDS_MIN = 3  # fewer are no median


class TimeUp(Exception):
    """The section's time is over."""


class Deadline:
    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()

    def check(self) -> None:
        if self.left_s <= 0:
            raise TimeUp


class Timer(Protocol):
    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, until the device has done it."""


class EventTimer:
    """By the card's clock: some calls in a row, so that issuing them does not count."""

    def __init__(self, calls: int = 5) -> None:
        self._calls = calls

    def seconds(self, work: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(self._calls):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self._calls


class WallTimer:
    """By the host's clock, from an idle device to an idle device."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        start_s = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start_s


@dataclass
class Run:
    device: Device
    card_timer: Timer  # of kernels
    wall_timer: Timer  # of what the host takes part in
    synchronize: Callable[[], None]
    free_bytes: int  # of the card's memory
    directory: str
    add: Callable[[Row], None]
    deadline: Deadline
    rounds: int = 7
    quick: bool = False
    card_stores: bool = True  # stores are given executor= and gpu_budget=
    settings: dict[str, object] = field(default_factory=dict)  # of every store that is opened

    def fail(self, name: str, error: BaseException | str) -> None:
        self.add(Row(name, failed=True, reason=error if isinstance(error, str) else one_line(error)))

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """What raises is a row, and what comes after it goes on."""
        try:
            return measure()
        except TimeUp:
            raise
        except Exception as error:
            traceback.print_exc()
            self.fail(name, error)
            return None

    def interleaved(
        self, timer: Timer, works: Mapping[str, Callable[[], object]], *, warm: bool = True, rounds: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each, in turn, round by round: what drifts, drifts for all. A short section has fewer rounds."""
        if warm:
            for work in works.values():
                self.deadline.check()
                work()
            self.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for done in range(rounds or self.rounds):
            if self.deadline.left_s <= 0:
                if done < ROUNDS_MIN:
                    raise TimeUp
                break
            for name, work in works.items():
                seconds[name].append(timer.seconds(work))
        return seconds


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of value / other over pairs that were measured one after the other."""
    return median([value / other for value, other in zip(values, others, strict=True)])


def rates(amount: float, seconds: Sequence[float]) -> list[float]:
    return [amount / each for each in seconds]


def beside(
    name: str, values: Sequence[float], unit: str, other: str, others: Sequence[float], bar: float | None = None
) -> Row:
    """A rate beside another, in the same unit."""
    return Row(
        name,
        median(values),
        unit,
        beside=other,
        beside_value=median(others),
        beside_unit=unit,
        ratio=ratio(values, others),
        bar=bar,
    )
