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

import random
from dataclasses import dataclass
from itertools import cycle, islice
from math import gcd
from typing import NamedTuple

from tasks.document import Document

CUE = "The place is called"
QUESTIONS = (
    "Question: Which place was described above as {}?",
    "Question: Which place was described above as {}?\nAnswer:",
    "Question: Which place does the text describe as {}?")

# Where a place lies, and what it is known for: as introduced, then as the question words it.
SETTINGS = (
    ("A fishing village on a cold northern bay", "the sailors' settlement by the icy water"),
    ("A mining town high in the red hills", "the community of diggers up among the slopes"),
    ("A small island far from any trade route", "the remote patch of land in the ocean"),
    ("A market town at the meeting of two rivers", "the trading post where the waters join"),
    ("An oasis in the middle of a salt desert", "the green refuge amid the dry wastes"),
    ("A university city behind old stone walls", "the seat of learning within its ramparts"),
    ("A farming valley below a quiet volcano", "the crop land beneath the sleeping mountain"),
    ("A logging camp deep in a pine forest", "the woodcutters' base among the tall trees"),
    ("A monastery above the clouds", "the monks' retreat close to the sky"),
    ("A railway junction on an empty plain", "the stop in flat country for changing trains"),
    ("A border fortress beside a narrow pass", "the stronghold guarding the way between lands"))
CUSTOMS = (
    ("keeps a great clock that runs backwards", "whose timepiece turns the wrong way"),
    ("paints every roof a bright yellow", "where all the housetops look golden"),
    ("lights a thousand lanterns at midwinter", "that glows on the shortest day of the year"),
    ("raises white peacocks in its gardens", "where pale birds are bred for their feathers"),
    ("is ruled by a council of grandmothers", "governed by its old women"),
    ("brews a bitter tea from blue flowers", "known for a sharp drink made of petals"),
    ("holds a race on stilts each spring", "where people compete on long wooden legs"),
    ("hides its treasure under a crooked bridge", "with gold buried beneath a bent crossing"),
    ("forbids whistling after sunset", "where a tune on the lips is a crime at night"),
    ("stores ice in deep cellars all summer", "with frozen water kept underground"),
    ("weaves sails for ships it has never seen", "making canvas for unknown vessels"),
    ("teaches every child to carve flutes", "whose young all make musical instruments"),
    ("rings nine bells before every storm", "that warns of bad weather by chiming"),
    ("is famous for mirrors of polished copper", "celebrated for its shiny reflecting metal"),
    ("pays for everything in green glass beads", "whose money is small coloured balls"),
    ("celebrates the birthday of its oldest tree", "that gives a party for an ancient oak"),
    ("writes its laws on painted kites", "whose rules fly in the wind"),
    ("keeps bees inside the walls of its houses", "where honey is made behind the bricks"),
    ("sends its letters by trained crows", "whose post is carried by black wings"),
    ("mends broken pottery with silver", "that repairs cracked bowls with precious seams"))

# A start and an end make a word that nobody has seen and that the tokenizer cuts into 3 to 5.
NAME_STARTS, NAME_ENDS = map(str.split, (
    "Qor Vel Zam Thul Yel Dru Mib Kav Oru Lun Pel Wex Sab Rin Gol Fen Hax Jor Bri Tav Nul Cae Eph",
    "bandel tamoria dovar luneth mirrow kestia porath saluna govik rendal faroth zimber nathor "
    "bilgar vosteen duramel hespia lorqua tibrane munaveth"))

THINKERS = (
    "Some thinkers hold that patience", "An old argument says that courage",
    "For the early sceptics, doubt", "Many teachers have claimed that honesty",
    "In one tradition, silence", "It is often said that memory",
    "According to the moralists, curiosity", "Seen from a distance, hope",
    "Most schools agree that kindness", "Looked at closely, freedom",
    "A well-known essay claims that solitude")
CLAIMS = (
    "is a habit long before it becomes a virtue", "cannot be taught, although it can be learned",
    "matters most when nobody is there to praise it", "costs little and is still rarely found",
    "asks more of us than any written rule", "begins where certainty comes to an end",
    "is lost as soon as we try to own it", "shows what a person really loves",
    "belongs to the weak as much as to the strong", "looks simple until one has to choose",
    "grows only in those who use it", "cannot be separated from the fear of death",
    "needs reasons but does not begin with them", "teaches us how small our plans are",
    "turns into vanity when it is put on display", "proves nothing and yet changes everything",
    "makes us answerable to people we will never meet", "is neither a gift nor a duty",
    "is worth more than the comfort it takes away", "ties the present to what came before it")
DISHES = (
    "Barley soup", "Fresh flatbread", "A stew of lentils", "Plum cake", "Roasted pumpkin",
    "Soft goat cheese", "Rice with saffron", "Smoked fish", "A pot of beans", "Onion pie",
    "Sweet porridge")
