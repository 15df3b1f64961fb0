"""The kernels on a real card: what tests/emulation holds them to without one, in fewer cases and larger sizes."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, assert_attention_equal, random_kv

from torch_csd import reference
from torch_csd.cuda.kernels import Kernels, Pages, Rules
from torch_csd.cuda.layout import PageLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ELEMENTS = ["float32", "bfloat16", "float16", "int8", "int4"]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    pytest.importorskip("cupy", reason="the kernels need CuPy")
    from torch_csd.cuda.cuda_device import CudaDevice

    return Kernels(CudaDevice())


def layout_of(element: str, num_kv_heads: int, head_dim_k: int, head_dim_v: int) -> PageLayout:
    code_bits = {"int8": 8, "int4": 4}.get(element, 0)
    return PageLayout(num_kv_heads, head_dim_k, head_dim_v, DTYPES.get(element, torch.bfloat16), code_bits)


def packed(kernels, k, v, layout, stream):
    """Images [batch, page_count, page_bytes] of whole pages, and their addresses in order."""
    batch, page_count = k.shape[0], k.shape[2] // 64
    images = kernels.device.new_memory(batch * page_count * layout.page_bytes).view(batch, page_count, -1)
    kernels.pack(k, v, layout, images, token_begin=0, page_count=page_count, stream=stream)
    return images, [[image.data_ptr() for image in row] for row in images]


def unpacked(kernels, addresses, layout, batch, stream):
    """K and V [batch, num_kv_heads, tokens, head_dim], float32, on the host."""
    flat = torch.tensor(sum(addresses, []), device=kernels.device.torch_device)
    pair = kernels.unpack(flat, layout, dtype=torch.float32, stream=stream)
    stream.synchronize()
    return [x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3).cpu() for x in pair]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (576, 512)], ids=str)
@pytest.mark.parametrize(("group", "q_len"), [(1, 1), (4, 1), (3, 5), (4, 70)])
def test_attention_over_pages_is_attention(kernels, element, dims, group, q_len):
    layout = layout_of(element, 2, *dims)
    device, stream = kernels.device, kernels.device.new_stream()
    lengths = [64 * 40, 64 * 3 - 17]
    k, v = random_kv(2, 2, max(lengths), *dims, dtype=layout.dtype)
    q = torch.randn(2, 2 * group, q_len, dims[0]).to(layout.dtype)
    torch.cuda.synchronize()
    with device.use(stream):
        k, v, on_device = (x.to(device.torch_device) for x in (k, v, q))
        images, addresses = packed(kernels, k, v, layout, stream)
        pages = Pages.of(
            [
                [(at, i) for i, at in enumerate(row[: -(-length // 64)])]
                for row, length in zip(addresses, lengths, strict=True)
            ],
            device.torch_device,
        )
        int32 = {"dtype": torch.int32, "device": device.torch_device}
        rules = Rules(
            scale=dims[0] ** -0.5, kv_end=torch.tensor(lengths, **int32), causal=True,
            positions=torch.tensor([length - q_len for length in lengths], **int32),
        )  # fmt: skip
        partial = kernels.new_partial(2, 2 * group, q_len, dims[1])
        kernels.attend(on_device, pages, layout, rules, partial, stream=stream)
        out, lse = kernels.merge([partial], dtype=layout.dtype, stream=stream)
    k, v = unpacked(kernels, addresses, layout, 2, stream)
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        expected, expected_lse = reference.attention(q[part], k[part, :, :length], v[part, :, :length], causal=True)
        assert_attention_equal(out[part].cpu(), expected)
        torch.testing.assert_close(lse[part].cpu().double(), expected_lse, atol=5e-5, rtol=1e-5)
    del images


@pytest.mark.parametrize("element", ELEMENTS)
def test_pages_and_checksums_are_those_of_the_emulation(kernels, element):
    emulated_device = pytest.importorskip("emulation.emulated_device")
    if emulated_device.compiler() is None:
        pytest.skip("the emulation needs g++")
    emulated = Kernels(emulated_device.EmulatedDevice())
    layout = layout_of(element, 3, 72, 136)
    k, v = random_kv(2, 3, 64 * 5, 72, 136)
    k[..., 1] *= 1e-39  # subnormal: no device may flush it
    v[:, :, 5] *= -1e-39
    v[:, :, 6] *= 1e6
    k[0, 0, 3, 4], v[0, 1, 7, 3] = torch.nan, torch.inf
    k, v = k.to(layout.dtype), v.to(layout.dtype)
    stream = kernels.device.current_stream()
    images, _ = packed(kernels, k.to(kernels.device.torch_device), v.to(kernels.device.torch_device), layout, stream)
    expected, _ = packed(emulated, k, v, layout, emulated.device.current_stream())
    assert torch.equal(images.cpu(), expected)
    checksums = torch.zeros(10, dtype=torch.int32, device=kernels.device.torch_device)
    kernels.checksums(images.view(-1), layout.page_bytes, checksums, stream=stream)
    expected_checksums = torch.zeros(10, dtype=torch.int32)
    emulated.checksums(
        expected.view(-1), layout.page_bytes, expected_checksums, stream=emulated.device.current_stream()
    )
    assert torch.equal(checksums.cpu(), expected_checksums)


def test_memory_is_ones_own_and_aligned(kernels):
    device = kernels.device
    memory, pinned = device.new_memory(12345), device.new_pinned_memory(12345)
    assert memory.shape == pinned.shape == (12345,) and memory.device == device.torch_device
    assert memory.data_ptr() % 4096 == pinned.data_ptr() % 4096 == 0 and pinned.is_pinned()
    memory.fill_(7)
    pinned.copy_(memory)
    torch.cuda.synchronize()
    assert (pinned == 7).all()
