"""The dense model through the whole pipeline: what the measuring itself costs and how far it repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.records.state import State


@dataclass(kw_only=True)
class Dense(Method):
    """Nothing fitted, nothing swapped."""

    name: str = setting(**NAME_PATTERN)
    kinds: ClassVar = ("language", "vision", "classification")
    neutral: ClassVar = {}
    takes_experts: ClassVar = True
    requested: ClassVar = 0.0
    quantised: ClassVar = True

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        return State()

    def apply(self, module, state: State, work: Work):
        return module
