"""fast/offload.py: a store changes where rows lie, never what comes out, and it leaves nothing."""

import copy
import os
import resource
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_close, randomise

import kernel
from butler import Butler, ButlerConfig
from cli import UserError
from fast import offload
from fast.llama import Llama as FastLlama
from fast.offload import PAGE, PinnedCache, new_cache
from model import Llama
from selection import make_selector

IDS = torch.randint(256, (1, 260), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny_butler(tiny):
    config = ButlerConfig.for_model(tiny, layers_per_producer=2, size=8, hidden=16)
    return randomise(Butler(config), seed=1)


@pytest.fixture(scope="module")
def fast_tiny(tiny):
    """The same weights; its steps attend to rows that a DiskCache holds in memory."""
    llama = FastLlama(tiny.config)
    llama.load_state_dict(tiny.state_dict())
    return llama.eval().requires_grad_(False)


def store(name, llama, capacity, selector=None, folder=None):
    """A cache of model.py, one in a file, or one in pinned memory, which on a CPU is any memory."""
    if name == "memory":
        return llama.new_cache(1, capacity)
    if name == "pinned":
        return PinnedCache(llama, 1, capacity, dense=selector is None)
    return new_cache(llama, capacity, "disk", selector, folder)


def decode(llama, cache, selector, ids, prompt=200):
    """Reads a prompt, then the other tokens one by one -> logits [T, V] of all steps"""
    logits = [llama.prefill(ids[:, :prompt], cache, selector.watch if selector else None)]
    for token in ids[:, prompt:].split(1, dim=1):
        logits.append(llama.decode(token, cache, selector))
    return torch.cat(logits, dim=1)[0]


@pytest.fixture(params=["disk", "held", "pinned"])
def place(request, monkeypatch):
    """The stores; `held` is the file, read by the fast engine. The pinned one with the kernel that
    reads it on a GPU, interpreted."""
    if request.param == "pinned":
        if not (kernel.triton and kernel.INTERPRETED):
            pytest.skip("for Triton's interpreter")
        monkeypatch.setattr(kernel, "sparse_decode", kernel.triton_attention)
    return request.param


# ---------------------------------------------------------------------------- the same results


@pytest.mark.parametrize("name", ["dense", "oracle", "recency", "random", "butler"])
def test_every_store_gives_the_logits_of_a_cache_in_memory(tiny, fast_tiny, tiny_butler, place,
                                                           name):
    seen = []
    for where in ("memory", place):
        selector = make_selector(name, 0.2, tiny_butler)
        llama = fast_tiny if where == "held" else tiny
        cache = store(where, llama, 212, selector)
        seen.append(decode(llama, cache, selector, IDS[:, :212]))
    assert cache.size == 212
    assert_close(f"{place}, {name}", seen[1], seen[0], 2e-5)


def test_the_real_model_from_a_file(llama, butler):
    seen = []
    for where in ("memory", "disk"):
        selector = butler.selector(0.1)
        cache = store(where, llama, 106, selector)
        seen.append(decode(llama, cache, selector, torch.arange(3000, 3106)[None], prompt=100))
    assert_close("logits", seen[1], seen[0], 1e-4)


def test_a_second_question_behind_a_truncated_cache(tiny, fast_tiny, tiny_butler, place):
    """Rows of the first question are still in the store; the second one must not read them."""
    seen = []
    for where in ("memory", place):
        llama = fast_tiny if where == "held" else tiny
        first, second = tiny_butler.selector(0.3), tiny_butler.selector(0.3)
        cache = store(where, llama, 260, first)
        decode(llama, cache, first, IDS[:, :210])
        cache.truncate(150)
        seen.append(decode(llama, cache, second, IDS[:, 200:260], prompt=50))
    assert_close(place, seen[1], seen[0], 2e-5)
    fresh = tiny.new_cache(1, 260)
    ids = torch.cat([IDS[:, :150], IDS[:, 200:260]], dim=1)
    expected = decode(tiny, fresh, tiny_butler.selector(0.3), ids)
    assert_close("read without the first question", seen[1], expected, 2e-5)


def test_two_texts_of_equal_length(tiny, fast_tiny, tiny_butler):
    ids, seen = IDS.view(2, 130), []
    for llama, on_disk in ((tiny, False), (tiny, True), (fast_tiny, True)):
        selector = tiny_butler.selector(0.3)
        cache = new_cache(llama, 130, "disk", batch=2) if on_disk else llama.new_cache(2, 130)
        llama.prefill(ids[:, :120], cache, selector.watch)
        seen.append(torch.cat([llama.decode(token, cache, selector)
                               for token in ids[:, 120:].split(1, dim=1)]))
    assert_close("two texts", seen[1], seen[0], 2e-5)
    assert_close("two texts, held rows", seen[2], seen[0], 2e-5)


def test_a_full_cache_is_one_line(tiny):
    with pytest.raises(UserError, match="12 tokens do not fit into a cache of 11"):
        decode(tiny, new_cache(tiny, 11, "disk"), None, IDS[:, :12], prompt=10)


# ---------------------------------------------------------------------------- held rows


@pytest.mark.parametrize("held", [1, 3])
@pytest.mark.parametrize("rules", [{}, {"drift": 0.3}], ids=str)
def test_held_rows_give_the_logits_of_a_cache_in_memory(fast_tiny, tiny_butler, monkeypatch, rules,
                                                        held):
    """The fast selector, which prefetches. With 1 held row for each selected one, every new row
    replaces another."""
    monkeypatch.setattr(offload, "HELD", held)
    module = pytest.importorskip("fast.selector")
    seen = []
    for where in ("memory", "disk"):
        selector = make_fast_selector(module, tiny_butler, 0.2, **rules)
        cache = store(where, fast_tiny, 260, selector)
        seen.append(decode(fast_tiny, cache, selector, IDS))
    assert cache.held[0].rows.shape == (1, 2, held * 52, 2, 16)  # 0.2 * 260 tokens
    assert_close("logits", seen[1], seen[0], 2e-5)


def held_rows(slots):
    """HeldRows of a random store, the store, and a list of how many rows each read copied"""
    rows = torch.randn(1, 2, 50, 2, 4, generator=torch.Generator().manual_seed(1))
    held = offload.HeldRows(rows, slots)
    counts = []

    def copy_rows(dim, places):
        counts.append(len(places))
        return rows.flatten(0, 2).flatten(1)[places]

    held.store = SimpleNamespace(index_select=copy_rows)
    return held, rows, counts


def assert_holds(held, rows, tokens, slots):
    assert slots.dtype == torch.int32 and torch.equal(slots < 0, tokens < 0)
    for head in range(2):
        real = tokens[0, head] >= 0
        named = slots[0, head, real].long()
        assert torch.equal(held.rows[0, head, named], rows[0, head, tokens[0, head, real].long()])


def test_repeated_selections_read_nothing_again():
    held, rows, counts = held_rows(slots=30)
    chosen = choose(1, 50, 10)[0]  # [1, 2, 10]
    real = int((chosen >= 0).sum())
    for _ in range(3):
        assert_holds(held, rows, chosen, held.fetch(chosen))
    assert counts == [real, 0, 0]
    assert torch.equal(held.find(chosen) < 0, chosen.flatten(0, 1) < 0)


def test_a_new_row_replaces_the_least_recently_used_one():
    """Against a dictionary for each KV head: the step of each token's latest use."""
    held, rows, counts = held_rows(slots=12)
    last_use = [{}, {}]
    for step in range(30):
        chosen = choose(1, 20 if step % 3 else 50, 10, seed=step)[0]
        missing = 0
        for head, known in enumerate(last_use):
            tokens = set(chosen[0, head].tolist()) - {-1}
            missing += len(tokens - known.keys())
            known.update(dict.fromkeys(tokens, step))
        before = sum(counts)
        assert_holds(held, rows, chosen, held.fetch(chosen))
        assert sum(counts) - before == missing
        for head, known in enumerate(last_use):
            now_held = set(held.token[head].tolist()) - {-1}
            assert now_held <= known.keys() and len(now_held) == min(len(known), 12)
            gone = known.keys() - now_held
            assert all(known[old] <= known[token] for old in gone for token in now_held)
            for token in gone:
                del known[token]


def test_rows_behind_a_length_are_forgotten():
    held, rows, counts = held_rows(slots=30)
    chosen = torch.tensor([3, 9, 20, 40, -1]).expand(1, 2, 5)
    held.fetch(chosen)
    held.forget(20)
    assert (held.find(chosen) >= 0).tolist() == [[True, True, False, False, False]] * 2
    rows[:, :, 20:] += 1
    assert_holds(held, rows, chosen, held.fetch(chosen))
    assert counts == [8, 4]


def test_a_step_that_was_interrupted_is_done_again(tiny, fast_tiny, tiny_butler):
    """Another token at the same place: the row of the first one must not be used."""
    class Stops(Exception):
        pass

    def stop(*_):
        raise Stops

    selector = tiny_butler.selector(0.3)
    cache = new_cache(fast_tiny, 210, "disk", selector)
    decode(fast_tiny, cache, selector, IDS[:, :205])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_tiny.layers[4].mlp, "forward", stop)
        with pytest.raises(Stops):
            fast_tiny.decode(IDS[:, 250:251], cache, selector)
    again = tiny_butler.selector(0.3)
    expected = decode(tiny, tiny.new_cache(1, 210), again, IDS[:, :206])[-1]
    logits = fast_tiny.decode(IDS[:, 205:206], cache, tiny_butler.selector(0.3))[0, 0]
    assert_close("logits", logits, expected, 2e-5)


