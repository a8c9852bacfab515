"""The predictor and its selector: keys, scores, look-ahead, intervals, files."""

import json
import math
import os
from dataclasses import replace

import gguf
import pytest
import torch
from conftest import assert_close, randomise, tiny_config
from safetensors import safe_open
from safetensors.torch import save_file

from butler import (
    FASTEST,
    SHIPPED,
    Butler,
    ButlerConfig,
    ButlerSelector,
    find_butler,
    fingerprint,
    load_for,
)
from cli import UserError
from model import Llama
from train import record

LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))


def turned(x, angles):
    """x [..., S, D] by complex multiplication: channels i and i + D/2 are one complex number."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def importance_angles(config, positions):
    """Half of the pairs turn, from FASTEST to `slowest` radians per token in equal ratios."""
    turning = config.size // 4
    ratio = (config.slowest / FASTEST) ** (1 / (turning - 1))
    rates = [FASTEST * ratio**i for i in range(turning)] + [0] * (config.size // 2 - turning)
    return positions[:, None].double() * torch.tensor(rates).double()


def decode(model, tokens, cache, selector):
    """Tokens [1, T] one by one -> logits [1, T, V]"""
    return torch.cat([model.decode(t, cache, selector) for t in tokens.split(1, dim=1)], dim=1)


def by_layer(selector):
    """{layer: sorted selected tokens of the latest query, for each KV head}"""
    return {layer: [sorted(row[row >= 0].tolist()) for row in index[0, :, -1]]
            for layer, index in selector.index.items()}


def plain_keys(model, layer, x):
    """Keys before the rotation, from the layer's input: [B, G, S, D]"""
    block = model.layers[layer]
    return block.self_attn.k_proj(block.input_layernorm(x)).unflatten(-1, (-1, 16)).transpose(1, 2)


# ---------------------------------------------------------------------------- keys and scores


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}, LLAMA3, "divisors"],
                         ids=["none", "linear", "llama3", "divisors"])
def test_importance_keys_come_from_keys_without_their_rotation(tiny, scaling):
    """A wrong layout or frequency would pass every test that only compares this with itself."""
    model = tiny
    if scaling:
        rope = scaling if isinstance(scaling, dict) else None
        model = randomise(Llama(replace(tiny.config, rope_scaling=rope)))
    if scaling == "divisors":  # a GGUF file may carry one for every frequency
        model.frequencies /= torch.linspace(1, 9, 8)
    butler = Butler(ButlerConfig.for_model(model, size=16)).eval()
    ids = torch.randint(256, (2, 300), generator=torch.Generator().manual_seed(0))
    recorder = record(model, ids, torch.arange(300))
    positions = torch.arange(300)
    with torch.no_grad():
        for layer in (1, 4):
            plain = plain_keys(model, layer, recorder.x[layer])
            assert (recorder.keys[layer] - plain).abs().max() > 0.1  # the cached ones are rotated
            projected = plain @ butler.key_projection[layer - 1]
            expected = turned(projected, importance_angles(butler.config, positions))
            actual = butler.importance_keys(layer, recorder.keys[layer], positions)
            assert_close(f"importance keys of layer {layer}", actual, expected, 2e-4)


def test_rotated_keys_are_projected_as_they_are_cached(tiny):
    butler = Butler(ButlerConfig.for_model(tiny, size=8, rotated_keys=True))
    keys = torch.randn(1, 2, 30, 16)
    actual = butler.importance_keys(3, keys, torch.arange(30))
    assert_close("importance keys", actual, keys @ butler.key_projection[2], 1e-5)


