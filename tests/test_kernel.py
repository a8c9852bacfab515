"""kernel.py: every form of sparse attention against an explicit loop in float64."""

import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close

import kernel
from cli import UserError
from kernel import (
    block_attention,
    index_to_mask,
    masked_attention,
    sparse_attention,
    sparse_decode,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there Triton's interpreter, see conftest


def softmax(scores):
    p = np.exp(scores - scores.max())
    return p / p.sum()


def loop(q, k, v, idx):
    """Attention to the named rows in float64, head by head, reading no other row."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, k, v = (x.double().numpy() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for b, h in np.ndindex(q.shape[:2]):
        rows = [i for i in idx[b, h // group].tolist() if i >= 0]
        if rows:
            scores = k[b, h // group, rows] @ q[b, h] / np.sqrt(q.shape[2])
            out[b, h] = torch.from_numpy(softmax(scores) @ v[b, h // group, rows])
    return out


def problem(B=2, G=2, group=3, S=31, D=16, K=8, empty=0.2, seed=0):
    """q [B, H, D], k, v [B, G, S, D], idx [B, G, K]: unique tokens in any order, some slots empty.
    Rows that idx does not name are NaN, so that whoever reads them is found out."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, G * group, D, generator=rng)
    k, v = torch.randn(2, B, G, S, D, generator=rng)
    idx = torch.rand(B, G, S, generator=rng).topk(K).indices.int()
    idx[torch.rand(B, G, K, generator=rng) < empty] = -1
    unnamed = ~index_to_mask(idx, S)[..., None]
    return q, k.masked_fill(unnamed, torch.nan), v.masked_fill(unnamed, torch.nan), idx


def triton_attention(q, k, v, idx, chunk=None):
    pytest.importorskip("triton")
    out = kernel.triton_attention(*(x.to(DEVICE) for x in (q, k, v, idx)), chunk)
    return out.cpu()


FORMS = {"gathered": sparse_decode, "Triton": triton_attention}
SHAPES = [{"S": S, "group": group, "K": K, "G": G, "D": D} for S, group, K, G, D in [
    (1, 3, 1, 1, 16), (31, 1, 7, 2, 64), (31, 4, 31, 2, 80), (97, 3, 65, 1, 80),
    (781, 3, 79, 3, 64), (200, 4, 200, 2, 128), (300, 1, 130, 1, 16)]]


@pytest.mark.parametrize("empty", [0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_equals_the_loop(shape, empty):
    q, k, v, idx = problem(**shape, empty=empty)
    expected = loop(q, k, v, idx)
    clean = (torch.nan_to_num(k), torch.nan_to_num(v))
    masked = masked_attention(q[:, :, None], *clean, idx[:, :, None])[:, :, 0]
    assert_close("masked_attention", masked, expected, 1e-5)
    assert_close("sparse_decode", sparse_decode(q, k, v, idx), expected, 1e-5)
    one = sparse_attention(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
    assert_close("sparse_attention", one, expected, 1e-5)
    for chunk in (64, 128, None):
        actual = triton_attention(q, k, v, idx, chunk)
        assert_close(f"Triton, chunks of {chunk}", actual, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_without_any_token_the_result_is_0(form):
    q, k, v, idx = problem(B=3, K=8)
    idx[1] = -1
    idx[2, 0] = -1
    actual = FORMS[form](q, k, v, idx)
    assert_close("some heads", actual, loop(q, k, v, idx), 1e-5)
    assert not actual[1].any() and not actual[2, :3].any()
    for none in idx[..., :0], torch.full_like(idx, -1):
        assert not FORMS[form](q, k, v, none).any()


@pytest.mark.parametrize("form", FORMS)
def test_large_scores(form):
    q, k, v, idx = problem(S=200, K=90)
    assert_close("scores in the hundreds", FORMS[form](100 * q, k, v, idx),
                 loop(100 * q, k, v, idx), 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    q, k, v, idx = problem(S=300, K=90, D=64)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    actual = FORMS[form](q, k, v, idx)
    assert actual.dtype == torch.bfloat16
    assert_close("bfloat16", actual, loop(q.float(), k.float(), v.float(), idx), 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    """k and v as parts of a larger cache, and with the last dimension not the fastest."""
    q, k, v, idx = problem(S=31)
    expected = loop(q, k, v, idx)
    cache = torch.full((2, 2, 2, 50, 16), torch.nan)
    cache[0, :, :, :31], cache[1, :, :, :31] = k, v
    actual = FORMS[form](q, cache[0][:, :, :31], cache[1][:, :, :31], idx)
    assert_close("part of a cache", actual, expected, 1e-5)
    q, k, v, idx = (x.transpose(1, -1).contiguous().transpose(1, -1) for x in (q, k, v, idx))
    assert not k.is_contiguous() and not idx.is_contiguous()
    assert_close("other strides", FORMS[form](q, k, v, idx), expected, 1e-5)


def test_several_queries():
    rng = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, 31, 16, generator=rng)
    q = torch.randn(2, 6, 5, 16, generator=rng)
    idx = torch.stack([problem(seed=t)[3] for t in range(5)], dim=2)
    idx = torch.where(idx > torch.arange(26, 31)[:, None], -1, idx)  # nothing after the query
    expected = torch.stack([loop(q[:, :, t], k, v, idx[:, :, t]) for t in range(5)], dim=2)
    assert_close("five queries", sparse_attention(q, k, v, idx), expected, 1e-5)
    assert_close("one query", sparse_attention(q[:, :, :1], k, v, idx[:, :, :1]),
                 expected[:, :, :1], 1e-5)


@pytest.mark.parametrize("T, blocks", [(12, 3), (12, 1), (30, 2)])
def test_blocks_of_queries_that_share_a_choice(T, blocks):
    """Each query attends to those tokens of its block's choice that do not come after it."""
    rng = torch.Generator().manual_seed(T)
    k, v = torch.randn(2, 2, 2, 40, 16, generator=rng)
    q = torch.randn(2, 6, T, 16, generator=rng)
    idx = torch.rand(2, 2, blocks, 40, generator=rng).topk(20).indices.int()
    idx[torch.rand(idx.shape, generator=rng) < 0.2] = -1
    idx[..., 0] = 0  # a sink, which every query can see
    idx[..., 1:][idx[..., 1:] == 0] = -1
    expected = []
    for t in range(T):
        own = idx[:, :, t // (T // blocks)]
        expected.append(loop(q[:, :, t], k, v, torch.where(own > 40 - T + t, -1, own)))
    expected = torch.stack(expected, dim=2)
    assert_close("definition", masked_attention(q, k, v, idx), expected, 1e-5)
    assert_close("copied rows", block_attention(q, k, v, idx), expected, 1e-5)
    assert torch.equal(sparse_attention(q, k, v, idx), block_attention(q, k, v, idx))


@pytest.mark.parametrize("places", [None, [0, 3, 17]])
def test_true_attention_equals_the_loop(places):
    """Without places the queries are the last tokens."""
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 3, 16, generator=rng), torch.randn(2, 2, 20, 16, generator=rng)
    expected = np.zeros((2, 2, 3, 3, 20))
    for b, g, n, t in np.ndindex(expected.shape[:-1]):
        own = [17, 18, 19][t] if places is None else places[t]
        scores = k[b, g, : own + 1].double().numpy() @ q[b, 3 * g + n, t].double().numpy() / 4
        expected[b, g, n, t, : own + 1] = softmax(scores)
    actual = kernel.true_attention(q, k, None if places is None else torch.tensor(places))
    assert_close("true_attention", actual, torch.from_numpy(expected), 1e-6)
    half = kernel.true_attention(q.bfloat16(), k.bfloat16(),
                                 None if places is None else torch.tensor(places))
    assert half.dtype == torch.float32
    assert_close("bfloat16", half, torch.from_numpy(expected), 2e-2)


def test_index_to_mask():
    idx = torch.tensor([[[0, 3, -1], [-1, -1, -1]], [[4, 2, 0], [1, -1, 3]]], dtype=torch.int32)
    mask = index_to_mask(idx, 5)
    assert mask.dtype == torch.bool and mask.shape == (2, 2, 5)
    assert mask.int().tolist() == [[[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
                                   [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]]


def test_without_triton():
    """On a CPU everything runs; what needs a kernel ends in one line."""
    code = ("import runpy, sys; sys.modules['triton'] = None; "
            "runpy.run_path('kernel.py', run_name='__main__')")

    def run(interpret):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, env=os.environ | {"TRITON_INTERPRET": interpret})

    done = run("0")
    assert done.returncode == 0 and "sparse_decode: largest difference" in done.stdout
    done = run("1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install triton" in done.stderr


def test_a_kernel_without_triton_says_what_is_missing(monkeypatch):
    from fast import gpu

    for module in kernel, gpu:
        monkeypatch.setattr(module, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        kernel.triton_attention(*problem())
    with pytest.raises(UserError, match="pip install triton"):
        gpu.load()


def test_the_trace(capsys):
    pytest.importorskip("triton")
    runpy.run_path(str(ROOT / "kernel.py"), run_name="__main__")
    out = capsys.readouterr().out
    for form in ("sparse_decode", *["triton_attention"] * kernel.INTERPRETED):
        error = re.search(rf"{form}: largest difference from the definition (\S+)", out)[1]
        assert 0 <= float(error) < 1e-5
