"""workshop/longbench.py - questions from a JSONL file: your own, LongBench's or RULER's.

    {"context", "question", "answer"}               your own; data set "data"
    {"input", "context", "answers", "dataset"}      LongBench's, arXiv 2308.14508
    {"input", "outputs", "answer_prefix"}           RULER's, arXiv 2404.06654
        --read_data-->  {data set: [Document]}

The keys tell the formats apart, one JSON object a line. `answer` is one accepted answer or a list
of them. Each answer is written by the model, greedily. A key that is not known here may change what
is asked or accepted, so it is refused. Keys that begin with "_" are ignored.

LongBench: the sixteen English tasks with their published scores and lengths of answers. The prompts
are this file's own words, so scores are comparable with each other but not with published ones. For
the official prompts set the environment variable LONGBENCH_CONFIG to LongBench's own folder
`config`, which holds dataset2prompt.json and dataset2maxlen.json. As published, a prompt that is
too long loses its middle, and most tasks are asked as a user's message where the model has a chat
template. Of three tasks only the first line counts, and here the writing ends with it.

RULER: `input` is split at its last line, which together with `answer_prefix` is the question. Its
words tell the task.

    python synth_task.py --data questions.jsonl
    LONGBENCH_CONFIG=LongBench/config python synth_task.py --data hotpotqa.jsonl
"""

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cli import UserError, one_line, read_text
from workshop.scores import rouge_package
from workshop.written import Written


@dataclass(frozen=True)
class Task:
    """How a task of LongBench is asked and scored. The last four are Written's."""

    prompt: str  # {context} stands for the context and, behind it, {input} for the question
    scoring: str
    new_tokens: int
    chat: bool = True
    one_line: bool = False


SHORT = ("\n\n{context}\n\nAnswer the question about the text above in a few words.\n\n"
         "Question: {input}\nAnswer:")
TASKS = {
    "narrativeqa": Task("Read this story." + SHORT, "f1", 128),
    "qasper": Task(
        "Read this article.\n\n{context}\n\nAnswer the question about it in a few words, with "
        '"yes" or "no" where that is enough, or with "unanswerable" if the article does not tell.'
        "\n\nQuestion: {input}\nAnswer:", "f1", 128),
    "multifieldqa_en": Task("Read this text." + SHORT, "f1", 64),
    "hotpotqa": Task("Read these passages." + SHORT, "f1", 32),
    "2wikimqa": Task("Read these passages." + SHORT, "f1", 32),
    "musique": Task("Read these passages." + SHORT, "f1", 32),
    "gov_report": Task(
        "Read this report.\n\n{context}\n\nSummarize it in one page.\n\nSummary:", "rouge", 512),
    "qmsum": Task(
        "Read what was said in a meeting.\n\n{context}\n\nReply to this in a few sentences: {input}"
        "\nReply:", "rouge", 512),
    "multi_news": Task(
        "Read these news articles.\n\n{context}\n\nSummarize all of them in one page.\n\nSummary:",
        "rouge", 512),
    "trec": Task("Find the type of each question.\n\n{context}\n{input}", "class", 64,
                 chat=False, one_line=True),
    "triviaqa": Task(
        "Answer the question about the passage with the answer alone. Some examples come first."
        "\n\n{context}\n\n{input}", "f1", 32, chat=False, one_line=True),
    "samsum": Task("Summarize each dialogue in a few sentences.\n\n{context}\n\n{input}", "rouge",
                   128, chat=False, one_line=True),
    "passage_count": Task(
        "Some of these paragraphs come more than once.\n\n{context}\n\nHow many different "
        "paragraphs are there? Answer with the number alone.\n\nAnswer:", "count", 32),
    "passage_retrieval_en": Task(
        "Read these numbered paragraphs.\n\n{context}\n\nWhich of them does this summary belong "
        'to?\n\n{input}\n\nAnswer in the form "Paragraph 1".\n\nAnswer:', "retrieval", 32),
    "lcc": Task("Continue this code.\n\n{context}The line that follows:\n", "code", 64, chat=False),
    "repobench-p": Task("Continue this code.\n\n{context}{input}The line that follows:\n", "code",
                        64, chat=False),
}

RULER = {  # words of a question -> data set, do all references count?, new tokens
    "special magic": ("niah", True, 128),
    "variables are assigned": ("variable_tracking", True, 30),
    "variables that are assigned": ("variable_tracking", True, 30),
    "words that appear most often": ("common_words_extraction", True, 120),
    "frequently appeared words": ("freq_words_extraction", True, 50),
    "Question:": ("qa", False, 32),
}


