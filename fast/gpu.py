"""fast/gpu.py - decode steps on a GPU: one CUDA graph per step, choosing in two kernels.

    token [B, 1] -> a CUDA graph: the whole model, choosing included -> logits [B, 1, V]

A decode step is about a thousand small kernels, and a CPU takes longer to launch them one by one
than a GPU to run them. A CUDA graph launches all of them at once, but exactly as they were
recorded: the same addresses, the same shapes, and no decision by the CPU in between. In a recorded
step, therefore,

    - the number of cached tokens is a tensor on the device, `position`
    - shapes are those of `bound` tokens, the cache's size rounded up to 1,024
    - keys and values are written at `position`, and nothing behind it is ever selected
    - a layer without a selection selects all tokens up to `position`

What is recorded is the forward of model.py, with a cache and a selector that obey these rules. A
text that outgrows the bound is recorded anew.

Choosing takes two kernels for all layers of a producer:

    score     importance queries . 8-bit keys -> ordered codes (see fast/selector.py), and a
              histogram of their upper 11 bits
    select    the histogram gives the bin of the K-th best code, one pass over this bin the code
              itself; a last pass writes all tokens above it and the earliest of those that equal it

Tested in Triton's interpreter on a CPU. Not measured yet: no GPU was at hand.

    python sample.py --engine fast --device cuda
"""

import torch

import model
import tokenizer
from butler import find_butler
from cli import UserError
from fast import selector
from fast.selector import CAPACITY, LINE, MAX_HALF, ImportanceKeys, quantise
from kernel import jit, tl, triton
from model import apply_rope, rope_cos_sin
from tokenizer import resolve

BLOCK = 1024  # tokens scored by one program
BINS = 2048  # of the histogram: the upper 11 of 15 bits


def load(model=None, butler=None, device="cuda"):
    """The fast engine on a GPU; arguments and result are those of butler.load. Raises UserError."""
    if triton is None:
        raise UserError("this needs Triton, which CUDA builds of PyTorch bring: pip install triton")
    path = resolve(model)
    llama = Llama.from_pretrained(path, torch.bfloat16, device)
    tok = tokenizer.load(path, llama.config.vocab_size)
    return llama, tok, find_butler(llama, butler, Butler)


# ---------------------------------------------------------------------------- choosing


@jit
def score(queries, int8_codes, scales, codes, histogram, position, scale, row_codes, row_scales, S,
          sinks, window, E: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
          BINS: tl.constexpr, MAX_HALF: tl.constexpr):
    """Codes of one block of tokens for one row (a layer, a text and a KV head), and their part of
    the row's histogram. Code 0: the token cannot be chosen.

    Keys lie channel by channel, [S/64, E, 64]. So each channel is one vector load.
    """
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = int8_codes + row64 * row_codes + token // LINE * (E * LINE) + token % LINE
    total = tl.zeros([BLOCK], tl.float32)
    for e in tl.static_range(E):
        query = tl.load(queries + row * E + e) * scale
        total += query * tl.load(keys + e * LINE).to(tl.float32)
    total *= tl.load(scales + row64 * row_scales + token)
    candidate = (token >= sinks) & (token <= tl.load(position) - window)
    total = tl.where(candidate, total, 0.0)
    total = tl.minimum(tl.maximum(total, -MAX_HALF), MAX_HALF)
    # The bits of an fp16 number, remapped so that they are in the order of the numbers.
    bits = total.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    code = ((bits ^ ((bits >> 31) & 0x7FFF)) + 0x8000) >> 1
    code = tl.where(candidate, tl.maximum(code, 1), 0)
    tl.store(codes + row64 * S + token, code.to(tl.int16))
    counts = tl.histogram(code >> 4, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + row * BINS + bins, counts, mask=counts > 0)


@jit
def bin_of_kth(counts, bins, k):
    """The bin of the k-th best, counted from the last bin, and how many of it are taken."""
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # in higher bins
    found = (above < k) & (above + counts >= k)
    return tl.max(tl.where(found, bins, -1), 0), k - tl.max(tl.where(found, above, 0), 0)


