"""From rows to the number that a test of a published claim is about: which runs belong together, and what they give.

claims.py says what a claim is; this file takes one and yields its pools of runs (`pools`) and measures its tests
(`measured`) on one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sparsebench.config.identity import digest
from sparsebench.records import archive
from sparsebench.report import quantities
from sparsebench.report.experiments import selected
from sparsebench.report.groups import Group, differing, protocol
from sparsebench.report.published import same
from sparsebench.report.quantities import Estimate, Quantity, linear, over_seeds, quality, read_curve
from sparsebench.report.rows import Row
from sparsebench.report.tables import busy

if TYPE_CHECKING:
    from sparsebench.report.claims import Claim

AXES = {"sparsity": "sparsity", "work": "scored_macs", "ffn_work": "ffn_macs"}  # name in a test -> field of a row
AXIS_WORDS = {"sparsity": "of measured sparsity", "work": "of the MACs", "ffn_work": "of the FFNs' MACs"}
EQUAL_WORDS = {"sparsity": "measured sparsity", "work": "MACs", "ffn_work": "MACs of the FFNs"}


# ---------------------------------------------------------------------------------------------------------------------
# Which runs belong together


def by_place(rows: list[Row], timed: bool) -> list[list[Row]]:
    """Rows of one model and machine together; for quality of one text and protocol, too.

    Costs could be compared across machines, but a model trained elsewhere is another model: all stays on one.
    """
    places: dict[str, list[Row]] = {}
    for row in rows:
        key = row.once(("place", timed), lambda row=row: digest([terms(row, timed), machine_of(row, timed)]))
        places.setdefault(key, []).append(row)
    return list(places.values())


def pools(claim: Claim, places: list[list[Row]]) -> Iterator[tuple[dict[str, list[Row]], dict[str, Any]]]:
    """(rows by side, settings that tell the pool apart) of every place that has all sides."""
    for here in places:
        sides = {name: selected(here, {f"config.{k}": v for k, v in side["where"].items()})
                 for name, side in claim.sides.items()}  # fmt: skip
        if all(sides.values()):
            yield from alike(claim, sides)


def alike(claim: Claim, sides: dict[str, list[Row]]) -> Iterator[tuple[dict[str, list[Row]], dict[str, Any]]]:
    """Pools of one place split by the settings in which the runs of a side differ without the claim naming them.

    A side that does not have a setting joins each of its values.
    """
    split: dict[str, dict[str, list[Row]]] = {}  # side -> settings (as text) -> rows
    values: dict[str, dict] = {}
    for name, rows in sides.items():
        side = claim.sides[name]
        hidden = {*side.get("vary", ()), *side.get("ignore", ()), *side["where"]}
        settings = [{k: v for k, v in r.settings.items() if k.startswith("method.") and k not in hidden}
                    for r in rows]  # fmt: skip
        keys = set(differing(settings)) | set(claim.equal) - hidden
        split[name] = {}
        for row, own in zip(rows, settings, strict=True):
            told = {k: own.get(k) for k in sorted(keys)}
            values[repr(told)] = told
            split[name].setdefault(repr(told), []).append(row)
    for choice in itertools.product(*split.values()):
        told: dict[str, Any] = {}
        if all(agrees(told, values[key]) for key in choice):
            yield {name: split[name][key] for name, key in zip(split, choice, strict=True)}, told


def agrees(told: dict, more: dict) -> bool:
    """Whether `more` contradicts nothing in `told`; it is taken in."""
    if any(k in told and not same(told[k], v) for k, v in more.items()):
        return False
    told.update(more)
    return True


def terms(row: Row, timed: bool) -> dict:
    """What must be equal before two runs are compared; models trained here by one recipe, one for each seed, are one."""
    model, stated = row.record["config"]["model"], protocol(row)
    if model.get("weights") == "scratch":
        stated["weights"] = digest([model.get("train"), model.get("architecture")])
    return {k: stated[k] for k in ("model", "weights", "num_layers")} if timed else stated


def machine_of(row: Row, timed: bool) -> str:
    """Where a row was made: of times everything that they depend on, else device and number format."""
    env = row.record.get("env") or {}
    return row.machine if timed else f"{archive.device(env)}, {(env.get('hardware') or {}).get('dtype')}"


def by_seed(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Rows of each seed; of runs with the very same settings the latest."""
    latest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda r: str(r.record.get("started_at"))):
        latest[row.record["config"].get("seed", 0), digest(row.record["config"]["method"])] = row
    seeds: dict[int, list[Row]] = {}
    for (seed, _), row in latest.items():
        seeds.setdefault(seed, []).append(row)
    return seeds


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
NOISY_SPREAD = 0.25  # (p90 - p10) / median, as in measure/clock.py, which needs torch