def tasks_of_longbench() -> dict[str, Task]:
    """TASKS, with the official prompts and lengths if LONGBENCH_CONFIG names their folder."""
    folder = os.environ.get("LONGBENCH_CONFIG")
    if not folder:
        return TASKS
    official = {}
    with one_line(f"LONGBENCH_CONFIG={folder}"):
        prompts = json.loads(read_text(Path(folder) / "dataset2prompt.json"))
        lengths = json.loads(read_text(Path(folder) / "dataset2maxlen.json"))
        for name, task in TASKS.items():
            prompt, new_tokens = prompts[name], lengths[name]
            if not isinstance(prompt, str) or prompt.count("{context}") != 1:
                raise UserError(f"the prompt of {name} must be a text with one {{context}}")
            if type(new_tokens) is not int or new_tokens < 1:
                raise UserError(f"the length of {name} must be a positive whole number")
            official[name] = replace(task, prompt=prompt, new_tokens=new_tokens)
    return official


# ---------------------------------------------------------------------------- formats


def texts(entry: dict, *names: str) -> list[str]:
    """These values. Raises UserError for one that is no text."""
    for name in names:
        if not isinstance(entry[name], str):
            raise UserError(f"{name} must be a text")
        if name in ("context", "question") and not entry[name].strip():
            raise UserError(f"{name} is empty")
    return [entry[name] for name in names]


def references(entry: dict, name: str) -> list[str]:
    """The accepted answers: at least one, each with something to see. Raises UserError."""
    answers = [entry[name]] if isinstance(entry[name], str) else entry[name]
    if not (isinstance(answers, list) and answers
            and all(isinstance(a, str) and visible(a) for a in answers)):
        raise UserError(f"{name} must be a text or a list of texts, none empty")
    with one_line(name):
        "".join(answers).encode()  # no model writes half a surrogate pair
    return answers


def visible(text: str) -> bool:
    """Is there more than blanks and characters without width?"""
    return any(map(str.isprintable, "".join(text.split())))


def own(entry: dict, tasks) -> tuple[str, Written]:
    context, question = texts(entry, "context", "question")
    answer, *others = (a.strip() for a in references(entry, "answer"))
    return "data", Written(context, question, answer, tuple(others))


def longbench(entry: dict, tasks) -> tuple[str, Written]:
    asked, context, name = texts(entry, "input", "context", "dataset")
    answer, *others = references(entry, "answers")
    task = tasks.get(name.removesuffix("_e"))
    classes = ()
    if task is None:
        raise UserError(f"data set {name!r} is none of LongBench's English ones: "
                        f"{', '.join(TASKS)}")
    if task.scoring == "class":
        classes = entry.get("all_classes")
        if not (isinstance(classes, list) and all(isinstance(c, str) and c for c in classes)
                and {answer, *others} <= set(classes)):
            raise UserError("all_classes must be a list of texts, the answers among them")
    if task.scoring == "retrieval" and not all(re.search(r"Paragraph \d", a)
                                               for a in (answer, *others)):
        raise UserError('answers must be like "Paragraph 1"')
    before, behind = task.prompt.split("{context}")
    return name, Written(before + context, behind.replace("{input}", asked), answer, tuple(others),
                         scoring=task.scoring, new_tokens=task.new_tokens, classes=tuple(classes),
                         chat=task.chat, one_line=task.one_line)


def ruler(entry: dict, tasks) -> tuple[str, Written]:
    text, prefix = texts({"answer_prefix": ""} | entry, "input", "answer_prefix")
    answer, *others = references(entry, "outputs")
    at = text.rstrip().rfind("\n")
    context, question = text[:at], text[at:] + prefix
    if at < 0 or not context.strip():
        raise UserError("input has only one line, so there is no context before its question")
    task = next((RULER[words] for words in RULER if words in question), None)
    if task is None:
        raise UserError("the last line of input, with answer_prefix, is no question of RULER's")
    name, every, new_tokens = task
    return name, Written(context, question, answer, tuple(others), every=every,
                         new_tokens=new_tokens)


# The keys that tell a format; the function that reads it; further keys that it reads or that are
# known to change no score.
FORMATS = (
    (("context", "question", "answer"), own, ()),
    (("input", "context", "answers", "dataset"), longbench, ("all_classes", "length")),
    (("input", "outputs"), ruler, ("answer_prefix", "token_position_answer", "length",
                                   "length_w_model_temp")),
)
DESCRIBE = ("id", "index", "source", "title", "url", "author", "date", "language", "topic",
            "domain", "sub_domain", "difficulty", "comment", "note")


def parse(line: str, tasks) -> tuple[str, Written]:
    """One line -> its data set and its document. Raises UserError."""
    with one_line("expected one JSON object a line"):
        entry = json.loads(line, object_pairs_hook=unique_keys)
        if not isinstance(entry, dict):
            raise UserError(f"this is a {type(entry).__name__}")
    for needed, make, more in FORMATS:
        if set(needed) <= entry.keys():
            unknown = [repr(key) for key, value in entry.items() if value is not None
                       and key not in (*needed, *more, *DESCRIBE) and not key.startswith("_")]
            if choice := next((key for key in entry if key.startswith("choice")), None):
                raise UserError(f"a question with choices ({choice!r}) is not scored")
            if unknown:
                raise UserError(f"not read in lines with {', '.join(needed)}, but may change the "
                                f"score: {', '.join(unknown)}. Put a _ before a key to have it "
                                "ignored")
            return make(entry, tasks)
    formats = "; or ".join(", ".join(needed) for needed, _, _ in FORMATS)
    raise UserError(f"expected one of these sets of keys: {formats}")


