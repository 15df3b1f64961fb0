"""`guess_queries`: what the next layer's attention will read is on its way before that layer has begun."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from torch_csd.hf.attention import QueryCaptured, capture_query
from torch_csd.hf.cache import StorageCache, StorageLayer
from torch_csd.sparse import QUERIES_MAX


def guess_queries(model: PreTrainedModel) -> PreTrainedModel:
    """Has sparse caches of `model` begin to read for a layer while the one before it is still computing; returns it.

    The input of a layer's attention, put through the next layer's own query projection, is a guess at that layer's
    queries: the residual stream changes little from layer to layer (InfiniGen, 2406.19707). What the guess
    would choose is read meanwhile (`KVStore.prefetch`); the true queries choose as ever, so results are the same. It
    costs the next layer's q, k and v projections of the new tokens, and one more look at what pages are chosen by. A
    layer whose guesses are mostly wrong is left alone. Doing it again changes nothing.

    Worth it where attention waits for the drive and the model computes for milliseconds in between; `stats()` tells
    `guessed_bytes` and `guessed_used_bytes`.

    Raises TypeError for anything but a transformers model, ValueError for one whose attention is not "csd" or whose
    layers of attention cannot be told apart.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"guess_queries: wants a transformers model, got {type(model).__name__}")
    if model.config._attn_implementation != "csd":
        raise ValueError(
            f"guess_queries: wants attn_implementation='csd', got {model.config._attn_implementation!r}; "
            "torch_csd.swap_attention(model) sets it where it can be set"
        )
    modules = _attention_modules(model)
    for module, following in zip(modules, modules[1:], strict=False):
        if not any(getattr(hook, "func", None) is _guess for hook in module._forward_hooks.values()):
            module.register_forward_hook(functools.partial(_guess, following), with_kwargs=True)
    return model


def _attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """In the order of their layers."""
    modules: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not type(module).__name__.endswith("Attention"):
            continue
        if index in modules:
            raise ValueError(
                f"guess_queries: {type(model).__name__} has two modules of attention in layer {index} "
                f"({type(modules[index]).__name__}, {type(module).__name__}); wanted one"
            )
        modules[index] = module
    return [modules[index] for index in sorted(modules)]


def _guess(following: torch.nn.Module, module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    """After `module`: reads for `following`, by what its queries would be if nothing lay between the two."""
    if torch.compiler.is_compiling():
        return
    # By whatever name: past_key_values, layer_past.
    name, cache = next(((name, value) for name, value in kwargs.items() if isinstance(value, StorageCache)), ("", None))
    if cache is None:
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    layer = cache.layers[following.layer_idx] if following.layer_idx < len(cache.layers) else None
    if hidden.shape[1] > QUERIES_MAX or not isinstance(layer, StorageLayer) or not layer.chooses():
        return
    try:
        with capture_query():
            following(*args, **{**kwargs, name: None})
    except QueryCaptured as captured:
        cache.store.prefetch(layer.index, captured.query, scale=captured.scaling, softcap=captured.softcap)
