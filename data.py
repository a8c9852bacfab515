"""data.py - the text to train on, and the part of it that is held out.

    Python's own text, or yours  --hold_out-->  training texts  --Mixture-->  windows of token ids
                                        \\->  about a tenth: measured on, never trained on

Nothing is downloaded. Every Python installation carries a language reference (English prose) and
the standard library (code). The mixture adds co-reference documents from the training pools.

    python data.py        how much text there is
"""

import hashlib
import json
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

from cli import UserError, read_text
from synth_task import pools, training_text

HELD_OUT = set(json.loads(Path(__file__).with_name("held_out.json").read_text("utf-8")))
PART = 8192  # characters: longer texts of a user are cut into parts before some are held out


def default_texts() -> list[dict[str, str]]:
    """What every Python carries, as two sources {name: text}: the language reference, and the
    standard library's code."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    left_out = {"site-packages", "test", "tests", "idlelib", "pydoc_data"}
    code = {f.relative_to(library).as_posix(): read_text(f, errors="replace") for f in files
            if not left_out & set(f.relative_to(library).parts)}
    return [topics, code]


def read_texts(paths: list) -> dict[str, str]:
    """Files and folders -> {path: text}, without empty files. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--data: there is no {path}")
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    texts = {str(f): read_text(f, errors="replace") for f in files}
    return {name: text for name, text in texts.items() if text.strip()}


def hold_out(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """-> (training texts, held-out texts).

    Of the text that Python carries, held_out.json names what is held out: the shipped butler has
    never seen it, in any version of Python. Other texts are cut into parts, and the hash of each
    part decides, so that adding a file moves no other. Raises UserError for too little text.
    """
    parts = list(dict.fromkeys(texts.values()))  # the reference repeats texts under other names
    held = {texts[name] for name in HELD_OUT & texts.keys()}
    if not held:
        parts = [text[i : i + PART] for text in parts for i in range(0, len(text), PART)]
        parts = list(dict.fromkeys(parts))
        if len(parts) < 2:
            raise UserError(f"--data: too little text, at least {2 * PART:,} characters are needed")
        rank = {p: hashlib.sha256(p.encode(errors="replace")).digest() for p in parts}
        held = {p for p in parts if rank[p][0] < 26}  # 26 of 256
        if len(held) in (0, len(parts)):
            held = {min(parts, key=rank.get)}
    return [p for p in parts if p not in held], [p for p in parts if p in held]


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
