"""The exercises of lessons/: remove a `skip`, see the test fail, make it pass."""

import pytest
import torch
from conftest import assert_close, tiny_config

from bench import Probe, step_bytes
from butler import Butler, ButlerConfig
from model import apply_rope, rope_cos_sin, rope_frequencies
from selection import NAMES, Selector, make_selector
from synth_task import coreference_documents
from train import distillation, record

CACHED = 200  # tokens


@pytest.fixture(scope="module")
def tiny_butler(tiny):
    torch.manual_seed(3)
    config = ButlerConfig.for_model(tiny, layers_per_producer=2, size=8, hidden=16)
    return Butler(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (1, CACHED), generator=torch.Generator().manual_seed(0))


def last_selection(model, ids, selector) -> dict:
    """{layer: selection of the last token}, after a prompt that the selector watched."""
    cache = model.new_cache(1, ids.shape[1])
    model.prefill(ids[:, :-1], cache, selector.watch)
    model.decode(ids[:, -1:], cache, selector)
    return selector.index


class Fixed(Selector):
    """Scores [S] from a table, the same for every layer and head."""

    def __init__(self, table, budget, **rules):
        super().__init__(budget, **rules)
        self.table = table

    def scores(self, layer, q, keys, positions):
        return self.table[: keys.shape[2]].expand(1, keys.shape[1], 1, -1)


@pytest.mark.skip(reason="exercise 1.1, tokens for a share")
def test_how_many_tokens_hold_a_share_of_the_attention():
    from lessons.l1_attention import tokens_for

    attention = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)).pow(4)
    attention = attention / attention.sum(-1, keepdim=True)
    for share in (0.05, 0.5, 0.9):
        counts = torch.as_tensor(tokens_for(share, attention))
        assert counts.shape == (2, 3)
        for row, count in zip(attention.flatten(0, 1), counts.flatten().tolist(), strict=True):
            largest = sorted(row.tolist(), reverse=True)
            assert sum(largest[:count]) >= share > sum(largest[: count - 1])


@pytest.mark.skip(reason="exercise 1.2, budgets per layer")
def test_adaptive_budgets_keep_more_with_the_same_total(llama, tok):
    documents = coreference_documents("test", 2, seed=5)
    text = " ".join(f"{d.context}{d.question} {d.answer}" for d in documents)
    ids = torch.tensor([tok.encode(text)[:600]])
    kept, attended = {}, {}
    for name in ("oracle", "adaptive"):
        cache, selector = llama.new_cache(1, 600), make_selector(name, 0.1)
        probe, shares, sizes = Probe(selector), [], []
        llama.prefill(ids[:, :580], cache, selector.watch)
        for t in range(580, 600):
            llama.decode(ids[:, t : t + 1], cache, probe)
            shares.append(probe.mean())
            sizes.append([(index >= 0).sum().item() for index in selector.index.values()])
        kept[name], attended[name] = sum(shares) / len(shares), torch.tensor(sizes)
    assert attended["adaptive"].sum() <= attended["oracle"].sum()
    assert len(attended["adaptive"][-1].unique()) > 3  # layers differ
    assert kept["adaptive"] > kept["oracle"] + 0.001, kept


@pytest.mark.skip(reason="exercise 2.1, a selector of your own")
def test_stride_spreads_its_choice_evenly(tiny, ids):
    assert "stride" in NAMES
    for budget in (0.2, 0.35, 64):
        for index in last_selection(tiny, ids, make_selector("stride", budget)).values():
            total = int(CACHED * budget + 1e-4) if budget <= 1 else budget
            for selected in index[0, :, 0]:
                selected = selected.sort().values
                assert len(selected.unique()) == total and selected.min() >= 0
                gaps = selected[4:-8].diff()  # between sinks and window
                assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
                assert (gaps.max() + 1) * (total - 12) >= CACHED - 12 - gaps.max()  # to both ends


@pytest.mark.skip(reason="exercise 2.2, maximum over heads")
def test_the_widest_oracle_asks_the_head_that_cares_most():
    keys = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(1))
    q = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(2))
    selector = make_selector("widest", 20)
    chosen = selector.choose(1, q, keys, torch.tensor([59]))[0, :, 0]
    for g in range(2):
        heads = (q[0, 2 * g : 2 * g + 2, 0] @ keys[0, g].T / 4).softmax(-1).amax(0)
        assert set(chosen[g].tolist()) == set((heads[4:52].topk(8).indices + 4).tolist())


