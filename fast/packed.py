"""fast/packed.py - weights in 4, 8 or 16 bits, and their product with one token.

    the same matrix of all layers --pack--> codes, scales          x [C] --multiply--> out [N]

A product with a single token takes as long as reading the matrix, so fewer bits are faster. Most
files have few: in GGUF's Q4_1 each group of 32 weights has 16 evenly spaced values, in Q8_0 whole
multiples of one number, and most safetensors files are bfloat16. `pack` finds the smallest such
form that is the same matrix in all layers, whatever type PyTorch holds it in.

    weight  = code * step + low                 one step and low per row and group of 32 channels
    product = step * (codes . x) + low * sum(x)

Codes of 4 and 8 bits are multiplied as integers (fast/pairs.py). For that, each group of 32
activations becomes whole multiples of one number, up to 32,767. This rounds a product by 2e-5 of
its size: a hundredth of what bfloat16 loses, and enough for bfloat16 models. In float32 models a
second term has what the first one left out; without it, logits of the default model are off by up
to 6e-3.

    python -m fast.packed        milliseconds of the packed matrices of a step
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fast.loops import compiled, prange, run
from fast.pairs import PAIRS, TILE, dot_pairs

GROUP = 2 * PAIRS  # channels that share a step
UPPER_HALF = np.int32(-(2**16))


class Packed(NamedTuple):
    """A matrix [N, C]; with one more dimension in front, [L, ...], the same matrix of all layers.

    codes   [N/64, C * bits/32, 64] int32: 64 rows side by side, words as in fast/pairs.py
    scales  [N/64, C/32, 2, 64] float32: step and low; with 16 bits [N/64, 0, 2, 64]
    bias    [N] float32, or [0]
    terms   16-bit terms per activation
    """

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    terms: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.bias.nbytes


# ---------------------------------------------------------------------------- packing


def as_float32(tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def pack(layers) -> Packed | None:
    """One matrix of all layers. A layer is a list of linear layers with the same input, which are
    stacked. None if the weights need more than 16 bits, or sizes are no multiples of 32 channels
    and 64 rows."""
    L = len(layers)
    N = sum(linear.out_features for linear in layers[0])
    C = layers[0][0].in_features
    dtype = layers[0][0].weight.dtype
    if C % GROUP or N % TILE:
        return None
    bias = np.empty((L, 0), np.float32)
    if layers[0][0].bias is not None:
        bias = np.stack([as_float32(torch.cat([part.bias for part in parts])) for parts in layers])
    # A weight that was rounded to bfloat16 is only near its code.
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-15
    terms = 1 if dtype == torch.bfloat16 else 2
    for bits in (4, 8, 16):
        codes = np.empty((L, N // TILE, C * bits // 32, TILE), np.int32)
        scales = np.empty((L, N // TILE, C // GROUP if bits < 16 else 0, 2, TILE), np.float32)
        if all(encode_layer(parts, bits, tolerance, codes[n], scales[n])
               for n, parts in enumerate(layers)):
            return Packed(codes, scales, bias, terms)
    return None


def encode_layer(parts, bits, tolerance, codes, scales) -> bool:
    """Writes codes and scales of one layer; returns whether they are the weights."""
    w = as_float32(torch.cat([part.weight for part in parts]))
    fits = np.ones(len(codes), np.bool_)
    # Most matrices without such a form show it in their first 64 rows.
    for some in (slice(1), slice(None)):
        run(encode, w, bits, tolerance, codes[some], scales[some], fits[some])
        if not fits[some].all():
            return False
    return True


@compiled
def encode_tile(w, bits, tolerance, codes, scales):
    """w [64, C] -> codes, scales; returns whether these are the weights."""
    per_word = 32 // bits
    fits = True
    codes[:] = 0
    for r in range(TILE):
        words = w[r].view(np.int32)
        if bits == 16:  # the upper half of a float32 is a bfloat16
            for c in range(len(words)):
                codes[c // 2, r] |= (words[c] >> 16 & 0xFFFF) << 16 * (c % 2)
                fits &= words[c] & 0xFFFF == 0
        for b in range(len(scales)):
            group = w[r, b * GROUP : (b + 1) * GROUP]
            low = np.inf
            high = -np.inf
            for i in range(GROUP):
                low = min(low, group[i])
                high = max(high, group[i])
            largest = max(-low, high)
            if bits == 4:
                step = max((high - low) / 15, 1e-12)
            else:
                step = max(largest / 127, 1e-12)
                low = -128 * step
            scales[b, 0, r] = step
            scales[b, 1, r] = low
            for i in range(GROUP):
                code = np.rint((group[i] - low) / step)
                size = largest if bits == 4 else abs(group[i]) + step
                fits &= abs(code * step + low - group[i]) <= tolerance * size
                place = i % per_word // 2 * bits + i % 2 * 16
                codes[b * bits + i // per_word, r] |= np.int32(code) << place
    return fits


@partial(compiled, parallel=True)
def encode(w, bits, tolerance, codes, scales, fits):
    """Weights [N, C] -> codes, scales, and for each tile of 64 rows whether they are the weights"""
    for t in prange(len(codes)):
        fits[t] = encode_tile(w[t * TILE : (t + 1) * TILE], bits, tolerance, codes[t], scales[t])


# ---------------------------------------------------------------------------- products


@compiled
def to_pairs(x, terms):
    """x [C] -> pairs [C/32, terms, 16] int32, and units [C/32, terms, 2]: the number that the
    integers are multiples of, and that number times their sum. A second term is what the first one
    leaves."""
    groups = len(x) // GROUP
    limit = np.float32(2**15 - 1)
    integers = np.empty((groups, terms, GROUP), np.int16)
    units = np.empty((groups, terms, 2), np.float32)
    x_bits = x.view(np.int32)
    unit_bits = units.view(np.int32)
    rest = np.empty(GROUP, np.float32)
    for b in range(groups):
        # Without the sign, the bits of floats have the order of the floats, and so has a NaN.
        largest = np.int32(0)
        for i in range(b * GROUP, (b + 1) * GROUP):
            largest = max(largest, x_bits[i] & np.int32(0x7FFFFFFF))
        unit_bits[b, 0, 0] = largest
        unit = (units[b, 0, 0] + np.float32(1e-30)) / limit  # not 0
        for i in range(GROUP):
            rest[i] = x[b * GROUP + i] * (np.float32(1) / unit)
        for t in range(terms):
            to = integers[b, t]
            total = np.int32(0)
            for i in range(GROUP):
                number = np.rint(rest[i])
                to[i] = np.int16(number)
                total += to[i]
                rest[i] = (rest[i] - number) * limit
            units[b, t, 0] = unit
            units[b, t, 1] = unit * np.float32(total)
            unit /= limit
    return integers.view(np.int32), units


@compiled
def add_integer_products(pairs, units, codes, scales, out):
    """One tile with 4- or 8-bit codes: codes [C * bits/32, 64], scales [C/32, 2, 64]; adds to out
    [64]."""
    terms = units.shape[1]
    bits = len(codes) // len(scales)
    sums = np.empty((2, TILE), np.int32)
    for b in range(len(scales)):
        words = codes[b * bits : (b + 1) * bits]
        step = scales[b, 0]
        low = scales[b, 1]
        if bits == 4 and terms == 1:  # literals, see dot_pairs
            dot_pairs(4, 1, words, pairs[b], sums)
        elif bits == 4:
            dot_pairs(4, 2, words, pairs[b], sums)
        elif terms == 1:
            dot_pairs(8, 1, words, pairs[b], sums)
        else:
            dot_pairs(8, 2, words, pairs[b], sums)
        for t in range(terms):
            products = sums[t]
            unit = units[b, t, 0]
            total = units[b, t, 1]
            for j in range(TILE):
                out[j] += step[j] * (unit * np.float32(products[j])) + low[j] * total


@compiled
def add_bfloat16_products(x, codes, out):
    """One tile with 16-bit codes: x [C], codes [C/2, 64]; adds to out [64]."""
    bits = np.empty((4, TILE), np.int32)
    w = bits.view(np.float32)
    b0, b1, b2, b3 = bits[0], bits[1], bits[2], bits[3]
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for c in range(0, len(x), 4):
        front = codes[c // 2]
        back = codes[c // 2 + 1]
        for j in range(TILE):
            b0[j] = front[j] << 16
            b1[j] = front[j] & UPPER_HALF
            b2[j] = back[j] << 16
            b3[j] = back[j] & UPPER_HALF
        x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
        for j in range(TILE):
            out[j] += x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]


@compiled
def of_layer(matrices, layer):
    """One matrix of a Packed of all layers."""
    return Packed(matrices.codes[layer], matrices.scales[layer], matrices.bias[layer],
                  matrices.terms)


@compiled
def multiply_tile(t, x, pairs, units, matrix, out):
    codes, scales, bias, terms = matrix
    rows = out[t * TILE : (t + 1) * TILE]
    for j in range(TILE):
        rows[j] = bias[t * TILE + j] if bias.size else np.float32(0)
    if scales.size:
        add_integer_products(pairs, units, codes[t], scales[t], rows)
    else:
        add_bfloat16_products(x, codes[t], rows)


@partial(compiled, parallel=True)
def multiply(x, matrix, out):
    """x [C] by a packed matrix [N, C] -> out [N]"""
    pairs, units = to_pairs(x if matrix.scales.size else x[:0], matrix.terms)
    for t in prange(len(matrix.codes)):
        multiply_tile(np.int64(t), x, pairs, units, matrix, out)  # prange's t has another type


if __name__ == "__main__":
    from timeit import repeat

    import model
    from tokenizer import resolve

    llama = model.Llama.from_pretrained(resolve())
    mlps = [block.mlp for block in llama.layers]
    matrices = [pack([[mlp.gate_proj, mlp.up_proj] for mlp in mlps]),
                pack([[mlp.down_proj] for mlp in mlps])]
    inputs = np.ones(llama.config.width, np.float32), np.ones(llama.config.mlp_width, np.float32)

    def products():
        for x, matrix in zip(inputs, matrices, strict=True):
            for layer in range(llama.config.layers):
                out = np.empty(matrix.codes.shape[1] * TILE, np.float32)
                run(multiply, x, of_layer(matrix, layer), out)

    best = min(repeat(products, number=1, repeat=9))  # the first one compiles
    print(f"MLPs of all layers: {sum(matrix.nbytes for matrix in matrices) / 1e6:.1f} MB packed; "
          f"their products take {1e3 * best:.2f} ms")
