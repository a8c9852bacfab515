"""baselines.py - what the butler is compared with, behind the interface that it uses itself.

    oracle    the true attention of this very step, averaged over the query heads of a KV head: its
              top-K holds the most attention mass that any K tokens can. Reads all keys: a bound.
    quest     pages of 16 tokens, each ranked by an upper bound of q . k from the smallest and
              largest value of every channel in it (arXiv 2406.10774)
    h2o       evicts, step by step, what has collected the least attention so far; half of the
              budget goes to the most recent tokens (arXiv 2306.14048)
    snapkv    evicts at the end of the prompt: the last 32 queries vote, votes are pooled over
              neighbours (arXiv 2404.14469)
    keynorm   the tokens with the smallest keys, whatever the query (arXiv 2406.11430)
    recency   sinks and the most recent tokens only: StreamingLLM (arXiv 2309.17453)
    random    sinks, window, and tokens drawn by lot

Each is a `Selector` with its own `scores` or, where it evicts, its own `pick`, so that budget,
sinks, window and the dense first layer are the same for all. Eviction is real: h2o and snapkv rank
only what they have not yet thrown out. They decide before the next token is seen, so they need to
`watch` the prompt:

    llama.prefill(prompt, cache, selector.watch)    reads densely; then
    llama.decode(token, cache, selector)

    python baselines.py     how much of random attention each one keeps
"""

from functools import partial

import torch
import torch.nn.functional as F

from common.cli import known
from kernel import mark, raw_scores, true_attention
from selection import SelectionError, Selector, allowance


def widened(values, S: int, filler=0):
    """values [..., up to S] -> [..., S], with `filler` behind."""
    return F.pad(values, (0, S - values.shape[-1]), value=filler)


class Oracle(Selector):
    def scores(self, layer, q, keys, positions):
        return true_attention(q, keys, positions).mean(2)


class Recency(Selector):
    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        return torch.arange(S, device=q.device).expand(B, G, q.shape[2], S)


class Random(Selector):
    def __init__(self, budget, seed=0, **rules):
        super().__init__(budget, **rules)
        self.generator = torch.Generator().manual_seed(seed)

    def scores(self, layer, q, keys, positions):
        B, G, S, _ = keys.shape
        return torch.rand(B, G, q.shape[2], S, generator=self.generator).to(q.device)


class KeyNorm(Selector):
    def scores(self, layer, q, keys, positions):
        return -keys.float().norm(dim=-1)[:, :, None].expand(-1, -1, q.shape[2], -1)


class Quest(Selector):
    """A page's bound is sum_d max(q_d min_d, q_d max_d), here the largest of the group's heads.

    A page that is not full yet cannot be ranked without looking at tokens to come: it is kept.
    Tokens of a page tie, the earlier goes first; the last page is cut where the budget ends, which
    at a few dozen tokens in all may leave room for a single page.
    """

    PAGE = 16

    def scores(self, layer, q, keys, positions):
        S, page = keys.shape[2], self.PAGE
        full = keys[:, :, : S - S % page].float().unflatten(2, (-1, page))  # [B, G, S/16, 16, D]
        q = q.float().unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, T, D]
        bound = q.clamp(min=0) @ full.amax(3)[:, :, None].transpose(-1, -2)
        bound += q.clamp(max=0) @ full.amin(3)[:, :, None].transpose(-1, -2)
        bound = bound.amax(2).repeat_interleave(page, dim=-1)
        bound = F.pad(bound, (0, S % page), value=torch.inf)
        last = (positions + 1) // page * page  # first token of the page being filled
        begun = torch.arange(S, device=q.device) >= last[..., None]  # [B, T, S]
        bound = bound.masked_fill(begun[:, None], torch.inf)
        return -bound.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


class Evicting(Selector):
    """Ranks tokens by `value[layer]` [B, G, S], which `watch` gathers from the prompt, and never
    again sees those that it dropped; `alive[layer]` tells who is left.

    The prompt is cut down to its budget before the next token is seen; then one token comes and
    at most one goes, at every step, so a block of tokens is a loop. Padding evicts too: where rows
    differ in length it may stand at the end of the last block, nowhere else.
    """

    def __init__(self, budget, dense_below=0, **rules):
        if dense_below:
            raise SelectionError("h2o and snapkv evict at every step: no dense steps")
        super().__init__(budget, **rules)
        self.value, self.alive = {}, {}

    def follow(self, watchers: list["Evicting"]) -> None:
        """Goes on from what others of its kind, one for each row, saw of the prompts. They are left
        as they were: one reading of a prompt serves several budgets."""
        for layer in watchers[0].value:
            values = [w.value[layer] for w in watchers]
            S = max(v.shape[-1] for v in values)
            self.value[layer] = torch.cat([widened(v, S) for v in values])

    def ranked(self, layer: int, position):
        """What decides at one step: [B, G, S], the larger the better; position [B, 1]."""
        return self.value[layer]

    def attended(self, layer: int, scores, kept) -> None:
        """After a step: its raw attention scores [B, G, H/G, S] and whom it saw [B, G, S]."""

    def pick(self, layer, q, keys, positions):
        S, first = keys.shape[2], layer not in self.alive
        nothing = keys.new_empty(*keys.shape[:2], 0, dtype=torch.float32)
        seen = self.value.get(layer, nothing)
        if first and seen.shape[-1] < positions[:, 0].max():
            raise SelectionError("h2o and snapkv evict what they watched: let them watch the "
                                 "prompt")
        self.value[layer] = widened(seen, S)  # a newcomer has collected nothing
        self.alive[layer] = widened(self.alive.get(layer, nothing.bool()), S, True)
        if first and seen.shape[-1]:  # the prompt has been read: cut it down before going on
            self.evict(layer, positions[:, :1] - 1)
        scores, rows = raw_scores(q, keys), []
        for t in range(positions.shape[1]):
            chosen, kept = self.evict(layer, positions[:, t : t + 1])
            self.attended(layer, scores[:, :, :, t], kept)
            rows.append(chosen)
        K = max(row.shape[-1] for row in rows)
        return torch.cat([widened(row, K, -1) for row in rows], dim=2)

    def evict(self, layer: int, position):
        """-> the chosen tokens [B, G, 1, K'] of the query at position [B, 1]; kept [B, G, S]."""
        alive = self.alive[layer]
        ranked = self.ranked(layer, position).masked_fill(~alive, -torch.inf)
        chosen = self.choose(ranked[:, :, None], position)
        always = self.always(position)[:, None].expand(-1, alive.shape[1], -1, -1)
        kept = mark(torch.cat([always, chosen], dim=-1)[:, :, 0], alive.shape[-1])
        to_come = torch.arange(alive.shape[-1], device=alive.device) > position
        self.alive[layer] = kept | to_come[:, None]
        return chosen, kept


