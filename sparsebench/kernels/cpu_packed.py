"""CPU kernels for weights in 8 or 4 bits, compiled at run time by numba: only kept input channels are read.

Activations in fp32 or bf16, up to 8 rows, any size. The loops are in _packed_numba.py; threads are those of cpu_numba.
"""

from __future__ import annotations

import numpy as np
import torch

from sparsebench.kernels import cpu_numba
from sparsebench.kernels._gather_numba import compact, finish
from sparsebench.kernels._packed import BLOCK, Packed
from sparsebench.kernels._packed_numba import (
    gather_groups,
    gather_int4_outputs,
    gather_int8,
    scale_levels,
    unpack_levels,
)
from sparsebench.kernels.cpu_numba import NO_SCALE, as_numpy

RANK = 5  # below cpu_numba, whose products these complete
SKIPS = True
NO_HALF = np.empty((0, 0), np.uint16)


def prepare(threads: int) -> None:
    """The worker threads of cpu_numba."""
    cpu_numba.prepare(threads)


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """It has no products of unquantised weights."""
    return "cpu_packed serves quantised weights only"


def unserved(packed: Packed) -> str | None:
    """Why there is no product of such a weight, or None."""
    if packed.dtype not in (torch.float32, torch.bfloat16):
        return f"cpu_packed serves inputs in float32 and bfloat16, got {packed.dtype}"
    if packed.bits == 4 and packed.axis == "output" and packed.group % BLOCK:
        return f"cpu_packed needs groups along the outputs in multiples of {BLOCK}, got {packed.group}"
    return None


def unsupported_quantised_linear(x: torch.Tensor, packed: Packed) -> str | None:
    """Why a call can't be served: more than 8 rows, another dtype than the model's, and what `unserved` names."""
    if x.dtype != packed.dtype:
        return f"cpu_packed takes inputs of the model's dtype {packed.dtype}, got {x.dtype}"
    if x.numel() // x.shape[-1] > 8:
        return f"cpu_packed serves 1 to 8 rows, got {x.numel() // x.shape[-1]}"
    return unserved(packed)


def arrays(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q, scale, zero) for the compiled loops: float16 as its bits, scales per output as [m]."""
    q = packed.q.numpy()
    if not packed.grouped:
        return q, packed.scale.flatten().numpy(), NO_HALF
    zero = NO_HALF if packed.zero is None else packed.zero.view(torch.uint16).numpy()
    return q, packed.scale.view(torch.uint16).numpy(), zero


def product(packed: Packed, stored, sums, index, values, count: int, part, lo: int, hi: int) -> None:
    """sums[b, lo:hi] of the listed channels, by the loop for this kind of weight."""
    q, scale, zero = stored
    if not packed.grouped:
        gather_int8(sums, q, scale, index, values, count, part, lo, hi)
    elif packed.axis == "input":
        gather_groups(sums, q, scale, zero, packed.group, index, values, count, part, lo, hi)
    else:
        gather_int4_outputs(sums, q, scale, packed.group, index, values, count, part, lo, hi)


def unpacked(packed: Packed) -> torch.Tensor:
    """As Packed.dequantised, in one pass of compiled code where weights have groups of scales."""
    if not packed.grouped:
        return packed.dequantised()
    (m, n), (_, scale, zero) = packed.shape, arrays(packed)
    if packed.bits == 4:
        values = torch.empty(n, 2 * packed.row_bytes)
        unpack_levels(packed.q.view(torch.int32).numpy().view(np.uint32), values.numpy())
    else:
        values = packed.q.float()
    group = packed.group if packed.axis == "input" else -packed.group
    scale_levels(values.numpy(), scale, zero, group, m)
    return values[:, :m].to(packed.dtype).t()


def quantised_linear(x, packed: Packed, bias=None, *, threshold=None, scale=None, keep=None):
    """As masked_dense.quantised_linear, for up to 8 rows. Raises ValueError for what `unsupported_quantised_linear` names."""
    problem = unsupported_quantised_linear(x, packed)
    if problem:
        raise ValueError(problem)
    rows = x.reshape(-1, x.shape[-1])
    if keep is not None:
        rows, threshold, scale = torch.where(keep.reshape(rows.shape), rows, 0), 0.0, None
    (m, n), batch = packed.shape, rows.shape[0]
    index, values = np.empty(n + 1, np.int64), np.empty((batch, n + 1), np.float32)
    sums, part = np.empty((batch, m), np.float32), np.empty((batch, -(-m // BLOCK) * BLOCK), np.float32)
    y, stored = torch.empty(batch, m, dtype=x.dtype), arrays(packed)
    out = as_numpy(y)
    biases = out[0, :0] if bias is None else as_numpy(bias.detach())
    scales = NO_SCALE if scale is None else scale.numpy()
    count = compact(as_numpy(rows.contiguous()), np.float32(threshold), scales, index, values)

    def work(lo: int, hi: int) -> None:
        product(packed, stored, sums, index, values, count, part, lo, hi)

    if cpu_numba._pool is None or count * packed.row_bytes < cpu_numba.PARALLEL_BYTES:
        work(0, m)
    else:
        cpu_numba.spread(work, m, BLOCK)
    finish(sums, biases, out)
    return y.view(*x.shape[:-1], m)
