"""beyond/engine.py - the model of a script: ours, or one of transformers that looks like ours.

    --model, --engine --opened--> the model, its tokenizer
    tokens [B, T] -> Engine: transformers' forward, at whose attention stand our cache, our selector
                     and our kernels (beyond/attach.py) -> logits [B, T, V]

An `Engine` has what train.py, sample.py, synth_task.py and the quality suites of bench.py ask of
model.Llama: the same cache of this repository, so that rows may differ in length and a text can be
rewound, the same hook, the same fingerprint. What it computes between two attentions is the
model's own code, whatever its family. Its windows hold here as well; layers that have one come last
in the cache, where a selector does not look. The model lies on one device; a model that is spread
over several can be attached to.

    python -m beyond.engine        a tiny random Llama through both engines
"""

import inspect
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import cache
from tempfile import TemporaryDirectory

import torch
from torch import nn

from beyond import survive
from beyond.attach import Anatomy, Hold, masked, scaled, selected, transformers
from common.cli import known
from common.errors import ModelError
from loading import tokenizer
from loading.fetch import resolve
from model import Cache, Llama, check_device, dense_attention, fast_dtype

ENGINES = "own", "transformers"


@cache
def bridge():
    """A cache of transformers whose keys and values are those of one of ours."""
    class Bridge(transformers().Cache):
        def __init__(self, ours, slots):
            super().__init__(layers=[])
            self.ours, self.slots = ours, slots

        def update(self, keys, values, layer, *args, **kwargs):
            return self.ours.append(self.slots[layer], keys, values)

        def get_seq_length(self, layer=0):
            return self.ours.size

    return Bridge


class Engine(Hold, nn.Module):
    """model.Llama's interface around a frozen decoder of transformers, which is its own from then
    on. Raises ModelError, one line, for what cannot be selected from."""

    prefill, decode = Llama.prefill, Llama.decode

    def __init__(self, model):
        nn.Module.__init__(self)
        self.anatomy = a = Anatomy(model)
        self.config, self.frequencies = a.config, a.frequencies
        self.layers, self.embed_tokens = a.layers, model.get_input_embeddings()
        windowed = [i for i in range(len(a.windows)) if i not in a.numbers]
        self.slots = a.numbers | {i: n for n, i in enumerate(windowed, len(a.numbers))}
        named = inspect.signature(model.forward).parameters
        self.cached = "cache" if "cache" in named else "past_key_values"  # before 5.24
        Hold.__init__(self, model.eval().requires_grad_(False))

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def new_cache(self, batch: int, capacity: int, dtype=None, kind=Cache) -> Cache:
        """As model.Llama's; steps are no CUDA graphs."""
        shape = replace(self.config, layers=len(self.slots))
        made = Llama.new_cache(self, batch, capacity, dtype, lambda _, *rest: kind(shape, *rest))
        made.capturable = False
        return made

    def attend(self, i, module, q, keys, values, mask, rules):
        cache, slot, window = self.cache, self.slots[i], self.anatomy.windows[i]
        q, dtype, index = scaled(q, rules).to(keys.dtype), q.dtype, None
        if self.selector and i in self.anatomy.numbers:
            index = self.selector(slot, self.x, q, keys, self.positions)
        if index is not None:
            return selected(q, *cache.at_hand(slot, keys, values, index), rules).to(dtype)
        keys, values = cache.whole(slot, keys, values)
        if window is None and rules.get("softcap") is None:
            out = dense_attention(q, keys, values, self.positions, cache.ragged, dtype)
        else:
            at, there = self.here[:, None, :, None], torch.arange(keys.shape[2], device=q.device)
            near = there > at - (window or self.config.context)
            out = masked(q, keys, values, near & (there <= at), rules)
        return out.to(dtype)

    def forward(self, tokens, cache=None, selector=None, lengths=None, last=False, positions=None):
        """As model.Llama's: tokens [B, T] -> logits [B, T, V]"""
        B, T = tokens.shape
        cache = cache or self.new_cache(B, T)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=tokens.device)
        self.here = cache.positions(T, lengths, self.config.context, positions)
        self.positions = self.here if positions is None else positions
        at = torch.full((B,), T - 1, device=tokens.device) if lengths is None else lengths - 1
        wanted = at.unique() if last else torch.arange(T, device=tokens.device)
        self.cache, self.selector = cache, selector
        try:
            logits = self.model(  # with a mask as it is when it is ready: none is made, none used
                input_ids=tokens, position_ids=self.positions, use_cache=True,
                logits_to_keep=wanted, **{self.cached: bridge()(cache, self.slots)},
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
                ).logits
        finally:
            self.cache = self.selector = None  # their memory is the caller's
        cache.advance(T, lengths)
        if last:
            logits = logits[torch.arange(B, device=at.device), torch.searchsorted(wanted, at)]
            logits = logits[:, None]
        return logits

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Engine":
        """A Hugging Face folder or a GGUF file. Raises ModelError in one line."""
        check_device(device)
        folder, rules = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        family = transformers().AutoModelForCausalLM
        try:
            model, told = family.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                                 **rules)
        except Exception as e:  # a damaged file can end in any
            raise ModelError(f"{path}: transformers cannot load it ({e})") from None
        if missing := sorted(told["missing_keys"]):
            raise ModelError(f"{path}: {len(missing)} tensors are missing, {missing[0]} first")
        return cls(model.to(device))


# ---------------------------------------------------------------------------- for the scripts


def translated(path):
    """The tokenizer of a folder whose files transformers alone reads, which writes them as ours
    does."""
    with TemporaryDirectory() as folder:
        transformers().AutoTokenizer.from_pretrained(path).save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):
            if (path / name).exists():
                shutil.copy(path / name, folder)
        return tokenizer.load(folder)


def found(config):
    """What the flags --model and --engine of a script name -> its path, its tokenizer"""
    known("engine", [config.engine], ENGINES)
    path = survive.host_first(lambda: resolve(config.model))
    try:
        return path, tokenizer.load(path)
    except tokenizer.TokenizerError:
        if config.engine != "own" and path.is_dir():
            with suppress(Exception):  # if neither can, the first problem is the one to tell
                if (tok := translated(path)).encode("a"):
                    return path, tok
        raise


def opened(config, device=None, dtype=None, place=None):
    """-> the frozen model, on --device, and its tokenizer; place: what was `found`"""
    (path, tok), device = place or found(config), device or config.device
    made = Llama if config.engine == "own" else Engine
    model = made.from_pretrained(path, dtype or fast_dtype(device), device)
    return model, tok.check(model)


if __name__ == "__main__":
    from pathlib import Path

    torch.manual_seed(0)
    random = transformers().LlamaForCausalLM(transformers().LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2))
    with TemporaryDirectory() as folder:
        random.save_pretrained(folder)
        for made in Llama, Engine:
            llama = made.from_pretrained(Path(folder))
            kv = llama.new_cache(batch=1, capacity=8)
            llama.prefill(torch.arange(7)[None], kv)
            logits = llama.decode(torch.tensor([[7]]), kv)
            print(f"{made.__name__}: logits {list(logits.shape)}, best {int(logits.argmax())}, "
                  f"{float(logits.max()):.4f}")
