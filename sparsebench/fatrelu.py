"""FATReLU: thresholds for activation maps found by bisection under one global budget of accuracy (Kurtz et al., 2020).

The network keeps a >= t, per map. Maps are searched in the order of the forward pass, each with the thresholds before
it in place. After map l of L the accuracy may have dropped by at most budget * (l + 1) / L [choice], so that early maps
can't spend what later ones need, and the drop at the end is within the budget. The last threshold that passed stays.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparsebench.modules.activation_map import maps_of


def search(
    module: nn.Module,
    accuracy: Callable[[], float],
    budget: float,
    upper: float,
    tolerance: float,
    progress: Callable[[dict], None] = lambda row: None,
) -> dict[str, float]:
    """Set and return the thresholds by site (0 = plain ReLU). `accuracy()` scores the module on held-out data in [0, 1].

    budget: accuracy that may be lost, in [0, 1]; upper: largest threshold tried; tolerance: where bisection ends.
    """
    maps, found, start = list(maps_of(module)), {}, accuracy()
    for index, layer in enumerate(maps):
        floor = start - budget * (index + 1) / len(maps)

        def passes(threshold: float, layer=layer, floor=floor) -> bool:
            layer.threshold = threshold
            return accuracy() >= floor - 1e-12

        passed, failed = 0.0, upper
        if passes(upper):
            passed = upper
        while passed < upper and failed - passed > tolerance:
            middle = (passed + failed) / 2
            if passes(middle):
                passed = middle
            else:
                failed = middle
        layer.threshold = found[layer.site] = passed
        progress({"fit/fatrelu_maps_done": index + 1, "fit/fatrelu_maps": len(maps)})
    return found
