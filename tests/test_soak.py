"""What must hold for days: memory stays flat over many steps, at a context that is full again and
again."""

import pytest
import torch
from test_offload import TINY

from beyond.offload import cache_kind
from butler import Butler, ButlerConfig
from measure.speed_offload import taken
from model import Llama


@pytest.mark.parametrize("store, steps", [
    ("disk", 500), *(pytest.param(store, 20_000, marks=pytest.mark.slow)
                     for store in ("none", "disk"))])
def test_memory_is_flat(store, steps, tmp_path):
    """Whenever the cache is full, the latter half is forgotten and written anew."""
    torch.manual_seed(0)
    model = Llama(TINY).eval().requires_grad_(False)
    butler = Butler(ButlerConfig.for_model(model, stride=2)).eval().requires_grad_(False)
    cache = model.new_cache(1, 256, kind=cache_kind(store, tmp_path))
    selector = butler.selector(0.2, drift=0.9)
    selector.read_ahead = cache.read_ahead
    logits = model.prefill(torch.arange(60)[None], cache, selector.watch)
    for step in range(steps):
        if cache.size == cache.capacity:
            cache.truncate(128)
        logits = model.decode(logits.argmax(-1), cache, selector)
        if step == min(1000, steps // 2):
            before = taken(model.device)
    assert logits.isfinite().all()
    grown = taken(model.device) - before
    print(f"{store}: {grown:,} bytes more after {steps:,} steps, of {before:,}")
    assert grown <= 0.01 * before
