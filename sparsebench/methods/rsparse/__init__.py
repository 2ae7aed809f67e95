"""R-Sparse: thresholded channels plus a low-rank remainder."""

from sparsebench.methods.rsparse.method import RSparse

__all__ = ["RSparse"]
