"""fast/: compiled forms equal their definitions, and the engine computes what the course does."""

import errno
import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, randomise, tiny_config
from test_model import small, write_gguf

import butler
import cli
import fast
import model
from cli import UserError
from fast import loops, packed, pairs, prompt
from fast.selector import ImportanceKeys, Refresh, choose, ordered_codes, quantise
from kernel import block_attention, masked_attention
from selection import Budget, Selector, make_selector

numba = pytest.importorskip("numba")


@pytest.fixture(scope="module")
def fast_llama(model_path):
    """The default model on the fast engine, in float32."""
    return fast.Llama.from_pretrained(model_path)


@pytest.fixture(scope="module")
def fast_butler(llama):
    return butler.load_for(llama, cls=fast.Butler)


@pytest.fixture(scope="module")
def ids(tok):
    """800 tokens of Python's language reference."""
    text = "".join(itertools.islice(topics.values(), 3, 30))
    return torch.tensor([tok.encode(text)[:800]])


def packable(cls, head_dim=32, bias=False, **changes):
    """A small model whose float32 weights bfloat16 holds, so that they pack into 16 bits."""
    llama = randomise(cls(tiny_config(
        width=128, layers=4, head_dim=head_dim, mlp_width=96, context=256, attention_bias=bias,
        mlp_bias=bias, **changes)))
    return llama.bfloat16().float()


def small_butler(llama, size=8):
    """An untrained butler for it: producers at layers 0 and 2."""
    torch.manual_seed(3)
    config = butler.ButlerConfig.for_model(llama, layers_per_producer=2, size=size, hidden=16)
    return fast.Butler(config).eval().requires_grad_(False)


def selected(index):
    """[1, G, 1, K] -> the set of tokens of each KV head"""
    return [set(row) - {-1} for row in index[0, :, 0].tolist()]


# ---------------------------------------------------------------------------- choosing


def test_codes_have_the_order_of_the_scores():
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 10
    ranked = scores[ordered_codes(scores).argsort(descending=True, stable=True)]
    best_to_come = ranked.flip(0).cummax(0).values.flip(0)
    assert ((best_to_come - ranked) <= 2**-9 * ranked.abs() + 1e-6).all()
    rising = torch.tensor([-torch.inf, -60000, -1, -1e-6, 0, 1e-6, 1, 60000, torch.inf])
    codes = ordered_codes(rising)
    assert (codes.diff() > 0).all() and codes[0] >= 1 and codes[-1] < 2**15
    assert ordered_codes(torch.tensor([-0.0])) == ordered_codes(torch.zeros(1))
    assert ordered_codes(torch.tensor(65504.0)) == ordered_codes(torch.tensor(1e9))


