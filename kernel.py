"""kernel.py - choosing a few tokens, and attending to them: from scores to indices to outputs.

    true_attention    the softmax that selections approximate               -> [B, G, H/G, T, S]
    in_order          scores in the order that a top-K takes them in        [..., S] -> [..., S]
    top               the best tokens, from scores                          [..., S] -> [..., K]
    choose            the best tokens, from importance queries and keys    -> [R, B, G, K]
    sparse_decode     one query a head    q [B, H, D],    idx [B, G, K]    -> [B, H, D]
    triton_decode     the same on a GPU; without idx of all tokens so far  -> [B, H, D]
    sparse_attention  T queries a head    q [B, H, T, D], idx [B, G, T, K] -> [B, H, T, D]
    fetch_rows        keys and values from beyond the bus, for beyond/offload.py  -> [B, G, K, 2, D]

    o = softmax(q . k[idx] / sqrt(D)) . v[idx]     with k, v [B, G, S, D]; idx -1 is an empty slot

A ladder of four forms, with the bytes they move for one query of one layer, e bytes per number:

    reference        mask what was not chosen            B*G*S*2D*e, like dense attention
    gather + SDPA    fetch the rows, then be dense       B*G*K*2D*e read, written, read again
    compiled loops   fetch and attend piece by piece     B*G*K*2D*e read once, on a CPU
    Triton           fetch and attend in one kernel      B*G*K*2D*e read once, on CUDA

K is a tenth of S or less. The price: the rows lie scattered in memory. Choosing, for all layers of
a producer in one call, reads B*G*S*(E + 4) bytes of importance keys a layer, and writes 2 bytes for
each KV head and token. A CPU's decode step takes `chosen_rows` and `attend_rows` of cpu/loops.py,
which compute the same.

    python kernel.py        the error of the fastest form, and of Triton's if TRITON_INTERPRET=1
"""

import os

import torch
import torch.nn.functional as F

from cpu import loops

try:
    import triton
    import triton.language as tl
except ImportError:  # not a system that Triton runs on: gather + SDPA serves everywhere
    from types import SimpleNamespace
    triton, tl = None, SimpleNamespace(constexpr=None)

LOW = 2**15 - 1  # 15 bits
HALF = float(loops.HALF)  # the largest number of fp16
BLOCK = 1024  # tokens scored by one program
BINS = 2048  # of a histogram of codes: their upper 11 bits
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
jit = triton.jit if triton else lambda function: function


def on_gpu(x) -> bool:
    """Do the Triton kernels serve this tensor?"""
    return bool(triton) and x.device.type == "cuda"


def reference(q, k, v, idx):
    """The definition, by masking: what every faster form must equal. Shapes as sparse_attention."""
    keep = mark(idx, k.shape[2]).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, T, S]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)


def mark(idx, S: int):
    """Indices [..., K] -> booleans [..., S]; empty slots fall into a spare column."""
    marks = torch.zeros(*idx.shape[:-1], S + 1, dtype=torch.bool, device=idx.device)
    return marks.scatter(-1, torch.where(idx < 0, S, idx).long(), True)[..., :S]


def raw_scores(q, keys):
    """q [B, H, T, D], keys [B, G, S, D] -> q . k / sqrt(D), [B, G, H/G, T, S] in float32."""
    q = q.float().unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
    return q @ keys.float()[:, :, None].transpose(-1, -2)


def true_attention(q, keys, places):
    """q [B, H, T, D], keys [B, G, S, D] -> causal softmax [B, G, H/G, T, S]; places [B, T]: which
    of the keys is the query's own token's."""
    future = torch.arange(keys.shape[2], device=q.device) > places[..., None]  # [B, T, S]
    scores = raw_scores(q, keys).masked_fill_(future[:, None, None], -torch.inf)
    return scores.softmax(dim=-1)


