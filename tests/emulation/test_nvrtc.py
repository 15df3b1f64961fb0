"""The kernels compile for real devices, and within the registers that their occupancy stands on. Needs no GPU."""

from __future__ import annotations

import re
import sys

import pytest

from torch_csd.cuda.device import Kernel
from torch_csd.cuda.nvrtc import compile_kernel

nvrtc = pytest.importorskip("cupy", reason="CuPy brings NVRTC; it is not installed").cuda.nvrtc

# A100, H100 and H200, B200.
CAPABILITIES = [80, 90, 100]


def resources(kernel: Kernel, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory that it needs besides, as ptxas reports them."""
    log = compile_kernel(kernel, capability).log
    # Files with several kernels report each; the one that is not a template comes along.
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(stores) for stores in re.findall(r"(\d+) bytes spill stores", log)]
    frames = [int(count) for count in re.findall(r"(\d+) bytes stack frame", log)]
    assert registers and spilled and frames, f"ptxas reports nothing that is understood: {log}"
    return max(registers), max(spilled + frames)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> int:
    if request.param not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC makes nothing for sm_{request.param}")
    return request.param


# With 128 threads a block, 168 registers let three blocks share a multiprocessor: 12 warps with 4 KiB of loads under
# way each, 48 KiB where the memory asks for 30. What is wider has 255: two blocks, 32 KiB.
ATTEND = {
    "BFloat16, 64, 64, 8, 1": 168,
    "BFloat16, 80, 80, 8, 1": 168,
    "BFloat16, 128, 128, 8, 1": 168,
    "BFloat16, 128, 128, 8, 3": 168,
    "BFloat16, 192, 128, 8, 1": 168,
    "BFloat16, 128, 128, 16, 1": 255,
    "BFloat16, 256, 256, 8, 1": 255,
    "BFloat16, 576, 512, 8, 1": 255,
    "Float16, 128, 128, 8, 1": 168,
    "Float32, 128, 128, 8, 3": 168,
    "Codes<8>, 128, 128, 8, 2": 168,
    "Codes<4>, 128, 128, 8, 2": 168,
    "Codes<4>, 128, 128, 16, 2": 255,
    "Codes<4>, 256, 256, 8, 2": 255,
    "Codes<4>, 576, 512, 8, 2": 255,
}


# What the least of these devices spills none the less, in bytes of a thread: once a page, never in the loops over it.
SPILLED = {(80, "BFloat16, 576, 512, 8, 1"): 24, (80, "Codes<8>, 128, 128, 8, 2"): 8}


@pytest.mark.parametrize("instance", ATTEND)
def test_attention_keeps_everything_in_registers(instance, capability):
    registers, spilled = resources(Kernel("attend", f"csd::attend<csd::{instance}>"), capability)
    assert spilled <= SPILLED.get((capability, instance), 0)
    assert registers <= ATTEND[instance]


# 64: four blocks of 256 threads, 32 warps.
OTHERS = [
    ("merge", "csd::fold"),
    ("merge", "csd::merge<csd::BFloat16>"),
    ("pack", "csd::pack<csd::BFloat16, csd::BFloat16>"),
    ("pack", "csd::pack<csd::Float32, csd::BFloat16>"),
    ("pack", "csd::pack<csd::BFloat16, csd::Codes<8>>"),
    ("pack", "csd::pack<csd::BFloat16, csd::Codes<4>>"),
    ("pack", "csd::unpack<csd::Codes<4>, csd::Float32>"),
    ("checksum", "csd::checksum"),
]


@pytest.mark.parametrize(("source", "expression"), OTHERS)
def test_the_other_kernels_are_light(source, expression, capability):
    registers, spilled = resources(Kernel(source, expression), capability)
    assert spilled <= 16  # around a division, which some devices call
    assert registers <= 64


def test_a_device_that_is_too_old_is_refused():
    with pytest.raises(RuntimeError, match="compute capability 8.0 or more, the device has 7.5"):
        compile_kernel(Kernel("merge", "csd::fold"), 75)


def test_a_device_that_nvrtc_does_not_know_gets_ptx():
    compiled = compile_kernel(Kernel("merge", "csd::fold"), 999)
    assert b".entry" in compiled.code and compiled.name.encode() in compiled.code


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install 'torch_csd\[cuda\]'.*cupy-cuda13x"):
        compile_kernel(Kernel("merge", "csd::fold"), 90)


def test_errors_of_the_compiler_are_shown():
    with pytest.raises(RuntimeError, match="csd::no_such_kernel"):
        compile_kernel(Kernel("merge", "csd::no_such_kernel"), 90)
