"""Models whose weights are brought to a GPU from their files: the results are those of weights that lie on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf.models import model_of, prompts
from safetensors.torch import save_file

import torch_csd
from torch_csd import ops
from torch_csd.weights.files import read_header
from torch_csd.weights.layout import Region
from torch_csd.weights.quantised import linear_on_card, unpack_rows
from torch_csd.weights.stream import Stream
from torch_csd.weights.tensor import FileTensor

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MIB = 2**20


@pytest.fixture(params=["llama", "mixtral", "gpt_oss", "opt"])
def checkpoint(request, tmp_path) -> str:
    model_of(request.param, "eager").save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@contextlib.contextmanager
def loaded(path: str, device: torch.device, **options: object) -> Iterator[transformers.PreTrainedModel]:
    model = torch_csd.load_checkpoint(
        path, device=device, **{"memory_budget": "4MiB", "weight_directory": path} | options
    )
    try:
        yield model
    finally:
        model.weight_stream.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_those_of_weights_on_the_card(device, checkpoint, dtype):
    ordinary = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager")
    ordinary = ordinary.to(device).eval()
    inputs = {name: tensor.to(device) for name, tensor in prompts(40, 23).items()}
    with loaded(checkpoint, device, dtype=dtype, attn_implementation="eager") as model, torch.no_grad():
        assert {parameter.device.type for parameter in model.parameters()} == {device.type}
        expected = ordinary(**inputs).logits
        # Of a mixture, torch multiplies all experts at once, and we one after another: other roundings.
        atol = 64 * torch.finfo(dtype).eps * float(expected.abs().max())
        for _ in range(3):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=atol, rtol=0)
        stats = model.weight_stream.stats()
    assert stats["gpu_copied_bytes"] + stats["gpu_direct_bytes"] > 0 and stats["gpu_reason"]


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantised_weights_compute_as_on_the_cpu(device, checkpoint, weight_dtype):
    options = dict(dtype=torch.float32, weight_dtype=weight_dtype, attn_implementation="eager")
    inputs = prompts(40, 23)
    with loaded(checkpoint, torch.device("cpu"), **options) as model, torch.no_grad():
        expected = model(**inputs).logits
    with loaded(checkpoint, device, **options) as model, torch.no_grad():
        logits = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.cpu()
    torch.testing.assert_close(logits, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)  # sums' order, TF32


@pytest.mark.parametrize("gpu_io", ["pinned", "auto"])
def test_generation_with_weights_and_kv_on_the_drive(device, tmp_path, gpu_io):
    model_of("llama", "eager").save_pretrained(tmp_path / "checkpoint")
    path = str(tmp_path / "checkpoint")
    inputs = {name: tensor.to(device) for name, tensor in prompts(300).items()}
    ordinary = transformers.AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    options = dict(max_new_tokens=8, do_sample=False)
    expected = ordinary.generate(**inputs, **options)
    with loaded(path, device, gpu_io=gpu_io) as model:
        assert torch.equal(model.generate(**inputs, **options), expected)
        with torch_csd.StorageCache(model.config, tmp_path, memory_budget="8MiB", resident=False) as cache:
            assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


@needs_cuda
@pytest.mark.parametrize("gpu_io", ["pinned", "auto"])
@pytest.mark.parametrize("keep", [True, False])
def test_no_memory_is_reused_before_it_is_computed_with(tmp_path, gpu_io, keep):
    """Slow arithmetic, small staging: copies that came early would be seen."""
    weights = {f"w{number}": torch.randn(256, 1024) for number in range(24)}
    save_file(weights, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    device = torch.device("cuda", torch.cuda.current_device())
    stream = Stream(64 * MIB, staging_bytes=6 * MIB, device=device, gpu_io=gpu_io, directory=str(tmp_path))
    try:
        file = stream.open(header.path)
        tensors = {
            name: FileTensor(Region.make(file, entry.dtype, entry.shape, entry.offset), stream, device=device)
            for name, entry in header.entries.items()
        }
        stream.expect([tensor._layout for tensor in tensors.values()], keep=keep)
        x, large = torch.randn(8, 1024, device=device), torch.randn(2048, 2048, device=device)
        for side in (torch.cuda.current_stream(), torch.cuda.Stream()):
            side.wait_stream(torch.cuda.current_stream())
            outs = []
            with torch.cuda.stream(side), torch.no_grad():
                for _ in range(2):
                    for tensor in tensors.values():
                        large = large @ large / 64  # keeps the card busy before the weight is used
                        outs.append(F.linear(x, tensor))
            torch.cuda.synchronize()
            for out, weight in zip(outs, [*weights.values()] * 2, strict=True):
                assert torch.equal(out, F.linear(x, weight.to(device)))
    finally:
        stream.close()


@needs_cuda
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_unpacked_to_the_values_of_the_cpu(bits, dtype):
    weight = torch.randn(300, 1000)
    weight[3, 5], weight[4, 70] = torch.nan, torch.inf
    rows = ops.quantise_rows(weight, bits)
    expected = ops.dequantise_rows(rows, bits=bits, in_features=1000, dtype=dtype)
    ours = unpack_rows(rows.cuda(), bits=bits, in_features=1000, dtype=dtype).cpu()
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num()) and torch.equal(ours.isnan(), expected.isnan())
    x = torch.randn(3, 1000, dtype=dtype, device="cuda")
    out = linear_on_card(x, rows[:3].cuda(), bits=bits, in_features=1000, dtype=dtype)
    torch.testing.assert_close(out, F.linear(x, expected[:3].cuda()))


@needs_cuda
def test_a_model_of_the_cpu_computes_on_the_card_it_is_moved_to(tmp_path):
    model_of("llama", "eager").save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with loaded(str(tmp_path), torch.device("cpu")) as model, torch.no_grad():
        expected = model(ids).logits
        with pytest.warns(UserWarning, match="loaded for cpu are read and copied to cuda"):
            model.cuda()
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)
