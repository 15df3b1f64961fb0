"""Builds and runs C++ test programs of tests/native: I/O engines with faults injected below them, lists, checksums."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def has_liburing() -> bool:
    probe = ["g++", "-x", "c++", "-", "-luring", "-o", "/dev/null"]
    return (
        subprocess.run(probe, input="#include <liburing.h>\nint main() {}", text=True, capture_output=True).returncode
        == 0
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
@pytest.mark.parametrize("liburing", [True, False], ids=["liburing", "pread only"])
def test_io_engines_survive_short_transfers_and_refusals(tmp_path, liburing):
    if liburing and not has_liburing():
        pytest.skip("liburing's headers are not installed")
    program = tmp_path / "test_io"
    sources = [
        "tests/native/test_io.cpp",
        "csrc/base/error.cpp",
        "csrc/base/own_descriptors.cpp",
        *sorted(glob.glob("csrc/io/*.cpp", root_dir=ROOT)),
    ]
    flags = ["-DCSD_HAVE_LIBURING", "-luring", "-ldl"] if liburing else []
    build = ["g++", "-std=c++17", "-O1", "-Icsrc", *sources, *flags, "-pthread", "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    directory = tmp_path / "drive"
    directory.mkdir()
    run = subprocess.run([str(program), str(directory)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
def test_pages_leave_memory_in_order_whichever_go_before_their_turn(tmp_path):
    program = tmp_path / "test_candidates"
    sources = [
        "tests/native/test_candidates.cpp",
        *(f"csrc/store/{name}.cpp" for name in ("candidates", "arena", "extents")),
        *sorted(glob.glob("csrc/base/*.cpp", root_dir=ROOT)),
    ]
    build = ["g++", "-std=c++17", "-O1", "-Icsrc", *sources, "-pthread", "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
def test_checksums_are_crc32c_whatever_the_processor_has(tmp_path):
    program = tmp_path / "test_checksum"
    sources = ["tests/native/test_checksum.cpp", "csrc/base/checksum.cpp"]
    build = ["g++", "-std=c++17", "-O1", "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
def test_what_is_read_from_files_is_checked(tmp_path):
    """The fuzz target on its corpus, and on every prefix of it; `make fuzz` goes on from there."""
    program = tmp_path / "fuzz_format"
    sources = [
        "tests/native/fuzz_format.cpp",
        *(f"csrc/{name}.cpp" for name in ("store/format", "store/table", "base/error", "base/checksum")),
    ]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if has_sanitizers() else []
    build = ["g++", "-std=c++17", "-O1", "-DCSD_REPLAY", *checks, "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    corpus = sorted(glob.glob("tests/native/corpus/*", root_dir=ROOT))
    run = subprocess.run([str(program), *corpus], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="no g++, or no make")
def test_io_for_others_is_tried_again_and_keeps_its_memory():
    out = ROOT / "build" / "tests"
    make = ["make", "-s", f"-j{os.cpu_count()}", "-f", "tests/native/Makefile", f"OUT={out}", f"{out}/test_slab_io"]
    subprocess.run(make, cwd=ROOT, check=True)
    run = subprocess.run([str(out / "test_slab_io")], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the test program with")
def test_files_of_others_are_read_in_order_and_errors_are_one_tickets_own(tmp_path):
    program = tmp_path / "test_file_reader"
    sources = [
        "tests/native/test_file_reader.cpp",
        "csrc/executor/file_reader.cpp",
        *(f"csrc/io/{name}.cpp" for name in ("open", "pread_engine")),
        *(f"csrc/base/{name}.cpp" for name in ("error", "own_descriptors")),
    ]
    build = ["g++", "-std=c++17", "-O1", "-Icsrc", *sources, "-pthread", "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="no g++, or no make")
@pytest.mark.parametrize("where", ["memory", "drive"])
def test_whatever_fails_below_a_drive_nothing_is_lost_or_wrong(tmp_path, where):
    """Every fault in the middle of every operation; on the drive, where that takes its time, of the longest ones."""
    out = ROOT / "build" / "tests"  # kept, so that only what has changed is built
    make = ["make", "-s", f"-j{os.cpu_count()}", "-f", "tests/native/Makefile", f"OUT={out}", f"{out}/test_faults"]
    subprocess.run(make, cwd=ROOT, check=True)
    if where == "drive":
        directory, cases = tmp_path, ["decode", "durable"]
    elif os.access("/dev/shm", os.W_OK):
        directory, cases = Path(tempfile.mkdtemp(dir="/dev/shm")), []
    else:
        pytest.skip("no /dev/shm to write to")
    command = [str(out / "test_faults"), str(directory), *cases]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    if where == "memory":
        directory.rmdir()


def has_sanitizers() -> bool:
    probe = ["g++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o", "/dev/null"]
    return subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode == 0
