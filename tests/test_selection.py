"""Selections: the budget counts every token, no query sees the future, a block equals steps."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from selection import NAMES, SELECTORS, Budget, Oracle, Selector, make_selector

RULES = {"oracle": {}, "recency": {}, "butler": {}, "butler with neighbours": {"neighbours": 2}}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))


class Fixed(Selector):
    """Scores [B, G, T, S] handed in from outside."""

    def __init__(self, table, budget, **rules):
        super().__init__(budget, **rules)
        self.table = table

    def scores(self, layer, q, keys, positions):
        return self.table


def select(selector, T, S):
    """One call at layer 1 for the last T of S tokens -> [B, G, T, K]"""
    positions = torch.arange(S - T, S)
    return selector(1, torch.zeros(1, T, 4), None, torch.zeros(1, 2, S, 4), positions)


def named(row):
    """One query's indices without empty slots."""
    return row[row >= 0].tolist()


def test_budget_counts_every_token_once():
    scores = torch.arange(100.0).flip(0).expand(1, 2, 1, 100)  # the earlier, the higher
    index = select(Fixed(scores, 20), 1, 100)
    assert index.dtype == torch.int32
    for row in index[0, :, 0]:
        assert sorted(named(row)) == [*range(12), *range(92, 100)]  # 4 sinks + 8 chosen + window


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 8),
       st.floats(0.01, 1.0) | st.integers(2, 120), st.integers(0, 6), st.integers(1, 20))
def test_selection_is_unique_causal_best_and_fills_the_budget(seed, S, T, total, sinks, window):
    T = min(T, S)
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 2, T, S, generator=rng).round(decimals=1)  # with ties
    index = select(Fixed(scores, total, sinks=sinks, window=window), T, S)
    for g in range(2):
        for t in range(T):
            seen = S - T + t + 1
            selected = named(index[0, g, t])
            wanted = int(total) if total > 1 else int(total * seen + 1e-4)
            assert len(selected) == len(set(selected)) == min(seen, max(sinks + window, wanted))
            fixed = set(range(min(sinks, seen))) | set(range(max(0, seen - window), seen))
            assert fixed <= set(selected) <= set(range(seen))
            row = scores[0, g, t]
            chosen = [row[s] for s in set(selected) - fixed]
            others = [row[s] for s in set(range(seen)) - set(selected)]
            assert not chosen or not others or min(chosen) >= max(others)


@pytest.mark.parametrize("total, cached, allowed", [
    (0.1, 1000, 100), (0.1, 50, 12), (0.1, 9, 9), (1.0, 777, 777), (64, 1000, 64), (64, 30, 30),
    (2, 1000, 12), (0.29, 100, 29)])  # 0.29 * 100 is 28.999... in floating point
def test_fractions_and_counts(total, cached, allowed):
    assert Budget(total).allowance(torch.tensor([cached])).tolist() == [allowed]


@pytest.mark.parametrize("rules", [
    {"total": 0}, {"total": -1}, {"total": 1.5}, {"total": float("nan")}, {"total": float("inf")},
    {"total": 0.1, "window": 0}, {"total": 0.1, "sinks": -1}])
def test_nonsense_budgets_are_refused(rules):
    with pytest.raises(UserError) as error:
        Budget(**rules)
    assert "\n" not in str(error.value)
    for name in NAMES if len(rules) == 1 else ():
        with pytest.raises(UserError, match="budget"):
            make_selector(name, rules["total"])


@pytest.mark.parametrize("name", ["butler", *SELECTORS])
def test_short_prompts_and_the_whole_budget_equal_dense(tiny, tiny_butler, ids, name):
    with torch.inference_mode():
        dense = tiny(ids)
        short = tiny(ids[:, :12], None, make_selector(name, 0.1, tiny_butler))
        whole = tiny(ids, None, make_selector(name, 1.0, tiny_butler))
        sparse = tiny(ids, None, make_selector(name, 0.3, tiny_butler))
    assert_close("12 tokens", short, dense[:, :12], 1e-4)
    assert_close("budget 1.0", whole, dense, 1e-4)
    assert (sparse - dense).abs().max() > 0.01


