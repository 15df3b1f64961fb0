"""Power loss at any moment: every disk that it could leave holds what was committed.

A process walks over a store while native/record_io.c writes down what it does to files. The log is then played back on
a model of a disk, up to any point, with only part of what no sync had made certain by then; the store is opened on what
that leaves.

What the model takes for certain is what ext4, XFS and POSIX promise, and less than what ext4 and XFS do:

- fsync of a file: all that was written to it before, and its size; not its name.
- fdatasync of a file: the same; half of the sampled disks take it at its word, and keep only the size that the written
  data needs: a size that fallocate or ftruncate gave may come or not.
- fsync of a directory: the names that were made, renamed and removed in it before; not what is in the files.
- Of anything else any part may have happened. Of a write each piece of 512 or 4096 bytes by itself; pieces that did not
  happen read as what was there before, or as zeros beyond the old end. Later writes to a piece replace earlier ones. A
  rename happens as a whole. Changes of different files and directories, and of one, come in any combination.
- Bytes beside those of a write do not change (what SQLite calls power-safe overwrite).
"""

from __future__ import annotations

import collections
import ctypes
import enum
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from durable_walk import State, Walk, differences, observe

import torch_csd
from torch_csd import ops
from torch_csd.drive import DurableDrive

SEED = int(os.environ.get("TORCH_CSD_TEST_SEED", "1"))
SAMPLES = int(os.environ.get("TORCH_CSD_TEST_DISKS", "500"))

RECORDER = Path(__file__).parent / "native" / "record_io.c"


# ---- the log -------------------------------------------------------------------------------------------------------


def workload(directory: str) -> None:
    """Runs under the recorder: everything that changes a store, with space that is freed and used again."""
    torch.set_num_threads(1)
    mark = ctypes.CDLL(None).record_io_mark

    def report(event: str, state: State) -> None:
        text = json.dumps({"event": event, "state": state}).encode()
        mark(ctypes.c_char_p(text), ctypes.c_size_t(len(text)))

    walk = Walk(directory, report, seed=SEED, io_engine="pread")
    walk.create("a", None, 100)
    walk.extend("a", 30)
    walk.extend("a", 64)
    walk.fork("a", "b", 20)
    walk.extend("a", 5)
    walk.rewrite("b", 60, 80)
    walk.create("c", "int4", 260)
    walk.rewrite("a", 120, 40)
    walk.remove("b")
    walk.rewrite("c", 150, 100)
    walk.close()
    walk.collect_garbage()
    walk.extend("a", 190)
    walk.slide("c", 100, 70)
    walk.remove("a")
    walk.collect_garbage()
    walk.create("a", "bfloat16", 130)
    walk.rewrite("c", 30, 60)
    walk.close()


class Operation(enum.IntEnum):
    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    ALLOCATE = 4
    SYNC = 5
    RENAME = 6
    UNLINK = 7
    MAKE_DIRECTORY = 8
    MARK = 9


@dataclass(frozen=True)
class Record:
    operation: Operation
    path: str
    inode: int
    offset: int
    data: bytes


def read_log(path: Path) -> list[Record]:
    records, data, at = [], path.read_bytes(), 0
    header = struct.Struct("=IIQqQ")
    while at < len(data):
        operation, path_bytes, inode, offset, data_bytes = header.unpack_from(data, at)
        at += header.size
        name = os.fsdecode(data[at : at + path_bytes])
        at += path_bytes
        records.append(Record(Operation(operation), name, inode, offset, data[at : at + data_bytes]))
        at += data_bytes
    return records


# ---- the disk ------------------------------------------------------------------------------------------------------

# Which pieces of a change of a file or directory that no sync has made certain happened: given its number among those,
# how many there are, and of how many pieces it is, whether each did.
Choice = Callable[[int, int, int], list[bool]]


@dataclass(eq=False)
class File:
    """Its contents at some sync, and what was done to it since."""

    base: bytearray = field(default_factory=bytearray)
    changes: list[tuple[Record, bool]] = field(default_factory=list)  # and whether it is certain

    def sync(self, sizes: bool) -> None:
        self.changes = [(change, done or sizes or change.operation == Operation.WRITE) for change, done in self.changes]
        while self.changes and self.changes[0][1]:
            change, _ = self.changes.pop(0)
            _apply(self.base, change, None, 1)

    def contents(self, choice: Choice, piece_bytes: int) -> bytearray:
        contents = bytearray(self.base)
        count = sum(not done for _, done in self.changes)
        number = 0
        for change, done in self.changes:
            if done:
                _apply(contents, change, None, piece_bytes)
                continue
            pieces = choice(number, count, _piece_count(change, piece_bytes))
            number += 1
            if any(pieces):
                _apply(contents, change, None if all(pieces) else pieces, piece_bytes)
        return contents


