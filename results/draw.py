"""results/draw.py - the figures of the READMEs, from the JSON files in this folder.

    step         which tokens one KV head selected, in words                     step.json
    length       attention kept at the end of texts of several lengths           length.json
    accuracy     co-reference answers right, with a tenth of the tokens          budgets.json
    perplexity   perplexity above the oracle's, against the budget               perplexity.json
    ruler        RULER-style tasks, against the length of the text               ruler*.json
    agreement    steps whose likeliest token is the dense model's                agreement.json
    drift        answers right where one choice serves several steps             drift*.json
    prefill      perplexity of what follows a prompt that was read sparsely      prefill_*.json
    speed        milliseconds of a decode step, against cached tokens            speed_*.json
    wait         seconds to the first token, milliseconds a step                 compare_*.json
    offload      milliseconds of a step, keys and values in a file               offload_*.json

An SVG has two sets of colours and a ground of its own, so it is readable on light and dark pages:
no colour reaches a contrast of 4.5 on both. A browser picks the set by prefers-color-scheme. The
metadata hold a hash of the numbers that a figure was drawn from.

    python results/render.py        draws all of them, then writes the tables
"""

import hashlib
import json
import math
import sys
from contextlib import contextmanager
from html import escape

from render import RESULTS, fastest, load, measures, ruler_scores  # first: it says where cli.py is

import cli
from cli import UserError

GROUND = ("#ffffff", "#0d1117")  # light, dark: GitHub's
INK = ("#1f2328", "#f0f6fc")
GREY = ("#59636e", "#9198a1")
BLUE = ("#0969da", "#58a6ff")
ORANGE = ("#bc4c00", "#f0883e")
GREEN = ("#1a7f37", "#3fb950")
OLIVE = ("#7d6600", "#d29922")
PINK = ("#bf3989", "#f778ba")
RED = ("#cf222e", "#ff7b72")
PURPLE = ("#8250df", "#bc8cff")
BROWN = ("#7a4b1f", "#c69c6d")
TEAL = ("#0b7285", "#39c5cf")
LOOKS = {  # of a selector, or of other software, in every figure: colours and marker
    "dense": (GREY, "o"), "butler": (BLUE, "s"), "oracle": (ORANGE, "D"), "recency": (GREEN, ">"),
    "random": (OLIVE, "P"), "quest": (PINK, "^"), "h2o": (RED, "v"), "snapkv": (PURPLE, "<"),
    "keynorm": (BROWN, "d"), "sketch": (TEAL, "X"), "sketch16": (TEAL, "p"),
    "sketch8": (TEAL, "h"), "ahead1": (PURPLE, "*"), "ahead5": (PINK, "8"), "spread": (BROWN, "H"),
    "topp": (OLIVE, "X"), "transformers": (RED, "^"), "llama.cpp": (PURPLE, "v"),
}
OTHER = (GREY, "x")
SMALL = 9.5  # points


def looks(label: str) -> tuple:
    """Of "butler", and of "butler, drift 0.25"."""
    return LOOKS.get(label.replace(",", " ").split()[0], OTHER)


# ---------------------------------------------------------------------------- the numbers

# A figure: its message, and panels. A panel: {"title", "x", "y": names of the axes, "log_x",
# "lines": {selector: points}}; a point is [x, y] or [x, y, low, high]. Or, with one row for each
# selector, {"title", "x", "dots": {selector: [mean, low, high] or [mean]}}. All axes start at 0
# but a logarithmic x, which says so.


def interval(m: dict) -> list[float]:
    return [m["mean"], m["low"], m["high"]]


def length() -> tuple[str, list[dict]]:
    lines = {}
    for task, name, _, m in measures(load("length")["results"]):
        what, context = task.split(" @")
        if what == "kept" and name in ("oracle", "butler", "sketch", "ahead5", "recency"):
            lines.setdefault(name, []).append([int(context), *interval(m)])
    return ("With a tenth of the tokens, the butler stays close to the oracle at every length",
            [{"title": "", "x": "tokens of the text", "y": "share of the attention kept",
              "log_x": True, "lines": lines}])


