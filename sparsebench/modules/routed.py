"""A first FFN map of which only the rows that a router foresees are computed; the others give 0, which ReLU leaves 0.

For FFNs that are no module of their own (OPT): the map behind it skips the zeros as an input-sparse one does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.modules.base import SparseModule
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.tokens import per_row
from sparsebench.sites import LinearMap, Site

MOST_ROWS = 8  # of a call that the kernels for rows of the output serve


def wanted_rows(x: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, kernel: str) -> torch.Tensor:
    """W x [.., m] of one token for each sequence: by a kernel that reads the wanted rows alone, or whole where it can't."""
    if x.numel() // x.shape[-1] > MOST_ROWS:
        return F.linear(x, weight)
    return kernels.providing(kernel, "output_sparse_linear").output_sparse_linear(x, weight, wanted)


class RoutedLinear(SparseModule, LinearMap):
    """y = W x + b in the rows that `router` (x [..., n] -> bool [..., m]) wants, else 0. The router counts and costs."""

    counts = False

    def __init__(self, linear: nn.Linear, router: SparseModule, kernel: str = "masked_dense"):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        self.router, self.site, self.kernel_name = router, router.site, kernel
        router.kernel_name = kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wanted = self.router(x)
        one = self.router.counter is None and per_row(x) == 1
        y = wanted_rows(x, self.weight, wanted, self.kernel_name) if one else F.linear(x, self.weight)
        return torch.where(wanted, y if self.bias is None else y + self.bias, 0)

    def extra_repr(self) -> str:
        return f"{self.site}, kernel={self.kernel_name}"


def swap(model: nn.Module, site: Site, router: SparseModule, kernel: str) -> RoutedLinear:
    """Put a RoutedLinear in the place of a map."""
    routed = RoutedLinear(model.get_submodule(site.path), router, kernel)
    replace(model, site.path, routed)
    return routed
