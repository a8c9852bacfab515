"""bench.py's measures against slow, independent ways to the same number."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, randomise
from test_scripts import script
from test_speed import TINY

import bench
from baselines import BASELINES, NAMES, make_selector
from butler import Butler, ButlerConfig, load_for
from common.cli import parse, processor
from common.errors import UsageError
from measure import speed
from measure.probe import Probe, mean
from model import Llama
from tasks.coreference import coreference_documents
from tasks.evaluation import at_contexts


@pytest.fixture(scope="module")
def setting(llama, tok):
    config = bench.Config(n=2, length=64, budgets=("0.5",), selectors=("dense", "oracle", "butler"))
    return bench.Bench(llama, tok, [load_for(llama)], config)


def test_masked_perplexity_is_that_of_the_text_decoded_token_by_token(setting, tok):
    """Of a small model; that the real one's blocks are its steps is test_butler.py's."""
    llama = randomise(Llama(replace(TINY, vocab_size=tok.vocab_size)))
    setting = replace(setting, llama=llama, config=replace(setting.config, n=1),
                      butlers=[Butler(ButlerConfig.for_model(llama, stride=1)).eval()])
    (window,) = setting.windows(64)
    report = bench.perplexity(setting)["results"]["perplexity"]
    for name in ("dense", "oracle", "butler"):
        cache = setting.llama.new_cache(1, 64)
        selector = make_selector(name, 0.5, setting.butlers[0])
        logits = torch.cat([setting.llama.decode(t.view(1, 1), cache, selector)
                            for t in window], dim=1)
        (m,) = report[name].values()
        loss = F.cross_entropy(logits[0, :-1], window[1:]).item()
        assert m["mean"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_length_is_what_decoding_the_end_of_a_text_gives(setting, tok):
    llama = randomise(Llama(replace(TINY, vocab_size=tok.vocab_size)))
    setting = replace(setting, llama=llama,
                      config=replace(setting.config, n=2, contexts=("300", "256")),
                      butlers=[Butler(ButlerConfig.for_model(llama, stride=1)).eval()])
    results = bench.length(setting)["results"]
    for context in (256, 300):
        for name in ("dense", "oracle", "butler"):
            kept, losses = [], []
            for window in setting.windows(300):
                cache = llama.new_cache(1, context)
                selector = make_selector(name, 0.5, setting.butlers[0])
                probe = Probe(selector) if selector else None
                llama.prefill(window[None, : context - 32], cache)
                logits = []
                for token in window[context - 32 : context]:
                    logits.append(llama.decode(token.view(1, 1), cache, probe))
                    kept.append(mean(probe.mass) if probe else 1.0)
                losses.append(F.cross_entropy(torch.cat(logits, 1)[0, :-1],
                                              window[context - 31 : context]).item())
            (m,) = results[f"kept @{context}"][name].values()
            assert m["mean"] == pytest.approx(sum(kept) / len(kept), rel=1e-3) and m["n"] == 2
            (m,) = results[f"perplexity @{context}"][name].values()
            assert m["mean"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-3)
    assert 0 < results["kept of oracle @256"]["butler"]["0.5"]["mean"] < 1


def test_over_oracle_is_the_ratio_of_perplexities(setting):
    results = bench.perplexity(setting)["results"]
    ratio = (results["perplexity"]["butler"]["0.5"]["mean"]
             / results["perplexity"]["oracle"]["0.5"]["mean"])
    assert results["over_oracle"]["butler"]["0.5"]["mean"] == pytest.approx(ratio - 1, abs=1e-6)
    assert "oracle" not in results["over_oracle"]


def test_recall_of_the_oracle_is_a_bound_and_its_order_perfect(setting):
    report = bench.recall(setting)
    mass, rho = report["results"]["mass"], report["results"]["spearman"]
    assert 0 < mass["butler"]["0.5"]["mean"] < mass["oracle"]["0.5"]["mean"] < 1
    assert rho["oracle"]["0.5"]["mean"] > 0.999 > rho["butler"]["0.5"]["mean"] > 0.3
    assert len(report["layers"]["error"]["butler"]["0.5"]) == setting.llama.config.layers - 1


def test_repeated_counts_8_grams():
    assert bench.repeated(list(range(50))) == 0
    assert bench.repeated([1] * 50) == 1 - 1 / 43
    assert bench.repeated(list(range(20)) * 2) == pytest.approx(13 / 33)


def test_drift_suite(main):
    report = main("bench.py", "--suite", "drift", "--n", "1", "--task", "coreference,copy",
                  "--contexts", "600,700", "--budgets", "0.2", "--selectors", "dense,butler",
                  "--drifts", "0,0.2,2")
    assert set(report["results"]) == {"coreference", "copy@600", "copy@700"}
    for name, rows in report["results"].items():
        assert list(rows) == ["dense", "butler, drift 0", "butler, drift 0.2", "butler, drift 2"]
        steps = report["steps between choices"][name]
        assert 1 < steps["butler, drift 0.2, 0.2"] < steps["butler, drift 2, 0.2"] <= 16


def test_tradeoff_suite_has_the_scores_of_synth_task_and_a_time_for_each(main):
    flags = ("--task", "coreference", "--n", "1", "--selectors", "dense,oracle,butler,h2o,recency",
             "--budgets", "0.3,64")
    table = main("bench.py", "--suite", "tradeoff", *flags)["results"]["coreference"]
    scores = main("synth_task.py", *flags)["results"]["coreference"]
    assert {name: list(by) for name, by in table.items()} == {
        name: list(by) for name, by in scores.items()}
    for name, by in table.items():
        for budget, m in by.items():
            assert 0 < m.pop("ms") < 1e5 and m == scores[name][budget]
    assert table["dense"]["1.0"]["mean"] == 1 > table["h2o"]["64"]["mean"]


def test_a_step_that_is_timed_again_and_again_is_the_first_one(tok, monkeypatch):
    """Behind the document's own context, whoever has written into the cache before."""
    llama = randomise(Llama(replace(TINY, vocab_size=tok.vocab_size)))
    butler = Butler(ButlerConfig.for_model(llama, stride=1)).eval()
    document, seen = coreference_documents("test", 1, seed=0, words=90)[0], {}

    def stepper(llama, cache, selector=None):
        def step(token):
            seen.setdefault((selector, cache), []).append(llama.decode(token, cache, selector))
        return step

    monkeypatch.setattr(speed, "stepper", stepper)
    makers = [(name, "0.3", [partial(make_selector, name, 0.3, butler)]) for name in NAMES]
    ms = speed.behind(llama, tok, document, makers, 2)
    assert list(ms) == [(name, "0.3") for name in NAMES] and min(ms.values()) > 0
    prompt, question = (torch.tensor([tok.encode(text)])
                        for text in (document.context, document.question))
    for (selector, cache), logits in seen.items():
        name = next((n for n, kind in BASELINES.items() if type(selector) is kind), "butler")
        fresh = make_selector(name, 0.3, butler) if selector else None
        alone = llama.new_cache(1, prompt.shape[1] + 1, cache.k[0].dtype)
        llama.prefill(prompt, alone, fresh and fresh.watch)
        expected = llama.decode(question[:, :1], alone, fresh)
        assert len(logits) == 4  # plain, warm-up, two rounds
        for step in logits[:1] if name == "random" else logits:
            atol = 1e-4 if cache.k[0].dtype == torch.float32 else 0.05
            assert_close(f"{name}, {cache.k[0].dtype}", step, expected, atol)
    assert len(seen) == 1 + len(NAMES)  # dense in two formats


