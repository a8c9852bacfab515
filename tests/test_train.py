"""Training: the loss falls, nothing that stops a run costs more than its last step, and several
processes are one."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_close, randomise, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_scripts import ROOT, script

import train
from beyond import survive
from butler import Butler, ButlerConfig, turned_back
from common.cli import parse
from common.errors import ModelError, UsageError
from loading.tokenizer import TokenizerError
from model import Llama
from tasks.corpus import spread


class Noise:
    """Windows of random tokens with something to find: the second half repeats the first. Before
    the text of seed `at` is read, `deed` is done."""

    def __init__(self, at=None, deed=None):
        self.calls, self.at, self.deed = [], at, deed

    def digest(self):
        return "noise"

    def window(self, seed, length):
        self.calls += [seed] * seed.endswith(" 0")  # the first text of each batch
        if seed == self.at:
            self.deed()
        generator = torch.Generator().manual_seed(int(seed.replace(" ", "")))
        ids = torch.randint(200, (length // 2,), generator=generator).tolist()
        return ids + ids


def settings(folder, **other):
    return train.Config(**{"out": str(folder / "b.safetensors"), "steps": 12, "length": 64,
                           "rows": 16, "device": "cpu", "save_every": 0, "reuse": 2,
                           "long": 96, "long_every": 0} | other)


def trained(tiny, config, noise=None):
    torch.manual_seed(config.seed)
    butler, log = Butler(ButlerConfig.for_model(tiny, stride=1, size=16, hidden=64)), []
    train.distil(tiny, butler, noise or Noise(), config, log)
    return butler, log


def assert_same_weights(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_training_lowers_the_loss_and_is_deterministic(tiny, tmp_path):
    first, log = trained(tiny, settings(tmp_path, steps=150, save_every=60))
    again, _ = trained(tiny, settings(tmp_path, steps=150, save_every=0.01))
    assert sum(log[-10:]) < 0.85 * sum(log[:10])
    assert_same_weights(first, again)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_muon_is_that_of_torch_in_float32(shape):
    """Three steps; torch's own rounds to bfloat16, which leaves two digits."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (train.Muon([ours], 0.1), torch.optim.Muon(
        [theirs], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 1 and (ours - theirs).norm() < 0.02 * moved
    assert (torch.linalg.svdvals(train.orthogonal(gradients[0])) - 1).abs().max() < 0.35


def test_rows_drawn_are_all_different():
    rows = train.sample_rows(random.Random(1), 128, 512).tolist()
    assert len(set(rows)) == 128 and min(rows) >= 0 and max(rows) < 512
    assert sorted(train.sample_rows(random.Random(1), 128, 64).tolist()) == list(range(64))


def test_every_fourth_step_looks_at_long_texts_and_each_batch_serves_several(tiny, tmp_path):
    """A step looks at rows of a batch that no other step has looked at."""
    config = settings(tmp_path, long_every=4, reuse=3, rows=8)
    noise = Noise()
    batches, steps = train.Batches(tiny, noise, config), []
    for step in range(24):
        seen, some = batches.look(step)
        steps.append((seen.keys[1].shape[2], seen, seen.rows[some].tolist()))
    assert [n for n, (length, *_) in enumerate(steps) if length == 96] == [3, 7, 11, 15, 19, 23]
    assert {length for length, *_ in steps} == {64, 96}
    assert noise.calls == ["0 64 0 0", "0 96 0 0", "0 64 1 0", "0 64 2 0", "0 64 3 0", "0 96 1 0",
                           "0 64 4 0", "0 64 5 0"]
    for record in {id(seen): seen for _, seen, _ in steps}.values():
        rows = [row for _, seen, part in steps if seen is record for row in part]
        assert len(rows) == len(set(rows)) == 24
        assert record.q[1].shape[2] == record.x[0].shape[1] == 24
    again = train.Batches(tiny, Noise(), config).look(13)[0]
    assert torch.equal(again.keys[2], steps[13][1].keys[2])