class Missing(ValueError):
    """A test that can't be made with these rows; the message says why."""


def figure(row: Row, measure: str, side: str = "sparse") -> Quantity | None:
    """The figure of one run that a test compares; `loss` and `perplexity` as logarithm."""
    if measure in ("loss", "perplexity", "accuracy"):
        return quality(row, side) if measure in ("loss", row.metric) else None
    if measure == "speedup":
        if noisy(row):
            raise Missing("the machine was too busy for its times to count")
        return quantities.speedup(row)
    if measure == "shape_bias":
        return quantities.shape_bias(row, side)
    return quantities.recorded(row, measure)


def noisy(row: Row) -> bool:
    """The record's own mark; older records have none, so their load and spread are looked at as the clock does now."""
    if row.noisy is not None:
        return row.noisy
    times = [[row.decode.get(f"{side}{cut}") for cut in ("", "_p10", "_p90")] for side in ("dense", "sparse")]
    wide = any(None not in each and each[2] - each[1] > NOISY_SPREAD * each[0] for each in times)
    return wide or busy(Group({}, [row])) is not None


def of_side(rows: list[Row], test: dict, x: float | None, side: str = "sparse") -> Quantity:
    """The figure of one side for one seed: of its run, or of its curve at `x`."""
    points = [(getattr(row, AXES[test.get("along", "sparsity")]), figure(row, test["measure"], side)) for row in rows]
    points = [(place, q) for place, q in points if q is not None]
    if not points:
        raise Missing(f"no run measured {test['measure']}")
    if x is None:
        return points[-1][1]  # of runs that differ in what the side calls equal, the latest
    points = [(place, q) for place, q in points if place is not None]
    read = read_curve(points, x)
    if read is None:
        places = sorted(p for p, _ in points)
        raise Missing(f"{method(rows[0])} was run from {places[0]:.1%} to {places[-1]:.1%} {AXIS_WORDS[test['along']]}, "
                      f"not at {x:.1%}" if places else f"{method(rows[0])}: nothing measured along {test['along']}")  # fmt: skip
    return read


def method(row: Row) -> str:
    return str(row.record["config"]["method"]["name"])


def compared(a: Quantity, b: Quantity | None, measure: str, metric: str | None) -> Quantity:
    """What is held against the bound: `a` itself, or `a` beside `b` as the measure says."""
    if measure == "perplexity":
        a, b = (q and linear([q], [ppl := math.exp(min(q.value, 700.0))], ppl) for q in (a, b))
    if b is None:
        return a
    if measure == "loss" and metric == "perplexity":
        ratio = math.exp(min(a.value - b.value, 700.0))
        return linear([a, b], [ratio, -ratio], ratio - 1)
    if measure == "loss":
        return linear([a, b], [-1 / b.value, a.value / b.value**2], 1 - a.value / b.value)
    return linear([a, b], [1, -1], a.value - b.value)


def measured(claim: Claim, test: dict, sides: dict[str, list[Row]]) -> Estimate:
    """The estimate of one test over the seeds that both sides have. Raises Missing."""
    first, than = by_seed(sides[test["of"]]), test.get("than")
    second = first if than == "dense" else by_seed(sides[than]) if than else {}
    seeds = [seed for seed in first if not than or seed in second]
    if not seeds:
        raise Missing("the sides have no seed in common")
    metric = sides[test["of"]][0].metric
    results: dict[int, Quantity] = {}
    for seed in seeds:
        x = place(first[seed], test)
        a = of_side(first[seed], test, test.get("at"))
        b = None
        if than == "dense":
            b = of_side(first[seed], test, test.get("at"), "dense")
        elif than:  # read where `of` lies, if it is a curve
            b = of_side(second[seed], test, x if claim.sides[than].get("vary") else None)
        results[seed] = compared(a, b, test["measure"], metric)
    return over_seeds(results)


def place(rows: list[Row], test: dict) -> float | None:
    """Where curves are read: the place the test names, else that of the run of `of`; None without an axis."""
    if "along" not in test or "at" in test:
        return test.get("at")
    value = getattr(rows[-1], AXES[test["along"]])
    if value is None:
        raise Missing(f"{method(rows[-1])} did not measure {test['along']}")
    return value
