"""What tests share besides fixtures: random K and V, and how near to exact attention must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_csd import KVStore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tolerance(dtype: torch.dtype, reference: torch.Tensor) -> torch.Tensor:
    """Largest allowed distance from float64 attention: fp32 rounding, plus one rounding to the output dtype."""
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    return 2e-5 + ulp * reference.abs()


def assert_attention_equal(out: torch.Tensor, reference: torch.Tensor) -> None:
    error = (out.double() - reference.double()).abs()
    excess = error - tolerance(out.dtype, reference)
    assert not (excess > 0).any() and not error.isnan().any(), f"largest error {error.max():.3g} of {out.dtype}"


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


def fill(store: KVStore, k: torch.Tensor, v: torch.Tensor, splits: Sequence[int] = ()) -> None:
    """Appends the tokens to layer 0 in the given portions, and waits until they are where they will be."""
    begin = 0
    for end in (*splits, k.shape[2]):
        store.append(0, k[:, :, begin:end], v[:, :, begin:end])
        begin = end
    store.flush()
