"""bench.py's measures against slow, independent ways to the same number."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import bench
from bench import Probe
from cli import UserError
from selection import make_selector
from synth_task import every_maker

NAMES = ("dense", "oracle", "butler", "recency")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (2, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def makers(tiny_butler):
    return every_maker(NAMES, ("0.3",), tiny_butler)


def step_by_step(model, window, name, butler, start):
    """Reads `start` tokens densely, then one at a time -> nats of those tokens but the first, and
    the share of attention kept, averaged over them."""
    cache = model.new_cache(1, len(window))
    selector = make_selector(name, 0.3, butler)
    probe = Probe(selector) if selector else None
    if start:
        model.prefill(window[None, :start], cache)
    logits, kept = [], []
    for token in window[start:]:
        logits.append(model.decode(token.view(1, 1), cache, probe)[0])
        kept.append(probe.mean() if probe else 1.0)
    nats = F.cross_entropy(torch.cat(logits)[:-1], window[start + 1 :]).item()
    return nats, sum(kept) / len(kept)


def test_probe_measures_the_attention_on_the_selected_tokens(tiny, tiny_butler):
    """Against a softmax written out in float64, head by head and token by token."""
    rng = torch.Generator().manual_seed(1)
    q, keys = torch.randn(1, 4, 3, 16, generator=rng), torch.randn(1, 2, 50, 16, generator=rng)
    index = torch.full((1, 2, 3, 6), -1)
    for g in range(2):
        for t in range(3):
            index[0, g, t, : 4 + g] = torch.randperm(48 + t, generator=rng)[: 4 + g]

    probe = Probe(lambda *seen: index)
    probe.kept[4] = 0.25
    assert probe(1, None, q, keys, None) is index
    shares = []
    for h in range(4):
        for t in range(3):
            own = 47 + t
            scores = (keys[0, h // 2, : own + 1].double() @ q[0, h, t].double() / 4).exp()
            selected = [s for s in index[0, h // 2, t].tolist() if s >= 0]
            shares.append(float(scores[selected].sum() / scores.sum()))
    assert probe.kept[1] == pytest.approx(sum(shares) / 12, rel=1e-5)
    assert probe.mean() == pytest.approx((0.25 + probe.kept[1]) / 2)
    dense = Probe(lambda *seen: None)
    assert dense(0, None, q, keys, None) is None and dense.kept == {}


def test_perplexity_is_that_of_the_text_decoded_token_by_token(tiny, tiny_butler, windows, makers):
    windows = windows[:, :70]
    results = bench.perplexity(tiny, windows, makers)
    nats = {name: [step_by_step(tiny, window, name, tiny_butler, 0)[0] for window in windows]
            for name in NAMES}
    for name in NAMES:
        budget = "1.0" if name == "dense" else "0.3"
        m = results["perplexity"][name][budget]
        assert m["mean"] == pytest.approx(math.exp(sum(nats[name]) / 2), rel=1e-4)
        assert m["low"] <= m["mean"] <= m["high"] and m["n"] == 2
    over = results["over oracle"]
    assert set(over) == {"butler", "recency"}  # where the oracle has the same budget
    ratio = math.exp((sum(nats["butler"]) - sum(nats["oracle"])) / 2)
    assert over["butler"]["0.3"]["mean"] == pytest.approx(ratio - 1, abs=1e-4)


def test_length_measures_what_decoding_the_end_of_a_text_gives(tiny, tiny_butler, windows, makers):
    report = bench.length(tiny, windows, [100, 150], makers)
    results = report["results"]
    for task, by_name in report["layers"].items():  # the mean of the layers is what is reported
        for name, by_budget in by_name.items():
            for budget, layers in by_budget.items():
                if name != "dense":
                    assert len(layers) == tiny.config.layers - 1
                    mean = sum(layers) / len(layers)
                    assert results[task][name][budget]["mean"] == pytest.approx(mean, rel=1e-6)
    for context in (100, 150):
        found = {}
        for name in NAMES:
            budget = "1.0" if name == "dense" else "0.3"
            runs = [step_by_step(tiny, window[:context], name, tiny_butler, context - 32)
                    for window in windows]
            nats, kept = (sum(values) / 2 for values in zip(*runs, strict=True))
            found[name] = runs
            m = results[f"kept @{context}"][name][budget]
            assert m["mean"] == pytest.approx(kept, rel=1e-3) and m["n"] == 2
            m = results[f"perplexity @{context}"][name][budget]
            assert m["mean"] == pytest.approx(math.exp(nats), rel=1e-3)
        of_oracle = [b[1] / o[1] for b, o in zip(found["butler"], found["oracle"], strict=True)]
        m = results[f"kept of oracle @{context}"]["butler"]["0.3"]
        assert m["mean"] == pytest.approx(sum(of_oracle) / 2, rel=1e-3) and m["mean"] < 1


def test_speed_rows_have_what_is_documented(tiny, tiny_butler, windows, monkeypatch, capsys):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    makers = every_maker(("dense", "butler", "recency"), ("0.3", "20"), tiny_butler)
    config = bench.Config(suite="speed", n=2, batch=2, device="cpu")
    rows = bench.speed(tiny, windows, [64, 100], makers, config)
    assert [(row["context"], row["selector"], row["kept"]) for row in rows] == [
        (context, name, kept) for context in (64, 100) for name, kept in (
            ("dense", 1.0), ("butler", 0.3), ("butler", 20), ("recency", 0.3), ("recency", 20))]
    weights = 4 * sum(p.numel() for name, p in tiny.named_parameters() if "embed" not in name)
    for row in rows:
        assert set(row) == {
            "suite", "engine", "device", "shape", "batch", "context", "selector", "kept", "ms",
            "bandwidth_ms", "tokens_per_s", "bytes", "speedup"}
        kept = int(row["kept"] if row["kept"] > 1 else row["kept"] * row["context"])
        token = 2 * 2 * 2 * 16 * 4  # batch, key and value, KV heads, head size, float32
        read = weights + token * (row["context"] + 4 * kept)  # layer 0 and the others
        if row["selector"] == "butler":
            read += 2 * 4 * row["context"] * 2 * (8 + 4)  # 8-bit importance keys and their scales
        assert row["bytes"] == pytest.approx(read, abs=1)
        assert row["bandwidth_ms"] == pytest.approx(row["bytes"] / 1e6)
        assert row["tokens_per_s"] == pytest.approx(2000 / row["ms"])
        dense = next(r for r in rows if r["context"] == row["context"])
        assert row["speedup"] == pytest.approx(dense["ms"] / row["ms"])
    bench.print_rows(rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_timed_steps_stand_one_token_further_each_round(tiny, windows):
    seen = {"a": [], "b": []}

    def spy(name):
        def selector(layer, x, q, keys, positions):
            seen[name] += positions.tolist() if layer == 0 else []

        return selector

    cache = tiny.new_cache(2, 70)
    tiny.prefill(windows[:, :63], cache)
    times = bench.decode_times(tiny, cache, windows[:, 63:64], 64, {n: spy(n) for n in seen}, 3)
    assert seen == {"a": [63, 64, 65, 66, 67], "b": [63, 64, 65, 66, 67]}
    assert list(times) == ["a", "b"] and min(times.values()) > 0


@pytest.mark.parametrize("suite", bench.SUITES)
def test_the_script_prints_and_writes_its_report(main, tmp_path, suite):
    contexts = "70" if suite == "perplexity" else "64,90"
    report = main("bench.py", "--suite", suite, "--n", 1, "--contexts", contexts,
                  "--selectors", "dense,butler", "--write", tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert report["config"]["suite"] == suite and report["hardware"] and report["commit"]
    if suite == "speed":
        assert [row["context"] for row in report["rows"]] == [64, 64, 90, 90]
    else:
        what = "perplexity" if suite == "perplexity" else "kept @64"
        assert list(report["results"][what]) == ["dense", "butler"]
        assert report["results"][what]["butler"]["0.1"]["n"] == 1


@pytest.mark.parametrize("flags, message", [
    ({"suite": "magic"}, "unknown suite 'magic'"), ({"contexts": ("63",)}, "at least 64 tokens"),
    ({"contexts": ("a",)}, "--contexts: a"), ({"budgets": ("0",)}, "--budgets: 0"),
    ({"budgets": ("1.5",)}, "budget 1.5"), ({"selectors": ("magic",)}, "unknown selector"),
    ({"text": "/nowhere"}, "cannot read /nowhere"), ({"text": "LICENSE"}, "too few for 20 windows"),
    ({"drift": 0.2}, "no --drift"), ({"write": "tests"}, "cannot write tests"),
    ({"suite": "drift", "task": ("magic",), "model": "/nowhere"}, "unknown task 'magic'"),
    ({"suite": "tradeoff", "task": ("copy", ""), "model": "/nowhere"}, "unknown task ''"),
    ({"suite": "speed", "contexts": ("64", "8171")}, "8,193 tokens exceed"),
    ({"write": ""}, "it is a folder"),
    ({"contexts": ("64", "9000"), "n": 1}, "9,000 tokens exceed the model's context of 8,192"),
    ({"model": "/nowhere"}, "no model at /nowhere"), ({"device": "abacus"}, "device 'abacus'")])
def test_nonsense_is_refused_in_one_line(in_memory, flags, message):
    with pytest.raises(UserError, match=message) as error:
        bench.main(bench.Config(**flags))
    assert "\n" not in str(error.value)
