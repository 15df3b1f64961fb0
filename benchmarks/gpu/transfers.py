"""Pages on their way to the card, beside plain copies of the same size and beside the drive. See README.md, "GPU"."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from gpu.roofs import ReadRoof
from gpu.run import Run, beside, rates
from torch_csd import KVStore, ops
from torch_csd.catalogue import PAGE_TOKENS
from torch_csd.cuda.pages import Arrival, Lease, Uploads
from torch_csd.cuda.pinned import PinnedTransfer
from torch_csd.cuda.staging import Staging
from torch_csd.cuda.transfer import Transfer

BAR = 0.85
HEADS, HEAD_DIM = 8, 128
STAGING_BYTES = 256 << 20
PIECE_TOKENS = 16384
DRIVE_BYTES_MAX = 1 << 30  # a drive needs seconds for more


def measure(run: Run, kv_bytes: int | None = None, staging_bytes: int = STAGING_BYTES) -> None:
    kv_bytes = kv_bytes or (128 << 20 if run.quick else 2 << 30)
    run.attempt("host to card", lambda: host_row(run, kv_bytes, staging_bytes))
    if run.card_stores:
        run.attempt("KVStore.attend on the card", lambda: attend_row(run, kv_bytes))
    run.attempt("drive to card", lambda: drive_row(run, min(kv_bytes, DRIVE_BYTES_MAX), staging_bytes))


@contextmanager
def stored(run: Run, kv_bytes: int, device: torch.device, *, resident: bool, **settings: object) -> Iterator[KVStore]:
    """A store with one layer of bfloat16 pages of `kv_bytes`, all in host memory or all on the drive."""
    budget = int(1.3 * kv_bytes) + (256 << 20) if resident else 256 << 20
    tokens = max(kv_bytes // (4 * HEADS * HEAD_DIM) // PAGE_TOKENS, 1) * PAGE_TOKENS
    options = {"resident": resident, "memory_budget": budget} | run.settings | settings
    piece = torch.randn(1, HEADS, min(tokens, PIECE_TOKENS), HEAD_DIM, dtype=torch.bfloat16, device=device)
    with KVStore(run.directory, **options) as store:
        for begin in range(0, tokens, PIECE_TOKENS):
            part = piece[:, :, : min(tokens - begin, PIECE_TOKENS)]
            store.append(0, part, part)
        store.flush()
        yield store


def stream_pages(run: Run, uploads: Uploads, lease: Lease, page_bytes: int) -> None:
    """Brings all pages of a lease, as many chunks at once as there are: what Card does, without its attention."""
    places = np.arange(len(lease.table))
    count = uploads.staging.chunk_bytes // page_bytes
    stream = run.device.current_stream()
    pending: deque[Arrival] = deque()

    def finish() -> None:
        arrival = pending.popleft()
        uploads.wait(arrival)
        if arrival.error is not None:
            raise arrival.error
        for event in arrival.ready:
            stream.wait_event(event)
        uploads.finish(arrival, stream.record_event())

    for begin in range(0, len(places), count):
        while (arrival := uploads.begin(lease, places[begin : begin + count], page_bytes)) is None:
            finish()
        pending.append(arrival)
    while pending:
        finish()


@contextmanager
def opened(run: Run, store: KVStore, transfer: Transfer, staging_bytes: int) -> Iterator[tuple[Uploads, Lease, int]]:
    """Uploads through a transfer, a lease on all of the store's pages, and the bytes of one."""
    stored_layer = store.layer(0)
    staging = Staging(run.device, transfer, staging_bytes)
    lease = Lease(stored_layer.handle, row_begin=0, row_count=1, kv_begin=0, kv_end=-1)
    page_bytes = 4 * HEADS * HEAD_DIM * PAGE_TOKENS
    try:
        staging.fit(page_bytes)
        yield Uploads(run.device, staging), lease, page_bytes
    finally:
        run.synchronize()
        lease.end()
        staging.close()


