"""The exercises of README.md: take a `skip` away, see the test fail, make it pass."""

import pytest
import torch
from conftest import assert_close

from baselines import make_selector
from butler import Butler, ButlerConfig
from measure.probe import Probe, mean
from selection import Selector
from tasks.coreference import coreference_documents
from train import distillation, record

CACHED = 200  # tokens


@pytest.fixture(scope="module")
def butler(tiny):
    torch.manual_seed(3)
    return Butler(ButlerConfig.for_model(tiny, stride=2, size=8, hidden=16)).eval()


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (1, CACHED), generator=generator)


def last_step(model, ids, selector) -> dict:
    """{layer: the choice of the last token alone}, behind a prompt that the selector watched."""
    cache = model.new_cache(1, ids.shape[1])
    model.prefill(ids[:, :-1], cache, selector.watch)
    model.decode(ids[:, -1:], cache, selector)
    return selector.index


class Fixed(Selector):
    """Scores [S] handed in from outside."""

    def __init__(self, table, budget, **rules):
        super().__init__(budget, **rules)
        self.table = table

    def scores(self, layer, q, keys, positions):
        return self.table[: keys.shape[2]].expand(1, keys.shape[1], 1, -1)


@pytest.mark.skip(reason="exercise 1: a selector of your own")
def test_stride_spreads_its_choice_evenly(tiny, ids):
    from baselines import NAMES

    assert "stride" in NAMES
    for budget in (0.2, 0.35, 64):
        for index in last_step(tiny, ids, make_selector("stride", budget)).values():
            total = int(CACHED * budget + 1e-4) if budget <= 1 else budget
            for kept in index[0, :, 0]:
                kept = kept.sort().values
                assert len(kept.unique()) == total and kept.min() >= 0
                gaps = kept[4:-8].diff()  # between the sinks and the window
                assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
                assert (gaps.max() + 1) * (total - 12) >= CACHED - 12 - gaps.max()  # to both ends


@pytest.mark.skip(reason="exercise 2: neighbours to the right")
def test_a_token_brings_those_that_follow_it():
    scores, newest = torch.zeros(1, 1, 1, 60), torch.tensor([[59]])
    scores[..., 20], scores[..., 40], scores[..., 51] = 9.0, 8.0, 7.0
    for K, expected in ((3, {20, 21, 22}), (5, {20, 21, 22, 40, 41}),
                        (7, {20, 21, 22, 40, 41, 42, 51})):
        selector = Selector(budget=4 + 8 + K, follow=2)
        assert set(selector.choose(scores, newest).flatten().tolist()) == expected


@pytest.mark.skip(reason="exercise 3: a softer student")
def test_a_temperature_divides_the_students_scores(tiny, butler, ids):
    seen, some = record(tiny, ids), torch.tensor([40, 120, 199])
    softer = Butler(butler.config)
    softer.load_state_dict(butler.state_dict())
    for producer in softer.producers.values():
        producer.out.weight.data /= 2.5
    with torch.no_grad():
        expected = distillation(softer, seen, some)
        actual = distillation(butler, seen, some, temperature=2.5)
        assert (expected - distillation(butler, seen, some)).abs().max() > 1e-3
    assert_close("divergence", actual, expected, 1e-5)


@pytest.mark.skip(reason="exercise 4: a taste for the recent")
def test_a_score_loses_with_the_distance(tiny, butler, ids):
    selector, differs = butler.selector(0.2, fade=0.02), False
    chosen = last_step(tiny, ids, selector)
    default = last_step(tiny, ids, butler.selector(0.2))
    for layer, index in chosen.items():
        keys = selector.importance.layer(layer).floats()[..., : CACHED - 1, :]
        scores = butler.scores(selector.queries[layer], keys)[0, :, 0]  # [G, S]
        scores = scores - 0.02 * torch.arange(CACHED - 1, 0, -1)
        best = scores[:, 4 : CACHED - 8].topk(28).indices + 4
        for g in range(2):
            assert len(set(best[g].tolist()) & set(index[0, g, 0].tolist()[12:])) >= 27
        differs |= not torch.equal(index, default[layer])
    assert differs
    recent = last_step(tiny, ids, butler.selector(0.2, fade=100.0))
    for index in recent.values():
        assert sorted(index[0, 0, 0].tolist()) == [0, 1, 2, 3, *range(CACHED - 36, CACHED)]


