"""tasks/corpus.py - the text to train on, and the part of it that is held out.

    Python's own text, or yours --hold_out--> training texts --Mixture--> windows of token ids
                                         \\-> about a tenth: measured on, never trained on

Nothing is downloaded: every Python installation carries a language reference (English prose) and
the standard library (code). The mixture adds co-reference documents from the training pools.

    python -m tasks.corpus        prints how much there is, and a training document
"""

import hashlib
import json
import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

from common.errors import UsageError
from common.files import read_text
from tasks.coreference import pools, training_text

HELD_OUT = set(json.loads((Path(__file__).parent / "held_out.json").read_text()))


def default_texts() -> list[dict[str, str]]:
    """What every Python carries, as two sources: the language reference, and the library's code."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    apart = {"site-packages", "test", "tests", "idlelib", "pydoc_data"}
    code = {f.relative_to(library).as_posix(): f.read_text(errors="replace") for f in files
            if not apart & set(f.relative_to(library).parts)}
    return [topics, code]


def read_texts(paths: list) -> dict[str, str]:
    """Files and folders -> {path: text}, empty ones left out. Raises UsageError."""
    if "" in paths:  # to pathlib, the folder that one stands in
        raise UsageError("--data: a name is empty")
    files = []
    try:
        for path in map(Path, paths):
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    except OSError as e:
        raise UsageError(f"cannot read {e.filename} ({e.strerror})") from None
    texts = {str(f.absolute()): read_text(f, errors="replace") for f in files}
    return {name: text for name, text in texts.items() if text.strip()}


def hold_out(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """-> (training texts, held-out texts). Of what Python carries, those named in held_out.json,
    which the shipped butler has not seen, in every version of Python; of other texts, or the parts
    of a few, by the hash of each: one more, or one less, and the others stay where they are."""
    parts = list(dict.fromkeys(texts.values()))  # the reference repeats itself under other names
    held = {texts[name] for name in HELD_OUT & texts.keys()}
    if not held:
        if len(parts) < 10:
            parts = [t[i : i + 8192] for t in parts for i in range(0, len(t), 8192)]
            parts = list(dict.fromkeys(parts))
        if len(parts) < 2:
            raise UsageError("too little text: at least 8 KB is needed")
        lots = {p: hashlib.sha256(p.encode(errors="replace")).digest() for p in parts}
        held = {p for p in parts if lots[p][0] < 26}
        if len(held) in (0, len(parts)):
            held = {min(parts, key=lots.get)}
    return [p for p in parts if p not in held], [p for p in parts if p in held]


class Mixture:
    """Endless windows of tokens: a share `synthetic` of co-reference documents, and text of sources
    drawn by lot, long texts more often.

    Each window depends on its seed alone, so step n of a resumed run sees what step n saw before.
    `repeats` strings of digits or letters that nobody can guess are written into every 512 tokens,
    and again later in the window, behind the same eight tokens: what follows can only be copied.
    """

    def __init__(self, tok, sources: list[list[str]], pool, synthetic=0.3, repeats=0):
        self.tok, self.sources, self.pool = tok, sources, pool
        self.synthetic, self.repeats = synthetic, repeats

    def digest(self) -> str:
        """SHA-256 of all the texts: a run is not to be resumed on others."""
        return hashlib.sha256(json.dumps(self.sources).encode()).hexdigest()

    def window(self, seed: str, length: int) -> list[int]:
        rng, ids = random.Random(seed), [self.tok.bos_id] * self.tok.add_bos
        while len(ids) < length:
            if rng.random() < self.synthetic:
                text = training_text(rng, self.pool)
            else:
                texts = rng.choice(self.sources)
                text = rng.choices(texts, weights=[len(t) for t in texts])[0]
                start = rng.randrange(max(1, len(text) - 4 * length))
                text = text[start : start + 8 * length]
            ids += self.tok.encode(text + "\n\n")
        return self.repeat(random.Random(f"{seed} repeats"), ids[:length])

    def repeat(self, rng: random.Random, ids: list[int]) -> list[int]:
        for _ in range(self.repeats * len(ids) // 512):
            alphabet = rng.choice(("0123456789", "0123456789abcdef-", "abcdefghijklmnopqrstuvwxyz"))
            secret = self.tok.encode(" " + "".join(rng.choices(alphabet, k=rng.randint(5, 36))))
            size = 8 + len(secret)
            if len(ids) > 2 * size:  # there is room for it twice
                first = rng.randrange(len(ids) - 2 * size)
                again = rng.randrange(first + size, len(ids) - size + 1)
                ids[first + 8 : first + size] = secret
                ids[again : again + size] = ids[first : first + size]
        return ids


def spread(rng: random.Random, length: int, span: int, gaps=3):
    """Positions [1, length] of a text, below `span`, with gaps in it drawn by lot: distances that
    its tokens alone would not reach (PoSE, arXiv 2309.10400)."""
    total = rng.randint(0, max(span - length, 0))
    ends = sorted([total, *(rng.randint(0, total) for _ in range(gaps - 1))])
    positions = torch.arange(length)
    for cut, end in zip(sorted(rng.sample(range(1, length), gaps)), ends, strict=True):
        positions[cut:] = torch.arange(cut, length) + end
    return positions[None]


def text_of(path) -> str:
    """The text to measure on; of Python's reference (None) the part that is not trained on."""
    return "\n\n".join(hold_out(topics)[1]) if path is None else read_text(path)


def evenly(tok, text: str, n: int, length: int) -> torch.Tensor:
    """[n, length] tokens, windows spread evenly over the text. Raises UsageError for too short a
    text."""
    ids = tok.encode(text)
    if len(ids) < n * length:
        raise UsageError(f"the text has {len(ids)} tokens, {n} windows of {length} need "
                         f"{n * length}")
    step = (len(ids) - length) // max(n - 1, 1)
    bos = [tok.bos_id] * tok.add_bos
    return torch.tensor([(bos + ids[i * step : i * step + length])[:length] for i in range(n)])


if __name__ == "__main__":
    for name, texts in zip(("reference", "library"), default_texts(), strict=True):
        kept, held = hold_out(texts)
        print(f"{name}: {sum(map(len, kept)):,} characters to train on, "
              f"{sum(map(len, held)):,} held out, in {len(held)} texts")
    print(training_text(random.Random(0), pools("train")))
