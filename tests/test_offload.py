"""offload.py: a store changes where rows lie, never what comes out; and it leaves nothing."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import assert_close

import offload
from baselines import make_selector
from butler import Butler, ButlerConfig, load_for
from coreference import coreference_documents
from model import Llama
from synth_task import evaluate
from weights import Config, ModelError

TINY = Config(vocab_size=64, width=32, layers=5, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
              context=4096, tied=True)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Llama(TINY).eval().requires_grad_(False)
    for p in model.parameters():  # far from the dull attention of small weights
        p.mul_(3 if p.ndim > 1 else 1)
    butler = Butler(ButlerConfig.for_model(model, stride=2)).eval().requires_grad_(False)
    return model, butler


def run(model, butler, name, kind, prompt, steps, **rules):
    """Logits [steps, B, 1, V] of greedy steps behind a prompt [B, T], and the cache."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + steps, kind=kind)
    selector = make_selector(name, rules.pop("budget", 0.2), butler, **rules)
    if selector:
        selector.read_ahead = cache.read_ahead
    logits = [model.prefill(prompt, cache, selector and selector.watch, chunk=100)]
    for _ in range(steps):
        logits.append(model.decode(logits[-1].argmax(-1), cache, selector))
    return torch.stack(logits[1:]), cache


RULES = [{}, {"interval": 3}, {"neighbours": 1}, {"dense_below": 160}, {"budget": 60}]


@pytest.mark.parametrize("name, rules", [("butler", r) for r in RULES] + [
    ("dense", {}), ("oracle", {}), ("quest", {}), ("h2o", {}), ("recency", {})], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_disk_equals_resident(tiny, tmp_path, name, rules, batch):
    prompt = torch.randint(0, 64, (batch, 151), generator=torch.Generator().manual_seed(1))
    kind = offload.cache_kind("disk", tmp_path)
    expected, _ = run(*tiny, name, offload.Cache, prompt, 25, **rules)
    actual, cache = run(*tiny, name, kind, prompt, 25, **rules)
    assert_close("logits", actual, expected, 1e-5)
    if name == "butler":
        asked, missed = cache.traffic
        assert 0 < missed < asked


def test_disk_equals_resident_on_the_real_model(llama, tmp_path):
    prompt = torch.arange(3000, 3300)[None]
    kind, butler = offload.cache_kind("disk", tmp_path), load_for(llama)
    expected, _ = run(llama, butler, "butler", offload.Cache, prompt, 12)
    actual, _ = run(llama, butler, "butler", kind, prompt, 12)
    assert_close("logits", actual, expected, 1e-5)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_tasks_have_the_same_answers(llama, tok, tmp_path):
    documents = coreference_documents("test", 3, seed=5)
    known = []
    for kind in (offload.Cache, offload.cache_kind("disk", tmp_path)):
        known.append(evaluate(llama, tok, documents, ("dense", "oracle", "butler"), ("0.1",),
                              [load_for(llama)], kind=kind))
    assert known[0] == known[1]
    assert sum(known[0]["butler"]["0.1"][0]) > 1


def test_second_question_reads_no_stale_row(tiny, tmp_path):
    """What is held of tokens that were forgotten since must not be taken for their successors."""
    model, butler = tiny
    prompt = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(2))
    results = []
    for kind in (offload.Cache, offload.cache_kind("disk", tmp_path)):
        cache, logits = model.new_cache(1, 300, kind=kind), []
        for question in (prompt[:, :40], prompt[:, 40:80]):
            selector = butler.selector(0.5)
            selector.read_ahead = cache.read_ahead
            cache.truncate(min(cache.size, 150))
            if cache.size == 0:
                model.prefill(prompt[:, :150], cache, selector.watch)
            logits += [model.decode(t, cache, selector) for t in question.split(1, dim=1)]
        results.append(torch.cat(logits))
    assert_close("logits", results[1], results[0], 1e-5)


def test_rows_held_are_those_used_last():
    """Against the plainest form: for each head a dictionary of the time of last use."""
    rng = torch.Generator().manual_seed(3)
    B, G, capacity, D, slots, K = 2, 2, 300, 4, 40, 20
    store = torch.randn(B, G, capacity, 2, D, generator=rng)
    held, last, reads, count = offload.Held(store, slots), [{} for _ in range(B * G)], 0, []
    for now in range(60):
        tokens = torch.stack([(torch.randperm(60, generator=rng)[:K] + 2 * now) % capacity
                              for _ in range(B * G)])
        tokens[torch.rand(tokens.shape, generator=rng) < 0.2] = -1
        found = held.fetch(tokens, now, lambda table, rows: count.append(len(rows)) or table[rows])
        for head, (wanted, at) in enumerate(zip(tokens.tolist(), found.tolist(), strict=True)):
            for token, slot in zip(wanted, at, strict=True):
                assert (slot == -1) == (token == -1)
                if token >= 0:
                    row = held.rows.flatten(0, 1)[head, slot]
                    assert torch.equal(row, store.flatten(0, 1)[head, token])
            real = {t for t in wanted if t >= 0}
            reads += len(real - last[head].keys())
            last[head] |= dict.fromkeys(real, now)
            kept = sorted(last[head].values())[-slots:]
            assert len(real) <= len(kept)
            if len(last[head]) > slots:  # ties at the edge may fall either way: both are oldest
                mine = {t for t in held.token[head].tolist() if t >= 0}
                assert min(last[head][t] for t in mine) >= kept[0]
                last[head] = {t: last[head][t] for t in mine}
    assert sum(count) == reads > 0


