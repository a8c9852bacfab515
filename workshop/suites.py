"""workshop/suites.py - more measures of quality for bench.py, each from text to mean and interval.

    recall       layer by layer, every position of a window under its own selection: the share of
                 the true attention that is kept, the rank correlation of scores and attention, and
                 the error of the attention's output
    generation   sampled texts: the share of their 8-grams that occurred in the text before
    drift        tasks, answered token by token, with a new choice at every step (drift 0) and with
                 --drift: scores, and the steps that one choice served on average
    tradeoff     for a model of your own, one table: scores in tasks, agreement with the dense
                 model, milliseconds and bytes of a decode step. With --engine transformers the
                 model may be of another family
    prefill      prompts read densely and through each selector: the perplexity of the 512 tokens
                 behind them, which attend to all tokens, and the seconds that reading took
    agreement    a context read densely but for its last 128 tokens, which go through each selector
                 one by one: the share of them behind which the likeliest next token is the dense
                 model's, and KL(dense || sparse) in nats. Then the model writes: how many tokens
                 until its greedy text differs from the dense model's, 64 if it never does

    python bench.py --suite recall --selectors oracle,butler,recency
    python bench.py --suite generation --engine fast --contexts 2048 --selectors dense,butler
    python bench.py --suite drift --engine fast --drift 0.25 --task coreference --contexts 361
    python bench.py --suite tradeoff --model DIR --contexts 4096 --budgets 0.05,0.1
    python bench.py --suite prefill --engine fast --contexts 4096 --selectors dense,oracle,butler
    python bench.py --suite agreement --engine fast --contexts 4096 --budgets 0.05,0.1,0.25
"""

import statistics
import sys
import time
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import sample
import synth_task
from bench import Probe, excess, exponential, speed, synchronize, watched_by
from cli import UserError, numbers
from data import evenly_spaced, text_to_measure_on
from kernel import index_to_mask, true_attention
from selection import Selector, prefill
from synth_task import (
    answers,
    confidence_interval,
    evaluate,
    every_maker,
    likeliest,
    print_results,
    rules_of,
)

PROMPT = 64  # tokens that a generated text starts from
BEHIND = 512  # tokens behind a prompt that `prefill` scores
FORCED = 128  # last tokens of a context that `agreement` compares with the dense model
WRITTEN = 64  # tokens that it then writes


def task_documents(config, tok, limit: int) -> dict:
    """bench.py's --task, --contexts, --n and --seed -> {task: its documents}; limit: the model's
    context."""
    return synth_task.task_documents(
        synth_task.Config(task=config.task, context=config.contexts, n=config.n,
                          seeds=(str(config.seed),)), tok, limit)


# ---------------------------------------------------------------------------- recall


def spearman(a, b, seen):
    """Rank correlation along the last axis over the entries where `seen` is true; ties share their
    mean rank. a, b [..., S], seen booleans [..., S] -> [...]; NaN where all entries tie."""
    seen = seen.expand(a.shape)
    count = seen.sum(-1, keepdim=True)

    def centred_ranks(x):
        x = x.masked_fill(~seen, torch.inf).contiguous()
        ordered = x.sort(dim=-1).values
        first = torch.searchsorted(ordered, x)
        last = torch.searchsorted(ordered, x, right=True)
        ranks = ((first + last) * 0.5).masked_fill(~seen, 0)
        return (ranks - ranks.sum(-1, keepdim=True) / count).masked_fill(~seen, 0)

    a, b = centred_ranks(a), centred_ranks(b)
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


class LayerProbe(Probe):
    """bench.Probe, and two more measures by layer, means over queries and heads:

    spearman   rank correlation of scores and attention, of selectors that score all tokens
    error      |o' - o| / |o|, where o is the attention's output over all tokens and o' that over
               the selected ones
    """

    def __init__(self, selector, cache):
        super().__init__(selector)
        self.cache = cache
        self.spearman = {}
        self.error = {}

    def __call__(self, layer, x, q, keys, positions):
        index = super().__call__(layer, x, q, keys, positions)
        if index is None:
            return None
        S = keys.shape[2]
        attention = true_attention(q, keys)  # [B, G, H/G, T, S]
        values = self.cache.v[layer][:, :, None, :S].float()
        kept = attention * index_to_mask(index, S)[:, :, None]
        dense = attention @ values
        sparse = kept / kept.sum(-1, keepdim=True) @ values
        error = (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)
        self.error[layer] = error.mean().item()
        if scores_all_tokens(self.selector):
            scores = self.selector.scores(layer, q, keys, positions)
            before = torch.arange(S, device=q.device) < positions[:, None]  # [T, S]
            rho = spearman(scores.float(), attention.mean(2), before)
            self.spearman[layer] = rho.nanmean().item()  # one token has no order: NaN
        return index


