"""A checkpoint that is larger than memory: loading, decoding from the drive, beside accelerate's disk offload."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch_csd.bench.checkpoint import llama_config, make_checkpoint
from torch_csd.bench.held import Held, HeldError
from torch_csd.bench.report import Beside, Report, Row, beside, median_ratio
from torch_csd.bench.roofs import FIO, OWN, DriveRoof, FileRoof
from torch_csd.bench.settings import Settings, available_memory_bytes, parse_count, tokens_text
from torch_csd.bench.timing import Sample, interleave, median, times
from torch_csd.config import parse_bytes

GIB = 2**30
DRIVE = "the drive, best of fio (1x32, 4x8) and our O_DIRECT reader"
STEPS = 2  # in a row between two measurements of the drive
WIDE = 16  # rows of the batch that shares a read of the weights
TINY_BYTES = 2**24
ROOF_BYTES = 2**30  # of the checkpoint's first file, which are read to know the drive's rate
QUANTISED = ("int8", "int4")


@dataclass(frozen=True)
class Sizes:
    size_bytes: int  # of the checkpoint, where one is made
    limit_bytes: int  # that a process may keep in memory
    kv_budget_bytes: int  # of a cache on the drive; taken from the weights'
    kv_shares: tuple[float, ...]  # K and V that a step reads, of the weights that it reads
    prompt: int  # tokens

    @staticmethod
    def make(size: str | None, limit: str | None, prompt: str | None, *, quick: bool) -> Sizes:
        return Sizes(
            parse_bytes(size or ("32MB" if quick else "6.2GB")),
            parse_bytes(limit or "2GiB"),
            4 * 2**20 if quick else 256 * 2**20,
            (1.0,) if quick else (0.5, 1.0),
            parse_count(prompt or ("64" if quick else "512")),
        )


@dataclass
class HeldSample(Sample):
    counts: dict = field(default_factory=dict)  # of held.Runner


@dataclass(frozen=True)
class Stage:
    """What all rows share."""

    settings: Settings
    report: Report
    sizes: Sizes
    checkpoint: str
    scratch: str  # a directory of this run's own
    roof: Callable[[], dict[str, float]]

    def bar(self, value: float) -> float | None:
        return None if self.settings.quick else value

    def held(self, stack: ExitStack) -> Held:
        return stack.enter_context(Held(threads=self.settings.threads, limit_bytes=self.sizes.limit_bytes))

    def peer(self, stack: ExitStack) -> Held:
        """Without a limit, which would count the files that it maps. Its idle threads sleep, as ours do: under load
        that makes accelerate a third faster."""
        return stack.enter_context(Held(threads=self.settings.threads, sleeping=True))

    def ours(self, held: Held, *, less_bytes: int = 0, weight_dtype: str | None = None) -> None:
        quantised = {} if weight_dtype is None else {"weight_dtype": weight_dtype, "weight_directory": self.scratch}
        held(
            "open_ours",
            checkpoint=self.checkpoint,
            memory_budget=self.settings.budget_bytes - less_bytes,
            io_engine=self.settings.io_engine,
            **quantised,
        )


def run(settings: Settings, report: Report, sizes: Sizes, checkpoint: Path | None) -> None:
    """Raises ValueError if there is no room for the sizes."""
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".torch_csd-weights-", dir=settings.directory))
        if checkpoint is None:
            settings.require(drive_bytes=int(2.5 * sizes.size_bytes), memory_bytes=2 * sizes.limit_bytes)
            checkpoint = Path(scratch, "checkpoint")
            report.say(f"making a random checkpoint of {sizes.size_bytes / 1e9:.1f} GB")
            make_checkpoint(checkpoint, llama_config(sizes.size_bytes))
        roof = stack.enter_context(_roof(settings, checkpoint))
        stage = Stage(settings, report, sizes, str(checkpoint), scratch, lambda: _best(roof()))
        sections = {"load": load_rows, "decode and prefill": decode_rows, "decode, K and V too": kv_rows}
        for name, rows in sections.items():
            try:
                rows(stage)
            except HeldError as error:
                report.skip(name, error)


@contextmanager
def _roof(settings: Settings, checkpoint: Path) -> Iterator[FileRoof]:
    """Of the checkpoint's own drive, unless it is too small to read a rate from."""
    largest = max(checkpoint.glob("*.safetensors"), key=os.path.getsize)
    size_bytes = largest.stat().st_size
    roof = FileRoof(str(largest), min(size_bytes, ROOF_BYTES))
    with roof if size_bytes >= 2**28 else DriveRoof(settings.directory, 2**26) as roof:
        yield roof


