"""Lesson 6. When does it pay?

For each new token, the processor must read all weights and the whole KV cache. With a budget of
10 % it reads a small part of the cache. But choosing costs time. So when is the step faster?

First we count bytes. A dense step reads

    weights + layers * KV heads * tokens * (key + value)

With the butler, layer 0 still reads all keys and values. Every other layer reads those of a tenth
of the tokens. It also reads one importance key per token and KV head: 32 numbers of 8 bits and one
scale of 32 bits. The butler's own weights are not counted. So the gain should grow with the
length.

Then we measure two engines with a cache of random numbers:

- plain: the top-level files of the repository. It copies the selected keys and values, then
  attends to the copies. All its numbers have 32 bits. Only the count takes importance keys of 8
  bits, as in the fast engine.
- fast: the step is one compiled call. It reads the selected rows without a copy. Most weights have
  4 bits, so the cache is a larger part of all bytes.

The table shows megabytes and milliseconds of a step. `ratio` is dense divided by butler, so above
1 the butler wins. Two lines name the break-even: the length from which on the butler's step is
shorter.

The Triton kernel for GPUs attends to chunks of the selected tokens, and `in_chunks` does the same
in PyTorch. Two lines show that both equal the definition up to rounding.

A prompt can be read through the butler: each block of 64 queries shares one choice. The last lines
measure this for 512 tokens. Only attention gets cheaper.

What the table shows: counted in bytes, the gain grows with the length. In milliseconds the fast
engine gets most of it. With plain the butler's step is slower, because choosing and copying take
more time than they save.

What to conclude: first count bytes, which shows how much there is to save. Then measure, because
the count leaves out choosing and copying.

Exercise 6.1, pages. Give `Budget` in selection.py the field `page=1`. With `page=4`, its `topk`
chooses whole pages: tokens 0 to 3, 4 to 7, and so on. The best score of a page decides. Sinks and
window do not count, so a page at the edge may be smaller. If the page chosen last does not fit
whole, take its best tokens.

Exercise 6.2, the length for a speedup. Add the function `length_for(speedup, llama, butler, kept)`
to l6_cost.py; `kept` is the budget. It returns the smallest number of tokens at which a dense step
reads at least `speedup` times the bytes of the butler's step, or None if 10,000 are too few. Try
every length: budgets are rounded down, so the ratio does not always rise. See `measure` for
`step_bytes`; the cache is `llama.new_cache(1, 1)`.

    python -m lessons.l6_cost --figure cost.svg
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks for it when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import torch

import cli
import kernel
from bench import decode_times, step_bytes
from cli import flag, numbers, plug_in
from lessons.figure import figure, label_ends, looks
from selection import SparsePrefill

BUDGET = 0.1


def measure(engine: str, llama, butler, contexts: list[int], rounds: int) -> list[dict]:
    """Counts and times steps behind each number of cached tokens -> rows of the table"""
    rows = []
    for context in contexts:
        cache = llama.new_cache(1, context + rounds + 2)
        selectors = {"dense": None, "butler": butler.selector(BUDGET)}
        # Random keys and values. The butler projects each key, as it does while a prompt is read.
        plug_in("workshop.timing").fill(llama, cache, context - 1, selectors.values())
        ms = decode_times(llama, cache, torch.tensor([[5]]), context, selectors, rounds)
        row = {"engine": engine, "tokens": context}
        for name, selector in selectors.items():
            row[f"{name} MB"] = step_bytes(llama, cache, selector, 1, context) / 1e6
            row[f"{name} ms"] = ms[name]
        rows.append(row)
    return rows


def break_even(rows: list[dict]) -> int | None:
    """The measured length from which on the butler's step is shorter; None if it never is"""
    length = None
    for row in reversed(rows):
        if row["butler ms"] >= row["dense ms"]:
            break
        length = row["tokens"]
    return length


def print_table(rows: list[dict]) -> None:
    print("engine  tokens dense MB   butler    ratio dense ms   butler    ratio")
    for row in rows:
        print(f"{row['engine']:6s} {row['tokens']:7,}", end="")
        for unit in ("MB", "ms"):
            dense, butler = row[f"dense {unit}"], row[f"butler {unit}"]
            print(f"{dense:9.1f}{butler:9.1f}{dense / butler:9.2f}", end="")
        print()


