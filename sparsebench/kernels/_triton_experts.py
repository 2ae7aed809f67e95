"""Triton kernels of the expert FFN: a few tokens read only the experts they select; many are grouped (`_triton_grouped`).

Few tokens (up to 8): the selected experts are listed, one program per (listed expert, few of its neurons) writes x1,
then the listed neurons' rows of the last map are summed, split over programs, with fp32 atomics. Nothing leaves the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsebench.kernels._triton_grouped import activate, many

FEW = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_expert_ffn(x: torch.Tensor, weight: torch.Tensor, last: torch.Tensor | None = None) -> str | None:
    """Why this call can't be served; weight: the experts' first map [f, d]."""
    if weight.dtype not in DTYPES or x.dtype != weight.dtype:
        return f"cuda_triton serves float32, float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    return None


@triton.jit
def list_experts(keep, index, count, experts: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):
    """index[k], count[0]: the experts that any row selects; one program."""
    e = tl.arange(0, block)
    inside = e < experts
    wanted = tl.zeros((block,), tl.int32)
    for row in tl.static_range(rows):
        wanted = wanted | tl.load(keep + row * experts + e, mask=inside, other=0).to(tl.int32)
    place = tl.cumsum(wanted, 0) - wanted
    tl.store(index + place, e, mask=wanted > 0)
    tl.store(count, tl.sum(wanted, 0))


@triton.jit
def few_hidden(
    x, keep, index, count, first, first_bias, up, up_bias, hidden, d: tl.constexpr, f: tl.constexpr,
    experts: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, name: tl.constexpr, has_bias: tl.constexpr,
    gated: tl.constexpr, has_up_bias: tl.constexpr, block_j: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """hidden[row, k size + j] = x1 of neuron j of the k-th listed expert, 0 for rows that didn't select it."""
    k = tl.program_id(0)
    if k < tl.load(count):
        expert = tl.load(index + k)
        j = tl.program_id(1) * block_j + tl.arange(0, block_j)
        inside = j < size
        neuron = (expert * size + j).to(tl.int64)
        for row in tl.static_range(rows):
            wanted = tl.load(keep + row * experts + expert) != 0
            z = tl.zeros((block_j,), tl.float32)
            u = tl.zeros((block_j,), tl.float32)
            if wanted:
                sums = tl.zeros((block_j, block_d), tl.float32)
                ups = tl.zeros((block_j, block_d), tl.float32)
                for start in range(0, d, block_d):
                    i = start + tl.arange(0, block_d)
                    mask = inside[:, None] & (i < d)[None, :]
                    value = tl.load(x + row * d + i, mask=i < d, other=0.0).to(tl.float32)
                    tile = tl.load(first + neuron[:, None] * d + i[None, :], mask=mask, other=0.0).to(tl.float32)
                    sums += tile * value[None, :]
                    if gated:
                        tile = tl.load(up + neuron[:, None] * d + i[None, :], mask=mask, other=0.0).to(tl.float32)
                        ups += tile * value[None, :]
                z = tl.sum(sums, 1)
                u = tl.sum(ups, 1)
            if has_bias:
                z += tl.load(first_bias + neuron, mask=inside, other=0.0).to(tl.float32)
            a = activate(z, name)
            if gated:
                if has_up_bias:
                    u += tl.load(up_bias + neuron, mask=inside, other=0.0).to(tl.float32)
                a = a * u
            tl.store(hidden + row * f + k * size + j, tl.where(wanted, a, 0.0), mask=inside)


@triton.jit
def few_last(
    hidden, index, count, last, y, n: tl.constexpr, f: tl.constexpr, size: tl.constexpr, rows: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """y[row, i] += sum over listed neurons of hidden * last; grid (outputs / block_n, shares of the neurons)."""
    i = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inside = i < n
    neurons = tl.load(count) * size
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    begin = neurons * share // shares
    end = neurons * (share + 1) // shares
    row_ids = tl.arange(0, 8)
    sums = tl.zeros((8, block_n), tl.float32)
    for start in range(begin, end, block_k):
        k = start + tl.arange(0, block_k)
        wanted = k < end
        expert = tl.load(index + k // size, mask=wanted, other=0)
        neuron = (expert * size + k % size).to(tl.int64)
        tile = tl.load(last + neuron[:, None] * n + i[None, :], mask=wanted[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
        for row in tl.static_range(rows):
            value = tl.load(hidden + row * f + k, mask=wanted, other=0.0)
            part = tl.sum(tile * value[:, None], 0)
            sums += tl.where((row_ids == row)[:, None], part[None, :], 0.0)
    if end > begin:
        for row in tl.static_range(rows):
            part = tl.sum(tl.where((row_ids == row)[:, None], sums, 0.0), 0)
            tl.atomic_add(y + row * n + i, part, mask=inside)


def few(x, keep, first, last, name, first_bias, up, up_bias, last_bias) -> torch.Tensor:
    """[B, n] for up to FEW rows x [B, d]; keep uint8 [B, E]."""
    (rows, d), (f, n), experts = x.shape, last.shape, keep.shape[1]
    size = f // experts
    index = torch.empty(experts, dtype=torch.int32, device=x.device)
    count = torch.empty(1, dtype=torch.int32, device=x.device)
    list_experts[(1,)](keep, index, count, experts, rows, triton.next_power_of_2(experts))
    hidden = torch.empty(rows, f, dtype=torch.float32, device=x.device)
    block_j, block_d = min(4, triton.next_power_of_2(size)), min(512, triton.next_power_of_2(d))
    gated = up is not None
    few_hidden[(experts, triton.cdiv(size, block_j))](
        x, keep, index, count, first, x if first_bias is None else first_bias, up if gated else first,
        x if up_bias is None else up_bias, hidden, d, f, experts, size, rows, name, first_bias is not None, gated,
        up_bias is not None, block_j, block_d, num_warps=4,
    )  # fmt: skip
    y = torch.zeros(rows, n, dtype=torch.float32, device=x.device)
    if last_bias is not None:
        y += last_bias
    block_n, block_k = 128, 16
    tiles = triton.cdiv(n, block_n)
    shares = max(1, min(64, triton.cdiv(1024, tiles)))
    few_last[(tiles, shares)](
        hidden, index, count, last, y, n, f, size, rows, block_n, block_k, num_warps=4, num_stages=2
    )
    return y.to(x.dtype)


@torch.library.custom_op("sparsebench::triton_experts", mutates_args=())
def triton_experts(
    x: torch.Tensor, keep: torch.Tensor, first: torch.Tensor, last: torch.Tensor, activation: str,
    first_bias: torch.Tensor | None, up: torch.Tensor | None, up_bias: torch.Tensor | None,
    last_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x [T, d], keep bool [T, E], first and up [f, d], last [f, n] -> [T, n]."""
    served = few if len(x) <= FEW else many
    return served(x, keep.view(torch.uint8), first, last, activation, first_bias, up, up_bias, last_bias)


@triton_experts.register_fake
def _(x, keep, first, last, activation, first_bias, up, up_bias, last_bias):
    return x.new_empty(x.shape[0], last.shape[1])


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """As masked_dense.expert_ffn, sums in fp32. Raises ValueError for what `unsupported_expert_ffn` names."""
    problem = unsupported_expert_ffn(x, first)
    if problem:
        raise ValueError(problem)
    rows, chosen = x.reshape(-1, x.shape[-1]).contiguous(), keep.reshape(-1, keep.shape[-1]).bool().contiguous()
    y = triton_experts(rows, chosen, first, last, activation, first_bias, up, up_bias, last_bias)
    return y.view(*x.shape[:-1], last.shape[1])
