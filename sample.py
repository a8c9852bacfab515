"""sample.py - text generation that shows what the butler kept.

    prompt --encode--> ids --dense prefill, all but the last--> cache --one token at a time--> text
                                                                 ^ each through the selector

The last token of the prompt already goes through the selector, so that every generated token comes
from a selected cache. `--selector dense` is the model as its authors made it.

    python sample.py                                            a question whose answer is far back
    python sample.py --prompt-file book.txt --show              continue a long text
    python sample.py --chat --prompt "Name three rivers."       talk to it
    python sample.py --html page.html                           look at what each step kept
"""

import codecs
import random
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from baselines import NAMES, make_selector
from beyond.engine import opened
from beyond.graph import stepper
from beyond.offload import STORES, cache_kind
from beyond.page import Beside, texts
from butler import Butler, load_for
from common.cli import DEVICE, flag, processor, provenance, run
from common.errors import ModelError, UsageError
from common.files import read_text, writable
from model import Cache, check_device
from selection import Selector, allowance
from tasks.coreference import coreference, pools

BREAK_EVEN = {"avx2": 2000, "avx512-bf16": 700}  # tokens cached: results/speed_PROCESSOR.json
PAYS = BREAK_EVEN.get(processor(), max(BREAK_EVEN.values()))  # from here on a step at 5 % is faster


@dataclass
class Config:
    """Writes text from a selected part of the KV cache and reports what it attended to."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    engine: str = flag("own", "what runs the model: own, for a Llama, or transformers")
    butler: str = flag(None, "butler, file or Hub id (default: the shipped one)")
    selector: str = flag("butler", f"what chooses the tokens: {', '.join(NAMES)}")
    budget: float = flag(0.1, "tokens attended: a fraction of the cache (<= 1) or a count (> 1)")
    drift: float = flag(0.0, "a butler's choice is kept until its query has turned by more than "
                             "this (1 - cosine, 16 steps at most)", most=2)
    dense_below: int = flag(0, "tokens cached below which steps are dense; a selection begins to "
                               f"pay at about {PAYS:,} on a CPU")
    prompt: str = flag(None, "text to continue (default: a generated document and its question)")
    prompt_file: str = flag(None, "file with the text to continue, UTF-8")
    chat: bool = flag(False, "the prompt is a message to the model, in its own chat format")
    max_new_tokens: int = flag(100, "tokens to write at most", least=1)
    temperature: float = flag(0.7, "0 takes the likeliest token", most=100)
    top_p: float = flag(0.9, "sample from the likeliest tokens that together have this probability",
                        least=1e-6, most=1)
    seed: int = flag(0, "seed of the sampling")
    offload: str = flag("none", f"where keys and values live, of {', '.join(STORES)}: disk is a "
                                "file, pinned the host's memory beside a GPU, not measured yet")
    offload_dir: str = flag(None, "disk: folder of the file (default: /var/tmp)")
    show: bool = flag(False, "print the prompt, the tokens kept most marked by colour")
    html: str = flag(None, "file for a page of what each step kept, beside the oracle's choice, "
                           "which takes time; 10 kB for each token written per 1,000 cached")
    device: str = flag(DEVICE, "cpu or cuda")
    dtype: str = flag(None, "float32 or bfloat16 (default: what this processor is faster with)")


def read_prompt(config) -> tuple[str, str | None]:
    """-> the text to continue, and the answer that it asks for, if that is known"""
    text, answer = config.prompt, None
    if config.prompt_file is not None:
        if text is not None:
            raise UsageError("--prompt and --prompt-file exclude each other")
        text = read_text(config.prompt_file, most=2**26)  # no context holds more
    if text is None:
        document = coreference(random.Random(config.seed), pools("test"))
        text, answer = document.context + document.question, document.answer
    if not text:
        raise UsageError("the prompt is empty")
    return text, answer


def pick(logits, temperature: float, top_p: float, generator) -> int:
    """Nucleus sampling (arXiv 1904.09751) from logits [V]; the likeliest token at temperature 0.
    Raises ModelError if the logits are no numbers, which is what broken weights come to."""
    if not logits.isfinite().all():
        raise ModelError("the model's logits are not finite: its weights are damaged")
    if temperature == 0:
        return int(logits.argmax())
    p, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # what stands before a token already makes up top_p
    return int(ids[torch.multinomial(p.cpu(), 1, generator=generator)])


class Tally:
    """Counts how often each cached token was kept, over all steps, layers and KV heads."""

    def __init__(self, capacity: int):
        self.kept = torch.zeros(capacity, dtype=torch.long)
        self.choices = 0

    def add(self, selector, cached: int, heads: int) -> None:
        """One step's choice; of a dense step all `cached` tokens, for as many layers and heads."""
        self.choices += heads
        if selector is None or selector.dense:
            self.kept[:cached] += heads
        else:
            for index in selector.index.values():  # [1, G, 1, K] of each layer
                self.kept += torch.bincount(index[index >= 0].cpu(), minlength=len(self.kept))


def generate(llama, ids, selector, config, stop, kind=Cache):
    """Yields new token ids behind the prompt `ids`, up to a `stop` id or the context limit."""
    room = llama.config.context - len(ids) + 1  # the last token written need not be cached
    count = min(config.max_new_tokens, room)
    cache = llama.new_cache(1, len(ids) + count - 1, kind=kind)
    if selector:
        selector.read_ahead = cache.read_ahead
    generator = torch.Generator().manual_seed(config.seed)
    prompt = torch.tensor([ids], device=llama.device)
    chunks = prompt[:, :-1].split(512, dim=1) if len(ids) > 1 else ()
    for chunk in tqdm(chunks, desc="reading", unit="chunk", file=sys.stderr, leave=False):
        llama.prefill(chunk, cache, selector and selector.watch)
    token, step = prompt[:, -1:], stepper(llama, cache, selector)
    for _ in range(count):
        logits = step(token)
        new = pick(logits[0, -1], config.temperature, config.top_p, generator)
        if new in stop:
            return
        yield new
        token = torch.tensor([[new]], device=llama.device)


