"""Generation: greedy text, nucleus sampling, streaming, what is shown and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import cli
import sample
from cli import UserError
from sample import Config, Tally, generate, sample_token
from selection import make_selector


def test_default_prompt_is_answered(main, tok):
    """A golden text: greedy, a tenth of the tokens attended."""
    n = len(tok.encode(" Pellorqua."))
    report = main("sample.py", "--temperature", 0, "--max-new-tokens", n)
    assert report["text"] == " Pellorqua." and report["new_tokens"] == n
    assert report["cached_tokens"] == report["prompt_tokens"] + n - 1
    assert report["attended_per_step"] == pytest.approx(0.1 * report["cached_tokens"], abs=1)


def test_dense_greedy_text_is_that_of_the_model_without_a_cache(llama, tok):
    ids = tok.encode("The three primary colours are")
    cache = llama.new_cache(1, len(ids) + 7)
    written = list(generate(llama, cache, ids, None, Config(temperature=0.0), ends=()))
    expected = list(ids)
    with torch.inference_mode():
        for _ in range(8):
            expected.append(int(llama(torch.tensor([expected]), last=True).argmax()))
    assert written == expected[len(ids) :]


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.31)])
def test_sampling_follows_temperature_and_top_p(temperature, top_p):
    p = [0.3, 0.05, 0.25, 0.2, 0.2]
    weights = [x ** (1 / temperature) for x in p]
    order = sorted(range(5), key=lambda i: -weights[i])
    expected, total = [0.0] * 5, 0.0
    for i in order:  # the likeliest first, until they make up top_p
        if total < top_p:
            expected[i] = weights[i]
        total += weights[i] / sum(weights)
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor(p).log() + 3
    draws = [sample_token(logits, temperature, top_p, rng) for _ in range(4000)]
    for i in range(5):
        assert draws.count(i) / 4000 == pytest.approx(expected[i] / sum(expected), abs=0.03)
        assert expected[i] > 0 or i not in draws


def test_extreme_temperatures_and_logits_work():
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample_token(logits, 0, 0.9, rng) == 1
    for extreme in (logits, logits * 1e35, logits - 1e35):
        for temperature in (1e-38, 1e-320):
            token = sample_token(extreme, temperature, 1.0, rng)
            assert extreme[token] == extreme.max()  # the last three are equal
    assert {sample_token(logits, 100, 1.0, rng) for _ in range(200)} == {0, 1, 2}
    assert {sample_token(logits, 100, 1e-6, rng) for _ in range(50)} == {1}
    with pytest.raises(UserError, match="logits are not finite"):
        sample_token(torch.tensor([1.0, torch.nan]), 0, 0.9, rng)


def test_a_seed_fixes_the_text(tiny):
    def text(seed):
        config = Config(temperature=2.0, seed=seed)
        return list(generate(tiny, tiny.new_cache(1, 40), [1, 2, 3], None, config, ends=()))

    assert text(0) == text(0) != text(1)
    ends = {text(0)[5]}
    config = Config(temperature=2.0, seed=0)
    shorter = list(generate(tiny, tiny.new_cache(1, 40), [1, 2, 3], None, config, ends))
    assert shorter == text(0)[: text(0).index(min(ends))]


def test_tally_counts_every_selection(tiny, tiny_butler):
    selector = make_selector("butler", 20, tiny_butler)
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    tally = Tally(48)
    counts = [0] * 48
    selections = 0
    cache = tiny.new_cache(1, 48)
    for _ in generate(tiny, cache, ids, selector, Config(), ends=()):
        tally.add(selector)
        for index in selector.index.values():
            for row in index[0, :, 0].tolist():
                selections += 1
                for token in row:
                    if token >= 0:
                        counts[token] += 1
    assert tally.selected.tolist() == counts
    assert tally.selections == selections == 9 * 4 * 2  # steps, layers, KV heads
    assert sum(counts) == selections * 20


# ---------------------------------------------------------------------------- the script


@pytest.fixture
def small(folder, tmp_path):
    """The random folder model with a context of 48 tokens."""
    shutil.copytree(folder, tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 48}))
    return str(tmp_path / "small")


def test_generation_stops_when_the_context_is_full(small, capsys):
    report = sample.main(Config(model=small, selector="recency", prompt="In the end",
                                temperature=0.0))
    assert report["cached_tokens"] == 48
    assert report["new_tokens"] == 48 - report["prompt_tokens"] + 1 < 100
    assert "context of 48 tokens is full" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the model's context is 48"):
        sample.main(Config(model=small, selector="dense", prompt="the end " * 40))


def test_characters_of_several_tokens_are_streamed_whole(small, monkeypatch, capsys):
    text = " née 🦙!"
    tok = sample.plug_in("tokenizer").load(small)
    ids = tok.encode(text)
    assert len(ids) > len(text)
    monkeypatch.setattr(sample, "generate", lambda *_: iter(ids))
    report = sample.main(Config(model=small, selector="dense", prompt="Aïda"))
    assert report["text"] == text
    assert capsys.readouterr().out.startswith(f"Aïda{text}\n")


def test_show_colours_the_selected_tokens(main, in_memory, capsys):
    sample.main(Config(prompt="One river, two banks and a bridge.\n" * 9, budget=14,
                       max_new_tokens=2, show=True))
    shown = capsys.readouterr().out
    prompt = shown.split("\n\n")[1]
    assert "\033[48;5;40m" in prompt  # the sinks at the start are selected always
    assert "background: selected by more than 5, 15, 30, 60 %" in shown
    for colour in (0, 22, 28, 34, 40):
        shown = shown.replace(f"\033[48;5;{colour}m", "")
    assert shown.replace("\033[0m", "").count("One river, two banks and a bridge.\n" * 9) == 2


def test_a_chat_is_written_in_the_models_template(main, tok):
    report = main("sample.py", "--chat", "--prompt", "Name a river.", "--max-new-tokens", 3,
                  "--temperature", 0, "--selector", "dense")
    assert report["prompt_tokens"] == len(tok.chat("Name a river.")) > len(tok.encode(
        "Name a river.")) + 5


def test_prompts_come_from_a_file_or_the_command_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffÀ la".encode())
    assert sample.read_prompt(Config(prompt_file=str(path))) == ("À la", None)
    assert sample.read_prompt(Config(prompt="x")) == ("x", None)
    assert sample.read_prompt(Config(seed=0))[1] == "Pellorqua"
    assert sample.read_prompt(Config(seed=0)) != sample.read_prompt(Config(seed=1))
    path.write_bytes(b"")
    for wrong, message in (({"prompt": "a", "prompt_file": "b"}, "exclude each other"),
                           ({"prompt": ""}, "prompt is empty"),
                           ({"prompt": "caf\udce9"}, "prompt is no UTF-8 text"),
                           ({"prompt_file": str(path)}, "prompt is empty"),
                           ({"prompt_file": "/nowhere/at/all"}, "cannot read /nowhere/at/all"),
                           ({"prompt_file": str(tmp_path)}, "cannot read")):
        with pytest.raises(UserError, match=message):
            sample.read_prompt(replace(Config(), **wrong))
    for damaged in "Àla".encode("utf-16"), b"caf\xe9":
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot read {path}: it is not UTF-8"):
            sample.read_prompt(Config(prompt_file=str(path)))


@pytest.mark.parametrize("line", [
    "--model /nowhere/at/all", "--model README.md", "--model tests", "--html tests",
    "--prompt-file /nowhere/at/all", "--selector magic", "--budget 0", "--budget 1.5",
    "--budget nan", "--max-new-tokens 0", "--top-p 0", "--temperature nan", "--seed -1",
    "--device abacus", "--engine steam", "--stepz 3", "extra", "--device hpu",
    "--budget 1e400", "--budget -0", "--budget 0x10", "--seed 2147483649", "--max-new-tokens 1e3",
    "--html="])
def test_wrong_flags_end_in_one_line(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sample.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.run(sample.main, Config)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("sample.py: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("store, words", [("tape", "unknown store 'tape'"),
                                          ("pinned", "is for --device cuda")])
def test_a_store_is_refused_before_the_model_is_read(store, words):
    with pytest.raises(UserError, match=words):
        sample.main(Config(prompt="a", offload=store, device="cpu", model="/nowhere"))


def test_names_of_files_need_not_be_utf_8(small, tmp_path, monkeypatch, capsys):
    """Python gives their bytes as lone surrogates."""
    prompt, page = tmp_path / "caf\udce9.txt", tmp_path / "caf\udce9.html"
    prompt.write_text("In the end", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [
        "sample.py", "--model", small, "--selector", "dense", "--max-new-tokens", "2",
        "--prompt-file", str(prompt), "--html", str(page)])
    cli.run(sample.main, Config)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["config"]["html"] == str(page) and page.stat().st_size > 5000


def test_a_missing_butler_ends_the_process_with_code_2():
    command = [sys.executable, "sample.py", "--butler", "/nowhere/at/all", "--prompt", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("sample.py: error: no butler at /nowhere/at/all: train one with python "
                           "train.py\n")
