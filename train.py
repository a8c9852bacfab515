"""train.py - distillation: the butler learns to predict where the frozen base model attends.

    text -> base model, one dense forward -> inputs x, queries q and keys of every layer
        a = mean over a KV head's query heads of softmax(q . k / sqrt(D))
        m = the sum of a over the candidates
    teacher   p = a / m                            on the candidates
    student   b = softmax(importance query . importance key / sqrt(E))     on the candidates
    loss      mean over layers, KV heads and sampled queries of m * KL(p || b)

The candidates of a query are the tokens that a selection can choose from: those between sinks and
window. Weighting by m means that a query which hardly attends to them hardly counts. Only the
butler learns.

The trainer sees the base model through the selector hook (`Recorder`), so a producer reads the same
tensor in training as in decoding. Only a sample of each text's queries enters the loss: queries
close to each other attend to nearly the same tokens, and the softmaxes of all queries would cost
more than the base model's forward. Most steps use short texts, which are cheap. Every fourth step
uses longer texts whose positions have gaps, so that 2,048 tokens cover up to 8,192 positions.

    python train.py                                     the default butler, then a table
    python train.py --model DIR --data TEXT --out FILE  another Llama, your own text
    python train.py --resume                            continue after Ctrl-C
    torchrun --nproc-per-node 2 train.py                several processes or GPUs
"""

import json
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

# Imported before init_process_group, because its default arguments would keep the process group
# alive (an optimizer imports it). A thread that is left can abort the process at exit.
import torch.distributed.nn
from torch.special import entr  # -p log p, and 0 for p = 0
from tqdm import tqdm

import cli
from bench import kept_at_lengths
from butler import Butler, ButlerConfig
from cli import DEVICE, UserError, flag
from data import (
    Mixture,
    default_texts,
    hold_out,
    num_tokens,
    positions_with_gaps,
    read_texts,
    some_of,
)
from kernel import true_attention
from selection import Budget
from synth_task import confidence_interval, coreference_documents, evaluate, every_maker, pools

SAVE_EVERY = 50  # steps


@dataclass
class Config:
    """Trains a butler for a frozen model and compares its selections with the oracle's."""

    model: str = flag(None, "folder, GGUF file or Hub id (default: SmolLM2-135M-Instruct)")
    engine: str = flag("plain", f"what runs the model: {', '.join(cli.ENGINES)}")
    data: list = flag([], "UTF-8 text files or folders to train on (default: this Python's own "
                          "text)")
    out: str = flag("out/butler.safetensors", "where the butler goes; its report goes to the same "
                                              "name with .json behind it")
    steps: int = flag(320, "optimiser steps", at_least=1)
    batch: int = flag(2, "texts per step, over all processes", at_least=1)
    length: int = flag(512, "tokens per text", at_least=64)
    long: int = flag(2048, "tokens of a long text, at most the model's context", at_least=64)
    span: int = flag(8192, "positions over which gaps spread a long text, at most the model's "
                           "context; 0: no gaps")
    long_every: int = flag(4, "every n-th step uses long texts; 0: no step does")
    repeats: int = flag(2, "per 512 tokens: random strings that occur twice in the text")
    rows: int = flag(32, "queries per text that enter the loss of a step", at_least=1)
    reuse: int = flag(8, "steps that use the same batch of texts, each with other queries",
                      at_least=1)
    learning_rate: float = flag(1e-2, "peak learning rate", at_least=1e-9)
    layers_per_producer: int = flag(5, "layers that one producer serves (R)", at_least=1)
    size: int = flag(32, "channels of importance queries and keys (E), a multiple of 4",
                     at_least=4, at_most=1024)
    hidden: int = flag(176, "hidden width of a producer", at_least=1, at_most=2**16)
    rotated_keys: bool = flag(False, "the paper's form: project keys as they are cached")
    windows: int = flag(20, "held-out texts in the final table", at_least=1)
    longest: int = flag(2048, "tokens of each of them, at most the model's context", at_least=64)
    documents: int = flag(60, "co-reference documents in the final table", at_least=1)
    resume: bool = flag(False, "continue from OUT.state, or start where there is none")
    seed: int = flag(0, "seed of initialisation, texts and queries")
    device: str = flag(DEVICE, "cpu or cuda")


# ---------------------------------------------------------------------------- the loss


