from __future__ import annotations

import pytest
import torch

import torch_csd


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread():
    # The models are tiny: with more threads torch only waits for them, endlessly so on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["resident", "drive"])
def where(request) -> str:
    """Where full pages lie: in memory, or on the drive only."""
    return request.param


@pytest.fixture
def new_cache(tmp_path, where):
    """new_cache(config) -> a StorageCache that is closed with the test."""
    caches = []

    def make(config=None, **options):
        options = {"resident": where == "resident", "memory_budget": "8MiB", "threads": 2} | options
        caches.append(torch_csd.StorageCache(config, tmp_path, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()
