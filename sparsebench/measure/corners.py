"""Quantisation and sparsity apart and together: four models on the same text, and what the two add up to.

Interaction I = NLL(sparse quantised) - NLL(quantised) - NLL(sparse) + NLL(dense): 0 where both errors simply add.
See docs/quantisation.md, What a record says.
"""

from __future__ import annotations

import math
from typing import Any

MEANING = (
    "sparse: this method, fitted on the unquantised model; quantised: the dense quantised model; sparse_quantised: this run's "
    "model, fitted on the quantised one. interaction: NLL(sparse_quantised) - NLL(quantised) - NLL(sparse) + NLL(dense)"
)


def four(dense: dict, sparse: dict, quantised: dict, both: dict) -> dict[str, Any]:
    """NLL, perplexity and NLL above dense of the four models, and their interaction with its paired standard error.

    Each is what quality.language_quality gave of one model on the same windows.
    """
    named = {"dense": dense, "sparse": sparse, "quantised": quantised, "sparse_quantised": both}
    nll = {name: metrics["nll"] for name, metrics in named.items()}
    influence = {name: metrics["pieces"].influence for name, metrics in named.items()}
    return {
        "nll": nll,
        "perplexity": {name: math.exp(min(value, 700.0)) for name, value in nll.items()},
        "delta_nll": {name: value - nll["dense"] for name, value in nll.items() if name != "dense"},
        "interaction": interaction(nll),
        "interaction_stderr": dense["pieces"].stderr(interaction(influence)),
        "meaning": MEANING,
    }


def interaction(values: dict[str, Any]) -> Any:
    """I of numbers or arrays by the names of the four models."""
    return values["sparse_quantised"] - values["quantised"] - values["sparse"] + values["dense"]
