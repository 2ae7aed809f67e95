"""The compiled loops of the backend `cpu_packed`: weights in 8 or 4 bits, read for kept channels only.

As _gather_numba.py, eight channels to a pass over 64 outputs, fp32 sums, each channel prefetched ahead. Integers become
floats by the processor's own widening instructions; a scale per output or per group of inputs is applied once to the sums
of its channels, which is why the list of channels must be in order; a scale per group of outputs is multiplied into the
value of each channel.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsebench.kernels._gather_numba import AHEAD, FLOAT, I32, I64

BLOCK = 64  # outputs of one step, as stored
NIBBLE = 32  # bytes that hold them in 4 bits
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


def floats_of(builder, source, bits: int) -> list:
    """The 64 levels at `source` (bytes) as vectors of 32 floats; nibbles with 8 taken away."""
    eight, wide = ir.IntType(8), ir.VectorType(ir.IntType(32), 32)
    kind, vector = ir.VectorType(eight, 32), ir.VectorType(FLOAT, 32)
    place = builder.bitcast(source, kind.as_pointer())
    if bits == 8:
        parts = [builder.load(builder.gep(place, [I32(half)]), align=1) for half in (0, 1)]
    else:
        stored, constant = builder.load(place, align=1), lambda v: ir.Constant(kind, [v] * 32)
        middle = constant(8)
        parts = [
            builder.sub(builder.and_(stored, constant(15)), middle),
            builder.sub(builder.lshr(stored, constant(4)), middle),
        ]
    return [builder.sitofp(builder.sext(part, wide), vector) for part in parts]


def emit(context, builder, signature, args, rows: int, along_outputs: bool) -> None:
    """LLVM IR of part[b, lo:hi] += sum over channels index[first : first + rows] of value[b] * levels; lo, hi whole blocks.

    weight: int8 [n, 64 k] or uint8 [n, 32 k] (nibbles). along_outputs: scale float16 bits [n, groups], `group` outputs each.
    """
    part, weight, index, value, scale = (
        context.make_array(signature.args[i])(context, builder, args[i]) for i in range(5)
    )
    b, first, lo, hi, group = args[5:]
    bits = 8 if signature.args[1].dtype == types.int8 else 4

    def width(array):
        return cgutils.unpack_tuple(builder, array.shape, 2)[1]

    part_row = builder.gep(part.data, [builder.mul(b, width(part))])
    value_row = builder.gep(value.data, [builder.mul(b, width(value))])
    vector = ir.VectorType(FLOAT, 32)
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), "llvm.fma.v32f32")
    pointer = ir.IntType(8).as_pointer()
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    )
    current, scalars, scales = [], [], []
    for r in range(rows):
        place = builder.add(first, I64(r))
        channel = builder.load(builder.gep(index.data, [place]))
        current.append(builder.bitcast(builder.gep(weight.data, [builder.mul(channel, width(weight))]), pointer))
        scalars.append(builder.load(builder.gep(value_row, [place])))
        scales.append(builder.gep(scale.data, [builder.mul(channel, width(scale))]) if along_outputs else None)
    values = [splat(builder, s, vector) for s in scalars]
    with cgutils.for_range_slice(builder, lo, hi, I64(BLOCK), I64) as (j, _):
        halves = builder.bitcast(builder.gep(part_row, [j]), vector.as_pointer())
        places = [builder.gep(halves, [I32(half)]) for half in (0, 1)]
        totals = [builder.load(place, align=4) for place in places]
        at = j if bits == 8 else builder.sdiv(j, I64(2))
        for r in range(rows):
            source, x = builder.gep(current[r], [at]), values[r]
            if along_outputs:
                own = builder.load(builder.gep(scales[r], [builder.sdiv(j, group)]))
                x = splat(builder, builder.fmul(scalars[r], to_float(builder, own)), vector)
            levels = floats_of(builder, source, bits)
            totals = [builder.call(fma, [level, x, total]) for level, total in zip(levels, totals, strict=True)]
            builder.call(prefetch, [builder.gep(source, [I64(AHEAD)]), I32(0), I32(3), I32(1)])
        for place, total in zip(places, totals, strict=True):
            builder.store(total, place, align=4)


def passes(rows: int, along_outputs: bool):
    """An intrinsic of `emit` for so many channels."""

    @intrinsic
    def run(typing, part, weight, index, value, scale, b, first, lo, hi, group):
        def codegen(context, builder, signature, args):
            emit(context, builder, signature, args, rows, along_outputs)
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
