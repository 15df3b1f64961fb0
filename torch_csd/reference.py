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


def page_top_k(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pages: int,
    local: int = 64,
    sink: int = 64,
    heads_per_choice: int = 1,
    groups: int = 4,
    page_tokens: int = 64,
    scale: float | None = None,
    **rules: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact attention over the ``pages`` pages whose keys may score highest (Quest, 2406.10774, section 3.2).

    A key within the box [low, high] of its group scores at most ``sum_d max(q_d low_d, q_d high_d)``; a page's bound is
    that of the best of its ``groups`` groups of neighbouring tokens. To the query heads that share a kv head a page
    matters by the greatest, over these and all queries, of its bound less the log of the sum of the exponentials of all
    bounds. Pages that are always attended to (the newest ``local`` tokens, the first ``sink``, a last partial one) are
    not among these, but are counted. ``heads_per_choice`` kv heads choose together, by the greatest of theirs.

    Args:
        q, k, v, scale: as in :func:`attention`; ``rules`` are its other arguments, which do not enter the choice here.
        pages: attended to in all, those always attended to included (these at least).

    Returns:
        ``out``, ``lse`` as :func:`attention`, and ``chosen [batch, num_kv_heads, ceil(kv_len / page_tokens)]``, bool.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    page_count = -(-kv_len // page_tokens)
    full = kv_len // page_tokens
    always = torch.zeros(page_count, dtype=torch.bool)
    always[: -(-sink // page_tokens)] = True
    always[full:] = True
    if local:
        always[max(kv_len - local, 0) // page_tokens :] = True
    boxes = k.double()[:, :, : full * page_tokens].unflatten(2, (full * groups, page_tokens // groups))
    low, high = boxes.amin(3), boxes.amax(3)  # [batch, num_kv_heads, full * groups, head_dim]
    grouped = q.double().reshape(batch, num_kv_heads, -1, head_dim) * (head_dim**-0.5 if scale is None else scale)
    bounds = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
    bounds = bounds.unflatten(3, (full, groups)).amax(4).masked_fill(always[:full], -torch.inf)
    values = (bounds - bounds.logsumexp(3, keepdim=True)).amax(2)  # [batch, num_kv_heads, full]
    wanted = min(max(pages - int(always.sum()), 0), int((~always).sum()))
    chosen = always.expand(batch, num_kv_heads, page_count).clone()
    for begin in range(0, num_kv_heads, heads_per_choice):
        best = values[:, begin : begin + heads_per_choice].amax(1).topk(wanted, dim=1).indices
        for row in range(batch):
            chosen[row, begin : begin + heads_per_choice, best[row]] = True
    mask = chosen.repeat_interleave(page_tokens, dim=2)[:, :, :kv_len].repeat_interleave(num_heads // num_kv_heads, 1)
    return *attention(q, k, v, scale=scale, mask=mask[:, :, None], **rules), chosen


def page_sketch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sketch: Tensor,
    *,
    pages: int,
    local: int = 64,
    sink: int = 64,
    mean_value: bool = True,
    page_tokens: int = 64,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Attention over the ``pages`` pages that an approximate K says matter most; the others by weight and mean.

    With ``w`` the exponentials of the approximate scores, a page weighs ``m = sum of w``. If its mean of V stands for
    it, ``e = sum of |w - m / page_tokens| / 2`` of that goes to wrong tokens: the total variation between the softmax
    and what takes its place is at most the sum of ``e`` over such pages, over that of ``m`` over all. To the queries
    that share a kv head a page matters by the greatest, over these, of ``e`` (``m`` without ``mean_value``) over the
    sum of ``m``. Pages that are always attended to are those of :func:`page_top_k`.

    Args:
        q, k, v, scale: as in :func:`attention`; every query sees every token.
        sketch: what stands for ``k`` in the choice and in the weights; of the first pages, the others are always
            attended to.
        pages: attended to in all.

    Returns:
        ``out`` and ``lse`` as :func:`attention`, what is wrong or missing as a share ``[batch, num_heads, q_len]``, and
        by how much (of logs) the worst page that was chosen was better than the best that was not.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    full = sketch.shape[2] // page_tokens
    page_count = -(-kv_len // page_tokens)
    always = torch.zeros(page_count, dtype=torch.bool)
    always[: -(-sink // page_tokens)] = True
    always[full:] = True
    if local:
        always[max(kv_len - local, 0) // page_tokens :] = True
    grouped = q.double().reshape(batch, num_kv_heads, group * q_len, head_dim)
    scores = (grouped @ sketch.double()[:, :, : full * page_tokens].mT * scale).unflatten(3, (full, page_tokens))
    masses = scores.logsumexp(4)  # [batch, num_kv_heads, group * q_len, full]
    w = (scores - masses[..., None]).exp()
    errors = masses + ((w - 1 / page_tokens).abs().sum(4) / 2).log()
    whole = masses.masked_fill(always[:full], -torch.inf).logsumexp(3, keepdim=True)
    values = ((errors if mean_value else masses) - whole).amax(2).masked_fill(always[:full], -torch.inf)
    wanted = min(max(pages - int(always.sum()), 0), int((~always).sum()))
    order = values.sort(dim=2, descending=True)
    chosen = always.expand(batch, num_kv_heads, page_count).clone()
    chosen[:, :, :full].scatter_(2, order.indices[:, :, :wanted], True)
    margin = float("inf")
    if 0 < wanted < int((~always).sum()):
        margin = float((order.values[:, :, wanted - 1] - order.values[:, :, wanted]).min())
    mask = chosen.repeat_interleave(page_tokens, dim=2)[:, :, :kv_len].repeat_interleave(group, 1)
    out, lse = attention(q, k, v, scale=scale, mask=mask[:, :, None])
    left_out = ~chosen[:, :, None, :full]
    rest = masses.masked_fill(~left_out, -torch.inf)
    rest_lse = rest.logsumexp(3)
    error = (errors if mean_value else masses).masked_fill(~left_out, -torch.inf).logsumexp(3)
    per_query = (batch, num_heads, q_len)
    total = torch.logaddexp(lse, rest_lse.view(per_query))
    wrong = (error.view(per_query) - total).exp()
    if mean_value:
        means = v.double()[:, :, : full * page_tokens].unflatten(2, (full, page_tokens)).mean(3)
        weights = (rest - torch.where(rest_lse.isinf(), 0.0, rest_lse)[..., None]).exp()
        out, lse = merge(out, lse, (weights @ means).view(*per_query, -1), rest_lse.view(per_query))
    return out, lse, wrong, margin


def sparf(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    channels: int,
    tokens: int,
    local: int = 64,
    mean_value: bool = True,
    scale: float | None = None,
    step1_k: Tensor | None = None,
    mean_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """InstInfer's SparF attention (2409.04992, section IV), which is SparQ (2312.04985, algorithm 1) for grouped heads.

    For each kv head, over all its queries: i1 are the ``channels`` channels with the largest sum of ``|q|``; a query's
    approximate probabilities are ``s = softmax(q[i1] . K[:, i1] * scale * sqrt(|q|_1 / |q[i1]|_1))`` (SparQ's
    temperature); i2 are the ``tokens`` tokens with the largest sum of s among those that are not the ``local`` newest,
    and these.
    With ``alpha = sum of s over i2``, a query's result is ``alpha * attention over i2 + (1 - alpha) * mean of V``.

    Args:
        q, k, v, scale: as in :func:`attention`; no causality: every query sees every token.
        mean_value: False: the result is the attention over i2 alone.
        step1_k: what step 1 sees in the place of ``k``.
        mean_v: ``[batch, num_kv_heads, head_dim_v]``, if it is not the mean of ``v``.

    Returns:
        ``out`` and ``lse`` as :func:`attention` (lse of i2, less ``log(alpha)`` if the mean of V stands for the rest),
        and ``missing = 1 - alpha [batch, num_heads, q_len]``.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    grouped = q.double().reshape(batch, num_kv_heads, group * q_len, head_dim)
    size = grouped.abs()
    # Of equal channels the first: [batch, num_kv_heads, 1, channels].
    i1 = size.sum(2).sort(dim=2, descending=True, stable=True).indices[:, :, None, :channels]
    kept = torch.zeros_like(size).scatter(3, i1.expand(-1, -1, group * q_len, -1), 1.0)
    share = (size * kept).sum(3) / size.sum(3)
    logits = (grouped * kept) @ (k if step1_k is None else step1_k).double().mT * scale / share.sqrt()[..., None]
    s = torch.softmax(logits, dim=3)
    summed = s.sum(2)
    summed[:, :, max(kv_len - local, 0) :] = torch.inf
    i2 = summed.topk(min(tokens + min(local, kv_len), kv_len), dim=2).indices
    chosen = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.bool).scatter(2, i2, True)
    alpha = (s * chosen[:, :, None]).sum(3).view(batch, num_heads, q_len)
    out, lse = attention(q, k, v, scale=scale, mask=chosen.repeat_interleave(group, 1)[:, :, None])
    if mean_value:
        mean_v = v.double().mean(2) if mean_v is None else mean_v.double()
        mean_v = mean_v.repeat_interleave(group, 1)[:, :, None]
        out = alpha[..., None] * out + (1 - alpha)[..., None] * mean_v
        lse = lse - torch.log(alpha)
    return out, lse, 1 - alpha


def quantise(values: Tensor, code_bits: int, dim: int) -> Tensor:
    """What codes of ``code_bits`` bits give back for ``values``, each slice along ``dim`` a group of its own.

    Asymmetric: ``zero + scale * code`` with code in ``0 ... 2**code_bits - 1`` (KIVI, 2402.02750). Both are float16;
    zero is rounded down and scale up, so that no value is off by more than ``scale / 2``.

    Returns:
        float64, of the same shape.
    """
    values = values.float()
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    scale, zero = code_params(low, high, code_bits)
    codes = nearest_codes(values, scale, zero, code_bits)
    return zero.double() + scale.double() * codes.double()


def code_params(low: Tensor, high: Tensor, code_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float16, of groups with these least and greatest values, float32.

    Zero is the largest that is not above ``low``, scale the smallest with which the highest code reaches ``high``; 0
    and NaN where these are not finite, or further apart than float32 reaches.
    """
    largest = torch.finfo(torch.float16).max
    bottom = (low + 0.0).clamp(-largest, largest)  # + 0.0: never -0
    zero = bottom.half()
    zero = torch.where(zero.float() > bottom, torch.nextafter(zero, torch.full_like(zero, -torch.inf)), zero)
    step = ((high - zero.float() + 0.0).clamp(min=0) / (2**code_bits - 1)).clamp(max=largest)
    scale = step.half()
    scale = torch.where(scale.float() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    finite = (high - low).isfinite()
    return torch.where(finite, scale, 0.0), torch.where(finite, zero, torch.nan)


def nearest_codes(values: Tensor, scale: Tensor, zero: Tensor, code_bits: int) -> Tensor:
    """Codes, as float32, of float32 ``values``; of a group that is not finite: 0."""
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    return torch.round((values - zero.float()) * inverse).nan_to_num(nan=0.0).clamp(0, 2**code_bits - 1)


def quantise_rows(weight: Tensor, bits: int) -> Tensor:
    """A linear layer's weight ``[out_features, in_features]`` as rows of bytes, uint8 (csrc/kernels/weights.h)."""
    groups = list(weight.float().split(64, dim=1))
    pairs, codes = [], []
    for group in groups:
        scale, zero = code_params(group.amin(1, keepdim=True), group.amax(1, keepdim=True), bits)
        pairs.append(torch.cat([scale, zero], dim=1).view(torch.uint8))
        code = nearest_codes(group, scale, zero, bits).to(torch.uint8)
        code = torch.nn.functional.pad(code, (0, 64 - code.shape[1]))
        codes.append(code if bits == 8 else code[:, :32] | code[:, 32:] << 4)
    rows = torch.cat(codes + pairs, dim=1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64))


def dequantise_rows(rows: Tensor, *, bits: int, in_features: int) -> Tensor:
    """What rows of bytes stand for: ``[out_features, in_features]``, float32."""
    group_count, group_bytes = -(-in_features // 64), 64 * bits // 8
    codes, pairs, _ = rows.tensor_split([group_count * group_bytes, group_count * (group_bytes + 4)], dim=1)
    codes = codes.unflatten(1, (group_count, group_bytes))
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=2)
    scale, zero = pairs.clone().view(torch.float16).double().unflatten(1, (group_count, 2)).split(1, dim=2)
    return (zero + scale * codes).flatten(1)[:, :in_features].float()


def quantised_linear(x: Tensor, rows: Tensor, *, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float64, ``[..., out_features]``."""
    weight = dequantise_rows(rows, bits=bits, in_features=x.shape[-1]).double()
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def widen_e8m0(scales: Tensor) -> Tensor:
    """Exponents of 2 plus 127, uint8, as float32; 255 is NaN (OCP Microscaling formats 1.0, section 5.4.1)."""
    return torch.where(scales == 255, torch.nan, (scales.float() - 127).exp2())


def widen_mxfp4(values: Tensor, scales: Tensor) -> Tensor:
    """uint8 ``[..., in / 2]``, two elements to a byte, and ``[..., in / 32]``: ``[..., in]``, float32
    (csrc/kernels/weights.h)."""
    codes = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)
    elements = torch.tensor(_E2M1, device=values.device)[codes.int()]
    return elements * widen_e8m0(scales).repeat_interleave(32, -1)


def widen_fp8(values: Tensor, scales: Tensor, *, block: tuple[int, int], begin: tuple[int, int] = (0, 0)) -> Tensor:
    """``[..., rows, in]`` times the scales of blocks, ``[..., rows of blocks, columns of blocks]``: float32."""
    for dim, (side, first) in zip((-2, -1), zip(block, begin, strict=True), strict=True):
        scales = scales.repeat_interleave(side, dim).narrow(dim, first, values.shape[dim])
    return values.float() * scales


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
