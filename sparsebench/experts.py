"""What MoEfication, D2DMoE and LTE share: balanced clustering, dense FFNs to expert FFNs, routers, data, states.

Clustering: scikit-learn's k-means on neuron vectors of length 1, then exact assignments under equal sizes (scipy's
linear_sum_assignment on every centre repeated m times, un-squared distances) in turn with new centres.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from torch import nn

from sparsebench import evaluate, finetune
from sparsebench.config import setting
from sparsebench.data.labelled import Labelled
from sparsebench.models.sites import Block, find_blocks, is_linear, weight_of
from sparsebench.modules.expert_ffn import ExpertFFN, Router
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.neuron_sparse import ROLES
from sparsebench.state import State
from sparsebench.train import Training, classification_loss, next_token_loss, train

log = logging.getLogger(__name__)

KINDS = ("language", "vision", "classification")
ACTIVATION_KEYS = ("hidden_act", "activation_function", "hidden_activation")


@dataclass(kw_only=True)
class Grouping:
    """How neurons are put into experts."""

    size: int = setting(gt=0)  # m, neurons per expert
    by: str = setting(choices=("kmeans", "random"))
    rounds: int = setting(gt=0)  # balanced assignments at most, each followed by new centres


def labels(rows: torch.Tensor, num_experts: int, grouping: Grouping, seed: int) -> torch.Tensor:
    """Expert of each neuron, int64 [f], every expert exactly f / E. rows: neuron vectors [f, d].

    Deterministic for a seed. Raises ValueError where E does not divide f.
    """
    f = len(rows)
    if f % num_experts:
        raise ValueError(f"{num_experts} equal experts can't be made of {f} neurons")
    size = f // num_experts
    if grouping.by == "random":
        order = torch.randperm(f, generator=torch.Generator().manual_seed(seed))
        return torch.empty(f, dtype=torch.int64).scatter_(0, order, torch.arange(f) // size)
    points = rows.detach().float().cpu().double().numpy()
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    centres = KMeans(num_experts, n_init=3, max_iter=100, random_state=seed).fit(points).cluster_centers_
    found = None
    for _ in range(grouping.rounds):
        distance = np.repeat(cdist(points, centres), size, axis=1)
        _, columns = linear_sum_assignment(distance)
        before, found = found, columns // size
        if before is not None and np.array_equal(before, found):
            break
        centres = np.stack([points[found == e].mean(0) for e in range(num_experts)])
    return torch.from_numpy(found.astype(np.int64))


def order_of(label: torch.Tensor) -> torch.Tensor:
    """Neurons sorted by expert, int64 [f]; within an expert in their old order."""
    return label.argsort(stable=True)


def activation_of(module: nn.Module) -> str:
    """The model's FFN activation by the name transformers gives it. Raises ValueError where its config names none."""
    for key in ACTIVATION_KEYS:
        name = getattr(module.config, key, None)
        if isinstance(name, str):
            return name
    raise ValueError(f"model: its config names no activation ({', '.join(ACTIVATION_KEYS)})")


