"""Rows: a value, what stood beside it in the same run, their ratio, and the bar that was set for it."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from torch_csd.bench.settings import Settings
from torch_csd.cli.report import one_line
from torch_csd.store import KVStore, probe
from torch_csd.version import __version__

NAME_COLUMNS = 60

Draw = Callable[[dict, Path], list[Path]]  # of a report as JSON, into a directory; returns the pictures' paths


@dataclass
class Beside:
    """A roof or a peer: its own value, and the ratio that counts, a median over interleaved pairs."""

    name: str
    value: float
    unit: str
    ratio: float
    bar: float | None = None
    at_most: bool = False  # the ratio is to stay below the bar: a time over the time it should take

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio <= self.bar if self.at_most else self.ratio >= self.bar

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return f"bar {'<=' if self.at_most else '>='} {self.bar:g}: {'met' if self.met else 'missed'}"


@dataclass
class Point:
    """A row's place in the plots."""

    place: str  # one picture each: "hot", "cold", ...
    series: str  # one line each
    x: int  # context in tokens, or what the benchmark calls x
    tokens_per_s: float | None = None
    gb_per_s: float | None = None
    roofs: dict[str, float] = field(default_factory=dict)  # GB/s by name


@dataclass
class Row:
    """One result; or, without a value, the reason why there is none."""

    name: str
    value: float | None
    unit: str = ""
    beside: list[Beside] = field(default_factory=list)
    note: str = ""
    skipped: str = ""
    bar: str = ""  # a bar on the value itself, such as "<= 60": the ratio is then value / bar
    met: bool | None = None
    points: list[Point] = field(default_factory=list)
    more: str = ""  # the rest of its line
    figures: dict[str, float | int | str | None] = field(default_factory=dict)  # the same, for machines


class Report:
    """Prints rows as they come; `finish` saves them as JSON and draws them, where asked to."""

    def __init__(
        self,
        name: str,
        title: str,
        settings: Settings,
        *,
        json_to: str | None = None,
        plot_to: Path | None = None,
        plot_x: str = "context, tokens",
        plot_tokens: str = "tokens/s",
        plot_title: str = "",
        draw: Draw | None = None,
    ) -> None:
        self.name = name
        self.title = title
        self.plot_labels = {"plot_x": plot_x, "plot_tokens": plot_tokens, "plot_title": plot_title or title}
        self.json_to = json_to
        self.plot_to = plot_to
        self.draw = draw
        self.machine = machine(settings)
        self.rows: list[Row] = []
        # Standard output belongs to the JSON, where that is sent there.
        self._console = Console(stderr=json_to == "-", highlight=False)
        self._console.soft_wrap = not self._console.is_terminal
        self._print(title, style="bold")
        for line in describe_machine(self.machine):
            self._print(line)
        self._print("")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if row.value is None:
            self._print(f"{row.name:<{NAME_COLUMNS}} skipped")
            self._print(f"    {row.skipped}", style="yellow")
            return
        unit = f"{row.unit} {row.more}" if row.more else f"{row.unit:<7}"
        head = Text(f"{row.name:<{NAME_COLUMNS}} {number(row.value):>7} {unit}".rstrip())
        if row.bar:
            head.append(f" bar {row.bar}: {'met' if row.met else 'missed'}", style="green" if row.met else "bold red")
        self._console.print(head, soft_wrap=True)
        for other in row.beside:
            line = Text(f"    {other.ratio:6.2f} x {other.name}, {number(other.value)} {other.unit}")
            if other.bar is not None:
                line.append(f"   {other.verdict}", style="green" if other.met else "bold red")
            self._console.print(line, soft_wrap=True)
        if row.note:
            self._print(f"    {row.note}", style="dim")

    def say(self, text: str) -> None:
        """What is under way; in no JSON."""
        self._print(text, style="dim")

    def skip(self, name: str, reason: str | BaseException) -> None:
        self.add(Row(name, None, skipped=one_line(reason) if isinstance(reason, BaseException) else reason))

    def verdicts(self) -> list[tuple[str, str, bool]]:
        """(row, bar, met) of every bar there is."""
        found = []
        for row in self.rows:
            if row.bar and row.met is not None:
                found.append((row.name, row.bar, row.met))
            found += [(row.name, f"{o.ratio:.2f} x {o.name}, {o.verdict}", o.met) for o in row.beside if o.bar]
        return found

    def as_dict(self) -> dict:
        rows = []
        for row in self.rows:
            fields = asdict(row)
            for other, beside in zip(row.beside, fields["beside"], strict=True):
                beside |= {"met": other.met, "verdict": other.verdict}
            rows.append(fields)
        return {
            "name": self.name,
            "title": self.title,
            "machine": self.machine,
            "command": shlex.join(sys.argv),
            **self.plot_labels,
            "rows": rows,
        }

    def finish(self) -> None:
        if self.machine["quick"]:
            self._print("\nno bars: they are set for the default sizes", style="bold")
        verdicts = self.verdicts()
        missed = [verdict for verdict in verdicts if not verdict[2]]
        if verdicts:
            self._print(f"\n{len(verdicts) - len(missed)} of {len(verdicts)} bars met", style="bold")
            for name, text, _ in missed:
                self._print(f"  missed: {name}: {text.removesuffix(': missed')}")
        if self.plot_to is not None:
            from torch_csd.bench import plots

            for path in (self.draw or plots.draw)(self.as_dict(), self.plot_to):
                self._print(f"drawn: {path}")
        if self.json_to == "-":
            print(json.dumps(self.as_dict(), indent=1))
        elif self.json_to is not None:
            Path(self.json_to).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def _print(self, text: str, *, style: str = "") -> None:
        self._console.print(text, style=style, markup=False)


