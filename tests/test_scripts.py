"""The scripts as a user meets them: real processes, real files, one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coreference import coreference_documents

ROOT = Path(__file__).parent.parent


def script(*arguments, timeout=300, cwd=ROOT):
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


WRONG = [
    ("train.py", "--stepz", "3"),
    ("train.py", "--steps", "many"),
    ("train.py", "--model", "/nowhere/at/all"),
    ("sample.py", "--model", "/nowhere/at/all"),
    ("sample.py", "--butler", "/nowhere/at/all"),
    ("sample.py", "--selector", "magic"),
    ("sample.py", "--budget", "0"),
    ("sample.py", "--budget", "1.5"),
    ("sample.py", "--prompt-file", "/nowhere/at/all"),
    ("sample.py", "--prompt", "a", "--prompt-file", "b"),
    ("sample.py", "--top-p", "2"),
    ("sample.py", "--prompt", ""),
    ("sample.py", "--device", "abacus"),
    ("synth_task.py", "--task", "magic"),
    ("synth_task.py", "--selectors", "dense,magic"),
    ("synth_task.py", "--question", "never"),
    ("synth_task.py", "--budgets", "a"),
    ("synth_task.py", "--context", "long"),
    ("synth_task.py", "--task", "needle_noise", "--context", "20"),
    ("synth_task.py", "--data", "/nowhere/at/all.jsonl"),
    ("bench.py", "--suite", "magic"),
    ("bench.py", "--selectors", "snapkv"),
    ("bench.py", "--suite", "interval", "--selectors", "h2o"),
    ("bench.py", "--text", "/nowhere/at/all.txt"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a))
def test_what_is_wrong_ends_with_one_line_and_exit_code_2(arguments):
    done = script(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "error:" in lines[0], done.stderr


@pytest.mark.parametrize("name", ["train.py", "sample.py", "synth_task.py", "bench.py"])
def test_help_names_every_flag(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "--model" in done.stdout and "default" in done.stdout


@pytest.mark.parametrize("name", ["model.py", "kernel.py", "butler.py", "baselines.py",
                                  "coreference.py", "corpus.py", "ruler.py"])
def test_every_module_runs(name):
    done = script(name)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_sample_writes_text_and_reports(tmp_path):
    """The prompt's last token is decoded through the selector too: every new token is sparse."""
    long = tmp_path / "long.txt"
    long.write_text("The harbour was quiet that morning, and the boats lay still. " * 30)
    done = script("sample.py", "--prompt-file", long, "--max-new-tokens", "8", "--budget", "0.1",
                  "--temperature", "0", "--show")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["new_tokens"] == 8 and result["text"].strip()
    cached = result["cached_tokens"]
    assert 0.1 * (cached - 8) - 1 <= result["attended_per_step"] <= 0.1 * cached
    assert "\033[48;5;" in done.stdout
    assert result["config"]["budget"] == 0.1 and result["commit"]


def test_the_context_limit_is_named():
    done = script("sample.py", "--prompt", "word " * 9000, "--max-new-tokens", "1")
    assert done.returncode == 2 and "8192" in done.stderr and "9001" in done.stderr


def test_the_default_demonstration_finds_the_answer():
    done = script("sample.py", "--max-new-tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    document = coreference_documents("test", 1, seed=0)[0]
    assert result["text"].startswith(document.answer)
