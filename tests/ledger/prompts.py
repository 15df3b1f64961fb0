"""Prompts with an answer: long ledgers, and a name to look up in each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LEDGER_LINES = (5, 14, 30, 9, 50, 20)  # of each prompt; a line is about 90 tokens

_FIRST = "Ada Bram Cora Dirk Edda Finn Gret Hugo Ines Jory Kaia Lars Mira Nils Olga Per Runa Sven Tove Ulf".split()
_LAST = "Ashby Birch Crane Dunmore Esker Foxley Garrow Hale Ivers Jessop Kettle Lomax".split()
_GOODS = "anchors barrels candles drums eels fiddles gloves hooks kettles lamps maps nails oars ropes".split()
_TOWNS = "Arnby Bexhol Corrow Dunwick Elmare Fennor Gulland Hestor Inverly Jorvan Kelso Lerwin".split()


@dataclass(frozen=True)
class Lookup:
    """A prompt that ends in a name, and the rest of that name's line in the ledger."""

    prompt: str
    answer: str


def make_lookups(seed: int = 0, ledger_lines: Sequence[int] = LEDGER_LINES) -> list[Lookup]:
    generator = random.Random(seed)
    return [_make_lookup(line_count, generator) for line_count in ledger_lines]


def _make_lookup(line_count: int, generator: random.Random) -> Lookup:
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    lines = [(name, _make_entry(generator)) for name in generator.sample(names, line_count)]
    # Asked for early in the ledger, so that the answer lies as far back as it can.
    name, answer = lines[line_count // 8]
    ledger = "".join(f"{name}{entry}\n" for name, entry in lines)
    return Lookup(
        f"What the harbour masters wrote down this year:\n\n{ledger}\nLook this up once more:\n{name}", answer
    )


def _make_entry(generator: random.Random) -> str:
    goods, towns = generator.sample(_GOODS, 3), generator.sample(_TOWNS, 3)
    parts = [f"{generator.randrange(100, 1000)} {good} in {town}" for good, town in zip(goods, towns, strict=True)]
    return f" keeps {parts[0]}, {parts[1]} and {parts[2]}."
