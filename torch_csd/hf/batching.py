"""How many rows are generated together, where each step reads weights from the drive.

A step reads all weights that are not in memory, however many rows it is for; each row adds its own KV, and its share of
the arithmetic. So the time of a token falls with the batch until one of these is as large as the weights (FlexGen,
2303.06865, section 4, has the same trade). Everything here is estimated from what the machine does in a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from torch_csd import ops
from torch_csd.weights.functions import is_on_card
from torch_csd.weights.layout import Codes
from torch_csd.weights.quantised import linear_on_card, quantised_linear
from torch_csd.weights.tensor import FileTensor

ACTIVATION_BYTES = 256 * 2**20  # of one micro-batch's prompts in the widest layer
MICRO_BATCHES_MAX = 8
MICRO_BATCH_BUDGET_MIN = 16 * 2**20  # of the KV store that each has
BATCH_SIZE_MAX = 256
_NEAR_BEST = 0.95  # of the most tokens/s: a larger batch only makes everyone wait
_GEMM_BYTES = 16 * 2**20  # of the weight that arithmetic is timed with: more than a cache holds


@dataclass(frozen=True)
class Workload:
    """What is to be generated, and with how much memory for its KV."""

    prompt_tokens: Sequence[int]  # of each row
    new_tokens: int
    kv_bytes_per_token: int  # of one row, all layers
    kv_budget_bytes: int

    @property
    def row_kv_bytes(self) -> float:
        """Read at a step for a row, half-way through its answer."""
        return self.kv_bytes_per_token * (sum(self.prompt_tokens) / len(self.prompt_tokens) + self.new_tokens / 2)


@dataclass(frozen=True)
class Machine:
    """What a step's time is made of."""

    weight_bytes: int  # from the drive at each step, whatever the batch
    routed_bytes: int  # of experts that are not in memory
    routed_share: float  # of the experts that one row uses
    drive_bytes_per_s: float
    compute_s: dict[int, float]  # arithmetic of a step, by rows: measured for some

    def compute(self, rows: int) -> float:
        """Between measured ones in proportion, beyond them as the last."""
        known = sorted(self.compute_s)
        for low, high in zip(known, known[1:], strict=False):
            if rows <= high:
                share = (rows - low) / (high - low)
                return self.compute_s[low] + max(share, 0.0) * (self.compute_s[high] - self.compute_s[low])
        return self.compute_s[known[-1]] * rows / known[-1]

    def step_s(self, rows: int, work: Workload) -> float:
        """Seconds of a step for so many rows."""
        routed = self.routed_bytes * (1 - (1 - self.routed_share) ** rows)
        kv = max(rows * work.row_kv_bytes - work.kv_budget_bytes, 0)
        return max((self.weight_bytes + routed + kv) / self.drive_bytes_per_s, self.compute(rows))


@dataclass(frozen=True)
class BatchPlan:
    """What was chosen, and what it is expected to take."""

    batch_size: int
    micro_batch_count: int  # that the batch is run in, side by side
    prefill_chunk_size: int | None  # None: prompts whole
    step_s: float
    machine: Machine

    def __str__(self) -> str:
        machine = self.machine
        parts = f" in {self.micro_batch_count} micro-batches" if self.micro_batch_count > 1 else ""
        return (
            f"weights: {(machine.weight_bytes + machine.routed_bytes) / 1e9:.2f} GB from the drive at each step, at "
            f"{machine.drive_bytes_per_s / 1e9:.1f} GB/s; batch {self.batch_size}{parts}: about {self.step_s:.2g} s a "
            f"step, {self.step_s / self.batch_size:.2g} s a token"
        )


