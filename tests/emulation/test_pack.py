"""Page images of the device's kernels against those that the CPU wrote to a drive, bit for bit."""

from __future__ import annotations

import os
import struct

import pytest
import torch
from emulation.emulated_device import EmulatedDevice, compiler
from support import DTYPES, random_kv

from torch_csd import KVStore
from torch_csd.catalogue import Catalogue, StoreDirectory
from torch_csd.cuda.kernels import Kernels
from torch_csd.cuda.layout import PageLayout

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulation needs g++")

KERNELS = Kernels(EmulatedDevice())
STREAM = KERNELS.device.current_stream()


def written_pages(directory, k, v, kv_dtype):
    """(kind, checksum, bytes) of each page of each row, as a durable store of the CPU has them."""
    with KVStore(directory, durable=True, name="pages", kv_dtype=kv_dtype, memory_budget="64MiB") as store:
        store.append(0, k, v)
        store.commit()
        found = StoreDirectory.find(directory)
        with Catalogue.open(found.catalogue_path, read_only=True) as catalogue:
            layer = catalogue.load("pages").layers[0]
        rows = []
        with open(found.pages_path, "rb") as file:
            for row in layer.rows:
                rows.append([])
                for offset, checksum, block_count, kind, _ in struct.iter_unpack("<QIHBB", row.entries):
                    rows[-1].append((kind, checksum, os.pread(file.fileno(), block_count * 4096, offset)))
    return rows


def pack(k, v, layout, token_begin, page_count):
    batch = k.shape[0]
    out = KERNELS.device.new_memory(batch * page_count * layout.page_bytes).view(batch, page_count, -1)
    KERNELS.pack(k, v, layout, out, token_begin=token_begin, page_count=page_count, stream=STREAM)
    return out


def used_bytes(layout):
    """Of a tile: what is not padding."""
    parameters = 4 * (layout.head_dim_k + 64) if layout.code_bits else 0
    return layout.k_bytes + layout.v_bytes + parameters


def hard_values(k, v):
    """Groups with infinities and NaN, constant ones, signed zeros, subnormals, and what float16 cannot hold."""
    k[:, :, 3, 1], k[:, :, 4, 2], v[:, :, 5, 0], v[:, :, 6, 3] = torch.nan, torch.inf, -torch.inf, torch.nan
    k[..., 4], v[:, :, 7] = 1.7, -0.3
    k[..., 5] = 0.0
    k[:, :, ::2, 5] = -0.0
    v[:, :, 8] = 1e-7
    k[..., 6] *= 1e-6
    k[..., 7] *= 3e4
    v[:, :, 9] *= 1e5
    return k, v


CASES = [
    (dtype, kv_dtype, dims)
    for dtype in DTYPES
    for kv_dtype, dims in [
        (None, (64, 64)), (None, (80, 24)), ("int8", (64, 128)), ("int8", (24, 88)), ("int4", (128, 64)),
        ("int4", (40, 104)),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "kv_dtype", "dims"), CASES)
def test_pages_have_the_bits_that_the_cpu_writes(tmp_path, dtype, kv_dtype, dims):
    k, v = hard_values(*random_kv(2, 3, 64 * 4, *dims))
    k, v = k.to(DTYPES[dtype]), v.to(DTYPES[dtype])
    rows = written_pages(tmp_path, k, v, kv_dtype)
    for row in range(2):
        for page, (kind, checksum, written) in enumerate(rows[row]):
            layout = PageLayout(3, *dims, DTYPES[dtype], {"int8": 8, "int4": 4}[kv_dtype] if kind == 1 else 0)
            image = pack(k, v, layout, 64 * page, 1)[row, 0]
            written = torch.frombuffer(bytearray(written), dtype=torch.uint8)
            assert written.shape == image.shape
            for head in range(3):
                begin = head * layout.tile_bytes
                end = begin + used_bytes(layout)
                assert torch.equal(image[begin:end], written[begin:end]), (kind, page, head)
            assert (image[3 * layout.tile_bytes :] == 0).all()
            found = torch.zeros(1, dtype=torch.uint32)
            copy = KERNELS.device.new_memory(written.numel()).copy_(written)
            KERNELS.checksums(copy, written.numel(), found, stream=STREAM)
            assert found.item() == checksum
    assert {kind for kind, _, _ in rows[0]} == ({0, 1} if kv_dtype else {0})