def _best(roofs: dict[str, float]) -> dict[str, float]:
    return roofs | {DRIVE: max(roofs.values())}


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_rows(stage: Stage) -> None:
    tiny = os.path.join(stage.scratch, "tiny")
    make_checkpoint(tiny, llama_config(TINY_BYTES))
    with ExitStack() as stack:
        held = stage.held(stack)
        rounds = stage.settings.rounds
        cost = held("load_cost", checkpoint=stage.checkpoint, tiny=tiny, rounds=rounds)
    pairs = zip(cost["load_s"], cost["metadata_s"], strict=True)
    beyond_s = median([load_s - metadata_s for load_s, metadata_s in pairs])
    size_gb = checkpoint_bytes(stage.checkpoint) / 1e9
    row = Row(f"load {size_gb:.1f} GB, beyond the metadata", beyond_s, "s")
    row.note = (
        f"load_checkpoint {median(cost['load_s']):.2f} s; configuration, headers and modules without weights "
        f"{median(cost['metadata_s']):.2f} s"
    )
    if stage.bar(1.0) is not None:
        row.bar, row.met = "<= 1", beyond_s <= 1
    stage.report.add(row)
    name = f"load {size_gb:.1f} GB, peak of memory"
    if cost["extra_bytes"] is None:
        stage.report.skip(name, "VmHWM cannot be started anew here (/proc/self/clear_refs)")
        return
    extra_mib = cost["extra_bytes"] / 2**20
    row = Row(name, extra_mib, "MiB", note="VmHWM over what was resident before, the first load after a tiny one's")
    if stage.bar(64) is not None:
        row.bar, row.met = "<= 64", extra_mib <= 64
    stage.report.add(row)


def checkpoint_bytes(checkpoint: str) -> int:
    return sum(path.stat().st_size for path in Path(checkpoint).glob("*.safetensors"))


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode_rows(stage: Stage) -> None:
    report, settings = stage.report, stage.settings
    with ExitStack() as stack:
        ours = stage.held(stack)
        stage.ours(ours)
        held = {"ours": ours}
        calls = {"ours": _steps(ours), "wide": _steps(ours, batch=WIDE)}
        peer, placed = _accelerate(stage, stack)
        difference = None
        if peer is not None:
            difference = _difference(ours("logits"), peer("logits"))
            calls = {"accelerate": _steps(peer, count=1)} | calls
        for dtype in QUANTISED:
            name = f"decode, {dtype}"
            try:
                with Held(threads=settings.threads) as maker:  # of the copies, once; later processes find them
                    stage.ours(maker, weight_dtype=dtype)
                each = stage.held(stack)
                stage.ours(each, weight_dtype=dtype)
                held[dtype], calls[dtype] = each, _steps(each)
            except HeldError as error:
                report.skip(name, error)
        for call in calls.values():
            call()  # the first step learns the order, and keeps what stays
        samples = interleave(calls, settings.rounds, stage.roof)
        memory = {name: each("memory") for name, each in held.items()}
        their_memory = peer("memory") if peer is not None else None
        prefill = prefill_samples(stage, ours, stack)
    mine = samples["ours"]
    theirs = samples.get("accelerate")
    if theirs is not None:
        note = (
            f"{placed['held_bytes'] / GIB:.2f} GiB of weights in memory (VmHWM {their_memory['VmHWM'] / GIB:.2f} GiB, "
            f"no limit: it maps whole files); the page cache of the checkpoint dropped before each step, "
            f"{median([s.drive_bytes for s in theirs]) / 1e9:.2f} GB a step from the drive; logits differ from ours by "
            f"{difference:.3g} at most"
        )
        report.add(Row("  peer: accelerate, disk offload", median(times(theirs)), "s/tok", drive_time(theirs), note))
    others = drive_time(mine, stage.bar(1.10))
    if theirs is not None:
        others.append(_faster(mine, theirs, stage.bar(1.6)))
    report.add(
        Row("decode, as stored, batch 1, cold", median(times(mine)), "s/tok", others, _note(mine, memory["ours"]))
    )
    _memory_row(stage, "decode, as stored", memory["ours"])
    for dtype in QUANTISED:
        if dtype not in samples:
            continue
        others = [
            *drive_time(samples[dtype]),
            beside("as stored", times(samples[dtype]), times(mine), "s/tok", lower_is_better=True),
        ]
        if theirs is not None:
            others.append(_faster(samples[dtype], theirs, stage.bar(5.0) if dtype == "int4" else None))
        note = _note(samples[dtype], memory[dtype])
        report.add(Row(f"decode, {dtype}, batch 1, cold", median(times(samples[dtype])), "s/tok", others, note))
        _memory_row(stage, f"decode, {dtype}", memory[dtype])
    wide = samples["wide"]
    wide_rates, rates = [WIDE / s for s in times(wide)], [1 / s for s in times(mine)]
    others = [beside("batch 1", wide_rates, rates, "tok/s", bar=stage.bar(10.0)), *drive_time(wide)]
    report.add(Row(f"decode, as stored, batch {WIDE}, cold", median(wide_rates), "tok/s", others, _note(wide)))
    prefill_row(stage, prefill)


