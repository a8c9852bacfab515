"""tests/fuzz.py - damaged files by the thousand: each loads and works, or ends in one clear line.

    valid files (test_fuzz.py writes them) --damage--> a file --load, use--> works | error | problem

    python tests/fuzz.py FOLDER CASES SEED      prints {kind: {"cases", "worked", "problems", ...}}

hypothesis draws the damage: in the bytes (set, flipped, dropped, inserted, repeated, cut off) and
in the structure (absurd numbers, other types, missing, doubled and nested entries). Each kind has a
process of its own with 2 GB of memory and 10 seconds a case, so that a crash, a hang or a memory
blow-up ends that process alone; the file that did it stays in FOLDER/KIND.
"""

import copy
import faulthandler
import json
import os
import resource
import struct
import sys
import traceback
from collections import Counter
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import numpy as np
import torch
from gguf import GGUFReader
from hypothesis import strategies as st

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # survives a fork
sys.path.insert(0, str(Path(__file__).parent.parent))

import sample
import train
from beyond import survive
from butler import Butler, ButlerConfig, ButlerError
from common.errors import ModelError, UsageError
from loading import tokenizer, weights
from loading.weights import Config
from model import Llama
from tasks import corpus, evaluation, longbench

MEMORY, SECONDS = 2 * 2**30, 10
CLEAR = (ModelError, tokenizer.TokenizerError, ButlerError, UsageError)
TEXTS = ("ab 12 <|im_end|><tool>\n\n\x04\u00e9\ud83d\ude00", "a" * 40 + "!", "")

# ---------------------------------------------------------------------------- damage

RAW = {"@deep@": "[" * 100_000 + "]" * 100_000, "@long@": "9" * 5000, "@huge@": "1e999"}
NUMBERS = (-1, 0, 1, 2, 3, 7, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**63 - 1,
           2**63, 2**64 - 1, 2**64, 10**30)
PATTERNS = ("(", "(?=)", r"\p{Foo}", "(?:a|a)+(?=c)", "((a{999}){999}){999}", "a*", "^")
TYPES = ("I32", "U32", "F64", "BOOL", "F8_E4M3", "C64", "F4")
OTHERS = (*RAW, *PATTERNS, *TYPES, 0.5, 1e-320, -1e308, 1e308, float("nan"), float("inf"), True,
          False, None, "", "a", "\ud800", "\0", "a\nb", "5", "../x", "x" * 5000, [], {}, [[]],
          [None], [1, 2, 3], {"a": 1})


def absurd(rng):
    return rng.choice((*NUMBERS, *OTHERS, *rng.sample(range(300), 9), rng.choice("abc\u0120<|"),
                       struct.unpack("d", rng.randbytes(8))[0], chr(rng.randrange(0x110000))))


class Doubled(dict):
    """A JSON object in which one key comes twice."""

    def items(self):
        return [*super().items(), self.again]


def scrambled(rng, data: bytes, head: int) -> bytes:
    """One to three edits of bytes, half of them among the first `head`."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1 + min(len(data), rng.choice((head, len(data)))))
        size = rng.choice((1, 1, 2, 4, 8, 50, 1000))
        edit = rng.choice(("set", "set", "flip", "flip", "number", "drop", "insert", "repeat",
                           "cut"))
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


def changed(rng, tree):
    """A copy of a JSON value in which one entry, deeper or less deep, is not as it was."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.02:
        return absurd(rng)
    tree = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key, other = rng.choice(keys), rng.choice(keys)
    if isinstance(tree[key], dict | list) and rng.random() < 0.8:
        tree[key] = changed(rng, tree[key])
        return tree
    edit = rng.choice(("replace",) * 3 + ("number", "move", "remove", "name", "double", "deepen"))
    if edit == "number" and type(tree[key]) in (int, float):
        tree[key] = rng.choice((tree[key] + 1, tree[key] - 1, tree[key] * 2, -tree[key]))
    elif edit == "move":
        tree[key], tree[other] = tree[other], tree[key]
    elif edit == "remove":
        del tree[key]
    elif edit == "name" and isinstance(tree, dict):
        tree[rng.choice((key + "x", key[:-1], key * 2, str(absurd(rng))))] = tree.pop(key)
    elif edit == "double" and isinstance(tree, dict):
        tree = Doubled(tree)
        tree.again = key, rng.choice((tree[other], absurd(rng)))
    elif edit == "double":
        tree.insert(key, tree[other])
    elif edit == "deepen":
        tree[key] = rng.choice(([tree[key]], {"a": tree[key]}))
    else:
        tree[key] = absurd(rng)
    return tree


