"""Quality against N:M: one line for each score and correction, from 2:4 to groups of the whole token, and the dense model."""

from __future__ import annotations

import statistics

import altair as alt

from sparsebench.report.groups import Group, repeats
from sparsebench.report.rows import Row
from sparsebench.report.vega import Spec, lines_over, styles

WHOLE = "unstructured"
CURVE = ("score", "correction", "correction_from", "skip", "coverage", "phase")  # settings that tell lines apart


def pattern(row: Row) -> tuple[int, str] | None:
    """(M, name) of a row's groups; M of the whole token is above all others. None for other methods."""
    settings = row.record["config"]["method"]
    if row.method != "nm" or row.sparse is None:
        return None
    n, m = settings.get("n"), settings.get("m")
    if m is None:
        return (1 << 30, WHOLE if n is None else f"{n} of the token")
    return (m, f"{m // 2 if n is None else n}:{m}")


def curve(row: Row, told: set[str]) -> str:
    """A line's name: its score, and what else tells it from others."""
    settings = row.record["config"]["method"]
    return ", ".join(
        str(settings[key]) if key != "coverage" else f"coverage {settings[key]:g}" for key in CURVE if key in told
    )


def ladder(group: Group) -> Spec | None:
    """The chart; None where fewer than two patterns were run. A point is the mean over seeds, with one standard deviation or
    the paired standard error of a single seed."""
    rows = [row for row in group.rows if pattern(row)]
    if len({pattern(row) for row in rows}) < 2:
        return None
    settings = [{key: row.record["config"]["method"].get(key) for key in CURVE} for row in rows]
    told = {key for key in CURVE if len({str(each[key]) for each in settings}) > 1} | {"score"}
    cells = []
    for same in repeats(rows):
        values, (place, name) = [row.sparse for row in same], pattern(same[0])
        mean = statistics.fmean(values)
        error = statistics.stdev(values) if len(values) > 1 else same[0].difference_stderr or 0.0
        line = curve(same[0], told)
        cells.append({"pattern": name, "place": place, "series": line, "run": line, "quality": mean,
                      "low": mean - error, "high": mean + error})  # fmt: skip
    cells.sort(key=lambda cell: (cell["place"], cell["series"]))
    order = list(dict.fromkeys(cell["pattern"] for cell in cells))
    dense = [row.dense for row in rows if row.dense is not None]
    metric = f"{group.protocol['metric']}" + (f", dense {statistics.median(dense):.4g}" if dense else "")
    x = alt.X("pattern:N", sort=order, title="kept of each group of consecutive inputs", axis=alt.Axis(labelAngle=0))
    y = alt.Y("quality:Q", title=metric, scale=alt.Scale(zero=False))
    shown = [{key: value for key, value in cell.items() if key != "place"} for cell in cells]
    return lines_over(shown, x, y, "Quality against N:M", styles([cell["series"] for cell in shown]))
