"""Files of others are read into memory that callers own: their bytes, their order, and what becomes of both meanwhile.

What depends on when a request completes is in tests/native/test_file_reader.cpp.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checksums import FAULTY
from test_io_engines import FORBID, SECCOMP

from torch_csd import StoreClosedError, StoreError, ops, probe

BLOCK, MIB = 4096, 2**20
UNTOUCHED = 0xA5


@pytest.fixture
def make_reader(io_engine) -> Iterator[Callable[..., torch.Tensor]]:
    readers = []

    def make(**settings: object) -> torch.Tensor:
        readers.append(ops.reader_open(**{"io_engine": io_engine} | settings))
        return readers[-1]

    yield make
    for reader in readers:
        ops.reader_close(reader)


@pytest.fixture
def reader(make_reader) -> torch.Tensor:
    return make_reader()


def room(byte_count: int) -> torch.Tensor:
    """Memory that starts on a block."""
    memory = torch.full((byte_count + BLOCK,), UNTOUCHED, dtype=torch.uint8)
    start = -memory.data_ptr() % BLOCK
    return memory[start : start + byte_count]


def random_file(path: Path, byte_count: int, seed: int = 0) -> bytes:
    data = numpy.random.default_rng(seed).bytes(byte_count)
    path.write_bytes(data)
    return data


def blocks(offset: int, byte_count: int) -> tuple[int, int]:
    return offset // BLOCK * BLOCK, -(-(offset + byte_count) // BLOCK) * BLOCK


def read_all(reader: torch.Tensor, number: int, byte_count: int, *, background: bool = False) -> tuple:
    """A ticket for a whole file, and its memory."""
    memory = room(blocks(0, byte_count)[1])
    ticket = ops.reader_read(
        reader,
        files=[number],
        offsets=[0],
        byte_counts=[byte_count],
        memory=memory,
        memory_offsets=[0],
        background=background,
    )
    return ticket, memory


def wait_for(reader: torch.Tensor, ticket: int, memory: torch.Tensor, byte_count: int) -> bytes:
    ops.reader_wait(reader, ticket)
    return memory[:byte_count].numpy().tobytes()


# ---- bytes ----------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_every_range_of_every_file_comes_to_its_place_and_nothing_else_is_touched(tmp_path, io_engine, data):
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 4095, 4096, 4097, 70_000, MIB, 2 * MIB + 513]), min_size=1))
    contents = [random_file(tmp_path / str(i), size, seed=i) for i, size in enumerate(sizes)]
    ranges = []  # (file, offset, byte_count, place)
    end = 0
    for _ in range(data.draw(st.integers(0, 12))):
        file = data.draw(st.integers(0, len(sizes) - 1))
        offset = data.draw(st.integers(0, sizes[file]))
        byte_count = data.draw(st.integers(0, sizes[file] - offset))
        ranges.append((file, offset, byte_count, end))
        begin, stop = blocks(offset, byte_count)
        end += stop - begin + BLOCK * data.draw(st.integers(0, 2))
    split = data.draw(st.integers(0, len(ranges)))
    backgrounds = data.draw(st.tuples(st.booleans(), st.booleans()))
    last_first = data.draw(st.booleans())
    memory = room(max(end, BLOCK))
    reader = ops.reader_open(io_engine=io_engine, queue_depth=data.draw(st.sampled_from([1, 2, 32])))
    for i in range(len(sizes)):
        file = ops.reader_add_file(reader, str(tmp_path / str(i)))
        info = os.stat(tmp_path / str(i))
        assert file == (i, sizes[i], info.st_mtime_ns, file.direct_io, info.st_dev, info.st_ino)
    tickets = []
    for part, background in zip((ranges[:split], ranges[split:]), backgrounds, strict=True):
        files, offsets, byte_counts, places = (list(column) for column in zip(*part, strict=True)) if part else [[]] * 4
        tickets.append(
            ops.reader_read(
                reader,
                files=files,
                offsets=offsets,
                byte_counts=byte_counts,
                memory=memory,
                memory_offsets=places,
                background=background,
            )
        )
    for ticket in sorted(tickets, reverse=last_first):
        ops.reader_wait(reader, ticket)
    stats = ops.reader_stats(reader)
    ops.reader_close(reader)

    expected = torch.full_like(memory, UNTOUCHED)
    unknown = torch.zeros(len(memory), dtype=torch.bool)  # behind the end of a file
    for file, offset, byte_count, place in ranges:
        if byte_count == 0:
            continue
        begin, stop = blocks(offset, byte_count)
        image = numpy.frombuffer(contents[file][begin:stop], dtype=numpy.uint8)
        expected[place : place + len(image)] = torch.from_numpy(image.copy())
        unknown[place + len(image) : place + stop - begin] = True
    assert torch.equal(memory[~unknown], expected[~unknown])
    assert stats["bytes_read"] == sum(byte_count for _, _, byte_count, _ in ranges)
    assert stats["bytes_read"] <= stats["bytes_moved"] <= stats["bytes_read"] + 2 * BLOCK * len(ranges)
    assert stats["io_engine"] == io_engine and stats["file_count"] == len(sizes)


@pytest.mark.parametrize("directory", ["drive", "memory"])
@pytest.mark.parametrize("staging", [True, False])
def test_many_tickets_of_many_files_are_in_flight_together(tmp_path, make_reader, directory, staging):
    if directory == "memory":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no /dev/shm to write to")
        tmp_path = Path("/dev/shm") / f"torch_csd-{os.getpid()}"
        tmp_path.mkdir()
    try:
        sizes = [3 * MIB + 17 * i for i in range(8)]
        contents = [random_file(tmp_path / str(i), size, seed=i) for i, size in enumerate(sizes)]
        stride = 4 * MIB
        memory = room(stride * len(sizes))
        reader = make_reader(queue_depth=8, staging=memory if staging else None)
        for i in range(len(sizes)):
            assert ops.reader_add_file(reader, str(tmp_path / str(i))).number == i
        tickets = []
        for i, size in enumerate(sizes):
            offsets, counts = [0, MIB + 3, 2 * MIB + 5], [MIB + 3, MIB + 2, size - 2 * MIB - 5]
            places = [stride * i + offset // BLOCK * BLOCK for offset in offsets]
            for part in range(3):  # each alone, so that they overlap in the blocks between them
                tickets.append(
                    ops.reader_read(
                        reader,
                        files=[i],
                        offsets=offsets[part : part + 1],
                        byte_counts=counts[part : part + 1],
                        memory=memory,
                        memory_offsets=places[part : part + 1],
                    )
                )
        for ticket in tickets:
            ops.reader_wait(reader, ticket)
        for i, size in enumerate(sizes):
            assert memory[stride * i : stride * i + size].numpy().tobytes() == contents[i]
        stats = ops.reader_stats(reader)
        assert stats["direct_file_count"] in (0, len(sizes))
        assert directory == "drive" or (stats["direct_file_count"] == 0 and "memory" in stats["io_reason"])
        assert 0 < stats["busy_s"] and stats["request_count"] >= 3 * len(sizes)
    finally:
        if directory == "memory":
            shutil.rmtree(tmp_path)


def test_a_file_that_is_refreshed_is_read_as_it_is_now(tmp_path, reader):
    path = tmp_path / "file"
    random_file(path, 10_000)
    number = ops.reader_add_file(reader, str(path)).number
    data = random_file(path, 20_000, seed=1)  # in place
    ticket, memory = read_all(reader, number, 10_000)
    with pytest.raises(StoreError, match="changed while it was in use"):
        wait_for(reader, ticket, memory, 10_000)
    info = os.stat(path)
    file = ops.reader_refresh_file(reader, number)
    assert file == (number, 20_000, info.st_mtime_ns, file.direct_io, info.st_dev, info.st_ino)
    ticket, memory = read_all(reader, number, 20_000)
    assert wait_for(reader, ticket, memory, 20_000) == data
    os.truncate(path, 19_999)
    with pytest.raises(StoreError, match=f"{path}: cut short while it was in use: was 20000 bytes, is 19999"):
        ops.reader_refresh_file(reader, number)
    for unknown in (-1, number + 1):
        with pytest.raises(ValueError, match="there is no file"):
            ops.reader_refresh_file(reader, unknown)


def test_files_are_found_through_symbolic_links_and_left_as_they_are(tmp_path, reader):
    blob = tmp_path / "blob"
    data = random_file(blob, 100_001)
    blob.chmod(0o444)
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "link")
    before = os.stat(blob)
    by_link = ops.reader_add_file(reader, str(tmp_path / "model.safetensors"))
    by_name = ops.reader_add_file(reader, str(blob))
    assert by_link[1:] == by_name[1:] and by_link.number != by_name.number
    assert wait_for(reader, *read_all(reader, by_link.number, len(data)), len(data)) == data
    after = os.stat(blob)
    assert (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (
        after.st_mtime_ns,
        after.st_ctime_ns,
        after.st_size,
    )


def test_what_is_no_file_is_refused_and_says_what_it_is(tmp_path, reader):
    os.mkfifo(tmp_path / "fifo")
    for path, text in (
        (tmp_path, "wanted a regular file, this is a directory; name a file"),
        (tmp_path / "fifo", "this is a FIFO"),
        ("/dev/zero", "this is a device"),
        (tmp_path / "missing", "opening the file to read: No such file or directory; name a file that is there"),
    ):
        with pytest.raises(StoreError) as caught:
            ops.reader_add_file(reader, str(path))
        assert str(caught.value).startswith(f"{path}: ") and text in str(caught.value)
    random_file(tmp_path / "file", 10)
    assert ops.reader_add_file(reader, str(tmp_path / "file")).number == 0


def test_arguments_are_checked_before_anything_is_read(tmp_path, io_engine, reader):
    random_file(tmp_path / "file", 10_000)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    memory = room(3 * BLOCK)

    def read(**changed):
        arguments = dict(files=[0], offsets=[0], byte_counts=[10_000], memory=memory, memory_offsets=[0])
        return ops.reader_read(reader, **arguments | changed)

    for changed, text in (
        ({"files": [1]}, "there is no file 1, 1 were added"),
        ({"files": [-1]}, "there is no file -1"),
        ({"offsets": [1]}, "has 10000 bytes, wanted 10000 from byte 1 on"),
        ({"offsets": [-1]}, "from byte -1 on"),
        ({"byte_counts": [-1]}, "wanted -1 from byte 0 on"),
        ({"offsets": [2**62], "byte_counts": [2**62]}, "has 10000 bytes"),
        (
            {"memory_offsets": [1]},
            "the blocks that cover a range must lie in memory's 12288 bytes, got 12288 bytes from 1",
        ),
        ({"memory_offsets": [-1]}, "got 12288 bytes from -1 on"),
        ({"memory": memory[:-1]}, "memory's 12287 bytes"),
        ({"memory": memory[1:], "byte_counts": [10]}, "must be a multiple of 4096, its last bits are 1"),
        ({"memory": memory.to(torch.int32)}, "memory must be a contiguous uint8 CPU tensor"),
        ({"memory": memory[::2]}, "memory must be a contiguous uint8 CPU tensor"),
        ({"memory": memory.to("meta")}, "memory must be in host memory"),
        ({"offsets": []}, "one entry for each of 1 files"),
    ):
        with pytest.raises(ValueError, match=text):
            read(**changed)
    assert ops.reader_stats(reader)["request_count"] == 0 and (memory == UNTOUCHED).all()
    ops.reader_wait(reader, read())
    for ticket in (0, 99):
        with pytest.raises(ValueError, match=f"there is no ticket {ticket}: it was never given, or was waited for"):
            ops.reader_wait(reader, ticket)
        with pytest.raises(ValueError, match="there is no ticket"):
            ops.reader_is_done(reader, ticket)
        ops.reader_drop(reader, ticket)
    for settings, text in (
        ({"queue_depth": 0}, "queue_depth must be from 1 to 4096, got 0"),
        ({"io_engine": "uring"}, "io_engine must be"),
        ({"staging": memory.to("meta")}, "staging must be in host memory"),
        ({"staging": memory[::2]}, "staging must be a contiguous uint8 CPU tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            ops.reader_open(**settings)


# ---- order, and an end before the end -------------------------------------------------------------------------------


def test_the_foreground_is_there_before_a_long_background_read(tmp_path, make_reader):
    reader = make_reader(queue_depth=1)
    data = random_file(tmp_path / "file", 64 * MIB)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    long, target = read_all(reader, 0, len(data), background=True)
    short, memory = read_all(reader, 0, MIB)
    assert wait_for(reader, short, memory, MIB) == data[:MIB]
    assert not ops.reader_is_done(reader, long)
    assert wait_for(reader, long, target, len(data)) == data
    assert ops.reader_stats(reader)["wait_s"] > 0


def test_dropped_tickets_leave_their_memory_alone(tmp_path, make_reader):
    reader = make_reader(queue_depth=2)
    data = random_file(tmp_path / "file", 64 * MIB)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    for background in (False, True):
        for delay_s in (0, 0.001, 0.005, 0.2):
            first, one = read_all(reader, 0, len(data), background=background)
            second, other = read_all(reader, 0, len(data), background=background)
            time.sleep(delay_s)
            for ticket, memory in ((second, other), (first, one)):
                ops.reader_drop(reader, ticket)
                memory.fill_(UNTOUCHED)
                time.sleep(0.005)
                assert (memory == UNTOUCHED).all()
                ops.reader_drop(reader, ticket)
                with pytest.raises(ValueError, match="there is no ticket"):
                    ops.reader_wait(reader, ticket)
    assert ops.reader_stats(reader)["bytes_moved"] < 16 * len(data)
    last, memory = read_all(reader, 0, MIB)
    assert wait_for(reader, last, memory, MIB) == data[:MIB]


def test_memory_lives_as_long_as_it_is_read_to(tmp_path, reader):
    random_file(tmp_path / "file", 8 * MIB)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    for end in (ops.reader_wait, ops.reader_drop, None):
        array = numpy.empty(8 * MIB + BLOCK, dtype=numpy.uint8)
        alive = weakref.ref(array)
        memory = torch.from_numpy(array)
        start = -memory.data_ptr() % BLOCK
        ticket = ops.reader_read(
            reader, files=[0], offsets=[0], byte_counts=[8 * MIB], memory=memory, memory_offsets=[start]
        )
        del array, memory
        gc.collect()
        assert alive() is not None
        if end is None:
            ops.reader_close(reader)
        else:
            end(reader, ticket)
        gc.collect()
        assert alive() is None


# ---- files that change under us -------------------------------------------------------------------------------------


def change_by(kind: str, path: Path) -> None:
    if kind == "truncated":
        os.truncate(path, 5000)
    elif kind == "grown":
        with open(path, "ab") as file:
            file.write(b"more")
    elif kind == "touched":
        os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    else:
        with open(path, "r+b") as file:
            file.write(b"other bytes")


@pytest.mark.parametrize("kind", ["truncated", "grown", "touched", "written to"])
def test_a_file_that_changed_is_an_error_that_says_how(tmp_path, reader, kind):
    path, other = tmp_path / "file", tmp_path / "other"
    random_file(path, 3 * MIB)
    os.utime(path, ns=(0, 1_600_000_000_000_000_001))
    data = random_file(other, MIB, seed=1)
    ops.reader_add_file(reader, str(path))
    ops.reader_add_file(reader, str(other))
    ops.reader_wait(reader, read_all(reader, 0, 3 * MIB)[0])
    change_by(kind, path)
    size = path.stat().st_size
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            ops.reader_wait(reader, read_all(reader, 0, 3 * MIB)[0])
        text = str(caught.value)
        assert text.startswith(
            f"{path}: changed while it was in use: was 3145728 bytes, modified at 2020-09-13 12:26:40.000000001 UTC; "
            f"is {size} bytes, modified at 20"
        )
        assert text.endswith("; load the checkpoint anew")
        assert kind != "touched" or "is 3145728 bytes, modified at 2023-11-14 22:13:20.123456789 UTC" in text
    assert wait_for(reader, *read_all(reader, 1, MIB), MIB) == data


def test_a_file_whose_name_another_takes_is_read_on(tmp_path, reader):
    path = tmp_path / "file"
    data = random_file(path, 3 * MIB + 1)
    first = ops.reader_add_file(reader, str(path))
    random_file(tmp_path / "new", MIB, seed=1)
    os.replace(tmp_path / "new", path)
    assert wait_for(reader, *read_all(reader, 0, len(data)), len(data)) == data
    second = ops.reader_add_file(reader, str(path))
    assert second.size_bytes == MIB and second.inode != first.inode
    path.unlink()
    assert wait_for(reader, *read_all(reader, 0, len(data)), len(data)) == data


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_after_close_every_call_says_so(tmp_path, make_reader):
    random_file(tmp_path / "file", 64 * MIB)
    reader = make_reader(queue_depth=1)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    ticket, memory = read_all(reader, 0, 64 * MIB)
    waited = []

    def wait():
        try:
            ops.reader_wait(reader, ticket)
        except StoreClosedError as error:
            waited.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.002)
    ops.reader_close(reader)
    memory.fill_(UNTOUCHED)
    waiter.join()
    assert len(waited) == 1 and "clos" in waited[0]
    assert (memory == UNTOUCHED).all()
    for call in (
        lambda: ops.reader_add_file(reader, str(tmp_path / "file")),
        lambda: read_all(reader, 0, MIB),
        lambda: ops.reader_wait(reader, ticket),
        lambda: ops.reader_is_done(reader, ticket),
        lambda: ops.reader_stats(reader),
    ):
        with pytest.raises(StoreClosedError, match="this reader of files is closed; open a new one"):
            call()
    ops.reader_drop(reader, ticket)
    ops.reader_close(reader)


def test_no_descriptor_is_left_behind(tmp_path, io_engine):
    random_file(tmp_path / "file", MIB)

    def use():
        reader = ops.reader_open(io_engine=io_engine)
        for _ in range(3):
            ops.reader_add_file(reader, str(tmp_path / "file"))
        with contextlib.suppress(StoreError):
            ops.reader_add_file(reader, str(tmp_path))
        ops.reader_wait(reader, read_all(reader, 2, MIB)[0])
        ops.reader_close(reader)

    use()
    before = sorted(os.listdir("/proc/self/fd"))
    use()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_is_refused_and_does_no_harm(tmp_path, reader):
    data = random_file(tmp_path / "file", 32 * MIB)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    ticket, memory = read_all(reader, 0, len(data))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (
                lambda: ops.reader_wait(reader, ticket),
                lambda: ops.reader_is_done(reader, ticket),
                lambda: ops.reader_drop(reader, ticket),
                lambda: ops.reader_add_file(reader, str(tmp_path / "file")),
                lambda: read_all(reader, 0, BLOCK),
                lambda: ops.reader_stats(reader),
            ):
                with pytest.raises(StoreClosedError, match="is used in its child"):
                    call()
            descriptors = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            assert str(tmp_path / "file") not in [os.readlink(fd) for fd in descriptors if os.path.lexists(fd)]
            ops.reader_close(reader)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert wait_for(reader, ticket, memory, len(data)) == data


def test_threads_read_wait_and_drop_as_they_like(tmp_path, make_reader):
    sizes = [MIB + 100 * i for i in range(4)]
    contents = [random_file(tmp_path / str(i), size, seed=i) for i, size in enumerate(sizes)]
    reader = make_reader(queue_depth=4)
    for i in range(len(sizes)):
        ops.reader_add_file(reader, str(tmp_path / str(i)))
    wrong = []

    def work(seed: int) -> None:
        rng = numpy.random.default_rng(seed)
        try:
            for _ in range(40):
                file = int(rng.integers(len(sizes)))
                offset = int(rng.integers(sizes[file]))
                count = int(rng.integers(sizes[file] - offset + 1))
                memory = room(2 * MIB)
                ticket = ops.reader_read(
                    reader,
                    files=[file],
                    offsets=[offset],
                    byte_counts=[count],
                    memory=memory,
                    memory_offsets=[0],
                    background=bool(rng.integers(2)),
                )
                if rng.integers(4) == 0:
                    ops.reader_drop(reader, ticket)
                    continue
                if rng.integers(2) == 0:
                    ops.reader_is_done(reader, ticket)
                ops.reader_wait(reader, ticket)
                start = offset % BLOCK
                if memory[start : start + count].numpy().tobytes() != contents[file][offset : offset + count]:
                    wrong.append((file, offset, count))
                if rng.integers(10) == 0:
                    ops.reader_add_file(reader, str(tmp_path / str(file)))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_waiting_lets_other_python_threads_run(tmp_path, make_reader):
    reader = make_reader(queue_depth=1)
    random_file(tmp_path / "file", 64 * MIB)
    ops.reader_add_file(reader, str(tmp_path / "file"))
    ticket, memory = read_all(reader, 0, 64 * MIB)
    over = threading.Event()

    def wait():
        ops.reader_wait(reader, ticket)
        over.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    turns = 0
    while not over.wait(0.0005):
        turns += 1
    waiter.join()
    assert ops.reader_stats(reader)["wait_s"] < 0.005 or turns > 1


# ---- below us -------------------------------------------------------------------------------------------------------


MEDIUM = """
import ctypes, errno, pathlib, sys, torch
from torch_csd import StoreError, ops

