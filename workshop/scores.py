"""workshop/scores.py - what a written answer is worth, as LongBench (arXiv 2308.14508) scores it.

    text, reference, classes  --SCORES[name]-->  0 to 1

    contains   1 if the reference is in the text, in any case; RULER scores so too
    f1         harmonic mean of precision and recall of words, without case, punctuation, articles
    rouge      ROUGE-L of summaries by the package `rouge`, with which the published numbers were
               made; the package `rouge-score` counts repeated words and gives other numbers
    class      1 / (number of classes that the text names) if the right one is among them. A class
               whose name is part of the right class's name does not count.
    retrieval  share of the numbers in the text that are the right paragraph's
    count      share of the numbers in the text that are the right one
    code       similarity of the first line that is no comment, in whole per cent, by difflib:
               fuzzywuzzy does the same when it is installed alone

    python -m workshop.scores        what some answers are worth
"""

import re
import string
from collections import Counter
from difflib import SequenceMatcher

from cli import UserError


def contains(text: str, reference: str, classes=()) -> float:
    return float(reference.lower() in text.lower())


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(text: str, reference: str, classes=()) -> float:
    said, right = words(text), words(reference)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_package():
    """The optional package. Raises UserError."""
    try:
        import rouge
    except ImportError:
        raise UserError("summaries are scored by ROUGE-L, which needs: pip install rouge") from None
    return rouge


def rouge_l(text: str, reference: str, classes=()) -> float:
    try:
        scores = rouge_package().Rouge(metrics=["rouge-l"]).get_scores(text, reference)
    except (ValueError, RecursionError):  # nothing but dots; a very long sentence
        return 0.0
    return scores[0]["rouge-l"]["f"]


def class_accuracy(text: str, reference: str, classes=()) -> float:
    named = [c for c in classes if c in text and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(text: str, reference: str, classes=()) -> float:
    numbers = re.findall(r"\d+", text)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(text: str, reference: str, classes=()) -> float:
    return count(text, re.search(r"Paragraph (\d+)", reference)[1])


def code(text: str, reference: str, classes=()) -> float:
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


SCORES = {"contains": contains, "f1": f1, "rouge": rouge_l, "class": class_accuracy,
          "retrieval": retrieval, "count": count, "code": code}


if __name__ == "__main__":
    for name, text, reference in (
            ("f1", "It is the red box.", "red box"), ("class", "Date or Number", "Date"),
            ("retrieval", "Paragraph 3, not 12", "Paragraph 3"), ("count", "Only 7", "7"),
            ("code", "# next\nx = y + 1", "x = y + 2"), ("contains", "A dog barks.", "dog")):
        score = SCORES[name](text, reference, ("Date", "Number", "Place"))
        print(f"{name:10s} {score:.2f}  {text!r} for {reference!r}")
