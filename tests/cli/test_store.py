"""`torch-csd inspect`, `verify`, `rm` and `gc`."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import torch

import torch_csd
from torch_csd import KVStore
from torch_csd.catalogue import Catalogue, page_spans
from torch_csd.cli.store import age, open_scratch_files

TOKENS = 300


def keep(directory, name: str, *, tokens: int = TOKENS, seed: int = 0, **settings: object) -> None:
    torch.manual_seed(seed)
    k = torch.randn(2, 2, tokens, 64)
    with KVStore(directory, durable=True, name=name, memory_budget="8MiB", **settings) as store:
        for layer in range(3):
            store.append(layer, k, k)
        store.commit([list(range(tokens))] * 2)


@pytest.fixture
def kept(tmp_path):
    """A directory with the sequences "a" and "b"."""
    metadata = {"model": {"model_type": "llama"}, "fingerprint": "0123456789abcdef"}
    keep(tmp_path, "a", metadata=metadata, kv_dtype="int8")
    keep(tmp_path, "b", tokens=2 * TOKENS, seed=1)
    return tmp_path


@pytest.fixture
def writer(kept):
    """Another process that has "b" open, and commits it again and again."""
    code = (
        f"import torch, torch_csd\nstore = torch_csd.KVStore.open({str(kept)!r}, 'b', memory_budget='8MiB')\n"
        "k = torch.randn(2, 2, 20, 64)\nprint('open', flush=True)\n"
        "while True:\n    for layer in range(3): store.append(layer, k, k)\n    store.commit()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    yield process
    assert process.poll() is None, "the writer was disturbed"
    process.kill()
    process.wait()
    process.stdout.close()


def store_path(directory, name: str):
    return directory / "torch_csd-durable" / name


def flip_byte(path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def damage_tables(directory, name: str) -> None:
    connection = sqlite3.connect(store_path(directory, "catalogue.sqlite"))
    with connection:
        where = "WHERE sequence = (SELECT id FROM sequence WHERE name = ?)"
        connection.execute(f"UPDATE page_table SET length = length + 640 {where}", (name,))
    connection.close()


def names(csd, directory) -> list[str]:
    return [s["name"] for s in json.loads(csd("inspect", directory, "--json").stdout)["durable"]["sequences"]]


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_sequences_and_the_file_of_pages(csd, kept):
    result = csd("inspect", kept)
    assert result.exit_code == 0 and result.stderr == ""
    a, b = (line.split() for line in result.stdout.splitlines() if line[:2] in ("a ", "b "))
    assert a[:4] == ["a", "2", "x", "300"] and "int8" in a and a[-2:] == ["llama", "01234567"] and "yes" in a
    assert b[:5] == ["b", "2", "x", "600", "3"] and "float32" in b
    assert "in 2 sequences" in result.stdout and "damaged" not in result.stdout


def test_inspect_as_json_is_what_the_library_says(csd, kept):
    store = json.loads(csd("inspect", kept, "--json").stdout)["durable"]
    infos = torch_csd.list_sequences(kept)
    assert [sequence["name"] for sequence in store["sequences"]] == ["a", "b"]
    for shown, info in zip(store["sequences"], infos, strict=True):
        for name in ("metadata", "rows", "tokens", "layers", "stored_bytes", "committed_s", "has_token_ids"):
            assert shown[name] == getattr(info, name)
        assert shown["kv_dtypes"] == list(info.kv_dtypes)
    assert (store["sequences"][0]["model_type"], store["sequences"][1]["fingerprint"]) == ("llama", None)
    assert store["used_bytes"] == sum(info.stored_bytes for info in infos)
    assert store["file_bytes"] == store_path(kept, "pages.csd").stat().st_size
    assert store["used_bytes"] + store["free_bytes"] + 2**20 == store["file_bytes"]
    assert (store["writer"], store["damaged"], store["problems"]) == (None, {}, [])


def test_pages_that_sequences_share_are_used_once(csd, tmp_path):
    keep(tmp_path, "a", tokens=640)
    with KVStore.open(tmp_path, "a", memory_budget="8MiB") as store, store.fork("fork") as fork:
        fork.commit()
    store = json.loads(csd("inspect", tmp_path, "--json").stdout)["durable"]
    sizes = {sequence["stored_bytes"] for sequence in store["sequences"]}
    assert sizes == {store["used_bytes"]}


def test_inspect_and_verify_work_while_another_process_writes(csd, kept, writer):
    for _ in range(5):
        shown = csd("inspect", kept)
        assert f"open for writing: process {writer.pid} (" in shown.stdout and "damaged" not in shown.stdout
        told = json.loads(csd("inspect", kept, "--json").stdout)["durable"]
        assert told["writer"]["process"] == writer.pid and told["problems"] == []
        verified = csd("verify", kept)
        assert verified.exit_code == 0, verified.stdout
    for command in (["rm", kept, "a"], ["gc", kept]):
        result = csd(*command)
        assert result.exit_code == 2
        assert f"process {writer.pid}" in result.stderr and result.stderr.count("\n") == 1
    assert names(csd, kept) == ["a", "b"]


def test_a_writer_that_was_killed_writes_no_more(csd, kept):
    code = f"import os, torch_csd\ns = torch_csd.KVStore.open({str(kept)!r}, 'b')\nos.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    assert store_path(kept, "lock").read_text()
    assert json.loads(csd("inspect", kept, "--json").stdout)["durable"]["writer"] is None
    assert csd("rm", kept, "a").exit_code == 0


def test_inspect_of_a_directory_without_anything(csd, tmp_path):
    assert "no durable store; no scratch store is open here" in csd("inspect", tmp_path).stdout
    assert json.loads(csd("inspect", tmp_path, "--json").stdout)["durable"] is None
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_scratch_file_of_a_running_store(csd, tmp_path):
    k = torch.randn(1, 2, 640, 64)
    with KVStore(tmp_path, memory_budget="8MiB", resident=False) as store:
        store.append(0, k, k)
        store.attend(0, torch.randn(1, 2, 1, 64))
        (file,) = json.loads(csd("inspect", tmp_path, "--json").stdout)["scratch"]
        assert file["process"] == os.getpid()
        assert file["allocated_bytes"] >= store.stats()["drive_written_bytes"] > 0
        assert str(os.getpid()) in csd("inspect", tmp_path).stdout
    assert json.loads(csd("inspect", tmp_path, "--json").stdout)["scratch"] == []


def test_a_file_of_another_program_is_no_scratch_file(csd, tmp_path):
    with open(tmp_path / "other", "wb") as file:
        file.write(b"no pages")
        file.flush()
        os.unlink(tmp_path / "other")
        assert json.loads(csd("inspect", tmp_path, "--json").stdout)["scratch"] == []


def test_names_cannot_draw_on_the_terminal(csd, tmp_path):
    keep(tmp_path, "[red]a[b]\u202ec")
    assert "[red]a[b]?c" in csd("inspect", tmp_path).stdout
    assert "[red]a[b]" in csd("verify", tmp_path, "--name", "[red]x").stderr


@pytest.mark.parametrize(
    ("elapsed_s", "shown"), [(3, "3 s ago"), (150, "2 min ago"), (7300, "2 h ago"), (-50, ""), (1e6, ""), (1e300, "?")]
)
def test_moments_are_shown_short(elapsed_s, shown):
    assert shown in age(time.time() - elapsed_s)


# ---- what is damaged ------------------------------------------------------------------------------------------------


def test_verify_lists_each_damaged_page_and_inspect_goes_on(csd, kept):
    result = csd("verify", kept)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 sequences" in result.stdout and "every page is as it was written" in result.stdout
    with Catalogue.open(store_path(kept, "catalogue.sqlite")) as catalogue:
        spans = page_spans(catalogue.load("a").layers[1].rows[1].entries)
    for offset in list(spans)[:2]:
        flip_byte(store_path(kept, "pages.csd"), offset + 100)
    result = csd("verify", kept)
    assert result.exit_code == 1
    damaged = [line for line in result.stdout.splitlines() if line.startswith("damaged: ")]
    assert len(damaged) == 2 and all("other bytes than were written" in line for line in damaged)
    assert all("sequence 'a', layer 1, row 1, page " in line for line in damaged)
    assert "2 damaged pages in 1 sequence" in result.stdout
    told = json.loads(csd("verify", kept, "--json").stdout)
    assert [page["file_offset"] for page in told["damaged_pages"]] == list(spans)[:2]
    assert told["sequences"] == ["a", "b"] and told["checked_bytes"] > 0
    assert csd("verify", kept, "--name", "b").exit_code == 0
    assert csd("inspect", kept).exit_code == 0


def test_damaged_tables_are_told_beside_what_is_sound(csd, kept):
    damage_tables(kept, "a")
    shown = csd("inspect", kept)
    assert shown.exit_code == 0 and "in 1 sequence," in shown.stdout
    assert "damaged: " in shown.stdout and "sequence 'a'" in shown.stdout
    result = csd("verify", kept)
    assert result.exit_code == 1 and "sequence 'a'" in result.stdout and result.stderr == ""
    told = json.loads(csd("verify", kept, "--json").stdout)
    assert told["sequences"] == ["b"] and list(told["damaged_sequences"]) == ["a"]
    assert csd("verify", kept, "--name", "b").exit_code == 0
    assert csd("verify", kept, "--name", "a").exit_code == 1
    result = csd("gc", kept)
    assert result.exit_code == 2 and "sequence 'a'" in result.stderr and result.stderr.count("\n") == 1
    assert csd("rm", kept, "a").exit_code == 0
    assert csd("verify", kept).exit_code == 0 and csd("gc", kept).exit_code == 0


def test_a_catalogue_that_is_none_is_one_line(csd, kept):
    catalogue = store_path(kept, "catalogue.sqlite")
    catalogue.write_bytes(b"not a database " * 500)
    shown = csd("inspect", kept)
    assert shown.exit_code == 0 and "file is not a database" in shown.stdout
    assert json.loads(csd("inspect", kept, "--json").stdout)["durable"]["problems"]
    verified = csd("verify", kept)
    assert verified.exit_code == 1 and "file is not a database" in verified.stdout
    assert "file is not a database" in json.loads(csd("verify", kept, "--json").stdout)["error"]
    for command in (["rm", kept, "a"], ["gc", kept]):
        result = csd(*command)
        assert result.exit_code == 2
        assert "file is not a database" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["catalogue.sqlite", "pages.csd", "lock", "readers"])
@pytest.mark.parametrize("kind", ["a FIFO", "a symbolic link", "a directory", "open to other users"])
def test_what_is_in_the_place_of_a_file_is_one_line(csd, kept, name, kind):
    path = store_path(kept, name)
    path.touch()
    aside = path.with_name("aside")
    if kind == "open to other users":
        path.chmod(0o644)
    else:
        path.rename(aside)
        {"a FIFO": lambda: os.mkfifo(path, 0o600), "a symbolic link": lambda: path.symlink_to(aside)}.get(
            kind, path.mkdir
        )()
    shown = csd("inspect", kept)
    assert shown.exit_code == 0
    if name != "readers":  # inspect does without
        assert kind in shown.stdout and str(path) in shown.stdout
    for command in (["verify", kept], ["gc", kept], ["rm", kept, "a"]):
        result = csd(*command)
        if (name, command[0]) in {("lock", "verify"), ("readers", "rm"), ("pages.csd", "rm")}:  # nor do these need it
            assert result.exit_code == 0, result.stderr
        else:
            assert result.exit_code == 2 and kind in result.stderr and result.stderr.count("\n") == 1, command


def test_a_store_that_is_a_link_is_one_line(csd, kept):
    (kept / "torch_csd-durable").rename(kept / "elsewhere")
    (kept / "torch_csd-durable").symlink_to(kept / "elsewhere")
    assert "symbolic link" in csd("inspect", kept).stdout
    for command in (["verify", kept], ["gc", kept], ["rm", kept, "a"]):
        result = csd(*command)
        assert result.exit_code == 2 and "symbolic link" in result.stderr and result.stderr.count("\n") == 1


def test_a_damaged_header_is_told(csd, kept):
    flip_byte(store_path(kept, "pages.csd"), 20)
    assert "the checksum of its header is wrong" in csd("inspect", kept).stdout
    result = csd("verify", kept)
    assert result.exit_code == 1 and "the checksum of its header is wrong" in result.stdout


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["gc"], ["rm"]], ids=lambda command: command[0])
def test_a_directory_that_is_none_is_one_line(csd, tmp_path, command):
    (tmp_path / "file").write_text("")
    more = ["a"] if command == ["rm"] else []
    for directory in (tmp_path / "none", tmp_path / "file"):
        result = csd(*command, directory, *more)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert str(directory) in result.stderr
    if command != ["inspect"]:
        result = csd(*command, tmp_path, *more)
        assert result.exit_code == 2 and "no durable store here" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- rm and gc ------------------------------------------------------------------------------------------------------


def test_rm_removes_what_is_named_and_gc_gives_the_space_back(csd, kept):
    before_bytes = store_path(kept, "pages.csd").stat().st_size
    told = json.loads(csd("rm", kept, "b", "b", "--json").stdout)
    assert told["removed"] == ["b"] and names(csd, kept) == ["a"]
    told = json.loads(csd("gc", kept, "--json").stdout)
    assert told["given_back_bytes"] == before_bytes - told["file_bytes"] > 0
    assert store_path(kept, "pages.csd").stat().st_size == told["file_bytes"]
    assert csd("gc", kept).stdout.startswith("gave back 0 B; the file of pages has ")
    assert csd("verify", kept).exit_code == 0


def test_rm_of_a_name_that_is_not_there_removes_nothing(csd, kept):
    result = csd("rm", kept, "a", "x", "b", "y")
    assert result.exit_code == 2
    assert "no sequence 'x', 'y'; there are 'a', 'b'; nothing was removed" in result.stderr
    assert names(csd, kept) == ["a", "b"]
    assert csd("verify", kept, "--name", "x").exit_code == 2


def on_terminal(*arguments: object, answer: bytes) -> tuple[int, str]:
    """Exit code and everything shown, of the command typed at a terminal of 80 columns."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch_csd", *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(slave)
    os.write(master, answer)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # how a terminal ends
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    return process.wait(), shown.decode()


