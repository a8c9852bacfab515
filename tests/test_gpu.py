"""fast/gpu.py: a recorded step computes what the plain step does, and asks the device for nothing.

Without a GPU a tape stands in for CUDA's graph: it notes every operation and every launch of a
Triton kernel with the tensors that it had, and runs the same on the same tensors again.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close, randomise, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import fast.selector
import kernel
import model
from butler import ButlerConfig
from cli import UserError
from fast import gpu

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not kernel.INTERPRETED, reason="for Triton's interpreter")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(256, (2, 130), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------- choosing

# R, B, G, E, capacity, position, num_chosen
CHOICES = [(2, 1, 3, 32, 1024, 780, 58), (1, 2, 2, 8, 512, 500, 40), (3, 2, 1, 16, 256, 255, 180),
           (1, 1, 1, 32, 128, 31, 11), (1, 1, 1, 16, 128, 21, 1), (1, 1, 1, 16, 128, 0, 0)]


def choose_case(R, B, G, E, capacity, position, num_chosen):
    """Queries, keys and scales; NaN where no key is. The first query is 0: all scores are equal."""
    rng = torch.Generator().manual_seed(capacity)
    queries = torch.randn(R, B, G, E, generator=rng) / 40
    queries[0] *= R < 3
    queries[-1, 0, 0] *= 1e5 ** (capacity == 512)  # scores that fp16 does not hold
    shape = R, B, G, capacity // 64, E, 64
    codes = torch.randint(-127, 128, shape, generator=rng).to(torch.int8)
    scales = torch.rand(R, B, G, capacity, generator=rng)
    scales[..., position:] = torch.nan
    return queries, codes, scales


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_kernels_choose_what_the_definition_does(case, monkeypatch):
    monkeypatch.setattr(gpu, "BLOCK", 128)
    inputs = choose_case(*case)
    capacity, position, num_chosen = case[-3:]
    sinks, window, spare = 4, 16, 5
    shape = *inputs[0].shape[:3], num_chosen
    expected = torch.full(shape, -7, dtype=torch.int32)
    stop = max(position + 1 - window, sinks)
    fast.selector.choose(*inputs, sinks, stop, num_chosen, expected)

    wide = torch.full((*shape[:3], 3 + num_chosen + spare), -7, dtype=torch.int32, device=DEVICE)
    numbers = torch.tensor([[position], [num_chosen]], device=DEVICE)
    gpu.choose(*(x.to(DEVICE) for x in inputs), *numbers, wide[..., 3:], capacity, sinks, window)
    wide = wide.cpu()
    assert torch.equal(wide[..., 3 : 3 + num_chosen], expected)
    assert (wide[..., :3] == -7).all()  # not its own
    assert (wide[..., 3 + num_chosen :] == -1).all()  # slots to spare are empty


def test_the_definition_is_a_stable_top_k():
    """The same by sorting numbers in Python, ties included."""
    queries, codes, scales = choose_case(3, 2, 1, 16, 256, 255, 180)
    out = torch.empty(3, 2, 1, 40, dtype=torch.int32)
    fast.selector.choose(queries, codes, scales, 4, 240, 40, out)
    assert out[0, 0, 0].tolist() == list(range(4, 44))  # all scores are equal: the earliest
    keys = codes.mT.flatten(3, 4).float() * scales[..., None]
    scores = (keys @ queries[..., None])[..., 0] * 16**-0.5
    half = scores[2, 1, 0, :240].half().view(torch.int16).tolist()
    ordered = [(bits if bits >= 0 else -(bits & 0x7FFF)) + 32768 >> 1 for bits in half]
    best = sorted(range(4, 240), key=lambda token: (-ordered[token], token))[:40]
    missed = set(best) ^ set(out[2, 1, 0].tolist())
    edge = ordered[best[-1]]
    assert all(abs(ordered[token] - edge) <= 1 for token in missed)  # the last bit is rounding


# ---------------------------------------------------------------------------- a recorded step


@pytest.fixture(scope="module")
def small():
    """A model of 4 layers and a butler of 2 producers, each in two engines with equal weights:
    (plain model, fast's butler), (gpu's model, gpu's butler)."""
    config = tiny_config(width=32, layers=4, heads=4, kv_heads=2, mlp_width=64)
    plain = randomise(model.Llama(config))
    llama = gpu.Llama(config).eval().requires_grad_(False)
    llama.load_state_dict(plain.state_dict())
    sizes = {"layers_per_producer": 2, "size": 8, "hidden": 16}
    butler = randomise(fast.selector.Butler(ButlerConfig.for_model(plain, **sizes)), seed=1)
    other = gpu.Butler(butler.config).eval().requires_grad_(False)
    other.load_state_dict(butler.state_dict())
    return (plain, butler), (llama, other)


class Tape(TorchDispatchMode):
    """Notes operations; refuses those between the host and the device."""

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
def tapes(monkeypatch):
    """Steps are recorded on these tapes, for up to 32 tokens more each time."""
    made = []
    kernels = type(gpu.score)  # Triton's interpreter, whose `run` launches
    run = kernels.run

    def record(function):
        tape = Tape()
        with monkeypatch.context() as m, tape:
            m.setattr(kernels, "run", lambda *a, **k: tape.launch(run, *a, **k))
            result = function()
        result.fill_(torch.nan)  # CUDA runs nothing of what it records
        made.append(tape)
        return tape.replay, result

    monkeypatch.setattr(gpu, "record", record)
    monkeypatch.setattr(gpu, "CAPACITY", 32)
    monkeypatch.setattr(gpu, "BLOCK", 32)
    return made


def story(llama, butler, budget, B, device="cpu"):
    """Two questions behind one prompt, the second behind a truncated cache; a step taken twice;
    tokens read by the selector, and tokens read without it -> logits and choices of each step"""
    ids = IDS[:B].to(device)
    cache = llama.new_cache(B, 110)
    selector = butler.selector(budget) if budget else None
    watch = selector.watch if selector else None
    seen = []

    def decode(*tokens):
        for at in tokens:
            logits = llama.decode(ids[:, at : at + 1], cache, selector)
            index = selector.index if selector else {}
            chosen = {layer: [set(row.tolist()) - {-1} for row in i.flatten(0, 2)]
                      for layer, i in index.items()}
            seen.append((logits.clone(), chosen))

    llama.prefill(ids[:, :62], cache, watch)
    decode(*range(62, 67))  # beyond 64 tokens
    cache.truncate(cache.size - 1)
    decode(67, 68)
    cache.truncate(50)
    llama.prefill(ids[:, 80:85], cache, watch)
    decode(85, 86, 87)
    llama.prefill(ids[:, 88:91], cache, selector)
    llama.prefill(ids[:, 91:93], cache)
    decode(93, 94)
    return seen, cache


def compare(actual, expected, atol=1e-4):
    assert actual[1].size == expected[1].size
    for step, ((logits, chosen), (true, choice)) in enumerate(zip(actual[0], expected[0],
                                                                  strict=True)):
        assert_close(f"step {step}", logits, true, atol)
        assert chosen == choice, f"step {step}"


@interpreted
@pytest.mark.parametrize("budget, B", [
    (None, 2), (0.6, 1), pytest.param(20, 2, marks=pytest.mark.slow),
    pytest.param(3, 1, marks=pytest.mark.slow)], ids=str)
def test_replayed_steps_are_the_plain_ones(small, tapes, budget, B):
    """A budget of 3 chooses no token beside sinks and window."""
    plain, recorded = small
    actual = story(*recorded, budget, B)
    expected = story(*plain, budget, B)
    compare(actual, expected)
    assert len(tapes) == 4 < len(actual[0])  # at 63, 65, 56 and 65 tokens
    size = actual[1].size
    for layer in range(4):
        assert_close(f"values of layer {layer}", actual[1].v[layer][:, :, :size],
                     expected[1].v[layer][:, :, :size], 1e-5)


@interpreted
def test_every_text_has_its_own_step(small, tapes):
    llama, butler = small[1]
    for selector in (None, butler.selector(0.5), butler.selector(0.5)):
        cache = llama.new_cache(1, 40)
        assert llama.steps == []  # the last text's cache is free
        for at in range(3):
            llama.decode(IDS[:1, at : at + 1], cache, selector)
    assert len(tapes) == 3


@interpreted
def test_other_selectors_take_plain_steps(small, tapes):
    from selection import make_selector

    llama, _ = small[1]
    seen = []
    for each in (small[0][0], llama):
        cache = each.new_cache(1, 40)
        oracle = make_selector("oracle", 0.5)
        each.prefill(IDS[:1, :30], cache, oracle.watch)
        seen.append(each.decode(IDS[:1, 30:31], cache, oracle))
    assert_close("oracle", seen[1], seen[0], 1e-5)
    assert not tapes


@interpreted
def test_a_full_cache_is_refused(small, tapes):
    llama, _ = small[1]
    cache = llama.new_cache(1, 23)
    llama.prefill(IDS[:1, :21], cache)
    for at in (21, 22):
        llama.decode(IDS[:1, at : at + 1], cache)
    with pytest.raises(UserError, match="24 tokens do not fit into a cache of 23"):
        llama.decode(IDS[:1, :1], cache)
    assert cache.size == 23


@interpreted
@pytest.mark.parametrize("budget", [None, 0.6], ids=str)
def test_a_step_asks_the_device_for_nothing(small, monkeypatch, budget):
    """On tensors without contents, from which no number can come."""
    monkeypatch.setattr(type(gpu.score), "run", lambda *args, **kwargs: None)
    llama, butler = (module.to("meta") for module in copy.deepcopy(small[1]))
    cache = llama.new_cache(1, 100)
    selector = butler.selector(budget) if budget else None
    with torch.inference_mode():
        if selector:
            selector.keys.make_room(cache)
        step = gpu.Step(llama, cache, selector, bound=100)
        step.run()
        with Tape() as tape:
            logits = step.run()
    assert logits.is_meta and logits.shape == (1, 1, 256)
    assert len(tape.calls) > 100


@interpreted
def test_importance_keys_of_one_token_are_those_of_a_prompt(small):
    llama, butler = small[1]
    cache = llama.new_cache(2, 70)
    selector = butler.selector(0.5)
    llama.prefill(IDS[:, :70], cache, selector.watch)
    one_by_one = gpu.RecordableKeys(butler)
    one_by_one.make_room(cache)
    keys = torch.stack(cache.k[1:])
    for at in range(70):
        one_by_one.add(keys[:, :, :, at : at + 1], torch.tensor([at]))
    for layer in (1, 2, 3):
        expected = selector.keys.dequantised(layer, 70)
        step = selector.keys.scales[layer - 1, ..., :70].max().item()  # of the 8-bit codes
        assert_close(f"layer {layer}", one_by_one.dequantised(layer, 70), expected, 1.01 * step)


def test_tables_of_importance_keys_do_not_move(small):
    """A recorded step has their addresses."""
    llama, butler = small[1]
    cache = llama.new_cache(1, 1100)
    selector = butler.selector(0.5)
    llama.prefill(IDS[:1, :70], cache, selector.watch)
    known = selector.keys.dequantised(2, 70).clone()
    selector.keys.make_room(cache)
    places = selector.keys.int8_codes.data_ptr(), selector.keys.scales.data_ptr()
    selector.keys.update(slice(None), torch.zeros(3, 1, 2, 1100, 16), new=0)
    assert places == (selector.keys.int8_codes.data_ptr(), selector.keys.scales.data_ptr())
    assert torch.equal(selector.keys.dequantised(2, 70), known)


def test_load_gives_the_models_of_this_file(folder, tmp_path):
    llama, tok, butler = gpu.load(folder, None, "cpu")
    assert type(llama) is gpu.Llama and llama.embed_tokens.weight.dtype == torch.bfloat16
    assert tok.decode(tok.encode("a b")) == "a b" and butler is None
    path = tmp_path / "butler.safetensors"
    trained = fast.selector.Butler(ButlerConfig.for_model(llama, size=8, hidden=16))
    trained.save(path)
    _, _, butler = gpu.load(folder, path, "cpu")
    assert type(butler) is gpu.Butler and type(butler.selector(0.5)) is gpu.ButlerSelector
    assert torch.equal(butler.key_projection, trained.key_projection)


@interpreted
@pytest.mark.slow
def test_the_real_model(llama, butler, tapes):
    """Choices of the shipped butler, in one bound and the next."""
    recorded = gpu.Llama(llama.config).eval().requires_grad_(False)
    recorded.load_state_dict(llama.state_dict())
    seen = []
    for engine, cls in ((llama, fast.selector.Butler), (recorded, gpu.Butler)):
        cache = engine.new_cache(1, 140)
        mine = cls(butler.config).eval().requires_grad_(False)
        mine.load_state_dict(butler.state_dict())
        selector = mine.selector(0.3)
        engine.prefill(torch.arange(3000, 3127)[None], cache, selector.watch)
        for token in range(127, 130):
            logits = engine.decode(torch.tensor([[3000 + token]]), cache, selector)
            chosen = [set(row.tolist()) - {-1} for index in selector.index.values()
                      for row in index.flatten(0, 2)]
            seen.append((logits, chosen))
    assert len(tapes) == 2
    for step in range(3):
        (true, choice), (logits, chosen) = seen[step], seen[3 + step]
        assert_close(f"step {step}", logits, true, 1e-3)
        same = sum(len(a & b) for a, b in zip(chosen, choice, strict=True))
        assert same >= 0.999 * sum(map(len, choice))  # rounding may move a score across a code


# ---------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 0.6, 20], ids=str)
def test_a_cuda_graph_computes_the_plain_steps(small, monkeypatch, budget):
    monkeypatch.setattr(gpu, "CAPACITY", 32)
    (plain, butler), (llama, other) = copy.deepcopy(small)
    for module in (plain, butler, llama, other):
        module.cuda()
    compare(story(llama, other, budget, 2, "cuda"), story(plain, butler, budget, 2, "cuda"), 1e-3)


@pytest.mark.gpu
def test_the_engine_writes_the_same_text_on_a_gpu(main):
    arguments = ("sample.py", "--temperature", 0, "--max-new-tokens", 20, "--device", "cuda",
                 "--selector", "dense")
    assert main(*arguments, "--engine", "fast")["text"] == main(*arguments)["text"]


@pytest.fixture(scope="module")
def for_hopper():
    """{kernel: what it compiles to for sm_90}, and what was said on the way."""
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    return {seen["name"]: seen for seen in map(json.loads, run.stdout.splitlines())}, run.stderr


@pytest.mark.parametrize("name, wide", [("attend_chunk 64", 16), ("attend_chunk 128", 16),
                                        ("merge_chunks 64", 0), ("score", 32), ("select", 4)])
def test_kernels_compile_for_hopper_without_spills_and_with_wide_loads(for_hopper, name, wide):
    """Offline, for sm_90: no GPU is needed to see what the compiler makes of a kernel. Rows of K
    and V come 16 bytes at a time, the 32 channels of importance keys 8."""
    assert name in for_hopper[0], for_hopper[1]
    seen = for_hopper[0][name]
    assert (seen["copies"] + seen["loads"]).count(8 if name == "score" else 16) >= wide, seen
    assert "STACK:0 " in seen["usage"] and "LOCAL:0 " in seen["usage"], seen
