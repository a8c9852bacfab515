"""kernel_cpu.py - choosing on a CPU: the rung of kernel.py's ladder between PyTorch and Triton.

    queries [N, E], importance keys in 8 bits [N, E, capacity] -choose-> tokens [N, K]
    scores [..., S], from anybody -top-> tokens [..., K]

PyTorch passes over memory for every operation: product, rounding, code, top-K. Here a row stays in
the processor's cache: 512 tokens are scored at a time, coded as `in_order` codes them, and counted;
the counts tell the least code that is kept; one more pass writes the tokens down. Plain loops,
compiled by Numba when they are first called. Exactly what `choose` of kernel.py does, in the order
of the text; that serves, several times slower, where there is no Numba.

    python kernel_cpu.py        compares both, nanoseconds a token and row
"""

import sys
import threading
from functools import partial

import numpy as np
import torch

import kernel

try:
    import numba
    from numba import njit, prange
except ImportError:
    numba, prange = None, range
    print("no numba (pip install numba): choosing tokens takes longer", file=sys.stderr)

BINS, PIECE = 2048, 512  # of the histogram; tokens scored at a time
HALF = np.float32(kernel.HALF)


def compiled(function, parallel=True):
    """By Numba, where there is one; kept for the next process, where a folder can be written."""
    rules = {"parallel": parallel, "error_model": "numpy", "fastmath": {"contract"}}
    if numba is None:
        return function
    try:
        return njit(cache=True, **rules)(function)
    except RuntimeError:  # no folder that can be written to
        return njit(**rules)(function)


@partial(compiled, parallel=False)
def edge(counts, rest):
    """The bin of the rest-th best, counted from the last one, and how many of that bin it takes."""
    bin = len(counts) - 1
    while counts[bin] < rest:
        rest -= counts[bin]
        bin -= 1
    return bin, rest


@partial(compiled, parallel=False)
def write(codes, least, rest, first, idx):
    """Tokens whose codes are above the least, and the `rest` earliest that equal it; then -1."""
    at = 0
    for s in range(len(codes)):
        equal = codes[s] == least and rest > 0
        if codes[s] > least or equal:
            idx[at] = first + s
            at += 1
            rest -= equal
    idx[at:] = -1


@compiled
def chosen_rows(q, keys, scales, positions, wants, due, sinks, window, codes, idx):
    for n in prange(len(q)):
        if not due[n]:
            continue
        S = max(positions[n] - window + 1 - sinks, 0)  # tokens to choose from
        code, counts = codes[n], np.zeros(BINS, np.int32)
        raw, size = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
        sign, bits = raw.view(np.int32), size.view(np.int32)
        for start in range(0, S, PIECE):
            m = min(PIECE, S - start)
            a = sinks + start
            raw[:] = 0.0
            for e in range(0, q.shape[1], 2):  # slices of one dimension: they become vector code
                q0, q1 = q[n, e], q[n, e + 1]
                k0, k1 = keys[n, e, a : a + m], keys[n, e + 1, a : a + m]
                for j in range(m):
                    raw[j] += q0 * np.float32(k0[j]) + q1 * np.float32(k1[j])
            scale, here = scales[n, a : a + m], code[start : start + m]
            for j in range(m):
                raw[j] *= scale[j]
                size[j] = min(abs(raw[j]), HALF)
            for j in range(m):
                b = bits[j]  # to fp16: 10 bits of the fraction, the even neighbour in the middle
                half = ((b + np.int32(0xFFF) + (b >> 13 & 1)) >> 13) - np.int32(112 << 10)
                if b < 0x38800000:  # below its normal numbers, in steps of 2 ** -24
                    half = np.int32(np.rint(size[j] * np.float32(2**24)))
                half = 32767 - half if sign[j] < 0 else 32768 + half
                here[j] = np.uint16(max(half >> 1, 1))
            for j in range(m):
                counts[here[j] >> 4] += 1
        rest = min(wants[n], S)
        if rest <= 0:
            idx[n] = -1
            continue
        (upper, rest), low = edge(counts, rest), np.zeros(16, np.int32)
        for s in range(S):
            if code[s] >> 4 == upper:
                low[code[s] & 15] += 1
        lower, rest = edge(low, rest)
        write(code[:S], 16 * upper + lower, rest, sinks, idx[n])


