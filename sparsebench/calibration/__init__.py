"""What training-free methods share: histograms of |x|, sparsity per map, the error of one block."""
