"""bench.py - what selection costs: perplexity, recall, stale choices, long texts; and time.

    text file -> windows [N, T] -> the model, every position under its own selection -> a number
    with its 95 % interval (bootstrap over windows or documents, and over butlers if several)

    perplexity  exp of the mean loss; each position keeps its own subset, as if it were decoded
    recall      share of the true attention kept, error of the attention's output, and Spearman rank
                correlation of scores and attention, by layer; all on the sparse run's own states
    length      the same share, and the loss, of the last 32 tokens before each of --contexts, what
                comes before them being read densely: does a butler choose as well far from where it
                was trained?
    drift       the tasks, choices being kept until their queries have turned by more than --drifts:
                accuracy, and the steps between two choices
    generation  free text of --length tokens: which share of its 8-grams has been there before?
    tradeoff    a task's score, as synth_task.py has it, beside milliseconds of a decode step
    attention, speed    milliseconds of a decode step, see measure/speed.py
    offload             the same with keys and values elsewhere, see measure/speed_offload.py

    python bench.py --suite perplexity --text FILE --budgets 0.1,0.25,0.5
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines import NAMES, every_maker
from beyond.engine import opened
from beyond.offload import cache_kind
from butler import Butler, load_for
from common.cli import DEVICE, flag, known, names, numbers, processor, provenance, run
from common.errors import UsageError
from loading.tokenizer import Tokenizer
from measure import speed, speed_offload, tables
from measure.intervals import accuracy, bootstrap, of_oracle, through
from measure.probe import Probe, at_lengths, mean
from model import Llama, check_device
from selection import Selector
from tasks.corpus import evenly, text_of
from tasks.evaluation import EVICTING, TASKS, Prompts, at_contexts


@dataclass
class Config:
    """Measures what a selection costs in quality, and what a decode step costs in time."""

    suite: str = flag("perplexity",
                      "perplexity, recall, length, drift, generation, tradeoff, attention, speed "
                      "or offload")
    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    engine: str = flag("own", "what runs the model: own, for a Llama, or transformers")
    butler: tuple = flag((), "comma-separated files or Hub ids (default: the shipped one)", names)
    selectors: tuple = flag(("dense", "oracle", "butler"),
                            f"comma-separated, of {', '.join(NAMES)}", names)
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended",
                          numbers(kind=float))
    text: str = flag(None, "text file (default: Python's reference, the part not trained on)")
    n: int = flag(12, "windows, documents or prompts; of a timed suite rounds or steps", least=1)
    length: int = flag(512, "tokens of a window; of a generated text", least=64)
    task: tuple = flag((), "drift: tasks (default: coreference,needle_prose,copy); tradeoff: tasks "
                           "(default: needle_prose)", names)
    drifts: tuple = flag(("0", "0.1", "0.2", "0.3", "0.4"), "drift, offload: how far a query may "
                         "turn before the choice is made anew, 1 - cosine", numbers(0, 2, float))
    shape: str = flag(None, "attention, speed, offload: random weights in the shape of "
                            f"{', '.join(speed.SHAPES)} or a config.json")
    contexts: tuple = flag((), "length, drift, tradeoff (RULER-style), attention, speed, offload: "
                           "tokens (default: 512,2048,8000; tradeoff: 4096)", numbers(1, 2**20))
    batch: tuple = flag(("1",), "attention, speed: sequences", numbers(1, 2**16))
    memory: float = flag(0.0, "offload: share of the keys and values that may be in memory, page "
                              "cache included; 0: no limit", most=1)
    offload_dir: str = flag(None, "offload: folder of the file (default: /var/tmp)")
    seed: int = flag(0, "seed of documents and sampling")
    write: bool = flag(False, "write results/SUITE[_SHAPE][_PROCESSOR].json, redraw tables")
    device: str = flag(DEVICE, "cpu or cuda")

    def __post_init__(self):
        every = ("coreference", "needle_prose", "copy"), ("512", "2048", "8000")
        tasks, contexts = (("needle_prose",), ("4096",)) if self.suite == "tradeoff" else every
        self.task, self.contexts = self.task or tasks, self.contexts or contexts


@dataclass
class Bench:
    """What every suite needs: the model, its tokenizer, the butlers, the flags."""

    llama: Llama
    tok: Tokenizer
    butlers: list
    config: Config

    def makers(self, **rules):
        """See baselines.every_maker."""
        c = self.config
        return every_maker(c.selectors, c.budgets, self.butlers, **rules)

    def runs(self, function):
        """-> (name, budget, [[function(model, window, fresh selector) of each window] of each
        butler]), every position of a window [--length] under its own selection."""
        windows = self.windows(self.config.length)
        for name, budget, makers in tqdm(list(self.makers()), self.config.suite, file=sys.stderr):
            yield name, budget, [[function(self.llama, window, make()) for window in windows]
                                 for make in makers]

    def windows(self, length: int) -> torch.Tensor:
        """[n, length] tokens, spread evenly over the text."""
        rows = evenly(self.tok, text_of(self.config.text), self.config.n, length)
        return rows.to(self.llama.device)


# ---------------------------------------------------------------------------- the suites

empty = partial(defaultdict, partial(defaultdict, dict))  # [task or measure][selector][budget]


def perplexity(bench: Bench) -> dict:
    """Masked perplexity, and its excess over the oracle's at the same budget, window by window."""
    results, loss = empty(), {(name, budget): runs for name, budget, runs in bench.runs(nats)}
    for (name, budget), runs in loss.items():
        results["perplexity"][name][budget] = through(math.exp, bootstrap(runs))
        if name != "oracle" and ("oracle", budget) in loss:
            results["over_oracle"][name][budget] = excess(runs, *loss["oracle", budget])
    return {"results": results}


