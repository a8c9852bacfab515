"""selection.py - from scores to the cached tokens that each query may attend to.

    scores [B, G, T, S], from anybody -Selector-> indices [B, G, T, K] int32, -1 = empty

    | sinks |  .  .  chosen  .  chosen  .  .  . | window, ending at t |        K tokens in all

A selection always holds the sinks (first tokens) and a recent window; what is left of the budget
goes to the best scores, one choice per KV head. The butler (butler.py) and what one compares it
with (baselines.py) differ in their scores, and those that evict in what is left to choose from.

    python selection.py        prints what budgets keep
"""

import torch

from common.errors import Refusal
from kernel import top


class SelectionError(Refusal):
    """A budget, or another rule, that cannot be kept."""


def allowance(budget: float, cached, least: int):
    """How many tokens a query that sees `cached` of them (int or tensor) may attend to, in all: a
    fraction of these for a budget up to 1, above it the count that it is. Sinks and window
    (`least`) are always granted, so that a short prompt is dense."""
    if isinstance(cached, int):  # a tenth of 10 is 1, however rounded
        return min(max(int(cached * budget + 1e-4 if budget <= 1 else budget), least), cached)
    total = cached.double() * budget + 1e-4 if budget <= 1 else torch.full_like(cached, int(budget))
    return total.long().clamp(min=least).minimum(cached)


def first_position(keys, positions) -> int:
    """Where the new tokens begin, in the row where that is earliest. The device is asked only if
    there are several rows; one alone ends where its keys do."""
    rows, T = positions.shape
    return keys.shape[2] - T if rows == 1 else int(positions.min())


class Selector:
    """Which cached tokens may each query attend to? Subclasses answer with `scores`, or `pick`.

    budget       all tokens attended, per layer and KV head: a fraction (<= 1) or a count (> 1);
                 it includes sinks, window, chosen tokens and the token itself
    sinks        first tokens of the text, always kept: where attention rests when idle
    window       most recent tokens, always kept, the newest one included
    dense_below  attends to everything while fewer tokens than this are cached, where a selection
                 takes longer than it saves; decided for a block of tokens by its last one

    Called by the model once per layer: at layer 0, which attends to everything as the butler cannot
    predict it, `begin` and `arrive`; at every layer `look_ahead`; at all others `selected`, which
    asks `pick`, and that `scores` and `choose`. A block of tokens in one call gets what the same
    tokens would get one by one, `random` apart. Holds the state of one sequence or batch, so make a
    fresh one for each. `index[layer]` is the choice that a sparse step's layer used.
    """

    SINKS, WINDOW = 4, 8
    # for beyond/: who is told a producer's layers and their choice [R, B, G, 1, K']; graph.py's
    read_ahead, capturable, bound = None, False, None

    def __init__(self, budget, sinks=SINKS, window=WINDOW, dense_below=0):
        if not (0 < budget <= 1 or (budget > 1 and float(budget).is_integer())):
            raise SelectionError(f"budget {budget}: a fraction up to 1 or a whole count of tokens")
        if sinks < 0 or window < 1:
            raise SelectionError("sinks are >= 0, a window >= 1")
        self.budget, self.sinks, self.window = budget, sinks, window
        self.dense_below, self.index = dense_below, {}
        self.start, self.end = 0, 0  # of the latest call's tokens
        self.dense, self.granted = False, None  # all attended? sinks and window [B, G, T, least]

    def watch(self, layer, x, q, keys, positions) -> None:
        """Pass this as the selector of `prefill`: the prompt is read densely, and the selector
        sees its keys."""

    def early(self, cached: int) -> bool:
        """Can a decode step after `cached` tokens choose for a layer before the layer's query and
        key are there (q is None)?"""
        return False

    def look_ahead(self, layer: int, x, positions) -> None:
        """Sees the input x [B, T, C] of every layer, before the layer runs."""

    def scores(self, layer: int, q, keys, positions):
        """Importance [B, G, T, S] of each cached token; only the order counts, larger is better."""
        raise NotImplementedError

    def pick(self, layer: int, q, keys, positions):
        """The chosen tokens [B, G, T, K'] of every query, beside sinks and window."""
        return self.choose(self.scores(layer, q, keys, positions), positions)

    def arrive(self, T: int, start: int, end: int) -> None:
        """T tokens a row have come; of all rows the earliest stands at `start`, the last at
        `end` - 1. Python's numbers only: for a CUDA graph this is called beside it."""
        self.start, self.end = start, end
        self.dense = end < self.dense_below

    def __call__(self, layer, x, q, keys, positions):
        """See model.py: -> index [B, G, T, K] int32, or None for dense attention."""
        if layer == 0:
            self.begin(x.shape[1], keys, positions)
        if self.dense:
            return None
        self.look_ahead(layer, x, positions)
        if layer == 0:
            return None
        self.index[layer] = self.selected(layer, q, keys, positions)
        return self.index[layer]

    @torch.inference_mode()
    def begin(self, T: int, keys, positions) -> None:
        if self.bound is None:
            self.arrive(T, first_position(keys, positions), keys.shape[2])
        if not self.dense:
            self.granted = self.always(positions)[:, None].expand(-1, keys.shape[1], -1, -1)

    @torch.inference_mode()
    def selected(self, layer, q, keys, positions):
        """-> sinks, window and what is picked, [B, G, T, K] int32"""
        chosen = self.pick(layer, q, keys, positions)
        return torch.cat([self.granted.to(chosen.device), chosen], dim=-1).int()

    def always(self, positions):
        """Sinks and window of queries at `positions` [B, T] -> [B, T, sinks + window]."""
        here = positions[..., None]
        sinks = torch.arange(self.sinks, device=here.device)
        recent = here - torch.arange(self.window, device=here.device)
        return torch.cat([torch.where(sinks <= here, sinks, -1),
                          torch.where(recent >= self.sinks, recent, -1)], dim=-1)

    def wanted(self, positions):
        """How many tokens a query may choose beside sinks and window; below 0 in a short text."""
        least = self.sinks + self.window
        return allowance(self.budget, positions + 1, least) - least

    def choose(self, scores, positions):
        """The best between sinks and window: scores [B, G, T, S] -> [B, G, T, K'], -1 = empty. Each
        once; K' is what the longest row's budget leaves."""
        positions = positions.to(scores.device)
        stops = (positions - self.window + 1).clamp(min=self.sinks)
        wants = self.wanted(positions).clamp(min=0)
        return top(scores, self.sinks, stops[:, None], wants[:, None])


if __name__ == "__main__":
    for cached, budget in (100, 12), (100, 0.1), (12, 0.1):
        selector, newest = Selector(budget, window=4), torch.tensor([[cached - 1]])
        chosen = selector.choose(torch.rand(1, 1, 1, cached), newest)
        kept = torch.cat([selector.always(newest).flatten(), chosen.flatten()]).tolist()
        print(f"{cached} cached tokens, budget {budget}: {sorted(s for s in kept if s >= 0)}")
    print("sinks and window are kept whatever the budget; what lies between is drawn by lot here")
