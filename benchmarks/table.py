"""table.py FILE.json ...: what `torch-csd bench --json` wrote, as the tables of benchmarks/README.md.

Of accuracy: a table for each context, a line for each method, and for each kv_dtype recall in per cent (perplexity,
where nothing is asked), KL in nats, bytes read as a share of the reference's, and tokens/s. Of the others: every row
that has a bar, and what stood beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from torch_csd.bench.report import number


def accuracy_lines(report: dict) -> Iterator[str]:
    by_task: dict[str, list[dict]] = {}
    for row in report["rows"]:
        if row["figures"]:
            by_task.setdefault(row["figures"]["task"], []).append(row["figures"])
    for task, figures in by_task.items():
        reference, measured = figures[0], figures[1:]
        first = "perplexity" if reference["recall"] is None else "recall, %"
        asked = (
            f"{reference['positions']} tokens" if reference["recall"] is None else f"{reference['questions']} questions"
        )
        dtypes = list(dict.fromkeys(each["kv_dtype"] for each in measured))
        yield f"**{task}** ({asked}; the reference: {_first(reference)})"
        yield ""
        yield "| method | " + " | ".join(f"{dtype}: {first} | KL | bytes | tok/s" for dtype in dtypes) + " |"
        yield "|---|" + "---|---|---|---|" * len(dtypes)
        for method in dict.fromkeys(each["method"] for each in measured):
            cells = {each["kv_dtype"]: _cells(each) for each in measured if each["method"] == method}
            memory = any(each["in_memory"] for each in measured if each["method"] == method)
            name = f"{method}, in memory" if memory else method
            yield f"| {name} | " + " | ".join(cells.get(dtype, " |  |  | ") for dtype in dtypes) + " |"
        yield ""


def _first(figures: dict) -> str:
    return number(figures["perplexity"]) if figures["recall"] is None else f"{100 * figures['recall']:.0f}"


def _cells(figures: dict) -> str:
    kl, share, speed = figures["kl"], figures["share_of_exact_bytes"], figures["tokens_per_s"]
    return f"{_first(figures)} | {kl:.2g} | {share:.3f} | {number(speed)}"


def bar_lines(report: dict) -> Iterator[str]:
    yield "| row | value | beside it, in the same run | ratio | bar |"
    yield "|---|---|---|---|---|"
    for row in report["rows"]:
        if row["value"] is None:
            continue
        name, value = row["name"], f"{number(row['value'])} {row['unit']}"
        if row["bar"]:
            yield f"| {name} | {value} | | | {row['bar']}: {_met(row['met'])} |"
        barred = [other for other in row["beside"] if other["bar"] is not None]
        ours = [other for other in row["beside"] if other["bar"] is None and "our O_DIRECT" in other["name"]]
        for other in barred + (ours if barred else []):
            bar = ""
            if other["bar"] is not None:
                bar = f"{'≤' if other['at_most'] else '≥'} {other['bar']:g}: {_met(other['met'])}"
            beside = f"{other['name']}: {number(other['value'])} {other['unit']}"
            yield f"| {name} | {value} | {beside} | {other['ratio']:.2f} | {bar} |"
            name, value = "", ""


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        with open(path) as file:
            report = json.load(file)
        print(*(accuracy_lines if report["name"] == "accuracy" else bar_lines)(report), sep="\n")


if __name__ == "__main__":
    main()
