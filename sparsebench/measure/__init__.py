"""What is measured of a model, dense or sparse, whatever the method: quality, sparsity, MACs, time, memory."""
