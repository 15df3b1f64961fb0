"""What the kernels must compute, in plain torch. The specification that tests compare with; not fast."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool | str = False,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention in float64, and the log of its softmax denominator.

    Args:
        q: ``[batch, num_heads, q_len, head_dim_k]``. Query head h reads kv head ``h // (num_heads // num_kv_heads)``.
        k: ``[batch, num_kv_heads, kv_len, head_dim_k]``.
        v: ``[batch, num_kv_heads, kv_len, head_dim_v]``.
        scale: multiplies the scores; ``head_dim_k ** -0.5`` if None.
        causal: ``"lower_right"`` (or True): query i stands at position ``kv_len - q_len + i`` and sees keys up to it.
            ``"upper_left"``: at position i, as torch's ``is_causal``.
        window: sees keys at positions > position - window only.
        softcap: ``softcap * tanh(score / softcap)`` before masks (Gemma 2, 2408.00118).
        mask: bool (True: attend) or additive, broadcastable to ``[batch, num_heads, q_len, kv_len]``.
        sinks: ``[num_heads]`` logits that join the softmax and attend to nothing (StreamingLLM, 2309.17453; gpt-oss).
        alibi_slopes: ``[num_heads]``; adds ``slope * (key position - query position)`` (ALiBi, 2108.12409).

    Returns:
        ``out [batch, num_heads, q_len, head_dim_v]`` and ``lse [batch, num_heads, q_len]`` (natural log), float64.
        A query that sees nothing has ``out = 0`` and ``lse = -inf``.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q_len, kv_len = q.shape[2], k.shape[2]
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    offset = 0 if causal == "upper_left" else kv_len - q_len
    position = torch.arange(q_len, device=q.device)[:, None] + offset
    key = torch.arange(kv_len, device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double()[None, :, None, None] * (key - position)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(key > position, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(key <= position - window, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], dim=2)
    lse = torch.logsumexp(scores, dim=3)
    p = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return p @ v, lse


def quantise(values: Tensor, code_bits: int, dim: int) -> Tensor:
    """What codes of ``code_bits`` bits give back for ``values``, each slice along ``dim`` a group of its own.

    Asymmetric: ``zero + scale * code`` with code in ``0 ... 2**code_bits - 1`` (KIVI, 2402.02750). Both are float16;
    zero is rounded down and scale up, so that no value is off by more than ``scale / 2``.

    Returns:
        float64, of the same shape.
    """
    levels = 2**code_bits - 1
    values = values.float()
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    zero = low.half()
    zero = torch.where(zero.float() > low, torch.nextafter(zero, torch.full_like(zero, -torch.inf)), zero).float()
    step = (high - zero) / levels
    scale = step.half()
    scale = torch.where(scale.float() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale).float()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = torch.round((values - zero) * inverse).clamp(0, levels)
    return zero.double() + scale.double() * codes.double()


def stored(
    k: Tensor, v: Tensor, code_bits: int, *, page_tokens: int = 64, tail_pages: int = 2
) -> tuple[Tensor, Tensor]:
    """K and V ``[batch, num_kv_heads, tokens, head_dim]`` as a quantising store holds them after one append, float64.

    The newest ``tail_pages`` pages, a partial one included, are as they came; in older ones K is quantised per channel
    over a page, V per token.
    """
    end = max(0, -(-k.shape[2] // page_tokens) - tail_pages) * page_tokens
    pages = k[:, :, :end].unflatten(2, (-1, page_tokens))
    k_codes, v_codes = quantise(pages, code_bits, dim=3).flatten(2, 3), quantise(v[:, :, :end], code_bits, dim=3)
    return torch.cat([k_codes, k[:, :, end:].double()], dim=2), torch.cat([v_codes, v[:, :, end:].double()], dim=2)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each (FlashAttention, 2205.14135, Alg. 1).

    Shapes ``out [..., head_dim_v]``, ``lse [...]``. Merging with the empty result (0, -inf) changes nothing.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse.isinf(), 0.0, lse)
    return out_a * torch.exp(lse_a - base)[..., None] + out_b * torch.exp(lse_b - base)[..., None], lse
