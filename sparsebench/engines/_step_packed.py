"""How a fused CPU step multiplies, by the type its weights are stored in: `weigh` is chosen when the step is compiled.

float32 and bf16 as _gather_numba.py has it; int8 and uint8 (two nibbles) are quantised weights, kernels/_packed.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from sparsebench.kernels._gather_numba import gather, product
from sparsebench.kernels._packed_numba import gather_groups, gather_int4_outputs, gather_int8

# Columns of the table of addresses (see _step_numba.py) that products read.
WEIGHT, SCALES, ZEROS = 0, 49, 56
BLOCK = 64
I64 = ir.IntType(64)


@intrinsic
def pointer(typing, address):
    """An address as a pointer for carray."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


def weigh(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part):
    """y[lo:hi] = W x for map `which` over the listed channels; in_order: over all, where a product without a list is faster.

    x [n], y [m], part [>= m in whole blocks] scratch; stored: any array of the weights' type; group: inputs that
    share scales, minus the outputs that do (int4), or 0: a scale per output (int8).
    """
    raise NotImplementedError("compiled code only")


@overload(weigh)
def weigh_by_type(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part):
    return {types.int8: int8, types.uint8: int4}.get(stored.dtype, plain)


def plain(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part):
    n = x.shape[0]
    weight = carray(pointer(row[WEIGHT + which]), (n, m), stored.dtype)
    if in_order:
        product(y.reshape(1, m), weight, x.reshape(1, n), index, lo, hi)
    else:
        gather(y.reshape(1, m), weight, index, value, count, lo, hi)


def int8(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part):
    width = (m + BLOCK - 1) // BLOCK * BLOCK
    weight = carray(pointer(row[WEIGHT + which]), (x.shape[0], width), stored.dtype)
    sums, out = part[:width].reshape(1, width), y.reshape(1, m)
    if group > 0:
        scales = carray(pointer(row[SCALES + which]), ((x.shape[0] + group - 1) // group, m), np.uint16)
        gather_groups(out, weight, scales, np.empty((0, 0), np.uint16), group, index, value, count, sums, lo, hi)
    else:
        each = carray(pointer(row[SCALES + which]), (m,), np.float32)
        gather_int8(out, weight, each, index, value, count, sums, lo, hi)


def int4(row, which, in_order, x, y, m, lo, hi, stored, group, index, value, count, part):
    n, width = x.shape[0], (m + BLOCK - 1) // BLOCK * BLOCK
    weight = carray(pointer(row[WEIGHT + which]), (n, width // 2), stored.dtype)
    sums, out = part[:width].reshape(1, width), y.reshape(1, m)
    if group > 0:
        groups = (n + group - 1) // group
        scales = carray(pointer(row[SCALES + which]), (groups, m), np.uint16)
        zeros = carray(pointer(row[ZEROS + which]), (groups if row[ZEROS + which] else 0, m), np.uint16)
        gather_groups(out, weight, scales, zeros, group, index, value, count, sums, lo, hi)
    else:
        scales = carray(pointer(row[SCALES + which]), (n, (m - group - 1) // -group), np.uint16)
        gather_int4_outputs(out, weight, scales, -group, index, value, count, sums, lo, hi)
