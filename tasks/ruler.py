"""tasks/ruler.py - needles, chains and counts in long contexts, by the public rules of RULER.

In: a random.Random, a length in tokens, and a function that counts the tokens of a text. Out: a
`Document`, one question about one context. "needle_prose" at 1,024 tokens:

    context    A special magic number is hidden within the following text. Make sure to memorize it.
               I will quiz you about the number afterwards.
               The objects do not need to have the same type. [...] One of the special magic numbers
               for gentle-harbor is: 7201946. [...] Equality comparison should be reflexive.
    question   What is the special magic number for gentle-harbor mentioned in the provided text?
               The special magic number for gentle-harbor is:
    answer     7201946

Needles, templates and counts are RULER's (arXiv 2404.06654), keys and prose are not, contexts are
short, and two tasks come without their worked example. So call them "RULER-style": no number of
theirs is RULER's. "copy" is added: an answer long enough to outlive a choice of tokens.

Why it is hard for a cache that drops tokens. Seven digits or a UUID have no pattern: one that is
missing cannot be made up. Nobody knows before the question which needle counts. A chain leads
through names that the question never mentions. To count words takes the whole context.

    python -m tasks.ruler [LENGTH]     shows a document of every task, shortened
"""

import json
import random
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from string import ascii_lowercase, ascii_uppercase
from uuid import UUID

from common.errors import UsageError
from loading import tokenizer
from loading.fetch import resolve
from tasks.corpus import hold_out
from tasks.document import Document

PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))["ruler"]


@cache
def held_out_sentences() -> tuple[str, ...]:
    """Sentences of Python's language reference, of the topics that nobody trains on.

    Without markup, examples and grammar, and without the few sentences that a topic which is
    trained on repeats.
    """
    trained, held = hold_out(topics)
    trained = " ".join(" ".join(trained).split())
    paragraphs = [" ".join(p.split()) for t in held for p in t.split("\n\n")]
    parts = [s for p in paragraphs for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", p)]
    prose = (s for s in parts if re.fullmatch(r"[A-Z]\w*,?( \S+){4,34}\.", s)
             and not re.search(r"\*{3}|={3}|-{3}|::=|>>>", s))
    return tuple(dict.fromkeys(s for s in prose if s not in trained))


@cache
def vocabulary() -> tuple[str, ...]:
    """A thousand plain words of the language reference, none of which hides in another."""
    text = " ".join(topics.values())
    words = sorted(set(re.findall(r"(?<![\w.])[a-z]{5,8}(?![\w.(])", text)))
    together = " ".join(words)
    return tuple(word for word in words if together.count(word) == 1)


def fit(length: int, count, prompt: list[str], body: Callable[[int], str], answers: list[str],
        evidence: list[str], scoring="all", new_tokens=0) -> Document:
    """The document whose prompt is a start and a question: context `start + body(n)`, for an n that
    fills the length: 98 % or all but one unit of what the answer leaves for context and question.
    The pieces of `evidence` are its spans.

    Aims at 99 % with the mean cost of a unit so far: three or four counts of the whole text do.
    Raises UsageError when even body(0) is too long.
    """
    answer = new_tokens or count(" " + answers[0])
    (start, question), text, room = prompt, body(0), length - answer
    bare = count(start + text + question)
    if bare > room:
        raise UsageError(f"{length} tokens are too few: this task needs {bare + answer}")
    low, high, n = 0, length, min(16, length - 1)
    while high - low > 1:
        longer = body(n)
        size = count(start + longer + question)
        if size > room:
            high = n
        else:
            low, text = n, longer
            if size >= 0.98 * room:
                break
        unit = max(0.1, (size - bare) / n)
        n = min(max(low + 1, round(n + (0.99 * room - size) / unit)), high - 1)
    context = start + text
    whole_words = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, evidence))})(?!\w)")
    spans = tuple(found.span() for found in whole_words.finditer(context, len(start)))
    return Document(context, question, tuple(answers), scoring, new_tokens, spans)


def prompts(name: str, **parts: str) -> list[str]:
    """What stands before the text of a document, and the question behind it."""
    return [text.format(**parts) for text in PHRASES["prompts"][name]]


def haystack(rng: random.Random, kind: str, length: int, pieces=(), needles=()):
    """-> body(n): `n` units of noise, of prose or of further `needles`, with the pieces among them,
    in order, at depths drawn by lot. Of units there are more than `length` tokens."""
    depths, units, between = sorted(rng.random() for _ in pieces), needles, "\n"
    if kind == "noise":
        units = [PHRASES["noise"]] * (length // 10 + 1)
    elif kind == "prose":
        sentences, units, between = held_out_sentences(), [], " "
        while len(units) <= length // 5:  # a sentence has at least six tokens
            units += rng.sample(sentences, len(sentences))

    def body(n: int) -> str:
        together = units[:n]
        room = len(together) + 1
        for piece, depth in zip(reversed(pieces), reversed(depths), strict=True):
            together.insert(int(depth * room), piece)
        return between.join(together)

    return body


def secrets(rng: random.Random, kind: str, n: int) -> list[str]:
    """`n` different keys or values: words (4,800 exist), numbers of 7 digits or UUIDs."""
    if kind == "uuid":
        return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]
    if kind == "number":
        return [str(number) for number in rng.sample(range(10**6, 10**7), n)]
    pairs = [f"{adjective}-{noun}" for adjective in PHRASES["adjectives"]
             for noun in PHRASES["nouns"]]
    if n > len(pairs):
        raise UsageError(f"{n} needles are too many: there are {len(pairs)} keys")
    return rng.sample(pairs, n)


