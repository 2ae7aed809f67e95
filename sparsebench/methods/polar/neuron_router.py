"""The trained router of FFN neurons of ReLU models: a two-layer map on the FFN's input foresees which neurons are not 0.

Training is that of ProSparse's predictors (weighted BCE, AdamW), as the official code's. A token's neurons are those with
a probability above 0.5 or, for a batch, the k with the largest sum over its rows, k by layer from the recall search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsebench.methods.polar import budgets
from sparsebench.methods.prosparse import predictor
from sparsebench.modules import input_sparse, neuron_sparse, routed
from sparsebench.modules.activations import Activation, activation_of
from sparsebench.modules.tokens import follow
from sparsebench.sites import Block, find_blocks

NAMES = ("first", "second", "bias1", "bias2")
START = 512  # k at which the search begins (official code)
SAMPLED = 50_000  # tokens at most that it draws (official code)


def check(model: nn.Module, key: str) -> None:
    """Raise ValueError for a model whose FFN has no exact zeros."""
    if activation_of(model.config) != "relu":
        raise ValueError(f"method.neurons={key} takes models with ReLU, got {activation_of(model.config)}")


def fit(
    module: nn.Module, sequences: torch.Tensor, settings: predictor.Settings, batch: int | None, work: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state tensors `predictor.<layer>.*`, what the record says: recall, sparsity and k by layer and on average)."""
    check(module, "router")
    blocks, device = find_blocks(module), next(module.parameters()).device
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[int, dict[str, float]] = {}
    for index, pairs in predictor.pairs(module, blocks, sequences, work.batch_size).items():
        x, active = (part.to(device) for part in pairs)
        one, layers[index] = predictor.train_one(x, active, settings, work.seed + index)
        if batch is not None:
            held = len(x) - max(1, min(len(x) - 1, round(len(x) * (1 - settings.held_out))))
            layers[index] |= chosen(one, x[-held:], active[-held:], batch, work.seed + index)
        tensors |= {f"predictor.{index}.{name}": p.detach() for name, p in one.named_parameters()}
        work.log({f"fit/neurons_{key}/{index}": value for key, value in layers[index].items()})
    keys = ("recall", "predicted_sparsity", "sparsity", *(("k", "recall_at_k") if batch is not None else ()))
    means = {key: sum(each[key] for each in layers.values()) / len(layers) for key in keys}
    return tensors, {"rank": settings.rank, "batch": batch, **means, "per_layer": layers}


def chosen(one: predictor.Predictor, x: torch.Tensor, active: torch.Tensor, batch: int, seed: int) -> dict[str, float]:
    """k of one layer and the recall there, on random batches of held-out tokens x [M, d]; active bool [M, f].

    Raises ValueError where there is no whole batch of them.
    """
    count = min(len(x), SAMPLED) // batch
    if not count:
        raise ValueError(f"method.neuron_batch must be at most the {len(x)} held-out tokens of the router, got {batch}")
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: count * batch].to(x.device)
    with torch.no_grad():
        scores = torch.cat([one.logits(part) for part in x[rows].split(4096)]).unflatten(0, (count, batch))
    k, reached = budgets.search(scores, active[rows].unflatten(0, (count, batch)), min(START, active.shape[1]))
    return {"k": min(k, active.shape[1]), "recall_at_k": reached}


def apply(module: nn.Module, tensors: dict[str, torch.Tensor], counts: dict[int, int] | None, kernel: str) -> None:
    """Put the routers into all FFNs; counts: k by layer, None = each token's own neurons."""
    check(module, "router")
    routers = predictor.build(module, tensors)
    for block in find_blocks(module):
        router = routers[block.index]
        router.k = None if counts is None else counts[block.index]
        if "gate" in block.sites:
            neuron_sparse.swap(module, block, Activation("relu"), predictor=router, kernel=kernel)
        else:
            routed.swap(module, block.sites["fc1"], router, kernel)
            input_sparse.swap(module, block.sites["fc2"], 0.0, kernel=kernel).unit = "neurons"
    follow(module)


def skip_zeros(module: nn.Module, block: Block, kernel: str) -> None:
    """Skip neurons that are exactly 0. Raises ValueError for a model whose activation is not ReLU."""
    check(module, "exact")
    if "gate" in block.sites:
        neuron_sparse.swap(module, block, Activation("relu"), kernel=kernel)
    else:
        input_sparse.swap(module, block.sites["fc2"], 0.0, kernel=kernel).unit = "neurons"
