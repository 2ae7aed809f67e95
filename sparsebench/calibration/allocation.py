"""How a sparsity budget is spread over the maps of a block: uniform, or greedy by block-output error (TEAL, section 4.3).

One module for every threshold method. A block's budget is effective sparsity, sum_j n_j s_j / sum_j n_j with the true
sizes n_j = numel(W_j), so grouped-query attention is counted right.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsebench.calibration.block_error import BlockError, block_inputs, run_block
from sparsebench.config import setting
from sparsebench.records.progress import shown
from sparsebench.records.state import State, read, write
from sparsebench.sites import Block, shape

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Greedy:
    """Settings of the greedy search."""

    step: float = setting(gt=0, le=0.5)  # alpha: every accepted step removes alpha * numel(W_q) weights
    stop: float = setting(gt=0, lt=1)  # effective sparsity at which the search ends
    error_tokens: float = setting(gt=0, le=1)  # share of each sequence, at its end, over which the error is taken


ALLOCATIONS = ("uniform", "greedy")
Shares = dict[str, float]  # sparsity by role
Units = dict[str, tuple[str, ...]]  # roles that step together, by a name


def check(method: Any) -> None:
    """Raise ValueError where a method's `sparsity` lies beyond the end of its greedy search."""
    if method.allocation == "greedy" and method.sparsity > method.greedy.stop:
        raise ValueError(f"sparsity must be at most method.greedy.stop={method.greedy.stop}, got {method.sparsity}")


def shares(method: Any, state: State, block: Block) -> Shares:
    """Sparsity of each role of a block at a method's `sparsity` and `allocation`."""
    if method.allocation == "uniform":
        return dict.fromkeys(block.sites, method.sparsity)
    return {role: min(p, 1.0) for role, p in table_of(state, block.index).nearest(method.sparsity).items()}


@dataclass
class Table:
    """Greedy's path through one block: row r has per-role sparsities and the errors at equal effective sparsity."""

    roles: list[str]
    effective: torch.Tensor  # [rows]
    greedy_error: torch.Tensor  # [rows]
    uniform_error: torch.Tensor  # [rows]
    sparsity: torch.Tensor  # [rows, roles]
    runs: int = 0  # of the block, over all sequences: what the search cost
    norm: float = 1.0  # of the block's dense output, l2 over the compared tokens: what errors are a part of

    def at(self, target: float) -> Shares:
        """Per-role sparsities at exactly this effective sparsity, linear between rows and from the dense block."""
        places = [0.0, *self.effective.tolist()]
        columns = zip(self.roles, self.sparsity.T.tolist(), strict=True)
        return {role: float(np.interp(target, places, [0.0, *column])) for role, column in columns}

    def error_at(self, target: float) -> float:
        """The path's block-output error at an effective sparsity, linear between rows."""
        return float(np.interp(target, [0.0, *self.effective.tolist()], [0.0, *self.greedy_error.tolist()]))

    def nearest(self, target: float) -> Shares:
        """Per-role sparsities of the row nearest to `target`; all zero where the dense block is nearer."""
        if target <= float(self.effective[0]) / 2:
            return dict.fromkeys(self.roles, 0.0)
        row = int((self.effective - target).abs().argmin())
        return dict(zip(self.roles, self.sparsity[row].tolist(), strict=True))


