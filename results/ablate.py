"""results/ablate.py - one change at a time: what each choice of the default butler is worth.

Butlers that differ in one thing are trained side by side, on the same texts and rows: the frozen
model's forward, which they share, is done once. Then all are measured on the same windows and
documents, so that a difference to the default row is paired. --only trains a few of them.

    python results/ablate.py --text FILE [--only stride=3,size=8] [--write]

kept      attention mass kept at 10 % of the tokens, beside the default row's: difference, 95 %
over      perplexity over the oracle's, at 10 and 25 %
tasks     answers exact: co-reference at 7 % of the tokens, needles at 5 %
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench
import tokenizer
import train
from baselines import BASELINES, Oracle, Probe, mean
from butler import Butler, ButlerConfig, ButlerSelector, Producer
from cli import flag, known, names, provenance, run
from coreference import pools
from corpus import Mixture, default_texts, hold_out
from model import Llama, check_device, fast_dtype, resolve, rotate, turns
from synth_task import accuracy, bootstrap, evaluate, task_documents


@dataclass
class Config:
    """Trains butlers that differ in one thing, side by side, and compares them."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    only: tuple = flag((), "comma-separated rows (default: all)", names)
    steps: int = flag(160, "optimiser steps of the default row", least=1)
    text: str = flag(None, "text file to measure on (default: Python's reference, held-out part)")
    windows: int = flag(6, "windows of 512 tokens to measure on", least=1)
    documents: int = flag(40, "co-reference documents to answer", least=1)
    write: bool = flag(False, "write results/ablations.json, redraw tables")
    device: str = flag("cpu", "cpu or cuda")


# ---------------------------------------------------------------------------- the variants


class SameInput(Butler):
    """The producer at layer p serves p ... p+R-1 instead of p+1 ... p+R: no layer of look-ahead."""

    def __init__(self, config):
        super().__init__(config)
        last = max(map(int, self.producers))
        self.producers[str(last)] = Producer(config, config.layers - last)

    def queries(self, layer, x):
        return {served - 1: q for served, q in super().queries(layer, x).items()}


class Moved(Butler):
    """In training a text stands anywhere in the context. What a rotary model attends to depends on
    distances alone, so the teacher stays; importance keys see the keys turned further."""

    def project(self, layer, keys):
        if not self.training:
            return super().project(layer, keys)
        if layer == 1:
            start = random.randrange(self.context - keys.shape[2] + 1)
            self.turn = turns(self.frequencies * start)
        return super().project(layer, rotate(keys.float(), *self.turn))


class GroupMax(ButlerSelector):
    """The paper's reduction: the largest raw score of the group's query heads."""

    def rate(self, queries, keys, positions):
        return self.butler.scores(queries, keys.transpose(-1, -2)).amax(3)

    choose_by_triton = ButlerSelector.choose_ahead  # Triton knows the mean of softmaxes only


class Int8Keys(ButlerSelector):
    """Importance keys rounded to 8 bits with a scale per token."""

    def importance_keys(self, layers, S):
        exact = super().importance_keys(layers, S)
        scale = exact.abs().amax(-2, keepdim=True).clamp(min=1e-9) / 127
        return (exact / scale).round() * scale


def rival(name, butler, budget, **rules):
    """Another selector in the predictor's place, under its rules."""
    return BASELINES[name](budget, **rules)


@dataclass
class Variant:
    """How a row differs from the default one; `selection` needs no training of its own."""

    sizes: dict | None = None
    kv: bool = False  # one importance query per KV head instead of per query head
    kind: type = Butler
    grouped: tuple = (False,)  # divergences that the loss sums: of each head, of a group's mean
    texts: tuple = (2,)  # how many in a batch of 1024 tokens; by turns, if several
    share: float = 1.0  # of the steps, and so of the training tokens
    synthetic: float = 0.3
    repeats: int = 2
    start: str = "random"
    selection: Callable | None = None  # butler, budget -> selector


