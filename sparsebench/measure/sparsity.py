"""Measured sparsity: integer counts at the sites, divided once at the end. A requested figure never appears here.

Conventions (docs/concepts.md): a (token, channel) pair counts as skipped when the site dropped
it. `sparsity` is over all tokens seen, dense prompt tokens included; `sparsity_of_sparse_tokens` leaves out the tokens
that the prompt policy kept dense, and is what decode skips. Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsebench.modules.base import Counter, SiteSparsity, measured_modules
from sparsebench.modules.group_sparse import GroupCounter
from sparsebench.modules.input_sparse import InputSparseLinear


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


def summarise(model: nn.Module, counters: dict[str, Counter], prunes: bool = False) -> dict[str, SiteSparsity]:
    """Counts to shares, per site. A module that skips in several maps at once names them in `covers`.

    prunes: whether the method prunes weights too. Zeros that a model happens to have are no method's saving.
    """
    sites = {}
    for site, module in measured_modules(model):
        counter = counters[site]
        kept, channels = int(counter.kept.sum()), counter.kept.numel()
        tokens = counter.sparse_tokens + counter.dense_tokens
        dropped = counter.sparse_tokens * channels - kept
        pruned = prunes and isinstance(module, InputSparseLinear)
        for name, weight in module.covers.items():
            sites[name] = SiteSparsity(
                sparsity=dropped / (tokens * channels) if tokens else 0.0,
                sparsity_of_sparse_tokens=dropped / (counter.sparse_tokens * channels)
                if counter.sparse_tokens
                else 0.0,
                weight=weight,
                sparse_tokens=counter.sparse_tokens,
                dense_tokens=counter.dense_tokens,
                kept_inputs_nonzero=counter.nonzeros / (counter.sparse_tokens * channels)
                if isinstance(counter, GroupCounter) and counter.sparse_tokens
                else None,
                kept_nonzeros=kept_nonzeros(module, counter) if pruned else None,
                nonzeros=int(torch.count_nonzero(module.weight)) if pruned else None,
            )
    return sites


def kept_nonzeros(module: InputSparseLinear, counter: Counter) -> float:
    """Nonzero weights in kept channels, exact mean per sparse token: what both sparsities leave."""
    nonzeros = (module.weight != 0).sum(0)  # per input channel
    if not counter.sparse_tokens:
        return float(nonzeros.sum())
    return int((counter.kept * nonzeros.to(counter.kept.device)).sum()) / counter.sparse_tokens


def zero_weights(model: nn.Module) -> int:
    """Weights that are exactly 0 in the sparse linear maps of a model (weight sparsity, apart from that of inputs).

    What quantisation rounded to 0 is no pruning, and left out: the dense model has those zeros, too.
    """
    maps = (m for m in model.modules() if isinstance(m, InputSparseLinear) and not hasattr(m, "packed"))
    return sum(int((m.weight == 0).sum()) for m in maps)


def model_wide(shares: dict[str, float], weights: dict[str, int]) -> float:
    """sum_i P_i p_i / sum_i P_i over the maps inside blocks; P_i = parameter count (embeddings and head are outside)."""
    total = sum(weights.values())
    return sum(shares[s] * weights[s] for s in weights) / total if total else 0.0
