r"""measure/speed_offload.py - what a decode step costs when keys and values live elsewhere.

    random keys and values -> store -> steps, one after the other, as in a text -> median, bytes

    dense          every step reads all rows, one large piece after the other
    butler         fetches a layer's rows as soon as its producer has chosen them
    no look-ahead  the same, but a layer's rows are fetched when it is reached
    resident       the butler with all rows where the model computes, if they fit

Steps of a real text choose largely the rows of the steps before. Random weights know no text, so
the tokens of the random shapes walk: each one's embedding is mostly that of the token before, so
far that about half of the rows are chosen again (`again`), as on prose by the default model. On a
CPU the store is `disk`; `--memory` bounds what the cache may hold in memory, by a cgroup: what the
operating system keeps of the file, importance keys, layer 0 and scratch space. On a GPU it is
`pinned`, and the bus is measured too; not run on one yet.

    python bench.py --suite offload --contexts 8000 --n 20
    python bench.py --suite offload --shape llama-3.2-1b --contexts 262144 --budgets 1024 \
        --memory 0.17
    python bench.py --suite offload --shape llama-3.1-8b --contexts 131072 --budgets 2048 \
        --device cuda
    python -m measure.speed_offload        what one row from the disk costs, and many at once
"""

import gc
import mmap
import os
import statistics
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from beyond.offload import DiskCache, cache_kind, host_rows
from common.errors import UsageError
from kernel import fetch_rows
from measure.speed import by_turns, copy_bandwidth, fill, model_of, settle

LIKE = 0.9  # share of a token's embedding that is the one before
WARM = 8  # steps of a selection before those that count
TURNS = 3  # of each candidate, one after the other


def measure(config) -> dict:
    """All contexts -> {"rows": [...], "copy_bytes_per_s": ...}, rows as speed.measure's, with bytes
    read from the store, hits among the rows held, and the memory taken; of a GPU "bus" too."""
    llama, butler = model_of(config)
    if config.shape:
        walk(llama.embed_tokens.weight)
    llama.decode(torch.zeros(1, 1, dtype=torch.long, device=llama.device), llama.new_cache(1, 1))
    rows = []  # the weights are in all their forms: the limit is for keys and values
    for context in map(int, config.contexts):
        size = llama.new_cache(1, 1).bytes * context
        with torch.inference_mode(), memory_limit(int(size * config.memory)):
            rows += steps_behind(llama, butler, context, size, config)
    report = {"rows": rows, "copy_bytes_per_s": copy_bandwidth(config.device)}
    if store_of(config.device) == "pinned":
        report["bus"] = bus(llama)
    return report


def store_of(device: str) -> str:
    return "pinned" if device.startswith("cuda") else "disk"


def bus(llama, tokens=2**16, kept=2048) -> dict:
    """Bytes a second from pinned memory, of one layer in one piece and of a choice of its rows."""
    c, dtype = llama.config, llama.embed_tokens.weight.dtype
    host, table = host_rows((1, c.kv_heads, tokens, 2, c.head_dim), dtype, llama.device)
    copy, counts = torch.empty_like(table), torch.zeros((), dtype=torch.long, device=llama.device)
    places = torch.zeros(1, c.kv_heads, tokens, dtype=torch.int32, device=llama.device)
    chosen = torch.rand(1, c.kv_heads, tokens, device=llama.device).topk(kept).indices.int()
    seconds = by_turns({
        "copied": lambda: copy.copy_(host, non_blocking=True),
        "fetched": lambda: fetch_rows(table, chosen, None, places, counts)}, 9, llama.device)
    return {"copied_bytes_per_s": host.nbytes / seconds["copied"],
            "fetched_bytes_per_s": host.nbytes / tokens * kept / seconds["fetched"]}


def walk(weight) -> None:
    """Turns an embedding [V, C] into a walk: token i is like token i - 1."""
    for i in range(1, len(weight)):
        weight[i] = LIKE * weight[i - 1] + (1 - LIKE**2) ** 0.5 * weight[i]


