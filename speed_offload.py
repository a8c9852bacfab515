r"""speed_offload.py - what a decode step costs when keys and values live elsewhere (offload.py).

    random keys and values -> store -> steps, one after the other, as in a text -> median, bytes

    dense          every step reads all rows, one large piece after the other
    butler         fetches the rows chosen, as soon as a producer has spoken
    no look-ahead  the same, but a layer's rows are fetched when it is reached
    resident       the butler with all rows in memory, where they fit

Steps of a real text choose largely the rows of the steps before. Random weights know no text, so
the tokens of the random shapes drift: each one's embedding is mostly that of the token before, so
far that as many rows are chosen again as on prose by the default model (`again`, measured; about
0.59 at a budget of 5 %). `--memory` bounds what the cache may hold in memory, by a cgroup: what the
operating system keeps of the file, importance keys, layer 0 and scratch space.

    python bench.py --suite offload --contexts 8000 --n 20
    python bench.py --suite offload --shape llama-3.2-1b --contexts 262144 --budgets 1024 \
        --memory 0.15
    python speed_offload.py        what one row from the disk costs, and many at once
"""

import gc
import mmap
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from cli import UsageError
from offload import cache_kind
from speed import copy_bandwidth, model_of

DRIFT = 0.9  # share of a token's embedding that is the one before
WARM = 8  # steps of a selection before those that count


def measure(config) -> dict:
    """All contexts -> {"rows": [...], "copy_bytes_per_s": ...}, rows as speed.measure's, with bytes
    read from the disk, hits of the page cache, and the memory held beside it."""
    llama, butler = model_of(config)
    if config.shape:
        drift(llama.embed_tokens.weight)
    rows = []
    for context in map(int, config.contexts):
        size = 4 * 2 * llama.config.layers * llama.config.kv_heads * llama.config.head_dim * context
        with torch.inference_mode(), memory_limit(int(size * config.memory)):
            rows += steps_behind(llama, butler, context, size, config)
    return {"rows": rows, "copy_bytes_per_s": copy_bandwidth(config.device)}


def drift(weight) -> None:
    """Turns an embedding [V, C] into a walk: token i is like token i - 1."""
    for i in range(1, len(weight)):
        weight[i] = DRIFT * weight[i - 1] + (1 - DRIFT**2) ** 0.5 * weight[i]


