"""The scripts as a user meets them: real processes, real files, one line for what is wrong."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, make_dataclass

import pytest
import torch
from conftest import ROOT
from tqdm import tqdm

from common import cli, files
from loading import tokenizer
from model import Llama
from tasks.coreference import coreference_documents


def script(*arguments, timeout=300, cwd=ROOT):
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


MODULES = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))
           if path.parent.name not in ("tests", "results") and path.name != "__init__.py"
           and not path.parent.name.startswith(".")]
SCRIPTS = ["train.py", "sample.py", "synth_task.py", "bench.py", "beyond/share.py",
           "results/compare.py", "results/make.py", "results/render.py"]
WRONG = """
train.py --stepz 3
train.py --steps many
train.py --steps 0
train.py --steps -1
train.py --model /nowhere/at/all
train.py --data /nowhere/at/all.txt
train.py --resume --data /nowhere/at/all.txt
train.py --out /proc/nowhere/out.safetensors
train.py --out tests
sample.py --model /nowhere/at/all
sample.py --model README.md
sample.py --model tests
sample.py --butler /nowhere/at/all
sample.py --butler README.md
sample.py --selector magic
sample.py --budget 0
sample.py --budget 1.5
sample.py --budget nan
sample.py --budget inf
sample.py --budget -1
sample.py --drift -1
sample.py --drift 99999999999999999999
sample.py --selector h2o --drift 0.2
sample.py --drift nan
sample.py --dense-below -1
sample.py --prompt-file /nowhere/at/all
sample.py --prompt-file tests
sample.py --prompt-file /dev/zero
sample.py --prompt a --prompt-file b
sample.py --prompt-file /dev/null
bench.py --suite speed --butler a,b
bench.py --suite offload --budgets 0.05,0.1
sample.py --max-new-tokens 0
sample.py --max-new-tokens 1e3
sample.py --top-p 2
sample.py --top-p 0
sample.py --top-p nan
sample.py --temperature -1
sample.py --temperature nan
sample.py --temperature inf
sample.py --seed -1
sample.py --seed 99999999999999999999
sample.py --device abacus
sample.py --dtype float16
sample.py --show yes
sample.py --html /proc/nowhere/page.html
sample.py --html tests
sample.py --offload tape
sample.py --offload pinned
sample.py --offload disk --offload-dir /nowhere/at/all
sample.py extra
synth_task.py --model /nowhere/at/all
synth_task.py --butler checkpoints/smollm2-135m-instruct.safetensors,/nowhere
synth_task.py --task magic
synth_task.py --task ,
synth_task.py --selectors dense,magic
synth_task.py --question never
synth_task.py --budgets a
synth_task.py --budgets 0.1,7.5
synth_task.py --budgets 0.1,nan
synth_task.py --drift -1
synth_task.py --n 0
synth_task.py --batch 0
synth_task.py --seeds a
synth_task.py --seeds -1
synth_task.py --referents 0
synth_task.py --referents 9
synth_task.py --context long
synth_task.py --context 0
synth_task.py --task needle_noise --context 20
synth_task.py --data /nowhere/at/all.jsonl
synth_task.py --data README.md
synth_task.py --data /dev/zero
synth_task.py --data README.md --context 100
synth_task.py --data README.md --n 5
synth_task.py --out tests
synth_task.py --out /dev/zero
synth_task.py --out README.md/scores.jsonl
synth_task.py --out /proc/nowhere/scores.jsonl
synth_task.py --device abacus
bench.py --suite magic
bench.py --selectors snapkv
bench.py --selectors magic
bench.py --suite drift --selectors h2o
bench.py --suite drift --task magic
bench.py --suite tradeoff --task magic
bench.py --suite tradeoff --shape llama-3.2-1b
bench.py --suite tradeoff --selectors dense,magic
bench.py --text /nowhere/at/all.txt
bench.py --text /dev/zero
bench.py --budgets 0
bench.py --n 0
bench.py --length 63
bench.py --drifts 3
bench.py --drifts a
bench.py --suite attention --contexts 0
bench.py --suite attention --contexts 99999999999
bench.py --suite attention --batch 1,-1
bench.py --suite speed --shape magic
bench.py --suite speed --shape README.md
bench.py --suite speed --shape /dev/zero
bench.py --suite speed --shape llama-3.2-1b --model somewhere
bench.py --suite perplexity --shape llama-3.2-1b
bench.py --butler /nowhere/at/all
bench.py --model /nowhere/at/all
bench.py --device abacus
bench.py --suite offload --memory 2
bench.py --suite offload --offload-dir /nowhere
beyond/share.py --butler /nowhere/at/all
beyond/share.py --butler README.md
beyond/share.py --butler checkpoints/smollm2-135m-instruct.safetensors
beyond/share.py --report /nowhere/at/all
beyond/share.py --report results/ruler.json
beyond/share.py --to nowhere
beyond/share.py --to out/butler.safetensors
results/compare.py --contexts 8192
results/compare.py --contexts 512,a
results/compare.py --budget 0
results/compare.py --n 0
results/make.py --only magic
results/make.py --quick yes
results/render.py --anything
""".strip().splitlines()


@pytest.fixture(scope="module")
def scripts():
    """name -> what the script defines."""
    return {name: runpy.run_path(str(ROOT / name)) for name in SCRIPTS}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_said_in_one_line_before_anything_slow(
        line, scripts, tok_in_memory, capsys, monkeypatch):
    def too_late(*_, **__):
        raise AssertionError("a model's weights are being read")

    monkeypatch.setattr(Llama, "from_pretrained", too_late)
    monkeypatch.setattr(sys, "argv", line.split())
    monkeypatch.chdir(ROOT)
    inside = scripts[sys.argv[0]]
    with pytest.raises(SystemExit) as ended:
        cli.run(inside.get("main"), inside["Config"])
    out, err = capsys.readouterr()
    lines = [part for part in err.splitlines() if part.strip()]
    assert ended.value.code == 2 and not out and len(lines) == 1 and "error: " in lines[0], err


@pytest.mark.parametrize("line", ["train.py --steps 0", "results/render.py --anything"])
def test_a_process_ends_with_exit_code_2(line):
    done = script(*line.split())
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr


def test_a_file_without_end_or_of_many_gigabytes_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["from a\r\npipe"])
    writer.start()
    assert files.read_text(tmp_path / "pipe") == "from a\npipe"
    writer.join()
    with (tmp_path / "large").open("wb") as f:
        f.truncate(2**33)  # a hole, which takes no room
    (tmp_path / "text").write_text("\u00e9t\u00e9", encoding="utf-8")
    for name, most, reason in (("/dev/zero", 9, "more than 9"), ("large", 2**20, "more than 1,048"),
                               ("text", 4, "more than 4 bytes"), ("", 9, "directory")):
        with pytest.raises(cli.UsageError, match=reason):
            files.read_text(tmp_path / name, most)
    assert files.read_text(tmp_path / "text", 5) == "\u00e9t\u00e9"


def test_too_little_memory_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried"), None):
        def main(config, error=error):
            if error:
                raise error
            torch.empty(2**60)

        with pytest.raises(SystemExit) as ended:
            cli.run(main, make_dataclass("Config", []))
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and "not enough memory" in err


def test_ctrl_c_is_told_in_one_line_below_the_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(config):
        for _ in tqdm(range(2), file=sys.stderr):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(main, make_dataclass("Config", []))
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert ended.value.code == 130 and not out
    assert err.endswith("\nx.py: interrupted\n") and err.count("\n") == 2, err


@pytest.mark.slow
@pytest.mark.parametrize("command, sign", [
    (["sample.py", "--max-new-tokens", "500"], "stdout"),
    (["synth_task.py", "--selectors", "dense"], "stderr"), (["bench.py"], "stderr"),
    (["train.py", "--out"], "stderr")], ids=lambda x: x[0])
def test_a_script_is_stopped_by_ctrl_c(command, sign, tmp_path):
    """While it works, which it has then begun to say; train.py still measures, before any step."""
    run = subprocess.Popen([sys.executable, *command, *[tmp_path / "b"] * (command[-1] == "--out")],
                           cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert getattr(run, sign).read(1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.endswith(f"{command[0]}: interrupted\n"), err
    assert "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag_and_its_default(name, scripts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    config = scripts[name]["Config"]
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and config.__doc__.strip() in shown
    for f in fields(config):
        flag = "--" + f.name.replace("_", "-")
        (line,) = [part for part in shown.splitlines() if part.split()[:1] == [flag]]
        assert "(default: " in line and len(line.split()) > 4, line


PRINTS = """import dataclasses; from common import cli
cli.run(lambda config: {"printed": [print(i) for i in range(%s)]},
        dataclasses.make_dataclass("Config", []))"""


@pytest.mark.parametrize("both, command", [
    (True, ["-c", PRINTS % "10**5"]), (False, ["-c", PRINTS % "0"]),
    (False, ["-c", PRINTS % "0", "--help"]),
    (False, ["sample.py", "--selector", "recency", "--max-new-tokens", "2", "--model"])],
    ids=["printing", "last line", "help", "sample.py"])
def test_a_pipe_closed_early_ends_quietly(folder, both, command):
    """As in `| head`, or `2>&1 | head` if both, where head has ended already."""
    read, write = os.pipe()
    os.close(read)
    if command[-1] == "--model":
        command = [*command, folder]
    done = subprocess.run([sys.executable, *command], stdout=write, cwd=ROOT, text=True,
                          stderr=write if both else subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": ""})
    os.close(write)
    assert done.returncode == 141, done.stderr
    assert not re.search("Error|Exception|Traceback", done.stderr or ""), done.stderr


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in MODULES
                                        if path.name not in SCRIPTS))
def test_every_module_shows_what_it_makes(name, in_memory, capsys, monkeypatch):
    """As its first lines promise, and with a number; here, where PyTorch is imported already."""
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and re.search(r"\d", "".join(lines))
    command = f"-m {name[:-3].replace('/', '.')}" if "/" in name else name
    assert f"\n    python {command}" in (ROOT / name).read_text().split('"""')[1]


