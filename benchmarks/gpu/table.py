"""Rows and the one table that they make. Needs the standard library only: what fails cannot take it away."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass

WIDTH = 1000  # where standard output is no terminal: a line stays one, and has no padding at its end
COLUMNS = ("what", "value", "ratio", "bar", "to what, in the same run; remarks")


@dataclass
class Row:
    """One result; or, without a value, the reason why there is none."""

    name: str
    value: float | None = None
    unit: str = ""
    text: str = ""  # of what is no number
    beside: str = ""  # the roof or the peer
    beside_value: float | None = None
    beside_unit: str = ""
    ratio: float | None = None  # the better the larger
    bar: float | None = None  # on the ratio, at least
    sized: bool = True  # the bar is set for the default sizes
    waived: str = ""  # why the bar does not apply here
    failed: bool = False
    reason: str = ""  # why there is no value, or why it is what it is
    section: str = ""

    @property
    def verdict(self) -> str:
        if self.failed:
            return "failed"
        if self.value is None and not self.text:
            return "not measured"
        if self.bar is None or self.ratio is None:
            return ""
        if self.waived:
            return "not applicable"
        return "met" if self.ratio >= self.bar else "missed"

    def cells(self) -> tuple[str, ...]:
        value = f"{number(self.value)} {self.unit}".strip() if self.value is not None else "" if self.text else "-"
        beside = self.beside
        if self.beside_value is not None:
            beside += f" {number(self.beside_value)} {self.beside_unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        bar = f">= {self.bar:g}: " if self.bar is not None and self.ratio is not None else ""
        remarks = "; ".join(part for part in (self.text, beside, self.waived, self.reason) if part)
        return self.name, value, ratio, bar + self.verdict, remarks

    def as_dict(self) -> dict:
        """As of `torch-csd bench --json`, so that benchmarks/table.py makes a table of it."""
        beside = []
        if self.beside_value is not None and self.ratio is not None:
            met = {"met": True, "missed": False}.get(self.verdict)
            bar = self.bar if met is not None else None
            beside = [
                {
                    "name": self.beside, "value": self.beside_value, "unit": self.beside_unit, "ratio": self.ratio,
                    "bar": bar, "at_most": False, "met": met, "verdict": self.verdict,
                }
            ]  # fmt: skip
        return asdict(self) | {"beside": beside, "bar": "", "met": None, "wanted": self.bar, "verdict": self.verdict}


def as_line(row: Row) -> bytes:
    """What a section's process sends: a row, as JSON on one line."""
    return json.dumps(asdict(row)).encode() + b"\n"


def from_line(line: bytes) -> Row:
    return Row(**json.loads(line))


class Table:
    """Rows as they come, saved after each, printed once."""

    def __init__(self, *, quick: bool = False, json_to: str | None = None) -> None:
        self.rows: list[Row] = []
        self._quick = quick
        self._json_to = json_to
        self._start_s = time.monotonic()
        self._printed = False

    def add(self, row: Row) -> None:
        if self._quick and row.bar is not None and row.sized:
            row.waived = "--quick: bars are set for the default sizes"
        self.rows.append(row)
        elapsed = f"{time.monotonic() - self._start_s:4.0f} s"
        print(elapsed, *filter(None, row.cells()), sep="  ", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        if self._json_to is None:
            return
        report = {
            "name": "gpu",
            "title": "the GPU path",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "command": shlex.join(sys.argv),
            "quick": self._quick,
            "rows": [row.as_dict() for row in self.rows],
        }
        partial = f"{self._json_to}.part"
        with open(partial, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        os.replace(partial, self._json_to)

    def print(self) -> None:
        """To standard output, at its end: once, however this ends."""
        if self._printed:
            return
        self._printed = True
        lines = [row.cells() for row in self.rows]
        try:
            text = _with_rich(lines)
        except Exception:  # no rich here, or one that has changed: any table is better than none
            text = _plain(lines)
        print(text)
        verdicts = [row.verdict for row in self.rows]
        told = [f"{verdicts.count('met')} of {verdicts.count('met') + verdicts.count('missed')} bars met"]
        for verdict in ("not applicable", "failed", "not measured"):
            if verdict in verdicts:
                told.append(f"{verdicts.count(verdict)} {verdict}")
        print(", ".join(told), flush=True)


def _with_rich(lines: list[tuple[str, ...]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    styles = {"met": "green", "missed": "bold red", "failed": "bold red"}
    for line in lines:
        bar = Text(line[3], style=styles.get(line[3].rpartition(" ")[2], ""))
        table.add_row(*(Text(cell) for cell in line[:3]), bar, Text(line[4], style="dim"))
    console = Console(highlight=False, file=sys.stdout)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
    # The rule is as wide as the longest remark.
    return "\n".join(line[: len(lines[0]) + 2] if set(line) == {"─"} else line for line in lines)


def _plain(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in [COLUMNS, *lines]) for column in range(len(COLUMNS) - 1)]
    text = []
    for line in [COLUMNS, *lines]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        text.append("  ".join([*cells, line[-1]]).rstrip())
    return "\n".join(text)


def number(value: float) -> str:
    """Three figures that matter: 0.0123, 1.23, 12.3, 1234."""
    magnitude = abs(value)
    if isinstance(value, int):
        return str(value)
    if magnitude == 0 or magnitude >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}" if magnitude >= 1 else f"{value:.3g}"
