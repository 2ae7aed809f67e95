"""Decode attention over kept key-value groups on an NVIDIA GPU (heads.cu), as an operator of torch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from sparsebench.kernels import _nvrtc

SOURCE = Path(__file__).with_name("heads.cu")
HEAD_SIZES = (32, 64, 128, 256)
WARPS, LOADS = 4, 2
POSITIONS_PER_SPLIT = 512  # of the cache [choice]
MAX_SPLITS = 16
Pointer = ctypes.c_void_p
_arrived: dict[tuple, torch.Tensor] = {}


class Heads(ctypes.Structure):
    """Arguments of heads.cu's `attend_kept`."""

    _fields_ = [
        *((name, Pointer) for name in ("q", "keys", "values", "keep", "length", "out", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("groups", "positions")),
        ("scaling", ctypes.c_float),
    ]  # fmt: skip


def unsupported_selective_attention(q: torch.Tensor, keys: torch.Tensor) -> str | None:
    """Why a call can't be served; q [B, H, D], keys [B, groups, P, D]."""
    if q.dtype not in (torch.float16, torch.bfloat16) or keys.dtype != q.dtype:
        return f"cuda_rows serves attention in float16 and bfloat16, got queries {q.dtype} and keys {keys.dtype}"
    if q.shape[-1] not in HEAD_SIZES or q.shape[1] // keys.shape[1] > 16:
        return f"cuda_rows serves head sizes {HEAD_SIZES} and up to 16 heads a group, got {q.shape[-1]}, {q.shape[1] // keys.shape[1]}"
    return None


@torch.compiler.assume_constant_result
def reserve(device: torch.device, pairs: int) -> bool:
    """Make the arrival counters of so many (sequence, group) pairs, which every call finds and leaves zero."""
    if (device, pairs) not in _arrived:
        _arrived[device, pairs] = torch.zeros(pairs, dtype=torch.int32, device=device)
    return True


def shared_bytes(group: int, head_dim: int) -> int:
    return (group * head_dim + WARPS * group * (head_dim + 2)) * 4 + 16


def built(name: str, q: torch.Tensor, head_dim: int, group: int, splits: int, shared: int):
    """The kernel for a type, head size and group, compiled the first time."""
    defines = {"WARPS": WARPS, "LOADS": LOADS, "WIDE": 1, "HEAD_DIM": head_dim, "GROUP": group, "SPLITS": splits}
    if q.dtype == torch.bfloat16:
        defines["BF16"] = 1
    return _nvrtc.function(SOURCE, name, q.device.index, shared, **defines)


def run_heads(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, lengths: torch.Tensor, scaling: float
) -> torch.Tensor:
    """q [B, H, D], keys and values [B, groups, P, D], keep bool [B, groups], lengths int32 [B] -> [B, H, D]."""
    batch, heads, head_dim = q.shape
    groups, positions = keys.shape[1:3]
    splits = min(MAX_SPLITS, 1 << (positions // POSITIONS_PER_SPLIT).bit_length())
    group, pairs = heads // groups, batch * groups
    out = torch.empty_like(q)
    partial = torch.empty(pairs * splits * group * (head_dim + 2), dtype=torch.float32, device=q.device)
    tensors = {
        "q": q, "keys": keys, "values": values, "keep": keep, "length": lengths, "out": out, "partial": partial,
        "arrived": _arrived[q.device, pairs],
    }  # fmt: skip
    arguments = Heads(
        groups=groups, positions=positions, scaling=scaling, **{k: v.data_ptr() for k, v in tensors.items()}
    )
    shared = shared_bytes(group, head_dim)
    kernel = built("attend_kept", q, head_dim, group, splits, shared)
    _nvrtc.launch(kernel, (pairs, splits), WARPS * 32, shared, [arguments], overlap=True)
    return out


heads_attention = torch.library.custom_op(
    "sparsebench::heads_attention", run_heads, mutates_args=(), device_types="cuda"
)


@heads_attention.register_fake
def _(q, keys, values, keep, lengths, scaling):
    return torch.empty_like(q)


def selective_attention(q, keys, values, keep, lengths, scaling):
    """As masked_dense.selective_attention. Raises ValueError for what `unsupported_selective_attention` names."""
    problem = unsupported_selective_attention(q, keys)
    if problem:
        raise ValueError(problem)
    reserve(q.device, q.shape[0] * keys.shape[1])
    return heads_attention(
        q.contiguous(), keys.contiguous(), values.contiguous(), keep.contiguous(), lengths.to(torch.int32), scaling
    )
