"""`torch-csd inspect`, `verify`, `rm` and `gc`: what stores keep in a directory, and taking it away."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from torch_csd import ops
from torch_csd.catalogue import SequenceInfo
from torch_csd.cli.report import UserError, count, format_bytes, one_line, say, stderr_console
from torch_csd.durable import (
    DamagedPage,
    StoreSurvey,
    Verification,
    collect_garbage,
    remove_sequences,
    survey,
)
from torch_csd.errors import StoreCorruptError, StoreError

WIDE = 240  # columns, where there is no terminal to fold lines at


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can put right is one line."""
    try:
        yield
    except (StoreError, ValueError) as error:
        raise UserError(one_line(error)) from None


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")


def result_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


# ---- inspect --------------------------------------------------------------------------------------------------------


def show_contents(directory: Path, *, as_json: bool) -> None:
    """Prints the durable sequences of a directory and the scratch files that processes have open there.

    Raises:
        UserError: it is not a directory that can be read.
    """
    try:
        os.listdir(directory)
        free_bytes = shutil.disk_usage(directory).free
    except FileNotFoundError:
        raise UserError(f"{directory}: no such directory") from None
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    with user_errors():
        store = survey(directory)
    scratch = open_scratch_files(directory)
    if as_json:
        contents = {
            "directory": str(directory.resolve()),
            "free_bytes": free_bytes,
            "durable": None if store is None else describe_store(store),
            "scratch": scratch,
        }
        print(json.dumps(contents, indent=2))
        return
    console = result_console()
    console.print(f"{directory.resolve()}: {format_bytes(free_bytes)} free", soft_wrap=True, markup=False)
    if store is not None:
        show_store(store, console)
    if scratch:
        table = Table("process", "command", "scratch file on disk", box=None, padding=(0, 2, 0, 0))
        for file in scratch:
            table.add_row(str(file["process"]), escape(shown(file["command"])), format_bytes(file["allocated_bytes"]))
        console.print(table)
    if store is None:
        console.print("no durable store" + ("" if scratch else "; no scratch store is open here"))
    console.print("scratch stores leave nothing behind: their files have no name and go with their process")


