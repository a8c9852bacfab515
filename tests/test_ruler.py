"""RULER-style tasks: every document keeps the rules of its task, whatever its length."""

import hashlib
import random
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cli import UserError
from data import default_texts, hold_out
from selection import NAMES, Recency, make_selector
from synth_task import CUE, PHRASES, Document, answers
from workshop import ruler
from workshop.written import Attended, Copied, Several, Written

NEEDLE = re.compile(r"One of the special magic (?:number|uuid)s for (\S+) is: (\S+)\.(?!\S)")
NEEDLES = ("needle_noise", "needle_prose", "needle_uuid", "multikey", "multikey_needles",
           "multikey_uuid", "multivalue", "multiquery")


@pytest.fixture(scope="module")
def make(tok):
    """make(task, length, seed) -> a document, each made once."""
    made = {}

    def make(task, length=1024, seed=0):
        if (task, length, seed) not in made:
            [made[task, length, seed]] = ruler.documents(task, tok, 1, seed, length)
        return made[task, length, seed]

    return make


def room_for_answer(document, tok) -> int:
    _, _, answer = document.encode(tok)
    return document.room(answer)


# First digits of the SHA-256 of two documents at 1,024 tokens, for the tasks whose text does not
# depend on the version of Python.
GOLDEN = {
    "needle_noise": "12da641e3ef018ff",
    "multikey_needles": "d8d4b7661f7dd6dc",
    "multikey_uuid": "11be55e735491867",
    "variable_tracking": "7229ee28084652f5",
    "frequent_words": "ec9ee4ef95d6299b",
}


@pytest.mark.parametrize("task", GOLDEN)
def test_golden_documents(task, tok):
    found = ruler.documents(task, tok, 2, 0, 1024)
    text = "\n".join(d.context + d.question + " " + d.answer for d in found)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[task]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_same_seed_gives_the_same_documents(task, tok, make):
    first, second = ruler.documents(task, tok, 2, 0, 1024)
    assert first == make(task)
    assert len({first.context, second.context, make(task, seed=1).context}) == 3


@pytest.mark.parametrize("task, length",
                         [(task, length) for task in ruler.TASKS for length in (1024, 4096)]
                         + [("needle_prose", 8192), ("common_words", 8192)])
def test_a_document_fills_its_length_and_no_more(task, length, make, tok):
    document = make(task, length)
    room = length - room_for_answer(document, tok)
    size = len(tok.encode(document.context + document.question))
    unit = 80 if task == "multikey_uuid" else 40  # tokens of one needle or of a long sentence
    assert size <= room
    assert size >= min(0.97 * room, room - unit), (size, room)


@pytest.mark.parametrize("task", ["frequent_words", "variable_tracking"])
def test_bos_is_one_of_the_tokens(task, tok):
    """Else a document of the model's whole context would be one too long."""
    with_bos = SimpleNamespace(bos=[1], encode=tok.encode)
    found = ruler.documents(task, with_bos, 2, 0, 1001)
    assert found == ruler.documents(task, tok, 2, 0, 1000) != ruler.documents(task, tok, 2, 0, 1001)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_form(task, make, tok):
    document = make(task)
    assert document.question[0] == "\n" and not document.question[-1].isspace()
    kinds = {"copy": Copied, "several": Several, "paraphrased": Attended,
             "question_answering": Attended}
    several = task in ("multivalue", "multiquery", "variable_tracking", "common_words",
                       "frequent_words")
    assert type(document) is (Written if several else kinds.get(task, Document))
    if several:
        assert document.every and len(set(document.references)) == len(document.references) > 1
        text = " ".join(document.references)
        assert document.score(text.lower()) == document.finished(text) == 1
        others = text.replace(document.answer, "")
        assert document.score(others) == pytest.approx(1 - 1 / len(document.references))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_few_tokens_are_refused(task, tok):
    with pytest.raises(UserError, match="^50 tokens are too few: this task needs "):
        ruler.documents(task, tok, 1, 0, 50)


def test_too_many_tokens_are_refused():
    with pytest.raises(UserError, match="too many: there are 4800 keys"):
        ruler.TASKS["multikey_needles"](random.Random(0), 200_000, len)
    with pytest.raises(UserError, match="too many: there are \\d+ words"):
        ruler.TASKS["common_words"](random.Random(0), 100_000, lambda text: len(text.split()))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("task", NEEDLES)
