"""Prompts that are read through a selector: blocks of queries that share a choice."""

import pytest
import torch
from conftest import ROOT, assert_close

import fast
import sample
import selection
import synth_task
from butler import POOL
from cli import UserError
from selection import QUERY_BLOCK, SparsePrefill, make_selector, prefill

NAMES = ("butler", "oracle", "recency", "random", "quest", "keynorm")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (1, 450), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Prompts of this file are short, so fewer of their tokens are read densely."""
    monkeypatch.setattr(selection, "DENSE_START", 130)
    monkeypatch.setattr(selection, "DENSE_END", 10)
    monkeypatch.setattr(selection, "DENSE_LAYERS", 2)


def read(model, ids, selector, budget):
    """-> logits of the last token, and the cache"""
    cache = model.new_cache(1, ids.shape[1] + 8)
    return prefill(model, ids, cache, selector, budget), cache


@pytest.mark.parametrize("name", NAMES)
def test_a_short_prompt_is_read_densely(tiny, tiny_butler, ids, name):
    short = ids[:, : 130 + QUERY_BLOCK + 10 - 1]
    dense, _ = read(tiny, short, None, None)
    sparse, _ = read(tiny, short, make_selector(name, 0.1, tiny_butler), 0.1)
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_budget_equals_dense(tiny, tiny_butler, ids, name):
    dense, dense_cache = read(tiny, ids, None, None)
    whole, cache = read(tiny, ids, make_selector(name, 0.1, tiny_butler), 1.0)
    some, _ = read(tiny, ids, make_selector(name, 0.1, tiny_butler), 0.4)
    assert_close("logits", whole, dense, 1e-4)
    assert_close("keys", cache.k[4], dense_cache.k[4], 1e-4)
    assert (some - dense).abs().max() > 0.01


@pytest.mark.parametrize("name", ["butler", "oracle"])
def test_a_block_chooses_the_tokens_with_the_highest_mean(tiny, tiny_butler, ids, name):
    """Against loops in float64 over queries, KV heads and blocks."""
    selector = make_selector(name, 0.1, tiny_butler)
    seen = {}

    class Spy(SparsePrefill):
        def __call__(self, layer, x, q, keys, positions):
            index = super().__call__(layer, x, q, keys, positions)
            if layer == 3:
                queries = selector.queries[3] if name == "butler" else q
                seen.update(queries=queries[0].double(), keys=keys, index=index)
            return index

    cache = tiny.new_cache(1, 386)
    tiny.prefill(ids[:, :194], cache, selector.watch)
    tiny.prefill(ids[:, 194:386], cache, Spy(selector, 200))
    for g in range(2):
        for block in range(3):
            shares = []
            for t in range(64 * block, 64 * block + 64, POOL if name == "butler" else 1):
                if name == "butler":
                    own = 194 + t + POOL  # up to the last of the queries that ask together
                    k = selector.keys[3][0, g, :own].double()
                    q = seen["queries"][g, t : t + POOL].mean(0)
                    share = (k @ q / 8**0.5).softmax(0)
                else:
                    own = 194 + t + 1
                    k = seen["keys"][0, g, :own].double()
                    share = (seen["queries"][2 * g : 2 * g + 2, t] @ k.T / 4).softmax(-1).mean(0)
                shares.append(torch.cat([share, torch.zeros(386 - own)]))
            end = 194 + 64 * block + 64
            best = torch.stack(shares).mean(0)[4 : end - 128].topk(200 - 132).indices + 4
            expected = {*range(4), *range(end - 128, end), *best.tolist()}
            assert set(seen["index"][0, g, block].tolist()) - {-1} == expected


@pytest.mark.parametrize("name", NAMES)
def test_later_blocks_change_nothing_before_them(tiny, tiny_butler, ids, name):
    other = ids.clone()
    other[:, 386:] += 1
    one, two = (read(tiny, x % 256, make_selector(name, 0.1, tiny_butler), 0.4)[1]
                for x in (ids[:, :450], other[:, :450]))
    assert torch.equal(one.k[4][:, :, :386], two.k[4][:, :, :386])
    assert not torch.equal(one.k[4][:, :, 386:450], two.k[4][:, :, 386:450])


@pytest.mark.parametrize("chunk", [64, 192])
def test_chunks_do_not_matter(tiny, tiny_butler, ids, monkeypatch, chunk):
    whole, _ = read(tiny, ids, tiny_butler.selector(0.1), 0.4)
    monkeypatch.setattr(selection, "PREFILL_CHUNK", chunk)
    parts, _ = read(tiny, ids, tiny_butler.selector(0.1), 0.4)
    assert_close("logits", parts, whole, 1e-4)


def test_steps_behind_a_sparse_prompt_use_its_keys(tiny, tiny_butler, ids):
    """The selector has projected all keys while it read: nothing is left for the first step."""
    selector = tiny_butler.selector(0.2)
    _, cache = read(tiny, ids, selector, 0.4)
    for layer in range(1, 5):
        expected = tiny_butler.importance_keys(layer, cache.k[layer][:, :, :450],
                                               torch.arange(450))
        assert_close(f"layer {layer}", selector.keys[layer], expected, 1e-5)
    tiny.decode(ids[:, :1], cache, selector)
    assert all((index >= 0).sum() == 2 * 90 for index in selector.index.values())


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_selectors_that_evict_cannot_read(tiny, ids, name):
    with pytest.raises(UserError, match="evicts"):
        read(tiny, ids, make_selector(name, 0.1), 0.4)


@pytest.mark.parametrize("budget", [0.1, 100, 132])
def test_a_budget_that_leaves_nothing_to_choose_is_refused(tiny, tiny_butler, ids, budget):
    cache = tiny.new_cache(1, 450)
    with pytest.raises(UserError, match="nothing to choose") as error:
        prefill(tiny, ids, cache, tiny_butler.selector(0.1), budget)
    assert "\n" not in str(error.value) and cache.size == 0


# ---------------------------------------------------------------------------- the real model


def test_the_fast_engine_reads_as_the_plain_one_does(llama, butler, tok, monkeypatch):
    """The same tokens but for what 8 bits cannot tell apart, and nearly the same logits."""
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    ids = torch.tensor([tok.encode(text)[:700]])
    fast_butler = fast.Butler(butler.config)
    fast_butler.load_state_dict(butler.state_dict())
    logits, chosen = [], []
    for own in butler, fast_butler:
        indices = []

        class Spy(SparsePrefill):
            def __call__(self, *seen):
                index = super().__call__(*seen)
                indices.append(index)  # noqa: B023
                return index

        monkeypatch.setattr(selection, "SparsePrefill", Spy)
        logits.append(read(llama, ids, own.selector(0.1), 0.4)[0])
        chosen.append([index for index in indices if index is not None])
    same = total = 0
    for ours, theirs in zip(*chosen, strict=True):
        for a, b in zip(ours.flatten(0, 2).tolist(), theirs.flatten(0, 2).tolist(), strict=True):
            same += len(set(a) & set(b))
            total += len(set(a))
    assert 0.97 < same / total < 1
    plain, quick = (x.double().log_softmax(-1) for x in logits)
    assert (plain.exp() * (plain - quick)).sum() < 0.01  # KL divergence


def test_sample_and_synth_task_read_sparsely(main, tok):
    """A needle is found although its context was read with two fifths of the tokens."""
    report = main("synth_task.py", "--context", 500, "--n", 1, "--selectors", "dense,butler",
                  "--prefill", "sparse", "--prefill-budget", 0.4)
    assert {name: row[budget]["mean"] for name, budget, row in (
        ("dense", "1.0", report["results"]["coreference"]["dense"]),
        ("butler", "0.1", report["results"]["coreference"]["butler"]))} == {"dense": 1, "butler": 1}
    prompt = "The river is wide and the bridge is old. " * 30
    report = main("sample.py", "--prompt", prompt, "--max-new-tokens", 2, "--prefill", "sparse",
                  "--prefill-budget", 200, "--temperature", 0)
    assert report["new_tokens"] == 2 and report["prompt_tokens"] > 250


@pytest.mark.parametrize("flags, message", [
    ({"prefill": "some"}, "unknown --prefill"),
    ({"prefill": "sparse", "selector": "dense"}, "name one that is not dense"),
    ({"prefill": "sparse", "prefill_budget": 1.5}, "budget 1.5")])
def test_flags_without_sense_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        sample.main(sample.Config(**flags))
    flags = {"selectors" if key == "selector" else key: (value,) if key == "selector" else value
             for key, value in flags.items()}
    with pytest.raises(UserError, match=message):
        synth_task.main(synth_task.Config(**flags))
