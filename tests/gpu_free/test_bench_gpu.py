"""benchmarks/bench_gpu.py without a GPU: its table, its processes, and its sections on an emulated card."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import emulated_card
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_gpu  # noqa: E402
from gpu import kernels, suite, transfers  # noqa: E402
from gpu.run import Deadline, Run, TimeUp  # noqa: E402
from gpu.table import Row, Table, as_line, from_line  # noqa: E402

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the script would start")


class FixedTimer:
    """A second each, and the work is done once."""

    def seconds(self, work) -> float:
        work()
        return 1.0


def make_run(tmp_path, rows: list[Row], limit_s: float = 60.0, **changes: object) -> Run:
    values = dict(
        device=emulated_card.EmulatedDevice(), card_timer=FixedTimer(), wall_timer=FixedTimer(),
        synchronize=lambda: None, free_bytes=2**30, directory=str(tmp_path), add=rows.append,
        deadline=Deadline(limit_s), rounds=1, quick=True,
    )  # fmt: skip
    return Run(**(values | changes))


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


# ---- the table ---------------------------------------------------------------------------------------------------


def test_a_verdict_says_how_the_ratio_stands_to_the_bar():
    row = Row("a", 7, "GB/s", beside="copy", beside_value=10, beside_unit="GB/s", ratio=0.7, bar=0.7)
    assert row.verdict == "met" and from_line(as_line(row)) == row
    row.ratio = 0.69
    assert row.verdict == "missed"
    row.waived = "the drive does not keep up"
    assert row.verdict == "not applicable"
    assert Row("b", 3).verdict == "" and Row("b", reason="no time").verdict == "not measured"
    assert Row("b", 3, failed=True).verdict == "failed"


@pytest.mark.parametrize("with_rich", [True, False])
def test_the_table_has_all_rows_and_the_json_is_what_table_py_reads(tmp_path, capsys, monkeypatch, with_rich):
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    table = Table(json_to=str(tmp_path / "gpu.json"))
    table.add(Row("fast", 7, "GB/s", beside="copy", beside_value=10, beside_unit="GB/s", ratio=0.7, bar=0.5))
    table.add(Row("slow", 7, "GB/s", beside="copy", beside_value=10, beside_unit="GB/s", ratio=0.7, bar=0.9))
    table.add(Row("broken", failed=True, reason="RuntimeError: it [is] so"))
    table.print()
    table.print()
    text = capsys.readouterr().out
    for part in (
        "fast",
        ">= 0.5: met",
        ">= 0.9: missed",
        "broken",
        "RuntimeError: it [is] so",
        "1 of 2 bars met, 1 failed",
    ):
        assert text.count(part) == 1
    command = [sys.executable, str(BENCHMARKS / "table.py"), str(tmp_path / "gpu.json")]
    assert "| slow | 7.00 GB/s | copy: 10.0 GB/s | 0.70 | ≥ 0.9: **missed** |" in subprocess.check_output(
        command, text=True
    )


def test_quick_sizes_have_no_bars(capsys):
    table = Table(quick=True)
    table.add(Row("slow", 7, "GB/s", beside="copy", beside_value=10, beside_unit="GB/s", ratio=0.7, bar=0.9))
    assert table.rows[0].verdict == "not applicable"


# ---- processes ---------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
sys.path.insert(0, {benchmarks!r})
from gpu.table import Row, as_line
os.write(int(sys.argv[-1]), as_line(Row("first", 1.0, "GB/s")))
{then}
"""


