"""Files of pages that are damaged, or were never ours: each is an error that says so, never a wrong answer.

What the catalogue itself may hold is in test_catalogue.py; here it is sound SQLite, and what it says is wrong.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import random_kv

from torch_csd import KVStore, StoreCorruptError, StoreError, remove_sequence, verify

SETTINGS = {"memory_budget": "8MiB", "threads": 1}
ENTRY = struct.Struct("<QIHBB")  # file_offset, checksum, block_count, kind, reserved
K, V = random_kv(2, 2, 200, 16)
PAGE_BYTES = 2 * 2 * 64 * 16 * 4


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A directory with two sequences, a of float32 and b of int4."""
    directory = tmp_path_factory.mktemp("sound")
    for name, kv_dtype in (("a", "float32"), ("b", "int4")):
        with KVStore(directory, durable=True, name=name, kv_dtype=kv_dtype, **SETTINGS) as store:
            store.append(0, K, V, lengths=[200, 70])
            store.append(1, V, K, lengths=[130, 200])
            store.commit()
    return directory


@pytest.fixture
def home(sound, tmp_path) -> Path:
    """torch_csd-durable of a copy that a test may damage."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path / "torch_csd-durable"


def use(home: Path) -> None:
    """All that a user would do."""
    directory = home.parent
    for name in "ab":
        for read_only in (True, False):
            with KVStore.open(directory, name, read_only=read_only, **SETTINGS) as store:
                for layer in store.layers():
                    store.attend(layer, torch.zeros(2, 2, 1, 16))
                    store.read(layer, kv_end=min(store.lengths(layer)))


def test_the_copy_itself_is_sound(home):
    use(home)
    assert verify(home.parent) == []


# ---- the file of pages ---------------------------------------------------------------------------------------------


def _header(offset: int, data: bytes, *, fix_checksum: bool = True) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        path = home / "pages.csd"
        with open(path, "r+b") as file:
            header = bytearray(file.read(64))
            header[offset : offset + len(data)] = data
            if fix_checksum:
                header[60:64] = struct.pack("<I", crc32c(bytes(header[:60])))
            file.seek(0)
            file.write(header)

    return damage


def crc32c(data: bytes) -> int:
    """Bit by bit, from FORMAT.md."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def _replace(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        path = home / "pages.csd"
        path.rename(home.parent / "elsewhere")
        make(path)

    return damage


def _socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        listener.bind(path.name)
    finally:
        os.chdir(before)
        listener.close()


def _cut(size: int) -> Callable[[Path], None]:
    return lambda home: os.truncate(home / "pages.csd", size)


