"""measure/speed.py - what a decode step costs: its attention alone, and the whole of it.

    shape -> caches of random keys and values, `context` tokens long -> candidates, by turns -> rows

    attention   all layers' attention of one step, choosing included, and its stages alone
    speed       whole steps of a Llama of that shape
    tradeoff    a task's score beside what sample.py's step takes behind its first document

Dense is whatever is fastest here. In `attention` that is `scaled_dot_product_attention` with the
group's heads as queries of one KV head or as PyTorch groups them, or two matrix products, each on
the weights' format and on float32; in `speed` the model's own dense step with a cache of either
format, on a GPU replayed from a CUDA graph too (graph.py; not measured yet). A choice for nothing,
made once and then kept, is the bound of every selector, the oracle among them. Every candidate runs
once a round, in turn, so that a slow moment of the machine hits all; a row holds the median.
`predicted_ms` is bytes moved over this machine's copy bandwidth, measured too: what the step would
cost if memory were all that counts. On a CPU dense, butler and what attends to a choice have
compiled forms; oracle and rivals rank in plain PyTorch, a bound rather than a race.

    python bench.py --suite attention --shape smollm2-135m --contexts 2048,8192
    python bench.py --suite speed --contexts 8000
    python bench.py --suite tradeoff --budgets 0.05,0.1,0.25 --n 20
    python -m measure.speed        what reading the weights alone costs on this machine
"""

import functools
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from tqdm import tqdm

from beyond.graph import stepper
from butler import Butler, ButlerConfig, load_for
from common.errors import ModelError, in_one_line
from common.files import read_text
from cpu.loops import FEW
from kernel import on_gpu, sparse_attention
from loading.weights import Config
from measure.intervals import accuracy
from model import Llama, dense_attention, fast_dtype, resolve, rope_frequencies
from tasks.evaluation import EVICTING, Prompts, at_contexts, evaluate

SHAPES = {
    "smollm2-135m": Config(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64,
                           mlp_width=1536, context=2**20, rope_theta=1e5, tied=True),
    "llama-3.2-1b": Config(vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8,
                           head_dim=64, mlp_width=8192, context=2**20, rope_theta=5e5, tied=True),
    "llama-3.1-8b": Config(vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8,
                           head_dim=128, mlp_width=14336, context=2**20, rope_theta=5e5),
}


def shape_of(name: str) -> Config:
    """One of SHAPES, or that of a config.json; for speed alone, so of any context."""
    if name in SHAPES:
        return SHAPES[name]
    neither = f"shape {name!r} is none of {', '.join(SHAPES)}, and no config.json"
    with in_one_line(ModelError, neither, "unusable"):
        return replace(Config.from_hugging_face(json.loads(read_text(name))), context=2**20)


def by_turns(candidates: dict, rounds: int, device) -> dict:
    """{name: function} -> {name: median seconds of a call}."""
    seconds = {name: [] for name in candidates}
    for number in tqdm(range(rounds + 1), file=sys.stderr, leave=False):
        for name, function in candidates.items():
            settle(device)
            began = time.perf_counter()
            function()
            settle(device)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def settle(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device) -> float:
    """Bytes per second of a large copy, read and written ones."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = by_turns({"copy": lambda: target.copy_(source)}, 7, device)
    return 2 * source.nbytes / seconds["copy"]


def by_group(attend):
    """Attention with the group's heads as queries of one KV head."""
    return lambda q, k, v: attend(q.view(*k.shape[:2], -1, q.shape[-1]), k, v).view(q.shape)


FORMATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # in which dense is tried
DENSE = {  # q [B, H, 1, D], k, v [B, G, S, D] -> [B, H, 1, D]
    "the model's": lambda q, k, v: dense_attention(
        q, k, v, torch.full((len(k), 1), k.shape[2] - 1), False),
    "group as queries": by_group(F.scaled_dot_product_attention),
    "enable_gqa": partial(F.scaled_dot_product_attention, enable_gqa=True),
    "two products": by_group(
        lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v)}


