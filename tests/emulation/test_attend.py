"""Attention kernels against float64 attention, on the sources themselves: see shim.h."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from emulation.emulated_device import EmulatedDevice, compiler
from emulation.page_images import PageImages
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_attention_equal, random_kv

from torch_csd import reference
from torch_csd.cuda import kernels as kernels_module
from torch_csd.cuda.kernels import Kernels, Pages, Rules
from torch_csd.cuda.layout import PageLayout

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulation needs g++")

KERNELS = Kernels(EmulatedDevice())
STREAM = KERNELS.device.current_stream()
# Each instance takes g++ a second: few, but of every kind of element with whole and with odd blocks.
ELEMENTS = {
    "float32": [(64, 64), (24, 8)],
    "bfloat16": [(64, 128), (40, 104)],
    "float16": [(128, 64), (8, 16)],
    "int8": [(64, 64), (24, 88)],
    "int4": [(128, 128), (40, 104)],
}


def layout_of(element: str, num_kv_heads: int, head_dim_k: int, head_dim_v: int) -> PageLayout:
    code_bits = {"int8": 8, "int4": 4}.get(element, 0)
    return PageLayout(num_kv_heads, head_dim_k, head_dim_v, DTYPES.get(element, torch.bfloat16), code_bits)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(q, images, layout, rules, portions=None, sinks=None, dtype=torch.float32):
    partial = KERNELS.new_partial(*q.shape[:3], layout.head_dim_v)
    for pages in [images.all_pages()] if portions is None else portions:
        KERNELS.attend(q, pages, layout, rules, partial, stream=STREAM)
    return KERNELS.merge([partial], dtype=dtype, sinks=sinks, stream=STREAM)


def assert_equals_reference(out, lse, q, images, rules, sinks=None, **options):
    """Row by row, since lengths differ; rules that reference.attention has no words for become its mask."""
    for row, length in enumerate(images.lengths):
        k, v = images.k[row, None, :, :length], images.v[row, None, :, :length]
        key = torch.arange(length)
        seen = (key >= rules.kv_begin).expand(q.shape[2], length)
        position = None if rules.positions is None else (int(rules.positions[row]) + torch.arange(q.shape[2]))[:, None]
        if rules.causal:
            seen = seen & (key <= position)
        if rules.window is not None:
            seen = seen & (key > position - rules.window)
        bias = torch.zeros(1, q.shape[1], q.shape[2], length, dtype=torch.float64)
        if rules.mask is not None:
            mask = rules.mask.expand(q.shape[0], q.shape[1], q.shape[2], -1)[row, None]
            column = key - rules.mask_begin
            has_column = (column >= 0) & (column < mask.shape[3])
            seen = seen & has_column
            bias = bias + mask[..., column.clamp(0, mask.shape[3] - 1)]
        if rules.alibi_slopes is not None:
            bias = bias + rules.alibi_slopes.double()[None, :, None, None] * (key - position)
        bias = bias.masked_fill(~seen, -torch.inf)
        expected, expected_lse = reference.attention(
            q[row, None], k, v, scale=rules.scale, softcap=rules.softcap, mask=bias, sinks=sinks
        )
        assert_attention_equal(out[row, None], expected)
        torch.testing.assert_close(lse[row, None].double(), expected_lse, atol=3e-5, rtol=1e-5)


@st.composite
def cases(draw):
    element = draw(st.sampled_from(list(ELEMENTS)))
    head_dim_k, head_dim_v = draw(st.sampled_from(ELEMENTS[element]))
    group, q_len = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 1), (3, 5), (1, 19), (12, 1)]))
    lengths = draw(st.lists(st.integers(0, 330), min_size=1, max_size=2))
    if max(lengths) == 0:
        lengths[0] = 1
    return dict(
        element=element, head_dim_k=head_dim_k, head_dim_v=head_dim_v, group=group, q_len=q_len, lengths=lengths,
        num_kv_heads=draw(st.sampled_from([1, 2])),
        scale=draw(st.sampled_from([None, 0.3])),
        kv_begin=draw(st.sampled_from([0, 0, 5, 70])),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        causal=draw(st.booleans()),
        ahead=draw(st.sampled_from([0, 0, -30, 40])),
        window=draw(st.sampled_from([None, None, 1, 50, 130])),
        mask=draw(st.sampled_from([None, None, "padding", "full", "few columns"])),
        alibi=draw(st.sampled_from([False, False, True])),
        sinks=draw(st.booleans()),
        portions=draw(st.sampled_from([1, 1, 3])),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@given(cases())
@settings(max_examples=50)
def test_attention_over_pages_is_attention(case):
    generator = torch.Generator().manual_seed(case["seed"])
    layout = layout_of(case["element"], case["num_kv_heads"], case["head_dim_k"], case["head_dim_v"])
    batch, num_heads, tokens = len(case["lengths"]), case["num_kv_heads"] * case["group"], max(case["lengths"])
    dtype = DTYPES.get(case["element"], torch.bfloat16)
    k, v = random_kv(batch, layout.num_kv_heads, tokens, *layout[1:3], dtype=dtype, seed=case["seed"])
    q = torch.randn(batch, num_heads, case["q_len"], layout.head_dim_k, generator=generator).to(dtype)
    images = PageImages(KERNELS, k, v, layout, case["lengths"])
    mask, mask_begin = None, 0
    if case["mask"] == "padding":
        mask = torch.zeros(batch, 1, 1, tokens).masked_fill(torch.rand(batch, 1, 1, tokens) < 0.3, -torch.inf)
    elif case["mask"] == "full":
        mask = torch.randn(batch, num_heads, case["q_len"], tokens, generator=generator)
        mask[:, :, 0] = -torch.inf
    elif case["mask"] == "few columns":
        mask, mask_begin = torch.randn(1, num_heads, 1, 90, generator=generator), 37
    rules = Rules(
        scale=case["scale"] or layout.head_dim_k**-0.5,
        kv_end=int32(case["lengths"]),
        kv_begin=case["kv_begin"],
        softcap=case["softcap"],
        positions=int32([length - case["q_len"] + case["ahead"] for length in case["lengths"]]),
        causal=case["causal"],
        window=case["window"],
        mask=mask,
        mask_begin=mask_begin,
        alibi_slopes=torch.rand(num_heads, generator=generator) * 0.2 if case["alibi"] else None,
    )
    # Pages in any order, and in several calls: partial results merge.
    portions = [[[] for _ in range(batch)] for _ in range(case["portions"])]
    shuffled = random.Random(case["seed"])
    for row, length in enumerate(case["lengths"]):
        for page in shuffled.sample(range(-(-length // 64)), -(-length // 64)):
            shuffled.choice(portions)[row].append((row, page))
    portions = [images.pages(rows) for rows in portions]
    sinks = torch.randn(num_heads, generator=generator) if case["sinks"] else None
    out, lse = attend(q, images, layout, rules, portions, sinks, dtype)
    assert_equals_reference(out, lse, q, images, rules, sinks)


@pytest.mark.parametrize(
    ("element", "head_dim_k", "head_dim_v"),
    [("bfloat16", 192, 128), ("bfloat16", 576, 512), ("int4", 256, 256), ("int8", 576, 512), ("float32", 576, 64)],
)
def test_wide_heads_are_attended_to(element, head_dim_k, head_dim_v):
    layout = layout_of(element, 1, head_dim_k, head_dim_v)
    k, v = random_kv(1, 1, 200, head_dim_k, head_dim_v, dtype=DTYPES.get(element, torch.bfloat16))
    images = PageImages(KERNELS, k, v, layout, [200])
    q = torch.randn(1, 1, head_dim_k, 20).permute(0, 3, 1, 2)
    rules = Rules(scale=head_dim_k**-0.5, kv_end=int32([200]))
    q = q.to(layout.dtype)
    assert_equals_reference(*attend(q, images, layout, rules), q, images, rules)


@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16"])
def test_queries_may_have_another_dtype_than_pages(element, q_dtype):
    layout = layout_of(element, 1, 64, 64)
    k, v = random_kv(1, 1, 100, 64, dtype=DTYPES[element])
    images = PageImages(KERNELS, k, v, layout, [100])
    q = (torch.randn(1, 4, 1, 64) * 3).to(DTYPES[q_dtype])
    rules = Rules(scale=0.125, kv_end=int32([100]))
    assert_equals_reference(*attend(q, images, layout, rules), q, images, rules)


@pytest.mark.parametrize("element", ELEMENTS)
def test_magnitudes_do_not_matter(element):
    """Large scales, tiny ones, and groups that are constant: what float16's few exponents must survive."""
    layout = layout_of(element, 1, *ELEMENTS[element][0])
    k, v = random_kv(1, 1, 192, *layout[1:3])
    k[..., ::3] *= 200
    k[..., 1::3] *= 1e-3
    k[..., 2] = 7.0
    v = v * (10.0 ** torch.randint(-4, 3, (192, 1)).float())
    q = torch.randn(1, 2, 1, layout.head_dim_k) * 1e-2
    k, v, q = (x.to(layout.dtype) for x in (k, v, q))
    images = PageImages(KERNELS, k, v, layout, [190])
    rules = Rules(scale=0.125, kv_end=int32([190]))
    out, lse = attend(q, images, layout, rules)
    expected, expected_lse = reference.attention(q, images.k[:, :, :190], images.v[:, :, :190], scale=0.125)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected, atol=2e-5 * float(v[:, :, :190].abs().max()), rtol=0)


