"""loading/tokenizer.py - text to ids and back: byte-level BPE from files beside the weights.

    text --pattern--> pieces --UTF-8--> bytes --merges, lowest rank first--> tokens --table--> ids
    ids  --table--> bytes --UTF-8--> text

All that a file says about this is read by vocabulary.py and ends as one tiktoken encoding, which
does the work in Rust. What tiktoken cannot express (SentencePiece's normalisation, above all) is
handed to the optional `tokenizers` package behind the same interface.

    python -m loading.tokenizer                    # a short trace with the default model
    python -m loading.tokenizer PATH "some text"   # PATH: whatever `load` below takes
"""

import os
import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from common.cli import complain
from common.errors import Refusal, in_one_line
from loading.fetch import resolve
from loading.vocabulary import CHAT_MARKS, ENDS, Beyond, TokenizerError, Vocabulary, read, to_bytes

MAX_IDS = 1 << 21  # several times the largest vocabulary in use: beyond it a file is damaged
LONG_RUN = 900_000  # tiktoken's regex engine overflows its stack on a million spaces in a row


def make_table(v: Vocabulary, tokens):
    """Added tokens and these (bytes, id) pairs -> dict id -> bytes. Refuses absurd, double ids."""
    table, added = {}, v.control | v.user
    for token, i in chain(((name.encode(), i) for name, i in added.items()), tokens):
        if type(i) is not int or not 0 <= i < MAX_IDS:
            raise TokenizerError(f"token {token!r} has the id {i!r}")
        if table.setdefault(i, token) != token:
            raise TokenizerError(f"id {i} is given to both {table[i]!r} and {token!r}")
    if not table:
        raise TokenizerError("the vocabulary is empty")
    return table


class ByteLevel:
    """Byte-level BPE through tiktoken: ordinary text -> ids, added tokens cut out beforehand.

    A byte without an id (SmolLM has none for some controls) is dropped, as in the authors'
    tokenizer. Raises Beyond for what tiktoken cannot express, or a pattern that it refuses.
    """

    strips = False

    def __init__(self, v: Vocabulary):
        if v.beyond:
            raise v.beyond
        ranks = {token: rank for rank, token in enumerate(v.ranked)}
        try:
            self.encoding = tiktoken.Encoding("file", pat_str=v.pattern, mergeable_ranks=ranks,
                                              special_tokens={})
            self.pattern = regex.compile(v.pattern)
        except (ValueError, regex.error) as error:
            raise Beyond(f"the pattern {v.pattern!r} ({error})") from error
        self.table = make_table(v, v.ids.items())
        self.ids = np.array([v.ids.get(token, -1) for token in v.ranked])
        self.missing = bytes(b for b in range(256) if bytes([b]) not in v.ids)
        self.added = v.control | v.user
        self.user, self.all = any_of(v.user), any_of(self.added)

    def encode(self, text, special):
        parts = (self.all if special else self.user).split(text)  # odd places: the tokens found
        return list(chain.from_iterable([self.added[part]] if i % 2 else self._ordinary(part)
                                        for i, part in enumerate(parts)))

    def _ordinary(self, text):
        try:
            if len(text) < LONG_RUN or not re.search(rf"(?<!\s)\s{{{LONG_RUN}}}", text):
                ids = self.ids[self.encoding.encode_ordinary(text)]
                if not (ids < 0).any():
                    return ids.tolist()
        except BaseException as error:  # where its regex engine gives up, tiktoken panics
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"the pattern {self.pattern.pattern!r} takes too long on this "
                                 "text") from None
        # The slow way, almost never taken: cut here, drop bytes without an id, then merge. Dropping
        # them afterwards would not do, since their neighbours may merge over the gap.
        pieces = (found.group().encode().translate(None, self.missing)
                  for found in self.pattern.finditer(text))
        ranks = chain.from_iterable(self.encoding._encode_single_piece(p) for p in pieces if p)
        return self.ids[list(ranks)].tolist()


