from __future__ import annotations

import json

import torch_csd


def test_probe_shows_the_choice_and_every_verdict(csd, tmp_path):
    result = csd("probe", tmp_path)
    assert result.exit_code == 0
    for word in ("file system", "I/O engine", "direct I/O", "io_uring", "pread", "reason", "GPU I/O"):
        assert word in result.stdout


def test_probe_says_which_way_a_gpu_gets_and_why(csd, tmp_path, monkeypatch):
    from torch_csd.cuda import probe

    def told(path, reason, *verdicts):
        verdict = probe.GpuIoVerdict(path, reason, verdicts, {"torch": "2"})
        monkeypatch.setattr(probe, "probe_gpu_io", lambda directory, device_index: verdict)
        return " ".join(csd("probe", tmp_path).stdout.split())

    assert "GPU I/O none: no CUDA device (torch 2.13.0+cpu)" in told("none", "no CUDA device (torch 2.13.0+cpu)")
    shown = told("pinned", "kvikio cannot be imported [x]", "kvikio: no", "cuFile: [no]")
    assert "GPU I/O pinned, by host memory: kvikio cannot be imported [x] tried kvikio: no cuFile: [no]" in shown
    assert "GPU I/O gds, directly: by nvidia-fs" in told("gds", "by nvidia-fs")
    shown = json.loads(csd("probe", tmp_path, "--json").stdout)
    assert shown["gpu_io"] == "gds" and shown["gpu_reason"] == "by nvidia-fs"
    assert shown["gpu_verdicts"] == [] and shown["gpu_versions"] == {"torch": "2"}


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


def test_a_directory_that_is_not_there_is_one_line(csd, tmp_path):
    result = csd("probe", tmp_path / "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "no such directory" in result.stderr
