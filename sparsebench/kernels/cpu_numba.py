"""CPU kernels compiled at run time by numba: the kept input channels are compacted, then only their weights are read.

A weight is stored transposed ([n, m], one input channel contiguous; bf16 as uint16). Eight channels are read per pass
over a run of outputs, with fp32 sums and each channel prefetched a kilobyte ahead; outputs are split between threads,
so nothing is reduced. Vectors are spelled out in LLVM IR (VECTOR floats wide) because numba's own loops over slices did
not reach the memory's speed. Compiled code is cached on disk beside this file (or in numba's user cache).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsebench.kernels import _conv_numba, masked_dense

RANK = 10
SKIPS = True
ROWS = 8  # channels per pass
VECTOR = 32  # floats per step: one or two cache lines of weights
AHEAD = 1024  # bytes; found best of none, 512, 1024 and the next eight channels
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
    """LLVM IR of y[b, lo:hi] += sum over `rows` channels of value[b] * weight row.

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
        channel = builder.load(builder.gep(index.data, [builder.add(first, I64(r))]))
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
def widen(typing, value):
    """A stored weight as float32: itself, or the upper half of a float32 for bf16 bits."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), FLOAT)

    return types.float32(value), codegen


@njit(nogil=True, cache=True)
def gather(y, weight, index, values, count, lo, hi):
    """y[b, lo:hi] = sum_k values[b, k] * weight[index[k], lo:hi]; the channels of a pass stay in cache for all rows b."""
    for b in range(y.shape[0]):
        for j in range(lo, hi):
            y[b, j] = 0
    k = 0
    while k + ROWS <= count:
        for b in range(y.shape[0]):
            pass_many(y, weight, index, values, b, k, lo, hi)
        k += ROWS
    while k < count:
        for b in range(y.shape[0]):
            pass_one(y, weight, index, values, b, k, lo, hi)
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


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


NO_SCALE = np.empty(0, np.float32)


def spread(work, count: int, unit: int) -> None:
    """work(lo, hi) over [0, count) in one piece per thread, in whole units."""
    cuts = [count * t // _threads // unit * unit for t in range(_threads)] + [count]
    others = [_pool.submit(work, *cuts[t : t + 2]) for t in range(1, _threads)]
    work(*cuts[:2])
    wait(others)
    for other in others:
        other.result()


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """As masked_dense.input_sparse_linear, for up to 8 rows. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    rows = whole = x.reshape(-1, x.shape[-1])
    if keep is not None:
        rows, threshold = torch.where(keep.reshape(rows.shape), rows, 0), 0.0
    (m, n), batch = weight.shape, rows.shape[0]
    index, values = np.empty(n + 1, np.int64), np.empty((batch, n + 1), np.float32)
    sums, y = np.empty((batch, m), np.float32), torch.empty(batch, m, dtype=x.dtype)
    stored, out, inputs = as_numpy(weight.t()), as_numpy(y), as_numpy(rows)
    scales = NO_SCALE if scale is None else scale.numpy()
    biases = stored[0, :0] if bias is None else as_numpy(bias)
    limit = np.float32(threshold)
    if _pool is None or weight.numel() * weight.element_size() < PARALLEL_BYTES:
        count = linear(inputs, stored, biases, limit, scales, index, values, sums, out)
    else:
        count = compact(inputs, limit, scales, index, values)
        spread(lambda lo, hi: gather(sums, stored, index, values, count, lo, hi), m, VECTOR)
        finish(sums, biases, out)
    y = y.view(*x.shape[:-1], m)
    if low_rank is not None:
        a, b = low_rank
        kept = torch.zeros(batch, n).index_copy_(
            1, torch.from_numpy(index[:count]), torch.from_numpy(values[:, :count])
        )
        y = y + ((whole - kept).to(x.dtype).view(x.shape) @ a) @ b
    return y


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


def neuron_sparse_ffn(x, activation, up, down):
    """As masked_dense.neuron_sparse_ffn, for up to 8 rows: only active rows of up and columns of down are read.

    Raises ValueError for what `unsupported` names and for an up projection whose neurons are not contiguous.
    """
    problem = unsupported(activation, down)
    if problem or not up.is_contiguous():
        raise ValueError(problem or "cpu_numba needs the up projection stored with each neuron contiguous")
    rows = x.reshape(-1, x.shape[-1]).float().contiguous().numpy()
    gates = activation.reshape(-1, activation.shape[-1]).contiguous()
    (d, f), batch = down.shape, rows.shape[0]
    index, values = np.empty(f + 1, np.int64), np.empty((batch, f + 1), np.float32)
    sums, y = np.empty((batch, d), np.float32), torch.empty(batch, d, dtype=x.dtype)
    ups, downs = as_numpy(up), as_numpy(down.t())
    count = compact(as_numpy(gates), np.float32(0), NO_SCALE, index, values)
    if _pool is None or count * d * ups.itemsize < PARALLEL_BYTES:
        listed_dots(ups, rows, index, values, 0, count)
        gather(sums, downs, index, values, count, 0, d)
    else:
        spread(lambda lo, hi: listed_dots(ups, rows, index, values, lo, hi), count, 1)
        spread(lambda lo, hi: gather(sums, downs, index, values, count, lo, hi), d, VECTOR)
    finish(sums, downs[0, :0], as_numpy(y))
    return y.view(x.shape)


