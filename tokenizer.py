"""tokenizer.py - text to ids and back: byte-level BPE, built offline from files beside the weights.

    text --pattern--> pieces --UTF-8--> bytes --merges, lowest rank first--> tokens --table--> ids
    ids  --table--> bytes --UTF-8--> text

A vocabulary is three things: a pattern that cuts text into pieces (no token crosses a cut), a
ranked list of merges, and a table from tokens to ids. GGUF files, Hugging Face's tokenizer.json and
Meta's tokenizer.model each spell them differently; all of them end as one tiktoken encoding, which
does the work in Rust. What tiktoken cannot express (SentencePiece's normalisation, above all) is
handed to the optional `tokenizers` package behind the same interface.

    python tokenizer.py                    # a short trace with the default model
    python tokenizer.py PATH "some text"   # PATH: whatever `load` below takes
"""

import base64
import json
import re
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from weights import Refusal, open_gguf

# How each family cuts text. GPT-2 takes words, numbers and punctuation with the space before them;
# SmolLM first sets every numeric character alone, so white space before one stays in one piece;
# Llama 3 takes digits in threes and lets newlines close punctuation.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_PATTERNS = {"smollm": SMOLLM, "gpt-2": GPT2, "default": GPT2}
GGUF_PATTERNS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3)
CONTROL, USER, UNUSED, BYTE = (2, 3), 4, 5, 6  # llama.cpp's token types; its unknown (2) is no text

# Llama 3's special tokens in order (llama-models, llama3/tokenizer.py), filled up to 256. Llama 3.0
# still called some of these reserved; those that its chats use stood in the same places.
META_SPECIAL = ["begin_of_text", "end_of_text", "reserved_special_token_0"]
META_SPECIAL += ["reserved_special_token_1", "finetune_right_pad_id", "step_id", "start_header_id"]
META_SPECIAL += ["end_header_id", "eom_id", "eot_id", "python_tag"]
META_SPECIAL += [f"reserved_special_token_{i}" for i in range(2, 2 + 256 - len(META_SPECIAL))]

ENDS = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>"}
CHAT_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
MAX_IDS = 1 << 21  # several times the largest vocabulary in use: beyond it a file is damaged
LONG_RUN = 900_000  # tiktoken's regex engine overflows its stack on a million spaces in a row


class TokenizerError(Refusal):
    """A tokenizer file is missing, damaged or not of a kind served: one line naming the file."""


class _Beyond(Exception):
    """What this vocabulary asks for and tiktoken cannot express (handed to `tokenizers`)."""


def byte_alphabet():
    """GPT-2's printable stand-in for every byte (openai/gpt-2, encoder.py), as dict char -> byte.

    Vocabulary files are text and bytes are not: printable Latin-1 stands for itself, the other 68
    bytes (controls and blanks) take the characters from U+0100 on, so a space reads as 'Ġ'.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(shown))
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


ALPHABET = byte_alphabet()


def to_bytes(token):
    """The bytes that a vocabulary entry, written in GPT-2's alphabet, stands for."""
    try:
        return bytes([ALPHABET[char] for char in token])
    except KeyError:
        raise TokenizerError(f"token {token!r} is not written in GPT-2's byte alphabet") from None


