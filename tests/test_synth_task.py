"""The evaluation: scores against plain greedy decoding, batches, resuming, users' own questions."""

import json

import pytest
import torch
from scipy import stats
from test_scripts import script

import synth_task
from baselines import BASELINES, make_selector
from butler import Butler, ButlerConfig, load_for
from measure.intervals import accuracy, bootstrap
from tasks.coreference import coreference_documents
from tasks.document import Document, encode_parts, found
from tasks.evaluation import Prompts, Scores, evaluate, task_documents
from tasks.longbench import read_data
from tasks.ruler import TASKS


@pytest.fixture(scope="module")
def butler(llama):
    torch.manual_seed(3)
    return Butler(ButlerConfig.for_model(llama)).eval()


def greedy(llama, tok, document, n):
    ids = [tok.bos_id] * tok.add_bos + tok.encode(document.context) + tok.encode(document.question)
    cache, written = llama.new_cache(1, len(ids) + n), []
    logits = llama.prefill(torch.tensor([ids]), cache)
    for _ in range(n):
        written.append(int(logits[0, -1].argmax()))
        logits = llama.decode(torch.tensor([written[-1:]]), cache)
    return written


def test_exact_means_that_greedy_decoding_writes_the_answer(llama, tok):
    documents = coreference_documents("test", 4, seed=6, words=90)
    (scores,) = evaluate(llama, tok, documents, ("dense",), ())["dense"]["1.0"]
    assert set(scores) == {0, 1}
    for document, score in zip(documents, scores, strict=True):
        answer = tok.encode(document.answer)
        assert score == (greedy(llama, tok, document, len(answer)) == answer)


def test_written_answers_are_those_of_greedy_decoding(llama, tok):
    lines = ["The red box holds a key.", "The blue box holds a coin, and nothing else at all."]
    documents = [Document(" ".join(lines) + extra, " The red box holds a", ("key", "zebra"),
                          "all", 6) for extra in ("", " The sky is grey.")]
    (scores,) = evaluate(llama, tok, documents, ("dense",), ())["dense"]["1.0"]
    for document, score in zip(documents, scores, strict=True):
        assert score == found(document, tok.decode(greedy(llama, tok, document, 6)))


def test_parts_are_cut_from_the_joined_text(tok):
    class Blank:  # as SentencePiece: a blank before everything
        def encode(self, text):
            return [ord(c) for c in " " + text] if text else []

    assert encode_parts(Blank(), ("ab", "c", "")) == [[32, 97, 98], [99], []]
    assert encode_parts(tok, ("A do", "g barks.", " Why?")) == [
        tok.encode("A do"), tok.encode("g barks."), tok.encode(" Why?")]
    for document in coreference_documents("test", 5, seed=1):  # here nothing straddles
        parts = (document.context, document.question, document.answer)
        assert encode_parts(tok, parts) == [tok.encode(part) for part in parts]
        assert sum(encode_parts(tok, parts), []) == tok.encode(document.text)


def test_found_counts_references_in_any_case():
    document = Document("c", "q", ("Alpha", "Beta"), "all")
    assert found(document, "ALPHA is first") == 0.5 and found(document, "beta, alpha") == 1
    assert found(Document("c", "q", ("Alpha", "Beta"), "any"), "so alpha") == 1
    assert found(document, "gamma") == 0


