"""Loads a Hugging Face checkpoint whose weights stay in its safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from torch_csd import drive
from torch_csd.config import parse_bytes, scratch_directory
from torch_csd.errors import CheckpointError
from torch_csd.hf.swap import swap_attention
from torch_csd.weights.convert import WEIGHT_BITS, Target, conversion_path, convert
from torch_csd.weights.files import Header, read_header
from torch_csd.weights.functions import SMALL_BYTES
from torch_csd.weights.layout import Layout, Packed, Region, Scaled, as_read, byte_count
from torch_csd.weights.openmp import let_idle_threads_sleep
from torch_csd.weights.stream import QUEUE_DEPTH, Stream
from torch_csd.weights.tensor import FileTensor

# Modules that choose experts: small, and every choice depends on them.
_ROUTERS = ("gate", "router", "shared_expert_gate")

# Beside fp8 weights: theirs, and those of activations, which stay as they are here.
_SCALES = ("_scale_inv", ".input_scale", ".activation_scale")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.inference_mode(False)  # in which transformers would leave the modules without weights
def load_checkpoint(
    path_or_name: str | os.PathLike[str],
    memory_budget: int | str = "4GiB",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "csd",
    *,
    weight_dtype: str | None = None,
    weight_directory: str | os.PathLike[str] | None = None,
    verify_weights: bool = False,
    gpu_io: str = "auto",
    io_engine: str = "auto",
    queue_depth: int = QUEUE_DEPTH,
    auto_class: type = AutoModelForCausalLM,
    trust_remote_code: bool = False,
    **hub: Any,
) -> PreTrainedModel:
    """A model whose weights are read from the checkpoint's own files, each time they are used, into bounded memory.

    Nothing is read but the files' headers, nothing is copied, and the files are opened to be read only.

    Args:
        path_or_name: a directory with config.json and safetensors files, or a name on the Hugging Face Hub.
        memory_budget: of weights in memory: what is read ahead, and a fixed share of them that stays ("4GiB", bytes).
            With a CUDA device this is pinned host memory, for what is read ahead, and memory of the device.
        device: that the model computes on. To a CUDA device weights are copied ahead of their use, while it computes.
        dtype: "auto": the checkpoint's; or one that weights are converted to whenever they are read.
        attn_implementation: "csd" (torch_csd.swap_attention), or one of transformers' own.
        weight_dtype: "int8" or "int4": linear layers and experts are computed from quantised copies, group-wise over 64
            input features (FlexGen, 2303.06865), which are made once, below ``weight_directory``. Embeddings, norms and
            routers stay as they are; the head has int8 at least.
        weight_directory: for these copies: half or a quarter of the checkpoint. Default: $TORCH_CSD_DIRECTORY, else the
            temporary directory.
        verify_weights: reads all of the copies first, and compares them with their checksums.
        gpu_io: of a CUDA device, as in :class:`KVStore`: "gds", "pinned", or "auto".
        io_engine: "auto", "io_uring" or "pread".
        queue_depth: reads in flight, of 1 MiB.
        auto_class: which of transformers' auto classes says what the model is.
        trust_remote_code: run the model's code, where the checkpoint brings some.
        hub: for transformers' downloads: revision, subfolder, token, cache_dir, local_files_only.

    Raises:
        CheckpointError: a file is missing, cut short, or its header is wrong; there are no safetensors files.
        GpuUnavailableError: the device, or ``gpu_io="gds"``, cannot be had here; the text says why.
        MemoryBudgetError: ``memory_budget`` is too small. ValueError: a bad argument.
        StoreFullError, StoreBusyError, StoreCorruptError: of the quantised copies: no room, another process makes them,
        or they are not as they were written.
        OSError: as transformers raises it, for a name that it does not find.

    Example:
        >>> model = torch_csd.load_checkpoint("/models/llama-70b", memory_budget="8GiB")
        >>> model.generate(**inputs, past_key_values=torch_csd.StorageCache(model.config, "/nvme/kv"))
    """
    budget_bytes = parse_bytes(memory_budget)
    if weight_dtype is not None and weight_dtype not in WEIGHT_BITS:
        raise ValueError(
            f"weight_dtype must be one of {', '.join(WEIGHT_BITS)} or None (as stored), got {weight_dtype!r}"
        )
    path = os.fspath(path_or_name)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **hub)
    block = _block_scaled(config, path)
    headers = [read_header(file) for file in _weight_files(path, hub)]
    dtype = _parse_dtype(dtype, config, headers)
    device = torch.device(device)
    stream = Stream(
        budget_bytes,
        io_engine=io_engine,
        queue_depth=queue_depth,
        device=device if drive.is_card(device) else None,
        gpu_io=gpu_io,
        directory=os.path.dirname(os.path.realpath(headers[0].path)),
    )
    try:
        tensors = {name: tensor for header in headers for name, tensor in _tensors(header, stream)}
        if block is not None:
            tensors = _with_scales(tensors, block, dtype)
        model_class = _model_class(config, path, auto_class, trust_remote_code, hub)
        chosen = {} if attn_implementation == "csd" else {"attn_implementation": attn_implementation}
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **chosen)
    except BaseException:
        stream.close()
        raise
    if not chosen:
        swap_attention(model)
    model.config._name_or_path = model.name_or_path = path
    if model.can_generate():
        model.generation_config = _generation_config(path, config, hub)
    model.requires_grad_(False).eval()
    model.weight_stream = stream
    let_idle_threads_sleep()
    if weight_dtype is not None:
        _quantise(model, weight_dtype, scratch_directory(weight_directory), verify_weights)
    _expect(model, stream)
    return model.to(device if stream.card is None else stream.card.torch_device)


# ---- files -----------------------------------------------------------------------------------------------------------


def _weight_files(path: str, hub: dict[str, Any]) -> list[str]:
    """The safetensors files of the checkpoint; each is there.

    Raises:
        CheckpointError: there are none, or the index names one that is missing or lacks a tensor.
    """
    whole = _find(path, SAFE_WEIGHTS_NAME, hub)
    if whole is not None:  # as transformers has it, where there are both
        return [whole]
    index = _find(path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is None:
        if any(_find(path, name, hub) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            raise CheckpointError(
                f"{path}: has its weights in {WEIGHTS_NAME} only, which cannot be read in part; convert it once: "
                f'AutoModelForCausalLM.from_pretrained("{path}", dtype="auto").save_pretrained(NEW_DIRECTORY) writes '
                f"safetensors files (and needs the memory for all weights)"
            )
        raise CheckpointError(f"{path}: no weights: wanted {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}")
    try:
        with open(index, encoding="utf-8") as file:
            places = json.load(file)["weight_map"]
        shards = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error!r}") from None
    if not shards:
        raise CheckpointError(f"{index}: names no tensors")
    files = {}
    for shard in shards:
        if not isinstance(shard, str) or os.path.isabs(shard) or ".." in shard.split("/"):
            raise CheckpointError(f"{index}: names a shard outside of the checkpoint: {shard!r}")
        found = _find(path, shard, hub)
        if found is None:
            missing = sorted(name for name, place in places.items() if place == shard)
            raise CheckpointError(
                f"{path}: shard {shard} is missing, with {len(missing)} tensors ({missing[0]}, ...); copy or download "
                f"it again"
            )
        files[shard] = found
    for shard, file in files.items():
        names = read_header(file).entries
        for name, place in places.items():
            if place == shard and name not in names:
                raise CheckpointError(f"{index}: says that tensor {name!r} is in {shard}, which has no such tensor")
    return list(files.values())


def _find(path: str, name: str, hub: dict[str, Any]) -> str | None:
    if os.path.isdir(path):
        file = os.path.join(path, hub.get("subfolder", ""), name)
        return file if os.path.isfile(file) else None
    return cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def _tensors(header: Header, stream: Stream) -> Iterator[tuple[str, FileTensor]]:
    file = stream.open(header.path)
    for entry in header.entries.values():
        yield entry.name, FileTensor(Region.make(file, entry.dtype, entry.shape, entry.offset), stream)


# ---- the model -------------------------------------------------------------------------------------------------------


def _block_scaled(config: PretrainedConfig, path: str) -> tuple[int, int] | None:
    """Takes the quantisation out of the config: the block of each scale, or None where nothing is quantised.

    Raises:
        NotImplementedError: it is of a kind that cannot be computed with as it is stored.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    quantisation = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    if quantisation.get("quant_method") not in ("fp8", "mxfp4"):
        raise NotImplementedError(
            f"{path}: its weights are quantised ({quantisation.get('quant_method')}); of quantised checkpoints only "
            f"those of fp8 with scales and of mxfp4 can be computed with as they are stored; use the one that is not "
            f"quantised, with weight_dtype if need be"
        )
    del config.quantization_config
    return tuple(quantisation.get("weight_block_size") or (0, 0))