def _piece_count(change: Record, piece_bytes: int) -> int:
    if change.operation != Operation.WRITE:
        return 1
    return (change.offset + len(change.data) - 1) // piece_bytes - change.offset // piece_bytes + 1


def _apply(contents: bytearray, change: Record, pieces: list[bool] | None, piece_bytes: int) -> None:
    if change.operation == Operation.WRITE:
        begin, end = change.offset, change.offset + len(change.data)
        spans = [(begin, end)]
        if pieces is not None:
            first = begin // piece_bytes * piece_bytes
            edges = [max(begin, first + number * piece_bytes) for number in range(len(pieces))] + [end]
            spans = [span for span, done in zip(zip(edges, edges[1:], strict=False), pieces, strict=True) if done]
        for low, high in spans:
            if high > len(contents):
                contents.extend(bytes(high - len(contents)))
            contents[low:high] = change.data[low - begin : high - begin]
    elif change.offset < len(contents):
        if change.operation == Operation.TRUNCATE:
            del contents[change.offset :]
    else:
        contents.extend(bytes(change.offset - len(contents)))


@dataclass(eq=False)
class Directory:
    base: dict[str, File | Directory] = field(default_factory=dict)
    changes: list[tuple[str | None, str | None, File | Directory]] = field(default_factory=list)  # old and new name

    def sync(self, sizes: bool) -> None:
        for change in self.changes:
            _rename(self.base, *change)
        self.changes = []

    def entries(self, choice: Choice) -> dict[str, File | Directory]:
        entries = dict(self.base)
        for number, change in enumerate(self.changes):
            if choice(number, len(self.changes), 1)[0]:
                _rename(entries, *change)
        return entries


def _rename(entries: dict[str, File | Directory], old: str | None, new: str | None, node: File | Directory) -> None:
    if old is not None and entries.get(old) is node:
        del entries[old]
    if new is not None:
        entries[new] = node


class Disk:
    """Plays a log back. strict: fdatasync promises no size beyond what was written."""

    def __init__(self, root: str, *, strict: bool = False) -> None:
        self.strict = strict
        self.root = Directory()
        self.nodes: dict[int, File | Directory] = {os.stat(root).st_ino: self.root}
        self.now: dict[str, File | Directory] = {root: self.root}  # by path, as the process sees it

    def play(self, record: Record) -> None:
        match record.operation:
            case Operation.WRITE | Operation.TRUNCATE | Operation.ALLOCATE:
                self.nodes[record.inode].changes.append((record, False))
            case Operation.SYNC:
                self.nodes[record.inode].sync(sizes=not (self.strict and record.offset == 1))
            case Operation.CREATE | Operation.MAKE_DIRECTORY:
                node = File() if record.operation == Operation.CREATE else Directory()
                self.nodes[record.inode] = self.now[record.path] = node
                self._parent(record.path).changes.append((None, os.path.basename(record.path), node))
            case Operation.UNLINK:
                node = self.now.pop(record.path)
                self._parent(record.path).changes.append((os.path.basename(record.path), None, node))
            case Operation.RENAME:
                path = os.fsdecode(record.data)
                assert os.path.dirname(path) == os.path.dirname(record.path), "the model knows renames in a directory"
                node = self.now[path] = self.now.pop(record.path)
                names = os.path.basename(record.path), os.path.basename(path)
                self._parent(path).changes.append((*names, node))

    def _parent(self, path: str) -> Directory:
        return self.now[os.path.dirname(path)]

    def image(self, choices: Callable[[], Choice], piece_bytes: int = 4096) -> dict[str, bytes | None]:
        """Contents by path; None for a directory."""
        found: dict[str, bytes | None] = {}

        def visit(directory: Directory, prefix: str) -> None:
            for name, node in sorted(directory.entries(choices()).items()):
                if isinstance(node, Directory):
                    found[prefix + name] = None
                    visit(node, prefix + name + "/")
                else:
                    found[prefix + name] = node.contents(choices(), piece_bytes)

        visit(self.root, "")
        return found