HABITS = (
    "tastes best on the second day", "goes well with a spoonful of sour cream",
    "should be left to rest before it is served", "needs a pinch of salt and plenty of time",
    "is often brought out first when guests arrive", "turns bitter if the fire is too hot",
    "is improved by a little lemon and black pepper", "fills the whole kitchen with its smell",
    "was once a meal for holidays only", "can be made from almost nothing in winter",
    "keeps for three days in a cool pantry", "looks plain but pleases even fussy eaters",
    "is sold from small carts beside the road", "calls for butter, although oil will also do",
    "loses its flavour when it is heated twice", "is what most cooks learn to prepare first",
    "makes a good supper after a long walk", "is sometimes sweetened with a few raisins",
    "is best enjoyed with a glass of cold cider", "has more admirers abroad than at home")
RECKONERS = (
    "A careful clerk will tell you that", "Anyone with an abacus can check that",
    "It takes only a moment to see that", "The pupils wrote on the board that",
    "By simple counting we find that", "On the back of the receipt it says that",
    "As every schoolbook confirms,", "Without a pencil one can work out that",
    "The baker's daughter knows by heart that", "A quick note in the margin shows that",
    "Nobody at the table disputed that")


class Place(NamedTuple):
    """A place told twice: a full sentence that introduces it, a noun phrase that asks for it."""

    introduction: str
    tie_back: str


@dataclass(frozen=True)
class Pools:
    """What documents of one split are made of; consecutive entries share neither head nor tail."""

    places: tuple[Place, ...]
    names: tuple[str, ...]
    philosophy: tuple[str, ...]
    food: tuple[str, ...]
    arithmetic: tuple[str, ...]


def _sums() -> list[str]:
    """Twenty true statements; the steps are coprime to the ranges, so no two of them are alike."""
    sums = []
    for i in range(20):
        a, b = 15 + 17 * i % 80, 3 + 5 * i % 7
        sums.append((f"{a} plus {b} makes {a + b}", f"{a} minus {b} leaves {a - b}",
                     f"{a} times {b} is {a * b}")[i % 3])
    return sums


def _pairs(heads, tails, split: str) -> list[tuple]:
    """Every head with every tail of the split (60 % of the tails train, 40 % test, order fixed).

    The list runs down the diagonals of the table, and the two sizes are coprime, so it meets every
    cell once and any min(heads, tails) neighbours differ in both halves (Chinese remainders).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    shuffled = random.Random(0).sample(list(tails), len(tails))
    cut = 3 * len(tails) // 5
    tails = shuffled[:cut] if split == "train" else shuffled[cut:]
    return [(heads[i % len(heads)], tails[i % len(tails)]) for i in range(len(heads) * len(tails))]


def pools(split: str) -> Pools:
    """The phrases of "train" or of "test": no entry of one is in the other. Else ValueError."""
    return Pools(
        places=tuple(Place(f"{setting[0]} {custom[0]}.", f"{setting[1]}, {custom[1]}")
                     for setting, custom in _pairs(SETTINGS, CUSTOMS, split)),
        names=tuple(a + b for a, b in _pairs(NAME_STARTS, NAME_ENDS, split)),
        philosophy=tuple(f"{a} {b}." for a, b in _pairs(THINKERS, CLAIMS, split)),
        food=tuple(f"{a} {b}." for a, b in _pairs(DISHES, HABITS, split)),
        arithmetic=tuple(f"{a} {b}." for a, b in _pairs(RECKONERS, _sums(), split)))


def _walk(rng: random.Random, pool):
    """The pool from a random place in random equal strides, round and round without end.

    A stride coprime to the pool's size visits everything before anything comes back, and keeps the
    diagonal order's promise: neighbours in a document do not repeat each other's halves.
    """
    size = len(pool)
    at = rng.randrange(size)
    stride = rng.choice([s for s in range(1, size) if gcd(s, size) == 1])
    while True:
        yield pool[at]
        at = (at + stride) % size


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

    Raises ValueError for a dial out of range, or when the introductions alone exceed `words`.
    """
    if not 1 <= referents <= 8:
        raise ValueError(f"referents must be 1 to 8, not {referents}")
    if position is not None and not 0 <= position <= 1:
        raise ValueError(f"position must be 0 to 1, not {position}")
    places = list(islice(_walk(rng, pools.places), referents))
    names = list(islice(_walk(rng, pools.names), referents))
    told = [f"{p.introduction} {CUE} {name}." for p, name in zip(places, names, strict=True)]
    room = words - sum(map(_words, told))
    if room < 0:
        raise ValueError(f"{referents} introductions do not fit into {words} words")
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
