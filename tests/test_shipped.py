"""The shipped butler reproduces its golden numbers: released weights, released results."""

import json
from pydoc_data.topics import topics

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from bench import kept_at_lengths
from butler import SHIPPED
from data import evenly_spaced, hold_out
from synth_task import answers, coreference_documents, every_maker
from train import distillation, record

GOLDEN_KL = 0.034799


def test_it_has_at_most_a_hundredth_of_the_models_parameters(llama, butler):
    count = {module: sum(p.numel() for p in module.parameters()) for module in (llama, butler)}
    assert count[butler] <= 0.01 * count[llama]
    assert SHIPPED.stat().st_size < 8e6


def test_golden_divergence(llama, tok, butler):
    """The mean KL of all layers on one co-reference document, every fourth row, float32."""
    document = coreference_documents("test", 1, seed=1)[0]
    text = f"{document.context}{document.question} {document.answer}"
    ids = torch.tensor([tok.encode(text)])
    kl = distillation(butler, record(llama, ids, torch.arange(3, ids.shape[1], 4)))
    assert kl.mean().item() == pytest.approx(GOLDEN_KL, rel=2e-3)


@pytest.mark.parametrize("n", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_near_the_oracle_at_512_and_4096_tokens_of_unseen_prose(llama, tok, butler, n):
    """Shares of the attention kept by a tenth of the tokens, at the end of the text."""
    windows = evenly_spaced(tok, "\n\n".join(hold_out(topics)[1]), n, 4096)
    makers = every_maker(("oracle", "butler", "recency"), ("0.1",), butler)
    shares = {}
    for window in windows:
        for context, (name, _), probe, _ in kept_at_lengths(llama, window, [512, 4096], makers):
            shares.setdefault((name, context), []).append(probe.mean())
    mean = {key: sum(values) / n for key, values in shares.items()}
    print(mean)
    for context in (512, 4096):
        oracle = mean["oracle", context]
        assert mean["butler", context] > 0.95 * oracle
        assert mean["recency", context] < 0.88 * oracle


@pytest.mark.parametrize("n, seed, slack", [
    (8, 2, 1), pytest.param(100, 12, 5, marks=pytest.mark.slow)])
def test_right_answers_at_a_tenth_where_recency_fails(llama, tok, butler, n, seed, slack):
    """Co-reference documents that no recorded result is of."""
    names = ("dense", "butler", "recency")
    makers = every_maker(names, ("0.1",), butler)
    scores = [answers(llama, tok, document, makers.values())
              for document in coreference_documents("test", n, seed)]
    right = dict(zip(names, map(sum, zip(*scores, strict=True)), strict=True))
    print(right)
    assert right["dense"] >= 0.8 * n
    assert right["butler"] >= right["dense"] - slack
    assert right["recency"] <= 0.1 * n + 1


def test_the_recorded_run_is_that_of_the_checkpoint(butler):
    report = json.loads((ROOT / "results" / "train.json").read_text())
    with safe_open(SHIPPED, framework="pt") as f:
        extra = json.loads(f.metadata()["extra"])
    assert extra["kl"] == report["kl"] and extra["config"]["seed"] == report["config"]["seed"]
    assert report["parameters"] == sum(p.numel() for p in butler.parameters())
    assert report.get("fingerprint", butler.config.fingerprint) == butler.config.fingerprint