def everything(number: int, count: int, pieces: int) -> list[bool]:
    return [True] * pieces


def nothing(number: int, count: int, pieces: int) -> list[bool]:
    return [False] * pieces


def random_choices(rng: random.Random) -> Callable[[], Choice]:
    """For each file and directory one way to lose part of what it was to become."""

    def make() -> Choice:
        kind = rng.choice(["nothing", "everything", "pieces", "changes", "prefix", "suffix", "one", "all but one"])
        share, chosen = rng.choice([0.1, 0.5, 0.9]), rng.random()

        def choice(number: int, count: int, pieces: int) -> list[bool]:
            at = int(chosen * count)
            torn = [rng.random() < 0.5 for _ in range(pieces)]
            match kind:
                case "nothing" | "everything":
                    return [kind == "everything"] * pieces
                case "pieces":
                    return [rng.random() < share for _ in range(pieces)]
                case "changes":
                    return [rng.random() < share] * pieces
                case "prefix":
                    return torn if number == at else [number < at] * pieces
                case "suffix":
                    return torn if number == at else [number > at] * pieces
                case "one":
                    return [number == at] * pieces
                case _:
                    return [number != at] * pieces

        return choice

    return make


# ---- what must be true of it ---------------------------------------------------------------------------------------


class BrokenStoreError(AssertionError):
    """A disk on which something is missing, or is there that should not be."""


