"""Numbers taken from rows with what is known of their errors: differences are paired, curves are read between their rows.

An error has two sources. The test text (or its images) is a sample: what each of its parts adds to a figure is kept in
records, so a difference of two models is taken part by part (measure/uncertainty.py). What is drawn by the seed
(calibration text, training) shows as the spread over runs that differ in the seed alone. Both are independent and add
up in squares. Where neither is known, no error is made up: the figure has none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sparsebench.measure import uncertainty
from sparsebench.measure.uncertainty import Pieces
from sparsebench.report.experiments import at
from sparsebench.report.interpolation import monotone
from sparsebench.report.rows import Row

NEAR = 0.005  # a curve of too few rows may be read at a row this close on its axis


@dataclass(frozen=True)
class Quantity:
    """A figure of one run, or a linear combination of such figures.

    parts, influence: the parts of the test set, and what each adds to the figure's error [P]; None where not kept.
    error: standard error from elsewhere (clock, counted answers); 0 = counted exactly, None = not known.
    """

    value: float
    parts: Pieces | None = None
    influence: np.ndarray | None = None
    error: float | None = None

    @property
    def variance(self) -> float | None:
        """Known part of the variance, seeds left out; None where nothing is known."""
        text = self.parts.stderr(self.influence) if self.parts is not None else None
        known = [each for each in (text, self.error) if each is not None]
        return sum(each**2 for each in known) if known else None


@dataclass(frozen=True)
class Estimate:
    """What a test measured: a mean over seeds, its standard error (None = not known), and what the error holds."""

    value: float
    stderr: float | None
    holds: str
    freedom: float = math.inf  # degrees of freedom of the error: few seeds say little about it

    def needed(self, errors: float) -> float:
        """How many of these standard errors are as sure as `errors` of a normal distribution's (Student's t)."""
        return errors if math.isinf(self.freedom) else float(stats.t.ppf(stats.norm.cdf(errors), self.freedom))


def linear(parts: Sequence[Quantity], weights: Sequence[float], value: float) -> Quantity:
    """The figure `value` whose change is sum of weights x changes of `parts` (first order)."""
    influence = None
    same = parts[0].parts
    if same is not None and all(q.parts is not None and alike(q.parts, same) for q in parts):
        influence = sum(w * q.influence for q, w in zip(parts, weights, strict=True))
    errors = [q.error for q in parts]
    error = math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) if None not in errors else None
    return Quantity(value, same if influence is not None else None, influence, error)


def alike(a: Pieces, b: Pieces) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("window", "document", "tokens"))


def over_seeds(quantities: dict[int, Quantity]) -> Estimate:
    """The mean over seeds. Its error holds the text's (or the clock's) and the seeds', as far as either is known.

    Degrees of freedom by Welch and Satterthwaite: one less than there are seeds, or windows or documents.
    """
    all_of, n = list(quantities.values()), len(quantities)
    mean = linear(all_of, [1 / n] * n, statistics.fmean(q.value for q in all_of))
    within = mean.variance
    spread = statistics.variance(q.value for q in all_of) / n if n > 1 else None
    if within is None and spread is None:
        return Estimate(mean.value, None, "one run, parts of the test set not kept")
    total = (within or 0.0) + (spread or 0.0)
    lost = (spread or 0.0) ** 2 / max(n - 1, 1)
    if within and mean.parts is not None:
        clusters = [len(np.unique(each)) for each in (mean.parts.window, mean.parts.document)]
        lost += within**2 / (min(c for c in clusters if c > 1) - 1)
    freedom = total**2 / lost if lost else math.inf
    if not total:
        return Estimate(mean.value, 0.0, "a count")
    holds = [f"{n} seeds"] if n > 1 else []
    if mean.influence is not None:
        holds.append(f"{len(np.unique(mean.parts.window)):,} windows or examples")
    elif within != 0:
        holds.append("not the test set" if within is None else "samples of the run")
    return Estimate(mean.value, math.sqrt(total), ", ".join(holds), freedom)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of one run


def quality(row: Row, side: str = "sparse") -> Quantity | None:
    """Perplexity as NLL in nats per token, so that differences are logarithms of ratios; accuracy as it is, in [0, 1]."""
    metric = (row.record.get("quality") or {}).get(row.metric or "") or {}
    if metric.get(side) is None or row.record["config"]["model"].get("weights") == "random":
        return None
    kept = metric.get("losses") or {}
    if row.metric == "perplexity":
        if side not in kept:
            return Quantity(math.log(metric[side]))
        parts = uncertainty.pieces(kept, side)
        return Quantity(parts.mean, parts, parts.influence)
    if f"{side}_right" not in kept:
        return Quantity(metric[side])
    right = uncertainty.unpacked(kept[f"{side}_right"], "bits")[: metric["protocol"]["examples"]].astype(float)
    none = np.zeros(len(right), int)
    parts = Pieces(np.arange(len(right)), none, none + 1, none)
    return Quantity(float(right.mean()), parts, (right - right.mean()) / len(right))


def speedup(row: Row) -> Quantity | None:
    """Of decode (or the forward pass), by a kernel that skips; its error from the quantiles of the timed rounds."""
    value = row.decode.get("speedup")
    if value is None:
        return None
    section = row.record["latency"]
    times = section.get("decode") or next((s for s in section.values() if isinstance(s, dict) and "dense" in s), {})
    samples = [times.get(side, {}).get("samples_ms") for side in ("dense", "sparse")]
    if not all(samples) or len(samples[0]) != len(samples[1]):
        return Quantity(value)
    return Quantity(value, error=median_error([d / s for d, s in zip(*samples, strict=True)]))


def median_error(values: Sequence[float]) -> float:
    """Standard error of a median: half the way between the quantiles one deviation (of the rank) below and above it."""
    low, high = np.quantile(values, 0.5 + np.array([-0.5, 0.5]) / math.sqrt(len(values)))
    return float(high - low) / 2


def shape_bias(row: Row, side: str = "sparse") -> Quantity | None:
    """Shape answers over shape and texture answers, with its binomial error."""
    counts = ((row.record.get("extra") or {}).get("shape_bias") or {}).get(side) or {}
    bias = counts.get("shape_bias")
    if bias is None:
        return None
    return Quantity(bias, error=math.sqrt(bias * (1 - bias) / (counts["shape_answers"] + counts["texture_answers"])))


def recorded(row: Row, path: str) -> Quantity | None:
    """The number at a dotted path of the record, or `part / whole` or `one - other` of two.

    Costs are counts; other figures have the error that stands beside them as <name>_stderr.
    """
    first, sign, second = path.partition(" / ") if " / " in path else path.partition(" - ")
    values = [at(row.record, each) for each in (first, second) if each]
    if not all(isinstance(v, (int, float)) for v in values) or (sign == " / " and not values[1]):
        return None
    value = values[0] if not sign else values[0] / values[1] if sign == " / " else values[0] - values[1]
    errors = [
        0.0 if each.startswith(("macs.", "bytes.")) else at(row.record, f"{each}_stderr")
        for each in (first, second)
        if each
    ]
    if sign == " / " or not all(isinstance(e, (int, float)) for e in errors):
        return Quantity(float(value), error=0.0 if path.startswith(("macs.", "bytes.")) else None)
    return Quantity(float(value), error=math.hypot(*errors))


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def read_curve(points: Sequence[tuple[float, Quantity]], x: float) -> Quantity | None:
    """The figure of a curve at `x`: monotone between its rows (PCHIP), never outside them; None where it can't be read.

    points: (place on the axis, figure) of runs of one seed. A row within NEAR of `x` stands for it where rows on both
    sides are missing.
    """
    by_place = dict(sorted(points, key=lambda p: p[0]))
    places, quantities = list(by_place), list(by_place.values())
    if len(places) < 2 or not places[0] <= x <= places[-1]:
        near = min(by_place, key=lambda p: abs(p - x), default=math.inf)
        return by_place[near] if abs(near - x) <= NEAR else None
    value, weights = monotone(places, [q.value for q in quantities], x)
    return linear(quantities, weights, value)
