"""baselines.py - what the butler is compared with, behind the interface that it uses itself.

    oracle    the true attention of this very step, averaged over the query heads of a KV head: its
              top-K holds the most attention mass that any K tokens can. Reads all keys: a bound.
    recency   sinks and the most recent tokens only: StreamingLLM (arXiv 2309.17453)
    random    sinks, window, and tokens drawn by lot

Each is a `Selector` with its own `scores`, so that budget, sinks, window and the dense first layer
are the same for all. `Recall` wraps any of them and measures, while the selection is active, how
much of the true attention it keeps.
"""

import torch

from butler import ButlerError, Selector


def true_attention(q, keys, positions):
    """q [B, H, T, D], keys [B, G, S, D], positions [B, T] -> causal softmax [B, G, H/G, T, S]."""
    grouped = q.float().unflatten(1, (keys.shape[1], -1))
    scores = grouped @ keys.float()[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[2], device=q.device) > positions[..., None]  # [B, T, S]
    return scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)


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


BASELINES = {"oracle": Oracle, "recency": Recency, "random": Random}
NAMES = ("dense", "butler", *BASELINES)


def make_selector(name: str, budget: float, butler=None, **rules) -> Selector | None:
    """A fresh selector by its name on the command line; for dense None, which is just that."""
    if name == "dense":
        return None
    if name == "butler":
        if butler is None:
            raise ButlerError("the selector 'butler' needs a trained butler")
        return butler.selector(budget, **rules)
    if name not in BASELINES:
        raise ButlerError(f"unknown selector {name!r}; known: {', '.join(NAMES)}")
    return BASELINES[name](budget, **rules)


class Recall:
    """Wraps a selector; `mass[layer]` is the mean share of attention that its choice holds."""

    def __init__(self, selector: Selector):
        self.selector, self.mass = selector, {}

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions)
        if index is not None:
            attention = true_attention(q, keys, positions)
            slots = index.clamp(min=0).long()[:, :, None].expand(-1, -1, attention.shape[2], -1, -1)
            held = attention.gather(-1, slots) * (index >= 0)[:, :, None]
            self.mass[layer] = held.sum(-1).mean().item()
        return index

    def mean(self) -> float:
        return sum(self.mass.values()) / len(self.mass)


if __name__ == "__main__":
    B, H, G, S, D = 1, 9, 3, 400, 64
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, 1, D, generator=generator)
    keys = torch.randn(B, G, S, D, generator=generator)
    x, here = torch.zeros(B, 1, 8), torch.tensor([[S - 1]])
    for name in BASELINES:
        recall = Recall(make_selector(name, 0.1))
        for layer in (0, 1):
            recall(layer, x, q, keys, here)
        print(f"{name:8s} keeps 40 of {S} tokens and {recall.mean():.2f} of the attention")
    print("random keys have no few tokens that matter; a real model's do, and that is the point")
