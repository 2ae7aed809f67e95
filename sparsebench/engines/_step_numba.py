"""The compiled part of `fused_cpu`: one thread's share of a decode step (numba), and the barrier between threads.

Every thread runs the same code on its share of outputs and heads and meets the others at barriers, five a layer and one
more for a rotation; norm and compaction are repeated by each thread instead of shared, which is cheaper than another
barrier. Float32 and bfloat16, sums in float32. Where marks are asked for, the first thread writes down how long each role
took.
"""

from __future__ import annotations

import math
import time

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsebench.engines._select_numba import compact_largest
from sparsebench.engines._step_packed import pointer, weigh
from sparsebench.kernels._gather_numba import compact, listed_dots, narrow, product, widen

# Columns of the table of addresses, one row per layer: weights, thresholds, scales (0 = none), biases, norms, cache.
WEIGHT, THRESHOLD, SCALE, BIAS, NORM, KEYS, VALUES = 0, 7, 14, 21, 24, 26, 27
RANK, LOW_A, LOW_B = 28, 35, 42  # of the low-rank remainder; rank 0 = none
TOP_K = 63  # inputs a token keeps, -1 = those above the threshold; 49 to 62 are of _step_packed.py
ROTATION, CUT, COLUMNS = 70, 72, 73  # behind each norm, 0 = none; threshold on |silu(gate)|, 0 = no choice of neurons
UNIT = 64  # outputs that one thread computes together, as quantised weights are stored
EMBED, NORMS, QKV, ATTENTION, OUT, GATE_UP, DOWN, HEAD = range(8)  # places in the array of marks
ROLES = ("embed", "norm", "qkv", "attention", "o", "gate_up", "down", "head")
I32, I64 = ir.IntType(32), ir.IntType(64)

# ---------------------------------------------------------------------------------------------------------------------
# Pieces numba has no word for


@intrinsic
def fetch_add(typing, state, index, amount):
    """state[index] += amount, atomically; the value before."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), args[2], "seq_cst")

    return types.int64(state, types.int64, types.int64), codegen


@intrinsic
def load_now(typing, state, index):
    """state[index] as it is now, not as the compiler remembers it."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(builder.gep(array.data, [args[1]]), "seq_cst", 8)

    return types.int64(state, types.int64), codegen


@intrinsic
def relax(typing, spins):
    """After many spins let the operating system run someone else."""

    def codegen(context, builder, signature, args):
        with builder.if_then(builder.icmp_signed(">", args[0], I64(20000))):
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, []), "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def now(typing):
    """The monotonic clock in ns."""

    def codegen(context, builder, signature, args):
        pair = builder.gep(cgutils.alloca_once(builder, ir.ArrayType(I64, 2)), [I32(0), I32(0)])  # seconds and the rest
        kind = ir.FunctionType(I32, [I32, I64.as_pointer()])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [I32(time.CLOCK_MONOTONIC), pair])
        seconds, rest = builder.load(pair), builder.load(builder.gep(pair, [I64(1)]))
        return builder.add(builder.mul(seconds, I64(10**9)), rest)

    return types.int64(), codegen


@njit(nogil=True, cache=True)
def mark(marks, role, since):
    """Add the ns since `since` to a role, and return now; nothing where no marks are taken (an empty array)."""
    if marks.shape[0] == 0:
        return 0
    here = now()
    marks[role] += here - since
    return here


@njit(nogil=True, cache=True)
def barrier(state, threads):
    """Wait until all threads are here. state: [arrived, round]."""
    if threads == 1:
        return
    here = load_now(state, 1)
    if fetch_add(state, 0, 1) == threads - 1:
        fetch_add(state, 0, -threads)
        fetch_add(state, 1, 1)
        return
    spins = 0
    while load_now(state, 1) == here:
        relax(spins)
        spins += 1


