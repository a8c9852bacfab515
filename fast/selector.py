"""fast/selector.py - the butler with 8-bit importance keys, which chooses ahead of the layers.

    layer 0, R, 2R ...   the producer reads x, and `choose` names the tokens of all R layers that it
                         serves, before the first of them is reached
    layer 1 ... L-1      the choice is there already

The butler of butler.py chooses when a layer is reached, from float32 keys. Choosing for all layers
of a producer at once takes fewer calls, and whoever fetches keys and values from elsewhere learns
early what will be needed (`prefetch_with`). The key of the new token itself is not known so early.
It is not needed either, because the token is in its own window.

    key = int8_codes * scale            one scale per token, layer and KV head
    score = query . key / sqrt(E)       rounded to fp16; of equal scores the earliest token wins

`choose` below is the definition of what fast/loops.py computes. Several tokens in one call are
scored layer by layer, as in butler.py, but with the 8-bit keys.

    python -m fast.selector        which tokens both butlers choose
"""

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

import butler
from cli import UserError
from fast import loops
from fast.loops import LINE, MAX_AGE, run
from fast.step import ButlerWeights, Selection
from selection import QUERY_BLOCK, Selector

CAPACITY = 1024  # the tables of importance keys grow by so many tokens
MAX_HALF = 65504.0  # the largest number of fp16


# ---------------------------------------------------------------------------- the definition


def ordered_codes(scores):
    """Scores -> whole numbers from 1 to 32,767 in the same order: the bits of the score in fp16,
    remapped so that they rise with it, without the last one."""
    bits = (scores.float().clamp(-MAX_HALF, MAX_HALF) + 0.0).half().view(torch.int16).int()
    rising = bits ^ (bits >> 31 & 0x7FFF)  # a negative number's bits fall
    return ((rising + 0x8000) >> 1).clamp(min=1)


def choose(queries, int8_codes, scales, first: int, stop: int, k: int, out, due=None) -> None:
    """The k best tokens of [first, stop), in the order of the text, for all layers of a producer.

    queries [R, B, G, E]; int8_codes [R, B, G, capacity/64, E, 64] and scales [R, B, G, capacity],
    in which anything may stand from `stop` on. Writes out [R, B, G, K] int32, -1 = empty, where
    due [R, B, G] is true (None: everywhere).
    """
    keys = int8_codes.mT.flatten(3, 4)[..., :stop, :].float()  # [R, B, G, S, E]
    scores = (keys @ (queries * queries.shape[-1] ** -0.5)[..., None])[..., 0] * scales[..., :stop]
    token = torch.arange(stop, device=out.device)
    ranked = (ordered_codes(scores).long() << 32) - token  # the earlier token of a tie is higher
    best = ranked[..., first:].topk(max(0, min(k, stop - first))).indices + first
    new = torch.full_like(out, -1)
    new[..., : best.shape[-1]] = best.sort().values
    out.copy_(new if due is None else torch.where(due[..., None], new, out))


# ---------------------------------------------------------------------------- importance keys


def quantise(keys):
    """Importance keys [..., E] -> int8_codes [..., E], scales [...]"""
    scales = keys.abs().amax(-1).clamp(min=1e-30) / 127
    return (keys / scales[..., None]).round().to(torch.int8), scales


