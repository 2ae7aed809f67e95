"""How many units each layer keeps: heads by what dropping them loses, neurons by the recall of a batch's union."""

from __future__ import annotations

import math

import torch

STEP, ROUND, TARGET = 100, 128, 0.99  # of the published search for neurons
MOST_ABOVE = 2048  # neurons that the search may add to its start


def head_count(units: int, density: float, grouped: bool) -> int:
    """Units kept at a density: whole heads rounded down, key-value groups rounded up (official code), at least one."""
    exact = density * units
    return max(1, min(units, math.ceil(exact - 1e-9) if grouped else math.floor(exact + 1e-9)))


def by_energy(curves: list[torch.Tensor], total: int) -> list[int]:
    """Units kept per layer, `total` of them, where what is dropped holds the least energy [choice].

    curves: for each layer its mean shares of squared lengths, largest first [units]. Each layer keeps at least one.
    """
    kept = [len(curve) for curve in curves]
    while sum(kept) > max(total, len(curves)):
        losses = [float(curve[k - 1]) if k > 1 else math.inf for curve, k in zip(curves, kept, strict=True)]
        kept[losses.index(min(losses))] -= 1
    return kept


def recall(scores: torch.Tensor, active: torch.Tensor, k: int) -> float:
    """Share of truly active (batch, neuron) pairs among each batch's k largest summed scores.

    scores [N, B, f] of a router, active bool [N, B, f]: N batches of B tokens. Truth is the union over the batch.
    """
    truth = active.any(1)
    chosen = scores.relu().sum(1).topk(min(k, truth.shape[1]), -1).indices
    hit = truth.gather(1, chosen).sum()
    return float(hit / truth.sum()) if truth.any() else 1.0


def search(scores: torch.Tensor, active: torch.Tensor, start: int, step: int = STEP) -> tuple[int, float]:
    """(k, recall): the smallest tried k with recall >= 0.99, a multiple of 128, never beyond start + 2048 or f."""
    neurons, k = active.shape[-1], start
    while recall(scores, active, k) < TARGET and k < min(start + MOST_ABOVE, neurons):
        k += step
    k = min(-(-k // ROUND) * ROUND, -(-neurons // ROUND) * ROUND)
    return k, recall(scores, active, k)