def merge(token, order):
    """Plain byte-pair encoding of one byte string: (its parts, the rank of the last merge or None).

    order maps a pair (left, right) to its rank. This is the whole algorithm: as long as neighbours
    may merge, merge the leftmost pair of lowest rank.
    """
    parts, last = [token[i : i + 1] for i in range(len(token))], None
    while True:
        pairs = [(order[p], i) for i, p in enumerate(pairwise(parts)) if p in order]
        if not pairs:
            return parts, last
        last, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def rank_tokens(ids, merges, whole):
    """Ordered tokens such that tiktoken, which knows no pairs, merges exactly as the pairs say.

    tiktoken merges any neighbours whose concatenation has a rank. That comes to the same if a
    token's rank is that of the last merge in the token's *own* encoding: no merge crosses the ends
    of a stretch that later becomes one token, so the stretch passes through the same parts whatever
    stands around it. For the same reason a token whose own bytes do not merge back into it never
    appears, and must have no rank: tiktoken would still find it by looking up a whole piece.

    ids: dict bytes -> id; merges: pairs of bytes, best first; whole: a piece that is a token is
    taken whole (`ignore_merges`), so the remaining tokens get ranks after all others.
    Raises TokenizerError, or _Beyond where no ranks can say it.
    """
    order = {}
    for left, right in merges:
        unknown = [part for part in (left, right, left + right) if part not in ids]
        if unknown or not left or not right:
            raise TokenizerError(f"merge {left!r} + {right!r} names a token not in the vocabulary")
        order.setdefault((left, right), len(order))
    ranks = {}
    for token in {left + right for left, right in order}:
        parts, last = merge(token, order)
        if len(parts) == 1:
            ranks[token] = last
    ranked = [bytes([b]) for b in range(256)] + sorted(ranks, key=ranks.get)
    for token in ids if whole else ():
        if token not in ranks and len(token) > 1:
            if len(merge(token, order)[0]) == 2:  # tiktoken would also merge inside longer pieces
                raise _Beyond(f"token {token!r}, a whole piece only")
            ranked.append(token)
    return ranked


