"""Prompts and steps of a whole model with its cache on the drive, beside the same with a DynamicCache on the card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from gpu.roofs import ReadRoof, WriteRoof
from gpu.run import Run, TimeUp, beside, median, rates
from gpu.table import Row, number
from torch_csd import MemoryBudgetError, StorageCache

PREFILL_BAR = 0.9
AUTO_BAR = 0.95
DYNAMIC = "DynamicCache, on the card"


@dataclass(frozen=True)
class Sizes:
    """2 kv heads a layer: 16 KiB of K and V a token, which a drive can be expected to take while the model computes."""

    hidden: int = 2048
    layers: int = 16
    heads: int = 16
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    prompts: tuple[int, ...] = (32768, 65536, 131072)  # longer ones where the drive does not keep up with shorter ones
    context: int = 32768  # of decoding
    roof_bytes: int = 1 << 30
    staging: str = "256MiB"

    @staticmethod
    def fitting(free_bytes: int, *, quick: bool) -> Sizes:
        sizes = Sizes()
        if quick:
            return replace(sizes, layers=4, prompts=(4096,), context=4096, roof_bytes=128 << 20)
        # Weights, a DynamicCache, and the widest of a layer's own tensors.
        fits = [p for p in sizes.prompts if 2**31 + p * (sizes.token_bytes + 64 * sizes.hidden) < free_bytes]
        prompts = tuple(fits) or (8192,)
        return replace(sizes, prompts=prompts, context=min(prompts[0], sizes.context))

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 43 // 16,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=1024,
            max_position_embeddings=2**20,
        )


@dataclass(frozen=True)
class Models:
    """One set of weights, by torch's attention and by ours."""

    theirs: LlamaForCausalLM
    ours: LlamaForCausalLM

    @staticmethod
    def make(sizes: Sizes, device: torch.device) -> Models:
        torch.manual_seed(0)
        with torch.device(device):
            theirs = LlamaForCausalLM(sizes.config()).to(sizes.dtype).eval()
            ours = LlamaForCausalLM(sizes.config()).to(sizes.dtype).eval()
        ours.load_state_dict(theirs.state_dict(), assign=True)
        theirs.set_attn_implementation("sdpa")
        ours.set_attn_implementation("csd")
        return Models(theirs, ours)


def feed(model: LlamaForCausalLM, cache: Cache, prompt: Tensor, chunk: int | None = None) -> Tensor:
    """The last token's logits."""
    step = chunk or prompt.shape[1]
    for begin in range(0, prompt.shape[1], step):
        logits = model(prompt[:, begin : begin + step], past_key_values=cache, logits_to_keep=1).logits
    return logits