@pytest.mark.parametrize("element", ["bfloat16", "int8"])
def test_many_queries_take_torchs_matrix_products(element, monkeypatch):
    monkeypatch.setattr(kernels_module, "MANY_QUERIES", 1)
    monkeypatch.setattr(kernels_module, "UNPACKED_BYTES", 1)  # a page at a time
    layout = layout_of(element, 2, *ELEMENTS[element][1])
    k, v = random_kv(2, 2, 250, *layout[1:3], dtype=torch.bfloat16)
    lengths = [250, 130]
    images = PageImages(KERNELS, k, v, layout, lengths)
    q = torch.randn(2, 9, 4, layout.head_dim_k).to(torch.bfloat16).transpose(1, 2)  # as a model lays it out
    rules = Rules(
        scale=0.2, kv_end=int32(lengths), kv_begin=3, softcap=5.0, positions=int32([241, 125]), causal=True, window=140,
        mask=torch.randn(2, 1, 9, 240), mask_begin=5, alibi_slopes=torch.tensor([0.1, 0.0, -0.1, 0.2]),
    )  # fmt: skip
    launched = len(KERNELS.device.launches)
    out, lse = attend(q, images, layout, rules)
    assert not any("attend" in kernel.expression for kernel in KERNELS.device.launches[launched:])
    assert_equals_reference(out, lse, q, images, rules)
    unseen = dataclasses.replace(rules, mask=torch.full((1, 1, 1, 250), -torch.inf), mask_begin=0)
    out, lse = attend(q, images, layout, unseen)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_what_nobody_sees_is_empty():
    layout = layout_of("bfloat16", 1, 64, 128)
    k, v = random_kv(2, 1, 128, 64, 128, dtype=torch.bfloat16)
    images = PageImages(KERNELS, k, v, layout, [128, 128])
    q = torch.randn(2, 2, 1, 64).to(torch.bfloat16)
    masked = torch.full((1, 1, 1, 128), -torch.inf)
    for rules in (
        Rules(scale=1.0, kv_end=int32([0, 0])),
        Rules(scale=1.0, kv_end=int32([128, 128]), kv_begin=500),
        Rules(scale=1.0, kv_end=int32([128, 128]), mask=masked),
        Rules(scale=1.0, kv_end=int32([128, 128]), causal=True, positions=int32([-5, -1])),
    ):
        out, lse = attend(q, images, layout, rules)
        assert (out == 0).all() and (lse == -torch.inf).all()
    rules = Rules(scale=1.0, kv_end=int32([128, 128]))
    nothing = Pages.of([[], []], torch.device("cpu"))
    out, lse = attend(q, images, layout, rules, [nothing])
    assert (out == 0).all() and (lse == -torch.inf).all()
    sinks = torch.tensor([0.5, -1.0])
    out, lse = attend(q, images, layout, rules, [nothing], sinks)
    assert (out == 0).all() and torch.equal(lse, sinks[None, :, None].expand(2, 2, 1))