@pytest.mark.parametrize("question", [
    "sparse", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_batch_scores_as_its_documents_do_alone(llama, tok, butler, question):
    """Token hits of every selector, and the attention kept; all lengths differ."""
    documents = [coreference_documents("test", 1, seed=s, words=w)[0]
                 for s, w in ((1, 90), (2, 140))]
    kinds = [BASELINES[name] for name in ("h2o", "snapkv")]
    together = Prompts(llama, tok, documents, question, kinds)
    alone = [Prompts(llama, tok, [d], question, kinds) for d in documents]
    for name in ("dense", "oracle", "butler", "quest", "h2o", "snapkv", "keynorm", "recency"):
        together.answer(make_selector(name, 0.3, butler), probed=True)
        hits, kept = [], []
        for prompts in alone:
            prompts.answer(make_selector(name, 0.3, butler), probed=True)
            hits += prompts.hits
            kept += prompts.kept
        assert together.hits == hits, name
        assert together.kept == pytest.approx(kept, abs=1e-3)
        assert all(share == 1 if name == "dense" else 0.3 < share < 1 for share in kept)


def test_evictors_decide_before_the_question(llama, tok):
    """Another question leaves what they kept of the context as it was."""
    document = coreference_documents("test", 1, seed=1, words=90)[0]
    other = Document(document.context, " What was the weather like?", document.answers)
    for name in ("h2o", "snapkv"):
        left = []
        for asked in (document, other):
            prompts = Prompts(llama, tok, [asked], "sparse", [BASELINES[name]])
            selector = make_selector(name, 0.3)
            selector.follow(prompts.watchers[type(selector)])
            prompts.cache.truncate(prompts.lengths)
            with torch.no_grad():
                llama(prompts.block[:, :1], prompts.cache, selector)
            size = int(prompts.lengths[0])
            left.append({i: a[..., :size] for i, a in selector.alive.items()})
        assert torch.equal(left[0][1], left[1][1])  # layer 1: nothing of the question yet
        assert all(a.float().mean() < 0.35 for a in left[0].values())
        prompts.answer(selector := make_selector(name, 0.3))  # the whole question
        still = torch.stack([a[..., :size] for a in selector.alive.values()]).sum(-1)
        assert still.float().mean() > 15  # of the context, besides what is always kept


def test_interrupted_scores_go_on(llama, tok, tmp_path, monkeypatch):
    path, run = tmp_path / "scores.jsonl", {"seed": 1}
    filler = "It was a quiet day, and the boats lay still in the harbour until evening came. " * 2
    documents = [Document(f"The secret word is {word}. {filler}", "The secret word is", (answer,))
                 for word, answer in (("river", "river"), ("stone", "zebra"), ("apple", "apple"),
                                      ("garden", "zebra"), ("window", "window"))]

    def scored(scores):
        return evaluate(llama, tok, documents, ("dense", "recency"), ("0.3",), batch=2,
                        scores=scores, task="t", kept={})

    whole = scored(Scores())
    assert whole == {"dense": {"1.0": [[1, 0, 1, 0, 1]]}, "recency": {"0.3": [[0] * 5]}}
    old, left = Prompts.answer, [3]

    def cut(self, selector, probed):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return old(self, selector, probed)

    monkeypatch.setattr(Prompts, "answer", cut)
    with pytest.raises(KeyboardInterrupt):
        scored(Scores(path, run))
    with path.open("a") as f:
        f.write('["t 4 dense')  # the line being written when the power went
    left[0] = 3  # two batches of two selectors and one of one are 6 calls: 3 were made
    assert scored(Scores(path, run)) == whole
    left[0] = 0
    assert scored(Scores(path, run)) == whole
    lines = path.read_text().splitlines(keepends=True)
    for end in -1, -2:  # before a score, and between it and the attention kept
        path.write_text("".join(lines[:end]))
        left[0] = 1
        assert scored(Scores(path, run)) == whole
    with pytest.raises(synth_task.UsageError, match="other settings"):
        Scores(path, {"seed": 2})
    for notes in ("my notes\n", "my notes", '{"seed": 1}\nmine\n', '{"seed": 1}\n[3]\n'):
        (tmp_path / "notes.txt").write_text(notes)
        with pytest.raises(synth_task.UsageError):
            Scores(tmp_path / "notes.txt", run)
        assert (tmp_path / "notes.txt").read_text() == notes


@pytest.mark.parametrize("line, complaint", [
    ("{", "not JSON"), ("3", "not an object"), ('["context", "question"]', "not an object"),
    ('{"context": "a", "question": "b"}', "answer"),
    ('{"context": "a", "question": "b", "answer": 3}', "answer"),
    ('{"context": "a", "question": "b", "answer": []}', "answer"),
    ('{"context": "a", "question": "b", "answer": [""]}', "none empty"),
    ('{"context": 1, "question": "b", "answer": "c"}', "texts"), ("[" * 100000, "not JSON")])
def test_wrong_data_lines_are_named(tmp_path, line, complaint):
    path = tmp_path / "q.jsonl"
    path.write_text('{"context": "a", "question": "b", "answer": "c"}\n\n' + line + "\n")
    with pytest.raises(synth_task.UsageError, match=complaint) as e:
        read_data(path)
    assert f"{path}:3:" in str(e.value) and "\n" not in str(e.value)


def test_own_questions_run(main, folder, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({
        "context": "Anna keeps her red bicycle in the garden shed. " * 10,
        "question": "Question: Where does Anna keep her bicycle?\nAnswer: In the",
        "answer": ["garden shed", "shed"]}) + "\n")
    results = main("synth_task.py", "--data", path, "--selectors", "dense,butler,snapkv",
                   "--budgets", "0.3,64", "--out", tmp_path / "s.jsonl")["results"]["data"]
    assert results["dense"]["1.0"]["mean"] == 1 and set(results["butler"]) == {"0.3", "64"}
    done = script("synth_task.py", "--data", path, "--selectors", "dense,snapkv", "--model", folder)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]["data"]
    assert set(results) == {"dense", "snapkv"} and results["dense"]["1.0"]["n"] == 1
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "word " * 9000, "question": "q", "answer": "a"}))
    with pytest.raises(SystemExit) as ended:
        main("synth_task.py", "--data", long)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "8192" in err and "9067" in err
    long.write_text(json.dumps({"context": "word", "question": "\4", "answer": "a"}))
    with pytest.raises(SystemExit) as ended:
        main("synth_task.py", "--data", long)
    assert ended.value.code == 2 and "document 1: a part of it has no token" in (
        capsys.readouterr().err)


