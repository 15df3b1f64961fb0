"""One layer's attention: cold against the drive and files, hot against memory and torch, prefill chunks, and the
cost of a call against the context."""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_csd.bench.peers import FILE_PEERS, FilePeer, PeerUnavailable, sdpa_folded, sdpa_grouped
from torch_csd.bench.report import Beside, Point, Report, Row, beside, median_ratio
from torch_csd.bench.roofs import (
    MEMORY,
    DriveRoof,
    drive_roof_name,
    heap_bytes,
    read_memory,
    resident_set_bytes,
)
from torch_csd.bench.settings import CODES, Settings, dtype_name, tokens_text
from torch_csd.bench.timing import Sample, counted, interleave, median, rates, repeated, seconds, times
from torch_csd.errors import StoreError
from torch_csd.store import KVStore

CHUNK = 4096  # tokens appended at once
COLD_BARS = {torch.int8: 1.85, torch.int4: 3.2}  # tokens/s over the base's
HOT_BARS = {torch.int4: 1.6}
FIXED_US_BAR = 60.0
BAR_CONTEXT = 65536  # bars are set for caches that no processor's cache holds: this context at least
METADATA_BAR = 0.001
CHECKSUM_BAR = 1.03  # time with pages checked over time without


@dataclass(frozen=True)
class Shape:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Of K and V of one token, dense."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def q(self, dtype: torch.dtype, q_len: int = 1) -> Tensor:
        return torch.randn(1, self.heads, q_len, self.head_dim).to(dtype)


@dataclass(frozen=True)
class Sizes:
    context: int  # tokens of the main rows
    sweep: list[int]
    q_len: int  # of the prefill chunk
    past: int  # tokens before it


def run(settings: Settings, report: Report, sizes: Sizes, shape: Shape) -> None:
    """Raises ValueError if there is no room for the sizes."""
    torch.manual_seed(0)
    base_bytes = sizes.context * shape.token_bytes(settings.base)
    # On the drive: the stores (one twice), the roof's file, two peers' files. In memory: K, V and every store once.
    settings.require(drive_bytes=7 * base_bytes, memory_bytes=4 * base_bytes + 2**30)
    k, v = random_kv(sizes.context, settings.base, shape)
    with torch.inference_mode():
        cold_rows(settings, report, sizes, shape, k, v)
        hot_rows(settings, report, sizes, shape, k, v)
        del k, v
        chunk_rows(settings, report, sizes, shape)
        metadata_row(settings, report, sizes, shape)


def random_kv(tokens: int, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor]:
    """[1, kv_heads, tokens, head_dim], made in pieces: float32 of all of it would be twice as large."""
    k, v = (torch.empty(1, shape.kv_heads, tokens, shape.head_dim, dtype=dtype) for _ in range(2))
    for tensor in (k, v):
        for begin in range(0, tokens, CHUNK):
            piece = tensor[:, :, begin : begin + CHUNK]
            piece.copy_(torch.randn(piece.shape))
    return k, v


def fill(store: KVStore, k: Tensor, v: Tensor) -> None:
    for begin in range(0, k.shape[2], CHUNK):
        store.append(0, k[:, :, begin : begin + CHUNK], v[:, :, begin : begin + CHUNK])
    store.flush()


def open_filled(settings: Settings, report: Report, k: Tensor, v: Tensor, stack: ExitStack, place: str) -> dict:
    """{kv_dtype: store} of every type asked for; what cannot be stored is a skipped row."""
    stores: dict[torch.dtype, KVStore] = {}
    for dtype in settings.stored:
        dense_bytes = 2 * k.numel() * (4 if dtype == torch.float32 else 2)
        budget = settings.memory_budget if place == "cold" else dense_bytes + dense_bytes // 4 + 2**26
        try:
            store = stack.enter_context(settings.store(dtype, memory_budget=budget, resident=place == "hot"))
            fill(store, k, v)
        except (StoreError, NotImplementedError, RuntimeError) as error:
            report.skip(f"{place} attention, {dtype_name(dtype)}", error)
            continue
        stores[dtype] = store
    return stores


# ---- cold: every page from the drive ---------------------------------------------------------------------------


