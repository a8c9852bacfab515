"""bench.py - what a selection costs and what it gains: perplexity, attention kept, milliseconds.

    perplexity   of windows of text in which every position attends to its own selection
    length       at the end of contexts of several lengths, read densely: which share of the true
                 attention do the selected tokens hold, and how well is the text predicted?
    speed        milliseconds of a decode step, all candidates by turns, beside what the bytes that
                 it reads would take at this machine's copy bandwidth

    python bench.py --suite length --contexts 512,2048
    python bench.py --suite speed --engine fast --budgets 0.05

More suites are in workshop/suites.py (recall, generation, drift, tradeoff, prefill, agreement) and
in workshop/timing.py (attention, offload, speed of a --shape with random weights).
"""

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
from cli import DEVICE, UserError, flag, numbers, plug_in
from data import evenly_spaced, text_to_measure_on
from kernel import index_to_mask, true_attention
from selection import NAMES
from synth_task import (
    check_selectors,
    confidence_interval,
    every_maker,
    print_bytes,
    print_results,
    rules_of,
)

BLOCK = 32  # tokens at the end of a context that `length` measures on
SUITES = ("perplexity", "length", "speed")
MORE_SUITES = {"workshop.suites": ("recall", "generation", "drift", "tradeoff", "prefill",
                                   "agreement"),
               "workshop.timing": ("attention", "offload")}


def watched_by(selectors):
    """What `prefill` takes for a selector: a dense reading that all `selectors` watch."""

    def watch(*seen):
        for selector in filter(None, selectors):
            selector.watch(*seen)

    return watch


class Probe:
    """A selector that selects what another one does (None: all tokens), and measures it.

    kept[layer]: the share of the true attention that falls on the selected tokens, averaged over
    queries and heads.
    """

    def __init__(self, selector):
        self.selector = selector
        self.kept = {}

    def look_ahead(self, *seen) -> None:
        if self.selector:
            self.selector.look_ahead(*seen)

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions) if self.selector else None
        if index is not None:
            selected = index_to_mask(index, keys.shape[2])[:, :, None]  # [B, G, 1, T, S]
            self.kept[layer] = (true_attention(q, keys) * selected).sum(-1).mean().item()
        return index

    def mean(self) -> float:
        """Over the layers that were selected for; 1 if there were none."""
        return sum(self.kept.values()) / len(self.kept) if self.kept else 1.0


# ---------------------------------------------------------------------------- quality


@torch.inference_mode()
def perplexity(llama, windows, makers) -> dict:
    """windows [n, T]: every position of a window attends to its own selection, as if the window
    were decoded token by token -> results, see main"""
    results = {"perplexity": {}, "over oracle": {}}
    nats = {}
    for key, make in makers.items():
        nats[key] = []
        for window in tqdm(windows, " ".join(key), file=sys.stderr):
            logits = llama(window[None], None, make())[0, :-1].float()
            nats[key].append(F.cross_entropy(logits, window[1:]).item())
    for (name, budget), values in nats.items():
        m = exponential(confidence_interval(values))
        results["perplexity"].setdefault(name, {})[budget] = m
        if name != "oracle" and ("oracle", budget) in nats:
            more = [a - b for a, b in zip(values, nats["oracle", budget], strict=True)]
            results["over oracle"].setdefault(name, {})[budget] = excess(confidence_interval(more))
    return results


def exponential(m: dict) -> dict:
    """The interval of mean nats -> that of perplexity."""
    return {key: value if key == "n" else math.exp(value) for key, value in m.items()}


def excess(m: dict) -> dict:
    """The interval of a difference in nats -> by which share one perplexity exceeds the other."""
    return {key: value if key == "n" else math.expm1(value) for key, value in m.items()}


@torch.inference_mode()
def kept_at_lengths(llama, window, contexts, makers):
    """Reads a window [T] densely, once. Then the last 32 tokens before each of `contexts` go
    through every selector -> yields (context, (selector, budget), Probe, mean nats of those
    tokens). The longest context comes first, so that no run reads what a selection wrote."""
    contexts = sorted(contexts, reverse=True)
    cache = llama.new_cache(1, contexts[0])
    llama.prefill(window[None, : contexts[0]], cache)
    for context in contexts:
        block = window[context - BLOCK : context]
        for key, make in makers.items():
            cache.truncate(context - BLOCK)
            probe = Probe(make())
            logits = llama(block[None], cache, probe)[0, :-1].float()
            nats = F.cross_entropy(logits, block[1:]).item()
            yield context, key, probe, nats