def steps_behind(llama, butler, context: int, size: int, config) -> list[dict]:
    kept = float(config.budgets[0])
    steps = -(-config.n // TURNS)
    room, resident = context + WARM + steps, None
    if not config.memory:
        with suppress(torch.OutOfMemoryError):
            resident = llama.new_cache(1, room)
            fill(resident, context, resident.k + resident.v)
    before, store = taken(llama.device), store_of(config.device)
    cache = llama.new_cache(1, room, kind=cache_kind(store, config.offload_dir, config.device))
    fill(cache, context, [cache.k[0], cache.v[0], *cache.store.flatten(0, 2)])
    if isinstance(cache, DiskCache):
        forget(cache)
    selector = butler.selector(kept)
    positions = torch.arange(context, device=llama.device)[None]
    for layer in range(llama.config.layers):  # as if it had seen the prompt
        selector.watch(layer, None, None, cache.k[layer][:, :, :context], positions)
    name = f"butler {kept:g}, {store}"
    candidates = {f"dense, {store}": (None, cache, 0.0, None),
                  f"{name}, no look-ahead": (selector, cache, 0.0, None)}
    for drift in map(float, config.drifts):
        candidates[f"{name}, drift {drift:g}"] = selector, cache, drift, cache.read_ahead
    if resident:
        candidates["dense, resident"] = None, resident, 0.0, None
        candidates[f"butler {kept:g}, resident"] = butler.selector(kept), resident, 0.0, None
    turns, first = {name: [] for name in candidates}, 0
    for _ in range(TURNS):  # a change of the machine's speed meets all of them
        for name, (selector, where, drift, ahead) in candidates.items():
            where.truncate(context)
            if selector:
                selector.reuse.drift, selector.read_ahead = drift, ahead
                selector.reuse.tally.zero_()
            first += 1000  # each time other tokens
            turns[name].append(decode(llama, selector, where, steps, first))
    rows = []
    for name, (selector, where, drift, _) in candidates.items():
        rows.append({"suite": "offload", "device": config.device, "shape": config.shape, "batch": 1,
                     "context": context, "selector": name, "drift": drift,
                     "kept": kept if selector else None, "cache_bytes": size,
                     "limit_bytes": int(size * config.memory) or None,
                     **summary(turns[name], size if selector is None else 0, cache.unit)})
        rows[-1]["speedup"] = rows[0]["ms"] / rows[-1]["ms"]
        rows[-1]["held_bytes"] = size if where is resident else rows[-1]["held_bytes"] - before
    return rows


def summary(turns: list[tuple], size: int, unit: int) -> dict:
    """What all turns of one candidate say: the median step, means, the most memory. A step reads
    `size` bytes, or, if 0, `unit` for every row that was missed."""
    seconds, again, interval, held, asked, missed, waited = zip(*turns, strict=True)
    seconds, again = (sum(lists, []) for lists in (seconds, again))
    ms, steps = 1e3 * statistics.median(seconds), len(seconds)
    return {"ms": ms, "tokens_per_s": 1e3 / ms, "bytes": size or unit * sum(missed) / steps,
            "waited_ms": 1e3 * sum(waited) / steps,
            "hits": 1 - sum(missed) / sum(asked) if sum(asked) else None,
            "again": statistics.mean(again) if again else None,
            "interval": statistics.mean(interval), "held_bytes": max(held)}


def forget(cache) -> None:
    """Writes everything out and lets the operating system drop what it holds of it."""
    cache.map.flush()
    cache.map.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(cache.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(llama, selector, cache, n: int, first: int) -> tuple:
    """n steps with the tokens from `first` on -> [seconds of each], [shares of rows chosen in the
    step before as well], steps between choices, bytes of memory held, how many rows were asked for,
    and missed, seconds waited for them"""
    def counters():
        return *cache.traffic, getattr(cache, "waited", 0.0)

    warm, seconds, shares, last = WARM if selector else 1, [], [], {}
    for step in range(warm + n):
        if step == warm:
            before = counters()
        token = torch.full((1, 1), (first + step) % llama.config.vocab_size, device=llama.device)
        settle(llama.device)
        began = time.perf_counter()
        llama.decode(token, cache, selector)
        settle(llama.device)
        seconds.append(time.perf_counter() - began)
        if selector:
            now = {layer: set(index[0, 0, 0].tolist()) for layer, index in selector.index.items()}
            shares += [len(now[i] & last[i]) / len(now[i]) for i in now if last]
            last = now
    traffic = (b - a for a, b in zip(before, counters(), strict=True))
    interval = selector.reuse.steps_per_choice if selector else 1.0
    return seconds[warm:], shares, interval, taken(llama.device), *traffic


def taken(device) -> int:
    """Bytes of a GPU's memory that tensors have; of a CPU's, what this process holds for itself,
    files not counted."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in s)
    return int(line.split()[1]) * 1024


@contextmanager
def memory_limit(size: int):
    """What is allocated, or read from files, from now on may take up to `size` bytes of memory; no
    limit if 0. A cgroup of its own (version 1 or 2), for which root's rights are needed."""
    if not size:
        yield
        return
    version_1 = Path("/sys/fs/cgroup/memory")
    parent = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    home = own_group(parent, Path("/proc/self/cgroup").read_text())
    group = parent / f"tokenbutler-{os.getpid()}"
    limit = "memory.limit_in_bytes" if parent == version_1 else "memory.max"
    try:
        group.mkdir(exist_ok=True)  # a killed run may have left one
        (group / limit).write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        with suppress(OSError):
            group.rmdir()
        raise UsageError(f"--memory needs the right to make a cgroup in {parent} ({e.strerror}); "
                         "or run under systemd-run --scope -p MemoryMax=BYTES") from None
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def own_group(parent: Path, listed: str) -> Path:
    """The group of this process, as /proc/self/cgroup lists it: `number:controllers:/path`, version
    2 without controllers. Below `parent`, or `parent` itself where a container hides the path."""
    groups = {kinds: path for _, kinds, path in
              (line.split(":", 2) for line in listed.splitlines())}
    path = groups.get("memory" if parent.name == "memory" else "", "/")
    home = parent / path.lstrip("/")
    return home if home.is_dir() else parent


def table(report: dict) -> str:
    lines = [f"{'context':>8s}  {'':32s} {'ms a step':>10s} {'x dense':>8s} {'waited':>7s} "
             f"{'MB read':>9s} {'hits':>5s} {'again':>6s} {'held, MB':>9s}"]
    for r in report["rows"]:
        share = ["" if r[k] is None else f"{r[k]:.0%}" for k in ("hits", "again")]
        lines.append(f"{r['context']:8,}  {r['selector']:32s} {r['ms']:10.1f} {r['speedup']:8.2f} "
                     f"{r['waited_ms']:7.1f} {r['bytes'] / 1e6:9.1f} {share[0]:>5s} "
                     f"{share[1]:>6s} {r['held_bytes'] / 1e6:9,.0f}")
    for context in sorted({r["context"] for r in report["rows"]}):
        rows = [r for r in report["rows"] if r["context"] == context]
        limit = rows[0]["limit_bytes"]
        within = f", of which {limit / 1e9:.2f} GB in memory" if limit else ""
        lines.append(f"{context:,} tokens: {rows[0]['cache_bytes'] / 1e9:.2f} GB of keys and "
                     f"values{within}")
        off, *ahead = (r for r in rows if r["selector"].endswith(("no look-ahead", "drift 0")))
        for on in ahead if off["waited_ms"] else ():
            less = 1 - on["waited_ms"] / off["waited_ms"]
            lines.append(f"a step waits {off['waited_ms']:.0f} ms for rows; with look-ahead "
                         f"{less:.0%} less, and the step is {off['ms'] - on['ms']:.0f} ms shorter")
    if bus := report.get("bus"):
        lines.append("bus: {copied_bytes_per_s:.3g} bytes/s copied in one piece, "
                     "{fetched_bytes_per_s:.3g} fetched row by row".format(**bus))
    return "\n".join(lines)


if __name__ == "__main__":
    from model import Config, Llama

    shape = Config(vocab_size=256, width=64, layers=2, heads=1, kv_heads=1, head_dim=64,
                   mlp_width=64, context=2**17)
    cache = Llama(shape).new_cache(1, shape.context, kind=cache_kind("disk"))
    fill(cache, shape.context, list(cache.store.flatten(0, 2)))
    print(f"store {list(cache.store.shape)}, {cache.store.nbytes / 1e6:.0f} MB")
    for n in (256, 1, 16, 256):  # the first time the threads are started
        forget(cache)
        cache.advise(streams=False)
        cache.held.clear()
        rows, began = torch.randint(shape.context, (1, 1, n)), time.perf_counter()
        cache.fetch(1, rows)
        print(f"{n:3d} rows at once: {1e3 * (time.perf_counter() - began):.2f} ms")
