"""Sparse attention: which stored tokens a decode step reads. Settings only; the executor chooses and computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch_csd.config import as_int

# Calls with more queries than this are exact: each query wants other tokens, so together they want most of them.
QUERIES_MAX = 16


@dataclass(frozen=True)
class PageTopK:
    """Exact attention over the pages (64 tokens) whose bound of the score is highest.

    A page's bound is the largest score that any key within its per-channel bounds could have (Quest, 2406.10774,
    section 3.2). The bounds are kept in memory in 4 bits, at most 2 % of the cache: of groups of 16 tokens where it is
    not quantised, of 32 for int8, of 64 for int4. One choice per kv head, over all its queries: a page counts by the
    query that it matters most to. Formulas: :func:`torch_csd.reference.page_top_k`, by a sketch
    :func:`torch_csd.reference.page_sketch`.

    Args:
        fraction: of the row's pages that are attended to, in (0, 1]; rounded up to whole pages.
        tokens: the same as a number of tokens; rounded up to whole pages. Either this or ``fraction``.
        local: newest tokens that are always attended to, in whole pages. They and ``sink`` count.
        sink: first tokens that are always attended to, in whole pages.
        heads_per_choice: kv heads that choose together. Their tiles lie side by side, so that one read brings them all:
            fewer and larger reads for less choice.
        by: ``"bounds"``, or ``"sketch"``: pages are weighed by a 4-bit copy of K in memory, a seventh of a bfloat16
            cache; what they weigh is then known within a few per cent.
        mean_value: with a sketch, a page that is left out counts with its weight and the mean of its V, and pages are
            chosen by the weight that would go to wrong tokens so: those that a query sees evenly need not be read.

    Raises:
        ValueError: a setting is out of range. TypeError: it is not a number, or not True or False.
    """

    fraction: float | None = None
    tokens: int | None = None
    local: int = 64
    sink: int = 64
    heads_per_choice: int = 1
    by: str = "bounds"
    mean_value: bool = True

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.tokens is None):
            raise ValueError("PageTopK wants either fraction= or tokens=")
        if self.fraction is not None and not 0.0 < _number(self.fraction, "PageTopK: fraction") <= 1.0:
            raise ValueError(f"PageTopK: fraction must be in (0, 1], got {self.fraction!r}")
        if self.tokens is not None:
            as_int(self.tokens, "PageTopK: tokens", low=1)
        _check_common(self)


@dataclass(frozen=True)
class Adaptive:
    """Exact attention over pages in the order of their bounds, until what is left out is below ``1 - mass``.

    A knob in terms of error: heads that look at a few tokens read a few pages, others more. The pages are ordered as
    :class:`PageTopK` orders them and read in batches, each twice as large as the one before. After each the mass of
    what is unread is estimated for every query, as unread pages times the mean mass of the worst quarter of the pages
    that were chosen so far; where that is below ``1 - mass`` of the whole for all queries of a kv head, that head is
    done. (Bounds order the pages, so that unread ones should weigh less. It is an estimate: a page whose bound says
    little of it may be missed.)

    With a sketch there is nothing to try: it weighs every page, and what is left out is known within a few per cent
    before anything is read. With ``mean_value`` besides, ``1 - mass`` bounds the distance (in total variation) between
    the softmax and what takes its place: heads that look at everything a little read next to nothing.

    Args:
        mass: of the softmax that is to be attended to, in (0, 1).
        provable: counts an unread page with the most that its bounds allow instead of an estimate. The error is then
            below ``1 - mass`` for certain, and most pages are read.
        by: ``"sketch"``, or ``"bounds"``; default: the latter if ``provable``, else the former.
        local, sink, heads_per_choice, mean_value: as in :class:`PageTopK`.

    Raises:
        ValueError: a setting is out of range. TypeError: it is not a number, or not True or False.
    """

    mass: float = 0.99
    provable: bool = False
    local: int = 64
    sink: int = 64
    heads_per_choice: int = 1
    by: str | None = None
    mean_value: bool = True

    def __post_init__(self) -> None:
        if self.by is None:
            object.__setattr__(self, "by", "bounds" if self.provable else "sketch")
        if not 0.0 < _number(self.mass, "Adaptive: mass") < 1.0:
            raise ValueError(f"Adaptive: mass must be in (0, 1), got {self.mass!r}")
        _check_bool(self.provable, "Adaptive: provable")
        if self.provable and self.by != "bounds":
            raise ValueError('Adaptive: a sketch proves nothing; provable goes with by="bounds"')
        _check_common(self)


@dataclass(frozen=True)
class SparF:
    """InstInfer's flash-aware sparse attention (2409.04992, section IV), after SparQ (2312.04985, algorithm 1).

    Step 1 scores all tokens by the ``channels`` channels of K in which the queries of a kv head are largest; step 2
    attends to the ``tokens`` tokens that score highest and to the ``local`` newest, and gives the mean of all V the
    weight that step 1 saw elsewhere. One choice per kv head. Formulas: :func:`torch_csd.reference.sparf`.

    Args:
        channels: of K, that step 1 reads; head_dim of K at most (more are taken for that).
        tokens: that step 2 attends to, besides the newest.
        local: newest tokens that are always attended to.
        mean_value: the tokens that are left out count with the mean of V; else they do not count at all.
        step1: ``"channels"``: from the stored channels of K, literally. ``"sketch"``: from a 4-bit copy of K in memory,
            a seventh of a bfloat16 cache; all channels count then.

    Where a padding mask hides a part of a page, the mean is over the whole page. Step 1 takes 4 bytes for each token
    and query of a kv head meanwhile, whatever ``memory_budget``; what it reads of unquantised channels is compared with
    no checksum.

    Raises:
        ValueError: a setting is out of range. TypeError: it is not a number, or not True or False.
    """

    channels: int
    tokens: int
    local: int = 64
    mean_value: bool = True
    step1: str = "channels"

    def __post_init__(self) -> None:
        as_int(self.channels, "SparF: channels", low=1)
        as_int(self.tokens, "SparF: tokens", low=1)
        as_int(self.local, "SparF: local", low=0)
        _check_bool(self.mean_value, "SparF: mean_value")
        if self.step1 not in ("channels", "sketch"):
            raise ValueError(f'SparF: step1 must be "channels" or "sketch", got {self.step1!r}')


Sparse = SparF | PageTopK | Adaptive

# What a layer keeps in memory for it, as csrc/store/summary.h counts: sums of V, bounds of K, a sketch of K.
SUMMARY_VALUES, SUMMARY_BOUNDS, SUMMARY_SKETCH = 0, 1, 2


class SparseArguments(NamedTuple):
    """Settings as the native op takes them; those that a kind does not have are 0."""

    kind: int
    fraction: float
    tokens: int
    local: int
    sink: int
    heads_per_choice: int
    mass: float
    provable: bool
    channels: int
    mean_value: bool
    sketch: bool


def check_sparse(sparse: object) -> Sparse | None:
    """``sparse``, if it is one of these settings or None.

    Raises:
        TypeError: it is something else.
    """
    if sparse is not None and not isinstance(sparse, Sparse):
        raise TypeError(f"sparse must be SparF(...), PageTopK(...), Adaptive(...) or None (exact), got {sparse!r}")
    return sparse


def parse_sparse(text: str) -> Sparse:
    """What is meant by ``"page:1/16"``, ``"page:4096"`` (tokens), ``"adaptive:0.99"``, ``"sparf:32,128"`` (channels,
    tokens); ``page-sketch:`` and ``sparf-sketch:128`` (tokens) choose by a sketch, as ``adaptive:`` does.

    Raises:
        ValueError: it is none of these.
    """
    kind, _, rest = text.partition(":")
    sketch = kind.endswith("-sketch")
    try:
        match kind.removesuffix("-sketch"):
            case "page" if "." in rest or "/" in rest:
                above, _, below = rest.partition("/")
                return PageTopK(fraction=float(above) / float(below or 1), by="sketch" if sketch else "bounds")
            case "page":
                return PageTopK(tokens=int(rest), by="sketch" if sketch else "bounds")
            case "adaptive" if not sketch:
                return Adaptive(mass=float(rest))
            case "sparf" if sketch:
                return SparF(channels=1, tokens=int(rest), step1="sketch")
            case "sparf":
                channels, tokens = map(int, rest.split(","))
                return SparF(channels=channels, tokens=tokens)
    except ZeroDivisionError:
        pass
    except ValueError as error:
        if "must be" in str(error):
            raise
    raise ValueError(
        "sparse must be page:FRACTION, page:TOKENS, adaptive:MASS, sparf:CHANNELS,TOKENS or sparf-sketch:TOKENS (also "
        f"page-sketch:), such as page:1/16, got {text!r}"
    )


def summary_kinds(sparse: Sparse) -> tuple[int, ...]:
    """Of what a layer has to keep."""
    if isinstance(sparse, SparF):
        return (SUMMARY_VALUES, SUMMARY_SKETCH) if sparse.step1 == "sketch" else (SUMMARY_VALUES,)
    if sparse.by == "bounds":
        return (SUMMARY_BOUNDS,)
    return (SUMMARY_VALUES, SUMMARY_SKETCH) if sparse.mean_value else (SUMMARY_SKETCH,)


def op_arguments(sparse: Sparse) -> SparseArguments:
    match sparse:
        case PageTopK():
            common = (sparse.local, sparse.sink, sparse.heads_per_choice)
            amount = (sparse.fraction or 0.0, sparse.tokens or 0)
            return SparseArguments(0, *amount, *common, 0.0, False, 0, sparse.mean_value, sparse.by == "sketch")
        case Adaptive():
            common = (sparse.local, sparse.sink, sparse.heads_per_choice)
            error = (sparse.mass, sparse.provable)
            return SparseArguments(1, 0.0, 0, *common, *error, 0, sparse.mean_value, sparse.by == "sketch")
        case SparF():
            sketch = sparse.step1 == "sketch"
            choice = (sparse.channels, sparse.mean_value, sketch)
            return SparseArguments(2, 0.0, sparse.tokens, sparse.local, 0, 1, 0.0, False, *choice)


def _check_common(settings: PageTopK | Adaptive) -> None:
    name = type(settings).__name__
    as_int(settings.local, f"{name}: local", low=0)
    as_int(settings.sink, f"{name}: sink", low=0)
    as_int(settings.heads_per_choice, f"{name}: heads_per_choice", low=1)
    if settings.by not in ("bounds", "sketch"):
        raise ValueError(f'{name}: by must be "bounds" or "sketch", got {settings.by!r}')
    _check_bool(settings.mean_value, f"{name}: mean_value")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _check_bool(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
