"""Methods compared at equal terms: at the same measured sparsity, the same work, the same bytes, the same time.

Settings that ask for the same sparsity measure two to four points apart, so rows can't be compared as they stand. Each
curve (a method with its choices, see groups.telling_apart) is interpolated to common terms by a monotone cubic (PCHIP),
inside its measured range only; perplexity on the scale of its logarithm. A curve that can't be had there says why.

The uncertainty is that of the test set and of the seeds. An interpolated figure is a sum of its knots' figures, so what
each piece of text adds to its error is the same sum of what it adds to theirs, and the difference of two curves is
taken piece by piece (paired; measure/uncertainty.py). The spread over seeds at the knots is added to it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sparsebench.measure import uncertainty
from sparsebench.measure.uncertainty import Pieces
from sparsebench.records.wording import uncertain
from sparsebench.report.groups import Group, repeats
from sparsebench.report.interpolation import monotone
from sparsebench.report.rows import Row

HIT = 1e-3  # a knot so near to the terms asked for is taken as measured there [choice]
BEYOND = 1e100  # a figure whose square can't be had is none
SURE = 2.0  # standard errors that a difference must have to be called one [choice]


@dataclass(frozen=True)
class Axis:
    """One kind of terms; `value` gives a row's place on it as a share, or None where it was not measured."""

    name: str
    words: str  # "at 50 % <words>"
    targets: tuple[float, ...]
    value: Callable[[Row], float | None]
    absent: str  # why a row has no place on it
    machine: str = ""  # of times


SPARSITY = Axis(
    "sparsity", "measured sparsity", (0.25, 0.4, 0.5, 0.65), lambda r: r.sparsity, "no sparsity was measured"
)
WORK = Axis("MACs", "of the MACs", (0.75, 0.6, 0.5, 0.35), lambda r: r.scored_macs, "no MACs were counted")
TRAFFIC = Axis("bytes", "of the bytes", (0.75, 0.6, 0.5, 0.35), lambda r: r.scored_bytes, "no bytes were counted")


def axes(rows: list[Row]) -> list[Axis]:
    """The terms on which rows can be compared: sparsity, work, bytes, and the dense step's time on each machine."""
    machines = dict.fromkeys(r.machine for r in rows if r.decode.get("speedup"))
    return [SPARSITY, WORK, TRAFFIC, *(time_on(machine) for machine in machines)]


def time_on(machine: str) -> Axis:
    def value(row: Row) -> float | None:
        speedup = row.decode.get("speedup") if row.machine == machine and not row.noisy else None
        return 1 / speedup if speedup else None

    absent = f"no quiet time with a kernel that skips on {machine}"
    return Axis("time", "of the dense time", (0.9, 0.75, 0.6, 0.5), value, absent, machine)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Evidence:
    """What each piece of the test set adds to the error of a figure: influence [P] on `pieces`."""

    pieces: Pieces
    influence: np.ndarray
    test: str  # equal where two figures rest on the same pieces


@dataclass
class Knot:
    """One setting: its place, its quality on the curve's scale (mean over seeds), and how sure it is."""

    x: float
    y: float
    evidence: Evidence | None
    seeds: int
    seed_variance: float  # of the mean; 0 with one seed


@dataclass
class Curve:
    """The settings of one series, by place."""

    series: str
    knots: list[Knot]
    logarithmic: bool
    problem: str = ""  # why nothing can be read off it

    @property
    def range(self) -> tuple[float, float]:
        return self.knots[0].x, self.knots[-1].x


@dataclass
class Point:
    """A curve's quality at the terms asked for, or why there is none."""

    series: str
    problem: str = ""
    value: float = math.nan
    linear: float = math.nan  # by straight lines between the knots: tells what hangs on the interpolation
    evidence: Evidence | None = None  # of `value` itself
    seed_variance: float = 0.0
    seeds: int = 1
    between: tuple[float, float] = (math.nan, math.nan)  # the measured places around

    @property
    def stderr(self) -> float | None:
        """Of the value by itself; None where the records hold neither losses nor seeds."""
        return error(self.evidence, self.seed_variance, self.seeds)


def error(evidence: Evidence | None, seed_variance: float, seeds: int = 1) -> float | None:
    """Standard error of a figure over test pieces and seeds; over seeds alone where no losses were kept."""
    text = None if evidence is None else evidence.pieces.stderr(evidence.influence)
    if text is None:
        return math.sqrt(seed_variance) if seeds > 1 else None
    return math.sqrt(text**2 + seed_variance)


def evidence(row: Row, side: str = "sparse") -> Evidence | None:
    """`unpacked_evidence`, unpacked once."""
    return row.once(("evidence", side), lambda: unpacked_evidence(row, side))


