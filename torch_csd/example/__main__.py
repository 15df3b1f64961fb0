"""`python -m torch_csd.example --output DIR` writes a Hugging Face checkpoint and prompts.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from torch_csd.example.contexts import make_context

CHECKPOINT = Path(__file__).parent / "recall"
PROMPT_TOKENS = (4096, 8192, 12288, 16384)  # of each prompt's context


def write_example(
    output: Annotated[Path, typer.Option(help="Directory to write to; it is made if need be.")],
) -> None:
    """Write the bundled example checkpoint and its prompts."""
    shutil.copytree(CHECKPOINT, output, dirs_exist_ok=True)
    with open(output / "prompts.jsonl", "w", encoding="utf-8") as file:
        for seed, tokens in enumerate(PROMPT_TOKENS):
            context = make_context(tokens, seed)
            # Asked for early in the context, so that the answer lies as far back as it can.
            question = min(context.questions, key=lambda question: abs(question.position - tokens // 8))
            row = {"id": f"recall-{tokens}", "prompt": context.text + question.text, "answer": question.answer}
            file.write(json.dumps(row) + "\n")
    typer.echo(f"example checkpoint and prompts.jsonl written to {output}")


if __name__ == "__main__":
    typer.run(write_example)