def test_file_has_no_name_and_is_private(tiny, tmp_path):
    caches = [tiny[0].new_cache(1, 50, kind=offload.cache_kind("disk", tmp_path)) for _ in "ab"]
    assert list(tmp_path.iterdir()) == []
    status = [os.fstat(c.file.fileno()) for c in caches]
    assert all(s.st_nlink == 0 and stat.S_IMODE(s.st_mode) == 0o600 for s in status)
    assert status[0].st_ino != status[1].st_ino
    assert all(s.st_blocks * 512 >= c.store.nbytes for s, c in zip(status, caches, strict=True))


def child(code: str, *paths, **options):
    start = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
             "from test_offload import TINY\nfrom model import Llama\n"
             "from offload import cache_kind\nllama = Llama(TINY)\n")
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, paths)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_nothing_is_left_behind_a_crash(tmp_path):
    process = child("cache = llama.new_cache(1, 4000, kind=cache_kind('disk', sys.argv[1]))\n"
                    "cache.store.fill_(1)\nprint('ready', flush=True)\nsys.stdin.read()\n",
                    tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_one_line_before_anything_is_written(tmp_path):
    """A limit on the size of files, which the kernel enforces like a full disk."""
    limit = 100_000
    process = child("from model import ModelError\ntry:\n"
                    "    llama.new_cache(1, 4000, kind=cache_kind('disk', sys.argv[1]))\n"
                    "except ModelError as e:\n    print(e)\n", tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("no room for 0.00205 GB of keys and values in ") and out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store, folder, device, words", [
    ("tape", None, "cpu", "none, pinned, disk"), ("pinned", None, "cpu", "--device cuda"),
    ("pinned", None, "cuda", "not built"), ("disk", None, "cuda", "--device cpu"),
    ("disk", "/no/such/folder", "cpu", "no folder"),
    ("disk", __file__, "cpu", "no folder")])
def test_refusals(store, folder, device, words):
    with pytest.raises(ModelError, match=words):
        offload.cache_kind(store, folder, device)


def wide_model(folder):
    """A byte-level Llama of 3 million numbers whose 12,000 tokens need a gigabyte of cache. Its own
    butler, untrained, chooses as steadily as a trained one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=5,
                         num_attention_heads=16, num_key_value_heads=16, head_dim=128,
                         max_position_embeddings=16_000, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    model = Llama.from_pretrained(folder)
    Butler(ButlerConfig.for_model(model)).save(folder / "butler.safetensors")


@pytest.mark.slow
def test_a_context_larger_than_memory(tmp_path):
    """Under a limit that the resident cache does not fit in, the file gives the resident text."""
    wide_model(tmp_path)
    book = "".join(topics[name] for name in sorted(topics))[:12_000]
    (tmp_path / "book.txt").write_text(book.encode("ascii", "replace").decode())
    limited = ("import subprocess, sys\nfrom speed_offload import memory_limit\n"
               "with memory_limit(int(sys.argv[1])):\n"
               "    done = subprocess.run([sys.executable, *sys.argv[2:]])\n"
               "sys.exit(abs(done.returncode))")

    def sample(*more, limit=2**40):
        done = subprocess.run(
            [sys.executable, "-c", limited, str(limit), "sample.py", "--model", tmp_path,
             "--butler", tmp_path / "butler.safetensors", "--prompt-file", tmp_path / "book.txt",
             "--budget", "0.03", "--max-new-tokens", "30", "--temperature", "0", *more],
            cwd=ROOT, text=True, capture_output=True)
        if "--memory needs the right" in done.stderr:
            pytest.skip(done.stderr.splitlines()[-1])
        return done.returncode, done.stdout.splitlines()[-1:], done.stderr

    _, (line,), _ = sample()
    resident = json.loads(line)
    limit = int(0.95 * resident["cache_bytes"])
    assert resident["cache_bytes"] > 9e8
    assert sample(limit=limit)[0] == signal.SIGKILL  # the limit is one
    status, lines, errors = sample("--offload", "disk", limit=limit)
    assert status == 0, errors
    assert json.loads(lines[0])["text"] == resident["text"]
