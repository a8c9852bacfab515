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
    import step as one_step

    import bench
    import synth_task
    import train

    for step, command in (make.STEPS | make.TIMED).items():
        script, *flags = command.split()
        module = {"bench.py": bench, "synth_task.py": synth_task, "train.py": train,
                  "results/compare.py": compare, "results/step.py": one_step}[script]
        assert cli.parse(module.Config, flags), step


def shown(svg) -> str:
    """All that is written in an SVG."""
    return " ".join("".join(e.itertext()) for e in ElementTree.parse(svg).iter()
                    if e.tag.endswith("}text"))


@pytest.mark.parametrize("name", draw.FIGURES)
def test_a_figure_is_drawn_from_the_numbers_that_are_there(name):
    svg = RESULTS / f"{name}.svg"
    message, panels = draw.FIGURES[name]()
    assert draw.digest(message, panels) in svg.read_text(), "run python results/render.py"
    words = shown(svg)
    assert message in words
    for panel in panels:
        labels = panel.get("lines") or panel["dots"]
        assert all(label in words for label in (panel["title"], *labels))
        assert ("(logarithmic)" in words) == any(panel.get("log_x") for panel in panels)
    assert any(f"{name}.svg)" in readme.read_text() for readme in READMES)


def test_there_is_no_other_figure():
    assert {path.stem for path in RESULTS.glob("*.svg")} == {*draw.FIGURES, "step"}


def test_the_answers_with_a_tenth_of_the_tokens_are_in_the_figure():
    _, (panel,) = draw.accuracy()
    for task, name, budget, m in render.measures(render.load("budgets")["results"]):
        if budget in ("0.1", "1.0"):
            assert panel["dots"][name] == [m["mean"], m["low"], m["high"]], task


def test_the_step_shows_both_selections():
    """Filled are the chosen tokens, framed those that are always selected, on either side."""
    report, svg = render.load("step"), RESULTS / "step.svg"
    assert draw.digest(report) in svg.read_text(), "run python results/render.py"
    rects = [e.get("class") for e in ElementTree.parse(svg).iter() if e.tag.endswith("}rect")]
    S = len(report["texts"])
    always = {*range(report["sinks"]), *range(S - report["window"], S)}
    for name in "butler", "oracle":
        assert always <= set(report[name])
        drawn = [i for i in set(report[name]) - always if "\n" not in report["texts"][i]]
        assert rects.count(name) == len(drawn) > 10
    assert rects.count("always") == 2 * len(always)
    for line in draw.step_lines(report):
        text = "".join(report["texts"][place] for place in line).strip()
        assert shown(svg).count(text) >= 2 and len(text) <= draw.COLUMNS


# ---------------------------------------------------------------------------- colours


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_colour_would_do_on_both_grounds():
    """Which is why every figure has two sets."""
    best = contrast(*draw.GROUND) ** 0.5  # of a grey in the middle
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and best < 4.5


def test_every_colour_is_readable_on_its_ground():
    pairs = [draw.INK, draw.GREY, *(colours for colours, _ in draw.LOOKS.values())]
    for pair in pairs:
        for colour, ground in zip(pair, draw.GROUND, strict=True):
            assert contrast(colour, ground) >= 4.5, (colour, ground)


def test_no_two_selectors_look_alike():
    assert {*NAMES, "transformers", "llama.cpp"} <= set(draw.LOOKS)
    assert len(set(draw.LOOKS.values())) == len(draw.LOOKS)
    butler = draw.LOOKS["butler"][0]
    assert [name for name, (colours, _) in draw.LOOKS.items() if colours == butler] == ["butler"]
    assert draw.looks("butler, drift 0.25") == draw.looks("butler 1024") == draw.looks("butler")


def test_labels_keep_apart_and_in_order():
    for heights in ([0.9, 0.91, 0.92], [0.0, 0.0, 0.01, 0.5], [0.2, 0.9], [0.5] * 6):
        named = dict(enumerate(heights))
        moved = draw.apart(named)
        ordered = sorted(moved.values())
        assert all(b - a >= 0.0619 for a, b in zip(ordered, ordered[1:], strict=False))
        assert sorted(named, key=named.get) == sorted(moved, key=moved.get)
        assert max(abs(moved[i] - named[i]) for i in named) <= 0.062 * len(named)
    assert draw.apart({"a": 0.2, "b": 0.9}) == {"a": 0.2, "b": 0.9}


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
            {"selector": "butler", "kept": 0.05, "context": 2048, "ms": 8.04, "speedup": None},
            {"selector": "butler", "kept": 0.05, "context": 2048, "ms": 9.0, "speedup": None}]
    text = render.table({"rows": rows, "config": {"engine": "fast"}} | ORIGIN)
    assert lines_of(text)[1:] == [["dense, float32", "10.0 (1.00x)", ""],
                                  ["butler, 5 %", "4.0 (2.50x)", "8.0"]]
    assert "engine fast; an abacus" in text


def test_the_table_of_a_training():
    text = render.table(render.load("train_default"))
    table = render.load("train_default")["table"]
    for name, row in table.items():
        (line,) = re.findall(rf"^{name} .*", text, re.M)
        assert f"{row['coreference']['mean']:.2f}" in line
        assert all(f"{m['mean']:.3f}" in line for m in row["kept"].values())


def test_parts_of_a_step_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    old = {"rows": [{"suite": "speed", "selector": "dense, bfloat16", "kept": None},
                    {"suite": "speed", "selector": "choice for nothing, 0.05", "kept": 0.05}]}
    (tmp_path / "old.json").write_text(json.dumps(old | ORIGIN))
    assert [row["selector"] for row in render.load("old")["rows"]] == ["dense"]


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
    assert len(table) in (9, 10) and all(len(row) == 2 for row in table.values())


