"""The contract of a sparse module: what it drops is counted, what it costs is said, and so is the kernel that really runs.

Counting, costs and latency read nothing but this, so that a new module gets its figures for nothing, and one that does
not say which kernel serves it is `masked_dense`: simulated, no speed-up is claimed for it.

Conventions: a (token, channel) pair counts as skipped when the module dropped it. Padding counts nowhere. Integers are
added up and divided once, at the end (docs/methods/metrics.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

MANY = 1024  # tokens of a call that is no decode step: a prompt, an image, a text


class Counter:
    """Counts of one site: how often each of its n channels was kept, over how many tokens. int64 throughout."""

    def __init__(self, channels: int, device: torch.device):
        self.kept = torch.zeros(channels, dtype=torch.int64, device=device)  # over sparse tokens
        self.sparse_tokens = 0
        self.dense_tokens = 0
        self.token_mask: torch.Tensor | None = None  # [B, T] bool, False on padding

    def add(self, keep: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Count one call. keep [..., n] bool; dense: bool, its shape without n, True on tokens left dense by policy."""
        rows = keep.reshape(-1, keep.shape[-1])
        valid = None if self.token_mask is None else self.token_mask.flatten().to(rows.device)
        if dense is not None:
            dense = dense.flatten()
            self.dense_tokens += int((dense if valid is None else dense & valid).sum())
            valid = ~dense if valid is None else valid & ~dense
        rows = rows if valid is None else rows[valid]
        self.kept += rows.sum(0)
        self.sparse_tokens += rows.shape[0]

    def merge(self, other: Counter) -> None:
        """Add the counts of another pass: figures over A and B equal one pass over both."""
        self.kept += other.kept
        self.sparse_tokens += other.sparse_tokens
        self.dense_tokens += other.dense_tokens


class MapCounter:
    """Exact zeros among the elements of one activation map, over images. Plain integers; no tolerance."""

    def __init__(self) -> None:
        self.zeros = self.elements = self.images = 0
        self.token_mask: torch.Tensor | None = None  # images have no padding

    def add(self, y: torch.Tensor) -> None:
        """Count one call; y [N, C, H, W] or [N, C]."""
        self.zeros += y.numel() - int(torch.count_nonzero(y))
        self.elements += y.numel()
        self.images += y.shape[0]

    def merge(self, other: MapCounter) -> None:
        self.zeros += other.zeros
        self.elements += other.elements
        self.images += other.images


@dataclass(frozen=True)
class SiteSparsity:
    """What was measured at one site."""

    sparsity: float  # share of (token, channel) pairs skipped, over all tokens
    sparsity_of_sparse_tokens: float  # the same over the tokens made sparse
    weight: int  # parameters of the map this input feeds: its weight in model-wide figures
    sparse_tokens: int
    dense_tokens: int
    kept_inputs_nonzero: float | None = None  # share of (token, channel) pairs kept and not 0, where kept zeros count
    kept_nonzeros: float | None = None  # nonzero weights whose channel was kept, mean per sparse token, where pruned
    nonzeros: int | None = None  # all nonzero weights, where the method prunes


@dataclass
class PromptCost:
    """MACs of one sparse token of a prompt, for one site, where they are not those of a decoded token."""

    sparse_macs: float
    overhead_macs: float
    executed_macs: float  # by the kernel that serves a prompt


@dataclass
class Cost:
    """Per decoded token at batch 1. macs and bytes of weights, for one site."""

    dense_macs: float
    sparse_macs: float
    overhead_macs: float  # what the method adds: router, predictor, low-rank factors, rotation, selection
    dense_bytes: float
    sparse_bytes: float
    executed_macs: float | None = None  # by a kernel that skips inputs only; None = sparse_macs
    prompt: PromptCost | None = (
        None  # None: a prompt's token costs what a decoded one does, and masks skip nothing of it
    )


class SparseModule(nn.Module):
    """A module that a method put into a model. What it does not say is taken as: nothing counted, free, simulated.

    site: its name in records, e.g. `3.gate`. counter: set while counting; every call adds to it, and fast kernels stand
    aside. threshold: a buffer or float; -1 keeps everything (the break-even measurement).
    """

    counts: ClassVar[bool] = True  # False: it only adds cost, or only runs a kernel; there is nothing to count
    unit: ClassVar[str] = "channels"  # what it drops: channels, neurons, experts, heads
    site: str = ""
    kernel_name: str = "masked_dense"  # the backend asked for
    counter: Counter | MapCounter | None = None

    def new_counter(self) -> Counter | MapCounter:
        """An empty counter of its channels, on its device."""
        raise NotImplementedError(f"{type(self).__name__} counts nothing")

    @property
    def covers(self) -> dict[str, int]:
        """Weights whose work a dropped channel saves, by site name."""
        return {}

    def kernel(self, tokens: int) -> str:
        """The backend that really serves a call of one sequence of so many tokens (or one image)."""
        return "masked_dense"

    def kernel_of_rows(self, rows: int) -> str:
        """The backend that really serves one token of each of so many sequences, or so many tokens of a verify step."""
        return self.kernel(1) if rows == 1 else "masked_dense"

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """MACs and weight bytes of one token by site name, dense and as measured."""
        return {}


def sparse_modules(model: nn.Module) -> Iterator[SparseModule]:
    """Every sparse module of a model, those that only add cost or run a kernel included."""
    return (module for module in model.modules() if isinstance(module, SparseModule))


def measured_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    """The sparse modules of a model that count, by their site name."""
    return ((module.site, module) for module in sparse_modules(model) if module.counts)
