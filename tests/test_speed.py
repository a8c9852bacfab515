"""speed.py: bytes counted right, every candidate measured, the fastest dense one compared with."""

import json
import os
from pathlib import Path

import pytest
import torch

import bench
from beyond.offload import PinnedCache
from common.errors import ModelError, UsageError
from loading.weights import Config
from measure import speed, speed_offload
from model import Llama

TINY = Config(vocab_size=64, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
              context=512, tied=True)


def config(monkeypatch, **other):
    monkeypatch.setitem(speed.SHAPES, "tiny", TINY)
    return bench.Config(**{"shape": "tiny", "contexts": ("70", "90"), "budgets": ("32",),
                           "drifts": ("0", "0.2"), "n": 2} | other)


@pytest.mark.parametrize("suite", ["attention", "speed"])
def test_rows(monkeypatch, suite):
    settings = config(monkeypatch, suite=suite, batch=("1", "2"))
    bench.check(settings)
    rows = speed.measure(settings)["rows"]
    assert {(r["batch"], r["context"]) for r in rows} == {(1, 70), (1, 90), (2, 70), (2, 90)}
    for batch in (1, 2):
        mine = [r for r in rows if (r["batch"], r["context"]) == (batch, 70)]
        dense = [r for r in mine if r["kept"] is None]
        assert max(r["speedup"] for r in dense) == 1
        assert any(r["selector"] == "butler 32" for r in mine)
        for r in mine:
            assert r["ms"] > 0 and r["tokens_per_s"] == pytest.approx(1e3 * batch / r["ms"])


def test_on_a_gpu_steps_are_replayed_too(monkeypatch):
    monkeypatch.setattr(speed, "on_gpu", lambda x: True)
    rows = speed.measure(config(monkeypatch, suite="speed", contexts=("70",)))["rows"]
    for name in ("dense", "butler 32"):
        (replayed,) = (r for r in rows if r["selector"] == f"{name}, CUDA graph")
        alike = [r for r in rows if r["selector"].startswith(name)]
        assert replayed["bytes"] in {r["bytes"] for r in alike if r is not replayed}


@pytest.mark.parametrize("store", ["disk", "pinned"])
def test_rows_of_an_offloaded_cache(monkeypatch, store):
    settings = config(monkeypatch, suite="offload", contexts=("300",), n=2)
    bench.check(settings)
    if store == "pinned":  # one that a CPU can have, see test_offload.py
        monkeypatch.setattr(speed_offload, "store_of", lambda device: store)
        monkeypatch.setattr(speed_offload, "cache_kind", lambda *which: PinnedCache)
    report = speed_offload.measure(settings)
    rows = {r["selector"]: r for r in report["rows"]}
    assert list(rows) == [f"dense, {store}", *(f"butler 32, {store}, {end}" for end in (
        "no look-ahead", "drift 0", "drift 0.2")), "dense, resident", "butler 32, resident"]
    size = 300 * 3 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, KV heads, head size, float32
    for name, r in rows.items():
        assert r["ms"] > 0 and r["speedup"] == rows[f"dense, {store}"]["ms"] / r["ms"]
        assert r["cache_bytes"] == size and (r["bytes"] == size) == ("dense" in name)
        assert (r["again"] is None) == ("dense" in name) == (r["kept"] is None)
    assert ("bus" in report) == (store == "pinned")
    table = speed_offload.table(report)
    assert all(name in table for name in rows) and ("fetched row by row" in table) == (
        store == "pinned")


def test_a_limit_that_cannot_be_set_leaves_nothing_behind():
    with pytest.raises(UsageError, match="--memory needs"), speed_offload.memory_limit(-7):
        pass
    for parent in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
        assert not Path(parent, f"tokenbutler-{os.getpid()}").exists()


def test_a_process_goes_back_to_the_group_that_it_came_from(tmp_path):
    first, second = "5:devices:/\n4:memory:/a/b\n0::/\n", "0::/a/b\n"
    for parent, listed in ("memory", first), ("cgroup", second):
        root = tmp_path / parent
        (root / "a/b").mkdir(parents=True)
        assert speed_offload.own_group(root, listed) == root / "a/b"
        assert speed_offload.own_group(root, listed.replace("a/b", "hidden")) == root