def choose_batch(
    machine: Machine,
    work: Workload,
    *,
    token_bytes: int,
    batch_size: int | None = None,
    prefill_chunk_size: int | None = None,
    side_by_side: bool = True,
) -> BatchPlan:
    """The smallest batch that is nearly as fast as any, in tokens/s, and how its prompts go through the model.

    Args:
        token_bytes: of activations in the widest layer, for each token of a prompt.
        batch_size: take this one.
        prefill_chunk_size: take this one.
        side_by_side: whether micro-batches may be used (not where rows share a random generator).
    """
    rows_max = min(len(work.prompt_tokens), BATCH_SIZE_MAX)
    if batch_size is None:
        sizes = sorted({min(2**power, rows_max) for power in range(rows_max.bit_length() + 1)})
        rates = {size: size / machine.step_s(size, work) for size in sizes}
        batch_size = next(size for size in sizes if rates[size] >= _NEAR_BEST * max(rates.values()))
    longest = max(work.prompt_tokens)
    tokens_at_once = max(ACTIVATION_BYTES // token_bytes, 1)
    micro_batch_count = 1
    # One batch is one KV store: with its KV in memory, or prompts that fit at once, there is nothing to divide for.
    on_drive = batch_size * work.row_kv_bytes > work.kv_budget_bytes
    if side_by_side and on_drive:
        rows = max(tokens_at_once // (prefill_chunk_size or longest), 1)
        stores_max = max(work.kv_budget_bytes // MICRO_BATCH_BUDGET_MIN, 1)
        micro_batch_count = min(-(-batch_size // rows), MICRO_BATCHES_MAX, batch_size, stores_max)
    rows = -(-batch_size // micro_batch_count)
    if prefill_chunk_size is None and rows * longest > tokens_at_once:
        prefill_chunk_size = max(tokens_at_once // rows, 16)
    return BatchPlan(
        batch_size, micro_batch_count, prefill_chunk_size, machine.step_s(min(batch_size, rows_max), work), machine
    )


def measure(model: PreTrainedModel) -> Machine:
    """A second or less of reading the weights that come first, and of arithmetic of the model's kind."""
    stream = model.weight_stream
    expected = stream.forecast()
    config = model.config.get_text_config()
    experts = next((getattr(config, name) for name in _EXPERT_COUNTS if getattr(config, name, None)), None)
    share = min((getattr(config, "num_experts_per_tok", None) or 1) / experts, 1.0) if experts else 1.0
    weights = [parameter for parameter in model.parameters() if isinstance(parameter, FileTensor)]
    multiplied = [weight for weight in weights if weight.dim() >= 2 and not _is_table(model, weight)]
    element_count = sum(weight.numel() * (share if weight.dim() == 3 else 1) for weight in multiplied)
    return Machine(
        weight_bytes=expected.dense_bytes,
        routed_bytes=expected.routed_bytes,
        routed_share=share,
        drive_bytes_per_s=stream.measure_rate(),
        compute_s={rows: element_count * _element_s(multiplied, rows) for rows in (1, 16, 64, 256)},
    )


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _is_table(model: nn.Module, weight: FileTensor) -> bool:
    return any(isinstance(module, nn.Embedding) and module.weight is weight for module in model.modules())


def _element_s(weights: Sequence[FileTensor], rows: int) -> float:
    """Seconds of arithmetic for each element of a weight, for so many rows, by the weights' own kind."""
    if not weights:
        return 0.0
    example = max(weights, key=lambda weight: weight.numel())
    in_features = example.shape[-1]
    out_features = max(min(_GEMM_BYTES // (2 * in_features), example.shape[-2]), 1)
    x = torch.randn(rows, in_features, device=example.device).to(example.dtype)
    make = _codes_call if isinstance(example._layout, Codes) else _dense_call
    return _median_s(make(x, out_features, example), x.device) / (in_features * out_features)


def _dense_call(x: torch.Tensor, out_features: int, example: FileTensor) -> Callable[[], object]:
    weight = torch.randn(out_features, x.shape[-1], device=x.device).to(example.dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def _codes_call(x: torch.Tensor, out_features: int, example: FileTensor) -> Callable[[], object]:
    how = dict(bits=example._layout.bits, in_features=x.shape[-1])
    rows = ops.quantise_rows(torch.randn(out_features, x.shape[-1]), how["bits"]).to(x.device)
    if is_on_card(example):
        return lambda: linear_on_card(x, rows, dtype=x.dtype, **how)
    return lambda: quantised_linear(x, rows, **how)


def _median_s(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(4):
        _wait_for(device)
        begin = time.perf_counter()
        call()
        _wait_for(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[1]  # the first warms up


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kv_bytes_per_token(config: PretrainedConfig, element_bytes: float) -> int:
    """Of one row, all layers: an estimate for models whose layers differ."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * element_bytes)


def activation_bytes_per_token(config: PretrainedConfig, element_bytes: int) -> int:
    """Of the widest layer: gate, up and their product, beside the residual stream and its norm."""
    config = config.get_text_config()
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return element_bytes * (3 * wide + 6 * hidden)
