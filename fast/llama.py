"""fast/llama.py - the Llama of model.py, with a compiled decode step.

    token [1, 1] -> embedding [C] -> one compiled call (fast/step.py) -> logits [1, 1, V]
                                              |
                     the cache's table [2, L, 1, G, capacity, D], float32

A step of one token of one text runs compiled on packed weights, with no selector or with the
selector of fast/selector.py. Several tokens in one call run as in fast/prompt.py. Everything else
runs as in model.py: steps of batches, other selectors, other caches, weights that have no packed
form. A step over a cache in a file attends to the rows that this cache holds in memory, see
fast/offload.py.

    python -m fast.llama        milliseconds of a step, plain and compiled
"""

import sys
from functools import cached_property, partial
from pathlib import Path

import torch

import model
from cli import UserError
from fast import loops, prompt
from fast.loops import run
from fast.offload import DiskCache
from fast.packed import BITS, gguf_tensors
from fast.selector import ButlerSelector, compiled_for
from fast.step import Weights, no_butler, step
from selection import Selector

NO_BUTLER = no_butler()


class Cache(model.Cache):
    """k and v are views of one table [2, L, B, G, capacity, D], float32."""

    def __init__(self, config, batch: int, capacity: int):
        super().__init__(config, 0, capacity)  # without memory: the table follows
        self.table = torch.zeros(2, config.layers, batch, config.kv_heads, capacity,
                                 config.head_dim)
        self.k = list(self.table[0])
        self.v = list(self.table[1])


class Llama(model.Llama):
    """file: the GGUF file of the weights, if they are from one"""

    file = None

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu") -> "Llama":
        """See model.Llama.from_pretrained."""
        llama = super().from_pretrained(path, dtype, device)
        if Path(path).is_file():
            llama.file = Path(path)
        return llama

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """See model.Llama.new_cache."""
        return Cache(self.config, batch, capacity)

    @cached_property
    def packed(self) -> Weights | None:
        """The weights of the compiled step, packed at its first use; None if there is none."""
        if loops.numba is None:  # `load` has said so
            return None
        tensors = gguf_tensors(self, self.file) if self.file else {}
        packed = Weights.of(self, tensors)
        kinds = {t.tensor_type.name for t in tensors.values()} - BITS.keys()
        if packed is None:
            print("fast: plain steps, because these weights need more than 16 bits or their sizes "
                  "are no multiples of 32 channels and 64 rows", file=sys.stderr)
        elif kinds - {"F16", "BF16", "F32"}:
            print(f"fast: 16 bits for weights of {', '.join(sorted(kinds))}, whose groups are not "
                  f"those of {', '.join(BITS)}", file=sys.stderr)
        return packed

    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads."""
        return self.packed.nbytes if self.packed else super().weight_bytes()

    def forward(self, tokens, cache=None, selector=None, positions=None, last=0):
        """See model.Llama.forward."""
        fits = tokens.numel() == 1 and positions is None and isinstance(cache, Cache)
        if fits and runs_compiled(selector) and self.packed:
            return self.step(tokens, cache, selector)
        if tokens.shape[1] == 1 and isinstance(cache, DiskCache) and isinstance(selector, Selector):
            selector = cache.through_held_rows(selector)
        if tokens.shape[1] > 1 and positions is None and isinstance(cache, Cache):
            return prompt.read(self, tokens, cache, selector, last)
        return super().forward(tokens, cache, selector, positions, last)

    @torch.inference_mode()
    def step(self, token, cache: Cache, selector: ButlerSelector | None):
        """One compiled decode step: token [1, 1] -> logits [1, 1, V] float32."""
        position = cache.size
        if position == cache.capacity:
            raise UserError(f"{position + 1} tokens do not fit into a cache of {cache.capacity}")
        x = self.embed_tokens(token)[0, 0].float().clone()  # [C]
        keys, values = cache.table[:, :, 0].numpy()  # [L, G, capacity, D] each
        logits = torch.empty(self.config.vocab_size)
        butler, selection = NO_BUTLER
        if selector:
            butler = selector.butler.weights
            selection = selector.begin_compiled(cache.table[0, :, :, :, :position])
        run(step, x.numpy(), position, keys, values, self.packed, butler, selection,
            logits.numpy())
        if selector:
            selector.end_compiled(selection)
        cache.advance(1)
        return logits[None, None]


def runs_compiled(selector) -> bool:
    """Does the compiled step serve this selector? It cannot prefetch in between."""
    if selector is None:
        return True
    return (isinstance(selector, ButlerSelector) and compiled_for(selector.butler)
            and selector.prefetch is None)


if __name__ == "__main__":
    from statistics import median
    from timeit import repeat

    from tokenizer import resolve

    for cls in model.Llama, Llama:
        llama = cls.from_pretrained(resolve())
        cache = llama.new_cache(1, 600)
        llama.prefill(torch.arange(512)[None], cache)
        decode = partial(llama.decode, torch.tensor([[512]]), cache)
        ms = 1e3 * median(repeat(decode, number=1, repeat=30))
        print(f"{cls.__module__}: {ms:.2f} ms a step, "
              f"512 cached tokens, {llama.weight_bytes() / 1e6:.0f} MB of weights")
