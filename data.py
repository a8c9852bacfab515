"""data.py - the text to train on, and the part of it that is held out.

    Python's own text, or yours  --hold_out-->  training texts  --Mixture-->  windows of token ids
                                        \\->  about a tenth: measured on, never trained on

Nothing is downloaded. Every Python installation carries a language reference (English prose) and
the standard library (code). The mixture adds co-reference documents from the training pools.

    python data.py        how much text there is
"""

import hashlib
import json
import os
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

from cli import UserError, one_line, read_text
from synth_task import pools, training_text

HELD_OUT = set(json.loads(Path(__file__).with_name("held_out.json").read_text("utf-8")))
PART = 8191  # characters, the longest part of a user's text; a part is held out as a whole


def default_texts() -> list[dict[str, str]]:
    """What every Python carries, as two sources {name: text}: the language reference, and the
    standard library's code."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    left_out = {"site-packages", "test", "tests", "idlelib", "pydoc_data"}
    code = {f.relative_to(library).as_posix(): read_text(f, errors="replace") for f in files
            if not left_out & set(f.relative_to(library).parts)}
    return [topics, code]


def read_texts(paths: list) -> tuple[dict[str, str], list[str]]:
    """Files and folders -> ({path: text} without empty files, files skipped). Of a folder, hidden
    files and folders are left out, and files that are not UTF-8 text are skipped. Raises UserError
    if a file that was named itself is no such text, or if no text is left."""
    texts = {}
    skipped = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"--data: there is no {path or repr('')}")
        if not os.path.isdir(path):
            with one_line("--data"):
                texts[os.path.abspath(path)] = read_text(path)
            continue
        for file in files_below(path):
            try:
                if not os.path.isfile(file):  # reading a pipe would wait for a writer
                    raise UserError(f"{file} is no file")
                texts[os.path.abspath(file)] = read_text(file)
            except UserError:
                skipped.append(file)
    texts = {path: text for path, text in texts.items() if text.strip()}
    if not texts:
        but = f"; not UTF-8 text: {some_of(skipped)}" * bool(skipped)
        raise UserError(f"--data: there is no text in {some_of(paths)}{but}")
    return texts, skipped


def files_below(folder) -> list[str]:
    """Whatever is in a folder and in the folders within, except what is hidden. A link to a folder
    is not followed, because it may lead back."""
    files = []
    unreadable = []
    for place, folders, names in os.walk(folder, onerror=lambda e: unreadable.append(e.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        files += [os.path.join(place, name) for name in names + links if not name.startswith(".")]
    return sorted(files + unreadable)


def some_of(paths: list) -> str:
    """The first three paths, and how many more there are."""
    names = ", ".join(repr(str(path)) for path in paths[:3])
    return f"{names} and {len(paths) - 3:,} more" if len(paths) > 3 else names


def hold_out(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """-> (training texts, held-out texts).

    Of the text that Python carries, held_out.json names what is held out: the shipped butler has
    never seen it, in any version of Python. Other texts are cut into parts, and the hash of each
    part decides, so that adding a file moves few others. Raises UserError for too little text.
    """
    parts = list(dict.fromkeys(texts.values()))  # the reference repeats texts under other names
    held = {texts[name] for name in HELD_OUT & texts.keys()}
    if not held:
        characters = sum(map(len, parts))
        if characters < 320:
            raise UserError(f"--data: too little text: {characters} characters, at least 320 are "
                            "needed")
        # An odd length: parts of a text that repeats itself are seldom the same.
        size = min(PART, characters // 20 | 1)
        parts = {text[i : i + size] for text in parts for i in range(0, len(text), size)}
        rank = {p: hashlib.sha256(p.encode(errors="replace")).digest() for p in parts}
        parts = sorted(parts, key=rank.get)
        characters = sum(map(len, parts))
        count = 0
        for part in parts:
            # About a tenth of the parts. Where parts are few, chance might hold out almost nothing
            # or almost all, so it is at least 5 % of the characters, and it stops at 20 %.
            if count < characters / 20 or (rank[part][0] < 26 and count < characters / 5):
                held.add(part)
                count += len(part)
    return [p for p in parts if p not in held], [p for p in parts if p in held]


def num_tokens(tok, texts: list[str]) -> int:
    """How many tokens the texts have. Of more than 500 texts, an estimate from the first 500."""
    sample = texts[:500]
    tokens = sum(len(tok.encode(text)) for text in sample)
    return round(tokens * sum(map(len, texts)) / max(sum(map(len, sample)), 1))


class Mixture:
    """Endless windows of token ids: a share `synthetic` of co-reference documents, and texts drawn
    at random from the sources, long texts more often.

    A window depends on its seed alone, so a resumed run sees what an uninterrupted run would see.

    repeats: so many random strings are written into every 512 tokens and, behind the same eight
    tokens, again later in the window. What follows the eight tokens can only be copied, which
    trains the butler to find earlier occurrences.
    """

    ALPHABETS = ("0123456789", "0123456789abcdef-", "abcdefghijklmnopqrstuvwxyz")

    def __init__(self, tok, sources: list[list[str]], pool, synthetic=0.3, repeats=0):
        self.tok = tok
        self.sources = sources
        self.pool = pool
        self.synthetic = synthetic
        self.repeats = repeats

    def digest(self) -> str:
        """SHA-256 of all texts, to notice that a run would be resumed on other texts."""
        return hashlib.sha256(json.dumps(self.sources).encode()).hexdigest()

    def window(self, seed: str, length: int) -> list[int]:
        """`length` token ids."""
        rng = random.Random(seed)
        ids = list(self.tok.bos)
        while len(ids) < length:
            if rng.random() < self.synthetic:
                text = training_text(rng, self.pool)
            else:
                texts = rng.choice(self.sources)
                text = rng.choices(texts, weights=[len(t) for t in texts])[0]
                start = rng.randrange(max(1, len(text) - 4 * length))
                text = text[start : start + 8 * length]
            ids += self.tok.encode(text + "\n\n")
        return self.with_repeats(random.Random(f"{seed} repeats"), ids[:length])

    def with_repeats(self, rng: random.Random, ids: list[int]) -> list[int]:
        for _ in range(self.repeats * len(ids) // 512):
            alphabet = rng.choice(self.ALPHABETS)
            secret = self.tok.encode(" " + "".join(rng.choices(alphabet, k=rng.randint(5, 36))))
            size = 8 + len(secret)
            if len(ids) > 2 * size:  # there is room for it twice
                first = rng.randrange(len(ids) - 2 * size)
                again = rng.randrange(first + size, len(ids) - size + 1)
                ids[first + 8 : first + size] = secret
                ids[again : again + size] = ids[first : first + size]
        return ids


def positions_with_gaps(rng: random.Random, length: int, span: int, gaps=3):
    """Rising positions [length] below `span`, with random gaps between them: distances that the
    tokens alone would not reach (PoSE, arXiv 2309.10400)."""
    total = rng.randint(0, max(span - length, 0))
    offsets = sorted([total, *(rng.randint(0, total) for _ in range(gaps - 1))])
    positions = torch.arange(length)
    for cut, offset in zip(sorted(rng.sample(range(1, length), gaps)), offsets, strict=True):
        positions[cut:] = torch.arange(cut, length) + offset
    return positions


def text_to_measure_on(path=None) -> str:
    """A text file; None: what is held out of Python's language reference and standard library."""
    if path:
        return read_text(path)
    return "\n\n".join(text for source in default_texts() for text in hold_out(source)[1])


def evenly_spaced(tok, text: str, n: int, length: int) -> torch.Tensor:
    """n windows [n, length] of token ids, evenly spaced over the text, none overlapping. Raises
    UserError if the text is too short for that."""
    ids = tok.encode(text)
    if len(ids) < n * length:
        raise UserError(f"the text has {len(ids):,} tokens, too few for {n} windows of {length:,}")
    step = (len(ids) - length) // max(n - 1, 1)
    return torch.tensor([(tok.bos + ids[i * step : i * step + length])[:length] for i in range(n)])


if __name__ == "__main__":
    for name, texts in zip(("reference", "library"), default_texts(), strict=True):
        kept, held = hold_out(texts)
        print(f"{name}: {sum(map(len, kept)):,} characters to train on, "
              f"{sum(map(len, held)):,} held out")
    print("a training document:", training_text(random.Random(0), pools("train"))[:200], "...")
