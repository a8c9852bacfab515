"""fast/pairs.py - dot products of 4- or 8-bit weights with 16-bit activations.

    words [bits, 64] int32: 32 channels of 64 rows of a matrix
    x [terms, 16] int32: pairs of 16-bit activations      ->  sums [terms, 64] int32

Processors have an instruction that multiplies 8 or 16 pairs of 16-bit integers and adds the two
products of each pair (x86: `vpmaddwd`). A weight of 4 or 8 bits is such an integer as it is. Plain
loops do not become this instruction, so here it is written in LLVM's terms, and Numba inlines it.
`plain` defines what is computed, and computes it on processors without AVX2.

    python -m fast.pairs        nanoseconds of both
"""

from functools import partial

import numpy as np

from fast.loops import compiled, numba, run

PAIRS = 16  # of channels, in a group of 32
TILE = 64  # rows of a matrix side by side
# By a feature of the processor: LLVM's name of the instruction, and how many sums it makes.
INSTRUCTIONS = {"+avx512bw": ("llvm.x86.avx512.pmaddw.d.512", 16),
                "+avx2": ("llvm.x86.avx2.pmadd.wd", 8)}


def plain(bits, terms, words, x, sums):
    """The definition. A word has 32/bits neighbouring channels of one row: the even ones in its
    lower half, the odd ones in its upper half, the earliest in the lowest bits. A pair of x has the
    even channel in its lower half."""
    mask = np.int32(2**bits - 1)
    per_half = 16 // bits
    for t in range(terms):
        total = sums[t]
        total[:] = 0
        for p in range(PAIRS):
            row = words[p // per_half]
            shift = np.int32(p % per_half * bits)
            even = np.int32(np.int16(x[t, p] & 0xFFFF))
            odd = np.int32(x[t, p] >> 16)
            for j in range(TILE):
                code = np.int32(row[j] >> shift)
                total[j] += (code & mask) * even + (code >> np.int32(16) & mask) * odd


dot_pairs = plain

if numba is not None:
    from llvmlite import ir
    from numba.extending import intrinsic
    from numba.np.arrayobj import make_array

    INT16 = ir.IntType(16)
    INT32 = ir.IntType(32)

    @intrinsic(prefer_literal=True)
    def dot_pairs(typing, bits, terms, words, x, sums):
        """`plain`. The caller writes bits and terms as literals: code is made for each."""
        return numba.void(bits, terms, words, x, sums), generate

    def generate(context, builder, signature, arguments):
        """Emits LLVM code for one call of dot_pairs."""
        features = context.codegen().magic_tuple()[2].split(",")
        found = [INSTRUCTIONS[name] for name in INSTRUCTIONS if name in features]
        if not found:
            return context.compile_internal(builder, plain, signature, arguments)
        name, n = found[0]
        bits, terms = (kind.literal_value for kind in signature.args[:2])
        words, x, sums = (make_array(kind)(context, builder, array).data for kind, array
                          in zip(signature.args[2:], arguments[2:], strict=True))
        of_sums = ir.VectorType(INT32, n)
        of_pairs = ir.VectorType(INT16, 2 * n)
        kind = ir.FunctionType(of_sums, [of_pairs, of_pairs])
        multiply_add = builder.module.declare_intrinsic(name, fnty=kind)
        zeros = of_sums([0] * n)
        mask = of_sums([(2**bits - 1) * 0x10001] * n)

        def pointer(array, at):
            return builder.bitcast(builder.gep(array, [INT32(at)]), of_sums.as_pointer())

        def broadcast(array, at):
            """One pair of x, n times."""
            number = builder.load(builder.gep(array, [INT32(at)]))
            one = builder.insert_element(zeros, number, INT32(0))
            return builder.bitcast(builder.shuffle_vector(one, one, zeros), of_pairs)

        width = min(8 // terms * n, TILE)  # 8 vectors of sums fit into the registers
        for start in range(0, TILE, width):
            places = range(start, start + width, n)
            totals = {(t, at): zeros for t in range(terms) for at in places}
            for p in range(PAIRS):
                word = p * bits // 16
                shift = of_sums([p * bits % 16] * n)
                activations = [broadcast(x, t * PAIRS + p) for t in range(terms)]
                for at in places:
                    codes = builder.load(pointer(words, word * TILE + at), align=4)
                    codes = builder.and_(builder.lshr(codes, shift), mask)
                    codes = builder.bitcast(codes, of_pairs)
                    for t in range(terms):
                        products = builder.call(multiply_add, [codes, activations[t]])
                        totals[t, at] = builder.add(totals[t, at], products)
            for (t, at), total in totals.items():
                builder.store(total, pointer(sums, t * TILE + at), align=4)
        return context.get_dummy_value()


if __name__ == "__main__":
    from timeit import repeat

    def thousand(dot):
        def loop(words, x, sums):
            for _ in range(1000):
                dot(4, 2, words, x, sums)
        return numba.njit(loop)  # not kept: its source is the same for both

    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (4, TILE), np.int32)
    x = rng.integers(-(2**15), 2**15, (2, 2 * PAIRS), np.int16).view(np.int32)
    sums = np.empty((2, TILE), np.int32)
    for name, dot in ("plain loops", compiled(plain)), ("LLVM's vectors", dot_pairs):
        best = min(repeat(partial(run, thousand(dot), words, x, sums), number=1, repeat=9))
        print(f"{name}: {1e6 * best:.0f} ns for 2 terms by 64 rows, first sums {sums[0, :3]}")
