"""The catalogue: what was committed is found again, damage is named, and locks end with whoever holds them."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_csd import StoreBusyError, StoreClosedError, StoreCorruptError, StoreError, StoreFullError, catalogue
from torch_csd.catalogue import (
    CATALOGUE_NAME,
    DIRECTORY_NAME,
    Catalogue,
    LayerTable,
    RowTable,
    Sequence,
    StoreDirectory,
    check_name,
    page_bytes,
)

STORE_ID = bytes(range(16))
QUANTISED = ("int8", "int4")


def make_row(layer: LayerTable, first_page: int, length: int, tail_pages: int = 1, seed: int = 0) -> RowTable:
    """A row with entries that suit its layer; the last ``tail_pages`` of a quantised one are of full precision."""
    generator = random.Random(seed)
    page_count = -(-length // 64) - first_page
    entries = b""
    for index in range(page_count):
        kind = int(layer.kv_dtype in QUANTISED and index < page_count - tail_pages)
        dtype = layer.dtype if layer.kv_dtype in QUANTISED and not kind else layer.kv_dtype
        blocks = page_bytes(layer.num_kv_heads, layer.head_dim_k, layer.head_dim_v, dtype) // 4096
        offset = 4096 * generator.randrange(256, 2**50)
        entries += struct.pack("<QIHBB", offset, generator.getrandbits(32), blocks, kind, 0)
    return RowTable(first_page, length, entries)


def make_layer(number: int, lengths: list[int], begin: int = 0, seed: int = 0, **geometry: object) -> LayerTable:
    geometry = {"num_kv_heads": 2, "head_dim_k": 64, "head_dim_v": 64, "kv_dtype": "bfloat16", **geometry}
    layer = LayerTable(number, **geometry, dtype="bfloat16", begin=begin, rows=())
    rows = (make_row(layer, begin // 64, length, seed=seed * 1000 + row) for row, length in enumerate(lengths))
    return replace(layer, rows=tuple(rows))


def make_sequence(name: str, *layers: LayerTable, token_ids: tuple | None = None, metadata: dict | None = None):
    ids = None if token_ids is None else tuple(array("i", row) for row in token_ids)
    return Sequence(name, metadata or {}, layers, ids, created_s=100.0, committed_s=101.5)


@pytest.fixture(scope="module")
def make_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Makes a store's directory, and says where its catalogue goes: in memory, where there is a tmpfs.

    A commit syncs five times, and these tests make thousands: on a disk that others use, that is minutes.
    """
    base = tempfile.mkdtemp(dir="/dev/shm") if os.path.isdir("/dev/shm") else str(tmp_path_factory.mktemp("stores"))
    yield lambda: StoreDirectory.create(tempfile.mkdtemp(dir=base)).catalogue_path
    shutil.rmtree(base)


@pytest.fixture
def path(make_path: Callable[[], str]) -> str:
    return make_path()


@contextlib.contextmanager
def other_process(code: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """A process that runs ``code`` with torch_csd.catalogue, but not torch, and has printed its first line."""
    prelude = """
        import os, sys, time, types
        package = types.ModuleType("torch_csd")
        package.__path__ = [sys.argv[1]]
        sys.modules["torch_csd"] = package
        from torch_csd.catalogue import *
        from torch_csd.errors import *
    """
    package = str(Path(catalogue.__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code), package, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.first_line = process.stdout.readline().strip()
        assert process.first_line, "the process ended before it printed a line"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "x" * 200, "…", "a b", " ", "a.b", "...", "-rf", "日本", "'; DROP TABLE", "\U0001f600"]
)
def test_a_name_is_any_text_that_is_safe_to_show(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name, problem",
    [
        (7, "is not text"),
        (None, "is not text"),
        (b"a", "is not text"),
        ("", "is empty"),
        ("x" * 201, "has 201 characters"),
        ("a/b", "holds '/'"),
        ("a\0", r"holds '\\x00'"),
        ("a\nb", r"holds '\\n'"),
        ("\x7f", r"holds '\\x7f'"),
        ("\x85", r"holds '\\x85'"),
        ("\ud800", r"holds '\\ud800'"),
        (".", "means a directory"),
        ("..", "means a directory"),
    ],
)
def test_other_names_are_refused_and_the_rule_is_told(name, problem):
    with pytest.raises(ValueError, match=rf"1 to 200 characters without '/'.*{problem}"):
        check_name(name)


# ---- the directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_directory_and_files_are_the_users_alone_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        directory = StoreDirectory.create(tmp_path)
        directory.lock_writer()
        directory.lock_reader()
        with Catalogue.create(directory.catalogue_path, STORE_ID) as written, written._transaction(write=True):
            written._connection.execute("UPDATE store SET store_id = x'00'")  # so that there is a journal
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(directory.path)}
    finally:
        os.umask(before)
        directory.unlock()
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
    names = ["catalogue.sqlite", "catalogue.sqlite-journal", "lock", "readers"]
    assert modes == dict.fromkeys(names, 0o600)


def test_a_directory_is_made_once_and_found_again(tmp_path):
    assert StoreDirectory.find(tmp_path) is None
    assert StoreDirectory.find(tmp_path / "missing") is None
    made = StoreDirectory.create(tmp_path)
    assert made.path == str(tmp_path / "torch_csd-durable")
    assert made.pages_path == str(tmp_path / "torch_csd-durable" / "pages.csd")
    assert StoreDirectory.create(tmp_path).path == StoreDirectory.find(str(tmp_path)).path == made.path
    assert os.listdir(made.path) == []


def make_link(path: Path) -> None:
    target = path.with_name("target")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


@pytest.mark.parametrize("method", [StoreDirectory.create, StoreDirectory.find])
@pytest.mark.parametrize(
    "make, problem",
    [
        (make_link, "must be a directory, is a symbolic link"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "must be a directory, is a symbolic link"),
        (lambda path: path.touch(0o600), "must be a directory, is a regular file"),
        (lambda path: os.mkfifo(path, 0o600), "must be a directory, is a FIFO"),
        (lambda path: (path.mkdir(), path.chmod(0o750)), r"open to other users \(mode 750\); chmod 700"),
        (lambda path: (path.mkdir(), path.chmod(0o701)), r"open to other users \(mode 701\); chmod 700"),
    ],
)
def test_what_is_not_a_directory_of_this_user_alone_is_refused(tmp_path, method, make, problem):
    make(tmp_path / DIRECTORY_NAME)
    with pytest.raises(StoreError, match=problem):
        method(tmp_path)


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    StoreDirectory.create(tmp_path)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    for method in (StoreDirectory.create, StoreDirectory.find):
        with pytest.raises(StoreError, match=f"belongs to user {user}, this process to user {user + 1}"):
            method(tmp_path)


def test_a_parent_that_is_missing_or_a_file_is_named(tmp_path):
    with pytest.raises(StoreError, match="missing: no such directory; create it or name another"):
        StoreDirectory.create(tmp_path / "missing")
    (tmp_path / "file").touch()
    for method in (StoreDirectory.create, StoreDirectory.find):
        with pytest.raises(StoreError, match="file/torch_csd-durable: .*Not a directory"):
            method(tmp_path / "file")


# ---- locks ---------------------------------------------------------------------------------------------------------

