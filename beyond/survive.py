"""beyond/survive.py - a training run that outlives what stops it, and spreads over processes.

    torchrun --nproc-per-node N    each process takes its share of the texts; mean of the gradients
    every step                     loss no number, or 10 times the first ones? -> one line, the end
    every --save-every seconds     butler, optimisers, losses -> OUT.state
    SIGINT, SIGTERM                the same, then the end; a second SIGINT does not wait for it
    --resume                       OUT.state -> the next step

A state is written beside the old one and then takes its place, so that a run killed at any moment
leaves a whole one behind, or none. It holds all that the next step depends on: on a CPU, a run that
was killed and resumed ends with the very weights of one that was not, whenever states were saved.
Weights are saved when the next step has found their loss to be sound. The first process alone reads
the state, writes files and speaks; all stop together.

    python -m beyond.survive        what the state of a run holds
"""

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from butler import SHIPPED, Butler
from common.errors import UsageError, in_one_line
from common.files import replacing

# ---------------------------------------------------------------------------- several processes


def rank() -> int:
    """This process's number in the whole run, as torchrun counts; 0 where nothing was spread."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes in the run, on all hosts together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> str:
    """Meets the other processes that torchrun started, if it did -> the device of this one. Gloo
    carries what lies on the CPU, NCCL what lies on GPUs."""
    if "RANK" in os.environ:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group()
    return device


def leave() -> None:
    """From here on this process works alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_processes(config) -> None:
    """UsageError, one line, for a run that cannot be shared as torchrun wants it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if config.batch % world():
        raise UsageError(f"--batch {config.batch} does not divide among {world()} processes")
    if world() > 1 and config.device.startswith("cuda") and (
            config.device != "cuda" or torch.cuda.device_count() < local):
        raise UsageError(f"{local} processes on a host take --device cuda and as many GPUs, "
                         f"not {config.device} and {torch.cuda.device_count()}")


def average(tensors: list) -> None:
    """Gives each tensor its mean over all processes, in one message."""
    if dist.is_initialized():
        flat = parameters_to_vector(tensors)
        dist.all_reduce(flat)
        vector_to_parameters(flat / world(), tensors)


def most(number: int) -> int:
    """The largest of the numbers that the processes give. All wait here for the last one."""
    box = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def host_first(make):
    """What `make()` returns, called by one process of each host before the others: it may
    download."""
    others = int(os.environ.get("LOCAL_RANK", 0)) > 0
    result = None if others else make()
    most(0)
    return make() if others else result


def note(text: str) -> None:
    """A line on stderr, above the progress bar; the first process's alone."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


# ---------------------------------------------------------------------------- the state


MOMENTS = {"Muon": ("momentum_buffer",),
           "AdamW": ("step", "exp_avg", "exp_avg_sq")}  # what each optimiser keeps of a parameter


def state_path(config) -> Path:
    return Path(config.out + ".state")


def identity(config) -> str:
    """The settings that must be the same when a run goes on. A lower learning rate may rescue one
    that diverged; how many processes share the work is free as well."""
    free = ("resume", "out", "report", "documents", "windows", "longest", "save_every",
            "learning_rate")
    return json.dumps({k: v for k, v in asdict(config).items() if k not in free})


def state(butler, optimizers, log: list) -> dict:
    """All that the next step depends on -> {"what parameter": tensor on the CPU}. `log` holds the
    loss of every step so far; its length is the number of the next one."""
    tensors = {"log loss": torch.tensor(log, dtype=torch.float64)}
    for name, p in butler.named_parameters():
        tensors[f"weight {name}"] = p.detach().cpu()
        for optimizer in optimizers:
            moments = optimizer.state.get(p, {})
            tensors |= {f"{key} {name}": value.cpu() for key, value in moments.items()}
    return tensors


def read(path) -> tuple[dict, dict]:
    """A state -> its metadata, its tensors. UsageError, one line, for a damaged file."""
    with (in_one_line(UsageError, path, "unreadable state", RuntimeError),
          safe_open(path, framework="pt") as f):
        return f.metadata() or {}, {entry: f.get_tensor(entry) for entry in f.keys()}


def check_state(config) -> None:
    """UsageError, one line, if --resume cannot go on from what lies at OUT.state, or if the run
    has ended. Where neither is there it was stopped early, and starts from the beginning."""
    path = state_path(config)
    if path.exists():
        if read(path)[0].get("run") != identity(config):
            raise UsageError(f"{path} belongs to a run with other settings")
    elif Path(config.out).exists():
        raise UsageError(f"nothing to resume: {config.out} is trained, its state is gone; "
                         "without --resume it is trained anew")


