"""The attention function gives what transformers gives, for every kind of mask and of keys and values."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

import torch_csd
from torch_csd.hf.attention import csd_attention, csd_mask

from .models import assert_same_generation, generate, model_of, prompts

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16


class Module(torch.nn.Module):
    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


@pytest.fixture(params=["dense", "stored"])
def attend(request, new_cache):
    """attend(q, k, v, mask, **options) -> out, with k and v as ordinary tensors or from a StorageCache."""

    def call(query, key, value, mask=None, **options):
        if request.param == "stored":
            cache = new_cache()
            past = max(key.shape[2] - query.shape[2], 0)
            if past:
                cache.update(key[:, :, :past], value[:, :, :past], 0)
            key, value = cache.update(key[:, :, past:], value[:, :, past:], 0)
        out, weights = csd_attention(Module(), query, key, value, mask, **options)
        assert weights is None and out.is_contiguous()
        return out

    return call


def qkv(q_len, kv_len, head_dim_v=HEAD_DIM):
    generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)
    return (
        torch.randn(BATCH, HEADS, q_len, HEAD_DIM, generator=generator),
        torch.randn(BATCH, KV_HEADS, kv_len, HEAD_DIM, generator=generator),
        torch.randn(BATCH, KV_HEADS, kv_len, head_dim_v, generator=generator),
    )


def expected(query, key, value, bias=None, scale=None, softcap=None, sinks=None, keep=None):
    """Attention by its formula in float64; out [batch, q_len, num_heads, head_dim_v]."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    logits = query @ key.transpose(2, 3) * (scale or 1 / math.sqrt(HEAD_DIM))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    if keep is not None:
        logits = logits.masked_fill(~keep, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(BATCH, -1, logits.shape[2], 1)], -1)
    weights = logits.softmax(-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).float()


def lower_right(q_len, kv_len):
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def padding_of(kv_len, *padded):
    keep = torch.ones(len(padded), kv_len, dtype=torch.bool)
    for row, count in enumerate(padded):
        keep[row, :count] = False
    return keep


# One query, a chunk, a prompt; keys within a page and over several.
SHAPES = [(1, 1), (1, 40), (1, 300), (7, 40), (65, 300), (90, 90)]


