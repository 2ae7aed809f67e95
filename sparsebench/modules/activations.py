"""Activations with exact zeros: z [..., f] -> a [..., f], where a neuron with a = 0 is inactive and can be skipped.

Every one has `threshold`, a buffer; those without such a setting leave it at 0.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import nn
from transformers.activations import ACT2FN

from sparsebench.kernels import masked_dense

ACTIVATION_KEYS = (
    "hidden_activation",
    "hidden_act",
    "activation_function",
    "activation",
)  # the first one set counts (Gemma has two)


def activation_of(config) -> str:
    """A model's FFN activation by the name transformers gives it. Raises ValueError where its config names none."""
    for key in ACTIVATION_KEYS:
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN:
            if any(True for _ in ACT2FN[name].parameters()):
                raise ValueError(f"model: its activation {name} has trained weights of its own, and can't be replaced")
            return name
    raise ValueError(f"model: its config names no activation of transformers ({', '.join(ACTIVATION_KEYS)})")


class Activation(nn.Module):
    """phi(z) without further zeros: any activation of transformers by name, e.g. `silu`."""

    def __init__(self, name: str = "silu", threshold: float = 0.0):
        super().__init__()
        self.name, self.function = name, ACT2FN[name]
        self.register_buffer("threshold", torch.tensor(float(threshold)), persistent=False)

    def keep(self, z: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """bool [..., f]: which neurons stay, from the pre-activation z and a = phi(z)."""
        return torch.ones_like(a, dtype=torch.bool)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        a = self.function(z)
        return torch.where(self.keep(z, a), a, 0)

    def extra_repr(self) -> str:
        return f"{self.name}, threshold={float(self.threshold):.4g}"


class FATReLU(Activation):
    """z where z >= threshold, else 0 (arXiv 2402.13516, eq. 3); threshold 0 is ReLU. Compared in z's own dtype."""

    def __init__(self, threshold: float = 0.0):
        super().__init__("linear", threshold)

    def keep(self, z, a):
        return z >= self.threshold.to(z.dtype)


class ShiftedReLU(Activation):
    """max(z - shift, 0) (arXiv 2310.04564)."""

    def __init__(self, shift: float):
        super().__init__("linear")
        self.shift = shift

    def forward(self, z):
        return (z - self.shift).relu()


def topk_mask(score: torch.Tensor, k: int, block: int | None = None) -> torch.Tensor:
    """bool, the shape of score [..., n]: the k largest of each group; exactly k, the lowest index wins a tie.

    A group is the last dimension, or each run of `block` entries of it. Raises ValueError where block does not divide n.
    """
    return (anew if torch.is_grad_enabled() else by_groups)(score, k, block)


def by_groups(score: torch.Tensor, k: int, block: int | None) -> torch.Tensor:
    size = block or score.shape[-1]
    if score.shape[-1] % size:
        raise ValueError(f"block must divide {score.shape[-1]}, got {block}")
    groups = score.unflatten(-1, (-1, size))
    if k >= size:
        return torch.ones_like(score, dtype=torch.bool)
    return masked_dense.k_largest(groups, k).flatten(-2)


anew = torch.compiler.disable(
    by_groups
)  # in training k may change from step to step: compiled anew each time otherwise


def topk(z: torch.Tensor, mask: torch.Tensor, backward: str = "mask") -> torch.Tensor:
    """z where the mask is set, else 0. Gradient: `mask` reaches kept entries only, `ste` passes as if there were no mask."""
    y = torch.where(mask, z, 0)
    return z + (y - z).detach() if backward == "ste" and z.requires_grad else y


class TopK(Activation):
    """phi(z), of which the k largest of each token stay, by value or by magnitude (arXiv 2210.06313; block: 2407.10969).

    count: k of a group of `block` entries, of all f where block is None. score: value | abs. group=layer selects
    k * tokens entries over the whole tensor, as the Sparsing Law code does (a token's mask then depends on the others).
    """

    def __init__(self, name: str, count: int, *, score="value", block=None, backward="mask", group="token"):
        super().__init__(name)
        self.count, self.score, self.block, self.backward, self.group = count, score, block, backward, group

    def keep(self, z, a):
        score = a.detach().abs() if self.score == "abs" else a.detach()
        if self.group == "layer":
            rows = score.numel() // score.shape[-1]
            return topk_mask(score.flatten(), self.count * rows).view_as(score)
        return topk_mask(score, self.count, self.block)

    def forward(self, z):
        a = self.function(z)
        return topk(a, self.keep(z, a), self.backward)


class StatisticalTopK(Activation):
    """phi(max(z - theta, 0)), theta = mean + std * probit(1 - share) of each token's z: about share * f stay, no sort.

    Soft threshold before phi (which must have phi(0) = 0), population standard deviation (Spark, as in Gemma-3n).
    """

    def __init__(self, name: str, share: float):
        super().__init__(name)
        self.share, self.multiplier = share, NormalDist().inv_cdf(1 - share) if share < 1 else -math.inf

    def forward(self, z):
        if self.share >= 1:
            return self.function(z)
        wide = z.float()
        theta = wide.mean(-1, keepdim=True) + wide.std(-1, keepdim=True, unbiased=False) * self.multiplier
        return self.function((wide - theta).relu().to(z.dtype))
