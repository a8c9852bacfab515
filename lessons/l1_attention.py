"""Lesson 1. Where does attention go?

For each new token, every layer reads the keys and values of all earlier tokens from memory, the KV
cache.

The attention weights of a query add up to 1. If a few tokens hold nearly all of the weight, the
model could leave the other tokens unread. Is this so?

The experiment reads 1,024 tokens of Python's reference manual with a real model, SmolLM2-135M,
which has 30 layers with 3 KV heads each. For each of the last 64 queries, in each layer and KV
head, it finds the 10 % of the tokens with the largest weights: the top set. The table shows means
of every third layer. Its last row, "1 on", is the mean of layers 1 to 29.

- top 10 %: the share of the attention that the top set holds
- first token: the share of the first token of the text
- recent 10 %: the share of the first 4 tokens and the latest tokens, together 10 % of all
- new a step: the share of the top set that was not in it one step before
- used in 64: the share of all tokens that were in the top set at least once in 64 steps

What the table shows:

1. From layer 1 on, a tenth of the tokens holds most of the attention. In layer 0 it holds less
   than half, and all selectors here leave layer 0 dense.
2. In many layers the first token alone holds much: an attention sink.
3. In layers 3 and 6 the recent tokens hold about 0.4, and the top set holds 0.93: much of the
   attention goes further back.
4. The top set moves. The 64 steps use far more than 10 % of the tokens.

What to conclude: a step needs few tokens, and later steps need others. A method that deletes
tokens must guess what all later steps will need. The other way is to keep the whole cache and
select again at every step.

Exercise 1.1, tokens for a share. Add the function `tokens_for(share, attention)` to
l1_attention.py. Each row of `attention` [..., S] adds up to 1. For each row, the function returns
the smallest number of tokens that together hold at least `share`.

Exercise 1.2, budgets per layer. Write the class `Adaptive` in selection.py and add it to
`SELECTORS` as "adaptive". This oracle gives some layers more tokens than others. For each layer
and KV head, `watch` stores the mean attention of the prompt's last 32 queries, without sinks and
window. The first `choose` ranks these tokens of all layers together and takes as many as `Oracle`
would. The share of a layer is its part of them. At every step a layer chooses its share of what
`Oracle` chooses in all layers, rounded down. `Adaptive` must keep more attention than `Oracle`.

    python -m lessons.l1_attention --figure attention.svg
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
from butler import load
from cli import flag
from data import evenly_spaced, text_to_measure_on
from kernel import index_to_mask, true_attention
from lessons.figure import figure, label_ends, looks

COLUMNS = {"top": "top 10 %", "first": "first token", "recent": "recent 10 %",
           "new": "new a step", "used": "used in {queries}"}
SINKS = 4  # first tokens that count as recent, as in selection.py


class Watcher:
    """Stands where a selector stands. It selects nothing (None), so attention stays dense, and it
    measures the attention of the last queries in every layer."""

    def __init__(self, queries: int, share: float):
        self.queries = queries
        self.share = share
        self.rows = []  # of the table, one for each layer

    def __call__(self, layer, x, q, keys, positions):
        S = keys.shape[2]
        K = int(S * self.share)
        # The weights of the query heads that share a KV head are averaged.
        attention = true_attention(q[:, :, -self.queries :], keys).mean(2)[0]  # [G, queries, S]
        top = attention.topk(K).indices
        chosen = index_to_mask(top, S)  # [G, queries, S]
        age = positions[-self.queries :, None] - torch.arange(S)  # [queries, S]
        recent = ((age >= 0) & (age < K - SINKS)) | (torch.arange(S) < SINKS)
        new = chosen[:, 1:] & ~chosen[:, :-1]
        measured = {
            "top": (attention * chosen).sum(-1),
            "first": attention[..., 0],
            "recent": (attention * recent).sum(-1),
            "new": new.sum(-1) / K,
            "used": chosen.any(1).float(),
        }
        self.rows.append({name: value.mean().item() for name, value in measured.items()})


def print_table(rows: list[dict], mean: dict, queries: int) -> None:
    heads = [head.format(queries=queries) for head in COLUMNS.values()]
    print("layer" + "".join(f"{head:>13s}" for head in heads))
    numbered = [*enumerate(rows)][::3] + [("1 on", mean)]
    for layer, row in numbered:
        print(f"{layer:>5}" + "".join(f"{row[name]:13.2f}" for name in COLUMNS))


def draw(path: str, rows: list[dict], queries: int) -> None:
    layers = range(len(rows))
    with figure(path, 2, (9.2, 3.4)) as (left, right):
        left.plot(layers, [row["top"] for row in rows], label="top 10 %", **looks("oracle"))
        left.plot(layers, [row["recent"] for row in rows], label="recent 10 %", **looks("recency"))
        left.set(title="attention held by a tenth of the tokens", xlabel="layer", ylim=(0, 1.03))
        right.plot(layers, [row["used"] for row in rows], label=f"used in {queries} steps",
                   **looks("oracle"))
        right.plot(layers, [row["new"] for row in rows], label="new at each step", linestyle=":",
                   **looks("oracle"))
        right.set(title="how the top set moves", xlabel="layer", ylim=(0, 1.03))
        label_ends(left)
        label_ends(right)


@dataclass
class Config:
    """Measures where the attention of a real model goes, layer by layer."""

    tokens: int = flag(1024, "tokens of the text", at_least=32)
    queries: int = flag(64, "last queries of the text to measure", at_least=2)
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    llama, tok, _ = load()
    window = evenly_spaced(tok, text_to_measure_on(), 1, config.tokens)  # [1, tokens]
    watcher = Watcher(config.queries, 0.1)
    with torch.inference_mode():
        llama(window, None, watcher, last=1)
    rows = watcher.rows
    above = rows[1:]  # no selector works in layer 0, so its numbers stay apart
    mean = {name: sum(row[name] for row in above) / len(above) for name in COLUMNS}
    print_table(rows, mean, config.queries)
    if config.figure:
        draw(config.figure, rows, config.queries)
    return {"layers": rows, "mean": mean}


if __name__ == "__main__":
    cli.run(main, Config)
