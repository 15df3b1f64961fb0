"""Compiles the kernels at run time by NVRTC, as CuPy brings it. Needs neither a GPU nor a CUDA toolkit."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch_csd.cuda.device import Kernel
from torch_csd.cuda.kernels.source import source_text

CAPABILITY_MIN = 80  # Ampere: the first with bfloat16 in tensor cores

# Not cupy.RawModule's own compilation: that insists on -ftz=true, under which subnormal numbers would get other codes
# than the CPU gives them. 177: constants that one kernel of a file needs and another does not.
_OPTIONS = ("-std=c++17", "-ftz=false", "-prec-div=true", "--diag-suppress=177", "--ptxas-options=-v")


class Compiled(NamedTuple):
    code: bytes  # a cubin, or PTX
    name: str  # of the kernel in it
    log: str  # ptxas tells registers, spills and shared memory


def import_cupy() -> ModuleType:
    """CuPy; an ImportError that says how to get it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f"the GPU path needs CuPy, and it cannot be imported ({error}): pip install 'torch_csd[cuda]', or the "
            "cupy-cuda12x or cupy-cuda13x that fits torch.version.cuda"
        ) from error
    return cupy


def compile_kernel(kernel: Kernel, capability: int) -> Compiled:
    """For devices of this compute capability (90: H100). One that NVRTC does not know yet gets the newest PTX it makes.

    Raises:
        ImportError: there is no CuPy.
        RuntimeError: the device is too old, or NVRTC found errors; the text has its log.
    """
    cupy = import_cupy()
    nvrtc = cupy.cuda.nvrtc
    if capability < CAPABILITY_MIN:
        raise RuntimeError(f"the kernels need compute capability 8.0 or more, the device has {capability / 10}")
    supported = nvrtc.getSupportedArchs()
    known = capability in supported
    target = f"sm_{capability}" if known else f"compute_{max(arch for arch in supported if arch < capability)}"
    program = nvrtc.createProgram(source_text(kernel.source), f"{kernel.source}.cu", (), ())
    try:
        nvrtc.addNameExpression(program, kernel.expression)
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={target}", *_OPTIONS))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{kernel.expression}: {error}\n{nvrtc.getProgramLog(program)}") from error
        code = nvrtc.getCUBIN(program) if known else nvrtc.getPTX(program)
        code = code.encode() if isinstance(code, str) else code
        return Compiled(code, nvrtc.getLoweredName(program, kernel.expression), nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)
