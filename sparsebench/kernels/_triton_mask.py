"""One kernel that compares and selects: x where |x| c > t (or its token stays dense), else 0. For calls of many tokens."""

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