# ---------------------------------------------------------------------------- stopping, resuming


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_behind_the_step_and_resuming_ends_with_the_same_weights(
        tiny, tmp_path, capsys, number, code):
    whole, log = trained(tiny, settings(tmp_path / "whole", save_every=3600))
    before = signal.getsignal(number)

    def interrupt():
        os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one would not wait

    with pytest.raises(SystemExit) as left:
        trained(tiny, settings(tmp_path / "cut", save_every=3600), Noise("0 64 4 0", interrupt))
    assert left.value.code == code and signal.getsignal(number) is before
    assert "stopped after 8 of 12 steps" in capsys.readouterr().err
    assert names(tmp_path / "cut") == ["b.safetensors.state"]
    resumed, again = trained(tiny, settings(tmp_path / "cut", resume=True))
    assert again == log
    assert_same_weights(whole, resumed)


def test_a_run_cut_off_in_the_middle_of_a_batch_reads_the_batch_again(tiny, tmp_path):
    whole, log = trained(tiny, settings(tmp_path / "whole", reuse=4))

    def crash():
        raise MemoryError

    config = settings(tmp_path / "cut", reuse=4)
    with pytest.raises(MemoryError):
        trained(tiny, config, Noise("0 64 2 0", crash))
    assert len(load_file(survive.state_path(config))["log loss"]) == 7
    noise = Noise()
    resumed, again = trained(tiny, settings(tmp_path / "cut", reuse=4, resume=True), noise)
    assert noise.calls == ["0 64 1 0", "0 64 2 0"] and again == log
    assert_same_weights(whole, resumed)


