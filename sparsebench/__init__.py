"""sparsebench: activation sparsity, measured. Quality, sparsity, MACs, bytes and wall clock in one record per run."""

import os

__version__ = "0.1.0"

# torch's CPU allocator then asks for large pages: weights are read faster, dense and sparse alike. Read when torch loads.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str):
    """`sparsebench.load` and `sparsebench.run`, imported when they are first used: the package itself stays light."""
    if name in ("load", "run", "RunFailed"):
        from sparsebench import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
