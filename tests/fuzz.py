"""tests/fuzz.py - damaged files by the thousand: each one loads and works, or ends in a UserError.

    valid files (test_fuzz.py writes them) --damage--> a file --load, use--> works | error | problem

    PYTHONPATH=. python tests/fuzz.py FOLDER CASES SEED [KIND ...]

prints {kind: {"worked", "refused", "problems", "errors", "peak_mb"}} as JSON. Damage is done to the
bytes (set, flipped, dropped, inserted, repeated, cut off), to the structure (absurd numbers, other
types, missing and nested entries) and to the weights (NaN, infinite and huge ones), or another file
stands in its place (a pointer of git-lfs, a web page, another encoding). Each kind has a process of
its own with 2 GB of memory and 20 seconds a case, so that a crash, a hang or a memory blow-up ends
that process alone. The file that made a problem stays in FOLDER/KIND.
"""

import codecs
import copy
import faulthandler
import json
import random
import resource
import struct
import sys
import traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader

import tokenizer
from butler import Butler
from cli import UserError
from model import Llama

ROOT = Path(__file__).parent.parent
MEMORY = 2 * 2**30
SECONDS = 20

# ---------------------------------------------------------------------------- damage

NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1,
           2**63, 2**64 - 1, 2**64, 10**30)
RAW = {"@deep@": "[" * 100_000 + "]" * 100_000, "@long@": "9" * 5000, "@huge@": "1e999"}
OTHERS = (*RAW, "(", "(?=)", r"\p{Foo}", "a*", "I32", "F64", "BOOL", "F4", 0.5, 1e-320, -1e308,
          float("nan"), float("inf"), True, False, None, "", "a", "\ud800", "\0", "a\nb", "5",
          "../x", "x" * 5000, [], {}, [[]], [None], [1, 2, 3], {"a": 1})


def absurd(rng):
    return rng.choice((*NUMBERS, *OTHERS, rng.randrange(300), chr(rng.randrange(0x110000)),
                       struct.unpack("d", rng.randbytes(8))[0]))


def scramble(rng, data: bytes, head: int) -> bytes:
    """One to three edits of bytes, half of them among the first `head`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1 + min(len(data), rng.choice((head, len(data)))))
        size = rng.choice((1, 1, 2, 4, 8, 50, 1000))
        edit = rng.choice(("set", "flip", "number", "drop", "insert", "repeat", "cut"))
        if edit == "set":
            data[at : at + size] = rng.randbytes(size)
        elif edit == "flip":
            data[at : at + 1] = (byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
        elif edit == "number":
            data[at : at + 8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
        elif edit == "drop":
            del data[at : at + size]
        elif edit == "insert":
            data[at:at] = rng.randbytes(size)
        elif edit == "repeat":
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


def replaced(rng, data: bytes) -> bytes:
    """What stands in a file's place after a download, or after an editor has saved it."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    return rng.choice((pointer, b"<!DOCTYPE html>\n<html></html>", codecs.BOM_UTF8 + data,
                       data.decode("latin-1").encode(rng.choice(("utf-16", "utf-16-be")))))


def poison(rng, data: bytes, head: int) -> bytes:
    """One to three numbers after the first `head` bytes that are none, or huge."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = len(data) - 4 * rng.randint(1, (len(data) - head) // 4)
        kind, huge = rng.choice((("<f4", 3e38), ("<f2", 65504)))
        new = np.array(rng.choice((np.nan, np.inf, -np.inf, huge)), kind).tobytes()
        data[at : at + len(new)] = new
    return bytes(data)


def change(rng, tree):
    """A copy of a JSON value with one entry changed, at any depth."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.02:
        return absurd(rng)
    tree = copy.copy(tree)
    key, other = rng.choices(list(tree) if isinstance(tree, dict) else range(len(tree)), k=2)
    if isinstance(tree[key], dict | list) and rng.random() < 0.8:
        tree[key] = change(rng, tree[key])
        return tree
    edit = rng.choice(("replace", "replace", "number", "swap", "remove", "rename", "deepen"))
    if edit == "number" and type(tree[key]) in (int, float):
        tree[key] = rng.choice((tree[key] + 1, tree[key] - 1, tree[key] * 2, -tree[key]))
    elif edit == "swap":
        tree[key], tree[other] = tree[other], tree[key]
    elif edit == "remove":
        del tree[key]
    elif edit == "rename" and isinstance(tree, dict):
        tree[rng.choice((key + "x", key[:-1], str(absurd(rng))))] = tree.pop(key)
    elif edit == "deepen":
        tree[key] = rng.choice(([tree[key]], {"a": tree[key]}))
    else:
        tree[key] = absurd(rng)
    return tree


