"""A store with a card and one without, led through the same random steps: they never differ."""

from __future__ import annotations

import random

import emulated_card
import pytest
import torch
from support import random_kv

import torch_csd.drive
from torch_csd import KVStore

HEADS, HEAD_DIM_K, HEAD_DIM_V = 2, 16, 24


def walk(directory, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kv_dtype = rng.choice(["float32", "bfloat16", "int8", "int4"])
    dtype = torch.bfloat16 if kv_dtype == "bfloat16" else torch.float32
    emulated_card.install(
        monkeypatch,
        executor=rng.choice(["near", "gpu", "gpu", "auto"]),
        gpu_budget=rng.choice([0, 50_000, 2**20]),
        gpu_staging=rng.choice(["1MiB", "2MiB"]),
    )
    settings = dict(kv_dtype=kv_dtype, memory_budget=rng.choice(["2MiB", "8MiB"]), resident=rng.random() < 0.5)
    carded = KVStore(directory, **settings)
    with monkeypatch.context() as plain_only:
        plain_only.setattr(torch_csd.drive, "is_card", lambda device: False)
        plain = KVStore(directory, **settings)
    monkeypatch.setattr(plain._drive, "attach_card", lambda stored: None)
    pairs = [(carded, plain)]
    # near, codes have q in 16 bits; else float32 rounding, and one to bfloat16
    atol = {"int8": 2e-3, "int4": 2e-3}.get(kv_dtype, 2e-2 if dtype == torch.bfloat16 else 3e-5)

    def compare(ours: KVStore, theirs: KVStore, layer: int) -> None:
        lengths = ours.lengths(layer)
        assert lengths == theirs.lengths(layer)
        if not lengths or min(lengths) <= ours.begin(layer):
            return
        q_len = rng.choice([1, 1, 1, 3, min(lengths)])
        q = torch.randn(len(lengths), 4, q_len, HEAD_DIM_K).to(dtype)
        rules = {}
        if rng.random() < 0.5:
            rules["causal"] = True
        if rng.random() < 0.3:
            rules["window"] = rng.randint(1, 400)
        if rng.random() < 0.3:
            rules["sinks"] = torch.randn(4)
        if rng.random() < 0.3:
            rules["mask"] = torch.rand(len(lengths), 1, 1, max(lengths) - ours.begin(layer)) > 0.3
        results = [store.attend(layer, q, **rules) for store in (ours, theirs)]
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine.float(), other.float(), atol=atol, rtol=1e-2 if atol > 1e-4 else 1e-4)

    try:
        for step in range(steps):
            ours, theirs = rng.choice(pairs)
            layer = rng.randrange(3)
            rows = len(ours.lengths(layer))
            length = min(ours.lengths(layer), default=0)
            what = rng.choice(["append"] * 5 + ["attend"] * 6 + ["reorder", "truncate", "trim", "fork", "free", "read"])
            if what == "append":
                tokens = rng.choice([1, 1, 30, 64, 130, 500, 1300])
                batch = rows or rng.choice([1, 2])
                k, v = random_kv(batch, HEADS, tokens, HEAD_DIM_K, HEAD_DIM_V, dtype=dtype, seed=seed * 1000 + step)
                lengths = [rng.randint(0, tokens) for _ in range(batch)] if rng.random() < 0.1 else None
                for store in (ours, theirs):
                    store.append(layer, k, v, lengths=lengths)
            elif what == "attend":
                compare(ours, theirs, layer)
            elif rows and what == "reorder":
                index = [rng.randrange(rows) for _ in range(rng.choice([1, 2, 3]))]
                for store in (ours, theirs):
                    store.reorder(layer, index)
            elif rows and what == "truncate" and length > ours.begin(layer):
                to = rng.randint(ours.begin(layer), length)
                for store in (ours, theirs):
                    store.truncate(layer, to)
            elif rows and what == "trim" and length > ours.begin(layer):
                to = rng.randint(ours.begin(layer), length)
                for store in (ours, theirs):
                    store.trim(layer, to)
            elif what == "fork" and len(pairs) < 4:
                pairs.append((ours.fork(), theirs.fork()))
                monkeypatch.setattr(pairs[-1][1]._drive, "attach_card", lambda stored: None)
            elif what == "fork":
                for store in pairs.pop(rng.randrange(len(pairs))):
                    store.close()
            elif rows and what == "free" and rng.random() < 0.3:
                for store in (ours, theirs):
                    store.free(layer)
            elif rows and what == "read" and len(set(ours.lengths(layer))) == 1 and length > ours.begin(layer):
                for mine, other in zip(ours.read(layer), theirs.read(layer), strict=True):
                    assert torch.equal(mine, other)
        for ours, theirs in pairs:
            for layer in range(3):
                compare(ours, theirs, layer)
    finally:
        for pair in pairs:
            for store in pair:
                store.close()


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk(tmp_path, monkeypatch, seed):
    walk(tmp_path, monkeypatch, seed, steps=60)