def changed_json(rng, data: bytes) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        tree = changed(rng, tree)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def changed_lines(rng, data: bytes, change) -> bytes:
    """Lines of which one is changed, missing, doubled or elsewhere."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    line = lines.pop(at)
    edit = rng.choice(("change", "change", "drop", "repeat", "move"))
    if edit == "change" and line:
        lines.insert(at, change(rng, line))
    elif edit == "repeat":
        lines[at:at] = [line, line]
    elif edit == "move":
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def changed_rank(rng, line: bytes) -> bytes:
    """A line "base64 rank" with another rank or another token."""
    token, rank = line.split(b" ")
    other = str(absurd(rng)).encode("utf-8", "surrogatepass")
    return rng.choice((token + b" " + other, other + b" " + rank, other, token))


def changed_header(rng, data: bytes) -> bytes:
    """A safetensors file whose header is another, its length right again or off by a little."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    inner = header.get("__metadata__", {})
    if (keys := [k for k, v in inner.items() if v[:1] in "[{"]) and rng.random() < 0.5:
        key = rng.choice(keys)  # a configuration in JSON, inside the JSON
        inner[key] = changed_json(rng, inner[key].encode()).decode("utf-8", "surrogatepass")
        header = json.dumps(header).encode()
    else:
        header = changed_json(rng, data[8:end])
    off = rng.choice((0, 0, 0, 0, 0, 0, 1, -1, 8))
    return (len(header) + off).to_bytes(8, "little") + header + data[end:]


def changed_fields(rng, data: bytes, fields: list) -> bytes:
    """A GGUF file in which numbers, lengths, types, offsets or texts of its header are others."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(rng.choice(fields))
        old = int.from_bytes(data[at : at + size], "little")
        number = rng.choice((*NUMBERS, *range(20), old - 1, old + 1, 2 * old, old // 2, len(data)))
        new = rng.choice((
            rng.randbytes(size), (number % 256**size).to_bytes(size, "little"),
            (number % 256**size).to_bytes(size, "little"),
            np.array(absurd_float(rng), f"f{size}").tobytes() if size in (4, 8) else bytes(size)))
        data[at : at + size] = new
    return bytes(data)


def absurd_float(rng) -> float:
    return rng.choice((0, -1, 1e-30, 1e30, float("nan"), float("inf"), rng.uniform(-9, 9)))


def fields_of(path: Path) -> list:
    """Where the parts of each entry of a GGUF's header lie: [[(first byte, bytes)]]."""
    reader = GGUFReader(path)
    fields = []
    for field in [*reader.fields.values(), *(t.field for t in reader.tensors)]:
        at, parts = field.offset, []
        for part in field.parts:
            parts.append((at, part.nbytes))
            at += part.nbytes
        fields.append([part for part in parts if part[1]])
    return fields


def damage(path: Path):
    """What damages files like the valid one at `path`: (rng, bytes) -> bytes."""
    data = path.read_bytes()
    head = len(data)
    change = partial(scrambled, head=head)
    if path.suffix == ".json":
        change = changed_json
    elif path.suffix in (".safetensors", ".state"):
        head, change = 8 + int.from_bytes(data[:8], "little"), changed_header
    elif path.suffix == ".gguf":
        fields = fields_of(path)
        head = max(at for field in fields for at, _ in field)
        change = partial(changed_fields, fields=fields)
    elif path.suffix in (".jsonl", ".model"):
        line = changed_json if path.suffix == ".jsonl" else changed_rank
        change = partial(changed_lines, change=line)
    return lambda rng: change(rng, data) if rng.random() < 0.7 else scrambled(rng, data, head)


# ---------------------------------------------------------------------------- use


def use_model(path, dtype=torch.float32):
    """Loads, computes, and draws a token."""
    llama = Llama.from_pretrained(path, dtype)
    with torch.no_grad():
        logits = llama(torch.arange(6)[None] % llama.config.vocab_size)
        llama(torch.tensor([[0]]))
    sample.pick(logits[0, -1].float(), 0.7, 0.9, torch.Generator())


def use_tokenizer(path):
    """Loads, encodes, decodes; puts a conversation in the model's form."""
    tok = tokenizer.load(path)
    for text in TEXTS:
        for special in (False, True):
            ids = tok.encode(text, special)
            assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
            assert isinstance(tok.decode(ids), str)
    if tok.chat_format:
        tok.decode(tok.chat([{"role": "user", "content": TEXTS[0]}]))


def use_butler(path):
    butler = Butler.load(path)
    c = butler.config
    x, keys = torch.ones(1, 3, c.width), torch.ones(1, c.kv_heads, 3, c.head_dim)
    here = torch.arange(x.shape[1])
    for layer, q in butler.queries(0, x, here[None]).items():
        butler.scores(q, butler.project(layer, keys, here))


def a_run(out: Path):
    """A butler being trained, its optimisers, the run's settings."""
    torch.manual_seed(0)
    butler = Butler(ButlerConfig(layers=3, width=8, kv_heads=1, head_dim=4, rope=(1.0, 0.1),
                                 stride=1, size=4, hidden=4))
    return butler, train.make_optimizers(butler, 1e-2), train.Config(
        out=str(out), device="cpu", resume=True)


def step(butler, optimizers):
    """One step of training."""
    loss = butler.key_projection.square().sum()
    for layer in (0, 1):
        x, here = torch.arange(8.0).expand(1, 3, 8), torch.arange(3)[None]
        loss = loss + butler.queries(layer, x, here)[layer + 1].sum()
    train.update(butler, optimizers, loss, 1e-2)


