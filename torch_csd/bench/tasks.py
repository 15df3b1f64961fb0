"""What accuracy is measured on: contexts, and questions about them whose answers are known, as tokens."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from torch_csd.bench.settings import tokens_text

# Of the bundled task; the others are asked about further contexts, which cost a prefill each: minutes at 64k.
QUESTIONS_PER_CONTEXT, OF_LONG_ONES = 25, 100
LONG = 16384  # tokens; what is longer is a long one
WANTED_ROW = '{"prompt": ..., "answer": ...} or {"context": ..., "questions": [{"prompt": ..., "answer": ...}]}'


@dataclass(frozen=True)
class Question:
    prompt: list[int]  # follows the context; at least one token, of which the last is the first step of decoding
    answer: list[int]  # at least one token


@dataclass(frozen=True)
class Context:
    tokens: list[int]
    questions: list[Question]

    @property
    def longest(self) -> int:
        """Tokens of the context and its longest question and answer."""
        return len(self.tokens) + max(len(q.prompt) + len(q.answer) for q in self.questions)


@dataclass(frozen=True)
class Task:
    """One picture and a row for each method: contexts of about one length."""

    name: str  # "16k", or the file's
    contexts: list[Context]
    answered: bool = True  # else the "answers" are the text as it goes on: nobody is right or wrong

    @property
    def question_count(self) -> int:
        return sum(len(context.questions) for context in self.contexts)

    @property
    def longest(self) -> int:
        return max(context.longest for context in self.contexts)


def bundled(tokenizer: PreTrainedTokenizerBase, tokens: int, question_count: int, seed: int) -> Task:
    """Records in noise, each asked for by its key: see `torch_csd.example.contexts`."""
    from torch_csd.example.contexts import make_context

    most = min(OF_LONG_ONES if tokens > LONG else QUESTIONS_PER_CONTEXT, len(make_context(tokens, seed).questions))
    context_count = math.ceil(question_count / most)
    contexts = []
    for index in range(context_count):
        made = make_context(tokens, seed + index)
        count = question_count * (index + 1) // context_count - question_count * index // context_count
        questions = [Question(_ids(tokenizer, q.text), _ids(tokenizer, q.answer)) for q in made.questions[:count]]
        contexts.append(Context(_ids(tokenizer, made.text), questions))
    return Task(tokens_text(tokens), contexts)


def from_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase, question_count: int) -> Task:
    """Rows with answers, the first question_count questions of them. Raises ValueError for the first bad line."""
    contexts: list[Context] = []
    left = question_count
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            context = _parse_row(line, tokenizer)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: not JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
        if left > 0:
            contexts.append(Context(context.tokens, context.questions[:left]))
            left -= len(contexts[-1].questions)
    if not contexts:
        raise ValueError(f"{path}: no rows; wanted JSON lines, each {WANTED_ROW}")
    return Task(path.stem, contexts)


def from_text(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: list[int] | None, last: int) -> list[Task]:
    """The `last` tokens after each number of tokens; without numbers, the last ones of the text.

    Raises ValueError if the text is too short.
    """
    text = _read(path)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if tokens is None:
        tokens = [max(len(ids) - last, 2)]
    if min(tokens) < 2 or max(tokens) + last > len(ids):
        wanted = max(*tokens, 2)
        raise ValueError(f"{path}: wanted {wanted} tokens of context and {last} to predict, the text has {len(ids)}")
    return [
        Task(
            f"{path.stem} {tokens_text(count)}",
            [Context(ids[: count - 1], [Question(ids[count - 1 : count], ids[count : count + last])])],
            answered=False,
        )
        for count in tokens
    ]


def is_jsonl(path: Path) -> bool:
    """By its name: a text may begin with anything."""
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; wanted a text, or JSON lines, each {WANTED_ROW}") from None


def _parse_row(line: str, tokenizer: PreTrainedTokenizerBase) -> Context:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"wanted {WANTED_ROW}, got {type(row).__name__}")
    if "context" not in row:
        prompt, answer = _pair(row, WANTED_ROW)
        tokens = tokenizer(prompt, verbose=False)["input_ids"]
        if len(tokens) < 2:
            raise ValueError(f"prompt must be two tokens at least, got {len(tokens)}")
        whole = tokenizer(prompt + answer, verbose=False)["input_ids"]
        # As the model would write it, where the answer's tokens begin where the prompt ends.
        agree = whole[: len(tokens)] == tokens and len(whole) > len(tokens)
        answer_ids = whole[len(tokens) :] if agree else _ids(tokenizer, answer)
        return Context(tokens[:-1], [Question(tokens[-1:], _not_empty(answer_ids, "answer"))])
    context, questions = row["context"], row.get("questions")
    if not isinstance(context, str) or not context:
        raise ValueError("context must be a text that is not empty")
    if not isinstance(questions, list) or not questions or not all(isinstance(q, dict) for q in questions):
        raise ValueError('questions must be a list of {"prompt": ..., "answer": ...} with one at least')
    asked = []
    for question in questions:
        prompt, answer = _pair(question, 'questions of {"prompt": ..., "answer": ...}')
        asked.append(
            Question(
                _not_empty(_ids(tokenizer, prompt), "prompt"),
                _not_empty(_ids(tokenizer, answer), "answer"),
            )
        )
    return Context(_not_empty(tokenizer(context, verbose=False)["input_ids"], "context"), asked)


def _pair(row: dict, wanted: str) -> tuple[str, str]:
    for name in ("prompt", "answer"):
        if name not in row:
            raise ValueError(f'no "{name}": wanted {wanted}')
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{name} must be a text that is not empty, got {row[name]!r}")
    return row["prompt"], row["answer"]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _not_empty(ids: list[int], name: str) -> list[int]:
    if not ids:
        raise ValueError(f"the tokenizer makes no tokens of this {name}")
    return ids