def niah(rng: random.Random, length: int, count, hay="prose", value="number", key="word",
         needles=1, values=1, asked=1) -> Document:
    """Needles in a haystack of noise, of prose or of further needles; RULER's niah_*.

    `needles` keys with `values` values each; the question is about `asked` of the keys. The cue
    before a single answer ends in "is:", as the needle does, where RULER's says "mentioned in the
    provided text is": after that the default model, 135M parameters, copied none of four UUIDs.
    """
    n = length // 20 + 1 if hay == "needles" else needles  # a needle has more than 20 tokens
    names, hidden = secrets(rng, key, n), secrets(rng, value, n * values)
    told = [f"One of the special magic {value}s for {names[i // values]} is: {hidden[i]}."
            for i in range(n * values)]
    pieces, right = told[: needles * values], asked * values
    rng.shuffle(pieces)
    body = haystack(rng, hay, length, pieces, told[1:])
    query, many = ", and ".join(", ".join(names[:asked]).rsplit(", ", 1)), right > 1
    prompt = prompts("needles" if many else "needle", value=value, query=query)
    return fit(length, count, prompt, body, hidden[:right], told[:right],
               "all" if many else "exact", 128 * many)


def variable_tracking(rng: random.Random, length: int, count) -> Document:
    """VAR A = 12345, VAR B = VAR A, ..., four hops in order, scattered: who holds the number?"""
    names = {}
    while len(names) < 5:
        names["".join(rng.choices(ascii_uppercase, k=5))] = None
    names, value = list(names), str(rng.randrange(10**4, 10**5))
    held = [value, *(f"VAR {name}" for name in names[:-1])]
    told = [f"VAR {name} = {source}." for name, source in zip(names, held, strict=True)]
    return fit(length, count, prompts("variable_tracking", value=value),
               haystack(rng, "noise", length, told), names, told, new_tokens=30)


def common_words(rng: random.Random, length: int, count) -> Document:
    """A numbered list of words in which ten are far more common than all others; RULER's cwe.

    RULER lists ten words 30 times each and others 3 times. A short list has no room for that: the
    others then come twice or once and the ten keep ten times as many, as long as ten others fit
    in; in the shortest lists the ten come as often as they can, at least 3 times.
    """
    words, seed = rng.sample(vocabulary(), len(vocabulary())), rng.random()

    def body(n: int) -> str:
        n += 40
        rare = max(1, min(3, n // 110))
        often = min(10 * rare, n // 10 - 1)
        rest = n - 10 * often
        others = words[10 : 10 - (-rest // rare)]  # rounded up: the last may come less often
        if len(others) * rare < rest:
            raise UsageError(f"{length} tokens are too many: there are {len(words)} words to list")
        listed = words[:10] * often + (others * rare)[:rest]
        random.Random(seed).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    common = words[:10]
    return fit(length, count, prompts("common_words"), body, common, common, new_tokens=120)


def frequent_words(rng: random.Random, length: int, count) -> Document:
    """Coded words as often as a zeta distribution says: which three are most frequent? RULER's fwe.

    The word of rank k comes n / (k ** 2 * zeta(2)) times, rounded down. The first in rank is the
    noise "...", which is to be ignored.
    """
    words = ("".join(rng.choices(ascii_lowercase, k=6)) for _ in range(2000))
    coded, seed = list(dict.fromkeys(["...", *words])), rng.random()
    zeta = sum(k**-2 for k in range(1, 10**5))

    def body(n: int) -> str:
        n += 100  # fewer could leave the third and the fourth coded word equally frequent
        told = [word for k, word in enumerate(coded, 1) for _ in range(int(n / k**2 / zeta))]
        random.Random(seed).shuffle(told)
        return " ".join(told)

    most = coded[1:4]
    return fit(length, count, prompts("frequent_words"), body, most, most, new_tokens=50)


def copy(rng: random.Random, length: int, count) -> Document:
    """A passage of about 160 tokens, prose, then the passage again but for its first three words.

    No adjective or noun comes twice, so only copying gets them right. "The", commas and the like
    can be guessed: without the passage nearly half of the tokens are right, and with it nearly all.
    Plain lists of words leave nothing to guess, but the default model loses its place in them.
    """
    adjectives, nouns = (rng.sample(PHRASES[kind], 60) for kind in ("adjectives", "nouns"))
    things, told = [f"the {a} {n}" for a, n in zip(adjectives, nouns, strict=True)], []
    while count(" ".join(told)) < 160 and things:
        told.append(f"T{things.pop()[1:]}, {things.pop()} and {things.pop()}.")
    passage = " ".join(told)
    *first, rest = passage.split(" ", 3)
    prose = haystack(rng, "prose", length)
    return fit(length, count, prompts("copy", first=" ".join(first)),
               lambda n: f"{passage}\n\n{prose(n)}", [rest], [passage], "token")


TASKS = {  # name -> function of a random.Random, the length and the counter of tokens
    "needle_noise": partial(niah, hay="noise"),
    "needle_prose": niah,
    "needle_uuid": partial(niah, value="uuid"),
    "multikey": partial(niah, needles=4),
    "multikey_needles": partial(niah, hay="needles"),
    "multikey_uuid": partial(niah, hay="needles", value="uuid", key="uuid"),
    "multivalue": partial(niah, values=4),
    "multiquery": partial(niah, needles=4, asked=4),
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "copy": copy,
}


if __name__ == "__main__":
    tok = tokenizer.load(resolve())
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    for name, task in TASKS.items():
        d = task(random.Random(0), length, tok.count)
        print(f"--- {name}: scored by {d.scoring}, {len(d.spans)} spans\n{d.context[:300]}\n[...]\n"
              f"{d.context[-150:]}{d.question}\n=> {' | '.join(d.answers)[:200]}\n")
