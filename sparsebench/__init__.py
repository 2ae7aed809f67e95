"""sparsebench: activation sparsity, measured. Quality, sparsity, MACs, bytes and wall clock in one record per run."""
