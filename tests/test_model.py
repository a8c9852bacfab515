"""model.py against transformers, the gguf package and golden logits; damaged files in one line."""

import json
import math
import os

import gguf
import numpy as np
import pytest
import torch
from conftest import assert_close, randomise, tiny_config
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cli import UserError
from kernel import true_attention
from model import Llama

PROSE = """The capital of France is a city that many people want to visit at least once in their
life. In 1969, 2 men walked on the Moon; 12 have done so. The next 3 missions will"""
CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +"


def tokens(batch, length, vocab=96, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def small(**changes):
    """A random Llama of transformers: 3 layers, 4 query heads over 2 KV heads of size 16."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return randomise(LlamaForCausalLM(LlamaConfig(**sizes | changes)))


@pytest.fixture
def hf(tmp_path):
    """A model of transformers, and its folder in tmp_path / "model"."""
    hf = small()
    hf.save_pretrained(tmp_path / "model")
    return hf


@pytest.fixture
def ours(hf, tmp_path):
    return Llama.from_pretrained(tmp_path / "model")


# ---------------------------------------------------------------------------- the default model


def test_golden_logits_of_the_default_model(llama, tok):
    ids = tok.encode(PROSE)[:13]
    assert ids == [504, 3575, 282, 4649, 314, 253, 2240, 338, 800, 701, 1277, 288, 3048]
    logits = llama(torch.tensor([ids]))[0]
    golden = torch.tensor([12.2700, 7.3171, 12.7062, 6.6286, 5.6265, 6.1885])
    assert_close("first logits of the last token", logits[-1, :6], golden, 1e-3)
    assert_close("token 1000 after token 3", logits[3, 1000], torch.tensor(11.3436), 1e-3)
    assert_close("mean of all", logits.mean(), torch.tensor(4.2812), 1e-3)
    assert logits[-1].argmax() == 30  # a full stop
    assert sum(p.numel() for p in llama.parameters()) == 134_515_008


@pytest.mark.slow
def test_default_model_equals_transformers(llama, tok, model_path, tmp_path):
    """transformers reads the same GGUF file with code of its own; then we read its safetensors."""
    read = LlamaForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32)
    del read.config.quantization_config
    reference = LlamaForCausalLM(read.config).eval()  # one that can be saved
    reference.load_state_dict(read.state_dict())
    reference.save_pretrained(tmp_path, max_shard_size="200MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    folder = Llama.from_pretrained(tmp_path)
    for name, x in [("prose", torch.tensor([tok.encode(PROSE)])),
                    ("code", torch.tensor([tok.encode(CODE)])),
                    ("random tokens", tokens(1, 200, 49152))]:
        with torch.no_grad():
            expected = reference(x).logits
        assert_close(f"GGUF, {name}", llama(x), expected, 1e-3)
        assert_close(f"folder, {name}", folder(x), expected, 1e-3)


# ---------------------------------------------------------------------------- families, in folders

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
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


def edit(folder, drop=(), **changes):
    """Changes entries of config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_equals_transformers(tmp_path, family):
    hf = small(**FAMILIES[family])
    hf.save_pretrained(tmp_path)
    x = tokens(2, 100)  # longer than llama3's original context
    expected = hf(x).logits
    assert expected.std() > 0.5  # degenerate logits would prove nothing
    ours = Llama.from_pretrained(tmp_path)
    assert_close(family, ours(x), expected, 1e-4)
    numbers = sum(p.numel() for p in ours.parameters())
    assert numbers == hf.num_parameters()  # tied weights are counted once
    embedding = 0 if hf.config.tie_word_embeddings else ours.embed_tokens.weight.numel()
    assert ours.weight_bytes() == 4 * (numbers - embedding)
    # config.json as it was written until 2025
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for key in "type", "rope_type":
        scaling = None if kind == "default" else {key: kind} | rope
        edit(tmp_path, ["rope_parameters"], rope_theta=theta, rope_scaling=scaling)
        assert_close(f"{family}, {key}", Llama.from_pretrained(tmp_path)(x), expected, 1e-4)


def test_files_of_llama_1_lack_newer_entries(tmp_path):
    hf = small(num_key_value_heads=4, rms_norm_eps=1e-6)
    hf.save_pretrained(tmp_path)
    edit(tmp_path, ["num_key_value_heads", "head_dim", "rope_parameters", "attention_bias",
                    "mlp_bias", "tie_word_embeddings", "rms_norm_eps", "hidden_act"],
         sliding_window=None)
    state = load_file(tmp_path / "model.safetensors")
    for i in range(3):  # they carry the rotary frequencies
        state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "model.safetensors")
    x = tokens(2, 50)
    assert_close("logits", Llama.from_pretrained(tmp_path)(x), hf(x).logits, 1e-4)


