"""The contract of a method: a dataclass whose fields are the keys of its YAML, with `fit` and `apply`.

`fit` is slow and may train or calibrate; `apply` is fast and the only way to obtain the sparse model, fresh or reloaded.
What `apply` puts into a model are sparse modules (modules/base.py): counting, costs and latency need nothing else of a
method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from sparsebench.data.base import Data
from sparsebench.records.state import State
from sparsebench.sites import expert_modules
from sparsebench.training.work import Work

if TYPE_CHECKING:
    from sparsebench.config.settings import Settings
    from sparsebench.models import Loaded

__all__ = ["Knob", "Method", "State", "Work"]


class Knob(NamedTuple):
    """The one number of a method's operating point that trades quality for sparsity, and where it drops least and most."""

    name: str
    least: float
    most: float


class Method:
    """One way to produce a sparse model."""

    name: str
    kinds: ClassVar[tuple[str, ...]]  # kinds of model it takes: language, vision, classification
    operating_point: ClassVar[tuple[str, ...]] = ()  # fields that only `apply` uses: a sweep over them fits once
    neutral: ClassVar[dict[str, Any] | None] = None  # settings at which the sparse model is the dense one; None = none
    redesigns: ClassVar[tuple[str, ...]] = (  # settings of `neutral` that, set otherwise, change more than what is dropped
        "train", "adapt", "activation", "control", "stages", "weight_sparsity", "alpha",
    )  # fmt: skip
    neutral_is_exact: ClassVar[bool] = True  # False: up to rounding
    quantised: ClassVar[bool] = False  # whether it takes a model whose block maps are in 8 or 4 bits (model.quantize)
    takes_experts: ClassVar[bool] = False  # whether it knows what to do with a mixture of experts

    def check_model(self, module: nn.Module) -> None:
        """Raise ValueError for a model with experts where the method knows only FFNs that every token passes."""
        experts = [] if self.takes_experts else expert_modules(module)
        if experts:
            raise ValueError(f"method={self.name} takes no model with experts, got one with {experts[0][0]}")

    def fit(self, loaded: Loaded, data: Data, work: Work) -> State:
        """Train or calibrate on data.fit, perhaps choose on data.dev; data.test is never touched.

        Deterministic for work.seed. The state holds all that `apply` needs: nothing may depend on whether `fit` ran in
        this process.
        """
        raise NotImplementedError

    def apply(self, module: nn.Module, state: State, work: Work) -> nn.Module:
        """Swap modules in place and return the sparse model."""
        raise NotImplementedError

    @property
    def requested(self) -> float | None:
        """The sparsity asked for (a field `sparsity`), or None where the method has no such number."""
        return vars(self).get("sparsity")

    @property
    def knob(self) -> Knob | None:
        """What a search for critical sparsity turns (eval.critical); None where no single number decides, or it needs a fit."""
        return Knob("sparsity", 0.0, 0.99) if "sparsity" in self.operating_point else None

    @property
    def prompt_policy(self) -> str:
        """Which tokens of a multi-token call are sparse (a field `prompt`)."""
        return str(vars(self).get("prompt", "all"))

    @property
    def changes(self) -> str | None:
        """What `fit` and `apply` write to of the dense model's tensors, in words; None = nothing.

        Where it is None the dense and the sparse model share their weights' memory (modules may be replaced in any case);
        else a run that times both holds the dense model's weights a second time, and says so with these words.
        """
        return "any weight"

    @property
    def prunes(self) -> bool:
        """Whether it sets weights to 0, so that MACs count nonzero weights only."""
        return False

    def problems(self, settings: Settings) -> list[str]:
        """Lines about settings that can't work together, as far as they show before a model is loaded."""
        return []
