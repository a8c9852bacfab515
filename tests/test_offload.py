"""offload.py: a store changes where rows lie, never what comes out; and it leaves nothing."""

import copy
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_close, randomise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel
import model
from baselines import make_selector
from beyond import offload
from butler import Butler, ButlerConfig, load_for
from common.errors import ModelError
from loading.weights import Config
from model import Llama
from tasks.coreference import coreference_documents
from tasks.evaluation import evaluate

TINY = Config(vocab_size=64, width=32, layers=5, heads=4, kv_heads=2, head_dim=8, mlp_width=48,
              context=4096, tied=True)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Llama(TINY).eval().requires_grad_(False)
    for p in model.parameters():  # far from the dull attention of small weights
        p.mul_(3 if p.ndim > 1 else 1)
    butler = Butler(ButlerConfig.for_model(model, stride=2)).eval().requires_grad_(False)
    return model, butler


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """The kinds of caches that live elsewhere. A pinned one for a CPU, which only tests can make,
    has one memory for both: they see which rows are read, not how these come over the bus."""
    monkeypatch.setattr(offload, "CALM", 10**9)  # or none would be fetched: the file is in memory
    return {"disk": offload.cache_kind("disk", tmp_path),
            "pinned": offload.cache_kind("pinned", device="cuda")}


def run(model, butler, name, kind, prompt, steps, lengths=None, **rules):
    """Logits [steps, B, 1, V] of greedy steps behind a prompt [B, T], and the cache."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + steps, kind=kind)
    selector = make_selector(name, rules.pop("budget", 0.2), butler, **rules)
    if selector:
        selector.read_ahead = cache.read_ahead
    watch = selector and selector.watch
    logits = [model.prefill(prompt, cache, watch, lengths, chunk=100)]
    for _ in range(steps):
        logits.append(model.decode(logits[-1].argmax(-1), cache, selector))
    return torch.stack(logits[1:]), cache


def compare(stores, model, butler, name, *rest, **rules):
    """Runs over every store beside one over the resident cache -> the caches of the former."""
    expected, caches = run(model, butler, name, offload.Cache, *rest, **rules)[0], {}
    for store, kind in stores.items():
        actual, caches[store] = run(model, butler, name, kind, *rest, **rules)
        assert_close(store, actual, expected, 1e-5)
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    return caches


RULES = [{}, {"drift": 0.9}, {"dense_below": 160}, {"budget": 60}]


@pytest.mark.parametrize("name, rules", [("butler", r) for r in RULES] + [
    ("dense", {}), ("oracle", {}), ("quest", {}), ("h2o", {}), ("recency", {})], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_stores_equal_the_resident_cache(tiny, stores, name, rules, batch):
    prompt = torch.randint(0, 64, (batch, 151), generator=torch.Generator().manual_seed(1))
    caches = compare(stores, *tiny, name, prompt, 15, **rules)
    if name == "butler":
        asked, missed = caches["disk"].traffic
        assert 0 < missed < asked


def test_rows_in_memory_are_attended_to_where_they_are(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "CALM", 0)
    prompt = torch.arange(160)[None] % 64
    expected, _ = run(*tiny, "butler", offload.Cache, prompt, 25, drift=0.9)
    actual, cache = run(*tiny, "butler", offload.cache_kind("disk", tmp_path), prompt, 25,
                        drift=0.9)
    assert_close("logits", actual, expected, 1e-5)
    assert cache.in_memory and cache.missed < cache.asked / 10


@pytest.mark.parametrize("name", ["butler", "dense"])
def test_stores_equal_the_resident_cache_where_rows_differ_in_length(tiny, stores, name):
    prompt = torch.randint(0, 64, (3, 151), generator=torch.Generator().manual_seed(1))
    compare(stores, *tiny, name, prompt, 5, [90, 151, 120])


def test_stores_equal_the_resident_cache_on_the_real_model(llama, stores):
    compare(stores, llama, load_for(llama), "butler", torch.arange(3000, 3300)[None], 8)


def test_tasks_have_the_same_answers(llama, tok, tmp_path):
    documents = coreference_documents("test", 3, seed=5)
    known = []
    for kind in (offload.Cache, offload.cache_kind("disk", tmp_path)):
        known.append(evaluate(llama, tok, documents, ("dense", "oracle", "butler"), ("0.1",),
                              [load_for(llama)], kind=kind))
    assert known[0] == known[1]
    assert sum(known[0]["butler"]["0.1"][0]) > 1


def test_second_question_reads_no_stale_row(tiny, stores):
    """What is held of tokens that were forgotten since must not be taken for their successors."""
    model, butler = tiny
    prompt = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(2))
    results = []
    for kind in (offload.Cache, *stores.values()):
        cache, logits = model.new_cache(1, 300, kind=kind), []
        for question in (prompt[:, :40], prompt[:, 40:80]):
            selector = butler.selector(0.5)
            selector.read_ahead = cache.read_ahead
            cache.truncate(min(cache.size, 150))
            if cache.size == 0:
                model.prefill(prompt[:, :150], cache, selector.watch)
            logits += [model.decode(t, cache, selector) for t in question.split(1, dim=1)]
        results.append(torch.cat(logits))
    for store, logits in zip(stores, results[1:], strict=True):
        assert_close(store, logits, results[0], 1e-5)


class Bus(TorchDispatchMode):
    """Between the host, on the CPU, and a GPU that meta tensors stand for: they have no contents,
    so nothing can be read from them. Lets only copies of the host's rows pass, and counts these."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            assert function is torch.ops.aten.copy_.default and out.is_meta, function
            self.bytes += out.nbytes
        return out


