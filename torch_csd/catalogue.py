"""The catalogue of a durable store: which sequences there are, and where their pages lie. Knows no tensor.

Owns the directory ``torch_csd-durable``: its names, modes and locks, and the SQLite database in it. The pages
themselves are the drive's. csrc/store/FORMAT.md is normative.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import sqlite3
import stat
import sys
import threading
import time
import unicodedata
import urllib.parse
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch_csd.errors import StoreBusyError, StoreClosedError, StoreCorruptError, StoreError, StoreFullError

DIRECTORY_NAME = "torch_csd-durable"
PAGES_NAME = "pages.csd"
CATALOGUE_NAME = "catalogue.sqlite"
WRITER_LOCK_NAME = "lock"
READERS_LOCK_NAME = "readers"

ENTRY_BYTES = 16
CHUNK_PAGES = 256
PAGE_TOKENS = 64
BLOCK_BYTES = 4096
DATA_OFFSET = 2**20

APPLICATION_ID = 0x43534443
VERSION = 1
STORE_ID_BYTES = 16

NAME_LENGTH_MAX = 200
WRITES_TIMEOUT_S = 60.0  # an NVMe drive is given 30 s before the kernel resets it
BUSY_TIMEOUT_S = 5.0  # a commit takes milliseconds; one that takes longer than this is worth telling

_FIRST_LOOK_BYTES = 4096  # most sequences differ from another within their first thousand tokens

_LENGTH_MAX = 2**48 - 1
_OFFSET_MAX = 2**62 - 1
_BLOCK_COUNT_MAX = 2**16 - 1
_ELEMENT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
_CODE_DTYPES = ("int8", "int4")
_DTYPES = ("float32", "bfloat16", "float16")

# Table: its columns, the key among them first.
_COLUMNS = {
    "store": ("store_id",),
    "sequence": ("id", "name", "metadata", "created_s", "committed_s"),
    "tokens": ("sequence", "row", "ids"),
    "layer": ("sequence", "number", "num_kv_heads", "head_dim_k", "head_dim_v", "kv_dtype", "dtype", "begin"),
    "page_table": ("sequence", "layer", "row", "first_page", "length"),
    "page_chunk": ("sequence", "layer", "row", "chunk", "entries"),
}
_KEY_COUNT = {"tokens": 2, "layer": 2, "page_table": 3, "page_chunk": 4}  # the leading columns that are the key

_SCHEMA = """
CREATE TABLE store (store_id BLOB NOT NULL);
CREATE TABLE sequence (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL,
    created_s REAL NOT NULL, committed_s REAL NOT NULL
);
CREATE TABLE tokens (
    sequence INTEGER NOT NULL REFERENCES sequence (id), row INTEGER NOT NULL, ids BLOB NOT NULL,
    PRIMARY KEY (sequence, row)
);
CREATE TABLE layer (
    sequence INTEGER NOT NULL REFERENCES sequence (id), number INTEGER NOT NULL,
    num_kv_heads INTEGER NOT NULL, head_dim_k INTEGER NOT NULL, head_dim_v INTEGER NOT NULL,
    kv_dtype TEXT NOT NULL, dtype TEXT NOT NULL, "begin" INTEGER NOT NULL,
    PRIMARY KEY (sequence, number)
);
CREATE TABLE page_table (
    sequence INTEGER NOT NULL REFERENCES sequence (id), layer INTEGER NOT NULL, row INTEGER NOT NULL,
    first_page INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (sequence, layer, row)
);
CREATE TABLE page_chunk (
    sequence INTEGER NOT NULL REFERENCES sequence (id), layer INTEGER NOT NULL, row INTEGER NOT NULL,
    chunk INTEGER NOT NULL, entries BLOB NOT NULL,
    PRIMARY KEY (sequence, layer, row, chunk)
);
"""

_RESTORE = "run torch-csd verify to see what is sound, or restore the directory from a copy"


@dataclass(frozen=True)
class RowTable:
    """Where the pages of one row are."""

    first_page: int  # that is kept
    length: int  # in tokens, those before first_page included
    entries: bytes  # ENTRY_BYTES for each page, from first_page on


@dataclass(frozen=True)
class LayerTable:
    """One layer of a sequence: its geometry and its rows."""

    number: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    kv_dtype: str  # on the drive
    dtype: str  # of what was appended
    begin: int  # first position that can be read
    rows: tuple[RowTable, ...]


@dataclass(frozen=True)
class Sequence:
    """What one transaction stores under one name."""

    name: str
    metadata: dict[str, object]  # what JSON can hold
    layers: tuple[LayerTable, ...]
    token_ids: tuple[array, ...] | None  # array("i") for each row: the tokens it begins with
    created_s: float  # Unix time
    committed_s: float


@dataclass(frozen=True)
class SequenceInfo:
    """A sequence in a listing."""

    name: str
    metadata: dict[str, object]
    created_s: float
    committed_s: float
    rows: int
    tokens: int  # of the longest row
    layers: int
    kv_dtypes: tuple[str, ...]  # of its layers, each once
    stored_bytes: int  # of its pages; those that its rows share count once
    has_token_ids: bool


@dataclass(frozen=True)
class Survey:
    """What a catalogue tells, damaged or not."""

    infos: list[SequenceInfo]
    damaged: dict[str, str]  # by name of a sequence: what is wrong with its tables
    used_bytes: int  # of the pages of all sound sequences; those that are shared count once


def check_name(name: str) -> str:
    """``name``, if a sequence can have it.

    Raises:
        ValueError: it is not text of 1 to 200 characters, holds ``/``, control characters or unpaired surrogates, or
            is ``.`` or ``..``.
    """
    problem = None
    if not isinstance(name, str):
        problem = "is not text"
    elif not name:
        problem = "is empty"
    elif len(name) > NAME_LENGTH_MAX:
        problem = f"has {len(name)} characters"
    elif name in (".", ".."):
        problem = "means a directory"
    else:
        for character in name:
            if character == "/" or unicodedata.category(character) in ("Cc", "Cs"):
                problem = f"holds {character!r}"
                break
    if problem is not None:
        shown = repr(name)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise ValueError(
            f"a name must be text of 1 to {NAME_LENGTH_MAX} characters without '/', control characters and unpaired "
            f"surrogates, and not '.' or '..'; got {shown}, which {problem}"
        )
    return name


def page_bytes(num_kv_heads: int, head_dim_k: int, head_dim_v: int, dtype: str) -> int:
    """Bytes of a page whose elements are of ``dtype`` (float32, bfloat16, float16, int8 or int4): see FORMAT.md."""
    tile_bytes = PAGE_TOKENS * (head_dim_k + head_dim_v) * _ELEMENT_BITS[dtype] // 8
    if dtype in _CODE_DTYPES:
        tile_bytes = _round_up(tile_bytes + 4 * head_dim_k + 4 * PAGE_TOKENS, 64)
    return _round_up(num_kv_heads * tile_bytes, BLOCK_BYTES)


def page_spans(entries: bytes) -> dict[int, int]:
    """Where pages lie: the bytes of each by its file_offset. One that is named more than once is there once."""
    block_counts = _native(array("H", entries))[6::8]
    offsets = _native(array("Q", entries))[0::2]
    return {offset: count * BLOCK_BYTES for offset, count in zip(offsets, block_counts, strict=True)}


# ---- the directory and its locks -----------------------------------------------------------------------------------


class StoreDirectory:
    """The directory of a durable store, and the locks that this process holds on it.

    A lock ends with the process, however it ends. A forked child has none of its parent's locks.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pages_path = os.path.join(path, PAGES_NAME)
        self.catalogue_path = os.path.join(path, CATALOGUE_NAME)
        self._descriptors: dict[str, int] = {}  # of the locks held, by name
        _directories.add(self)

    @staticmethod
    def create(directory: str | os.PathLike[str]) -> StoreDirectory:
        """The store's directory below ``directory``; made if it is not there, and then durably so.

        Raises:
            StoreError: ``directory`` is missing, or what has the name already is not a directory of this user alone.
        """
        parent = os.path.abspath(os.fspath(directory))
        path = os.path.join(parent, DIRECTORY_NAME)
        with _os_errors(path, "cannot make this directory"):
            if not os.path.lexists(parent):
                raise StoreError(f"{parent}: no such directory; create it or name another")
            try:
                os.mkdir(path, 0o700)
                os.chmod(path, 0o700)  # whatever the umask took away
            except FileExistsError:
                pass
            _check_is_ours(path, os.lstat(path), directory=True)
            sync_directory(parent)  # every time: who made it may have been killed before this
        return StoreDirectory(path)

    @staticmethod
    def find(directory: str | os.PathLike[str]) -> StoreDirectory | None:
        """The store's directory below ``directory``; None if there is none.

        Raises:
            StoreError: what has the name is not a directory of this user alone.
        """
        path = os.path.join(os.path.abspath(os.fspath(directory)), DIRECTORY_NAME)
        with _os_errors(path, "cannot look at this directory"):
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                return None
        _check_is_ours(path, status, directory=True)
        return StoreDirectory(path)

    def lock_writer(self) -> None:
        """Makes this the one that may write.

        Raises:
            StoreBusyError: another process, or another store of this one, is.
        """
        if WRITER_LOCK_NAME in self._descriptors:
            return
        path = os.path.join(self.path, WRITER_LOCK_NAME)
        descriptor = _open_lock(path)
        try:
            attempts_left = 10  # writer() holds it shared, but for an instant
            while not _try_lock(descriptor, fcntl.LOCK_EX, path):
                attempts_left -= 1
                if attempts_left == 0:
                    raise StoreBusyError(f"{self.path}: {_holder(descriptor)}")
                time.sleep(0.002)
            # For the message of those who come next, no more: a full drive is no reason not to go on.
            with contextlib.suppress(OSError):
                text = b"%d\n" % os.getpid()
                os.pwrite(descriptor, text, 0)
                os.ftruncate(descriptor, len(text))
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors[WRITER_LOCK_NAME] = descriptor

    def writer(self) -> Writer | None:
        """Who writes to this store at the moment, if anybody does."""
        path = os.path.join(self.path, WRITER_LOCK_NAME)
        if not os.path.lexists(path):
            return None
        descriptor = _open_lock(path)
        try:
            if _try_lock(descriptor, fcntl.LOCK_SH, path):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                return None
            return _read_writer(descriptor)
        finally:
            os.close(descriptor)

    def check_pages(self) -> int:
        """Bytes of the file of pages.

        Raises:
            StoreError: it is not a file of this user alone. StoreCorruptError: it is missing.
        """
        with _os_errors(self.pages_path, "cannot look at the file of pages"):
            try:
                status = os.lstat(self.pages_path)
            except FileNotFoundError:
                raise StoreCorruptError(f"{self.pages_path}: the file of pages is missing; put it back") from None
        _check_is_ours(self.pages_path, status)
        return status.st_size

    def await_writes(self) -> None:
        """Returns when the kernel is done with what a killed writer had begun to write to the file of pages.

        The writer's own lock is free as soon as its process is gone; what it had in flight goes on, for 0.2 s and more.
        The file of pages has a lock that lasts as long as that.

        Raises:
            StoreBusyError: it is not done after long.
        """
        try:
            descriptor = os.open(self.pages_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return  # whoever opens the file says more
        try:
            deadline_s = time.monotonic() + WRITES_TIMEOUT_S
            while not _try_lock(descriptor, fcntl.LOCK_SH, self.pages_path):
                if time.monotonic() > deadline_s:
                    raise StoreBusyError(
                        f"{self.pages_path}: writes of a process that is gone were on their way for "
                        f"{WRITES_TIMEOUT_S:g} s; look at the drive, or try again"
                    )
                time.sleep(0.002)
        finally:
            os.close(descriptor)

    def lock_reader(self) -> None:
        """Tells writers that what the catalogue names now must stay. Any number may hold it.

        Raises:
            StoreBusyError: a writer looks for readers, and does not come to an end with it.
        """
        if READERS_LOCK_NAME in self._descriptors:
            return
        path = os.path.join(self.path, READERS_LOCK_NAME)
        descriptor = _open_lock(path)
        try:
            # Not blocking without end: has_readers() holds it exclusively, but for an instant.
            deadline_s = time.monotonic() + BUSY_TIMEOUT_S
            while not _try_lock(descriptor, fcntl.LOCK_SH, path):
                if time.monotonic() > deadline_s:
                    raise StoreBusyError(f"{path}: locked for {BUSY_TIMEOUT_S:g} s by a process; end it or try again")
                time.sleep(0.002)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors[READERS_LOCK_NAME] = descriptor

    def has_readers(self) -> bool:
        """Whether anybody holds :meth:`lock_reader`, this process included."""
        path = os.path.join(self.path, READERS_LOCK_NAME)
        descriptor = _open_lock(path)
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX, path):
                return True
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return False
        finally:
            os.close(descriptor)

    def unlock(self) -> None:
        """Gives back what this holds. Idempotent."""
        descriptors, self._descriptors = self._descriptors, {}
        for name, descriptor in descriptors.items():
            with contextlib.suppress(OSError):
                if name == WRITER_LOCK_NAME:
                    os.ftruncate(descriptor, 0)
                # Closing is not enough: a child that is about to exec still has a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _forget_locks(self) -> None:
        # In a forked child. The lock is the parent's as well as ours: close, never LOCK_UN.
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptors", None):
            self.unlock()

    def __repr__(self) -> str:
        return f"StoreDirectory({self.path!r}, locks={sorted(self._descriptors)})"


