"""results/compare.py - decoding and reading beside what people run today, on the same weights.

    python results/compare.py [--contexts 512,2048,7900] [--write]

Every candidate reads the same random tokens (once: seconds to the first token), then all decode
behind them by turns, as many threads as PyTorch would take; a row holds the median step.

transformers   LlamaForCausalLM in float32 and in bfloat16, attention by SDPA, with a growing cache
               and with a static one; the latter with our butler attached too (beyond/attach.py)
llama.cpp      on the GGUF file, 4-bit weights; if `pip install --no-deps cyllama==0.2.18` was done
"""

import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from beyond.attach import attached, butler_for
from butler import load_for
from common.cli import flag, numbers, processor, provenance, run
from common.errors import UsageError
from measure import tables
from measure.speed import anew, by_turns
from model import Llama, fast_dtype, resolve
from selection import Selector

try:
    from cyllama.llama import llama_cpp
except ImportError:
    llama_cpp = None


@dataclass
class Config:
    """Times this repository, transformers and llama.cpp on the default model, by turns."""

    contexts: tuple = flag(("512", "2048", "7900"), "comma-separated: tokens cached",
                           numbers(32, 8191))
    budget: float = flag(0.05, "tokens attended: a fraction of the cache (<= 1) or a count (> 1)")
    n: int = flag(15, "rounds", least=1)
    write: bool = flag(False, "write results/compare_PROCESSOR.json, redraw tables")


class Transformers:
    def __init__(self, path, dtype, room):
        from transformers import AutoModelForCausalLM

        self.room = room
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                          dtype=dtype).requires_grad_(False)
        # the same weights once more: what is attached to stays attached
        self.second = deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    @torch.inference_mode()
    def read(self, ids):
        from transformers import DynamicCache, StaticCache

        self.growing = DynamicCache()
        self.static = StaticCache(self.model.config, max_cache_len=self.room)
        self.model(ids, past_key_values=self.growing, logits_to_keep=1)
        for i, layer in enumerate(self.growing.layers):
            self.static.update(layer.keys, layer.values, i)

    @torch.inference_mode()
    def step(self, model, cache):
        model(torch.tensor([[5]]), past_key_values=cache)
        cache.crop(-1)

    def candidates(self, name: str) -> dict:
        return {f"{name}, growing cache": partial(self.step, self.model, self.growing),
                f"{name}, static cache": partial(self.step, self.model, self.static),
                f"{name}, butler": partial(self.step, self.second, self.static)}


class LlamaCpp:
    CHUNK = 512

    def __init__(self, path, room):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.LlamaModel(path_model=str(path), verbose=False,
                                          params=llama_cpp.LlamaModelParams())
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = -(-room // 256) * 256
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.LlamaContext(model=self.model, params=params, verbose=False)
        self.batch = llama_cpp.LlamaBatch(n_tokens=self.CHUNK, embd=0, n_seq_max=1)

    def decode(self, ids, start, last):
        self.batch.set_batch(ids, start, last)
        if self.context.decode(self.batch):
            raise UsageError("llama.cpp could not decode")

    def read(self, ids):
        self.context.memory_seq_rm(0, 0, -1)
        self.length = ids.shape[1]
        for start in range(0, self.length, self.CHUNK):
            part = ids[0, start : start + self.CHUNK].tolist()
            self.decode(part, start, start + len(part) == self.length)

    def step(self):
        self.decode([5], self.length, True)
        self.context.memory_seq_rm(0, self.length, -1)

    def candidates(self, name: str) -> dict:
        return {name: self.step}


class Ours:
    """The model of this repository; its dense prompt is read once and shared by all selectors."""

    def __init__(self, path, room, budget):
        self.llama, self.budget = Llama.from_pretrained(path, fast_dtype()), budget
        self.butler = load_for(self.llama)
        self.cache = self.llama.new_cache(1, room)

    def read(self, ids):
        self.length = ids.shape[1]
        self.cache.truncate(0)
        self.llama.prefill(ids, self.cache)

    def step(self, selector=None):
        self.llama.decode(torch.tensor([[5]]), self.cache, selector)
        self.cache.truncate(self.length)

    def candidates(self, name: str) -> dict:
        return {name: self.step, f"butler {self.budget:g}": partial(
            anew, self.step, self.butler.selector(self.budget))}


def measure(config: Config) -> dict:
    path, contexts = resolve(None), sorted(map(int, config.contexts))
    room = contexts[-1] + 1
    models = {"dense": Ours(path, room, config.budget),
              "transformers, float32": Transformers(path, torch.float32, room),
              "transformers, bfloat16": Transformers(path, torch.bfloat16, room)}
    if llama_cpp:
        models["llama.cpp, 4-bit weights"] = LlamaCpp(path, room)
    with ExitStack() as stack:
        for model in models.values():
            if isinstance(model, Transformers):
                butler = butler_for(model.second)
                stack.enter_context(attached(model.second, partial(butler.selector, config.budget)))
        return {"rows": timed(models, contexts, config.n)}


def timed(models: dict, contexts: list[int], rounds: int) -> list[dict]:
    rows = []
    for model in models.values():  # compiled and packed before anything is timed
        model.read(torch.full((1, 64), 5))
    for context in contexts:
        ids = torch.randint(100, 40000, (1, context), generator=torch.manual_seed(context))
        reading, candidates = {}, {}
        for name, model in models.items():
            began = time.perf_counter()
            model.read(ids)
            own = model.candidates(name)
            reading[next(iter(own))] = time.perf_counter() - began
            candidates |= own
        seconds = by_turns(candidates, rounds, "cpu")
        rows += [{"context": context, "candidate": name, "ms": 1e3 * s,
                  "first_token_s": reading.get(name)} for name, s in seconds.items()]
    return rows


def main(config: Config) -> dict:
    Selector(config.budget)
    if find_spec("transformers") is None:
        raise UsageError("transformers is missing: pip install -r requirements-dev.txt")
    report = measure(config) | provenance()
    print(tables.compare(report))
    return tables.write(config, report, f"compare_{processor()}")


if __name__ == "__main__":
    run(main, Config)