def steps_behind(llama, butler, context: int, size: int, config) -> list[dict]:
    kind, rows, before = cache_kind("disk", config.offload_dir), [], anonymous()
    room = context + WARM + config.n
    cache = llama.new_cache(1, room, kind=kind)
    fill(cache, context)
    forget(cache)
    kept = float(config.budgets[0])
    form = torch.bfloat16 if config.memory else None  # of importance keys: half the memory

    def add(name, selector, cache, interval=1):
        n = -(-config.n // interval) * interval
        seconds, again, asked, missed = decode(llama, cache, selector, context, n, interval)
        rows.append({
            "suite": "offload", "device": config.device, "shape": config.shape, "batch": 1,
            "context": context, "selector": name, "interval": interval,
            "kept": kept if selector else None, "ms": 1e3 * seconds,
            "bytes": 4096 * missed / n if selector else size,
            "tokens_per_s": 1 / seconds, "again": again,
            "hits": 1 - missed / asked if asked else None,
            "cache_bytes": size, "held_bytes": anonymous() - before,
            "limit_bytes": int(size * config.memory) or None})

    add("dense, disk", None, cache)
    selector, positions = butler.selector(kept, key_dtype=form), torch.arange(context)[None]
    for layer in range(llama.config.layers):  # as if it had seen the prompt
        selector.watch(layer, None, None, cache.k[layer][:, :, :context], positions)
    add(f"butler {kept:g}, disk, no look-ahead", selector, cache)
    selector.read_ahead = cache.read_ahead
    for interval in map(int, config.intervals):
        selector.interval = interval
        add(f"butler {kept:g}, disk, interval {interval}", selector, cache, interval)
    if not config.memory:
        resident = llama.new_cache(1, room)
        for mine, stored in zip(resident.k + resident.v, cache.k + cache.v, strict=True):
            mine[:, :, :context] = stored[:, :, :context]
        resident.advance(context)
        add("dense, resident", None, resident)
        add(f"butler {kept:g}, resident", butler.selector(kept), resident)
    dense = rows[0]["ms"]
    return [row | {"speedup": dense / row["ms"]} for row in rows]


def fill(cache, tokens: int) -> None:
    for rows in (cache.k[0], cache.v[0], *cache.store.flatten(0, 2)):
        rows.normal_()
    cache.advance(tokens)


def forget(cache) -> None:
    """Writes everything out and lets the operating system drop what it holds of it."""
    cache.map.flush()
    cache.map.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(cache.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(llama, cache, selector, context: int, n: int, interval: int):
    """-> seconds of a step, the median over all intervals in n steps; share of rows chosen in the
    step before as well, rows asked for and rows read"""
    cache.truncate(context)
    seconds, shares, last, warm = [], [], {}, WARM if selector else 1
    for step in range(warm + n):
        if step == warm:
            before = getattr(cache, "traffic", (0, 0))
        token = torch.full((1, 1), 1000 + step)
        began = time.perf_counter()
        llama.decode(token, cache, selector)
        seconds.append(time.perf_counter() - began)
        if selector:
            now = {layer: set(index[0, 0, 0].tolist()) for layer, index in selector.index.items()}
            shares += [len(now[i] & last[i]) / len(now[i]) for i in now if last]
            last = now
    after = getattr(cache, "traffic", (0, 0))
    traffic = (b - a for a, b in zip(before, after, strict=True))
    again = statistics.mean(shares) if shares else None
    rounds = torch.tensor(seconds[warm:]).view(-1, interval).mean(1).tolist()
    return statistics.median(rounds), again, *traffic


def anonymous() -> int:
    """Bytes of memory that this process holds for itself, files not counted."""
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
    group = parent / f"tokenbutler-{os.getpid()}"
    limit = "memory.limit_in_bytes" if parent == version_1 else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        raise UsageError(f"--memory needs the right to make a cgroup in {parent} ({e.strerror}); "
                         "or run under systemd-run --scope -p MemoryMax=BYTES") from None
    try:
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def table(report: dict) -> str:
    lines = [f"{'context':>8s}  {'':28s} {'ms a step':>10s} {'x dense':>8s} {'MB read':>9s} "
             f"{'hits':>6s} {'again':>6s} {'held, MB':>9s}"]
    for r in report["rows"]:
        share = ["" if r[k] is None else f"{r[k]:.0%}" for k in ("hits", "again")]
        lines.append(f"{r['context']:8,}  {r['selector']:28s} {r['ms']:10.1f} {r['speedup']:8.2f} "
                     f"{r['bytes'] / 1e6:9.1f} {share[0]:>6s} {share[1]:>6s} "
                     f"{r['held_bytes'] / 1e6:9,.0f}")
    for r in report["rows"]:
        if r["selector"] == "dense, disk":
            limit = r["limit_bytes"] and f", of which {r['limit_bytes'] / 1e9:.2f} GB in memory"
            lines.append(f"{r['context']:,} tokens: {r['cache_bytes'] / 1e9:.2f} GB of keys and "
                         f"values{limit or ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    from model import Config, Llama

    shape = Config(vocab_size=256, width=64, layers=2, heads=1, kv_heads=1, head_dim=64,
                   mlp_width=64, context=2**17)
    cache = Llama(shape).new_cache(1, shape.context, kind=cache_kind("disk"))
    fill(cache, shape.context)
    print(f"store {list(cache.store.shape)}, {cache.store.nbytes / 1e6:.0f} MB")
    for n in (256, 1, 16, 256):  # the first time the threads are started
        forget(cache)
        cache.held.clear()
        rows, began = torch.randint(shape.context, (1, 1, n)), time.perf_counter()
        cache.fetch(1, rows)
        print(f"{n:3d} rows at once: {1e3 * (time.perf_counter() - began):.2f} ms")
