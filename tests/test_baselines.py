"""The rivals: each against its definition written down naively, and what no selector may do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from baselines import BASELINES, NAMES, Oracle, Quest, Random, make_selector
from butler import Butler, ButlerConfig
from kernel import mark, true_attention
from measure.probe import Probe, spearman
from selection import SelectionError, allowance
from train import record

B, H, G, S, D = 2, 6, 2, 150, 8


@pytest.fixture(scope="module")
def layer():
    """One layer's random queries, keys and positions; half the keys repeat the others."""
    generator = torch.Generator().manual_seed(1)
    q, keys = (torch.randn(B, n, S, D, generator=generator) for n in (H, G))
    keys[:, :, 75:] = keys[:, :, :75] + 0.5 * torch.randn(B, G, 75, D, generator=generator)
    return q, keys, torch.arange(S).expand(B, S)


def through(selector, layer, start, watched=True):
    """Watches `start` tokens of layer 1, then takes the rest one by one -> [index] of every step"""
    q, keys, positions = layer
    x = torch.zeros(B, 1, 4)
    if start and watched:
        selector.watch(1, x, q[:, :, :start], keys[:, :, :start], positions[:, :start])
    steps = []
    for t in range(start, S):
        one = slice(t, t + 1)
        assert selector(0, x, q[:, :, one], keys[:, :, : t + 1], positions[:, one]) is None
        steps.append(selector(1, x, q[:, :, one], keys[:, :, : t + 1], positions[:, one]))
    return steps


def sets(index):
    return [[set(row[row >= 0].tolist()) for row in of_batch] for of_batch in index[:, :, 0]]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("budget", [0.2, 30])
def test_all_attend_exactly_the_budget_and_each_token_once(layer, name, start, budget):
    for t, index in enumerate(through(make_selector(name, budget), layer, start), start):
        for row in index.flatten(0, 2):
            kept = row[row >= 0].tolist()
            assert len(kept) == len(set(kept)) == int(allowance(budget, t + 1, 12)), (name, t)
            assert set(range(min(4, t + 1))) | {t - i for i in range(min(8, t + 1))} <= set(kept)
            assert max(kept) == t


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@pytest.mark.parametrize("start", [0, 100])
def test_what_is_evicted_never_returns(layer, name, start):
    """The first token behind the prompt already misses what the prompt's budget had no room for."""
    gone = [[set() for _ in range(G)] for _ in range(B)]
    for t, index in enumerate(through(make_selector(name, 0.2), layer, start), start):
        for b, rows in enumerate(sets(index)):
            for g, kept in enumerate(rows):
                assert not kept & gone[b][g]
                gone[b][g] |= set(range(t + 1)) - kept
    assert all(len(g) > 60 for rows in gone for g in rows)
    if start:
        first = through(make_selector(name, 0.2), layer, start)[0]
        assert all(len(kept) == 20 for rows in sets(first) for kept in rows)


def test_evicting_without_having_watched_is_refused(layer):
    with pytest.raises(SelectionError, match="watch"):
        through(make_selector("h2o", 0.2), layer, 100, watched=False)
    with pytest.raises(SelectionError, match="every step"):
        make_selector("snapkv", 0.2, dense_below=100)


