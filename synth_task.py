"""synth_task.py - tasks whose answer hides in the context, and the evaluation over them.

    documents (coreference.py, ruler.py, a JSONL file) -> context, question, answers
    context -- dense, once --> cache --+-- question, answer through selector 1, budget 1 --> score
                                       +-- through selector 1, budget 2 --> score  ...

Two protocols. *sparse* (default): question and answer go through the selection, so that a method
which evicts has to do so before it is asked. *prefill*: the question is read densely with the
context, as in most published tables, and only its last token and the answer go through the
selection.

A score is between 0 and 1, see `Document.scoring`. Where the answer is forced upon the model, its
tokens and the question's go through in one block, each under its own selection: the same as token
by token, but for the time it takes. Otherwise the model writes, greedily.

Accuracies come with a 95 % interval: a bootstrap over documents and, where several butlers are
given, over these, which is where training seeds differ.

    python synth_task.py --selectors dense,oracle,butler,h2o --budgets 0.1,0.5
    python synth_task.py --task needle_noise,copy --context 1024,2048 --n 20
    python synth_task.py --data questions.jsonl        {"context", "question", "answer"} per line
"""

import json
import random
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import ruler
import tokenizer
from baselines import BASELINES, NAMES, Evicting, Probe, make_selector
from butler import SHIPPED, Butler, fingerprint, load_for
from cli import UsageError, flag, known, names, numbers, provenance, read_text, run, writable
from coreference import Document, coreference_documents
from fetch import digest, resolve
from model import Cache, Llama, check_device, fast_dtype
from offload import STORES, cache_kind
from selection import Selector

TASKS = ("coreference", *ruler.TASKS)
EVICTING = {name: rival for name, rival in BASELINES.items() if issubclass(rival, Evicting)}


