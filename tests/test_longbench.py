"""Other people's files: three formats, published prompts and scores, and the loss of an answer."""

import json
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close

import synth_task
from baselines import BASELINES, make_selector
from butler import Butler, ButlerConfig, load_for
from common import cli
from common.errors import UsageError
from loading import tokenizer
from measure.intervals import above_dense, bootstrap, each
from model import Llama
from tasks import continuation
from tasks.document import Document, encode, finished, found
from tasks.evaluation import Prompts, evaluate
from tasks.longbench import cut, published, read_data
from tasks.scores import SCORES

STORY = ("The ferry left at noon. Mara had packed bread, a lamp and the brass key of the mill. "
         "Nobody on the pier asked where she was going, and she was glad of it. ")
LINES = {
    "narrativeqa": ("What did Mara pack?", "bread and a lamp"),
    "qasper": ("Is the key made of brass?", "yes"),
    "multifieldqa_en": ("When did the ferry leave?", "at noon"),
    "hotpotqa": ("Whose key does Mara carry?", "the mill's"),
    "2wikimqa": ("Who is glad?", "Mara"),
    "musique": ("What metal is the key of?", "brass"),
    "gov_report": ("", "A ferry leaves with Mara. She carries a key."),
    "qmsum": ("What was said on the pier?", "Nobody asked anything."),
    "multi_news": ("", "Mara left by ferry. Nobody asked."),
    "trec": ("Question: Who left?\nType:", "Human"),
    "triviaqa": ("Passage: A lamp.\nQuestion: What gives light?\nAnswer:", "lamp"),
    "samsum": ("Dialogue: Mara: bye\nJon: bye\nSummary: ", "Mara and Jon part."),
    "passage_count": ("", "3"),
    "passage_retrieval_en": ("It is about a ferry.", "Paragraph 2"),
    "lcc": ("", "    return key"),
    "repobench-p": ("def turn(key):\n", "    return key + 1"),
}


def line(dataset: str, context=STORY) -> str:
    asked, answer = LINES[dataset]
    return json.dumps({
        "input": asked, "context": context, "answers": [answer], "length": len(context.split()),
        "dataset": dataset, "language": "en", "_id": dataset,
        "all_classes": ["Human", "Place", "Date"] if dataset == "trec" else None})


RULER = {"index": 0, "length": 99, "input": "One of the special magic numbers for door is: 42.\n"
         "What is the special magic number for door mentioned in the provided text?",
         "outputs": ["42"], "answer_prefix": " The special magic number for door mentioned in the "
         "provided text is"}


@pytest.fixture(scope="module")
def small(folder):
    """A random model of 3 layers, its vocabulary of 512, and an untrained butler for it."""
    llama = Llama.from_pretrained(folder)
    torch.manual_seed(3)
    return llama, tokenizer.load(folder), Butler(ButlerConfig.for_model(llama)).eval()


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name, text, reference, score", [
    ("f1", "It's the Red box!", "red box", 0.8),  # its, red, box: 2 of 3 and 2 of 2
    ("f1", "red red box", "a red box, red", 1), ("f1", "The", "a", 0), ("f1", "", "red", 0),
    ("rouge", "a b c. d e", "a x c. d y", 0.6),  # a, c and d: 3 of 5 words on both sides
    ("rouge", "a b x. y c", "a b c", 0.75),  # union: a and b of the one, c of the other: 3/5, 3/3
    ("rouge", "a a b", "a b b", 1),  # words count once
    ("rouge", "A b", "a b", 0.5), ("rouge", "...", "a", 0), ("rouge", "", "a", 0),
    ("class", "Number or Date", "Date", 0.5), ("class", "Date", "Date", 1),
    ("class", "date", "Date", 0), ("class", "Number", "Date", 0),
    ("class", "Date of birth", "Date of birth", 1),  # Date, part of its name, does not count
    ("retrieval", "Paragraph 3, or 12, or 3", "Paragraph 3", 2 / 3),
    ("retrieval", "", "Paragraph 3", 0), ("retrieval", "13", "Paragraph 3", 0),
    ("count", "7 of 10", "7", 0.5), ("count", "none", "7", 0),
    ("code", "\n# a\n```python\nx = y + 1\nz", "x = y + 2", 0.89),  # 8 of 9 characters, twice
    ("code", "// only", "x", 0), ("code", "abcd", "bcde", 0.75)])
def test_scores_worked_by_hand(name, text, reference, score):
    classes = ("Number", "Date", "Date of birth")
    assert SCORES[name](text, reference, classes) == pytest.approx(score, abs=1e-6)