def change_json(rng, data: bytes) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        tree = change(rng, tree)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def change_safetensors(rng, data: bytes) -> bytes:
    """Another header, whose length is right again or off by a little."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    configuration = header.get("__metadata__", {}).get("butler")
    if configuration and rng.random() < 0.5:  # JSON inside the JSON
        changed = change_json(rng, configuration.encode())
        header["__metadata__"]["butler"] = changed.decode("utf-8", "surrogatepass")
        new = json.dumps(header).encode()
    else:
        new = change_json(rng, data[8:end])
    off = rng.choice((0, 0, 0, 0, 0, 0, 1, -1, 8))
    return (len(new) + off).to_bytes(8, "little") + new + data[end:]


def gguf_fields(path: Path) -> list:
    """Where the parts of each header entry of a GGUF file lie: [[(first byte, bytes)]]"""
    reader = GGUFReader(path)
    fields = []
    for field in [*reader.fields.values(), *(t.field for t in reader.tensors)]:
        at = field.offset
        parts = []
        for part in field.parts:
            if part.nbytes:
                parts.append((at, part.nbytes))
            at += part.nbytes
        fields.append(parts)
    return fields


def change_gguf(rng, data: bytes, fields: list) -> bytes:
    """Other numbers, lengths, types, offsets or texts in the header."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(rng.choice(fields))
        old = int.from_bytes(data[at : at + size], "little")
        number = rng.choice((*NUMBERS, *range(20), old - 1, old + 1, 2 * old, old // 2, len(data)))
        new = [rng.randbytes(size), *[(number % 256**size).to_bytes(size, "little")] * 3]
        if size in (4, 8):
            real = rng.choice((0, -1, 1e-30, 1e30, float("nan"), float("inf"), rng.uniform(-9, 9)))
            new.append(np.array(real, f"f{size}").tobytes())
        data[at : at + size] = rng.choice(new)
    return bytes(data)


def damager(path: Path):
    """What damages files like the valid one at `path`: rng -> bytes"""
    data = path.read_bytes()
    head = len(data)
    if path.suffix == ".safetensors":
        head = 8 + int.from_bytes(data[:8], "little")
    elif path.suffix == ".gguf":
        fields = gguf_fields(path)
        head = max(at for parts in fields for at, _ in parts)

    def damage(rng):
        way = rng.random()
        if way < 0.3:
            return scramble(rng, data, head)
        if way < 0.35:
            return replaced(rng, data)
        if way < 0.45 and path.suffix != ".json":
            return poison(rng, data, head)
        if path.suffix == ".gguf":
            return change_gguf(rng, data, fields)
        return {".json": change_json, ".safetensors": change_safetensors}[path.suffix](rng, data)

    return damage


# ---------------------------------------------------------------------------- use


def use_model(path):
    """Loads and computes."""
    llama = Llama.from_pretrained(path)
    logits = llama(torch.arange(min(6, llama.config.context))[None] % llama.config.vocab_size)
    assert logits.isfinite().all()
    cache = llama.new_cache(1, 1)
    llama.decode(torch.tensor([[0]]), cache)


def use_tokenizer(path):
    """Loads, encodes and decodes, and writes a chat."""
    tok = tokenizer.load(path)
    ids = tok.bos + tok.encode("ab 12 <|im_end|><tool>\n\n\x04\u00e9\U0001f600")
    assert isinstance(tok.decode(ids), str)
    if tok.template:
        tok.decode(tok.chat("ab <|im_end|>"))


def use_butler(path):
    butler = Butler.load(path)
    c = butler.config
    x, keys = torch.ones(1, 3, c.width), torch.ones(1, c.kv_heads, 3, c.head_dim)
    positions = torch.arange(3)
    for layer, queries in butler.importance_queries(0, x, positions).items():
        scores = butler.scores(queries, butler.importance_keys(layer, keys, positions))
        assert scores.isfinite().all()


# kind: (files that are damaged, what is loaded, how it is used), all inside FOLDER/KIND
KINDS = {
    "config": (["config.json"], "", use_model),
    "safetensors": (["model.safetensors"], "", use_model),
    "shards": (["model.safetensors.index.json"], "", use_model),
    "gguf": (["model.gguf"], "model.gguf", use_model),
    "quantised": (["model.gguf"], "model.gguf", use_model),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json", "generation_config.json"], "",
                  use_tokenizer),
    "pieces": (["tokenizer.json"], "", use_tokenizer),
    "vocabulary": (["vocabulary.gguf"], "vocabulary.gguf", use_tokenizer),
    "smollm": (["vocabulary.gguf"], "vocabulary.gguf", use_tokenizer),
    "butler": (["butler.safetensors"], "butler.safetensors", use_butler),
}


def run(folder: Path, files, target, use, cases: int, seed: str) -> None:
    """All cases of one kind. Leaves a report and the file that made each problem."""
    rng = random.Random(f"{seed} {folder.name}")
    valid = {name: (folder / name).read_bytes() for name in files}
    damage = {name: damager(folder / name) for name in files}
    counts, errors, problems = Counter(), Counter(), {}
    for _ in range(cases):
        name = rng.choice(files)
        data = damage[name](rng)
        tokenizer._open_gguf.cache_clear()  # the clock may not tell two files apart
        (folder / name).write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            use(folder / target)
            counts["worked"] += 1
        except UserError as e:
            counts["refused"] += 1
            errors[str(e).split(": ", 2)[-1][:60]] += 1
        except BaseException as e:  # a panic in Rust is no Exception
            own = [f for f in traceback.extract_tb(e.__traceback__) if str(ROOT) in f.filename]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            problems.setdefault(f"{type(e).__name__} at {where}: {str(e)[:200]}", data)
        faulthandler.cancel_dump_traceback_later()
        (folder / name).write_bytes(valid[name])
    for i, data in enumerate(problems.values()):
        (folder / f"problem{i}").write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report = {**counts, "problems": list(problems), "errors": errors.most_common(20),
              "peak_mb": peak}
    (folder / "report").write_text(json.dumps(report))


def main(folder: str, cases: str, seed: str, *only: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    results = {}
    for kind, entry in KINDS.items():
        if only and kind not in only:
            continue
        place = Path(folder) / kind
        entry[2](place / entry[1])  # the valid file works
        child = get_context("fork").Process(target=run, args=(place, *entry, int(cases), seed))
        child.start()
        child.join()
        if child.exitcode == 0:
            results[kind] = json.loads((place / "report").read_text())
        else:
            results[kind] = {"problems": [f"exit code {child.exitcode}: the file is in {place}"]}
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
