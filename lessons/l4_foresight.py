"""Lesson 4. Can we know it earlier?

In lesson 3 a layer scores the tokens with its own query. This query exists only when the layer is
reached. The layer must then wait for the selected keys and values, which may be on a slow disk. A
selector that knows the query some layers earlier can choose and fetch while the layers in between
still compute. There are two ways.

Early query: each layer adds its result to its input. So the inputs of layers 5 and 6 are similar.
We apply the query weights of layer 6 to the input of layer 5. InfiniGen (arXiv 2406.19707) does
this one layer ahead. The class `EarlyQuery` in l4_foresight.py is a small form of `Ahead` in
workshop/rivals.py.

Training: the butler has small networks, the producers, at layers 0, 5, 10 and so on. A producer
reads the input of its layer and predicts the importance queries of the next five layers.

In the experiment, the queries of layers 1, 6, 11 and so on are made one layer earlier, those of
layers 2, 7, 12 and so on two layers earlier, up to five. So each column is a mean over different
layers. The tables show which share of the attention the selected 10 % of the tokens keep, divided
by what the oracle keeps. The rows:

- own query, 64 numbers: the oracle, 1 everywhere
- own query, 32 numbers: the sketch of lesson 3, without looking ahead
- early query, 32 numbers: the same sketch with the early query
- butler, 60 steps: trained in this lesson on short texts; its keys have 32 numbers
- butler, shipped: of the same size, after 1,600 steps, also on longer texts

What the tables show: in layers 1 to 5 the early query keeps 0.71 one layer ahead, and at most half
from two layers ahead on. Both butlers keep more than 0.9. In the layers above, the early query is
better than the butler of 60 steps, except five layers ahead, where they are about equal. The
shipped butler keeps about as much at every distance as the sketch with the layer's own query.

What to conclude: training buys foresight, most of it in layers 1 to 5. Their early queries are
made from embeddings, in which no token has seen another one. Training is not needed for small
keys, and in long texts it is not needed above layer 5: see results/README.md.

Exercise 4.1, the query before. Write the class `Before` in selection.py and add it to `SELECTORS`
as "before". It scores as `Oracle` does, but for token t it uses the layer's query of token t - 1.
That query attends to tokens up to t - 1: see `places` of `true_attention`. `watch` must remember
the last query of the prompt. Without a query before it, a token uses its own.

Exercise 4.2, temperature. Give `distillation` in train.py the argument `temperature=1.0`. It
divides the butler's scores before the softmax.

    python -m lessons.l4_foresight --figure foresight.svg
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
import train
from butler import Butler, ButlerConfig, load
from cli import flag
from data import Mixture, default_texts, evenly_spaced, hold_out, text_to_measure_on
from lessons.figure import figure, label_ends, looks
from lessons.l3_sketch import BUDGET, Sketch, kept_by_layer
from model import apply_rope, rope_cos_sin
from selection import Oracle
from synth_task import pools

AHEAD = 5  # layers that one producer serves
LOOKS = {"own query, 32 numbers": "sketch", "early query, 32 numbers": "ahead5"}
GROUPS = {"layers 1 to 5": range(1, 6), "layers 6 to 29": range(6, 30)}


class EarlyQuery(Sketch):
    """The sketch of lesson 3, but its queries are computed up to five layers too early."""

    def __init__(self, budget, llama):
        super().__init__(budget, 32)
        self.llama = llama
        self.queries = {}  # {layer: [B, H, T, D]}

    def look_ahead(self, layer, x, positions):
        """x [B, T, C], the input of a layer -> queries of the next five layers"""
        if layer % AHEAD:
            return
        for later in range(layer + 1, min(layer + AHEAD + 1, self.llama.config.layers)):
            block = self.llama.layers[later]
            q = block.self_attn.q_proj(block.input_layernorm(x))
            q = q.unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2)
            self.queries[later] = apply_rope(q, *rope_cos_sin(positions, self.llama.frequencies))

    def scores(self, layer, q, keys, positions):
        return super().scores(layer, self.queries[layer], keys, positions)


def trained(llama, tok, steps: int) -> Butler:
    """A butler after a short training. `python train.py` does the same with more and longer texts
    a step."""
    torch.manual_seed(0)
    butler = Butler(ButlerConfig.for_model(llama, layers_per_producer=AHEAD))
    texts = [hold_out(source)[0] for source in default_texts()]
    mixture = Mixture(tok, texts, pools("train"), repeats=2)
    with TemporaryDirectory() as folder:
        config = train.Config(steps=steps, batch=1, length=384, rows=16, reuse=10, long_every=0,
                              out=f"{folder}/butler")  # the training saves its state there
        train.training_loop(llama, butler, mixture, config)
    return butler.eval().requires_grad_(False)


def by_distance(kept: list[dict], oracle: list[dict], layers) -> list[float]:
    """{layer: attention kept} of each text, of a selector and of the oracle -> the ratio of both
    for those of these layers that look 1, 2 ... 5 layers ahead"""
    sums = [[0.0, 0.0] for _ in range(AHEAD)]
    for own, best in zip(kept, oracle, strict=True):
        for layer in layers:
            sums[(layer - 1) % AHEAD][0] += own[layer]
            sums[(layer - 1) % AHEAD][1] += best[layer]
    return [own / best for own, best in sums]


def print_table(tables: dict) -> None:
    for title, rows in tables.items():
        print(f"\n{f'{title}; layers ahead':30s}"
              + "".join(f"{distance:7d}" for distance in range(1, AHEAD + 1)) + "   mean")
        for name, ratios in rows.items():
            mean = sum(ratios) / AHEAD
            print(f"{name:30s}" + "".join(f"{ratio:7.3f}" for ratio in ratios) + f"{mean:7.3f}")


def draw(path: str, tables: dict) -> None:
    with figure(path, len(tables), (9.2, 3.6)) as axes:
        for axis, (title, rows) in zip(axes, tables.items(), strict=True):
            for name, ratios in list(rows.items())[1:]:
                style = "-" if name in LOOKS or "shipped" in name else ":"
                axis.plot(range(1, AHEAD + 1), ratios, label=name, linestyle=style,
                          **looks(LOOKS.get(name, "butler")))
            # Where all numbers are high, only the upper part shows their differences.
            lowest = min(min(ratios) for ratios in rows.values())
            start = int(10 * lowest) / 10 if lowest > 0.5 else 0
            cut = f" (from {start})" if start else ""
            axis.set(title=title, xlabel="layers ahead", ylim=(start, 1 + 0.03 * (1 - start)),
                     ylabel=f"kept, of what the oracle keeps{cut}",
                     xticks=range(1, AHEAD + 1))
        label_ends(axes[-1])


@dataclass
class Config:
    """Compares queries that are known early: computed without training, and learned."""

    steps: int = flag(60, "steps of training", at_least=1)
    tokens: int = flag(512, "tokens of a text", at_least=64)
    texts: int = flag(3, "texts", at_least=1)
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    llama, tok, shipped = load()
    butler = trained(llama, tok, config.steps)
    kept = {}
    for window in evenly_spaced(tok, text_to_measure_on(), config.texts, config.tokens):
        selectors = {
            "own query, 64 numbers": Oracle(BUDGET),
            "own query, 32 numbers": Sketch(BUDGET, 32),
            "early query, 32 numbers": EarlyQuery(BUDGET, llama),
            f"butler, {config.steps} steps": butler.selector(BUDGET),
            "butler, shipped": shipped.selector(BUDGET),
        }
        for name, shares in kept_by_layer(llama, window, selectors):
            kept.setdefault(name, []).append(shares)
    oracle = kept["own query, 64 numbers"]
    tables = {title: {name: by_distance(shares, oracle, layers) for name, shares in kept.items()}
              for title, layers in GROUPS.items()}
    print_table(tables)
    if config.figure:
        draw(config.figure, tables)
    return {"of oracle": tables}


if __name__ == "__main__":
    cli.run(main, Config)