def unpacked_evidence(row: Row, side: str) -> Evidence | None:
    """From the losses that a record keeps, on the scale of NLL or of the share of right answers; None without them.

    Losses that can't be read, or that don't fit each other, count as none.
    """
    metric = row.record["quality"][row.metric]
    losses = metric.get("losses")
    if not losses:
        return None
    try:
        if row.metric == "perplexity":
            pieces = uncertainty.pieces(losses, side)
            return Evidence(pieces, pieces.influence, losses["window"] + losses["document"] + losses["tokens"])
        examples = metric["protocol"]["examples"]
        right = uncertainty.unpacked(losses[f"{side}_right"], "bits")[:examples]
        pieces = Pieces.of(right[:, None], np.arange(examples)[:, None])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return Evidence(pieces, pieces.influence, f"{examples} examples")


def summed(weights: list[float], parts: list[Evidence | None]) -> Evidence | None:
    """The evidence of a weighted sum; None where the parts don't rest on the same pieces, or one has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.test for part in known}) != 1:
        return None
    influence = sum(w * part.influence for w, part in zip(weights, known, strict=True))
    return Evidence(known[0].pieces, np.asarray(influence), known[0].test)


def dense_point(rows: list[Row]) -> Point | None:
    """The dense model of these rows; of models trained apart the mean."""
    known = {row.record["config"].get("seed"): row for row in rows if row.dense is not None}  # one of each model
    if not known:
        return None
    values = [row.dense for row in known.values() if row.dense is not None]
    scales = [v if row.metric == "perplexity" else 1.0 for v, row in zip(values, known.values(), strict=True)]
    mean = summed([s / len(values) for s in scales], [evidence(row, "dense") for row in known.values()])
    return Point("dense", value=statistics.fmean(values), evidence=mean)


def knot(same: list[Row], axis: Axis, logarithmic: bool) -> Knot:
    """One setting over its seeds."""
    values = [math.log(r.sparse) if logarithmic else r.sparse for r in same]  # type: ignore[arg-type]
    variance = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    mean = summed([1 / len(same)] * len(same), [evidence(r) for r in same])
    x = statistics.fmean(v for r in same if (v := axis.value(r)) is not None)
    return Knot(x, statistics.fmean(values), mean, len(same), variance)


def curve(series: str, rows: list[Row], axis: Axis) -> Curve:
    """The curve of one series on one axis."""
    logarithmic = rows[0].metric == "perplexity"
    if rows[0].record["config"]["model"].get("weights") == "random":
        return Curve(series, [], logarithmic, "random weights have no quality")
    scored = [r for r in rows if r.sparse is not None and abs(r.sparse) < BEYOND and (r.sparse > 0 or not logarithmic)]
    placed = [r for r in scored if axis.value(r) is not None]
    if not placed:
        return Curve(series, [], logarithmic, axis.absent if scored else "no quality was scored")
    knots = sorted((knot(same, axis, logarithmic) for same in repeats(placed, everywhere=True)), key=lambda k: k.x)
    twice = [b.x for a, b in itertools.pairwise(knots) if b.x - a.x < HIT and not math.isclose(a.y, b.y)]
    problem = f"two settings at {twice[0]:.1%} {axis.words}: not one curve" if twice else ""
    distinct = [k for i, k in enumerate(knots) if i == 0 or k.x - knots[i - 1].x >= HIT]
    return Curve(series, distinct, logarithmic, problem)


def curves(group: Group, axis: Axis) -> list[Curve]:
    """One curve for each series of the group; the dense model is none."""
    rows = [r for r in group.rows if r.method != "dense" and r.metric]
    return [curve(s, [r for r in rows if r.series == s], axis) for s in dict.fromkeys(r.series for r in rows)]


def at(curve: Curve, axis: Axis, target: float) -> Point:
    """A curve's quality at `target`, never outside what was measured."""
    if curve.problem or not curve.knots:
        return Point(curve.series, curve.problem)
    hit = next((k for k in curve.knots if abs(k.x - target) <= HIT), None)
    low, high = curve.range
    if hit is not None:
        knots, weights, y, linear, between = [hit], [1.0], hit.y, hit.y, (hit.x, hit.x)
    elif len(curve.knots) == 1:
        return Point(curve.series, f"one setting, at {low:.1%} {axis.words}")
    elif not low < target < high:
        return Point(curve.series, f"measured from {low:.1%} to {high:.1%} {axis.words}")
    else:
        knots = curve.knots
        xs, ys = np.array([k.x for k in knots]), np.array([k.y for k in knots])
        (y, weights), linear = monotone(xs, ys, target), float(np.interp(target, xs, ys))
        place = int(np.searchsorted(xs, target))
        between = float(xs[place - 1]), float(xs[place])
    scale = math.exp(y) if curve.logarithmic else 1.0  # d value / d y
    told = summed([scale * w for w in weights], [k.evidence for k in knots])
    variance = scale**2 * sum(w**2 * k.seed_variance for w, k in zip(weights, knots, strict=True))
    value, straight = (math.exp(y), math.exp(linear)) if curve.logarithmic else (y, linear)
    return Point(curve.series, "", value, straight, told, variance, min(k.seeds for k in knots), between)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def apart(first: float | None, second: float | None) -> float | None:
    """Standard error of the difference of two figures that can't be paired."""
    return None if first is None or second is None else math.hypot(first, second)


