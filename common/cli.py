"""common/cli.py - one dataclass per script: its parser, its errors and its last line.

    fields of a dataclass --flags--> config --main(config)--> result --> one JSON object on stdout

Progress and errors go to stderr. Whatever the user can put right ends with one line and exit code
2, without a traceback.

    python -m common.cli --times 2        a script of four lines, with all of this
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

import torch

from common.errors import Refusal, UsageError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of every script


def flag(default, help: str, kind=None, least=0, most=2**31):
    """A field that is a flag. A default of False makes a switch, a list takes several words, and
    `least` and `most` bound a number."""
    kind = kind or (str if default is None else type(default))
    meta = {"help": help, "kind": bounded(kind, least, most) if kind in (int, float) else kind}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=meta | {"kind": str})
    return field(default=default, metadata=meta)


def names(text: str) -> tuple[str, ...]:
    """`a,b,c` -> ("a", "b", "c"), each once; nothing at all is an error."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise argparse.ArgumentTypeError("names nothing")
    return parts


def bounded(kind, least, most):
    """-> a function: text -> a number of this kind (int or float) from least to most."""
    def number(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:,} to {most:,}")
        return value

    number.__name__ = {int: "whole number", float: "number"}[kind]  # argparse: "invalid ... value"
    return number


def numbers(least=0, most=2**31, kind=int):
    """-> a function: `1,2,3` -> ("1", "2", "3"), numbers from least to most as they stand."""
    number = bounded(kind, least, most)

    def listed(text: str) -> tuple[str, ...]:
        parts = names(text)
        for part in parts:
            number(part)
        return parts

    listed.__name__ = f"list of {number.__name__}s"
    return listed


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage block
        complain(f"{UsageError(message)} (see --help)")


def parse(config_class, arguments=None):
    """Command line -> an instance of the dataclass; flags are its field names in kebab-case."""
    parser = Parser(
        description=config_class.__doc__, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30))
    for f in fields(config_class):
        default = f.default_factory() if f.default is MISSING else f.default  # the flag's own
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if default is False:
            parser.add_argument(name, action="store_true", help=f"{help} (default: off)")
            continue
        shown = ",".join(default) if isinstance(default, tuple | list) else default
        if "(default: " not in help:
            help += f" (default: {'none' if shown in (None, '') else shown})"
        parser.add_argument(name, type=f.metadata["kind"], default=default, help=help,
                            metavar=f.name.split("_")[-1].upper(),
                            nargs="+" if isinstance(default, list) else None)
    return config_class(**vars(parser.parse_args(arguments)))


def known(what: str, given, names) -> None:
    """Raises UsageError for the first of `given` that is none of `names`; `what` they are."""
    if unknown := sorted(set(given) - set(names)):
        raise UsageError(f"unknown {what} {unknown[0]!r}; known: {', '.join(names)}")


def processor(device="cpu") -> str:
    """The kind of processor that a time was taken on, as files in results/ are named."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    half = "-bf16" * torch.cpu._is_avx512_bf16_supported()
    return torch.backends.cpu.get_cpu_capability().lower() + half


def peak_memory() -> float | None:
    """GiB of memory that this process has held at most; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, elsewhere kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def provenance() -> dict:
    """What a number must not travel without: command, hardware, versions and commit."""
    processors = Path("/proc/cpuinfo")  # Linux's alone
    model = processors.exists() and re.search(r"model name\s*: (.*)", processors.read_text())
    cpu = model[1] if model else platform.processor()
    hardware = f"{cpu} ({processor()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    others = {name: version(name) for name in ("transformers", "rouge") if name in sys.modules}
    return {"command": shlex.join(["python", *sys.argv]), "hardware": hardware,
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit
            } | others


def complain(problem) -> None:
    """One line, and the end. What is wrong for one of torchrun's processes is so for all: the first
    of a host speaks and ends them; the others only do so if it does not."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(10)
    print(f"{sys.argv[0]}: error: {problem}", file=sys.stderr, flush=True)
    sys.exit(2)


def run(main, config_class) -> None:
    """What stands under `__main__` of every script. Exit codes: 2 for what the user can put right,
    130 after Ctrl-C, which is told in one line, 141 if nobody reads on (`| head`)."""
    sys.stdout.reconfigure(errors="replace")  # a text may hold what the terminal cannot show
    try:
        try:
            config = parse(config_class)
            result = main(config)
            if result is not None:  # one of torchrun's processes speaks for all
                print(json.dumps({"config": asdict(config)} | result))
        except Refusal as e:
            complain(e)
        except RuntimeError as e:  # PyTorch has a type of its own for a full GPU only
            if "out of memory" not in str(e) and "can't allocate memory" not in str(e):
                raise
            complain(Refusal(f"not enough memory: {e}"))
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as e:
        e.__traceback__ = None  # what ran is given up: its progress bars end their lines
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # Python flushes both once more as it ends
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        sys.exit(141)


if __name__ == "__main__":
    @dataclass
    class Echo:
        """Says a word several times; --help, --times 0 and --timez 2 work as everywhere."""

        word: str = flag("token", "what to say")
        times: int = flag(3, "how often", least=1)

    run(lambda config: print(*[config.word] * config.times) or provenance(), Echo)
