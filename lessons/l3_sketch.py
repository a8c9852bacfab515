"""Lesson 3. How small can a key be?

The oracle of lesson 2 selects well, but it reads all keys of the text. A useful selector must also
give every token a score, but it should read only a few numbers per token. So it needs small keys.

A key of our model is a point in 64 dimensions. If the keys of a text lie close to a subspace with
fewer dimensions, a few coordinates describe each key well. These coordinates are a sketch of the
key.

Linear algebra finds this subspace. Let the rows of K be the keys in the cache. Their principal
directions are the eigenvectors of the matrix K^T K with the largest eigenvalues. Each layer and KV
head has its own directions.

The experiment projects keys and queries on 32, 16 or 8 directions, and scores all tokens with
these short vectors. As a control, it does the same with random directions. Loki (arXiv 2406.02542)
is such a sketch, with directions from other texts. The class `Sketch` is a small form of that in
workshop/rivals.py.

The numbers are means over the last 32 tokens of three texts of 1,024 tokens, and over layers 1 to
29. The columns of the table:

- numbers: how many numbers per token and KV head a score reads
- energy: the part of the squared length of the keys that lies in these directions
- kept: the share of the true attention that falls on the selected 10 % of the tokens
- of oracle: `kept`, divided by what the oracle keeps with the same budget

The first row uses all 64 numbers, so it is the oracle.

What the table shows: with 32 numbers on principal directions the selection is close to the
oracle's. With 8 numbers it is clearly worse. Random directions need more numbers: 32 of them are
about as good as 8 principal ones.

What to conclude: small keys are possible without training. But the score uses the layer's own
query, which is known only when the model reaches the layer. Lesson 4 asks whether we can know it
earlier.

Exercise 3.1, four bits. Give `ButlerSelector` in butler.py the argument `bits=None`. With
`bits=4`, `self.keys[layer]` is of type torch.uint8 and has shape [B, G, S, E/2]: two channels
share a byte. Each key also has a scale: its largest absolute value divided by 7.
`all_importance_keys` packs the new keys and returns all keys unpacked. It cuts the stored scales
where it cuts the keys. A key of zeros must not divide 0 by 0. `block_scores` must unpack, too.

Exercise 3.2, directions for queries. Add the function `directions_for(keys, queries, size)` to
l3_sketch.py. It gets keys [S, D] and queries [N, D] and returns matrices A and B, both [D, size].
The scores (queries A) (keys B)^T approximate queries keys^T. No other A and B of this size have a
smaller sum of squared errors. Use the singular value decomposition of queries keys^T.

    python -m lessons.l3_sketch --figure sketch.svg
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
from bench import Probe
from butler import load
from cli import flag
from data import evenly_spaced, text_to_measure_on
from kernel import true_attention
from lessons.figure import figure, label_ends, looks
from selection import Oracle, Recency, Selector

BUDGET = 0.1
SIZES = (32, 16, 8)


def principal_directions(keys, size: int):
    """keys [B, G, S, D] -> the directions in which they are longest, [B, G, D, size]"""
    return torch.linalg.eigh(keys.mT @ keys).eigenvectors[..., -size:]  # the largest come last


def random_directions(keys, size: int):
    """The same shape, but any directions; they are at right angles to each other."""
    B, G, _, D = keys.shape
    rng = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(B, G, D, D, generator=rng)).Q[..., :size]


class Sketch(Selector):
    """Scores tokens with the layer's own queries and with keys of `size` numbers.

    find     keys, size -> directions
    energy   {layer: part of the squared length of the keys that the directions hold}
    """

    def __init__(self, budget, size=32, find=principal_directions):
        super().__init__(budget)
        self.size = size
        self.find = find
        self.energy = {}

    def scores(self, layer, q, keys, positions):
        D = keys.shape[-1]
        before = keys[:, :, : -q.shape[2]]  # what was in the cache before these queries
        directions = self.find(before, self.size)  # [B, G, D, E]
        small_keys = keys @ directions  # [B, G, S, E]: what a real implementation would store
        q = q.unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, T, D]
        small_q = (q @ directions[:, :, None]).flatten(1, 2)  # [B, H, T, E]
        self.energy[layer] = (small_keys.square().sum() / keys.square().sum()).item()
        # true_attention divides by the root of E, but the model divides by the root of D.
        return true_attention(small_q * (self.size / D) ** 0.5, small_keys).mean(2)


def kept_by_layer(llama, window, selectors: dict):
    """Reads a window [T] of text densely. Then each selector chooses for its last 32 tokens, as if
    they came one by one -> yields (key of the selector, {layer: share of the attention kept})"""
    start = len(window) - 32
    cache = llama.new_cache(1, len(window))
    llama.prefill(window[None, :start], cache)
    for key, selector in selectors.items():
        cache.truncate(start)
        probe = Probe(selector)
        llama.prefill(window[None, start:], cache, probe)
        yield key, probe.kept


def print_table(rows: list[dict]) -> None:
    print("directions  numbers  energy   kept  of oracle")
    for row in rows:
        print(f"{row['directions']:10s} {row['numbers']:8d} {row['energy']:7.2f} "
              f"{row['kept']:6.3f} {row['of oracle']:10.3f}")


def draw(path: str, rows: list[dict]) -> None:
    with figure(path) as (axis,):
        for name, looks_like in (("principal", "sketch"), ("random", "random")):
            points = [row for row in rows if row["directions"] in (name, "all")]
            axis.plot([row["numbers"] for row in points], [row["of oracle"] for row in points],
                      label=f"{name} directions", **looks(looks_like))
        numbers = [rows[0]["numbers"], *SIZES]
        axis.plot((max(numbers), min(numbers)), 2 * [rows[-1]["of oracle"]], label="recency",
                  linestyle="--", color=looks("recency")["color"])
        axis.set_xscale("log", base=2)
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.invert_xaxis()  # the keys become smaller
        axis.set(title="small keys, the layer's own query", xlabel="numbers per key",
                 ylabel="kept, of oracle (from 0.68)", ylim=(0.68, 1.02))
        label_ends(axis)


@dataclass
class Config:
    """Scores tokens with keys of fewer numbers, and measures the attention kept."""

    tokens: int = flag(1024, "tokens of a text", at_least=64)
    texts: int = flag(3, "texts", at_least=1)
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    llama, tok, _ = load()
    kinds = {("all", llama.config.head_dim): partial(Oracle, BUDGET)}
    for name, find in (("principal", principal_directions), ("random", random_directions)):
        for size in SIZES:
            kinds[name, size] = partial(Sketch, BUDGET, size, find)
    kinds["recency", 0] = partial(Recency, BUDGET)
    kept = {kind: [] for kind in kinds}  # one number for each text
    energy = {kind: [] for kind in kinds}  # one number for each text and layer
    for window in evenly_spaced(tok, text_to_measure_on(), config.texts, config.tokens):
        selectors = {kind: make() for kind, make in kinds.items()}
        for kind, shares in kept_by_layer(llama, window, selectors):
            kept[kind].append(sum(shares.values()) / len(shares))
            energy[kind] += getattr(selectors[kind], "energy", {}).values()
    oracle = sum(kept["all", llama.config.head_dim])
    rows = [{"directions": name, "numbers": numbers,
             "energy": sum(energy[name, numbers]) / len(energy[name, numbers] or [1]),
             "kept": sum(shares) / len(shares), "of oracle": sum(shares) / oracle}
            for (name, numbers), shares in kept.items()]
    rows[0]["energy"] = 1.0
    print_table(rows)
    if config.figure:
        draw(config.figure, rows)
    return {"rows": rows}


if __name__ == "__main__":
    cli.run(main, Config)
