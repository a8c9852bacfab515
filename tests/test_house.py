"""The house: imports run one way, no script imports a script, and the method stands alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train", "sample", "synth_task", "bench"}
ROOMS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
PATHS = {str(path.relative_to(ROOT))[:-3].replace("/", "."): path
         for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py")}


def imported(tree) -> set[str]:
    """The modules of this house that a file imports, wherever it does, but in its trace: what
    stands under `__main__` runs when all are there."""
    found = set()
    nodes = [node for node in tree.body if not (
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & PATHS.keys()


IMPORTS = {name: imported(ast.parse(path.read_text())) for name, path in PATHS.items()}


def beneath(name: str) -> set[str]:
    """All that importing a module imports."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {below for module in new for below in IMPORTS[module]} - found
    return found


def test_imports_are_found():
    assert {"kernel", "cpu.loops", "loading.weights", "common.errors"} <= IMPORTS["model"]
    assert "loading.tokenizer" in IMPORTS["bench"] and not IMPORTS["common.errors"]


def test_imports_run_one_way():
    order, left = [], dict(IMPORTS)
    while ready := sorted(name for name, below in left.items() if below <= set(order)):
        order += ready
        left = {name: below for name, below in left.items() if name not in ready}
    assert not left, "a circle"


@pytest.mark.parametrize("name", sorted(PATHS))
def test_no_script_is_imported(name):
    assert not IMPORTS[name] & SCRIPTS


def test_results_import_no_script():
    for path in (ROOT / "results").glob("*.py"):
        assert not imported(ast.parse(path.read_text())) & SCRIPTS, path.name


@pytest.mark.parametrize("room, below", [("common", ()), ("cpu", ()), ("loading", ("common",))])
def test_the_lowest_rooms_know_nothing_above(room, below):
    for name in PATHS:
        if name.startswith(f"{room}."):
            assert {used.split(".")[0] for used in IMPORTS[name]} <= {room, *below}, name


@pytest.mark.parametrize("name", ["model", "butler", "selection", "kernel", "baselines"])
def test_the_method_needs_nothing_that_a_first_reader_skips(name):
    rooms = {module.split(".")[0] for module in beneath(name) if "." in module}
    assert rooms <= {"common", "loading", "cpu"}


@pytest.mark.parametrize("package, path, name, why", [
    ("torch", "model.py", "aten._scaled_dot_product_flash_attention_for_cpu",
     "no public form of attention gives the sum that two parts are merged by"),
    ("torch", "model.py", "torch.cpu._is_avx512_bf16_supported",
     "nothing public says whether bfloat16 is multiplied in hardware"),
    ("gguf", "loading/weights.py", "def _get", "its reader takes whatever the header claims"),
    ("tiktoken", "loading/tokenizer.py", "_encode_single_piece",
     "public forms take text, and what is left of a damaged character is none")])
def test_what_is_not_public_is_of_an_exact_version(package, path, name, why):
    assert name in (ROOT / path).read_text(), f"not needed any more: {why}"
    assert f"\n{package}==" in (ROOT / "requirements.txt").read_text()