# ---------------------------------------------------------------------------------------------------------------------
# The step


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def normed(x, weight, eps, out):
    """RMSNorm of x into out."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    inverse = np.float32(1) / np.float32(math.sqrt(total / x.shape[0] + eps))
    for i in range(x.shape[0]):
        out[i] = x[i] * inverse * widen(weight[i])


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def add_remainder(x, a, b, index, count, y, lo, hi):
    """y[lo:hi] += (x where dropped) A B; a [n, r], b [r, m]; index[:count] lists the kept channels in order."""
    z = np.zeros(a.shape[1], np.float32)
    k = 0
    for i in range(x.shape[0]):
        if k < count and index[k] == i:
            k += 1
            continue
        for j in range(z.shape[0]):
            z[j] += x[i] * widen(a[i, j])
    for j in range(z.shape[0]):
        for i in range(lo, hi):
            y[i] += z[j] * widen(b[j, i])


@njit(nogil=True, cache=True)
def project(row, which, keep_all, x, y, m, lo, hi, like, stored, group, index, value, count, part):
    """y[lo:hi] = W x for map `which` over the kept channels, or with keep_all over all, a plain dense product.

    Compacts again only where `count` is below 0.
    """
    n = x.shape[0]
    in_order = keep_all and stored.itemsize == like.itemsize  # quantised weights are read by the list in any case
    if not in_order and count < 0:
        threshold, size = np.float32(-1), 0
        if not keep_all:
            threshold = carray(pointer(row[THRESHOLD + which]), (1,), np.float32)[0]
            size = 0 if row[SCALE + which] == 0 else n
        scale = carray(pointer(row[SCALE + which]), (size,), np.float32)
        if row[TOP_K + which] >= 0 and threshold >= 0:  # a negative threshold keeps all
            count = compact_largest(x, row[TOP_K + which], scale, index, value)
        else:
            count = compact(x.reshape(1, n), threshold, scale, index, value)
    weigh(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part)
    count = n if in_order else count
    rank = row[RANK + which]
    if rank > 0 and count < n:
        a = carray(pointer(row[LOW_A + which]), (n, rank), like.dtype)
        add_remainder(x, a, carray(pointer(row[LOW_B + which]), (rank, m), like.dtype), index, count, y, lo, hi)
    if which < 3 and row[BIAS + which] != 0:
        bias = carray(pointer(row[BIAS + which]), (m,), like.dtype)
        for j in range(lo, hi):
            y[j] += widen(bias[j])
    return count


@njit(nogil=True, cache=True)
def same_rule(row, a, b, keep_all):
    """Whether two maps keep the same channels of the same input."""
    if keep_all:
        return True
    if row[SCALE + a] != row[SCALE + b] or row[TOP_K + a] != row[TOP_K + b]:
        return False
    one = carray(pointer(row[THRESHOLD + a]), (1,), np.float32)[0]
    return one == carray(pointer(row[THRESHOLD + b]), (1,), np.float32)[0]


@njit(nogil=True, cache=True)
def rotated(x, address, like, out, lo, hi, index):
    """out[lo:hi] of x [n] times the rotation [n, n] at an address."""
    n = x.shape[0]
    weight = carray(pointer(address), (n, n), like.dtype)
    product(out.reshape(1, n), weight, x.reshape(1, n), index, lo, hi)


@njit(nogil=True, cache=True)
def silu(x):
    return x / (np.float32(1) + np.float32(math.exp(-x)))


@njit(nogil=True, cache=True)
def chosen_neurons(row, keep_all, x, mid, lo, hi, inner, like, index, value):
    """mid[0, lo:hi], the gate's outputs, become silu(gate) up(x) where |silu(gate)| >= t, else 0; only those rows of up are read."""
    up = carray(pointer(row[WEIGHT + 5]), (inner, x.shape[0]), like.dtype)
    least = np.float32(-1) if keep_all else carray(pointer(row[CUT]), (1,), np.float32)[0]
    count = 0
    for i in range(lo, hi):
        gate = silu(mid[0, i])
        mid[0, i] = 0
        index[count], value[0, count] = i, gate
        count += abs(gate) >= least
    listed_dots(up, x.reshape(1, x.shape[0]), index, value, 0, count)
    for k in range(count):
        mid[0, index[k]] = value[0, k]


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def attend(q, k, v, head, group, head_dim, keys, values, cosine, sine, position, scores, out, owner):
    """One query head over the cache; the head that owns its group also appends the new key and value."""
    half = head_dim // 2
    query = np.empty(head_dim, np.float32)
    new = np.empty(head_dim, np.float32)
    for d in range(head_dim):
        other, sign = (d + half, np.float32(-1)) if d < half else (d - half, np.float32(1))
        query[d] = q[head * head_dim + d] * cosine[d] + sign * q[head * head_dim + other] * sine[d]
        new[d] = k[group * head_dim + d] * cosine[d] + sign * k[group * head_dim + other] * sine[d]
    scaling = np.float32(1 / math.sqrt(head_dim))
    top = np.float32(-1e30)
    for p in range(position):
        total = np.float32(0)
        for d in range(head_dim):
            total += widen(keys[group, p, d]) * query[d]
        scores[p] = total * scaling
        top = max(top, scores[p])
    total = np.float32(0)
    for d in range(head_dim):
        total += new[d] * query[d]
    scores[position] = total * scaling
    top = max(top, scores[position])
    weight = np.float32(0)
    for p in range(position + 1):
        scores[p] = np.float32(math.exp(scores[p] - top))
        weight += scores[p]
    for d in range(head_dim):
        out[head * head_dim + d] = scores[position] * v[group * head_dim + d]
    for p in range(position):
        share = scores[p]
        for d in range(head_dim):
            out[head * head_dim + d] += share * widen(values[group, p, d])
    for d in range(head_dim):
        out[head * head_dim + d] /= weight
        if owner:
            keys[group, position, d] = narrow(new[d], keys)
            values[group, position, d] = narrow(v[group * head_dim + d], values)


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def dots(y, weight, x, lo, hi):
    """y[lo:hi] = W x for a weight [m, n] with rows contiguous."""
    for j in range(lo, hi):
        row = weight[j]
        total = np.float32(0)
        for i in range(x.shape[0]):
            total += widen(row[i]) * x[i]
        y[j] = total


