from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from ledger.model import make_model
from ledger.prompts import Lookup, make_lookups
from ledger.tokenizer import make_tokenizer
from typer.testing import CliRunner

from torch_csd.cli import app


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A directory with the checkpoint of tests/ledger."""
    directory = tmp_path_factory.mktemp("checkpoint")
    transformers.logging.disable_progress_bar()
    make_model().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def lookups() -> list[Lookup]:
    """Prompts of about 350 to 700 tokens, and their answers."""
    return make_lookups(seed=1, ledger_lines=(3, 6, 4, 5))


@pytest.fixture
def csd(tmp_path):
    """csd("probe", directory, ...) -> what the command printed (stdout, stderr) and its exit_code."""

    def run(*arguments: object) -> SimpleNamespace:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return SimpleNamespace(stdout=result.stdout, stderr=result.stderr, exit_code=result.exit_code)

    return run


@pytest.fixture
def write_prompts(tmp_path):
    """write_prompts(row or raw line, ...) -> a prompts file of these lines."""

    def write(*rows: dict | str) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def generate(csd, checkpoint, tmp_path):
    """generate(prompts_file, option, ...) -> the command's result, with `rows` of the output file."""
    kv_dir = tmp_path / "kv"
    kv_dir.mkdir()
    output = tmp_path / "output.jsonl"

    def run(prompts: Path, *options: object) -> SimpleNamespace:
        arguments = ["--model", checkpoint, "--prompts", prompts, "--kv-dir", kv_dir, "--output", output]
        result = csd("generate", *arguments, "--memory-budget", "4MiB", *options)
        result.output = output
        result.rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        assert list(kv_dir.iterdir()) == [], "something was left behind"
        return result

    return run