def cold_rows(settings: Settings, report: Report, sizes: Sizes, shape: Shape, k: Tensor, v: Tensor) -> None:
    base, tokens = settings.base, sizes.context
    dense_bytes = k.nbytes + v.nbytes
    q = shape.q(base)
    with ExitStack() as stack:
        try:
            roof = stack.enter_context(DriveRoof(settings.directory, min(dense_bytes, 2**30)))
        except OSError as error:
            report.skip("cold attention", f"{settings.directory}: no O_DIRECT here ({error.strerror or error})")
            return
        stores = open_filled(settings, report, k, v, stack, "cold")
        if base not in stores:
            return
        if not stores[base].stats()["direct_io"]:
            reason = stores[base].stats()["io_reason"]
            report.skip("cold attention", f"{reason}: reads go through the page cache, so nothing would be cold")
            return
        calls: dict[str, Callable[[], Sample]] = {
            dtype_name(dtype): cold_sampler(settings, store, q, tokens) for dtype, store in stores.items()
        }
        peers = open_peers(settings, report, k, v, q, stack)
        # Interleaved: each peer stands between two of our own samples, and every sample between two of the roof's.
        samples = interleave(calls | {peer.name: file_peer_sampler(peer, q) for peer in peers}, settings.rounds, roof)
        for peer in peers:
            peer_rates = rates(samples[peer.name], dense_bytes / 1e9)
            row_roofs = [beside(name, peer_rates, values, "GB/s") for name, values in roofs_of(samples[peer.name])]
            note = "its files dropped from the page cache before each run (posix_fadvise DONTNEED, checked)"
            report.add(Row(f"  peer, cold: {peer.name}", median(peer_rates), "GB/s", row_roofs, note))
        for dtype, store in stores.items():
            report.add(cold_row(settings, samples, dtype, store, tokens, dense_bytes, peers))
        del peers
        report.add(checksum_row(settings, q, k, v))
        cold_sweep(settings, report, sizes, shape, stores, roof, q)


def cold_sampler(settings: Settings, store: KVStore, q: Tensor, tokens: int) -> Callable[[], Sample]:
    """A sample reads at least 16 budgets: what was read ahead before it began is then 1/16 of it at most."""
    run = functools.partial(store.attend, 0, q, kv_end=tokens)
    before = store.stats()["drive_read_bytes"]
    run()
    read_bytes = max(store.stats()["drive_read_bytes"] - before, 1)
    count = max(1, min(64, math.ceil(16 * settings.budget_bytes / read_bytes)))
    return counted(run, store.stats, count if not settings.quick else min(count, 8))


def cold_row(
    settings: Settings,
    samples: dict[str, list[Sample]],
    dtype: torch.dtype,
    store: KVStore,
    tokens: int,
    dense_bytes: int,
    peers: list[FilePeer],
) -> Row:
    name = f"cold attention, {dtype_name(dtype)}, {tokens_text(tokens)} tokens"
    ours = samples[dtype_name(dtype)]
    gbs = [sample.drive_gbs for sample in ours]
    stats = store.stats()
    worked_s = stats["io_wait_s"] + stats["compute_s"]
    bars = tokens >= BAR_CONTEXT
    waiting = stats["io_wait_s"] / max(worked_s, 1e-9)
    note = f"{stats['io_engine']}, workers wait for the drive {waiting:.0%} of the time"
    others = []
    if dtype == settings.base:
        for roof_name, values in roofs_of(ours):
            bar = 0.92 if bars and roof_name == drive_roof_name(ours[0].roofs) else None
            others.append(beside(roof_name, gbs, values, "GB/s", bar=bar))
        if peers:
            speed = {peer.name: rates(samples[peer.name], dense_bytes / 1e9) for peer in peers}
            best = max(speed, key=lambda name: median(speed[name]))
            mine = rates(ours, dense_bytes / 1e9)
            others.append(beside(f"best peer: {best}", mine, speed[best], "GB/s", bar=1.0 if bars else None))
        return Row(name, median(gbs), "GB/s", others, note)
    base = samples[dtype_name(settings.base)]
    mtok, base_mtok = rates(ours, tokens / 1e6), rates(base, tokens / 1e6)
    bar = COLD_BARS.get(dtype) if bars else None
    others.append(beside(f"cold {dtype_name(settings.base)}", mtok, base_mtok, "Mtok/s", bar=bar))
    others += [
        Beside(roof_name, median(values), "GB/s", median_ratio(gbs, values)) for roof_name, values in roofs_of(ours)
    ]
    return Row(name, median(mtok), "Mtok/s", others, f"{median(gbs):.2f} GB/s; {note}")


