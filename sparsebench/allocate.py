"""How a sparsity budget is spread over the maps of a block: uniform, or greedy by block-output error (TEAL, section 4.3).

One module for every threshold method. A block's budget is effective sparsity, sum_j n_j s_j / sum_j n_j with the true
sizes n_j = numel(W_j), so grouped-query attention is counted right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsebench.calibrate import batches
from sparsebench.config import setting
from sparsebench.kernels.masked_dense import kept
from sparsebench.models.sites import Block
from sparsebench.state import State

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Greedy:
    """Settings of the greedy search."""

    step: float = setting(gt=0, le=0.5)  # alpha: every accepted step removes alpha * numel(W_q) weights
    stop: float = setting(gt=0, lt=1)  # effective sparsity at which the search ends
    error_tokens: float = setting(gt=0, le=1)  # share of each sequence, at its end, over which the error is taken


ALLOCATIONS = ("uniform", "greedy")


def check(method: Any) -> None:
    """Raise ValueError where a method's `sparsity` lies beyond the end of its greedy search."""
    if method.allocation == "greedy" and method.sparsity > method.greedy.stop:
        raise ValueError(f"sparsity must be at most method.greedy.stop={method.greedy.stop}, got {method.sparsity}")


def shares(method: Any, state: State, block: Block) -> dict[str, float]:
    """Sparsity of each role of a block at a method's `sparsity` and `allocation`."""
    if method.allocation == "uniform":
        return dict.fromkeys(block.sites, method.sparsity)
    return {role: min(p, 1.0) for role, p in table_of(state, block.index).nearest(method.sparsity).items()}


@contextmanager
def masked(model: nn.Module, block: Block, thresholds: dict[str, float], scales: dict[str, Any]) -> Iterator[None]:
    """Mask the inputs of a block's maps by role while the context lasts; a threshold of 0 leaves a map alone."""

    def rule(role: str):
        return lambda x: torch.where(kept(x, thresholds[role], scales.get(role)), x, 0)

    with changed(model, block, {role: rule(role) for role, threshold in thresholds.items() if threshold > 0}):
        yield