@njit(nogil=True, cache=True)
def share_of(count, thread, threads, unit):
    """[lo, hi) of a thread, in whole units."""
    units = (count + unit - 1) // unit
    return units * thread // threads * unit, min(count, units * (thread + 1) // threads * unit)


@njit(nogil=True, cache=True)
def step(thread, threads, table, sizes, eps, keep_all, embedding, last_norm, head, cosine, sine, stored, group, token,
         position, residual, qkv, mixed, mid, added, scores, work, index, value, part, logits, state, marks):  # fmt: skip
    """One thread's part of one decode step. Buffers are shared but for row `thread` of scores, work, index, value and part.

    marks: int64 [0], or [ROLES] to which the first thread adds the ns of each role, waiting for the others included.
    """
    marks = marks[:0] if thread > 0 else marks
    since = now() if marks.shape[0] > 0 else 0
    hidden, inner, heads_, groups, head_dim, positions = sizes
    query, small = heads_ * head_dim, groups * head_dim
    q, k, v = qkv[:query], qkv[query : query + small], qkv[query + small :]
    x, index_, value_, part_ = work[thread], index[thread], value[thread : thread + 1], part[thread]
    lo, hi = share_of(hidden, thread, threads, UNIT)
    for i in range(lo, hi):
        residual[i] = widen(embedding[token, i])
    barrier(state, threads)
    since = mark(marks, EMBED, since)
    for layer in range(table.shape[0]):
        row = table[layer]
        keys = carray(pointer(row[KEYS]), (groups, positions, head_dim), embedding.dtype)
        values = carray(pointer(row[VALUES]), (groups, positions, head_dim), embedding.dtype)

        normed(residual, carray(pointer(row[NORM]), (hidden,), embedding.dtype), eps, x[:hidden])
        source = x[:hidden]
        if row[ROTATION] != 0:
            rotated(x[:hidden], row[ROTATION], embedding, added, lo, hi, index_)
            barrier(state, threads)
            source = added
        since = mark(marks, NORMS, since)
        a, b = share_of(query, thread, threads, UNIT)
        count = project(row, 0, keep_all, source, q, query, a, b, embedding, stored, group, index_, value_, -1, part_)
        a, b = share_of(small, thread, threads, UNIT)
        count = count if same_rule(row, 0, 1, keep_all) else -1
        count = project(
            row, 1, keep_all, source, k, small, a, b, embedding, stored, group, index_, value_, count, part_
        )
        count = count if same_rule(row, 1, 2, keep_all) else -1
        project(row, 2, keep_all, source, v, small, a, b, embedding, stored, group, index_, value_, count, part_)
        barrier(state, threads)
        since = mark(marks, QKV, since)

        per_group = heads_ // groups
        for h in range(heads_ * thread // threads, heads_ * (thread + 1) // threads):
            attend(q, k, v, h, h // per_group, head_dim, keys, values, cosine[position], sine[position], position,
                   scores[thread], mixed, h % per_group == 0)  # fmt: skip
        barrier(state, threads)
        since = mark(marks, ATTENTION, since)

        project(row, 3, keep_all, mixed, added, hidden, lo, hi, embedding, stored, group, index_, value_, -1, part_)
        for i in range(lo, hi):
            residual[i] += added[i]
        barrier(state, threads)
        since = mark(marks, OUT, since)

        normed(residual, carray(pointer(row[NORM + 1]), (hidden,), embedding.dtype), eps, x[:hidden])
        source = x[:hidden]
        if row[ROTATION + 1] != 0:
            rotated(x[:hidden], row[ROTATION + 1], embedding, added, lo, hi, index_)
            barrier(state, threads)
            source = added
        since = mark(marks, NORMS, since)
        a, b = share_of(inner, thread, threads, UNIT)
        count = project(
            row, 4, keep_all, source, mid[0], inner, a, b, embedding, stored, group, index_, value_, -1, part_
        )
        if row[CUT] != 0:
            chosen_neurons(row, keep_all, source, mid, a, b, inner, embedding, index_, value_)
        else:
            count = count if same_rule(row, 4, 5, keep_all) else -1
            project(
                row, 5, keep_all, source, mid[1], inner, a, b, embedding, stored, group, index_, value_, count, part_
            )
            for i in range(a, b):
                mid[0, i] = silu(mid[0, i]) * mid[1, i]
        barrier(state, threads)
        since = mark(marks, GATE_UP, since)

        project(row, 6, keep_all, mid[0], added, hidden, lo, hi, embedding, stored, group, index_, value_, -1, part_)
        for i in range(lo, hi):
            residual[i] += added[i]
        barrier(state, threads)
        since = mark(marks, DOWN, since)
    normed(residual, last_norm, eps, x[:hidden])
    since = mark(marks, NORMS, since)
    lo, hi = share_of(head.shape[0], thread, threads, 16)
    dots(logits, head, x[:hidden], lo, hi)
    mark(marks, HEAD, since)
