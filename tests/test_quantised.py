"""int8 and int4 pages: what they hold, how far attention over them is from exact, and what happens at the tail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, assert_attention_equal, fill, random_kv

from torch_csd import StoreFullError, reference

BITS = {"int8": 8, "int4": 4}
PAGE = 64

# Distance from exact attention, standard normal K and V: a value is off by up to half a step of its group, 1/2 of
# (max - min) / 255 or / 15 with max - min about 6; averaging over many tokens leaves a fraction of that. Measured: a
# third of these.
EXACT_ATOL = {"int8": 6e-3, "int4": 8e-2}
# Root mean square of that, of the output's own: what README says.
EXACT_RMS = {"int8": 0.01, "int4": 0.16}


@pytest.fixture(params=BITS)
def kind(request) -> str:
    return request.param


def tail_begin(tokens: int) -> int:
    return max(0, -(-tokens // PAGE) - 2) * PAGE


@st.composite
def shapes(draw):
    kv_len = draw(st.integers(1, 400))
    return dict(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        head_dim_k=8 * draw(st.integers(1, 72)),
        head_dim_v=8 * draw(st.integers(1, 72)),
        kv_len=kv_len,
        q_len=draw(st.sampled_from([1, 1, 2, 5, 33])),
        splits=tuple(sorted(draw(st.lists(st.integers(1, kv_len), max_size=3)))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        resident=draw(st.booleans()),
    )


@given(shape=shapes(), seed=st.integers(0, 2**16))
def test_attention_over_codes_matches_their_formula(make_store, simd, kind, shape, seed):
    dtype = DTYPES[shape["dtype"]]
    k, v = random_kv(
        shape["batch"], shape["num_kv_heads"], shape["kv_len"], shape["head_dim_k"], shape["head_dim_v"], dtype, seed
    )
    num_heads = shape["num_kv_heads"] * shape["group"]
    q = torch.randn(shape["batch"], num_heads, shape["q_len"], shape["head_dim_k"]).to(dtype)
    with make_store(simd=simd, kv_dtype=kind, resident=shape["resident"], memory_budget="8MiB") as store:
        fill(store, k, v, shape["splits"])
        out, lse = store.attend(0, q, causal=True)
        held_k, held_v = store.read(0)
    # However the tokens came in, the codes are those of one append of all of them.
    wanted_k, wanted_v = reference.stored(k, v, BITS[kind])
    ulp = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}[shape["dtype"]]
    for held, wanted, dense in ((held_k, wanted_k, k), (held_v, wanted_v, v)):
        # A value that lies between two codes but for its last bit may get either.
        step = (dense.float().amax() - dense.float().amin()) / (2 ** BITS[kind] - 1)
        off = (held.double() - wanted).abs()
        assert (off <= ulp * wanted.abs() + 1e-7).float().mean() > 0.999 and off.max() <= 1.01 * step
    exact_k, exact_v = unrounded(held_k, wanted_k), unrounded(held_v, wanted_v)
    expected_out, expected_lse = reference.attention(q, exact_k, exact_v, causal=True)
    # Integer products take q with 16 bits: 2**-16 of its largest channel, and so of the scores.
    error = (out.double() - expected_out).abs()
    assert (error <= 5e-4 + 2 * ulp * expected_out.abs()).all(), error.max()
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-4)


def unrounded(held, wanted):
    """The codes' values in float64: read() rounds them to the dtype of the tokens."""
    return torch.where((held.double() - wanted).abs() <= 0.01 * wanted.abs() + 1e-6, wanted, held.double())