def test_the_best_reference_counts_and_of_some_tasks_the_first_line():
    several = Document("c", "q", ("a key", "brass lamp"), "f1", 8)
    assert found(several, "The lamp of brass") == 0.8 and found(several, "key") == 1
    trec = Document("c", "q", ("Date",), "class", 8, classes=("Date", "Place"), one_line=True)
    assert found(trec, "\n\nDate\nPlace") == 1 and not finished(trec, "\n\nDate")
    assert finished(trec, "\nDate\nP") and not finished(several, "key\nkey")


def test_summaries_need_a_package_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    for dataset, wanted in (("samsum", True), ("hotpotqa", False)):
        (tmp_path / "d.jsonl").write_text(line(dataset))
        if wanted:
            with pytest.raises(UsageError, match="pip install rouge"):
                read_data(tmp_path / "d.jsonl")
        else:
            read_data(tmp_path / "d.jsonl")


# ---------------------------------------------------------------------------- formats and prompts


def test_three_formats_are_told_apart_by_their_keys(tmp_path):
    mine = {"context": "Ann owns cats.", "question": " Who?", "answer": [" Ann ", "she"]}
    lines = [json.dumps(mine), line("hotpotqa"), "", json.dumps(RULER), line("trec"), line("trec"),
             line("hotpotqa").replace('"hotpotqa", "lang', '"hotpotqa_e", "lang')]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    data = read_data(tmp_path / "d.jsonl")
    assert {name: len(documents) for name, documents in data.items()} == {
        "data": 1, "hotpotqa": 1, "niah": 1, "trec": 2, "hotpotqa_e": 1}
    assert data["data"] == [Document("Ann owns cats.", " Who?", ("Ann", "she"), "any", 64)]
    (niah,) = data["niah"]
    assert niah.context == "One of the special magic numbers for door is: 42."
    assert niah.question == "\n" + RULER["input"].split("\n")[1] + RULER["answer_prefix"]
    assert (niah.answers, niah.scoring, niah.new_tokens) == (("42",), "all", 128)
    assert data["trec"][0] == Document(
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        + STORY, "\nQuestion: Who left?\nType:", ("Human",), "class", 64,
        classes=("Human", "Place", "Date"), one_line=True)


@pytest.mark.parametrize("asked, task", [
    (" Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
     "assigned the value 1, they are: ", ("variable_tracking", "all", 30)),
    (" Answer: The top 10 words that appear most often in the list are:",
     ("common_words_extraction", "all", 120)),
    (" Answer: According to the coded text above, the three most frequently appeared words are:",
     ("freq_words_extraction", "all", 50)),
    (" Answer:", ("qa", "any", 32))])
def test_tasks_of_ruler_are_known_by_their_questions(tmp_path, asked, task):
    entry = {"input": "Some text.\n\nQuestion: Which?", "outputs": ["x", "y"]}
    for e in entry | {"answer_prefix": asked}, entry | {"input": entry["input"] + asked}:
        (tmp_path / "d.jsonl").write_text(json.dumps(e))
        ((name, (document,)),) = read_data(tmp_path / "d.jsonl").items()
        assert (name, document.scoring, document.new_tokens) == task
        assert document.context + document.question == entry["input"] + asked


def test_prompts_are_the_published_ones(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(map(line, LINES)))
    data = read_data(tmp_path / "d.jsonl")
    assert set(data) == set(published()) == set(LINES) and len(data) == 16
    told = {name: d.context + d.question for name, (d,) in data.items()}
    for name, text in told.items():
        assert text.count(STORY) == 1 and "{" not in text and LINES[name][0] in text
    assert told["multifieldqa_en"] == (
        f"Read the following text and answer briefly.\n\n{STORY}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: When did the ferry leave?\nAnswer:")
    assert told["repobench-p"] == (
        f"Please complete the code given below. \n{STORY}def turn(key):\nNext line of code:\n")
    (retrieval,) = data["passage_retrieval_en"]
    assert retrieval.context.endswith(STORY) and retrieval.question == (
        "\n\nThe following is an abstract.\n\nIt is about a ferry.\n\nPlease enter the number of "
        'the paragraph that the abstract is from. The answer format must be like "Paragraph 1", '
        '"Paragraph 2", etc.\n\nThe answer is: ')
    plain = {name for name, (d,) in data.items() if not d.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, (d,) in data.items() if d.one_line} == {"trec", "triviaqa", "samsum"}
    lengths = {name: d.new_tokens for name, (d,) in data.items()}
    assert lengths == {
        "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32,
        "musique": 32, "gov_report": 512, "qmsum": 512, "multi_news": 512, "trec": 64,
        "triviaqa": 32, "samsum": 128, "passage_count": 32, "passage_retrieval_en": 32, "lcc": 64,
        "repobench-p": 64}


