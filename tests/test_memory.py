"""Memory is bounded by memory_budget, whatever the context."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MIB = 2**20

# Decodes over a cache of `cache` bytes in a fresh process, and reports by how much its resident memory grew at most.
SCRIPT = """
import json, sys, threading, time
import torch, torch_csd

settings = json.loads(sys.argv[1])
torch.manual_seed(0)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

layers, heads, group, head_dim, chunk = 4, 8, 4, 128, 1024
q = torch.randn(1, heads * group, 1, head_dim).bfloat16()
k = torch.randn(1, heads, chunk, head_dim).bfloat16()
v = torch.randn(1, heads, chunk, head_dim).bfloat16()
warm = torch_csd.KVStore(settings["directory"], memory_budget="1MiB")   # code pages, thread pools of torch
warm.append(0, k[:, :1, :64], v[:, :1, :64])
warm.attend(0, q[:, :4])
warm.close()
before = peak = resident()
stop = False

def watch():
    global peak
    while not stop:
        peak = max(peak, resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
store = torch_csd.KVStore(settings["directory"], memory_budget=settings["memory_budget"], threads=2)
chunks = settings["cache"] // (layers * 2 * k.nbytes)
for _ in range(chunks):
    for layer in range(layers):
        if settings.get("fresh"):
            k, v = torch.randn(1, heads, chunk, head_dim).bfloat16(), torch.randn(1, heads, chunk, head_dim).bfloat16()
        store.append(layer, k, v)
for _ in range(3):
    for layer in range(layers):
        store.append(layer, k[:, :, :1], v[:, :, :1])
        store.attend(layer, q)
store.attend(0, torch.randn(1, heads * group, 256, head_dim).bfloat16(), causal=True)
stats = store.stats()
stop = True
watcher.join()
print(json.dumps({"growth": peak - before, "stats": stats}))
"""


def grow(directory, **settings):
    settings["directory"] = str(directory)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_a_one_gib_cache_decodes_within_its_memory_budget(tmp_path):
    result = grow(tmp_path, memory_budget=128 * MIB, cache=1024 * MIB)
    assert result["stats"]["drive_read_bytes"] > 3 * 800 * MIB, "the cache is on the drive"
    assert result["growth"] <= (128 + 64) * MIB, f"grew by {result['growth'] / MIB:.0f} MiB"
    assert result["stats"]["memory_used_bytes"] <= 128 * MIB


def test_that_bound_would_be_seen_to_fail(tmp_path):
    """The same process with a budget that holds everything does grow past the bound: the measurement measures."""
    result = grow(tmp_path, memory_budget=2048 * MIB, cache=1024 * MIB)
    assert result["growth"] > (128 + 64) * MIB
    assert result["stats"]["drive_read_bytes"] == 0


@pytest.mark.parametrize("budget", ["1MiB", "8MiB", "40MiB", "200MiB"])
def test_memory_in_use_stays_within_any_budget(make_store, budget):
    from support import random_kv

    from torch_csd.config import parse_bytes

    store = make_store(memory_budget=budget, threads=2)
    for layer in range(3):
        store.append(layer, *random_kv(2, 2, 5000, 32))
    import torch

    for layer in range(3):
        store.attend(layer, torch.randn(2, 8, 300, 32), causal=True)
        store.attend(layer, torch.randn(2, 8, 1, 32))
    # One query of all heads is the least that a pass works on.
    assert store.stats()["memory_used_bytes"] <= parse_bytes(budget) + 256 * 1024


def test_tensors_that_come_and_go_leave_no_holes_in_memory(tmp_path):
    """As a model makes them: anew for each append. What the store keeps must not lie in the gaps between them."""
    result = grow(tmp_path, memory_budget=64 * MIB, cache=512 * MIB, fresh=True)
    assert result["growth"] < (64 + 64) * MIB
