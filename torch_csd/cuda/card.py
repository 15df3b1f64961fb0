"""A drive's share on one card: appends that it packs, attention that it computes, and who does what.

Attention of one call comes from up to three places, and is merged on the card: pages in its memory, pages that are
brought to it or attended to near the drive, and the newest tokens, whose page is still being filled, near the drive.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS
from torch_csd.cuda.calls import Call, Uses
from torch_csd.cuda.cost import CostModel, Rates, Work
from torch_csd.cuda.device import Device
from torch_csd.cuda.kernels import Kernels, Pages, Partial
from torch_csd.cuda.layout import PageLayout
from torch_csd.cuda.pages import Arrival, Incoming, Lease, Uploads, by_place, unreadable
from torch_csd.cuda.prefill import Packer
from torch_csd.cuda.resident import Residents, Share
from torch_csd.cuda.staging import Staging
from torch_csd.cuda.transfer import Transfer
from torch_csd.errors import StoreCorruptError, StoreError, StoreFullError

# Of decoding and speculation. What is to stay on the card is settled when they begin, with the prompt stored.
DECODE_QUERIES_MAX = 16

# Guesses at the next layer are acted on while most of them prove right.
TRUST_MAX = 4


class Card:
    """What a drive does with the layers whose tokens are on one card. Thread-safe: one call at a time."""

    def __init__(
        self,
        device: Device,
        transfer: Transfer,
        *,
        path: str,
        transfer_reason: str,
        rates: Rates | None,
        executor: str = "auto",
        budget_bytes: int = 0,
        staging_bytes: int = 256 << 20,
        checksums: bool = True,
    ):
        self._device = device
        self._path = path
        self._transfer_reason = transfer_reason
        self._executor = executor
        self._checksums = checksums
        self._model = None if rates is None else CostModel(rates)
        self._budget_bytes = budget_bytes
        self._kernels = Kernels(device)
        self._staging = Staging(device, transfer, staging_bytes)
        self._packer = Packer(device, self._kernels, self._staging)
        self._uploads = Uploads(device, self._staging)
        self._residents = Residents(device, budget_bytes)
        self._lock = threading.RLock()
        self._layouts: dict[int, PageLayout] = {}  # by layer
        self._summarised: set[int] = set()  # layers that keep what sparse attention chooses by
        # What the next layer will be asked for: by layer, the one after it, and its last span.
        self._after: dict[int, int] = {}
        self._spans: dict[int, tuple[int, int, int]] = {}  # row_begin, row_count, kv_begin
        self._last: int | None = None
        self._trust = 1
        self._near_calls = 0
        self._gpu_calls = 0
        self._last_work: Work | None = None
        self._closed = False
        self._process = os.getpid()
        # A store that the garbage collector finds may go in the middle of a call, in its thread: after it, then.
        self._depth = 0
        self._leaving: list[Callable[[], None]] = []

    def _is_ours(self) -> bool:
        """Not so in a forked child, whose every use of the drive is an error that the drive raises."""
        return os.getpid() == self._process

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                while self._depth == 0 and self._leaving:
                    self._leaving.pop(0)()

    def _leave(self, leave: Callable[[], None]) -> None:
        with self._lock:
            if self._depth > 0:
                self._leaving.append(leave)
            else:
                leave()

    # ---- layers --------------------------------------------------------------------------------------------------

    def adopt(
        self, handle: Tensor, num_kv_heads: int, head_dim_k: int, head_dim_v: int, dtype: torch.dtype, code_bits: int
    ) -> None:
        """A layer whose full pages are like this has a share in the card."""
        with self._lock:
            self._layouts[int(handle[1])] = PageLayout(num_kv_heads, head_dim_k, head_dim_v, dtype, code_bits)

    def share(self, source: Tensor, handle: Tensor) -> None:
        with self._lock:
            self._layouts[int(handle[1])] = self._layouts[int(source[1])]
            if int(source[1]) in self._summarised:
                self._summarised.add(int(handle[1]))

    def keep_summary(self, handle: Tensor) -> None:
        with self._lock:
            self._summarised.add(int(handle[1]))

    def forget(self, handle: Tensor) -> None:
        if self._is_ours():
            self._leave(lambda: self._forget(handle))

    def _forget(self, handle: Tensor) -> None:
        layer = int(handle[1])
        if not self._closed:
            self._packer.settle(layer)
            if self._spans.pop(layer, None) is not None:
                self._uploads.drop_ahead()
            self._residents.forget(handle)
        self._layouts.pop(layer, None)
        self._summarised.discard(layer)
        self._after = {before: after for before, after in self._after.items() if layer not in (before, after)}
        if self._last == layer:
            self._last = None

    # ---- appends -------------------------------------------------------------------------------------------------

    def append(self, handle: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None) -> ops.LayerState | None:
        if not self._is_ours():
            return None
        with self._entered():
            self.settle(handle)
            layout = self._layouts.get(int(handle[1]))
            if layout is None or lengths is not None or int(handle[1]) in self._summarised:
                return None
            state = ops.layer_info(handle)
            alike = len(set(state.lengths)) <= 1 and len(state.lengths) in (0, k.shape[0])
            fits = (
                k.shape[:3] == v.shape[:3]
                and (k.shape[1], k.shape[3], v.shape[3]) == (layout.num_kv_heads, layout.head_dim_k, layout.head_dim_v)
                and k.shape[0] > 0
            )
            if not alike or not fits:
                return None
            k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
            if k.shape[2] > DECODE_QUERIES_MAX:
                self._uploads.drop_ahead()  # something else begins, which needs the memory
            return self._packer.append(handle, k, v, layout, state.lengths[0] if state.lengths else 0)

    def settle(self, handle: Tensor | None = None) -> None:
        if not self._is_ours():
            return
        with self._entered():
            failed = self._packer.settle(None if handle is None else int(handle[1]))
            if failed is not None:
                error, offset = failed
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise (StoreFullError if full else StoreError)(
                    f"{self._path}: writing KV pages from the card failed at byte {offset} (their append is undone): "
                    f"{reason}"
                ) from error

    # ---- attention -----------------------------------------------------------------------------------------------

    def attend(
        self,
        handle: Tensor,
        q: Tensor,
        *,
        scale: float,
        head_dim_v: int,
        mask: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
        causal: int,
        window: int,
        softcap: float,
        row_begin: int,
        kv_begin: int,
        kv_end: int,
    ) -> tuple[Tensor, Tensor] | None:
        if not self._is_ours():
            return None
        with self._entered():
            if self._executor == "near" and self._budget_bytes == 0:
                self._near_calls += 1
                return None
            layout = self._layouts.get(int(handle[1]))
            if layout is None:
                return None
            state = ops.layer_info(handle)
            kv_begin = state.begin if kv_begin == -1 else kv_begin
            rows = slice(row_begin, row_begin + q.shape[0])
            ends = np.array(state.lengths[rows] if kv_end < 0 else [kv_end] * q.shape[0], dtype=np.int64)
            call = Call(
                *(handle, q.detach(), scale, head_dim_v, mask, sinks, alibi_slopes, causal, window, softcap),
                *(row_begin, kv_begin, kv_end, ends),
            )
            # What is wrong with a call, and what is rare, is the drive's to deal with.
            if not call.is_plain(layout, len(state.lengths)):
                return None
            if causal == ops.CAUSAL_UPPER_LEFT:
                call = dataclasses.replace(call, causal=ops.CAUSAL_LOWER_RIGHT)
            self._packer.note_finished()
            return self._attend(call, layout, state)

    def _attend(self, call: Call, layout: PageLayout, state: ops.LayerState) -> tuple[Tensor, Tensor]:
        start_s = time.perf_counter()
        batch = call.q.shape[0]
        span = dict(row_begin=call.row_begin, row_count=batch, kv_begin=call.kv_begin, kv_end=call.kv_end)
        lease = Lease(call.handle, **span)
        try:
            # Each place serves one range of tokens: the card those before a page, the drive's executor the others.
            first_page = call.kv_begin // PAGE_TOKENS
            counts = np.bincount(lease.table[:, ops.ROW] - call.row_begin, minlength=batch)
            end_page = first_page + int(counts.min())
            share = self._share(call, layout, state)
            share_end = first_page if share is None else min(max(share.end // PAGE_TOKENS, first_page), end_page)
            uses = Uses.of(lease.table, call, end_page)
            if len(uses.pages) == 0:  # nothing to choose about: only tails, or what nobody sees
                return self._near(call, call.q.cpu(), call.kv_begin, sinks=call.sinks)
            work = self._work(call, layout, uses, share_end)
            executor = self._choose(work)
            end_page = end_page if executor == "gpu" else share_end
            uses = uses.some(uses.indices < end_page)
            if len(uses.pages) == 0:
                result = self._near(call, call.q.cpu(), call.kv_begin, sinks=call.sinks)
            else:
                result = self._attend_on_card(call, layout, lease, uses, share, end_page, foresee=executor == "gpu")
        finally:
            lease.end()
        if self._model is not None:
            self._device.current_stream().record_event().synchronize()
            self._model.observe(executor, work, time.perf_counter() - start_s)
        return result

    def _share(self, call: Call, layout: PageLayout, state: ops.LayerState) -> Share | None:
        if self._budget_bytes == 0:
            return None
        share = self._residents.find(call.handle, state)
        decoding = call.q.shape[2] <= DECODE_QUERIES_MAX
        if share is None and decoding and self._residents.may_give(call.handle, state):
            stored_bytes = 0
            for number, other in self._layouts.items():
                lengths = ops.layer_info(ops.layer_handle(call.handle, number)).lengths
                stored_bytes += sum(length // PAGE_TOKENS for length in lengths) * other.page_bytes
            share = self._residents.give(call.handle, state, layout.page_bytes, stored_bytes)
        return share

    def _work(self, call: Call, layout: PageLayout, uses: Uses, share_end: int) -> Work:
        pages, places, row_counts = np.unique(uses.pages, return_index=True, return_counts=True)
        on_card = uses.indices[places] < share_end
        on_drive = ~on_card & (uses.file_offsets[places] >= 0)
        queries = call.q.shape[2] * call.q.shape[1] // layout.num_kv_heads
        return Work(
            drive_bytes=int(on_drive.sum()) * layout.page_bytes,
            host_bytes=int((~on_card & ~on_drive).sum()) * layout.page_bytes,
            card_bytes=int(on_card.sum()) * layout.page_bytes,
            queries=queries * int(row_counts.max(initial=1)),
            q_bytes=4 * call.q.numel(),
            partial_bytes=4 * call.q.numel() // call.q.shape[3] * (call.head_dim_v + 1),
        )

    def _choose(self, work: Work) -> str:
        self._last_work = work
        executor = self._executor if self._model is None else self._model.choose(work)
        if executor == "near":
            self._near_calls += 1
        else:
            self._gpu_calls += 1
        return executor

    def _attend_on_card(
        self,
        call: Call,
        layout: PageLayout,
        lease: Lease,
        uses: Uses,
        share: Share | None,
        end_page: int,
        *,
        foresee: bool,
    ) -> tuple[Tensor, Tensor]:
        """``uses``, all before ``end_page``, on the card; the tokens from there on near the drive, at the same time."""
        if foresee:
            self._foresee(call)
        stream = self._device.current_stream()
        present = np.zeros(len(uses.pages), bool) if share is None else share.has(uses.pages)
        incoming = Incoming(self._uploads, lease, layout.page_bytes, uses.some(~present))
        checks: list[tuple[Arrival, Tensor]] = []
        on_card = self._new_partial(call)
        try:
            incoming.begin()
            rest_begin = max(end_page * PAGE_TOKENS, call.kv_begin)
            has_rest = bool((call.ends > rest_begin).any())
            # q goes down before the kernels are issued, which it would wait for; they run while the processor attends.
            q_below = call.q.float().cpu() if has_rest else None
            if share is not None:
                here = uses.some(present)
                self._attend_pages(call, layout, here, share.addresses(here.pages), on_card)
            rest = self._near(call, q_below, rest_begin, sinks=None) if has_rest else None
            for arrival, part, slots in incoming:
                if arrival.error is not None:
                    raise unreadable(self._path, arrival)
                for event in arrival.ready:
                    stream.wait_event(event)
                if self._checksums and (arrival.file_offsets >= 0).any():
                    checks.append((arrival, self._checksums_of(arrival, layout)))
                if share is not None:
                    for slot in np.flatnonzero(share.wants(arrival.pages)).tolist():
                        share.keep(int(arrival.pages[slot]), arrival.image(slot))
                addresses = arrival.chunk.memory.data_ptr() + slots * layout.page_bytes
                self._attend_pages(call, layout, part, addresses, on_card)
                incoming.finish(arrival, stream.record_event())
            if foresee:
                self._read_ahead(call)
            self._compare(checks, share)
        finally:
            incoming.close()
        return self._merge(call, [on_card] if rest is None else [on_card, rest])

    def _near(self, call: Call, q: Tensor, begin: int, *, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Near the drive, and back on the card: attention of ``q``, a copy of the call's, from token ``begin`` on."""
        mask = call.mask
        if mask is not None and mask.shape[3] > 1:
            mask = mask[..., begin - call.kv_begin :]
        out, lse = ops.attend_on_drive(
            call.handle,
            q,
            scale=call.scale,
            head_dim_v=call.head_dim_v,
            mask=None if mask is None else mask.cpu(),
            sinks=None if sinks is None else sinks.cpu(),
            alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes.cpu(),
            causal=call.causal,
            window=call.window,
            softcap=call.softcap,
            row_begin=call.row_begin,
            kv_begin=begin,
            kv_end=call.kv_end,
        )
        return self._to_card(out), self._to_card(lse)

    def _to_card(self, values: Tensor) -> Tensor:
        """Without waiting for the stream: CUDA takes pageable memory to a buffer of its own before it returns."""
        return values.to(self._device.torch_device, non_blocking=True)

    # ---- on the card ---------------------------------------------------------------------------------------------

    def _new_partial(self, call: Call) -> Partial:
        batch, num_heads, q_len, _ = call.q.shape
        return self._kernels.new_partial(batch, num_heads, q_len, call.head_dim_v)

    def _attend_pages(self, call: Call, layout: PageLayout, uses: Uses, addresses: np.ndarray, into: Partial) -> None:
        """Folds what the queries see of pages that are at these addresses into a partial."""
        if len(addresses) == 0:
            return
        offsets = np.searchsorted(uses.rows, np.arange(call.q.shape[0] + 1))
        # In one piece: what a copy of this size takes is its beginning.
        count = len(addresses)
        packed = np.concatenate(
            [addresses.view(np.int32), uses.indices.astype(np.int32), offsets.astype(np.int32)], dtype=np.int32
        )
        on_card = self._to_card(torch.from_numpy(packed))
        pages = Pages(
            on_card[: 2 * count].view(torch.int64),
            on_card[2 * count : 3 * count],
            on_card[3 * count :],
            tuple(np.diff(offsets).tolist()),
        )
        stream = self._device.current_stream()
        self._kernels.attend(call.q, pages, layout, call.rules, into, stream=stream)

    def _checksums_of(self, arrival: Arrival, layout: PageLayout) -> Tensor:
        images = arrival.chunk.memory[: len(arrival.pages) * layout.page_bytes]
        found = torch.empty(len(arrival.pages), dtype=torch.int32, device=self._device.torch_device)
        self._kernels.checksums(images, layout.page_bytes, found, stream=self._device.current_stream())
        return found

    def _compare(self, checks: list[tuple[Arrival, Tensor]], share: Share | None) -> None:
        """Waits for the checksums of what came from the drive."""
        if not checks:
            return
        found = torch.cat([checksums for _, checksums in checks]).cpu().numpy().view(np.uint32).astype(np.int64)
        wanted = np.concatenate([arrival.checksums for arrival, _ in checks])
        offsets = np.concatenate([arrival.file_offsets for arrival, _ in checks])
        bad = np.flatnonzero((offsets >= 0) & (found != wanted))
        if len(bad) == 0:
            return
        if share is not None:
            share.forget(np.concatenate([arrival.pages for arrival, _ in checks])[bad])
        place = int(bad[0])
        raise StoreCorruptError(
            f"{self._path}: a page that went to the card: checksum mismatch at byte {int(offsets[place])}: "
            f"found {int(found[place]):#010x}, wanted {int(wanted[place]):#010x}"
        )

    def _merge(self, call: Call, partials: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        partials = [Partial(*partial) for partial in partials]
        stream = self._device.current_stream()
        return self._kernels.merge(partials, dtype=call.q.dtype, sinks=call.sinks, stream=stream)

    # ---- before it is asked for ----------------------------------------------------------------------------------

    def _foresee(self, call: Call) -> None:
        layer = int(call.handle[1])
        if self._last is not None:
            right = self._after.get(self._last) == layer
            self._trust = min(self._trust + 1, TRUST_MAX) if right else max(self._trust - 2, 0)
            self._after[self._last] = layer
        self._last = layer
        self._spans[layer] = (call.row_begin, call.q.shape[0], call.kv_begin)

    def _read_ahead(self, call: Call) -> None:
        """Begins to bring the pages of the layer that came after this one the last time."""
        layer = self._after.get(int(call.handle[1]))
        span = self._spans.get(layer) if layer is not None else None
        if span is None or self._trust == 0 or layer not in self._layouts or layer == int(call.handle[1]):
            return
        handle = ops.layer_handle(call.handle, layer)
        page_bytes = self._layouts[layer].page_bytes
        row_begin, row_count, kv_begin = span
        state = ops.layer_info(handle)
        if self._packer.pending(layer) or len(state.lengths) < row_begin + row_count:
            return
        # Rows have grown by then, and a window may have moved on.
        lease = Lease(handle, row_begin=row_begin, row_count=row_count, kv_begin=max(kv_begin, state.begin), kv_end=-1)
        pages, places = np.unique(lease.table[:, ops.PAGE], return_index=True)
        share = self._residents.find(handle, state)
        if share is not None:
            places = places[~share.has(pages)]
        self._uploads.begin_ahead(lease, page_bytes, by_place(lease.table, places))

    # ---- reporting -----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float | str | bool]:
        with self._lock:
            transfer = self._staging.transfer
            stats = {
                "gpu": self._device.name,
                "executor": self._executor,
                "gpu_io": transfer.name,
                "gpu_reason": self._transfer_reason,
                "gpu_staging_bytes": self._staging.byte_count,
                "gpu_resident_bytes": self._residents.byte_count,
                "gpu_drive_read_bytes": self._uploads.drive_bytes,
                "gpu_host_read_bytes": self._uploads.host_bytes,
                "gpu_read_ahead_bytes": self._uploads.ahead_bytes,
                "gpu_read_ahead_wasted_bytes": self._uploads.wasted_bytes,
                "gpu_packed_bytes": self._packer.packed_bytes,
                "gpu_to_host_bytes": self._packer.to_memory_bytes,
                "gpu_written_bytes": transfer.written_bytes,
                "near_attends": self._near_calls,
                "gpu_attends": self._gpu_calls,
            }
            if self._model is not None and self._last_work is not None:
                stats["executor_choice"] = self._model.explain(self._last_work)
            return stats

    def close(self) -> None:
        """What was appended is awaited, or given up with an error that nobody is left to be told."""
        if self._is_ours():
            self._leave(self._close)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._packer.settle()
            self._uploads.drop_ahead()
            self._residents.close()
        finally:
            self._staging.close()
