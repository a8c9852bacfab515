"""cpu/packed.py - a token's way through a layer, in compiled loops on weights of few bits.

    x [R, C] -before-> q, k, v [R, H + 2 G, D] -> attention [R, H, D] -after-> x [R, C]
    x [R, C] ---------------------- one_layer: cache and attention too -----> x [R, C]
    x [R, C] -head-> logits [R, V]                         R: a few tokens, of one or many texts

One token's product with a matrix takes as long as reading the matrix. Most files have it in fewer
bits than PyTorch multiplies: GGUF's Q4_1 has 16 evenly spaced values for every 32 weights in a row,
Q8_0 whole multiples up to 127 of one number, most safetensors files bfloat16. So beside the weights
for long blocks of tokens, and when the first single token comes, a copy is made in 4, 8 or 16 bits,
which is the same matrix exactly; activations stay float32. 64 rows of the matrix lie side by side:
a channel's input is one number for all of them, and no sum runs across a vector.

What lies between the products takes PyTorch as long as these; here it is part of the same loops,
and a decode step calls one of them a layer. model.py defines what they compute, and does it where
weights have no such form, or tokens are many.

    python -m cpu.packed        milliseconds of a step without its attention, here and in PyTorch
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from cpu.loops import FEW, LOG2E, attend_rows, compiled, powers, prange, run, serves

TILE, GROUP = 64, 32  # rows of a matrix side by side; weights of a row with one scale


class Packed(NamedTuple):
    """A matrix [N, C]: codes of 4, 8 or 16 bits, bytes [N/64, C/2 or C or 2 C, 64]; scales [N/64,
    C/32, 2, 64], step and offset, or none with 16 bits; bias [N] or none."""

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray


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
        codes = np.empty((N // TILE, C * bits // 8, TILE), np.uint8)
        scales = np.empty((N // TILE, C // GROUP if bits < 16 else 0, 2, TILE), np.float32)
        fits = np.ones(N // TILE, np.bool_)
        # most matrices that have no such form show it in their first rows
        for part in (slice(1), slice(None)):
            run(encode, rows, bits, exact, codes[part], scales[part], fits[part])
            if not fits[part].all():
                break
        else:
            return Packed(codes, scales, bias)
    return None


def numbers(tensor):
    return tensor.detach().float().contiguous().numpy()


@compiled
def encode(w, bits, exact, codes, scales, fits):
    """Weights [N, C] -> codes, scales, and which tiles of 64 rows are `exact`, relative to their
    numbers' size."""
    for t in prange(len(codes)):
        for r in range(TILE):
            row = w[t * TILE + r]
            words = row.view(np.uint32)
            for c in range(len(row) if bits == 16 else 0):
                codes[t, 2 * c, r], codes[t, 2 * c + 1, r] = words[c] >> 16 & 255, words[c] >> 24
                fits[t] &= words[c] & 0xFFFF == 0
            for b in range(scales.shape[1]):
                group = row[b * GROUP : (b + 1) * GROUP]
                largest = np.abs(group).max()
                if bits == 4:
                    low = group.min()
                    step = max((group.max() - low) / np.float32(15), np.float32(1e-12))
                else:
                    step = max(largest / np.float32(127), np.float32(1e-12))
                    low = -128 * step
                scales[t, b, 0, r], scales[t, b, 1, r] = step, low
                for i in range(GROUP):
                    code = np.rint((group[i] - low) / step)
                    size = largest if bits == 4 else abs(group[i]) + step
                    fits[t] &= abs(code * step + low - group[i]) <= exact * size
                    c = b * GROUP + i
                    if bits == 8:
                        codes[t, c, r] = np.uint8(code)
                    elif c % 2 == 0:
                        codes[t, c // 2, r] = np.uint8(code)
                    else:
                        codes[t, c // 2, r] |= np.uint8(code) << 4


@partial(compiled, parallel=False)
def rows_4(x, codes, scales, out):
    """64 rows: x [C] by codes [C/2, 64] of 4 bits and scales [C/32, 2, 64] -> out [64]"""
    part = np.empty(TILE, np.float32)
    out[:] = 0.0
    for b in range(len(scales)):
        part[:], s = 0.0, np.float32(0)
        for c in range(b * GROUP, (b + 1) * GROUP, 4):
            x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
            k0, k1 = codes[c // 2], codes[c // 2 + 1]
            s += (x0 + x1) + (x2 + x3)
            for j in range(TILE):
                part[j] += (x0 * np.float32(np.int32(k0[j] & 15))
                            + x1 * np.float32(np.int32(k0[j] >> 4))
                            + x2 * np.float32(np.int32(k1[j] & 15))
                            + x3 * np.float32(np.int32(k1[j] >> 4)))
        step, low = scales[b, 0], scales[b, 1]
        for j in range(TILE):
            out[j] += step[j] * part[j] + low[j] * s


@partial(compiled, parallel=False)
def rows_8(x, codes, scales, out):
    """The same by codes [C, 64] of 8 bits; apart, as a loop for both has half the speed."""
    part = np.empty(TILE, np.float32)
    out[:] = 0.0
    for b in range(len(scales)):
        part[:], s = 0.0, np.float32(0)
        for c in range(b * GROUP, (b + 1) * GROUP, 4):
            x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
            k0, k1, k2, k3 = codes[c], codes[c + 1], codes[c + 2], codes[c + 3]
            s += (x0 + x1) + (x2 + x3)
            for j in range(TILE):
                part[j] += (x0 * np.float32(k0[j]) + x1 * np.float32(k1[j])
                            + x2 * np.float32(k2[j]) + x3 * np.float32(k3[j]))
        step, low = scales[b, 0], scales[b, 1]
        for j in range(TILE):
            out[j] += step[j] * part[j] + low[j] * s


@partial(compiled, parallel=False)
def rows_16(x, codes, out):
    """The same by the upper halves of numbers, byte by byte [2 C, 64]."""
    bits = np.empty((4, TILE), np.uint32)
    w = bits.view(np.float32)
    out[:] = 0.0
    for c in range(0, len(x), 4):
        x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
        for i in range(4):
            low, high, b = codes[2 * (c + i)], codes[2 * (c + i) + 1], bits[i]
            for j in range(TILE):
                b[j] = np.uint32(high[j]) << 24 | np.uint32(low[j]) << 16
        w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
        for j in range(TILE):
            out[j] += x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]


@compiled
def multiply(x, matrix, out):
    """x [R, C] by a packed matrix [N, C] -> out [R, N]; four channels at a time."""
    codes, scales, bias = matrix
    for t in prange(len(codes)):
        for r in range(len(x)):
            rows = out[r, t * TILE : (t + 1) * TILE]
            if codes.shape[1] < x.shape[1]:
                rows_4(x[r], codes[t], scales[t], rows)
            elif scales.size:
                rows_8(x[r], codes[t], scales[t], rows)
            else:
                rows_16(x[r], codes[t], rows)
            if bias.size:
                rows += bias[t * TILE : (t + 1) * TILE]


@partial(compiled, parallel=False)
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


@partial(compiled, parallel=False)
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


@partial(compiled, parallel=False)
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


@partial(compiled, parallel=False)
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
    most = positions.max() + 1 if len(newest) else tokens.shape[1]
    out, rows = np.empty((R * G, H // G, D), np.float32), (R * G, H // G, D)
    attend_rows(q.reshape(rows), tables[0, layer].reshape(-1), tables[1, layer].reshape(-1),
             (halves[0, layer].reshape(-1), halves[1, layer].reshape(-1)), G, G * stride, stride, D,
             tokens, newest, most, out)
    after(x, out.reshape((R, H * D)), o, second, eps[1], gate_up, down)


@partial(compiled, parallel=False)
def head(x, norm, eps, matrix, out):
    multiply(normed(x, norm, eps), matrix, out)


def few(x) -> bool:
    """Is this [B, T, C] for these loops?"""
    return x.shape[0] * x.shape[1] <= FEW and serves(x)


class PackedBlock:
    """What a model.Block does `before` attention and `after`, its matrices packed."""

    def __init__(self, block, matrices):
        self.matrices = self.qkv, self.o, self.gate_up, self.down = matrices
        H, G = block.self_attn.heads, block.self_attn.kv_heads
        self.sizes, self.heads, self.turned = (H, G, G), H + 2 * G, H + G
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

    @classmethod
    def of(cls, layers):
        """-> None if one of the matrices has no packed form"""
        blocks = [layer.packed for layer in layers]
        return cls(blocks) if all(blocks) else None

    def serve(self, x, cache, selector) -> bool:
        """True for one token of each text, a cache that has all keys in one table, and a selector
        that chooses before a layer's queries are there."""
        early = getattr(selector, "early", None)  # what watches a prompt has none
        return (x.shape[1] == 1 and cache.tables is not None and serves(cache.tables)
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
        self.norm, self.matrix = (numbers(norm.weight), norm.eps), matrix

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
