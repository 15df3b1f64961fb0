"""Writes quantised copies of weights into a directory of ours, once. Knows nothing of models.

A conversion is a directory: `manifest.json`, and parts, each a safetensors file of uint8 tensors [..., out, row_bytes]
(csrc/kernels/weights.h says what is in a row). A part is written under another name, made durable, read back and
compared with its checksum, and only then named in the manifest: a conversion that was interrupted goes on with the
first part that is not. What it was made from is in the directory's name and in the manifest: other weights get another
directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_csd import ops
from torch_csd.errors import CheckpointError, StoreBusyError, StoreCorruptError, StoreError, StoreFullError
from torch_csd.weights.files import header_bytes, read_header
from torch_csd.weights.layout import Codes, InputFile, Layout, Region, aten
from torch_csd.weights.stream import Stream

WEIGHT_BITS = {"int8": 8, "int4": 4}

_MANIFEST = "manifest.json"
_VERSION = 1
_PART_BYTES = 512 * 2**20  # of one file: what an interruption costs at the most
_READ_BYTES = 8 * 2**20
_SPARE_BYTES = 2**26  # of the file system, that must be left


@dataclass(frozen=True)
class Target:
    """A weight to be quantised, [..., out, in], as it is in the checkpoint."""

    name: str
    layout: Layout
    bits: int
    dtype: torch.dtype  # that the quantised weight stands for: float32, bfloat16 or float16

    @property
    def in_features(self) -> int:
        return self.layout.shape[-1]

    @property
    def rows_shape(self) -> tuple[int, ...]:
        return (*self.layout.shape[:-1], ops.weight_row_bytes(self.bits, self.in_features))

    @property
    def rows_bytes(self) -> int:
        return torch.Size(self.rows_shape).numel()


def conversion_path(directory: str, name: str, targets: Sequence[Target]) -> str:
    """Where the conversion of these weights is: a directory whose name changes with any of their files."""
    return os.path.join(directory, f"{_plain(name)}-{_digest(targets)[:16]}")


def convert(
    targets: Sequence[Target],
    stream: Stream,
    path: str,
    *,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Codes]:
    """The quantised weights by name, in files below ``path``: made now, or found there.

    Args:
        targets: the weights, whose files ``stream`` reads.
        stream: also opens the new files.
        path: a directory of this conversion's own (`conversion_path`); made if need be.
        verify: reads all that is there, and compares it with its checksums. What is made is read back in any case.
        progress: told of bytes written and bytes in all, of what had to be written.

    Raises:
        StoreBusyError: another process is at it. StoreFullError: there is no room. StoreCorruptError: a part that was
        finished is not as it was written. StoreError: reading or writing failed; what was finished is kept.
    """
    digest = _digest(targets)
    parts = list(_parts(targets))
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        manifest = _Manifest.read(path, digest)
        if len(manifest.parts) < len(parts):
            with _lock(path):
                manifest = _Manifest.read(path, digest)  # another process may have gone on with it
                _check_parts(manifest, verify=True)
                _make(parts, manifest, stream, progress)
        _check_parts(manifest, verify=verify)
    except OSError as error:
        raise StoreError(f"{path}: converting weights failed: {error.strerror or error}") from None
    return _open(targets, parts, stream, path)


def _check_parts(manifest: _Manifest, *, verify: bool) -> None:
    for number, entry in enumerate(manifest.parts):
        file = os.path.join(manifest.path, _part_name(number))
        intact = os.path.isfile(file) and os.path.getsize(file) == entry["bytes"]
        if not intact or (verify and _checksum(file) != entry["crc32"]):
            raise StoreCorruptError(
                f"{file}: not as it was written (wanted {entry['bytes']} bytes with CRC-32 {entry['crc32']:08x}); "
                f"remove {manifest.path}, and it is made anew"
            )


def _make(
    parts: list[list[Target]], manifest: _Manifest, stream: Stream, progress: Callable[[int, int], None] | None
) -> None:
    path = manifest.path
    stream.expect([matrix for part in parts[len(manifest.parts) :] for matrix in _all_matrices(part)], keep=False)
    todo = list(enumerate(parts))[len(manifest.parts) :]
    total = sum(target.rows_bytes for _, part in todo for target in part)
    free = shutil.disk_usage(path).free
    if total and free < total + _SPARE_BYTES:
        raise StoreFullError(
            f"{path}: the quantised weights take {total} bytes more, {free} are free; free some space or choose "
            f"another directory"
        )
    written = 0
    for number, part in todo:
        temporary = os.path.join(path, _part_name(number) + ".part")
        checksum = 0
        with open(temporary, "wb") as file:
            for data in _bytes_of(part, stream):
                file.write(data)
                checksum = zlib.crc32(data, checksum)
                written += len(data)
                if progress is not None:
                    progress(min(written, total), total)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if _checksum(temporary) != checksum:
            raise StoreCorruptError(f"{temporary}: the drive returned other bytes than were written; check the drive")
        os.rename(temporary, os.path.join(path, _part_name(number)))
        manifest.add(size, checksum)


def _parts(targets: Sequence[Target]) -> Iterator[list[Target]]:
    part: list[Target] = []
    filled = 0
    for target in targets:
        if part and filled + target.rows_bytes > _PART_BYTES:
            yield part
            part, filled = [], 0
        part.append(target)
        filled += target.rows_bytes
    if part:
        yield part


def _bytes_of(part: Sequence[Target], stream: Stream) -> Iterator[memoryview]:
    """The part's file, from front to back."""
    tensors = {target.name: ("U8", target.rows_shape) for target in part}
    # Rows are then aligned as they are long.
    yield memoryview(header_bytes(tensors, metadata={"format": f"torch_csd rows {_VERSION}"}, alignment=64))
    for target in part:
        for block in _matrices(target.layout):
            for rows in _quantised(block, target.bits, stream):
                yield memoryview(rows.numpy()).cast("B")


