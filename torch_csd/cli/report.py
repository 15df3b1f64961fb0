"""How the command line speaks: results on standard output, everything about them on standard error."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console


class UserError(Exception):
    """Something the user can put right. Its text is all that is shown, and the exit code is 2."""


def stderr_console() -> Console:
    """Made anew at each use: tests and callers may have put another stream in place of sys.stderr."""
    console = Console(stderr=True, highlight=False)
    # A line of a log stays one line; only a terminal has a width to fold it at.
    console.soft_wrap = not console.is_terminal
    return console


def say(text: str, *, style: str = "") -> None:
    stderr_console().print(text, style=style, markup=False)


def fail(error: UserError) -> NoReturn:
    say(f"error: {error}", style="red")
    raise typer.Exit(2)


def one_line(error: BaseException) -> str:
    """What went wrong, without the paragraphs that some libraries add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def count(number: int, noun: str) -> str:
    """1, "row" -> "1 row"; 2, "row" -> "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_bytes(byte_count: int) -> str:
    """1536 -> "1.5 KiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(byte_count.bit_length() - 1, 0) // 10, len(units) - 1)
    size = byte_count / 1024**power
    return f"{size:.0f} {units[power]}" if power == 0 or size >= 100 else f"{size:.1f} {units[power]}"
