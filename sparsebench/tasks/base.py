"""The contract of a task: what is measured of one model (`Assessment`), and what two of them say (`Comparison`).

A model, a data set and a method name the kind of data they take (`kind`, `kinds`); one task serves each kind. The runner
asks it for the same things of the dense and of the sparse model, so every figure has its dense twin by the same protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from sparsebench.config.settings import Evaluation, Settings
from sparsebench.data.base import Data
from sparsebench.measure.latency import Timing
from sparsebench.models import Loaded
from sparsebench.modules.base import Cost, SiteSparsity
from sparsebench.tasks import trial


@dataclass(kw_only=True)
class Assessment:
    """What one model, dense or sparse, showed on the test split."""

    metrics: dict[str, Any]  # quality, e.g. perplexity, nll, tokens
    measured: dict[str, SiteSparsity]  # what was dropped, by site; empty for a dense model
    costs: dict[str, Cost]  # of one token: of every block map, or of the maps that sparse modules stand for
    weight_bytes: int  # parameters and buffers, each storage once
    further: dict[str, Any] = field(default_factory=dict)  # measurements that a setting asks for, e.g. neurons


@dataclass(kw_only=True)
class Comparison:
    """Sections of the record that hold dense beside sparse."""

    quality: dict[str, Any]
    sparsity: dict[str, Any]
    macs: dict[str, Any]
    bytes: dict[str, Any]
    extra: dict[str, Any]


A = TypeVar("A", bound=Assessment)


class Task(ABC, Generic[A]):
    """What a kind of model and data means for measuring."""

    kind: ClassVar[str]
    keepable: ClassVar[tuple[str, ...]]  # metrics of which critical sparsity keeps a share, the main one first
    keeps_dense: ClassVar[bool] = False  # whether `illustrate` needs the dense model beside the sparse one

    @abstractmethod
    def batch_size(self, evaluation: Evaluation) -> int:
        """Rows per forward pass, for evaluation and for methods."""

    def problems(self, settings: Settings) -> list[str]:
        """Lines about a model and its data that would stop the run later, as far as they show before weights are read."""
        return trial.read(settings.dataset, settings.seed)[1]

    def tested(self, data: Data, settings: Settings) -> list[str]:
        """Digests of all held-out data that `assess` reads."""
        return [data.describe()[split]["fingerprint"] for split in ("dev", "test")]

    @abstractmethod
    def assess(self, loaded: Loaded, module: nn.Module, data: Data, settings: Settings) -> A:
        """Measure one model on `data.test`. module: the dense model of `loaded`, or what a method made of it.

        Raises FloatingPointError where the model's outputs are not finite.
        """

    @abstractmethod
    def score(
        self, module: nn.Module, split: Any, limit: int | None, settings: Settings, metric: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(metrics with the parts of `metric`, counters by site) of one model on a split, at most `limit` rows of it."""

    def dev_limit(self, settings: Settings) -> int | None:
        """Rows of dev on which a setting is chosen; None = all."""
        return None

    def test_limit(self, settings: Settings) -> int | None:
        return settings.eval.classifier.test_examples

    @abstractmethod
    def compare(self, dense: A, sparse: A, data: Data, settings: Settings) -> Comparison:
        """What changed from dense to sparse."""

    @abstractmethod
    def time(
        self,
        dense: nn.Module,
        sparse: nn.Module,
        data: Data,
        settings: Settings,
        unquantised: nn.Module | None = None,
    ) -> Timing:
        """Wall clock of both models, and of the dense one before it was quantised, where it was.

        Raises ArithmeticError where a kernel differs from masked-dense.
        """

    def cache_bytes(self, dense: A, settings: Settings) -> int:
        """Bytes of the largest cache that is timed."""
        return 0

    @abstractmethod
    def executed(self, macs: dict[str, Any], timing: Timing) -> float:
        """MACs that the timed sparse model ran, in the unit of the record's macs section."""

    def illustrate(
        self, dense: tuple[nn.Module | None, A], sparse: tuple[nn.Module, A], data: Data, folder: Path
    ) -> dict[str, Any]:
        """Further findings and pictures, in the run's folder."""
        return {}


def beside(dense: Assessment, sparse: Assessment) -> dict[str, Any]:
    """Further measurements of both models, by name."""
    return {name: {"dense": dense.further[name], "sparse": metric} for name, metric in sparse.further.items()}