class Recorder:
    """Stands where a selector stands and records what passes by: the keys of all tokens, and the
    layer inputs and queries of the sampled rows. Three dictionaries by layer.

    rows [N]: the sampled queries, as places in the text. It returns None, so attention is dense.
    """

    def __init__(self, rows):
        self.rows = rows
        self.positions = None  # [T]
        self.x = {}  # [B, N, C]
        self.q = {}  # [B, H, N, D]
        self.keys = {}  # [B, G, S, D], where S = T

    def look_ahead(self, layer, x, positions):
        self.x[layer] = x[:, self.rows]

    def __call__(self, layer, x, q, keys, positions):
        self.look_ahead(layer, x, positions)
        self.positions = positions
        self.q[layer] = q[:, :, self.rows]
        self.keys[layer] = keys
        return None


def record(llama, tokens, rows, positions=None) -> Recorder:
    """One dense forward of the frozen base model over tokens [B, T]."""
    recorder = Recorder(rows)
    with torch.no_grad():
        llama(tokens, None, recorder, positions, last=1)  # the logits are not needed
    return recorder


def distillation(butler, recorder, sample=slice(None), sinks=Budget.sinks,
                 window=Budget.window):
    """The loss of every layer above 0, as defined at the top -> [L-1], with gradients.

    sample: which of the recorded rows to use, as indices into them. The same function is reported
    as "KL on held-out text".
    """
    losses = []
    queries = {}
    rows = recorder.rows[sample]  # [N]
    token = torch.arange(recorder.keys[0].shape[2], device=rows.device)
    candidate = (token >= sinks) & (token <= rows[:, None] - window)  # [N, S]
    # -1e4, not -inf: the teacher's probability is 0 there, and 0 * -inf is NaN
    masked = torch.where(candidate, 0.0, -1e4)
    # From layer 0 upwards: a producer's queries are made before the layers that need them.
    for layer, x in sorted(recorder.x.items()):
        queries |= butler.importance_queries(layer, x[:, sample], recorder.positions[rows])
        if layer == 0 or layer not in recorder.keys:
            continue
        keys = recorder.keys[layer]
        with torch.no_grad():
            q = recorder.q[layer][:, :, sample]
            # The queries are not the last tokens, so true_attention must know their places.
            a = true_attention(q, keys, rows).mean(2) * candidate  # [B, G, N, S]
            m = a.sum(-1)
            # m * sum(p log p), with p = a / m, written without the division: m may be 0
            teacher = entr(m) - entr(a).sum(-1)
        importance_keys = butler.importance_keys(layer, keys, recorder.positions)
        scores = butler.scores(queries[layer], importance_keys)
        log_b = (scores + masked).log_softmax(dim=-1)
        losses.append((teacher - torch.linalg.vecdot(a, log_b)).mean())
    return torch.stack(losses)


# ---------------------------------------------------------------------------- the loop


def training_loop(llama, butler, mixture, config) -> list[float]:
    """Trains the butler in place -> the loss of every step. After Ctrl-C the step is finished, the
    state is saved and KeyboardInterrupt raised."""
    optimizers = make_optimizers(butler, config.learning_rate)
    losses = load_state(config, butler, optimizers, mixture) if config.resume else []
    batches = Batches(llama, mixture, config)
    bar = tqdm(range(len(losses), config.steps), initial=len(losses), total=config.steps,
               file=sys.stderr, disable=rank() > 0)
    with ctrl_c_noted() as pressed:
        for step in bar:
            try:
                recorder, sample = batches.of_step(step)
                loss = distillation(butler, recorder, sample).mean()
                loss.backward()
            except (MemoryError, RuntimeError):  # PyTorch's way to say that memory is missing
                if len(losses) % SAVE_EVERY:  # the butler still is as the last step left it
                    save_state(config, butler, optimizers, mixture, losses)
                note(f"stopped after {len(losses)} of {config.steps} steps")
                raise
            if not loss.isfinite():
                raise UserError(f"training diverges at step {step}: try a lower --learning-rate")
            average_over_processes([p.grad for p in butler.parameters()] + [loss.detach()])
            torch.nn.utils.clip_grad_norm_(butler.parameters(), 10.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * schedule(step, config.steps)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"KL {losses[-1]:.3f}", refresh=False)
            if pressed or step % SAVE_EVERY == SAVE_EVERY - 1:
                save_state(config, butler, optimizers, mixture, losses)
            if pressed:
                note(f"stopped after {len(losses)} of {config.steps} steps; --resume continues")
                raise KeyboardInterrupt
    return losses


