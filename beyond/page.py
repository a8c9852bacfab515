"""beyond/page.py - an HTML page: what every step kept, beside what the oracle would have.

    q, keys of a layer --selector--> kept tokens --how many KV heads--> [2, L-1, S] bytes a step
                       --oracle----> kept tokens -^      --zlib, base64--> page.html, filled in

The page needs no network and no other file. A generated token is a button: it shades every token
that was cached when it was written by how many layers and KV heads kept it, on the left as the run
had it, on the right as the oracle (baselines.py) would have chosen from the very same queries and
keys. Layer 0 attends to everything and is not shown. `python sample.py --html FILE` writes it.

One byte holds the KV heads of a layer that kept a token; a step is packed by itself and unpacked by
the browser when it is looked at. A token generated over 4,000 cached ones takes some 40 kB; several
counts in a byte would save a fifth of that.

    python -m beyond.page        what a step takes in the page, of a small random model
"""

import base64
import codecs
import json
import zlib
from pathlib import Path

import torch

from baselines import Oracle
from kernel import mark


class Beside:
    """Stands where a selector stands (None: dense), asks the oracle too, and remembers both.

    The model attends to what the selector says. One sequence, one token a step: after each, `add`
    keeps what was noted; a step without it is forgotten. The oracle chooses anew at every step,
    within the same budget, sinks and window.
    """

    read_ahead, capturable = None, False  # as a selector's; every step is looked at

    def __init__(self, selector, budget: float):
        self.selector, self.oracle = selector, Oracle(budget)
        self.tokens, self.steps, self.same, self.heads = [], [], [], 0

    def watch(self, layer, x, q, keys, positions) -> None:
        if self.selector:
            self.selector.watch(layer, x, q, keys, positions)

    def __call__(self, layer, x, q, keys, positions):
        index = None
        if self.selector:
            self.selector.read_ahead = self.read_ahead
            index = self.selector(layer, x, q, keys, positions)
        best = self.oracle(layer, x, q, keys, positions)
        if layer == 0:
            self.noted = []
            return index
        best = mark(best, keys.shape[2])
        kept = torch.ones_like(best) if index is None else mark(index, keys.shape[2])
        self.noted.append(torch.cat([kept, best])[:, :, 0])  # [2, G, S]
        return index

    def add(self, token: int) -> None:
        """The step just taken wrote this token."""
        both = torch.stack(self.noted, dim=1).cpu()  # [2, L-1, G, S]
        packed = zlib.compress(both.sum(2, dtype=torch.uint8).numpy().tobytes())
        self.steps.append(base64.b64encode(packed).decode())
        free = both[..., self.oracle.sinks : max(both.shape[-1] - self.oracle.window, 0)]
        shares = zip(free.all(0).sum((1, 2)).tolist(), free[1].sum((1, 2)).tolist(), strict=True)
        self.same.append([round(100 * found / best) if best else None for found, best in shares])
        self.tokens.append(token)
        self.heads = both.shape[2]

    def write(self, path, tok, ids, name: str, facts: dict) -> int:
        """The page of the prompt `ids` and the tokens added; `facts` stand at its end. -> bytes"""
        data = {"name": name, "about": self.about(name), "prompt": len(ids), "heads": self.heads,
                "texts": texts(tok, [*ids, *self.tokens]), "steps": self.steps, "same": self.same,
                "facts": json.dumps(facts, indent=1, ensure_ascii=False)}
        form = Path(__file__).with_suffix(".html").read_text(encoding="ascii")
        # Inside a script element nothing but a "<" can end it; other text is ASCII by json.
        page = form.replace("DATA", json.dumps(data).replace("<", "\\u003c"))
        return Path(path).write_text(page, encoding="ascii")

    def about(self, name: str) -> str:
        if not self.steps:
            return "Nothing was generated."
        run = "dense, where everything is kept" if name == "dense" else f"{name}, as the run had it"
        return (
            "The prompt of one run of TokenButler, then, underlined, what it wrote. Choose a "
            "written token by a click or with the arrow keys: the stronger the green, the more of "
            f"the {len(self.same[0])} layers and their {self.heads} KV heads kept a token at the "
            f"step that wrote the chosen one. Left: {run}. Right: the oracle, which knows that "
            f"step's true attention, at budget {self.oracle.budget:g}. The level in a layer's "
            "button is how much of the oracle's choice was kept on the left too, not counting the "
            f"first {self.oracle.sinks} and last {self.oracle.window} tokens, which always are. "
            "Layer 0 attends to everything and is not shown.")


def texts(tok, ids) -> list[str]:
    """The text of each token, "" of one that ends within a character; the next has it whole."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(ids) - 1
    return [utf8.decode(tok.decode_bytes([token]), i == last) for i, token in enumerate(ids)]


if __name__ == "__main__":
    from baselines import Recency
    from model import Config, Llama

    torch.manual_seed(0)
    llama = Llama(Config(vocab_size=256, width=64, layers=5, heads=4, kv_heads=2, head_dim=16,
                         mlp_width=128)).eval()
    beside, cache = Beside(Recency(budget=0.1), budget=0.1), llama.new_cache(1, 401)
    llama.prefill(torch.arange(400)[None] % 256, cache)
    llama.decode(torch.tensor([[0]]), cache, beside)
    beside.add(0)
    (step,), (same,) = beside.steps, beside.same
    print(f"a step: [2, 4, 401] bytes, one for a layer and token, {len(step):,} characters in the "
          "page")
    print(f"recency kept {same} % of what the oracle chose in layers 1 to 4, beside what both keep")
