"""workshop/ruler.py - needles, chains and counts in long contexts, by the public rules of RULER.

    task, tokenizer, n, seed, length in tokens  --documents-->  [Document]

A document of "needle_prose":

    context    A special magic number is hidden within the following text. Make sure to memorize it.
               I will quiz you about the number afterwards.
               The objects do not need to have the same type. [...] One of the special magic numbers
               for gentle-harbor is: 7201946. [...] Equality comparison should be reflexive.
    question   What is the special magic number for gentle-harbor mentioned in the provided text?
               The special magic number for gentle-harbor is:
    answer     7201946

Why it is hard for a cache that drops tokens: seven digits or a UUID have no pattern, so a missing
one cannot be guessed. Nothing before the question tells which needle counts. A chain of variables
leads through names that the question never mentions. Counting words takes the whole context.

Needles, templates and counts are RULER's (arXiv 2404.06654). Keys and prose are not, contexts are
short, and two tasks come without their worked example, so call the tasks "RULER-style": their
scores are not comparable with RULER's. Additions:

    copy                  an answer that is longer than a selection lasts
    several               four needles, and a question about each behind one reading of the context
    paraphrased           a needle that shares no content word with its question
    question_answering    the same with four needles, of which the question asks for one
    coreference_people,   documents like synth_task.py's, with phrases, names and distractors of
    coreference_ships     their own, on which nothing is trained

    python -m workshop.ruler 1024                        one document of every task, shortened
    python synth_task.py --task needle_prose,multikey --context 2048
"""

import json
import random
import re
import sys
from functools import cache, partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from string import ascii_lowercase, ascii_uppercase
from uuid import UUID

import tokenizer
from cli import UserError
from data import hold_out
from synth_task import Document
from workshop.written import Attended, Copied, Several, Written

PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))


def documents(task: str, tok, n: int, seed: int, length: int) -> list[Document]:
    """n documents of a task, the same for the same seed. length: tokens of BOS, context, question
    and answer together. Raises UserError if the task cannot be made that short or that long."""
    rng = random.Random(f"{task} {seed}")

    def count(text: str) -> int:
        return len(tok.encode(text))

    return [TASKS[task](rng, length - len(tok.bos), count) for _ in range(n)]


# ---------------------------------------------------------------------------- parts of documents


