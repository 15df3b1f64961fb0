"""Stores of tokens that are on a GPU: whoever computes, the results are those of the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, assert_attention_equal, random_kv

from torch_csd import KVStore, PageTopK, StorageTensor, reference

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

EXECUTORS = ["near", "gpu", "auto"]


def to(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("gpu_budget", [0, "1MiB"])
def test_attention_of_tensors_on_the_gpu(device, make_store, dtype, resident, executor, gpu_budget):
    k, v = to(device, *random_kv(2, 2, 700, 64, dtype=DTYPES[dtype]))
    store = make_store(resident=resident, executor=executor, gpu_budget=gpu_budget)
    store.append(0, k[:, :, :400], v[:, :, :400])
    store.append(0, k[:, :, 400:], v[:, :, 400:])
    mask = torch.rand(2, 1, 1, 700, device=device) > 0.2
    for q_len in (1, 3, 300):
        q = torch.randn(2, 8, q_len, 64, device=device).to(DTYPES[dtype])
        out, lse = store.attend(0, q, causal=True, mask=mask)
        assert out.device == lse.device == q.device and out.dtype == q.dtype
        expected, expected_lse = reference.attention(q, k, v, causal=True, mask=mask)
        assert_attention_equal(out.cpu(), expected.cpu())
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)
    K, V = StorageTensor.pair(store, 0)
    assert K.device == k.device and torch.equal(K.to_dense(), k)
    expected = reference.attention(q, k, v)[0].cpu()
    assert_attention_equal(F.scaled_dot_product_attention(q, K, V, enable_gqa=True).cpu(), expected)


@needs_cuda
def test_tokens_of_another_device_are_refused(make_store):
    k, v = random_kv(1, 2, 100, 64)
    store = make_store()
    store.append(0, k.cuda(), v.cuda())
    with pytest.raises(ValueError, match="on cpu"):
        store.append(0, k, v)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_pages_have_the_codes_of_the_processor(device, make_store, monkeypatch, kv_dtype, executor):
    k, v = random_kv(2, 2, 1000, 64)
    with KVStore(kv_dtype=kv_dtype, memory_budget="16MiB") as plain:
        monkeypatch.setattr(plain._drive, "attach_card", lambda stored: None)
        plain.append(0, k, v)
        stored = plain.read(0)
    store = make_store(kv_dtype=kv_dtype, executor=executor, resident=False)
    store.append(0, *to(device, k, v))
    for ours, theirs in zip(store.read(0), stored, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    q = torch.randn(2, 8, 1, 64, device=device)
    expected = reference.attention(q, *to(device, *stored))[0].float()
    torch.testing.assert_close(store.attend(0, q)[0], expected, atol=1e-4, rtol=0)  # near, q has 16 bits


@needs_cuda
@pytest.mark.parametrize("executor", EXECUTORS)
def test_work_of_another_stream_is_waited_for_and_waits(make_store, executor):
    """What is appended or attended with is complete, and what comes back is not read before it is."""
    store = make_store(executor=executor, resident=False)
    stream = torch.cuda.Stream()
    for step in range(3):
        with torch.cuda.stream(stream):
            large = torch.randn(4096, 4096, device="cuda")
            for _ in range(8):
                large = large @ large / 64
            k = large.flatten()[: 2 * 2 * 500 * 64].view(2, 2, 500, 64).contiguous()
            store.append(step, k, k)
            q = large.flatten()[: 2 * 8 * 64].view(2, 8, 1, 64).clone()
            kept = k.clone(), q.clone()
            del large, k
            noise = torch.randn(2, 2, 500, 64, device="cuda")  # memory that was k's, if nobody keeps it
            out = store.attend(step, q)[0] * 1.0
            q.zero_()
            del noise
        torch.cuda.synchronize()
        assert torch.equal(store.read(step)[0], kept[0])
        assert_attention_equal(out.cpu(), reference.attention(kept[1], kept[0], kept[0])[0].cpu())


def test_sparse_attention_of_tensors_on_the_gpu(device, make_store):
    k, v = random_kv(1, 2, 1000, 64)
    q = torch.randn(1, 4, 1, 64)
    with KVStore(memory_budget="16MiB", sparse=PageTopK(fraction=0.25)) as plain:
        plain.append(0, k, v)
        expected = plain.attend(0, q)[0].cpu()
    store = make_store(sparse=PageTopK(fraction=0.25), resident=False)
    store.append(0, *to(device, k, v))
    torch.testing.assert_close(store.attend(0, q.to(device))[0].cpu(), expected, atol=1e-5, rtol=0)


@needs_cuda
def test_a_prompt_larger_than_the_cards_staging_goes_through(make_store):
    k, v = (x.cuda() for x in random_kv(1, 8, 20000, 128, dtype=torch.bfloat16))
    store = make_store(resident=False, memory_budget="64MiB", gpu_staging="8MiB", executor="gpu")
    store.append(0, k, v)
    for ours, theirs in zip(store.read(0), (k, v), strict=True):
        assert torch.equal(ours, theirs)
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    assert_attention_equal(store.attend(0, q)[0].cpu(), reference.attention(q, k, v)[0].cpu())
    stats = store.stats()
    assert stats["gpu_packed_bytes"] > 80e6 and stats["gpu_drive_read_bytes"] > 80e6
    assert stats["drive_read_bytes"] >= stats["gpu_drive_read_bytes"]


@needs_cuda
def test_a_compiled_graph_asks_the_card(make_store):
    k, v = (x.cuda() for x in random_kv(1, 2, 700, 64))
    store = make_store(resident=False, executor="gpu")
    store.append(0, k, v)

    @torch.compile(fullgraph=True)
    def layer(q, K, V):
        return F.scaled_dot_product_attention(q * 2, K, V, enable_gqa=True) + 1

    q = torch.randn(1, 4, 1, 64, device="cuda")
    expected = reference.attention(q * 2, k, v)[0] + 1
    assert_attention_equal(layer(q, *StorageTensor.pair(store, 0)).cpu(), expected.cpu())
    assert store.stats()["gpu_attends"] == 1
