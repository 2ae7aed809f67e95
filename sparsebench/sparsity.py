"""Measured sparsity: integer counts at the sites, divided once at the end. A requested figure never appears here.

Conventions (docs: README, "What each number means"): a (token, channel) pair counts as skipped when the site dropped
it. `sparsity` is over all tokens seen, dense prompt tokens included; `sparsity_of_sparse_tokens` leaves out the tokens
that the prompt policy kept dense, and is what decode skips. Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


class Counter:
    """Counts of one site: how often each of its n channels was kept, over how many tokens. int64 throughout."""

    def __init__(self, channels: int, device: torch.device):
        self.kept = torch.zeros(channels, dtype=torch.int64, device=device)  # over sparse tokens
        self.sparse_tokens = 0
        self.dense_tokens = 0
        self.token_mask: torch.Tensor | None = None  # [B, T] bool, False on padding

    def add(self, keep: torch.Tensor, dense_tokens: int) -> None:
        """Count one call. keep [B, T, n] bool; the first `dense_tokens` positions were left dense by policy."""
        keep = keep.reshape(-1, keep.shape[-2], keep.shape[-1])
        sparse, valid = keep[:, dense_tokens:], None
        if self.token_mask is not None:
            valid = self.token_mask[:, dense_tokens:]
            self.dense_tokens += int(self.token_mask[:, :dense_tokens].sum())
        else:
            self.dense_tokens += keep.shape[0] * dense_tokens
        rows = sparse[valid] if valid is not None else sparse.reshape(-1, sparse.shape[-1])
        self.kept += rows.sum(0)
        self.sparse_tokens += rows.shape[0]

    def merge(self, other: Counter) -> None:
        """Add the counts of another pass: figures over A and B equal one pass over both."""
        self.kept += other.kept
        self.sparse_tokens += other.sparse_tokens
        self.dense_tokens += other.dense_tokens


@dataclass(frozen=True)
class SiteSparsity:
    """What was measured at one site."""

    sparsity: float  # share of (token, channel) pairs skipped, over all tokens
    sparsity_of_sparse_tokens: float  # the same over the tokens made sparse
    weight: int  # parameters of the map this input feeds: its weight in model-wide figures
    sparse_tokens: int
    dense_tokens: int
    kept_nonzeros: float | None = None  # nonzero weights whose channel was kept, mean per sparse token


def measured_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The sparse modules of a model, by their site name.

    A module whose channels belong to several maps (a gated FFN: up and down) names them in `covers`: {site: weights}.
    """
    for module in model.modules():
        if hasattr(module, "counter") and hasattr(module, "site"):
            yield module.site, module


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Counter]]:
    """Count at every sparse module while the block runs; fast kernels stand aside meanwhile."""
    counters = {}
    for site, module in measured_modules(model):
        module.counter = counters[site] = module.new_counter()
    try:
        yield counters
    finally:
        for _, module in measured_modules(model):
            module.counter = None


def set_token_mask(model: nn.Module, mask: torch.Tensor | None) -> None:
    """Tell the counters which positions [B, T] are tokens and which are padding."""
    for _, module in measured_modules(model):
        if module.counter is not None:
            module.counter.token_mask = mask


def summarise(model: nn.Module, counters: dict[str, Counter]) -> dict[str, SiteSparsity]:
    """Counts to shares, per site. A module that skips in several maps at once names them in `sites` (name -> weights)."""
    found = {}
    for site, module in measured_modules(model):
        counter = counters[site]
        kept, channels = int(counter.kept.sum()), counter.kept.numel()
        tokens = counter.sparse_tokens + counter.dense_tokens
        dropped = counter.sparse_tokens * channels - kept
        for name, weight in getattr(module, "covers", {site: module.num_weights}).items():
            found[name] = SiteSparsity(
                sparsity=dropped / (tokens * channels) if tokens else 0.0,
                sparsity_of_sparse_tokens=dropped / (counter.sparse_tokens * channels)
                if counter.sparse_tokens
                else 0.0,
                weight=weight,
                sparse_tokens=counter.sparse_tokens,
                dense_tokens=counter.dense_tokens,
                kept_nonzeros=kept_nonzeros(module, counter),
            )
    return found


def kept_nonzeros(module: nn.Module, counter: Counter) -> float | None:
    """Nonzero weights in kept channels, exact mean per sparse token; None for modules that aren't linear maps.

    Where weights are dense this is (1 - sparsity) m n; where they are pruned too, it is what both sparsities leave.
    """
    if not getattr(module, "is_linear_map", False):
        return None
    nonzeros = (module.weight != 0).sum(0)  # per input channel
    if not counter.sparse_tokens:
        return float(nonzeros.sum())
    return int((counter.kept * nonzeros.to(counter.kept.device)).sum()) / counter.sparse_tokens


def zero_weights(model: nn.Module) -> int:
    """Weights that are exactly 0 in the sparse linear maps of a model (weight sparsity, apart from that of inputs)."""
    return sum(int((m.weight == 0).sum()) for m in model.modules() if getattr(m, "is_linear_map", False))


def model_wide(shares: dict[str, float], weights: dict[str, int]) -> float:
    """sum_i P_i p_i / sum_i P_i over the maps inside blocks; P_i = parameter count (embeddings and head are outside)."""
    total = sum(weights.values())
    return sum(shares[s] * weights[s] for s in weights) / total if total else 0.0