def _with_scales(tensors: dict[str, FileTensor], block: tuple[int, int], dtype: torch.dtype) -> dict[str, FileTensor]:
    """The same with each weight of fp8 or MXFP4 and its scales as one tensor of ``dtype``."""
    scaled = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
            packed = _packed(name, tensor, tensors[f"{name.removesuffix('_blocks')}_scales"], dtype)
            scaled[name.removesuffix("_blocks")] = packed
            continue
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
            continue
        if name.endswith(_SCALES):
            continue
        scales = tensors.get(f"{name}_scale_inv")
        if scales is None:
            scaled[name] = tensor
            continue
        layout, grid = tensor._layout, scales._layout
        while len(grid.shape) < 2:  # one scale for all of it
            grid = grid.apply(torch.ops.aten.unsqueeze.default, (0,), {})
        # Of the size that the config says, the last of each side cut short; or as the grid divides the weight.
        sides = tuple(
            wanted if wanted > 0 and -(-size // wanted) == count else size // count
            for size, count, wanted in zip(layout.shape[-2:], grid.shape[-2:], block, strict=True)
        )
        fits = all(
            side > 0 and -(-size // side) == count
            for size, side, count in zip(layout.shape[-2:], sides, grid.shape[-2:], strict=True)
        )
        if layout.dtype.itemsize != 1 or not layout.dtype.is_floating_point or not fits:
            raise CheckpointError(
                f"{layout.leaves[0].file.path}: tensor {name!r}: wanted fp8 elements and a scale for each block of "
                f"{list(block)}, got {layout.dtype} {list(layout.shape)} and {list(grid.shape)} scales"
            )
        scaled[name] = tensor.with_layout(Scaled(layout, grid, sides, dtype), dtype=dtype)
    return scaled


def _packed(name: str, blocks: FileTensor, scales: FileTensor, dtype: torch.dtype) -> FileTensor:
    """Experts [..., in, out] of MXFP4: blocks [..., out, in / 32, 16] and scales [..., out, in / 32]."""
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16 or blocks._layout.dtype != torch.uint8:
        raise CheckpointError(
            f"{blocks._layout.leaves[0].file.path}: tensor {name!r}: wanted uint8 blocks of 16 bytes and a scale for "
            f"each, got {blocks._layout.dtype} {list(blocks.shape)} and {list(scales.shape)} scales"
        )
    layout = Packed(blocks.flatten(-2)._layout, scales._layout, dtype)
    return blocks.with_layout(layout, dtype=dtype).mT


def _parse_dtype(dtype: torch.dtype | str, config: PretrainedConfig, headers: list[Header]) -> torch.dtype:
    if dtype == "auto":
        found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        if isinstance(found, str):
            found = getattr(torch, found, None)
        if found in _DTYPES.values():
            return found
        stored = [entry.dtype for header in headers for entry in header.entries.values()]
        return next((each for each in stored if each in _DTYPES.values()), torch.bfloat16)
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype not in _DTYPES.values():
        raise ValueError(f'dtype must be "auto", {", ".join(_DTYPES)}, got {dtype!r}')
    return dtype


def _model_class(
    config: PretrainedConfig, path: str, auto_class: type, trust_remote_code: bool, hub: dict[str, Any]
) -> type[PreTrainedModel]:
    remote = getattr(config, "auto_map", {}) or {}
    if trust_remote_code and auto_class.__name__ in remote:
        return get_class_from_dynamic_module(remote[auto_class.__name__], path, **hub)
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"{path}: no model for a {type(config).__name__} in {auto_class.__name__}; name another auto_class of "
            f"transformers {transformers.__version__}"
        )
    return _get_model_class(config, auto_class._model_mapping)


def _generation_config(path: str, config: PretrainedConfig, hub: dict[str, Any]) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path, **hub)
    except OSError:  # it has none of its own
        return GenerationConfig.from_model_config(config)