def nats(llama, window, selector) -> float:
    """Mean loss of a window [T], every position under its own selection."""
    with torch.inference_mode():
        logits = llama(window[None], selector=selector)[0, :-1].float()
    return F.cross_entropy(logits, window[1:]).item()


def excess(runs: list[list[float]], best: list[float]) -> dict:
    """Nats [[of each window] of each run] -> share by which perplexity exceeds that of `best`."""
    more = [[a - b for a, b in zip(run, best, strict=True)] for run in runs]
    return through(math.expm1, bootstrap(more))


def recall(bench: Bench) -> dict:
    """Probe's measures on the sparse run's own hidden states, by layer and on average."""
    results, layers = empty(), empty()
    for name, budget, runs in bench.runs(probed):
        for measure, first in runs[0][0].items():
            results[measure][name][budget] = bootstrap(
                [[mean(w[measure]) for w in run] for run in runs])
            flat = [w[measure] for run in runs for w in run]
            layers[measure][name][budget] = [sum(w[layer] for w in flat) / len(flat)
                                             for layer in first]
    return {"results": results, "layers": layers}


def probed(llama, window, selector) -> dict:
    """{measure: {layer: number}} of a window [T], every position under its own selection."""
    cache = llama.new_cache(1, len(window))
    probe = Probe(selector, rank=True, cache=cache)
    if selector:
        with torch.inference_mode():
            llama(window[None], cache, probe, last=True)
    return {name: by for name in ("mass", "error", "spearman") if (by := getattr(probe, name))}


def length(bench: Bench) -> dict:
    """Attention kept and perplexity at the end of contexts of several lengths, read densely, and
    what they are of the oracle's, window by window."""
    contexts, results = [int(c) for c in bench.config.contexts], empty()
    kept, loss = defaultdict(list), defaultdict(list)
    makers = {(name, budget): None if name == "dense" else make
              for name, budget, (make, *_) in bench.makers()}
    for window in tqdm(bench.windows(max(contexts)), desc="length", file=sys.stderr):
        for context, key, mass, nats in at_lengths(bench.llama, window, contexts, makers):
            kept[context, *key].append(mass)
            loss[context, *key].append(nats)
    for (context, name, budget), masses in kept.items():
        losses, best = loss[context, name, budget], (context, "oracle", budget)
        rows = {"kept": bootstrap([masses]), "perplexity": through(math.exp, bootstrap([losses]))}
        if name != "oracle" and best in kept:
            rows |= {"kept of oracle": bootstrap(of_oracle([masses], kept[best])),
                     "over oracle": excess([losses], loss[best])}
        for what, row in rows.items():
            results[f"{what} @{context}"][name][budget] = row
    return {"results": results}


def drift(bench: Bench) -> dict:
    """Accuracy, and mean steps between two choices, at every drift. One document at a time: steps
    are counted in it alone."""
    c, results, steps = bench.config, empty(), defaultdict(dict)
    makers = {(f"{name}, drift {allowed}" if name == "butler" else name, budget): make
              for allowed in c.drifts
              for name, budget, make in bench.makers(drift=float(allowed))}
    tasks = at_contexts(bench.llama, bench.tok, c.task, c.contexts, c.n, c.seed)
    for task, documents in tasks.items():
        scores, intervals = {key: [[] for _ in makers[key]] for key in makers}, defaultdict(list)
        for document in tqdm(documents, desc=task, file=sys.stderr):
            prompts = Prompts(bench.llama, bench.tok, [document], "sparse")
            for key, several in makers.items():
                for given, make in zip(scores[key], several, strict=True):
                    selector = make()
                    given += prompts.answer(selector)
                    if "drift" in key[0]:
                        intervals[", ".join(key)].append(selector.reuse.steps_per_choice)
        for (name, budget), runs in scores.items():
            results[task][name][budget] = accuracy(runs)
        steps[task] = {label: sum(v) / len(v) for label, v in intervals.items()}
    return {"results": results, "steps between choices": steps}