def test_a_context_too_short_for_a_task_is_told(llama, tok):
    documents = at_contexts(llama, tok, ("coreference", "copy"), ("400", "500"), 2, 0)
    assert {name: len(d) for name, d in documents.items()} == {
        "coreference": 2, "copy@400": 2, "copy@500": 2}
    with pytest.raises(UsageError, match="20 tokens are too few"):
        at_contexts(llama, tok, ("copy",), ("20",), 1, 0)


def test_tradeoff_looks_at_one_task_and_length_unless_told_otherwise():
    told = parse(bench.Config, ["--suite", "tradeoff"])
    assert (told.task, told.contexts) == (("needle_prose",), ("4096",))
    assert bench.Config(suite="tradeoff").task == ("needle_prose",)
    assert bench.Config(suite="tradeoff").contexts == ("4096",)
    assert bench.Config(suite="tradeoff", contexts=("512",)).contexts == ("512",)
    assert bench.Config(suite="drift").task == ("coreference", "needle_prose", "copy")
    assert bench.Config(suite="speed").contexts == ("512", "2048", "8000")


@pytest.mark.parametrize("suite, selectors", [
    ("perplexity", ",".join(n for n in NAMES if n != "snapkv")),
    ("generation", "dense,butler")])
def test_suites_run(main, suite, selectors):
    report = main("bench.py", "--suite", suite, "--selectors", selectors, "--n", "1", "--length",
                  "64", "--budgets", "0.5")
    for table in report["results"].values():
        for by in table.values():
            for m in by.values():
                assert math.isfinite(m["mean"]) and m["n"] == 1


def test_the_script(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48,
             "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    done = script("bench.py", "--suite", "speed", "--shape", tmp_path / "config.json",
                  "--contexts", "70", "--budgets", "32", "--n", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert {r["context"] for r in report["rows"]} == {70}
    assert report["config"]["suite"] == "speed" and report["commit"]


@pytest.mark.slow
def test_what_compare_writes_stands_in_the_tables(tmp_path):
    for part in ("*.py", "*/*.py", "README.md", "results/*", "checkpoints/*", "tasks/*.json"):
        for path in ROOT.glob(part):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            if path.is_file():
                shutil.copy(path, tmp_path / path.relative_to(ROOT))
    name, readme = f"compare_{processor()}", tmp_path / "results" / "README.md"
    readme.write_text(readme.read_text().replace("compare_avx2", name))  # any processor's
    done = subprocess.run([sys.executable, "results/compare.py", "--contexts", "32", "--n", "1",
                           "--write"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"]
    assert rows and {row["context"] for row in rows} == {32}
    table = done.stdout.split("\n\n")[0]
    assert table.count("\n") == len(rows) and table in readme.read_text()