def test_a_run_stopped_before_its_first_step_is_resumed(tiny, tmp_path):
    """Its state holds weights, but nothing of an optimiser yet."""
    whole, _ = trained(tiny, settings(tmp_path / "whole"))
    config = settings(tmp_path / "cut", save_every=3600)
    with pytest.raises(SystemExit):
        trained(tiny, config, Noise("0 64 0 0", lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert len(load_file(survive.state_path(config))["log loss"]) == 0
    assert_same_weights(whole, trained(tiny, replace(config, resume=True))[0])


def test_resuming_where_nothing_was_saved_starts_from_the_beginning(tiny, tmp_path):
    whole, _ = trained(tiny, settings(tmp_path / "whole"))
    config = settings(tmp_path / "none", resume=True)
    train.check(config)
    assert_same_weights(whole, trained(tiny, config)[0])


def test_a_state_of_another_run_is_refused(tiny, tmp_path, monkeypatch):
    config = settings(tmp_path)
    trained(tiny, config)
    again = replace(config, resume=True)
    train.check(again)
    for other in ({"batch": 1}, {"seed": 1}, {"steps": 13}, {"model": "another"}):
        with pytest.raises(UsageError, match="other settings"):
            train.check(replace(again, **other))
    train.check(replace(again, learning_rate=1e-3, save_every=5))  # what may change
    torch.manual_seed(0)
    butler = Butler(ButlerConfig.for_model(tiny, stride=2, size=16, hidden=64))
    with pytest.raises(UsageError, match="another base model"):
        train.distil(tiny, butler, Noise(), again, [])
    monkeypatch.setattr(Noise, "digest", lambda noise: "other noise")
    with pytest.raises(UsageError, match="other text: what it was trained on has changed"):
        trained(tiny, again)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_damaged_state_is_refused_in_one_line(tiny, tmp_path, keep):
    config = settings(tmp_path, resume=True)
    trained(tiny, config)
    path = survive.state_path(config)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="unreadable state") as caught:
        train.check(config)
    assert "\n" not in str(caught.value)


def test_a_state_of_other_tensors_is_refused(tiny, tmp_path):
    config = settings(tmp_path, resume=True)
    trained(tiny, config)
    path = survive.state_path(config)
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    for change in ({"weight nothing": torch.zeros(1)}, {"weight": torch.zeros(1)},
                   {"weight key_projection": torch.zeros(3)}, {"log loss": torch.tensor(3.0)},
                   {"log loss": torch.zeros(0)}):
        save_file(tensors | change, path, metadata)
        with pytest.raises(UsageError, match="not all of a state"):
            trained(tiny, config)


def test_a_run_that_has_ended_is_not_resumed(tmp_path):
    config = settings(tmp_path, resume=True)
    Path(config.out).touch()
    with pytest.raises(UsageError, match="without --resume it is trained anew"):
        train.check(config)


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("rate", [1e3, 1e9])
def test_a_loss_that_runs_away_ends_in_one_line_and_the_last_good_state_stays(
        tiny, tmp_path, rate):
    config = settings(tmp_path, steps=400, learning_rate=rate)
    with pytest.raises(UsageError, match="training diverges") as caught:
        trained(tiny, config)
    assert "\n" not in str(caught.value)
    state = load_file(survive.state_path(config))
    assert all(value.isfinite().all() for value in state.values())
    log = state["log loss"].tolist()
    assert len(log) < 400 and sum(log[-10:]) <= 10 * sum(log[:10])
    calm = replace(config, steps=400, learning_rate=1e-6, resume=True)
    train.check(calm)


def test_a_loss_that_is_no_number_never_reaches_a_state(tiny, tmp_path):
    config = settings(tmp_path)
    poisoned = randomise(type(tiny)(tiny.config))

    def poison():
        poisoned.layers[3].self_attn.qkv_proj.weight.fill_(torch.nan)

    with pytest.raises(UsageError, match="training diverges: the loss is nan at step 6"):
        trained(poisoned, config, Noise("0 64 3 0", poison))
    state = load_file(survive.state_path(config))
    assert len(state["log loss"]) == 5
    assert all(value.isfinite().all() for value in state.values())


@contextmanager
def full_disk(room=4096):
    """No file may grow beyond `room` bytes: the system refuses to write them, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_nothing_that_was_saved(tiny, tmp_path, capsys):
    whole, _ = trained(tiny, settings(tmp_path / "whole"))
    config = settings(tmp_path / "full")
    path = survive.state_path(config)
    with pytest.raises(SystemExit):
        trained(tiny, config, Noise("0 64 2 0", lambda: os.kill(os.getpid(), signal.SIGINT)))
    saved = path.read_bytes()
    with full_disk():
        butler, log = trained(tiny, replace(config, resume=True))
        assert len(log) == 12 and names(path.parent) == [path.name]
        assert path.read_bytes() == saved
        assert "warning: cannot write" in (told := capsys.readouterr().err)
        assert sum("warning" in line for line in told.splitlines()) <= 12
        with pytest.raises(UsageError, match="cannot write") as caught:
            butler.save(config.out)
        assert "\n" not in str(caught.value) and names(path.parent) == [path.name]
    assert_same_weights(whole, butler)
    butler.save(config.out)
    assert names(path.parent) == [Path(config.out).name, path.name]


def test_a_text_with_gaps_is_read_at_its_positions(tiny):
    """Keys of layer 0 depend on nothing else: turned back, each by its own position, they are those
    of the same text without gaps."""
    positions = spread(random.Random(1), 40, 200)
    tokens, here = torch.arange(40)[None], torch.arange(40)
    assert 40 < positions[0, -1] < 200 and (positions.diff() > 1).sum() <= 3
    assert (positions.diff() >= 1).all()
    gaps, plain = train.record(tiny, tokens, positions=positions), train.record(tiny, tokens)
    back = [turned_back(record.keys[0], at[:, None] * tiny.frequencies)
            for record, at in ((gaps, positions[0]), (plain, here))]
    assert_close("keys turned back", *back, 1e-4)
    assert torch.equal(gaps.positions, positions[0]) and torch.equal(gaps.rows, here)
    assert torch.equal(spread(random.Random(1), 40, 0)[0], here)
    far = [spread(random.Random(i), 512, 8192)[0, -1] for i in range(200)]
    assert 8000 < max(far) < 8192 and min(far) < 1000


def test_a_shift_of_all_positions_changes_no_loss(tiny):
    butler = Butler(ButlerConfig.for_model(tiny, stride=2, size=8, hidden=16))
    tokens, rows = torch.arange(40)[None], torch.arange(20, 40)
    losses = [train.distillation(butler, train.record(tiny, tokens, rows, at))
              for at in (None, torch.arange(40)[None] + 300)]
    assert_close("loss", *losses, 1e-4)


WRONG = [
    ("--steps", "0"), ("--batch", "0"), ("--length", "63"), ("--repeats", "-1"), ("--rows", "0"),
    ("--long", "63"), ("--long-every", "-1"), ("--windows", "0"), ("--size", "5"),
    ("--reuse", "0"), ("--learning-rate", "nan"), ("--learning-rate", "0"), ("--stride", "0"),
    ("--size", "2000000"), ("--hidden", "0"), ("--documents", "0"), ("--save-every", "-1"),
    ("--seed", "-1"), ("--device", "abacus"), ("--device", "meta"), ("--out", "tests"),
    ("--out", ""), ("--out", "/dev/null"), ("--out", "/proc/nowhere/b.safetensors"),
    ("--out", "/proc/b.safetensors"), ("--out", "b.json"), ("--out", "b.md"),
    ("--out", "README.md/b.safetensors"), ("--out", "a" * 300), ("--report", "/dev/null"),
    ("--report", "tests"),
    ("--data", "/nowhere/at/all.txt"), ("--data", "/dev/zero"), ("--data", "LICENSE", "nowhere"),
    ("--data", "requirements.txt"), ("--data", ""),
]


def test_a_report_in_the_place_of_another_file_is_told_which(tmp_path):
    out = tmp_path / "b.safetensors"
    for report, taken in ((out, "--out"), (tmp_path / "b.md", "the model card"),
                          (survive.state_path(train.Config(out=str(out))), "the state")):
        with pytest.raises(UsageError, match=f"--report and .*{taken}"):
            train.check(train.Config(out=str(out), report=str(report)))


def test_a_card_takes_the_place_of_a_card_alone(tmp_path):
    config = train.Config(out=str(tmp_path / "notes.safetensors"))
    (tmp_path / "notes.md").write_text("---\ntags:\n- an older card\n---\n")
    train.check(config)
    (tmp_path / "notes.md").write_text("my notes")
    with pytest.raises(UsageError, match="notes.md is no model card"):
        train.check(config)
    (tmp_path / "b.md").mkdir()
    with pytest.raises(UsageError, match="cannot write .*b.md"):
        train.check(train.Config(out=str(tmp_path / "b.safetensors")))


@pytest.mark.parametrize("arguments", WRONG, ids=lambda a: " ".join(a)[:40])
def test_what_is_wrong_is_said_before_a_model_is_read(tmp_path, monkeypatch, capsys, arguments):
    """The model is not there either, which would be said later."""
    monkeypatch.chdir(ROOT)
    out = () if "--out" in arguments else ("--out", str(tmp_path / "b.safetensors"))
    with pytest.raises((UsageError, ModelError, SystemExit)) as caught:
        train.main(parse(train.Config, [*arguments, "--model", "/nowhere/at/all", *out]))
    message = str(caught.value)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
        message = capsys.readouterr().err.strip()
    assert "\n" not in message and "/nowhere/at/all:" not in message and "no model" not in message
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------- real processes


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    """Its last ids have no row in the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--data", str(ROOT / "LICENSE"),
                 "--out", str(tmp_path / "b.safetensors")]
    with pytest.raises(TokenizerError, match="id 500, .* is beyond its 500 rows"):
        train.main(parse(train.Config, arguments))