def scores_all_tokens(selector) -> bool:
    """Selectors that evict have no scores of their own."""
    return getattr(type(selector), "scores", Selector.scores) is not Selector.scores


@torch.inference_mode()
def recall(llama, windows, makers) -> dict:
    """windows [n, T] -> {"results": means over the layers, "layers": means over the windows, a list
    with an entry for each layer from 1 on}"""
    results, layers = {}, {}
    for (name, budget), make in makers.items():
        if name == "dense":
            continue  # selects nothing
        seen = {}  # {measure: [{layer: value} of each window]}
        for window in tqdm(windows, f"{name} {budget}", file=sys.stderr):
            cache = llama.new_cache(1, len(window))
            probe = LayerProbe(make(), cache)
            llama(window[None], cache, probe, last=1)
            for measure in ("kept", "error", "spearman"):
                if by_layer := getattr(probe, measure):
                    seen.setdefault(measure, []).append(by_layer)
        for measure, by_window in seen.items():
            means = [sum(by_layer.values()) / len(by_layer) for by_layer in by_window]
            m = confidence_interval(means)
            results.setdefault(measure, {}).setdefault(name, {})[budget] = m
            layers.setdefault(measure, {}).setdefault(name, {})[budget] = [
                sum(by_layer[layer] for by_layer in by_window) / len(by_window)
                for layer in by_window[0]]
    return {"results": results, "layers": layers}


# ---------------------------------------------------------------------------- generation


def repeated(ids: list[int]) -> float:
    """Share of the 8-grams of a text that are not their first occurrence."""
    grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
    return 1 - len(set(grams)) / len(grams)


def generation(llama, tok, windows, length: int, makers, seed: int) -> dict:
    """Continues prompts [n, 64] to `length` tokens at temperature 0.8, the i-th prompt with the
    same random numbers for every selector."""
    shares, endings = {}, {}
    for (name, budget), make in makers.items():
        values = []
        for number, prompt in enumerate(tqdm(windows.tolist(), f"{name} {budget}",
                                             file=sys.stderr)):
            settings = sample.Config(temperature=0.8, top_p=1.0, seed=seed + number)
            cache = llama.new_cache(1, length)
            text = list(sample.generate(llama, cache, prompt, make(), settings, ends=()))
            values.append(repeated(text))
        shares.setdefault(name, {})[budget] = confidence_interval(values, proportion=True)
        endings.setdefault(name, {})[budget] = tok.decode(text)[-300:]
    return {"results": {"repeated 8-grams": shares}, "endings": endings}


# ---------------------------------------------------------------------------- drift


def drift(llama, tok, tasks: dict, makers: dict) -> dict:
    """tasks: {task: documents}; makers: see every_maker -> results; a selector that counts the
    steps of its choices adds their mean as `steps`."""
    results = {}
    for task, documents in tasks.items():
        scores, steps = [], {}
        for document in tqdm(documents, task, file=sys.stderr):
            made = {}

            def remember(key, make, made=made):
                made[key] = make()
                return made[key]

            several = [partial(remember, key, make) for key, make in makers.items()]
            scores.append(answers(llama, tok, document, several, stepwise=True))
            for key, selector in made.items():
                if hasattr(selector, "steps_per_choice"):
                    steps.setdefault(key, []).append(selector.steps_per_choice)
        results[task] = {}
        for (name, budget), column in zip(makers, zip(*scores, strict=True), strict=True):
            m = confidence_interval(column, proportion=True)
            if counted := steps.get((name, budget)):
                m["steps"] = sum(counted) / len(counted)
            results[task].setdefault(name, {})[budget] = m
    return {"results": results}


def drift_makers(config, butler) -> dict:
    """Those of the command line, the butler at drift 0 and at --drift."""
    if not config.drift or "butler" not in config.selectors:
        raise UserError("--suite drift compares the butler's choices at drift 0 with those at "
                        "--drift: name one above 0, and butler among --selectors")
    others = tuple(name for name in config.selectors if name != "butler")
    makers = every_maker(others, config.budgets)
    for allowed in (0.0, config.drift):
        rules = {"drift": allowed} if allowed else {}
        for (name, budget), make in every_maker(("butler",), config.budgets, butler,
                                                **rules).items():
            makers[f"{name}, drift {allowed:g}", budget] = make
    return makers


# ---------------------------------------------------------------------------- score and time


