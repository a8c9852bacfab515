"""tasks/evaluation.py - documents through selectors at equal budgets: a score for each answer.

    context -- dense, once --> cache --+-- question, answer through selector 1, budget 1 --> score
                                       +-- through selector 1, budget 2 --> score  ...

Where an answer is forced upon the model, its tokens and the question's go through in one block,
each under its own selection: the same as token by token, but for the time it takes. Otherwise the
model writes, greedily. The loss of the first reference can be had of both. Single scores can be
kept in a file, from which a run goes on.

    python -m tasks.evaluation        what a tiny random model answers
"""

import json
import random
import sys
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from baselines import BASELINES, Evicting, every_maker
from common.errors import UsageError, in_one_line
from common.files import read_text
from measure.probe import Probe
from model import Cache
from tasks import ruler
from tasks.coreference import coreference_documents
from tasks.document import Document, encode, finished, found

TASKS = ("coreference", *ruler.TASKS)
EVICTING = {name: rival for name, rival in BASELINES.items() if issubclass(rival, Evicting)}


def task_documents(task, context, n, seeds, count, referents=1) -> list[Document]:
    """The test documents of a task, `n` for each seed; context in tokens or None for the task's
    default; count(text) -> tokens. Raises UsageError for what the task cannot do."""
    documents = []
    for seed in map(int, seeds):
        if task == "coreference":  # 1.3 of the default model's tokens to a word, 36 to ask
            words = 250 if context is None else max(0, round((context - 36) / 1.3))
            documents += coreference_documents("test", n, seed, referents=referents, words=words)
        else:
            rng = random.Random(f"{task} {seed}")
            documents += [ruler.TASKS[task](rng, context or 1024, count) for _ in range(n)]
    return documents


def at_contexts(llama, tok, tasks, contexts, n: int, seed: int) -> dict:
    """-> {task@context: documents}, co-reference at its default length alone; all of them fit."""
    found = {}
    for task, context in product(tasks, contexts):
        alone = task == "coreference"
        name, length = (task, None) if alone else (f"{task}@{context}", int(context))
        found[name] = task_documents(task, length, n, [seed], tok.count)
    fits(llama, found, tok.count)
    return found


def fits(llama, tasks, count) -> None:
    """Raises UsageError for a document that the model cannot hold, or of whose context or question
    it has no token, as of some control characters."""
    limit = llama.config.context
    for name, documents in tasks.items():
        for number, d in enumerate(documents, 1):
            parts = count(d.context), count(d.question), d.new_tokens or count(d.answer)
            if not all(parts):
                raise UsageError(f"{name}, document {number}: a part of it has no token")
            size = 1 + sum(parts)
            if size > limit + 1:
                raise UsageError(f"{name}, document {number}: {size} tokens with its answer, "
                                 f"the model's context is {limit}")


def fitting(llama, tok, n: int, seed: int) -> list[Document]:
    """Co-reference documents of 250 words, or of half or a quarter as many where the model's
    context is short. Raises UsageError if it holds none."""
    for words in (250, 125, 62):
        documents = coreference_documents("test", n, seed, words=words)
        try:
            fits(llama, {"coreference": documents}, tok.count)
            break
        except UsageError:
            if words == 62:
                raise
    return documents


class Scores:
    """Single scores, kept in a JSONL file where one is given: what is in it is not done again.

    The first line says which run it belongs to; a last line cut short by an interruption is cut.
    """

    def __init__(self, path=None, run=None):
        self.known, self.file = {}, None
        if path is None:
            return
        path, header = Path(path), json.dumps(run)
        text = read_text(path) if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if not text.startswith(header + "\n") and not header.startswith(text):
            raise UsageError(f"{path} is of a run with other settings, or no file of scores")
        with in_one_line(UsageError, path, "unusable scores"):
            self.known = dict(map(json.loads, whole.splitlines()[1:]))
            if not all(type(k) is str and type(s) in (int, float)
                       and 0 <= s <= (1e6 if " loss " in k else 1) for k, s in self.known.items()):
                raise UsageError("a line is no name with a score from 0 to 1, or a loss")
            self.file = path.open("a")
            self.file.truncate(len(whole.encode()))
        if not whole:
            self.file.write(header + "\n")

    def add(self, key: str, score: float) -> None:
        self.known[key] = score
        if self.file:
            self.file.write(json.dumps([key, score]) + "\n")
            self.file.flush()