def accuracy() -> tuple[str, list[dict]]:
    (by_name,) = load("budgets")["results"].values()
    dots = {name: interval(by.get("0.1", by.get("1.0"))) for name, by in by_name.items()}
    return ("With a tenth of the tokens: scoring every token finds the answer, evicting does not",
            [{"title": "", "x": "co-reference answers right", "dots": dots}])


def perplexity() -> tuple[str, list[dict]]:
    lines = {}
    for name, by_budget in load("perplexity")["results"]["over oracle"].items():
        lines[name] = [[100 * float(budget), *(100 * x for x in interval(m))]
                       for budget, m in by_budget.items()]
    return ("With the butler, text is predicted almost as well as with the oracle",
            [{"title": "", "x": "tokens attended, %", "y": "perplexity above the oracle's, %",
              "log_x": False, "lines": lines}])


def ruler() -> tuple[str, list[dict]]:
    scores = ruler_scores()
    columns = {"dense": ("dense", "1.0"), "oracle": ("oracle", "0.1"), "butler": ("butler", "0.1")}
    panels = []
    for title, tasks in (("a needle in noise or in prose", ("needle_noise", "needle_prose")),
                         ("one of four needles", ("multikey",))):
        contexts = sorted({context for task, context in scores if task == tasks[0]})
        lines = {label: [[context, sum(scores[task, context][name][budget]["mean"]
                                       for task in tasks) / len(tasks)] for context in contexts]
                 for label, (name, budget) in columns.items()}
        panels.append({"title": title, "x": "tokens of the text", "y": "answers right",
                       "log_x": True, "lines": lines})
    return "With a tenth of the tokens, needles are found about as often as with all", panels


def agreement() -> tuple[str, list[dict]]:
    lines = {}
    for task, name, budget, m in measures(load("agreement")["results"]):
        if task.startswith("same token"):
            lines.setdefault(name, []).append([100 * float(budget), *interval(m)])
    return ("With the butler, the likeliest token is mostly the dense model's",
            [{"title": "", "x": "tokens attended, %", "y": "share of steps with the same token",
              "log_x": False, "lines": lines}])


def drift() -> tuple[str, list[dict]]:
    tasks = {"coreference": "places", "coreference_people": "people",
             "coreference_ships": "ships", "copy": "copies"}
    scores = load("drift_coreference")["results"] | load("drift")["results"]
    panels = [{"title": title, "x": "share right",
               "dots": {name: interval(*by.values()) for name, by in scores[task].items()}}
              for task, title in tasks.items()]
    return "A choice that serves several steps still finds names, but copies worse", panels


def prefill() -> tuple[str, list[dict]]:
    panels = []
    for path in sorted(RESULTS.glob("prefill_*.json")):
        for task, by_name in load(path.stem)["results"].items():
            if task.startswith("over dense @"):
                dots = {name: [100 * x for x in interval(by["0.1"])]
                        for name, by in by_name.items()}
                title = f"prompts of {int(task.split('@')[1]):,} tokens"
                panels.append({"title": title, "x": "perplexity of what follows, above dense, %",
                               "dots": dots})
    return "What follows is predicted as well after a sparse reading", panels


def speed() -> tuple[str, list[dict]]:
    """A panel for each model and processor; dense is its fastest form."""
    panels = []
    for path in sorted(RESULTS.glob("speed_*.json"), key=lambda path: path.stem.count("_")):
        report = load(path.stem)
        shape = report["config"].get("shape") or "SmolLM2-135M"
        lines = {}
        for (name, context), ms in fastest(report["rows"], "ms").items():
            lines.setdefault(name, []).append([context, ms])
        panels.append({"title": f"{shape}, {path.stem.split('_')[-1]}", "x": "cached tokens",
                       "y": "ms a decode step", "log_x": False, "lines": lines})
    return "The longer the text, the more a butler saves", panels


