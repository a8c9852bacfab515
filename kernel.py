"""kernel.py - sparse attention: the definition, gathering, the Triton kernel.

    q [B, H, D], keys and values [B, G, S, D], idx [B, G, K] -> out [B, H, D]

    out = softmax(q . k[idx] / sqrt(D)) . v[idx]

Query head h reads KV head h // (H / G). idx is the index that a selector returns (see model.py): it
names the K tokens that a KV head attends to, each once, with -1 in an empty slot. Three functions
compute this. For one query per head, one layer and e bytes per number they move:

    masked_attention    mask what was not selected            B*G*S*2D*e: all of K and V
    sparse_decode       copy the selected rows, then attend   B*G*K*2D*e read, written, read again
    triton_attention    read the selected rows once           B*G*K*2D*e

With K a tenth of S the last two read far less, but their rows are scattered in memory. For a CPU,
fast/ has a compiled loop that also reads the rows only once.

The queries of a prompt can share a choice. Then idx [B, G, T', K] has a row for each block of
T / T' queries, and `block_attention` copies the rows of K and V once for a whole block.

    python kernel.py                        compares sparse_decode with the definition
    TRITON_INTERPRET=1 python kernel.py     the Triton kernel too, interpreted on the CPU
"""

import os
import sys

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton: sparse_decode gathers
    from types import SimpleNamespace
    triton, tl = None, SimpleNamespace(constexpr=None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
jit = triton.jit if triton else lambda function: function


def true_attention(q, keys, places=None):
    """The attention that a selection approximates.

    q [B, H, T, D], keys [B, G, S, D] -> causal softmax [B, G, H/G, T, S] in float32. places [T]:
    the place of each query's own token among the keys; by default the last T places.
    """
    T, S = q.shape[2], keys.shape[2]
    token = torch.arange(S, device=q.device)
    own = token[S - T :] if places is None else places
    q = q.float().unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
    scores = q @ keys.float()[:, :, None].mT
    return scores.masked_fill_(token > own[:, None], -torch.inf).softmax(dim=-1)


def index_to_mask(idx, S: int):
    """idx [..., K] -> booleans [..., S], true where a token is named."""
    mask = torch.zeros(*idx.shape[:-1], S + 1, dtype=torch.bool, device=idx.device)
    column = torch.where(idx < 0, S, idx).long()  # empty slots go to a spare last column
    return mask.scatter(-1, column, True)[..., :S]


def masked_attention(q, k, v, idx):
    """The definition: attention to all tokens, where a mask hides those that idx does not name.

    q [B, H, T, D] of the last T of S tokens, k, v [B, G, S, D], idx [B, G, T', K] -> [B, H, T, D].
    Row t' of idx is for a block of T / T' queries. It may name tokens of the block itself, and each
    query attends to those that do not come after its own.
    """
    T, S = q.shape[2], k.shape[2]
    mask = index_to_mask(idx, S).repeat_interleave(T // idx.shape[2], dim=2)  # [B, G, T, S]
    mask &= torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    mask = mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, T, S]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def sparse_decode(q, k, v, idx):
    """The attention of one decode step: copies the K selected rows of keys and values out of the
    cache, then attends to these copies. On a GPU it calls the Triton kernel below instead.

    q [B, H, D], k, v [B, G, S, D], idx [B, G, K] int32 (-1 = empty) -> [B, H, D]. A query whose
    slots are all empty gets 0. Indices must be below S and unique: a repeated one would count twice
    in the softmax.
    """
    if triton and q.device.type == "cuda":
        return triton_attention(q, k, v, idx)
    B, H, D = q.shape
    rows = idx.clamp(min=0).long()[..., None].expand(-1, -1, -1, D)
    k, v = k.gather(2, rows), v.gather(2, rows)  # [B, G, K, D]
    empty = (idx < 0)[:, :, None]  # [B, G, 1, K]
    scores = q.view(B, k.shape[1], -1, D) @ k.mT * D**-0.5  # [B, G, H/G, K]
    # If all slots are empty, softmax gives NaN, and the second masked_fill turns it into 0.
    weights = scores.float().masked_fill(empty, -torch.inf).softmax(-1).masked_fill(empty, 0)
    # An empty slot copied row 0. Its weight is 0, but 0 * NaN would be NaN.
    v = v.masked_fill(empty.mT, 0)
    return (weights.to(v.dtype) @ v).view(B, H, D)


def block_attention(q, k, v, idx):
    """As masked_attention, for blocks of many queries: copies the rows that a block selected out of
    the cache, then attends to these copies: B*G*T'*K*2D*e bytes read, written, read again."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    blocks, K = idx.shape[2:]
    own = torch.arange(S - T, S, device=q.device).view(1, blocks, T // blocks, 1)
    idx = idx.flatten(0, 1).long()  # [B*G, T', K]
    later = torch.where(idx < 0, S, idx)[:, :, None] > own  # an empty slot is after every query
    bias = torch.zeros_like(later, dtype=q.dtype).masked_fill_(later, -torch.inf)
    rows = idx.clamp(min=0).flatten(1)  # [B*G, T'*K]
    k = torch.stack([keys[named] for keys, named in zip(k.flatten(0, 1), rows, strict=True)])
    v = torch.stack([values[named] for values, named in zip(v.flatten(0, 1), rows, strict=True)])
    # Blocks and KV heads become the batch dimension.
    k = k.view(-1, 1, K, D).expand(-1, H // G, -1, -1)
    v = v.view(-1, 1, K, D).expand(-1, H // G, -1, -1)
    q = q.unflatten(1, (G, -1)).unflatten(3, (blocks, -1)).transpose(2, 3).flatten(0, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[:, None])
    return out.view(B, G, blocks, H // G, -1, D).transpose(2, 3).reshape(B, H, T, D)


def sparse_attention(q, k, v, idx):
    """q [B, H, T, D], k, v [B, G, S, D], idx [B, G, T', K] -> [B, H, T, D].

    One query, or a block of queries with one choice, copies its rows. Many queries with a choice
    each name nearly every row between them, so all rows are read and masked.
    """
    if q.shape[2] == 1:
        return sparse_decode(q[:, :, 0], k, v, idx[:, :, 0])[:, :, None]
    if idx.shape[2] < q.shape[2]:
        return block_attention(q, k, v, idx)
    return masked_attention(q, k, v, idx)


# ---------------------------------------------------------------------------- Triton


@jit
def attend_chunk(q, k, v, idx, sums, top, total, K, scale, G, k_b, k_g, k_s, v_b, v_g, v_s,
                 N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 CHUNK: tl.constexpr, BLOCK: tl.constexpr, FLOAT32: tl.constexpr):
    """Online softmax over one chunk of one KV head's selected tokens.

    One program computes all N query heads of the group (padded to NP), so each row of K and V is
    loaded once. With s the scores of the chunk it writes sum(exp(s - top) * v) to `sums`, the
    largest score to `top` and sum(exp(s - top)) to `total`. merge_chunks combines the chunks.
    """
    row = tl.program_id(0)  # b * G + g
    chunk = tl.program_id(1)
    b = (row // G).to(tl.int64)  # 64 bits: a cache may have more than 2**31 numbers
    g = (row % G).to(tl.int64)
    n = tl.arange(0, NP)
    d = tl.arange(0, DP)
    inside = (n < N)[:, None] & (d < D)
    query = tl.load(q + (row * N + n)[:, None] * D + d, mask=inside, other=0.0)
    if FLOAT32:  # the interpreter's bfloat16 arithmetic is wrong
        query = query.to(tl.float32)
    highest = tl.full([NP], float("-inf"), tl.float32)
    denominator = tl.zeros([NP], tl.float32)
    weighted = tl.zeros([NP, DP], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        slot = chunk * CHUNK + start + tl.arange(0, BLOCK)
        token = tl.load(idx + row * K + slot, mask=slot < K, other=-1)
        used = token >= 0
        at = tl.where(used, token, 0).to(tl.int64)[:, None]
        mask = used[:, None] & (d < D)
        keys = tl.load(k + b * k_b + g * k_g + at * k_s + d, mask=mask, other=0.0)
        values = tl.load(v + b * v_b + g * v_g + at * v_s + d, mask=mask, other=0.0)
        if FLOAT32:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        s = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(used, s, float("-inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        # As long as all slots were empty, the largest score is -inf, and -inf - -inf is NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - base[:, None])
        rescale = tl.exp(highest - base)
        denominator = denominator * rescale + tl.sum(p, 1)
        weighted = weighted * rescale[:, None]
        weighted += tl.dot(p.to(values.dtype), values, input_precision="ieee")
        highest = new
    part = (row * N + n) * tl.num_programs(1) + chunk
    tl.store(sums + part[:, None] * D + d, weighted, mask=inside)
    tl.store(top + part, highest, mask=n < N)
    tl.store(total + part, denominator, mask=n < N)


@jit
def merge_chunks(sums, top, total, out, chunks, D: tl.constexpr, DP: tl.constexpr,
                 CP: tl.constexpr):
    """Combines the chunks of one query head by log-sum-exp. A head without any token gets 0."""
    head = tl.program_id(0)
    c = tl.arange(0, CP)
    d = tl.arange(0, DP)
    part = head * chunks + c
    tops = tl.load(top + part, mask=c < chunks, other=float("-inf"))
    totals = tl.load(total + part, mask=c < chunks, other=0.0)
    highest = tl.max(tops, 0)
    weight = tl.exp(tops - tl.where(highest == float("-inf"), 0.0, highest))
    inside = (c < chunks)[:, None] & (d < D)
    values = tl.load(sums + part[:, None] * D + d, mask=inside, other=0.0)
    weighted = tl.sum(values * weight[:, None], 0)
    denominator = tl.sum(totals * weight, 0)
    weighted = weighted / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + head * D + d, weighted.to(out.dtype.element_ty), mask=d < D)


def triton_attention(q, k, v, idx, chunk=None):
    """sparse_decode on a GPU, in two kernels. Arguments and result as there.

    The selected tokens are split into chunks (split-K), because a single text has too few KV heads
    to occupy a GPU. The CPU never waits for a result, so a CUDA graph can contain the call.
    """
    if triton is None:
        raise ImportError("this needs Triton: pip install triton")
    B, H, D = q.shape
    G, K = idx.shape[1:]
    N = H // G
    DP = max(16, triton.next_power_of_2(D))  # tl.dot multiplies at least 16 by 16
    q, idx = q.contiguous(), idx.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    block = 64
    programs = 256  # about as many as a large GPU runs at a time
    chunk = chunk or max(block, triton.next_power_of_2(triton.cdiv(K * B * G, programs)))
    chunks = max(1, triton.cdiv(K, chunk))
    sums = torch.empty(B * H, chunks, D, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, B * H, chunks, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    attend_chunk[B * G, chunks](
        q, k, v, idx, sums, top, total, K, D**-0.5, G, *k.stride()[:3], *v.stride()[:3],
        N=N, NP=max(16, triton.next_power_of_2(N)), D=D, DP=DP, CHUNK=chunk, BLOCK=block,
        FLOAT32=INTERPRETED or q.dtype == torch.float32)
    merge_chunks[(B * H,)](sums, top, total, out, chunks, D=D, DP=DP,
                           CP=triton.next_power_of_2(chunks))
    return out


if __name__ == "__main__":
    if INTERPRETED and triton is None:
        print("kernel.py: error: TRITON_INTERPRET=1 needs: pip install triton", file=sys.stderr)
        sys.exit(2)
    B, H, G, S, D, K = 1, 9, 3, 2048, 64, 205
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, D, generator=rng)
    k = torch.randn(B, G, S, D, generator=rng)
    v = torch.randn(B, G, S, D, generator=rng)
    idx = torch.rand(B, G, S, generator=rng).topk(K).indices.int()
    expected = masked_attention(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
    for form in (sparse_decode, triton_attention) if INTERPRETED else (sparse_decode,):
        error = (form(q, k, v, idx) - expected).abs().max()
        print(f"{form.__name__}: largest difference from the definition {error:.1e}")
    print(f"q {list(q.shape)}, k and v {list(k.shape)}, idx {list(idx.shape)}")
    print(f"rows of K and V read: {G * K:,} instead of {G * S:,}")