def test_h2o_against_a_plain_loop(layer):
    """Sums of attention in a dictionary, for one batch row and KV head; lists instead of masks."""
    q, keys, _ = layer
    start, budget, b, g = 100, 0.2, 1, 1
    heads = range(g * (H // G), (g + 1) * (H // G))

    def attention(t, tokens):
        tokens = sorted(tokens)
        rows = [(keys[b, g, tokens] @ q[b, h, t] / D**0.5).softmax(0) for h in heads]
        return dict(zip(tokens, (sum(rows) / len(rows)).tolist(), strict=True))

    def cut(alive, t):
        total = max(int((t + 1) * budget + 1e-4), 12)
        forced = set(range(4)) | set(range(t - 7, t + 1))
        recent = set(range(t - total // 2 + 1, t + 1))
        order = sorted(alive - forced, key=lambda s: (s not in recent, -mass[s]))
        return forced | set(order[: total - len(forced)])

    mass = dict.fromkeys(range(S), 0.0)
    for t in range(start):
        for s, a in attention(t, range(t + 1)).items():
            mass[s] += a
    alive, steps = cut(set(range(start)), start - 1), []
    for t in range(start, S):
        alive = cut(alive | {t}, t)
        for s, a in attention(t, alive).items():
            mass[s] += a
        steps.append(alive)
    actual = [sets(index)[b][g] for index in through(make_selector("h2o", budget), layer, start)]
    assert actual == steps


def test_snapkv_keeps_what_the_last_queries_vote_for(layer):
    q, keys, positions = layer
    start, b, g = 100, 0, 1
    votes = true_attention(q[:, :, :start], keys[:, :, :start], positions[:, :start])
    votes = votes[b, g, :, start - 32 : start].mean(0).sum(0).tolist()
    padded = [0.0] * 3 + votes + [0.0] * 3
    pooled = {s: sum(padded[s : s + 7]) for s in range(4, start - 8)}
    best = sorted(pooled, key=pooled.get, reverse=True)[:28]
    first = through(make_selector("snapkv", 40), layer, start)[0]
    kept = sets(first)[b][g]
    # one of the prompt's 40 makes room for the new token: the least of the 28, or the one that has
    # just left the window, if it got fewer votes
    assert kept - set(range(92, 101)) - set(range(4)) <= set(best)
    assert len(kept & set(best)) >= 27
    last = sets(through(make_selector("snapkv", 40), layer, start)[-1])[b][g]
    assert len(last & set(range(start))) == 32  # all that is no window, 50 tokens later


def test_snapkv_is_the_same_in_chunks(layer):
    q, keys, positions = layer
    whole, parts = make_selector("snapkv", 40), make_selector("snapkv", 40)
    whole.watch(1, None, q, keys, positions)
    for a, b in ((0, 64), (64, 140), (140, S)):
        parts.watch(1, None, q[:, :, a:b], keys[:, :, :b], positions[:, a:b])
    assert torch.allclose(whole.value[1], parts.value[1], atol=1e-6)


def test_quest_ranks_pages_by_the_bound(layer):
    q, keys, positions = layer
    scores = Quest(0.2).scores(1, q, keys, positions)
    for b, g, t in ((0, 0, 140), (1, 1, 99), (0, 1, 47)):
        heads, full = q[b, g * 3 : g * 3 + 3, t], (t + 1) // 16
        bounds = []
        for page in range(full):
            inside = keys[b, g, 16 * page : 16 * page + 16]
            low, high = inside.amin(0), inside.amax(0)
            bounds.append(max(torch.maximum(h * low, h * high).sum().item() for h in heads))
            assert (inside @ heads.T).max() <= bounds[-1] + 1e-5  # it is a bound
        best = scores[b, g, t, : t + 1].argsort(descending=True).tolist()
        begun = list(range(16 * full, t + 1))
        pages = sorted(range(full), key=bounds.__getitem__, reverse=True)
        assert best == begun + [16 * page + i for page in pages for i in range(16)]


def test_keynorm_and_recency_mean_what_they_say(layer):
    q, keys, positions = layer
    chosen = through(make_selector("keynorm", 25), layer, 149)[0][1, 0, 0]
    norms = keys[1, 0].norm(dim=-1)
    assert set(chosen[12:].tolist()) == set((4 + norms[4:142].argsort()[:13]).tolist())
    chosen = through(make_selector("recency", 25), layer, 149)[0][0, 1, 0]
    assert set(chosen.tolist()) == set(range(4)) | set(range(129, 150))


def test_random_is_seeded():
    table = torch.zeros(1, 2, 200, 4)
    draws = [Random(30, seed=s).scores(1, torch.zeros(1, 4, 1, 4), table, None) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---------------------------------------------------------------------------- measures


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_oracle_holds_the_most_mass_on_every_layer(request, model):
    model = request.getfixturevalue(model)
    torch.manual_seed(3)
    butler = Butler(ButlerConfig.for_model(model)).eval()
    ids = torch.randint(5, model.config.vocab_size, (1, 90))
    recorder, mass = record(model, ids), {}
    for name in NAMES[1:]:
        probe = Probe(make_selector(name, 0.3, butler))
        for i in range(model.config.layers):  # all on the same dense hidden states
            probe(i, recorder.x[i], recorder.q[i], recorder.keys[i], torch.arange(90)[None])
        mass[name] = probe.mass
    for name, others in mass.items():
        assert sorted(others) == list(range(1, model.config.layers))
        for i, share in others.items():
            assert share <= mass["oracle"][i] + 1e-5, f"{name} above the oracle at layer {i}"


def test_the_probe_measures_what_attention_lost(tiny):
    """One layer by hand, head by head; everything selected loses nothing."""
    torch.manual_seed(0)
    ids = torch.randint(5, tiny.config.vocab_size, (1, 60))
    cache, seen = tiny.new_cache(1, 60), {}
    probe = Probe(Oracle(0.5), rank=True, cache=cache)

    def look(layer, x, q, keys, positions):
        seen[layer] = q, keys, probe(layer, x, q, keys, positions)
        return seen[layer][2]

    with torch.no_grad():
        tiny(ids, cache, look)
    q, keys, index = seen[2]
    mass, error, group = [], [], tiny.config.heads // tiny.config.kv_heads
    for h in range(tiny.config.heads):
        g = h // group
        for t in range(60):
            p = (keys[0, g, : t + 1] @ q[0, h, t] / tiny.config.head_dim**0.5).softmax(0)
            kept = [i for i in index[0, g, t].tolist() if i >= 0]
            o, v = p @ cache.v[2][0, g, : t + 1], cache.v[2][0, g]
            sparse = (p[kept] / p[kept].sum()) @ v[kept]
            mass.append(p[kept].sum())
            error.append((sparse - o).norm() / o.norm())
    assert probe.mass[2] == pytest.approx(torch.stack(mass).mean().item(), abs=1e-5)
    assert probe.error[2] == pytest.approx(torch.stack(error).mean().item(), abs=1e-5)
    assert all(abs(rho - 1) < 1e-4 for rho in probe.spearman.values())
    cache = tiny.new_cache(1, 60)
    everything = Probe(Oracle(1.0), cache=cache)
    with torch.no_grad():
        tiny(ids, cache, everything)
    assert all(abs(share - 1) < 1e-5 for share in everything.mass.values())
    assert all(error < 1e-4 for error in everything.error.values())


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-3, 3, width=16)), min_size=3,
                max_size=40))
@settings(max_examples=60, deadline=None)
def test_spearman_is_scipys(pairs):
    a, b = (torch.tensor(x, dtype=torch.float32) for x in zip(*pairs, strict=True))
    if len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2:
        return
    junk = torch.full((5,), 7.0)  # tokens that cannot be seen must not matter
    seen = torch.arange(len(a) + 5) < len(a)
    actual = spearman(torch.cat([a, junk]), torch.cat([b, -junk]), seen)
    assert abs(actual - stats.spearmanr(a, b).statistic) < 1e-4


def test_mark_ignores_empty_slots():
    assert mark(torch.tensor([[2, -1, 0]]), 4).tolist() == [[True, False, True, False]]
