"""compare_with_memory.py MODEL OUTPUT: does stock transformers, its cache in memory, write what OUTPUT holds?

Generates every row of a `torch-csd generate` output again, greedily and one by one. Exit code 1 if a text
differs.
"""

from __future__ import annotations

import json
import sys

import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_dir: str, output: str) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa")
    with open(output, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    same_count = 0
    console.print(f"\nthe rows in {output}, beside generation with the cache in memory:")
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=row["tokens"], do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        same = text == row.get("text")
        same_count += same
        verdict = "[green]same[/]" if same else "[red]DIFFERS[/]"
        console.print(f"  {row['id']}, {row['prompt_tokens']} tokens  {verdict}  …{row['prompt'][-12:]!r} → ", end="")
        console.print(repr(row.get("text")), markup=False)
    console.print(f"{same_count} of {len(rows)} texts are the same")
    return 0 if same_count == len(rows) else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
