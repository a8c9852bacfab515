"""fast/packed.py - weights in 4, 8 or 16 bits, and one decode step of a layer in one compiled call.

    x [C] --norm, q k v, rope--> cache, attention [H * D] --o, norm, MLP--> x [C]     one_layer
    x [C] ----------------------norm, lm_head----------------------> logits [V]       head

A product with a single token takes as long as reading the matrix, so fewer bits are faster. Most
files have few: in GGUF's Q4_1 each group of 32 weights has 16 evenly spaced values, in Q8_0 whole
multiples of one number, and most safetensors files are bfloat16. `pack` finds the smallest such
form that is the same matrix, whatever type PyTorch holds it in.

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

from fast.loops import LOG2E, attend, compiled, exp2_in_place, prange, run
from fast.pairs import PAIRS, TILE, dot_pairs

GROUP = 2 * PAIRS  # channels that share a step
UPPER_HALF = np.int32(-(2**16))


class Packed(NamedTuple):
    """A matrix [N, C].

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


def pack(*linears) -> Packed | None:
    """Linear layers with the same input, stacked into one matrix; None if the weights need more
    than 16 bits, or sizes are no multiples of 32 channels and 64 rows."""
    w = torch.cat([linear.weight for linear in linears])
    N, C = w.shape
    if C % GROUP or N % TILE:
        return None
    bias = np.empty(0, np.float32)
    if linears[0].bias is not None:
        bias = as_float32(torch.cat([linear.bias for linear in linears]))
    # A weight that was rounded to bfloat16 is only near its code.
    tolerance = 2.0**-7 if w.dtype == torch.bfloat16 else 2.0**-15
    terms = 1 if w.dtype == torch.bfloat16 else 2
    w = as_float32(w)
    for bits in (4, 8, 16):
        codes = np.empty((N // TILE, C * bits // 32, TILE), np.int32)
        scales = np.empty((N // TILE, C // GROUP if bits < 16 else 0, 2, TILE), np.float32)
        fits = np.ones(N // TILE, np.bool_)
        # Most matrices without such a form show it in their first 64 rows.
        for some in (slice(1), slice(None)):
            run(encode, w, bits, tolerance, codes[some], scales[some], fits[some])
            if not fits[some].all():
                break
        else:
            return Packed(codes, scales, bias, terms)
    return None


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


# ---------------------------------------------------------------------------- a layer


@compiled
def rms_norm(x, weight, eps):
    out = np.empty_like(x)
    total = np.float32(0)
    for c in range(len(x)):
        total += x[c] * x[c]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for c in range(len(x)):
        out[c] = x[c] * scale * weight[c]
    return out


@compiled
def rotate(head, cos, sin):
    """model.apply_rope of one head [D], in place."""
    half = len(head) // 2
    for i in range(half):
        a = head[i]
        b = head[i + half]
        head[i] = a * cos[i] + b * sin[i]
        head[i + half] = b * cos[i + half] + a * sin[i + half]


@compiled
def mlp(x, gate_up, down, out):
    """Normed x [C] -> out [C]"""
    both = np.empty(len(gate_up.codes) * TILE, np.float32)
    multiply(x, gate_up, both)
    M = len(both) // 2
    gate = both[:M]
    up = both[M:]
    hidden = np.empty(M, np.float32)
    decay = np.empty(M, np.float32)
    for m in range(M):
        decay[m] = -abs(gate[m]) * np.float32(LOG2E)
    exp2_in_place(decay, np.float32(0))
    for m in range(M):  # silu: gate / (1 + exp(-gate)), where decay is exp(-|gate|)
        share = decay[m] if gate[m] < 0 else np.float32(1)
        hidden[m] = gate[m] * up[m] * share / (1 + decay[m])
    multiply(hidden, down, out)


@compiled
def one_layer(x, cos, sin, k, v, position, idx, weights):
    """model.Block for one token, in place.

    x [C]; cos, sin [D]; k, v [G, capacity, D], the layer's cache, to which the token's key and
    value are written; idx [G, K]: the tokens attended to, all up to `position` if K is 0.
    """
    C = len(x)
    G, capacity, D = k.shape
    heads = np.empty(len(weights.qkv.codes) * TILE, np.float32)
    multiply(rms_norm(x, weights.first_norm, weights.first_eps), weights.qkv, heads)
    H = len(heads) // D - 2 * G
    for h in range(H + G):
        rotate(heads[h * D : (h + 1) * D], cos, sin)
    for g in range(G):
        key = heads[(H + g) * D : (H + g + 1) * D]
        value = heads[(H + G + g) * D : (H + G + g + 1) * D]
        for d in range(D):
            k[g, position, d] = key[d]
            v[g, position, d] = value[d]
    attended = np.empty((G, H // G, D), np.float32)
    attend(heads[: H * D].reshape(attended.shape), k, v, idx, position + 1, attended)
    out = np.empty_like(x)
    multiply(attended.reshape(H * D), weights.o, out)
    for c in range(C):
        x[c] += out[c]
    mlp(rms_norm(x, weights.second_norm, weights.second_eps), weights.gate_up, weights.down, out)
    for c in range(C):
        x[c] += out[c]


@compiled
def head(x, norm, eps, matrix, out):
    """x [C] -> logits, out [V]"""
    multiply(rms_norm(x, norm, eps), matrix, out)


class PackedLayer(NamedTuple):
    """The weights of a model.Block."""

    first_norm: np.ndarray
    first_eps: float
    qkv: Packed
    o: Packed
    second_norm: np.ndarray
    second_eps: float
    gate_up: Packed
    down: Packed

    @classmethod
    def of(cls, block) -> "PackedLayer | None":
        """None if a matrix has no packed form."""
        a = block.self_attn
        m = block.mlp
        first = block.input_layernorm
        second = block.post_attention_layernorm
        layer = cls(as_float32(first.weight), first.eps, pack(a.q_proj, a.k_proj, a.v_proj),
                    pack(a.o_proj), as_float32(second.weight), second.eps,
                    pack(m.gate_proj, m.up_proj), pack(m.down_proj))
        return None if None in (layer.qkv, layer.o, layer.gate_up, layer.down) else layer


class PackedModel:
    """All weights that a decode step reads, but for the embedding."""

    def __init__(self, layers: list[PackedLayer], norm, lm_head: Packed):
        self.layers = layers
        self.norm = as_float32(norm.weight)
        self.norm_eps = norm.eps
        self.lm_head = lm_head

    @classmethod
    def of(cls, llama) -> "PackedModel | None":
        """None if a matrix has no packed form."""
        layers = []
        for block in llama.layers:
            layers.append(PackedLayer.of(block))
            if layers[-1] is None:
                return None
        lm_head = pack(llama.lm_head)
        return lm_head and cls(layers, llama.norm, lm_head)

    @property
    def nbytes(self) -> int:
        numbers = [number for layer in self.layers for number in layer] + [self.norm, self.lm_head]
        return sum(getattr(number, "nbytes", 0) for number in numbers)

    def logits(self, x) -> torch.Tensor:
        """x [C], the output of the last layer -> [V] float32"""
        logits = torch.empty(len(self.lm_head.codes) * TILE)
        run(head, x, self.norm, self.norm_eps, self.lm_head, logits.numpy())
        return logits


if __name__ == "__main__":
    from timeit import repeat

    import model
    from tokenizer import resolve

    llama = model.Llama.from_pretrained(resolve())
    packed = PackedModel.of(llama)
    x = np.random.default_rng(0).standard_normal(llama.config.width, np.float32)
    wide = np.zeros(llama.config.mlp_width, np.float32)
    heads = np.zeros(llama.config.heads * llama.config.head_dim, np.float32)

    def products():
        for layer in packed.layers:
            for matrix, of in ((layer.qkv, x), (layer.o, heads), (layer.gate_up, x),
                               (layer.down, wide)):
                run(multiply, of, matrix, np.empty(len(matrix.codes) * TILE, np.float32))
        packed.logits(x)

    best = min(repeat(products, number=1, repeat=9))  # the first one compiles
    print(f"{packed.nbytes / 1e6:.1f} MB of packed weights, in float32 "
          f"{llama.weight_bytes() / 1e6:.1f} MB; products of a step {1e3 * best:.2f} ms")