FILES = {
    "empty": (_cut(0), StoreCorruptError, "ends at byte 0"),
    "cut within the header": (_cut(40), StoreCorruptError, "ends at byte 40"),
    "cut behind the header": (_cut(4096), StoreCorruptError, "cut short"),
    "cut before the pages": (_cut(2**20), StoreCorruptError, "cut short"),
    "cut within the pages": (_cut(2**20 + PAGE_BYTES + 4096), StoreCorruptError, "cut short"),
    "other magic": (_header(0, b"NOTPOOL"), StoreCorruptError, "does not begin with CSDPOOL"),
    "zeros": (_header(0, bytes(64), fix_checksum=False), StoreCorruptError, "does not begin with CSDPOOL"),
    "version 1": (
        _header(8, struct.pack("<I", 1)),
        StoreError,
        "version 1 of the format; this torch_csd reads version 2",
    ),
    "version 3": (_header(8, struct.pack("<I", 3)), StoreError, "version 3 of the format"),
    "byte order": (_header(12, bytes([1, 2, 3, 4])), StoreCorruptError, "byte order mark"),
    "header of 8 bytes": (_header(16, struct.pack("<I", 8)), StoreCorruptError, "a header of 8 bytes"),
    "header of 2 GiB": (_header(16, struct.pack("<I", 2**31)), StoreCorruptError, "a header of 2147483648 bytes"),
    "pages of 0 tokens": (_header(20, struct.pack("<I", 0)), StoreCorruptError, "pages of 0 tokens"),
    "pages of 128 tokens": (_header(20, struct.pack("<I", 128)), StoreCorruptError, "pages of 128 tokens"),
    "blocks of 512": (_header(24, struct.pack("<I", 512)), StoreCorruptError, "blocks of 512 bytes"),
    "lifetime scratch": (_header(28, struct.pack("<I", 0)), StoreCorruptError, "scratch store"),
    "lifetime 7": (_header(28, struct.pack("<I", 7)), StoreCorruptError, "lifetime 7"),
    "data from byte 0": (_header(32, struct.pack("<Q", 0)), StoreCorruptError, "from byte 0 on"),
    "data from byte 2**63": (_header(32, struct.pack("<Q", 2**63)), StoreCorruptError, "from byte 9223372036854775808"),
    "another store's": (_header(40, b"x" * 16), StoreCorruptError, "belongs to another store"),
    "a flipped bit": (_header(41, b"?", fix_checksum=False), StoreCorruptError, "checksum of its header"),
    "a wrong checksum": (_header(60, b"????", fix_checksum=False), StoreCorruptError, "checksum of its header"),
    "missing": (_replace(lambda path: None), StoreError, "pages.csd"),
    "a directory": (_replace(Path.mkdir), StoreError, "director"),
    "a symbolic link": (_replace(lambda path: path.symlink_to(path.parent.parent / "elsewhere")), StoreError, "link"),
    "a dangling link": (_replace(lambda path: path.symlink_to("nowhere")), StoreError, "link"),
    "a FIFO": (_replace(lambda path: os.mkfifo(path, 0o600)), StoreError, "FIFO"),
    "a socket": (_replace(_socket), StoreError, "socket"),
    "a link to a device": (_replace(lambda path: path.symlink_to("/dev/zero")), StoreError, "link"),
    "a second name": (lambda home: os.link(home / "pages.csd", home / "twin"), StoreError, "link"),
    "open to the group": (lambda home: (home / "pages.csd").chmod(0o640), StoreError, "640"),
    "open to all": (lambda home: (home / "pages.csd").chmod(0o606), StoreError, "606"),
    "in a directory open to all": (lambda home: home.chmod(0o755), StoreError, "755"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_not_what_it_should_be_is_refused(home, kind):
    damage, error, text = FILES[kind]
    damage(home)
    for _ in range(2):
        with pytest.raises(error) as caught:
            use(home)
        assert text in str(caught.value) and "torch_csd-durable" in str(caught.value), caught.value
    assert (home / "catalogue.sqlite").stat().st_size > 0


def test_a_files_owner_must_be_this_user(home):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(home / "pages.csd", 12345, -1)
    with pytest.raises(StoreError, match="12345"):
        use(home)


# ---- what the catalogue says of it ---------------------------------------------------------------------------------


def change_entries(
    home: Path, sequence: str, layer: int, row: int, change: Callable[[list[list[int]]], object]
) -> None:
    """change() gets the entries of a row, [file_offset, checksum, block_count, kind, reserved] each, to be changed."""
    connection = sqlite3.connect(home / "catalogue.sqlite")
    with connection:
        key = (*connection.execute("SELECT id FROM sequence WHERE name = ?", (sequence,)).fetchone(), layer, row)
        where = "WHERE sequence = ? AND layer = ? AND row = ? AND chunk = 0"
        (blob,) = connection.execute(f"SELECT entries FROM page_chunk {where}", key).fetchone()
        entries = [list(entry) for entry in ENTRY.iter_unpack(blob)]
        change(entries)
        blob = b"".join(ENTRY.pack(*entry) for entry in entries)
        connection.execute(f"UPDATE page_chunk SET entries = ? {where}", (blob, *key))
    connection.close()


def _entry(place: int, **values: object) -> Callable[[list[list[int]]], None]:
    names = ("file_offset", "checksum", "block_count", "kind", "reserved")

    def change(entries: list[list[int]]) -> None:
        for name, value in values.items():
            at = names.index(name)
            entries[place][at] = value(entries[place][at]) if callable(value) else value

    return change


def _swap(entries: list[list[int]]) -> None:
    entries[0][0], entries[1][0] = entries[1][0], entries[0][0]


def _twice(entries: list[list[int]]) -> None:
    entries[1] = [*entries[0][:1], entries[1][1], *entries[0][2:]]


ENTRIES = {
    "beyond the end of the file": ("a", _entry(0, file_offset=2**40), "cut short"),
    "half beyond the end": ("a", _entry(-1, file_offset=2**21 - 4096), "cut short"),
    "the last offset there is": ("a", _entry(0, file_offset=2**64 - 4096), "file_offset"),
    "an offset whose end overflows": ("a", _entry(0, file_offset=2**63 - 4096), "file_offset"),
    "in the header": ("a", _entry(0, file_offset=0), "file_offset 0"),
    "before the data": ("a", _entry(0, file_offset=2**20 - 4096), "file_offset 1044480"),
    "off a block": ("a", _entry(0, file_offset=lambda o: o + 512), "file_offset"),
    "into another page": ("a", _entry(0, file_offset=lambda o: o + 4096), "outside of the file, or over"),
    "one block earlier": ("a", _entry(2, file_offset=lambda o: o - 4096), "outside of the file, or over"),
    "one place for two pages": ("a", _twice, "outside of the file, or over"),
    "a larger page": ("a", _entry(0, block_count=lambda n: n + 1), "blocks"),
    "a smaller page": ("a", _entry(0, block_count=lambda n: n - 1), "blocks"),
    "no page at all": ("a", _entry(0, block_count=0), "blocks"),
    "the largest page": ("a", _entry(0, block_count=2**16 - 1), "blocks"),
    "codes where there are none": ("a", _entry(0, kind=1), "kind 1"),
    "an unknown kind": ("b", _entry(0, kind=2), "kind 2"),
    "full precision in the size of codes": ("b", _entry(0, kind=0), "blocks"),
    "a reserved byte": ("a", _entry(0, reserved=1), "reserved"),
    "another checksum": ("a", _entry(0, checksum=lambda c: c ^ 1), "read back|checksum|other bytes"),
    "pages that changed places": ("a", _swap, "read back|checksum|other bytes"),
    "a checksum of codes": ("b", _entry(0, checksum=0), "read back|checksum|other bytes"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_page_table_that_cannot_be_is_refused(home, kind):
    sequence, change, text = ENTRIES[kind]
    change_entries(home, sequence, 0, 0, change)
    with pytest.raises(StoreCorruptError, match=text):
        use(home)
    assert {page.sequence for page in verify(home.parent)} >= {sequence}
    # What is damaged can be removed, and with it goes the trouble.
    remove_sequence(home.parent, sequence)
    (other,) = {"a", "b"} - {sequence}
    with KVStore.open(home.parent, other, **SETTINGS) as store:
        store.read(0, kv_end=70)
        store.append(0, K, V)
        store.commit()
    assert verify(home.parent) == []


def test_entries_of_another_sequence_are_found_by_their_bytes(home):
    taken = []
    change_entries(home, "a", 0, 0, lambda entries: taken.extend(entries[:3]))
    change_entries(home, "a", 1, 1, lambda entries: entries.__setitem__(slice(0, 3), taken))
    # The same pages in two rows are what forks do: sound tables. What is in them is somebody else's.
    with KVStore.open(home.parent, "a", **SETTINGS) as store:
        k, _ = store.read(1, kv_begin=0, kv_end=64)
    assert torch.equal(k[1], K[0, :, :64]) and verify(home.parent) == []


# ---- the pages -----------------------------------------------------------------------------------------------------


def _flip(home: Path, offset: int) -> None:
    with open(home / "pages.csd", "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("place", [0, 1000, -1], ids=["first byte", "within", "last byte"])
@pytest.mark.parametrize("sequence", ["a", "b"])
def test_a_damaged_page_is_named_and_the_others_go_on(home, sequence, place):
    taken = []
    change_entries(home, sequence, 1, 1, lambda entries: taken.extend(entries))
    offset, _, block_count, *_ = taken[1]
    _flip(home, offset + place % (block_count * 4096))
    (page,) = verify(home.parent)
    assert (page.sequence, page.layer, page.row, page.index, page.file_offset) == (sequence, 1, 1, 1, offset)
    with KVStore.open(home.parent, sequence, **SETTINGS) as store:
        for run in (lambda: store.attend(1, torch.zeros(2, 2, 1, 16)), lambda: store.read(1, kv_end=130)):
            with pytest.raises(StoreCorruptError, match=f"{offset}"):
                run()
        store.attend(0, torch.zeros(2, 2, 1, 16))
        assert store.read(1, kv_end=64)[0].shape[2] == 64
        store.truncate(1, 64)
        store.append(1, K, V)
        store.attend(1, torch.zeros(2, 2, 1, 16))
        store.commit()
    assert verify(home.parent) == []
    with KVStore.open(home.parent, "b" if sequence == "a" else "a", **SETTINGS) as store:
        store.read(1, kv_end=130)


def test_a_tail_that_is_damaged_is_never_continued(home):
    taken = []
    change_entries(home, "a", 0, 1, lambda entries: taken.extend(entries))
    _flip(home, taken[-1][0] + 5)
    with KVStore.open(home.parent, "a", **SETTINGS) as store:
        with pytest.raises(StoreCorruptError, match=str(taken[-1][0])):
            store.append(0, K, V)
        assert store.lengths(0) == [200, 70]