def test_only_rows_that_are_not_held_are_asked_for(fast_tiny, tiny_butler, monkeypatch):
    """What each prefetch asks for, against what the step before and this one chose."""
    module = pytest.importorskip("fast.selector")
    selector = make_fast_selector(module, tiny_butler, 0.2)
    cache = new_cache(fast_tiny, 260, "disk", selector)
    asked = []
    pages_of = cache.pages_of
    monkeypatch.setattr(cache, "pages_of", lambda layers, chosen: asked.append(chosen)
                        or pages_of(layers, chosen))
    fast_tiny.prefill(IDS[:, :200], cache, selector.watch)
    fast_tiny.decode(IDS[:, 200:201], cache, selector)
    first = torch.cat(asked)
    assert (first >= 0).all()
    cache.truncate(200)
    asked.clear()
    fast_tiny.decode(IDS[:, 200:201], cache, selector)  # the same token, so the same choice
    assert (torch.cat(asked) < 0).all()


# ---------------------------------------------------------------------------- prefetching


def fill(cache, size):
    cache.rows.copy_(torch.randn(cache.rows.shape, generator=torch.Generator().manual_seed(1)))
    cache.advance(size)


def choose(layers, tokens, chosen, seed=0):
    """[layers, 1, 2, chosen] tokens, some of them -1"""
    rng = torch.Generator().manual_seed(seed)
    picked = torch.rand(layers, 1, 2, tokens, generator=rng).topk(chosen).indices.int()
    return picked.masked_fill_(torch.rand(picked.shape, generator=rng) < 0.2, -1)


