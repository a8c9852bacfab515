"""workshop/rivals.py - published ways to choose cached tokens, to compare the butler with.

    quest     pages of 16 tokens, ranked by an upper bound of q . k         arXiv 2406.10774
    h2o       evicts what has collected the least attention so far          arXiv 2306.14048
    snapkv    evicts once, what the prompt's last 32 queries do not need    arXiv 2404.14469
    keynorm   the tokens with the smallest keys, whatever the query         arXiv 2406.11430
    sketch    keys on their 32 principal directions (sketch16, sketch8)     arXiv 2406.02542
    ahead5    the same, with queries foreseen up to 5 layers ahead (ahead1) arXiv 2406.19707
    spread    pages of 16 tokens, ranked by mean and spread of their keys   arXiv 2605.27740
    topp      an oracle: heads with wide attention get more tokens          arXiv 2502.02770

Each is a Selector, so budget, sinks, window and the dense layer 0 are the same for all of them and
for the butler. Eviction is real: h2o and snapkv never see an evicted token again. They decide
before they know the question, so they must watch the prompt:

    llama.prefill(prompt, cache, selector.watch)
    llama.decode(token, cache, selector)

    python synth_task.py --selectors dense,butler,quest,h2o,snapkv,keynorm
    python bench.py --suite length --selectors oracle,butler,sketch,ahead1,ahead5
"""

from functools import partial

import torch
import torch.nn.functional as F

from cli import UserError
from kernel import index_to_mask, true_attention
from model import Llama, apply_rope, rope_cos_sin
from selection import Budget, Oracle, Selector


class KeyNorm(Selector):
    """Keys with a small norm tend to receive much attention."""

    def bytes_per_token(self, head_dim):
        return 2

    def scores(self, layer, q, keys, positions):
        return -keys.float().norm(dim=-1)[:, :, None].expand(-1, -1, q.shape[2], -1)


class Pages(Selector):
    """Ranks whole pages of 16 tokens, by the `bound` that a subclass defines.

    The page that is still being filled is always selected. Tokens of one page tie, and the earlier
    one goes first; the budget may end within a page.
    """

    PAGE = 16

    def bytes_per_token(self, head_dim):
        return 2 * (2 * head_dim) / self.PAGE  # two vectors a page

    def bound(self, q, pages):
        """q [B, G, H/G, T, D], pages [B, G, 1, S/16, 16, D] -> [B, G, H/G, T, S/16]; of a KV head's
        query heads the largest counts."""
        raise NotImplementedError

    def scores(self, layer, q, keys, positions):
        T, S = q.shape[2], keys.shape[2]
        last_full = S - S % self.PAGE
        pages = keys[:, :, None, :last_full].float().unflatten(3, (-1, self.PAGE))
        bound = self.bound(q.float().unflatten(1, (keys.shape[1], -1)), pages).amax(2)
        bound = bound.repeat_interleave(self.PAGE, dim=-1)  # [B, G, T, last_full]
        bound = F.pad(bound, (0, S - last_full), value=torch.inf)
        # A page that was not full when its query came would show tokens of the future.
        token = torch.arange(S, device=q.device)
        being_filled = (token[S - T :] + 1) // self.PAGE * self.PAGE  # [T]
        bound = bound.masked_fill(token >= being_filled[:, None], torch.inf)
        # The rank instead of the bound: topk does not promise an order among equal scores.
        return -bound.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


class Quest(Pages):
    """An upper bound of q . k: sum_d max(q_d min_d, q_d max_d), where min and max are taken over
    the page's keys, channel by channel."""

    def bound(self, q, pages):
        return q.clamp(min=0) @ pages.amax(4).mT + q.clamp(max=0) @ pages.amin(4).mT


class Spread(Pages):
    """q . mean + |q| . spread, where mean and standard deviation are taken over the page's keys,
    channel by channel. Simplified: pages and query heads are treated as in Quest, and the form
    that is trained with the model is left out."""

    def bound(self, q, pages):
        mean = pages.mean(4)  # [B, G, 1, S/16, D]
        spread = (pages - mean[..., None, :]).square().mean(4).sqrt()
        return q @ mean.mT + q.abs() @ spread.mT