def wait() -> tuple[str, list[dict]]:
    panels = []
    for path in sorted(RESULTS.glob("compare_*.json")):
        rows = load(path.stem)["rows"]
        for key, y in ("first_token_s", "seconds to the first token"), ("ms", "ms a decode step"):
            lines = {}
            for (name, context), value in fastest(rows, key).items():
                lines.setdefault(name, []).append([context, value])
            panels.append({"title": path.stem.removeprefix("compare_"), "x": "tokens of the prompt",
                           "y": y, "log_x": False, "lines": lines})
    return "Behind 4,096 tokens and more, the butler's user waits least", panels


def offload() -> tuple[str, list[dict]]:
    panels = []
    for path in sorted(RESULTS.glob("offload_*.json")):
        rows = load(path.stem)["rows"]
        title = f"{path.stem.split('_')[1]}, {rows[0]['context']:,} tokens"
        panels.append({"title": title, "x": "seconds a decode step",
                       "dots": {row["selector"]: [row["ms"] / 1000] for row in rows}})
    return "Keys and values in a file: few of them are read", panels


FIGURES = {"length": length, "accuracy": accuracy, "perplexity": perplexity, "ruler": ruler,
           "agreement": agreement, "drift": drift, "prefill": prefill, "speed": speed,
           "wait": wait, "offload": offload}


def digest(*numbers) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


# ---------------------------------------------------------------------------- charts

STYLE = {  # matplotlib's settings
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY[0]),
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK[0]),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), GROUND[0]),
    "svg.hashsalt": "0", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}


def two_grounds() -> str:
    """CSS: on a dark page every light colour becomes its dark partner."""
    pairs = dict([GROUND, INK, GREY, *(colours for colours, _ in LOOKS.values())])
    rules = "".join(f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}\n'
                    for light, dark in pairs.items() for what in ("fill", "stroke"))
    return f"@media (prefers-color-scheme: dark) {{\n{rules}}}\n"


@contextmanager
def page(path, panels: int, size, metadata=None, **layout):
    """Gives a figure of matplotlib and its axes side by side. After the block it is written to
    `path`, .svg or .png. size in inches. The same content and version of matplotlib give the same
    bytes. Raises ImportError without matplotlib."""
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained",
                                       squeeze=False, **layout)
        yield figure, list(axes[0])
        svg = not str(path).endswith(".png")
        with cli.replacing(path) as part:
            figure.savefig(part, format="svg" if svg else "png", dpi=150,
                           metadata={"Date": None} | (metadata or {}) if svg else None)
            if svg:
                text = part.read_text(encoding="utf-8")
                part.write_text(text.replace("</style>", f"{two_grounds()}</style>", 1), "utf-8")
        pyplot.close(figure)


def draw(message: str, panels: list[dict], path) -> None:
    """Writes an SVG: a message, and its panels side by side."""
    rows = max(len(panel.get("dots", "")) for panel in panels)
    size = 7.4 if len(panels) == 1 else 9.2, 1.3 + 0.24 * rows if rows else 3.3  # inches
    metadata = {"Title": message,
                "Description": f"drawn from numbers with SHA-256 {digest(message, panels)}"}
    rows_of = [list(panel.get("dots", "")) for panel in panels]
    same_rows = bool(rows) and all(names == rows_of[0] for names in rows_of)
    with page(path, len(panels), size, metadata, sharey=same_rows) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            (dots if "dots" in panel else lines)(axis, panel)
        figure.suptitle(message, x=0.01, ha="left", fontsize=11, fontweight="bold")


