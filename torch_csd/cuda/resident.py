"""Pages that stay on the card: a fixed share of each layer, since a scan over everything defeats any recency order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.catalogue import PAGE_TOKENS
from torch_csd.cuda.device import Device
from torch_csd.cuda.pages import Lease


class Share:
    """A layer's pages up to token ``end`` of all rows. They have memory on the card; each comes when first read."""

    def __init__(self, device: Device, lease: Lease, epoch: int, end: int, page_bytes: int):
        self.end = end
        self.page_bytes = page_bytes
        self.epoch = epoch
        self._lease = lease  # this object's from now on
        self._pages = np.unique(lease.table[:, ops.PAGE])
        self._present = np.zeros(len(self._pages), dtype=bool)
        with torch.inference_mode(False):  # it outlives the mode that it is made in
            self._memory = device.new_memory(len(self._pages) * page_bytes)

    @property
    def byte_count(self) -> int:
        return self._memory.numel()

    def covers(self, handle: Tensor, state: ops.LayerState) -> bool:
        """Whether these are still the pages of that range: tokens may have been reordered or cropped."""
        if state.epoch != self.epoch:
            if min(state.lengths, default=0) < self.end:
                return False
            now = _lease(handle, state, self.end)
            now.end()
            if not np.isin(now.table[:, ops.PAGE], self._pages).all():
                return False
            self.epoch = state.epoch
        return True

    def _slots(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each page a slot, and whether it is that page's."""
        slots = np.minimum(np.searchsorted(self._pages, pages), len(self._pages) - 1)
        return slots, self._pages[slots] == pages

    def wants(self, pages: np.ndarray) -> np.ndarray:
        """Which of these pages have memory here, and are not here yet."""
        slots, ours = self._slots(pages)
        return ours & ~self._present[slots]

    def has(self, pages: np.ndarray) -> np.ndarray:
        slots, ours = self._slots(pages)
        return ours & self._present[slots]

    def addresses(self, pages: np.ndarray) -> np.ndarray:
        """Device addresses of pages that are here."""
        return self._memory.data_ptr() + self._slots(pages)[0] * self.page_bytes

    def keep(self, page: int, image: Tensor) -> None:
        """Copies a wanted page here, on the current stream."""
        slot = int(self._slots(np.array([page]))[0][0])
        self._memory[slot * self.page_bytes : (slot + 1) * self.page_bytes].copy_(image, non_blocking=True)
        self._present[slot] = True

    def forget(self, pages: np.ndarray) -> None:
        """They turned out to be damaged."""
        slots, ours = self._slots(pages)
        self._present[slots[ours]] = False

    def close(self) -> None:
        self._lease.end()


class Residents:
    """The shares of all layers, in ``budget_bytes`` of device memory."""

    def __init__(self, device: Device, budget_bytes: int):
        self._device = device
        self._budget_bytes = budget_bytes
        self._shares: dict[int, Share] = {}  # by layer
        self._refused: dict[int, int] = {}  # by layer: tokens of its shortest row when there was no share to give

    @property
    def byte_count(self) -> int:
        return sum(share.byte_count for share in self._shares.values())

    def find(self, handle: Tensor, state: ops.LayerState) -> Share | None:
        share = self._shares.get(int(handle[1]))
        if share is None or (state.begin < share.end and share.covers(handle, state)):
            return share
        self.forget(handle)
        return None

    def give(self, handle: Tensor, state: ops.LayerState, page_bytes: int, stored_bytes: int) -> Share | None:
        """A share for a layer that has none: as much of each row as the budget is of ``stored_bytes``, all layers'."""
        part = min(1.0, self._budget_bytes / max(stored_bytes, 1))
        # Rounded up, so that small budgets are not lost: the last layers find what is left.
        pages = math.ceil(part * (min(state.lengths, default=0) // PAGE_TOKENS))
        fitting = (self._budget_bytes - self.byte_count) // page_bytes
        pages = min(pages, fitting // max(len(state.lengths), 1))
        # Not of a layer that has lost its beginning: a window moves on, and would soon have left these pages behind.
        if pages > 0 and state.begin == 0:
            lease = _lease(handle, state, pages * PAGE_TOKENS)
            # As far as all rows have pages that stay as they are.
            pages = int(np.bincount(lease.table[:, ops.ROW], minlength=len(state.lengths)).min())
            if pages > 0:
                try:
                    share = Share(self._device, lease, state.epoch, pages * PAGE_TOKENS, page_bytes)
                except BaseException:
                    lease.end()
                    raise
                self._shares[int(handle[1])] = share
                return share
            lease.end()
        self._refused[int(handle[1])] = min(state.lengths, default=0)
        return None

    def may_give(self, handle: Tensor, state: ops.LayerState) -> bool:
        """False for a layer that was refused, and has not become much longer."""
        refused = self._refused.get(int(handle[1]))
        return refused is None or min(state.lengths, default=0) >= 2 * max(refused, PAGE_TOKENS)

    def forget(self, handle: Tensor) -> None:
        self._refused.pop(int(handle[1]), None)
        share = self._shares.pop(int(handle[1]), None)
        if share is not None:
            share.close()

    def close(self) -> None:
        for share in self._shares.values():
            share.close()
        self._shares.clear()


def _lease(handle: Tensor, state: ops.LayerState, end: int) -> Lease:
    return Lease(handle, row_begin=0, row_count=len(state.lengths), kv_begin=state.begin, kv_end=end)