def marked(tok, ids, tally) -> str:
    """The prompt with a background per token: the brighter, the more layers and heads kept it."""
    share = tally.kept[: len(ids)] / max(1, tally.choices)
    colours = (0, 22, 28, 34, 40)  # of the terminal's 256: none, then dark to bright green
    levels = torch.bucketize(share, torch.tensor([0.05, 0.15, 0.3, 0.6]))
    return "".join(f"\033[48;5;{colours[level]}m{piece}\033[0m" if level else piece
                   for level, piece in zip(levels.tolist(), texts(tok, ids), strict=True))


def load(config, text: str):
    """-> the model, its tokenizer, and the ids of the prompt, which the model can hold"""
    llama, tok = opened(config, dtype=config.dtype and getattr(torch, config.dtype))
    if config.chat:
        ids = tok.chat([{"role": "user", "content": text}])
    else:
        ids = [tok.bos_id] * tok.add_bos + tok.encode(text)
    if not 0 < len(ids) <= llama.config.context:
        raise UsageError(f"the prompt has {len(ids)} tokens, the model's context "
                         f"is {llama.config.context}")
    return llama, tok, ids


def main(config: Config) -> dict:
    check(config)
    text, answer = read_prompt(config)
    llama, tok, ids = load(config, text)
    butler = load_for(llama, config.butler) if config.selector == "butler" else None
    selector = make_selector(config.selector, config.budget, butler, config.drift,
                             dense_below=config.dense_below)
    kind = cache_kind(config.offload, config.offload_dir, config.device)
    page = Beside(selector, config.budget) if config.html is not None else None
    tally = Tally(min(len(ids) + config.max_new_tokens, llama.config.context + 1))
    heads, new, first = (llama.config.layers - 1) * llama.config.kv_heads, [], None
    print(text if len(text) < 600 else "[...]" + text[-600:], end="", flush=True)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    start = time.perf_counter()
    for token in generate(llama, ids, page or selector, config, tok.eos_ids, kind):
        first = first or time.perf_counter()
        new.append(token)
        tally.add(selector, len(ids) + len(new) - 1, heads)
        if page:
            page.add(token)
        print(utf8.decode(tok.decode_bytes([token])), end="", flush=True)
    first, end = first or start, time.perf_counter()
    cached = len(ids) + max(len(new) - 1, 0)
    attended = int(tally.kept.sum()) / tally.choices if tally.choices else cached
    report = {
        "prompt_tokens": len(ids), "new_tokens": len(new), "text": "".join(texts(tok, new)),
        "first_token_s": round(first - start, 3),
        "tokens_per_s": round((len(new) - 1) / (end - first), 2) if len(new) > 1 else None,
        "attended_per_step": round(attended, 1), "cached_tokens": cached,
        "cache_bytes": cached * llama.new_cache(1, 1).bytes} | provenance()
    print("\n")
    if answer:
        print(f"asked for, and told far back in the document:{answer}")
    if config.show and selector:
        print(marked(tok, ids, tally))
        print("\nbackground: kept by more than 5, 15, 30, 60 % of all layers, heads and steps\n")
    if config.drift:
        report["interval"] = round(selector.reuse.steps_per_choice, 2)
        print(f"a choice served {report['interval']} steps on average")
    print(f"{len(new)} tokens at {report['tokens_per_s']} a second; each query attended "
          f"to {report['attended_per_step']} of up to {cached} cached tokens ({config.selector}); "
          f"keys and values: {report['cache_bytes'] / 1e6:.1f} MB")
    if page:
        size = page.write(config.html, tok, ids, config.selector, asdict(config) | report)
        print(f"{config.html}: {size / 1e6:.2f} MB")
    advise(config, cached, cached == llama.config.context and len(new) < config.max_new_tokens)
    return report


def advise(config, cached: int, full: bool) -> None:
    """What the user may not expect, on stderr."""
    if full:
        print(f"stopped: the model's context of {cached} tokens is full", file=sys.stderr)
    measured = config.model is None and config.engine == "own" and config.device == "cpu"
    if config.selector == "butler" and measured and config.dense_below < cached < PAYS:
        print(f"below about {PAYS:,} tokens a dense step of this model is faster on a CPU than one "
              f"that attends to 5 %: --dense-below {PAYS}", file=sys.stderr)
    least = Selector.SINKS + Selector.WINDOW
    chooses = config.selector != "dense" and cached >= max(config.dense_below, least + 1)
    if chooses and allowance(config.budget, cached, least) <= least:
        print(f"a budget of {config.budget:g} leaves nothing to choose: of {cached} tokens the "
              f"{Selector.SINKS} first and {Selector.WINDOW} last are always kept; a budget above "
              "1 is a number of tokens", file=sys.stderr)


def check(config) -> None:
    Selector(config.budget)
    if config.selector != "butler":  # which has to be loaded first
        make_selector(config.selector, config.budget, drift=config.drift)
    cache_kind(config.offload, config.offload_dir, config.device)
    if config.dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype is float32 or bfloat16, not {config.dtype}")
    check_device(config.device)
    if config.butler is not None:
        Butler.load(config.butler)
    if config.html is not None:
        writable(config.html)


if __name__ == "__main__":
    run(main, Config)
