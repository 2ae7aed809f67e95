"""The compiled loops of the backend `cpu_numba`: compact the kept channels, then read only their weights.

Eight channels are read per pass over a run of outputs, with fp32 sums and each channel prefetched a kilobyte ahead.
Vectors are spelled out in LLVM IR (VECTOR floats wide) because numba's own loops over slices did not reach the memory's
speed. Compiled code is kept in the program's cache folder (sparsebench/cache.py).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 8  # channels per pass
VECTOR = 32  # floats per step: one or two cache lines of weights
PIECE = 512  # outputs whose weights of one pass (16 KB in fp32) and sums fit the first cache
AHEAD = 1024  # bytes; found best of none, 512, 1024 and the next eight channels
FLOAT, I16, I32, I64, BYTE = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.IntType(8)


def emit_pass(context, builder, signature, args, rows: int, listed: bool = True) -> None:
    """LLVM IR of y[b, lo:hi] += sum over `rows` channels of value[b] * weight row.

    listed: the channels are index[first:], else first, first + 1, ... themselves and `index` is not read.

    Rows of y and value are found here: a slice in numba would count references at every pass.
    """
    arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in range(4)]
    y, weight, index, value = arrays
    b, first, lo, hi = args[4:]
    y_row, value_row = (
        builder.gep(array.data, [builder.mul(b, cgutils.unpack_tuple(builder, array.shape, 2)[1])])
        for array in (y, value)
    )
    half = signature.args[1].dtype == types.uint16
    element, size = (I16, 2) if half else (FLOAT, 4)
    vector, wide = ir.VectorType(FLOAT, VECTOR), ir.VectorType(element, VECTOR)
    outputs = cgutils.unpack_tuple(builder, weight.shape, 2)[1]
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{VECTOR}f32"
    )
    pointer = BYTE.as_pointer()
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    )
    undefined = ir.Constant(vector, ir.Undefined)
    splat = ir.Constant(ir.VectorType(I32, VECTOR), [0] * VECTOR)
    current, scalars, vectors = [], [], []
    for r in range(rows):
        channel = builder.add(first, I64(r))
        channel = builder.load(builder.gep(index.data, [channel])) if listed else channel
        current.append(builder.gep(weight.data, [builder.mul(channel, outputs)]))
        scalars.append(builder.load(builder.gep(value_row, [builder.add(first, I64(r))])))
        vectors.append(builder.shuffle_vector(builder.insert_element(undefined, scalars[r], I32(0)), undefined, splat))

    def widen(loaded, kind):
        """bf16 bits to float: the upper half of a float32."""
        if not half:
            return loaded
        lanes = kind.count if isinstance(kind, ir.VectorType) else None
        integer = ir.VectorType(I32, lanes) if lanes else I32
        shift = ir.Constant(integer, [16] * lanes) if lanes else I32(16)
        return builder.bitcast(builder.shl(builder.zext(loaded, integer), shift), kind)

    steps = builder.sdiv(builder.sub(hi, lo), I64(VECTOR))
    end = builder.add(lo, builder.mul(steps, I64(VECTOR)))
    with cgutils.for_range_slice(builder, lo, end, I64(VECTOR), I64) as (j, _):
        place = builder.bitcast(builder.gep(y_row, [j]), vector.as_pointer())
        total = builder.load(place, align=4)
        for r in range(rows):
            source = builder.bitcast(builder.gep(current[r], [j]), wide.as_pointer())
            weights = widen(builder.load(source, align=size), vector)
            total = builder.call(fma, [weights, vectors[r], total])
            for line in range(0, VECTOR * size, 64):
                target = builder.gep(current[r], [builder.add(j, I64((line + AHEAD) // size))])
                builder.call(prefetch, [builder.bitcast(target, pointer), I32(0), I32(3), I32(1)])
        builder.store(total, place, align=4)
    with cgutils.for_range_slice(builder, end, hi, I64(1), I64) as (j, _):
        place = builder.gep(y_row, [j])
        total = builder.load(place)
        for r in range(rows):
            weights = widen(builder.load(builder.gep(current[r], [j])), FLOAT)
            total = builder.fadd(total, builder.fmul(weights, scalars[r]))
        builder.store(total, place)


def pass_signature(y, weight, index, value):
    return types.void(y, weight, index, value, types.intp, types.intp, types.intp, types.intp)


@intrinsic
def pass_many(typing, y, weight, index, value, b, first, lo, hi):
    def codegen(context, builder, signature, args):
        emit_pass(context, builder, signature, args, ROWS)
        return context.get_dummy_value()

    return pass_signature(y, weight, index, value), codegen


@intrinsic
def pass_one(typing, y, weight, index, value, b, first, lo, hi):
    def codegen(context, builder, signature, args):
        emit_pass(context, builder, signature, args, 1)
        return context.get_dummy_value()

    return pass_signature(y, weight, index, value), codegen


@intrinsic
def pass_in_order(typing, y, weight, index, value, b, first, lo, hi):
    def codegen(context, builder, signature, args):
        emit_pass(context, builder, signature, args, ROWS, listed=False)
        return context.get_dummy_value()

    return pass_signature(y, weight, index, value), codegen


@intrinsic
def widen(typing, value):
    """A stored weight as float32: itself, or the upper half of a float32 for bf16 bits."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), FLOAT)

    return types.float32(value), codegen