@cache
def held_out_sentences() -> tuple[str, ...]:
    """Sentences of Python's language reference, from topics that no butler is trained on: no
    markup, examples or grammar, and no sentence that a topic of the training text repeats."""
    trained, held = hold_out(topics)
    trained = " ".join(" ".join(trained).split())
    paragraphs = [" ".join(p.split()) for topic in held for p in topic.split("\n\n")]
    parts = [s for p in paragraphs for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", p)]
    prose = [s for s in parts if re.fullmatch(r"[A-Z]\w*,?( \S+){4,34}\.", s)
             and not re.search(r"\*{3}|={3}|-{3}|::=|>>>", s)]
    return tuple(dict.fromkeys(s for s in prose if s not in trained))


@cache
def vocabulary() -> tuple[str, ...]:
    """A thousand plain words of the language reference, none of them part of another."""
    text = " ".join(topics.values())
    words = sorted(set(re.findall(r"(?<![\w.])[a-z]{5,8}(?![\w.(])", text)))
    together = " ".join(words)
    return tuple(word for word in words if together.count(word) == 1)


def prompt(name: str, **parts: str) -> list[str]:
    """What a context starts with, and the question."""
    return [text.format(**parts) for text in PHRASES["prompts"][name]]


def fill(length: int, count, start: str, question: str, body, answer_tokens: int) -> str:
    """The context `start + body(n)`, with n chosen so that context, question and answer have at
    most `length` tokens, and either 98 % of them or one unit of `body` less than possible.

    Counting the tokens of a long text is slow, so this is no plain bisection: each guess uses the
    mean size of a unit so far and aims at 99 %. It takes three or four counts.
    """
    room = length - answer_tokens
    text = body(0)
    bare = count(start + text + question)
    if bare > room:
        raise UserError(f"{length} tokens are too few: this task needs {bare + answer_tokens}")
    low, high = 0, length  # body(low) fits, body(high) does not
    n = min(16, length - 1)
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
    return start + text


def forced(kind, length: int, count, prompt: list[str], body, answer: str) -> Document:
    """A document of this kind whose answer is forced on the model."""
    start, question = prompt
    context = fill(length, count, start, question, body, count(" " + answer))
    return kind(context, question, answer)


def written(length: int, count, prompt: list[str], body, answers: list[str],
            new_tokens: int) -> Written:
    """A document whose answers are all to be written by the model."""
    start, question = prompt
    context = fill(length, count, start, question, body, new_tokens)
    return Written(context, question, answers[0], tuple(answers[1:]), every=True,
                   new_tokens=new_tokens)


def haystack(rng: random.Random, kind: str, length: int, pieces=(), needles=()):
    """-> a function body(n): `n` units of "noise", of "prose" or of the further "needles", with the
    pieces among them, in order, at random depths. There are enough units for `length` tokens."""
    depths = sorted(rng.random() for _ in pieces)
    separator = "\n"
    units = needles
    if kind == "noise":
        units = [PHRASES["noise"]] * (length // 10 + 1)
    elif kind == "prose":
        separator = " "
        units = []
        while len(units) <= length // 5:  # a sentence has at least six tokens
            units += rng.sample(held_out_sentences(), len(held_out_sentences()))

    def body(n: int) -> str:
        together = units[:n]
        room = len(together) + 1
        for piece, depth in zip(reversed(pieces), reversed(depths), strict=True):
            together.insert(int(depth * room), piece)
        return separator.join(together)

    return body


def secrets(rng: random.Random, kind: str, n: int) -> list[str]:
    """n different keys or values: words (4,800 exist), numbers of 7 digits or UUIDs."""
    if kind == "uuid":
        return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(n)]
    if kind == "number":
        return [str(number) for number in rng.sample(range(10**6, 10**7), n)]
    pairs = [f"{adjective}-{noun}" for adjective in PHRASES["adjectives"]
             for noun in PHRASES["nouns"]]
    if n > len(pairs):
        raise UserError(f"{n} needles are too many: there are {len(pairs)} keys")
    return rng.sample(pairs, n)


# ---------------------------------------------------------------------------- tasks


def niah(rng: random.Random, length: int, count, hay="prose", value="number", key="word",
         needles=1, values=1, asked=1) -> Document:
    """Needles in a haystack of noise, of prose or of further needles; RULER's niah_*.

    `needles` keys with `values` values each; the question is about `asked` of the keys. RULER's cue
    before a single answer ends in "mentioned in the provided text is". Here it ends in "is:", as
    the needle does, because the default model with its 135M parameters copies no UUID otherwise.
    """
    n = length // 20 + 1 if hay == "needles" else needles  # a needle has more than 20 tokens
    names = secrets(rng, key, n)
    hidden = secrets(rng, value, n * values)
    told = [f"One of the special magic {value}s for {names[i // values]} is: {hidden[i]}."
            for i in range(n * values)]
    pieces = told[: needles * values]
    rng.shuffle(pieces)
    body = haystack(rng, hay, length, pieces, told[1:])
    query = ", and ".join(", ".join(names[:asked]).rsplit(", ", 1))  # a, b, and c
    wanted = hidden[: asked * values]
    if len(wanted) == 1:
        parts = prompt("needle", value=value, query=query)
        return forced(Document, length, count, parts, body, wanted[0])
    parts = prompt("needles", value=value, query=query)
    return written(length, count, parts, body, wanted, new_tokens=128)


def several(rng: random.Random, length: int, count) -> Several:
    """Four needles in prose, as in "multikey", and a question about each of them: "What is the
    special magic number for gentle-harbor ...?" and so on. The score is the mean."""
    keys = secrets(rng, "word", 4)
    values = secrets(rng, "number", 4)
    told = [f"One of the special magic numbers for {key} is: {value}."
            for key, value in zip(keys, values, strict=True)]
    body = haystack(rng, "prose", length, told)
    parts = [prompt("needle", value="number", query=key) for key in keys]
    longest = max(parts, key=lambda part: count(part[1]))
    context = forced(Document, length, count, longest, body, values[0]).context
    asked = list(zip([question for _, question in parts], values, strict=True))
    rng.shuffle(asked)
    others = tuple(Document(context, question, value) for question, value in asked[1:])
    return Several(context, *asked[0], others)


def paraphrased(rng: random.Random, length: int, count, needles=1) -> Attended:
    """A needle in prose that the question asks for in other words; with more needles the question
    is about one of them.

        context    Names bind objects. [...] Every dawn Horidano rides a bicycle to the bakery and
                   buys two warm rolls. [...] A block is executed.
        question   Question: Who cycles to the bread shop each morning?
                   Answer: The name is
        answer     Horidano

    The default model does not answer, so the score is the attention on the needle: see Attended.
    """
    facts = rng.sample(PHRASES["facts"], needles)
    heads, tails = PHRASES["people"]["names"]
    names = map("".join, zip(rng.sample(heads, needles), rng.sample(tails, needles), strict=True))
    told = [(fact.format(name=name), query, name)
            for (fact, query), name in zip(facts, names, strict=True)]
    body = haystack(rng, "prose", length, [fact for fact, _, _ in told])
    needle, query, name = rng.choice(told)
    return forced(partial(Attended, needle=needle), length, count,
                  prompt("paraphrased", query=query), body, name)


def coreference(rng: random.Random, length: int, count, kind: str) -> Document:
    """A co-reference document about a person or a ship; its introduction comes first.

        context    A judge who never smiles paints portraits of sheep. The person is called
                   Holorvath. A blunt chisel does more harm than good. [...]
        question   Question: Which person was described above as the stern keeper of the law, who
                   draws pictures of woolly animals? The person is called
        answer     Holorvath
    """
    phrases = PHRASES[kind]
    cue = phrases["cue"]
    who, habit = rng.choice(phrases["who"]), rng.choice(phrases["habit"])
    name = "".join(map(rng.choice, phrases["names"]))
    sentences = [f"{head} {tail}." for halves in PHRASES["distractors"].values()
                 for head, tail in product(*halves)]
    rng.shuffle(sentences)
    sentences *= length // len(sentences) + 1  # a sentence has more than one token
    start = f"{who[0]} {habit[0]}. {cue} {name}. "
    query = f"{who[1]}, {habit[1]}"
    parts = [start, f"\n\n{phrases['question'].format(query=query)} {cue}"]
    return forced(Document, length, count, parts, lambda n: " ".join(sentences[:n]), name)


def variable_tracking(rng: random.Random, length: int, count) -> Document:
    """VAR A = 12345, VAR B = VAR A, ...: which variables hold the number? A chain of four hops,
    scattered in order."""
    names = {}
    while len(names) < 5:
        names["".join(rng.choices(ascii_uppercase, k=5))] = None
    names = list(names)
    value = str(rng.randrange(10**4, 10**5))
    held = [value, *(f"VAR {name}" for name in names[:-1])]
    told = [f"VAR {name} = {source}." for name, source in zip(names, held, strict=True)]
    body = haystack(rng, "noise", length, told)
    parts = prompt("variable_tracking", value=value)
    return written(length, count, parts, body, names, new_tokens=30)


def common_words(rng: random.Random, length: int, count) -> Document:
    """A numbered list of words, ten of them far more common than the others; RULER's cwe.

    RULER lists ten words 30 times each and the others 3 times. A short list has no room for that:
    then the others come twice or once, and the ten 10 times as often, as long as ten others fit in.
    In the shortest lists the ten come as often as they can, at least 3 times.
    """
    words = rng.sample(vocabulary(), len(vocabulary()))
    seed = rng.random()

    def body(n: int) -> str:
        n += 40
        rare = max(1, min(3, n // 110))
        often = min(10 * rare, n // 10 - 1)
        rest = n - 10 * often
        others = words[10 : 10 - (-rest // rare)]  # rounded up: the last may come less often
        if len(others) * rare < rest:
            raise UserError(f"{length} tokens are too many: there are {len(words)} words to list")
        listed = words[:10] * often + (others * rare)[:rest]
        random.Random(seed).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

    return written(length, count, prompt("common_words"), body, words[:10], new_tokens=120)


def frequent_words(rng: random.Random, length: int, count) -> Document:
    """Coded words with zeta-distributed frequencies: which three are most frequent? RULER's fwe.

    The word of rank k comes n / (k ** 2 * zeta(2)) times, rounded down. The first in rank is the
    noise "...", which is to be ignored.
    """
    words = ("".join(rng.choices(ascii_lowercase, k=6)) for _ in range(2000))
    coded = list(dict.fromkeys(["...", *words]))
    seed = rng.random()
    zeta = sum(k**-2 for k in range(1, 10**5))

    def body(n: int) -> str:
        n += 100  # with fewer the third and the fourth coded word may come equally often
        told = [word for k, word in enumerate(coded, 1) for _ in range(int(n / k**2 / zeta))]
        random.Random(seed).shuffle(told)
        return " ".join(told)

    return written(length, count, prompt("frequent_words"), body, coded[1:4], new_tokens=50)


def copy(rng: random.Random, length: int, count) -> Document:
    """A passage of about 160 tokens, prose, then the passage again but for its first three words.

    No adjective or noun comes twice, so only copying gets them right. Words such as "the" can be
    guessed: nearly half of the tokens are right without the passage, and nearly all with it.
    """
    adjectives, nouns = (rng.sample(PHRASES[kind], 60) for kind in ("adjectives", "nouns"))
    things = [f"the {a} {n}" for a, n in zip(adjectives, nouns, strict=True)]
    told = []
    while count(" ".join(told)) < 160 and things:
        told.append(f"T{things.pop()[1:]}, {things.pop()} and {things.pop()}.")
    passage = " ".join(told)
    *first, rest = passage.split(" ", 3)
    prose = haystack(rng, "prose", length)
    return forced(Copied, length, count, prompt("copy", first=" ".join(first)),
                  lambda n: f"{passage}\n\n{prose(n)}", rest)


TASKS = {  # name -> function(random.Random, length in tokens, function that counts tokens)
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
    "several": several,
    "paraphrased": paraphrased,
    "question_answering": partial(paraphrased, needles=4),
    "coreference_people": partial(coreference, kind="people"),
    "coreference_ships": partial(coreference, kind="ships"),
}


if __name__ == "__main__":
    tok = tokenizer.load(tokenizer.resolve())
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    for name in TASKS:
        [d] = documents(name, tok, 1, 0, length)
        print(f"--- {name}: {type(d).__name__}\n{d.context[:300]}\n[...]\n"
              f"{d.context[-150:]}{d.question}\n=> {d.answer[:200]}\n")
