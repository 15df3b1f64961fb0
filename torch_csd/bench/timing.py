"""Samples, taken in turn: what drifts within minutes (drives, clocks, neighbours) drifts for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

SAMPLE_S = 0.03  # a sample repeats what is shorter until it has lasted about so long


@dataclass
class Sample:
    seconds: float  # of one call
    drive_bytes: float = 0  # read by one call
    memory_bytes: float = 0  # resident bytes read by one call
    roofs: dict[str, float] = field(default_factory=dict)  # GB/s of the drive, before and after

    @property
    def drive_gbs(self) -> float:
        return self.drive_bytes / self.seconds / 1e9


def seconds(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def interleave(
    calls: Mapping[str, Callable[[], Sample]],
    rounds: int,
    roof: Callable[[], dict[str, float]] | None = None,
    *,
    without_roof: Container[str] = (),
    once_a_round: bool = False,
) -> dict[str, list[Sample]]:
    """rounds samples of each call, in turn; with a roof, each between two measurements of it.

    Those `without_roof` (hot ones; best put first) need none; `once_a_round` measures it around all of a round.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    before: dict[str, float] | None = None
    for _ in range(rounds):
        waiting: list[Sample] = []  # for the measurement after them
        for name, call in calls.items():
            needs_roof = roof is not None and name not in without_roof
            if needs_roof and before is None:
                before = roof()
            sample = call()
            samples[name].append(sample)
            if needs_roof:
                waiting.append(sample)
                if not once_a_round:
                    before = _put_between(waiting, before, roof())
        if waiting:
            before = _put_between(waiting, before, roof())
        elif without_roof:
            before = None
    return samples


def _put_between(waiting: list[Sample], before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    for sample in waiting:
        sample.roofs = {name: (before[name] + after[name]) / 2 for name in after}
    waiting.clear()
    return after


def repeated(run: Callable[[], object], sample_s: float = SAMPLE_S) -> Callable[[], Sample]:
    """A sampler that repeats short work often enough to time it; warms up now."""
    elapsed_s = seconds(run)
    if elapsed_s < 10 * sample_s:  # the first call may have been slow for reasons of its own
        elapsed_s = seconds(run)
    count = max(1, min(1000, math.ceil(sample_s / max(elapsed_s, 1e-6))))

    def sample() -> Sample:
        start_s = time.perf_counter()
        for _ in range(count):
            run()
        return Sample((time.perf_counter() - start_s) / count)

    return sample


def counted(run: Callable[[], object], stats: Callable[[], dict], count: int = 1) -> Callable[[], Sample]:
    """A sampler of count calls in a row, with the bytes that a store's stats say they read."""

    def sample() -> Sample:
        before = stats()
        start_s = time.perf_counter()
        for _ in range(count):
            run()
        elapsed_s = time.perf_counter() - start_s
        after = stats()
        return Sample(
            elapsed_s / count,
            (after["drive_read_bytes"] - before["drive_read_bytes"]) / count,
            (after["resident_read_bytes"] - before["resident_read_bytes"]) / count,
        )

    return sample


def times(samples: list[Sample]) -> list[float]:
    return [sample.seconds for sample in samples]


def rates(samples: list[Sample], amount: float) -> list[float]:
    """amount / seconds of each: tokens/s, bytes/s."""
    return [amount / sample.seconds for sample in samples]


def median(values: list[float]) -> float:
    return statistics.median(values)
