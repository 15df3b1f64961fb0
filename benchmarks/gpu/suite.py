"""The tests that a card takes part in, counted: what they say is a row, whether or not they come to an end."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu.run import Run
from gpu.table import Row

ROOT = Path(__file__).resolve().parents[2]
PATHS = ("tests/cuda", "tests/emulation")
_RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def measure(run: Run, paths: tuple[str, ...] = PATHS) -> None:
    name = "pytest " + " ".join(paths)
    missing = [package for package in ("pytest", "hypothesis") if importlib.util.find_spec(package) is None]
    if missing:
        run.add(Row(name, reason=f"{' and '.join(missing)} not installed here: carry wheels (README.md)"))
        return
    command = [sys.executable, "-m", "pytest", *paths, "-v", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(os.cpu_count() or 1, 8))]
    limit_s = max(run.deadline.left_s - 5, 5)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = None
        output.seek(0)
        text = output.read()
    print(text[-4000:], file=sys.stderr)
    run.add(row(name, text, code, limit_s))


def row(name: str, text: str, code: int | None, limit_s: float) -> Row:
    """What pytest's -v output comes to. code None: it was ended after the limit."""
    lines = [line for line in text.splitlines() if "::" in line and " - " not in line]
    results = [found[1] for line in lines if (found := _RESULT.search(line))]
    passed, bad = results.count("PASSED"), results.count("FAILED") + results.count("ERROR")
    failures = sorted({part for line in lines if re.search(r"\b(FAILED|ERROR)\b", line) for part in _tests_in(line)})
    told = [f"{results.count('SKIPPED')} skipped"] if "SKIPPED" in results else []
    if failures:
        told.append("failed: " + ", ".join(failures[:6]) + (f" and {len(failures) - 6} more" if failures[6:] else ""))
    if not results:
        last = [line for line in text.splitlines() if line.strip()]
        return Row(name, failed=True, reason=f"exit code {code}: {last[-1][:200] if last else 'no output'}")
    return Row(
        name,
        passed,
        "passed",
        beside="run",
        beside_value=passed + bad,
        beside_unit="tests",
        ratio=passed / max(passed + bad, 1),
        bar=1.0,
        sized=False,
        waived=f"ended after {limit_s:.0f} s, before all had run" if code is None and not bad else "",
        failed=code not in (0, 1, None),
        reason="; ".join(told),
    )


def _tests_in(line: str) -> list[str]:
    return [word.rpartition("/")[2] for word in line.split() if "::" in word]