def test_every_value_is_within_half_a_step(make_store, simd, kind):
    k, v = random_kv(2, 2, 300, 72, 40)
    k[0, 0, :, 3] = 5.0  # a channel of one value
    k[1, 1, :, 5] += 1000.0  # one far from zero
    v[:, :, 7] = 0.0
    v[0, 0, 9] *= 1e-6
    store = make_store(simd=simd, kv_dtype=kind)
    fill(store, k, v)
    held_k, held_v = store.read(0)
    end = tail_begin(300)
    levels = 2 ** BITS[kind] - 1
    for held, dense, dim in ((held_k, k, 3), (held_v, v, 3)):
        groups = dense[:, :, :end]
        if dense is k:
            groups = groups.unflatten(2, (-1, PAGE))
        low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
        # Half a step, where the zero point is low rounded down to float16 and the step rounded up.
        step = ((high - low) + 2.0**-10 * low.abs() + 2.0**-24) / levels * (1 + 2.0**-10) + 2.0**-24
        bound = step / 2 + 1e-6 * torch.maximum(low.abs(), high.abs())
        error = (held[:, :, :end].reshape(groups.shape) - groups).abs()
        assert (error <= bound).all(), (error - bound).max()
        assert torch.equal(held[:, :, end:], dense[:, :, end:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 65, 128])
def test_what_fits_the_tail_is_exact(make_store, simd, kind, dtype, tokens):
    k, v = random_kv(2, 2, tokens, 64, dtype=DTYPES[dtype])
    q = torch.randn(2, 4, 1, 64).to(DTYPES[dtype])
    store = make_store(simd=simd, kv_dtype=kind)
    fill(store, k, v, range(1, tokens))
    assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k, v)[0])
    assert all(torch.equal(held, dense) for held, dense in zip(store.read(0), (k, v), strict=True))


def test_attention_stays_near_exact(make_store, simd, kind):
    k, v = random_kv(1, 4, 3000, 128)
    q = torch.randn(1, 8, 4, 128)
    store = make_store(simd=simd, kv_dtype=kind, memory_budget="4MiB")
    fill(store, k, v)
    expected = reference.attention(q, k, v, causal=True)[0]
    error = (store.attend(0, q, causal=True)[0].double() - expected).abs()
    assert 0 < error.max() < EXACT_ATOL[kind]
    assert error.square().mean().sqrt() < EXACT_RMS[kind] * expected.square().mean().sqrt()


@pytest.mark.parametrize("resident", [True, False])
def test_cropping_the_tail_is_exact(make_store, kind, resident):
    tokens = 64 * 5 + 10
    k, v = random_kv(2, 2, tokens, 32)
    other_k, other_v = random_kv(2, 2, 40, 32, seed=1)
    store = make_store(kv_dtype=kind, resident=resident)
    fill(store, k, v)
    before = store.read(0)
    begin = tail_begin(tokens)
    store.truncate(0, begin + 3)
    store.append(0, other_k, other_v)
    for held, was, dense, other in zip(store.read(0), before, (k, v), (other_k, other_v), strict=True):
        assert torch.equal(held[:, :, :begin], was[:, :, :begin])
        assert torch.equal(held[:, :, begin:], torch.cat([dense[:, :, begin : begin + 3], other], dim=2))


@pytest.mark.parametrize("resident", [True, False])
def test_appending_after_a_crop_into_codes_goes_on_from_what_they_hold(make_store, kind, resident):
    k, v = random_kv(2, 2, 64 * 6, 32)
    store = make_store(kv_dtype=kind, resident=resident, memory_budget="1MiB")
    fill(store, k, v)
    before = store.read(0)
    store.truncate(0, 100)
    assert all(torch.equal(held, was[:, :, :100]) for held, was in zip(store.read(0), before, strict=True))
    store.append(0, k[:, :, 100:101], v[:, :, 100:101])
    for held, was, dense in zip(store.read(0), before, (k, v), strict=True):
        assert torch.equal(held[:, :, :100], was[:, :, :100]) and torch.equal(held[:, :, 100], dense[:, :, 100])


