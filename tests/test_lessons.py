"""Every lesson runs, draws and ends in one JSON line; lessons/README.md says what they say."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from lessons import l5_position
from lessons.figure import figure, label_ends, looks
from lessons.write import MARKER, README, lesson

LESSONS = sorted((ROOT / "lessons").glob("l[0-9]_*.py"))
NAMES = [path.stem for path in LESSONS]
TEXT = README.read_text(encoding="utf-8")
EXERCISES = (ROOT / "tests" / "test_exercises.py").read_text(encoding="utf-8")

# Flags that make a lesson take seconds
QUICK = {
    "l1_attention": ["--tokens", 200, "--queries", 8],
    "l2_oracle": ["--n", 1],
    "l3_sketch": ["--tokens", 128, "--texts", 1],
    "l4_foresight": ["--steps", 2, "--tokens", 128, "--texts", 1],
    "l5_position": ["--steps", 2, "--length", 64, "--contexts", "64,200"],
    "l6_cost": ["--contexts", "100,300", "--rounds", 1, "--before", 2048],
    "l7_loss": ["--n", 1, "--tokens", 512, "--steps", 8],
}


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "lessons" / f"{name}.py").read_text("utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_runs_and_draws(name, main, tmp_path):
    pytest.importorskip("matplotlib")
    report = main(f"lessons/{name}.py", "--figure", tmp_path / "f.svg", *QUICK[name])
    assert len(report) > 6  # more than the configuration and where the numbers are from
    assert (tmp_path / "f.svg").read_text().count("<path") > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_lesson_runs_as_a_file_and_as_a_module(name, tmp_path):
    for command in ([f"{ROOT}/lessons/{name}.py"], ["-m", f"lessons.{name}"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        assert len(lines) > 4 and json.loads(last)["config"]["figure"] is None


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_ends_with_two_exercises(name):
    text = docstring(name)
    number = name[1]
    assert text.startswith(f"Lesson {number}. ")
    titles = re.findall(rf"^Exercise ({number}\.\d, [^.]+)\.", text, re.M)
    assert len(titles) == 2
    for title in titles:
        assert f'reason="exercise {title}"' in EXERCISES
    assert text.splitlines()[-1].startswith(f"    python -m lessons.{name}")


def test_every_exercise_belongs_to_a_lesson():
    found = re.findall(r'reason="exercise (\d)\.\d, ', EXERCISES)
    assert sorted(found) == sorted("1234567" * 2)


def test_the_readme_has_all_lessons_in_order():
    marked = [name for name, _ in MARKER.findall(TEXT)]
    assert marked == sorted(marked) and set(marked) >= set(NAMES)


@pytest.mark.parametrize("name, block", MARKER.findall(TEXT))
def test_the_readme_tells_what_a_lesson_says(name, block):
    """What was printed is not compared, because other processors round differently."""
    assert block.startswith(lesson(name)), "run python lessons/write.py"
    printed = block.removeprefix(lesson(name))
    assert re.fullmatch(rf"\nWhat it prints without flags:\n\n```\n.*\n```\n\n"
                        rf"!\[.*\]\({name}\.svg\)\n\n"
                        rf".*; commit [0-9a-f]+: `python -m lessons.{name}`\n", printed, re.S)
    assert (ROOT / "lessons" / f"{name}.svg").read_text("utf-8").startswith("<?xml")


def test_a_figure_is_written_as_named(tmp_path):
    pytest.importorskip("matplotlib")
    for name, start in ("a.svg", b"<?xml"), ("a.png", b"\x89PNG"):
        with figure(str(tmp_path / name)) as (axis,):
            axis.plot([1, 2])
        assert (tmp_path / name).read_bytes().startswith(start)


def test_figures_accept_what_the_exercises_add(tmp_path):
    pytest.importorskip("matplotlib")
    assert looks("stride")["color"] not in (looks("oracle")["color"], looks("butler")["color"])
    rows = {("rotated", str(row)): {512: 0.5, 2048: 0.4} for row in range(7)}
    l5_position.draw(str(tmp_path / "a.svg"), rows, [512, 2048])
    assert (tmp_path / "a.svg").exists()


def test_names_stand_at_the_ends_of_lines_and_apart(tmp_path):
    pytest.importorskip("matplotlib")
    with figure(str(tmp_path / "a.svg")) as (axis,):
        axis.plot([1, 2], [0.1, 0.5], label="low", color="red")
        axis.plot([1, 2], [0.9, 0.51], label="high", color="blue")
        axis.plot([1, 2], [0.2, 0.2])  # without a name
        label_ends(axis)
        names = {text.get_text(): text for text in axis.texts}
        assert {name: text.get_color() for name, text in names.items()} == {
            "low": "red", "high": "blue"}
        assert all(text.xy[0] > 0.9 for text in names.values())
        assert names["high"].xy[1] - names["low"].xy[1] > 0.05
