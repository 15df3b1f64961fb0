"""`torch-csd bench`: what can be typed and what it means. The work is in `torch_csd.bench`, imported when needed."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from torch_csd.cli.report import UserError, fail, one_line

app = typer.Typer(
    help="Measure this machine: every row beside a roof or a peer of the same run.",
    no_args_is_help=True,
)

Directory = Annotated[
    Path | None,
    typer.Option(
        help="Where the files lie, best on an NVMe drive. Default: $TORCH_CSD_DIRECTORY, else the temporary "
        "directory. Nothing is left in it.",
        metavar="DIR",
    ),
]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Memory that a cold cache may use. Default: 64MiB, quick: 16MiB.", metavar="SIZE")
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Of ours, of torch and of the roof. Default: torch's number.")
]
IoEngine = Annotated[str, typer.Option(help="auto, io_uring or pread.", metavar="NAME")]
KvDtype = Annotated[
    str,
    typer.Option(
        help="Types of stored K and V, with commas: float32, bfloat16, float16, int8, int4. The first float type is "
        "also the model's and the peers'.",
        metavar="LIST",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Interleaved rounds; values and ratios are medians. Default: 9, quick: 3."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: shows that it runs.")]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the rows as JSON; - is standard output.", metavar="FILE")
]
Plot = Annotated[Path | None, typer.Option(help="Draw PNGs into this directory (needs matplotlib).", metavar="DIR")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """What a user can put right is one line, as in the other commands."""
    from torch_csd.errors import StoreError

    # So that files are removed when a run is told to end, as they are after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except (ValueError, TypeError, StoreError, OSError) as error:
        fail(UserError(one_line(error)))
    except UserError as error:
        fail(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings(
    directory: Path | None,
    memory_budget: str | None,
    threads: int | None,
    io_engine: str,
    kv_dtype: str,
    rounds: int | None,
    quick: bool,
    json_to: str | None,
    plot_to: Path | None,
):
    from torch_csd.bench.settings import Settings

    if plot_to is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib: pip install 'torch_csd[bench]'")
        if plot_to.exists() and not plot_to.is_dir():
            raise UserError(f"--plot {plot_to}: not a directory")
    if json_to not in (None, "-") and not Path(json_to).absolute().parent.is_dir():
        raise UserError(f"--json {json_to}: no such directory")
    return Settings.make(
        directory,
        memory_budget=memory_budget or ("16MiB" if quick else "64MiB"),
        threads=threads,
        io_engine=io_engine,
        rounds=rounds or (3 if quick else 9),
        quick=quick,
        kv_dtypes=kv_dtype,
    )


@app.command()
def attention(
    context: Annotated[
        str | None, typer.Option(help="Tokens of the main rows. Default: 256k, quick: 16k.", metavar="N")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Contexts to sweep. Default: 1k,4k,16k,64k,256k, as far as --context.", metavar="LIST"),
    ] = None,
    q_len: Annotated[
        str | None, typer.Option(help="New tokens of the prefill chunk. Default: 512, quick: 128.", metavar="N")
    ] = None,
    past: Annotated[
        str | None, typer.Option(help="Tokens before that chunk. Default: 32k, quick: 4k.", metavar="N")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=8, metavar="N", help="A multiple of 8.")] = 128,
    directory: Directory = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    kv_dtype: KvDtype = "bfloat16,int8,int4",
    rounds: Rounds = None,
    quick: Quick = False,
    json_to: Json = None,
    plot: Plot = None,
) -> None:
    """One layer's attention: cold beside the drive, hot beside memory and torch, prefill chunks, cost of a call."""
    with _user_errors():
        settings = _settings(directory, memory_budget, threads, io_engine, kv_dtype, rounds, quick, json_to, plot)
        from torch_csd.bench import attention as bench
        from torch_csd.bench.report import Report
        from torch_csd.bench.settings import parse_count, parse_counts, tokens_text

        if heads % kv_heads or head_dim % 8:
            raise UserError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}, --head-dim of 8")
        tokens = parse_count(context or ("16k" if quick else "256k"))
        contexts = parse_counts(sweep or "1k,4k,16k,64k,256k")
        sizes = bench.Sizes(
            context=tokens,
            sweep=[n for n in contexts if n <= tokens] or [tokens],
            q_len=parse_count(q_len or ("128" if quick else "512")),
            past=parse_count(past or ("4k" if quick else "32k")),
        )
        report = Report(
            "attention",
            f"attention of one token over {tokens_text(tokens)} ({heads} heads, {kv_heads} kv heads, "
            f"head_dim {head_dim})",
            settings,
            json_to=json_to,
            plot_to=plot,
            plot_tokens="tokens attended to, per second",
            plot_title=f"attention of one token ({heads} heads, {kv_heads} kv heads, head_dim {head_dim})",
        )
        bench.run(settings, report, sizes, bench.Shape(heads, kv_heads, head_dim))
        report.finish()


