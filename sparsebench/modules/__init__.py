"""The sparse modules every method produces: `input_sparse` (more follow the same shape: site, counter, costs)."""
