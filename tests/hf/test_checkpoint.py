"""Checkpoints whose weights stay in their files: the logits and generations of an ordinary load, nothing read or
written before, and one clear error for each way in which files can be wrong."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checksums import FAULTY
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import torch_csd
from torch_csd import CheckpointError, MemoryBudgetError, StoreError
from torch_csd.weights.tensor import FileTensor

from .models import generate, make_model, prompts

# Beside those of models.py: (class of the configuration, class of the model, arguments).
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MOE = _SMALL | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
MORE = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": None}
        | {"eos_token_id": None, "pad_token_id": 0},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _MOE),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE | {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _SMALL | {"head_dim": 16}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _SMALL),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", _SMALL | {"tie_word_embeddings": True}),
}
FAMILIES = [
    "llama",
    "qwen3",
    "mixtral",
    "opt",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "falcon",
    "phi3",
    "deepseek_v3",
    "gpt_neox",
    *MORE,
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def new_model(family: str) -> transformers.PreTrainedModel:
    if family not in MORE:
        return make_model(family, "eager")
    config, model, arguments = MORE[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim == 1:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(family, dtype, sharded) -> its directory, made once, which nobody may write to."""

    @functools.cache
    def make(family: str, dtype: str = "float32", sharded: bool = False) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-{dtype}")
        model = new_model(family).to(DTYPES[dtype])
        model.save_pretrained(directory, max_shard_size="60KB" if sharded else "5GB")
        assert (directory / "model.safetensors").exists() != sharded
        for file in directory.iterdir():
            file.chmod(0o444)
        return directory

    return make


@pytest.fixture
def copied(checkpoint, tmp_path):
    """copied(family, ...) -> a directory of the test's own."""

    def make(*arguments, **settings) -> Path:
        target = tmp_path / "checkpoint"
        shutil.copytree(checkpoint(*arguments, **settings), target)
        for file in target.iterdir():
            file.chmod(0o644)
        return target

    return make


def load(directory: Path, **settings: object) -> transformers.PreTrainedModel:
    settings = {"memory_budget": "16MiB", "attn_implementation": "eager"} | settings
    return torch_csd.load_checkpoint(directory, **settings)


def stock(directory: Path, **settings: object) -> transformers.PreTrainedModel:
    settings = {"dtype": "auto", "attn_implementation": "eager"} | settings
    return AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


def logits(model: transformers.PreTrainedModel, inputs: dict | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or prompts(9, 5)), use_cache=False).logits


def listing(directory: Path) -> dict:
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in directory.iterdir()}


def bytes_read(model: transformers.PreTrainedModel) -> int:
    return model.weight_stream.stats()["bytes_read"]


# ---- the same as in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_an_ordinary_load_bit_for_bit_and_generation_is_equal(checkpoint, family):
    directory = checkpoint(family)
    before = listing(directory)
    ours, theirs = load(directory), stock(directory)
    assert bytes_read(ours) == 0
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert isinstance(parameter, FileTensor) and isinstance(parameter, torch.nn.Parameter), name
        assert parameter.dtype == theirs.get_parameter(name).dtype and not parameter.requires_grad
        assert torch.equal(parameter.to_dense(), theirs.get_parameter(name)), name
    assert not ours.training and ours.config.to_dict() == theirs.config.to_dict()
    assert torch.equal(logits(ours), logits(theirs))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(**prompts(9, 5), **options), theirs.generate(**prompts(9, 5), **options))
    assert torch.equal(logits(ours), logits(theirs)), "the second pass, read ahead"
    assert listing(directory) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gemma2", "gpt2"])
def test_half_precision_and_shards(checkpoint, family, dtype):
    directory = checkpoint(family, dtype, True)
    ours, theirs = load(directory), stock(directory)
    assert ours.dtype == DTYPES[dtype] and bytes_read(ours) == 0
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("stored, wanted", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "opt"])
def test_weights_are_converted_as_they_are_read(checkpoint, family, stored, wanted):
    directory = checkpoint(family, stored)
    for dtype in (wanted, DTYPES[wanted], f"torch.{wanted}"):
        ours = load(directory, dtype=dtype)
        assert ours.dtype == DTYPES[wanted] and bytes_read(ours) == 0
    theirs = stock(directory, dtype=DTYPES[wanted])
    assert torch.equal(logits(ours), logits(theirs))
    # And once more, on the model: what was rounded stays rounded.
    assert torch.equal(logits(ours.to(DTYPES[stored])), logits(theirs.to(DTYPES[stored])))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gemma2", "gpt_oss", "opt", "falcon", "gpt2"])
