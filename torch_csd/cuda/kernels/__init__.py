"""The kernels as methods: page images packed, unpacked, checked and attended to. Knows nothing of files.

Everything is issued to the stream that is given, and returns at once. What a call is given (pages included) must stay
as it is until the stream has done it; a tensor that torch allocated for another stream is the caller's to keep (or to
``record_stream``). What the calls allocate for themselves is allocated on that stream, so torch may free it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_csd.catalogue import BLOCK_BYTES, PAGE_TOKENS
from torch_csd.cuda.device import Device, Kernel, Stream
from torch_csd.cuda.layout import PageLayout

ELEMENTS = {torch.float32: "csd::Float32", torch.bfloat16: "csd::BFloat16", torch.float16: "csd::Float16"}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WARP_THREADS = 32
_ATTEND_WARPS = 4  # kAttendWarps in attend.cu
_MERGE_WARPS = 4  # kMergeWarps in merge.cu
_PACK_THREADS = 256  # kPackThreads in pack.cu
_CHECKSUM_THREADS = 256  # kChecksumThreads in checksum.cu
MERGE_PARTIALS_MAX = 8  # kMergePartials in merge.cu

# Queries of one kv head from which on pages are unpacked and multiplied by torch. On paper (H100), for an element of
# bfloat16: the kernel reads it from L2 again for each 16 queries, 0.36 ps of 5.5 TB/s; torch pays 3 ps to bring it to
# float32 and back through memory, and 0.54 ps of float32 arithmetic for 16 queries. So the kernel would win for any
# number of queries if it ran at L2's speed. At half of that they meet at 270. To be measured.
MANY_QUERIES = 256
# Of what torch's way holds at once besides its result: K, V and scores of a few pages.
UNPACKED_BYTES = 256 * 2**20


class Partial(NamedTuple):
    """Attention over some of the keys: merges with that over others. Empty: out 0, lse -inf."""

    out: Tensor  # float32 [batch, num_heads, q_len, head_dim_v]
    lse: Tensor  # float32 [batch, num_heads, q_len], natural log


class Pages(NamedTuple):
    """Page images in device memory; row r's are ``offsets[r]`` to ``offsets[r + 1]`` of them, in any order."""

    addresses: Tensor  # int64 [count], multiples of 64
    indices: Tensor  # int32 [count]: token t of the page is at position 64 * index + t, below 2**31
    offsets: Tensor  # int32 [batch + 1], on the device
    counts: tuple[int, ...]  # the same on the host: pages of each row

    @staticmethod
    def of(rows: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> Pages:
        """From ``(address, index)`` of each row's pages. Copies from pageable memory: waits for the device."""
        counts = tuple(len(row) for row in rows)
        flat = [page for row in rows for page in row]
        return Pages(
            torch.tensor([address for address, _ in flat], dtype=torch.int64, device=device),
            torch.tensor([index for _, index in flat], dtype=torch.int32, device=device),
            torch.tensor([sum(counts[:r]) for r in range(len(counts) + 1)], dtype=torch.int32, device=device),
            counts,
        )


@dataclass(frozen=True)
class Rules:
    """What is done to scores, in this order: soft-cap, mask, ALiBi, and what a query does not see is left out."""

    scale: float
    kv_end: Tensor  # int32 [batch]: row r sees positions below kv_end[r]
    kv_begin: int = 0  # and not below this one
    softcap: float | None = None  # softcap * tanh(score / softcap)
    positions: Tensor | None = None  # int32 [batch]: of query 0; query i is at positions[r] + i
    causal: bool = False  # sees positions up to its own
    window: int | None = None  # sees positions > its own - window
    mask: Tensor | None = None  # float32, added; expands to [batch, num_heads, q_len, columns]
    mask_begin: int = 0  # the position of the mask's column 0; positions that have no column are not seen
    alibi_slopes: Tensor | None = None  # float32 [num_heads]: adds slope * (position - the query's position)

    def __post_init__(self) -> None:
        if self.positions is None and (self.causal or self.window is not None or self.alibi_slopes is not None):
            raise ValueError("causal, window and alibi_slopes need positions")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        for name, dtype in (
            ("kv_end", torch.int32), ("positions", torch.int32), ("mask", torch.float32),
            ("alibi_slopes", torch.float32),
        ):  # fmt: skip
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor is not None and name != "mask" and not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _element(layout: PageLayout) -> str:
    return f"csd::Codes<{layout.code_bits}>" if layout.code_bits else ELEMENTS[layout.dtype]


class Kernels:
    """Of one device. Stateless but for what the device has compiled: any thread, any stream."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def pack(
        self,
        k: Tensor,
        v: Tensor,
        layout: PageLayout,
        out: Tensor,
        *,
        token_begin: int,
        page_count: int,
        stream: Stream,
    ) -> None:
        """Page images of the tokens from `token_begin` on, bit for bit as the CPU writes them.

        Where k and v end before the last page does, its other slots become zeros. Padding is zeros too.

        Args:
            k, v: ``[batch, num_kv_heads, tokens, head_dim]``, of one dtype, the last dimension dense.
            out: uint8 ``[batch, page_count, page_bytes]``, 4-byte aligned; pages adjacent, rows not necessarily.
        """
        batch, num_kv_heads, tokens, head_dim_k = k.shape
        if k.shape[:3] != v.shape[:3] or (num_kv_heads, head_dim_k, v.shape[3]) != layout[:3]:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit pages of {layout}")
        if k.dtype != v.dtype or k.dtype not in ELEMENTS or k.stride(3) != 1 or v.stride(3) != 1:
            raise ValueError(
                f"k and v must be of one floating dtype, the last dimension dense, got {k.dtype} and {v.dtype}, "
                f"strides {k.stride()} and {v.stride()}"
            )
        last = token_begin + PAGE_TOKENS * page_count
        if not 0 <= token_begin <= tokens or last - tokens >= (1 if layout.code_bits else PAGE_TOKENS):
            raise ValueError(f"tokens {token_begin} to {last} make no pages of {tokens} tokens")
        page_bytes = layout.page_bytes
        if out.dtype != torch.uint8 or out.shape != (batch, page_count, page_bytes):
            raise ValueError(f"out must be uint8 {(batch, page_count, page_bytes)}, got {out.dtype} {tuple(out.shape)}")
        if out.numel() == 0:
            return
        if out.stride()[1:] != (page_bytes, 1):
            raise ValueError(f"the pages of a row must be adjacent in out, got strides {out.stride()}")
        self.device.launch(
            Kernel("pack", f"csd::pack<{ELEMENTS[k.dtype]}, {_element(layout)}>"),
            (page_count, num_kv_heads, 2 * batch),
            (_PACK_THREADS, 1, 1),
            (
                k, *(np.int64(stride) for stride in k.stride()[:3]),
                v, *(np.int64(stride) for stride in v.stride()[:3]),
                np.int32(token_begin), np.int32(tokens), np.int32(layout.head_dim_k), np.int32(layout.head_dim_v),
                out, np.int64(out.stride(0)), np.int64(page_bytes),
            ),
            stream=stream,
        )  # fmt: skip

    def unpack(
        self, addresses: Tensor, layout: PageLayout, *, dtype: torch.dtype, stream: Stream
    ) -> tuple[Tensor, Tensor]:
        """K and V ``[page_count, num_kv_heads, 64, head_dim]`` of page images, allocated on the stream.

        Slots that hold no token give what is in them: anything.

        Args:
            addresses: int64 ``[page_count]``, of page images.
        """
        with self.device.use(stream):
            shape = (addresses.shape[0], layout.num_kv_heads, PAGE_TOKENS)
            k = torch.empty(*shape, layout.head_dim_k, dtype=dtype, device=self.device.torch_device)
            v = torch.empty(*shape, layout.head_dim_v, dtype=dtype, device=self.device.torch_device)
            if shape[0]:
                self.device.launch(
                    Kernel("pack", f"csd::unpack<{_element(layout)}, {ELEMENTS[dtype]}>"),
                    (shape[0], layout.num_kv_heads, 2),
                    (_PACK_THREADS, 1, 1),
                    (addresses, np.int32(layout.head_dim_k), np.int32(layout.head_dim_v), k, v),
                    stream=stream,
                )
        return k, v

    def checksums(self, pages: Tensor, page_bytes: int, out: Tensor, *, stream: Stream) -> None:
        """CRC-32C of each of consecutive page images.

        Args:
            pages: uint8, contiguous, 16-byte aligned, ``n * page_bytes`` of them.
            page_bytes: a multiple of 4096.
            out: ``[n]``, uint32 or int32 (the same bits).
        """
        if page_bytes <= 0 or page_bytes % BLOCK_BYTES or pages.numel() != out.numel() * page_bytes:
            raise ValueError(f"{pages.numel()} bytes are not {out.numel()} pages of {page_bytes}, a multiple of 4096")
        if pages.dtype != torch.uint8 or out.dtype not in (torch.uint32, torch.int32) or not pages.is_contiguous():
            raise ValueError(f"pages must be uint8 and contiguous, out uint32; got {pages.dtype} and {out.dtype}")
        if not out.is_contiguous() or pages.data_ptr() % 16:
            raise ValueError("out must be contiguous, and pages aligned to 16 bytes")
        if out.numel():
            self.device.launch(
                Kernel("checksum", "csd::checksum"),
                (out.numel(), 1, 1),
                (_CHECKSUM_THREADS, 1, 1),
                (pages, np.int64(page_bytes), out),
                stream=stream,
            )

    def new_partial(self, batch: int, num_heads: int, q_len: int, head_dim_v: int) -> Partial:
        """An empty one, allocated and filled on torch's current stream: call it inside ``device.use(stream)``."""
        options = {"dtype": torch.float32, "device": self.device.torch_device}
        out = torch.zeros(batch, num_heads, q_len, head_dim_v, **options)
        return Partial(out, torch.full((batch, num_heads, q_len), -torch.inf, **options))

    def attend(
        self, q: Tensor, pages: Pages, layout: PageLayout, rules: Rules, partial: Partial, *, stream: Stream
    ) -> None:
        """Folds attention over the pages into `partial`.

        Args:
            q: ``[batch, num_heads, q_len, head_dim_k]``, float32, bfloat16 or float16.
        """
        batch, num_heads, q_len, head_dim_k = q.shape
        if head_dim_k != layout.head_dim_k or num_heads % layout.num_kv_heads or len(pages.counts) != batch:
            raise ValueError(
                f"q of {batch} rows, {num_heads} heads of {head_dim_k} does not fit pages of {len(pages.counts)} rows, "
                f"{layout.num_kv_heads} heads of {layout.head_dim_k}"
            )
        if partial.out.shape != (batch, num_heads, q_len, layout.head_dim_v) or not partial.out.is_contiguous():
            raise ValueError(f"the partial result does not fit q, it is {tuple(partial.out.shape)}")
        for name, shape in (("kv_end", (batch,)), ("positions", (batch,)), ("alibi_slopes", (num_heads,))):
            tensor = getattr(rules, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if q.dtype not in _KINDS:
            raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
        if q.numel() == 0 or sum(pages.counts) == 0:
            return
        with self.device.use(stream):
            q = q.contiguous()
            if num_heads // layout.num_kv_heads * q_len < MANY_QUERIES:
                self._attend_few(q, pages, layout, rules, partial, stream)
            else:
                self._attend_many(q, pages, layout, rules, partial, stream)

    def _attend_few(
        self, q: Tensor, pages: Pages, layout: PageLayout, rules: Rules, partial: Partial, stream: Stream
    ) -> None:
        batch, num_heads, q_len, _ = q.shape
        group = num_heads // layout.num_kv_heads
        # 16 queries of a wide head have more sums than a thread has registers, or are more than shared memory holds:
        # they are done in eights, and their pages come from L2 again.
        narrow = layout.head_dim_v <= 128 and layout.head_dim_k <= 256
        queries = 16 if group * q_len > 8 and narrow else 8
        query_blocks = -(-group * q_len // queries)
        split_count = self._split_count(batch * layout.num_kv_heads * query_blocks, max(pages.counts), layout, queries)
        out = torch.empty(split_count, *partial.out.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(split_count, *partial.lse.shape, dtype=torch.float32, device=q.device)
        mask, mask_strides, mask_count = rules.mask, (0, 0, 0, 0), 0
        if mask is not None:
            mask = mask.expand(batch, num_heads, q_len, mask.shape[-1])
            mask_strides, mask_count = mask.stride(), mask.shape[3]
        name = (
            f"csd::attend<{_element(layout)}, {layout.head_dim_k}, {layout.head_dim_v}, {queries}, "
            f"{_q_parts(q.dtype, layout)}>"
        )
        arguments = (
            q, np.int32(_KINDS[q.dtype]), np.int32(q_len), np.int32(group),
            pages.addresses, pages.indices, pages.offsets, np.int32(split_count), np.int32(query_blocks),
            np.float32(rules.scale), np.float32(rules.softcap or 0.0), np.int32(rules.causal),
            np.int32(rules.window or 0), np.int32(rules.kv_begin), rules.kv_end, rules.positions,
            mask, *(np.int64(stride) for stride in mask_strides[:3]), np.int32(mask_strides[3]),
            np.int32(rules.mask_begin), np.int32(mask_count), rules.alibi_slopes, out, lse,
        )  # fmt: skip
        self.device.launch(
            Kernel("attend", name),
            (split_count * query_blocks, layout.num_kv_heads, batch),
            (_ATTEND_WARPS * _WARP_THREADS, 1, 1),
            arguments,
            stream=stream,
        )
        self._fold(out, lse, partial, stream)

    def _attend_many(
        self, q: Tensor, pages: Pages, layout: PageLayout, rules: Rules, partial: Partial, stream: Stream
    ) -> None:
        """Row by row, a few pages at a time: unpacked to float32, multiplied by torch, folded in."""
        batch, num_heads, q_len, head_dim_k = q.shape
        num_kv_heads = layout.num_kv_heads
        group = num_heads // num_kv_heads
        slot = torch.arange(PAGE_TOKENS, dtype=torch.int32, device=q.device)
        query = torch.arange(q_len, dtype=torch.int32, device=q.device)[:, None]
        slopes = None if rules.alibi_slopes is None else rules.alibi_slopes.view(num_kv_heads, group, 1, 1)
        # Scores, and what becomes of them, of 64 tokens; K and V of a page.
        page_bytes = 4 * PAGE_TOKENS * (4 * num_heads * q_len + 3 * num_kv_heads * (head_dim_k + layout.head_dim_v))
        pages_at_once = max(UNPACKED_BYTES // page_bytes, 1)
        first = 0
        for row, count in enumerate(pages.counts):
            grouped = q[row].float().view(num_kv_heads, group * q_len, head_dim_k)
            out = partial.out[row].view(num_kv_heads, group * q_len, layout.head_dim_v)
            lse = partial.lse[row].view(num_kv_heads, group * q_len, 1)
            mask = None
            if rules.mask is not None:
                mask = rules.mask.expand(batch, num_heads, q_len, -1)[row].unflatten(0, (num_kv_heads, group))
            for begin in range(first, first + count, pages_at_once):
                end = min(begin + pages_at_once, first + count)
                k, v = self.unpack(pages.addresses[begin:end], layout, dtype=torch.float32, stream=stream)
                key = (pages.indices[begin:end, None] * PAGE_TOKENS + slot).flatten()
                inside = (key >= rules.kv_begin) & (key < rules.kv_end[row])
                # Slots outside may hold a NaN, which not even a probability of 0 makes harmless.
                v = v.transpose(0, 1).flatten(1, 2).masked_fill(~inside[:, None], 0.0)
                scores = grouped @ k.transpose(0, 1).flatten(1, 2).mT * rules.scale
                scores = scores.view(num_kv_heads, group, q_len, -1)
                if rules.softcap:
                    scores = rules.softcap * torch.tanh(scores / rules.softcap)
                seen = inside[None, :]
                if mask is not None:
                    column = key - rules.mask_begin
                    seen = seen & (column >= 0) & (column < mask.shape[3])
                    scores = scores + mask[..., column.clamp(0, mask.shape[3] - 1)]
                if rules.positions is not None:
                    position = rules.positions[row] + query
                    if slopes is not None:
                        scores = scores + slopes * (key - position)
                    if rules.causal:
                        seen = seen & (key <= position)
                    if rules.window is not None:
                        seen = seen & (key > position - rules.window)
                scores = scores.masked_fill(~seen, -torch.inf).view(num_kv_heads, group * q_len, -1)
                new_lse = torch.logaddexp(lse, torch.logsumexp(scores, dim=2, keepdim=True))
                base = new_lse.masked_fill(new_lse == -torch.inf, 0.0)
                out.mul_(torch.exp(lse - base)).baddbmm_(torch.exp(scores - base), v)
                lse.copy_(new_lse)
            first += count

    def _split_count(self, base: int, page_count: int, layout: PageLayout, queries: int) -> int:
        """Blocks for each of `base` units of work: enough to fill the device, and then enough to end together."""
        blocks_per_multiprocessor = 3 if layout.head_dim_v <= 128 and queries == 8 else 2  # attend_blocks in attend.cu
        wanted = self.device.multiprocessor_count * blocks_per_multiprocessor
        filled = min(-(-wanted // base), -(-page_count // _ATTEND_WARPS))
        # Four waves, so that the last one is short; of eight tiles a warp at least, so that a block's start and end
        # are a small part of it.
        balanced = min(-(-4 * wanted // base), page_count // (8 * _ATTEND_WARPS))
        return max(filled, balanced, 1)

    def _fold(self, outs: Tensor, lses: Tensor, partial: Partial, stream: Stream) -> None:
        rows, head_dim_v = partial.lse.numel(), partial.out.shape[3]
        self.device.launch(
            Kernel("merge", "csd::fold"),
            (-(-rows // _MERGE_WARPS), 1, 1),
            (_MERGE_WARPS * _WARP_THREADS, 1, 1),
            (outs, lses, np.int32(outs.shape[0]), np.int32(rows), np.int32(head_dim_v), *partial),
            stream=stream,
        )

    def merge(
        self, partials: Sequence[Partial], *, dtype: torch.dtype, sinks: Tensor | None = None, stream: Stream
    ) -> tuple[Tensor, Tensor]:
        """Attention over all their keys.

        Args:
            partials: 1 to 8, of the same shape.
            sinks: ``[num_heads]``, float32: logits that join the softmax and attend to nothing.

        Returns:
            ``out [batch, num_heads, q_len, head_dim_v]`` of `dtype`, rounded to nearest even, and ``lse`` without the
            last dimension, float32; allocated on the stream.
        """
        if not 1 <= len(partials) <= MERGE_PARTIALS_MAX:
            raise ValueError(f"merge takes 1 to {MERGE_PARTIALS_MAX} partial results, got {len(partials)}")
        if sinks is not None and (sinks.dtype != torch.float32 or not sinks.is_contiguous()):
            raise ValueError(f"sinks must be float32 and contiguous, got {sinks.dtype}, strides {sinks.stride()}")
        batch, num_heads, q_len, head_dim_v = partials[0].out.shape
        if any(partial.out.shape != partials[0].out.shape for partial in partials):
            raise ValueError(f"partial results of several shapes: {[tuple(partial.out.shape) for partial in partials]}")
        with self.device.use(stream):
            out = torch.empty_like(partials[0].out, dtype=dtype)
            lse = torch.empty_like(partials[0].lse)
            rows = lse.numel()
            if rows == 0:
                return out, lse
            missing = (None,) * (MERGE_PARTIALS_MAX - len(partials))
            sizes = (np.int32(size) for size in (rows, num_heads, q_len, head_dim_v))
            arguments = (
                np.int32(len(partials)), *(partial.out for partial in partials), *missing,
                *(partial.lse for partial in partials), *missing, sinks, *sizes, out, lse,
            )  # fmt: skip
            self.device.launch(
                Kernel("merge", f"csd::merge<{ELEMENTS[dtype]}>"),
                (-(-rows // _MERGE_WARPS), 1, 1),
                (_MERGE_WARPS * _WARP_THREADS, 1, 1),
                arguments,
                stream=stream,
            )
        return out, lse


def _q_parts(q_dtype: torch.dtype, layout: PageLayout) -> int:
    """16-bit numbers that q's are split into for the tensor cores (operand.cuh)."""
    if layout.code_bits:
        return 2  # a channel's scale is folded in
    if layout.dtype == torch.float16:
        return 2 if q_dtype == torch.float32 else 1
    return {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}[q_dtype]  # of 8 bits each