def test_layer_0_alone_is_dense(tiny, ids):
    selector = Oracle(0.3)
    with torch.inference_mode():
        tiny(ids, None, selector)
    assert sorted(selector.index) == [1, 2, 3, 4]


@pytest.mark.parametrize("rules", RULES)
def test_later_tokens_change_nothing_before_them(tiny, tiny_butler, ids, rules):
    other = ids.clone()
    other[:, 70:] = (other[:, 70:] + 1) % 256
    with torch.inference_mode():
        one, two = (tiny(x, None, make_selector(rules.split()[0], 0.3, tiny_butler, **RULES[rules]))
                    for x in (ids, other))
    assert_close("logits", one[:, :70], two[:, :70], 1e-5)
    assert (one[:, 70:] - two[:, 70:]).abs().max() > 0.1


@pytest.mark.parametrize("rules", RULES)
def test_a_block_selects_what_single_steps_select(tiny, tiny_butler, ids, rules):
    logits, selections = [], []
    for sizes in ([60, 1, 2, 27], [60] + [1] * 30):
        selector = make_selector(rules.split()[0], 0.4, tiny_butler, **RULES[rules])
        cache = tiny.new_cache(1, 90)
        parts = ids.split(sizes, dim=1)
        tiny.prefill(parts[0], cache, selector.watch)
        seen = []
        for part in parts[1:]:
            with torch.inference_mode():
                seen.append(tiny(part, cache, selector))
        logits.append(torch.cat(seen, dim=1))
        selections.append({layer: [sorted(named(row)) for row in index[0, :, -1]]
                           for layer, index in selector.index.items()})
    assert_close("logits", *logits, 1e-4)
    assert selections[0] == selections[1]


def test_oracle_selects_the_top_of_the_true_attention_and_nothing_else():
    """Against a softmax written out in float64, one query and KV head at a time."""
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(1, 6, 5, 16, generator=rng)
    keys = torch.randn(1, 2, 80, 16, generator=rng)
    index = Oracle(30)(1, torch.zeros(1, 5, 4), q, keys, torch.arange(75, 80))
    for g in range(2):
        for t in range(5):
            own = 75 + t
            heads = q[0, 3 * g : 3 * g + 3, t].double()
            attention = (heads @ keys[0, g, : own + 1].double().T / 4).softmax(-1).mean(0)
            top = attention[4 : own - 7].topk(18).indices + 4
            expected = {*range(4), *range(own - 7, own + 1), *top.tolist()}
            assert set(named(index[0, g, t])) == expected


def test_recency_and_random_select_what_their_names_say():
    def one_step(name, layer=1, position=99):
        q, keys = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 100, 8)
        selector = make_selector(name, 30)
        return selector(layer, torch.zeros(1, 1, 4), q, keys, torch.tensor([position]))

    assert sorted(named(one_step("recency")[0, 0, 0])) == [0, 1, 2, 3, *range(74, 100)]
    draws = [one_step("random"), one_step("random"), one_step("random", position=98),
             one_step("random", layer=2)]
    assert torch.equal(draws[0], draws[1])  # the same step, the same draw
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert sorted(named(draws[0][0, 0, 0])) != sorted(named(draws[0][0, 1, 0]))


def test_selectors_are_made_by_name(tiny_butler):
    assert make_selector("dense", 0.1) is None
    for name, kind in SELECTORS.items():
        assert type(make_selector(name, 0.1)) is kind
    made = make_selector("butler", 0.1, tiny_butler, interval=4, neighbours=1)
    assert (made.butler, made.interval, made.neighbours) == (tiny_butler, 4, 1)
    with pytest.raises(UserError, match="no butler for this model"):
        make_selector("butler", 0.1)
    with pytest.raises(UserError, match="no --drift; it has --interval, --neighbours"):
        make_selector("butler", 0.1, tiny_butler, drift=0.2)
    with pytest.raises(UserError, match="unknown selector 'magic'; known: dense, butler"):
        make_selector("magic", 0.1)
