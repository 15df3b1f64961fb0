from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_csd.example.model import make_model, token_codes
from torch_csd.example.tokenizer import NEWLINE_ID, VOCABULARY_SIZE, make_tokenizer


def test_the_example_answers_from_its_cache_in_memory(checkpoint, lookups):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    for lookup in lookups:
        inputs = tokenizer(lookup.prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=96)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens) == lookup.answer + "\n"


def test_the_example_is_the_same_at_every_making():
    for first, second in zip(make_model().parameters(), make_model().parameters(), strict=True):
        assert torch.equal(first, second)


def test_every_token_has_a_code_of_its_own():
    assert len(token_codes().unique(dim=0)) == VOCABULARY_SIZE


def test_the_tokenizer_gives_any_text_back():
    tokenizer = make_tokenizer()
    text = "Zażółć 8 €\n\t\x00 <|x|>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("\n")["input_ids"] == [NEWLINE_ID]