def host_row(run: Run, kv_bytes: int, staging_bytes: int) -> None:
    """From host memory: the store's pages, beside plain copies of pinned memory in chunks of the same size."""
    name = "host to card: pages in host memory, streamed"
    device = run.device
    with stored(run, kv_bytes, torch.device("cpu"), resident=True) as store:
        with opened(run, store, PinnedTransfer(device, store._drive.handle), staging_bytes) as (uploads, lease, size):
            byte_count = len(lease.table) * size
            chunk = uploads.staging.chunk_bytes
            buffer_bytes = max(staging_bytes // chunk, 1) * chunk
            pinned, memory = device.new_pinned_memory(buffer_bytes), device.new_memory(buffer_bytes)
            pinned.random_(0, 256)
            host = torch.empty(buffer_bytes, dtype=torch.uint8).random_(0, 256)
            copies = device.new_stream()

            def plain() -> None:
                with device.use(copies):
                    for begin in range(0, byte_count, chunk):
                        at, part = begin % (buffer_bytes), min(chunk, byte_count - begin)
                        memory[at : at + part].copy_(pinned[at : at + part], non_blocking=True)
                copies.synchronize()

            def on_host() -> None:
                for begin in range(0, byte_count, chunk):
                    at, part = begin % (buffer_bytes), min(chunk, byte_count - begin)
                    pinned[at : at + part].copy_(host[at : at + part])

            before = uploads.host_bytes
            stream_pages(run, uploads, lease, size)
            if uploads.host_bytes - before != byte_count:
                raise RuntimeError(f"{uploads.host_bytes - before} bytes of {byte_count} came from host memory")
            works = {
                "plain": plain,
                "ours": lambda: stream_pages(run, uploads, lease, size),
                "on host": on_host,
            }
            seconds = run.interleaved(run.wall_timer, works)
    gbs = {key: rates(byte_count / 1e9, each) for key, each in seconds.items()}
    roof = f"plain pinned copies of {chunk / 2**20:g} MiB"
    run.add(beside(name, gbs["ours"], "GB/s", roof, gbs["plain"], BAR))
    row = beside("host to pinned memory, by the processor", gbs["on host"], "GB/s", roof, gbs["plain"])
    row.reason = f"torch, {torch.get_num_threads()} threads: each page takes this copy before the card's own"
    run.add(row)


def attend_row(run: Run, kv_bytes: int) -> None:
    """What a user gets of that: a layer's attention on the card, all pages in host memory."""
    device = run.device
    with stored(run, kv_bytes, device.torch_device, resident=True, executor="gpu") as store:
        q = torch.randn(1, 4 * HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device.torch_device)
        store.attend(0, q)
        before = store.stats()["gpu_host_read_bytes"]
        store.attend(0, q)
        byte_count = store.stats()["gpu_host_read_bytes"] - before
        pinned, memory = device.new_pinned_memory(64 << 20), device.new_memory(64 << 20)

        def plain() -> None:
            for _ in range(-(-byte_count // pinned.numel())):
                memory.copy_(pinned, non_blocking=True)

        if byte_count == 0:
            raise RuntimeError("an attention on the card took no page from host memory")
        seconds = run.interleaved(run.wall_timer, {"plain": plain, "ours": lambda: store.attend(0, q)})
    plain_bytes = -(-byte_count // pinned.numel()) * pinned.numel()
    gbs = rates(byte_count / 1e9, seconds["ours"])
    row = beside(
        "KVStore.attend on the card, pages in host memory", gbs, "GB/s", "plain pinned copies of 64 MiB",
        rates(plain_bytes / 1e9, seconds["plain"]),
    )  # fmt: skip
    row.reason = f"{byte_count / 2**20:.0f} MiB a call"
    run.add(row)


def drive_row(run: Run, kv_bytes: int, staging_bytes: int) -> None:
    """From the drive, by the way that this machine has, beside our own reader of a file in host memory."""
    from torch_csd.cuda.probe import choose_transfer

    name = "drive to card"
    device = run.device
    with ReadRoof(run.directory, kv_bytes) as roof:
        with stored(run, kv_bytes, torch.device("cpu"), resident=False) as store:
            if torch.cuda.is_available():
                transfer = choose_transfer(device, store._drive.handle, run.directory, "auto")
            else:
                transfer = PinnedTransfer(device, store._drive.handle)
            with opened(run, store, transfer, staging_bytes) as (uploads, lease, size):
                byte_count = int((lease.table[:, ops.FILE_OFFSET] >= 0).sum()) * size
                if byte_count == 0:
                    raise RuntimeError("no page lies on the drive")
                seconds = run.interleaved(
                    run.wall_timer,
                    {"roof": roof.read, "ours": lambda: stream_pages(run, uploads, lease, size)},
                    rounds=min(run.rounds, 5),
                )
    gbs = rates(byte_count / 1e9, seconds["ours"])
    row = beside(f"{name}, {transfer.name}", gbs, "GB/s", roof.name, rates(roof.file_bytes / 1e9, seconds["roof"]))
    row.reason = "no bar: the drive is the limit, or its host's cache"
    run.add(row)
