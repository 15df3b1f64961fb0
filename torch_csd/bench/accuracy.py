"""What sparse attention costs: recall and KL against the bytes read, beside exact attention, H2O and a sliding window.

Every method goes on from the same keys and values: the context's are computed once, by exact attention in the model's
dtype, as for a prompt that is prefilled in one call, and then stored as each kv_dtype. A question's tokens but the last
are exact too. Measured are the steps that decode its answer: the last token of the question, then the answer's own.

The answer is fed as it should be, not as the model says it (teacher forcing), so that probabilities compare position by
position. Greedy decoding writes the whole answer if and only if every one of these steps ranks the right token first:
up to its first mistake it has been fed the same tokens. So one pass gives both recall and KL.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from torch_csd.bench import dense, tasks
from torch_csd.bench.report import Report, Row, number
from torch_csd.bench.settings import Settings, dtype_name, parse_counts
from torch_csd.bench.tasks import Context, Question, Task
from torch_csd.bench.timing import median
from torch_csd.cli.report import format_bytes, one_line
from torch_csd.errors import StoreError
from torch_csd.hf import StorageCache
from torch_csd.sparse import Adaptive, PageTopK, SparF, Sparse

BUNDLED = Path(__file__).parents[1] / "example" / "recall"
PREFILL_PIECE = 512  # tokens of one forward: what lies between layers is as large as this
FILL_PIECE = 4096  # tokens appended to a store at once

SHARES = ("1/8", "1/16", "1/32")
# By the name in --methods: a line of the plots, and the amounts measured by default.
FAMILIES = {
    "exact": ("exact", ()),
    "sparf": ("SparF", SHARES),
    "sparf-sketch": ("SparF, sketch", SHARES),
    "page": ("page top-k", SHARES),
    "page-sketch": ("page top-k, sketch", SHARES),
    "adaptive": ("adaptive", ("0.99", "0.999")),
    "adaptive-bounds": ("adaptive, bounds", ("0.99",)),
    "h2o": ("H2O", SHARES),
    "window": ("sliding window", SHARES),
}
QUICK = (
    "exact", "sparf-1/8", "sparf-sketch-1/8", "page-1/8", "page-sketch-1/8", "adaptive-0.99", "h2o-1/8", "window-1/8",
)  # fmt: skip
CANNOT = (StoreError, NotImplementedError, RuntimeError)  # a skipped row
POLICIES = {"h2o": dense.h2o, "window": dense.window}


@dataclass(frozen=True)
class Method:
    family: str
    amount: Fraction = Fraction(1)  # of the bytes; where it is adaptive, of the softmax

    @property
    def name(self) -> str:
        """As in --methods."""
        return self.family if self.family == "exact" else f"{self.family}-{self._amount}"

    @property
    def label(self) -> str:
        text = FAMILIES[self.family][0]
        return text if self.family == "exact" else f"{text} {self._amount}"

    @property
    def policy(self) -> dense.Policy | None:
        """Of the methods that keep tokens in memory and forget the others; these know no kv_dtype."""
        return POLICIES.get(self.family)

    @property
    def _amount(self) -> str:
        return str(float(self.amount)) if self.family.startswith("adaptive") else str(self.amount)

    def sparse(self, head_dim: int, tokens: int) -> Sparse | None:
        """`StorageCache.sparse` for a context of so many tokens; None is exact."""
        by = "sketch" if self.family in ("page-sketch", "adaptive") else "bounds"
        if self.family in ("page", "page-sketch"):
            return PageTopK(fraction=float(self.amount), by=by)
        if self.family in ("adaptive", "adaptive-bounds"):
            return Adaptive(mass=float(self.amount), by=by)
        if self.family in ("sparf", "sparf-sketch"):
            # SparQ's own accounting (2312.04985, section 4): of the 2 d elements that K and V of a token have, step 1
            # reads r of every token, step 2 all of k tokens out of T, so r / (2 d) + k / T in all. With r = d / n and
            # k = T / (2 n) each step reads 1 / (2 n), together 1 / n. The newest, always read, are among the k.
            kept = max(1, round(tokens * self.amount / 2))
            local = min(64, kept // 2)
            channels = max(1, round(head_dim * self.amount))
            step1 = "sketch" if self.family == "sparf-sketch" else "channels"
            return SparF(channels=channels, tokens=kept - local, local=local, step1=step1)
        return None


def parse_methods(text: str) -> list[Method]:
    """ "exact,page,h2o-1/8" -> methods, in the order of FAMILIES. Raises ValueError for what is none."""
    methods = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        # The longest name first: "sparf-sketch" is no SparF of an amount "sketch".
        family = next((name for name in sorted(FAMILIES, key=len, reverse=True) if part.startswith(name)), None)
        rest = part.removeprefix(family or "")
        try:
            if family is None or (rest and (rest[0] != "-" or family == "exact")):
                raise ValueError
            amounts = [rest[1:]] if rest else FAMILIES[family][1] or ["1"]
            for amount in map(Fraction, amounts):
                if not 0 < amount <= 1 or (family.startswith("adaptive") and amount == 1):
                    raise ValueError
                methods[Method(family, amount)] = None
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"a method must be one of {', '.join(FAMILIES)}, with an amount if you like (page-1/8, adaptive-0.99), "
                f"got {part!r}"
            ) from None
    if not methods:
        raise ValueError(f"wanted at least one method of {', '.join(FAMILIES)}")
    return sorted(methods, key=lambda method: list(FAMILIES).index(method.family))


@dataclass(frozen=True)
class Plan:
    """Which questions are put to which model, checked before any of it is loaded."""

    model: Path  # directory of a checkpoint
    file: Path | None  # None: the bundled task
    contexts: list[int] | None  # tokens; None: as long as the file has them
    questions: int | None  # of each task
    last: int  # tokens of a text that are predicted
    seed: int

    @staticmethod
    def make(
        model: Path | None,
        file: Path | None,
        contexts: str | None,
        questions: int | None,
        last: int | None,
        seed: int,
        *,
        quick: bool,
    ) -> Plan:
        if model is None and file is not None:
            raise ValueError("--tasks wants --model DIR as well: the bundled model has learned the bundled task only")
        if file is not None and not file.is_file():
            raise ValueError(f"--tasks {file}: no such file")
        if file is None and last is not None:
            raise ValueError("--last goes with --tasks FILE, and a text in it")
        if file is not None and tasks.is_jsonl(file) and (contexts or last) is not None:
            raise ValueError("--context and --last go with a text; the contexts of JSON lines are as long as they are")
        if file is None and contexts is None:
            contexts = "1k" if quick else "4k,16k,64k"
        chosen = None if contexts is None else parse_counts(contexts)
        return Plan(
            model or BUNDLED, file, chosen, questions or (4 if quick else None), last or (8 if quick else 64), seed
        )

    def tasks(self, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
        """Raises ValueError for a file that is not as it should be."""
        if self.file is None:
            asked = [self.questions or (60 if tokens > tasks.LONG else 100) for tokens in self.contexts]
            return [
                tasks.bundled(tokenizer, tokens, count, self.seed)
                for tokens, count in zip(self.contexts, asked, strict=True)
            ]
        if tasks.is_jsonl(self.file):
            return [tasks.from_jsonl(self.file, tokenizer, self.questions or 100)]
        return tasks.from_text(self.file, tokenizer, self.contexts, self.last)


def load(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint, in dtype, so that it can use all caches here. Raises ValueError with one line if it cannot."""
    if not path.is_dir():
        raise ValueError(f"--model {path}: no such directory; wanted a Hugging Face checkpoint")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"cannot load the model {path}: {one_line(error)}") from None
    dense.use(model)
    return model, tokenizer


