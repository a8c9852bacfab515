"""sample.py - generates text and shows what the selector attended to.

    prompt --encode--> ids --prefill, all but the last--> cache --one token at a time--> text
                                                             ^ every step through the selector

The last token of the prompt already goes through the selector, so every generated token comes from
a selected cache. `--selector dense` is the model as its authors made it.

    python sample.py                                       a question whose answer is far back
    python sample.py --prompt-file book.txt --show         continue a long text, selected tokens in
                                                           colour
    python sample.py --chat --prompt "Name three rivers."  talk to the model
    python sample.py --engine fast                         several times as fast
    python sample.py --engine fast --prefill sparse --prompt-file book.txt
                                                           long prompts are read faster, too
    python sample.py --html page.html                      a page that shows every step
"""

import codecs
import random
import sys
import time
from dataclasses import asdict, dataclass

import torch

import cli
from cli import DEVICE, UserError, flag, known, one_line, plug_in, read_text
from selection import NAMES, Budget, make_selector, prefill
from synth_task import (
    check_prefill,
    coreference,
    likeliest,
    pools,
    prefill_budget_of,
    rules_of,
)


@dataclass
class Config:
    """Writes text from a selected part of the KV cache and reports what it attended to."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    butler: str = flag(None, "butler file (default: the shipped one)")
    engine: str = flag("plain", f"what runs the model: {', '.join(cli.ENGINES)}")
    selector: str = flag("butler", f"what selects the tokens: {', '.join(NAMES)}")
    budget: float = flag(0.1, "tokens attended: a fraction of the cache (up to 1) or a count")
    interval: int = flag(1, "steps that one choice of the butler serves (plain engine)", at_least=1)
    neighbours: int = flag(0, "tokens that a chosen one brings on either side (plain engine)")
    drift: float = flag(0.0, "how far a query may turn before the butler chooses anew (fast "
                             "engine), 1 - cosine", at_most=2)
    offload: str = flag("none", "where keys and values are: none (beside the model), disk (a "
                                "file) or pinned (the host's memory beside a GPU)")
    prefill: str = flag("dense", "how the prompt is read: dense, or sparse through the selector")
    prefill_budget: float = flag(0.1, "tokens that a block of 64 queries attends to: a fraction "
                                     "of the tokens so far (up to 1) or a count")
    prompt: str = flag(None, "text to continue (default: a generated document and its question)")
    prompt_file: str = flag(None, "UTF-8 file with the text to continue")
    chat: bool = flag(False, "the prompt is a message, in the model's own chat template")
    max_new_tokens: int = flag(100, "tokens to write at most", at_least=1)
    temperature: float = flag(0.7, "0 takes the likeliest token", at_most=100)
    top_p: float = flag(0.9, "sample from the likeliest tokens that together have this probability",
                        at_least=1e-6, at_most=1)
    seed: int = flag(0, "seed of the sampling")
    show: bool = flag(False, "print the prompt, the tokens selected most in colour")
    html: str = flag(None, "write a page that shows each step beside the oracle's selection")
    device: str = flag(DEVICE, "cpu or cuda")


def read_prompt(config) -> tuple[str, str | None]:
    """-> the text to continue and, for the generated document, the answer that it asks for."""
    if config.prompt is not None and config.prompt_file is not None:
        raise UserError("--prompt and --prompt-file exclude each other")
    if config.prompt_file is not None:
        text, answer = read_text(config.prompt_file), None
    elif config.prompt is not None:
        text, answer = config.prompt, None
    else:
        document = coreference(random.Random(config.seed), pools("test"))
        text, answer = document.context + document.question, document.answer
    if not text:
        raise UserError("the prompt is empty")
    with one_line("the prompt is no UTF-8 text"):
        text.encode()
    return text, answer


def sample_token(logits, temperature: float, top_p: float, generator) -> int:
    """Nucleus sampling (arXiv 1904.09751) from logits [V]; the likeliest token at temperature 0.
    Raises UserError for logits that are not finite, which damaged weights give."""
    best = int(likeliest(logits))
    if temperature == 0:
        return best
    # The largest becomes 0: no temperature, however small, can make it infinite.
    scaled = (logits.double() - logits[best].double()) / temperature
    p, ids = scaled.softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # the tokens before it already make up top_p
    return int(ids[torch.multinomial(p.cpu(), 1, generator=generator)])


def generate(llama, cache, ids, selector, config, ends):
    """Yields new token ids after the prompt `ids`, until one of `ends` or a full cache."""
    generator = torch.Generator().manual_seed(config.seed)
    prompt = torch.tensor([ids], device=llama.device)
    if len(ids) > 1:
        prefill(llama, prompt[:, :-1], cache, selector, prefill_budget_of(config))
    token = prompt[:, -1:]
    while cache.size < cache.capacity:
        logits = llama.decode(token, cache, selector)
        new = sample_token(logits[0, -1], config.temperature, config.top_p, generator)
        if new in ends:
            return
        yield new
        token = torch.tensor([[new]], device=llama.device)


class Tally:
    """Counts how often each cached token was selected, over all steps, layers and KV heads."""

    def __init__(self, capacity: int):
        self.selected = torch.zeros(capacity, dtype=torch.long)
        self.selections = 0

    def add(self, selector) -> None:
        for index in selector.index.values():  # [1, G, 1, K] of each layer
            named = index[index >= 0].cpu()
            self.selected += torch.bincount(named, minlength=len(self.selected))
            self.selections += index.shape[1]

    def coloured(self, tok, ids) -> str:
        """The prompt with a background per token: the brighter, the more often selected."""
        colours = (0, 22, 28, 34, 40)  # of the terminal's 256: none, then dark to bright green
        share = self.selected[: len(ids)] / max(1, self.selections)
        levels = torch.bucketize(share, torch.tensor([0.05, 0.15, 0.3, 0.6])).tolist()
        pieces = tok.texts(ids)
        return "".join(f"\033[48;5;{colours[level]}m{piece}\033[0m" if level else piece
                       for level, piece in zip(levels, pieces, strict=True))


def check(config) -> None:
    """Refuses early what would fail late."""
    Budget(config.budget)
    known("selector", config.selector, NAMES)
    check_prefill(config, [config.selector])
    cli.check_device(config.device)
    if config.html is not None:
        cli.check_writable(config.html)
    if config.offload != "none":
        plug_in("fast.offload").check_store(config.offload, config.device)


def main(config: Config) -> dict:
    check(config)
    text, answer = read_prompt(config)
    engine = cli.engine(config.engine)
    llama, tok, butler = engine.load(config.model, config.butler, config.device)
    rules = rules_of(config) if config.selector == "butler" else {}
    selector = make_selector(config.selector, config.budget, butler, llama, **rules)
    ids = tok.chat(text) if config.chat else tok.bos + tok.encode(text)
    if not 0 < len(ids) <= llama.config.context:
        raise UserError(f"the prompt has {len(ids):,} tokens, the model's context is "
                        f"{llama.config.context:,}")
    capacity = min(len(ids) + config.max_new_tokens - 1, llama.config.context)
    if config.offload == "none":
        cache = llama.new_cache(1, capacity)
    else:
        cache = plug_in("fast.offload").new_cache(llama, capacity, config.offload, selector)
    page = None
    if config.html is not None:
        page = plug_in("workshop.page").Page(selector, config.budget)
    tally = Tally(capacity)
    new = []

    print(text if len(text) < 600 else "[...]" + text[-600:], end="", flush=True)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    start = first = time.perf_counter()
    for token in generate(llama, cache, ids, page or selector, config, tok.ends):
        if not new:
            first = time.perf_counter()
        new.append(token)
        if selector:
            tally.add(selector)
        if page:
            page.add(token)
        print(utf8.decode(tok.decode_bytes([token])), end="", flush=True)
    end = time.perf_counter()

    attended = cache.size
    if tally.selections:
        attended = int(tally.selected.sum()) / tally.selections
    report = {
        "prompt_tokens": len(ids), "new_tokens": len(new), "text": tok.decode(new),
        "first_token_s": round(first - start, 3), "cached_tokens": cache.size,
        "tokens_per_s": round((len(new) - 1) / (end - first), 2) if len(new) > 1 else None,
        "attended_per_step": round(attended, 1)}
    print("\n")
    if answer:
        print(f"asked for, and told far back in the document: {answer}")
    if config.show and selector:
        print(tally.coloured(tok, ids))
        print("\nbackground: selected by more than 5, 15, 30, 60 % of all layers, heads, steps\n")
    print(f"{len(new)} tokens at {report['tokens_per_s']} a second; each query attended to "
          f"{report['attended_per_step']} of up to {cache.size} cached tokens ({config.selector})")
    if page:
        page.write(config.html, tok, ids, config.selector, asdict(config) | report)
        print(f"{config.html} shows every step")
    if cache.size == llama.config.context and len(new) < config.max_new_tokens:
        print(f"stopped: the model's context of {cache.size:,} tokens is full", file=sys.stderr)
    if config.engine == "plain":
        print("--engine fast is several times as fast", file=sys.stderr)
    return report


if __name__ == "__main__":
    cli.run(main, Config)