def test_any_attention_with_stored_keys_and_values_too(checkpoint, family, new_cache, where):
    directory = checkpoint(family)
    choices = ["sdpa", "csd"] if family not in ("gpt2",) else ["sdpa"]
    if family in ("gemma2", "gpt_oss"):
        choices = ["eager", "csd"]
    if family == "falcon":
        choices = ["sdpa"]
    options = {"max_new_tokens": 6, "do_sample": False}
    for implementation in choices:
        ours = load(directory, attn_implementation=implementation)
        like = implementation if implementation != "csd" else ("sdpa" if "sdpa" in choices else "eager")
        theirs = stock(directory, attn_implementation=like)
        tokens, scores = generate(ours, prompts(70, 9), new_cache(ours.config), **options)
        expected, expected_scores = generate(theirs, prompts(70, 9), DynamicCache(config=theirs.config), **options)
        assert torch.equal(tokens, expected), implementation
        torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=0)


def test_beams_and_samples_are_those_of_an_ordinary_load(checkpoint):
    directory = checkpoint("llama")
    ours, theirs = load(directory), stock(directory)
    for options in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "num_return_sequences": 2}):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(3)
            results.append(model.generate(**prompts(9, 5), max_new_tokens=6, **options))
        assert torch.equal(*results)


def test_tied_weights_are_one_tensor(checkpoint):
    directory = checkpoint("llama_tied")
    ours = load(directory)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(logits(ours), logits(stock(directory)))


def test_fp8_weights_without_scales_are_converted_as_they_are_read(copied):
    directory = copied("llama", "bfloat16")
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ours = load(directory)
    assert ours.dtype == torch.bfloat16 and ours.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(logits(ours), logits(stock(directory, dtype=torch.bfloat16)))


def test_an_encoder_with_a_decoder(tmp_path):
    config = transformers.T5Config(
        **{"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    settings = {"auto_class": transformers.AutoModelForSeq2SeqLM}
    with pytest.raises(ValueError, match="no model for a T5Config in AutoModelForCausalLM; name another auto_class"):
        load(tmp_path)
    ours = load(tmp_path, **settings)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert bytes_read(ours) == 0
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**prompts(9, 5), **options), theirs.generate(**prompts(9, 5), **options))


