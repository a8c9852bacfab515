"""butler.py - the predictor, and how it chooses ahead of time.

TokenButler (arXiv 2503.07518) keeps the whole KV cache and guesses, for every new token, which few
cached tokens each layer is about to need. Two small learned maps do it:

    x [B, T, C], input of layer p -Producer-> importance queries of R layers [R, B, G, T, E]
    keys, turned back [B, G, S, D] ---W_K---> importance keys [B, G, S, E], cached beside K and V

    score(t, s) = turned(q_imp, t) . turned(k_imp, s) / sqrt(E)      one query per KV head

Producers sit at layers 0, R, 2R ... and share no weights. The one at layer p serves p+1 ... p+R, so
layer 0 has no prediction and stays dense, and at every other layer the queries are known before the
layer is reached: a fetch or a kernel launch can start early.

Positions. Cached keys are rotated, each by its own position. A fixed projection of rotated keys,
which is the paper's form (`rotated_keys`), learns the rotations that it saw in training and no
others: it chooses well up to that length and badly beyond. Here keys are turned back first, which
is exact, and queries and keys of importance space have a rotary embedding of their own: a few pairs
of channels turn, slowly enough to tell thousands of tokens apart; the others say what a token is,
wherever it stands. How scores become a selection within a budget is the same for all who score:
selection.py.

    python butler.py        prints a short trace of shapes
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from common.errors import Refusal, in_one_line
from common.files import replacing
from cpu import loops
from cpu.loops import LINE
from kernel import BLOCK, choose, in_order
from loading.fetch import butler_file
from model import rotate, turns
from selection import SelectionError, Selector, first_position

FASTEST = 0.5  # radians a token of the first pair of importance channels
SHIPPED = Path(__file__).parent / "checkpoints" / "smollm2-135m-instruct.safetensors"


class ButlerError(Refusal):
    """A butler that cannot be read, or that belongs to another model."""


# ---------------------------------------------------------------------------- the predictor


@dataclass(frozen=True)
class ButlerConfig:
    """The base model's shape, rotary frequencies and fingerprint, and the predictor's own sizes."""

    layers: int
    width: int
    kv_heads: int
    head_dim: int
    rope: tuple  # radians a token of each pair of the base model's channels: D/2, or (L-1) D/2
    stride: int = 5  # R: layers served by one producer
    size: int = 32  # E: channels of importance space, of which half turn with the position
    slowest: float = 4e-4  # radians a token of the last pair; half a turn in the whole context
    hidden: int = 176
    rotated_keys: bool = False  # the paper's form: keys as they are cached, no pair turns
    fingerprint: str = ""

    @classmethod
    def for_model(cls, model, **sizes) -> "ButlerConfig":
        c, rope = model.config, tuple(model.frequencies.flatten().tolist())
        return cls(c.layers, c.width, c.kv_heads, c.head_dim, rope,
                   slowest=math.pi / c.context, fingerprint=fingerprint(model), **sizes)

    def __post_init__(self):
        object.__setattr__(self, "rope", tuple(self.rope))  # JSON knows lists only
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not (type(value) is int and 0 < value <= 2**20):
                raise ButlerError(f"{f.name} is {value!r}, not a sensible whole number")
        if not 2 <= self.layers <= 1024:
            raise ButlerError(f"no butler for {self.layers} layers")
        if self.size % 4:
            raise ButlerError(f"importance space has channels in fours, not {self.size}")
        numbers = (*self.rope, self.slowest)
        if 2 * len(self.rope) not in (self.head_dim, (self.layers - 1) * self.head_dim) or not all(
                type(f) is float and 0 <= f < 10 for f in numbers):
            raise ButlerError(f"frequencies {self.rope} for heads of {self.head_dim}")

    def ropes(self) -> dict:
        """Radians a token of each pair of channels: `rope` of the base model, [L-1, 1, 1, 1, D/2],
        `own_rope` of importance space, half of them 0; `rotated_keys`: nothing turns."""
        turning = torch.logspace(math.log10(FASTEST), math.log10(self.slowest), self.size // 4)
        still = torch.zeros(self.size // 2 - len(turning))
        rope = torch.tensor(self.rope).view(-1, self.head_dim // 2).expand(self.layers - 1, -1)
        both = {"rope": rope[:, None, None, None], "own_rope": torch.cat([turning, still])}
        return {name: f * (not self.rotated_keys) for name, f in both.items()}


def fingerprint(model) -> str:
    """Which base model is this? A hash of its shape and of its norm weights as bfloat16, which
    quantised files hold exactly too, and which every fine-tuning changes: the GGUF and the original
    of a model agree, two models do not. An untrained model's are all 1: there k_proj's tell."""
    c = model.config
    norms = [getattr(block, "input_layernorm", block.post_attention_layernorm).weight
             for block in model.layers]  # beyond/attach.py knows models without the first
    if all((norm == norms[0][0]).all() for norm in norms):
        attention, start = model.layers[0].self_attn, c.heads * c.head_dim
        norms = ([attention.k_proj.weight] if hasattr(attention, "k_proj") else
                 [attention.qkv_proj.weight[start : start + c.kv_heads * c.head_dim]])
    weights = torch.cat([w.detach().to("cpu", torch.bfloat16).flatten() for w in norms])
    shape = f"{c.layers} {c.width} {c.heads} {c.kv_heads} {c.head_dim}".encode()
    data = weights.view(torch.int16).numpy().tobytes()
    return hashlib.sha256(shape + data).hexdigest()[:16]


class Producer(nn.Module):
    """Reads one layer's input, predicts the importance queries of the next `served` layers."""

    def __init__(self, c: ButlerConfig, served: int):
        super().__init__()
        self.shape = (served, c.kv_heads, c.size)
        self.norm = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.out = nn.Linear(c.hidden, served * c.kv_heads * c.size, bias=False)

    def forward(self, x):  # [B, T, C] -> [B, T, served, G, E]
        return self.out(F.silu(self.up(self.norm(x)))).unflatten(-1, self.shape)


