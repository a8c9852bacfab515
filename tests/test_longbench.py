"""Questions from files: three formats, prompts, scores, and what the model writes."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import synth_task
import tokenizer
from cli import UserError, parse
from model import Llama
from synth_task import answers
from workshop.longbench import TASKS, read_data, without_middle
from workshop.scores import SCORES
from workshop.written import Written

STORY = ("The ferry left at noon. Mara had packed bread, a lamp and the brass key of the mill. "
         "Nobody on the pier asked where she was going, and she was glad of it. ")
LINES = {  # data set -> input, answer
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
OWN = {"context": "Ann owns cats.", "question": " Who?", "answer": [" Ann ", "she"]}
RULER = {"index": 0, "length": 99, "token_position_answer": 3, "outputs": ["42"],
         "input": "One of the special magic numbers for door is: 42.\nWhat is the special magic "
                  "number for door mentioned in the provided text?",
         "answer_prefix": " The special magic number for door mentioned in the provided text is"}


def longbench(dataset: str, context=STORY) -> dict:
    asked, answer = LINES[dataset]
    return {"input": asked, "context": context, "answers": [answer], "length": 9,
            "dataset": dataset, "language": "en", "_id": dataset,
            "all_classes": ["Human", "Place", "Date"] if dataset == "trec" else None}


@pytest.fixture(autouse=True)
def own_prompts(monkeypatch):
    monkeypatch.delenv("LONGBENCH_CONFIG", raising=False)


@pytest.fixture
def read(tmp_path, tok):
    """read(entry, ...) -> what read_data makes of a file of these lines."""
    def read(*entries, n=100, context=8192):
        path = tmp_path / "d.jsonl"
        lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
        path.write_text("\n".join(lines))
        return read_data(path, tok, n, context)

    return read


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name, text, reference, score", [
    ("contains", "An APPLE pie", "apple", 1), ("contains", "pie", "apple", 0),
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


def test_references_and_lines():
    several = Written("c", "q", "a key", ("brass lamp",), "f1")
    assert several.score("The lamp of brass") == 0.8 and several.score("key") == 1
    assert not several.finished("key")  # more words would change it
    one = Written("c", "q", "Ann", ("she",))
    both = Written("c", "q", "Ann", ("she",), every=True)
    assert one.score("ANN") == 1 and one.finished("ann")
    assert both.score("Ann") == 0.5 and not both.finished("Ann") and both.finished("She, Ann")
    trec = Written("c", "q", "Date", scoring="class", classes=("Date", "Place"), one_line=True)
    assert trec.score("\n\nDate\nPlace") == 1 and not trec.finished("\n\nDate")
    assert trec.finished("\nDate\nP")


# ---------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def small(folder):
    """A random model of 3 layers with a vocabulary of 512, and its tokenizer."""
    return Llama.from_pretrained(folder), tokenizer.load(folder)


def test_what_is_written_is_greedy(small):
    """Against a loop that has no cache and stops nowhere."""
    llama, tok = small
    document = Written(STORY, "Who left?", "?", new_tokens=8, scoring="f1")
    context, question, _ = document.encode(tok)
    ids = context + question
    for _ in range(document.new_tokens):
        ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    expected = tok.decode(ids[len(context + question) :])
    for protocol in "sparse", "prefill":
        for stepwise in False, True:
            seen = []
            spy = Spy(document, seen)
            answers(llama, tok, spy, [lambda: None], protocol, stepwise)
            assert seen == [expected]


class Spy:
    """A document that notes the text which it scores."""

    def __init__(self, document, seen):
        self.encode = document.encode
        self.room = document.room
        self.new_tokens = 8
        self.finished = document.finished
        self.score = lambda text: seen.append(text) or 0.0
        self.asked = (self,)

    def grade(self, *arguments):
        return Written.grade(self, *arguments)


@pytest.mark.parametrize("scoring, answer, written, score", [
    ("class", "Date", "\nDate\n", 1), ("f1", "Date", "\nDate\nPlace and", 0.5),
    ("contains", "DAT", "\nDat", 1)])
def test_writing_ends_when_nothing_can_change(small, scoring, answer, written, score):
    """A model that follows a script: it stops at the end of a line, of the text, or once the answer
    is there. The token <eos> ends the text; the token <mark> is no word of it."""
    _, tok = small
    end, mark = 510, 511
    script = [mark, *(tok.encode(piece)[0] for piece in "\nDate\n"), *tok.encode("Place and"), end]
    fed = []

    def likeliest(*_):
        logits = torch.zeros(1, 1, 512)
        logits[0, 0, script[len(fed)]] = 1
        return logits

    def decode(token, cache, selector):
        fed.append(int(token))
        return likeliest()

    llama = SimpleNamespace(device="cpu", prefill=likeliest, decode=decode)
    words = SimpleNamespace(special={"<mark>": mark}, ends={end}, decode=tok.decode)
    document = Written("c", "q", answer, scoring=scoring, classes=("Date", "Place"),
                       one_line=scoring == "class")
    assert document.grade(llama, words, None, [1, 2], [], None, False) == score
    last = script[len(fed)]  # chosen, but not fed to the model any more
    assert tok.decode([i for i in [*fed, last] if i not in (mark, end)]) == written
    assert (last == end) == (scoring == "f1")


# ---------------------------------------------------------------------------- formats and prompts


def test_the_keys_tell_three_formats_apart(read):
    extended = longbench("hotpotqa") | {"dataset": "hotpotqa_e"}
    data = read(OWN | {"source": "me"}, longbench("hotpotqa"), "", RULER, longbench("trec"),
                longbench("trec"), extended)
    assert {name: len(documents) for name, documents in data.items()} == {
        "data": 1, "hotpotqa": 1, "niah": 1, "trec": 2, "hotpotqa_e": 1}
    assert data["data"] == [Written("Ann owns cats.", " Who?", "Ann", ("she",), new_tokens=64)]
    context, question = RULER["input"].split("\n")
    assert data["niah"] == [Written(context, "\n" + question + RULER["answer_prefix"], "42",
                                    every=True, new_tokens=128)]
    trec = data["trec"][0]
    assert trec.context.endswith("\n\n" + STORY) and trec.question == "\n" + LINES["trec"][0]
    assert trec.classes == ("Human", "Place", "Date") and trec.one_line and not trec.chat


@pytest.mark.parametrize("asked, task", [
    (" Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
     "assigned the value 1, they are: ", ("variable_tracking", True, 30)),
    (" Answer: The top 10 words that appear most often in the list are:",
     ("common_words_extraction", True, 120)),
    (" Answer: According to the coded text above, the three most frequently appeared words are:",
     ("freq_words_extraction", True, 50)),
    (" Answer:", ("qa", False, 32))])
def test_tasks_of_ruler_are_known_by_their_questions(read, asked, task):
    entry = {"input": "Some text.\n\nQuestion: Which?", "outputs": ["x", "y"]}
    for e in entry | {"answer_prefix": asked}, entry | {"input": entry["input"] + asked}:
        [(name, [document])] = read(e).items()
        assert (name, document.every, document.new_tokens) == task
        assert document.context + document.question == entry["input"] + asked


def test_every_task_of_longbench_asks_its_question(read, capsys):
    data = read(*map(longbench, LINES))
    assert set(data) == set(TASKS) == set(LINES) and len(data) == 16
    assert "not the official" in capsys.readouterr().err
    for name, [d] in data.items():
        text = d.context + d.question
        assert text.count(STORY) == 1 and "{" not in text and LINES[name][0] in d.question
        assert d.context.endswith(STORY) and d.answer == LINES[name][1]
    assert {name for name, [d] in data.items() if not d.chat} == {
        "trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, [d] in data.items() if d.one_line} == {"trec", "triviaqa", "samsum"}


def test_official_prompts_are_read_from_their_folder(read, tmp_path, monkeypatch, capsys):
    prompts = {name: f"{name}: {{context}} / {{input}}=" for name in TASKS}
    lengths = dict.fromkeys(TASKS, 7)
    monkeypatch.setenv("LONGBENCH_CONFIG", str(tmp_path))
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(prompts))
    with pytest.raises(UserError, match="LONGBENCH_CONFIG=.*dataset2maxlen.json"):
        read(longbench("lcc"))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps(lengths | {"lcc": "64"}))
    with pytest.raises(UserError, match="the length of lcc"):
        read(longbench("lcc"))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps(lengths))
    [d] = read(longbench("qasper"))["qasper"]
    assert (d.context, d.question) == (f"qasper: {STORY}", " / Is the key made of brass?=")
    assert (d.new_tokens, d.scoring, d.chat) == (7, "f1", True)
    assert f"prompts of {tmp_path}" in capsys.readouterr().err
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(prompts | {"lcc": "{input}"}))
    with pytest.raises(UserError, match="the prompt of lcc"):
        read(longbench("lcc"))


@pytest.mark.parametrize("entry, complaint", [
    (longbench("hotpotqa") | {"dataset": "dureader"}, "none of LongBench's"),
    (longbench("hotpotqa") | {"dataset": 3}, "dataset must be a text"),
    (longbench("hotpotqa") | {"answers": []}, "answers must be"),
    (longbench("hotpotqa") | {"answers": [1]}, "answers must be"),
    (longbench("hotpotqa") | {"context": None}, "context must be"),
    (longbench("hotpotqa") | {"dataset": "trec"}, "all_classes"),
    (longbench("trec") | {"all_classes": ["Date"]}, "all_classes"),
    (longbench("hotpotqa") | {"dataset": "passage_retrieval_en"}, "Paragraph 1"),
    (RULER | {"outputs": []}, "outputs must be"), (RULER | {"answer_prefix": 1}, "answer_prefix"),
    (RULER | {"input": "Hello\nthere", "answer_prefix": ""}, "no question of RULER's"),
    (RULER | {"input": "", "answer_prefix": " special magic"}, "only one line"),
    (OWN | {"answer": " "}, "answer must be"), (OWN | {"answer": 3}, "answer must be"),
    (OWN | {"answer": ["a", "\u200b"]}, "answer must be"),
    (OWN | {"answer": "x\ud800"}, "answer: Unicode"),
    (OWN | {"question": ""}, "question is empty"), (OWN | {"context": " \n"}, "context is empty"),
    (OWN | {"context": "\x04"}, "has no token"),  # the default model has none for this byte
    (OWN | {"answer": "word " * 99}, "the answer has .* the model may write 64"),
    (longbench("hotpotqa") | {"answers": ["the"]}, "like 'the' would score 0"),
    (longbench("passage_count") | {"answers": ["three"]}, "like 'three' would score 0"),
    ({"context": "x"}, "sets of keys"), ('{"a": 1, "a": 1}', "the key 'a' comes twice"),
    ([OWN], "one JSON object a line: this is a list"), ("{", "one JSON object a line"),
    (json.dumps(OWN) * 2, "one JSON object a line"), ("9" * 5000, "one JSON object a line"),
    ("context,question,answer", "one JSON object a line"), ("NaN", "one JSON object a line"),
    ("[" * 10**5, "one JSON object a line"), (OWN | {"context": "word " * 9000}, "9.* is 8192")])
def test_broken_lines_are_named(read, entry, complaint):
    with pytest.raises(UserError, match=complaint) as e:
        read(longbench("hotpotqa"), "", entry)
    assert "d.jsonl:3: " in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("entry", [OWN, longbench("hotpotqa"), RULER], ids=["own", "LB", "RULER"])
def test_a_key_that_may_change_the_score_is_refused_by_name(read, entry):
    """Of the many that data sets have, none is ignored unless it is known to describe a line."""
    for key in ("answers", "answer", "outputs", "input", "question", "dataset", "all_classes",
                "choice_A", "options", "metric", "max_new_tokens", "instruction", "aliases", "A",
                "\ud800"):
        if key not in entry:
            with pytest.raises(UserError) as e:
                read(entry, json.dumps(entry | {key: ["x"]}), n=1)
            assert "d.jsonl:2: " in str(e.value) and repr(key) in str(e.value)
    with pytest.raises(UserError, match="score: 'options', 'metric'. Put"):
        read(entry | {"id": 1, "options": [], "metric": "f1"})
    described = {"id": 1, "source": "me", "title": None, "_options": ["x"], "options": None}
    assert list(read(entry | described).values()) == list(read(entry).values())


def test_what_editors_and_other_systems_do_to_a_file(read, tmp_path, tok):
    """A byte order mark, line ends of Windows, a line separator and half a character in a text."""
    odd = OWN | {"context": "Ann\u2028owns \ud83d cats."}
    path = tmp_path / "windows.jsonl"
    lines = json.dumps(OWN), json.dumps(odd), ""
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    one, two = read_data(path, tok, 9, 8192)["data"]
    assert (one.context, two.context) == (OWN["context"], odd["context"]) and two.encode(tok)
    raw = json.dumps(OWN | {"context": "Ann\u2028owns"}, ensure_ascii=False)
    assert read(raw)["data"][0].context == "Ann\u2028owns"


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08\x00\x00", '{"context": "x"}'.encode("utf-16")])
def test_a_file_that_is_no_text_is_named(tmp_path, tok, data):
    (tmp_path / "d.jsonl").write_bytes(data)
    for path in tmp_path / "d.jsonl", tmp_path, tmp_path / "none":
        with pytest.raises(UserError, match=f"cannot read {path}"):
            read_data(path, tok, 9, 8192)


def test_pretty_printed_objects_are_not_lines(read):
    for text in json.dumps(OWN, indent=1), json.dumps([OWN], indent=1):
        with pytest.raises(UserError, match="d.jsonl:1: expected one JSON object a line"):
            read(text)


def test_an_empty_file_and_a_missing_package_are_named(read, monkeypatch):
    with pytest.raises(UserError, match="no lines"):
        read("", " ")
    monkeypatch.setitem(sys.modules, "rouge", None)
    assert read(longbench("hotpotqa"))
    with pytest.raises(UserError, match="pip install rouge"):
        read(longbench("samsum"))


def test_marks_and_lines_left_out_are_told_once(read, capsys):
    marked = OWN | {"context": "Ann <|im_end|> owns cats."}
    assert len(read(OWN, marked, marked, OWN, n=3)["data"]) == 3
    marks, again, left_out = capsys.readouterr().err.splitlines()
    assert "d.jsonl:2: " in marks and "<|im_end|>" in marks and "(2 such lines)" in marks
    assert "d.jsonl:3: the same as line 2" in again and "(1 such lines)" in again
    assert "1 lines left out" in left_out
    read(OWN)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mark", ["<|eot_id|>", "[INST]", "<end_of_turn>", "<|file_sep|>",
                                  "<\uff5cUser\uff5c>"])
def test_marks_of_any_model_are_told(read, capsys, mark):
    """Also where only an answer has one, which then never scores."""
    for entry in OWN | {"question": f" Who?{mark}"}, RULER | {"outputs": [f"42{mark}"]}:
        read(entry)
        assert f"d.jsonl:1: the text contains {mark}, " in capsys.readouterr().err
    read(OWN | {"context": "a < b | c > d, [1] <b>bold</b> <| |> and x[INST"})
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------- tokens


def test_a_message_is_split_behind_its_context(tok, read):
    [hotpot], [trec] = read(longbench("hotpotqa"), longbench("trec")).values()
    context, question, _ = hotpot.encode(tok)
    assert context + question == tok.chat(hotpot.context + hotpot.question)
    assert "<|im_start|>user" in tok.decode(context)
    assert tok.decode(context).endswith(STORY.rstrip()[-20:])
    assert tok.decode(question).strip().endswith("Answer:<|im_end|>\n<|im_start|>assistant")
    context, question, answer = trec.encode(tok)
    assert tok.decode(context + question + answer) == f"{trec.context}{trec.question} Human"


@pytest.mark.parametrize("dataset", ["hotpotqa", "trec", "repobench-p"])
@pytest.mark.parametrize("context", [400, 401])
def test_prompts_that_are_too_long_lose_their_middle(tok, read, dataset, context):
    numbered = longbench(dataset, " ".join(f"Word {i}." for i in range(400)) + " ")
    [[whole]] = read(numbered).values()
    [[short]] = read(numbered, context=context).values()
    ids, expected = (sum(d.encode(tok)[:2], []) for d in (short, whole))
    room = context - whole.new_tokens
    assert room - 6 <= len(ids) <= room and short.question == whole.question
    template = len(expected) - len(tok.encode(whole.context + whole.question))
    half = (room - template) // 2 - 6
    assert ids[:half] == expected[:half] and ids[-half:] == expected[-half:]
    assert without_middle(whole, tok, len(expected) + whole.new_tokens) is whole
    with pytest.raises(UserError, match="too short for an answer"):
        read(numbered, context=whole.new_tokens + 20)


def test_a_question_longer_than_half_is_cut_too(tok):
    asked = "Question: " + " ".join(f"word{i}" for i in range(300)) + "\nAnswer:"
    short = without_middle(Written(STORY, asked, "x", new_tokens=32), tok, 232)
    assert sum(map(len, short.encode(tok)[:2])) <= 200 and short.question.endswith("\nAnswer:")
    assert 95 <= len(tok.encode(short.question)) <= 100 and STORY.startswith(short.context[:20])


# ---------------------------------------------------------------------------- the script


def test_all_tasks_run(folder, tmp_path, monkeypatch):
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, replace(task, new_tokens=8))
    path = tmp_path / "d.jsonl"
    lines = [*map(longbench, LINES), longbench("hotpotqa", STORY * 3), OWN, RULER]
    path.write_text("\n".join(map(json.dumps, lines)))
    report = synth_task.main(parse(synth_task.Config, [
        "--data", str(path), "--model", str(folder), "--selectors", "dense,oracle,snapkv",
        "--budgets", "0.2"]))
    assert set(report["results"]) == {*LINES, "data", "niah"}
    for name, table in report["results"].items():
        assert set(table) == {"dense", "oracle", "snapkv"}
        for by_budget in table.values():
            for m in by_budget.values():
                assert m["n"] == 1 + (name == "hotpotqa") and 0 <= m["mean"] <= 1


@pytest.mark.slow
def test_the_default_model_answers(llama, tok, read):
    """A message and a question behind examples, in contexts cut to 1,000 tokens, all dense."""
    from pydoc_data.topics import topics

    text = " ".join(topics["assignment"].split())[:9000]
    examples = ("Passage: The cup is red.\nQuestion: What colour is the cup?\nAnswer: red\n\n"
                f"Passage: {text}\nQuestion: What is it about?\nAnswer: assignment\n")
    field = longbench("multifieldqa_en", f"{STORY}\n{text}")
    data = read(field, longbench("triviaqa", examples), context=1000)
    for name, least in (("multifieldqa_en", 0.5), ("triviaqa", 0.9)):
        assert len(data[name][0].context) < 6000
        assert answers(llama, tok, data[name][0], [lambda: None])[0] >= least