def test_evaluation_runs_every_selector_at_equal_budgets(main):
    report = main("synth_task.py", "--n", "2", "--budgets", "0.1,1.0")
    assert report["selected_tokens"]["coreference"] > 20  # the question too
    results = report["results"]["coreference"]
    assert set(results) == set(synth_task.NAMES) and set(results["dense"]) == {"1.0"}
    for by in results.values():
        for m in by.values():
            assert m["n"] == 2 and 0 <= m["low"] <= m["mean"] <= m["high"] <= 1
        assert by["1.0"]["mean"] == results["dense"]["1.0"]["mean"]


def test_several_butlers_count_each_for_itself(llama, tok, butler):
    """An untrained butler beside the shipped one: one finds the needle, the other does not."""
    (document,) = task_documents("needle_noise", 500, 1, [0], lambda text: len(tok.encode(text)))
    table = evaluate(llama, tok, [document], ("dense", "butler"), ("0.1",),
                     [load_for(llama), butler])
    assert table == {"dense": {"1.0": [[1.0]]}, "butler": {"0.1": [[1.0], [0.0]]}}


def test_bootstrap_brackets_the_mean():
    m = bootstrap([[1.0] * 30 + [0.0] * 70])
    assert m["mean"] == 0.3 and 0.2 < m["low"] < 0.3 < m["high"] < 0.4 and m["n"] == 100
    assert bootstrap([[1.0] * 5]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 5}


def test_five_of_five_is_no_certainty():
    for score, side in ((1.0, "low"), (0.0, "high")):
        exact = stats.binomtest(int(5 * score), 5).proportion_ci(0.95, "exact")
        m = accuracy([[score] * 5])
        assert m[side] == pytest.approx(getattr(exact, side)) and m["mean"] == score
    assert accuracy([[0.0, 1.0, 1.0]]) == bootstrap([[0.0, 1.0, 1.0]])


def test_runs_that_disagree_widen_the_interval():
    alike, apart = [[1.0] * 50 + [0.0] * 50] * 3, [[1.0] * 100, [0.0] * 100, [0.5] * 100]
    narrow, wide = bootstrap(alike), bootstrap(apart)
    assert narrow["mean"] == wide["mean"] == 0.5
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])


def test_every_task_is_known_by_name():
    assert set(synth_task.TASKS) == {"coreference", *TASKS}
