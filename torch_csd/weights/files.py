"""Files that tensors lie in, and the header of safetensors files. Reads headers, never elements."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from torch_csd.errors import CheckpointError

# The format's own names. Those of less than a byte (F4, F6_E2M3, ...) are not among them: torch has no elements of
# their size.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_HEADER_BYTES_MAX = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """One tensor of a file: where its bytes are, and what they mean."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, by name, and its metadata."""

    path: str
    entries: dict[str, Entry]
    metadata: dict[str, str]


def header_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int]]], *, metadata: Mapping[str, str] | None = None, alignment: int = 8
) -> bytes:
    """What a safetensors file of these tensors begins with, for files that are written one tensor after another.

    tensors: by name the format's dtype and the shape, in the order in which their bytes follow. alignment: of the
    first of these bytes.
    """
    tables: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SAFETENSORS_DTYPES[dtype].itemsize * torch.Size(shape).numel()
        tables[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tables).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file, checked against the file.

    Raises:
        CheckpointError: there is no such file, it is not a safetensors file, it is cut short, or its header contradicts
            itself or the file. The text names the file, the tensor and what is wrong.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path}: wanted a safetensors file, this is no regular file")
            size = info.st_size
            head = file.read(8)
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > min(size - 8, _HEADER_BYTES_MAX):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short: its first 8 bytes say that a header of "
                    f"{header_bytes} bytes follows, the file has {size}; copy or download it again"
                )
            text = file.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is a shard missing? Copy or download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: reading the header failed: {error.strerror}") from None
    return _parse(path, text, data_begin=8 + header_bytes, size=size)


def _parse(path: str, text: bytes, *, data_begin: int, size: int) -> Header:
    try:
        tables = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(tables, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON: {error}") from None
    metadata = tables.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ in the header must be an object, got {metadata!r:.80}")
    entries = {name: _entry(path, name, table, data_begin, size) for name, table in tables.items()}
    _check_cover(path, list(entries.values()), data_begin, size)
    return Header(path, entries, metadata)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return table


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: str, name: str, table: object, data_begin: int, size: int) -> Entry:
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: tensor {name!r}: wanted dtype, shape and data_offsets, got {table!r:.80}")
    dtype, shape, offsets = table.get("dtype"), table.get("shape"), table.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r}: dtype must be one of {', '.join(SAFETENSORS_DTYPES)}, got {dtype!r:.80}"
        )
    if not isinstance(shape, list) or not all(_is_count(extent) for extent in shape):
        raise CheckpointError(f"{path}: tensor {name!r}: shape must be a list of sizes, got {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets must be [begin, end], got {offsets!r:.80}")
    begin, end = offsets
    if reach_bytes(SAFETENSORS_DTYPES[dtype], shape) >= 2**63:
        raise CheckpointError(f"{path}: tensor {name!r}: the header lies: no tensor has shape {shape}")
    byte_count = SAFETENSORS_DTYPES[dtype].itemsize
    for extent in shape:
        byte_count *= extent
    if end - begin != byte_count:
        raise CheckpointError(
            f"{path}: tensor {name!r}: the header lies: {dtype} of shape {shape} takes {byte_count} bytes, its "
            f"data_offsets {offsets} are {end - begin} apart"
        )
    if data_begin + end > size:
        raise CheckpointError(
            f"{path}: cut short: the file has {size} bytes, tensor {name!r} goes to byte {data_begin + end}; copy or "
            f"download it again"
        )
    return Entry(name, SAFETENSORS_DTYPES[dtype], tuple(shape), data_begin + begin)


def reach_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Of a tensor, but that torch counts strides past sizes of 0 too."""
    return dtype.itemsize * math.prod(max(extent, 1) for extent in shape)


def _check_cover(path: str, entries: list[Entry], data_begin: int, size: int) -> None:
    """Tensors lie one after another, up to the end of the file: a header that says otherwise is wrong."""
    end = data_begin
    for entry in sorted(entries, key=lambda entry: (entry.offset, byte_count(entry))):
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {entry.name!r}: the header lies: it begins at byte {entry.offset}, which {what}: that "
                f"ends at byte {end}"
            )
        end += byte_count(entry)
    if end != size:
        raise CheckpointError(
            f"{path}: the header names tensors up to byte {end}, the file has {size} bytes; copy or download it again"
        )


def byte_count(entry: Entry) -> int:
    count = entry.dtype.itemsize
    for extent in entry.shape:
        count *= extent
    return count