@dataclass
class Config:
    """Answers questions about a context through selectors at equal budgets."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    butler: tuple = flag((), "butler checkpoints, comma-separated: their seeds are resampled "
                             "(default: the shipped one)", names)
    task: tuple = flag(("coreference",), f"comma-separated, of {', '.join(TASKS)}", names)
    data: str = flag(None, "instead of a task: JSONL file of context, question, answer")
    selectors: tuple = flag(NAMES, f"comma-separated, of {', '.join(NAMES)}", names)
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended", names)
    drift: float = flag(0.0, "a butler's choice is kept until its query has turned by more than "
                             "this (1 - cosine, 16 steps at most)", most=2)
    n: int = flag(100, "documents for each seed", least=1)
    seeds: tuple = flag(("0",), "comma-separated seeds of the documents", numbers())
    referents: int = flag(1, "coreference: places introduced in a document", least=1, most=8)
    context: tuple = flag((), "comma-separated tokens of context, question and answer "
                              "(default: about 355 for coreference, else 1024)", numbers(1))
    question: str = flag("sparse", "sparse: question and answer go through the selection; "
                                   "prefill: only the answer does")
    batch: int = flag(4, "documents at a time", least=1)
    out: str = flag(None, "JSONL file of single scores; an interrupted run goes on from it")
    offload: str = flag("none", f"where keys and values live, of {', '.join(STORES)}")
    offload_dir: str = flag(None, "disk: folder of the file (default: /var/tmp)")
    device: str = flag("cpu", "cpu or cuda")


# ---------------------------------------------------------------------------- documents


def task_documents(task, context, n, seeds, count, referents=1) -> list[Document]:
    """The test documents of a task, `n` for each seed; context in tokens or None for the task's
    default; count(text) -> tokens. Raises ValueError for what the task cannot do."""
    documents = []
    for seed in map(int, seeds):
        if task == "coreference":  # 1.3 of the default model's tokens to a word, 36 to ask
            words = 250 if context is None else max(0, round((context - 36) / 1.3))
            documents += coreference_documents("test", n, seed, referents=referents, words=words)
        else:
            rng = random.Random(f"{task} {seed}")
            documents += [ruler.TASKS[task](rng, context or 1024, count) for _ in range(n)]
    return documents


def read_data(path) -> list[Document]:
    """Lines {"context", "question", "answer"}, the answer one accepted string or a list of them.
    Raises UsageError with file and line for anything else."""
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            context, question, answers = (entry[k] for k in ("context", "question", "answer"))
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{path}:{number}: not JSON ({e})") from None
        except (KeyError, TypeError) as e:
            raise UsageError(f"{path}:{number}: not an object with context, question and answer "
                             f"({e})") from None
        answers = [answers] if isinstance(answers, str) else answers
        if not (isinstance(context, str) and isinstance(question, str) and context and question
                and isinstance(answers, list) and answers
                and all(isinstance(a, str) and a.strip() for a in answers)):
            raise UsageError(f"{path}:{number}: context and question are texts, answer a text or a "
                             f"list of them, none empty")
        documents.append(Document(context, question, tuple(a.strip() for a in answers), "any", 64))
    if not documents:
        raise UsageError(f"{path}: no lines")
    return documents


# ---------------------------------------------------------------------------- evaluation


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
        try:
            self.known = dict(map(json.loads, whole.splitlines()[1:]))
            if not all(type(k) is str and type(s) in (int, float) and 0 <= s <= 1
                       for k, s in self.known.items()):
                raise ValueError("a line is no name with a score from 0 to 1")
            self.file = path.open("a")
            self.file.truncate(len(whole.encode()))
        except (OSError, ValueError, TypeError, RecursionError) as e:
            raise UsageError(f"{path}: {e}") from None
        if not whole:
            self.file.write(header + "\n")

    def add(self, key: str, score: float) -> None:
        self.known[key] = score
        if self.file:
            self.file.write(json.dumps([key, score]) + "\n")
            self.file.flush()


def evaluate(llama, tok, documents, selectors, budgets, butlers=(), question="sparse", batch=4,
             scores=None, task="", kind=Cache, kept=None, **rules) -> dict:
    """-> {selector: {budget: [[score of each document] of each butler]}}; one list if not butler.

    Budgets are given as text and come back as keys; dense stands under "1.0". `rules` (drift) hold
    for the butler. `scores` may know some already. `kind` says where keys and values live. If
    answers are forced `kept`, a dictionary, gets the attention kept in the same form.
    """
    scores = scores or Scores()
    makers = {}
    for name in selectors:
        own = rules if name == "butler" else {}
        for b in ("1.0",) if name == "dense" else budgets:
            for i, butler in enumerate(butlers if name == "butler" else [None]):
                makers[name, b, i] = partial(make_selector, name, float(b), butler, **own)
    evicting = [EVICTING[name] for name in selectors if name in EVICTING]
    if documents[0].new_tokens and (evicting or rules.get("drift")):
        batch = 1  # evictions and drift follow a row's own steps; padding before its end is none

    def entry(d, key):
        return " ".join(map(str, (task, d, *key)))

    todo = {d: [key for key in makers if entry(d, key) not in scores.known]
            for d in range(len(documents))}
    order = [d for d in todo if todo[d]]
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    for group in tqdm(groups, desc=task or "answering", unit="batch", file=sys.stderr):
        prompts = Prompts(llama, tok, [documents[d] for d in group], question, evicting, kind)
        for key in dict.fromkeys(key for d in group for key in todo[d]):
            given = prompts.answer(makers[key](), kept is not None)
            for d, score in zip(group, given, strict=True):
                scores.add(entry(d, key), score)
            for d, share in zip(group, prompts.kept, strict=False):
                scores.add(entry(d, ("kept", *key)), share)

    def table(*what):
        found = {}
        for name, b, i in makers:
            column = [scores.known[entry(d, (*what, name, b, i))] for d in range(len(documents))]
            found.setdefault(name, {}).setdefault(b, []).append(column)
        return found

    if kept is not None and not documents[0].new_tokens:
        kept.update(table("kept"))
    return table()


class Prompts:
    """A batch of documents of one kind, their contexts read densely, ready to be asked about.

    `evicting` kinds of selectors watch as the contexts are read, once for all budgets.
    """

    def __init__(self, llama, tok, documents, question: str, evicting=(), kind=Cache):
        self.llama, self.tok, self.documents = llama, tok, documents
        self.new = documents[0].new_tokens  # 0: answers are forced
        contexts, blocks, self.answers = [], [], []
        for d in documents:
            parts = d.context, d.question, "" if self.new else d.answer
            context, asked, answer = encode_parts(tok, parts)
            context = [tok.bos_id] * tok.add_bos + context
            if question == "prefill":
                context, asked = context + asked[:-1], asked[-1:]
            contexts.append(torch.tensor([context], device=llama.device))
            blocks.append(torch.tensor(asked + answer[:-1], device=llama.device))
            self.answers.append(answer)
        self.block = pad_sequence(blocks, batch_first=True)  # [B, longest], zeros behind
        self.real = torch.tensor([len(block) for block in blocks], device=llama.device)
        self.lengths = torch.tensor([c.shape[1] for c in contexts], device=llama.device)
        self.watchers = {rival: [rival(budget=1.0) for _ in documents] for rival in evicting}
        longest = int(self.lengths.max())
        room = longest + self.block.shape[1] + self.new
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

    @torch.inference_mode()
    def answer(self, selector, probed=False) -> list[float]:
        """Scores of all documents, question and answer going through a fresh selector. Of a forced
        answer, `hits` then lists (step since the context's end, right?) of every token, and if
        `probed` `kept` the share of the attention kept by its question and answer."""
        self.cache.truncate(self.lengths)
        if selector:
            selector.read_ahead = self.cache.read_ahead
        if type(selector) in self.watchers:
            selector.follow(self.watchers[type(selector)])
        even, self.kept = bool((self.real == self.real[0]).all()), []
        probe = Probe(selector) if probed and selector and not self.new else None
        logits = self.llama(self.block, self.cache, probe or selector, None if even else self.real,
                            last=bool(self.new))
        if self.new:
            return self.written(logits, selector)
        if probed:
            share = torch.ones(self.block.shape)
            if probe:
                share = torch.stack(list(probe.share.values())).mean(0)
            self.kept = [row[:n].mean().item() for row, n in zip(share, self.real, strict=True)]
        scores, self.hits = [], []
        for row, (document, answer) in enumerate(zip(self.documents, self.answers, strict=True)):
            first = int(self.real[row]) - len(answer)
            best = logits[row, first : first + len(answer)].argmax(-1).tolist()
            hits = [a == b for a, b in zip(answer, best, strict=True)]
            self.hits += enumerate(hits, first)
            share = sum(hits) / len(hits)
            scores.append(share if document.scoring == "token" else float(share == 1))
        return scores

    def written(self, logits, selector) -> list[float]:
        """Greedy decoding until the end, or until more text could not change any score."""
        texts = [[] for _ in self.documents]
        scores, done = [0.0] * len(texts), [False] * len(texts)
        for step in range(self.new):
            token = logits[:, -1:].argmax(-1)
            for row, new in enumerate(token[:, 0].tolist()):
                if not done[row]:
                    texts[row].append(new)
                    scores[row] = found(self.documents[row], self.tok.decode(texts[row]))
                    done[row] = new in self.tok.eos_ids or scores[row] == 1
            if all(done) or step == self.new - 1:
                break
            logits = self.llama.decode(token, self.cache, selector)
        return scores


def encode_parts(tok, parts) -> list[list[int]]:
    """Texts that follow each other -> token ids of each, those of the joined text cut in pieces:
    some vocabularies put a blank before whatever they encode. Where a token straddles the border
    of two parts, the later part is encoded by itself."""
    text, done, pieces = "", [], []
    for part in parts:
        text += part
        whole = tok.encode(text)
        pieces.append(whole[len(done) :] if whole[: len(done)] == done else tok.encode(part))
        done = done + pieces[-1]
    return pieces


def found(document: Document, text: str) -> float:
    """Scoring by substring, case apart, as RULER does: share of the references, or any of them."""
    hits = [reference.lower() in text.lower() for reference in document.answers]
    return float(any(hits)) if document.scoring == "any" else sum(hits) / len(hits)


def bootstrap(runs: list[list[float]]) -> dict:
    """Mean of scores [[of each document] of each run] and its 95 % interval, from 2,000 draws: runs
    with replacement, then documents, the same for every run. n is the number of documents."""
    rng, n = random.Random(0), len(runs[0])
    means = []
    for _ in range(2000):
        chosen = rng.choices(range(n), k=n)
        drawn = rng.choices(runs, k=len(runs))
        means.append(sum(run[i] for run in drawn for i in chosen) / n / len(runs))
    means.sort()
    return {"mean": sum(map(sum, runs)) / n / len(runs), "low": means[50], "high": means[1949],
            "n": n}


def accuracy(runs: list[list[float]]) -> dict:
    """`bootstrap` of scores; where all are 0, or 1, there is nothing to draw from: there the bound
    is Clopper and Pearson's, what n failures, or successes, can still exclude."""
    m = bootstrap(runs)
    bound = 0.025 ** (1 / m["n"])
    if m["high"] == 0:
        m["high"] = 1 - bound
    elif m["low"] == 1:
        m["low"] = bound
    return m


# ---------------------------------------------------------------------------- the script


def main(config: Config) -> dict:
    tasks = check(config)
    path = resolve(config.model)
    tok = tokenizer.load(path)

    def count(text):
        return len(tok.encode(text))

    try:
        tasks = {name: make(count=count) for name, make in tasks.items()}
    except ValueError as e:  # a dial out of range
        raise UsageError(str(e)) from None
    llama = Llama.from_pretrained(path, fast_dtype(config.device), config.device)
    tok.check(llama)
    butlers, dtype = [], str(llama.embed_tokens.weight.dtype)
    if "butler" in config.selectors:
        butlers = [load_for(llama, p) for p in config.butler or (SHIPPED,)]
    fits(llama, tasks, count)
    identity = {k: v for k, v in asdict(config).items() if k != "out"}
    identity |= {k: v for k, v in provenance().items() if k != "command"}
    identity |= {"weights": str(path), "fingerprint": fingerprint(llama), "dtype": dtype}
    identity["files"] = [digest(Path(f)) for f in (*config.butler, SHIPPED, config.data) if f]
    scores = Scores(config.out, identity)
    kind = cache_kind(config.offload, config.offload_dir, config.device)
    results, kept, selected = {}, {}, {}
    for name, documents in tasks.items():
        shares = {}
        table = evaluate(llama, tok, documents, config.selectors, config.budgets, butlers,
                         config.question, config.batch, scores, name, kind, shares,
                         drift=config.drift)
        results[name] = {s: {b: accuracy(runs) for b, runs in by.items()}
                         for s, by in table.items()}
        kept[name] = {s: {b: bootstrap(of_oracle(runs, *shares["oracle"][b]))
                          for b, runs in by.items()}
                      for s, by in shares.items()
                      if "oracle" in shares and s not in ("dense", "oracle")}
        selected[name] = sum(count(d.question if config.question == "sparse" else "")
                             + (d.new_tokens or count(d.answer)) for d in documents)
        selected[name] /= len(documents)
        for selector, by in results[name].items():
            for budget, m in by.items():
                print(f"{name:18s} {selector:8s} {budget:>5s}  {m['mean']:.3f}  "
                      f"[{m['low']:.3f}, {m['high']:.3f}]  n = {m['n']}")
        for selector, by in kept[name].items():
            for budget, m in by.items():
                print(f"{name:18s} {selector:8s} {budget:>5s}  keeps {m['mean']:.1%} of the "
                      f"oracle's attention  [{m['low']:.1%}, {m['high']:.1%}]")
        print(f"{name:18s} up to {selected[name]:.0f} tokens went through the selection",
              flush=True)
    return {"results": results, "kept of oracle": kept, "selected_tokens": selected,
            "dtype": dtype} | provenance()


def of_oracle(runs: list[list[float]], best: list[float]) -> list[list[float]]:
    """Shares of the attention kept, by document, as shares of what the oracle keeps."""
    return [[share / most for share, most in zip(run, best, strict=True)] for run in runs]


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
            fits(llama, {"coreference": documents}, lambda text: len(tok.encode(text)))
            return documents
        except UsageError as e:
            problem = e
    raise problem


def check_budgets(budgets) -> None:
    try:
        for budget in budgets:
            Selector(float(budget))
    except ValueError as e:  # not a number, or out of range
        raise UsageError(str(e)) from None


def check(config: Config) -> dict:
    """What can be known to be wrong before anything slow starts -> {name: count -> documents}."""
    known("task", config.task, TASKS)
    known("selector", config.selectors, NAMES)
    if config.question not in ("sparse", "prefill"):
        raise UsageError(f"--question is sparse or prefill, not {config.question!r}")
    check_budgets(config.budgets)
    check_device(config.device)
    cache_kind(config.offload, config.offload_dir, config.device)
    for path in config.butler:
        Butler.load(path)
    if config.out is not None:
        writable(config.out)
    contexts = [int(c) for c in config.context] or [None]
    if config.data is not None:
        if config.context:
            raise UsageError("--context is the length of a task, --data has its own")
        documents = read_data(config.data)
        return {"data": lambda count: documents}
    return {task if len(contexts) == 1 else f"{task}@{context}":
            partial(task_documents, task, context, config.n, config.seeds,
                    referents=config.referents)
            for context in contexts for task in config.task}


if __name__ == "__main__":
    run(main, Config)