@pytest.mark.parametrize("change, complaint", [
    ({"dataset": "dureader"}, "none of LongBench's"), ({"dataset": 3}, "dataset is not"),
    ({"answers": []}, "answers is a text"), ({"answers": [1]}, "answers is a text"),
    ({"context": None}, "context is not"), ({"dataset": "trec"}, "all_classes"),
    ({"dataset": "trec", "all_classes": ["Date"]}, "all_classes"),
    ({"dataset": "trec", "all_classes": 3}, "all_classes"),
    ({"dataset": "passage_retrieval_en"}, "Paragraph 1"),
    ({"outputs": ["x"], "dataset": "new"}, "none of LongBench's")])
def test_broken_lines_of_longbench_are_named(tmp_path, change, complaint):
    wrong(tmp_path, json.loads(line("hotpotqa")) | change, complaint)


@pytest.mark.parametrize("change, complaint", [
    ({"outputs": []}, "outputs is a text"), ({"answer_prefix": 1}, "answer_prefix is not"),
    ({"input": "Hello\nthere", "answer_prefix": ""}, "no question of RULER's"),
    ({"input": "", "answer_prefix": " special magic"}, "but one line")])
def test_broken_lines_of_ruler_are_named(tmp_path, change, complaint):
    wrong(tmp_path, RULER | change, complaint)


def wrong(folder, entry, complaint):
    (folder / "d.jsonl").write_text(line("hotpotqa") + "\n\n" + json.dumps(entry) + "\n")
    with pytest.raises(UsageError, match=complaint) as e:
        read_data(folder / "d.jsonl")
    assert "d.jsonl:3: " in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------------------- tokens


def documents(folder, *datasets, context=STORY):
    (folder / "d.jsonl").write_text("\n".join(line(name, context) for name in datasets))
    return [d for found in read_data(folder / "d.jsonl").values() for d in found]


def test_a_message_is_split_behind_its_context(tok, tmp_path):
    hotpot, trec = documents(tmp_path, "hotpotqa", "trec")
    context, question, answer = encode(tok, hotpot)
    whole = [{"role": "user", "content": hotpot.context + hotpot.question}]
    assert context + question == tok.chat(whole)
    assert tok.decode(context).endswith(STORY.rstrip()[-20:]) and "<|im_start|>user" in tok.decode(
        context)
    assert tok.decode(question).strip().endswith("Answer:<|im_end|>\n<|im_start|>assistant")
    assert tok.decode(answer) == "the mill's"  # on a line of its own
    context, question, answer = encode(tok, trec)
    assert tok.decode(context + question + answer) == trec.text and trec.text.endswith(" Human")


@pytest.mark.parametrize("question, answer, text", [
    ("Answer:", "x", " x"), ("is: ", "x", "x"), ("code:\n", "x", "x"), ("Answer:", "  x", "  x")])
def test_answers_stand_apart_from_their_questions(question, answer, text):
    assert Document("c", question, (answer,)).answer == text


@pytest.mark.parametrize("dataset", ["hotpotqa", "trec", "repobench-p"])
def test_prompts_that_are_too_long_lose_their_middle(tok, tmp_path, dataset):
    numbered = " ".join(f"Word {i}." for i in range(400)) + " "
    (d,) = documents(tmp_path, dataset, context=numbered)
    whole = [id for ids in encode(tok, d)[:2] for id in ids]
    for context in (400, 401):
        short = cut(tok, d, context)
        ids = [id for part in encode(tok, short)[:2] for id in part]
        room = context - d.new_tokens
        assert room - 6 <= len(ids) <= room and short.question == d.question
        marks = len(whole) - len(tok.encode(d.context + d.question)) if d.chat else 0
        half = (room - marks) // 2 - 6
        assert ids[:half] == whole[:half] and ids[-half:] == whole[-half:]
    assert cut(tok, d, len(whole) + d.new_tokens + 2) is d
    with pytest.raises(UsageError, match="too short"):
        cut(tok, d, d.new_tokens + 20)
    assert cut(tok, Document(numbered, " q", ("a",), "any", 64), 100).context == numbered


def test_a_question_longer_than_half_is_cut_too(tok, tmp_path):
    (d,) = documents(tmp_path, "triviaqa")
    asked = "Question: " + " ".join(f"word{i}" for i in range(300)) + "\nAnswer:"
    short = cut(tok, Document(d.context, asked, d.answers, "f1", 32), 232)
    assert sum(map(len, encode(tok, short)[:2])) <= 200 and short.question.endswith("\nAnswer:")
    assert len(tok.encode(short.question)) == 99 and short.context.startswith("Answer the quest")


