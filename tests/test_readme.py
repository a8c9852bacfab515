"""What is written about the repository cannot rot: its commands parse, the quick ones run, its code
runs, its tables are those of results/, its links lead somewhere, its files are what they say."""

import ast
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT

from beyond.attach import Anatomy
from butler import Butler, ButlerConfig
from common import cli
from sample import BREAK_EVEN
from selection import Selector

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()
ROOMS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
TOP = sorted(ROOT.glob("*.py"))
MODULES = [*TOP, *(path for room in ROOMS for path in sorted(room.glob("*.py")))]
QUICK = ["python sample.py --html page.html",
         'python sample.py --chat --prompt "Name three rivers." --budget 32']
PRODUCT = [*MODULES, *sorted((ROOT / "results").glob("*.py"))]


def commands(text: str) -> list[str]:
    """`python ...` and `torchrun ...`: in a line of their own, up to two blanks or a #, or in
    backticks."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:.*&& | {4})?((?:python|torchrun) .*?)(?: *#.*| {2,}[^ -].*)?$", text,
                       re.M)
    inline = re.findall(r"`((?:python|torchrun)\s[^`]*)`", text)
    return [" ".join(c.split()) for c in lines + inline
            if ".py" in c or re.match(r"python -m \w+\.", c)]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()), clean=False)


WRITTEN = {"README.md": README, "results/README.md": RESULTS} | {
    str(path.relative_to(ROOT)): docstring(path)
    for path in PRODUCT}
EVERY = sorted({(where, c) for where, text in WRITTEN.items() for c in commands(text)})


# ---------------------------------------------------------------------------- commands and code


@pytest.mark.parametrize("where, command", EVERY, ids=lambda x: x[:60])
def test_commands_name_files_and_flags_that_exist(where, command):
    words = shlex.split(command.replace("[", "").replace("]", ""))
    if words[1] == "-m":
        words[2] = words[2].replace(".", "/") + ".py"
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = ROOT / words[at], words[at + 1 :]  # what stands before are torchrun's own
    inside = runpy.run_path(str(script))
    if "Config" in inside and {"run", "parse"} & inside.keys():
        cli.parse(inside["Config"], flags)
    else:  # what it shows when run alone
        source = script.read_text()
        assert "__main__" in source
        assert all(re.search(rf"\b{f[2:]}: .* = flag\(", source) for f in flags if f[:2] == "--")


def test_commands_are_found():
    found = {where for where, _ in EVERY}
    assert found >= {"README.md", "results/README.md", "measure/speed_offload.py", "train.py"}
    text = "pip x && python a.py --b\n    python c.py -d \\\n      --e f   text\n`python\ng.py`"
    assert commands(text) == ["python a.py --b", "python c.py -d --e f", "python g.py"]
    assert {c for where, c in EVERY if where == "README.md"} >= set(QUICK)


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(command, main, tmp_path, monkeypatch):
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    report = main(*shlex.split(command)[1:])
    assert report["text"].strip() and report["attended_per_step"] < report["cached_tokens"]
    assert (tmp_path / "page.html").exists() == ("--html" in command)


@pytest.fixture
def elsewhere(folder, tmp_path, monkeypatch):
    """A folder with what the README names: a Qwen3 in path/to/model, its butler in out."""
    there = tmp_path / "path" / "to" / "model"
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=None))
    model.save_pretrained(there)
    shutil.copy(folder / "tokenizer.json", there)
    (tmp_path / "out").mkdir()
    butler = Butler(ButlerConfig.for_model(Anatomy(model)))
    butler.save(tmp_path / "out" / "mine.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_blocks_run(code, in_memory, elsewhere):
    made = {}
    exec(compile(code, "README.md", "exec"), made)
    if "tokens" in made:
        assert made["tokens"].shape[1] > made["prompt"]["input_ids"].shape[1]


def test_the_test_command_is_the_one_that_ci_runs():
    assert re.search(r"&& python -m pytest -q$", README, re.M)


# ---------------------------------------------------------------------------- tables and links


def test_tables_are_those_of_the_results():
    render = runpy.run_path(str(ROOT / "results" / "render.py"))["render"]
    for text in (README, RESULTS):
        assert render(text) == text, "run python results/render.py"


def test_every_result_has_its_table_and_its_command():
    tables = dict(re.findall(r"<!-- results/(\S+) -->\n(.*?)\n?<!-- end -->", RESULTS, re.S))
    written = {p.name for p in (ROOT / "results").glob("*.json")} - {"contracts.json"}
    assert written <= set(tables)
    for name, table in tables.items():
        if name not in written:
            assert table == "not measured yet"
            continue
        report = json.loads((ROOT / "results" / name).read_text())
        assert report["command"].startswith("python ") and report["hardware"] and report["commit"]


LINKS = sorted({(name, target) for name in ("README.md", "results/README.md")
                for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", WRITTEN[name])})


@pytest.mark.parametrize("name, target", LINKS)
def test_links_lead_to_files_and_headings(name, target):
    path, _, heading = target.partition("#")
    path = (ROOT / name).parent / path if path else ROOT / name
    assert path.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


# ---------------------------------------------------------------------------- purpose and length


def test_the_first_command_stands_before_line_20():
    assert "python train.py" in "\n".join(README.splitlines()[:20])


def test_the_course_stays_short():
    prose = re.sub(r"<!-- results.*?<!-- end -->|^\|.*?$", "", README, flags=re.S | re.M)
    assert 1000 < len(prose.split()) <= 1300


def test_numbers_of_the_prose_are_those_of_the_code():
    c, rules = ButlerConfig(30, 576, 3, 64, (1.0,) * 32), Selector(0.1)
    for kind, pays in BREAK_EVEN.items():
        report = json.loads((ROOT / "results" / f"speed_{kind}.json").read_text())
        assert abs(report["break_even"]["butler 0.05, batch 1"] - pays) < 0.05 * pays
    for text in (f"--dense-below {BREAK_EVEN['avx2']}`",
                 "{avx512-bf16:,} tokens (AVX-512) or {avx2:,} (AVX2)".format(**BREAK_EVEN),
                 f"next R = {c.stride} layers", f"importance key, {c.size} numbers",
                 f"All keep {rules.sinks} first and {rules.window} recent tokens"):
        assert text in README


def test_the_map_shows_every_file_at_the_top_and_every_room():
    rows = re.findall(r"^\| `(\w+(?:\.py|/))` \| (.+) \| (.+) \|$", README, re.M)
    assert sorted(name for name, _, _ in rows) == sorted([*(path.name for path in TOP),
                                                          *(f"{room.name}/" for room in ROOMS)])
    assert all(question.count("?") == 1 for _, _, question in rows)


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is(path):
    name = str(path.relative_to(ROOT)).removesuffix("__init__.py")
    assert re.match(rf"{re.escape(name)} - \S.*[.:]$", docstring(path).splitlines()[0])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{name}: {node.name} has {lines} lines"


def test_the_house_stays_small():
    """Bounds on the whole, as bounds on each file only make more files."""
    def lines(paths):
        return sum(len(path.read_text().splitlines()) for path in paths)

    assert len(TOP) <= 10 and lines(TOP) <= 2900 and lines(PRODUCT) <= 9910


def test_every_exercise_has_a_test_to_un_skip():
    tests = (ROOT / "tests" / "test_exercises.py").read_text()
    skipped = re.findall(r'^@pytest.mark.skip\(reason="exercise (\d+): .+"\)$', tests, re.M)
    told = re.findall(r"^(\d+)\. \*\*", README, re.M)
    assert told == sorted(set(skipped), key=int) and len(told) >= 6
