"""Triton kernels of the expert FFN: a few tokens read only the experts they select; many tokens are grouped by expert.

Nothing leaves the device. Few tokens (up to 8): the selected experts are listed, one program per (listed expert, few of
its neurons) writes x1, then the listed neurons' rows of the last map are summed, split over programs, with fp32 atomics.
Many: two passes over the [T, E] mask list the (token, expert) pairs by expert, then by token; the tiles of all experts
are listed by where in the text they stand; two grouped GEMMs take the listed tiles in turn, with as many programs as run
at the same time, so that what these read at one time stays in the cache and all have equally many tiles. The second
leaves one row per pair, and a last pass adds each token's rows in fp32: without atomics, the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

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
def pair_tile(keep, rows, experts: tl.constexpr, block_t: tl.constexpr, block_e: tl.constexpr):
    """(tokens [block_t], experts [block_e], int32 0 or 1) of one tile of the mask."""
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    e = tl.program_id(1) * block_e + tl.arange(0, block_e)
    mask = (t < rows)[:, None] & (e < experts)[None, :]
    return t, e, tl.load(keep + t.to(tl.int64)[:, None] * experts + e[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit
def count_pairs(keep, counts, rows, experts: tl.constexpr, block_t: tl.constexpr, block_e: tl.constexpr):
    """counts[e, b]: tokens of block b that select expert e; grid (token blocks, expert blocks)."""
    _, e, kept = pair_tile(keep, rows, experts, block_t, block_e)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), tl.sum(kept, 0), mask=e < experts)


@triton.jit
def place_pairs(keep, ends, tokens, places, rows, experts: tl.constexpr, block_t: tl.constexpr, block_e: tl.constexpr):
    """tokens[p] of each pair and places[t, e] = p, or -1; ends [E, token blocks]: running sums of `counts`. Same grid."""
    t, e, kept = pair_tile(keep, rows, experts, block_t, block_e)
    begin = tl.load(ends + e * tl.num_programs(0) + tl.program_id(0), mask=e < experts, other=0) - tl.sum(kept, 0)
    place = begin[None, :] + tl.cumsum(kept, 0) - kept
    tl.store(tokens + place, t[:, None] + tl.zeros_like(kept), mask=kept > 0)
    target = places + t.to(tl.int64)[:, None] * experts + e[None, :]
    tl.store(target, tl.where(kept > 0, place, -1), mask=(t < rows)[:, None] & (e < experts)[None, :])


@triton.jit
def tiles_of(ends, blocks, experts: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr):
    """Tiles of block_t pairs of each expert [block_e]."""
    e = tl.arange(0, block_e)
    begin = tl.load(ends + e * blocks - 1, mask=(e > 0) & (e < experts), other=0)
    end = tl.load(ends + e * blocks + blocks - 1, mask=e < experts, other=0)
    return tl.where(e < experts, (end - begin + block_t - 1) // block_t, 0)


@triton.jit
def list_tiles(
    ends, blocks, order, most, experts: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr, block_b: tl.constexpr
):  # fmt: skip
    """order[rank] = expert * most + tile, by the tile's relative place (tile + 1/2) / tiles of its expert.

    Tiles that stand near each other then hold the same tokens, however unequal the experts' shares are, so what programs
    read and add at one time stays in the L2 cache. A rank is a sum of counts over experts; grid (E, tile blocks).
    """
    expert = tl.program_id(0)
    b = tl.program_id(1) * block_b + tl.arange(0, block_b)
    other = tl.arange(0, block_e)[None, :]
    tiles = tiles_of(ends, blocks, experts, block_e, block_t).to(tl.int64)[None, :]
    mine = tl.sum(tl.where(other == expert, tiles, 0))
    if tl.program_id(1) * block_b < mine:
        a = (2 * b + 1).to(tl.int64)[:, None] * tiles  # of another: tiles before (2 b + 1) tiles / (2 mine) - 1/2
        before = tl.where(other < expert, (a // mine + 1) // 2, (a + mine - 1) // mine // 2)
        rank = tl.sum(tl.where(other == expert, b.to(tl.int64)[:, None], before), 1)
        tl.store(order + rank, expert * most + b, mask=b < mine)


@triton.jit
def place_of(order, rank, most, ends, blocks, block_t: tl.constexpr):
    """(expert, first pair, end of the expert's pairs) of a listed tile."""
    listed = tl.load(order + rank)
    expert = listed // most
    begin = tl.load(ends + expert * blocks - 1, mask=expert > 0, other=0)
    return expert, begin + listed % most * block_t, tl.load(ends + expert * blocks + blocks - 1)


@triton.jit
def many_hidden(
    tokens, ends, blocks, order, most, x, first, first_bias, up, up_bias, hidden, d: tl.constexpr, size: tl.constexpr,
    experts: tl.constexpr, name: tl.constexpr, has_bias: tl.constexpr, gated: tl.constexpr, has_up_bias: tl.constexpr,
    precision: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr, block_j: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """hidden[p, j] = x1 of pair p (a token of this expert); any number of programs."""
    blocks_j: tl.constexpr = (size + block_j - 1) // block_j
    total = tl.sum(tiles_of(ends, blocks, experts, block_e, block_t)) * blocks_j
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, start, end = place_of(order, tile // blocks_j, most, ends, blocks, block_t)
        p = start + tl.arange(0, block_t)
        there = p < end
        token = tl.load(tokens + p, mask=there, other=0).to(tl.int64)
        j = tile % blocks_j * block_j + tl.arange(0, block_j)
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
    tokens, ends, blocks, order, most, hidden, last, parts, n: tl.constexpr, size: tl.constexpr, experts: tl.constexpr,
    precision: tl.constexpr, block_e: tl.constexpr, block_t: tl.constexpr, block_n: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    """parts[p, i] = hidden[p, :] . last of this expert; any number of programs."""
    blocks_n: tl.constexpr = (n + block_n - 1) // block_n
    total = tl.sum(tiles_of(ends, blocks, experts, block_e, block_t)) * blocks_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, start, end = place_of(order, tile // blocks_n, most, ends, blocks, block_t)
        p = start + tl.arange(0, block_t)
        there = p < end
        i = tile % blocks_n * block_n + tl.arange(0, block_n)
        inside = i < n
        sums = tl.zeros((block_t, block_n), tl.float32)
        for k in range(0, size, block_j):
            j = k + tl.arange(0, block_j)
            mask = there[:, None] & (j < size)[None, :]
            rows = tl.load(hidden + p.to(tl.int64)[:, None] * size + j[None, :], mask=mask, other=0.0)
            neuron = (expert * size + j).to(tl.int64)
            mask = (j < size)[:, None] & inside[None, :]
            part = tl.load(last + neuron[:, None] * n + i[None, :], mask=mask, other=0.0)
            sums = tl.dot(rows, part, sums, precision)
        target = parts + p.to(tl.int64)[:, None] * n + i[None, :]
        tl.store(target, sums.to(parts.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def add_parts(
    parts, places, bias, y, n: tl.constexpr, experts: tl.constexpr, has_bias: tl.constexpr, block_n: tl.constexpr
):  # fmt: skip
    """y[t, i] = bias[i] + sum over the experts of t of parts[p, i]; grid (tokens, outputs / block_n)."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside = i < n
    sums = tl.zeros((block_n,), tl.float32)
    if has_bias:
        sums += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    for e in range(experts):
        p = tl.load(places + t * experts + e)
        if p >= 0:
            sums += tl.load(parts + p.to(tl.int64) * n + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * n + i, sums.to(y.dtype.element_ty), mask=inside)


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


class Pairs:
    """The (token, expert) pairs of a mask [T, E] (uint8), sorted by expert, then token.

    tokens int32 [T E]; places int32 [T, E]: a pair's number, or -1; ends int32 [E, blocks]: running counts, expert e's
    pairs end at ends[e, -1].
    """

    def __init__(self, keep: torch.Tensor):
        (self.rows, self.experts), self.lists = keep.shape, {}
        block_t, block_e = 128, min(32, triton.next_power_of_2(self.experts))
        grid = (triton.cdiv(self.rows, block_t), triton.cdiv(self.experts, block_e))
        counts = torch.empty(self.experts, grid[0], dtype=torch.int32, device=keep.device)
        count_pairs[grid](keep, counts, self.rows, self.experts, block_t, block_e)
        self.ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(counts.shape)
        self.tokens = torch.empty(self.rows * self.experts, dtype=torch.int32, device=keep.device)
        self.places = torch.empty(self.rows, self.experts, dtype=torch.int32, device=keep.device)
        place_pairs[grid](keep, self.ends, self.tokens, self.places, self.rows, self.experts, block_t, block_e)

    def listed(self, size: int) -> tuple[torch.Tensor, int]:
        """(tiles of `size` pairs in the order of `list_tiles`, most tiles that an expert could have)."""
        most = triton.cdiv(self.rows, size)
        if size not in self.lists:
            order = torch.empty(self.experts * most, dtype=torch.int32, device=self.tokens.device)
            block_e = triton.next_power_of_2(self.experts)
            list_tiles[(self.experts, triton.cdiv(most, 16))](
                self.ends, self.ends.shape[1], order, most, self.experts, block_e, size, 16
            )
            self.lists[size] = order
        return self.lists[size], most


@dataclass(frozen=True)
class Tiles:
    """How a grouped GEMM is cut: pairs, columns, depth of a tile; warps and stages; programs per processor."""

    pairs: int
    columns: int
    depth: int
    warps: int
    stages: int
    per_sm: int

    def launch(self, kernel, pairs: Pairs, depth: int, columns: int, *arguments) -> None:
        """Start programs over the listed tiles, which are no larger than what there is to do."""
        sizes = [
            min(most, max(16, triton.next_power_of_2(there)))
            for most, there in ((self.pairs, pairs.rows), (self.columns, columns), (self.depth, depth))
        ]
        programs = self.per_sm * processors(pairs.tokens.device)
        kernel[(programs,)](
            pairs.tokens, pairs.ends, pairs.ends.shape[1], *pairs.listed(sizes[0]), *arguments, *sizes,
            num_warps=self.warps, num_stages=self.stages,
        )  # fmt: skip


# By bytes of an element. In 16 bits two programs fit on a processor (128 registers, 96 KiB), in fp32 one.
HIDDEN = {2: Tiles(128, 128, 64, 8, 3, 2), 4: Tiles(128, 128, 32, 8, 3, 1)}
GATED = {2: Tiles(128, 64, 64, 8, 3, 2), 4: Tiles(64, 64, 32, 8, 3, 1)}
LAST = {2: Tiles(128, 128, 64, 8, 3, 2), 4: Tiles(128, 128, 32, 8, 3, 1)}
PARTS_BYTES = 2 << 30  # most that the rows of all pairs may take; where they could take more, tokens go in pieces


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def many(x, keep, first, last, name, first_bias, up, up_bias, last_bias) -> torch.Tensor:
    """[T, n] for rows x [T, d]; keep uint8 [T, E]."""
    (rows, experts), n = keep.shape, last.shape[1]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    pieces = triton.cdiv(rows * experts * n * x.element_size(), PARTS_BYTES)
    for piece in zip(*(each.tensor_split(pieces) for each in (x, keep, y)), strict=True):
        grouped(*piece, first, last, name, first_bias, up, up_bias, last_bias)
    return y


def grouped(x, keep, y, first, last, name, first_bias, up, up_bias, last_bias) -> None:
    """Write y [T, n] for as many tokens as the pairs' rows have memory for."""
    (rows, d), (f, n), experts = x.shape, last.shape, keep.shape[1]
    size, gated, width = f // experts, up is not None, x.element_size()
    pairs = Pairs(keep)
    hidden = torch.empty(rows * experts, size, dtype=x.dtype, device=x.device)  # as large as the dense x1
    precision = "tf32x3" if width == 4 else "tf32"  # tf32 means nothing for 16 bits
    block_e = triton.next_power_of_2(experts)
    (GATED if gated else HIDDEN)[width].launch(
        many_hidden, pairs, d, size, x, first, x if first_bias is None else first_bias, up if gated else first,
        x if up_bias is None else up_bias, hidden, d, size, experts, name, first_bias is not None, gated,
        up_bias is not None, precision, block_e,
    )  # fmt: skip
    parts = torch.empty(rows * experts, n, dtype=x.dtype, device=x.device)
    LAST[width].launch(many_last, pairs, size, n, hidden, last, parts, n, size, experts, precision, block_e)
    block_n = min(1024, triton.next_power_of_2(n))
    add_parts[(rows, triton.cdiv(n, block_n))](
        parts, pairs.places, x if last_bias is None else last_bias, y, n, experts, last_bias is not None, block_n,
        num_warps=1,
    )  # fmt: skip


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
