"""How much each linear map's output suffers from dropped inputs, in one pass over text whose upstream is dense.

The sensitivity of a map is e = mean over tokens of ||y_sparse - y|| / ||y|| (arXiv 2508.02128). A plan leaves the most
sensitive maps dense until the share of products that are sparse, the coverage, would fall below what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.calibration.histograms import observe
from sparsebench.sites import Site, shape, weight_of

Change = Callable[[torch.Tensor], torch.Tensor]  # x [..., n] -> what the sparse map multiplies with W, the shape of x


def sensitivities(
    module: nn.Module, sites: list[Site], change: Callable[[Site], Change], sequences: torch.Tensor, batch_size: int
) -> dict[str, float]:
    """e by site name, over all tokens of `sequences` [N, T]."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def observer(site: Site, rule: Change):
        linear = module.get_submodule(site.path)

        def see(x: torch.Tensor) -> None:
            weight = weight_of(linear)
            y = F.linear(x, weight, linear.bias).float()
            error = F.linear(rule(x) - x, weight).float().norm(dim=-1)
            e = error / y.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            sums[site.name] = sums.get(site.name, 0) + e.double().sum()
            counts[site.name] = counts.get(site.name, 0) + e.numel()

        return see

    observe(module, sequences, {site.path: observer(site, change(site)) for site in sites}, batch_size)
    return {site.name: float(sums[site.name]) / counts[site.name] for site in sites}


def planned(
    module: nn.Module, sites: list[Site], sensitivity: dict[str, float], skip: list[str], coverage: float
) -> list[Site]:
    """The sites made sparse, in the order of `sites`: all but those of the roles in `skip`, then without the most
    sensitive ones for as long as the rest covers at least `coverage` of the MACs of all sites.
    """
    size = {site.name: shape(module.get_submodule(site.path)) for site in sites}
    macs = {name: m * n for name, (m, n) in size.items()}
    total = sum(macs.values())
    kept = [site for site in sites if site.role not in skip]
    for site in sorted(kept, key=lambda site: -sensitivity[site.name]):
        rest = [other for other in kept if other != site]
        if sum(macs[other.name] for other in rest) < coverage * total:
            break
        kept = rest
    return kept
