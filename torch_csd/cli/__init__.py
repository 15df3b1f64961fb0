"""The command `torch-csd`: what can be typed and what it means. The modules beside this do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_csd.cli import bench
from torch_csd.cli.report import UserError, fail
from torch_csd.version import __version__

app = typer.Typer(
    name="torch-csd",
    help="Long contexts with the KV cache on a drive, and the attention computed next to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torch-csd {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Option(help="Directory of a Hugging Face checkpoint, or its name on the hub.", metavar="DIR|NAME"),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines, each {"prompt": "..."} or {"messages": [...]}, with an "id" if you like '
            "(else the line's number).",
            metavar="FILE.jsonl",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, in place of a file; may be repeated.", metavar="TEXT")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the rows go; default: standard output. Rows that it has are not done again.",
            metavar="FILE.jsonl",
        ),
    ] = None,
    kv_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the KV cache, best on an NVMe drive. Default: $TORCH_CSD_DIRECTORY, else the "
            "temporary directory. Nothing is left in it, but for --durable.",
            metavar="DIR",
        ),
    ] = None,
    durable: Annotated[
        bool,
        typer.Option(
            "--durable",
            help="Keep the KV cache of each prompt (all but its last token) in --kv-dir, and begin with what is kept "
            "there already: the longest beginning that any kept prompt of this model, --dtype and --kv-dtype shares. "
            "The same prompt again is read, not computed. With --prefill-chunk-size a long one is kept every half "
            "minute while it is read in. Sequences pile up: see inspect, rm and gc.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate for each row, at most.")
    ] = 128,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Rows generated together. Default: 1; with --weights-on-drive as many as make a token cheapest.",
        ),
    ] = None,
    memory_budget: Annotated[
        str,
        typer.Option(help="Memory that the KV cache may use; the rest goes to the drive.", metavar="SIZE"),
    ] = "1GiB",
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of stored K and V: float32, bfloat16, float16; int8, int4 (lossy). Default: the model's.",
            metavar="DTYPE",
        ),
    ] = None,
    sparse: Annotated[
        str | None,
        typer.Option(
            help="Read a choice of the tokens at each step, and so not exact: page:1/16 (of the pages), page:4096 "
            "(tokens), adaptive:0.99 (of the softmax), sparf:32,128 (channels, tokens), sparf-sketch:128. "
            "Default: all of them.",
            metavar="CHOICE",
        ),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="With --device cuda, where attention is computed: near (the drive), gpu, auto (by what is measured).",
            metavar="NAME",
        ),
    ] = "auto",
    gpu_budget: Annotated[
        str, typer.Option(help="GPU memory for a share of the KV cache that stays there.", metavar="SIZE")
    ] = "0",
    gpu_io: Annotated[
        str,
        typer.Option(
            help="How the GPU reaches the drive: gds (GPUDirect Storage), pinned (through host memory), or auto.",
            metavar="NAME",
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="Type of the weights: auto (as saved), float32, bfloat16, float16.", metavar="DTYPE"),
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where the model runs.")] = "cpu",
    weights_on_drive: Annotated[
        bool,
        typer.Option(
            "--weights-on-drive",
            help="Read the weights from the checkpoint's safetensors files at each step: for models that no memory "
            "holds. Large batches pay for that: without --batch-size one is chosen.",
        ),
    ] = False,
    weight_budget: Annotated[
        str,
        typer.Option(help="With --weights-on-drive, memory for weights: read ahead, and kept.", metavar="SIZE"),
    ] = "4GiB",
    weight_dtype: Annotated[
        str | None,
        typer.Option(
            help="With --weights-on-drive, compute with int8 or int4 copies (lossy), made once below --kv-dir.",
            metavar="DTYPE",
        ),
    ] = None,
    attn_implementation: Annotated[
        str,
        typer.Option(
            help='"csd", or one of transformers\' own: "sdpa", "eager"; all of them read the drive.', metavar="NAME"
        ),
    ] = "csd",
    prefill_chunk_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Feed prompts to the model in pieces of so many tokens.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, metavar="N", help="Beams; 1 is no beam search.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Sample at this temperature. Default: greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Sample from the likeliest tokens that make up this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")] = 0,
) -> None:
    """Generate text for many prompts, with the KV cache on a drive.

    Each row is on disk in OUTPUT before the next batch starts. After an interruption the same command goes on
    where it stopped; rows that failed are tried again. Exit code: 0 all done, 1 some failed, 2 bad arguments.
    """
    from torch_csd.cli.generate import Settings, run

    try:
        settings = Settings(
            model=model,
            kv_dir=kv_dir,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            memory_budget=memory_budget,
            kv_dtype=kv_dtype,
            sparse=sparse,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            prefill_chunk_size=prefill_chunk_size,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            durable=durable,
            executor=executor,
            gpu_budget=gpu_budget,
            gpu_io=gpu_io,
            weights_on_drive=weights_on_drive,
            weight_budget=weight_budget,
            weight_dtype=weight_dtype,
        )
        raise typer.Exit(run(settings, prompts_file=prompts, prompt_texts=prompt or [], output=output))
    except UserError as error:
        fail(error)


@app.command()
def probe(
    directory: Annotated[Path, typer.Argument(help="A directory on the drive in question.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Also write and read 128 MiB through a store, and time it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show how a directory's drive would be reached: which I/O engine, O_DIRECT or not, and why."""
    from torch_csd.cli.drive import show_probe

    try:
        show_probe(directory, measure=measure, as_json=as_json)
    except UserError as error:
        fail(error)


StoreDirectory = Annotated[Path, typer.Argument(help="A directory that stores use.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@app.command()
def inspect(directory: StoreDirectory, as_json: AsJson = False) -> None:
    """Show what stores keep in a directory: durable sequences, and the scratch files of running processes.

    Works while a process writes there, and keeps nobody from it. What is damaged is said, as far as that can be
    seen without reading pages: see verify.
    """
    from torch_csd.cli.store import show_contents

    try:
        show_contents(directory, as_json=as_json)
    except UserError as error:
        fail(error)


@app.command()
def verify(
    directory: StoreDirectory,
    name: Annotated[str | None, typer.Option(help="Only this sequence. Default: all.", metavar="NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every page of the durable sequences and compare it with its checksum.

    Works while a process writes there. Exit code: 0 all is well, 1 something is damaged, 2 there is nothing to look at.
    """
    from torch_csd.cli.store import verify_pages

    try:
        raise typer.Exit(verify_pages(directory, name, as_json=as_json))
    except UserError as error:
        fail(error)


@app.command()
def rm(
    directory: StoreDirectory,
    names: Annotated[list[str], typer.Argument(help="Sequences, as inspect shows them.", metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, on a terminal either.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove durable sequences, damaged or not: all that are named, or none if one of them is not there.

    Their space serves other sequences from then on; gc gives it back to the file system.
    """
    from torch_csd.cli.store import remove

    try:
        raise typer.Exit(remove(directory, names, without_asking=yes, as_json=as_json))
    except UserError as error:
        fail(error)


@app.command()
def gc(directory: StoreDirectory, as_json: AsJson = False) -> None:
    """Give the unused end of a directory's file of pages back to the file system."""
    from torch_csd.cli.store import give_back

    try:
        give_back(directory, as_json=as_json)
    except UserError as error:
        fail(error)
