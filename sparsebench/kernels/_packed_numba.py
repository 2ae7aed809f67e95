"""The compiled loops of the backend `cpu_packed`: weights in 8 or 4 bits, read for kept channels only.

As _gather_numba.py, eight channels to a pass over 64 outputs, fp32 sums. Bytes are prefetched ahead in their own row;
nibbles, whose rows are short, in the rows of the next pass. Bytes become floats by the processor's widening instructions,
nibbles by a look-up of value times level (AVX-512), so that two instructions and an addition serve 16 of them; elsewhere
by shifts. A scale per output or per group of inputs is applied once to the sums of its channels, which is why the list of
channels must be in order; a scale per group of outputs is multiplied into the value of each channel.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

from sparsebench.kernels._gather_numba import AHEAD, FLOAT, I32, I64

BLOCK = 64  # outputs of one step, as stored
ROWS = 8
HALF = ir.HalfType()


def splat(builder, scalar, kind):
    """A vector of `kind` with every lane `scalar`."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def to_float(builder, half):
    """float16 bits as a float."""
    return builder.fpext(builder.bitcast(half, HALF), FLOAT)


def has_table_lookup() -> bool:
    """Whether a processor that code is compiled for picks floats out of 16 by an index's lowest bits (AVX-512)."""
    return not config.CPU_NAME and bool(binding.get_host_cpu_features().get("avx512f"))


WORDS, QUARTER = ir.VectorType(I32, 16), ir.VectorType(FLOAT, 16)
NIBBLES = ir.Constant(QUARTER, [float(q - 8) for q in range(16)])


def add_int8(builder, source, x, totals: list) -> list:
    """totals + x * the 64 bytes at `source`; x: one float, as a vector of 32."""
    kind, wide = ir.VectorType(ir.IntType(8), 32), ir.VectorType(I32, 32)
    place = builder.bitcast(source, kind.as_pointer())
    parts = [builder.load(builder.gep(place, [I32(half)]), align=1) for half in (0, 1)]
    levels = [builder.sitofp(builder.sext(part, wide), x.type) for part in parts]
    return [fused(builder, level, x, total) for level, total in zip(levels, totals, strict=True)]


def add_int4(builder, source, x, totals: list, table: bool) -> list:
    """totals + x * the 64 nibbles at `source` (less 8); x: with `table` x times each of the 16 levels, else x 16 times."""
    half = ir.VectorType(I32, 8)
    words = builder.load(builder.bitcast(source, half.as_pointer()), align=1)
    twice = builder.shuffle_vector(words, ir.Constant(half, ir.Undefined), ir.Constant(WORDS, [*range(8), *range(8)]))
    results = []
    for quarter, total in enumerate(totals):  # nibbles 2 q and 2 q + 1 of every word are 16 outputs in a row
        index = builder.lshr(twice, ir.Constant(WORDS, [8 * quarter] * 8 + [8 * quarter + 4] * 8))
        if table:
            name = "llvm.x86.avx512.permvar.sf.512"
            look = cgutils.get_or_insert_function(builder.module, ir.FunctionType(QUARTER, [QUARTER, WORDS]), name)
            results.append(builder.fadd(total, builder.call(look, [x, index])))
            continue
        level = builder.sub(builder.and_(index, ir.Constant(WORDS, [15] * 16)), ir.Constant(WORDS, [8] * 16))
        results.append(fused(builder, builder.sitofp(level, QUARTER), x, total))
    return results


def fused(builder, a, b, c):
    """a * b + c of float vectors."""
    kind = a.type
    name = f"llvm.fma.v{kind.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [a, b, c])


