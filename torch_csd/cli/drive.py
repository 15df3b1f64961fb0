"""`torch-csd probe` and `inspect`: how a directory's drive is reached, and what stores keep there."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import torch_csd
from torch_csd.cli.report import UserError, format_bytes, one_line

MEASURED_BYTES = 128 << 20
MEASURED_ROUNDS = 3

# csrc/store/FORMAT.md: the header at offset 0 of a pool file.
POOL_MAGIC = b"CSDPOOL\0"
POOL_HEADER = struct.Struct("<8sIIIIIIQ")
POOL_FIELDS = (
    "magic",
    "version",
    "byte_order",
    "header_bytes",
    "page_tokens",
    "block_bytes",
    "lifetime",
    "data_offset",
)
POOL_BYTE_ORDER_MARK = 0x01020304
POOL_VERSION = 1
POOL_LIFETIMES = {0: "scratch", 1: "durable"}


def show_probe(directory: Path, *, measure: bool, as_json: bool) -> None:
    """Prints the verdict on a directory.

    Raises:
        UserError: it cannot be used at all.
    """
    try:
        verdict = torch_csd.probe(directory)
        if measure:
            verdict |= measure_rates(directory)
    except torch_csd.StoreError as error:
        raise UserError(one_line(error)) from None
    if as_json:
        print(json.dumps(verdict, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("directory", verdict["directory"])
    table.add_row("file system", verdict["file_system"])
    table.add_row("device", verdict["device"])
    table.add_row("free", format_bytes(verdict["free_bytes"]))
    table.add_row("I/O engine", f"[bold]{verdict['io_engine']}[/]")
    table.add_row("direct I/O", "[green]yes[/]" if verdict["direct_io"] else "[yellow]no, through the page cache[/]")
    table.add_row("reason", verdict["reason"])
    for number, line in enumerate(verdict["verdicts"]):
        table.add_row("tried" if number == 0 else "", line)
    if measure:
        cached = "" if verdict["direct_io"] else " (the page cache may have served it)"
        table.add_row("write", f"{format_bytes(verdict['write_bytes_per_s'])}/s")
        table.add_row("read", f"{format_bytes(verdict['read_bytes_per_s'])}/s{cached}")
    Console(highlight=False).print(table)


def measure_rates(directory: Path) -> dict[str, int]:
    """Rates at which a store writes pages and attends to them, over `MEASURED_BYTES` of bfloat16 K and V.

    Attention is part of what is timed, as in decoding; it is far faster than a drive.
    """
    k = torch.randn(1, 8, 2048, 128).to(torch.bfloat16)
    q = torch.randn(1, 32, 1, 128).to(torch.bfloat16)
    with torch_csd.KVStore(directory, memory_budget="32MiB", resident=False) as store:
        start_s = time.perf_counter()
        for _ in range(MEASURED_BYTES // (2 * k.numel() * k.element_size())):
            store.append(0, k, k)
        store.flush()
        write_rate = store.stats()["drive_written_bytes"] / (time.perf_counter() - start_s)

        read_rates = []
        for _ in range(MEASURED_ROUNDS):
            before_bytes = store.stats()["drive_read_bytes"]
            start_s = time.perf_counter()
            store.attend(0, q)
            elapsed_s = time.perf_counter() - start_s
            read_rates.append((store.stats()["drive_read_bytes"] - before_bytes) / elapsed_s)
    return {"write_bytes_per_s": int(write_rate), "read_bytes_per_s": int(max(read_rates))}


def show_contents(directory: Path, *, as_json: bool) -> None:
    """Prints the pool files in a directory and the scratch files that processes have open there.

    Raises:
        UserError: it is not a directory that can be read.
    """
    try:
        pools = [describe_pool(path) for path in sorted(directory.glob("*.csd"))]
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        os.listdir(directory)
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}") from None
    scratch = open_scratch_files(directory)
    if as_json:
        contents = {
            "directory": str(directory.resolve()),
            "free_bytes": free_bytes,
            "pools": pools,
            "scratch": scratch,
        }
        print(json.dumps(contents, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"{directory.resolve()}: {format_bytes(free_bytes)} free", soft_wrap=True)
    if pools:
        table = Table("pool file", "size", "version", "lifetime", "page", "state", box=None, padding=(0, 2, 0, 0))
        for pool in pools:
            header = pool["header"] or {}
            table.add_row(
                pool["name"],
                format_bytes(pool["file_bytes"]),
                str(header.get("version", "")),
                header.get("lifetime", ""),
                f"{header['page_tokens']} tokens" if header else "",
                "ok" if header else f"[red]{pool['error']}[/]",
            )
        console.print(table)
    if scratch:
        table = Table("process", "command", "scratch file on disk", box=None, padding=(0, 2, 0, 0))
        for file in scratch:
            table.add_row(str(file["process"]), file["command"], format_bytes(file["allocated_bytes"]))
        console.print(table)
    if not pools:
        console.print("no pool files (*.csd)" + ("" if scratch else "; no scratch store is open here"))
    console.print("scratch stores leave nothing behind: their files have no name and go with their process")


def describe_pool(path: Path) -> dict:
    """`name`, `file_bytes`, and `header`; or `error` in place of a header that is not one."""
    description: dict = {"name": path.name, "file_bytes": 0, "header": None, "error": None}
    try:
        description["file_bytes"] = path.stat().st_size
        with open(path, "rb") as file:
            description["header"] = parse_pool_header(file.read(POOL_HEADER.size))
    except (OSError, ValueError) as error:
        description["error"] = str(error)
    return description


def parse_pool_header(head: bytes) -> dict:
    """The header's fields by name.

    Raises:
        ValueError: the bytes are not a pool file's first.
    """
    if len(head) < POOL_HEADER.size:
        raise ValueError(f"cut short: {len(head)} bytes, less than a header")
    fields = dict(zip(POOL_FIELDS, POOL_HEADER.unpack(head), strict=True))
    if fields.pop("magic") != POOL_MAGIC:
        raise ValueError("not a pool file: it does not begin with CSDPOOL")
    if fields.pop("byte_order") != POOL_BYTE_ORDER_MARK:
        raise ValueError("damaged: its byte order mark is wrong")
    if fields["version"] != POOL_VERSION:
        raise ValueError(f"version {fields['version']}; this torch_csd reads version {POOL_VERSION}")
    if fields["lifetime"] not in POOL_LIFETIMES:
        raise ValueError(f"damaged: lifetime {fields['lifetime']}")
    fields["lifetime"] = POOL_LIFETIMES[fields["lifetime"]]
    return fields


def open_scratch_files(directory: Path) -> list[dict]:
    """Scratch files that running processes have in a directory: `process`, `command`, `allocated_bytes`.

    Those of other users are left out: only root may look.
    """
    prefix = str(directory.resolve()).rstrip("/") + "/"
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(descriptor)
            if not target.startswith(prefix) or not target.endswith(" (deleted)") or "/" in target[len(prefix) :]:
                continue
            with open(descriptor, "rb") as file:
                if file.read(len(POOL_MAGIC)) != POOL_MAGIC:
                    continue
                allocated_bytes = os.fstat(file.fileno()).st_blocks * 512
            process = descriptor.parts[2]
            command = Path("/proc", process, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # another user's, or gone meanwhile
            continue
        found.append({"process": int(process), "command": command.strip(), "allocated_bytes": allocated_bytes})
    return sorted(found, key=lambda file: file["process"])
