"""By way of pinned memory: what overlaps, what waits for what, and what happens to the mirror."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from support import random_kv
from transfer_support import BLOCK, HostDevice, ProducerEvent, random_bytes

from torch_csd import KVStore, StoreClosedError, ops
from torch_csd.catalogue import DATA_OFFSET
from torch_csd.cuda.pinned import PIECE_BYTES, PinnedTransfer
from torch_csd.cuda.transfer import Request

MiB = 2**20


@pytest.fixture
def drive(make_store, io_engine):
    handle = make_store(io_engine=io_engine)._drive.handle
    os.truncate(ops.file_path(handle), DATA_OFFSET + 32 * MiB)
    return handle


@pytest.fixture
def device():
    return HostDevice()


@pytest.fixture
def transfer(device, drive):
    made = PinnedTransfer(device, drive, depth=8)
    yield made
    made.close()


def fill_file(drive, *values: int) -> None:
    """A MiB of each."""
    with open(ops.file_path(drive), "r+b", buffering=0) as file:
        for number, value in enumerate(values):
            os.pwrite(file.fileno(), bytes([value]) * MiB, DATA_OFFSET + number * MiB)


def read(slab, offset=0, place=0, byte_count=MiB, **more):
    return Request(False, DATA_OFFSET + offset, byte_count, slab, place, None, **more)


def write(slab, offset=0, place=0, byte_count=MiB, **more):
    return Request(True, DATA_OFFSET + offset, byte_count, slab, place, None, **more)


def pump(transfer, seconds=0.05):
    """What comes of reaping without waiting, for a while."""
    done = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        done += transfer.reap()
        time.sleep(0.002)
    return done


def test_a_mirror_is_not_read_into_while_the_device_copies_from_it(device, drive, transfer):
    fill_file(drive, 1, 2)
    slab = transfer.register(MiB)
    device.held = True
    transfer.submit(read(slab))
    [first] = transfer.reap(wait=True)
    assert not first.ready.query() and (slab.host == 1).all(), "the device has not copied yet"
    transfer.submit(read(slab, offset=MiB))
    assert pump(transfer) == [] and (slab.host == 1).all()
    first.ready.synchronize()
    assert (slab.memory == 1).all()
    [second] = transfer.reap(wait=True)
    second.ready.synchronize()
    assert (slab.memory == 2).all() and (slab.host == 2).all()


def test_waiting_for_a_mirror_that_is_copied_from_ends_without_the_drive(device, drive, transfer):
    fill_file(drive, 1, 2)
    slab = transfer.register(MiB)
    device.held = True
    transfer.submit(read(slab))
    transfer.reap(wait=True)
    transfer.submit(read(slab, offset=MiB))
    [done] = transfer.reap(wait=True)  # only the device's copy of the first is under way
    done.ready.synchronize()
    assert done.error is None and (slab.memory == 2).all()


def test_the_drive_is_read_while_the_slab_is_still_in_use(drive, transfer):
    fill_file(drive, 7)
    slab = transfer.register(MiB)
    after = ProducerEvent()
    transfer.submit(read(slab, after=after))
    [done] = transfer.reap(wait=True)  # though nothing of the slab may be touched yet
    assert (slab.host == 7).all() and (slab.memory == 0xEE).all() and not done.ready.query()
    after.finish()
    done.ready.synchronize()
    assert (slab.memory == 7).all()


def test_what_a_read_waits_for_holds_no_write_back(drive, transfer):
    read_slab, write_slab = transfer.register(MiB), transfer.register(MiB)
    after = ProducerEvent()
    write_slab.memory.fill_(5)
    transfer.submit(read(read_slab, after=after))
    transfer.reap(wait=True)
    transfer.submit(write(write_slab, offset=MiB))
    [done] = transfer.reap(wait=True)
    assert done.request.write and not after.query()
    after.finish()


def test_writes_of_one_part_of_a_slab_do_not_share_its_mirror(device, drive, transfer):
    slab = transfer.register(MiB)
    slab.memory.fill_(1)
    transfer.submit(write(slab))
    slab.memory.fill_(2)  # its copy has been taken: this device does at once what it is given
    transfer.submit(write(slab, offset=MiB))
    assert [done.error for done in transfer.drain()] == [None, None]
    with open(ops.file_path(drive), "rb") as file:
        file.seek(DATA_OFFSET)
        assert file.read(2 * MiB) == b"\1" * MiB + b"\2" * MiB


def test_a_write_is_given_to_the_drive_when_its_copy_is_done(device, transfer):
    slab = transfer.register(MiB)
    device.held = True
    transfer.submit(write(slab))
    assert pump(transfer, 0.02) == [] and transfer.in_flight == 1
    device.run()
    [done] = pump(transfer)
    assert done.error is None


def test_waiting_asks_the_drive_no_more_often_than_it_answers(transfer, monkeypatch):
    slab = transfer.register(MiB)
    calls = []
    io_reap = ops.io_reap
    monkeypatch.setattr(ops, "io_reap", lambda *args, **more: calls.append(1) or io_reap(*args, **more))
    after = ProducerEvent()
    transfer.submit(write(slab, after=after))
    timer = threading.Timer(0.1, after.finish)
    timer.start()
    transfer.reap(wait=True)
    timer.join()
    assert len(calls) < 10


@pytest.mark.parametrize("depth", [1, 3])
def test_large_requests_pass_through_a_queue_of_any_depth(device, drive, depth):
    transfer = PinnedTransfer(device, drive, depth=depth)
    byte_count = 5 * PIECE_BYTES + 3 * BLOCK
    slab, other = transfer.register(byte_count), transfer.register(byte_count)
    data = random_bytes(byte_count)
    slab.memory.copy_(data)
    transfer.submit(write(slab, byte_count=byte_count))
    assert [done.error for done in transfer.drain()] == [None]
    transfer.submit(read(other, byte_count=byte_count))
    assert [done.error for done in transfer.drain()] == [None]
    assert torch.equal(other.memory, data)
    transfer.close()


def test_a_copy_that_is_under_way_keeps_its_slab(device, drive, transfer):
    fill_file(drive, 4)
    slab = transfer.register(MiB)
    device.held = True
    transfer.submit(read(slab))
    [done] = transfer.reap(wait=True)
    transfer.close()  # waits for the device
    assert done.ready.query() and (slab.memory == 4).all()


def test_the_drive_may_go_first(tmp_path, device, io_engine):
    store = KVStore(tmp_path, io_engine=io_engine, memory_budget="1MiB")
    os.truncate(ops.file_path(store._drive.handle), DATA_OFFSET + 2 * MiB)
    transfer = PinnedTransfer(device, store._drive.handle, depth=4)
    slab = transfer.register(MiB)
    transfer.submit(read(slab))
    transfer.reap(wait=True)
    transfer.submit(read(slab))
    store.close()
    with pytest.raises(StoreClosedError, match="closed"):
        transfer.reap(wait=True)
    in_flight = transfer.in_flight
    for offset in (0, MiB):  # where it knows the file to be, and behind
        with pytest.raises(StoreClosedError, match="closed"):
            transfer.submit(read(slab, offset=offset))
    assert transfer.in_flight == in_flight
    transfer.close()
    assert transfer.in_flight == 0


def test_a_drive_that_only_reads_is_not_written_to(tmp_path, device):
    with KVStore(tmp_path, durable=True, name="a") as store:
        store.append(0, *random_kv(1, 1, 200, 64))
        store.commit()
    with KVStore.open(tmp_path, "a", read_only=True) as store:
        transfer = PinnedTransfer(device, store._drive.handle)
        slab = transfer.register(BLOCK)
        transfer.submit(write(slab, byte_count=BLOCK))
        [done] = transfer.reap(wait=True)
        assert "opened to be read only" in str(done.error)
        transfer.submit(read(slab, byte_count=BLOCK))
        [done] = transfer.reap(wait=True)
        assert done.error is None
        transfer.close()
