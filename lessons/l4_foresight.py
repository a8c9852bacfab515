"""Lesson 4. Can we know it earlier?

In lesson 3 a layer scores the tokens with its own query. This query exists only when the layer is
reached. Then the layer must wait for the scores and for the selected keys and values, which may be
on a slow disk. A selector that knows the query some layers earlier can choose and fetch while the
layers in between still compute.

Why should this be possible? Each layer adds its result to its input. So the input of layer 5 is
similar to the input of layer 6. We can apply the query weights of layer 6 to the input of layer 5
already. This gives an early query. It is not exact, because the result of layer 5 is missing.
InfiniGen (arXiv 2406.19707) uses this idea, one layer ahead.

The other way is to train. The butler has small networks, the producers, at layers 0, 5, 10 and so
on. A producer reads the input of its layer and predicts the importance queries of the next five
layers. The lesson trains a butler for 60 steps on short texts. The model does not change. Its
attention is what the butler learns to predict.

The experiment compares both ways at equal distance. The queries of layers 1, 6, 11 and so on are
made one layer earlier, those of layers 2, 7, 12 and so on two layers earlier, up to five. Each
selector chooses 10 % of the tokens. The table shows the share of the attention that it keeps,
divided by what the oracle keeps in the same layers. One column is one distance. The rows:

- own query, 64 numbers: the oracle, so it is 1 everywhere. It does not look ahead.
- own query, 32 numbers: the sketch of lesson 3. It does not look ahead.
- early query, 64 numbers: the layer's query weights, applied to the earlier input
- butler, 60 steps: trained in this lesson; its keys have 32 numbers
- butler, shipped: of the same size, after 1,600 steps, which also used longer texts

What to conclude: the early query loses more with every layer that it looks ahead, although it
reads all 64 numbers of a key. The butler predicts five layers ahead about as well as one layer
ahead. After 60 steps it already beats the early query at five layers. The shipped butler keeps
about as much as the sketch, which has the layer's own query. So in this experiment training buys
foresight. It is not needed for small keys: the sketch has them without training.

Exercise 4.1, the query before. There is another early query: that of the token before. Add the
selector `before` to selection.py. It scores as the oracle does, but with the query of the step
before, which attends only to tokens up to its own. `watch` must remember the last query of the
prompt.

Exercise 4.2, temperature. The butler learns from its scores after a softmax. Give `distillation`
in train.py the argument `temperature=1.0`, which divides these scores before the softmax.

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
from kernel import true_attention
from lessons.figure import figure, looks
from lessons.l3_sketch import BUDGET, Sketch, kept_by_layer
from model import apply_rope, rope_cos_sin
from selection import Oracle, Selector
from synth_task import pools

AHEAD = 5  # layers that one producer serves
LOOKS = {"own query, 32 numbers": "sketch", "early query, 64 numbers": "ahead5"}


class EarlyQuery(Selector):
    """Scores with queries that are computed up to five layers too early, without training."""

    def __init__(self, budget, llama):
        super().__init__(budget)
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
        return true_attention(self.queries[layer], keys).mean(2)  # the oracle, but with early q


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


def by_distance(kept: list[dict], oracle: list[dict]) -> list[float]:
    """{layer: attention kept} of each text, of a selector and of the oracle -> the ratio of both
    for layers that look 1, 2 ... 5 layers ahead"""
    sums = [[0.0, 0.0] for _ in range(AHEAD)]
    for own, best in zip(kept, oracle, strict=True):
        for layer in own:
            sums[(layer - 1) % AHEAD][0] += own[layer]
            sums[(layer - 1) % AHEAD][1] += best[layer]
    return [own / best for own, best in sums]


def print_table(rows: dict) -> None:
    print(f"{'layers ahead':26s}" + "".join(f"{d:7d}" for d in range(1, AHEAD + 1)) + "   mean")
    for name, ratios in rows.items():
        mean = sum(ratios) / AHEAD
        print(f"{name:26s}" + "".join(f"{ratio:7.3f}" for ratio in ratios) + f"{mean:7.3f}")


def draw(path: str, rows: dict) -> None:
    with figure(path) as (axis,):
        for name, ratios in list(rows.items())[1:]:
            style = "-" if name in LOOKS or "shipped" in name else ":"
            axis.plot(range(1, AHEAD + 1), ratios, label=name, linestyle=style,
                      **looks(LOOKS.get(name, "butler")))
        axis.set(title="the price of looking ahead", xlabel="layers ahead",
                 ylabel="kept, of oracle (from 0.75)", ylim=(0.75, 1.01),
                 xticks=range(1, AHEAD + 1))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


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
            "early query, 64 numbers": EarlyQuery(BUDGET, llama),
            f"butler, {config.steps} steps": butler.selector(BUDGET),
            "butler, shipped": shipped.selector(BUDGET),
        }
        for name, shares in kept_by_layer(llama, window, selectors):
            kept.setdefault(name, []).append(shares)
    oracle = kept["own query, 64 numbers"]
    rows = {name: by_distance(shares, oracle) for name, shares in kept.items()}
    print_table(rows)
    if config.figure:
        draw(config.figure, rows)
    return {"of oracle": rows}


if __name__ == "__main__":
    cli.run(main, Config)
