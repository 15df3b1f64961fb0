"""By kvikio. Without a GPU: the real kvikio, in a process whose libcuda and libcufile are stubs (tests/native)."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transfer_support import build_stubs, stub_environment, why_no_kvikio

from torch_csd.cuda.gds import errno_of

HERE = Path(__file__).parent


def test_the_contract_and_more_hold_for_kvikio_over_stubs_of_its_driver(tmp_path):
    missing = why_no_kvikio()
    if missing:
        pytest.skip(missing)
    build_stubs(tmp_path)
    files = [str(HERE / "test_contract.py"), str(HERE / "gds_with_stubs.py")]
    # A process of its own, with a limit: what is loaded stays loaded, and kvikio may hang.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    environment = stub_environment(tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    run = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'inner'}"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) > 50, run.stdout


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENOENT, errno.EFAULT])
def test_an_errno_is_found_by_its_text(code):
    assert errno_of(f"KvikIO failure at: /x/file.cpp:12: Unable to write file: {os.strerror(code)}") == code
    assert errno_of(f"anything else\n{os.strerror(code)}\n") in (code, errno.EIO)


@pytest.mark.parametrize(
    "text", ["", "cuFile error:nvidia-fs driver is not loaded", "cuFile error at: f.cpp:230: Operation not permitted"]
)
def test_a_text_without_an_errno_is_an_input_output_error(text):
    assert errno_of(text) == errno.EIO