def use_state(path):
    """Takes the state up, and trains on."""
    butler, optimizers, config = a_run(path.with_suffix(""))
    log = []
    survive.check_state(config)
    assert survive.begin(butler, optimizers, config, log, "text") == len(log)
    assert all(type(loss) is float for loss in log)
    step(butler, optimizers)


def use_lines(path):
    """Asks a tiny model."""
    llama, tok = asked(path.parent.parent)
    found = longbench.read_data(path).values()
    documents = [longbench.cut(tok, replace(d, new_tokens=2), llama.config.context)
                 for d in chain(*found)]
    evaluation.fits(llama, {"data": documents}, lambda text: len(tok.encode(text)))
    with torch.no_grad():
        for question in ("sparse", "prefill"):
            prompts = evaluation.Prompts(llama, tok, documents, question)
            assert all(0 <= score <= 1 for score in prompts.answer(None))
            assert all(0 < loss < 100 for loss in prompts.loss(None))


def use_scores(path):
    known = evaluation.Scores(path, "a run").known
    assert all(isinstance(k, str) and 0 <= v <= 1 for k, v in known.items())


def use_text(path):
    tok = asked(path.parent.parent)[1]
    kept, _ = corpus.hold_out(corpus.read_texts([path]))
    assert len(corpus.Mixture(tok, [kept], corpus.pools("train")).window("0", 64)) == 64


@lru_cache
def asked(folder: Path):
    """A tiny model and a tokenizer for it, read once."""
    torch.manual_seed(0)
    tok = tokenizer.load(folder / "vocabulary" / "vocabulary.gguf")
    return Llama(Config(vocab_size=tok.vocab_size, width=16, layers=2, heads=2, kv_heads=1,
                        head_dim=8, mlp_width=16, context=512)).eval().requires_grad_(False), tok


# kind: (files that are damaged, what is loaded, how it is used), all inside FOLDER/KIND
KINDS = {
    "config": (["config.json"], "", use_model),
    "safetensors": (["model.safetensors"], "", use_model),
    "shards": (["model.safetensors.index.json"], "", use_model),
    "gguf": (["model.gguf"], "model.gguf", use_model),
    "quantised": (["model.gguf"], "model.gguf", partial(use_model, dtype=torch.bfloat16)),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json", "generation_config.json"], "",
                  use_tokenizer),
    "library": (["tokenizer.json"], "", use_tokenizer),
    "meta": (["tokenizer.model"], "", use_tokenizer),
    "vocabulary": (["vocabulary.gguf"], "vocabulary.gguf", use_tokenizer),
    "butler": (["butler.safetensors"], "butler.safetensors", use_butler),
    "state": (["run.state"], "run.state", use_state),
    "lines": (["data.jsonl"], "data.jsonl", use_lines),
    "longbench": (["data.jsonl"], "data.jsonl", use_lines),
    "scores": (["scores.jsonl"], "scores.jsonl", use_scores),
    "text": (["text.txt"], "text.txt", use_text),
}


# ---------------------------------------------------------------------------- the runs


def run(folder: Path, files, target, use, cases: int, seed: str) -> None:
    """All cases of one kind; leaves a report, and the file that made each problem."""
    counts, errors, problems = Counter(), Counter(), {}
    valid = {name: (folder / name).read_bytes() for name in files}

    damaged = {name: damage(folder / name) for name in files}

    @hypothesis.seed(f"{seed} {folder.name}")
    @hypothesis.settings(max_examples=cases, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck),
                         phases=[hypothesis.Phase.generate])
    @hypothesis.given(st.sampled_from(files), st.randoms(use_true_random=True))
    def check(name, rng):
        data = damaged[name](rng)
        counts["cases"] += 1
        weights._open_gguf.cache_clear()  # two files within a tick of the clock would be one to it
        (folder / name).write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            use(folder / target)
            counts["worked"] += 1
        except CLEAR as e:
            line = str(e)
            counts["refused"] += 1
            errors[line.split(": ", 1)[-1][:40]] += 1
            if not line.strip() or len(line.splitlines()) != 1 or len(line) > 500:
                problems.setdefault(f"unclear: {line[:300]!r}", data)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)
            own = [f for f in at if str(Path(__file__).parent.parent) in f.filename]
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            problems.setdefault(f"{type(e).__name__} at {where}: {str(e)[:200]}", data)
        faulthandler.cancel_dump_traceback_later()
        (folder / name).write_bytes(valid[name])

    check()
    for i, data in enumerate(problems.values()):
        (folder / f"problem{i}").write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report = {**counts, "problems": list(problems), "errors": errors.most_common(40),
              "peak_mb": peak}
    (folder / "report").write_text(json.dumps(report))


def main(folder: str, cases: str, seed: str, *only: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    results = {}
    for kind, entry in KINDS.items():
        if only and kind not in only:
            continue
        place = Path(folder) / kind
        entry[2](place / entry[1])  # what is not damaged works
        child = get_context("fork").Process(target=run, args=(place, *entry, int(cases), seed))
        child.start()
        child.join()
        results[kind] = (json.loads((place / "report").read_text()) if child.exitcode == 0 else
                         {"problems": [f"exit code {child.exitcode}: the file lies in {place}"]})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