@contextmanager
def changed(model: nn.Module, block: Block, rules: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Replace the input x of a block's maps by rule(x), by role, while the context lasts."""
    hooks = [
        model.get_submodule(block.sites[role].path).register_forward_pre_hook(
            lambda _, args, rule=rule: (rule(args[0]), *args[1:])
        )
        for role, rule in rules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def block_inputs(model: nn.Module, blocks: list[Block], sequences: torch.Tensor, batch_size: int):
    """Hidden states entering the first block, a list of [B, T, D], and for each block the other arguments it is called with.

    All sequences have one length and no padding, so positions and masks are the same for every batch of one size;
    rows that don't fill a last batch are left out.
    """
    batch_size = min(batch_size, len(sequences))
    sequences = sequences[: len(sequences) // batch_size * batch_size]
    hidden, arguments = [], {}

    def first(_, args, kwargs):
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def keep(index):
        def hook(_, args, kwargs):
            arguments[index] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    hooks = [model.get_submodule(blocks[0].path).register_forward_pre_hook(first, with_kwargs=True)]
    hooks += [model.get_submodule(b.path).register_forward_pre_hook(keep(b.index), with_kwargs=True) for b in blocks]
    try:
        for batch in batches(sequences, batch_size, model):
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, arguments


def run_block(module: nn.Module, hidden: torch.Tensor, arguments: tuple) -> torch.Tensor:
    """A block's output hidden states (blocks of some versions return a tuple)."""
    positional, named = arguments
    out = module(hidden, *positional, **named)
    return out[0] if isinstance(out, tuple) else out


@dataclass
class Table:
    """Greedy's path through one block: row r has per-role sparsities and the errors at equal effective sparsity."""

    roles: list[str]
    effective: torch.Tensor  # [rows]
    greedy_error: torch.Tensor  # [rows]
    uniform_error: torch.Tensor  # [rows]
    sparsity: torch.Tensor  # [rows, roles]

    def nearest(self, target: float) -> dict[str, float]:
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
    scales: dict[tuple[int, str], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Table]:
    """Spread sparsity inside each block, one block at a time, on the dense inputs of that block (errors not propagated).

    Every round tries one more step alpha * n_q / n_j on each map j and keeps the step with the least block-output error
    (l2 norm over the error tokens of all sequences). `threshold(layer, role, p)` gives t; `scales` gives c per
    (layer, role). Memory: the model and one hidden state per sequence.
    """
    with torch.no_grad():
        hidden, arguments = block_inputs(model, blocks, sequences, batch_size)
        tables = []
        for block in blocks:
            module = model.get_submodule(block.path)
            block_scales = (
                {r: scales[block.index, r] for r in block.sites if (block.index, r) in scales} if scales else {}
            )
            outputs = [run_block(module, h, arguments[block.index]) for h in hidden]

            def error(
                sparsity: dict[str, float],
                block=block,
                module=module,
                hidden=hidden,
                outputs=outputs,
                scale=block_scales,
            ) -> float:
                limits = {role: threshold(block.index, role, p) for role, p in sparsity.items()}
                total = 0.0
                with masked(model, block, limits, scale):
                    for h, y in zip(hidden, outputs, strict=True):
                        tail = int(h.shape[1] * (1 - settings.error_tokens))
                        difference = run_block(module, h, arguments[block.index])[:, tail:] - y[:, tail:]
                        total += float(difference.float().square().sum())
                return total**0.5

            tables.append(search(block, model, error, settings))
            hidden = outputs
            if progress is not None:
                progress(block.index + 1, len(blocks))
    return tables


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
    tables = greedy(
        model,
        blocks,
        sequences,
        lambda layer, role, p: threshold(blocks[layer].sites[role], p),
        method.greedy,
        batch_size=work.batch_size,
        scales={
            (s.layer, s.role): scales[s.name] for b in blocks for s in b.sites.values() if s.name in (scales or {})
        },
        progress=lambda done, total: work.log({"fit/greedy_blocks_done": done, "fit/greedy_blocks": total}),
    )
    for block, table in zip(blocks, tables, strict=True):
        keep_table(state, block.index, table)


TABLE = ("effective", "greedy_error", "uniform_error", "sparsity")


def keep_table(state: State, layer: int, table: Table) -> None:
    state.info.setdefault("roles", table.roles)
    for name in TABLE:
        state.tensors[f"table.{layer}.{name}"] = getattr(table, name)


def table_of(state: State, layer: int) -> Table:
    return Table(state.info["roles"], *(state.tensors[f"table.{layer}.{name}"] for name in TABLE))


def search(block: Block, model: nn.Module, error: Callable[[dict[str, float]], float], settings: Greedy) -> Table:
    """The greedy path of one block for a given error function of per-role sparsities."""
    sizes = {role: model.get_submodule(site.path).weight.numel() for role, site in block.sites.items()}
    total = sum(sizes.values())
    reference = sizes.get("q", min(sizes.values()))  # alpha is in units of the query map
    sparsity = dict.fromkeys(sizes, 0.0)
    rows = []
    while sum(sizes[r] * sparsity[r] for r in sizes) / total < settings.stop:
        trials = {}
        for role, p in sparsity.items():
            if p < 1:  # a step may pass 1 on a small map: clamp
                trial = {**sparsity, role: min(1.0, p + settings.step * reference / sizes[role])}
                trials[role] = (error(trial), trial)
        best = min(trials, key=lambda role: trials[role][0])
        found, sparsity = trials[best]
        effective = sum(sizes[r] * sparsity[r] for r in sizes) / total
        rows.append((effective, found, error(dict.fromkeys(sizes, effective)), list(sparsity.values())))
    effective, found, uniform, path = zip(*rows, strict=True)
    return Table(list(sizes), torch.tensor(effective), torch.tensor(found), torch.tensor(uniform), torch.tensor(path))