def test_bytes(monkeypatch):
    monkeypatch.setattr(speed, "fast_dtype", lambda device: torch.float32)  # random: not packed
    llama, _ = speed.model_of(config(monkeypatch, suite="speed"))
    token = 2 * 2 * 8 * 4  # keys and values of two KV heads of size 8, in float32
    weights = sum(p.numel() for p in llama.parameters()) * 4
    assert speed.moved("attention", llama, 3, 100, None, False, 4, 16) == 3 * 2 * 100 * token
    assert speed.moved("speed", llama, 3, 100, None, False, 4, 16) == weights + 3 * 3 * 100 * token
    scored = 100 * 2 * (16 + 4)
    for kept, k in ((20.0, 20), (0.1, 10)):
        read = speed.moved("attention", llama, 1, 100, kept, True, 4, 16)
        assert read == 2 * (k * token + scored)
    assert speed.moved("attention", llama, 1, 100, 20.0, False, 4, 16) == 2 * 20 * token
    assert speed.memory(llama, 1, 100, None, 4, 16) == weights + 100 * 3 * token
    assert speed.memory(llama, 3, 100, 0.1, 4, 16) == weights + 300 * (3 * token + 2 * 2 * (16 + 4))


def test_packed_weights_are_held_beside_the_others_and_read_instead():
    """In bfloat16 every matrix of a suitable size has a form, here that of the logits alone."""
    llama = Llama(TINY).to(torch.bfloat16)
    plain, head = (sum(p.nbytes for p in module.parameters()) for module in (llama, llama.lm_head))
    assert speed.weight_bytes(llama) == (plain, plain, plain + head)


def test_importance_keys_cost_a_fourteenth_of_keys_and_values_at_head_size_128(monkeypatch):
    settings = config(monkeypatch, suite="speed")
    monkeypatch.setitem(speed.SHAPES, "tiny", Config(**vars(TINY) | {"head_dim": 128}))
    llama, butler = speed.model_of(settings)
    cache, selector = llama.new_cache(1, 1024, torch.bfloat16), butler.selector(0.1)
    for _ in range(3):
        llama.decode(torch.tensor([[1]]), cache, selector)
    held = selector.importance
    keys = (held.numbers.nbytes + held.scales.nbytes) / held.scales.shape[-1]
    both = sum(t.numel() * t.element_size() / 1024 for t in cache.k[1:] + cache.v[1:])
    assert keys / both == (32 + 4) / 512


def test_break_even_is_where_the_line_crosses_one():
    def row(context, speedup, selector="butler 256", kept=256.0):
        return {"selector": selector, "kept": kept, "batch": 1, "context": context,
                "speedup": speedup}

    found = speed.break_even([row(1000, 0.5), row(4000, 2.0), row(16000, 3.0),
                              row(1000, 1.0, "dense", None), row(1000, 3.0, "attend alone")])
    assert found == {"butler 256, batch 1": 2000}
    assert speed.break_even([row(8, 1.5), row(9, 0.9)])["butler 256, batch 1"] is None
    assert speed.break_even([row(8, 1.5), row(9, 1.9)])["butler 256, batch 1"] == 8


def test_every_dense_form_is_attention():
    q, k, v = (torch.randn(1, n, s, 8) for n, s in ((4, 1), (2, 50), (2, 50)))
    expected = speed.DENSE["enable_gqa"](q, k, v)
    for form in speed.DENSE.values():
        assert (form(q, k, v) - expected).abs().max() < 1e-5


def test_shapes_by_name_and_by_file(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="shape 'llama-9' is none of smollm2-135m"):
        bench.check(config(monkeypatch, suite="speed", shape="llama-9"))
    own = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3,
           "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(own))
    shape = speed.shape_of(str(tmp_path / "config.json"))
    assert (shape.layers, shape.head_dim, shape.context) == (3, 8, 2**20)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no config.json"):
        speed.shape_of(str(tmp_path / "config.json"))
