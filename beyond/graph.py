"""beyond/graph.py - one decode step, captured once, replayed for every token.

    token [B, 1] -> a CUDA graph: the whole Llama, selection included -> logits [B, 1, V]
                       ^ cache.lengths lies on the device, and is advanced there

A decode step is some thousand small kernels, and a CPU takes longer to launch them one by one than
a GPU to run them. A CUDA graph launches them all at once, but runs them exactly as they were: same
addresses, same shapes, nothing in between that the CPU decides. So a step has a second form, in
which every number that depends on the text's length is a tensor, and every shape is made for
`bound` tokens, the length rounded up to a block of 1,024: keys are written at `cache.lengths`,
attention ends there, and a choice has as many slots as the bound's budget, the last ones empty. A
selector is `capturable` if the CPU then never reads a tensor's value.

The CPU counts along, which is how it knows when the text outgrows the bound (a new graph), and when
a text was rewound or read: the step behind that is a plain one, as are all steps where there is no
GPU.

Right on the CPU, in Triton's interpreter; on a GPU not measured yet.

    python -m beyond.graph        how many operators the CPU calls for a step
"""

import copy

import torch

from kernel import BLOCK, on_gpu


def stepper(llama, cache, selector=None):
    """-> a function token [B, 1] -> logits [B, 1, V]: `llama.decode` with this cache and selector,
    replayed from a graph where there can be one. Logits are overwritten by the next step."""
    capturable = cache.capturable and (selector is None or selector.capturable)
    if capturable and on_gpu(cache.lengths):
        return Graph(llama, cache, selector).step
    return lambda token: llama.decode(token, cache, selector)


class Graph:
    """The decode steps of one cache under one selector (None, or one that is `capturable`)."""

    def __init__(self, llama, cache, selector=None):
        self.llama, self.cache, self.selector = llama, cache, selector
        self.room = min(cache.capacity, llama.config.context)
        self.token = torch.zeros_like(cache.lengths)[:, None]
        self.view = copy.copy(cache)  # the same tensors, seen `bound` tokens long
        self.view.ragged = True
        self.captured = None  # the bound of a graph, the graph, and what it leaves
        self.end, self.sparse = 0, None  # of the step before: none was there

    @torch.inference_mode()
    def step(self, token):
        """token [B, 1] -> logits [B, 1, V], overwritten by the next step; errors as llama.decode"""
        cache, selector, size = self.cache, self.selector, self.cache.size
        sparse = selector is not None and size + 1 >= selector.dense_below
        follows = self.end - 1 <= size <= self.end and sparse == self.sparse and size < self.room
        self.end, self.sparse = size + 1, sparse
        if not follows:
            self.captured = None  # every key that comes before will be projected
            return self.llama.decode(token, cache, selector)
        if selector:
            selector.arrive(1, selector.start + self.end - selector.end, self.end)
        bound = min(-(-self.end // BLOCK) * BLOCK, self.room)
        self.token.copy_(token)
        if self.captured is None or self.captured[0] != bound:
            self.captured = bound, *self.capture(bound)
        _, replay, logits, index = self.captured
        replay()
        cache.size += 1
        if selector:
            selector.index.update(index)
        return logits

    def capture(self, bound: int):
        """-> a function that runs the step, the logits and the indices that it leaves behind."""
        self.run(bound)  # compiles kernels and grows buffers; what it wrote is written again
        self.cache.lengths -= 1
        for age in self.selector.reuse.age.values() if self.sparse else ():
            age -= 1  # of choices, which the step counts again
        replay, logits = record(lambda: self.run(bound))
        return replay, logits, dict(self.selector.index) if self.selector else {}

    def run(self, bound: int):
        """The step in its second form -> logits"""
        self.view.size = bound - 1
        if self.selector:
            self.selector.bound = bound
        try:
            return self.llama(self.token, self.view, self.selector)
        finally:
            if self.selector:
                self.selector.bound = None


def record(function):
    """Records what a function of no arguments launches -> (function that launches it, result)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


if __name__ == "__main__":
    from torch.utils._python_dispatch import TorchDispatchMode

    from butler import load_for
    from model import Llama, resolve

    class Counter(TorchDispatchMode):
        called = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.called += 1
            return function(*args, **kwargs or {})

    llama, token = Llama.from_pretrained(resolve()), torch.zeros(1, 1, dtype=torch.long)
    for name, selector in ("dense", None), ("butler", load_for(llama).selector(0.1)):
        cache = llama.new_cache(1, 512)
        llama.prefill(torch.arange(256)[None], cache)
        step = stepper(llama, cache, selector)
        step(token)
        with Counter() as counter:
            logits = step(token)
        print(f"{name}: token [1, 1] -> logits {list(logits.shape)}, {counter.called:,} operators "
              "called one by one")
