"""MoEfication: the FFN in equal experts, a router trained on their activations, the k best of each token (arXiv 2110.01786).

Static top-k, with the trained router or with the oracle that knows the true activations (a bound, not a way to run).
Two published routers differ; `variant` picks one (docs/methods/moefication.md, Formulas).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.experts import clustering, conversion, passes, routers
from sparsebench.methods.base import Knob, Method, Work
from sparsebench.modules.expert_ffn import ExpertFFN, Router
from sparsebench.records.state import State
from sparsebench.training import finetune
from sparsebench.training.loop import Training, train


def activation_labels(ffn: ExpertFFN, x1: torch.Tensor) -> torch.Tensor:
    """Sum of |x1| per expert (ReLU activations are their own magnitude), divided by the largest of the batch's tokens; [M, E]."""
    sums = ffn.sums(x1)
    return sums / sums.max().clamp(min=1e-12)


def cluster_router(ffn: ExpertFFN) -> Router:
    """The original: V1 = mean of each expert's normalised rows, V2 = identity, tanh between, x of length 1."""
    rows = F.normalize(ffn.first.detach().float(), dim=1)
    centres = rows.unflatten(0, (ffn.num_experts, -1)).mean(1)
    return Router(centres, torch.eye(ffn.num_experts, device=rows.device), inner="tanh", normalise=True)


@dataclass(kw_only=True)
class MoEfication(Method):
    """Settings; `keep` and `routing` are changed without fitting again."""

    name: str = setting(**NAME_PATTERN)
    keep: float = setting(gt=0, le=1)
    routing: str = setting(choices=("trained", "oracle", "random"))
    variant: str = setting(choices=("original", "small"))
    router_width: int = setting(gt=0)
    activation: str | None = setting(choices=("relu",))
    experts: clustering.Grouping
    train: Training | None
    router: Training
    kinds: ClassVar = conversion.KINDS
    neutral: ClassVar = {"keep": 1.0, "activation": None, "train": None}
    neutral_is_exact: ClassVar = False  # neurons stand in another order, so sums are rounded otherwise
    operating_point: ClassVar = ("keep", "routing")

    @property
    def requested(self) -> float:
        """Share of experts skipped."""
        return 1 - self.keep

    @property
    def knob(self) -> Knob:
        return Knob("keep", 1.0, 0.01)

    def problems(self, settings: Any) -> list[str]:
        return conversion.problems(self, settings)

    def kind_of_router(self) -> dict:
        return {"inner": "tanh", "normalise": self.variant == "original"}

    def fit(self, loaded, data, work: Work) -> State:
        """ReLU fine-tune (where `train`), clustering, routers by BCE on scaled activation sums."""
        module, histories = finetune.trainable(loaded.module), {}
        expert_ffns = conversion.convert(module, self.experts.size, self.activation)
        module.requires_grad_(True)
        if self.train is not None:
            rows, loss = passes.rows_and_loss(data, self.train)
            history = train(
                module, rows, self.train, folder=work.folder / "relu", seed=work.seed, loss=loss, track=work.log,
                label="fit/relu",
            )  # fmt: skip
            histories["relu"] = (history, self.train, rows)
        orders = clustering.group(expert_ffns, self.experts, work.seed, work.log)
        generator = torch.Generator().manual_seed(work.seed)
        for ffn in expert_ffns:
            d = ffn.first.shape[1]
            small = routers.random_router(d, self.router_width, ffn.num_experts, generator, **self.kind_of_router())
            ffn.router = (cluster_router(ffn) if self.variant == "original" else small).to(ffn.first.device)
        history = routers.fit_routers(
            module, expert_ffns, activation_labels, F.binary_cross_entropy_with_logits, data, self.router, work
        )
        histories["router"] = (history, self.router, passes.rows_and_loss(data, self.router)[0])
        info = conversion.history_facts(histories)
        return conversion.state_of(module, loaded.module, orders, self.train is not None, info)

    def apply(self, module, state: State, work: Work):
        """Experts in their order, weights and routers; top-k of round(keep E) experts."""
        conversion.convert(module, self.experts.size, self.activation)
        routers.add_routers(module, state, **self.kind_of_router())
        conversion.restore(module, state)
        kernel = work.hardware.kernel_name
        routers.harden(module, "topk", 0.0, keep=self.keep, routing=self.routing, kernel=kernel)
        return module
