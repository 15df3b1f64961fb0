"""One layer's sparse attention, cold, beside the dense attention of the same drive in the same run."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_csd.bench.attention import CHUNK, Shape, fill, random_kv
from torch_csd.bench.report import Report, Row, beside
from torch_csd.bench.settings import Settings, dtype_name, tokens_text
from torch_csd.bench.timing import Sample, counted, interleave, median, rates
from torch_csd.catalogue import PAGE_TOKENS, page_bytes
from torch_csd.errors import StoreError
from torch_csd.sparse import PageTopK, SparF, Sparse
from torch_csd.store import KVStore

# Tokens per second over those of dense attention in the base type. With a choice for each kv head reads are as small as
# tiles, and bound by the drive's requests per second: of int4 a tile is 9 KiB, and the bar is on four of them a read.
BARS = {
    (torch.bfloat16, "page top-k 1/16"): 8.0,
    (torch.int4, "page top-k 1/16, 4 kv heads a choice"): 20.0,
    (torch.bfloat16, "SparF 1/8 (128 tokens), from a sketch"): 3.0,
}
BAR_CONTEXT = 131072

SPAN_TOKENS = 512  # that keys have something in common over, where they do
SPANS_WANTED = 16  # by one query
STEPS_BEFORE = 24  # of a decode, before tiles that stay are sampled
CALLS = 8  # of a sample
WORK_S = 0.01  # of something else between two steps, where there is a guess to be read for meanwhile


@dataclass(frozen=True)
class Case:
    """One way to attend, over one kind of keys."""

    name: str
    sparse: Sparse | None
    spans: bool = False  # keys come in spans that queries want; else every key and query is drawn by itself
    kept: bool = False  # tiles stay in memory from step to step, and so does most of the query
    work_s: float = 0.0  # of something else before each step
    guess: bool = False  # the step's query is known before that: a guess that is right
    peer: str | None = None  # another case of the same type, to be beside; None: dense in the base type


def cases(tokens: int, shape: Shape) -> list[Case]:
    """SparQ (2312.04985) counts r channels of K as r / (2 head_dim) of K and V, and k tokens as k / tokens of them.

    An eighth is then what its authors measure (k = 128, all the rest channels), or half of it each.
    """
    few = {"channels": max(1, shape.head_dim // 4), "tokens": 128}
    half = {"channels": max(1, shape.head_dim // 8), "tokens": max(1, tokens // 16)}
    sixteenth = PageTopK(fraction=1 / 16)
    together = [
        Case(f"page top-k 1/16, {count} kv heads a choice", PageTopK(fraction=1 / 16, heads_per_choice=count))
        for count in (2, 4, 8)
        if count <= shape.kv_heads
    ]
    work = f"{1e3 * WORK_S:.0f} ms of other work"
    return [
        Case("dense", None),
        Case("page top-k 1/16", sixteenth),
        *together,
        Case(f"page top-k 1/16, after {work}", sixteenth, work_s=WORK_S, peer="page top-k 1/16"),
        Case(
            f"page top-k 1/16, guessed before {work}",
            sixteenth,
            work_s=WORK_S,
            guess=True,
            peer=f"page top-k 1/16, after {work}",
        ),
        Case("page top-k 1/16, keys in spans", sixteenth, spans=True),
        Case("page top-k 1/16, tiles kept from step to step", sixteenth, spans=True, kept=True),
        Case("SparF 1/8 (128 tokens), from a sketch", SparF(**few, step1="sketch")),
        Case("SparF 1/8 (128 tokens), from channels", SparF(**few)),
        Case("SparF 1/8 (1/16 of the tokens), from a sketch", SparF(**half, step1="sketch")),
        Case("SparF 1/8 (1/16 of the tokens), from a sketch, keys in spans", SparF(**half, step1="sketch"), spans=True),
        Case("SparF 1/8 (1/16 of the tokens), from channels", SparF(**half)),
    ]


def run(settings: Settings, report: Report, tokens: int, shape: Shape) -> None:
    """Raises ValueError if there is no room for the sizes."""
    torch.manual_seed(0)
    base_bytes = tokens * shape.token_bytes(settings.base)
    settings.require(drive_bytes=9 * base_bytes, memory_bytes=5 * base_bytes + 2**30)
    chosen = cases(tokens, shape)
    with torch.inference_mode(), ExitStack() as stack:
        calls: dict[str, Callable[[], Sample]] = {}
        notes: dict[str, KVStore] = {}
        rows: list[tuple[str, torch.dtype, Case]] = []
        for spans in (False, True):
            if spans:
                k, v, queries = span_kv(tokens, settings.base, shape)
            else:
                k, v = random_kv(tokens, settings.base, shape)
                queries = itertools.cycle([shape.q(settings.base) for _ in range(2 * CALLS)])
            for dtype in settings.stored:
                of_dtype = [case for case in chosen if case.spans == spans]
                for kept in (False, True):
                    group = [case for case in of_dtype if case.kept == kept]
                    if not group:
                        continue
                    try:
                        store = stack.enter_context(open_store(settings, dtype, k, v, group, kept=kept))
                    except (StoreError, NotImplementedError) as error:
                        report.skip(f"{dtype_name(dtype)}, keys {'in spans' if spans else 'at random'}", error)
                        continue
                    for case in group:
                        name = f"{dtype_name(dtype)}, {case.name}"
                        calls[name] = sampler(settings, store, case, queries)
                        notes[name] = store
                        rows.append((name, dtype, case))
            del k, v
        if not any(store.stats()["direct_io"] for store in notes.values()):
            report.skip("sparse attention", "reads go through the page cache, so nothing would be cold")
            return
        samples = interleave(calls, settings.rounds)
    dense = samples[f"{dtype_name(settings.base)}, dense"]
    for name, dtype, case in rows:
        speed = rates(samples[name], 1.0)
        others = []
        if case.peer is not None:
            peer_speed = rates(samples[f"{dtype_name(dtype)}, {case.peer}"], 1.0)
            others.append(beside(case.peer, speed, peer_speed, "steps/s"))
        elif name != f"{dtype_name(settings.base)}, dense":
            bar = BARS.get((dtype, case.name)) if tokens >= BAR_CONTEXT else None
            dense_speed = rates(dense, 1.0)
            others.append(beside(f"dense {dtype_name(settings.base)}, cold", speed, dense_speed, "steps/s", bar=bar))
        read = median([sample.drive_bytes for sample in samples[name]]) / 2**20
        in_memory = median([sample.memory_bytes for sample in samples[name]]) / 2**20
        dense_read = median([sample.drive_bytes for sample in dense]) / 2**20
        note = f"{read:.1f} MiB a step from the drive ({read / dense_read:.1%} of dense)"
        if case.kept:
            note += f", {in_memory:.1f} MiB from memory"
        report.add(Row(f"{name}, {tokens_text(tokens)} tokens", median(speed), "steps/s", others, note))


def open_store(
    settings: Settings, dtype: torch.dtype, k: Tensor, v: Tensor, group: list[Case], *, kept: bool
) -> KVStore:
    """Filled, with everything kept in memory that the cases choose by."""
    # Beside what is read into: sketches and sums of V of SparF, a fifth of a bfloat16 cache; and tiles that stay, which
    # may take half of the rest.
    stored_bytes = page_bytes(k.shape[1], k.shape[3], v.shape[3], dtype_name(dtype)) * (k.shape[2] // PAGE_TOKENS)
    budget = settings.budget_bytes + (stored_bytes // 4 if kept else (k.nbytes + v.nbytes) // 3)
    store = settings.store(dtype, memory_budget=budget, resident=kept)
    try:
        for case in group:
            if case.sparse is not None:
                store.sparse = case.sparse
        fill(store, k, v)
        query = torch.randn(1, k.shape[1], 1, k.shape[3]).to(k.dtype)
        for case in group:  # builds what only a part of the cases had kept, before anything is timed
            store.attend(0, query, sparse=case.sparse)
    except BaseException:
        store.close()
        raise
    return store


def sampler(settings: Settings, store: KVStore, case: Case, queries: Iterator[Tensor]) -> Callable[[], Sample]:
    def step() -> None:
        query = next(queries)
        if case.guess:
            store.prefetch(0, query, sparse=case.sparse)
        if case.work_s:
            end_s = time.perf_counter() + case.work_s
            while time.perf_counter() < end_s:  # as a model would: a core is busy, and the drive is not
                pass
        store.attend(0, query, sparse=case.sparse)

    for _ in range(STEPS_BEFORE if case.kept else 1):
        step()
    count = 2 if case.sparse is None else CALLS
    return counted(step, store.stats, min(count, 2) if settings.quick else count)


def span_kv(tokens: int, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    """K, V as :func:`random_kv`, but that half of the variance of a key is its span's; and queries that want spans.

    The queries are those of a decode: of the spans that one wants, the next wants all but one.
    """
    k, v = random_kv(tokens, dtype, shape)
    span_count = math.ceil(tokens / SPAN_TOKENS)
    topics = torch.randn(shape.kv_heads, span_count, shape.head_dim)
    for begin in range(0, tokens, CHUNK):
        piece = k[:, :, begin : begin + CHUNK]
        of_token = topics[:, torch.arange(begin, begin + piece.shape[2]) // SPAN_TOKENS]
        piece.copy_((piece.float() + of_token) * 0.5**0.5)
    group = shape.heads // shape.kv_heads

    def steps() -> Iterator[Tensor]:
        wanted = torch.stack([torch.randperm(span_count)[:SPANS_WANTED] for _ in range(shape.kv_heads)])
        for step in itertools.count():
            wanted[:, step % wanted.shape[1]] = torch.randint(span_count, (shape.kv_heads,))
            mean = torch.stack([topics[h, wanted[h]].sum(0) for h in range(shape.kv_heads)])
            q = mean.repeat_interleave(group, 0) * 0.5 + torch.randn(shape.heads, shape.head_dim)
            yield q[None, :, None].to(dtype)

    return k, v, steps()
