"""tasks/continuation.py - held-out files to go on with: documents for the loss of a long answer.

    files of Python's library that nobody trains on --a window of each, by lot--> lines of JSON:

    context     the first tokens of the window: 4,096 or more
    question    the 24 tokens that come next, up to a space between two words
    answer      what follows, 50 to 200 tokens

The loss of such an answer, dense and through a selection, tells what a selection costs where no
single token is the answer. Most of it is code and its comments; a name or a way to put things that
came up before can be found again.

    python -m tasks.continuation                        shows a document, shortened
    python -m tasks.continuation --out own.jsonl        then python synth_task.py --data own.jsonl
"""

import json
import random
import re
from dataclasses import dataclass

from common.cli import flag, provenance, run
from common.errors import UsageError
from common.files import replacing
from loading import tokenizer
from loading.fetch import resolve
from tasks.corpus import default_texts, hold_out


@dataclass
class Config:
    """Writes held-out texts, each to be answered by what it goes on with."""

    model: str = flag(None, "whose tokens are counted (default: SmolLM2-135M-Instruct)")
    n: int = flag(20, "documents", least=1)
    tokens: int = flag(4096, "tokens of a context at least", least=64)
    seed: int = flag(0, "seed of the windows")
    out: str = flag(None, "JSONL file to write")


def continued(tok, ids: list[int], answer: int) -> dict:
    """A window of tokens -> its parts, `answer` of the tokens in the last."""
    text, before = tok.decode(ids), len(tok.decode(ids[:-answer]))
    space = re.compile(r"(?<=\S) (?=\S)").search(text, before - 1)
    asked = len(tok.decode(ids[: -answer - 24]))
    at = space.start() if space else before
    return {"context": text[:asked], "question": text[asked:at], "answer": text[at:].strip()}


def main(config: Config) -> dict:
    tok, rng, lines = tokenizer.load(resolve(config.model)), random.Random(config.seed), []
    length = config.tokens + 24 + 200
    files = [ids for ids in map(tok.encode, hold_out(default_texts()[1])[1]) if len(ids) >= length]
    if not files:
        raise UsageError(f"no held-out file has {length} tokens")
    for number in range(config.n):  # once more from the first, where there are fewer
        ids = files[number % len(files)]
        start = rng.randint(0, len(ids) - length)
        lines.append(continued(tok, ids[start : start + length], rng.randint(60, 190)))
    print(*(f"{name:9s} {lines[0][name][-300:]!r}" for name in lines[0]), sep="\n")
    if config.out:
        with replacing(config.out) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {name: sorted(tok.count(line[name]) for line in lines) for name in lines[0]}
    return {"documents": len(lines), "tokens": {name: [c[0], c[-1]] for name, c in counts.items()}
            } | provenance()


if __name__ == "__main__":
    run(main, Config)