def _quantise(model: PreTrainedModel, weight_dtype: str, directory: str, verify: bool) -> None:
    """Puts quantised copies in the place of the weights of linear layers and experts."""
    head = model.get_output_embeddings()
    targets: dict[int, Target] = {}  # by id of the parameter
    places: list[tuple[nn.Module, str, FileTensor, bool]] = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if not (isinstance(parameter, FileTensor) and _is_quantisable(path, module, parameter)):
                continue
            # Conv1D and some experts have [..., in, out].
            transposed = isinstance(module, Conv1D) or (
                parameter.dim() == 3 and getattr(module, "is_transposed", False)
            )
            places.append((module, name, parameter, transposed))
            if id(parameter) not in targets:
                layout = (parameter.mT if transposed else parameter)._layout
                bits = max(WEIGHT_BITS[weight_dtype], 8 if module is head else 0)
                targets[id(parameter)] = Target(f"{path}.{name}", layout, bits, parameter.dtype)
    wanted = list(targets.values())
    path = conversion_path(os.path.join(directory, "torch_csd-weights"), _name(model, weight_dtype), wanted)
    made = convert(wanted, model.weight_stream, path, verify=verify, progress=_Progress(weight_dtype))
    for module, name, parameter, transposed in places:
        codes = FileTensor(
            made[targets[id(parameter)].name], model.weight_stream, dtype=parameter.dtype, device=parameter.device
        )
        module._parameters[name] = nn.Parameter(codes.mT if transposed else codes, requires_grad=False)


