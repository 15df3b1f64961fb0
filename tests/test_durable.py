"""Durable stores: what was committed is there again, bit for bit; what was not is gone; nobody gets in the way."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from support import DTYPES, random_kv

import torch_csd
from torch_csd import (
    KVStore,
    StoreBusyError,
    StoreClosedError,
    StoreError,
    StoreFullError,
    collect_garbage,
    list_sequences,
    remove_sequence,
    verify,
)

SETTINGS = {"memory_budget": "8MiB", "threads": 1}
KV_DTYPES = ["float32", "bfloat16", "int8", "int4"]


def new_store(directory, name: str = "a", **settings: object) -> KVStore:
    return KVStore(directory, durable=True, name=name, **SETTINGS, **settings)


def open_store(directory, name: str = "a", **settings: object) -> KVStore:
    return KVStore.open(directory, name, **SETTINGS, **settings)


def contents(store: KVStore) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {layer: store.read(layer, kv_end=min(store.lengths(layer))) for layer in store.layers()}


def assert_same(store: KVStore, expected: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    found = contents(store)
    assert found.keys() == expected.keys()
    for layer, (k, v) in expected.items():
        assert torch.equal(found[layer][0], k) and torch.equal(found[layer][1], v), f"layer {layer}"


def run_elsewhere(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own, with the same torch_csd; sys.argv[1:] are the arguments."""
    path = os.pathsep.join([str(Path(torch_csd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- commit and open -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "on the drive"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_was_committed_is_there_again_bit_for_bit(tmp_path, kv_dtype, resident, io_engine):
    k, v = random_kv(3, 2, 500, 24, 40)
    store = new_store(tmp_path, kv_dtype=kv_dtype, resident=resident, io_engine=io_engine, metadata={"by": ["me", 1]})
    for layer in (0, 3):
        store.append(layer, k, v, lengths=[500, 64, 129])
        store.append(layer, k[:, :, :1], v[:, :, :1])
    store.commit()
    committed = contents(store)
    store.append(3, k, v)  # not committed
    store.close()

    store = open_store(tmp_path, resident=resident, io_engine=io_engine)
    assert store.lengths(0) == store.lengths(3) == [501, 65, 130]
    assert store.metadata == {"by": ["me", 1]} and store.name == "a" and store.durable
    assert str(store.kv_dtype).endswith(kv_dtype)
    assert_same(store, committed)
    # It goes on as the store that was closed would have.
    q = torch.randn(3, 4, 1, 24)
    with KVStore(tmp_path, kv_dtype=kv_dtype, **SETTINGS) as never_closed:
        never_closed.append(0, k, v, lengths=[500, 64, 129])
        never_closed.append(0, k[:, :, :1], v[:, :, :1])
        for part in (slice(1, 2), slice(2, 200), slice(200, 201)):
            store.append(0, k[:, :, part], v[:, :, part])
            never_closed.append(0, k[:, :, part], v[:, :, part])
            # Pages that come from the drive are merged as they come: only rounding tells.
            for found, wanted in zip(store.attend(0, q), never_closed.attend(0, q), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert_same(store, contents(never_closed) | {3: committed[3]})
    store.commit()
    committed = contents(store)
    store.close()
    with open_store(tmp_path) as store:
        assert_same(store, committed)
    assert verify(tmp_path) == []


def test_a_second_commit_replaces_the_first_and_a_store_that_is_closed_without_one_changes_nothing(tmp_path):
    k, v = random_kv(1, 2, 300, 16)
    with new_store(tmp_path) as store:
        store.append(0, k[:, :, :100], v[:, :, :100])
        store.commit()
        store.append(0, k[:, :, 100:200], v[:, :, 100:200])
        store.commit()
    with open_store(tmp_path) as store:
        assert store.lengths(0) == [200]
        store.truncate(0, 10)
        store.append(0, v, k)
    with open_store(tmp_path) as store:
        assert_same(store, {0: (k[:, :, :200], v[:, :, :200])})
        store.free(0)
        store.commit()
    with open_store(tmp_path) as store:
        assert store.layers() == []


def test_committed_pages_stay_in_memory_and_leave_it_without_being_written_again(tmp_path):
    k, v = random_kv(1, 4, 2048, 64)
    with KVStore(tmp_path, durable=True, name="a", memory_budget="16MiB", threads=1) as store:
        store.append(0, k, v)
        store.commit()
        stats = store.stats()
        written = stats["drive_written_bytes"]
        assert stats["pages_on_drive"] == 0 and written >= k.nbytes + v.nbytes
        store.commit()
        assert store.stats()["drive_written_bytes"] == written  # no tail, and nothing new
        for layer in range(1, 4):
            store.append(layer, k, v)
        stats = store.stats()
        assert stats["pages_on_drive"] > 32  # room was needed
        store.flush()
        read_k, read_v = store.read(0)
        assert torch.equal(read_k, k) and torch.equal(read_v, v)


def test_trimmed_and_reordered_rows_come_back_as_they_were(tmp_path):
    k, v = random_kv(2, 2, 400, 16)
    with new_store(tmp_path, resident=False) as store:
        store.append(0, k, v)
        store.trim(0, 150)
        store.reorder(0, [1, 0, 1])
        store.commit()
    with open_store(tmp_path) as store:
        assert store.begin(0) == 150 and store.lengths(0) == [400] * 3
        read_k, read_v = store.read(0)
        assert torch.equal(read_k, k[[1, 0, 1], :, 150:]) and torch.equal(read_v, v[[1, 0, 1], :, 150:])
        store.append(0, k[[0, 0, 0], :, :70], v[[0, 0, 0], :, :70])  # rows that share a tail part here
        assert torch.equal(store.read(0)[0][:, :, -70:], k[[0, 0, 0], :, :70])
        store.trim(0, 470)  # everything
        store.commit()
    with open_store(tmp_path) as store:
        assert store.begin(0) == 470 and store.lengths(0) == [470] * 3
        store.append(0, k[[0, 0, 0]], v[[0, 0, 0]])
        assert torch.equal(store.read(0)[0], k[[0, 0, 0]])


def test_an_empty_sequence_can_be_kept(tmp_path):
    with new_store(tmp_path) as store:
        store.commit()
    with open_store(tmp_path) as store:
        assert store.layers() == []
        k, v = random_kv(1, 1, 5, 8)
        store.append(0, k, v)
        store.commit()
    (info,) = list_sequences(tmp_path)
    assert (info.name, info.tokens, info.rows, info.layers) == ("a", 5, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_come_back_in_the_dtype_they_were_appended_in(tmp_path, dtype):
    k, v = random_kv(1, 2, 100, 16, dtype=DTYPES[dtype])
    with new_store(tmp_path, kv_dtype="float32") as store:
        store.append(0, k, v)
        store.commit()
    with open_store(tmp_path) as store:
        assert store.read(0)[0].dtype == DTYPES[dtype]
        assert_same(store, {0: (k, v)})
        with pytest.raises(ValueError, match="takes"):
            other = torch.float16 if dtype != "float16" else torch.float32
            store.append(0, k.to(other), v.to(other))


@pytest.mark.parametrize("comes_through", [True, False])
def test_a_commit_that_failed_may_have_come_through(tmp_path, monkeypatch, comes_through):
    k, v = random_kv(1, 4, 64 * 30, 64)
    with new_store(tmp_path, "keeps the drive open"), new_store(tmp_path) as store:
        store.append(0, k[:, :, :100], v[:, :, :100])
        store.commit()
        store.append(0, k[:, :, 100:], v[:, :, 100:])
        catalogue = store._drive.catalogue
        commit = catalogue.commit

        def fail(sequence):
            if comes_through:
                commit(sequence)
            raise StoreError("the drive said nothing")

        monkeypatch.setattr(catalogue, "commit", fail)
        with pytest.raises(StoreError, match="said nothing"):
            store.commit()
        monkeypatch.undo()
        store.close()
        tokens = 64 * 30 if comes_through else 100
        with open_store(tmp_path) as again:
            assert_same(again, {0: (k[:, :, :tokens], v[:, :, :tokens])})
            again.append(1, k, v)
            again.commit()
            assert_same(again, {0: (k[:, :, :tokens], v[:, :, :tokens]), 1: (k, v)})
    assert verify(tmp_path) == []


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/etc/x", ".", "..", "a\0b", "a\nb", "x" * 201, "\udc80", 7, b"a"])
def test_names_that_mean_something_else_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a name must be"):
        new_store(tmp_path, name)
    with pytest.raises(ValueError, match="a name must be"):
        open_store(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_can_be_what_people_call_things(tmp_path):
    names = ["Über 'uns'; DROP TABLE sequence --", "a b", "📖", "%s", "C:\\x", "-rf", "~"]
    k, v = random_kv(1, 1, 5, 8)
    for name in names:
        with new_store(tmp_path, name) as store:
            store.append(0, k, v)
            store.commit()
    assert [info.name for info in list_sequences(tmp_path)] == sorted(names)
    for name in names:
        with open_store(tmp_path, name) as store:
            assert store.lengths(0) == [5]


def test_a_name_is_given_once(tmp_path):
    k, v = random_kv(1, 1, 5, 8)
    store = new_store(tmp_path)
    with pytest.raises(StoreBusyError, match="'a' is open"):
        new_store(tmp_path)
    store.append(0, k, v)
    store.commit()
    with pytest.raises(StoreBusyError, match="'a' is open"):
        open_store(tmp_path)
    with pytest.raises(StoreBusyError, match="'a' is open"):
        store.fork("a")
    with pytest.raises(StoreBusyError, match="'a' is open"):
        remove_sequence(tmp_path, "a")
    store.close()
    with pytest.raises(StoreError, match="there is a sequence 'a' already"):
        new_store(tmp_path)
    with pytest.raises(StoreError, match="'b'.*'a'"):
        open_store(tmp_path, "b")
    new_store(tmp_path, "b").close()  # never committed: its name is free again
    with new_store(tmp_path, "b") as store:
        with pytest.raises(ValueError, match="metadata"):
            store.metadata = {"x": object()}
            store.commit()


def test_scratch_stores_and_nameless_forks_cannot_be_committed(tmp_path):
    k, v = random_kv(1, 1, 5, 8)
    with KVStore(tmp_path, **SETTINGS) as store:
        store.append(0, k, v)
        with pytest.raises(StoreError, match="durable=True"):
            store.commit()
        with pytest.raises(StoreError, match="durable"):
            store.fork("b")
    with new_store(tmp_path) as store:
        store.append(0, k, v)
        with store.fork() as fork:
            with pytest.raises(StoreError, match="fork\\(name\\)"):
                fork.commit()
    with pytest.raises(ValueError, match="durable=True"):
        KVStore(tmp_path, name="a")
    with pytest.raises(ValueError, match="name"):
        KVStore(tmp_path, durable=True)
    assert list_sequences(tmp_path) == []


# ---- forks ---------------------------------------------------------------------------------------------------------


def test_many_conversations_share_a_committed_prefix(tmp_path):
    k, v = random_kv(1, 4, 64 * 40, 64)
    with new_store(tmp_path, "prefix") as prefix:
        prefix.append(0, k, v)
        prefix.commit()
    with open_store(tmp_path, "prefix") as prefix:
        before = prefix.stats()["file_bytes"]
        written = prefix.stats()["drive_written_bytes"]
        for number in range(20):
            with prefix.fork(f"talk {number}") as talk:
                talk.append(0, k[:, :, number : number + 10], v[:, :, number : number + 10])
                talk.commit()
        stats = prefix.stats()
        assert stats["drive_written_bytes"] - written <= 20 * 2 * 64 * 4 * 64 * 4
        assert stats["file_bytes"] - before < k.nbytes + v.nbytes  # of which each holds as much
    remove_sequence(tmp_path, "prefix")
    for number in range(20):
        with open_store(tmp_path, f"talk {number}") as talk:
            new_k, new_v = (states[:, :, number : number + 10] for states in (k, v))
            assert_same(talk, {0: (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))})
        remove_sequence(tmp_path, f"talk {number}")
    collect_garbage(tmp_path)
    assert (tmp_path / "torch_csd-durable" / "pages.csd").stat().st_size == 2**20


def test_prefixes_are_found_by_their_tokens(tmp_path):
    k, v = random_kv(1, 2, 300, 16)
    ids = torch.arange(300)
    with new_store(tmp_path, "long", metadata={"model": "x"}) as store:
        store.append(0, k, v)
        store.commit(ids)
        assert store.token_ids == [ids.tolist()]
    with new_store(tmp_path, "short", metadata={"model": "x"}) as store:
        store.append(0, k[:, :, :100], v[:, :, :100])
        store.commit(ids[:150][None])  # more than is stored does no harm
    with new_store(tmp_path, "other", metadata={"model": "y"}) as store:
        store.append(0, k, v)
        store.commit(ids)
    with new_store(tmp_path, "new") as store:
        prompt = torch.cat([ids[:200], ids[:50]])
        matches = store.prefix_matches(prompt, wants=lambda metadata: metadata == {"model": "x"})
        assert matches == [("long", 200), ("short", 100)]
        assert store.prefix_matches(ids.flip(0)) == []
        store.use_prefix(matches[0])
        assert_same(store, {0: (k[:, :, :200], v[:, :, :200])})
        store.append(0, k[:, :, :50], v[:, :, :50])
        store.commit(prompt)
        with pytest.raises(ValueError, match="empty"):
            store.use_prefix(matches[0])
    with open_store(tmp_path, "new") as store:
        assert store.lengths(0) == [250] and store.token_ids == [prompt.tolist()]
        store.append(0, k[:, :, :1], v[:, :, :1])
        with pytest.raises(ValueError, match="251"):
            store.commit(prompt)
        with pytest.raises(ValueError, match="token_ids"):
            store.commit(prompt.float())
        store.commit()
        assert store.prefix_matches(prompt)[0].name != "new"  # nobody said what its tokens are


# ---- others --------------------------------------------------------------------------------------------------------

HOLD = """
    import sys, torch, torch_csd
    directory, name, how = sys.argv[1:]
    try:
        if how == "new":
            store = torch_csd.KVStore(directory, durable=True, name=name, memory_budget="8MiB", threads=1)
        else:
            store = torch_csd.KVStore.open(directory, name, read_only=how == "read", memory_budget="8MiB", threads=1)
    except torch_csd.StoreError as error:
        print(type(error).__name__, error)
    else:
        print("open", store.lengths(0), float(store.read(0)[0].sum()) if store.layers() else 0)
"""


def test_one_process_writes_and_others_may_read(tmp_path):
    k, v = random_kv(1, 2, 200, 16)
    with new_store(tmp_path) as store:
        store.append(0, k, v)
        store.commit()
        for how in ("write", "new"):
            held = run_elsewhere(HOLD, tmp_path, "a" if how == "write" else "b", how)
            assert held.stdout.startswith("StoreBusyError") and str(os.getpid()) in held.stdout, held
        read = run_elsewhere(HOLD, tmp_path, "a", "read")
        assert read.stdout.startswith("open [200]"), read
        assert [info.name for info in list_sequences(tmp_path)] == ["a"]
        assert verify(tmp_path) == []
    assert run_elsewhere(HOLD, tmp_path, "a", "write").stdout.startswith("open [200]")


def test_a_reader_keeps_what_it_reads(tmp_path):
    k, v = random_kv(1, 2, 640, 32)
    with new_store(tmp_path, resident=False) as writer:
        writer.append(0, k, v)
        writer.commit()
        with open_store(tmp_path, read_only=True) as reader:
            # All of it goes, and its space would serve others, did nobody read it.
            writer.free(0)
            writer.commit()
            for layer in range(4):
                writer.append(layer, v, k)
            writer.flush()
            writer.commit()
            assert_same(reader, {0: (k, v)})
            with pytest.raises(StoreError, match="read only"):
                reader.append(0, k, v)
            with pytest.raises(StoreError, match="read only"):
                reader.commit()
            with pytest.raises(StoreError, match="open for writing"):
                reader.fork("b")
            with reader.fork() as fork:
                fork.truncate(0, 100)
                assert_same(fork, {0: (k[:, :, :100], v[:, :, :100])})
        size = writer.stats()["file_bytes"]
        writer.free()
        writer.commit()
        writer.append(0, k, v)
        writer.commit()
        assert writer.stats()["file_bytes"] == size  # with the reader gone the space is used again


def test_a_store_is_shared_within_a_process_and_settings_are(tmp_path):
    k, v = random_kv(1, 2, 100, 16)
    with new_store(tmp_path, "a") as a, new_store(tmp_path, "b", kv_dtype="int8") as b:
        a.append(0, k, v)
        b.append(0, v, k)
        a.commit()
        b.commit()
        assert a.kv_dtype is None and b.kv_dtype == torch.int8
        with pytest.raises(ValueError, match="memory_budget_bytes"):
            KVStore.open(tmp_path, "a", memory_budget="16MiB", threads=1)
    KVStore.open(tmp_path, "a", memory_budget="16MiB").close()
    with pytest.raises(StoreClosedError):
        a.commit()


def test_a_forked_child_gets_an_error_and_the_parent_goes_on(tmp_path):
    k, v = random_kv(1, 2, 100, 16)
    store = new_store(tmp_path)
    store.append(0, k, v)
    store.commit()

    def child(results) -> None:
        kinds = []
        for use in (
            lambda: store.append(0, k, v),
            lambda: store.commit(),
            lambda: store.read(0),
            lambda: store.fork("b"),
            lambda: open_store(tmp_path, "c"),
            lambda: remove_sequence(tmp_path, "a"),
        ):
            try:
                use()
                kinds.append("nothing")
            except StoreError as error:
                kinds.append(type(error).__name__)
        store.close()
        results.put(kinds)

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, args=(results,))
    process.start()
    kinds = results.get(timeout=60)
    process.join(60)
    assert kinds[:4] == ["StoreClosedError"] * 4 and kinds[4:] == ["StoreBusyError"] * 2, kinds
    store.append(0, k, v)
    store.commit()
    store.close()
    with open_store(tmp_path) as store:
        assert store.lengths(0) == [200]


def test_several_threads_commit_and_attend(tmp_path):
    k, v = random_kv(1, 2, 200, 16)
    q = torch.randn(1, 4, 1, 16)
    failures = []

    def work(number: int) -> None:
        try:
            with new_store(tmp_path, f"{number}", resident=False) as store:
                for _ in range(5):
                    store.append(0, k, v)
                    store.attend(0, q)
                    store.commit()
                with store.fork(f"{number} fork") as fork:
                    fork.truncate(0, 300)
                    fork.commit()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert len(list_sequences(tmp_path)) == 12 and verify(tmp_path) == []
    for number in range(6):
        with open_store(tmp_path, f"{number}") as store:
            assert_same(store, {0: (torch.cat([k] * 5, 2), torch.cat([v] * 5, 2))})
        with open_store(tmp_path, f"{number} fork") as store:
            assert store.lengths(0) == [300]


# ---- space ---------------------------------------------------------------------------------------------------------


def test_space_is_used_again_and_given_back(tmp_path):
    k, v = random_kv(1, 4, 64 * 16, 64)
    path = tmp_path / "torch_csd-durable" / "pages.csd"
    for _ in range(5):
        with new_store(tmp_path) as store:
            store.append(0, k, v)
            store.commit()
        size = path.stat().st_size
        remove_sequence(tmp_path, "a")
        assert path.stat().st_size == size <= 2**20 + 2 * (k.nbytes + v.nbytes)
    with new_store(tmp_path) as store:
        store.append(0, k, v)  # 16 pages that are not committed
    assert collect_garbage(tmp_path) == size - 2**20
    assert path.stat().st_size == 2**20
    assert collect_garbage(tmp_path) == 0


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "scratch"])
def test_max_bytes_fails_an_append_with_the_numbers_and_leaves_what_was_there(tmp_path, durable):
    k, v = random_kv(1, 4, 64 * 8, 64)
    settings = {"durable": True, "name": "a"} if durable else {}
    with KVStore(tmp_path, max_bytes="6MiB", memory_budget="1MiB", threads=1, **settings) as store:
        layer = 0
        with pytest.raises(StoreFullError, match=f"max_bytes={6 * 2**20}"):
            for layer in range(100):
                store.append(layer, k, v)
        assert 2 <= layer < 8 and layer not in store.layers()
        q = torch.randn(1, 4, 1, 64)
        for earlier in range(layer):
            read_k, read_v = store.read(earlier)
            assert torch.equal(read_k, k) and torch.equal(read_v, v)
            store.attend(earlier, q)
        assert store.stats()["file_bytes"] <= 6 * 2**20
        with pytest.raises(StoreFullError, match="wanted room for"):
            store.check_room(k, v, layer_count=50)
        store.check_room(k[:, :, :1], v[:, :, :1], layer_count=50)
        store.free(0)
        store.append(layer, k, v)  # its room serves
        assert torch.equal(store.read(layer)[0], k)


def test_a_commit_that_finds_no_room_leaves_the_one_before(tmp_path):
    k, v = random_kv(1, 4, 64 * 8, 64)
    with new_store(tmp_path, max_bytes="4MiB") as store:
        store.append(0, k, v)
        store.commit()
        for layer in range(1, 5):
            store.append(layer, k, v)  # in memory
        with pytest.raises(StoreFullError, match="max_bytes"):
            store.commit()
        for layer in range(5):
            assert torch.equal(store.read(layer)[0], k)
        for layer in (2, 3, 4):
            store.free(layer)
        store.commit()
        store.append(5, k, v)
    with open_store(tmp_path) as store:
        assert_same(store, {0: (k, v), 1: (k, v)})
    assert verify(tmp_path) == []


def test_a_commit_writes_nothing_that_others_stored(tmp_path):
    k = torch.full((1, 2, 1000, 16), 1.2345678)
    with new_store(tmp_path) as store:
        store.append(0, k, k)  # in memory, and never committed
        store.free(0)
        store.append(1, torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
        store.commit()
    pages = (tmp_path / "torch_csd-durable" / "pages.csd").read_bytes()
    assert k.flatten()[:1].numpy().tobytes() not in pages


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_files_are_this_users_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        k, v = random_kv(1, 1, 70, 8)
        with new_store(tmp_path) as store:
            store.append(0, k, v)
            store.commit()
    finally:
        os.umask(before)
    home = tmp_path / "torch_csd-durable"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()}
    assert names == dict.fromkeys(names, 0o600) and {"pages.csd", "catalogue.sqlite"} <= names.keys()
    assert list(tmp_path.iterdir()) == [home]


def test_a_directory_without_a_store_says_so(tmp_path):
    assert list_sequences(tmp_path) == []
    for use in (lambda: open_store(tmp_path), lambda: verify(tmp_path), lambda: collect_garbage(tmp_path)):
        with pytest.raises(StoreError, match="no durable store"):
            use()
    with pytest.raises(StoreError, match="no such directory"):
        list_sequences(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="No such file|no such directory"):
        new_store(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_store_that_was_never_complete_is_replaced(tmp_path):
    home = tmp_path / "torch_csd-durable"
    home.mkdir(mode=0o700)
    for name in ("pages.csd", "catalogue.sqlite.new", "catalogue.sqlite.new-journal"):
        (home / name).write_bytes(b"half")
        (home / name).chmod(0o600)
    with pytest.raises(StoreError, match="no durable store"):
        open_store(tmp_path)
    k, v = random_kv(1, 1, 70, 8)
    with new_store(tmp_path) as store:
        store.append(0, k, v)
        store.commit()
    with open_store(tmp_path) as store:
        assert_same(store, {0: (k, v)})


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["float32", "int4"])
def test_what_is_opened_comes_back_into_memory_as_far_as_there_is_room(tmp_path, kv_dtype):
    k, v = random_kv(2, 4, 64 * 20 + 5, 64)
    with new_store(tmp_path, kv_dtype=kv_dtype) as store:
        for layer in range(3):
            store.append(layer, k, v)
        store.commit()
    q = torch.randn(2, 8, 1, 64)

    def step(store):
        before = store.stats()
        out = [store.attend(layer, q)[0] for layer in range(3)]
        after = store.stats()
        assert after["memory_used_bytes"] <= after["memory_budget_bytes"]
        return out, after["drive_read_bytes"] - before["drive_read_bytes"]

    with KVStore.open(tmp_path, "a", memory_budget="128MiB", threads=1) as store:
        first, read_bytes = step(store)
        assert read_bytes > 0 and store.stats()["pages_on_drive"] == 0
        second, read_again_bytes = step(store)
        assert read_again_bytes == 0
    with KVStore.open(tmp_path, "a", memory_budget="128MiB", threads=1, resident=False) as store:
        cold, read_bytes = step(store)
        assert step(store)[1] > 0 and store.stats()["pages_resident"] == 0
    with KVStore.open(tmp_path, "a", memory_budget="4MiB", threads=1) as store:
        small, read_bytes = step(store)
        assert 0 < step(store)[1] <= read_bytes
        store.append(0, k, v)
        assert torch.equal(store.read(1)[0][:, :, -5:], k[:, :, -5:])
    with KVStore.open(tmp_path, "a", memory_budget="128MiB", threads=1) as store:
        store.attend(0, q)
        store.append(0, k, v)
        store.append(1, k, v)  # not attended to
        store.commit()
    assert verify(tmp_path) == []
    for other in (second, cold, small):
        for found, wanted in zip(other, first, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
