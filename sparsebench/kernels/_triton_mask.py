"""Kernels that select channels in calls of many tokens: by a threshold, or the k largest of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def select_kernel(
    x, threshold, scale, dense, y, size, n: tl.constexpr, has_scale: tl.constexpr, has_dense: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """y[i] of x taken flat, n channels a token."""
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < size
    value = tl.load(x + i, mask=inside, other=0.0)
    magnitude = tl.abs(value.to(tl.float32))
    if has_scale:
        magnitude = magnitude * tl.load(scale + i % n, mask=inside, other=0.0)
    kept = magnitude > tl.load(threshold)
    if has_dense:
        kept = kept | (tl.load(dense + i // n, mask=inside, other=0) != 0)
    tl.store(y + i, tl.where(kept, value, 0.0), mask=inside)


def keep_or_zero(
    x: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor | None, dense: torch.Tensor | None
) -> torch.Tensor:
    """x [..., n] where kept; threshold fp32 on the device; scale fp32 [n]; dense bool [...]: tokens kept whole."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.numel()
    marks = x if dense is None else dense.contiguous().view(torch.uint8)
    factors = x if scale is None else scale
    select_kernel[(triton.cdiv(size, BLOCK),)](
        x, threshold, factors, marks, y, size, x.shape[-1], scale is not None, dense is not None, BLOCK
    )
    return y


@triton.jit
def largest_kernel(score, mask, k, n: tl.constexpr, block: tl.constexpr):
    """mask[g, i]: score[g, i] is among the k largest of its group g of n; of equal ones the first.

    Numbers become integers of the same order, and the k-th largest is found bit by bit: the largest integer that at
    least k of the group reach.
    """
    at = tl.arange(0, block)
    inside = at < n
    group = tl.program_id(0).to(tl.int64) * n
    value = tl.load(score + group + at, mask=inside, other=0.0).to(tl.float32) + 0.0  # -0 is 0
    bits = value.to(tl.uint32, bitcast=True)
    order = tl.where(bits >> 31 == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)
    order = tl.where(inside, order, 0)
    limit = tl.full((), 0, tl.uint32)
    for i in tl.static_range(32):
        tried = limit | (tl.full((), 1, tl.uint32) << (31 - i))
        limit = tl.where(tl.sum((order >= tried).to(tl.int32)) >= k, tried, limit)
    above = inside & (order > limit)
    equal = (inside & (order == limit)).to(tl.int32)
    missing = k - tl.sum(above.to(tl.int32))
    tl.store(mask + group + at, (above | ((equal > 0) & (tl.cumsum(equal) <= missing))).to(tl.uint8), mask=inside)


def k_largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """bool, the shape of score [..., n]: the k largest of each last dimension, the first of equal ones; one program holds all n."""
    score, n = score.contiguous(), score.shape[-1]
    mask = torch.empty(score.shape, dtype=torch.uint8, device=score.device)
    block = triton.next_power_of_2(n)
    largest_kernel[(score.numel() // n,)](score, mask, k, n, block, num_warps=min(16, max(1, block // 256)))
    return mask.view(torch.bool)