def evaluate(llama, tok, documents, selectors, budgets, butlers=(), question="sparse", batch=4,
             scores=None, task="", kind=Cache, kept=None, losses=None, **rules) -> dict:
    """-> {selector: {budget: [[score of each document] of each butler]}}; one list if not butler.

    Budgets are given as text and come back as keys; dense stands under "1.0". `rules` (drift) hold
    for the butler. `scores` may know some already. `kind` says where keys and values live. If
    answers are forced `kept`, a dictionary, gets the attention kept in the same form; `losses`, a
    dictionary, gets the losses of the first references.
    """
    scores = scores or Scores()
    makers = {(name, b, i): make
              for name, b, some in every_maker(selectors, budgets, butlers, **rules)
              for i, make in enumerate(some)}
    evicting = [EVICTING[name] for name in selectors if name in EVICTING]
    if documents[0].new_tokens and (evicting or rules.get("drift")):
        batch = 1  # evictions and drift follow a row's own steps; padding before its end is none

    def entry(*key):
        return " ".join(map(str, (task, *key)))

    def missing(group):
        """The makers whose scores of some of these documents are not known."""
        return [key for key in makers if any(entry(d, *key) not in scores.known for d in group)]

    todo = [d for d in range(len(documents)) if missing([d])]
    groups = [todo[i : i + batch] for i in range(0, len(todo), batch)]
    for group in tqdm(groups, desc=task or "answering", unit="batch", file=sys.stderr):
        prompts = Prompts(llama, tok, [documents[d] for d in group], question, evicting, kind)
        for key in missing(group):
            loss = [] if losses is None else prompts.loss(makers[key]())
            given = prompts.answer(makers[key](), kept is not None)
            # the score last: by it a run that goes on looks
            for what, values in (("loss",), loss), (("kept",), prompts.kept), ((), given):
                for d, value in zip(group, values, strict=False):
                    scores.add(entry(d, *what, *key), value)

    def table(*what):
        found = {}
        for name, b, i in makers:
            column = [scores.known[entry(d, *what, name, b, i)] for d in range(len(documents))]
            found.setdefault(name, {}).setdefault(b, []).append(column)
        return found

    if kept is not None and not documents[0].new_tokens:
        kept.update(table("kept"))
    if losses is not None:
        losses.update(table("loss"))
    return table()


def uneven(lengths, block):
    """The lengths [B] of rows filled up to a block [B, T]; None where there is nothing to fill."""
    return None if bool((lengths == block.shape[1]).all()) else lengths


