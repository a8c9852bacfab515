"""selection.py - from scores to the cached tokens that each query attends to.

    scores [B, G, T, S]  --Selector-->  index [B, G, T, K] int32, -1 = empty

    text:   | sinks |  .  .  chosen  .  chosen  .  .  .  | window, ending at the query's own token |
    index:  sinks, window (newest token first), chosen tokens (highest score first)

A selection always contains the sinks, which are the first tokens of the text, and a window of the
most recent tokens. The rest of the budget goes to the tokens with the highest scores between the
two, one choice per KV head. Most selectors differ only in their scores:

    butler    predicted before the layer is reached                   butler.py
    oracle    the true attention of the step, which only an experiment can know in time
    recency   the most recent tokens (StreamingLLM, arXiv 2309.17453)
    random    random numbers

More of them, some of which evict tokens for good, are in workshop/rivals.py.

    python selection.py        which tokens some budgets select
"""

from dataclasses import dataclass

import torch

from cli import UserError, plug_in
from kernel import true_attention


@dataclass(frozen=True)
class Budget:
    """How many tokens a query may attend to, in total, per layer and KV head.

    total    a fraction of all tokens so far (up to 1) or a number of tokens (above 1)
    sinks    number of first tokens that are always selected: heads attend to them when nothing
             else is relevant
    window   number of most recent tokens that are always selected, the query's own included

    Sinks and window count towards the total. If they alone exceed it, they are still selected.
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
        """cached [T]: how many tokens there are up to each query's own -> how many of them it may
        attend to, [T]"""
        if self.total > 1:
            tokens = torch.full_like(cached, int(self.total))
        else:
            tokens = (cached.double() * self.total + 1e-4).long()  # 0.29 * 100 is 28.999...
        return tokens.clamp(min=self.sinks + self.window).minimum(cached)


class Selector:
    """Names the tokens that each query attends to. A subclass defines `scores`.

    The model calls a selector once per layer; see model.py for the arguments. Layer 0 attends to
    all tokens with every selector, because the butler cannot predict it. The T tokens of one call
    are selected for as if they came one by one. A selector serves one text: make a new one for the
    next text.

    index   the latest selection of each layer above 0, {layer: [B, G, T, K]}
    """

    def __init__(self, budget: float, **sizes):
        """budget: the total; sizes: sinks and window. See Budget."""
        self.budget = Budget(budget, **sizes)
        self.index = {}

    def watch(self, layer, x, q, keys, positions) -> None:
        """Pass this as the selector of `prefill`. The prompt is then read densely, because this
        returns None, and subclasses can use its keys."""

    def look_ahead(self, layer, x, positions) -> None:
        """Called with the input of every layer, layer 0 included, before the layer selects."""

    def scores(self, layer, q, keys, positions):
        """How important is each token of `keys` for each query? -> [B, G, T, S], arguments as in
        model.py. Only the order counts. Of equal scores any may be chosen, so scores should not
        tie. Scores of sinks, window and later tokens are ignored. Query t is at place S - T + t."""
        raise NotImplementedError

    def choose(self, layer, q, keys, positions):
        """The tokens chosen between sinks and window, [B, G, T, number of them], -1 = empty."""
        return self.topk(self.scores(layer, q, keys, positions))

    @torch.inference_mode()
    def __call__(self, layer, x, q, keys, positions):
        """What the model calls -> index [B, G, T, K], or None in layer 0."""
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
        own = torch.arange(S - T, S, device=device)[:, None]  # the place of each query's own token
        sinks = torch.arange(self.budget.sinks, device=device).expand(T, -1)
        recent = own - torch.arange(self.budget.window, device=device)
        sinks = torch.where(sinks <= own, sinks, -1)
        recent = torch.where(recent >= self.budget.sinks, recent, -1)  # no token twice
        return torch.cat([sinks, recent], dim=1)

    def topk(self, scores):
        """The tokens with the highest scores between sinks and window: scores [B, G, T, S] ->
        [B, G, T, number of them], -1 = empty"""
        T, S = scores.shape[2:]
        tokens = torch.arange(S, device=scores.device)
        own = tokens[S - T :]
        always = self.budget.sinks + self.budget.window
        num_left = (self.budget.allowance(own + 1) - always).clamp(min=0)  # [T]
        candidate = (tokens >= self.budget.sinks) & (tokens <= own[:, None] - self.budget.window)
        scores = scores.float().masked_fill(~candidate, -torch.inf)
        values, chosen = scores.topk(min(int(num_left.max()), S))
        # An earlier query has fewer tokens left to choose than the last one, and a short text has
        # fewer candidates.
        rank = torch.arange(chosen.shape[-1], device=scores.device)
        valid = (rank < num_left[:, None]) & (values > -torch.inf)
        return torch.where(valid, chosen, -1)


class Oracle(Selector):
    def scores(self, layer, q, keys, positions):
        return true_attention(q, keys).mean(2)  # over the query heads of each KV head


class Recency(Selector):
    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        return torch.arange(S, device=q.device).expand(B, G, q.shape[2], S)


class Random(Selector):
    """Other tokens at every step and layer; several tokens of one call differ from single calls."""

    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        rng = torch.Generator().manual_seed(1000 * int(positions[0]) + layer)
        return torch.rand(B, G, q.shape[2], S, generator=rng).to(q.device)


SELECTORS = {"oracle": Oracle, "recency": Recency, "random": Random}
RIVALS = ("quest", "h2o", "snapkv", "keynorm")  # in workshop/rivals.py
NAMES = ("dense", "butler", *SELECTORS, *RIVALS)


def make_selector(name: str, budget: float, butler=None, **rules) -> Selector | None:
    """A new selector by its name on the command line; None for dense. rules: keyword arguments of
    the butler's selector, such as interval; the others have none. Raises UserError."""
    Budget(budget)  # checks the budget, for dense too
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
        selector = Random(budget)
        always = selector.sinks_and_window(1, cached, "cpu").flatten()
        chosen = selector.topk(torch.rand(1, 1, 1, cached)).flatten()
        index = sorted(int(token) for token in torch.cat([always, chosen]) if token >= 0)
        print(f"{cached} cached tokens, budget {budget}: {index}")
    print("the tokens between sinks and window are random here")
