"""model.py - a Llama from scratch: weights in, logits out, one explicit KV cache.

    tokens [B, T] -> embedding [B, T, C] -> L x (attention, MLP) -> norm -> logits [B, T, V]
                                                 |
                        k, v [B, G, T, D] -> Cache -> keys, values [B, G, S, D]
                                                 |
                        selector(layer, x, q, keys, positions) -> which tokens to attend to

One forward serves prompts, single tokens and whole texts: only T and the cache differ.

A *selector* is any callable with the arguments above:

    layer       the layer's number
    x           its input before the norm, [B, T, C]
    q           its rotated queries, [B, H, T, D]
    keys        its rotated keys of all tokens so far, the T new ones included, [B, G, S, D]
    positions   positions of the new tokens, [T]

It returns index [B, G, T, K], int32: the places in `keys` of the tokens that each query attends to,
-1 in an empty slot, or None if every query attends to all tokens before it. An index names no token
twice and none after the query's own; the model does not check that. The queries of a prompt may
share choices: an index with T' rows has one for each block of T / T' queries, and of the block's
own tokens each query attends to those up to itself. Selectors are in
selection.py and butler.py. The model knows none of them.

    out = softmax(q . keys[index] / sqrt(D)) . values[index]

Dimension key. Each letter means the same in every file:
    B batch            H query heads    V vocabulary    K tokens selected
    T new tokens       G KV heads       L layers        E size of importance queries and keys
    S tokens so far    D head size      C width         R layers per producer

    python model.py        prints a short trace of shapes
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import dequantize
from safetensors import SafetensorError, safe_open
from torch import nn

from cli import UserError, check_device, one_line
from kernel import sparse_attention
from tokenizer import ADVICE, advice_for, open_gguf, read_json, real_file, resolve


@dataclass(frozen=True)
class Config:
    """The shape of a Llama. rope_scaling: None, or a dict whose `type` is linear or llama3."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    context: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tied: bool = False  # the embedding matrix also gives the logits
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in (
            "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width",
            "context")}
        numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
        numbers |= {name: value for name, value in (self.rope_scaling or {}).items()
                    if name.endswith("factor") or name == "original_max_position_embeddings"}
        wrong = {name: size for name, size in sizes.items()
                 if type(size) is not int or not 0 < size <= 2**24}
        wrong |= {name: number for name, number in numbers.items()
                  if type(number) not in (int, float) or not 0 < number < 1e30}
        if wrong or self.layers > 1000:  # building a million layers would take hours
            raise UserError(f"sizes {wrong or {'layers': self.layers}} are not those of a Llama")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise UserError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads of "
                            f"size {self.head_dim}")


# ---------------------------------------------------------------------------- rotary embedding