@dataclass
class Comparison:
    """`worse` against `better` at the same terms; a difference > 0 in the metric's own units."""

    axis: Axis
    target: float
    better: Point
    worse: Point
    where: str  # model and data
    metric: str
    difference: float = field(init=False)
    stderr: float | None = field(init=False)
    paired: bool = field(init=False)

    def __post_init__(self) -> None:
        a, b = self.better, self.worse
        self.difference = abs(b.value - a.value)
        joint = summed([1.0, -1.0], [b.evidence, a.evidence])
        self.paired = joint is not None
        self.stderr = error(joint, a.seed_variance + b.seed_variance) if joint else apart(a.stderr, b.stderr)

    @property
    def verdict(self) -> str:
        """Whether the difference is one."""
        if self.stderr is None:
            return "unknown: the records hold neither losses nor seeds to tell by"
        if self.stderr == 0 and self.difference:
            return "unknown: no losses were kept, and seeds change nothing"
        if self.difference < SURE * self.stderr:
            return "not told apart"
        turned = (self.worse.linear - self.better.linear) * (self.worse.value - self.better.value) < 0
        return "hangs on the interpolation" if turned else "a real difference"

    @property
    def rests_on(self) -> str:
        """What the standard error is made of."""
        seeds = min(self.better.seeds, self.worse.seeds)
        parts = [f"{seeds} seeds" if seeds > 1 else "one seed"]
        if self.paired and self.better.evidence is not None:
            count = self.better.evidence.pieces.counts()
            parts = [
                f"paired over {count['windows']} {'windows' if self.metric == 'perplexity' else 'examples'}",
                *parts,
            ]
        elif self.stderr is not None:
            kept = self.better.evidence is not None and self.worse.evidence is not None
            parts = ["not paired" if kept else "seeds alone, since no losses were kept", *parts]
        return ", ".join(parts)

    @property
    def amount(self) -> str:
        """`0.8 ± 0.1 perplexity`; accuracy in points."""
        if self.metric == "accuracy":
            return (
                uncertain(100 * self.difference, None if self.stderr is None else 100 * self.stderr)
                + " points of accuracy"
            )
        return f"{uncertain(self.difference, self.stderr)} {self.metric}"

    @property
    def sentence(self) -> str:
        """The line that can be quoted."""
        terms = f"at {self.target:.0%} {self.axis.words}".replace("%", " %")
        on = f" on {self.where}" + (f", {self.axis.machine}" if self.axis.machine else "")
        if self.verdict == "not told apart":
            return f"{terms} {self.worse.series} and {self.better.series} are not told apart ({self.amount}){on}"
        return f"{terms} {self.worse.series} is worse than {self.better.series} by {self.amount}{on}"


@dataclass
class Standing:
    """All curves of a group at the same terms: those that can be compared, best first, and the others with their reasons."""

    axis: Axis
    target: float
    metric: str
    ranked: list[Point]
    refused: list[Point]
    comparisons: list[Comparison]  # each of the others against the best
    dense: Point | None = None

    def above_dense(self, point: Point) -> tuple[float, float | None] | None:
        """(difference from the dense model, its standard error, paired)."""
        if self.dense is None:
            return None
        joint = summed([1.0, -1.0], [point.evidence, self.dense.evidence])
        return point.value - self.dense.value, error(joint, point.seed_variance, point.seeds)


def standing(group: Group, axis: Axis, target: float, drawn: list[Curve] | None = None) -> Standing:
    points = [at(each, axis, target) for each in drawn or curves(group, axis)]
    sign = -1 if group.rows[0].higher_is_better else 1
    ranked = sorted((p for p in points if not p.problem), key=lambda p: sign * p.value)
    where = f"{group.protocol['model']}, {group.protocol['dataset']}"
    against = [Comparison(axis, target, ranked[0], p, where, group.protocol["metric"]) for p in ranked[1:]]
    refused = [p for p in points if p.problem]
    return Standing(axis, target, group.protocol["metric"], ranked, refused, against, dense_point(group.rows))


def standings(group: Group) -> list[Standing]:
    """Every term of every axis on which at least one curve of the group can be read."""
    every = []
    for axis in axes(group.rows):
        drawn = curves(group, axis)
        every += [standing(group, axis, target, drawn) for target in axis.targets]
    return [s for s in every if s.ranked]


def half_the_work(group: Group) -> Standing | None:
    """Half of the MACs or, where fewer than two curves were measured there, the nearest term with most of them."""
    drawn = curves(group, WORK)
    every = [standing(group, WORK, target, drawn) for target in WORK.targets]
    chosen = max(every, key=lambda s: (min(len(s.ranked), 2), -abs(s.target - 0.5), len(s.ranked)))
    return chosen if chosen.ranked else None
