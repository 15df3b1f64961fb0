"""Several batches side by side: each weight is read once for all of them, and the results are as alone."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import torch_csd

SHAPE = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory)  # 8 MiB of float32, twice the budget
    return directory


@pytest.fixture
def model(checkpoint):
    model = torch_csd.load_checkpoint(checkpoint, memory_budget="4MiB")
    yield model
    model.weight_stream.close()


def answer(model, directory, ids: torch.Tensor, new_tokens: int = 6) -> torch.Tensor:
    with torch_csd.StorageCache(model.config, directory, memory_budget="8MiB", threads=1) as cache:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )


def prompts(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 300, (2, length)) for length in lengths]


def bytes_read(model) -> int:
    return model.weight_stream.stats()["bytes_read"]


def test_results_are_those_of_each_alone_and_weights_are_read_once_for_all(model, tmp_path):
    groups = prompts(5, 40, 17)
    alone = [answer(model, tmp_path, ids) for ids in groups]
    before = bytes_read(model)
    answer(model, tmp_path, groups[0])
    once = bytes_read(model) - before
    together = model.weight_stream.lockstep([lambda ids=ids: answer(model, tmp_path, ids) for ids in groups])
    for result, expected in zip(together, alone, strict=True):
        assert torch.equal(result, expected)
    read = bytes_read(model) - before - once
    assert 0.9 * once <= read <= 1.5 * once  # one after another: 3.7; a few are read again, as threads overtake


def test_those_that_end_early_do_not_hold_up_the_others(model, tmp_path):
    groups = prompts(5, 9, 7)
    lengths = (2, 9, 5)
    alone = [answer(model, tmp_path, ids, count) for ids, count in zip(groups, lengths, strict=True)]
    tasks = [
        lambda ids=ids, count=count: answer(model, tmp_path, ids, count)
        for ids, count in zip(groups, lengths, strict=True)
    ]
    for result, expected in zip(model.weight_stream.lockstep(tasks), alone, strict=True):
        assert torch.equal(result, expected)


def test_one_that_fails_is_an_error_of_its_own(model, tmp_path):
    (ids,) = prompts(6)
    expected = answer(model, tmp_path, ids)
    passes = []

    def fail(*_: object) -> None:
        passes.append(None)
        if len(passes) == 9:  # in the middle of the model, in its first pass
            raise RuntimeError("not today")

    def failing() -> torch.Tensor:
        me = threading.get_ident()
        hooks = [
            layer.register_forward_pre_hook(lambda *_: fail() if threading.get_ident() == me else None)
            for layer in [*model.model.layers, *(layer.mlp for layer in model.model.layers)]
        ]
        try:
            return answer(model, tmp_path, ids, 4)
        finally:
            for hook in hooks:
                hook.remove()

    good, bad = model.weight_stream.lockstep([lambda: answer(model, tmp_path, ids), failing])
    assert torch.equal(good, expected)
    assert isinstance(bad, RuntimeError) and str(bad) == "not today"
    assert torch.equal(answer(model, tmp_path, ids), expected)


def test_one_computes_at_a_time(model, tmp_path):
    (ids,) = prompts(6)
    inside, most = set(), []
    lock = threading.Lock()

    def enter(*_: object) -> None:
        with lock:
            inside.add(threading.get_ident())
            most.append(len(inside))

    def leave(*_: object) -> None:
        with lock:
            inside.discard(threading.get_ident())

    for module in model.modules():
        if type(module).__name__ == "SiLUActivation":  # computes, and waits for nothing
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    model.weight_stream.lockstep([lambda: answer(model, tmp_path, ids)] * 4)
    assert most and max(most) == 1


def test_threads_that_are_not_in_lockstep_may_use_the_model_too(model, tmp_path):
    groups = prompts(5, 12)
    (other,) = prompts(20)
    expected = answer(model, tmp_path, other)
    results = []
    thread = threading.Thread(target=lambda: results.append(answer(model, tmp_path, other)))
    thread.start()
    together = model.weight_stream.lockstep([lambda ids=ids: answer(model, tmp_path, ids) for ids in groups])
    thread.join()
    assert torch.equal(results[0], expected)
    for result, ids in zip(together, groups, strict=True):
        assert torch.equal(result, answer(model, tmp_path, ids))


def test_a_mixture_whose_batches_use_other_experts_gives_the_same(tmp_path):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).save_pretrained(tmp_path)
    model = torch_csd.load_checkpoint(tmp_path, memory_budget="4MiB")
    groups = prompts(3, 11, 2)
    alone = [answer(model, tmp_path, ids) for ids in groups]
    together = model.weight_stream.lockstep([lambda ids=ids: answer(model, tmp_path, ids) for ids in groups])
    for result, expected in zip(together, alone, strict=True):
        assert torch.equal(result, expected)
