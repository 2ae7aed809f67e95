"""Neurons to balanced experts.

scikit-learn's k-means on neuron vectors of length 1, then exact assignments under equal sizes (scipy's
linear_sum_assignment on every centre repeated m times, un-squared distances) in turn with new centres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from sparsebench.config import setting
from sparsebench.modules.expert_ffn import ExpertFFN
from sparsebench.records.progress import shown


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
    assigned = None
    for _ in range(grouping.rounds):
        distance = np.repeat(cdist(points, centres), size, axis=1)
        _, columns = linear_sum_assignment(distance)
        before, assigned = assigned, columns // size
        if before is not None and np.array_equal(before, assigned):
            break
        centres = np.stack([points[assigned == e].mean(0) for e in range(num_experts)])
    return torch.from_numpy(assigned.astype(np.int64))


def order_of(label: torch.Tensor) -> torch.Tensor:
    """Neurons sorted by expert, int64 [f]; within an expert in their old order."""
    return label.argsort(stable=True)


def group(expert_ffns: list[ExpertFFN], grouping: Grouping, seed: int, track: Callable[[dict], None]) -> dict:
    """Cluster and reorder every module's neurons; the orders by site (`order.<site>`)."""
    orders = {}
    for i, ffn in enumerate(shown(expert_ffns, len(expert_ffns), "clustering neurons by block")):
        orders[f"order.{ffn.site}"] = order = order_of(labels(ffn.first, ffn.num_experts, grouping, seed + i))
        ffn.reorder(order)
        track({"fit/clustered": i + 1, "fit/to_cluster": len(expert_ffns)})
    return orders