@app.command()
def sparse(
    context: Annotated[str | None, typer.Option(help="Tokens. Default: 128k, quick: 16k.", metavar="N")] = None,
    heads: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=8, metavar="N", help="A multiple of 8.")] = 128,
    directory: Directory = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    kv_dtype: KvDtype = "bfloat16,int8,int4",
    rounds: Rounds = None,
    quick: Quick = False,
    json_to: Json = None,
) -> None:
    """One layer's sparse attention, cold: page selection and SparF beside dense attention."""
    with _user_errors():
        settings = _settings(directory, memory_budget, threads, io_engine, kv_dtype, rounds, quick, json_to, None)
        from torch_csd.bench import sparse as bench
        from torch_csd.bench.attention import Shape
        from torch_csd.bench.report import Report
        from torch_csd.bench.settings import parse_count, tokens_text

        if heads % kv_heads or head_dim % 8:
            raise UserError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}, --head-dim of 8")
        tokens = parse_count(context or ("16k" if quick else "128k"))
        title = (
            f"sparse attention of one token over {tokens_text(tokens)} ({heads} heads, {kv_heads} kv heads, "
            f"head_dim {head_dim})"
        )
        report = Report("sparse", title, settings, json_to=json_to)
        bench.run(settings, report, tokens, Shape(heads, kv_heads, head_dim))
        report.finish()


@app.command()
def decode(
    context: Annotated[
        str | None, typer.Option(help="Tokens in the cache. Default: 32k, quick: 4k.", metavar="N")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Contexts to sweep. Default: 1k,4k,16k,32k, as far as --context.", metavar="LIST")
    ] = None,
    long_context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the row that is bound by the drive. Default: as many as make 16 x --memory-budget.",
            metavar="N",
        ),
    ] = None,
    directory: Directory = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    kv_dtype: KvDtype = "bfloat16,int8,int4",
    rounds: Rounds = None,
    quick: Quick = False,
    json_to: Json = None,
    plot: Plot = None,
) -> None:
    """A whole model's step (Llama, hidden 512, 8 layers): hot and cold beside transformers' caches and the drive."""
    with _user_errors():
        settings = _settings(directory, memory_budget, threads, io_engine, kv_dtype, rounds, quick, json_to, plot)
        from torch_csd.bench import decode as bench
        from torch_csd.bench.report import Report
        from torch_csd.bench.settings import parse_count, parse_counts, tokens_text

        tokens = parse_count(context or ("4k" if quick else "32k"))
        sizes = bench.Sizes(
            context=tokens,
            sweep=[n for n in parse_counts(sweep or "1k,4k,16k,32k") if n <= tokens] or [tokens],
            long_context=bench.long_context(settings) if long_context is None else parse_count(long_context),
        )
        report = Report(
            "decode",
            f"decode of one token by a Llama (hidden 512, 8 layers, 8/4 heads of 64) after {tokens_text(tokens)}",
            settings,
            json_to=json_to,
            plot_to=plot,
            plot_tokens="tokens generated per second",
            plot_title="decode by a Llama (hidden 512, 8 layers, 8/4 heads of 64)",
        )
        bench.run(settings, report, sizes)
        report.finish()


@app.command()
def prefill(
    prompt: Annotated[str | None, typer.Option(help="Tokens. Default: 8k, quick: 1k.", metavar="N")] = None,
    chunk: Annotated[
        str | None, typer.Option(help="Tokens of a chunk in chunked prefill. Default: 512.", metavar="N")
    ] = None,
    directory: Directory = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Of the cache. Default: a quarter of the cache's bytes.", metavar="SIZE")
    ] = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    kv_dtype: KvDtype = "bfloat16,int8,int4",
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Interleaved rounds, for medians. Default: 5, quick: 3.")
    ] = None,
    quick: Quick = False,
    json_to: Json = None,
    plot: Plot = None,
) -> None:
    """A prompt into a cache that does not fit its budget (write-behind), beside the same into a DynamicCache."""
    with _user_errors():
        from torch_csd.bench.settings import parse_count, tokens_text

        tokens = parse_count(prompt or ("1k" if quick else "8k"))
        chunk_tokens = parse_count(chunk or "512")
        rounds = rounds or (3 if quick else 5)
        settings = _settings(directory, memory_budget, threads, io_engine, kv_dtype, rounds, quick, json_to, plot)
        from torch_csd.bench import prefill as bench
        from torch_csd.bench.report import Report

        report = Report(
            "prefill",
            f"prefill of {tokens_text(tokens)} by a Llama (hidden 512, 8 layers, 8/4 heads of 64)",
            settings,
            json_to=json_to,
            plot_to=plot,
            plot_x="prompt, tokens",
            plot_tokens="prompt tokens per second",
            plot_title="prefill by a Llama (hidden 512, 8 layers, 8/4 heads of 64)",
        )
        bench.run(settings, report, tokens, chunk_tokens, memory_budget)
        report.finish()


