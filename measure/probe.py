"""measure/probe.py - how much of the true attention a selection keeps.

    selector --Probe--> the same choices, each compared with the attention of that very run
    a long text, read densely once --at_lengths--> attention kept, and loss, at several lengths

    python -m measure.probe        what recency and the oracle keep of random attention
"""

import torch
import torch.nn.functional as F

from baselines import Evicting
from kernel import mark, true_attention
from selection import Selector


class Probe:
    """Wraps a selector and compares it, while it is active, with the true attention of that very
    run. Each maps a layer to the mean over queries and heads in the latest call:

    mass       share of the attention that the selected tokens hold; always (`share` has that of
               each query, [B, T])
    spearman   rank correlation of scores and attention (mean of the group) over the tokens before
               the query; if `rank`, and for selectors that rank all tokens by scores
    error      |o' - o| / |o| of the outputs over selected and over all tokens; if given the cache
    """

    def __init__(self, selector: Selector, rank=False, cache=None):
        self.selector, self.rank, self.cache = selector, rank, cache
        self.share, self.mass, self.spearman, self.error = {}, {}, {}, {}

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions)
        if index is None:
            return None
        attention = true_attention(q, keys, positions)  # [B, G, H/G, T, S]
        held = attention * mark(index, keys.shape[2])[:, :, None]
        share = held.sum(-1, keepdim=True)
        self.share[layer] = share.mean((1, 2, 4))
        self.mass[layer] = share.mean().item()
        if self.cache is not None:
            v = self.cache.v[layer][:, :, None, : keys.shape[2]].float()
            o, sparse = attention @ v, held / share @ v
            self.error[layer] = ((sparse - o).norm(dim=-1) / o.norm(dim=-1)).mean().item()
        if self.rank and not isinstance(self.selector, Evicting):
            scores = self.selector.scores(layer, q, keys, positions)
            seen = torch.arange(keys.shape[2], device=q.device) < positions[:, None, :, None]
            rho = spearman(scores.float(), attention.mean(2), seen)
            self.spearman[layer] = rho.nanmean().item()  # one token has no order: NaN
        return index


def at_lengths(llama, window, contexts, makers: dict, block=32):
    """How do selections fare at the end of contexts of several lengths? Reads a window [T] densely,
    once; then the last `block` tokens before each of `contexts` go through every selection. From
    the longest to the shortest, so that nothing is read that a selection wrote.

    makers: {name: maker of a fresh selector, or None for dense attention} -> yields (context, name,
    share of the attention kept, mean loss in nats of the block's tokens)
    """
    contexts = sorted(contexts, reverse=True)
    cache = llama.new_cache(1, contexts[0])
    llama.prefill(window[None, : contexts[0] - 1], cache)
    for context in contexts:
        some = window[context - block : context]
        for name, make in makers.items():
            cache.truncate(context - block)
            probe = Probe(make()) if make else None
            with torch.inference_mode():
                logits = llama(some[None], cache, probe)[0, :-1].float()
            yield (context, name, mean(probe.mass) if probe else 1.0,
                   F.cross_entropy(logits, some[1:]).item())


def spearman(a, b, seen):
    """Rank correlation along the last axis, ties sharing their mean rank, where `seen` (booleans)
    is true: a, b [..., S] -> [...]; NaN where all are tied. (Defined as in scipy.stats.)"""
    seen = seen.expand(a.shape)
    n = seen.sum(-1, keepdim=True)

    def ranks(x):  # less their mean
        x = x.masked_fill(~seen, torch.inf).contiguous()
        ordered = x.sort(dim=-1).values
        below = torch.searchsorted(ordered, x)
        r = ((below + torch.searchsorted(ordered, x, right=True)) * 0.5).masked_fill(~seen, 0)
        return (r - r.sum(-1, keepdim=True) / n).masked_fill(~seen, 0)

    ra, rb = ranks(a), ranks(b)
    return (ra * rb).sum(-1) / (ra.norm(dim=-1) * rb.norm(dim=-1))


def mean(by_layer: dict) -> float:
    return sum(by_layer.values()) / len(by_layer)


if __name__ == "__main__":
    from baselines import BASELINES

    B, H, G, S, D = 1, 9, 3, 400, 64
    q, keys = (torch.randn(B, n, S, D, generator=torch.manual_seed(0)) for n in (H, G))
    x, positions = torch.zeros(B, S, 8), torch.arange(S)[None]
    for name in "oracle", "recency":
        probe = Probe(BASELINES[name](0.1), rank=True)
        for layer in (0, 1):
            probe(layer, x, q, keys, positions)
        print(f"{name}: keeps {mean(probe.mass):.2f} of the attention with a tenth of the tokens, "
              f"rank correlation {mean(probe.spearman):.2f}")