def attention(llama, butler, batch: int, context: int, config) -> dict:
    """One step's attention of all layers but the first, which is dense for everybody, on random
    keys and values -> candidates: {name: (function, kept, chooses)}, see `moved`."""
    c, device = llama.config, llama.device
    cache = filled(llama, batch, context)
    q = torch.randn(c.layers, batch, c.heads, 1, c.head_dim, device=device).to(cache.k[0].dtype)
    x = torch.randn(batch, 1, c.width, device=device)
    positions = torch.full((batch, 1), context - 1, device=device)
    k, v = ([t[:, :, :context] for t in ts] for ts in (cache.k, cache.v))
    candidates = {}

    def attend(form, q, k, v, *index):
        for layer in range(1, c.layers):
            form(q[layer], k[layer], v[layer], *index)

    for kind, dtype in FORMATS.items():
        converted = q.to(dtype), [t.to(dtype) for t in k], [t.to(dtype) for t in v]
        for name, form in DENSE.items():
            candidates[f"dense, {name}, {kind}"] = partial(attend, form, *converted), None, False

    def step(selector, attending=True):
        for layer in range(c.layers):
            index = selector(layer, x, q[layer], k[layer], positions)
            if layer and attending:
                sparse_attention(q[layer], k[layer], v[layer], index)

    candidates |= butlers(butler, step, config)
    choose = partial(step, attending=False)
    for kept in map(float, config.budgets):
        selector = butler.selector(kept)
        step(selector)
        reading = partial(attend, sparse_attention, q, k, v, selector.index[1])
        candidates[f"choosing {kept:g} alone"] = partial(anew, choose, selector), 0.0, True
        candidates[f"attend to {kept:g} alone"] = reading, kept, False
    return candidates


def speed(llama, butler, batch: int, context: int, config) -> dict:
    """Whole decode steps behind `context` cached tokens -> candidates, as `attention`."""
    token, cache = torch.full((batch, 1), 5, device=llama.device), filled(llama, batch, context)

    def step(cache, selector=None):
        llama.decode(token, cache, selector)
        cache.truncate(context - 1)

    def replayed(selector=None):
        graph(selector)(token)
        cache.truncate(context - 1)

    graph = functools.cache(partial(stepper, llama, cache))  # one for each selector
    candidates = {f"dense, {kind}": (partial(step, filled(llama, batch, context, dtype)), None,
                                     False) for kind, dtype in FORMATS.items()}
    candidates |= butlers(butler, partial(step, cache), config)
    for kept in map(float, config.budgets):
        selector = butler.selector(kept)
        step(cache, selector)
        given = partial(lambda index, layer, *_: index.get(layer), dict(selector.index))
        given.early = bool  # asked before a layer's query is there
        candidates[f"choice for nothing, {kept:g}"] = partial(step, cache, given), kept, False
    if on_gpu(cache.lengths):
        graphs = {"dense": (replayed, None, False)} | butlers(butler, replayed, config)
        for function, *_ in graphs.values():  # plain steps; the round that warms up captures
            function()
        candidates |= {f"{name}, CUDA graph": graph for name, graph in graphs.items()}
    return candidates


def tradeoff(bench) -> dict:
    """bench: see bench.py -> {"results": {task: {selector: {budget: score, interval and ms}}}}"""
    c, llama, tok, results = bench.config, bench.llama, bench.tok, {}
    for task, documents in at_contexts(llama, tok, c.task, c.contexts, c.n, c.seed).items():
        scores = evaluate(llama, tok, documents, c.selectors, c.budgets, bench.butlers, task=task)
        ms = behind(llama, tok, documents[0], list(bench.makers()), c.n)
        results[task] = {name: {budget: accuracy(runs) | {"ms": ms[name, budget]}
                                for budget, runs in by.items()} for name, by in scores.items()}
    return {"results": results}