@app.command()
def weights(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A Hugging Face checkpoint. Default: a random Llama of --size, made and removed.", metavar="DIR"
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of that Llama. Default: 6.2GB, quick: 32MB.", metavar="SIZE")
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="That a process may keep in memory (RLIMIT_DATA). Default: 2GiB.", metavar="SIZE")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Tokens of a prefill. Default: 512, quick: 64.", metavar="N")
    ] = None,
    directory: Directory = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(help="Of weights in memory, ours and accelerate's. Default: 1GiB, quick: 12MiB.", metavar="SIZE"),
    ] = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Interleaved rounds, for medians. Default: 5, quick: 3.")
    ] = None,
    quick: Quick = False,
    json_to: Json = None,
) -> None:
    """A checkpoint larger than memory: load, decode and prefill from the drive, beside accelerate's disk offload."""
    with _user_errors():
        memory_budget = memory_budget or ("12MiB" if quick else "1GiB")
        rounds = rounds or (3 if quick else 5)
        settings = _settings(directory, memory_budget, threads, io_engine, "bfloat16", rounds, quick, json_to, None)
        from torch_csd.bench import weights as bench
        from torch_csd.bench.report import Report

        sizes = bench.Sizes.make(size, limit, prompt, quick=quick)
        if checkpoint is not None and not any(checkpoint.glob("*.safetensors")):
            raise UserError(f"--checkpoint {checkpoint}: no safetensors files there")
        title = f"weights on the drive: {checkpoint or f'a random Llama of {sizes.size_bytes / 1e9:.1f} GB'}"
        title += f", {settings.budget_bytes / 2**20:.0f} MiB of them in memory"
        report = Report("weights", title, settings, json_to=json_to)
        bench.run(settings, report, sizes, checkpoint)
        report.finish()


@app.command()
def io(
    size: Annotated[
        str | None, typer.Option(help="Bytes of the file that is read. Default: 1GiB, quick: 128MiB.", metavar="SIZE")
    ] = None,
    directory: Directory = None,
    memory_budget: MemoryBudget = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    rounds: Rounds = None,
    quick: Quick = False,
    json_to: Json = None,
    plot: Plot = None,
) -> None:
    """The drive by engine, read size, threads and depth, beside fio: which settings reach its rate."""
    with _user_errors():
        settings = _settings(directory, memory_budget, threads, io_engine, "bfloat16", rounds, quick, json_to, plot)
        from torch_csd.bench import io as bench
        from torch_csd.bench.report import Report
        from torch_csd.config import parse_bytes

        size_bytes = parse_bytes(size or ("128MiB" if quick else "1GiB"))
        if size_bytes < 2**25:
            raise UserError(f"--size must be at least 32MiB, got {size}")
        report = Report(
            "io",
            f"reads of {size_bytes / 2**20:.0f} MiB past the page cache",
            settings,
            json_to=json_to,
            plot_to=plot,
            plot_x="reads in flight",
        )
        bench.run(settings, report, size_bytes)
        report.finish()


@app.command()
def accuracy(
    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face checkpoint. Default: the bundled one, trained to recall.", metavar="DIR"),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines (named .jsonl), {"prompt": ..., "answer": ...} or {"context": ..., "questions": '
            '[{"prompt": ..., "answer": ...}]}; any other file is a text, whose last tokens are predicted. '
            "Default: the bundled task.",
            metavar="FILE",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the contexts. Default: 4k,16k,64k, quick: 1k; a text: all of it; JSON lines: as they are.",
            metavar="LIST",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="exact, sparf, sparf-sketch, page, adaptive, h2o, window, with an amount if you like: page-1/8, "
            "adaptive-0.99. Default: all of them at 1/8, 1/16 and 1/32, adaptive at 0.99 and 0.999; quick: at 1/8 and "
            "0.99.",
            metavar="LIST",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Per context length. Default: 100, above 16k tokens 60, quick: 4."),
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens of a text that are predicted.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bundled task's contexts.")] = 0,
    directory: Directory = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Of each cache. Default: 256MiB, quick: 64MiB.", metavar="SIZE")
    ] = None,
    threads: Threads = None,
    io_engine: IoEngine = "auto",
    kv_dtype: KvDtype = "bfloat16,int8,int4",
    quick: Quick = False,
    json_to: Json = None,
    plot: Plot = None,
) -> None:
    """Sparse attention: recall, KL and bytes read beside exact attention, H2O and a sliding window."""
    with _user_errors():
        memory_budget = memory_budget or ("64MiB" if quick else "256MiB")
        settings = _settings(directory, memory_budget, threads, io_engine, kv_dtype, 1, quick, json_to, plot)
        import transformers

        from torch_csd.bench import accuracy as bench
        from torch_csd.bench import plots
        from torch_csd.bench.report import Report

        transformers.logging.disable_progress_bar()
        chosen = bench.parse_methods(methods or ",".join(bench.QUICK if quick else bench.FAMILIES))
        plan = bench.Plan.make(model, tasks, context, questions, last, seed, quick=quick)
        loaded, tokenizer = bench.load(plan.model, settings.base)
        made = plan.tasks(tokenizer)
        report = Report(
            "accuracy",
            f"accuracy of sparse attention: {plan.model.name}, {', '.join(task.name for task in made)}",
            settings,
            json_to=json_to,
            plot_to=plot,
            plot_x="bytes read per token",
            draw=plots.draw_accuracy,
        )
        bench.run(settings, report, loaded, made, chosen)
        report.finish()
