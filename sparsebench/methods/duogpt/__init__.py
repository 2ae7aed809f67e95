"""DuoGPT: weights pruned for sparse activations."""

from sparsebench.methods.duogpt.method import DuoGPT

__all__ = ["DuoGPT"]
