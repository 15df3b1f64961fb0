"""The drive's own I/O engine, lent to whoever moves bytes between its file and other memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from support import random_kv
from transfer_support import BLOCK, aligned_memory, random_bytes

from torch_csd import KVStore, StoreClosedError, StoreError, ops
from torch_csd.catalogue import DATA_OFFSET

MiB = 2**20


@pytest.fixture
def drive(make_store, io_engine):
    """A drive's handle, with 8 MiB of file behind its data offset."""
    handle = make_store(io_engine=io_engine)._drive.handle
    os.truncate(ops.file_path(handle), DATA_OFFSET + 8 * MiB)
    return handle


def reap_all(queue, count):
    done = []
    while len(done) < count:
        done += ops.io_reap(queue, wait=True)
    return done


def test_bytes_written_by_a_queue_are_read_by_another(drive):
    written, read = random_bytes(8 * MiB), aligned_memory(8 * MiB)
    out, back = ops.io_open(drive, depth=8), ops.io_open(drive, depth=8)
    for tag in range(8):
        ops.io_submit(
            out,
            write=True,
            file_offset=DATA_OFFSET + tag * MiB,
            memory=written,
            offset=tag * MiB,
            byte_count=MiB,
            tag=tag,
        )
    assert sorted(reap_all(out, 8)) == [(tag, 0) for tag in range(8)]
    for tag in range(8):  # from the last to the first, by other pieces
        place = (7 - tag) * MiB
        ops.io_submit(
            back, write=False, file_offset=DATA_OFFSET + place, memory=read, offset=place, byte_count=MiB, tag=-tag
        )
    assert sorted(reap_all(back, 8)) == sorted((-tag, 0) for tag in range(8))
    assert torch.equal(read, written)
    with open(ops.file_path(drive), "rb") as file:
        file.seek(DATA_OFFSET + 3 * MiB)
        assert file.read(BLOCK) == bytes(written[3 * MiB : 3 * MiB + BLOCK].tolist())


@pytest.mark.parametrize(
    ("file_offset", "offset", "byte_count", "message"),
    [
        (DATA_OFFSET + 512, 0, BLOCK, "file_offset must be a multiple of 4096, got 1049088"),
        (DATA_OFFSET, 0, 100, "byte_count must be a multiple of 4096, got 100"),
        (DATA_OFFSET, 64, BLOCK, "the memory's address must be a multiple of 4096"),
        (DATA_OFFSET, 0, 2 * MiB, "lie in memory's 1048576 bytes, got 2097152 bytes from 0 on"),
        (DATA_OFFSET, -BLOCK, BLOCK, "lie in memory's"),
        (0, 0, BLOCK, r"pages lie in bytes 1048576 to 9437184, got 4096 bytes from 0 on"),
        (DATA_OFFSET + 8 * MiB, 0, BLOCK, "pages lie in bytes"),
        (DATA_OFFSET + 8 * MiB - BLOCK, 0, 2 * BLOCK, "pages lie in bytes"),
        (DATA_OFFSET, 0, 0, "pages lie in bytes"),
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_what_is_not_aligned_or_lies_outside_is_refused(drive, write, file_offset, offset, byte_count, message):
    queue = ops.io_open(drive, depth=2)
    with pytest.raises(ValueError, match=message):
        ops.io_submit(
            queue, write=write, file_offset=file_offset, memory=aligned_memory(MiB), offset=offset,
            byte_count=byte_count, tag=1,
        )  # fmt: skip
    assert ops.io_reap(queue, wait=True) == [], "it is not in flight"


def test_memory_must_be_bytes_on_the_host(drive):
    queue = ops.io_open(drive, depth=2)
    for memory in (torch.zeros(BLOCK), aligned_memory(2 * BLOCK)[::2]):
        with pytest.raises(ValueError, match="contiguous uint8 CPU tensor"):
            ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=BLOCK, tag=1)
    with pytest.raises(ValueError, match="host memory, got a tensor on meta"):
        memory = torch.empty(BLOCK, dtype=torch.uint8, device="meta")
        ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=BLOCK, tag=1)


def test_no_more_requests_than_the_depth_are_in_flight(drive):
    memory = aligned_memory(3 * BLOCK)
    queue = ops.io_open(drive, depth=2)
    submit = lambda tag: ops.io_submit(  # noqa: E731
        queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=tag * BLOCK, byte_count=BLOCK, tag=tag
    )
    submit(0), submit(1)
    with pytest.raises(RuntimeError, match="depth of 2"):
        submit(2)
    assert sorted(reap_all(queue, 2)) == [(0, 0), (1, 0)]
    submit(2)
    assert reap_all(queue, 1) == [(2, 0)]
    with pytest.raises(ValueError, match="depth must be from 1 to 4096, got 0"):
        ops.io_open(drive, depth=0)


def test_memory_lives_until_its_request_is_reaped(drive):
    array = np.empty(64 * MiB // 16, np.uint8)
    alive = weakref.ref(array)
    memory = torch.from_numpy(array)
    place = -memory.data_ptr() % BLOCK
    queue = ops.io_open(drive, depth=1)
    ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=place, byte_count=2 * MiB, tag=0)
    del array, memory
    gc.collect()
    assert alive() is not None
    assert reap_all(queue, 1) == [(0, 0)]
    gc.collect()
    assert alive() is None