def emit(context, builder, signature, args, rows: int, along_outputs: bool, table: bool) -> None:
    """LLVM IR of part[b, lo:hi] += sum over channels index[first : first + rows] of value[b] * levels; lo, hi whole blocks.

    weight: int8 [n, 64 k] or uint8 [n, 32 k] (nibbles). along_outputs: scale float16 bits [n, groups], `group` outputs each.
    """
    part, weight, index, value, scale = (
        context.make_array(signature.args[i])(context, builder, args[i]) for i in range(5)
    )
    b, first, lo, hi, group = args[5:]
    int8 = signature.args[1].dtype == types.int8
    table, vector = table and not int8, ir.VectorType(FLOAT, 32) if int8 else QUARTER

    def width(array):
        return cgutils.unpack_tuple(builder, array.shape, 2)[1]

    def operand(scalar):
        x = splat(builder, scalar, vector)
        return builder.fmul(x, NIBBLES) if table else x

    part_row = builder.gep(part.data, [builder.mul(b, width(part))])
    value_row = builder.gep(value.data, [builder.mul(b, width(value))])
    pointer = ir.IntType(8).as_pointer()
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    )
    current, scalars, scales, following = [], [], [], []
    last = builder.sub(cgutils.unpack_tuple(builder, index.shape, 1)[0], I64(1))
    for r in range(rows):
        later = builder.add(first, I64(rows + r))  # of the next pass, or any place: a wrong one is only not prefetched
        later = builder.select(builder.icmp_signed("<", later, last), later, last)
        row = builder.mul(builder.load(builder.gep(index.data, [later])), width(weight))
        following.append(builder.bitcast(builder.gep(weight.data, [row]), pointer))
        place = builder.add(first, I64(r))
        channel = builder.load(builder.gep(index.data, [place]))
        current.append(builder.bitcast(builder.gep(weight.data, [builder.mul(channel, width(weight))]), pointer))
        scalars.append(builder.load(builder.gep(value_row, [place])))
        scales.append(builder.gep(scale.data, [builder.mul(channel, width(scale))]) if along_outputs else None)
    operands = [operand(scalar) for scalar in scalars]
    with cgutils.for_range_slice(builder, lo, hi, I64(BLOCK), I64) as (j, _):
        pieces = builder.bitcast(builder.gep(part_row, [j]), vector.as_pointer())
        places = [builder.gep(pieces, [I32(piece)]) for piece in range(BLOCK // vector.count)]
        totals = [builder.load(place, align=4) for place in places]
        at = j if int8 else builder.sdiv(j, I64(2))
        for r in range(rows):
            source, x = builder.gep(current[r], [at]), operands[r]
            if along_outputs:
                own = builder.load(builder.gep(scales[r], [builder.sdiv(j, group)]))
                x = operand(builder.fmul(scalars[r], to_float(builder, own)))
            totals = add_int8(builder, source, x, totals) if int8 else add_int4(builder, source, x, totals, table)
            ahead = builder.gep(source, [I64(AHEAD)]) if int8 else builder.gep(following[r], [at])
            builder.call(prefetch, [ahead, I32(0), I32(3), I32(1)])
        for place, total in zip(places, totals, strict=True):
            builder.store(total, place, align=4)


def passes(rows: int, along_outputs: bool, table: bool | None = None):
    """An intrinsic of `emit` for so many channels; table: look nibbles up, None = where the processor can."""
    table = has_table_lookup() if table is None else table

    @intrinsic
    def run(typing, part, weight, index, value, scale, b, first, lo, hi, group):
        def codegen(context, builder, signature, args):
            emit(context, builder, signature, args, rows, along_outputs, table)
            return context.get_dummy_value()

        return types.void(part, weight, index, value, scale, *[types.intp] * 5), codegen

    return run


eight, four, two, one = (passes(rows, False) for rows in (8, 4, 2, 1))
eight_scaled, one_scaled = passes(8, True), passes(1, True)


@intrinsic
def from_half(typing, bits):
    """float16 bits as float32."""
    return types.float32(types.uint16), lambda context, builder, signature, args: to_float(builder, args[0])


@njit(nogil=True, cache=True)
def add_channels(part, weight, index, values, scale, b, first, last, lo, hi):
    """part[b, lo:hi] += the listed channels first .. last - 1, in passes of 8, 4, 2 and 1."""
    k = first
    while k + 8 <= last:
        eight(part, weight, index, values, scale, b, k, lo, hi, 1)
        k += 8
    if k + 4 <= last:
        four(part, weight, index, values, scale, b, k, lo, hi, 1)
        k += 4
    if k + 2 <= last:
        two(part, weight, index, values, scale, b, k, lo, hi, 1)
        k += 2
    if k < last:
        one(part, weight, index, values, scale, b, k, lo, hi, 1)


@njit(nogil=True, cache=True)
def add_scaled(y, part, scale, zero, b, g, total, lo, hi):
    """y[b, lo:hi] += scale[g] * (part - (zero[g] - 8) * total), and part is cleared; total: sum of the kept inputs of g."""
    s, sums, out = scale[g], part[b], y[b]
    if zero.size:
        z = zero[g]
        for j in range(lo, hi):
            out[j] += from_half(s[j]) * (sums[j] - (from_half(z[j]) - np.float32(8)) * total)
            sums[j] = 0
    else:
        for j in range(lo, hi):
            out[j] += from_half(s[j]) * sums[j]
            sums[j] = 0


@njit(nogil=True, cache=True)
def gather_int8(y, weight, plain, index, values, count, part, lo, hi):
    """y[b, lo:hi] = plain * sum of kept channels; plain float32 [m]: the scale of each output. lo a whole block."""
    end = min(part.shape[1], (hi + BLOCK - 1) // BLOCK * BLOCK)
    nothing = np.empty((0, 0), np.uint16)
    for b in range(y.shape[0]):
        for j in range(lo, end):
            part[b, j] = 0
        add_channels(part, weight, index, values, nothing, b, 0, count, lo, end)
        for j in range(lo, hi):
            y[b, j] = part[b, j] * plain[j]


@njit(nogil=True, cache=True)
def gather_groups(y, weight, scale, zero, group, index, values, count, part, lo, hi):
    """y[b, lo:hi] of weights in groups of inputs, int4 or int8; index must be in order. scale, zero: float16 bits [groups, m]."""
    end = min(part.shape[1], (hi + BLOCK - 1) // BLOCK * BLOCK)
    for b in range(y.shape[0]):
        for j in range(lo, end):
            part[b, j] = 0
        for j in range(lo, hi):
            y[b, j] = 0
    k = 0
    while k < count:
        g = index[k] // group
        last = k
        while last < count and index[last] < (g + 1) * group:
            last += 1
        for b in range(y.shape[0]):
            total = np.float32(0)
            for i in range(k, last):
                total += values[b, i]
            add_channels(part, weight, index, values, scale, b, k, last, lo, end)
            add_scaled(y, part, scale, zero, b, g, total, lo, hi)
        k = last


@njit(nogil=True, cache=True)
def gather_int4_outputs(y, weight, scale, group, index, values, count, part, lo, hi):
    """y[b, lo:hi] of int4 weights in groups of outputs (a multiple of 64). scale: float16 bits [n, groups]."""
    end = min(part.shape[1], (hi + BLOCK - 1) // BLOCK * BLOCK)
    for b in range(y.shape[0]):
        for j in range(lo, end):
            part[b, j] = 0
        k = 0
        while k + ROWS <= count:
            eight_scaled(part, weight, index, values, scale, b, k, lo, end, group)
            k += ROWS
        while k < count:
            one_scaled(part, weight, index, values, scale, b, k, lo, end, group)
            k += 1
        for j in range(lo, hi):
            y[b, j] = part[b, j]


@njit(nogil=True, cache=True)
def unpack_levels(words, out):
    """out[i] = the levels of row i less 8, float32; words uint32 [n, 8 k] of nibbles, out [n, 64 k]."""
    for i in range(out.shape[0]):
        for block in range(out.shape[1] // BLOCK):
            source, target = words[i, 8 * block : 8 * block + 8], out[i, BLOCK * block : BLOCK * (block + 1)]
            for j in range(8):
                for word in range(8):
                    target[8 * j + word] = np.float32(np.int32((source[word] >> np.uint32(4 * j)) & np.uint32(15)) - 8)


@njit(nogil=True, cache=True)
def scale_levels(out, scale, zero, group, m):
    """out[i, :m] = scale * (out[i, :m] + 8 - zero); group: inputs of a row of scale and zero, or minus outputs of a column."""
    for i in range(out.shape[0]):
        row = out[i]
        if group < 0:
            for g in range(scale.shape[1]):
                s = from_half(scale[i, g])
                for j in range(-group * g, min(m, -group * (g + 1))):
                    row[j] *= s
        elif zero.size:
            s, z = scale[i // group], zero[i // group]
            for j in range(m):
                row[j] = (row[j] + np.float32(8) - from_half(z[j])) * from_half(s[j])
        else:
            s = scale[i // group]
            for j in range(m):
                row[j] *= from_half(s[j])
