"""cli.py - what every script shares: flags in, one JSON line out, one line for an error.

    a dataclass --parse--> flags --main(config)--> a report --run--> one JSON object on stdout

Each script declares one dataclass. Its fields are the flags, so `--max-new-tokens` is the field
`max_new_tokens`. `run` calls the script's `main`, prints its report as the last line on stdout and
turns every `UserError` into one line on stderr and exit code 2. A terminal does not get the JSON
line: a person has read the same in the table above it.

    python sample.py --budget x        shows such an error
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

DEVICE = "cpu"  # the default of --device; a GPU only after the scripts have been measured on one
ENGINES = {"plain": "butler", "fast": "fast", "transformers": "workshop.transformers"}
RENAMED = {"--stride": "--layers-per-producer", "--drifts": "--drift"}  # flags of earlier versions


class UserError(ValueError):
    """Something that the user can put right, told in one line of at most 500 characters."""

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= 500 else f"{line[:200]} ... {line[-290:]}")


# What a damaged file may raise while it is read. RuntimeError: PyTorch's wrong shapes and memory.
DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError,
          RuntimeError, ImportError)


# How PyTorch's RuntimeError and the system's OSError tell that memory is missing.
NO_MEMORY = re.compile("out of memory|(can't|cannot) allocate|bad_?alloc|alloc_failed|new thread",
                       re.IGNORECASE)


def out_of_memory(error) -> bool:
    by_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return by_type or bool(NO_MEMORY.search(str(error)))


def reason(error) -> str:
    """An exception as one phrase: its kind and its message."""
    kind = "not enough memory" if out_of_memory(error) else type(error).__name__
    return f"{kind}: {str(error) or repr(error)}"


@contextmanager
def one_line(what: str, *more):
    """Whatever a damaged file raises inside becomes one UserError that starts with `what`.
    more: further types of exceptions."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from None
    except (*DAMAGE, *more) as e:
        raise UserError(f"{what}: {reason(e)}") from None


# ---------------------------------------------------------------------------- flags


