"""Lesson 5. Where is a token?

A key in the cache says two things: what the token is, and where it stands. Llamas rotate each
query and each key by angles that grow with its position (rotary embedding, RoPE). Some channels
turn fast, by one radian per token. Others turn so slowly that 512 tokens cover only a small part
of their circle.

A butler projects each cached key to a short importance key with a learned matrix. The paper
projects the keys as they are in the cache: rotated. The matrix fits the angles that it saw in
training. What happens in a text that is much longer than the training texts?

There are two remedies, and the experiment tries both:

- Keys rotated back. The rotation is known, so it can be undone exactly. The matrix then sees what
  a token is, wherever it stands. The butler adds the position later, with a small rotary embedding
  of its own.
- Positions with gaps. The 512 tokens of a training text do not get the positions 0 to 511. Three
  gaps at random places spread them over up to 8,192 positions. Long distances then occur in
  training.

The experiment takes the first 6 of the model's 30 layers. It trains four butlers for 60 steps on
texts of 512 tokens: both kinds of keys, with and without gaps. Then it measures them at the end of
a longer text, which no butler has seen. The table shows the share of the attention that the
selected 10 % of the tokens hold.

What the table shows: with rotated keys and no gaps, the butler is near the oracle at 512 tokens,
but it keeps less than recency at 8,000. Keys rotated back need gaps, because the butler's own
rotary embedding has not seen long distances in training. Rotated keys with gaps are worse at 512
tokens, because one matrix must fit many more rotations. Only both remedies together stay near the
oracle at all lengths.

`python train.py` uses both. The shipped butler, which lesson 4 measures, comes from an earlier
version: its keys are rotated back, but it saw texts of up to 6,144 tokens instead of gaps.

What to conclude: measure a selector in texts as long as those it will meet. This is one text and
one seed: try others.

Exercise 5.1, prefer recent tokens. Give `ButlerSelector` in butler.py the argument `fade=0.0`. In
`scores`, a token that stands n places before the query's token loses n * fade. What does
`fade=0.02` do to the attention kept at 8,000 tokens? Add a row to `makers` in `main` of
l5_position.py, and compare it with recency.

Exercise 5.2, moved keys. Add the function `moved(keys, by, frequencies)` to l5_position.py. It
gets rotated keys [B, G, S, D] and returns what they would be `by` positions later; `by` may be
negative. The frequencies [D/2] are those of `rope_cos_sin` in model.py.

    python -m lessons.l5_position --steps 120 --figure position.svg
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
import train
from bench import kept_at_lengths
from butler import Butler, ButlerConfig, load
from cli import flag, numbers
from data import Mixture, default_texts, evenly_spaced, hold_out, text_to_measure_on
from lessons.figure import figure, label_ends, looks
from model import Llama
from selection import make_selector
from synth_task import pools

LAYERS = 6  # of the model: layer 0 and the five that one producer serves
KEYS = ("rotated", "rotated back")


def first_layers(llama, layers: int) -> Llama:
    """The first layers of a model as a model of its own, which shares the weights."""
    with torch.device("meta"):  # no memory: the weights are those of `llama`
        short = Llama(replace(llama.config, layers=layers))
    state = llama.state_dict()
    short.load_state_dict({name: state[name] for name in short.state_dict()}, assign=True)
    short.tie()
    short.frequencies = llama.frequencies
    return short.eval().requires_grad_(False)


def trained(llama, mixture, gaps: bool, config) -> dict:
    """Two butlers, trained at the same time on the same texts, as train.py trains one."""
    # train.py's stream of long texts has gaps. Here its texts are as short as all others.
    settings = train.Config(length=config.length, long=config.length, long_every=int(gaps),
                            rows=16, seed=config.seed)
    batches = train.Batches(llama, mixture, settings)
    butlers = {}
    optimizers = []
    for keys in KEYS:
        torch.manual_seed(config.seed)
        butlers[keys] = Butler(ButlerConfig.for_model(llama, rotated_keys=keys == "rotated"))
        optimizers += train.make_optimizers(butlers[keys], settings.learning_rate)
    for step in tqdm(range(config.steps), "steps", file=sys.stderr):
        recorder, sample = batches.of_step(step)
        for butler in butlers.values():
            train.distillation(butler, recorder, sample).mean().backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * train.schedule(step, config.steps)
            optimizer.step()
            optimizer.zero_grad()
    return {keys: butler.eval().requires_grad_(False) for keys, butler in butlers.items()}


def print_table(kept: dict, contexts: list[int]) -> None:
    heads = "".join(f"{f'at {context:,}':>10s}" for context in contexts)
    print(f"{'keys':14s}{'positions':12s}{heads}")
    for (keys, positions), shares in kept.items():
        print(f"{keys:14s}{positions:12s}" + "".join(f"{shares[c]:10.2f}" for c in contexts))


def draw(path: str, kept: dict, contexts: list[int]) -> None:
    lines = cycle(("-", "-", ":", "--", "-.", "-"))  # an exercise adds a row
    with figure(path) as (axis,):
        for key, shares in kept.items():
            values = [shares[context] for context in contexts]
            name = "butler" if key[1] else key[0]
            axis.plot(contexts, values, next(lines), label=", ".join(filter(None, key)),
                      **looks(name))
        axis.set_xscale("log")
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
        axis.set(title="attention kept by butlers that were trained on 512 tokens",
                 xlabel="tokens of the text (log scale)", ylim=(0, 1.03))
        label_ends(axis)


@dataclass
class Config:
    """Trains small butlers on short texts and measures them in long texts."""

    steps: int = flag(60, "training steps of each butler", at_least=1)
    length: int = flag(512, "tokens of a training text", at_least=64)
    contexts: tuple = flag(("512", "2048", "8000"), "comma-separated lengths to measure at")
    n: int = flag(1, "texts to measure on", at_least=1)
    seed: int = flag(0, "seed of initialisation and texts")
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    contexts = sorted(numbers(config.contexts, int, "--contexts"))
    llama, tok, _ = load()
    llama = first_layers(llama, LAYERS)
    texts = [hold_out(source)[0] for source in default_texts()]
    mixture = Mixture(tok, texts, pools("train"))
    makers = {(name, ""): partial(make_selector, name, 0.1) for name in ("oracle", "recency")}
    for gaps, positions in enumerate((f"0 to {config.length - 1}", "with gaps")):
        for keys, butler in trained(llama, mixture, bool(gaps), config).items():
            makers[keys, positions] = partial(butler.selector, 0.1)
    found = {key: {context: [] for context in contexts} for key in makers}
    for window in evenly_spaced(tok, text_to_measure_on(), config.n, contexts[-1]):
        for context, key, probe, _ in kept_at_lengths(llama, window, contexts, makers):
            found[key][context].append(probe.mean())
    kept = {key: {context: sum(shares) / len(shares) for context, shares in by.items()}
            for key, by in found.items()}
    print_table(kept, contexts)
    if config.figure:
        draw(config.figure, kept, contexts)
    return {"kept": {", ".join(filter(None, key)): by for key, by in kept.items()}}


if __name__ == "__main__":
    cli.run(main, Config)