@pytest.fixture
def by_triton(monkeypatch):
    """-> where the kernels' launches go, to be replaced: the interpreter's `run`"""
    pytest.importorskip("triton")
    if not kernel.INTERPRETED:
        pytest.skip("for Triton's interpreter")
    for module in (kernel, model):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    return type(kernel.attend)


def test_what_crosses_the_bus(tiny, by_triton, monkeypatch):
    """Dense attention copies what was cached before, of each layer but the first; all the rest is
    between tensors of the GPU, and asks it for no number."""
    monkeypatch.setattr(by_triton, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cpu)
    monkeypatch.setattr(offload, "host_rows", lambda *row: (
        torch.zeros(row[0]), torch.empty(row[0], device="meta")))
    with torch.device("meta"):
        llama, butler = Llama(TINY), Butler(tiny[1].config)
    llama.frequencies = tiny[0].frequencies.to("meta")
    row = (TINY.layers - 1) * TINY.kv_heads * 2 * TINY.head_dim * 4
    for rules in ({}, {"drift": 0.9}):
        cache = llama.new_cache(1, 200, kind=offload.PinnedCache)
        selector, tokens = butler.selector(0.4, **rules), torch.zeros(1, 130, device="meta").long()
        selector.read_ahead = cache.read_ahead
        with Bus() as bus:
            llama.prefill(tokens, cache, selector.watch, chunk=50)
            assert bus.bytes == (50 + 100) * row
            for _ in range(4):
                llama.decode(tokens[:, :1], cache, selector)
            assert bus.bytes == 150 * row and not cache.coming
            llama.decode(tokens[:, :1], cache)
            assert bus.bytes == (150 + 134) * row


class Beside(TorchDispatchMode):
    """A stream beside that is as late as it may be: what is launched in it happens when it is
    waited for, and until then there is NaN. It has to wait for the main stream each time."""

    def __init__(self, run):
        super().__init__()
        self.run, self.calls, self.done, self.active, self.follows = run, [], 0, False, False

    def __enter__(self):
        assert self.follows
        self.active, self.follows = True, False
        return super().__enter__()

    def __exit__(self, *error):
        self.active = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.calls.append(partial(function, *args, **kwargs or {}))
            return args[0].fill_(torch.nan)
        out = function(*args, **kwargs or {})
        return out.fill_(torch.nan) if function is torch.ops.aten.empty.memory_format else out

    def launch(self, *args, **kwargs):
        if self.active:
            self.calls.append(partial(self.run, *args, **kwargs))
        else:
            self.run(*args, **kwargs)

    def wait_stream(self, main):
        self.follows = True

    def record_event(self):
        return len(self.calls)

    def catch_up(self, event):
        for call in self.calls[self.done : event]:
            call()
        self.done = max(self.done, event)


def test_a_stream_beside_is_waited_for(by_triton, monkeypatch):
    """Prompt, sparse and dense steps, another question, by the kernels that a GPU would run."""
    torch.manual_seed(5)
    llama = randomise(Llama(replace(TINY, layers=4, heads=2, kv_heads=1)))
    butler = Butler(ButlerConfig.for_model(llama, stride=2)).eval()
    tokens = torch.randint(0, 64, (1, 70), generator=torch.Generator().manual_seed(4))

    def story(kind):
        cache, logits, ids = llama.new_cache(1, 70, kind=kind), [], iter(tokens.split(1, dim=1))
        for rules, first in (({}, 0), ({"drift": 0.9}, 32)):
            selector = butler.selector(0.9, **rules)
            selector.read_ahead = cache.read_ahead
            cache.truncate(first)
            prompt = torch.cat([next(ids) for _ in range(30)], dim=1)
            logits.append(llama.prefill(prompt, cache, selector.watch, chunk=15))
            for chooses in (selector, selector, None, selector):
                logits.append(llama.decode(next(ids), cache, chooses))
        return torch.cat(logits), cache

    expected, _ = story(offload.Cache)
    real = by_triton.run
    beside = Beside(real)
    main = SimpleNamespace(wait_event=beside.catch_up,
                           wait_stream=lambda other: other.catch_up(len(other.calls)))
    monkeypatch.setattr(by_triton, "run", lambda *a, **k: beside.launch(*a, **k))
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(
        Stream=lambda device: beside, current_stream=lambda device: main, stream=lambda s: s))
    actual, cache = story(offload.PinnedCache)
    assert_close("logits", actual, expected, 1e-5)
    asked, missed = cache.traffic
    assert 0 < missed < asked / 2, (asked, missed)
    assert sum(call.func == real for call in beside.calls) >= 3 * 3  # fetched ahead


