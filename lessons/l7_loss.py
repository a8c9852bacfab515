"""Lesson 7. What is lost?

A sparse step leaves tokens out, so it is never quite equal to the dense step. A mean over many
tokens may look good, although the few tokens that matter are wrong.

The experiment compares sparse and dense steps at the end of four texts of about 1,000 tokens. Two
texts, called prose, are from Python's documentation and code. The other two are copies: a list
such as "the lazy cherry, the kind badge" comes at the start and again at the end. Nearly half of
the tokens can be guessed, such as "the". The adjectives and nouns cannot. The model must find its
place in the first list.

The butler selects 10 % of the tokens. It can use a choice for several steps: "butler, 4" chooses
at every fourth position only (interval 4). The columns:

- same: how often the likeliest token is that of the dense model
- KL: the KL divergence from the dense prediction to the sparse one, in nats
- right: how often the likeliest token is the next token of the text

What the table shows: on prose, a new choice at every step loses little more than the oracle. On
copies it loses more: KL 0.15 against 0.03. Interval 2 already breaks the copies. With interval 4
they are as bad as with recency, which sees at most 4 tokens of the first list. So 0.44 right is
what guessing reaches. On prose, interval 4 still mostly agrees with dense, but the KL of interval
8 is higher than that of recency.

Here all heads choose at the same steps. With `--drift`, each KV head chooses when its own query
has turned, and a choice for about four steps loses less: see README.md.

The last lines show the worst step of each text with interval 8, and the age of its choice. In the
copies the dense model writes the next word of the list, and the sparse one does not.

What to conclude: compare your own method with the dense model, token by token. Use texts that
cannot be guessed. Include a trivial rule such as recency: where it scores well, the measure cannot
tell methods apart.

Exercise 7.1, neighbours to the right. Give `Budget` in selection.py the field `follow=0`. With
`follow=2`, its `topk` goes from the highest score down. It chooses each token and the two that
follow it, until the budget is used up. A token chosen already is not counted again, but brings its
two. None is of sinks or window. (The butler's `neighbours` takes both sides.) Does this help the
copies at interval 4? Add `follow=2` in `main` of l7_loss.py.

Exercise 7.2, rank of the dense choice. Add the function `ranks(dense, sparse)` to l7_loss.py. It
gets logits [..., V] of both and returns [...]: how many tokens have a higher sparse logit than the
token that the dense model finds likeliest.

    python -m lessons.l7_loss --budget 0.2 --figure loss.svg
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
from butler import load
from cli import flag, plug_in
from data import evenly_spaced, text_to_measure_on
from lessons.figure import figure, label_ends, looks
from selection import make_selector

INTERVALS = (1, 2, 4, 8)
KINDS = ("prose", "copy")


def texts(tok, n: int, length: int) -> torch.Tensor:
    """-> ids [2n, T]: n texts of prose, then n texts that end within a copy of their beginning.

    T is a little less than `length`, so that the copy is not finished."""
    T = length * 19 // 20 // 8 * 8  # with 40 steps, the first step is one that chooses
    documents = plug_in("workshop.ruler").documents("copy", tok, n, 0, length)
    copies = [sum(document.encode(tok), [])[:T] for document in documents]
    return torch.cat([evenly_spaced(tok, text_to_measure_on(), n, T), torch.tensor(copies)])


@torch.inference_mode()
def all_logits(llama, ids, selectors: dict, steps: int) -> dict:
    """All texts [B, T] are read densely but for their last `steps` tokens, which go through each
    selector -> {name: logits [B, steps, V]}"""
    B, T = ids.shape
    cache = llama.new_cache(B, T)

    def watch(*seen):
        for selector in filter(None, selectors.values()):
            selector.watch(*seen)

    llama.prefill(ids[:, : T - steps], cache, watch)
    logits = {}
    for name, selector in selectors.items():
        cache.truncate(T - steps)
        # Only a choice that is used again makes it necessary to go token by token.
        size = 1 if getattr(selector, "interval", 1) > 1 else steps
        blocks = ids[:, T - steps :].split(size, dim=1)
        logits[name] = torch.cat([llama(block, cache, selector) for block in blocks], dim=1)
    return logits


def compare(dense, sparse, ids) -> dict:
    """Logits [B, steps, V] of both, ids [B, T] -> measures of each text and step, [B, steps]"""
    log_p, log_q = dense.log_softmax(-1), sparse.log_softmax(-1)
    written = sparse.argmax(-1)
    following = ids[:, 1 - dense.shape[1] :]  # the tokens that come next; the last one is unknown
    return {
        "same": (written == dense.argmax(-1)).float(),
        "KL": (log_p.exp() * (log_p - log_q)).sum(-1),
        "right": (written[:, :-1] == following).float(),
    }


def print_worst(tok, kl, dense, sparse, ids, positions, interval: int) -> None:
    """The step of each text at which the sparse model differs most from the dense one."""
    for text, step in enumerate(kl.argmax(1).tolist()):
        p = int(positions[step])
        before = tok.decode(ids[text, p - 8 : p + 1].tolist())
        wrote = [tok.decode([int(logits[text, step].argmax())]) for logits in (dense, sparse)]
        print(f"{kl[text, step]:5.1f} nats, choice {p % interval} steps old: {before!r} "
              f"-> dense {wrote[0]!r}, sparse {wrote[1]!r}")


def draw(path: str, table: dict) -> None:
    with figure(path, 2, (9.2, 3.4)) as axes:
        for axis, measure, title, top in ((axes[0], "same", "same likeliest token as dense", 1.03),
                                          (axes[1], "KL", "KL from dense, nats", None)):
            for kind, line in zip(KINDS, ("-", ":"), strict=True):
                values = [table[f"butler, {interval}"][f"{measure} {kind}"]
                          for interval in INTERVALS]
                axis.plot(range(len(values)), values, line, label=kind, **looks("butler"))
                axis.plot(len(values), table["recency"][f"{measure} {kind}"], label=kind,
                          **looks("recency"))
            axis.set_xticks(range(len(INTERVALS) + 1), [*INTERVALS, "recency"])
            axis.set(title=title, xlabel="steps that one choice of the butler serves",
                     ylim=(0, top))
            label_ends(axis)


@dataclass
class Config:
    """Compares sparse decode steps with dense ones, token by token."""

    n: int = flag(2, "texts of each kind", at_least=1)
    tokens: int = flag(1024, "tokens of a text, about", at_least=512)
    steps: int = flag(40, "last tokens of a text, which go through the selector", at_least=8)
    budget: float = flag(0.1, "tokens attended: a fraction of the tokens so far or a count")
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    llama, tok, butler = load()
    ids = texts(tok, config.n, config.tokens)
    selectors = {"dense": None, "oracle": make_selector("oracle", config.budget)}
    for interval in INTERVALS:
        selectors[f"butler, {interval}"] = butler.selector(config.budget, interval=interval)
    selectors["recency"] = make_selector("recency", config.budget)
    logits = all_logits(llama, ids, selectors, config.steps)
    measured = {name: compare(logits["dense"], sparse, ids) for name, sparse in logits.items()}

    table = {}
    for name, measures in measured.items():
        table[name] = {f"{measure} {kind}": part.mean().item()
                       for measure, values in measures.items()
                       for kind, part in zip(KINDS, values.chunk(2), strict=True)}
    columns = list(table["dense"])
    print("selector " + "".join(f"{column:>13s}" for column in columns))
    for name, row in table.items():
        print(f"{name:9s}" + "".join(f"{row[column]:13.2f}" for column in columns))

    positions = torch.arange(ids.shape[1] - config.steps, ids.shape[1])
    last = INTERVALS[-1]
    kl = measured[f"butler, {last}"]["KL"]
    print(f"\ninterval {last}: the worst step of each text")
    print_worst(tok, kl, logits["dense"], logits[f"butler, {last}"], ids, positions, last)
    if config.figure:
        draw(config.figure, table)
    return {"table": table}


if __name__ == "__main__":
    cli.run(main, Config)
