"""Leases of pages, and appends of which somebody outside of the drive writes the pages."""

from __future__ import annotations

import os

import pytest
import torch
from support import assert_attention_equal, random_kv

from torch_csd import KVStore, MemoryBudgetError, PageTopK, StoreClosedError, StoreFullError, ops, reference

KINDS = ["float32", "bfloat16", "int8", "int4"]


def pages_path(store: KVStore) -> str:
    return os.path.join(store.directory, "torch_csd-durable", "pages.csd")


def lease_all(store: KVStore, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    handle = store.layer(layer).handle
    lease = ops.new_lease(handle)
    rows = len(store.lengths(layer))
    begin = store.begin(layer)
    return lease, ops.lease(lease, handle, row_begin=0, row_count=rows, kv_begin=begin, kv_end=-1)


@pytest.fixture
def source(tmp_path_factory):
    """Images of the pages that a store makes of k and v, and their checksums: ``[rows, pages, page_bytes]``."""

    def make(k: torch.Tensor, v: torch.Tensor, kv_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        directory = tmp_path_factory.mktemp("source")
        with KVStore(
            directory, kv_dtype=kv_dtype, memory_budget="32MiB", resident=False, durable=True, name="source"
        ) as store:
            store.append(0, k, v)
            store.flush()
            lease, table = lease_all(store)
            assert (table[:, ops.FILE_OFFSET] > 0).all()
            page_bytes = page_bytes_of(lease)
            with open(pages_path(store), "rb") as file:
                images = [os.pread(file.fileno(), page_bytes, int(offset)) for offset in table[:, ops.FILE_OFFSET]]
            ops.end_lease(lease)
        images = torch.stack([torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in images])
        rows = k.shape[0]
        return images.view(rows, -1, page_bytes), table[:, ops.CHECKSUM].view(rows, -1)

    return make


def page_bytes_of(lease: torch.Tensor) -> int:
    """By what the lease says of memory that is too small for one."""
    with pytest.raises(ValueError, match=r"wanted (\d+) bytes") as error:
        ops.copy_leased(lease, [0], torch.empty(0, dtype=torch.uint8), 0)
    return int(str(error.value).split()[1])


def arrive(store: KVStore, lease: torch.Tensor, table: torch.Tensor, images: torch.Tensor, checksums: torch.Tensor):
    """Brings the reserved pages' bytes, to memory and to the drive."""
    first = int(table[0, ops.INDEX]) if len(table) else 0
    with open(pages_path(store), "r+b") as file:
        for place, (_, row, index, file_offset, _) in enumerate(table.tolist()):
            image = images[row, index - first]
            if file_offset < 0:
                ops.fill_reserved(lease, [place], image.contiguous(), 0)
            else:
                os.pwrite(file.fileno(), bytes(image.tolist()), file_offset)
                ops.finish_reserved(lease, [place], [int(checksums[row, index - first])])
    ops.end_lease(lease)


def around(x: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    return torch.cat([x[:, :, :begin], x[:, :, begin + count :]], dim=2)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 64, 100])
def test_an_append_whose_pages_others_write_is_an_append(tmp_path, source, kind, resident, before):
    k, v = random_kv(2, 2, 700, 16, 24, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    begin, count = -before % 64, 384
    first = (before + begin) // 64
    images, checksums = source(k, v, kind)
    settings = dict(kv_dtype=kind, memory_budget="16MiB", resident=resident, durable=True)
    with KVStore(tmp_path, name="ours", **settings) as store:
        if before:
            store.append(0, k[:, :, :before], v[:, :, :before])
            handle = store.layer(0).handle
        else:
            store.append(0, k[:, :, :1], v[:, :, :1])  # makes the layer
            store.truncate(0, 0)
            handle = store.layer(0).handle
        lease = ops.new_lease(handle)
        new = [around(x[:, :, before:], begin, count) for x in (k, v)]
        state, table = ops.append_reserved(lease, handle, *new, reserved_begin=begin, reserved_count=count)
        assert state.lengths == [700, 700]
        assert table[:, ops.ROW].tolist() == [0] * 6 + [1] * 6
        assert table[:, ops.INDEX].tolist() == [*range(first, first + 6)] * 2
        assert ((table[:, ops.FILE_OFFSET] == -1) == resident).all()
        with pytest.raises(RuntimeError, match="on their way"):
            store.attend(0, torch.randn(2, 4, 1, 16))
        arrive(store, lease, table, images[:, first:], checksums[:, first:])

        with KVStore(tmp_path / "..", kv_dtype=kind, memory_budget="16MiB") as plain:
            plain.append(0, k[:, :, : before or 700], v[:, :, : before or 700])
            if before:
                plain.append(0, k[:, :, before:], v[:, :, before:])
            for ours, theirs in zip(store.read(0), plain.read(0), strict=True):
                assert torch.equal(ours, theirs)
        # It goes on like any other: more tokens, a fork, a commit.
        more = random_kv(2, 2, 200, 16, 24, dtype=k.dtype, seed=1)
        fork = store.fork()
        store.append(0, *more)
        q = torch.randn(2, 4, 1, 16)
        stored = store.read(0)
        expected = reference.attention(q, *stored)[0].float()
        torch.testing.assert_close(store.attend(0, q)[0], expected, atol=1e-4, rtol=0)  # codes: q has 16 bits
        assert fork.lengths(0) == [700, 700]
        fork.close()
        store.commit()
    with KVStore.open(tmp_path, "ours", memory_budget="16MiB") as again:
        for ours, theirs in zip(again.read(0), stored, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("before", [0, 70])
def test_an_append_whose_pages_do_not_all_arrive_is_undone(make_store, before):
    k, v = random_kv(1, 2, 640, 16)
    old = [x[:, :, :before] for x in random_kv(1, 2, 640, 16, seed=1)]
    store = make_store(resident=False)
    store.append(0, *old)
    handle, begin = store.layer(0).handle, -before % 64
    lease = ops.new_lease(handle)
    new = [around(x, begin, 512) for x in (k, v)]
    state, _ = ops.append_reserved(lease, handle, *new, reserved_begin=begin, reserved_count=512)
    assert state.lengths == [before + 640]
    ops.finish_reserved(lease, [0], [0])
    ops.end_lease(lease)
    assert store.lengths(0) == [before]
    store.append(0, k, v)
    for ours, *parts in zip(store.read(0), old, (k, v), strict=True):
        assert torch.equal(ours, torch.cat(parts, 2))


def test_reserved_pages_are_whole_pages_that_stay(make_store):
    k, v = random_kv(1, 2, 64, 16)
    store = make_store(kv_dtype="int8")
    store.append(0, *random_kv(1, 2, 10, 16))
    handle = store.layer(0).handle
    for begin, count in ((0, 64), (54, 60), (54, 128)):  # not at a page's start, not its end, and a tail
        with pytest.raises(ValueError, match="only whole pages"):
            ops.append_reserved(ops.new_lease(handle), handle, k, v, reserved_begin=begin, reserved_count=count)
        assert store.lengths(0) == [10]
    with pytest.raises(ValueError, match="must begin within"):
        ops.append_reserved(ops.new_lease(handle), handle, k, v, reserved_begin=65, reserved_count=64)


def test_reserving_more_than_the_drive_has_changes_nothing(make_store):
    store = make_store(max_bytes="3MiB", resident=False)
    k, v = random_kv(1, 2, 10, 64)
    store.append(0, k, v)
    handle = store.layer(0).handle
    k, v = random_kv(1, 2, 54, 64, seed=1)
    with pytest.raises(StoreFullError):
        ops.append_reserved(ops.new_lease(handle), handle, k, v, reserved_begin=54, reserved_count=64000)
    assert store.lengths(0) == [10]
    assert torch.equal(store.read(0)[0], random_kv(1, 2, 10, 64)[0])


def test_pages_that_wait_for_their_bytes_leave_room_for_tails(make_store):
    store = make_store(memory_budget="4MiB")
    k, v = random_kv(1, 2, 64, 64)
    store.append(0, k, v)
    handle = store.layer(0).handle
    lease = ops.new_lease(handle)
    none = [x[:, :, :0] for x in (k, v)]
    _, table = ops.append_reserved(lease, handle, *none, reserved_begin=0, reserved_count=64 * 200)
    in_memory = int((table[:, ops.FILE_OFFSET] < 0).sum())
    assert 0 < in_memory < 200
    try:
        for layer in range(1, 12):
            store.append(layer, k[:, :, :40], v[:, :, :40])
    except MemoryBudgetError as error:
        pytest.fail(f"no room for a tail: {error}")
    ops.end_lease(lease)
    assert store.lengths(0) == [64]


@pytest.mark.parametrize("kind", KINDS)
def test_leased_pages_outlive_their_layer(make_store, kind):
    k, v = random_kv(2, 2, 400, 16, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    store = make_store(kv_dtype=kind)
    store.append(0, k, v)
    lease, table = lease_all(store)
    full = {"int8": 5, "int4": 5}.get(kind, 6)
    assert table[:, ops.INDEX].tolist() == [*range(full)] * 2
    page_bytes = page_bytes_of(lease)
    memory = torch.zeros(len(table) * page_bytes + 64, dtype=torch.uint8)
    places = [*range(len(table))]
    assert (ops.copy_leased(lease, places, memory, 0)[:, 0] == -1).all()
    store.free(0)
    again = torch.zeros_like(memory)
    ops.copy_leased(lease, places[::-1], again, 64)
    there = again[64:].view(len(table), page_bytes).flip(0)
    assert torch.equal(there, memory[:-64].view(len(table), page_bytes))
    ops.end_lease(lease)
    ops.end_lease(lease)
    with pytest.raises(StoreClosedError, match="this lease has ended"):
        ops.copy_leased(lease, [0], memory, 0)


def test_the_place_of_a_leased_page_on_the_drive_is_not_used_for_others(make_store, tmp_path):
    store = make_store(resident=False, durable=True, name="a")
    k, v = random_kv(1, 2, 640, 64)
    store.append(0, k, v)
    store.flush()
    lease, table = lease_all(store)
    size = page_bytes_of(lease)
    with open(pages_path(store), "rb") as file:
        before = [os.pread(file.fileno(), size, int(offset)) for offset in table[:, ops.FILE_OFFSET]]
        store.free(0)
        for layer in range(4):
            store.append(layer, *random_kv(1, 2, 640, 64, seed=layer + 1))
        store.flush()
        assert before == [os.pread(file.fileno(), size, int(offset)) for offset in table[:, ops.FILE_OFFSET]]
        ops.end_lease(lease)


def test_rows_that_share_pages_share_them_in_a_lease(make_store):
    store = make_store()
    store.append(0, *random_kv(1, 2, 200, 16))
    store.reorder(0, [0, 0])
    store.append(0, *random_kv(2, 2, 200, 16))
    _, table = lease_all(store)
    pages = table[:, ops.PAGE].view(2, 6)
    assert torch.equal(pages[0, :3], pages[1, :3])
    assert not (pages[0, 3:] == pages[1, 3:]).any()


def test_sparse_attention_catches_up_with_pages_that_others_wrote(tmp_path, source):
    k, v = random_kv(1, 2, 1280, 16)
    images, checksums = source(k, v, "float32")
    sparse = PageTopK(fraction=0.25, local=64, sink=0)
    with KVStore(tmp_path, memory_budget="16MiB", durable=True, name="ours", sparse=sparse) as store:
        store.append(0, k[:, :, :64], v[:, :, :64])
        handle = store.layer(0).handle
        lease = ops.new_lease(handle)
        _, table = ops.append_reserved(
            lease, handle, k[:, :, 1216:], v[:, :, 1216:], reserved_begin=0, reserved_count=1152
        )
        arrive(store, lease, table, images[:, 1:], checksums[:, 1:])
        q = torch.randn(1, 4, 1, 16)
        out, _ = store.attend(0, q)
        with KVStore(tmp_path / "..", memory_budget="16MiB", sparse=sparse) as plain:
            plain.append(0, k, v)
            assert torch.equal(out, plain.attend(0, q)[0])


def test_what_is_read_ahead_of_a_pass_is_no_page_that_lacks_its_bytes(tmp_path, source):
    k, v = random_kv(1, 2, 1280, 64)
    images, checksums = source(k, v, "float32")
    with KVStore(tmp_path, memory_budget="16MiB", durable=True, name="ours", resident=False) as store:
        q = torch.randn(1, 4, 1, 64)
        for layer in range(2):
            store.append(layer, k[:, :, :128], v[:, :, :128])
        store.flush()
        for _ in range(3):
            for layer in range(2):
                store.attend(layer, q)
        handle = store.layer(1).handle
        lease = ops.new_lease(handle)
        _, table = ops.append_reserved(
            lease, handle, k[:, :, 1216:], v[:, :, 1216:], reserved_begin=0, reserved_count=1088
        )
        store.attend(0, q)  # begins to read what layer 1 will need
        arrive(store, lease, table, images[:, 2:], checksums[:, 2:])
        assert_attention_equal(store.attend(1, q)[0], reference.attention(q, k, v)[0])