def _steps(held: Held, *, batch: int = 1, count: int = STEPS) -> Callable[[], Sample]:
    def sample() -> Sample:
        found = held("steps", batch=batch, count=count)
        return HeldSample(found["seconds"], found["read_bytes"], counts=found)

    return sample


def _accelerate(stage: Stage, stack: ExitStack) -> tuple[Held | None, dict]:
    name = "  peer: accelerate, disk offload"
    if importlib.util.find_spec("accelerate") is None:
        stage.report.skip(name, "accelerate is not installed (pip install 'torch_csd[bench]')")
        return None, {}
    held = stage.peer(stack)
    offload = os.path.join(stage.scratch, "offload")
    try:
        placed = held(
            "open_accelerate",
            checkpoint=stage.checkpoint,
            memory_budget=stage.settings.budget_bytes,
            offload_directory=offload,
        )
        held("steps")
    except HeldError as error:
        stage.report.skip(name, error)
        return None, {}
    return held, placed


def _difference(ours: list[float], theirs: list[float]) -> float:
    """Largest difference of logits; raises AssertionError if that is no rounding."""
    difference = max(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
    limit = 0.05 * max(abs(other) for other in theirs)
    assert difference <= limit, f"logits differ by {difference}, more than rounding explains ({limit:.3g})"
    return difference


def drive_time(samples: list[Sample], bar: float | None = None) -> list[Beside]:
    """Step time over the time in which the drive delivers the bytes that the step read: 1 is never idle."""
    if not all(sample.drive_bytes for sample in samples):
        return []  # all of it fits into memory
    drive_s = [sample.drive_bytes / (sample.roofs[DRIVE] * 1e9) for sample in samples]
    ratio = median_ratio(times(samples), drive_s)
    return [Beside(f"time to read its bytes at {DRIVE}", median(drive_s), "s", ratio, bar, at_most=True)]


def _faster(samples: list[Sample], theirs: list[Sample], bar: float | None) -> Beside:
    return beside("accelerate's disk offload", times(samples), times(theirs), "s/tok", bar=bar, lower_is_better=True)


def _note(samples: list[Sample], memory: dict | None = None) -> str:
    """The rates, and who waited for whom."""
    counts = [sample.counts for sample in samples]
    part = {name: median([each[name] for each in counts]) for name in counts[0]}
    text = f"{part['read_bytes'] / 1e9:.2f} GB a step"
    if part["kv_bytes"]:
        text += f" ({part['kv_bytes'] / 1e9:.2f} of K and V)"
    text += f" at {median([sample.drive_gbs for sample in samples]):.2f} GB/s"
    for name, short in ((FIO, "fio"), (OWN, "our reader")):
        if name in samples[0].roofs:
            text += f", {short} {median([sample.roofs[name] for sample in samples]):.2f}"
    busy, waited, cores = (part[name] / part["seconds"] for name in ("busy_s", "wait_s", "cpu_s"))
    text += f"; weights in flight for {busy:.0%} of it, waited for {waited:.0%}; {cores:.1f} cores"
    if memory is not None:
        text += f"; {memory['resident_bytes'] / GIB:.2f} GiB of weights stay in memory"
    return text


def _memory_row(stage: Stage, what: str, memory: dict) -> None:
    gib, limit = memory["VmHWM"] / GIB, stage.sizes.limit_bytes / GIB
    row = Row(f"{what}, memory of the process", gib, "GiB")
    row.note = f"VmHWM; RLIMIT_DATA {limit:g} GiB"
    if stage.bar(limit) is not None:
        row.bar, row.met = f"<= {limit:g}", gib <= limit
    stage.report.add(row)


# ---- weights and K and V ---------------------------------------------------------------------------------------------


def kv_rows(stage: Stage) -> None:
    """A cache on the same drive, nothing of which stays in memory, but for what is read ahead."""
    settings, sizes = stage.settings, stage.sizes
    with ExitStack() as stack:
        held = stage.held(stack)
        stage.ours(held, less_bytes=sizes.kv_budget_bytes)
        held("steps")
        weight_bytes = held("steps", count=STEPS)["weight_bytes"]
        token_bytes = held("kv_token_bytes")
        for share in sizes.kv_shares:
            tokens = max(int(share * weight_bytes / token_bytes) // 64 * 64, 64)
            name = f"decode, batch 1, K and V of {tokens_text(tokens)} tokens too, cold"
            options = settings.drive_options(sizes.kv_budget_bytes, False)
            try:
                held("put_kv", directory=settings.directory, options=options, tokens=tokens)
                held("steps", count=STEPS)
                samples = interleave({"": _steps(held)}, settings.rounds, stage.roof)[""]
            except HeldError as error:
                stage.report.skip(name, error)
                continue
            row = Row(name, median(times(samples)), "s/tok", drive_time(samples, stage.bar(1.15)), _note(samples))
            stage.report.add(row)
        _memory_row(stage, "decode, weights and K and V", held("memory"))


# ---- a prompt --------------------------------------------------------------------------------------------------------


def prefill_samples(stage: Stage, ours: Held, stack: ExitStack) -> dict[str, list[Sample]]:
    tokens = stage.sizes.prompt
    calls = {"ours": _prefill(ours, tokens)}
    if available_memory_bytes() > 1.2 * checkpoint_bytes(stage.checkpoint) + stage.sizes.limit_bytes:
        in_memory = stage.peer(stack)
        in_memory("open_in_memory", checkpoint=stage.checkpoint)
        calls = {"memory": _prefill(in_memory, tokens)} | calls
    for call in calls.values():
        call()
    return interleave(calls, max(stage.settings.rounds // 2, 1), stage.roof)


def prefill_row(stage: Stage, samples: dict[str, list[Sample]]) -> None:
    mine = samples["ours"]
    others = drive_time(mine)
    note = ""
    if "memory" in samples:
        others.append(beside("all weights in memory", times(mine), times(samples["memory"]), "s", lower_is_better=True))
    else:
        note = "no memory for the same with all weights in memory; "
    name = f"prefill {tokens_text(stage.sizes.prompt)}, as stored"
    stage.report.add(Row(name, median(times(mine)), "s", others, note + _note(mine)))


def _prefill(held: Held, tokens: int) -> Callable[[], Sample]:
    def sample() -> Sample:
        found = held("prefill", tokens=tokens)
        return HeldSample(found["seconds"], found["read_bytes"], counts=found)

    return sample