class TopP(Oracle):
    """The smallest sets of tokens that hold a share p of the true attention, of each KV head.

    Twilight fixes p, so that the number of tokens varies. Here it is the other way round: each
    query takes the p at which the KV heads of a layer attend to the budget in the mean. Heads with
    wide attention get more tokens than others; the total equals that of all other selectors.
    """

    def block_scores(self, layer, q, keys, positions):
        raise UserError("topp gives KV heads different numbers of tokens, so it cannot select "
                        "while the prompt is read")

    def choose(self, layer, q, keys, positions):
        attention = self.scores(layer, q, keys, positions).double()
        sinks, window = self.budget.sinks, self.budget.window
        # All tokens between sinks and window, those with most attention first
        ranked = Budget(1.0, sinks, window).topk(attention, positions)  # [B, G, T, K]
        share = attention.gather(3, ranked.clamp(min=0)).masked_fill(ranked < 0, 0)
        # The share that is held before each of them is added. Sinks and window hold the rest.
        before = 1 - share.flip(3).cumsum(3).flip(3)
        before = before.masked_fill(ranked < 0, torch.inf)
        # Sets that hold p contain the tokens before which less than p is held. So of all heads
        # together the tokens with the smallest numbers are selected.
        num_left = (self.budget.allowance(positions + 1) - sinks - window).clamp(min=0)  # [T]
        order = before.transpose(1, 2).flatten(2).argsort(stable=True).argsort()  # [B, T, G*K]
        selected = order < keys.shape[1] * num_left[:, None]
        count = selected.unflatten(2, (keys.shape[1], -1)).sum(3).transpose(1, 2)  # [B, G, T]
        rank = torch.arange(int(count.max()), device=q.device)
        return torch.where(rank < count[..., None], ranked[..., : len(rank)], -1)


class Sketch(Selector):
    """Ranks tokens by keys of fewer numbers, with the layer's own query: Loki, arXiv 2406.02542.
    SparQ (arXiv 2312.04985) also reads a part of each key, but picks its channels by the query.

    keys [B, G, S, D] @ directions [B, G, D, E] -> sketch [B, G, S, E]
    scores = softmax(query @ directions . sketch / sqrt(D)), mean over the query heads

    The directions are the principal ones of the keys of the text at hand: the eigenvectors of their
    second moments, for each layer and KV head. Loki takes them from a calibration text. Those of
    the text itself lose less of its keys. They are computed at the first choice from the keys
    cached before, and then kept. A text without a prompt takes them from all keys of the first
    call, also from later ones, which favours the sketch; if that call has few tokens, its
    directions are of little use. Directions that also weigh how queries point can do better:
    exercise 3.2 of lessons/.

    A stored sketch would have 8 bits a number, as the fast engine's butler has. That changes the
    attention kept by less than 0.001 (tests/test_rivals.py), so it stays in float32 here.

    directions   {layer: [B, G, D, E]}
    """

    def __init__(self, budget, size=32, **rules):
        super().__init__(budget, **rules)
        self.size = size
        self.directions = {}

    def bytes_per_token(self, head_dim):
        return self.size + 4  # 8 bits a number, and a scale

    def scores(self, layer, q, keys, positions):
        keys = keys.float()
        if layer not in self.directions:
            cached = keys[:, :, : keys.shape[2] - q.shape[2]]
            self.directions[layer] = self.principal(cached if cached.shape[2] else keys)
        directions = self.directions[layer]
        D, E = directions.shape[2:]
        q = q.float().unflatten(1, (keys.shape[1], -1)) @ directions[:, :, None]
        q = q.flatten(1, 2) * (E / D) ** 0.5  # true_attention divides by sqrt(E), not by sqrt(D)
        return true_attention(q, keys @ directions).mean(2)

    def principal(self, keys):
        """keys [B, G, S, D] -> the directions in which they are largest, [B, G, D, E]"""
        return torch.linalg.eigh(keys.mT @ keys).eigenvectors[..., -self.size :]


