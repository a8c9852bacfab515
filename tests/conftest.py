"""What the tests share: the default model, a tiny one, and an assertion that says how far."""

import json
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # kernel.py's Triton then runs in the interpreter, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

import cli
import fetch
import tokenizer
import weights
from model import Llama

torch.set_num_threads(min(2, torch.get_num_threads()))
MEASURED = {}  # test -> what its assertions measured, for `--record FILE`


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write the errors measured to a JSON file")


def pytest_sessionfinish(session):
    if path := session.config.getoption("--record"):
        report = cli.provenance() | {"max_error": MEASURED}
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def assert_close(name, actual, expected, atol):
    """Fails with the name, the largest error and the RMS of the error over that of `expected`."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    error = actual - expected
    worst = error.abs().max().item()
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
    MEASURED.setdefault(test, {})[name] = worst
    ratio = (error.square().mean() / expected.square().mean()).sqrt().item()
    assert worst <= atol, f"{name}: max error {worst:.3e} > {atol:g}, RMS ratio {ratio:.3e}"


def randomise(module, seed=0):
    """Weights that make every part count: no zero bias, no unit norm, logits of a few units."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(generator=rng).mul_(0.15)
            if "norm" in name:
                p.add_(1)
            if "embed" in name or "lm_head" in name:
                p.mul_(2)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model_path():
    """The default model; fetched on first use, then in the user's cache directory."""
    return fetch.resolve()


@pytest.fixture(scope="session")
def llama(model_path):
    """The default model in float32."""
    return Llama.from_pretrained(model_path)


@pytest.fixture(scope="session")
def tok(model_path):
    return tokenizer.load(model_path)


def tiny_llama():
    config = weights.Config(
        vocab_size=256, width=64, layers=5, heads=4, kv_heads=2, head_dim=16, mlp_width=128)
    return randomise(Llama(config))


@pytest.fixture(scope="session")
def tiny():
    """A small random Llama with grouped heads: 5 layers, 4 query heads over 2 KV heads."""
    return tiny_llama()
