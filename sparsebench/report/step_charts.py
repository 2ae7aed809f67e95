"""Charts of a decode step's time on one machine: by engine, by role, over sparsity and batch, against what its bytes allow.

Times that the clock called noisy are drawn nowhere.
"""

from __future__ import annotations

import itertools

import altair as alt

from sparsebench.report.rows import Row
from sparsebench.report.vega import Spec, finished, lines_over, palette, quoted, tooltip

MOST_MAPS, MOST_LINES, MOST_BARS = 12, 24, 8  # heat maps, curves and pairs of bars of one chart: more can't be read
NOBODY = "not attributed"
ENGINE_COLOURS = {"dense": ("#9aa4b1", "#5f6b7a", "#c9d0d8"), "sparse": ("#9ecae1", "#1f77b4", "#08519c")}
ROLE_COLOURS = (
    "#9ecae1",
    "#8c6bb1",
    "#1f77b4",
    "#d62728",
    "#17becf",
    "#2ca02c",
    "#bcbd22",
    "#ff7f0e",
    "#e377c2",
    "#8c564b",
)


def of_machine(rows: list[Row], drawn: list[dict], look: dict, machine: str) -> dict[str, Spec | None]:
    """All of them, by name. drawn: the group's points (charts.points)."""
    return {
        "roofline": roofline(look, drawn, machine), "engines": engines(rows, machine),
        "by-kernel": where_time_goes(rows, machine), "break-even": break_even(rows, look, machine),
        "batches": batches(rows, look, machine), "batch-gain": batch_gain(rows, look, machine),
    }  # fmt: skip


def nearest_half(rows: list[Row]) -> list[tuple[str, Row]]:
    """(curve, its setting nearest to half the sparsity) of the rows that measured any."""
    measured = [r for r in rows if r.sparsity is not None]
    return sorted({r.series: r for r in sorted(measured, key=lambda r: -abs(r.sparsity - 0.5))}.items())  # type: ignore[operator]


def quiet(rows: list[Row], machine: str) -> list[Row]:
    """The rows of one machine whose times can be trusted."""
    return [r for r in rows if r.machine == machine and not r.noisy]


def roofline(look: dict[str, tuple[str, str]], drawn: list[dict], machine: str) -> Spec | None:
    """Measured speed-up over the speed-up that the bytes promise, on one machine; on the diagonal nothing is lost."""
    drawn = [p for p in drawn if "roofline" in p and p["machine"] == machine]
    if not drawn:
        return None
    top = 1.08 * max(max(p["roofline"], p["speedup"]) for p in drawn)
    low = min(0.95, *(0.95 * p["speedup"] for p in drawn))
    diagonal = alt.Chart(alt.InlineData([{"x": v, "y": v} for v in (low, top)]))
    even = alt.Chart(alt.InlineData([{"y": 1}])).mark_rule(color="#bb3333", strokeDash=[3, 3]).encode(y="y:Q")
    colours = palette(look, list(dict.fromkeys(p["series"] for p in drawn)))
    base = alt.Chart(alt.NamedData("points")).transform_filter(
        f"isValid(datum.roofline) && datum.machine == {quoted(machine)}"
    )
    x = alt.X("roofline:Q", title="dense bytes / sparse bytes of a step", scale=alt.Scale(zero=False))
    y = alt.Y("speedup:Q", title="measured speed-up", scale=alt.Scale(zero=False))
    layers = [
        diagonal.mark_line(color="#9aa4b1").encode(x=alt.X("x:Q"), y="y:Q"), even,
        base.mark_rule().encode(x, y="speedup_low:Q", y2="speedup_high:Q", color=colours["color"]),
        base.mark_point(size=55, filled=True, opacity=1).encode(x, y, **colours, href="href:N", tooltip=tooltip("quality")),
    ]  # fmt: skip
    return finished(alt.layer(*layers), f"Speed-up against the bytes roofline, {machine.partition(',')[0]}")


def break_even(rows: list[Row], look: dict, machine: str) -> Spec | None:
    """Time of a sparse step over its sparsity, at the operating point and with lower thresholds; dense beside it."""
    sections = [
        (r, ((r.record.get("latency") or {}).get("decode") or {}).get("break_even") or {}) for r in quiet(rows, machine)
    ]
    cells = [
        {"series": r.series, "run": r.label, "sparsity": p["sparsity"], "times dense": p["median_ms"] / r.decode["dense"],
         "low": p["p10_ms"] / r.decode["dense"], "high": p["p90_ms"] / r.decode["dense"]}
        for r, section in sections[:MOST_LINES] for p in section.get("points") or []
    ]  # fmt: skip
    x = alt.X("sparsity:Q", title="sparsity of the step", axis=alt.Axis(format="%"))
    y = alt.Y("times dense:Q", title="time / dense time", scale=alt.Scale(zero=False))
    spec = lines_over(cells, x, y, f"Break-even: where a sparse step gets faster, {machine.partition(',')[0]}", look)
    return spec and with_even(spec)