def unique_keys(pairs: list) -> dict:
    """A JSON object's keys and values -> a dict. Raises UserError for a key that comes twice."""
    entry = {}
    for key, value in pairs:
        if key in entry:
            raise UserError(f"the key {key!r} comes twice")
        entry[key] = value
    return entry


# ---------------------------------------------------------------------------- the file


def read_data(path, tok, n: int, context: int) -> dict[str, list[Written]]:
    """The first n lines of each data set of a file -> {data set: its documents}, none longer than
    the model's context. Raises UserError, with file and line, for what cannot be asked or scored.
    """
    tasks = tasks_of_longbench()
    found, left_out, marked = {}, 0, []
    first, again = {}, []  # lines where documents first stand, and where they stand again
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with one_line(f"{path}:{number}"):
            name, document = parse(line, tasks)
            if len(found.setdefault(name, [])) == n:
                left_out += 1
                continue
            if mark := mark_in(document, tok):
                marked.append((number, mark))
            if first.setdefault((name, document), number) < number:
                again.append((number, first[name, document]))
            if name.removesuffix("_e") in tasks:
                document = without_middle(document, tok, context)
            check_size(document, tok, context)
            check_answers(document, tok)
        found[name].append(document)
    if not found:
        raise UserError(f"{path}: no lines")
    if any(documents[0].scoring == "rouge" for documents in found.values()):
        rouge_package()
    if any(name.removesuffix("_e") in tasks for name in found):
        source = os.environ.get("LONGBENCH_CONFIG") or "workshop/longbench.py (not the official)"
        print(f"{path}: prompts of {source}", file=sys.stderr)
    if marked:
        number, mark = marked[0]
        print(f"{path}:{number}: the text contains {mark}, which is read as ordinary text, not as "
              f"a special token ({len(marked)} such lines)", file=sys.stderr)
    if again:
        number, same = again[0]
        print(f"{path}:{number}: the same as line {same}, and counted again ({len(again)} such "
              "lines)", file=sys.stderr)
    if left_out:
        print(f"{path}: {left_out} lines left out, --n {n} for each data set", file=sys.stderr)
    return found


# What chat templates of other models put into a text. The loaded model's own are in tok.special.
MARKS = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|\[/?INST\]|<</?SYS>>|</?s>"
                   "|<(start|end)_of_turn>")


def mark_in(document: Written, tok) -> str | None:
    """A special token that stands in the document as text, if there is one."""
    text = "\n".join((document.context, document.question, *document.references))
    own = next((mark for mark in tok.special if mark and mark in text), None)
    found = MARKS.search(text)
    return own or found and found[0]


def check_answers(document: Written, tok) -> None:
    """Raises UserError if no answer could ever score, however well the model writes."""
    if document.scoring in ("rouge", "code"):  # slow; a comment as the reference
        return
    if not any(map(document.score, document.references)):
        raise UserError(f"even a text like {document.answer[:40]!r} would score 0")
    shortest = min(len(tok.encode(answer)) for answer in document.references)
    if document.scoring == "contains" and shortest > document.new_tokens:
        raise UserError(f"the answer has {shortest} tokens, the model may write "
                        f"{document.new_tokens}")


def check_size(document: Written, tok, context: int) -> None:
    """Raises UserError for a document that the model cannot hold, or with an empty part."""
    told, asked, answer = document.encode(tok)
    size = len(told) + len(asked) + document.room(answer)
    if not (told and asked):
        raise UserError("context or question has no token")
    if size > context:
        raise UserError(f"{size} tokens with {document.room(answer)} for the answer, the model's "
                        f"context is {context}")


def without_middle(document: Written, tok, context: int) -> Written:
    """As much of the start and of the end of a prompt, half each, as the model's context holds
    beside the answer. Raises UserError if that is hardly anything."""
    ids = tok.encode(document.context + document.question)
    keep = len(ids)
    short = document
    # Template and borders of texts take some tokens too, so the first cut may not be the last.
    while (size := sum(map(len, short.encode(tok)[:2])) + document.new_tokens) > context:
        keep -= size - context
        half = keep // 2
        if half < 16:
            raise UserError(f"the model's context of {context} tokens is too short for an answer "
                            f"of {document.new_tokens}")
        start, end = tok.decode(ids[:half]), tok.decode(ids[-half:])
        if end.endswith(document.question):
            short = replace(document, context=start + end.removesuffix(document.question))
        else:  # the question alone is longer than half of it
            short = replace(document, context=start, question=end)
    return short
