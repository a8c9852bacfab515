"""cli.py - one dataclass per script: its parser, its errors and its last line.

    fields of a dataclass --flags--> config --main(config)--> result --> one JSON object on stdout

Progress and errors go to stderr. Whatever the user can put right ends with one line and exit code
2, without a traceback.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path

import torch

from butler import ButlerError
from tokenizer import TokenizerError
from weights import ModelError


class UsageError(ValueError):
    """A flag, a combination of flags or an input file that makes no sense; one line."""


def flag(default, help: str, kind=None):
    """A field that is a flag. A default of False makes a switch, a list takes several words."""
    meta = {"help": help, "kind": kind or (str if default is None else type(default))}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta | {"kind": kind or str})
    return field(default=default, metadata=meta)


def names(text: str) -> tuple[str, ...]:
    """`a,b,c` -> ("a", "b", "c"), each once; nothing at all is an error."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise argparse.ArgumentTypeError("names nothing")
    return parts


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage block
        complain(f"{message} (see --help)")


def parse(config_class, arguments=None):
    """Command line -> an instance of the dataclass; flags are its field names in kebab-case."""
    text = (config_class.__doc__ or "").strip()
    parser = Parser(description=text, allow_abbrev=False)
    for f in fields(config_class):
        default = f.default_factory() if f.default is MISSING else f.default
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if default is False:
            parser.add_argument(name, action="store_true", help=help)
            continue
        several = {"nargs": "+"} if isinstance(default, list) else {}
        shown = "" if default is None or default == [] else f" (default: {show(default)})"
        parser.add_argument(name, type=f.metadata["kind"], default=default, help=help + shown,
                            metavar=f.name.split("_")[-1].upper(), **several)
    return config_class(**vars(parser.parse_args(arguments)))


def show(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def provenance() -> dict:
    """What a number must not travel without: command, hardware, versions and commit."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo")
                if line.startswith("model name")), platform.processor())
    hardware = f"{cpu}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"command": shlex.join(["python", *sys.argv]), "hardware": hardware,
            "python": platform.python_version(), "torch": torch.__version__, "commit": commit}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def complain(problem) -> None:
    """One line, and the end. What is wrong for one of torchrun's processes is so for all: the first
    of a host speaks and ends them; the others only do so if it does not."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(10)
    print(f"{sys.argv[0]}: error: {problem}", file=sys.stderr, flush=True)
    sys.exit(2)


def run(main, config_class) -> None:
    """What stands under `__main__` of every script."""
    config = parse(config_class)
    try:
        result = main(config)
    except (UsageError, ModelError, ButlerError, TokenizerError) as e:
        complain(e)
    except KeyboardInterrupt:
        sys.exit(130)
    if result is not None:  # one of torchrun's processes speaks for all
        print(json.dumps({"config": asdict(config)} | result), flush=True)
