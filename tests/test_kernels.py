"""Builds and runs what tests the kernels of quantised tiles and weights: every instruction set against serial."""

from __future__ import annotations

import glob
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
@pytest.mark.parametrize("name", ["test_codes", "test_weights"])
def test_what_is_quantised_means_the_same_to_every_instruction_set(tmp_path, name):
    program = tmp_path / name
    sources = [
        f"tests/native/{name}.cpp",
        "csrc/base/error.cpp",
        *sorted(glob.glob("csrc/kernels/*.cpp", root_dir=ROOT)),
    ]
    build = ["g++", "-std=c++17", "-O2", "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
