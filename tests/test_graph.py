"""A decode step as a graph: the tokens of the plain one, and nothing asked of the device meanwhile.

Without a GPU a tape stands in for CUDA's graph: it notes every operation and kernel launch with the
tensors that it had, and runs the same on the same tensors again.
"""

import copy

import pytest
import torch
from conftest import randomise
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import kernel
import model
from baselines import make_selector
from beyond import graph
from beyond.offload import PinnedCache
from butler import Butler, ButlerConfig
from common.errors import ModelError
from cpu import loops
from loading.weights import Config

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not kernel.INTERPRETED, reason="for Triton's interpreter")
RULES = [None, {}, {"drift": 0.9}, {"dense_below": 65, "drift": 0.9}]
IDS = torch.randint(256, (2, 120), generator=torch.Generator().manual_seed(0))




@pytest.fixture(scope="module")
def small():
    """A model of 4 layers, whose 2 query heads share a KV head, and a butler of 2 producers."""
    torch.manual_seed(3)
    config = Config(vocab_size=256, width=32, layers=4, heads=2, kv_heads=1, head_dim=16,
                    mlp_width=64)
    llama = randomise(model.Llama(config))
    return llama, Butler(ButlerConfig.for_model(llama, stride=2, size=8, hidden=16)).eval()


