"""results/render.py - writes the tables of the two READMEs from the JSON files in this folder.

    <!-- results/NAME.json --> ... <!-- end -->      what stands between is replaced
    <!-- results/*.json: NAME --> ... <!-- end -->   by what measure/tables.py makes of several

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

import draw

from common.cli import parse
from measure.tables import MADE, table


def render(text: str) -> str:
    def block(match):
        path = ROOT / match[1]
        if not path.exists():
            return match[0]
        lines = table(path.stem, json.loads(path.read_text()))
        return f"<!-- {match[1]} -->\n```\n{lines}\n```\n<!-- end -->"

    text = re.sub(r"(<!-- results/\*\.json: (\w+) -->\n).*?<!-- end -->",
                  lambda match: f"{match[1]}{MADE[match[2]]()}\n<!-- end -->", text, flags=re.S)
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
