"""Training: the loss against explicit loops, stopping and resuming, several processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, assert_close, randomise, tiny_config
from safetensors.torch import load_file

import cli
import train
from bench import Probe
from butler import Butler, ButlerConfig
from cli import UserError
from kernel import true_attention
from model import Llama
from selection import make_selector


def small_butler(tiny, **sizes):
    torch.manual_seed(3)
    sizes = {"layers_per_producer": 2, "size": 8, "hidden": 16} | sizes
    return Butler(ButlerConfig.for_model(tiny, **sizes))


# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("rotated_keys", [False, True])
@pytest.mark.parametrize("gaps", [False, True])
def test_distillation_is_the_kl_over_what_can_be_chosen(tiny, rotated_keys, gaps):
    """Against loops over layers, rows and heads in float64. Its gradient is the cross-entropy's."""
    butler = small_butler(tiny, rotated_keys=rotated_keys)
    ids = torch.arange(40)[None] * 7 % 256
    rows = torch.tensor([39, 5, 20, 30])
    positions = torch.arange(40) + 50 * (torch.arange(40) > 15) * gaps
    seen = train.record(tiny, ids, rows, positions)
    divergence = torch.zeros(4, 4, 2, dtype=torch.double)  # [L-1, rows, G]
    cross_entropy = 0
    for layer in range(1, 5):
        producer = (layer - 1) // 2 * 2
        queries = butler.importance_queries(producer, seen.x[producer], positions[rows])[layer]
        projected = butler.importance_keys(layer, seen.keys[layer], positions)
        for i, row in enumerate(rows.tolist()):
            for g in range(2):
                keys = seen.keys[layer][0, g, : row + 1].double()
                heads = seen.q[layer][0, 2 * g : 2 * g + 2, i].double()
                p = (heads @ keys.T / 4).softmax(-1).mean(0)
                p = p[4 : max(row - 7, 4)]  # neither sinks nor window
                b = projected[0, g, 4 : max(row - 7, 4)] @ queries[0, g, i] / 8**0.5
                log_b = b.double().log_softmax(0)
                if len(p):
                    kl = (p / p.sum() * ((p / p.sum()).log() - log_b)).sum()
                    divergence[layer - 1, i, g] = p.sum() * kl.detach()
                    cross_entropy = cross_entropy - (p * log_b).sum() / divergence.numel()
    actual = train.distillation(butler, seen)
    some = train.distillation(butler, seen, torch.tensor([3, 0]))
    assert divergence.mean() > 0.01
    assert_close("all rows", actual, divergence.mean((1, 2)), 1e-5)
    assert_close("rows 3 and 0", some, divergence[:, [3, 0]].mean((1, 2)), 1e-5)
    parameters = list(butler.parameters())
    expected = torch.autograd.grad(cross_entropy, parameters)
    for gradient, wanted in zip(torch.autograd.grad(actual.mean(), parameters), expected,
                                strict=True):
        assert_close("gradient", gradient / wanted.abs().max(), wanted / wanted.abs().max(), 1e-4)


def test_true_attention_needs_the_places_of_recorded_rows(tiny):
    ids = torch.arange(60)[None] * 7 % 256
    rows = torch.tensor([50, 7, 33])
    some, every = train.record(tiny, ids, rows), train.record(tiny, ids, torch.arange(60))
    expected = true_attention(every.q[2], every.keys[2])[..., rows, :]
    actual = true_attention(some.q[2], some.keys[2], rows)
    assert_close("attention", actual, expected, 1e-6)
    assert (true_attention(some.q[2], some.keys[2]) - expected).abs().max() > 0.1


def test_recorder_keeps_all_keys_and_the_sampled_rows(tiny):
    ids = torch.arange(30).view(1, 30)
    rows = torch.tensor([21, 4])
    recorder = train.record(tiny, ids, rows)
    assert sorted(recorder.keys) == sorted(recorder.x) == [0, 1, 2, 3, 4]
    assert list(recorder.q[3].shape) == [1, 4, 2, 16]
    assert list(recorder.keys[3].shape) == [1, 2, 30, 16]
    assert torch.equal(recorder.x[0], tiny.embed_tokens(ids)[:, rows])
    assert torch.equal(recorder.positions, torch.arange(30))
    gaps = torch.arange(30) + 100 * (torch.arange(30) > 15)
    assert torch.equal(train.record(tiny, ids, rows, gaps).positions, gaps)
    butler = small_butler(tiny)
    later = train.distillation(butler, train.record(tiny, ids, rows, torch.arange(30) + 300))
    assert_close("a shift changes no loss", later, train.distillation(butler, recorder), 1e-4)


