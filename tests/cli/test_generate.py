from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import torch_csd


def rows_of(lookups) -> list[dict]:
    return [{"id": f"row-{number}", "prompt": lookup.prompt} for number, lookup in enumerate(lookups)]


def answers(lookups) -> list[str]:
    return [lookup.answer + "\n" for lookup in lookups]


def shell_command(checkpoint, prompts, output, kv_dir, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch_csd", "generate", "--model", str(checkpoint)] + [
        "--prompts", str(prompts), "--output", str(output),
        "--kv-dir", str(kv_dir), "--memory-budget", "4MiB", *options,
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_and_tokens_are_those_of_generation_in_memory(generate, checkpoint, lookups, write_prompts, batch_size):
    result = generate(write_prompts(*rows_of(lookups)), "--batch-size", batch_size, "--max-new-tokens", 40)
    assert result.exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert [row["id"] for row in result.rows] == [row["id"] for row in rows_of(lookups)]
    for row, lookup in zip(result.rows, lookups, strict=True):
        inputs = tokenizer(lookup.prompt, return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, past_key_values=DynamicCache(config=model.config)
        )[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == tokenizer.decode(tokens)
        assert row["tokens"] == len(tokens) == 40
        assert row["prompt_tokens"] == inputs["input_ids"].shape[1]
        assert row["finish_reason"] == "length"


@pytest.mark.parametrize(
    "options",
    [
        ("--num-beams", 2),
        ("--prefill-chunk-size", 100),
        ("--kv-dtype", "bfloat16"),
        ("--attn-implementation", "sdpa"),
        ("--attn-implementation", "eager"),
        ("--sparse", "adaptive:0.99"),
        ("--sparse", "sparf-sketch:128", "--kv-dtype", "int8"),
        ("--temperature", 0.1, "--top-p", 0.9, "--seed", 3),  # it is sure of itself
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_way_of_generating_finds_the_answers(generate, lookups, write_prompts, options):
    result = generate(write_prompts(*rows_of(lookups)), "--batch-size", 2, *options)
    assert result.exit_code == 0
    assert [row["text"] for row in result.rows] == answers(lookups)
    assert {row["finish_reason"] for row in result.rows} == {"stop"}


def test_the_closing_line_tells_how_much_of_the_attention_was_left_out(generate, lookups, write_prompts):
    result = generate(write_prompts(*rows_of(lookups)[:1]), "--sparse", "page:2")
    assert "; left out about " in result.stderr.splitlines()[-1]
    assert "left out" not in generate(write_prompts(*rows_of(lookups)[:1])).stderr


def test_the_closing_line_tells_what_was_moved_by_which_path(generate, lookups, write_prompts, tmp_path):
    result = generate(write_prompts(*rows_of(lookups)[:1]))
    closing = result.stderr.splitlines()[-1]
    stats = torch_csd.probe(tmp_path)
    assert closing.startswith(f"1 row, {result.rows[0]['tokens']} tokens in ")
    assert f"from the drive ({stats['io_engine']}, {'O_DIRECT' if stats['direct_io'] else 'buffered'})" in closing
    assert " 0 B from the drive" not in closing and " 0 B written" not in closing


def test_prompts_on_the_command_line_go_to_standard_output(csd, checkpoint, lookups):
    texts = [lookup.prompt for lookup in lookups[:2]]
    result = csd("generate", "--model", checkpoint, "--prompt", texts[0], "--prompt", texts[1])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == list(enumerate(answers(lookups)[:2], start=1))


def test_messages_go_through_the_chat_template(csd, checkpoint, lookups, write_prompts, tmp_path):
    model_dir = tmp_path / "chat"
    model_dir.mkdir()
    for file in checkpoint.iterdir():
        (model_dir / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (model_dir / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(model_dir)
    prompts = write_prompts({"messages": [{"role": "user", "content": lookups[0].prompt}]})
    result = csd("generate", "--model", model_dir, "--prompts", prompts)
    assert json.loads(result.stdout)["text"] == answers(lookups)[0]


def test_rows_that_are_in_the_output_are_not_done_again(generate, lookups, write_prompts):
    first = generate(write_prompts(*rows_of(lookups)[:2]))
    lines = first.output.read_text()
    second = generate(write_prompts(*rows_of(lookups)))
    assert second.output.read_text().startswith(lines)
    assert "2 of 4 rows in" in second.stderr
    assert [row["text"] for row in second.rows] == answers(lookups)
    third = generate(write_prompts(*rows_of(lookups)))
    assert third.exit_code == 0 and third.rows == second.rows


def test_after_kill_9_the_same_command_goes_on(checkpoint, lookups, write_prompts, tmp_path):
    prompts, output = write_prompts(*rows_of(lookups)), tmp_path / "output.jsonl"
    command = shell_command(checkpoint, prompts, output, tmp_path)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output.exists() and output.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = output.read_bytes()
    with open(output, "ab") as file:
        file.write(b'{"id": "row-3", "prom')  # as if it had been killed in the middle of a write

    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert output.read_bytes().startswith(before)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == answers(lookups)
    assert sorted(os.listdir(tmp_path)) == ["output.jsonl", "prompts.jsonl"]


def test_a_broken_line_is_reported_and_the_others_finish(generate, lookups, write_prompts):
    good = rows_of(lookups)
    result = generate(write_prompts(good[0], '{"prompt": "cut', good[1], {"id": "x", "messages": [{"role": "user"}]}))
    assert result.exit_code == 1
    assert "row 2: line 2: not JSON" in result.stderr
    assert "row x: ValueError" in result.stderr and "chat template" in result.stderr
    assert "2 rows failed" in result.stderr
    by_id = {row["id"]: row for row in result.rows}
    assert len(by_id) == len(result.rows) == 4
    assert [by_id[f"row-{n}"]["text"] for n in range(2)] == answers(lookups)[:2]
    assert "not JSON" in by_id[2]["error"] and "chat template" in by_id["x"]["error"]


def test_a_row_that_does_not_fit_on_the_drive_costs_its_batch_nothing(checkpoint, lookups, write_prompts, tmp_path):
    long_row = {"id": "long", "prompt": lookups[1].prompt * 8}
    prompts, output = (
        write_prompts(rows_of(lookups)[0], long_row, rows_of(lookups)[2]),
        tmp_path / "output.jsonl",
    )

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 20, 24 << 20))

    command = shell_command(checkpoint, prompts, output, tmp_path, "--batch-size", "3", "--memory-budget", "2MiB")
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert result.returncode == 1, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["row-0", "long", "row-2"]
    assert [row.get("text") for row in rows] == [answers(lookups)[0], None, answers(lookups)[2]]
    assert "Store" in rows[1]["error"] and "row long: Store" in result.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"--model": "/nowhere/model"}, "--model /nowhere/model: no such directory"),
        ({"--model": "."}, "cannot load the model"),
        ({"--prompts": "/nowhere/prompts.jsonl"}, "cannot read the prompts file"),
        ({"--output": "/nowhere/output.jsonl"}, "cannot write the output file /nowhere/output.jsonl"),
        ({"--kv-dir": "/nowhere/kv"}, "/nowhere/kv: no such directory"),
        ({"--memory-budget": "plenty"}, "plenty"),
        ({"--memory-budget": "1KiB"}, "memory_budget must be at least"),
        ({"--kv-dtype": "int3"}, "kv_dtype must be one of"),
        ({"--sparse": "some"}, "sparse must be page:FRACTION"),
        ({"--sparse": "page:2.5"}, "PageTopK: fraction must be in (0, 1]"),
        ({"--dtype": "float64"}, "--dtype must be one of"),
        ({"--device": "abacus"}, "--device abacus"),
        ({"--temperature": "0"}, "--temperature must be above 0"),
        ({"--top-p": "1.5"}, "--top-p must be above 0"),
        ({"--prompt": "a"}, "wanted --prompts FILE or --prompt TEXT, one of them"),
    ],
    ids=lambda value: " ".join(*value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    csd, checkpoint, write_prompts, tmp_path, monkeypatch, options, reason
):
    monkeypatch.chdir(tmp_path)
    arguments = {
        "--model": checkpoint,
        "--prompts": write_prompts({"prompt": "a"}),
        "--output": tmp_path / "output.jsonl",
        "--kv-dir": tmp_path,
    } | options
    result = csd("generate", *(word for pair in arguments.items() for word in pair))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert reason in result.stderr


def test_a_prompt_past_the_models_positions_is_warned_of(generate, checkpoint, write_prompts, monkeypatch):
    monkeypatch.setattr("torch_csd.cli.generate.AutoModelForCausalLM", ShortModel)
    result = generate(write_prompts({"prompt": "x" * 60}), "--max-new-tokens", 5)
    assert result.exit_code == 0
    assert "row 1: 60 tokens and 5 new ones are more than the 64 positions" in result.stderr


class ShortModel:
    """Loads the checkpoint with 64 positions."""

    @staticmethod
    def from_pretrained(path, **options):
        return AutoModelForCausalLM.from_pretrained(path, max_position_embeddings=64, **options)


def test_the_version_is_that_of_the_package():
    result = subprocess.run([sys.executable, "-m", "torch_csd", "--version"], capture_output=True, text=True)
    assert result.stdout == f"torch-csd {torch_csd.__version__}\n"


def test_help_names_every_command(csd):
    shown = csd("--help").stdout
    assert all(command in shown for command in ("generate", "probe", "inspect"))
    assert csd("generate", "--help").exit_code == 0


def test_no_gradients_are_kept(generate, write_prompts):
    assert torch.is_grad_enabled()  # generate() switches them off for itself alone
    generate(write_prompts({"prompt": "ab"}), "--max-new-tokens", 2)
    assert torch.is_grad_enabled()
