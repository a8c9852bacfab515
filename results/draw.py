"""results/draw.py - the figures of the READMEs, drawn from the JSON files in this folder.

    NAME.json ... --a function a figure--> panels, plain numbers --draw--> NAME.svg

    accuracy    co-reference answers exact against budget, every selector
    speed       milliseconds of a step against tokens cached
    recall      attention kept, layer by layer
    length      attention kept at the end of contexts of several lengths, by selector, and its share
                of the oracle's by the form of importance keys and the length of training texts
    training    loss of every step
    offload     milliseconds of a step with keys and values in a file
    tradeoff    a task's score against milliseconds of a step, a point for each selector and budget

Grey text and middling colours on nothing: readable on light and dark pages. A selector has one
colour everywhere. An SVG says in its metadata of which numbers it was drawn (`digest`).

    python results/render.py        draws those whose JSON is there, if matplotlib is installed
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
GREY = "#808080"
COLOURS = {"dense": GREY, "butler": "#2f81f7", "oracle": "#e08600", "quest": "#bf4bb8",
           "h2o": "#d9484f", "snapkv": "#8a63e8", "recency": "#1f9d6b", "random": "#9a8a1f",
           "keynorm": "#b5683c"}
OTHERS = ("#2f81f7", "#1f9d6b", "#bf4bb8", "#e08600", "#d9484f", "#8a63e8")  # of other lines
MARKERS = "osD^v<>Pd"
SMOOTH = 25  # steps in a mean


@dataclass
class Line:
    """Points, with the ends of their 95 % intervals where there are any."""

    label: str
    x: Sequence
    y: Sequence
    low: Sequence = ()
    high: Sequence = ()
    look: str = "line"  # with markers; or plain, faint, points, bar


@dataclass
class Noted(Line):
    notes: Sequence = ()  # beside the points


@dataclass
class Panel:
    title: str
    x: str
    y: str
    lines: Sequence
    ticks: Sequence = ()  # of x, on a logarithmic axis; linear without
    log_y: bool = False
    beside: bool = False  # the legend


# ---------------------------------------------------------------------------- the numbers


def accuracy(reports: dict) -> list[Panel]:
    """Selectors whose points are all the same share a line."""
    report, names = reports["budgets"], {}
    ticks = sorted(100 * float(budget) for budget in report["config"]["budgets"])
    for name, by in report["results"]["coreference"].items():
        points = sorted((100 * float(b), m["mean"], m["low"], m["high"]) for b, m in by.items())
        if name == "dense":  # has no budget: a level to compare with
            points = [(tick, *points[0][1:]) for tick in (ticks[0], ticks[-1])]
        names.setdefault(tuple(points), []).append(name)
    lines = [Line(",\n".join(same), *map(list, zip(*points, strict=True)),
                  look="plain" if same[0] == "dense" else "line")
             for points, same in names.items()]
    return [Panel("co-reference, some 355 tokens", "tokens attended, %", "answers exact", lines,
                  ticks, beside=True)]


def speed(reports: dict) -> list[Panel]:
    """The fastest dense form and every selection, of one sequence."""
    titles = {"attention": "attention of all layers", "speed": "whole step"}
    panels = []
    for name, report in reports.items():
        lines, ticks = {}, []
        for row in report["rows"]:
            if row["batch"] == 1:
                label = "dense, the fastest" if row["kept"] is None else row["selector"]
                by = lines.setdefault(label, {})
                by[row["context"]] = min(row["ms"], by.get(row["context"], row["ms"]))
        for context in sorted({x for by in lines.values() for x in by}):
            if not ticks or context > 1.8 * ticks[-1]:  # there is room for its label
                ticks.append(context)
        panels.append(Panel(
            f"{titles[name.split('_')[0]]}, {name.split('_')[-1]}", "tokens cached", "ms a step",
            [Line(label, *zip(*sorted(by.items()), strict=True)) for label, by in lines.items()],
            ticks, log_y=True))
    return panels


def recall(reports: dict) -> list[Panel]:
    report = reports["recall"]
    budget = report["config"]["budgets"][0]
    return [Panel(f"{float(budget):.0%} of the tokens attended", "layer", "attention kept",
                  [Line(name, list(range(1, 1 + len(by[budget]))), by[budget], look="plain")
                   for name, by in report["layers"]["mass"].items()], beside=True)]


FORMS = {"default": "512 and 4,096", "long texts of 2048": "512 and 2,048", "short texts": "512",
         "rotated keys": "rotated keys, 512 and 4,096",
         "rotated keys + short texts": "rotated keys, 512"}  # row of ablations.json: its label


def length(reports: dict) -> list[Panel]:
    """Oracle, butler and others; then butlers that differ in importance keys or training texts."""
    def at_ends(name, measure):  # -> {selector: {context: mean with its interval}}
        by = {}
        for what, table in reports[name]["results"].items():
            if what.startswith(f"{measure} @"):
                for selector, budgets in table.items():
                    by.setdefault(selector, {})[int(what.split("@")[1])] = next(
                        iter(budgets.values()))
        return by

    kept, rows = at_ends("length", "kept"), reports["ablations"]["rows"]
    del kept["dense"]
    forms = {label: {int(c): m for c, m in rows[name]["kept"].items()}
             for name, label in FORMS.items()}
    forms["512 and 2,048 with gaps"] = at_ends("length_default", "kept of oracle")["butler"]
    return [Panel(title, "tokens cached", y, [curve(*entry) for entry in by.items()],
                  sorted({context for points in by.values() for context in points}))
            for title, y, by in (
                ("10 % of the tokens attended", "attention kept", kept),
                ("trained on texts of ... tokens", "kept, of the oracle's", forms))]


def curve(label: str, points: dict) -> Line:
    """{x: mean with its interval} -> a line with its band."""
    x, means = zip(*sorted(points.items()), strict=True)
    return Line(label, x, *([m[end] for m in means] for end in ("mean", "low", "high")))


def training(reports: dict) -> list[Panel]:
    report, loss = reports["train"], reports["train"]["loss"]
    total = [0, *accumulate(loss)]
    means = [(b - a) / SMOOTH for a, b in zip(total, total[SMOOTH:], strict=False)]
    middle = [SMOOTH / 2 + i for i in range(len(means))]
    return [Panel("training of the shipped butler", "step", "KL divergence, nats", [
        Line("of each step", list(range(1, 1 + len(loss))), loss, look="faint"),
        Line(f"mean of {SMOOTH} steps", middle, means, look="plain"),
        Line("held-out text, before and after", [0, len(loss)],
             [report["kl_before"], report["kl"]], look="points")])]


def offload(reports: dict) -> list[Panel]:
    panels = []
    for report in reports.values():
        for context in sorted({row["context"] for row in report["rows"]}):
            rows = [row for row in report["rows"] if row["context"] == context]
            memory = rows[0]["limit_bytes"]
            inside = f"\n{memory / rows[0]['cache_bytes']:.0%} of it in memory" if memory else ""
            panels.append(Panel(
                f"{rows[0]['shape'] or 'smollm2-135m'}, {context:,} tokens\n"
                f"{rows[0]['cache_bytes'] / 1e9:.2g} GB of keys and values{inside}", "ms a step",
                "", [Line(row["selector"], [row["ms"]], [], look="bar") for row in rows]))
    return panels


def tradeoff(reports: dict) -> list[Panel]:
    """A panel for each processor and task; a selector's points in the order of its budgets, the
    first and the last of which are told."""
    panels = []
    for name, report in reports.items():
        for task, table in report["results"].items():
            lines = []
            for selector, by in table.items():
                by = dict(sorted(by.items(), key=lambda entry: float(entry[0])))
                notes = [f"{float(b):.0%}" if float(b) <= 1 else b for b in by]
                notes[1:-1] = [""] * len(notes[1:-1])
                ends = ([m[end] for m in by.values()] for end in ("ms", "mean", "low", "high"))
                lines.append(Noted(selector, *ends, notes=notes * (selector != "dense")))
            ms = [x for line in lines for x in line.x]
            scale = [a * 10**b for b in range(-2, 5) for a in (1, 2, 5)]
            ticks = [t for t in scale if min(ms) / 2 < t < max(ms) * 2]
            panels.append(Panel(f"{task.replace('@', ', tokens: ')}, {name.split('_')[-1]}",
                                "ms a step", "score", lines, ticks, beside=True))
    return panels


FIGURES = {  # its function, and the files it is of
    "accuracy": (accuracy, "budgets"), "recall": (recall, "recall"),
    "speed": (speed, "attention_smollm2-135m_avx512-bf16", "speed_avx2", "speed_avx512-bf16"),
    "length": (length, "length", "ablations", "length_default"), "training": (training, "train"),
    "offload": (offload, "offload*"), "tradeoff": (tradeoff, "tradeoff_*")}


def panels(name: str) -> list[Panel]:
    """The numbers of a figure; [] where a file of theirs is missing."""
    function, *patterns = FIGURES[name]
    found = [sorted(RESULTS.glob(f"{pattern}.json")) for pattern in patterns]
    reports = {path.stem: json.loads(path.read_text()) for paths in found for path in paths}
    return function(reports) if all(found) else []


def digest(panels: list[Panel]) -> str:
    numbers = json.dumps([asdict(panel) for panel in panels])
    return hashlib.sha256(numbers.encode()).hexdigest()


# ---------------------------------------------------------------------------- the drawing


def draw(panels: list[Panel], path) -> None:
    """Writes an SVG, the same bytes for the same numbers and version of matplotlib. Raises
    ImportError without matplotlib."""
    from matplotlib import pyplot, rc_context

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor",
                             "xtick.color", "ytick.color", "legend.labelcolor"), GREY)
    with rc_context(colours | {"svg.hashsalt": "0", "svg.fonttype": "none", "font.size": 9,
                               "axes.spines.top": False, "axes.spines.right": False}):
        bars = panels[0].lines[0].look == "bar"
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 2.2 if bars else 3.4),
                                       layout="constrained", squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            (paint_bars if bars else paint)(axis, panel)
        figure.savefig(path, transparent=True, metadata={
            "Date": None, "Description": f"drawn from numbers with SHA-256 {digest(panels)}"})
        pyplot.close(figure)


def paint(axis, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for number, line in enumerate(panel.lines):
        name = line.label.split(",")[0]
        colour = COLOURS.get(name, OTHERS[number % len(OTHERS)])
        main = name in ("dense", "butler")
        style = {"color": colour, "label": line.label, "linewidth": 2.2 if main else 1.2}
        style |= {"line": {"marker": MARKERS[number % len(MARKERS)], "markersize": 4},
                  "faint": {"alpha": 0.6, "linewidth": 0.6}, "plain": {},
                  "points": {"marker": "D", "markersize": 6, "linestyle": ""}}[line.look]
        axis.plot(line.x, line.y, zorder=3 if main else 2, **style)
        if isinstance(line, Noted):  # points in no order of x, so a bar for each and no band
            axis.vlines(line.x, line.low, line.high, color=colour, alpha=0.4)
            for x, y, note in zip(line.x, line.y, line.notes, strict=False):
                axis.annotate(note, (x, y), (4, (4, -11)[number % 2]), color=colour, fontsize=8,
                              textcoords="offset points")
        elif line.low:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    if panel.ticks:
        axis.set_xscale("log")
        axis.set_xticks(panel.ticks, [f"{tick:,.0f}" for tick in panel.ticks])
        axis.minorticks_off()
    if panel.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if panel.beside else {"loc": "best"}
    axis.legend(frameon=False, fontsize=8, **place)


def paint_bars(axis, panel: Panel) -> None:
    """One bar a line, the first on top, its length beside it."""
    names = [line.label for line in panel.lines]
    bars = axis.barh(names, [line.x[0] for line in panel.lines],
                     color=[COLOURS[name.replace(",", " ").split()[0]] for name in names])
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, color=GREY)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel(panel.x)
    axis.set_title(panel.title, fontsize=9)
