"""fast/loops.py - attention, choosing and prediction as compiled loops, for one token of one text.

    x [C]                 --predict-->  importance queries [R, G, E]
    keys [R, N, T, D]     --project-->  8-bit importance keys     (N = batch size * KV heads)
    queries [R, N, E]     --choose--->  the tokens with the highest scores, idx [R, N, K]
    q [G, H/G, D], k, v   --attend--->  out [G, H/G, D]

PyTorch writes the result of every operation to memory, and the next one reads it again. At a single
token these passes and the calls take longer than the arithmetic. Here the data stay in the
processor's cache: `choose` scores 512 tokens at a time, and `attend` reads 64 rows of keys and
values for all query heads of their group. Numba compiles plain loops; fast/selector.py, butler.py
and kernel.py define what they compute, and tests hold both equal.

Compiled code is kept in the user's cache folder, one folder per state of fast/*.py. Numba's own
cache notices a change only in the file of the function that changed, not in those it calls, and a
damaged cache file causes a traceback or a wrong result.

    python -m fast.loops        microseconds of attention to all tokens and to some
"""

import hashlib
import math
import os
import pickle
import sys
import threading
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

import cli
import kernel

os.environ.setdefault("NUMBA_OPT", "1")  # compiles a quarter faster, and the loops are as fast
try:
    import numba
    from numba import prange
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps
except ImportError:  # the engine then takes plain steps
    numba = None
    NullCache = object
    prange = range

BINS = 2048  # of the histogram of scores: the upper 11 of 15 bits
PIECE = 512  # tokens scored at a time
LINE = 64  # tokens whose codes of one channel lie side by side: a cache line of bytes
ROWS = 64  # keys and values attended to at a time
MAX_HALF = np.float32(65504)  # the largest number of fp16
LOG2E = math.log2(math.e)
MAX_AGE = 16  # steps that one choice serves at most
# For Numba: cores share the loops that are written with prange, and no others. To look for others
# takes a sixth of the time of compiling.
PRANGE_ONLY = dict.fromkeys(["comprehension", "reduction", "inplace_binop", "setitem", "numpy",
                             "stencil", "fusion"], False)


# ---------------------------------------------------------------------------- compiling


def source_digest(folder=Path(__file__).parent) -> str:
    """A hash of all Python files in a folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def compiled_folder() -> Path:
    """Where compiled code of this state of fast/ is kept."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(numba.config.CACHE_DIR or user / "tokenbutler") / f"numba-{source_digest()}"


class CompiledCode(NullCache):
    """Keeps the compiled code of one function, in place of Numba's own cache: one file for each
    signature, a hash and what Numba pickles. A file that is damaged is compiled and written anew.
    The hash does not stop someone who may write this folder: a pickle can run any code."""

    kept = True  # whether compiled code is saved

    def __init__(self, function):
        self.name = f"{function.__module__}.{function.__qualname__}"

    def file(self, signature, target) -> Path:
        kind = (signature, target.codegen().magic_tuple(), numba.__version__, sys.version)
        return compiled_folder() / f"{self.name}.{hashlib.sha256(repr(kind).encode()).hexdigest()}"

    def load_overload(self, signature, target):
        """-> what `save_overload` has kept, or None"""
        target.refresh()
        try:
            whole = self.file(signature, target).read_bytes()
        except (OSError, RuntimeError):  # RuntimeError: the user has no home
            return None
        digest, code = whole[:32], whole[32:]
        if hashlib.sha256(code).digest() != digest:
            return None
        return CompileResult._rebuild(target, *pickle.loads(code))

    def save_overload(self, signature, result):
        if not self.kept or result.library.has_dynamic_globals:
            return
        code = dumps(result._reduce())
        try:
            with (cli.one_line("compiled code is not kept"),
                  cli.replacing(self.file(signature, result.target_context)) as part):
                part.write_bytes(hashlib.sha256(code).digest() + code)
        except cli.UserError as e:
            self.give_up(e)

    @classmethod
    def give_up(cls, reason) -> None:
        """No more writes in this process, because one has failed."""
        cls.kept = False
        print(f"fast: {reason}", file=sys.stderr)