def checksum_row(settings: Settings, q: Tensor, k: Tensor, v: Tensor) -> Row:
    """What it costs to compare pages with their checksums: the same file, read with and without.

    Two files would not do: a drive gives one back some per cent faster than the other, according to where they lie.
    """
    base, tokens = settings.base, k.shape[2]
    options = settings.drive_options(settings.memory_budget, False)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix=".torch_csd-", dir=settings.directory))
        with KVStore(directory, durable=True, name="pages", kv_dtype=base, **options) as store:
            fill(store, k, v)
            store.commit()
        calls = {}
        for name, checksums in (("on", True), ("off", False)):
            store = KVStore.open(directory, "pages", read_only=True, checksums=checksums, **options)
            calls[name] = cold_sampler(settings, stack.enter_context(store), q, tokens)
        # Twice the rounds: what is looked for is smaller than what one pair differs by.
        samples = {name: times(each) for name, each in interleave(calls, 2 * settings.rounds).items()}
    note = f"the same file; pairs differ by {spread(samples['on'], samples['off']):.0%} (interquartile range)"
    ratio = median_ratio(samples["on"], samples["off"])
    bar = CHECKSUM_BAR if tokens >= BAR_CONTEXT else None
    off = Beside("checksums off", 1e3 * median(samples["off"]), "ms", ratio, bar, at_most=True)
    name = f"cold attention, {dtype_name(base)}, {tokens_text(tokens)} tokens, pages checked"
    return Row(name, 1e3 * median(samples["on"]), "ms", [off], note)


