"""fp8 checkpoints: computed with as they are stored, scales and all, without a copy in another type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import torch_csd
from torch_csd import CheckpointError
from torch_csd.weights.files import read_header
from torch_csd.weights.layout import Region, Scaled
from torch_csd.weights.tensor import FileTensor, default_stream

BLOCK = 32
SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    dtype=torch.bfloat16,
)


def tiny(kind: str):
    torch.manual_seed(0)
    return new_model(kind).bfloat16()


def new_model(kind: str):
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE | {"num_key_value_heads": 4},
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
    )


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """fp8 values, and the scales of blocks, of which the last of a side may be cut short."""
    counts = [-(-size // side) for size, side in zip(weight.shape, block, strict=True)]
    scales = torch.empty(counts)
    values = torch.empty(weight.shape)
    for row in range(counts[0]):
        for column in range(counts[1]):
            part = tuple(slice(at * side, (at + 1) * side) for at, side in zip((row, column), block, strict=True))
            scales[row, column] = weight[part].float().abs().max() / 448 + 1e-8
            values[part] = weight[part].float() / scales[row, column]
    return values.to(torch.float8_e4m3fn), scales


def dense(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    grid = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * grid[: values.shape[0], : values.shape[1]]


def make_fp8(directory: Path, model, block: tuple[int, int] = (BLOCK, BLOCK)) -> None:
    """A checkpoint as DeepSeek-V3's are, and in `plain` below it the same weights in bfloat16."""
    model.save_pretrained(directory)
    model.save_pretrained(directory / "plain")
    file = directory / "model.safetensors"
    stored, plain = {}, {}
    for name, weight in load_file(file).items():
        if weight.dim() == 2 and ("proj" in name or "experts" in name):
            values, scales = quantised(weight, block)
            stored |= {name: values, f"{name}_scale_inv": scales}
            plain[name] = dense(values, scales, block).bfloat16()
        else:
            stored[name] = plain[name] = weight
    save_file(stored, file, metadata={"format": "pt"})
    save_file(plain, directory / "plain" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek"])
def test_logits_are_those_of_the_weights_times_their_scales(tmp_path, kind):
    make_fp8(tmp_path, tiny(kind))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    model = torch_csd.load_checkpoint(tmp_path, memory_budget="4MiB", attn_implementation="eager")
    ids = torch.randint(0, 128, (2, 9))
    before = model.weight_stream.stats()["bytes_read"]
    assert before == 0 and model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    tokens = [
        each.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        for each in (model, expected)
    ]
    assert torch.equal(*tokens)


def test_blocks_that_do_not_divide_a_weight_are_cut_short(tmp_path):
    make_fp8(tmp_path, tiny("llama"), block=(40, 48))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    model = torch_csd.load_checkpoint(tmp_path, memory_budget="4MiB", attn_implementation="eager")
    ids = torch.randint(0, 128, (1, 5))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A stored weight [3, 70, 50] in blocks of 16 x 20, and the same in memory."""
    file = tmp_path_factory.mktemp("scaled") / "weights.safetensors"
    block = (16, 20)
    parts = [quantised(torch.randn(70, 50), block) for _ in range(3)]
    save_file({"values": torch.stack([v for v, _ in parts]), "scales": torch.stack([s for _, s in parts])}, file)
    stream = default_stream()
    entries = read_header(file).entries
    values, scales = (
        Region.make(stream.open(file), entry.dtype, entry.shape, entry.offset)
        for entry in (entries["values"], entries["scales"])
    )
    stored = FileTensor(Scaled(values, scales, block, torch.float32), stream)
    return stored, torch.stack([dense(v, s, block) for v, s in parts])


@pytest.mark.parametrize(
    "view",
    [
        lambda each: each,
        lambda each: each[1],
        lambda each: each[1:, 5:47, 19:41],
        lambda each: each[2, 17:, :3],
        lambda each: each[0].t()[5:, 11:70],
        lambda each: each.mT[:, 30:, 40:],
        lambda each: each[1, 33:33],
        lambda each: each.unbind(0)[2][:, -7:],
        lambda each: torch.cat([each[0, 3:9], each[2, 60:]]),
        lambda each: torch.stack([each[0], each[2]], dim=0)[1, 4:],
        lambda each: each.to(torch.bfloat16)[1],
    ],
)
def test_views_take_their_scales_along(scaled, view):
    stored, expected = scaled
    assert isinstance(view(stored), FileTensor)
    assert torch.equal(view(stored).to_dense(), view(expected))


def test_steps_and_elements_are_refused(scaled):
    for view in (lambda each: each[0, ::2], lambda each: each[0, 3], lambda each: each.view(-1)):
        with pytest.raises(NotImplementedError, match="to_dense"):
            view(scaled[0])


@pytest.mark.parametrize("change", ["dtype", "grid"])
def test_scales_that_do_not_fit_are_an_error_that_names_the_weight(tmp_path, change):
    make_fp8(tmp_path, tiny("llama"))
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "dtype":
        stored[name] = stored[name].bfloat16()
    else:
        stored[f"{name}_scale_inv"] = torch.ones(5, 1)
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.*wanted fp8"):
        torch_csd.load_checkpoint(tmp_path, memory_budget="4MiB")


def test_other_quantised_checkpoints_are_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match=r"quantised \(gptq\)"):
        torch_csd.load_checkpoint(tmp_path, memory_budget="4MiB")


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------


def make_mxfp4(directory: Path) -> None:
    """A checkpoint as gpt-oss's are, and in `plain` below it the same in bfloat16, by transformers' own code."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    config = GptOssConfig(
        **SHAPE | {"intermediate_size": 64}, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    model = GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    model.save_pretrained(directory / "plain")
    file = directory / "model.safetensors"
    stored, plain = {}, {}
    for name, weight in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")) and weight.dim() == 3:
            experts, in_features, out_features = weight.shape
            blocks = torch.randint(0, 256, (experts, out_features, in_features // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, out_features, in_features // 32), dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
            assert plain[name].shape == weight.shape
        else:
            stored[name] = plain[name] = weight
    save_file(stored, file, metadata={"format": "pt"})
    save_file(plain, directory / "plain" / "model.safetensors", metadata={"format": "pt"})
    table = json.loads((directory / "config.json").read_text())
    table["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(table))


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_mxfp4_experts_are_computed_with_as_they_are_stored(tmp_path, weight_dtype):
    make_mxfp4(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation="eager").eval()
    model = torch_csd.load_checkpoint(
        tmp_path,
        memory_budget="4MiB",
        attn_implementation="eager",
        weight_dtype=weight_dtype,
        weight_directory=tmp_path,
    )
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        logits, wanted = model(ids).logits, expected(ids).logits
    if weight_dtype is None:
        assert torch.equal(logits, wanted)
    else:  # 8 bits of each of 64, in a model that rounds to bfloat16
        assert (logits - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_elements_are_those_of_the_specification(tmp_path, dtype):
    from torch_csd.weights.layout import Packed

    file = tmp_path / "weights.safetensors"
    blocks = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 4, 64)
    scales = torch.tensor([120, 127, 130, 100], dtype=torch.uint8).repeat(2, 4, 1)
    save_file({"blocks": blocks, "scales": scales}, file)
    stream = default_stream()
    values, exponents = (
        Region.make(stream.open(file), entry.dtype, entry.shape, entry.offset)
        for entry in (read_header(file).entries[name] for name in ("blocks", "scales"))
    )
    stored = FileTensor(Packed(values, exponents, dtype), stream)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    elements = torch.stack([table[(blocks % 16).long()], table[(blocks // 16).long()]], dim=-1).flatten(-2)
    expected = (elements * (scales.float() - 127).exp2().repeat_interleave(32, -1)).to(dtype)
    assert torch.equal(stored.to_dense(), expected)
    assert torch.equal(stored[1, 1:3].to_dense(), expected[1, 1:3])
    assert torch.equal(stored.mT[0][:, 2:].to_dense(), expected.mT[0][:, 2:])
    assert torch.equal(stored[0].to_dense().signbit(), expected[0].signbit())
