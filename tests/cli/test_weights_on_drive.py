"""`torch-csd generate --weights-on-drive`: the same text, in a batch that pays for reading the weights."""

from __future__ import annotations

import pytest

import torch_csd.cli.generate as command
from torch_csd.hf import batching


def rows_of(lookups) -> list[dict]:
    return [{"id": f"row-{number}", "prompt": lookup.prompt} for number, lookup in enumerate(lookups)]


@pytest.fixture(scope="session")
def expected(checkpoint, lookups, tmp_path_factory):
    """Texts of the same prompts with the weights in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    texts = []
    for lookup in lookups:
        inputs = tokenizer(lookup.prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(tokens))
    return texts


OPTIONS = ("--max-new-tokens", 12, "--weights-on-drive", "--weight-budget", "4MiB")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--batch-size", 1),
        ("--batch-size", 3),
        ("--batch-size", 4, "--attn-implementation", "sdpa"),
        ("--prefill-chunk-size", 100),
    ],
)
def test_text_is_that_of_weights_in_memory(generate, lookups, write_prompts, expected, options):
    result = generate(write_prompts(*rows_of(lookups)), *OPTIONS, *options)
    assert result.exit_code == 0, result.stderr
    assert [row["text"] for row in result.rows] == expected
    assert "GB from the drive at each step" in result.stderr and "s a token" in result.stderr
    assert "weights: " in result.stderr.splitlines()[-1]


@pytest.fixture
def micro_batches(monkeypatch):
    """Every row is a micro-batch of its own."""
    monkeypatch.setattr(batching, "ACTIVATION_BYTES", 1)
    monkeypatch.setattr(batching, "MICRO_BATCH_BUDGET_MIN", 2**20)
    monkeypatch.setattr(batching, "kv_bytes_per_token", lambda *_: 2**20)


def test_rows_run_in_micro_batches_where_their_kv_is_on_the_drive(
    generate, lookups, write_prompts, expected, micro_batches
):
    result = generate(write_prompts(*rows_of(lookups)), *OPTIONS, "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    assert "batch 4 in 4 micro-batches" in result.stderr
    assert [row["text"] for row in result.rows] == expected


def test_a_row_that_fails_in_a_micro_batch_costs_the_others_nothing(
    generate, lookups, write_prompts, expected, micro_batches, monkeypatch
):
    generate_batch = command.Job._generate_batch

    def fail(self, prompts, *arguments, **options):
        if any(prompt.id == "row-1" for prompt in prompts):
            raise ValueError("not this one")
        return generate_batch(self, prompts, *arguments, **options)

    monkeypatch.setattr(command.Job, "_generate_batch", fail)
    result = generate(write_prompts(*rows_of(lookups)), *OPTIONS, "--batch-size", 4)
    assert result.exit_code == 1
    texts = {row["id"]: row.get("text") for row in result.rows}
    assert texts == {f"row-{number}": text if number != 1 else None for number, text in enumerate(expected)}
    assert "not this one" in next(row["error"] for row in result.rows if row["id"] == "row-1")


def test_a_batch_is_chosen_and_said(generate, lookups, write_prompts, monkeypatch):
    def measure(model) -> batching.Machine:
        return batching.Machine(10**9, 0, 1.0, 10**9, {1: 0.01, 256: 0.02})

    monkeypatch.setattr(batching, "measure", measure)
    result = generate(write_prompts(*rows_of(lookups)), *OPTIONS, "--memory-budget", "64MiB")
    assert (
        "weights: 1.00 GB from the drive at each step, at 1.0 GB/s; batch 4: about 1 s a step, 0.25 s a token"
        in result.stderr
    )


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantised_weights_are_made_below_the_kv_directory(
    generate, lookups, write_prompts, expected, tmp_path, weight_dtype
):
    where = tmp_path / "kv-and-weights"
    where.mkdir()
    options = ("--kv-dir", where, "--weight-dtype", weight_dtype)
    result = generate(write_prompts(*rows_of(lookups)[:2]), *OPTIONS, *options)
    assert result.exit_code == 0, result.stderr
    made = sorted(where.glob("torch_csd-weights/*/rows-*.safetensors"))
    assert made and f"-{weight_dtype}-" in made[0].parent.name
    if weight_dtype == "int8":
        assert [row["text"] for row in result.rows] == expected[:2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--weight-dtype", "int4"), "--weight-dtype goes with --weights-on-drive"),
        (("--weights-on-drive", "--weight-dtype", "int3"), "weight_dtype must be one of int8, int4"),
        (("--weights-on-drive", "--weight-budget", "1KiB"), "memory_budget must be at least"),
        (("--weights-on-drive", "--weight-budget", "much"), "a size must be"),
    ],
)
def test_bad_options_are_one_line(generate, lookups, write_prompts, options, text):
    result = generate(write_prompts(*rows_of(lookups)[:1]), *options)
    assert result.exit_code == 2
    assert text in result.stderr and "Traceback" not in result.stderr


def test_a_damaged_checkpoint_is_one_line(generate, csd, checkpoint, write_prompts, lookups, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = csd(
        "generate", "--model", damaged, "--prompts", write_prompts(*rows_of(lookups)[:1]), "--weights-on-drive"
    )
    assert result.exit_code == 2
    assert "model.safetensors" in result.stderr and "cut short" in result.stderr


def test_durable_prompts_are_kept_and_found_with_weights_on_the_drive(
    generate, lookups, write_prompts, expected, tmp_path
):
    where = tmp_path / "kept"
    where.mkdir()
    for reused in (False, True):
        result = generate(
            write_prompts(*rows_of(lookups)[:1]), *OPTIONS, "--kv-dir", where, "--durable",
            "--output", tmp_path / f"{reused}.jsonl",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert "reused" in result.stderr and (", 0 of " not in result.stderr) == reused
