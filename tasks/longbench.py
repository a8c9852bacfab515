"""tasks/longbench.py - other people's questions: lines of JSON in, Documents of each data set out.

    a line {"context", "question", "answer"}                        ours: "data"
    a line {"input", "context", "answers", "dataset", ...}          LongBench's, arXiv 2308.14508
    a line {"input", "outputs", "answer_prefix", ...}               RULER's, arXiv 2404.06654
        --read_data--> {data set: Documents} --cut--> as much of each as the model holds

LongBench: the sixteen English tasks, with the prompts, lengths of answers and scores published for
them (longbench.json; "asconcisely" is theirs). A template is split behind its context: what stands
before is read densely with it, what stands behind is the question. As published, a prompt that is
too long loses its middle, the first and the last half of its tokens are kept; most tasks go to the
model as a user's message, where it has a chat format; and of some only the first line written
counts, which here ends the writing. (Published code ends it so for samsum alone, and there forbids
an empty first line, which here is skipped.)

RULER: `input` is split at its last line, which with `answer_prefix` is the question. Its words tell
the task, and so the length of the answer and whether all references count or any.

    python -m tasks.longbench        the sixteen tasks
"""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from common.errors import UsageError, in_one_line
from common.files import read_text
from tasks.document import Document, encode, encode_parts
from tasks.scores import SCORES, rouge_package

RULER = {  # what a question says -> its task, whose references count, tokens to write
    "special magic": ("niah", "all", 128),
    "variables are assigned": ("variable_tracking", "all", 30),
    "variables that are assigned": ("variable_tracking", "all", 30),
    "words that appear most often": ("common_words_extraction", "all", 120),
    "frequently appeared words": ("freq_words_extraction", "all", 50),
    "Question:": ("qa", "any", 32),
}


@cache
def published() -> dict:
    """{task of LongBench: its prompt, new_tokens, scoring, chat, one_line}"""
    return json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


def texts(entry: dict, *names: str) -> list[str]:
    """These values. Raises UsageError for one that is no text."""
    for name in names:
        if not isinstance(entry[name], str):
            raise UsageError(f"{', '.join(names)} are texts, but {name} is not")
    return [entry[name] for name in names]


def references(entry: dict, name: str) -> tuple[str, ...]:
    """The accepted answers, at least one, none empty. Raises UsageError."""
    answers = [entry[name]] if isinstance(entry[name], str) else entry[name]
    if not (isinstance(answers, list) and answers
            and all(isinstance(a, str) and a.strip() for a in answers)):
        raise UsageError(f"{name} is a text or a list of texts, none empty")
    return tuple(answers)


def ours(entry: dict) -> tuple[str, Document]:
    context, question = texts(entry, "context", "question")
    if not (context and question):
        raise UsageError("context and question are texts, none empty")
    answers = tuple(a.strip() for a in references(entry, "answer"))
    return "data", Document(context, question, answers, "any", 64)


def longbench(entry: dict) -> tuple[str, Document]:
    asked, context, name = texts(entry, "input", "context", "dataset")
    answers, classes = references(entry, "answers"), ()
    rules = dict(published().get(name.removesuffix("_e"), {}))
    if not rules:
        raise UsageError(f"data set {name!r} is none of LongBench's English: "
                         f"{', '.join(published())}")
    if rules["scoring"] == "class":
        classes = entry.get("all_classes")
        if not (isinstance(classes, list) and all(isinstance(c, str) and c for c in classes)
                and set(answers) <= set(classes)):
            raise UsageError("all_classes is a list of texts, the answers among them")
    if rules["scoring"] == "retrieval" and not all(re.search(r"Paragraph \d", a) for a in answers):
        raise UsageError('answers are like "Paragraph 1"')
    before, behind = rules.pop("prompt").split("{context}")
    return name, Document(before + context, behind.replace("{input}", asked), answers,
                          classes=tuple(classes), **rules)


def ruler(entry: dict) -> tuple[str, Document]:
    text, prefix = texts({"answer_prefix": ""} | entry, "input", "answer_prefix")
    at = text.rstrip().rfind("\n") if text.count("\n") else len(text)
    context, question = text[:at], text[at:] + prefix
    task = next((RULER[said] for said in RULER if said in question), None)
    if not context.strip():
        raise UsageError("input has but one line: no context before its question")
    if task is None:
        raise UsageError("the last line of input, with answer_prefix, is no question of RULER's")
    name, scoring, new_tokens = task
    return name, Document(context, question, references(entry, "outputs"), scoring, new_tokens)


FORMATS = {("context", "question", "answer"): ours,
           ("input", "context", "answers", "dataset"): longbench,
           ("input", "outputs"): ruler}


def read_data(path) -> dict[str, list[Document]]:
    """-> {data set: its documents}. Raises UsageError with file and line for what is neither ours,
    LongBench's nor RULER's, and if a package is missing that a score needs."""
    found = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with in_one_line(UsageError, f"{path}:{number}", "not JSON"):
            entry = json.loads(line)
            keys = entry.keys() if isinstance(entry, dict) else ()
            make = next((FORMATS[names] for names in FORMATS if set(names) <= set(keys)), None)
            if make is None:
                raise UsageError("not an object with " + ", nor with ".join(map(" ".join, FORMATS)))
            name, document = make(entry)
        found.setdefault(name, []).append(document)
    if not found:
        raise UsageError(f"{path}: no lines")
    if any(documents[0].scoring == "rouge" for documents in found.values()):
        rouge_package()
    return found


def cut(tok, document: Document, context: int) -> Document:
    """A prompt of LongBench's without its middle, so that it and its answer have at most `context`
    tokens; other documents as they are. Raises UsageError if hardly anything is left."""
    if document.scoring not in SCORES:
        return document
    first, question = encode_parts(tok, (document.context, document.question))
    ids, short = first + question, document  # marks of a message are no part of them
    keep = len(ids)
    room = context - document.new_tokens - 2  # a part by itself may have a token more
    while (over := sum(map(len, encode(tok, short)[:2])) - room) > 0:
        keep -= over
        half = keep // 2
        if half < 16:
            raise UsageError(f"the model's context of {context} tokens is too short for an answer "
                             f"of {document.new_tokens}")
        asked = min(len(question), half)
        middle = tok.decode(ids[:half]) + tok.decode(ids[len(ids) - half : len(ids) - asked])
        asked = document.question if asked == len(question) else tok.decode(question[-asked:])
        short = replace(document, context=middle, question=asked)
    return short


if __name__ == "__main__":
    for name, rules in published().items():
        chat, line = ("a message" * rules["chat"], "first line" * rules["one_line"])
        print(f"{name:21s} {rules['scoring']:9s}  {rules['new_tokens']:3d} tokens  {chat:9s}  "
              f"{line:10s} {rules['prompt'].split('{context}')[1][-40:]!r}")