def behind(llama, tok, document, makers, rounds: int) -> dict:
    """makers: [(selector, budget, [makers of fresh ones])] -> {(selector, budget): milliseconds of
    a decode step behind the document's context}, all on the same keys and values; dense with a
    cache of the faster format."""
    evicting = [EVICTING[name] for name, *_ in makers if name in EVICTING]
    prompts = Prompts(llama, tok, [document], "sparse", evicting)
    token, size, candidates = prompts.block[:, :1], int(prompts.lengths), {}

    def converted(dtype):  # the same keys and values, and room for a token more
        cache = llama.new_cache(1, size + 1, dtype)
        for mine, its in zip(cache.k + cache.v, prompts.cache.k + prompts.cache.v, strict=True):
            mine[:, :, :size] = its[:, :, :size]
        cache.advance(size)
        return cache

    def step(advance, cache, *_):
        advance(token)
        cache.truncate(size)

    for name, budget, (make, *_) in makers:
        selector = make()
        prompts.begin(selector)
        for cache in [prompts.cache] if selector else map(converted, FORMATS.values()):
            function = partial(step, stepper(llama, cache, selector), cache)
            if name == "butler":
                function = partial(anew, function, selector)
            candidates[(name, budget), cache] = function
    with torch.inference_mode():
        for function in candidates.values():
            function()  # plain; on a GPU the round that warms up captures
        seconds, ms = by_turns(candidates, rounds, llama.device), {}
    for (key, _), t in seconds.items():
        ms[key] = min(1e3 * t, ms.get(key, math.inf))
    return ms


def butlers(butler, step, config) -> dict:
    """A candidate for each budget; every step chooses anew."""
    return {f"butler {kept:g}": (partial(anew, step, butler.selector(kept)), kept, True)
            for kept in map(float, config.budgets)}


def anew(step, selector) -> None:
    """A step again; the text would have grown by a token since, whose key is taken for new."""
    selector.importance.filled = [max(n - 1, 0) for n in selector.importance.filled]
    step(selector)


def filled(llama, batch: int, context: int, dtype=None):
    """A cache of random keys and values, with room for the last of `context` tokens."""
    cache = llama.new_cache(batch, context, dtype)
    fill(cache, context - 1, cache.k + cache.v)
    return cache


def fill(cache, tokens: int, tables: list) -> None:
    """Random numbers in all `tables` of a cache, which then counts as `tokens` long."""
    for table in tables:
        table.normal_()
    cache.advance(tokens)


def moved(suite, llama, batch: int, context: int, kept, chooses, number: int, size: int) -> int:
    """Bytes that a step reads at least, `number` for each channel: keys and values, all or `kept`;
    importance keys of `size` channels where it `chooses`; in a whole step the dense first layer and
    the weights too."""
    c = llama.config
    token = 2 * c.kv_heads * c.head_dim * number  # of one layer
    attended = context if kept is None else context * kept if kept <= 1 else kept
    scored = chooses * context * c.kv_heads * (size + 4)  # in 8 bits, and a scale
    read = batch * (c.layers - 1) * (attended * token + scored)
    if suite == "speed":
        long, few, _ = weight_bytes(llama)
        read += batch * context * token + (few if batch <= FEW else long)
    return int(read)


def memory(llama, batch: int, context: int, kept, number: int, size: int) -> int:
    """Bytes held while decoding: weights, keys and values, importance keys; no room to grow."""
    c, held = llama.config, weight_bytes(llama)[2]
    token = c.layers * 2 * c.head_dim * number + (c.layers - 1) * (size + 4) * (kept is not None)
    return held + batch * context * c.kv_heads * token


def weight_bytes(llama) -> tuple[int, int, int]:
    """Bytes of weights that a long block of tokens reads; a few tokens, packed ones where there
    are; and that are held for both."""
    plain = sum(p.nbytes for p in llama.parameters())
    if llama.device.type != "cpu":
        return plain, plain, plain
    forms = [(form.matrices, block) for block in llama.layers if (form := block.packed)]
    if form := llama.packed_head:
        forms.append(([form.matrix], llama.lm_head))
    packed = sum(m.nbytes for matrices, _ in forms for m in matrices)
    instead = sum(m.weight.nbytes for _, module in forms for m in module.modules()
                  if isinstance(m, torch.nn.Linear))
    return plain, plain + packed - instead, plain + packed


def break_even(rows: list[dict]) -> dict:
    """{candidate: context from which on it was faster than dense}, for each batch; between two
    measured contexts the crossing is on a straight line in both logarithms."""
    lines = {}
    for row in rows:
        if row["kept"] is not None and "alone" not in row["selector"]:
            line = lines.setdefault(f"{row['selector']}, batch {row['batch']}", [])
            line.append((row["context"], row["speedup"]))
    return {name: crossing(sorted(line)) for name, line in lines.items()}


