"""synth_task.py - documents whose answer hides in the context: the paper's own task.

    context    A market town at the meeting of two rivers writes its laws on painted kites. The
               place is called Qorbandel. Some thinkers hold that patience shows what a person
               really loves. [...] Plum cake turns bitter if the fire is too hot. [...] It takes
               only a moment to see that 32 minus 8 leaves 24.
    question   Question: Which place was described above as the trading post where the waters
               join, whose rules fly in the wind? The place is called
    answer     Qorbandel

The shape is the co-reference task of the TokenButler paper (arXiv 2503.07518): an introduction of a
place and its name, philosophy, food, arithmetic, then a question that ties back to the place.

Why it is hard for a cache that drops tokens: the name is invented, so it is several tokens that can
only be copied from the context. The question uses other words, so nothing in the text resembles the
name until it is asked for. A method that evicts tokens sees a few odd syllables that no later
sentence attends to, and drops them long before the question. A method that keeps the whole cache
and selects late can still find them.

The cue "The place is called" stands before the name both times, because the default model has only
135M parameters and seldom understands without it that a name is wanted.

Phrases are made of a head and a tail, "Plum cake" + "tastes best on the second day". The tails are
split between training and test, so a test sentence is never one that was trained on.

Protocol "sparse" (default): the context is read densely, or through the selection too with
--prefill sparse; question and answer go through the selection. Protocol "prefill": the question is
read densely too, except for its last token, as in most published tables. An answer is right when
all its tokens are the model's most likely ones.

    python synth_task.py --selectors dense,oracle,butler --budgets 0.1,0.5
    python synth_task.py --task needle_prose --context 2048        tasks of workshop/ruler.py
    python synth_task.py --data questions.jsonl                    see workshop/longbench.py
"""

import json
import random
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, cycle, islice
from math import gcd
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from cli import DEVICE, UserError, flag, known, numbers, one_line, plug_in
from selection import NAMES, Budget, make_selector, prefill

# ---------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Document:
    """One question about one context. context + question + answer reads as one text."""

    context: str
    question: str  # ends in the cue of the answer
    answer: str

    @property
    def asked(self) -> tuple["Document", ...]:
        """All questions about the context; workshop/written.py has documents with several."""
        return (self,)

    def encode(self, tok) -> list[list[int]]:
        """-> ids of context, question and answer: those of the joined text, cut at the borders. A
        part whose first token would reach into the part before is encoded by itself."""
        text, known_ids, parts = "", [], []
        for part in (self.context, self.question, " " + self.answer.strip()):
            text += part
            ids = tok.encode(text)
            joined = ids[: len(known_ids)] == known_ids
            parts.append(ids[len(known_ids) :] if joined else tok.encode(part))
            known_ids = known_ids + parts[-1]
        return [tok.bos + parts[0], *parts[1:]]

    def room(self, answer: list[int]) -> int:
        """How many tokens behind the question the cache must have room for: the answer's last token
        is never read."""
        return len(answer) - 1

    def grade(self, llama, tok, cache, question, answer, selector, stepwise: bool) -> float:
        """The score, 0 to 1, of an answer to the question (ids), behind a cache that holds the
        context. Here the answer is forced upon the model, token by token, and all tokens must be
        the most likely ones. stepwise: see `answers`."""
        return float(all(self.tokens_right(llama, cache, question, answer, selector, stepwise)))

    @staticmethod
    def tokens_right(llama, cache, question, answer, selector, stepwise: bool) -> list[bool]:
        """For each token of the forced answer: is it the most likely one?"""
        forced = torch.tensor([question + answer[:-1]], device=llama.device)
        blocks = forced.split(1 if stepwise else forced.shape[1], dim=1)
        logits = torch.cat([llama(block, cache, selector) for block in blocks], dim=1)
        written = likeliest(logits[0, -len(answer) :]).tolist()
        return [a == b for a, b in zip(written, answer, strict=True)]


