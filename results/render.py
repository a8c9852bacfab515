"""results/render.py - writes the tables of the two READMEs from the JSON files in this folder.

    <!-- results/NAME.json --> ... <!-- end -->      what stands between is replaced

and draws the figures (results/draw.py), if matplotlib is installed.

    python results/render.py
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import ablate
import compare
import draw
import torch

import speed
import speed_offload
import train
from cli import parse
from selection import Selector, allowance

ALWAYS = Selector.SINKS + Selector.WINDOW


def cell(m: dict, form=".2f") -> str:
    return f"{m['mean']:{form}} [{m['low']:{form}}, {m['high']:{form}}]"


def grid(rows: dict, head: str) -> list[str]:
    """{row: {column: text}} -> aligned lines; a cell that is missing stays empty."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    wide = {c: max(len(c), *(len(row.get(c, "")) for row in rows.values())) for c in columns}
    first = max(len(head), *map(len, rows))
    lines = [f"{head:{first}s}  " + "  ".join(f"{c:>{wide[c]}s}" for c in columns)]
    lines += [f"{name:{first}s}  " + "  ".join(f"{row.get(c, ''):>{wide[c]}s}" for c in columns)
              for name, row in rows.items()]
    return [line.rstrip() for line in lines]


def percent(budget: str) -> str:
    if budget == "1.0":  # dense
        return "all"
    return f"{float(budget):.0%}" if float(budget) <= 1 else f"{budget} tokens"


def measures(report: dict):
    """-> (task or measure, selector, budget, mean with its interval), one after the other"""
    for what, table in report["results"].items():
        for name, by in table.items():
            for budget, m in by.items():
                yield what, name, budget, m


def source(report: dict) -> str:
    n = sorted({m["n"] for *_, m in measures(report)})
    return (f"\nn = {', '.join(map(str, n))}; {report['hardware']}; commit {report['commit']}\n"
            f"{report['command']}")


def accuracy(report: dict) -> str:
    """Selectors down, tasks and budgets across."""
    rows, several = {}, len(report["results"]) > 1
    for task, name, budget, m in measures(report):
        share = percent(budget)
        rows.setdefault(name, {})[f"{task} {share}" if several else share] = cell(m)
    return "\n".join([*grid(rows, "selector"), source(report)])


def tasks(report: dict) -> str:
    """Tasks down, selectors and budgets across, and the attention that the butler keeps, of the
    oracle's; then what is left of dense where that is good."""
    rows, left = {}, {}
    for task, name, budget, m in measures(report):
        what = name if name == "dense" else f"{name} {percent(budget)}"
        rows.setdefault(task, {})[what] = cell(m)
        dense = report["results"][task]["dense"]["1.0"]["mean"]
        if dense >= 0.8 and name != "dense":
            left.setdefault(what, []).append(m["mean"] / dense)
    for task, by in report.get("kept of oracle", {}).items():
        for budget, m in by.get("butler", {}).items():
            rows[task][f"butler {percent(budget)}, kept"] = f"{m['mean']:.1%}"
    shares = ", ".join(f"{what} {sum(v) / len(v):.1%}" for what, v in left.items())
    end = [f"\nof dense, mean over the tasks where dense scores 0.8 or more: {shares}"] * bool(left)
    return "\n".join([*grid(rows, "task"), *end, source(report)])


def perplexity(report: dict) -> str:
    rows = {}
    for what, name, budget, m in measures(report):
        if what == "perplexity":
            rows.setdefault(name, {})[percent(budget)] = f"{m['mean']:.2f}"
        elif name != "dense":
            rows[name][f"over oracle {percent(budget)}"] = cell(m, "+.2%")
    seen = torch.arange(1, report["config"]["length"] + 1)
    shares = ", ".join(
        f"{percent(b)}: {(allowance(float(b), seen, ALWAYS) / seen).mean():.0%}"
        for b in report["config"]["budgets"])
    shares = f"\nattended on average, with the {ALWAYS} tokens that are always granted: {shares}"
    return "\n".join([*grid(rows, "selector"), shares, source(report)])


def recall(report: dict) -> str:
    rows, mass = {}, report["layers"]["mass"]
    for measure, name, budget, m in measures(report):
        rows.setdefault(name, {})[f"{measure} {percent(budget)}"] = cell(m, ".3f")
        if measure == "mass":
            pairs = zip(mass[name][budget], mass["oracle"][budget], strict=True)
            worst = min(kept / best for kept, best in pairs)
            rows[name]["worst layer, of oracle's mass"] = f"{worst:.1%}"
    return "\n".join([*grid(rows, "selector"), source(report)])


def length(report: dict) -> str:
    """Contexts down, selectors across, a table for each budget."""
    tables = {}
    for what, name, budget, m in measures(report):
        measure, context = what.split(" @")
        if name not in ("dense", "oracle") and measure in ("kept of oracle", "over oracle"):
            form = ".1%" if measure == "kept of oracle" else "+.1%"
            row = tables.setdefault(budget, {}).setdefault(f"{int(context):,}", {})
            row[f"{name}, {measure}"] = cell(m, form)
    parts = ["\n".join(grid(rows, f"at {percent(b)}")) for b, rows in tables.items()]
    return "\n".join(["\n\n".join(parts), source(report)])


def drift(report: dict) -> str:
    """Selectors down, tasks across, each with the mean of its steps between two choices."""
    rows, steps = {}, report["steps between choices"]
    for task, name, budget, m in measures(report):
        row = rows.setdefault(name if name == "dense" else f"{name}, {percent(budget)}", {})
        row[task] = cell(m)
        if name != "dense":
            row[f"{task}, steps"] = f"{steps[task].get(f'{name}, {budget}', 1):.1f}"
    return "\n".join([*grid(rows, "choices kept"), source(report)])


def timed(report: dict) -> str:
    rate = f"{report['copy_bytes_per_s'] / 1e9:.1f} GB/s copied"
    suite = speed_offload if report["config"]["suite"] == "offload" else speed
    command = report["command"]
    if "--intervals" in command:  # measured when there was such a flag
        command = f"at that commit: {command}"
    return "\n".join([suite.table(report), "", f"{report['hardware']}, {rate}; commit "
                      f"{report['commit']}", command])


TABLES = {"train": train.table, "train_default": train.table, "ablations": ablate.table,
          "perplexity": perplexity, "recall": recall, "length": length,
          "length_25": length, "drift": drift,
          "ruler": tasks, "ruler_4096": tasks, "ruler_8000": tasks, "ruler_rivals": tasks}
TIMED = {"compare": compare.table, "attention": timed, "speed": timed, "offload": timed}


def render(text: str) -> str:
    def block(match):
        path = ROOT / match[1]
        if not path.exists():
            return match[0]
        form = TIMED.get(path.stem.split("_")[0]) or TABLES.get(path.stem, accuracy)
        table = form(json.loads(path.read_text()))
        return f"<!-- {match[1]} -->\n```\n{table}\n```\n<!-- end -->"

    return re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", block, text, flags=re.S)


@dataclass
class Config:
    """Writes the tables of the two READMEs and draws the figures; it has no flags."""


if __name__ == "__main__":
    parse(Config)
    for name in draw.FIGURES:
        try:
            if panels := draw.panels(name):
                draw.draw(panels, ROOT / "results" / f"{name}.svg")
        except ImportError:
            print(f"no matplotlib: results/{name}.svg stays as it is", file=sys.stderr)
    for readme in (ROOT / "README.md", ROOT / "results" / "README.md"):
        readme.write_text(render(readme.read_text()))
