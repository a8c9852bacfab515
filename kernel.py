"""kernel.py - attention over a chosen few: q and indices in, outputs out.

    sparse_decode     one query a head    q [B, H, D],    idx [B, G, K]    -> [B, H, D]
    sparse_attention  T queries a head    q [B, H, T, D], idx [B, G, T, K] -> [B, H, T, D]

    o = softmax(q . k[idx] / sqrt(D)) . v[idx]     with k, v [B, G, S, D]; idx -1 is an empty slot

Bytes moved for one query of one layer, e bytes per number: the dense form reads B*G*S*2D*e, this
one B*G*K*2D*e, and K is a tenth of S or less. The price: the rows lie scattered in memory.

    python kernel.py        compares the two forms below on random input
"""

import torch
import torch.nn.functional as F


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
    (a repeated one would count twice in the softmax) and below S; rows not named are never read.
    """
    B, H, D = q.shape
    G = k.shape[1]
    empty = (idx < 0)[:, :, None]  # [B, G, 1, K]
    k, v = fetch(k, idx), fetch(v, idx)  # [B, G, K, D]
    q = q.view(B, G, H // G, D)
    if q.device.type == "cpu" and not empty.any():
        return F.scaled_dot_product_attention(q, k, v).view(B, H, D)
    scores = q @ k.transpose(-1, -2) * D**-0.5  # [B, G, H/G, K]
    # all empty: softmax is 0 / 0, and 0 wanted; an empty slot fetched row 0: 0 * NaN is NaN
    weights = scores.float().masked_fill(empty, -torch.inf).softmax(dim=-1).masked_fill(empty, 0)
    v = v.masked_fill(empty.transpose(-1, -2), 0)
    return (weights.to(v.dtype) @ v).view(B, H, D)


def fetch(x, idx):
    """Rows of x [B, G, S, D] that idx [B, G, K] names (-1: any row) -> [B, G, K, D].

    One index_select over the table of all rows, an order of magnitude faster than x[b, g, idx]. A
    slice of a longer buffer is such a table too, with gaps between its rows.
    """
    B, G, S, D = x.shape
    if x.stride(3) != 1 or x.stride(1) % x.stride(2) or x.stride(0) != G * x.stride(1):
        x = x.contiguous()
    row, head = x.stride(2), x.stride(1) // x.stride(2)  # numbers to the next row; rows to a head
    table = x.as_strided(((B * G - 1) * head + S, D), (row, 1))
    at = idx.clamp(min=0).view(B * G, -1) + head * torch.arange(B * G, device=x.device)[:, None]
    return table.index_select(0, at.flatten()).view(B, G, -1, D)


def sparse_attention(q, k, v, idx):
    """q [B, H, T, D], k and v [B, G, S, D], idx [B, G, T, K] -> [B, H, T, D].

    One query is worth gathering for. A block of them, each with its own choice, is not: together
    they touch nearly every row, so a block is computed by masking.
    """
    if q.shape[2] > 1:
        return reference(q, k, v, idx)
    return sparse_decode(q[:, :, 0], k, v, idx[:, :, 0])[:, :, None]


if __name__ == "__main__":
    B, H, G, S, D, K = 1, 9, 3, 2048, 64, 205
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, s, D, generator=rng) for n, s in ((H, 1), (G, S), (G, S)))
    idx = torch.rand(B, G, 1, S, generator=rng).topk(K).indices.int()
    error = (sparse_attention(q, k, v, idx) - reference(q, k, v, idx)).abs().max()
    print(f"q {list(q.shape)}, k, v {list(k.shape)}, idx {list(idx.shape)}: max error {error:.1e}")
    print(f"rows read: {G * K:,} instead of {G * S:,}")