_directories: weakref.WeakSet[StoreDirectory] = weakref.WeakSet()


def _forget_locks() -> None:
    for directory in list(_directories):
        directory._forget_locks()


os.register_at_fork(after_in_child=_forget_locks)


def _open_lock(path: str) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: a FIFO must not hold us up
    with _os_errors(path, "cannot open this lock"):
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            return descriptor
        except FileExistsError:
            pass
        # By name first: opening a link, a socket or a file of somebody else fails with a text that says less.
        _check_is_ours(path, os.lstat(path))
        descriptor = os.open(path, flags)
        try:
            _check_is_ours(path, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _try_lock(descriptor: int, operation: int, path: str) -> bool:
    with _os_errors(path, "cannot lock this file"):
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@dataclass(frozen=True)
class Writer:
    """The process that has a store open for writing."""

    process: int | None  # None: it has not said
    command: str  # empty where this machine has no such process

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        return f"process {self.process} ({self.command or 'of another container or machine?'})"


def _read_writer(descriptor: int) -> Writer:
    """The holder of the writer's lock, from what is written in the file."""
    text = b""
    for _ in range(5):  # a holder writes its number right after it has the lock
        text = os.pread(descriptor, 32, 0).strip()
        if text:
            break
        time.sleep(0.01)
    if not text.isdigit():
        return Writer(None, "")
    process = int(text)
    command = ""
    with contextlib.suppress(OSError):
        with open(f"/proc/{process}/cmdline", "rb") as file:
            command = file.read(4096).replace(b"\0", b" ").decode(errors="replace").strip()
    command = "".join(character if character.isprintable() else "?" for character in command)
    return Writer(process, command if len(command) <= 100 else command[:100] + "...")


def _holder(descriptor: int) -> str:
    """Who holds the writer's lock, and what to do about it."""
    writer = _read_writer(descriptor)
    if writer.process == os.getpid():
        return f"this process ({writer.process}) writes to this store already; close that store first, or share it"
    return f"{writer} writes to this store; end it first, or open the store for reading"


# ---- the catalogue -------------------------------------------------------------------------------------------------


class Catalogue:
    """The sequences of a durable store. Every change is one transaction: after a crash it is there, or it is not.

    Reading checks everything that it reads. One process writes (see :meth:`StoreDirectory.lock_writer`), any number
    read meanwhile. Safe to use from several threads, but not from a forked child.
    """

    store_id: bytes

    def __init__(self, path: str, connection: sqlite3.Connection, *, read_only: bool) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = connection
        self._read_only = read_only
        self._process = os.getpid()
        self._lock = threading.RLock()
        # What the file holds of a sequence's large values, by table and key, so that a commit can leave alone what
        # has not changed. Only of sequences that this object has committed.
        self._digests: dict[str, dict[str, dict[tuple[int, ...], bytes]]] = {}
        self._data_version = 0  # SQLite's, at which they were true

    # ---- opening and closing ---------------------------------------------------------------------------------------

    @staticmethod
    def create(path: str | os.PathLike[str], store_id: bytes) -> Catalogue:
        """A new catalogue without sequences. It appears under its name when it is complete, and durably so.

        Raises:
            StoreError: there is something of that name. StoreFullError: the drive is full.
        """
        if not isinstance(store_id, bytes) or len(store_id) != STORE_ID_BYTES:
            raise ValueError(f"store_id must be {STORE_ID_BYTES} bytes, got {store_id!r}")
        path = os.path.abspath(os.fspath(path))
        unfinished = path + ".new"
        with _os_errors(path, "cannot make the catalogue"):
            if os.path.lexists(path):
                raise StoreError(f"{path}: there is a catalogue already; open it")
            for left_behind in (unfinished + "-journal", unfinished):  # by a process that was killed here
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(left_behind)
            # SQLite would make it as the umask says; its journals take their mode from it.
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
        with _sqlite_errors(path):
            with contextlib.closing(_connect(unfinished)) as connection:
                connection.executescript(
                    f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
                    f"{_SCHEMA} INSERT INTO store VALUES (x'{store_id.hex()}'); COMMIT;"
                )
        with _os_errors(path, "cannot make the catalogue"):
            os.rename(unfinished, path)
            sync_directory(os.path.dirname(path))
        return Catalogue.open(path)

    @staticmethod
    def open(path: str | os.PathLike[str], *, read_only: bool = False) -> Catalogue:
        """The catalogue at ``path``, after a look at all of its structure.

        Raises:
            StoreCorruptError: it is damaged, or not a catalogue. StoreBusyError: another process kept it locked.
            StoreError: it is missing, not a file of this user alone, or of another version.
        """
        path = os.path.abspath(os.fspath(path))
        # By name, not by a descriptor: closing one would end the locks that SQLite holds for this process.
        with _os_errors(path, "cannot look at the catalogue"):
            try:
                _check_is_ours(path, os.lstat(path))
            except FileNotFoundError:
                raise StoreError(f"{path}: there is no catalogue; nothing was committed below this directory") from None
            for suffix in ("-journal", "-wal", "-shm"):  # what SQLite would open too
                with contextlib.suppress(FileNotFoundError):
                    _check_is_ours(path + suffix, os.lstat(path + suffix))
        with _sqlite_errors(path):
            connection = _connect(path, read_only=read_only)
        try:
            catalogue = Catalogue(path, connection, read_only=read_only)
            catalogue._check_structure()
        except BaseException:
            connection.close()
            raise
        return catalogue

    def close(self) -> None:
        """Lets go of the file. Idempotent."""
        if os.getpid() != self._process:
            return
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def __enter__(self) -> Catalogue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of the sequences, in order."""
        with self._transaction():
            return [name for _, name, _, _, _ in self._sequences()]

    def infos(self) -> list[SequenceInfo]:
        """What there is to tell of every sequence, in the order of :meth:`names`."""
        with self._transaction():
            return [_info(*self._load(row, token_ids=False)) for row in self._sequences()]

    def survey(self) -> Survey:
        """What there is to tell of every sequence that is sound, and what is wrong with the others."""
        infos, damaged, spans = [], {}, {}
        with self._transaction():
            for row in self._sequences():
                try:
                    sequence, has_token_ids = self._load(row, token_ids=False)
                except StoreCorruptError as error:
                    damaged[row[1]] = str(error)
                    continue
                infos.append(_info(sequence, has_token_ids))
                for layer in sequence.layers:
                    for table in layer.rows:
                        spans.update(page_spans(table.entries))
        return Survey(infos, damaged, sum(spans.values()))

    def load(self, name: str, *, token_ids: bool = True) -> Sequence:
        """The sequence of that name, every value of it checked.

        Raises:
            StoreError: there is none. StoreCorruptError: it is damaged.
        """
        check_name(name)
        with self._transaction():
            rows = self._sequences()
            for row in rows:
                if row[1] == name:
                    return self._load(row, token_ids=token_ids)[0]
        raise StoreError(f"{self.path}: no sequence {name!r}; {_listed([row[1] for row in rows])}")

    def load_all(
        self, *, token_ids: bool = False, damaged: dict[str, StoreCorruptError] | None = None
    ) -> list[Sequence]:
        """All sequences as of one moment, in the order of :meth:`names`.

        With ``damaged`` those that are damaged are left out, and their errors are there, by name; else they raise.
        """
        sequences = []
        with self._transaction():
            for row in self._sequences():
                try:
                    sequences.append(self._load(row, token_ids=token_ids)[0])
                except StoreCorruptError as error:
                    if damaged is None:
                        raise
                    damaged[row[1]] = error
        return sequences

    def match_prefix(
        self, ids: Iterable[int], metadata_matches: Callable[[dict[str, object]], bool] = lambda metadata: True
    ) -> list[tuple[str, int]]:
        """Sequences of one row whose tokens begin as ``ids`` do: name and number of tokens in common, longest first.

        Only those whose metadata ``metadata_matches`` accepts, with at least one token in common. A sequence that is
        still to be loaded may turn out to be damaged then.
        """
        wanted = _to_bytes(ids if isinstance(ids, array) and ids.typecode == "i" else _as_int32(ids))
        found = []
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT s.id, s.name, s.metadata, typeof(t.ids), length(t.ids), substr(t.ids, 1, ?) "
                "FROM sequence s JOIN tokens t ON t.sequence = s.id "
                "WHERE NOT EXISTS (SELECT 1 FROM tokens o WHERE o.sequence = s.id AND o.row IS NOT t.row) "
                "ORDER BY s.name",
                (_FIRST_LOOK_BYTES,),
            ).fetchall()
            for number, name, text, kind, ids_bytes, head in rows:
                with self._naming(name):
                    metadata = _parse_metadata(text)
                    if kind != "blob" or ids_bytes % 4:
                        raise _Invalid(f"token ids are {ids_bytes} bytes of {kind}, wanted a BLOB of 4 bytes for each")
                if not metadata_matches(metadata):
                    continue
                head = head or b""  # substr() of an empty BLOB is NULL
                if ids_bytes > len(head) and wanted.startswith(head):
                    query = "SELECT substr(ids, 1, ?) FROM tokens WHERE sequence = ?"
                    (head,) = connection.execute(query, (len(wanted), number)).fetchone()
                count = _common_prefix(head, wanted) // 4
                if count:
                    found.append((name, count))
        return sorted(found, key=lambda pair: -pair[1])

    # ---- writing ---------------------------------------------------------------------------------------------------

    def commit(self, sequence: Sequence) -> None:
        """Stores a sequence under its name, in place of one that has it. All or nothing, and durable on return.

        Of one that is there already only what has changed is written; it keeps its ``created_s``.

        Raises:
            ValueError: a value that the format does not allow. StoreFullError: the drive is full.
            StoreBusyError: another process kept the catalogue locked.
        """
        try:
            text = _metadata_text(sequence.metadata)
            _check_sequence(sequence)
        except _Invalid as problem:
            raise ValueError(f"sequence {sequence.name!r}: {problem}") from None
        large = _large_values(sequence)
        digests = {table: {key: _digest(value) for key, value in values.items()} for table, values in large.items()}
        layers = {(layer.number,): _layer_values(layer) for layer in sequence.layers}
        tables = {
            (layer.number, row): (table.first_page, table.length)
            for layer in sequence.layers
            for row, table in enumerate(layer.rows)
        }
        with self._transaction(write=True) as connection:
            known = self._digests.pop(sequence.name, None)  # until the transaction is complete nothing is known
            found = connection.execute("SELECT id FROM sequence WHERE name = ?", (sequence.name,)).fetchall()
            if found:
                number = found[0][0]
                connection.execute(
                    "UPDATE sequence SET metadata = ?, committed_s = ? WHERE id = ?",
                    (text, float(sequence.committed_s), number),
                )
            else:
                number = connection.execute(
                    "INSERT INTO sequence (name, metadata, created_s, committed_s) VALUES (?, ?, ?, ?)",
                    (sequence.name, text, float(sequence.created_s), float(sequence.committed_s)),
                ).lastrowid
            self._rewrite("layer", number, self._values("layer", number), layers, layers)
            self._rewrite("page_table", number, self._values("page_table", number), tables, tables)
            for table, values in large.items():
                before = known[table] if known is not None else self._file_digests(table, number)
                self._rewrite(table, number, before, digests[table], values)
        self._digests[sequence.name] = digests

    def remove(self, *names: str) -> None:
        """Forgets sequences, damaged or not. All or nothing.

        Raises:
            StoreError: there is none of such a name.
        """
        for name in names:
            check_name(name)
        with self._transaction(write=True) as connection:
            there = self._names_unchecked()
            for name in dict.fromkeys(names):
                self._digests.pop(name, None)
                found = connection.execute("SELECT id FROM sequence WHERE name = ?", (name,)).fetchall()
                if not found:
                    raise StoreError(f"{self.path}: no sequence {name!r}; {_listed(there)}")
                for table in _KEY_COUNT:
                    connection.execute(f"DELETE FROM {table} WHERE sequence = ?", found[0])
                connection.execute("DELETE FROM sequence WHERE id = ?", found[0])

    def _rewrite(
        self,
        table: str,
        number: int,
        before: dict[tuple[int, ...], object],
        after: dict[tuple[int, ...], object],
        values: dict[tuple[int, ...], tuple[object, ...] | bytes],
    ) -> None:
        """Makes the rows of a sequence ``values``; those that ``before`` and ``after`` agree on are there already."""
        columns = [f'"{column}"' for column in _COLUMNS[table]]
        keys, others = columns[: _KEY_COUNT[table]], columns[_KEY_COUNT[table] :]
        where = " AND ".join(f"{key} IS ?" for key in keys)
        delete = f"DELETE FROM {table} WHERE {where}"
        update = f"UPDATE {table} SET {', '.join(f'{column} = ?' for column in others)} WHERE {where}"
        insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        connection = self._connection
        for key in before.keys() - after.keys():
            connection.execute(delete, (number, *key))
        for key, value in after.items():
            row = values[key] if isinstance(values[key], tuple) else (values[key],)
            if key not in before:
                connection.execute(insert, (number, *key, *row))
            elif before[key] != value:
                connection.execute(update, (*row, number, *key))

    def _values(self, table: str, number: int) -> dict[tuple[int, ...], tuple[object, ...]]:
        """The rows of a sequence, as they are in the file: what is not part of the key, by key."""
        columns = ", ".join(f'"{column}"' for column in _COLUMNS[table][1:])
        rows = self._connection.execute(f"SELECT {columns} FROM {table} WHERE sequence = ?", (number,)).fetchall()
        split = _KEY_COUNT[table] - 1
        values = {row[:split]: row[split:] for row in rows}
        if len(values) != len(rows):
            raise self._corrupt(f"table {table} holds {len(rows) - len(values)} rows twice")
        return values

    def _file_digests(self, table: str, number: int) -> dict[tuple[int, ...], bytes | None]:
        values = self._values(table, number)
        return {key: _digest(value) if isinstance(value, bytes) else None for key, (value,) in values.items()}

    # ---- transactions and checks -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file; with ``write`` one change of it, undone if the block raises."""
        if os.getpid() != self._process:
            raise StoreClosedError(f"{self.path}: opened by process {self._process}; open it anew after a fork")
        if write and self._read_only:
            raise StoreError(f"{self.path}: opened for reading only; open the store for writing")
        with self._lock, _sqlite_errors(self.path):
            connection = self._connection
            if connection is None:
                raise StoreClosedError(f"{self.path}: this catalogue is closed; open it anew")
            try:
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if write:
                    self._forget_if_changed(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise

    def _forget_if_changed(self, connection: sqlite3.Connection) -> None:
        # Changes when another connection has written. That takes a second writer in spite of the lock (the sqlite3
        # program, say); then what we remember of the file is not what is in it.
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        if version != self._data_version:
            self._digests.clear()
            self._data_version = version

    def _check_structure(self) -> None:
        """Everything about the file that does not belong to one sequence."""
        with self._transaction() as connection:
            (identity,) = connection.execute("PRAGMA application_id").fetchone()
            if identity != APPLICATION_ID:
                raise self._corrupt(f"not a torch_csd catalogue: application_id {identity}, wanted {APPLICATION_ID}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                raise StoreError(
                    f"{self.path}: a catalogue of version {version}, this torch_csd reads version {VERSION}; "
                    f"use the torch_csd that wrote it"
                )
            (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            if mode != "delete":
                raise self._corrupt(f"its journal_mode is {mode}, wanted delete")
            self._check_schema(connection)
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise self._corrupt(f"SQLite finds it damaged: {verdict}")
            ids = connection.execute("SELECT store_id FROM store LIMIT 2").fetchall()
            if len(ids) != 1:
                raise self._corrupt(f"table store holds {len(ids) or 'no'} rows, wanted 1")
            (self.store_id,) = ids[0]
            if not isinstance(self.store_id, bytes) or len(self.store_id) != STORE_ID_BYTES:
                raise self._corrupt(f"store_id is {self.store_id!r}, wanted {STORE_ID_BYTES} bytes")
            self._sequences()
            for table in _KEY_COUNT:
                orphan = connection.execute(
                    f"SELECT sequence FROM {table} WHERE sequence IS NULL OR sequence NOT IN (SELECT id FROM sequence)"
                ).fetchone()
                if orphan is not None:
                    raise self._corrupt(f"table {table} holds rows of sequence {orphan[0]!r}, which is not there")

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        tables = set()
        # sqlite_schema, by the name that older versions know too
        for kind, name, root in connection.execute("SELECT type, name, rootpage FROM sqlite_master").fetchall():
            if kind == "index" or (kind == "table" and name.startswith("sqlite_")):  # SQLite's own
                continue
            if kind != "table" or name not in _COLUMNS or not root:  # virtual tables have no root
                raise self._corrupt(f"unexpected {'virtual table' if kind == 'table' and not root else kind} {name!r}")
            tables.add(name)
        for table, wanted in _COLUMNS.items():
            if table not in tables:
                raise self._corrupt(f"table {table} is missing")
            found = connection.execute(f"PRAGMA table_xinfo({table})").fetchall()
            columns = sorted(row[1] for row in found)
            if columns != sorted(wanted) or any(row[6] for row in found):  # hidden or generated
                raise self._corrupt(f"table {table} has columns {', '.join(columns)}, wanted {', '.join(wanted)}")

    def _sequences(self) -> list[tuple[int, str, str, float, float]]:
        """The rows of table sequence, in the order of names. Of the metadata only that it is text is checked."""
        rows = self._connection.execute(
            "SELECT id, name, metadata, created_s, committed_s FROM sequence ORDER BY name"
        ).fetchall()
        for number, name, metadata, created_s, committed_s in rows:
            with self._naming(name):
                try:
                    check_name(name)
                except ValueError as error:
                    raise _Invalid(str(error)) from None
                _check_int(number, "id")
                if not isinstance(metadata, str):
                    raise _Invalid(f"metadata is {_shown(metadata)}, wanted text")
                _check_time(created_s, "created_s")
                _check_time(committed_s, "committed_s")
        if len({row[0] for row in rows}) != len(rows) or len({row[1] for row in rows}) != len(rows):
            raise self._corrupt("table sequence holds a name or an id twice")
        return rows

    def _names_unchecked(self) -> list[str]:
        return [name for (name,) in self._connection.execute("SELECT name FROM sequence ORDER BY name")]

    def _load(self, row: tuple[int, str, str, float, float], *, token_ids: bool) -> tuple[Sequence, bool]:
        """A sequence, and whether there are token ids; they come along if asked for."""
        number, name, text, created_s, committed_s = row
        with self._naming(name):
            metadata = _parse_metadata(text)
            chunks = _grouped(self._values("page_chunk", number))
            tables = _grouped(self._values("page_table", number))
            layers = []
            for (layer,), (kv_heads, head_dim_k, head_dim_v, kv_dtype, dtype, begin) in _in_order(
                self._values("layer", number)
            ):
                rows = _joined(layer, tables.pop((layer,), {}), chunks)
                layers.append(LayerTable(layer, kv_heads, head_dim_k, head_dim_v, kv_dtype, dtype, begin, rows))
            if tables:
                raise _Invalid(f"page tables of layer {next(iter(tables))[0]!r}, which is not there")
            if chunks:
                layer, index = next(iter(chunks))
                raise _Invalid(f"page chunks of row {index!r} of layer {layer!r}, which is not there")
            counts, ids = self._token_ids(number, token_ids)
            _check_token_counts(counts, layers)
            sequence = Sequence(name, metadata, tuple(layers), ids, created_s, committed_s)
            _check_sequence(sequence)
        return sequence, bool(counts)

    def _token_ids(self, number: int, wanted: bool) -> tuple[list[int], tuple[array, ...] | None]:
        """How many token ids there are for each row, and the ids themselves if ``wanted``."""
        # Neither typeof() nor length() makes SQLite read the value.
        rows = self._connection.execute(
            f"SELECT row, typeof(ids), length(ids) {', ids' if wanted else ''} FROM tokens WHERE sequence = ?",
            (number,),
        ).fetchall()
        values = {(row[0],): row[1:] for row in rows}
        if len(values) != len(rows):
            raise _Invalid("token ids of a row are there twice")
        counts, ids = [], []
        for index, ((row,), (kind, ids_bytes, *value)) in enumerate(_in_order(values)):
            if row != index:
                raise _Invalid(f"token ids of row {row} follow those of row {index - 1}")
            if kind != "blob" or ids_bytes % 4:
                raise _Invalid(f"token ids of row {row} are {ids_bytes} bytes of {kind}, wanted a BLOB of 4 for each")
            counts.append(ids_bytes // 4)
            ids += [_from_bytes(blob) for blob in value]
        return counts, tuple(ids) if wanted and ids else None

    @contextlib.contextmanager
    def _naming(self, name: object) -> Iterator[None]:
        try:
            yield
        except _Invalid as problem:
            raise self._corrupt(f"sequence {_shown(name)}: {problem}") from None

    def _corrupt(self, problem: str) -> StoreCorruptError:
        return StoreCorruptError(f"{self.path}: {problem}; {_RESTORE}")

    def __repr__(self) -> str:
        return f"Catalogue({self.path!r}{', closed' if self._connection is None else ''})"


def _connect(path: str, *, read_only: bool = False) -> sqlite3.Connection:
    # A reader opens for writing too and then refuses to: what a killed writer left in the journal must be rolled back
    # before anybody can read. "//" is an empty authority; without it a path that begins with // would be taken for one.
    connection = sqlite3.connect(
        f"file://{urllib.parse.quote(os.fsencode(path))}?mode=rw",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,  # transactions begin and end where we say
        check_same_thread=False,  # Catalogue has a lock
    )
    # Text that is not UTF-8 comes with surrogates, which no check lets pass, not as an error that names no sequence.
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")
    try:
        for pragma in (
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "mmap_size = 0",  # a file that shrinks is then an error, not SIGBUS
            "temp_store = MEMORY",  # nothing of ours in /tmp
            "synchronous = EXTRA",
            "foreign_keys = ON",
            "cache_size = -16384",  # KiB: a large commit would otherwise sync once for every 2 MiB
            f"query_only = {'ON' if read_only else 'OFF'}",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


# ---- what the format allows ----------------------------------------------------------------------------------------


class _Invalid(Exception):
    """A value that the format does not allow: ValueError for who wants to store it, StoreCorruptError in a file."""


def _check_sequence(sequence: Sequence) -> None:
    try:
        check_name(sequence.name)
    except ValueError as error:
        raise _Invalid(str(error)) from None
    _check_time(sequence.created_s, "created_s")
    _check_time(sequence.committed_s, "committed_s")
    numbers = [layer.number for layer in sequence.layers]
    if len(set(numbers)) != len(numbers):
        raise _Invalid(f"layers {numbers}: a number comes twice")
    for layer in sequence.layers:
        _check_layer(layer)
    if sequence.token_ids is not None:
        for row, ids in enumerate(sequence.token_ids):
            if not isinstance(ids, array) or ids.typecode != "i":
                raise _Invalid(f'token ids of row {row} are a {type(ids).__name__}, wanted array("i")')
        _check_token_counts([len(ids) for ids in sequence.token_ids], sequence.layers)


def _check_token_counts(counts: list[int], layers: Iterable[LayerTable]) -> None:
    if not counts:
        return
    lengths: list[int] = []
    for layer in layers:
        for row, table in enumerate(layer.rows):
            if row == len(lengths):
                lengths.append(0)
            lengths[row] = max(lengths[row], table.length)
    if len(counts) != len(lengths):
        raise _Invalid(f"token ids of {len(counts)} rows, wanted them for all {len(lengths)} or for none")
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count > length:
            raise _Invalid(f"row {row} has {count} token ids, but {length} tokens")


def _check_layer(layer: LayerTable) -> None:
    _check_int(layer.number, "a layer's number")
    where = f"layer {layer.number}"
    _check_int(layer.num_kv_heads, f"{where}: num_kv_heads", 1, 65536)
    for name, head_dim in (("head_dim_k", layer.head_dim_k), ("head_dim_v", layer.head_dim_v)):
        _check_int(head_dim, f"{where}: {name}", 8, 576)
        if head_dim % 8:
            raise _Invalid(f"{where}: {name} is {head_dim}, wanted a multiple of 8")
    for name, dtype, known in (("kv_dtype", layer.kv_dtype, tuple(_ELEMENT_BITS)), ("dtype", layer.dtype, _DTYPES)):
        if not isinstance(dtype, str) or dtype not in known:
            raise _Invalid(f"{where}: {name} is {_shown(dtype)}, wanted one of {', '.join(known)}")
    _check_int(layer.begin, f"{where}: begin", 0, _LENGTH_MAX)
    if not layer.rows:
        raise _Invalid(f"{where}: has no rows, wanted one at least")
    tails = _entry_tails(layer)
    for index, row in enumerate(layer.rows):
        _check_row(row, layer.begin, tails, f"{where}: row {index}")


def _check_row(row: RowTable, begin: int, tails: dict[int, int], where: str) -> None:
    _check_int(row.length, f"{where}: length", 0, _LENGTH_MAX)
    end_page = _end_page(row.length)
    _check_int(row.first_page, f"{where}: first_page", 0, end_page)
    # Pages are dropped as soon as begin has passed them, and never before.
    low, high = row.first_page * PAGE_TOKENS, min(row.length, row.first_page * PAGE_TOKENS + PAGE_TOKENS - 1)
    if not low <= begin <= high:
        raise _Invalid(f"{where}: begin is {begin}, wanted {low} to {high}, in the first page that is kept")
    wanted = (end_page - row.first_page) * ENTRY_BYTES
    if not isinstance(row.entries, bytes) or len(row.entries) != wanted:
        raise _Invalid(f"{where}: entries are {_shown(row.entries)}, wanted {wanted} bytes for its pages")
    if wanted:
        _check_entries(row, tails, where)


def _entry_tails(layer: LayerTable) -> dict[int, int]:
    """The last four bytes that an entry of a layer may have, as one number, by page kind."""
    quantised = layer.kv_dtype in _CODE_DTYPES
    dtypes = {0: layer.dtype, 1: layer.kv_dtype} if quantised else {0: layer.kv_dtype}
    tails = {}
    for kind, dtype in dtypes.items():
        block_count = page_bytes(layer.num_kv_heads, layer.head_dim_k, layer.head_dim_v, dtype) // BLOCK_BYTES
        if block_count > _BLOCK_COUNT_MAX:
            raise _Invalid(
                f"layer {layer.number}: pages of {block_count} blocks ({layer.num_kv_heads} kv heads, {dtype}), "
                f"wanted at most {_BLOCK_COUNT_MAX}"
            )
        tails[kind] = block_count | kind << 16
    return tails


def _check_entries(row: RowTable, tails: dict[int, int], where: str) -> None:
    # All entries of a row at once, in slices: a million tokens of 32 layers are half a million entries.
    entries = row.entries
    offsets = _native(array("Q", entries))[0::2]
    if (
        any(entries[0::ENTRY_BYTES])
        or any(entries[1::ENTRY_BYTES].translate(_LOW_HALF))
        or min(offsets) < DATA_OFFSET
        or max(offsets) > _OFFSET_MAX
        or not set(_native(array("I", entries))[3::4]).issubset(tails.values())
    ):
        _raise_for_entry(row, tails, where)


_LOW_HALF = bytes(byte & 0x0F for byte in range(256))  # an offset is a multiple of 4096 = 0x1000


def _raise_for_entry(row: RowTable, tails: dict[int, int], where: str) -> None:
    for index in range(len(row.entries) // ENTRY_BYTES):
        entry = row.entries[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
        offset = int.from_bytes(entry[:8], "little")
        block_count = int.from_bytes(entry[12:14], "little")
        kind, reserved = entry[14], entry[15]
        page = f"{where}: page {row.first_page + index}"
        if offset % BLOCK_BYTES or not DATA_OFFSET <= offset <= _OFFSET_MAX:
            raise _Invalid(f"{page}: file_offset {offset}, wanted a multiple of {BLOCK_BYTES} from {DATA_OFFSET} on")
        if kind not in tails:
            wanted = "0 or 1" if 1 in tails else "0, as the layer is not quantised"
            raise _Invalid(f"{page}: kind {kind}, wanted {wanted}")
        if block_count != tails[kind] & 0xFFFF:
            raise _Invalid(f"{page}: {block_count} blocks, wanted {tails[kind] & 0xFFFF} for its geometry")
        if reserved:
            raise _Invalid(f"{page}: reserved byte {reserved}, wanted 0")
    raise AssertionError(f"{where}: no entry is at fault")


def _check_int(value: object, what: str, low: int = -(2**63), high: int = 2**63 - 1) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _Invalid(f"{what} is {_shown(value)}, wanted an integer from {low} to {high}")


def _check_time(value: object, what: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Invalid(f"{what} is {_shown(value)}, wanted seconds")


def _parse_metadata(text: object) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    metadata = None
    try:
        if isinstance(text, str) and text.encode():  # surrogates cannot be encoded: ValueError
            metadata = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        pass
    if not isinstance(metadata, dict):
        raise _Invalid(f"metadata is {_shown(text)}, wanted a JSON object")
    return metadata


def _metadata_text(metadata: dict[str, object]) -> str:
    try:
        text = json.dumps(metadata, allow_nan=False)
        if isinstance(metadata, dict) and json.loads(text) == metadata:
            return text
        problem = f"comes back as {_shown(json.loads(text))}"
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    raise _Invalid(f"metadata must be a dict of what JSON can hold, with text as keys: {_shown(metadata)}: {problem}")


# ---- tables and bytes ----------------------------------------------------------------------------------------------


def _layer_values(layer: LayerTable) -> tuple[object, ...]:
    return (layer.num_kv_heads, layer.head_dim_k, layer.head_dim_v, layer.kv_dtype, layer.dtype, layer.begin)


def _large_values(sequence: Sequence) -> dict[str, dict[tuple[int, ...], bytes]]:
    chunks = {}
    for layer in sequence.layers:
        for row, table in enumerate(layer.rows):
            for chunk, (begin, end) in _chunk_ranges(table):
                chunks[layer.number, row, chunk] = table.entries[begin * ENTRY_BYTES : end * ENTRY_BYTES]
    ids = {(row,): _to_bytes(ids) for row, ids in enumerate(sequence.token_ids or ())}
    return {"page_chunk": chunks, "tokens": ids}


def _chunk_ranges(row: RowTable) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number of each chunk of a row, and which of its entries are in it."""
    page, end_page = row.first_page, _end_page(row.length)
    while page < end_page:
        chunk = page // CHUNK_PAGES
        stop = min(end_page, (chunk + 1) * CHUNK_PAGES)
        yield chunk, (page - row.first_page, stop - row.first_page)
        page = stop


def _joined(layer: int, tables: dict, chunks: dict) -> tuple[RowTable, ...]:
    """The rows of a layer from its page tables; takes their entries out of ``chunks``."""
    rows = []
    for index, ((row,), (first_page, length)) in enumerate(_in_order(tables)):
        where = f"layer {layer}: row {row}"
        if row != index:
            raise _Invalid(f"{where} follows row {index - 1}" if index else f"{where} is the first, wanted row 0")
        _check_int(length, f"{where}: length", 0, _LENGTH_MAX)
        _check_int(first_page, f"{where}: first_page", 0, _end_page(length))
        pieces = chunks.pop((layer, row), {})
        found = [number for (number,), _ in _in_order(pieces)]
        first, end = first_page // CHUNK_PAGES, -(-_end_page(length) // CHUNK_PAGES)
        end = end if first_page < _end_page(length) else first
        # The count first: a damaged length may ask for more chunks than there is memory to list.
        if len(found) != end - first or found != list(range(first, end)):
            raise _Invalid(f"{where}: page chunks {_ranges(found)}, wanted {first} to {end - 1}, or none if it is less")
        table = RowTable(first_page, length, b"")
        for chunk, (begin, stop) in _chunk_ranges(table):
            (value,) = pieces[chunk,]
            wanted = (stop - begin) * ENTRY_BYTES
            if not isinstance(value, bytes) or len(value) != wanted:
                raise _Invalid(f"{where}: page chunk {chunk} is {_shown(value)}, wanted {wanted} bytes")
        entries = b"".join(pieces[chunk,][0] for chunk in found)
        rows.append(RowTable(first_page, length, entries))
    return tuple(rows)


def _grouped(values: dict[tuple, tuple]) -> dict[tuple, dict[tuple, tuple]]:
    """By all of the key but its last part, then by that."""
    groups: dict[tuple, dict[tuple, tuple]] = {}
    for key, value in values.items():
        groups.setdefault(key[:-1], {})[key[-1:]] = value
    return groups


def _in_order(values: dict[tuple, tuple]) -> list[tuple[tuple, tuple]]:
    for (number,) in values:
        _check_int(number, "the number of a layer, row or chunk")
    return sorted(values.items(), key=lambda item: item[0])


def layer_bytes(layer: LayerTable) -> int:
    """Of the pages of a layer; those that rows share count once."""
    if len(layer.rows) == 1:
        return sum(_native(array("H", layer.rows[0].entries))[6::8]) * BLOCK_BYTES
    return sum(page_spans(b"".join(row.entries for row in layer.rows)).values())


def _info(sequence: Sequence, has_token_ids: bool) -> SequenceInfo:
    stored_bytes = sum(layer_bytes(layer) for layer in sequence.layers)
    return SequenceInfo(
        name=sequence.name,
        metadata=sequence.metadata,
        created_s=sequence.created_s,
        committed_s=sequence.committed_s,
        rows=max((len(layer.rows) for layer in sequence.layers), default=0),
        tokens=max((row.length for layer in sequence.layers for row in layer.rows), default=0),
        layers=len(sequence.layers),
        kv_dtypes=tuple(dict.fromkeys(layer.kv_dtype for layer in sequence.layers)),
        stored_bytes=stored_bytes,
        has_token_ids=has_token_ids,
    )


def _as_int32(ids: Iterable[int]) -> array:
    try:
        return array("i", ids)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"token ids must be integers of 32 bits: {error}") from None


def _to_bytes(ids: array) -> bytes:
    return _native(ids).tobytes()


def _from_bytes(blob: bytes) -> array:
    return _native(array("i", blob))


def _native(values: array) -> array:
    """Little-endian values in the machine's byte order, and back."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values


def _common_prefix(a: bytes, b: bytes) -> int:
    low, high = 0, min(len(a), len(b))  # the first low bytes are equal; halving compares at memory speed
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()


def _end_page(length: int) -> int:
    return -(-length // PAGE_TOKENS)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---- errors --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _os_errors(path: str, problem: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StoreFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        raise kind(f"{path}: {problem}: {error.strerror}") from error


@contextlib.contextmanager
def _sqlite_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(path, error) from error
    except UnicodeDecodeError as error:  # SQLite's message quotes a name in the file that is no text
        raise StoreCorruptError(f"{path}: its schema holds a name that is not UTF-8; {_RESTORE}") from error


def _translated(path: str, error: sqlite3.Error) -> Exception:
    # By text: Python 3.10 does not tell SQLite's error code.
    text = str(error)
    if isinstance(error, sqlite3.DataError):
        return ValueError(f"{path}: {text}: metadata or the token ids of a row are larger than SQLite can hold")
    if isinstance(error, sqlite3.OperationalError):
        if "locked" in text:
            return StoreBusyError(f"{path}: kept locked for {BUSY_TIMEOUT_S:g} s by another process; try again")
        if "is full" in text:
            return StoreFullError(f"{path}: {text}; nothing was changed; make room on the drive")
        if "unable to open" in text:
            return StoreError(
                f"{path}: {text}; look at the limit of open files (ulimit -n), the drive and the directory's rights"
            )
        if "I/O error" in text or "readonly" in text:
            return StoreError(f"{path}: {text}; look at the drive and at the rights on the directory")
    return StoreCorruptError(f"{path}: {text}; {_RESTORE}")


def _check_is_ours(path: str, status: os.stat_result, *, directory: bool = False) -> None:
    """Of the right kind, this user's, and nobody else's.

    Raises:
        StoreError: it is not.
    """
    kind = stat.S_IFMT(status.st_mode)
    if kind != (stat.S_IFDIR if directory else stat.S_IFREG):
        wanted = "a directory" if directory else "a regular file"
        raise StoreError(f"{path}: must be {wanted}, is {_KINDS.get(kind, 'something else')}; move it away")
    if status.st_uid != os.geteuid():
        raise StoreError(
            f"{path}: belongs to user {status.st_uid}, this process to user {os.geteuid()}; "
            f"run as its owner, or choose another directory"
        )
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise StoreError(f"{path}: open to other users (mode {mode:o}); chmod {'700' if directory else '600'} {path}")
    if not directory and status.st_nlink > 1:
        raise StoreError(f"{path}: has {status.st_nlink} names (hard links), wanted one; put a copy in its place")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a regular file",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(names: list[str]) -> str:
    if not names:
        return "there are none"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"there are {', '.join(map(repr, names[:10]))}{more}"


def _ranges(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 8 else f"{numbers[0]}, {numbers[1]} ... {numbers[-1]} ({len(numbers)})"


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
