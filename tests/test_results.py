"""results/: tables and figures show the numbers of the JSON files, and of made-up reports."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

RESULTS = ROOT / "results"
sys.path.append(str(RESULTS))

import draw  # noqa: E402
import make  # noqa: E402
import render  # noqa: E402

import cli  # noqa: E402
from cli import UserError  # noqa: E402
from selection import NAMES  # noqa: E402

READMES = [ROOT / "README.md", RESULTS / "README.md"]
FILES = sorted(RESULTS.glob("*.json"))


def m(mean, low=None, high=None, **more):
    low, high = mean - 0.1 if low is None else low, mean + 0.1 if high is None else high
    return {"mean": mean, "low": low, "high": high, "n": 20} | more


def lines_of(table: str) -> list[list[str]]:
    """A Markdown table -> its cells, without the line of dashes"""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]


# ---------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("readme", READMES, ids=["README", "results"])
def test_the_tables_are_those_of_the_files(readme):
    text = readme.read_text()
    assert render.render(text) == text, "run python results/render.py"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_number_has_its_command_hardware_and_commit(path):
    report = render.load(path.stem)
    assert report["command"].startswith("python ") and report["hardware"]
    assert re.match(r"[0-9a-f]{7,40}(-dirty)?$", report["commit"])
    assert all(m["low"] <= m["mean"] <= m["high"] and m["n"] > 0
               for *_, m in render.measures(report.get("results", {})))


def test_every_file_has_a_command_that_measures_it():
    steps = make.STEPS | make.TIMED
    for path in FILES:
        assert path.stem in steps or path.stem.rsplit("_", 1)[0] in make.TIMED, path.name


def test_every_command_is_understood():
    """The flags of all steps exist."""
    import compare

    import bench
    import synth_task
    import train

    for step, command in (make.STEPS | make.TIMED).items():
        script, *flags = command.split()
        module = {"bench.py": bench, "synth_task.py": synth_task, "train.py": train,
                  "results/compare.py": compare}[script]
        assert cli.parse(module.Config, flags), step


@pytest.mark.parametrize("name", draw.FIGURES)
def test_a_figure_is_drawn_from_the_numbers_that_are_there(name):
    svg = RESULTS / f"{name}.svg"
    panels = draw.FIGURES[name]()
    assert draw.digest(panels) in svg.read_text(), "run python results/render.py"
    shown = " ".join("".join(e.itertext()) for e in ElementTree.parse(svg).iter()
                     if e.tag.endswith("}text"))
    for panel in panels:
        assert all(name in shown for name in (panel["title"], *panel["lines"]))
    assert any(f"{name}.svg)" in readme.read_text() for readme in READMES)


def test_there_is_no_other_figure():
    assert {path.stem for path in RESULTS.glob("*.svg")} == set(draw.FIGURES)


def test_every_measured_answer_is_in_the_figure():
    (panel,) = draw.accuracy()
    for task, name, budget, m in render.measures(render.load("budgets")["results"]):
        ys = [point[1:] for point in panel["lines"][name]
              if name == "dense" or point[0] == 100 * float(budget)]
        assert ys and all(y == [m["mean"], m["low"], m["high"]] for y in ys), (task, name, budget)


# ---------------------------------------------------------------------------- made-up reports

ORIGIN = {"command": "python bench.py", "hardware": "an abacus", "commit": "1234567"}


def test_a_table_of_scores():
    report = {"results": {"one": {"dense": {"1.0": m(0.9)},
                                  "butler": {"0.1": m(0.5, 0.25, 0.75), "40": m(12.34, 11, 13)}},
                          "two": {"butler": {"0.1": m(0.7, steps=4.56)}}}} | ORIGIN
    text = render.table(report)
    assert lines_of(text) == [
        ["", "one, 10 %", "one, 40 tokens", "two, 10 %"],
        ["dense", "0.900 [0.800, 1.000]", "0.900 [0.800, 1.000]", ""],
        ["butler", "0.500 [0.250, 0.750]", "12.3 [11.0, 13.0]", "0.700 [0.600, 0.800]; 4.6 steps"]]
    assert text.endswith("\n\nn = 20; an abacus; commit 1234567: `python bench.py`")
    assert "two" not in render.table(report, "one") and "one" not in render.table(report, "two")


def test_many_tasks_are_down():
    results = {f"task {i}": {"dense": {"1.0": m(0.9)}, "butler": {"0.1": m(i / 10)}}
               for i in range(5)}
    head, *rest = lines_of(render.table({"results": results} | ORIGIN))
    assert head == ["", "dense", "butler, 10 %"]
    assert [line[0] for line in rest] == list(results)
    assert rest[3][2] == "0.300 [0.200, 0.400]"


def test_a_table_of_times():
    rows = [{"selector": "dense, float32", "kept": 1.0, "context": 512, "ms": 10.0, "speedup": 1},
            {"selector": "butler", "kept": 0.05, "context": 512, "ms": 4.0, "speedup": 2.5},
            {"selector": "butler", "kept": 0.05, "context": 2048, "ms": 8.04, "speedup": None,
             "first_token_s": 1.25},
            {"selector": "butler", "kept": 0.05, "context": 2048, "ms": 9.0, "speedup": None}]
    text = render.table({"rows": rows, "config": {"engine": "fast"}} | ORIGIN)
    assert lines_of(text)[1:] == [["dense, float32", "10.0 (1.00x)", ""],
                                  ["butler, 5 %", "4.0 (2.50x)", "8.0; 1.2 s"]]
    assert "engine fast; an abacus" in text


def test_the_table_of_a_training():
    text = render.table(render.load("train_default"))
    table = render.load("train_default")["table"]
    for name, row in table.items():
        (line,) = re.findall(rf"^{name} .*", text, re.M)
        assert f"{row['coreference']['mean']:.2f}" in line
        assert all(f"{m['mean']:.3f}" in line for m in row["kept"].values())


def test_older_keys_become_todays(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    old = {"results": {"over_oracle": {"butler": {"0.1": m(0.5)}},
                       "copy": {"butler, drift 0.2": {"0.1": m(0.5)}}},
           "steps between choices": {"copy": {"butler, drift 0.2, 0.1": 3.5}},
           "rows": [{"candidate": "llama.cpp", "ms": 1.0},
                    {"suite": "speed", "selector": "dense, bfloat16", "kept": None},
                    {"suite": "speed", "selector": "choice for nothing, 0.05", "kept": 0.05}]}
    (tmp_path / "old.json").write_text(json.dumps(old | ORIGIN))
    report = render.load("old")
    assert list(report["results"]) == ["copy", "over oracle"]
    assert report["results"]["copy"]["butler, drift 0.2"]["0.1"] == m(0.5, steps=3.5)
    assert [row["selector"] for row in report["rows"]] == ["llama.cpp", "dense"]


def test_only_what_is_between_markers_is_replaced():
    text = "a\n<!-- results/coreference.json -->\nold\n<!-- end -->\nb\n"
    new = render.render(text)
    assert new.startswith("a\n<!-- results/coreference.json -->\n| coreference |")
    assert new.endswith("`\n<!-- end -->\nb\n") and "old" not in new
    assert render.render(new) == new
    for unknown in (text.replace("coreference", "no_such_file"),
                    "<!-- results: nothing -->\nold\n<!-- end -->\n"):
        assert render.render(unknown) == unknown


def test_the_paper_beside_the_repository():
    text = render.render("<!-- results: paper -->\n<!-- end -->\n")
    table = {line[0]: line[1:] for line in lines_of(text)}
    ours = render.load("coreference")["results"]["coreference"]
    assert f"butler {ours['butler']['0.1']['mean']:.2f}" in table["co-reference, answers right"][1]
    assert len(table) == 9 and all(len(row) == 2 for row in table.values())


def test_a_figure_is_drawn_alike_twice(tmp_path):
    pytest.importorskip("matplotlib")
    points = [[512, 0.5, 0.4, 0.6], [2048, 0.7, 0.6, 0.8]]
    panels = [{"title": "made up", "x": "tokens", "y": "share", "log_y": log_y,
               "lines": dict.fromkeys((*NAMES, "a new selector"), points)}
              for log_y in (False, True)]
    for name in "ab":
        draw.draw(panels, tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert all(name.encode() in first for name in (*NAMES, "a new selector", "2,048"))


# ---------------------------------------------------------------------------- making them


def test_a_step_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "script.py").write_text(
        "import json, sys\nprint('a table')\nprint(json.dumps({'results': {'n': int(sys.argv[2])}, "
        "'command': ' '.join(['python', *sys.argv])}))\n")
    target = tmp_path / "results" / "step.json"
    assert make.measure("step", "script.py --n 3", again=False)
    assert json.loads(target.read_text())["results"] == {"n": 3}
    assert not make.measure("step", "script.py --n 3", again=False)
    assert make.measure("step", "script.py --n 3", again=True)
    assert make.measure("step", "script.py --n 4", again=False)
    assert json.loads(target.read_text())["command"] == "python script.py --n 4"
    with pytest.raises(UserError, match="step step ended with exit code 1"):
        make.measure("step", "script.py --n x", again=False)
    assert json.loads(target.read_text())["results"] == {"n": 4}


def test_damaged_reports_are_named(tmp_path, monkeypatch):
    """A merge that went wrong, half a file, and JSON that is no report: where they are read."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(render, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "step.json"
    path.parent.mkdir()
    for text in b"<<<<<<< HEAD\n{}", b'{"results": {', b"[]", b"{}", b"\xff":
        path.write_bytes(text)
        with pytest.raises(UserError, match=str(path)):
            render.render("<!-- results/step.json -->\n<!-- end -->\n")
        with pytest.raises(UserError, match=str(path)):
            make.measure("step", "script.py", again=False)
        assert path.read_bytes() == text


