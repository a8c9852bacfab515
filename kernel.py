"""kernel.py - attention over a chosen few: q and indices in, outputs out.

    sparse_decode     one query a head    q [B, H, D],    idx [B, G, K]    -> [B, H, D]
    sparse_attention  T queries a head    q [B, H, T, D], idx [B, G, T, K] -> [B, H, T, D]

    o = softmax(q . k[idx] / sqrt(D)) . v[idx]     with k, v [B, G, S, D]; idx -1 is an empty slot

A ladder of three forms, with the bytes they move for one query of one layer, e bytes per number:

    reference        mask what was not chosen            B*G*S*2D*e, like dense attention
    gather + SDPA    fetch the rows, then be dense       B*G*K*2D*e read, written, read again
    Triton           fetch and attend in one kernel      B*G*K*2D*e read once, on CUDA

K is a tenth of S or less. The price: the rows lie scattered in memory.

    python kernel.py        compares the forms on random input (Triton's: TRITON_INTERPRET=1)
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # not a system that Triton runs on: gather + SDPA serves everywhere
    from types import SimpleNamespace
    triton, tl = None, SimpleNamespace(constexpr=None)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
jit = triton.jit if triton else lambda function: function


def reference(q, k, v, idx):
    """The definition, by masking: what every faster form must equal. Shapes as sparse_attention."""
    keep = mark(idx, k.shape[2]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, T, S]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def mark(idx, S: int):
    """Indices [..., K] -> booleans [..., S]; empty slots fall into a spare column."""
    marks = torch.zeros(*idx.shape[:-1], S + 1, dtype=torch.bool, device=idx.device)
    return marks.scatter(-1, torch.where(idx < 0, S, idx).long(), True)[..., :S]


def sparse_decode(q, k, v, idx):
    """Attention of one query per head to the K tokens that `idx` names, gathered row by row.

    q [B, H, D], k and v [B, G, S, D], idx [B, G, K] int32 with -1 for an empty slot -> [B, H, D].
    Head h reads KV head h // (H / G). A query without any token gets zeros. Indices must be unique
    (a repeated one would count twice in the softmax) and below S; rows not named never count.
    """
    if q.device.type == "cuda" and triton:
        return triton_decode(q, k, v, idx)
    B, H, D = q.shape
    G = k.shape[1]
    k, v = fetch(k, v, idx)  # [B, G, K, D]
    q = q.reshape(B, G, H // G, D)
    empty = idx < 0
    if not empty.any():
        return F.scaled_dot_product_attention(q, k, v).reshape(B, H, D)
    empty = empty[:, :, None]  # [B, G, 1, K]
    scores = q @ k.transpose(-1, -2) * D**-0.5  # [B, G, H/G, K]
    # all empty: softmax is 0 / 0, and 0 wanted; an empty slot fetched row 0: 0 * NaN is NaN
    weights = scores.float().masked_fill(empty, -torch.inf).softmax(dim=-1).masked_fill(empty, 0)
    v = v.masked_fill(empty.transpose(-1, -2), 0)
    return (weights.to(v.dtype) @ v).view(B, H, D)


def fetch(k, v, idx):
    """Rows of k and v [B, G, S, D] that idx [B, G, K] names (-1: any row) -> two [B, G, K, D].

    One index_select over the table of all rows, which is much faster than k[b, g, idx]. A
    slice of a longer buffer is such a table too, with gaps between its rows.
    """
    B, G, S, D = k.shape
    batch, head, row, one = k.stride()
    if v.stride() != k.stride() or one != 1 or head % row or batch != G * head:
        k, v = torch.stack([k, v])  # contiguous
        batch, head, row, one = k.stride()
    first = torch.arange(0, B * G * (head // row), head // row, device=k.device)  # row of a head
    at = (idx.clamp(min=0).view(B * G, -1) + first[:, None]).flatten()
    size = ((B * G - 1) * (head // row) + S, D)
    return [x.as_strided(size, (row, 1), x.storage_offset()).index_select(0, at).view(B, G, -1, D)
            for x in (k, v)]


def sparse_attention(q, k, v, idx):
    """q [B, H, T, D], k and v [B, G, S, D], idx [B, G, T, K] -> [B, H, T, D].

    One query is worth gathering for. A block of them, each with its own choice, is not: together
    they touch nearly every row, so a block is computed by masking.
    """
    if q.shape[2] > 1:
        return reference(q, k, v, idx)
    return sparse_decode(q[:, :, 0], k, v, idx[:, :, 0])[:, :, None]


# ---------------------------------------------------------------------------- Triton


@jit
def attend(q, k, v, idx, sums, tops, totals, K, scale, G, k_b, k_g, k_s, v_b, v_g, v_s,
           N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           CHUNK: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """One chunk of one KV head's tokens, for all N query heads of its group (padded to NP).

    A row of K and V is loaded once. What is left of a chunk: sum exp(s - top) v, top, sum exp.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    b, g = (row // G).to(tl.int64), (row % G).to(tl.int64)
    n, d = tl.arange(0, NP), tl.arange(0, DP)
    real = (n < N)[:, None] & (d < D)
    query = tl.load(q + (row * N + n)[:, None] * D + d, mask=real, other=0.0)
    if EXACT:  # float32 arithmetic; the interpreter has no other that is right
        query = query.to(tl.float32)
    top = tl.full([NP], float("-inf"), tl.float32)
    total = tl.zeros([NP], tl.float32)
    out = tl.zeros([NP, DP], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        slot = chunk * CHUNK + start + tl.arange(0, BLOCK)
        token = tl.load(idx + row * K + slot, mask=slot < K, other=-1)
        live = token >= 0
        at = tl.where(live, token, 0).to(tl.int64)[:, None]
        inside = live[:, None] & (d < D)
        keys = tl.load(k + b * k_b + g * k_g + at * k_s + d, mask=inside, other=0.0)
        values = tl.load(v + b * v_b + g * v_g + at * v_s + d, mask=inside, other=0.0)
        if EXACT:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        s = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(live, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: -inf minus -inf
        p = tl.exp(s - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        out = out * fade[:, None]
        out += tl.dot(p.to(values.dtype), values, input_precision="ieee")
        top = new
    part = (row * N + n) * tl.num_programs(1) + chunk
    tl.store(sums + part[:, None] * D + d, out, mask=real)
    tl.store(tops + part, top, mask=n < N)
    tl.store(totals + part, total, mask=n < N)


@jit
def merge(sums, tops, totals, out, chunks, D: tl.constexpr, DP: tl.constexpr,
          CP: tl.constexpr):
    """The chunks of one query head, weighted by exp(top), become its output; no token at all: 0."""
    head = tl.program_id(0)
    c, d = tl.arange(0, CP), tl.arange(0, DP)
    part = head * chunks + c
    top = tl.load(tops + part, mask=c < chunks, other=float("-inf"))
    total = tl.load(totals + part, mask=c < chunks, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    some = (c < chunks)[:, None] & (d < D)
    o = tl.sum(tl.load(sums + part[:, None] * D + d, mask=some, other=0.0) * weight[:, None], 0)
    whole = tl.sum(total * weight, 0)
    o = o / tl.where(whole > 0, whole, 1.0)
    tl.store(out + head * D + d, o.to(out.dtype.element_ty), mask=d < D)


def triton_decode(q, k, v, idx, chunk=None):
    """sparse_decode in two launches: `attend` for each chunk of indices, so that one sequence fills
    a GPU too, and `merge`. Everything but the shapes stays on the device: fit for a CUDA graph."""
    B, H, D = q.shape
    G, K = k.shape[1], idx.shape[2]
    N, DP = H // G, max(16, triton.next_power_of_2(D))  # 16: the least that tl.dot multiplies
    q, idx = q.contiguous(), idx.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    block = 64
    chunk = chunk or max(block, triton.next_power_of_2(triton.cdiv(K * B * G, 256)))
    chunks = max(1, triton.cdiv(K, chunk))
    sums = torch.empty(B * H, chunks, D, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, B * H, chunks, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    exact = INTERPRETED or q.dtype == torch.float32
    attend[B * G, chunks](
        q, k, v, idx, sums, tops, totals, K, D**-0.5, G,
        *k.stride()[:3], *v.stride()[:3], N=N, NP=max(16, triton.next_power_of_2(N)),
        D=D, DP=DP, CHUNK=chunk, BLOCK=block, EXACT=exact)
    merge[(B * H,)](sums, tops, totals, out, chunks, D=D, DP=DP, CP=triton.next_power_of_2(chunks))
    return out


if __name__ == "__main__":
    B, H, G, S, D, K = 1, 9, 3, 2048, 64, 205
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, s, D, generator=rng) for n, s in ((H, 1), (G, S), (G, S)))
    idx = torch.rand(B, G, 1, S, generator=rng).topk(K).indices.int()
    forms = {"gather + SDPA": sparse_attention(q, k, v, idx)}
    if INTERPRETED:
        forms["Triton"] = triton_decode(q[:, :, 0], k, v, idx[:, :, 0])[:, :, None]
    for name, out in forms.items():
        print(f"{name}: max error {(out - reference(q, k, v, idx)).abs().max():.1e}")
    print(f"q {list(q.shape)}, k, v {list(k.shape)}, idx {list(idx.shape)}")
    print(f"rows read: {G * K:,} instead of {G * S:,}")
