"""A random checkpoint of any size: what a benchmark of weights on the drive loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torch_csd.weights.files import header_bytes

SHARD_BYTES = 2 * 2**30


def llama_config(size_bytes: int, *, vocab_size: int = 32_000) -> LlamaConfig:
    """Of about ``size_bytes`` of bfloat16 weights: the layers of Llama-3.2-3B, as many as it takes.

    Below 1 GiB, which is two of them, layers of a sixth of that width.
    """
    width = 6 if size_bytes >= 2**30 else 1  # times 512
    hidden, heads = 512 * width, 4 * width
    vocab_size = vocab_size if width == 6 else min(vocab_size, 1024)
    kv_heads = 8 if width == 6 else 2
    shape = dict(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )
    attention = 2 * hidden * (heads + kv_heads) * 128
    layer_bytes = 2 * (attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden)
    layer_count = max(round((size_bytes - 2 * 2 * vocab_size * hidden) / layer_bytes), 1)
    return LlamaConfig(
        vocab_size=vocab_size,
        num_hidden_layers=layer_count,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        **shape,
    )


def make_checkpoint(directory: str | os.PathLike[str], config: LlamaConfig, *, seed: int = 0) -> int:
    """Writes config.json and sharded safetensors files of random weights, one tensor in memory at a time; the bytes of
    all tensors. A directory that has its index already is left as it is."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return total
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        _write_shard(directory / file_name, {name: shapes[name] for name in names}, generator)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if names and filled + size > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    with open(path, "wb") as file:
        file.write(header_bytes({name: ("BF16", shape) for name, shape in shapes.items()}))
        for shape in shapes.values():
            file.write(memoryview(_random(shape, generator).view(torch.uint8).numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bfloat16 weights of a size that keeps activations as they are."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Uniform, from bytes: a hundred times faster than normal ones, and as good here.
    scale = shape[-1] ** -0.5 * 3**0.5 / 128
    integers = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return integers.to(torch.bfloat16).mul_(scale)
