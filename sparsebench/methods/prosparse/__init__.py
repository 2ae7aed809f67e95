"""ProSparse: ReLU, staged penalty, FATReLU, predictors."""

from sparsebench.methods.prosparse.method import ProSparse

__all__ = ["ProSparse"]