@pytest.mark.parametrize("kv_dtype", [None, "int4"])
def test_tokens_may_lie_in_memory_as_they_like(kv_dtype):
    layout = PageLayout(2, 24, 40, torch.bfloat16, 4 if kv_dtype else 0)
    k, v = random_kv(2, 2, 200, 24, 40, dtype=torch.bfloat16)
    expected = pack(k, v, layout, 0, 3)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # as projections give them
    assert torch.equal(pack(*token_major, layout, 0, 3), expected)
    part = torch.cat([k, k], dim=3)[..., 3 : 3 + 24]
    assert torch.equal(pack(part, v, layout, 0, 3), pack(part.contiguous(), v, layout, 0, 3))
    shifted = torch.cat([k[:, :, :7], k], dim=2), torch.cat([v[:, :, :7], v], dim=2)
    assert torch.equal(pack(*shifted, layout, 7, 3), expected)
    rows = KERNELS.device.new_memory(2 * 5 * layout.page_bytes).view(2, 5, -1)
    KERNELS.pack(k, v, layout, rows[:, 1:4], token_begin=0, page_count=3, stream=STREAM)
    assert torch.equal(rows[:, 1:4], expected) and (rows[:, 0] == 255).all() and (rows[:, 4] == 255).all()


def test_slots_beyond_the_last_token_are_zeros():
    layout = PageLayout(1, 16, 8, torch.float32, 0)
    k, v = random_kv(1, 1, 70, 16, 8)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 58)) for x in (k, v)]
    assert torch.equal(pack(k, v, layout, 0, 2), pack(*padded, layout, 0, 2))


def test_what_makes_no_whole_pages_is_refused():
    k, v = random_kv(1, 1, 70, 16, 8)
    quantised = PageLayout(1, 16, 8, torch.float32, 8)
    with pytest.raises(ValueError, match="make no pages"):
        pack(k, v, quantised, 0, 2)
    with pytest.raises(ValueError, match="make no pages"):
        pack(k, v, quantised._replace(code_bits=0), 0, 3)
    with pytest.raises(ValueError, match="do not fit"):
        pack(k, v, PageLayout(2, 16, 8, torch.float32, 0), 0, 1)
    with pytest.raises(ValueError, match="last dimension dense"):
        pack(k.mT.contiguous().mT, v, PageLayout(1, 16, 8, torch.float32, 0), 0, 1)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_unpacked_pages_are_what_the_cpu_reads(make_store, element, target):
    code_bits = {"int8": 8, "int4": 4}.get(element, 0)
    dtype = DTYPES.get(element, torch.float16)
    k, v = random_kv(1, 2, 256, 72, 40, dtype=dtype)
    layout = PageLayout(2, 72, 40, dtype, code_bits)
    images = pack(k, v, layout, 0, 4)
    addresses = torch.tensor([image.data_ptr() for image in images[0]])
    found = KERNELS.unpack(addresses, layout, dtype=DTYPES[target], stream=STREAM)
    if code_bits:
        store = make_store(kv_dtype=element)
        store.append(0, k, v)
        k, v = store.read(0)
    for unpacked, read in zip(found, (k, v), strict=True):
        pages = 2 if code_bits else 4  # the newest two of a quantising store are as they came
        read = read[0, :, : 64 * pages].unflatten(1, (-1, 64)).transpose(0, 1)
        if code_bits and target != "float16":
            torch.testing.assert_close(unpacked[:pages].double(), read.double(), atol=0, rtol=2**-8)
        else:
            assert torch.equal(unpacked[:pages], read.to(DTYPES[target]))


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 31])
def test_checksums_are_crc32c(blocks):
    pages = KERNELS.device.new_memory(2 * 4096 * blocks)
    pages[:] = torch.randint(0, 256, pages.shape, dtype=torch.uint8)
    pages[-4096:] = 0
    out = torch.zeros(2, dtype=torch.uint32)
    KERNELS.checksums(pages, 4096 * blocks, out, stream=STREAM)
    expected = [crc32c(pages[4096 * blocks * i :][: 4096 * blocks].numpy().tobytes()) for i in range(2)]
    assert out.tolist() == expected


def crc32c(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


def entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


TABLE = [entry(byte) for byte in range(256)]


def test_the_checksum_compared_with_is_the_formats():
    assert crc32c(b"123456789") == 0xE3069283