def test_writing_ends_with_a_line_or_the_text_and_marks_are_no_words(small):
    """A model that writes a given text: what is scored, and when it stops."""
    llama, tok, _ = small
    script = tok.encode("\nDate\nPlace and more")
    eos = script[-1]
    logits = F.one_hot(torch.tensor(script), llama.config.vocab_size).float()[:, None, None]
    steps = []

    def decode(token, cache, selector):
        steps.append(int(token))
        return logits[len(steps)]

    prompts = Prompts.__new__(Prompts)
    prompts.new, prompts.cache = len(script), None
    prompts.llama = SimpleNamespace(decode=decode)
    prompts.tok = SimpleNamespace(eos_ids={eos}, special={}, decode=tok.decode)
    kinds = {"class": ("Date", ("Date", "Place")), "f1": ("Date Place and mor", ())}
    for scoring, (answer, classes) in kinds.items():
        steps.clear()
        one_line = scoring == "class"
        prompts.documents = [Document("c", "q", (answer,), scoring, len(script), (), classes,
                                      one_line=one_line)]
        text = tok.decode(script[: -1])
        assert prompts.written(logits[0], None) == [found(prompts.documents[0], text)]
        assert tok.decode(steps) == ("\nDate" if one_line else text)


# ---------------------------------------------------------------------------- losses


def test_the_loss_is_that_of_the_answer_behind_its_question(small, tmp_path):
    llama, tok, _ = small
    for d in documents(tmp_path, "hotpotqa", "gov_report", "lcc"):
        context, question, answer = encode(tok, d)
        logits = llama(torch.tensor([context + question + answer]))[0].float()
        first = len(context) + len(question)
        expected = F.cross_entropy(logits[first - 1 : -1], torch.tensor(answer))
        for asked in ("sparse", "prefill"):
            (loss,) = Prompts(llama, tok, [d], asked).loss(None)
            assert_close(f"loss {asked}", loss, expected, 1e-4)


@pytest.mark.parametrize("name", ["dense", "butler", *sorted(set(BASELINES) - {"random"})])
def test_losses_of_a_batch_and_of_pieces_are_those_of_the_whole(small, tmp_path, name,
                                                                monkeypatch):
    llama, tok, butler = small
    some = [*documents(tmp_path, "musique"), *documents(tmp_path, "2wikimqa", context=STORY * 2)]
    kinds = [BASELINES[name]] if name in ("h2o", "snapkv") else []
    whole = [Prompts(llama, tok, [d], "sparse", kinds).loss(make_selector(name, 0.3, butler))[0]
             for d in some]
    for batch in ([0], [1]) if kinds else ([0], [0, 1]):
        monkeypatch.setattr(Prompts, "CHUNK", 11)
        prompts = Prompts(llama, tok, [some[i] for i in batch], "sparse", kinds)
        for _ in range(2):  # one reading serves several selectors
            losses = prompts.loss(make_selector(name, 0.3, butler))
            assert_close(name, losses, [whole[i] for i in batch], 1e-4)


def test_a_long_answer_is_forced_as_far_as_it_fits(small):
    llama, tok, _ = small
    d = Document("word " * 50, " And", ("word " * 9000,), "rouge", 8)
    prompts = Prompts(llama, tok, [d], "sparse")
    assert prompts.lengths[0] + len(prompts.forced[0]) == llama.config.context
    short = Document(d.context, d.question, ("word " * 9,), "rouge", 8)
    assert Prompts(llama, tok, [short], "sparse").answers[0] == tok.encode(short.answer)


def test_differences_are_those_of_the_same_document():
    losses = {"dense": {"1.0": [[1.0, 2.0]]}, "butler": {"0.1": [[1.5, 2.0], [1.0, 3.0]]}}
    assert above_dense(losses) == {"butler": {"0.1": [[0.5, 0.0], [0.0, 1.0]]}}
    assert above_dense({"butler": losses["butler"]}) == {}
    m = each(bootstrap, above_dense(losses))["butler"]["0.1"]
    assert m["mean"] == 0.375 and m["n"] == 2 and m["low"] <= 0.375 <= m["high"]


def test_a_mean_of_tasks_weighs_them_alike():
    many, few = [[0.0] * 90 + [1.0] * 10], [[1.0] * 4]
    m = bootstrap(many, few)
    assert m["mean"] == pytest.approx(0.55) and m["n"] == 104 and 0.5 < m["low"] < m["high"] < 0.6
    assert each(bootstrap, {"a": {"1": many}}, {"a": {"1": few}}) == {"a": {"1": m}}


