"""train.py - distillation: the butler learns to guess where the frozen base model attends.

    text -> base model (frozen, one forward) -> x, q and k of every layer
        teacher  p = mean over a KV head's query heads of softmax(q . k / sqrt(D))
        student  b = softmax(q_imp . k_imp / sqrt(E))      what the butler expects of the KV head
    loss = mean over layers, KV heads and sampled rows of mass * KL(p || b); only the butler learns.

Both are distributions over the tokens that a selection has to choose from, between sinks and
window, p after division by mass, the share of the attention that falls on these.

The trainer looks at the base model through the very hook that a selector uses (`Recorder`), so what
a producer reads here is what it reads when decoding. Rows are sampled because neighbouring queries
say nearly the same, and the softmaxes of all rows would cost more than the base model. Most steps
look at short texts, which are cheap; every fourth at longer ones with gaps between their positions,
which span up to the model's whole context without as many tokens.

    python train.py                         trains the default butler, ends in a table
    python train.py --model DIR --data TEXT ...  another Llama, your own text
    python train.py --resume                goes on where a run was stopped (beyond/survive.py)
    torchrun --nproc-per-node N train.py    the same on N processes, or N GPUs
"""

import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.special import entr  # - p log p, 0 of 0
from tqdm import tqdm

from baselines import make_selector
from beyond import survive
from beyond.engine import opened
from butler import Butler, ButlerConfig
from common.cli import DEVICE, flag, peak_memory, provenance, run
from common.errors import UsageError
from common.files import writable
from kernel import true_attention
from measure import card, tables
from measure.intervals import accuracy, bootstrap
from measure.probe import at_lengths
from model import check_device
from selection import Selector
from tasks.coreference import pools
from tasks.corpus import Mixture, default_texts, hold_out, read_texts, spread
from tasks.evaluation import evaluate, fitting