def test_queries_and_scores_equal_the_formula(tiny_butler):
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(1, 5, 64, generator=rng)
    positions = torch.tensor([3, 40, 41, 900, 2000])
    producer = tiny_butler.producers["2"]
    h = torch.nn.functional.layer_norm(x, (64,), producer.norm.weight, producer.norm.bias)
    h = h @ producer.up.weight.T
    out = (h * h.sigmoid() @ producer.out.weight.T).view(5, 2, 2, 8)  # [T, R, G, E]
    queries = tiny_butler.importance_queries(2, x, positions)
    assert list(queries) == [3, 4]
    angles = importance_angles(tiny_butler.config, positions)
    for i, layer in enumerate(queries):
        expected = turned(out[:, i].transpose(0, 1), angles)  # [G, T, E]
        assert_close("importance queries", queries[layer][0], expected, 1e-4)
    keys = torch.randn(1, 2, 7, 8, generator=rng)
    scores = tiny_butler.scores(queries[3], keys)
    expected = torch.einsum("bgte,bgse->bgts", queries[3], keys) / math.sqrt(8)
    assert_close("scores", scores, expected, 1e-5)


def test_scores_depend_on_content_and_distance_alone(tiny, tiny_butler):
    plain = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(2))
    scores = []
    for start in (0, 1000):
        positions = start + torch.arange(40)
        keys = turned(plain, positions[:, None] * tiny.frequencies.double()).float()
        queries = tiny_butler.importance_queries(0, x, positions)[1]
        scores.append(tiny_butler.scores(queries, tiny_butler.importance_keys(1, keys, positions)))
    assert_close("scores 1,000 tokens later", scores[1], scores[0], 1e-3)
    nearer = tiny_butler.importance_keys(1, keys, positions + 5)
    assert (tiny_butler.scores(queries, nearer) - scores[1]).abs().max() > 0.05


# ---------------------------------------------------------------------------- looking ahead


def test_producers_serve_the_layers_behind_them(tiny):
    """5 layers: with R = 3 the producer at layer 0 serves three, the last one only one."""
    butler = Butler(ButlerConfig.for_model(tiny, layers_per_producer=3))
    x = torch.zeros(1, 2, 64)
    served = {p: list(butler.importance_queries(p, x, torch.arange(2))) for p in range(5)}
    assert served == {0: [1, 2, 3], 1: [], 2: [], 3: [4], 4: []}


def test_producers_of_a_model_that_is_selected_for_in_few_layers(tiny):
    """As in Gemma 3. A producer is at most R layers below those that it serves."""
    config = ButlerConfig.for_model(tiny)
    few = replace(config, layers=5, selected_layers=(0, 5, 11, 12, 17))
    for R, expected in ((1, {4: [5], 10: [11], 11: [12], 16: [17]}),
                        (5, {0: [5], 6: [11], 11: [12], 12: [17]}),
                        (6, {0: [5], 5: [11], 11: [12, 17]}),
                        (17, {0: [5, 11, 12, 17]})):
        assert replace(few, layers_per_producer=R).served() == expected
    for L in 1, 2, 5, 6, 30:
        for R in 1, 2, 5, 40:
            served = replace(config, layers=L, layers_per_producer=R).served()
            assert served == {p: [*range(p + 1, min(p + R + 1, L))] for p in range(0, L - 1, R)}


def test_the_file_of_a_butler_for_all_layers_has_not_changed(tmp_path):
    Butler.load(SHIPPED).save(tmp_path / "again")
    with safe_open(SHIPPED, "pt") as before, safe_open(tmp_path / "again", "pt") as after:
        assert list(before.keys()) == list(after.keys())
        entries = before.metadata()["butler"].replace("stride", "layers_per_producer")
        assert after.metadata()["butler"] == entries
        assert all(torch.equal(before.get_tensor(k), after.get_tensor(k)) for k in after.keys())


def test_queries_are_known_before_their_layer(tiny, tiny_butler, ids):
    """They come from the input of an earlier layer, not from the layer's own queries."""
    selector = tiny_butler.selector(30)
    cache = tiny.new_cache(1, 90)
    tiny.prefill(ids[:, :60], cache, selector.watch)
    before = {}

    def spy(layer, x, q, keys, positions):
        before[layer] = dict(selector.queries)
        nothing = torch.full_like(q, torch.nan)  # the layer's own queries are of no use to it
        return selector(layer, x, nothing, keys, positions)

    logits = decode(tiny, ids[:, 60:61], cache, spy)
    assert logits.isfinite().all()
    for layer in range(1, 5):
        assert torch.equal(before[layer][layer], selector.queries[layer])