@jit
def select(codes, histogram, num_chosen, idx, S, K, row_idx, BLOCK: tl.constexpr,
           BINS: tl.constexpr):
    """The tokens of one row with the highest codes, of equal ones the earliest -> idx in rising
    order, then -1."""
    row = tl.program_id(0)
    codes += row.to(tl.int64) * S
    idx += row.to(tl.int64) * row_idx
    here = tl.arange(0, BLOCK)
    k = tl.load(num_chosen)
    bins = tl.arange(0, BINS)
    upper, rest = bin_of_kth(tl.load(histogram + row * BINS + bins), bins, k)
    low = tl.arange(0, 32)
    counts = tl.zeros([32], tl.int32)  # of the 16 codes in that bin; slot 16 is for all others
    for start in range(0, S, BLOCK):
        code = tl.load(codes + start + here, mask=start + here < S, other=0).to(tl.int32)
        counts += tl.histogram(tl.where(code >> 4 == upper, code & 15, 16), 32)
    lower, rest = bin_of_kth(tl.where(low < 16, counts, 0), low, rest)
    kth = tl.where(k > 0, upper * 16 + lower, 1 << 16)
    end = 0
    equals = 0
    for start in range(0, S, BLOCK):
        code = tl.load(codes + start + here, mask=start + here < S, other=0).to(tl.int32)
        equal = (code == kth).to(tl.int32)
        before = equals + tl.cumsum(equal, 0) - equal
        taken = (code > kth) | ((equal > 0) & (before < rest))
        slot = end + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(idx + slot, start + here, mask=taken)
        end += tl.sum(taken.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
    for start in range(0, K, BLOCK):
        slot = start + here
        tl.store(idx + slot, -1, mask=(slot >= end) & (slot < K))


def choose(queries, int8_codes, scales, position, num_chosen, idx, bound: int, sinks: int,
           window: int) -> None:
    """The best tokens by q . k / sqrt(E), between sinks and window, for all layers of a producer.

    queries [R, B, G, E]; int8_codes [R, B, G, capacity/64, E, 64]; scales [R, B, G, capacity],
    capacity a multiple of 1,024; position [1] of the queries, below `bound`; num_chosen [1], at
    most K. Writes idx [R, B, G, K] int32, which may be a view, -1 = empty. Nothing waits for the
    device.
    """
    R, B, G, E = queries.shape
    if idx.shape[-1] == 0:
        return
    S = -(bound // -BLOCK) * BLOCK
    rows = R * B * G
    codes = torch.empty(rows, S, dtype=torch.int16, device=queries.device)
    histogram = torch.zeros(rows, BINS, dtype=torch.int32, device=queries.device)
    score[rows, S // BLOCK](
        queries.contiguous(), int8_codes, scales, codes, histogram, position, E**-0.5,
        int8_codes.stride(2), scales.stride(2), S, sinks, window, E=E, LINE=LINE, BLOCK=BLOCK,
        BINS=BINS, MAX_HALF=MAX_HALF)
    select[(rows,)](codes, histogram, num_chosen, idx, S, idx.shape[-1], idx.stride(2),
                    BLOCK=min(4096, triton.next_power_of_2(S)), BINS=BINS)


# ---------------------------------------------------------------------------- the selector


class RecordableKeys(ImportanceKeys):
    """Importance keys whose tables do not move, and which take a position from the device."""

    def make_room(self, cache) -> None:
        """For all tokens that the cache can hold."""
        if self.capacity < cache.capacity:
            self.grow(cache.capacity, cache.k[0].shape[:2])

    def complete(self, cache) -> None:
        """Projects what is missing of the cached keys. Later ones no longer count."""
        if self.known != [cache.size] * len(self.known):
            for layer, keys in enumerate(cache.k[1:]):
                self.update(slice(layer, layer + 1), keys[None, :, :, : cache.size], new=0)

    def add(self, keys, position) -> None:
        """Projects the keys [L-1, B, G, 1, D] of one token, at position [1]."""
        b = self.butler
        cos, sin = rope_cos_sin(position, b.rope[:, None, None])  # [L-1, 1, 1, 1, D]
        projected = apply_rope(keys, cos, -sin) @ b.key_projection[:, None]
        projected = apply_rope(projected, *rope_cos_sin(position, b.importance_rope))
        codes, scales = quantise(projected)  # [L-1, B, G, 1, E], [L-1, B, G, 1]
        self.scales.index_copy_(3, position, scales)
        self.int8_codes[:, :, :, position // LINE, :, position % LINE] = codes.movedim(3, 0)


class ButlerSelector(selector.ButlerSelector):
    """The selector of fast/selector.py, without drift. In a recorded step `index` and `queries` are
    overwritten by the next one."""

    def __init__(self, butler, budget: float, **rules):
        super().__init__(butler, budget, **rules)
        self.keys = RecordableKeys(butler)
        self.position = None  # [1], of the step that is being recorded
        self.bound = None  # its number of tokens at most
        self.num_chosen = None  # [1], how many it chooses

    def begin_recording(self, position, bound: int) -> None:
        """Sinks and window of a token at position [1], and as many slots behind them as a token at
        the end of the bound chooses."""
        budget = self.budget
        self.position = position
        self.bound = bound
        sinks = torch.arange(budget.sinks, device=position.device)
        recent = position - torch.arange(budget.window, device=position.device)
        sinks = torch.where(sinks <= position, sinks, -1)
        recent = torch.where(recent >= budget.sinks, recent, -1)
        fixed = budget.sinks + budget.window
        self.num_chosen = (budget.allowance(position + 1) - fixed).clamp(min=0)
        slots = max(int(budget.allowance(torch.tensor([bound]))), fixed)
        self.table = recent.new_empty(*self.keys.scales.shape[:3], slots, dtype=torch.int32)
        self.table[..., :fixed] = torch.cat([sinks, recent])
        self.index = dict(enumerate(self.table.unsqueeze(3), 1))

    def record(self, layer: int, x, positions):
        """The input x [B, 1, C] of a layer -> its selection [B, G, 1, K]; None in layer 0."""
        new = self.butler.importance_queries(layer, x, positions)
        self.queries |= new
        if new:
            served = slice(layer, layer + len(new))
            queries = torch.stack(list(new.values()))[:, :, :, 0]
            choose(queries, self.keys.int8_codes[served], self.keys.scales[served], self.position,
                   self.num_chosen, self.chosen[served], self.bound, self.budget.sinks,
                   self.budget.window)
        return self.index.get(layer) if layer else None

    def replayed(self, index: dict, queries: dict, size: int) -> None:
        """A recorded step has run; `size` tokens are cached now."""
        self.index = dict(index)  # copies, because plain steps write into these dictionaries
        self.queries = dict(queries)
        self.end = size
        self.keys.count(size)


class Butler(selector.Butler):
    """The butler of fast/selector.py, with this file's selector."""

    rules = ()

    def selector(self, budget: float, **rules) -> ButlerSelector:
        return ButlerSelector(self, budget, **rules)


# ---------------------------------------------------------------------------- the recorded step


def record(function):
    """Records the kernels that a function launches -> a function that launches them again, and the
    result, which every launch overwrites."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class Step:
    """The decode step of one cache under one selector (None: dense), for up to `bound` tokens. It
    is the cache and the selector that the model's forward sees while it is recorded."""

    def __init__(self, llama, cache, selector, bound: int):
        B, G = cache.k[0].shape[:2]
        self.llama = llama
        self.cache = cache
        self.selector = selector
        self.bound = bound
        self.token = torch.zeros(B, 1, dtype=torch.long, device=llama.device)
        self.position = torch.zeros(1, dtype=torch.long, device=llama.device)
        self.all_tokens = torch.empty(B, G, 1, bound, dtype=torch.int32, device=llama.device)
        self.new_keys = []  # of each layer, [B, G, 1, D]
        self.replay = None
        self.logits = None
        self.index = {}
        self.queries = {}

    def serves(self, cache, selector) -> bool:
        return self.cache is cache and self.selector is selector

    def __call__(self, token):
        """token [B, 1] -> logits [B, 1, V]"""
        size = self.cache.size
        if self.selector:
            self.selector.keys.make_room(self.cache)
            self.selector.keys.complete(self.cache)
        self.token.copy_(token)
        self.position.fill_(size)
        if self.replay is None:
            self.run()  # compiles kernels; whatever it writes is written again
            self.replay, self.logits = record(self.run)
            if self.selector:
                self.index = dict(self.selector.index)
                self.queries = dict(self.selector.queries)
        self.replay()
        self.cache.advance(1)
        if self.selector:
            self.selector.replayed(self.index, self.queries, size + 1)
        return self.logits.clone()

    def run(self):
        """The step -> logits. Nothing in it depends on a number that only the device knows."""
        token = torch.arange(self.bound, dtype=torch.int32, device=self.position.device)
        self.all_tokens[:] = torch.where(token <= self.position, token, -1)
        self.new_keys = []
        if self.selector:
            self.selector.begin_recording(self.position, self.bound)
        logits = self.llama(self.token, self, self.select, self.position)
        if self.selector:
            self.selector.keys.add(torch.stack(self.new_keys[1:]), self.position)
        return logits

    # What the model's forward calls.

    def append(self, layer: int, k, v):
        """As model.Cache, at `position`, in a cache of `bound` tokens."""
        keys = self.cache.k[layer]
        values = self.cache.v[layer]
        k = k.to(keys.dtype)
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v.to(values.dtype))
        self.new_keys.append(k)
        return keys[:, :, : self.bound], values[:, :, : self.bound]

    def advance(self, T: int) -> None:
        """The cache advances when the step is replayed."""

    def select(self, layer, x, q, keys, positions):
        index = self.selector.record(layer, x, positions) if self.selector else None
        return self.all_tokens if index is None else index


class Llama(model.Llama):
    """The model of model.py. Its decode steps, dense or under this file's selector, are recorded
    once per cache, selector and bound, and then replayed."""

    def __init__(self, config):
        super().__init__(config)
        self.steps = []  # recorded steps, one for each selector of the latest cache

    def new_cache(self, batch, capacity):
        self.steps = []  # they hold the memory of the last text's cache
        return super().new_cache(batch, capacity)

    @torch.inference_mode()
    def decode(self, token, cache, selector=None):
        """One decode step: token [B, 1] -> logits [B, 1, V]."""
        recordable = selector is None or isinstance(selector, ButlerSelector)
        if not recordable or cache.size >= cache.capacity:
            return super().decode(token, cache, selector)  # which refuses a full cache
        bound = min((cache.size // CAPACITY + 1) * CAPACITY, cache.capacity)
        step = next((s for s in self.steps if s.serves(cache, selector)), None)
        if step is None or step.bound != bound:
            self.steps = [s for s in self.steps if s.cache is cache and s is not step]
            step = Step(self, cache, selector, bound)
            self.steps.append(step)
        return step(token)