# R, N, E, capacity, first, stop, k
CHOICES = [(2, 3, 32, 1024, 4, 777, 60), (1, 2, 8, 1024, 4, 1017, 1),
           (3, 2, 16, 2048, 0, 1500, 700), (1, 1, 16, 1024, 4, 4, 0), (1, 1, 16, 1024, 4, 4, 3),
           (1, 2, 8, 1024, 4, 10, 6), (1, 2, 32, 1024, 4, 10, 9), (2, 1, 16, 1024, 3, 64, 5),
           (1, 1, 32, 3072, 4, 2999, 150)]


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "large", "small"])
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_compiled_choosing_equals_the_definition(case, kind):
    R, N, E, capacity, first, stop, k = case
    rng = torch.Generator().manual_seed(stop + k)
    q = torch.randn(R, N, E, generator=rng) / 40
    codes = torch.randint(-127, 128, (R, N, capacity // 64, E, 64), generator=rng).to(torch.int8)
    scales = torch.rand(R, N, capacity, generator=rng)
    if kind == "ties":  # few different scores, sums without rounding
        q = torch.randint(-1, 2, (R, N, E), generator=rng) * (E**0.5)
        codes %= 2
        scales[:] = 0.25
    q *= {"equal": 0.0, "large": 1e6, "small": 1e-6}.get(kind, 1.0)
    scales[..., stop:] = torch.nan  # anything may stand there
    due = torch.rand(R, N, generator=rng) < 0.7
    for some in (torch.ones_like(due), due):
        table, expected = torch.full((2, R, N, 12 + k), -7, dtype=torch.int32)
        expected = expected[..., 12:]
        loops.run(loops.choose, *(x.numpy() for x in (q, codes, scales)), first, stop,
                  table.numpy(), 12, some.numpy())
        assert (table[..., :12] == -7).all()
        found = table[..., 12:]
        choose(q[:, None], codes[:, None], scales[:, None], first, stop, k, expected[:, None],
               some[:, None])
        assert torch.equal(found, expected)
        assert (found[~some] == -7).all() and (found[some] != -7).all()

    # The definition against sorting, row by row.
    scores = (codes.mT.flatten(2, 3)[:, :, :stop].double() @ q[..., None].double())[..., 0]
    scores = scores * E**-0.5 * scales[..., :stop]
    choose(q[:, None], codes[:, None], scales[:, None], first, stop, k, expected[:, None])
    for row, of_row in zip(expected.flatten(0, 1), scores.flatten(0, 1).tolist(), strict=True):
        taken = [s for s in row.tolist() if s >= 0]
        assert taken == sorted(set(taken)) and len(taken) == min(k, max(stop - first, 0))
        rest = sorted(set(range(first, stop)) - set(taken))
        if taken and rest:
            lowest = min(of_row[s] for s in taken)
            assert max(of_row[s] for s in rest) <= lowest + abs(lowest) * 2**-9 + 3e-7 \
                or kind == "large"  # beyond the largest fp16 number all are equal
        if kind == "equal":
            assert taken == list(range(first, min(first + k, stop)))


def test_a_producer_of_one_token(fast_butler):
    x = torch.randn(1, 1, fast_butler.config.width, generator=torch.Generator().manual_seed(0))
    b = fast_butler.weights
    for n, layer in enumerate(map(int, fast_butler.producers)):
        expected = fast_butler.importance_queries(layer, x, torch.tensor([900]))
        expected = torch.stack(list(expected.values()))[:, 0, :, 0]
        found = torch.empty_like(expected)
        loops.run(loops.predict, x[0, 0].numpy(), b.norm_weight[n], b.norm_bias[n], b.eps, b.up[n],
                  b.out[layer : layer + len(found)], 900, b.importance_rope, found.numpy())
        assert_close("queries", found, expected, 1e-4)


@pytest.mark.parametrize("head_dim,size,known", [(64, 32, 62), (128, 16, 1022)])
def test_importance_keys_of_one_token(head_dim, size, known):
    """Beside those of PyTorch, over the border of a line of 64 tokens and of the table's room; one
    large key drowns no other."""
    b = small_butler(packable(model.Llama, head_dim), size)
    S = known + 5
    keys = torch.randn(3, 1, 2, S, head_dim, generator=torch.Generator().manual_seed(1))
    keys[:, :, :, 20] *= 1000
    importance = ImportanceKeys(b)
    importance.update(slice(None), keys[:, :, :, :known], known)
    for end in range(known + 1, S + 1):
        importance.update(slice(None), keys[:, :, :, :end], 1)
    for layer in (1, 2, 3):
        exact = b.importance_keys(layer, keys[layer - 1], torch.arange(S))
        scales = quantise(exact)[1]
        found = importance.scales[layer - 1][..., :S]
        assert_close("scales", found / scales, torch.ones_like(scales), 1e-4)
        error = (importance.dequantised(layer, S) - exact).abs()
        assert (error <= 0.51 * scales[..., None]).all()
        assert importance.int8_codes[layer - 1, :, :, 0].abs().amax() == 127


def test_a_text_from_its_first_token(fast_llama, fast_butler, ids):
    """Nothing is cached at first; sinks and window overlap; the budget leaves nothing to choose."""
    cache, selector = fast_llama.new_cache(1, 14), fast_butler.selector(0.1)
    logits = [fast_llama.decode(token, cache, selector) for token in ids[:, :14].split(1, dim=1)]
    assert selected(selector.index[7]) == [{0, 1, 2, 3} | set(range(6, 14))] * 3
    expected = fast_llama(ids[:, :12])
    assert_close("logits", torch.cat(logits[:12], dim=1), expected, 1e-3)


# ---------------------------------------------------------------------------- products


def in_gguf(weights, kind):
    """-> a tensor of a GGUF file, and the weights that it stands for"""
    kind = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weights.numpy(), kind)
    stored = torch.from_numpy(gguf.dequantize(data, kind).copy())
    return SimpleNamespace(data=data, tensor_type=kind), stored


@pytest.mark.parametrize("kinds", [("Q4_0", "Q4_1"), ("Q8_0", "Q8_0"), ("Q4_1", "Q8_0"),
                                   ("BF16", "BF16"), ("Q4_0", "BF16"), ("F32", "F32")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products(kinds, dtype):
    """Two stacked layers, with biases, against torch's product. F32: random float32 weights."""
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(96, generator=rng)
    linears = [torch.nn.Linear(96, rows).requires_grad_(False) for rows in (128, 64)]
    tensors, weights = {}, []
    for linear, kind in zip(linears, kinds, strict=True):
        tensors[linear], stored = in_gguf(torch.randn(linear.weight.shape, generator=rng), kind)
        weights.append(stored)
        linear.weight.data = stored.to(dtype)
        linear.bias.data = linear.bias.data.to(dtype)
    found = packed.pack([linears], tensors)
    bits = max(packed.BITS.get(kind, 16) for kind in kinds)
    if dtype == torch.float32 and ("F32" in kinds or kinds == ("Q4_0", "BF16")):
        assert found is None
        return
    found = packed.of_layer(found, 0)
    assert found.codes.shape == (3, 3 * bits, 64)
    assert found.terms == (2 if dtype == torch.float32 else 1)
    out = np.empty(192, np.float32)
    loops.run(packed.multiply, x.numpy(), found, out)
    if bits == 16:
        weights = [linear.weight.float() for linear in linears]
    exact = torch.cat([F.linear(x, weight, linear.bias.float())
                       for linear, weight in zip(linears, weights, strict=True)])
    assert_close("product", out, exact, 1e-4 if dtype == torch.float32 or bits == 16 else 5e-3)
    if bits < 16:
        one, two = np.empty((2, 192), np.float32)
        loops.run(packed.multiply, x.numpy(), found._replace(terms=1), one)
        loops.run(packed.multiply, x.numpy(), found._replace(terms=2), two)
        error = np.linalg.norm(one - two) / np.linalg.norm(two)
        assert 1e-6 < error < 5e-5, f"activations of one term: {error:.1e}"
    x[40] = torch.nan
    loops.run(packed.multiply, x.numpy(), found, out)
    assert np.isnan(out).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_codes_of_a_file(kind):
    """Are its weights, exactly."""
    tensor, stored = in_gguf(torch.randn(64, 96), kind)
    codes, step, low = packed.read_codes(tensor)
    assert torch.equal(codes.unflatten(1, (-1, 32)) * step[..., None] + low[..., None],
                       stored.unflatten(1, (-1, 32)))


@pytest.mark.parametrize("kind,bits,told", [("Q4_0", 4, ""), ("Q8_0", 8, ""), ("F16", 16, ""),
                                            ("Q5_0", 16, "16 bits for weights of Q5_0")])
def test_steps_of_other_files(tmp_path, capsys, kind, bits, told):
    hf = small(vocab_size=128)
    path = write_gguf(tmp_path / "a.gguf", hf, gguf.GGMLQuantizationType[kind])
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    quick = fast.Llama.from_pretrained(path, dtype)
    plain = model.Llama.from_pretrained(path)
    x = torch.randint(128, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = quick.new_cache(1, 20)
    logits = torch.cat([quick.decode(token, cache) for token in x.split(1, dim=1)], dim=1)
    assert_close("logits", logits, plain(x), 1e-3 if bits < 16 else 0.3)
    assert quick.packed.qkv.codes.shape[2] == 2 * bits
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiling" not in line]
    assert len(lines) == bool(told) and all(told in line for line in lines)


@pytest.mark.parametrize("sizes", [(100, 128), (96, 100)])
def test_sizes_that_do_not_pack(sizes):
    linear = torch.nn.Linear(*sizes).bfloat16().float()
    assert packed.pack([[linear]], {}) is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("terms", [1, 2])
def test_products_of_pairs_equal_their_definition(bits, terms):
    """Exactly, the largest numbers included."""
    dot = numba.njit(lambda words, x, sums: pairs.dot_pairs(bits, terms, words, x, sums))
    rng = np.random.default_rng(bits)
    words = rng.integers(-(2**31), 2**31, (bits, 64), np.int32)
    words[:, :2] = -1, 0
    extremes = np.array([-(2**15), -1, 0, 2**15 - 1], np.int16)
    x = np.stack([rng.choice(extremes, 32), rng.integers(-(2**15), 2**15, 32, np.int16)])
    sums, expected = np.full((2, 2, 64), 7, np.int32)
    dot(words, x.view(np.int32), sums)
    pairs.plain(bits, terms, words, x.view(np.int32), expected)
    assert (sums == expected).all() and (sums[terms:] == 7).all()


def test_products_of_pairs_on_a_processor_without_the_instruction():
    features = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "",
                "NUMBA_CACHE_DIR": os.devnull}
    done = subprocess.run([sys.executable, "-m", "fast.pairs"], env=os.environ | features, cwd=ROOT,
                          capture_output=True, text=True, check=True)
    printed = re.findall(r"sums (.*)", done.stdout)
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (4, 64), np.int32)
    x = rng.integers(-(2**15), 2**15, (2, 32), np.int16).view(np.int32)
    sums = np.empty((2, 64), np.int32)
    pairs.plain(4, 2, words, x, sums)
    assert printed == [str(sums[0, :3])] * 2


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("G,heads,S,D,K", [(3, 3, 781, 64, 78), (1, 7, 1, 16, 1),
                                           (2, 4, 200, 128, 9), (2, 1, 97, 80, 97),
                                           (4, 2, 300, 64, 131)])
def test_compiled_attention_equals_masked_attention(G, heads, S, D, K):
    """Selected tokens, with empty slots, and all tokens up to one; NaN in what is not to be read"""
    rng = torch.Generator().manual_seed(S)
    q = torch.randn(1, G * heads, 1, D, generator=rng) * 3
    k, v = torch.randn(2, 1, G, S + 5, D, generator=rng)
    idx = torch.rand(1, G, 1, S, generator=rng).topk(K).indices.int()
    idx[..., K // 2 : K // 2 + 3] = -1
    every = torch.arange(S, dtype=torch.int32).expand(1, G, 1, S)
    for tokens, given in (idx, idx[0, :, 0]), (every, torch.empty(G, 0, dtype=torch.int32)):
        expected = torch.nan_to_num(masked_attention(q, k, v, tokens))  # no token: 0
        unread = torch.ones(G, S + 5, dtype=torch.bool)
        for g, row in enumerate(tokens[0, :, 0].long()):
            unread[g, row[row >= 0]] = False
        holes = [x[0].masked_fill(unread[..., None], torch.nan).numpy() for x in (k, v)]
        out = torch.empty(G, heads, D)
        loops.run(loops.attend, q.view(G, heads, D).numpy(), *holes, given.numpy(), S, out.numpy())
        assert_close("attention", out.view(q.shape), expected, 1e-5)


def test_attention_without_any_token_is_0():
    q, k, v = np.ones((2, 3, 16), np.float32), *np.ones((2, 2, 9, 16), np.float32)
    out = np.full_like(q, 7)
    loops.run(loops.attend, q, k, v, np.full((2, 4), -1, np.int32), 9, out)
    assert (out == 0).all()


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize("head_dim,bias,size", [(32, False, 8), (64, True, 16), (128, False, 32)])
@pytest.mark.parametrize("budget", [None, 20])
def test_compiled_steps_are_those_of_the_plain_model(head_dim, bias, size, budget):
    """The plain model attends to what the compiled steps chose: the same logits, keys, values."""
    plain, quick = (packable(cls, head_dim, bias) for cls in (model.Llama, fast.Llama))
    x = torch.randint(256, (1, 72), generator=torch.Generator().manual_seed(0))
    caches = plain.new_cache(1, 72), quick.new_cache(1, 72)
    selector = budget and small_butler(plain, size).selector(budget)
    plain.prefill(x[:, :60], caches[0])
    quick.prefill(x[:, :60], caches[1], selector and selector.watch)
    for token in x[:, 60:].split(1, dim=1):
        found = quick.decode(token, caches[1], selector)
        expected = plain.decode(token, caches[0],
                                selector and (lambda layer, *_: selector.index.get(layer)))
        assert_close("logits", found, expected, 1e-3)
        if selector:
            assert all(len(row) == 20 for row in selected(selector.index[3]))
    assert quick.packed and caches[1].size == 72
    for layer in range(4):
        assert_close("keys", caches[1].k[layer], caches[0].k[layer], 1e-4)
        assert_close("values", caches[1].v[layer], caches[0].v[layer], 1e-4)
    with pytest.raises(UserError, match="73 tokens do not fit into a cache of 72"):
        quick.decode(x[:, :1], caches[1], selector)


def test_whoever_may_not_run_compiled_runs_plain(tiny, tiny_butler, capsys):
    """Batches, blocks, other selectors and caches; random float32 weights, told in one line."""
    plain = packable(model.Llama)
    quick = packable(fast.Llama)
    x = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    b = small_butler(plain)
    makers = {"dense": lambda: None, "oracle": lambda: make_selector("oracle", 20),
              "recency": lambda: make_selector("recency", 20),
              "butler": lambda: butler.ButlerSelector(b, 20)}
    for make in makers.values():
        for rows, split in (x, [30, 1, 1]), (x[:1], [30, 1, 1, 6]):
            seen = []
            for llama in plain, quick:
                cache = llama.new_cache(len(rows), 40)
                selector = make()
                seen.append(torch.cat([llama(part, cache, selector)
                                       for part in rows[:, : sum(split)].split(split, dim=1)], 1))
            assert_close("logits", seen[1], seen[0], 1e-3)
    assert_close("no table", quick.decode(x[:1, :1], plain.new_cache(1, 4)),
                 plain.decode(x[:1, :1], plain.new_cache(1, 4)), 1e-4)
    capsys.readouterr()
    for config in tiny_config(), tiny_config(vocab_size=250):
        odd = randomise(fast.Llama(config))
        if config.vocab_size == 250:
            odd = odd.bfloat16().float()
        cache = odd.new_cache(1, 4)
        for _ in range(2):
            logits = odd.decode(torch.tensor([[5]]), cache)
        expected = model.Llama.forward(odd, torch.tensor([[5, 5]]))[:, 1:]
        assert_close("plain steps", logits, expected, 1e-4)
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "16 bits" in told
        assert odd.weight_bytes() == model.Llama.weight_bytes(odd)


def test_a_full_budget_is_dense(fast_llama, fast_butler, ids):
    logits = []
    for selector in None, fast_butler.selector(1.0), fast_butler.selector(400):
        cache = fast_llama.new_cache(1, 60)
        fast_llama.prefill(ids[:, :50], cache)
        logits.append(torch.cat([fast_llama.decode(t, cache, selector)
                                 for t in ids[:, 50:54].split(1, 1)]))
    assert_close("all tokens chosen", logits[1], logits[0], 1e-3)
    assert_close("more than all", logits[2], logits[0], 1e-3)


# ---------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("B,S,T", [(1, 70, 70), (2, 300, 128), (1, 97, 2)])
def test_attention_of_a_prompt(B, S, T, dtype, limit):
    """NaN where the cache has no tokens yet; then an index with a choice for each query."""
    rng = torch.Generator().manual_seed(S)
    q = torch.randn(B, 6, T, 64, generator=rng).bfloat16().float()
    k, v = torch.randn(2, B, 2, S + 3, 64, generator=rng).bfloat16().float()
    k[:, :, S:] = v[:, :, S:] = torch.nan
    k, v = k[:, :, :S], v[:, :, :S]
    expected = model.attention(q, k, v, None)
    assert_close("attention", prompt.attention(q, k, v, None, dtype), expected, limit)
    index = torch.arange(S, dtype=torch.int32).expand(B, 2, T, S)  # a choice for each query
    index = torch.where(index <= torch.arange(S - T, S)[:, None], index, -1)
    assert_close("selected", prompt.attention(q, k, v, index, dtype), expected, 1e-5)


@pytest.mark.parametrize("B,unlike", [(1, None), (2, None), (1, "counts"), (1, "own")])
def test_blocks_of_a_prompt(B, unlike):
    """Also where KV heads name different numbers of tokens, or not all of their own block."""
    rng = torch.Generator().manual_seed(B)
    q = torch.randn(B, 6, 192, 64, generator=rng).bfloat16().float()
    k, v = torch.randn(2, B, 2, 500, 64, generator=rng).bfloat16().float()
    last = torch.tensor([371, 435, 499])
    budget = Budget(0.5, window=128)
    chosen = budget.topk(torch.rand(B, 2, 3, 500, generator=rng), last)
    index = torch.cat([budget.sinks_and_window(last).expand(B, 2, -1, -1), chosen], dim=-1)
    if unlike == "counts":
        index[0, 1, 0, -70:] = -1
    if unlike == "own":
        index[0, :, 1, 10] = -1
    found = prompt.attention(q, k, v, index.int())
    assert_close("attention", found, block_attention(q, k, v, index.int()), 1e-5)


def test_blocks_choose_as_the_course_does(fast_llama, fast_butler, ids):
    """The same sets of tokens from the same scores, in any order."""
    cache, selector = fast_llama.new_cache(1, 800), fast_butler.selector(0.1)
    fast_llama.prefill(ids[:, :512], cache, selector.watch)
    compared = 0

    def compare(layer, x, q, keys, positions):
        nonlocal compared
        selector.watch(layer, x, q, keys, positions)
        selector.look_ahead(layer, x, positions)
        for total in (0.4, 132, 140, 10_000) if layer else ():
            arguments = Budget(total, window=128), layer, q, keys, positions
            found = selector.choose_for_blocks(*arguments)
            expected = Selector.choose_for_blocks(selector, *arguments)
            assert found.dtype == torch.int32 and found.shape[2] == 3
            found, expected = (x.sort(-1).values for x in (found, expected))
            assert torch.equal(found, expected)
            compared += int((found >= 0).sum())

    fast_llama.prefill(ids[:, 512:704], cache, compare)
    assert compared > 10_000


@pytest.mark.parametrize("tiles", [True, False])
def test_a_bfloat16_model_reads_as_the_plain_one(tiles, model_path, llama, ids, monkeypatch):
    """Whole prompts and chunks: about as near to float32 as the plain model in bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    quick = fast.Llama.from_pretrained(model_path, torch.bfloat16)
    plain = model.Llama.from_pretrained(model_path, torch.bfloat16)
    exact = llama(ids[:, :600]).log_softmax(-1)

    def divergence(logits):
        return float((exact.exp() * (exact - logits.float().log_softmax(-1))).sum(-1).mean())

    limit = divergence(plain(ids[:, :600])) * 1.2
    for split in [600], [256, 256, 88]:
        cache = quick.new_cache(1, 600)
        logits = torch.cat([quick(part, cache) for part in ids[:, :600].split(split, dim=1)], 1)
        assert divergence(logits) < limit
        assert cache.size == 600 and cache.k[0].dtype == torch.float32
    assert_close("last", quick.prefill(ids[:, :600], quick.new_cache(1, 600)), logits[:, -1:], 0.5)


# ---------------------------------------------------------------------------- near the course


class Beside(Selector):
    """Attends to what `fast_selector` chose, and asks the plain butler what it would have."""

    def __init__(self, fast_selector, plain_butler, budget):
        self.fast = fast_selector
        self.plain = plain_butler.selector(budget)
        self.overlaps = []
        self.margins = []  # how far below the K-th best score, in quantisation steps

    def __call__(self, layer, x, q, keys, positions):
        self.plain(layer, x, q, keys, positions)
        if layer == 0:
            return None
        used = self.fast.index[layer]
        scores = self.plain.scores(layer, q, keys, positions)[0, :, 0]  # [G, S]
        query = self.plain.queries[layer][0, :, 0]
        scales = self.fast.keys.scales[layer - 1, 0, :, : self.fast.end - 1].amax(-1)
        step = query.abs().sum(-1) * scales * query.shape[-1] ** -0.5
        both = zip(selected(used), selected(self.plain.index[layer]), strict=True)
        for g, (ours, theirs) in enumerate(both):
            assert len(ours) == len(theirs)
            self.overlaps.append(len(ours & theirs) / len(theirs))
            kth = scores[g, list(theirs - self.always(keys.shape[2]))].min()
            chosen = scores[g, list(ours - self.always(keys.shape[2]))].min()
            self.margins.append(float((kth - chosen) / (step[g] + 2**-9 * kth.abs())))
        return used

    def always(self, S):
        return set(self.plain.budget.sinks_and_window(torch.tensor([S - 1])).flatten().tolist())


def test_the_fast_engine_is_near_the_plain_one(llama, butler, fast_llama, fast_butler, ids):
    """Logits within 1e-3 at equal choices, 97 % of the choices the same, and every chosen token
    within one quantisation step of the K-th best."""
    caches = llama.new_cache(1, 800), fast_llama.new_cache(1, 800)
    selector = fast_butler.selector(0.1)
    beside = Beside(selector, butler, 0.1)
    llama.prefill(ids[:, :776], caches[0], beside.plain.watch)
    fast_llama.prefill(ids[:, :776], caches[1], selector.watch)
    for token in ids[:, 776:788].split(1, dim=1):
        found = fast_llama.decode(token, caches[1], selector)
        assert found.dtype == torch.float32
        assert_close("logits", found, llama.decode(token, caches[0], beside), 1e-3)
    assert np.mean(beside.overlaps) >= 0.97
    assert max(beside.margins) <= 1
    assert max(beside.margins) > 0  # or nothing was compared
    for cache in caches:
        cache.truncate(776)
    for token in ids[:, 776:780].split(1, dim=1):
        assert_close("dense logits", fast_llama.decode(token, caches[1]),
                     llama.decode(token, caches[0]), 1e-3)


def test_the_default_model_packs_into_the_bits_of_its_file(fast_llama):
    """Its blocks are 4-bit there, its embedding, which is also the head, 8-bit."""
    w = fast_llama.packed
    shapes = [matrix.codes.shape for matrix in (w.qkv, w.o, w.gate_up, w.down, w.lm_head)]
    assert shapes == [(30, 15, 72, 64), (30, 9, 72, 64), (30, 48, 72, 64), (30, 9, 192, 64),
                      (768, 144, 64)]
    blocks = 30 * 576 * (960 + 576 + 3 * 1536)
    norms = 61 * 576 * 4
    assert fast_llama.weight_bytes() == blocks * 3 // 4 + 49152 * 576 * 5 // 4 + norms


def greedy(llama, butler, ids, n=24, **rules):
    cache = llama.new_cache(1, ids.shape[1] + n)
    selector = butler.selector(0.1, **rules)
    llama.prefill(ids[:, :-1], cache, selector.watch)
    tokens = [int(ids[0, -1])]
    leads = []  # of the best logit over the second
    for _ in range(n):
        logits = llama.decode(torch.tensor([tokens[-1:]]), cache, selector)[0, -1]
        best, second = logits.topk(2).values
        leads.append(float(best - second))
        tokens.append(int(logits.argmax()))
    return tokens[1:], selector, leads


def test_the_same_greedy_text(llama, butler, fast_llama, fast_butler, ids):
    """Up to a near tie of two tokens, which another choice of a few cached tokens may turn."""
    expected, _, leads = greedy(llama, butler, ids[:, :500])
    found = greedy(fast_llama, fast_butler, ids[:, :500])[0]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1],
                                              zip(found, expected, strict=True)))
    assert same == 24 or same >= 12 and leads[same] < 0.05
    assert greedy(llama, fast_butler, ids[:, :500], n=12)[0] == found[:12]  # plain steps


def test_sample_writes_the_same_on_both_engines(capsys, monkeypatch):
    texts = []
    for engine in "plain", "fast":
        monkeypatch.setattr(sys, "argv", ["sample.py", "--engine", engine, "--temperature", "0",
                                          "--max-new-tokens", "12", "--device", "cpu"])
        script = runpy.run_path(str(ROOT / "sample.py"))
        texts.append(script["main"](cli.parse(script["Config"]))["text"])
    capsys.readouterr()
    assert texts[0] == texts[1] and texts[0].strip()


# ---------------------------------------------------------------------------- state


def test_a_step_can_be_repeated_and_a_text_cut(fast_llama, fast_butler, ids):
    """After a cut, steps choose what a fresh selector chooses."""
    cache = fast_llama.new_cache(1, 400)
    selector = fast_butler.selector(0.1)
    fast_llama.prefill(ids[:, :300], cache, selector.watch)

    def decode(tokens, selector):
        steps = []
        for token in tokens.split(1, dim=1):
            logits = fast_llama.decode(token, cache, selector)
            steps.append((logits, {n: index.clone() for n, index in selector.index.items()}))
        return steps

    def assert_same(steps, expected):
        for (a, chosen), (b, again) in zip(steps, expected, strict=True):
            assert torch.equal(a, b) and all(torch.equal(chosen[n], again[n]) for n in again)

    first = decode(ids[:, 300:306], selector)
    cache.truncate(305)
    assert_same(decode(ids[:, 305:306], selector), first[5:])
    cache.truncate(302)
    assert_same(decode(ids[:, 302:306], selector), first[2:])
    cache.truncate(290)
    fresh = fast_butler.selector(0.1)
    found = decode(ids[:, 400:406], selector)
    cache.truncate(290)
    assert_same(found, decode(ids[:, 400:406], fresh))
    kept = [index for _, index in found]
    assert not torch.equal(kept[-1][29], kept[-2][29])  # an index is not overwritten later


@pytest.mark.parametrize("watched", [True, False])
def test_plain_steps_choose_ahead_as_compiled_ones(watched):
    """In plain steps keys come layer by layer. After a prompt that was not watched, the first one
    chooses layer by layer too. A block in between, too."""
    plain, quick = packable(model.Llama), packable(fast.Llama)
    b = small_butler(plain)
    x = torch.randint(256, (1, 90), generator=torch.Generator().manual_seed(0))
    seen, calls = [], []
    for llama, prefetches in (plain, True), (quick, True), (quick, False):
        cache, selector = llama.new_cache(1, 90), b.selector(24)
        if prefetches:  # then steps are plain
            selector.prefetch_with(lambda layers, chosen, of=selector: calls.append(
                (of, layers, chosen.clone())))
        llama.prefill(x[:, :60], cache, selector.watch if watched else None)
        logits = []
        for part in x[:, 60:].split([1, 1, 1, 5, 1, 1, 20], dim=1):
            calls.clear()
            logits.append(llama(part, cache, selector))
            ahead = prefetches and part.shape[1] == 1 and (watched or cache.size > 61)
            assert [layers for _, layers, _ in calls] == ([[1, 2], [3]] if ahead else [])
            for of, layers, chosen in calls:
                assert of is selector and chosen.dtype == torch.int32
                for n, row in zip(layers, chosen, strict=True):
                    assert torch.equal(row, selector.index[n][:, :, 0, 12:])
        seen.append((torch.cat(logits, 1), dict(selector.index)))
    for logits, index in seen[1:]:
        assert_close("logits", logits, seen[0][0], 1e-2)
        for layer in (1, 2, 3):
            same = index[layer].sort(-1).values == seen[0][1][layer].sort(-1).values
            assert same.float().mean() > 0.97


def test_a_block_selects_what_its_tokens_select_one_by_one():
    """But for ties in fp16, in which a step rounds scores."""
    llama = packable(model.Llama)
    b = small_butler(llama)
    x = torch.randint(256, (1, 80), generator=torch.Generator().manual_seed(1))
    cache, block = llama.new_cache(1, 80), b.selector(24)
    llama.prefill(x[:, :70], cache, block.watch)
    llama(x[:, 70:], cache, block)
    cache.truncate(0)
    selector = b.selector(24)
    llama.prefill(x[:, :70], cache, selector.watch)
    for t in range(10):
        from_block = {layer: index[:, :, t : t + 1] for layer, index in block.index.items()}

        def attend_as_the_block(layer, *inputs, used=from_block):
            selector(layer, *inputs)
            return used.get(layer)

        llama.decode(x[:, 70 + t : 71 + t], cache, attend_as_the_block)
        for layer, index in from_block.items():
            both = zip(selected(index), selected(selector.index[layer]), strict=True)
            for at_once, alone in both:
                assert len(at_once & alone) >= 23 and len(at_once) == len(alone) == 24


def test_the_definition_chooses_where_there_is_no_numba(monkeypatch):
    llama = packable(fast.Llama)
    b = small_butler(llama)
    x = torch.randint(256, (1, 70), generator=torch.Generator().manual_seed(0))
    runs = []
    for present in True, False:
        if not present:
            monkeypatch.setattr(loops, "numba", None)
            llama = packable(fast.Llama)
        cache, selector = llama.new_cache(1, 80), b.selector(24, drift=0.5)
        llama.prefill(x, cache, selector.watch)
        logits = [llama.decode(token, cache, selector) for token in x[:, :8].split(1, dim=1)]
        runs.append((torch.cat(logits), selected(selector.index[3])))
    assert llama.packed is None
    assert_close("logits", runs[1][0], runs[0][0], 1e-3)
    assert runs[0][1] == runs[1][1]


# ---------------------------------------------------------------------------- drift


def test_drift_counts_turns_and_ages():
    """Against a count in Python, for queries that turn by fixed angles."""
    refresh = Refresh(0.1)
    refresh.begin((1, 1, 1, 2), "cpu")
    asked, age = np.zeros((1, 1, 2), np.float32), np.full((1, 1), 16)  # of the compiled form
    made = []
    turns = [0, 0.3, 0.6, 0.7, 0.9, 0.95, 1.8] + [1.8] * 30
    for turn in turns:
        query = torch.tensor([np.cos(turn), np.sin(turn)]).float() * (1 + turn)
        made.append(bool(refresh.due(slice(1), query[None, None, None])))
        due = np.zeros((1, 1), bool)
        loops.run(loops.mark_due, query[None, None].numpy(), asked, age, 0.1, due)
        assert due[0, 0] == made[-1] and age[0, 0] == refresh.age.item()
    expected, latest, age = [], None, 0
    for turn in turns:
        age += 1
        new = latest is None or np.cos(turn - latest) < 0.9 or age >= 16
        latest, age = (turn, 0) if new else (latest, age)
        expected.append(new)
    assert made == expected and made[:7] == [True, False, True, False, False, False, True]
    assert made[7:].index(True) == 15
    assert int(refresh.made) == sum(expected) and refresh.used == len(turns)
    refresh.begin((1, 1, 1, 2), "cpu")
    assert refresh.due(slice(1), torch.ones(1, 1, 1, 2)).all()


def test_drift_in_a_text(fast_llama, fast_butler, ids):
    chosen, selector, _ = greedy(fast_llama, fast_butler, ids[:, :400], n=18, drift=0.0)
    assert selector.steps_per_choice == 1
    assert greedy(fast_llama, fast_butler, ids[:, :400], n=18, drift=1e-9)[0] == chosen
    _, some, _ = greedy(fast_llama, fast_butler, ids[:, :400], n=18, drift=0.3)
    assert 1 < some.steps_per_choice < 9  # of 18 steps the first one chooses at least
    _, never, _ = greedy(fast_llama, fast_butler, ids[:, :400], n=18, drift=2.0)
    assert never.steps_per_choice == 9  # steps 0 and 16
    index = never.index[5][0, :, 0]
    window = set(range(409, 417))  # the text ends with token 416
    for row in index:
        assert window <= set(row.tolist())
        assert 12 < len(set(row.tolist()) - window) < 42
        assert max(set(row.tolist()) - window) <= 415 - 8  # chosen for token 415


def test_a_cut_text_forgets_its_choices(fast_llama, fast_butler, ids):
    cache, selector = fast_llama.new_cache(1, 100), fast_butler.selector(30, drift=2.0)
    fast_llama.prefill(ids[:, :90], cache, selector.watch)
    for cut in (90, 90, 50):
        cache.truncate(cut)
        fast_llama.decode(ids[:, cut : cut + 1], cache, selector)
        assert all(index.max() <= cut for index in selector.index.values())
    assert selector.steps_per_choice == 3 / 2  # the repeated step has used its choice again


@pytest.mark.parametrize("drift", [-0.1, 2.5])
def test_absurd_drift_is_refused(fast_butler, drift):
    with pytest.raises(UserError, match="from 0 to 2"):
        fast_butler.selector(0.1, drift=drift)
    with pytest.raises(UserError, match="no --interval"):
        make_selector("butler", 0.1, fast_butler, interval=2)


# ---------------------------------------------------------------------------- loading


def test_load(folder, capsys):
    """A model that the shipped butler does not fit; the default one has it, in fast's class."""
    llama, tok, none = fast.load(str(folder))
    assert isinstance(llama, fast.Llama) and none is None and tok.encode("a")
    expected = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    assert llama.embed_tokens.weight.dtype == expected
    with pytest.raises(UserError, match="another base model"):
        fast.load(str(folder), str(butler.SHIPPED))
    with pytest.raises(UserError, match="no butler at"):
        fast.load(str(folder), "nowhere")
    llama, _, shipped = fast.load()
    assert isinstance(shipped, fast.Butler) and shipped.rules == ("drift",)


def test_without_numba_load_says_so_and_steps_are_plain(folder):
    script = ("import sys; sys.modules['numba'] = None; import torch, fast\n"
              "llama, tok, butler = fast.load(sys.argv[1])\n"
              "cache = llama.new_cache(1, 9)\n"
              "steps = [llama.decode(torch.tensor([[t]]), cache) for t in (3, 4, 5)]\n"
              "error = (torch.cat(steps, 1) - llama(torch.tensor([[3, 4, 5]]))).abs().max()\n"
              "assert error < 0.1 and llama.packed is None, error")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "Numba is missing" in done.stderr


def test_compiled_code_is_kept_per_state_of_the_source(tmp_path, monkeypatch):
    for name in "a.py", "b.py":
        (tmp_path / name).write_text("x = 1\n")
    before = loops.source_digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    changed = loops.source_digest(tmp_path)
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    (tmp_path / "notes.txt").write_text("no code")
    assert len({before, changed, loops.source_digest(tmp_path)}) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/the/user")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for parent in "/the/user/tokenbutler", "/another":
        loops.compiled_folder.cache_clear()
        assert str(loops.compiled_folder()) == f"{parent}/numba-{loops.source_digest()}"
        monkeypatch.setattr(numba.config, "CACHE_DIR", "/another")
    loops.compiled_folder.cache_clear()


FAR = 0x1122334455667788  # so long that its bytes stand in the machine code


def far_from(x):
    return x + FAR


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty folder for compiled code."""
    monkeypatch.setattr(loops.CompiledCode, "kept", True)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    loops.compiled_folder.cache_clear()
    yield tmp_path / "kept"
    loops.compiled_folder.cache_clear()


def loaded(function=far_from, x=3, expected=FAR + 3) -> bool:
    """Compiles as a new process would -> did the code come from a file?"""
    made = loops.compiled(function)
    assert made(x) == expected
    return bool(made.stats.cache_hits)


def one_bit(code: bytes) -> bytes:
    """Where a pickle can still be read, and the function gives another result."""
    return code.replace(FAR.to_bytes(8, "little"), (FAR ^ 1).to_bytes(8, "little"))


@pytest.mark.parametrize("damage", [
    lambda code: b"", lambda code: code[: len(code) // 2], lambda code: code[:-1],
    lambda code: np.random.default_rng(0).bytes(len(code)), one_bit], ids=range(5))
def test_damaged_compiled_code_is_compiled_anew(damage, kept, capsys):
    assert not loaded() and loaded()
    for path in [path for path in kept.rglob("*") if path.is_file()]:
        path.write_bytes(damage(path.read_bytes()))
    assert not loaded() and loaded()
    assert not list(kept.rglob("*.part")) and capsys.readouterr().err == ""


def test_code_is_kept_by_signature_and_not_for_what_has_no_name(kept):
    assert not loaded() and not loaded(x=0.25, expected=float(FAR))
    assert loaded() and loaded(x=0.25, expected=float(FAR))
    assert not loaded(lambda x: x + 1, 3, 4) and not loaded(lambda x: x + 2, 3, 5)


@pytest.mark.parametrize("place", ["a file", "a full disk", "no home"])
def test_without_a_place_compiled_code_is_not_kept(place, kept, monkeypatch, capsys):
    """Told once, not for each function."""
    if place == "a file":
        kept.write_text("")
    elif place == "a full disk":
        def full(number):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert not loaded() and not loaded() and not loaded(x=0.25, expected=float(FAR))
    err = capsys.readouterr().err
    assert err.startswith("fast: compiled code is not kept: ") and err.count("\n") == 1


def test_threads_follow_torch():
    before = torch.get_num_threads()
    q = np.ones((1, 1, 16), np.float32)
    k = np.ones((1, 4, 16), np.float32)
    try:
        for threads in (1, before):
            torch.set_num_threads(threads)
            loops.run(loops.attend, q, k, k, np.empty((1, 0), np.int32), 4, q.copy())
            assert numba.get_num_threads() == threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