def sparse_decode(q, k, v, idx):
    """Attention of one query per head to the K tokens that `idx` names, gathered row by row.

    q [B, H, D], k and v [B, G, S, D], idx [B, G, K] int32 with -1 for an empty slot -> [B, H, D].
    Head h reads KV head h // (H / G). A query without any token gets zeros. Indices must be unique
    (a repeated one would count twice in the softmax) and below S; rows not named never count.
    """
    if on_gpu(q):
        return triton_decode(q, k, v, idx)
    if loops.serves(q, k, v):
        return loops.attend(q[:, :, None], k, v, idx[:, :, None])[:, :, 0].to(q.dtype)
    B, H, D = q.shape
    q, empty = q.reshape(B, k.shape[1], -1, D), idx < 0  # [B, G, H/G, D], [B, G, K]
    if not empty.any():
        return F.scaled_dot_product_attention(q, *fetch(k, v, idx)).reshape(B, H, D)
    k, v = fetch(k, v, idx.clamp(min=0))  # [B, G, K, D]
    empty = empty[:, :, None]
    scores = q @ k.transpose(-1, -2) * D**-0.5
    # all empty: softmax is 0 / 0, and 0 wanted; an empty slot fetched row 0: 0 * NaN is NaN
    weights = scores.float().masked_fill(empty, -torch.inf).softmax(dim=-1).masked_fill(empty, 0)
    v = v.masked_fill(empty.transpose(-1, -2), 0)
    return (weights.to(v.dtype) @ v).view(B, H, D)