@pytest.mark.gpu
def test_a_gpu_writes_the_resident_tokens(tiny):
    model, butler = (copy.deepcopy(module).cuda() for module in tiny)
    pinned = offload.cache_kind("pinned", device="cuda")
    prompt = torch.randint(0, 64, (3, 151), generator=torch.Generator().manual_seed(1)).cuda()
    for name, lengths in (("butler", None), ("dense", None), ("oracle", None),
                          ("butler", [90, 151, 120]), ("dense", [90, 151, 120])):
        expected, _ = run(model, butler, name, offload.Cache, prompt, 25, lengths)
        actual, cache = run(model, butler, name, pinned, prompt, 25, lengths)
        assert_close(name, actual.cpu(), expected.cpu(), 1e-5)
        assert cache.store.is_cuda and cache.store.data_ptr() == cache.host.data_ptr()
        assert cache.host[:, 1, :, 151].any()  # a row that a step wrote


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


def test_a_fetch_on_its_way_ends_before_a_rewind(tiny, stores, monkeypatch):
    """Also where its layer no longer waits for it, as all rows turned out to be in memory."""
    cache = tiny[0].new_cache(1, 50, kind=stores["disk"])
    cache.advance(40)
    index = torch.arange(30, 40, dtype=torch.int32).expand(1, 2, 1, -1)
    cache.fetcher.submit(time.sleep, 0.2)
    cache.read_ahead([1], index[None])
    monkeypatch.setattr(offload, "CALM", -1)
    cache.at_hand(1, cache.k[1], cache.v[1], index)
    cache.truncate(20)
    cache.fetcher.submit(int).result()  # all that was under way
    assert cache.held[1].used.numel() and not (cache.held[1].token >= 20).any()


def test_what_a_layer_still_has_to_read_is_given_up_with_it(tiny, stores):
    """And what was read is not kept beside the file: it may be larger than memory."""
    cache = tiny[0].new_cache(1, 50, kind=stores["disk"])
    cache.advance(40)
    cache.fetcher.submit(time.sleep, 0.3)
    pieces = []
    for layer in (1, 2):
        cache.whole(layer, cache.k[layer], cache.v[layer])
        pieces.append(cache.pieces)
    assert len(pieces[0]) == len(pieces[1]) == 2  # one for each KV head
    assert all(piece.cancelled() for piece in pieces[0])
    assert [piece.result() for piece in pieces[1]] == [None, None]


def test_a_single_layer_stores_nothing(stores):
    model = Llama(replace(TINY, layers=1)).eval()
    compare(stores, model, None, "oracle", torch.arange(30)[None], 3)


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
             "from beyond.offload import cache_kind\nllama = Llama(TINY)\n")
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
    process = child("from common.errors import ModelError\ntry:\n"
                    "    llama.new_cache(1, 4000, kind=cache_kind('disk', sys.argv[1]))\n"
                    "except ModelError as e:\n    print(e)\n", tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("no room for 0.00205 GB of keys and values in ") and out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_room_in_memory_is_one_line(tiny):
    with pytest.raises(ModelError, match="^no room for 5.12e.06 GB of keys and values in [^\n]*$"):
        tiny[0].new_cache(1, 10**13, kind=offload.PinnedCache)


@pytest.mark.parametrize("store, folder, device, words", [
    ("tape", None, "cpu", "none, pinned, disk"), ("pinned", None, "cpu", "--device cuda"),
    ("disk", None, "cuda", "--device cpu"),
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


def test_rows_of_a_text_that_was_rewound_do_not_outlive_those_in_use():
    store = torch.randn(1, 1, 100, 2, 4, generator=torch.Generator().manual_seed(0))
    held, read = offload.Held(store, 12), lambda table, rows: table[rows]
    for now, first in ((60, 0), (70, 4), (80, 8)):  # tokens 0 ... 11 fill it
        held.fetch(torch.arange(first, first + 4)[None], now, read)
    held.forget(10)
    for tokens in ([0, 1, 20, 21], [0, 22, 23, 24], [0, 25, 26, 27], [0, 28, 29, 30]):
        slots = held.fetch(torch.tensor([tokens]), 10, read)[0].long()
        assert torch.equal(held.rows[0, 0, slots], store[0, 0, tokens])
    assert (held.slot[0, 10:20] < 0).all()


@pytest.mark.slow
def test_a_context_larger_than_memory(tmp_path):
    """Under a limit that the resident cache does not fit in, the file gives the resident text."""
    wide_model(tmp_path)
    book = "".join(topics[name] for name in sorted(topics))[:12_000]
    (tmp_path / "book.txt").write_text(book.encode("ascii", "replace").decode())
    limited = ("import subprocess, sys\nfrom measure.speed_offload import memory_limit\n"
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
