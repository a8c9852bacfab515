"""fast/prompt.py, which reads prompts in bfloat16, against the course."""

import pytest
import torch
from conftest import assert_close

import fast
import kernel
import model
import selection
from fast import prompt
from selection import QUERY_BLOCK, Budget, SparsePrefill, prefill

pytestmark = pytest.mark.filterwarnings("error")


def random_inputs(T: int, S: int, B=2, H=6, G=2, D=16):
    rng = torch.Generator().manual_seed(T + S)
    q = torch.randn(B, H, T, D, generator=rng)
    k, v = torch.randn(2, B, G, S, D, generator=rng)
    return (x.bfloat16() for x in (q, k, v))


@pytest.mark.parametrize("T, S", [(1, 1), (37, 37), (37, 38), (37, 101), (130, 700)])
def test_attention_without_a_mask(T, S):
    q, k, v = random_inputs(T, S)
    expected = model.attention(q.double(), k.double(), v.double(), None)
    assert_close("attention", prompt.dense_attention(q, k, v).double(), expected, 0.02)


def index_of_blocks(blocks: int, S: int, budget: float, B=2, G=2):
    """Sinks, the block and the 64 tokens before it, and random tokens, as SparsePrefill has them"""
    rule = Budget(budget, window=2 * QUERY_BLOCK)
    last = torch.arange(S - blocks * QUERY_BLOCK, S)[QUERY_BLOCK - 1 :: QUERY_BLOCK]
    scores = torch.rand(B, G, blocks, S, generator=torch.Generator().manual_seed(S))
    always = rule.sinks_and_window(last).expand(B, G, -1, -1)
    return torch.cat([always, rule.topk(scores, last)], dim=-1).int()


@pytest.mark.parametrize("budget", [0.5, 0.7, 1.0, 150])
@pytest.mark.parametrize("blocks, S", [(1, 300), (3, 417)])
def test_blocks_attend_to_what_they_selected(blocks, S, budget):
    q, k, v = random_inputs(blocks * QUERY_BLOCK, S)
    idx = index_of_blocks(blocks, S, budget)
    expected = kernel.masked_attention(q.double(), k.double(), v.double(), idx)
    assert_close("blocks", prompt.block_attention(q, k, v, idx).double(), expected, 0.02)


def test_heads_with_different_numbers_of_tokens_go_the_plain_way():
    q, k, v = random_inputs(QUERY_BLOCK, 300)
    idx = index_of_blocks(1, 300, 200)
    idx[0, 0, 0, -5:] = -1
    found = prompt.block_attention(q, k, v, idx)
    assert torch.equal(found, kernel.block_attention(q, k, v, idx))


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0, 140])
def test_blocks_choose_the_same_tokens_as_in_the_course(tiny, tiny_butler, budget, monkeypatch):
    monkeypatch.setattr(selection, "DENSE_LAYERS", 1)
    ids = torch.randint(256, (2, 320), generator=torch.Generator().manual_seed(1))
    quick = fast.Butler(tiny_butler.config).eval()
    quick.load_state_dict(tiny_butler.state_dict())
    reader = SparsePrefill(quick.selector(0.5), budget)
    slow = SparsePrefill(quick.selector(0.5), budget)
    slow.selector.choose_for_blocks = (  # the course's rule on the same 8-bit keys
        lambda *seen: selection.Selector.choose_for_blocks(slow.selector, *seen))
    seen = []

    def both(*arguments):
        index, expected = reader(*arguments), slow(*arguments)
        if index is not None:
            seen.append((index.sort(-1).values, expected.sort(-1).values))
        return expected

    tiny.prefill(ids, tiny.new_cache(2, 320), both)
    assert len(seen) == tiny.config.layers - 1
    for index, expected in seen:
        assert torch.equal(index, expected)


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_prompt_is_read_as_closely_as_by_the_plain_model(tiny, tiny_butler, budget, monkeypatch):
    """In bfloat16, in several parts, two texts at a time: the error against float32 is no larger
    than that of the plain model in bfloat16."""
    monkeypatch.setattr(selection, "DENSE_START", 130)
    monkeypatch.setattr(selection, "DENSE_END", 10)
    monkeypatch.setattr(selection, "DENSE_LAYERS", 2)
    ids = torch.randint(256, (2, 450), generator=torch.Generator().manual_seed(0))

    def read(kind, dtype):
        llama = kind(tiny.config).eval().requires_grad_(False)
        llama.load_state_dict(tiny.state_dict())
        llama.to(dtype)
        llama.frequencies = tiny.frequencies  # in float32, as from_pretrained leaves them
        cache = fast.Llama.new_cache(llama, 2, 460)
        logits = prefill(llama, ids, cache, tiny_butler.selector(0.5), budget)
        assert cache.size == 450
        return logits.float(), cache.table[..., :450, :]

    exact = read(model.Llama, torch.float32)
    plain = read(model.Llama, torch.bfloat16)
    found = read(fast.Llama, torch.bfloat16)
    for own, rounded, right in zip(found, plain, exact, strict=True):
        error, usual = ((x - right).square().mean().sqrt() for x in (own, rounded))
        assert error <= 1.2 * usual and not torch.equal(own, rounded)
    assert_close("first layers' keys", found[1][0, :2], exact[1][0, :2], 0.15)


def test_only_bfloat16_prompts_are_read_here(tiny, monkeypatch):
    """Float32 models, gaps between positions and caches in files go the plain way."""
    calls = []
    monkeypatch.setattr(prompt, "read", lambda *arguments: calls.append(1) or torch.zeros(1))
    llama = fast.Llama(tiny.config).eval().requires_grad_(False)
    llama.load_state_dict(tiny.state_dict())
    llama.frequencies = tiny.frequencies
    ids = torch.randint(256, (1, 20))
    llama(ids, llama.new_cache(1, 20))
    assert not calls
    llama.bfloat16()
    llama(ids, llama.new_cache(1, 20), positions=torch.arange(0, 40, 2))
    assert not calls
    llama(ids, llama.new_cache(1, 20))
    assert calls