def likeliest(logits) -> torch.Tensor:
    """Logits [..., V] -> the most likely ids. Raises UserError for logits that are not finite,
    which damaged weights give: the score would be a wrong 0."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are damaged")
    return logits.argmax(-1)


CUE = "The place is called"
QUESTIONS = (
    "Question: Which place was described above as {}?",
    "Question: Which place was described above as {}?\nAnswer:",
    "Question: Which place does the text describe as {}?")

# {kind: [heads, tails]}. For places both are pairs: the words of the introduction, and the other
# words of the question.
PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))["coreference"]

# The phrases of one split. Neighbours in each list share neither head nor tail.
Pools = namedtuple("Pools", "places names philosophy food arithmetic")
Place = namedtuple("Place", "introduction tie_back")


def pools(split: str) -> Pools:
    """The phrases of "train" or of "test". No entry of one is in the other."""
    pairs = {kind: head_tail_pairs(*halves, split) for kind, halves in PHRASES.items()}
    places = tuple(Place(f"{setting[0]} {custom[0]}.", f"{setting[1]}, {custom[1]}")
                   for setting, custom in pairs.pop("places"))
    names = tuple(map("".join, pairs.pop("names")))
    sentences = {kind: tuple(f"{head} {tail}." for head, tail in some)
                 for kind, some in pairs.items()}
    return Pools(places, names, **sentences)


def head_tail_pairs(heads, tails, split: str) -> list[tuple]:
    """Every head with every tail of the split: 60 % of the tails train, 40 % test.

    The list runs down the diagonals of the table. The numbers of heads and tails are coprime, so
    the diagonal meets every pair once, and neighbours differ in both halves.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    shuffled = random.Random(0).sample(tails, len(tails))
    cut = 3 * len(tails) // 5
    tails = shuffled[:cut] if split == "train" else shuffled[cut:]
    return [(heads[i % len(heads)], tails[i % len(tails)]) for i in range(len(heads) * len(tails))]


def walk(rng: random.Random, pool):
    """Entries of a pool without end: from a random place in random equal strides.

    A stride that is coprime to the pool's size visits every entry before any comes back.
    """
    size = len(pool)
    at = rng.randrange(size)
    stride = rng.choice([s for s in range(1, size) if gcd(s, size) == 1])
    for place in count(at, stride):
        yield pool[place % size]


def num_words(text: str) -> int:
    return len(text.split())


def distractors(rng: random.Random, pools: Pools, words: int) -> list[str]:
    """Sentences of about `words` words: philosophy, then food, then arithmetic, equally many."""
    kinds = [(walk(rng, pool), []) for pool in (pools.philosophy, pools.food, pools.arithmetic)]
    for entries, chosen in cycle(kinds):
        sentence = next(entries)
        if words < num_words(sentence) / 2:  # too few by half a sentence at most
            return [s for _, chosen in kinds for s in chosen]
        chosen.append(sentence)
        words -= num_words(sentence)


def interleave(introductions: list[str], fractions: list[float], sentences: list[str]) -> str:
    """One text. Each introduction stands where its fraction of all other words has passed."""
    total = sum(map(num_words, introductions + sentences))
    waiting = [(fraction * (total - num_words(introduction)), introduction)
               for fraction, introduction in sorted(zip(fractions, introductions, strict=True))]
    text, passed = [], 0
    for sentence in sentences:
        while waiting and passed + num_words(sentence) / 2 > waiting[0][0]:
            text.append(waiting.pop(0)[1])
            passed += num_words(text[-1])
        text.append(sentence)
        passed += num_words(sentence)
    return " ".join(text + [introduction for _, introduction in waiting])


