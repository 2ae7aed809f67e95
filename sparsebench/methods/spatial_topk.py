"""Top-k per channel map, no training: each image's each channel keeps its k largest positions (arXiv 2310.18894)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.data.images import USUAL_SIZE
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.methods.fatrelu import needs_maps
from sparsebench.modules.activation_map import isolate, maps_of, needed_maps
from sparsebench.records.state import State


def sites_of(settings: Any) -> list[str]:
    """The maps of a network as its name tells them, without memory for its weights; nothing where they show later."""
    size = getattr(settings.dataset, "size", None) or USUAL_SIZE
    channels = getattr(settings.dataset, "channels", None) or 3
    try:
        with torch.device("meta"):
            network = isolate(settings.model.plain(channels, 2, size), torch.zeros(1, channels, size, size))
        return [layer.site for layer in maps_of(network)]
    except Exception:  # of a repository, or one that can't be built so: applying the method says it
        return []


@dataclass(kw_only=True)
class SpatialTopK(Method):
    """k = max(1, round(keep * H * W)); the zeros realised are counted, since ReLU may leave fewer than k."""

    name: str = setting(**NAME_PATTERN)
    keep: float = setting(gt=0, le=1)
    sites: list[str] | None
    kinds: ClassVar = ("vision",)
    neutral: ClassVar = {"keep": 1.0}
    operating_point: ClassVar = ("keep", "sites")

    @property
    def knob(self) -> Knob:
        return Knob("keep", 1.0, 0.01)

    def problems(self, settings: Any) -> list[str]:
        lines = needs_maps(settings)
        known = [] if lines or self.sites is None else sites_of(settings)
        wrong = [site for site in self.sites or () if known and site not in known]
        return lines + [f"method.sites must be among {', '.join(known)}, got {site!r}" for site in wrong]

    def fit(self, loaded, data, work: Work) -> State:
        return State()

    def apply(self, module, state: State, work: Work):
        """Raises ValueError where `sites` names a map that the network does not have."""
        maps = {layer.site: layer for layer in needed_maps(module, self.name)}
        for site in self.sites if self.sites is not None else maps:
            if site not in maps:
                raise ValueError(f"method.sites must be among {', '.join(maps)}, got {site!r}")
            maps[site].keep = self.keep
        return module
