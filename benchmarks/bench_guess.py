"""What guesses at the next layer's queries are worth: `torch_csd.guess_queries` beside the same model without.

    python benchmarks/bench_guess.py --directory /nvme/kv --context 128000
    python benchmarks/bench_guess.py --directory /nvme/kv --model DIR --tasks FILE

The model (the bundled one, or yours) prefills a context into a cache of which nothing stays in memory, and then decodes
answers to questions about it, with and without guesses in turn, by each way to choose pages. A row says how much longer
or shorter a step is (the first of each answer is not counted), and how much of what was guessed was used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from torch_csd import Adaptive, PageTopK, StorageCache, StoreError, guess_queries
from torch_csd.bench.accuracy import PREFILL_PIECE, Plan, decode, feed, rewind
from torch_csd.bench.report import Report, Row, beside
from torch_csd.bench.settings import Settings
from torch_csd.bench.tasks import Context
from torch_csd.bench.timing import median
from torch_csd.cli.report import one_line
from torch_csd.sparse import Sparse

CHOICES: dict[str, Sparse] = {
    "adaptive 0.99": Adaptive(mass=0.99),
    "page top-k, sketch 1/32": PageTopK(fraction=1 / 32, by="sketch"),
    "page top-k 1/16": PageTopK(fraction=1 / 16),
}


def load(path: Path, *, guesses: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="csd", dtype=torch.bfloat16).eval()
    return guess_queries(model) if guesses else model


def measure(
    models: dict[bool, PreTrainedModel], cache: StorageCache, context: Context
) -> tuple[dict[bool, list[float]], float]:
    """Seconds of steps without and with guesses, and the share of what was guessed that was used."""
    step_s: dict[bool, list[float]] = {False: [], True: []}
    length = cache.get_seq_length()
    before = cache.stats()
    for question in context.questions:
        for guesses, model in models.items():
            feed(model, cache, question.prompt[:-1])
            step_s[guesses] += decode(model, cache, question)[1][1:]
            rewind(cache, length)
    after = cache.stats()
    guessed, used = (after[name] - before[name] for name in ("guessed_bytes", "guessed_used_bytes"))
    return step_s, used / max(1, guessed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--directory", help="on the drive that is measured; nothing is left in it")
    parser.add_argument("--model", type=Path, help="a Hugging Face checkpoint; default: the bundled one")
    parser.add_argument("--tasks", type=Path, help="JSON lines with questions, as of `torch-csd bench accuracy`")
    parser.add_argument("--context", help="tokens; default: 64k, quick: 1k")
    parser.add_argument("--questions", type=int, help="default: 16, quick: 2")
    parser.add_argument("--memory-budget", default="128MiB", help="of the cache")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    parser.add_argument("--json", help="write the rows as JSON; - is standard output")
    args = parser.parse_args()
    try:
        settings = Settings.make(
            args.directory,
            memory_budget=args.memory_budget,
            threads=None,
            io_engine="auto",
            rounds=1,
            quick=args.quick,
            kv_dtypes="bfloat16",
        )
        contexts = args.context or (None if args.tasks else "1k" if args.quick else "64k")
        questions = args.questions or (2 if args.quick else 16)
        plan = Plan.make(args.model, args.tasks, contexts, questions, None, 0, quick=args.quick)
        tokenizer = AutoTokenizer.from_pretrained(plan.model)
        report = Report("guess", "guesses at the next layer's queries", settings, json_to=args.json)
        models = {guesses: load(plan.model, guesses=guesses) for guesses in (False, True)}
        with torch.inference_mode():
            for task in plan.tasks(tokenizer):
                for context in task.contexts:
                    rows(report, settings, models, task.name, context)
        report.finish()
    except (ValueError, OSError, StoreError) as error:
        print(f"bench_guess: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def rows(report: Report, settings: Settings, models: dict[bool, PreTrainedModel], name: str, context: Context) -> None:
    options = settings.drive_options(settings.memory_budget, resident=False)
    with StorageCache(models[False].config, settings.directory, **options) as cache:
        for begin in range(0, len(context.tokens), PREFILL_PIECE):
            feed(models[False], cache, context.tokens[begin : begin + PREFILL_PIECE])
        for label, sparse in CHOICES.items():
            cache.sparse = sparse
            measure(models, cache, Context(context.tokens, context.questions[:1]))  # makes what is chosen by
            step_s, share = measure(models, cache, context)
            plain_ms, guessed_ms = ([1e3 * seconds for seconds in step_s[guesses]] for guesses in (False, True))
            others = [beside("without guesses", guessed_ms, plain_ms, "ms/tok", lower_is_better=True)]
            note = f"{share:.0%} of what was guessed was used; {len(guessed_ms)} steps"
            report.add(Row(f"{name}, {label}, guessed", median(guessed_ms), "ms/tok", others, note))


if __name__ == "__main__":
    sys.exit(main())