def test_a_module_runs_by_itself(tmp_path):
    done = script("kernel.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("sparse_decode: "), done.stderr
    done = subprocess.run([sys.executable, "-m", "common.cli", "--times", "2"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("token token\n{"), done.stderr


def test_sample_writes_text_and_reports(tmp_path):
    """The prompt's last token is decoded through the selector too: every new token is sparse."""
    long = tmp_path / "long.txt"
    long.write_text("The harbour was quiet that morning, and the boats lay still. " * 30)
    done = script("sample.py", "--prompt-file", long, "--max-new-tokens", "8", "--budget", "0.1",
                  "--temperature", "0", "--show", "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["new_tokens"] == 8 and result["text"].strip()
    cached = result["cached_tokens"]
    assert 0.1 * (cached - 8) - 1 <= result["attended_per_step"] <= 0.1 * cached
    assert "\033[48;5;" in done.stdout
    page = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'<script type="application/json".*?>(.*)</script>', page)[1])
    assert len(data["steps"]) == 8 and "".join(data["texts"]) == long.read_text() + result["text"]
    assert json.loads(data["facts"])["commit"] == result["commit"]
    assert result["config"]["budget"] == 0.1 and result["commit"]


def test_blanks_and_cut_characters_are_shown_as_the_text_has_them(tmp_path, capsys):
    """SentencePiece's blanks are the beginning of a word; its bytes are shares of a character."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)}
    vocab |= {token: 257 + i for i, token in enumerate([*"▁the", "▁t", "he", "▁the"])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    built = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.save(str(tmp_path / "tokenizer.json"))
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4))
    with torch.no_grad():
        for p in hf.parameters():
            p.fill_(p.dim() == 1)
        hf.model.embed_tokens.weight.fill_(1)
        hf.lm_head.weight[vocab["▁the"]] = 1  # which it always writes
    hf.save_pretrained(tmp_path)
    sample = runpy.run_path(str(ROOT / "sample.py"))
    result = sample["main"](sample["Config"](
        model=tmp_path, selector="recency", prompt="the the 🦙", max_new_tokens=3, show=True))
    assert result["text"] == " the the the"
    shown = re.sub("\033.*?m", "", capsys.readouterr().out)
    assert shown.startswith("the the 🦙 the the the\n\n the the 🦙\n\nbackground:")


def test_rows_without_a_token_decode_to_nothing(main, folder, tmp_path):
    """Matrices are often rounded up beyond the vocabulary, here to twice its size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    result = main("sample.py", "--model", tmp_path, "--selector", "recency", "--prompt", "Once",
                  "--max-new-tokens", 16, "--temperature", 100, "--show", "--html",
                  tmp_path / "page.html")
    assert result["new_tokens"] == 16 and result["text"]
    tok = tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="id 1000 names no token"):
        tok.decode([1000])
    assert tok.check(Llama.from_pretrained(tmp_path)).decode([1000, *tok.encode("x"), 513]) == "x"


def test_the_context_limit_is_named(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main("sample.py", "--prompt", "word " * 9000, "--max-new-tokens", "1")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and "8192" in err and "9001" in err


def test_the_default_demonstration_finds_the_answer(main):
    result = main("sample.py", "--max-new-tokens", "8", "--temperature", "0")
    document = coreference_documents("test", 1, seed=0)[0]
    assert result["text"].startswith(document.answer)


@pytest.mark.parametrize("flags, told", [({}, True), ({"dense_below": 2000}, False),
                                         ({"budget": 32.0}, False), ({"selector": "dense"}, False)])
def test_a_budget_that_leaves_nothing_to_choose_is_named(flags, told, capsys):
    sample = runpy.run_path(str(ROOT / "sample.py"))
    sample["advise"](sample["Config"](**flags), 60, False)
    assert ("leaves nothing to choose" in capsys.readouterr().err) == told
