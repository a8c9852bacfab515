"""workshop/written.py - documents whose answers are graded in other ways than synth_task.py's.

    Document  (synth_task.py)   forced on the model; right or wrong as a whole
    Copied                      forced on the model; the share of its tokens that are right
    Written                     the model writes, greedily; its text is scored
    Several                     several questions about one context, each forced; their mean
    Attended                    forced; the share of the attention on a needle that is selected

    python -m workshop.written        what some written answers are worth
"""

from dataclasses import dataclass
from os.path import commonprefix

import torch

from kernel import index_to_mask, true_attention
from synth_task import Document, likeliest
from workshop.scores import SCORES


@dataclass(frozen=True)
class Copied(Document):
    """A long answer, forced on the model: the share of its tokens that are the most likely ones."""

    def grade(self, llama, tok, cache, question, answer, selector, stepwise: bool) -> float:
        right = self.tokens_right(llama, cache, question, answer, selector, stepwise)
        return sum(right) / len(right)


@dataclass(frozen=True)
class Several(Document):
    """Several questions about one context, which is read once. `others` are documents with the same
    context. Each question is asked behind the context alone, as if it were the only one."""

    others: tuple[Document, ...] = ()

    @property
    def asked(self) -> tuple[Document, ...]:
        return (self, *self.others)


@dataclass(frozen=True)
class Attended(Document):
    """A question that the model cannot answer. What counts is the attention on the needle.

    needle   a part of the context, which holds the answer

    The score is the share of the true attention on the needle's tokens that falls on selected
    ones, over all layers, heads and tokens of question and answer. Heads that attend more to the
    needle count more. Dense has 1.
    """

    needle: str = ""

    def needle_tokens(self, tok) -> slice:
        """Where the needle stands in the cache. Its first token includes the blank before it."""
        before = self.context.split(self.needle)[0].rstrip(" ")
        start = len(tok.bos) + len(tok.encode(before))
        return slice(start, start + len(tok.encode(" " + self.needle)))

    def grade(self, llama, tok, cache, question, answer, selector, stepwise: bool) -> float:
        if selector is None:
            return 1.0
        probe = NeedleProbe(selector, self.needle_tokens(tok))
        self.tokens_right(llama, cache, question, answer, probe, stepwise)
        return probe.selected / probe.attended


class NeedleProbe:
    """A selector that selects what another one does, and sums up the attention on a needle.

    needle     slice of the tokens in the cache
    attended   attention on the needle, summed over layers, heads and queries
    selected   that part of it which falls on selected tokens
    """

    def __init__(self, selector, needle: slice):
        self.selector = selector
        self.needle = needle
        self.attended = 0.0
        self.selected = 0.0

    def look_ahead(self, *seen) -> None:
        self.selector.look_ahead(*seen)

    def __call__(self, layer, x, q, keys, positions):
        index = self.selector(layer, x, q, keys, positions)
        if index is not None:
            attention = true_attention(q, keys)[..., self.needle]  # [B, G, H/G, T, N]
            mask = index_to_mask(index, keys.shape[2])[..., self.needle]  # [B, G, T, N]
            self.attended += attention.sum().item()
            self.selected += (attention * mask[:, :, None]).sum().item()
        return index


@dataclass(frozen=True)
class Written(Document):
    """A question that the model answers in its own words, greedily.

    answer       the first reference
    others       further references
    scoring      a name of workshop/scores.py
    every        all references are wanted and the mean counts; otherwise the best reference counts
    new_tokens   how many tokens the model may write
    classes      the answer is one of these (scoring "class")
    chat         context and question are a user's message, where the model has a chat template
    one_line     only the first line counts, empty lines before it apart
    """

    others: tuple[str, ...] = ()
    scoring: str = "contains"
    every: bool = False
    new_tokens: int = 64
    classes: tuple[str, ...] = ()
    chat: bool = False
    one_line: bool = False

    @property
    def references(self) -> tuple[str, ...]:
        return (self.answer, *self.others)

    def encode(self, tok) -> list[list[int]]:
        """-> ids of context, question and first reference. In a chat, what the template puts before
        the message belongs to the context, and what it puts behind it to the question."""
        if not (self.chat and tok.template):
            return super().encode(tok)
        whole = tok.chat(self.context + self.question)
        context = commonprefix([tok.chat(self.context), whole])
        return [context, whole[len(context) :], tok.encode(self.answer)]

    def room(self, answer: list[int]) -> int:
        return self.new_tokens

    def grade(self, llama, tok, cache, question, answer, selector, stepwise: bool) -> float:
        """The score, 0 to 1, of what the model writes; arguments as in Document.grade."""
        question = torch.tensor([question], device=llama.device)
        for block in question.split(1 if stepwise else question.shape[1], dim=1):
            logits = llama.prefill(block, cache, selector)
        silent = set(tok.special.values())  # marks of a chat are no part of the answer
        ids, text = [], ""
        while True:
            token = likeliest(logits[:, -1:])
            ids.append(int(token))
            if ids[-1] in tok.ends:
                break
            text = tok.decode(i for i in ids if i not in silent)
            if len(ids) == self.new_tokens or self.finished(text):
                break
            logits = llama.decode(token, cache, selector)
        return self.score(text)

    def score(self, text: str) -> float:
        if self.one_line:
            text = text.lstrip("\n").split("\n")[0]
        each = [SCORES[self.scoring](text, reference, self.classes)
                for reference in self.references]
        return sum(each) / len(each) if self.every else max(each)

    def finished(self, text: str) -> bool:
        """Can more text no longer change the score?"""
        if self.one_line:
            return "\n" in text.lstrip("\n")
        return self.scoring == "contains" and self.score(text) == 1


if __name__ == "__main__":
    document = Written("Ada owns 3 cats.", " Whose cats? How many?", "Ada", ("3",), every=True)
    print(document.context + document.question)
    for text in "Ada", "3 of ADA's":
        print(f"{text!r}: {document.score(text):.2f}, finished: {document.finished(text)}")