def test_needles(task, length, make):
    document = make(task, length)
    needles = NEEDLE.findall(document.context)
    values = [value for _, value in needles]
    assert len(set(values)) == len(values)
    if task in ("multikey_needles", "multikey_uuid"):
        assert len(needles) >= 10 and len({key for key, _ in needles}) == len(needles)
        assert document.context.count("\n") == len(needles)  # nothing but needles
    else:
        assert len(needles) == (4 if task.startswith("multi") else 1)
    asked = {key for key, _ in needles if key in document.question}
    assert len(asked) == (4 if task == "multiquery" else 1)
    answers = document.references if isinstance(document, Written) else (document.answer,)
    assert sorted(answers) == sorted(value for key, value in needles if key in asked)
    assert len(answers) == (4 if task in ("multivalue", "multiquery") else 1)
    for answer in answers:
        assert document.context.count(answer) == 1
        assert re.fullmatch(r"\d{7}|[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}", answer)


def test_needles_lie_at_every_depth(tok):
    depths = [NEEDLE.search(d.context).start() / len(d.context)
              for d in ruler.documents("needle_noise", tok, 60, 0, 512)]
    assert min(depths) < 0.15 and max(depths) > 0.9 and 0.4 < sum(depths) / 60 < 0.75


@pytest.mark.parametrize("length", [1024, 4096])
def test_the_chain_of_variables(length, make):
    document = make("variable_tracking", length)
    told = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", document.context)
    names = [name for name, _ in told]
    assert tuple(names) == document.references and len(set(names)) == 5
    assert all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
    value = told[0][1]
    assert [held for _, held in told] == [value, *names[:-1]]
    assert re.fullmatch(r"\d{5}", value) and document.question.count(value) == 2


@pytest.mark.parametrize("length, often, rare", [(1024, 10, 1), (2048, 20, 2), (4096, 30, 3)])
def test_common_words(length, often, rare, make):
    document = make("common_words", length)
    listed = document.context.split("\n", 1)[1].split()
    numbers, words = listed[::2], listed[1::2]
    assert numbers == [f"{i}." for i in range(1, len(words) + 1)]
    counts = Counter(words)
    assert {counts[word] for word in document.references} == {often}
    assert len(set(document.references)) == 10
    others = [n for word, n in counts.items() if word not in document.references]
    assert len(others) >= 10 and max(others) == rare
    assert sum(n < rare for n in others) <= len(others) / 2
    for answer in document.references:
        assert not any(answer in word for word in counts if word != answer)