class Ahead(Sketch):
    """Foresight without training: a layer's own query weights, applied to the input of an earlier
    layer. It works because a layer changes its input little (InfiniGen, arXiv 2406.19707).

    Layers 0, R, 2R ... foresee the queries of the next R layers, as the butler's producers do.
    So with R = 1 each layer looks one layer ahead, and with R = 5 one to five layers ahead.

    InfiniGen itself looks one layer ahead. It rotates queries and keys by an SVD of sample queries
    and takes the channels that are largest in the prompt. A threshold decides how many tokens it
    fetches. Here keys are on principal directions and the number is the budget, as in Sketch.

    queries   {layer: foreseen queries of the latest tokens, [B, H, T, D]}
    """

    def __init__(self, budget, llama, layers_ahead=5, **rules):
        super().__init__(budget, **rules)
        if not isinstance(llama, Llama):
            raise UserError("ahead1 and ahead5 apply the weights of model.py's Llama, which this "
                            "engine or script does not give them")
        self.llama = llama
        self.layers_ahead = layers_ahead
        self.queries = {}

    def look_ahead(self, layer, x, positions):
        if layer % self.layers_ahead == 0:
            end = min(layer + self.layers_ahead + 1, self.llama.config.layers)
            for later in range(layer + 1, end):
                self.queries[later] = self.query(later, x, positions)

    def query(self, layer, x, positions):
        """What the layer would ask if x [B, T, C] were its input -> [B, H, T, D]"""
        block = self.llama.layers[layer]
        q = block.self_attn.q_proj(block.input_layernorm(x))
        q = q.unflatten(-1, (-1, block.self_attn.head_dim)).transpose(1, 2)
        return apply_rope(q, *rope_cos_sin(positions, self.llama.frequencies))

    def scores(self, layer, q, keys, positions):
        return super().scores(layer, self.queries[layer], keys, positions)


class Evicting(Selector):
    """Drops tokens for good. The prompt is cut down to its budget before the next token is seen;
    then each new token evicts at most one. A block of tokens is a loop, as each eviction depends
    on the one before. All rows of a batch have the same length.

    value[layer]   what each token is worth so far, [B, G, S]; `watch` gathers it
    alive[layer]   which tokens are not evicted, [B, G, S]
    """

    def __init__(self, budget, **rules):
        super().__init__(budget, **rules)
        self.value = {}
        self.alive = {}

    def bytes_per_token(self, head_dim):
        return 2  # its value

    def ranked(self, layer):
        """What decides at this step, [B, G, S]: tokens with the lowest numbers are evicted."""
        return self.value[layer]

    def block_scores(self, layer, q, keys, positions):
        raise UserError(f"{type(self).__name__.lower()} evicts tokens after the prompt, so it "
                        "cannot select while the prompt is read")

    def attended(self, layer, q, keys):
        """Called after each step with its query [B, H, 1, D] and all keys up to its own token."""

    def choose(self, layer, q, keys, positions):
        T, S = q.shape[2], keys.shape[2]
        if layer not in self.value:
            self.value[layer] = torch.zeros(*keys.shape[:2], 0, device=keys.device)
        if self.value[layer].shape[-1] != S - T:
            raise UserError(f"{type(self).__name__.lower()} evicts tokens, so it must have seen "
                            "the whole prompt, and one text only: read the prompt with a fresh "
                            "selector's watch")
        if layer not in self.alive:
            self.alive[layer] = torch.ones_like(self.value[layer], dtype=torch.bool)
            if S > T:
                self.evict(layer)
        chosen = []
        for t in range(T):
            self.value[layer] = F.pad(self.value[layer], (0, 1))
            self.alive[layer] = F.pad(self.alive[layer], (0, 1), value=True)
            chosen.append(self.evict(layer))
            self.attended(layer, q[:, :, t : t + 1], keys[:, :, : S - T + t + 1])
        K = max(row.shape[-1] for row in chosen)
        return torch.cat([F.pad(row, (0, K - row.shape[-1]), value=-1) for row in chosen], dim=2)

    def evict(self, layer):
        """Keeps what the latest token may attend to -> its choice [B, G, 1, K']."""
        alive = self.alive[layer]
        ranked = self.ranked(layer).masked_fill(~alive, -torch.inf)
        own = torch.tensor([alive.shape[-1] - 1], device=alive.device)
        chosen = self.budget.topk(ranked[:, :, None], own)
        always = self.budget.sinks_and_window(own)
        kept = torch.cat([always.expand(*chosen.shape[:2], -1, -1), chosen], dim=-1)
        self.alive[layer] = index_to_mask(kept, alive.shape[-1])[:, :, 0]
        return chosen


