"""Builds and runs tests/native/test_codes.cpp: the kernels of quantised tiles, every instruction set against serial."""

from __future__ import annotations

import glob
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
def test_quantised_tiles_mean_the_same_to_every_instruction_set(tmp_path):
    program = tmp_path / "test_codes"
    sources = [
        "tests/native/test_codes.cpp",
        "csrc/base/error.cpp",
        *sorted(glob.glob("csrc/kernels/*.cpp", root_dir=ROOT)),
    ]
    build = ["g++", "-std=c++17", "-O2", "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
