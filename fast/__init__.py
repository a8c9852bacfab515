"""fast/ - an engine for speed: compiled decode steps on a CPU, CUDA graphs on a GPU.

    llama.py      the Llama of model.py with a compiled decode step
    selector.py   the butler with 8-bit importance keys, which chooses ahead of the layers
    prompt.py     prompts, without masks
    step.py       a whole decode step in one compiled call
    packed.py     weights in 4, 8 or 16 bits, and their product with one token
    pairs.py      the processor's instruction for products of small integers
    loops.py      attention, choosing and prediction as compiled loops

It imports the course and computes the same; the course knows its name alone (cli.ENGINES).

    python sample.py --engine fast
"""

import sys

import torch

import tokenizer
from butler import find_butler
from tokenizer import resolve


def __getattr__(name: str):
    """fast.Llama and fast.Butler, imported when they are needed: `python -m fast.loops` would warn
    if the package had already imported the module that it runs."""
    if name == "Llama":
        from fast.llama import Llama
        return Llama
    if name == "Butler":
        from fast.selector import Butler
        return Butler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(model=None, butler=None, device="cpu"):
    """The fast engine; arguments and result are those of butler.load. Raises UserError."""
    if str(device).startswith("cuda"):
        from fast import gpu
        return gpu.load(model, butler, device)
    from fast import loops
    from fast.llama import Llama
    from fast.selector import Butler
    if loops.numba is None:
        print("fast: plain steps, because Numba is missing (pip install numba)", file=sys.stderr)
    path = resolve(model)
    if butler is not None:
        Butler.load(butler)  # a damaged file is noticed before the model is read
    # bfloat16 where the processor multiplies it: prompts are read several times as fast
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    llama = Llama.from_pretrained(path, dtype, device)
    return (llama, tokenizer.load(path, llama.config.vocab_size),
            find_butler(llama, butler, Butler))
