"""DSTF: penalties on activation maps, weights pruned first."""

from sparsebench.methods.dstf.method import DSTF

__all__ = ["DSTF"]
