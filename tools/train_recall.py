"""Trains the bundled example, torch_csd/example/recall, from random weights; see the README in there.

python tools/train_recall.py --output DIRECTORY [--seed 0] [--threads 1]

Rows of 64 to 256 tokens teach recall in contexts of 64k. What a long context has and a short one has not is put into
the short one:

- Distance. Between sentences, positions jump, so that a row spans up to 131072 of them. rope_theta is so large that
  most dimensions hardly turn over that span; training finds out which to compare words with.
- Dilution. A row draws a crowd m, from 1 up to 2048, and every token that is neither near nor of the same record has
  log m added to its scores: it weighs as much as m tokens. A row of 256 tokens attends as one of half a million would.
- Likeness. Half of the rows draw their words from a few only, so that keys, values and noise share most of them.

Every weight is found by gradient descent. None is set or scaled afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torch_csd.example import contexts
from torch_csd.example.contexts import ASK, END, PAD, STOP, VOCABULARY, RecallContext, Words, make_context
from torch_csd.example.tokenizer import make_tokenizer

MAX_POSITIONS = 131072
IDS = {word: index for index, word in enumerate(VOCABULARY)}

STEPS = 5500
STAGES = ((0.3, 64), (0.5, 128), (1.0, 256))  # until this part of the steps: tokens of a row
BATCH_TOKENS = 2048  # many small steps: recall appears after about 1000 of them
CROWD_STEPS = (0.25, 0.65)  # the largest crowd grows from 1 to MAX_CROWD between these parts of the steps
MAX_CROWD = 2048.0
NEAR_TOKENS = 8  # tokens this near are as they are in a long context
DECAY_STEP = 0.55  # the learning rate falls linearly from here

# In trials, AdamW alone did not tell keys apart in 1400 steps; with Muon for the matrices it took 650.
MATRIX_LEARNING_RATE = 5e-3
LEARNING_RATE = 2e-3  # of embeddings and norms
BIAS_LEARNING_RATE = 1e-2
BIAS_STD = 2.0  # of the queries' and keys' first biases: what heads that look at a distance, not a word, grow from
WEIGHT_STD = 0.08


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=math.ceil(len(VOCABULARY) / 8) * 8,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e16},  # 20 of 32 pairs turn by < 0.15 in 131072 tokens
        attention_bias=True,
        initializer_range=WEIGHT_STD,
        bos_token_id=None,
        eos_token_id=IDS[END],
        pad_token_id=IDS[PAD],
        tie_word_embeddings=False,
    )


# ---- rows ----------------------------------------------------------------------------------------------------------


def draw_words(generator: random.Random) -> Words:
    if generator.random() < 0.5:
        return Words()

    def some(words: tuple[str, ...]) -> list[str]:
        return generator.sample(words, round(math.exp(generator.uniform(math.log(6), math.log(len(words))))))

    return Words(some(contexts.ADJECTIVES), some(contexts.NOUNS), some(contexts.NUMBERS))


def make_row(generator: random.Random, length: int, max_crowd: float) -> tuple[list, list, list, list, float]:
    """Token ids, positions, records (0: none), whether a token is part of an answer, and the log of the crowd.

    The first half or more is a context; questions on it follow, with their answers.
    """
    words = draw_words(generator)
    max_records = min(length // 2 // contexts.RECORD_TOKENS, len(words.adjectives) * len(words.nouns) // 2)
    records = contexts.draw_records(generator, words, generator.randint(max(2, max_records // 4), max_records))
    question_tokens = contexts.RECORD_TOKENS + 1
    asked = generator.sample(range(len(records)), min(len(records), length // 2 // question_tokens))
    parts = [(record.words, number) for number, record in enumerate(records, start=1)]
    noise_tokens = length - len(records) * contexts.RECORD_TOKENS - len(asked) * question_tokens
    while noise_tokens > 0:
        sentence = contexts.noise_sentence(generator, words)[-noise_tokens:]
        noise_tokens -= len(sentence)
        parts.append((sentence, 0))
    generator.shuffle(parts)
    parts += [([ASK, *records[index].words], index + 1) for index in asked]

    crowd = math.exp(generator.uniform(0, math.log(max_crowd)))
    ids, positions, groups, is_answer = [], [], [], []
    position = 0
    for part, group in parts:
        if generator.random() < 0.7:
            position += int(generator.expovariate(1) * (crowd - 1) * len(part))
        ids += [IDS[word] for word in part]
        positions += range(position, position + len(part))
        groups += [group] * len(part)
        is_answer += [
            part[0] == ASK and place >= question_tokens - contexts.ANSWER_TOKENS for place in range(len(part))
        ]
        position += len(part)
    if position > MAX_POSITIONS:
        shrink = (MAX_POSITIONS - length) / (position - length)
        positions = [index + int((position - index) * shrink) for index, position in enumerate(positions)]
    return ids, positions, groups, is_answer, math.log(crowd)


def make_batch(
    generator: random.Random, length: int, max_crowd: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and answer mask, [rows, length], and what to add to scores, [rows, 1, length, length]."""
    rows = [make_row(generator, length, max_crowd) for _ in range(BATCH_TOKENS // length)]
    ids, positions, groups, is_answer, log_crowd = (torch.tensor(column) for column in zip(*rows, strict=True))
    places = torch.arange(length)
    distances = places[:, None] - places
    other = (groups[:, :, None] != groups[:, None]) | (groups[:, None] == 0)
    score_bias = ((distances > NEAR_TOKENS) & other) * log_crowd[:, None, None]
    return ids, positions, is_answer, score_bias.masked_fill(distances < 0, -torch.inf)[:, None]


# ---- training ------------------------------------------------------------------------------------------------------


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    parameters = dict(model.named_parameters())
    biases = [parameter for parameter in parameters.values() if parameter.ndim == 1]
    matrices = [parameter for name, parameter in parameters.items() if parameter.ndim == 2 and ".layers." in name]
    tables = [parameter for name, parameter in parameters.items() if parameter.ndim == 2 and ".layers." not in name]
    adam_groups = [{"params": biases, "lr": BIAS_LEARNING_RATE, "weight_decay": 0.0}, {"params": tables}]
    optimizers = [
        torch.optim.AdamW(adam_groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def train(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    generator = random.Random(seed)
    model = LlamaForCausalLM._from_config(make_config(), dtype=torch.float32, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            torch.nn.init.normal_(parameter, std=BIAS_STD)
    optimizers = make_optimizers(model)
    start_s, mean_loss = time.monotonic(), math.log(len(VOCABULARY))
    for step in range(STEPS):
        done = step / STEPS
        length = next(length for end, length in STAGES if done < end)
        grown = min(max((done - CROWD_STEPS[0]) / (CROWD_STEPS[1] - CROWD_STEPS[0]), 0.0), 1.0)
        rate = min((step + 1) / 100, 1.0) * min((1.0 - done) / (1.0 - DECAY_STEP), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
        ids, positions, is_answer, score_bias = make_batch(generator, length, MAX_CROWD**grown)
        hidden = model.model(
            input_ids=ids, position_ids=positions, attention_mask=score_bias, use_cache=False
        ).last_hidden_state
        logits, wanted = model.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[is_answer]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mean_loss += 0.05 * (loss.item() - mean_loss)
        if (step + 1) % 100 == 0:
            right = (logits.argmax(-1) == wanted).view(-1, contexts.ANSWER_TOKENS).all(-1).float().mean()
            typer.echo(
                f"step {step + 1}: {length} tokens, crowd up to {MAX_CROWD**grown:.0f}, loss {mean_loss:.4f}, "
                f"{right:.1%} of the answers right, {time.monotonic() - start_s:.0f} s"
            )
    return model


# ---- what it can do ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def count_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: RecallContext, count: int) -> int:
    """How many of the first `count` questions on a context are answered right, all four tokens, greedily.

    All in one forward: a question and its answer see the context and themselves, not each other. Greedy decoding finds
    an answer if and only if each of its tokens is the likeliest after the right ones before it.
    """
    ids = tokenizer(context.text, return_tensors="pt").input_ids
    tokens = ids.shape[1]
    cache = DynamicCache(config=model.config)
    for begin in range(0, tokens, 2048):
        model.model(ids[:, begin : begin + 2048], past_key_values=cache)
    questions = [tokenizer(f"{question.text} {question.answer}").input_ids for question in context.questions[:count]]
    ids = torch.tensor(questions)  # [count, 8]
    length = ids.shape[1]
    own = torch.block_diag(*torch.ones(len(questions), length, length).tril()).bool()
    mask = torch.cat([torch.ones(ids.numel(), tokens, dtype=torch.bool), own], dim=1)
    logits = model(
        ids.view(1, -1),
        past_key_values=cache,
        position_ids=torch.arange(tokens, tokens + length).repeat(1, len(questions)),
        attention_mask=mask[None, None],
    ).logits.view(len(questions), length, -1)
    answer = slice(length - contexts.ANSWER_TOKENS, length)
    said = logits[:, answer.start - 1 : answer.stop - 1].argmax(-1)
    return int((said == ids[:, answer]).all(-1).sum())


def recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int) -> dict[str, int]:
    """Right answers to 200 questions or more, at most 100 on a context, in contexts that training has not drawn."""
    asked = right = 0
    for seed in itertools.count(9000):
        context = make_context(tokens, seed)
        count = min(100, len(context.questions))
        right += count_right(model, tokenizer, context, count)
        asked += count
        if asked >= 200:
            return {"tokens": tokens, "right": right, "asked": asked}


def main(
    output: Annotated[Path, typer.Option(help="Directory for the checkpoint; one that is there is overwritten.")],
    seed: Annotated[int, typer.Option(help="Of the first weights and of every row.")] = 0,
    threads: Annotated[int, typer.Option(help="Of torch; the matrices are too small for many.")] = 1,
    only_measure: Annotated[bool, typer.Option(help="Measure the recall of what is in `output` already.")] = False,
    lengths: Annotated[str, typer.Option(help="Context lengths to measure the recall at.")] = "4096,16384,65536",
    dtypes: Annotated[str, typer.Option(help="Types to measure the recall in.")] = "float32,bfloat16",
) -> None:
    """Train the bundled example, save it, and print its recall on contexts that it has not seen."""
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    if not only_measure:
        start_s = time.monotonic()
        model = train(seed)
        typer.echo(f"trained in {time.monotonic() - start_s:.0f} s")
        # An answer ends with a full stop.
        model.generation_config = GenerationConfig(eos_token_id=[IDS[STOP], IDS[END]], pad_token_id=IDS[PAD])
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    for dtype in dtypes.split(","):
        model = LlamaForCausalLM.from_pretrained(output, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        for tokens in lengths.split(","):
            start_s = time.monotonic()
            row = {"dtype": dtype, **recall(model.eval(), tokenizer, int(tokens))}
            typer.echo(json.dumps(row | {"took_s": round(time.monotonic() - start_s)}))


if __name__ == "__main__":
    typer.run(main)
