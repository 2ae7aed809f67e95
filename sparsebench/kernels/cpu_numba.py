"""CPU kernels compiled at run time by numba: the kept input channels are compacted, then only their weights are read.

A weight is stored transposed ([n, m], one input channel contiguous; bf16 as uint16). Eight channels are read per pass
over a run of outputs, with fp32 sums and the next eight channels prefetched; outputs are split between threads, so
nothing is reduced. Vectors are spelled out in LLVM IR (VECTOR floats wide) because numba's own loops over slices did
not reach the memory's speed. Compiled code is cached on disk beside this file (or in numba's user cache).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

RANK = 10
SKIPS = True
ROWS = 8  # channels per pass
VECTOR = 32  # floats per step: one or two cache lines of weights
PARALLEL_BYTES = 1 << 19  # below this much weight traffic a second thread costs more than it saves

_pool: ThreadPoolExecutor | None = None
_threads = 1


def prepare(threads: int) -> None:
    """Keep `threads - 1` worker threads; the caller's thread is the other one."""
    global _pool, _threads  # noqa: PLW0603
    if _pool is not None:
        _pool.shutdown()
    _threads = threads
    _pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why this call can't be served: other dtypes than fp32 and bf16, more than 8 rows, weight not channel-contiguous."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cpu_numba serves float32 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if not weight.t().is_contiguous():
        return "cpu_numba needs the weight stored with its input channels contiguous"
    if x.numel() // x.shape[-1] > 8:
        return f"cpu_numba serves 1 to 8 rows, got {x.numel() // x.shape[-1]}"
    return None


FLOAT, I16, I32, I64, BYTE = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.IntType(8)


def emit_pass(context, builder, signature, args, rows: int) -> None:
    """LLVM IR of y[lo:hi] += sum over `rows` channels of value * weight row, prefetching the channels from `following`."""
    y, weight, index, value = (context.make_array(signature.args[i])(context, builder, args[i]) for i in range(4))
    first, following, lo, hi = args[4:]
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
    current, ahead, scalars, vectors = [], [], [], []
    for r in range(rows):
        channel = builder.load(builder.gep(index.data, [builder.add(first, I64(r))]))
        current.append(builder.gep(weight.data, [builder.mul(channel, outputs)]))
        channel = builder.load(builder.gep(index.data, [builder.add(following, I64(r))]))
        ahead.append(builder.gep(weight.data, [builder.mul(channel, outputs)]))
        scalars.append(builder.load(builder.gep(value.data, [builder.add(first, I64(r))])))
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
        place = builder.bitcast(builder.gep(y.data, [j]), vector.as_pointer())
        total = builder.load(place, align=4)
        for r in range(rows):
            source = builder.bitcast(builder.gep(current[r], [j]), wide.as_pointer())
            weights = widen(builder.load(source, align=size), vector)
            total = builder.call(fma, [weights, vectors[r], total])
            for line in range(0, VECTOR * size, 64):
                target = builder.gep(ahead[r], [builder.add(j, I64(line // size))])
                builder.call(prefetch, [builder.bitcast(target, pointer), I32(0), I32(3), I32(1)])
        builder.store(total, place, align=4)
    with cgutils.for_range_slice(builder, end, hi, I64(1), I64) as (j, _):
        place = builder.gep(y.data, [j])
        total = builder.load(place)
        for r in range(rows):
            weights = widen(builder.load(builder.gep(current[r], [j])), FLOAT)
            total = builder.fadd(total, builder.fmul(weights, scalars[r]))
        builder.store(total, place)


def pass_signature(y, weight, index, value):
    return types.void(y, weight, index, value, types.intp, types.intp, types.intp, types.intp)


@intrinsic
def pass_many(typing, y, weight, index, value, first, following, lo, hi):
    def codegen(context, builder, signature, args):
        emit_pass(context, builder, signature, args, ROWS)
        return context.get_dummy_value()

    return pass_signature(y, weight, index, value), codegen


@intrinsic
def pass_one(typing, y, weight, index, value, first, following, lo, hi):
    def codegen(context, builder, signature, args):
        emit_pass(context, builder, signature, args, 1)
        return context.get_dummy_value()

    return pass_signature(y, weight, index, value), codegen


@njit(nogil=True, cache=True)
def gather(y, weight, index, values, count, lo, hi):
    """y[b, lo:hi] = sum_k values[b, k] * weight[index[k], lo:hi]; the channels of a pass stay in cache for all rows b."""
    for b in range(y.shape[0]):
        for j in range(lo, hi):
            y[b, j] = 0
    k = 0
    while k + ROWS <= count:
        for b in range(y.shape[0]):
            pass_many(y[b], weight, index, values[b], k, k + ROWS if k + 2 * ROWS <= count else k, lo, hi)
        k += ROWS
    while k < count:
        for b in range(y.shape[0]):
            pass_one(y[b], weight, index, values[b], k, k, lo, hi)
        k += 1


@njit(nogil=True, cache=True)
def compact(x, threshold, scale, index, values):
    """Channels that any batch row keeps, and every row's value there (0 where that row drops it). Returns the count."""
    count = 0
    if x.shape[0] == 1:
        for i in range(x.shape[1]):
            index[count] = i
            values[0, count] = x[0, i]
            count += abs(x[0, i]) * scale[i] > threshold if scale.size else abs(x[0, i]) > threshold
        return count
    for i in range(x.shape[1]):
        kept = False
        for b in range(x.shape[0]):
            keep = abs(x[b, i]) * scale[i] > threshold if scale.size else abs(x[b, i]) > threshold
            values[b, count] = x[b, i] if keep else 0
            kept |= keep
        index[count] = i
        count += kept
    return count


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


NO_SCALE = np.empty(0, np.float32)


def product(index, values, count, weight: np.ndarray) -> np.ndarray:
    """float32 [B, m] from the compacted channels; split over outputs where there is enough to read."""
    y = np.empty((values.shape[0], weight.shape[1]), np.float32)
    m = weight.shape[1]
    if _pool is None or count * m * weight.itemsize < PARALLEL_BYTES:
        gather(y, weight, index, values, count, 0, m)
        return y
    cuts = [m * t // _threads // VECTOR * VECTOR for t in range(_threads)] + [m]
    others = [_pool.submit(gather, y, weight, index, values, count, *cuts[t : t + 2]) for t in range(1, _threads)]
    gather(y, weight, index, values, count, *cuts[:2])
    wait(others)
    for other in others:
        other.result()
    return y


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """As masked_dense.input_sparse_linear, for up to 8 rows. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    rows = whole = x.reshape(-1, x.shape[-1]).float()
    if keep is not None:
        rows, threshold = torch.where(keep.reshape(rows.shape), rows, 0), 0.0
    n = rows.shape[1]
    index, values = np.empty(n + 1, np.int64), np.empty((rows.shape[0], n + 1), np.float32)
    scales = NO_SCALE if scale is None else scale.float().numpy()
    count = compact(rows.numpy(), np.float32(float(threshold)), scales, index, values)
    y = torch.from_numpy(product(index, values, count, as_numpy(weight.t())))
    if bias is not None:
        y += bias
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    if low_rank is not None:
        a, b = low_rank
        kept = torch.zeros_like(rows).index_copy_(1, torch.from_numpy(index[:count]), torch.from_numpy(values[:, :count]))
        y = y + ((whole - kept).to(x.dtype).view(x.shape) @ a) @ b
    return y