def section(table: Table, then: str, kill_s: float = 20.0) -> bool:
    command = [sys.executable, "-c", CHILD.format(benchmarks=str(BENCHMARKS), then=then)]
    return bench_gpu.run_section(table, "kernels", command, kill_s, kill_s)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("sys.exit(5)", "exit code 5"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_a_section_that_fails_crashes_or_hangs_becomes_a_row(monkeypatch, then, reason):
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    table = Table()
    assert not section(table, then, kill_s=1.0 if "sleep" in then else 20.0)
    assert [(row.name, row.section) for row in table.rows] == [("first", "kernels"), ("kernels", "kernels")]
    assert table.rows[1].verdict == "failed" and table.rows[1].reason == reason


def test_a_section_that_ends_well_adds_its_rows_only(monkeypatch):
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    table = Table()
    assert section(table, "pass") and [row.name for row in table.rows] == ["first"]


def test_what_a_section_raises_becomes_a_row(tmp_path, capsys):
    rows: list[Row] = []

    def fails(run: Run) -> None:
        run.add(Row("one", 1.0))
        raise RuntimeError("CUDA error: an illegal memory access\nand much more")

    def late(run: Run) -> None:
        raise TimeUp

    bench_gpu.guarded("kernels", make_run(tmp_path, rows), lambda: fails)
    bench_gpu.guarded("decode", make_run(tmp_path, rows), lambda: late)
    bench_gpu.guarded("prefill", make_run(tmp_path, rows), lambda: __import__("no_such_module"))
    assert [row.verdict for row in rows] == ["", "failed", "not measured", "failed"]
    assert rows[1].reason == "RuntimeError: CUDA error: an illegal memory access"


def test_the_table_is_printed_when_sigterm_comes(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import bench_gpu\n"
        "bench_gpu.missing_card = lambda: None\n"
        "bench_gpu.build = lambda table, end_s: True\n"
        "bench_gpu.child_command = lambda *_: [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "sys.exit(bench_gpu.main(sys.argv[1:]))\n"
    )
    json_to = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-c",
        program,
        "--directory",
        str(tmp_path),
        "--json",
        str(json_to),
        "--only",
        "kernels",
        "decode",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "kernels" in child.stderr.readline()
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=30)
    assert child.returncode == 3
    assert output.count("SIGTERM came") == 2 and "2 not measured" in output
    assert [row["verdict"] for row in json.loads(json_to.read_text())["rows"]] == ["not measured"] * 2
    assert list(tmp_path.iterdir()) == [json_to]