def any_of(names):
    """A pattern that finds any of these names, the longest first; nothing if there are none."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


class Library:
    """The same by the optional `tokenizers` package, for what tiktoken cannot express."""

    def __init__(self, v: Vocabulary, reason: Beyond):
        try:
            import tokenizers
        except ImportError:
            raise TokenizerError(f"{reason} needs the optional package: pip install "
                                 "tokenizers") from None
        try:
            self.model = tokenizers.Tokenizer.from_file(str(v.path))
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"tokenizers refuses it ({error})") from error
        self.model.no_truncation()
        self.model.no_padding()
        decoder, added = repr(self.model.decoder), v.control | v.user
        self.strips = "Strip(" in decoder or "Metaspace(" in decoder
        own = self.model.get_vocab(with_added_tokens=False).items()
        self.table = make_table(v, ((piece(token, "ByteLevel(" in decoder), i) for token, i in own
                                    if token not in added))

    def encode(self, text, special):
        self.model.encode_special_tokens = not special
        return self.model.encode(text, add_special_tokens=False).ids


def piece(token, byte_level):
    """The bytes of a vocabulary entry of the library: GPT-2's alphabet, or SentencePiece's '▁'."""
    if byte_level:
        return to_bytes(token)
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


class Tokenizer:
    """Text to ids and back, whatever file it came from; made by `load`.

    vocab_size: one more than the largest id. bos_id: int or None. eos_ids: ids that end a text or a
    turn. special: control tokens, dict text -> id. add_bos: the model's authors start every prompt
    with BOS. chat_format: "chatml", "llama3" or None.
    """

    def __init__(self, v: Vocabulary):
        try:
            self._backend = ByteLevel(v)
        except Beyond as reason:
            self._backend = Library(v, reason)
        self._table = self._backend.table
        self.vocab_size, self.special = max(self._table) + 1, dict(v.control)
        self.bos_id, self.add_bos = v.bos_id, bool(v.add_bos) and v.bos_id is not None
        ends = {*v.eos_ids, *(i for name, i in v.control.items() if name in ENDS)}
        self.eos_ids = frozenset(ends - {None})
        for i in {*ends, v.bos_id} - {None}:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise TokenizerError(f"BOS or EOS id {i!r} is outside the {self.vocab_size} ids")
        template = v.template or ""
        known = [f for f, marks in CHAT_MARKS.items() if set(marks) <= v.control.keys()]
        self.chat_format = next((f for f in known if CHAT_MARKS[f][1] in template), None)
        found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}]*?)<\|im_end\|>", template)
        self._system = found and found[1].replace("\\n", "\n").replace("\\'", "'")

    def check(self, model) -> "Tokenizer":
        """Returns self if the model has a row for every id that text can become, or that this
        vocabulary puts around it; else raises TokenizerError. Control tokens may lie beyond, as
        padding that was added later often does. From then on rows of the model that no token has,
        to which matrices are often rounded up, decode to nothing."""
        marks = {self.special[m] for m in CHAT_MARKS.get(self.chat_format, ())}
        beyond = set(self.special.values()) - marks - {self.bos_id}
        rows = model.config.vocab_size
        if missing := {i for i in self._table if i >= rows} - beyond:
            raise TokenizerError(f"this tokenizer is not the model's: id {min(missing)}, "
                                 f"{self._table[min(missing)]!r}, is beyond its {rows} rows")
        self._table = dict.fromkeys(range(rows), b"") | self._table
        return self

    def encode(self, text: str, special: bool = False) -> list[int]:
        """str -> list of ids, without BOS. Where special is False, '<|im_end|>' in the text is a
        handful of ordinary tokens, as a user's text should be; otherwise it is that token. Half a
        surrogate pair, which is no text and has no UTF-8, becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._backend.encode(text, special)

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self.encode(text))

    def decode_bytes(self, ids) -> bytes:
        """ids -> bytes. A character may be spread over tokens, so a streamer joins these bytes and
        holds incomplete UTF-8 back. Raises ValueError for an id that names no token."""
        ids = [int(i) for i in ids]
        for i in ids:
            if i not in self._table:
                raise ValueError(f"id {i} names no token (the vocabulary has {self.vocab_size})")
        return b"".join(self._table[i] for i in ids)

    def decode(self, ids) -> str:
        """ids -> str; special tokens appear as their text, broken UTF-8 as U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text[1:] if self._backend.strips and text.startswith(" ") else text

    def chat(self, messages: list[dict]) -> list[int]:
        """[{"role", "content"}] -> ids of the model's own template, up to the assistant's turn.

        Roles and contents are ordinary text, so nothing in them can end a turn or forge one. ChatML
        opens with the template's default system message, where it has one and the first message is
        no system message; Llama 3's is the plain form of headers, contents stripped, without the
        block of dates and tools that 3.1 and later put in front. Raises TokenizerError where the
        model has no known template.
        """
        if self.chat_format is None:
            raise TokenizerError("this model has no chat template known here (ChatML or Llama 3)")
        marks = [self.special[m] for m in CHAT_MARKS[self.chat_format]]
        if self.chat_format == "llama3":
            begin, start, close, end = marks
            turns = [(start, m["role"], close, "\n\n" + m["content"].strip(), end)
                     for m in messages]
            parts = [begin, *chain(*turns), start, "assistant", close, "\n\n"]
        else:
            start, end = marks
            if messages and messages[0]["role"] != "system" and self._system is not None:
                messages = [{"role": "system", "content": self._system}, *messages]
            turns = [(start, f"{m['role']}\n{m['content']}", end, "\n") for m in messages]
            parts = [*chain(*turns), start, "assistant\n"]
        return list(chain(*([p] if isinstance(p, int) else self.encode(p) for p in parts)))


def load(path: str | Path) -> Tokenizer:
    """The Tokenizer of a GGUF, a Hugging Face folder, a tokenizer.json or Meta's tokenizer.model.

    Raises TokenizerError, one line that names the file, whatever is wrong with it.
    """
    path = Path(path)
    if os.path.isdir(path):
        found = [path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).exists()]
        if not found:
            raise TokenizerError(f"{path}: this folder has no tokenizer.json, no tokenizer.model")
        path = found[0]
    with in_one_line(TokenizerError, path, "damaged or not a tokenizer"):
        return Tokenizer(read(path))


def main(path=None, text="In 2024 a café sold 1234 naïve 🦙🦙."):
    """Print how a text is cut, and what a special token typed by a user becomes."""
    tokenizer = load(path or resolve())
    ids = tokenizer.encode(text)
    print(f"text    {text!r}, {len(text)} characters, {len(text.encode())} bytes")
    print(f"ids     {ids}")
    print("pieces  " + " | ".join(repr(tokenizer.decode_bytes([i]))[2:-1] for i in ids))
    for mark in sorted(ENDS & tokenizer.special.keys())[-1:]:
        typed, parsed = tokenizer.encode(mark), tokenizer.encode(mark, special=True)
        print(f"Typed by a user, {mark} is {len(typed)} tokens; as a mark it is one, {parsed}:")
        print("that difference alone keeps a text from ending its own turn.")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except Refusal as error:
        complain(error)
