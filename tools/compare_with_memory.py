"""compare_with_memory.py MODEL PROMPTS OUTPUT: are the answers right, and does stock transformers give the same?

Shows every row of a `torch-csd generate` output beside the "answer" of its prompt, and generates it again with the
cache in memory, greedily and one by one. Exit code 1 if an answer is wrong or a text differs.
"""

from __future__ import annotations

import json
import sys

import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_rows(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(model_dir: str, prompts: str, output: str) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa")
    answers = {row["id"]: row["answer"] for row in read_rows(prompts)}
    rows = read_rows(output)

    right_count = same_count = 0
    console.print(f"\nthe rows in {output}, beside generation with the cache in memory:")
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        # Chunks, so that the comparison does not need a score for every pair of tokens at once.
        tokens = model.generate(**inputs, max_new_tokens=row["tokens"], do_sample=False, prefill_chunk_size=1024)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right, same = row.get("text") == answers[row["id"]], row.get("text") == text
        right_count += right
        same_count += same
        question = row["prompt"].splitlines()[-1]
        console.print(f"  {row['prompt_tokens']:6} tokens  {question} → {row.get('text')}  ", end="", markup=False)
        console.print("[green]right[/], " if right else f"[red]WRONG[/] ({answers[row['id']]}), ", end="")
        console.print("[green]same in memory[/]" if same else f"[red]DIFFERS[/] from {text!r} in memory")
    console.print(f"{right_count} of {len(rows)} answers are right; {same_count} of {len(rows)} are the same in memory")
    return 0 if right_count == same_count == len(rows) else 1


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
