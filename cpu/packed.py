"""cpu/packed.py - a token's way through a layer, in compiled loops on weights of few bits.

    x [R, C] -before-> q, k, v [R, H + 2 G, D] -> attention [R, H, D] -after-> x [R, C]
    x [R, C] ---------------------- one_layer: cache and attention too -----> x [R, C]
    x [R, C] -head-> logits [R, V]                         R: a few tokens, of one or many texts

One token's product with a matrix takes as long as reading the matrix. Most files have it in fewer
bits than PyTorch multiplies: GGUF's Q4_1 has 16 evenly spaced values for every 32 weights in a row,
Q8_0 whole multiples up to 127 of one number, most safetensors files bfloat16. So beside the weights
for long blocks of tokens, and when the first single token comes, a copy is made in 4, 8 or 16 bits,
which is the same matrix exactly. 64 rows of it lie side by side: a channel's input is one number
for all of them, and no sum runs across a vector. By codes of 4 and 8 bits products are of integers
(cpu/pairs.py): 32 activations at a time are whole multiples, up to 32,767, of one number. So
rounded, a product is off by 2e-5 of its size, a hundredth of what bfloat16 loses elsewhere;
in a model of float32 numbers a second term has what the first one leaves out.

What lies between the products takes PyTorch as long as these; here it is part of the same loops,
and a decode step calls one of them a layer. model.py defines what they compute, and does it where
weights have no such form, or tokens are many.

    python -m cpu.packed        milliseconds of a step without its attention, here and in PyTorch
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from cpu.loops import FEW, LOG2E, attend_rows, compiled, most, powers, prange, run, serves
from cpu.pairs import PAIRS, TILE, dot_pairs

GROUP = 2 * PAIRS  # weights of a row with one scale
UPPER = np.int32(-(2**16))  # of a word, its upper half


class Packed(NamedTuple):
    """A matrix [N, C] in 4, 8 or 16 bits. codes: words of 32 bits [N/64, C * bits/32, 64], each of
    8, 4 or 2 neighbouring channels of a row, the even ones in its lower half, the odd ones in its
    upper half, the earliest lowest; scales [N/64, C/32, 2, 64]: step and offset, none with 16 bits;
    bias [N] or none; terms: how many numbers of 16 bits an activation is made of."""

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    terms: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.bias.nbytes


def pack(linear) -> Packed | None:
    """A linear layer on a CPU, if its weights have such a form and its sizes are multiples of 32
    and 64."""
    w = linear.weight
    N, C = w.shape
    if C % GROUP or N % TILE or not serves(w):
        return None
    bias = np.empty(0, np.float32) if linear.bias is None else numbers(linear.bias)
    exact, rows = 2.0**-7 if w.dtype == torch.bfloat16 else 2.0**-15, numbers(w)
    for bits in (4, 8, 16):
        codes = np.empty((N // TILE, C * bits // 32, TILE), np.int32)
        scales = np.empty((N // TILE, C // GROUP if bits < 16 else 0, 2, TILE), np.float32)
        fits = np.ones(N // TILE, np.bool_)
        # most matrices that have no such form show it in their first rows
        for part in (slice(1), slice(None)):
            run(encode, rows, bits, exact, codes[part], scales[part], fits[part])
            if not fits[part].all():
                break
        else:
            return Packed(codes, scales, bias, 1 + (w.dtype == torch.float32))
    return None


def numbers(tensor):
    return tensor.detach().float().contiguous().numpy()


@compiled
def encode_tile(w, bits, exact, codes, scales):
    """64 rows, w [64, C] -> codes and scales; are they `exact`, relative to their numbers' size?"""
    each, fits = 32 // bits, True  # codes of a word
    codes[:] = 0
    for r in range(TILE):
        words = w[r].view(np.int32)
        for c in range(len(words) if bits == 16 else 0):
            codes[c // 2, r] |= (words[c] >> 16 & 0xFFFF) << 16 * (c % 2)
            fits &= words[c] & 0xFFFF == 0
        for b in range(len(scales)):
            group, low, high = w[r, b * GROUP : (b + 1) * GROUP], np.inf, -np.inf
            for i in range(GROUP):
                low, high = min(low, group[i]), max(high, group[i])
            largest = max(-low, high)
            if bits == 4:
                step = max((high - low) / 15, 1e-12)
            else:
                step = max(largest / 127, 1e-12)
                low = -128 * step
            scales[b, 0, r], scales[b, 1, r] = step, low
            for i in range(GROUP):
                code = np.rint((group[i] - low) / step)
                size = largest if bits == 4 else abs(group[i]) + step
                fits &= abs(code * step + low - group[i]) <= exact * size
                place = i % each // 2 * bits + i % 2 * 16
                codes[b * bits + i // each, r] |= np.int32(code) << place
    return fits


@partial(compiled, parallel=True)
def encode(w, bits, exact, codes, scales, fits):
    """Weights [N, C] -> codes, scales, and which tiles of 64 rows are `exact`"""
    for t in prange(len(codes)):
        rows = w[t * TILE : (t + 1) * TILE]
        fits[t] = encode_tile(rows, bits, exact, codes[t], scales[t])


@compiled
def in_pairs(x, terms):
    """x [R, C] -> groups of 32 numbers as pairs of 16 bits each [C/32, R * terms, 16]; step and sum
    of each group [C/32, R * terms, 2]. A second term is what the first one leaves."""
    (R, C), last = x.shape, np.float32(2**15 - 1)
    whole = np.empty((C // GROUP, R * terms, GROUP), np.int16)
    units = np.empty((C // GROUP, R * terms, 2), np.float32)
    bits, sizes, left = x.view(np.int32), units.view(np.int32), np.empty(GROUP, np.float32)
    for b in range(C // GROUP):
        for r in range(R):
            largest = np.int32(0)
            for i in range(b * GROUP, (b + 1) * GROUP):  # without their signs, bits have the order
                largest = max(largest, bits[r, i] & np.int32(0x7FFFFFFF))  # of the numbers
            sizes[b, r * terms, 0] = largest  # the memory of units, where it is a number again
            unit = (units[b, r * terms, 0] + np.float32(1e-30)) / last  # not 0
            for i in range(GROUP):
                left[i] = x[r, b * GROUP + i] * (np.float32(1) / unit)
            for row in range(r * terms, (r + 1) * terms):
                total, to = np.int32(0), whole[b, row]
                for i in range(GROUP):
                    number = np.rint(left[i])
                    to[i] = np.int16(number)
                    total += to[i]
                    left[i] = (left[i] - number) * last
                units[b, row, 0], units[b, row, 1] = unit, unit * np.float32(total)
                unit /= last
    return whole.view(np.int32), units


@compiled
def rows_of_few_bits(x, units, t, codes, scales, out):
    """Adds to out [R, N], in its columns of tile t, what `in_pairs` gave by codes [C * bits/32, 64]
    of 4 or 8 bits and scales [C/32, 2, 64]."""
    count, sums, bits = units.shape[1], np.empty((2, TILE), np.int32), len(codes) // len(scales)
    terms = count // len(out)
    for b in range(len(scales)):
        words, step, low = codes[b * bits : (b + 1) * bits], scales[b, 0], scales[b, 1]
        for start in range(0, count, 2):
            some = x[b, start:]
            if bits == 4 and start + 1 < count:  # in numbers: code is made for each, see there
                dot_pairs(4, 2, words, some, sums)
            elif bits == 4:
                dot_pairs(4, 1, words, some, sums)
            elif start + 1 < count:
                dot_pairs(8, 2, words, some, sums)
            else:
                dot_pairs(8, 1, words, some, sums)
            for n in range(start, min(start + 2, count)):
                rows, products = out[n // terms, t * TILE : (t + 1) * TILE], sums[n - start]
                unit, total = units[b, n, 0], units[b, n, 1]
                for j in range(TILE):
                    rows[j] += step[j] * (unit * np.float32(products[j])) + low[j] * total


@compiled
def rows_of_halves(x, t, codes, out):
    """The same: x [R, C] by the upper halves of numbers, codes [C/2, 64]"""
    bits = np.empty((4, TILE), np.int32)
    w = bits.view(np.float32)
    b0, b1, b2, b3 = bits[0], bits[1], bits[2], bits[3]
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for c in range(0, x.shape[1], 4):
        front, back = codes[c // 2], codes[c // 2 + 1]
        for j in range(TILE):
            b0[j], b1[j] = front[j] << 16, front[j] & UPPER
            b2[j], b3[j] = back[j] << 16, back[j] & UPPER
        for r in range(len(x)):
            rows = out[r, t * TILE : (t + 1) * TILE]
            x0, x1, x2, x3 = x[r, c], x[r, c + 1], x[r, c + 2], x[r, c + 3]
            for j in range(TILE):
                rows[j] += x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]


@compiled
def multiply_tile(t, x, pairs, units, matrix, out):
    """Columns of tile t of out [R, N]: the bias, and the product added to it"""
    codes, scales, bias, _ = matrix
    for r in range(len(x)):
        rows = out[r, t * TILE : (t + 1) * TILE]
        for j in range(TILE):
            rows[j] = bias[t * TILE + j] if bias.size else np.float32(0)
    if scales.size:
        rows_of_few_bits(pairs, units, t, codes[t], scales[t], out)
    else:
        rows_of_halves(x, t, codes[t], out)


@partial(compiled, parallel=True)
def multiply(x, matrix, out):
    """x [R, C] by a packed matrix [N, C] -> out [R, N]"""
    pairs, units = in_pairs(x if matrix.scales.size else x[:0], matrix.terms)
    for t in prange(len(matrix.codes)):
        multiply_tile(np.int64(t), x, pairs, units, matrix, out)  # prange's t is another type


@compiled
def normed(x, weight, eps):
    """RMSNorm of x [R, C]."""
    out = np.empty_like(x)
    for r in range(len(x)):
        total = np.float32(0)
        for c in range(x.shape[1]):
            total += x[r, c] * x[r, c]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
        for c in range(x.shape[1]):
            out[r, c] = x[r, c] * scale * weight[c]
    return out


@partial(compiled, inline="always")  # as that compiles it once, and not for itself as well
def before(x, norm, eps, qkv, cos, sin, turned, out):
    """x [R, C] -> queries, keys and values of all heads, out [R, heads * D], the first `turned` of
    which are rotated by cos, sin [R, D]."""
    multiply(normed(x, norm, eps), qkv, out)
    D = cos.shape[1]
    for r in range(len(x)):
        for h in range(turned):
            head = out[r, h * D : (h + 1) * D]
            for i in range(D // 2):
                a, b = head[i], head[i + D // 2]
                head[i] = a * cos[r, i] + b * sin[r, i]
                head[i + D // 2] = b * cos[r, i + D // 2] + a * sin[r, i + D // 2]


@partial(compiled, inline="always")
def after(x, attended, o, norm, eps, gate_up, down):
    """x [R, C], the input of a layer, and what its heads attended to [R, H * D] -> its output, in
    the place of x"""
    R, C = x.shape
    back, both = np.empty_like(x), np.empty((R, len(gate_up[0]) * TILE), np.float32)
    multiply(attended, o, back)
    for r in range(R):
        for c in range(C):
            x[r, c] += back[r, c]
    multiply(normed(x, norm, eps), gate_up, both)
    M = both.shape[1] // 2
    hidden, decay = np.empty((R, M), np.float32), np.empty(M, np.float32)
    for r in range(R):
        gate, up = both[r, :M], both[r, M:]
        for m in range(M):
            decay[m] = -abs(gate[m]) * np.float32(LOG2E)
        powers(decay, np.float32(0))
        for m in range(M):  # silu: gate / (1 + exp(-gate))
            share = decay[m] if gate[m] < 0 else np.float32(1)
            hidden[r, m] = gate[m] * up[m] * share / (1 + decay[m])
    multiply(hidden, down, back)
    for r in range(R):
        for c in range(C):
            x[r, c] += back[r, c]


@compiled
def one_layer(x, cos, sin, tables, halves, layer, positions, tokens, first, qkv, o, second, gate_up,
          down, eps):
    """A layer: x [R, C], one token of each of R texts, -> its output, in the place of x.

    tables [2, L, R, G, capacity, D]: a float32 cache, or, as `halves`, one of bfloat16, to which
    the keys and values of these tokens are written at their `positions` [R]. Attended are the
    tokens [R * G, K], or, if that is empty, all."""
    R, D, G = len(x), cos.shape[1], tables.shape[3]
    H = qkv[0].shape[0] * TILE // D - 2 * G
    heads, q = np.empty((R, (H + 2 * G) * D), np.float32), np.empty((R, H * D), np.float32)
    before(x, first, eps[0], qkv, cos, sin, H + G, heads)
    for r in range(R):
        for i in range(H * D):  # (an array into an array takes Numba two seconds to compile)
            q[r, i] = heads[r, i]
        for i in range(2 * G):
            new = heads[r, (H + i) * D : (H + i + 1) * D]
            place = i // G, layer, r, i % G, positions[r]
            bits = new.view(np.int32)
            for d in range(D):
                if halves.size:  # to the upper half, the even neighbour in the middle
                    halves[place][d] = (bits[d] + 0x7FFF + (bits[d] >> 16 & 1)) >> 16
                else:
                    tables[place][d] = new[d]
    stride = tables.shape[4] * D  # from head to head
    newest = positions if tokens.shape[1] == 0 else positions[:0]
    longest = most(newest) + 1 if len(newest) else tokens.shape[1]
    out, rows = np.empty((R * G, H // G, D), np.float32), (R * G, H // G, D)
    attend_rows(q.reshape(rows), tables[0, layer].reshape(-1), tables[1, layer].reshape(-1),
                (halves[0, layer].reshape(-1), halves[1, layer].reshape(-1)), G, G * stride, stride,
                D, tokens, newest, longest, out)
    after(x, out.reshape((R, H * D)), o, second, eps[1], gate_up, down)


@compiled
def head(x, norm, eps, matrix, out):
    multiply(normed(x, norm, eps), matrix, out)


def few(x, limit=FEW) -> bool:
    """Is this [B, T, C] for these loops, which take so many tokens?"""
    return x.shape[0] * x.shape[1] <= limit and serves(x)


def limit(*matrices) -> int:
    """Up to how many tokens products with these take less time than PyTorch's: where weights have
    16 bits, that has instructions for them."""
    return FEW if all(m.scales.size for m in matrices) else 4


class PackedBlock:
    """What a model.Block does `before` attention and `after`, its matrices packed."""

    def __init__(self, block, matrices):
        self.matrices = self.qkv, self.o, self.gate_up, self.down = matrices
        H, G = block.self_attn.heads, block.self_attn.kv_heads
        self.sizes, self.heads, self.turned = (H, G, G), H + 2 * G, H + G
        self.limit = limit(*matrices)
        norms = block.input_layernorm, block.post_attention_layernorm
        self.first, self.second = ((numbers(norm.weight), norm.eps) for norm in norms)

    @classmethod
    def of(cls, block):
        """-> None if one of the matrices has no packed form"""
        a, m = block.self_attn, block.mlp
        matrices = [*map(pack, (a.qkv_proj, a.o_proj, m.gate_up_proj, m.down_proj))]
        return cls(block, matrices) if all(matrices) else None

    def before(self, x, cos, sin):
        """x [B, T, C] -> q [B, H, T, D], k, v [B, G, T, D], float32"""
        B, T, C = x.shape
        D = cos.shape[-1]
        out = torch.empty(B, T, self.heads, D)
        cos, sin = (t.expand(B, 1, T, D).reshape(B * T, D).numpy() for t in (cos, sin))
        run(before, x.float().view(B * T, C).numpy(), *self.first, self.qkv, cos, sin, self.turned,
            out.view(B * T, -1).numpy())
        return out.transpose(1, 2).split_with_sizes(self.sizes, dim=1)

    def after(self, x, attended):
        """x [B, T, C], the layer's input; attended [B, H, T, D] -> x [B, T, C] float32"""
        B, T, C = x.shape
        x = x.float().clone()
        rows = attended.float().transpose(1, 2).reshape(B * T, -1)
        run(after, x.view(B * T, C).numpy(), rows.numpy(), self.o, *self.second, self.gate_up,
            self.down)
        return x


class PackedLayers:
    """All layers of a decode step, each in one compiled call, attention and cache included."""

    def __init__(self, blocks):
        self.weights = [(b.first[0], b.qkv, b.o, b.second[0], b.gate_up, b.down,
                         (b.first[1], b.second[1])) for b in blocks]
        self.limit = min(b.limit for b in blocks)

    @classmethod
    def of(cls, layers):
        """-> None if one of the matrices has no packed form"""
        blocks = [layer.packed for layer in layers]
        return cls(blocks) if all(blocks) else None

    def serve(self, x, cache, selector) -> bool:
        """True for one token of each text, a cache that has all keys in one table, and a selector
        that chooses before a layer's queries are there."""
        early = getattr(selector, "early", None)  # what watches a prompt has none
        return (x.shape[1] == 1 and few(x, self.limit) and cache.tables is not None
                and serves(cache.tables)
                and (selector is None or bool(early) and early(cache.size)))

    def __call__(self, x, rope, positions, cache, selector):
        """x [B, 1, C] -> [B, 1, C] float32"""
        B, _, C = x.shape
        x, tables = x.float().clone(), cache.tables
        seen = tables[0].narrow(3, 0, cache.size + 1).unbind() if selector else ()
        rows, turn = x.view(B, C).numpy(), [t.view(B, -1).numpy() for t in rope]
        at, all_of_them = positions.view(B).numpy(), np.empty((B * tables.shape[3], 0), np.int32)
        if tables.dtype == torch.float32:
            tables = tables.numpy(), np.empty((*tables.shape[:-1], 0), np.int16)
        else:
            tables = np.empty((*tables.shape[:-1], 0), np.float32), tables.view(torch.int16).numpy()
        for layer, weights in enumerate(self.weights):
            index = selector(layer, x, None, seen[layer], positions) if selector else None
            tokens = all_of_them if index is None else index.numpy().reshape(-1, index.shape[3])
            run(one_layer, rows, *turn, *tables, layer, at, tokens, *weights)
        return x


class PackedHead:
    """The last norm and the matrix of the logits."""

    def __init__(self, norm, matrix):
        self.norm, self.matrix, self.limit = (numbers(norm.weight), norm.eps), matrix, limit(matrix)

    @classmethod
    def of(cls, norm, linear):
        """-> None if the matrix has no packed form"""
        matrix = pack(linear)
        return matrix and cls(norm, matrix)

    def __call__(self, x):
        """x [B, T, C] -> logits [B, T, V] float32"""
        B, T, C = x.shape
        out = torch.empty(B, T, len(self.matrix.codes) * TILE)
        run(head, x.float().reshape(B * T, C).numpy(), *self.norm, self.matrix,
            out.view(B * T, -1).numpy())
        return out


if __name__ == "__main__":
    from timeit import repeat

    from model import Llama, resolve

    llama = Llama.from_pretrained(resolve())
    c = llama.config
    x, attended = torch.randn(1, 1, c.width), torch.randn(1, c.heads, 1, c.head_dim)
    turn = attended[:, :1, 0]
    for form in "float32, PyTorch", "packed, compiled":
        def layers(form=form):
            for block in llama.layers:
                half = block.packed if form.startswith("packed") else block
                half.before(x, turn, turn), half.after(x, attended)

        best = min(repeat(layers, number=1, repeat=8))  # the first one packs and compiles
        print(f"{form}: {1e3 * best:.1f} ms, all layers of a step but their attention")