def tradeoff(llama, tok, windows, tasks: dict, makers: dict, config) -> dict:
    """windows [n, longest context] -> {"results": scores of the tasks and agreement, "rows": times
    and bytes, as bench.speed has them}"""
    stepwise = bool(rules_of(config))
    contexts = numbers(config.contexts, int, "--contexts")
    results = {task: evaluate(llama, tok, documents, makers, stepwise=stepwise, title=task)
               for task, documents in tasks.items()}
    results |= agreement(llama, windows, contexts, makers)["results"]
    return {"results": results,
            "rows": speed(llama, windows[:1], contexts, makers, config)}


def print_tradeoff(report: dict, tasks, makers) -> None:
    """One table for each context: a line for each selector and budget."""
    results = report["results"]

    def cell(what, name, budget) -> str:
        if name == "dense" and what not in tasks:
            return ""  # it is compared with itself
        m = results[what][name][budget]
        return f"{m['mean']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"

    for context, rows in groupby(report["rows"], key=lambda row: row["context"]):
        # Where there are several contexts, each task is there once for every one.
        columns = [task for task in tasks if task.split("@")[1:] in ([], [str(context)])]
        columns.append(f"same token @{context}")
        print(f"{'selector':24s} {'budget':>6s}  " + "".join(f"{c:24s}" for c in columns)
              + f"{'ms a step':>9s} {'MB a step':>9s}")
        for (name, budget), row in zip(makers, rows, strict=True):
            cells = "".join(f"{cell(what, name, budget):24s}" for what in columns)
            print(f"{name:24s} {budget:>6s}  {cells}{row['ms']:9.2f} {row['bytes'] / 1e6:9.1f}")


# ---------------------------------------------------------------------------- prompts


@torch.inference_mode()
def read_and_score(llama, window, context: int, selector, budget: float) -> tuple[float, float]:
    """Reads window[:context] through a selector (None: densely) -> seconds that it took, and mean
    nats of the 512 tokens that follow, which attend to all tokens."""
    cache = llama.new_cache(1, context + BEHIND)
    synchronize(llama.device)
    start = time.perf_counter()
    prefill(llama, window[None, :context], cache, selector, budget)
    synchronize(llama.device)
    seconds = time.perf_counter() - start
    behind = window[context : context + BEHIND]
    logits = llama(behind[None], cache)[0, :-1].float()
    return seconds, F.cross_entropy(logits, behind[1:]).item()


def prompts(llama, windows, contexts, makers) -> dict:
    """windows [n, longest context + 512] -> {"results": perplexity behind the prompts and, with the
    median `seconds` of reading beside it, the excess over dense}"""
    seconds, nats = {}, {}
    for window in tqdm(windows, "windows", file=sys.stderr):
        for context in contexts:
            for (name, budget), make in makers.items():
                took, loss = read_and_score(llama, window, context, make(), float(budget))
                seconds.setdefault((context, name, budget), []).append(took)
                nats.setdefault((context, name, budget), []).append(loss)
    results = {}
    for (context, name, budget), losses in nats.items():
        behind = exponential(confidence_interval(losses))
        behind["seconds"] = statistics.median(seconds[context, name, budget])
        results.setdefault(f"behind @{context}", {}).setdefault(name, {})[budget] = behind
        if name != "dense" and (dense := nats.get((context, "dense", "1.0"))):
            more = [a - b for a, b in zip(losses, dense, strict=True)]
            over = results.setdefault(f"over dense @{context}", {}).setdefault(name, {})
            over[budget] = excess(confidence_interval(more))
    return {"results": results}


# ---------------------------------------------------------------------------- agreement with dense


def check_agreement(llama, contexts, behind: int) -> None:
    """Raises UserError for contexts that are too short, or too long for `behind` tokens more."""
    if min(contexts) < 2 * FORCED:
        raise UserError(f"--contexts: a context has at least {2 * FORCED} tokens")
    if max(contexts) + behind > llama.config.context:
        raise UserError(f"--contexts: {max(contexts):,} tokens and {behind} behind them exceed the "
                        f"model's context of {llama.config.context:,}")


def force(llama, cache, block, selector):
    """Next-token logits [T, V] behind each token of a block [T], which go through decode steps."""
    steps = [llama.decode(token, cache, selector) for token in block[None].split(1, dim=1)]
    return torch.cat(steps, dim=1)[0].float()


def write(llama, cache, logits) -> list[int]:
    """The dense model's greedy text behind `logits` [V]."""
    text = []
    while True:
        token = likeliest(logits)
        text.append(int(token))
        if len(text) == WRITTEN:
            return text
        logits = llama.decode(token.view(1, 1), cache)[0, -1]


