"""Everything that a GPU can show, in one run of eight minutes and one table: see README.md, "GPU".

    python benchmarks/bench_gpu.py --directory /nvme/kv --json gpu.json

Builds the extension where it is not built. Each section is a process of its own: one that fails, hangs or crashes is a
row that says so, and the others go on. The table comes last, also after SIGTERM and at the end of the time limit.

Exit code: 0, 1 if a section failed, 2 without a CUDA device, 3 if it was ended before its end.
"""

from __future__ import annotations

import argparse
import importlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "benchmarks")) if path not in sys.path]

from gpu.table import Row, Table, as_line, from_line  # noqa: E402

TIME_LIMIT_S = 480.0
BUILD_LIMIT_S = 200.0
ENDING = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 15.0  # between what a section is told and its end: a round may be under way
LAST_S = 3.0  # for the table


class Section(NamedTuple):
    module: str
    function: str
    limit_s: float  # of TIME_LIMIT_S


SECTIONS = {
    "environment": Section("gpu.environment", "measure", 60),
    "kernels": Section("gpu.kernels", "measure", 80),
    "transfers": Section("gpu.transfers", "measure", 50),
    "weights": Section("gpu.weights", "measure", 60),
    "prefill": Section("gpu.models", "measure_prefill", 75),
    "decode": Section("gpu.models", "measure_decode", 90),
    "correctness": Section("gpu.correctness", "measure", 70),
    "tests": Section("gpu.suite", "measure", 240),  # what the others leave of it
}


class Ended(Exception):
    """SIGTERM or SIGINT came."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--directory", help="on the drive that is measured; nothing is left in it")
    parser.add_argument("--quick", action="store_true", help="small sizes and no bars: shows that it runs")
    parser.add_argument("--rounds", type=int, help="of each measurement (default: 7, quick: 3)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds, build and table included")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON, anew after each")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # how it starts itself
    parser.add_argument("--rows-to", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 3 if options.quick else 7
    if options.rounds < 1 or options.time_limit <= 0:
        parser.error("--rounds and --time-limit must be above 0")
    missing = missing_card()
    if missing is not None:
        print(f"bench_gpu: {missing}; nothing was started", file=sys.stderr)
        return 2
    if options.section is not None:
        measure_section(options)
        return 0
    return run(options)


def missing_card() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.cuda.is_available():
        return None
    return f"no CUDA device (torch {torch.__version__})"


# ---- the process that keeps the table --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    end_s = time.monotonic() + options.time_limit - LAST_S
    table = Table(quick=options.quick, json_to=options.json)

    def end(number: int, frame: object) -> NoReturn:
        raise Ended(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in ENDING}
    names = list(SECTIONS) if options.only is None else [name for name in SECTIONS if name in options.only]
    waiting = list(names)
    code = 0
    try:
        with tempfile.TemporaryDirectory(prefix="bench_gpu-", dir=options.directory) as directory:
            if not build(table, end_s):
                code = 1
                waiting.clear()
            while waiting:
                name = waiting[0]
                left_s = end_s - time.monotonic()
                limit_s = min(SECTIONS[name].limit_s * options.time_limit / TIME_LIMIT_S, left_s - GRACE_S)
                if limit_s <= 0:
                    code = 3
                    break
                command = child_command(options, name, directory, limit_s)
                if not run_section(table, name, command, limit_s, min(limit_s + GRACE_S, left_s)):
                    code = max(code, 1)
                waiting.pop(0)
        reason = "no time is left"
    except Ended as signalled:
        code, reason = 3, f"{signalled} came"
    finally:
        for number in before:  # nothing may come between the table and its print
            signal.signal(number, signal.SIG_IGN)
        for name in waiting:
            table.add(Row(name, reason=reason if sys.exc_info()[0] is None else "this script failed", section=name))
        table.print()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def child_command(options: argparse.Namespace, name: str, directory: str, limit_s: float) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name, "--directory", directory]
    command += ["--rounds", str(options.rounds), "--time-limit", str(limit_s)]
    return command + (["--quick"] if options.quick else [])


def build(table: Table, end_s: float) -> bool:
    """Builds the extension where it cannot be imported as it is. False: it cannot be had."""
    start_s = time.monotonic()
    loads = [sys.executable, "-c", "import torch_csd"]
    if any((ROOT / "torch_csd").glob("_C*.so")) and _output(loads, end_s)[0] == 0:
        table.add(Row("build", text="there already", section="build"))
        return True
    limit_s = min(BUILD_LIMIT_S, end_s - time.monotonic())
    code, text = _output([sys.executable, "setup.py", "build_ext", "--inplace"], min(end_s, time.monotonic() + limit_s))
    if code == 0:
        code, problem = _output(loads, end_s)
        text += problem
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code != 0:
        print(text[-8000:], file=sys.stderr)
        why = f"longer than {limit_s:.0f} s" if code is None else lines[-1][:300] if lines else f"exit code {code}"
        table.add(Row("build", failed=True, reason=why, section="build"))
        return False
    notes = [line for line in lines if "liburing" in line and line.startswith("torch_csd:")]
    seconds = time.monotonic() - start_s
    table.add(Row("build", seconds, "s", reason=notes[0] if notes else "with liburing", section="build"))
    return True


def _output(command: list[str], end_s: float) -> tuple[int | None, str]:
    """Exit code and all it printed; no code: it took too long."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            text = child.communicate(timeout=max(end_s - time.monotonic(), 1))[0]
        except subprocess.TimeoutExpired:
            return None, ""
        return child.returncode, text