drive = ctypes.CDLL(sys.argv[1])
drive.fail(0, 0)
reader = ops.reader_open(io_engine="pread")
size = ops.reader_add_file(reader, sys.argv[2]).size_bytes
memory = torch.empty(size + 8192, dtype=torch.uint8)
place = -memory.data_ptr() % 4096

def read():
    memory.zero_()
    ticket = ops.reader_read(reader, files=[0], offsets=[0], byte_counts=[size], memory=memory, memory_offsets=[place])
    ops.reader_wait(reader, ticket)
    assert memory[place : place + size].numpy().tobytes() == pathlib.Path(sys.argv[2]).read_bytes()

drive.fail(1, errno.EIO)
read()
assert drive.failed_places() == 3
for times, number, text in ((2, errno.EIO, "failed twice; see what the kernel's log says of the drive: Input/output"),
                            (1, errno.ENXIO, "failed: No such device")):
    drive.fail(times, number)
    try:
        read()
        raise AssertionError("no error")
    except StoreError as error:
        assert str(error).startswith(sys.argv[2] + ": reading ") and " bytes at byte " in str(error), error
        assert text in str(error), error
drive.fail(0, 0)
read()
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a faulty drive with")
def test_what_fails_once_because_of_the_medium_is_tried_again(tmp_path):
    source, library = tmp_path / "faulty.c", tmp_path / "faulty.so"
    source.write_text(textwrap.dedent(FAULTY))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-pthread"], check=True)
    random_file(tmp_path / "file", 4 * MIB - 5)
    run = subprocess.run(
        [sys.executable, "-c", MEDIUM, str(library), str(tmp_path / "file")],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


LATER = (
    FORBID
    + """
import pathlib
from torch_csd import ops

paths = sys.argv[1:3]
every_thread, seccomp = sys.argv[3] == "every thread", int(sys.argv[4])
reader = ops.reader_open(io_engine=sys.argv[5], queue_depth=4)
memory = torch.empty(64 * 2**20, dtype=torch.uint8)
place = -memory.data_ptr() % 4096

def check(number, path):
    data = pathlib.Path(path).read_bytes()
    memory.zero_()
    ticket = ops.reader_read(
        reader, files=[number], offsets=[0], byte_counts=[len(data)], memory=memory, memory_offsets=[place]
    )
    if len(data) == 33 * 2**20 + 77 and not forbidden:
        forbid()
    ops.reader_wait(reader, ticket)
    assert memory[place : place + len(data)].numpy().tobytes() == data

forbidden = []
def forbid():
    forbidden.append(True)
    refuse_io_uring_enter(every_thread, seccomp)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for path in paths:
        number = ops.reader_add_file(reader, path).number
        for _ in range(3):
            check(number, path)
    stats = ops.reader_stats(reader)
if every_thread:
    [warning] = caught
    text = str(warning.message)
    assert warning.category is UserWarning and text.startswith(paths[0] + ": io_uring_enter"), text
    assert "Operation not permitted" in text and "files are read with pread from now on" in text, text
    assert stats["io_engine"] == "pread" and "io_uring was refused" in stats["io_reason"], stats
else:
    assert stats["io_engine"] == "io_uring" and caught == [], stats  # the reader has a thread of its own
ops.reader_close(reader)
"""
)


# The calling thread tries the files that are added; one that the engine asked for cannot reach is refused.
@pytest.mark.parametrize(
    ("threads", "asked_for"), [("every thread", "io_uring"), ("every thread", "auto"), ("the calling thread", "auto")]
)
def test_a_reader_goes_on_with_pread_when_io_uring_is_forbidden_later(tmp_path, threads, asked_for):
    if platform.machine() not in SECCOMP:
        pytest.skip(f"the number of seccomp(2) on {platform.machine()} is not known here")
    try:
        probe(tmp_path, "io_uring")
    except StoreError as refused:
        pytest.skip(f"io_uring does not run here anyway: {refused}")
    random_file(tmp_path / "first", 33 * MIB + 77)
    random_file(tmp_path / "second", MIB + 1, seed=1)
    command = [sys.executable, "-c", LATER, str(tmp_path / "first"), str(tmp_path / "second")]
    command += [threads, str(SECCOMP[platform.machine()]), asked_for]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
