"""Rivals, each against its definition written as a plain loop, and what eviction must not do."""

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close, randomise, tiny_config

import fast
import selection
from bench import Probe
from butler import load_for
from cli import UserError
from data import evenly_spaced
from kernel import index_to_mask, masked_attention, true_attention
from model import Llama, apply_rope, rope_cos_sin
from selection import RIVALS, Oracle, make_selector
from synth_task import every_maker, print_bytes
from workshop import rivals
from workshop.rivals import Ahead, Sketch

B, H, G, S, D, C = 2, 6, 2, 150, 8, 4

# What a layer of the fixture below reads. Only rivals that look ahead use it.
X = torch.randn(B, S, C, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def small():
    """A Llama of the same shape."""
    sizes = {"width": C, "layers": 2, "heads": H, "kv_heads": G, "head_dim": D}
    return randomise(Llama(tiny_config(**sizes)))


@pytest.fixture(scope="module")
def layer():
    """One layer's random queries and keys; half of the keys resemble the others."""
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(B, H, S, D, generator=rng)
    keys = torch.randn(B, G, S, D, generator=rng)
    keys[:, :, 75:] = keys[:, :, :75] + 0.5 * torch.randn(B, G, 75, D, generator=rng)
    return q, keys


def watch(selector, layer, start, end):
    q, keys = layer
    positions = torch.arange(start, end)
    selector.watch(1, X[:, start:end], q[:, :, start:end], keys[:, :, :end], positions)


def call(selector, layer, start, end):
    """The tokens from `start` to `end` in one call -> index [B, G, T, K]"""
    q, keys = layer
    x, positions = X[:, start:end], torch.arange(start, end)
    assert selector(0, x, q[:, :, start:end], keys[:, :, :end], positions) is None
    return selector(1, x, q[:, :, start:end], keys[:, :, :end], positions)


def decode(name, budget, layer, start, block=1, llama=None):
    """Watches `start` tokens, then takes the rest -> for every token [B][G] sets of indices"""
    selector = make_selector(name, budget, llama=llama)
    if start:
        watch(selector, layer, 0, start)
    steps = []
    for t in range(start, S, block):
        index = call(selector, layer, t, min(t + block, S))
        for row in index.unbind(2):
            kept = [[[i for i in head if i >= 0] for head in heads] for heads in row.tolist()]
            assert all(len(head) == len(set(head)) for heads in kept for head in heads)
            steps.append([[set(head) for head in heads] for heads in kept])
    return steps


def test_every_name_of_the_course_is_a_rival():
    assert set(RIVALS) == set(rivals.RIVALS)
    with pytest.raises(UserError, match="budget"):
        make_selector("quest", 1.5)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("budget", [0.2, 30])
def test_all_attend_to_exactly_the_budget(layer, small, name, start, budget):
    for t, rows in enumerate(decode(name, budget, layer, start, llama=small), start):
        total = min(max(12, int((t + 1) * 0.2 + 1e-4) if budget < 1 else 30), t + 1)
        if name == "topp":  # the mean over the KV heads
            assert all(sum(map(len, heads)) == G * total for heads in rows), t
        for kept in rows[0] + rows[1]:
            assert len(kept) == total or name == "topp", (name, t)
            assert kept >= set(range(min(4, t + 1))) | {t - i for i in range(min(8, t + 1))}
            assert max(kept) == t


@pytest.mark.parametrize("name", RIVALS)
def test_a_block_of_tokens_gets_what_single_ones_get(layer, small, name):
    blocks = decode(name, 0.2, layer, 100, block=7, llama=small)
    assert blocks == decode(name, 0.2, layer, 100, llama=small)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@pytest.mark.parametrize("start", [0, 100])
def test_what_is_evicted_never_returns(layer, name, start):
    steps = decode(name, 0.2, layer, start)
    for b in range(B):
        for g in range(G):
            gone = set()
            for t, rows in enumerate(steps, start):
                assert not rows[b][g] & gone
                gone = set(range(t + 1)) - rows[b][g]
            assert len(gone) > 60
    if start:  # the prompt is cut before the first new token: 20 of its 100 tokens, and one new one
        assert all(len(kept - {start}) <= 20 for rows in steps[0] for kept in rows)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_an_unwatched_prompt_is_refused(layer, name):
    with pytest.raises(UserError, match=f"^{name} evicts .* watch"):
        call(make_selector(name, 0.2), layer, 100, 101)
    selector = make_selector(name, 0.2)
    watch(selector, layer, 0, 90)
    with pytest.raises(UserError, match="whole prompt"):
        call(selector, layer, 100, 101)
    used = make_selector(name, 0.2)
    watch(used, layer, 0, 100)
    call(used, layer, 100, 120)
    with pytest.raises(UserError, match="one text only"):  # the cache was truncated to 100
        call(used, layer, 100, 101)


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_a_prompt_may_be_watched_in_chunks(layer, name, monkeypatch):
    whole, parts = make_selector(name, 0.2), make_selector(name, 0.2)
    watch(whole, layer, 0, S)
    monkeypatch.setattr(rivals.H2O, "BLOCK", 17)
    for start, end in ((0, 64), (64, 140), (140, S)):
        watch(parts, layer, start, end)
    assert_close(name, parts.value[1], whole.value[1], 1e-5)


@pytest.mark.parametrize("start", [0, 100, 104])
def test_h2o_against_a_plain_loop(layer, start):
    """Sums of attention in a dictionary, for one batch row and KV head; lists instead of masks. The
    budget grows from 20 to 21 tokens behind a prompt of 104: too late for one that was evicted."""
    q, keys = layer
    budget, b, g = 0.2, 1, 1
    heads = range(g * (H // G), (g + 1) * (H // G))

    def attention(t, tokens):
        tokens = sorted(tokens)
        rows = [(keys[b, g, tokens] @ q[b, h, t] / D**0.5).softmax(0) for h in heads]
        return dict(zip(tokens, (sum(rows) / len(rows)).tolist(), strict=True))

    def cut(alive, t):
        total = max(int((t + 1) * budget + 1e-4), 12)
        always = {*range(4), *range(t - 7, t + 1)} & set(range(t + 1))
        recent = set(range(t - total // 2 + 1, t + 1))
        order = sorted(alive - always, key=lambda s: (s not in recent, -mass[s]))
        return always | set(order[: max(total - 12, 0)])

    mass = dict.fromkeys(range(S), 0.0)
    for t in range(start):
        for s, a in attention(t, range(t + 1)).items():
            mass[s] += a
    alive, expected = cut(set(range(start)), start - 1), []  # the prompt is cut by itself
    for t in range(start, S):
        alive = cut(alive | {t}, t)
        for s, a in attention(t, alive).items():
            mass[s] += a
        expected.append(alive)
    assert [rows[b][g] for rows in decode("h2o", budget, layer, start)] == expected


def test_snapkv_keeps_what_the_last_queries_vote_for(layer):
    q, keys = layer
    start, b, g = 100, 0, 1
    votes = true_attention(q[:, :, :start], keys[:, :, :start])
    votes = votes[b, g, :, start - 32 : start].mean(0).sum(0).tolist()
    padded = [0.0] * 3 + votes + [0.0] * 3
    pooled = {s: sum(padded[s : s + 7]) for s in range(4, start - 8)}
    best = set(sorted(pooled, key=pooled.get, reverse=True)[:28])
    steps = decode("snapkv", 40, layer, start)
    # One of the prompt's 40 tokens makes room for the new one: the least of the 28, or the one that
    # has just left the window, if it got fewer votes.
    voted = steps[0][b][g] - set(range(4)) - set(range(92, 101))
    assert voted <= best and len(voted) >= 27
    # 50 tokens later the prompt still has all that is not sinks or window
    assert len(steps[-1][b][g] & set(range(start))) == 32


def test_snapkv_without_votes_keeps_the_most_recent(layer):
    for t, rows in enumerate(decode("snapkv", 30, layer, 0)):
        expected = {*range(4), *range(max(0, t - 25), t + 1)} & set(range(t + 1))
        assert all(kept == expected for kept in rows[0] + rows[1])


def box(head, inside):
    """The largest product of a query head with a key inside the box around a page's keys."""
    low, high = inside.amin(0), inside.amax(0)
    bound = torch.maximum(head * low, head * high).sum().item()
    assert (inside @ head).max() <= bound + 1e-5
    return bound


def mean_and_spread(head, inside):
    keys = inside.double().numpy()
    return float(head.double().numpy() @ keys.mean(0) + abs(head.double().numpy()) @ keys.std(0))


@pytest.mark.parametrize("kind, rule", [(rivals.Quest, box), (rivals.Spread, mean_and_spread)])
def test_pages_are_ranked_by_their_bound(layer, kind, rule):
    q, keys = layer
    scores = kind(0.2).scores(1, q, keys, torch.arange(S))
    for b, g, t in ((0, 0, 140), (1, 1, 99), (0, 1, 47)):
        heads, full = q[b, g * 3 : g * 3 + 3, t], (t + 1) // 16
        inside = [keys[b, g, 16 * page : 16 * page + 16] for page in range(full)]
        bounds = [max(rule(head, page) for head in heads) for page in inside]
        ranking = scores[b, g, t, : t + 1].argsort(descending=True).tolist()
        being_filled = list(range(16 * full, t + 1))
        pages = sorted(range(full), key=bounds.__getitem__, reverse=True)
        assert ranking == being_filled + [16 * page + i for page in pages for i in range(16)]


def test_topp_always_serves_the_head_that_holds_least(layer):
    """One token at a time goes to the head with the smallest share: then all hold the same p. One
    KV head's attention is made wide."""
    q, keys = layer
    keys = torch.cat([keys[:, :1], 0.1 * keys[:, 1:]], dim=1)
    steps = decode("topp", 0.3, (q, keys), 100)
    attention = true_attention(q, keys).mean(2).double()
    for b, t in ((0, 100), (1, 120), (1, 149)):
        total = int((t + 1) * 0.3 + 1e-4)
        kept = [{*range(4), *range(t - 7, t + 1)} for _ in range(G)]
        held = lambda g, b=b, t=t, kept=kept: attention[b, g, t, list(kept[g])].sum()  # noqa: E731
        for _ in range(G * (total - 12)):
            g = min(range(G), key=held)
            left = set(range(t + 1)) - kept[g]
            kept[g].add(max(left, key=lambda s: attention[b, g, t, s]))
        assert steps[t - 100][b] == kept
        assert len(kept[1]) > 1.5 * len(kept[0])


def test_keynorm_chooses_the_smallest_keys(layer):
    _, keys = layer
    kept = decode("keynorm", 25, layer, S - 1)[0][1][0]
    norms = keys[1, 0].norm(dim=-1)
    smallest = 4 + norms[4 : S - 8].argsort()[:13]
    assert kept - set(range(4)) - set(range(S - 8, S)) == set(smallest.tolist())


@pytest.mark.parametrize("name", RIVALS)
def test_in_a_model_the_selection_is_what_is_attended_to(tiny, name):
    """A decode step of the model, against attention masked by the index that was reported."""
    tokens = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(0))
    cache, selector = tiny.new_cache(2, 90), make_selector(name, 0.3, llama=tiny)
    tiny.prefill(tokens[:, :-1], cache, selector.watch)
    attended = {}
    for i, block in enumerate(tiny.layers):
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, x, i=i: attended.__setitem__(i, x[0]))
    queries = {}

    def spy(layer, x, q, keys, positions):
        queries[layer] = q
        return selector(layer, x, q, keys, positions)

    try:
        tiny.decode(tokens[:, -1:], cache, spy)
    finally:
        for block in tiny.layers:
            block.self_attn.o_proj._forward_pre_hooks.clear()
    for i in range(1, tiny.config.layers):
        out = masked_attention(queries[i], cache.k[i], cache.v[i], selector.index[i])
        assert_close(f"{name}, layer {i}", attended[i], out.transpose(1, 2).flatten(2), 1e-5)
        count = (selector.index[i] >= 0).sum(-1)  # [B, G, 1]
        assert count.sum(1).eq(2 * 27).all() if name == "topp" else count.eq(27).all()


# ---------------------------------------------------------------------------- sketches


def test_a_sketch_against_singular_vectors(layer):
    """Directions are right singular vectors of the prompt's keys; numpy, one head at a time."""
    q, keys = layer
    selector, start = Sketch(0.2, size=3), 100
    scores = selector.scores(1, q[:, :, start:], keys, torch.arange(start, S))
    for b, g, t in ((0, 0, 140), (1, 1, 100), (0, 1, 149)):
        prompt = keys[b, g, :start].double().numpy()
        directions = np.linalg.svd(prompt, full_matrices=False)[2][:3]
        small = keys[b, g, : t + 1].double().numpy() @ directions.T
        logits = q[b, 3 * g : 3 * g + 3, t].double().numpy() @ directions.T @ small.T / D**0.5
        weights = np.exp(logits - logits.max(1, keepdims=True))
        expected = (weights / weights.sum(1, keepdims=True)).mean(0)
        assert_close(f"{b, g, t}", scores[b, g, t - start, : t + 1], expected, 1e-5)
    kept = selector.directions[1]
    selector.scores(1, q[:, :, :50], keys[:, :, :50], torch.arange(50))
    assert selector.directions[1] is kept  # for the whole text


def test_keys_in_a_plane_need_two_directions():
    """Keys of two numbers, turned into 8 channels: by hand, the largest is the best."""
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    keys = torch.tensor([[1.0, 0], [0, 1], [3, 1], [-2, 5], [2, 2], [0, 0]]) @ turn[:2]
    q = torch.tensor([2.0, 1]) @ turn[:2]  # scores 2, 1, 7, 1, 6
    scores = Sketch(0.5, size=2).scores(1, q.view(1, 1, 1, 8), keys.view(1, 1, 6, 8), None)
    expected = (torch.tensor([2.0, 1, 7, 1, 6, 0]) / 8**0.5).softmax(0)
    assert_close("scores", scores[0, 0, 0], expected, 1e-6)


# ---------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def prose(tok):
    """The README as token ids, 1 x 700"""
    return evenly_spaced(tok, (ROOT / "README.md").read_text("utf-8"), 1, 700)


def last_step(llama, ids, selector, spy=None):
    """Reads a prompt; its last 4 tokens go through the selector -> mean attention kept"""
    cache, probe = llama.new_cache(1, ids.shape[1]), Probe(selector)
    llama.prefill(ids[:, :-4], cache, selector.watch)

    def both(*call):
        if spy:
            spy(*call)
        return probe(*call)

    with torch.inference_mode():
        llama(ids[:, -4:], cache, both)
    return probe.mean()


def test_a_sketch_of_all_directions_chooses_what_the_oracle_does(llama, prose):
    sketch, oracle = Sketch(0.1, size=64), Oracle(0.1)
    last_step(llama, prose, oracle, lambda *call: sketch(*call))
    for layer, index in oracle.index.items():
        same = (index.sort().values == sketch.index[layer].sort().values).float().mean()
        assert same > 0.99, layer  # but for ties within rounding


class Rounded(Sketch):
    """Sketches as they would be stored: 8 bits a number, a scale for each token."""

    def scores(self, layer, q, keys, positions):
        exact = super().scores(layer, q, keys, positions)
        sketch = keys @ self.directions[layer]
        scale = sketch.abs().amax(-1, keepdim=True) / 127
        rounded = (sketch / scale).round() * scale
        # The directions are orthonormal: these keys have the rounded sketch.
        scores = super().scores(layer, q, rounded @ self.directions[layer].mT, positions)
        assert 0 < (scores - exact).abs().max() < 0.1
        return scores


def test_eight_bits_lose_nothing(llama, prose):
    exact, rounded = (last_step(llama, prose, kind(0.1)) for kind in (Sketch, Rounded))
    assert abs(exact - rounded) < 1e-3
    assert exact > last_step(llama, prose, Sketch(0.1, size=8)) + 0.02


@pytest.mark.parametrize("engine", [Llama, fast.Llama])
def test_a_layer_with_its_own_input_foresees_its_own_query(model_path, prose, engine):
    """And with an earlier one's the query that a plain product of its weights gives."""
    llama = engine.from_pretrained(model_path)
    selectors = {n: Ahead(0.1, llama, layers_ahead=n) for n in (1, 5)}
    inputs, own = {}, Sketch(0.1)

    def spy(layer, x, q, keys, positions):
        inputs[layer] = x
        assert_close(f"layer {layer}", selectors[1].query(layer, x, positions), q, 1e-4)
        for selector in selectors.values():
            selector(layer, x, q, keys, positions)

    kept = last_step(llama, prose, own, spy)
    assert sorted(selectors[5].queries) == list(range(1, 30))
    rope = rope_cos_sin(torch.arange(696, 700), llama.frequencies)
    for n, layer, source in ((1, 7, 6), (5, 7, 5), (5, 10, 5), (5, 11, 10), (5, 29, 25)):
        x = inputs[source]
        block = llama.layers[layer]
        normed = x / (x.square().mean(-1, keepdim=True) + llama.config.norm_eps).sqrt()
        q = (normed * block.input_layernorm.weight) @ block.self_attn.q_proj.weight.T
        q = apply_rope(q.view(1, 4, 9, 64).transpose(1, 2), *rope)
        assert_close(f"layer {layer}", selectors[n].queries[layer], q, 1e-3)
    # Foresight costs attention, and the farther the more.
    ahead1, ahead5 = (last_step(llama, prose, Ahead(0.1, llama, n)) for n in (1, 5))
    assert kept > ahead1 + 0.01 > ahead5 + 0.03


def test_topp_raises_the_smallest_share_at_the_same_total(llama, prose):
    topp, oracle = rivals.TopP(0.1), Oracle(0.1)

    def compare(layer, x, q, keys, positions):
        one, other = (selector(layer, x, q, keys, positions) for selector in (topp, oracle))
        if layer > 0:
            assert torch.equal((one >= 0).sum((1, 3)), (other >= 0).sum((1, 3)))
            attention = true_attention(q, keys).mean(2)
            one, other = ((attention * index_to_mask(index, keys.shape[2])).sum(3).amin(1)
                          for index in (one, other))  # [B, T]
            assert (one >= other - 1e-6).all() and one.mean() > other.mean()

    last_step(llama, prose, Oracle(0.1), compare)


@pytest.mark.parametrize("name", ["sketch", "ahead1", "ahead5", "spread"])
def test_prompts_can_be_read_through_them(llama, prose, name, monkeypatch):
    monkeypatch.setattr(selection, "DENSE_START", 320)
    monkeypatch.setattr(selection, "DENSE_END", 10)
    seen = []
    for budget in 1.0, 0.5:
        cache = llama.new_cache(1, 704)
        seen.append(selection.prefill(llama, prose, cache,
                                      make_selector(name, 0.1, llama=llama), budget))
    dense = llama.prefill(prose, llama.new_cache(1, 700))
    assert_close("whole budget", seen[0], dense, 1e-2)
    assert 0.01 < (seen[1] - dense).abs().max() < 10


def test_topp_cannot_read_a_prompt(llama, prose, monkeypatch):
    monkeypatch.setattr(selection, "DENSE_START", 320)
    with pytest.raises(UserError, match="topp gives KV heads different numbers") as error:
        selection.prefill(llama, prose, llama.new_cache(1, 700), make_selector("topp", 0.1), 0.5)
    assert "\n" not in str(error.value)


def test_bytes_are_those_of_what_is_read(llama, butler):
    fast_butler = load_for(llama, cls=fast.Butler)
    assert fast_butler.selector(0.1).bytes_per_token(64) == 36
    names = ("dense", "oracle", "butler", "recency", *RIVALS)
    read = print_bytes(every_maker(names, ("0.1", "0.2"), butler, llama), 64)
    assert read == {"oracle": 128, "butler": 36, "recency": 0, "quest": 16, "h2o": 2, "snapkv": 2,
                    "keynorm": 2, "sketch": 36, "sketch16": 20, "sketch8": 12, "ahead1": 36,
                    "ahead5": 36, "spread": 16, "topp": 128}


def test_ahead_needs_a_llama_of_the_course(tiny, folder):
    from workshop.transformers import load

    engine, _, _ = load(str(folder))
    for llama in (None, engine):
        with pytest.raises(UserError, match="model.py's Llama") as error:
            make_selector("ahead5", 0.1, llama=llama)
        assert "\n" not in str(error.value)
    assert make_selector("ahead1", 0.1, llama=tiny).layers_ahead == 1
