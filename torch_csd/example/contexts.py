"""Key-value recall in long noise: contexts of any length, and questions whose answer stands in them only.

A context is sentences of everyday words, and records between them:

    the mossy kettle rests under velvet anchor 58 .
    amber lamp = copper bell 17 .
    the quiet baker waits near one amber lamp and brass kettle 31 .

A question is a record cut off after its `=`; the answer is what followed that key in the context:

    ? amber lamp =  ->  copper bell 17 .

Keys and values are drawn anew for each context, and every word of a record is also a word of the noise: keys
appear without a value, values without a key, and each record is a distractor of all others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

ADJECTIVES = tuple(
    """amber ancient autumn blue bold brass brave bright bronze broken calm carved cedar clever cobalt cold copper
    coral crimson crooked curious dark dusty eager early empty faded fine frozen gentle gilded glass golden grand
    green grey happy hollow humble idle indigo iron ivory jade jolly late lazy linen little lonely lucky marble
    mellow merry mighty misty modest mossy narrow nimble noble northern olive opal paper patient pearl plain polished
    proud purple quiet rapid ruby rusty sandy scarlet secret shy silent silver simple sleepy slender smooth southern
    spotted steady stone striped sunny swift tall tender tiny velvet violet wandering warm white wild winter wise
    wooden yellow young""".split()
)
NOUNS = tuple(
    """anchor apple arrow badge baker barn barrel basket beacon bell bench boat book boot bottle bridge broom brush
    bucket button cabin cable camel candle canoe castle cat chair chest clock cloud coat compass cottage crane crate
    crown cup curtain desk dog door dragon drum eagle engine falcon feather fence ferry fiddle field flag flute fork
    fountain fox garden gate glove goat guitar hammer harbour harp hat hawk hedge heron hill horn horse hut island
    jar jewel kettle key kite ladder lake lamp lantern leaf letter lion lock loom map market mast meadow mill mirror
    mountain nail needle nest oak oar orchard otter owl oven parrot path pear pencil piano pigeon pillow pine pipe
    plough pond pony rabbit raft raven river road rope rose saddle sail sailor scarf shell shepherd ship shoe sparrow
    spoon stable stool stove swan table tent tiger tower trumpet tunnel turtle valley wagon wall well whistle willow
    window wolf""".split()
)
NUMBERS = tuple(str(number) for number in range(10, 100))
VERBS = tuple("rests waits stands sleeps turns shines hides leans drifts sings listens returns".split())
PLACES = tuple("under near behind beside above beyond before inside towards against".split())
PAD, UNKNOWN, END, IS, ASK, STOP = "<pad>", "<unk>", "<end>", "=", "?", "."
VOCABULARY = (PAD, UNKNOWN, END, IS, ASK, STOP, "the", "one", "and", *VERBS, *PLACES, *NUMBERS, *ADJECTIVES, *NOUNS)

RECORD_TOKENS = 7  # two of the key, =, three of the value and a full stop
ANSWER_TOKENS = 4
TOKENS_PER_RECORD = 64  # of a context, unless told: 64 records in 4096 tokens, 1024 in 65536


@dataclass(frozen=True)
class Words:
    """What a context draws from. Fewer words bring keys and values that are more alike."""

    adjectives: Sequence[str] = ADJECTIVES
    nouns: Sequence[str] = NOUNS
    numbers: Sequence[str] = NUMBERS


@dataclass(frozen=True)
class Record:
    key: tuple[str, str]
    value: tuple[str, str, str]

    @property
    def words(self) -> list[str]:
        return [*self.key, IS, *self.value, STOP]


@dataclass(frozen=True)
class Question:
    """What to append to a context, and what its tokens must be followed by."""

    text: str  # "? amber lamp ="
    answer: str  # "copper bell 17 ."
    position: int  # of the answer's first token in the context


@dataclass(frozen=True)
class RecallContext:
    text: str  # a sentence or a record a line
    questions: list[Question] = field(repr=False)  # one for each record, in random order


def make_context(tokens: int, seed: int, *, record_count: int | None = None) -> RecallContext:
    """A context of exactly `tokens` tokens, the same for the same arguments on every machine.

    Raises:
        ValueError: the records do not fit into so many tokens, or there are more of them than keys.
    """
    if record_count is None:
        record_count = max(1, tokens // TOKENS_PER_RECORD)
    if not 1 <= record_count <= min(tokens // RECORD_TOKENS, len(ADJECTIVES) * len(NOUNS)):
        raise ValueError(f"record_count must be at least 1 and fit into {tokens} tokens, got {record_count}")
    generator = random.Random(seed)
    words = Words()
    records = draw_records(generator, words, record_count)
    sentences: list[list[str]] = []
    noise_tokens = tokens - record_count * RECORD_TOKENS
    while noise_tokens > 0:
        sentence = noise_sentence(generator, words)
        if len(sentence) > noise_tokens:
            sentence = [*sentence[: noise_tokens - 1], STOP]
        noise_tokens -= len(sentence)
        sentences.append(sentence)
    order: list[Record | list[str]] = [*records, *sentences]
    generator.shuffle(order)

    lines, questions, position = [], [], 0
    for part in order:
        if isinstance(part, Record):
            questions.append(make_question(part, position + len(part.key) + 1))
            part = part.words
        lines.append(" ".join(part))
        position += len(part)
    generator.shuffle(questions)
    return RecallContext("\n".join(lines) + "\n", questions)


def make_question(record: Record, position: int) -> Question:
    return Question(" ".join([ASK, *record.key, IS]), " ".join([*record.value, STOP]), position)


def draw_records(generator: random.Random, words: Words, count: int) -> list[Record]:
    """Records with different keys; their values may share words with any."""
    keys = generator.sample(range(len(words.adjectives) * len(words.nouns)), count)
    return [
        Record(
            (words.adjectives[key // len(words.nouns)], words.nouns[key % len(words.nouns)]),
            (generator.choice(words.adjectives), generator.choice(words.nouns), generator.choice(words.numbers)),
        )
        for key in keys
    ]


def noise_sentence(generator: random.Random, words: Words) -> list[str]:
    """5 to 13 words, in which things are named as in keys and in values."""

    def thing() -> list[str]:
        named = [generator.choice(words.adjectives), generator.choice(words.nouns)]
        if generator.random() < 0.4:
            return [*named, generator.choice(words.numbers)]
        return [generator.choice(("the", "one")), *named]

    sentence = [*thing(), generator.choice(VERBS)]
    if generator.random() < 0.8:
        sentence += [generator.choice(PLACES), *thing()]
        if generator.random() < 0.3:
            sentence += ["and", *thing()]
    return [*sentence, STOP]