# ---- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one method did on one task."""

    right: int = 0
    questions: int = 0
    kl: list[float] = field(default_factory=list)  # nats, by position
    loss: list[float] = field(default_factory=list)  # nats of the token that came, by position
    step_s: list[float] = field(default_factory=list)
    drive_bytes: int = 0
    memory_bytes: int = 0
    missing_mass: float = 0.0  # of the softmax, summed over sparse_attends
    sparse_attends: int = 0
    settings: str = ""

    def add(self, log_probs: Tensor, reference: Tensor, answer: list[int], step_s: list[float]) -> None:
        """Both [answer's tokens, vocabulary]."""
        wanted = torch.tensor(answer)
        self.right += int((log_probs.argmax(-1) == wanted).all())
        self.questions += 1
        # A token that the model rules out altogether (-inf) has no part in the sum.
        terms = reference.exp() * (reference - log_probs)
        self.kl += terms.where(reference > -torch.inf, 0.0).sum(-1).clamp_min(0.0).tolist()
        self.loss += (-log_probs[torch.arange(len(answer)), wanted]).tolist()
        self.step_s += step_s

    def add_stats(self, before: dict, after: dict) -> None:
        self.drive_bytes += after["drive_read_bytes"] - before["drive_read_bytes"]
        self.memory_bytes += after["resident_read_bytes"] - before["resident_read_bytes"]
        for stats, sign in ((after, 1), (before, -1)):
            attends = stats.get("sparse_attends", 0)
            self.sparse_attends += sign * attends
            self.missing_mass += sign * attends * stats.get("missing_mass_mean", 0.0)

    @property
    def steps(self) -> int:
        return len(self.step_s)


