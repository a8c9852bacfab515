"""measure/tradeoff.py - what a selection answers beside what its steps take.

    documents of a task -> every selector at every budget -> score, with its 95 % interval
    the first of them, read densely -> a decode step of each, by turns -> milliseconds, the median

The score is synth_task.py's. A step is what sample.py takes behind that very context, all selectors
on the same keys and values, as fast as the selector has a form: on a CPU dense, butler and what
attends to a choice have compiled ones, oracle and rivals rank in plain PyTorch, a bound rather than
a race. Dense is timed with a cache in either format and is the faster one.

    python bench.py --suite tradeoff --budgets 0.05,0.1,0.25 --n 20
    python -m measure.tradeoff        a step of two selectors behind a short document
"""

from functools import partial

import torch

from beyond.graph import stepper
from measure.intervals import accuracy
from measure.speed import FORMATS, anew, by_turns
from tasks.evaluation import EVICTING, Prompts, at_contexts, evaluate


def tradeoff(bench) -> dict:
    """bench: see bench.py -> {"results": {task: {selector: {budget: score, interval and ms}}}}"""
    c, llama, tok, results = bench.config, bench.llama, bench.tok, {}
    for name, documents in at_contexts(llama, tok, c.task, c.contexts, c.n, c.seed).items():
        scores = evaluate(llama, tok, documents, c.selectors, c.budgets, bench.butlers, task=name)
        ms = milliseconds(llama, tok, documents[0], bench.makers(), c.n)
        results[name] = {selector: {budget: accuracy(runs) | {"ms": ms[selector, budget]}
                                    for budget, runs in by.items()}
                         for selector, by in scores.items()}
    return {"results": results}


def milliseconds(llama, tok, document, makers, rounds: int) -> dict:
    """makers: (selector, budget, [makers of fresh ones]) -> {(selector, budget): ms of a decode
    step behind the document's context}"""
    makers = list(makers)
    evicting = [EVICTING[name] for name in dict.fromkeys(m[0] for m in makers) if name in EVICTING]
    prompts = Prompts(llama, tok, [document], "sparse", evicting)
    token, size, candidates = prompts.block[:, :1], int(prompts.lengths), {}

    def step(advance, cache, *_):
        advance(token)
        cache.truncate(size)

    for name, budget, (make, *_) in makers:
        selector = make()
        if name in EVICTING:
            selector.follow(prompts.watchers[EVICTING[name]])
        caches = [prompts.cache]
        if selector is None:
            caches = [converted(llama, prompts.cache, size, dtype) for dtype in FORMATS.values()]
        for number, cache in enumerate(caches):
            function = partial(step, stepper(llama, cache, selector), cache)
            if name == "butler":
                function = partial(anew, function, selector)
            candidates[name, budget, number] = function
    with torch.inference_mode():
        for function in candidates.values():
            function()  # plain; on a GPU the round that warms up captures
        seconds = by_turns(candidates, rounds, llama.device)
    ms = {}
    for (*key, _), t in seconds.items():
        ms[tuple(key)] = min(1e3 * t, ms.get(tuple(key), 1e3 * t))
    return ms


def converted(llama, cache, size: int, dtype):
    """A cache with the same keys and values in a format, and room for a token more."""
    other = llama.new_cache(1, size + 1, dtype)
    for mine, its in zip(other.k + other.v, cache.k + cache.v, strict=True):
        mine[:, :, :size] = its[:, :, :size]
    other.advance(size)
    return other


if __name__ == "__main__":
    from baselines import make_selector
    from loading import tokenizer
    from model import Llama, resolve
    from tasks.evaluation import fitting

    path = resolve()
    llama, tok = Llama.from_pretrained(path), tokenizer.load(path)
    makers = [(name, "0.1", [partial(make_selector, name, 0.1)]) for name in ("dense", "oracle")]
    (document,) = fitting(llama, tok, 1, seed=0)
    for (name, budget), ms in milliseconds(llama, tok, document, makers, 3).items():
        print(f"{name} {budget}: {ms:.1f} ms a step")
