"""A whole model's decoding: beside transformers' caches in memory, from the drive, and bound by the drive."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import Cache, LlamaForCausalLM, StaticCache

from torch_csd.bench.models import LAYERS, Step, dynamic_cache, fill, small_llama, storage_cache, token_bytes
from torch_csd.bench.peers import quantized_caches
from torch_csd.bench.report import Beside, Point, Report, Row, beside, median_ratio
from torch_csd.bench.roofs import MEMORY, DriveRoof, drive_roof_name, read_memory
from torch_csd.bench.settings import Settings, dtype_name, tokens_text
from torch_csd.bench.timing import Sample, counted, interleave, median, rates, repeated, seconds, times
from torch_csd.errors import StoreError
from torch_csd.hf import StorageCache

SHORT = 128  # tokens of context where only fixed costs are left
MOST_STEPS = 4  # in a row, so that a sample is not too short
SHORT_STEPS = 16  # timed together there
BAR_CONTEXT = 32768  # what the bars are set for
IO_STEPS = 3  # steps in a row between two measurements of the drive
NO_MASK, FOLDED, STATIC = "DynamicCache, no mask", "DynamicCache, padding mask", "StaticCache"
COLD_BARS = {  # over a DynamicCache in memory
    torch.int4: {NO_MASK: 4.0, FOLDED: 1.0},
    None: {NO_MASK: 1.8},  # the base type
}


@dataclass(frozen=True)
class Sizes:
    context: int
    sweep: list[int]
    long_context: int  # tokens of the row that the drive bounds


@dataclass(frozen=True)
class Models:
    """The same weights twice: with torch's attention for the peers, and with ours."""

    theirs: LlamaForCausalLM
    ours: LlamaForCausalLM

    @staticmethod
    def make(dtype: torch.dtype) -> Models:
        return Models(small_llama(dtype, "sdpa"), small_llama(dtype, "csd"))