def number(value: float) -> str:
    """Three figures that matter, and no exponent short of a billion: 0.0123, 1.23, 12.3, 1234."""
    magnitude = abs(value)
    if magnitude >= 1e9:
        return f"{value:.3g}"
    if magnitude == 0 or magnitude >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}" if magnitude >= 1 else f"{value:.3g}"


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of value / other over pairs measured one after the other: what drifts, drifts for both."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def beside(
    name: str,
    values: Sequence[float],
    others: Sequence[float],
    unit: str,
    *,
    bar: float | None = None,
    lower_is_better: bool = False,
) -> Beside:
    """values over others, pair by pair; others over values where both are times."""
    ratio = median_ratio(others, values) if lower_is_better else median_ratio(values, others)
    return Beside(name, statistics.median(others), unit, ratio, bar)


def machine(settings: Settings) -> dict[str, str | int | float | bool]:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo") as file:
        memory_gib = int(file.readline().split()[1]) / 2**20
    with KVStore(settings.directory, io_engine=settings.io_engine, threads=settings.threads) as store:
        stats = store.stats()
    where = probe(settings.directory, settings.io_engine)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": names[0] if names else "unknown processor",
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_gib, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "torch_csd": __version__,
        "threads": settings.threads,
        "simd": stats["simd"],
        "io_engine": stats["io_engine"],
        "direct_io": stats["direct_io"],
        "directory": settings.directory,
        "file_system": where["file_system"],
        "device": where["device"],
        "rounds": settings.rounds,
        "quick": settings.quick,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }


def describe_machine(machine: dict) -> list[str]:
    direct = "O_DIRECT" if machine["direct_io"] else "through the page cache"
    quick = " (--quick: does it run)" if machine["quick"] else ""
    rounds = "" if machine["rounds"] == 1 else f"; medians of {machine['rounds']} interleaved rounds"
    return [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
        f"load {machine['load_average']:.1f}",
        f"torch {machine['torch']}, torch_csd {machine['torch_csd']}, {machine['threads']} threads (OMP_WAIT_POLICY "
        f"{machine['omp_wait_policy']}), {machine['simd']}, {machine['io_engine']} {direct}",
        f"{machine['directory']} ({machine['file_system']} on {machine['device'].split(',')[0]}){rounds}{quick}",
    ]
