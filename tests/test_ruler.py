"""RULER-style tasks: every document keeps the rules of its task, whatever its length."""

import random
import re
from collections import Counter

import pytest
import torch

from tasks import ruler
from tasks.corpus import default_texts, hold_out

NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.(?!\S)")
SINGLE = ("needle_noise", "needle_prose", "needle_uuid", "multikey", "multikey_needles",
          "multikey_uuid")


@pytest.fixture(scope="module")
def count(tok):
    return lambda text: len(tok.encode(text))


@pytest.fixture(scope="module")
def make(count):
    """make(task, length, seed) -> Document, each made once."""
    made = {}

    def make(task, length=1024, seed=0):
        if (task, length, seed) not in made:
            made[task, length, seed] = ruler.TASKS[task](random.Random(seed), length, count)
        return made[task, length, seed]

    return make


def marked(document):
    return [document.context[start:end] for start, end in document.spans]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_seed_is_a_document(task, make, count):
    again = ruler.TASKS[task](random.Random(0), 1024, count)
    assert again == make(task)
    assert again.context != make(task, seed=1).context


@pytest.mark.parametrize("task, length",
                         [(task, length) for task in ruler.TASKS for length in (1024, 2048, 4096)]
                         + [("needle_prose", 8192), ("common_words", 8192)])
def test_a_document_fills_its_length_and_no_more(task, length, make, count):
    document = make(task, length)
    room = length - (document.new_tokens or count(document.answer))
    size = count(document.context + document.question)
    unit = 80 if task == "multikey_uuid" else 40  # tokens of one needle or of a long sentence
    assert size <= room
    assert size >= min(0.97 * room, room - unit), (size, room)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_shape(task, make):
    document = make(task)
    assert document.question[0] == "\n" and not document.question[-1].isspace()
    assert not any(answer[0].isspace() for answer in document.answers)
    assert (document.new_tokens > 0) == (document.scoring == "all")
    assert document.scoring == "all" or len(document.answers) == 1
    assert document.spans == tuple(sorted(document.spans)) and document.spans


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_few_tokens_are_refused(task, count):
    with pytest.raises(ValueError, match="^50 tokens are too few: this task needs "):
        ruler.TASKS[task](random.Random(0), 50, count)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="too many: there are 4800 keys"):
        ruler.TASKS["multikey_needles"](random.Random(0), 200_000, len)
    with pytest.raises(ValueError, match="too many: there are \\d+ words"):
        ruler.TASKS["common_words"](random.Random(0), 100_000, lambda text: len(text.split()))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", [*SINGLE, "multivalue", "multiquery"])
def test_needles(task, length, make):
    document = make(task, length)
    needles = NEEDLE.findall(document.context)
    values = [value for _, value in needles]
    assert len(set(values)) == len(values)
    expected = {"multikey": 4, "multivalue": 4, "multiquery": 4}
    if task in ("multikey_needles", "multikey_uuid"):
        assert len(needles) >= 10 and len({key for key, _ in needles}) == len(needles)
        assert document.context.count("\n") == len(needles)  # nothing but needles
    else:
        assert len(needles) == expected.get(task, 1)
    asked = {key for key, _ in needles if key in document.question}
    assert len(asked) == (4 if task == "multiquery" else 1)
    assert sorted(document.answers) == sorted(v for key, v in needles if key in asked)
    assert len(document.answers) == (4 if task in ("multivalue", "multiquery") else 1)
    for answer in document.answers:
        assert document.context.count(answer) == 1
        assert re.fullmatch(r"\d{7}|[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", answer)
    assert sorted(NEEDLE.fullmatch(text)[2] for text in marked(document)) == sorted(
        document.answers)


def test_needles_lie_at_every_depth(make):
    depths = [d.spans[0][0] / len(d.context) for d in
              (make("needle_noise", 512, seed) for seed in range(60))]
    assert min(depths) < 0.15 and max(depths) > 0.9 and 0.4 < sum(depths) / 60 < 0.75