def long_context(settings: Settings) -> int:
    """Tokens whose K and V are 16 budgets (at least 10 are wanted), in whole thousands of 1024."""
    return -(-16 * settings.budget_bytes // token_bytes(settings.base) // 4096) * 4096


def run(settings: Settings, report: Report, sizes: Sizes) -> None:
    """Raises ValueError if there is no room for the sizes."""
    cache_bytes = sizes.context * token_bytes(torch.float32)
    long_bytes = sizes.long_context * token_bytes(settings.base)
    settings.require(drive_bytes=4 * cache_bytes + 2 * long_bytes, memory_bytes=6 * cache_bytes + 2**30)
    with torch.inference_mode():
        models = Models.make(settings.base)
        resident_rows(settings, report, sizes.context, models)
        if settings.base != torch.float32:
            float32_row(settings, report, sizes.context)
        quantized_rows(settings, report, sizes.context, models)
        short_row(settings, report, models)
        cold_rows(settings, report, sizes.context, models)
        drive_bound_row(settings, report, "drive-bound", models.ours, sizes.long_context, settings.budget_bytes)
        busy_row(settings, report, sizes.long_context)
        sweep_rows(settings, report, sizes.sweep, models)


def room(tokens: int, dtype: torch.dtype) -> int:
    """A budget that holds all of a cache: an eighth goes to partial results, some to reads."""
    return math.ceil(1.25 * tokens * token_bytes(dtype)) + 2**26


def open_cache(
    settings: Settings,
    report: Report,
    name: str,
    models: Models,
    kv_dtype: torch.dtype | None,
    tokens: int,
    stack: ExitStack,
    *,
    resident: bool,
) -> StorageCache | None:
    """A filled cache; or None, and a skipped row that says why."""
    budget = room(tokens, models.ours.dtype) if resident else settings.memory_budget
    try:
        cache = stack.enter_context(
            storage_cache(settings, models.ours, kv_dtype, memory_budget=budget, resident=resident)
        )
        fill(cache, tokens, models.ours.dtype)
        assert not resident or cache.stats()["pages_on_drive"] == 0, "a row that says resident reads from the drive"
    except (StoreError, NotImplementedError, RuntimeError) as error:
        report.skip(name, error)
        return None
    return cache


def times_faster(name: str, ours: list[Sample], theirs: list[Sample], bar: float | None = None) -> Beside:
    ours_ms, theirs_ms = ([1e3 * s for s in times(samples)] for samples in (ours, theirs))
    return beside(name, ours_ms, theirs_ms, "ms", bar=bar, lower_is_better=True)


def ms(samples: list[Sample]) -> float:
    return 1e3 * median(times(samples))


def one(step: Callable[[], object]) -> Callable[[], Sample]:
    """A sampler of single steps, or of up to MOST_STEPS in a row where they are short; warmed up."""
    step()
    count = max(1, min(MOST_STEPS, round(0.05 / seconds(step))))

    def sample() -> Sample:
        start_s = time.perf_counter()
        for _ in range(count):
            step()
        return Sample((time.perf_counter() - start_s) / count)

    return sample


# ---- all resident ----------------------------------------------------------------------------------------------


def resident_rows(settings: Settings, report: Report, tokens: int, models: Models) -> None:
    base = settings.base
    name = f"decode, {dtype_name(base)}, resident"
    with ExitStack() as stack:
        cache = open_cache(settings, report, name, models, None, tokens, stack, resident=True)
        if cache is None:
            return
        theirs = fill(dynamic_cache(models.theirs), tokens, base)
        difference = check_same(Step(models.ours, cache)(), Step(models.theirs, theirs)())
        steps = MOST_STEPS * settings.rounds + 8
        static = fill(StaticCache(models.theirs.config, max_cache_len=tokens + steps), tokens, base)
        # Ours after each peer, so that each ratio is of neighbours.
        samples = interleave(
            {
                NO_MASK: one(Step(models.theirs, theirs)),
                "ours": one(Step(models.ours, cache)),
                FOLDED: one(Step(models.theirs, theirs, padded=True)),
                "ours, padding mask": one(Step(models.ours, cache, padded=True)),
                STATIC: one(Step(models.theirs, static)),
            },
            settings.rounds,
        )
        del theirs, static
        memory_ms = 1e3 * median(times(interleave({"": memory_sampler(tokens, base)}, settings.rounds)[""]))
    bars = {NO_MASK: 8.0, FOLDED: 2.5, STATIC: 1.5} if base != torch.float32 else {NO_MASK: 4.0}
    bars = bars if tokens >= BAR_CONTEXT else {}
    ours, ours_padded = samples["ours"], samples["ours, padding mask"]
    others = [
        times_faster(NO_MASK, ours, samples[NO_MASK], bars.get(NO_MASK)),
        times_faster(STATIC, ours, samples[STATIC], bars.get(STATIC)),
        Beside(f"{MEMORY}: time over its time", memory_ms, "ms", ms(ours) / memory_ms),
    ]
    note = f"logits differ from DynamicCache's by {difference:.3g} at most"
    report.add(Row(f"{name}, {tokens_text(tokens)}", ms(ours), "ms/tok", others, note))
    others = [times_faster(FOLDED, ours_padded, samples[FOLDED], bars.get(FOLDED))]
    report.add(Row(f"{name}, {tokens_text(tokens)}, padding mask", ms(ours_padded), "ms/tok", others))


def memory_sampler(tokens: int, dtype: torch.dtype) -> Callable[[], Sample]:
    """Reads as many bytes as all layers' K and V have."""
    kv = torch.zeros(tokens * token_bytes(dtype), dtype=torch.uint8)
    return repeated(lambda: read_memory([kv]))


def check_same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of logits; raises AssertionError if that is no rounding."""
    difference = (ours.float() - theirs.float()).abs().max().item()
    limit = 0.05 * theirs.float().abs().max().item()
    assert difference <= limit, f"logits differ by {difference}, more than rounding explains ({limit:.3g})"
    return difference


def float32_row(settings: Settings, report: Report, tokens: int) -> None:
    name = f"decode, float32, resident, {tokens_text(tokens)}"
    models = Models.make(torch.float32)
    with ExitStack() as stack:
        cache = open_cache(settings, report, name, models, None, tokens, stack, resident=True)
        if cache is None:
            return
        theirs = fill(dynamic_cache(models.theirs), tokens, torch.float32)
        difference = check_same(Step(models.ours, cache)(), Step(models.theirs, theirs)())
        calls = {NO_MASK: one(Step(models.theirs, theirs)), "ours": one(Step(models.ours, cache))}
        samples = interleave(calls, settings.rounds)
    others = [times_faster(NO_MASK, samples["ours"], samples[NO_MASK], 4.0 if tokens >= BAR_CONTEXT else None)]
    note = f"logits differ from DynamicCache's by {difference:.3g} at most"
    report.add(Row(name, ms(samples["ours"]), "ms/tok", others, note))


def quantized_rows(settings: Settings, report: Report, tokens: int, models: Models) -> None:
    """Ours in each type but the base, resident, beside transformers' QuantizedCache where it can be had."""
    peers: dict[str, Cache] = {}
    for name, maker in quantized_caches().items():
        if isinstance(maker, str):
            report.skip(f"  peer: {name}", maker)
            continue
        try:
            cache = fill(maker(models.theirs.config), tokens, settings.base)
            Step(models.theirs, cache)()
        except Exception as error:
            report.skip(f"  peer: {name}", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        peers[name] = cache
    with ExitStack() as stack:
        calls = {name: one(Step(models.theirs, cache)) for name, cache in peers.items()}
        calls[NO_MASK] = one(Step(models.theirs, fill(dynamic_cache(models.theirs), tokens, settings.base)))
        ours = []
        for dtype in settings.stored:
            name = f"decode, {dtype_name(dtype)}, resident, {tokens_text(tokens)}"
            cache = open_cache(settings, report, name, models, dtype, tokens, stack, resident=True)
            if cache is not None:
                ours.append(dtype)
                calls[dtype_name(dtype)] = one(Step(models.ours, cache))
        samples = interleave(calls, max(2, settings.rounds // 2))
    for name in peers:
        others = [times_faster(NO_MASK, samples[name], samples[NO_MASK])]
        report.add(Row(f"  peer: {name}, {tokens_text(tokens)}", ms(samples[name]), "ms/tok", others))
    for dtype in ours:
        if dtype == settings.base:
            continue
        mine = samples[dtype_name(dtype)]
        others = [times_faster(name, mine, samples[name]) for name in (*peers, NO_MASK)]
        if settings.base in ours:
            others.append(times_faster(f"ours, {dtype_name(settings.base)}", mine, samples[dtype_name(settings.base)]))
        report.add(Row(f"decode, {dtype_name(dtype)}, resident, {tokens_text(tokens)}", ms(mine), "ms/tok", others))


def short_row(settings: Settings, report: Report, models: Models) -> None:
    name = f"decode, {dtype_name(settings.base)}, {SHORT} tokens"
    with ExitStack() as stack:
        cache = open_cache(settings, report, name, models, None, SHORT, stack, resident=True)
        if cache is None:
            return
        theirs = fill(dynamic_cache(models.theirs), SHORT, settings.base)

        def sampler(model: LlamaForCausalLM, cache: Cache) -> Callable[[], Sample]:
            step = Step(model, cache)

            def sample() -> Sample:
                elapsed_s = seconds(lambda: step.again(SHORT_STEPS)) / SHORT_STEPS
                cache.crop(-SHORT_STEPS)
                return Sample(elapsed_s)

            sample()
            return sample

        calls = {NO_MASK: sampler(models.theirs, theirs), "ours": sampler(models.ours, cache)}
        samples = interleave(calls, max(settings.rounds, 5))
    others = [times_faster(NO_MASK, samples["ours"], samples[NO_MASK], None if settings.quick else 1.0)]
    note = f"{SHORT_STEPS} steps a sample, then cropped"
    report.add(Row(name, ms(samples["ours"]), "ms/tok", others, note))


# ---- nothing resident ------------------------------------------------------------------------------------------


def cold_rows(settings: Settings, report: Report, tokens: int, models: Models) -> None:
    """Everything from the drive, beside a DynamicCache that has everything in memory."""
    where = f"cold, {tokens_text(tokens)}"
    with ExitStack() as stack:
        roof = open_roof(settings, report, tokens, f"decode, {where}", stack)
        if roof is None:
            return
        theirs = fill(dynamic_cache(models.theirs), tokens, settings.base)
        calls = {
            NO_MASK: one(Step(models.theirs, theirs)),
            FOLDED: one(Step(models.theirs, theirs, padded=True)),
        }
        caches = {}
        for dtype in settings.stored:
            name = f"decode, {dtype_name(dtype)}, {where}"
            cache = open_cache(settings, report, name, models, dtype, tokens, stack, resident=False)
            if cache is not None:
                step = Step(models.ours, cache)
                step()
                caches[dtype] = cache
                calls[dtype_name(dtype)] = counted(step, cache.stats, IO_STEPS)
        samples = interleave(calls, settings.rounds, roof, without_roof=(NO_MASK, FOLDED))
        del theirs
    for dtype in caches:
        mine = samples[dtype_name(dtype)]
        bars = COLD_BARS.get(None if dtype == settings.base else dtype, {}) if tokens >= BAR_CONTEXT else {}
        others = [times_faster(f"{peer}, in memory", mine, samples[peer], bars.get(peer)) for peer in (NO_MASK, FOLDED)]
        others += over_drive_time(mine)
        note = f"{median([s.drive_bytes for s in mine]) / 2**20:.0f} MiB a token, {drive_note(mine)}"
        report.add(Row(f"decode, {dtype_name(dtype)}, {where}", ms(mine), "ms/tok", others, note))


def open_roof(settings: Settings, report: Report, tokens: int, name: str, stack: ExitStack) -> DriveRoof | None:
    file_bytes = min(max(tokens * token_bytes(settings.base), 2**27), 2**30)
    try:
        return stack.enter_context(DriveRoof(settings.directory, file_bytes))
    except OSError as error:
        report.skip(name, f"{settings.directory}: no O_DIRECT here ({error.strerror or error})")
        return None


def over_drive_time(samples: list[Sample], bar: float | None = None) -> list[Beside]:
    """Step time over the time in which the drive delivers the bytes that the step read: 1 is never idle.

    By each roof there is; the bar is on the drive's.
    """
    found = []
    for name in samples[0].roofs:
        drive_s = [sample.drive_bytes / (sample.roofs[name] * 1e9) for sample in samples]
        ratio = median_ratio(times(samples), drive_s)
        own_bar = bar if name == drive_roof_name(samples[0].roofs) else None
        found.append(Beside(f"time to read it at {name}", 1e3 * median(drive_s), "ms", ratio, own_bar, at_most=True))
    return found


def drive_note(samples: list[Sample]) -> str:
    """The rate, and how it stands to every roof there is."""
    gbs = [sample.drive_gbs for sample in samples]
    parts = [f"{median(gbs):.2f} GB/s"]
    for name in samples[0].roofs:
        rate = [sample.roofs[name] for sample in samples]
        parts.append(f"{median_ratio(gbs, rate):.2f} of {name.split(',')[0]} ({median(rate):.2f})")
    return ", ".join(parts)


def busy_row(settings: Settings, report: Report, long_tokens: int) -> None:
    """The same for a model that computes for up to half of the time in which the drive reads."""
    model = small_llama(settings.base, "csd", times_wider=2 if settings.quick else 5)
    tokens, budget = long_tokens * 3 // 8, settings.budget_bytes // 2
    drive_bound_row(settings, report, "drive-bound, a busy model", model, tokens, budget)


def drive_bound_row(
    settings: Settings, report: Report, what: str, model: LlamaForCausalLM, tokens: int, budget: int
) -> None:
    base = settings.base
    kv_bytes = tokens * token_bytes(base)
    name = f"decode, {dtype_name(base)}, {what}, {tokens_text(tokens)}"
    with ExitStack() as stack:
        roof = open_roof(settings, report, tokens, name, stack)
        if roof is None:
            return
        try:
            cache, small = (
                stack.enter_context(storage_cache(settings, model, None, memory_budget=size, resident=True))
                for size in (budget, room(SHORT, base))
            )
            fill(cache, tokens, base)
            fill(small, SHORT, base)
        except (StoreError, RuntimeError) as error:
            report.skip(name, error)
            return
        compute = one(functools.partial(Step(model, small).again, 4))
        step = Step(model, cache)
        for _ in range(IO_STEPS):  # the first ones divide the memory anew
            step()
        mine = interleave({"": counted(step, cache.stats, IO_STEPS)}, settings.rounds, roof)[""]
        compute_s = median(times(interleave({"": compute}, settings.rounds)[""])) / 4
    share = 1e3 * compute_s / over_drive_time(mine)[0].value
    bound = kv_bytes >= 10 * budget and share <= 0.5
    drive = over_drive_time(mine, 1.10 if bound and not settings.quick else None)
    note = (
        f"KV {kv_bytes / budget:.0f} x the budget; {drive_note(mine)}; the model alone takes "
        f"{1e3 * compute_s:.1f} ms, {share:.0%} of the drive's time"
    )
    if not bound:
        note += "; no bar: it is set for KV of 10 budgets and a model that takes half of the drive's time at most"
    report.add(Row(name, ms(mine), "ms/tok", drive, note))


# ---- against the context ---------------------------------------------------------------------------------------


def sweep_rows(settings: Settings, report: Report, contexts: list[int], models: Models) -> None:
    rounds = max(2, settings.rounds // 3)
    for tokens in contexts:
        with ExitStack() as stack:
            roof = open_roof(settings, report, tokens, f"decode, {tokens_text(tokens)} (sweep)", stack)
            calls: dict[str, Callable[[], Sample]] = {MEMORY: memory_sampler(tokens, settings.base)}
            theirs = fill(dynamic_cache(models.theirs), tokens, settings.base)
            calls[NO_MASK] = one(Step(models.theirs, theirs))
            calls[FOLDED] = one(Step(models.theirs, theirs, padded=True))
            for resident in (True, False):
                if not resident and roof is None:
                    continue
                for dtype in settings.stored:
                    place = "hot" if resident else "cold"
                    name = f"decode, {dtype_name(dtype)}, {place}, {tokens_text(tokens)} (sweep)"
                    cache = open_cache(settings, report, name, models, dtype, tokens, stack, resident=resident)
                    if cache is not None:
                        step = Step(models.ours, cache)
                        step()
                        calls[f"{place}/{dtype_name(dtype)}"] = counted(step, cache.stats, IO_STEPS)
            before = roof() if roof else {}
            samples = interleave(calls, rounds)
            after = roof() if roof else {}
            del theirs
        drive = {name: (before[name] + after[name]) / 2 for name in after}
        memory_gbs = median(rates(samples[MEMORY], tokens * token_bytes(settings.base) / 1e9))
        for key, mine in samples.items():
            place, _, dtype = key.partition("/")
            per_s = 1 / median(times(mine))
            if not dtype:
                if key != MEMORY:
                    places = ("hot", "cold") if drive else ("hot",)
                    points = [Point(place, f"{key}, in memory", tokens, per_s) for place in places]
                    report.add(Row(f"  peer: {key}, {tokens_text(tokens)} (sweep)", per_s, "tok/s", points=points))
                continue
            if place == "hot":
                gbs = median([sample.memory_bytes / sample.seconds / 1e9 for sample in mine])
                roofs = {MEMORY: memory_gbs}
            else:
                gbs = median([sample.drive_gbs for sample in mine])
                roofs = drive
            point = Point(place, dtype, tokens, per_s, gbs, roofs)
            others = [Beside(roof_name, roof_gbs, "GB/s", gbs / roof_gbs) for roof_name, roof_gbs in roofs.items()]
            others.append(times_faster(NO_MASK, mine, samples[NO_MASK]))
            name = f"decode, {dtype}, {place}, {tokens_text(tokens)} (sweep)"
            report.add(Row(name, per_s, "tok/s", others, f"{gbs:.2f} GB/s, {LAYERS} layers", points=[point]))
