"""Bringing a layer's pages to the card: in chunks, several under way, the next layer's before they are asked for.

A *table* is what :func:`ops.lease` returns, as a numpy array.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from torch_csd import ops
from torch_csd.cuda.calls import Uses
from torch_csd.cuda.device import Device, Event
from torch_csd.cuda.staging import Chunk, Staging
from torch_csd.cuda.transfer import Completion
from torch_csd.errors import StoreError


class Lease:
    """Pages of one layer that stay as they are as long as this does."""

    def __init__(self, handle: Tensor, *, row_begin: int, row_count: int, kv_begin: int, kv_end: int):
        self.handle = ops.new_lease(handle)
        span = dict(row_begin=row_begin, row_count=row_count, kv_begin=kv_begin, kv_end=kv_end)
        self.table = ops.lease(self.handle, handle, **span).numpy()

    def end(self) -> None:
        ops.end_lease(self.handle)


@dataclass
class Arrival:
    """Pages of a chunk, one behind another, that are there or on their way."""

    chunk: Chunk
    lease: Lease
    page_bytes: int
    pages: np.ndarray  # int64, as in the table
    file_offsets: np.ndarray  # int64; -1: came from host memory
    checksums: np.ndarray  # int64
    under_way: int = 0  # requests
    ready: list[Event] = field(default_factory=list)  # on the device: the bytes are there after these
    error: OSError | None = None
    error_offset: int = 0

    def image(self, slot: int) -> Tensor:
        return self.chunk.memory[slot * self.page_bytes : (slot + 1) * self.page_bytes]

    def note(self, completion: Completion) -> None:
        self.under_way -= 1
        if completion.error is not None:
            self.error, self.error_offset = completion.error, completion.request.file_offset
        elif completion.ready is not None:
            self.ready.append(completion.ready)


class Uploads:
    """Pages on their way to the card, and those that came before they were asked for."""

    def __init__(self, device: Device, staging: Staging):
        self.staging = staging
        self._copies = device.new_stream()
        self._device = device
        self._ahead: list[Arrival] = []
        self.host_bytes = 0  # brought so far from host memory
        self.drive_bytes = 0
        self.ahead_bytes = 0  # of both: begun before they were asked for
        self.wasted_bytes = 0  # of these: never used

    def begin(self, lease: Lease, places: np.ndarray, page_bytes: int) -> Arrival | None:
        """Begins to bring pages of a lease, as many as a chunk holds at most. None: no chunk is free."""
        chunk = self.staging.take()
        if chunk is None:
            return None
        table = lease.table[places]
        offsets, checksums = table[:, ops.FILE_OFFSET].copy(), table[:, ops.CHECKSUM].copy()
        arrival = Arrival(chunk, lease, page_bytes, table[:, ops.PAGE], offsets, checksums)
        if (offsets < 0).any():
            self._bring_from_memory(arrival, places)
        for first, last in adjacent_runs(offsets, page_bytes):
            size = (last - first) * page_bytes
            arrival.under_way += 1
            self.drive_bytes += size
            self.staging.move(
                chunk,
                first * page_bytes,
                write=False,
                file_offset=int(offsets[first]),
                byte_count=size,
                after=chunk.free,
                done=arrival.note,
            )
        return arrival

    def _bring_from_memory(self, arrival: Arrival, places: np.ndarray) -> None:
        chunk, page_bytes = arrival.chunk, arrival.page_bytes
        if chunk.free is not None:
            chunk.free.synchronize()  # what was copied from its host memory last
        host = self.staging.host(chunk)
        found = ops.copy_leased(arrival.lease.handle, places.tolist(), host, 0).numpy()
        # Some may have left memory since the lease was taken.
        arrival.file_offsets[:], arrival.checksums[:] = found[:, 0], found[:, 1]
        copied = np.flatnonzero(found[:, 0] < 0)
        with self._device.use(self._copies):
            for run in np.split(copied, np.flatnonzero(np.diff(copied) != 1) + 1):
                if len(run) > 0:
                    part = slice(int(run[0]) * page_bytes, (int(run[-1]) + 1) * page_bytes)
                    chunk.memory[part].copy_(host[part], non_blocking=True)
                    self.host_bytes += part.stop - part.start
        arrival.ready.append(self._copies.record_event())

    def wait(self, arrival: Arrival) -> None:
        """Until the host has nothing left to do for it."""
        while arrival.under_way > 0:
            if not self.staging.pump(wait=True):
                raise RuntimeError("pages are on their way to the card, but nothing moves them")

    def finish(self, arrival: Arrival, free: Event | None) -> None:
        """The chunk is free after the event."""
        self.staging.give_back(arrival.chunk, free)

    def give_up(self, arrival: Arrival) -> None:
        self.wait(arrival)
        for event in arrival.ready:
            event.synchronize()
        self.finish(arrival, None)

    # ---- before they are asked for -------------------------------------------------------------------------------

    def begin_ahead(self, lease: Lease, page_bytes: int, places: np.ndarray) -> None:
        """Begins to bring these pages, as far as chunks are free; the lease is this object's from now on."""
        count = self.staging.chunk_bytes // page_bytes
        for begin in range(0, len(places), count) if count > 0 else ():
            # One is left, so that a prefill never finds all of them taken.
            arrival = (
                self.begin(lease, places[begin : begin + count], page_bytes) if self.staging.free_count > 1 else None
            )
            if arrival is None:
                break
            self._ahead.append(arrival)
            self.ahead_bytes += len(arrival.pages) * page_bytes
        if not any(arrival.lease is lease for arrival in self._ahead):
            lease.end()

    def take_ahead(self, pages: np.ndarray) -> list[Arrival]:
        """What has been begun and holds only some of these pages; what was begun besides is given up."""
        taken = [arrival for arrival in self._ahead if np.isin(arrival.pages, pages).all()]
        others = [arrival for arrival in self._ahead if not any(arrival is one for one in taken)]
        self._ahead = []
        for arrival in others:
            self.wasted_bytes += len(arrival.pages) * arrival.page_bytes
            self.give_up(arrival)
        for lease in {id(arrival.lease): arrival.lease for arrival in others}.values():
            if not any(arrival.lease is lease for arrival in taken):
                lease.end()
        return taken

    def drop_ahead(self) -> None:
        self.take_ahead(np.empty(0, dtype=np.int64))