@no_card
def test_without_a_card_it_says_so_in_one_line_and_starts_nothing(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "bench_gpu.py"),
        "--directory",
        str(tmp_path),
        "--json",
        str(tmp_path / "a"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("bench_gpu: no CUDA device") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- sections ----------------------------------------------------------------------------------------------------


def test_kernels_are_measured_by_the_bytes_and_tokens_that_they_go_over(tmp_path):
    rows: list[Row] = []
    sizes = kernels.Sizes(
        rows=2, tokens=192, num_kv_heads=1, head_dim=64, other_dims=(), elements=("bfloat16", "int4"), queries=((1, 1),)
    )
    kernels.measure(make_run(tmp_path, rows), sizes)
    found = by_name(rows)
    base, int4 = found["attend, group 1, q_len 1: bfloat16"], found["attend, group 1, q_len 1: int4"]
    pages = 2 * 3
    page_bytes = 64 * 2 * 64 * 2
    # FixedTimer's second: values are bytes and tokens.
    assert base.value == pytest.approx(pages * page_bytes / 1e9)
    assert base.beside_value == pytest.approx(2 * (pages * page_bytes // 2) / 1e9)  # a copy reads, and writes
    assert (base.ratio, base.bar, base.verdict) == (pytest.approx(1.0), kernels.BAR, "met")
    assert int4.value == pytest.approx(2 * 192 / 1e6)
    assert (int4.ratio, int4.bar, int4.verdict) == (pytest.approx(1.0), kernels.INT4_BAR, "missed")
    assert found["checksums"].value == pytest.approx(pages * page_bytes / 1e9)
    assert not any(row.failed for row in rows)


def test_wrong_attention_is_a_failed_row(tmp_path, monkeypatch):
    rows: list[Row] = []
    monkeypatch.setattr(kernels.Tiles, "error", lambda self, q, partial: float("nan"))
    monkeypatch.setattr(kernels, "other_rows", lambda *_: None)
    sizes = kernels.Sizes(
        rows=1, tokens=64, num_kv_heads=1, head_dim=64, other_dims=(), elements=("bfloat16",), queries=((1, 1),)
    )
    kernels.measure(make_run(tmp_path, rows), sizes)
    assert rows[0].verdict == "failed" and rows[0].reason.startswith("wrong")


def test_what_fails_within_a_section_leaves_its_other_rows(tmp_path, monkeypatch, capsys):
    rows: list[Row] = []
    monkeypatch.setattr(transfers, "drive_row", lambda *_: rows.append(Row("drive to card", 1.0)))
    monkeypatch.setattr(transfers, "host_row", lambda *_: 1 // 0)
    transfers.measure(make_run(tmp_path, rows, card_stores=False))
    assert [(row.name, row.verdict) for row in rows] == [("host to card", "failed"), ("drive to card", "")]


def test_sizes_fit_the_memory_that_is_free():
    large, small = (kernels.Sizes.fitting(free, quick=False) for free in (70 * 2**30, 6 * 2**30))
    assert large.tokens == 65536 and large.rows * large.tokens * 4096 >= 2**30
    assert small.tokens < large.tokens


def test_every_page_is_streamed_from_host_memory_and_from_the_drive(tmp_path):
    rows: list[Row] = []
    run = make_run(tmp_path, rows, card_stores=False)
    transfers.measure(run, kv_bytes=8 << 20, staging_bytes=4 << 20)
    found = by_name(rows)
    host = found["host to card: pages in host memory, streamed"]
    assert host.value == pytest.approx((8 << 20) / 1e9) and host.bar == transfers.BAR
    assert found["drive to card, pinned"].value == pytest.approx((8 << 20) / 1e9)
    assert list(tmp_path.iterdir()) == []


def test_a_section_has_as_many_rounds_as_it_has_time(tmp_path):
    run = make_run(tmp_path, [], limit_s=0.0, rounds=5)
    with pytest.raises(TimeUp):
        run.interleaved(FixedTimer(), {"a": lambda: None})
    run.deadline = Deadline(60)
    seen: list[str] = []
    run.interleaved(FixedTimer(), {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")})
    assert seen == ["a", "b"] * 6  # one to warm up, then in turn


@pytest.mark.parametrize("code", [1, None])
def test_what_pytest_printed_is_counted_even_if_it_did_not_end(code):
    text = (
        "tests/cuda/test_a.py::test_one[x-y] PASSED [ 1%]\n[gw1] [ 2%] FAILED tests/cuda/test_a.py::test_two[z] \n"
        "tests/cuda/test_a.py::test_three SKIPPED (no CuPy) [ 3%]\n=== short test summary info ===\n"
        "FAILED tests/cuda/test_a.py::test_two[z] - AssertionError\n"
    )
    row = suite.row("pytest", text, code, 9)
    assert (row.value, row.beside_value, row.verdict) == (1, 2, "missed")
    assert "1 skipped" in row.reason and "test_a.py::test_two[z]" in row.reason
    text = text.replace("FAILED", "PASSED")
    ended = suite.row("pytest", text, code, 9)
    assert (ended.value, ended.verdict) == (2, "met" if code == 1 else "not applicable")
    assert suite.row("pytest", "no such file\n", 4, 9).verdict == "failed"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other on a busy machine, for models as small as these
    yield
    torch.set_num_threads(threads)


class Clock:
    def seconds(self, work) -> float:
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s


def test_whole_models_are_measured_on_an_emulated_card(tmp_path, monkeypatch, one_thread):
    pytest.importorskip("transformers")
    from gpu import correctness, models

    emulated_card.install(monkeypatch)
    rows: list[Row] = []
    run = make_run(tmp_path, rows, wall_timer=Clock(), rounds=1)
    sizes = models.Sizes(
        hidden=32, layers=2, heads=2, kv_heads=1, prompts=(256,), context=256, roof_bytes=16 << 20, staging="1MiB"
    )
    models.measure_prefill(run, sizes)
    models.measure_decode(run, sizes)
    correctness.measure(run, (torch.float32,), ("greedy", "fork"), ({"executor": "gpu", "resident": False},))
    found = by_name(rows)
    assert not any(row.failed for row in rows), [row.reason for row in rows if row.failed]
    assert found["prefill 256 to the drive, bfloat16"].bar == models.PREFILL_BAR
    cold = found["decode at 256, cold: gpu"]
    assert "drive to card" in cold.reason and "drive to processor" in found["decode at 256, cold: near"].reason
    auto = found["decode at 256, pages in host memory, half on the card: auto"]
    assert auto.bar == models.AUTO_BAR and "stay on the card" in auto.reason
    same = found["same tokens, float32, executor=gpu, resident=False"]
    assert (same.value, same.verdict) == (2, "met")


def test_weights_are_streamed_and_a_token_is_timed_on_an_emulated_card(tmp_path, monkeypatch, one_thread):
    transformers = pytest.importorskip("transformers")
    from gpu import weights

    emulated_card.install(monkeypatch)
    rows: list[Row] = []
    run = make_run(tmp_path, rows, wall_timer=Clock(), rounds=1)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    weights.measure(run, weights.Sizes(config, 4 << 20))
    found = by_name(rows)
    assert not any(row.failed for row in rows), [row.reason for row in rows if row.failed]
    assert found["weights to card, pinned"].bar == found["token, weights on the drive, pinned"].bar == weights.BAR
    assert "no CUDA device" in found["weights to card, gds"].reason
    assert "MiB/tok" in found["token, weights on the drive, pinned"].reason
    same = found["same logits, weights on the drive"]
    assert (same.value, same.verdict) == (2, "met")
    assert list(tmp_path.iterdir()) == []