def rope_frequencies(config: Config) -> torch.Tensor:
    """Radians per position of each pair of channels, [D/2] float32 (rotary position embedding,
    arXiv 2104.09864; rope_scaling extends the context)."""
    channels = torch.arange(0, config.head_dim, 2, device="cpu").float()
    frequencies = config.rope_theta ** -(channels / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["type"] == "linear":
        return frequencies / scaling["factor"]
    # llama3: stretch long wavelengths by `factor`, keep short ones, and ramp between the two
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rope_cos_sin(positions, frequencies):
    """positions [T], frequencies [..., D/2] -> two factors [..., T, D] for apply_rope: the cosines
    twice, and the sines twice, the first time negative."""
    angles = positions[:, None] * frequencies[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotates x [..., T, D] -> float32. Channels i and i + D/2 are a pair (a, b), as in Hugging
    Face's files, which becomes (a cos - b sin, b cos + a sin). To rotate back, pass -sin."""
    x = x.float()
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ---------------------------------------------------------------------------- KV cache


class Cache:
    """Keys (already rotated) and values of every layer: k[layer], v[layer] [B, G, capacity, D].

    size       number of cached tokens, the same for every text of the batch
    capacity   the largest number that fits
    """

    def __init__(self, config: Config, batch: int, capacity: int, dtype=torch.float32,
                 device="cpu"):
        if capacity > config.context:
            raise UserError(f"{capacity} tokens exceed the model's context of {config.context}")
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.size = 0
        self.capacity = capacity
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]

    def append(self, layer: int, k, v):
        """Writes k, v [B, G, T, D] of one layer after the cached tokens -> keys and values of all
        tokens so far, [B, G, S, D]. When all layers have done so, the model calls `advance`. Raises
        UserError if the tokens do not fit."""
        end = self.size + k.shape[2]
        if end > self.capacity:
            raise UserError(f"{end} tokens do not fit into a cache of {self.capacity}")
        self.k[layer][:, :, self.size : end] = k
        self.v[layer][:, :, self.size : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def advance(self, T: int) -> None:
        """Counts T new tokens, after all layers have appended them."""
        self.size += T

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        self.size = min(self.size, length)


# ---------------------------------------------------------------------------- the network


def attention(q, k, v, index):
    """q [B, H, T, D] of the last T of S tokens, k, v [B, G, S, D] -> [B, H, T, D]. With an index
    [B, G, T, K], attention to the tokens that it names; without one, causal attention to all."""
    T, S = q.shape[2], k.shape[2]
    if index is not None:
        return sparse_attention(q, k, v, index)
    if T == 1:  # the query heads of a group become queries of their KV head, which is read once
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, G, H/G, D]
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
    # PyTorch's is_causal is right only for a text without cached tokens, T = S.
    causal = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal, is_causal=T == S,
                                          enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.attention_bias)

    def forward(self, normed, x, rope, positions, cache, selector):
        """The layer's input after and before its norm, both [B, T, C] -> [B, T, C]"""
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_proj(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, G, T, D]
        v = self.v_proj(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = apply_rope(q, *rope)
        k = apply_rope(k, *rope)
        keys, values = cache.append(self.layer, k, v)  # [B, G, S, D]
        # The selector names the tokens to attend to.
        index = selector(self.layer, x, q, keys, positions)
        out = attention(q.to(keys.dtype), keys, values, index)
        return self.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, positions, cache, selector):
        x = x + self.self_attn(self.input_layernorm(x), x, rope, positions, cache, selector)
        return x + self.mlp(self.post_attention_layernorm(x))


def dense(layer, x, q, keys, positions):
    """The selector of dense attention: every query attends to all tokens before it."""
    return None


