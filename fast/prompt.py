"""fast/prompt.py - reading a prompt.

    tokens [B, T] -> embedding -> L x (attention, MLP) -> norm -> logits of the last tokens

`read` computes what model.Llama.forward computes. Attention takes most of the time there when a
chunk follows cached tokens: a mask [T, S] is made and added, although it hides only the upper half
of its last T columns. Here the tokens before the chunk need no mask, each query attends to the
chunk's tokens up to itself, and both parts are combined by log-sum-exp. All query heads of a group
are queries of their KV head, whose keys are read once. The blocks of a prompt that is read through
a selector do the same with the rows that they selected.

The cache is in float32, which the loops of a step need. Processors that multiply tiles of bfloat16
numbers (x86: AMX) attend to many tokens twice as fast in bfloat16. Others are slower in it.

    python -m fast.prompt        milliseconds of attention of one chunk, plain and here
"""

import torch

import kernel
from model import rope_cos_sin

# One call -> attention and the logarithm of the softmax's denominator, [B, H, T]. PyTorch's public
# function returns the first of them only.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def rope(x, cos, sin):
    """model.apply_rope with fewer passes: x [..., T, D] -> float32"""
    x = x.float()
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return (x * cos).addcmul_(swapped, sin)


def merged(parts, shape):
    """Combines two parts (attention, log-sum-exp) by log-sum-exp -> attention of this shape."""
    (one, top_one), (two, top_two) = ((out.view(shape).float(), top.reshape(shape[:-1]))
                                      for out, top in parts)
    share = (top_two - top_one).sigmoid_()  # of the second part
    return torch.lerp(one, two, share[..., None])


def causal(q, k, v):
    """Each query attends to its own T tokens up to itself: q [B, H, T, D], k, v [B, G, T, D]"""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return flash(q, k, v, is_causal=True)


def dense_attention(q, k, v):
    """Causal attention: q [B, H, T, D] of the last T of S tokens, k, v [B, G, S, D]"""
    T, S = q.shape[2], k.shape[2]
    own = causal(q, k[:, :, S - T :], v[:, :, S - T :])
    if S == T:
        return own[0]
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, G, H/G * T, D]
    return merged([own, flash(grouped, k[:, :, : S - T], v[:, :, : S - T])], q.shape)


def block_attention(q, k, v, idx):
    """kernel.block_attention: q [B, H, T, D] of the last T of S tokens, k, v [B, G, S, D],
    idx [B, G, T', K], in which all KV heads name as many tokens, and each block all of its own."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    blocks = idx.shape[2]
    size = T // blocks
    start = torch.arange(S - T, S, size)[:, None]
    own = idx >= start
    earlier = (idx >= 0) & ~own
    counts = earlier.sum(-1)  # [B, G, T']
    if (own.sum(-1) != size).any() or (counts != counts[:1, :1]).any():
        return kernel.block_attention(q, k, v, idx)
    rows = idx.flatten(0, 1) + torch.arange(0, B * G * S, S, dtype=torch.int32)[:, None, None]
    earlier = earlier.flatten(0, 1)  # [B*G, T', K], as rows
    q = q.reshape(B * G, H // G, blocks, size, D)

    # The block's own tokens: blocks and KV heads are the batch.
    k_own, v_own = (x[:, :, S - T :].reshape(B * G * blocks, 1, size, D).expand(-1, H // G, -1, -1)
                    for x in (k, v))
    own = flash(q.transpose(1, 2).flatten(0, 1), k_own, v_own, is_causal=True)

    # The tokens before it, as many as this block has selected.
    before = []
    k, v = k.flatten(0, 2), v.flatten(0, 2)  # [B*G*S, D]
    for block in range(blocks):
        named = rows[:, block][earlier[:, block]]
        copies = (x.index_select(0, named).view(1, B * G, -1, D) for x in (k, v))
        before.append(flash(q[:, :, block].reshape(1, B * G, -1, D), *copies))
    before = [torch.stack(part, dim=2) for part in zip(*before, strict=True)]  # [1, B*G, T', ...]
    out = merged([own, before], (B * G, blocks, H // G, size, D))
    return out.transpose(1, 2).reshape(B, H, T, D)


def attention(q, k, v, index, dtype=torch.float32):
    """model.attention: q [B, H, T, D] float32, k, v [B, G, S, D]. dtype: of dense attention"""
    if index is None:
        return dense_attention(*(x.to(dtype) for x in (q, k, v)))
    if index.shape[2] < q.shape[2]:
        return block_attention(q, k, v, index)
    return kernel.sparse_attention(q, k, v, index)  # a choice for each query


def read(llama, tokens, cache, selector, last: int):
    """model.Llama.forward with a cache in float32."""
    tiles = llama.embed_tokens.weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if tiles else torch.float32
    T = tokens.shape[1]
    positions = torch.arange(cache.size, cache.size + T)
    cos_sin = rope_cos_sin(positions, llama.frequencies)
    x = llama.embed_tokens(tokens)
    for layer, block in enumerate(llama.layers):
        a = block.self_attn
        normed = block.input_layernorm(x)
        q, k, v = (linear(normed).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                   for linear in (a.q_proj, a.k_proj, a.v_proj))
        q = rope(q, *cos_sin)
        keys, values = cache.append(layer, rope(k, *cos_sin), v)
        index = selector(layer, x, q, keys, positions) if selector else None
        out = attention(q, keys, values, index, dtype)
        x = x + a.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        x = x + block.mlp(block.post_attention_layernorm(x))
    cache.advance(T)
    return llama.lm_head(llama.norm(x[:, -last:]))


if __name__ == "__main__":
    from functools import partial
    from statistics import median
    from timeit import repeat

    import model

    q = torch.randn(1, 9, 1024, 64)
    k, v = torch.randn(2, 1, 3, 4096, 64)
    print("the last 1,024 of 4,096 tokens attend to all before them:")
    for name, attend in {"plain": model.attention, "here": attention,
                         "in bfloat16": partial(attention, dtype=torch.bfloat16)}.items():
        times = repeat(partial(attend, q, k, v, None), number=1, repeat=9)
        print(f"{name}: {1e3 * median(times):.0f} ms")