def test_selections_without_training_are_named():
    kept = render.load("length")["results"]["kept of oracle @8000"]
    for name in ("butler", "sketch", "ahead1", "ahead5"):
        assert f"{kept[name]['0.1']['mean']:.1%}" in render.untrained()


def test_foresight_by_groups_of_layers(monkeypatch):
    """Ratios of sums over layers 1 to 5 and over those above."""
    layers = {"oracle": {"0.1": [0.8] * 7}, "ahead5": {"0.1": [0.4] * 5 + [0.6, 0.8]}}
    of_oracle = {f"kept of oracle @{context}": {"ahead5": {"0.1": m(mean)}}
                 for context, mean in ((512, 0.6), (2048, 0.7), (8000, 0.8))}
    report = {"config": {"n": 2}, "results": of_oracle,
              "layers": {f"kept @{context}": layers for context in (512, 2048, 8000)},
              "bytes": {"oracle": 128, "ahead5": 36}, "hardware": "h", "commit": "c",
              "command": "x"}
    monkeypatch.setattr(render, "load", lambda name: report)
    _, line = lines_of(render.foresight())
    assert line[:2] == ["ahead5", "36"] and line[3:5] == line[6:8] == ["0.500", "0.875"]
    assert [cell.split()[0] for cell in line[2::3]] == ["0.600", "0.700", "0.800"]


def test_tasks_read_sparsely_stand_beside_dense(monkeypatch):
    report = {"config": {"n": 20}, "results": {"a@4096": {"butler": {"0.1": m(0.5)}}}} | ORIGIN
    scores = {("a", 4096): {"dense": {"1.0": m(0.75)}}}
    monkeypatch.setattr(render, "load", lambda name: report)
    monkeypatch.setattr(render, "ruler_scores", lambda: scores)
    assert lines_of(render.ruler_prefill())[1] == ["a", "0.500 [0.400, 0.600] of 0.750"]
    scores["a", 4096]["dense"]["1.0"]["n"] = 40
    with pytest.raises(UserError, match="a@4096: 20 documents beside 40"):
        render.ruler_prefill()


def test_agreement_has_a_row_for_each_budget(monkeypatch):
    results = {f"{what} @4096": {"butler": {"0.05": m(0.5), "0.1": m(0.75)}}
               for what in ("same token", "KL", "equal text")}
    report = {"config": {"n": 20}, "results": results} | ORIGIN
    monkeypatch.setattr(render, "load", lambda name: report)
    _, *rows = lines_of(render.agreement())
    assert [row[0] for row in rows] == [f"butler, {b} % of 4,096 tokens" for b in (5, 10)]
    assert rows[1][1:] == ["0.750 [0.650, 0.850]"] * 3


def test_the_mean_of_dense_leaves_out_what_dense_fails(monkeypatch):
    def by(dense, butler):
        return {"dense": {"1.0": m(dense)},
                "butler": {"0.05": m(butler / 2), "0.1": m(butler)}}

    scores = {("a", 1024): by(1.0, 0.9), ("a", 2048): by(0.8, 0.8), ("b", 1024): by(0.79, 0.0)}
    monkeypatch.setattr(render, "ruler_scores", lambda: scores)
    assert render.of_dense() == {"0.05": [0.45, 0.5], "0.1": [0.9, 1.0]}
    text = render.ruler()
    assert "In the other 2 the butler reaches 47.5% with 5 % and 95.0% with 10 %" in text
    assert lines_of(text)[1:] == [["a", "0.90 of 1.00", "0.80 of 0.80"],
                                  ["b", "*0.00 of 0.79*", ""]]


def test_the_wait_is_a_prompt_and_100_steps_of_the_fastest_form(tmp_path, monkeypatch):
    rows = [{"context": 2048, "selector": name, "ms": ms, "first_token_s": first}
            for name, ms, first in (("dense", 10.0, 2.0), ("transformers, a", 80.0, 3.0),
                                    ("transformers, b", 50.0, None),
                                    ("transformers, a, our butler", 1.0, 1.0))]
    (tmp_path / "compare_avx2.json").write_text(json.dumps({"rows": rows} | ORIGIN))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert lines_of(render.wait()) == [["prompt, then 100 new tokens", "2,048 tokens"],
                                       ["dense", "3.0 s"], ["transformers", "8.0 s"]]


def test_tasks_stand_beside_dense():
    table = lines_of(render.ruler())
    scores = render.ruler_scores()
    assert len(table) - 1 == len({task for task, _ in scores}) <= 10
    by = scores["needle_prose", 8000]
    (cell,) = [line[-1] for line in table if line[0] == "needle_prose"]
    assert f"{by['butler']['0.1']['mean']:.2f} of {by['dense']['1.0']['mean']:.2f}" in cell


def test_a_figure_is_drawn_alike_twice(tmp_path):
    pytest.importorskip("matplotlib")
    points = [[512, 0.5, 0.4, 0.6], [2048, 0.7, 0.6, 0.8]]
    names = [*draw.LOOKS, "a new selector"]
    panels = [{"title": "made up", "x": "tokens", "y": "share", "log_x": log_x,
               "lines": dict.fromkeys(names, points)} for log_x in (False, True)]
    for name in "ab":
        draw.draw("a message", panels, tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert all(name.encode() in first for name in (*names, "a message", "2,048"))
    assert b"prefers-color-scheme: dark" in first


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
        draw.draw("", [{"title": "", "x": "", "y": "", "log_x": False,
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