class H2O(Evicting):
    """Keeps the tokens with the most attention so far; half of the budget is for recent ones."""

    BLOCK = 512  # queries at a time, as the attention of a long prompt takes gigabytes

    def watch(self, layer, x, q, keys, positions):
        if layer == 0:
            return
        T, S = q.shape[2], keys.shape[2]
        received = F.pad(self.value[layer], (0, T)) if layer in self.value else 0
        for t in range(0, T, self.BLOCK):
            part = q[:, :, t : t + self.BLOCK]
            places = torch.arange(S - T + t, S - T + t + part.shape[2], device=q.device)
            received = received + true_attention(part, keys, places).mean(2).sum(2)
        self.value[layer] = received

    def ranked(self, layer):
        value = self.value[layer]
        S = value.shape[-1]
        token = torch.arange(S, device=value.device)
        half = self.budget.allowance(token[-1:] + 1) // 2
        return value.masked_fill(token >= S - half, torch.inf)

    def attended(self, layer, q, keys):
        q = q.float().unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, 1, D]
        scores = (q @ keys.float()[:, :, None].mT)[:, :, :, 0] * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.alive[layer][:, :, None], -torch.inf)
        self.value[layer] = self.value[layer] + scores.softmax(-1).mean(2)


class SnapKV(Evicting):
    """The prompt's last queries vote for its tokens; votes are averaged over 7 neighbours.

    In the paper generated tokens come on top of the budget. Here they count too: of those that
    have left the window, which have no votes, the most recent rank first, behind all voted ones.
    """

    OBSERVED = 32
    POOL = 7

    def __init__(self, budget, **rules):
        super().__init__(budget, **rules)
        self.latest = {}  # by layer: the last queries of the prompt so far, [B, H, up to 32, D]

    def watch(self, layer, x, q, keys, positions):
        if layer == 0:
            return
        if layer in self.latest:
            q = torch.cat([self.latest[layer], q], dim=2)
        self.latest[layer] = q[:, :, -self.OBSERVED :]
        votes = true_attention(self.latest[layer], keys).mean(2).sum(2)  # [B, G, S]
        self.value[layer] = F.avg_pool1d(votes, self.POOL, stride=1, padding=self.POOL // 2)

    def ranked(self, layer):
        votes = self.value[layer]
        S = votes.shape[-1]
        return torch.where(votes == 0, torch.arange(-S, 0, device=votes.device), votes)


RIVALS = {
    "quest": Quest, "h2o": H2O, "snapkv": SnapKV, "keynorm": KeyNorm,
    "sketch": Sketch, "sketch16": partial(Sketch, size=16), "sketch8": partial(Sketch, size=8),
    "ahead1": partial(Ahead, layers_ahead=1), "ahead5": Ahead, "spread": Spread, "topp": TopP,
}


def make(name: str, budget: float, llama=None) -> Selector:
    """A new rival by its name. llama: the model, for the rivals that apply its weights."""
    if name.startswith("ahead"):
        return RIVALS[name](budget, llama)
    return RIVALS[name](budget)