@compiled
def top_rows(scores, first, stops, wants, idx):
    for n in prange(len(scores)):
        row = scores[n, first : max(stops[n], first)]
        bits, codes = row.view(np.int32), np.empty(len(row), np.uint32)
        counts = np.zeros(BINS, np.int32)
        for s in range(len(row)):  # codes in the order of the numbers
            codes[s] = np.uint32(bits[s]) ^ (np.uint32(bits[s] >> 31) | np.uint32(1 << 31))
        nothing = np.uint32(0x007FFFFF)  # the code of -inf
        for s in range(len(row)):
            counts[codes[s] >> 21] += codes[s] > nothing
        rest = min(wants[n], counts.sum())
        if rest <= 0:
            idx[n] = -1
            continue
        upper, rest = edge(counts, rest)
        inside, m = np.empty(counts[upper], np.uint32), 0
        for s in range(len(row)):
            if codes[s] >> 21 == upper:
                inside[m] = codes[s]
                m += 1
        inside.sort()
        least = inside[m - rest]
        rest -= m - np.searchsorted(inside, least, side="right")  # how many equal ones
        write(codes, least, rest, first, idx[n])


def top(scores, first: int, stops, wants):
    """kernel.top, compiled, on a CPU: in the order of the text, ties to the earliest."""
    if numba is None or scores.device.type != "cpu":
        return kernel.top(scores, first, stops, wants)
    shape, K = scores.shape[:-1], min(int(wants.max()), scores.shape[-1])
    idx = torch.empty(*shape, K, dtype=torch.long)
    if K:
        rows = [x.expand(shape).flatten().numpy() for x in (stops, wants)]
        run(top_rows, scores.detach().float().flatten(0, -2).contiguous().numpy(), first, *rows,
            idx.flatten(0, -2).numpy())
    return idx


def run(function, *arguments) -> None:
    """Calls a compiled function with as many threads as PyTorch has, and tells of a compilation."""
    threads = torch.get_num_threads()
    if first := not function.signatures:
        told = threading.Timer(1, print, ["compiling kernel_cpu.py, once"], {"file": sys.stderr})
        told.start()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    function(*arguments)
    if first:
        told.cancel()
        torch.set_num_threads(threads)  # Numba's start has set PyTorch's OpenMP to all cores


def choose(q, keys, scales, positions, wants, due, idx, sinks: int, window: int) -> None:
    """kernel.choose, compiled: q float32, E even, idx int64."""
    if numba is None:
        return kernel.choose(q, keys, scales, positions, wants, due, idx, sinks, window)
    codes = np.empty((len(q), keys.shape[-1]), np.uint16)
    run(chosen_rows, *(x.numpy() for x in (q, keys, scales, positions, wants, due)), sinks, window,
        codes, idx.numpy())


if __name__ == "__main__":
    import time

    N, E, K, generator = 15, 32, 256, torch.Generator().manual_seed(0)
    for S in (1000, 8000, 32000):
        q = torch.randn(N, E, generator=generator) / 100
        keys = torch.randint(-127, 128, (N, E, S), generator=generator).to(torch.int8)
        scales = torch.rand(N, S, generator=generator)
        rows = torch.full((N,), S - 1), torch.full((N,), K), torch.ones(N, dtype=torch.bool)
        seconds, found = {}, {}
        for name, form in ("PyTorch", kernel.choose), ("Numba", choose):
            found[name], times = torch.empty(N, K, dtype=torch.long), []
            for _ in range(8):  # the first time compiles
                began = time.perf_counter()
                form(q, keys, scales, *rows, found[name], 4, 8)
                times.append(time.perf_counter() - began)
            seconds[name] = min(times)
        same = torch.equal(*(idx.sort(-1).values for idx in found.values()))
        print(f"{S:6,} tokens:", ", ".join(f"{name} {1e9 * s / N / S:.1f} ns"
                                           for name, s in seconds.items()),
              "a token and row; same choice:", same)