def coreference(rng: random.Random, pools: Pools, referents=1, words=250,
                position: float | None = None) -> Document:
    """One co-reference document.

    referents  places introduced, 1 to 8, each with a name; the question asks for one of them
    words      length of the context, within half a sentence
    position   where the introduction of that place stands, 0 (start) to 1 (end); None spreads all
               introductions evenly from the start on and picks one of them at random

    Raises UserError for a value out of range, or when the introductions alone exceed `words`.
    """
    if not 1 <= referents <= 8:
        raise UserError(f"referents must be 1 to 8, not {referents}")
    if position is not None and not 0 <= position <= 1:
        raise UserError(f"position must be 0 to 1, not {position}")
    places = list(islice(walk(rng, pools.places), referents))
    names = list(islice(walk(rng, pools.names), referents))
    introductions = [f"{place.introduction} {CUE} {name}."
                     for place, name in zip(places, names, strict=True)]
    room = words - sum(map(num_words, introductions))
    if room < 0:
        raise UserError(f"{referents} introductions do not fit into {words} words")
    asked = rng.randrange(referents)
    fractions = [i / referents for i in range(referents)]
    if position is not None:
        fractions[asked] = position
    context = interleave(introductions, fractions, distractors(rng, pools, room))
    question = rng.choice(QUESTIONS).format(places[asked].tie_back)
    return Document(context, f"\n\n{question} {CUE}", names[asked])


def coreference_documents(split: str, n: int, seed: int, **options) -> list[Document]:
    """`n` documents of a split, the same for the same seed; options as in `coreference`."""
    rng, phrases = random.Random(seed), pools(split)
    return [coreference(rng, phrases, **options) for _ in range(n)]


def training_text(rng: random.Random, pools: Pools) -> str:
    """A document as plain text to train on: 1 to 3 places in a context of 120 to 300 words."""
    document = coreference(rng, pools, rng.randint(1, 3), rng.randint(120, 300))
    return f"{document.context}{document.question} {document.answer}"


# ---------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def answers(llama, tok, document, makers, protocol="sparse", stepwise=False,
            prefill_budget=None) -> list[float]:
    """Reads the context once, then asks its question once through each selector -> scores. Of
    several questions each is asked behind the context alone, and the score is their mean.

    makers: functions that return a fresh selector, or None for dense. stepwise: one token per call,
    for selectors that reuse a choice from step to step; otherwise all tokens of a forced answer go
    through in one call, each with its own selection, which gives the same and is faster.
    prefill_budget: see selection.prefill; unless it is None, each selector reads the context.
    Raises UserError if the document exceeds the model's context.
    """
    asked = [(one, *one.encode(tok)) for one in document.asked]
    if protocol == "prefill":
        if len(asked) > 1:
            raise UserError("several questions about one context need --question sparse")
        asked = [(one, context + question[:-1], question[-1:], answer)
                 for one, context, question, answer in asked]
    context = asked[0][1]
    room = max(len(question) + one.room(answer) for one, _, question, answer in asked)
    cache = llama.new_cache(1, len(context) + room)
    # A selector serves one text: each question has its own, and all of them see the context read.
    selectors = [[make() for _ in asked] for make in makers]

    def watch(*seen):
        for selector in chain(*selectors):
            if selector:
                selector.watch(*seen)

    ids = torch.tensor([context], device=llama.device)
    if prefill_budget is None:
        llama.prefill(ids, cache, watch)
    scores = []
    for of_questions in selectors:
        grades = []
        for selector, (one, _, question, answer) in zip(of_questions, asked, strict=True):
            if prefill_budget is None:
                cache.truncate(len(context))
            else:
                cache.truncate(0)
                prefill(llama, ids, cache, selector, prefill_budget)
            grades.append(one.grade(llama, tok, cache, question, answer, selector, stepwise))
        scores.append(sum(grades) / len(grades))
    return scores


