"""The documents: what the two splits share (nothing), and whether every dial does what it says."""

import operator
import random
import re
from dataclasses import replace

import pytest

from tasks import coreference
from tasks.evaluation import evaluate

SPLITS = ("train", "test")
KINDS = ("places", "names", "philosophy", "food", "arithmetic")


def both(kind):
    return [entry for split in SPLITS for entry in getattr(coreference.pools(split), kind)]


def documents(**dials):
    return [(split, document) for split in SPLITS
            for document in coreference.coreference_documents(split, 25, seed=3, **dials)]


def words(text):
    return len(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_pools_are_large_and_disjoint(kind):
    entries = both(kind)
    assert len(entries) >= (200 if kind in ("places", "names") else 100)
    assert len(set(entries)) == len(entries)
    train, test = (set(getattr(coreference.pools(split), kind)) for split in SPLITS)
    assert len(train) > len(test) > 0


def test_the_two_tellings_of_a_place_are_each_unique_across_splits():
    for telling in zip(*both("places"), strict=True):
        assert len(set(telling)) == len(telling)


def test_the_custom_of_a_test_place_is_never_trained_on():
    """The half that tells a test place apart occurs in no training place, in either wording."""
    train, settings = coreference.pools("train").places, coreference.PHRASES["places"][0]
    for place in coreference.pools("test").places:
        setting = next(s for s in settings if place.introduction.startswith(s[0]))
        custom = place.introduction.removeprefix(setting[0])
        clause = place.tie_back.removeprefix(setting[1])
        assert not any(p.introduction.endswith(custom) or p.tie_back.endswith(clause)
                       for p in train)


def test_no_name_hides_in_another():
    names = both("names")
    assert not [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()]


def test_names_are_several_tokens(tok):
    lengths = {name: len(tok.encode(" " + name)) for name in both("names")}
    assert not {name: n for name, n in lengths.items() if n < 3}


def test_arithmetic_is_true():
    operators = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
    for sentence in both("arithmetic"):
        a, op, b, c = re.search(r"(\d+) (\w+) (\d+) \w+ (\d+)\.$", sentence).groups()
        assert operators[op](int(a), int(b)) == int(c), sentence


def test_a_seed_fixes_the_documents():
    first = coreference.coreference_documents("test", 5, seed=1, referents=2)
    random.seed(99)  # the global generator must not matter
    assert first == coreference.coreference_documents("test", 5, seed=1, referents=2)
    assert first != coreference.coreference_documents("test", 5, seed=2, referents=2)
    assert len({document.text for document in first}) == 5


@pytest.mark.parametrize("referents, length", [(1, 120), (1, 250), (3, 250), (8, 600), (1, 5000)])
def test_referents_and_words_are_honoured(referents, length):
    for split, document in documents(referents=referents, words=length):
        pools = coreference.pools(split)
        assert sum(name in document.context for name in pools.names) == referents
        assert sum(place.introduction in document.context for place in pools.places) == referents
        assert document.context.count(coreference.CUE) == referents
        assert abs(words(document.context) - length) <= 0.1 * length


@pytest.mark.parametrize("referents", [1, 4])
@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
def test_position_is_honoured(referents, position):
    for _, document in documents(referents=referents, position=position, words=300):
        (start, end), = document.spans
        before, after = words(document.context[:start]), words(document.context[end:])
        # Sentences are not cut, so an introduction may miss its place by about one neighbour.
        assert abs(before / (before + after) - position) < 0.1


def test_by_default_one_referent_comes_first_and_several_are_spread():
    assert all(document.spans[0][0] == 0 for _, document in documents())
    starts = {round(4 * document.spans[0][0] / len(document.context))
              for _, document in documents(referents=4)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("referents", [1, 4])
def test_only_the_span_holds_the_answer(referents):
    for _, document in documents(referents=referents, position=0.5):
        (start, end), = document.spans
        name = document.answer.strip()
        assert document.answer == f" {name}" and name in document.context[start:end]
        assert name not in document.context[:start] + document.context[end:]
        assert name not in document.question
        assert document.text == document.context + document.question + document.answer


@pytest.mark.parametrize("referents", [1, 8])
def test_the_question_rewords_one_introduced_place(referents):
    for split, document in documents(referents=referents, words=400):
        told = [place for place in coreference.pools(split).places
                if place.introduction in document.context]
        asked = [place for place in told if place.tie_back in document.question]
        assert len(asked) == 1
        (start, end), = document.spans
        assert document.context[start:end].startswith(asked[0].introduction)
        assert document.question.endswith(coreference.CUE)
        assert asked[0].introduction[:-1] not in document.question
        # The others differ in both halves: no shared setting, no shared custom.
        settings, customs = ([told for told, _ in half if told in document.context]
                             for half in coreference.PHRASES["places"])
        assert len(settings) == len(customs) == referents


def test_a_tie_back_repeats_few_words_of_its_introduction():
    common = {"a", "an", "and", "the", "of", "in", "by", "is", "are", "from", "with", "where",
              "that", "all", "its", "each", "every", "at", "for", "as", "was", "no"}
    for place in both("places"):
        told, asked = ({*re.findall(r"[a-z]+", text.lower())} - common for text in place)
        assert len(told & asked) <= 1, (place, told & asked)


def test_training_text_varies():
    rng, pools = random.Random(0), coreference.pools("train")
    texts = [coreference.training_text(rng, pools) for _ in range(60)]
    assert {text.count(coreference.CUE) - 1 for text in texts} == {1, 2, 3}
    lengths = sorted(map(words, texts))
    assert 110 < lengths[0] < 180 < 270 < lengths[-1] < 350


@pytest.mark.parametrize("dials", [{"referents": 0}, {"referents": 9}, {"position": 1.5},
                                   {"referents": 8, "words": 50}])
def test_impossible_dials_are_refused(dials):
    with pytest.raises(ValueError):
        coreference.coreference_documents("test", 1, seed=0, **dials)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        coreference.pools("validation")


@pytest.mark.slow
def test_the_marked_span_is_needed_and_suffices(llama, tok):
    documents = coreference.coreference_documents("test", 20, seed=4)
    without, alone = [], []
    for d in documents:
        (start, end), = d.spans
        without.append(replace(d, context=d.context[:start] + d.context[end:], spans=()))
        alone.append(replace(d, context=d.context[start:end], spans=()))
    right = {name: sum(evaluate(llama, tok, ds, ("dense",), ())["dense"]["1.0"][0])
             for name, ds in (("whole", documents), ("without", without), ("alone", alone))}
    assert right["whole"] >= 17 and right["alone"] >= 17 and right["without"] <= 1
