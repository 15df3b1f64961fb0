"""GdsTransfer on the real kvikio, whose driver is tests/native/stub_*.c. Run by test_gds.py in a process of its own."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
import warnings

import kvikio
import kvikio.defaults
import pytest
import torch
from transfer_support import BLOCK, StubDevice, random_bytes, stub_memory

from torch_csd import KVStore, StoreError, ops
from torch_csd.catalogue import DATA_OFFSET
from torch_csd.cuda.gds import GdsTransfer, errno_of
from torch_csd.cuda.transfer import Request

MiB = 2**20
cufile = ctypes.CDLL("libcufile.so.0")
cuda = ctypes.CDLL("libcuda.so.1")
for name in ("stub_running_max", "stub_registered_count", "stub_registered_bytes", "stub_files_open"):
    getattr(cufile, name).restype = ctypes.c_long


@pytest.fixture
def path(tmp_path):
    with KVStore(tmp_path, memory_budget="1MiB") as store:
        path = ops.file_path(store._drive.handle)
        os.truncate(path, DATA_OFFSET + 32 * MiB)
        yield path


@pytest.fixture
def transfer(path):
    made = GdsTransfer(StubDevice(), path, depth=16, threads=4, task_bytes=MiB)
    yield made
    made.close()
    cufile.stub_limit_bytes(ctypes.c_long(0))
    cufile.stub_fail(ctypes.c_long(0), ctypes.c_long(0))
    cufile.stub_pause_us(ctypes.c_long(0))


def request(slab, write, offset=0, byte_count=MiB, place=0, after=None):
    return Request(write, DATA_OFFSET + offset, byte_count, slab, place, None, after)


def move(transfer, wanted):
    transfer.submit(wanted)
    [done] = transfer.drain()
    return done


@pytest.fixture
def backends():
    """Operations since the test began, by kvikio's backend: those that carried any."""
    if not hasattr(kvikio, "SummaryMonitor"):
        pytest.skip(f"kvikio {kvikio.__version__} has no SummaryMonitor to say which backend ran")
    with kvikio.SummaryMonitor() as monitor:
        yield lambda: {name: total["num_ops"] for name, total in monitor.get().by_backend.items() if total["num_ops"]}


def test_every_operation_went_through_cufile(transfer, backends):
    slab = transfer.register(6 * MiB)
    assert move(transfer, request(slab, True, byte_count=6 * MiB)).error is None
    assert move(transfer, request(slab, False, byte_count=2 * MiB)).error is None
    assert backends() == {"GDS": 8}


def test_the_compat_mode_of_others_is_left_as_it_was(path, backends):
    with kvikio.defaults.set("compat_mode", kvikio.CompatMode.ON):
        transfer = GdsTransfer(StubDevice(), path, depth=1)
        slab = transfer.register(MiB)
        assert kvikio.defaults.get("compat_mode") == kvikio.CompatMode.ON
        assert move(transfer, request(slab, False)).error is None
        assert backends() == {"GDS": 1}
        transfer.close()
        assert kvikio.defaults.get("compat_mode") == kvikio.CompatMode.ON


def test_slabs_are_registered_until_the_transfer_closes(path):
    transfer = GdsTransfer(StubDevice(), path)
    before = cufile.stub_registered_bytes()
    for _ in range(3):
        transfer.register(2 * MiB)
    assert cufile.stub_registered_count() == 3
    assert cufile.stub_registered_bytes() - before == 6 * MiB
    assert cufile.stub_files_open() == 1
    transfer.close()
    assert cufile.stub_registered_count() == 0 and cufile.stub_files_open() == 0


def test_a_slab_that_cannot_be_registered_is_used_all_the_same(path):
    class OddDevice(StubDevice):
        def new_memory(self, byte_count):
            memory = stub_memory(byte_count)
            cuda.stub_forget(ctypes.c_void_p(memory.data_ptr()))  # no allocation that the driver knows
            return memory

    transfer = GdsTransfer(OddDevice(), path)
    with pytest.warns(UserWarning, match="cuFile cannot register 1048576 bytes of the GPU"):
        slab = transfer.register(MiB)
    assert move(transfer, request(slab, False)).error is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer.close()


@pytest.mark.parametrize("limit_bytes", [BLOCK, 5 * BLOCK, 5 * BLOCK + 100, MiB - 1])
def test_short_counts_are_resumed_on_a_block(transfer, limit_bytes):
    byte_count = 3 * MiB + BLOCK if limit_bytes > BLOCK else 64 * BLOCK
    slab, other = transfer.register(byte_count), transfer.register(byte_count)
    data = random_bytes(byte_count)
    slab.memory.as_subclass(torch.Tensor).copy_(data)
    cufile.stub_limit_bytes(ctypes.c_long(limit_bytes))
    assert move(transfer, request(slab, True, byte_count=byte_count)).error is None
    assert move(transfer, request(other, False, byte_count=byte_count)).error is None
    assert torch.equal(other.memory.as_subclass(torch.Tensor), data)


