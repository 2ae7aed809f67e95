"""Dense FFNs to expert FFNs and back from a state; what can be converted, and what a fit keeps (weights or orders, routers)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsebench.modules.activations import activation_of
from sparsebench.modules.expert_ffn import ExpertFFN
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.neuron_sparse import ROLES
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks, is_linear, weight_of
from sparsebench.training.loop import Training

log = logging.getLogger(__name__)

KINDS = ("language", "vision", "classification")


def convert(module: nn.Module, size: int, activation: str | None, blocks: list[Block] | None = None) -> list[ExpertFFN]:
    """Put an expert FFN, neurons in their old order, in the place of every block's FFN; the FFNs, by block.

    activation: None = the model's own. blocks: as found before other maps were replaced. Raises ValueError where a
    block's FFN is fused or `size` does not divide it.
    """
    name = activation or activation_of(module.config)
    return [convert_one(module, block, size, name) for block in blocks or find_blocks(module)]


def convert_one(module: nn.Module, block: Block, size: int, activation: str) -> ExpertFFN:
    roles = next((roles for roles in ROLES if set(roles) <= set(block.sites)), None)
    paths = [block.sites[r].path for r in roles] if roles else []
    parents = [p.rpartition(".")[0] for p in paths]
    split = len(set(parents)) == 2 and block.path not in parents  # BERT: intermediate.dense, output.dense
    if not roles or block.path in parents or (len(set(parents)) != 1 and not split):
        raise ValueError(
            f"model: experts need gate, up, down or fc1, fc2 in modules of their own, got {', '.join(block.sites)}"
        )
    maps = [module.get_submodule(p) for p in paths]
    weights = {"first": weight_of(maps[0]), "first_bias": maps[0].bias, "last": weight_of(maps[-1]).t()}
    weights["last_bias"] = maps[-1].bias
    if len(maps) == 3:
        weights |= {"up": weight_of(maps[1]), "up_bias": maps[1].bias}
    f = len(weights["first"])
    if f % size:
        raise ValueError(f"method.experts.size must divide the {f} neurons of an FFN, got {size}")
    dense = {f"{block.index}.{r}": m.weight.numel() for r, m in zip(roles, maps, strict=True)}
    expert_ffn = ExpertFFN(weights, activation, f // size, site=f"{block.index}.ffn", dense_macs=dense)
    expert_ffn.train(module.training)
    replace(module, parents[0], expert_ffn)
    if split:
        replace(module, paths[1], nn.Identity())
    return expert_ffn


def ffns(module: nn.Module) -> list[ExpertFFN]:
    return [m for m in module.modules() if isinstance(m, ExpertFFN)]


# ---------------------------------------------------------------------------------------------------------------------
# Data of any kind


@contextmanager
def watching(expert_ffns: list[ExpertFFN], see: Callable) -> Iterator[None]:
    """Call see(ffn, x, z, a, x1) in every dense and soft pass while the context lasts."""
    for ffn in expert_ffns:
        ffn.watch = see
    try:
        yield
    finally:
        for ffn in expert_ffns:
            ffn.watch = None


# ---------------------------------------------------------------------------------------------------------------------
# Routers that learn from a frozen model


# ---------------------------------------------------------------------------------------------------------------------
# States


def state_of(module: nn.Module, like: nn.Module, orders: dict, trained: bool, info: dict) -> State:
    """Routers in float32, and the orders; or, where the model was trained, all its weights as they now lie."""
    dtype, tensors = next(like.parameters()).dtype, {} if trained else dict(orders)
    for name, parameter in module.named_parameters():
        if ".router." in name:
            tensors[f"weights.{name}"] = parameter.detach().float()
        elif trained:
            tensors[f"weights.{name}"] = parameter.detach().to(dtype)
    return State(tensors, info)


def restore(module: nn.Module, state: State) -> None:
    """Reorder the converted FFNs as fitted, then put the state's weights in (routers must be there already)."""
    for ffn in ffns(module):
        if f"order.{ffn.site}" in state.tensors:
            ffn.reorder(state.tensors[f"order.{ffn.site}"])
    with torch.no_grad():
        for name, tensor in state.tensors.items():
            if name.startswith("weights."):
                parameter = module.get_parameter(name.removeprefix("weights."))
                if parameter.shape != tensor.shape:
                    raise ValueError(f"the trained state does not fit the model at {name}")
                parameter.copy_(tensor)


def history_facts(histories: dict[str, tuple[Any, Training, Any]]) -> dict:
    """A state's info from the trainings of a fit: {stage: (history, settings, rows)}."""
    tokens, stages, rows_of = 0, {}, []
    for stage, (history, settings, rows) in histories.items():
        length = rows.shape[1] if isinstance(rows, torch.Tensor) else 1
        stages[stage] = {"steps": history.steps, "seen": history.steps * settings.batch_size * length,
                         "seconds": history.seconds, "resumed_at": history.resumed_at}  # fmt: skip
        tokens += stages[stage]["seen"]
        rows_of += history.rows
    return {"kind": "trained", "tokens": tokens, "extra": {"stages": stages, "training": rows_of}}


def problems(method: Any, settings: Any) -> list[str]:
    """Lines about settings that no expert method can serve, as far as they show before a model is loaded."""
    lines, model = [], settings.model
    if settings.eval.neurons.enabled:
        lines.append(f"eval.neurons.enabled must be false with method={method.name} (no single neurons), got true")
    width = None
    if model.kind == "vision":
        from sparsebench.models.vision import VIT

        architecture = getattr(model, "architecture", None)
        if architecture in VIT:
            width = 4 * VIT[architecture]["hidden_size"]
        elif architecture is not None:
            lines.append(f"method={method.name} takes transformers, e.g. model=vit-tiny, got model={model.name}")
    elif isinstance(getattr(model, "architecture", None), dict):
        width = model.architecture.get("intermediate_size")
    if width and width % method.experts.size:
        lines.append(f"method.experts.size must divide the {width} neurons of an FFN, got {method.experts.size}")
    return lines


def linear_maps(module: nn.Module, roles: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """(path, map, site name) of the maps with these roles in every block."""
    maps = []
    for block in find_blocks(module):
        for role in roles:
            if role in block.sites and is_linear(module.get_submodule(block.sites[role].path)):
                site = block.sites[role]
                maps.append((site.path, module.get_submodule(site.path), site.name))
    return maps
