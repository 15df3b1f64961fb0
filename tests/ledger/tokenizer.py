"""A tokenizer with one token per byte, and two special ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # how `tokenizers` writes each byte as a character
_NEWLINE = "\u010a"
NEWLINE_ID = _BYTES.index(_NEWLINE)
PAD_ID, END_ID = len(_BYTES), len(_BYTES) + 1
VOCABULARY_SIZE = len(_BYTES) + 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(_BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