def output_sparse_linear(x, weight, keep):
    """As masked_dense.output_sparse_linear, for up to 8 rows: only rows of the weight that some row keeps are read.

    Raises ValueError for what `unsupported` names.
    """
    problem = unsupported(keep.to(weight.dtype), weight.t())
    if problem or x.dtype != weight.dtype:
        raise ValueError(problem or f"cpu_numba needs input and weight of one dtype, got {x.dtype}, {weight.dtype}")
    rows = x.reshape(-1, x.shape[-1]).float().contiguous().numpy()
    (m, d), batch = weight.shape, rows.shape[0]
    index, values = np.empty(m + 1, np.int64), np.empty((batch, m + 1), np.float32)
    ones, stored = as_numpy(keep.reshape(batch, m).to(weight.dtype).contiguous()), as_numpy(weight)
    count = compact(ones, np.float32(0), NO_SCALE, index, values)
    if _pool is None or count * d * stored.itemsize < PARALLEL_BYTES:
        listed_dots(stored, rows, index, values, 0, count)
    else:
        spread(lambda lo, hi: listed_dots(stored, rows, index, values, lo, hi), count, 1)
    y = torch.zeros(batch, m)
    y.index_copy_(1, torch.from_numpy(index[:count]), torch.from_numpy(values[:, :count]))
    return y.to(x.dtype).view(keep.shape)


def map_sparse_conv2d(x, rows, bias, stride, padding, dilation):
    """One image's convolution that skips zeros of x [1, C, H, W] float32; rows [kh, kw, C, M]. Returns [1, M, OH, OW]."""
    kernel_h, kernel_w, _, outputs = rows.shape
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(x.shape[2:], padding, dilation, (kernel_h, kernel_w), stride, strict=True)
    ]
    out = torch.zeros(*size, outputs)
    if bias is not None:
        out += bias.detach()
    _conv_numba.scatter(x[0].contiguous().numpy(), rows.numpy(), out.numpy(), stride, padding, dilation)
    return out.permute(2, 0, 1)[None]


def unsupported_expert_ffn(x: torch.Tensor, weight: torch.Tensor, last: torch.Tensor | None = None) -> str | None:
    """Why this call can't be served; weight: the experts' first map [f, d]."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cpu_numba serves float32 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    return None


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """As masked_dense.expert_ffn. Up to 8 tokens read the weights of selected experts only; more are grouped by expert."""
    rows, chosen = x.reshape(-1, x.shape[-1]), keep.reshape(-1, keep.shape[-1])
    maps = (first, first_bias, up, up_bias, last)
    served = few_tokens if len(rows) <= 8 else many_tokens
    y = served(rows.contiguous(), chosen, masked_dense.ACTIVATIONS[activation], *maps).to(x.dtype)
    y = y if last_bias is None else y + last_bias
    return y.view(*x.shape[:-1], last.shape[1])


def few_tokens(rows, chosen, function, first, first_bias, up, up_bias, last) -> torch.Tensor:
    """float32 [B, n] of rows [B, d]: neurons of experts that any row selects, listed dots, then a gather."""
    batch, size, f = len(rows), len(first) // chosen.shape[1], len(first)
    experts = chosen.any(0).nonzero().flatten()
    listed = (experts[:, None] * size + torch.arange(size)).flatten()
    count, x, index = len(listed), rows.float().numpy(), np.zeros(f + 1, np.int64)
    index[:count] = listed.numpy()
    parallel = _pool is not None and count * rows.shape[1] * first.element_size() >= PARALLEL_BYTES

    def dots(weight, bias) -> torch.Tensor:
        values, stored = np.ones((batch, f + 1), np.float32), as_numpy(weight)
        if parallel:
            spread(lambda lo, hi: listed_dots(stored, x, index, values, lo, hi), count, 1)
        else:
            listed_dots(stored, x, index, values, 0, count)
        found = torch.from_numpy(values)[:, :count]
        return found if bias is None else found + bias[listed].float()

    x1 = function(dots(first, first_bias))
    x1 = x1 if up is None else x1 * dots(up, up_bias)
    values = np.zeros((batch, f + 1), np.float32)
    values[:, :count] = (x1 * chosen[:, experts].repeat_interleave(size, 1)).numpy()
    sums, stored, n = np.empty((batch, last.shape[1]), np.float32), as_numpy(last), last.shape[1]
    if parallel:
        spread(lambda lo, hi: gather(sums, stored, index, values, count, lo, hi), n, VECTOR)
    else:
        gather(sums, stored, index, values, count, 0, n)
    return torch.from_numpy(sums)


def many_tokens(rows, chosen, function, first, first_bias, up, up_bias, last) -> torch.Tensor:
    """float32 [T, n] of rows [T, d]: for each expert the products of its own tokens only."""
    size = len(first) // chosen.shape[1]
    y = torch.zeros(len(rows), last.shape[1])
    for e in chosen.any(0).nonzero().flatten().tolist():
        tokens, part = chosen[:, e].nonzero().flatten(), slice(e * size, (e + 1) * size)
        x = rows[tokens]
        x1 = function(F.linear(x, first[part], None if first_bias is None else first_bias[part]))
        if up is not None:
            x1 = x1 * F.linear(x, up[part], None if up_bias is None else up_bias[part])
        y.index_add_(0, tokens, (x1 @ last[part]).float())
    return y
