"""workshop/suites.py and workshop/timing.py against other ways to the same numbers."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, randomise, tiny_config
from scipy import stats

import bench
import cli
from butler import Butler, ButlerConfig
from cli import UserError
from kernel import sparse_decode
from model import Llama
from synth_task import evaluate, every_maker
from workshop import suites, timing

# ---------------------------------------------------------------------------- suites


@pytest.fixture(scope="module")
def small():
    """A random model of 3 layers and a butler for it."""
    llama = randomise(Llama(tiny_config(layers=3)))
    return llama, randomise(Butler(ButlerConfig.for_model(llama, layers_per_producer=1)))


def test_spearman_is_that_of_scipy_with_ties_and_hidden_entries():
    rng = torch.Generator().manual_seed(0)
    a = torch.randint(9, (4, 5, 40), generator=rng).float()  # many ties
    b = a + 3 * torch.randn(4, 5, 40, generator=rng)
    seen = torch.arange(40) < torch.tensor([2, 7, 23, 39, 40])[:, None]
    rho = suites.spearman(a, b, seen)
    for i in range(4):
        for j, count in enumerate(seen.sum(-1)):
            expected = stats.spearmanr(a[i, j, :count], b[i, j, :count]).statistic
            if expected == expected:  # all entries tied: not a number in both
                assert rho[i, j].item() == pytest.approx(expected, abs=1e-5)
            else:
                assert rho[i, j].isnan()


class OneByOne:
    """A selector around another one, for single tokens: what bench.Probe measures, and the error of
    the attention's output, from PyTorch's dense attention and from sparse_decode."""

    def __init__(self, selector, cache):
        self.probe = bench.Probe(selector)
        self.cache = cache
        self.kept, self.error = [], []

    def __call__(self, layer, x, q, keys, positions):
        index = self.probe(layer, x, q, keys, positions)
        if index is not None:
            values = self.cache.v[layer][:, :, : keys.shape[2]]
            dense = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)[:, :, 0]
            sparse = sparse_decode(q[:, :, 0], keys, values, index[:, :, 0])
            self.kept.append(self.probe.kept[layer])
            self.error.append(((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean().item())
        return index


def test_recall_of_a_window_is_that_of_its_tokens_decoded_one_by_one(small):
    llama, butler = small
    windows = torch.randint(256, (2, 40), generator=torch.manual_seed(1))
    makers = every_maker(("dense", "oracle", "butler", "recency"), ("0.5",), butler)
    report = suites.recall(llama, windows, makers)
    assert "dense" not in report["results"]["kept"]
    for (name, budget), make in makers.items():
        if name == "dense":
            continue
        kept, error = [], []
        for window in windows:
            cache = llama.new_cache(1, 40)
            wrapped = OneByOne(make(), cache)
            for token in window:
                llama.decode(token.view(1, 1), cache, wrapped)
            kept += wrapped.kept
            error += wrapped.error
        for measure, values in ("kept", kept), ("error", error):
            m = report["results"][measure][name][budget]
            assert m["mean"] == pytest.approx(sum(values) / len(values), rel=1e-3), (name, measure)
            layers = report["layers"][measure][name][budget]
            assert sum(layers) / 2 == pytest.approx(m["mean"]) and len(layers) == 2
    rho = {name: by["0.5"]["mean"] for name, by in report["results"]["spearman"].items()}
    assert rho["oracle"] > 0.9999 > abs(rho["butler"])


def test_repeated_counts_8_grams():
    assert suites.repeated(list(range(50))) == 0
    assert suites.repeated([1] * 50) == 1 - 1 / 43
    assert suites.repeated(list(range(20)) * 2) == pytest.approx(13 / 33)


def test_generated_texts_are_the_dense_ones_when_all_tokens_are_selected(small, tok):
    llama, butler = small
    prompts = torch.randint(256, (2, 64), generator=torch.manual_seed(2))
    makers = every_maker(("dense", "butler", "random"), ("200", "13"), butler)
    report = suites.generation(llama, tok, prompts, 120, makers, seed=0)
    (shares,) = report["results"].values()
    endings = report["endings"]
    assert endings["butler"]["200"] == endings["random"]["200"] == endings["dense"]["1.0"]
    assert shares["butler"]["200"] == shares["dense"]["1.0"]
    assert endings["random"]["13"] != endings["dense"]["1.0"]


def test_drift_suite_has_the_scores_of_synth_task(main):
    pytest.importorskip("numba")
    flags = ("--engine", "fast", "--task", "coreference", "--n", 2, "--budgets", 0.1,
             "--drift", 2)
    table = main("bench.py", "--suite", "drift", "--contexts", 300, "--selectors", "dense,butler",
                 *flags)["results"]["coreference"]
    assert list(table) == ["dense", "butler, drift 0", "butler, drift 2"]
    every, some = (table[f"butler, drift {drift}"]["0.1"] for drift in ("0", "2"))
    assert every["steps"] == 1 < some["steps"] <= 16
    scores = main("synth_task.py", "--selectors", "butler", "--context", 300, *flags)["results"]
    assert scores["coreference"]["butler"]["0.1"]["mean"] == some["mean"] < every["mean"]


def one_by_one(llama, window, count, selector=None):
    """Reads all but the last `count` tokens of a window densely, the others one at a time -> their
    logits [count, V], and 64 greedy tokens behind them."""
    start = len(window) - count
    cache = llama.new_cache(1, len(window) + 64)
    llama.prefill(window[None, :start], cache, selector and selector.watch)
    logits = torch.cat([llama.decode(token.view(1, 1), cache, selector)[0]
                        for token in window[start:]])
    text = [logits[-1].argmax()]
    while len(text) < 64:
        text.append(llama.decode(text[-1].view(1, 1), cache, selector)[0, -1].argmax())
    return logits, [int(token) for token in text]


def test_agreement_is_that_of_both_models_decoding_token_by_token(small):
    llama, butler = small
    windows = torch.randint(256, (2, 300), generator=torch.manual_seed(3))
    makers = every_maker(("dense", "oracle", "butler", "h2o"), ("0.2", "400"), butler)
    results = suites.agreement(llama, windows, [260, 300], makers)["results"]
    assert {name for table in results.values() for name in table} == {"oracle", "butler", "h2o"}
    for context, name in (260, "h2o"), (300, "butler"), (300, "oracle"):
        same, kl, equal = [], [], []
        for window in windows[:, :context]:
            dense, dense_text = one_by_one(llama, window, 128)
            sparse, text = one_by_one(llama, window, 128, makers[name, "0.2"]())
            same.append((dense.argmax(-1) == sparse.argmax(-1)).double().mean().item())
            p, q = (torch.distributions.Categorical(logits=x.double())
                    for x in (dense, sparse))
            kl.append(torch.distributions.kl_divergence(p, q).mean().item())
            differ = [a != b for a, b in zip(dense_text, text, strict=True)]
            equal.append(differ.index(True) if True in differ else 64)
        for what, values in ("same token", same), ("KL", kl), ("equal text", equal):
            m = results[f"{what} @{context}"][name]
            assert m["0.2"]["mean"] == pytest.approx(sum(values) / 2, rel=1e-3), (what, name)
            assert m["0.2"]["n"] == 2
        assert 0 < sum(same) < 2 and sum(equal) < 128  # this budget changes the text
        assert results[f"same token @{context}"][name]["400"]["mean"] == 1
        assert results[f"KL @{context}"][name]["400"]["mean"] == pytest.approx(0, abs=1e-6)
        assert results[f"equal text @{context}"][name]["400"]["mean"] == 64


def test_agreement_of_reused_choices_is_measured_step_by_step(small):
    llama, butler = small
    windows = torch.randint(256, (1, 256), generator=torch.manual_seed(4))
    reused, anew = (
        suites.agreement(llama, windows, [256], makers)["results"]["KL @256"]["butler"]["0.2"]
        for makers in (every_maker(("butler",), ("0.2",), butler, interval=4),
                       every_maker(("butler",), ("0.2",), butler)))
    dense, _ = one_by_one(llama, windows[0], 128)
    interval_4 = butler.selector(0.2, interval=4)
    sparse, _ = one_by_one(llama, windows[0], 128, interval_4)
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (dense, sparse))
    expected = torch.distributions.kl_divergence(p, q).mean().item()
    assert reused["mean"] == pytest.approx(expected, rel=1e-3)
    assert anew["mean"] != pytest.approx(expected, rel=1e-3)


def table_lines(printed: str) -> dict:
    """What print_tradeoff wrote -> {(selector, budget): its numbers}; of intervals the mean."""
    lines = [re.sub(r" \[.*?\]", "", line).split() for line in printed.splitlines()]
    return {tuple(line[:2]): list(map(float, line[2:])) for line in lines
            if len(line) > 2 and line[1].replace(".", "").isdigit()}


def test_tradeoff_has_scores_agreement_times_and_bytes(folder, capsys):
    llama, tok, _ = cli.engine("plain").load(str(folder))
    butler = randomise(Butler(ButlerConfig.for_model(llama, layers_per_producer=1)))
    flags = bench.Config(suite="tradeoff", task=("coreference",), n=1, contexts=("300",),
                         selectors=("dense", "butler", "h2o"), budgets=("0.2", "64"), device="cpu")
    makers = every_maker(flags.selectors, flags.budgets, butler)
    windows = torch.randint(512, (1, 300), generator=torch.manual_seed(5))
    tasks = suites.task_documents(flags, tok, 8192)
    report = suites.tradeoff(llama, tok, windows, tasks, makers, flags)
    results, rows = report["results"], report["rows"]
    assert results["coreference"] == evaluate(llama, tok, tasks["coreference"], makers)
    agreement = suites.agreement(llama, windows, [300], makers)["results"]
    assert agreement.items() <= results.items()
    suites.print_tradeoff(report, tasks, makers)
    table = table_lines(capsys.readouterr().out)
    assert list(table) == list(makers)
    for (name, budget), row in zip(makers, rows, strict=True):
        score, *same, ms, megabytes = table[name, budget]
        assert score == round(results["coreference"][name][budget]["mean"], 3)
        if name == "dense":
            assert same == []
        else:
            assert same == [round(results["same token @300"][name][budget]["mean"], 3)]
        assert ms == round(row["ms"], 2) and megabytes == round(row["bytes"] / 1e6, 1)


@pytest.mark.parametrize("engine", ["plain", "transformers"])
def test_tradeoff_of_a_model_of_ones_own(main, folder, tmp_path, engine, capsys):
    """Random weights answer nothing; what counts is that every column is there."""
    if engine == "plain":
        llama, tok, _ = cli.engine(engine).load(str(folder))
        layers, dense_layers, token = 3, 1, 2 * 2 * 8 * 4  # 2 KV heads of size 8, float32
    else:
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        windows = ["sliding_attention", "full_attention"] * 2
        Gemma3ForCausalLM(Gemma3TextConfig(
            vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=12,
            layer_types=windows, max_position_embeddings=4096)).save_pretrained(tmp_path)
        shutil.copy(folder / "tokenizer.json", tmp_path)
        folder = tmp_path
        llama, tok, _ = cli.engine(engine).load(str(folder))
        layers, dense_layers, token = 4, 2, 2 * 2 * 8 * 4
    trained = randomise(Butler(ButlerConfig.for_model(llama, layers_per_producer=1, size=8)))
    trained.save(tmp_path / "butler.safetensors")
    report = main("bench.py", "--suite", "tradeoff", "--model", folder, "--engine", engine,
                  "--butler", tmp_path / "butler.safetensors", "--contexts", "700,900", "--n", 1,
                  "--task", "needle_prose", "--selectors", "dense,butler,recency",
                  "--budgets", "0.25,100", "--text", ROOT / "tests" / "test_suites.py")
    assert set(report["results"]) >= {"needle_prose@700", "same token @900", "KL @700"}
    weights = llama.weight_bytes()
    for row in report["rows"]:
        kept = row["kept"] * row["context"] if row["kept"] <= 1 else row["kept"]
        read = weights + token * (dense_layers * row["context"] + (layers - dense_layers) * kept)
        if row["selector"] == "butler":
            read += (layers - dense_layers) * 2 * row["context"] * (8 + 4)
        assert row["bytes"] == pytest.approx(read, abs=1)


@pytest.mark.parametrize("flags, message", [
    ({"suite": "recall", "shape": "smollm2-135m"}, "random weights: no --suite recall"),
    ({"suite": "perplexity", "shape": "smollm2-135m"}, "random weights: no --suite perplexity"),
    ({"suite": "speed", "shape": "llama-9"}, "shape 'llama-9' is none of smollm2-135m"),
    ({"suite": "speed", "shape": "smollm2-135m", "model": "x"}, "name one of them"),
    ({"suite": "drift"}, "name one above 0"),
    ({"suite": "drift", "drift": 0.2}, "the butler of this engine has no --drift"),
    ({"suite": "generation", "contexts": ("70",)}, "more than 72 tokens"),
    ({"suite": "agreement", "contexts": ("255",)}, "at least 256 tokens"),
    ({"suite": "agreement", "contexts": ("8192",)}, "8,192 tokens and 64 behind them exceed"),
    ({"suite": "tradeoff", "contexts": ("8100",), "n": 91}, "8,100 tokens and 93 behind them"),
    ({"suite": "offload", "batch": 2, "shape": "tiny"}, "--batch 1"),
])
def test_refused(in_memory, monkeypatch, flags, message):
    monkeypatch.setitem(timing.SHAPES, "tiny", tiny_config())
    with pytest.raises(UserError, match=message):
        bench.measure(bench.Config(**{"device": "cpu"} | flags))


# ---------------------------------------------------------------------------- timing


def config(monkeypatch, **flags):
    monkeypatch.setitem(timing.SHAPES, "tiny", tiny_config(context=2**20))
    return bench.Config(**{"shape": "tiny", "contexts": ("70", "90"), "budgets": ("0.5", "32"),
                           "selectors": ("dense", "butler", "oracle"), "n": 2, "device": "cpu"}
                        | flags)


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize("suite", ["speed", "attention"])
def test_rows_of_random_weights(monkeypatch, suite, engine):
    report = bench.measure(config(monkeypatch, suite=suite, engine=engine, batch=2))
    rows = {(row["context"], row["selector"], row["kept"]): row for row in report["rows"]}
    assert list(rows) == [(context, name, kept) for context in (70, 90) for name, kept in
                          (("dense", 1), ("butler", 0.5), ("butler", 32), ("oracle", 0.5),
                           ("oracle", 32))]
    for (context, _, _), row in rows.items():
        dense = rows[context, "dense", 1]
        assert row["speedup"] == pytest.approx(dense["ms"] / row["ms"])
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"])
        assert (row["suite"], row["engine"], row["shape"]) == (suite, engine, "tiny")
        assert 0 < row["bytes"] <= dense["bytes"] or row["selector"] == "butler"


def test_bytes_of_attention(monkeypatch):
    """Of layers 1 to 4, 2 KV heads of size 16: keys and values, and what is read to choose: the
    oracle's keys in 16 bits, and importance keys of 8 bits with a scale."""
    flags = {"suite": "attention", "contexts": ("80",), "budgets": ("20",)}
    rows = bench.measure(config(monkeypatch, **flags))["rows"]
    token = 2 * 16 * torch.finfo(timing.random_model(config(monkeypatch))[0].embed_tokens.weight
                                 .dtype).bits // 8
    read = {row["selector"]: row["bytes"] for row in rows}
    assert read["dense"] == 4 * 2 * 80 * token
    assert read["oracle"] == 4 * 2 * (20 * token + 80 * 2 * 16)
    assert read["butler"] == 4 * 2 * (20 * token + 80 * (32 + 4))


