r"""workshop/timing.py - more measures of time for bench.py, each to rows as bench.speed makes them.

    speed       decode steps of a model with random weights, in any --shape
    attention   the attention alone, of all layers but layer 0, choosing included. Dense is the
                fastest of several ways to compute it, tried at every context
    offload     decode steps with keys and values in a file. `dense` reads the whole file at every
                step, `butler` the selected rows; "in memory" is the same step without the file.
                --memory limits what may stay in memory, the operating system's page cache included

    random keys and values -> cache --decode steps, candidates by turns--> rows

Steps of offload follow one another as in a text, because most rows that a step needs were read by
the steps before it.

    python bench.py --suite speed --engine fast --shape llama-3.2-1b --contexts 8192
    python bench.py --suite attention --engine fast --shape smollm2-135m --budgets 256
    python bench.py --suite offload --engine fast --shape llama-3.2-1b --contexts 262144 \
        --budgets 1024 --memory 0.17 --n 6
"""

import json
import os
import statistics
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F

import cli
from bench import copy_bandwidth, decode_times, print_rows, step_bytes, synchronize, timed_rows
from butler import ButlerConfig
from cli import UserError, numbers, one_line, plug_in, read_text
from data import evenly_spaced, text_to_measure_on
from kernel import sparse_attention
from model import Config
from selection import make_selector
from synth_task import every_maker, rules_of

LONGEST = 2**20  # tokens: random weights have no trained context
CHUNK = 4096  # tokens that are filled in at a time
WARM_UP = 8  # steps behind an offloaded cache before those that count
LIKENESS = 0.9  # of an embedding of random weights to the one before

SHAPES = {
    "smollm2-135m": Config(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
        context=LONGEST, rope_theta=1e5, tied=True),
    "llama-3.2-1b": Config(
        vocab_size=128256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64,
        mlp_width=8192, context=LONGEST, rope_theta=5e5, tied=True),
    "llama-3.1-8b": Config(
        vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        mlp_width=14336, context=LONGEST, rope_theta=5e5),
}


def shape_of(name: str) -> Config:
    """One of SHAPES, or the shape in a config.json. Raises UserError."""
    if name in SHAPES:
        return SHAPES[name]
    with one_line(f"shape {name!r} is none of {', '.join(SHAPES)}, and no config.json"):
        c = json.loads(read_text(name))
        heads = c["num_attention_heads"]
        return Config(
            vocab_size=c["vocab_size"], width=c["hidden_size"], layers=c["num_hidden_layers"],
            heads=heads, kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            mlp_width=c["intermediate_size"], context=LONGEST,
            tied=c.get("tie_word_embeddings", False))


