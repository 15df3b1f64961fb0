from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

import torch_csd
from torch_csd.example.__main__ import CHECKPOINT
from torch_csd.example.contexts import ANSWER_TOKENS, IS, VOCABULARY, make_context
from torch_csd.example.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def answer(model: PreTrainedModel, cache: DynamicCache, question: torch.Tensor) -> torch.Tensor:
    """The logits of an answer's tokens, [ANSWER_TOKENS, vocabulary]; the cache is as it was before."""
    held, step_ids, logits = cache.get_seq_length(), question, []
    with torch.inference_mode():
        for _ in range(ANSWER_TOKENS):
            logits.append(model(step_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1])
            step_ids = logits[-1].argmax(-1, keepdim=True)
    cache.crop(held - cache.get_seq_length())
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_recalls_from_the_drive_what_it_recalls_from_memory(tokenizer, tmp_path, dtype):
    context = make_context(3000, seed=11)
    ids = tokenizer(context.text, return_tensors="pt").input_ids
    stored = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, attn_implementation="csd").eval()
    stock = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, attn_implementation="sdpa").eval()
    memory = DynamicCache(config=stock.config)
    with torch_csd.StorageCache(stored.config, tmp_path, memory_budget="2MiB") as cache:
        with torch.inference_mode():
            for begin in range(0, ids.shape[1], 1024):
                stored.model(ids[:, begin : begin + 1024], past_key_values=cache)
                stock.model(ids[:, begin : begin + 1024], past_key_values=memory)
        for question in context.questions[:12]:
            question_ids = tokenizer(question.text, return_tensors="pt").input_ids
            logits, expected = answer(stored, cache, question_ids), answer(stock, memory, question_ids)
            assert tokenizer.decode(logits.argmax(-1)) == question.answer
            # Rounding in another order: 1e-5 of logits up to 30; bfloat16 has 8 bits of them, in every layer.
            assert (logits - expected).abs().max() < (1e-3 if dtype == torch.float32 else 1.5)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert cache.stats()["drive_read_bytes"] > 0


@pytest.mark.parametrize("tokens", [7, 100, 2048, 5001])
def test_a_context_has_the_asked_length_and_its_answers_where_it_says(tokenizer, tokens):
    context = make_context(tokens, seed=3)
    ids = tokenizer(context.text).input_ids
    assert len(ids) == tokens and tokenizer.unk_token_id not in ids
    assert len({question.text for question in context.questions}) == max(1, tokens // 64)
    for question in context.questions:
        _, *key, _ = question.text.split()
        before = tokenizer.decode(ids[question.position - len(key) - 1 : question.position])
        assert before == " ".join([*key, IS])
        assert tokenizer.decode(ids[question.position : question.position + ANSWER_TOKENS]) == question.answer
        assert context.text.count(f"\n{before} ") + context.text.startswith(f"{before} ") == 1


def test_a_context_is_drawn_from_its_seed():
    assert make_context(1000, seed=5) == make_context(1000, seed=5)
    assert make_context(1000, seed=5).text != make_context(1000, seed=6).text
    assert len(make_context(1000, seed=5, record_count=100).questions) == 100


@pytest.mark.parametrize("record_count", [0, 15])
def test_records_that_do_not_fit_are_an_error(record_count):
    with pytest.raises(ValueError, match=rf"fit into 100 tokens, got {record_count}"):
        make_context(100, seed=0, record_count=record_count)


def test_the_tokenizer_of_the_checkpoint_is_that_of_the_vocabulary(tokenizer):
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    text = "the Amber lamp\nstands near zebra 17."
    assert tokenizer.decode(tokenizer(text).input_ids) == "the amber lamp stands near <unk> 17 ."


def test_the_command_writes_a_checkpoint_and_prompts_with_answers(tmp_path, tokenizer):
    command = [sys.executable, "-m", "torch_csd.example", "--output", str(tmp_path / "new" / "model")]
    subprocess.run(command, check=True, capture_output=True)
    written = tmp_path / "new" / "model"
    model = AutoModelForCausalLM.from_pretrained(written)
    assert model.config.max_position_embeddings >= 131072
    rows = [json.loads(line) for line in (written / "prompts.jsonl").read_text().splitlines()]
    for row in rows:
        key = row["prompt"].splitlines()[-1].removeprefix("? ")
        assert f"\n{key} {row['answer']}\n" in row["prompt"]
    assert [len(tokenizer(row["prompt"]).input_ids) - 4 for row in rows] == [4096, 8192, 12288, 16384]


def test_importing_the_package_does_not_load_the_example():
    code = "import sys, torch_csd; sys.exit(any(name.startswith('torch_csd.example') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