def test_rm_asks_where_there_is_somebody_to_ask(csd, kept):
    code, shown = on_terminal("rm", kept, "a", "b", answer=b"n\n")
    assert code == 1 and "Remove 2 sequences from" in shown and "nothing was removed" in shown
    assert "600 tokens" in shown
    assert names(csd, kept) == ["a", "b"]
    code, shown = on_terminal("rm", kept, "a", answer=b"y\n")
    assert code == 0 and "removed 1 sequence" in shown
    code, shown = on_terminal("rm", kept, "b", "--yes", answer=b"")
    assert code == 0 and "Remove" not in shown
    assert names(csd, kept) == []


def test_a_terminal_of_80_columns_shows_whole_sequences(kept):
    keep(kept, "prompt-0123456789abcdef", metadata={"model": {"model_type": "llama"}, "fingerprint": "01234567"})
    code, shown = on_terminal("inspect", kept, answer=b"")
    assert code == 0 and all(
        word in shown for word in ("prompt-0123456789abcdef", "llama", "01234567", "float32", "yes")
    )
    code, shown = on_terminal("verify", kept, answer=b"")
    assert code == 0 and "every page is as it was written" in shown and "Traceback" not in shown


def test_processes_that_end_meanwhile_are_no_matter(tmp_path):
    """Their directories under /proc go while they are looked through."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            subprocess.run(["true"], check=True)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with KVStore(tmp_path, memory_budget="1MiB"):
            until_s = time.monotonic() + 2
            while time.monotonic() < until_s:
                # A child has the file, too, until it executes its program.
                assert os.getpid() in [file["process"] for file in open_scratch_files(tmp_path)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
