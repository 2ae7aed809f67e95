"""WiSparse: weight-aware scores with a searched exponent, budgets of blocks and of maps inside them."""

from sparsebench.methods.wisparse.method import WiSparse

__all__ = ["WiSparse"]
