"""Weights from their files to the card, beside the drive and beside plain copies; a token by them. See README.md."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu.roofs import ReadRoof
from gpu.run import Run, beside, rates
from gpu.table import Row, number
from torch_csd import load_checkpoint
from torch_csd.bench.checkpoint import llama_config, make_checkpoint
from torch_csd.weights.files import read_header
from torch_csd.weights.layout import Region
from torch_csd.weights.stream import Stream

BAR = 0.90  # a token takes at most 1.10 times what the drive takes for its bytes
ROOF_BYTES_MAX = 1 << 30
COPY_BYTES = 32 << 20


@dataclass(frozen=True)
class Sizes:
    config: LlamaConfig = field(default_factory=lambda: llama_config(2 << 30))
    memory_budget: int = 1 << 30  # a quarter each of pinned memory and of staging on the card; the rest stays there

    @staticmethod
    def fitting(*, quick: bool) -> Sizes:
        return Sizes(llama_config(600 << 20), 256 << 20) if quick else Sizes()


def measure(run: Run, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes.fitting(quick=run.quick)
    with tempfile.TemporaryDirectory(prefix="bench_gpu-weights-", dir=run.directory) as directory:
        stored_bytes = make_checkpoint(directory, sizes.config)
        with ReadRoof(run.directory, min(stored_bytes, ROOF_BYTES_MAX)) as roof:
            for gpu_io in ("pinned", "gds"):
                reason = run.attempt(f"weights to card, {gpu_io}", lambda: missing_way(run, directory, gpu_io))  # noqa: B023
                if reason:
                    run.add(Row(f"weights to card, {gpu_io}", reason=reason))
                    continue
                options = dict(sizes=sizes, directory=directory, gpu_io=gpu_io, roof=roof)
                run.attempt(f"weights to card, {gpu_io}", lambda: stream_rows(run, **options))  # noqa: B023
                run.attempt(f"token, weights on the drive, {gpu_io}", lambda: token_row(run, **options))  # noqa: B023
        run.attempt("same logits", lambda: logits_row(run, sizes, directory))


def missing_way(run: Run, directory: str, gpu_io: str) -> str:
    """Why files are not read so; nothing: they are."""
    if gpu_io == "pinned":
        return ""
    with stream_of(run, directory, 16 << 20, "auto") as stream:
        stats = stream.stats()
    return "" if stats["gpu_io"] == "gds" else stats["gpu_reason"]


@contextmanager
def stream_of(run: Run, directory: str, budget_bytes: int, gpu_io: str) -> Iterator[Stream]:
    stream = Stream(budget_bytes, device=run.device.torch_device, gpu_io=gpu_io, directory=directory)
    try:
        yield stream
    finally:
        run.synchronize()
        stream.close()


def moved_bytes(stream: Stream) -> int:
    stats = stream.stats()
    return stats["gpu_copied_bytes"] + stats["gpu_direct_bytes"]


def plain_copies(run: Run, byte_count: int) -> Callable[[], object]:
    size = min(COPY_BYTES, byte_count)
    pinned, memory = run.device.new_pinned_memory(size), run.device.new_memory(size)
    pinned.random_(0, 256)
    copies = run.device.new_stream()

    def copy() -> None:
        with run.device.use(copies):
            for begin in range(0, byte_count, size):
                part = min(size, byte_count - begin)
                memory[:part].copy_(pinned[:part], non_blocking=True)
        copies.synchronize()

    return copy


def stream_rows(run: Run, sizes: Sizes, directory: str, gpu_io: str, roof: ReadRoof) -> None:
    """All matrices, in order, with nothing computed: none stays."""
    with stream_of(run, directory, sizes.memory_budget, gpu_io) as stream:
        layouts = []
        for path in sorted(glob.glob(os.path.join(directory, "*.safetensors"))):
            header = read_header(path)
            file = stream.open(path)
            layouts += [
                Region.make(file, entry.dtype, entry.shape, entry.offset)
                for entry in header.entries.values()
                if len(entry.shape) == 2
            ]
        pieces = [piece for layout in layouts for piece in stream.pieces(layout)[1]]
        stream.expect(layouts, keep=False)

        def once() -> None:
            for piece in pieces:
                with stream.use(piece):
                    pass

        once()
        before = moved_bytes(stream)
        once()
        byte_count = moved_bytes(stream) - before
        if byte_count == 0:
            raise RuntimeError("no byte came to the card")
        works = {"roof": roof.read, "plain": plain_copies(run, byte_count), "ours": once}
        seconds = run.interleaved(run.wall_timer, works, rounds=min(run.rounds, 5))
    gbs = rates(byte_count / 1e9, seconds["ours"])
    name = f"weights to card, {gpu_io}"
    run.add(beside(name, gbs, "GB/s", roof.name, rates(roof.file_bytes / 1e9, seconds["roof"]), BAR))
    plain = f"plain pinned copies of {COPY_BYTES / 2**20:g} MiB"
    row = beside(f"{name}: copies", gbs, "GB/s", plain, rates(byte_count / 1e9, seconds["plain"]))
    row.reason = "no bar: the drive is the limit, or its host's cache"
    run.add(row)


@contextmanager
def loaded(run: Run, directory: str, **options: object) -> Iterator[LlamaForCausalLM]:
    model = load_checkpoint(directory, device=run.device.torch_device, attn_implementation="sdpa", **options)
    try:
        yield model
    finally:
        run.synchronize()
        model.weight_stream.close()


@torch.inference_mode()
def token_row(run: Run, sizes: Sizes, directory: str, gpu_io: str, roof: ReadRoof) -> None:
    """One token of the whole model, without a context: the bytes that it reads, by the drive's own rate."""
    token = torch.tensor([[7]], device=run.device.torch_device)
    with loaded(run, directory, memory_budget=sizes.memory_budget, gpu_io=gpu_io) as model:
        model(token)
        before = moved_bytes(model.weight_stream)
        model(token)
        byte_count = moved_bytes(model.weight_stream) - before
        works = {"roof": roof.read, "ours": lambda: model(token)}
        seconds = run.interleaved(run.wall_timer, works, rounds=min(run.rounds, 5))
        stats = model.weight_stream.stats()
    theirs = [max(byte_count, 1) / (roof.file_bytes / each) for each in seconds["roof"]]
    row = beside(
        f"token, weights on the drive, {gpu_io}", rates(1, seconds["ours"]), "tok/s", f"its bytes by {roof.name},",
        [1 / each for each in theirs], BAR,
    )  # fmt: skip
    row.reason = (
        f"MiB/tok: {number(byte_count / 2**20)}; {number(stats['resident_bytes'] / 2**20)} MiB stay on the card; "
        f"{number(stats['wait_s'])} s waited for reads in all"
    )
    run.add(row)


@torch.inference_mode()
def logits_row(run: Run, sizes: Sizes, directory: str) -> None:
    """Beside the same checkpoint with all weights on the card."""
    ids = torch.arange(16, device=run.device.torch_device)[None]
    ordinary = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
    expected = ordinary.to(run.device.torch_device).eval()(ids).logits
    with loaded(run, directory, memory_budget=sizes.memory_budget) as model:
        found = [model(ids).logits for _ in range(2)]
    apart = max(float((each - expected).abs().max()) for each in found)
    unit = torch.finfo(expected.dtype).eps * float(expected.abs().max())
    equal = sum(bool(torch.equal(each, expected)) for each in found)
    row = Row(
        "same logits, weights on the drive", equal, "of 2 passes", beside="all weights on the card", beside_value=2,
        beside_unit="passes", ratio=equal / 2, bar=1.0, sized=False,
    )  # fmt: skip
    if equal < 2:
        # Large weights are multiplied in pieces, for which cuBLAS may choose other kernels.
        row.reason = f"{number(apart / unit)} units of {str(expected.dtype).removeprefix('torch.')} apart"
    if not apart <= 64 * unit:
        row.failed, row.reason = True, f"wrong: {row.reason}"
    run.add(row)