def equal_tokens(llama, cache, logits, selector, text: list[int]) -> int:
    """How many tokens at the beginning of the selector's greedy text are those of `text`."""
    for number, token in enumerate(text):
        if int(likeliest(logits)) != token:
            return number
        if number + 1 < len(text):
            logits = llama.decode(torch.tensor([[token]], device=llama.device), cache, selector)
            logits = logits[0, -1]
    return len(text)


@torch.inference_mode()
def agreement_behind(llama, window, makers: dict) -> dict:
    """window [T] -> {(selector, budget): (share of the last tokens behind which the likeliest token
    is the dense model's, mean KL in nats, tokens of equal text)}, without dense itself"""
    start = len(window) - FORCED
    cache = llama.new_cache(1, len(window) + WRITTEN - 1)
    selectors = {key: make() for key, make in makers.items() if key[0] != "dense"}
    llama.prefill(window[None, :start], cache, watched_by(selectors.values()))
    block = window[start:]
    dense = force(llama, cache, block, None)
    text = write(llama, cache, dense[-1])
    p = dense.log_softmax(-1)
    found = {}
    for key, selector in selectors.items():
        cache.truncate(start)
        logits = force(llama, cache, block, selector)
        same = (likeliest(logits) == likeliest(dense)).double().mean().item()
        kl = F.kl_div(logits.log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
        found[key] = (same, kl.mean().item(),
                      equal_tokens(llama, cache, logits[-1], selector, text))
    return found


def agreement(llama, windows, contexts, makers: dict) -> dict:
    """windows [n, longest context] -> {"results": same token, KL and equal text by context}"""
    seen = {}  # {(what, selector, budget): values of the windows}
    for context in sorted(contexts, reverse=True):
        for window in tqdm(windows, f"{context} tokens", file=sys.stderr):
            found = agreement_behind(llama, window[:context], makers)
            for (name, budget), values in found.items():
                for what, value in zip(("same token", "KL", "equal text"), values, strict=True):
                    seen.setdefault((f"{what} @{context}", name, budget), []).append(value)
    results = {}
    for (what, name, budget), values in seen.items():
        m = confidence_interval(values, proportion=what.startswith("same token"))
        results.setdefault(what, {}).setdefault(name, {})[budget] = m
    return {"results": results}


# ---------------------------------------------------------------------------- called by bench.py


def measure(config) -> dict:
    """bench.Config -> {"results": {what: {selector: {budget: mean and interval}}}} and, of some
    suites, more. Raises UserError."""
    if config.shape:
        raise UserError(f"--shape has random weights: no --suite {config.suite}")
    contexts = numbers(config.contexts, int, "--contexts")
    text = text_to_measure_on(config.text)
    llama, tok, butler = cli.engine(config.engine).load(config.model, config.butler, config.device)
    if config.suite == "drift":
        documents = task_documents(config, tok, llama.config.context)
        report = drift(llama, tok, documents, drift_makers(config, butler))
    else:
        makers = every_maker(config.selectors, config.budgets, butler, llama,
                             **rules_of(config))
        length = max(contexts)
        if config.suite == "tradeoff":
            check_agreement(llama, contexts, max(WRITTEN, config.n + 2))
            windows = evenly_spaced(tok, text, config.n, length).to(llama.device)
            tasks = task_documents(config, tok, llama.config.context)
            report = tradeoff(llama, tok, windows, tasks, makers, config)
            print_tradeoff(report, tasks, makers)
            return report
        elif config.suite == "prefill":
            windows = evenly_spaced(tok, text, config.n, length + BEHIND).to(llama.device)
            report = prompts(llama, windows, contexts, makers)
        elif config.suite == "agreement":
            check_agreement(llama, contexts, WRITTEN)
            windows = evenly_spaced(tok, text, config.n, length).to(llama.device)
            report = agreement(llama, windows, contexts, makers)
        elif config.suite == "generation":
            if length <= PROMPT + 8:
                raise UserError(f"--contexts: a text has more than {PROMPT + 8} tokens")
            windows = evenly_spaced(tok, text, config.n, PROMPT)
            report = generation(llama, tok, windows, length, makers, config.seed)
        else:
            windows = evenly_spaced(tok, text, config.n, length).to(llama.device)
            report = recall(llama, windows, makers)
    print_results(report["results"])
    print_more(report["results"])
    return report


def print_more(results: dict) -> None:
    """The numbers that some suites put beside mean and interval."""
    for task, table in results.items():
        for name, by_budget in table.items():
            for budget, m in by_budget.items():
                if "seconds" in m:
                    print(f"{task:20s} {name:8s} {budget:>6s}  {m['seconds']:8.2f} s to read")
                if "steps" in m:
                    print(f"{task:20s} {name:8s} {budget:>6s}  {m['steps']:8.1f} steps a choice")
