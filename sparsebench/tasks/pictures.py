"""Pictures of a run, as PNG files in its folder: activation maps before and after, confusion matrices."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from sparsebench.measure import quality
from sparsebench.modules.activation_map import maps_of
from sparsebench.records import files

CHANNELS = 16  # of each map that are drawn
MAPS = 6


def save(figure: Figure, path: Path) -> str:
    """Write the figure as PNG, whole or not at all. Returns the file's name."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    files.write_atomic(path, content.getvalue())
    return path.name


def seen(module: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every activation map of one forward pass by site, on the CPU."""
    maps: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda layer, _, y: maps.__setitem__(layer.site, y.float().cpu()))
        for m in maps_of(module)
    ]
    try:
        with torch.no_grad():
            quality.logits(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def tiles(a: torch.Tensor) -> np.ndarray:
    """The first CHANNELS channels of a map [C, H, W] (or [C], as a square) side by side; zeros are masked out."""
    if a.dim() == 1:
        side = math.ceil(math.sqrt(len(a)))
        grid = torch.zeros(side * side)
        grid[: len(a)] = a
        return np.ma.masked_equal(grid.view(side, side).numpy(), 0)
    a = a[:CHANNELS]
    side = math.ceil(math.sqrt(len(a)))
    height, width = a.shape[1:]
    grid = torch.zeros(side * height, side * width)
    for i, channel in enumerate(a):
        row, column = divmod(i, side)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = channel
    return np.ma.masked_equal(grid.numpy(), 0)


def maps(dense: nn.Module, sparse: nn.Module, batch, path: Path) -> str:
    """Rows: an image through the dense and the sparse network; columns: the image, then maps from early to late.

    Exact zeros are left white, so sparsity is what one does not see; its share stands above each picture.
    """
    before, after = seen(dense, batch.inputs), seen(sparse, batch.inputs)
    sites = list(before)
    chosen = [
        sites[round(i * (len(sites) - 1) / max(1, min(MAPS, len(sites)) - 1))] for i in range(min(MAPS, len(sites)))
    ]
    images, count = batch.inputs.float().cpu(), len(batch.labels)
    figure = Figure(figsize=(2 * (len(chosen) + 1), 2.3 * 2 * count), dpi=90, layout="constrained")
    axes = figure.subplots(2 * count, len(chosen) + 1, squeeze=False)
    for n in range(count):
        for row, (name, maps) in enumerate((("dense", before), ("sparse", after))):
            line = axes[2 * n + row]
            picture = images[n].permute(1, 2, 0)
            picture = (picture - picture.min()) / (picture.max() - picture.min() + 1e-9)
            line[0].imshow(picture.squeeze(-1), cmap="gray")
            line[0].set_title(f"{name}, label {int(batch.labels[n])}", fontsize=8)
            for axis, site in zip(line[1:], chosen, strict=True):
                a = maps[site][n]
                axis.imshow(
                    tiles(a), cmap="viridis", vmin=0, vmax=float(before[site][n].max()) or 1, interpolation="none"
                )
                axis.set_title(f"{site}: {float((a == 0).float().mean()):.0%} zero", fontsize=8)
            for axis in line:
                axis.set_xticks([])
                axis.set_yticks([])
    figure.suptitle("Activation maps (first channels of each); white = exactly 0", fontsize=10)
    return save(figure, path)


def confusion(dense: list, sparse: list, classes: list[str], path: Path) -> str:
    """Confusion matrices as shares of each true class, dense and sparse, numbers in the cells where they are few."""
    figure = Figure(figsize=(11, 5.2), dpi=90, layout="constrained")
    for axis, (name, counted) in zip(figure.subplots(1, 2), (("dense", dense), ("sparse", sparse)), strict=True):
        counts = np.asarray(counted, dtype=float)
        share = counts / np.maximum(1, counts.sum(1, keepdims=True))
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"{name}: accuracy {np.trace(counts) / counts.sum():.2%}", fontsize=10)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        if len(classes) <= 20:
            axis.set_xticks(
                range(len(classes)), classes, fontsize=7, rotation=90 if len(max(classes, key=len)) > 2 else 0
            )
            axis.set_yticks(range(len(classes)), classes, fontsize=7)
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    return save(figure, path)
