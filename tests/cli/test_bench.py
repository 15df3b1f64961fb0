from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch

from torch_csd.bench import io, roofs
from torch_csd.bench.report import Beside, median_ratio, number
from torch_csd.bench.settings import parse_count, parse_counts, tokens_text
from torch_csd.bench.timing import Sample, interleave

TINY = {
    "attention": [
        "--context",
        "1k",
        "--sweep",
        "256,1k",
        "--q-len",
        "16",
        "--past",
        "256",
        "--heads",
        "4",
        "--kv-heads",
    ]
    + ["2", "--head-dim", "64"],
    "sparse": ["--context", "4k", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"],
    "decode": ["--context", "256", "--sweep", "128,256", "--long-context", "1k"],
    "prefill": ["--prompt", "256", "--chunk", "64"],
    "io": ["--size", "32MiB"],
    "weights": ["--size", "16MB", "--prompt", "16"],
}


@pytest.fixture
def bench(csd, tmp_path, monkeypatch):
    """bench(command, option, ...) -> the command's result on an empty directory, at sizes of a test, without fio."""
    directory = tmp_path / "kv"
    directory.mkdir()
    for module in (roofs, io):  # starting fio takes longer than all else here
        monkeypatch.setattr(module, "has_fio", lambda: False)

    def run(command: str, *options: object):
        few = ["--rounds", "1", "--quick", "--memory-budget", "4MiB", "--directory", directory]
        result = csd("bench", command, *TINY[command], *few, *options)
        assert list(directory.iterdir()) == [], "something was left behind"
        return result

    return run


@pytest.mark.parametrize("command", [command for command in TINY if command not in ("sparse", "weights")])
def test_every_row_has_a_value_beside_another_or_says_why_not(bench, tmp_path, command):
    can_plot = importlib.util.find_spec("matplotlib") is not None
    result = bench(command, "--json", "-", *(["--plot", tmp_path / "plots"] if can_plot else []))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    for key in ("date", "processor", "cores", "memory_gib", "torch", "simd", "io_engine", "directory"):
        assert report["machine"][key], key
    rows = report["rows"]
    assert len(rows) >= 4
    for row in rows:
        if row["value"] is None:
            assert row["skipped"], row["name"]
            continue
        assert row["value"] >= 0 and row["unit"]
        # A peer may stand alone: others are measured by it.
        assert row["beside"] or row["note"] or "peer" in row["name"], row["name"]
        for other in row["beside"]:
            assert other["name"] and other["unit"] and other["value"] > 0 and other["ratio"] >= 0, row["name"]
    assert any(row["value"] for row in rows)
    # What is sent to standard output as JSON is shown to the user on standard error.
    assert rows[0]["name"] in result.stderr
    if not can_plot:
        pytest.skip("no plots: matplotlib is not installed (pip install 'torch_csd[bench]')")
    pictures = sorted((tmp_path / "plots").iterdir())
    assert pictures and all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    expected = {"attention": "attention-hot-tokens", "decode": "decode-hot-gbs", "prefill": "prefill-whole-tokens"}
    if command in expected:
        assert expected[command] in [path.stem for path in pictures]


def test_sparse_rows_stand_beside_dense_attention_and_say_what_was_read(bench):
    result = bench("sparse", "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    for dtype in ("bfloat16", "int8", "int4"):
        row = rows[f"{dtype}, page top-k 1/16, 4k tokens"]
        assert row["value"] > 0 and row["beside"][0]["name"] == "dense bfloat16, cold"
        assert "MiB a step from the drive" in row["note"]
    assert all(row["value"] for row in rows.values())


def test_weights_on_the_drive_stand_beside_the_drive_and_accelerate(bench):
    result = bench("weights", "--memory-budget", "10MiB", "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    drive = "time to read its bytes at the drive"
    for name in ("as stored, batch 1", "int8, batch 1", "int4, batch 1", "as stored, batch 16"):
        row = rows[f"decode, {name}, cold"]
        assert row["value"] > 0 and row["beside"] and "GB a step at" in row["note"], name
        # All of the int4 weights fit into memory.
        assert name.startswith("int4") or any(other["name"].startswith(drive) for other in row["beside"]), name
    assert rows["decode, as stored, memory of the process"]["value"] <= 2
    assert any("K and V of" in name and row["value"] for name, row in rows.items())
    assert any(name.startswith("prefill 16") and row["value"] for name, row in rows.items())
    peer = rows["  peer: accelerate, disk offload"]
    if importlib.util.find_spec("accelerate") is None:
        assert "pip install 'torch_csd[bench]'" in peer["skipped"]
    else:
        assert peer["value"] > 0 and "logits differ" in peer["note"]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16,int8", "int4"])
def test_the_rows_are_of_the_types_asked_for(bench, kv_dtype):
    rows = json.loads(bench("attention", "--kv-dtype", kv_dtype, "--json", "-").stdout)["rows"]
    names = [row["name"] for row in rows if row["name"].startswith("hot attention")]
    for dtype in kv_dtype.split(","):
        assert any(dtype in name for name in names)
    assert not any(" float16" in name for name in names)


def test_rows_are_printed_as_lines_and_saved_as_json(bench, tmp_path):
    result = bench("prefill", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["name"] in result.stdout for row in rows)
    assert "x DynamicCache" in result.stdout


def test_plots_without_matplotlib_say_how_to_get_it(bench, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    result = bench("io", "--plot", tmp_path / "plots")
    assert result.exit_code == 2
    assert "pip install 'torch_csd[bench]'" in result.stderr


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        ("attention", ["--kv-dtype", "int3"], "kv_dtype must be one of"),
        ("attention", ["--kv-dtype", ","], "at least one type"),
        ("attention", ["--context", "many"], "a number of tokens must be"),
        ("attention", ["--context", "0"], "a number of tokens must be"),
        ("attention", ["--heads", "5", "--kv-heads", "2"], "must be a multiple of --kv-heads"),
        ("attention", ["--context", "100000M"], "GiB"),
        ("sparse", ["--heads", "5", "--kv-heads", "2"], "must be a multiple of --kv-heads"),
        ("decode", ["--memory-budget", "some"], "a size must be"),
        ("decode", ["--sweep", "1k,x"], "a number of tokens must be"),
        ("prefill", ["--io-engine", "aio"], "io_engine must be one of"),
        ("weights", ["--checkpoint", "/none/at/all"], "--checkpoint /none/at/all: no safetensors files there"),
        ("weights", ["--size", "much"], "a size must be"),
        ("io", ["--size", "1MiB"], "--size must be at least 32MiB"),
        ("io", ["--directory", "/none/at/all"], "no such directory"),
        ("io", ["--json", "/none/at/all.json"], "--json /none/at/all.json: no such directory"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_measured(bench, command, options, reason):
    result = bench(command, *options)
    assert result.exit_code == 2
    assert reason in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_fewer_than_one_round_is_refused(csd):
    assert csd("bench", "io", "--rounds", "0").exit_code == 2


def test_ratios_are_medians_over_pairs():
    # The median of the values over the median of the others would be 1.
    assert median_ratio([1.0, 2.0, 3.0], [2.0, 2.0, 1.5]) == 1.0
    assert median_ratio([1.0, 8.0, 3.0], [2.0, 2.0, 1.0]) == 3.0


@pytest.mark.parametrize(
    ("ratio", "bar", "at_most", "met"),
    [(0.92, 0.92, False, True), (0.91, 0.92, False, False), (1.1, 1.1, True, True), (1.2, 1.1, True, False)],
)
def test_a_bar_is_met_on_its_own_side(ratio, bar, at_most, met):
    beside = Beside("a roof", 1.0, "GB/s", ratio, bar, at_most)
    assert beside.met is met
    assert beside.verdict == f"bar {'<=' if at_most else '>='} {bar:g}: {'met' if met else 'missed'}"
    assert Beside("a roof", 1.0, "GB/s", ratio).met is None


def test_samples_are_taken_in_turn_and_stand_between_two_roofs():
    order = []

    def call(name):
        return lambda: order.append(name) or Sample(1.0)

    def roof():
        order.append("roof")
        return {"drive": float(order.count("roof"))}

    calls = {"hot": call("hot"), "cold": call("cold")}
    samples = interleave(calls, 2, roof, without_roof=("hot",))
    assert order == ["hot", "roof", "cold", "roof", "hot", "roof", "cold", "roof"] or order == [
        *["hot", "roof", "cold", "roof"],
        *["hot", "cold", "roof"],
    ]
    assert [sample.roofs["drive"] for sample in samples["cold"]][0] == 1.5
    assert samples["hot"][0].roofs == {}

    order.clear()
    samples = interleave({"a": call("a"), "b": call("b")}, 2, roof, once_a_round=True)
    assert order == ["roof", "a", "b", "roof", "a", "b", "roof"]
    assert [samples[name][1].roofs["drive"] for name in "ab"] == [2.5, 2.5]


@pytest.mark.parametrize(("text", "tokens"), [("7", 7), ("32k", 32768), ("1M", 1048576), (" 2K ", 2048)])
def test_counts_of_tokens(text, tokens):
    assert parse_count(text) == tokens


def test_lists_of_counts_are_sorted_and_shown_short():
    assert parse_counts("4k,1k,4096") == [1024, 4096]
    assert [tokens_text(n) for n in (100, 1024, 32768)] == ["100", "1k", "32k"]
    assert [number(n) for n in (0, 0.0123, 1.234, 12.34, 1234)] == ["0", "0.0123", "1.23", "12.3", "1234"]


def test_the_command_line_does_not_import_what_only_benchmarks_need():
    code = (
        "import sys, torch_csd.cli; print([m for m in sys.modules if m.startswith(('torch_csd.bench', 'matplotlib'))])"
    )
    output = os.popen(f'{os.sys.executable} -c "{code}"').read()
    assert output.strip() == "[]"


def test_fio_is_a_roof_where_it_is_installed(tmp_path):
    if not roofs.has_fio():
        pytest.skip("fio is not installed (apt install fio)")
    try:
        with roofs.DriveRoof(str(tmp_path), 2**25) as roof:
            assert 0 < roof.fio(jobs=4, depth=8, engine="psync") < 1000
    except OSError as error:
        pytest.skip(f"no O_DIRECT, or no fio, on {tmp_path}: {error}")
    assert list(tmp_path.iterdir()) == []


def test_threads_are_torchs_too(bench):
    before = torch.get_num_threads()
    try:
        assert json.loads(bench("io", "--threads", "1", "--json", "-").stdout)["machine"]["threads"] == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