def confidence_interval(values: list[float], proportion=False) -> dict:
    """Mean and its 95 % interval: a bootstrap over documents, 2,000 draws.

    proportion: values are scores from 0 to 1. If all are 0, or all are 1, there is nothing to draw
    from, and the interval is what n equal scores cannot exclude (Clopper and Pearson).
    """
    x = torch.tensor(values, dtype=torch.double)
    n = len(x)
    draws = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(0))
    low, high = x[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    bound = 0.025 ** (1 / n)
    if proportion and low == 1:
        low = bound
    if proportion and high == 0:
        high = 1 - bound
    return {"mean": x.mean().item(), "low": low, "high": high, "n": n}


def check_selectors(selectors, budgets) -> None:
    """Refuses unknown selectors and budgets that make no sense, before anything slow starts."""
    for name in selectors:
        known("selector", name, NAMES)
    for total in numbers(budgets, float, "--budgets"):
        Budget(total)


def every_maker(selectors, budgets, butler=None, llama=None, **rules) -> dict:
    """{(selector, budget as text): function that returns a fresh selector}; dense has the budget
    "1.0" alone. butler, llama and rules: see make_selector. Raises UserError."""
    check_selectors(selectors, budgets)
    made = {}
    for name in selectors:
        for budget in ("1.0",) if name == "dense" else budgets:
            own = rules if name == "butler" else {}
            made[name, budget] = partial(make_selector, name, float(budget), butler, llama,
                                         **own)
            made[name, budget]()  # refuses now what would be refused later
    return made


def evaluate(llama, tok, documents, makers: dict, protocol="sparse", stepwise=False,
             title="documents", prefill_budget=None) -> dict:
    """makers: see every_maker -> {selector: {budget: mean and interval}}"""
    scores = [answers(llama, tok, document, makers.values(), protocol, stepwise, prefill_budget)
              for document in tqdm(documents, title, file=sys.stderr)]
    table = {}
    for (name, budget), column in zip(makers, zip(*scores, strict=True), strict=True):
        table.setdefault(name, {})[budget] = confidence_interval(column, proportion=True)
    return table


def print_results(results: dict) -> None:
    """{task: {selector: {budget: mean and interval}}} as lines of text."""
    for task, table in results.items():
        for name, by_budget in table.items():
            for budget, m in by_budget.items():
                print(f"{task:20s} {name:8s} {budget:>6s}  {m['mean']:8.3f}  "
                      f"[{m['low']:.3f}, {m['high']:.3f}]  n = {m['n']}")


def print_bytes(makers: dict, head_dim: int) -> dict:
    """What choosing costs: prints and returns {selector: bytes}; see Selector.bytes_per_token."""
    made = {name: make() for (name, _), make in makers.items()}
    read = {name: s.bytes_per_token(head_dim) for name, s in made.items() if s}
    print("bytes read to choose, per cached token and KV head: "
          + ", ".join(f"{name} {number:g}" for name, number in read.items()))
    return read


# ---------------------------------------------------------------------------- the script


@dataclass
class Config:
    """Answers questions about a context through several selectors at equal budgets."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    butler: str = flag(None, "butler file (default: the shipped one)")
    engine: str = flag("plain", f"what runs the model: {', '.join(cli.ENGINES)}")
    task: tuple = flag(("coreference",), "comma-separated: coreference, or tasks of "
                                         "workshop/ruler.py such as needle_prose")
    data: str = flag(None, "a JSONL file instead of a task: lines with context, question and "
                           "answer, or LongBench's or RULER's")
    selectors: tuple = flag(("dense", "oracle", "butler", "recency", "random"),
                            f"comma-separated, of {', '.join(NAMES)}")
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended")
    question: str = flag("sparse", "how the question is read: sparse or prefill (densely)")
    prefill: str = flag("dense", "how the context is read: dense, or sparse through each selector")
    prefill_budget: float = flag(0.1, "tokens that a block of 64 queries attends to: a fraction "
                                     "of the tokens so far (up to 1) or a count")
    n: int = flag(100, "documents for each seed", at_least=1)
    seeds: tuple = flag(("0",), "comma-separated seeds of the documents")
    context: tuple = flag((), "comma-separated lengths of the context in tokens (default: about "
                              "300, of tasks in workshop/ 1024)")
    referents: int = flag(1, "coreference: places introduced", at_least=1, at_most=8)
    interval: int = flag(1, "steps that one choice of the butler serves (plain engine)", at_least=1)
    neighbours: int = flag(0, "tokens that a chosen one brings on either side (plain engine)")
    drift: float = flag(0.0, "how far a query may turn before the butler chooses anew (fast "
                             "engine), 1 - cosine", at_most=2)
    device: str = flag(DEVICE, "cpu or cuda")


def rules_of(config) -> dict:
    """The flags of a butler's selector that are not at their defaults. An engine's selector
    refuses those that it does not have."""
    rules = {"interval": config.interval, "neighbours": config.neighbours, "drift": config.drift}
    defaults = {"interval": 1, "neighbours": 0, "drift": 0}
    return {name: value for name, value in rules.items() if value != defaults[name]}


def check_prefill(config, selectors) -> None:
    """Refuses flags of the prefill that make no sense."""
    known("--prefill", config.prefill, ("dense", "sparse"))
    if config.prefill == "sparse":
        with one_line("--prefill-budget"):
            Budget(config.prefill_budget)
        if set(selectors) == {"dense"}:
            raise UserError("--prefill sparse reads through a selector: name one that is not dense")


def prefill_budget_of(config) -> float | None:
    """What the flags of the prefill mean to selection.prefill."""
    return config.prefill_budget if config.prefill == "sparse" else None


def task_documents(config, tok, limit: int) -> dict:
    """{task: its documents}, or {task@context: ...} where --context names several. limit: the
    model's context. Raises UserError."""
    seeds = numbers_or_zero(config.seeds)
    for length in numbers(config.context, int, "--context"):
        if length > limit:
            raise UserError(f"--context {length}: the model's context is {limit}")
    found = {}
    for task in config.task:
        for context in config.context or (None,):
            length = context and numbers([context], int, "--context")[0]
            name = f"{task}@{context}" if len(config.context) > 1 else task
            found[name] = []
            for seed in seeds:
                if task == "coreference":
                    # 1.3 of the default model's tokens per word, and 36 for the question
                    words = 250 if length is None else max(0, round((length - 36) / 1.3))
                    found[name] += coreference_documents(
                        "test", config.n, seed, referents=config.referents, words=words)
                else:
                    ruler = plug_in("workshop.ruler")
                    known("task", task, ("coreference", *ruler.TASKS))
                    found[name] += ruler.documents(task, tok, config.n, seed, length or 1024)
    return found


def numbers_or_zero(words) -> list[int]:
    """--seeds, each once: 0 and 00 are one. Raises UserError."""
    if not all(re.fullmatch("[0-9]{1,10}", word) for word in words):
        raise UserError(f"--seeds: {','.join(words)} are not all whole numbers of up to 10 digits")
    return list(dict.fromkeys(map(int, words)))


def main(config: Config) -> dict:
    known("--question", config.question, ("sparse", "prefill"))
    check_selectors(config.selectors, config.budgets)
    check_prefill(config, config.selectors)
    engine = cli.engine(config.engine)
    cli.check_device(config.device)
    llama, tok, butler = engine.load(config.model, config.butler, config.device)
    rules = rules_of(config)
    makers = every_maker(config.selectors, config.budgets, butler, llama, **rules)
    if config.data:
        limit = llama.config.context
        tasks = plug_in("workshop.longbench").read_data(config.data, tok, config.n, limit)
    else:
        tasks = task_documents(config, tok, llama.config.context)
    results = {}
    for task, documents in tasks.items():
        results[task] = evaluate(llama, tok, documents, makers, config.question,
                                 bool(rules), task, prefill_budget_of(config))
    print_results(results)
    return {"results": results, "bytes": print_bytes(makers, llama.config.head_dim)}


if __name__ == "__main__":
    cli.run(main, Config)
