"""What a kind of model and data means for measuring: one file per kind, all with the same functions.

A model, a data set and a method name their kinds (`kind`, `kinds`); the run asks the kind for

batch_size(evaluation)                       rows per forward pass, for evaluation and for methods
quality(module, split, evaluation)           (metrics, counts): quality on a split and what was counted on the way
protocol(split, method)                      how that was measured, for the record
compare(dense, sparse, protocol)             the record's quality section
dense_costs(module, data)                    MACs and bytes of the untouched model (call before the method is applied)
figures(method, sparse, costs, dense_counts, counts, measurement, skips)    sections sparsity, macs, bytes
latency(dense, sparse, data, measurement, hardware, sparsity)               the record's latency section
more(module, data, evaluation)                further measurements of one model, taken of dense and sparse alike
extra(dense, sparse, qualities, data, folder)                               further findings, e.g. confusion, pictures
KEEPS_DENSE                                  whether `extra` needs the dense model
"""

from __future__ import annotations

import importlib
from types import ModuleType


def load(kind: str) -> ModuleType:
    """The functions of a kind, e.g. `language`, `vision`."""
    return importlib.import_module(f"{__name__}.{kind}")
