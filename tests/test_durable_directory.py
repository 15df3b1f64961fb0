"""A directory's durable sequences as a whole: readers beside writers, what is damaged, what is in the way."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_csd
from torch_csd import KVStore, StoreBusyError, StoreCorruptError, StoreError, ops
from torch_csd.catalogue import Catalogue, page_spans
from torch_csd.durable import Verification, remove_sequences, survey
from torch_csd.store import PrefixMatch

TOKENS = 1000


def keep(directory, name: str, *, tokens: int = TOKENS, value: float | None = None) -> torch.Tensor:
    """Commits a sequence of one layer; returns its K."""
    torch.manual_seed(tokens)
    k = torch.randn(1, 2, tokens, 64) if value is None else torch.full((1, 2, tokens, 64), value)
    with KVStore(directory, durable=True, name=name, memory_budget="8MiB") as store:
        store.append(0, k, k)
        store.commit(list(range(tokens)))
    return k


def keep_in_other_process(directory, name: str) -> None:
    code = (
        f"import torch, torch_csd\nk = torch.ones(1, 2, 3 * {TOKENS}, 64)\n"
        f"store = torch_csd.KVStore({str(directory)!r}, durable=True, name={name!r}, memory_budget='8MiB')\n"
        "store.append(0, k, k)\nstore.commit()\nstore.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def damage_tables(directory, name: str) -> None:
    """As if a bit of a page table had flipped: the block count of every entry."""
    with sqlite3.connect(directory / "torch_csd-durable" / "catalogue.sqlite") as connection:
        where = "sequence = (SELECT id FROM sequence WHERE name = ?)"
        (entries,) = connection.execute(f"SELECT entries FROM page_chunk WHERE {where}", (name,)).fetchone()
        bad = bytearray(entries)
        bad[12] ^= 1
        connection.execute(f"UPDATE page_chunk SET entries = ? WHERE {where}", (bytes(bad), name))
    connection.close()


def damage_page(directory, *, offset: int = 2**20 + 5) -> None:
    with open(directory / "torch_csd-durable" / "pages.csd", "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))


def test_a_prefix_is_used_by_the_process_that_committed_it(tmp_path):
    # The file has grown since it was opened.
    k = torch.randn(1, 2, TOKENS, 64)
    with (
        KVStore(tmp_path, durable=True, name="a", memory_budget="8MiB") as first,
        KVStore(tmp_path, durable=True, name="b", memory_budget="8MiB") as second,
    ):
        first.append(0, k, k)
        first.commit(list(range(TOKENS)))
        (match,) = second.prefix_matches([*range(500), 7])
        assert match == PrefixMatch("a", 500)
        second.use_prefix(match)
        assert torch.equal(second.read(0)[0], k[:, :, :500])
        second.append(0, k, k)
        second.commit()
        assert first.lengths(0) == [TOKENS] and second.lengths(0) == [500 + TOKENS]
    assert torch_csd.verify(tmp_path) == []


def test_a_new_writer_spares_what_an_older_reader_has(tmp_path):
    k = keep(tmp_path, "a")
    with KVStore.open(tmp_path, "a", read_only=True, memory_budget="4MiB", resident=False) as reader:
        torch_csd.remove_sequence(tmp_path, "a")
        keep_in_other_process(tmp_path, "b")
        assert torch_csd.collect_garbage(tmp_path) == 0
        assert torch.equal(reader.read(0)[0], k)
    keep(tmp_path, "c")  # nobody reads now: the space is used again
    found = survey(tmp_path)
    assert found.used_bytes == sum(info.stored_bytes for info in found.sequences)
    assert torch_csd.verify(tmp_path) == []


def test_a_reader_goes_on_with_what_was_there_when_it_began(tmp_path):
    keep(tmp_path, "a"), keep(tmp_path, "b")
    with Verification(tmp_path) as verification:
        torch_csd.remove_sequence(tmp_path, "a")
        with KVStore.open(tmp_path, "b", memory_budget="8MiB") as store:
            store.append(0, torch.ones(1, 2, 5 * TOKENS, 64), torch.ones(1, 2, 5 * TOKENS, 64))
            store.commit()
        assert verification.sequences == ["a", "b"]
        checked_bytes, damaged = zip(*verification, strict=True)
    assert sum(checked_bytes) == verification.total_bytes > 0
    assert [page for pages in damaged for page in pages] == []


def test_a_damaged_page_is_named(tmp_path):
    keep(tmp_path, "a"), keep(tmp_path, "b", value=2.0)
    assert torch_csd.verify(tmp_path) == []
    damage_page(tmp_path)
    (page,) = torch_csd.verify(tmp_path)
    assert (page.sequence, page.layer, page.row, page.file_offset) == ("a", 0, 0, 2**20)
    assert "sequence 'a', layer 0, row 0, page 0 (tokens 0 to 63)" in str(page)
    assert torch_csd.verify(tmp_path, "b") == []


def test_damaged_tables_cost_other_sequences_nothing_but_the_writer(tmp_path):
    k = keep(tmp_path, "a")
    keep(tmp_path, "b")
    damage_tables(tmp_path, "b")
    found = survey(tmp_path)
    assert [info.name for info in found.sequences] == ["a"] and list(found.damaged) == ["b"]
    assert "sequence 'b'" in found.damaged["b"] and not found.problems
    with KVStore.open(tmp_path, "a", read_only=True) as store:
        assert torch.equal(store.read(0)[0], k)
    with pytest.raises(StoreCorruptError, match="sequence 'b'"):
        KVStore.open(tmp_path, "b", read_only=True)
    (damaged,) = torch_csd.verify(tmp_path)
    assert damaged.sequence == "b" and damaged.index is None and "sequence 'b'" in str(damaged)
    assert torch_csd.verify(tmp_path, "a") == []
    with pytest.raises(StoreCorruptError, match="sequence 'b'"):  # whatever space it holds could be written to
        KVStore.open(tmp_path, "a")
    torch_csd.remove_sequence(tmp_path, "b")
    KVStore.open(tmp_path, "a").close()


def test_a_file_that_was_cut_short_costs_what_lay_there(tmp_path):
    k = keep(tmp_path, "a")
    keep(tmp_path, "b", tokens=4 * TOKENS)
    with Catalogue.open(tmp_path / "torch_csd-durable" / "catalogue.sqlite") as catalogue:
        spans = page_spans(catalogue.load("a").layers[0].rows[0].entries)
    end = max(offset + size for offset, size in spans.items())
    os.truncate(tmp_path / "torch_csd-durable" / "pages.csd", end + 4096)
    (damaged,) = torch_csd.verify(tmp_path)
    assert damaged.sequence == "b" and "cut short" in damaged.reason
    assert torch_csd.verify(tmp_path, "a") == []
    with KVStore.open(tmp_path, "a", read_only=True) as store:
        assert torch.equal(store.read(0)[0], k)


def test_removing_several_is_all_or_none(tmp_path):
    for name in "abc":
        keep(tmp_path, name)
    with pytest.raises(StoreError, match="no sequence 'x'; there are 'a', 'b', 'c'"):
        remove_sequences(tmp_path, ["a", "x", "b"])
    assert [info.name for info in torch_csd.list_sequences(tmp_path)] == ["a", "b", "c"]
    with KVStore.open(tmp_path, "a") as store:
        with pytest.raises(StoreBusyError, match="'a' is open in this process"):
            remove_sequences(tmp_path, ["b", "a"])
        with pytest.raises(StoreError, match="no sequence 'x'"):
            remove_sequences(tmp_path, ["b", "x"])
        remove_sequences(tmp_path, ["b"])
        assert store.lengths(0) == [TOKENS]
    remove_sequences(tmp_path, ["a", "c", "a"])
    assert torch_csd.list_sequences(tmp_path) == []
    assert torch_csd.collect_garbage(tmp_path) > 0
    assert survey(tmp_path).file_bytes <= 2**20


def test_what_is_in_the_place_of_a_file_is_an_error_and_no_wait(tmp_path):
    keep(tmp_path, "a")
    pages = tmp_path / "torch_csd-durable" / "pages.csd"
    moved = pages.with_name("moved")
    pages.rename(moved)
    calls = (
        lambda: torch_csd.verify(tmp_path),
        lambda: torch_csd.collect_garbage(tmp_path),
        lambda: KVStore.open(tmp_path, "a", read_only=True),
    )
    for make, reason in (
        (lambda: os.mkfifo(pages, 0o600), "must be a regular file, is a FIFO"),
        (lambda: pages.symlink_to(moved), "is a symbolic link"),
        (lambda: pages.mkdir(), "is a directory"),
        (lambda: None, "the file of pages is missing"),
    ):
        make()
        for call in calls:
            with pytest.raises(StoreError, match=reason):
                call()
        assert any(reason in problem for problem in survey(tmp_path).problems)
        if pages.is_dir():
            pages.rmdir()
        elif os.path.lexists(pages):
            pages.unlink()
    pages.write_bytes(b"no pages " * 1000)
    pages.chmod(0o600)
    assert any("does not begin with CSDPOOL" in problem for problem in survey(tmp_path).problems)


def test_a_file_of_pages_of_another_store_is_told(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        keep(tmp_path / name, name)
    a, b = (tmp_path / name / "torch_csd-durable" / "pages.csd" for name in "ab")
    a.rename(tmp_path / "a.csd"), b.rename(a)
    assert any("belongs to another store" in problem for problem in survey(tmp_path / "a").problems)


def test_a_store_that_is_open_to_others_is_not_taken_for_none(tmp_path):
    keep(tmp_path, "a")
    (tmp_path / "torch_csd-durable").chmod(0o755)
    with pytest.raises(StoreError, match="open to other users"):
        torch_csd.list_sequences(tmp_path)
    assert any("open to other users" in problem for problem in survey(tmp_path).problems)
    (tmp_path / "torch_csd-durable").chmod(0o700)
    (tmp_path / "torch_csd-durable").rename(tmp_path / "elsewhere")
    (tmp_path / "torch_csd-durable").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        torch_csd.list_sequences(tmp_path)


def test_a_directory_without_a_store_has_none(tmp_path):
    assert torch_csd.list_sequences(tmp_path) == [] and survey(tmp_path) is None
    for missing in (tmp_path / "none", tmp_path / "file"):
        if missing.name == "file":
            missing.write_text("")
        for call in (torch_csd.list_sequences, survey):
            with pytest.raises(StoreError, match="no such directory"):
                call(missing)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_who_writes_is_told_and_not_disturbed(tmp_path):
    keep(tmp_path, "a")
    assert survey(tmp_path).writer is None
    (tmp_path / "torch_csd-durable" / "lock").write_text("123456\n")  # one that was killed
    assert survey(tmp_path).writer is None
    with KVStore.open(tmp_path, "a"):
        writer = survey(tmp_path).writer
        assert writer.process == os.getpid() and writer.command
    assert [path.name for path in Path(tmp_path).iterdir()] == ["torch_csd-durable"]


def test_a_closed_catalogue_leaves_nothing_open(tmp_path):
    keep(tmp_path, "a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        survey(tmp_path), torch_csd.verify(tmp_path), torch_csd.list_sequences(tmp_path)
        with pytest.raises(StoreError):
            torch_csd.verify(tmp_path, "b")
    assert len(os.listdir("/proc/self/fd")) == before
    with Catalogue.open(tmp_path / "torch_csd-durable" / "catalogue.sqlite") as catalogue:
        assert catalogue.names() == ["a"]


def test_a_header_is_read_by_itself(tmp_path):
    keep(tmp_path, "a")
    pages = tmp_path / "torch_csd-durable" / "pages.csd"
    with Catalogue.open(pages.with_name("catalogue.sqlite"), read_only=True) as catalogue:
        assert ops.read_header(str(pages)) == (True, catalogue.store_id)
    with KVStore(tmp_path, memory_budget="4MiB"):
        descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        (scratch,) = [p for p in descriptors if os.path.lexists(p) and os.readlink(p).startswith(f"{tmp_path}/")]
        assert ops.read_header(scratch) == (False, bytes(16))
    head = pages.read_bytes()[:4096]
    for bad, reason in (
        (head[:40], "cut short: 40 bytes"),
        (b"NOTAPOOL" + head[8:], "does not begin with CSDPOOL"),
        (head[:8] + b"\3" + head[9:], "version 3 of the format; this torch_csd reads version 2"),
        (head[:12] + b"\0" + head[13:], "byte order mark"),
        (head[:30] + b"\1" + head[31:], "checksum of its header"),
    ):
        (tmp_path / "bad.csd").write_bytes(bad)
        with pytest.raises(StoreError, match=reason):
            ops.read_header(str(tmp_path / "bad.csd"))
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match=str(path)):
            ops.read_header(str(path))
