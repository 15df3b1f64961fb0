"""Pages that the drive does not give back as they were written: errors that name them, and never a wrong answer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
import torch
from support import assert_attention_equal, random_kv

from torch_csd import StorageCache, StoreCorruptError, StoreError, ops, reference

DATA_OFFSET = 2**20  # of the first page, see FORMAT.md
HEAD_DIM = 24  # one kv head of it: the tile ends inside a block, so that every page has padding
TILE_BYTES = {"bfloat16": 64 * 48 * 2, "int8": 3456, "int4": 1920}
PAGE_BYTES = {"bfloat16": 8192, "int8": 4096, "int4": 4096}
LAYER = 5


class ScratchFile:
    """The file behind an open store in a directory, which has no name any more."""

    def __init__(self, directory: os.PathLike[str]) -> None:
        links = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                links[name] = os.readlink(f"/proc/self/fd/{name}")
        (name,) = (
            name for name, link in links.items() if link.startswith(f"{directory}/") and link.endswith(" (deleted)")
        )
        self.fd = os.open(f"/proc/self/fd/{name}", os.O_RDWR)

    def bytes(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def flip(self, offset: int) -> None:
        """Another bit of this byte; twice is what it was."""
        (byte,) = os.pread(self.fd, 1, offset)
        assert os.pwrite(self.fd, bytes([byte ^ 0x10]), offset) == 1

    @contextlib.contextmanager
    def cut(self, size: int) -> Iterator[None]:
        """Reads behind ``size`` fail meanwhile."""
        rest = self.bytes()[size:]
        os.ftruncate(self.fd, size)
        yield
        assert os.pwrite(self.fd, rest, size) == len(rest)


@pytest.fixture
def open_file(tmp_path) -> Iterator:
    files = []

    def open_() -> ScratchFile:
        files.append(ScratchFile(tmp_path))
        return files[-1]

    yield open_
    for file in files:
        os.close(file.fd)


def fill(make_store, open_file, kind: str, **settings):
    """A store whose full pages are all on the drive, one after another; how many; its tokens; its file."""
    pages = 7
    tokens = 64 * (pages + (1 if kind in ("int8", "int4") else 0)) + 10  # the newest of codes are not codes yet
    k, v = random_kv(1, 1, tokens, HEAD_DIM, dtype=torch.bfloat16)
    store = make_store(kv_dtype=kind, resident=False, read_ahead=0, **settings)
    store.append(LAYER, k, v)
    store.flush()
    stats = store.stats()
    assert stats["pages_on_drive"] == pages and stats["drive_written_bytes"] == pages * PAGE_BYTES[kind]
    return store, pages, (k, v), open_file()


def uses(store, tokens: int, kv_begin: int = 0) -> list:
    """Every way to look at the tokens of a layer, each as a call."""
    handle = store.layer(LAYER).handle
    q, p = torch.randn(1, 2, 1, HEAD_DIM), torch.rand(1, 2, 1, tokens - kv_begin)
    span = {"row_begin": 0, "kv_begin": kv_begin, "kv_end": tokens}
    return [
        lambda: store.attend(LAYER, q, kv_begin=kv_begin),
        lambda: store.attend(LAYER, q.expand(1, 2, 3, HEAD_DIM), causal=True, kv_begin=kv_begin),
        lambda: ops.scores(handle, q, **span),
        lambda: ops.weighted_sum(handle, p, head_dim_v=HEAD_DIM, **span),
        lambda: store.read(LAYER, kv_begin=kv_begin),
    ]


def assert_every_use_names(store, tokens: int, page: int, offset: int) -> None:
    text = rf"/\(scratch\): layer {LAYER}, row 0, page {page}: checksum mismatch at byte {offset} .* token {64 * page} "
    for use in uses(store, tokens):
        for _ in range(2):
            with pytest.raises(StoreCorruptError, match=text):
                use()


@pytest.mark.parametrize("kind", PAGE_BYTES)
def test_a_byte_that_changed_on_the_drive_is_an_error_that_names_its_page(make_store, open_file, io_engine, kind):
    store, pages, (k, _), file = fill(make_store, open_file, kind, io_engine=io_engine)
    tokens = k.shape[2]
    before = store.read(LAYER)
    for page in (0, pages // 2, pages - 1):
        offset = DATA_OFFSET + page * PAGE_BYTES[kind]
        for byte in (0, TILE_BYTES[kind] // 2, TILE_BYTES[kind] - 1, TILE_BYTES[kind], PAGE_BYTES[kind] - 1):
            file.flip(offset + byte)
            assert_every_use_names(store, tokens, page, offset)
            for use in uses(store, tokens, kv_begin=64 * (page + 1)):
                use()  # what needs none of it
            file.flip(offset + byte)
    for got, expected in zip(store.read(LAYER), before, strict=True):
        assert torch.equal(got, expected), "the error was the drive's, not the store's"


@pytest.mark.parametrize("kind", PAGE_BYTES)
def test_a_page_that_another_page_was_written_over_is_an_error(make_store, open_file, io_engine, kind):
    store, _, (k, _), file = fill(make_store, open_file, kind, io_engine=io_engine)
    size = PAGE_BYTES[kind]
    os.pwrite(file.fd, os.pread(file.fd, size, DATA_OFFSET), DATA_OFFSET + 2 * size)
    assert_every_use_names(store, k.shape[2], 2, DATA_OFFSET + 2 * size)
    os.pwrite(file.fd, bytes(size), DATA_OFFSET + 2 * size)
    assert_every_use_names(store, k.shape[2], 2, DATA_OFFSET + 2 * size)


def test_a_layer_works_again_without_its_damaged_page(make_store, open_file):
    store, _, (k, v), file = fill(make_store, open_file, "bfloat16")
    file.flip(DATA_OFFSET + 3 * PAGE_BYTES["bfloat16"] + 100)
    q = torch.randn(1, 2, 1, HEAD_DIM)
    with pytest.raises(StoreCorruptError):
        store.attend(LAYER, q)
    store.truncate(LAYER, 3 * 64)
    store.append(LAYER, k[:, :, 3 * 64 :], v[:, :, 3 * 64 :])
    store.flush()
    assert_attention_equal(store.attend(LAYER, q)[0], reference.attention(q, k, v)[0])
    file.flip(DATA_OFFSET)
    with pytest.raises(StoreCorruptError):
        store.attend(LAYER, q)
    store.trim(LAYER, 64)
    assert torch.equal(store.read(LAYER)[0], k[:, :, 64:])
    store.free(LAYER)
    store.append(LAYER, k, v)
    store.flush()
    assert torch.equal(store.read(LAYER)[1], v)


@pytest.mark.parametrize("kind", PAGE_BYTES)
def test_without_checksums_a_damaged_page_is_no_error(make_store, open_file, io_engine, kind):
    store, _, (k, _), file = fill(make_store, open_file, kind, io_engine=io_engine, checksums=False)
    assert store.stats()["checksums"] is False
    file.flip(DATA_OFFSET + TILE_BYTES[kind] // 2)
    for use in uses(store, k.shape[2]):
        use()
    assert make_store().stats()["checksums"] is True


def test_a_cache_takes_the_switch_too(tmp_path):
    for checksums in (True, False):
        with StorageCache(None, tmp_path, memory_budget="1MiB", checksums=checksums) as cache:
            assert cache.stats()["checksums"] is checksums


# ---- appends that go on from a page of the drive ----------------------------------------------------------------


@pytest.mark.parametrize("fork", [False, True], ids=["", "fork"])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_an_append_onto_a_damaged_tail_is_an_error_and_changes_nothing(make_store, open_file, io_engine, kind, fork):
    layers, tokens = 60, 30
    first = make_store(io_engine=io_engine, kv_dtype=kind, memory_budget="1MiB")
    dense = [random_kv(2, 2, tokens, 64, dtype=torch.bfloat16, seed=layer) for layer in range(layers)]
    for layer, (k, v) in enumerate(dense):
        first.append(layer, k, v)
    assert first.stats()["tail_spills"] > layers
    first.flush()
    store = first.fork() if fork else first
    file = open_file()
    stored = file.bytes()
    places = {}  # (layer, row): byte of the file
    for layer, (_, v) in enumerate(dense):
        for row in range(2):
            line = v[row, 0].contiguous().view(torch.uint8).numpy().tobytes()  # token-major, as a tile has it
            places[layer, row] = [match.start() for match in re.finditer(re.escape(line), stored)]
    for byte in sum(places.values(), []):
        file.flip(byte)
    damaged = 0
    new_k, new_v = random_kv(2, 2, 1, 64, dtype=torch.bfloat16, seed=99)
    for layer, (k, v) in enumerate(dense):
        try:
            store.append(layer, new_k, new_v)
        except StoreCorruptError as error:
            row, offset = re.search(
                rf"layer {layer}, row (\d), page 0: checksum mismatch at byte (\d+) ", str(error)
            ).groups()
            assert any(int(offset) < byte < int(offset) + 2**15 for byte in places[layer, int(row)]), "its own page"
            assert store.lengths(layer) == [tokens, tokens]
            with pytest.raises(StoreCorruptError):
                store.append(layer, new_k, new_v)
            store.truncate(layer, 0)
            store.append(layer, k, v)
            store.append(layer, new_k, new_v)
            damaged += 1
        assert torch.equal(store.read(layer)[1], torch.cat([v, new_v], dim=2))
    assert damaged > layers // 4
    for byte in sum(places.values(), []):
        file.flip(byte)
    if fork:
        for layer, (k, _) in enumerate(dense):
            assert torch.equal(first.read(layer)[0], k), "the store it came from never saw any of it"
        store.close()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_append_after_a_crop_into_a_damaged_quantised_page_is_an_error(make_store, open_file, io_engine, kind):
    store, _, (k, v), file = fill(make_store, open_file, kind, io_engine=io_engine)
    store.truncate(LAYER, 2 * 64 + 5)
    offset = DATA_OFFSET + 2 * PAGE_BYTES[kind]
    file.flip(offset + 7)
    for _ in range(2):
        with pytest.raises(
            StoreCorruptError, match=rf"layer {LAYER}, row 0, page 2: checksum mismatch at byte {offset} "
        ):
            store.append(LAYER, k, v)
        assert store.lengths(LAYER) == [2 * 64 + 5]
    store.truncate(LAYER, 2 * 64)
    store.append(LAYER, k, v)
    assert store.lengths(LAYER) == [2 * 64 + k.shape[2]]
    store.read(LAYER)


# ---- many reads at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_share_a_damaged_page_fail_and_the_others_do_not(make_store, open_file, threads):
    k, v = random_kv(2, 1, 64 * 40, HEAD_DIM)
    store = make_store(resident=False, read_ahead=0, threads=threads)
    store.append(LAYER, k, v)
    store.flush()
    store.reorder(LAYER, [0, 0, 1, 0])
    file = open_file()
    line = v[0, 0, 64 * 20 : 64 * 21].contiguous().view(torch.uint8).numpy().tobytes()
    file.flip(file.bytes().index(line))
    q = torch.randn(4, 1, 1, HEAD_DIM)
    for _ in range(5):
        with pytest.raises(StoreCorruptError, match=f"layer {LAYER}, row [013], page 20: "):
            store.attend(LAYER, q)
    expected, _ = reference.attention(q[2:3], k[1:], v[1:])
    assert_attention_equal(store.attend(LAYER, q[2:3], row_begin=2)[0], expected)


def test_a_damaged_page_among_many_reads_ends_the_pass_and_leaves_nothing_behind(make_store, open_file, io_engine):
    k, v = random_kv(1, 4, 64 * 300, 64)  # 128 KiB a page: 38 reads
    store = make_store(io_engine=io_engine, resident=False, read_ahead=0, memory_budget="8MiB", threads=3)
    store.append(0, k, v)
    store.flush()
    file = open_file()
    q = torch.randn(1, 8, 1, 64)
    expected, _ = reference.attention(q, k, v)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pages = torch.randperm(300, generator=generator)[:2].tolist()
        bytes_ = [DATA_OFFSET + page * 2**17 + 99 for page in pages]
        for byte in bytes_:
            file.flip(byte)
        with pytest.raises(StoreCorruptError, match=rf"layer 0, row 0, page ({pages[0]}|{pages[1]}): checksum"):
            store.attend(0, q)
        for byte in bytes_:
            file.flip(byte)
        assert_attention_equal(store.attend(0, q)[0], expected)


def test_a_damaged_page_that_was_read_ahead_is_an_error_when_it_is_needed(make_store, open_file, io_engine):
    store = make_store(io_engine=io_engine, resident=False, memory_budget="64MiB", threads=2)
    q = torch.randn(1, 4, 1, 64)
    dense = []
    for layer in range(3):
        dense.append(random_kv(1, 4, 64 * 20, 64, seed=layer))
        store.append(layer, *dense[layer])
    store.flush()
    file = open_file()
    line = dense[1][1][0, 0, 64 * 7 : 64 * 8].contiguous().view(torch.uint8).numpy().tobytes()
    byte = file.bytes().index(line)

    def attend(layer: int) -> None:
        assert_attention_equal(store.attend(layer, q)[0], reference.attention(q, *dense[layer])[0])

    for layer in (0, 1, 2, 0, 1, 2):
        attend(layer)
    for _ in range(3):
        file.flip(byte)
        time.sleep(0.05)  # what is in flight lands
        with contextlib.suppress(StoreCorruptError):
            attend(1)  # it may have been read before it was damaged
        for _ in range(3):
            attend(0)  # reads layer 1 ahead, which is no error yet
            with pytest.raises(StoreCorruptError, match="layer 1, row 0, page 7: checksum mismatch at byte"):
                attend(1)
            attend(2)
        file.flip(byte)
        with contextlib.suppress(StoreCorruptError):
            attend(1)  # the same, the other way round
        for layer in (0, 1, 2, 0, 1, 2):
            attend(layer)
    assert store.stats()["read_ahead_bytes"] > 0


# ---- reads and writes that fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAGE_BYTES)
def test_a_read_that_fails_names_the_file_the_pages_and_the_byte(make_store, open_file, io_engine, kind):
    store, pages, (k, _), file = fill(make_store, open_file, kind, io_engine=io_engine)
    cut = DATA_OFFSET + 2 * PAGE_BYTES[kind]
    with file.cut(cut):
        for use in uses(store, k.shape[2], kv_begin=64 * 2):
            with pytest.raises(
                StoreError, match=rf"\(scratch\): layer 5, row 0, page 2 and {pages - 3} more: "
            ) as caught:
                use()
            assert type(caught.value) is StoreError, "not damaged"
            assert f"reading KV pages at byte {cut} failed twice" in str(caught.value)
            assert str(caught.value).endswith(": Input/output error")
    store.read(LAYER)


def test_an_append_whose_read_fails_names_the_page(make_store, open_file, io_engine):
    store, _, (k, v), file = fill(make_store, open_file, "int8", io_engine=io_engine)
    store.truncate(LAYER, 2 * 64 + 5)
    offset = DATA_OFFSET + 2 * PAGE_BYTES["int8"]
    with file.cut(offset):
        with pytest.raises(StoreError, match=f"layer 5, row 0, page 2: reading KV pages at byte {offset} failed twice"):
            store.append(LAYER, k, v)
    store.append(LAYER, k, v)


# Lies below the pread engine: fails the next transfers of pages, each place of the file `times` times.
FAULTY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <pthread.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int times, errno_value, count;
static struct { off_t offset; int failures; } places[4096];

void fail(int times_, int errno_value_) { times = times_; errno_value = errno_value_; count = 0; }
int failed_places(void) { return count; }

static int fails(off_t offset) {
  if (offset < (1 << 20)) return 0;
  pthread_mutex_lock(&mutex);
  int i = 0;
  while (i < count && places[i].offset != offset) i++;
  int result = i < 4096 && (i < count ? places[i].failures : 0) < times;
  if (result && i == count) { places[count].offset = offset; places[count++].failures = 0; }
  if (result) places[i].failures++;
  pthread_mutex_unlock(&mutex);
  return result;
}

ssize_t preadv(int fd, const struct iovec* segments, int n, off_t offset) {
  if (fails(offset)) { errno = errno_value; return -1; }
  return syscall(SYS_preadv, fd, segments, n, offset, 0);
}
ssize_t pwritev(int fd, const struct iovec* segments, int n, off_t offset) {
  if (fails(offset)) { errno = errno_value; return -1; }
  return syscall(SYS_pwritev, fd, segments, n, offset, 0);
}
ssize_t preadv64(int fd, const struct iovec* s, int n, off_t o) { return preadv(fd, s, n, o); }
ssize_t pwritev64(int fd, const struct iovec* s, int n, off_t o) { return pwritev(fd, s, n, o); }
"""

