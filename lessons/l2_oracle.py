"""Lesson 2. What if we knew?

In lesson 1, a tenth of the tokens holds most of the attention. If somebody told us these tokens at
every step, would the model still give the same answers? And do simple rules find the same tokens?

The text names a place near its start: "The place is called Pellorqua." About 250 other words
follow. Then a question describes the place in other words and asks for its name. The text before
the question is read densely. Then H2O and SnapKV delete tokens from the cache. Question and answer
go through a selector, which attends to 10 % of the tokens so far:

- oracle: computes the true attention of all tokens and takes the largest. It must read all keys,
  so it saves only values.
- recency: the first 4 tokens and the latest ones, 10 % in all.
- H2O: deletes the tokens that received the least attention so far, but none of the latest 5 % of
  the text. A deleted token never comes back.
- SnapKV: deletes once, after the text, the tokens that the last 32 queries attend to the least,
  averaged over 7 neighbouring tokens.
- Quest: keeps all tokens, in pages of 16. It selects pages by an upper bound of query times key.

The first column counts right answers. The other columns look at one text, at the step that must
write the first token of the name. They show, for each token of the sentence with the name, how
many of the 87 KV heads above layer 0 attend to it.

What the table shows: with the oracle, every answer is right, although only a part of the heads
attends to the name. The other selectors are nearly always wrong. Recency and SnapKV have nothing
of the name left. With H2O most heads deleted it. Quest deletes nothing, but most heads rank other
pages higher.

What to conclude: a tenth is enough if we know which tenth. H2O and SnapKV delete before the
question comes, so they cannot know what it needs. Quest sees the question, but a bound for a page
is not the attention. We need a selector that keeps everything, looks at the present step, and is
much cheaper than the oracle. Ten texts say little: results/README.md has more.

Exercise 2.1, a selector of your own. Write the class `Stride` in selection.py and add it to
`SELECTORS` there as "stride". It fills the budget with tokens at even distances, from the sinks to
the window. The distances between neighbours differ by at most 1. Override `choose`.
`Budget.allowance` gives the number of tokens, sinks and window included. To see it in the table,
also add it to `SELECTORS` in l2_oracle.py.

Exercise 2.2, maximum over heads. Add the class `Widest` in the same way, as "widest". This oracle
ranks by the largest attention of the query heads that share a KV head, instead of their mean.

    python -m lessons.l2_oracle --budget 0.5 --figure oracle.svg
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it also runs as a file

import cli
from butler import load
from cli import UserError, flag
from kernel import index_to_mask
from lessons.figure import figure, label_ends, looks
from selection import make_selector
from synth_task import CUE, answers, coreference_documents

SELECTORS = ("dense", "oracle", "quest", "snapkv", "h2o", "recency")


def place_of(tok, ids: list[int], sentence: str) -> tuple[int, list[str]]:
    """Where a sentence stands in a text: the place of its first token, and its tokens as text."""
    pieces = tok.texts(ids)
    start = "".join(pieces).index(sentence)
    first = characters = 0
    while characters + len(pieces[first]) <= start:
        characters += len(pieces[first])
        first += 1
    last = first
    while characters < start + len(sentence):
        characters += len(pieces[last])
        last += 1
    return first, pieces[first:last]


def heads_that_attend(selector, row: int, tokens: int) -> torch.Tensor:
    """For each of the text's tokens: the share of all KV heads above layer 0 that attend to it at
    step `row` of the question, [tokens]"""
    if selector is None:
        return torch.ones(tokens)
    index = torch.stack([index[0, :, row] for index in selector.index.values()])  # [L-1, G, K]
    return index_to_mask(index, tokens).float().mean((0, 1))


def ask(llama, tok, documents, budget: float):
    """Every selector answers every document -> {selector: scores}, and for each document its
    selectors, which still hold what they selected."""
    scores = {name: [] for name in SELECTORS}
    used = []
    for document in tqdm(documents, "texts", file=sys.stderr):
        made = {name: make_selector(name, budget) for name in SELECTORS}
        makers = [partial(made.get, name) for name in SELECTORS]
        for name, score in zip(SELECTORS, answers(llama, tok, document, makers), strict=True):
            scores[name].append(score)
        used.append(made)
    return scores, used


def draw(path: str, answered: dict, pieces: list[str], attending: dict) -> None:
    with figure(path, 2, (9.2, 3.4)) as (left, right):
        for place, (name, share) in enumerate(answered.items()):
            left.barh(place, share, color=looks(name)["color"])
            left.text(share + 0.02, place, f"{share:.0%}", va="center")
        left.set_yticks(range(len(answered)), answered)
        for label in left.get_yticklabels():
            label.set_color(looks(label.get_text())["color"])
        left.invert_yaxis()
        left.set(title="answers right", xlim=(0, 1.15))
        left.set_xticks([])
        for name in SELECTORS[1:]:  # dense attends to all tokens
            right.plot(attending[name], label=name, **looks(name))
        right.set_xticks(range(len(pieces)), [piece.strip() for piece in pieces], rotation=60)
        right.set(title="share of the KV heads that attend to each token",
                  ylim=(-0.08, None))
        label_ends(right)


@dataclass
class Config:
    """Asks for a name in a text, and shows what each selector has left of it."""

    n: int = flag(10, "texts", at_least=1)
    budget: float = flag(0.1, "tokens attended: a fraction of the tokens so far or a count")
    seed: int = flag(0, "seed of the texts")
    figure: str = flag(None, "draw the table to this .svg or .png file")


def main(config: Config) -> dict:
    llama, tok, _ = load()
    documents = coreference_documents("test", config.n, config.seed)
    scores, used = ask(llama, tok, documents, config.budget)
    if 1.0 not in scores["dense"]:
        raise UserError("the model answers none of the texts: try a larger --n")
    shown = scores["dense"].index(1.0)
    document = documents[shown]
    context, question, _ = document.encode(tok)
    first, pieces = place_of(tok, context, f"{CUE} {document.answer}.")
    attending = {}
    for name, selector in used[shown].items():
        shares = heads_that_attend(selector, len(question) - 1, len(context) + len(question))
        attending[name] = shares[first : first + len(pieces)].tolist()
    right = {name: sum(column) / len(column) for name, column in scores.items()}

    print(f"text {shown + 1} of {config.n}: {len(context)} tokens and a question\n"
          f"told at token {first}: {''.join(pieces).strip()!r}\n"
          f"the question: {document.question.strip()!r}\n\n"
          "right: answers right, all texts\n"
          "then: of all KV heads above layer 0, how many attend to this token, in %\n")
    print("selector  right  " + "".join(f"{piece.strip():>8s}" for piece in pieces))
    for name in SELECTORS:
        cells = "".join(f"{100 * share:8.0f}" for share in attending[name])
        print(f"{name:8s} {right[name]:6.0%}  {cells}")
    if config.figure:
        draw(config.figure, right, pieces, attending)
    return {"right": right, "tokens": pieces, "attending": attending}


if __name__ == "__main__":
    cli.run(main, Config)