class Butler(nn.Module):
    """All producers and key projections of one base model, in float32."""

    def __init__(self, config: ButlerConfig):
        super().__init__()
        self.config = c = config
        self.producers = nn.ModuleDict({str(p): Producer(c, min(c.stride, c.layers - 1 - p))
                                        for p in range(0, c.layers - 1, c.stride)})
        # one projection per layer and KV head; layer 0 is never predicted
        self.key_projection = nn.Parameter(
            torch.randn(c.layers - 1, c.kv_heads, c.head_dim, c.size) * c.head_dim**-0.5)
        for name, values in c.ropes().items():
            self.register_buffer(name, values, persistent=False)

    def queries(self, layer: int, x, positions) -> dict:
        """Input x [B, T, C] of a layer, at positions [B, T] -> {served layer: q_imp [B, G, T, E]};
        {} if no producer reads this layer."""
        if str(layer) not in self.producers:
            return {}
        return dict(enumerate(self.predict(layer, x, positions), layer + 1))

    def predict(self, layer: int, x, positions):
        """The same for a layer that has a producer, in one: [R, B, G, T, E]"""
        queries = self.producers[str(layer)](x.to(self.key_projection))  # from any device
        angles = positions[:, None, :, None] * self.own_rope
        return rotate(queries.permute(2, 0, 3, 1, 4), *turns(angles))

    def project(self, layer, keys, positions):
        """Cached keys [B, G, S, D] of a layer >= 1, at positions [S] (or [B, 1, S]) -> importance
        keys [B, G, S, E]; of several, [R, B, G, S, D] -> [R, B, G, S, E], `layer` is their slice
        of all but the first."""
        some, positions = layer if isinstance(layer, slice) else layer - 1, positions[..., None]
        plain = turned_back(keys, positions * self.rope[some])
        projected = plain @ self.key_projection[:, None][some]
        return rotate(projected, *turns(positions * self.own_rope))

    def scores(self, queries, projected):
        """q_imp [..., G, T, E], k_imp [..., G, S, E] -> scores [..., G, T, S]"""
        rows = queries * queries.shape[-1] ** -0.5
        return rows @ projected.to(rows.dtype).transpose(-1, -2)

    def selector(self, budget, **rules) -> "ButlerSelector":
        """A fresh selector for one sequence (or one batch); rules as for `Selector`."""
        return ButlerSelector(self, budget, **rules)

    def check(self, model) -> "Butler":
        """Returns self when trained for this base model, else raises ButlerError."""
        rope, own = torch.tensor(self.config.rope), model.frequencies.flatten().cpu()
        if (actual := fingerprint(model)) != self.config.fingerprint:
            raise ButlerError(f"this butler was trained for another base model (fingerprint "
                              f"{self.config.fingerprint}, the model's is {actual})")
        if own.shape != rope.shape or not own.allclose(rope, rtol=1e-5, atol=0):
            raise ButlerError("this butler was trained for this model at other rotary frequencies")
        return self

    def save(self, path, extra: dict | None = None) -> None:
        """Writes one safetensors file, whole or not at all: weights, and in the metadata `butler`
        (the configuration as JSON) and `extra` (JSON too: how it was trained)."""
        metadata = {"butler": json.dumps(asdict(self.config)), "extra": json.dumps(extra or {})}
        with replacing(path) as part:
            weights = {k: v.contiguous() for k, v in self.state_dict().items()}
            part.write_bytes(save(weights, metadata))

    @classmethod
    def load(cls, path) -> "Butler":
        """Reads what `save` wrote, by path or Hub id. Raises ButlerError, one line, else."""
        with in_one_line(ButlerError, path, "unreadable butler"):
            file = butler_file(path)
            there = file.exists()
        if not there:
            raise ButlerError(f"no butler at {path}: train one with python train.py")
        with (in_one_line(ButlerError, path, "unreadable butler", RuntimeError),
              safe_open(file, framework="pt") as f):
            if "butler" not in (told := f.metadata() or {}):
                raise ButlerError("not a butler, its metadata lacks a configuration")
            config = ButlerConfig(**json.loads(told["butler"]))
            with torch.device("meta"):  # a header's sizes are compared before any allocation
                butler = cls(config)
            weights = {name: f.get_tensor(name).float() for name in f.keys()}
            butler.load_state_dict(weights, assign=True)
        for name, values in config.ropes().items():
            setattr(butler, name, values)
        return butler.eval().requires_grad_(False)