@pytest.mark.parametrize("context", [512, 128])
def test_a_short_context_gets_short_questions_or_is_refused_before_training(
        context, folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=context)).save_pretrained(tmp_path / "llama")
    shutil.copy(folder / "tokenizer.json", tmp_path / "llama")
    config = parse(train.Config, list(map(str, command(
        tmp_path / "llama", tmp_path / "b.safetensors", "--steps", 1)[1:])))
    if context == 512:
        assert train.main(config)["table"]["dense"]["coreference"]["n"] == 1
        assert names(tmp_path) == ["b.json", "b.md", "b.safetensors", "llama"]
    else:
        with pytest.raises(UsageError, match="document 1: .* the model's context is 128"):
            train.main(config)
        assert names(tmp_path) == ["llama"]


def command(folder, out, *more):
    return ["train.py", "--model", folder, "--data", ROOT / "LICENSE", "--out", out,
            "--steps", "60", "--length", "64", "--long", "128", "--longest", "128", "--rows", "16",
            "--documents", "1", "--windows", "1", "--save-every", "0", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The butler of a run that nothing stopped, and how many seconds the run took."""
    out, began = tmp_path_factory.mktemp("whole") / "b.safetensors", time.perf_counter()
    done = script(*command(folder, out))
    assert done.returncode == 0, done.stderr
    assert names(out.parent) == ["b.json", "b.md", "b.safetensors"]
    return load_file(out), time.perf_counter() - began


def started(*arguments, **more):
    line = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_run_that_is_stopped_meets_a_full_disk_and_is_resumed(folder, whole, tmp_path):
    out = tmp_path / "b.safetensors"
    state = survive.state_path(train.Config(out=str(out)))
    run = started(*command(folder, out))
    wait_for(state, run)
    run.send_signal(signal.SIGINT)
    printed, said = run.communicate()
    assert run.returncode == 130 and printed == "", said
    assert said.splitlines()[-1].startswith("stopped after ") and "--resume" in said
    assert names(tmp_path) == [state.name]

    saved = state.read_bytes()
    room = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))}
    full = started(*command(folder, out, "--resume"), **room)
    printed, said = full.communicate()
    assert full.returncode == 2 and printed == "", said
    assert "error: cannot write" in said.splitlines()[-1] and "Traceback" not in said
    assert state.read_bytes() == saved and names(tmp_path) == [state.name]

    done = script(*command(folder, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_equal(load_file(out), whole[0])


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_text(folder, whole, tmp_path):
    """A line was added to it meanwhile; put back, the run ends as if nothing had been."""
    text, out = tmp_path / "LICENSE", tmp_path / "b.safetensors"
    text.write_text(license := (ROOT / "LICENSE").read_text())
    line = [text if part == ROOT / "LICENSE" else part for part in command(folder, out)]
    run = started(*line)
    wait_for(survive.state_path(train.Config(out=str(out))), run)
    run.terminate()
    run.communicate()
    text.write_text("One line more.\n" + license)  # moves all parts, those to train on too
    done = script(*line, "--resume")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.endswith("other text: what it was trained on has changed since"), done.stderr
    text.write_text(license)
    done = script(*line, "--resume")
    assert done.returncode == 0, done.stderr
    assert_equal(load_file(out), whole[0])


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.slow
def test_killed_at_20_moments_and_resumed_the_weights_are_those_of_an_uninterrupted_run(
        folder, tmp_path):
    """SIGKILL at a random moment after the first step, every fifth time after the start of the
    process; a state is being written most of the time."""
    def begun(name, early=False):
        out = tmp_path / name / "b.safetensors"
        process = started(*command(folder, out, "--steps", "300"))
        if not early:
            wait_for(survive.state_path(train.Config(out=str(out))), process)
        return out, process

    out, run = begun("whole")
    began = time.perf_counter()
    _, said = run.communicate()
    assert run.returncode == 0, said
    expected, seconds = load_file(out), time.perf_counter() - began
    rng, killed, number = random.Random(0), 0, 0
    while killed < 20:
        number += 1
        out, run = begun(str(number), early=number % 5 == 0)
        moment = rng.uniform(0, seconds)
        with suppress(subprocess.TimeoutExpired):
            run.communicate(timeout=moment)
        run.kill()
        run.communicate()
        if run.returncode == 0:  # it was faster this time
            continue
        killed += 1
        found = names(out.parent) if out.parent.exists() else []
        resumed = script(*command(folder, out, "--steps", "300", "--resume"))
        print(f"{killed}: killed after {moment:.2f} of {seconds:.2f} s, left {found}")
        if resumed.returncode:  # killed when all was written
            assert "nothing to resume" in resumed.stderr, resumed.stderr
        assert_equal(load_file(out), expected)
        assert names(out.parent) == ["b.json", "b.md", "b.safetensors"]


# ---------------------------------------------------------------------------- several processes


class Keeper(torch.optim.SGD):
    """In an optimiser's place: keeps the first gradients that it is given."""

    def step(self):
        if not hasattr(self, "seen"):
            self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]


