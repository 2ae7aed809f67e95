"""Triton kernels of the expert FFN: a few tokens read only the experts they select; many tokens are grouped by expert.

Nothing leaves the device. Few tokens (up to 8): the selected experts are listed, one program per (listed expert, few of
its neurons) writes x1, then the listed neurons' rows of the last map are summed, split over programs, with fp32 atomics.
Many: a prefix sum over the [E, T] mask places each (token, expert) pair, two grouped GEMMs work on the pairs; grids are
as large as the worst case and programs past an expert's count end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FEW = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_expert_ffn(x: torch.Tensor, weight: torch.Tensor, last: torch.Tensor | None = None) -> str | None:
    """Why this call can't be served; weight: the experts' first map [f, d]."""
    if weight.dtype not in DTYPES or x.dtype != weight.dtype:
        return f"cuda_triton serves float32, float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    return None


@triton.jit
def activate(z, name: tl.constexpr):
    if name == "relu":
        return tl.maximum(z, 0.0)
    elif name == "silu":
        return z * tl.sigmoid(z)
    elif name == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:  # gelu_tanh: tanh(u) = 2 sigmoid(2u) - 1
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z * tl.sigmoid(2.0 * u)


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


@triton.jit
def many_hidden(
    x, tokens, ends, first, first_bias, up, up_bias, hidden, d: tl.constexpr, size: tl.constexpr, name: tl.constexpr,
    has_bias: tl.constexpr, gated: tl.constexpr, has_up_bias: tl.constexpr, precision: tl.constexpr,
    block_t: tl.constexpr, block_j: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """hidden[p, j] = x1 of pair p (a token of this expert); grid (token blocks * neuron blocks, E)."""
    expert = tl.program_id(1)
    blocks_j = tl.cdiv(size, block_j)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    start = begin + (tl.program_id(0) // blocks_j) * block_t
    if start < end:
        p = start + tl.arange(0, block_t)
        there = p < end
        token = tl.load(tokens + p, mask=there, other=0).to(tl.int64)
        j = (tl.program_id(0) % blocks_j) * block_j + tl.arange(0, block_j)
        inside = j < size
        neuron = (expert * size + j).to(tl.int64)
        z = tl.zeros((block_t, block_j), tl.float32)
        u = tl.zeros((block_t, block_j), tl.float32)
        for k in range(0, d, block_d):
            i = k + tl.arange(0, block_d)
            rows = tl.load(x + token[:, None] * d + i[None, :], mask=there[:, None] & (i < d)[None, :], other=0.0)
            mask = inside[None, :] & (i < d)[:, None]
            z = tl.dot(rows, tl.load(first + neuron[None, :] * d + i[:, None], mask=mask, other=0.0), z, precision)
            if gated:
                u = tl.dot(rows, tl.load(up + neuron[None, :] * d + i[:, None], mask=mask, other=0.0), u, precision)
        if has_bias:
            z += tl.load(first_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
        a = activate(z, name)
        if gated:
            if has_up_bias:
                u += tl.load(up_bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
            a = a * u
        target = hidden + p.to(tl.int64)[:, None] * size + j[None, :]
        tl.store(target, a.to(hidden.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def many_last(
    hidden, tokens, ends, last, y, n: tl.constexpr, size: tl.constexpr, precision: tl.constexpr, block_t: tl.constexpr,
    block_n: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    """y[token of p, i] += hidden[p, :] . last of this expert; grid (token blocks * output blocks, E)."""
    expert = tl.program_id(1)
    blocks_n = tl.cdiv(n, block_n)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    start = begin + (tl.program_id(0) // blocks_n) * block_t
    if start < end:
        p = start + tl.arange(0, block_t)
        there = p < end
        token = tl.load(tokens + p, mask=there, other=0).to(tl.int64)
        i = (tl.program_id(0) % blocks_n) * block_n + tl.arange(0, block_n)
        inside = i < n
        sums = tl.zeros((block_t, block_n), tl.float32)
        for k in range(0, size, block_j):
            j = k + tl.arange(0, block_j)
            mask = there[:, None] & (j < size)[None, :]
            rows = tl.load(hidden + p.to(tl.int64)[:, None] * size + j[None, :], mask=mask, other=0.0)
            neuron = (expert * size + j).to(tl.int64)
            mask = (j < size)[:, None] & inside[None, :]
            sums = tl.dot(rows, tl.load(last + neuron[:, None] * n + i[None, :], mask=mask, other=0.0), sums, precision)
        target = y + token[:, None] * n + i[None, :]
        tl.atomic_add(target, sums, mask=there[:, None] & inside[None, :], sem="relaxed")


def few(x, keep, first, last, name, first_bias, up, up_bias) -> torch.Tensor:
    """fp32 [B, n] for up to FEW rows x [B, d]; keep uint8 [B, E]."""
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
    block_n, block_k = 128, 16
    tiles = triton.cdiv(n, block_n)
    shares = max(1, min(64, triton.cdiv(1024, tiles)))
    few_last[(tiles, shares)](
        hidden, index, count, last, y, n, f, size, rows, block_n, block_k, num_warps=4, num_stages=2
    )
    return y


def group(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token of each pair int32 [T E + 1], pairs sorted by expert; end of each expert's pairs int32 [E])."""
    tokens, experts = keep.shape
    mask = keep.t().contiguous().view(-1)
    places = mask.cumsum(0, dtype=torch.int32)
    spare = tokens * experts  # pairs that are not there are all written to one spare place
    target = torch.where(mask, places - 1, spare).long()
    token = torch.arange(tokens, dtype=torch.int32, device=keep.device).repeat(experts)
    listed = torch.empty(spare + 1, dtype=torch.int32, device=keep.device).scatter_(0, target, token)
    return listed, places.view(experts, tokens)[:, -1].contiguous()


