"""The README and the docstrings: their commands parse, the quick ones run, their code runs, their
links lead somewhere, and the map names every file."""

import ast
import re
import runpy
import shlex
from functools import cache

import pytest
from conftest import ROOT

import cli
from butler import Butler, ButlerConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md",
         *sorted(ROOT.glob("lessons/*.md"))]
MODULES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("fast/*.py")),
           *sorted(ROOT.glob("workshop/*.py"))]


def commands(text: str) -> list[tuple[str, ...]]:
    """The commands in ```sh blocks, as words. `a && b` are two; settings before them are left out.

    >>> A=1 python x.py --y "a b"  # why        -> ("python", "x.py", "--y", "a b")
    """
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append(tuple(w for w in words[:end] if not re.match(r"[A-Z_]+=", w)))
                words = words[end + 1 :]
    return found


def commands_in_docstring(path) -> list[tuple[str, ...]]:
    """The indented lines that begin with python or torchrun, up to two blanks in a row."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    lines = re.findall(r"^    ((?:[A-Z_]+=\S+ )?(?:python|torchrun) .*?)(?:  .*)?$", text, re.M)
    return commands("```sh\n" + "\n".join(lines) + "\n```")


EVERY = sorted({c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))}
               | {c for path in MODULES for c in commands_in_docstring(path)})
SCRIPTS = [c for c in EVERY if c[0] in ("python", "torchrun") and c[1:3] != ("-m", "pytest")]
WRONG = ("python", "sample.py", "--budget", "x")  # cli.py shows an error with it
QUICK = [c for c in commands(README)
         if c[:2] == ("python", "sample.py") and "path/to" not in " ".join(c)]
OWN = [c for c in commands(README.split("## Your own model")[1].split("## Results")[0])
       if c[0] == "python" and "--resume" not in c]
SMALLER = {  # flags behind a command that make it quick
    "train.py": "--steps 2 --length 64 --long 128 --longest 128 --rows 16 --reuse 2 --documents 1 "
                "--windows 1",
    "sample.py": "--max-new-tokens 3", "synth_task.py": "--n 1"}


@cache
def names_in(script) -> dict:
    return runpy.run_path(str(script))


@pytest.mark.parametrize("command", [c for c in SCRIPTS if c != WRONG], ids=" ".join)
def test_commands_name_scripts_and_flags_that_exist(command):
    words = list(command)
    if words[1] == "-m":
        words[2] = words[2].replace(".", "/") + ".py"
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = ROOT / words[at], words[at + 1 :]  # torchrun's own flags stand before
    names = names_in(script)
    if {"main", "Config"} <= names.keys():
        cli.parse(names["Config"], flags)
    else:
        source = script.read_text(encoding="utf-8")
        assert "__main__" in source, "the script does nothing when it is run"
        assert all(flag in source for flag in flags if flag.startswith("--"))


def test_a_wrong_command_is_refused():
    with pytest.raises(cli.UserError, match="'x'"):
        cli.parse(names_in(ROOT / "sample.py")["Config"], WRONG[2:])


def test_commands_are_found():
    text = "```sh\npip install x && A=1 python a.py --b 'c d'  # why\npython e.py \\\n  -f\n```\n"
    assert commands(text) == [("pip", "install", "x"), ("python", "a.py", "--b", "c d"),
                              ("python", "e.py", "-f")]
    assert ("python", "-m", "pytest", "-q") in EVERY
    assert len(QUICK) > 3 and {c[1] for c in OWN} == set(SMALLER)


def test_installed_requirements_exist():
    files = [c[c.index("-r") + 1] for c in EVERY if c[0] == "pip" and "-r" in c]
    assert files and all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("command", QUICK, ids=" ".join)
def test_quick_commands_run(command, main, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "README.md").write_text(README[:2000])  # a command reads it
    monkeypatch.chdir(tmp_path)
    report = main(*command[1:], "--max-new-tokens", 3)
    assert report["text"] and report["attended_per_step"] < report["cached_tokens"]
    assert (tmp_path / "page.html").exists() == ("--html" in command)


def test_commands_for_an_own_model_run_one_after_another(
        main, folder, model_path, tmp_path, monkeypatch):
    """A small Llama's folder, the default model as a GGUF file, a folder of text, a question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "llama").symlink_to(folder)
    (tmp_path / "path" / "to" / "model.gguf").symlink_to(model_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text((ROOT / "LICENSE").read_text())
    (tmp_path / "questions.jsonl").write_text(
        '{"context": "The door is red. ", "question": "The door is", "answer": "red"}\n')
    for command in OWN:
        report = main(*command[1:], *SMALLER[command[1]].split())
        assert report["config"] and ("table" in report or "text" in report or report["results"])
    assert (tmp_path / "out" / "mine.safetensors").exists()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.S | re.M))
def test_python_blocks_run(code, in_memory, folder, tmp_path, monkeypatch):
    """`path/to/model` is a small model, `out/mine.safetensors` a butler for it."""
    monkeypatch.chdir(tmp_path)
    if "path/to" in code:
        (tmp_path / "path" / "to").mkdir(parents=True)
        (tmp_path / "path" / "to" / "model").symlink_to(folder)
        model, *_ = cli.engine("transformers").load("path/to/model")
        Butler(ButlerConfig.for_model(model)).save(tmp_path / "out" / "mine.safetensors")
    exec(compile(code, "README.md", "exec"), {})


def test_ci_runs_the_test_command():
    assert ("python", "-m", "pytest", "-q") in commands((ROOT / "CONTRIBUTING.md").read_text())
    assert "\npython -m pytest -q\n" in (ROOT / ".ci" / "run").read_text()


LINKS = sorted({(page, target) for page in PAGES for target in
                re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("page, target", LINKS, ids=str)
def test_links_lead_to_files_and_headings(page, target):
    name, _, heading = target.partition("#")
    path = page.parent / name if name else page
    assert path.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_the_map_names_every_file_at_the_top():
    the_map = README.split("## Map")[1].split("```")[1]
    named = set(re.findall(r"\b[\w-]+(?:\.py|/)", the_map))
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*") if path.is_file()}
    assert named >= files | folders - {"out/"}
    assert all((ROOT / name).exists() for name in named)


def test_the_four_files_are_as_long_as_the_readme_says():
    sentence = re.search(r"Read these four files, about ([\d,]+) lines: (.*?)\.\s", README, re.S)
    files = re.findall(r"`(\w+\.py)`", sentence[2])
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert len(files) == 4 and abs(lines - int(sentence[1].replace(",", ""))) <= 100