def flag(default, help: str, at_least=0, at_most=2**31):
    """A dataclass field that is a flag. False makes a switch, a list takes several words, a tuple
    takes comma-separated words, None is an optional text; the bounds are for numbers."""
    meta = {"help": help, "at_least": at_least, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


def comma_separated(text: str) -> tuple[str, ...]:
    """`a,b,a` -> ("a", "b")"""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise argparse.ArgumentTypeError("is empty")
    return words


def bounded(kind, at_least, at_most):
    """-> a function from text to a number of this kind (int or float) within bounds."""
    def number(text: str):
        value = kind(text)
        if not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(f"{text} is not from {at_least:,} to {at_most:,}")
        return value

    number.__name__ = {int: "whole number", float: "number"}[kind]  # argparse's own message
    return number


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of argparse's usage block."""
        raise UserError(f"{message} (see --help)")


def parse(config_class, arguments=None):
    """Command line (default: this process's) -> an instance of the dataclass."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        if new := RENAMED.get(word.split("=")[0]):
            raise UserError(f"{word.split('=')[0]} is now {new}")
    parser = Parser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        default = f.default_factory() if f.default is MISSING else f.default
        name = "--" + f.name.replace("_", "-")
        help = f.metadata["help"].replace("%", "%%")
        if default is False:
            parser.add_argument(name, action="store_true", help=help)
            continue
        kind = type(default)
        if kind in (int, float):
            kind = bounded(kind, f.metadata["at_least"], f.metadata["at_most"])
        elif kind is tuple:
            kind = comma_separated
        else:
            kind = str
        shown = ",".join(default) if isinstance(default, tuple) else default
        if shown not in (None, "", []) and "(default" not in help:
            help += f" (default: {shown})"
        nargs = "+" if isinstance(default, list) else None
        parser.add_argument(name, type=kind, default=default, help=help, nargs=nargs,
                            metavar=f.name.split("_")[-1].upper())
    return config_class(**vars(parser.parse_args(arguments)))


def numbers(words, kind=int, what="number") -> list:
    """Words of a comma-separated flag -> positive numbers. Raises UserError."""
    try:
        values = [kind(word) for word in words]
    except ValueError:
        raise UserError(f"{what}: {','.join(words)} are not all numbers") from None
    if not all(value > 0 for value in values):
        raise UserError(f"{what}: {','.join(words)} are not all positive")
    return values


def known(what: str, name: str, names) -> None:
    """Raises UserError if `name` is none of `names`; `what` says what they are."""
    if name not in names:
        raise UserError(f"unknown {what} {name!r}; known: {', '.join(names)}")


# ---------------------------------------------------------------------------- plugging in


def plug_in(module: str):
    """Imports a module of fast/ or workshop/, which the course can do without. Raises UserError."""
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        raise UserError(f"this needs {module}, which cannot be imported: {e}") from None


def engine(name: str):
    """--engine -> a module with the function load(model, butler, device); see butler.py's."""
    known("engine", name, ENGINES)
    return plug_in(ENGINES[name])


# ---------------------------------------------------------------------------- files


def read_text(path, errors="strict") -> str:
    """A UTF-8 text file, without a byte order mark. Raises UserError."""
    with one_line(f"cannot read {path}"):
        parts = []
        try:
            with open(path, encoding="utf-8-sig", errors=errors) as f:
                # In parts: a large file of another kind is noticed early.
                while part := f.read(2**20):
                    if "\0" in part:  # as in UTF-16 without a byte order mark
                        raise UserError("it is not UTF-8 text")
                    parts.append(part)
        except UnicodeDecodeError:
            raise UserError("it is not UTF-8 text") from None
    return "".join(parts)


def file_to_write(path) -> Path:
    """The file that `path` names or, as a link, points to. Makes its folder."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"  # a device, which root could replace
        raise UserError(f"it is {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def part_of(path: Path) -> Path:
    """A temporary name beside `path`, different for every process."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def replacing(path):
    """Gives a temporary path and, after the block, moves it to `path`: neither an interrupted write
    nor a full disk leaves half a file. A file that was there keeps its permissions, and a link
    stays a link. Raises UserError where nothing can be written."""
    with one_line(f"cannot write {path}"):
        path = file_to_write(path)
        part = part_of(path)
        try:
            part.touch()
            mode = (path if path.exists() else part).stat().st_mode
            yield part
            with part.open("r+b") as f:  # Windows does not sync what is open for reading only
                os.fsync(f.fileno())
            part.chmod(mode)  # safetensors makes files that only their owner can read
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def check_writable(path) -> None:
    """Raises UserError at once if a script could not write `path` at its end."""
    with one_line(f"cannot write {path}"):
        part = part_of(file_to_write(path))
        part.touch()
        part.unlink()


# ---------------------------------------------------------------------------- running


def check_device(device: str) -> None:
    """Raises UserError if PyTorch cannot compute there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"device {device!r} cannot be used here") from None
    if torch.device(device).type != "cpu":
        say_not_measured(torch.device(device).type)


@cache
def say_not_measured(kind: str) -> None:
    """Once for each kind of device."""
    print(f"--device {kind}: not measured yet; every published number is from a CPU",
          file=sys.stderr)


def processor(device="cpu") -> str:
    """The kind of processor, as result files are named: avx2, avx512-bf16, nvidia-h200 ..."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability + "-bf16" * torch.cpu._is_avx512_bf16_supported()


def provenance() -> dict:
    """What a number must not travel without: command, hardware, versions and commit."""
    info = Path("/proc/cpuinfo")  # Linux only
    model = info.exists() and re.search(r"model name\s*: (.*)", info.read_text("utf-8", "replace"))
    hardware = f"{model[1] if model else platform.processor()} ({processor()})"
    hardware += f", {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=9"]
    try:
        commit = subprocess.run(git, capture_output=True, check=True, encoding="utf-8",
                                errors="replace").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"command": shlex.join(["python", *sys.argv]), "hardware": hardware, "commit": commit,
            "python": platform.python_version(), "torch": torch.__version__}


def open_streams() -> None:
    """A standard stream that was closed (`>&-`) is None in Python; it becomes one that discards
    everything. Descriptors 0 to 2 are filled too; otherwise the next file that is opened would
    receive what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack a character


def end(code: int, line="") -> None:
    """Ends the process, with a line on stderr. A stream that cannot be written is redirected to
    /dev/null; otherwise Python flushes it at exit and prints a traceback."""
    with suppress(OSError):
        if line:
            print(f"{sys.argv[0]}: {line}", file=sys.stderr)
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def run(main, config_class) -> None:
    """What stands under `__main__` of every script. Exit codes: 2 for a UserError, for too little
    memory and for what the system refuses, such as a write to a full disk, 130 after Ctrl-C, 141
    when nobody reads stdout any more (`| head`)."""
    open_streams()
    try:
        try:
            config = parse(config_class)
            report = main(config)
            # Of several processes only the first one reports.
            if report is not None and not sys.stdout.isatty():
                print(json.dumps({"config": asdict(config)} | report | provenance()))
        finally:
            sys.stdout.flush()  # raises here if stdout cannot be written
    except UserError as e:
        end(2, f"error: {e}")
    except KeyboardInterrupt:
        end(130, "interrupted")
    except BrokenPipeError:
        end(141)
    except (OSError, RuntimeError, MemoryError) as e:
        if isinstance(e, RuntimeError) and not out_of_memory(e):
            raise
        end(2, f"error: {UserError(reason(e))}")
