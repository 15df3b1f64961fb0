"""A prompt through a model into a cache that is larger than its budget, beside the same into a DynamicCache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import Cache, LlamaForCausalLM

from torch_csd.bench.models import dynamic_cache, small_llama, storage_cache, token_bytes
from torch_csd.bench.report import Point, Report, Row, beside
from torch_csd.bench.settings import CODES, Settings, dtype_name, tokens_text
from torch_csd.bench.timing import Sample, interleave, median, rates, seconds
from torch_csd.config import parse_bytes
from torch_csd.errors import StoreError

BAR = 0.95
DYNAMIC = "DynamicCache"


def run(settings: Settings, report: Report, tokens: int, chunk: int, memory_budget: str | None) -> None:
    """Raises ValueError if there is no room for the sizes."""
    settings.require(drive_bytes=4 * tokens * token_bytes(settings.base), memory_bytes=2**30)
    theirs = small_llama(settings.base, "sdpa")
    ours = small_llama(settings.base, "csd")
    with torch.inference_mode():
        for prompt in dict.fromkeys((max(tokens // 4, 1), tokens)):
            rows(settings, report, prompt, None, theirs, ours, memory_budget)
        if chunk < tokens:
            rows(settings, report, tokens, chunk, theirs, ours, memory_budget)


def rows(
    settings: Settings,
    report: Report,
    tokens: int,
    chunk: int | None,
    theirs: LlamaForCausalLM,
    ours: LlamaForCausalLM,
    memory_budget: str | None,
) -> None:
    what = f"prefill {tokens_text(tokens)}" + (f" by {chunk}" if chunk else "")
    prompt = torch.randint(0, 1024, (1, tokens))
    written: dict[str, dict] = {}

    def sampler(model: LlamaForCausalLM, name: str, make: Callable[[], Cache]) -> Callable[[], Sample]:
        def sample() -> Sample:
            cache = make()
            try:
                elapsed_s = seconds(lambda: feed(model, cache, prompt, chunk))
                if name != DYNAMIC:
                    drain_s = seconds(cache.store.flush)
                    written[name] = cache.stats() | {"drain_s": drain_s}
            finally:
                if name != DYNAMIC:
                    cache.close()
            return Sample(elapsed_s)

        sample()  # also finds out now what cannot be stored
        return sample

    calls = {DYNAMIC: sampler(theirs, DYNAMIC, partial(dynamic_cache, theirs))}
    budgets = {}
    for dtype in settings.stored:
        name = dtype_name(dtype)
        # Codes are smaller than one byte an element, so a quarter of the dense bytes may hold all of them.
        share = 16 if dtype in CODES else 4
        budgets[name] = memory_budget or max(tokens * token_bytes(settings.base) // share, 2**21)
        make = partial(storage_cache, settings, ours, dtype, memory_budget=budgets[name], resident=True)
        try:
            calls[name] = sampler(ours, name, make)
        except (StoreError, NotImplementedError, RuntimeError) as error:
            report.skip(f"{what}, {name}", error)
    samples = interleave(calls, settings.rounds)
    base_rates = rates(samples[DYNAMIC], tokens)
    place = "chunked" if chunk else "whole"
    point = Point(place, DYNAMIC, tokens, median(base_rates))
    report.add(Row(f"  peer: {what} into DynamicCache", median(base_rates), "tok/s", points=[point]))
    for name, stats in written.items():
        if name not in samples:
            continue
        mine = rates(samples[name], tokens)
        bar = BAR if name == dtype_name(settings.base) and not chunk and tokens >= 8192 else None
        gbs = stats["drive_written_bytes"] * median(mine) / tokens / 1e9
        note = (
            f"budget {parse_bytes(budgets[name]) / 2**20:.1f} MiB; {stats['drive_written_bytes'] / 2**20:.0f} MiB "
            f"written ({gbs:.2f} GB/s), {1e3 * stats['drain_s']:.0f} ms more until the last of it is on the drive"
        )
        others = [beside(f"{DYNAMIC}, in memory", mine, base_rates, "tok/s", bar=bar)]
        point = Point(place, name, tokens, median(mine))
        report.add(Row(f"{what}, {name}, write-behind", median(mine), "tok/s", others, note, points=[point]))


def feed(model: LlamaForCausalLM, cache: Cache, prompt: torch.Tensor, chunk: int | None) -> None:
    step = chunk or prompt.shape[1]
    for begin in range(0, prompt.shape[1], step):
        model(prompt[:, begin : begin + step], past_key_values=cache, logits_to_keep=1)
