"""The figures of results/: drawn from the JSON that is there, and the ones committed are these."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

RESULTS = Path(__file__).parent.parent / "results"
sys.path.append(str(RESULTS))

import draw  # noqa: E402

DRAWN = [name for name in draw.FIGURES if draw.panels(name)]


def words(svg: Path) -> str:
    """All that can be read in a picture."""
    return " ".join("".join(e.itertext()) for e in ElementTree.parse(svg).iter()
                    if e.tag.endswith("}text"))


def test_what_was_measured_is_drawn_and_shown():
    assert {p.stem for p in RESULTS.glob("*.svg")} == {*DRAWN}
    readme = (RESULTS / "README.md").read_text()
    assert all(f"]({name}.svg)" in readme for name in DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_the_committed_figure_is_of_the_numbers_that_are_there(name):
    assert draw.digest(draw.panels(name)) in (RESULTS / f"{name}.svg").read_text(), (
        "run python results/render.py")


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_shows_all_lines_and_is_drawn_alike_twice(name, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    panels, path = draw.panels(name), tmp_path / "a.svg"
    draw.draw(panels, path)
    first, text = path.read_bytes(), words(path)
    for panel in panels:
        for part in (panel.x, panel.y, *(line.label for line in panel.lines)):
            assert all(word in text for word in part.split()), part
    draw.draw(panels, path)
    assert path.read_bytes() == first
    committed = RESULTS / f"{name}.svg"  # maybe from another kind of processor: other bytes
    if f"Matplotlib v{matplotlib.__version__}," in committed.read_text():
        assert words(committed) == text, "run python results/render.py"


def test_every_selector_measured_is_in_the_figure():
    if not (RESULTS / "budgets.json").exists():
        pytest.skip("not measured yet: results/budgets.json")
    table = json.loads((RESULTS / "budgets.json").read_text())["results"]["coreference"]
    (panel,) = draw.panels("accuracy")
    shown = {name: line for line in panel.lines for name in re.split(r",\s", line.label)}
    assert set(shown) == set(table) and len(shown) == 9
    for name, by in table.items():
        for m in by.values():
            point = (m["mean"], m["low"], m["high"])
            assert point in zip(shown[name].y, shown[name].low, shown[name].high, strict=True)
