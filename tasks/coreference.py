"""tasks/coreference.py - documents whose answer hides in the context: the paper's own task.

In: a random.Random, a pool of phrases, and a few dials. Out: a `Document`, three pieces of text.

    context    A market town at the meeting of two rivers writes its laws on painted kites. The
               place is called Qorbandel. Some thinkers hold that patience shows what a person
               really loves. [...] Plum cake turns bitter if the fire is too hot. [...] It takes
               only a moment to see that 32 minus 8 leaves 24.
    question   Question: Which place was described above as the trading post where the waters
               join, whose rules fly in the wind? The place is called
    answer     Qorbandel

The shape is the paper's co-reference task (arXiv 2503.07518): an introduction of a place and its
name, philosophy, food, arithmetic, then a question that ties back to the introduction.

Why it is hard for a cache that drops tokens. The name is invented, so it is several tokens that can
only be copied out of the cache. The question says everything in other words: its tokens are not
like the answer's tokens, and nothing between the two resembles either. A method that evicts looks
at the name long before anyone asks for it, sees a few odd syllables that no later sentence attends
to, and throws them out. Whoever keeps the whole cache and chooses late can still find them.

The cue "The place is called" stands before the name both times because the default model has only
135M parameters: without the repeated cue it seldom understands that a name is wanted.

Every pool is made of heads and tails, `"Plum cake" + "tastes best on the second day"`. The tails
are divided between training and test, so a test sentence always says something never trained on.

    python -m tasks.coreference        prints one document, and how far the answer is away
"""

import json
import random
from collections import namedtuple
from itertools import count, cycle, islice
from math import gcd
from pathlib import Path

from common.errors import UsageError
from tasks.document import Document

CUE = "The place is called"
QUESTIONS = (
    "Question: Which place was described above as {}?",
    "Question: Which place was described above as {}?\nAnswer:",
    "Question: Which place does the text describe as {}?")

# {kind: [heads, tails]}. Those of places, where one lies and what it is known for, are pairs: as it
# is introduced, then as the question words it. The tokenizer cuts a name into 3 to 5.
PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))["coreference"]


# What documents of one split are made of, a tuple of texts each, of places a tuple of Places;
# consecutive entries share neither head nor tail.
Pools = namedtuple("Pools", "places names philosophy food arithmetic")
# A place told twice: a full sentence that introduces it, a noun phrase that asks for it.
Place = namedtuple("Place", "introduction tie_back")


def _pairs(heads, tails, split: str) -> list[tuple]:
    """Every head with every tail of the split (60 % of the tails train, 40 % test, order fixed).

    The list runs down the diagonals of the table, and the two sizes are coprime, so it meets every
    cell once and any min(heads, tails) neighbours differ in both halves (Chinese remainders).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    shuffled = random.Random(0).sample(tails, len(tails))
    cut = 3 * len(tails) // 5
    tails = shuffled[:cut] if split == "train" else shuffled[cut:]
    return [(heads[i % len(heads)], tails[i % len(tails)]) for i in range(len(heads) * len(tails))]


def pools(split: str) -> Pools:
    """The phrases of "train" or of "test": no entry of one is in the other. Else ValueError."""
    pairs = {kind: _pairs(*halves, split) for kind, halves in PHRASES.items()}
    places = tuple(Place(f"{setting[0]} {custom[0]}.", f"{setting[1]}, {custom[1]}")
                   for setting, custom in pairs.pop("places"))
    names = tuple(map("".join, pairs.pop("names")))
    return Pools(places, names, **{kind: tuple(f"{head} {tail}." for head, tail in some)
                                   for kind, some in pairs.items()})


def _walk(rng: random.Random, pool):
    """The pool from a random place in random equal strides, round and round without end.

    A stride coprime to the pool's size visits everything before anything comes back, and keeps the
    diagonal order's promise: neighbours in a document do not repeat each other's halves.
    """
    size = len(pool)
    at = rng.randrange(size)
    stride = rng.choice([s for s in range(1, size) if gcd(s, size) == 1])
    for place in count(at, stride):
        yield pool[place % size]


def _words(text: str) -> int:
    return len(text.split())


def _distractors(rng: random.Random, pools: Pools, words: int) -> list[str]:
    """Sentences of about `words` words: philosophy, then food, then arithmetic, equally many."""
    kinds = [(_walk(rng, pool), []) for pool in (pools.philosophy, pools.food, pools.arithmetic)]
    for walk, chosen in cycle(kinds):
        sentence = next(walk)
        # Half a sentence too few is nearer to the target than half a sentence too many.
        if words < _words(sentence) / 2:
            return [s for _, chosen in kinds for s in chosen]
        chosen.append(sentence)
        words -= _words(sentence)


def _interleave(told: list[str], fractions: list[float], distractors: list[str]) -> str:
    """Joins both, each introduction where its fraction of all other words is past."""
    total = sum(map(_words, told + distractors))
    waiting = [(fraction * (total - _words(introduction)), introduction)
               for fraction, introduction in sorted(zip(fractions, told, strict=True))]
    text, past = [], 0
    for sentence in distractors:
        while waiting and past + _words(sentence) / 2 > waiting[0][0]:
            text.append(waiting.pop(0)[1])
            past += _words(text[-1])
        text.append(sentence)
        past += _words(sentence)
    return " ".join(text + [introduction for _, introduction in waiting])


def coreference(rng: random.Random, pools: Pools, referents: int = 1, words: int = 250,
                position: float | None = None) -> Document:
    """One co-reference document with a few dials.

    referents  places introduced, 1 to 8, each with its own name; the question asks for one
    words      length of the context, met to within half a sentence
    position   0 (start) to 1 (end): where in the context the asked introduction stands; None
               spreads all introductions evenly from the start on, and chance picks the asked one

    Raises UsageError for a dial out of range, or when the introductions alone exceed `words`.
    """
    if not 1 <= referents <= 8:
        raise UsageError(f"referents must be 1 to 8, not {referents}")
    if position is not None and not 0 <= position <= 1:
        raise UsageError(f"position must be 0 to 1, not {position}")
    places = list(islice(_walk(rng, pools.places), referents))
    names = list(islice(_walk(rng, pools.names), referents))
    told = [f"{p.introduction} {CUE} {name}." for p, name in zip(places, names, strict=True)]
    room = words - sum(map(_words, told))
    if room < 0:
        raise UsageError(f"{referents} introductions do not fit into {words} words")
    asked = rng.randrange(referents)
    fractions = [i / referents for i in range(referents)]
    if position is not None:
        fractions[asked] = position
    context = _interleave(told, fractions, _distractors(rng, pools, room))
    question = rng.choice(QUESTIONS).format(places[asked].tie_back)
    start = context.index(told[asked])
    return Document(context, f"\n\n{question} {CUE}", (names[asked],),
                    spans=((start, start + len(told[asked])),))


def coreference_documents(split: str, n: int, seed: int, **dials) -> list[Document]:
    """`n` documents of a split, the same for the same seed; `dials` as in `coreference`."""
    rng, phrases = random.Random(seed), pools(split)
    return [coreference(rng, phrases, **dials) for _ in range(n)]


def training_text(rng: random.Random, pools: Pools) -> str:
    """A document as plain text to train on: 1 to 3 places in a context of 120 to 300 words."""
    return coreference(rng, pools, referents=rng.randint(1, 3), words=rng.randint(120, 300)).text


if __name__ == "__main__":
    document = coreference(random.Random(0), pools("test"))
    between = document.context.split(document.answer)[1].split()
    print(f"{document.text}\n{len(between)} words lie between the name and the question; "
          "not one of them is about it")