def test_rows_that_share_a_tail_share_its_codes(make_store, kind):
    k, v = random_kv(1, 2, 128, 32)
    store = make_store(kv_dtype=kind)
    fill(store, k, v)
    store.reorder(0, [0, 0, 0, 0])
    more_k, more_v = random_kv(4, 2, 100, 32, seed=2)
    store.append(0, more_k, more_v)
    # A page's worth of codes in common for the four, and for each row a partial page and the full one before it.
    pages = store.stats()["stored_bytes"]
    assert store.stats()["pages_resident"] == 4 * 4  # as rows see them
    held = store.read(0)[0]
    assert torch.equal(held[0, :, :64], held[3, :, :64])
    used_before = store.stats()["memory_used_bytes"]
    store.reorder(0, [0])
    assert store.stats()["memory_used_bytes"] <= used_before and store.stats()["stored_bytes"] < pages


def test_a_fork_and_its_source_go_on_by_themselves(make_store, kind):
    k, v = random_kv(1, 2, 200, 32)
    more = [random_kv(1, 2, 200, 32, seed=seed) for seed in (1, 2)]
    store = make_store(kv_dtype=kind)
    fill(store, k, v)
    fork = store.fork()
    for each, (more_k, more_v) in zip((store, fork), more, strict=True):
        each.append(0, more_k, more_v)
    for each, (more_k, more_v) in zip((store, fork), more, strict=True):
        wanted = reference.stored(torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), BITS[kind])
        for held, value in zip(each.read(0), wanted, strict=True):
            torch.testing.assert_close(held.double(), value, atol=1e-6, rtol=1e-6)


def test_pages_take_the_bits_that_were_promised(make_store):
    k, v = random_kv(1, 8, 64 * 40, 128, dtype=torch.bfloat16)
    bits = {}
    for kind in ("bfloat16", "int8", "int4"):
        with make_store(kv_dtype=kind, memory_budget="64MiB") as store:
            fill(store, k, v)
            tail_bytes = 2 * 8 * 64 * 256 * 2 if kind != "bfloat16" else 0
            pages = 38 if kind != "bfloat16" else 40
            bits[kind] = (store.stats()["stored_bytes"] - tail_bytes) * 8 / (pages * 64 * 8 * 256)
    assert bits["bfloat16"] == 16 and bits["int8"] <= 8.6 and bits["int4"] <= 4.6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_the_output(make_store, simd, kind, bad):
    k, v = random_kv(1, 1, 300, 16)
    v[0, 0, 20, 3] = bad
    q = torch.randn(1, 1, 1, 16)
    store = make_store(simd=simd, kv_dtype=kind)
    fill(store, k, v)
    assert not store.attend(0, q)[0].isfinite().all()
    # Where the page is not looked at it does no harm.
    assert store.attend(0, q, kv_begin=64)[0].isfinite().all()


def test_a_failed_append_leaves_the_codes_as_they_were(make_store, kind, monkeypatch):
    k, v = random_kv(2, 2, 64 * 4, 32)
    store = make_store(kv_dtype=kind)
    fill(store, k, v)
    before = store.read(0)
    with pytest.raises((ValueError, StoreFullError)):
        store.append(0, *random_kv(3, 2, 100, 32))
    assert all(torch.equal(held, was) for held, was in zip(store.read(0), before, strict=True))
    store.append(0, k, v)
    assert store.lengths(0) == [512, 512]


@pytest.mark.parametrize("budget", ["1MiB", "3MiB"])
def test_any_budget_holds_any_context(make_store, io_engine, kind, budget):
    k, v = random_kv(6, 2, 1500, 64)
    q = torch.randn(6, 4, 1, 64)
    store = make_store(kv_dtype=kind, memory_budget=budget, io_engine=io_engine)
    for begin in range(0, 1500, 250):
        store.append(0, k[:, :, begin : begin + 250], v[:, :, begin : begin + 250])
    wanted = reference.attention(q, *reference.stored(k, v, BITS[kind]))[0]
    torch.testing.assert_close(store.attend(0, q)[0].double(), wanted, atol=2e-3, rtol=1e-3)
    assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]
