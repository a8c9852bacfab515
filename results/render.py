"""results/render.py - writes README.md's tables from the JSON files in this folder.

    <!-- results/NAME.json --> ... <!-- end -->      what stands between is replaced

    python results/render.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

TABLES = {"results/train.json": train.table}


def render(text: str) -> str:
    def block(match):
        name = match[1]
        table = TABLES[name](json.loads((ROOT / name).read_text()))
        return f"<!-- {name} -->\n```\n{table}\n```\n<!-- end -->"

    return re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", block, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
