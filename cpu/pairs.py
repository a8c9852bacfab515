"""cpu/pairs.py - the one instruction that cpu/packed.py needs and plain loops do not become.

    words [bits, 64] int32, x [rows, 16], each two int16 -> sums [rows, 64] int32

Processors multiply pairs of 16-bit integers and add the two products of each, 8 or 16 pairs in one
instruction (x86: `vpmaddwd`). A weight of 4 or 8 bits is such an integer as it is; a product of
float32 numbers needs it converted first. `plain` defines what is computed, and does it where a
processor is no x86 with AVX2. Elsewhere Numba takes `dot_pairs` from here in LLVM's own terms: sums
stay in registers, the rows of a matrix lie side by side in a vector.

    python -m cpu.pairs        nanoseconds of both
"""

from functools import partial

import numpy as np

from cpu.loops import compiled, numba

PAIRS, TILE = 16, 64  # of a row's group of 32 channels; rows of a matrix side by side
INSTRUCTIONS = {  # and how many sums it makes, by what a processor has
    "+avx512bw": ("llvm.x86.avx512.pmaddw.d.512", 16), "+avx2": ("llvm.x86.avx2.pmadd.wd", 8)}


def plain(bits, rows, words, x, sums):
    """The products of 64 rows of a matrix, 32 channels of them, with the first `rows` of x, 1 or 2.
    A word is of one row: codes of 4 or 8 `bits`, 16/bits pairs, the earliest in the lowest bits of
    each half."""
    mask, each = np.int32(2**bits - 1), 16 // bits
    for r in range(rows):
        sums[r] = 0
        for p in range(PAIRS):
            row, shift = words[p // each], np.int32(p % each * bits)
            first, second = np.int16(x[r, p] & 0xFFFF), x[r, p] >> 16
            for j in range(TILE):
                sums[r, j] += (row[j] >> shift & mask) * first
                sums[r, j] += (row[j] >> shift + 16 & mask) * second


dot_pairs = plain

if numba is not None:
    from llvmlite import ir
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array

    HALF, NUMBER = ir.IntType(16), ir.IntType(32)

    @intrinsic(prefer_literal=True)
    def dot_pairs(typing, bits, rows, words, x, sums):
        """bits and rows have to be written as numbers where this is called."""
        return numba.void(bits, rows, words, x, sums), generate

    def generate(context, builder, signature, arguments):
        features = context.codegen().magic_tuple()[2].split(",")  # of what Numba compiles for
        found = [INSTRUCTIONS[name] for name in INSTRUCTIONS if name in features]
        if not found:
            return context.compile_internal(builder, plain, signature, arguments)
        (name, n), (bits, rows) = found[0], (kind.literal_value for kind in signature.args[:2])
        words, x, sums = (make_array(kind)(context, builder, array).data for kind, array
                          in zip(signature.args[2:], arguments[2:], strict=True))
        vector, pairs = ir.VectorType(NUMBER, n), ir.VectorType(HALF, 2 * n)
        multiply = builder.module.declare_intrinsic(name, fnty=ir.FunctionType(vector, [pairs] * 2))
        zeros, mask = vector([0] * n), vector([(2**bits - 1) * 0x10001] * n)

        def vectors(array, at):
            return builder.bitcast(builder.gep(array, [NUMBER(at)]), vector.as_pointer())

        def spread(array, at):
            one = builder.insert_element(zeros, builder.load(builder.gep(array, [NUMBER(at)])),
                                         NUMBER(0))
            return builder.bitcast(builder.shuffle_vector(one, one, zeros), pairs)

        some = min(8 // rows * n, TILE)  # 8 sums at a time, which fit into registers
        for start in range(0, TILE, some):
            places = range(start, start + some, n)
            totals = {(r, at): zeros for r in range(rows) for at in places}
            for p in range(PAIRS):
                word, shift = p * bits // 16, vector([p * bits % 16] * n)
                new = [spread(x, r * PAIRS + p) for r in range(rows)]
                for at in places:
                    codes = builder.load(vectors(words, word * TILE + at), align=4)
                    codes = builder.bitcast(builder.and_(builder.lshr(codes, shift), mask), pairs)
                    for r in range(rows):
                        products = builder.call(multiply, [codes, new[r]])
                        totals[r, at] = builder.add(totals[r, at], products)
            for (r, at), total in totals.items():
                builder.store(total, vectors(sums, r * TILE + at), align=4)
        return context.get_dummy_value()


if __name__ == "__main__":
    from timeit import repeat

    def thousand(dot):
        @compiled
        def loop(words, x, sums):
            for _ in range(1000):
                dot(4, 2, words, x, sums)
        return loop

    rng, sums = np.random.default_rng(0), np.empty((2, TILE), np.int32)
    words = rng.integers(-(2**31), 2**31, (4, TILE), np.int32)
    x = rng.integers(-(2**15), 2**15, (2, 2 * PAIRS), np.int16).view(np.int32)
    for name, dot in ("plain loops", compiled(plain)), ("LLVM's vectors", dot_pairs):
        best = min(repeat(partial(thousand(dot), words, x, sums), number=1, repeat=9))
        print(f"{name}: {1e6 * best:.0f} ns for 2 rows by 64, first sums {sums[0, :3]}")
