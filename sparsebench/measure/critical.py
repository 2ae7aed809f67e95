"""Critical sparsity: the largest measured sparsity at which a model keeps a share of its dense metric (arXiv 2509.00454).

A method's knob is bisected on the dev split; the axis is what was dropped there, never what was asked for. The share that
is kept is, of accuracies, sparse / dense; of perplexity dense / sparse [choice], the ratio of the geometric mean
probabilities of the right token, so that 99 % of it is PPL-1.01 % (metrics.md). Its error is paired: both models are scored
on the same windows or examples. The interval of the critical sparsity is where the kept share, moved by 1.96 of its
standard errors up or down, crosses the demand; both ends are searched as the point itself is.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from sparsebench.config.settings import CriticalSparsity
from sparsebench.measure import sparsity
from sparsebench.measure.bisection import furthest
from sparsebench.measure.uncertainty import Pieces
from sparsebench.modules.base import Counter, MapCounter
from sparsebench.records import progress

ERRORS = 1.96  # standard errors on each side of the interval: 95 %
FINEST = 1e-4  # of the knob's range: closer than this no search goes
REACHED, BEYOND, UNREACHABLE = "reached", "beyond the range", "unreachable"


@dataclass(frozen=True)
class Point:
    """What one setting of the knob keeps and drops; None: the method refuses the setting."""

    value: float
    kept: float | None  # of the dense metric
    stderr: float | None  # paired; None with a single window
    sparsity: float | None  # model-wide over the block maps (metrics.md); of a network of maps their zeros
    channels: float | None  # share of (token, channel) pairs dropped, all counted sites pooled (the paper's axis)

    def passes(self, share: float, errors: float = 0.0) -> bool:
        """Whether the kept share, moved by so many standard errors, is enough."""
        return self.kept is not None and self.kept + errors * (self.stderr or 0.0) >= share


def pieces_of(metric: str, metrics: dict[str, Any]) -> Pieces:
    """What a metric is the mean of: NLL or right tokens of each piece, right answers of each example."""
    if metric != "accuracy":
        return metrics["pieces" if metric == "perplexity" else "right_pieces"]
    right = metrics["right"].astype(float)
    none = np.zeros(len(right), int)
    return Pieces(np.arange(len(right)), none, none + 1, right)


def kept(metric: str, dense: Pieces, sparse: Pieces) -> tuple[float, float | None]:
    """(share of the dense metric that the sparse model keeps, its paired standard error)."""
    if metric == "perplexity":
        share = math.exp(min(dense.mean - sparse.mean, 700.0))
        return share, dense.stderr(share * (dense.influence - sparse.influence))
    if not dense.mean:
        raise ValueError(
            "eval.critical.metric: the dense model gets nothing right on dev, so no share of it can be kept"
        )
    share = sparse.mean / dense.mean
    return share, dense.stderr((sparse.influence - share * dense.influence) / dense.mean)


def dropped(
    module: nn.Module, counters: dict[str, Counter | MapCounter], weights: dict[str, int]
) -> tuple[float, float]:
    """(model-wide sparsity, share of pairs dropped over all counted sites). weights: parameters of the block maps."""
    maps = [c for c in counters.values() if isinstance(c, MapCounter)]
    if maps:
        zeros = sum(c.zeros for c in maps) / max(1, sum(c.elements for c in maps))
        return zeros, zeros
    pairs = sum((c.sparse_tokens + c.dense_tokens) * c.kept.numel() for c in counters.values())
    left = sum(c.sparse_tokens * c.kept.numel() - int(c.kept.sum()) for c in counters.values())
    shares = {name: site.sparsity for name, site in sparsity.summarise(module, counters).items()}
    return sparsity.model_wide(dict.fromkeys(weights, 0.0) | shares, weights), left / pairs if pairs else 0.0


@dataclass(frozen=True)
class Crossing:
    """Where the kept share crosses the demand."""

    status: str
    point: Point | None  # the last that passed; None where unreachable


def crossing(at: Callable[[float], Point], ends: tuple[float, float], demand, resolution: float) -> Crossing:
    """Bisect a knob between its ends (least, most dropped). demand(point): whether it passes.

    resolution: of the measured sparsity, by both axes, where the search ends. Unreachable: the end that drops least does not pass;
    beyond the range: the last setting that the method takes still passes.
    """
    least, most = ends
    if not demand(at(least)):
        return Crossing(UNREACHABLE, None)
    if demand(at(most)):
        return Crossing(BEYOND, at(most))
    failing = [at(most)]

    def passes(value: float) -> bool:
        if not demand(at(value)):
            failing[0] = at(value)
            return False
        return True

    def close(passed: float, failed: float) -> bool:
        a, b = at(passed), at(failed)
        known = a.kept is not None and b.kept is not None
        near = known and max(abs(a.sparsity - b.sparsity), abs(a.channels - b.channels)) <= resolution
        return near or abs(failed - passed) <= FINEST * abs(most - least)

    point = at(furthest(passes, least, most, close))
    return Crossing(REACHED if failing[0].kept is not None else BEYOND, point)


def search(
    at: Callable[[float], Point], knob: tuple[str, float, float], metric: str, settings: CriticalSparsity
) -> dict[str, Any]:
    """The critical sparsity and its interval. at(value) measures one setting of the knob (name, least, most)."""
    start, known = time.perf_counter(), {}

    @functools.cache
    def measured(value: float) -> Point:
        known[value] = at(value)
        progress.begin(f"critical sparsity: {len(known)} settings of {knob[0]} tried")
        return known[value]

    def where(errors: float) -> Crossing:
        return crossing(measured, knob[1:], lambda p: p.passes(settings.share, errors), settings.resolution)

    centre = where(0.0)
    low, high = (where(sign * ERRORS) for sign in (-1, 1)) if any(p.stderr for p in known.values()) else (None, None)
    ordered = sorted(known.values(), key=lambda p: abs(p.value - knob[1]))
    verdicts = [p.passes(settings.share) for p in ordered]
    point = centre.point
    return {
        "metric": metric,
        "share": settings.share,
        "knob": f"method.{knob[0]}",
        "status": centre.status,
        **(asdict(point) if point else dict.fromkeys(Point.__dataclass_fields__)),
        "low": low.point.sparsity if low and low.point else None,
        "high": high.point.sparsity if high and high.status == REACHED and high.point else None,
        "sparsity_stderr": spread(low, high),
        "channels_stderr": spread(low, high, "channels"),
        "best_kept": max(p.kept for p in ordered if p.kept is not None),
        "monotone": verdicts == sorted(verdicts, reverse=True),
        "evaluations": len(known),
        "seconds": time.perf_counter() - start,
        "curve": [asdict(p) for p in ordered],
        "definition": "largest sparsity measured on dev at which the sparse model keeps `share` of the dense metric: "
        "accuracy sparse / dense, perplexity dense / sparse; low, high: 95 %, paired",
    }


def spread(low: Crossing | None, high: Crossing | None, name: str = "sparsity") -> float | None:
    """The standard error that the interval stands for; None where one of its ends is not known."""
    if low is None or high is None or low.point is None or high.status != REACHED:
        return None
    return max(0.0, getattr(high.point, name) - getattr(low.point, name)) / (2 * ERRORS)
