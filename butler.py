"""butler.py - the predictor, and the selector that uses it.

TokenButler (arXiv 2503.07518) keeps the whole KV cache and predicts, for every new token, which few
tokens each layer needs to attend to. Two small learned maps do that:

    layer input x [B, T, C]  --Producer-->  importance queries of the next R layers [B, G, T, E]
    cached keys [B, G, S, D]  --W_K-->  importance keys [B, G, S, E], stored beside K and V

    score(t, s) = importance query t . importance key s / sqrt(E)
    selection   = sinks + recent window + the tokens with the highest scores

Glossary. The last column names the idea of the paper that the symbol belongs to:
    paper    in this file           shape           idea
    q_imp    importance_queries     [B, G, T, E]    queries predicted ahead of their layer
    k_imp    importance_keys        [B, G, S, E]    keys projected from the model's own keys
    W_K      key_projection         [L-1, G, D, E]  keys projected from the model's own keys
    d'       size, E                32              both
    R        layers_per_producer    5               depth stride
    I        interval               1               prediction interval
    N        neighbours             0               neighbour fetch

There is a producer at layers 0, R, 2R ... Each reads the input of its own layer p, predicts for the
layers p+1 ... p+R, and has its own weights. So nothing is predicted for layer 0, which stays dense,
and the importance queries of every other layer are known before that layer is reached. Models with
sliding windows (--engine transformers) are selected for in few layers; see ButlerConfig.served.

Two things differ from the paper. First, there is one importance query per KV head; the paper has
one per query head. Second, what a token is and where it stands are kept apart. The keys in a cache
are rotated by their positions. The paper projects these rotated keys (here: --rotated-keys). Its
projection fits the rotations of the training texts, and the selection becomes bad in longer texts.
Here each key is first rotated back, which is exact. The projected keys and the importance queries
then get a rotary embedding of their own, in half of their channels. Its slowest pair of channels
makes half a turn over the model's whole context, so it can tell distances of thousands of tokens
apart. The other half of the channels is not rotated and compares contents alone.

    python butler.py        prints a short trace of shapes
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import tokenizer
from cli import UserError, one_line, replacing
from model import Llama, apply_rope, check_weights, rope_cos_sin
from selection import QUERY_BLOCK, Selector
from tokenizer import real_file, resolve

SHIPPED = Path(__file__).parent / "checkpoints" / "smollm2-135m-instruct.safetensors"
POOL = 16  # queries of a prompt that are averaged before they are scored
FASTEST = 0.5  # radians per token of the fastest pair of importance channels


@dataclass(frozen=True)
class ButlerConfig:
    """The base model's shape, rotary frequencies and fingerprint, and the predictor's own sizes."""

    layers: int
    width: int
    kv_heads: int
    head_dim: int
    rope: tuple  # the base model's radians per token: D/2, or (L-1) * D/2 where layers differ
    layers_per_producer: int = 5  # R
    size: int = 32  # E
    slowest: float = 4e-4  # radians per token of the slowest pair; see for_model
    hidden: int = 176  # width of a producer's hidden layer
    rotated_keys: bool = False  # as in the paper: project keys as cached, rotate nothing
    fingerprint: str = ""
    selected_layers: tuple = ()  # of the base model, layer 0 first; (): all of its layers

    def __post_init__(self):
        sizes = (self.layers, self.width, self.kv_heads, self.head_dim, self.layers_per_producer,
                 self.size, self.hidden)
        possible = all(type(size) is int and 0 < size <= 2**24 for size in sizes)
        if not possible or self.layers > 1000:  # building a million producers would take hours
            raise UserError(f"sizes {sizes} are not those of a butler")
        if self.selected_layers and (len(set(self.selected_layers)) != self.layers
                                     or sorted(self.selected_layers) != [*self.selected_layers]):
            raise UserError(f"its {self.layers} layers are {self.selected_layers}")

    @classmethod
    def for_model(cls, model, **sizes) -> "ButlerConfig":
        c = model.config
        return cls(c.layers, c.width, c.kv_heads, c.head_dim,
                   tuple(model.frequencies.flatten().tolist()), slowest=math.pi / c.context,
                   fingerprint=fingerprint(model),
                   selected_layers=getattr(model, "selected_layers", ()), **sizes)

    def served(self) -> dict:
        """{layer of a producer: the layers that it serves}. A producer is at most R layers below
        these, as far as that allows, but not below a layer that another producer serves."""
        served = {}
        producer = None
        for before, layer in pairwise(self.selected_layers or range(self.layers)):
            if producer is None or layer > producer + self.layers_per_producer:
                producer = max(before, layer - self.layers_per_producer)
                served[producer] = []
            served[producer].append(layer)
        return served

    def base_frequencies(self):
        """Radians per token by which cached keys are rotated back, [L-1, D/2]."""
        rope = torch.tensor(self.rope, device="cpu").view(-1, self.head_dim // 2)
        if self.rotated_keys:
            rope = torch.zeros_like(rope)
        return rope.expand(self.layers - 1, -1)

    def importance_frequencies(self):
        """Radians per token of each pair of importance channels, [E/2]: one half from FASTEST to
        slowest, the other half 0."""
        frequencies = torch.zeros(self.size // 2, device="cpu")
        rotated = self.size // 4
        if not self.rotated_keys:
            frequencies[:rotated] = torch.logspace(math.log10(FASTEST), math.log10(self.slowest),
                                                   rotated, device="cpu")
        return frequencies


def fingerprint(model) -> str:
    """Which base model is this? A hash of its shape and of all norm weights in bfloat16.

    Quantised files keep norms exactly, so a model's GGUF file and its original have the same
    fingerprint. Training changes norms, so another model has another one. What it cannot see is a
    change of other weights alone, as merging a LoRA adapter makes. The butler is accepted then; it
    predicts the attention of the model before the change, so measure it (synth_task.py) or train
    another one. A comparison of the weights within a tolerance would not help: rounding to 4 bits,
    which must be accepted, may change them more than an adapter does.
    """
    c = model.config
    # Some families of transformers have no input_layernorm.
    norms = [getattr(block, "input_layernorm", block.post_attention_layernorm).weight
             for block in model.layers]
    if all((norm == norms[0][0]).all() for norm in norms):  # an untrained model: all are 1
        norms = [model.layers[0].self_attn.k_proj.weight]
    weights = torch.cat([w.detach().to("cpu", torch.bfloat16).flatten() for w in norms])
    shape = f"{c.layers} {c.width} {c.heads} {c.kv_heads} {c.head_dim}".encode()
    return hashlib.sha256(shape + weights.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------- the predictor


class Producer(nn.Module):
    """Reads one layer's input and predicts importance queries for the next `num_layers` layers."""

    def __init__(self, c: ButlerConfig, num_layers: int):
        super().__init__()
        self.shape = (num_layers, c.kv_heads, c.size)
        self.norm = nn.LayerNorm(c.width)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.out = nn.Linear(c.hidden, num_layers * c.kv_heads * c.size, bias=False)

    def forward(self, x):
        """x [B, T, C] -> [R, B, G, T, E]"""
        queries = self.out(F.silu(self.up(self.norm(x))))
        return queries.unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)