@pytest.mark.skip(reason="exercise 3.1, four bits")
def test_importance_keys_fit_in_4_bits(tiny, tiny_butler, ids):
    selector = tiny_butler.selector(0.3, bits=4)
    small = last_selection(tiny, ids, selector)
    exact = last_selection(tiny, ids, tiny_butler.selector(0.3))
    held = selector.keys[1]
    assert held.dtype == torch.uint8 and held.shape[-1] == 4  # two of 8 channels in a byte
    same = total = 0
    for layer, index in small.items():
        for a, b in zip(index[0, :, 0].tolist(), exact[layer][0, :, 0].tolist(), strict=True):
            same, total = same + len(set(a) & set(b)), total + len(b)
    assert 0.8 < same / total < 1


@pytest.mark.skip(reason="exercise 3.2, directions for queries")
def test_two_matrices_give_the_best_scores_of_their_size():
    from lessons.l3_sketch import directions_for

    rng = torch.Generator().manual_seed(0)
    lengths = torch.logspace(1, -1, 16)
    queries = torch.randn(30, 16, generator=rng) * lengths.flip(0)  # short where keys are long
    keys = torch.randn(40, 16, generator=rng) * lengths
    scores = queries @ keys.T
    left = torch.linalg.svdvals(scores).square()  # the smallest error is the sum of the last ones
    for size in (2, 5, 10):
        A, B = directions_for(keys, queries, size)
        assert A.shape == B.shape == (16, size)
        error = ((queries @ A) @ (keys @ B).T - scores).square().sum()
        assert_close(f"{size} numbers", error / left[size:].sum(), 1.0, 1e-2)


@pytest.mark.skip(reason="exercise 4.1, the query before")
def test_a_selector_may_use_the_query_of_the_step_before(tiny, ids):
    assert "before" in NAMES
    cache, selector = tiny.new_cache(1, CACHED), make_selector("before", 30)
    recorder = record(tiny, ids, torch.arange(CACHED))  # the queries of dense attention
    tiny.prefill(ids[:, :-3], cache, selector.watch)
    for t in range(CACHED - 3, CACHED):
        tiny.decode(ids[:, t : t + 1], cache, selector)
        # The input of layer 1 does not depend on what was selected.
        q, keys = recorder.q[1][0, :, t - 1], recorder.keys[1][0, :, : t + 1]
        for g in range(2):
            weights = (q[2 * g : 2 * g + 2] @ keys[g, :t].T / 4).softmax(-1).mean(0)
            best = (weights[4 : t - 7].topk(18).indices + 4).tolist()
            assert set(selector.index[1][0, g, 0].tolist()[12:]) == set(best)


@pytest.mark.skip(reason="exercise 4.2, temperature")
def test_a_temperature_divides_the_students_scores(tiny, tiny_butler, ids):
    recorder, some = record(tiny, ids, torch.arange(CACHED)), torch.tensor([40, 120, 199])
    softer = Butler(tiny_butler.config)
    softer.load_state_dict(tiny_butler.state_dict())
    for producer in softer.producers.values():
        producer.out.weight.data /= 2.5
    with torch.no_grad():
        expected = distillation(softer, recorder, some)
        actual = distillation(tiny_butler, recorder, some, temperature=2.5)
        assert (expected - distillation(tiny_butler, recorder, some)).abs().max() > 1e-3
    assert_close("divergence", actual, expected, 1e-5)


@pytest.mark.skip(reason="exercise 5.1, prefer recent tokens")
def test_a_score_falls_with_the_distance(tiny, tiny_butler, ids):
    selector = tiny_butler.selector(0.2, fade=0.02)
    selected = last_selection(tiny, ids, selector)
    default = last_selection(tiny, ids, tiny_butler.selector(0.2))
    for layer, index in selected.items():
        scores = tiny_butler.scores(selector.queries[layer], selector.keys[layer])[0, :, 0]
        scores = scores - 0.02 * torch.arange(CACHED - 1, -1, -1)
        best = scores[:, 4 : CACHED - 8].topk(28).indices + 4
        for g in range(2):
            assert set(best[g].tolist()) == set(index[0, g, 0].tolist()[12:])
    assert any(not torch.equal(index, default[layer]) for layer, index in selected.items())


