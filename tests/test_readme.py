"""README.md cannot rot: its flags are real, its code runs, its tables are those of results/."""

import json
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines()]


def test_tables_are_those_of_the_results():
    render = runpy.run_path(str(ROOT / "results" / "render.py"))["render"]
    for text in (README, (ROOT / "results" / "README.md").read_text()):
        assert render(text) == text, "run python results/render.py"


def test_every_result_has_its_table_and_its_command():
    text = (ROOT / "results" / "README.md").read_text()
    tables = dict(re.findall(r"<!-- results/(\S+) -->\n(.*?)\n?<!-- end -->", text, re.S))
    written = {p.name for p in (ROOT / "results").glob("*.json")} - {"contracts.json"}
    assert written <= set(tables)
    for name, table in tables.items():
        if name not in written:
            assert table == "not measured yet"
            continue
        report = json.loads((ROOT / "results" / name).read_text())
        assert report["command"].startswith("python ") and report["hardware"] and report["commit"]


def test_the_first_command_stands_before_line_20():
    assert "python train.py" in "\n".join(README.splitlines()[:20])
    assert len(re.sub(r"<!-- results.*?<!-- end -->", "", README, flags=re.S).split()) < 1400


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_commands_name_files_and_flags_that_exist(command):
    words = shlex.split(command.split("&&")[-1])
    script = next(word for word in words if word.endswith(".py"))
    known = {f.name for f in fields(runpy.run_path(str(ROOT / script))["Config"])}
    for word in words[words.index(script) :]:  # what stands before are torchrun's own
        if word.startswith("--"):
            assert word[2:].replace("-", "_") in known, f"{script} has no {word}"


def test_every_file_of_the_map_exists_and_says_what_it_is():
    named = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert sorted(named) == sorted(p.name for p in ROOT.glob("*.py"))
    for name in named:
        assert (ROOT / name).read_text().startswith(f'"""{name} - '), f"{name} opens with its name"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_test_command_is_the_one_that_ci_runs():
    assert any(c.endswith("python -m pytest -q") for c in COMMANDS)
