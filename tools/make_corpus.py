"""Writes the seeds of the fuzz target tests/native/fuzz_format.cpp: what a store of each kind really writes.

python tools/make_corpus.py DIRECTORY
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path

import torch

from torch_csd import KVStore
from torch_csd.catalogue import Catalogue, StoreDirectory

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
CODE_BITS = {"int8": 8, "int4": 4}


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for kv_dtype in ("float32", "bfloat16", "int8", "int4"):
            k = torch.randn(2, 2, 200, 16)
            with KVStore(directory, durable=True, name=kv_dtype, kv_dtype=kv_dtype, memory_budget="4MiB") as store:
                store.append(0, k, k, lengths=[200, 70])
                store.commit()
        found = StoreDirectory.find(directory)
        pages = Path(found.pages_path).read_bytes()
        for first, name in enumerate(("header", "header-fixed")):
            (target / name).write_bytes(bytes([first]) + pages[:80])
        catalogue = Catalogue.open(found.catalogue_path, read_only=True)
        for sequence in catalogue.load_all():
            (layer,) = sequence.layers
            code_bits = CODE_BITS.get(layer.kv_dtype, 0)
            kind = DTYPES[layer.dtype if code_bits else layer.kv_dtype] + 3 * (code_bits // 4)
            geometry = (layer.num_kv_heads - 1, layer.head_dim_k // 8 - 1, layer.head_dim_v // 8 - 1, kind)
            data = b"\2" + struct.pack("<4BqqB", *geometry, layer.begin, len(pages), len(layer.rows))
            for row in layer.rows:
                data += struct.pack("<qq", row.first_page, row.length)
            data += bytes([2]) + b"".join(row.entries for row in layer.rows)
            (target / sequence.name).write_bytes(data)
        catalogue.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