@njit(nogil=True, cache=True)
def gather(y, weight, index, values, count, lo, hi):
    """y[b, lo:hi] = sum_k values[b, k] * weight[index[k], lo:hi].

    With several rows b, a pass goes over PIECE outputs at a time, whose weights stay in the first cache for all rows.
    """
    for b in range(y.shape[0]):
        for j in range(lo, hi):
            y[b, j] = 0
    piece = max(1, hi - lo) if y.shape[0] == 1 else PIECE
    k = 0
    while k + ROWS <= count:
        for start in range(lo, hi, piece):
            for b in range(y.shape[0]):
                pass_many(y, weight, index, values, b, k, start, min(start + piece, hi))
        k += ROWS
    while k < count:
        for b in range(y.shape[0]):
            pass_one(y, weight, index, values, b, k, lo, hi)
        k += 1


@njit(nogil=True, cache=True)
def product(y, weight, x, index, lo, hi):
    """y[0, lo:hi] = x[0] @ weight[:, lo:hi] over all channels in order: the dense product, with no list of channels.

    `index` [n + 1] is scratch, for the channels that are left over from whole passes.
    """
    for j in range(lo, hi):
        y[0, j] = 0
    k, channels = 0, weight.shape[0]
    while k + ROWS <= channels:
        pass_in_order(y, weight, index, x, 0, k, lo, hi)
        k += ROWS
    while k < channels:
        index[k] = k
        pass_one(y, weight, index, x, 0, k, lo, hi)
        k += 1


@intrinsic
def bits_of(typing, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@njit(nogil=True, cache=True)
def narrow(value, like):
    """A float as an element of `like`: itself, or bf16 bits rounded to nearest even."""
    if like.itemsize == 4:
        return value
    bits = bits_of(np.float32(value))
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(nogil=True, cache=True)
def compact(x, threshold, scale, index, values):
    """Channels that any row of x [B, n] keeps (|x| c > t), and every row's value there (0 where it drops it).

    x as stored (bf16 bits or float32); index [n + 1], values [B, n + 1]. Returns the count.
    """
    count = 0
    if x.shape[0] == 1:
        for i in range(x.shape[1]):
            value = widen(x[0, i])
            index[count] = i
            values[0, count] = value
            count += abs(value) * scale[i] > threshold if scale.size else abs(value) > threshold
        return count
    for i in range(x.shape[1]):
        kept = False
        for b in range(x.shape[0]):
            value = widen(x[b, i])
            keep = abs(value) * scale[i] > threshold if scale.size else abs(value) > threshold
            values[b, count] = value if keep else 0
            kept |= keep
        index[count] = i
        count += kept
    return count


@njit(nogil=True, cache=True)
def finish(sums, bias, out):
    """out = sums + bias in the stored type."""
    for b in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[b, j] = narrow(sums[b, j] + widen(bias[j]) if bias.size else sums[b, j], out)


@njit(nogil=True, cache=True)
def linear(x, weight, bias, threshold, scale, index, values, sums, out):
    """The whole product on one thread; nothing of Python between its parts. Returns the number of channels kept."""
    count = compact(x, threshold, scale, index, values)
    gather(sums, weight, index, values, count, 0, weight.shape[1])
    finish(sums, bias, out)
    return count


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def listed_dots(weight, x, index, values, lo, hi):
    """values[b, k] *= weight[index[k], :] . x[b] for list entries lo..hi-1; weight [f, d], x float32 [B, d]."""
    for k in range(lo, hi):
        row = weight[index[k]]
        for b in range(x.shape[0]):
            vector = x[b]
            total = np.float32(0)
            for i in range(vector.shape[0]):
                total += widen(row[i]) * vector[i]
            values[b, k] *= total
