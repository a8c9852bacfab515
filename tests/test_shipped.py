"""The shipped butler reproduces its golden numbers: released weights, released results."""

import json
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from baselines import make_selector
from butler import SHIPPED, load_for
from measure.probe import at_lengths
from tasks.coreference import coreference_documents
from tasks.corpus import hold_out
from tasks.evaluation import evaluate
from train import distillation, record

GOLDEN_KL = 0.034799
GOLDEN_TEXT = " Pellorqua."
RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(scope="module")
def butler(llama):
    return load_for(llama)


def test_its_size_is_at_most_a_hundredth_or_so(llama, butler):
    share = sum(p.numel() for p in butler.parameters()) / sum(p.numel() for p in llama.parameters())
    assert share <= 0.01
    assert SHIPPED.stat().st_size < 8e6


def test_golden_divergence(llama, tok, butler):
    """KL of each layer's mean on one co-reference document, every fourth row, float32."""
    ids = torch.tensor([tok.encode(coreference_documents("test", 1, seed=1)[0].text)])
    kl = distillation(butler, record(llama, ids, torch.arange(3, ids.shape[1], 4)))
    assert kl.mean().item() == pytest.approx(GOLDEN_KL, rel=2e-3)


def test_golden_text(llama, tok, butler):
    """Greedy text behind a question, a tenth of the tokens attended."""
    document = coreference_documents("test", 1, seed=0)[0]
    ids = torch.tensor([tok.encode(document.context + document.question)])
    cache, selector = llama.new_cache(1, ids.shape[1] + 4), butler.selector(0.1)
    llama.prefill(ids[:, :-1], cache)
    token, written = ids[:, -1:], []
    for _ in tok.encode(GOLDEN_TEXT):
        token = llama.decode(token, cache, selector)[:, -1:].argmax(-1)
        written.append(int(token))
    assert tok.decode(written) == GOLDEN_TEXT


def test_near_the_oracle_where_recency_fails(fast, tok, butler):
    documents = coreference_documents("test", 8, seed=2)
    names = ("dense", "oracle", "butler", "recency")
    scores = evaluate(fast, tok, documents, names, ("0.1",), [butler])
    count = {name: sum(next(iter(by.values()))[0]) for name, by in scores.items()}
    assert count["butler"] >= count["dense"] - 1
    assert count["recency"] <= 1


def test_near_the_oracle_at_the_end_of_4096_tokens(llama, tok, butler):
    """Of held-out prose: the share of the attention kept, and what recency keeps."""
    ids = tok.encode("\n\n".join(hold_out(topics)[1]))[:4096]
    makers = {name: partial(make_selector, name, 0.1, butler)
              for name in ("oracle", "butler", "recency")}
    kept = {name: mass for _, name, mass, _ in at_lengths(
        llama, torch.tensor(ids), [4096], makers)}
    assert kept["butler"] > 0.96 * kept["oracle"] and kept["recency"] < 0.85 * kept["oracle"]


@pytest.mark.slow
def test_the_claim_on_a_hundred_documents(llama, tok, butler):
    """Co-reference, question-sparse, 10 % of all tokens, 100 documents that no result has used."""
    documents = coreference_documents("test", 100, seed=12)
    names = ("dense", "butler", "recency", "random")
    scores = evaluate(llama, tok, documents, names, ("0.1",), [butler])
    share = {name: sum(next(iter(by.values()))[0]) / 100 for name, by in scores.items()}
    assert share["butler"] >= share["dense"] - 0.05
    assert share["recency"] < 0.1 and share["random"] < 0.1


def test_the_recorded_run_is_that_of_the_checkpoint():
    from safetensors import safe_open

    report = json.loads((RESULTS / "train.json").read_text())
    with safe_open(SHIPPED, framework="pt") as f:
        extra = json.loads(f.metadata()["extra"])
    assert extra["kl"] == report["kl"] and extra["config"]["seed"] == report["config"]["seed"]
    assert report["peak_memory_gb"] <= 6


def test_the_default_run_is_short_and_nearly_as_good():
    """As README.md shows it: minutes on two cores without AVX-512, and near the oracle."""
    report = json.loads((RESULTS / "train_default.json").read_text())
    assert report["command"] == "python train.py --report results/train_default.json"
    assert report["seconds"] <= 900 and report["peak_memory_gb"] <= 6
    for context, most in report["table"]["oracle"]["kept"].items():
        kept = report["table"]["butler"]["kept"][context]
        assert kept["n"] >= 20 and kept["mean"] >= 0.95 * most["mean"], context