def spread(values: list[float], others: list[float]) -> float:
    """Interquartile range of the ratios, pair by pair."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return high - low


def roofs_of(samples: list[Sample]) -> list[tuple[str, list[float]]]:
    return [(name, [sample.roofs[name] for sample in samples]) for name in samples[0].roofs]


def open_peers(settings: Settings, report: Report, k: Tensor, v: Tensor, q: Tensor, stack: ExitStack) -> list[FilePeer]:
    expected = sdpa_folded(q, k, v)
    peers = []
    for kind in FILE_PEERS:
        try:
            peer = kind(settings.directory, k, v)
            stack.callback(peer.close)
            if not torch.equal(peer.attend(q).flatten(), expected.flatten()):
                raise PeerUnavailable("it computed something else")
        except (PeerUnavailable, OSError, ImportError) as error:
            report.skip(f"  peer, cold: {kind.name}", error)
            continue
        peers.append(peer)
    return peers


def file_peer_sampler(peer: FilePeer, q: Tensor) -> Callable[[], Sample]:
    def sample() -> Sample:
        peer.drop()
        return Sample(seconds(lambda: peer.attend(q)))

    return sample


def cold_sweep(
    settings: Settings,
    report: Report,
    sizes: Sizes,
    shape: Shape,
    stores: dict[torch.dtype, KVStore],
    roof: DriveRoof,
    q: Tensor,
) -> None:
    for tokens in sizes.sweep:
        calls = {dtype_name(dtype): cold_sampler(settings, store, q, tokens) for dtype, store in stores.items()}
        samples = interleave(calls, sweep_rounds(settings), roof, once_a_round=True)
        for name, ours in samples.items():
            gbs = [sample.drive_gbs for sample in ours]
            roofs = roofs_of(ours)
            others = [beside(roof_name, gbs, values, "GB/s") for roof_name, values in roofs]
            medians = {roof_name: median(values) for roof_name, values in roofs}
            point = Point("cold", name, tokens, tokens / median(times(ours)), median(gbs), medians)
            note = f"{point.tokens_per_s / 1e6:.2f} Mtok/s"
            row_name = f"cold attention, {name}, {tokens_text(tokens)} tokens (sweep)"
            report.add(Row(row_name, median(gbs), "GB/s", others, note, points=[point]))


# ---- hot: every page in memory ---------------------------------------------------------------------------------


def hot_rows(settings: Settings, report: Report, sizes: Sizes, shape: Shape, k: Tensor, v: Tensor) -> None:
    base, tokens = settings.base, sizes.context
    bars = tokens >= BAR_CONTEXT
    dense_bytes = k.nbytes + v.nbytes
    q = shape.q(base)
    with ExitStack() as stack:
        stores = open_filled(settings, report, k, v, stack, "hot")
        torch_calls = {
            "torch SDPA, group folded into q_len": lambda: sdpa_folded(q, k, v),
            "torch SDPA, enable_gqa": lambda: sdpa_grouped(q, k, v),
        }
        calls = {MEMORY: repeated(lambda: read_memory([k, v]))}
        for dtype, store in stores.items():
            calls[dtype_name(dtype)] = repeated(functools.partial(store.attend, 0, q))
        calls |= {name: repeated(run) for name, run in torch_calls.items()}
        samples = interleave(calls, settings.rounds)
        read_gbs = rates(samples[MEMORY], dense_bytes / 1e9)
        for name in torch_calls:
            gbs = rates(samples[name], dense_bytes / 1e9)
            report.add(Row(f"  peer, hot: {name}", median(gbs), "GB/s", [beside(MEMORY, gbs, read_gbs, "GB/s")]))
        best = min(torch_calls, key=lambda name: median(times(samples[name])))
        for dtype, store in stores.items():
            name = f"hot attention, {dtype_name(dtype)}, {tokens_text(tokens)} tokens"
            ours = samples[dtype_name(dtype)]
            note = f"{store.stats()['simd']}, {settings.threads} threads"
            if dtype == base:
                gbs = rates(ours, dense_bytes / 1e9)
                best_gbs = rates(samples[best], dense_bytes / 1e9)
                others = [
                    beside(MEMORY, gbs, read_gbs, "GB/s", bar=0.85 if bars else None),
                    beside(f"best {best}", gbs, best_gbs, "GB/s", bar=1.5 if bars else None),
                ]
                report.add(Row(name, median(gbs), "GB/s", others, note))
                continue
            mtok = rates(ours, tokens / 1e6)
            best_mtok, read_mtok = rates(samples[best], tokens / 1e6), rates(samples[MEMORY], tokens / 1e6)
            others = [beside(f"best {best}", mtok, best_mtok, "Mtok/s")]
            if base in stores:
                base_mtok = rates(samples[dtype_name(base)], tokens / 1e6)
                bar = HOT_BARS.get(dtype) if bars else None
                others.insert(0, beside(f"hot {dtype_name(base)}", mtok, base_mtok, "Mtok/s", bar=bar))
            others.append(beside(f"{MEMORY}, as {dtype_name(base)}", mtok, read_mtok, "Mtok/s"))
            report.add(Row(name, median(mtok), "Mtok/s", others, note))
        hot_sweep(settings, report, sizes, shape, stores, k, v, q)
        for store in stores.values():
            if store.stats()["drive_read_bytes"] > 0:
                report.skip("hot attention", "pages were read from the drive: the rows above are not hot")


def hot_sweep(
    settings: Settings,
    report: Report,
    sizes: Sizes,
    shape: Shape,
    stores: dict[torch.dtype, KVStore],
    k: Tensor,
    v: Tensor,
    q: Tensor,
) -> None:
    seconds_by_context: dict[torch.dtype, dict[int, float]] = {dtype: {} for dtype in stores}
    for tokens in sizes.sweep:
        k_part, v_part = k[:, :, :tokens].contiguous(), v[:, :, :tokens].contiguous()
        part_bytes = k_part.nbytes + v_part.nbytes
        calls = {MEMORY: repeated(functools.partial(read_memory, [k_part, v_part]))}
        bytes_read = {}
        for dtype, store in stores.items():
            run = functools.partial(store.attend, 0, q, kv_end=tokens)
            bytes_read[dtype] = counted(run, store.stats)().memory_bytes
            calls[dtype_name(dtype)] = repeated(run)
        samples = interleave(calls, sweep_rounds(settings))
        read_gbs = rates(samples[MEMORY], part_bytes / 1e9)
        for dtype in stores:
            ours = samples[dtype_name(dtype)]
            gbs = rates(ours, bytes_read[dtype] / 1e9)
            seconds_by_context[dtype][tokens] = median(times(ours))
            tokens_per_s = tokens / median(times(ours))
            point = Point("hot", dtype_name(dtype), tokens, tokens_per_s, median(gbs), {MEMORY: median(read_gbs)})
            note = f"{tokens_per_s / 1e6:.1f} Mtok/s, {median(times(ours)) * 1e6:.0f} us a call"
            name = f"hot attention, {dtype_name(dtype)}, {tokens_text(tokens)} tokens (sweep)"
            others = [beside(MEMORY, gbs, read_gbs, "GB/s")]
            report.add(Row(name, median(gbs), "GB/s", others, note, points=[point]))
    for dtype, store in stores.items():
        cost_rows(settings, report, dtype, store, q, seconds_by_context[dtype])


def cost_rows(
    settings: Settings, report: Report, dtype: torch.dtype, store: KVStore, q: Tensor, measured: dict[int, float]
) -> None:
    """The straight line through the sweep, and what a call costs that has next to nothing to do."""
    one_token_us = median(
        times(interleave({"": repeated(functools.partial(store.attend, 0, q, kv_end=1))}, max(settings.rounds, 5))[""])
    )
    one_token_us *= 1e6
    fixed_s, per_token_s, worst = fit_line(measured)
    # Small contexts fit into caches, so the line may cross zero below it; a call over one token cannot.
    fixed_us = max(one_token_us, fixed_s * 1e6)
    note = (
        f"larger of a call over one token ({one_token_us:.1f} us) and the line's start ({fixed_s * 1e6:.1f} us); "
        f"line: {per_token_s * 1e9:.1f} ns a token, {tokens_text(min(measured))} to {tokens_text(max(measured))}, "
        f"furthest point {worst:.0%} off it"
    )
    bar = FIXED_US_BAR if dtype == settings.base and max(measured) >= BAR_CONTEXT else None
    name = f"fixed cost per attend, {dtype_name(dtype)}"
    if bar is None:
        report.add(Row(name, fixed_us, "us", note=note))
    else:
        report.add(Row(name, fixed_us, "us", note=note, bar=f"<= {bar:g}", met=fixed_us <= bar))


def fit_line(measured: dict[int, float]) -> tuple[float, float, float]:
    """(seconds at 0 tokens, seconds a token, largest relative distance), by least squares of relative errors."""
    if len(measured) < 2:
        ((tokens, cost_s),) = measured.items()
        return 0.0, cost_s / tokens, 0.0
    x = torch.tensor(list(measured), dtype=torch.float64)
    y = torch.tensor(list(measured.values()), dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], 1) / y[:, None]
    fixed_s, per_token_s = torch.linalg.lstsq(design, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    worst = ((fixed_s + per_token_s * x) / y - 1).abs().max().item()
    return fixed_s, per_token_s, worst


def sweep_rounds(settings: Settings) -> int:
    return max(2, settings.rounds // 3)


# ---- a chunk of a prompt ---------------------------------------------------------------------------------------


def chunk_rows(settings: Settings, report: Report, sizes: Sizes, shape: Shape) -> None:
    """q_len new tokens, causal, after past ones that are resident; torch computes the same on dense tensors."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    base, kv_len = settings.base, sizes.past + sizes.q_len
    group = shape.heads // shape.kv_heads
    k, v = random_kv(kv_len, base, shape)
    q = shape.q(base, sizes.q_len)
    mask = torch.ones(sizes.q_len, kv_len, dtype=torch.bool).tril(sizes.past)[None, None]
    module = SimpleNamespace(num_key_value_groups=group, is_causal=True, training=False)
    folded_mask = mask.repeat(1, 1, group, 1)
    folded_shape = (1, shape.kv_heads, group * sizes.q_len, shape.head_dim)
    in_model = "torch SDPA as a transformers model calls it"
    torch_calls = {
        in_model: lambda: sdpa_attention_forward(module, q, k, v, mask)[0].transpose(1, 2),
        "torch SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        "torch SDPA, group folded": lambda: F.scaled_dot_product_attention(
            q.reshape(folded_shape), k, v, folded_mask
        ).view(q.shape),
    }
    with ExitStack() as stack:
        stores = open_filled(settings, report, k, v, stack, "hot")
        calls = {name: repeated(run) for name, run in torch_calls.items()}
        for dtype, store in stores.items():
            calls[dtype_name(dtype)] = repeated(functools.partial(store.attend, 0, q, causal=True))
        if base in stores:
            expected, ours = torch_calls[in_model](), stores[base].attend(0, q, causal=True)[0]
            difference = (expected.float() - ours.float()).abs().max().item()
            assert difference < 0.02, f"a chunk's attention differs from torch's by {difference}"
        samples = interleave(calls, sweep_rounds(settings))
    # Multiply-adds of both products, over the keys that causality leaves, twice.
    pairs = sizes.q_len * sizes.past + sizes.q_len * (sizes.q_len + 1) / 2
    gflop = 4 * pairs * shape.heads * shape.head_dim / 1e9
    what = f"chunk of {sizes.q_len} after {tokens_text(sizes.past)}"
    best = min(torch_calls, key=lambda name: median(times(samples[name])))
    for name in torch_calls:
        short = name.removeprefix("torch ").replace("a transformers model calls it", "a model calls it")
        report.add(Row(f"  peer, {what}: {short}", median(rates(samples[name], gflop)), "GFLOP/s"))
    model_rates, best_rates = rates(samples[in_model], gflop), rates(samples[best], gflop)
    for dtype in stores:
        ours = rates(samples[dtype_name(dtype)], gflop)
        bar = 0.8 if dtype == base and sizes.q_len >= 512 and sizes.past >= 32768 else None
        others = [beside(in_model, ours, model_rates, "GFLOP/s", bar=bar)]
        if best != in_model:
            others.append(beside(f"best, {best}", ours, best_rates, "GFLOP/s"))
        report.add(Row(f"{what}, {dtype_name(dtype)}, resident", median(ours), "GFLOP/s", others))