def test_counts_that_reach_no_further_block_are_an_error(transfer):
    slab = transfer.register(MiB)
    cufile.stub_limit_bytes(ctypes.c_long(100))
    for write in (False, True):
        error = move(transfer, request(slab, write)).error
        assert error.errno == errno.EIO and "end of file" in str(error)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EFBIG])
def test_an_errno_of_a_write_is_found_in_kvikios_text(transfer, code):
    slab = transfer.register(MiB)
    cufile.stub_fail(ctypes.c_long(1), ctypes.c_long(code))
    error = move(transfer, request(slab, True)).error
    assert isinstance(error, OSError) and error.errno == code
    assert "Unable to write file" in str(error), "kvikio's own text is there too"


def test_an_errno_of_a_read_is_lost_in_kvikio_and_told_as_an_input_output_error(transfer):
    slab = transfer.register(MiB)
    cufile.stub_pause_us(ctypes.c_long(0))
    for code in (errno.EINVAL, errno.ENOSPC):
        fail_twice(code)
        error = move(transfer, request(slab, False)).error
        assert error.errno == errno.EIO and "Operation not permitted" in str(error)


def fail_twice(code):
    """The first call, and the one that tries again."""
    cufile.stub_fail(ctypes.c_long(-2), ctypes.c_long(code))


def test_an_input_output_error_is_tried_twice(transfer):
    slab = transfer.register(MiB)
    for write in (False, True):
        cufile.stub_fail(ctypes.c_long(1), ctypes.c_long(errno.EIO))
        assert move(transfer, request(slab, write)).error is None
        fail_twice(errno.EIO)
        assert move(transfer, request(slab, write)).error.errno == errno.EIO


def test_errors_of_cufile_itself_are_input_output_errors_with_its_text(transfer):
    slab = transfer.register(MiB)
    fail_twice(-5001)
    error = move(transfer, request(slab, True)).error
    assert error.errno == errno.EIO and "nvidia-fs driver is not loaded" in str(error)


def test_tasks_of_one_request_run_side_by_side(transfer):
    slab = transfer.register(8 * MiB)
    cufile.stub_pause_us(ctypes.c_long(50_000))
    begin_s = time.monotonic()
    assert move(transfer, request(slab, False, byte_count=8 * MiB)).error is None
    assert time.monotonic() - begin_s < 0.35, "eight pauses of 50 ms by four threads"
    assert cufile.stub_running_max() == 4


def test_reaping_without_waiting_returns_at_once(transfer):
    slab = transfer.register(MiB)
    cufile.stub_pause_us(ctypes.c_long(100_000))
    transfer.submit(request(slab, False))
    begin_s = time.monotonic()
    assert transfer.reap() == [] and time.monotonic() - begin_s < 0.05
    assert len(transfer.reap(wait=True)) == 1


def test_an_event_that_fails_is_the_requests_error(transfer):
    class Broken:
        def query(self):
            return False

        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    slab = transfer.register(MiB)
    error = move(transfer, request(slab, True, after=Broken())).error
    assert error.errno == errno.EIO and "RuntimeError: CUDA error: an illegal" in str(error)


def test_a_file_that_cannot_be_opened_is_a_store_error(tmp_path):
    for target, writable in ((tmp_path / "none", True), (tmp_path / "none", False)):
        with pytest.raises(StoreError, match="No such file or directory"):
            GdsTransfer(StubDevice(), str(target), writable=writable)
    with pytest.raises(ValueError, match="task_bytes must be a multiple of 4096, got 100"):
        GdsTransfer(StubDevice(), str(tmp_path), task_bytes=100)


def test_a_file_opened_to_be_read_only_is_not_written_to(path):
    transfer = GdsTransfer(StubDevice(), path, writable=False)
    slab = transfer.register(MiB)
    assert move(transfer, request(slab, False)).error is None
    assert move(transfer, request(slab, True)).error.errno == errno.EBADF
    transfer.close()


# ---- files that others wrote -----------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path):
    """No whole number of blocks, and from the first byte on."""
    data = random_bytes(3 * MiB + 1234, seed=3)
    (tmp_path / "foreign").write_bytes(data.numpy().tobytes())
    return tmp_path / "foreign", data