class ByteLevel:
    """Byte-level BPE through tiktoken: ordinary text -> ids, added tokens cut out beforehand.

    ranked: tokens (bytes), best first, single bytes among them; ids: dict bytes -> id. A byte
    without an id (SmolLM has none for some controls) is dropped, as in the authors' tokenizer.
    control, user: added tokens, dict text -> id; user ones are found even where special is False.
    """

    def __init__(self, pattern, ranked, ids, control, user):
        try:
            ranks = {token: rank for rank, token in enumerate(ranked)}
            self.encoding = tiktoken.Encoding(
                "file", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
            self.pattern = regex.compile(pattern)
        except (ValueError, regex.error) as error:
            raise _Beyond(f"the pattern {pattern!r} ({error})") from error
        self.ids = np.array([ids.get(token, -1) for token in ranked])
        self.missing = bytes(b for b in range(256) if bytes([b]) not in ids)
        self.added, self.user = control | user, self._finder(user)
        self.all = self._finder(self.added)

    @staticmethod
    def _finder(names):
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def encode(self, text, special):
        finder = self.all if special else self.user
        if finder is None:
            return self._ordinary(text)
        parts = enumerate(finder.split(text))  # odd places hold the tokens found
        both = ([self.added[part]] if i % 2 else self._ordinary(part) for i, part in parts)
        return list(chain.from_iterable(both))

    def _ordinary(self, text):
        longest = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > LONG_RUN else 0
        if longest <= LONG_RUN:
            ids = self.ids[self._ranks(text)] if text else np.array([], int)
            if not (ids < 0).any():
                return ids.tolist()
        # The slow way, almost never taken: cut here, drop bytes without an id, then merge. Dropping
        # them afterwards would not do, since their neighbours may merge over the gap.
        pieces = (
            m.group().encode().translate(None, self.missing) for m in self.pattern.finditer(text)
        )
        ranks = chain.from_iterable(self.encoding._encode_single_piece(p) for p in pieces if p)
        return self.ids[list(ranks)].tolist()

    def _ranks(self, text):
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:  # where its regex engine gives up, tiktoken panics
            if type(error).__name__ != "PanicException":
                raise
            reason = f"the pattern {self.pattern.pattern!r} takes too long on this text"
            raise TokenizerError(reason) from None


class Library:
    """The same `encode` by the optional `tokenizers` package, for what tiktoken cannot express."""

    def __init__(self, path, reason):
        try:
            import tokenizers
        except ImportError:
            hint = "pip install tokenizers"
            raise TokenizerError(f"{reason} needs the optional package: {hint}") from None
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise TokenizerError(f"tokenizers refuses it ({error})") from error
        self.model.no_truncation()
        self.model.no_padding()

    def encode(self, text, special):
        self.model.encode_special_tokens = not special
        return self.model.encode(text, add_special_tokens=False).ids


class Tokenizer:
    """Text to ids and back, whatever file it came from; made by `load`.

    vocab_size: one more than the largest id. bos_id: int or None. eos_ids: ids that end a text or a
    turn. special: control tokens, dict text -> id. add_bos: the model's authors start every prompt
    with BOS. chat_format: "chatml", "llama3" or None.
    """

    def __init__(self, backend, table, special, bos_id, eos_ids, add_bos, template, strips=False):
        self._backend, self._table, self._strips = backend, table, strips
        self.vocab_size, self.special = len(table), dict(special)
        ends = {i for name, i in special.items() if name in ENDS}
        self.bos_id, self.eos_ids = bos_id, frozenset({i for i in eos_ids if i is not None} | ends)
        self.add_bos = bool(add_bos) and bos_id is not None
        for i in self.eos_ids | ({bos_id} - {None}):
            if type(i) is not int or not 0 <= i < len(table):
                raise TokenizerError(f"BOS or EOS id {i!r} is outside the {len(table)} ids")
        known = [f for f, marks in CHAT_MARKS.items() if set(marks) <= special.keys()]
        self.chat_format = next((f for f in known if CHAT_MARKS[f][1] in (template or "")), None)
        found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}]*?)<\|im_end\|>", template or "")
        self._system = found and found[1].replace("\\n", "\n").replace("\\'", "'")

    def check(self, model) -> "Tokenizer":
        """Returns self if the model has a row for every id that text can become, or that this
        vocabulary puts around it; else raises TokenizerError. Control tokens may lie beyond, as
        padding that was added later often does."""
        marks = {self.special[m] for m in CHAT_MARKS.get(self.chat_format, ())}
        beyond = set(self.special.values()) - marks - {self.bos_id}
        rows = model.config.vocab_size
        if missing := [i for i in range(rows, self.vocab_size)
                       if self._table[i] is not None and i not in beyond]:
            raise TokenizerError(f"this tokenizer is not the model's: id {missing[0]}, "
                                 f"{self._table[missing[0]]!r}, is beyond its {rows} rows")
        return self

    def encode(self, text: str, special: bool = False) -> list[int]:
        """str -> list of ids, without BOS. Where special is False, '<|im_end|>' in the text is a
        handful of ordinary tokens, as a user's text should be; otherwise it is that token.
        """
        # Half a surrogate pair is no text and has no UTF-8; it becomes U+FFFD.
        return self._backend.encode(
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), special
        )

    def decode_bytes(self, ids) -> bytes:
        """ids -> bytes. A character may be spread over tokens, so a streamer joins these bytes and
        holds incomplete UTF-8 back. Raises ValueError for an id that names no token.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self._table) or self._table[i] is None:
                raise ValueError(f"id {i} names no token (the vocabulary has {len(self._table)})")
        return b"".join(self._table[i] for i in ids)

    def decode(self, ids) -> str:
        """ids -> str; special tokens appear as their text, broken UTF-8 as U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text[1:] if self._strips and text.startswith(" ") else text

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
        if self.chat_format == "llama3":
            begin, start, close, end = (self.special[m] for m in CHAT_MARKS["llama3"])
            gap, ids = self.encode("\n\n"), [begin]
            for message in messages:
                ids += [start, *self.encode(message["role"]), close]
                ids += [*self.encode("\n\n" + message["content"].strip()), end]
            return [*ids, start, *self.encode("assistant"), close, *gap]
        start, end = (self.special[m] for m in CHAT_MARKS["chatml"])
        if messages and messages[0]["role"] != "system" and self._system is not None:
            messages = [{"role": "system", "content": self._system}, *messages]
        ids, newline = [], self.encode("\n")
        for message in messages:
            text = f"{message['role']}\n{message['content']}"
            ids += [start, *self.encode(text), end, *newline]
        return [*ids, start, *self.encode("assistant\n")]


def make_table(entries):
    """(id, bytes) pairs -> list of bytes by id, None at a hole; refuses absurd and double ids."""
    table = {}
    for i, token in entries:
        if type(i) is not int or not 0 <= i < MAX_IDS:
            raise TokenizerError(f"token {token!r} has the id {i!r}")
        if table.setdefault(i, token) != token:
            raise TokenizerError(f"id {i} is given to both {table[i]!r} and {token!r}")
    if not table:
        raise TokenizerError("the vocabulary is empty")
    return [table.get(i) for i in range(max(table) + 1)]