class Incoming:
    """The pages that one call needs and the card has not: iterated over, each chunk's as they come, with its uses.

    What was begun before the call comes first; others are begun as chunks become free.
    """

    def __init__(self, uploads: Uploads, lease: Lease, page_bytes: int, uses: Uses):
        self._uploads = uploads
        self._staging = uploads.staging
        self._lease = lease
        self._page_bytes = page_bytes
        pages, first_use = np.unique(uses.pages, return_index=True)
        ahead = uploads.take_ahead(pages)
        self._ahead_leases = {id(arrival.lease): arrival.lease for arrival in ahead}
        if page_bytes > self._staging.chunk_bytes:
            self._staging.fit(page_bytes)
        self._pages_per_chunk = self._staging.chunk_bytes // page_bytes
        ahead_pages = np.concatenate([arrival.pages for arrival in ahead]) if ahead else np.empty(0, dtype=np.int64)
        missing = first_use[~np.isin(pages, ahead_pages)]
        self._places = by_place(lease.table, uses.places[missing])
        self._pending = deque(ahead)
        self._begun = 0  # of _places

        # Uses in the order in which their chunks come, and where each is in its chunk.
        counts = [len(arrival.pages) for arrival in ahead]
        rest = len(self._places)
        counts += [min(self._pages_per_chunk, rest - begin) for begin in range(0, rest, self._pages_per_chunk)]
        begins = np.cumsum([0, *counts])
        coming = np.concatenate([ahead_pages, lease.table[self._places, ops.PAGE]])
        by_page = np.argsort(coming)
        position = by_page[np.searchsorted(coming, uses.pages, sorter=by_page)]
        chunk = np.searchsorted(begins, position, side="right") - 1
        order = np.lexsort((uses.indices, uses.rows, chunk))
        self._uses = uses.some(order)
        self._slots = (position - begins[chunk])[order]
        self._bounds = np.searchsorted(chunk[order], np.arange(len(counts) + 1))

    def begin(self) -> None:
        """Begins as many as there are free chunks for."""
        while self._begun < len(self._places):
            places = self._places[self._begun : self._begun + self._pages_per_chunk]
            arrival = self._uploads.begin(self._lease, places, self._page_bytes)
            if arrival is None:
                return
            self._pending.append(arrival)
            self._begun += len(places)

    def __iter__(self) -> Iterator[tuple[Arrival, Uses, np.ndarray]]:
        """Arrivals that are there, or whose ``ready`` events the device has to wait for; uses of theirs, and slots."""
        for chunk in range(len(self._bounds) - 1):
            self.begin()
            while not self._pending:
                if not self._staging.pump(wait=True):
                    raise RuntimeError("no chunk of the staging memory is free, and nothing is under way to free one")
                self.begin()
            arrival = self._pending[0]
            self._uploads.wait(arrival)
            part = slice(int(self._bounds[chunk]), int(self._bounds[chunk + 1]))
            yield arrival, self._uses.some(part), self._slots[part]

    def finish(self, arrival: Arrival, free: Event) -> None:
        """The pages of the chunk, the first that is not finished, are not needed after the event."""
        self._pending.popleft()
        self._uploads.finish(arrival, free)

    def close(self) -> None:
        """Those that are not finished are given up."""
        while self._pending:
            self._uploads.give_up(self._pending.popleft())
        for lease in self._ahead_leases.values():
            lease.end()
        self._ahead_leases.clear()


def by_place(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places of a table in the order in which their pages lie in the file; those in memory first."""
    return places[np.argsort(table[places, ops.FILE_OFFSET], kind="stable")]


def unreadable(path: str, arrival: Arrival) -> StoreError:
    reason = os.strerror(arrival.error.errno) if arrival.error.errno else str(arrival.error)
    error = StoreError(f"{path}: reading pages for the card failed at byte {arrival.error_offset}: {reason}")
    error.__cause__ = arrival.error
    return error


def adjacent_runs(offsets: np.ndarray, page_bytes: int) -> list[tuple[int, int]]:
    """[first, last) of pages that lie side by side in the file; those that do not lie in it are left out."""
    runs = []
    first = 0
    for place in range(1, len(offsets) + 1):
        if place < len(offsets) and offsets[first] >= 0 and offsets[place] == offsets[place - 1] + page_bytes:
            continue
        if offsets[first] >= 0:
            runs.append((first, place))
        first = place
    return runs
