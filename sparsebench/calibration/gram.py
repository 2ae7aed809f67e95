"""Gram matrices of what a block's maps read: the principal axes by which a rotation is chosen."""

from __future__ import annotations

import torch
from torch import nn

from sparsebench.calibration.histograms import observe
from sparsebench.modules.rotated_norm import GROUPS, epsilon, norms
from sparsebench.sites import Block


def input_grams(
    model: nn.Module, blocks: list[Block], sequences: torch.Tensor, batch_size: int, groups: tuple[str, ...] = GROUPS
) -> dict[tuple[int, str], torch.Tensor]:
    """X^T X [n, n], float64, by (layer, group): X are inputs [tokens, n] of a group with the norm's weight divided out."""
    grams: dict[tuple[int, str], torch.Tensor] = {}

    def observer(key, eps):
        def see(h: torch.Tensor) -> None:
            x = h.double().flatten(0, -2)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            grams[key] = grams.get(key, 0) + x.T @ x

        return see

    observers = {
        path: observer((block.index, group), epsilon(model.get_submodule(path)))
        for block in blocks
        for group, path in norms(model, block).items()
        if group in groups
    }
    if observers:
        observe(model, sequences, observers, batch_size)
    return grams