PROGRAM = """
import ctypes, errno, sys, torch
from torch_csd import KVStore, StoreCorruptError, StoreError

drive = ctypes.CDLL(sys.argv[1])
k, v = torch.randn(1, 2, 64 * 64, 64), torch.randn(1, 2, 64 * 64, 64)
q = torch.randn(1, 4, 1, 64)

def refused(use, *texts):
    try:
        use()
    except StoreError as error:
        assert type(error) is StoreError and all(text in str(error) for text in texts), error
    else:
        raise AssertionError("no error")

def store(**settings):
    drive.fail(0, 0)
    return KVStore(sys.argv[2], io_engine="pread", memory_budget="16MiB", resident=False, **settings)

for read_ahead in (0, None):
    with store(read_ahead=read_ahead) as s:
        drive.fail(1, errno.EIO)
        s.append(0, k, v)
        s.append(1, v, k)
        s.flush()
        assert drive.failed_places() >= 4, "writes of 1 MiB"
        drive.fail(1, errno.EIO)
        for layer in (0, 1, 0, 1):
            first, second = (k, v) if layer == 0 else (v, k)
            expected = torch.nn.functional.scaled_dot_product_attention(q, first, second, enable_gqa=True)
            torch.testing.assert_close(s.attend(layer, q)[0], expected)
        assert drive.failed_places() >= 4
        drive.fail(1, errno.EIO)
        assert torch.equal(s.read(0)[0], k)
        for times, number, text in ((2, errno.EIO, "twice"), (1, errno.ENXIO, "failed: No such device")):
            drive.fail(times, number)
            refused(lambda: s.read(0), "layer 0, row 0, page ", "reading KV pages at byte ", text)
        drive.fail(0, 0)
        assert torch.equal(s.read(0)[0], k)

with store() as s:  # a write that fails twice loses nothing
    drive.fail(2, errno.EIO)
    s.append(0, k[:, :, :640], v[:, :, :640])
    refused(s.flush, "writing KV pages at byte ", "kept in memory")
    assert torch.equal(s.read(0)[0], k[:, :, :640])
    drive.fail(0, 0)
    s.append(0, k[:, :, 640:], v[:, :, 640:])
    assert torch.equal(s.read(0)[0], k)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a faulty drive with")
def test_what_fails_once_because_of_the_medium_is_tried_again(tmp_path):
    source, library = tmp_path / "faulty.c", tmp_path / "faulty.so"
    source.write_text(textwrap.dedent(FAULTY))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-pthread"], check=True)
    directory = tmp_path / "drive"
    directory.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), str(directory)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
