"""`torch-csd probe`: how a directory's drive is reached."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import torch_csd
from torch_csd.cli.report import UserError, format_bytes, one_line

MEASURED_BYTES = 128 << 20
MEASURED_ROUNDS = 3


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
    gpu_io = {"gds": "[green]gds[/], directly", "pinned": "[yellow]pinned[/], by host memory", "none": "none"}
    table.add_row("GPU I/O", f"{gpu_io[verdict['gpu_io']]}: {escape(verdict['gpu_reason'])}")
    for number, line in enumerate(verdict["gpu_verdicts"]):
        table.add_row("tried" if number == 0 else "", escape(line))
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
