"""results/ablate.py - one change at a time: what each choice of the default butler is worth.

Butlers that differ in one thing are trained side by side, on the same texts and rows where they can
be: the frozen model's forward, which they share, is done once. Then all are measured on the same
windows and documents, so that a difference to the default row is paired. --only trains a few.

    python results/ablate.py --text out/prose.txt [--only size=16,stride=1] [--write]

kept      attention kept at 10 % of the tokens at the end of contexts of several lengths, as a share
          of what the oracle keeps; of the longest, the difference to the default row, 95 %
tasks     answers exact: co-reference at 7 % of the tokens, UUIDs at 5 %
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from baselines import BASELINES, Oracle
from butler import Butler, ButlerConfig, ButlerSelector, Producer
from common.cli import DEVICE, flag, known, names, numbers, provenance, run
from kernel import in_order
from loading import tokenizer
from measure import tables
from measure.intervals import accuracy, bootstrap, of_oracle
from measure.probe import at_lengths
from model import Llama, check_device, fast_dtype, resolve
from tasks.coreference import pools
from tasks.corpus import Mixture, default_texts, evenly, hold_out, text_of
from tasks.evaluation import evaluate, task_documents


@dataclass
class Config:
    """Trains butlers that differ in one thing, side by side, and compares them."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    only: tuple = flag((), "comma-separated rows (default: all)", names)
    steps: int = flag(160, "optimiser steps", least=1)
    text: str = flag(None, "text file to measure on (default: Python's reference, held-out part)")
    contexts: tuple = flag(("512", "1024", "2048", "4096", "8000"), "lengths to measure at",
                           numbers(256, 2**20))
    windows: int = flag(20, "windows to measure on, as long as the longest context", least=1)
    documents: int = flag(40, "documents of each task to answer", least=1)
    write: bool = flag(False, "write results/ablations.json, redraw tables")
    device: str = flag(DEVICE, "cpu or cuda")


# ---------------------------------------------------------------------------- the variants


class SameInput(Butler):
    """The producer at layer p serves p ... p+R-1 instead of p+1 ... p+R: no layer of look-ahead."""

    def __init__(self, config):
        super().__init__(config)
        last = max(map(int, self.producers))
        self.producers[str(last)] = Producer(config, config.layers - last)

    def queries(self, layer, x, positions):
        return {served - 1: q for served, q in super().queries(layer, x, positions).items()}


class Turning(Butler):
    """Importance space with another number of pairs that turn."""

    def __init__(self, config, pairs):
        super().__init__(config)
        fastest, slowest = self.frequencies[0].log10().item(), torch.tensor(config.slowest).log10()
        self.frequencies.zero_()
        self.frequencies[:pairs] = torch.logspace(fastest, slowest.item(), pairs)


class ExactKeys(ButlerSelector):
    """Importance keys as they are projected, not in 8 bits."""

    def scores(self, layer, q, keys, positions):
        here = torch.arange(keys.shape[2], device=keys.device)
        projected = self.butler.project(layer, keys, here)
        return in_order(self.butler.scores(self.queries[layer], projected))


def rival(name, butler, budget, **rules):
    """Another selector in the predictor's place, under its rules."""
    return BASELINES[name](budget, **rules)


@dataclass
class Variant:
    """How a row differs from the default one; `selection` needs no training of its own."""

    sizes: dict = field(default_factory=dict)  # of the butler
    kind: Callable = Butler
    settings: dict = field(default_factory=dict)  # of the training run
    everything: bool = False  # the loss is over all tokens, sinks, window and the query's own too
    synthetic: float = 0.3
    selection: Callable | None = None  # butler, budget -> selector


# what is asked of every row: task -> context, documents at most, budget
TASKS = {"coreference": (None, 40, "0.07"), "needle_uuid": (1024, 20, "0.05")}
RIVALS = "random", "keynorm"
PAPER = {"sizes": {"rotated_keys": True}, "everything": True}
VARIANTS = {
    "default": Variant(),
    "rotated keys": Variant(**PAPER),
    "rotated keys + short texts": Variant(**PAPER, settings={"long_every": 0}),
    "rotated keys + loss over the choice": Variant({"rotated_keys": True}),
    "short texts": Variant(settings={"long_every": 0}),
    "every other step at long texts": Variant(settings={"long_every": 2}),
    "long texts of 2048": Variant(settings={"long": 2048}),
    "loss over all tokens": Variant(everything=True),
    **{f"{n} of 16 pairs turn": Variant(kind=partial(Turning, pairs=n)) for n in (0, 4, 16)},
    **{f"size={e}": Variant({"size": e}) for e in (16, 24, 64)},
    **{f"hidden={n}": Variant({"hidden": n}) for n in (88, 352)},
    **{f"stride={r}": Variant({"stride": r}) for r in (1, 3, 10)},
    "no repeated strings": Variant(settings={"repeats": 0}),
    "no co-reference text": Variant(synthetic=0.0),
    "serving p to p+R-1": Variant(kind=SameInput),
    "importance keys in 32 bits": Variant(selection=ExactKeys),
    "drift 0.25": Variant(selection=partial(ButlerSelector, drift=0.25)),
    **{f"window {n}": Variant(selection=partial(ButlerSelector, window=n)) for n in (4, 16)},
    **{f"{name} instead": Variant(selection=partial(rival, name)) for name in RIVALS},
}


