"""Processes that may open few files or have little memory: a clear error, no hang, and the store is as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import random_kv

import torch_csd
from torch_csd import KVStore, verify

TOKENS, APPENDED = 200, 64 * 20

# One process imports torch, and forks a child for each limit: {limit: [what came of it, its text]}.
CHILDREN = """
import json, os, resource, sys, torch, torch_csd, torch_csd.drive

directory, kind, io_engine, *limits = sys.argv[1:]
torch.set_num_threads(1)
k = torch.randn(1, 4, int(os.environ["APPENDED"]), 64)

def limited(limit):
    if kind == "files":
        soft = len(os.listdir("/proc/self/fd")) - 1 + limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    else:
        soft = int(open("/proc/self/statm").read().split()[0]) * 4096 + limit * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    with torch_csd.KVStore.open(directory, "a", memory_budget="64MiB", threads=1, io_engine=io_engine) as store:
        for layer in range(4):
            store.append(layer, k, k)
            store.attend(layer, torch.zeros(1, 4, 1, 64))
        with torch_csd.KVStore(directory, memory_budget="64MiB", threads=1, io_engine=io_engine) as scratch:
            scratch.append(0, k, k)
            scratch.attend(0, torch.zeros(1, 4, 1, 64))

results = {}
for limit in map(int, limits):
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        try:
            limited(limit)
            result = ["ok", ""]
        except Exception as error:
            result = [type(error).__name__, str(error)]
        os.write(writes, json.dumps(result).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        results[limit] = json.loads(answer.read() or '["killed", ""]')
    os.waitpid(child, 0)
print(json.dumps(results))
"""


def run_limited(directory: Path, kind: str, io_engine: str, limits: range) -> dict[int, tuple[str, str]]:
    path = os.pathsep.join([str(Path(torch_csd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", CHILDREN, str(directory), kind, io_engine, *map(str, limits)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "APPENDED": str(APPENDED)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return {int(limit): (what, text) for limit, (what, text) in json.loads(run.stdout).items()}


@pytest.fixture
def kept(tmp_path) -> Path:
    k, v = random_kv(1, 4, TOKENS, 64)
    with KVStore(tmp_path, durable=True, name="a", memory_budget="8MiB", threads=1) as store:
        store.append(9, k, v)
        store.commit()
    return tmp_path


def assert_as_it_was(directory: Path) -> None:
    k, v = random_kv(1, 4, TOKENS, 64)
    assert verify(directory) == []
    with KVStore.open(directory, "a", memory_budget="8MiB", threads=1) as store:
        assert store.layers() == [9]
        assert all(torch.equal(found, wanted) for found, wanted in zip(store.read(9), (k, v), strict=True))


@pytest.mark.parametrize("io_engine", ["auto", "pread"])
def test_too_few_files_are_an_error_that_says_so(kept, io_engine):
    results = run_limited(kept, "files", io_engine, range(0, 20))
    failed = {limit: result for limit, result in results.items() if result[0] != "ok"}
    assert results[19][0] == "ok" and len(failed) >= 3, results
    for limit, (what, text) in failed.items():
        assert what == "StoreError", (limit, what, text)
        assert "Too many open files" in text or "ulimit -n" in text, (limit, text)
    assert_as_it_was(kept)


def test_too_little_memory_is_an_error_that_says_so(kept):
    results = run_limited(kept, "memory", "auto", range(0, 60, 3))
    failed = {limit: result for limit, result in results.items() if result[0] != "ok"}
    assert results[57][0] == "ok" and len(failed) >= 3, results
    for limit, (what, text) in failed.items():
        assert what in ("MemoryBudgetError", "MemoryError", "StoreError"), (limit, what, text)
        assert any(word in text.lower() for word in ("memory", "thread")), (limit, text)
    assert_as_it_was(kept)
