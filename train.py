"""train.py - distillation: the butler learns to guess where the frozen base model attends.

    text -> base model (frozen, one forward) -> x of the producer layers, q and k of every layer
                teacher  p = softmax(q . k / sqrt(D))          what each head attends to
                student  b = softmax(q_imp . k_imp / sqrt(E))  what the butler expects
    loss = mean over layers, heads and sampled rows of KL(p || b); only the butler learns.

The trainer looks at the base model through the very hook that a selector uses (`Recorder`), so what
a producer reads here is what it reads when decoding. Rows are sampled because neighbouring queries
say nearly the same, and the softmaxes of all rows would cost more than the base model.

    python train.py                         trains the default butler, ends in a table
    python train.py --model DIR --data TEXT ...  another Llama, your own text
    python train.py --resume                goes on where a run was stopped (survive.py)
    torchrun --nproc-per-node N train.py    the same on N processes, or N GPUs
"""

import json
import math
import random
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import survive
import tokenizer
from baselines import Probe, make_selector, mean, raw_scores
from butler import Butler, ButlerConfig, whole
from cli import UsageError, flag, provenance, run, writable
from coreference import pools
from corpus import Mixture, default_texts, hold_out, read_texts
from fetch import resolve
from model import Llama, check_device, fast_dtype
from synth_task import accuracy, evaluate, fitting