@pytest.mark.skip(reason="exercise 5.2, moved keys")
def test_a_rotated_key_can_be_moved():
    from lessons.l5_position import moved

    rng = torch.Generator().manual_seed(0)
    frequencies = rope_frequencies(tiny_config())
    raw = torch.randn(1, 2, 20, 16, generator=rng)
    positions = torch.arange(100, 120)
    keys = apply_rope(raw, *rope_cos_sin(positions, frequencies))
    for by in (-100, -1, 0, 37):
        expected = apply_rope(raw, *rope_cos_sin(positions + by, frequencies))
        assert_close(f"by {by}", moved(keys, by, frequencies), expected, 1e-4)


@pytest.mark.skip(reason="exercise 6.1, pages")
def test_pages_are_chosen_by_their_best_token(tiny, ids):
    table = torch.rand(CACHED, generator=torch.Generator().manual_seed(2))
    for budget in (40, 60, 62):
        for index in last_selection(tiny, ids, Fixed(table, budget, page=4)).values():
            selected = index[0, 0, 0]
            assert len(selected.unique()) == budget and selected.min() >= 0
            pages = table[4 : CACHED - 8].view(-1, 4).amax(1)  # between sinks and window
            whole = (budget - 12) // 4
            best = set((pages.topk(whole).indices + 1).tolist())
            counts = torch.bincount(selected[12:] // 4)
            assert {p for p, n in enumerate(counts.tolist()) if n == 4} == best
            assert (counts > 0).sum() == whole + ((budget - 12) % 4 > 0)


@pytest.mark.skip(reason="exercise 6.2, the length for a speedup")
def test_bytes_tell_from_which_length_a_step_is_so_much_cheaper(tiny, tiny_butler):
    from lessons.l6_cost import length_for

    def ratio(context, kept):
        cache = tiny.new_cache(1, 1)
        dense = step_bytes(tiny, cache, None, 1, context)
        return dense / step_bytes(tiny, cache, tiny_butler.selector(kept), 1, context)

    for speedup, kept in ((1.2, 0.1), (1.5, 0.05), (2.0, 0.1)):
        length = length_for(speedup, tiny, tiny_butler, kept)
        assert ratio(length, kept) >= speedup
        assert all(ratio(shorter, kept) < speedup for shorter in range(length - 50, length))
    assert length_for(20.0, tiny, tiny_butler, 0.1) is None  # layer 0 alone costs a fifth


@pytest.mark.skip(reason="exercise 7.1, neighbours to the right")
def test_a_token_brings_those_that_follow_it():
    scores = torch.zeros(1, 1, 1, 60)
    scores[..., 20], scores[..., 40], scores[..., 51] = 9.0, 8.0, 7.0
    for K, expected in ((3, {20, 21, 22}), (5, {20, 21, 22, 40, 41}),
                        (7, {20, 21, 22, 40, 41, 42, 51})):
        selector = Selector(4 + 8 + K, follow=2)
        assert set(selector.budget.topk(scores, torch.tensor([59])).flatten().tolist()) == expected
    scores[..., 22] = 8.5  # it is chosen already, but it brings 23 and 24
    chosen = Selector(4 + 8 + 6, follow=2).budget.topk(scores, torch.tensor([59]))
    assert set(chosen.flatten().tolist()) == {20, 21, 22, 23, 24, 40}


@pytest.mark.skip(reason="exercise 7.2, rank of the dense choice")
def test_the_rank_of_the_token_that_dense_would_choose():
    from lessons.l7_loss import ranks

    rng = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(2, 12, 40, generator=rng)
    sparse[:6] = dense[:6] + 0.3 * sparse[:6]
    expected = [sorted(b.tolist(), reverse=True).index(b[a.argmax()].item())
                for a, b in zip(dense, sparse, strict=True)]
    assert torch.as_tensor(ranks(dense, sparse)).tolist() == expected
    assert 0 in expected and max(expected) > 5
