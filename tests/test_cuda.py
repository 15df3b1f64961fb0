"""With the model on a GPU: the query goes to the drive, the output comes back to the device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, assert_attention_equal, random_kv

from torch_csd import StorageTensor, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", [True, False])
def test_attention_of_tensors_on_the_gpu(make_store, dtype, resident):
    k, v = (x.cuda() for x in random_kv(2, 2, 700, 64, dtype=DTYPES[dtype]))
    q = torch.randn(2, 8, 3, 64, device="cuda").to(DTYPES[dtype])
    store = make_store(resident=resident)
    store.append(0, k, v)
    out, lse = store.attend(0, q, causal=True, mask=torch.ones(2, 1, 1, 700, dtype=torch.bool, device="cuda"))
    assert out.device == lse.device == q.device
    assert_attention_equal(out.cpu(), reference.attention(q, k, v, causal=True)[0].cpu())
    K, V = StorageTensor.pair(store, 0)
    assert K.device == k.device and torch.equal(K.to_dense(), k)
    expected = reference.attention(q, k, v)[0].cpu()
    assert_attention_equal(F.scaled_dot_product_attention(q, K, V, enable_gqa=True).cpu(), expected)
    with pytest.raises(ValueError, match="on cpu"):
        store.append(0, k.cpu(), v.cpu())


def test_tensors_of_another_stream_are_complete_when_they_are_stored(make_store):
    store = make_store()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        large = torch.randn(4096, 4096, device="cuda")
        for _ in range(8):
            large = large @ large / 64
        k = large.flatten()[: 2 * 2 * 500 * 64].view(2, 2, 500, 64).contiguous()
        store.append(0, k, k)
    torch.cuda.synchronize()
    assert torch.equal(store.read(0)[0], k)


def test_a_model_on_the_gpu_generates_as_with_a_cache_in_memory(tmp_path):
    transformers = pytest.importorskip("transformers")
    from torch_csd import StorageCache

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().eval()
    model.set_attn_implementation("csd")
    ids = torch.randint(3, 97, (2, 300), device="cuda")
    arguments = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, past_key_values=transformers.DynamicCache(config=config), **arguments)
    with StorageCache(config, tmp_path, memory_budget="8MiB", resident=False) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)
        assert cache.stats()["drive_read_bytes"] > 0
