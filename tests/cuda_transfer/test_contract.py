"""What every `Transfer` promises: by pinned memory and both I/O engines here, by kvikio where stubs stand for a driver.

test_gds.py runs this file again in a process that has the stubs; nothing of it needs a GPU.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from transfer_support import BLOCK, STUBS_LOADED, HostDevice, ProducerEvent, StubDevice, random_bytes

from torch_csd import KVStore, StoreClosedError, StoreError, ops
from torch_csd.catalogue import DATA_OFFSET
from torch_csd.cuda import pinned
from torch_csd.cuda.transfer import Completion, Request, Slab, Transfer

MiB = 2**20
FILE_BYTES = 64 * MiB
WITH_STUBS = os.environ.get(STUBS_LOADED) == "1"


class Setting:
    """One implementation, over a scratch drive of FILE_BYTES."""

    def __init__(self, kind: str, directory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.monkeypatch = monkeypatch
        io_engine = "auto" if kind == "gds" else kind
        self.store = KVStore(directory, io_engine=io_engine, memory_budget="1MiB")
        self.drive = self.store._drive.handle
        self.path = ops.file_path(self.drive)
        os.truncate(self.path, DATA_OFFSET + FILE_BYTES)
        self.device = StubDevice() if kind == "gds" else HostDevice()
        self.transfers: list[Transfer] = []

    def make(self, depth: int = 8, task_bytes: int = 4 * MiB) -> Transfer:
        if self.kind == "gds":
            from torch_csd.cuda.gds import GdsTransfer

            transfer = GdsTransfer(self.device, self.path, depth=depth, threads=4, task_bytes=task_bytes)
        else:
            self.monkeypatch.setattr(pinned, "PIECE_BYTES", task_bytes)
            transfer = pinned.PinnedTransfer(self.device, self.drive, depth=depth)
        self.transfers.append(transfer)
        return transfer

    def fail(self, code: int) -> None:
        """What the next task asks the drive for fails with this errno; again, where it is asked for again."""
        if self.kind == "gds":
            library = ctypes.CDLL("libcufile.so.0")
            library.stub_fail(ctypes.c_long(1), ctypes.c_long(code))
            return
        reap = ops.io_reap
        failed = []

        def failing_reap(queue, *, wait=False):
            done = reap(queue, wait=wait)
            if done and not failed:
                failed.append(done[0])
                done[0] = (done[0][0], code)
            return done

        self.monkeypatch.setattr(ops, "io_reap", failing_reap)

    def write_file(self, offset: int, data: torch.Tensor) -> None:
        with open(self.path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes(data.tolist()), DATA_OFFSET + offset)

    def read_file(self, offset: int, byte_count: int) -> torch.Tensor:
        with open(self.path, "rb", buffering=0) as file:
            return torch.frombuffer(
                bytearray(os.pread(file.fileno(), byte_count, DATA_OFFSET + offset)), dtype=torch.uint8
            )

    def close(self) -> None:
        for transfer in self.transfers:
            transfer.close()
        self.store.close()


@pytest.fixture(params=["gds"] if WITH_STUBS else ["io_uring", "pread"])
def setting(request, tmp_path, monkeypatch) -> Iterator[Setting]:
    try:
        made = Setting(request.param, tmp_path, monkeypatch)
    except StoreError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def request_of(slab: Slab, *, write: bool, offset: int = 0, byte_count: int | None = None, place: int = 0, **more):
    """A request for a range of the file's pages: `offset` counts from their beginning."""
    byte_count = slab.memory.numel() if byte_count is None else byte_count
    return Request(write, DATA_OFFSET + offset, byte_count, slab, place, more.pop("tag", None), **more)


def bytes_of(slab: Slab) -> torch.Tensor:
    return slab.memory.as_subclass(torch.Tensor)


def reap_until(transfer: Transfer, count: int) -> list[Completion]:
    done = []
    while len(done) < count:
        new = transfer.reap(wait=True)
        assert new, "reap(wait=True) returned nothing with requests in flight"
        done += new
    for completion in done:
        if completion.ready is not None:
            completion.ready.synchronize()
    return done


def move(transfer: Transfer, request: Request) -> Completion:
    transfer.submit(request)
    [done] = reap_until(transfer, 1)
    assert done.request is request
    return done