HOLD = """
    directory = StoreDirectory.find(sys.argv[2])
    getattr(directory, sys.argv[3])()
    print("held", flush=True)
    sys.stdin.readline()
    directory.unlock()
    print("let go", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    directory = StoreDirectory.create(tmp_path)
    with other_process(HOLD, tmp_path, "lock_writer") as process:
        with pytest.raises(StoreBusyError, match=rf"process {process.pid} \(.*python.*\) writes to this store; end it"):
            directory.lock_writer()
        assert Path(directory.path, "lock").read_text().strip() == str(process.pid)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "let go\n"
        directory.lock_writer()
        directory.lock_writer()  # idempotent
        assert Path(directory.path, "lock").read_text().strip() == str(os.getpid())
    directory.unlock()
    directory.unlock()


def test_a_second_store_of_one_process_is_told_so(tmp_path):
    directory = StoreDirectory.create(tmp_path)
    directory.lock_writer()
    other = StoreDirectory.find(tmp_path)
    with pytest.raises(StoreBusyError, match=rf"this process \({os.getpid()}\) writes to this store already"):
        other.lock_writer()
    del directory  # forgotten, not unlocked
    other.lock_writer()
    other.unlock()


@pytest.mark.parametrize("text", [b"", b"nonsense\n", b"4194999\n", b"\xff" * 100])
def test_a_lock_whose_text_says_nothing_of_use_is_a_lock_nonetheless(tmp_path, text):
    directory, other = StoreDirectory.create(tmp_path), StoreDirectory.create(tmp_path)
    directory.lock_writer()
    Path(directory.path, "lock").write_bytes(text)
    with pytest.raises(StoreBusyError, match="another process|of another container or machine"):
        other.lock_writer()
    directory.unlock()


def test_readers_do_not_hinder_the_writer_nor_each_other_and_are_seen(tmp_path):
    directory = StoreDirectory.create(tmp_path)
    assert not directory.has_readers()
    with other_process(HOLD, tmp_path, "lock_reader") as process, other_process(HOLD, tmp_path, "lock_reader"):
        directory.lock_writer()
        assert directory.has_readers()
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "let go\n"
        assert directory.has_readers()  # the other one
    assert not directory.has_readers()
    directory.lock_reader()
    assert StoreDirectory.find(tmp_path).has_readers()
    directory.unlock()
    assert not directory.has_readers()


def test_a_reader_waits_while_a_writer_looks_for_readers_but_not_for_ever(tmp_path, monkeypatch):
    directory = StoreDirectory.create(tmp_path)
    looking = catalogue._open_lock(os.path.join(directory.path, "readers"))
    assert catalogue._try_lock(looking, catalogue.fcntl.LOCK_EX, "")
    monkeypatch.setattr(catalogue, "BUSY_TIMEOUT_S", 0.02)
    with pytest.raises(StoreBusyError, match="readers: locked for 0.02 s"):
        directory.lock_reader()
    monkeypatch.setattr(catalogue, "BUSY_TIMEOUT_S", 10.0)
    threading.Timer(0.05, os.close, [looking]).start()
    directory.lock_reader()
    directory.unlock()


@pytest.mark.parametrize("lock", ["lock_writer", "lock_reader"])
def test_the_lock_of_a_killed_process_is_gone(tmp_path, lock):
    directory = StoreDirectory.create(tmp_path)
    with other_process(HOLD, tmp_path, lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        directory.lock_writer()
        assert not directory.has_readers()
    directory.unlock()


def test_a_forked_child_neither_keeps_its_parents_locks_nor_ends_them(tmp_path):
    code = """
        directory = StoreDirectory.find(sys.argv[2])
        directory.lock_writer()
        directory.lock_reader()
        ready, done = os.pipe()
        child = os.fork()
        if child == 0:
            directory.unlock()
            try:
                directory.lock_writer()
                os.write(done, b"locked twice")
            except StoreBusyError:
                os.write(done, b"busy")
            time.sleep(60)
        print(child, os.read(ready, 100).decode(), flush=True)
        sys.stdin.readline()
    """
    directory = StoreDirectory.create(tmp_path)
    with other_process(code, tmp_path) as process:
        child, verdict = process.first_line.split(maxsplit=1)
        try:
            assert verdict == "busy"
            assert directory.has_readers()
            with pytest.raises(StoreBusyError, match=f"process {process.pid} "):
                directory.lock_writer()
            process.kill()
            process.wait()
            os.kill(int(child), 0)  # it lives
            directory.lock_writer()
            assert not directory.has_readers()
        finally:
            os.kill(int(child), signal.SIGKILL)
    directory.unlock()


def test_unlocking_does_not_wait_for_children_that_have_yet_to_exec(tmp_path):
    directory = StoreDirectory.create(tmp_path)
    directory.lock_writer()
    directory.lock_reader()
    copies = [os.dup(descriptor) for descriptor in directory._descriptors.values()]  # as between fork and exec
    with other_process("print('started', flush=True); sys.stdin.readline()"):
        directory.unlock()
        assert not directory.has_readers()
        StoreDirectory.find(tmp_path).lock_writer()
    for descriptor in copies:
        os.close(descriptor)


@pytest.mark.parametrize(
    "name, lock", [("lock", "lock_writer"), ("readers", "lock_reader"), ("readers", "has_readers")]
)
@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda path: path.symlink_to(path.with_name("nowhere")), "must be a regular file, is a symbolic link"),
        (lambda path: os.mkfifo(path, 0o600), "must be a regular file, is a FIFO"),
        (lambda path: path.mkdir(0o700), "must be a regular file, is a directory"),
        (lambda path: (path.touch(), path.chmod(0o644)), r"open to other users \(mode 644\); chmod 600"),
        (lambda path: (path.touch(0o600), os.link(path, f"{path}2")), r"has 2 names \(hard links\)"),
    ],
)
def test_a_lock_that_is_not_a_file_of_this_user_alone_is_refused(tmp_path, name, lock, make, problem):
    directory = StoreDirectory.create(tmp_path)
    make(Path(directory.path, name))
    with pytest.raises(StoreError, match=f"/{name}: {problem}"):
        getattr(directory, lock)()


# ---- what is committed is found again ------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


@st.composite
def layers(draw: st.DrawFn, number: int, row_count: int) -> LayerTable:
    begin = draw(st.sampled_from([0, 0, 5, 64, 130, 64 * 256, 64 * 300 + 63]))
    lengths = [begin + draw(st.sampled_from([0, 1, 63, 64, 65, 1000, 64 * 256, 64 * 300])) for _ in range(row_count)]
    return make_layer(
        number,
        lengths,
        begin,
        seed=draw(st.integers(0, 99)),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim_k=draw(st.sampled_from([8, 64, 576])),
        head_dim_v=draw(st.sampled_from([8, 72])),
        kv_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "int8", "int4"])),
    )


@st.composite
def sequences(draw: st.DrawFn, name: st.SearchStrategy[str] = names) -> Sequence:
    row_counts = draw(st.lists(st.integers(1, 3), max_size=3))
    numbers = draw(st.lists(st.integers(-5, 2**40), min_size=len(row_counts), max_size=len(row_counts), unique=True))
    made = tuple(draw(layers(number, rows)) for number, rows in zip(sorted(numbers), row_counts, strict=True))
    token_ids = None
    if made and draw(st.booleans()):
        lengths = [
            max(layer.rows[row].length for layer in made if row < len(layer.rows)) for row in range(max(row_counts))
        ]
        counts = [min(length, draw(st.sampled_from([0, 1, 100, 2**20]))) for length in lengths]
        token_ids = tuple(array("i", [index % 99 - 7 for index in range(count)]) for count in counts)
    metadata = draw(st.dictionaries(st.text(), json_values, max_size=3))
    return Sequence(draw(name), metadata, made, token_ids, draw(st.floats(0, 2**40)), draw(st.floats(0, 2**40)))


@given(st.lists(sequences(), max_size=4, unique_by=lambda sequence: sequence.name))
def test_what_was_committed_is_loaded_bit_for_bit(make_path, stored):
    path = make_path()
    with Catalogue.create(path, STORE_ID) as written:
        for sequence in stored:
            written.commit(sequence)
    with Catalogue.open(path, read_only=True) as found:
        assert found.store_id == STORE_ID
        in_order = sorted(stored, key=lambda sequence: sequence.name.encode())  # SQLite's order
        assert found.names() == [sequence.name for sequence in in_order]
        assert found.load_all(token_ids=True) == in_order
        assert found.load_all() == [replace(sequence, token_ids=None) for sequence in in_order]
        assert [found.load(sequence.name) for sequence in stored] == stored
        for info, sequence in zip(found.infos(), in_order, strict=True):
            assert (info.metadata, info.created_s, info.committed_s) == (
                sequence.metadata,
                sequence.created_s,
                sequence.committed_s,
            )
            assert info.rows == max((len(layer.rows) for layer in sequence.layers), default=0)
            assert info.tokens == max((row.length for layer in sequence.layers for row in layer.rows), default=0)
            assert info.layers == len(sequence.layers)
            assert info.has_token_ids == (sequence.token_ids is not None)
            entries = b"".join(row.entries for layer in sequence.layers for row in layer.rows)
            assert info.stored_bytes == sum(4096 * entry[2] for entry in struct.iter_unpack("<QIHBB", entries))


@settings(max_examples=25)
@given(st.lists(st.tuples(sequences(st.sampled_from(["a", "b"])), st.booleans()), max_size=6))
def test_a_commit_replaces_all_that_had_the_name(make_path, commits):
    path = make_path()
    written = Catalogue.create(path, STORE_ID)
    expected = {}
    for sequence, reopen in commits:
        written.commit(sequence)
        if sequence.name in expected:
            sequence = replace(sequence, created_s=expected[sequence.name].created_s)
        expected[sequence.name] = sequence
        if reopen:
            written.close()
            written = Catalogue.open(path)
        assert written.load(sequence.name) == sequence
    assert written.load_all(token_ids=True) == [expected[name] for name in sorted(expected)]
    for name in sorted(expected):
        written.remove(name)
    counts = [written._connection.execute(f"SELECT count(*) FROM {table}").fetchone() for table in catalogue._COLUMNS]
    assert counts == [(1,), (0,), (0,), (0,), (0,), (0,)]
    written.close()


@pytest.mark.parametrize("reopen", [False, True])
def test_a_commit_writes_only_the_chunks_that_changed(path, reopen):
    def sequence(length: int) -> Sequence:
        made = tuple(make_layer(number, [length], kv_dtype="int4") for number in range(4))
        # Only the last page's image moves when a row grows; make_row draws entries in order, so the others agree.
        return make_sequence("long", *made, token_ids=(range(length),))

    def changes(next_one: Sequence) -> int:
        before = written._connection.total_changes
        written.commit(next_one)
        return written._connection.total_changes - before

    written = Catalogue.create(path, STORE_ID)
    length = 64 * 256 * 10 + 64 * 7
    assert changes(sequence(length)) == 1 + 4 * (1 + 1 + 11) + 1
    if reopen:
        written.close()
        written = Catalogue.open(path)
    assert changes(sequence(length)) == 1  # committed_s
    assert changes(sequence(length + 64)) == 1 + 4 * (1 + 1) + 1  # a page table, a chunk; the token ids
    trimmed = [
        replace(layer, begin=6400, rows=(replace(row, first_page=100, entries=row.entries[100 * 16 :]),))
        for layer in sequence(length + 64).layers
        for row in layer.rows
    ]
    assert changes(replace(sequence(length + 64), layers=tuple(trimmed))) == 1 + 4 * (1 + 1 + 1)  # the first chunk
    assert written.load("long").layers == tuple(trimmed)
    written.close()


def test_a_commit_does_not_rely_on_what_another_program_has_changed(path):
    sequence = make_sequence("a", make_layer(0, [1000]))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(sequence)
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE page_chunk SET entries = zeroblob(256)")
            other.commit()
        with pytest.raises(StoreCorruptError, match="page 0: file_offset 0"):
            written.load("a")
        written.commit(sequence)
        assert written.load("a") == sequence


def test_pages_that_rows_share_count_once(path):
    layer = make_layer(0, [1000, 1000])
    shared = replace(layer, rows=(layer.rows[0], layer.rows[0]))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(make_sequence("apart", layer))
        written.commit(make_sequence("shared", shared))
        apart, once = written.infos()
    assert apart.stored_bytes == 2 * once.stored_bytes == 2 * 16 * page_bytes(2, 64, 64, "bfloat16")


def test_page_sizes_are_those_of_the_format():
    assert page_bytes(8, 128, 128, "bfloat16") == 8 * 64 * 256 * 2
    assert page_bytes(8, 128, 128, "float32") == 8 * 64 * 256 * 4
    assert page_bytes(8, 128, 128, "int4") == 72 * 1024
    assert page_bytes(8, 128, 128, "int8") == 139264  # 8 tiles of 16384 + 512 + 256 bytes, to a whole block
    assert page_bytes(1, 8, 8, "float16") == 4096


def test_a_missing_sequence_is_an_error_that_names_those_there_are(path):
    with Catalogue.create(path, STORE_ID) as written:
        for method in (written.load, written.remove):
            with pytest.raises(StoreError, match="no sequence 'x'; there are none"):
                method("x")
        for number in range(12):
            written.commit(make_sequence(f"s{number:02}"))
        for method in (written.load, written.remove):
            with pytest.raises(StoreError, match="no sequence 'x'; there are 's00', .*'s09' and 2 more"):
                method("x")
            with pytest.raises(ValueError, match="a name must be"):
                method("a/b")


@pytest.mark.parametrize("name", ["a b", "a?mode=memory", "a#b", "a%41", "ä☃", "a&b=c", "a;b", "a'b", b"\xff\xfe"])
def test_any_directory_name_will_do(tmp_path, name):
    parent = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    os.mkdir(parent)
    path = StoreDirectory.create(os.fsdecode(parent)).catalogue_path
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(make_sequence("a"))
    assert os.listdir(os.path.dirname(path)) == [CATALOGUE_NAME]
    assert Catalogue.open(path).names() == ["a"]
    assert Catalogue.open("/" + path, read_only=True).names() == ["a"]  # "//..." is a path too


# ---- prefixes ------------------------------------------------------------------------------------------------------


@given(st.data())
def test_prefixes_are_found_as_a_plain_loop_finds_them(make_path, data):
    def prefix(a: list[int], b: array) -> int:
        return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    base = [random.Random(0).randrange(-(2**31), 2**31) for _ in range(3000)]
    ids = st.builds(
        lambda length, changed: [~token if index in changed else token for index, token in enumerate(base[:length])],
        st.sampled_from([0, 1, 2, 1000, 1023, 1024, 1025, 3000]),
        st.sets(st.sampled_from([0, 1, 1023, 1024, 2998, 2999]), max_size=2),
    )
    stored = [
        make_sequence(f"s{index}", make_layer(0, [3000]), token_ids=(row,), metadata={"even": index % 2 == 0})
        for index, row in enumerate(data.draw(st.lists(ids, max_size=4)))
    ]
    wanted = data.draw(ids)
    with Catalogue.create(make_path(), STORE_ID) as written:
        for sequence in stored:
            written.commit(sequence)
        written.commit(make_sequence("two rows", make_layer(0, [3000, 3000]), token_ids=(base, base)))
        written.commit(make_sequence("no ids", make_layer(0, [3000])))
        matches = written.match_prefix(wanted)
        even = written.match_prefix(array("i", wanted), lambda metadata: metadata.get("even", False))
    expected = {s.name: prefix(wanted, s.token_ids[0]) for s in stored if prefix(wanted, s.token_ids[0])}
    assert dict(matches) == expected and len(matches) == len(expected)
    assert [count for _, count in matches] == sorted(expected.values(), reverse=True)
    assert dict(even) == {name: count for name, count in expected.items() if int(name[1:]) % 2 == 0}


@pytest.mark.parametrize("ids", [[2**31], [1.5], ["a"]])
def test_token_ids_of_more_than_32_bits_are_refused(path, ids):
    with (
        Catalogue.create(path, STORE_ID) as written,
        pytest.raises(ValueError, match="token ids must be integers of 32"),
    ):
        written.match_prefix(ids)


# ---- all or nothing ------------------------------------------------------------------------------------------------


def changed(layer: LayerTable, **row: object) -> LayerTable:
    return replace(layer, rows=(replace(layer.rows[0], **row),))


GOOD = make_layer(0, [200])


@pytest.mark.parametrize(
    "sequence, problem",
    [
        (make_sequence("a/b"), "a name must be"),
        (replace(make_sequence("a"), metadata=[]), "metadata must be a dict"),
        (make_sequence("a", metadata={"x": float("nan")}), "metadata must be a dict .*not JSON compliant"),
        (make_sequence("a", metadata={"x": {1}}), "metadata must be a dict .*not JSON serializable"),
        (make_sequence("a", metadata={1: 2}), "metadata must be a dict .*comes back as"),
        (make_sequence("a", metadata={"x": (1, 2)}), "metadata must be a dict .*comes back as"),
        (replace(make_sequence("a"), committed_s=float("inf")), "committed_s is inf"),
        (make_sequence("a", GOOD, GOOD), "a number comes twice"),
        (make_sequence("a", replace(GOOD, rows=())), "has no rows"),
        (make_sequence("a", replace(GOOD, head_dim_k=12)), "head_dim_k is 12, wanted a multiple of 8"),
        (make_sequence("a", replace(GOOD, dtype="int8")), "dtype is 'int8', wanted one of float32, bfloat16, float16"),
        (make_sequence("a", changed(GOOD, length=2**48)), "length is 281474976710656"),
        (make_sequence("a", changed(GOOD, entries=GOOD.rows[0].entries[16:])), "entries are 48 bytes, wanted 64"),
        (make_sequence("a", changed(GOOD, entries=bytes(64))), "page 0: file_offset 0"),
        (make_sequence("a", GOOD, token_ids=(range(201),)), "row 0 has 201 token ids, but 200 tokens"),
        (make_sequence("a", GOOD, token_ids=([1], [2])), "token ids of 2 rows, wanted them for all 1"),
        (replace(make_sequence("a", GOOD), token_ids=([1],)), r'are a list, wanted array\("i"\)'),
    ],
)
def test_what_the_format_does_not_allow_is_not_committed(path, sequence, problem):
    before = make_sequence("a", GOOD, token_ids=(range(200),))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(before)
        with pytest.raises(ValueError, match=problem):
            written.commit(sequence)
        assert written.load_all(token_ids=True) == [before]


def test_a_commit_that_finds_the_drive_full_changes_nothing(path):
    small = make_sequence("a", make_layer(0, [1000]), token_ids=(range(1000),))
    large = make_sequence("a", make_layer(0, [64 * 256 * 20], seed=1), token_ids=(range(64 * 256 * 20),))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(small)
        (page_count,) = written._connection.execute("PRAGMA page_count").fetchone()
        written._connection.execute(f"PRAGMA max_page_count = {page_count + 20}").fetchone()
        for _ in range(2):
            with pytest.raises(StoreFullError, match="catalogue.sqlite: database or disk is full; nothing was changed"):
                written.commit(large)
            assert written.load_all(token_ids=True) == [small]
        again = replace(small, committed_s=200.0)
        written.commit(again)
        assert written.load("a") == again
        written._connection.execute("PRAGMA max_page_count = 100000").fetchone()
        written.commit(large)
        assert written.load("a") == large


def test_a_commit_that_cannot_write_its_journal_changes_nothing(path):
    before = make_sequence("a", GOOD)
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(before)
        os.mkdir(f"{path}-journal")
        with pytest.raises(StoreError, match="catalogue.sqlite: (unable to open database file|disk I/O error)"):
            written.commit(make_sequence("a", make_layer(0, [1000])))
        os.rmdir(f"{path}-journal")
        assert written.load_all() == [before]
        written.commit(make_sequence("b", GOOD))


def test_a_commit_waits_for_readers_of_the_file_and_then_gives_up(path, monkeypatch):
    monkeypatch.setattr(catalogue, "BUSY_TIMEOUT_S", 0.05)
    before = make_sequence("a", GOOD)
    with Catalogue.create(path, STORE_ID) as written, Catalogue.open(path, read_only=True) as reader:
        written.commit(before)
        with reader._transaction():
            assert reader._names_unchecked() == ["a"]
            with pytest.raises(StoreBusyError, match="kept locked for 0.05 s by another process"):
                written.commit(make_sequence("b", GOOD))
            with pytest.raises(StoreBusyError, match="kept locked"):
                written.remove("a")
        assert reader.load_all() == written.load_all() == [before]
        written.remove("a")
        assert reader.names() == []


def test_a_catalogue_that_another_program_keeps_locked_is_busy(path, monkeypatch):
    monkeypatch.setattr(catalogue, "BUSY_TIMEOUT_S", 0.05)
    Catalogue.create(path, STORE_ID).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreBusyError, match="kept locked for 0.05 s"):
            Catalogue.open(path)


def test_an_interrupted_transaction_changes_nothing(path):
    def interrupt(metadata: dict) -> bool:
        raise KeyboardInterrupt

    before = make_sequence("a", GOOD, token_ids=(range(200),))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(before)
        with pytest.raises(KeyboardInterrupt):
            written.match_prefix([0], interrupt)
        with pytest.raises(ZeroDivisionError), written._transaction(write=True) as connection:
            connection.execute("DELETE FROM tokens")
            raise ZeroDivisionError
        assert written.load("a") == before


def test_a_commit_cut_short_by_kill_is_there_or_not(path):
    code = """
        from array import array
        import struct
        written = Catalogue.open(sys.argv[2])
        round = 0
        while True:
            entries = b"".join(struct.pack("<QIHBB", 2**20 + 4096 * i, round, 1, 0, 0) for i in range(1000))
            layer = LayerTable(0, 1, 8, 8, "bfloat16", "bfloat16", 0, (RowTable(0, 64000, entries),))
            ids = array("i", [round]) * 64000
            written.commit(Sequence("a", {"round": round}, (layer,), (ids,), 1.0, 2.0))
            if round == 2:
                print("running", flush=True)
            round += 1
    """
    Catalogue.create(path, STORE_ID).close()
    generator = random.Random(0)
    for _ in range(4):
        with other_process(code, path) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=generator.uniform(0.005, 0.08))
            process.kill()
            process.wait()
        with Catalogue.open(path, read_only=generator.random() < 0.5) as found:
            sequence = found.load("a")
        number = sequence.metadata["round"]
        assert number >= 2
        assert sequence.token_ids == (array("i", [number]) * 64000,)
        assert {entry[1] for entry in struct.iter_unpack("<QIHBB", sequence.layers[0].rows[0].entries)} == {number}


@pytest.mark.parametrize("read_only", [False, True])
def test_what_a_killed_writer_left_half_done_is_undone_by_whoever_comes_next(make_path, path, read_only):
    before = make_sequence("a", make_layer(0, [64 * 1000]))
    with Catalogue.create(path, STORE_ID) as written:
        written.commit(before)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA cache_size = 1")  # changed pages go to the file before the end of the transaction
        other.execute("BEGIN")
        other.execute("UPDATE page_chunk SET entries = zeroblob(length(entries))")
        copy = make_path()
        for suffix in ("", "-journal"):  # as a crash leaves them
            shutil.copy(path + suffix, copy + suffix)
            os.chmod(copy + suffix, 0o600)
        other.execute("ROLLBACK")
    assert Path(copy).read_bytes() != Path(path).read_bytes()
    with Catalogue.open(copy, read_only=read_only) as found:
        assert found.load_all() == [before]
    assert not os.path.exists(f"{copy}-journal")


def test_a_new_catalogue_appears_complete_or_not_at_all(path, monkeypatch):
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            Catalogue.create(path, STORE_ID)
    assert not os.path.exists(path)
    Path(f"{path}.new").write_bytes(b"half")
    Path(f"{path}.new-journal").write_bytes(b"half")
    Catalogue.create(path, STORE_ID).close()
    assert os.listdir(os.path.dirname(path)) == [CATALOGUE_NAME]
    with pytest.raises(StoreError, match="there is a catalogue already"):
        Catalogue.create(path, STORE_ID)
    with pytest.raises(ValueError, match="store_id must be 16 bytes"):
        Catalogue.create(f"{path}2", b"short")


# ---- who may use it ------------------------------------------------------------------------------------------------


def test_a_reader_cannot_write_and_sees_what_is_committed_later(path):
    with Catalogue.create(path, STORE_ID) as written, Catalogue.open(path, read_only=True) as reader:
        assert reader.names() == []
        written.commit(make_sequence("a", GOOD))
        assert reader.names() == ["a"]
        for change in (lambda: reader.commit(make_sequence("b")), lambda: reader.remove("a")):
            with pytest.raises(StoreError, match="opened for reading only"):
                change()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._connection.execute("DELETE FROM sequence")


def test_a_closed_catalogue_says_so(path):
    closed = Catalogue.create(path, STORE_ID)
    closed.close()
    closed.close()
    for method in (closed.names, closed.infos, closed.load_all, lambda: closed.commit(make_sequence("a"))):
        with pytest.raises(StoreClosedError, match="this catalogue is closed"):
            method()


def test_a_forked_child_cannot_use_its_parents_catalogue_nor_harm_it(path):
    code = """
        written = Catalogue.open(sys.argv[2])
        written.commit(Sequence("a", {}, (), None, 1.0, 2.0))
        ready, done = os.pipe()
        if os.fork() == 0:
            try:
                written.names()
            except StoreClosedError as error:
                os.write(done, str(error).encode())
            written.close()
            del written
            sys.exit()
        os.wait()
        written.commit(Sequence("b", {}, (), None, 1.0, 2.0))
        print(os.read(ready, 1000).decode(), written.names(), flush=True)
        sys.stdin.readline()
    """
    Catalogue.create(path, STORE_ID).close()
    with other_process(code, path) as process:
        assert f"opened by process {process.pid}; open it anew after a fork ['a', 'b']" in process.first_line


def test_a_fork_in_the_middle_of_another_threads_transaction_harms_nothing(path):
    # A child that dropped such a connection would roll it back, in the parent's file.
    code = """
        import threading
        written = Catalogue.open(sys.argv[2])
        inside = threading.Event()
        def commit():
            with written._transaction(write=True) as connection:
                connection.execute("PRAGMA cache_size = 0")
                insert = "INSERT INTO sequence VALUES (NULL, ?, '{}', 1.0, 2.0)"
                for index in range(200):
                    connection.execute(insert, (f"{index:03}" + "x" * 150,))
                inside.set()
                time.sleep(0.1)
        thread = threading.Thread(target=commit)
        thread.start()
        inside.wait()
        if os.fork() == 0:
            del written, thread
            sys.exit()
        os.wait()
        thread.join()
        print(len(written.names()), flush=True)
        sys.stdin.readline()
    """
    Catalogue.create(path, STORE_ID).close()
    with other_process(code, path) as process:
        assert process.first_line == "200"
    with Catalogue.open(path) as found:
        assert len(found.names()) == 200


def test_threads_that_share_a_catalogue_do_not_see_each_others_transactions(path):
    inside = threading.Event()

    def fail_halfway() -> None:
        with contextlib.suppress(ZeroDivisionError), shared._transaction(write=True) as connection:
            connection.execute("DELETE FROM sequence")
            inside.set()
            time.sleep(0.05)
            raise ZeroDivisionError

    with Catalogue.create(path, STORE_ID) as shared:
        shared.commit(make_sequence("a"))
        thread = threading.Thread(target=fail_halfway)
        thread.start()
        inside.wait()
        assert shared.names() == ["a"]
        thread.join()


def test_the_module_needs_neither_torch_nor_the_native_part():
    code = 'print(sorted(name for name in ("torch", "numpy", "torch_csd._C") if name in sys.modules), flush=True)'
    with other_process(code) as process:
        assert process.first_line == "[]"


# ---- damage --------------------------------------------------------------------------------------------------------
#
# One good catalogue, one thing wrong with it at a time. Sequence 1 is "first": layer 0, int4, two rows of 200 and 130
# tokens with token ids; layer 1, float32, the same rows. Sequence 2 is "second": layer 5, bfloat16, one row of which
# pages 300 to 699 are kept, in chunks 1 and 2.


@pytest.fixture(scope="module")
def sound(make_path: Callable[[], str]) -> str:
    path = make_path()
    with Catalogue.create(path, STORE_ID) as written:
        quantised = make_layer(0, [200, 130], kv_dtype="int4")
        plain = make_layer(1, [200, 130], kv_dtype="float32")
        written.commit(make_sequence("first", quantised, plain, token_ids=(range(200), range(100)), metadata={"m": 1}))
        written.commit(make_sequence("second", make_layer(5, [64 * 700], 64 * 300 + 5)))
        assert len(written.load_all(token_ids=True)) == 2
    return path


@pytest.fixture
def damaged(sound: str, path: str) -> str:
    shutil.copy(sound, path)
    os.chmod(path, 0o600)
    return path


def assert_refused(path: str, error: type[Exception], message: str, read_only: bool = False) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        with Catalogue.open(path, read_only=read_only) as found:
            found.load_all(token_ids=True)
    assert caught.type is error
    assert path in str(caught.value)


def edit(path: str, change: str | Callable[[sqlite3.Connection], None]) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if callable(change):
            change(connection)
        else:
            connection.executescript(change)


def loosely(table: str, change: str) -> str:
    """``change`` after ``table`` was made anew without keys and constraints, as anybody's SQLite could."""
    return (
        f"CREATE TABLE loose AS SELECT * FROM {table}; DROP TABLE {table}; "
        f"ALTER TABLE loose RENAME TO {table}; {change}"
    )


