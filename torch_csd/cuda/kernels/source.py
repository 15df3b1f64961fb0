"""The kernels' sources as one text each: what NVRTC, and the tests' emulation, compile."""

from __future__ import annotations

import functools
import re
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent

_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')


@functools.cache
def source_text(name: str) -> str:
    """<name>.cu with the headers it includes in their place, each once: no include path, and one text to cache by."""
    seen: set[str] = set()

    def lines(file: str) -> list[str]:
        result = []
        for line in (DIRECTORY / file).read_text().splitlines():
            include = _INCLUDE.fullmatch(line)
            if include is None:
                result += [] if line == "#pragma once" else [line]
            elif include[1] not in seen:
                seen.add(include[1])
                result += lines(include[1])
        return result

    return "\n".join(lines(f"{name}.cu")) + "\n"
