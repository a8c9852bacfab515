"""loading/weights.py - where a Llama's numbers come from: files in, configuration, tensors out.

    folder or GGUF file (fetch.py) --read()--> Config, (name, tensor) ...

Two formats: a Hugging Face folder (config.json, one or several *.safetensors) and a GGUF file
(every tensor type that the `gguf` package can dequantise). Nothing is ever unpickled, sizes are
checked before anything is allocated, and whatever `model.py` does not implement is refused by name
before weights are read. Tensors carry Hugging Face's names, less the leading `model.`.

    python -m loading.weights        what the default model's file holds
"""

import json
import os
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open

from common.errors import ModelError, in_one_line

# ---------------------------------------------------------------------------- configuration


LIMITS = {  # least and largest: models in use stay far inside, and what is beyond is damaged
    "vocab_size": (1, 2**21), "width": (1, 2**17), "layers": (1, 1024), "heads": (1, 4096),
    "kv_heads": (1, 4096), "head_dim": (2, 4096), "mlp_width": (1, 2**20), "context": (1, 2**24),
    "norm_eps": (1e-12, 0.1), "rope_theta": (1.0, 1e12), "factor": (0.01, 1e4),
    "low_freq_factor": (0.01, 1e4), "high_freq_factor": (0.01, 1e4),
    "original_max_position_embeddings": (1.0, 2.0**24), "tied": (False, True),
    "attention_bias": (False, True), "mlp_bias": (False, True),
}