def entry(offset: int = 2**20, block_count: int = 8, kind: int = 0, reserved: int = 0, where: str = "layer = 5") -> str:
    packed = struct.pack("<QIHBB", offset, 1, block_count, kind, reserved)
    return f"UPDATE page_chunk SET entries = CAST(x'{packed.hex()}' || substr(entries, 17) AS BLOB) WHERE {where}"


FILES = {
    "missing": (lambda path: path.unlink(), "there is no catalogue; nothing was committed"),
    "link": (lambda path: (path.rename(f"{path}2"), path.symlink_to(f"{path}2")), "is a symbolic link"),
    "fifo": (lambda path: (path.unlink(), os.mkfifo(path, 0o600)), "must be a regular file, is a FIFO"),
    "directory": (lambda path: (path.unlink(), path.mkdir(0o700)), "must be a regular file, is a directory"),
    "readable by others": (lambda path: path.chmod(0o640), r"open to other users \(mode 640\); chmod 600"),
    "hard link": (lambda path: os.link(path, f"{path}2"), r"has 2 names \(hard links\)"),
    "journal is a link": (
        lambda path: Path(f"{path}-journal").symlink_to(path),
        "journal: must be a regular file, is a sym",
    ),
    "journal is a fifo": (
        lambda path: os.mkfifo(f"{path}-journal", 0o600),
        "journal: must be a regular file, is a FIFO",
    ),
    "wal is open": (lambda path: (Path(f"{path}-wal").touch(), Path(f"{path}-wal").chmod(0o666)), "wal: open to other"),
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_the_wrong_kind_is_not_opened(damaged, kind, read_only):
    change, message = FILES[kind]
    change(Path(damaged))
    assert_refused(damaged, StoreError, message, read_only)


def test_a_socket_and_another_users_catalogue_are_not_opened(damaged, monkeypatch):
    user = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: user + 1)
        assert_refused(damaged, StoreError, f"belongs to user {user}")
    os.unlink(damaged)
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(os.path.dirname(damaged))  # the address of a socket is a short path
        made.bind(CATALOGUE_NAME)
        assert_refused(damaged, StoreError, "must be a regular file, is a socket")


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


