"""GPU kernels in Triton: up to 8 rows, fp32, fp16 and bf16, any shape. The kept channels are compacted once, then gathered.

Every product is two kernels: `compact` lists the channels that any row keeps (one program, shared by projections that
read the same input), `gather` reads only their weights, split over channels and outputs, summed in fp32 with atomics.
Runs under TRITON_INTERPRET=1 on a CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebench.kernels._triton_experts import expert_ffn, unsupported_expert_ffn  # noqa: F401 (of this backend)
from sparsebench.kernels._triton_router import expert_keep, unsupported_expert_keep  # noqa: F401

RANK = 10
SKIPS = True
MAX_ROWS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def prepare(threads: int) -> None:
    """Nothing to set up: kernels are compiled when they are first launched."""


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a call can't be served: other dtypes, more than 8 rows, weight not channel-contiguous."""
    if weight.dtype not in DTYPES or x.dtype != weight.dtype:
        return f"cuda_triton serves float32, float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if not weight.t().is_contiguous():
        return "cuda_triton needs the weight stored with its input channels contiguous"
    if x.numel() // x.shape[-1] > MAX_ROWS:
        return f"cuda_triton serves 1 to {MAX_ROWS} rows, got {x.numel() // x.shape[-1]}"
    return None


@triton.jit
def compact_kernel(
    x, scale, threshold, index, values, count, n: tl.constexpr, rows: tl.constexpr, complement: tl.constexpr, has_scale: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """index[k], values[row, k] and count[0] for the channels that any row keeps; one program."""
    limit = tl.load(threshold)
    kept_so_far = 0
    for start in range(0, n, block):
        i = start + tl.arange(0, block)
        inside = i < n
        factor = tl.load(scale + i, mask=inside, other=0.0) if has_scale else tl.full((block,), 1.0, tl.float32)
        any_kept = tl.zeros((block,), tl.int32)
        for row in tl.static_range(rows):
            value = tl.load(x + row * n + i, mask=inside, other=0.0).to(tl.float32)
            kept = (tl.abs(value) * factor > limit) != complement
            any_kept = any_kept | (kept & inside).to(tl.int32)
        place = kept_so_far + tl.cumsum(any_kept, 0) - any_kept
        tl.store(index + place, i, mask=any_kept > 0)
        for row in tl.static_range(rows):
            value = tl.load(x + row * n + i, mask=inside, other=0.0).to(tl.float32)
            kept = (tl.abs(value) * factor > limit) != complement
            tl.store(values + row * n + place, tl.where(kept, value, 0.0), mask=any_kept > 0)
        kept_so_far += tl.sum(any_kept, 0)
    tl.store(count, kept_so_far)


@triton.jit
def gather_kernel(
    weight, index, values, count, y, n: tl.constexpr, m: tl.constexpr, rows: tl.constexpr, block_m: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """y[row, j] += sum_k values[row, k] * weight[index[k], j]; grid (outputs / block_m, shares of the channels)."""
    j = tl.program_id(0) * block_m + tl.arange(0, block_m)
    inside = j < m
    kept = tl.load(count)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    first = kept * share // shares
    last = kept * (share + 1) // shares
    sums = tl.zeros((8, block_m), tl.float32)
    row_ids = tl.arange(0, 8)
    for start in range(first, last, block_k):
        k = start + tl.arange(0, block_k)
        wanted = k < last
        channel = tl.load(index + k, mask=wanted, other=0)
        tile = tl.load(
            weight + channel[:, None].to(tl.int64) * m + j[None, :], mask=wanted[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        for row in tl.static_range(rows):
            value = tl.load(values + row * n + k, mask=wanted, other=0.0)
            part = tl.sum(tile * value[:, None], 0)
            sums += tl.where((row_ids == row)[:, None], part[None, :], 0.0)
    if last > first:
        for row in tl.static_range(rows):
            part = tl.sum(tl.where((row_ids == row)[:, None], sums, 0.0), 0)
            tl.atomic_add(y + row * m + j, part, mask=inside)


@triton.jit
def rows_kernel(
    weight, x, index, values, count, n: tl.constexpr, m: tl.constexpr, rows: tl.constexpr, block_k: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """values[row, k] *= weight[index[k], :] . x[row] for the listed rows of weight [m, n]; grid: blocks of the list."""
    kept = tl.load(count)
    k = tl.program_id(0) * block_k + tl.arange(0, block_k)
    wanted = k < kept
    if tl.program_id(0) * block_k < kept:
        neuron = tl.load(index + k, mask=wanted, other=0)
        for row in tl.static_range(rows):
            sums = tl.zeros((block_k, block_n), tl.float32)
            for start in range(0, n, block_n):
                i = start + tl.arange(0, block_n)
                mask = wanted[:, None] & (i < n)[None, :]
                tile = tl.load(weight + neuron[:, None].to(tl.int64) * n + i[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
                value = tl.load(x + row * n + i, mask=i < n, other=0.0).to(tl.float32)
                sums += tile * value[None, :]
            old = tl.load(values + row * m + k, mask=wanted, other=0.0)
            tl.store(values + row * m + k, old * tl.sum(sums, 1), mask=wanted)


def compact(x: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor | None, complement: bool = False) -> tuple:
    """(index int32 [n], values fp32 [rows, n], count int32 [1]) of x [rows, n]; nothing leaves the device."""
    rows, n = x.shape
    index = torch.empty(n, dtype=torch.int32, device=x.device)
    values = torch.empty(rows, n, dtype=torch.float32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    factor = x if scale is None else scale.float()
    block = min(2048, triton.next_power_of_2(n))
    compact_kernel[(1,)](
        x, factor, threshold, index, values, count, n, rows, complement, scale is not None, block, num_warps=8
    )
    return index, values, count


def gather(listed: tuple, weight: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, m]: the product of listed channels with weight [n, m], both from `compact`."""
    index, values, count = listed
    (n, m), rows = weight.shape, values.shape[0]
    y = torch.zeros(rows, m, dtype=torch.float32, device=weight.device)
    block_m, block_k = 128, 16
    tiles = triton.cdiv(m, block_m)
    shares = max(1, min(64, triton.cdiv(1024, tiles)))
    gather_kernel[(tiles, shares)](
        weight, index, values, count, y, n, m, rows, block_m, block_k, num_warps=4, num_stages=2
    )
    return y


@torch.library.custom_op("sparsebench::triton_linear", mutates_args=())
def triton_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: torch.Tensor, scale: torch.Tensor | None,
    a: torch.Tensor | None, b: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x [rows, n], weight [n, m] -> [rows, m], with the low-rank image of what was dropped."""
    y = gather(compact(x, threshold, scale), weight)
    if a is not None:
        if x.shape[0] == 1:
            inner = gather(compact(x, threshold, scale, complement=True), a)
        else:
            inner = torch.where((x.abs() if scale is None else x.abs() * scale) > threshold, 0, x).float() @ a.float()
        y += inner @ b.float()
    if bias is not None:
        y += bias
    return y.to(x.dtype)


@triton_linear.register_fake
def _(x, weight, bias, threshold, scale, a, b):
    return x.new_empty(x.shape[0], weight.shape[1])


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """As masked_dense.input_sparse_linear, for up to 8 rows. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if keep is None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32, device=x.device)
        y = triton_linear(rows, weight.t(), bias, threshold, scale, *(low_rank or (None, None)))
        return y.view(*x.shape[:-1], -1)
    zero = torch.zeros((), device=x.device)
    keep = keep.reshape(rows.shape)
    y = triton_linear(torch.where(keep, rows, 0), weight.t(), bias, zero, None, None, None)
    if low_rank is not None:
        y = y + (torch.where(keep, 0, rows) @ low_rank[0]) @ low_rank[1]
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("sparsebench::triton_ffn", mutates_args=())
def triton_ffn(x: torch.Tensor, activation: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [rows, d], activation [rows, f], up [f, d], down [f, d] (neuron contiguous in both) -> [rows, d]."""
    rows, f = activation.shape
    index, values, count = compact(activation, torch.zeros((), device=x.device), None)
    block_k, block_n = 4, min(512, triton.next_power_of_2(x.shape[1]))
    rows_kernel[(triton.cdiv(f, block_k),)](
        up, x, index, values, count, x.shape[1], f, rows, block_k, block_n, num_warps=4
    )
    return gather((index, values, count), down).to(x.dtype)


@triton_ffn.register_fake
def _(x, activation, up, down):
    return torch.empty_like(x)


def neuron_sparse_ffn(x, activation, up, down):
    """As masked_dense.neuron_sparse_ffn, for up to 8 rows. Raises ValueError for what it can't serve."""
    problem = unsupported(activation, down)
    if problem or not up.is_contiguous():
        raise ValueError(problem or "cuda_triton needs the up projection stored with each neuron contiguous")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = triton_ffn(rows, activation.reshape(-1, activation.shape[-1]).contiguous(), up, down.t())
    return y.view(x.shape)


@torch.library.custom_op("sparsebench::triton_rows", mutates_args=())
def triton_rows(x: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x [rows, n], weight [m, n], keep [rows, m] -> [rows, m]."""
    rows, m = keep.shape
    index, values, count = compact(keep.to(x.dtype), torch.zeros((), device=x.device), None)
    block_k, block_n = 4, min(512, triton.next_power_of_2(x.shape[1]))
    rows_kernel[(triton.cdiv(m, block_k),)](
        weight, x, index, values, count, x.shape[1], m, rows, block_k, block_n, num_warps=4
    )
    listed = torch.arange(m, device=x.device) < count
    place = torch.where(listed, index, m).long().expand(rows, m)  # what is not listed goes to a spare column
    y = torch.zeros(rows, m + 1, device=x.device).scatter_(1, place, torch.where(listed, values, 0))
    return y[:, :m].to(x.dtype)


@triton_rows.register_fake
def _(x, weight, keep):
    return x.new_empty(keep.shape)


def output_sparse_linear(x, weight, keep):
    """As masked_dense.output_sparse_linear, for up to 8 rows. Raises ValueError for what it can't serve."""
    problem = unsupported(x, weight.t())
    if problem:
        raise ValueError(problem)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return triton_rows(rows, weight, keep.reshape(len(rows), -1).contiguous()).view(keep.shape)
