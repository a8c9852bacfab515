"""cpu/pairs.py - the one instruction that cpu/packed.py needs and plain loops do not become.

    words [bits, 64] int32, x [rows, 16], each two int16 -> sums [rows, 64] int32

Processors multiply pairs of 16-bit integers and add the two products of each, 8 or 16 pairs in one
instruction (x86: `vpmaddwd`). A weight of 4 or 8 bits is such an integer as it is; a product of
float32 numbers needs it converted first. `plain` defines what is computed, and does it where a
processor is no x86 with AVX2 (on ARM not measured). Elsewhere Numba takes `dot_pairs` from here in
LLVM's own terms: sums stay in registers, a matrix's rows lie side by side in a vector.

    python -m cpu.pairs        nanoseconds of both
"""

from functools import partial

import numpy as np

from cpu.loops import compiled, numba

PAIRS, TILE = 16, 64  # of a row's group of 32 channels; rows of a matrix side by side
INSTRUCTIONS = {  # by what a processor has: LLVM's name, and how many sums it makes
    "+avx512bw": ("llvm.x86.avx512.pmaddw.d.512", 16), "+avx2": ("llvm.x86.avx2.pmadd.wd", 8)}


def plain(bits, rows, words, x, sums):
    """The products of 64 rows of a matrix, 32 channels of them, with the first `rows` of x, 1 or 2.
    A word has 32/bits neighbouring channels of one row, 4 or 8 `bits` each, the even ones in its
    lower half, the odd ones in its upper half, the earliest lowest."""
    mask, each = np.int32(2**bits - 1), 16 // bits
    for r in range(rows):
        total = sums[r]
        total[:] = 0
        for p in range(PAIRS):
            row, shift = words[p // each], np.int32(p % each * bits)
            first, second = np.int32(np.int16(x[r, p] & 0xFFFF)), np.int32(x[r, p] >> 16)
            for j in range(TILE):
                codes = np.int32(row[j] >> shift)
                total[j] += (codes & mask) * first + (codes >> np.int32(16) & mask) * second


dot_pairs = plain

if numba is not None:
    from llvmlite import ir
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array

    INT16, INT32 = ir.IntType(16), ir.IntType(32)

    @intrinsic(prefer_literal=True)
    def dot_pairs(typing, bits, rows, words, x, sums):
        """bits and rows are written as numbers where this is called: code is made for them."""
        return numba.void(bits, rows, words, x, sums), generate

    def generate(context, builder, signature, arguments):
        features = context.codegen().magic_tuple()[2].split(",")  # of what Numba compiles for
        found = [INSTRUCTIONS[name] for name in INSTRUCTIONS if name in features]
        if not found:
            return context.compile_internal(builder, plain, signature, arguments)
        (name, n), (bits, rows) = found[0], (kind.literal_value for kind in signature.args[:2])
        words, x, sums = (make_array(kind)(context, builder, array).data for kind, array
                          in zip(signature.args[2:], arguments[2:], strict=True))
        of_sums, of_pairs = ir.VectorType(INT32, n), ir.VectorType(INT16, 2 * n)
        kind = ir.FunctionType(of_sums, [of_pairs, of_pairs])
        instruction = builder.module.declare_intrinsic(name, fnty=kind)
        zeros, mask = of_sums([0] * n), of_sums([(2**bits - 1) * 0x10001] * n)

        def pointer(array, at):
            return builder.bitcast(builder.gep(array, [INT32(at)]), of_sums.as_pointer())

        def spread(array, at):
            one = builder.insert_element(zeros, builder.load(builder.gep(array, [INT32(at)])),
                                         INT32(0))
            return builder.bitcast(builder.shuffle_vector(one, one, zeros), of_pairs)

        some = min(8 // rows * n, TILE)  # 8 vectors of sums at most, which fit into registers
        for start in range(0, TILE, some):
            places = range(start, start + some, n)
            totals = {(r, at): zeros for r in range(rows) for at in places}
            for p in range(PAIRS):
                word, shift = p * bits // 16, of_sums([p * bits % 16] * n)
                new = [spread(x, r * PAIRS + p) for r in range(rows)]
                for at in places:
                    codes = builder.load(pointer(words, word * TILE + at), align=4)
                    codes = builder.and_(builder.lshr(codes, shift), mask)
                    codes = builder.bitcast(codes, of_pairs)
                    for r in range(rows):
                        products = builder.call(instruction, [codes, new[r]])
                        totals[r, at] = builder.add(totals[r, at], products)
            for (r, at), total in totals.items():
                builder.store(total, pointer(sums, r * TILE + at), align=4)
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
