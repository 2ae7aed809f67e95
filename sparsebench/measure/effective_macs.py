"""Multiplications of convolutions and linear maps whose two operands are both non-zero, counted by mask convolution.

A product w * a counts iff w != 0 and a != 0; additions, biases, norms and pooling are free (docs/methods/metrics.md,
Products of CNNs). For a convolution with input X, weight W and geometry theta (stride, padding, dilation, groups):

    both = sum conv2d(1[X != 0], 1[W != 0]; theta)        dense = sum conv2d(1, 1; theta)

A product with a padding zero counts in neither, so a network without zeros has no reduction. The sum over output
channels is taken on the weight mask first, which changes no sum and makes the count cheap beside the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Products:
    """Products of one map, summed over images. `activation` and `weight`: only that operand's zeros are skipped."""

    dense: int = 0
    both: int = 0
    activation: int = 0
    weight: int = 0
    images: int = 0
    rows: int = 0  # output positions of a convolution, tokens of a linear map
    shapes: dict = field(default_factory=dict, repr=False)  # input shape -> (dense, weight) of one image

    def merge(self, other: Products) -> None:
        for name in ("dense", "both", "activation", "weight", "images", "rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def per_image(self) -> dict[str, float]:
        names = ("dense", "both", "activation", "weight", "rows")
        return {k: v / self.images for k, v in asdict(self).items() if k in names}


def same_padding(x: torch.Tensor, output: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """1[x != 0] with the zeros that a convolution of a library's own pads by itself, as TensorFlow does (timm's Conv2dSame).

    Such a layer declares no padding and has a larger output than that allows: what lacks is spread evenly, the odd one
    behind. Raises ValueError where that is not its output either.
    """
    live, sides = (x != 0).float(), []
    for axis in (3, 2):
        stride, dilation, kernel = (v[axis - 2] for v in (conv.stride, conv.dilation, conv.kernel_size))
        reach, size = dilation * (kernel - 1) + 1, x.shape[axis]
        declared = conv.padding[axis - 2] if isinstance(conv.padding, tuple) else None
        if declared is None or (size + 2 * declared - reach) // stride + 1 == output.shape[axis]:
            sides += [0, 0]
            continue
        lacking = max((output.shape[axis] - 1) * stride + reach - size, 0)
        if declared or output.shape[axis] != -(-size // stride):
            raise ValueError(f"model: products of a {type(conv).__name__} can't be counted, its padding is not known")
        sides += [lacking // 2, lacking - lacking // 2]
    return F.pad(live, sides)


def conv_counts(live: torch.Tensor, mask: torch.Tensor, conv: nn.Conv2d) -> tuple[int, int]:
    """(products with x != 0 and mask != 0, products with x != 0) of one call; live = 1[x != 0], mask as conv.weight."""
    groups, per_group = conv.groups, conv.out_channels // conv.groups
    listed = mask.view(groups, per_group, *mask.shape[1:]).sum(1).float()
    filters = torch.stack([listed, torch.full_like(listed, per_group)], dim=1).flatten(0, 1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(live.device.type, enabled=False):
        pairs = F.conv2d(live, filters, None, conv.stride, conv.padding, conv.dilation, groups)
    sums = pairs.double().sum((0, 2, 3)).view(groups, 2).sum(0)
    return round(float(sums[0])), round(float(sums[1]))


def count(module: nn.Conv2d | nn.Linear, x: torch.Tensor, output: torch.Tensor, products: Products) -> None:
    """Add one call of `module` with input x to `products`."""
    mask = module.weight != 0
    images = x.shape[0]
    if isinstance(module, nn.Conv2d):
        both, activation = conv_counts(same_padding(x, output, module), mask, module)
        if x.shape[1:] not in products.shapes:
            weight, dense = conv_counts(same_padding(torch.ones_like(x[:1]), output, module), mask, module)
            products.shapes[x.shape[1:]] = (dense, weight)
        dense, weight = products.shapes[x.shape[1:]]
        rows = output[0, 0].numel()
    else:
        live = (x != 0).flatten(0, -2).sum(0)
        both = int((live * mask.sum(0)).sum())
        activation = int(live.sum()) * mask.shape[0]
        rows = x[0].numel() // x.shape[-1]
        dense, weight = rows * mask.numel(), rows * int(mask.sum())
    products.both += both
    products.activation += activation
    products.dense += dense * images
    products.weight += weight * images
    products.images += images
    products.rows += rows * images


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Products]]:
    """Count at every Conv2d and Linear, by module path, while the block runs. Give figures over images: divide once."""
    products: dict[str, Products] = {}

    def watch(path):
        def hook(module, args, output):
            count(module, args[0].detach(), output.detach(), products.setdefault(path, Products()))

        return hook

    watched = [(p, m) for p, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(watch(p)) for p, m in watched]
    try:
        yield products
    finally:
        for hook in hooks:
            hook.remove()


def reduction(products: dict[str, Products], which: str = "both") -> float:
    """1 - sum kept / sum dense over all maps, in [0, 1]; which: both, activation or weight."""
    dense = sum(p.dense for p in products.values())
    return 1 - sum(getattr(p, which) for p in products.values()) / dense if dense else 0.0


def weight_sparsity(model: nn.Module) -> float:
    """Share of exact zeros among the weights of all convolutions and linear maps (biases and norms left out)."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    total = sum(w.numel() for w in weights)
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / total if total else 0.0
