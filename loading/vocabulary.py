"""loading/vocabulary.py - what a tokenizer's file says: how text is cut, what merges, which ids.

    a GGUF | tokenizer.json and its neighbours | Meta's tokenizer.model  --read--> Vocabulary

A vocabulary is three things: a pattern that cuts text into pieces (no token crosses a cut), a
ranked list of merges, and a table from tokens to ids. The three formats spell them differently;
here they end alike, as tiktoken takes them. What tiktoken cannot express stays where it is, and
`beyond` says why.

    python -m loading.vocabulary        the first merges of the default model
"""

import base64
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gguf import TokenType

from common.errors import Refusal
from loading.weights import open_gguf

# How each family cuts text. GPT-2 takes words, numbers and punctuation with the space before them;
# SmolLM first sets every numeric character alone, so white space before one stays in one piece;
# Llama 3 takes digits in threes and lets newlines close punctuation.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GGUF_PATTERNS = {"smollm": SMOLLM, "gpt-2": GPT2, "default": GPT2}
GGUF_PATTERNS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3)

# GPT-2's printable stand-in for every byte (openai/gpt-2, encoder.py), as dict char -> byte: files
# are text and bytes are not. Printable Latin-1 stands for itself, the other 68 bytes (controls and
# blanks) take the characters from U+0100 on, so a space reads as 'Ġ'.
HIDDEN = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
ALPHABET = {chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b): b for b in range(256)}

USER = TokenType.USER_DEFINED  # of a GGUF's added tokens these alone are found in any text
ADDED = (TokenType.UNKNOWN, TokenType.CONTROL, USER, TokenType.UNUSED)

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


class TokenizerError(Refusal):
    """A tokenizer file is missing, damaged or not of a kind served: one line naming the file."""


class Beyond(Exception):
    """What this vocabulary asks for and tiktoken cannot express (handed to `tokenizers`)."""


@dataclass(frozen=True)
class Vocabulary:
    """Added tokens are text, all others bytes.

    control, user: added tokens, dict text -> id; user ones are found in any text. bos_id, eos_ids:
    int or None; add_bos: prompts start with BOS; template: of chats, or None. pattern; ranked:
    tokens, best first, single bytes among them; ids: dict bytes -> id. These three are missing
    where `beyond` says why.
    """

    path: Path
    control: dict
    user: dict
    bos_id: int | None
    eos_ids: list
    add_bos: bool
    template: str | None
    pattern: str = ""
    ranked: list | None = None
    ids: dict | None = None
    beyond: Beyond | None = None


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
    while pairs := [(order[p], i) for i, p in enumerate(pairwise(parts)) if p in order]:
        last, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


def rank_tokens(ids, merges, whole):
    """Ordered tokens such that tiktoken, which knows no pairs, merges exactly as the pairs say.

    tiktoken merges any neighbours whose concatenation has a rank. That comes to the same if a
    token's rank is that of the last merge in the token's *own* encoding: no merge crosses the ends
    of a stretch that later becomes one token, so the stretch passes through the same parts whatever
    stands around it. For the same reason a token whose own bytes do not merge back into it never
    appears, and must have no rank: tiktoken would still find it by looking up a whole piece.

    ids: dict bytes -> id; merges: "left right" or (left, right) in GPT-2's alphabet, best first;
    whole: a piece that is a token is taken whole (`ignore_merges`), so the remaining tokens get
    ranks after all others.
    Raises TokenizerError, or Beyond where no ranks can say it.
    """
    order = {}
    for pair in merges:
        left, right = map(to_bytes, pair.split(" ") if isinstance(pair, str) else pair)
        if not (left and right and {left, right, left + right} <= ids.keys()):
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
                raise Beyond(f"token {token!r}, a whole piece only")
            ranked.append(token)
    return ranked


def sort_added(added):
    """(text, id, is control) triples -> dicts control and user (tokens found even in plain text).

    A mark that ends turns or texts is control whatever its file says: users must not type it.
    """
    marks = ENDS.union(*CHAT_MARKS.values())
    control = {text: i for text, i, is_control in added if is_control or text in marks}
    return control, {text: i for text, i, _ in added if text not in control}