def lines(axis, panel: dict) -> None:
    """A line for each selector, with its name at its end."""
    ends = {}
    for name, points in panel["lines"].items():
        (colour, _), marker = looks(name)
        x, y, *between = zip(*sorted(points), strict=True)
        strong = name == "butler"
        axis.plot(x, y, color=colour, marker=marker, markersize=5, clip_on=False,
                  linewidth=2.4 if strong else 1.4, zorder=3 if strong else 2)
        if between:
            axis.fill_between(x, *between, color=colour, alpha=0.15, linewidth=0)
        ends[name] = x[-1], y[-1]
    ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
    if panel["log_x"]:
        axis.set_xscale("log")
    elif len(ticks) > 3:  # the shortest texts stand close together
        ticks = [tick for tick in ticks if tick >= max(ticks) / 5]
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.xaxis.minorticks_off()
    axis.set_xlim(left=None if panel["log_x"] else 0)
    highest = max(value for points in panel["lines"].values() for _, *y in points for value in y)
    axis.set_ylim(min(0, axis.get_ylim()[0]) if highest < 0 else 0, 1.06 * highest)
    scale = " (logarithmic)" if panel["log_x"] else ""
    axis.set_title(panel["title"], loc="left")
    axis.set(xlabel=panel["x"] + scale, ylabel=panel["y"])
    at = (axis.transScale + axis.transLimits).transform  # numbers -> shares of the panel
    heights = apart({name: at(end)[1] for name, end in ends.items()})
    for name, end in ends.items():
        axis.annotate(name, end, (at(end)[0] + 0.03, heights[name]), textcoords="axes fraction",
                      color=looks(name)[0][0], fontsize=SMALL, va="center",
                      fontweight="bold" if name == "butler" else None)


def apart(heights: dict, least=0.062) -> dict:
    """Heights of labels -> the same in the same order, at least `least` apart, moved little."""
    names = sorted(heights, key=heights.get)
    moved = []
    for name in names:
        moved.append(max(heights[name], moved[-1] + least if moved else -math.inf))
    over = [high - heights[name] for name, high in zip(names, moved, strict=True)]
    down = max(over, default=0) / 2  # half up, half down
    for i in reversed(range(len(moved))):
        lowered = max(moved[i] - down, 0.0 if i == 0 else -math.inf)
        if over[i] > 0 or (i + 1 < len(moved) and moved[i + 1] - moved[i] < least):
            moved[i] = lowered
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + least)
    return dict(zip(names, moved, strict=True))


def dots(axis, panel: dict) -> None:
    """A row for each selector: its mean and interval."""
    names = list(panel["dots"])
    for row, name in enumerate(names):
        (colour, _), marker = looks(name)
        mean, *ends = panel["dots"][name]
        if ends:
            axis.plot(ends, [row, row], color=colour, linewidth=1.6)
        axis.plot(mean, row, color=colour, marker=marker, markersize=6)
    axis.set_yticks(range(len(names)), names)
    for label, name in zip(axis.get_yticklabels(), names, strict=False):  # only the first panel has
        label.set(color=looks(name)[0][0], fontweight="bold" if name == "butler" else None)
    axis.set_ylim(len(names) - 0.5, -0.5)
    highest = max(max(values) for values in panel["dots"].values())
    lowest = min(min(values) for values in panel["dots"].values())
    axis.set_xlim(min(0, 1.1 * lowest) - 0.02 * highest, 1.06 * highest)
    if lowest < 0:
        axis.axvline(0, color=GREY[0], linewidth=0.8)
    axis.set_title(panel["title"], loc="left")
    axis.set(xlabel=panel["x"])


# ---------------------------------------------------------------------------- one step in words

WIDTH, LETTER, LINE, FONT = 900, 7.55, 18, 12.5  # pixels: the picture, a letter, a line, the font
COLUMNS = 57  # letters of a line


def step_lines(report: dict) -> list[list[int]]:
    """The tokens of each line, as their places in the text."""
    lines, used = [[]], 0
    for place, text in enumerate(report["texts"]):
        if "\n" in text:
            if lines[-1]:
                lines += [[], []]  # the first one stays blank
            used = 0
            continue
        starts_word = text.startswith(" ") or not lines[-1]
        word = len(text)  # with the tokens that continue it
        for more in report["texts"][place + 1 :]:
            if more[:1].isspace():
                break
            word += len(more)
        if starts_word and used + word > COLUMNS:
            lines.append([])
            used = 0
        lines[-1].append(place)
        used += len(text)
    return lines


