"""Block maps in 8 or 4 bits: rounded here after loading (`model.quantize`), everything else of the model left as it is.

Embeddings, head, norms and biases stay in the run's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsebench.kernels._packed import Packed, quantised
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.quant_sparse import QuantLinear
from sparsebench.sites import find_blocks, weight_of

BITS = {"int8": 8, "int4": 4}


def quantise(module: nn.Module, kind: str, group: int, axis: str, kernel: str) -> dict[str, Any]:
    """Round every block map of `module` to the nearest level, in place and one by one; what the record says of it.

    kind: int8 or int4; kernel: backend for one-token calls.
    """
    error, size, zeros, weights, kept = 0.0, 0.0, 0, 0, 0
    for path, linear in maps_of(module):
        weight = weight_of(linear)
        packed = quantised(weight, BITS[kind], group, axis)
        difference = packed.dequantised(torch.float32) - weight.float()
        error, size = error + float(difference.square().sum()), size + float(weight.float().square().sum())
        zeros += zero_levels(packed)
        weights, kept = weights + weight.numel(), kept + packed.bytes
        replace(module, path, QuantLinear(packed, linear.bias, kernel))
    return {
        "bits": BITS[kind],
        "group": None if kind == "int8" else group,
        "axis": "output, one scale each" if kind == "int8" else f"{axis}s, one scale to {group}",
        "rounding": "nearest (RTN), symmetric",
        "relative_weight_error": (error / size) ** 0.5 if size else 0.0,
        "zero_weights": zeros / weights,
        "bits_per_weight": 8 * kept / weights,
        "left_in_dtype": "embeddings, head, norms and biases",
    }


def maps_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, map) of every block map."""
    paths = [site.path for block in find_blocks(module) for site in block.sites.values()]
    return [(path, module.get_submodule(path)) for path in paths]


def zero_levels(packed: Packed) -> int:
    """Weights that are exactly 0 as stored."""
    levels, (_, zero) = packed.levels(), packed.scales()
    return int((levels == zero).sum())