@dataclass
class Config:
    """Distils a butler from a frozen Llama and compares it with the oracle."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    data: list = flag([], "text files or folders to train on (default: this Python's own text)")
    out: str = flag("out/butler.safetensors", "where the butler goes")
    report: str = flag(None, "where the JSON with all results goes (default: beside the butler)")
    steps: int = flag(1200, "optimiser steps", least=1)
    batch: int = flag(2, "texts per step, of all processes together", least=1)
    length: int = flag(512, "tokens per text", least=64)
    repeats: int = flag(2, "strings that come twice in every 512 tokens of text")
    rows: int = flag(64, "queries per text that a step looks at", least=1)
    reuse: int = flag(4, "steps that a batch of texts serves, each with fresh rows", least=1)
    learning_rate: float = flag(1e-2, "peak learning rate", least=1e-9)
    stride: int = flag(5, "layers served by one producer (R)", least=1, most=2**20)
    size: int = flag(16, "channels of importance space (E)", least=1, most=2**20)
    hidden: int = flag(160, "hidden width of a producer", least=1, most=2**20)
    documents: int = flag(100, "co-reference documents in the final table", least=1)
    save_every: float = flag(60.0, "seconds between two states to resume from, 0: every step")
    seed: int = flag(0, "seed of initialisation, data and rows")
    resume: bool = flag(False, "go on from OUT.state, or from the beginning where there is none")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")


# ---------------------------------------------------------------------------- the loss


class Recorder:
    """Stands where a selector stands, attends to everything, and keeps what passes by."""

    def __init__(self):
        self.x, self.q, self.keys = {}, {}, {}

    def __call__(self, layer, x, q, keys, positions):
        self.x[layer], self.q[layer], self.keys[layer] = x, q, keys


def distillation(butler, record, rows, grouped=False):
    """KL(teacher || student) of the chosen rows [N] of every layer >= 1 -> [L-1], with gradient.

    Both are causal softmaxes over the cached tokens, [B, G, H/G, N, S], of each query head; or, if
    `grouped` or if the butler has one query per KV head, their means over the heads that share a
    KV head. The entropy of the teacher has no gradient: minimising KL is minimising the paper's
    cross-entropy.
    """
    losses, queries = [], {}
    S = record.keys[0].shape[2]
    grouped = grouped or butler.config.heads == butler.config.kv_heads
    later = torch.arange(S, device=rows.device) > rows[:, None]
    future = torch.where(later, -1e4, 0.0)  # [N, S], finite: the teacher's 0 times it must be 0

    def log_attention(scores):
        logs = (scores + future).log_softmax(dim=-1)
        return logs.logsumexp(2, keepdim=True) - math.log(logs.shape[2]) if grouped else logs

    for layer, keys in record.keys.items():
        queries |= butler.queries(layer, record.x[layer][:, rows])
        if layer == 0:
            continue
        with torch.no_grad():
            log_p = log_attention(raw_scores(record.q[layer][:, :, rows], keys))
            p = log_p.exp()
        log_b = log_attention(butler.scores(queries[layer], butler.project(layer, keys)))
        count = p.shape[:-1].numel()  # dot products: no pass over memory for a product
        losses.append((p.flatten() @ log_p.flatten() - p.flatten() @ log_b.flatten()) / count)
    return torch.stack(losses)


def distil(llama, butler, mixture, config, log):
    """The loop: trains the butler in place; continues from OUT.state when asked to.

    A batch of texts serves several steps with fresh rows: the base model's forward is most of the
    cost, and what it says about a text is worth more than one look.
    """
    optimizers = make_optimizers(butler, config.learning_rate)
    text = mixture.digest()
    start = survive.begin(butler, optimizers, config, log, text)
    share = config.batch // survive.world()  # texts of every batch that this process looks at
    guard = survive.Guard(butler, optimizers, config, log, text)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, file=sys.stderr,
               unit_scale=config.batch * config.length / config.reuse, unit="tok", mininterval=1,
               disable=survive.rank() > 0)
    with guard, bar:
        for step in bar:
            if step == start or step % config.reuse == 0:
                seed, first = f"{config.seed} {step // config.reuse}", share * survive.rank()
                tokens = texts(mixture, seed, share, config.length, first)
                recorded = record(llama, tokens.to(llama.device))
            rows = sample_rows(random.Random(f"{config.seed} {step}"), config.rows, config.length)
            kl = distillation(butler, recorded, rows.to(llama.device))
            seen = kl.detach().clone()
            survive.average([seen])
            loss, worst = seen.mean().item(), int(seen.argmax())
            survive.check_loss(log, loss)
            guard.keep()
            rate = config.learning_rate * schedule(step, config.steps)
            update(butler, optimizers, kl.mean(), rate)
            log.append(loss)
            bar.set_postfix_str(f"KL {loss:.3f} a layer, worst {seen[worst]:.2f} at {worst + 1}",
                                refresh=False)
        guard.keep()


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


def make_optimizers(butler, rate: float) -> list:
    """Muon for the producers' matrices (steps along the orthogonalised momentum, as long as AdamW's
    would be), AdamW for the key projections and norms, which are no matrices."""
    matrices = [p for p in butler.parameters() if p.ndim == 2]
    others = [p for p in butler.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, rate, weight_decay=0.0)]


def record(llama, tokens) -> Recorder:
    """One dense forward of the frozen base model over tokens [B, T]."""
    recorder = Recorder()
    with torch.no_grad():
        llama(tokens, selector=recorder, last=True)  # last: the vocabulary's logits are not needed
    return recorder


def sample_rows(rng: random.Random, rows: int, length: int):
    """Sorted query rows for the loss, always with the last one, which sees the most. -> [N]"""
    return torch.tensor(sorted(rng.sample(range(length - 1), min(rows, length) - 1)) + [length - 1])


# ---------------------------------------------------------------------------- the verdict


def held_out_kl(llama, butler, windows):
    """Mean KL per layer over windows [N, T] that were never trained on, every 4th row. -> [L-1]"""
    rows = torch.arange(3, windows.shape[1], 4, device=windows.device)
    with torch.no_grad():
        return torch.stack([distillation(butler, record(llama, w[None]), rows)
                            for w in windows]).mean(0)


def mass_recall(llama, butler, windows, name: str, budget: float) -> float:
    """Share of true attention that a selector keeps in windows [N, T], every position under its own
    selection, measured on the sparse run itself."""
    probes = [Probe(make_selector(name, budget, butler)) for _ in windows]
    with torch.no_grad():
        for window, probe in zip(windows, probes, strict=True):
            llama(window[None], selector=probe, last=True)
    return sum(mean(probe.mass) for probe in probes) / len(probes)


def verdict(llama, tok, butler, windows, documents) -> dict:
    """The table: mass recall at 10 %, and co-reference answers with 10 % of the tokens attended."""
    names, rows = ("dense", "oracle", "butler", "recency", "random"), {}
    for name, scores in evaluate(llama, tok, documents, names, ("0.1",), [butler]).items():
        (runs,) = scores.values()
        recall = 1.0 if name == "dense" else mass_recall(llama, butler, windows, name, 0.1)
        rows[name] = {"mass_recall": recall, "coreference": accuracy(runs)}
    return rows


def main(config: Config) -> dict | None:
    """-> the report; None in all processes but the first."""
    check(config)
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    sources = [read_texts(config.data)] if config.data else default_texts()
    kept, held = zip(*map(hold_out, sources), strict=True)
    device = survive.join(config.device)
    path = survive.host_first(lambda: resolve(config.model))
    llama = Llama.from_pretrained(path, fast_dtype(device), device)
    if config.length > llama.config.context:
        raise UsageError(f"--length {config.length}: the model's context is {llama.config.context}")
    tok = tokenizer.load(path).check(llama)
    documents = fitting(llama, tok, config.documents, config.seed)
    sizes = {"stride": config.stride, "size": config.size, "hidden": config.hidden}
    butler = Butler(ButlerConfig.for_model(llama, **sizes)).to(device)
    share = parameters(butler) / parameters(llama)
    survive.note(f"{parameters(butler):,} parameters to train, {share:.2%} of the base model's")

    mixture, log = Mixture(tok, kept, pools("train"), repeats=config.repeats), []
    if survive.rank():
        distil(llama, butler, mixture, config, log)
        return survive.leave()
    windows = texts(Mixture(tok, held, pools("test"), synthetic=0.0), "held out", 16, config.length)
    windows = windows.to(device)
    before = held_out_kl(llama, butler, windows).mean().item()
    survive.note(f"held-out KL before: {before:.3f} a layer")
    distil(llama, butler, mixture, config, log)
    survive.leave()
    layers = held_out_kl(llama, butler, windows)
    kl = layers.mean().item()
    survive.check_loss(log, kl)
    trained = time.perf_counter() - began
    butler.save(config.out, {"config": asdict(config), "kl": kl})
    report = {
        "config": asdict(config), "parameters": parameters(butler), "share": share,
        "kl_before": before, "kl": kl, "kl_layers": layers.tolist(),
        "table": verdict(llama, tok, butler, windows[:4], documents), "loss": log,
        "processes": survive.world(), "training_s": round(trained, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    } | provenance()
    with whole(report_path(config)) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    survive.state_path(config).unlink(missing_ok=True)
    print(f"\n{table(report)}\n\nsaved {config.out} and {report_path(config)}")
    return report


def report_path(config) -> Path:
    return Path(config.report or Path(config.out).with_suffix(".json"))


def table(report: dict) -> str:
    """What the run comes to, for a person; README.md shows that of the shipped butler."""
    lines = ["selector  tokens attended  attention kept  co-reference answers exact  [95 %]"]
    for name, row in report["table"].items():
        e, attended = row["coreference"], "100 %" if name == "dense" else "10 %"
        lines.append(f"{name:8s}  {attended:>15s}  {row['mass_recall']:14.3f}  {e['mean']:26.2f}"
                     f"  [{e['low']:.2f}, {e['high']:.2f}], n = {e['n']}")
    return "\n".join(lines + [
        "",
        f"KL on held-out text, mean of the layers: {report['kl_before']:.3f} before, "
        f"{report['kl']:.3f} after {report['config']['steps']} steps",
        f"{report['parameters']:,} parameters, {report['share']:.2%} of the base model's; "
        f"{report['seconds'] / 60:.1f} minutes, {report['peak_memory_gb']:.1f} GB at most",
        f"{report['hardware']}; commit {report['commit']}, seed {report['config']['seed']}"])


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def check(config) -> None:
    """Everything that can be known to be wrong before anything slow starts."""
    check_device(config.device)
    survive.check_processes(config)
    if survive.rank():
        return
    writable(config.out)
    out, report, state = Path(config.out), report_path(config), survive.state_path(config)
    writable(report)
    writable(state)
    if report.resolve() in (out.resolve(), state.resolve()):
        raise UsageError(f"--report and --out are both {out}")
    if config.resume:
        survive.check_state(config)


if __name__ == "__main__":
    run(main, Config)