# ---------------------------------------------------------------------------- the loop


class Noise:
    """Windows of random tokens with something to find: the second half repeats the first.
    before_reading is called with each seed."""

    def __init__(self, before_reading=lambda seed: None, digest="noise"):
        self.before_reading = before_reading
        self.digest = lambda: digest
        self.seeds = []

    def window(self, seed, length):
        self.before_reading(seed)
        self.seeds.append(seed)
        rng = torch.Generator().manual_seed(int(re.sub(r"\D", "", seed)))
        ids = torch.randint(200, (length // 2,), generator=rng).tolist()
        return ids + ids


def settings(folder, **changes):
    defaults = {"out": str(folder / "b.safetensors"), "steps": 12, "length": 64, "rows": 16,
                "reuse": 2, "long": 96, "long_every": 0, "device": "cpu"}
    return train.Config(**defaults | changes)


def trained(tiny, config, noise=None):
    """-> butler, the loss of every step"""
    butler = small_butler(tiny, layers_per_producer=1, size=16, hidden=64)
    return butler, train.training_loop(tiny, butler, noise or Noise(), config)


def assert_same_weights(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def kept(model, selector, ids):
    """The share of attention that the selector's choice holds at the last 32 tokens."""
    cache = model.new_cache(1, ids.shape[1])
    probe = Probe(selector)
    model.prefill(ids[:, :-32], cache, selector.watch)
    with torch.inference_mode():
        model(ids[:, -32:], cache, probe)
    return probe.mean()


def test_training_lowers_the_loss_and_beats_recency_on_unseen_text(tiny, tmp_path):
    butler, losses = trained(tiny, settings(tmp_path, steps=150))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    butler.eval().requires_grad_(False)
    shares = {"untrained": [], "butler": [], "recency": [], "oracle": []}
    for seed in range(4):
        ids = torch.tensor([Noise().window(str(90_000 + seed), 160)])
        makers = {name: make_selector(name, 0.2, butler) for name in list(shares)[1:]}
        makers["untrained"] = small_butler(tiny).requires_grad_(False).selector(0.2)
        for name, selector in makers.items():
            shares[name].append(kept(tiny, selector, ids))
    mean = {name: sum(values) / 4 for name, values in shares.items()}
    assert mean["oracle"] > mean["butler"] > mean["recency"] + 0.05, mean
    assert mean["butler"] > mean["untrained"] + 0.05, mean


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_muon_is_torchs_in_float32(shape):
    """Three steps; torch's own rounds to bfloat16, which leaves two digits."""
    rng = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *shape, generator=rng)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (train.Muon([ours], 0.1), torch.optim.Muon(
        [theirs], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 1 and (ours - theirs).norm() < 0.02 * moved
    singular_values = torch.linalg.svdvals(train.orthogonal(gradients[0]))
    assert (singular_values - 1).abs().max() < 0.35


def test_every_fourth_step_is_long_and_a_batch_serves_several_steps(tiny, tmp_path):
    """No two steps look at the same row of a batch. What a step sees depends on its number."""
    config = settings(tmp_path, long_every=4, reuse=3, rows=8, span=2000)
    noise = Noise()
    batches = train.Batches(tiny, noise, config)
    steps = [(step, *batches.of_step(step)) for step in range(24)]
    lengths = [recorder.keys[1].shape[2] for _, recorder, _ in steps]
    assert lengths == [96 if step % 4 == 3 else 64 for step in range(24)]
    first_texts = [seed for seed in noise.seeds if seed.endswith(" 0")]
    assert first_texts == ["0 64 0 0", "0 96 0 0", "0 64 1 0", "0 64 2 0", "0 64 3 0", "0 96 1 0",
                           "0 64 4 0", "0 64 5 0"]
    looked = {}
    for step, recorder, some in steps:
        looked.setdefault(id(recorder), []).extend(recorder.rows[some].tolist())
        assert (recorder.positions[-1] > 100) == (step % 4 == 3)  # gaps
    assert all(len(set(rows)) == len(rows) == 24 for rows in looked.values())
    again, _ = train.Batches(tiny, Noise(), config).of_step(13)
    assert torch.equal(again.keys[2], steps[13][1].keys[2])


def test_a_diverging_run_ends_in_one_line(tiny, tmp_path):
    poisoned = randomise(Llama(tiny_config()))

    def poison(seed):
        if seed.startswith("0 64 3 "):
            poisoned.layers[3].self_attn.k_proj.weight.fill_(torch.nan)

    with pytest.raises(UserError, match="diverges at step 6: try a lower --learning-rate"):
        trained(poisoned, settings(tmp_path), Noise(poison))


@pytest.mark.parametrize("changes, training, held_out, message", [
    ({}, 511, 2048, "511 tokens to train on, and a window has 512"),
    ({"long_every": 4}, 2047, 2048, "2,047 tokens to train on, and a window has 2,048"),
    ({}, 512, 2047, "2,047 tokens in the held-out part, and a window has 2,048"),
    ({"length": 9999}, 2999, 2999, "2,999 tokens to train on, and a window has 3,000"),
    ({"longest": 64}, 512, 511, "511 tokens in the held-out part, and a window has 512"),
    ({"longest": 64}, 512, 512, None), ({"long_every": 4}, 2048, 2048, None)])
def test_less_text_than_one_window_is_refused(tmp_path, changes, training, held_out, message):
    config = settings(tmp_path, **{"length": 512, "long": 2048, "long_every": 0} | changes)
    if message is None:
        train.check_amount(config, 3000, training, held_out)
        return
    with pytest.raises(UserError, match=message):
        train.check_amount(config, 3000, training, held_out)


# ---------------------------------------------------------------------------- stopping, resuming


@pytest.fixture
def interruptible():
    """A shell's `&` makes its children ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["reading", "between two matrices", "in the first step"])
def test_ctrl_c_ends_behind_the_step_and_resuming_end_with_the_same_weights(
        tiny, tmp_path, monkeypatch, capsys, interruptible, moment):
    whole, losses = trained(tiny, settings(tmp_path / "whole"))
    config = settings(tmp_path / "cut")
    start = "0 64 0 0" if moment == "in the first step" else "0 64 4 0"
    orthogonal, calls = train.orthogonal, []

    def interrupted(matrix):
        calls.append(1)
        if len(calls) == 8 * 8 + 3:  # 4 producers have 8 matrices: the third one of step 8
            press_ctrl_c()
        return orthogonal(matrix)

    noise = Noise(lambda seed: seed == start and press_ctrl_c())
    if moment == "between two matrices":
        noise = Noise()
        monkeypatch.setattr(train, "orthogonal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, config, noise)
    monkeypatch.undo()
    steps = 1 if moment == "in the first step" else 9
    assert f"stopped after {steps} of 12 steps; --resume continues" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["b.safetensors.state"]
    resumed, again = trained(tiny, replace(config, resume=True))
    assert again == losses
    assert_same_weights(whole, resumed)


def test_resuming_without_a_state_starts_from_the_beginning(tiny, tmp_path, capsys):
    whole, _ = trained(tiny, settings(tmp_path / "whole"))
    assert_same_weights(whole, trained(tiny, settings(tmp_path / "none", resume=True))[0])
    assert "training starts from the beginning" in capsys.readouterr().err


def test_a_state_is_written_every_50_steps(tiny, tmp_path):
    config = settings(tmp_path, steps=60, reuse=60, rows=1)
    trained(tiny, config)
    losses = torch.load(f"{config.out}.state", weights_only=True)["losses"]
    assert len(losses) == train.SAVE_EVERY == 50


def test_the_state_of_another_run_is_refused(tiny, tmp_path, interruptible):
    config = settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, config, Noise(lambda seed: seed == "0 64 4 0" and press_ctrl_c()))
    config = replace(config, resume=True)
    for changes, message in (({"batch": 1}, "batch was 2, now it is 1"),
                             ({"seed": 7}, "seed was 0, now it is 7"),
                             ({"steps": 13}, "steps was 12, now it is 13")):
        with pytest.raises(UserError, match=f"another run: {message}"):
            trained(tiny, replace(config, **changes))
    with pytest.raises(UserError, match="another run: text was noise, now it is other words"):
        trained(tiny, config, Noise(digest="other words"))
    with pytest.raises(UserError, match="another run: base model was"):
        trained(randomise(Llama(tiny_config()), seed=5), config)
    trained(tiny, replace(config, learning_rate=1e-3))  # this may change


def test_a_state_is_not_overwritten_by_another_run(tiny, tmp_path, interruptible):
    """Nor by one that was started before the state was written."""
    config = settings(tmp_path, model="/nowhere/at/all", data=[str(ROOT / "LICENSE")])
    noise = Noise(lambda seed: seed == "0 64 1 0" and press_ctrl_c())
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, config, noise)
    path = tmp_path / "b.safetensors.state"
    before = path.read_bytes()
    for run in (train.main, lambda config: trained(tiny, config, noise)):
        with pytest.raises(UserError, match=f"^{path} belongs to .*--resume continues it.*delete"):
            run(config)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="no model at /nowhere/at/all"):
        train.main(replace(config, resume=True))


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])  # which is a RuntimeError
def test_what_was_trained_is_saved_when_memory_runs_out(tiny, tmp_path, monkeypatch, error):
    """Also directly behind a step whose state was written."""
    monkeypatch.setattr(train, "SAVE_EVERY", 8 if isinstance(error, MemoryError) else 50)

    def run_out(seed):
        if seed.startswith("0 64 4 "):
            raise error

    whole, losses = trained(tiny, settings(tmp_path / "whole"))
    config = settings(tmp_path / "cut")
    with pytest.raises(type(error)):
        trained(tiny, config, Noise(run_out))
    resumed, again = trained(tiny, replace(config, resume=True))
    assert again == losses
    assert len(torch.load(f"{config.out}.state", weights_only=True)["losses"]) == 8
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_damaged_state_is_refused_in_one_line(tiny, tmp_path, interruptible, size):
    config = settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, config, Noise(lambda seed: seed == "0 64 1 0" and press_ctrl_c()))
    path = tmp_path / "b.safetensors.state"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="unusable state") as error:
        trained(tiny, replace(config, resume=True))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the script


def flags(folder, out, **changes):
    """A short run of the script on a model folder."""
    values = {"model": folder, "data": ROOT / "LICENSE", "out": out, "steps": 10, "length": 64,
              "long": 128, "longest": 128, "rows": 16, "reuse": 2, "documents": 1, "windows": 1,
              "device": "cpu"} | changes
    return [word for name, value in values.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]


def script(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """-> the weights of a run that nothing stopped, and its report"""
    out = tmp_path_factory.mktemp("whole") / "b.safetensors"
    done = script("train.py", *flags(folder, out))
    assert done.returncode == 0, done.stderr
    return load_file(out), json.loads(done.stdout.splitlines()[-1])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


INTERRUPTED = """
import os, signal
import cli, train
signal.signal(signal.SIGINT, signal.default_int_handler)
orthogonal, calls = train.orthogonal, []

def interrupted(matrix):
    calls.append(1)
    if len(calls) == 11:  # step 5, one producer: its first of two matrices
        os.kill(os.getpid(), signal.SIGINT)
    return orthogonal(matrix)

train.orthogonal = interrupted
cli.run(train.main, train.Config)
"""


def test_a_process_is_stopped_and_resumed(folder, whole, tmp_path):
    out = tmp_path / "b.safetensors"
    cut = script("-c", INTERRUPTED, *flags(folder, out))
    assert cut.returncode == 130 and cut.stdout == "", cut.stderr
    assert "stopped after 6 of 10 steps" in cut.stderr and "Traceback" not in cut.stderr
    assert names(tmp_path) == ["b.safetensors.state"]
    done = script("train.py", *flags(folder, out), "--resume")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["b.safetensors", "b.safetensors.json"]
    for name, w in load_file(out).items():
        assert torch.equal(w, whole[0][name]), name


# A thread of the process group that is left aborts its process now and then when it exits, and
# torchrun then stops all of them.
PROCESS_GROUP_ENDS = """
import os, sys
sys.path.insert(0, os.getcwd())
import cli, train
def main(config):
    report = train.main(config)
    tasks = "/proc/self/task"  # Linux lists threads there
    threads = [open(f"{tasks}/{t}/comm").read() for t in os.listdir(tasks)]
    assert not any("gloo" in name for name in threads), threads
    return report
cli.run(main, train.Config)
"""


def test_two_processes_train_as_one_does(folder, whole, tmp_path):
    out = tmp_path / "b.safetensors"
    program = tmp_path / "program.py"
    program.write_text(PROCESS_GROUP_ENDS)
    done = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  program, *flags(folder, out))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["processes"] == 2 and done.stdout.count("it is in ") == 1
    for name, w in load_file(out).items():
        assert_close(name, w, whole[0][name], 1e-5)
    assert report["kl"] == pytest.approx(whole[1]["kl"], rel=1e-4)


def test_report_is_printed_and_written_beside_the_butler(folder, whole, tmp_path, capsys):
    """Two butlers whose names differ behind the dot; the second one in the paper's form, on text
    from a folder."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text((ROOT / "LICENSE").read_text()[:9000])
    (tmp_path / "texts" / "b.txt").write_text((ROOT / "README.md").read_text()[:9000])
    common = {"model": str(folder), "steps": 4, "length": 64, "long": 128, "longest": 128,
              "rows": 16, "documents": 1, "windows": 1, "device": "cpu"}
    train.main(train.Config(out=str(tmp_path / "b.one"), data=[str(ROOT / "LICENSE")], **common))
    train.main(train.Config(out=str(tmp_path / "b.two"), data=[str(tmp_path / "texts")],
                            rotated_keys=True, **common))
    shown = capsys.readouterr().out
    assert names(tmp_path) == ["b.one", "b.one.json", "b.two", "b.two.json", "texts"]
    for name in ("b.one", "b.two"):
        report = json.loads((tmp_path / f"{name}.json").read_text())
        butler = Butler.load(tmp_path / name)
        assert report["config"]["rotated_keys"] == butler.config.rotated_keys == (name == "b.two")
        assert report["parameters"] == sum(p.numel() for p in butler.parameters())
        assert report["fingerprint"] == butler.config.fingerprint
        assert len(report["loss"]) == 4 and len(report["kl_layers"]) == 2 and report["command"]
        assert list(report["table"]) == ["dense", "oracle", "butler", "recency", "random"]
        for row in report["table"].values():
            assert row["coreference"]["n"] == 1 and list(row["kept"]) == ["128"]
            assert 0 < row["kept"]["128"]["mean"] <= report["table"]["dense"]["kept"]["128"]["mean"]
    assert whole[1]["kl"] < whole[1]["kl_before"]
    assert shown.endswith(f"it is in {tmp_path}/b.two.\n")


def test_on_a_terminal_it_ends_with_the_table_and_one_sentence(
        folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(folder, tmp_path / "b")])
    cli.run(train.main, train.Config)
    *table, first, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[3:8]] == ["dense", "oracle", "butler", "recency",
                                                        "random"]
    assert first.startswith("After ") and last.endswith(f"it is in {tmp_path}/b.")


@pytest.mark.parametrize("changes, message", [
    ({"size": 6}, "--size 6 is no multiple of 4"), ({"out": "tests"}, "cannot write tests"),
    ({"out": "README.md/b"}, "cannot write README.md/b"), ({"device": "abacus"}, "device 'abacus'"),
    ({"out": os.fsdecode(b"out/caf\xe9")}, r"--out 'out/caf\\udce9' is not UTF-8"),
    ({"data": ["/nowhere.txt"]}, "there is no /nowhere.txt"),
    ({"data": ["requirements.txt"]}, "too little text")])
def test_what_is_wrong_is_said_before_the_model_is_read(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    config = settings(tmp_path, model="/nowhere/at/all")
    with pytest.raises(UserError, match=message):
        train.main(replace(config, **changes))


@pytest.mark.parametrize("end", [".json", ".state", ".long"])
def test_every_file_that_is_written_is_tried_at_once(tmp_path, end):
    config = settings(tmp_path, model="/nowhere/at/all")
    if end == ".long":  # the longest name has 255 characters
        config = replace(config, out=str(tmp_path / ("x" * 242)))
    else:
        (tmp_path / f"b.safetensors{end}").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        train.check(config)


def test_texts_that_no_step_uses_need_no_length(tmp_path):
    train.check(settings(tmp_path, reuse=64, long=63, long_every=0))
    with pytest.raises(UserError, match="--reuse 64: a text has fewer tokens than that"):
        train.check(settings(tmp_path, reuse=64, long=63, long_every=4))


def short_run(folder, out, data, **changes):
    values = {"steps": 4, "length": 64, "long": 128, "longest": 128, "rows": 8, "reuse": 2,
              "documents": 1, "windows": 1, "device": "cpu"}
    return train.Config(model=str(folder), out=str(out), data=[str(data)], **values | changes)


def test_how_much_text_there_is_is_told_before_training(folder, tmp_path, capsys):
    """Twelve files of 80 bytes are less than a window; with short windows they suffice."""
    (tmp_path / "notes").mkdir()
    for i in range(12):
        (tmp_path / "notes" / f"{i}.txt").write_text(f"{i:2}" * 40)
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / "notes" / name).write_bytes(b"\x89PNG")
    config = short_run(folder, tmp_path / "b", tmp_path / "notes")
    with pytest.raises(UserError, match=r"text: there are \d+ tokens .*, and a window has 128 "):
        train.main(config)
    notes = capsys.readouterr().err
    assert re.search(r"skipped.* text files: '.*a.png', '.*b.png', '.*c.png' and 1 more\n", notes)
    assert re.search(r"read 12 files, 960 characters\n.*\nabout \d+ tokens to train on", notes)
    assert names(tmp_path) == ["notes"]


def test_a_run_is_known_by_its_text_and_model_not_by_their_names(
        folder, tmp_path, monkeypatch, interruptible):
    """Here the text's names are not UTF-8."""
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    data = tmp_path / name / f"{name}.txt"
    data.write_bytes((ROOT / "LICENSE").read_bytes())
    (tmp_path / "copy").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    orthogonal, calls = train.orthogonal, []

    def interrupted(matrix):
        calls.append(1)
        if len(calls) == 3:  # one producer has 2 matrices: the first one of step 1
            press_ctrl_c()
        return orthogonal(matrix)

    monkeypatch.setattr(train, "orthogonal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(short_run(folder, "b", f"{name}/"))
    resumed = short_run("copy", tmp_path / "b", data, resume=True)
    (tmp_path / "other.txt").write_bytes((ROOT / "README.md").read_bytes())
    with pytest.raises(UserError, match=r"another run: text was [0-9a-f]+, now it is [0-9a-f]+"):
        train.main(replace(resumed, data=["other.txt"]))
    assert "loss" not in train.main(resumed)
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["config"]["data"] == [str(data)] and len(report["loss"]) == 4
    assert not (tmp_path / "b.state").exists()


def test_a_batch_divides_among_the_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--batch 3 does not divide among 2 processes"):
        train.check(settings(tmp_path, batch=3))


def test_positions_far_apart_need_no_more_tokens_than_the_context(tiny, tmp_path):
    """`long` and `span` stop at the model's context."""
    config = settings(tmp_path, long_every=1, long=10**4, span=10**6, rows=1)
    recorder, _ = train.Batches(tiny, Noise(), config).of_step(0)
    assert recorder.keys[0].shape[2] == tiny.config.context == 2048
    config = replace(config, long=64)
    last = []
    for seed in range(20):
        recorder, _ = train.Batches(tiny, Noise(), replace(config, seed=seed)).of_step(0)
        last.append(int(recorder.positions[-1]))
    assert 1024 < max(last) < 2048


def test_sampled_rows_depend_on_the_seed(tiny, tmp_path):
    one, two = (train.Batches(tiny, Noise(), settings(tmp_path, seed=seed)).of_step(0)[0].rows
                for seed in (0, 1))
    assert len(one.unique()) == 32 and set(one.tolist()) != set(two.tolist())
    random.seed(5)
    assert torch.equal(one, train.Batches(tiny, Noise(), settings(tmp_path)).of_step(0)[0].rows)
