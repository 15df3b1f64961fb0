"""`torch-csd generate --durable`: prompts that are prefilled once, ever."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

import torch_csd
from torch_csd import KVStore
from torch_csd.cli.generate import Job
from torch_csd.durable import survey


def rows_of(lookups) -> list[dict]:
    return [{"id": f"row-{number}", "prompt": lookup.prompt} for number, lookup in enumerate(lookups)]


def answers(lookups) -> list[str]:
    return [lookup.answer + "\n" for lookup in lookups]


@pytest.fixture
def kv_dir(tmp_path):
    directory = tmp_path / "kv"
    directory.mkdir()
    return directory


@pytest.fixture
def run(csd, checkpoint, kv_dir, tmp_path):
    """run(prompts_file, option, ...) -> the result of a command without output so far, with `rows` and `reused`."""

    def run(prompts, *options, model=checkpoint):
        arguments = ["--model", model, "--prompts", prompts, "--kv-dir", kv_dir, "--memory-budget", "4MiB"]
        result = csd("generate", *arguments, *options)
        result.rows = [json.loads(line) for line in result.stdout.splitlines()]
        told = re.search(r", (\d+) of (\d+) prompt tokens? reused ", result.stderr)
        result.reused, result.prompt_tokens = map(int, told.groups()) if told else (None, None)
        return result

    return run


def command(checkpoint, prompts, output, kv_dir, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch_csd", "generate", "--durable", "--model", str(checkpoint)] + [
        "--prompts", str(prompts), "--output", str(output),
        "--kv-dir", str(kv_dir), "--memory-budget", "4MiB", *options,
    ]  # fmt: skip


def names(kv_dir) -> list[str]:
    return [info.name for info in torch_csd.list_sequences(kv_dir)]


def test_a_fresh_process_reads_what_another_has_computed(run, checkpoint, lookups, write_prompts, kv_dir, tmp_path):
    prompts = write_prompts(*rows_of(lookups))
    plain = run(prompts)
    assert list(kv_dir.iterdir()) == [] and plain.reused is None
    first = run(prompts, "--durable")
    assert first.exit_code == 0 and first.rows == plain.rows
    assert [row["text"] for row in first.rows] == answers(lookups)
    kept = names(kv_dir)
    assert len(kept) == len(lookups)

    process = subprocess.run(
        command(checkpoint, prompts, tmp_path / "output.jsonl", kv_dir), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()] == plain.rows
    total = sum(row["prompt_tokens"] for row in plain.rows)
    assert f", {total - len(lookups)} of {total} prompt tokens reused (" in process.stderr
    assert names(kv_dir) == kept and torch_csd.verify(kv_dir) == []


def test_a_shared_beginning_is_computed_once(run, lookups, write_prompts, kv_dir):
    # The first ledger is what all of them begin with.
    system = lookups[1].prompt
    prompts = write_prompts({"prompt": system}, *({"prompt": system + lookup.prompt} for lookup in lookups[2:]))
    first = run(prompts, "--durable")
    plain = run(prompts)
    assert first.exit_code == 0 and first.rows == plain.rows
    tokens = len(system)  # one a byte
    assert 2 * (tokens - 1) <= first.reused <= 2 * (tokens - 1) + 200
    # Their pages are there once, but for the last, which holds what follows, too.
    store = survey(kv_dir)
    shared_bytes = sum(info.stored_bytes for info in store.sequences) - store.used_bytes
    (page_bytes,) = {info.stored_bytes // (info.layers * -(-info.tokens // 64)) for info in store.sequences}
    shared_pages = (tokens - 1) // 64 + (first.reused - (tokens - 1)) // 64
    assert shared_bytes == 4 * shared_pages * page_bytes


def test_after_kill_9_the_same_command_goes_on(checkpoint, lookups, write_prompts, kv_dir, tmp_path):
    prompts, output = write_prompts(*rows_of(lookups)), tmp_path / "output.jsonl"
    arguments = command(checkpoint, prompts, output, kv_dir)
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output.exists() and output.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(names(kv_dir)) >= 1 and torch_csd.verify(kv_dir) == []
    before = output.read_bytes()
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert output.read_bytes().startswith(before)
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == answers(lookups)
    assert torch_csd.verify(kv_dir) == [] and len(names(kv_dir)) == len(lookups)


def test_a_long_prefill_goes_on_where_it_was_last_kept(run, lookups, write_prompts, kv_dir, monkeypatch):
    prompts = write_prompts(rows_of(lookups)[1])
    extend, calls = Job._extend, []

    def interrupted(self, cache, ids, *rest, **options):
        calls.append(len(ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return extend(self, cache, ids, *rest, **options)

    monkeypatch.setattr("torch_csd.cli.generate.COMMIT_INTERVAL_S", 0.0)
    monkeypatch.setattr(Job, "_extend", interrupted)
    result = run(prompts, "--durable", "--prefill-chunk-size", 100)
    assert result.exit_code == 130 and calls == [100, 200, 300, 400]
    (info,) = torch_csd.list_sequences(kv_dir)
    assert info.tokens == 300
    monkeypatch.setattr(Job, "_extend", extend)
    again = run(prompts, "--durable", "--prefill-chunk-size", 100)
    assert again.exit_code == 0 and again.reused == 300
    assert again.rows[0]["text"] == answers(lookups)[1]
    (info,) = torch_csd.list_sequences(kv_dir)
    assert info.tokens == again.prompt_tokens - 1
    assert run(prompts, "--durable").reused == again.prompt_tokens - 1


@pytest.mark.parametrize(
    "options",
    [("--kv-dtype", "int8"), ("--kv-dtype", "int4"), ("--attn-implementation", "sdpa"), ("--temperature", 0.7)],
    ids=lambda options: options[-1],
)
def test_the_second_run_says_the_same(run, lookups, write_prompts, options):
    prompts = write_prompts(*rows_of(lookups)[:2])
    first, second = (run(prompts, "--durable", *options) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert first.rows == second.rows
    assert second.reused == second.prompt_tokens - 2


def test_what_was_kept_otherwise_is_not_used(run, lookups, write_prompts, checkpoint, kv_dir, tmp_path):
    prompts = write_prompts(rows_of(lookups)[0])
    assert run(prompts, "--durable").reused == 0
    assert run(prompts, "--durable", "--kv-dtype", "bfloat16").reused == 0
    assert run(prompts, "--durable", "--dtype", "bfloat16").reused == 0
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.0 + 1e-6).add_(1e-6)
    model.save_pretrained(other)
    assert run(prompts, "--durable", model=other).reused == 0
    assert len(names(kv_dir)) == 4
    assert run(prompts, "--durable").reused > 0


def test_models_with_sliding_windows_keep_prompts_too(run, checkpoint, write_prompts, tmp_path):
    directory = tmp_path / "mistral"
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=70, pad_token_id=257, eos_token_id=257, bos_token_id=None,
    )  # fmt: skip
    Mistral(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)
    prompts = write_prompts({"prompt": "ab" * 150}, {"prompt": "ab" * 150 + "and so on"})
    plain = run(prompts, model=directory)
    first, second = (run(prompts, "--durable", model=directory) for _ in range(2))
    assert plain.exit_code == first.exit_code == 0 and plain.rows == first.rows == second.rows
    assert first.reused == 299 and second.reused == 299 + 308


def test_a_model_that_keeps_more_than_keys_and_values_is_one_line(run, checkpoint, write_prompts, tmp_path, kv_dir):
    directory = tmp_path / "lfm2"
    config = Lfm2Config(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(directory)
    result = run(write_prompts({"prompt": "ab"}), "--durable", model=directory)
    assert result.exit_code == 2 and names(kv_dir) == []
    assert "--durable: StorageCache: layer 0" in result.stderr and result.stderr.count("\n") == 1


def test_a_prompt_of_one_token_has_nothing_to_keep(run, write_prompts, kv_dir):
    result = run(write_prompts({"prompt": "a"}, {"prompt": "ab"}), "--durable", "--max-new-tokens", 2)
    assert result.exit_code == 0 and result.reused == 0
    assert len(names(kv_dir)) == 1


def test_a_name_that_holds_something_else_is_an_error_of_its_row(run, lookups, write_prompts, kv_dir):
    prompts = write_prompts(*rows_of(lookups)[:2])
    run(prompts, "--durable")
    (name, _) = names(kv_dir)
    k = torch.randn(1, 2, 10, 64)
    for ids in (list(range(200, 210)), None):
        torch_csd.remove_sequence(kv_dir, name)
        with KVStore(kv_dir, durable=True, name=name) as store:
            store.append(0, k, k)
            store.commit(ids)
        result = run(prompts, "--durable")
        assert result.exit_code == 1
        assert sorted("error" in row for row in result.rows) == [False, True]
        assert f"there is a sequence '{name}' already" in result.stderr
    assert names(kv_dir).count(name) == 1


def test_a_damaged_page_is_an_error_of_its_row(csd, run, lookups, write_prompts, kv_dir):
    prompts = write_prompts(*rows_of(lookups)[:2])
    run(prompts, "--durable")
    with open(kv_dir / "torch_csd-durable" / "pages.csd", "r+b") as file:
        file.seek(2**20 + 100)
        file.write(b"\xff" * 8)
    (page,) = torch_csd.verify(kv_dir)
    result = run(prompts, "--durable")
    assert result.exit_code == 1 and "StoreCorruptError" in result.stderr
    assert sorted("error" in row for row in result.rows) == [False, True]
    assert csd("rm", kv_dir, page.sequence).exit_code == 0
    assert [row["text"] for row in run(prompts, "--durable").rows] == answers(lookups)[:2]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--batch-size", "2"], "--durable keeps one prompt at a time"),
        (["--num-beams", "2"], "--durable keeps one prompt at a time"),
        (["--kv-dir", "/nowhere/kv"], "/nowhere/kv: no such directory"),
        (["--kv-dtype", "int3"], "kv_dtype must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(run, write_prompts, kv_dir, options, reason):
    result = run(write_prompts({"prompt": "a"}), "--durable", *options)
    assert result.exit_code == 2 and reason in result.stderr and result.stderr.count("\n") == 1
    assert list(kv_dir.iterdir()) == []


def test_without_a_directory_there_is_nothing_to_keep_it_in(csd, checkpoint):
    result = csd("generate", "--model", checkpoint, "--prompt", "a", "--durable")
    assert result.exit_code == 2 and "--durable needs --kv-dir DIR" in result.stderr


def test_a_store_that_cannot_be_written_is_one_line(run, write_prompts, kv_dir):
    prompts = write_prompts({"prompt": "a"})
    code = (
        f"import sys, torch_csd\nstore = torch_csd.KVStore({str(kv_dir)!r}, durable=True, name='x')\n"
        "print('open', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        result = run(prompts, "--durable")
        process.stdin.close()
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"process {process.pid} (" in result.stderr and "writes to this store" in result.stderr
    os.chmod(kv_dir / "torch_csd-durable", 0o755)
    result = run(prompts, "--durable")
    assert result.exit_code == 2 and "open to other users" in result.stderr and result.stderr.count("\n") == 1
