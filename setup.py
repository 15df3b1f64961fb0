"""Builds the native extension torch_csd._C; everything declarative is in pyproject.toml.

TORCH_CSD_LIBURING=1 insists on liburing, 0 leaves it out; unset: used when it is there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = (2, 10)
TORCH_NEEDED = """
torch_csd is compiled against the torch it will run with, and {found}.
Install torch first, then build without isolation:

    pip install -c constraints.txt torch setuptools wheel ninja
    pip install -c constraints.txt --no-build-isolation .
"""

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(TORCH_NEEDED.format(found=f"it cannot be imported here ({error})"))
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
    sys.exit(TORCH_NEEDED.format(found=f"it needs torch >= 2.10 but found {torch.__version__}"))

ROOT = Path(__file__).resolve().parent

LIBURING_LINK_ARGS = ["-l:liburing.a"]
# Compiled as the extension is, so that a static library without -fPIC is found out here.
LIBURING_PROBE = """
#include <liburing.h>
extern "C" int probe() {
  io_uring ring;
  return io_uring_queue_init(1, &ring, 0) + io_uring_register_buffers(&ring, nullptr, 0);
}
"""


def has_liburing() -> bool:
    """Whether liburing's header and static library are there; says so when they are not."""
    wanted = os.environ.get("TORCH_CSD_LIBURING", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"TORCH_CSD_LIBURING must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        print("torch_csd: building without liburing, as asked; files are read by the pread engine")
        return False
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch, "probe.cpp"), Path(scratch, "probe.so")
        source.write_text(LIBURING_PROBE)
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(library), *LIBURING_LINK_ARGS]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
            found, why = probe.returncode == 0, probe.stderr
        except OSError as error:
            found, why = False, str(error)
    if not found and wanted == "1":
        sys.exit(f"TORCH_CSD_LIBURING=1, but liburing cannot be linked; install liburing-dev\n{why}")
    if not found:
        print("torch_csd: no liburing headers (package liburing-dev); building with the pread engine only")
    return found


class IncrementalBuild(BuildExtension):
    """Keeps objects in one place, so that ninja recompiles only what changed.

    pip's editable builds otherwise compile in a temporary directory, from nothing every time.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "native")


def native_extension() -> CppExtension:
    define_macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the stable ABI of torch 2.10
    link_args = ["-pthread", "-Wl,--exclude-libs,ALL"]  # another extension may bring a liburing of its own
    if has_liburing():
        define_macros.append(("CSD_HAVE_LIBURING", None))
        link_args += LIBURING_LINK_ARGS
    return CppExtension(
        "torch_csd._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
        define_macros=define_macros,
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-fvisibility=hidden",
            "-pthread",
            f"-ffile-prefix-map={ROOT}=.",  # error texts name our files, not the builder's directories
        ],
        extra_link_args=link_args,
        py_limited_api=True,  # also keeps libtorch_python out of the link
    )


setup(
    ext_modules=[native_extension()],
    cmdclass={"build_ext": IncrementalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