@dataclass
class Config:
    """Distils a butler from a frozen model and compares it with the oracle."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    engine: str = flag("own", "what runs the model: own, for a Llama, or transformers")
    data: list = flag([], "text files or folders to train on (default: this Python's own text)")
    out: str = flag("out/butler.safetensors", "where the butler goes, its model card beside it")
    report: str = flag(None, "where the JSON with all results goes (default: beside the butler)")
    steps: int = flag(320, "optimiser steps", least=1)
    batch: int = flag(2, "texts per step, of all processes together", least=1)
    length: int = flag(512, "tokens per text", least=64)
    long: int = flag(2048, "tokens of a long text, at most the model's context", least=64)
    span: int = flag(8192, "positions that a long text is spread over by gaps, at most the model's "
                           "context; 0: no gaps")
    long_every: int = flag(4, "every so many steps look at long texts; 0: none does", least=0)
    repeats: int = flag(2, "strings that come twice in every 512 tokens of text")
    rows: int = flag(32, "queries per text that a step looks at", least=1)
    reuse: int = flag(8, "steps that a batch of texts serves, each with fresh rows", least=1)
    learning_rate: float = flag(1e-2, "peak learning rate", least=1e-9)
    stride: int = flag(5, "layers served by one producer (R)", least=1, most=2**20)
    size: int = flag(32, "channels of importance space (E)", least=2, most=2**20)
    rotated_keys: bool = flag(False, "the paper's form: keys as cached, no importance pair turns")
    hidden: int = flag(176, "hidden width of a producer", least=1, most=2**20)
    documents: int = flag(60, "co-reference documents in the final table", least=1)
    windows: int = flag(20, "held-out texts in the final table", least=1)
    longest: int = flag(4096, "tokens of these, at most the model's context", least=64)
    save_every: float = flag(60.0, "seconds between two states to resume from, 0: every step")
    seed: int = flag(0, "seed of initialisation, data and rows")
    resume: bool = flag(False, "go on from OUT.state, or from the beginning where there is none")
    device: str = flag(DEVICE, "cpu or cuda")


# ---------------------------------------------------------------------------- the loss


class Recorder:
    """Stands where a selector stands, attends to everything, and keeps what passes by: the keys of
    all tokens, inputs and queries of the given rows [N] (None: of all)."""

    def __init__(self, rows=None):
        self.rows, self.positions = rows, None  # positions: of all tokens [T]
        self.x, self.q, self.keys = {}, {}, {}

    def __call__(self, layer, x, q, keys, positions):
        self.positions = positions[0]
        if self.rows is None:
            self.rows = torch.arange(len(self.positions), device=x.device)
        self.x[layer], self.q[layer], self.keys[layer] = x[:, self.rows], q[:, :, self.rows], keys


def distillation(butler, record, some=slice(None), sinks=Selector.SINKS, window=Selector.WINDOW):
    """KL(teacher || student) of some of the recorded rows (indices [N]) at every layer >= 1 ->
    [L-1], with gradient.

    Both are distributions [B, G, N, S] over the tokens between sinks and window; a row counts by
    the teacher's share of attention there. The entropy of the teacher has no gradient: minimising
    KL is minimising the paper's cross-entropy.
    """
    losses, queries, rows = [], {}, record.rows[some]
    here = torch.arange(record.keys[0].shape[2], device=rows.device)
    free = (here >= sinks) & (here <= rows[:, None] - window)  # [N, S]
    taken = torch.where(free, 0.0, -1e4)  # finite: the teacher's 0 times it must be 0
    for layer, keys in record.keys.items():
        queries |= butler.queries(layer, record.x[layer][:, some], record.positions[None, rows])
        if layer == 0:
            continue
        with torch.no_grad():
            p = true_attention(record.q[layer][:, :, some], keys, rows[None]).mean(2) * free
            # p sums to its mass m, and m KL(p / m || b) = - sum p log b - (sum entr p - entr m)
            entropy = entr(p).sum(-1) - entr(p.sum(-1))
        scores = butler.scores(queries[layer], butler.project(layer, keys, record.positions))
        log_b = (scores + taken).log_softmax(dim=-1)
        losses.append((-torch.linalg.vecdot(p, log_b) - entropy).mean())
    return torch.stack(losses)


def distil(llama, butler, mixture, config, log):
    """The loop: trains the butler in place; continues from OUT.state when asked to.

    A batch of texts serves several steps, each with rows of its own: the base model's forward is
    most of the cost, and what it says about a text is worth more than one look.
    """
    optimizers = make_optimizers(butler, config.learning_rate)
    text = mixture.digest()
    start = survive.begin(butler, optimizers, config, log, text)
    batches = Batches(llama, mixture, config)
    guard = survive.Guard(butler, optimizers, config, log, text)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, file=sys.stderr,
               mininterval=1, disable=survive.rank() > 0)
    with guard, bar:
        for step in bar:
            kl = distillation(butler, *batches.look(step))
            layers = kl.detach().clone()
            survive.average([layers])
            loss, worst = layers.mean().item(), int(layers.argmax())
            survive.check_loss(log, loss)
            guard.keep()
            rate = config.learning_rate * schedule(step, config.steps)
            update(butler, optimizers, kl.mean(), rate)
            log.append(loss)
            bar.set_postfix_str(f"KL {loss:.3f} a layer, worst {layers[worst]:.2f} at {worst + 1}",
                                refresh=False)
        guard.keep()


class Batches:
    """What the steps look at: two streams of batches, of short and of long texts, each recorded
    once and then served in parts. Step n depends on the seed alone, so that a resumed run sees
    what one that nothing stopped saw."""

    def __init__(self, llama, mixture, config):
        self.llama, self.mixture, self.config = llama, mixture, config
        self.records = {}  # long or not: which batch, what was recorded of it

    def look(self, step: int):
        """-> the record of a batch, and which of its rows [N] this step looks at."""
        c, device, context = self.config, self.llama.device, self.llama.config.context
        every = c.long_every or c.steps + 1  # 0: at none of the steps
        long_steps, rest = divmod(step, every)  # that there were before
        long = rest == every - 1
        length = min(c.long, context) if long else c.length
        number, part = divmod(long_steps if long else step - long_steps, c.reuse)
        seed, share = f"{c.seed} {length} {number}", c.batch // survive.world()
        seed += " long" * (long and length == c.length)  # else known by its length
        if self.records.get(long, ("",))[0] != seed:
            self.records.pop(long, None)  # before there is another: memory for one of each
            rows = sample_rows(random.Random(seed), c.reuse * c.rows, length)
            tokens = texts(self.mixture, seed, share, length, share * survive.rank())
            span = min(c.span, context) if long else 0
            positions = spread(random.Random(f"{seed} gaps"), length, span).to(device)
            self.records[long] = seed, record(self.llama, tokens.to(device), rows.to(device),
                                              positions)
        seen = self.records[long][1]
        return seen, torch.arange(part, len(seen.rows), c.reuse, device=device)


def texts(mixture, seed: str, count: int, length: int, first: int = 0):
    """Tokens of the `count` texts of a batch from number `first` on. -> [count, length]"""
    rows = range(first, first + count)
    return torch.tensor([mixture.window(f"{seed} {row}", length) for row in rows])


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: 5 % warm-up, then a cosine down to nothing."""
    return min(1, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def update(butler, optimizers: list, loss, rate: float) -> None:
    """One step of every optimiser; gradients are averaged over the processes, clipped at 10."""
    loss.backward()
    survive.average([p.grad for p in butler.parameters()])
    torch.nn.utils.clip_grad_norm_(butler.parameters(), 10.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Muon, Keller Jordan 2024), as long as AdamW's.
    torch.optim.Muon is the same in bfloat16, which processors without it multiply so slowly that
    it took 0.8 of the 1.0 seconds of a step; here float32. For matrices only."""

    def __init__(self, matrices, rate: float):
        super().__init__(matrices, {"lr": rate})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                length = group["lr"] * 0.2 * max(p.shape) ** 0.5
                p -= length * orthogonal(p.grad.lerp(momentum, 0.95))


def orthogonal(matrix):
    """The nearest matrix whose singular values are all about 1: five Newton-Schulz steps."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def make_optimizers(butler, rate: float) -> list:
    """Muon for the producers' matrices, AdamW for the key projections and norms, which are none."""
    matrices = [p for p in butler.parameters() if p.ndim == 2]
    others = [p for p in butler.parameters() if p.ndim != 2]
    return [Muon(matrices, rate), torch.optim.AdamW(others, rate, weight_decay=0.0)]


def record(llama, tokens, rows=None, positions=None) -> Recorder:
    """One dense forward of the frozen base model over tokens [B, T], at positions [1, T] if there
    are gaps, looking at rows [N]."""
    recorder = Recorder(rows)
    with torch.no_grad():
        # last: the vocabulary's logits are not needed
        llama(tokens, selector=recorder, last=True, positions=positions)
    return recorder


def sample_rows(rng: random.Random, count: int, length: int):
    """Query rows for the loss, in an order drawn by lot. -> [N]"""
    return torch.tensor(rng.sample(range(length), min(count, length)))


# ---------------------------------------------------------------------------- the verdict


def held_out_kl(llama, butler, unseen):
    """Mean KL per layer over texts [N, T] that were never trained on, every 4th row. -> [L-1]"""
    rows = torch.arange(3, unseen.shape[1], 4, device=unseen.device)
    with torch.no_grad():
        return torch.stack([distillation(butler, record(llama, w[None], rows))
                            for w in unseen]).mean(0)


def verdict(llama, tok, butler, windows, documents) -> dict:
    """The table: share of the attention kept at 10 % of the tokens, at the end of the first 512 and
    of all tokens of windows [N, T], and co-reference answers with 10 % of the tokens attended."""
    names, rows = ("dense", "oracle", "butler", "recency", "random"), {}
    for name, scores in evaluate(llama, tok, documents, names, ("0.1",), [butler]).items():
        (runs,) = scores.values()
        rows[name] = {"coreference": accuracy(runs)}
    makers = {name: partial(make_selector, name, 0.1, butler) for name in names[1:]}
    contexts = sorted({min(512, windows.shape[1]), windows.shape[1]})
    kept = {("dense", context): [1.0] * len(windows) for context in contexts}
    for window in tqdm(windows, desc="attention kept", file=sys.stderr):
        for context, name, mass, _ in at_lengths(llama, window, contexts, makers):
            kept.setdefault((name, context), []).append(mass)
    for name, row in rows.items():
        row["kept"] = {str(context): bootstrap([kept[name, context]]) for context in contexts}
    return rows


def main(config: Config) -> dict | None:
    """-> the report; None in all processes but the first."""
    check(config)
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    sources = [read_texts(config.data)] if config.data else default_texts()
    training, held = zip(*map(hold_out, sources), strict=True)
    device = survive.join(config.device)
    llama, tok = opened(config, device)
    if config.length > llama.config.context:
        raise UsageError(f"--length {config.length}: the model's context is {llama.config.context}")
    documents = fitting(llama, tok, config.documents, config.seed)
    sizes = {name: getattr(config, name) for name in ("stride", "size", "rotated_keys", "hidden")}
    butler = Butler(ButlerConfig.for_model(llama, **sizes)).to(device)
    share = parameters(butler) / parameters(llama)
    survive.note(f"{parameters(butler):,} parameters to train, {share:.2%} of the base model's")

    mixture, log = Mixture(tok, training, pools("train"), repeats=config.repeats), []
    if survive.rank():
        distil(llama, butler, mixture, config, log)
        return survive.leave()
    unseen = Mixture(tok, held, pools("test"), synthetic=0.0)
    short = texts(unseen, "held out", 16, config.length).to(device)
    longest = min(config.longest, llama.config.context)
    long = texts(unseen, "held out, long", config.windows, longest).to(device)
    before = held_out_kl(llama, butler, short).mean().item()
    survive.note(f"held-out KL before: {before:.3f} a layer")
    distil(llama, butler, mixture, config, log)
    survive.leave()
    layers = held_out_kl(llama, butler, short)
    kl = layers.mean().item()
    survive.check_loss(log, kl)
    trained = time.perf_counter() - began
    butler.save(config.out, {"config": asdict(config), "kl": kl})
    report = {
        "config": asdict(config), "parameters": parameters(butler), "share": share,
        "kl_before": before, "kl": kl, "kl_layers": layers.tolist(),
        "table": verdict(llama, tok, butler, long, documents), "loss": log,
        "processes": survive.world(), "training_s": round(trained, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_gb": peak_memory(), "fingerprint": butler.config.fingerprint,
    } | provenance()
    written = card.write(report, report_path(config))
    survive.state_path(config).unlink(missing_ok=True)
    print(f"\n{tables.training(report)}\n\nsaved {config.out}, {' and '.join(written)}")
    return report


def report_path(config) -> Path:
    return Path(config.report or Path(config.out).with_suffix(".json"))


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def check(config) -> None:
    """Everything that can be known to be wrong before anything slow starts."""
    check_device(config.device)
    if config.size % 4:
        raise UsageError(f"--size {config.size}: importance space has channels in fours")
    shortest = min(config.length, config.long) if config.long_every else config.length
    if config.reuse > shortest:
        raise UsageError(f"--reuse {config.reuse}: a text of {shortest} tokens has fewer rows")
    survive.check_processes(config)
    if survive.rank():
        return
    writable(config.out)
    taken, places = {}, {"--report": report_path(config), "--out": Path(config.out),
                         "the state": survive.state_path(config),
                         "the model card": card.free(config.out)}
    for name, path in places.items():
        writable(path)
        if (other := taken.setdefault(path.resolve(), name)) != name:
            raise UsageError(f"{other} and {name} are both {path}")
    if config.resume:
        survive.check_state(config)


if __name__ == "__main__":
    run(main, Config)
