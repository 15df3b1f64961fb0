"""Tiny random models of every family that the cache is held to, and what stock transformers makes of them."""

from __future__ import annotations

import functools

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

VOCABULARY = 96
PAD = 0

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,  # every generation runs to its full length
    "tie_word_embeddings": False,  # tied random embeddings make a model repeat its last token
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}

# family -> (class of the configuration, class of the model, arguments). Windows are shorter than most
# prompts.
_FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 24}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": 40}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GROUPED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "opt": ("OPTConfig", "OPTForCausalLM", _COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _COMMON),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        _COMMON | {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _GROUPED | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _COMMON
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
# Attention beside layers that are not attention.
_HYBRIDS = {
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        _GROUPED
        | {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_expand": 1,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _GROUPED | {"layer_types": ["conv", "full_attention"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _GROUPED
        | {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
}

FAMILIES = list(_FAMILIES)
HYBRIDS = list(_HYBRIDS)


def make_config(family: str, **changes) -> transformers.PreTrainedConfig:
    config_class, _, arguments = (_FAMILIES | _HYBRIDS)[family]
    return getattr(transformers, config_class)(**(arguments | changes))


def make_model(family: str, implementation: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model in float32 whose greedy choices are decisive: its logits spread over several units.

    The seed alone decides the weights, so two implementations of a family are the same model.
    """
    _, model_class, _ = (_FAMILIES | _HYBRIDS)[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)._from_config(
            make_config(family, **changes), attn_implementation=implementation, dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms, biases and the like stay near what they are
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


@functools.cache
def model_of(family: str, implementation: str) -> PreTrainedModel:
    return make_model(family, implementation)


def implementations(family: str) -> list[str]:
    """The attention implementations that a family can run with; "csd" where it can be chosen."""
    _, model_class, _ = (_FAMILIES | _HYBRIDS)[family]
    model_class = getattr(transformers, model_class)
    return (
        (["csd"] if model_class._can_set_attn_implementation() else [])
        # Older transformers offer sdpa for gemma2 and leave out its soft-cap.
        + (["sdpa"] if model_class._supports_sdpa and family != "gemma2" else [])
        + ["eager"]
    )


def stock_implementation(family: str, implementation: str) -> str:
    """What to compare `implementation` with: itself, or for "csd" the best that transformers has."""
    if implementation != "csd":
        return implementation
    return "sdpa" if "sdpa" in implementations(family) else "eager"


def prompts(*lengths: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A left-padded batch with one random prompt of each length."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((len(lengths), max(lengths)), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, max(lengths) - length :] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        attention_mask[row, max(lengths) - length :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def generate(model: PreTrainedModel, inputs: dict, cache=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [batch, length], logits [batch, steps, vocabulary]) of a generation, greedy unless `options`
    say else.
    """
    options = {"max_new_tokens": 32, "do_sample": False} | options
    out = model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, dim=1)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def assert_same_generation(ours: tuple, stock: tuple) -> None:
    tokens, logits = ours
    stock_tokens, stock_logits = stock
    assert torch.equal(tokens, stock_tokens)
    # Both sum the same numbers in float32, in another order.
    torch.testing.assert_close(logits, stock_logits, atol=1e-4, rtol=0)
