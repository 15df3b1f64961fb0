"""Every feature of a cache, by tokens: a tiny model on the card with a StorageCache and with a DynamicCache."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from gpu.run import Run, TimeUp, one_line
from gpu.table import Row
from torch_csd import StorageCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VERSION_MIN = (5, 20)
NEW_TOKENS = 16
# Prompts tried for one whose tokens do not hang on how attention is rounded: torch's two ways give the same.
SEEDS = range(1, 9)
# A greedy choice between logits nearer than this many units of the model's dtype may fall either way: two exact ways on
# the CPU were 5 apart in float16.
TIE_UNITS = 8

Inputs = dict[str, Tensor]


class Generate:
    """A model's tokens for a feature, from caches that `make` makes."""

    def __init__(self, model: LlamaForCausalLM, make: Callable[[], Cache]) -> None:
        self.model = model
        self.make = make
        self.device = model.device
        self.seed = SEEDS[0]

    def prompt(self, *lengths: int) -> Inputs:
        """Left-padded."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            ids[row, : max(lengths) - length], mask[row, : max(lengths) - length] = 0, 0
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def __call__(self, inputs: Inputs, cache: Cache | None = None, **options: object) -> Tensor:
        own = cache is None
        cache = self.make() if own else cache
        torch.manual_seed(0)
        try:
            arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
            return self.model.generate(**inputs, past_key_values=cache, **arguments)
        finally:
            if own and isinstance(cache, StorageCache):
                cache.close()


def greedy(generate: Generate) -> Tensor:
    return generate(generate.prompt(700))


def padded(generate: Generate) -> Tensor:
    return generate(generate.prompt(700, 390))


def beams(generate: Generate) -> Tensor:
    return generate(generate.prompt(400, 330), num_beams=3)


def sampling(generate: Generate) -> Tensor:
    return generate(generate.prompt(400), do_sample=True, top_k=20)


def chunks(generate: Generate) -> Tensor:
    return generate(generate.prompt(700), prefill_chunk_size=300)


def lookup(generate: Generate) -> Tensor:
    inputs = {name: ids.repeat(1, 60) for name, ids in generate.prompt(9).items()}
    return generate(inputs, prompt_lookup_num_tokens=4)


def assisted(generate: Generate) -> Tensor:
    assistant = copy.deepcopy(generate.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():  # near enough for some guesses to be right
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.05 * parameter.float().std().to(parameter) * noise)
    return generate(generate.prompt(400), assistant_model=assistant)


def _closing(cache: Cache) -> None:
    if isinstance(cache, StorageCache):
        cache.close()


def crop(generate: Generate) -> Tensor:
    cache = generate.make()
    try:
        first = generate(generate.prompt(500), cache)
        cache.crop(-NEW_TOKENS - 100)
        ids = torch.cat([first[:, : cache.get_seq_length()], first[:, :20]], dim=1)
        return generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)
    finally:
        _closing(cache)


def goes_on(generate: Generate) -> Tensor:
    cache = generate.make()
    try:
        first = generate(generate.prompt(500), cache)
        ids = torch.cat([first, first[:, :30]], dim=1)
        return generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)
    finally:
        _closing(cache)


def fork(generate: Generate) -> Tensor:
    cache = generate.make()
    try:
        first = generate(generate.prompt(500), cache)
        found = []
        for begin in (0, 40):
            other = copy.deepcopy(cache)
            try:
                ids = torch.cat([first, first[:, begin : begin + 20]], dim=1)
                found.append(generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, other))
            finally:
                _closing(other)
        return torch.cat(found)
    finally:
        _closing(cache)


def other_stream(generate: Generate) -> Tensor:
    if generate.device.type != "cuda":
        return greedy(generate)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tokens = greedy(generate)
    torch.cuda.current_stream().wait_stream(stream)
    return tokens


FEATURES: dict[str, Callable[[Generate], Tensor]] = {
    "greedy": greedy,
    "left-padded batch": padded,
    "beams": beams,
    "sampling": sampling,
    "chunks": chunks,
    "prompt lookup": lookup,
    "assisted": assisted,
    "crop": crop,
    "goes on": goes_on,
    "fork": fork,
    "another stream": other_stream,
}
EXACT = ("beams", "sampling")  # ties cannot be told from errors there


def make_model(dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()
    model.set_attn_implementation("csd")
    return model


def measure(
    run: Run,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    features: tuple[str, ...] = tuple(FEATURES),
    plans: tuple[dict, ...] | None = None,
) -> None:
    plans = plans or ({"executor": "gpu", "resident": False}, {"executor": "auto", "gpu_budget": "1MiB"})
    for dtype in dtypes:
        model = make_model(dtype, run.device.torch_device)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        peers = [Generate(each, lambda: DynamicCache(config=model.config)) for each in (model, eager)]  # noqa: B023
        expected: dict[str, tuple[int, Tensor]] = {}
        for plan in plans:
            feature_row(run, model, peers, expected, dtype, features, plan)


def decisive(run: Run, feature: Callable[[Generate], Tensor], peers: list[Generate]) -> tuple[int, Tensor]:
    """A prompt's seed, and its tokens with a DynamicCache: the first of which both peers say the same, or the last."""
    for seed in SEEDS:
        run.deadline.check()
        found = []
        for peer in peers:
            peer.seed = seed
            found.append(feature(peer))
        if torch.equal(*found):
            break
    return seed, found[0]


