"""Which power of a column's norm a map's inputs are scored with: the one that loses least at a given sparsity."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.calibration.block_error import block_inputs, run_block
from sparsebench.calibration.histograms import AbsHistogram
from sparsebench.kernels.masked_dense import kept
from sparsebench.records.progress import shown
from sparsebench.sites import Block, weight_of

Norms = dict[str, torch.Tensor]  # c [n] by site name


def errors_by_exponent(
    model: nn.Module,
    blocks: list[Block],
    sequences: torch.Tensor,
    norms: Norms,
    grid: list[float],
    p: float,
    batch_size: int,
) -> dict[str, list[float]]:
    """sum over tokens of ||W (x where dropped)||^2 of each site at each exponent of the grid, on dense inputs.

    Dropped is |x| c^a <= t with t the quantile of these scores at p. One block at a time: memory is the inputs of its maps.
    """
    errors = {}
    with torch.no_grad():
        hidden, arguments = block_inputs(model, blocks, sequences, batch_size)
        for block in shown(blocks, len(blocks), "exponents by block"):
            inputs, hidden = maps_inputs(model, block, hidden, arguments[block.index])
            for site in block.sites.values():
                x, weight = inputs[site.group], weight_of(model.get_submodule(site.path))
                errors[site.name] = [loss(x, weight, norms[site.name], exponent, p) for exponent in grid]
    return errors


def maps_inputs(model: nn.Module, block: Block, hidden: list[torch.Tensor], arguments: tuple):
    """({group: x [tokens, n]}, the block's outputs) of a dense run of one block."""
    seen: dict[str, list[torch.Tensor]] = {}
    paths = {site.group: site.path for site in block.sites.values()}
    with ExitStack() as hooks:
        for group, path in paths.items():
            see = lambda _, args, group=group: seen.setdefault(group, []).append(args[0].flatten(0, -2))  # noqa: E731
            hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(see))
        outputs = [run_block(model.get_submodule(block.path), h, arguments) for h in hidden]
    return {group: torch.cat(parts) for group, parts in seen.items()}, outputs


def loss(x: torch.Tensor, weight: torch.Tensor, norms: torch.Tensor, exponent: float, p: float) -> float:
    """Squared output error of one map over tokens x [tokens, n] at sparsity p."""
    scale = None if exponent == 0 else norms**exponent
    histogram = AbsHistogram(x.device)
    histogram.add(x if scale is None else x.float() * scale)
    dropped = torch.where(kept(x, histogram.quantile(p), scale), 0, x)
    return sum(float(F.linear(part, weight).double().square().sum()) for part in dropped.split(4096))


def choose(errors: dict[str, list[float]], grid: list[float], units: list[tuple[str, ...]]) -> dict[str, float]:
    """The exponent of each site; sites of one unit share the one whose errors add up to least. Of equals the first."""
    chosen = {}
    for names in units:
        sums = [sum(errors[name][i] for name in names) for i in range(len(grid))]
        chosen |= dict.fromkeys(names, grid[min(range(len(grid)), key=sums.__getitem__)])
    return chosen
