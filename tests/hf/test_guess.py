"""Guesses at the next layer's queries: they change what is read when, and nothing that comes out."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import torch_csd
from torch_csd import Adaptive, PageTopK, SparF
from torch_csd.hf.attention import QueryCaptured, capture_query

from .models import generate, model_of, prompts

CHOICE = PageTopK(fraction=0.25, local=0, sink=0)
COLD = {"resident": False, "memory_budget": "16MiB", "threads": 2}


def new_model(family="llama"):
    """Not the one that other tests share: hooks stay."""
    return copy.deepcopy(model_of(family, "csd"))


def all_alike(model):
    """Makes attention and MLP add nothing and all layers alike, so that every guess is right."""
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("sparse", [CHOICE, Adaptive(mass=0.9), SparF(channels=4, tokens=64)], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "gpt_oss", "mixtral", "deepseek_v3"])
def test_guesses_change_no_token(tmp_path, family, sparse):
    inputs = prompts(700, 300)
    results = []
    for guesses in (False, True):
        model = new_model(family)
        if guesses:
            assert torch_csd.guess_queries(model) is model
        with torch_csd.StorageCache(model.config, tmp_path, sparse=sparse, **COLD) as cache:
            results.append(generate(model, inputs, cache, max_new_tokens=10))
            guessed = cache.stats()["guessed_bytes"]
        # Latents are attended to in memory; SparF reads channels of all tokens before it knows what it wants.
        assert (guessed > 0) == (guesses and family != "deepseek_v3" and not isinstance(sparse, SparF))
    (tokens, logits), (guessed_tokens, guessed_logits) = results
    assert torch.equal(tokens, guessed_tokens)
    torch.testing.assert_close(logits, guessed_logits, atol=1e-4, rtol=0)


def test_a_right_guess_is_used_and_a_layer_of_wrong_ones_is_left_alone(tmp_path):
    inputs = prompts(1000)
    shares = []
    for make in (all_alike, lambda model: model):
        model = torch_csd.guess_queries(make(new_model()))
        with torch_csd.StorageCache(model.config, tmp_path, sparse=CHOICE, **COLD) as cache:
            generate(model, inputs, cache, max_new_tokens=20)
            stats = cache.stats()
            shares.append(stats["guessed_used_bytes"] / stats["guessed_bytes"])
            assert stats["guessed_used_bytes"] <= stats["read_ahead_bytes"]
    assert shares[0] > 0.9, shares


def test_the_captured_query_is_the_one_that_the_layer_asks():
    model = all_alike(new_model())
    layer = model.model.layers[1]
    hidden = torch.randn(1, 3, 64)
    positions = model.model.rotary_emb(hidden, torch.tensor([[5, 6, 7]]))
    with pytest.raises(QueryCaptured) as captured, capture_query():
        layer.self_attn(hidden_states=hidden, position_embeddings=positions, attention_mask=None)
    assert captured.value.query.shape == (1, 4, 3, 16) and captured.value.scaling == 16**-0.5
    out, _ = layer.self_attn(hidden_states=hidden, position_embeddings=positions, attention_mask=None)
    assert out.shape == hidden.shape, "only within capture_query is anything captured"


def test_doing_it_again_changes_nothing():
    model = new_model()
    hooks = [len(module._forward_hooks) for module in torch_csd.guess_queries(model).modules()]
    assert sum(hooks) == model.config.num_hidden_layers - 1
    assert hooks == [len(module._forward_hooks) for module in torch_csd.guess_queries(model).modules()]


def test_exact_caches_and_prompts_are_not_guessed_for(tmp_path):
    model = torch_csd.guess_queries(new_model())
    with torch_csd.StorageCache(model.config, tmp_path, **COLD) as cache:
        generate(model, prompts(300), cache, max_new_tokens=4)
        assert cache.stats()["guessed_bytes"] == 0
    with torch_csd.StorageCache(model.config, tmp_path, sparse=CHOICE, **COLD) as cache:
        with torch.no_grad():
            model(**prompts(300), past_key_values=cache)
        assert cache.stats()["guessed_bytes"] == 0


def test_what_cannot_be_guessed_for_is_an_error():
    with pytest.raises(TypeError, match="wants a transformers model, got Linear"):
        torch_csd.guess_queries(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wants attn_implementation='csd', got 'sdpa'"):
        torch_csd.guess_queries(model_of("llama", "sdpa"))


def test_the_benchmark_runs_and_says_how_much_was_used(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "bench_guess.py"
    options = ["--directory", str(tmp_path), "--quick", "--context", "512", "--memory-budget", "16MiB", "--json", "-"]
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    with pytest.raises(SystemExit) as ended:
        exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__", "__doc__": "What it is.\n"})
    assert ended.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 3 and all("of what was guessed was used; " in row["note"] for row in rows)
    assert all(row["value"] > 0 and row["beside"][0]["name"] == "without guesses" for row in rows)
    assert list(tmp_path.iterdir()) == []
