"""`python -m torch_csd.example --output DIR` writes a Hugging Face checkpoint and prompts.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import transformers
import typer

from torch_csd.example.model import make_model
from torch_csd.example.prompts import make_lookups
from torch_csd.example.tokenizer import make_tokenizer


def write_example(
    output: Annotated[Path, typer.Option(help="Directory to write to; it is made if need be.")],
) -> None:
    """Write the bundled example checkpoint and its prompts."""
    transformers.logging.disable_progress_bar()
    make_model().save_pretrained(output)
    make_tokenizer().save_pretrained(output)
    with open(output / "prompts.jsonl", "w", encoding="utf-8") as file:
        for number, lookup in enumerate(make_lookups(), start=1):
            row = {"id": f"ledger-{number}", "prompt": lookup.prompt, "answer": lookup.answer}
            file.write(json.dumps(row) + "\n")
    typer.echo(f"example checkpoint and prompts.jsonl written to {output}")


if __name__ == "__main__":
    typer.run(write_example)