def test_every_form_of_dense_attention_is_attention():
    pytest.importorskip("numba")
    q, k, v = (torch.randn(2, n, s, 16) for n, s in ((4, 1), (2, 60), (2, 60)))
    expected = F.scaled_dot_product_attention(q, k[:, :, :50], v[:, :, :50], enable_gqa=True)
    for name, form in (timing.DENSE | {"compiled": timing.compiled}).items():
        assert_close(name, form(q, k, v, 50), expected, atol=1e-5)


def test_compiled_attention_to_selected_tokens():
    pytest.importorskip("numba")
    q, k, v = (torch.randn(2, n, s, 16) for n, s in ((4, 1), (2, 60), (2, 60)))
    index = torch.rand(2, 2, 1, 50).topk(9).indices.int()
    index[0, 1, 0, 4] = -1
    expected = sparse_decode(q[:, :, 0], k, v, index[:, :, 0])
    assert_close("compiled", timing.compiled(q, k, v, 50, index)[:, :, 0], expected, atol=1e-5)


def test_a_filled_cache_is_known_to_those_who_watch(small):
    """The same selection as that of a selector which sees the keys only when it decodes."""
    llama, butler = small
    cache = llama.new_cache(1, 100)
    seen, late = butler.selector(20), butler.selector(20)
    timing.fill(llama, cache, 90, [seen, None])
    assert cache.size == 90 and min(k[:, :, :90].std() for k in cache.k) > 0.9
    for selector in seen, late:
        cache.truncate(90)
        llama.decode(torch.tensor([[1]]), cache, selector)
    assert seen.keys[1].shape[2] == 91
    for layer in 1, 2:
        assert torch.equal(seen.index[layer], late.index[layer])


