from __future__ import annotations

import json
import os
import struct

import pytest
import torch

import torch_csd
from torch_csd.cli.drive import parse_pool_header


def pool_header(magic: bytes = b"CSDPOOL\0", mark: int = 0x01020304, version: int = 1, lifetime: int = 0) -> bytes:
    return struct.pack("<8sIIIIIIQ", magic, version, mark, 40, 64, 4096, lifetime, 1 << 20)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"CSDPOOL\0", "cut short: 8 bytes"),
        (pool_header(magic=b"NOTAPOOL"), "not a pool file"),
        (pool_header(mark=5), "byte order mark is wrong"),
        (pool_header(version=2), "version 2; this torch_csd reads version 1"),
        (pool_header(lifetime=9), "lifetime 9"),
    ],
)
def test_a_header_that_is_none_says_why(head, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pool_header(head)


def test_the_header_of_a_real_scratch_file_is_read(tmp_path):
    with torch_csd.KVStore(tmp_path, memory_budget="4MiB"):
        descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        (path,) = [p for p in descriptors if os.path.lexists(p) and os.readlink(p).startswith(f"{tmp_path}/")]
        with open(path, "rb") as file:
            header = parse_pool_header(file.read(40))
    assert header == {
        "version": 1,
        "header_bytes": 40,
        "page_tokens": 64,
        "block_bytes": 4096,
        "lifetime": "scratch",
        "data_offset": 1 << 20,
    }


def test_probe_shows_the_choice_and_every_verdict(csd, tmp_path):
    result = csd("probe", tmp_path)
    assert result.exit_code == 0
    for word in ("file system", "I/O engine", "direct I/O", "io_uring", "pread", "reason"):
        assert word in result.stdout


def test_probe_as_json_is_what_the_library_says(csd, tmp_path):
    shown = json.loads(csd("probe", tmp_path, "--json").stdout)
    told = torch_csd.probe(tmp_path)
    shown.pop("free_bytes"), told.pop("free_bytes")  # other processes write too
    assert shown == told


def test_probe_measures_rates_that_a_drive_can_have(csd, tmp_path):
    rates = json.loads(csd("probe", tmp_path, "--measure", "--json").stdout)
    for name in ("write_bytes_per_s", "read_bytes_per_s"):
        assert 1 << 20 < rates[name] < 1 << 40
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_pool_files_and_what_is_wrong_with_one(csd, tmp_path):
    (tmp_path / "good.csd").write_bytes(pool_header())
    (tmp_path / "short.csd").write_bytes(b"CSD")
    shown = csd("inspect", tmp_path).stdout
    assert "good.csd" in shown and "64 tokens" in shown
    assert "short.csd" in shown and "cut short" in shown
    pools = json.loads(csd("inspect", tmp_path, "--json").stdout)["pools"]
    assert [pool["name"] for pool in pools] == ["good.csd", "short.csd"]
    assert pools[0]["header"]["version"] == 1 and pools[1]["header"] is None


def test_inspect_shows_the_scratch_file_of_a_running_store(csd, tmp_path):
    k = torch.randn(1, 2, 640, 64)
    with torch_csd.KVStore(tmp_path, memory_budget="8MiB", resident=False) as store:
        store.append(0, k, k)
        store.attend(0, torch.randn(1, 2, 1, 64))
        (file,) = json.loads(csd("inspect", tmp_path, "--json").stdout)["scratch"]
        assert file["process"] == os.getpid()
        assert file["allocated_bytes"] >= store.stats()["drive_written_bytes"] > 0
        assert str(os.getpid()) in csd("inspect", tmp_path).stdout
    assert json.loads(csd("inspect", tmp_path, "--json").stdout)["scratch"] == []


@pytest.mark.parametrize("command", ["probe", "inspect"])
def test_a_directory_that_is_not_there_is_one_line(csd, tmp_path, command):
    result = csd(command, tmp_path / "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "no such directory" in result.stderr