def sort_added(added):
    """(text, id, is control) triples -> dicts control and user (tokens found even in plain text).

    A mark that ends turns or texts is control whatever its file says: users must not type it.
    """
    marks = ENDS.union(*CHAT_MARKS.values())
    control = {text: i for text, i, is_control in added if is_control or text in marks}
    return control, {text: i for text, i, _ in added if text not in control}


def from_gguf(path):
    """The tokenizer inside a GGUF file (byte-level ones: `tokenizer.ggml.model` is gpt2)."""
    fields = open_gguf(path).fields

    def get(name, default=None):
        field = fields.get(name if "." in name else f"tokenizer.ggml.{name}")
        return default if field is None else field.contents()

    kind, pre = get("model"), get("pre")
    if kind != "gpt2":
        raise TokenizerError(f"a GGUF's tokenizer model {kind!r} is not served; use tokenizer.json")
    if pre not in GGUF_PATTERNS:
        raise TokenizerError(f"pre-tokenizer {pre!r} is not one of {', '.join(GGUF_PATTERNS)}")
    tokens, merges = get("tokens", []), get("merges", [])
    types = get("token_type", [1] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise TokenizerError("its tokens repeat, or their types are not as many")
    ids, entries, added = {}, [], []
    for i, (token, what) in enumerate(zip(tokens, types, strict=True)):
        if what in (*CONTROL, USER, UNUSED):  # these are written as they are
            data = token.encode()
            added += [(token, i, what in CONTROL)] * (what != UNUSED)
        else:
            data = bytes([int(token[3:5], 16)]) if what == BYTE else to_bytes(token)
            ids[data] = i
        entries.append((i, data))
    control, user = sort_added(added)
    llama3 = GGUF_PATTERNS[pre] is LLAMA3
    try:
        pairs = [tuple(map(to_bytes, m.split(" "))) for m in merges]
        backend = ByteLevel(GGUF_PATTERNS[pre], rank_tokens(ids, pairs, llama3), ids, control, user)
    except _Beyond as reason:
        raise TokenizerError(f"not served from a GGUF: {reason}; use tokenizer.json") from reason
    ends = [get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    add_bos = get("add_bos_token", llama3)  # llama.cpp's defaults, too
    template = get("tokenizer.chat_template")
    return Tokenizer(
        backend, make_table(entries), control, get("bos_token_id"), ends, add_bos, template
    )


def split_pattern(spec):
    """The tiktoken pattern of a tokenizer.json, or _Beyond with the reason why there is none."""
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE":
        raise _Beyond(f"a {model['type']} model")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _Beyond(key)
    if spec.get("normalizer"):
        raise _Beyond(f"the normalizer {spec['normalizer']['type']}")
    for token in spec.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise _Beyond(
                f"the added token {token['content']!r}, which takes its surroundings along,"
            )
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *first, last = steps or [{}]
    kinds, cuts = [step.get("type") for step in steps], last.get("use_regex", True)
    if kinds[-1:] == ["ByteLevel"] and not last.get("add_prefix_space", True):
        if not first and cuts:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and first[0].get("individual_digits") and cuts:
            return SMOLLM
        isolated = kinds == ["Split", "ByteLevel"] and first[0]["behavior"] == "Isolated"
        own = first[0]["pattern"].get("Regex") if isolated and not first[0].get("invert") else None
        if own and not cuts:
            # What the pattern leaves out is a piece as well; tiktoken alone would lose it.
            return own if own == LLAMA3 else rf"(?:{own})|(?:(?!{own})(?s:.))+"
    raise _Beyond(f"the pre-tokenizer {kinds}")


def read_json(path):
    """A JSON object, or {} where there is no such file."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} holds no JSON object")
    return value


def from_json(path):
    """Hugging Face's tokenizer.json, with the configuration files that lie beside it."""
    spec = read_json(path)
    vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    control, user = sort_added([(t["content"], t["id"], t.get("special")) for t in added])
    names, strips = control | user, False
    if len(names) != len(added) or not all(type(n) is str for n in names):
        raise TokenizerError("its added tokens repeat or are no text")
    entries = [(i, name.encode()) for name, i in names.items()]
    try:
        pattern = split_pattern(spec)
        ids = {to_bytes(token): i for token, i in vocab.items() if token not in names}
        if spec["model"].get("unk_token") and any(bytes([b]) not in ids for b in range(256)):
            raise _Beyond("unk_token in place of missing bytes")
        pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        pairs = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
        ranked = rank_tokens(ids, pairs, spec["model"].get("ignore_merges"))
        backend = ByteLevel(pattern, ranked, ids, control, user)
        entries += [(i, token) for token, i in ids.items()]
    except _Beyond as reason:
        backend = Library(path, str(reason))
        steps = str(spec.get("decoder"))
        strips = "'Strip'" in steps or "'Metaspace'" in steps
        inside = backend.model.get_vocab(with_added_tokens=False).items()
        entries += [(i, piece(t, "'ByteLevel'" in steps)) for t, i in inside if t not in names]
    return Tokenizer(backend, make_table(entries), control, *settings(path, spec, names), strips)


def piece(token, byte_level):
    """The bytes of a vocabulary entry of the library: GPT-2's alphabet, or SentencePiece's '▁'."""
    if byte_level:
        return to_bytes(token)
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def settings(path, spec, control):
    """(BOS id, EOS ids, add BOS, chat template) from tokenizer.json's neighbours, all optional."""
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    own, *others = (read_json(path.with_name(name)) for name in names)

    def named(key):
        token = own.get(key)
        return control.get(token["content"] if isinstance(token, dict) else token)

    bos, ends = named("bos_token"), [named("eos_token")]
    for other in others:
        bos = other.get("bos_token_id") if bos is None else bos
        listed = other.get("eos_token_id")
        ends += listed if isinstance(listed, list) else [listed]
    add_bos, post = own.get("add_bos_token"), spec.get("post_processor") or {}
    if add_bos is None:  # Llama 3 says it only through the template that its tokenizer.json applies
        heads = [step.get("single", [])[:1] for step in post.get("processors", [post])]
        tokens = [item.get("SpecialToken", {}).get("id") for head in heads for item in head]
        add_bos = bos is not None and bos in map(control.get, tokens)
    template = own.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    jinja = path.with_name("chat_template.jinja")
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else template
    return bos, ends, add_bos, template


def from_meta(path):
    """Meta's tokenizer.model of Llama 3: lines "base64 rank", the special tokens after the last."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ids = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        hint = "if it is a SentencePiece model, tokenizer.json is needed"
        raise TokenizerError(f"no tiktoken vocabulary; {hint}") from None
    ranked, count = sorted(ids, key=ids.get), len(pairs)
    if [ids[token] for token in ranked] != list(range(count)) or not 256 <= count < MAX_IDS:
        raise TokenizerError("its ranks are not 0, 1, 2 ... once each")
    if any(bytes([b]) not in ids for b in range(256)):
        raise TokenizerError("some byte has no token")
    special = {f"<|{name}|>": count + i for i, name in enumerate(META_SPECIAL)}
    table = ranked + [name.encode() for name in special]
    backend = ByteLevel(LLAMA3, ranked, ids, special, {})
    return Tokenizer(backend, table, special, count, [count + 1], True, "<|start_header_id|>")


def load(path: str | Path) -> Tokenizer:
    """The Tokenizer of a GGUF, a Hugging Face folder, a tokenizer.json or Meta's tokenizer.model.

    Raises TokenizerError, one line that names the file, whatever is wrong with it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = [path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).exists()]
            if not found:
                raise TokenizerError("this folder has no tokenizer.json and no tokenizer.model")
            path = found[0]
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"GGUF"):
            return from_gguf(path)
        is_json = path.suffix == ".json" or start.lstrip().startswith(b"{")
        return from_json(path) if is_json else from_meta(path)
    except TokenizerError as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or repr(error)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        problem = f"damaged or not a tokenizer ({type(error).__name__}: {error})"
    except (RecursionError, MemoryError) as error:
        problem = f"damaged: its sizes are absurd ({error!r})"
    raise TokenizerError(f"{path}: {problem}")


def main(path=None, text="In 2024 a café sold 1234 naïve 🦙🦙."):
    """Print how a text is cut, and what a special token typed by a user becomes."""
    if path is None:
        import model

        path = model.resolve()
    tokenizer = load(path)
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
    except ValueError as error:
        print(f"tokenizer.py: {error}", file=sys.stderr)
        sys.exit(2)