@contextmanager
def started(command: list[str], **options: object) -> Iterator[subprocess.Popen]:
    """A process of this directory and of a group of its own, all of which is gone afterwards."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # or it might be started and forgotten
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, preexec_fn=_leave_group, **options
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        raise
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        yield child
    finally:
        _kill(child)


def _leave_group() -> None:
    os.setpgrp()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_section(table: Table, name: str, command: list[str], limit_s: float, kill_s: float) -> bool:
    """Adds the rows that a process sends, as they come, and one more if it does not end well."""
    print(f"---- {name}, {limit_s:.0f} s at most", file=sys.stderr, flush=True)
    end_s = time.monotonic() + kill_s
    failed_before = sum(row.failed for row in table.rows)
    readable, writable = os.pipe()
    command = [*command, "--rows-to", str(writable)]
    try:
        with started(command, stdout=sys.stderr.fileno(), pass_fds=(writable,)) as child:
            os.close(writable)
            writable = -1
            if not _take_rows(table, name, readable, end_s):
                table.add(Row(name, failed=True, reason=f"did not end within {kill_s:.0f} s", section=name))
            else:
                _take_code(table, name, child, end_s)
    finally:
        os.close(readable)
        if writable >= 0:
            os.close(writable)
    return sum(row.failed for row in table.rows) == failed_before


def _take_code(table: Table, name: str, child: subprocess.Popen, end_s: float) -> None:
    try:
        code = child.wait(max(end_s - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        return  # all rows are there, and its libraries hang as they go
    if code != 0:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        table.add(Row(name, failed=True, reason=how, section=name))


def _take_rows(table: Table, name: str, readable: int, end_s: float) -> bool:
    """False: the time is over before the process has closed its end."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(readable, selectors.EVENT_READ)
        while selector.select(max(end_s - time.monotonic(), 0)):
            part = os.read(readable, 65536)
            if not part:
                return True
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                row = from_line(line)
                row.section = name
                table.add(row)
    return False


def _kill(child: subprocess.Popen) -> None:
    """And what it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        pass  # in the kernel for good


# ---- the process that measures ---------------------------------------------------------------------------------------


def measure_section(options: argparse.Namespace) -> None:
    """A section's rows, to the file descriptor that was given."""
    import torch
    from gpu.run import Deadline, EventTimer, Run, WallTimer

    from torch_csd.cuda.cuda_device import CudaDevice

    def send(row: Row) -> None:
        os.write(options.rows_to, as_line(row))  # short: a pipe takes it whole

    deadline = Deadline(options.time_limit)
    measured = Run(
        device=CudaDevice(),
        card_timer=EventTimer(),
        wall_timer=WallTimer(torch.cuda.synchronize),
        synchronize=torch.cuda.synchronize,
        free_bytes=torch.cuda.mem_get_info()[0],
        directory=options.directory,
        add=send,
        deadline=deadline,
        rounds=options.rounds,
        quick=options.quick,
    )
    section = SECTIONS[options.section]
    guarded(options.section, measured, lambda: getattr(importlib.import_module(section.module), section.function))


def guarded(name: str, measured: object, load: object) -> None:
    """Whatever a section raises becomes a row."""
    from gpu.run import TimeUp, one_line

    try:
        load()(measured)
    except TimeUp:
        measured.add(Row(name, reason="the rest: this section's time is over"))
    except Exception as error:
        import traceback

        traceback.print_exc()
        measured.add(Row(name, failed=True, reason=one_line(error)))


if __name__ == "__main__":
    sys.exit(main())