class Llama(nn.Module):
    """The whole model. Parameters are named as in Hugging Face's files, without `model.`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.tie()
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def tie(self) -> None:
        """One matrix for the embedding and the logits, if the model has only one."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads (for bench.py)."""
        embedding = 0 if self.config.tied else self.embed_tokens.weight.nbytes
        return sum(p.nbytes for p in self.parameters()) - embedding

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` texts of up to `capacity` tokens each. Raises UserError if
        that exceeds the model's context."""
        return Cache(self.config, batch, capacity, self.embed_tokens.weight.dtype, self.device)

    def forward(self, tokens, cache=None, selector=None, positions=None, last=0):
        """tokens [B, T] -> logits [B, T, V]; with last=1 only those of the last token, [B, 1, V].

        cache: the text so far, which the tokens continue; None starts a new text.
        selector: see the top of this file; None attends to all tokens.
        positions: [T], rising, for training texts whose positions have gaps; by default positions
        count on from the cache. Selectors other than the trainer's Recorder expect the default.
        Raises UserError if the tokens do not fit into the cache.
        """
        B, T = tokens.shape
        cache = cache or self.new_cache(B, T)
        selector = selector or dense
        if positions is None:
            positions = torch.arange(cache.size, cache.size + T, device=tokens.device)
        rope = rope_cos_sin(positions, self.frequencies)  # [T, D] each
        x = self.embed_tokens(tokens)  # [B, T, C]
        for block in self.layers:
            x = block(x, rope, positions, cache, selector)
        cache.advance(T)
        return self.lm_head(self.norm(x[:, -last:]))  # last=0: x[:, 0:] is all of them

    @torch.inference_mode()
    def prefill(self, tokens, cache, selector=None):
        """Reads a prompt [B, T] -> logits [B, 1, V] of its last token. Pass `selector.watch` to
        read densely while the selector sees the keys."""
        return self(tokens, cache, selector, last=1)

    @torch.inference_mode()
    def decode(self, token, cache, selector=None):
        """One decode step: token [B, 1] -> logits [B, 1, V]."""
        return self(token, cache, selector)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Llama":
        """A Hugging Face folder or a GGUF file -> a frozen Llama. Raises UserError, one line that
        names the path, for a damaged file or another kind of model."""
        check_device(device)
        with one_line(f"{path}: unusable model", SafetensorError):
            read = read_gguf if Path(path).is_file() else read_folder
            config, weights, divisors = read(Path(path))
            with torch.device("meta"):  # shapes only, no memory: the file's tensors replace them
                model = cls(config)
            state = {name: w.to(device, dtype) for name, w in weights}
            if config.tied:
                state["lm_head.weight"] = state["embed_tokens.weight"]
            model.load_state_dict(state, assign=True)
            model.tie()
            model.frequencies = (rope_frequencies(config) / divisors).to(device)
            check_weights([*state.items(), ("rotary frequencies", model.frequencies)])
        return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- files

# Both readers return a Config, an iterator of (name, tensor), and divisors of the rotary
# frequencies, [D/2] or [1].


def refuse_if(condition, what: str) -> None:
    if condition:
        raise UserError(f"not a Llama that this project reads: {what} (other families: --engine "
                        "transformers)")


def even_share(width, heads) -> int:
    """The size of a head where the file names none. 1 if these are not integers; Config
    then refuses them."""
    return width // heads if type(width) is type(heads) is int and heads else 1


def check_weights(named) -> None:
    """named: pairs (name, tensor). Raises UserError that names the first tensor with a NaN or a
    value outside float16's range: results would be NaN. One pass over memory, without a copy."""
    for name, tensor in named:
        if tensor.numel() == 0:
            continue
        low, high = (float(end) for end in tensor.detach().aminmax())  # a NaN makes both NaN
        if not -65504 <= low <= high <= 65504:
            raise UserError(f"{name} has NaN, infinite or huge numbers ({low:g} to {high:g}): the "
                            "file is damaged")


def weight_files(folder: Path) -> list[Path]:
    """The *.safetensors of a folder: one file, or all its shards. Raises UserError, which says what
    to do, where they are incomplete."""
    found = {file.name for file in folder.glob("*.safetensors")
             if not file.name.startswith("consolidated")}  # Meta's own format, beside the shards
    problem = advice_for(folder, ["adapter_*"] if found else ADVICE)
    if problem or not found:
        raise UserError(problem or "there are no *.safetensors")
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in found:
        needed = {"model.safetensors"}
    elif index.exists():
        entries = read_json(index)
        with one_line(index.name):
            needed = set(entries["weight_map"].values())
    else:
        parts = filter(None, (re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\.safetensors)", name)
                              for name in found))
        needed = found.union(*([f"{part[1]}{i:05}{part[2]}" for i in range(1, int(part[3]) + 1)]
                               for part in parts))
    for file in folder.iterdir():
        if file.stem in needed and f"*{file.suffix}" in ADVICE:
            raise UserError(f"{file.name} {ADVICE[f'*{file.suffix}']}")
    if missing := sorted(needed - found):
        raise UserError(f"{len(missing)} of {len(needed)} weight files are missing: fetch "
                        f"{missing[0]}{' and others' * (len(missing) > 1)}")
    return [folder / name for name in sorted(needed)]


@contextmanager
def open_weights(file: Path):
    """safetensors' reader of one file. Raises UserError that names the file."""
    with (one_line(file.name, SafetensorError),
          safe_open(real_file(file), framework="pt") as weights):
        yield weights


def read_rope_scaling(rope: dict, context: int) -> dict | None:
    """config.json's `rope_scaling` or `rope_parameters` -> Config.rope_scaling"""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    refuse_if(kind not in ("default", "none", "linear", "llama3"), f"rope scaling {kind!r}")
    if kind in ("default", "none"):
        return None
    return {"original_max_position_embeddings": context} | rope | {"type": kind}


def read_folder(folder: Path):
    """config.json and *.safetensors"""
    entries = read_json(folder / "config.json")
    c = {key: value for key, value in entries.items() if value is not None}
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    refuse_if(not isinstance(rope, dict), f"rope_parameters {rope!r}")
    refuse_if(c.get("model_type") != "llama", f"model_type {c.get('model_type')!r}")
    refuse_if(c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}")
    refuse_if(c.get("sliding_window") and c.get("use_sliding_window", True), "sliding window")
    refuse_if((rope | c).get("partial_rotary_factor", 1) != 1, "partial_rotary_factor")
    refuse_if(c.get("quantization_config"), "quantization_config")
    shards = weight_files(folder)
    names = set()
    for shard in shards:
        with open_weights(shard) as f:
            names |= {name.removeprefix("model.") for name in f.keys()}
    heads, width = c["num_attention_heads"], c["hidden_size"]
    context = c.get("max_position_embeddings", 2048)
    config = Config(
        vocab_size=c["vocab_size"], width=width, layers=c["num_hidden_layers"], heads=heads,
        kv_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim", even_share(width, heads)),
        mlp_width=c["intermediate_size"], context=context,
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        rope_scaling=read_rope_scaling(rope, context),
        tied=c.get("tie_word_embeddings", False) and "lm_head.weight" not in names,
        attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False))

    def weights():
        for shard in shards:
            with open_weights(shard) as f:
                for name in f.keys():
                    if "rotary_emb" not in name:  # old files carry the frequencies too
                        yield name.removeprefix("model."), f.get_tensor(name)

    return config, weights(), torch.ones(1)


GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path):
    """A GGUF file, of every tensor type that the package `gguf` can dequantise, as float32.

    llama.cpp's rotary embedding pairs channels 2i and 2i + 1, so it stores the rows of q and k in
    that order. Here they return to the order in which i and i + D/2 are a pair.
    """
    file = open_gguf(path)
    get = file.value
    tensors = {t.name: t for t in file.tensors}
    refuse_if(get("general.architecture") != "llama",
              f"architecture {get('general.architecture')!r}")
    refuse_if(get("llama.expert_count"), "mixture of experts")
    refuse_if(get("llama.attention.sliding_window"), "sliding window")
    heads, width = get("llama.attention.head_count"), get("llama.embedding_length")
    head_dim = get("llama.attention.key_length", even_share(width, heads))
    factor = get("llama.rope.scaling.factor")
    kind = get("llama.rope.scaling.type", "linear" if factor else "none")  # as llama.cpp does
    config = Config(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]), width=width,
        layers=get("llama.block_count"), heads=heads,
        kv_heads=get("llama.attention.head_count_kv", heads), head_dim=head_dim,
        mlp_width=get("llama.feed_forward_length"), context=get("llama.context_length", 2048),
        norm_eps=float(get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        rope_theta=get("llama.rope.freq_base", 10000.0),
        rope_scaling=read_rope_scaling({"type": kind, "factor": factor}, 2048),
        tied="output.weight" not in tensors, attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors)
    refuse_if(get("llama.rope.dimension_count", head_dim) != head_dim, "partial rotary embedding")
    factors = tensors.pop("rope_freqs.weight", None)  # llama3's scaling, as divisors

    def read(t):
        with np.errstate(all="ignore"):  # damaged scales
            return torch.tensor(dequantize(t.data, t.tensor_type))

    def weights():
        for name, t in tensors.items():
            *block, stem, end = name.split(".")  # blk.3.attn_q.weight, token_embd.weight
            w = read(t)
            if stem in ("attn_q", "attn_k"):
                w = w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            name = f"{GGUF_NAMES.get(stem, stem)}.{end}"
            yield (f"layers.{block[1]}.{name}" if block else name), w

    return config, weights(), torch.ones(1) if factors is None else read(factors)


if __name__ == "__main__":
    llama = Llama.from_pretrained(resolve())
    print(llama.config)
    cache = llama.new_cache(batch=1, capacity=8)
    print("prefill [1, 7] ->", list(llama.prefill(torch.arange(7)[None], cache).shape))
    print("decode  [1, 1] ->", list(llama.decode(torch.tensor([[7]]), cache).shape))
    numbers = sum(k.numel() + v.numel() for k, v in zip(cache.k, cache.v, strict=True))
    print(f"keys and values of one token: {numbers // cache.capacity:,} numbers; the model: "
          f"{sum(p.numel() for p in llama.parameters()):,}")