# what is asked of every row: task -> context, documents at most, budget
TASKS = {"coreference": (None, 40, "0.07"), "needle_uuid": (1024, 12, "0.05"),
         "needle_noise": (2048, 8, "0.05")}
REUSED, RIVALS = {"interval": 4, "neighbours": 1}, ("random", "keynorm")
VARIANTS = {
    "default": Variant(),
    **{f"stride={r}": Variant({"stride": r}) for r in (1, 2, 3, 6, 10)},
    **{f"size={e}": Variant({"size": e}) for e in (8, 32)},
    "query per KV head": Variant(kv=True),
    "loss per group": Variant(grouped=(True,)),
    "loss per head and per group": Variant(grouped=(False, True)),
    "texts of 256": Variant(texts=(4,)),
    "texts of 1024": Variant(texts=(1,)),
    "texts of 512 and 1024 by turns": Variant(texts=(2, 1)),
    "1/4 of the tokens": Variant(share=0.25),
    "1/2 of the tokens": Variant(share=0.5),
    "no co-reference text": Variant(synthetic=0.0),
    "no repeated strings": Variant(repeats=0),
    "texts anywhere in the context": Variant(kind=Moved),
    "serving p to p+R-1": Variant(kind=SameInput),
    "W_K from principal axes": Variant(start="principal"),
    "max over the group": Variant(selection=GroupMax),
    "int8 importance keys": Variant(selection=Int8Keys),
    "interval 4 + neighbours 1": Variant(selection=partial(ButlerSelector, **REUSED)),
    "neighbours 1": Variant(selection=partial(ButlerSelector, neighbours=1)),
    **{f"{name} instead": Variant(selection=partial(rival, name)) for name in RIVALS},
    **{f"{name} instead + interval 4 + neighbours 1":
       Variant(selection=partial(rival, name, **REUSED)) for name in RIVALS},
}


def build(variant: Variant, llama, first) -> Butler:
    """An untrained butler; `first` is a Recorder's look at one text, for the principal axes."""
    torch.manual_seed(0)
    random.seed(0)
    config = ButlerConfig.for_model(llama, **(variant.sizes or {}))
    if variant.kv:
        config = replace(config, heads=config.kv_heads)
    butler = variant.kind(config).to(llama.device)
    butler.frequencies, butler.context = llama.frequencies.to(llama.device), llama.config.context
    if variant.start == "principal":
        for layer in range(1, config.layers):
            keys = first.keys[layer].float().transpose(0, 1).flatten(1, 2)  # [G, N, D]
            axes = torch.linalg.svd(keys, full_matrices=False).Vh[:, : config.size]
            butler.key_projection.data[layer - 1] = axes.transpose(1, 2)
    return butler


# ---------------------------------------------------------------------------- training, measuring


def train_all(variants: dict, llama, tok, config) -> dict:
    """-> {name: trained butler}. Rows that share texts share the frozen model's forward."""
    settings = train.Config()
    splits = [kept for kept, _ in map(hold_out, default_texts())]
    phrases, butlers, groups = pools("train"), {}, {}
    for name, v in variants.items():
        groups.setdefault((v.texts, v.synthetic, v.repeats), {})[name] = v
    for (texts, synthetic, repeats), members in groups.items():
        mixture, learners = Mixture(tok, splits, phrases, synthetic, repeats), {}
        for step in tqdm(range(config.steps), desc=", ".join(members)[:60], file=sys.stderr):
            if step % settings.reuse == 0:
                number = step // settings.reuse
                count = texts[number % len(texts)]
                length = settings.batch * settings.length // count
                tokens = train.texts(mixture, f"0 {number}", count, length)
                seen = train.record(llama, tokens.to(llama.device))
                rows = settings.batch * settings.rows // count
            for name, v in members.items():
                if name not in learners:
                    butler = build(v, llama, seen)
                    learners[name] = (butler, train.make_optimizers(butler, settings.learning_rate))
                steps = round(v.share * config.steps)
                if step < steps:
                    drawn = train.sample_rows(random.Random(f"0 {step}"), rows, length)
                    look = learners[name][0], seen, drawn.to(llama.device)
                    loss = sum(train.distillation(*look, grouped).mean() for grouped in v.grouped)
                    train.update(*learners[name], loss,
                                 settings.learning_rate * train.schedule(step, steps))
        for name, (butler, _) in learners.items():
            butlers[name] = butler.eval().requires_grad_(False)
    return butlers