# ---- what a store keeps in memory about pages on the drive -----------------------------------------------------


def metadata_row(settings: Settings, report: Report, sizes: Sizes, shape: Shape) -> None:
    """Growth of page tables and heap over the second half of a cache of which nothing is resident, over its bytes."""
    base = settings.base
    dtypes = [dtype for dtype in settings.stored if dtype in CODES] or [base]
    half = max(sizes.context // 2 // CHUNK, 1) * CHUNK
    for dtype in dict.fromkeys((base, dtypes[-1])):
        name = f"store metadata, {dtype_name(dtype)}, over its KV bytes"
        # The same piece again and again, so that the heap's count is not that of tensors.
        piece = torch.randn(1, shape.kv_heads, CHUNK, shape.head_dim).to(base)
        try:
            with settings.store(dtype, memory_budget=settings.memory_budget, resident=False) as store:
                q = shape.q(base)
                marks = []
                for _ in range(2):
                    for _ in range(half // CHUNK):
                        store.append(0, piece, piece)
                    store.flush()
                    store.attend(0, q)
                    stats = store.stats()
                    marks.append((heap_bytes(), resident_set_bytes(), stats["file_bytes"], stats["metadata_bytes"]))
        except (StoreError, NotImplementedError, RuntimeError) as error:
            report.skip(name, error)
            continue
        heap, resident, kv, tables = (
            None if before is None else after - before for before, after in zip(*marks, strict=True)
        )
        growth = resident if heap is None else tables + heap
        share = max(growth, 0) / max(kv, 1)
        sources = f"page tables, and what malloc gave out; resident set {resident / 2**20:+.2f} MiB"
        how = "resident set" if heap is None else sources
        note = f"{growth / 1024:.0f} KiB for {kv / 2**20:.0f} MiB of pages ({how})"
        bar = {"bar": "<= 0.1", "met": share <= METADATA_BAR} if sizes.context >= BAR_CONTEXT else {}
        report.add(Row(name, 100 * share, "%", note=note, **bar))
