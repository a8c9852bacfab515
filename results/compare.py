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
from measure.speed import FORMATS, anew, by_turns
from model import Llama, fast_dtype, resolve
from selection import Selector

try:
    from cyllama.llama import llama_cpp
except ImportError:
    llama_cpp = None

CHUNK = 512  # tokens that llama.cpp reads at a time


@dataclass
class Config:
    """Times this repository, transformers and llama.cpp on the default model, by turns."""

    contexts: tuple = flag(("512", "2048", "7900"), "comma-separated: tokens cached",
                           numbers(32, 8191))
    budget: float = flag(0.05, "tokens attended: a fraction of the cache (<= 1) or a count (> 1)")
    n: int = flag(15, "rounds", least=1)
    write: bool = flag(False, "write results/compare_PROCESSOR.json, redraw tables")


# Each of these reads the weights -> a function: ids [1, T], read into a cache -> {name: a step}.


def ours(path, room, budget):
    """The model of this repository; its dense prompt is read once and shared by both."""
    llama = Llama.from_pretrained(path, fast_dtype())
    butler, cache = load_for(llama), llama.new_cache(1, room)

    def read(ids):
        def step(selector=None):
            llama.decode(torch.tensor([[5]]), cache, selector)
            cache.truncate(ids.shape[1])

        cache.truncate(0)
        llama.prefill(ids, cache)
        return {"dense": step, f"butler {budget:g}": partial(anew, step, butler.selector(budget))}

    return read


def theirs(path, room, budget, name, dtype, stack):
    """transformers, in a format; a butler is attached until `stack` ends."""
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                 dtype=dtype).requires_grad_(False)
    # the same weights once more: what is attached to stays attached
    second = deepcopy(model, {id(p): p for p in model.parameters()})
    butler = butler_for(second)
    stack.enter_context(attached(second, partial(butler.selector, budget)))

    @torch.inference_mode()
    def step(model, cache):
        model(torch.tensor([[5]]), past_key_values=cache)
        cache.crop(-1)

    @torch.inference_mode()
    def read(ids):
        growing, static = DynamicCache(), StaticCache(model.config, max_cache_len=room)
        model(ids, past_key_values=growing, logits_to_keep=1)
        for i, layer in enumerate(growing.layers):
            static.update(layer.keys, layer.values, i)
        return {f"{name}, growing cache": partial(step, model, growing),
                f"{name}, static cache": partial(step, model, static),
                f"{name}, butler": partial(step, second, static)}

    return read


def llamas(path, room):
    llama_cpp.llama_backend_init()
    model = llama_cpp.LlamaModel(path_model=str(path), verbose=False,
                                 params=llama_cpp.LlamaModelParams())
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = -(-room // 256) * 256
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = llama_cpp.LlamaContext(model=model, params=params, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=CHUNK, embd=0, n_seq_max=1)

    def decode(ids, start, last):
        batch.set_batch(ids, start, last)
        if context.decode(batch):
            raise UsageError("llama.cpp could not decode")

    def read(ids):
        def step():
            decode([5], length, True)
            context.memory_seq_rm(0, length, -1)

        context.memory_seq_rm(0, 0, -1)
        length = ids.shape[1]
        for start in range(0, length, CHUNK):
            decode(ids[0, start : start + CHUNK].tolist(), start, start + CHUNK >= length)
        return {"llama.cpp, 4-bit weights": step}

    return read


def measure(config: Config) -> dict:
    path, contexts, rows = resolve(None), sorted(map(int, config.contexts)), []
    room = contexts[-1] + 1
    with ExitStack() as stack:
        readers = [ours(path, room, config.budget)]
        readers += [theirs(path, room, config.budget, f"transformers, {name}", dtype, stack)
                    for name, dtype in reversed(FORMATS.items())]
        if llama_cpp:
            readers.append(llamas(path, room))
        for read in readers:  # compiled and packed before anything is timed
            read(torch.full((1, 32), 5))  # the shortest of --contexts
        for context in contexts:
            ids = torch.randint(100, 40000, (1, context), generator=torch.manual_seed(context))
            reading, candidates = {}, {}
            for read in readers:
                began = time.perf_counter()
                own = read(ids)
                reading[next(iter(own))] = time.perf_counter() - began
                candidates |= own
            rows += [{"context": context, "candidate": name, "ms": 1e3 * s,
                      "first_token_s": reading.get(name)}
                     for name, s in by_turns(candidates, config.n, "cpu").items()]
    return {"rows": rows}


def main(config: Config) -> dict:
    Selector(config.budget)
    if find_spec("transformers") is None:
        raise UsageError("transformers is missing: pip install -r requirements-dev.txt")
    report = measure(config) | provenance()
    print(tables.compare(report))
    return tables.write(config, report, f"compare_{processor()}")


if __name__ == "__main__":
    run(main, Config)