def in_chunks(q, k, v, chosen, size=64):
    """What the Triton kernel does for one KV head: q [N, D], k, v [S, D], chosen [K] -> [N, D]"""
    tops, totals, sums = [], [], []
    for rows in chosen.split(size):  # attend_chunk: one program for each chunk
        scores = q @ k[rows].T * q.shape[-1] ** -0.5
        top = scores.amax(1, keepdim=True)  # subtracted, so that exp does not overflow
        p = (scores - top).exp()
        tops.append(top)
        totals.append(p.sum(1, keepdim=True))
        sums.append(p @ v[rows])
    tops, totals, sums = torch.stack(tops), torch.stack(totals), torch.stack(sums)
    weight = (tops - tops.amax(0)).exp()  # merge_chunks: all chunks now have the same top
    return (weight * sums).sum(0) / (weight * totals).sum(0)


def compare_kernel() -> dict:
    """The largest difference from the definition, of both forms"""
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, 64, generator=rng)  # three query heads of one KV head
    k, v = torch.randn(2, 1, 1, 300, 64, generator=rng)
    chosen = torch.randperm(300, generator=rng)[None, None, :150].int()
    expected = kernel.masked_attention(q[:, :, None], k, v, chosen[:, :, None])[:, :, 0]
    forms = {"in_chunks": in_chunks(q[0], k[0, 0], v[0, 0], chosen[0, 0])}
    if kernel.triton:  # comes with PyTorch for GPUs, or on Linux with pip install triton
        device = "cpu" if kernel.INTERPRETED else "cuda"
        forms["Triton"] = kernel.triton_attention(*(x.to(device) for x in (q, k, v, chosen))).cpu()
    return {form: (out - expected).abs().max().item() for form, out in forms.items()}


def read_prompt(llama, butler, before: int) -> dict:
    """Seconds to read 512 more tokens of a prompt behind `before` random ones"""
    cache = llama.new_cache(1, before + 512)
    selector = butler.selector(BUDGET)
    plug_in("workshop.timing").fill(llama, cache, before, [selector])
    seconds = {}
    for name, reader in (("dense", None), ("butler", SparsePrefill(selector, BUDGET))):
        cache.truncate(before)
        start = time.perf_counter()
        llama.prefill(torch.arange(512)[None], cache, reader)
        seconds[name] = time.perf_counter() - start
    return seconds


def draw(path: str, rows: list[dict]) -> None:
    with figure(path) as (axis,):
        for engine, style in (("plain", ":"), ("fast", "-")):
            own = [row for row in rows if row["engine"] == engine]
            for name in ("dense", "butler"):
                axis.plot([row["tokens"] for row in own], [row[f"{name} ms"] for row in own],
                          label=f"{name}, {engine}", linestyle=style, **looks(name))
        contexts = sorted({row["tokens"] for row in rows})
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.set(title="a decode step", xlabel="cached tokens", ylabel="milliseconds",
                 ylim=(0, None))
        label_ends(axis)


@dataclass
class Config:
    """Counts and measures what a decode step costs, with and without a selection."""

    contexts: tuple = flag(("512", "2048", "7900"), "comma-separated numbers of cached tokens")
    rounds: int = flag(5, "steps of each kind at each length", at_least=1)
    before: int = flag(7040, "tokens before the 512 tokens of the prompt", at_least=1024)
    figure: str = flag(None, "draw the times to this .svg or .png file")


def main(config: Config) -> dict:
    contexts = sorted(numbers(config.contexts, int, "--contexts"))
    rows, even, prompt = [], {}, {}
    for engine in ("plain", "fast"):
        llama, _, butler = cli.engine(engine).load()
        own = measure(engine, llama, butler, contexts, config.rounds)
        rows += own
        even[engine] = break_even(own)
        prompt[engine] = read_prompt(llama, butler, config.before)
    errors = compare_kernel()
    print_table(rows)
    for engine, length in even.items():
        when = f"from {length:,} tokens on" if length else "at no measured length"
        print(f"{engine}: the butler's step is the shorter one {when}")
    for form, error in errors.items():
        print(f"{form}: largest difference from the definition {error:.0e}")
    for engine, seconds in prompt.items():
        print(f"{engine}: 512 tokens of a prompt behind {config.before:,} take "
              f"{seconds['dense']:.1f} s dense, {seconds['butler']:.1f} s with the butler")
    if config.figure:
        draw(config.figure, rows)
    return {"rows": rows, "break even": even, "errors": errors, "prompt": prompt}


if __name__ == "__main__":
    cli.run(main, Config)