class ImportanceKeys:
    """8-bit importance keys of layers 1 ... L-1, kept in step with the KV cache.

    int8_codes  [L-1, B, G, capacity/64, E, 64]: the codes of 64 tokens of one channel are
                neighbours, because products with a query run along the tokens
    scales      [L-1, B, G, capacity] float32
    known       per layer: how many of the first tokens have their keys here
    """

    def __init__(self, butler):
        self.butler = butler
        self.known = [0] * (butler.config.layers - 1)
        self.int8_codes = None
        self.scales = None
        self.capacity = 0

    @torch.inference_mode()
    def update(self, some: slice, keys, new: int) -> None:
        """Projects what is missing of the cached keys [R, B, G, S, D] of some layers (0 is layer
        1). Their last `new` tokens are new, even where a truncated cache had others there."""
        S = keys.shape[3]
        start = min(*self.known[some], S - new)
        if self.capacity <= S:  # the next token's key needs a place, too
            # The keys are the beginning of the cache's buffer: take room for as many at once.
            room = keys.stride(2) // keys.stride(3)
            self.grow(max(S, room), keys.shape[1:3])
        for at in range(start, S, CAPACITY):  # in pieces: float32 copies stay small
            self.project(some, keys[:, :, :, at : at + CAPACITY], at)
        self.known[some] = [S] * len(keys)

    @torch.inference_mode()
    def append(self, keys, position: int) -> None:
        """Projects the keys [L-1, B, G, 1, D] of one token, in all layers."""
        if self.capacity <= position + 1:
            self.grow(position + 1, keys.shape[1:3])
        self.project(slice(None), keys, position)
        self.count(position + 1)

    def project(self, some: slice, keys, start: int) -> None:
        """keys [R, B, G, T, D] of the tokens from `start` on"""
        b = self.butler
        T = keys.shape[3]
        if T == 1 and compiled_for(b):
            codes = self.int8_codes[some].flatten(1, 2)
            scales = self.scales[some].flatten(1, 2)
            keys = keys.flatten(1, 2)[:, :, 0].float().contiguous()  # one layout, compiled once
            run(loops.project, keys.numpy(), b.key_projection[some].numpy(), start,
                b.rope[some].numpy(), b.importance_rope.numpy(), codes.numpy(), scales.numpy())
            return
        at = torch.arange(start, start + T, device=self.scales.device)
        for (layer, row), of_layer in zip(list(b.rows.items())[some], keys, strict=True):
            projected = b.importance_keys(layer, of_layer.to(at.device), at)  # [B, G, T, E]
            codes, self.scales[row][:, :, at] = quantise(projected)
            self.int8_codes[row][:, :, at // LINE, :, at % LINE] = codes.movedim(2, 0)

    def grow(self, S: int, rows) -> None:
        """Makes room for S tokens; rows: B, G."""
        self.capacity = (S // CAPACITY + 1) * CAPACITY
        shape = len(self.known), *rows
        scales = self.butler.key_projection.new_empty(*shape, self.capacity)
        codes = scales.new_empty(*shape, self.capacity // LINE, self.butler.config.size, LINE,
                                 dtype=torch.int8)
        if self.scales is not None:
            codes[:, :, :, : self.int8_codes.shape[3]] = self.int8_codes
            scales[..., : self.scales.shape[-1]] = self.scales
        self.int8_codes = codes
        self.scales = scales

    def count(self, size: int) -> None:
        """A compiled or recorded step has written keys: those of `size` tokens are known."""
        self.known = [size] * len(self.known)

    def dequantised(self, layer: int, S: int):
        """-> importance keys [B, G, S, E] of layer 1 or above"""
        row = self.butler.rows[layer]
        # A transposed result: 64 codes of a channel stay neighbours while they are copied.
        codes = self.int8_codes[row].transpose(2, 3).flatten(3)  # [B, G, E, capacity]
        return (codes[..., :S] * self.scales[row][:, :, None, :S]).mT


def compiled_for(butler) -> bool:
    """Do the compiled loops serve this butler?"""
    return (loops.numba is not None and butler.key_projection.is_cpu
            and butler.config.size % 4 == 0)


# ---------------------------------------------------------------------------- refreshing


class Refresh:
    """Which KV heads choose anew. A choice stays in use until the importance query has turned by
    more than `drift` (1 - cosine) from the query that it was made for, and for 16 steps at most.

    asked   the normalised queries of the choices in use, [L-1, B, G, E]; None: there are none
    age     how many steps ago they were made, [L-1, B, G]
    """

    def __init__(self, drift: float):
        if not 0 <= drift <= 2:
            raise UserError(f"drift {drift}: 1 - cosine is from 0 to 2")
        self.drift = drift
        self.asked = None
        self.age = None
        self.made = 0  # choices made, of all KV heads
        self.used = 0  # choices used

    def forget(self) -> None:
        """The next step chooses everything anew."""
        self.asked = None
        self.age = None

    def begin(self, shape, device) -> None:
        """Makes room for queries of this shape, L-1, B, G, E. All choices are made anew."""
        self.asked = torch.zeros(shape, device=device)
        self.age = torch.full(shape[:3], MAX_AGE, device=device)

    def due(self, served: slice, queries):
        """Queries of one step [R, B, G, E] of some layers (0 is layer 1) -> true where a KV head
        chooses, [R, B, G]"""
        queries = F.normalize(queries, dim=-1)
        asked = self.asked[served]
        age = self.age[served]
        age += 1
        due = ((queries * asked).sum(-1) < 1 - self.drift) | (age >= MAX_AGE)
        asked.copy_(torch.where(due[..., None], queries, asked))
        age.masked_fill_(due, 0)
        self.count(due)
        return due

    def count(self, due) -> None:
        self.made = self.made + due.sum()  # a tensor: nobody waits for a GPU
        self.used += due.numel()


# ---------------------------------------------------------------------------- the selector


class ButlerSelector(Selector):
    """Selects by the butler's scores, ahead of the layers where a call has one token.

    drift   how far a query may turn before its choice is made anew, see Refresh; 0: every step

    queries  importance queries of the latest tokens by layer, [B, G, T, E]
    keys     ImportanceKeys
    table    the latest selections made ahead, [L-1, B, G, K] int32: sinks, window, chosen tokens
    """

    def __init__(self, butler, budget: float, drift=0.0, **rules):
        super().__init__(budget, **rules)
        self.butler = butler
        self.refresh = Refresh(drift)
        self.queries = {}
        self.keys = ImportanceKeys(butler)
        self.table = None
        self.ahead = False  # does the present call choose ahead?
        self.end = 0  # tokens cached after the latest call
        self.new_keys = []  # of the present step's token, [B, G, 1, D] of each layer so far
        self.prefetch = None  # see prefetch_with

    attention = staticmethod(loops.sparse_attention)  # for engines that attend by PyTorch

    def bytes_per_token(self, head_dim):
        return self.butler.config.size + 4  # 8 bits a number, and a scale

    @property
    def steps_per_choice(self) -> float:
        """Steps that a choice of a KV head has served, on average so far."""
        made = int(self.refresh.made)
        return self.refresh.used / made if made else 1.0

    def prefetch_with(self, function) -> None:
        """After each choice made ahead, function(layers, chosen) is called with a list of layers
        and the tokens chosen for them between sinks and window, [R, B, G, K'] int32, -1 = empty."""
        self.prefetch = function

    # One call per layer, as the plain model makes them.

    def watch(self, layer, x, q, keys, positions):
        """Prefill: project the keys of the prompt while it is read."""
        if layer == 0:
            self.end = int(positions[-1]) + 1
            self.ahead = False
            self.refresh.forget()
        else:
            self.update(layer, keys, len(positions))

    def update(self, layer: int, keys, new: int) -> None:
        """Projects what is missing of the cached keys [B, G, S, D] of a layer."""
        row = self.butler.rows[layer]
        self.keys.update(slice(row, row + 1), keys[None], new)

    def __call__(self, layer, x, q, keys, positions):
        if layer == 0:
            B, G = keys.shape[:2]
            T = x.shape[1]
            S = int(positions[-1]) + 1  # layer 0 may have a sliding window, and fewer keys
            # After a prompt that was read without `watch`, the keys of a layer become known when
            # the layer is reached, and the layer chooses then.
            self.ahead = T == 1 and min(self.keys.known) >= S - 1
            if self.ahead:
                self.begin(B, G, S)
            else:
                self.end = S
                self.refresh.forget()
        if layer == 0 or not self.ahead:
            return super().__call__(layer, x, q, keys, positions)
        self.look_ahead(layer, x, positions)
        self.new_keys.append(keys[:, :, -1:])
        if len(self.new_keys) == len(self.keys.known):  # one call for all layers takes less time
            self.keys.append(torch.stack(self.new_keys), self.end - 1)
        self.index[layer] = self.table[self.butler.rows[layer], :, :, None]
        return self.index[layer]

    @torch.inference_mode()
    def look_ahead(self, layer, x, positions):
        """Predict if a producer reads this layer, and choose for the layers that it serves."""
        new = self.butler.importance_queries(layer, x, positions)
        self.queries |= new
        if new and self.ahead:
            self.choose_ahead(list(new), torch.stack(list(new.values()))[:, :, :, 0])

    def scores(self, layer, q, keys, positions):
        self.update(layer, keys, len(positions))
        importance_keys = self.keys.dequantised(layer, keys.shape[2])
        return self.butler.scores(self.queries[layer], importance_keys)

    def block_scores(self, layer, q, keys, positions):
        importance_keys = self.keys.dequantised(layer, keys.shape[2])
        return self.butler.block_scores(self.queries[layer], importance_keys, positions)

    def choose_for_blocks(self, budget, layer, q, keys, positions):
        """As in selection.py, but not in the order of the scores: on a CPU, NumPy divides numbers
        at the k-th largest one ten times as fast as torch.topk sorts them."""
        if not keys.is_cpu:
            return super().choose_for_blocks(budget, layer, q, keys, positions)
        scores = self.block_scores(layer, q, keys, positions).numpy()  # [B, G, T/64, S]
        last = positions[QUERY_BLOCK - 1 :: QUERY_BLOCK]
        num_left = (budget.allowance(last + 1) - budget.sinks - budget.window).clamp(min=0).tolist()
        chosen = np.full((*scores.shape[:3], max(num_left)), -1, np.int32)
        for block, (own, k) in enumerate(zip(last.tolist(), num_left, strict=True)):
            stop = max(own + 1 - budget.window, budget.sinks)
            candidates = scores[:, :, block, budget.sinks : stop]
            k = min(k, candidates.shape[2])
            if k:
                order = candidates.argpartition(-k, axis=-1)
                chosen[:, :, block, :k] = order[..., -k:] + budget.sinks
        return torch.from_numpy(chosen)

    # A step that chooses ahead.

    @property
    def chosen(self):
        """The part of `table` behind sinks and window, [L-1, B, G, K']"""
        return self.table[..., self.budget.sinks + self.budget.window :]

    def begin(self, B: int, G: int, S: int) -> None:
        """Makes the table of a step whose token is the last of S."""
        follows = S - self.end in (0, 1)  # or is the latest token once more
        self.end = S
        self.new_keys = []
        own = torch.tensor([S - 1], device=self.keys.scales.device)
        always = self.budget.sinks_and_window(own)
        fixed = always.shape[1]
        total = int(self.budget.allowance(torch.tensor([S])))
        # A new table for each step: whoever keeps an index of the last step keeps its content.
        table = always.new_full((len(self.keys.known), B, G, max(total, fixed)), -1,
                                dtype=torch.int32)
        table[..., :fixed] = always
        if follows and self.refresh.drift and self.refresh.asked is not None:
            table[..., fixed : self.table.shape[-1]] = self.chosen  # in use until they are due
        else:
            shape = *table.shape[:3], self.butler.config.size
            self.refresh.begin(shape, table.device)
        self.table = table

    def choose_ahead(self, layers: list, queries) -> None:
        """For the layers that a producer serves, by their queries [R, B, G, E]."""
        first_row = self.butler.rows[layers[0]]
        served = slice(first_row, first_row + len(layers))
        due = None
        if self.refresh.drift:
            due = self.refresh.due(served, queries)
        chosen = self.chosen[served]
        first = self.budget.sinks
        stop = max(self.end - self.budget.window, first)
        inputs = queries, self.keys.int8_codes[served], self.keys.scales[served]
        if compiled_for(self.butler):
            if due is None:
                due = torch.ones(chosen.shape[:3], dtype=torch.bool)
            queries, codes, scales = (x.flatten(1, 2).numpy() for x in inputs)
            run(loops.choose, queries, codes, scales, first, stop,
                self.table[served].flatten(1, 2).numpy(), first + self.budget.window,
                due.flatten(1, 2).numpy())
        else:
            choose(*inputs, first, stop, chosen.shape[-1], chosen, due)
        if self.prefetch:
            self.prefetch(layers, chosen)

    # The same in fast.Llama's compiled step, of one text.

    @torch.inference_mode()
    def begin_compiled(self, keys) -> Selection:
        """keys [L, 1, G, S, D]: all cached keys before the new token -> what the step works on"""
        S = keys.shape[3]
        self.keys.update(slice(None), keys[1:], 0)
        self.begin(1, keys.shape[2], S + 1)
        queries = torch.empty_like(self.refresh.asked)
        due = torch.empty_like(self.refresh.age, dtype=torch.bool)
        tables = (self.keys.int8_codes, self.keys.scales, self.refresh.asked, self.refresh.age,
                  due, queries, self.table)
        codes, scales, asked, age, due, queries, index = (x[:, 0].numpy() for x in tables)
        budget = self.budget
        return Selection(codes, scales, budget.sinks, budget.window, float(self.refresh.drift),
                         asked, age, due, queries, index)

    def end_compiled(self, selection: Selection) -> None:
        """The step has run: what it has chosen becomes visible."""
        queries = torch.from_numpy(selection.queries)[:, None, :, None]  # [L-1, 1, G, 1, E]
        self.queries = dict(enumerate(queries, 1))
        self.index = dict(enumerate(self.table.unsqueeze(3), 1))
        self.keys.count(self.end)
        self.refresh.count(torch.from_numpy(selection.due))
        self.ahead = True


class Butler(butler.Butler):
    """The butler of butler.py, with this file's selector."""

    rules = ("drift",)

    def selector(self, budget: float, drift=0.0, **rules) -> ButlerSelector:
        """A fresh selector for one text; see ButlerSelector."""
        return ButlerSelector(self, budget, drift, **rules)

    @cached_property
    def weights(self) -> ButlerWeights:
        """For the compiled step."""
        producers = list(self.producers.values())
        tables = [torch.stack([p.norm.weight for p in producers]),
                  torch.stack([p.norm.bias for p in producers]),
                  torch.stack([p.up.weight for p in producers]),
                  torch.cat([p.out.weight.view(*p.shape, -1) for p in producers]),
                  self.key_projection, self.rope.contiguous(), self.importance_rope]
        return ButlerWeights(self.config.layers_per_producer, producers[0].norm.eps,
                             *(table.numpy() for table in tables))


if __name__ == "__main__":
    import model
    from tokenizer import resolve

    llama = model.Llama.from_pretrained(resolve())
    cache = llama.new_cache(batch=1, capacity=401)
    llama.prefill(torch.arange(400)[None], cache)
    for cls in butler.Butler, Butler:
        selector = butler.load_for(llama, cls=cls).selector(24)
        cache.truncate(399)
        for token in (399, 400):
            llama.decode(torch.tensor([[token]]), cache, selector)
        tokens = sorted(selector.index[9][0, 0, 0].tolist())
        print(f"{cls.__module__}: layer 9, KV head 0, of 401 tokens: {tokens}")
