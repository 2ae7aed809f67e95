"""FATReLU alone: per-map thresholds on a trained network, no training (Kurtz et al., ICML 2020; fatrelu.py searches)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsebench import evaluate, fatrelu
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods import Method, Work
from sparsebench.modules.activation_map import maps_of
from sparsebench.state import State


@dataclass(kw_only=True)
class FATReLU(Method):
    """Thresholds searched on data.dev within `budget` of its accuracy."""

    name: str = setting(**NAME_PATTERN)
    budget: float = setting(ge=0, lt=1)
    upper: float = setting(gt=0)
    tolerance: float = setting(gt=0)
    kinds: ClassVar = ("vision",)

    def problems(self, settings: Any) -> list[str]:
        return needs_maps(settings)

    def fit(self, loaded, data, work: Work) -> State:
        """info["thresholds"]: t by site, in the units of the maps."""
        module = copy.deepcopy(loaded.module)

        def accuracy() -> float:
            return evaluate.classification_quality(module, data.dev, None, work.batch_size)[0]["accuracy"]

        thresholds = fatrelu.search(module, accuracy, self.budget, self.upper, self.tolerance, work.log)
        return State(info={"kind": "searched", "thresholds": thresholds, "extra": {"thresholds": thresholds}})

    def apply(self, module, state: State, work: Work):
        for layer in maps_of(module):
            layer.threshold = state.info["thresholds"][layer.site]
        return module


def needs_maps(settings: Any) -> list[str]:
    """The problem of a method for activation maps with a model that has none."""
    if settings.model.kind == "vision" and settings.model.architecture.startswith("vit"):
        return [f"method={settings.method.name} needs a network with ReLU maps, got model={settings.model.name}"]
    return []