def turned_back(keys, angles):
    """Keys [..., D] that were rotated by angles [..., D/2] -> what they were before, float32."""
    cos, sin = turns(angles)
    return rotate(keys, cos, -sin)


def load_for(model, path=None) -> Butler:
    """The butler at `path` (None: the one shipped for the default model), if it is this model's."""
    return Butler.load(path or SHIPPED).check(model).to(model.device)


# ---------------------------------------------------------------------------- choosing ahead


class ImportanceKeys(NamedTuple):
    """In 8 bits, with a scale for each token."""

    numbers: torch.Tensor  # [..., S, E] int8
    scales: torch.Tensor  # [..., S] float32; a key is the product

    @classmethod
    def quantised(cls, keys) -> "ImportanceKeys":
        """Keys [..., S, E] -> the same in 8 bits. (cpu/loops.py's `projected` does so too.)"""
        scales = keys.abs().amax(-1).clamp(min=1e-30) / 127
        return cls((keys / scales[..., None]).round().to(torch.int8), scales)

    def floats(self):
        """-> the keys [..., S, E]"""
        return self.numbers * self.scales[..., None]


class ImportanceCache:
    """The importance keys of all layers but the first, which follow the cached keys they are of;
    row n of each table and list is layer n + 1's.

    numbers  [L - 1, B, G, capacity/64, E, 64] int8, None until there are any: 64 tokens' numbers of
             a channel are neighbours, as products with a query run along the tokens
    scales   [L - 1, B, G, capacity] float32
    witness  [B, capacity, D]: what the last layer's keys of the first head were when projected, by
             which `rewritten` notices others in their places
    seen     cached keys [B, G, S, D]: views of the KV cache, which show what it holds by now
    filled   how many tokens' importance keys are there, in the row that has fewest
    """

    def __init__(self, butler: Butler):
        self.butler, layers = butler, butler.config.layers - 1
        self.numbers, self.scales, self.witness = None, None, None
        self.seen, self.filled = [None] * layers, [0] * layers

    def layer(self, layer: int) -> ImportanceKeys:
        """A copy, token by token: [B, G, capacity, E]"""
        numbers = self.numbers[layer - 1].transpose(-1, -2).flatten(2, 3)
        return ImportanceKeys(numbers, self.scales[layer - 1])

    def see(self, layer: int, keys, start: int) -> None:
        """Takes note of a layer's keys; those from `start` on are new, to be projected when they
        are needed, like any of a prompt that was read unseen."""
        self.seen[layer - 1] = keys
        self.filled[layer - 1] = min(self.filled[layer - 1], start)

    def rewritten(self, start: int, follows: bool) -> bool:
        """Has somebody truncated the cache and written other tokens before `start`, without this
        selector? Compares the last key that is known with what it was. Not on a GPU where the new
        token `follows` the last one, as the CPU would wait for it at every step."""
        at = min(self.filled[-1], start) - 1
        if at < 0 or (follows and self.witness.device.type != "cpu"):
            return False
        now = self.seen[-1][:, 0, at].to(self.witness.device)
        return not torch.equal(now, self.witness[:, at])

    def complete(self, S: int, some=slice(None)) -> None:
        """Sees to it that importance keys of the first S tokens are there, of some layers."""
        seen, start = self.seen[some], min(self.filled[some])
        if start >= S:
            return
        self.grow(S)
        numbers, scales = self.numbers[some], self.scales[some]
        for at in range(start, S, 1024):
            tokens = slice(at, min(at + 1024, S))
            keys = stacked(seen, tokens, scales.device)
            if keys.shape[3] <= loops.FEW and loops.serves(keys):
                loops.project(keys, self.butler, some, at, numbers, scales)
            else:
                here = torch.arange(at, tokens.stop, device=scales.device)
                new = ImportanceKeys.quantised(self.butler.project(some, keys, here))
                numbers[..., here // LINE, :, here % LINE] = new.numbers.movedim(3, 0)
                scales[..., tokens] = new.scales
        if seen[-1] is self.seen[-1]:
            self.witness[:, start:S] = seen[-1][:, 0, start:S]
        self.filled[some] = [S] * len(seen)

    def latest(self, positions, S: int) -> None:
        """The same for all layers, where each row lacks but the key before its new token's, and
        `positions` [B, 1] may be known to the device alone."""
        self.grow(S)
        at = (positions - 1).clamp(min=0)  # [B, 1]
        rows = torch.arange(len(at), device=at.device)[:, None]
        keys = torch.stack([k[rows, :, at].transpose(1, 2) for k in self.seen])
        new = ImportanceKeys.quantised(self.butler.project(slice(None), keys, at[:, None]))
        self.numbers[:, rows, :, at // LINE, :, at % LINE] = new.numbers.permute(1, 3, 0, 2, 4)
        self.scales[:, rows, :, at] = new.scales.permute(1, 3, 0, 2)
        self.witness[rows, at] = keys[-1, :, 0]
        self.filled = [S] * len(self.seen)

    def grow(self, S: int) -> None:
        """Makes room for S tokens at least."""
        c, keys = self.butler.config, self.seen[0]
        old = 0 if self.scales is None else self.scales.shape[-1]
        if old >= S:
            return
        head, row = keys.stride()[1:3]  # the keys are the beginning of a buffer: as much room
        capacity = -(-max(head // row, S) // BLOCK) * BLOCK
        shape = len(self.seen), *keys.shape[:2]
        scales = self.butler.key_projection.new_empty(*shape, capacity)
        numbers = scales.new_empty(*shape, capacity // LINE, c.size, LINE, dtype=torch.int8)
        witness = scales.new_empty(len(keys), capacity, c.head_dim, dtype=keys.dtype)
        if old:
            numbers[:, :, :, : old // LINE], scales[..., :old] = self.numbers, self.scales
            witness[:, :old] = self.witness
        self.numbers, self.scales, self.witness = numbers, scales, witness


def stacked(tensors: list, some: slice, device):
    """Some tokens of keys [B, G, S, D] of several layers, in one tensor on a device; without a copy
    where the layers lie evenly in one piece of memory, as those of our cache do."""
    one, at = tensors[0], [t.data_ptr() for t in tensors]
    step = at[1] - at[0] if len(at) > 1 else 0
    ends = {t.untyped_storage().data_ptr() for t in (one, tensors[-1])}
    if step < 0 or len(ends) > 1 or at != [at[0] + step * n for n in range(len(at))]:
        return torch.stack([t[:, :, some].to(device) for t in tensors])
    layers = one.as_strided((len(at), *one.shape), (step // one.element_size(), *one.stride()))
    return layers[:, :, :, some].to(device)


class Reuse:
    """Which choices are made anew: a KV head's stays in use until its importance query has turned
    away by more than `drift` (1 - cosine) from the one that it was made for, `oldest` steps at
    most. Producers are told apart by their layers."""

    def __init__(self, drift: float, device):
        if not 0 <= drift <= 2:
            raise SelectionError(f"drift {drift}: 1 - cosine is from 0 to 2")
        self.drift, self.oldest, self.asked, self.age = drift, 16, {}, {}
        self.tally = torch.zeros(2, dtype=torch.long, device=device)  # choices made, and used

    def forget(self) -> None:
        """All choices are to be made anew."""
        self.asked.clear()

    @property
    def steps_per_choice(self) -> float:
        """Steps between two choices of a KV head, on average so far."""
        made, used = self.tally.tolist()
        return used / made if made else 1.0

    def due(self, producer: int, queries):
        """Queries of a step [R, B, G, E] -> true where a KV head must choose again, [R, B, G];
        there the query is remembered, to compare later ones with."""
        queries = F.normalize(queries, dim=-1)
        if producer not in self.asked:
            self.asked[producer] = queries
            self.age[producer] = torch.full_like(queries[..., 0], self.oldest)
        asked, age = self.asked[producer], self.age[producer]
        age += 1
        due = ((queries * asked).sum(-1) < 1 - self.drift) | (age >= self.oldest)
        asked.copy_(torch.where(due[..., None], queries, asked))
        age.masked_fill_(due, 0)
        self.tally[0] += due.sum()
        self.tally[1] += due.numel()
        return due

    def sources(self, producer: int, queries):
        """Queries of a block [R, B, G, T, E] -> for each of its tokens, 1 + the number of the token
        whose choice it uses, or 0 for a choice made before the block; [R, B, G, T]"""
        sources = torch.zeros(queries.shape[:-1], dtype=torch.long, device=queries.device)
        at = sources[..., 0]
        for t, q in enumerate(queries.unbind(3)):
            sources[..., t] = at = at.where(~self.due(producer, q), t + 1)
        return sources


class ButlerSelector(Selector):
    """Scores by the butler. A decode step:

        layer 0        `begin` (selection.py) -> `arrive`: is what is known of the text still true?
        layers 0, R .. `look_ahead`: the producer's queries; at layer 0 first `plan`: importance
                       keys of the latest token. Then `choose_ahead`, for all layers it serves
        every layer    `selected`: the choice that is there already

    The keys of this very token are not known then, and not needed, as it is in the window. In a
    block of tokens, and after a prompt that was read without the selector, each layer is scored
    when it is reached.

    drift       how far a query may turn before its choice is made anew, see `Reuse`; 0: every step
    """

    capturable = True

    def __init__(self, butler: Butler, budget, drift=0.0, **rules):
        super().__init__(budget, **rules)
        self.butler, self.importance = butler, ImportanceCache(butler)
        self.reuse = Reuse(drift, butler.key_projection.device)
        self.weights = {int(p): loops.weights(producer)  # by layer; None: not for the loops
                        for p, producer in butler.producers.items()}
        self.next, self.choices = 0, None  # where the text goes on; in use, [L - 1, B, G, 1, K]
        # by the producer's layer: importance queries [R, B, G, T, E]; of a block, Reuse.sources
        self.predicted, self.sources = {}, {}
        # what `plan` makes for a step:
        self.ahead, self.chosen = None, None  # indices by layer; their part behind sinks and window
        self.here, self.wants = None, None  # of each row [B]: position, how many to choose
        self.longest, self.arrays = 0, None  # tokens before this one; the same for the loops

    @property
    def queries(self) -> dict:
        """{layer: importance queries [B, G, T, E]}"""
        return {layer: q for producer, queries in self.predicted.items()
                for layer, q in enumerate(torch.as_tensor(queries), producer + 1)}

    def __call__(self, layer, x, q, keys, positions):
        if layer:
            self.importance.see(layer, keys, self.start)
        return super().__call__(layer, x, q, keys, positions)

    def early(self, cached):
        return cached > 0 and all(keys is not None and keys.shape[2] >= cached
                                  for keys in self.importance.seen)

    def arrive(self, T, start, end):
        if self.importance.rewritten(start, start == self.next):
            self.importance.filled = [0] * len(self.importance.filled)  # all are projected anew
            self.reuse.forget()
        if not self.next - 1 <= start <= self.next:  # rewound, or tokens were read without it
            self.reuse.forget()
        self.next = start + T
        super().arrive(T, start, end)

    @torch.inference_mode()
    def watch(self, layer, x, q, keys, positions):
        if layer == 0:
            self.arrive(positions.shape[1], first_position(keys, positions), keys.shape[2])
            self.reuse.forget()
        else:  # projected as long as they are at hand
            self.importance.see(layer, keys, self.start)
            self.importance.complete(keys.shape[2], slice(layer - 1, layer))

    def look_ahead(self, layer, x, positions):
        if layer in self.weights:
            with torch.inference_mode():
                if layer == 0:
                    self.plan(x.shape[1], positions)
                queries = (self.arrays.predict(self.weights[layer], x) if self.arrays else
                           self.butler.predict(layer, x, positions))  # [R, B, G, T, E]
                self.predicted[layer] = queries
                if self.ahead:
                    self.choose_ahead(layer, queries[:, :, :, 0])
                elif self.reuse.drift:
                    self.sources[layer] = self.reuse.sources(layer, queries)

    def choose_ahead(self, producer: int, queries) -> None:
        """For all layers of the producer at this layer, by its queries [R, B, G, E]."""
        some, keys = slice(producer, producer + len(queries)), self.importance
        due = self.reuse.due(producer, torch.as_tensor(queries)) if self.reuse.drift else None
        if self.arrays:
            self.arrays.choose(some, queries, due)
        else:
            choose(queries, keys.numbers[some], keys.scales[some], self.here, self.wants,
                   self.chosen[some], due, self.longest, self.sinks, self.window)
        if self.read_ahead:
            self.read_ahead([n + 1 for n in range(some.start, some.stop)],
                            self.chosen[some].unsqueeze(3))

    def plan(self, T: int, positions) -> None:
        """What all producers of a step need to choose ahead."""
        self.longest, last = (self.bound or self.end) - 1, self.here
        self.here, self.ahead, self.arrays = positions[:, 0], None, None
        if not (self.bound or T == 1 and self.early(self.longest)):
            return
        least = self.sinks + self.window
        self.wants, most = self.wanted(self.here).clamp(min=0), max(self.wanted(self.longest), 0)
        self.choices = self.in_use(self.granted.shape[:2], most)
        self.choices[..., :least] = self.granted
        self.ahead, self.chosen = [None, *self.choices], self.choices[:, :, :, 0, least:]
        if self.bound or self.each_row_follows(last):
            self.importance.latest(positions, self.longest)
        else:
            self.importance.complete(self.longest)
        if all(self.weights.values()) and positions.is_cpu:
            self.arrays = loops.StepArrays(self)

    def each_row_follows(self, last) -> bool:
        """Are rows of different lengths all a token longer than at the last step?"""
        return (self.start < self.longest and min(self.importance.filled) >= self.start - 1
                and last is not None and torch.equal(last + 1, self.here))

    def in_use(self, rows, K: int):
        """`choices` with room for K tokens beside sinks and window, for `rows` [B, G]: a copy, as a
        caller may have kept the last step's; but while a graph is recorded the same memory."""
        if self.choices is None or self.choices.shape[1:3] != rows:
            shape = self.butler.config.layers - 1, *rows, 1, 0
            self.choices = self.granted.new_empty(shape, dtype=torch.int32)
        more = self.granted.shape[-1] + K - self.choices.shape[-1]
        return self.choices if self.bound and not more else F.pad(self.choices, (0, more), value=-1)

    def selected(self, layer, q, keys, positions):
        if self.ahead:
            return self.ahead[layer]
        index = super().selected(layer, q, keys, positions)
        return self.reused(layer, index) if self.reuse.drift else index

    @torch.inference_mode()
    def scores(self, layer, q, keys, positions):
        self.start = first_position(keys, positions)  # who compares scores calls this alone
        self.importance.see(layer, keys, self.start)
        self.importance.complete(keys.shape[2], slice(layer - 1, layer))
        importance_keys = self.importance.layer(layer).floats()[:, :, : keys.shape[2]]
        return in_order(self.butler.scores(self.queries[layer], importance_keys))

    @torch.inference_mode()
    def reused(self, layer: int, new):
        """Indices made for every token of a block [B, G, T, K] -> those that are used: sinks and
        window are a token's own, the choice is the one in use."""
        stride, least = self.butler.config.stride, self.sinks + self.window
        producer = (layer - 1) // stride * stride
        self.choices = self.in_use(new.shape[:2], new.shape[-1] - least)
        old = self.choices[layer - 1]
        chosen = torch.cat([old, new], dim=2)[..., least:]
        source = self.sources[producer][layer - 1 - producer][..., None]
        source = source.expand(*new.shape[:3], chosen.shape[-1])
        used = torch.cat([new[..., :least], chosen.gather(2, source)], dim=-1)
        old.copy_(used[:, :, -1:])
        return used


if __name__ == "__main__":
    from model import Llama, resolve

    llama = Llama.from_pretrained(resolve())
    butler = load_for(llama)
    share = sum(p.numel() for p in butler.parameters()) / sum(p.numel() for p in llama.parameters())
    print(butler.config, f"\nparameters: {share:.2%} of the base model's")
    select = butler.selector(budget=0.1)
    cache = llama.new_cache(batch=1, capacity=401)
    llama.prefill(torch.arange(400)[None], cache, select.watch)
    llama.decode(torch.tensor([[400]]), cache, select)
    print("layer 1: q_imp", list(select.queries[1].shape), "k_imp",
          list(select.importance.layer(1).numbers.shape))
    print("401 cached tokens, a tenth attended:", select.index[1][0, 0, 0].tolist())
    print(f"for which it caches {butler.config.size} numbers beside {2 * butler.config.head_dim} "
          "of key and value")