def test_training_and_decoding_read_the_same_input(tiny, tiny_butler, ids):
    recorder = record(tiny, ids, torch.arange(90))
    for layer, producer in tiny_butler.producers.items():
        inputs = []
        hook = producer.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0]))
        decode(tiny, ids, tiny.new_cache(1, 90), tiny_butler.selector(1.0))  # selects all
        hook.remove()
        assert len(inputs) == 90
        assert_close(f"layer {layer}", torch.cat(inputs, 1), recorder.x[int(layer)], 1e-4)


@pytest.mark.parametrize("rules", [{}, {"neighbours": 2}])
def test_a_prompt_watched_unwatched_or_decoded_gives_the_same_choice(tiny, tiny_butler, ids, rules):
    found = []
    for way in ("watched", "in two parts", "unwatched", "token by token"):
        selector = tiny_butler.selector(24, **rules)
        cache = tiny.new_cache(1, 90)
        if way == "token by token":  # densely: the selector sees, its choice is not used
            for token in ids[:, :80].split(1, dim=1):
                tiny.prefill(token, cache, selector.watch)
        elif way == "in two parts":
            tiny.prefill(ids[:, :33], cache, selector.watch)
            tiny.prefill(ids[:, 33:80], cache, selector.watch)
        else:
            tiny.prefill(ids[:, :80], cache, selector.watch if way == "watched" else None)
        logits = decode(tiny, ids[:, 80:], cache, selector)
        found.append((by_layer(selector), selector.keys, logits))
    for choice, keys, logits in found[1:]:
        assert choice == found[0][0]
        assert_close("logits", logits, found[0][2], 1e-4)
        for layer in range(1, 5):
            assert_close("importance keys", keys[layer], found[0][1][layer], 1e-4)


@pytest.mark.parametrize("rules", [{}, {"interval": 100}])
def test_after_truncation_the_choice_is_that_of_the_new_text(tiny, tiny_butler, ids, rules):
    selector = tiny_butler.selector(24, **rules)
    cache = tiny.new_cache(1, 90)
    tiny.prefill(ids[:, :50], cache, selector.watch)
    decode(tiny, ids[:, 80:90], cache, selector)
    cache.truncate(45)
    decode(tiny, ids[:, 50:75], cache, selector)  # more tokens than were forgotten
    fresh = tiny_butler.selector(24, **rules)
    other = tiny.new_cache(1, 90)
    tiny.prefill(ids[:, :45], other, fresh.watch)
    decode(tiny, ids[:, 50:75], other, fresh)
    assert by_layer(selector) == by_layer(fresh)
    for layer in range(1, 5):
        assert_close("importance keys", selector.keys[layer], fresh.keys[layer], 1e-5)


# ---------------------------------------------------------------------------- rules of the selector


def test_interval_keeps_a_choice_while_the_window_moves_on(tiny, tiny_butler, ids):
    selector = tiny_butler.selector(24, interval=4)
    cache = tiny.new_cache(1, 90)
    tiny.prefill(ids[:, :58], cache, selector.watch)
    chosen = {}
    for position in range(58, 80):
        decode(tiny, ids[:, position : position + 1], cache, selector)
        for layer, index in selector.index.items():
            queries = selector.queries[layer]
            scores = tiny_butler.scores(queries, selector.keys[layer])[0, :, 0]  # [G, S]
            for g, row in enumerate(index[0, :, 0].tolist()):
                assert len(set(row)) == len(row) == 24 and min(row) == 0
                fixed = {*range(4), *range(position - 7, position + 1)}
                assert fixed <= set(row)
                if position % 4 == 0 or position == 58:  # also at the first step of all
                    top = scores[g, 4 : position - 7].topk(12).indices + 4
                    chosen[layer, g] = set(top.tolist())
                assert set(row) - fixed == chosen[layer, g]