def crossing(line: list[tuple]) -> int | None:
    """Ascending (context, speedup) -> the context beyond which no speedup is below 1, if any."""
    found = line[0][0]
    for (context, speedup), (beyond, faster) in pairwise(line):
        if speedup < 1 <= faster:
            share = math.log(1 / speedup) / math.log(faster / speedup)
            found = round(context * (beyond / context) ** share)
    return found if line[-1][1] >= 1 else None


def measure(config) -> dict:
    """All contexts and batches of one suite -> {"rows": [...], "copy_bytes_per_s": ...}."""
    llama, butler = model_of(config)
    if config.suite == "speed" and max(map(int, config.contexts)) > llama.config.context:
        raise ModelError(f"the model's context is {llama.config.context} tokens, --contexts go "
                         "beyond it")
    rate, rows = copy_bandwidth(config.device), []
    size, dtype = butler.config.size, llama.new_cache(1, 1).k[0].dtype
    for batch, context in product(map(int, config.batch), map(int, config.contexts)):
        with torch.inference_mode():
            candidates = SUITES[config.suite](llama, butler, batch, context, config)
            seconds = by_turns({name: function for name, (function, *_) in candidates.items()},
                               config.n, config.device)
        dense = min(t for name, t in seconds.items() if name.startswith("dense"))
        for name, (_, kept, chooses) in candidates.items():
            number = FORMATS.get(name.split()[-1], dtype).itemsize
            read = moved(config.suite, llama, batch, context, kept, chooses, number, size)
            rows.append({
                "suite": config.suite, "device": config.device, "shape": config.shape,
                "batch": batch, "context": context, "selector": name, "kept": kept,
                "ms": 1e3 * seconds[name], "predicted_ms": 1e3 * read / rate, "bytes": read,
                "tokens_per_s": batch / seconds[name], "speedup": dense / seconds[name],
                "memory_bytes": memory(llama, batch, context, kept, number, size)})
    return {"rows": rows, "copy_bytes_per_s": rate, "break_even": break_even(rows)}


def model_of(config):
    """The model of --model with its butler, or one of --shape with random weights."""
    if config.shape is None:
        llama = Llama.from_pretrained(resolve(config.model), fast_dtype(config.device),
                                      config.device)
        return llama, load_for(llama, *config.butler)
    torch.set_default_dtype(fast_dtype(config.device))
    with torch.device(config.device):
        llama = Llama(shape_of(config.shape)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    llama.frequencies = rope_frequencies(llama.config)
    butler = Butler(ButlerConfig.for_model(llama)).to(config.device)
    return llama, butler.eval().requires_grad_(False)


def table(report: dict) -> str:
    lines = [f"{'context':>8s} {'batch':>5s}  {'':41s} {'ms a step':>10s} {'by bytes':>9s} "
             f"{'tokens/s':>9s} {'x dense':>8s} {'memory, MB':>11s}"]
    lines += [f"{r['context']:8,} {r['batch']:5}  {r['selector']:41s} {r['ms']:10.2f} "
              f"{r['predicted_ms']:9.2f} {r['tokens_per_s']:9.1f} {r['speedup']:8.2f} "
              f"{r['memory_bytes'] / 1e6:11,.0f}" for r in report["rows"]]
    least, faster = min(r["context"] for r in report["rows"]), []
    for name, context in report["break_even"].items():
        fewer = " or fewer" * (context == least)
        faster.append(f"{name}: {f'{context:,} tokens{fewer}' if context else 'nowhere here'}")
    return "\n".join([*lines, "", "faster than dense from", *faster])


SUITES = {"attention": attention, "speed": speed}


if __name__ == "__main__":
    rate = copy_bandwidth("cpu")
    print(f"memory: {rate / 1e9:.1f} GB/s copied")
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            size = sum(p.nbytes for p in Llama(shape).to(torch.bfloat16).parameters())
        tokens = size // (2 * 2 * shape.layers * shape.kv_heads * shape.head_dim)
        print(f"{name}: {size / 1e9:.2f} GB of weights in bfloat16, {1e3 * size / rate:.0f} ms a "
              f"step; from {tokens:,} tokens on, the cache is more to read")
