"""Where a call's bytes are attended to when they are not on the card: near the drive, or on the card. Decides only.

Pure: no torch, no clocks, no files. Times come in through :meth:`CostModel.observe`; DESIGN section 6 says what for.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

Executor = Literal["near", "gpu"]
Resource = Literal["drive", "cpu", "copy", "card", "overhead"]

# What the choice may lose against the better executor is 5 %; these three are what it spends of that. (A margin of 10 %
# for a change would let the worse one run for ever at 0.91.)
NEAR_PREFERENCE = 0.015  # near may be this much slower: PCIe and the card's memory stay free for the model
CHANGE_MARGIN = 0.01  # the other must be better by this much to be thought of
RETRY_SHARE = 0.01  # of the time of all calls, spent on finding out whether the other became better

# A change comes when what the other would have saved adds up to half a call, at most a fifth of one counted a call:
# three calls in a row at 1.25 times the speed, six at 1.1. A change for nothing costs as little.
CHANGE_SAVINGS = 0.5
CHANGE_SAVINGS_PER_CALL = 0.2

RETRY_CALLS = 37  # between re-tries; prime, so that it is not always the same layer's call
RETRY_FIRST_CALLS = 4
RETRY_SLOWDOWN_MAX = 2.0  # predicted slower than this, the other is left alone ...
RETRY_SLOWDOWN_DOUBLES_CALLS = 64  # ... but a prediction that nobody checked for so long is trusted half as much
RETRY_START_CALLS = 2.0  # calls' time that may be spent on re-tries at first, before 1 % of anything is much
RETRY_SAVED_CALLS_MAX = 64.0  # and that may be saved up for later
SURPRISE = 0.25  # a re-try off its prediction by more, or better than the chosen one, is repeated ...
RETRY_REPEATS = 2  # ... so often at once, since one call proves nothing

# Calls on a shared machine come out at +-30 %, one in a hundred at a tenth of the speed, and drives drift by a factor
# of two in minutes. Tuned on tests/gpu_free/test_cost.py, which has all of that. Errors and steps are of logarithms.
MEDIAN_CALLS = 5  # of three, two outliers in 450 calls meet once in eleven runs; of five, three do once in two hundred
GAIN = 0.1  # of their median: +-30 % on a call is a few per cent on the estimate
GAIN_STALE = 0.3  # of the first three since the estimate was stale
GAIN_OF_CHANGE = 0.5  # where it is off by more than SURPRISE, and four of the five agree that something changed
STEP_MAX = 0.5
STEP_ALONE_MAX = 0.05  # of an observation that has none before it to be compared with
STALE_CALLS = 32  # below RETRY_CALLS: a re-try starts anew, and is not compared with the one before
LEVEL_CALLS = 8  # observations in a row after which they tell of the drive, not of who reads it

IO_WAIT_SHARE = 1 / 8  # of a call: workers that wait less were the limit; the first read is always waited for


@dataclass(frozen=True)
class Work:
    """What one attention call has to do. Bytes are those of tiles that the call reads.

    Args:
        drive_bytes: must come from the drive within the call. What was read ahead counts as ``host_bytes``.
        host_bytes: lie in host memory: resident and staged pages.
        card_bytes: lie on the card, and are attended to there in either case.
        queries: of one row and kv head: ``q_len * num_heads / num_kv_heads``.
        q_bytes, partial_bytes: of all heads: what goes down and comes up if the work is done near the drive.
    """

    drive_bytes: int
    host_bytes: int = 0
    card_bytes: int = 0
    queries: int = 1
    q_bytes: int = 0
    partial_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            low, value = int(field.name == "queries"), getattr(self, field.name)
            if value < low:
                raise ValueError(f"Work: {field.name} must be at least {low}, got {value!r}")


@dataclass(frozen=True)
class Rates:
    """What the machine does, as measured at open. All of it is measured again while calls run, but ``*_bytes`` and
    ``*_queries``.

    Args:
        drive_bytes_per_s: reads into host memory, as the executor makes them.
        cpu_bytes_per_s: attention over resident bytes with one query per kv head, all workers together.
        copy_bytes_per_s: from pinned host memory to the card.
        card_bytes_per_s: attention over tiles on the card with one query per kv head.
        drive_to_card_bytes_per_s: reads that end on the card, if another engine makes them (GPUDirect Storage).
        near_overhead_s: of a call near the drive that finds next to nothing to do: q down, workers woken, partials up.
        gpu_overhead_s: of such a call on the card: requests made, kernels launched.
        chunk_bytes: tiles that go up, and are computed, at a time.
        cpu_queries: queries per kv head up to which a byte costs the CPU the same: compute_weight in attend_pass.cpp.
        card_queries: the same for the card's kernel.
    """

    drive_bytes_per_s: float
    cpu_bytes_per_s: float
    copy_bytes_per_s: float
    card_bytes_per_s: float
    drive_to_card_bytes_per_s: float | None = None
    near_overhead_s: float = 30e-6
    gpu_overhead_s: float = 20e-6
    chunk_bytes: int = 4 << 20
    cpu_queries: int = 8
    card_queries: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"Rates: {field.name} must be finite and above 0, got {value!r}; measure it at open")


class Prediction(NamedTuple):
    """`seconds` are the overhead, the slowest of the parts that overlap, and what overlaps with nothing (`rest_s`)."""

    seconds: float
    parts_s: dict[Resource, float]  # each by itself; they overlap, but for the overhead
    rest_s: float
    limit: Resource  # the largest part


def near_busy(seconds: float, io_wait_s: float, compute_s: float) -> dict[Resource, float]:
    """``busy_s`` of a call near the drive.

    Args:
        seconds: the executor's own time, without q's way down and the partials' way up.
        io_wait_s, compute_s: what ``stats()`` of the store grew by: summed over workers.
    """
    worker_s = io_wait_s + compute_s
    wait_share = io_wait_s / worker_s if worker_s > 0 else 0.0
    cpu_s = seconds * (1 - wait_share)
    return {"drive": seconds, "cpu": cpu_s} if wait_share > IO_WAIT_SHARE else {"cpu": cpu_s}


class CostModel:
    """Chooses between two executors by what it predicts, and learns from what calls took. Not thread-safe.

    With D bytes on the drive, H in host memory, C on the card, and a weight w = max(1, queries / free queries) for what
    arithmetic costs beyond reading, on either side::

        near = overhead + (q + partials) / copy + max(D / drive, w_cpu (D + H) / cpu),
               but no less than gpu_overhead + w_card C / card, which the card does meanwhile
        gpu  = overhead + max(D / drive_to_card, (D + H) / copy, w_card (C + D + H) / card)
               + w_card min(chunk, D + H) / card, since the last chunk is computed when all have come

    This is DESIGN section 6 (the formulas are in facts/gpu-io.md), with two changes. There the GPU reads, copies and
    computes one after another; here chunks are in flight, so that the slowest counts. There the work is all on the
    drive; here it lies in three places. Where the drive is the limit both are equal, and near is chosen.

    A call tells of the rate that was its limit: the slowest by ``busy_s``, or else by prediction; next to what was
    measured of that, of the overhead; and that no other took longer. An estimate follows the median of the last five
    calls. The drive and the copies are the same for all calls; arithmetic and overheads are estimated for each key, a
    class of calls, so that prefill and decode do not disturb each other. Drift of the drive moves what is expected of
    it for both executors.

    The other executor is tried again when it has not run for 37 calls of its key, is not predicted to take more than
    twice as long (four times after 64 calls, and so on), and the extra time of all re-tries, as observed, is below 1 %
    of all calls' (and two calls at first). A re-try that surprises is repeated twice at once.

        >>> model = CostModel(Rates(6.6e9, 20e9, 50e9, 2000e9))
        >>> work = Work(drive_bytes=64 << 20, queries=4)
        >>> executor = model.choose(work)                     # "near": the drive is the limit of both
        >>> model.observe(executor, work, seconds, near_busy(near_s, io_wait_s, compute_s))
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._calls = 0  # observed
        self._copy = _Estimate(1 / rates.copy_bytes_per_s)
        self._drives: dict[Executor, _Estimate] = {
            "near": _Estimate(1 / rates.drive_bytes_per_s),
            "gpu": _Estimate(1 / (rates.drive_to_card_bytes_per_s or rates.drive_bytes_per_s)),
        }
        self._classes: dict[Hashable, _Class] = {}

    def choose(self, work: Work, key: Hashable = None) -> Executor:
        """Where the next call is to run. Call it once a call: it counts what the other executor would have saved.

        Args:
            key: the class of calls; None: those with as many queries, up to a power of two.
        """
        kind = self._class(work, key)
        predicted = {executor: self._predict(executor, work, kind).seconds for executor in _OTHER}
        if kind.executor is None:
            kind.executor = "near" if _cost("near", predicted) <= _cost("gpu", predicted) else "gpu"
            kind.retry_credit_s = RETRY_START_CALLS * predicted[kind.executor]
        chosen = kind.executor
        other = _OTHER[chosen]
        kind.calls += 1

        chosen_s = _cost(chosen, predicted)
        saving = 1 - _cost(other, predicted) / chosen_s if chosen_s > 0 else 0.0  # 0: a call of nothing
        kind.savings = max(0.0, kind.savings + min(saving, CHANGE_SAVINGS_PER_CALL) - CHANGE_MARGIN)
        if kind.savings >= CHANGE_SAVINGS:
            kind.change_to(other)
            return other

        idle_calls = kind.calls - kind.ran_at[other]
        slowdown_max = RETRY_SLOWDOWN_MAX * 2.0 ** min(idle_calls // RETRY_SLOWDOWN_DOUBLES_CALLS, 32)
        if predicted[other] > slowdown_max * predicted[chosen]:
            kind.repeats = 0
        elif kind.repeats > 0:
            kind.repeats -= 1
            return other
        elif idle_calls >= RETRY_CALLS and kind.retry_credit_s >= predicted[other] - predicted[chosen]:
            kind.ran_at[other] = kind.calls  # whether or not it is observed
            kind.retrying = True
            return other
        return chosen

    def observe(
        self,
        executor: Executor,
        work: Work,
        seconds: float,
        busy_s: Mapping[Resource, float] | None = None,
        key: Hashable = None,
    ) -> None:
        """Learns from a call, wherever it ran.

        Args:
            seconds: from q being ready on the card to the merged output being ready there.
            busy_s: of these, how long "drive", "cpu", "copy", "card" were at work, where it is known. One that was held
                up by another (a drive with no free buffer to read to) is better left out. None: the limit that was
                predicted is taken for the limit.

        Raises:
            ValueError: a time that is none, or a name that is none of a resource.
        """
        _check_times(executor, seconds, busy_s)
        kind = self._class(work, key)
        self._calls += 1
        predicted = self._predict(executor, work, kind)
        if kind.executor is not None:
            self._account(kind, executor, work, seconds, predicted.seconds)
        kind.ran_at[executor] = kind.calls
        kind.observed_at += 1

        told = _told(executor, predicted, seconds, busy_s, kind.overheads["gpu"].cost)
        longest_s = seconds if executor == "near" and not told.keys() - {"card"} else max(told.values())
        for part, predicted_s in predicted.parts_s.items():
            # Of the others it is known that they took no longer: one that was predicted to is disproved.
            part_s = told.get(part, min(longest_s, predicted_s))
            if part_s > 0 and predicted_s > 0 and (part in told or part_s < predicted_s):
                self._learn(part, executor, kind, math.log(part_s / predicted_s))

    def predict(self, executor: Executor, work: Work, key: Hashable = None) -> Prediction:
        """What a call would take there, by what is known now."""
        return self._predict(executor, work, self._class(work, key))

    def explain(self, work: Work, key: Hashable = None) -> str:
        """One line for reports: where such a call runs, what either executor would take, and what limits it."""
        kind = self._class(work, key)
        predicted = {executor: self._predict(executor, work, kind) for executor in _OTHER}
        seconds = {executor: prediction.seconds for executor, prediction in predicted.items()}
        better: Executor = "near" if _cost("near", seconds) <= _cost("gpu", seconds) else "gpu"
        chosen = kind.executor or better
        if chosen != better:
            why = f"{better} is predicted better, not yet for long enough"
        elif predicted["near"].limit == predicted["gpu"].limit == "drive":
            why = "the drive is the limit of both, and near leaves PCIe and the card's memory free"
        elif chosen == "near" and seconds["near"] > seconds["gpu"]:
            why = f"within {NEAR_PREFERENCE:.1%}, and near leaves PCIe and the card's memory free"
        else:
            other = _OTHER[chosen]
            why = f"{seconds[other] / seconds[chosen]:.2f} times the speed of {other}, whose limit is "
            why += _NAMES[predicted[other].limit]
        times = ", ".join(
            f"{executor} {prediction.seconds * 1e3:.3g} ms ("
            + ", ".join(f"{part} {s * 1e3:.3g}" for part, s in prediction.parts_s.items() if s > 0)
            + ")"
            for executor, prediction in predicted.items()
        )
        return f"{chosen}: {why}; {times}"

    def _predict(self, executor: Executor, work: Work, kind: _Class) -> Prediction:
        off_card_bytes = work.drive_bytes + work.host_bytes
        card_weight = max(1.0, work.queries / self._rates.card_queries)
        card_s = card_weight * kind.card.cost
        gpu_overhead_s = kind.overheads["gpu"].cost
        parts_s: dict[Resource, float] = {"drive": work.drive_bytes * self._drives[executor].cost}
        if executor == "near":
            cpu_weight = max(1.0, work.queries / self._rates.cpu_queries)
            parts_s["cpu"] = cpu_weight * off_card_bytes * kind.cpu.cost
            parts_s["card"] = work.card_bytes * card_s
            parts_s["overhead"] = kind.overheads["near"].cost if off_card_bytes else 0.0
            rest_s = (work.q_bytes + work.partial_bytes) * self._copy.cost if off_card_bytes else 0.0
            near_s = parts_s["overhead"] + rest_s + max(parts_s["drive"], parts_s["cpu"])
            on_card_s = gpu_overhead_s + parts_s["card"] if work.card_bytes else 0.0
            if on_card_s > near_s:
                return Prediction(on_card_s, parts_s, 0.0, "card")
            beside: tuple[Resource, ...] = ("drive", "cpu", "overhead")
            return Prediction(near_s, parts_s, rest_s, max(beside, key=lambda part: parts_s[part]))
        parts_s["copy"] = off_card_bytes * self._copy.cost
        parts_s["card"] = (off_card_bytes + work.card_bytes) * card_s
        parts_s["overhead"] = gpu_overhead_s
        rest_s = min(self._rates.chunk_bytes, off_card_bytes) * card_s
        gpu_s = gpu_overhead_s + max(parts_s["drive"], parts_s["copy"], parts_s["card"]) + rest_s
        return Prediction(gpu_s, parts_s, rest_s, max(parts_s, key=lambda part: parts_s[part]))

    def _account(self, kind: _Class, executor: Executor, work: Work, seconds: float, predicted_s: float) -> None:
        """Keeps the account of re-tries, and asks for repeats of one that surprises."""
        assert kind.executor is not None
        kind.retry_credit_s += RETRY_SHARE * seconds
        chosen_s = self._predict(kind.executor, work, kind).seconds
        if executor != kind.executor:
            kind.retry_credit_s -= max(0.0, seconds - chosen_s)
            surprising = seconds < chosen_s or abs(math.log(seconds / predicted_s)) > SURPRISE
            if kind.retrying and surprising:
                kind.repeats = RETRY_REPEATS
            kind.retrying = False
        kind.retry_credit_s = min(kind.retry_credit_s, RETRY_SAVED_CALLS_MAX * chosen_s)

    def _learn(self, resource: Resource, executor: Executor, kind: _Class, log_ratio: float) -> None:
        """A resource took exp(log_ratio) times what was predicted: so did each byte."""
        estimate = self._estimate(resource, executor, kind)
        now = self._calls if resource in ("drive", "copy") else kind.observed_at
        step = estimate.observe(estimate.log_cost + log_ratio, now)
        if resource == "drive" and estimate.in_row >= LEVEL_CALLS:
            self._drives[_OTHER[executor]].log_cost += step

    def _estimate(self, resource: Resource, executor: Executor, kind: _Class) -> _Estimate:
        if resource == "drive":
            return self._drives[executor]
        if resource == "copy":
            return self._copy
        if resource == "overhead":
            return kind.overheads[executor]
        return kind.cpu if resource == "cpu" else kind.card

    def _class(self, work: Work, key: Hashable) -> _Class:
        if key is None:
            key = ("queries", (work.queries - 1).bit_length())
        kind = self._classes.get(key)
        if kind is None:
            kind = self._classes[key] = _Class(self._rates)
        return kind


_OTHER: dict[Executor, Executor] = {"near": "gpu", "gpu": "near"}
_NAMES: dict[Resource, str] = {
    "drive": "the drive",
    "cpu": "the CPU's arithmetic",
    "copy": "the copy to the card",
    "card": "the card's kernel",
    "overhead": "its overhead",
}


class _Estimate:
    """What a unit of work costs, in s: follows the median of the last observations."""

    def __init__(self, cost: float) -> None:
        self.log_cost = math.log(cost)
        self.in_row = 0  # observations since it was stale
        self._recent: list[float] = []
        self._observed_at = 0
        self._known = False  # more than a starting value

    @property
    def cost(self) -> float:
        return math.exp(self.log_cost)

    def observe(self, log_cost: float, now: int) -> float:
        """Returns by how much the estimate moved. now: a count of calls."""
        if now - self._observed_at > STALE_CALLS:
            self.in_row = 0
            self._recent.clear()
        self._observed_at = now
        self.in_row += 1
        self._recent = [*self._recent, log_cost][-MEDIAN_CALLS:]
        if self.in_row == 1:
            # Nothing to compare it with: it counts for little, however far off it is.
            step = max(-STEP_ALONE_MAX, min(GAIN_STALE * (log_cost - self.log_cost), STEP_ALONE_MAX))
        else:
            odd = self._recent if len(self._recent) % 2 else [*self._recent, self.log_cost]
            error = sorted(odd)[len(odd) // 2] - self.log_cost
            gain = 1.0 if not self._known else GAIN_STALE if self.in_row <= 3 else GAIN
            agreeing = sum((recent > self.log_cost) == (error > 0) for recent in self._recent)
            if abs(error) > SURPRISE and agreeing >= min(len(self._recent), MEDIAN_CALLS - 1):
                gain = max(gain, GAIN_OF_CHANGE)
            step = max(-STEP_MAX, min(gain * error, STEP_MAX))
            self._known = True
        self.log_cost += step
        return step


class _Class:
    """A class of calls: what is estimated for it alone, and where it runs."""

    def __init__(self, rates: Rates) -> None:
        self.cpu = _Estimate(1 / rates.cpu_bytes_per_s)
        self.card = _Estimate(1 / rates.card_bytes_per_s)
        self.overheads: dict[Executor, _Estimate] = {
            "near": _Estimate(rates.near_overhead_s),
            "gpu": _Estimate(rates.gpu_overhead_s),
        }
        self.executor: Executor | None = None  # the chosen one, once there was a call
        self.calls = 0
        self.observed_at = 0
        never = RETRY_FIRST_CALLS - RETRY_CALLS
        self.ran_at: dict[Executor, int] = {"near": never, "gpu": never}  # in calls
        self.savings = 0.0  # calls' time that the other would have saved
        self.retry_credit_s = 0.0
        self.retrying = False  # the other was chosen for once, and has not been observed yet
        self.repeats = 0  # re-tries still to come

    def change_to(self, executor: Executor) -> None:
        self.executor = executor
        self.savings = 0.0
        self.retrying = False
        self.repeats = 0


def _cost(executor: Executor, seconds: Mapping[Executor, float]) -> float:
    return seconds[executor] * (1 - NEAR_PREFERENCE if executor == "near" else 1)


def _told(
    executor: Executor,
    predicted: Prediction,
    seconds: float,
    busy_s: Mapping[Resource, float] | None,
    gpu_overhead_s: float,
) -> dict[Resource, float]:
    """What a call tells of its parts: how long the limit took, and, next to what is known of it, the overhead."""
    if not busy_s:
        # The card's part beside near is not guessed to be the limit: it would explain whatever the CPU did.
        parts = [part for part in predicted.parts_s if executor == "gpu" or part != "card"]
        limit = max(parts, key=lambda part: predicted.parts_s[part])
        besides_s = predicted.rest_s + (predicted.parts_s["overhead"] if limit != "overhead" else _longest(predicted))
        return {limit: max(seconds - besides_s, 0.1 * seconds)}
    measured = dict(busy_s)
    if executor == "near":
        # The card works beside all of this, the overhead included: it is the limit only where its end comes last.
        card_s = measured.pop("card", predicted.parts_s["card"])
        beside_s = predicted.rest_s + predicted.parts_s["overhead"] + max(measured.values(), default=0.0)
        if gpu_overhead_s + card_s > beside_s:
            return {"card": busy_s["card"]} if "card" in busy_s else {}
        if not measured:
            return {}
    limit = max(measured, key=lambda part: measured[part])
    overhead_s = max(seconds - predicted.rest_s - measured[limit], 0.1 * predicted.parts_s["overhead"])
    if overhead_s > measured[limit]:
        return {"overhead": overhead_s}  # and rates of next to nothing would be latencies
    return {limit: measured[limit], "overhead": overhead_s}


def _longest(predicted: Prediction) -> float:
    return max(seconds for part, seconds in predicted.parts_s.items() if part != "overhead")


def _check_times(executor: str, seconds: float, busy_s: Mapping[Resource, float] | None) -> None:
    if executor not in _OTHER:
        raise ValueError(f'executor must be "near" or "gpu", got {executor!r}')
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be finite and above 0, got {seconds!r}")
    allowed = ("drive", "cpu", "card") if executor == "near" else ("drive", "copy", "card")
    for resource, value in (busy_s or {}).items():
        if resource not in allowed:
            raise ValueError(f"busy_s of a call that ran {executor} has {', '.join(allowed)}; got {resource!r}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"busy_s[{resource!r}] must be finite and at least 0, got {value!r}")