def compiled(function, parallel=False, fastmath=("contract",), inline="never"):
    """Numba's version of a function, compiled at its first call; without Numba the function."""
    if numba is None:
        return function
    parallel = dict(PRANGE_ONLY) if parallel else False  # a copy: Numba empties it
    made = numba.njit(function, parallel=parallel, inline=inline, fastmath=set(fastmath),
                      error_model="numpy", no_cfunc_wrapper=True)
    if "<" not in function.__qualname__:  # the name of a lambda does not tell which one it is
        made._cache = CompiledCode(function)
    return made


@cache
def say_that_it_compiles() -> None:
    print("fast: compiling loops for this processor, once (some 15 to 30 seconds)",
          file=sys.stderr)


called = set()  # compiled functions
own = threading.local()  # own.threads: the number of threads that Numba has in this thread


def run(function, *arguments) -> None:
    """Calls a compiled function, with as many threads as PyTorch has."""
    threads = torch.get_num_threads()
    if threads != getattr(own, "threads", None):
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        own.threads = threads
    if function in called:
        function(*arguments)
        return
    # A first call reads compiled code from the cache in milliseconds, or compiles for seconds.
    notice = threading.Timer(1, say_that_it_compiles)
    notice.start()
    try:
        function(*arguments)
    finally:
        notice.cancel()
    called.add(function)
    torch.set_num_threads(threads)  # Numba's start has set PyTorch's OpenMP to all cores


# ---------------------------------------------------------------------------- choosing


@compiled
def bin_of_kth(counts, k):
    """The bin of the k-th best, counted from the last bin -> (bin, how many of it are taken)."""
    bin = len(counts) - 1
    while counts[bin] < k:
        k -= counts[bin]
        bin -= 1
    return bin, k


@compiled
def best_codes(codes, largest, k, idx):
    """The k tokens with the highest codes, of equal ones the earliest -> idx in rising order.

    codes [S], S a multiple of 8; largest [S/8]: the highest code of every 8. Codes have 15 bits.
    """
    # 1. A lower bound of the k-th best code's bin. For few tokens the maxima give one.
    counts = np.zeros(BINS, np.int32)
    for code in largest if 16 * k <= len(codes) else codes:
        counts[code >> 4] += 1
    bound = bin_of_kth(counts, k)[0]

    # 2. All tokens that reach it, and only groups of 8 whose maximum does are looked into. The
    # stores have no branch: a token that does not count is overwritten by the next one.
    groups = np.empty(len(largest), np.int32)
    num_groups = 0
    for i in range(len(largest)):
        groups[num_groups] = i
        num_groups += largest[i] >> 4 >= bound
    candidates = np.empty(8 * num_groups, np.int32)
    found = 0
    for i in groups[:num_groups]:
        for s in range(8 * i, 8 * i + 8):
            candidates[found] = s
            found += codes[s] >> 4 >= bound

    # 3. The bin of the k-th best code among them, then the code itself.
    counts[:] = 0
    for s in candidates[:found]:
        counts[codes[s] >> 4] += 1
    upper, k = bin_of_kth(counts, k)
    low_bits = np.zeros(16, np.int32)
    for s in candidates[:found]:
        if codes[s] >> 4 == upper:
            low_bits[codes[s] & 15] += 1
    lower, k = bin_of_kth(low_bits, k)
    kth = 16 * upper + lower

    # 4. Everything above the k-th best code, and the earliest k of those that equal it.
    end = 0
    for s in candidates[:found]:
        equal = codes[s] == kth and k > 0
        if codes[s] > kth or equal:
            idx[end] = s
            end += 1
            k -= equal
    idx[end:] = -1