@dataclass(frozen=True)
class Config:
    """The shape of a Llama. `rope_scaling` is None or a dict with `type` linear or llama3."""

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
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        entries = {f.name: getattr(self, f.name) for f in fields(self)} | (self.rope_scaling or {})
        for name, (low, high) in LIMITS.items():  # files are not trusted: before any allocation
            value, kind = entries.get(name, low), type(low)
            kinds = (float, int) if kind is float else (kind,)
            if type(value) not in kinds or not low <= value <= high:
                raise ModelError(f"config: {name} is {value!r}, expected {kind.__name__} "
                                 f"from {low} to {high}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ModelError(f"config: {self.heads} query heads over {self.kv_heads} KV heads of "
                             f"size {self.head_dim} are not a Llama")
        if not entries.get("low_freq_factor", 0) < entries.get("high_freq_factor", 1):
            raise ModelError("config: low_freq_factor is not below high_freq_factor")

    @classmethod
    def from_hugging_face(cls, c: dict) -> "Config":
        """From config.json. Whatever this file does not implement is refused by name."""
        c = {k: v for k, v in c.items() if v is not None}  # null means absent
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        refuse(c.get("model_type") != "llama", f"model_type {c.get('model_type')!r}")
        refuse(c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}")
        refuse(c.get("sliding_window") and c.get("use_sliding_window", True), "sliding window")
        refuse((rope | c).get("partial_rotary_factor", 1) != 1, "partial_rotary_factor")
        refuse(c.get("quantization_config"), "quantization_config")
        heads, width = c["num_attention_heads"], c["hidden_size"]
        context = c.get("max_position_embeddings", 2048)
        return cls(
            vocab_size=c["vocab_size"], width=width, layers=c["num_hidden_layers"], heads=heads,
            kv_heads=c.get("num_key_value_heads", heads),
            head_dim=c.get("head_dim", width // heads), mlp_width=c["intermediate_size"],
            context=context, rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
            rope_scaling=rope_scaling(rope, context), norm_eps=c.get("rms_norm_eps", 1e-6),
            tied=c.get("tie_word_embeddings", False),
            attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False))

    @classmethod
    def from_gguf(cls, get, tensors: dict) -> "Config":
        """From a GGUF's header (get: `Reader.value`) and its tensors by name."""
        arch = get("general.architecture")
        refuse(arch != "llama", f"architecture {arch!r}")
        refuse(get("llama.expert_count"), "mixture of experts")
        refuse(get("llama.attention.sliding_window"), "sliding window")
        factor = get("llama.rope.scaling.factor")  # llama.cpp: without a type it is linear
        kind = get("llama.rope.scaling.type", "linear" if factor else "none")
        heads, width = get("llama.attention.head_count"), get("llama.embedding_length")
        head_dim = get("llama.attention.key_length", width // heads)
        partial = get("llama.rope.dimension_count", head_dim) != head_dim
        refuse(partial, "partial rotary embedding")
        return cls(
            vocab_size=int(tensors["token_embd.weight"].shape[-1]), width=width, heads=heads,
            layers=get("llama.block_count"), kv_heads=get("llama.attention.head_count_kv", heads),
            head_dim=head_dim, mlp_width=get("llama.feed_forward_length"),
            context=get("llama.context_length", 2048),
            norm_eps=get("llama.attention.layer_norm_rms_epsilon", 1e-5),
            rope_theta=get("llama.rope.freq_base", 10000.0),
            rope_scaling=rope_scaling({"type": kind, "factor": factor}, 2048),
            tied="output.weight" not in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors)


def refuse(condition, what: str) -> None:
    if condition:
        raise ModelError(f"not a Llama that this project implements: {what} (other families: "
                         "--engine transformers)")


def rope_scaling(rope: dict, context: int) -> dict | None:
    """Both spellings of the configuration (`type`, `rope_type`) -> None, linear or llama3."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    refuse(kind not in ("default", "none", "linear", "llama3"), f"rope scaling {kind!r}")
    if kind in ("default", "none"):
        return None
    rope = {"original_max_position_embeddings": context} | rope
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"type": kind} | {key: rope[key] for key in (keys if kind == "llama3" else keys[:1])}


# ---------------------------------------------------------------------------- reading weights


def read(path):
    """Folder or GGUF file -> (Config, iterator of (name, tensor), rope factors [D/2] or [1])."""
    path = Path(path)
    return read_gguf(path) if path.is_file() else read_folder(path)


def read_folder(folder: Path):
    """See `read`; config.json, and one *.safetensors or an index of several."""
    with in_one_line(ModelError, folder, "unusable config.json or index"):
        config = Config.from_hugging_face(json.loads((folder / "config.json").read_text()))
        index = folder / "model.safetensors.index.json"
        shards = (sorted(set(json.loads(index.read_text())["weight_map"].values()))
                  if index.exists() else ["model.safetensors"])
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickled and not any((folder / shard).exists() for shard in shards):
            raise ModelError(f"{pickled[0]} is a pickle, which can run anything when it is read: "
                             "save the model as safetensors, or take a copy that has them")
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ModelError(f"{shard!r} is missing, or not a file name")

    def tensors():
        for shard in shards:
            with (in_one_line(ModelError, folder / shard, "unreadable weights"),
                  safe_open(folder / shard, framework="pt") as f):
                for name in f.keys():
                    local = name.removeprefix("model.")
                    if "rotary_emb" in name or (config.tied and local == "lm_head.weight"):
                        continue
                    yield local, f.get_tensor(name)

    return config, tensors(), torch.ones(1)


GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Reader(GGUFReader):
    """gguf's own, which neither notices the file's end nor that it makes an object, a third of a
    kilobyte, of each name, length and number in the header: a file of 10 MB could take 3 GB."""

    entries, most = 0, 2**21  # a vocabulary of 128,000 with its merges has half as many

    def _get(self, offset, dtype, count=1, **more):
        if not self.entries:
            self.data = np.asarray(self.data)  # mapped still, and four times as fast
        part = super()._get(offset, dtype, count, **more)
        self.entries += 1
        if len(part) != count or self.entries > self.most:
            raise ValueError(f"the file ends within {count} numbers at byte {offset}, or its "
                             f"header has more than {self.most:,} entries")
        return part

    def value(self, name, default=None):
        """What the header says under a name: a number, a text or a list."""
        return self.fields[name].contents() if name in self.fields else default


def open_gguf(path) -> Reader:
    """A GGUF's fields and mapped tensors. Listing a vocabulary takes gguf seconds, and model and
    tokenizer both ask: the last file is kept, as long as it stays unchanged."""
    stat = os.stat(path)
    return _open_gguf(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _open_gguf(path, mtime, size):
    return Reader(path)


def read_gguf(path: Path):
    """See `read`; tensors come out as float32, `rope_freqs` (llama3 scaling) as the rope factors.
    llama.cpp stores the q and k rows of a Llama for its own rotary layout, which turns channel 2i
    with 2i + 1; here they come back to i with i + D/2."""
    with in_one_line(ModelError, path, "not a readable GGUF file"):
        reader = open_gguf(path)
    stored = {t.name: t for t in reader.tensors}
    with in_one_line(ModelError, path, "config: missing or unusable entry"):
        config = Config.from_gguf(reader.value, stored)

    def read(t):
        with (in_one_line(ModelError, path, f"tensor {t.name!r} cannot be read"),
              np.errstate(all="ignore")):  # damaged scales are noticed later
            return torch.tensor(dequantize(t.data, t.tensor_type))

    def tensors():
        for t in stored.values():
            block, stem, end = re.fullmatch(r"(?s)(?:blk\.(\d+)\.)?(.*?)(\.\w+)?", t.name).groups()
            name, w = GGUF_NAMES.get(stem, stem) + (end or ""), read(t)
            heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(stem)
            if heads and len(w) == heads * config.head_dim:  # else refused later, for its shape
                w = w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield (f"layers.{block}.{name}" if block else name), w

    rope = stored.pop("rope_freqs.weight", None)
    factors = torch.ones(1) if rope is None else read(rope)
    if factors.shape not in ((1,), (config.head_dim // 2,)) or not (factors > 0).all():
        raise ModelError(f"{path}: unusable tensor rope_freqs.weight")
    return config, tensors(), factors


if __name__ == "__main__":
    from loading.fetch import resolve

    path = resolve()
    config, tensors, _ = read(path)
    print(config)
    for name, w in islice(tensors, 6):
        print(f"{name:40s} {list(w.shape)}")
    numbers, size = sum(int(t.n_elements) for t in open_gguf(path).tensors), path.stat().st_size
    print(f"... {numbers:,} numbers at {8 * size / numbers:.1f} bits: {size / 1e6:.0f} MB, "
          f"unpacked to float32 {4 * numbers / 1e6:.0f} MB")