class Checker:
    """Opens stores on disks. One that it has seen is not opened again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: set[bytes] = set()
        self.count = 0

    def check(self, image: dict[str, bytes | None], allowed: list[State], where: str) -> None:
        self.count += 1
        key = hashlib.blake2b(json.dumps(allowed).encode())
        for path, contents in image.items():
            key.update(f"{path} {None if contents is None else len(contents)}\n".encode())
            key.update(contents or b"")
        if key.digest() in self.seen:
            return
        self.seen.add(key.digest())
        try:
            self._check(image, allowed)
        except BaseException as error:
            raise BrokenStoreError(f"{where} (disk in {self.directory}): {type(error).__name__}: {error}") from error

    def _check(self, image: dict[str, bytes | None], allowed: list[State]) -> None:
        self.write(image)
        walk = Walk(str(self.directory), lambda event, state: None, seed=1, io_engine="pread")
        assert walk.state in allowed, "\nor:\n".join(differences(walk.state, state) for state in allowed)
        if walk.state:
            assert torch_csd.verify(self.directory) == []
            walk.rewrite(next(iter(walk.state)), 30, 70)
        walk.create("after", None, 65)
        walk.close()
        assert observe(self.directory, **walk.settings) == walk.state, "what was committed afterwards"
        assert torch_csd.verify(self.directory) == []

    def write(self, image: dict[str, bytes | None]) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        for path, contents in image.items():
            if contents is None:
                (self.directory / path).mkdir(mode=0o700)
            else:
                (self.directory / path).touch(mode=0o600)
                (self.directory / path).write_bytes(contents)


def played(records: list[Record], disk: Disk) -> Iterator[tuple[int, list[State]]]:
    """(records played, the states that may be found) at every point of the log."""
    state: State = {}
    begun: State | None = None
    yield 0, [state]
    for number, record in enumerate(records, 1):
        if record.operation == Operation.MARK:
            said = json.loads(record.data)
            state, begun = (said["state"], None) if said["event"] == "end" else (state, said["state"])
        else:
            disk.play(record)
        yield number, [state] if begun is None else [state, begun]


# ---- the tests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    root: str
    records: list[Record]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    return record(tmp_path_factory.mktemp("recording"))


def record(directory: Path, *arguments: str) -> Recording:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the recorder with")
    library, log = directory / "record_io.so", directory / "log"
    build = ["gcc", "-O1", "-shared", "-fPIC", str(RECORDER), "-o", str(library), "-ldl", "-pthread"]
    subprocess.run(build, check=True)
    root = directory / "root"
    root.mkdir()
    environment = os.environ | {"LD_PRELOAD": str(library), "RECORD_IO_ROOT": str(root), "RECORD_IO_LOG": str(log)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, __file__, str(root), *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return Recording(os.path.realpath(root), read_log(log))


@pytest.fixture
def checker(tmp_path):
    memory = Path("/dev/shm")  # what a thousand stores sync need not wait for a drive
    directory = (memory if os.access(memory, os.W_OK) else tmp_path) / f"torch_csd-power-loss-{os.getpid()}"
    yield Checker(directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_log_has_everything_that_happened_to_the_files(recording):
    disk = Disk(recording.root)
    for _ in played(recording.records, disk):
        pass
    image = disk.image(lambda: everything)
    there = {}
    for path, directories, files in os.walk(recording.root):
        for name in directories + files:
            whole = os.path.join(path, name)
            there[os.path.relpath(whole, recording.root)] = None if name in directories else Path(whole).read_bytes()
    assert image == there
    kinds = collections.Counter(record.operation for record in recording.records)
    assert min(kinds[kind] for kind in Operation) > 0, kinds
    pages = next(node for path, node in disk.now.items() if path.endswith("pages.csd"))
    inode = next(inode for inode, node in disk.nodes.items() if node is pages)
    times = collections.Counter(
        r.offset for r in recording.records if (r.operation, r.inode) == (Operation.WRITE, inode)
    )
    assert max(times.values()) > 1, "no space was used twice"


def test_after_any_prefix_of_the_log_all_that_was_committed_is_there(recording, checker):
    disk = Disk(recording.root)
    for number, allowed in played(recording.records, disk):
        checker.check(disk.image(lambda: everything), allowed, f"after {number} records")
        checker.check(disk.image(lambda: nothing), allowed, f"after {number} records, without what was not synced")
    print(f"{checker.count} disks, {len(checker.seen)} different ones, {len(recording.records)} records")


@pytest.mark.parametrize("strict", [False, True], ids=["fdatasync keeps sizes", "fdatasync keeps data"])
def test_whatever_part_of_what_was_not_synced_is_lost_all_that_was_committed_is_there(recording, checker, strict):
    for image, allowed, where in sampled_disks(recording.records, recording.root, SAMPLES // 2, strict=strict):
        checker.check(image, allowed, where)
    print(f"{checker.count} disks, {len(checker.seen)} different ones")


@pytest.mark.parametrize(
    "forgotten",
    [
        "pages.csd",
        "catalogue.sqlite",
        "catalogue.sqlite-journal",
        "torch_csd-durable",
        "torch_csd-durable after unlink",
    ],
)
def test_syncs_that_are_left_out_are_found_out(recording, checker, forgotten):
    records = list(without_syncs(recording, *forgotten.split(" after ")))
    assert len(records) < len(recording.records)
    with pytest.raises(BrokenStoreError):
        for image, allowed, where in sampled_disks(records, recording.root, 4 * SAMPLES, strict=False):
            checker.check(image, allowed, where)
    print(f"found out with {checker.count} disks")


def test_space_that_is_used_again_too_early_is_found_out(tmp_path, checker):
    recording = record(tmp_path, "reuse early")
    with pytest.raises(BrokenStoreError):
        for image, allowed, where in sampled_disks(recording.records, recording.root, 4 * SAMPLES, strict=False):
            checker.check(image, allowed, where)


def reuse_early() -> None:
    commit = DurableDrive.commit

    def commit_over_the_last(self, name, *arguments) -> None:
        if name in self._snapshots:
            ops.release(self.handle, self._snapshots[name])
        commit(self, name, *arguments)

    DurableDrive.commit = commit_over_the_last


def without_syncs(recording: Recording, name: str, after: str | None = None) -> Iterator[Record]:
    disk = Disk(recording.root)
    previous = None
    for record in recording.records:
        disk.play(record)
        if record.operation == Operation.SYNC:
            node = disk.nodes[record.inode]
            names = [os.path.basename(path) for path, there in disk.now.items() if there is node]
            if name in names and (after is None or previous == Operation.UNLINK):
                continue
        yield record
        previous = record.operation


def sampled_disks(records: list[Record], root: str, count: int, *, strict: bool):
    rng = random.Random(f"{SEED} {strict}")
    at = collections.Counter(rng.randrange(1, len(records) + 1) for _ in range(count))
    disk = Disk(root, strict=strict)
    for number, allowed in played(records, disk):
        for sample in range(at[number]):
            seed = f"{SEED} {strict} {number} {sample}"
            choices = random.Random(seed)
            image = disk.image(random_choices(choices), choices.choice([512, 4096]))
            yield image, allowed, f"a sample after {number} records, TORCH_CSD_TEST_SEED={SEED} ({seed})"


if __name__ == "__main__":
    if "reuse early" in sys.argv:
        reuse_early()
    workload(sys.argv[1])