@compiled
def score_piece(query, keys, scales, codes):
    """Scores of up to 512 tokens as ordered codes, see selector.ordered_codes.

    query [E], keys [.., E, 64] int8, scales [m] -> codes [m]
    """
    m = len(scales)
    score = np.zeros(PIECE, np.float32)
    size = np.empty(PIECE, np.float32)
    for line in range(-(-m // LINE)):
        key = keys[line]
        part = score[line * LINE : (line + 1) * LINE]
        for e in range(0, len(query), 4):  # slices of one dimension become vector code
            q0, q1, q2, q3 = query[e], query[e + 1], query[e + 2], query[e + 3]
            k0, k1, k2, k3 = key[e], key[e + 1], key[e + 2], key[e + 3]
            for j in range(LINE):
                part[j] += (q0 * np.float32(k0[j]) + q1 * np.float32(k1[j])
                            + q2 * np.float32(k2[j]) + q3 * np.float32(k3[j]))
    sign = score.view(np.int32)
    bits = size.view(np.int32)
    for j in range(m):
        score[j] *= scales[j]
        size[j] = min(abs(score[j]), MAX_HALF)
    for j in range(m):
        # Round to fp16: keep 10 bits of the fraction, ties to even.
        z = bits[j]
        half = ((z + np.int32(0xFFF) + (z >> 13 & 1)) >> 13) - np.int32(112 << 10)
        if z < 0x38800000:  # below fp16's normal numbers, in steps of 2**-24
            half = np.int32(np.rint(size[j] * np.float32(2**24)))
        half = 32767 - half if sign[j] < 0 else 32768 + half
        codes[j] = np.uint16(max(half >> 1, 1))


@compiled
def choose_row(query, keys, scales, first, stop, idx):
    """One KV head: the best tokens of [first, stop), as many as idx [k] has room for, then -1."""
    k = min(len(idx), stop - first)
    if k <= 0:
        idx[:] = -1
        return
    query = query * np.float32(len(query) ** -0.5)
    room = -(-stop // PIECE) * PIECE
    codes = np.empty(room, np.uint16)
    largest = np.empty(room // 8, np.uint16)
    for start in range(0, stop, PIECE):
        m = min(PIECE, stop - start)
        piece = codes[start : start + PIECE]
        score_piece(query, keys[start // LINE :], scales[start : start + m], piece)
        piece[m:] = 0  # 0: cannot be chosen
        if start < first:
            piece[: first - start] = 0
        top = largest[start // 8 : (start + PIECE) // 8]
        for i in range(PIECE // 8):
            j = 8 * i
            top[i] = max(max(max(piece[j], piece[j + 1]), max(piece[j + 2], piece[j + 3])),
                         max(max(piece[j + 4], piece[j + 5]), max(piece[j + 6], piece[j + 7])))
    groups = -(-stop // 8)
    best_codes(codes[: 8 * groups], largest[:groups], k, idx)


@partial(compiled, parallel=True)
def choose(queries, int8_codes, scales, first, stop, idx, skip, due):
    """selector.choose for rows [R, N]: queries [R, N, E], int8_codes [R, N, capacity/64, E, 64],
    scales [R, N, capacity] -> idx [R, N, skip + k], where due [R, N] is true. The first `skip`
    slots, which are for sinks and window, are left alone."""
    R, N, E = queries.shape
    for row in prange(R * N):
        r = row // N
        n = row % N
        if due[r, n]:
            choose_row(queries[r, n], int8_codes[r, n], scales[r, n], first, stop,
                       idx[r, n, skip:])


@compiled
def mark_due(queries, asked, age, drift, due):
    """selector.Refresh.due for queries [R, N, E] -> due [R, N]; updates asked [R, N, E] and age
    [R, N]. Drift 0: every KV head chooses."""
    R, N, E = queries.shape
    for r in range(R):
        for n in range(N):
            query = queries[r, n]
            latest = asked[r, n]
            size = np.sqrt(dot(query, query)) + np.float32(1e-12)
            turned = dot(query, latest) / size < 1 - drift
            age[r, n] += 1
            due[r, n] = drift == 0 or turned or age[r, n] >= MAX_AGE
            if due[r, n]:
                age[r, n] = 0
                for e in range(E):
                    latest[e] = query[e] / size


# ---------------------------------------------------------------------------- prediction


@partial(compiled, fastmath=("contract", "reassoc"))
def dot(row, x):
    total = np.float32(0)
    for c in range(len(x)):
        total += row[c] * x[c]
    return total


@partial(compiled, fastmath=("contract", "reassoc"))
def layer_norm(x, weight, bias, eps):
    """x [C] -> [C]"""
    out = np.empty_like(x)
    mean = np.float32(0)
    variance = np.float32(0)
    for c in range(len(x)):
        mean += x[c] / np.float32(len(x))
    for c in range(len(x)):
        variance += (x[c] - mean) ** 2 / np.float32(len(x))
    for c in range(len(x)):
        out[c] = (x[c] - mean) / np.sqrt(variance + np.float32(eps)) * weight[c] + bias[c]
    return out


@compiled
def cos_sin(position, rope):
    angles = np.float32(position) * rope
    return np.cos(angles), np.sin(angles)


@partial(compiled, parallel=True)
def predict(x, weight, bias, eps, up, down, position, rope, out):
    """butler.Producer and the rotary embedding of its queries: x [C] -> out [R, G, E]

    weight, bias and eps of the norm; up [hidden, C]; down [R, G, E, hidden]
    """
    R, G, E = out.shape
    normed = layer_norm(x, weight, bias, eps)
    hidden = np.empty(len(up), np.float32)
    for m in prange(len(up)):
        gate = dot(up[m], normed)
        hidden[m] = gate / (1 + np.exp(-gate))  # silu
    cos, sin = cos_sin(position, rope)
    for n in prange(R * G):
        of_head = down[n // G, n % G]
        to = out[n // G, n % G]
        for e in range(E // 2):
            a = dot(of_head[e], hidden)
            b = dot(of_head[e + E // 2], hidden)
            to[e] = a * cos[e] - b * sin[e]
            to[e + E // 2] = b * cos[e] + a * sin[e]


@compiled
def project_token(keys, weight, position, rope, importance_rope, int8_codes, scales):
    """The keys of one token in one layer [N, D] -> its importance keys, written to their place."""
    N, D = keys.shape
    G, _, E = weight.shape
    half = D // 2
    cos, sin = cos_sin(position, rope)
    cos_e, sin_e = cos_sin(position, importance_rope)
    rotated = np.empty(E, np.float32)
    for n in range(N):
        key = keys[n]
        plain = np.zeros(E, np.float32)
        for i in range(half):
            # Undo the base model's rotation, then project both channels of the pair.
            a = key[i] * cos[i] + key[i + half] * sin[i]
            b = key[i + half] * cos[i] - key[i] * sin[i]
            row = weight[n % G, i]
            other = weight[n % G, i + half]
            for e in range(E):
                plain[e] += a * row[e] + b * other[e]
        largest = np.float32(1e-30)
        for e in range(E // 2):
            rotated[e] = plain[e] * cos_e[e] - plain[e + E // 2] * sin_e[e]
            rotated[e + E // 2] = plain[e + E // 2] * cos_e[e] + plain[e] * sin_e[e]
            largest = max(largest, abs(rotated[e]), abs(rotated[e + E // 2]))
        scale = largest / np.float32(127)
        scales[n, position] = scale
        for e in range(E):
            code = np.rint(rotated[e] / scale)
            int8_codes[n, position // LINE, e, position % LINE] = np.int8(code)


@compiled
def project(keys, weight, position, rope, importance_rope, int8_codes, scales):
    """Butler.importance_keys in 8 bits, of one token: keys [R, N, D], weight [R, G, D, E], rope
    [R, D/2] -> its place in int8_codes [R, N, capacity/64, E, 64] and scales [R, N, capacity]"""
    for r in range(len(keys)):
        project_token(keys[r], weight[r], position, rope[r], importance_rope, int8_codes[r],
                      scales[r])


# ---------------------------------------------------------------------------- attention


@compiled
def exp2_in_place(x, highest):
    """x[i] = 2 ** (x[i] - highest), for x[i] <= highest, within a few units of the last place. A
    polynomial gives the fraction's power; the whole part is added to the number's exponent."""
    bits = x.view(np.int32)
    for i in range(len(x)):
        y = max(x[i] - highest, np.float32(-126))
        whole = np.rint(y)
        f = y - whole
        power = np.float32(1.5403530e-4)
        power = power * f + np.float32(1.3333558e-3)
        power = power * f + np.float32(9.6181291e-3)
        power = power * f + np.float32(5.5504109e-2)
        power = power * f + np.float32(2.4022651e-1)
        power = power * f + np.float32(6.9314718e-1)
        x[i] = power * f + np.float32(1)
        bits[i] += np.int32(whole) << 23


@partial(compiled, fastmath=("contract", "reassoc"))
def attend_piece(q, k, v, idx, start, stop, sums, tops, totals):
    """Up to 64 tokens of one KV head, for all its query heads.

    q [heads, D], k, v [S, D]; the tokens are idx[start:stop], or start ... stop - 1 if idx is
    empty -> sums [heads, D] of 2 ** (score - top) * v, tops [heads], totals [heads] of the powers
    """
    heads, D = q.shape
    q = q * np.float32(LOG2E * D**-0.5)
    tokens = np.empty(ROWS + 3, np.int64)
    m = 0
    for i in range(start, stop):
        token = np.int64(idx[i]) if len(idx) else i
        if token >= 0:
            tokens[m] = token
            m += 1
    sums[:] = 0.0
    totals[:] = 0.0
    tops[:] = -np.inf
    if m == 0:
        return
    if len(idx):  # scattered rows: ask for all of them before the first one is needed
        asked = np.float32(0)
        for i in range(m):
            for d in range(0, D, 16):
                asked += k[tokens[i], d] + v[tokens[i], d]
        tops[0] = asked  # a use, or the compiler drops the reads
    tokens[m:] = tokens[0]  # their weight is 0
    scores = np.zeros((heads, ROWS + 3), np.float32)
    for i in range(m):
        key = k[tokens[i]]
        for h in range(heads):
            score = np.float32(0)
            for d in range(D):
                score += q[h, d] * key[d]
            scores[h, i] = score
    for h in range(heads):
        top = scores[h, 0]
        for i in range(1, m):
            top = max(top, scores[h, i])
        tops[h] = top
        exp2_in_place(scores[h, :m], top)
        for i in range(m):
            totals[h] += scores[h, i]
    for i in range(0, m, 4):  # four rows at a time: the sums are read and written less often
        v0, v1 = v[tokens[i]], v[tokens[i + 1]]
        v2, v3 = v[tokens[i + 2]], v[tokens[i + 3]]
        for h in range(heads):
            p0, p1 = scores[h, i], scores[h, i + 1]
            p2, p3 = scores[h, i + 2], scores[h, i + 3]
            total = sums[h]
            for d in range(D):
                total[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]


@compiled
def merge_pieces(sums, tops, totals, out):
    """Combines pieces by log-sum-exp: sums [G, pieces, heads, D] -> out [G, heads, D]. A head
    without any token gets 0."""
    G, pieces, heads, D = sums.shape
    for g in range(G):
        for h in range(heads):
            top = tops[g, 0, h]
            for piece in range(1, pieces):
                top = max(top, tops[g, piece, h])
            to = out[g, h]
            to[:] = 0.0
            denominator = np.float32(0)
            for piece in range(pieces):
                if totals[g, piece, h] > 0:
                    share = np.exp2(tops[g, piece, h] - top)
                    denominator += share * totals[g, piece, h]
                    for d in range(D):
                        to[d] += share * sums[g, piece, h, d]
            if denominator > 0:
                for d in range(D):
                    to[d] /= denominator


@partial(compiled, parallel=True)
def attend(q, k, v, idx, size, out):
    """q and out [G, heads, D], k, v [G, capacity, D]; the tokens are idx [G, K], or, if K is 0, the
    first `size` ones."""
    G, heads, D = q.shape
    num_tokens = idx.shape[1] if idx.shape[1] else size
    pieces = max(1, -(-num_tokens // ROWS))
    sums = np.empty((G, pieces, heads, D), np.float32)
    tops = np.empty((G, pieces, heads), np.float32)
    totals = np.empty((G, pieces, heads), np.float32)
    for program in prange(G * pieces):
        g = program // pieces
        piece = program % pieces
        start = piece * ROWS
        stop = min(start + ROWS, num_tokens)
        attend_piece(q[g], k[g], v[g], idx[g], start, stop, sums[g, piece], tops[g, piece],
                     totals[g, piece])
    merge_pieces(sums, tops, totals, out)


@partial(compiled, parallel=True)
def selected_rows(k, v, idx, out):
    """Copies selected rows of bfloat16 keys and values, which Numba does not know: their bits
    [G, S, D] uint16, idx [G, K] -> out [2, G, K, D] uint32, the same numbers' bits in float32"""
    _, G, K, D = out.shape
    for row in prange(G * K):
        g = row // K
        i = row % K
        token = max(idx[g, i], 0)  # -1 = empty: any row, its weight is 0
        for d in range(D):
            out[0, g, i, d] = np.uint32(k[g, token, d]) << np.uint32(16)
            out[1, g, i, d] = np.uint32(v[g, token, d]) << np.uint32(16)


def sparse_attention(q, k, v, idx):
    """kernel.sparse_attention, compiled for one token on a CPU."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    needs_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    if (numba is None or T > 1 or not k.is_cpu or needs_gradient
            or k.dtype not in (torch.float32, torch.bfloat16)):
        return kernel.sparse_attention(q, k, v, idx)
    queries = q.float().reshape(B * G, H // G, D)
    idx = idx.reshape(B * G, -1).contiguous()  # [B*G, K]
    k, v = (x.flatten(0, 1).contiguous() for x in (k, v))  # [B*G, S, D]
    if k.dtype == torch.bfloat16:
        K = idx.shape[1]
        selected = torch.empty(2, B * G, K, D)
        bits = (x.view(torch.uint16).numpy() for x in (k, v))
        run(selected_rows, *bits, idx.numpy(), selected.view(torch.uint32).numpy())
        k, v = selected
        idx = torch.arange(K, dtype=torch.int32).where(idx >= 0, -1)
    out = torch.empty_like(queries)
    run(attend, *(x.numpy() for x in (queries, k, v, idx)), S, out.numpy())
    return out.view(B, H, 1, D).to(q.dtype)


if __name__ == "__main__":
    from timeit import repeat

    G, heads, S, D = 3, 3, 8000, 64
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, G, S, D), np.float32)
    q = rng.standard_normal((G, heads, D), np.float32)
    out = np.empty_like(q)
    for kept in (S, 2000, 256):
        idx = np.sort(rng.random((G, S)).argsort()[:, : kept % S].astype(np.int32))
        step = partial(run, attend, q, k, v, idx, S, out)
        best = min(repeat(step, number=1, repeat=9))  # the first one compiles
        print(f"q {list(q.shape)} attends to {kept:,} of {S:,} tokens: {1e6 * best:.0f} us")