def convert(module: nn.Module, size: int, activation: str | None, blocks: list[Block] | None = None) -> list[ExpertFFN]:
    """Put an expert FFN, neurons in their old order, in the place of every block's FFN; the FFNs, by block.

    activation: None = the model's own. blocks: as found before other maps were replaced. Raises ValueError where a
    block's FFN is fused or `size` does not divide it.
    """
    name = activation or activation_of(module)
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
    found = ExpertFFN(weights, activation, f // size, site=f"{block.index}.ffn", dense_macs=dense)
    found.train(module.training)
    replace(module, parents[0], found)
    if split:
        replace(module, paths[1], nn.Identity())
    return found


def ffns(module: nn.Module) -> list[ExpertFFN]:
    return [m for m in module.modules() if isinstance(m, ExpertFFN)]


def group(found: list[ExpertFFN], grouping: Grouping, seed: int, track: Callable[[dict], None]) -> dict:
    """Cluster and reorder every module's neurons; the orders by site (`order.<site>`)."""
    orders = {}
    for i, ffn in enumerate(found):
        orders[f"order.{ffn.site}"] = order = order_of(labels(ffn.first, ffn.num_experts, grouping, seed + i))
        ffn.reorder(order)
        track({"fit/clustered": i + 1, "fit/to_cluster": len(found)})
    return orders


def random_router(d: int, width: int | None, experts: int, generator: torch.Generator, std=None, **kind) -> Router:
    """Normal weights; std None = d^-0.5 of each map's input. width None = one map."""
    first = torch.randn(width or experts, d, generator=generator) * (std or d**-0.5)
    second = None if width is None else torch.randn(experts, width, generator=generator) * (std or width**-0.5)
    return Router(first, second, **kind)


# ---------------------------------------------------------------------------------------------------------------------
# Data of any kind


def task(data, settings: Training) -> tuple[Any, Callable]:
    """(rows for train.train, loss of the task): windows of text, or labelled examples."""
    if hasattr(data.fit, "sequences"):
        return finetune.rows(data.fit, settings), next_token_loss
    return data.fit, classification_loss


def run(module: nn.Module, batch) -> None:
    """One forward pass whose output nobody needs."""
    if isinstance(batch, Labelled):
        evaluate.logits(module, batch.inputs)
    else:
        module.base_model(input_ids=batch, use_cache=False)


def valid(batch) -> torch.Tensor | None:
    """bool [B, T], False on padding; None where there is none."""
    inputs = getattr(batch, "inputs", None)
    return inputs["attention_mask"].bool() if isinstance(inputs, dict) else None


def probe(data, count: int, device) -> Iterator:
    """A few batches of fit data."""
    if hasattr(data.fit, "sequences"):
        yield from (b.to(device) for b in data.fit.sequences(count).split(4))
    else:
        yield from data.fit.batches(count, 32, device)


def dev_quality(module: nn.Module, data, work, limit: int) -> dict[str, float]:
    """Perplexity or accuracy on dev, and the share of experts skipped."""
    if hasattr(data.dev, "sequences"):
        metrics, counters = evaluate.language_quality(module, data.dev, limit, work.batch_size)
    else:
        metrics, counters = evaluate.classification_quality(module, data.dev, limit * 8, work.batch_size)
    shares = [1 - float(c.kept.sum()) / max(1, c.kept.numel() * c.sparse_tokens) for c in counters.values()]
    name = "perplexity" if "perplexity" in metrics else "accuracy"
    return {name: metrics[name], "nll": metrics["nll"], "sparsity": sum(shares) / max(1, len(shares))}


@contextmanager
def watching(found: list[ExpertFFN], see: Callable) -> Iterator[None]:
    """Call see(ffn, x, z, a, x1) in every dense and soft pass while the context lasts."""
    for ffn in found:
        ffn.watch = see
    try:
        yield
    finally:
        for ffn in found:
            ffn.watch = None


# ---------------------------------------------------------------------------------------------------------------------
# Routers that learn from a frozen model


def fit_routers(module, found: list[ExpertFFN], label: Callable, loss: Callable, data, settings: Training, work):
    """Train all routers together on dense activations of the frozen model (D2DMoE, stage 3; MoEfication).

    label(ffn, x1) gives targets [..., E]; loss(scores, targets) of the valid tokens of one module. Nothing but router
    weights is changed. Returns the history.
    """
    module.requires_grad_(False)
    for ffn in found:
        ffn.mode = "dense"
        ffn.router.requires_grad_(True)
    rows, _ = task(data, settings)
    seen: dict[str, tuple] = {}

    def see(ffn, x, z, a, x1):
        seen[ffn.site] = (x.detach(), label(ffn, x1.detach()))

    def router_loss(_, batch):
        module.eval()
        with torch.no_grad():
            run(module, batch)
        mask, total = valid(batch), 0.0
        for ffn in found:
            x, target = seen.pop(ffn.site)
            x, target = (x, target) if mask is None else (x[mask], target[mask])
            total = total + loss(ffn.router(x), target)
        return total / len(found)

    with watching(found, see):
        history = train(
            module, rows, settings, folder=work.folder / "routers", seed=work.seed, loss=router_loss, track=work.log,
            label="fit/router",
        )  # fmt: skip
    module.requires_grad_(False)
    return history


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
    found, model = [], settings.model
    if settings.eval.neurons.enabled:
        found.append(f"eval.neurons.enabled must be false with method={method.name} (no single neurons), got true")
    width = None
    if model.kind == "vision":
        from sparsebench.models.vision import VIT

        if model.architecture not in VIT:
            found.append(f"method={method.name} takes transformers, e.g. model=vit-tiny, got model={model.name}")
        else:
            width = 4 * VIT[model.architecture]["hidden_size"]
    elif isinstance(getattr(model, "architecture", None), dict):
        width = model.architecture.get("intermediate_size")
    if width and width % method.experts.size:
        found.append(f"method.experts.size must divide the {width} neurons of an FFN, got {method.experts.size}")
    return found


def linear_maps(module: nn.Module, roles: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """(path, map, site name) of the maps with these roles in every block."""
    found = []
    for block in find_blocks(module):
        for role in roles:
            if role in block.sites and is_linear(module.get_submodule(block.sites[role].path)):
                site = block.sites[role]
                found.append((site.path, module.get_submodule(site.path), site.name))
    return found
