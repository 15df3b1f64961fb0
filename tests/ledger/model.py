"""A Llama whose weights are written down, not trained: it goes on with what followed the same text before.

This is an induction head (Olsson et al. 2022, arXiv 2209.11895), made by hand. Three layers gather, at every
position, the codes of the 24 tokens before it: one head per distance, found by RoPE alone. The fourth layer
compares the latest 24 tokens with every position's 24, and copies the token that stands where they agree
best. So each generated token is fetched from one place in the KV cache, thousands of tokens back: one wrong
page is a wrong letter.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ledger.tokenizer import END_ID, NEWLINE_ID, PAD_ID, VOCABULARY_SIZE

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 256
CODE_DIM = 9  # bits: 2**9 tokens can be told apart
CONTEXT_TOKENS = 24  # that are compared; 8 heads x 3 layers gather them
HIDDEN_SIZE = 256  # slots of CODE_DIM: a token, the CONTEXT_TOKENS before it, the prediction
PREDICTION_SLOT = CONTEXT_TOKENS + 1

# Pair i of a head's dimensions turns by ROPE_THETA ** (-i / 128) per token: the first turn fast enough to
# tell neighbours apart, those from CONTENT_PAIR on so slowly (1e-5) that a comparison ignores the distance.
ROPE_THETA = 1e32
CONTENT_PAIR = 20

POSITION_SHARPNESS = 40.0  # gap between the right distance and the next, in units of score: about 27
CONTENT_SHARPNESS = 5.0  # score of one bit that agrees
LOGIT_SHARPNESS = 10.0


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=1 + CONTEXT_TOKENS // NUM_HEADS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def make_model() -> LlamaForCausalLM:
    """The model, in float32. It draws nothing at random."""
    model = LlamaForCausalLM._from_config(make_config(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.zero_()
    codes = token_codes()
    model.model.embed_tokens.weight[:, _slot(0)] = codes
    model.lm_head.weight[:, _slot(PREDICTION_SLOT)] = LOGIT_SHARPNESS * codes

    *gathering, matching = model.model.layers
    for index, layer in enumerate(gathering):
        _write_norm(layer.input_layernorm, filled_slots=1 + index * NUM_HEADS)
        _write_gathering(layer.self_attn, first_distance=1 + index * NUM_HEADS)
    _write_norm(matching.input_layernorm, filled_slots=1 + CONTEXT_TOKENS)
    _write_matching(matching.self_attn)
    _write_norm(model.model.norm, filled_slots=2 + CONTEXT_TOKENS)

    # A line is an answer, so a new line ends one.
    model.generation_config = GenerationConfig(eos_token_id=[NEWLINE_ID, END_ID], pad_token_id=PAD_ID)
    return model.eval()


def token_codes() -> torch.Tensor:
    """[vocabulary, CODE_DIM] of +1 and -1, all different."""
    # Letters share most bits; an odd factor spreads them and keeps them apart.
    numbers = torch.arange(VOCABULARY_SIZE) * 167 % 2**CODE_DIM
    return ((numbers[:, None] >> torch.arange(CODE_DIM)) & 1) * 2.0 - 1.0


def _slot(index: int) -> slice:
    return slice(index * CODE_DIM, (index + 1) * CODE_DIM)


def _write_norm(norm: torch.nn.Module, *, filled_slots: int) -> None:
    """Undoes the division by the root mean square, which is the same for all tokens: slots hold +1 and -1."""
    norm.weight.fill_((filled_slots * CODE_DIM / HIDDEN_SIZE) ** 0.5)


def _write_gathering(attention: torch.nn.Module, *, first_distance: int) -> None:
    """Head h copies the token `first_distance + h` back into the slot of that number.

    Keys and queries are biases, so that only RoPE tells positions apart: the score is a sum over pairs of
    cos(frequency * (distance - wanted)), which is largest where they agree.
    """
    half = HEAD_DIM // 2
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    frequencies, count = frequencies[:CONTENT_PAIR], CONTENT_PAIR
    length = (POSITION_SHARPNESS * HEAD_DIM**0.5) ** 0.5
    for kv_head in range(NUM_KV_HEADS):
        start = kv_head * HEAD_DIM
        attention.k_proj.bias[start : start + count] = length
        attention.v_proj.weight[start : start + CODE_DIM, _slot(0)] = torch.eye(CODE_DIM)
    for head in range(NUM_HEADS):
        start = head * HEAD_DIM
        angles = frequencies * (first_distance + head)
        attention.q_proj.bias[start : start + count] = (length * angles.cos()).float()
        attention.q_proj.bias[start + half : start + half + count] = (-length * angles.sin()).float()
        attention.o_proj.weight[_slot(first_distance + head), start : start + CODE_DIM] = torch.eye(CODE_DIM)


def _write_matching(attention: torch.nn.Module) -> None:
    """Head 0 finds where the tokens before a position are the latest ones, and copies the token there.

    The others see all positions alike and are not read.
    """
    length = (CONTENT_SHARPNESS * HEAD_DIM**0.5) ** 0.5
    half = HEAD_DIM // 2
    dimensions = torch.cat([torch.arange(CONTENT_PAIR, half), torch.arange(half + CONTENT_PAIR, HEAD_DIM)])
    for index in range(CONTEXT_TOKENS):
        chosen = dimensions[index * CODE_DIM : (index + 1) * CODE_DIM]
        attention.q_proj.weight[chosen, _slot(index)] = length * torch.eye(CODE_DIM)
        attention.k_proj.weight[chosen, _slot(index + 1)] = length * torch.eye(CODE_DIM)
    attention.v_proj.weight[:CODE_DIM, _slot(0)] = torch.eye(CODE_DIM)
    attention.o_proj.weight[_slot(PREDICTION_SLOT), :CODE_DIM] = torch.eye(CODE_DIM)
