"""Attention over stored tokens is exact: every instruction set, dtype, shape, option and place of a page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import DTYPES, assert_attention_equal, random_kv

from torch_csd import reference


def attend_both(store, k, v, q, *, splits=(), **options):
    """(ours, reference), with the tokens appended in the given portions."""
    begin = 0
    for end in (*splits, k.shape[2]):
        store.append(0, k[:, :, begin:end], v[:, :, begin:end])
        begin = end
    store.flush()
    return store.attend(0, q, **options), reference.attention(q, k, v, **options)


def assert_equal(ours, expected):
    (out, lse), (expected_out, expected_lse) = ours, expected
    assert_attention_equal(out, expected_out)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5, rtol=2e-6)


@st.composite
def shapes(draw):
    num_kv_heads = draw(st.integers(1, 3))
    kv_len = draw(st.integers(1, 260))
    return dict(
        batch=draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        group=draw(st.integers(1, 16)),
        head_dim_k=8 * draw(st.integers(1, 72)),
        head_dim_v=8 * draw(st.integers(1, 72)),
        kv_len=kv_len,
        q_len=draw(st.sampled_from([1, 1, 2, 5, 33])),
        splits=tuple(sorted(draw(st.lists(st.integers(1, kv_len), max_size=3)))),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes(), resident=st.booleans(), seed=st.integers(0, 2**16))
@example(
    shape=dict(
        batch=1,
        num_kv_heads=1,
        group=16,
        head_dim_k=576,
        head_dim_v=512,
        kv_len=129,
        q_len=2,
        splits=(64, 128),
    ),
    resident=False,
    seed=0,
)
@example(
    shape=dict(batch=2, num_kv_heads=2, group=1, head_dim_k=8, head_dim_v=8, kv_len=64, q_len=1, splits=()),
    resident=True,
    seed=1,
)
def test_attention_over_stored_tokens_is_exact(make_store, simd, dtype, shape, resident, seed):
    dtype = DTYPES[dtype]
    k, v = random_kv(
        shape["batch"],
        shape["num_kv_heads"],
        shape["kv_len"],
        shape["head_dim_k"],
        shape["head_dim_v"],
        dtype,
        seed,
    )
    q = torch.randn(shape["batch"], shape["num_kv_heads"] * shape["group"], shape["q_len"], shape["head_dim_k"]).to(
        dtype
    )
    with make_store(simd=simd, resident=resident, memory_budget="8MiB") as store:
        assert_equal(*attend_both(store, k, v, q, splits=shape["splits"], causal=True))


@st.composite
def option_sets(draw):
    kv_len = draw(st.integers(1, 200))
    q_len = draw(st.integers(1, min(40, kv_len)))
    batch, num_heads = 2, 4
    mask = draw(st.sampled_from([None, "padding", "bool", "additive", "per_head", "bfloat16", "float16"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    masks = {
        None: None,
        "padding": torch.arange(kv_len)[None, None, None, :] >= torch.tensor([0, kv_len // 2])[:, None, None, None],
        "bool": torch.rand(batch, 1, q_len, kv_len, generator=generator) > 0.3,
        "additive": torch.randn(1, 1, q_len, kv_len, generator=generator),
        "per_head": torch.randn(batch, num_heads, q_len, kv_len, generator=generator),
        "bfloat16": torch.randn(batch, num_heads, 1, kv_len, generator=generator).bfloat16(),
        "float16": torch.randn(1, num_heads, 1, kv_len, generator=generator).half(),
    }
    return dict(
        kv_len=kv_len,
        q_len=q_len,
        generator=generator,
        options=dict(
            scale=draw(st.sampled_from([None, 1.0, 0.05])),
            causal=draw(st.sampled_from([False, True, "lower_right", "upper_left"])),
            window=draw(st.sampled_from([None, 1, 17, 64, 1000])),
            softcap=draw(st.sampled_from([None, 2.0, 50.0])),
            mask=masks[mask],
            sinks=draw(st.sampled_from([None, torch.tensor([0.5, -3.0, 8.0, 0.0])])),
            alibi_slopes=draw(st.sampled_from([None, torch.tensor([0.5, 0.25, 0.125, 0.0])])),
        ),
    )


@given(case=option_sets())
def test_every_option_of_attention_matches_its_formula(make_store, simd, case):
    k, v = random_kv(2, 2, case["kv_len"], 24, 40)
    q = torch.randn(2, 4, case["q_len"], 24, generator=case["generator"])
    with make_store(simd=simd) as store:
        assert_equal(*attend_both(store, k, v, q, **case["options"]))


def test_rows_of_different_lengths_attend_to_their_own_tokens(make_store, simd):
    k, v = random_kv(4, 2, 150, 32)
    lengths = [0, 1, 64, 150]
    q = torch.randn(4, 4, 3, 32)
    store = make_store(simd=simd)
    store.append(0, k, v, lengths=lengths)
    out, lse = store.attend(0, q, causal=True)
    for row, length in enumerate(lengths):
        expected = reference.attention(q[row, None], k[row, None, :, :length], v[row, None, :, :length], causal=True)
        assert_equal((out[row, None], lse[row, None]), expected)


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity(make_store, simd):
    k, v = random_kv(1, 1, 70, 16)
    store = make_store(simd=simd)
    store.append(0, k, v)
    out, lse = store.attend(0, torch.randn(1, 1, 2, 16), mask=torch.zeros(1, 1, 1, 70, dtype=torch.bool))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_queries_far_behind_the_tokens_see_nothing(make_store, simd):
    """Their windows begin behind the end of the row, where there are no pages."""
    k, v = random_kv(1, 1, 10, 16)
    q = torch.randn(1, 1, 400, 16)
    options = dict(causal="upper_left", window=4)
    assert_equal(*attend_both(make_store(simd=simd), k, v, q, **options))


def test_values_at_the_edge_of_float32_behave_as_in_torch(make_store, simd):
    k, v = random_kv(1, 1, 100, 16)
    q = torch.randn(1, 1, 4, 16)
    masked = torch.full((1, 1, 4, 100), torch.finfo(torch.float32).min)
    masked[..., 1, 50:] = 0
    masked[..., 2, :] = -torch.inf
    masked[..., 2, 3] = 0
    store = make_store(simd=simd)
    store.append(0, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=masked)
    torch.testing.assert_close(store.attend(0, q, mask=masked)[0], expected, atol=2e-5, rtol=0)
    large = 60 * q
    expected, expected_lse = reference.attention(large, k, v)
    out, lse = store.attend(0, large)
    # Scores of several hundred: fp32 has them to 2**-16, and p = exp(score) is off by as much relatively.
    torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-4, rtol=2e-6)


def test_where_the_pages_are_does_not_change_attention(make_store, simd, io_engine):
    k, v = random_kv(2, 2, 1000, 64, dtype=torch.bfloat16)
    q = torch.randn(2, 8, 1, 64).bfloat16()
    results = []
    for settings in (dict(resident=True), dict(resident=False), dict(memory_budget="1MiB", threads=3)):
        store = make_store(simd=simd, io_engine=io_engine, **settings)
        ours, expected = attend_both(store, k, v, q, splits=(100, 101, 700))
        assert_equal(ours, expected)
        results.append(store.stats())
    assert results[0]["drive_read_bytes"] == 0 < results[0]["resident_read_bytes"]
    assert results[1]["drive_read_bytes"] > 0
    assert results[2]["drive_read_bytes"] > 0, "the budget is smaller than the cache"


def test_long_chunks_and_many_queries_fit_a_small_budget(make_store, simd):
    k, v = random_kv(2, 2, 700, 64)
    q = torch.randn(2, 8, 700, 64)
    store = make_store(simd=simd, memory_budget="2MiB", threads=2)
    assert_equal(*attend_both(store, k, v, q, splits=(300,), causal=True))


def test_a_long_context_keeps_float32_accuracy(make_store, simd):
    k, v = random_kv(1, 1, 20_000, 32)
    q = torch.randn(1, 2, 1, 32)
    assert_equal(*attend_both(make_store(simd=simd), k, v, q))


def test_kv_dtype_narrower_than_the_model_rounds_once(make_store, simd):
    k, v = random_kv(1, 2, 200, 64)
    q = torch.randn(1, 2, 1, 64)
    store = make_store(simd=simd, kv_dtype="bf16")
    store.append(0, k, v)
    expected = reference.attention(q, k.bfloat16(), v.bfloat16())
    assert_equal(store.attend(0, q), expected)
    assert store.read(0)[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every other"])
def test_a_mask_may_have_any_strides(make_store, layout):
    k, v = random_kv(2, 2, 90, 16)
    q = torch.randn(2, 4, 5, 16)
    mask = {
        "transposed": torch.randn(90, 5, 4, 2).permute(3, 2, 1, 0),
        "expanded": torch.randn(1, 1, 5, 1).expand(2, 4, 5, 90),
        "every other": torch.randn(2, 4, 5, 180)[..., ::2],
    }[layout]
    sinks = torch.randn(8)[::2]
    assert_equal(*attend_both(make_store(), k, v, q, mask=mask, sinks=sinks))


def test_sinks_alone_are_attended_to_when_there_are_no_tokens(make_store):
    store = make_store()
    store.append(0, *random_kv(1, 1, 3, 16))
    store.truncate(0, 0)
    sinks = torch.tensor([0.5, -1.0])
    q = torch.zeros(1, 2, 1, 16)
    empty = torch.zeros(1, 1, 0, 16)
    assert_equal(store.attend(0, q, sinks=sinks), reference.attention(q, empty, empty, sinks=sinks))


def test_threads_do_not_change_attention(make_store):
    k, v = random_kv(3, 2, 3000, 64, dtype=torch.bfloat16)
    q = torch.randn(3, 4, 1, 64).bfloat16()
    for threads in (1, 2, 5):
        assert_equal(*attend_both(make_store(threads=threads, resident=False), k, v, q))
