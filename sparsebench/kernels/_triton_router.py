"""Triton kernel of an expert FFN's router of two maps and its rule: scores never leave the processor, one pass over x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 256  # width, and experts: what one program holds of them


@triton.jit
def route(
    x, first, second, threshold, keep, rows, d: tl.constexpr, width: tl.constexpr, experts: tl.constexpr,
    outer: tl.constexpr, rule: tl.constexpr, precision: tl.constexpr, block_t: tl.constexpr, block_w: tl.constexpr,
    block_e: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """keep[t, e] (0 or 1) of block_t tokens."""
    t, w, e = tl.program_id(0) * block_t + tl.arange(0, block_t), tl.arange(0, block_w), tl.arange(0, block_e)
    there = t < rows
    hidden = tl.zeros((block_t, block_w), tl.float32)
    for k in range(0, d, block_d):
        i = k + tl.arange(0, block_d)
        inside = i < d
        part = tl.load(x + t.to(tl.int64)[:, None] * d + i[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        weight = tl.load(first + w[None, :] * d + i[:, None], mask=(w < width)[None, :] & inside[:, None], other=0.0)
        hidden = tl.dot(part, weight, hidden, precision)
    hidden = tl.maximum(hidden, 0.0).to(second.dtype.element_ty)
    weight = tl.load(
        second + e[None, :] * width + w[:, None], mask=(e < experts)[None, :] & (w < width)[:, None], other=0.0
    )
    scores = tl.dot(hidden, weight, tl.zeros((block_t, block_e), tl.float32), precision)
    if outer == "abs":
        scores = tl.abs(scores)
    tau = tl.load(threshold)
    if rule == "max":
        largest = tl.max(scores, 1)  # what fills the tile up is 0, which no score that can be kept is below
        kept = (scores >= tau * largest[:, None]) & (scores > tl.where(tau > 0, 0.0, float("-inf")))
    else:
        share = tl.minimum(tl.maximum(tau, 0.0), 1.0)
        kept = scores > tl.log(share / (1 - share))
    target = keep + t.to(tl.int64)[:, None] * experts + e[None, :]
    tl.store(target, tl.where(tau < 0, 1, kept.to(tl.int8)), mask=there[:, None] & (e < experts)[None, :])


def unsupported_expert_keep(x: torch.Tensor, weight: torch.Tensor, second: torch.Tensor | None = None) -> str | None:
    """Why this router can't be served; weight [w, d], second [E, w], all of one dtype."""
    if second is None or max(second.shape) > LARGEST or min(*second.shape, x.shape[-1]) < 1:
        return f"cuda_triton serves routers of two maps with up to {LARGEST} units and experts"
    if x.dtype not in DTYPES or not x.dtype == weight.dtype == second.dtype:
        return f"cuda_triton serves routers of the input's dtype, got input {x.dtype} and router {weight.dtype}"
    return None


@torch.library.custom_op("sparsebench::triton_route", mutates_args=())
def triton_route(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, threshold: torch.Tensor, outer: str, rule: str
) -> torch.Tensor:
    """x [T, d], first [w, d], second [E, w] -> bool [T, E]."""
    (rows, d), (experts, width) = x.shape, second.shape
    keep = torch.empty(rows, experts, dtype=torch.bool, device=x.device)
    block_w, block_e = (max(16, triton.next_power_of_2(n)) for n in (width, experts))
    block_t, block_d = 64, min(64 if x.element_size() == 2 else 32, max(16, triton.next_power_of_2(d)))
    precision = "tf32x3" if x.element_size() == 4 else "tf32"
    route[(triton.cdiv(rows, block_t),)](
        x, first, second, threshold, keep.view(torch.int8), rows, d, width, experts, outer, rule, precision,
        block_t, block_w, block_e, block_d, num_warps=4, num_stages=3,
    )  # fmt: skip
    return keep


@triton_route.register_fake
def _(x, first, second, threshold, outer, rule):
    return x.new_empty(x.shape[0], second.shape[0], dtype=torch.bool)


def expert_keep(x, weight, threshold, second=None, *, outer="none", rule="above"):
    """As masked_dense.expert_keep for two maps, sums in fp32. Raises ValueError for what it can't serve."""
    problem = unsupported_expert_keep(x, weight, second)
    if problem:
        raise ValueError(problem)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    keep = triton_route(rows, weight.contiguous(), second.contiguous(), threshold.float(), outer, rule)
    return keep.view(*x.shape[:-1], -1)
