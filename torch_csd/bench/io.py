"""The drive: by fio, by our own reader and by the store, over engines, read sizes, threads and depths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack

import torch

from torch_csd.bench.attention import CHUNK, Shape, fill, random_kv
from torch_csd.bench.report import Point, Report, Row, beside
from torch_csd.bench.roofs import FIO, OWN, DriveRoof, has_fio
from torch_csd.bench.settings import Settings
from torch_csd.bench.timing import Sample, counted, interleave, median
from torch_csd.errors import StoreError
from torch_csd.store import KVStore

REACHED = 0.95  # of the best rate that anything had in the same run
OWN_AS_ROOF = "our reader, pread 1 MiB, 4 threads, huge pages"
STORE_TOKENS = 65536  # at most, in each store: 256 MiB
SHAPE = Shape()  # 256 KiB a page in bfloat16


def run(settings: Settings, report: Report, size_bytes: int) -> None:
    """Raises ValueError if there is no room for the sizes."""
    # The roof's file and 20 stores at most; K and V, and a budget for each store.
    settings.require(
        drive_bytes=size_bytes + 20 * min(size_bytes, STORE_TOKENS * SHAPE.token_bytes(torch.bfloat16)),
        memory_bytes=2 * size_bytes + 20 * settings.budget_bytes,
    )
    rounds = min(settings.rounds, 2) if settings.quick else max(settings.rounds // 2, 1)
    with ExitStack() as stack:
        try:
            roof = stack.enter_context(DriveRoof(settings.directory, size_bytes))
        except OSError as error:
            report.skip("reads past the page cache", f"{settings.directory}: no O_DIRECT ({error.strerror or error})")
            return
        calls: dict[str, Callable[[], Sample]] = {}
        points: dict[str, tuple[str, int]] = {}
        add_fio(settings, report, roof, calls, points)
        add_own(settings, roof, calls)
        notes = add_stores(settings, report, size_bytes, calls, points, stack)
        rates = {name: [sample.drive_gbs for sample in samples] for name, samples in interleave(calls, rounds).items()}
    best = max(rates, key=lambda name: median(rates[name]))
    fio_name = best_of_fio(rates)
    for name, gbs in rates.items():
        others = [beside(f"best here: {best}", gbs, rates[best], "GB/s")]
        if fio_name and not name.startswith("fio"):
            others.insert(0, beside(FIO, gbs, fio_name, "GB/s"))
        drawn = []
        if name in points:
            series, depth = points[name]
            roofs = {FIO: median(fio_name)} if fio_name else {}
            roofs[OWN] = median(rates[OWN_AS_ROOF])
            drawn.append(Point("depth", series, depth, None, median(gbs), roofs))
        report.add(Row(name, median(gbs), "GB/s", others, notes.get(name, ""), points=drawn))
    summarize(report, {name: median(gbs) for name, gbs in rates.items()})


def best_of_fio(rates: dict[str, list[float]]) -> list[float] | None:
    """Of each round the better of the two that the roof is made of."""
    names = ("fio io_uring 1 MiB, 1 job x 32", "fio io_uring 1 MiB, 4 jobs x 8")
    pair = [rates[name] for name in names if name in rates]
    return [max(both) for both in zip(*pair, strict=True)] if pair else None


def add_fio(
    settings: Settings,
    report: Report,
    roof: DriveRoof,
    calls: dict[str, Callable[[], Sample]],
    points: dict[str, tuple[str, int]],
) -> None:
    if not has_fio():
        report.skip("fio", "fio is not installed (apt install fio)")
        return
    runs = [(1, 32, 1024, "io_uring"), (4, 8, 1024, "io_uring")]
    if not settings.quick:
        runs += [(1, depth, 1024, "io_uring") for depth in (1, 4, 8, 16)]
        runs += [(1, 32, kib, "io_uring") for kib in (64, 256)] + [(4, 1, 1024, "psync")]
    for jobs, depth, kib, engine in runs:
        size = "1 MiB" if kib == 1024 else f"{kib} KiB"
        name = f"fio {engine} {size}, {jobs} job{'s' if jobs > 1 else ''} x {depth}"
        measure = functools.partial(roof.fio, jobs=jobs, depth=depth, block_bytes=kib * 1024, engine=engine)
        try:
            measure()
        except OSError as error:
            report.skip(name, error)
            continue
        calls[name] = rate_sampler(measure, roof.file_bytes)
        if jobs == 1 and kib == 1024:
            points[name] = ("fio, 1 job of 1 MiB", depth)


def rate_sampler(measure: Callable[[], float], byte_count: int) -> Callable[[], Sample]:
    return lambda: Sample(byte_count / (measure() * 1e9), byte_count)


def add_own(settings: Settings, roof: DriveRoof, calls: dict[str, Callable[[], Sample]]) -> None:
    grid = [(4, 1024), (4, 256)] if settings.quick else [(1, 1024), (2, 1024), (4, 1024), (8, 1024), (4, 256), (4, 64)]
    for threads, kib in grid:
        size = "1 MiB" if kib == 1024 else f"{kib} KiB"
        name = f"our reader, pread {size}, {threads} thread{'s' if threads > 1 else ''}, huge pages"
        calls[name] = rate_sampler(
            functools.partial(roof.own, threads=threads, block_bytes=kib * 1024), roof.file_bytes
        )


def add_stores(
    settings: Settings,
    report: Report,
    size_bytes: int,
    calls: dict[str, Callable[[], Sample]],
    points: dict[str, tuple[str, int]],
    stack: ExitStack,
) -> dict[str, str]:
    """KVStore.attend with nothing resident: what the executor makes of each setting. Returns notes by name."""
    tokens = min(max(size_bytes // SHAPE.token_bytes(torch.bfloat16) // CHUNK, 1) * CHUNK, STORE_TOKENS)
    k, v = random_kv(tokens, torch.bfloat16, SHAPE)
    q = SHAPE.q(torch.bfloat16)
    notes = {}
    engines = ("io_uring", "pread") if settings.io_engine == "auto" else (settings.io_engine,)
    depths = (4, 32) if settings.quick else (2, 4, 8, 16, 32, 64)
    grid = [(engine, depth, settings.threads) for engine in engines for depth in depths]
    if not settings.quick:
        grid += [(engine, 32, threads) for engine in engines for threads in (1, 4) if threads != settings.threads]
    for engine, depth, threads in grid:
        name = f"KVStore {engine}, queue_depth {depth}, {threads} thread{'s' if threads > 1 else ''}"
        try:
            store = stack.enter_context(
                KVStore(
                    settings.directory,
                    memory_budget=settings.memory_budget,
                    io_engine=engine,
                    queue_depth=depth,
                    threads=threads,
                    resident=False,
                )
            )
            fill(store, k, v)
        except StoreError as error:
            report.skip(name, error)
            continue
        stats = store.stats()
        if not stats["direct_io"]:
            report.skip(name, stats["io_reason"])
            continue
        run_attend = functools.partial(store.attend, 0, q)
        run_attend()
        read_bytes = tokens * SHAPE.token_bytes(torch.bfloat16)
        calls[name] = counted(run_attend, store.stats, max(1, size_bytes // read_bytes))
        if threads == settings.threads:
            points[name] = (engine, depth)
        notes[name] = f"{stats['io_reason']}"
    return notes


def summarize(report: Report, rates: dict[str, float]) -> None:
    """Which of a store's settings reach what the drive can do."""
    stores = {name: rate for name, rate in rates.items() if name.startswith("KVStore")}
    if not stores:
        return
    top = max(rates.values())
    reached = [name.removeprefix("KVStore ") for name, rate in stores.items() if rate >= REACHED * top]
    best = max(stores, key=stores.__getitem__)
    note = f"best: {best.removeprefix('KVStore ')}, {stores[best]:.2f} of {top:.2f} GB/s ({stores[best] / top:.2f})"
    if reached:
        note += "; reached by " + "; ".join(reached)
    name = f"settings of a store that reach {REACHED:.0%} of the best here"
    report.add(Row(name, len(reached), f"of {len(stores)}", note=note))