class Prompts:
    """A batch of documents of one kind, their contexts read densely, ready to be asked about.

    `evicting` kinds of selectors watch as the contexts are read, once for all budgets.
    """

    CHUNK = 256  # tokens of a question or of an answer whose loss is computed, at a time

    def __init__(self, llama, tok, documents, question: str, evicting=(), kind=Cache):
        self.llama, self.tok, self.documents = llama, tok, documents
        self.new = documents[0].new_tokens  # 0: answers are forced
        contexts, self.asked, self.answers = [], [], []
        for d in documents:
            context, asked, answer = encode(tok, d)
            if question == "prefill":
                context, asked = context + asked[:-1], asked[-1:]
            contexts.append(torch.tensor([context], device=llama.device))
            self.asked.append(asked)
            room = llama.config.context + 1 - len(context) - len(asked)
            self.answers.append(answer[:room])  # a long reference is forced as far as it fits
        self.forced = [q + a[:-1] for q, a in zip(self.asked, self.answers, strict=True)]
        self.block, self.real = self.padded(self.asked if self.new else self.forced)
        self.lengths = torch.tensor([c.shape[1] for c in contexts], device=llama.device)
        self.watchers = {rival: [rival(budget=1.0) for _ in documents] for rival in evicting}
        longest = int(self.lengths.max())
        room = longest + max(self.block.shape[1] + self.new, *map(len, self.forced))
        self.cache = llama.new_cache(len(contexts), room, kind=kind)
        for row, context in enumerate(contexts):  # each by itself: no padding is computed
            def watch(*seen, row=row):
                for watchers in self.watchers.values():
                    watchers[row].watch(*seen)

            one = llama.new_cache(1, context.shape[1])
            llama.prefill(context, one, watch)
            for mine, its in zip(self.cache.k + self.cache.v, one.k + one.v, strict=True):
                mine[row, :, : its.shape[2]] = its[0]
        self.cache.advance(longest, self.lengths)

    def padded(self, rows, filler=0):
        """Lists of ids -> [B, longest], filled up behind; their lengths [B]"""
        block = pad_sequence([torch.tensor(row) for row in rows], True, filler)
        return block.to(self.llama.device), torch.tensor(list(map(len, rows))).to(block.device)

    def begin(self, selector) -> None:
        """Back to where the contexts end, with a fresh selector."""
        self.cache.truncate(self.lengths)
        if selector:
            selector.read_ahead = self.cache.read_ahead
        if type(selector) in self.watchers:
            selector.follow(self.watchers[type(selector)])

    @torch.inference_mode()
    def loss(self, selector) -> list[float]:
        """Mean loss, in nats a token, of each document's first reference, forced behind its
        question, both going through a fresh selector."""
        self.begin(selector)
        block, real = self.padded(self.forced)
        ahead = [[-1] * (len(q) - 1) + a for q, a in zip(self.asked, self.answers, strict=True)]
        ahead, total = self.padded(ahead, -1)[0], 0.0  # what each token of the block predicts
        for start in range(0, block.shape[1], self.CHUNK):
            part = block[:, start : start + self.CHUNK]
            some = uneven((real - start).clamp(0, part.shape[1]), part)
            logits = self.llama(part, self.cache, selector, some).float()
            total += F.cross_entropy(logits.transpose(1, 2), ahead[:, start : start + self.CHUNK],
                                     ignore_index=-1, reduction="none").sum(1)
        return (total / (ahead >= 0).sum(1)).tolist()

    @torch.inference_mode()
    def answer(self, selector, probed=False) -> list[float]:
        """Scores of all documents, question and answer going through a fresh selector. Of a forced
        answer, `hits` then lists (step since the context's end, right?) of every token, and if
        `probed` `kept` the share of the attention kept by its question and answer."""
        self.begin(selector)
        real, self.kept = uneven(self.real, self.block), []
        if self.new:
            logits = self.llama.prefill(self.block, self.cache, selector, real, self.CHUNK)
            return self.written(logits, selector)
        probe = Probe(selector) if probed and selector else None
        logits = self.llama(self.block, self.cache, probe or selector, real)
        if probed:
            layers = list(probe.share.values()) if probe else [torch.ones(self.block.shape)]
            share = torch.stack(layers).mean(0)
            self.kept = [row[:n].mean().item() for row, n in zip(share, self.real, strict=True)]
        scores, self.hits = [], []
        for document, answer, best, end in zip(self.documents, self.answers, logits.argmax(-1),
                                               self.real.tolist(), strict=True):
            first = end - len(answer)
            hits = [a == b for a, b in zip(answer, best[first:end].tolist(), strict=True)]
            self.hits += enumerate(hits, first)
            share = sum(hits) / len(hits)
            scores.append(share if document.scoring == "token" else float(share == 1))
        return scores

    def written(self, logits, selector) -> list[float]:
        """Greedy decoding until the end, or until more text could not change any score."""
        texts, done = [[] for _ in self.documents], [False] * len(self.documents)
        silent = self.tok.eos_ids | set(self.tok.special.values())
        for step in range(self.new):
            token = logits[:, -1:].argmax(-1)
            for row, new in enumerate(token[:, 0].tolist()):
                if not done[row]:
                    texts[row] += [new] * (new not in silent)
                    text = self.tok.decode(texts[row])
                    done[row] = new in self.tok.eos_ids or finished(self.documents[row], text)
            if all(done) or step == self.new - 1:
                break
            logits = self.llama.decode(token, self.cache, selector)
        return [found(document, self.tok.decode(text))
                for document, text in zip(self.documents, texts, strict=True)]


if __name__ == "__main__":
    from loading import tokenizer
    from loading.fetch import resolve
    from model import Llama

    path = resolve()
    llama, tok = Llama.from_pretrained(path), tokenizer.load(path)
    documents = fitting(llama, tok, 2, seed=0)
    for selector, by in evaluate(llama, tok, documents, ("dense", "oracle"), ("0.1",)).items():
        print(selector, by)
