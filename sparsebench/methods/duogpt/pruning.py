"""Pruning of one weight matrix from second-order statistics: SparseGPT, and DuoGPT's correction for sparse inputs.

For a row w of W[n, k] with inputs X~ of the dense model and X^ of the sparse one, pruning column p minimises
|delta X^ - r|^2 with delta_p = -w_p, where r = w_p dX_p is the drift of that column alone, dX = X~ - X^ (arXiv
2506.20194). With H = X^ X^T, H^-1 = U^T U (U upper) and Q = dX X^^T U^T:
    P      = triu(Q, 1) U
    score  = w_p^2 (1 / U_pp^2 + alpha (|dX_p|^2 - sum_{j>p} Q_pj^2 + 2 Q_pp / U_pp))
    update = -(w_p - w'_p) / U_pp U[p, p+1:] + alpha w_p P[p, p+1:]
alpha = 0 is SparseGPT on the statistics given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PATTERNS = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}


@dataclass
class Statistics:
    """Streamed second moments of the inputs of one group of maps; memory 2 k^2 + k numbers however many tokens.

    H = X^ X^T [k, k], G = dX X^^T [k, k], a = |dX_p|^2 [k], means over tokens.
    """

    H: torch.Tensor
    G: torch.Tensor
    a: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Statistics:
        zeros = [torch.zeros(shape, device=device, dtype=dtype) for shape in ((k, k), (k, k), (k,))]
        return cls(*zeros)

    def add(self, sparse: torch.Tensor, dense: torch.Tensor) -> None:
        """Count tokens: `sparse` X^ after masking and `dense` X~, both [..., k]."""
        x, d = (t.flatten(0, -2).to(self.H.dtype) for t in (sparse, dense))
        d = d - x
        total = self.tokens + len(x)
        for moment, new in ((self.H, x.T @ x), (self.G, d.T @ x), (self.a, d.square().sum(0))):
            moment.mul_(self.tokens / total).add_(new, alpha=1 / total)
        self.tokens = total


@dataclass(frozen=True)
class Rule:
    """How `prune` prunes."""

    sparsity: float  # share of weights that become 0
    pattern: str = "unstructured"  # a key of PATTERNS
    alpha: float = 0.0
    damping: float = 0.05  # of the mean diagonal of H
    order: str = "natural"  # or diag: columns by falling diagonal of H
    block: int = 128  # columns between lazy updates
    compat_lazy: bool = False  # across blocks the correction multiplies pruned values, as the released code does


def prune(weight: torch.Tensor, statistics: Statistics, rule: Rule) -> torch.Tensor:
    """The pruned weight [n, k], in the dtype of the statistics. Exactly floor(sparsity n columns) zeros per block.

    Raises ValueError where H can't be inverted (raise the damping).
    """
    H, G, a = statistics.H.clone(), statistics.G, statistics.a
    W = weight.to(H.dtype).clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    if rule.sparsity > 0:
        W[:, dead] = 0
    order = torch.arange(len(a), device=W.device)
    if rule.order == "diag":
        order = H.diagonal().argsort(descending=True, stable=True)
        W, H, G, a = W[:, order], H[order][:, order], G[order][:, order], a[order]
    U = inverse_factor(H, rule.damping)
    P, extra = correction(U, G, a, rule.alpha)
    cost = 1 / U.diagonal().square() + extra
    for start in range(0, W.shape[1], rule.block):
        prune_block(W, U, P, cost, slice(start, min(start + rule.block, W.shape[1])), rule)
    return W[:, order.argsort()]


def inverse_factor(H: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with (H + damping mean(diag H) I)^-1 = U^T U."""
    H = H.clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"method.damping={damping} is too small: the statistics can't be inverted ({error})"
        ) from error


def correction(U: torch.Tensor, G: torch.Tensor, a: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha P [k, k], strictly upper; alpha times the correction's part of the score [k])."""
    Q = G @ U.T
    upper = Q.triu(1)
    P = (upper @ U).triu(1)
    return alpha * P, alpha * (a - upper.square().sum(1) + 2 * Q.diagonal() / U.diagonal())


def prune_block(W, U, P, cost, columns: slice, rule: Rule) -> None:
    """Prune some columns of W in place and carry the consequences to all later ones."""
    lo, hi = columns.start, columns.stop
    block, pattern = W[:, columns].clone(), PATTERNS[rule.pattern]
    errors, before = torch.zeros_like(block), torch.zeros_like(block)
    drop = torch.zeros_like(block, dtype=torch.bool)
    if pattern is None:
        drop = smallest(block.square() * cost[columns], int(rule.sparsity * block.numel() + 1e-9))
    for j, p in enumerate(range(lo, hi)):
        if pattern is not None and rule.sparsity > 0 and j % pattern[1] == 0:
            score = block[:, j : j + pattern[1]].square() * cost[p : p + pattern[1]]
            drop[:, j : j + pattern[1]] = False
            drop[:, j : j + pattern[1]].scatter_(1, score.argsort(dim=1, stable=True)[:, : pattern[0]], True)
        w = block[:, j].clone()
        kept = torch.where(drop[:, j], 0, w)
        errors[:, j], before[:, j] = (w - kept) / U[p, p], w
        block[:, j + 1 :] += torch.outer(w, P[p, p + 1 : hi]) - torch.outer(errors[:, j], U[p, p + 1 : hi])
        block[:, j] = kept
    W[:, columns] = block
    W[:, hi:] += (block if rule.compat_lazy else before) @ P[columns, hi:] - errors @ U[columns, hi:]


def smallest(score: torch.Tensor, count: int) -> torch.Tensor:
    """bool, the shape of score: exactly `count` smallest entries."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.flatten().argsort(stable=True)[:count]] = True
    return mask.view(score.shape)


def magnitude(weight: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The baseline that looks at nothing but |w|: the smallest of the whole matrix, or of every n:m group, become 0."""
    pattern = PATTERNS[rule.pattern]
    if pattern is None:
        return torch.where(smallest(weight.abs().float(), int(rule.sparsity * weight.numel() + 1e-9)), 0, weight)
    if rule.sparsity == 0:
        return weight.clone()
    groups = weight.reshape(len(weight), -1, pattern[1])
    drop = torch.zeros_like(groups, dtype=torch.bool)
    drop.scatter_(-1, groups.abs().argsort(dim=-1, stable=True)[..., : pattern[0]], True)
    return torch.where(drop, 0, groups).view(weight.shape)
