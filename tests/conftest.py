"""What the tests share: the default model, a tiny one, and an assertion that says how far off."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels then run in the interpreter, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

import cli
import tokenizer
from model import Config, Llama

ROOT = Path(__file__).parent.parent
torch.set_num_threads(min(2, torch.get_num_threads()))


def assert_close(name, actual, expected, atol):
    """Fails with the name, the largest error and the RMS of the error over that of `expected`."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    error = actual - expected
    worst = error.abs().max().item()
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
    """The default model; downloaded on first use, then in the user's cache folder."""
    return tokenizer.resolve()


@pytest.fixture(scope="session")
def llama(model_path):
    """The default model, plain, in float32."""
    return Llama.from_pretrained(model_path)


@pytest.fixture(scope="session")
def tok(model_path):
    return tokenizer.load(model_path)


@pytest.fixture(scope="session")
def butler(llama):
    """The shipped butler."""
    from butler import load_for

    return load_for(llama)


@pytest.fixture
def in_memory(model_path, llama, tok, monkeypatch):
    """Whoever reads the default model or its tokenizer gets the one that has been read."""
    read_model, read_tokenizer = Llama.from_pretrained, tokenizer.load

    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        same = (cls, path, dtype, device) == (Llama, model_path, torch.float32, "cpu")
        return llama if same else read_model.__func__(cls, path, dtype, device)

    def load(path, vocab_size=None):
        return tok if path == model_path else read_tokenizer(path, vocab_size)

    monkeypatch.setattr(Llama, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(tokenizer, "load", load)


@pytest.fixture
def main(in_memory, capsys, monkeypatch):
    """main("bench.py", "--n", 1): the script runs in this process -> its last line, parsed."""
    def main(script, *arguments):
        path = str(ROOT / script)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        script = runpy.run_path(path)
        cli.run(script["main"], script["Config"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def tiny_config(**changes):
    sizes = {"vocab_size": 256, "width": 64, "layers": 5, "heads": 4, "kv_heads": 2,
             "head_dim": 16, "mlp_width": 128}
    return Config(**sizes | changes)


@pytest.fixture(scope="session")
def tiny():
    """A small random Llama with grouped heads: 5 layers, 4 query heads over 2 KV heads."""
    return randomise(Llama(tiny_config()))


@pytest.fixture(scope="session")
def tiny_butler(tiny):
    """An untrained butler for it: producers at layers 0 and 2 serve two layers each."""
    from butler import Butler, ButlerConfig

    torch.manual_seed(3)
    config = ButlerConfig.for_model(tiny, layers_per_producer=2, size=8, hidden=16)
    return Butler(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder as Hugging Face writes them: a random Llama of 3 layers, a vocabulary of 512."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    built.train([str(ROOT / "LICENSE")], trainer)
    built.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        max_position_embeddings=8192)).save_pretrained(path)
    return path
