"""Critical sparsity over all runs: one table, one chart against the model's size.

Runs of several models stand in one figure here, so they never share an axis unless the demand is the same: metric, share,
test text by name, prompt policy.
"""

from __future__ import annotations

from typing import Any

import altair as alt

from sparsebench.records import terminal
from sparsebench.records.wording import scaled
from sparsebench.report import sizes
from sparsebench.report.rows import Row, flat
from sparsebench.report.sizes import size
from sparsebench.report.tables import DASH, Table, number
from sparsebench.report.vega import Spec

TEXT = (
    "The largest sparsity measured on dev at which a run's method keeps the demanded share of the dense metric, found by "
    "bisection of its knob, with an interval of 95 % from paired errors. Model-wide weighs each map by its parameters; "
    "channels pools what was dropped over the tensors that the method masks. On test: the share kept at that very setting."
)


def searched(rows: list[Row]) -> list[Row]:
    """Runs that hold a search, small models first."""
    return sorted((r for r in rows if r.critical), key=lambda r: (size(r), r.method, str(r.path)))


def demand(row: Row) -> str:
    """What must be equal before two critical sparsities stand on one axis, in words."""
    section, settings = row.critical, row.record["config"]
    metric = str(section["metric"]).replace("_", " ")
    policy = settings["method"].get("prompt", "all")
    return f"{section['share']:.0%} of {metric}, {settings['dataset']['name']}, prompt={policy}"


def curves(rows: list[Row]) -> dict[int, str]:
    """The name of each run's curve by the place of the run: its method, and the settings in which runs of it differ.

    The knob and what a sweep over it would set are left out, so that models of several sizes share a curve.
    """
    names = {}
    for method in {r.method for r in rows}:
        mine = [(i, r, flat(r.record["config"]["method"])) for i, r in enumerate(rows) if r.method == method]
        keys = {k for _, _, s in mine for k in s if len({repr(t.get(k)) for _, _, t in mine}) > 1}
        keys -= {r.critical["knob"].removeprefix("method.") for _, r, _ in mine} | {"prompt", "name"}
        for i, _, settings in mine:
            told = [v if isinstance(v, str) else f"{k}={v}" for k, v in settings.items() if k in keys and v is not None]
            names[i] = " ".join([method, *told])
    return names


def table(rows: list[Row]) -> Table | None:
    """One line for each run that searched."""
    mine = searched(rows)
    if not mine:
        return None
    names = curves(mine)
    head = ["method", "model", "parameters", "demand", "critical, model-wide", "channels", "knob", "kept on test",
            "settings tried"]  # fmt: skip
    lines = [line(row, names[i]) for i, row in enumerate(mine)]
    return Table(head, lines, {2, 4, 5, 7, 8}, set(), runs=mine)


def line(row: Row, name: str) -> list[str]:
    section = row.critical
    told = DASH if section["value"] is None else f"{section['knob']}={section['value']:.4g}"
    test = (section.get("test") or {}).get("kept")
    return [
        name, row.record["config"]["model"]["name"], scaled(size(row)), demand(row), terminal.critical(section),
        number(section["channels"], ".1%"), told, number(test, ".2%"), str(section["evaluations"]),
    ]  # fmt: skip


def chart(rows: list[Row]) -> dict[str, Spec]:
    """Critical sparsity against the number of parameters, one chart for each demand, published figures of the same tensors
    and share beside it; none where that makes a single model."""
    mine = searched(rows)
    names, charts = curves(mine), {}
    for words in dict.fromkeys(map(demand, mine)):
        here = [
            (r, names[i])
            for i, r in enumerate(mine)
            if demand(r) == words and r.critical["sparsity"] is not None and size(r)
        ]
        cells = [cell(row, name) for row, name in here]
        for method, share in {(row.method, row.critical["share"]) for row, _ in here}:
            targets = {row.record["config"]["method"].get("target") for row, _ in here if row.method == method}
            cells += sizes.published_critical(method, targets, share)
        y = alt.Y("value:Q", title="critical sparsity of the masked tensors", axis=alt.Axis(format="%"))
        spec = sizes.drawn(cells, y, f"Critical sparsity against model size: {words}", "accuracy of nine tasks")
        if spec:
            charts[f"critical-{len(charts)}"] = spec
    return charts


def cell(row: Row, name: str) -> dict[str, Any]:
    section = row.critical
    error = 1.96 * (section.get("channels_stderr") or 0.0)
    model = row.record["config"]["model"]["name"]
    return sizes.cell(name, name, model, size(row), "measured", section["channels"], error)