@pytest.mark.parametrize("drift, names", [
    (0.0, ["butler", "dense", "butler, in memory", "dense, in memory"]),
    (0.2, ["butler", "dense", "butler, drift 0.2", "butler, in memory", "dense, in memory"])])
def test_rows_of_an_offloaded_cache(monkeypatch, drift, names):
    pytest.importorskip("numba")
    rows = bench.measure(config(monkeypatch, suite="offload", engine="fast", contexts=("80",),
                                budgets=("30",), drift=drift))["rows"]
    assert [row["selector"] for row in rows] == names
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[1]["ms"] / row["ms"])
        assert row["cache_bytes"] == 80 * 5 * 2 * 2 * 16 * 4 and row["limit_bytes"] is None
        assert row["kept"] == (1 if "dense" in row["selector"] else 30)


def test_tokens_of_a_walk_resemble_their_neighbours():
    weight = torch.randn(50, 4096, generator=torch.manual_seed(0))
    timing.walk(weight, 20)
    near = F.cosine_similarity(weight[:-1], weight[1:])
    assert near[:19].min() > 0.85 and near[19:].abs().max() < 0.1
    assert weight.std() == pytest.approx(1, abs=0.02)


def test_shape_of_a_config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48}))
    expected = tiny_config(vocab_size=64, width=32, layers=3, head_dim=8, mlp_width=48)
    assert timing.shape_of(str(path)) == replace(expected, context=timing.LONGEST)
    path.write_text("[]")
    with pytest.raises(UserError, match="no config.json"):
        timing.shape_of(str(path))


def test_a_limit_that_cannot_be_set_leaves_nothing_behind():
    with pytest.raises(UserError, match="--memory needs"), timing.memory_limit(-7):
        pass
    for parent in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
        assert not Path(parent, f"tokenbutler-{os.getpid()}").exists()


def test_a_process_returns_to_the_group_that_it_came_from(tmp_path):
    version_1, version_2 = "5:devices:/\n4:memory:/a/b\n0::/\n", "0::/a/b\n"
    for parent, listed in ("memory", version_1), ("cgroup", version_2):
        root = tmp_path / parent
        (root / "a/b").mkdir(parents=True)
        assert timing.own_group(root, listed) == root / "a/b"
        assert timing.own_group(root, listed.replace("a/b", "hidden")) == root