class H2O(Evicting):
    def watch(self, layer, x, q, keys, positions):
        if layer:
            new = true_attention(q, keys, positions).mean(2).sum(2)  # [B, G, S]
            self.value[layer] = new + widened(self.value.get(layer, new[..., :0]), new.shape[-1])

    def ranked(self, layer, position):
        half = allowance(self.budget, position + 1, self.sinks + self.window) // 2  # [B, 1]
        value = self.value[layer]
        recent = torch.arange(value.shape[-1], device=value.device) > position - half
        return value.masked_fill(recent[:, None], torch.inf)

    def attended(self, layer, scores, kept):
        weights = scores.masked_fill(~kept[:, :, None], -torch.inf).softmax(dim=-1)
        self.value[layer] += weights.mean(2)


class SnapKV(Evicting):
    """In the paper, what is generated comes on top of the prompt's budget. Here all of them count,
    so the voted tokens stay, and of the later ones the window; one that leaves it has no votes, and
    among those without votes the latest go first.
    """

    OBSERVED, POOL = 32, 7

    def __init__(self, budget, **rules):
        super().__init__(budget, **rules)
        self.last = {}  # per layer: queries of the prompt's end so far and their positions

    def ranked(self, layer, position):
        votes = self.value[layer]
        age = position[:, :, None] + 1 - torch.arange(votes.shape[-1], device=votes.device)
        return torch.where(votes == 0, -age.float(), votes)

    def watch(self, layer, x, q, keys, positions):
        if layer == 0:
            return
        old = self.last.get(layer, (q[:, :, :0], positions[:, :0]))
        q = torch.cat([old[0], q], dim=2)[:, :, -self.OBSERVED :]
        positions = torch.cat([old[1], positions], dim=1)[:, -self.OBSERVED :]
        self.last[layer] = q, positions
        votes = true_attention(q, keys, positions).mean(2).sum(2)
        self.value[layer] = F.avg_pool1d(votes, self.POOL, stride=1, padding=self.POOL // 2)


BASELINES = {"oracle": Oracle, "quest": Quest, "h2o": H2O, "snapkv": SnapKV,
             "recency": Recency, "random": Random, "keynorm": KeyNorm}
NAMES = ("dense", "butler", *BASELINES)


def make_selector(name: str, budget: float, butler=None, drift=0.0, **rules) -> Selector | None:
    """A fresh selector by its name on the command line; for dense None, which is just that."""
    known("selector", [name], NAMES)
    if name == "butler":
        if butler is None:
            raise SelectionError("the selector 'butler' needs a trained butler")
        return butler.selector(budget, drift=drift, **rules)
    if drift:
        raise SelectionError(f"{name} has no queries ahead of time that could drift")
    if name == "dense":
        return None
    return BASELINES[name](budget, **rules)


def every_maker(names, budgets, butlers=(), **rules):
    """Selectors and budgets, as text -> (name, budget, [makers of fresh selectors, one a butler]),
    dense at "1.0" alone. `rules` (drift) hold for the butler."""
    for name in names:
        some, own = (butlers, rules) if name == "butler" else ([None], {})
        for budget in ("1.0",) if name == "dense" else budgets:
            yield name, budget, [partial(make_selector, name, float(budget), butler, **own)
                                 for butler in some]


if __name__ == "__main__":
    from measure.probe import Probe

    B, H, G, S, D = 1, 9, 3, 400, 64
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(B, n, S, D, generator=generator) for n in (H, G))
    x, positions = torch.zeros(B, S, 8), torch.arange(S)[None]
    for name in BASELINES:
        probe = Probe(make_selector(name, 0.1))
        for layer in (0, 1):
            probe.selector.watch(layer, x[:, :-1], q[:, :, :-1], keys[:, :, :-1], positions[:, :-1])
            index = probe(layer, x[:, -1:], q[:, :, -1:], keys, positions[:, -1:])
        print(f"{name:8s} keeps {int((index >= 0).sum()) // G} of {S} tokens and "
              f"{probe.mass[1]:.2f} of the attention")
    print("random keys have no few tokens that matter; a real model's do, and that is the point")