def pages_of(cache, layers, chosen) -> set:
    """The definition: the pages that the bytes of each chosen row lie on, by its own address."""
    pages = set()
    for layer, heads in zip(layers, chosen[:, 0].tolist(), strict=True):
        for head, tokens in enumerate(heads):
            for token in tokens:
                if token >= 0:
                    row = cache.rows[layer - 1, 0, head, token]
                    start = row.data_ptr() - cache.rows.data_ptr()
                    pages |= set(range(start // PAGE, (start + row.nbytes - 1) // PAGE + 1))
    return pages


@pytest.mark.parametrize("head_dim", [10, 16, 640])
def test_pages_hold_the_chosen_rows_and_nothing_else(tiny, head_dim):
    """Rows smaller and larger than a page, and rows that lie across two."""
    llama = tiny if head_dim == 16 else Llama(replace(tiny.config, head_dim=head_dim))
    cache = new_cache(llama, 333, "disk")
    layers, chosen = [2, 3], choose(2, 333, 20)
    starts, sizes = cache.pages_of(layers, chosen)
    named = [page for start, size in zip(starts, sizes, strict=True)
             for page in range(start // PAGE, (start + size) // PAGE)]
    assert not (starts % PAGE).any()
    assert named == sorted(pages_of(cache, layers, chosen))
    assert (starts[1:] > (starts + sizes)[:-1]).all()  # adjacent pages are one range
    empty = cache.pages_of([1], torch.full((1, 1, 2, 4), -1))
    assert [len(part) for part in empty] == [0, 0]


def dropped(cache):
    """Skips where the file's pages cannot leave memory: a folder that is itself memory."""
    cache.drop_pages()
    if cache.pages_in_memory().any():
        pytest.skip(f"{cache.folder} does not give up its pages")


def test_a_prefetch_brings_the_chosen_rows_into_memory(tiny):
    """mincore says which pages are in memory. Reading the rows then waits for no page that the
    prefetch did not ask for, and brings no other."""
    cache = new_cache(tiny, 2000, "disk")
    fill(cache, 2000)
    layers, chosen = [2, 3], choose(2, 2000, 60)
    dropped(cache)
    cache.prefetch(layers, chosen)
    cache.append(1, *torch.zeros(2, 1, 2, 0, 16))  # a sparse step, nothing to write
    cache.advisor.shutdown()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    expected = torch.randn(cache.rows.shape, generator=torch.Generator().manual_seed(1))
    for layer, tokens in zip(layers, chosen[:, 0].long(), strict=True):
        for head in range(2):
            named = tokens[head][tokens[head] >= 0]
            assert torch.equal(cache.k[layer][0, head, named],
                               expected[layer - 1, 0, head, named, 0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt == before
    assert set(cache.pages_in_memory().nonzero()[0]) == pages_of(cache, layers, chosen)


def test_without_a_prefetch_the_rows_are_missing(tiny):
    """The test above can fail."""
    cache = new_cache(tiny, 2000, "disk")
    fill(cache, 2000)
    dropped(cache)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    assert cache.k[2][0, 0, 700].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt > before


def random_access(cache) -> bool:
    """Does Linux read this mapping without reading ahead? The flag `rr` of /proc/self/smaps."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            start, end = (int(word, 16) for word in name.split("-"))
            found = start <= cache.rows.data_ptr() < end
        elif found and name == "VmFlags:":
            return "rr" in line.split()
    raise AssertionError("the mapping is not there")


def test_dense_steps_read_ahead_and_sparse_steps_do_not(tiny):
    cache = new_cache(tiny, 100, "disk")
    tiny.prefill(IDS[:, :50], cache)
    assert not random_access(cache)
    for sparse in (True, True, False, True):
        if sparse:
            cache.prefetch([1], choose(1, 50, 9))
        tiny.decode(IDS[:, :1], cache)
        assert random_access(cache) == sparse
    tiny.prefill(IDS[:, :9], cache)
    assert not random_access(cache)


def test_nothing_is_asked_for_once_all_rows_are_in_memory(tiny, monkeypatch):
    usage = SimpleNamespace(ru_inblock=7, ru_majflt=0)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    cache = new_cache(tiny, 100, "disk")
    calls = []
    monkeypatch.setattr(cache, "advisor", SimpleNamespace(submit=lambda *a: calls.append(a)))
    for _ in range(2):
        for _ in range(offload.QUIET + 5):
            cache.prefetch([1], choose(1, 50, 9))
        assert len(calls) == offload.QUIET
        usage.ru_majflt += 1  # a row was missing
        calls.clear()


@pytest.mark.parametrize("rules", [{}, {"drift": 0.3}], ids=str)
def test_the_fast_selector_names_in_time_what_is_then_read(tiny, tiny_butler, rules):
    """Each layer's choice arrives before the layer does, once a step, and is what the layer then
    attends to between sinks and window."""
    selector_module = pytest.importorskip("fast.selector")
    fast_selector = make_fast_selector(selector_module, tiny_butler, 0.4, **rules)
    cache = new_cache(tiny, 260, "disk", fast_selector)
    told, seen = {}, []
    ask, append = cache.prefetch, cache.append

    def prefetch(layers, chosen):
        assert chosen.dtype == torch.int32 and chosen.shape[:3] == (len(layers), 1, 2)
        assert not told.keys() & set(layers)
        told.update(zip(layers, chosen.clone(), strict=True))
        ask(layers, chosen)

    def appended(layer, k, v):
        assert k.shape[2] > 1 or layer == 0 or layer in told
        return append(layer, k, v)

    fast_selector.prefetch_with(prefetch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "append", appended)
        tiny.prefill(IDS[:, :200], cache, fast_selector.watch)
        assert not told
        for token in IDS[:, 200:220].split(1, dim=1):
            tiny.decode(token, cache, fast_selector)
            assert sorted(told) == [1, 2, 3, 4]
            fixed = fast_selector.budget.sinks_and_window(torch.tensor([cache.size - 1]))
            always = set(fixed.flatten().tolist())
            for layer, chosen in told.items():
                for named, read in zip(chosen[0], fast_selector.index[layer][0, :, 0], strict=True):
                    seen.append(set(named.tolist()) - {-1})
                    assert seen[-1] | always == set(read.tolist()) - {-1} | always
            told.clear()
    assert all(seen)


def make_fast_selector(module, butler, budget, **rules):
    """fast's own selector, whatever its class is called, around the weights of a plain butler."""
    import fast

    fast_butler = fast.Butler(butler.config)
    fast_butler.load_state_dict(butler.state_dict())
    return fast_butler.eval().requires_grad_(False).selector(budget, **rules)


# ---------------------------------------------------------------------------- files and errors


def test_the_file_has_no_name_and_is_private(tiny, tmp_path):
    caches = [new_cache(tiny, 50, "disk", folder=tmp_path) for _ in "ab"]
    assert list(tmp_path.iterdir()) == []
    status = [os.fstat(cache.file.fileno()) for cache in caches]
    assert all(s.st_nlink == 0 and stat.S_IMODE(s.st_mode) == 0o600 for s in status)
    assert status[0].st_ino != status[1].st_ino
    for s, cache in zip(status, caches, strict=True):
        assert s.st_blocks * 512 >= cache.rows.nbytes  # its room is taken now, not later


def child(code: str, *paths, **options):
    start = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
             "from conftest import tiny_config\nfrom model import Llama\n"
             "from cli import UserError\nfrom fast.offload import new_cache\n"
             "llama = Llama(tiny_config())\n")
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, paths)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_a_killed_process_leaves_nothing(tmp_path):
    process = child("cache = new_cache(llama, 2000, 'disk', folder=sys.argv[1])\n"
                    "cache.rows.fill_(1)\nprint('ready', flush=True)\nsys.stdin.read()\n",
                    tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path):
    """A limit on the size of files, which Linux enforces like a full disk."""
    limit = 100_000
    process = child("try:\n    new_cache(llama, 2000, 'disk', folder=sys.argv[1])\n"
                    "except UserError as e:\n    print(e)\n", tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.startswith("no room for 0.00205 GB of keys and values in ") and out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where, folder, words", [
    ("tape", None, "unknown store 'tape'; known: disk, pinned"),
    ("pinned", None, "--offload pinned is for --device cuda, not cpu"),
    ("disk", "/no/such/folder", "in /no/such/folder .No such file or directory."),
    ("disk", __file__, "Not a directory"),
    ("disk", "/proc", "in /proc .No such file or directory.")])
def test_refusals(tiny, where, folder, words):
    with pytest.raises(UserError, match=words):
        new_cache(tiny, 50, where, folder=folder)


def test_other_devices_and_systems_are_refused(tiny, monkeypatch):
    there = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(UserError, match="--offload disk is for --device cpu, not cuda"):
        new_cache(there, 50, "disk")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="--offload disk needs Linux"):
        new_cache(tiny, 50, "disk")
    for device in "cpu", "cpu:0":
        with pytest.raises(UserError, match="--offload disk needs Linux"):
            offload.check_store("disk", device)


def test_more_tokens_than_the_context_or_the_memory(tiny, monkeypatch):
    with pytest.raises(UserError, match="9999 tokens exceed the model's context of 2048"):
        new_cache(tiny, 9999, "disk")
    monkeypatch.setattr(offload, "pinned_rows", lambda *shape: torch.zeros(10**14))
    with pytest.raises(UserError, match="no room for .* in page-locked memory .[^\n]*$"):
        PinnedCache(tiny, 1, 8, dense=False)


def test_sample_writes_the_same_text_from_a_file(main):
    arguments = ("--engine", "fast", "--temperature", 0, "--max-new-tokens", 12)
    in_memory = main("sample.py", *arguments)
    on_disk = main("sample.py", *arguments, "--offload", "disk")
    assert on_disk["text"] == in_memory["text"]
    assert on_disk["attended_per_step"] == in_memory["attended_per_step"]


@pytest.mark.gpu
def test_a_gpu_reads_pinned_memory(tiny, tiny_butler):
    llama, butler = copy.deepcopy(tiny).cuda(), copy.deepcopy(tiny_butler).cuda()
    for name in ("butler", "dense", "oracle"):
        seen = []
        for make in (lambda c, s: llama.new_cache(1, c),
                     lambda c, s: new_cache(llama, c, "pinned", s)):
            selector = make_selector(name, 0.2, butler)
            cache = make(212, selector)
            seen.append(decode(llama, cache, selector, IDS[:, :212].cuda()).cpu())
        assert_close(name, seen[1], seen[0], 1e-4)
    assert cache.rows.is_cuda and cache.rows[:, :, :, 211].any()
