"""Appends of many tokens that are on the card: it packs their pages, which go to the drive while the model goes on.

The drive gives the pages their places (``ops.append_reserved``); the tokens before and behind them, which share pages
with others or stay at full precision, are its own.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import BLOCK_BYTES, PAGE_TOKENS
from torch_csd.cuda.device import Device, Event
from torch_csd.cuda.kernels import Kernels
from torch_csd.cuda.layout import PageLayout
from torch_csd.cuda.pages import adjacent_runs
from torch_csd.cuda.staging import Chunk, Staging
from torch_csd.cuda.transfer import Completion

TAIL_PAGES = 2  # of full precision at the end of a quantised row: Drive::first_tail_page
# Fewer are packed by the processor as quickly, and without waiting for anything.
PACKED_PAGES_MIN = 4


def packed_range(length: int, tokens: int, quantised: bool) -> tuple[int, int]:
    """Which of ``tokens`` new tokens of a row of ``length`` are whole pages that stay: (first token, token count)."""
    begin = -length % PAGE_TOKENS
    end_page = (length + tokens) // PAGE_TOKENS
    if quantised:
        end_page = -(-(length + tokens) // PAGE_TOKENS) - TAIL_PAGES
    return begin, max(end_page * PAGE_TOKENS - length - begin, 0)


class _Append:
    """One append that is under way: which pages are still to come, and what went wrong."""

    def __init__(self, layer: int, lease: Tensor, table: np.ndarray, page_bytes: int):
        self.layer = layer
        self.lease = lease
        self.table = table
        self.page_bytes = page_bytes
        self.under_way = 0  # chunks and requests
        self.error: OSError | None = None
        self.error_offset = 0


class Packer:
    """Packs on a stream of its own; a chunk of pages at a time goes to its place."""

    def __init__(self, device: Device, kernels: Kernels, staging: Staging):
        self._device = device
        self._kernels = kernels
        self._staging = staging
        self._stream = device.new_stream()
        self._appends: deque[_Append] = deque()
        # Of the pages in each chunk, by block of the staging memory.
        self._checksums = device.new_pinned_memory(4 * -(-staging.byte_count // BLOCK_BYTES)).view(torch.int32)
        self.packed_bytes = 0
        self.to_memory_bytes = 0  # of these, to host memory

    def append(self, handle: Tensor, k: Tensor, v: Tensor, layout: PageLayout, length: int) -> ops.LayerState | None:
        """Appends k and v, ``[batch, num_kv_heads, tokens, head_dim]`` on the card, to rows of ``length`` tokens.

        None: there are too few whole pages among them, and nothing was done. Otherwise all of it is done when
        :meth:`settle` has returned.

        Raises:
            StoreFullError: the drive has no room. MemoryBudgetError: memory or ``gpu_staging`` has none.
        """
        begin, count = packed_range(length, k.shape[2], layout.code_bits != 0)
        if count < PACKED_PAGES_MIN * PAGE_TOKENS:
            return None
        self._staging.fit(layout.page_bytes)
        produced = self._device.current_stream().record_event()
        rest = [torch.cat([x[:, :, :begin], x[:, :, begin + count :]], dim=2).cpu() for x in (k, v)]
        lease = ops.new_lease(handle)
        state, table = ops.append_reserved(lease, handle, *rest, reserved_begin=begin, reserved_count=count)
        append = _Append(int(handle[1]), lease, table.numpy(), layout.page_bytes)
        self._appends.append(append)
        try:
            self._pack(append, k, v, layout, begin, count // PAGE_TOKENS, produced)
        except BaseException:
            self._abandon(append)
            raise
        return state

    def _pack(
        self, append: _Append, k: Tensor, v: Tensor, layout: PageLayout, begin: int, pages: int, produced: Event
    ) -> None:
        self._stream.wait_event(produced)
        per_chunk = self._staging.chunk_bytes // layout.page_bytes
        for row in range(k.shape[0]):
            row_k, row_v = k[row : row + 1], v[row : row + 1]
            for first in range(0, pages, per_chunk):
                places = np.arange(first, min(first + per_chunk, pages)) + row * pages
                chunk = self._take_chunk()
                try:
                    self._pack_chunk(append, chunk, places, row_k, row_v, layout, begin + first * PAGE_TOKENS)
                except BaseException:
                    self._staging.give_back(chunk, self._stream.record_event())
                    raise

    def _pack_chunk(
        self, append: _Append, chunk: Chunk, places: np.ndarray, k: Tensor, v: Tensor, layout: PageLayout, begin: int
    ) -> None:
        """Packs the pages of one row whose first token is token ``begin`` of k and v."""
        if chunk.free is not None:
            self._stream.wait_event(chunk.free)
        count = len(places)
        images = chunk.memory[: count * layout.page_bytes]
        checksums = torch.empty(count, dtype=torch.int32, device=self._device.torch_device)
        with self._device.use(self._stream):
            paged = images.view(1, count, layout.page_bytes)
            self._kernels.pack(k, v, layout, paged, token_begin=begin, page_count=count, stream=self._stream)
            self._kernels.checksums(images, layout.page_bytes, checksums, stream=self._stream)
            first_block = chunk.begin // BLOCK_BYTES
            on_host = self._checksums[first_block : first_block + count]
            on_host.copy_(checksums, non_blocking=True)
        packed = self._stream.record_event()
        self.packed_bytes += len(images)
        # k, v and checksums are kept for as long as the kernels use them.
        append.under_way += 1
        self._staging.when(packed, lambda: self._packed(append, chunk, places, on_host, (k, v, checksums)))

    def _packed(
        self, append: _Append, chunk: Chunk, places: np.ndarray, checksums: Tensor, kept: tuple[Tensor, ...]
    ) -> None:
        """The pages are in the chunk, and their checksums are known."""
        del kept
        offsets = append.table[places, ops.FILE_OFFSET]
        unsigned = checksums.numpy().view(np.uint32).astype(np.int64)
        users = [0]

        def leave() -> None:
            users[0] -= 1
            append.under_way -= 1
            if users[0] == 0:
                self._staging.give_back(chunk, None)

        def enter() -> None:
            users[0] += 1
            append.under_way += 1

        enter()
        append.under_way -= 1  # the chunk's own, which stood for all of these
        in_memory = np.flatnonzero(offsets < 0)
        if len(in_memory) > 0:
            enter()
            self._to_memory(append, chunk, places[in_memory], in_memory, leave)
        for begin, end in adjacent_runs(offsets, append.page_bytes):

            def written(completion: Completion, begin: int = begin, end: int = end) -> None:
                if completion.error is None:
                    ops.finish_reserved(append.lease, places[begin:end].tolist(), unsigned[begin:end].tolist())
                elif append.error is None:
                    append.error, append.error_offset = completion.error, int(offsets[begin])
                leave()

            enter()
            self._staging.move(
                chunk,
                begin * append.page_bytes,
                write=True,
                file_offset=int(offsets[begin]),
                byte_count=(end - begin) * append.page_bytes,
                after=None,  # the host has seen that they are packed
                done=written,
            )
        leave()

    def _to_memory(self, append: _Append, chunk: Chunk, places: np.ndarray, slots: np.ndarray, done) -> None:
        host = self._staging.host(chunk)
        size = append.page_bytes
        with self._device.use(self._stream):
            for slot in slots.tolist():
                part = slice(slot * size, (slot + 1) * size)
                host[part].copy_(chunk.memory[part], non_blocking=True)
        self.to_memory_bytes += len(slots) * size

        def copied() -> None:
            for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
                ops.fill_reserved(append.lease, [place], host, slot * size)
            done()

        self._staging.when(self._stream.record_event(), copied)

    def _take_chunk(self) -> Chunk:
        """Waits for the drive, if that is what keeps all of them."""
        while (chunk := self._staging.take()) is None:
            if not self._staging.pump(wait=True):
                raise RuntimeError(
                    "no chunk of the staging memory is free, and nothing is under way that would free one"
                )
        return chunk

    # ---- the end of an append ------------------------------------------------------------------------------------

    def pending(self, layer: int | None) -> list[_Append]:
        return [append for append in self._appends if layer is None or append.layer == layer]

    def settle(self, layer: int | None = None) -> tuple[OSError, int] | None:
        """Waits for the appends to a layer, or all. The first error of a write, and at which byte of the file.

        A layer whose pages did not all arrive is as long as before.
        """
        failed = None
        for append in self.pending(layer):
            self._await(append)
            if append.error is not None and failed is None:
                failed = append.error, append.error_offset
            self._end(append)
        return failed

    def note_finished(self) -> None:
        """Forgets appends that are done, without waiting."""
        for append in [append for append in self._appends if append.under_way == 0 and append.error is None]:
            self._end(append)

    def _await(self, append: _Append) -> None:
        while append.under_way > 0:
            if not self._staging.pump(wait=True):
                raise RuntimeError("pages of an append are under way, but nothing moves them")

    def _abandon(self, append: _Append) -> None:
        self._await(append)
        self._end(append)

    def _end(self, append: _Append) -> None:
        self._appends.remove(append)
        ops.end_lease(append.lease)