def many(x, keep, first, last, name, first_bias, up, up_bias) -> torch.Tensor:
    """fp32 [T, n] for rows x [T, d]; keep bool [T, E]."""
    (rows, d), (f, n), experts = x.shape, last.shape, keep.shape[1]
    size, gated = f // experts, up is not None
    tokens, ends = group(keep)
    hidden = torch.empty(rows * experts, size, dtype=x.dtype, device=x.device)  # as large as the dense x1
    y = torch.zeros(rows, n, dtype=torch.float32, device=x.device)
    wide = x.dtype == torch.float32
    precision = "ieee" if wide else "tf32"  # tf32 means nothing for 16 bits
    block_t = 64 if wide else 128
    block_t = min(block_t, max(16, triton.next_power_of_2(rows)))
    block_j = min(64 if wide or gated else 128, max(16, triton.next_power_of_2(size)))
    block_d = 32 if wide else 64
    blocks = triton.cdiv(rows, block_t)
    many_hidden[(blocks * triton.cdiv(size, block_j), experts)](
        x, tokens, ends, first, x if first_bias is None else first_bias, up if gated else first,
        x if up_bias is None else up_bias, hidden, d, size, name, first_bias is not None, gated, up_bias is not None,
        precision, block_t, block_j, block_d, num_warps=8 if block_j == 128 else 4, num_stages=3,
    )  # fmt: skip
    block_n = min(64 if wide else 128, max(16, triton.next_power_of_2(n)))
    many_last[(blocks * triton.cdiv(n, block_n), experts)](
        hidden, tokens, ends, last, y, n, size, precision, block_t, block_n, min(block_d, max(16, block_j)),
        num_warps=8 if block_n == 128 else 4, num_stages=3,
    )  # fmt: skip
    return y


@torch.library.custom_op("sparsebench::triton_experts", mutates_args=())
def triton_experts(
    x: torch.Tensor, keep: torch.Tensor, first: torch.Tensor, last: torch.Tensor, activation: str,
    first_bias: torch.Tensor | None, up: torch.Tensor | None, up_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x [T, d], keep bool [T, E], first and up [f, d], last [f, n] -> fp32 [T, n] without the last bias."""
    if len(x) <= FEW:
        return few(x, keep.to(torch.uint8), first, last, activation, first_bias, up, up_bias)
    return many(x, keep, first, last, activation, first_bias, up, up_bias)


@triton_experts.register_fake
def _(x, keep, first, last, activation, first_bias, up, up_bias):
    return x.new_empty(x.shape[0], last.shape[1], dtype=torch.float32)


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """As masked_dense.expert_ffn, sums in fp32. Raises ValueError for what `unsupported_expert_ffn` names."""
    problem = unsupported_expert_ffn(x, first)
    if problem:
        raise ValueError(problem)
    rows, chosen = x.reshape(-1, x.shape[-1]).contiguous(), keep.reshape(-1, keep.shape[-1]).contiguous()
    y = triton_experts(rows, chosen, first, last, activation, first_bias, up, up_bias)
    y = y if last_bias is None else y + last_bias
    return y.to(x.dtype).view(*x.shape[:-1], last.shape[1])
