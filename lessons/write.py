"""lessons/write.py - runs the lessons and writes what they say and print into lessons/README.md.

    <!-- l1_attention --> ... <!-- end -->    what is between becomes the docstring of
                                              l1_attention.py, its output and its figure

    python lessons/write.py                   runs all lessons, minutes
    python lessons/write.py --run l1,l5       runs two of them; the others keep their output
    python lessons/write.py --run none        docstrings only
"""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the lessons also run as files

import cli
from cli import UserError, flag
from lessons.figure import ROOT

README = ROOT / "lessons" / "README.md"
PRINTED = "What it prints without flags:\n"
MARKER = re.compile(r"<!-- (l\d_\w+) -->\n(.*?)<!-- end -->", re.S)


def lesson(name: str) -> str:
    """The docstring as Markdown. Its first line becomes a heading."""
    source = cli.read_text(ROOT / "lessons" / f"{name}.py")
    return f"## {ast.get_docstring(ast.parse(source))}\n"


def output(name: str, commit: str) -> str:
    """Runs a lesson -> what it prints and where the numbers are from. Draws its figure."""
    command = [sys.executable, "-m", f"lessons.{name}", "--figure", f"lessons/{name}.svg"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise UserError(f"lessons/{name}.py ended with exit code {done.returncode}")
    *lines, last = done.stdout.splitlines()
    printed = "\n".join(lines).strip()
    hardware = json.loads(last)["hardware"]
    return (f"{PRINTED}\n```\n{printed}\n```\n\n![the figure of this lesson]({name}.svg)\n\n"
            f"{hardware}; commit {commit}: `python -m lessons.{name}`\n")


@dataclass
class Config:
    """Runs the lessons and writes lessons/README.md."""

    run: tuple = flag(("l",), "comma-separated beginnings of the names of lessons to run, or none")


def main(config: Config) -> None:
    commit = cli.provenance()["commit"]  # before a figure changes: the tree is still clean
    text = cli.read_text(README)
    for name, old in MARKER.findall(text):
        if not (ROOT / "lessons" / f"{name}.py").exists():
            continue
        if name.startswith(config.run):
            printed = output(name, commit)
        else:
            printed = old[old.index(PRINTED) :] if PRINTED in old else ""
        start = f"<!-- {name} -->\n"
        text = text.replace(start + old, f"{start}{lesson(name)}\n{printed}")
    with cli.replacing(README) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Config)
