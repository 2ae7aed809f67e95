"""sparsebench: activation sparsity, measured. Quality, sparsity, MACs, bytes and wall clock in one record per run."""

import os

# torch's CPU allocator then asks for large pages: weights are read faster, dense and sparse alike. Read when torch loads.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
