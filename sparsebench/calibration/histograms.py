"""Calibration: one dense pass over fit text with observers at chosen maps, and histograms that never keep activations.

Threshold methods share `collect` (the pass) and `threshold` (a quantile of what it left in the state).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from sparsebench.data.text import batches
from sparsebench.records.progress import shown
from sparsebench.records.state import State
from sparsebench.sites import Block, Site

log = logging.getLogger(__name__)

SHIFT = 15  # a bin is what the upper 17 bits of a float32 say: sign (always 0), exponent and 8 bits of mantissa
NUM_BINS = (0x7F800000 >> SHIFT) + 1  # up to infinity


def bin_edges(first: int, count: int) -> torch.Tensor:
    """Lower edges of bins first .. first+count-1, and the upper edge of the last; float64 [count + 1]."""
    bits = torch.arange(first, first + count + 1, dtype=torch.int32) << SHIFT
    return bits.view(torch.float32).double()


class AbsHistogram:
    """Counts of |x| in bins 0.4 % wide (2**-8 of each power of two): no range to guess, exact for bfloat16, additive.

    Memory is NUM_BINS int64 (about half a megabyte) however many values are added.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor) -> None:
        """Count |values|, any shape. Raises ValueError for NaN."""
        bits = values.detach().abs().float().contiguous().view(torch.int32).flatten() >> SHIFT
        counts = torch.bincount(bits, minlength=NUM_BINS)
        if counts.numel() > NUM_BINS:
            raise ValueError("calibration met NaN in the activations")
        self.counts += counts.to(self.counts.device)

    def trimmed(self) -> tuple[int, torch.Tensor]:
        """(index of the first non-empty bin, counts up to the last non-empty one): the form that is saved."""
        filled = self.counts.nonzero().flatten()
        if not len(filled):
            return 0, torch.zeros(1, dtype=torch.int64)
        return int(filled[0]), self.counts[filled[0] : filled[-1] + 1].cpu()

    def quantile(self, p: float) -> float:
        return quantile(*self.trimmed(), p)


def quantile(first: int, counts: torch.Tensor, p: float) -> float:
    """The t with P(|x| <= t) = p, linear inside a bin; 0 for p = 0. `first`, `counts` as from AbsHistogram.trimmed.

    Non-decreasing in p. Raises ValueError for p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"a quantile needs p in [0, 1], got {p}")
    if p == 0:
        return 0.0
    edges, cumulative = bin_edges(first, len(counts)), counts.cumsum(0).double()
    target = p * float(cumulative[-1])
    index = min(int(torch.searchsorted(cumulative, target)), len(counts) - 1)
    if first + index == 0:  # zeros and denormals
        return 0.0
    below = float(cumulative[index - 1]) if index else 0.0
    share = (target - below) / float(counts[index])
    low, high = float(edges[index]), float(edges[index + 1])
    return low + share * ((high if math.isfinite(high) else low) - low)


def collect(
    module: nn.Module,
    blocks: list[Block],
    sequences: torch.Tensor,
    batch_size: int,
    scales: dict[str, torch.Tensor] | None = None,
    experts: Any = None,
) -> State:
    """Histograms of |x| per tensor of each block and, for the sites in `scales` (by name, c [n]), of |x| c per map.

    Tensors `hist.<layer>.<group>` and `hist.<layer>.<role>`: int64 counts, their first bin in info. experts: a watch of
    expert_pairs.py whose histograms are filled in the same pass, or None.
    """
    device = next(module.parameters()).device
    histograms: dict[str, AbsHistogram] = {}
    observers: dict[str, Callable[[torch.Tensor], None]] = {}
    scales = scales or {}

    def observer(plain: AbsHistogram | None, scaled: AbsHistogram | None, scale: torch.Tensor | None):
        def see(x: torch.Tensor) -> None:
            if plain is not None:
                plain.add(x)
            if scaled is not None:
                scaled.add(x.float() * scale.float())

        return see

    for block in blocks:
        for site in block.sites.values():
            name, plain, scaled = f"hist.{block.index}.{site.group}", None, None
            if name not in histograms:
                plain = histograms[name] = AbsHistogram(device)
            if site.name in scales:
                scaled = histograms[f"hist.{site.name}"] = AbsHistogram(device)
            if plain is not None or scaled is not None:
                observers[site.path] = observer(plain, scaled, scales.get(site.name))
    return watched(module, sequences, observers, histograms, batch_size, experts)


def watched(
    module: nn.Module, sequences: torch.Tensor, observers: dict, histograms: dict, batch_size: int, experts=None
):
    """The state of one pass: observers by path fill `histograms` by name, those of `experts` its own."""
    with nullcontext() if experts is None else experts.context(module):
        observe(module, sequences, observers | ({} if experts is None else experts.observers), batch_size)
    state = state_of(histograms | ({} if experts is None else experts.histograms), sequences)
    if experts is not None:
        state.info |= experts.facts()
    return state


def state_of(histograms: dict[str, AbsHistogram], sequences: torch.Tensor) -> State:
    """The state that keeps histograms by tensor name, taken over `sequences`: counts, and their first bin in info."""
    state = State(info={"kind": "calibrated", "tokens": sequences.numel(), "first_bin": {}})
    for name, histogram in histograms.items():
        state.info["first_bin"][name], state.tensors[name] = histogram.trimmed()
    return state


def threshold(state: State, site: Site, p: float, scaled: bool = False) -> float:
    """t with P(score <= t) = p at a site, from what `collect` left; the score is |x|, or |x| c where `scaled`."""
    name = f"hist.{site.name}" if scaled else f"hist.{site.layer}.{site.group}"
    return quantile(state.info["first_bin"][name], state.tensors[name], p)


def observe(
    module: nn.Module, sequences: torch.Tensor, observers: dict[str, Callable[..., None]], batch_size: int
) -> None:
    """One dense forward over `sequences` [N, T] (embedding to last block, no head), calling observers on modules' inputs.

    `observers` maps the path of a module to a function of its input [B, T, n], and of what it is called with beside it.
    """
    with ExitStack() as hooks:  # a hook's handle is a context that removes it
        for path, see in observers.items():
            hooks.enter_context(
                module.get_submodule(path).register_forward_pre_hook(lambda _, args, see=see: see(*args))
            )
        for batch in shown(
            batches(sequences, batch_size, module), -(-len(sequences) // batch_size), "a pass over text"
        ):
            module.base_model(input_ids=batch, use_cache=False)