def test_shards_and_dtypes(hf, tmp_path):
    x = tokens(1, 9)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_close("shards", Llama.from_pretrained(tmp_path / "shards")(x), hf(x).logits, 1e-4)
    half = Llama.from_pretrained(tmp_path / "model", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.new_cache(1, 4).k[0].dtype == torch.bfloat16
    assert_close("bfloat16", half(x), hf(x).logits, 0.05 * hf(x).logits.abs().max())


def test_a_head_in_the_file_counts_more_than_tie_word_embeddings(hf, tmp_path):
    edit(tmp_path / "model", tie_word_embeddings=True)
    x = tokens(1, 20)
    assert_close("logits", Llama.from_pretrained(tmp_path / "model")(x), hf(x).logits, 1e-4)


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
    """The order of q and k rows in llama.cpp's files (its convert_hf_to_gguf.py)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, hf, kind=Type.F32, extra=(), entries=(), arch="llama", skip=()):
    """Writes a model of transformers as llama.cpp would, and rounds its matrices to what the type
    can express. entries: changed header entries, None leaves out; extra: more tensors."""
    c = hf.config
    w = gguf.GGUFWriter(path, arch)
    entries = {
        "block_count": c.num_hidden_layers, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "context_length": c.max_position_embeddings,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    } | dict(entries)
    add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
    for key, value in entries.items():
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    for name, p in hf.named_parameters():
        if gguf_name(name) in skip:
            continue
        stored, stored_kind = p.numpy(), Type.F32
        if p.dim() == 2:
            stored, stored_kind = gguf.quants.quantize(p.numpy(), kind), kind
            p.copy_(torch.from_numpy(gguf.dequantize(stored, kind).copy()))
        if "q_proj" in name or "k_proj" in name:
            stored = permute(stored, c.num_attention_heads if "q_proj" in name
                             else c.num_key_value_heads)
        w.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind)
    for name, tensor in dict(extra).items():
        w.add_tensor(name, tensor)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def assert_loads_as(path, hf):
    ours = Llama.from_pretrained(path)
    for name, p in ours.named_parameters():
        expected = hf.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        assert torch.equal(p, expected), f"{name} differs"
    x = tokens(2, 100)
    expected = hf(x).logits
    assert expected.std() > 0.1
    assert_close(path.name, ours(x), expected, 1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_types(tmp_path, kind, tied):
    hf = small(tie_word_embeddings=tied)
    assert_loads_as(write_gguf(tmp_path / f"{kind}.gguf", hf, Type[kind]), hf)


@pytest.mark.parametrize("family", ["mha", "head_dim", "attention_bias", "mlp_bias", "theta"])
def test_gguf_families(tmp_path, family):
    hf = small(**FAMILIES[family])
    assert_loads_as(write_gguf(tmp_path / f"{family}.gguf", hf), hf)


@pytest.mark.parametrize("entries", [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                                     {"rope.scaling.factor": 4.0}])
def test_gguf_linear_scaling(tmp_path, entries):
    hf = small(rope_parameters=LINEAR)
    assert_loads_as(write_gguf(tmp_path / "linear.gguf", hf, entries=entries), hf)


def test_gguf_rope_freqs(tmp_path):
    """llama.cpp stores the llama3 scaling as one divisor per frequency."""
    hf = small(rope_parameters=LLAMA3)
    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / hf.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 2
    extra = {"rope_freqs.weight": divisors}
    assert_loads_as(write_gguf(tmp_path / "llama3.gguf", hf, extra=extra), hf)


# ---------------------------------------------------------------------------- refusals


def refused(path, *words):
    """Loading `path` ends in one line that contains the path and all `words`."""
    with pytest.raises(UserError) as caught:
        Llama.from_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    assert all(str(word) in message for word in words), f"{words} not all in: {message}"


@pytest.mark.parametrize("word, changes", [
    ("mistral", {"model_type": "mistral"}),
    ("model_type None", {"model_type": None}),
    ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
    ("dynamic", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("sliding window", {"sliding_window": 128}),
    ("gelu", {"hidden_act": "gelu"}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("num_hidden_layers", {"num_hidden_layers": None}),
    ("sizes", {"vocab_size": 2**60}),
    ("sizes", {"num_hidden_layers": 20_000}),
    ("sizes", {"num_key_value_heads": 0}),
    ("cannot share", {"num_key_value_heads": 3}),
    ("cannot share", {"head_dim": 15}),
    ("", {"rope_parameters": {"rope_type": "linear"}}),
    ("rope_parameters", {"rope_parameters": [1]}),
    ("{'layers': 3.0}", {"num_hidden_layers": 3.0}),
    ("{'heads': '4'}", {"num_attention_heads": "4", "head_dim": None}),
    ("{'heads': 0}", {"num_attention_heads": 0, "head_dim": None}),
    ("{'context': 0}", {"max_position_embeddings": 0}),
    ("{'norm_eps': 0.0}", {"rms_norm_eps": 0}),
    ("{'norm_eps': nan}", {"rms_norm_eps": math.nan}),
    ("{'rope_theta': 0}", {"rope_parameters": {"rope_theta": 0}}),
    ("{'rope_theta': inf}", {"rope_parameters": {"rope_theta": math.inf}}),
    ("{'rope_theta': '500'}", {"rope_parameters": {"rope_theta": "500"}}),
    ("{'factor': -2}", {"rope_parameters": LINEAR | {"factor": -2}}),
    ("rotary frequencies", {"rope_parameters": {"rope_theta": 1e-300}}),
], ids=str)
def test_configurations_that_are_refused(hf, tmp_path, word, changes):
    edit(tmp_path / "model", **changes)
    refused(tmp_path / "model", word)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\0", "[" * 100_000, "\xff\xfe"],
                         ids=lambda text: repr(text[:4]))
def test_config_that_is_no_configuration(hf, tmp_path, text):
    (tmp_path / "model" / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_encodings_of_json(hf, tmp_path, name):
    folder = tmp_path / "shards"
    hf.save_pretrained(folder, max_shard_size="20KB")
    text = (folder / name).read_text()
    (folder / name).write_text(text, "utf-8-sig")
    x = tokens(1, 9)
    assert_close("logits", Llama.from_pretrained(folder)(x), hf(x).logits, 1e-4)
    (folder / name).write_text(text, "utf-16")
    refused(folder, f"unusable model: {name}: ")
    (folder / name).write_text(text[:-9])
    refused(folder, f"unusable model: {name}: ")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
SHARD = "model-00002-of-00017.safetensors"


@pytest.mark.parametrize("word, change", [
    (f"{SHARD}: it is a pointer of git-lfs", lambda folder: (folder / SHARD).write_text(POINTER)),
    ("config.json: it is a pointer", lambda folder: (folder / "config.json").write_text(POINTER)),
    (f"1 of 17 weight files are missing: fetch {SHARD}", lambda folder: (folder / SHARD).unlink()),
    (f"{SHARD}.part is an unfinished download",
     lambda folder: (folder / SHARD).rename(folder / f"{SHARD}.part")),
    (f"{SHARD}.aria2 is an unfinished download",
     lambda folder: (folder / f"{SHARD}.aria2").touch()),
    (f"{SHARD}: ", lambda folder: os.truncate(folder / SHARD, 3000)),
    ("adapter_config.json belongs to a LoRA adapter",
     lambda folder: (folder / "adapter_config.json").touch()),
    ("adapter_model.safetensors belongs to a LoRA adapter",
     lambda folder: (folder / "adapter_model.safetensors").touch()),
], ids=lambda word: word if isinstance(word, str) else "")
@pytest.mark.parametrize("index", [True, False])
def test_incomplete_folders(hf, tmp_path, word, change, index):
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    Llama.from_pretrained(tmp_path)
    change(tmp_path)
    refused(tmp_path, word)


@pytest.mark.parametrize("name, word", [
    ("model.safetensors.incomplete", "an unfinished download"),
    ("consolidated.safetensors", "Meta's own format"),
    ("adapter_model.safetensors", "LoRA adapter"), ("x.gguf", "name one such file")])
def test_folders_with_something_else(hf, tmp_path, name, word):
    """Beside the model's own weights Meta's do no harm."""
    folder = tmp_path / "model"
    if "consolidated" in name:
        save_file({"norm.weight": torch.ones(3)}, folder / name)
        Llama.from_pretrained(folder)
    (folder / "model.safetensors").replace(folder / name)
    refused(folder, f"{name} ", word)


def test_pipes_links_and_folders_in_place_of_files(hf, tmp_path):
    for name in "config.json", "model.safetensors":
        for make in os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path):
            path = tmp_path / "model" / name
            path.rename(tmp_path / "kept")
            make(path)
            refused(tmp_path / "model", f"unusable model: {name}: ")
            path.rmdir() if path.is_dir() else path.unlink()
            (tmp_path / "kept").rename(path)
    for name in "a\0b", "x" * 300, "\udcff":
        with pytest.raises(UserError):
            Llama.from_pretrained(name)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "lm_head.weight"])
def test_weights_that_no_training_gives_are_refused_by_name(tmp_path, name, value):
    hf = small()
    hf.get_parameter(name).view(-1)[7] = value
    hf.save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", name.removeprefix("model."), "NaN, infinite or huge")
    refused(write_gguf(tmp_path / "x.gguf", hf), name.removeprefix("model."))
    hf.get_parameter(name).view(-1)[7] = 6e4
    hf.save_pretrained(tmp_path / "model")
    assert Llama.from_pretrained(tmp_path / "model", torch.bfloat16)(tokens(1, 9)).isfinite().all()


@pytest.mark.parametrize("scale", [math.nan, math.inf, 65504])
def test_damaged_scales_of_a_gguf_are_refused_by_name(tmp_path, scale):
    path = write_gguf(tmp_path / "x.gguf", small(), Type.Q4_1)
    data = bytearray(path.read_bytes())
    at = {t.name: t.data_offset for t in gguf.GGUFReader(path).tensors}["blk.1.ffn_up.weight"]
    data[at : at + 2] = np.float16(scale).tobytes()
    path = tmp_path / "y.gguf"
    path.write_bytes(data)
    refused(path, "layers.1.mlp.up_proj.weight")


def test_missing_files_and_pickled_weights(hf, tmp_path):
    refused(tmp_path / "nowhere", "config.json")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path / "model", "pickled weights are not read")
    refused(tmp_path / "model" / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:40], lambda data: data[:-1], lambda data: data[8:],
    lambda data: (2**62).to_bytes(8, "little") + data[8:],
    lambda data: data + b"tail", lambda data: data.replace(b'"F32"', b'"X32"')])
def test_damaged_safetensors(hf, tmp_path, damage):
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path / "model")


def test_wrong_missing_and_unknown_tensors(hf, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    key = "model.layers.1.self_attn.k_proj.weight"

    def check(change, *words):
        save_file({k: v for k, v in (state | change).items() if v is not None}, file)
        refused(tmp_path / "model", *words)

    check({key: torch.zeros(64, 64)}, "layers.1.self_attn.k_proj.weight", [64, 64], [32, 64])
    check({key: None}, "layers.1.self_attn.k_proj.weight")
    check({"lm_head.weight": None}, "lm_head.weight")
    check({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}, "layers.7.mlp.up_proj.weight")
    check({"two\nlines": torch.zeros(3)}, "lines")


@pytest.mark.parametrize("word, arch, entries", [
    ("qwen2", "qwen2", {}),
    ("mixture of experts", "llama", {"expert_count": 8}),
    ("sliding window", "llama", {"attention.sliding_window": 64}),
    ("partial rotary", "llama", {"rope.dimension_count": 8}),
    ("yarn", "llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}),
    ("", "llama", {"block_count": None}),
    ("", "llama", {"attention.head_count": "many"}),
    ("sizes", "llama", {"attention.head_count_kv": [2, 2, 2]}),
    ("{'heads': 0}", "llama", {"attention.head_count": 0, "attention.key_length": None}),
    ("{'context': 16.0}", "llama", {"context_length": 16.0}),
    ("{'norm_eps': -1.0}", "llama", {"attention.layer_norm_rms_epsilon": -1.0}),
    ("{'rope_theta': inf}", "llama", {"rope.freq_base": math.inf}),
    ("", "llama", {"rope.scaling.type": "linear"}),
], ids=str)
def test_gguf_headers_that_are_refused(tmp_path, word, arch, entries):
    refused(write_gguf(tmp_path / "x.gguf", small(), arch=arch, entries=entries), word)


def test_gguf_tensors_that_are_refused(tmp_path):
    q = "blk.0.attn_q.weight"

    def check(name, extra, skip=(), word=""):
        refused(write_gguf(tmp_path / f"{name}.gguf", small(), extra=extra, skip=skip), word)

    check("missing", {}, [q], "layers.0.self_attn.q_proj.weight")
    check("no embedding", {}, ["token_embd.weight"], "token_embd.weight")
    check("unknown", {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}, word="attn_sinks")
    for shape in (63, 64), (64, 63), (32, 64), (64,):
        check(str(shape), {q: np.zeros(shape, np.float32)}, [q])
    check("rope", {"rope_freqs.weight": np.ones(3, np.float32)})
    check("zero", {"rope_freqs.weight": np.zeros(8, np.float32)}, word="rotary frequencies")


@pytest.mark.parametrize("entry, value, word", [("split.count", 3, "part of a split GGUF"),
                                                ("general.type", "adapter", "LoRA adapter")])
def test_ggufs_that_are_no_whole_model(tmp_path, entry, value, word):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add = writer.add_uint16 if isinstance(value, int) else writer.add_string
    add(entry, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", word)
    (tmp_path / "y.gguf").write_text(POINTER)
    refused(tmp_path / "y.gguf", "pointer of git-lfs")


def test_gguf_truncated_anywhere(tmp_path):
    data = write_gguf(tmp_path / "whole.gguf", small(num_hidden_layers=1)).read_bytes()
    path = tmp_path / "part.gguf"
    for end in [0, 3, 4, 8, 23, 24, 40, *range(60, len(data) - 64, len(data) // 40)]:
        path.write_bytes(data[:end])
        refused(path)


# ---------------------------------------------------------------------------- the KV cache


@pytest.fixture(params=["tiny", "llama"])
def text(request, tok):
    """A model and a text for it, [1, 24]."""
    model = request.getfixturevalue(request.param)
    if request.param == "tiny":
        return model, tokens(1, 24, 256)
    return model, torch.tensor([tok.encode(PROSE)[:24]])


def in_chunks(model, x, cache, size, selector=None):
    """Logits of x, read in chunks of `size` tokens."""
    return torch.cat([model(part, cache, selector) for part in x.split(size, dim=1)], dim=1)


def test_prefill_chunks_and_single_tokens_equal_a_recompute(text):
    model, x = text
    lengths = [1, 2, 11, 24]
    expected = torch.cat([model(x[:, :n])[:, -1:] for n in lengths], dim=1)
    for size in (24, 7, 1):
        cache = model.new_cache(1, 24)
        actual = in_chunks(model, x, cache, size)[:, [n - 1 for n in lengths]]
        assert_close(f"chunks of {size}", actual, expected, 3e-4)
        assert cache.size == 24
    last = model.prefill(x, model.new_cache(1, 30))
    assert_close("prefill", last, expected[:, -1:], 3e-4)


def test_truncate_then_continue(text):
    model, x = text
    cache = model.new_cache(1, 24)
    model.prefill(x, cache)
    for length in (19, 12, 0):
        cache.truncate(length)
        assert cache.size == length
        new = x.flip(1)[:, :5]
        expected = model(torch.cat([x[:, :length], new], dim=1))[:, length:]
        assert_close(f"behind {length}", in_chunks(model, new, cache, 3), expected, 3e-4)
    cache.truncate(9)  # longer than the text
    assert cache.size == 5


def test_positions_with_gaps(hf, ours):
    x, positions = tokens(2, 12), torch.tensor([0, 1, 2, 40, 41, 90, 91, 92, 93, 200, 201, 202])
    expected = hf(x, position_ids=positions[None], attention_mask=torch.ones_like(x)).logits
    assert (expected - hf(x).logits).abs().max() > 0.1  # the gaps matter
    assert_close("one chunk", ours(x, positions=positions), expected, 1e-4)
    cache = ours.new_cache(2, 12)
    parts = [ours(x[:, part], cache, positions=positions[part])
             for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
    assert_close("three chunks", torch.cat(parts, dim=1), expected, 1e-4)


def test_a_full_cache_is_refused_and_left_alone(tiny):
    x = tokens(1, 8, 256)
    cache = tiny.new_cache(1, 8)
    tiny(x[:, :5], cache)
    before = [t.clone() for t in (*cache.k, *cache.v)]
    with pytest.raises(UserError, match="9 tokens do not fit into a cache of 8"):
        tiny(tokens(1, 4, 256), cache)
    assert cache.size == 5
    assert all(map(torch.equal, before, (*cache.k, *cache.v)))
    assert_close("afterwards", tiny(x[:, 5:], cache), tiny(x)[:, 5:], 1e-4)


def test_the_context_is_a_limit():
    model = randomise(Llama(tiny_config(context=8)))
    model(tokens(1, 8, 256))
    with pytest.raises(UserError, match="9 tokens exceed the model's context of 8"):
        model(tokens(1, 9, 256))
    with pytest.raises(UserError, match="context of 8"):
        model.new_cache(1, 9)


# ---------------------------------------------------------------------------- the selector hook


def test_a_selector_sees_what_is_documented(hf, ours, tmp_path):
    """x is the input of the layer before its norm; q and keys are rotated, so that they give the
    attention that transformers reports."""
    x = tokens(2, 20)
    seen = []

    def spy(layer, x, q, keys, positions):
        seen.append((layer, x.clone(), q.clone(), keys.clone(), positions.clone()))

    cache = ours.new_cache(2, 20)
    out = [ours(part, cache, spy) for part in x.split((13, 1, 6), dim=1)]
    eager = LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    expected = eager(x, output_hidden_states=True, output_attentions=True)
    assert_close("logits", torch.cat(out, dim=1), expected.logits.detach(), 1e-4)
    assert [layer for layer, *_ in seen] == [0, 1, 2] * 3
    for start, end, calls in [(0, 13, seen[:3]), (13, 14, seen[3:6]), (14, 20, seen[6:])]:
        for layer, layer_input, q, keys, positions in calls:
            assert positions.tolist() == list(range(start, end))
            assert q.shape == (2, 4, end - start, 16) and keys.shape == (2, 2, end, 16)
            hidden = expected.hidden_states[layer][:, start:end].detach()
            assert_close(f"x of layer {layer}", layer_input, hidden, 1e-5)
            attention = expected.attentions[layer][:, :, start:end, :end].detach()
            assert_close(f"q, keys of layer {layer}", true_attention(q, keys).flatten(1, 2),
                         attention, 1e-5)


def few(layer, x, q, keys, positions):
    """The first token, the query's own, and one before it that depends on the KV head."""
    head = torch.arange(keys.shape[1])[:, None]
    back = torch.stack([positions + 0 * head, positions - 2 - head], dim=-1)  # [G, T, 2]
    back = torch.where(back > 0, back, -1)
    index = torch.cat([torch.zeros_like(back[..., :1]), back], dim=-1).int()
    return index.expand(len(x), -1, -1, -1)


def test_a_selectors_index_is_attended_to(hf, ours, tmp_path):
    """Against transformers with a mask of its own for every head."""
    x = tokens(2, 16)
    index = few(0, x, None, torch.empty(2, 2, 16, 16), torch.arange(16))
    mask = torch.full((2, 2, 16, 17), torch.finfo(torch.float32).min)
    mask = mask.scatter(-1, torch.where(index < 0, 16, index).long(), 0)[..., :16]
    eager = LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    expected = eager(x, attention_mask=mask.repeat_interleave(2, dim=1)).logits.detach()
    assert (expected - hf(x).logits).abs().max() > 0.1  # the selection matters
    for size in (16, 5, 1):
        actual = in_chunks(ours, x, ours.new_cache(2, 16), size, few)
        assert_close(f"chunks of {size}", actual, expected, 1e-4)


def test_an_index_of_everything_is_dense(text):
    def everything(layer, x, q, keys, positions):
        token = torch.arange(keys.shape[2]).expand(len(positions), -1)
        index = torch.where(token <= positions[:, None], token, -1).int()
        return index.expand(*keys.shape[:2], -1, -1)

    model, x = text
    for size in (24, 1):
        actual = in_chunks(model, x, model.new_cache(1, 24), size, everything)
        assert_close(f"chunks of {size}", actual, model(x), 3e-4)