BYTES = {
    "empty": (lambda path: os.truncate(path, 0), "not a torch_csd catalogue: application_id 0, wanted 1129530435"),
    "one byte": (lambda path: os.truncate(path, 1), "not a torch_csd catalogue: application_id 0"),
    "text": (lambda path: path.write_text("to be or not to be\n" * 1000), "file is not a database"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed|damaged"),
    "without its last page": (lambda path: os.truncate(path, path.stat().st_size - 4096), "malformed|damaged"),
    "schema overwritten": (overwrite(100, b"\xff" * 200), "malformed|damaged"),
    "schema that is not UTF-8": (
        lambda path: overwrite(path.read_bytes().index(b"tokens"), b"\xff")(path),
        "not UTF-8",
    ),
    "page of zeros": (overwrite(4096 * 4, bytes(4096)), "malformed|damaged"),
    "page of noise": (overwrite(4096 * 6, random.Random(0).randbytes(4096)), "malformed|damaged"),
    "future file format": (overwrite(18, b"\3\3"), "file is not a database|unsupported"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_file_that_sqlite_cannot_read_is_damaged(damaged, kind):
    change, message = BYTES[kind]
    change(Path(damaged))
    with pytest.raises(StoreCorruptError, match=f"{re.escape(damaged)}: .*({message})"):
        Catalogue.open(damaged)


STRUCTURE = {
    "another program's": ("PRAGMA application_id = 7", "not a torch_csd catalogue: application_id 7"),
    "write-ahead log": ("PRAGMA journal_mode = WAL", "its journal_mode is wal, wanted delete"),
    "no table": ("DROP TABLE tokens", "table tokens is missing"),
    "no column": ("ALTER TABLE sequence DROP COLUMN metadata", "table sequence has columns committed_s, created_s, id"),
    "another column": ("ALTER TABLE layer ADD COLUMN x", "table layer has columns .*, x, wanted sequence, number"),
    "generated column": (
        "CREATE TABLE loose (sequence, row, ids AS (x'00')); DROP TABLE tokens; ALTER TABLE loose RENAME TO tokens",
        "table tokens has columns ids, row, sequence",
    ),
    "another table": ("CREATE TABLE evil (x)", "unexpected table 'evil'"),
    "virtual table": (
        "PRAGMA writable_schema = ON; "
        "INSERT INTO sqlite_master VALUES ('table', 'evil', 'evil', 0, 'CREATE VIRTUAL TABLE evil USING fts5(x)')",
        "unexpected virtual table 'evil'",
    ),
    "view": ("CREATE VIEW evil AS SELECT 1", "unexpected view 'evil'"),
    "view as table": (
        "ALTER TABLE tokens RENAME TO loose; CREATE VIEW tokens AS SELECT * FROM loose",
        "unexpected (view 'tokens'|table 'loose')",
    ),
    "trigger": (
        "CREATE TRIGGER evil AFTER UPDATE ON sequence BEGIN DELETE FROM layer; END",
        "unexpected trigger 'evil'",
    ),
    "no store": ("DELETE FROM store", "table store holds no rows, wanted 1"),
    "two stores": ("INSERT INTO store SELECT * FROM store", "table store holds 2 rows, wanted 1"),
    "short store_id": ("UPDATE store SET store_id = x'00'", "store_id is b'.x00', wanted 16 bytes"),
    "store_id is text": ("UPDATE store SET store_id = '0123456789abcdef'", "store_id is '0123456789abcdef', wanted 16"),
    "orphan layer": (
        "UPDATE layer SET sequence = 9 WHERE sequence = 2",
        "table layer holds rows of sequence 9, which is",
    ),
    "orphan tokens": ("INSERT INTO tokens VALUES (9, 0, x'')", "table tokens holds rows of sequence 9"),
    "orphan page table": ("INSERT INTO page_table VALUES (9, 0, 0, 0, 0)", "table page_table holds rows of sequence 9"),
    "orphan chunk": ("INSERT INTO page_chunk VALUES (9, 0, 0, 0, x'')", "table page_chunk holds rows of sequence 9"),
    "orphan of nobody": (
        loosely("tokens", "UPDATE tokens SET sequence = NULL"),
        "table tokens holds rows of sequence None",
    ),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_a_catalogue_of_another_structure_is_not_opened(damaged, kind):
    change, message = STRUCTURE[kind]
    edit(damaged, change)
    with pytest.raises(StoreCorruptError, match=f"{re.escape(damaged)}: {message}.*run torch-csd verify"):
        Catalogue.open(damaged)


@pytest.mark.parametrize("version", [0, 2, -1])
def test_another_version_is_not_damage_but_told(damaged, version):
    edit(damaged, f"PRAGMA user_version = {version}")
    assert_refused(damaged, StoreError, f"a catalogue of version {version}, this torch_csd reads version 1; use the")


FIRST, SECOND = "sequence 'first': ", "sequence 'second': "
VALUES = {
    # sequence
    "name with a slash": ("UPDATE sequence SET name = 'a/b' WHERE id = 1", "sequence 'a/b': a name must be"),
    "name empty": ("UPDATE sequence SET name = '' WHERE id = 1", "which is empty"),
    "name with a line break": ("UPDATE sequence SET name = 'a' || char(10) WHERE id = 1", r"holds '\\n'"),
    "name is a blob": ("UPDATE sequence SET name = x'61' WHERE id = 1", "sequence 1 bytes: a name must be .*not text"),
    "name is not UTF-8": ("UPDATE sequence SET name = CAST(x'ff' AS TEXT) WHERE id = 1", r"holds '\\udcff'"),
    "name twice": (loosely("sequence", "UPDATE sequence SET name = 'first'"), "holds a name or an id twice"),
    "id twice": (loosely("sequence", "UPDATE sequence SET id = 2"), "holds a name or an id twice"),
    "id is text": (loosely("sequence", "UPDATE sequence SET id = 'x' WHERE id = 1"), FIRST + "id is 'x'"),
    "metadata is an array": (
        "UPDATE sequence SET metadata = '[]' WHERE id = 1",
        FIRST + "metadata is '..', wanted a JSON",
    ),
    "metadata is half": (
        "UPDATE sequence SET metadata = '{' WHERE id = 1",
        FIRST + "metadata is '{', wanted a JSON object",
    ),
    "metadata is a blob": (
        "UPDATE sequence SET metadata = x'7b7d' WHERE id = 1",
        FIRST + "metadata is 2 bytes, wanted",
    ),
    "metadata is not UTF-8": (
        """UPDATE sequence SET metadata = CAST(x'7b2261223a2022ff227d' AS TEXT) WHERE id = 1""",
        "wanted a JSON object",
    ),
    "metadata has NaN": ("""UPDATE sequence SET metadata = '{"a": NaN}' WHERE id = 1""", "wanted a JSON object"),
    "metadata is deep": (
        lambda connection: connection.execute("UPDATE sequence SET metadata = ?", ('{"a":' + "[" * 10**6,)),
        "wanted a JSON object",
    ),
    "metadata is missing": (
        loosely("sequence", "UPDATE sequence SET metadata = NULL"),
        "metadata is None, wanted text",
    ),
    "time is text": (
        "UPDATE sequence SET created_s = 'now' WHERE id = 1",
        FIRST + "created_s is 'now', wanted seconds",
    ),
    "time is infinite": ("UPDATE sequence SET committed_s = 9e999 WHERE id = 2", SECOND + "committed_s is inf, wanted"),
    # tokens
    "half a token": (
        "UPDATE tokens SET ids = x'010203' WHERE row = 1",
        FIRST + "token ids of row 1 are 3 bytes of blob",
    ),
    "token ids are text": (
        "UPDATE tokens SET ids = 'abcd' WHERE row = 0",
        FIRST + "token ids of row 0 are 4 bytes of text",
    ),
    "token ids are missing": (loosely("tokens", "UPDATE tokens SET ids = NULL"), "row 0 are None bytes of null"),
    "token ids of one row": ("DELETE FROM tokens WHERE row = 1", FIRST + "token ids of 1 rows, wanted them for all 2"),
    "token ids of the second row": ("DELETE FROM tokens WHERE row = 0", "token ids of row 1 follow those of row -1"),
    "token ids of row 7": (
        "UPDATE tokens SET row = 7 WHERE row = 1",
        FIRST + "token ids of row 7 follow those of row 0",
    ),
    "token ids of row x": ("UPDATE tokens SET row = 'x' WHERE row = 1", "number of a layer, row or chunk is 'x'"),
    "token ids twice": (loosely("tokens", "UPDATE tokens SET row = 0"), FIRST + "token ids of a row are there twice"),
    "too many tokens": ("UPDATE tokens SET ids = zeroblob(804)", FIRST + "row 0 has 201 token ids, but 200 tokens"),
    # layer
    "layer x": (
        "UPDATE layer SET number = 'x' WHERE number = 5",
        SECOND + "the number of a layer, row or chunk is 'x'",
    ),
    "layer twice": (loosely("layer", "UPDATE layer SET number = 1 WHERE number = 0"), "table layer holds 1 rows twice"),
    "no layer": ("DELETE FROM layer WHERE number = 5", SECOND + "page tables of layer 5, which is not there"),
    "no kv heads": (
        "UPDATE layer SET num_kv_heads = 0",
        "layer 0: num_kv_heads is 0, wanted an integer from 1 to 65536",
    ),
    "too many kv heads": ("UPDATE layer SET num_kv_heads = 65537 WHERE number = 5", "layer 5: num_kv_heads is 65537"),
    "kv heads are real": ("UPDATE layer SET num_kv_heads = 1.5 WHERE number = 5", "layer 5: num_kv_heads is 1.5"),
    "head_dim of 12": ("UPDATE layer SET head_dim_k = 12", "layer 0: head_dim_k is 12, wanted a multiple of 8"),
    "head_dim of 0": ("UPDATE layer SET head_dim_v = 0", "layer 0: head_dim_v is 0, wanted an integer from 8 to 576"),
    "head_dim of 584": (
        "UPDATE layer SET head_dim_v = 584",
        "layer 0: head_dim_v is 584, wanted an integer from 8 to 576",
    ),
    "unknown kv_dtype": ("UPDATE layer SET kv_dtype = 'int2'", "layer 0: kv_dtype is 'int2', wanted one of float32"),
    "kv_dtype is a blob": ("UPDATE layer SET kv_dtype = x'00'", "layer 0: kv_dtype is 1 bytes, wanted one of"),
    "dtype of codes": (
        "UPDATE layer SET dtype = 'int8'",
        "layer 0: dtype is 'int8', wanted one of float32, bfloat16, ",
    ),
    "pages too large": (
        "UPDATE layer SET num_kv_heads = 65536, head_dim_k = 576 WHERE number = 1",
        "layer 1: pages of 2621440 blocks",
    ),
    "begin is negative": ("UPDATE layer SET begin = -1 WHERE number = 0", FIRST + "layer 0: begin is -1"),
    "begin behind the end": (
        "UPDATE layer SET begin = 131 WHERE number = 0",
        "layer 0: row 0: begin is 131, wanted 0 to 63",
    ),
    "begin before the first page": ("UPDATE layer SET begin = 0 WHERE number = 5", "begin is 0, wanted 19200 to 19263"),
    "begin behind the first page": (
        "UPDATE layer SET begin = 19264 WHERE number = 5",
        "begin is 19264, wanted 19200 to",
    ),
    "begin is text": (
        "UPDATE layer SET begin = 'x' WHERE number = 5",
        "layer 5: begin is 'x', wanted an integer from 0",
    ),
    # page_table
    "no page table": (
        "DELETE FROM page_table WHERE layer = 5",
        SECOND + "page chunks of row 0 of layer 5, which is not",
    ),
    "no row": (
        "DELETE FROM page_table WHERE layer = 5; DELETE FROM page_chunk WHERE layer = 5",
        "layer 5: has no rows",
    ),
    "page table of layer 8": (
        "INSERT INTO page_table VALUES (2, 8, 0, 0, 0)",
        "page tables of layer 8, which is not there",
    ),
    "row 0 is missing": ("UPDATE page_table SET row = 3 WHERE layer = 5", "layer 5: row 3 is the first, wanted row 0"),
    "row 1 is missing": ("UPDATE page_table SET row = 3 WHERE layer = 0 AND row = 1", "layer 0: row 3 follows row 0"),
    "row is text": ("UPDATE page_table SET row = 'x' WHERE layer = 5", "the number of a layer, row or chunk is 'x'"),
    "row twice": (loosely("page_table", "UPDATE page_table SET row = 0"), "table page_table holds 2 rows twice"),
    "length is negative": ("UPDATE page_table SET length = -1 WHERE layer = 5", "layer 5: row 0: length is -1"),
    "length is huge": ("UPDATE page_table SET length = 1 << 48 WHERE layer = 5", "length is 281474976710656, wanted"),
    "length without chunks": (
        "UPDATE page_table SET length = (1 << 48) - 1 WHERE layer = 5",
        r"page chunks \[1, 2\], wanted 1 to 17179869183",
    ),
    "length is text": ("UPDATE page_table SET length = 'x' WHERE layer = 5", "layer 5: row 0: length is 'x'"),
    "length of a page more": (
        "UPDATE page_table SET length = 200 WHERE layer = 0 AND row = 1",
        "page chunk 0 is 48 bytes",
    ),
    "first page behind the end": (
        "UPDATE page_table SET first_page = 701 WHERE layer = 5",
        "first_page is 701, wanted an",
    ),
    "first page is negative": ("UPDATE page_table SET first_page = -1 WHERE layer = 5", "first_page is -1, wanted an"),
    "first page moved": (
        "UPDATE page_table SET first_page = 299 WHERE layer = 5",
        "page chunk 1 is 3392 bytes, wanted 3408",
    ),
    # page_chunk
    "chunk missing": ("DELETE FROM page_chunk WHERE layer = 5 AND chunk = 2", r"page chunks \[1\], wanted 1 to 2"),
    "chunk too many": ("INSERT INTO page_chunk VALUES (2, 5, 0, 3, x'')", r"page chunks \[1, 2, 3\], wanted 1 to 2"),
    "chunk elsewhere": (
        "UPDATE page_chunk SET chunk = 0 WHERE layer = 5 AND chunk = 1",
        r"page chunks \[0, 2\], wanted",
    ),
    "chunk x": ("UPDATE page_chunk SET chunk = 'x' WHERE layer = 5 AND chunk = 1", "a layer, row or chunk is 'x'"),
    "chunk of no row": (
        "INSERT INTO page_chunk VALUES (2, 5, 1, 0, x'')",
        "page chunks of row 1 of layer 5, which is not",
    ),
    "chunk twice": (
        loosely("page_chunk", "UPDATE page_chunk SET chunk = 1 WHERE layer = 5"),
        "page_chunk holds 1 rows twice",
    ),
    "chunk short": (
        "UPDATE page_chunk SET entries = x'00' WHERE layer = 5 AND chunk = 1",
        "page chunk 1 is 1 bytes, wanted",
    ),
    "chunk is text": (
        "UPDATE page_chunk SET entries = 'abc' WHERE layer = 5 AND chunk = 1",
        "page chunk 1 is 'abc', wanted",
    ),
    "chunk is missing": (
        loosely("page_chunk", "UPDATE page_chunk SET entries = NULL"),
        "page chunk 0 is None, wanted 64",
    ),
    # entries
    "page in the header": (
        entry(offset=0),
        SECOND + "layer 5: row 0: page 300: file_offset 0, wanted a multiple of 4096",
    ),
    "page before the data": (entry(offset=2**20 - 4096), "page 300: file_offset 1044480, wanted"),
    "page off its block": (entry(offset=2**20 + 512), "page 300: file_offset 1049088, wanted"),
    "page off by one": (entry(offset=2**20 + 1), "page 300: file_offset 1048577, wanted"),
    "page beyond all files": (entry(offset=2**62), "page 300: file_offset 4611686018427387904, wanted"),
    "page at the far end": (entry(offset=2**64 - 4096), "page 300: file_offset 18446744073709547520, wanted"),
    "page of no blocks": (entry(block_count=0), "page 300: 0 blocks, wanted 8 for its geometry"),
    "page of other blocks": (entry(block_count=9), "page 300: 9 blocks, wanted 8 for its geometry"),
    "codes in a plain layer": (entry(kind=1), "page 300: kind 1, wanted 0, as the layer is not quantised"),
    "unknown kind": (entry(kind=2, where="layer = 0"), FIRST + "layer 0: row 0: page 0: kind 2, wanted 0 or 1"),
    "kind of another size": (entry(block_count=3, kind=0, where="layer = 0"), "page 0: 3 blocks, wanted 8 for its"),
    "reserved byte": (entry(reserved=1), "page 300: reserved byte 1, wanted 0"),
    "last page of a later chunk": (
        "UPDATE page_chunk SET entries = CAST(substr(entries, 1, length(entries) - 16) || zeroblob(16) AS BLOB) "
        "WHERE layer = 5 AND chunk = 2",
        "layer 5: row 0: page 699: file_offset 0",
    ),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_the_format_does_not_allow_is_damage_that_is_named(damaged, kind):
    change, message = VALUES[kind]
    edit(damaged, change)
    assert_refused(damaged, StoreCorruptError, message)
    with pytest.raises(StoreCorruptError, match="run torch-csd verify"):
        with Catalogue.open(damaged, read_only=True) as found:
            found.infos()


@pytest.mark.parametrize(
    "kind", ["token ids twice", "layer twice", "chunk missing", "page beyond all files", "no layer"]
)
def test_damage_to_one_sequence_leaves_the_others_and_can_be_removed(damaged, kind):
    edit(damaged, VALUES[kind][0])
    with Catalogue.open(damaged) as found:
        assert found.names() == ["first", "second"]
        bad = []
        for name in found.names():
            try:
                found.load(name)
            except StoreCorruptError:
                bad.append(name)
        assert len(bad) == 1
        found.remove(bad[0])
        found.load_all(token_ids=True)


@pytest.mark.parametrize("kind", ["half a token", "metadata is half", "token ids are text"])
def test_matching_prefixes_finds_damage_too(damaged, kind):
    edit(damaged, "DELETE FROM tokens WHERE row = 1; " + VALUES[kind][0].replace("row = 1", "row = 0"))
    with Catalogue.open(damaged) as found, pytest.raises(StoreCorruptError, match=FIRST):
        found.match_prefix([0, 1, 2])


def test_a_commit_over_damage_mends_it(damaged):
    edit(
        damaged,
        "; ".join(VALUES[kind][0] for kind in ("chunk elsewhere", "chunk is text", "row 0 is missing", "layer x")),
    )
    sequence = make_sequence("second", make_layer(5, [64 * 700], 64 * 300 + 5))
    with Catalogue.open(damaged) as found:
        with pytest.raises(StoreCorruptError):
            found.load("second")
        found.commit(sequence)
        assert found.load("second") == sequence


@settings(max_examples=150)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_byte_of_the_file_can_do_worse_than_a_store_error(sound, make_path, flips):
    data = bytearray(Path(sound).read_bytes())
    for place, value in flips:
        data[int(place * len(data))] = value
    path = Path(make_path())
    path.touch(0o600)
    path.write_bytes(data)
    with contextlib.suppress(StoreError), Catalogue.open(path) as found:
        for sequence in found.load_all(token_ids=True):
            catalogue._check_sequence(sequence)
        found.infos()
        found.match_prefix(range(10))
        found.commit(make_sequence("first", GOOD))