# ---------------------------------------------------------------------------- the script


def test_the_sixteen_tasks_run_and_go_on_from_a_file(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join([*map(line, LINES), line("hotpotqa", STORY * 3)]))
    for rules in published().values():
        monkeypatch.setitem(rules, "new_tokens", min(rules["new_tokens"], 40))
    flags = ["--data", str(path), "--model", str(folder), "--selectors", "dense,oracle,snapkv",
             "--budgets", "0.2", "--out", str(tmp_path / "s.jsonl")]

    def run(*more):
        return synth_task.main(cli.parse(synth_task.Config, [*flags, *more]))

    report, shown = run(), capsys.readouterr().out
    assert set(report["results"]) == {*LINES, "mean"} == set(report["loss"])
    for name, by in report["results"].items():
        assert set(by) == {"dense", "oracle", "snapkv"}
        n = {"mean": 17, "hotpotqa": 2}.get(name, 1)
        assert all(m["n"] == n and 0 <= m["mean"] <= 1 for b in by.values() for m in b.values())
    for name, by in report["loss above dense"].items():
        assert set(by) == {"oracle", "snapkv"}
        loss = report["loss"][name]
        for selector in by:
            assert by[selector]["0.2"]["mean"] == pytest.approx(
                loss[selector]["0.2"]["mean"] - loss["dense"]["1.0"]["mean"], abs=1e-9)
        assert 3 < loss["dense"]["1.0"]["mean"] < 20 and by["snapkv"]["0.2"]["mean"] != 0
    assert report["question"] == "sparse" and "--question sparse" in shown
    assert "above dense" in shown and "mean " in shown
    monkeypatch.setattr(Prompts, "__init__", None)  # nothing is computed again
    assert run()["loss"] == report["loss"]
    with pytest.raises(UsageError, match="other settings"):
        run("--question", "prefill")


def test_prefill_asks_densely(small, tmp_path):
    llama, tok, _ = small
    (d,) = documents(tmp_path, "hotpotqa", context=STORY * 3)
    losses = {}
    for asked in ("sparse", "prefill"):
        evaluate(llama, tok, [d], ("dense", "recency"), ("0.1",), question=asked,
                 losses=losses.setdefault(asked, {}))
    dense = [losses[asked]["dense"]["1.0"][0][0] for asked in losses]
    sparse = [losses[asked]["recency"]["0.1"][0][0] for asked in losses]
    assert dense[0] == pytest.approx(dense[1], abs=1e-4) and abs(sparse[0] - sparse[1]) > 1e-3


def test_a_text_is_cut_into_what_goes_on(tok, tmp_path, tok_in_memory, capsys):
    path = tmp_path / "own.jsonl"
    report = continuation.main(continuation.Config(n=3, tokens=300, out=str(path)))
    assert report["documents"] == 3
    for d in read_data(path)["data"]:
        counts = [len(ids) for ids in encode(tok, d)]
        assert counts[0] >= 300 and counts[1] >= 24 and 50 <= counts[2] <= 200
        assert " " not in (d.question[-1], d.answers[0][0])
    again = continuation.main(continuation.Config(n=3, tokens=300, seed=1))
    assert again["tokens"] != report["tokens"]
    with pytest.raises(UsageError, match="no held-out file"):
        continuation.main(continuation.Config(tokens=10**6))


@pytest.mark.slow
def test_the_default_model_answers_and_a_selection_costs_little(llama, tok, tmp_path):
    """Two questions, one as a message, one behind examples; the context is cut to 1,000 tokens."""
    text = " ".join(topics["assignment"].split())[:9000]
    context = f"{STORY}\n{text}"
    examples = ("Passage: The cup is red.\nQuestion: What colour is the cup?\nAnswer: red\n\n"
                f"Passage: {text}\nQuestion: What is it about?\nAnswer: assignment\n")
    field, trivia = (documents(tmp_path, name, context=told)[0]
                     for name, told in (("multifieldqa_en", context), ("triviaqa", examples)))
    for d, least in ((field, 0.6), (trivia, 0.9)):
        short, losses = cut(tok, d, 1000), {}
        assert len(short.context) < len(d.context)
        scores = evaluate(llama, tok, [short], ("dense", "oracle", "butler"), ("0.3",),
                          [load_for(llama)], losses=losses)
        assert scores["dense"]["1.0"][0][0] >= least
        for by in above_dense(losses).values():
            assert abs(by["0.3"][0][0]) < 0.3
