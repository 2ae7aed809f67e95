"""Routers of experts: made, trained on a frozen model's activations, put back from a state, switched to hard routing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsebench.experts import passes
from sparsebench.experts.conversion import ffns, watching
from sparsebench.modules.expert_ffn import ExpertFFN, Router
from sparsebench.records.state import State
from sparsebench.training.loop import Training, train


def random_router(d: int, width: int | None, experts: int, generator: torch.Generator, std=None, **kind) -> Router:
    """Normal weights; std None = d^-0.5 of each map's input. width None = one map."""
    first = torch.randn(width or experts, d, generator=generator) * (std or d**-0.5)
    second = None if width is None else torch.randn(experts, width, generator=generator) * (std or width**-0.5)
    return Router(first, second, **kind)


def fit_routers(module, expert_ffns: list[ExpertFFN], label: Callable, loss: Callable, data, settings: Training, work):
    """Train all routers together on dense activations of the frozen model (D2DMoE, stage 3; MoEfication).

    label(ffn, x1) gives targets [M, E] for the valid tokens x1 [M, f]; loss(scores, targets) of one module. The frozen
    model and the labels are computed in float32, whatever precision the routers train in. Nothing but router weights is
    changed. Returns the history.
    """
    module.requires_grad_(False)
    for ffn in expert_ffns:
        ffn.mode = "dense"
        ffn.router.requires_grad_(True)
    rows, _ = passes.rows_and_loss(data, settings)
    seen: dict[str, tuple] = {}
    mask: torch.Tensor | None = None

    def see(ffn, x, z, a, x1):
        x, x1 = (each.flatten(0, -2) if mask is None else each[mask] for each in (x.detach(), x1.detach()))
        seen[ffn.site] = (x, label(ffn, x1))

    module.eval()
    trained = nn.ModuleList(ffn.router for ffn in expert_ffns)  # nothing else is prepared for mixed precision

    def router_loss(_, batch):
        nonlocal mask
        mask, total = passes.valid(batch), 0.0
        with torch.no_grad(), torch.autocast(expert_ffns[0].first.device.type, enabled=False):
            passes.forward(module, batch)
        for ffn in expert_ffns:
            x, target = seen.pop(ffn.site)
            total = total + loss(ffn.router(x), target)
        return total / len(expert_ffns)

    with watching(expert_ffns, see):
        history = train(
            trained, rows, settings, folder=work.folder / "routers", seed=work.seed, loss=router_loss, track=work.log,
            label="fit/router",
        )  # fmt: skip
    module.requires_grad_(False)
    return history


def empty_router(ffn: ExpertFFN, state: State, prefix: str, **kind) -> Router:
    """A router of the shapes in the state, to be filled by `restore`. prefix: the FFN's name in the model."""
    first = state.tensors[f"weights.{prefix}.router.first"]
    second = state.tensors.get(f"weights.{prefix}.router.second")
    return Router(first, second, **kind).to(ffn.first.device)


def add_routers(module: nn.Module, state: State, wide: bool = False, **kind) -> None:
    """Routers of the state's shapes, in the model's dtype, or in float32 where `wide`; `restore` fills them."""
    for name, ffn in module.named_modules():
        if isinstance(ffn, ExpertFFN):
            router = empty_router(ffn, state, name, **kind)
            ffn.router = router if wide else router.to(ffn.first.dtype)


def harden(
    module: nn.Module, rule: str, threshold: float, *, keep: float | None = None, routing="trained", kernel=None
):
    """Every expert FFN to hard routing by one rule. keep: share of experts for topk, at least one."""
    for ffn in ffns(module):
        ffn.mode, ffn.rule, ffn.routing, ffn.kernel_name = "hard", rule, routing, kernel or "masked_dense"
        ffn.threshold.fill_(threshold)
        ffn.k = None if keep is None else max(1, round(keep * ffn.num_experts))