def fetch(k, v, idx):
    """Rows of k and v [B, G, S, D] that idx [B, G, K] names, none below 0 -> two [B, G, K, D]. One
    index_select over the table of all rows, which is much faster than k[b, g, idx]. A slice of a
    longer buffer is such a table too, with gaps between its rows."""
    B, G, S, D = k.shape
    batch, head, row, one = k.stride()
    if v.stride() != k.stride() or one != 1 or head % row or batch != G * head:
        k, v = torch.stack([k, v])  # contiguous
        batch, head, row, one = k.stride()
    first = torch.arange(0, B * G * (head // row), head // row, dtype=idx.dtype, device=k.device)
    at = (idx.reshape(B * G, -1) + first[:, None]).flatten()
    size = ((B * G - 1) * (head // row) + S, D)
    return [x.as_strided(size, (row, 1), x.storage_offset()).index_select(0, at).view(B, G, -1, D)
            for x in (k, v)]


def sparse_attention(q, k, v, idx):
    """q [B, H, T, D], k and v [B, G, S, D], idx [B, G, T, K] -> [B, H, T, D]. One query is worth
    gathering for. A block of them, each with its own choice, is computed by masking: together they
    touch nearly every row."""
    if q.shape[2] > 1:
        return reference(q, k, v, idx)
    return sparse_decode(q[:, :, 0], k, v, idx[:, :, 0])[:, :, None]


def fetch_rows(table, tokens, held, places, missed):
    """Rows of `table` [B, G, S, 2, D], contiguous, that tokens [B, G, K] name, each but once, -1 =
    none -> [B, G, K, 2, D], anything where there is none.

    A GPU's table may be the host's memory. Then rows that are among `held`, the tokens and rows of
    the call before (or None), come from there: `places` [B, G, S] int32, of any content at first,
    tells where and is brought up to date. `missed` [] int64 counts the rows that were not.
    """
    if not on_gpu(tokens):
        return torch.stack(fetch(*table.unbind(3), tokens.clamp(min=0)), dim=3)
    B, G, S, _, D = table.shape
    K, block = tokens.shape[-1], 32
    rows = torch.empty(B, G, K, 2, D, dtype=table.dtype, device=tokens.device)
    had, old = held or (tokens[..., :0], table)
    renew[B * G, triton.cdiv(K, block)](
        tokens.contiguous(), had.contiguous(), places, table, old, rows, missed, K, had.shape[-1],
        S, ROW=2 * D, RP=triton.next_power_of_2(2 * D), BLOCK=block)
    return rows


# ---------------------------------------------------------------------------- choosing


def in_order(scores):
    """Any scores [..., S] -> float32 numbers whose top-K is the same in every form of choosing, on
    every device (but for equal scores beyond 32,767 tokens, where `topk` decides). Each is an
    integer of 30 bits read as a float, as positive floats are in the order of their bits. The upper
    15 are the score's code: rounded to fp16, its bits remapped so that they are in the order of the
    number, the last one dropped. The lower 15 are 32,767 minus the token's index, so that of equal
    scores the earliest token is the first."""
    bounded = scores.float().clamp(-HALF, HALF) + 0.0  # no -0.0
    bits = bounded.half().view(torch.int16).int()
    code = ((bits ^ (bits >> 31 & LOW)) + LOW + 1 >> 1).clamp(min=1)  # 0: not to be chosen
    s = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).clamp(max=LOW)
    return ((code << 15 | LOW) - s).view(torch.float32)


def top(scores, first: int, stops, wants):
    """The best of scores [..., S] from token `first` to `stops` [...], as many as `wants` [...]
    -> tokens [..., K], -1 = empty; K is the largest want, and -inf never wanted."""
    K = min(int(wants.max()), scores.shape[-1])
    s = torch.arange(scores.shape[-1], device=scores.device)
    between = (s >= first) & (s < stops[..., None])
    values, indices = scores.float().masked_fill(~between, -torch.inf).topk(K)
    real = (s[:K] < wants[..., None]) & (values > -torch.inf)
    return torch.where(real, indices, -1)


def choose(q, keys, scales, positions, wants, idx, due, S: int, sinks: int, window: int) -> None:
    """The best tokens by q . k / sqrt(E), between sinks and window, for all layers of a producer.

    q_imp [R, B, G, E]; k_imp [R, B, G, capacity/64, E, 64], int8, and scales [R, B, G, capacity];
    positions [B] of the queries, behind which anything may stand, S the largest; wants [B], how
    many tokens each chooses, at most K. Writes idx [R, B, G, K], which may be a view, -1 = empty,
    where `due` [R, B, G] says so; None: everywhere.
    """
    due = q.new_ones(q.shape[:3], dtype=torch.bool) if due is None else due
    if on_gpu(q):
        return triton_select(q, keys, scales, positions, wants, idx, due, S, sinks, window)
    idx.masked_fill_(due[..., None], -1)
    for r, b, g in due.nonzero().tolist():
        row, between = (r, b, g), slice(sinks, max(int(positions[b]) - window + 1, sinks))
        by_channel = keys[row].transpose(0, 1).flatten(1)  # [E, capacity]
        query = q[row] * q.shape[-1] ** -0.5
        scores = query @ by_channel[:, between].float() * scales[row][between]
        best = in_order(scores).topk(min(int(wants[b]), len(scores))).indices
        idx[row][: len(best)] = best + sinks


# ---------------------------------------------------------------------------- Triton


@jit
def attend(q, k, v, idx, positions, sums, tops, totals, K, scale, G, k_b, k_g, k_s, v_b, v_g, v_s,
           N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
           CHUNK: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """One chunk of one KV head's tokens, for all N query heads of its group (padded to NP): a row
    of K and V is loaded once. What is left of a chunk: sum exp(s - top) v, top, sum exp. Without
    idx (None) the tokens are all those up to the query's own position, one of K at most."""
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
    stop = CHUNK
    if idx is None:
        end = (tl.load(positions + b) + 1).to(tl.int32)
        stop = tl.minimum(end - chunk * CHUNK, CHUNK)
    for start in range(0, stop, BLOCK):
        slot = chunk * CHUNK + start + tl.arange(0, BLOCK)
        if idx is None:
            token = tl.where(slot < end, slot, -1)
        else:
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
def merge(sums, tops, totals, out, chunks, D: tl.constexpr, DP: tl.constexpr, CP: tl.constexpr):
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


def triton_decode(q, k, v, idx, positions=None, chunk=None):
    """sparse_decode in two launches: `attend` for each chunk of indices, so that one sequence fills
    a GPU too, and `merge`. Everything but the shapes stays on the device: fit for a CUDA graph.
    Without idx a query attends to all tokens up to its position, of [B]; no other is read."""
    B, H, D = q.shape
    G, K = k.shape[1], k.shape[2] if idx is None else idx.shape[2]
    N, DP = H // G, max(16, triton.next_power_of_2(D))  # 16: the least that tl.dot multiplies
    q, idx = q.contiguous(), None if idx is None else idx.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    block = 64
    chunk = chunk or max(block, triton.next_power_of_2(triton.cdiv(K * B * G, 256)))
    chunks = max(1, triton.cdiv(K, chunk))
    sums = torch.empty(B * H, chunks, D, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, B * H, chunks, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    exact = INTERPRETED or q.dtype == torch.float32
    attend[B * G, chunks](
        q, k, v, idx, positions, sums, tops, totals, K, D**-0.5, G,
        *k.stride()[:3], *v.stride()[:3], N=N, NP=max(16, triton.next_power_of_2(N)),
        D=D, DP=DP, CHUNK=chunk, BLOCK=block, EXACT=exact)
    merge[(B * H,)](sums, tops, totals, out, chunks, D=D, DP=DP, CP=triton.next_power_of_2(chunks))
    return out


@jit
def renew(tokens, had, places, table, old, new, missed, K, OLD, S,
          ROW: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr):
    """New rows of one KV head, a block of them: from the copy in `old`, if the slot that the token
    had there is still its own, else over the bus."""
    head, d = tl.program_id(0).to(tl.int64), tl.arange(0, RP)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + head * K + j, mask=j < K, other=-1).to(tl.int64)
    live = token >= 0
    slot = tl.load(places + head * S + token, mask=live, other=-1)
    held = live & (slot >= 0) & (slot < OLD)
    held = held & (tl.load(had + head * OLD + slot, mask=held, other=-1) == token)
    tl.debug_barrier()  # all of the program's threads have read what it writes now
    tl.store(places + head * S + token, j, mask=live)
    fetched = live & (held == 0)
    far = tl.load(table + ((head * S + token) * ROW)[:, None] + d,
                  mask=fetched[:, None] & (d < ROW), other=0.0)
    near = tl.load(old + ((head * OLD + slot) * ROW)[:, None] + d,
                   mask=held[:, None] & (d < ROW), other=0.0)
    tl.store(new + ((head * K + j) * ROW)[:, None] + d, tl.where(held[:, None], near, far),
             mask=live[:, None] & (d < ROW))
    tl.atomic_add(missed, tl.sum(fetched.to(tl.int64), 0))


@jit
def score(q, k, scales, codes, histogram, positions, due, scale, BG, G, k_g, s_g, S, sinks,
          window, E: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
          HALF: tl.constexpr):
    """Codes of one block of tokens, as `in_order` makes them, and the histogram of their upper 11
    bits; 0 where a token may not be chosen. With keys channel by channel, [S/64, E, 64], a product
    is a vector load for each channel and a multiply-add. Rows not `due` are passed over."""
    row, block = tl.program_id(0), tl.program_id(1)
    if tl.load(due + row) == 0:
        return
    s = block * BLOCK + tl.arange(0, BLOCK)
    raw = tl.zeros([BLOCK], tl.float32)
    k += row.to(tl.int64) * k_g + s // LINE * (E * LINE) + s % LINE
    for e in tl.static_range(E):
        raw += tl.load(q + row * E + e) * scale * tl.load(k + e * LINE).to(tl.float32)
    raw *= tl.load(scales + row.to(tl.int64) * s_g + s)
    free = (s >= sinks) & (s <= tl.load(positions + row % BG // G) - window)
    raw = tl.minimum(tl.maximum(tl.where(free, raw, 0.0), -HALF), HALF)
    bits = raw.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    code = ((bits ^ ((bits >> 31) & 0x7FFF)) + 0x8000) >> 1
    code = tl.where(free, tl.maximum(code, 1), 0)
    tl.store(codes + row.to(tl.int64) * S + s, code.to(tl.int16))
    counts = tl.histogram(code >> 4, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + row * BINS + bins, counts, mask=counts > 0)


@jit
def edge(counts, bins, wanted):
    """The bin that holds the wanted-th best code, where `counts` of codes lie in rising `bins`, and
    how many of that bin are wanted. No bin: -1."""
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # codes in higher bins
    found = (above < wanted) & (above + counts >= wanted)
    return tl.max(tl.where(found, bins, -1), 0), wanted - tl.max(tl.where(found, above, 0), 0)


@jit
def select(codes, histogram, wants, idx, due, BG, G, S, K, stride,
           BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Those with the best codes of one row, as many as it wants, in the order of the tokens: the
    histogram names the bin of the K-th best code, one pass over that bin's codes the code itself;
    a last pass keeps all codes above it and the earliest that are equal."""
    row = tl.program_id(0)
    if tl.load(due + row) == 0:
        return
    bins, low, here = tl.arange(0, BINS), tl.arange(0, 32), tl.arange(0, BLOCK)
    codes += row.to(tl.int64) * S
    wanted = tl.load(wants + row % BG // G)
    upper, rest = edge(tl.load(histogram + row * BINS + bins), bins, wanted)
    counts = tl.zeros([32], tl.int32)  # of that bin's 16 codes; the others fall into slot 16
    for start in range(0, S, BLOCK):
        code = tl.load(codes + start + here, mask=start + here < S, other=0).to(tl.int32)
        counts += tl.histogram(tl.where(code >> 4 == upper, code & 15, 16), 32)
    lower, rest = edge(tl.where(low < 16, counts, 0), low, rest)  # the rest: of equal codes
    least = tl.where(wanted > 0, upper * 16 + lower, 1 << 16)
    end, equals = 0, 0
    for start in range(0, S, BLOCK):
        code = tl.load(codes + start + here, mask=start + here < S, other=0).to(tl.int32)
        equal = (code == least).to(tl.int32)
        before = equals + tl.cumsum(equal, 0) - equal
        take = (code > least) | ((equal > 0) & (before < rest))
        slot = end + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(idx + row.to(tl.int64) * stride + slot, start + here, mask=take)
        end += tl.sum(take.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
    for start in range(0, K, BLOCK):
        empty = (start + here >= end) & (start + here < K)
        tl.store(idx + row.to(tl.int64) * stride + start + here, -1, mask=empty)


def triton_select(q, k, scales, positions, wants, idx, due, S: int, sinks: int, window: int,
                  block=BLOCK):
    """`choose`; nothing waits for the device. The capacity is a multiple of `block`."""
    R, B, G, E = q.shape
    rows, blocks = R * B * G, triton.cdiv(max(S, 1), block)
    S, due = blocks * block, due.int()
    codes = torch.empty(rows, S, dtype=torch.int16, device=q.device)
    histogram = torch.zeros(rows, BINS, dtype=torch.int32, device=q.device)
    score[rows, blocks](q.contiguous(), k, scales, codes, histogram, positions, due, E**-0.5,
                        B * G, G, k.stride(2), scales.stride(2), S, sinks, window, E=E,
                        LINE=loops.LINE, BLOCK=block, BINS=BINS, HALF=HALF)
    select[(rows,)](codes, histogram, wants, idx, due, B * G, G, S, idx.shape[-1], idx.stride(2),
                    BLOCK=min(4096, triton.next_power_of_2(S)), BINS=BINS)


if __name__ == "__main__":
    B, H, G, S, D, K = 1, 9, 3, 2048, 64, 205
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, *rows, D, generator=rng) for rows in ((H,), (G, S), (G, S)))
    idx = torch.rand(B, G, S, generator=rng).topk(K).indices.int()
    expected = reference(q[:, :, None], k, v, idx[:, :, None])[:, :, 0]
    for form in (sparse_decode, triton_decode) if INTERPRETED else (sparse_decode,):
        print(f"{form.__name__}: max error {(form(q, k, v, idx) - expected).abs().max():.1e}")
    print(f"q {list(q.shape)}, k, v {list(k.shape)}, idx {list(idx.shape)}")
    print(f"rows read: {G * K:,} instead of {G * S:,}")
