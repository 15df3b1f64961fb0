"""What every test may use. Settings come from the environment too: TORCH_CSD_SIMD, TORCH_CSD_IO_ENGINE force a path.

TEST_CARD=gpu, near or auto: every store has an emulated card (tests/emulated_card.py) and this executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from torch_csd import KVStore, StoreError, ops

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = os.environ.get("TEST_CARD")
    if executor is not None:
        import emulated_card

        emulated_card.install(monkeypatch, executor=executor, gpu_budget=os.environ.get("TEST_CARD_BUDGET", "0"))


@pytest.fixture(params=["serial", "avx2", "avx512", "avx512vnni"])
def simd(request: pytest.FixtureRequest) -> str:
    if request.param not in ops.supported_simd():
        pytest.skip(f"this processor has {', '.join(ops.supported_simd())}, not {request.param}")
    return request.param


@pytest.fixture(params=["io_uring", "pread"])
def io_engine(request: pytest.FixtureRequest, tmp_path) -> str:
    try:
        KVStore(tmp_path, io_engine=request.param, memory_budget="1MiB").close()
    except StoreError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def make_store(tmp_path) -> Iterator[Callable[..., KVStore]]:
    """A KVStore in this test's directory, closed at its end. Defaults small enough that pages leave memory."""
    stores = []

    def make(**settings: object) -> KVStore:
        settings.setdefault("memory_budget", "16MiB")
        stores.append(KVStore(settings.pop("directory", tmp_path), **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