def random_model(config):
    """--shape and --engine -> a Llama and a butler with random weights, in bfloat16 where the
    device multiplies such numbers."""
    on_gpu = config.device.startswith("cuda")
    cli.known("engine for --shape", config.engine, ("plain", "fast"))
    engine = cli.engine(config.engine)
    if on_gpu and config.engine == "fast":
        engine = plug_in("fast.gpu")
    default = torch.get_default_dtype()
    bfloat16 = on_gpu or cli.processor().endswith("bf16")
    torch.set_default_dtype(torch.bfloat16 if bfloat16 else torch.float32)
    try:
        with torch.device(config.device):
            llama = engine.Llama(shape_of(config.shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    butler = engine.Butler(ButlerConfig.for_model(llama)).to(config.device)
    return llama, butler.eval().requires_grad_(False)


@torch.inference_mode()
def fill(llama, cache, tokens: int, selectors) -> None:
    """Random keys and values of `tokens` tokens, which the selectors watch."""
    c = llama.config
    while cache.size < tokens:
        T = min(CHUNK, tokens - cache.size)
        positions = torch.arange(cache.size, cache.size + T, device=llama.device)
        for layer in range(c.layers):
            k, v = torch.randn(2, len(cache.k[0]), c.kv_heads, T, c.head_dim, device=llama.device)
            keys, _ = cache.append(layer, k, v)
            q = torch.randn(len(k), c.heads, T, c.head_dim, device=llama.device)
            for selector in filter(None, selectors):
                selector.watch(layer, None, q, keys, positions)
        cache.advance(T)


# ---------------------------------------------------------------------------- whole steps


def speed(llama, butler, context: int, config, bandwidth) -> list[dict]:
    makers = every_maker(config.selectors, config.budgets, butler, llama, **rules_of(config))
    selectors = {key: make() for key, make in makers.items()}
    cache = llama.new_cache(config.batch, context + config.n + 2)
    fill(llama, cache, context - 1, selectors.values())
    token = torch.full((config.batch, 1), 5, device=llama.device)
    times = decode_times(llama, cache, token, context, selectors, config.n)
    reads = {key: step_bytes(llama, cache, selector, config.batch, context)
             for key, selector in selectors.items()}
    return timed_rows(times, reads, config.batch, context, config, bandwidth)


# ---------------------------------------------------------------------------- attention alone


def grouped(q, k):
    """[B, H, 1, D] -> [B, G, H/G, D]: the query heads of a group as queries of their KV head"""
    return q.view(*k.shape[:2], -1, q.shape[-1])


def enable_gqa(q, k, v, S):
    return F.scaled_dot_product_attention(q, k[:, :, :S], v[:, :, :S], enable_gqa=True)


def group_as_queries(q, k, v, S):
    return F.scaled_dot_product_attention(grouped(q, k), k[:, :, :S], v[:, :, :S]).view(q.shape)


def two_products(q, k, v, S):
    scores = grouped(q, k) @ k[:, :, :S].mT * q.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ v[:, :, :S]).view(q.shape)


def compiled(q, k, v, S, index=None):
    """fast/loops.py's attention to all tokens or to index [B, G, 1, K]; float32 alone"""
    loops = plug_in("fast.loops")
    rows = k.shape[0] * k.shape[1]
    q = grouped(q, k).flatten(0, 1)
    index = torch.empty(rows, 0, dtype=torch.int32) if index is None else index.view(rows, -1)
    out = torch.empty_like(q)
    tensors = q, k.flatten(0, 1), v.flatten(0, 1), index
    loops.run(loops.attend, *(x.numpy() for x in tensors), S, out.numpy())
    return out.unflatten(0, k.shape[:2]).view(len(k), -1, 1, k.shape[-1])


def gathered(q, k, v, S, index):
    return sparse_attention(q, k, v, index)


# q [B, H, 1, D], k, v [B, G, capacity, D], the number S of tokens -> [B, H, 1, D]
DENSE = {"enable_gqa": enable_gqa, "group as queries": group_as_queries,
         "two products": two_products}


class DenseForm:
    """Dense attention in one of several ways, with keys and values in one number format."""

    def __init__(self, attend, cache, dtype):
        self.attend = attend
        self.dtype = dtype
        self.k = [k.to(dtype) for k in cache.k]
        self.v = [v.to(dtype) for v in cache.v]

    def __call__(self, layer, q, S: int):
        return self.attend(q.to(self.dtype), self.k[layer], self.v[layer], S)


class AttentionOnly:
    """What bench.decode_times takes for a model: its decode step is the attention of layers
    1 .. L-1, on random queries. Layer 0 is dense for everyone."""

    def __init__(self, llama, batch: int, attend):
        """attend(q, k, v, S, index): attention to selected tokens"""
        c = llama.config
        self.layers = c.layers
        self.device = llama.device
        self.attend = attend
        self.x = torch.randn(batch, 1, c.width, device=llama.device)
        self.q = torch.randn(c.layers, batch, c.heads, 1, c.head_dim, device=llama.device)

    def decode(self, token, cache, selector):
        S = cache.size + 1
        positions = torch.tensor([cache.size], device=self.device)
        for layer in range(self.layers):
            q, k, v = self.q[layer], cache.k[layer], cache.v[layer]
            if isinstance(selector, DenseForm):
                if layer > 0:
                    selector(layer, q, S)
                continue
            index = selector(layer, self.x, q, k[:, :, :S], positions)
            if layer > 0:
                self.attend(q.to(k.dtype), k, v, S, index)
        cache.advance(1)


def attention(llama, butler, context: int, config, bandwidth) -> list[dict]:
    names = tuple(name for name in config.selectors if name != "dense")
    makers = every_maker(names, config.budgets, butler, llama, **rules_of(config))
    selectors = {key: make() for key, make in makers.items()}
    cache = llama.new_cache(config.batch, context + config.n + 2)
    fill(llama, cache, cache.capacity, selectors.values())
    forms = {(f"{form}, {str(dtype).removeprefix('torch.')}", "1.0"): DenseForm(call, cache, dtype)
             for form, call in DENSE.items() for dtype in (torch.float32, torch.bfloat16)}
    attend = gathered
    if config.engine == "fast" and llama.device.type == "cpu" and plug_in("fast.loops").numba:
        attend = compiled
        forms["compiled, float32", "1.0"] = DenseForm(compiled, cache, torch.float32)
    model = AttentionOnly(llama, config.batch, attend)
    times = decode_times(model, cache, None, context, forms | selectors, config.n)
    fastest = min(forms, key=times.get)
    times = {("dense", "1.0"): times[fastest]} | {key: times[key] for key in selectors}
    c = llama.config
    layer_0 = config.batch * context * 2 * c.kv_heads * c.head_dim * cache.k[0].element_size()
    reads = {key: step_bytes(llama, cache, selectors.get(key), config.batch, context)
             - llama.weight_bytes() - layer_0 for key in times}
    rows = timed_rows(times, reads, config.batch, context, config, bandwidth)
    rows[0]["form"] = fastest[0]
    return rows


# ---------------------------------------------------------------------------- offloaded


def offload(llama, butler, context: int, config, bandwidth, ids=None) -> list[dict]:
    """ids: [1, context + steps] of a real text; None: random keys, and tokens whose embeddings
    resemble one another (see `walk`). -> rows, with bytes read from the disk in each step"""
    if config.batch > 1:
        raise UserError("--suite offload measures a single text: --batch 1")
    c = llama.config
    steps = WARM_UP + config.n
    if ids is None:
        walk(llama.embed_tokens.weight, steps)
        tokens = torch.arange(steps, device=llama.device)[None]
    else:
        tokens = ids[:, context : context + steps]
    times, from_disk = {}, {}

    def prepare(cache, selector):
        if ids is None:
            fill(llama, cache, context, [selector])
        else:
            llama.prefill(ids[:, :context], cache, selector.watch if selector else None)

    def time_steps(key, cache, selector):
        before = bytes_read()
        times[key] = consecutive_ms(llama, cache, tokens, context, selector)
        from_disk[key] = (bytes_read() - before) / steps

    token_bytes = 2 * c.layers * c.kv_heads * c.head_dim * llama.new_cache(1, 1).k[0].itemsize
    limit = int(config.memory * token_bytes * context)
    warm_up(llama, butler, config)
    with memory_limit(limit):
        for budget in config.budgets:
            for drift in sorted({0.0, config.drift}):
                name = f"butler, drift {drift:g}" if drift else "butler"
                rules = rules_of(config) | {"drift": drift}
                rules = {rule: value for rule, value in rules.items() if value}
                selector = make_selector("butler", float(budget), butler, **rules)
                cache = plug_in("fast.offload").new_cache(llama, context + steps, "disk", selector)
                prepare(cache, selector)
                cache.drop_pages()
                time_steps((name, budget), cache, selector)
                if ("dense", "1.0") not in times:
                    time_steps(("dense", "1.0"), cache, None)
                del cache, selector  # gives the file's room back before the next one is made
        if not config.memory:
            for budget in config.budgets:
                selector = make_selector("butler", float(budget), butler)
                cache = llama.new_cache(1, context + steps)
                prepare(cache, selector)
                time_steps(("butler, in memory", budget), cache, selector)
                time_steps(("dense, in memory", "1.0"), cache, None)
    empty = llama.new_cache(1, 1)
    reads = {}
    for name, budget in times:
        selector = butler.selector(float(budget)) if name.startswith("butler") else None
        reads[name, budget] = step_bytes(llama, empty, selector, 1, context)
    rows = timed_rows(times, reads, 1, context, config, bandwidth)
    for row, read in zip(rows, from_disk.values(), strict=True):
        row |= {"disk_bytes": read, "cache_bytes": token_bytes * context,
                "limit_bytes": limit or None}
    return rows


def warm_up(llama, butler, config) -> None:
    """Compiles and packs what a step needs: memory will be limited for keys and values alone."""
    selector = make_selector("butler", float(config.budgets[0]), butler, **rules_of(config))
    cache = llama.new_cache(1, 66)
    fill(llama, cache, 65, [selector])
    llama.decode(torch.zeros(1, 1, dtype=torch.long, device=llama.device), cache, selector)


@torch.inference_mode()
def consecutive_ms(llama, cache, tokens, context: int, selector) -> float:
    """Decodes tokens [1, n], one after the other -> median milliseconds, without the warm-up"""
    cache.truncate(context)
    ms = []
    for token in tokens.split(1, dim=1):
        synchronize(llama.device)
        start = time.perf_counter()
        llama.decode(token, cache, selector)
        synchronize(llama.device)
        ms.append(1e3 * (time.perf_counter() - start))
    return statistics.median(ms[WARM_UP:])


@torch.no_grad()
def walk(weight, tokens: int) -> None:
    """Makes the first embeddings of `weight` [V, C] each much like the one before, so that decoding
    tokens 0, 1, 2 ... selects about half of the rows again at each step, as decoding prose does."""
    for i in range(1, tokens):
        weight[i] = LIKENESS * weight[i - 1] + (1 - LIKENESS**2) ** 0.5 * weight[i]


def bytes_read() -> int:
    """Bytes that this process has had read from disks; 0 where the system does not tell."""
    path = Path("/proc/self/io")
    if not path.exists():
        return 0
    return int(path.read_text().split("read_bytes:")[1].split()[0])


# ---------------------------------------------------------------------------- limited memory


@contextmanager
def memory_limit(size: int):
    """Within it, what this process newly allocates or reads from files takes at most `size` bytes
    of memory; 0: no limit. A cgroup (version 1 or 2), which needs root's rights. Raises
    UserError."""
    if not size:
        yield
        return
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    home = own_group(parent, read_text("/proc/self/cgroup"))
    group = parent / f"tokenbutler-{os.getpid()}"
    name = "memory.limit_in_bytes" if parent == version_1 else "memory.max"
    try:
        group.mkdir(exist_ok=True)  # a killed run may have left one
        (group / name).write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        with suppress(OSError):
            group.rmdir()
        raise UserError(f"--memory needs the right to make a cgroup in {parent} ({e.strerror}); or "
                        "run under systemd-run --scope -p MemoryMax=BYTES") from None
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def own_group(parent: Path, listed: str) -> Path:
    """The cgroup of this process, to return to. listed: /proc/self/cgroup, lines of the form
    `number:controllers:/path`, of version 2 without controllers. `parent` itself where a container
    hides the path."""
    paths = dict(line.split(":", 2)[1:] for line in listed.splitlines())
    path = paths.get("memory" if parent.name == "memory" else "", "/")
    home = parent / path.lstrip("/")
    return home if home.is_dir() else parent


# ---------------------------------------------------------------------------- called by bench.py

SUITES = {"speed": speed, "attention": attention, "offload": offload}


def measure(config) -> dict:
    """bench.Config -> {"rows": [...]}. Raises UserError."""
    if config.suite not in SUITES:
        raise UserError(f"--shape has random weights: no --suite {config.suite}")
    if config.shape and config.model:
        raise UserError("--shape has random weights, --model has its own: name one of them")
    contexts = numbers(config.contexts, int, "--contexts")
    budgets = numbers(config.budgets, float, "--budgets")
    needed = max(contexts) + WARM_UP + config.n
    tok = None
    if config.shape:
        llama, butler = random_model(config)
    else:
        llama, tok, butler = cli.engine(config.engine).load(config.model, config.butler,
                                                            config.device)
    make_selector("butler", budgets[0], butler)  # refuses a model that has none
    more = {}
    if config.suite == "offload" and tok:
        text = text_to_measure_on(config.text)
        more = {"ids": evenly_spaced(tok, text, 1, needed).to(llama.device)}
    bandwidth = copy_bandwidth(llama.device)
    rows = []
    for context in contexts:
        rows += SUITES[config.suite](llama, butler, context, config, bandwidth, **more)
    print_rows(rows)
    return {"rows": rows}