def _all_matrices(part: Sequence[Target]) -> Iterator[Layout]:
    for target in part:
        yield from _matrices(target.layout)


def _matrices(layout: Layout) -> Iterator[Layout]:
    """Its last two dimensions, one after another."""
    if len(layout.shape) == 2:
        yield layout
        return
    for index in range(layout.shape[0]):
        yield from _matrices(layout.apply(aten.select.int, (0, index), {}))


def _quantised(matrix: Layout, bits: int, stream: Stream) -> Iterator[Tensor]:
    """uint8 [rows, row_bytes], of all rows in order."""
    dim, pieces = stream.pieces(matrix)
    if dim == 0:
        for piece in pieces:
            with stream.use(piece) as weight:
                yield ops.quantise_rows(_as_float(weight), bits)
        return
    # Input features are the rows of the file: a row of the weight is everywhere. Dense, as it is one matrix.
    yield ops.quantise_rows(_as_float(stream.load(matrix)), bits)


def _as_float(weight: Tensor) -> Tensor:
    weight = weight.cpu()  # what a stream has brought to a card comes back: that way it needs no other reader
    plain = weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (weight if plain else weight.float()).contiguous()


def _open(targets: Sequence[Target], parts: list[list[Target]], stream: Stream, path: str) -> dict[str, Codes]:
    places: dict[str, tuple[InputFile, int]] = {}
    for number in range(len(parts)):
        header = read_header(os.path.join(path, _part_name(number)))
        file = stream.open(header.path)
        for entry in header.entries.values():
            places[entry.name] = (file, entry.offset)
    made = {}
    for target in targets:
        if target.name not in places:
            raise CheckpointError(f"{path}: lacks the weight {target.name!r}; remove it, and it is made anew")
        file, offset = places[target.name]
        rows = Region.make(file, torch.uint8, target.rows_shape, offset)
        made[target.name] = Codes(rows, target.bits, target.in_features, target.dtype)
    return made


# ---- the manifest ----------------------------------------------------------------------------------------------------


class _Manifest:
    """The parts that are finished, in order."""

    def __init__(self, path: str, digest: str, parts: list[dict]) -> None:
        self.path = path
        self.digest = digest
        self.parts = parts

    @staticmethod
    def read(path: str, digest: str) -> _Manifest:
        file = os.path.join(path, _MANIFEST)
        if not os.path.exists(file):
            return _Manifest(path, digest, [])
        try:
            with open(file, encoding="utf-8") as text:
                tables = json.load(text)
            parts = [{"bytes": int(part["bytes"]), "crc32": int(part["crc32"])} for part in tables["parts"]]
            known = (tables["version"], tables["digest"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorruptError(f"{file}: no manifest of quantised weights: {error!r}; remove {path}") from None
        if known != (_VERSION, digest):
            raise StoreCorruptError(f"{file}: belongs to other weights; remove {path}, or choose another directory")
        return _Manifest(path, digest, parts)

    def add(self, byte_count: int, checksum: int) -> None:
        self.parts.append({"bytes": byte_count, "crc32": checksum})
        temporary = os.path.join(self.path, _MANIFEST + ".part")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "digest": self.digest, "parts": self.parts}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, os.path.join(self.path, _MANIFEST))
        _sync_directory(self.path)


def _part_name(number: int) -> str:
    return f"rows-{number:05d}.safetensors"


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name).strip("-.") or "weights"


def _digest(targets: Sequence[Target]) -> str:
    """Of what is converted and how: the files as they are now, and where in them."""
    text = hashlib.sha256(f"rows {_VERSION}".encode())
    for target in targets:
        text.update(repr((target.name, target.bits, tuple(target.layout.shape))).encode())
        for leaf in target.layout.leaves:
            file = leaf.file
            text.update(repr((os.path.realpath(file.path), file.byte_count, file.mtime_ns, leaf.range[1:])).encode())
    return text.hexdigest()


def _checksum(path: str) -> int:
    """Of the file as the drive has it."""
    checksum = 0
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := file.read(_READ_BYTES):
            checksum = zlib.crc32(data, checksum)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksum


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(path: str) -> Iterator[None]:
    """One process at a time; let go of however it ends."""
    descriptor = os.open(os.path.join(path, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusyError(
                f"{path}: another process is converting these weights; wait until it is done"
            ) from None
        yield
    finally:
        os.close(descriptor)
