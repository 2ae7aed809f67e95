"""The dense model through the whole pipeline: what the measuring itself costs and how far it repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods import Work
from sparsebench.state import State


@dataclass(kw_only=True)
class Dense:
    """Nothing fitted, nothing swapped."""

    name: str = setting(**NAME_PATTERN)
    kinds: ClassVar = ("language", "vision", "classification")
    operating_point: ClassVar = ()
    requested: ClassVar = 0.0

    def problems(self, settings: Any) -> list[str]:
        return []

    def fit(self, loaded, data, work: Work) -> State:
        return State()

    def apply(self, module, state: State, work: Work):
        return module
