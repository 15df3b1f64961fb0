"""Sparse attention: what it chooses and computes, what it reads and keeps, and that its bounds are bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_attention_equal, fill, random_kv
from test_attention import option_sets

from torch_csd import Adaptive, KVStore, MemoryBudgetError, PageTopK, SparF, StoreClosedError, reference

PAGE = 64
BLOCK = 4096
GAP_BYTES = 32 * 1024  # between runs that are read as one
KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
GROUPS = {"int8": 2, "int4": 1}  # of a page, each with bounds of its own; else 4

# Codes are scored with q in 16 bits: 2**-16 of its largest channel, and so of the scores.
OUT_ATOL = {"int8": 5e-4, "int4": 5e-4}
LSE_ATOL = {"int8": 2e-3, "int4": 2e-3}


def assert_near(ours, expected, kind="float32"):
    """(out, lse, ...) against a reference in float64, over the same stored values."""
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[ours[0].dtype]
    error = (ours[0].double() - expected[0]).abs()
    excess = error - OUT_ATOL.get(kind, 5e-5) - ulp * expected[0].abs()
    assert not (excess > 0).any() and not error.isnan().any(), f"largest error {error.max():.3g}"
    torch.testing.assert_close(ours[1].double(), expected[1], atol=LSE_ATOL.get(kind, 5e-5), rtol=1e-5)


def bytes_read(store, call) -> int:
    before = store.stats()["drive_read_bytes"]
    call()
    return store.stats()["drive_read_bytes"] - before


def tail_begin(tokens: int, kind: str) -> int:
    """First token of the pages that are not summarised: a partial one, and a quantising layer's tail."""
    return max(0, -(-tokens // PAGE) - 2) * PAGE if kind in BITS else tokens // PAGE * PAGE


# ---- SparF ----


def sparf_choice(q, k, *, channels, tokens, local=64, scale=None, step1_k=None):
    """As reference.sparf chooses: channels and tokens, bool, by kv head; and the least relative distance of a token
    that it takes from one that it leaves; 0 if two channels are so near that rounding may tell them apart, or not."""
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    grouped = q.double().reshape(batch, num_kv_heads, -1, head_dim)
    sizes = grouped.abs().sum(2)
    by_size = sizes.sort(dim=2, descending=True, stable=True)
    largest = by_size.indices[:, :, :channels]
    kept = torch.zeros_like(sizes).scatter(2, largest, 1.0)
    share = (grouped.abs() * kept[:, :, None]).sum(3) / grouped.abs().sum(3)
    logits = (grouped * kept[:, :, None]) @ (k if step1_k is None else step1_k).double().mT
    logits = logits * (head_dim**-0.5 if scale is None else scale) / share.sqrt()[..., None]
    summed = torch.softmax(logits, dim=3).sum(2)
    local_begin = max(kv_len - local, 0)
    order = summed[:, :, :local_begin].sort(2, descending=True)
    chosen = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.bool)
    chosen[:, :, local_begin:] = True
    chosen.scatter_(2, order.indices[:, :, :tokens], True)
    margin = 1.0
    if tokens < local_begin:
        taken, left = order.values[:, :, tokens - 1], order.values[:, :, tokens]
        margin = float(((taken - left) / taken).min())
    if channels < head_dim:
        taken, left = by_size.values[:, :, channels - 1], by_size.values[:, :, channels]
        margin = margin if ((taken - left) > 1e-5 * taken).all() else 0.0
    return kept.bool(), chosen, margin


@st.composite
def sparf_cases(draw):
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kv_len, head_dim = draw(st.integers(1, 400)), 8 * draw(st.integers(1, 16))
    return dict(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * group,
        head_dim_k=head_dim,
        head_dim_v=8 * draw(st.integers(1, 16)),
        kv_len=kv_len,
        q_len=draw(st.sampled_from([1, 1, 2, 7, 16])),
        resident=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(DTYPES))),
        splits=tuple(sorted(draw(st.lists(st.integers(1, kv_len), max_size=3)))),
        settings=dict(
            channels=draw(st.sampled_from([1, head_dim // 4, head_dim // 2, head_dim])),
            tokens=draw(st.sampled_from([1, 10, kv_len // 4 + 1, kv_len])),
            local=draw(st.sampled_from([0, 1, 64, 100])),
        ),
        mean_value=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def attend_sparf(make_store, case, *, step1="channels", kind=None, **store_settings):
    """(ours, K and V as they are held, q)."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype = torch.float32 if kind in BITS else DTYPES[case["dtype"]]
    shape = (case["batch"], case["num_kv_heads"], case["kv_len"], case["head_dim_k"], case["head_dim_v"])
    k, v = random_kv(*shape, dtype, case["seed"])
    q = torch.randn(case["batch"], case["num_heads"], case["q_len"], case["head_dim_k"], generator=generator).to(dtype)
    with make_store(kv_dtype=kind, resident=case["resident"], memory_budget="8MiB", **store_settings) as store:
        fill(store, k, v, case["splits"])
        sparse = SparF(**case["settings"], mean_value=case["mean_value"], step1=step1)
        ours = store.attend(0, q, sparse=sparse, return_missing=True)
        held = store.read(0)
    return ours, held, q


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@settings(max_examples=6)
@given(case=sparf_cases())
def test_sparf_is_what_its_formula_says(make_store, simd, kind, case):
    ours, (k, v), q = attend_sparf(make_store, case, kind=kind, simd=simd)
    assume(sparf_choice(q, k, **case["settings"])[2] > 2e-3)
    expected = reference.sparf(q, k, v, **case["settings"], mean_value=case["mean_value"])
    assert_near(ours, expected, kind)
    torch.testing.assert_close(ours[2].double(), expected[2], atol=LSE_ATOL.get(kind, 5e-5), rtol=0)


def sketch(k: torch.Tensor, tokens: int) -> torch.Tensor:
    """What step 1 sees of K: 4-bit codes of the pages before the token, the others as they are."""
    pages = k[:, :, :tokens].bfloat16().float().unflatten(2, (-1, PAGE))
    return torch.cat([reference.quantise(pages, 4, dim=3).flatten(2, 3), k[:, :, tokens:].double()], dim=2)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@settings(max_examples=6)
@given(case=sparf_cases())
def test_sparf_may_score_a_copy_of_the_keys_in_four_bits(make_store, simd, kind, case):
    ours, (k, v), q = attend_sparf(make_store, case, step1="sketch", kind=kind, simd=simd)
    options = case["settings"] | {"channels": case["head_dim_k"]}
    step1_k = sketch(k, tail_begin(case["kv_len"], kind))
    assume(sparf_choice(q, k, **options, step1_k=step1_k)[2] > 1e-2)
    expected = reference.sparf(q, k, v, **options, mean_value=case["mean_value"], step1_k=step1_k)
    # A value between two codes but for its last bit may get either.
    torch.testing.assert_close(ours[0].double(), expected[0], atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(ours[2].double(), expected[2], atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("mean_value", [True, False])
@pytest.mark.parametrize("q_len", [1, 3])
def test_pages_may_be_weighed_by_a_copy_of_the_keys_in_four_bits(make_store, simd, kind, mean_value, q_len):
    tokens = PAGE * 40 + 17
    k, v = random_kv(2, 2, tokens, 64, 40)
    choice = PageTopK(fraction=0.25, by="sketch", mean_value=mean_value)
    store = make_store(kv_dtype=kind, simd=simd, resident=False, sparse=choice)
    fill(store, k, v, (100, 1000, 1030))
    k, v = store.read(0)
    end = tail_begin(tokens, kind)
    of_pages = sketch(k, end)[:, :, :end]
    margin, seed = 0.0, 0
    while margin < 1e-3:  # no near-ties between pages
        seed += 1
        q = torch.randn(2, 6, q_len, 64, generator=torch.Generator().manual_seed(seed)) * 2
        *expected, wrong, margin = reference.page_sketch(q, k, v, of_pages, pages=11, mean_value=mean_value)
    out, lse, missing = store.attend(0, q, return_missing=True)
    # A value between two codes but for its last bit may get either.
    torch.testing.assert_close(out.double(), expected[0], atol=3e-3, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=3e-3, rtol=0)
    # By a tenth at most: how far off the sketch is, seen on the pages that were read.
    assert (missing >= wrong - 1e-3).all() and (missing <= wrong + 0.1).all()
    exact = reference.attention(q, k, v)[0]
    if mean_value:  # what is said to be wrong bounds the error: both distributions of V's rows, of 2.5 at most here
        assert ((out - exact).abs().amax(3) <= 2 * missing * v.abs().amax() + 1e-3).all()


@pytest.mark.parametrize("mass", [0.9, 0.99, 0.999])
def test_an_adaptive_choice_is_as_near_to_the_softmax_as_it_says(make_store, mass):
    k, v = random_kv(1, 2, PAGE * 100, 64, 64)
    q = (
        torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(2))
        * torch.tensor([0.1, 1, 3, 8] * 2)[:, None, None]
    )
    store = make_store(resident=False, sparse=Adaptive(mass=mass))
    fill(store, k, v)
    exact = store.attend(0, q, sparse=None)[0]
    before = store.stats()["drive_read_bytes"]
    out, _, missing = store.attend(0, q, return_missing=True)
    assert store.stats()["drive_read_bytes"] - before <= store.stats()["stored_bytes"]
    assert (missing < 1 - mass).all()
    # Total variation: twice that, of the largest value.
    assert ((out - exact).abs().amax(3) <= 2 * (1 - mass) * v.abs().amax()).all()


@pytest.mark.parametrize("where", ["resident", "drive"])
def test_sparf_of_everything_is_exact(make_store, simd, io_engine, where):
    k, v = random_kv(2, 2, 700, 64, 40, torch.bfloat16)
    q = torch.randn(2, 8, 16, 64).bfloat16()
    store = make_store(simd=simd, io_engine=io_engine, resident=where == "resident")
    fill(store, k, v, (1, 65, 300))
    expected = reference.attention(q, k, v)
    for step1 in ("channels", "sketch"):
        ours = store.attend(0, q, sparse=SparF(channels=1000, tokens=1000, step1=step1), return_missing=True)
        assert_near(ours, expected)
        assert ours[2].abs().max() < 1e-5


def test_sparf_of_a_part_of_the_tokens_counts_only_their_values(make_store):
    """Where the span cuts pages, the mean is that of the tokens inside of it."""
    k, v = random_kv(1, 2, 500, 32)
    v[:, :, :10] += 1000.0
    v[:, :, 450:] -= 1000.0
    q = torch.randn(1, 4, 1, 32)
    store = make_store(resident=False)
    fill(store, k, v)
    settings = dict(channels=32, tokens=20, local=10)
    for begin, end in ((10, 450), (64, 448), (70, 100), (100, 420)):
        ours = store.attend(0, q, sparse=SparF(**settings), kv_begin=begin, kv_end=end)
        assert_near(ours, reference.sparf(q, k[:, :, begin:end], v[:, :, begin:end], **settings))
    store.trim(0, 10)
    store.truncate(0, 450)
    assert_near(
        store.attend(0, q, sparse=SparF(**settings)), reference.sparf(q, k[:, :, 10:450], v[:, :, 10:450], **settings)
    )


# ---- pages by bounds ----

ALL_PAGES = PageTopK(fraction=1.0, local=0, sink=0)


@pytest.mark.parametrize("sparse", [ALL_PAGES, Adaptive(mass=0.999999999, local=0, sink=0, provable=True)], ids=repr)
@settings(max_examples=15)
@given(case=option_sets())
def test_all_pages_are_exact_attention_with_every_option(make_store, simd, sparse, case):
    k, v = random_kv(2, 2, case["kv_len"], 24, 40)
    q = torch.randn(2, 4, case["q_len"], 24, generator=case["generator"])
    with make_store(simd=simd, resident=False) as store:
        fill(store, k, v)
        ours = store.attend(0, q, sparse=sparse, **case["options"])
    assert_near(ours, reference.attention(q, k, v, **case["options"]))


@pytest.mark.parametrize("sparse", [PageTopK(tokens=64), Adaptive(mass=0.1), SparF(channels=8, tokens=1)], ids=str)
def test_more_than_sixteen_queries_are_exact(make_store, sparse):
    k, v = random_kv(2, 2, 700, 32)
    q = torch.randn(2, 4, 17, 32)
    store = make_store(sparse=sparse)
    fill(store, k, v)
    out, lse, missing = store.attend(0, q, causal=True, return_missing=True)
    assert_near((out, lse), reference.attention(q, k, v, causal=True))
    assert (missing == 0).all() and store.stats()["sparse_attends"] == 0
    out, _, missing = store.attend(0, q[:, :, :16], return_missing=True)
    assert (missing > 0).any() and store.stats()["sparse_attends"] == 1


def planted(
    *, batch=1, num_kv_heads=4, group=2, q_len=1, kv_len=2000, head_dim=64, pages=4, heads_per_choice=1, seed=0
):
    """q, K, V; each kv head looks at pages of its own: together, as many for each choice as asked for."""
    generator = torch.Generator().manual_seed(seed)
    k, v = random_kv(batch, num_kv_heads, kv_len, head_dim, seed=seed)
    k *= 0.3
    direction = torch.randn(batch, num_kv_heads, head_dim, generator=generator).sign()
    noise = torch.randn(batch, num_kv_heads, group * q_len, head_dim, generator=generator)
    q = (direction[:, :, None] + 0.1 * noise).reshape(batch, num_kv_heads * group, q_len, head_dim)
    full = kv_len // PAGE
    for row in range(batch):
        order = torch.randperm(full - 4, generator=generator) + 1
        for head in range(num_kv_heads):
            together = min(heads_per_choice, num_kv_heads - head // heads_per_choice * heads_per_choice)
            of_head = head % heads_per_choice
            count = pages // together + (1 if of_head < pages % together else 0)
            mine = head // heads_per_choice * pages + of_head * (pages // together) + min(of_head, pages % together)
            for page in order[mine : mine + count].tolist():
                k[row, head, page * PAGE + 5 : page * PAGE + 30 : 7] += 3 * direction[row, head]
    return q, k, v


PLANTED_SCALE = 0.01  # so flat that every token's share is seen in the output


def always_pages(kv_len: int, kind: str, local: int = 64, sink: int = 64) -> dict[str, int]:
    """local and pages_always of the reference, where a quantising layer's tail is always attended to."""
    local = max(local, kv_len - tail_begin(kv_len, kind))
    first = (kv_len - local) // PAGE if local else -(-kv_len // PAGE)
    return {"local": local, "count": -(-kv_len // PAGE) - first + -(-sink // PAGE)}


@pytest.mark.parametrize("heads_per_choice", [1, 2, 3, 4, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_of_the_best_bounds_are_attended_to(make_store, simd, kind, heads_per_choice):
    q, k, v = planted(batch=2, q_len=3, pages=6, heads_per_choice=min(heads_per_choice, 4), kv_len=2000)
    always = always_pages(2000, kind)
    store = make_store(simd=simd, kv_dtype=kind, resident=False)
    fill(store, k, v, (70, 900))
    wanted = always["count"] + 6
    ours = store.attend(
        0, q, scale=PLANTED_SCALE, sparse=PageTopK(tokens=wanted * PAGE, heads_per_choice=heads_per_choice)
    )
    k, v = store.read(0)
    options = dict(heads_per_choice=min(heads_per_choice, 4), groups=GROUPS.get(kind, 4), local=always["local"])
    *expected, chosen = reference.page_top_k(q, k, v, pages=wanted, scale=PLANTED_SCALE, **options)
    assert (chosen.sum(2) == wanted).all()
    assert_near(ours, expected, kind)
    exact = reference.attention(q, k, v, scale=PLANTED_SCALE)[1]
    assert (exact - ours[1]).min() > 0.1, "what was left out is seen"


@pytest.mark.parametrize("local, sink", [(0, 0), (1, 1), (64, 0), (65, 64), (200, 65), (0, 1000), (5000, 0)])
@pytest.mark.parametrize("kv_len", [64, 640, 700])
def test_the_newest_and_the_first_tokens_are_always_attended_to(make_store, local, sink, kv_len):
    q, k, v = random_kv(1, 1, kv_len, 32)[0][:, :, :1], *random_kv(1, 2, kv_len, 32, seed=1)
    q = torch.cat([q, -q], dim=1)
    store = make_store()
    fill(store, k, v)
    ours = store.attend(0, q, sparse=PageTopK(tokens=1, local=local, sink=sink))
    expected = reference.page_top_k(q, k, v, pages=1, local=local, sink=sink)
    always = expected[2].sum() > 2  # more than the one page: no near-ties
    if always or kv_len == PAGE:
        assert_near(ours, expected[:2])
    else:
        seen = [reference.attention(q, k[:, :, b : b + PAGE], v[:, :, b : b + PAGE])[1] for b in range(0, kv_len, PAGE)]
        for head in range(2):
            assert any(abs(lse[0, head, 0] - ours[1][0, head, 0]) < 1e-4 for lse in seen)


def test_a_fraction_is_of_the_pages_that_there_are(make_store):
    k, v = random_kv(1, 1, 64 * 40, 32)
    q = torch.zeros(1, 1, 1, 32)  # every token has the same share: the lse counts them
    store = make_store()
    fill(store, k, v)
    for fraction, pages in ((1e-9, 2), (0.05, 2), (0.1, 4), (0.1000001, 5), (0.5, 20), (0.999, 40), (1, 40)):
        _, lse = store.attend(0, q, sparse=PageTopK(fraction=fraction))
        assert round(float(lse.exp())) == pages * 64, fraction
    _, lse, missing = store.attend(0, q, sparse=PageTopK(tokens=641), return_missing=True)
    assert round(float(lse.exp())) == 11 * 64 and abs(float(missing) - 29 / 40) < 1e-5
    padding = torch.arange(64 * 40) >= 64 * 20
    _, lse = store.attend(0, q, sparse=PageTopK(fraction=0.5), mask=padding)
    assert round(float(lse.exp())) == 10 * 64, "of those that are seen"


# ---- how much is left out ----


def missing_mass(store, q, **options):
    """(what an attention says that it left out, what it did leave out)."""
    _, lse, missing = store.attend(0, q, return_missing=True, **options)
    exact = store.attend(0, q, **(options | {"sparse": None}))[1]
    return missing.double(), 1 - torch.exp(lse.double() - exact.double()).nan_to_num(1.0)


def peaked(kv_len=64 * 60, *, num_kv_heads=2, group=2, head_dim=64, batch=1, seed=0, offset=0.0):
    """q, K, V; to each head pages in random order matter less and less, by half at each of the first steps."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(batch, num_kv_heads, 1, head_dim, generator=generator)
    direction /= direction.norm(dim=3, keepdim=True)
    level = torch.rand(batch, num_kv_heads, -(-kv_len // PAGE), generator=generator).argsort(2).float()
    level = level.clamp(max=24).repeat_interleave(PAGE, 2)[:, :, :kv_len]
    noise = torch.randn(batch, num_kv_heads, kv_len, head_dim, generator=generator)
    k = 0.02 * noise - 0.25 * level[..., None] * direction
    k += offset * torch.randn(num_kv_heads, 1, head_dim, generator=generator)
    q = 2.8 * direction.repeat_interleave(group, 1) + 0.02 * torch.randn(
        batch, num_kv_heads * group, 1, head_dim, generator=generator
    )
    return q, k, random_kv(batch, num_kv_heads, kv_len, head_dim, seed=seed)[1]


PROVABLE = Adaptive(mass=0.5, provable=True, local=0, sink=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 8.0])
def test_what_is_provably_left_out_is_at_most_what_it_says(make_store, simd, kind, offset):
    q, k, v = peaked(offset=offset)
    store = make_store(simd=simd, kv_dtype=kind, sparse=PROVABLE, memory_budget="32MiB")
    fill(store, k, v, (1, 70, 500, 2000))
    for sparse in (PROVABLE, Adaptive(mass=0.9, provable=True, heads_per_choice=2)):
        for options in ({}, {"softcap": 20.0}, {"alibi_slopes": torch.tensor([0.02, 0.0, 0.01, 0.05])}):
            said, left_out = missing_mass(store, q, scale=1.0, sparse=sparse, **options)
            assert (said + 1e-5 >= left_out).all(), (said, left_out)
            assert (left_out < 1 - sparse.mass + 1e-5).all()
    said, left_out = missing_mass(store, q, scale=1.0, sparse=PROVABLE)
    assert (left_out > 0).any() or offset > 0, "something was left out"


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_bounds_stay_bounds_when_full_blocks_are_cut_and_filled_again(make_store, kind):
    """A block of bounds is kept in 4 bits when it is full; cut, it goes on from what those tell."""
    q, k, v = peaked(offset=8.0)
    q = q + 0.3 * torch.randn(1, 4, 16, 64)
    store = make_store(kv_dtype=kind, sparse=PROVABLE, memory_budget="32MiB")
    fill(store, k, v)
    more_k, more_v = k.flip(2), v.flip(2)
    for length in (3500, 3000, 2100, 1990, 700, 100):
        store.truncate(0, length)
        for begin in (0, 50, 60, 300):
            store.append(0, more_k[:, :, begin : begin + 60], more_v[:, :, begin : begin + 60])
            said, left_out = missing_mass(store, q, scale=1.0)
            assert (said + 1e-5 >= left_out).all(), (length, (left_out - said).max())


def test_bounds_stay_bounds_when_what_a_full_block_tells_is_rounded_again(make_store):
    """One channel for each query, in which four pages are best and one is next: its bound has next to no slack."""
    generator = torch.Generator().manual_seed(0)
    channels, pages = 128, 16  # 16 pages are a block
    values = torch.ones(channels, pages)
    values[:, [1, 4, 7, 9]] = 1.995
    values[:, 12] = (1.7 + 0.15 * torch.rand(channels, generator=generator)).bfloat16().float()
    k = values.repeat_interleave(PAGE, 1).T[None, None].contiguous()
    q = 20 * torch.eye(channels).reshape(1, 8, 16, channels)
    store = make_store(sparse=Adaptive(mass=0.001, provable=True, local=0, sink=0))
    fill(store, k, torch.zeros_like(k))
    for _ in range(3):
        said, left_out = missing_mass(store, q, scale=1.0)
        assert (left_out > 0.001).any()
        assert (said + 1e-5 >= left_out).all(), (left_out - said).max()
        store.truncate(0, 14 * PAGE)
        store.append(0, k[:, :, 15 * PAGE :], k[:, :, 15 * PAGE :])  # not full any more


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_an_adaptive_choice_leaves_out_no_more_than_it_may(make_store, kind):
    q, k, v = peaked(64 * 200)
    store = make_store(kv_dtype=kind, resident=False, memory_budget="32MiB", read_ahead=0, sparse=Adaptive())
    fill(store, k, v)
    dense = bytes_read(store, lambda: store.attend(0, q, scale=1.0, sparse=None))
    reads = []
    for mass in (0.3, 0.9, 0.99, 0.9999, 0.99999999):
        said, left_out = missing_mass(store, q, scale=1.0, sparse=Adaptive(mass=mass))
        assert (left_out <= 1 - mass + 1e-5).all()
        reads.append(bytes_read(store, lambda mass=mass: store.attend(0, q, scale=1.0, sparse=Adaptive(mass=mass))))
    assert reads == sorted(reads) and reads[0] < reads[-1], reads
    assert reads[2] < dense / 4, "it is enough to read a few pages"


# ---- what is read ----


def run_bytes(parts: list[tuple[int, int]], bytes_max: int) -> int:
    """Of reads for these parts of the file: whole blocks; what lies near is read as one."""
    runs: list[list[int]] = []
    for begin, end in sorted((begin // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK) for begin, end in parts):
        if runs and end <= runs[-1][1]:
            continue
        if runs and begin <= runs[-1][1] + GAP_BYTES and end - runs[-1][0] <= bytes_max:
            runs[-1][1] = end
        else:
            runs.append([begin, end])
    return sum(end - begin for begin, end in runs)


def layout(kind: str, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Bytes of a tile and of a page."""
    if kind in BITS:
        tile = -(-(64 * 2 * head_dim * BITS[kind] // 8 + 4 * head_dim + 4 * 64) // 64) * 64
    else:
        tile = 64 * 2 * head_dim * DTYPES[kind].itemsize
    return tile, -(-num_kv_heads * tile // BLOCK) * BLOCK


def read_bytes_max(kind: str, num_kv_heads: int, head_dim: int) -> int:
    """Of a run: 1 MiB, a slot where a store has 32 MiB and two threads, in whole pages of full precision."""
    page = layout("float32" if kind in BITS else kind, num_kv_heads, head_dim)[1]
    return 2**20 // page * page


@pytest.mark.parametrize("heads_per_choice", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [24, 128])
def test_what_is_read_is_the_tiles_that_were_chosen(make_store, io_engine, kind, heads_per_choice, head_dim):
    kv_len = 64 * 70 + 10
    q, k, v = planted(kv_len=kv_len, head_dim=head_dim, pages=7, heads_per_choice=heads_per_choice)
    always = always_pages(kv_len, kind)
    wanted = always["count"] + 7
    sparse = PageTopK(tokens=wanted * PAGE, heads_per_choice=heads_per_choice)
    store = make_store(
        kv_dtype=kind,
        resident=False,
        memory_budget="32MiB",
        threads=2,
        read_ahead=0,
        io_engine=io_engine,
        sparse=sparse,
    )
    fill(store, k, v)
    read = bytes_read(store, lambda: store.attend(0, q))
    k, v = store.read(0)
    tile, page = layout(kind, 4, head_dim)
    groups = GROUPS.get(kind, 4)
    chosen = reference.page_top_k(q, k, v, pages=wanted, heads_per_choice=heads_per_choice, groups=groups,
                                  local=always["local"])[2][0]  # fmt: skip
    end = tail_begin(kv_len, kind) // PAGE
    parts = [
        (index * page + head * tile, index * page + (head + 1) * tile)
        for head, index in chosen[:, :end].nonzero().tolist()
    ]
    if heads_per_choice == 4:  # whole pages, with what rounds them up
        parts = [(index * page, (index + 1) * page) for index in chosen[0, :end].nonzero()[:, 0].tolist()]
    assert read == run_bytes(parts, read_bytes_max(kind, 4, head_dim))
    assert read < kv_len * PAGE * page / 2


@pytest.mark.parametrize("kind", KINDS)
def test_reads_that_begin_while_others_are_chosen_read_no_more(make_store, io_engine, kind):
    # With few heads known the gaps between reads are wider: fewer of them are read through. Nothing is read twice but
    # blocks in which a tile of one head ends and that of the next one begins: in the two pages that all heads want.
    head_dim, kv_len = 128, 64 * 270 + 10
    q, k, v = planted(kv_len=kv_len, head_dim=head_dim, pages=40)
    sparse = PageTopK(tokens=44 * PAGE)
    same = {"kv_dtype": kind, "resident": False, "memory_budget": "64MiB", "threads": 2, "io_engine": io_engine}
    stores = [make_store(**same, sparse=sparse, read_ahead=read_ahead) for read_ahead in (0, None)]
    results = []
    for store in stores:
        fill(store, k, v)
        outs: list[torch.Tensor] = []
        results.append((bytes_read(store, lambda store=store, outs=outs: outs.extend(store.attend(0, q))), *outs))
    (at_once, *expected), (begun, *actual) = results
    assert 0 < begun <= at_once + 2 * 3 * BLOCK
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)  # other workers, another order of sums
    ahead = stores[1].stats()
    assert 0 < ahead["read_ahead_bytes"] and ahead["read_ahead_wasted_bytes"] < ahead["read_ahead_bytes"]


@pytest.mark.parametrize("sparse", [PageTopK(tokens=12 * PAGE), Adaptive(mass=0.9)], ids=["pages", "adaptive"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_guess_has_right_is_there_and_what_it_has_wrong_changes_nothing(make_store, io_engine, kind, sparse):
    q, k, v = planted(batch=2, kv_len=64 * 190 + 10, head_dim=128, pages=10)
    store = make_store(
        kv_dtype=kind, resident=False, memory_budget="64MiB", threads=2, io_engine=io_engine, sparse=sparse
    )
    fill(store, k, v)
    expected = store.attend(0, q)

    def attend_after(guess: torch.Tensor, **how) -> tuple[int, int]:
        before = store.stats()
        store.prefetch(0, guess, **how)
        for left, right in zip(store.attend(0, q), expected, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        after = store.stats()
        return tuple(after[name] - before[name] for name in ("guessed_bytes", "guessed_used_bytes"))

    guessed, used = attend_after(q)
    assert used > 0.6 * guessed > 0  # blocks that two tiles share are guessed twice and used once
    wrong = {"guess": -q, "sparse": PageTopK(tokens=40 * PAGE, local=0, sink=0, by=sparse.by)}
    guessed, used = attend_after(**wrong)
    assert used < 0.5 * guessed
    for _ in range(12):
        attend_after(**wrong)
    assert attend_after(**wrong) == (0, 0), "guesses that prove wrong are not read for"
    for _ in range(63):
        store.prefetch(0, q)
    assert attend_after(q)[1] > 0, "but now and then one is tried"


def test_nothing_is_read_for_a_guess_where_nothing_would_be_chosen(make_store):
    q, k, v = planted(kv_len=64 * 40)
    sparse = PageTopK(tokens=PAGE * 4)
    for kept, call in (
        ({"sparse": sparse, "read_ahead": 0}, {}),
        ({}, {}),
        ({"sparse": sparse}, {"sparse": None}),
        ({}, {"sparse": sparse}),  # no bounds are kept: to choose, all pages would have to be read
        ({"sparse": sparse}, {"sparse": SparF(channels=8, tokens=64)}),
    ):
        store = make_store(resident=False, memory_budget="32MiB", **kept)
        fill(store, k, v)
        assert bytes_read(store, lambda store=store, call=call: store.prefetch(0, q, **call)) == 0
        assert bytes_read(store, lambda store=store: store.prefetch(0, q.repeat(1, 1, 20, 1))) == 0
    with pytest.raises(ValueError, match="q's head_dim"):
        store.prefetch(0, q[..., :8], sparse=sparse)
    with pytest.raises(ValueError, match="softcap must be positive"):
        store.prefetch(0, q, softcap=-1.0, sparse=sparse)
    with pytest.raises(TypeError, match="sparse must be"):
        store.prefetch(0, q, sparse=0.5)
    store.close()
    with pytest.raises(StoreClosedError):
        store.prefetch(0, q)


@pytest.mark.parametrize("step1", ["channels", "sketch"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_sparf_reads_is_channels_and_then_tiles(make_store, kind, step1):
    kv_len, head_dim, heads = 64 * 50 + 10, 128, 4
    q, k, v = planted(kv_len=kv_len, head_dim=head_dim, num_kv_heads=heads, q_len=1)
    q[..., 40:] *= 0.001  # the channels that matter lie together
    options = dict(channels=20, tokens=16)
    sparse = SparF(**options, step1=step1)
    store = make_store(kv_dtype=kind, resident=False, memory_budget="32MiB", threads=2, read_ahead=0, sparse=sparse)
    fill(store, k, v)
    read = bytes_read(store, lambda: store.attend(0, q, scale=0.1))
    k, v = store.read(0)
    tile, page = layout(kind, heads, head_dim)
    pages = tail_begin(kv_len, kind) // PAGE
    if step1 == "sketch":
        options |= {"channels": head_dim, "step1_k": sketch(k, pages * PAGE)}
    channels, chosen, margin = sparf_choice(q, k, scale=0.1, **options)
    assert margin > 1e-4
    step_one = []
    for head in range(heads if step1 == "channels" else 0):
        which = channels[0, head].nonzero()[:, 0]
        begin, end = 0, tile
        if kind not in BITS:
            begin, end = (
                channel * PAGE * DTYPES[kind].itemsize
                for channel in (int(which.min()) // 8 * 8, -(-(int(which.max()) + 1) // 8) * 8)
            )
        step_one += [(i * page + head * tile + begin, i * page + head * tile + end) for i in range(pages)]
    tiles = chosen[0, :, : pages * PAGE].unflatten(1, (pages, PAGE)).any(2)
    step_two = [(i * page + head * tile, i * page + (head + 1) * tile) for head, i in tiles.nonzero().tolist()]
    bytes_max = read_bytes_max(kind, heads, head_dim)
    assert read == run_bytes(step_one, bytes_max) + run_bytes(step_two, bytes_max)


# ---- what is kept in memory ----


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_take_two_percent_of_the_cache_at_most(make_store, kind):
    heads, head_dim, tokens = 2, 128, 64 * 100
    store = make_store(kv_dtype=kind, memory_budget="64MiB", sparse=PageTopK(fraction=0.1))
    fill(store, *random_kv(1, heads, tokens, head_dim))
    stats = store.stats()
    filling = heads * 2 * PAGE * head_dim * 2
    assert 0 < stats["summary_bytes"] <= 0.02 * stats["stored_bytes"] + filling
    assert stats["memory_used_bytes"] <= stats["memory_budget_bytes"]


def test_an_append_whose_summaries_find_no_room_changes_nothing(make_store):
    k, v = random_kv(24, 8, 200, 128, dtype=torch.bfloat16)
    without = make_store(memory_budget="4MiB")
    without.append(0, k, v)
    store = make_store(memory_budget="4MiB", sparse=PageTopK(fraction=0.1))
    store.append(0, k[:, :, :60], v[:, :, :60])
    for _ in range(2):
        with pytest.raises(MemoryBudgetError, match="no room for .* raise it"):
            store.append(0, k[:, :, 60:], v[:, :, 60:])
        assert store.lengths(0) == [60] * 24
    assert torch.equal(store.read(0)[0], k[:, :, :60]) and torch.equal(store.read(0)[1], v[:, :, :60])
    assert store.stats()["memory_used_bytes"] <= store.stats()["memory_budget_bytes"]
    store.append(0, k[:, :, 60:62], v[:, :, 60:62])
    q = torch.randn(24, 8, 1, 128).bfloat16()
    assert_attention_equal(store.attend(0, q)[0], reference.attention(q, k[:, :, :62], v[:, :, :62])[0])


def test_summaries_that_are_missing_are_made_by_one_pass(make_store, io_engine):
    k, v = random_kv(2, 2, 2000, 64)
    q = torch.randn(2, 4, 1, 64)
    for sparse in (ALL_PAGES, SparF(channels=64, tokens=10_000, step1="sketch")):
        store = make_store(resident=False, read_ahead=0, io_engine=io_engine)
        fill(store, k, v)
        dense = bytes_read(store, lambda store=store: store.attend(0, q))
        store.sparse = sparse
        first = bytes_read(store, lambda store=store: store.attend(0, q))
        second = bytes_read(store, lambda store=store: store.attend(0, q))
        kinds = 2 if isinstance(sparse, SparF) else 1
        assert first == second + kinds * dense
        fill(store, k, v)
        third = bytes_read(store, lambda store=store: store.attend(0, q))
        assert third == bytes_read(store, lambda store=store: store.attend(0, q))
        assert_near(store.attend(0, q), reference.attention(q, torch.cat([k, k], 2), torch.cat([v, v], 2)))


# ---- input that is unlike what one expects ----

EVERY_WAY = [
    PageTopK(fraction=0.1),
    PageTopK(tokens=64, local=0, sink=0, heads_per_choice=2),
    Adaptive(mass=0.9),
    Adaptive(mass=0.5, provable=True),
    SparF(channels=8, tokens=10),
    SparF(channels=32, tokens=1, local=0, mean_value=False, step1="sketch"),
]


@pytest.fixture(params=EVERY_WAY, ids=repr)
def sparse(request):
    return request.param


def test_rows_may_be_empty_or_shorter_than_a_page(make_store, sparse):
    k, v = random_kv(5, 2, 700, 32)
    lengths = [0, 700, 3, 0, 64]
    q = torch.randn(5, 4, 2, 32)
    store = make_store(sparse=sparse, resident=False)
    store.append(0, k, v, lengths=lengths)
    out, lse, missing = store.attend(0, q, return_missing=True)
    for row, length in enumerate(lengths):
        if length == 0:
            assert (out[row] == 0).all() and (lse[row] == -torch.inf).all() and (missing[row] == 0).all()
        else:
            alone = make_store(sparse=sparse)
            alone.append(0, k[row, None, :, :length], v[row, None, :, :length])
            assert_near((out[row, None], lse[row, None]), [r.double() for r in alone.attend(0, q[row, None])])
    # A store whose rows are all empty.
    store.truncate(0, 0)
    out, lse = store.attend(0, q)
    assert (out == 0).all() and (lse == -torch.inf).all()
    store.append(0, k, v, lengths=lengths)
    assert torch.equal(store.attend(0, q)[1][0], torch.full((4, 2), -torch.inf))


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity(make_store, sparse):
    k, v = random_kv(2, 2, 300, 32)
    q = torch.randn(2, 4, 2, 32)
    store = make_store(sparse=sparse)
    store.append(0, k, v)
    nothing = torch.zeros(2, 1, 1, 300, dtype=torch.bool)
    per_query = torch.zeros(2, 4, 2, 300)
    per_query[:, :, 1] = -torch.inf
    for options in ({"mask": nothing}, {"kv_begin": 100, "kv_end": 100}):
        out, lse = store.attend(0, q, **options)
        assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = store.attend(0, q, mask=per_query)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all() and out[:, :, 0].isfinite().all()
    out, lse = store.attend(0, q, mask=nothing, sinks=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (out == 0).all() and torch.equal(lse[0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("kind", [None, "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_looked_at(make_store, sparse, kind, bad):
    """As in exact attention; whatever shares a block of bounds with them is looked at, too."""
    k, v = random_kv(1, 2, 64 * 40, 32)
    k[0, 0, 64 * 3 + 5, 3] = bad
    q = torch.randn(1, 4, 1, 32).abs()
    q[..., 3] = 5.0
    store = make_store(sparse=sparse, resident=False, kv_dtype=kind)
    fill(store, k, v)
    exact = store.attend(0, q, sparse=None)[0]
    assert exact[:, :2].isnan().all() and exact[:, 2:].isfinite().all()
    out = store.attend(0, q)[0]
    assert out[:, :2].isnan().all() and out[:, 2:].isfinite().all()
    assert store.stats()["missing_mass_mean"] >= 0, "what is not a number is not counted"
    out = store.attend(0, q, kv_begin=64 * 16)[0]
    assert out.isfinite().all(), "where it is not seen it does no harm"


def test_settings_that_are_too_large_mean_everything(make_store):
    k, v = random_kv(1, 2, 300, 32)
    q = torch.randn(1, 4, 1, 32)
    most = 2**62
    store = make_store()
    store.append(0, k, v)
    exact = [result.double() for result in store.attend(0, q)]
    for sparse in (
        PageTopK(tokens=most),
        PageTopK(fraction=1.0, heads_per_choice=most),
        PageTopK(tokens=1, local=most),
        PageTopK(tokens=1, sink=most),
        SparF(channels=most, tokens=most),
        SparF(channels=most, tokens=1, local=most),
    ):
        assert_near(store.attend(0, q, sparse=sparse), exact)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: PageTopK(), ValueError, "either fraction= or tokens="),
        (lambda: PageTopK(fraction=0.5, tokens=5), ValueError, "either fraction= or tokens="),
        (lambda: PageTopK(fraction=0.0), ValueError, "fraction must be in"),
        (lambda: PageTopK(fraction=float("nan")), ValueError, "fraction must be in"),
        (lambda: PageTopK(fraction=1.5), ValueError, "fraction must be in"),
        (lambda: PageTopK(fraction="0.5"), TypeError, "fraction must be a number, got '0.5'"),
        (lambda: PageTopK(tokens=0), ValueError, "tokens must be at least 1"),
        (lambda: PageTopK(tokens=1.5), TypeError, "tokens must be an int"),
        (lambda: PageTopK(tokens=5, local=-1), ValueError, "local must be at least 0"),
        (lambda: PageTopK(tokens=5, sink=None), TypeError, "sink must be an int"),
        (lambda: PageTopK(tokens=5, heads_per_choice=0), ValueError, "heads_per_choice must be at least 1"),
        (lambda: Adaptive(mass=1.0), ValueError, "mass must be in"),
        (lambda: Adaptive(mass=float("nan")), ValueError, "mass must be in"),
        (lambda: Adaptive(mass=None), TypeError, "mass must be a number, got None"),
        (lambda: Adaptive(provable="yes"), TypeError, "provable must be True or False, got 'yes'"),
        (lambda: SparF(channels=0, tokens=1), ValueError, "channels must be at least 1"),
        (lambda: SparF(channels=1, tokens=0), ValueError, "tokens must be at least 1"),
        (lambda: SparF(channels=1, tokens=1, mean_value=2), TypeError, "mean_value must be True or False, got 2"),
        (lambda: SparF(channels=1, tokens=1, step1="x"), ValueError, "step1 must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("wrong", ["x", 0.5, True, PageTopK, pytest.param(object(), id="an object")], ids=repr)
def test_what_is_no_setting_is_refused(make_store, tmp_path, wrong):
    store = make_store()
    store.append(0, *random_kv(1, 1, 10, 16))
    for call in (
        lambda: KVStore(tmp_path, sparse=wrong),
        lambda: store.attend(0, torch.zeros(1, 1, 1, 16), sparse=wrong),
        lambda: setattr(store, "sparse", wrong),
    ):
        with pytest.raises(TypeError, match="sparse must be SparF"):
            call()
    assert store.sparse is None