def run(settings: Settings, report: Report, model: PreTrainedModel, made: list[Task], methods: list[Method]) -> None:
    """Raises ValueError if there is no room for the sizes."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for task in made:
        if positions is not None and task.longest > positions:
            report.skip(task.name, f"{task.longest} tokens, and the model was made for {positions}")
            continue
        with torch.inference_mode():
            task_rows(settings, report, model, task, methods)


def task_rows(settings: Settings, report: Report, model: PreTrainedModel, task: Task, methods: list[Method]) -> None:
    # In this order the rows are printed: for each type the methods, then those that keep tokens in memory.
    tallies: dict[tuple[torch.dtype | None, Method], Tally | str] = {}
    for dtype in settings.stored:
        tallies |= {(dtype, method): Tally() for method in methods if method.policy is None}
    tallies |= {(None, method): Tally() for method in methods if method.policy is not None}
    reference = Tally()
    for index, context in enumerate(task.contexts):
        start_s = time.perf_counter()
        with ExitStack() as stack:
            past = prefill(settings, model, context)
            prefill_s = time.perf_counter() - start_s
            caches = {}
            for dtype in settings.stored:
                try:
                    caches[dtype] = stack.enter_context(stored(settings, model, past, dtype))
                except CANNOT as error:
                    give_up(tallies, dtype, error)
            measure(model, context, past, caches, reference, tallies)
        questions_s = time.perf_counter() - start_s - prefill_s
        report.say(
            f"{task.name}, context {index + 1} of {len(task.contexts)}: {len(context.tokens)} tokens in "
            f"{prefill_s:.0f} s, {len(context.questions)} questions in {questions_s:.0f} s"
        )
    report.add(row(settings, task, None, None, reference, reference))
    for (dtype, method), tally in tallies.items():
        if isinstance(tally, str):
            report.skip(row_name(settings, task, dtype, method), tally)
        else:
            report.add(row(settings, task, dtype, method, tally, reference))


def prefill(settings: Settings, model: PreTrainedModel, context: Context) -> dense.ExactCache:
    """The context's K and V in memory, and how much attention each token received. Raises ValueError without room."""
    past = dense.ExactCache(model.config, context.longest)
    for begin in range(0, len(context.tokens), PREFILL_PIECE):
        feed(model, past, context.tokens[begin : begin + PREFILL_PIECE])
        if begin == 0:
            if not past.layers[0].received.any():
                raise ValueError(f"accuracy: {type(model).__name__} attends to other keys than its cache hands out")
            kv_bytes = past.token_bytes() * context.longest
            settings.require(drive_bytes=len(settings.stored) * kv_bytes, memory_bytes=kv_bytes + 2**29)
    return past


def stored(settings: Settings, model: PreTrainedModel, past: dense.ExactCache, dtype: torch.dtype) -> StorageCache:
    """The same K and V on the drive, as dtype."""
    cache = StorageCache(
        model.config,
        settings.directory,
        kv_dtype=dtype,
        **settings.drive_options(settings.memory_budget, resident=False),
    )
    try:
        for begin in range(0, past.get_seq_length(), FILL_PIECE):
            for index, layer in enumerate(past.layers):
                piece = slice(begin, begin + FILL_PIECE)
                cache.update(layer.keys[:, :, piece], layer.values[:, :, piece], index)
        cache.store.flush()
    except BaseException:
        cache.close()
        raise
    return cache


def measure(
    model: PreTrainedModel,
    context: Context,
    past: dense.ExactCache,
    caches: dict[torch.dtype, StorageCache],
    reference: Tally,
    tallies: dict[tuple[torch.dtype | None, Method], Tally | str],
) -> None:
    """Adds this context's questions to reference and tallies; what cannot be done becomes its reason there.

    A question at a time, all methods in turn: what drifts, drifts for all.
    """
    length, state = past.get_seq_length(), past.state()
    head_dim = past.layers[0].keys.shape[3]
    for question in context.questions:
        tokens = length + len(question.prompt)  # that the first step attends to
        feed(model, past, question.prompt[:-1])
        for dtype, cache in list(caches.items()):
            try:
                feed(model, cache, question.prompt[:-1])
            except CANNOT as error:
                give_up(tallies, dtype, error)
                del caches[dtype]
        asked = past.state()
        expected, step_s = decode(model, past, question)
        reference.add(expected, expected, question.answer, step_s)
        reference.memory_bytes += len(step_s) * tokens * past.token_bytes()
        past.restore(asked)
        for (dtype, method), tally in tallies.items():
            if isinstance(tally, str):
                continue
            if method.policy is not None:
                budget = max(1, round(tokens * method.amount))
                log_probs, step_s = decode(model, past.evicting(method.policy, budget), question)
                tally.memory_bytes += len(step_s) * budget * past.token_bytes()
                tally.settings = f"{budget} tokens"
            else:
                cache = caches[dtype]
                try:
                    tally.settings = set_sparse(cache, method.sparse(head_dim, tokens))
                    # What has to be kept in memory for this method is made now, and what was read ahead for another one
                    # is gone: neither is counted.
                    feed(model, cache, question.prompt[-1:])
                    rewind(cache, tokens - 1)
                    before = cache.stats()
                    log_probs, step_s = decode(model, cache, question)
                except CANNOT as error:
                    tallies[dtype, method] = one_line(error)
                    continue
                finally:
                    rewind(cache, tokens - 1)
                    set_sparse(cache, None)
                after = cache.stats()
                tally.add_stats(before, after)
            tally.add(log_probs, expected, question.answer, step_s)
        past.restore(state)
        for cache in caches.values():
            rewind(cache, length)