@pytest.mark.parametrize("limit_bytes", [0, 5 * BLOCK + 100])
def test_a_file_that_others_wrote_is_read_to_its_last_byte(foreign, limit_bytes, backends):
    target, data = foreign
    transfer = GdsTransfer(StubDevice(), None, depth=4, threads=2, task_bytes=MiB)
    file = transfer.open(str(target))
    slab = transfer.register(4 * MiB)
    cufile.stub_limit_bytes(ctypes.c_long(limit_bytes))
    for offset in (0, 2 * MiB, 3 * MiB):
        byte_count = -(-(len(data) - offset) // BLOCK) * BLOCK
        assert move(transfer, Request(False, offset, byte_count, slab, 0, None, None, file)).error is None
        memory = slab.memory.as_subclass(torch.Tensor)
        assert torch.equal(memory[: len(data) - offset], data[offset:])
    cufile.stub_limit_bytes(ctypes.c_long(0))
    assert set(backends()) == {"GDS"}
    for write, offset in ((True, 0), (False, 4 * MiB)):
        with pytest.raises(ValueError, match="only read" if write else "must lie in bytes 0 to 3149824"):
            transfer.submit(Request(write, offset, BLOCK, slab, 0, None, None, file))
    with pytest.raises(ValueError, match="name a file"):
        transfer.submit(request(slab, False))
    os.truncate(target, 2 * MiB)
    assert not file.is_as_it_was()
    error = move(transfer, Request(False, 0, 3 * MiB, slab, 0, None, None, file)).error
    assert error.errno == errno.EIO and f"of {target} failed (end of file)" in str(error)
    transfer.close()
    assert cufile.stub_files_open() == 0


def test_a_file_stays_the_same_when_another_takes_its_name(foreign, tmp_path):
    target, data = foreign
    transfer = GdsTransfer(StubDevice(), None, depth=4)
    file = transfer.open(str(target))
    (tmp_path / "other").write_bytes(bytes(BLOCK))
    os.replace(tmp_path / "other", target)
    slab = transfer.register(MiB)
    assert move(transfer, Request(False, 0, MiB, slab, 0, None, None, file)).error is None
    assert torch.equal(slab.memory.as_subclass(torch.Tensor), data[:MiB])
    transfer.close()
    with pytest.raises(StoreError, match="none: opening it failed: No such file"):
        GdsTransfer(StubDevice(), None).open(str(tmp_path / "none"))


def test_weights_come_straight_to_the_card(foreign, monkeypatch):
    import torch_csd.cuda
    from torch_csd.weights.layout import Region
    from torch_csd.weights.stream import Stream

    target, data = foreign
    device = StubDevice()
    current = device.new_stream()
    device.current_stream = lambda: current
    monkeypatch.setattr(torch_csd.cuda, "open_device", lambda _: device)
    monkeypatch.setattr(torch_csd.cuda, "choose_direct", lambda card, *_: (GdsTransfer(card, None, depth=4), "stubs"))
    stream = Stream(4 * MiB, staging_bytes=MiB, device=device.torch_device)
    file = stream.open(target)
    step = 200_001
    parts = [(begin, min(step, len(data) - begin)) for begin in range(0, len(data), step)]
    layouts = [Region.make(file, torch.uint8, (count,), begin) for begin, count in parts]
    for keep in (False, True):
        stream.expect(layouts, keep=keep)
        for _ in range(3):
            for (begin, count), layout in zip(parts, layouts, strict=True):
                with stream.use(layout) as elements:
                    assert torch.equal(elements.as_subclass(torch.Tensor), data[begin : begin + count])
    stats = stream.stats()
    assert stats["gpu_io"] == "gds" and stats["bytes_read"] == stats["gpu_copied_bytes"] == 0
    assert stats["gpu_direct_bytes"] > 4 * len(data) and stats["pinned_bytes"] == MiB // 2
    os.truncate(target, MiB)
    stream.expect(layouts, keep=False)
    with pytest.raises(StoreError, match=f"{target}: changed while it was in use"):
        with stream.use(layouts[0]):
            pass
    stream.close()
    assert cufile.stub_files_open() == 0


def test_threads_end_with_the_transfer(path):
    before = threading.active_count()
    transfer = GdsTransfer(StubDevice(), path, threads=3, task_bytes=BLOCK)
    slab = transfer.register(MiB)
    move(transfer, request(slab, False))
    assert threading.active_count() == before + 3
    transfer.close()
    assert threading.active_count() == before


def test_kvikios_texts_are_as_this_code_takes_them():
    assert errno_of("KvikIO failure at: /x/y.cpp:279: Unable to write file: No space left on device") == errno.ENOSPC
    assert errno_of("cuFile error at: /x/y.cpp:230: Operation not permitted") == errno.EIO
    assert errno_of("cuFile error:CUDA Driver API error") == errno.EIO
