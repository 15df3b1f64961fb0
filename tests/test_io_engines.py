"""The I/O engine under a store: what users see of it when the kernel takes io_uring away in the middle of a run."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from torch_csd import StoreError, probe

# A container may install its seccomp filter whenever it likes.
FORBID = """
import ctypes
import errno
import struct
import sys
import warnings

import torch

IO_URING_ENTER = 426  # on every architecture


def refuse_io_uring_enter(every_thread, seccomp):
    load_number, jump_if_equal, give_back = 0x20, 0x15, 0x06
    refuse, allow = 0x00050000 | errno.EPERM, 0x7FFF0000
    code = struct.pack("HBBI" * 4, load_number, 0, 0, 0, jump_if_equal, 0, 1, IO_URING_ENTER,
                       give_back, 0, 0, refuse, give_back, 0, 0, allow)
    filters = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    PR_SET_NO_NEW_PRIVS, SECCOMP_SET_MODE_FILTER = 38, 1
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    flags = 1 if every_thread else 0  # SECCOMP_FILTER_FLAG_TSYNC
    assert libc.syscall(seccomp, SECCOMP_SET_MODE_FILTER, flags, program) == 0, ctypes.get_errno()
"""

# Here after the store has written half of its pages.
REFUSED = (
    FORBID
    + """
from torch_csd import KVStore

directory, every_thread, seccomp = sys.argv[1], sys.argv[2] == "every thread", int(sys.argv[3])
k, v = torch.randn(2, 2, 4, 3000, 64, generator=torch.Generator().manual_seed(1)).unbind(0)
q = torch.randn(2, 4, 1, 64)
store = KVStore(directory, io_engine="io_uring", memory_budget="4MiB", threads=2, resident=False)
whole = KVStore(directory, memory_budget="64MiB", threads=2)
whole.append(0, k, v)
store.append(0, k[:, :, :1500], v[:, :, :1500])
store.attend(0, q)
before = store.stats()
assert before["io_engine"] == "io_uring", before["io_reason"]

refuse_io_uring_enter(every_thread, seccomp)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store.append(0, k[:, :, 1500:], v[:, :, 1500:])
    for _ in range(3):
        out, lse = store.attend(0, q)
    store.flush()
    read_k, read_v = store.read(0)
    stats = store.stats()
wanted, wanted_lse = whole.attend(0, q)
torch.testing.assert_close(out, wanted)
torch.testing.assert_close(lse, wanted_lse)
assert torch.equal(read_k, k) and torch.equal(read_v, v)
[warning] = caught
text = str(warning.message)
assert warning.category is UserWarning and directory in text and "Operation not permitted" in text, text
assert "io_uring_enter" in text and "pread from now on" in text, text
assert stats["io_engine"] == "pread" and "io_uring_enter" in stats["io_reason"], stats["io_reason"]
assert stats["drive_read_bytes"] > before["drive_read_bytes"] > 0

# Another store finds out as it opens.
other = KVStore(directory)
assert every_thread is False or other.stats()["io_engine"] == "pread"

store.close()
"""
)

SECCOMP = {"x86_64": 317, "aarch64": 277}


@pytest.mark.parametrize("threads", ["every thread", "the calling thread"])
def test_a_store_goes_on_with_pread_when_io_uring_is_forbidden_later(tmp_path, threads):
    if platform.machine() not in SECCOMP:
        pytest.skip(f"the number of seccomp(2) on {platform.machine()} is not known here")
    try:
        probe(tmp_path, "io_uring")
    except StoreError as refused:
        pytest.skip(f"io_uring does not run here anyway: {refused}")
    number = str(SECCOMP[platform.machine()])
    command = [sys.executable, "-c", REFUSED, str(tmp_path), threads, number]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