def _is_quantisable(path: str, module: nn.Module, parameter: FileTensor) -> bool:
    if path.rpartition(".")[2] in _ROUTERS:
        return False
    return _is_of_experts(module, parameter) or (isinstance(module, (nn.Linear, Conv1D)) and parameter.dim() == 2)


def _is_of_experts(module: nn.Module, parameter: FileTensor) -> bool:
    return parameter.dim() == 3 and not isinstance(module, _ConvNd)


def _name(model: PreTrainedModel, weight_dtype: str) -> str:
    return f"{os.path.basename(os.path.normpath(model.name_or_path))}-{weight_dtype}"


class _Progress:
    """A bar, as transformers has it, of a conversion that takes a while."""

    def __init__(self, weight_dtype: str) -> None:
        self.text = f"Converting weights to {weight_dtype}"
        self.bar: Any = None
        self.done = 0  # the bar may be none at all, and not know

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = transformers.utils.logging.tqdm(desc=self.text, total=total, unit="B", unit_scale=True)
        self.bar.update(done - self.done)
        self.done = done
        if done == total:
            self.bar.close()


def _expect(model: PreTrainedModel, stream: Stream) -> None:
    """Tells the stream which weights a pass uses, in the order of the modules, and how."""
    dense: dict[tuple, Layout] = {}
    small_bytes = routed_bytes = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if not isinstance(parameter, FileTensor):
                continue
            layout = parameter._layout
            if parameter.dim() <= 1 or (byte_count(layout) <= SMALL_BYTES and not isinstance(module, nn.Linear)):
                small_bytes += byte_count(layout)
            elif isinstance(module, nn.Embedding):
                continue  # only rows of it are read
            elif _is_of_experts(module, parameter):
                parameter._routed = True
                routed_bytes += byte_count(layout)
            else:
                dense.setdefault(layout.key, as_read(layout))
    stream.expect(list(dense.values()), routed_bytes=routed_bytes, small_bytes=small_bytes)