def length(llama, windows, contexts, makers) -> dict:
    """-> {"results": attention kept and perplexity at several lengths, also as a share of the
    oracle's, "layers": attention kept, means over the windows, a list from layer 1 on}"""
    kept, nats, by_layer = {}, {}, {}
    for window in tqdm(windows, "windows", file=sys.stderr):
        for context, key, probe, loss in kept_at_lengths(llama, window, contexts, makers):
            kept.setdefault((context, *key), []).append(probe.mean())
            nats.setdefault((context, *key), []).append(loss)
            by_layer.setdefault((context, *key), []).append(list(probe.kept.values()))
    results, layers = {}, {}

    def add(what, context, name, budget, m):
        results.setdefault(f"{what} @{context}", {}).setdefault(name, {})[budget] = m

    for (context, name, budget), shares in kept.items():
        add("kept", context, name, budget, confidence_interval(shares))
        losses = nats[context, name, budget]
        add("perplexity", context, name, budget, exponential(confidence_interval(losses)))
        oracle = (context, "oracle", budget)
        if name != "oracle" and oracle in kept:
            of_oracle = [a / b for a, b in zip(shares, kept[oracle], strict=True)]
            add("kept of oracle", context, name, budget, confidence_interval(of_oracle))
            more = [a - b for a, b in zip(losses, nats[oracle], strict=True)]
            add("over oracle", context, name, budget, excess(confidence_interval(more)))
        means = [statistics.mean(layer) for layer in zip(*by_layer[context, name, budget],
                                                         strict=True)]
        layers.setdefault(f"kept @{context}", {}).setdefault(name, {})[budget] = means
    return {"results": results, "layers": layers}


