"""TwELL, a packed format of sparse activations (arXiv 2603.23198), as a reference in plain torch.

The f columns of h [tokens, f] are cut into tiles of `tile`; in each tile and row the non-zeros stand in front. One place of
a tile holds the count, so tile / compression - 1 of them fit. The published kernels overwrite earlier entries where more
come, without a word; here that is an error. `split` is their format for training: rows with few non-zeros packed, the
others dense in a backup of fixed size.

It says whether a trained model fits the format and what that would move. No kernel reads it: see docs/methods/prosparse.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TILE, COMPRESSIONS, ENTRY_BYTES = 256, (8, 4, 2), 4  # an entry is an index of 16 bits and a value of 16 bits
ROW_LIMIT, BACKUP = 128, 8  # of the hybrid format: non-zeros of a packed row; one row in eight may be dense


@dataclass
class Packed:
    """values, index [tokens, tiles, places], counts [tokens, tiles]; index is a column of the whole h."""

    values: torch.Tensor
    index: torch.Tensor
    counts: torch.Tensor
    width: int

    @property
    def valid(self) -> torch.Tensor:
        return torch.arange(self.values.shape[-1], device=self.counts.device) < self.counts.unsqueeze(-1)


def tile_counts(h: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Non-zeros by row and tile, int64 [tokens, tiles]; a last tile may be narrower."""
    return (F.pad(h, (0, -h.shape[-1] % tile)) != 0).unflatten(-1, (-1, tile)).sum(-1)


def pack(h: torch.Tensor, tile: int = TILE, compression: int = 8) -> Packed:
    """h [tokens, f] packed. Raises ValueError where a tile of a row holds more non-zeros than it has places."""
    places, counts = tile // compression - 1, tile_counts(h, tile)
    if int(counts.max()) > places:
        raise ValueError(
            f"a tile of {tile} columns holds {places} non-zeros at compression {compression}, got {int(counts.max())}"
        )
    tiles = F.pad(h, (0, -h.shape[-1] % tile)).unflatten(-1, (-1, tile))
    order = (tiles == 0).to(torch.int8).argsort(dim=-1, stable=True)[..., :places]
    first = torch.arange(tiles.shape[1], device=h.device).mul(tile)[:, None]
    return Packed(tiles.gather(-1, order), order + first, counts, h.shape[-1])


def unpack(packed: Packed) -> torch.Tensor:
    """h [tokens, f]."""
    tokens = len(packed.values)
    index = torch.where(packed.valid, packed.index, packed.width).flatten(1)  # what is empty goes to a spare column
    h = packed.values.new_zeros(tokens, packed.width + 1)
    return h.scatter_(1, index, torch.where(packed.valid, packed.values, 0).flatten(1))[:, : packed.width]


def product(packed: Packed, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """y [tokens, d] of a gated FFN from the packed gate: over the listed neurons n, y += h_n (x . up_n) down_n.

    x [tokens, d]; up [f, d]; down [d, f].
    """
    rows = []
    for values, index, valid, token in zip(packed.values, packed.index, packed.valid, x, strict=True):
        neurons, gate = index[valid], values[valid]
        rows.append((gate * (up[neurons] @ token)) @ down.t()[neurons])
    return torch.stack(rows)


def split(h: torch.Tensor, limit: int = ROW_LIMIT, backup: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows packed by ELL, rows kept dense), indices of rows of h [tokens, f]: those with at most `limit` non-zeros first.

    backup: rows that the dense part has room for, None = one in eight. Raises ValueError where more are needed.
    """
    few = (h != 0).sum(-1) <= limit
    room = len(h) // BACKUP if backup is None else backup
    if int((~few).sum()) > room:
        raise ValueError(
            f"the dense backup has room for {room} rows, {int((~few).sum())} have more than {limit} non-zeros"
        )
    return few.nonzero().flatten(), (~few).nonzero().flatten()


def fit_of(h: torch.Tensor) -> dict[str, float]:
    """How well h [tokens, f] fits: by compression the share of (row, tile) pairs that overflow, the share of rows above the
    hybrid format's limit, and packed over dense bytes (16 bits a value) at the largest compression.
    """
    counts = tile_counts(h)
    shares = {f"overflow_at_{c}": float((counts > TILE // c - 1).double().mean()) for c in COMPRESSIONS}
    rows = float(((h != 0).sum(-1) > ROW_LIMIT).double().mean())
    size = counts.numel() * (TILE // COMPRESSIONS[0]) * ENTRY_BYTES / (2 * h.numel())
    return shares | {f"rows_above_{ROW_LIMIT}": rows, f"bytes_at_{COMPRESSIONS[0]}": size}
