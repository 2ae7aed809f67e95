"""Top-k per channel map, no training: each image's each channel keeps its k largest positions (arXiv 2310.18894)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.methods.fatrelu import needs_maps
from sparsebench.modules.activation_map import needed_maps
from sparsebench.records.state import State


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
        return needs_maps(settings)

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
