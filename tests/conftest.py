"""What every test may use. Settings come from the environment too: TORCH_CSD_SIMD, TORCH_CSD_IO_ENGINE force a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from torch_csd import KVStore, StoreError, ops

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tolerance(dtype: torch.dtype, reference: torch.Tensor) -> torch.Tensor:
    """Largest allowed distance from float64 attention: fp32 rounding, plus one rounding to the output dtype."""
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    return 2e-5 + ulp * reference.abs()


def assert_attention_equal(out: torch.Tensor, reference: torch.Tensor) -> None:
    error = (out.double() - reference.double()).abs()
    excess = error - tolerance(out.dtype, reference)
    assert not (excess > 0).any() and not error.isnan().any(), f"largest error {error.max():.3g} of {out.dtype}"


@pytest.fixture(params=["serial", "avx2", "avx512"])
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


def random_kv(
    batch: int,
    num_kv_heads: int,
    tokens: int,
    head_dim_k: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [batch, num_kv_heads, tokens, head_dim], standard normal."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, num_kv_heads, tokens, head_dim_k, generator=generator)
    v = torch.randn(batch, num_kv_heads, tokens, head_dim_v or head_dim_k, generator=generator)
    return k.to(dtype), v.to(dtype)
