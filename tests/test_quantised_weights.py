"""Quantised rows of linear layers: their bytes, their values, and the linear on them, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES

from torch_csd import ops, reference
from torch_csd.weights import quantised

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Of the sum of |x * weight|. Every product and sum rounds to float32 (2**-24); in order that is up to in_features of
# them, and the serial kernel, which is the longest, adds up 64 at a time. Measured: 4e-7 at 1100 features.
SUM_RTOL = 2e-6

in_features = st.one_of(st.integers(1, 200), st.sampled_from([511, 512, 513, 1024, 1025, 1100, 2048]))


@pytest.fixture(params=[8, 4])
def bits(request) -> int:
    return request.param


def random_weight(out_features: int, in_features: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard_weight(in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Each row has a hardship of its own."""
    weight = random_weight(17, in_features, torch.float32, 0)
    last = in_features - 1
    weight[0] = 0.0
    weight[1] = -0.0
    weight[2, ::2] = -0.0
    weight[3, 0] = torch.nan
    weight[4, last] = torch.inf
    weight[5, last // 2] = -torch.inf
    weight[6] = torch.nan
    weight[7] = torch.arange(in_features)  # codes end between integers
    weight[8] *= 1e-8
    weight[9] *= 1e-40
    weight[10] = 65504 + 100 * weight[10]
    weight[11] = -70000 - weight[11].abs()
    weight[12] *= 1e30
    weight[13] = torch.finfo(torch.float32).max
    weight[13, 0] *= -1
    weight[14] = 1.5
    weight[15, 0] = 1e5
    return weight.to(dtype)


def at_odd_address(rows: torch.Tensor, offset: int) -> torch.Tensor:
    memory = torch.empty(rows.numel() + 64 + offset, dtype=torch.uint8)
    offset += -memory.data_ptr() % 64
    return memory[offset : offset + rows.numel()].view(rows.shape).copy_(rows)


def assert_linear_equal(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, bits: int, bias=None) -> None:
    expected = reference.quantised_linear(x, rows, bits=bits, bias=bias)
    magnitude = reference.dequantise_rows(rows, bits=bits, in_features=x.shape[-1]).double().abs()
    magnitude = torch.nn.functional.linear(x.double().abs(), magnitude, None if bias is None else bias.double().abs())
    assert out.dtype == x.dtype and out.shape == expected.shape
    error = (out.double() - expected).abs()
    excess = error - SUM_RTOL * magnitude - ULP[x.dtype] * expected.abs()
    assert not (excess > 0).any() and torch.equal(out.isnan(), expected.isnan()), excess.max()


def test_the_bytes_of_a_row_are_the_same_in_python_and_in_cpp(bits):
    for count in [*range(1, 300), 3072, 8192, 8193]:
        assert ops.weight_row_bytes(bits, count) == torch.ops.torch_csd.weight_row_bytes(bits, count)
        assert ops.weight_row_bytes(bits, count) % 64 == 0
    for op in (ops.weight_row_bytes, torch.ops.torch_csd.weight_row_bytes):
        with pytest.raises((ValueError, RuntimeError), match="bits must be 8 or 4, got 5"):
            op(5, 64)
        with pytest.raises((ValueError, RuntimeError), match="in_features must be at least 1, got 0"):
            op(bits, 0)


@given(
    out_features=st.integers(0, 5),
    in_features=in_features,
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_specification_to_the_bit(simd, bits, out_features, in_features, dtype, seed):
    weight = random_weight(out_features, in_features, dtype, seed)
    rows = ops.quantise_rows(weight, bits, simd=simd)
    assert torch.equal(rows, reference.quantise_rows(weight, bits))
    assert rows.shape == (out_features, ops.weight_row_bytes(bits, in_features))
    wanted = reference.dequantise_rows(rows, bits=bits, in_features=in_features)
    for target in DTYPES.values():
        held = ops.dequantise_rows(rows, bits=bits, in_features=in_features, dtype=target, simd=simd)
        assert torch.equal(held, wanted.to(target))
    # Half a step; and the value, which is not a float16 sum, rounds to float32.
    groups = -(-in_features // 64)
    codes_end = groups * 8 * bits
    scale = rows[:, codes_end : codes_end + 4 * groups].clone().view(torch.float16)[:, ::2].float()
    bound = scale.repeat_interleave(64, dim=1)[:, :in_features] / 2 + 1e-6 * weight.float().abs()
    assert ((wanted - weight.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", [1, 40, 64, 65, 200])
def test_what_is_hard_is_the_same_to_every_instruction_set(simd, bits, dtype, count):
    weight = hard_weight(count, dtype)
    rows = ops.quantise_rows(weight, bits, simd=simd)
    assert torch.equal(rows, reference.quantise_rows(weight, bits))
    held = ops.dequantise_rows(rows, bits=bits, in_features=count, dtype=torch.float32, simd=simd)
    wanted = reference.dequantise_rows(rows, bits=bits, in_features=count)
    torch.testing.assert_close(held, wanted, rtol=0, atol=0, equal_nan=True)
    # A group that is not finite is NaN, and no other is.
    low, high = (
        torch.stack([end(part.float(), 1) for part in weight.split(64, 1)], 1) for end in (torch.amin, torch.amax)
    )
    lost = (~(high - low).isfinite()).repeat_interleave(64, dim=1)[:, :count]
    assert torch.equal(held.isnan(), lost)


@given(
    x_rows=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17]),
    out_features=st.integers(0, 70),
    in_features=in_features,
    dtype=st.sampled_from(list(DTYPES.values())),
    biased=st.booleans(),
    offset=st.integers(0, 63),
    seed=st.integers(0, 99),
)
def test_the_linear_is_that_of_the_specification(
    simd, bits, x_rows, out_features, in_features, dtype, biased, offset, seed
):
    weight = random_weight(out_features, in_features, torch.float32, seed)
    rows = at_odd_address(ops.quantise_rows(weight, bits), offset)
    x = random_weight(x_rows, in_features, dtype, seed + 1)
    bias = random_weight(1, out_features, dtype, seed + 2)[0] if biased else None
    out = ops.quantised_linear(x, rows, bits=bits, bias=bias, simd=simd)
    assert_linear_equal(out, x, rows, bits, bias)
    held = ops.dequantise_rows(rows, bits=bits, in_features=in_features, dtype=dtype, simd=simd)
    assert torch.equal(held, reference.dequantise_rows(rows, bits=bits, in_features=in_features).to(dtype))


def test_a_group_that_is_not_finite_is_seen_in_its_output_only(simd, bits):
    weight = random_weight(40, 200, torch.float32, 0)
    weight[7, 199] = torch.inf
    weight[9, 0] = torch.nan
    rows = ops.quantise_rows(weight, bits, simd=simd)
    out = ops.quantised_linear(torch.randn(3, 200), rows, bits=bits, simd=simd)
    assert out.isnan().any(0).nonzero().flatten().tolist() == [7, 9] and out[:, [7, 9]].isnan().all()


def test_an_infinite_feature_does_what_it_does_to_any_linear(simd, bits):
    weight = random_weight(40, 130, torch.float32, 0).abs() + 0.1  # no sign is lost in quantising
    rows = ops.quantise_rows(weight, bits, simd=simd)
    x = torch.randn(2, 130)
    x[0, 3], x[1, 129] = torch.inf, -torch.inf
    out = ops.quantised_linear(x, rows, bits=bits, simd=simd)
    assert (out[0] == torch.inf).all() and (out[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_x_and_weight_may_have_any_strides_and_x_any_shape(simd, bits, dtype):
    weight = random_weight(100, 37, dtype, 0).T  # [37, 100], not contiguous
    rows = ops.quantise_rows(weight, bits, simd=simd)
    assert torch.equal(rows, reference.quantise_rows(weight, bits))
    wide = random_weight(6, 300, dtype, 1)
    assert torch.equal(
        ops.quantise_rows(wide[::2, 50:150], bits, simd=simd), reference.quantise_rows(wide[::2, 50:150], bits)
    )
    base = random_weight(2 * 3 * 5, 200, dtype, 2)
    for x in (
        base[:, 50:150].view(2, 3, 5, 100),
        base[:, ::2].view(2, 3, 5, 100),
        base[:, :100].view(5, 3, 2, 100).transpose(0, 2),
        base[:1, :100].expand(4, 100),
        base[0, :100],
        base[:0, :100],
    ):
        assert_linear_equal(ops.quantised_linear(x, rows, bits=bits, simd=simd), x, rows, bits)


def test_threads_do_not_change_a_bit(simd, bits):
    weight = random_weight(1500, 1100, torch.float32, 0)
    x = torch.randn(3, 1100)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            rows = ops.quantise_rows(weight, bits, simd=simd)
            dense = ops.dequantise_rows(rows, bits=bits, in_features=1100, dtype=torch.float32, simd=simd)
            results.append((rows, dense, ops.quantised_linear(x, rows, bits=bits, simd=simd)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))
    assert_linear_equal(results[0][2], x, results[0][0], bits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_rows_of_x_go_through_torch(simd, bits, dtype, monkeypatch):
    monkeypatch.setitem(quantised.X_ROWS_MAX, dtype, 6)
    monkeypatch.setattr(quantised, "BLOCK_BYTES", 40 * 700 * dtype.itemsize)
    rows = ops.quantise_rows(random_weight(123, 700, dtype, 0), bits)
    bias = random_weight(1, 123, dtype, 1)[0]
    few, many = random_weight(6, 700, dtype, 2), random_weight(7, 700, dtype, 3)
    for shape in ((6, 700), (2, 3, 700)):
        out = quantised.quantised_linear(few.view(shape), rows, bits=bits, in_features=700, bias=bias, simd=simd)
        assert_linear_equal(out, few.view(shape), rows, bits, bias)
    # Here the weight is rounded to x's dtype first; torch's own sum may be rounded to it once before the bias is added.
    weight = reference.dequantise_rows(rows, bits=bits, in_features=700).to(dtype).double()
    for this_bias in (bias, None):
        out = quantised.quantised_linear(many[None], rows, bits=bits, in_features=700, bias=this_bias, simd=simd)[0]
        products = torch.nn.functional.linear(many.double(), weight)
        expected = products if this_bias is None else products + this_bias.double()
        magnitude = torch.nn.functional.linear(many.double().abs(), weight.abs())
        atol = SUM_RTOL * magnitude + ULP[dtype] * (products.abs() + expected.abs())
        assert out.dtype == dtype and ((out.double() - expected).abs() <= atol).all()


def test_a_weight_of_other_features_is_refused(bits):
    rows = ops.quantise_rows(torch.randn(5, 100), bits)
    with pytest.raises(ValueError, match="x must have 100 features, as the weight, got 64"):
        quantised.quantised_linear(torch.randn(2, 64), rows, bits=bits, in_features=100)


def test_what_does_not_fit_is_said(bits):
    weight = torch.randn(5, 100)
    rows = ops.quantise_rows(weight, bits)
    x = torch.randn(2, 100)
    row_bytes = rows.shape[1]
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        ops.quantise_rows(weight, 3)
    with pytest.raises(ValueError, match="weight must be float32, bfloat16 or float16"):
        ops.quantise_rows(weight.double(), bits)
    with pytest.raises(ValueError, match="weight must be .out_features, in_features."):
        ops.quantise_rows(weight[0], bits)
    with pytest.raises(ValueError, match=f"rows must have {row_bytes} bytes each .{bits} bits, 100 features., got 7"):
        ops.quantised_linear(x, rows[:, :7].contiguous(), bits=bits)
    with pytest.raises(ValueError, match="rows must be a contiguous uint8 CPU tensor"):
        ops.quantised_linear(x, rows[::2], bits=bits)
    with pytest.raises(ValueError, match="rows must be a contiguous uint8 CPU tensor"):
        ops.dequantise_rows(rows.to(torch.int16), bits=bits, in_features=100, dtype=torch.float32)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        ops.dequantise_rows(rows, bits=bits, in_features=100, dtype=torch.int32)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        ops.dequantise_rows(rows, bits=bits, in_features=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="bias must be a contiguous CPU tensor of 5 elements"):
        ops.quantised_linear(x, rows, bits=bits, bias=torch.zeros(4))
    with pytest.raises(ValueError, match="bias must be a contiguous CPU tensor of 5 elements"):
        ops.quantised_linear(x, rows, bits=bits, bias=torch.zeros(5, dtype=torch.float16))
    with pytest.raises(ValueError, match="simd must be auto, serial"):
        ops.quantised_linear(x, rows, bits=bits, simd="neon")
    with pytest.raises(TypeError, match="simd must be text"):
        ops.quantised_linear(x, rows, bits=bits, simd=2)


def test_the_environment_forces_an_instruction_set(bits, monkeypatch):
    weight = torch.randn(5, 100)
    monkeypatch.setenv("TORCH_CSD_SIMD", "neon")
    with pytest.raises(ValueError, match="simd must be auto, serial"):
        ops.quantise_rows(weight, bits)
    ops.quantise_rows(weight, bits, simd="serial")


def test_no_gradient_goes_through_it(bits):
    rows = ops.quantise_rows(torch.randn(5, 100), bits)
    x = torch.randn(2, 100, requires_grad=True)
    with pytest.raises(NotImplementedError, match="not differentiable"):
        ops.quantised_linear(x, rows, bits=bits).sum().backward()


def test_it_can_be_compiled_into_one_graph(bits):
    rows = ops.quantise_rows(torch.randn(50, 100), bits)
    bias = torch.randn(50)

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(x):
        return ops.quantised_linear(x * 2, rows, bits=bits, bias=bias) + 1

    for count in (1, 3):
        x = torch.randn(2, count, 100)
        torch.testing.assert_close(layer(x), ops.quantised_linear(x * 2, rows, bits=bits, bias=bias) + 1)
