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

from baselines import NAMES  # noqa: E402
from measure import tables  # noqa: E402

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


def test_tradeoff_is_drawn_with_a_point_for_each_selector_and_budget(tmp_path):
    def m(mean, ms):
        return {"mean": mean, "low": mean - 0.1, "high": mean, "n": 20, "ms": ms}

    table = {name: {"0.25": m(0.9, 30.0 + i), "32": m(0.2, 20.0), "0.02": m(0.5, 25.0 + 9 * i)}
             for i, name in enumerate(NAMES[1:])} | {"dense": {"1.0": m(1.0, 40.0)}}
    report = {"results": {"needle_prose@4096": table, "copy@4096": table}, "hardware": "",
              "commit": "", "command": "python bench.py"}
    panels = draw.tradeoff({"tradeoff_avx2": report})
    assert [panel.title.split(",")[0] for panel in panels] == ["needle_prose", "copy"]
    for panel in panels:
        assert {line.label for line in panel.lines} == set(NAMES) <= set(draw.COLOURS)
        for line in panel.lines:
            points = set(zip(line.x, line.y, line.low, line.high, strict=True))
            assert points == {(m["ms"], m["mean"], m["low"], m["high"])
                              for m in table[line.label].values()}
            assert list(line.notes) == ([] if line.label == "dense" else ["2%", "", "32"])
            assert min(panel.ticks) <= min(line.x) or len(panel.ticks) > 1
    pytest.importorskip("matplotlib")
    draw.draw(panels, tmp_path / "a.svg")
    shown = words(tmp_path / "a.svg")
    assert all(word in shown for word in (*NAMES, "2%", "32", "score", "ms a step"))
    text = tables.table("tradeoff_avx2", report)
    assert text.count("0.90 [0.80, 0.90]") == 16 and "needle_prose@4096  " in text
    lines = [line.split() for line in text.splitlines() if line.startswith("butler 32 tokens")]
    assert len(lines) == 2 and lines[0][-2:] == ["20.0", "2.00"]