@pytest.mark.parametrize("element", ["float32", "bfloat16", "int4"])
def test_a_nan_that_counts_is_not_hidden(element):
    layout = layout_of(element, 1, *ELEMENTS[element][0])
    k, v = random_kv(1, 1, 64, *layout[1:3], dtype=layout.dtype)
    k[0, 0, 10, 3] = torch.nan
    images = PageImages(KERNELS, k, v, layout, [64])
    q = torch.randn(1, 1, 1, layout.head_dim_k).to(layout.dtype)
    out, lse = attend(q, images, layout, Rules(scale=1.0, kv_end=int32([64])))
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_results_merge_in_any_number(dtype):
    partials = [kernels_module.Partial(torch.randn(2, 3, 2, 40), torch.randn(2, 3, 2) * 4) for _ in range(8)]
    partials[2].lse[:] = -torch.inf
    partials[2].out[:] = torch.nan  # of an empty partial nothing is read
    partials[5].lse[1, 2] = -torch.inf
    sinks = torch.tensor([1.0, -torch.inf, 3.0])
    for count in (1, 3, 8):
        out, lse = KERNELS.merge(partials[:count], dtype=DTYPES[dtype], sinks=sinks, stream=STREAM)
        expected = torch.zeros(2, 3, 2, 40, dtype=torch.float64)
        expected_lse = sinks.double()[None, :, None].expand(2, 3, 2)
        for partial in partials[:count]:
            partial_out = torch.where(partial.lse.isinf()[..., None], 0.0, partial.out).double()
            expected, expected_lse = reference.merge(expected, expected_lse, partial_out, partial.lse.double())
        assert out.dtype == DTYPES[dtype]
        assert_attention_equal(out, expected)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    layout = layout_of("float32", 2, 64, 64)
    one = int32([64])
    with pytest.raises(ValueError, match="need positions"):
        Rules(scale=1.0, kv_end=one, causal=True)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Rules(scale=1.0, kv_end=one, positions=one, window=0)
    with pytest.raises(ValueError, match="kv_end must be torch.int32, got torch.int64"):
        Rules(scale=1.0, kv_end=one.long())
    pages = Pages.of([[(0, 0)]], torch.device("cpu"))
    partial = KERNELS.new_partial(1, 4, 1, 64)
    for q, rules, match in [
        (torch.zeros(1, 3, 1, 64), Rules(scale=1.0, kv_end=one), "q of 1 rows, 3 heads of 64 does not fit"),
        (torch.zeros(1, 4, 2, 64), Rules(scale=1.0, kv_end=one), "partial result does not fit"),
        (torch.zeros(1, 4, 1, 64), Rules(scale=1.0, kv_end=int32([1, 2])), r"kv_end must have shape \(1,\)"),
        (torch.zeros(1, 4, 1, 64).double(), Rules(scale=1.0, kv_end=one), "got torch.float64"),
    ]:
        with pytest.raises(ValueError, match=match):
            KERNELS.attend(q, pages, layout, rules, partial, stream=STREAM)
    with pytest.raises(ValueError, match="merge takes 1 to 8 partial results, got 9"):
        KERNELS.merge([partial] * 9, dtype=torch.float32, stream=STREAM)
