"""`attn_implementation="csd"`: the attention and mask functions that a transformers model calls.

Turns what a model asks for (masks, windows, caps, sinks, biases) into one call of the executor; computes
nothing but what has no stored tensors in it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from torch_csd.dispatch import attention
from torch_csd.tensor import KVTensor


def register() -> None:
    """Makes "csd" an attention implementation of transformers; doing it again changes nothing."""
    AttentionInterface.register("csd", csd_attention)
    # Without a mask function of the same name models get no mask, and left-padded batches go silently wrong.
    AttentionMaskInterface.register("csd", csd_mask)


def csd_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs,
) -> torch.Tensor | None:
    """The mask `csd_attention` is given: compact for plain causal attention, else what `sdpa_mask` makes.

    Plain causal means that query i stands at key kv_length - q_length + i and sees all keys up to itself.
    Then the mask is None, or with padding bool [batch, kv_length]: a long context costs no q_length x
    kv_length mask.
    """
    compact = (
        mask_function is causal_mask_function
        and local_size is None
        and allow_is_causal_skip
        and not use_vmap
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        # Looking for padding reads the mask, which a traced graph cannot.
        and not is_tracing(attention_mask)
    )
    if compact:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding is None:
            return None
        padding = padding[:, kv_offset : kv_offset + kv_length]
        return None if padding.all() else padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        # To sdpa no mask means torch's is_causal, which is upper left; to us it means lower right.
        allow_is_causal_skip=allow_is_causal_skip and (q_length == 1 or q_length == kv_length),
        use_vmap=use_vmap,
        **kwargs,
    )


class QueryCaptured(Exception):
    """Instead of an attention's result, within `capture_query`: what it was asked."""

    def __init__(self, query: torch.Tensor, scaling: float | None, softcap: float | None):
        super().__init__()
        self.query = query  # [batch, num_heads, q_len, head_dim_k]
        self.scaling = scaling
        self.softcap = softcap


class _Capture(threading.local):
    active = False


_capture = _Capture()


@contextmanager
def capture_query() -> Iterator[None]:
    """The next `csd_attention` of this thread computes nothing and raises `QueryCaptured`."""
    _capture.active = True
    try:
        yield
    finally:
        _capture.active = False


def csd_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, num_heads, q_len, head_dim_k]
    key: torch.Tensor,  # [batch, num_kv_heads, kv_len, head_dim_k]
    value: torch.Tensor,  # [batch, num_kv_heads, kv_len, head_dim_v]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    cache=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of a transformers model; returns (out [batch, q_len, num_heads, head_dim_v], None).

    Stored keys and values go to the executor, ordinary ones (no cache, another cache, vision towers,
    cross-attention) to torch. `attention_mask` is what `csd_mask` returns, or a 4-D mask: bool (True =
    attend) or additive. `sliding_window` is not applied: the mask, or the slice that a sliding layer hands
    out, has it already. `sinks` (`s_aux` in some models) [num_heads] are logits that join the softmax and
    carry no value; `position_bias` is added to the logits; `indices` [batch, q_len, k] are the only keys that
    each query attends to.
    """
    if not torch.compiler.is_compiling() and _capture.active:
        raise QueryCaptured(query, scaling, softcap)
    if block_indices is not None:
        raise NotImplementedError(
            "attn_implementation='csd' has no block-sparse attention (block_indices); "
            "use the model's own implementation"
        )
    sinks = s_aux if sinks is None else sinks
    q_len = query.shape[2]
    mask, padding = attention_mask, None
    if mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = is_causal and q_len > 1
    elif mask.ndim == 2:
        padding, mask = mask, mask[:, None, None, :]
        causal = q_len > 1
    else:
        causal = False
    if indices is not None:
        selected = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = _both(mask, selected.scatter_(-1, indices.long(), True)[:, None])

    stored = isinstance(key, KVTensor)
    plain = softcap is None and sinks is None
    if stored and plain and key.new_tokens is not None:
        # Nothing is older than these queries: the stock path on what is still in memory, bit for bit.
        key, value = key.new_tokens, value.new_tokens
        stored = False

    if not stored and plain:
        stock = functools.partial(
            sdpa_attention_forward, module, dropout=dropout, scaling=scaling, cache=cache, **kwargs
        )
        kv_len = key.shape[2]
        if causal and q_len == kv_len and padding is not None and indices is None and position_bias is None:
            return _padded_prompt(stock, query, key, value, padding), None
        if causal and (mask is not None or q_len != kv_len):
            mask, causal = _both(mask, _lower_right(q_len, kv_len, query.device)), False
        return stock(query, key, value, mask, is_causal=causal, position_bias=position_bias)

    if dropout > 0:
        raise ValueError(
            f"attn_implementation='csd' is for inference: wants dropout=0, got {dropout}; call model.eval()"
        )
    if position_bias is not None:
        mask = _both(mask, position_bias)
    if stored:
        out, _ = attention(
            query,
            key,
            value,
            scale=scaling,
            causal="lower_right" if causal else False,
            softcap=softcap,
            mask=mask,
            sinks=sinks,
        )
    else:
        if causal:
            mask = _both(mask, _lower_right(q_len, key.shape[2], query.device))
        out = _plain_attention(query, key, value, mask, scaling, softcap, sinks)
    out = out.transpose(1, 2)
    return out if q_len == 1 else out.contiguous(), None


def _padded_prompt(
    attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor
) -> torch.Tensor:
    """Causal attention of a padded prompt to itself; out [batch, q_len, num_heads, head_dim_v].

    A row at a time and without its padding, whose out is 0: a mask would take batch x q_len x q_len bytes.
    """
    batch, num_heads, q_len, _ = query.shape
    out = query.new_zeros(batch, q_len, num_heads, value.shape[-1])
    for row, keep in enumerate(padding):
        begin = int(keep.to(torch.uint8).argmax())
        keep = keep[begin:]
        if not keep.any():
            continue
        # Left padding, which is what generation wants, is all in `begin`; any other takes a mask for its row.
        left_padded = bool(keep.all())
        mask = None if left_padded else keep & _lower_right(q_len - begin, q_len - begin, query.device)
        q, k, v = (states[row : row + 1, :, begin:] for states in (query, key, value))
        out[row, begin:] = attend(q, k, v, mask, is_causal=left_padded)[0][0]
    return out


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of ordinary tensors with soft-cap and sinks, which torch's own lacks; float32 logits."""
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    # The query heads that share a kv head stand in its q_len, so that keys and values are not repeated.
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    logits = (grouped @ key.transpose(2, 3)).float().view(batch, num_heads, q_len, -1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits + _additive(mask)
    if sinks is not None:
        sinks = sinks.float().view(1, num_heads, 1, 1).expand(batch, -1, q_len, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    # A query that may attend to nothing (left padding) gives zeros, not NaN.
    probabilities = torch.softmax(logits, dim=-1).nan_to_num()
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    probabilities = probabilities.to(value.dtype).reshape(batch, num_kv_heads, -1, key.shape[2])
    return (probabilities @ value).view(batch, num_heads, q_len, -1)


def _lower_right(q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, q_len, kv_len]: the last query sees every key, the one before it all but the last."""
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)[None, None]


def _both(mask: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The mask that applies two: bool if both are, else additive."""
    if mask is None:
        return other
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    return _additive(mask) + _additive(other)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
