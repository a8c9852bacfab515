"""Co-reference documents, and answers scored against plain greedy decoding."""

import hashlib
import operator
import random
import re

import pytest
import torch
from conftest import randomise, tiny_config
from scipy import stats

import synth_task
from cli import UserError
from model import Llama
from selection import make_selector
from synth_task import (
    CUE,
    PHRASES,
    Document,
    answers,
    confidence_interval,
    coreference_documents,
    every_maker,
    num_words,
    pools,
    training_text,
)
from workshop.written import Copied, Written

KINDS = ("places", "names", "philosophy", "food", "arithmetic")


def of_both_splits(kind):
    return [entry for split in ("train", "test") for entry in getattr(pools(split), kind)]


def documents(**options):
    return [(split, document) for split in ("train", "test")
            for document in coreference_documents(split, 25, seed=3, **options)]


# ---------------------------------------------------------------------------- documents


def test_golden_documents():
    """All recorded results are of these documents."""
    (document,) = coreference_documents("train", 1, seed=7, referents=2, words=60)
    assert document == Document(
        "A university city behind old stone walls stores ice in deep cellars all summer. The place "
        "is called Brirendal. A market town at the meeting of two rivers holds a race on stilts "
        "each spring. The place is called Drukestia. Seen from a distance, hope ties the present "
        "to what came before it. A stew of lentils is sold from small carts beside the road.",
        "\n\nQuestion: Which place was described above as the seat of learning within its "
        "ramparts, with frozen water kept underground? The place is called", "Brirendal")
    found = [hashlib.sha256(f"{d.context}|{d.question}|{d.answer}".encode()).hexdigest()[:16]
             for d in (*coreference_documents("test", 2, seed=0),
                       *coreference_documents("test", 1, seed=5, position=0.5, referents=2))]
    assert found == ["df0e21167faab0cd", "3b96b4bc7d5cb1ee", "846eed11b800833f"]


