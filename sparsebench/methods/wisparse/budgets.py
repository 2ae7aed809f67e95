"""How a global budget is spread over blocks: exact projection, evolution by exchange, and the additive rival.

A budget vector p [L] holds the sparsity of each block, in [0, top], with sum_b N_b p_b / sum_b N_b = P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from sparsebench.config import setting

LEVELS = 0.05  # step of the grid on which the additive search chooses


@dataclass(kw_only=True)
class BlockSearch:
    """Settings of the search over blocks."""

    population: int = setting(ge=4)
    generations: int = setting(ge=1)
    mutation: float = setting(gt=0, le=2)  # standard deviation of an exchange between two blocks
    tokens: int = setting(gt=0)  # of the search set
    seed: int = setting(ge=0)


def project(p: torch.Tensor, sizes: torch.Tensor, budget: float, top: float) -> torch.Tensor:
    """p clipped to [0, top] and shifted by one constant until its weighted mean is the budget; float64 [L]."""
    if budget == 0:
        return torch.zeros_like(p)
    shares = sizes.double() / sizes.sum()
    low, high = -top - float(p.max()), top - float(p.min())
    for _ in range(200):
        middle = (low + high) / 2
        over = float((shares * (p + middle).clamp(0, top)).sum()) > budget
        low, high = (low, middle) if over else (middle, high)
    return (p + (low + high) / 2).clamp(0, top)


def first_population(
    errors: torch.Tensor,
    sizes: torch.Tensor,
    budget: float,
    top: float,
    settings: BlockSearch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Uniform, one with less sparsity where a block's error is larger, and uniform with noise; float64 [population, L]."""
    uniform = torch.full((len(sizes),), budget, dtype=torch.float64)
    protective = -errors.double() / errors.double().mean().clamp_min(1e-30)
    members = [uniform, uniform + settings.mutation * (protective + 1)]
    noise = torch.randn(settings.population - 2, len(sizes), generator=generator, dtype=torch.float64)
    members += list(uniform + settings.mutation * noise)
    return torch.stack([uniform, *(project(m, sizes, budget, top) for m in members[1:])])


def children(
    members: torch.Tensor,
    sizes: torch.Tensor,
    budget: float,
    top: float,
    settings: BlockSearch,
    generator: torch.Generator,
) -> torch.Tensor:
    """As many children as members: a member, or the mean of two, with sparsity moved between two blocks at equal weights."""
    born = []
    for parent in members:
        child = parent.clone()
        if torch.rand(1, generator=generator) < 0.5:
            other = members[int(torch.randint(len(members), (1,), generator=generator))]
            child = (child + other) / 2
        one, two = torch.randperm(len(sizes), generator=generator)[:2].tolist() if len(sizes) > 1 else (0, 0)
        moved = (
            settings.mutation * float(torch.randn(1, generator=generator, dtype=torch.float64)) * sizes.double().mean()
        )
        child[one] += moved / sizes[one]
        child[two] -= moved / sizes[two]
        born.append(project(child, sizes, budget, top))
    return torch.stack(born)


def additive(errors: np.ndarray, sizes: torch.Tensor, budget: float, top: float) -> torch.Tensor:
    """The budget vector of least sum of errors [L, levels], by dynamic programming over multiples of LEVELS.

    Exact on the grid where all blocks are of one size and the budget is a multiple of LEVELS / L; sizes that differ count in
    percent of the largest, and what rounding leaves is shifted away.
    """
    units = np.round(100 * sizes.numpy() / float(sizes.max())).astype(int)
    units = np.maximum(1, units // math.gcd(*units.tolist()))
    most = errors.shape[1] - 1
    needed = round(budget * int(units.sum()) / LEVELS)
    best = np.full(needed + 1, np.inf)  # least error with so many units dropped, `needed` standing for all beyond
    best[0] = 0.0
    choices = []
    for row, unit in zip(errors, units, strict=True):
        after, choice, source = np.full(needed + 1, np.inf), np.zeros(needed + 1, int), np.zeros(needed + 1, int)
        for level in range(most + 1):
            for place, before in steps(best, level * unit, needed):
                total = best[before] + row[level]
                better = total < after[place]
                after[place] = np.where(better, total, after[place])
                choice[place] = np.where(better, level, choice[place])
                source[place] = np.where(better, before, source[place])
        choices.append((choice, source))
        best = after
    p, place = [], needed
    for choice, source in reversed(choices):
        p.append(choice[place] * LEVELS)
        place = source[place]
    return project(torch.tensor(p[::-1], dtype=torch.float64), sizes, budget, top)


def steps(best: np.ndarray, shift: int, needed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(places reached, places they are reached from) by dropping `shift` more units; what reaches `needed` or more ends there."""
    start = max(0, needed - shift)
    within = np.arange(start)
    return [(within + shift, within), (np.array([needed]), np.array([start + int(best[start:].argmin())]))]
