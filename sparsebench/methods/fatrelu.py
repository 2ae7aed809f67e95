"""FATReLU: thresholds for activation maps found by bisection under one global budget of accuracy, no training.

(Kurtz et al., ICML 2020.) The network keeps a >= t, per map. Maps are searched in the order of the forward pass, each
with the thresholds before it in place. After map l of L the accuracy may have dropped by at most budget * (l + 1) / L
[choice], so that early maps can't spend what later ones need, and the drop at the end is within the budget. The last
threshold that passed stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import quality
from sparsebench.measure.bisection import furthest
from sparsebench.methods.base import Method, Work
from sparsebench.modules.activation_map import maps_of, needed_maps
from sparsebench.records.state import State


@dataclass(kw_only=True)
class FATReLU(Method):
    """Thresholds searched on data.dev within `budget` of its accuracy."""

    name: str = setting(**NAME_PATTERN)
    budget: float = setting(ge=0, lt=1)
    upper: float = setting(gt=0)
    tolerance: float = setting(gt=0)
    kinds: ClassVar = ("vision",)
    neutral: ClassVar = {"upper": 1e-30}

    def problems(self, settings: Any) -> list[str]:
        return needs_maps(settings)

    def fit(self, loaded, data, work: Work) -> State:
        """info["thresholds"]: t by site, in the units of the maps."""
        needed_maps(loaded.module, self.name)
        module = copy.deepcopy(loaded.module)

        def accuracy() -> float:
            return quality.classification_quality(module, data.dev, None, work.batch_size)[0]["accuracy"]

        thresholds = search(module, accuracy, self.budget, self.upper, self.tolerance, work.log)
        return State(info={"kind": "searched", "thresholds": thresholds, "extra": {"thresholds": thresholds}})

    def apply(self, module, state: State, work: Work):
        for layer in maps_of(module):
            layer.threshold = state.info["thresholds"][layer.site]
        return module


def needs_maps(settings: Any) -> list[str]:
    """The problem of a method for activation maps with a model whose name says that it has none."""
    if settings.model.kind == "vision" and str(getattr(settings.model, "architecture", "")).startswith("vit"):
        return [f"method={settings.method.name} needs a network with ReLU maps, got model={settings.model.name}"]
    return []


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
    maps, thresholds, start = list(maps_of(module)), {}, accuracy()
    for index, layer in enumerate(maps):
        floor = start - budget * (index + 1) / len(maps)

        def passes(threshold: float, layer=layer, floor=floor) -> bool:
            layer.threshold = threshold
            return accuracy() >= floor - 1e-12

        whole = passes(upper)
        passed = upper if whole else furthest(passes, 0.0, upper, lambda a, b: b - a <= tolerance)
        layer.threshold = thresholds[layer.site] = passed
        progress({"fit/fatrelu_maps_done": index + 1, "fit/fatrelu_maps": len(maps)})
    return thresholds
