"""How many rows share a reading of the weights: the smallest batch that is nearly as fast as any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import torch_csd
from torch_csd.hf import batching
from torch_csd.hf.batching import BatchPlan, Machine, Workload, choose_batch

GB = 10**9


def machine(**changes: object) -> Machine:
    """One that reads 6 GB of weights in two seconds."""
    wanted = {
        "weight_bytes": 6 * GB,
        "routed_bytes": 0,
        "routed_share": 1.0,
        "drive_bytes_per_s": 3.0 * GB,
        "compute_s": {1: 0.2, 16: 0.2, 64: 0.4, 256: 1.6},
    }
    return Machine(**wanted | changes)


def work(rows: int = 1000, *, prompt: int = 1000, new: int = 100, kv_bytes: int = 0, budget: int = 0) -> Workload:
    return Workload([prompt] * rows, new, kv_bytes, budget)


def plan(machine: Machine, work: Workload, **options: object) -> BatchPlan:
    return choose_batch(machine, work, **{"token_bytes": 1000} | options)


def test_weights_that_dominate_are_read_for_as_many_rows_as_there_are():
    assert plan(machine(), work(100)).batch_size == 100
    assert plan(machine(), work(10_000)).batch_size == batching.BATCH_SIZE_MAX


def test_a_batch_grows_until_arithmetic_takes_longer_than_reading():
    slow = machine(compute_s={1: 0.5, 256: 128.0})  # half a second for each row
    assert plan(slow, work()).batch_size == 4


def test_a_batch_grows_until_kv_takes_longer_than_the_weights():
    chosen = plan(machine(), work(kv_bytes=10**6)).batch_size  # about 1 GB for each row
    assert 16 < chosen < batching.BATCH_SIZE_MAX


def test_weights_that_are_all_in_memory_need_no_batch_where_arithmetic_grows_with_it():
    assert plan(machine(weight_bytes=0, compute_s={1: 0.1, 256: 25.6}), work()).batch_size == 1


@given(
    weights=st.integers(0, 10 * GB),
    kv_bytes=st.integers(0, 10**6),
    budget=st.integers(0, GB),
    rows=st.integers(1, 300),
    row_s=st.floats(0, 1),
)
def test_no_batch_is_much_faster_than_the_one_that_is_chosen(weights, kv_bytes, budget, rows, row_s):
    numbers = machine(weight_bytes=weights, compute_s={1: 1e-3 + row_s, 256: 1e-3 + 256 * row_s})
    job = work(rows, kv_bytes=kv_bytes, budget=budget)
    chosen = plan(numbers, job).batch_size
    assert 1 <= chosen <= min(rows, batching.BATCH_SIZE_MAX)
    rate = chosen / numbers.step_s(chosen, job)
    for power in range(9):
        size = min(2**power, rows, batching.BATCH_SIZE_MAX)
        assert size / numbers.step_s(size, job) <= rate / 0.95 + 1e-9


def test_experts_are_read_the_more_the_more_rows_there_are():
    mixture = machine(weight_bytes=0, routed_bytes=8 * GB, routed_share=0.25)
    one, two, many = (mixture.step_s(rows, work()) for rows in (1, 2, 100))
    assert one == pytest.approx(2 / 3) and two == pytest.approx(8 / 3 * 0.4375) and many == pytest.approx(8 / 3)


def test_a_batch_whose_kv_is_on_the_drive_is_run_in_micro_batches_that_hold_their_prompts():
    job = work(32, prompt=batching.ACTIVATION_BYTES // 1000 // 4, kv_bytes=100, budget=128 * 2**20)
    chosen = plan(machine(), job)
    assert (chosen.batch_size, chosen.micro_batch_count) == (32, 8) and chosen.prefill_chunk_size is None
    in_memory = plan(machine(), work(32, prompt=batching.ACTIVATION_BYTES // 4000, kv_bytes=10, budget=GB))
    assert in_memory.micro_batch_count == 1 and in_memory.prefill_chunk_size == batching.ACTIVATION_BYTES // 32_000
    assert plan(machine(), job, side_by_side=False).micro_batch_count == 1
    small = work(32, prompt=batching.ACTIVATION_BYTES // 4000, kv_bytes=100, budget=33 * 2**20)
    assert plan(machine(), small).micro_batch_count == 2  # each has a store of its own, which takes memory


def test_what_the_user_says_is_taken():
    chosen = plan(machine(), work(), batch_size=3, prefill_chunk_size=77)
    assert (chosen.batch_size, chosen.prefill_chunk_size) == (3, 77)


def test_the_plan_is_one_line_with_its_numbers():
    assert str(plan(machine(), work(16))) == (
        "weights: 6.00 GB from the drive at each step, at 3.0 GB/s; batch 16: about 2 s a step, 0.12 s a token"
    )


def tiny(kind: str):
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=8))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_model_is_measured(tmp_path, kind, weight_dtype):
    tiny(kind).save_pretrained(tmp_path)
    model = torch_csd.load_checkpoint(
        tmp_path, memory_budget="4MiB", weight_dtype=weight_dtype, weight_directory=tmp_path
    )
    numbers = batching.measure(model)
    assert numbers.drive_bytes_per_s > 0 and min(numbers.compute_s.values()) > 0
    assert numbers.routed_share == (0.25 if kind == "mixtral" else 1.0)
    with torch.no_grad():  # what was read to measure serves the first pass
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_kv_and_activations_are_counted_from_the_config():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    assert batching.kv_bytes_per_token(config, 2) == 2 * 32 * 8 * 128 * 2
    assert batching.activation_bytes_per_token(config, 2) == 2 * (3 * 14336 + 6 * 4096)
