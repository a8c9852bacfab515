"""selection.py - from scores to the cached tokens that each query attends to.

    scores [B, G, T, S]  --Selector-->  index [B, G, T, K] int32, -1 = empty

    | sinks |  .  .  chosen  .  chosen  .  .  .  | window, ending at the query's own token |

A selection always holds the sinks (the first tokens of the text) and a recent window. What is left
of the budget goes to the tokens with the highest scores, one choice per KV head. Methods differ in
their scores alone:

    butler    predicted before the layer is reached            butler.py
    oracle    the true attention of this very step: no other K tokens hold more of it
    recency   the most recent tokens: StreamingLLM, arXiv 2309.17453
    random    random numbers

More of them are in workshop/rivals.py.

    python selection.py        which tokens some budgets select
"""

from dataclasses import dataclass

import torch

from cli import UserError, plug_in
from kernel import true_attention


@dataclass(frozen=True)
class Budget:
    """How many cached tokens a query may attend to, per layer and KV head, in total.

    total    a fraction of all cached tokens (up to 1) or a number of tokens (above 1)
    sinks    the first tokens of the text: attention rests on them when it has nothing to look for
    window   the most recent tokens, the query's own included

    Sinks and window count towards the total, but are selected even if they exceed it.
    """

    total: float
    sinks: int = 4
    window: int = 8

    def __post_init__(self):
        if not (0 < self.total <= 1 or (self.total > 1 and float(self.total).is_integer())):
            raise UserError(f"budget {self.total}: a fraction up to 1 or a whole number of tokens")
        if self.sinks < 0 or self.window < 1:
            raise UserError("a selection has at least 0 sinks and a window of at least 1 token")

    def allowance(self, cached):
        """cached [T]: how many tokens each query sees -> how many it may attend to, [T]"""
        if self.total > 1:
            tokens = torch.full_like(cached, int(self.total))
        else:
            tokens = (cached.double() * self.total + 1e-4).long()  # a tenth of 10 is 1
        return tokens.clamp(min=self.sinks + self.window).minimum(cached)


class Selector:
    """Names the cached tokens that each query attends to. Subclasses answer with `scores`.

    The model calls a selector once per layer (see model.py). Layer 0 attends to all tokens,
    because no prediction is made before it. Several tokens in one call get what they would get one
    by one. A selector serves one text; make a fresh one for the next.

    index[layer] is the latest selection, [B, G, T, K].
    """

    def __init__(self, budget: float, **rules):
        """budget: see Budget.total; rules: sinks, window."""
        self.budget = Budget(budget, **rules)
        self.index = {}

    def watch(self, layer, x, q, keys, positions) -> None:
        """Pass this as the selector of `prefill`: the prompt is read densely and its keys seen."""

    def look_ahead(self, layer, x, positions) -> None:
        """Sees the input of every layer, layer 0 included, before `scores` of that layer."""

    def scores(self, layer, q, keys, positions):
        """How important is each cached token? -> [B, G, T, S]; only the order counts."""
        raise NotImplementedError

    def choose(self, layer, q, keys, positions):
        """The tokens chosen between sinks and window, [B, G, T, K'], -1 = empty."""
        return self.topk(self.scores(layer, q, keys, positions))

    @torch.inference_mode()
    def __call__(self, layer, x, q, keys, positions):
        """See model.py -> index [B, G, T, K] int32, or None for dense attention."""
        self.look_ahead(layer, x, positions)
        if layer == 0:
            return None
        chosen = self.choose(layer, q, keys, positions)
        always = self.sinks_and_window(x.shape[1], keys.shape[2], keys.device)
        always = always.expand(*chosen.shape[:2], -1, -1)
        self.index[layer] = torch.cat([always, chosen], dim=-1).int()
        return self.index[layer]

    def sinks_and_window(self, T: int, S: int, device):
        """What the last T of S tokens always attend to: [T, sinks + window], -1 = empty."""
        own = torch.arange(S - T, S, device=device)[:, None]
        sinks = torch.arange(self.budget.sinks, device=device).expand(T, -1)
        recent = own - torch.arange(self.budget.window, device=device)
        sinks = torch.where(sinks <= own, sinks, -1)
        recent = torch.where(recent >= self.budget.sinks, recent, -1)  # each token only once
        return torch.cat([sinks, recent], dim=1)

    def topk(self, scores):
        """The highest scores between sinks and window. scores [B, G, T, S] -> [B, G, T, K']"""
        T, S = scores.shape[2:]
        token = torch.arange(S, device=scores.device)
        own = token[S - T :]
        fixed = self.budget.sinks + self.budget.window
        num_chosen = (self.budget.allowance(own + 1) - fixed).clamp(min=0)  # [T]
        candidate = (token >= self.budget.sinks) & (token <= own[:, None] - self.budget.window)
        scores = scores.float().masked_fill(~candidate, -torch.inf)
        values, chosen = scores.topk(min(int(num_chosen.max()), S))
        # A query near the start of the text may choose fewer than the last one.
        rank = torch.arange(chosen.shape[-1], device=scores.device)
        granted = (rank < num_chosen[:, None]) & (values > -torch.inf)
        return torch.where(granted, chosen, -1)


class Oracle(Selector):
    def scores(self, layer, q, keys, positions):
        return true_attention(q, keys).mean(2)  # over the query heads of each KV head


class Recency(Selector):
    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        return torch.arange(S, device=q.device).expand(B, G, q.shape[2], S)


class Random(Selector):
    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        rng = torch.Generator().manual_seed(1000 * int(positions[0]) + layer)
        return torch.rand(B, G, q.shape[2], S, generator=rng).to(q.device)


SELECTORS = {"oracle": Oracle, "recency": Recency, "random": Random}
RIVALS = ("quest", "h2o", "snapkv", "keynorm")  # in workshop/rivals.py
NAMES = ("dense", "butler", *SELECTORS, *RIVALS)


def make_selector(name: str, budget: float, butler=None, **rules) -> Selector | None:
    """A fresh selector by its name on the command line; None for dense. rules: keyword arguments
    of a butler's selector, such as interval. Raises UserError."""
    Budget(budget)  # refuses what makes no sense, for dense too
    if name == "dense":
        return None
    if name == "butler":
        if butler is None:
            raise UserError("there is no butler for this model: train one with python train.py, "
                            "then name it with --butler")
        for rule in rules.keys() - set(butler.rules):
            raise UserError(f"the butler of this engine has no --{rule}; it has "
                            f"{', '.join('--' + own for own in butler.rules)}")
        return butler.selector(budget, **rules)
    if name in SELECTORS:
        return SELECTORS[name](budget)
    if name in RIVALS:
        return plug_in("workshop.rivals").RIVALS[name](budget)
    raise UserError(f"unknown selector {name!r}; known: {', '.join(NAMES)}")


if __name__ == "__main__":
    for cached, budget in (100, 14), (100, 0.2), (12, 0.2):
        selector = Selector(budget)
        always = selector.sinks_and_window(1, cached, "cpu").flatten()
        chosen = selector.topk(torch.rand(1, 1, 1, cached)).flatten()
        index = sorted(int(token) for token in torch.cat([always, chosen]) if token >= 0)
        print(f"{cached} cached tokens, budget {budget}: {index}")
    print("sinks and window are always selected; the tokens between them are random here")
