"""lessons/figure.py - how the lessons draw. matplotlib is imported only here."""

import sys
from contextlib import contextmanager
from pathlib import Path

import cli
from cli import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "results"))  # where draw.py is


def looks(name: str) -> dict:
    """Colour and marker of a selector, the same in every figure of the repository."""
    from draw import LOOKS

    colour, marker = LOOKS[name]
    return {"color": colour, "marker": marker, "markersize": 4}


@contextmanager
def figure(path: str, panels=1, size=(7.5, 3.4)):
    """Gives a list of matplotlib axes and, after the block, writes the figure to `path` (.svg or
    .png). The ground is transparent, and all text is of a grey that is readable on light and on
    dark pages. Raises UserError without matplotlib."""
    try:
        from matplotlib import pyplot, rc_context
    except ImportError:
        raise UserError("--figure needs matplotlib: pip install matplotlib") from None
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor",
                          "xtick.color", "ytick.color", "legend.labelcolor"),
                         looks("dense")["color"])
    style = {"svg.hashsalt": "0", "svg.fonttype": "none", "font.size": 9, "legend.frameon": False,
             "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(grey | style):
        drawn, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        yield list(axes[0])
        kind = Path(path).suffix[1:] or "svg"
        with cli.replacing(path) as part:
            drawn.savefig(part, format=kind, transparent=True, dpi=150,
                          metadata={"Date": None} if kind == "svg" else None)
        pyplot.close(drawn)
