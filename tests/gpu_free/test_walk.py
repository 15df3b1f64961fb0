"""A store with a card and one without, led through the same random steps: they never differ."""

from __future__ import annotations

import contextlib
import errno
import os
import random

import emulated_card
import pytest
import torch
from support import random_kv

import torch_csd.drive
from torch_csd import KVStore, StoreError
from torch_csd.cuda.pinned import PinnedTransfer

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


class FailingTransfer(PinnedTransfer):
    """Fails a share of all requests."""

    share = 0.0
    failures = 0

    def reap(self, *, wait=False):
        completions = super().reap(wait=wait)
        for place, completion in enumerate(completions):
            if random.random() < FailingTransfer.share:
                FailingTransfer.failures += 1
                completions[place] = completion._replace(error=OSError(errno.EIO, os.strerror(errno.EIO)))
        return completions


def walk_with_failures(directory, monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> int:
    """After each error the store holds what it held before the append that failed. Returns how many there were."""
    rng = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    emulated_card.install(
        monkeypatch,
        executor=rng.choice(["near", "gpu", "auto"]),
        gpu_budget=rng.choice([0, 50_000, 2**20]),
        gpu_staging="1MiB",
        make_transfer=FailingTransfer,
    )
    settings = dict(kv_dtype=rng.choice(["float32", "int8"]), memory_budget="4MiB", resident=rng.random() < 0.5)
    errors = 0
    with KVStore(directory, **settings) as carded, KVStore(directory, **settings) as plain:
        monkeypatch.setattr(plain._drive, "attach_card", lambda stored: None)

        def settle() -> None:
            """What is still to fail fails, and the other store forgets what this one has lost."""
            monkeypatch.setattr(FailingTransfer, "share", 0.0)
            for layer in carded.layers():
                with contextlib.suppress(StoreError):
                    carded.settle(layer)
                held, lengths = plain.lengths(layer), carded.lengths(layer)
                if held != lengths and not lengths:
                    plain.free(layer)
                elif held != lengths:
                    assert all(short <= long for short, long in zip(lengths, held, strict=True))
                    plain.truncate(layer, lengths)

        def step(act):
            nonlocal errors
            monkeypatch.setattr(FailingTransfer, "share", 0.08)
            try:
                ours = act(carded)
            except StoreError:
                errors += 1
                settle()
                return None
            return ours, act(plain)

        for number in range(steps):
            layer = rng.randrange(2)
            rows, length = len(carded.lengths(layer)), min(carded.lengths(layer), default=0)
            what = rng.choice(["append"] * 4 + ["attend"] * 4 + ["reorder", "truncate", "read", "flush"])
            if what == "append":
                tokens = rng.choice([1, 64, 130, 500, 1300])
                k, v = random_kv(rows or 2, HEADS, tokens, HEAD_DIM_K, HEAD_DIM_V, seed=seed * 1000 + number)
                step(lambda store, layer=layer, k=k, v=v: store.append(layer, k, v))
            elif what == "attend" and length > 0:
                q = torch.randn(rows, 4, rng.choice([1, 3]), HEAD_DIM_K)
                outs = step(lambda store, layer=layer, q=q: store.attend(layer, q)[0])
                if outs is not None:
                    torch.testing.assert_close(*outs, atol=2e-3, rtol=1e-2)
            elif what == "reorder" and rows:
                step(lambda store, layer=layer, rows=rows: store.reorder(layer, [rows - 1, 0]))
            elif what == "truncate" and length > 0:
                to = rng.randint(0, length)
                step(lambda store, layer=layer, to=to: store.truncate(layer, to))
            elif what == "read" and length > 0:
                for ours, theirs in zip(*(step(lambda store, layer=layer: store.read(layer)) or ()), strict=True):
                    assert torch.equal(ours, theirs)
            elif what == "flush":
                step(lambda store: store.flush())
        settle()
        for layer in carded.layers():
            if min(carded.lengths(layer), default=0) > 0:
                for ours, theirs in zip(carded.read(layer), plain.read(layer), strict=True):
                    assert torch.equal(ours, theirs)
    return errors


def test_random_walks_survive_failing_transfers(tmp_path, monkeypatch):
    errors = 0
    for seed in range(8):
        with monkeypatch.context() as patches:
            errors += walk_with_failures(tmp_path, patches, seed, steps=60)
    assert errors > 0 < FailingTransfer.failures