class Tape(TorchDispatchMode):
    """Refuses what mixes tensors of the device with those of the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert len({x.device.type for x in tensors}) <= 1, f"{function} from or to the host"
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def launch(self, run, *args, **kwargs):
        with _disable_current_modes():
            run(*args, **kwargs)
        self.calls.append((run, args, kwargs, None))

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def by_triton(monkeypatch):
    for module in (graph, model, kernel):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(loops, "numba", None)  # a tape does not see its loops


@pytest.fixture
def on_tape(monkeypatch, by_triton):
    """-> a Graph whose blocks have 32 tokens, and the tapes on which it records."""
    interpreter, tapes = type(kernel.attend), []
    run = interpreter.run

    def make(llama, cache, selector):
        def record(function):
            tape, lengths = Tape(), cache.lengths.clone()
            with monkeypatch.context() as m, tape:
                m.setattr(interpreter, "run", lambda *a, **k: tape.launch(run, *a, **k))
                out = function()
            cache.lengths.copy_(lengths)  # CUDA runs nothing of what it records
            out.fill_(torch.nan)
            tapes.append(tape)
            return tape.replay, out

        monkeypatch.setattr(graph, "record", record)
        return graph.Graph(llama, cache, selector)

    monkeypatch.setattr(graph, "BLOCK", 32)
    return make, tapes


def story(llama, butler, rules, make, device="cpu", rows=1):
    """Two questions behind one prompt, the second behind a rewound cache; one step is taken twice.
    -> logits and choices of each step"""
    cache = llama.new_cache(rows, 100)
    selector = None if rules is None else butler.selector(0.6, **rules)
    watch, ids, seen = selector and selector.watch, IDS[:rows].to(device), []
    step = make(llama, cache, selector)

    def decode(*tokens):
        for at in tokens:
            logits = step(ids[:, at : at + 1])
            sparse = selector is not None and not selector.dense
            index = selector.index if sparse else {}
            seen.append((logits.clone(), {n: i.sort(-1).values for n, i in index.items()}))

    llama.prefill(ids[:, :62], cache, watch, lengths=[62, 40][:rows])
    decode(*range(62, 67))
    cache.truncate(cache.size - 1)
    decode(67, 68)
    if rows == 1:
        cache.truncate(50)
        llama.prefill(ids[:, 80:90], cache, watch)
        decode(*range(90, 94))
    return seen


def plain(llama, cache, selector):
    return lambda token: llama.decode(token, cache, selector)


def compare(seen, expected):
    for (logits, index), (ours, theirs) in zip(seen, expected, strict=True):
        assert (logits - ours).abs().max() < 1e-4
        assert index.keys() == theirs.keys()
        for layer, chosen in index.items():  # a graph has slots to spare
            spare = chosen.shape[-1] - theirs[layer].shape[-1]
            assert (chosen[..., : max(spare, 0)] == -1).all()
            n = min(chosen.shape[-1], theirs[layer].shape[-1])
            assert torch.equal(chosen[..., -n:], theirs[layer][..., -n:])


@interpreted
@pytest.mark.parametrize("rows,rules", [
    (1, RULES[2]), *(pytest.param(*case, marks=pytest.mark.slow)
                     for case in ((1, {}), (1, RULES[3]), (2, None), (2, {})))], ids=str)
def test_the_tape_writes_what_the_plain_steps_do(small, on_tape, rows, rules, monkeypatch):
    make, tapes = on_tape
    seen = story(*small, rules, lambda *a: make(*a).step, rows=rows)
    monkeypatch.undo()
    compare(seen, story(*small, rules, plain, rows=rows))
    assert 2 <= len(tapes) < len(seen)


@interpreted
@pytest.mark.parametrize("rules", RULES[:3], ids=str)
def test_a_step_asks_the_device_for_nothing(small, by_triton, monkeypatch, rules):
    """On tensors without contents, which no number can come from: a graph's step, and a plain one
    of a single text."""
    monkeypatch.setattr(type(kernel.attend), "run", lambda *args, **kwargs: None)
    with torch.device("meta"):
        llama, butler = model.Llama(small[0].config), Butler(small[1].config)
    llama.frequencies = small[0].frequencies
    for rows in (1, 2):
        cache = llama.new_cache(rows, 100)
        cache.advance(60)
        selector = None if rules is None else butler.selector(0.6, **rules)
        for layer in range(1, 4) if selector else ():
            selector.importance.see(layer, cache.k[layer], 0)
        step = graph.Graph(llama, cache, selector)
        if rows == 1:
            llama.decode(step.token, cache, selector)  # what is done once may ask
            with Tape() as tape:
                logits = llama.decode(step.token, cache, selector)
            assert logits.is_meta and len(tape.calls) > 100
        for count in range(62, 66):
            if selector:
                selector.arrive(1, count, count + 1)
            with torch.inference_mode():
                step.run(100)
                with Tape() as tape:
                    logits = step.run(100)
            assert logits.is_meta and len(tape.calls) > 100


@interpreted
def test_a_full_cache_is_refused(small, on_tape):
    llama = small[0]
    cache = llama.new_cache(1, 23)
    step = on_tape[0](llama, cache, None).step
    llama.prefill(IDS[:1, :21], cache)
    for at in range(21, 23):
        step(IDS[:1, at : at + 1])
    with pytest.raises(ModelError, match="24 tokens do not fit: the cache holds 23"):
        step(IDS[:1, :1])


def test_steps_are_plain_where_there_can_be_no_graph(small, monkeypatch):
    llama, butler = small
    cache = llama.new_cache(1, 9)
    kinds, real = [], graph.Graph
    monkeypatch.setattr(graph, "Graph", lambda *a: kinds.append(a[2]) or real(*a))
    graph.stepper(llama, cache)(IDS[:1, :1])
    monkeypatch.setattr(graph, "on_gpu", lambda x: True)
    graph.stepper(llama, cache, make_selector("oracle", 0.5))(IDS[:1, :1])
    assert not kinds and cache.size == 2
    pinned = llama.new_cache(1, 9, kind=PinnedCache)
    graph.stepper(llama, pinned, butler.selector(0.5))(IDS[:1, :1])
    assert not kinds and pinned.size == 1
    graph.stepper(llama, cache, able := butler.selector(0.5))
    assert kinds == [able]


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_cuda_graph_writes_the_tokens_of_the_plain_steps(small, rules, monkeypatch):
    llama, butler = (copy.deepcopy(module).cuda() for module in small)
    monkeypatch.setattr(graph, "BLOCK", 32)
    compare(story(llama, butler, rules, graph.stepper, "cuda"),
            story(llama, butler, rules, plain, "cuda"))
    texts = []
    for make in (graph.stepper, plain):
        cache = llama.new_cache(1, 100)
        selector = None if rules is None else butler.selector(0.6, **rules)
        step, token = make(llama, cache, selector), IDS[:1, 59:60].cuda()
        llama.prefill(IDS[:1, :59].cuda(), cache, selector and selector.watch)
        texts.append([])
        for _ in range(33):  # a plain one, and 32 replayed
            token = step(token)[:, -1:].argmax(-1)
            texts[-1].append(token.item())
    assert texts[0] == texts[1]