@pytest.mark.parametrize("length", [1024, 4096])
def test_the_chain_of_variables(length, make):
    document = make("variable_tracking", length)
    told = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document.context)
    names = [name for name, _ in told]
    assert tuple(names) == document.answers and len(set(names)) == 5
    assert all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
    value = told[0][1]
    assert [held for _, held in told] == [value, *names[:-1]]
    assert re.fullmatch(r"\d{5}", value) and document.question.count(value) == 2
    assert [text.split()[1] for text in marked(document)] == names


@pytest.mark.parametrize("length, often, rare", [(1024, 10, 1), (2048, 20, 2), (4096, 30, 3)])
def test_common_words(length, often, rare, make):
    document = make("common_words", length)
    listed = document.context.split("\n", 1)[1].split()
    numbers, words = listed[::2], listed[1::2]
    assert numbers == [f"{i}." for i in range(1, len(words) + 1)]
    counts = Counter(words)
    assert {counts[word] for word in document.answers} == {often}
    assert len(set(document.answers)) == 10
    others = [n for word, n in counts.items() if word not in document.answers]
    assert len(others) >= 10 and max(others) == rare
    assert sum(n < rare for n in others) <= len(others) / 2
    assert Counter(marked(document)) == {word: often for word in document.answers}
    for answer in document.answers:
        assert not any(answer in word for word in counts if word != answer)


def test_common_words_in_a_short_list_come_as_often_as_they_can(make):
    document = make("common_words", 600)
    counts = Counter(marked(document))
    assert len(counts) == 10 and len(set(counts.values())) == 1
    assert 3 <= counts[document.answers[0]] < 10


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_frequent_words(length, make):
    document = make("frequent_words", length)
    counts = Counter(document.context.split("coded words. ")[1].split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..." and tuple(ranked[1:4]) == document.answers
    n = sorted(counts.values(), reverse=True)
    assert n[1] > n[2] > n[3] > n[4]
    assert 3.5 < n[0] / n[1] < 4.5  # alpha = 2
    assert len(document.spans) == sum(n[1:4])
    assert set(marked(document)) == set(document.answers)


def test_copy(make, count):
    document = make("copy")
    [passage] = marked(document)
    first, answer = document.question.rsplit("Passage: ", 1)[1], document.answers[0]
    assert passage == f"{first} {answer}" and document.context.index(passage) < 50
    assert 128 <= count(" " + answer) <= 256 and 128 <= count(passage) <= 256
    words = [w for w in re.findall(r"\w+", passage) if w not in ("The", "the", "and")]
    assert len(words) > 60 and max(Counter(words).values()) == 1


def test_prose_is_held_out(make):
    """Sentences come from held-out topics only, and no topic that is trained on has them too."""
    kept, held = hold_out(default_texts()[0])
    kept, held = (" ".join(" ".join(texts).split()) for texts in (kept, held))
    assert len(ruler.held_out_sentences()) > 50
    for sentence in ruler.held_out_sentences():
        assert sentence in held and sentence not in kept
    prose = make("needle_prose", 4096).context.split("\n", 1)[1]
    [needle] = marked(make("needle_prose", 4096))
    for sentence in ruler.held_out_sentences():
        prose = prose.replace(sentence, "")
    assert not prose.replace(needle, "").strip()


def accuracy(llama, tok, document, context):
    ids = tok.encode(context) + tok.encode(document.question)
    answer = tok.encode(" " + document.answers[0])
    with torch.no_grad():
        logits = llama(torch.tensor([ids + answer[:-1]]))
    return (logits[0, -len(answer) :].argmax(-1) == torch.tensor(answer)).float().mean().item()


@pytest.mark.slow
def test_the_spans_are_necessary_and_sufficient(llama, tok, make):
    right = {"whole": [], "without spans": [], "spans alone": []}
    for seed in range(3):
        document = make("needle_noise", 512, seed)
        start, end = document.spans[0]
        context = document.context
        instruction = context.split("\n", 1)[0]
        texts = (context, context[:start] + context[end:], f"{instruction}\n{context[start:end]}")
        for scores, text in zip(right.values(), texts, strict=True):
            scores.append(accuracy(llama, tok, document, text) == 1)
    assert right["whole"] == right["spans alone"] == [True] * 3
    assert right["without spans"] == [False] * 3