def soon(act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(0.05, act)
    timer.start()
    return timer


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte_count", [BLOCK, 3 * BLOCK, MiB, 4 * MiB, 4 * MiB + BLOCK, 21 * MiB + 5 * BLOCK])
def test_bytes_arrive_both_ways(setting, byte_count):
    transfer = setting.make()
    slab, other = transfer.register(byte_count), transfer.register(byte_count)
    data = random_bytes(byte_count)
    bytes_of(slab).copy_(data)
    assert move(transfer, request_of(slab, write=True, offset=MiB)).error is None
    assert torch.equal(setting.read_file(MiB, byte_count), data)
    assert move(transfer, request_of(other, write=False, offset=MiB)).error is None
    assert torch.equal(bytes_of(other), data)
    assert (transfer.written_bytes, transfer.read_bytes) == (byte_count, byte_count)


def test_only_the_part_of_the_slab_that_was_asked_for_changes(setting):
    transfer = setting.make()
    slab = transfer.register(4 * BLOCK)
    data = random_bytes(2 * BLOCK)
    setting.write_file(7 * BLOCK, data)
    move(transfer, request_of(slab, write=False, offset=7 * BLOCK, byte_count=2 * BLOCK, place=BLOCK))
    assert torch.equal(bytes_of(slab)[BLOCK : 3 * BLOCK], data)
    assert (bytes_of(slab)[:BLOCK] == 0xEE).all() and (bytes_of(slab)[3 * BLOCK :] == 0xEE).all()
    if slab.host is not None:
        assert torch.equal(slab.host[BLOCK : 3 * BLOCK], data)


def test_many_requests_are_in_flight_at_once(setting):
    transfer = setting.make(depth=32)
    slab, other = transfer.register(8 * MiB), transfer.register(8 * MiB)
    data = random_bytes(8 * MiB, seed=3)
    bytes_of(slab).copy_(data)
    part = 256 << 10
    for _round in range(3):
        for write, target in ((True, slab), (False, other)):
            for tag in range(32):
                place = (5 * tag % 32) * part
                transfer.submit(request_of(target, write=write, offset=place, byte_count=part, place=place, tag=tag))
            assert transfer.in_flight == 32
            done = reap_until(transfer, 32)
            assert sorted(completion.request.tag for completion in done) == list(range(32))
            assert all(completion.error is None for completion in done)
        assert torch.equal(bytes_of(other), data)
        bytes_of(other).zero_()
    assert transfer.in_flight == 0 and transfer.read_bytes == transfer.written_bytes == 24 * MiB


@pytest.mark.parametrize("held", [False, True], ids=["copies at once", "copies late"])
def test_reads_and_writes_mixed_at_random_leave_what_a_model_says(setting, held):
    transfer = setting.make(depth=6, task_bytes=8 * BLOCK)
    setting.device.held = held
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: int(torch.randint(n, (1,), generator=generator))  # noqa: E731
    blocks = 64
    slabs = [transfer.register(blocks * BLOCK) for _ in range(6)]
    model = torch.zeros(6, blocks * BLOCK, dtype=torch.uint8)  # the file: a part for each slab
    transfer.drain()
    busy: dict[int, tuple[bool, int, torch.Tensor | None]] = {}
    for step in range(300):
        free = [number for number in range(6) if number not in busy]
        if free and draw(3):
            number = free[draw(len(free))]
            begin = draw(blocks)
            count = 1 + draw(blocks - begin)
            write = bool(draw(2))
            span = slice(begin * BLOCK, (begin + count) * BLOCK)
            if write:
                bytes_of(slabs[number])[span] = (step * 7 + number) % 251
                model[number, span] = (step * 7 + number) % 251
            offset = number * blocks * BLOCK + span.start
            request = request_of(
                slabs[number],
                write=write,
                offset=offset,
                byte_count=span.stop - span.start,
                place=span.start,
                tag=number,
            )
            transfer.submit(request)
            busy[number] = (write, span)
        elif busy:
            for completion in reap_until(transfer, 1):
                number = completion.request.tag
                write, span = busy.pop(number)
                assert completion.error is None
                if not write:
                    assert torch.equal(bytes_of(slabs[number])[span], model[number, span])
    for completion in transfer.drain():
        assert completion.error is None
    assert torch.equal(setting.read_file(0, model.numel()), model.flatten())


# ---- limits, waiting -------------------------------------------------------------------------------------------------


def test_the_depth_counts_what_was_not_reaped(setting):
    transfer = setting.make(depth=2)
    slab = transfer.register(3 * BLOCK)
    for place in (0, BLOCK):
        transfer.submit(request_of(slab, write=False, offset=place, byte_count=BLOCK, place=place))
    third = request_of(slab, write=False, byte_count=BLOCK, place=2 * BLOCK)
    with pytest.raises(RuntimeError, match="depth of 2"):
        transfer.submit(third)
    assert transfer.in_flight == 2
    reap_until(transfer, 2)
    assert move(transfer, third).error is None


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(offset=100), "file_offset must be a multiple of 4096"),
        (dict(byte_count=100), "byte_count must be a multiple of 4096"),
        (dict(place=-BLOCK), "slab_offset must be a multiple of 4096, got -4096"),
        (dict(byte_count=0), "lie in its slab"),
        (dict(byte_count=3 * BLOCK), "lie in its slab of 8192 bytes, got 12288 bytes from 0 on"),
        (dict(place=BLOCK), "lie in its slab of 8192 bytes, got 8192 bytes from 4096 on"),
        (dict(offset=-BLOCK), "lie in bytes 1048576 to 68157440 of the file"),
        (dict(offset=FILE_BYTES - BLOCK), "lie in bytes 1048576 to 68157440 of the file"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_impossible_requests_are_refused_and_not_in_flight(setting, write, numbers, message):
    transfer = setting.make()
    slab = transfer.register(2 * BLOCK)
    with pytest.raises(ValueError, match=message):
        transfer.submit(request_of(slab, write=write, **numbers))
    assert transfer.in_flight == 0 and transfer.reap(wait=True) == []


def test_a_file_that_has_grown_can_be_read_to_its_new_end(setting):
    transfer = setting.make()
    slab = transfer.register(BLOCK)
    assert move(transfer, request_of(slab, write=False, offset=FILE_BYTES - BLOCK)).error is None
    os.truncate(setting.path, DATA_OFFSET + FILE_BYTES + BLOCK)
    data = random_bytes(BLOCK)
    setting.write_file(FILE_BYTES, data)
    assert move(transfer, request_of(slab, write=False, offset=FILE_BYTES)).error is None
    assert torch.equal(bytes_of(slab), data)


def test_a_write_takes_the_bytes_only_after_its_event(setting):
    transfer = setting.make()
    slab = transfer.register(5 * MiB)
    bytes_of(slab).fill_(1)
    event = ProducerEvent()
    transfer.submit(request_of(slab, write=True, after=event))
    begin_s = time.monotonic()
    assert transfer.reap() == [], "it cannot be done before its bytes are there"
    assert time.monotonic() - begin_s < 0.04, "reap() does not wait"

    def produce():
        bytes_of(slab).fill_(2)
        event.finish()

    timer = soon(produce)
    [done] = reap_until(transfer, 1)
    timer.join()
    assert done.error is None
    assert (setting.read_file(0, 5 * MiB) == 2).all()


def test_a_read_overwrites_the_slab_only_after_its_event(setting):
    transfer = setting.make()
    slab = transfer.register(MiB)
    data = random_bytes(MiB)
    setting.write_file(0, data)
    event = ProducerEvent()
    seen = []

    def use():
        seen.append(bytes_of(slab).clone())
        event.finish()

    transfer.submit(request_of(slab, write=False, after=event))
    timer = soon(use)
    reap_until(transfer, 1)
    timer.join()
    assert (seen[0] == 0xEE).all()
    assert torch.equal(bytes_of(slab), data)


def test_waiting_with_nothing_in_flight_returns(setting):
    transfer = setting.make()
    assert transfer.reap(wait=True) == [] and transfer.reap() == [] and transfer.drain() == []


def test_draining_returns_what_was_in_flight(setting):
    transfer = setting.make()
    slab = transfer.register(8 * MiB)
    data = random_bytes(8 * MiB)
    setting.write_file(0, data)
    for tag in range(8):
        transfer.submit(request_of(slab, write=False, offset=tag * MiB, byte_count=MiB, place=tag * MiB, tag=tag))
    done = transfer.drain()
    assert sorted(completion.request.tag for completion in done) == list(range(8))
    assert all(completion.ready is None or completion.ready.query() for completion in done)
    assert torch.equal(bytes_of(slab), data) and transfer.in_flight == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_of_a_write_has_its_errno_and_others_go_on(setting):
    transfer = setting.make()
    slab = transfer.register(2 * MiB)
    bytes_of(slab).fill_(9)
    setting.fail(errno.ENOSPC)
    done = move(transfer, request_of(slab, write=True, byte_count=MiB, offset=5 * BLOCK))
    assert isinstance(done.error, OSError) and done.error.errno == errno.ENOSPC and done.ready is None
    assert "No space left on device: writing 1048576 bytes at byte 1069056 of the KV file failed" in str(done.error)
    assert transfer.written_bytes == 0
    assert move(transfer, request_of(slab, write=True, byte_count=MiB)).error is None
    assert transfer.written_bytes == MiB


def test_a_read_past_the_end_is_an_input_output_error(setting):
    transfer = setting.make()
    slab = transfer.register(2 * BLOCK)
    move(transfer, request_of(slab, write=False, offset=MiB))
    os.truncate(setting.path, DATA_OFFSET + MiB + BLOCK)  # it was longer when the transfer looked
    for offset in (MiB, MiB + BLOCK):
        done = move(transfer, request_of(slab, write=False, offset=offset))
        assert isinstance(done.error, OSError) and done.error.errno == errno.EIO and done.ready is None
        assert f"reading 8192 bytes at byte {DATA_OFFSET + offset}" in str(done.error)
    assert transfer.read_bytes == 2 * BLOCK
    assert move(transfer, request_of(slab, write=False)).error is None


def test_an_error_of_one_piece_is_the_whole_requests_and_said_once(setting):
    transfer = setting.make()
    slab = transfer.register(20 * MiB)
    setting.fail(errno.ENOSPC)
    done = move(transfer, request_of(slab, write=True))
    assert done.error.errno == errno.ENOSPC
    assert transfer.in_flight == 0 and transfer.reap(wait=True) == []
    assert transfer.written_bytes == 0


# ---- lifetimes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
def test_a_request_keeps_its_slab_and_event_until_it_is_reaped(setting, write):
    transfer = setting.make()
    slab = transfer.register(MiB)
    event = ProducerEvent()
    request = request_of(slab, write=write, after=event)
    alive = [weakref.ref(request), weakref.ref(event)]
    transfer.submit(request)
    del request, event
    gc.collect()
    assert all(reference() is not None for reference in alive)
    soon(alive[1]().finish).join()
    [done] = reap_until(transfer, 1)
    assert done.request is alive[0]()
    del done
    transfer.drain()
    transfer.close()
    setting.device.streams.clear()
    # A thread of the pool lets go of its last task a moment after it has told of it.
    for _ in range(200):
        gc.collect()
        if all(reference() is None for reference in alive):
            break
        time.sleep(0.01)
    assert all(reference() is None for reference in alive)
    slab_alive = weakref.ref(slab)
    del slab
    gc.collect()
    assert slab_alive() is None, "closed transfers have no slabs"


def test_closing_drains_and_further_use_says_so(setting):
    transfer = setting.make()
    slab = transfer.register(8 * MiB)
    bytes_of(slab).fill_(3)
    for tag in range(8):
        transfer.submit(request_of(slab, write=True, offset=tag * MiB, byte_count=MiB, place=tag * MiB))
    transfer.close()
    transfer.close()
    assert (setting.read_file(0, 8 * MiB) == 3).all()
    for call in (
        lambda: transfer.submit(request_of(slab, write=False)),
        transfer.reap,
        lambda: transfer.register(BLOCK),
    ):
        with pytest.raises(StoreClosedError, match="closed; open a new one"):
            call()


def test_a_forked_child_is_refused(setting):
    transfer = setting.make()
    slab = transfer.register(BLOCK)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            transfer.submit(request_of(slab, write=False))
        except StoreClosedError:
            code = 0
        finally:
            transfer.close()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert move(transfer, request_of(slab, write=False)).error is None