def begin(butler, optimizers, config, log: list, text: str) -> int:
    """Puts every process where the first one is: at the beginning or, to resume, where OUT.state
    ends -> the step to go on with. A state of another base model is refused, and one whose
    training text had another digest."""
    path, entries = state_path(config), state(butler, optimizers, log)
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    parameters = dict(butler.named_parameters())
    if config.resume and not path.exists():
        note(f"no {path} to resume: training begins anew")
    elif config.resume and rank() == 0:
        metadata, entries = read(path)
        if metadata.get("butler") != json.dumps(asdict(butler.config)):
            raise UsageError(f"{path} belongs to a run with another base model")
        if metadata.get("text") != text:
            raise UsageError(f"{path} belongs to a run on other text: what it was trained on has "
                             "changed since")
        steps = entries.get("log loss", torch.empty(0)).numel()
        shapes = {"log loss": (steps,)}
        for name, p in parameters.items():
            for key in ("weight", *(MOMENTS[type(owners[p]).__name__] if steps else ())):
                shapes[f"{key} {name}"] = () if key == "step" else p.shape
        counts = [value for entry, value in entries.items() if entry.startswith("step ")]
        if {e: v.shape for e, v in entries.items()} != shapes or any(n != steps for n in counts):
            raise UsageError(f"{path}: not all of a state, or not of this butler")
    box = [entries]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    log[:] = box[0].pop("log loss").double().tolist()
    for entry, value in box[0].items():
        key, name = entry.split(" ")
        p = parameters[name]
        if key == "weight":
            p.data.copy_(value)
        else:
            owners[p].state[p][key] = value.to(p.device)
    return len(log)


# ---------------------------------------------------------------------------- every step


def check_loss(log: list, loss: float) -> None:
    """UsageError, one line, when training has failed: a loss that is no number, or whose mean over
    10 steps is more than 10 times that of the first 10. Those saw an untrained butler: what
    training does to it, even badly, stays far below."""
    start, recent = sum(log[:10]) / 10, sum([*log[-9:], loss]) / 10
    if not math.isfinite(loss) or (len(log) >= 10 and recent > 10 * start):
        raise UsageError(f"training diverges: the loss is {loss:.3g} at step {len(log)}; the state "
                         "saved last stays, --resume with a lower --learning-rate may go on")


class Guard:
    """Around the loop: saves on a timer and, when a signal asks for the end, saves and leaves."""

    def __init__(self, butler, optimizers, config, log, text: str):
        self.butler, self.optimizers, self.config, self.log = butler, optimizers, config, log
        self.signal = 0
        self.metadata = {"run": identity(config), "butler": json.dumps(asdict(butler.config)),
                         "text": text}

    def __enter__(self):
        self.before = {s: signal.signal(s, self.heed) for s in (signal.SIGINT, signal.SIGTERM)}
        self.saved = time.monotonic()
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is SystemExit:  # here, where the progress bar is closed
            note(f"stopped after {len(self.log)} of {self.config.steps} steps; the same command "
                 "with --resume goes on")

    def heed(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process

    def keep(self) -> None:
        """Between two steps. A signal to any process ends all, with exit code 128 + its number."""
        number = most(self.signal)
        if number or time.monotonic() - self.saved >= self.config.save_every:
            self.save()
        if number:
            sys.exit(128 + number)

    def save(self) -> None:
        """Writes OUT.state; where that fails, the one before stays, and training need not stop."""
        if rank() == 0:
            tensors = state(self.butler, self.optimizers, self.log)
            try:
                with replacing(state_path(self.config)) as part:
                    part.write_bytes(save(tensors, self.metadata))
            except UsageError as e:
                note(f"warning: {e}; what was saved before stays")
        self.saved = time.monotonic()


if __name__ == "__main__":
    butler = Butler.load(SHIPPED).requires_grad_(True)
    matrices = [p for p in butler.parameters() if p.ndim == 2]
    others = [p for p in butler.parameters() if p.ndim != 2]
    optimizers = [torch.optim.SGD(matrices, momentum=0.95), torch.optim.AdamW(others)]
    sum(p.sum() for p in butler.parameters()).backward()
    for optimizer in optimizers:
        optimizer.step()
    tensors = state(butler, optimizers, [3.1, 3.0])
    for entry in list(tensors)[:5]:
        print(f"{entry:40s} {list(tensors[entry].shape)}")
    size, own = (sum(t.nbytes for t in part) for part in (tensors.values(), butler.parameters()))
    print(f"... {len(tensors)} tensors, {size / 1e6:.1f} MB: {size / own:.1f} times the weights")
