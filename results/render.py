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

import ablate  # noqa: E402
import compare  # noqa: E402
import draw  # noqa: E402
import torch  # noqa: E402

import speed  # noqa: E402
import speed_offload  # noqa: E402
import train  # noqa: E402
from cli import parse  # noqa: E402
from selection import allowance  # noqa: E402


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
    return f"{float(budget):.0%}" if float(budget) <= 1 else f"{budget} tokens"


def source(report: dict) -> str:
    n = {m["n"] for table in report["results"].values() for by in table.values()
         for m in by.values()}
    return (f"\nn = {', '.join(map(str, sorted(n)))}; {report['hardware']}; commit "
            f"{report['commit']}\n{report['command']}")


def accuracy(report: dict) -> str:
    """Selectors down, tasks and budgets across."""
    rows, several = {}, len(report["results"]) > 1
    for task, table in report["results"].items():
        for name, by in table.items():
            for budget, m in by.items():
                what = "all" if name == "dense" else percent(budget)
                rows.setdefault(name, {})[f"{task} {what}" if several else what] = cell(m)
    return "\n".join([*grid(rows, "selector"), source(report)])


def tasks(report: dict) -> str:
    """Tasks down, selectors and budgets across; then what is left of dense where that is good."""
    rows, left = {}, {}
    for task, table in report["results"].items():
        for name, by in table.items():
            for budget, m in by.items():
                what = name if name == "dense" else f"{name} {percent(budget)}"
                rows.setdefault(task, {})[what] = cell(m)
                if table["dense"]["1.0"]["mean"] >= 0.8 and name != "dense":
                    share = m["mean"] / table["dense"]["1.0"]["mean"]
                    left.setdefault(what, []).append(share)
    shares = ", ".join(f"{what} {sum(v) / len(v):.1%}" for what, v in left.items())
    end = [f"\nof dense, mean over the tasks where dense scores 0.8 or more: {shares}"] * bool(left)
    return "\n".join([*grid(rows, "task"), *end, source(report)])


def perplexity(report: dict) -> str:
    rows = {}
    for name, by in report["results"]["perplexity"].items():
        for budget, m in by.items():
            what = "all" if name == "dense" else percent(budget)
            rows.setdefault(name, {})[what] = f"{m['mean']:.2f}"
            over = report["results"]["over_oracle"].get(name, {}).get(budget)
            if over and name != "dense":
                rows[name][f"over oracle {what}"] = cell(over, "+.2%")
    length = report["config"]["length"]
    seen = torch.arange(1, length + 1)
    shares = ", ".join(
        f"{percent(b)}: {(allowance(float(b), seen, 20) / seen).mean():.0%}"
        for b in report["config"]["budgets"])
    shares = f"\nattended on average, with the 20 tokens that are always granted: {shares}"
    return "\n".join([*grid(rows, "selector"), shares, source(report)])


def recall(report: dict) -> str:
    rows = {}
    for measure, table in report["results"].items():
        for name, by in table.items():
            for budget, m in by.items():
                rows.setdefault(name, {})[f"{measure} {percent(budget)}"] = cell(m, ".3f")
                if measure == "mass":
                    best = report["layers"]["mass"]["oracle"][budget]
                    worst = min(a / b for a, b in zip(report["layers"]["mass"][name][budget],
                                                      best, strict=True))
                    rows[name]["worst layer, of oracle's mass"] = f"{worst:.1%}"
    return "\n".join([*grid(rows, "selector"), source(report)])


def interval(report: dict) -> str:
    rows = {}
    for label, table in report["results"].items():
        task, rule = label.split(", ", 1)
        for name, by in table.items():
            for m in by.values():
                row = "dense" if name == "dense" else f"{name}, {rule}"
                rows.setdefault(row, {})[task] = cell(m)
    return "\n".join([*grid(rows, "at 10 %"), source(report)])


def timed(report: dict) -> str:
    rate = f"{report['copy_bytes_per_s'] / 1e9:.1f} GB/s copied"
    suite = speed_offload if report["config"]["suite"] == "offload" else speed
    return "\n".join([suite.table(report), "", f"{report['hardware']}, {rate}; commit "
                      f"{report['commit']}", report["command"]])


TABLES = {"results/train.json": train.table, "results/ablations.json": ablate.table,
          "results/perplexity.json": perplexity, "results/recall.json": recall,
          "results/attention_smollm2-135m.json": timed, "results/speed.json": timed,
          "results/compare.json": compare.table,
          "results/speed_llama-3.2-1b.json": timed, "results/offload.json": timed,
          "results/offload_llama-3.2-1b.json": timed,
          "results/interval.json": interval, "results/interval_oracle.json": interval,
          "results/ruler.json": tasks,
          "results/ruler_long.json": tasks, "results/ruler_many.json": tasks,
          "results/ruler_rest.json": tasks}


def render(text: str) -> str:
    def block(match):
        name = match[1]
        if not (ROOT / name).exists():
            return match[0]
        table = TABLES.get(name, accuracy)(json.loads((ROOT / name).read_text()))
        return f"<!-- {name} -->\n```\n{table}\n```\n<!-- end -->"

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
