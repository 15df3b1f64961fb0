"""Caches in memory that accuracy is compared with: exact, H2O and sliding window, plainly, on dense tensors.

The model that uses them has `attn_implementation="csd_bench"`: what one of these layers hands out is attended to by
that layer, in float32; anything else goes the way of "csd". No speed is claimed for any of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from torch_csd.hf.attention import csd_attention, csd_mask

SINKS = 4  # first tokens that a sliding window keeps, StreamingLLM (2309.17453), section 3.2
SCORES_MAX = 2**22  # float32 of one piece of a prefill: 16 MiB

# Which of count tokens each kv head keeps: (received [kv_heads, count], budget) -> [kv_heads, budget], in order.
Policy = Callable[[Tensor, int], Tensor]


def h2o(received: Tensor, budget: int) -> Tensor:
    """The newest budget // 2, and of the others those that received most attention. H2O (2306.14048), algorithm 1."""
    count, newest = received.shape[1], budget // 2
    heavy = received[:, : count - newest].topk(budget - newest, dim=1).indices.sort(dim=1).values
    return torch.cat([heavy, torch.arange(count - newest, count).expand(len(received), -1)], dim=1)


def window(received: Tensor, budget: int) -> Tensor:
    """The first SINKS and the newest. Kept tokens keep their positions; StreamingLLM numbers them anew."""
    count, sinks = received.shape[1], min(SINKS, budget // 2)
    kept = torch.cat([torch.arange(sinks), torch.arange(count - budget + sinks, count)])
    return kept.expand(len(received), -1)


class MemoryLayer(DynamicLayer):
    """K and V of a batch of one, and the attention that every token has received so far."""

    received: Tensor  # [kv_heads, tokens], float32; summed over queries and over the query heads of the kv head

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """out [1, q_len, heads, head_dim_v] for q [1, heads, q_len, head_dim_k], the queries of the newest tokens."""
        k, v = self.keys[0].float(), self.values[0].float()
        (kv_heads, kv_len, _), (heads, q_len, head_dim) = k.shape, q.shape[1:]
        group = heads // kv_heads
        queries = scale * q[0].float().view(kv_heads, group, q_len, head_dim)
        out = torch.empty(kv_heads, group, q_len, v.shape[2])
        step = max(1, SCORES_MAX // (group * kv_len))
        for begin in range(0, q_len, step):
            end = min(begin + step, q_len)
            seen = kv_len - q_len + end
            future = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            for head in range(kv_heads):
                scores = queries[head, :, begin:end] @ k[head, :seen].T  # [group, queries, seen]
                scores[..., seen - (end - begin) :].masked_fill_(future, -torch.inf)
                weights = scores.softmax(dim=-1)
                out[head, :, begin:end] = weights @ v[head, :seen]
                self.received[head, :seen] += weights.sum(dim=(0, 1))
        return out.view(1, heads, q_len, -1).transpose(1, 2).to(q.dtype)

    def shown(self) -> tuple[Tensor, Tensor]:
        """keys and values for the model, which brings the keys back to this layer."""
        keys = self.keys.view(self.keys.shape)  # a tensor of its own: attributes are not for the buffer
        keys.memory_layer = self
        return keys, self.values


class ExactLayer(MemoryLayer):
    """Keeps every token, up to capacity of them."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k, self._v = (
            torch.empty(1, states.shape[1], self.capacity, states.shape[3], dtype=states.dtype)
            for states in (key_states, value_states)
        )
        self._received = torch.zeros(key_states.shape[1], self.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.length, self.length + key_states.shape[2]
        self._k[:, :, begin:end], self._v[:, :, begin:end] = key_states, value_states
        self._show(end)
        return self.shown()

    def get_seq_length(self) -> int:
        return self.length

    def state(self) -> Tensor:
        """What `restore` goes back to."""
        return self.received.clone()

    def restore(self, received: Tensor) -> None:
        """As it was when `state` was called: without the tokens since then, and without the attention they paid."""
        self._show(received.shape[1])
        self._received.zero_()
        self.received.copy_(received)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = self._k[:, :, :length], self._v[:, :, :length]
        self.received = self._received[:, :length]


class EvictingLayer(MemoryLayer):
    """Keeps `budget` tokens, the new one included, and forgets the others for good."""

    def __init__(self, past: ExactLayer, policy: Policy, budget: int) -> None:
        super().__init__()
        self.policy, self.budget = policy, budget
        self.keys, self.values, self.received = past.keys, past.values, past.received
        self.dtype, self.device, self.is_initialized = past.dtype, past.device, True
        self.seen = past.length
        self._evict()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.received = torch.nn.functional.pad(self.received, (0, key_states.shape[2]))
        self.seen += key_states.shape[2]
        self._evict()
        return self.shown()

    def get_seq_length(self) -> int:
        """Of all that was seen, so that new tokens get their true positions."""
        return self.seen

    def _evict(self) -> None:
        if self.received.shape[1] <= self.budget:
            return
        kept = self.policy(self.received, self.budget)
        self.keys, self.values = (
            states.gather(2, kept[None, :, :, None].expand(1, -1, -1, states.shape[3]))
            for states in (self.keys, self.values)
        )
        self.received = self.received.gather(1, kept)


class ExactCache(Cache):
    """Exact attention over dense K and V in memory: the reference, and what everything else starts from."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
            raise ValueError(f"accuracy wants a model whose layers are all full attention, got {config.model_type}")
        layer_count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[ExactLayer(capacity) for _ in range(layer_count)])

    def evicting(self, policy: Policy, budget: int) -> Cache:
        """A cache of its own that keeps `budget` of these tokens and then goes on."""
        return Cache(layers=[EvictingLayer(layer, policy, budget) for layer in self.layers])

    def token_bytes(self) -> int:
        """Of K and V of one token, in all layers."""
        pairs = [(layer.keys, layer.values) for layer in self.layers]
        return sum(states[:, :, :1].nbytes for pair in pairs for states in pair)

    def state(self) -> list[Tensor]:
        return [layer.state() for layer in self.layers]

    def restore(self, state: list[Tensor]) -> None:
        for layer, received in zip(self.layers, state, strict=True):
            layer.restore(received)


def use(model: PreTrainedModel) -> None:
    """Makes `model` attend to these caches and to a StorageCache alike. Raises ValueError where that cannot be set."""
    if not model._can_set_attn_implementation():
        raise ValueError(f"accuracy: the attention of {type(model).__name__} cannot be set")
    AttentionInterface.register("csd_bench", _attention)
    AttentionMaskInterface.register("csd_bench", csd_mask)
    model.set_attn_implementation("csd_bench")


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    layer = getattr(key, "memory_layer", None)
    if layer is None:
        return csd_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unknown = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
    asked = [name for name in unknown if kwargs.get(name) is not None] + ["a mask"] * (attention_mask is not None)
    if asked:
        raise ValueError(f"accuracy wants plain causal attention, {type(module).__name__} has {', '.join(asked)}")
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None
