"""Cuts that move with the token: which entries of a vector hold a share of its mass, and the maps that drop the rest.

A cut is a value: every entry of at least this magnitude stays, so entries equal to it all do, and zeros never do. The
mask of a tensor is computed once for all maps that read it. Behind `topp` (docs/methods/topp.md).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsebench import kernels
from sparsebench.kernels import masked_dense
from sparsebench.modules.base import Cost, SiteSparsity
from sparsebench.modules.gate_sparse import GateSparseFFN
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.tokens import left_dense, per_row

RULES = ("topp", "topk", "maxp")
MOST_ROWS = 8  # tokens of one call that the kernels for listed rows serve


@dataclass(frozen=True)
class Cut:
    """What stays of each vector v [..., n].

    topp: the fewest entries of largest magnitude with sum |v_i|^power >= p times that of all (arXiv 2509.00454);
    topk: the max(1, int(n p)) largest; maxp: those of at least p times the largest.
    """

    rule: str
    p: float
    power: float = 1.0

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        """bool [..., n]."""
        magnitude = v.abs()
        return (magnitude >= self.least(magnitude)) & (magnitude > 0)

    def least(self, magnitude: torch.Tensor) -> torch.Tensor:
        """The smallest magnitude that stays [..., 1]."""
        if self.rule == "maxp":
            return self.p * magnitude.amax(-1, keepdim=True)
        if self.rule == "topk":
            count = max(1, int(magnitude.shape[-1] * self.p + 1e-9))
            return magnitude.topk(count, dim=-1).values[..., -1:]
        if self.p >= 1:
            return torch.zeros_like(magnitude[..., :1])
        ordered = magnitude.sort(dim=-1, descending=True).values
        mass = ordered.double() if self.power == 1 else ordered.double() ** self.power
        reached = mass.cumsum(-1)  # fp64: near p = 1 the last entries are many and small
        first = (reached < self.p * reached[..., -1:]).sum(-1, keepdim=True)
        return ordered.gather(-1, first.clamp(max=ordered.shape[-1] - 1))


class Shared:
    """A cut whose mask is computed once where `readers` maps are given the same tensor one after the other."""

    def __init__(self, cut: Cut, readers: int):
        self.cut, self.readers = cut, readers
        self.last: tuple | None = None  # (the tensor, its version, its mask), for the second reader

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.readers == 1 or torch.compiler.is_compiling():  # a compiler merges equal work itself
            return self.cut(x)
        version = None if x.is_inference() else x._version
        known, self.last = self.last, None
        if known is not None and known[0]() is x and known[1] == version:
            return known[2]
        mask = self.cut(x)
        self.last = (weakref.ref(x), version, mask)
        return mask


class CutLinear(InputSparseLinear):
    """A linear map that drops the inputs below its token's cut.

    Args:
        linear, site, prompt, kernel: as for InputSparseLinear.
        selection: which entries stay.
        pays: whether the selection is this map's cost; of the maps that share one, the first.
    """

    def __init__(self, linear, site: str, selection: Shared, *, pays=True, prompt="all", kernel="masked_dense"):
        super().__init__(linear, site, 0.0, prompt=prompt, kernel=kernel)
        self.selection, self.pays = selection, pays

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        return self.selection(x) | (self.threshold < 0)

    def rule(self, x: torch.Tensor, backend) -> dict:
        return {"keep": self.keep(x)}

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """As InputSparseLinear; the selection (about n log n comparisons) counts n, once for the maps that share it."""
        costs = super().costs(measured)
        costs[self.site].overhead_macs += self.weight.shape[1] * self.pays
        return costs


class CutFFN(GateSparseFFN):
    """A gated FFN whose neurons are chosen by the gate act(x W_g) or by the up map's output, both computed in full.

    by gate: rows of up and columns of down are skipped; by up: rows of the gate and columns of down.

    Args:
        ffn, layer, threshold, prompt, kernel: as for GateSparseFFN.
        by: gate or up.
        cut: which neurons stay; None = those of at least `threshold`.
    """

    def __init__(self, ffn, layer: int, by: str, *, cut: Cut | None = None, threshold=0.0, **rule):
        super().__init__(ffn, layer, threshold, **rule)
        self.by, self.cut = by, cut
        if by == "up" and self.gate.bias is not None:
            raise ValueError("method.target=up: the gate must have no bias, for its rows are skipped")

    @property
    def covers(self) -> dict[str, int]:
        skipped = "gate" if self.by == "up" else "up"
        return {f"{self.layer}.{skipped}": self.up.weight.numel(), f"{self.layer}.down": self.down.numel()}

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        if self.cut is None:
            return super().keep(values)
        return self.cut(values) | (self.threshold < 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by == "gate":
            return super().forward(x)
        values = self.up(x)
        keep, dense = self.keep(values), left_dense(self.prompt, x)
        if self.counter is not None:
            self.counter.add(keep & (values != 0), dense)
        if dense is not None:
            keep = keep | dense.unsqueeze(-1)
        few = x.numel() // x.shape[-1] <= MOST_ROWS
        name = self.kernel_name if self.counter is None and per_row(x) == 1 and few else "masked_dense"
        last = kernels.serving(name, values, self.down)  # down decides: what serves it knows the type, too
        if last is masked_dense:
            return F.linear(torch.where(keep, self.activation(self.gate(x)) * values, 0), self.down)
        first = kernels.providing(name, "output_sparse_linear")
        x1 = torch.where(keep, self.activation(first.output_sparse_linear(x, self.gate.weight, keep)) * values, 0)
        return last.input_sparse_linear(x1, self.down, None, threshold=self.zero)

    @property
    def zero(self) -> torch.Tensor:
        """The threshold on |x1|: 0, or below it where nothing shall be skipped."""
        return self.threshold.clamp(max=0)

    def kernel(self, tokens: int) -> str:
        if self.by == "gate":
            return super().kernel(tokens)
        return kernels.ran(self.kernel_name, self.down) if tokens == 1 else "masked_dense"

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """As GateSparseFFN, and the selection (about f log f comparisons), which counts f."""
        costs = super().costs(measured)
        costs[f"{self.layer}.down"].overhead_macs += self.down.shape[1] if self.cut is not None else 0
        return costs

    def extra_repr(self) -> str:
        return (
            f"{self.site}, by {self.by}, {self.cut or f'threshold={float(self.threshold):.4g}'}, prompt={self.prompt}"
        )