def feature_row(
    run: Run,
    model: LlamaForCausalLM,
    peers: list[Generate],
    expected: dict[str, tuple[int, Tensor]],
    dtype: torch.dtype,
    features: tuple[str, ...],
    plan: dict,
) -> None:
    options = {"memory_budget": "64MiB", "gpu_staging": "32MiB"} | run.settings | plan
    ours = Generate(model, lambda: StorageCache(model.config, run.directory, **options))
    equal, tied, told = 0, 0, []
    for name in features:
        run.deadline.check()
        try:
            if name not in expected:
                expected[name] = decisive(run, FEATURES[name], peers)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            told.append(f"{name}: not even with a DynamicCache ({one_line(error)})")
            continue
        ours.seed, wanted = expected[name]
        try:
            tokens = FEATURES[name](ours)
        except TimeUp:
            raise
        except Exception as error:  # whatever it is, it is this feature's result
            told.append(f"{name}: {one_line(error)}")
            continue
        if torch.equal(tokens, wanted):
            equal += 1
        elif name not in EXACT and is_tie(model, tokens, wanted):
            tied += 1
            told.append(f"{name}: other tokens from a tie on")
        else:
            told.append(f"{name}: other tokens")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if told and version < VERSION_MIN:
        told.append(f"transformers {transformers.__version__} is older than the library's minimum of 5.20")
    how = ", ".join(f"{key}={value}" for key, value in plan.items())
    run.add(
        Row(
            f"same tokens, {str(dtype).removeprefix('torch.')}, {how}",
            equal + tied,
            "features",
            beside="all features with a DynamicCache",
            beside_value=len(features),
            beside_unit="features",
            ratio=(equal + tied) / len(features),
            bar=1.0,
            sized=False,
            reason="; ".join(told),
        )
    )


@torch.inference_mode()
def is_tie(model: LlamaForCausalLM, tokens: Tensor, expected: Tensor) -> bool:
    """Whether in each row the first tokens that differ are as likely as each other, by what rounding allows."""
    if tokens.shape != expected.shape:
        return False
    unit = torch.finfo(model.dtype).eps
    for ours, theirs in zip(tokens, expected, strict=True):
        differs = (ours != theirs).nonzero()
        if len(differs) == 0:
            continue
        at = int(differs[0])
        ids = theirs[:at][None]
        keep = (ids != 0).long()
        positions = (keep.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=keep, position_ids=positions).logits[0, -1].float()
        gap = (logits[ours[at]] - logits[theirs[at]]).abs()
        if gap > TIE_UNITS * unit * logits.abs().max():
            return False
    return True