@pytest.mark.skip(reason="exercise 5: four bits")
def test_importance_keys_fit_in_4_bits(tiny, butler, ids):
    selector = butler.selector(0.3, bits=4)
    small = last_step(tiny, ids, selector)
    exact = last_step(tiny, ids, butler.selector(0.3))
    held = selector.importance.numbers
    assert held.dtype == torch.uint8 and held.shape[-2] == butler.config.size // 2  # two to a byte
    same, total = 0, 0
    for layer, index in small.items():
        for a, b in zip(index[0, :, 0].tolist(), exact[layer][0, :, 0].tolist(), strict=True):
            same, total = same + len(set(a) & set(b)), total + len(b)
    assert 0.8 < same / total < 1


@pytest.mark.skip(reason="exercise 6: whole pages")
def test_pages_are_chosen_by_their_best_token(tiny, ids):
    table = torch.rand(CACHED, generator=torch.Generator().manual_seed(2))
    for budget in (40, 60, 62):
        for index in last_step(tiny, ids, Fixed(table, budget, page=4)).values():
            kept = index[0, 0, 0]
            assert len(kept.unique()) == budget and kept.min() >= 0
            chosen = kept[12:]
            pages = table[4 : CACHED - 8].view(-1, 4).amax(1)  # between sinks and window
            whole = (budget - 12) // 4
            best = set((pages.topk(whole).indices + 1).tolist())
            counts = torch.bincount(chosen // 4)
            assert {p for p, n in enumerate(counts.tolist()) if n == 4} == best
            assert (counts > 0).sum() == whole + ((budget - 12) % 4 > 0)
    index = last_step(tiny, ids, Fixed(table, 40))[1][0, 0, 0, 12:]  # and without the rule
    assert set(index.tolist()) == set((table[4 : CACHED - 8].topk(28).indices + 4).tolist())


@pytest.mark.skip(reason="exercise 7: the head that cares most")
def test_the_widest_oracle_asks_the_head_that_cares_most(tiny, ids):
    keys = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(1))
    q = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(2))
    selector, newest = make_selector("widest", 20), torch.tensor([[59]])
    chosen = selector.choose(selector.scores(1, q, keys, newest), newest)[0, :, 0]
    for g in range(2):
        heads = (q[0, 2 * g : 2 * g + 2, 0] @ keys[0, g].T / 4).softmax(-1).amax(0)
        assert set(chosen[g].tolist()) == set((heads[4:52].topk(8).indices + 4).tolist())


@pytest.mark.skip(reason="exercise 8: budgets where attention is wide")
def test_adaptive_budgets_keep_more_with_the_same_total(llama, tok):
    text = " ".join(document.text for document in coreference_documents("test", 2, seed=5))
    ids = torch.tensor([tok.encode(text)[:600]])
    kept, attended = {}, {}
    for name in ("oracle", "adaptive"):
        cache, selector = llama.new_cache(1, 600), make_selector(name, 0.1)
        probe, masses, sizes = Probe(selector), [], []
        llama.prefill(ids[:, :580], cache, selector.watch)
        for t in range(580, 600):
            llama.decode(ids[:, t : t + 1], cache, probe)
            masses.append(mean(probe.mass))
            sizes.append([(i >= 0).sum().item() for i in selector.index.values()])
        kept[name], attended[name] = sum(masses) / len(masses), torch.tensor(sizes)
    assert attended["adaptive"].sum() <= attended["oracle"].sum()
    assert len(attended["adaptive"][-1].unique()) > 3  # layers differ
    assert kept["adaptive"] > kept["oracle"] + 0.001, kept
