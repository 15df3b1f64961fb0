"""The model that whole-model benchmarks run, and caches filled without running it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from torch_csd.bench.settings import Settings, dtype_bytes
from torch_csd.hf import StorageCache

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 8, 4, 64
PIECE = 4096  # tokens put into a cache at once


def token_bytes(dtype: torch.dtype) -> int:
    """Of the K and V that all layers keep for one token, dense."""
    return LAYERS * 2 * KV_HEADS * HEAD_DIM * dtype_bytes(dtype)


def small_llama(dtype: torch.dtype, attn_implementation: str, *, times_wider: int = 1) -> LlamaForCausalLM:
    """Hidden 512, 8 layers, 8 heads and 4 kv heads of 64, with random weights: the same ones for every call.

    times_wider multiplies all but the kv heads: more arithmetic over the same cache.
    """
    config = LlamaConfig(
        hidden_size=times_wider * HEADS * HEAD_DIM,
        intermediate_size=times_wider * 1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=times_wider * HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=1024,
        max_position_embeddings=2**20,
        attn_implementation=attn_implementation,
        head_dim=HEAD_DIM,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def random_states(tokens: int, dtype: torch.dtype) -> Iterable[tuple[int, Tensor, Tensor]]:
    """(layer, k, v) for `fill`: all layers of a piece, then the next piece. Rows share pieces, so that it is fast."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, KV_HEADS, min(tokens, PIECE), HEAD_DIM)
    pieces = [tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2)) for _ in range(LAYERS)]
    for begin in range(0, tokens, PIECE):
        count = min(PIECE, tokens - begin)
        for layer, (k, v) in enumerate(pieces):
            yield layer, k[:, :, :count], v[:, :, :count]


def fill(cache: Cache, tokens: int, dtype: torch.dtype) -> Cache:
    """Puts random keys and values into every layer, in place of a prefill by the model."""
    if isinstance(cache, StorageCache | StaticCache):
        for layer, k, v in random_states(tokens, dtype):
            cache.update(k, v, layer)
        if isinstance(cache, StorageCache):
            cache.store.flush()
        return cache
    # One update a layer: a DynamicCache copies all that it has at each.
    pieces: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
    for layer, k, v in random_states(tokens, dtype):
        pieces[layer].append((k, v))
    for layer, parts in enumerate(pieces):
        k, v = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
        cache.update(k, v, layer)
        pieces[layer].clear()
    return cache


def dynamic_cache(model: LlamaForCausalLM) -> DynamicCache:
    return DynamicCache(config=model.config)


def storage_cache(
    settings: Settings,
    model: LlamaForCausalLM,
    kv_dtype: torch.dtype | None,
    *,
    memory_budget: int | str,
    resident: bool,
) -> StorageCache:
    options = settings.drive_options(memory_budget, resident)
    return StorageCache(model.config, settings.directory, kv_dtype=kv_dtype, **options)


class Step:
    """One token of decoding, again and again: what a user's loop does between two tokens."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, *, padded: bool = False) -> None:
        self.model = model
        self.cache = cache
        self.padded = padded
        self.token = torch.tensor([[7]])

    def __call__(self) -> Tensor:
        """Logits [1, 1, vocab]."""
        mask = None
        if self.padded:
            mask = torch.ones(1, int(self.cache.get_seq_length()) + 1, dtype=torch.long)
            mask[:, :4] = 0  # as of a shorter prompt of a left-padded batch
        return self.model(self.token, attention_mask=mask, past_key_values=self.cache).logits

    def again(self, count: int) -> None:
        """count tokens, which are then forgotten, so that small contexts stay small."""
        for _ in range(count):
            self()
