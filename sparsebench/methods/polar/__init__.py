"""Polar Sparsity: attention heads for large batches, FFN neurons of ReLU models for small ones (arXiv 2505.14884)."""

from sparsebench.methods.polar.method import Polar

__all__ = ["Polar"]
