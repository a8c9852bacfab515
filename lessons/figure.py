"""lessons/figure.py - how the lessons draw: results/draw.py, which is no package."""

import sys
from contextlib import contextmanager
from pathlib import Path

from cli import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "results"))  # where draw.py is

import draw  # noqa: E402


def looks(name: str) -> dict:
    """Colour and marker of a selector, the same in every figure of the repository. An unknown
    selector, for example of an exercise, is grey."""
    (colour, _), marker = draw.LOOKS.get(name, draw.OTHER)
    return {"color": colour, "marker": marker, "markersize": 5}


@contextmanager
def figure(path: str, panels=1, size=(7.5, 3.4)):
    """Gives a list of matplotlib axes and, after the block, writes the figure to `path` (.svg or
    .png). Raises UserError without matplotlib."""
    try:
        with draw.page(path, panels, size) as (_, axes):
            yield axes
    except ImportError:
        raise UserError("--figure needs matplotlib: pip install matplotlib") from None
    print(f"the figure is in {path}", file=sys.stderr)


def label_ends(axis) -> None:
    """Writes the label of each line at its end, in the colour of the line. Call it last, because
    it needs the limits of the axes."""
    at = (axis.transScale + axis.transLimits).transform  # numbers -> shares of the panel
    labelled = [line for line in axis.lines if not line.get_label().startswith("_")]
    ends = {line: at(line.get_xydata()[-1]) for line in labelled}
    heights = draw.apart({line: end[1] for line, end in ends.items()})
    for line in labelled:
        axis.annotate(line.get_label(), (ends[line][0] + 0.03, heights[line]), va="center",
                      xycoords="axes fraction", color=line.get_color(), fontsize=draw.SMALL)