def test_what_cannot_be_written_leaves_the_old_files(tmp_path, monkeypatch):
    """Tables, a figure and a log, on a disk that is full or in a folder that is a file."""
    pytest.importorskip("matplotlib")
    from pathlib import Path

    readme, figure = tmp_path / "README.md", tmp_path / "a.svg"
    for path in readme, figure:
        path.write_text("old")
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(draw, "main", lambda: None)
    with pytest.raises(UserError, match="step a: .*out"):
        make.measure("a", "script.py", again=False)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=f"cannot write {readme}: .*No space"):
        render.main(render.Config())
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(UserError, match=f"cannot write {figure}: .*No space"):
        draw.draw([{"title": "", "x": "", "y": "", "log_y": False,
                    "lines": {"dense": [[512, 0.5, 0.4, 0.6]]}}], figure)
    assert [path.read_text() for path in (readme, figure)] == ["old", "old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a.svg", "out"]


def test_candidates_decode_by_turns():
    import compare

    calls = []
    steps = {name: lambda turn, name=name: calls.append((turn, name)) for name in "ab"}
    ms = compare.by_turns(steps, 3)
    assert calls == [(turn, name) for turn in range(5) for name in "ab"]
    assert list(ms) == ["a", "b"] and min(ms.values()) >= 0


@pytest.mark.slow
def test_compare_has_all_candidates(main):
    pytest.importorskip("transformers")
    rows = main("results/compare.py", "--contexts", "300", "--n", 1)["rows"]
    names = [row["selector"] for row in rows]
    assert names[:2] == ["dense", "butler"] and len(names) >= 8
    assert all(row["ms"] > 0 for row in rows)
    assert [row["first_token_s"] is not None for row in rows[:3]] == [True, False, True]
