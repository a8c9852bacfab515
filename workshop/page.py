"""workshop/page.py - an HTML page: which cached tokens each step selected, beside the oracle's.

    q, keys of a layer --selector--> index [1, G, 1, K] --.
                       --oracle----> index [1, G, 1, K] ----> masks [2, L-1, G, S] --> page.html

The reader picks a generated token and a layer, or all layers together. The page shades every cached
token by the share of layers and KV heads that selected it at the step which generated that token:
on the left the run's own selection, on the right the oracle's, which ranks by the true attention of
the same queries and keys. Layer 0 attends to all tokens and is left out.

The page is one file and loads nothing. It holds one bit per side, layer, KV head and cached token
for each step: 11 kB for 380 tokens of the default model.

    python sample.py --html page.html
"""

import base64
import json
from pathlib import Path

import numpy as np
import torch

from cli import replacing
from kernel import index_to_mask
from selection import Oracle


class Page:
    """A selector that selects what another one does and records it beside the oracle's selection.

    One text, one token per step. Call `add` after each step. A step without `add` is forgotten.

    masks    for each layer above 0, the two selections of the latest step: booleans [2, G, S]
    tokens   the token that each step generated
    steps    the masks [2, L-1, G, S] of each step, as base64 text
    """

    def __init__(self, selector, budget: float):
        """selector: None for dense attention. The oracle selects within the same budget."""
        self.selector = selector
        self.oracle = Oracle(budget)
        self.masks = []
        self.tokens = []
        self.steps = []

    def watch(self, layer, x, q, keys, positions) -> None:
        if self.selector:
            self.selector.watch(layer, x, q, keys, positions)

    def look_ahead(self, *seen) -> None:
        if self.selector:
            self.selector.look_ahead(*seen)

    def choose_for_blocks(self, *seen):
        return self.selector.choose_for_blocks(*seen)

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions) if self.selector else None
        best = self.oracle(layer, x, q, keys, positions)
        if layer == 0:
            self.masks = []
            return index
        best = index_to_mask(best[0, :, 0], keys.shape[2])  # [G, S]
        selected = torch.ones_like(best)
        if index is not None:
            selected = index_to_mask(index[0, :, 0], keys.shape[2])
        self.masks.append(torch.stack([selected, best]).cpu())
        return index

    def add(self, token: int) -> None:
        """The step that has just run generated this token."""
        masks = torch.stack(self.masks, dim=1)  # [2, L-1, G, S]
        bits = np.packbits(masks.numpy(), bitorder="little")
        self.steps.append(base64.b64encode(bits).decode())
        self.tokens.append(token)

    def write(self, path, tok, ids, name: str, facts: dict) -> None:
        """Writes the page of the prompt `ids` and the generated tokens. name: the selector's;
        facts: settings and results, shown at the page's end. Raises UserError."""
        budget = self.oracle.budget
        data = {
            "name": name, "budget": budget.total, "sinks": budget.sinks, "window": budget.window,
            "layers": len(self.masks), "heads": len(self.masks[0][0]) if self.masks else 0,
            "prompt": len(ids), "texts": tok.texts([*ids, *self.tokens]),
            "steps": self.steps, "facts": facts}
        template = Path(__file__).with_suffix(".html").read_text(encoding="ascii")
        # Only a "<" can end a script element, and JSON may write it as \u003c.
        page = template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))
        with replacing(path) as part:
            part.write_text(page, encoding="ascii")
