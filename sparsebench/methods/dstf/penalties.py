"""Regularisers of activation maps and weights: Transformed-L1, L1, squared Hoyer, and how training reads them.

Transformed-L1 (docs/methods/dstf.md, Formulas): (1 + beta)|a| / (beta + |a|); beta -> 0 counts non-zeros, beta ->
infinity is |a|.
Its gradient beta (1 + beta) / (beta + a)^2 leaves large activations nearly alone, where L1 pushes all alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsebench.modules.activation_map import ActivationMap, maps_of

NAMES = ("tl1", "l1", "hoyer")
EPSILON = 1e-12  # keeps Hoyer of an all-zero map at 0 instead of NaN


def full(a: torch.Tensor) -> torch.Tensor:
    """|a| in float32 at least: sums of a million bfloat16 terms would be off."""
    return (a if a.dtype == torch.float64 else a.float()).abs()


def transformed_l1(a: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over all elements of (1 + beta)|a| / (beta + |a|)."""
    magnitude = full(a)
    return ((1 + beta) * magnitude / (beta + magnitude)).sum()


def l1(a: torch.Tensor) -> torch.Tensor:
    """Sum of |a| (Georgiadis, arXiv 1812.04056)."""
    return full(a).sum()


def squared_hoyer(a: torch.Tensor) -> torch.Tensor:
    """(sum |a|)^2 / sum a^2 over the whole tensor (Kurtz et al., ICML 2020): 1 for one-hot, n for n equal entries."""
    magnitude = full(a)
    return magnitude.sum().square() / (magnitude.square().sum() + EPSILON)


def regulariser(name: str, beta: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """By name, one of NAMES."""
    return {"tl1": lambda a: transformed_l1(a, beta), "l1": l1, "hoyer": squared_hoyer}[name]


class MapPenalty:
    """lambda * sum_l w_l R(A_l) / N over the activation maps A_l of a batch of N images: a Penalty of train.py.

    Args:
        module: a network with ActivationMaps.
        function: R, from `regulariser`.
        alpha: lambda of every step.
        weights: w_l by site; None = 1 each.
        norm: per_sample_sum as above; per_element divides R(A_l) by the elements of one image's map too.
    """

    def __init__(self, module: nn.Module, function, alpha: float, weights: dict | None = None, norm="per_sample_sum"):
        self.function, self.alpha, self.weights, self.norm = function, alpha, weights, norm
        self.maps: dict[str, torch.Tensor] = {}
        self.active: dict[str, torch.Tensor] = {}  # per site: which units of the map fired since last asked
        self.zeros = self.elements = 0
        self.hooks = [m.register_forward_hook(self.see) for m in maps_of(module)]

    def see(self, layer: ActivationMap, args, output: torch.Tensor) -> None:
        if not layer.training:
            return
        self.maps[layer.site] = output
        fired = output.detach() != 0
        self.zeros, self.elements = self.zeros + fired.numel() - int(fired.sum()), self.elements + fired.numel()
        before = self.active.get(layer.site)
        self.active[layer.site] = fired.any(0) if before is None else before | fired.any(0)

    def coefficient(self, step: int) -> float:
        return self.alpha

    def terms(self) -> dict[str, torch.Tensor]:
        """w_l R(A_l) / N by site, of the last forward pass."""
        terms = {}
        for site, a in self.maps.items():
            size = a.shape[0] if self.norm == "per_sample_sum" else a.numel()
            terms[site] = (self.weights[site] if self.weights else 1.0) * self.function(a) / size
        return terms

    def value(self) -> torch.Tensor:
        total = torch.stack(list(self.terms().values())).sum()
        self.maps = {}
        return total

    def stats(self) -> dict[str, float]:
        """Share of zeros, and of units that no image switched on, since last asked (such a unit has no gradient)."""
        dead = sum(int((~fired).sum()) for fired in self.active.values())
        units = sum(fired.numel() for fired in self.active.values())
        shares = {"map_zeros": self.zeros / max(1, self.elements), "dead_units": dead / max(1, units)}
        self.active, self.zeros, self.elements = {}, 0, 0
        return shares

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def product_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear maps by parameter name (no biases, no norms)."""
    return {f"{n}.weight": m.weight for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


class WeightL1:
    """gamma * sum_l ||W_l||_1 over convolutions and linear maps: a Penalty of train.py."""

    def __init__(self, module: nn.Module, gamma: float):
        self.weights, self.gamma = list(product_weights(module).values()), gamma

    def coefficient(self, step: int) -> float:
        return self.gamma

    def value(self) -> torch.Tensor:
        return torch.stack([w.abs().sum() for w in self.weights]).sum()

    def stats(self) -> dict[str, float]:
        return {}


class WeightMasks:
    """Pruned weights stay exactly 0: their gradients are dropped, and `apply` is run after each optimiser step."""

    def __init__(self, module: nn.Module, masks: dict[str, torch.Tensor]):
        weights = product_weights(module)
        self.pairs = [(weights[name], mask.to(weights[name].device)) for name, mask in masks.items()]
        self.hooks = [w.register_hook(lambda g, m=m: g * m) for w, m in self.pairs]
        self.apply()

    def apply(self, step: int = 0) -> None:
        with torch.no_grad():
            for weight, mask in self.pairs:
                weight.mul_(mask)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def magnitude_masks(module: nn.Module, share: float) -> tuple[dict[str, torch.Tensor], float]:
    """(masks by parameter name, tau): keep |w| > tau, one tau for the whole network that drops `share` of the weights."""
    weights = product_weights(module)
    values = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    dropped = round(share * values.numel())
    tau = float(values.kthvalue(dropped).values) if dropped else -1.0
    return {name: w.detach().abs() > tau for name, w in weights.items()}, tau
