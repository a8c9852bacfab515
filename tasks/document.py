"""tasks/document.py - a question about a context, and when a text answers it.

    Document: context + question + answer, one text --encode_parts--> token ids of each
    what a model wrote --found--> 0 ... 1

    python -m tasks.document        a document, and how two answers score
"""

from dataclasses import dataclass
from os.path import commonprefix

from tasks.scores import SCORES, contains


@dataclass(frozen=True)
class Document:
    """One question about one context: context + question + answer reads as one text."""

    context: str
    question: str  # ends in the answer's cue
    answers: tuple[str, ...]  # the references
    # exact, token: the first reference is teacher-forced, and all its tokens right count, or their
    # share; all, any: the share of the references, or whether one, is in the generated text;
    # others: the best of the references by the score of this name in scores.py
    scoring: str = "exact"
    new_tokens: int = 0  # to generate, where text is
    spans: tuple[tuple[int, int], ...] = ()  # characters of context without which nobody knows
    classes: tuple[str, ...] = ()  # that the answer is one of, where it is
    chat: bool = False  # a user's message, for models that have a format for these
    one_line: bool = False  # only the first line that is generated counts

    @property
    def answer(self) -> str:
        """The first reference, with a space if none parts it from the question."""
        apart = self.question[-1:].isspace() or self.answers[0][:1].isspace()
        return self.answers[0] if apart else " " + self.answers[0]

    @property
    def text(self) -> str:
        return self.context + self.question + self.answer


def encode_parts(tok, parts) -> list[list[int]]:
    """Texts that follow each other -> token ids of each, those of the joined text cut in pieces:
    some vocabularies put a blank before whatever they encode. Where a token straddles the border
    of two parts, the later part is encoded by itself."""
    text, done, pieces = "", [], []
    for part in parts:
        text += part
        whole = tok.encode(text)
        pieces.append(whole[len(done) :] if whole[: len(done)] == done else tok.encode(part))
        done = done + pieces[-1]
    return pieces


def encode(tok, document: Document) -> tuple[list[int], ...]:
    """-> ids of the context, of the question and of the first reference. Of a message, what the
    format puts before it belongs to the context, and what it puts behind to the question."""
    if document.chat and tok.chat_format:
        told = document.context, document.context + document.question
        start, whole = (tok.chat([{"role": "user", "content": text}]) for text in told)
        context = commonprefix([start, whole])
        return context, whole[len(context) :], tok.encode(document.answers[0])
    context, *rest = encode_parts(tok, (document.context, document.question, document.answer))
    return [tok.bos_id] * tok.add_bos + context, *rest


def finished(document: Document, text: str) -> bool:
    """Can more text no longer change the score?"""
    if document.scoring in SCORES:
        return document.one_line and "\n" in text.lstrip("\n")
    return found(document, text) == 1


def found(document: Document, text: str) -> float:
    """By one of SCORES, or by substring, case apart, as RULER does."""
    if document.one_line:
        text = text.lstrip("\n").split("\n")[0]
    score = SCORES.get(document.scoring, contains)
    worth = [score(text, reference, document.classes) for reference in document.answers]
    return sum(worth) / len(worth) if document.scoring == "all" else max(worth)


if __name__ == "__main__":
    document = Document("Ada owns 3 cats.", " Whose cats? How many?", ("Ada", "3"), "all", 8)
    print(document.text)
    for text in "Ada", "3 of ADA's":
        print(f"{text!r}: {found(document, text):.2f}")