def test_closing_the_queue_waits_and_further_use_says_so(drive):
    memory = random_bytes(MiB)
    queue = ops.io_open(drive, depth=4)
    for tag in range(4):
        ops.io_submit(
            queue, write=True, file_offset=DATA_OFFSET + tag * MiB, memory=memory, offset=0, byte_count=MiB, tag=tag
        )
    ops.io_close(queue)
    ops.io_close(queue)
    for call in (lambda: ops.io_reap(queue), lambda: ops.io_reap(queue, wait=True)):
        with pytest.raises(StoreClosedError, match="closed; open a new one"):
            call()
    read = aligned_memory(MiB)
    other = ops.io_open(drive, depth=1)
    ops.io_submit(other, write=False, file_offset=DATA_OFFSET + 3 * MiB, memory=read, offset=0, byte_count=MiB, tag=0)
    reap_all(other, 1)
    assert torch.equal(read, memory)


def test_closing_the_drive_closes_its_queues_first(tmp_path, io_engine):
    store = KVStore(tmp_path, io_engine=io_engine, memory_budget="1MiB")
    drive = store._drive.handle
    os.truncate(ops.file_path(drive), DATA_OFFSET + 4 * MiB)
    memory = aligned_memory(4 * MiB)
    queue = ops.io_open(drive, depth=4)
    for tag in range(4):
        ops.io_submit(
            queue, write=False, file_offset=DATA_OFFSET + tag * MiB, memory=memory, offset=tag * MiB, byte_count=MiB,
            tag=tag,
        )  # fmt: skip
    store.close()
    with pytest.raises(StoreClosedError):
        ops.io_reap(queue, wait=True)
    with pytest.raises(StoreClosedError):
        ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=BLOCK, tag=0)
    with pytest.raises(StoreClosedError):
        ops.io_open(drive, depth=1)
    with pytest.raises(StoreClosedError):
        ops.file_path(drive)
    ops.io_close(queue)


def test_a_drive_may_be_closed_while_a_thread_waits_for_its_queue(tmp_path, io_engine):
    for _ in range(5):
        store = KVStore(tmp_path, io_engine=io_engine, memory_budget="1MiB")
        drive = store._drive.handle
        os.truncate(ops.file_path(drive), DATA_OFFSET + 4 * MiB)
        queue = ops.io_open(drive, depth=2)
        memory = aligned_memory(4 * MiB)
        ends, begun = [], threading.Event()

        def read_for_ever(queue=queue, memory=memory, ends=ends, begun=begun):
            try:
                while True:
                    ops.io_submit(
                        queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=4 * MiB, tag=0
                    )
                    ops.io_reap(queue, wait=True)
                    begun.set()
            except BaseException as error:
                ends.append(type(error))

        thread = threading.Thread(target=read_for_ever)
        thread.start()
        assert begun.wait(30)
        store.close()
        thread.join(30)
        assert ends == [StoreClosedError]


def test_a_drive_that_only_reads_does_not_write(tmp_path):
    k, v = random_kv(1, 1, 200, 64)
    with KVStore(tmp_path, durable=True, name="a") as store:
        store.append(0, k, v)
        store.commit()
    with KVStore.open(tmp_path, "a", read_only=True) as store:
        queue = ops.io_open(store._drive.handle, depth=1)
        memory = aligned_memory(BLOCK)
        with pytest.raises(StoreError, match="opened to be read only"):
            ops.io_submit(queue, write=True, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=BLOCK, tag=0)
        ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=BLOCK, tag=0)
        assert reap_all(queue, 1) == [(0, 0)]


def test_other_threads_run_while_one_waits(make_store, io_engine):
    """Attention on the same drive, and Python: waiting holds neither the drive's lock nor the interpreter's."""
    store = make_store(io_engine=io_engine, resident=False)
    k, v = random_kv(1, 2, 4000, 64)
    store.append(0, k, v)
    store.flush()
    drive = store._drive.handle
    size = (os.stat(ops.file_path(drive)).st_size - DATA_OFFSET) // MiB * MiB
    expected = store.attend(0, torch.ones(1, 2, 1, 64))[0]
    memory = aligned_memory(size)
    queue = ops.io_open(drive, depth=4)
    failures = []

    def read_over_and_over():
        try:
            for step in range(200):
                ops.io_submit(
                    queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0, byte_count=MiB, tag=step
                )
                assert reap_all(queue, 1) == [(step, 0)]
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read_over_and_over)
    thread.start()
    for _ in range(20):
        torch.testing.assert_close(store.attend(0, torch.ones(1, 2, 1, 64))[0], expected)
    thread.join()
    assert not failures, failures


FORKED = """
import os, sys
import torch
from torch_csd import KVStore, StoreClosedError, ops
from torch_csd.catalogue import DATA_OFFSET

store = KVStore(sys.argv[1], io_engine=sys.argv[2], memory_budget="1MiB")
drive = store._drive.handle
os.truncate(ops.file_path(drive), DATA_OFFSET + 2**20)
queue = ops.io_open(drive, depth=1)
memory = torch.zeros(2**20 + 4096, dtype=torch.uint8)
memory = memory[-memory.data_ptr() % 4096:][:2**20]
submit = lambda: ops.io_submit(queue, write=False, file_offset=DATA_OFFSET, memory=memory, offset=0,
                               byte_count=2**20, tag=3)
submit()
child = os.fork()
if child == 0:
    refused = 0
    for call in (submit, lambda: ops.io_reap(queue), lambda: ops.io_open(drive, depth=1), lambda: ops.file_path(drive)):
        try:
            call()
        except StoreClosedError as error:
            refused += "child" in str(error)
    ops.io_close(queue)
    os._exit(refused)
assert os.waitpid(child, 0)[1] >> 8 == 4
assert ops.io_reap(queue, wait=True) == [(3, 0)]
store.close()
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path, io_engine):
    run = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path), io_engine], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr
