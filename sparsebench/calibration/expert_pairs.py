"""Calibration inside experts: histograms over the pairs (token, expert) that the router runs, of what rules decide on.

One dense pass with each block's experts opened (modules/sparse_experts.py, nothing dropped: the same outputs bit by bit).
An expert sees only its own share of the text, so a threshold of its own needs enough of it: with fewer than ENOUGH pairs
it gets its layer's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsebench.calibration.histograms import AbsHistogram, quantile
from sparsebench.modules.fused_experts import runs
from sparsebench.modules.sparse_experts import SparseExperts
from sparsebench.records.state import State
from sparsebench.sites import Block

log = logging.getLogger(__name__)

ENOUGH = 1000  # pairs of one expert for a quantile of its own
PLACES = {
    "in": "gate_up",
    "mid": "down",
    "gates": "gates",
}  # what is watched -> the part of SparseExperts that reads it
WHERE = ("layer", "expert")  # whose threshold it is


@contextmanager
def opened(module: nn.Module, blocks: list[Block]) -> Iterator[None]:
    """Every block's experts replaced by ones whose parts can be watched, while the context lasts."""
    own = {b.experts.path: (module.get_submodule(b.experts.path), b.experts) for b in blocks if b.experts}
    places = {path: (module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in own}
    try:
        for path, (experts, layout) in own.items():
            setattr(*places[path], SparseExperts(experts, layout))
        yield
    finally:
        for path, (experts, _) in own.items():
            setattr(*places[path], experts)


class Watch:
    """Histograms of |x| (or |x| c) at experts, for one pass of `histograms.collect`.

    Args:
        blocks: those of the model; the ones without experts are left out.
        tensors: among PLACES.
        where: layer, or expert for histograms of each expert, too (half a megabyte for each that is run).
        scales: c [E, n] by `<layer>.<tensor>`.
    """

    def __init__(self, blocks: list[Block], device, tensors: tuple[str, ...], where="layer", scales=None):
        self.blocks = [b for b in blocks if b.experts is not None]
        self.device, self.each, self.scales = device, where == "expert", scales or {}
        self.histograms: dict[str, AbsHistogram] = {}
        self.pairs = {b.index: torch.zeros(b.experts.num_experts, dtype=torch.int64) for b in self.blocks}
        self.observers: dict[str, Callable] = {}
        for block in self.blocks:
            for tensor in tensors:
                path = f"{block.experts.path}.{PLACES[tensor]}"
                self.observers[path] = self.observer(block, tensor, counts=tensor == tensors[0])

    def observer(self, block: Block, tensor: str, counts: bool) -> Callable:
        name, scale = f"hist.{block.index}.experts.{tensor}", self.scales.get(f"{block.index}.{tensor}")

        def histogram(key: str) -> AbsHistogram:
            if key not in self.histograms:
                self.histograms[key] = AbsHistogram(self.device)
            return self.histograms[key]

        def see(x: torch.Tensor, pairs, *rest) -> None:
            score = x if scale is None else x.float() * scale.to(x.device)[pairs.experts].float()
            histogram(name).add(score)
            for e, part in runs(pairs.experts):
                if counts:
                    self.pairs[block.index][e] += part.stop - part.start
                if self.each:
                    histogram(f"{name}.{e}").add(score[part])

        return see

    def context(self, module: nn.Module):
        return opened(module, self.blocks)

    def facts(self) -> dict[str, Any]:
        """What the state keeps: pairs seen by layer and expert, and for people which experts have too few."""
        few = [
            f"{layer}.{e}"
            for layer, counts in self.pairs.items()
            for e in (counts < ENOUGH).nonzero().flatten().tolist()
        ]
        facts: dict[str, Any] = {"expert_pairs": {str(layer): counts.tolist() for layer, counts in self.pairs.items()}}
        if self.each:
            facts["extra"] = {"experts_with_their_layers_threshold": few}
            if few:
                log.warning("%d experts saw fewer than %d tokens and get their layer's threshold", len(few), ENOUGH)
        return facts


def threshold(state: State, block: Block, tensor: str, p: float, where: str = "layer") -> float | torch.Tensor:
    """t with P(score <= t) = p over the pairs of a layer, or float32 [E] where each expert with enough pairs has its own."""

    def limit(name: str) -> float:
        return quantile(state.info["first_bin"][name], state.tensors[name], p)

    name = f"hist.{block.index}.experts.{tensor}"
    of_layer = limit(name)
    if where == "layer":
        return of_layer
    pairs = state.info["expert_pairs"][str(block.index)]
    return torch.tensor([limit(f"{name}.{e}") if n >= ENOUGH else of_layer for e, n in enumerate(pairs)])


def watch_of(blocks: list[Block], device, tensors: tuple[str, ...], where: str, scales=None) -> Watch | None:
    """A watch, or None where a model has no experts."""
    return Watch(blocks, device, tensors, where, scales) if any(b.experts for b in blocks) else None
