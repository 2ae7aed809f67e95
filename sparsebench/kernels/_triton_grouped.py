"""Triton kernels of the expert FFN for many tokens: grouped by expert, on the device from first to last.

Two passes over the [T, E] mask list the (token, expert) pairs by expert, then by token; the tiles of all experts are
listed by where in the text they stand; two grouped GEMMs take the listed tiles in turn, with as many programs as run at
the same time, so that what these read at one time stays in the cache and all have equally many tiles. The second leaves
one row per pair, and a last pass adds each token's rows in fp32: without atomics, the same every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


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
def place_pairs(keep, ends, tokens, pairs, rows, experts: tl.constexpr, block_t: tl.constexpr, block_e: tl.constexpr):
    """tokens[p] of each pair, and pairs[t]: a token's pairs, then -1. ends [E, token blocks]: running sums of `counts`."""
    t, e, kept = pair_tile(keep, rows, experts, block_t, block_e)
    begin = tl.load(ends + e * tl.num_programs(0) + tl.program_id(0), mask=e < experts, other=0) - tl.sum(kept, 0)
    place = begin[None, :] + tl.cumsum(kept, 0) - kept
    tl.store(tokens + place, t[:, None] + tl.zeros_like(kept), mask=kept > 0)
    before = tl.zeros((block_t,), tl.int32)  # pairs of these tokens with experts of earlier blocks
    start = t.to(tl.int64) * experts
    for block in range(tl.program_id(1)):
        earlier = start[:, None] + (block * block_e + tl.arange(0, block_e))[None, :]
        before += tl.sum(tl.load(keep + earlier, mask=(t < rows)[:, None], other=0).to(tl.int32), 1)
    rank = before[:, None] + tl.cumsum(kept, 1) - kept
    own = pairs + t.to(tl.int64) * (experts + 1)
    tl.store(own[:, None] + rank, place, mask=kept > 0)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        total = before + tl.sum(kept, 1)
        tl.store(own + total, tl.zeros_like(total) - 1, mask=t < rows)


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
    """parts[p, i] = hidden[p, :] . last of this expert; any number of programs. hidden is read once where it fits."""
    once: tl.constexpr = size <= block_j
    blocks_n: tl.constexpr = 1 if once else (n + block_n - 1) // block_n
    total = tl.sum(tiles_of(ends, blocks, experts, block_e, block_t)) * blocks_n
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, start, end = place_of(order, tile // blocks_n, most, ends, blocks, block_t)
        p = start + tl.arange(0, block_t)
        there = p < end
        source, target = hidden + p.to(tl.int64)[:, None] * size, parts + p.to(tl.int64)[:, None] * n
        if once:
            j = tl.arange(0, block_j)
            rows = tl.load(source + j[None, :], mask=there[:, None] & (j < size)[None, :], other=0.0)
            weights = last + (expert * size + j).to(tl.int64)[:, None] * n
            for c in range(0, n, block_n):
                i = c + tl.arange(0, block_n)
                part = tl.load(weights + i[None, :], mask=(j < size)[:, None] & (i < n)[None, :], other=0.0)
                sums = tl.dot(rows, part, tl.zeros((block_t, block_n), tl.float32), precision)
                tl.store(target + i[None, :], sums.to(parts.dtype.element_ty), mask=there[:, None] & (i < n)[None, :])
        else:
            i = tile % blocks_n * block_n + tl.arange(0, block_n)
            sums = tl.zeros((block_t, block_n), tl.float32)
            for k in range(0, size, block_j):
                j = k + tl.arange(0, block_j)
                rows = tl.load(source + j[None, :], mask=there[:, None] & (j < size)[None, :], other=0.0)
                weights = last + (expert * size + j).to(tl.int64)[:, None] * n
                part = tl.load(weights + i[None, :], mask=(j < size)[:, None] & (i < n)[None, :], other=0.0)
                sums = tl.dot(rows, part, sums, precision)
            tl.store(target + i[None, :], sums.to(parts.dtype.element_ty), mask=there[:, None] & (i < n)[None, :])


@triton.jit
def add_parts(
    parts, pairs, bias, y, n: tl.constexpr, experts: tl.constexpr, has_bias: tl.constexpr, block_n: tl.constexpr
):  # fmt: skip
    """y[t, i] = bias[i] + sum over the pairs p of t of parts[p, i]; grid (tokens, outputs / block_n)."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside = i < n
    sums = tl.zeros((block_n,), tl.float32)
    if has_bias:
        sums += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    k = 1
    p = tl.load(pairs + t * (experts + 1))
    while p >= 0:
        part = tl.load(parts + p.to(tl.int64) * n + i, mask=inside, other=0.0)
        p = tl.load(pairs + t * (experts + 1) + k)  # on its way while `part` is
        sums += part.to(tl.float32)
        k += 1
    tl.store(y + t * n + i, sums.to(y.dtype.element_ty), mask=inside)


class Pairs:
    """The (token, expert) pairs of a mask [T, E] (uint8), sorted by expert, then token.

    tokens int32 [T E]: of each pair; of_token int32 [T, E + 1]: the pairs of a token, then -1; ends int32 [E, blocks]:
    running counts, expert e's pairs end at ends[e, -1].
    """

    def __init__(self, keep: torch.Tensor):
        (self.rows, self.experts), self.lists = keep.shape, {}
        block_t, block_e = 32, min(32, triton.next_power_of_2(self.experts))
        grid = (triton.cdiv(self.rows, block_t), triton.cdiv(self.experts, block_e))
        counts = torch.empty(self.experts, grid[0], dtype=torch.int32, device=keep.device)
        count_pairs[grid](keep, counts, self.rows, self.experts, block_t, block_e, num_warps=2)
        self.ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(counts.shape)
        self.tokens = torch.empty(self.rows * self.experts, dtype=torch.int32, device=keep.device)
        self.of_token = torch.empty(self.rows, self.experts + 1, dtype=torch.int32, device=keep.device)
        place_pairs[grid](
            keep, self.ends, self.tokens, self.of_token, self.rows, self.experts, block_t, block_e, num_warps=2
        )

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
HIDDEN = {2: Tiles(128, 128, 64, 8, 3, 2), 4: Tiles(64, 128, 32, 4, 4, 2)}
GATED = {2: Tiles(128, 64, 64, 8, 3, 2), 4: Tiles(64, 64, 32, 8, 3, 1)}
LAST = {2: Tiles(128, 64, 128, 4, 4, 2), 4: Tiles(128, 64, 32, 4, 3, 2)}
DEEP = {2: Tiles(128, 128, 64, 8, 3, 2), 4: LAST[4]}  # LAST of experts with more neurons than its tiles are deep
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
    tiles = LAST[width] if size <= LAST[width].depth else DEEP[width]
    tiles.launch(many_last, pairs, size, n, hidden, last, parts, n, size, experts, precision, block_e)
    block_n = min(1024, triton.next_power_of_2(n))
    add_parts[(rows, triton.cdiv(n, block_n))](
        parts, pairs.of_token, x if last_bias is None else last_bias, y, n, experts, last_bias is not None, block_n,
        num_warps=1,
    )  # fmt: skip
