"""fast/packed.py - weights in 4, 8 or 16 bits, and their product with one token.

    a GGUF file  --read_codes--> codes, step, low  --pack--> Packed
                                                         x [C], Packed --multiply--> out [N]

A product with a single token takes as long as reading the matrix, so fewer bits are faster. Most
GGUF files have few: in Q4_0, Q4_1 and Q8_0 each group of 32 weights has 16 or 256 evenly spaced
values. Their codes and scales are used as they stand in the file. All other matrices take 16 bits,
as in most safetensors files, which are bfloat16.

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

import model
from fast.loops import compiled, prange, run
from fast.pairs import PAIRS, TILE, dot_pairs
from tokenizer import open_gguf

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


# ---------------------------------------------------------------------------- files

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # of the types of tensors whose codes are read


def gguf_tensors(llama, path) -> dict:
    """{linear layer: the tensor of a GGUF file with its weights}"""
    tensors = {}
    for t in open_gguf(path).tensors:
        *block, stem, end = t.name.split(".")  # blk.3.attn_q.weight, output.weight
        name = model.GGUF_NAMES.get(stem, stem)
        if end == "weight":
            tensors[f"layers.{block[1]}.{name}" if block else name] = t
    if llama.config.tied:
        tensors["lm_head"] = tensors["embed_tokens"]
    return {module: tensors[name] for name, module in llama.named_modules()
            if isinstance(module, torch.nn.Linear)}


def read_codes(tensor):
    """A tensor of a GGUF file, of a type in BITS -> codes [N, C] uint8; step, low [N, C/32] float32

    A group begins with its step and, in Q4_1, its low, in 16 bits each. Of 4-bit codes, the first
    16 are in the lower halves of 16 bytes.
    """
    kind = tensor.tensor_type.name
    head = 4 if kind == "Q4_1" else 2
    groups = torch.tensor(tensor.data)  # bytes
    groups = groups.unflatten(1, (-1, head + GROUP * BITS[kind] // 8))  # [N, C/32, bytes]
    scales = groups[..., :head].contiguous().view(torch.float16).float()
    step = scales[..., 0]
    codes = groups[..., head:]
    if kind == "Q8_0":  # the bytes of -128 ... 127
        return (codes ^ 128).flatten(1), step, -128 * step
    codes = torch.cat([codes & 15, codes >> 4], dim=-1).flatten(1)
    if kind == "Q4_0":
        return codes, step, -8 * step
    return codes, step, scales[..., 1]


def undo_permutation(rows, head_dim: int):
    """The rows [N, ..] of q or k in a GGUF file, in model.py's order; see model.read_gguf."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------------------- packing


def as_float32(tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


def pack(layers, tensors, head_dim=0) -> Packed | None:
    """One matrix of all layers.

    layers     for each layer a list of linear layers with the same input, which are stacked
    tensors    {linear layer: tensor of a GGUF file}
    head_dim   of the linear layers q_proj and k_proj, the first two, whose rows a file permutes

    None if the weights need more than 16 bits, or sizes are no multiples of 32 channels and 64
    rows.
    """
    first = layers[0]
    dtype = first[0].weight.dtype
    N = sum(linear.out_features for linear in first)
    C = first[0].in_features
    if C % GROUP or N % TILE:
        return None
    bits = max(bits_of(tensors.get(linear)) for parts in layers for linear in parts)
    L = len(layers)
    codes = np.empty((L, N // TILE, C * bits // 32, TILE), np.int32)
    scales = np.empty((L, N // TILE, C // GROUP if bits < 16 else 0, 2, TILE), np.float32)
    for n, parts in enumerate(layers):
        if bits == 16:
            w = torch.cat([linear.weight for linear in parts])
            # The first rows tell most matrices that need more.
            if not (is_bfloat16(w[:TILE]) and is_bfloat16(w)):
                return None
            words = w.bfloat16().view(torch.int32)  # [N, C/2]
        else:
            read = [read_codes(tensors[linear]) for linear in parts]
            if head_dim:
                read[:2] = [[undo_permutation(rows, head_dim) for rows in part]
                            for part in read[:2]]
            code, step, low = (torch.cat(rows) for rows in zip(*read, strict=True))
            words = to_words(code, bits)
            scales[n] = in_tiles(torch.stack([step, low], dim=2))
        codes[n] = in_tiles(words)
    bias = np.empty((L, 0), np.float32)
    if first[0].bias is not None:
        bias = np.stack([as_float32(torch.cat([part.bias for part in parts])) for parts in layers])
    return Packed(codes, scales, bias, 1 if dtype == torch.bfloat16 else 2)


def bits_of(tensor) -> int:
    return BITS.get(tensor.tensor_type.name, 16) if tensor else 16


def is_bfloat16(w) -> bool:
    return torch.equal(w.bfloat16().to(w), w)


def in_tiles(rows):
    """[N, ..] -> [N/64, .., 64]"""
    return rows.unflatten(0, (-1, TILE)).movedim(1, -1)


def to_words(codes, bits: int):
    """uint8 codes [N, C] of 4 or 8 bits -> words as in fast/pairs.py, [N, C * bits/32] int32"""
    if bits == 4:
        codes = codes.unflatten(1, (-1, 2, 2))  # [N, C/4, 2 halves of a byte, even and odd]
        codes = codes[:, :, 0] | codes[:, :, 1] << 4
    codes = codes.reshape(len(codes), -1, 2, 2)  # [N, words, 2 bytes, even and odd]
    return codes.transpose(2, 3).flatten(1).view(torch.int32)


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

    from tokenizer import resolve

    llama = model.Llama.from_pretrained(resolve())
    tensors = gguf_tensors(llama, resolve())
    mlps = [block.mlp for block in llama.layers]
    matrices = [pack([[mlp.gate_proj, mlp.up_proj] for mlp in mlps], tensors),
                pack([[mlp.down_proj] for mlp in mlps], tensors)]
    inputs = np.ones(llama.config.width, np.float32), np.ones(llama.config.mlp_width, np.float32)

    def products():
        for x, matrix in zip(inputs, matrices, strict=True):
            for layer in range(llama.config.layers):
                out = np.empty(matrix.codes.shape[1] * TILE, np.float32)
                run(multiply, x, of_layer(matrix, layer), out)

    best = min(repeat(products, number=1, repeat=9))  # the first one compiles
    print(f"MLPs of all layers: {sum(matrix.nbytes for matrix in matrices) / 1e6:.1f} MB packed; "
          f"their products take {1e3 * best:.2f} ms")
