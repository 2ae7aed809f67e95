"""What the fused CUDA step is made of: one launch, the arguments of attention, the maps by their input, tunings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsebench.kernels import cuda_packed
from sparsebench.kernels.cuda_gather import Pointer, Tuning


class Attend(ctypes.Structure):
    """Arguments of decode.cu's `attend`."""

    _fields_ = [
        ("q", Pointer), ("k", Pointer), ("v", Pointer), ("q_bias", Pointer), ("k_bias", Pointer), ("v_bias", Pointer),
        ("cosine", Pointer), ("sine", Pointer), ("keys", Pointer), ("values", Pointer), ("position", Pointer),
        ("partial", Pointer), ("softmax", Pointer), ("positions", ctypes.c_int),
        ("window", ctypes.c_int), ("scaling", ctypes.c_float), ("whole", Pointer), ("arrived", Pointer),
    ]  # fmt: skip


@dataclass
class Launch:
    """One kernel of the step."""

    name: str
    label: str  # e.g. `3.qkv`
    grid: tuple[int, int]
    shared_bytes: int
    arguments: list
    tuning: Tuning
    reference: Callable[[], dict[str, tuple[torch.Tensor, torch.Tensor]]] | None = None

    @property
    def role(self) -> str:
        """What it is in a layer; a remainder's second product counts with the first."""
        name = self.label.split(".")[1] if "." in self.label else self.label
        return "attention" if name == "attend" else name


MAPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}  # by the input they read
# What was fastest on Hopper for Llama-2-7B shapes; tune_cuda.py looks further and remembers per GPU and shape.
DEFAULTS = {
    "qkv": Tuning(8, 4, 1, 4.0), "attend": Tuning(8, 2, 1), "o": Tuning(8, 8, 2, 2.0), "gate_up": Tuning(8, 4, 1, 4.0),
    "down": Tuning(8, 8, 2, 2.0), "head": Tuning(16, 8, 1, 1.0),
}  # fmt: skip
# Of products with quantised weights, by their bits.
PACKED = {bits: dict.fromkeys(MAPS, tuning) for bits, tuning in cuda_packed.TUNINGS.items()}
# Of the dense products, which wait for nothing before they read: more rows in flight, wider, by fewer CTAs.
DENSE = DEFAULTS | dict.fromkeys(MAPS, Tuning(8, 8, 2, 2.0))
