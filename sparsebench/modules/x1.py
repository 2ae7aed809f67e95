"""Watching x1, the input of an FFN's last map: the L1 penalty on it (ProSparse), shares of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsebench.modules.neuron_sparse import last_map
from sparsebench.sites import find_blocks

NORMS = ("mean", "sum1e-8", "token_sum")


@contextmanager
def watching(module: nn.Module, see: Callable[[int, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Call see(layer, x1 [B, T, f]) in every forward pass; what it returns, if anything, takes the place of x1."""
    as_written = torch.compiler.disable(see)  # it keeps figures: a compiled block stops for it
    hooks = [
        last_map(module, block).register_forward_pre_hook(lambda _, args, layer=block.index: as_written(layer, args[0]))
        for block in find_blocks(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def l1(x1: torch.Tensor, norm: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The L1 norm of one layer's x1 [B, T, f], float32 scalar; mask [B, T] is True on tokens, False on padding.

    mean: over tokens and f. token_sum: over f, mean over tokens (arXiv 2402.13516, eq. 2 read literally).
    sum1e-8: sum over everything, times 1e-8 (as later code of the same group scales it; it grows with the micro-batch).
    """
    magnitude = x1.float().abs()
    if mask is not None:
        magnitude = magnitude * mask.unsqueeze(-1)
    if norm == "sum1e-8":
        return magnitude.sum() * 1e-8
    tokens = x1.numel() // x1.shape[-1] if mask is None else mask.sum()
    total = magnitude.sum() / tokens
    return total if norm == "token_sum" else total / x1.shape[-1]


class X1Penalty:
    """lambda(step) * sum over layers of ||x1||_1, for train.train; counts zeros of x1 per layer on the way.

    over_layers: sum, or mean (TwELL). With coefficient 0 it only counts. In a run of several processes each counts its own
    tokens. Set `mask` [B, T] before a forward pass over padded sequences. To be used as a context.
    """

    def __init__(self, module: nn.Module, norm: str, coefficient: Callable[[int], float], over_layers: str = "sum"):
        self.norm, self.coefficient, self.over_layers = norm, coefficient, over_layers
        self.mask: torch.Tensor | None = None
        self.terms: list[torch.Tensor] = []
        self.zeros: dict[int, torch.Tensor | int] = {}
        self.seen: dict[int, int] = {}
        self.context = watching(module, self.see)

    def __enter__(self):
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def see(self, layer: int, x1: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        self.terms.append(l1(x1, self.norm, self.mask))
        with torch.no_grad():
            zeros = x1 == 0 if self.mask is None else (x1 == 0) & self.mask.unsqueeze(-1)
            self.zeros[layer] = self.zeros.get(layer, 0) + zeros.sum()
            tokens = x1.numel() // x1.shape[-1] if self.mask is None else int(self.mask.sum())
            self.seen[layer] = self.seen.get(layer, 0) + tokens * x1.shape[-1]

    def value(self) -> torch.Tensor:
        total = torch.stack(self.terms).sum()
        total = total / len(self.terms) if self.over_layers == "mean" else total
        self.terms = []
        return total

    def after_step(self, step: int) -> None:
        """Nothing to do between steps."""

    def stats(self) -> dict[str, float]:
        """x1_zero per layer and their plain mean, since last asked."""
        shares = {layer: int(self.zeros[layer]) / self.seen[layer] for layer in sorted(self.seen)}
        self.zeros, self.seen = {}, {}
        metrics = {f"x1_zero/{layer}": share for layer, share in shares.items()}
        return metrics | {"x1_zero": sum(shares.values()) / len(shares)}
