"""tasks/document.py - a question about a context, and when a text answers it.

    Document: context + question + answer, one text --encode_parts--> token ids of each
    what a model wrote --found--> 0 ... 1

    python -m tasks.document        a document, and how two answers score
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One question about one context: context + question + " " + answer reads as one text."""

    context: str
    question: str  # ends in the answer's cue, without a trailing space
    answers: tuple[str, ...]  # the references, without a leading space
    # exact, token: the first reference is teacher-forced, and all its tokens right count, or their
    # share; all, any: the share of the references, or whether one, is in the generated text
    scoring: str = "exact"
    new_tokens: int = 0  # to generate, where text is
    spans: tuple[tuple[int, int], ...] = ()  # characters of context without which nobody knows

    @property
    def answer(self) -> str:
        """The first reference with its space, so that it can be tokenized alone."""
        return " " + self.answers[0]

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


def found(document: Document, text: str) -> float:
    """Scoring by substring, case apart, as RULER does: share of the references, or any of them."""
    hits = [reference.lower() in text.lower() for reference in document.answers]
    return float(any(hits)) if document.scoring == "any" else sum(hits) / len(hits)


if __name__ == "__main__":
    document = Document("Ada owns 3 cats.", " Whose cats? How many?", ("Ada", "3"), "all", 8)
    print(document.text)
    for text in "Ada", "3 of ADA's":
        print(f"{text!r}: {found(document, text):.2f}")
