"""Quantised copies of weights: made once, found again, and never used unless they are as they were written."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from torch_csd import StoreBusyError, StoreCorruptError, StoreError, StoreFullError, ops, reference
from torch_csd.weights import convert as conversion
from torch_csd.weights.convert import Target, conversion_path, convert
from torch_csd.weights.files import read_header
from torch_csd.weights.layout import Join, Region, aten
from torch_csd.weights.stream import Stream
from torch_csd.weights.tensor import FileTensor

WEIGHTS = {
    "first": torch.randn(96, 130, generator=torch.Generator().manual_seed(1)),
    "second": torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "experts": torch.randn(3, 48, 70, generator=torch.Generator().manual_seed(3)),
}


@pytest.fixture
def stream():
    stream = Stream(4 * 2**20)
    yield stream
    stream.close()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    return file


def targets_of(checkpoint: Path, stream: Stream, bits: int = 4) -> list[Target]:
    file = stream.open(checkpoint)
    return [
        Target(entry.name, Region.make(file, entry.dtype, entry.shape, entry.offset), bits, torch.float32)
        for entry in read_header(checkpoint).entries.values()
    ]


def made(checkpoint: Path, stream: Stream, directory: Path, *, bits: int = 4, **options: object) -> dict:
    targets = targets_of(checkpoint, stream, bits)
    return convert(targets, stream, conversion_path(str(directory), "model", targets), **options)


def parts_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/rows-*.safetensors"))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_copies_hold_the_codes_of_the_specification(checkpoint, stream, tmp_path, bits):
    for name, codes in made(checkpoint, stream, tmp_path, bits=bits).items():
        weight = WEIGHTS[name].float()
        assert codes.shape == weight.shape
        stored = FileTensor(codes, stream).to_dense()
        flat = weight.reshape(-1, weight.shape[-1])
        rows = reference.quantise_rows(flat, bits)
        expected = reference.dequantise_rows(rows, bits=bits, in_features=flat.shape[-1])
        torch.testing.assert_close(stored.reshape(flat.shape), expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 300])
def test_linear_runs_on_the_codes(checkpoint, stream, tmp_path, rows):
    codes = FileTensor(made(checkpoint, stream, tmp_path)["first"], stream)
    x, bias = torch.randn(2, rows, 130), torch.randn(96)
    expected = functional.linear(x, codes.to_dense(), bias)
    # Both are fp32; they add up in another order.
    torch.testing.assert_close(functional.linear(x, codes, bias), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x @ codes.t() + bias, expected, rtol=1e-5, atol=1e-4)


def test_views_of_codes_are_those_of_the_weight(checkpoint, stream, tmp_path):
    experts = FileTensor(made(checkpoint, stream, tmp_path)["experts"], stream)
    dense = experts.to_dense()
    for view in (
        lambda each: each[1],
        lambda each: each[1:, 3:9],
        lambda each: each[-1].t(),
        lambda each: each.mT[0],
        lambda each: each.mT[:, :, 2:5],
        lambda each: each.unbind(0)[2],
        lambda each: each.detach().clone(),
    ):
        assert torch.equal(view(experts).to_dense(), view(dense))
    with pytest.raises(NotImplementedError, match="to_dense"):
        experts[:, :, 3:]
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = torch.randn(7, 70)
    expected = torch.cat([x[:2] @ dense[0].t(), x[2:] @ dense[2].t()])
    torch.testing.assert_close(functional.grouped_mm(x, experts.mT, offs=offs), expected, rtol=1e-5, atol=1e-4)


def test_rows_of_an_embedding_are_dequantised(checkpoint, stream, tmp_path):
    codes = FileTensor(made(checkpoint, stream, tmp_path)["first"], stream)
    ids = torch.tensor([[3, 95], [3, 0]])
    assert torch.equal(functional.embedding(ids, codes), codes.to_dense()[ids])


def test_joined_and_transposed_weights_are_converted(checkpoint, stream, tmp_path):
    file = stream.open(checkpoint)
    entry = read_header(checkpoint).entries["experts"]
    experts = Region.make(file, entry.dtype, entry.shape, entry.offset)
    parts = [experts.apply(aten.select.int, (0, index), {}) for index in (2, 0)]
    both = Join.make(parts, 0)
    across = experts.apply(aten.transpose.int, (1, 2), {})
    targets = [Target("both", both, 8, torch.float32), Target("across", across, 8, torch.float32)]
    codes = convert(targets, stream, str(tmp_path / "made"))
    for name, weight in (("both", torch.cat([WEIGHTS["experts"][2], WEIGHTS["experts"][0]])),
                         ("across", WEIGHTS["experts"].mT)):  # fmt: skip
        assert codes[name].shape == weight.shape
        scale = (weight.amax() - weight.amin()) / 255
        assert (FileTensor(codes[name], stream).to_dense() - weight).abs().max() <= scale


def test_a_second_time_nothing_is_written_and_nothing_of_the_weights_read(checkpoint, stream, tmp_path):
    made(checkpoint, stream, tmp_path)
    before = {part: part.stat().st_mtime_ns for part in parts_of(tmp_path)}
    read = stream.stats()["bytes_read"]
    told = []
    made(checkpoint, stream, tmp_path, progress=lambda done, total: told.append(done))
    assert {part: part.stat().st_mtime_ns for part in parts_of(tmp_path)} == before
    assert stream.stats()["bytes_read"] == read and told == []


def test_the_originals_are_never_written_to(checkpoint, stream, tmp_path):
    checkpoint.chmod(0o444)
    before = (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns)
    made(checkpoint, stream, tmp_path)
    assert (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns) == before


def test_an_interrupted_conversion_goes_on_with_the_next_part(checkpoint, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_PART_BYTES", 1)  # each weight has a part of its own
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(parts_of(tmp_path)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(checkpoint, stream, tmp_path, progress=stop)
    finished = {part: part.stat().st_mtime_ns for part in parts_of(tmp_path)}
    assert len(finished) == 2
    codes = made(checkpoint, stream, tmp_path)
    assert {part: part.stat().st_mtime_ns for part in parts_of(tmp_path)}.items() >= finished.items()
    assert len(parts_of(tmp_path)) == 3 and set(codes) == set(WEIGHTS)
    assert not list(tmp_path.glob("*/*.part"))
    for name, weight in WEIGHTS.items():
        assert FileTensor(codes[name], stream).to_dense().shape == weight.shape


def test_a_finished_part_that_was_damaged_is_found_before_others_follow(checkpoint, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "_PART_BYTES", 1)

    def stop(done: int, total: int) -> None:
        if parts_of(tmp_path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(checkpoint, stream, tmp_path, progress=stop)
    flip_last_byte(parts_of(tmp_path)[0])
    with pytest.raises(StoreCorruptError, match=r"rows-00000.*not as it was written.*CRC-32.*remove"):
        made(checkpoint, stream, tmp_path)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_reads_and_compares_all_of_it(checkpoint, stream, tmp_path):
    made(checkpoint, stream, tmp_path)
    made(checkpoint, stream, tmp_path, verify=True)
    flip_last_byte(parts_of(tmp_path)[0])
    with pytest.raises(StoreCorruptError, match="not as it was written"):
        made(checkpoint, stream, tmp_path, verify=True)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_part_that_is_cut_short_or_gone_is_found_without_verify(checkpoint, stream, tmp_path, damage):
    made(checkpoint, stream, tmp_path)
    (part,) = parts_of(tmp_path)
    if damage == "cut":
        os.truncate(part, part.stat().st_size - 64)
    else:
        part.unlink()
    with pytest.raises(StoreCorruptError, match="rows-00000"):
        made(checkpoint, stream, tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "digest": "x", "parts": []}', '{"parts": [1]}'])
def test_a_manifest_that_is_none_is_refused(checkpoint, stream, tmp_path, text):
    made(checkpoint, stream, tmp_path)
    (manifest,) = tmp_path.glob("*/manifest.json")
    manifest.write_text(text)
    with pytest.raises(StoreCorruptError, match="manifest"):
        made(checkpoint, stream, tmp_path)


def test_another_checkpoint_gets_a_directory_of_its_own(checkpoint, stream, tmp_path):
    first = conversion_path("d", "model", targets_of(checkpoint, stream))
    assert first == conversion_path("d", "model", targets_of(checkpoint, stream))
    assert first != conversion_path("d", "model", targets_of(checkpoint, stream, bits=8))
    save_file(WEIGHTS | {"first": WEIGHTS["first"] + 1}, checkpoint)
    with Stream(4 * 2**20) as other:
        assert first != conversion_path("d", "model", targets_of(checkpoint, other))


def test_two_processes_do_not_write_at_once(checkpoint, stream, tmp_path):
    targets = targets_of(checkpoint, stream)
    path = conversion_path(str(tmp_path), "model", targets)
    os.makedirs(path)
    with open(os.path.join(path, "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreBusyError, match="another process"):
            convert(targets, stream, path)
    assert set(convert(targets, stream, path)) == set(WEIGHTS)


def test_too_little_room_is_said_before_anything_is_written(checkpoint, stream, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreFullError, match=r"take \d+ bytes more, 1000 are free"):
        made(checkpoint, stream, tmp_path)
    assert parts_of(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(checkpoint, stream, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        made(checkpoint, stream, tmp_path / "file")


def test_a_source_that_changes_meanwhile_ends_the_conversion(checkpoint, stream, tmp_path):
    targets = targets_of(checkpoint, stream)
    os.utime(checkpoint, ns=(1, 1))
    with pytest.raises(StoreError, match="changed"):
        convert(targets, stream, str(tmp_path / "made"))
    assert not list((tmp_path / "made").glob("rows-*.safetensors"))


def test_parts_are_safetensors_files_that_others_can_read(checkpoint, stream, tmp_path):
    from safetensors import safe_open

    made(checkpoint, stream, tmp_path)
    (part,) = parts_of(tmp_path)
    with safe_open(part, "pt") as file:
        rows = file.get_tensor("first")
    assert rows.shape == (96, ops.weight_row_bytes(4, 130)) and rows.dtype == torch.uint8
    assert json.loads((part.parent / "manifest.json").read_text())["parts"][0]["bytes"] == part.stat().st_size
