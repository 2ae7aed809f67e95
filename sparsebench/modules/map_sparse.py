"""Convolutions and linear maps that read a sparse activation map, run by a kernel that skips its zeros at batch 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.modules.base import SparseModule


def unsupported(layer: nn.Module, hardware) -> str | None:
    """Why a layer can't skip zeros of its input on this target, or None."""
    backend = kernels.load(hardware.kernel_name)
    if not hasattr(backend, "map_sparse_conv2d"):
        return f"{hardware.kernel_name} has no kernel for activation maps"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"it takes torch's own layers, got {type(layer).__name__}"
    if layer.weight.dtype != torch.float32:
        return f"it takes float32, got {layer.weight.dtype}"
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or isinstance(layer.padding, str)):
        return "it takes convolutions without groups and with padding in numbers"
    return None


class MapSparse(SparseModule):
    """Stands in the place of a Conv2d or Linear; one image goes through the kernel, more through the dense product.

    Args:
        layer: the map; its weights are shared with the dense path, and kept a second time with outputs contiguous.
        kernel: a backend with `map_sparse_conv2d`.
    """

    counts = False

    def __init__(self, layer: nn.Conv2d | nn.Linear, kernel: str):
        super().__init__()
        self.layer, self.backend, self.kernel_name = layer, kernels.load(kernel), kernel
        weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
        self.register_buffer("rows", weight.detach().permute(2, 3, 1, 0).contiguous(), persistent=False)
        self.geometry = (
            (layer.stride, layer.padding, layer.dilation) if weight is layer.weight else ((1, 1), (0, 0), (1, 1))
        )

    def kernel(self, tokens: int) -> str:
        """One image at a time goes to the kernel."""
        return self.kernel_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 1:
            return self.layer(x)
        flat = x.dim() == 2
        y = self.backend.map_sparse_conv2d(
            x[:, :, None, None] if flat else x, self.rows, self.layer.bias, *self.geometry
        )
        return y[:, :, 0, 0] if flat else y


def reference(layer: nn.Conv2d | nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The dense product that `MapSparse` must equal."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