class Batches:
    """Two streams of batches: short texts and long texts.

    The base model reads each batch once, and the batch is then used for `reuse` steps, with other
    sampled rows at every step, because that forward costs more than the rest of a step. Step n sees
    the same texts and rows in every run with the same flags, so a resumed run repeats nothing.
    """

    def __init__(self, llama, mixture, config):
        self.llama = llama
        self.mixture = mixture
        self.config = config
        self.latest = {}  # {"short" or "long": (the number of its latest batch, its Recorder)}

    def of_step(self, step: int):
        """-> the Recorder of the batch that step `step` uses, and the indices of the step's rows
        among its recorded rows."""
        c = self.config
        long_steps = step // c.long_every if c.long_every else 0  # before this one
        if c.long_every and step % c.long_every == c.long_every - 1:
            stream = "long"
            earlier_steps = long_steps
            length = min(c.long, self.llama.config.context)
            span = min(c.span, self.llama.config.context)
        else:
            stream = "short"
            earlier_steps = step - long_steps
            length = min(c.length, self.llama.config.context)
            span = 0
        number = earlier_steps // c.reuse
        if self.latest.get(stream, (None, None))[0] != number:
            self.latest.pop(stream, None)  # frees the memory of the batch before
            recorder = self.read(stream, number, length, span)
            self.latest[stream] = number, recorder
        recorder = self.latest[stream][1]
        first = earlier_steps % c.reuse
        return recorder, torch.arange(first, len(recorder.rows), c.reuse, device=self.llama.device)

    def read(self, stream: str, number: int, length: int, span: int) -> Recorder:
        """The base model reads batch `number` of a stream; this process reads its share of it."""
        c = self.config
        seed = f"{c.seed} {length} {number}"
        if stream == "long" and length == c.length:
            seed += " long"  # otherwise both streams would have the same texts
        rows = random.Random(seed).sample(range(length), min(c.reuse * c.rows, length))
        share = range(rank() * c.batch // world(), (rank() + 1) * c.batch // world())
        texts = [self.mixture.window(f"{seed} {i}", length) for i in share]
        positions = positions_with_gaps(random.Random(f"{seed} gaps"), length, span)
        device = self.llama.device
        return record(self.llama, torch.tensor(texts).to(device), torch.tensor(rows).to(device),
                      positions.to(device))


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a cosine from 1 to 0, multiplied by a linear warm-up during
    the first 5 % of the steps."""
    warm_up = min(1, (step + 1) / (0.05 * steps))
    return warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is made orthogonal (Muon, Keller Jordan 2024), for matrices.

    Why not torch.optim.Muon: it computes in bfloat16. On a processor without bfloat16 it took 0.8
    of the 1.0 seconds of a training step. This one computes in float32.
    """

    def __init__(self, matrices, learning_rate: float):
        super().__init__(matrices, {"lr": learning_rate})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                direction = p.grad.lerp(momentum, 0.95)  # Nesterov's momentum
                # With this factor a step is about as long as one of AdamW's at the same rate.
                scale = 0.2 * max(p.shape) ** 0.5
                p -= group["lr"] * scale * orthogonal(direction)


def orthogonal(matrix):
    """A matrix with the same singular vectors and singular values near 1 (0.7 to 1.2), by five
    Newton-Schulz iterations."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide is matrix else x.T


def make_optimizers(butler, learning_rate: float) -> list:
    """Muon for the producers' matrices, AdamW for key projections and norms."""
    matrices = [p for p in butler.parameters() if p.ndim == 2]
    others = [p for p in butler.parameters() if p.ndim != 2]
    return [Muon(matrices, learning_rate),
            torch.optim.AdamW(others, learning_rate, weight_decay=0.0)]


# ---------------------------------------------------------------------------- the final table


def held_out_kl(llama, butler, windows):
    """The loss of each layer above 0 on held-out texts [n, T], every fourth query -> [L-1]"""
    rows = torch.arange(3, windows.shape[1], 4, device=windows.device)
    with torch.no_grad():
        return torch.stack([distillation(butler, record(llama, window[None], rows))
                            for window in windows]).mean(0)


def fitting_documents(llama, tok, n: int, seed: int) -> list:
    """Co-reference documents of 250 words, or of fewer where the model's context is short."""
    for words in (250, 125, 62):
        documents = coreference_documents("test", n, seed, words=words)
        longest = max(sum(map(len, document.encode(tok))) for document in documents)
        if longest <= llama.config.context:
            return documents
    raise UserError(f"the model's context of {llama.config.context} tokens is too short for the "
                    f"final table, whose documents have {longest} tokens")


def final_table(llama, tok, butler, windows, documents) -> dict:
    """Every selector at 10 % of the tokens -> {selector: {"coreference": share of right answers,
    "kept": {length: share of the attention kept at the end of texts of that length}}}, where the
    texts are windows [n, T] and their first 512 tokens."""
    names = ("dense", "oracle", "butler", "recency", "random")
    makers = every_maker(names, ("0.1",), butler)
    right = evaluate(llama, tok, documents, makers, title="co-reference")
    contexts = {min(512, windows.shape[1]), windows.shape[1]}
    kept = {("dense", context): [1.0] * len(windows) for context in contexts}
    selecting = {key: make for key, make in makers.items() if key[0] != "dense"}
    for window in tqdm(windows, "attention kept", file=sys.stderr):
        for context, (name, _), probe, _ in kept_at_lengths(llama, window, contexts, selecting):
            kept.setdefault((name, context), []).append(probe.mean())
    table = {}
    for name, budget in makers:
        table[name] = {"coreference": right[name][budget],
                       "kept": {str(c): confidence_interval(kept[name, c])
                                for c in sorted(contexts)}}
    return table


def print_table(report: dict) -> None:
    """The selectors' scores, then one sentence about the butler."""
    contexts = list(report["table"]["dense"]["kept"])
    texts = report["table"]["dense"]["kept"][contexts[0]]["n"]
    documents = report["table"]["dense"]["coreference"]["n"]
    width = 16 * len(contexts)
    heads = "".join(f"{f'{int(context):,} tokens':>16s}" for context in contexts)
    print(f"\n{'':18s}{f'attention kept, {texts} texts of':>{width}s}     co-reference right,")
    print(f"selector  attended{heads}     {documents} documents")
    for name, row in report["table"].items():
        m = row["coreference"]
        shares = "".join(f"{row['kept'][context]['mean']:16.3f}" for context in contexts)
        print(f"{name:8s}  {'100 %' if name == 'dense' else '10 %':>8s}{shares}     "
              f"{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}]")
    kept = {name: report["table"][name]["kept"][contexts[-1]]["mean"]
            for name in ("butler", "oracle")}
    minutes, in_all = report["training_s"] / 60, report["seconds"] / 60
    print(f"\nAfter {minutes:.1f} minutes of training ({in_all:.1f} in all) the butler, "
          f"{report['share']:.2%} of the model's size,\nkeeps "
          f"{kept['butler'] / kept['oracle']:.1%} of what the oracle keeps at "
          f"{int(contexts[-1]):,} tokens; it is in {report['config']['out']}.")


# ---------------------------------------------------------------------------- the script


def num_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def check(config) -> None:
    """Refuses early what would fail late."""
    cli.check_device(config.device)
    if config.out.encode(errors="ignore").decode() != config.out:
        raise UserError(f"--out {config.out!r} is not UTF-8: safetensors could not read the butler")
    for end in ("", ".json", ".state"):
        cli.check_writable(config.out + end)
    check_unfinished(config)
    if config.size % 4:
        raise UserError(f"--size {config.size} is no multiple of 4")
    if config.reuse > min(config.length, config.long if config.long_every else config.length):
        raise UserError(f"--reuse {config.reuse}: a text has fewer tokens than that")
    if config.batch % world():
        raise UserError(f"--batch {config.batch} does not divide among {world()} processes")


def sources(config) -> list[dict[str, str]]:
    """The texts to train on and to hold out from, {name: text} by source."""
    if not config.data:
        return default_texts()
    texts, skipped = read_texts(config.data)
    if skipped:
        note(f"skipped, because not UTF-8 text files: {some_of(skipped)}")
    note(f"read {len(texts):,} files, {sum(map(len, texts.values())):,} characters")
    return [texts]


def check_amount(config, context: int, training: int, held_out: int) -> None:
    """training, held_out: numbers of tokens. Raises UserError if that is less than one window."""
    trained = max(config.length, config.long if config.long_every else 0)
    measured = max(config.length, config.longest)
    for tokens, use, length, flags in (
            (training, "to train on", trained, "--length, --long"),
            (held_out, "in the held-out part", measured, "--length, --longest")):
        if tokens < min(length, context):
            raise UserError(f"--data: too little text: there are {tokens:,} tokens {use}, and a "
                            f"window has {min(length, context):,} ({flags})")


def main(config: Config) -> dict | None:
    """-> the report, or None in all processes but the first."""
    check(config)
    begin = time.perf_counter()
    training, held_out = zip(*map(hold_out, sources(config)), strict=True)
    device = config.device
    if world() > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        dist.init_process_group()
    torch.manual_seed(config.seed)
    llama, tok, _ = cli.engine(config.engine).load(config.model, None, device)
    sizes = {name: getattr(config, name)
             for name in ("layers_per_producer", "size", "hidden", "rotated_keys")}
    butler = Butler(ButlerConfig.for_model(llama, **sizes)).to(device)
    share = num_parameters(butler) / num_parameters(llama)
    note(f"{num_parameters(butler):,} parameters to train, {share:.2%} of the base model's")
    if config.data:
        amounts = [num_tokens(tok, source) for source in (training[0], held_out[0])]
        note(f"about {amounts[0]:,} tokens to train on, {amounts[1]:,} held out")
        check_amount(config, llama.config.context, *amounts)
    mixture = Mixture(tok, training, pools("train"), repeats=config.repeats)

    documents = fitting_documents(llama, tok, config.documents, config.seed)
    unseen = Mixture(tok, held_out, pool=None, synthetic=0.0)

    def held_out_windows(n: int, length: int):
        length = min(length, llama.config.context)
        ids = [unseen.window(f"held out {length} {i}", length) for i in range(n)]
        return torch.tensor(ids, device=device)

    short = held_out_windows(16, config.length)
    kl_before = held_out_kl(llama, butler, short).mean().item()
    start = time.perf_counter()
    losses = training_loop(llama, butler, mixture, config)
    if dist.is_initialized():
        dist.destroy_process_group()  # the first process finishes alone
    if rank() > 0:
        return None
    training_s = time.perf_counter() - start
    kl_layers = held_out_kl(llama, butler, short)
    butler.save(config.out, {"config": asdict(config), "kl": kl_layers.mean().item()})
    table = final_table(llama, tok, butler, held_out_windows(config.windows, config.longest),
                        documents)
    report = {
        "parameters": num_parameters(butler), "share": share, "kl_before": kl_before,
        "kl": kl_layers.mean().item(), "kl_layers": kl_layers.tolist(), "table": table,
        "processes": world(), "fingerprint": butler.config.fingerprint,
        "training_s": round(training_s, 1), "seconds": round(time.perf_counter() - begin, 1)}
    # The file also has the loss of every step, which would fill a screen.
    whole = {"config": asdict(config)} | report | {"loss": losses} | cli.provenance()
    with cli.replacing(f"{config.out}.json") as part:
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    Path(f"{config.out}.state").unlink(missing_ok=True)
    print_table(whole)
    return report


# ---------------------------------------------------------------------------- several processes


def rank() -> int:
    """This process's number, as torchrun counts; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def average_over_processes(tensors: list) -> None:
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world()


def note(text: str) -> None:
    """A line on stderr, by the first process alone."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------- resuming


@contextmanager
def ctrl_c_noted():
    """Ctrl-C inside the block raises nothing -> a list that is empty until it is pressed, so that
    training can stop between two steps."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def identity(config, butler, mixture) -> dict:
    """What must be the same when a run is resumed: what the next step depends on. Paths, engine and
    device may differ. A run that diverged may be resumed with a lower
    learning rate."""
    free = ("model", "engine", "data", "out", "windows", "longest", "documents", "resume", "device",
            "learning_rate")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    return settings | {"base model": butler.config.fingerprint, "text": mixture.digest()}


def check_unfinished(config) -> None:
    """Raises UserError if OUT.state would be lost."""
    path = Path(f"{config.out}.state")
    if path.exists() and not config.resume:
        raise UserError(f"{path} belongs to a run that has not finished: --resume continues it; to "
                        "start anew, delete it")


def save_state(config, butler, optimizers, mixture, losses) -> None:
    """Writes OUT.state: everything that the next step depends on."""
    if rank() > 0:
        return
    if len(losses) <= SAVE_EVERY:  # the first time: another run may have the same --out
        check_unfinished(config)
    state = {"identity": identity(config, butler, mixture), "losses": losses,
             "butler": butler.state_dict(),
             "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    with cli.replacing(f"{config.out}.state") as part:
        torch.save(state, part)


def load_state(config, butler, optimizers, mixture) -> list[float]:
    """Loads OUT.state into butler and optimizers -> the losses of the steps so far. Raises
    UserError for the state of another run."""
    path = Path(f"{config.out}.state")
    if not path.exists():
        note(f"there is no {path}: training starts from the beginning")
        return []
    with cli.one_line(f"{path}: unusable state", Exception):
        state = torch.load(path, weights_only=True)
        for key, value in identity(config, butler, mixture).items():
            saved = state["identity"].get(key)
            if saved != value:
                raise UserError(f"it belongs to another run: {key} was {saved}, now it is {value}")
        butler.load_state_dict(state["butler"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["losses"]


if __name__ == "__main__":
    cli.run(main, Config)