def generation(bench: Bench) -> dict:
    """Texts of --length tokens behind prompts of 64, sampled at temperature 0.8 with the same
    seed for every selector -> share of the 8-grams that occurred in the text before."""
    c, results, prompts = bench.config, empty(), bench.windows(64)
    endings = defaultdict(dict)
    for name, budget, makers in bench.makers():
        runs = []
        for make in makers:
            generator = torch.Generator().manual_seed(c.seed)
            cache, selector = bench.llama.new_cache(c.n, 64 + c.length), make()
            logits = bench.llama.prefill(prompts, cache, selector and selector.watch)
            written = []
            for _ in tqdm(range(c.length), desc=f"{name} {budget}", file=sys.stderr):
                p = (logits[:, -1].float() / 0.8).softmax(-1).cpu()
                written.append(torch.multinomial(p, 1, generator=generator))
                logits = bench.llama.decode(written[-1].to(prompts.device), cache, selector)
            rows = torch.cat(written, dim=1).tolist()
            runs.append([repeated(row) for row in rows])
        results["repeated_8_grams"][name][budget] = bootstrap(runs)
        endings[name][budget] = bench.tok.decode(rows[0])[-300:]
    return {"results": results, "endings": endings}


def repeated(ids: list[int]) -> float:
    """Share of the 8-grams of a text that are not their first occurrence."""
    grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
    return 1 - len(set(grams)) / len(grams)


# ---------------------------------------------------------------------------- the script

SUITES = {"perplexity": perplexity, "recall": recall, "length": length, "drift": drift,
          "generation": generation, "tradeoff": speed.tradeoff}
TIMED = dict.fromkeys(speed.SUITES, speed) | {"offload": speed_offload}


def main(config: Config) -> dict:
    check(config)
    if suite := TIMED.get(config.suite):
        report = suite.measure(config) | provenance()
        print(suite.table(report))
    else:
        report = measured(config) | provenance()
    name = config.suite
    if shape := config.shape:
        name += "_" + (Path(shape).resolve().parent.name if shape.endswith(".json") else shape)
    if suite or name == "tradeoff":
        name += "_" + processor(config.device)
    return tables.write(config, report, name)


def measured(config: Config) -> dict:
    llama, tok = opened(config)
    named = (config.butler or (None,)) if "butler" in config.selectors else ()
    butlers = [load_for(llama, name) for name in named]
    if config.suite == "generation" and 64 + config.length > llama.config.context:
        raise UsageError(f"a prompt of 64 and --length {config.length} exceed the model's context "
                         f"of {llama.config.context}")
    bench = Bench(llama, tok, butlers, config)
    report = SUITES[config.suite](bench)
    for what, selector, budget, m in tables.measures(report):
        ms = f"  {m['ms']:.2f} ms a step" if "ms" in m else ""
        print(f"{what:12s} {selector:8s} {budget:>5s}  {m['mean']:9.4f}  "
              f"[{m['low']:.4f}, {m['high']:.4f}]  n = {m['n']}{ms}")
    return report | {"dtype": str(llama.embed_tokens.weight.dtype)}


def check(config: Config) -> None:
    known("suite", [config.suite], SUITES | TIMED)
    known("selector", config.selectors, NAMES)
    known("task", config.task, TASKS)
    if "snapkv" in config.selectors and config.suite in ("perplexity", "recall", "length"):
        raise UsageError(f"snapkv evicts at the end of a prompt, and the text of --suite "
                         f"{config.suite} has none")
    if config.suite == "length" and min(map(int, config.contexts)) < 64:
        raise UsageError("--suite length measures 32 tokens behind as many at least: no context "
                         "below 64")
    evicting = sorted(set(config.selectors) & set(EVICTING))
    if evicting and config.suite in ("drift", "length"):
        raise UsageError(f"{evicting[0]} evicts at every step: no --suite {config.suite}")
    if config.shape:
        speed.shape_of(config.shape)
        if config.model:
            raise UsageError("--shape has random weights, --model its own: one of the two")
        if config.suite not in TIMED:
            raise UsageError(f"--shape has random weights: no --suite {config.suite}")
    if config.suite in TIMED and config.engine != "own":
        raise UsageError(f"--suite {config.suite} times this repository's own engine")
    for budget in config.budgets:
        Selector(float(budget))
    text_of(config.text)
    check_device(config.device)
    for name, given, suites in (("--butler", config.butler, (*TIMED, "length")),
                                ("--budgets", config.budgets, ("offload",))):
        if config.suite in suites and len(given) > 1:
            raise UsageError(f"--suite {config.suite} takes one of {name}, not {len(given)}")
    if config.suite == "offload":
        store = speed_offload.store_of(config.device)
        cache_kind(store, config.offload_dir, config.device)
        if config.memory and store != "disk":
            raise UsageError("--memory bounds the memory beside a disk: no --device cuda")
    for path in config.butler:
        Butler.load(path)


if __name__ == "__main__":
    run(main, Config)