def test_a_seed_fixes_the_documents():
    first = coreference_documents("test", 5, seed=1, referents=2)
    random.seed(99)  # the global generator must not matter
    assert first == coreference_documents("test", 5, seed=1, referents=2)
    assert first != coreference_documents("test", 5, seed=2, referents=2)
    assert len({document.context for document in first}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_pools_are_large_and_disjoint(kind):
    entries = of_both_splits(kind)
    assert len(entries) >= (200 if kind in ("places", "names") else 100)
    assert len(set(entries)) == len(entries)
    assert len(getattr(pools("train"), kind)) > len(getattr(pools("test"), kind)) > 0


def test_custom_of_a_test_place_is_never_trained_on():
    """The half that tells a test place apart is in no training place, in either wording."""
    for setting in PHRASES["places"][0]:
        for place in pools("test").places:
            if not place.introduction.startswith(setting[0]):
                continue
            custom = place.introduction.removeprefix(setting[0])
            clause = place.tie_back.removeprefix(setting[1])
            assert not any(other.introduction.endswith(custom) or other.tie_back.endswith(clause)
                           for other in pools("train").places)


def test_names_are_several_tokens_and_none_is_part_of_another(tok):
    names = of_both_splits("names")
    assert min(len(tok.encode(f" {name}")) for name in names) >= 3
    assert not [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()]


def test_arithmetic_is_true():
    operators = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
    for sentence in of_both_splits("arithmetic"):
        a, op, b, c = re.search(r"(\d+) (\w+) (\d+) \w+ (\d+)\.$", sentence).groups()
        assert operators[op](int(a), int(b)) == int(c), sentence


@pytest.mark.parametrize("referents, words", [(1, 120), (1, 250), (3, 250), (8, 600), (1, 5000)])
def test_referents_and_words_are_honoured(referents, words):
    for split, document in documents(referents=referents, words=words):
        own = pools(split)
        assert sum(name in document.context for name in own.names) == referents
        told = [place for place in own.places if place.introduction in document.context]
        asked = [place for place in told if place.tie_back in document.question]
        assert len(told) == document.context.count(CUE) == referents
        assert len(asked) == 1 and document.question.endswith(CUE)
        assert f"{asked[0].introduction} {CUE} {document.answer}." in document.context
        assert document.context.count(document.answer) == 1
        assert document.answer not in document.question
        assert abs(num_words(document.context) - words) <= 10  # half of the longest sentence


@pytest.mark.parametrize("referents", [1, 4])
@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
def test_position_is_honoured(referents, position):
    for _, document in documents(referents=referents, position=position, words=300):
        before, after = map(num_words, document.context.split(document.answer))
        # Sentences are not cut, so an introduction may miss its place by about one neighbour.
        assert abs(before / (before + after) - position) < 0.15


def test_by_default_one_place_comes_first_and_several_are_spread():
    assert all(document.context.find(CUE) < 120 for _, document in documents())
    starts = {round(4 * document.context.find(document.answer) / len(document.context) - 0.25)
              for _, document in documents(referents=4)}
    assert starts == {0, 1, 2, 3}


def test_training_text_varies():
    rng = random.Random(0)
    texts = [training_text(rng, pools("train")) for _ in range(60)]
    assert {text.count(CUE) - 1 for text in texts} == {1, 2, 3}
    lengths = sorted(map(num_words, texts))
    assert 110 < lengths[0] < 180 < 270 < lengths[-1] < 350


@pytest.mark.parametrize("options", [{"referents": 0}, {"referents": 9}, {"position": 1.5},
                                     {"referents": 8, "words": 50}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        coreference_documents("test", 1, seed=0, **options)
    with pytest.raises(ValueError, match="split"):
        pools("validation")


# ---------------------------------------------------------------------------- tokens


def test_parts_are_cut_from_the_joined_text(tok):
    class Blank:  # like SentencePiece: a blank before everything
        bos = [1]

        def encode(self, text):
            return [ord(c) for c in " " + text]

    assert Document("ab", "c", "d").encode(Blank()) == [[1, 32, 97, 98], [99], [32, 100]]
    straddling = Document("A do", "g barks.", "Why?")  # "dog" is one token
    assert straddling.encode(tok) == [tok.encode("A do"), tok.encode("g barks."),
                                      tok.encode(" Why?")]
    for document in coreference_documents("test", 5, seed=1):
        joined = f"{document.context}{document.question} {document.answer}"
        assert sum(document.encode(tok), []) == tok.encode(joined)


class Letters:
    """One token per character; blanks are none."""

    bos = [1]
    special = {}

    def encode(self, text):
        return [ord(c) - 256 for c in text if c != " "]


def letters(ids):
    return "".join(chr(256 + i) for i in ids)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(256, (100,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("protocol", ["sparse", "prefill"])
@pytest.mark.parametrize("name, rules", [
    ("dense", {}), ("oracle", {}), ("recency", {}), ("butler", {}), ("butler", {"interval": 3})])
def test_an_answer_is_right_if_the_model_writes_it(tiny, tiny_butler, ids, name, rules, protocol):
    """What a plain loop writes, token by token, is scored 1 as a block and in single steps."""
    context, question = ids[:80], ids[80:]
    dense = [1, *context] + (question[:-1] if protocol == "prefill" else [])
    selector = make_selector(name, 0.3, tiny_butler, **rules)
    cache = tiny.new_cache(1, 130)
    tiny.prefill(torch.tensor([dense]), cache, selector and selector.watch)
    for token in [1, *ids][len(dense) :]:
        logits = tiny.decode(torch.tensor([[token]]), cache, selector)
    written = []
    for _ in range(6):
        written.append(int(logits.argmax()))
        logits = tiny.decode(torch.tensor([written[-1:]]), cache, selector)
    wrong = written[:5] + [(written[5] + 1) % 256]
    makers = every_maker([name], ["0.3"], tiny_butler, **rules).values()
    for stepwise in (True, False)[: 1 if rules else 2]:
        for answer, score in (written, 1.0), (wrong, 0.0):
            document = Document(letters(context), letters(question), letters(answer))
            assert answers(tiny, Letters(), document, makers, protocol, stepwise) == [score]


@pytest.mark.parametrize("protocol, first", [("sparse", 81), ("prefill", 100)])
def test_protocols_say_where_the_selection_begins(tiny, ids, protocol, first):
    watched, selected = [], []

    class Spy:
        def watch(self, layer, x, q, keys, positions):
            watched.extend(positions.tolist() if layer == 0 else [])

        def __call__(self, layer, x, q, keys, positions):
            selected.extend(positions.tolist() if layer == 0 else [])

    document = Document(letters(ids[:80]), letters(ids[80:]), letters([7, 8, 9]))
    answers(tiny, Letters(), document, [Spy], protocol)
    assert watched == list(range(first))
    assert selected == list(range(first, 103))  # the last token of the answer is not fed


def test_scores_of_the_default_model_are_those_of_greedy_decoding(llama, tok):
    found = []
    for document in coreference_documents("test", 2, seed=6, words=90):
        (score,) = answers(llama, tok, document, [lambda: None])
        answer = tok.encode(f" {document.answer}")
        ids = tok.encode(document.context + document.question)
        right = True
        for token in answer:  # without a cache
            with torch.inference_mode():
                ids.append(int(llama(torch.tensor([ids]), last=True).argmax()))
            right = right and ids[-1] == token
            if not right:
                break
        assert score == right
        found.append(score)
    assert set(found) == {0, 1}


def test_documents_beyond_the_context_are_refused(tiny, ids):
    document = Document(letters(ids * 21), letters(ids), "Ā")
    with pytest.raises(UserError, match="2201 tokens exceed the model's context of 2048"):
        answers(tiny, Letters(), document, [lambda: None])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Document, Copied, Written])
def test_damaged_weights_are_no_wrong_answers(ids, number, kind):
    """Forced or written, an answer gets no score from logits that are not finite."""
    llama = randomise(Llama(tiny_config(layers=2)))
    llama.norm.weight[3] = number
    document = kind(letters(ids[:40]), letters(ids[40:50]), letters([7, 8]))
    for protocol in "sparse", "prefill":
        with pytest.raises(UserError, match="^the model's logits are not finite"):
            answers(llama, Letters(), document, [lambda: None], protocol)


def test_a_seed_counts_once():
    assert synth_task.numbers_or_zero(("0", "00", "7", "0")) == [0, 7]


# ---------------------------------------------------------------------------- intervals, script


def test_the_bootstrap_brackets_the_mean():
    m = confidence_interval([1.0] * 30 + [0.0] * 70, proportion=True)
    exact = stats.binomtest(30, 100).proportion_ci(0.95, "exact")
    assert (m["mean"], m["n"]) == (0.3, 100)
    assert m["low"] == pytest.approx(exact.low, abs=0.02)
    assert m["high"] == pytest.approx(exact.high, abs=0.02)


def test_equal_scores_are_no_certainty():
    for score, side in ((1.0, "low"), (0.0, "high")):
        exact = stats.binomtest(int(5 * score), 5).proportion_ci(0.95, "exact")
        m = confidence_interval([score] * 5, proportion=True)
        assert m[side] == pytest.approx(getattr(exact, side)) and m["mean"] == score
    assert confidence_interval([2.5] * 5) == {"mean": 2.5, "low": 2.5, "high": 2.5, "n": 5}


def test_script_reports_every_task_selector_and_budget(main):
    report = main("synth_task.py", "--n", 1, "--seeds", "0,1", "--context", "150,200",
                  "--selectors", "dense,butler,recency", "--budgets", "0.2,64")
    assert report["config"]["budgets"] == ["0.2", "64"]
    assert list(report["results"]) == ["coreference@150", "coreference@200"]
    for table in report["results"].values():
        assert {name: list(row) for name, row in table.items()} == {
            "dense": ["1.0"], "butler": ["0.2", "64"], "recency": ["0.2", "64"]}
        for row in table.values():
            for m in row.values():
                assert m["n"] == 2 and 0 <= m["low"] <= m["mean"] <= m["high"] <= 1


@pytest.mark.parametrize("flags, stepwise", [({}, False), ({"interval": 4}, True),
                                             ({"neighbours": 1}, True)])
def test_rules_that_reuse_a_choice_run_step_by_step(in_memory, monkeypatch, flags, stepwise):
    asked = []

    def spy(llama, tok, document, makers, protocol, stepwise, prefill_budget):
        selectors = [make() for make in makers]
        asked.append((stepwise, selectors[0].interval, selectors[0].neighbours))
        return [1.0 for _ in selectors]

    monkeypatch.setattr(synth_task, "answers", spy)
    synth_task.main(synth_task.Config(n=1, selectors=("butler",), **flags))
    assert asked == [(stepwise, flags.get("interval", 1), flags.get("neighbours", 0))]


@pytest.mark.parametrize("flags, message", [
    ({"question": "never"}, "unknown --question 'never'"), ({"task": ("magic",)}, "unknown task"),
    ({"selectors": ("magic",)}, "unknown selector 'magic'"), ({"seeds": ("a",)}, "--seeds"),
    ({"budgets": ("7.5",)}, "budget 7.5"), ({"budgets": ("a",)}, "--budgets: a"),
    ({"seeds": ("²",)}, "--seeds"), ({"seeds": ("9" * 5000,)}, "--seeds: 999"),
    ({"context": ("0",)}, "--context: 0"), ({"context": ("8193",)}, "--context 8193.* is 8192"),
    ({"context": ("200", "99999999"), "task": ("copy",)}, "--context 99999999"),
    ({"engine": "steam"}, "unknown engine 'steam'"),
    ({"drift": 0.2, "engine": "plain"}, "no --drift")])
def test_nonsense_is_refused_in_one_line(in_memory, flags, message):
    with pytest.raises(UserError, match=message) as error:
        synth_task.main(synth_task.Config(n=1, **flags))
    assert "\n" not in str(error.value)
