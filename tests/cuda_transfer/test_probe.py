"""Which way between drive and GPU: found out by a process that may hang, crash, lie or find no GPU at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from transfer_support import HostDevice, build_stubs, stub_environment, why_no_kvikio

from torch_csd import StoreError, ops, probe
from torch_csd.cuda import probe as gpu_probe
from torch_csd.cuda.probe import GpuIoVerdict, choose_transfer, probe_gpu_io

# Read by every Python that starts below: a torch that has a device, whose memory is the stubs'.
FAKE_CUDA = """
import torch
from transfer_support import stub_memory

def empty(count, *, device, _empty=torch.empty, **more):
    return stub_memory(count) if torch.device(device).type == "cuda" else _empty(count, device=device, **more)

torch.empty = empty
torch.cuda.is_available = lambda: True
torch.cuda.init = torch.cuda.synchronize = lambda: None
torch.cuda.set_device = lambda device: None
"""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(gpu_probe, "_verdicts", {})


@pytest.fixture
def fake_cuda(monkeypatch, tmp_path):
    """A process that believes in a GPU, and starts others that do. Call it with variables of the stubs."""
    missing = why_no_kvikio()
    if missing:
        pytest.skip(missing)
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    build_stubs(stubs)
    (stubs / "sitecustomize.py").write_text(FAKE_CUDA)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def begin(**variables: str) -> None:
        path = os.pathsep.join([str(stubs), *sys.path])
        for name, value in stub_environment(stubs, PYTHONPATH=path, **variables).items():
            monkeypatch.setenv(name, value)

    return begin


def directory_of(tmp_path):
    directory = tmp_path / "drive"
    directory.mkdir(exist_ok=True)
    return directory


# ---- what it finds ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_started(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(subprocess, "Popen", None)
    begin_s = time.monotonic()
    verdict = probe_gpu_io(tmp_path, 0)
    assert verdict == GpuIoVerdict("none", f"no CUDA device (torch {torch.__version__})")
    assert time.monotonic() - begin_s < 0.1


@pytest.mark.parametrize(("way", "told"), [("nvfs", "by nvidia-fs"), ("p2p", "by PCI peer-to-peer DMA")])
def test_direct_transfers_are_proved_by_cufiles_own_counts(fake_cuda, tmp_path, way, told):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (make test installs it)")
    fake_cuda(STUB_CUFILE_PATH=way)
    verdict = probe_gpu_io(directory_of(tmp_path), 0)
    assert verdict.path == "gds", verdict
    assert told in verdict.reason and "cuFile 1.20" in verdict.reason
    assert verdict.versions["cufile"] == "1.20" and verdict.versions["torch"] == torch.__version__
    assert any("1 MiB written and read back by cuFile" in line for line in verdict.verdicts)
    assert list(directory_of(tmp_path).iterdir()) == [], "it leaves nothing behind"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (dict(STUB_CUFILE_PATH="posix"), "cuFile went by host memory in "),
        (dict(STUB_CUFILE_PATH="nvfs", STUB_CUFILE_FLIP="1"), "cuFile read other bytes than it wrote"),
        (dict(STUB_CUFILE_PATH="nvfs", STUB_CUFILE_SHORT="4096"), "cuFile moved 4096 and 4096 bytes of 1048576"),
        (dict(STUB_CUFILE_REFUSE="5011"), "cuFile does not work in "),
        (dict(KVIKIO_COMPAT_MODE="ON"), "kvikio prefers its compat mode"),
        (dict(STUB_CUFILE_CRASH="1"), "the probe of kvikio was ended by SIGSEGV"),
    ],
    ids=["by host memory", "other bytes", "short", "refused", "compat mode", "crash"],
)
def test_anything_less_is_pinned_memory_and_says_why(fake_cuda, tmp_path, variables, reason):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (make test installs it)")
    fake_cuda(**variables)
    verdict = probe_gpu_io(directory_of(tmp_path), 0)
    assert verdict.path == "pinned" and verdict.reason.startswith(reason), verdict
    assert list(directory_of(tmp_path).iterdir()) == []


def test_a_library_that_hangs_is_given_up_on_and_not_asked_again(fake_cuda, tmp_path, monkeypatch):
    fake_cuda(STUB_CUFILE_HANG="1")
    begin_s = time.monotonic()
    verdict = probe_gpu_io(directory_of(tmp_path), 0, limit_s=1.0)
    assert verdict.path == "pinned"
    assert verdict.reason == "kvikio did not answer within 1 s (libcufile without a driver hangs)"
    assert time.monotonic() - begin_s < 30
    monkeypatch.setattr(subprocess, "Popen", None)
    assert probe_gpu_io(directory_of(tmp_path), 0, limit_s=1.0) is verdict
    assert probe_gpu_io(tmp_path, 0) is verdict, "the same file system"
    with pytest.raises(TypeError):
        probe_gpu_io(tmp_path, 1)  # another device is asked


def test_a_process_that_does_not_even_begin_is_given_up_on(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(gpu_probe, "STARTUP_LIMIT_S", 0.2)
    verdict = probe_gpu_io(tmp_path, 0, limit_s=0.1)
    assert verdict == GpuIoVerdict("pinned", "the probe did not end within 0.3 s")


def test_a_process_that_fails_says_so_in_its_last_line(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho 'ImportError: no torch' >&2\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", str(program))
    assert probe_gpu_io(tmp_path, 0).reason == "the probe of kvikio failed: ImportError: no torch"


# ---- what is chosen --------------------------------------------------------------------------------------------------


@pytest.fixture
def drive(make_store):
    return make_store()._drive.handle


def say(monkeypatch, verdict):
    monkeypatch.setattr(gpu_probe, "probe_gpu_io", lambda directory, device_index: verdict)


@pytest.mark.parametrize("gpu_io", ["auto", "pinned"])
def test_pinned_memory_is_chosen_where_gds_is_not_proved(drive, tmp_path, monkeypatch, gpu_io):
    say(monkeypatch, GpuIoVerdict("pinned", "kvikio prefers its compat mode"))
    transfer = choose_transfer(HostDevice(), drive, str(tmp_path), gpu_io, depth=3)
    assert transfer.name == "pinned" and transfer.depth == 3
    transfer.close()


def test_asking_for_pinned_memory_probes_nothing(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_probe, "probe_gpu_io", None)
    choose_transfer(HostDevice(), drive, str(tmp_path), "pinned").close()


def test_asking_for_gds_where_it_does_not_work_says_why(drive, tmp_path, monkeypatch):
    say(monkeypatch, GpuIoVerdict("pinned", "cuFile went by host memory in /x (posix reads 1)"))
    with pytest.raises(StoreError, match=r"gpu_io='gds' does not work here: cuFile went by host memory in /x"):
        choose_transfer(HostDevice(), drive, str(tmp_path), "gds")
    with pytest.raises(ValueError, match="gpu_io must be one of auto, gds, pinned, got 'fast'"):
        choose_transfer(HostDevice(), drive, str(tmp_path), "fast")


def test_gds_is_chosen_where_it_is_proved(drive, tmp_path, monkeypatch):
    made = []

    class Gds:
        name = "gds"

        def __init__(self, device, path, *, depth, writable):
            made.append((path, depth, writable))

    say(monkeypatch, GpuIoVerdict("gds", "it works"))
    monkeypatch.setattr("torch_csd.cuda.gds.GdsTransfer", Gds)
    for gpu_io in ("auto", "gds"):
        assert choose_transfer(HostDevice(), drive, str(tmp_path), gpu_io, depth=5, writable=False).name == "gds"
    assert made == [(ops.file_path(drive), 5, False)] * 2


def test_a_file_that_gds_does_not_open_after_all_goes_by_pinned_memory_and_says_so(drive, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("kvikio cannot open it")

    say(monkeypatch, GpuIoVerdict("gds", "it works"))
    monkeypatch.setattr("torch_csd.cuda.gds.GdsTransfer", refuse)
    with pytest.warns(UserWarning, match="going by pinned memory: kvikio cannot open it"):
        transfer = choose_transfer(HostDevice(), drive, str(tmp_path), "auto")
    assert transfer.name == "pinned"
    transfer.close()
    with pytest.raises(StoreError, match="kvikio cannot open it"):
        choose_transfer(HostDevice(), drive, str(tmp_path), "gds")


# ---- what users see, and what importing costs ------------------------------------------------------------------------


def test_the_librarys_probe_tells_of_the_gpu(tmp_path):
    told = probe(tmp_path)
    if not torch.cuda.is_available():
        assert told["gpu_io"] == "none" and told["gpu_reason"] == f"no CUDA device (torch {torch.__version__})"
        assert told["gpu_verdicts"] == [] and told["gpu_versions"] == {}
    assert {"io_engine", "direct_io", "verdicts"} <= told.keys()


IMPORTS = """
import sys
import torch_csd
import torch_csd.cuda.device, torch_csd.cuda.gds, torch_csd.cuda.layout, torch_csd.cuda.pinned, torch_csd.cuda.probe
import torch_csd.cuda.transfer
import torch
torch_csd.probe(sys.argv[1])
loaded = {name.partition('.')[0] for name in sys.modules}
maps = open('/proc/self/maps').read()
# (torch itself imports cuda.bindings where it is installed.)
print(sorted(loaded & {'kvikio', 'libkvikio', 'cupy', 'rapids_logger'}), torch.cuda.is_initialized(),
      [name for name in ('libcufile', 'libkvikio', 'libcuda.so') if name in maps])
"""


def test_importing_and_probing_without_a_gpu_loads_none_of_its_libraries(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = subprocess.run([sys.executable, "-c", IMPORTS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "[] False []\n"