def from_gguf(path):
    """That of a GGUF file (byte-level ones: `tokenizer.ggml.model` is gpt2)."""
    get = open_gguf(path).value
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise TokenizerError(f"a GGUF's tokenizer model {kind!r} is not served; use tokenizer.json")
    if pre not in GGUF_PATTERNS:
        raise TokenizerError(f"pre-tokenizer {pre!r} is not one of {', '.join(GGUF_PATTERNS)}")
    tokens, merges = get("tokenizer.ggml.tokens", []), get("tokenizer.ggml.merges", [])
    types = get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise TokenizerError("its tokens repeat, or their types are not as many")
    numbered = list(zip(tokens, range(len(tokens)), types, strict=True))
    ids = {to_bytes(token): i for token, i, what in numbered if what not in ADDED}
    added = [(token, i, what != USER) for token, i, what in numbered if what in ADDED]
    llama3 = GGUF_PATTERNS[pre] is LLAMA3
    try:
        ranked = rank_tokens(ids, merges, llama3)
    except Beyond as reason:
        raise TokenizerError(f"not served from a GGUF: {reason}; use tokenizer.json") from reason
    ends = [get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    add_bos = get("tokenizer.ggml.add_bos_token", llama3)  # llama.cpp's defaults, too
    return Vocabulary(path, *sort_added(added), get("tokenizer.ggml.bos_token_id"), ends, add_bos,
                      get("tokenizer.chat_template"), GGUF_PATTERNS[pre], ranked, ids)


def split_pattern(spec):
    """The tiktoken pattern of a tokenizer.json, or Beyond with the reason why there is none."""
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE":
        raise Beyond(f"a {model['type']} model")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Beyond(key)
    if spec.get("normalizer"):
        raise Beyond(f"the normalizer {spec['normalizer']['type']}")
    for token in spec.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise Beyond(f"the added token {token['content']!r}, which takes its surroundings "
                         "along,")
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    match [{"invert": False, "use_regex": True} | step for step in steps]:  # unless said otherwise
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": own}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if own:
            # What the pattern leaves out is a piece as well; tiktoken alone would lose it.
            return own if own == LLAMA3 else rf"(?:{own})|(?:(?!{own})(?s:.))+"
    raise Beyond(f"the pre-tokenizer {[step.get('type') for step in steps]}")


def read_json(path):
    """A JSON object, or {} where there is no such file."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} holds no JSON object")
    return value


def from_json(path):
    """Hugging Face's tokenizer.json, with the configuration files that lie beside it."""
    spec = read_json(path)
    vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
    control, user = sort_added([(t["content"], t["id"], t.get("special")) for t in added])
    names = control | user
    if len(names) != len(added) or not all(type(n) is str for n in names):
        raise TokenizerError("its added tokens repeat or are no text")
    known = path, control, user, *settings(path, spec, names)
    try:
        pattern = split_pattern(spec)
        ids = {to_bytes(token): i for token, i in vocab.items() if token not in names}
        if spec["model"].get("unk_token") and any(bytes([b]) not in ids for b in range(256)):
            raise Beyond("unk_token in place of missing bytes")
        ranked = rank_tokens(ids, spec["model"]["merges"], spec["model"].get("ignore_merges"))
    except Beyond as reason:
        return Vocabulary(*known, beyond=reason)
    return Vocabulary(*known, pattern, ranked, ids)


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
    if [ids[token] for token in ranked] != list(range(count)) or count < 256:
        raise TokenizerError("its ranks are not 0, 1, 2 ... once each")
    if any(bytes([b]) not in ids for b in range(256)):
        raise TokenizerError("some byte has no token")
    special = {f"<|{name}|>": count + i for i, name in enumerate(META_SPECIAL)}
    return Vocabulary(path, special, {}, count, [count + 1], True, "<|start_header_id|>", LLAMA3,
                      ranked, ids)


def read(path: Path) -> Vocabulary:
    """A file -> what it says. Damage raises anything; `tokenizer.load` makes one line of it."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        return from_gguf(path)
    is_json = path.suffix == ".json" or start.lstrip().startswith(b"{")
    return from_json(path) if is_json else from_meta(path)


if __name__ == "__main__":
    from loading.fetch import resolve

    made = read(resolve())
    merged = [token for token in made.ranked if len(token) > 1]
    print(f"{len(made.ids):,} tokens, {len(merged):,} of them merged, first {merged[:8]}")
    print(f"{len(made.control)} control tokens, {', '.join(made.control)}")