def give_up(tallies: dict[tuple[torch.dtype | None, Method], Tally | str], dtype: torch.dtype, why: Exception) -> None:
    """On all methods of a type."""
    for key in tallies:
        if key[0] == dtype:
            tallies[key] = one_line(why)


def set_sparse(cache: StorageCache, sparse: Sparse | None) -> str:
    cache.sparse = sparse
    return "" if sparse is None else str(sparse)


def feed(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> None:
    if tokens:
        model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)


def decode(model: PreTrainedModel, cache: Cache, question: Question) -> tuple[Tensor, list[float]]:
    """Log-probabilities [answer's tokens, vocabulary] of what follows the question, and the seconds of each step."""
    log_probs, step_s = [], []
    for token in (question.prompt[-1], *question.answer[:-1]):
        start_s = time.perf_counter()
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits
        step_s.append(time.perf_counter() - start_s)
        log_probs.append(logits[0, -1].double().log_softmax(-1))
    return torch.stack(log_probs), step_s


def rewind(cache: StorageCache, length: int) -> None:
    """Forgets the tokens from `length` on, also where a forward that failed has left some layers longer."""
    for layer in cache.layers:
        if layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


# ---- rows ------------------------------------------------------------------------------------------------------


def row_name(settings: Settings, task: Task, dtype: torch.dtype | None, method: Method | None) -> str:
    if method is None:
        return f"  peer: {task.name}, torch in float32 over {dtype_name(settings.base)} in memory"
    return f"{task.name}, {dtype_name(settings.base if dtype is None else dtype)}, {method.label}"


def row(
    settings: Settings,
    task: Task,
    dtype: torch.dtype | None,
    method: Method | None,
    tally: Tally,
    reference: Tally,
) -> Row:
    """One line: recall (without answers: perplexity), KL, bytes a token and their share of exact attention's, speed."""
    recall = tally.right / tally.questions if task.answered else None
    perplexity = math.exp(min(sum(tally.loss) / len(tally.loss), 700.0))
    kl = sum(tally.kl) / len(tally.kl)
    drive, memory = tally.drive_bytes / tally.steps, tally.memory_bytes / tally.steps
    share = (drive + memory) * reference.steps / reference.memory_bytes
    speed = 1 / median(tally.step_s)
    read = [f"{format_bytes(round(drive))} drive"] * (drive > 0) + [f"{format_bytes(round(memory))} memory"]
    asked = f"of {tally.questions}, " if task.answered else ""
    more = f"{asked}KL {small(kl)}, {share:.3f} of the bytes ({' + '.join(read)}), {number(speed)} tok/s"
    return Row(
        row_name(settings, task, dtype, method),
        perplexity if recall is None else 100 * recall,
        "ppl" if recall is None else "%",
        more=more,
        figures={
            "task": task.name,
            "context_tokens": max(len(context.tokens) for context in task.contexts),
            "kv_dtype": dtype_name(settings.base if dtype is None else dtype),
            "in_memory": dtype is None,
            "method": "reference" if method is None else method.name,
            "family": "reference" if method is None else method.family,
            "settings": tally.settings,
            "questions": tally.questions,
            "positions": tally.steps,
            "recall": recall,
            "kl": kl,
            "perplexity": perplexity,
            "drive_bytes_per_token": drive,
            "memory_bytes_per_token": memory,
            "share_of_exact_bytes": share,
            "missing_mass": tally.missing_mass / tally.sparse_attends if tally.sparse_attends else None,
            "tokens_per_s": speed,
        },
    )


def small(value: float) -> str:
    """Two figures that matter: 0.0012, 3.4e-07."""
    return f"{value:.2g}"