def test_images_with_text(tmp_path):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14, projection_dim=32),
        text_config=transformers.LlamaConfig(**_SMALL),
        image_token_index=95,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    settings = {"auto_class": transformers.AutoModelForImageTextToText}
    ours = load(tmp_path, **settings)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert bytes_read(ours) == 0
    ids = torch.tensor([[5, *[95] * 4, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


# ---- what loading costs, and what may be done with the model --------------------------------------------------------


def test_two_models_of_one_directory_and_copies_of_them(checkpoint):
    directory = checkpoint("mixtral")
    one, two = load(directory), load(directory)
    expected = logits(one)
    copied = copy.deepcopy(one)
    assert bytes_read(two) == 0
    del one
    assert torch.equal(logits(two), expected)
    assert torch.equal(logits(copied), expected)
    assert all(isinstance(parameter, FileTensor) for parameter in copied.parameters())


def test_a_model_that_is_trained_or_saved_says_what_it_can_do(checkpoint, tmp_path):
    ours = load(checkpoint("llama"))
    try:
        ours.save_pretrained(tmp_path / "saved")
    except (NotImplementedError, TypeError, StoreError) as error:
        assert "to_dense()" in str(error)
    else:
        assert torch.equal(logits(stock(tmp_path / "saved")), logits(ours))
    with pytest.raises(TypeError, match="to_dense"):
        torch.save(ours.state_dict(), tmp_path / "state")
    ours.requires_grad_(True)
    result = ours(**prompts(5)).logits
    with pytest.raises(NotImplementedError, match="not differentiable"):
        result.sum().backward()
    with torch.no_grad():
        ours(**prompts(5))


@pytest.mark.parametrize("budget", ["4MiB", "5MiB", "64MiB"])
def test_any_budget_gives_the_same_and_is_kept_to(tmp_path, budget):
    config = transformers.LlamaConfig(**_SMALL | {"hidden_size": 512, "intermediate_size": 1300, "vocab_size": 2000})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ours, theirs = load(tmp_path, memory_budget=budget), stock(tmp_path)
    cut = any(
        len(ours.weight_stream.pieces(parameter._layout)[1]) > 1
        for module in ours.modules()
        if isinstance(module, torch.nn.Linear)
        for parameter in module.parameters()
    )
    assert cut == (budget != "64MiB")
    for _ in range(3):
        if cut:
            torch.testing.assert_close(logits(ours), logits(theirs))
        else:
            assert torch.equal(logits(ours), logits(theirs))
        stats = ours.weight_stream.stats()
        # The norms, 1024 bytes each, are beside it where it is all staging.
        assert stats["staging_bytes"] + stats["resident_bytes"] <= stats["memory_budget_bytes"] + 16 * 1024
    before = bytes_read(ours)
    logits(ours)
    if budget == "64MiB":  # all of it is resident, but for the rows of the embedding
        assert bytes_read(ours) - before <= 16 * 512 * 4


def test_arguments_that_cannot_be_say_what_is_wanted(checkpoint, tmp_path):
    directory = checkpoint("llama")
    for dtype in ("int8", torch.int8, "float8_e4m3fn", 3):
        with pytest.raises(ValueError, match="dtype must be"):
            load(directory, dtype=dtype)
    with pytest.raises(MemoryBudgetError, match="at least"):
        load(directory, memory_budget="1MiB")
    with pytest.raises(ValueError, match="weight_dtype must be"):
        load(directory, weight_dtype="int3")
    with pytest.raises(ValueError, match="io_engine"):
        load(directory, io_engine="mmap")
    with pytest.raises(OSError, match=str(tmp_path / "missing")):
        load(tmp_path / "missing")


def test_what_generation_is_set_to_comes_along(copied):
    directory = copied("llama")
    GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0).save_pretrained(directory)
    assert load(directory).generate(**prompts(4)).shape == (1, 7)
    (directory / "generation_config.json").unlink()
    load(directory).generate(**prompts(4), max_new_tokens=2)


# ---- files that are wrong -------------------------------------------------------------------------------------------


def refused(directory: Path, *texts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def test_shards_that_are_missing_or_lack_a_tensor_are_named(copied):
    directory = copied("llama", "float32", True)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    first, second, *_ = shards(directory)
    data = first.read_bytes()
    first.unlink()
    refused(directory, str(directory), f"shard {first.name} is missing")
    first.mkdir()
    refused(directory, first.name)
    first.rmdir()
    first.write_bytes(data)
    tensors = load_file(second)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, second, metadata={"format": "pt"})
    refused(directory, f"tensor {gone!r} is in {second.name}, which has no such tensor")
    for wrong in (
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": []}}',
        '{"weight_map": {}}',
        '{"weight_map": ' + "[" * 10_000 + "]" * 10_000 + "}",
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ):
        (directory / "model.safetensors.index.json").write_text(wrong)
        refused(directory, "model.safetensors.index.json")
    assert index


def test_a_checkpoint_of_pickled_weights_says_how_to_convert_it(copied, tmp_path):
    directory = copied("llama")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    refused(directory, f"{directory}: no weights: wanted model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")
    refused(directory, str(directory), "pytorch_model.bin only", "save_pretrained(NEW_DIRECTORY)")
    stock(directory).save_pretrained(tmp_path / "converted")
    assert torch.equal(logits(load(tmp_path / "converted")), logits(stock(directory)))


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


LIES = {
    "nothing": (b"", "not a safetensors file, or cut short"),
    "half a length": (b"\x01\x02", "cut short"),
    "a length beyond the file": (safetensors_bytes({}, length=10**6), "a header of 1000000 bytes follows"),
    "a huge length": (safetensors_bytes({}, length=2**63 + 1), "cut short"),
    "no JSON": (safetensors_bytes(b"{not json"), "its header is not JSON"),
    "no text": (safetensors_bytes(b"\xff\xfe\xff"), "its header is not JSON"),
    "a list": (safetensors_bytes([]), "it is no object"),
    "deep nesting": (safetensors_bytes(b"[" * 10_000 + b"]" * 10_000), "not JSON"),
    "deep nesting in a tensor": (safetensors_bytes(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "not JSON"),
    "a name twice": (safetensors_bytes(b'{"a": {}, "a": {}}'), "'a' is there twice"),
    "a field twice": (safetensors_bytes(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' is there twice"),
    "no fields": (safetensors_bytes({"a": 3}), "tensor 'a': wanted dtype, shape and data_offsets"),
    "an unknown dtype": (safetensors_bytes({"a": entry(0, 4, dtype="F128")}, bytes(4)), "dtype must be one of"),
    "a dtype that is no name": (safetensors_bytes({"a": entry(0, 4, dtype=["F32"])}, bytes(4)), "dtype must be one of"),
    "half a byte": (safetensors_bytes({"a": entry(0, 4, [8], "F4")}, bytes(4)), "dtype must be one of"),
    "an overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps the tensor before"),
    "a gap": (safetensors_bytes({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "leaves a gap before it"),
    "bytes left over": (safetensors_bytes({"a": entry(0, 8)}, bytes(9)), "names tensors up to byte"),
    "too few bytes": (safetensors_bytes({"a": entry(0, 8)}, bytes(7)), "cut short"),
    "a wrong length": (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), "the header lies"),
    "a negative size": (safetensors_bytes({"a": entry(0, 8, [-2])}, bytes(8)), "shape must be a list of sizes"),
    "a size that is true": (safetensors_bytes({"a": entry(0, 4, [True])}, bytes(4)), "shape must be a list of sizes"),
    "a fraction": (safetensors_bytes({"a": entry(0, 8, [2.0])}, bytes(8)), "shape must be a list of sizes"),
    "offsets that are negative": (safetensors_bytes({"a": entry(-8, 0)}, bytes(8)), "data_offsets must be"),
    "offsets in the wrong order": (safetensors_bytes({"a": entry(8, 0, [2])}, bytes(8)), "the header lies"),
    "one offset": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}),
        "data_offsets must be [begin, end]",
    ),
    "a huge size": (safetensors_bytes({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)), "the header lies"),
    "huge sizes of nothing": (safetensors_bytes({"a": entry(0, 0, [2**62, 2**62, 0])}), "the header lies"),
    "sizes that wrap around": (safetensors_bytes({"a": entry(0, 0, [2**32, 2**32])}), "the header lies"),
    "a number beyond all": (safetensors_bytes({"a": entry(0, 8, [10**30])}, bytes(8)), "shape must be"),
    "metadata that is a list": (safetensors_bytes({"__metadata__": [1]}), "__metadata__"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused_and_its_file_named(copied, kind):
    data, text = LIES[kind]
    directory = copied("llama")
    file = directory / "model.safetensors"
    file.write_bytes(data)
    refused(directory, str(file), text)
    with pytest.raises(CheckpointError, match=file.name):
        torch_csd.from_safetensors(file, "a")


def test_a_file_that_is_cut_short_before_it_is_loaded_is_refused(copied):
    directory = copied("llama", "float32", True)
    file = shards(directory)[1]
    for size in (file.stat().st_size - 1, 1000, 7, 0):
        os.truncate(file, size)
        refused(directory, str(file), "cut short")


def test_a_weight_of_another_shape_than_the_configuration_says_is_named(copied):
    directory = copied("llama")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(65)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="model.norm.weight|size mismatch|mismatched"):
        load(directory)


def big_checkpoint(directory: Path) -> Path:
    """Of weights that do not stay in memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**_SMALL | sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="6MB")
    assert len(shards(directory)) >= 2
    return directory


@pytest.mark.parametrize("when", ["before the first pass", "after it"])
@pytest.mark.parametrize(
    "change",
    [
        lambda file, data: os.truncate(file, len(data) // 2),
        lambda file, data: file.write_bytes(data + b"x"),
        lambda file, data: os.utime(file, ns=(0, 0)),
        lambda file, data: file.write_bytes(data[:-1] + b"x"),
    ],
    ids=["truncated", "appended", "touched", "rewritten"],
)
def test_a_file_that_is_changed_under_a_model_is_noticed_and_the_model_can_be_loaded_anew(tmp_path, change, when):
    directory = big_checkpoint(tmp_path)
    ours = load(directory, memory_budget="4MiB")
    expected = logits(stock(directory))
    if when == "after it":
        torch.testing.assert_close(logits(ours), expected)
    file = shards(directory)[-1]
    data = file.read_bytes()
    change(file, data)
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{file}: changed while it was in use.*load the checkpoint anew"):
            logits(ours)
    # What is in other files can still be used.
    other = next(
        parameter
        for parameter in ours.parameters()
        if all(leaf.file.path != str(file) for leaf in parameter._layout.leaves) and parameter.dim() == 2
    )
    assert other.to_dense().isfinite().all()
    file.write_bytes(data)
    again = load(directory, memory_budget="4MiB")
    torch.testing.assert_close(logits(again), expected)


def test_a_file_that_is_cut_short_in_the_middle_of_a_forward_ends_it(tmp_path):
    directory = big_checkpoint(tmp_path)
    ours = load(directory, memory_budget="4MiB")
    logits(ours)
    file = shards(directory)[-1]
    data = file.read_bytes()
    hook = ours.model.layers[1].register_forward_hook(lambda *_: os.truncate(file, 5000))
    for _ in range(3):
        with pytest.raises(StoreError, match=f"{file}: changed while it was in use"):
            logits(ours)
    hook.remove()
    file.write_bytes(data)
    torch.testing.assert_close(logits(load(directory, memory_budget="4MiB")), logits(stock(directory)))


def test_the_old_files_are_used_on_where_new_ones_took_their_names(copied):
    directory = copied("llama")
    ours, expected = load(directory, memory_budget="4MiB"), logits(stock(directory))
    file = directory / "model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(other, directory / "new", metadata={"format": "pt"})
    os.rename(directory / "new", file)
    assert torch.equal(logits(ours), expected)
    assert torch.equal(logits(load(directory)), logits(stock(directory)))


def test_directories_and_files_that_nobody_may_write_to_are_enough(copied):
    directory = copied("llama", "float32", True)
    for file in directory.iterdir():
        file.chmod(0o444)
    directory.chmod(0o555)
    try:
        ours = load(directory)
        assert torch.equal(logits(ours), logits(stock(directory)))
        descriptors = [
            (link, int(Path(f"/proc/self/fdinfo/{link.name}").read_text().split("flags:")[1].split()[0], 8))
            for link in Path("/proc/self/fd").iterdir()
            if link.is_symlink() and str(directory) in os.path.realpath(link)
        ]
        assert descriptors and all(flags & os.O_ACCMODE == os.O_RDONLY for _, flags in descriptors)
    finally:
        directory.chmod(0o755)


MEDIUM = """
import ctypes, errno, sys, torch
import torch_csd

drive = ctypes.CDLL(sys.argv[1])
drive.fail(0, 0)
model = torch_csd.load_checkpoint(sys.argv[2], memory_budget="4MiB", io_engine="pread", attn_implementation="eager")
ids = torch.tensor([[3, 1, 4]])

def logits():
    with torch.no_grad():
        return model(ids, use_cache=False).logits

expected = logits()
drive.fail(1, errno.EIO)
assert torch.equal(logits(), expected) and drive.failed_places() > 0, "it was tried again"
for number, text in ((errno.EIO, "failed twice"), (errno.ENXIO, "failed: No such device")):
    for _ in range(2):
        drive.fail(1000, number)
        try:
            logits()
            raise AssertionError("no error")
        except torch_csd.StoreError as error:
            assert sys.argv[2] in str(error) and ".safetensors: reading " in str(error) and text in str(error), error
    drive.fail(0, 0)
    assert torch.equal(logits(), expected), "usable afterwards"
    assert torch.equal(logits(), expected)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a faulty drive with")
def test_an_error_of_the_drive_ends_one_forward_and_the_model_is_used_on(tmp_path):
    source, library = tmp_path / "faulty.c", tmp_path / "faulty.so"
    source.write_text(textwrap.dedent(FAULTY))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-pthread"], check=True)
    directory = big_checkpoint(tmp_path / "checkpoint")
    run = subprocess.run(
        [sys.executable, "-c", MEDIUM, str(library), str(directory)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_fingerprint_is_that_of_the_same_weights_in_memory(checkpoint, family):
    path = checkpoint(family)
    assert torch_csd.fingerprint(load(path)) == torch_csd.fingerprint(stock(path))
