"""cpu/loops.py - choosing and attending on a CPU: the rung of kernel.py's ladder below Triton.

    q_imp [R, B, G, E], k_imp [R, B, G, S/64, E, 64] -choose-> tokens [R, B, G, K]
    q [B, H, D], k, v, tokens [B, G, K] or all       -attend-> [B, H, D]
    q [B, H, T, D], k, v [B, G, S, D]          -attend_block-> [B, H, T, D]

PyTorch passes over memory for every operation: product, rounding, code, top-K; fetched rows are
written and read again. Here what is worked on stays in the processor's cache. In choosing, 512
tokens are scored at a time and coded as `in_order` codes them. A histogram of the codes' upper bits
gives the bin of the K-th best. Where K is small, the histogram is made of the largest code of every
8, and only groups of 8 that reach that bin are looked into again. Importance
keys are read from the first byte to the last: of 64 tokens, a cache line for each channel. In
attending, 64 rows of keys and values are fetched at a time, and all heads of their group attend to
them; a block of a prompt takes PyTorch's products, a few rows of scores at a time. What a butler
predicts and projects in a step is computed here too. Plain loops, compiled by Numba when they are
first called, where there is a Numba; what they compute is defined in kernel.py and butler.py.

    python -m cpu.loops        microseconds of attending to all tokens, and to some
"""

import gc
import math
import os
import sys
import threading
from functools import cache, partial
from itertools import product

import numpy as np
import torch

os.environ.setdefault("NUMBA_OPT", "1")  # compiling takes a quarter less, loops are as fast
try:
    import numba
    from numba import njit, prange
except ImportError:
    numba, prange = None, range
    print("no numba (pip install numba): decoding takes longer", file=sys.stderr)

DTYPES = torch.float32, torch.bfloat16, torch.int8
BINS, PIECE = 2048, 512  # of the histogram; tokens scored at a time
LINE = 64  # tokens whose numbers of a channel lie together, a cache line of bytes
ROWS = 64  # of keys and values fetched at a time
HALF = np.float32(65504)  # the largest number of fp16
LOG2E = math.log2(math.e)
NOTHING, NOWHERE = np.empty(0, np.float32), np.empty(0, np.int64)
ALL_DUE = np.empty((0, 0, 0), np.bool_)  # names none
FEW = 32  # tokens up to which these loops were measured to be faster than PyTorch's operators
NO_HALVES = np.empty(0, np.int16), np.empty(0, np.int16)
called, mine = set(), threading.local()  # compiled functions; how many threads this one has set


def serves(*tensors) -> bool:
    """Are these for the compiled loops?"""
    return numba is not None and all(x.is_cpu and x.dtype in DTYPES for x in tensors)


def compiled(function, parallel=False, fastmath=frozenset({"contract"}), inline="never"):
    """By Numba, where there is one; kept for the next process, where a folder can be written. Numba
    notices changes in a function's own file only: whoever changes a function that others call in
    another file deletes __pycache__."""
    rules = {"parallel": parallel, "error_model": "numpy", "fastmath": set(fastmath),
             "inline": inline}
    if numba is None:
        return function
    try:
        return njit(cache=True, **rules)(function)
    except RuntimeError:  # no folder that can be written to
        return njit(**rules)(function)


@compiled
def most(x):
    """The largest number of x, of one at least; NaN if one is NaN."""
    largest = x[0]
    for number in x:
        if number > largest or number != number:
            largest = number
    return largest


@compiled
def edge(counts, rest):
    """The bin of the rest-th best, counted from the last one, and how many of that bin it takes."""
    bin = len(counts) - 1
    while counts[bin] < rest:
        rest -= counts[bin]
        bin -= 1
    return bin, rest


@compiled
def write(codes, tokens, least, rest, idx):
    """Of tokens in rising order those whose codes are above the least, and the `rest` earliest that
    equal it; then -1."""
    at = 0
    for s in tokens:
        equal = codes[s] == least and rest > 0
        if codes[s] > least or equal:
            idx[at] = s
            at += 1
            rest -= equal
    idx[at:] = -1