# ---------------------------------------------------------------------------- training, measuring


def train_all(variants: dict, llama, tok, config) -> dict:
    """-> {name: trained butler}. Rows that share texts share the frozen model's forward."""
    splits = [kept for kept, _ in map(hold_out, default_texts())]
    phrases, butlers, groups = pools("train"), {}, {}
    for name, v in variants.items():
        settings = replace(train.Config(steps=config.steps), **v.settings)
        groups.setdefault((v.synthetic, str(settings)), (settings, {}))[1][name] = v
    for (synthetic, _), (settings, members) in groups.items():
        batches = train.Batches(llama, Mixture(tok, splits, phrases, synthetic, settings.repeats),
                                settings)
        learners = {}
        for name, v in members.items():
            torch.manual_seed(0)
            butler = v.kind(ButlerConfig.for_model(llama, **v.sizes)).to(llama.device)
            learners[name] = butler, train.make_optimizers(butler, settings.learning_rate)
        for step in tqdm(range(config.steps), desc=", ".join(members)[:60], file=sys.stderr):
            look = batches.look(step)
            rate = settings.learning_rate * train.schedule(step, config.steps)
            for name, (butler, optimizers) in learners.items():
                everything = (0, 0) if members[name].everything else ()
                loss = train.distillation(butler, *look, *everything).mean()
                train.update(butler, optimizers, loss, rate)
        for name, (butler, _) in learners.items():
            butlers[name] = butler.eval().requires_grad_(False)
    return butlers


def measure(butlers: dict, windows, llama, tok, config) -> dict:
    """-> {row: {"kept" by context, "over_default", "answers", "parameters"}}"""
    contexts, kept = sorted(map(int, config.contexts)), {}
    makers = {name: partial(make, 0.1) for name, make in
              [("oracle", Oracle), *((name, b.selector) for name, b in butlers.items())]}
    for window in tqdm(windows, desc="windows", file=sys.stderr):
        for context, name, mass, _ in at_lengths(llama, window, contexts, makers):
            kept.setdefault((name, context), []).append(mass)
    scores = {}
    for task, (context, n, budget) in TASKS.items():
        documents = task_documents(task, context, min(n, config.documents), [3],
                                   lambda text: len(tok.encode(text)))
        table = evaluate(llama, tok, documents, ("dense", "oracle", "butler"), (budget,),
                         list(butlers.values()), task=task)
        scores[f"{task} {float(budget):.0%}"] = {
            "dense": table["dense"]["1.0"], "oracle": table["oracle"][budget],
            **{name: [run] for name, run in zip(butlers, table["butler"][budget], strict=True)}}
    rows = {name: {"answers": {task: accuracy(runs[name]) for task, runs in scores.items()}}
            for name in (*butlers, "oracle", "dense")}
    for name, row in rows.items():
        if name == "dense":
            continue
        row["kept"] = {str(c): bootstrap(of_oracle([kept[name, c]], kept["oracle", c]))
                       for c in contexts}
        if "default" in butlers:
            pairs = zip(kept[name, contexts[-1]], kept["default", contexts[-1]], strict=True)
            row["over_default"] = bootstrap([[a - b for a, b in pairs]])
        if isinstance(butlers.get(name), Butler):
            row["parameters"] = train.parameters(butlers[name])
    return rows


def main(config: Config) -> dict:
    known("row", config.only, VARIANTS)
    text_of(config.text)
    check_device(config.device)
    wanted = {n: v for n, v in VARIANTS.items() if not config.only or n in config.only}
    trained = {n: v for n, v in wanted.items() if not v.selection}
    if len(trained) < len(wanted):
        trained = {"default": VARIANTS["default"]} | trained  # they go another way with its weights
    path = resolve(config.model)
    llama = Llama.from_pretrained(path, fast_dtype(config.device), config.device)
    tok = tokenizer.load(path).check(llama)
    windows = evenly(tok, text_of(config.text), config.windows, max(map(int, config.contexts)))
    butlers = train_all(trained, llama, tok, config)
    for name, v in wanted.items():
        if v.selection:
            butlers[name] = SimpleNamespace(selector=partial(v.selection, butlers["default"]))
    report = {"rows": measure(butlers, windows.to(llama.device), llama, tok, config)} | provenance()
    print(tables.ablations({"config": vars(config)} | report))
    return tables.write(config, report, "ablations")


if __name__ == "__main__":
    run(main, Config)