def show_store(store: StoreSurvey, console: Console) -> None:
    if store.file_bytes:
        free = f"{format_bytes(store.free_bytes)} free" + (" or being written" if store.writer else "")
        used = f"{format_bytes(store.used_bytes)} in {count(len(store.sequences), 'sequence')}"
        console.print(f"file of pages: {format_bytes(store.file_bytes)}, {used}, {free}", soft_wrap=True)
    if store.writer is not None:
        console.print(f"open for writing: {store.writer}", style="yellow", soft_wrap=True, markup=False)
    if store.sequences:
        table = Table(box=None, padding=(0, 1, 0, 0))
        # In 80 columns a model and its fingerprint give way, before the names that generate --durable makes do.
        longest = max(len(info.name) for info in store.sequences)
        table.add_column("sequence", overflow="fold", min_width=min(longest, len("prompt-0123456789abcdef")))
        for name in ("tokens", "layers", "size"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("kv dtype", "ids", "committed"):
            table.add_column(name, no_wrap=True)
        table.add_column("model", overflow="fold", max_width=8 if console.width < 100 else None)
        for info in store.sequences:
            model_type, fingerprint = model_of(info)
            table.add_row(
                escape(shown(info.name)),
                str(info.tokens) if info.rows == 1 else f"{info.rows} x {info.tokens}",
                str(info.layers),
                format_bytes(info.stored_bytes),
                " ".join(info.kv_dtypes),
                "yes" if info.has_token_ids else "no",
                age(info.committed_s),
                escape(shown(f"{model_type or ''} {(fingerprint or '')[:8]}".strip())),
            )
        console.print(table)
    elif not store.damaged and not store.problems:
        console.print("no sequences")
    for problem in [*store.damaged.values(), *store.problems]:
        console.print(f"damaged: {problem}", style="red", soft_wrap=True, markup=False)


def describe_store(store: StoreSurvey) -> dict:
    return {
        "path": store.path,
        "writer": None if store.writer is None else dataclasses.asdict(store.writer),
        "file_bytes": store.file_bytes,
        "used_bytes": store.used_bytes,
        "free_bytes": store.free_bytes,
        "sequences": [
            dataclasses.asdict(info) | dict(zip(("model_type", "fingerprint"), model_of(info), strict=True))
            for info in store.sequences
        ],
        "damaged": store.damaged,
        "problems": store.problems,
    }


def model_of(info: SequenceInfo) -> tuple[str | None, str | None]:
    """Type and fingerprint of the model that a StorageCache says it was of."""
    model = info.metadata.get("model")
    model_type = model.get("model_type") if isinstance(model, dict) else None
    fingerprint = info.metadata.get("fingerprint")
    return (
        model_type if isinstance(model_type, str) else None,
        fingerprint if isinstance(fingerprint, str) else None,
    )


def shown(text: str) -> str:
    """Without what would move the cursor, or turn the line around."""
    return "".join(character if character.isprintable() else "?" for character in text)


def age(moment_s: float) -> str:
    """Of a moment, as Unix time: "12 s ago" to "9 h ago", then its day."""
    elapsed_s = time.time() - moment_s
    for unit_s, limit_s, unit in ((1, 60, "s"), (60, 3600, "min"), (3600, 86400, "h")):
        if 0 <= elapsed_s < limit_s:
            return f"{elapsed_s // unit_s:.0f} {unit} ago"
    try:
        return time.strftime("%Y-%m-%d", time.localtime(moment_s))
    except (OverflowError, ValueError, OSError):
        return "?"


def open_scratch_files(directory: Path) -> list[dict]:
    """Scratch files that running processes have in a directory: `process`, `command`, `allocated_bytes`.

    Those of other users are left out: only root may look.
    """
    prefix = str(directory.resolve()).rstrip("/") + "/"
    found = []
    for descriptor in _open_descriptors():
        try:
            target = os.readlink(descriptor)
            if not target.startswith(prefix) or not target.endswith(" (deleted)") or "/" in target[len(prefix) :]:
                continue
            if ops.read_header(str(descriptor)).durable:
                continue
            allocated_bytes = os.stat(descriptor).st_blocks * 512
            process = descriptor.parts[2]
            command = Path("/proc", process, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, StoreError):  # another user's, no file of pages, or gone meanwhile
            continue
        found.append({"process": int(process), "command": command.strip(), "allocated_bytes": allocated_bytes})
    return sorted(found, key=lambda file: file["process"])


def _open_descriptors() -> Iterator[Path]:
    """Of all processes that may be looked at. Not by glob, which fails where one ends meanwhile."""
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        try:
            descriptors = os.listdir(f"/proc/{process}/fd")
        except OSError:  # another user's, or gone
            continue
        for descriptor in descriptors:
            yield Path("/proc", process, "fd", descriptor)


# ---- verify ---------------------------------------------------------------------------------------------------------


def verify_pages(directory: Path, name: str | None, *, as_json: bool) -> int:
    """Prints what is damaged; returns the exit code: 0 nothing, 1 something.

    Raises:
        UserError: there is no store, or no such sequence.
    """
    _check_directory(directory)
    pages: list[DamagedPage] = []
    checked: list[str] = []
    damaged: dict[str, str] = {}
    error = None
    checked_bytes = 0
    with user_errors():
        try:
            with Verification(directory, name) as verification:
                checked, damaged = verification.sequences, verification.damaged
                with _verify_bar(verification.total_bytes) as bar:
                    for layer_bytes, found in verification:
                        checked_bytes += layer_bytes
                        pages += found
                        bar.update(bar.task_ids[0], advance=layer_bytes)
        except StoreCorruptError as corrupt:
            error = one_line(corrupt)
    is_clean = not pages and not damaged and error is None
    if as_json:
        result = {
            "directory": str(directory.resolve()),
            "sequences": checked,
            "checked_bytes": checked_bytes,
            "damaged_pages": [dataclasses.asdict(page) for page in pages],
            "damaged_sequences": damaged,
            "error": error,
        }
        print(json.dumps(result, indent=2))
        return 0 if is_clean else 1
    console = result_console()
    for problem in [*map(str, pages), *damaged.values(), *([error] if error else [])]:
        console.print(f"damaged: {problem}", style="red", soft_wrap=True, markup=False)
    what = f"{count(len(checked), 'sequence')}, {format_bytes(checked_bytes)}"
    if is_clean:
        console.print(f"{what}: every page is as it was written", soft_wrap=True)
    elif error is None:
        names = sorted({page.sequence for page in pages} | damaged.keys())
        console.print(
            f"{what}: {count(len(pages), 'damaged page')} in {count(len(names), 'sequence')}; remove what is damaged "
            "(torch-csd rm) and prefill it anew",
            soft_wrap=True,
        )
    return 0 if is_clean else 1


def _verify_bar(total_bytes: int) -> Progress:
    console = stderr_console()
    bar = Progress(
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=total_bytes)
    return bar


# ---- rm and gc ------------------------------------------------------------------------------------------------------


def remove(directory: Path, names: list[str], *, without_asking: bool, as_json: bool) -> int:
    """Removes sequences, after asking where there is somebody to ask; returns the exit code: 1 if that was a no.

    Raises:
        UserError: there is no store, or it lacks one of them; or it is being written. Nothing is removed.
    """
    names = list(dict.fromkeys(names))
    with user_errors():
        store = survey(directory)
    if store is None:
        raise UserError(f"{directory}: no durable store here")
    infos = {info.name: info for info in store.sequences}
    there = sorted(infos.keys() | store.damaged.keys())
    missing = [name for name in names if name not in there]
    if missing and (there or not store.problems):
        more = f" and {len(there) - 10} more" if len(there) > 10 else ""
        listed = ", ".join(repr(name) for name in there[:10]) + more
        wanted = ", ".join(repr(name) for name in missing)
        raise UserError(f"{directory}: no sequence {wanted}; there are {listed or 'none'}; nothing was removed")
    if not without_asking and sys.stdin.isatty():
        for name in names:
            info = infos.get(name)
            what = f"{info.tokens} tokens, {format_bytes(info.stored_bytes)}" if info else "damaged"
            say(f"  {shown(name)}  {what}")
        if not typer.confirm(f"Remove {count(len(names), 'sequence')} from {directory}?", err=True):
            say("nothing was removed")
            return 1
    with user_errors():
        remove_sequences(directory, names)
    if as_json:
        print(json.dumps({"directory": str(directory.resolve()), "removed": names}, indent=2))
    else:
        result_console().print(
            f"removed {count(len(names), 'sequence')}; the space serves other sequences, torch-csd gc gives it back",
            soft_wrap=True,
        )
    return 0


def give_back(directory: Path, *, as_json: bool) -> None:
    """Cuts off the unused end of a directory's file of pages, and says how much that was.

    Raises:
        UserError: there is no store, or it is being written.
    """
    _check_directory(directory)
    with user_errors():
        given_back_bytes = collect_garbage(directory)
        store = survey(directory)
    if as_json:
        result = {
            "directory": str(directory.resolve()),
            "given_back_bytes": given_back_bytes,
            "file_bytes": store.file_bytes,
            "free_bytes": store.free_bytes,
        }
        print(json.dumps(result, indent=2))
        return
    between = f", {format_bytes(store.free_bytes)} of them free between sequences" if store.free_bytes else ""
    result_console().print(
        f"gave back {format_bytes(given_back_bytes)}; the file of pages has {format_bytes(store.file_bytes)}{between}",
        soft_wrap=True,
    )
