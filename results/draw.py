"""results/draw.py - the figures of the READMEs, from the JSON files in this folder.

    length      attention kept at the end of contexts of several lengths       length.json
    accuracy    co-reference answers right, against the budget                 budgets.json
    speed       milliseconds of a decode step, against cached tokens           speed_PROCESSOR.json

An SVG carries in its metadata a hash of the numbers that it was drawn from.

    python results/render.py        draws all of them, then writes the tables
"""

import hashlib
import json
import sys

from render import RESULTS, load, measures  # first: it says where cli.py is

import cli
from cli import UserError

GREY = "#808080"  # readable on light and on dark pages
LOOKS = {  # of a selector in every figure: colour and marker
    "dense": (GREY, "o"), "butler": ("#2f81f7", "s"), "oracle": ("#e08600", "D"),
    "quest": ("#bf4bb8", "^"), "h2o": ("#d9484f", "v"), "snapkv": ("#8a63e8", "<"),
    "recency": ("#1f9d6b", ">"), "random": ("#9a8a1f", "P"), "keynorm": ("#b5683c", "d"),
    "sketch": ("#1f8a9c", "X"), "ahead5": ("#bf4b78", "8"),
}

# ---------------------------------------------------------------------------- the numbers

# A panel: {"title", "x", "y": names of the axes, "log_y", "lines": {selector: points}}; a point is
# [x, y] or [x, y, low, high].


def point(x: float, m: dict) -> list:
    return [x, m["mean"], m["low"], m["high"]]


def length() -> list[dict]:
    lines = {}
    for task, name, _, m in measures(load("length")["results"]):
        what, context = task.split(" @")
        if what == "kept" and name != "dense":
            lines.setdefault(name, []).append(point(int(context), m))
    return [{"title": "a tenth of the tokens attended", "x": "tokens of the text",
             "y": "attention kept", "log_y": False, "lines": lines}]


def accuracy() -> list[dict]:
    lines = {}
    results = load("budgets")["results"]
    percents = sorted({100 * float(b) for _, name, b, _ in measures(results) if name != "dense"})
    for _, name, budget, m in measures(results):
        # dense has no budget: a level to compare with
        at = percents if name == "dense" else [100 * float(budget)]
        lines.setdefault(name, []).extend(point(x, m) for x in at)
    return [{"title": "co-reference", "x": "tokens attended, %", "y": "answers right",
             "log_y": False, "lines": lines}]


def speed() -> list[dict]:
    """A panel for each processor; dense is its fastest form, the butler at its smallest budget."""
    panels = []
    for path in sorted(RESULTS.glob("speed_*.json")):
        report = load(path.stem)
        if report["config"].get("shape"):
            continue
        fastest = {}  # {(selector, context): milliseconds}
        for row in report["rows"]:
            key = row["selector"].replace(",", " ").split()[0], row["context"]
            fastest[key] = min(row["ms"], fastest.get(key, row["ms"]))
        lines = {}
        for (name, context), ms in fastest.items():
            if name in LOOKS:
                lines.setdefault(name, []).append([context, ms])
        panels.append({"title": path.stem.removeprefix("speed_"), "x": "cached tokens",
                       "y": "ms a decode step", "log_y": True, "lines": lines})
    return panels


FIGURES = {"length": length, "accuracy": accuracy, "speed": speed}


def digest(panels: list[dict]) -> str:
    return hashlib.sha256(json.dumps(panels).encode()).hexdigest()


# ---------------------------------------------------------------------------- the drawing


def draw(panels: list[dict], path) -> None:
    """Writes an SVG; the same numbers and version of matplotlib give the same bytes."""
    from matplotlib import pyplot, rc_context

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor",
                          "xtick.color", "ytick.color", "legend.labelcolor"), GREY)
    with rc_context(grey | {"svg.hashsalt": "0", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(3 + 3 * len(panels), 3.4),
                                       layout="constrained", squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            paint(axis, panel)
        axes[0, -1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        metadata = {"Date": None,
                    "Description": f"drawn from numbers with SHA-256 {digest(panels)}"}
        with cli.replacing(path) as part:
            figure.savefig(part, format="svg", transparent=True, metadata=metadata)
        pyplot.close(figure)


def paint(axis, panel: dict) -> None:
    for name, points in panel["lines"].items():
        colour, marker = LOOKS.get(name, (GREY, "x"))
        x, y, *ends = zip(*sorted(points), strict=True)
        axis.plot(x, y, label=name, color=colour, marker=marker, markersize=4,
                  linewidth=2.2 if name in ("dense", "butler") else 1.2)
        if ends:
            axis.fill_between(x, *ends, color=colour, alpha=0.18, linewidth=0)
    axis.set_xscale("log")
    ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    if panel["log_y"]:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axis.xaxis.minorticks_off()
    axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])


def main() -> None:
    """Draws every figure whose numbers are there."""
    for name, function in FIGURES.items():
        try:
            if panels := function():
                draw(panels, RESULTS / f"{name}.svg")
        except UserError as e:
            print(f"{name}.svg is not drawn: {e}", file=sys.stderr)
        except ImportError:
            print(f"{name}.svg is not drawn: matplotlib is missing", file=sys.stderr)
