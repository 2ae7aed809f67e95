"""Penalties that make neighbouring tokens share their active units (arXiv 2507.08771): locality, chunks, and a schedule."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GAMMA_MIN = 1.025


def locality(scores: torch.Tensor, alpha: float = 100.0) -> torch.Tensor:
    """L_al: cross-entropy of sigmoid(alpha a) between each token and the one before it; scores a [B, T, N] before ReLU.

    Neither side is detached: gradients reach both tokens, as in the published code.
    """
    logits = alpha * scores
    return F.binary_cross_entropy_with_logits(logits[:, 1:], logits[:, :-1].sigmoid())


def chunk(activations: torch.Tensor, length: int) -> torch.Tensor:
    """L_cs: mean over units of P = 1 - prod over a chunk of (1 - p), p a token's activations [B, T, N] >= 0 scaled to sum 1.

    It falls with sharing and with concentration. Raises ValueError where the chunks do not fill the sequence.
    """
    if activations.shape[1] % length:
        raise ValueError(f"the chunk's length must divide the sequence's {activations.shape[1]} tokens, got {length}")
    p = activations / activations.sum(-1, keepdim=True).clamp_min(1e-20)
    logs = torch.log1p(-p.clamp(max=1 - 1e-5)).unflatten(1, (-1, length))
    return (1 - logs.sum(2).exp()).mean()


def next_weight(weight: float, new: float, previous: float) -> float:
    """The chunk penalty's coefficient for the next steps: times gamma = new / previous mean loss, at least 1.025 if it rose."""
    gamma = new / previous
    return weight * (gamma if gamma <= 1 else max(GAMMA_MIN, gamma))
