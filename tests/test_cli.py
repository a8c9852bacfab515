"""cli.py: flags, errors of one line, files that are written whole, exit codes; wrong commands."""

import errno
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT

import cli
from cli import UserError, flag


@dataclass
class Config:
    """Tries every kind of flag."""

    name: str = flag(None, "an optional text")
    task: str = flag("copy", "a text")
    max_new_tokens: int = flag(100, "a whole number, 100 % of them", at_least=1, at_most=1000)
    top_p: float = flag(0.9, "a number", at_most=1)
    show: bool = flag(False, "a switch")
    selectors: tuple = flag(("dense", "butler"), "comma-separated words")
    data: list = flag(["a"], "several words")


def test_flags_come_from_a_dataclass():
    assert cli.parse(Config, []) == Config()
    line = "--name x --task= --max-new-tokens 7 --top-p 1 --show --selectors b,,a,b, --data p q"
    assert cli.parse(Config, line.split()) == Config("x", "", 7, 1.0, True, ("b", "a"), ["p", "q"])
    assert cli.parse(Config, ["--max-new-tokens=1000"]).max_new_tokens == 1000
    assert Config().data is not Config().data


@pytest.mark.parametrize("line, words", [
    ("--stepz 3", "--stepz"), ("--top 1", "--top"), ("extra", "extra"), ("--task", "--task"),
    ("--max-new-tokens 0", "0 is not from 1 to 1,000"), ("--max-new-tokens 1001", "1001"),
    ("--max-new-tokens 1e2", "whole number"), ("--max-new-tokens " + "9" * 9999, "999"),
    ("--top-p nan", "nan"), ("--top-p inf", "inf"), ("--top-p -1", "-1"), ("--top-p x", "number"),
    ("--selectors ,", "is empty"), ("--show yes", "yes"), ("--data", "--data"),
    ("--stride 3", "--stride is now --layers-per-producer"), ("--drifts=0.1", "now --drift"),
], ids=lambda word: word[:30])
def test_wrong_flags(line, words):
    with pytest.raises(UserError) as caught:
        cli.parse(Config, line.split())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_help_names_every_flag_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.parse(Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and Config.__doc__ in shown
    for expected in ("--task TASK a text (default: copy)", "--name NAME an optional text",
                     "--max-new-tokens TOKENS a whole number, 100 % of them (default: 100)",
                     "--top-p P a number (default: 0.9)", "--show a switch",
                     "--selectors SELECTORS comma-separated words (default: dense,butler)"):
        assert expected in shown


def test_user_errors_have_one_line_of_at_most_500_characters():
    assert str(UserError("two\nlines \t here")) == "two lines here"
    line = str(UserError("the beginning " + "x" * 9000 + " the end"))
    assert len(line) <= 500 and line.startswith("the beginning") and line.endswith("the end")
    with (pytest.raises(UserError, match="^a: b: KeyError: 'c'$"), cli.one_line("a"),
          cli.one_line("b")):
        {}["c"]
    with pytest.raises(UserError, match="^a: StopIteration:"), cli.one_line("a", StopIteration):
        next(iter([]))
    with pytest.raises(AssertionError), cli.one_line("a"):  # what no damaged file should raise
        raise AssertionError


def test_words_of_flags():
    assert cli.numbers(("512", "8")) == [512, 8]
    assert cli.numbers(("0.5", "1e2"), float) == [0.5, 100]
    for words in ("a", "0"), ("1", "0"), ("1.5",), ("-1",):
        with pytest.raises(UserError, match=f"budgets: {','.join(words)} are not all"):
            cli.numbers(words, what="budgets")
    with pytest.raises(UserError, match="budgets: nan are not all positive"):
        cli.numbers(("nan",), float, "budgets")
    with pytest.raises(UserError, match="unknown task 'x'; known: a, b"):
        cli.known("task", "x", ("a", "b"))


def test_what_cannot_be_plugged_in_is_named():
    assert cli.plug_in("json") is json
    for name in ("workshop.no_such_module", "no_such_package.module"):
        with pytest.raises(UserError, match=f"this needs {name}, which cannot be imported"):
            cli.plug_in(name)
    assert cli.engine("plain").__name__ == "butler"
    with pytest.raises(UserError, match="unknown engine 'slow'; known: plain, fast, transformers"):
        cli.engine("slow")
    with pytest.raises(UserError, match="device 'abacus' cannot be used here"):
        cli.check_device("abacus")


# ---------------------------------------------------------------------------- files


def test_read_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\n\xff")
    with pytest.raises(UserError, match=f"cannot read {path}: it is not UTF-8"):
        cli.read_text(path)
    assert cli.read_text(path, "replace") == "é\n\ufffd"
    path.write_bytes("no byte order mark".encode("utf-16-le"))
    with pytest.raises(UserError, match=f"cannot read {path}: it is not UTF-8"):
        cli.read_text(path)
    for name in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(UserError, match="cannot read"):
            cli.read_text(name)


@pytest.mark.parametrize("kind", ["permissions", "link", "dangling link"])
def test_a_file_that_is_replaced_keeps(kind, tmp_path):
    file, path = tmp_path / "file", tmp_path / "folder" / "x.json"
    path.parent.mkdir()
    if kind != "dangling link":
        file.write_text("older")
        file.chmod(0o640)
    if kind == "permissions":
        path = file
    else:
        path.symlink_to(file)
    with cli.replacing(path) as part:
        part.write_text("newer")
        part.chmod(0o600)
    assert file.read_text() == path.read_text() == "newer"
    assert path.is_symlink() == ("link" in kind) and not list(tmp_path.rglob("*.part"))
    assert kind == "dangling link" or file.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_is_not_replaced(tmp_path):
    """As /dev/null, which root could replace."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in ("pipe", "no file"), ("link", "no file"), ("folder", "a folder"):
        with pytest.raises(UserError, match=f"cannot write {tmp_path / name}: it is {what}"):
            cli.check_writable(tmp_path / name)
        with pytest.raises(UserError, match=f"it is {what}"), cli.replacing(tmp_path / name):
            raise AssertionError
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A full disk may show only there. Windows syncs only a file that is open for writing."""
    path = tmp_path / "x.json"
    path.write_text("older")
    seen = []

    def full(number):
        os.write(number, b"")
        seen.append(path.read_text())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (pytest.raises(UserError, match=f"cannot write {path}: OSError: .* No space left"),
          cli.replacing(path) as part):
        part.write_text("newer")
    assert seen == ["older"] and path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    path = tmp_path / "folder" / "x.json"
    with cli.replacing(path) as part:
        part.write_text("old")
        assert not path.exists()
    with (pytest.raises(UserError if isinstance(error, ValueError) else type(error)),
          cli.replacing(path) as part):
        part.write_text("half a fi")
        raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_check_writable(tmp_path):
    path = tmp_path / "folder" / "x.json"
    cli.check_writable(path)
    assert not list(path.parent.iterdir())
    path.write_text("kept")
    cli.check_writable(path)
    assert path.read_text() == "kept" and list(path.parent.iterdir()) == [path]
    for wrong in (tmp_path, path / "below", "/proc/nowhere/x.json", "a\0b"):
        with pytest.raises(UserError, match="cannot write") as caught:
            cli.check_writable(wrong)
        assert str(wrong) in str(caught.value)


# ---------------------------------------------------------------------------- running


def outcome(main, capsys, monkeypatch, *arguments, config=Config):
    """Runs a script's main in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    try:
        cli.run(main, config)
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_the_last_line_is_json(capsys, monkeypatch):
    def main(config):
        print("for a person: é \ud800")
        return {"answer": config.top_p * 2, "path": "é"}

    code, out, err = outcome(main, capsys, monkeypatch, "--top-p", "0.5", "--task", "a b")
    assert code == 0 and not err and out.startswith("for a person")
    report = json.loads(out.splitlines()[-1])
    assert report["answer"] == 1 and report["config"]["top_p"] == 0.5
    assert report["command"] == "python x.py --top-p 0.5 --task 'a b'"
    assert report["torch"] == torch.__version__ and report["hardware"] and report["commit"]
    assert outcome(lambda config: None, capsys, monkeypatch)[:2] == (0, "")


def raises(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize("error, code, line", [
    (UserError("it is\nwrong"), 2, "x.py: error: it is wrong\n"),
    (torch.OutOfMemoryError("CUDA out\nof memory"), 2,
     "x.py: error: not enough memory: CUDA out of memory\n"),
    (MemoryError(), 2, "x.py: error: not enough memory: MemoryError()\n"),
    (MemoryError("Unable to allocate 8 EiB for an array"), 2,
     "x.py: error: not enough memory: Unable to allocate 8 EiB for an array\n"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory"), 2,
     "x.py: error: not enough memory: [enforce fail at alloc_cpu.cpp:127] err == 0. "
     "DefaultCPUAllocator: can't allocate memory\n"),
    (RuntimeError("std::bad_alloc"), 2, "x.py: error: not enough memory: std::bad_alloc\n"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 2,
     "x.py: error: not enough memory: [Errno 12] Cannot allocate memory\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2,
     "x.py: error: OSError: [Errno 28] No space left on device\n"),
    (KeyboardInterrupt(), 130, "x.py: interrupted\n")], ids=repr)
def test_exit_codes(error, code, line, capsys, monkeypatch):
    assert outcome(raises(error), capsys, monkeypatch) == (code, "", line)


def test_a_wrong_flag_ends_with_exit_code_2(capsys, monkeypatch):
    code, out, err = outcome(raises(AssertionError), capsys, monkeypatch, "--magic")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--magic" in err


def test_programming_errors_keep_their_traceback(capsys, monkeypatch):
    for error in KeyError("x"), RuntimeError("shapes differ"):
        with pytest.raises(type(error)):
            outcome(raises(error), capsys, monkeypatch)


def test_memory_that_a_file_needs_is_told_with_its_name():
    for error in MemoryError(), RuntimeError("std::bad_alloc"):
        with (pytest.raises(UserError, match="^cannot read x: not enough memory: "),
              cli.one_line("cannot read x")):
            raise error


@pytest.mark.parametrize("report, arguments, code", [
    ({"long": "x" * 99999}, (), 2), ({}, (), 2), (None, (), 2), ({}, ("--top-p", "x"), 2)])
def test_a_stream_on_a_full_disk(report, arguments, code, capsys, monkeypatch):
    """One line on stderr; none, and no traceback, if stderr is full as well."""
    def main(config):
        print("for a person")
        return report

    for full in ("stdout",), ("stdout", "stderr"):
        for name in full:
            monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115
        ended, _, err = outcome(main, capsys, monkeypatch, *arguments)
        sys.stdout.close()  # writes what is left, as Python does at exit
        assert ended == code and err.count("\n") == ("stderr" not in full)
        assert "stderr" in full or "x.py: error: " in err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed(name, capsys, monkeypatch):
    """Python's print writes to stdout what is meant for a stderr that is None."""
    def main(config):
        print("for a person", flush=True)
        raise UserError("wrong")

    monkeypatch.setattr(sys, name, None)
    code, out, err = outcome(main, capsys, monkeypatch)
    assert code == 2
    assert out == ("for a person\n" if name == "stderr" else "")
    assert err == ("x.py: error: wrong\n" if name == "stdout" else "")


def test_a_terminal_that_knows_ascii_only(monkeypatch, capsys):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert outcome(lambda config: print("é \udce9 🦙"), capsys, monkeypatch)[0] == 0
    assert stream.buffer.getvalue() == b"\\xe9 \\udce9 \\U0001f999\n"


SCRIPT = """import dataclasses, cli
cli.run(lambda config: {"printed": [print(i) for i in range(100_000)]},
        dataclasses.make_dataclass("Config", []))"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_a_terminal_gets_no_json_line():
    ours, terminal = os.openpty()
    command = [sys.executable, "-c", SCRIPT.replace("100_000", "3")]
    done = subprocess.run(command, stdout=terminal, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    os.close(terminal)
    assert os.read(ours, 9999).split() == [b"0", b"1", b"2"] and not done.stderr
    os.close(ours)


def test_a_device_that_was_not_measured_is_told_once(monkeypatch, capsys):
    """A CPU's tensor stands for the GPU's."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    cli.say_not_measured.cache_clear()
    for device in ("cpu", "cuda", "cuda:0"):
        cli.check_device(device)
    assert capsys.readouterr().err.count("--device cuda: not measured yet") == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py", "synth_task.py", "bench.py"])
def test_scripts_run_on_the_cpu_unless_told_otherwise(script):
    assert cli.parse(runpy.run_path(str(ROOT / script))["Config"], []).device == "cpu"


def test_a_pipe_that_nobody_reads_ends_with_exit_code_141():
    """As in `| head`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", SCRIPT], stdout=write, cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


WRONG = """
train.py --steps many
train.py --steps -1
train.py --stride 5
train.py --data /nowhere/at/all.txt
train.py --out tests
train.py --out /proc/nowhere/x.safetensors
train.py --engine slow
sample.py --model README.md
sample.py --model tests
sample.py --butler /nowhere/at/all
sample.py --butler README.md
sample.py --selector magic
sample.py --budget 0
sample.py --budget 1.5
sample.py --budget nan
sample.py --interval 0
sample.py --neighbours 8
sample.py --prompt-file /nowhere/at/all
sample.py --prompt-file tests
sample.py --prompt a --prompt-file README.md
sample.py --prompt-file /dev/null
sample.py --max-new-tokens 0
sample.py --top-p 2
sample.py --temperature -1
sample.py --device abacus
sample.py --html tests
sample.py --engine slow
synth_task.py --model /nowhere/at/all
synth_task.py --task magic
synth_task.py --selectors dense,magic
synth_task.py --question never
synth_task.py --budgets a
synth_task.py --n 0
synth_task.py --data /nowhere/at/all.jsonl
synth_task.py --data README.md
bench.py --suite magic
bench.py --selectors magic
bench.py --text /nowhere/at/all.txt
bench.py --budgets 0
bench.py --shape magic
bench.py --device abacus
""".strip().splitlines()


@pytest.mark.parametrize("line", WRONG)
def test_wrong_commands_end_in_one_line(line, main, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(*line.split())
    out, err = capsys.readouterr()
    lines = [part for part in err.splitlines() if ": error: " in part]
    assert ended.value.code == 2 and not out and len(lines) == 1, (out, err)


def test_a_process_ends_with_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--budget", "0"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