class Butler(nn.Module):
    """All producers and key projections for one base model, in float32."""

    rules = ("interval", "neighbours")  # flags that its selector has; other engines have others

    def __init__(self, config: ButlerConfig):
        super().__init__()
        self.config = config
        c = config
        self.served = c.served()
        self.producers = nn.ModuleDict({str(p): Producer(c, len(layers))
                                        for p, layers in self.served.items()})
        # {layer: its row in the tables of all served layers}
        self.rows = {layer: row for row, layer in enumerate(sum(self.served.values(), []))}
        # One projection per layer and KV head. Layer 0 is never predicted.
        self.key_projection = nn.Parameter(
            torch.randn(c.layers - 1, c.kv_heads, c.head_dim, c.size) * c.head_dim**-0.5)
        self.register_buffer("rope", c.base_frequencies(), persistent=False)
        self.register_buffer("importance_rope", c.importance_frequencies(), persistent=False)

    def importance_queries(self, layer: int, x, positions) -> dict:
        """x [B, T, C], the input of a layer, at positions [T] -> {later layer: [B, G, T, E]}, empty
        if there is no producer at this layer."""
        if layer not in self.served:
            return {}
        x = x.to(self.key_projection)  # the butler's dtype and device
        queries = self.producers[str(layer)](x)  # [R, B, G, T, E]
        queries = apply_rope(queries, *rope_cos_sin(positions, self.importance_rope))
        return dict(zip(self.served[layer], queries, strict=True))

    def importance_keys(self, layer: int, keys, positions):
        """Cached keys [B, G, S, D] of a layer above 0, at positions [S] -> [B, G, S, E]"""
        row = self.rows[layer]
        cos, sin = rope_cos_sin(positions, self.rope[row])
        keys = apply_rope(keys, cos, -sin)  # rotated back
        projected = keys @ self.key_projection[row]  # [G, D, E]: each KV head has its own
        return apply_rope(projected, *rope_cos_sin(positions, self.importance_rope))

    def scores(self, importance_queries, importance_keys):
        """Queries [B, G, T, E] and keys [B, G, S, E] -> scores [B, G, T, S]"""
        return (importance_queries * self.config.size**-0.5) @ importance_keys.mT

    def block_scores(self, importance_queries, importance_keys, positions):
        """How important is each token for each block of queries of a prompt? Queries [B, G, T, E]
        at positions [T], keys [B, G, S, E] -> [B, G, T/64, S].

        Groups of 16 queries are averaged into one, which saves most of the work. The softmax of its
        scores is then averaged over the block's four groups.
        """
        queries = importance_queries.unflatten(2, (-1, POOL)).mean(3)  # [B, G, T/POOL, E]
        last = positions[POOL - 1 :: POOL]
        token = torch.arange(importance_keys.shape[2], device=positions.device)
        scores = self.scores(queries, importance_keys)
        shares = scores.masked_fill_(token > last[:, None], -torch.inf).softmax(-1)
        return shares.unflatten(2, (-1, QUERY_BLOCK // POOL)).mean(3)

    def selector(self, budget: float, **rules) -> "ButlerSelector":
        """A fresh selector for one text; see ButlerSelector."""
        return ButlerSelector(self, budget, **rules)

    def check(self, model) -> None:
        """Raises UserError unless the butler was trained for this base model."""
        actual = fingerprint(model)
        if actual != self.config.fingerprint:
            raise UserError(f"this butler was trained for another base model: its fingerprint is "
                            f"{self.config.fingerprint}, and this model has {actual}")
        trained = torch.tensor(self.config.rope)
        rope = model.frequencies.flatten().cpu()
        if rope.shape != trained.shape or not rope.allclose(trained, rtol=1e-5, atol=0):
            raise UserError("this butler was trained for this model at other rotary frequencies")
        if getattr(model, "selected_layers", ()) != self.config.selected_layers:
            raise UserError("this butler was trained by an earlier version: train it anew")

    def save(self, path, extra: dict | None = None) -> None:
        """Writes one safetensors file: the weights and, in its metadata, the configuration and
        `extra`, for example how it was trained. Raises UserError."""
        weights = {name: w.contiguous() for name, w in self.state_dict().items()}
        # Without selected_layers, where that is empty, as in files of earlier versions.
        entries = {name: value for name, value in asdict(self.config).items() if value != ()}
        metadata = {"butler": json.dumps(entries), "extra": json.dumps(extra or {})}
        with replacing(path) as part:
            save_file(weights, part, metadata)

    @classmethod
    def load(cls, path) -> "Butler":
        """Reads what `save` wrote. Raises UserError, one line that names the file."""
        with one_line(f"no butler at {path}"):
            path = Path(path).expanduser()
            if not path.exists():
                raise UserError("train one with python train.py")
        with (one_line(f"{path}: unreadable butler", SafetensorError),
              safe_open(real_file(path), framework="pt") as f):
            entries = json.loads((f.metadata() or {})["butler"])
            if "stride" in entries:  # the name in files of earlier versions
                entries["layers_per_producer"] = entries.pop("stride")
            entries["rope"] = tuple(entries["rope"])
            entries["selected_layers"] = tuple(entries.get("selected_layers", ()))
            config = ButlerConfig(**entries)
            with torch.device("meta"):  # no memory yet: the header may claim any size
                butler = cls(config)
            weights = {name: f.get_tensor(name).float() for name in f.keys()}
            butler.load_state_dict(weights, assign=True)
            check_weights([*butler.named_parameters(), *butler.named_buffers()])
        return butler.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- the selector


class ButlerSelector(Selector):
    """Selects by the butler's scores.

    interval     choose new tokens at every I-th position only, and use that choice again in
                 between, when only the recent window changes (the paper's prediction interval);
                 applies to calls with one token
    neighbours   with a chosen token choose also the N tokens on either side, within the same budget
                 (in the paper these come on top of the budget). N is smaller than the window, so
                 that a query never uses the score of a later token.

    queries      {layer: importance queries of the latest tokens, [B, G, T, E]}
    keys         {layer: importance keys of all tokens so far, [B, G, S, E]}
    """

    def __init__(self, butler: Butler, budget: float, interval=1, neighbours=0, **sizes):
        super().__init__(budget, **sizes)
        if interval < 1 or not 0 <= neighbours < self.budget.window:
            raise UserError("an interval is at least 1, and neighbours are fewer than the window's "
                            f"{self.budget.window} tokens")
        self.butler = butler
        self.interval = interval
        self.neighbours = neighbours
        self.queries = {}
        self.keys = {}

    def bytes_per_token(self, head_dim):
        """As in the fast engine: 8 bits a number, and a scale."""
        return self.butler.config.size + 4

    def watch(self, layer, x, q, keys, positions):
        """Prefill: project the keys of the prompt while it is read."""
        if layer > 0:
            self.all_importance_keys(layer, keys, len(positions))

    def look_ahead(self, layer, x, positions):
        """Predicts for the next layers, if there is a producer at this one."""
        self.queries |= self.butler.importance_queries(layer, x, positions)

    def choose(self, layer, q, keys, positions):
        """A new choice, or within an interval the latest one again."""
        position = int(positions[0])
        if len(positions) == 1 and position % self.interval > 0 and layer in self.index:
            latest = self.index[layer][:, :, -1:]  # sinks, window, chosen tokens
            if latest.max() < position:  # the cache was not truncated meanwhile
                return latest[..., self.budget.sinks + self.budget.window :]
        return self.budget.topk(self.scores(layer, q, keys, positions), positions)

    def scores(self, layer, q, keys, positions):
        """Uses the importance queries predicted below; the layer's own queries q are not needed."""
        importance_keys = self.all_importance_keys(layer, keys, len(positions))
        scores = self.butler.scores(self.queries[layer], importance_keys)
        if self.neighbours:
            # Each token gets the highest score within N tokens, plus a little of its own, so that
            # the neighbours of one token do not tie.
            N = self.neighbours
            rows = scores.flatten(0, 2)
            highest = F.max_pool1d(rows, kernel_size=2 * N + 1, stride=1, padding=N)
            scores = 0.999 * highest.view_as(scores) + 0.001 * scores
        return scores

    def block_scores(self, layer, q, keys, positions):
        """Without neighbours: `watch` has projected the keys already."""
        return self.butler.block_scores(self.queries[layer], self.keys[layer], positions)

    def all_importance_keys(self, layer: int, keys, T: int):
        """Keys of all tokens so far [B, G, S, D] -> importance keys [B, G, S, E]. Each key is
        projected once and then stored. The last T keys are always projected: after a truncation of
        the cache the stored ones belong to other tokens."""
        S = keys.shape[2]
        known = self.keys.get(layer, keys.new_empty(*keys.shape[:2], 0, self.butler.config.size))
        known = known[:, :, : S - T]
        new = keys[:, :, known.shape[2] :]
        positions = torch.arange(known.shape[2], S, device=keys.device)
        projected = self.butler.importance_keys(layer, new, positions)
        self.keys[layer] = torch.cat([known, projected], dim=2)
        return self.keys[layer]


# ---------------------------------------------------------------------------- loading


def load_for(model, path=None, cls=Butler) -> Butler:
    """The butler at `path` (None: the shipped one) for this base model, on its device. Raises
    UserError if it was trained for another one. cls: the class to load, a subclass of Butler in
    engines that have their own selector."""
    butler = cls.load(path or SHIPPED)
    butler.check(model)
    return butler.to(model.device)


def find_butler(model, path=None, cls=Butler) -> Butler | None:
    """As load_for, but without a path it returns None if the shipped butler belongs to another
    model."""
    if path is None and fingerprint(model) != Butler.load(SHIPPED).config.fingerprint:
        return None
    return load_for(model, path, cls)


def load(model=None, butler=None, device="cpu"):
    """The plain engine. model: folder, GGUF file, Hub id or None for the default model; butler: a
    file or None for the shipped one -> model, tokenizer, butler (None if there is none for this
    model). Every engine has this function; see cli.ENGINES. Raises UserError."""
    path = resolve(model)
    if butler is not None:
        Butler.load(butler)  # finds a damaged file before the model is read, which takes longer
    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    llama = Llama.from_pretrained(path, dtype, device)
    tok = tokenizer.load(path, llama.config.vocab_size)
    return llama, tok, find_butler(llama, butler)


if __name__ == "__main__":
    llama, tok, butler = load()
    share = sum(p.numel() for p in butler.parameters()) / sum(p.numel() for p in llama.parameters())
    print(f"size of the butler: {share:.2%} of the base model's parameters")
    selector = butler.selector(budget=0.1)
    cache = llama.new_cache(batch=1, capacity=401)
    llama.prefill(torch.arange(400)[None], cache, selector.watch)
    llama.decode(torch.tensor([[400]]), cache, selector)
    print("layer 1: importance queries", list(selector.queries[1].shape))
    print("layer 1: importance keys   ", list(selector.keys[1].shape))
    print("401 cached tokens, a tenth selected:", selector.index[1][0, 0, 0].tolist())
