"""The configuration tree, shipped as the package sparsebench.conf."""
