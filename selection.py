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

A selector can also choose while a long prompt is read (`prefill`, SparsePrefill). Then each block
of 64 queries shares one choice.

    python selection.py        which tokens some budgets select
"""

from dataclasses import dataclass

import torch

from cli import UserError, plug_in
from kernel import true_attention

# How a prompt is read sparsely
QUERY_BLOCK = 64  # queries that share one choice
DENSE_LAYERS = 3  # first layers that attend to all tokens: all later layers depend on them
DENSE_START = 2048  # first tokens that attend to all before them, which are few
DENSE_END = 256  # last tokens that do so, because the question usually stands there
PREFILL_CHUNK = 1024  # tokens that go through the model at once


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

    def sinks_and_window(self, own):
        """own [T]: the place of each query's token in the cache -> what these queries always attend
        to, [T, sinks + window], -1 = empty"""
        sinks = torch.arange(self.sinks, device=own.device).expand(len(own), -1)
        recent = own[:, None] - torch.arange(self.window, device=own.device)
        sinks = torch.where(sinks <= own[:, None], sinks, -1)
        recent = torch.where(recent >= self.sinks, recent, -1)  # no token twice
        return torch.cat([sinks, recent], dim=1)

    def topk(self, scores, own):
        """The tokens with the highest scores between sinks and window: scores [B, G, T, S], own [T]
        as above -> [B, G, T, number of them], -1 = empty"""
        S = scores.shape[3]
        tokens = torch.arange(S, device=scores.device)
        num_left = (self.allowance(own + 1) - self.sinks - self.window).clamp(min=0)  # [T]
        candidate = (tokens >= self.sinks) & (tokens <= own[:, None] - self.window)
        scores = scores.float().masked_fill(~candidate, -torch.inf)
        values, chosen = scores.topk(min(int(num_left.max()), S))
        # An earlier query has fewer tokens left to choose than the last one, and a short text has
        # fewer candidates.
        rank = torch.arange(chosen.shape[-1], device=scores.device)
        valid = (rank < num_left[:, None]) & (values > -torch.inf)
        return torch.where(valid, chosen, -1)


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

    def bytes_per_token(self, head_dim: int) -> float:
        """How many bytes per cached token and KV head it reads to choose, at 16 bits a number."""
        return 0

    def watch(self, layer, x, q, keys, positions) -> None:
        """Pass this as the selector of `prefill`. The prompt is then read densely, because this
        returns None, and subclasses can use its keys."""

    def look_ahead(self, layer, x, positions) -> None:
        """Called with the input of every layer, before the layer selects. Layer 0 and layers that
        are not selected for, as those with a sliding window, are included."""

    def scores(self, layer, q, keys, positions):
        """How important is each token of `keys` for each query? -> [B, G, T, S], arguments as in
        model.py. Only the order counts. Of equal scores any may be chosen, so scores should not
        tie. Scores of sinks, window and later tokens are ignored. Query t is at place S - T + t."""
        raise NotImplementedError

    def choose(self, layer, q, keys, positions):
        """The tokens chosen between sinks and window, [B, G, T, number of them], -1 = empty."""
        return self.budget.topk(self.scores(layer, q, keys, positions), positions)

    def block_scores(self, layer, q, keys, positions):
        """The mean of `scores` over each block of 64 queries of a prompt: [B, G, T/64, S]"""
        scores = self.scores(layer, q, keys, positions).float()
        return scores.unflatten(2, (-1, QUERY_BLOCK)).mean(3)

    def choose_for_blocks(self, budget, layer, q, keys, positions):
        """For blocks of 64 queries of a prompt: the tokens chosen within `budget` between sinks and
        window of each block, [B, G, T/64, number of them], -1 = empty."""
        last = positions[QUERY_BLOCK - 1 :: QUERY_BLOCK]  # places of the blocks' last queries
        return budget.topk(self.block_scores(layer, q, keys, positions), last)

    @torch.inference_mode()
    def __call__(self, layer, x, q, keys, positions):
        """What the model calls -> index [B, G, T, K], or None in layer 0."""
        self.look_ahead(layer, x, positions)
        if layer == 0:
            return None
        chosen = self.choose(layer, q, keys, positions)
        always = self.budget.sinks_and_window(positions)
        always = always.expand(*chosen.shape[:2], -1, -1)
        self.index[layer] = torch.cat([always, chosen], dim=-1).int()
        return self.index[layer]


class Oracle(Selector):
    def bytes_per_token(self, head_dim):
        return 2 * head_dim  # all keys

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


# ---------------------------------------------------------------------------- prompts


class SparsePrefill:
    """Selects for a prompt: one choice per layer and KV head for each block of 64 queries.

    Pass it as the selector of `Llama.prefill`, with a multiple of 64 tokens at a time. A block
    attends to the sinks, the 64 tokens before it, its own tokens up to each query, and the tokens
    between these with the highest `block_scores`. The budget counts all of them. The first layers
    stay dense.
    """

    def __init__(self, selector: Selector, budget: float):
        self.selector = selector
        # Counted back from a block's last query: its own 64 tokens and the 64 before them.
        self.budget = Budget(budget, window=2 * QUERY_BLOCK)

    def check(self, length: int) -> None:
        """Raises UserError if nothing can be chosen even at the end of `length` tokens."""
        always = self.budget.sinks + self.budget.window
        if int(self.budget.allowance(torch.tensor([length]))) <= always:
            raise UserError(f"--prefill-budget {self.budget.total:g} leaves nothing to choose, "
                            f"even behind {length:,} tokens: sinks, a block and the 64 tokens "
                            f"before it are {always} already")

    def look_ahead(self, layer, x, positions) -> None:
        self.selector.look_ahead(layer, x, positions)

    @torch.inference_mode()
    def __call__(self, layer, x, q, keys, positions):
        """-> index [B, G, T/64, K], a row for each block, or None in the first layers"""
        self.selector.watch(layer, x, q, keys, positions)  # as in a dense prompt, keys are stored
        self.look_ahead(layer, x, positions)
        if layer < DENSE_LAYERS:
            return None
        chosen = self.selector.choose_for_blocks(self.budget, layer, q, keys, positions)
        last = positions[QUERY_BLOCK - 1 :: QUERY_BLOCK]
        always = self.budget.sinks_and_window(last).expand(*chosen.shape[:2], -1, -1)
        return torch.cat([always, chosen], dim=-1).int()


def prefill(llama, prompt, cache, selector=None, budget=None):
    """Reads a prompt [B, T] into an empty cache -> logits [B, 1, V] of its last token.

    Without a budget it is read densely, while the selector watches. With one, the first 2,048
    tokens and the last 256 to 319 are read densely, and blocks of 64 between them through the
    selector. Raises UserError if the budget leaves nothing to choose.
    """
    T = prompt.shape[1]
    sparse = max(0, T - DENSE_START - DENSE_END) // QUERY_BLOCK * QUERY_BLOCK
    watch = selector.watch if selector else None
    if selector is None or budget is None or not sparse:
        return llama.prefill(prompt, cache, watch)
    end = DENSE_START + sparse
    reader = SparsePrefill(selector, budget)
    reader.check(end)
    llama.prefill(prompt[:, :DENSE_START], cache, watch)
    for start in range(DENSE_START, end, PREFILL_CHUNK):
        llama.prefill(prompt[:, start : min(start + PREFILL_CHUNK, end)], cache, reader)
    return llama.prefill(prompt[:, end:], cache, watch)


# ---------------------------------------------------------------------------- by name

SELECTORS = {"oracle": Oracle, "recency": Recency, "random": Random}
RIVALS = ("quest", "h2o", "snapkv", "keynorm", "sketch", "sketch16", "sketch8", "ahead1",
          "ahead5", "spread", "topp")  # in workshop/rivals.py
NAMES = ("dense", "butler", *SELECTORS, *RIVALS)


def make_selector(name: str, budget: float, butler=None, llama=None, **rules) -> Selector | None:
    """A new selector by its name on the command line; None for dense. llama: the model, which some
    rivals need. rules: keyword arguments of the butler's selector, such as interval; the others
    have none. Raises UserError."""
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
        return plug_in("workshop.rivals").make(name, budget, llama)
    raise UserError(f"unknown selector {name!r}; known: {', '.join(NAMES)}")


if __name__ == "__main__":
    for cached, budget in (100, 14), (100, 0.2), (12, 0.2):
        selector = Random(budget)
        own = torch.tensor([cached - 1])
        always = selector.budget.sinks_and_window(own).flatten()
        chosen = selector.budget.topk(torch.rand(1, 1, 1, cached), own).flatten()
        index = sorted(int(token) for token in torch.cat([always, chosen]) if token >= 0)
        print(f"{cached} cached tokens, budget {budget}: {index}")
    print("the tokens between sinks and window are random here")