def test_neighbours_of_a_chosen_token_come_with_it(tiny_butler):
    importance_keys = torch.zeros(1, 2, 60, 8)
    importance_keys[..., 20, 0] = 9
    importance_keys[..., 40, 0] = 8

    class Peaks(ButlerSelector):
        def all_importance_keys(self, layer, keys, T):
            return importance_keys

    selector = Peaks(tiny_butler, 4 + 8 + 8, neighbours=2)
    selector.queries[1] = torch.ones(1, 2, 1, 8)
    index = selector.choose(1, None, torch.zeros(1, 2, 60, 16), torch.tensor([59]))
    for row in index[0, :, 0].tolist():
        assert {18, 19, 20, 21, 22, 40} <= set(row) <= {*range(18, 23), *range(38, 43)}
        assert len(row) == 8  # neighbours are within the budget


@pytest.mark.parametrize("rules", [{"interval": 0}, {"neighbours": -1}, {"neighbours": 8},
                                   {"budget": 1.5}])
def test_nonsense_rules_are_refused(tiny_butler, rules):
    with pytest.raises(UserError):
        tiny_butler.selector(**{"budget": 0.1} | rules)
    tiny_butler.selector(0.1, neighbours=7)


def test_a_selector_is_small(tiny, tiny_butler, ids):
    """What it knows fits on one screen: no more than 8 attributes, in use too."""
    selector = tiny_butler.selector(24, interval=2, neighbours=1)
    cache = tiny.new_cache(1, 90)
    tiny.prefill(ids[:, :40], cache, selector.watch)
    decode(tiny, ids[:, 40:44], cache, selector)
    assert len(vars(selector)) <= 8


# ---------------------------------------------------------------------------- files and base models


def test_a_butler_survives_saving(tiny, tiny_butler, tmp_path):
    path = tmp_path / "new" / "b.safetensors"
    tiny_butler.save(path, {"kl": 0.5})
    again = Butler.load(path)
    again.check(tiny)
    assert again.config == tiny_butler.config
    assert {p.name for p in path.parent.iterdir()} == {"b.safetensors"}
    x = torch.randn(1, 2, 64)
    positions = torch.tensor([3, 500])
    keys = torch.randn(1, 2, 2, 16)
    assert torch.equal(again.importance_queries(0, x, positions)[2],
                       tiny_butler.importance_queries(0, x, positions)[2])
    assert torch.equal(again.importance_keys(2, keys, positions),
                       tiny_butler.importance_keys(2, keys, positions))
    with safe_open(path, framework="pt") as f:
        assert json.loads(f.metadata()["extra"]) == {"kl": 0.5}


def test_files_of_earlier_versions_load(tiny, tiny_butler, tmp_path):
    """They call layers_per_producer the stride."""
    path = tmp_path / "old.safetensors"
    tiny_butler.save(path)
    with safe_open(path, framework="pt") as f:
        entries = json.loads(f.metadata()["butler"])
    entries["stride"] = entries.pop("layers_per_producer")
    save_file(tiny_butler.state_dict(), path, {"butler": json.dumps(entries)})
    assert Butler.load(path).config == tiny_butler.config


def test_butlers_of_another_model_are_refused(tiny, tiny_butler):
    for other in (Llama(tiny_config()), randomise(Llama(tiny_config()), seed=1),
                  randomise(Llama(tiny_config(layers=4)))):
        with pytest.raises(UserError, match="another base model"):
            tiny_butler.check(other)
    stretched = randomise(Llama(tiny_config(rope_scaling={"type": "linear", "factor": 2.0})))
    assert fingerprint(stretched) == fingerprint(tiny)
    with pytest.raises(UserError, match="other rotary frequencies"):
        tiny_butler.check(stretched)
    with pytest.raises(UserError, match="another base model"):
        load_for(tiny, SHIPPED)
    assert find_butler(tiny) is None  # nobody asked for the shipped one