# ---------------------------------------------------------------------------- speed


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device) -> float:
    """Bytes per second of a large copy, bytes read plus bytes written."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)


def step_bytes(llama, cache, selector, batch: int, context: int) -> int:
    """What a decode step reads at least: the weights, all keys and values of layer 0 and of layers
    that selectors are not asked in (transformers' sliding windows, whose cache keeps all tokens),
    those of the selected tokens in the other layers (None: of all), and what the selector reads to
    choose."""
    c = llama.config
    dense = len(cache.k) - (c.layers - 1)  # layers that read all tokens
    token = 2 * c.kv_heads * c.head_dim * cache.k[0].element_size()  # key and value of one layer
    selected, choosing = context, 0
    if selector:
        selected = int(selector.budget.allowance(torch.tensor(context)))
        choosing = context * c.kv_heads * selector.bytes_per_token(c.head_dim)
    read = token * (dense * context + (c.layers - 1) * selected) + (c.layers - 1) * choosing
    return int(batch * read + llama.weight_bytes())


@torch.inference_mode()
def decode_times(llama, cache, token, context: int, selectors: dict, rounds: int) -> dict:
    """Every candidate decodes one token per round, in turn, so that a slow moment of the machine
    hits all of them. Each round stands one token further -> {candidate: median milliseconds}"""
    times = {key: [] for key in selectors}
    for turn in tqdm(range(rounds + 2), "rounds", file=sys.stderr, leave=False):
        for key, selector in selectors.items():
            cache.truncate(context - 1 + turn)
            synchronize(llama.device)
            start = time.perf_counter()
            llama.decode(token, cache, selector)
            synchronize(llama.device)
            if turn > 1:  # the first two compile and warm up
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(ms) for key, ms in times.items()}


def timed_rows(times: dict, reads: dict, batch: int, context: int, config, bandwidth) -> list[dict]:
    """times, reads: {(selector, budget): milliseconds, bytes} of a step -> rows; `speedup` is over
    the dense step."""
    dense = times.get(("dense", "1.0"))
    return [{"suite": config.suite, "engine": config.engine, "device": config.device,
             "shape": config.shape, "batch": batch, "context": context, "selector": name,
             "kept": float(budget), "ms": ms,
             "bandwidth_ms": 1e3 * reads[name, budget] / bandwidth,
             "tokens_per_s": 1e3 * batch / ms, "bytes": reads[name, budget],
             "speedup": dense and dense / ms}
            for (name, budget), ms in times.items()]


@torch.inference_mode()
def speed(llama, windows, contexts, makers, config) -> list[dict]:
    """Decode steps behind windows [B, T] of text -> rows, one for each candidate and context."""
    bandwidth = copy_bandwidth(llama.device)
    rows = []
    batch = len(windows)
    for context in contexts:
        cache = llama.new_cache(batch, context + config.n + 2)
        selectors = {key: make() for key, make in makers.items()}
        llama.prefill(windows[:, : context - 1], cache, watched_by(selectors.values()))
        token = windows[:, context - 1 : context]
        times = decode_times(llama, cache, token, context, selectors, config.n)
        reads = {key: step_bytes(llama, cache, selector, batch, context)
                 for key, selector in selectors.items()}
        rows += timed_rows(times, reads, batch, context, config, bandwidth)
    return rows


def print_rows(rows: list[dict]) -> None:
    print(f"{'context':>8s} {'batch':>5s}  {'selector':24s} {'kept':>6s} {'ms a step':>10s} "
          f"{'by bytes':>9s} {'tokens/s':>9s} {'x dense':>8s}")
    for row in rows:
        speedup = "" if row["speedup"] is None else f"{row['speedup']:8.2f}"
        print(f"{row['context']:8,} {row['batch']:5d}  {row['selector']:24s} {row['kept']:6g} "
              f"{row['ms']:10.2f} {row['bandwidth_ms']:9.2f} {row['tokens_per_s']:9.1f} {speedup}")


# ---------------------------------------------------------------------------- the script


@dataclass
class Config:
    """Measures what a selection costs in quality and what it gains in time."""

    suite: str = flag("length", "perplexity, length, speed; of workshop/: recall, generation, "
                                "drift, tradeoff, prefill, agreement, attention, offload")
    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    butler: str = flag(None, "butler file (default: the shipped one)")
    engine: str = flag("plain", f"what runs the model: {', '.join(cli.ENGINES)}")
    selectors: tuple = flag(("dense", "oracle", "butler", "recency"),
                            f"comma-separated, of {', '.join(NAMES)}")
    budgets: tuple = flag(("0.1",), "comma-separated fractions or counts of tokens attended")
    contexts: tuple = flag(("512", "2048"), "comma-separated numbers of cached tokens; perplexity: "
                                            "the length of a window")
    text: str = flag(None, "text file (default: Python's own text, the part not trained on)")
    n: int = flag(20, "windows of text, documents; of timed suites rounds", at_least=1)
    batch: int = flag(1, "speed: texts of equal length in one step", at_least=1)
    task: tuple = flag(("needle_prose",), "drift, tradeoff: comma-separated tasks")
    interval: int = flag(1, "steps that one choice of the butler serves (plain engine)", at_least=1)
    neighbours: int = flag(0, "tokens that a chosen one brings on either side (plain engine)")
    drift: float = flag(0.0, "how far a query may turn before the butler chooses anew (fast "
                             "engine), 1 - cosine", at_most=2)
    shape: str = flag(None, "timed suites: random weights in this shape, see workshop/timing.py")
    memory: float = flag(0.0, "offload: share of the cache that may stay in memory; 0: no limit",
                         at_most=1)
    seed: int = flag(0, "seed of documents and sampling")
    write: str = flag(None, "also write the report to this JSON file")
    device: str = flag(DEVICE, "cpu or cuda")


def measure(config: Config) -> dict:
    """-> {"results": {what: {selector: {budget: mean and interval}}}} or {"rows": [...]}"""
    for module, suites in MORE_SUITES.items():
        if config.suite in suites:
            return plug_in(module).measure(config)
    cli.known("suite", config.suite, (*SUITES, *sum(MORE_SUITES.values(), ())))
    if config.shape:
        return plug_in("workshop.timing").measure(config)
    contexts = numbers(config.contexts, int, "--contexts")
    if config.suite == "length" and min(contexts) < 2 * BLOCK:
        raise UserError(f"--contexts: a context has at least {2 * BLOCK} tokens")
    text = text_to_measure_on(config.text)
    llama, tok, butler = cli.engine(config.engine).load(config.model, config.butler, config.device)
    last = max(contexts) + (config.n + 2 if config.suite == "speed" else 0)
    if last > llama.config.context:
        raise UserError(f"--contexts: {last:,} tokens exceed the model's context of "
                        f"{llama.config.context:,}")
    makers = every_maker(config.selectors, config.budgets, butler, llama, **rules_of(config))
    number = config.batch if config.suite == "speed" else config.n
    windows = evenly_spaced(tok, text, number, max(contexts)).to(llama.device)
    if config.suite == "speed":
        rows = speed(llama, windows, contexts, makers, config)
        print_rows(rows)
        return {"rows": rows}
    if config.suite == "perplexity":
        report = {"results": perplexity(llama, windows, makers)}
    else:
        report = length(llama, windows, contexts, makers)
    print_results(report["results"])
    return report | {"bytes": print_bytes(makers, llama.config.head_dim)}


def main(config: Config) -> dict:
    cli.check_device(config.device)
    check_selectors(config.selectors, config.budgets)
    for task in config.task if config.suite in ("drift", "tradeoff") else ():
        cli.known("task", task, ("coreference", *plug_in("workshop.ruler").TASKS))
    if config.write is not None:
        cli.check_writable(config.write)
    report = measure(config)
    if config.write is not None:
        whole = {"config": asdict(config)} | report | cli.provenance()
        with cli.replacing(config.write) as part:
            Path(part).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    cli.run(main, Config)
