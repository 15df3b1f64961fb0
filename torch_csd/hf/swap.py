"""`swap_attention`: a model or module that is already loaded attends to stored keys and values."""

from __future__ import annotations

import types

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from torch_csd.dispatch import attention
from torch_csd.hf.cache import StorageCache
from torch_csd.tensor import KVTensor


def swap_attention(module: torch.nn.Module, cache: StorageCache | None = None) -> torch.nn.Module:
    """Makes `module` attend to stored keys and values; returns it. Doing it again changes nothing.

    **A transformers model** (or a module that contains some, such as a PEFT wrapper) is set to
    `attn_implementation="csd"`, where its code lets that be chosen after loading. Where it does not (Falcon,
    Bloom, ...) it stays with its own "sdpa" or "eager", which work on stored tensors too. Pass its cache as
    `past_key_values`.

    **Any other module** needs no change to attend to StorageTensors: torch hands every call of
    `scaled_dot_product_attention` that has one among its arguments to us, by whatever name it is called
    (`F.scaled_dot_product_attention`, a name imported earlier, `torch._C._nn.scaled_dot_product_attention`),
    and runs every other call as ever. So without a `cache` such a module is returned as it came, with the
    same results.

    **With a `cache`** (made without a config) a causal module that knows of no cache becomes incremental.
    Each self-attention call within one forward, counted in order, is one layer: its k and v are appended to
    that layer and it attends to everything seen since `cache.reset()`. `is_causal` then counts from the lower
    right, and an `attn_mask` that covers the new tokens only is extended over the older ones, which all may
    be seen. So

        swap_attention(module, cache=cache)
        module(tokens[:, :100]); module(tokens[:, 100:101])     # as the last rows of module(tokens[:, :101])

    if the module is told where its tokens stand (position ids); positions it counts itself start at 0 again
    at every call. Calls whose k and v have another length than q (cross-attention) are left alone. Everything
    in `module` must make its attention calls in the same order in every forward. Given again with another
    cache, that one takes over.

    Raises TypeError for anything but a module, ValueError for a transformers model with a `cache`, or one
    whose attention can neither be set nor read stored tensors.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"swap_attention: wants a transformers model or a torch.nn.Module, got {type(module).__name__}")
    if cache is not None and not isinstance(cache, StorageCache):
        raise TypeError(f"swap_attention: cache must be a torch_csd.StorageCache, got {type(cache).__name__}")

    models = _outermost_models(module)
    if cache is None:
        for model in models:
            _swap_model(model)
        return module
    if models:
        raise ValueError(
            f"swap_attention: {type(models[0]).__name__} takes its cache as an argument; "
            "call swap_attention(model) and pass past_key_values=cache"
        )
    if any(cache.is_sliding):
        raise ValueError(
            "swap_attention: wants a cache of full attention, got one with sliding windows, which only a "
            "transformers model can mask; make it without a config: StorageCache(directory=...)"
        )
    incremental = _incremental_hook(module)
    if incremental is None:
        incremental = _Incremental(cache)
        module.register_forward_pre_hook(incremental.begin)
        # Also after an exception, or the mode would outlive the forward.
        module.register_forward_hook(incremental.end, always_call=True)
    incremental.cache = cache
    return module


def _outermost_models(module: torch.nn.Module) -> list[PreTrainedModel]:
    """The transformers models in `module` that are in no other one."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]


def _swap_model(model: PreTrainedModel) -> None:
    if model._can_set_attn_implementation():
        model.set_attn_implementation("csd")
        return
    current = model.config._attn_implementation
    if current not in ("sdpa", "eager"):
        raise ValueError(
            f"swap_attention: {type(model).__name__} was loaded with attn_implementation={current!r}, which "
            "cannot read stored tensors and cannot be changed after loading; load it with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _incremental_hook(module: torch.nn.Module) -> _Incremental | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(owner := getattr(hook, "__self__", None), _Incremental):
            return owner
    return None


class _Incremental:
    """Turns a `_CachedCalls` on for the time of each forward of a module."""

    def __init__(self, cache: StorageCache):
        self.cache = cache
        self._active: list[_CachedCalls] = []

    def begin(self, module: torch.nn.Module, args: tuple) -> None:
        self._active.append(_CachedCalls(self.cache).__enter__())

    def end(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        calls = self._active.pop()
        calls.__exit__(None, None, None)
        if calls.layer_index == 0 and output is not None:
            raise ValueError(
                f"swap_attention: {type(module).__name__} made no self-attention call of "
                "scaled_dot_product_attention, so nothing of it was cached (nn.MultiheadAttention makes one "
                "with need_weights=False)"
            )


class _CachedCalls(TorchFunctionMode):
    """Gives each self-attention call of one forward the keys and values of the forwards before it.

    A mode, and not another function put in place of torch's: who holds on to torch's own is caught as well.
    """

    def __init__(self, cache: StorageCache):
        super().__init__()
        self.cache = cache
        self.layer_index = 0

    def __torch_function__(self, func, overriding_types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # nn.MultiheadAttention asks a mode only about this function as a whole, whose own calls it then
            # does not see; so run the same code where that name means our attention.
            names = {**func.__globals__, "scaled_dot_product_attention": self._attend}
            func = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        q_len, new_tokens = query.shape[-2], key.shape[-2]
        dense = F.scaled_dot_product_attention
        if isinstance(key, KVTensor) or q_len != new_tokens:
            return dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if dropout_p > 0:
            raise ValueError(
                f"swap_attention: a cache is for inference: wants dropout_p=0, got {dropout_p}; call module.eval()"
            )
        if query.ndim != 4:
            raise ValueError(
                "swap_attention: with a cache, attention wants q, k and v [batch, num_heads, q_len, "
                f"head_dim], got q {list(query.shape)}"
            )
        if q_len > 1 and not is_causal and attn_mask is None:
            raise ValueError(
                "swap_attention: only causal attention can go on from a cache, got q_len = "
                f"{q_len} with neither is_causal nor attn_mask; swap the causal part of the module alone"
            )
        layer_index = self.layer_index
        self.layer_index += 1
        past_tokens = self.cache.get_seq_length(layer_index)
        # Everything that can be wrong with the call comes before the cache takes its k and v.
        if past_tokens == 0:
            out = dense(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            self.cache.update(key, value, layer_index)
            return out
        mask = None if attn_mask is None else _over_all_keys(attn_mask, q_len, past_tokens + new_tokens)
        keys, values = self.cache.update(key, value, layer_index)
        causal = "lower_right" if is_causal and q_len > 1 else False
        out, _ = attention(query, keys, values, scale=scale, causal=causal, mask=mask)
        return out


def _over_all_keys(mask: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """A mask over the q_len new keys, extended to the left over the older ones, all of which may be seen."""
    if mask.shape[-1] == kv_len:
        return mask
    if mask.shape[-1] != q_len:
        raise ValueError(
            f"swap_attention: wants an attn_mask over the {q_len} new keys or over all {kv_len}, "
            f"got one over {mask.shape[-1]}"
        )
    return F.pad(mask, (kv_len - q_len, 0), value=True if mask.dtype == torch.bool else 0.0)