def test_damaged_files_end_in_one_line(tiny_butler, tmp_path):
    good = tmp_path / "good.safetensors"
    tiny_butler.save(good)
    data = good.read_bytes()
    damaged = {
        "empty": b"", "text": b"hello", "cut": data[: len(data) // 2],
        "header": data[:7] + b"\xff" + data[8:], "config": data.replace(b"kv_heads", b"kv_hoods"),
        "sizes": data.replace(b'\\"hidden\\": 16', b'\\"hidden\\": 64')}
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert content != data, name
        with pytest.raises(UserError, match="unreadable butler") as error:
            Butler.load(path)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    for name in "nothing", "x" * 300, "a\0b":
        with pytest.raises(UserError, match="no butler at"):
            Butler.load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, word in ("pipe", "no file"), ("pointer", "pointer of git-lfs"):
        with pytest.raises(UserError, match=f"unreadable butler: it is .*{word}"):
            Butler.load(tmp_path / name)
    with pytest.raises(UserError, match="unreadable butler"):
        Butler.load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_numbers_that_no_training_gives_are_refused_by_name(tiny_butler, tmp_path, value):
    path = tmp_path / "b.safetensors"
    for name in "key_projection", "producers.2.norm.weight":
        broken = Butler(tiny_butler.config)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[5] = value
        broken.save(path)
        with pytest.raises(UserError, match=f"{name} has NaN, infinite or huge numbers"):
            Butler.load(path)
    wrong = replace(tiny_butler.config, rope=(value, *tiny_butler.config.rope[1:]))
    Butler(wrong).save(path)
    with pytest.raises(UserError, match="rope has NaN, infinite or huge numbers"):
        Butler.load(path)


def test_a_path_may_start_with_a_tilde(tiny_butler, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_butler.save(tmp_path / "b.safetensors")
    assert Butler.load("~/b.safetensors").config == tiny_butler.config
    with pytest.raises(UserError, match="no butler at ~nobody"):
        Butler.load("~nobody-at-all/b.safetensors")


def write_gguf(path, model):
    """A Llama as llama.cpp stores it: rows of q and k in the order of its rotary embedding."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.layers)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.layers)
    for name, w in model.state_dict().items():
        prefix = "" if name.startswith("lm_head") else "model."
        if "q_proj" in name or "k_proj" in name:
            w = w.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(prefix + name, (".weight",)), w.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_and_a_folder_of_one_model_have_one_fingerprint(tiny, tmp_path):
    """The folder in bfloat16, as models are published."""
    write_gguf(tmp_path / "m.gguf", tiny)
    save_file({f"model.{name}".replace("model.lm_head", "lm_head"): w.bfloat16().contiguous()
               for name, w in tiny.state_dict().items()}, tmp_path / "m.safetensors")
    c = tiny.config
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.width,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "intermediate_size": c.mlp_width}))
    of_gguf = Llama.from_pretrained(tmp_path / "m.gguf")
    of_folder = Llama.from_pretrained(tmp_path)
    assert_close("keys", of_folder.layers[2].self_attn.k_proj.weight,
                 of_gguf.layers[2].self_attn.k_proj.weight, 1e-2)
    assert fingerprint(of_gguf) == fingerprint(of_folder) == fingerprint(tiny)
    assert fingerprint(randomise(Llama(c), seed=1)) != fingerprint(tiny)
    untrained = [Llama(c) for _ in range(2)]  # all norms are 1
    assert fingerprint(untrained[0]) != fingerprint(untrained[1])


def test_the_shipped_butler_is_of_the_default_model(llama, butler):
    assert butler.config.fingerprint == fingerprint(llama) == "8ba13e413e4b0994"