def test_common_words_in_a_short_list_come_as_often_as_they_can(make):
    document = make("common_words", 600)
    counts = Counter(document.context.split("\n", 1)[1].split()[1::2])
    often = {counts[word] for word in document.references}
    assert len(often) == 1 and 3 <= often.pop() < 10


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_frequent_words(length, make):
    document = make("frequent_words", length)
    counts = Counter(document.context.split("coded words. ")[1].split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..." and tuple(ranked[1:4]) == document.references
    n = sorted(counts.values(), reverse=True)
    assert n[1] > n[2] > n[3] > n[4]
    assert 3.5 < n[0] / n[1] < 4.5  # alpha = 2


def test_copy(make, tok):
    document = make("copy")
    first = document.question.rsplit("Passage: ", 1)[1]
    passage = f"{first} {document.answer}"
    assert document.context.count(passage) == 1 and document.context.index(passage) < 50
    assert 128 <= len(tok.encode(" " + document.answer)) <= 256
    words = [w for w in re.findall(r"\w+", passage) if w not in ("The", "the", "and")]
    assert len(words) > 60 and max(Counter(words).values()) == 1


def test_several_questions_are_about_the_needles_of_one_context(make, tok):
    document = make("several")
    needles = dict(NEEDLE.findall(document.context))
    assert len(needles) == len(document.asked) == 4
    asked = {}
    for one in document.asked:
        [key] = [key for key in needles if key in one.question]
        asked[key] = one.answer
        assert one.context == document.context
        assert sum(map(len, one.encode(tok))) <= 1024
    assert asked == needles


FUNCTION_WORDS = re.findall("[a-z]+", """
    a an the of on in at by to for from with and or as is was be has had it its his her their that
    which who whose where this these no not all one two each every into under over among without
    """)


def content_words(text):
    """Words that mean something, cut to five letters, so that "sailors" is "sailor"."""
    words = re.findall("[a-z]+", text.lower())
    return {word[:5] for word in words if word not in FUNCTION_WORDS}


def test_questions_share_no_content_word_with_what_they_ask_for():
    pairs = [tuple(pair) for pair in ruler.PHRASES["facts"]]
    for kind in ("people", "ships"):
        pairs += [tuple(pair) for half in ("who", "habit") for pair in ruler.PHRASES[kind][half]]
    assert len(pairs) > 50
    for told, query in pairs:
        shared = content_words(told.replace("{name}", "")) & content_words(query)
        assert not shared, (told, query)


@pytest.mark.parametrize("task, needles", [("paraphrased", 1), ("question_answering", 4)])
def test_paraphrased_needles(task, needles, make, tok):
    document = make(task)
    facts = [(re.escape(fact).replace(r"\{name\}", r"(\w+)"), query)
             for fact, query in ruler.PHRASES["facts"]]
    told = {query: re.search(fact, document.context) for fact, query in facts}
    told = {query: found for query, found in told.items() if found}
    assert len(told) == needles and len({found[1] for found in told.values()}) == needles
    [query] = [query for query in told if query in document.question]
    assert told[query][0] == document.needle and told[query][1] == document.answer
    context, *_ = document.encode(tok)
    assert tok.decode(context[document.needle_tokens(tok)]).strip() == document.needle


@pytest.mark.parametrize("kind", ["people", "ships"])
def test_coreference_documents_of_other_kinds(kind, tok):
    phrases = ruler.PHRASES[kind]
    found = ruler.documents(f"coreference_{kind}", tok, 20, 0, 350)
    assert len({document.answer for document in found}) > 15
    for document in found:
        [who] = [who for who in phrases["who"] if document.context.startswith(who[0])]
        [habit] = [habit for habit in phrases["habit"] if habit[1] in document.question]
        start = f"{who[0]} {habit[0]}. {phrases['cue']} {document.answer}. "
        assert document.context.startswith(start) and who[1] in document.question
        assert document.context.count(document.answer) == 1
        assert document.answer not in document.question
        assert document.question.endswith(phrases["cue"])
        assert len(tok.encode(" " + document.answer)) >= 3


def test_coreference_documents_of_other_kinds_have_phrases_of_their_own():
    """Training text comes from synth_task's phrases: it has none of these."""
    def phrases(part):
        if isinstance(part, str):
            return {part}
        return set().union(*map(phrases, part.values() if isinstance(part, dict) else part))

    own = phrases([ruler.PHRASES[kind] for kind in ("people", "ships", "distractors")])
    assert len(own) > 150 and not own & (phrases(PHRASES) | {CUE})


class Surprise(Document):
    """Scored by what every logit of question and answer adds up to, so that nothing can hide."""

    def grade(self, llama, tok, cache, question, answer, selector, stepwise):
        ids = torch.tensor([question + answer[:-1]])
        blocks = ids.split(1 if stepwise else ids.shape[1], dim=1)
        return sum(llama(block, cache, selector).double().abs().sum().item() for block in blocks)


class SeveralSurprises(Surprise, Several):
    pass


class Bytes:
    bos = []

    def encode(self, text):
        return list(text.encode())


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("prefill_budget", [None, 200])
def test_several_questions_score_as_several_documents(tiny, tiny_butler, monkeypatch, stepwise,
                                                      prefill_budget):
    """Each is asked behind the context alone, also by selectors that evict tokens or that use a
    choice again."""
    monkeypatch.setattr("selection.DENSE_START", 64)  # a short context is read sparsely too
    monkeypatch.setattr("selection.DENSE_END", 64)
    context = "What a cache has seen stays in it. " * (3 if prefill_budget is None else 20)
    alone = [Surprise(context, question, "yes")
             for question in (" Is it so?", " Really and truly?", " Is it not?", " No?")]
    together = SeveralSurprises(context, alone[0].question, "yes", tuple(alone[1:]))
    cannot_read = ("h2o", "snapkv", "topp")
    makers = [partial(make_selector, name, 20, tiny_butler, tiny) for name in NAMES
              if prefill_budget is None or name not in cannot_read]
    makers.append(partial(make_selector, "butler", 20, tiny_butler, interval=3))
    scores = [answers(tiny, Bytes(), one, makers, "sparse", stepwise, prefill_budget)
              for one in alone]
    assert len({round(score, 3) for of_one in scores for score in of_one}) > 20
    expected = [sum(column) / 4 for column in zip(*scores, strict=True)]
    found = answers(tiny, Bytes(), together, makers, "sparse", stepwise, prefill_budget)
    assert found == pytest.approx(expected, rel=1e-9)


def test_several_questions_are_not_read_densely(tiny, tok, make):
    with pytest.raises(UserError, match="--question sparse"):
        answers(tiny, tok, make("several"), [lambda: None], "prefill")


def test_attention_on_a_needle_against_its_definition(tiny):
    document = Attended("Hay and more hay. Here it is. Hay once more, hay.", " Where?", "here",
                        "Here it is.")
    seen = []

    class Spy(Recency):
        def __call__(self, layer, x, q, keys, positions):
            index = super().__call__(layer, x, q, keys, positions)
            if index is not None:
                seen.append((q.double(), keys.double(), positions, index))
            return index

    found = answers(tiny, Bytes(), document, [lambda: None, lambda: Spy(36), lambda: Spy(1.0)])
    needle = range(17, 29)  # with the blank before it
    assert document.needle_tokens(Bytes()) == slice(17, 29)
    on_needle, selected = 0, 0
    for q, keys, positions, index in seen[: len(seen) // 2]:
        for head in range(4):
            for t, position in enumerate(positions.tolist()):
                logits = keys[0, head // 2, : position + 1] @ q[0, head, t] * keys.shape[3] ** -0.5
                share = logits.softmax(-1)
                on_needle += sum(share[i].item() for i in needle)
                selected += sum(share[i].item() for i in needle if i in index[0, head // 2, t])
    assert found == pytest.approx([1, selected / on_needle, 1], rel=1e-5)
    assert 0.05 < found[1] < 0.95


def test_prose_is_held_out(make):
    """Sentences come from held-out topics only, and no topic that is trained on has them too."""
    trained, held = hold_out(default_texts()[0])
    trained, held = (" ".join(" ".join(texts).split()) for texts in (trained, held))
    assert len(ruler.held_out_sentences()) > 50
    for sentence in ruler.held_out_sentences():
        assert sentence in held and sentence not in trained
    prose = make("needle_prose", 4096).context.split("\n", 1)[1]
    for sentence in ruler.held_out_sentences():
        prose = prose.replace(sentence, "")
    assert not NEEDLE.sub("", prose).strip()


@torch.inference_mode()
def likeliest(llama, tok, context, question, answer):
    """Which tokens of a forced answer are right, without a cache and in one pass."""
    ids, answer = tok.encode(context + question), tok.encode(" " + answer)
    logits = llama(torch.tensor([ids + answer[:-1]]))[0, -len(answer) :]
    return [a == b for a, b in zip(logits.argmax(-1).tolist(), answer, strict=True)]


@pytest.mark.slow
def test_a_needle_is_necessary_and_sufficient(llama, tok, make):
    for seed in range(3):
        d = make("needle_noise", 512, seed)
        [needle] = [found[0] for found in NEEDLE.finditer(d.context)]
        start = d.context.split("\n", 1)[0] + "\n"
        assert all(likeliest(llama, tok, d.context, d.question, d.answer))
        assert all(likeliest(llama, tok, start + needle, d.question, d.answer))
        without = d.context.replace(needle, "")
        assert not all(likeliest(llama, tok, without, d.question, d.answer))


@pytest.mark.slow
def test_the_score_of_copying_is_the_share_of_right_tokens(llama, tok, make):
    d = make("copy", 512)
    context, question, answer = d.encode(tok)
    for kept in (context, context[:20]):  # with the passage, and without
        cache = llama.new_cache(1, len(kept) + len(question) + d.room(answer))
        llama.prefill(torch.tensor([kept]), cache)
        score = d.grade(llama, tok, cache, question, answer, None, stepwise=False)
        right = likeliest(llama, tok, tok.decode(kept), d.question, d.answer)
        assert score == pytest.approx(sum(right) / len(right), abs=0.02)
        assert (score > 0.9) == (kept is context)