@pytest.mark.parametrize("q_len, kv_len", SHAPES)
@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (4.0, False), (None, True), (4.0, True)])
@pytest.mark.parametrize("padded", [None, (0, 3), (31, 0)], ids=str)
def test_a_compact_mask_means_causal_from_the_lower_right(q_len, kv_len, softcap, with_sinks, padded, attend):
    query, key, value = qkv(q_len, kv_len, head_dim_v=24)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    mask = None if padded is None else padding_of(kv_len, *(min(count, kv_len - 1) for count in padded))
    keep = lower_right(q_len, kv_len)
    if mask is not None:
        keep = keep & mask[:, None, None, :]
    out = attend(query, key, value, mask, softcap=softcap, s_aux=sinks)
    torch.testing.assert_close(
        out, expected(query, key, value, softcap=softcap, sinks=sinks, keep=keep), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("q_len, kv_len", SHAPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_mask_of_four_dimensions_is_all_there_is(q_len, kv_len, softcap, attend):
    query, key, value = qkv(q_len, kv_len)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(BATCH, 1, q_len, kv_len, generator=generator) < 0.7
    keep[..., 0] = True
    bias = torch.randn(BATCH, HEADS, q_len, kv_len, generator=generator)
    for mask, options in ((keep, {"keep": keep}), (bias, {"bias": bias})):
        out = attend(query, key, value, mask, softcap=softcap, scaling=0.2)
        wanted = expected(query, key, value, softcap=softcap, scale=0.2, **options)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("q_len, kv_len", SHAPES)
@pytest.mark.parametrize("kind", ["none", "padding", "bool"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_position_bias_is_added(q_len, kv_len, kind, softcap, attend):
    query, key, value = qkv(q_len, kv_len)
    bias = torch.randn(1, HEADS, q_len, kv_len, generator=torch.Generator().manual_seed(0))
    padding = padding_of(kv_len, 0, min(3, kv_len - 1))
    keep = lower_right(q_len, kv_len)[None, None].expand(BATCH, -1, -1, -1)
    if kind != "none":
        keep = keep & padding[:, None, None, :]
    mask = {"none": None, "padding": padding, "bool": keep}[kind]
    out = attend(query, key, value, mask, position_bias=bias, softcap=softcap)
    wanted = expected(query, key, value, bias=bias, softcap=softcap, keep=keep)
    seen = keep.any(-1)[:, 0]  # a padded query sees nothing; what it gives is used by no one
    torch.testing.assert_close(out[seen], wanted[seen], atol=2e-5, rtol=0)


@pytest.mark.parametrize("q_len, kv_len", [(1, 40), (1, 300), (7, 40), (40, 40)])
@pytest.mark.parametrize("kind", ["none", "padding", "bool"])
def test_only_the_chosen_keys_are_attended_to(q_len, kv_len, kind, attend):
    query, key, value = qkv(q_len, kv_len)
    padding = padding_of(kv_len, 0, 3)
    causal = lower_right(q_len, kv_len)
    keep = causal[None, None] if kind == "none" else causal[None, None] & padding[:, None, None, :]
    scores = torch.rand(BATCH, q_len, kv_len, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(~keep[:, 0], float("-inf"))
    indices = scores.topk(5, dim=-1).indices.to(torch.int32)
    chosen = torch.zeros(BATCH, q_len, kv_len, dtype=torch.bool).scatter_(-1, indices.long(), True)
    mask = {"none": None, "padding": padding, "bool": keep.expand(BATCH, -1, -1, -1)}[kind]
    out = attend(query, key, value, mask, indices=indices)
    wanted = expected(query, key, value, keep=keep & chosen[:, None])
    seen = keep.expand(BATCH, -1, -1, -1).any(-1)[:, 0]
    torch.testing.assert_close(out[seen], wanted[seen], atol=2e-5, rtol=0)


@pytest.mark.parametrize("q_len", [1, 5])
def test_pages_that_hold_no_chosen_key_are_not_read(q_len, tmp_path):
    kv_len = 64 * 12 + q_len
    query, key, value = qkv(q_len, kv_len)
    indices = torch.tensor([64 * 3 + 1, 64 * 7 + 9, kv_len - 1]).expand(BATCH, q_len, -1)
    with torch_csd.KVStore(tmp_path, memory_budget="8MiB", resident=False) as store:
        store.append(0, key, value)
        store.flush()
        stored = torch_csd.StorageTensor.pair(store, 0)
        page_bytes = store.stats()["stored_bytes"] // (13 * BATCH)
        out, _ = csd_attention(Module(), query, *stored, None, indices=indices)
        assert store.stats()["drive_read_bytes"] == 2 * BATCH * page_bytes
    keep = torch.zeros(BATCH, 1, q_len, kv_len, dtype=torch.bool)
    keep[..., [64 * 3 + 1, 64 * 7 + 9]] = True
    keep[..., -1, -1] = True
    torch.testing.assert_close(out, expected(query, key, value, keep=keep), atol=2e-5, rtol=0)


def test_without_is_causal_every_query_sees_every_key(attend):
    query, key, value = qkv(7, 40)
    out = attend(query, key, value, is_causal=False)
    torch.testing.assert_close(out, expected(query, key, value), atol=2e-5, rtol=0)


def test_a_window_is_not_applied_twice(attend):
    query, key, value = qkv(1, 24)
    out = attend(query, key, value, sliding_window=24)
    torch.testing.assert_close(out, expected(query, key, value), atol=2e-5, rtol=0)


def test_a_prompt_is_computed_by_the_stock_path_bit_for_bit(new_cache):
    model, stock = model_of("llama", "csd"), model_of("llama", "sdpa")
    inputs = prompts(130)
    with torch.no_grad():
        ours = model(**inputs, past_key_values=new_cache(model.config)).logits
        theirs = stock(**inputs, past_key_values=DynamicCache(config=stock.config)).logits
    assert torch.equal(ours, theirs)


def test_dropout_is_refused_where_keys_are_stored(new_cache):
    query, key, value = qkv(1, 4)
    cache = new_cache()
    cache.update(key, value, 0)
    key, value = cache.update(key[:, :, :1], value[:, :, :1], 0)
    with pytest.raises(ValueError, match="dropout"):
        csd_attention(Module(), query, key, value, None, dropout=0.1)


def test_block_sparse_attention_is_refused():
    with pytest.raises(NotImplementedError, match="block_indices"):
        csd_attention(Module(), *qkv(1, 4), None, block_indices=torch.zeros(1))


def test_both_functions_are_registered_by_importing_torch_csd():
    assert AttentionInterface()["csd"] is csd_attention
    assert AttentionMaskInterface()["csd"] is csd_mask


def full_mask(q_length, kv_length, q_offset, kv_offset=0, attention_mask=None, **options):
    return sdpa_mask(
        BATCH,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **options,
    )


@pytest.mark.parametrize("q_len, kv_len, kv_offset", [(1, 1, 0), (1, 40, 0), (7, 40, 0), (40, 40, 0), (7, 30, 10)])
def test_a_causal_mask_is_compact(q_len, kv_len, kv_offset):
    q_offset = kv_offset + kv_len - q_len
    sizes = {"q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "kv_offset": kv_offset}
    unpadded = torch.ones(BATCH, kv_len + kv_offset, dtype=torch.bool)
    assert csd_mask(BATCH, **sizes) is None
    assert csd_mask(BATCH, **sizes, attention_mask=unpadded) is None
    padded = unpadded.clone()
    padded[1, : kv_offset + 1] = False
    mask = csd_mask(BATCH, **sizes, attention_mask=padded)
    assert mask.shape == (BATCH, kv_len) and mask.dtype == torch.bool
    keep = mask[:, None, None, :] & lower_right(q_len, kv_len)
    assert torch.equal(keep, full_mask(**sizes, attention_mask=padded))


def test_a_mask_shorter_than_the_keys_is_padding_at_its_end():
    mask = csd_mask(BATCH, q_length=2, kv_length=5, q_offset=3, attention_mask=torch.ones(BATCH, 4, dtype=torch.bool))
    assert mask.tolist() == [[True, True, True, True, False]] * BATCH


@pytest.mark.parametrize(
    "options",
    [
        {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3},
        {"mask_function": lambda b, h, q, k: causal_mask_function(b, h, q, k) & (k % 2 == 0)},
        {"use_vmap": True},
        {"allow_is_causal_skip": False},
        {"q_offset": torch.tensor(4)},
        {"q_offset": 0},  # keys beyond the queries, as a StaticCache has them
    ],
    ids=["window", "own function", "vmap", "asked for", "traced offset", "static"],
)
def test_any_other_mask_is_the_stock_one(options):
    options = {"q_length": 3, "kv_length": 7, "q_offset": 4} | options
    mask = csd_mask(BATCH, **options)
    options.pop("allow_is_causal_skip", None)
    assert torch.equal(mask, full_mask(**options))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_csd_works_with_the_caches_of_transformers_too(family):
    model = model_of(family, "csd")
    inputs = prompts(70, 5)
    options = {"max_new_tokens": 8}
    dynamic = generate(model, inputs, DynamicCache(config=model.config), **options)
    none = generate(model, inputs, use_cache=False, **options)
    assert_same_generation(none, dynamic)
    static = StaticCache(config=model.config, max_cache_len=96)
    assert_same_generation(generate(model, inputs, static, disable_compile=True, **options), dynamic)