def measure(butlers: dict, windows, llama, tok, config) -> dict:
    """-> {row: {"answers", "kept", "over_oracle_0.1", "kept_over_default", "parameters" ...}}"""
    loss, kept = {}, {}
    makers = {"oracle": Oracle} | {name: butler.selector for name, butler in butlers.items()}
    for name, make in tqdm(makers.items(), desc="windows", file=sys.stderr):
        for budget in (0.1, 0.25):
            probes = [Probe(make(budget)) for _ in windows]
            loss[name, budget] = [bench.nats(llama, window, probe)
                                  for window, probe in zip(windows, probes, strict=True)]
            kept[name, budget] = [mean(probe.mass) for probe in probes]
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
    rows["oracle"]["kept"] = bootstrap([kept["oracle", 0.1]])
    for name, butler in butlers.items():
        rows[name]["kept"] = bootstrap([kept[name, 0.1]])
        for budget in (0.1, 0.25):
            over = bench.excess([loss[name, budget]], loss["oracle", budget])
            rows[name][f"over_oracle_{budget}"] = over
        if "default" in butlers:
            pairs = zip(kept[name, 0.1], kept["default", 0.1], strict=True)
            rows[name]["kept_over_default"] = bootstrap([[a - b for a, b in pairs]])
        if isinstance(butler, Butler):
            rows[name]["parameters"] = train.parameters(butler)
    return rows


def table(report: dict) -> str:
    tasks = next(iter(report["rows"].values()))["answers"]
    lines = [f"{'row':45s} parameters   kept  over default [95 %]        over oracle 10 %, 25 %  "
             + "  ".join(tasks)]
    for name, row in report["rows"].items():
        d, size = row.get("kept_over_default"), row.get("parameters")
        lines.append(
            f"{name:45s} {f'{size:,}' if size else '':>10s}"
            + (f"  {row['kept']['mean']:.3f}" if "kept" in row else " " * 7)
            + (f"  {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else " " * 28)
            + "".join(f"  {row[k]['mean']:+8.2%}" if k in row else " " * 10
                      for k in ("over_oracle_0.1", "over_oracle_0.25")) + "    "
            + "  ".join(f"{row['answers'][t]['mean']:{len(t)}.2f}" for t in tasks))
    c, n = report["config"], ", ".join(f"{m['n']}" for m in tasks.values())
    return "\n".join([*lines, "", f"{c['steps']} steps each, {c['windows']} windows of 512 tokens, "
                      f"documents: {n}; {report['hardware']}; commit {report['commit']}\n"
                      f"{report['command']}"])


def main(config: Config) -> dict:
    known("row", config.only, VARIANTS)
    bench.text_of(config.text)
    check_device(config.device)
    wanted = {n: v for n, v in VARIANTS.items() if not config.only or n in config.only}
    trained = {n: v for n, v in wanted.items() if not v.selection}
    if len(trained) < len(wanted):
        trained = {"default": VARIANTS["default"]} | trained  # they go another way with its weights
    path = resolve(config.model)
    llama = Llama.from_pretrained(path, fast_dtype(config.device), config.device)
    tok = tokenizer.load(path).check(llama)
    setting = bench.Bench(llama, tok, [], bench.Config(n=config.windows, text=config.text))
    windows = setting.windows(512)
    butlers = train_all(trained, llama, tok, config)
    for name, v in wanted.items():
        if v.selection:
            butlers[name] = SimpleNamespace(selector=partial(v.selection, butlers["default"]))
    report = {"rows": measure(butlers, windows, llama, tok, config)} | provenance()
    print(table({"config": vars(config)} | report))
    return bench.write(config, report, "ablations")


if __name__ == "__main__":
    run(main, Config)