def greedy(
    model: nn.Module,
    blocks: list[Block],
    sequences: torch.Tensor,
    threshold: Callable[[int, str, float], float],
    settings: Greedy,
    *,
    batch_size: int,
    folder: Path,
    scales: dict[tuple[int, str], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    units: Callable[[Block], Units] | None = None,
) -> list[Table]:
    """Spread sparsity inside each block, one block at a time, on the dense inputs of that block (errors not propagated).

    Every round tries one more step alpha * n_q / n_j on each map j and keeps the step with the least block-output error
    (l2 norm over the error tokens of all sequences). `threshold(layer, role, p)` gives t; `scales` gives c per
    (layer, role); `units` the maps of a block that step together (None: each alone). `folder` keeps the tables of finished
    blocks: calling again goes on after them. Memory: the model, two hidden states per sequence and what BlockError keeps.
    """
    with torch.no_grad():
        hidden, arguments = block_inputs(model, blocks, sequences, batch_size)
        tokens = hidden[0].shape[1] - int(hidden[0].shape[1] * (1 - settings.error_tokens))
        tables = []
        for block in shown(blocks, len(blocks), "greedy search by block"):
            module, layer, named = model.get_submodule(block.path), block.index, arguments[block.index]
            outputs = [run_block(module, h, named) for h in hidden]
            by_role = {r: scales[layer, r] for r in block.sites if (layer, r) in (scales or {})}
            part = read(folder / f"greedy-{layer}.safetensors")
            if part is None:
                limit = functools.partial(threshold, layer)
                error = BlockError(model, block, named, hidden, outputs, limit, by_role, tokens)
                table = search(block, model, error, settings, units and units(block))
                table.runs, table.norm = error.runs, norm_of(outputs, tokens)
                keep_table(part := State(), layer, table)
                write(part, folder / f"greedy-{layer}.safetensors")
            tables.append(table_of(part, layer))
            hidden = outputs
            if progress is not None:
                progress(layer + 1, len(blocks))
    return tables


def norm_of(outputs: list[torch.Tensor], tokens: int) -> float:
    """l2 norm of the last `tokens` of each sequence of outputs [B, T, D]."""
    return float(sum(o[:, -tokens:].double().square().sum() for o in outputs)) ** 0.5


def add_tables(
    method: Any,
    state: State,
    model: nn.Module,
    blocks: list[Block],
    sequences: torch.Tensor,
    work: Any,
    threshold: Callable[[Any, float], float],
    scales: dict[str, torch.Tensor] | None = None,
) -> None:
    """Search every block where the method's `allocation` is greedy, and keep the tables in its state.

    threshold(site, p) gives t; scales: c by site name.
    """
    if method.allocation != "greedy":
        return
    if any(block.experts for block in blocks):
        raise ValueError(f"method.allocation must be uniform for a model with experts, got {method.allocation}")
    start = time.perf_counter()
    tables = greedy(
        model,
        blocks,
        sequences,
        lambda layer, role, p: threshold(blocks[layer].sites[role], p),
        method.greedy,
        batch_size=work.batch_size,
        folder=work.folder,
        scales={
            (s.layer, s.role): scales[s.name] for b in blocks for s in b.sites.values() if s.name in (scales or {})
        },
        progress=lambda done, total: work.log({"fit/greedy_blocks_done": done, "fit/greedy_blocks": total}),
    )
    for block, table in zip(blocks, tables, strict=True):
        keep_table(state, block.index, table)
    state.info.setdefault("extra", {})["search_cost"] = {"inside": cost(tables, sequences, start)}


def cost(tables: list[Table], sequences: torch.Tensor, start: float) -> dict[str, float]:
    """What a search inside blocks cost: runs of one block over all sequences, the same in passes of the whole model."""
    runs = sum(table.runs for table in tables)
    return {
        "block_runs": runs, "forward_passes": runs / len(tables), "tokens_per_pass": sequences.numel(),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


TABLE = ("effective", "greedy_error", "uniform_error", "sparsity")


def keep_table(state: State, layer: int, table: Table) -> None:
    if table.roles != state.info.setdefault("roles", table.roles):
        state.info.setdefault("other_roles", {})[str(layer)] = table.roles  # blocks of one model may differ
    for name in TABLE:
        state.tensors[f"table.{layer}.{name}"] = getattr(table, name)
    state.info.setdefault("blocks", {})[str(layer)] = {"runs": table.runs, "norm": table.norm}


def table_of(state: State, layer: int) -> Table:
    known = state.info.get("blocks", {}).get(str(layer), {})
    roles = state.info.get("other_roles", {}).get(str(layer), state.info["roles"])
    return Table(roles, *(state.tensors[f"table.{layer}.{name}"] for name in TABLE), **known)


def search(
    block: Block,
    model: nn.Module,
    error: Callable[[Shares, Shares], float],
    settings: Greedy,
    units: Units | None = None,
) -> Table:
    """The greedy path of one block for a given error(trial, path), where `path` is what is accepted so far.

    units: maps that step together and share a sparsity; None: each map alone. With one unit the path is uniform.
    """
    sizes = {role: math.prod(shape(model.get_submodule(site.path))) for role, site in block.sites.items()}
    units = units or {role: (role,) for role in sizes}
    weight = {unit: sum(sizes[r] for r in roles) for unit, roles in units.items()}
    total = sum(sizes.values())
    reference = sizes.get("q", min(sizes.values()))  # alpha is in units of the query map
    sparsity = dict.fromkeys(sizes, 0.0)
    rows = []
    while sum(sizes[r] * sparsity[r] for r in sizes) / total < settings.stop:
        trials = {}
        for unit, roles in units.items():
            p = sparsity[roles[0]]
            if p < 1:  # a step may pass 1 on a small map: clamp
                raised = min(1.0, p + settings.step * reference / weight[unit])
                trial = {**sparsity, **dict.fromkeys(roles, raised)}
                trials[unit] = (error(trial, sparsity), trial)
        best = min(trials, key=lambda unit: trials[unit][0])
        block_error, sparsity = trials[best]
        effective = sum(sizes[r] * sparsity[r] for r in sizes) / total
        alone = len(units) == 1
        uniform = block_error if alone else error(dict.fromkeys(sizes, effective), sparsity)
        rows.append((effective, block_error, uniform, list(sparsity.values())))
    return Table(list(sizes), *(torch.tensor(column) for column in zip(*rows, strict=True)))