# ---- prompts -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_prefill(run: Run, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes.fitting(run.free_bytes, quick=run.quick)
    models = Models.make(sizes, run.device.torch_device)
    with WriteRoof(run.directory, sizes.roof_bytes) as roof:

        def row(tokens: int, kv_dtype: str | None, chunk: int | None) -> bool | None:
            name = f"prefill {tokens}, {kv_dtype or sizes.dtype}, by {chunk or tokens}"
            return run.attempt(name, lambda: prefill_row(run, sizes, models, roof, tokens, kv_dtype, chunk))

        first = sizes.prompts[0]
        keeps_up = row(first, None, None)
        row(first, "int4", None)  # a quarter of the bytes, so that slower drives keep up as well
        for tokens in sizes.prompts[1:]:
            if keeps_up is not False:  # it does, or this has failed
                break
            keeps_up = row(tokens, None, None)
        row(first, None, max(first // 4, 1))


def prefill_row(
    run: Run, sizes: Sizes, models: Models, roof: WriteRoof, tokens: int, kv_dtype: str | None, chunk: int | None
) -> bool:
    """Whether the drive takes bytes as fast as this prefill makes them."""
    stored = kv_dtype or str(sizes.dtype).removeprefix("torch.")
    name = f"prefill {tokens}{f' by {chunk}' if chunk else ''} to the drive, {stored}"
    prompt = torch.randint(0, 1024, (1, tokens), device=run.device.torch_device)
    options = store_options(run, sizes, kv_dtype=kv_dtype, resident=False)
    drains: list[float] = []
    with StorageCache(models.ours.config, run.directory, **options) as cache:

        def ours() -> None:
            feed(models.ours, cache, prompt, chunk)

        def theirs() -> None:
            feed(models.theirs, DynamicCache(config=models.theirs.config), prompt, chunk)

        # The one cache again and again: a new one would compile its kernels within the time that is measured.
        seconds: dict[str, list[float]] = {"theirs": [], "ours": [], "roof": []}
        for round_number in range(1 + (run.rounds if chunk is None else min(run.rounds, 3))):
            if run.deadline.left_s <= 0:
                if len(seconds["ours"]) < 2:
                    raise TimeUp
                break
            measured = {"theirs": run.wall_timer.seconds(theirs), "ours": run.wall_timer.seconds(ours)}
            drain_s = run.wall_timer.seconds(cache.store.flush)
            stats = cache.stats()
            measured["roof"] = run.wall_timer.seconds(roof.write)
            cache.reset()
            if round_number > 0:  # the first warms up
                drains.append(drain_s)
                for key, each in measured.items():
                    seconds[key].append(each)
    first = written_bytes(stats) / (len(seconds["ours"]) + 1)
    drive = rates(roof.file_bytes / 1e9, seconds["roof"])
    wanted = first / 1e9 / median(seconds["theirs"])
    row = beside(
        name, rates(tokens, seconds["ours"]), "tok/s", DYNAMIC, rates(tokens, seconds["theirs"]),
        PREFILL_BAR if chunk is None else None,
    )  # fmt: skip
    keeps_up = wanted <= median(drive)
    row.reason = (
        f"{number(first / 2**20)} MiB, {first / 1e9 / median(seconds['ours']):.2f} GB/s; the last of it "
        f"{1e3 * median(drains):.0f} ms after the prompt; {roof.name}: {median(drive):.2f} GB/s"
    )
    if not keeps_up and row.bar is not None:
        row.waived = f"the drive does not keep up: prefill alone makes {wanted:.2f} GB/s"
    run.add(row)
    return keeps_up


def written_bytes(stats: dict) -> int:
    return int(stats["drive_written_bytes"])


def store_options(run: Run, sizes: Sizes, **settings: object) -> dict[str, object]:
    options: dict[str, object] = {"memory_budget": "512MiB"} | run.settings | settings
    if run.card_stores:
        options.setdefault("gpu_staging", sizes.staging)
    else:
        for name in ("executor", "gpu_budget"):
            options.pop(name, None)
    return options


# ---- steps -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_decode(run: Run, sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes.fitting(run.free_bytes, quick=run.quick)
    models = Models.make(sizes, run.device.torch_device)
    kv_bytes = sizes.context * sizes.token_bytes
    prompt = torch.randint(0, 1024, (1, sizes.context), device=run.device.torch_device)
    with ReadRoof(run.directory, min(kv_bytes, sizes.roof_bytes)) as roof:
        for resident in (False, True):
            for budget in (0, kv_bytes // 2):
                options = {"resident": resident, "budget": budget}
                measure = functools.partial(decode_rows, run, sizes, models, prompt, roof, **options)
                run.attempt(f"decode, resident={resident}, gpu_budget={budget}", measure)


def decode_rows(
    run: Run, sizes: Sizes, models: Models, prompt: Tensor, roof: ReadRoof, *, resident: bool, budget: int
) -> None:
    kv_bytes = sizes.context * sizes.token_bytes
    where = "pages in host memory" if resident else "cold"
    what = f"decode at {sizes.context}, {where}" + (", half on the card" if budget else "")
    room = int(1.3 * kv_bytes) + (256 << 20) if resident else 256 << 20
    token = torch.tensor([[7]], device=run.device.torch_device)
    steps = 4 if resident else 1  # a sample: cold ones are long
    with ExitStack() as stack:
        caches: dict[str, StorageCache] = {}
        works: dict[str, Callable[[], object]] = {} if resident else {"roof": roof.read}
        for executor in ("near", "gpu", "auto"):
            run.deadline.check()
            options = store_options(
                run, sizes, resident=resident, memory_budget=room, executor=executor, gpu_budget=budget
            )
            try:
                cache = stack.enter_context(StorageCache(models.ours.config, run.directory, **options))
                feed(models.ours, cache, prompt)
                cache.store.flush()
                # Compiles, fills the card's share; "auto" also finds out.
                for _ in range(8 if executor == "auto" else 3):
                    models.ours(token, past_key_values=cache)
            except (RuntimeError, MemoryBudgetError) as error:
                run.fail(f"{what}: {executor}", error)
                continue
            caches[executor] = cache
            works[executor] = functools.partial(again, steps, models.ours, cache, token)
        if not caches:
            return
        if not budget:
            theirs = DynamicCache(config=models.theirs.config)
            feed(models.theirs, theirs, prompt)
            models.theirs(token, past_key_values=theirs)
            works[DYNAMIC] = functools.partial(again, steps, models.theirs, theirs, token)
        before = {name: (cache.stats(), cache.get_seq_length()) for name, cache in caches.items()}
        seconds = run.interleaved(run.wall_timer, works, warm=False)
        paths = {}
        for name, cache in caches.items():
            taken = cache.get_seq_length() - before[name][1]
            paths[name] = by_path(before[name][0], cache.stats(), taken)
    per_s = {name: rates(steps, each) for name, each in seconds.items()}
    fixed = [name for name in ("near", "gpu") if name in caches]
    if DYNAMIC in per_s:
        run.add(Row(f"{what}: {DYNAMIC}", median(per_s[DYNAMIC]), "tok/s"))
    for name in caches:
        if name == "auto" and fixed:
            best = max(fixed, key=lambda other: median(per_s[other]))
            row = beside(f"{what}: auto", per_s[name], "tok/s", f"the better one, {best},", per_s[best], AUTO_BAR)
        elif "roof" in seconds and not budget:
            roof_s = [kv_bytes / (roof.file_bytes / each) for each in seconds["roof"]]
            row = beside(
                f"{what}: {name}", per_s[name], "tok/s", f"its bytes by {roof.name},", [1 / each for each in roof_s]
            )
        elif name != "near" and "near" in caches:
            row = beside(f"{what}: {name}", per_s[name], "tok/s", "near", per_s["near"])
        else:
            row = Row(f"{what}: {name}", median(per_s[name]), "tok/s")
            if DYNAMIC in per_s:
                row = beside(f"{what}: {name}", per_s[name], "tok/s", DYNAMIC, per_s[DYNAMIC])
        row.reason = paths[name]
        run.add(row)


def again(steps: int, model: LlamaForCausalLM, cache: Cache, token: Tensor) -> None:
    for _ in range(steps):
        model(token, past_key_values=cache)


PATHS = {
    "drive to card": lambda s: s.get("gpu_drive_read_bytes", 0),
    "host to card": lambda s: s.get("gpu_host_read_bytes", 0),
    # Of both kinds a store counts the card's, too.
    "drive to processor": lambda s: s["drive_read_bytes"] - s.get("gpu_drive_read_bytes", 0),
    "host to processor": lambda s: s["resident_read_bytes"] - s.get("gpu_host_read_bytes", 0),
}


def by_path(before: dict, after: dict, steps: int) -> str:
    """MiB a step by each way that was gone, and what stays on the card."""
    told = []
    for name, of in PATHS.items():
        mib = (of(after) - of(before)) / steps / 2**20
        if mib > 0:
            told.append(f"{name} {number(mib)}")
    near, gpu = (after.get(key, 0) - before.get(key, 0) for key in ("near_attends", "gpu_attends"))
    text = f"MiB/tok: {', '.join(told) or 'none'}; {near} near, {gpu} gpu"
    if after.get("gpu_resident_bytes"):
        text += f"; {number(after['gpu_resident_bytes'] / 2**20)} MiB stay on the card"
    return text
