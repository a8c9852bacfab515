"""results/step.py - one decode step in words: what one KV head selected, and what the oracle would.

    a co-reference document and its question, all but the last token --prefill--> cache
    the last token --decode through the butler--> the selections of every layer and KV head
                   --the oracle, same queries and keys--> the best selections
    one KV head of them --> results/step.json --draw.py--> results/step.svg

The head shown is the one whose true attention to the answer's name in the text is largest; the
butler has no part in that. The report also tells for all heads together how many of the tokens that
the oracle chose the butler chose too.

    python results/step.py
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from cli import UserError, flag
from kernel import index_to_mask, true_attention
from selection import Oracle, prefill
from synth_task import coreference, pools


@dataclass
class Config:
    """Records what one decode step selected from a co-reference document."""

    budget: float = flag(0.1, "tokens attended: a fraction of the cache (up to 1) or a count")
    seed: int = flag(0, "which document")


class Beside:
    """A selector that selects what another one does, and records it beside the oracle's selection:
    three dictionaries by layer, of the latest step.

    selected, best   booleans [G, S]
    attention        the true attention, mean over the group's query heads, [G, S]
    """

    def __init__(self, selector, budget: float):
        self.selector = selector
        self.oracle = Oracle(budget)
        self.selected = {}
        self.best = {}
        self.attention = {}

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions)
        best = self.oracle(layer, x, q, keys, positions)
        if layer > 0:
            S = keys.shape[2]
            self.selected[layer] = index_to_mask(index[0, :, 0], S)
            self.best[layer] = index_to_mask(best[0, :, 0], S)
            self.attention[layer] = true_attention(q, keys).mean(2)[0, :, 0]
        return index


def answer_tokens(texts: list[str], answer: str) -> list[int]:
    """The places of the tokens that spell the answer, where it first stands."""
    start = "".join(texts).index(answer)
    end = start + len(answer)
    places, at = [], 0
    for place, text in enumerate(texts):
        if at < end and at + len(text) > start:
            places.append(place)
        at += len(text)
    return places


def main(config: Config) -> dict:
    llama, tok, butler = cli.engine("plain").load()
    document = coreference(random.Random(config.seed), pools("test"))
    ids = tok.bos + tok.encode(document.context + document.question)
    texts = tok.texts(ids)
    beside = Beside(butler.selector(config.budget), config.budget)
    cache = llama.new_cache(1, len(ids))
    prompt = torch.tensor([ids])
    prefill(llama, prompt[:, :-1], cache, beside.selector)
    logits = llama.decode(prompt[:, -1:], cache, beside)
    name = answer_tokens(texts, document.answer)
    on_name = {(layer, head): float(attention[head, name].sum())
               for layer, attention in beside.attention.items() for head in range(len(attention))}
    layer, head = max(on_name, key=on_name.get)
    budget = beside.oracle.budget
    chosen = slice(budget.sinks, len(ids) - budget.window)  # what is always selected does not count
    best = torch.stack(list(beside.best.values()))[..., chosen]
    found = torch.stack(list(beside.selected.values()))[..., chosen] & best
    if not best.any():
        raise UserError(f"budget {config.budget:g} leaves nothing to choose")
    report = {"texts": texts, "answer": document.answer, "next": tok.texts(
                  [*ids, int(logits[0, -1].argmax())])[-1],
              "sinks": budget.sinks, "window": budget.window, "layer": layer, "head": head,
              "butler": beside.selected[layer][head].nonzero().flatten().tolist(),
              "oracle": beside.best[layer][head].nonzero().flatten().tolist(),
              "found_by_all_heads": float(found.sum() / best.sum())}
    print(f"layer {layer}, KV head {head}, {len(ids)} cached tokens")
    for name in "butler", "oracle":
        print(f"{name:8s}", " | ".join(repr(texts[i])[1:-1] for i in report[name]))
    return report


if __name__ == "__main__":
    cli.run(main, Config)