def draw_step(report: dict, path) -> None:
    """Two columns with the same text: what the butler selected, and what the oracle would."""
    lines = step_lines(report)
    S = len(report["texts"])
    always = {*range(report["sinks"]), *range(S - report["window"], S)}
    both = set(report["butler"]) & set(report["oracle"]) - always
    chosen = len(set(report["oracle"]) - always)
    top = 104
    height = top + LINE * len(lines) + 44
    # light, dark; text on a coloured ground takes the page's colour
    names = {"ground": GROUND, "ink": INK, "grey": GREY, "butler": BLUE, "oracle": ORANGE}
    light, dark = ("".join(f".{name} {{ fill: {pair[i]} }} " for name, pair in names.items())
                   + f".always {{ fill: none; stroke: {GREY[i]} }}" for i in (0, 1))
    heads = {"butler": f"butler, before layer {report['layer']} was reached",
             "oracle": f"oracle, by the true attention of layer {report['layer']}"}
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
           f'width="{WIDTH}" height="{height}" font-size="{FONT}" xml:space="preserve" '
           'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace">',
           f"<desc>drawn from numbers with SHA-256 {digest(report)}</desc>",
           f"<style>{light} .text {{ white-space: pre }} .head {{ font-family: sans-serif }} "
           f"@media (prefers-color-scheme: dark) {{ {dark} }}</style>",
           f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
           '<text class="ink head" x="12" y="26" font-size="16" font-weight="bold">'
           f"Which {len(report['butler'])} of {S} cached tokens does one KV head read to begin the "
           f"answer, {escape(report['answer'])}?</text>",
           '<text class="grey head" x="12" y="48" font-size="13">The question is at the end. The '
           "answer stands once in the text, and the question describes it in other words.</text>"]
    for column, (name, head) in enumerate(heads.items()):
        left = 12 + column * WIDTH // 2
        out.append(f'<text class="{name} head" x="{left}" y="82" font-size="14" '
                   f'font-weight="bold">{head}</text>')
        kept = set(report[name])
        for row, places in enumerate(lines):
            y = top + LINE * row
            x = left
            marks, words = [], []
            for at, place in enumerate(places):
                text = report["texts"][place]
                text = text.lstrip() if at == 0 else text
                wide = LETTER * len(text)
                blank = LETTER * (len(text) - len(text.lstrip()))
                style = "grey"
                if place in kept:
                    style = "ink" if place in always else "ground"
                    mark = "always" if place in always else name
                    marks.append(f'<rect class="{mark}" x="{x + blank - 1:.1f}" y="{y - 13}" '
                                 f'width="{wide - blank + 1.5:.1f}" height="16" rx="2"/>')
                words.append(f'<tspan class="{style}">{escape(text)}</tspan>')
                x += wide
            out += marks
            if places:
                out.append(f'<text class="text" x="{left}" y="{y}" textLength="{x - left:.1f}" '
                           f'lengthAdjust="spacingAndGlyphs">{"".join(words)}</text>')
    out.append(
        f'<text class="grey head" x="12" y="{height - 14}" font-size="13">Filled: chosen. Framed: '
        f"always selected. The butler chose {len(both)} of the oracle's {chosen} in this head, and "
        f"{report['found_by_all_heads']:.0%} in all layers and heads.</text></svg>\n")
    with cli.replacing(path) as part:
        part.write_text("\n".join(out), encoding="utf-8")


def main() -> None:
    """Draws every figure whose numbers are there."""
    for name, function in FIGURES.items():
        try:
            message, panels = function()
            if panels:
                draw(message, panels, RESULTS / f"{name}.svg")
        except UserError as e:
            print(f"{name}.svg is not drawn: {e}", file=sys.stderr)
        except ImportError:
            print(f"{name}.svg is not drawn: matplotlib is missing", file=sys.stderr)
    try:
        draw_step(load("step"), RESULTS / "step.svg")
    except UserError as e:
        print(f"step.svg is not drawn: {e}", file=sys.stderr)
