"""Contracts of the Triton kernels: right in the interpreter, and what they compile to for a GPU."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close

import kernel
from cpu import loops
from model import dense_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there: the interpreter, see conftest.py


def example(B, H, G, S, D, K, dtype=torch.float32, holes=True):
    """Keys and values as in the cache, NaN behind the last token and in every row that is not
    chosen; with holes some slots are empty, and in a batch a head has none at all."""
    rng = torch.Generator().manual_seed(B + H + S + D + K)
    q = torch.randn(B, H, D, generator=rng).to(dtype)
    kv = torch.randn(2, B, G, S + 5, D, generator=rng).to(dtype)
    idx = torch.rand(B, G, S, generator=rng).topk(K).indices.int()
    if holes:
        idx[:, :, K // 2 : K // 2 + 3] = -1
        idx[1:, 0] = -1
    kv = kv.masked_fill(~kernel.mark(idx, S + 5)[..., None], torch.nan)
    return q, *kv[:, :, :, :S], idx


def triton_decode(q, k, v, idx, chunk=None):
    q, k, v, idx = (x.to(DEVICE) for x in (q, k, v, idx))
    return kernel.triton_decode(q, k, v, idx, chunk=chunk).cpu()


SHAPES = [(1, 9, 3, 781, 64, 78), (2, 4, 1, 31, 64, 7), (1, 7, 1, 1, 16, 1),
          (2, 8, 2, 200, 128, 200), (1, 3, 1, 97, 80, 64), (1, 18, 2, 300, 96, 250)]


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape, holes):
    q, k, v, idx = example(*shape, holes=holes)
    clean = [torch.nan_to_num(x) for x in (k, v)]
    expected = kernel.reference(q[:, :, None], *clean, idx[:, :, None])[:, :, 0]
    expected = torch.nan_to_num(expected)  # a head without any token: zeros
    for chunk in (64, 128, None):
        actual = triton_decode(q, k, v, idx, chunk)
        assert_close(f"Triton, chunks of {chunk}", actual, expected, 1e-5)
    assert_close("gather + SDPA", kernel.sparse_decode(q, k, v, idx), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_token_at_all_gives_zeros(dtype):
    q, k, v, _ = example(2, 4, 2, 31, 64, 7, dtype)
    for idx in torch.empty(2, 2, 0), torch.full((2, 2, 3), -1):
        assert (kernel.sparse_decode(q, k, v, idx.int()) == 0).all()


@pytest.mark.parametrize("B,H,G,S,D", [(1, 9, 3, 781, 64), (3, 4, 1, 200, 64), (2, 3, 1, 31, 80)])
def test_dense_attention_ends_where_the_device_says(B, H, G, S, D):
    q, k, v, idx = example(B, H, G, S, D, S, holes=False)
    positions = torch.tensor([S - 1, 64, 0][:B]).clamp(max=S - 1)
    behind = torch.arange(S) > positions[:, None]
    expected = kernel.reference(q[:, :, None], k, v, torch.arange(S).masked_fill(
        behind, -1).expand(G, 1, B, S).permute(2, 0, 1, 3))[:, :, 0]
    k, v = (x.masked_fill(behind[:, None, :, None], torch.nan) for x in (k, v))
    q, k, v, positions = (x.to(DEVICE) for x in (q, k, v, positions))
    for chunk in (64, 128, None):
        actual = kernel.triton_decode(q, k, v, None, positions, chunk).cpu()
        assert_close(f"dense, chunks of {chunk}", actual, expected, 1e-5)


def test_triton_takes_any_strides():
    q, k, v, idx = example(2, 4, 2, 60, 64, 20)
    expected = triton_decode(q, k, v, idx)
    def turned(x):
        return x.transpose(1, -1).contiguous().transpose(1, -1)

    actual = triton_decode(turned(q), turned(k), turned(v), turned(idx))
    assert_close("other strides", actual, expected, 1e-6)


def test_triton_in_bfloat16():
    q, k, v, idx = example(1, 9, 3, 300, 64, 60, torch.bfloat16)
    expected = kernel.sparse_decode(q.float(), *(torch.nan_to_num(x.float()) for x in (k, v)), idx)
    actual = triton_decode(q, k, v, idx)
    assert actual.dtype == torch.bfloat16
    assert_close("bfloat16", actual.float(), expected, 2e-2)


def test_scores_in_the_hundreds():
    q, k, v, idx = example(1, 4, 2, 200, 64, 90)
    expected = kernel.sparse_decode(100 * q, k, v, idx)
    assert_close("100 q", triton_decode(100 * q, k, v, idx), expected, 1e-4)


@pytest.mark.parametrize("B,H,G,T,S,D", [(1, 9, 3, 300, 300, 64), (2, 4, 2, 40, 700, 16),
                                         (1, 4, 4, 129, 640, 128)])
def test_a_block_of_bfloat16_products_is_dense_attention(B, H, G, T, S, D):
    """Within what bfloat16 holds; a query whose score beats all others by far gets that value; what
    comes after a query does not reach it."""
    rng = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(B, n, s, D, generator=rng) for n, s in ((H, T), (G, S), (G, S)))
    k[:, :, S - T] = 40 * q[:, :: H // G, 0] / q[:, :: H // G, 0].norm(dim=-1, keepdim=True)
    positions = torch.arange(S - T, S).expand(B, T)
    expected = dense_attention(q, k, v, positions, False)
    found = loops.attend_block(q, k, v)
    assert found.dtype == torch.float32
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.mean() < 0.02 and error.max() < 0.1
    assert_close("one", found[:, :: H // G, 0], v[:, :, S - T], 2e-2)
    k[:, :, -1] = v[:, :, -1] = 9.0  # which only the last query sees
    assert torch.equal(loops.attend_block(q, k, v)[:, :, :-1], found[:, :, :-1])


@pytest.mark.parametrize("S", [5, 40, 700, 4000])
def test_the_top_k(S):
    """Ties, numbers near 0, both zeros, what may not be chosen; rows that want nothing."""
    rng = torch.Generator().manual_seed(S)
    scores = torch.randn(2, 3, 7, S, generator=rng)
    scores[0, 0] = scores[0, 0].round(decimals=1)
    scores[1, 1] = scores[1, 1].exp() * 1e-40
    scores[1, 2, :2] = torch.tensor([0.0, -0.0])[:, None]
    scores[torch.rand(scores.shape, generator=rng) < 0.2] = -torch.inf
    stops, wants = (torch.randint(0, S + 1, (2, 1, 7), generator=rng) for _ in range(2))
    found = kernel.top(scores, 3, stops, wants)
    assert found.shape == (2, 3, 7, int(wants.max()))
    for b, g, t in itertools.product(range(2), range(3), range(7)):
        row, stop, kept = scores[b, g, t], int(stops[b, 0, t]), found[b, g, t]
        kept = kept[kept >= 0]
        assert len(kept.unique()) == len(kept) and all(3 <= s < stop for s in kept)
        best = sorted((s for s in row[3:stop].tolist() if s > -math.inf), reverse=True)
        assert row[kept].sort(descending=True).values.tolist() == best[: int(wants[b, 0, t])]
    ties = kernel.in_order(torch.zeros(1, 50))  # of these the earliest
    ties = kernel.top(ties, 4, torch.tensor([45]), torch.tensor([7]))
    assert ties.tolist() == [[4, 5, 6, 7, 8, 9, 10]]


CHOICES = [(2, 1, 3, 32, 896, [780], [58]), (1, 2, 2, 8, 512, [500, 33], [40, 7]),
           (3, 2, 1, 16, 256, [255, 90], [180, 70]), (1, 1, 1, 32, 128, [31], [11]),
           (1, 1, 1, 16, 128, [21], [1]), (1, 1, 1, 16, 128, [0], [0])]


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_every_form_chooses_what_the_definition_does(case):
    """Scores, codes, histogram and selection, NaN where no key is; ties by the order of the text,
    which a query of zeros (the third case's first layer) leaves as the only order."""
    R, B, G, E, S, positions, wants = case
    rng = torch.Generator().manual_seed(S)
    q = torch.randn(R, B, G, E, generator=rng) / 40
    q[0] *= R < 3
    q[-1, 0, 0] *= 1e5 ** (S == 512)  # scores that fp16 does not hold
    k = torch.randint(-127, 128, (R, B, G, S // 64, E, 64), generator=rng).to(torch.int8)
    scales = torch.rand(R, B, G, S, generator=rng)
    for b, position in enumerate(positions):
        scales[:, b, :, position:] = torch.nan
    some = torch.rand(R, B, G, generator=rng) < 0.5
    where, wanted = torch.tensor(positions), torch.tensor(wants)
    for due in (some, torch.ones_like(some)):
        found = [torch.full((R, B, G, max(wants)), -7) for _ in range(3)]
        kernel.choose(q, k, scales, where, wanted, found[0], due, max(positions), 4, 16)
        arrays = (x.numpy() for x in (q, k, scales, where, wanted, found[1], due))
        loops.run(loops.chosen_rows, *arrays, 4, 16)
        on_device = [x.to(DEVICE) for x in (q, k, scales, where, wanted, found[2], due)]
        kernel.triton_select(*on_device, max(positions), 4, 16, block=128)
        found[2] = on_device[5].cpu()
        for idx in found:
            assert torch.equal(idx.sort(-1).values, found[0].sort(-1).values)
            assert (idx[~due] == -7).all()
    for b, (position, want) in enumerate(zip(positions, wants, strict=True)):
        keys = k[:, b].transpose(2, 3).flatten(3)[..., :position].float()
        keys *= scales[:, b, :, None, :position]
        raw = (q[:, b, :, None] * E**-0.5 @ keys)[:, :, 0]
        best = kernel.in_order(raw)[..., 4 : max(position - 15, 4)].topk(want).indices + 4
        for idx in found[1:]:
            assert torch.equal(idx[:, b, :, :want], best.sort(-1).values)  # in the text's order
            assert (idx[:, b, :, want:] == -1).all()


@pytest.mark.parametrize("D,dtype", [(64, torch.float32), (20, torch.float32),
                                     (128, torch.bfloat16)], ids=str)
def test_rows_held_are_not_fetched_again(D, dtype):
    """Rows that the call before had are NaN in the table by the next one, so each row tells where
    it came from; the number of tokens changes, some slots are empty, `places` begins as rubbish."""
    B, G, S, rng = 2, 3, 90, torch.Generator().manual_seed(D)
    rows = torch.randn(B, G, S, 2, D, generator=rng).to(dtype)
    places = torch.randint(-9, 99, (B, G, S), generator=rng, dtype=torch.int32).to(DEVICE)
    missed, held, expected = torch.zeros((), dtype=torch.long, device=DEVICE), None, 0
    before = torch.zeros(B, G, S, dtype=torch.bool)
    for K in (40, 40, 70, 1, 0, 33, 35):
        tokens = torch.rand(B, G, S, generator=rng).topk(K).indices.int()
        tokens[torch.rand(B, G, K, generator=rng) < 0.1] = -1
        table = rows.masked_fill(before[..., None, None], torch.nan).to(DEVICE)
        tokens = tokens.to(DEVICE)
        held = tokens, fetch_rows(table, tokens, held, places, missed)
        now, at = kernel.mark(tokens.cpu(), S), tokens.cpu().clamp(min=0).long()
        wanted = rows.flatten(3).gather(2, at[..., None].expand(-1, -1, -1, 2 * D))
        real = tokens.cpu() >= 0
        assert torch.equal(held[1].cpu().flatten(3)[real], wanted[real])
        before, expected = now, expected + int((now & ~before).sum())
        assert int(missed) == expected
    plain = kernel.fetch_rows(rows, tokens.cpu(), None, None, None)  # without a GPU
    assert torch.equal(plain.flatten(3)[real], wanted[real])


def fetch_rows(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "on_gpu", lambda x: True)
        return kernel.fetch_rows(*args)


def test_order_is_that_of_the_scores_and_then_of_the_text():
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 10
    ordered = kernel.in_order(scores)
    assert ordered.unique().numel() == scores.numel() and ordered.isfinite().all()
    best = scores[ordered.argsort(descending=True)]
    behind = best.flip(0).cummax(0).values.flip(0)  # the best that still follows
    assert ((behind - best) <= 2**-9 * best.abs() + 1e-6).all()
    same = kernel.in_order(torch.full((500,), -0.3))
    assert torch.equal(same.argsort(descending=True), torch.arange(500))
    rising = torch.tensor([-1e6, -60000, -1, -1e-6, 0, 1e-6, 1, 60000, 1e6])
    assert torch.equal(kernel.in_order(rising.flip(0)).argsort(), torch.arange(8, -1, -1))
    ends = kernel.in_order(torch.tensor([torch.inf, 1e6, -1e6, -torch.inf]))
    assert ends.argsort(descending=True).tolist() == [0, 1, 2, 3] and ends.isfinite().all()
    assert kernel.in_order(torch.tensor([65504, 1e6])).argsort().tolist() == [1, 0]  # they tie
    assert torch.equal(kernel.in_order(torch.tensor([-0.0])), kernel.in_order(torch.zeros(1)))
    assert kernel.in_order(torch.zeros(3)).tolist() == sorted(kernel.in_order(torch.zeros(3)))[::-1]


@pytest.fixture(scope="module")
def for_hopper():
    """{kernel: what it compiles to for sm_90}, and what was said on the way."""
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    return {seen["name"]: seen for seen in map(json.loads, run.stdout.splitlines())}, run.stderr


@pytest.mark.parametrize("name,wide", [("attend 64", 16), ("attend 128", 16), ("dense 64", 16),
                                       ("dense 128", 16), ("merge", 0), ("score", 32),
                                       ("select", 4), ("renew 128", 16)])
def test_compiles_for_hopper_without_spills_and_with_wide_loads(for_hopper, name, wide):
    """Offline, for sm_90: no GPU is needed to see what the compiler makes of it. Rows of K and V
    come 16 bytes at a time, the 32 channels of importance keys 8: as many tokens to a thread."""
    assert name in for_hopper[0], for_hopper[1]
    seen = for_hopper[0][name]
    assert (seen["copies"] + seen["loads"]).count(8 if name == "score" else 16) >= wide, seen
    assert "STACK:0 " in seen["usage"] and "LOCAL:0 " in seen["usage"], seen
