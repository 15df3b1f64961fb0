"""Models on a GPU generate with a StorageCache what they do with a DynamicCache, by every feature of generate()."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from torch_csd import StorageCache  # noqa: E402

VOCABULARY = 97
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens whose logits, of some tens, are this near may change places when the same numbers are added in another order.
TIES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.06}

FEATURES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 128},
}
SETTINGS = {
    "near": {"executor": "near", "gpu_budget": 0},
    "gpu": {"executor": "gpu"},
    "gpu, a part stays": {"executor": "gpu", "gpu_budget": 200_000},
    "auto": {"executor": "auto", "gpu_budget": 100_000},
    "auto, resident": {"executor": "auto", "resident": True},
}


def make_model(family: str, dtype: torch.dtype, device: torch.device):
    common = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 100}),
        "gemma2": (
            transformers.Gemma2Config,
            transformers.Gemma2ForCausalLM,
            {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 100},
        ),
        "gpt_oss": (
            transformers.GptOssConfig,
            transformers.GptOssForCausalLM,
            {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 100},
        ),
    }
    config_class, model_class, more = classes[family]
    torch.manual_seed(0)
    model = model_class(config_class(**common | more)).to(device, dtype).eval()
    model.set_attn_implementation("csd")
    return model


def prompts(device: torch.device, *lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generate(model, inputs, cache, **options):
    torch.manual_seed(7)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | options
    out = model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, out.logits


def assert_same_tokens(model, inputs, ours, theirs) -> None:
    """Up to the first token of a row where the model's own two best were as good as equal."""
    start = inputs["input_ids"].shape[1]
    (tokens, _), (expected, logits) = ours, theirs
    assert tokens.shape == expected.shape
    for row in range(tokens.shape[0]):
        different = (tokens[row] != expected[row]).nonzero()
        if len(different) == 0:
            continue
        step = int(different[0]) - start
        assert step >= 0
        here = logits[step][row].float()
        gap = (here[expected[row, start + step]] - here[tokens[row, start + step]]).abs()
        assert gap < TIES[model.dtype], f"row {row}, step {step}: {gap:.3g} apart"


def storage_cache(model, tmp_path, **settings) -> StorageCache:
    return StorageCache(model.config, tmp_path, **{"memory_budget": "8MiB", "resident": False} | settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_greedy_generation_of_a_padded_batch(device, tmp_path, dtype, settings):
    model = make_model("llama", dtype, device)
    inputs = prompts(device, 700, 300, 65)
    expected = generate(model, inputs, DynamicCache(config=model.config))
    with storage_cache(model, tmp_path, **settings) as cache:
        assert_same_tokens(model, inputs, generate(model, inputs, cache), expected)
        stats = cache.stats()
        assert stats["gpu_packed_bytes"] > 0, "prompts are packed on the card"
        if settings["executor"] != "auto":
            assert (stats["gpu_drive_read_bytes"] > 0) == (settings["executor"] == "gpu")


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("executor", ["near", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_features_of_generate(device, tmp_path, dtype, executor, options):
    if dtype != torch.float32 and ("num_beams" in options or "do_sample" in options):
        pytest.skip("whole sequences change places by what is rounded off of one score")
    model = make_model("llama", dtype, device)
    inputs = prompts(device, 500) if "prompt_lookup_num_tokens" in options else prompts(device, 500, 200)
    expected = generate(model, inputs, DynamicCache(config=model.config), **options)
    with storage_cache(model, tmp_path, executor=executor, gpu_budget=100_000) as cache:
        ours = generate(model, inputs, cache, **options)
        if "num_beams" in options or "do_sample" in options:
            assert torch.equal(ours[0], expected[0])
        else:
            assert_same_tokens(model, inputs, ours, expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("executor", ["near", "gpu"])
def test_windows_soft_caps_and_sinks(device, tmp_path, family, executor):
    model = make_model(family, torch.float32, device)
    inputs = prompts(device, 500, 200)
    expected = generate(model, inputs, DynamicCache(config=model.config))
    with storage_cache(model, tmp_path, executor=executor) as cache:
        assert_same_tokens(model, inputs, generate(model, inputs, cache), expected)


@pytest.mark.parametrize("executor", ["near", "gpu"])
def test_a_conversation_with_a_fork_and_a_crop(device, tmp_path, executor):
    model = make_model("llama", torch.float32, device)
    first = prompts(device, 500, 500)
    with storage_cache(model, tmp_path, executor=executor, gpu_budget=200_000) as cache, torch.no_grad():
        stock = DynamicCache(config=model.config)
        for each in (cache, stock):
            model(**first, past_key_values=each)
        fork, stock_fork = copy.deepcopy(cache), copy.deepcopy(stock)
        for ours, theirs, seed in ((cache, stock, 1), (fork, stock_fork, 2)):
            more = torch.randint(3, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(seed)).to(device)
            for crop in (None, -120):
                if crop is not None:
                    ours.crop(crop)
                    theirs.crop(crop)
                outputs = [model(input_ids=more, past_key_values=each).logits for each in (ours, theirs)]
                torch.testing.assert_close(*outputs, atol=2e-3, rtol=1e-3)
        fork.close()


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_quantised_caches_are_the_same_wherever_they_are_attended_to(device, tmp_path, kv_dtype):
    model = make_model("llama", torch.float32, device)
    inputs = prompts(device, 500, 200)
    logits = []
    for executor in ("near", "gpu"):
        with storage_cache(model, tmp_path, executor=executor, kv_dtype=kv_dtype) as cache, torch.no_grad():
            model(**inputs, past_key_values=cache)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long, device=device)], 1)
            step = model(input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache)
            logits.append(step.logits)
    torch.testing.assert_close(*logits, atol=2e-2, rtol=1e-3)  # near, q has 16 bits


def test_a_kept_cache_is_found_again_on_the_gpu(device, tmp_path):
    model = make_model("llama", torch.float32, device)
    inputs = prompts(device, 500)
    expected = generate(model, inputs, DynamicCache(config=model.config))
    settings = dict(memory_budget="8MiB", resident=False, executor="gpu")
    with StorageCache(model.config, tmp_path, durable=True, name="a", **settings) as cache, torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :-1], past_key_values=cache)
        cache.commit(inputs["input_ids"])
    with StorageCache.open(tmp_path, "a", config=model.config, device=device, **settings) as cache:
        assert_same_tokens(model, inputs, generate(model, inputs, cache), expected)
        assert cache.stats()["gpu_drive_read_bytes"] > 0
