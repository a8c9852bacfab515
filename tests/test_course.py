"""The course as a whole: it runs alone, a decode step is short, and imports run one way."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import model

# Each file imports only from those in the lines above its own.
ORDER = (("kernel", "cli"), ("tokenizer",), ("model", "selection"), ("butler",), ("synth_task",),
         ("data",), ("bench",), ("train", "sample"))
COURSE = sum(ORDER, ())
ADDED = [path for folder in ("fast", "workshop") for path in sorted((ROOT / folder).glob("*.py"))]


def tree(path):
    return ast.parse(Path(path).read_text())


# ---------------------------------------------------------------------------- it runs alone


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A copy of the course, without fast/ and workshop/."""
    folder = tmp_path_factory.mktemp("course")
    for name in COURSE:
        shutil.copy(ROOT / f"{name}.py", folder)
    for path in ROOT.glob("*.json"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "checkpoints", folder / "checkpoints")
    return folder


def run(folder, line):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *line.split()], cwd=folder, capture_output=True,
                          text=True, timeout=300, env=environment)


@pytest.mark.parametrize("line", [
    "train.py --model {small} --steps 2 --long-every 2 --length 64 --long 96 --span 200 --rows 4 "
    "--windows 1 --longest 64 --documents 1",
    "sample.py --max-new-tokens 2",
    "synth_task.py --n 1 --selectors dense,butler",
    "bench.py --suite length --n 1 --contexts 64"])
def test_scripts_run_without_fast_and_workshop(alone, folder, model_path, line):
    """train.py on a small random model, the others on the default one with the shipped butler."""
    done = run(alone, line.format(small=folder))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["config"]["engine"] == "plain"


def test_a_missing_engine_is_one_line(alone):
    done = run(alone, "sample.py --engine fast")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sample.py: error: this needs fast" in done.stderr


# ---------------------------------------------------------------------------- one decode step


@pytest.fixture(scope="module")
def entered(tiny, tiny_butler):
    """Functions of this repository that one decode step enters, in order: [(file, function)]"""
    ids = torch.arange(60)[None]
    selector = tiny_butler.selector(20)
    cache = tiny.new_cache(1, 60)
    tiny.prefill(ids[:, :58], cache, selector.watch)
    tiny.decode(ids[:, 58:59], cache, selector)
    found = []

    def profile(frame, event, argument):
        code = frame.f_code
        path = Path(code.co_filename)
        if event == "call" and path.parent == ROOT and (path.name, code.co_qualname) not in found:
            found.append((path.name, code.co_qualname))

    sys.setprofile(profile)
    try:
        tiny.decode(ids[:, 59:], cache, selector)
    finally:
        sys.setprofile(None)
    return found


def test_a_decode_step_enters_few_functions_of_few_files(entered):
    print(*(f"{file} {function}" for file, function in entered), sep="\n")
    assert ("model.py", "Llama.decode") in entered
    assert ("butler.py", "Butler.importance_queries") in entered
    assert len(entered) <= 24
    assert len({file for file, _ in entered}) <= 4


def test_the_readme_lists_them(entered):
    text = (ROOT / "README.md").read_text()
    if "<!-- step -->" not in text:
        pytest.skip("README.md has no <!-- step --> yet")
    listed = text.split("<!-- step -->")[1].split("<!-- end -->")[0]
    found = set()
    for word in listed.replace("`", " ").replace(",", " ").split():
        if word.endswith(".py"):
            file = word
        elif word[0].isalpha():
            found.add((file, word))
    assert found == set(entered)


def test_a_forward_has_few_branches():
    functions = (model.Llama.forward, model.Block.forward, model.Attention.forward,
                 model.attention)
    branches = 0
    for function in functions:
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        branches += sum(isinstance(node, ast.If | ast.IfExp) for node in nodes)
    assert 0 < branches <= 4


# ---------------------------------------------------------------------------- imports


def imported(path):
    """Top-level names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_imports_run_one_way():
    """So there are no circles. Imports inside functions and under __main__ count too."""
    above = set()
    for names in ORDER:
        for name in names:
            own = set(imported(ROOT / f"{name}.py"))
            assert own.isdisjoint({"fast", "workshop", "tests", "results"}), name
            later = own & set(COURSE) - above
            assert not later, f"{name}.py imports {later}"
        above |= set(names)
    assert {path.stem for path in ROOT.glob("*.py")} == set(COURSE)


def test_fast_does_not_import_workshop():
    for path in (ROOT / "fast").glob("*.py"):
        assert "workshop" not in set(imported(path)), path


def test_modules_of_the_other_tier_are_named_in_plug_in_alone():
    """A string like "workshop.suites" that is not plugged in would be imported in secret."""
    for name in COURSE:
        for node in ast.walk(tree(ROOT / f"{name}.py")):
            if isinstance(node, ast.Call):
                function = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if function in ("import_module", "__import__", "run_module", "run_path"):
                    assert name == "cli", f"{name}.py calls {function}"


# ---------------------------------------------------------------------------- state

ALLOWED = {
    ("model.py", "model.frequencies"),  # in Llama.from_pretrained, a constructor
    ("fast/llama.py", "llama.file"),  # the same
    ("model.py", "self.lm_head.weight"),  # PyTorch's way to use one matrix twice
    ("cli.py", "number.__name__"),  # argparse shows the function's name
    ("cli.py", "sys.?"),  # a standard stream that was closed
    # settings of the packages tokenizers and numba, and of Python's threads
    ("tokenizer.py", "tokenizer.encode_special_tokens"),
    ("tokenizer.py", "made.pre_tokenizer"),
    ("tokenizer.py", "made.decoder"),
    ("fast/loops.py", "made._cache"),
    ("fast/loops.py", "own.threads"),
    # a method of another package's object, for as long as selectors are attached
    ("workshop/transformers.py", "decoder.forward"),
}


def foreign_writes(path):
    """Targets of assignments to attributes of anything but self or cls."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        else:
            continue
        for part in sum((list(ast.walk(target)) for target in targets), []):
            written = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store | ast.Del)
            if written and ast.unparse(part.value) not in ("self", "cls"):
                yield ast.unparse(part)


@pytest.mark.parametrize("path", [ROOT / f"{name}.py" for name in COURSE] + ADDED,
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_outside_an_object_writes_its_attributes(path):
    name = str(path.relative_to(ROOT))
    foreign = {target for target in foreign_writes(path) if (name, target) not in ALLOWED}
    assert not foreign, f"{name} writes {foreign}"
