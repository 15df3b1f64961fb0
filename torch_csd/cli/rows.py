"""Prompts in, rows out, as JSON lines. Knows no model; what is written survives whatever comes after it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from torch_csd.cli.report import UserError

RowId = int | str


@dataclass(frozen=True)
class Prompt:
    id: RowId
    content: str | list[dict]  # a text, or the messages of a chat

    def as_row(self) -> dict:
        return {"id": self.id, "prompt" if isinstance(self.content, str) else "messages": self.content}


@dataclass(frozen=True)
class BrokenRow:
    id: RowId
    error: str


def read_prompts(path: Path) -> tuple[list[Prompt], list[BrokenRow]]:
    """The rows of a prompts file, and those of its lines that are none. Empty lines only count as lines."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the prompts file {path}: {error.strerror}") from None
    prompts: list[Prompt] = []
    broken: list[BrokenRow] = []
    first_line: dict[RowId, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse_prompt(line, number)
        if isinstance(row, Prompt) and row.id in first_line:
            row = BrokenRow(row.id, f"line {number}: id {row.id!r} is that of line {first_line[row.id]} already")
        if isinstance(row, Prompt):
            first_line[row.id] = number
            prompts.append(row)
        else:
            broken.append(row)
    if not prompts and not broken:
        raise UserError(f"the prompts file {path} has no rows")
    return prompts, broken


def _parse_prompt(line: bytes, number: int) -> Prompt | BrokenRow:
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a character, "\\ud800"; a file cannot
    except UnicodeError as error:
        return BrokenRow(number, f"line {number}: not UTF-8: {error.reason}")
    except json.JSONDecodeError as error:
        return BrokenRow(number, f"line {number}: not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BrokenRow(number, f"line {number}: nested too deeply")
    if not isinstance(row, dict):
        return BrokenRow(
            number, f'line {number}: wanted an object such as {{"prompt": "..."}}, got {type(row).__name__}'
        )
    row_id = row.get("id", number)
    if not isinstance(row_id, int | str) or isinstance(row_id, bool):
        return BrokenRow(number, f"line {number}: id must be a number or a text, got {row_id!r}")
    if ("prompt" in row) == ("messages" in row):
        return BrokenRow(row_id, f'line {number}: wanted "prompt" or "messages", got {_names(row)}')
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            return BrokenRow(row_id, f"line {number}: prompt must be a text that is not empty")
        return Prompt(row_id, row["prompt"])
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        return BrokenRow(row_id, f'line {number}: messages must be a list of {{"role": ..., "content": ...}}')
    return Prompt(row_id, messages)


def _names(row: dict) -> str:
    return ", ".join(f'"{name}"' for name in row) or "an empty object"


def _parse_output(line: bytes) -> dict | None:
    """A line that :meth:`OutputRows.write` wrote, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(row, dict) and isinstance(row.get("id"), int | str) and ("text" in row or "error" in row)
    return row if is_ours else None


class OutputRows:
    """The rows of an output file: those that are there, and those yet to come. `None` is standard output.

    Opening a file drops what is not a finished row: a last line cut short by a crash, and rows that failed.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.finished: dict[RowId, dict] = {}
        if path is None:
            self._stream = sys.stdout
            return
        try:
            if path.exists():
                self._keep_finished(path)
            self._stream = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the output file {path}: {error.strerror}") from None

    def _keep_finished(self, path: Path) -> None:
        text = path.read_bytes()
        *lines, unterminated = text.split(b"\n")
        kept = []
        for number, line in enumerate(lines, start=1):
            row = _parse_output(line)
            if row is None:
                raise UserError(
                    f"the output file {path} exists, and its line {number} was not written by this command; "
                    "remove it or name another"
                )
            if "error" not in row:
                self.finished[row["id"]] = row
                kept.append(line + b"\n")
        if unterminated or len(kept) < len(lines):
            # Replaced as a whole: a crash here must not cost the rows that are finished.
            replacement = path.with_name(path.name + ".partial")
            with open(replacement, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(replacement, path)

    def is_finished(self, prompt: Prompt) -> bool:
        """Whether the file has this row. Raises UserError if it has the row's id with another prompt."""
        row = self.finished.get(prompt.id)
        if row is None:
            return False
        if row | prompt.as_row() != row:
            raise UserError(
                f"the output file {self.path} has id {prompt.id!r} already, for another prompt; "
                "remove it or name another"
            )
        return True

    def write(self, row: dict) -> None:
        """Adds a row. It is on disk when this returns."""
        try:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._stream.flush()
            if self.path is not None:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(f"cannot write to {self.path or 'standard output'}: {error.strerror}") from None

    def __enter__(self) -> OutputRows:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            self._stream.close()
