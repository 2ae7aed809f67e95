"""Sparse products of one row with weights in 8 or 4 bits on an NVIDIA GPU: the kernels of quant.cu as an operator of torch.

Activations in fp16 or bf16. int8 with a scale per output, int4 with groups along the inputs, symmetric or with zero points.
As cuda_gather, whose workspaces it shares, it can be captured and compiled through.
"""

from __future__ import annotations

import ctypes

import torch

from sparsebench.kernels import _nvrtc
from sparsebench.kernels._packed import Packed
from sparsebench.kernels.cuda_gather import (
    SOURCE,
    Gather,
    Pointer,
    Tuning,
    _workspaces,
    defines_of,
    processors,
    reserve,
)

RANK = 15  # below cuda_gather, whose products these complete
SKIPS = True
TUNINGS = {
    8: Tuning(8, 4, 1, 4.0),
    4: Tuning(8, 8, 1, 1.0),
}  # [choice] until timed: as many bytes in flight as in 16 bits


class PackedGather(ctypes.Structure):
    """Arguments of quant.cu's kernels: those of `gather`, and what its weights need beside them."""

    _fields_ = [
        ("of", Gather), ("scales", Pointer * 6), ("zeros", Pointer * 6), ("stride", ctypes.c_int * 6),
        ("group", ctypes.c_int), ("halves", ctypes.c_int),
    ]  # fmt: skip

    def set_part(self, i: int, packed: Packed, x, out, threshold, scale=None) -> None:
        """Product i: out [m] += W x over the channels with |x| c > t. All parts of a launch share n and group."""
        self.of.set_part(i, packed.q, x, out, threshold, scale)
        self.of.m[i] = packed.shape[0]
        self.scales[i] = packed.scale.data_ptr()
        self.zeros[i] = None if packed.zero is None else packed.zero.data_ptr()
        self.stride[i], self.group, self.halves = packed.row_bytes, packed.group, int(packed.grouped)


def prepare(threads: int) -> None:
    """Nothing to set up: kernels are compiled when they are first launched."""


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """It has no products of unquantised weights."""
    return "cuda_packed serves quantised weights only"


def unserved(packed: Packed) -> str | None:
    """Why quant.cu has no product of such a weight, or None."""
    if packed.dtype not in (torch.float16, torch.bfloat16):
        return f"cuda_packed serves inputs in float16 and bfloat16, got {packed.dtype}"
    if packed.bits == 4 and packed.axis != "input":
        return "cuda_packed serves int4 weights with groups along the inputs, got groups along the outputs"
    if packed.shape[0] % 8:
        return f"cuda_packed needs a multiple of 8 outputs, got {packed.shape[0]}"
    return None


def unsupported_quantised_linear(x: torch.Tensor, packed: Packed) -> str | None:
    """Why a single product can't be served: one row of the weight's dtype, and what `unserved` names."""
    if x.dtype != packed.dtype:
        return f"cuda_packed takes inputs of the model's dtype {packed.dtype}, got {x.dtype}"
    if x.numel() != x.shape[-1]:
        return f"cuda_packed serves one row, got {x.numel() // x.shape[-1]}"
    return unserved(packed)


def shared_bytes(tuning: Tuning, bits: int) -> int:
    """Shared memory of a packed gather: rows in flight or sums, compacted values and indices, a counter, scratch."""
    per_thread = max(tuning.loads * 4, 128 // bits) * tuning.wide * 4 + 8 * 6
    return tuning.warps * 32 * per_thread + tuning.warps * 4 + 16


def grid(outputs: list[int], packed: Packed, tuning: Tuning, processors: float) -> tuple[int, int]:
    """(tiles of all parts, shares of the channels): as many pieces of each group as fill the GPU `per_sm` times."""
    tiles = sum(-(-m // (32 * 128 // packed.bits * tuning.wide)) for m in outputs)
    most = -(-min(packed.group, packed.shape[1]) // (2 * tuning.warps))
    pieces = max(1, min(most, round(processors * tuning.per_sm / (tiles * packed.groups))))
    return tiles, packed.groups * pieces


def start(name: str, arguments: PackedGather, packed: Packed, tuning: Tuning, dense: bool = False) -> None:
    """Start a packed gather of one part on the current stream."""
    device, shared = packed.device.index, shared_bytes(tuning, packed.bits)
    defines = defines_of(tuning, packed.dtype) | {"BITS": packed.bits}
    kernel = _nvrtc.function(SOURCE, name, device, shared, **defines, **({"DENSE": 1} if dense else {}))
    size = grid([packed.shape[0]], packed, tuning, processors(device))
    _nvrtc.launch(kernel, size, tuning.warps * 32, shared, [arguments], overlap=True)


def accumulate(x, packed: Packed, out, threshold, tuning: Tuning, dense: bool = False) -> None:
    """out [m] += W (x where |x| > t), fp32 x and out: the product as a fused step runs it; dense: with nothing skipped."""
    arguments = PackedGather()
    arguments.set_part(0, packed, x, out, threshold)
    start("gather_packed_plain", arguments, packed, tuning, dense)


@torch.library.custom_op("sparsebench::packed_linear", mutates_args=(), device_types="cuda")
def packed_linear(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, zero: torch.Tensor | None, bias: torch.Tensor | None,
    threshold: torch.Tensor, scale: torch.Tensor | None, m: int, bits: int, group: int,
) -> torch.Tensor:  # fmt: skip
    """One product of a row x [n], finished by the last CTA of each tile; needs `reserve(.., m)`."""
    y, (sums, arrived) = x.new_empty(m), _workspaces[x.device, m]
    packed, arguments = Packed(q, scales, zero, (m, len(q)), bits, group, "input", x.dtype), PackedGather()
    arguments.set_part(0, packed, x, sums, threshold, scale)
    arguments.of.result, arguments.of.arrived = y.data_ptr(), arrived.data_ptr()
    if bias is not None:
        arguments.of.bias = bias.data_ptr()
    start("gather_packed_half", arguments, packed, TUNINGS[bits])
    return y


@packed_linear.register_fake
def _(x, q, scales, zero, bias, threshold, scale, m, bits, group):
    return x.new_empty(m)


def quantised_linear(x, packed: Packed, bias=None, *, threshold=None, scale=None, keep=None):
    """As masked_dense.quantised_linear, for one row. Raises ValueError for what `unsupported_quantised_linear` names."""
    problem = unsupported_quantised_linear(x, packed)
    if problem:
        raise ValueError(problem)
    row = x.reshape(-1).contiguous()
    reserve(x.device, packed.shape[0])
    if keep is not None:
        row, scale = torch.where(keep.reshape(-1), row, 0), None
        threshold = torch.zeros((), device=x.device)
    scale = None if scale is None else scale.float()
    stored = (packed.q, packed.scale, packed.zero)
    y = packed_linear(row, *stored, bias, threshold, scale, packed.shape[0], packed.bits, packed.group)
    return y.view(*x.shape[:-1], -1)
