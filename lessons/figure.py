"""lessons/figure.py - how the lessons draw: results/draw.py, which is no package."""

import sys
from contextlib import contextmanager
from pathlib import Path

from cli import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "results"))  # where draw.py is

import draw  # noqa: E402


def looks(name: str) -> dict:
    """Colour and marker of a selector, the same in every figure of the repository."""
    (colour, _), marker = draw.LOOKS[name]
    return {"color": colour, "marker": marker, "markersize": 4}


@contextmanager
def figure(path: str, panels=1, size=(7.5, 3.4)):
    """Gives a list of matplotlib axes and, after the block, writes the figure to `path` (.svg or
    .png). Raises UserError without matplotlib."""
    try:
        with draw.page(path, panels, size) as (_, axes):
            yield axes
    except ImportError:
        raise UserError("--figure needs matplotlib: pip install matplotlib") from None