def gradients(llama, config, noise=None):
    """-> the first gradients of every parameter, as the loop hands them to the optimiser, and the
    exit code of a run that a signal stopped."""
    torch.manual_seed(0)
    butler = Butler(ButlerConfig.for_model(llama, stride=1, size=16, hidden=64))
    keeper, code = Keeper(butler.parameters()), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizers", lambda butler, rate: [keeper])
        try:
            train.distil(llama, butler, noise or Noise(), config, [])
        except SystemExit as left:
            code = left.code
    return keeper.seen, code


def one_of_two(number, port, model, folder):
    """What each of two processes does: trains, until a signal reaches the second one alone."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    survive.join("cpu")
    llama = tiny_llama() if model is None else Llama.from_pretrained(model)
    config = settings(folder, batch=4, save_every=3600)
    noise = Noise("0 64 2 2", lambda: os.kill(os.getpid(), signal.SIGTERM))
    seen, code = gradients(llama, config, noise)
    save_file({str(i): g for i, g in enumerate(seen)}, folder / f"{number}.safetensors")
    (folder / f"{number}.code {code}").touch()


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_have_the_gradients_of_one_and_end_together(request, tiny, tmp_path, real):
    """The gradients of the same global batch; then a SIGTERM to the second process ends both, and
    the first one saves."""
    model = request.getfixturevalue("model_path") if real else None
    llama = request.getfixturevalue("llama") if real else tiny
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, model, tmp_path), nprocs=2)
    expected, _ = gradients(llama, settings(tmp_path / "one", batch=4, steps=1))
    for number in range(2):
        seen = load_file(tmp_path / f"{number}.safetensors")
        assert len(seen) == len(expected)
        for i, wanted in enumerate(expected):
            scale = wanted.abs().max()
            assert scale > 0
            assert_close(f"gradient {i} of process {number}, relative", seen[str(i)] / scale,
                         wanted / scale, 1e-5)
    assert names(tmp_path) == ["0.code 143", "0.safetensors", "1.code 143", "1.safetensors",
                               "b.safetensors.state", "one"]
    assert len(load_file(tmp_path / "b.safetensors.state")["log loss"]) == 4


def test_torchrun_trains_as_one_process_does(folder, whole, tmp_path):
    out = tmp_path / "b.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", *map(str, command(folder, out))]
    done = subprocess.run(torchrun, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["processes"] == 2 and done.stdout.count("saved ") == 1
    assert names(tmp_path) == ["b.json", "b.md", "b.safetensors"]
    for name, weight in load_file(out).items():
        assert_close(name, weight, whole[0][name], 1e-2)


@pytest.mark.slow
def test_torchrun_adds_one_line_of_ours_to_its_own(folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", *map(str, command(folder, tmp_path / "b.safetensors"))]
    wrong = subprocess.run([*torchrun, "--batch", "3"], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in wrong.stderr.splitlines() if "train.py: error:" in line]
    assert wrong.returncode and len(said) == 1 and "3 does not divide among 2" in said[0]


@pytest.mark.slow
def test_training_end_to_end(tmp_path):
    out = tmp_path / "b.safetensors"
    done = script("train.py", "--steps", "6", "--long", "1024", "--longest", "1024",
                  "--documents", "2", "--windows", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kl"] < report["kl_before"]
    assert set(report["table"]) == {"dense", "oracle", "butler", "recency", "random"}
    assert json.loads(out.with_suffix(".json").read_text())["kl"] == report["kl"]
    sampled = script("sample.py", "--butler", out, "--max-new-tokens", "2")
    assert sampled.returncode == 0, sampled.stderr