@compiled
def pick(codes, largest, rest, idx):
    """The `rest` tokens of the best codes, of equal ones the earliest, in rising order -> idx, then
    -1. largest: of every 8 codes."""
    counts, low = np.zeros(BINS, np.int32), np.zeros(16, np.int32)
    for code in largest if 16 * rest <= len(codes) else codes:
        counts[code >> 4] += 1
    upper = edge(counts, rest)[0]  # no more than the least that is kept
    blocks, n = np.empty(len(largest), np.int32), 0
    for i in range(len(largest)):  # without a branch
        blocks[n] = i
        n += largest[i] >> 4 >= upper
    best, found = np.empty(8 * n, np.int32), 0
    for i in blocks[:n]:
        for s in range(8 * i, 8 * i + 8):
            best[found] = s
            found += codes[s] >> 4 >= upper
    counts[:] = 0
    for s in best[:found]:
        counts[codes[s] >> 4] += 1
    upper, rest = edge(counts, rest)
    for s in best[:found]:
        if codes[s] >> 4 == upper:
            low[codes[s] & 15] += 1
    lower, rest = edge(low, rest)
    write(codes, best[:found], 16 * upper + lower, rest, idx)


@compiled
def chosen_row(q, keys, scales, want, idx, sinks, S):
    """One KV head's choice: query q [E], keys [capacity/64, E, 64], scales [capacity] -> idx [K],
    `want` of the tokens from `sinks` to S, at most, and then -1"""
    E, room = len(q), -(-len(scales) // PIECE) * PIECE
    query, rest = q * np.float32(E**-0.5), min(want, S - sinks)
    if rest <= 0:
        idx[:] = -1
        return
    codes, largest = np.empty(room, np.uint16), np.empty(room // 8, np.uint16)
    raw, size = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    sign, bits = raw.view(np.int32), size.view(np.int32)
    for start in range(0, S, PIECE):
        m = min(PIECE, S - start)
        raw[:] = 0.0
        for line in range(-(-m // LINE)):
            some, part = keys[start // LINE + line], raw[line * LINE : (line + 1) * LINE]
            for e in range(0, E, 4):  # slices of one dimension: they become vector code
                q0, q1, q2, q3 = query[e], query[e + 1], query[e + 2], query[e + 3]
                k0, k1, k2, k3 = some[e], some[e + 1], some[e + 2], some[e + 3]
                for j in range(LINE):
                    part[j] += (q0 * np.float32(k0[j]) + q1 * np.float32(k1[j])
                                + q2 * np.float32(k2[j]) + q3 * np.float32(k3[j]))
        sizes, here = scales[start : start + m], codes[start : start + PIECE]
        for j in range(m):
            raw[j] *= sizes[j]
            size[j] = min(abs(raw[j]), HALF)
        for j in range(m):
            z = bits[j]  # to fp16: 10 bits of the fraction, the even neighbour in the middle
            half = ((z + np.int32(0xFFF) + (z >> 13 & 1)) >> 13) - np.int32(112 << 10)
            if z < 0x38800000:  # below its normal numbers, in steps of 2 ** -24
                half = np.int32(np.rint(size[j] * np.float32(2**24)))
            half = 32767 - half if sign[j] < 0 else 32768 + half
            here[j] = np.uint16(max(half >> 1, 1))
        here[m:] = 0  # not to be chosen
        if start < sinks:
            here[: sinks - start] = 0
        top = largest[start // 8 : (start + PIECE) // 8]
        for i in range(PIECE // 8):
            j = 8 * i
            top[i] = max(max(max(here[j], here[j + 1]), max(here[j + 2], here[j + 3])),
                         max(max(here[j + 4], here[j + 5]), max(here[j + 6], here[j + 7])))
    blocks = -(-S // 8)
    pick(codes[: 8 * blocks], largest[:blocks], rest, idx)


@partial(compiled, parallel=True)
def chosen_rows(queries, keys, scales, positions, wants, idx, due, sinks, window):
    R, B, G, E = queries.shape
    for n in prange(R * B * G):
        r, b, g = n // (B * G), n // G % B, n % G
        if due.size == 0 or due[r, b, g]:
            S = max(positions[b] - window + 1, sinks)  # tokens before the window
            chosen_row(queries[r, b, g], keys[r, b, g], scales[r, b, g], wants[b], idx[r, b, g],
                       sinks, S)


@partial(compiled, fastmath={"contract", "reassoc"})
def dot(row, x):
    s = np.float32(0)
    for c in range(len(x)):
        s += row[c] * x[c]
    return s


@partial(compiled, fastmath={"contract", "reassoc"})
def standard(x, weight, bias, eps):
    """LayerNorm of x [C]"""
    out, mean, square = np.empty_like(x), np.float32(0), np.float32(0)
    for c in range(len(x)):
        mean += x[c] / np.float32(len(x))
    for c in range(len(x)):
        square += (x[c] - mean) ** 2 / np.float32(len(x))
    for c in range(len(x)):
        out[c] = (x[c] - mean) / np.sqrt(square + np.float32(eps)) * weight[c] + bias[c]
    return out


@compiled
def cos_sin(position, rope):
    angles = np.float32(position) * rope
    return np.cos(angles), np.sin(angles)


@partial(compiled, parallel=True)
def predicted(x, weight, bias, eps, up, down, positions, rope, out):
    """A butler's Producer, and its queries' turn: x [B, C] -> out [R, B, G, E]"""
    (R, B, G, E), hidden = out.shape, np.empty(len(up), np.float32)
    for b in range(B):
        normal, (cos, sin) = standard(x[b], weight, bias, eps), cos_sin(positions[b], rope)
        for m in prange(len(up)):
            s = dot(up[m], normal)
            hidden[m] = s / (1 + np.exp(-s))
        for n in prange(R * G):
            to = out[n // G, b, n % G]
            for e in range(E // 2):
                first, last = dot(down[n * E + e], hidden), dot(down[n * E + e + E // 2], hidden)
                to[e] = first * cos[e] - last * sin[e]
                to[e + E // 2] = last * cos[e] + first * sin[e]


@compiled
def project_token(keys, weight, position, rope, own_rope, numbers, scales):
    """A layer's keys of one token [B, G, D], all heads -> importance keys in their place"""
    B, G, D = keys.shape
    E, half = weight.shape[2], D // 2
    (cos, sin), (cos_e, sin_e) = cos_sin(position, rope), cos_sin(position, own_rope)
    line, place, turned = position // LINE, position % LINE, np.empty(E, np.float32)
    for n in range(B * G):
        b, g, new = n // G, n % G, np.zeros(E, np.float32)
        key = keys[b, g]
        for i in range(half):
            before = key[i] * cos[i] + key[i + half] * sin[i]
            behind = key[i + half] * cos[i] - key[i] * sin[i]
            row, other = weight[g, i], weight[g, i + half]
            for e in range(E):
                new[e] += before * row[e] + behind * other[e]
        for e in range(E // 2):
            turned[e] = new[e] * cos_e[e] - new[e + E // 2] * sin_e[e]
            turned[e + E // 2] = new[e + E // 2] * cos_e[e] + new[e] * sin_e[e]
        scale = max(most(np.abs(turned)), np.float32(1e-30)) / np.float32(127)
        scales[b, g, position] = scale
        for e in range(E):
            numbers[b, g, line, e, place] = np.int8(np.rint(turned[e] / scale))


@partial(compiled, parallel=True)
def projected(keys, weight, start, rope, own_rope, numbers, scales):
    """A butler's importance keys of the tokens from `start` on, into their places: keys
    [R, B, G, T, D], rotated by `rope` [R, D/2] radians for each position; weight [R, G, D, E] ->
    numbers [R, B, G, capacity/64, E, 64], scales [R, B, G, capacity]"""
    R, T = len(keys), keys.shape[3]
    for program in prange(R * T):
        r, t = program // T, program % T
        project_token(keys[r, :, :, t], weight[r], start + t, rope[r], own_rope, numbers[r],
                      scales[r])


@compiled
def powers(x, highest):
    """2 ** (x - highest) in place, no x above the highest: by halves of the number's bits, to a
    few units of float32's last place."""
    bits = x.view(np.int32)
    for i in range(len(x)):
        y = max(x[i] - highest, np.float32(-126))
        whole = np.rint(y)
        rest, power = y - whole, np.float32(1.5403530e-4)
        power = power * rest + np.float32(1.3333558e-3)
        power = power * rest + np.float32(9.6181291e-3)
        power = power * rest + np.float32(5.5504109e-2)
        power = power * rest + np.float32(2.4022651e-1)
        power = power * rest + np.float32(6.9314718e-1)
        x[i] = power * rest + np.float32(1)
        bits[i] += np.int32(whole) << 23  # the exponent


@compiled
def merge(sums, tops, totals, out):
    """What the pieces of a head's tokens sum up to [N, pieces, heads, D] -> out [N, heads, D]; no
    token at all: 0."""
    N, pieces, heads, D = sums.shape
    for n in range(N):
        for h in range(heads):
            highest, total = most(tops[n, :, h]), np.float32(0)
            out[n, h] = 0.0
            for piece in range(pieces):
                if totals[n, piece, h] > 0:
                    share = np.exp2(tops[n, piece, h] - highest)
                    total += share * totals[n, piece, h]
                    for d in range(D):
                        out[n, h, d] += share * sums[n, piece, h, d]
            if total > 0:
                for d in range(D):
                    out[n, h, d] /= total


@partial(compiled, fastmath={"contract", "reassoc"})
def attend_piece(q, k, v, halves, first, row, tokens, start, stop, sums, tops, totals):
    """A KV head's queries, q [heads, D], and a piece of its tokens, start to stop of `tokens` or,
    if that is empty, of all -> sums [heads, D] of values times powers of 2; tops [heads], the
    largest exponents; totals [heads] of the powers. `merge` adds the pieces up."""
    heads, D = q.shape
    q = q * np.float32(LOG2E * D**-0.5)
    at, asked, m = np.empty(ROWS + 3, np.int64), np.float32(0), 0
    for i in range(start, stop):
        token = tokens[i] if len(tokens) else i
        if token >= 0:
            at[m] = first + token * row
            m += 1
    sums[:], totals[:], tops[:] = 0.0, 0.0, -np.inf
    if m == 0:
        return
    keys, values = k, v
    if len(halves[0]):
        keys, values = wide(halves[0], at[:m], D), wide(halves[1], at[:m], D)
        for i in range(m):
            at[i] = i * D
    elif len(tokens):  # scattered: all are asked for before the first is needed
        for i in range(m):
            for d in range(0, D, 16):
                asked += keys[at[i] + d] + values[at[i] + d]
    tops[0] = asked  # used, or a compiler would not ask
    at[m:] = at[0]
    scores = np.zeros((heads, ROWS + 3), np.float32)
    for i in range(m):
        key = keys[at[i] : at[i] + D]
        for h in range(heads):
            score = np.float32(0)
            for d in range(D):
                score += q[h, d] * key[d]
            scores[h, i] = score
    for h in range(heads):
        tops[h] = most(scores[h, :m])
        powers(scores[h, :m], tops[h])
        totals[h] = scores[h].sum()
    for i in range(0, m, 4):  # four rows at a time: a sum is read and written less often
        a0, a1, a2, a3 = at[i], at[i + 1], at[i + 2], at[i + 3]
        v0, v1 = values[a0 : a0 + D], values[a1 : a1 + D]
        v2, v3 = values[a2 : a2 + D], values[a3 : a3 + D]
        for h in range(heads):
            p, total = scores[h, i : i + 4], sums[h]
            p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
            for d in range(D):
                total[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]


@partial(compiled, parallel=True)
def attend_rows(queries, k, v, halves, G, batch, head, row, idx, newest, longest, out):
    """queries and out [N, heads, D], N = B * G. k, v: the caches as flat arrays, in which sequences
    are `batch` numbers apart, heads `head`, tokens `row`; float32 or, as `halves`, bfloat16.
    Tokens: of idx [N, K], or, if it is empty, all up to the `newest` [B]; `longest` in any row."""
    N, heads, D = queries.shape
    pieces = -(-longest // ROWS)
    sums = np.empty((N, pieces, heads, D), np.float32)
    tops, totals = np.empty((2, N, pieces, heads), np.float32)
    for program in prange(N * pieces):
        n, piece = program // pieces, program % pieces
        b, start = n // G, piece * ROWS
        end = newest[b] + 1 if len(newest) else idx.shape[1]
        attend_piece(queries[n], k, v, halves, b * batch + n % G * head, row, idx[n], start,
                     min(start + ROWS, end), sums[n, piece], tops[n, piece], totals[n, piece])
    merge(sums, tops, totals, out)


@partial(compiled, fastmath={"contract", "reassoc"})
def weights_of_row(row):
    """Bits of bfloat16 scores -> in their place 2 ** (score - the largest); returns their sum"""
    total, largest = np.float32(0), np.int16(-(2**15))
    for s in range(len(row)):  # of bits that are in the order of the numbers
        largest = max(largest, np.int16(row[s] ^ (row[s] >> 15 & 0x7FFF)))
    x = np.empty(PIECE, np.float32)
    bits = x.view(np.int32)
    bits[0] = np.int32(largest ^ (largest >> 15 & 0x7FFF)) << 16
    highest = x[0]
    for start in range(0, len(row), PIECE):
        part = row[start : start + PIECE]
        for s in range(len(part)):
            bits[s] = np.int32(part[s]) << 16
        powers(x[: len(part)], highest)
        for s in range(len(part)):
            total += x[s]
        for s in range(len(part)):
            part[s] = (bits[s] + 0x8000) >> 16
    return total


@partial(compiled, parallel=True)
def weights_of(rows, ends, sums):
    """The same for each of rows [N, S] up to its end, of `ends` [N]; 0 behind it -> sums [N]"""
    for n in prange(len(rows)):
        sums[n] = weights_of_row(rows[n, : ends[n]])
        rows[n, ends[n] :] = 0


@compiled
def wide(halves, at, D):
    """Rows of upper halves of float32 numbers, beginning `at` -> these numbers, row by row."""
    bits = np.empty(len(at) * D, np.uint32)
    for i in range(len(at)):
        row, to = halves[at[i] : at[i] + D], bits[i * D : (i + 1) * D]
        for d in range(D):
            to[d] = np.uint32(row[d]) << 16
    return bits.view(np.float32)


def attend(q, k, v, idx=None, positions=None):
    """kernel.sparse_attention of one query a head, q [B, H, 1, D], compiled; without idx of all
    tokens up to those at `positions` [B, 1]. k, v float32 or bfloat16."""
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = torch.stack([k, v])  # contiguous
    batch, head, row, _ = k.stride()
    size = (B - 1) * batch + (G - 1) * head + (S - 1) * row + D  # from the first number to the last
    k, v = (x.as_strided((size,), (1,)) for x in (k, v))
    if k.dtype == torch.float32:
        caches = k.numpy(), v.numpy(), NO_HALVES
    else:
        caches = NOTHING, NOTHING, tuple(x.view(torch.int16).numpy() for x in (k, v))
    if idx is None:
        tokens, newest = np.empty((B * G, 0), np.int32), positions.flatten().numpy()
    else:
        tokens, newest = idx.reshape(B * G, idx.shape[3]).numpy(), NOWHERE
    longest = max(tokens.shape[1], 1) if len(newest) == 0 else newest.max() + 1
    out = torch.empty(B, H, 1, D)
    heads = (B * G, H // G, D)
    run(attend_rows, q.float().reshape(heads).numpy(), *caches, G, batch, head, row, tokens, newest,
        longest, out.view(heads).numpy())
    return out


def attend_block(q, k, v):
    """model.dense_attention of T new tokens, the last of S, by products of bfloat16 numbers, a few
    rows of scores at a time, which stay in the processor's cache: q [B, H, T, D], k, v
    [B, G, S, D] -> [B, H, T, D] float32"""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    N, some = H // G, min(T, 128)
    q = (q * (LOG2E * D**-0.5)).bfloat16().view(B, G, N, T, D)
    k, v, out = k.bfloat16(), v.bfloat16(), torch.empty(B, G, N, T, D)
    room, sums = torch.empty(N * some * S, dtype=q.dtype), torch.empty(N * some, 1)
    for b, g, start in product(range(B), range(G), range(0, T, some)):
        stop = min(start + some, T)
        rows, seen = q[b, g, :, start:stop].reshape(-1, D), S - T + stop
        scores = room[: len(rows) * seen].view(-1, seen)
        torch.mm(rows, k[b, g, :seen].T, out=scores)
        ends = np.tile(np.arange(S - T + start + 1, seen + 1), N)
        run(weights_of, scores.view(torch.int16).numpy(), ends, sums[:, 0].numpy())
        out[b, g, :, start:stop] = (scores @ v[b, g, :seen] / sums[: len(rows)]).view(N, -1, D)
    return out.view(B, H, T, D)


def weights(producer):
    """Shape and weights of a butler.Producer for `predict`; None if it is not for these loops."""
    norm, matrices = producer.norm, (producer.up.weight, producer.out.weight)
    if not serves(*matrices):
        return None
    weight, bias, up, out = (w.detach().numpy() for w in (norm.weight, norm.bias, *matrices))
    return producer.shape, (weight, bias, norm.eps, up, out)


def project(keys, butler, some: slice, start: int, numbers, scales) -> None:
    """Butler.project of a few tokens from `start` on, compiled and in 8 bits: keys [R, B, G, T, D]
    of `some` layers -> their places in numbers and scales"""
    run(projected, keys.float().numpy(), butler.key_projection[some].detach().numpy(), start,
        butler.rope[some].flatten(1).numpy(), butler.own_rope.numpy(), numbers.numpy(),
        scales.numpy())


class StepArrays:
    """What all producers of a decode step share, as arrays: slicing a tensor and asking for its
    array, for every argument of every producer, would take as long as the work itself."""

    def __init__(self, s):  # a butler.ButlerSelector, its plan made
        self.rope, self.rules = s.butler.own_rope.numpy(), (s.sinks, s.window)
        self.keys = s.importance.numbers.numpy(), s.importance.scales.numpy()
        self.positions, self.wants, self.chosen = (x.numpy() for x in (s.here, s.wants, s.chosen))

    def predict(self, weights, x):
        """What `weights` gave, x [B, 1, C] -> importance queries [R, B, G, 1, E], turned"""
        (R, G, E), matrices = weights
        out = np.empty((R, len(x), G, 1, E), np.float32)
        run(predicted, x.float().numpy()[:, 0], *matrices, self.positions, self.rope,
            out[:, :, :, 0])
        return out

    def choose(self, some: slice, queries, due=None) -> None:
        """kernel.choose for some layers, whose producer gave queries [R, B, G, E]"""
        run(chosen_rows, queries, *(x[some] for x in self.keys), self.positions, self.wants,
            self.chosen[some], ALL_DUE if due is None else due.numpy(), *self.rules)


@cache
def tell() -> None:
    print("compiling loops for this processor, once", file=sys.stderr)


def run(function, *arguments) -> None:
    """Calls a compiled function with as many threads as PyTorch has, and tells if it compiles."""
    threads = torch.get_num_threads()
    if threads != getattr(mine, "threads", None):  # of this thread's calls
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        mine.threads = threads
    if function in called:
        return function(*arguments)
    notice, collecting = threading.Timer(1, tell), gc.isenabled()
    notice.start()
    gc.disable()  # looking for garbage among what compiling makes takes a tenth of its time
    try:
        function(*arguments)
    finally:
        notice.cancel()
        if collecting:
            gc.enable()
    called.add(function)
    torch.set_num_threads(threads)  # Numba's start has set PyTorch's OpenMP to all cores


if __name__ == "__main__":
    from timeit import repeat

    rng, D, S = torch.Generator().manual_seed(0), 64, 8000
    k, v = torch.randn(2, 1, 3, S, D, generator=rng)
    q, newest = torch.randn(1, 9, 1, D, generator=rng), torch.tensor([[S - 1]])
    for kept in (S, 2000, 256):
        chosen = torch.rand(1, 3, 1, S, generator=rng).topk(kept).indices.sort().values
        step = partial(attend, q, k, v, None if kept == S else chosen, newest)
        best = min(repeat(step, number=1, repeat=9))  # the first one compiles
        print(f"q {list(q.shape)} attends to {kept:,} of {S:,} tokens: {1e6 * best:.0f} us")