def engines(rows: list[Row], machine: str) -> Spec | None:
    """What a step takes in every engine that was timed, dense and sparse, for each curve's setting nearest to half."""
    cells = [
        {"series": series, "engine": name, "ms": t["median_ms"], "low": t.get("p10_ms"), "high": t.get("p90_ms")}
        for series, row in nearest_half(quiet(rows, machine))[:MOST_MAPS]
        for name, t in (((row.record.get("latency") or {}).get("decode") or {}).get("engines") or {}).items()
    ]  # fmt: skip
    if not cells:
        return None
    base = alt.Chart(alt.InlineData(cells)).encode(
        y=alt.Y("series:N", title=None, axis=alt.Axis(labelLimit=230)), yOffset="engine:N"
    )
    names = sorted({c["engine"] for c in cells})
    shades = {side: itertools.cycle(colours) for side, colours in ENGINE_COLOURS.items()}
    colours = [next(shades.get(name.partition("/")[0], shades["sparse"])) for name in names]
    colour = alt.Color("engine:N", scale=alt.Scale(domain=names, range=colours))
    tips = [alt.Tooltip("series:N"), alt.Tooltip("engine:N"), alt.Tooltip("ms:Q", format=".3f")]
    bars = base.mark_bar().encode(x=alt.X("ms:Q", title="ms of a step, median"), color=colour, tooltip=tips)
    spread = base.mark_rule().encode(x="low:Q", x2="high:Q")
    title = f"Time of a step by engine, {machine.partition(',')[0]}"
    return finished(alt.layer(bars, spread), title, height=max(60, 14 * len(cells)))


def batches(rows: list[Row], look: dict, machine: str) -> Spec | None:
    """Time per example (or token) over the batch size, dense and sparse; decode's rows where no kernel skipped are marked."""
    cells = [
        {"series": r.series, "run": f"{r.label} {side}", "model": side, "batch": t["batch"], "ms": t[side] / t["batch"],
         "simulated": "yes" if t.get("simulated") else "no"}
        for r in [r for r in rows if r.machine == machine][:MOST_LINES] for t in r.batches
        for side in ("dense", "sparse") if t[side] is not None
    ]  # fmt: skip
    x = alt.X("batch:Q", title="batch", scale=alt.Scale(type="log", base=2))
    y = alt.Y("ms:Q", title="ms per example or token", scale=alt.Scale(type="log"))
    return lines_over(cells, x, y, f"Time per example over the batch, {machine.partition(',')[0]}", look, dash="model")


def batch_gain(rows: list[Row], look: dict, machine: str) -> Spec | None:
    """Speed-up over the batch of decode, and where it ends: the more rows, the more channels one of them keeps."""
    cells = [
        {"series": r.series, "run": r.label, "batch": t["batch"], "speed-up": t["dense"] / t["sparse"], "kernel": t["kernel"],
         "kept by any row": t.get("union_density")}
        for r in [r for r in quiet(rows, machine) if "batches" in (r.record.get("latency") or {})][:MOST_LINES]
        for t in r.batches if t["dense"] and t["sparse"] and not t.get("simulated")
    ]  # fmt: skip
    x = alt.X("batch:Q", title="batch", scale=alt.Scale(type="log", base=2))
    y = alt.Y("speed-up:Q", title="dense time / sparse time", scale=alt.Scale(zero=False))
    spec = lines_over(cells, x, y, f"Up to which batch skipping pays, {machine.partition(',')[0]}", look)
    return spec and with_even(spec)


def with_even(spec: Spec) -> Spec:
    """A red line at 1: no gain, no loss."""
    spec["layer"].append({"data": {"values": [{"y": 1}]}, "mark": {"type": "rule", "color": "#bb3333", "strokeDash": [3, 3]},
                          "encoding": {"y": {"field": "y", "type": "quantitative"}}})  # fmt: skip
    return spec


def where_time_goes(rows: list[Row], machine: str) -> Spec | None:
    """A step role by role, dense beside sparse, for each curve's setting nearest to half."""
    cells = [
        {"bar": f"{series}: {side}", "role": role, "ms": ms, "place": place, "engine": told.get("engine"), "how": told.get("how")}
        for series, row in nearest_half(quiet(rows, machine))[:MOST_BARS]
        for side, told in row.by_kernel.items()
        for place, (role, ms) in enumerate({**told["ms"], NOBODY: told["step_ms"] * told["unattributed"]}.items())
    ]  # fmt: skip
    if not cells:
        return None
    roles = [*dict.fromkeys(c["role"] for c in cells if c["role"] != NOBODY), NOBODY]
    colours = [*(ROLE_COLOURS[i % len(ROLE_COLOURS)] for i in range(len(roles) - 1)), "#d5dae0"]
    bars = alt.Chart(alt.InlineData(cells)).mark_bar().encode(
        y=alt.Y("bar:N", title=None, sort=None, axis=alt.Axis(labelLimit=230)),
        x=alt.X("ms:Q", title="ms of a step, marked", stack="zero"), order=alt.Order("place:Q"),
        color=alt.Color("role:N", sort=None, scale=alt.Scale(domain=roles, range=colours), legend=alt.Legend(columns=4)),
        tooltip=[alt.Tooltip("bar:N", title="step"), alt.Tooltip("role:N"), alt.Tooltip("ms:Q", format=".3~g"),
                 alt.Tooltip("engine:N"), alt.Tooltip("how:N")],
    )  # fmt: skip
    height = max(60, 20 * len({c["bar"] for c in cells}))
    return finished(bars, f"Where a step's time goes, {machine.partition(',')[0]}", height=height)
