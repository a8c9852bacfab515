"""results/compare.py - decode steps and prompts beside transformers and llama.cpp, same weights.

    our engine     --engine fast: dense, and with the butler, which also reads the prompt, each
                   block with a tenth of the tokens (--prefill sparse)
    transformers   LlamaForCausalLM in float32 and bfloat16, attention by SDPA: a growing cache, a
                   static cache, and a growing cache with our butler attached to the model
    llama.cpp      on the 4-bit GGUF file; after `pip install --no-deps cyllama==0.2.18`

Everyone reads the same random tokens once (seconds to the first token). Then all decode behind
them by turns, so that a slow moment of the machine hits all; a row holds the median step, and the
seconds that a prompt and an answer of 100 tokens take together.

    python results/compare.py --contexts 512,2048,7900
"""

import statistics
import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli
from cli import UserError, flag, numbers, plug_in
from selection import prefill
from tokenizer import resolve

try:
    from cyllama.llama import llama_cpp
except ImportError:
    llama_cpp = None

PREFILL_BUDGET = 0.1  # of the butler's prompt
ANSWER = 100  # tokens
CHUNK = 512  # tokens that llama.cpp reads at a time
TOKEN = torch.tensor([[5]])  # which everyone decodes


@dataclass
class Config:
    """Times this repository, transformers and llama.cpp on the default model."""

    contexts: tuple = flag(("512", "2048", "4096", "7900"),
                           "comma-separated numbers of cached tokens")
    budget: float = flag(0.05, "tokens attended: a fraction of the cache (up to 1) or a count")
    n: int = flag(15, "rounds", at_least=1)


# Each of the following loads the weights and returns a function: ids [1, T], capacity of a cache ->
# {name: seconds that reading the prompt took}, {name: step}. step(turn) decodes one token, which
# stands `turn` tokens behind the prompt.


def ours(budget: float):
    llama, _, butler = cli.engine("fast").load()

    def read(ids, capacity):
        selectors = {"dense": None, "butler": butler.selector(budget)}
        seconds, steps = {}, {}
        for name, selector in selectors.items():
            cache = llama.new_cache(1, capacity)
            seconds[name] = seconds_of(partial(prefill, llama, ids, cache, selector,
                                               PREFILL_BUDGET))
            steps[name] = partial(step, cache=cache, selector=selector)
        return seconds, steps

    def step(turn, cache, selector):
        llama.decode(TOKEN, cache, selector)

    return read


def theirs(path, budget: float, dtype, stack):
    """The butler stays attached to a second model with the same weights until `stack` ends."""
    attach = plug_in("workshop.transformers")
    from transformers import DynamicCache, StaticCache

    model = attach.read_model(path, dtype)
    second = deepcopy(model, {id(p): p for p in model.parameters()})
    butler = attach.butler_for(second, cls=plug_in("fast").Butler)
    stack.enter_context(attach.attached(second, partial(butler.selector, budget), PREFILL_BUDGET))

    @torch.inference_mode()
    def read(ids, capacity):
        growing, selected = DynamicCache(), DynamicCache()
        static = StaticCache(model.config, max_cache_len=capacity)
        name = f"transformers, {str(dtype).removeprefix('torch.')}"
        seconds = {f"{name}, growing cache": seconds_of(
            lambda: model(ids, past_key_values=growing, logits_to_keep=1))}
        for i, layer in enumerate(growing.layers):
            static.update(layer.keys, layer.values, i)
        seconds[f"{name}, our butler"] = seconds_of(
            lambda: second(ids, past_key_values=selected, logits_to_keep=1))

        @torch.inference_mode()
        def step(turn, model, cache):
            model(TOKEN, past_key_values=cache)

        return seconds, {f"{name}, growing cache": partial(step, model=model, cache=growing),
                         f"{name}, static cache": partial(step, model=model, cache=static),
                         f"{name}, our butler": partial(step, model=second, cache=selected)}

    return read


def llamas(path, capacity: int):
    """capacity: of the longest context"""
    llama_cpp.llama_backend_init()
    model = llama_cpp.LlamaModel(path_model=str(path), verbose=False,
                                 params=llama_cpp.LlamaModelParams())
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = -(-capacity // 256) * 256
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = llama_cpp.LlamaContext(model=model, params=params, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=CHUNK, embd=0, n_seq_max=1)

    def decode(ids, start, last):
        batch.set_batch(ids, start, last)
        if context.decode(batch):
            raise UserError("llama.cpp could not decode")

    def read(ids, capacity):
        length = ids.shape[1]
        context.memory_seq_rm(0, 0, -1)

        def prompt():
            for start in range(0, length, CHUNK):
                piece = ids[0, start : start + CHUNK].tolist()
                decode(piece, start, start + CHUNK >= length)

        name = "llama.cpp, 4-bit"
        return ({name: seconds_of(prompt)},
                {name: lambda turn: decode([5], length + turn, True)})

    return read


def seconds_of(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def by_turns(steps: dict, rounds: int) -> dict:
    """{name: step} -> {name: median milliseconds}; the first two rounds warm up."""
    seconds = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            seconds[name].append(seconds_of(partial(step, turn)))
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


def main(config: Config) -> dict:
    contexts = sorted(numbers(config.contexts, int, "--contexts"))
    path = resolve()
    more = config.n + 2
    rows = []
    with ExitStack() as stack:
        readers = [ours(config.budget), theirs(path, config.budget, torch.float32, stack),
                   theirs(path, config.budget, torch.bfloat16, stack)]
        if llama_cpp:
            readers.append(llamas(path, contexts[-1] + more))
        for read in readers:  # compiles and packs before anything is timed
            read(torch.full((1, 32), 5), 34)
        for context in contexts:
            ids = torch.randint(100, 40000, (1, context), generator=torch.manual_seed(context))
            prompts, steps = {}, {}
            for read in readers:
                seconds, own = read(ids, context + more)
                prompts |= seconds
                steps |= own
            for name, ms in by_turns(steps, config.n).items():
                first = prompts.get(name)
                rows.append({"suite": "compare", "context": context, "selector": name, "ms": ms,
                             "first_token_s": first,
                             "answer_s": first and first + ANSWER * ms / 1000})
    for row in rows:
        wait = ""
        if row["first_token_s"]:
            wait = (f"   prompt {row['first_token_s']:5.1f} s, with {ANSWER} new tokens "
                    f"{row['answer_s']:5.1f} s")
        print(f"{row['context']:6,}  {row['selector']:40s} {row['ms']:8.1f} ms a step{wait}")
    return {"rows": rows}


if __name__ == "__main__":
    cli.run(main, Config)
