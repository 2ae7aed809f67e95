"""The report's charts as Vega-Lite, each answering one question: quality over sparsity, work and time with the front on
that axis, speed-up against what the bytes promise, where in the model the sparsity lies, break-even, batches, training,
estimates beside measurements.

One description serves the page (hover, legend, click to the record) and the SVG and PNG beside it (vl-convert). A point
is one setting: the mean over its seeds, with bars of one standard deviation or, with one seed, of the standard error
against dense over the test set (paired); times have bars from p10 to p90. Charts of a group share its points, so that
the page holds them once.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import altair as alt

from sparsebench.records.wording import uncertain
from sparsebench.report import patterns, unions
from sparsebench.report.groups import Group, dtype_of, of_seeds, on_target, pareto, repeats
from sparsebench.report.rows import Row, sites
from sparsebench.report.step_charts import MOST_LINES, MOST_MAPS, nearest_half, of_machine
from sparsebench.report.vega import MOST_STEPS, Spec, finished, lines_over, palette, quoted, tooltip, without_schema

FAR = 20  # largest over smallest value above which the axis is logarithmic
MOST_LAYERS = 5  # names of layers below a map: more run into each other


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def centre(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation; 0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def points(group: Group, link: Callable[[Row], str | None]) -> list[dict[str, Any]]:
    """One point per setting that was scored, the dense model left out; `link`: where a row's record is found."""
    scored = [r for r in group.rows if r.method != "dense" and r.sparse is not None]
    return [point(same, link(same[0])) for same in repeats(scored)]


def point(same: list[Row], href: str | None) -> dict[str, Any]:
    row, time = same[0], same[0].decode
    quality, spread = centre([r.sparse for r in same if r.sparse is not None])
    error = spread or row.difference_stderr or 0.0
    place = {
        "run": re.sub(r" seed=\S+", "", row.label) if len(same) > 1 else row.label, "series": row.series,
        "seeds": len(of_seeds(same)), "machine": row.machine, "kernel": time.get("kernel"), "href": href, "quality": quality,
        "low": quality - error, "high": quality + error, "figure": uncertain(quality, error),
        "real": any(t["speedup"] is not None for t in row.times.values()),
    }  # fmt: skip
    for name, value in PLACES.items():
        known = [v for r in same if (v := value(r)) is not None]
        if known:
            mean, sd = centre(known)
            place |= {name: mean} | ({f"{name}_low": mean - sd, f"{name}_high": mean + sd} if sd else {})
    if time.get("speedup") and not row.noisy:
        place |= {k: statistics.fmean(r.decode[k] for r in same if r.decode.get(k)) for k in ("sparse", "speedup")}
        place |= {
            f"sparse_{e}": time.get(f"sparse_{c}")
            for e, c in (("low", "p10"), ("high", "p90"))
            if time.get(f"sparse_{c}")
        }
        place |= {
            f"speedup_{e}": time.get(f"speedup_{c}")
            for e, c in (("low", "p10"), ("high", "p90"))
            if time.get(f"speedup_{c}")
        }
        place |= {"per_s": row.per_second("sparse"), "roofline": row.roofline, **row.of_limit}
    return {k: v for k, v in place.items() if v is not None}


PLACES: dict[str, Callable[[Row], float | None]] = {
    "sparsity": lambda r: r.sparsity, "work": lambda r: r.scored_macs, "ffn": lambda r: r.ffn_macs,
}  # fmt: skip


def dense_point(group: Group) -> dict[str, Any] | None:
    """The dense model: the median over the rows."""
    values = [r.dense for r in group.rows if r.dense is not None]
    return {"quality": statistics.median(values), "sparsity": 0.0, "work": 1.0, "ffn": 1.0} if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Quality over a cost


def against(
    group: Group, look: dict[str, tuple[str, str]], drawn: list[dict], x: str, title: str, label: str,
    dense_x: float | None = None, form: str = "%", sign: int = 1,
) -> Spec | None:  # fmt: skip
    """Quality over the field `x`, the front on this very axis in grey, the dense model as a star.

    sign: 1 where less of x is better, -1 where more is. Hollow: no kernel skipped work.
    """
    drawn = [p for p in drawn if x in p]
    if not drawn:
        return None
    higher = group.rows[0].higher_is_better
    star = dense_point(group)
    stars = [{**star, x: dense_x}] if star and dense_x is not None else []
    every = [*drawn, *stars]
    front = [every[i] for i in pareto([(sign * p[x], p["quality"]) for p in every], higher)]
    scale = quality_scale([p["quality"] for p in every])
    direction = "higher" if higher else "lower"
    place = alt.X(f"{x}:Q", title=label, axis=alt.Axis(format=form), scale=alt.Scale(zero=False, nice=True))
    axis = alt.Axis(format=".1%" if group.protocol["metric"] == "accuracy" else "")
    quality = alt.Y("quality:Q", title=f"{group.protocol['metric']} ({direction} is better)", scale=scale, axis=axis)
    series = list(dict.fromkeys(p["series"] for p in drawn))
    colours, chosen = palette(look, series), alt.selection_point(fields=["series"], bind="legend", name="curve")
    fade = alt.condition(chosen, alt.value(1), alt.value(0.08))
    base = alt.Chart(alt.NamedData("points")).transform_filter(f"isValid(datum.{x})")
    steps = "step-after" if sign > 0 else "step-before"
    line = alt.Chart(alt.InlineData([{x: p[x], "quality": p["quality"]} for p in front]))
    layers = [
        line.mark_line(interpolate=steps, color="#9aa4b1", strokeWidth=4, opacity=0.45).encode(x=place, y=quality)
    ]
    if len(series) < len(drawn):
        layers.append(base.mark_line(strokeWidth=1, opacity=0.5).encode(place, quality, color=colours["color"]))
    bars = base.mark_rule(strokeWidth=1.2)
    layers.append(bars.encode(place, y="low:Q", y2="high:Q", color=colours["color"], opacity=fade))
    if any(f"{x}_low" in p for p in drawn):
        across = bars.transform_filter(f"isValid(datum.{x}_low)")
        layers.append(across.encode(x=f"{x}_low:Q", x2=f"{x}_high:Q", y=quality, color=colours["color"], opacity=fade))
    filled = alt.condition("datum.real", colours["color"], alt.value("white"))
    marks = base.mark_point(size=55, strokeWidth=1.6).encode(
        place, quality, **colours, fill=filled, href="href:N", tooltip=tooltip(group.protocol["metric"]), opacity=fade
    )
    layers.append(marks.add_params(chosen))
    if stars:
        star_data = alt.Chart(alt.InlineData([{x: dense_x, "quality": star["quality"], "run": "dense model"}]))
        shape = "M0,-1L0.225,-0.309L0.951,-0.309L0.363,0.118L0.588,0.809L0,0.382L-0.588,0.809L-0.363,0.118L-0.951,-0.309L-0.225,-0.309Z"
        layers.append(star_data.mark_point(shape=shape, size=160, filled=True, color="black", opacity=1).encode(
            place, quality, tooltip=[alt.Tooltip("run:N"), alt.Tooltip("quality:Q", format=".4~r")]))  # fmt: skip
    return finished(alt.layer(*layers), title)


def quality_scale(values: list[float]) -> alt.Scale:
    """Logarithmic where the worst is many times the best, and then from just below the best to just above the worst."""
    if min(values) > 0 and max(values) / min(values) > FAR:
        return alt.Scale(type="log", nice=False, domain=[0.9 * min(values), 1.2 * max(values)])
    return alt.Scale(zero=False, nice=True)


# ---------------------------------------------------------------------------------------------------------------------
# Other questions


def heat_map(group: Group) -> Spec | None:
    """Measured sparsity of every map: layer by role, for each curve's setting nearest to half, in one number format."""
    mapped = [r for r in group.rows if r.method != "dense" and sites(r.record)]
    every = {series.removesuffix(f" {dtype_of(row)}"): row for series, row in nearest_half(mapped)}
    cells = [
        {"series": series, "layer": layer, "role": role, "sparsity": value}
        for series, row in list(every.items())[:MOST_MAPS]
        for layer, role, value in sites(row.record)
    ]
    if not cells:
        return None
    layers, roles = (list(dict.fromkeys(c[k] for c in cells)) for k in ("layer", "role"))
    columns = min(len(every), 3)
    named = roles != [""]
    axis = alt.Axis(
        values=layers[:: -(-len(layers) // MOST_LAYERS)] if named else layers, labelAngle=0 if named else -60
    )
    rect = alt.Chart(alt.InlineData(cells)).mark_rect().encode(
        x=alt.X("layer:O", title="layer" if named else "", sort=None, axis=axis),
        y=alt.Y("role:N", title=None, sort=None, axis=alt.Axis() if named else None),
        color=alt.Color("sparsity:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"),
                        legend=alt.Legend(format="%", title="sparsity", orient="right", gradientLength=90)),
        tooltip=[alt.Tooltip("series:N"), alt.Tooltip("layer:O"), alt.Tooltip("role:N"), alt.Tooltip("sparsity:Q", format=".1%")],
    ).properties(width=min(max(9 * len(layers), 80), 330 // columns), height=max(14 * len(roles), 30))  # fmt: skip
    chart = rect.facet(facet=alt.Facet("series:N", title=None, header=alt.Header(labelLimit=190)), columns=columns)
    left = f", {MOST_MAPS} of {len(every)} curves" if len(every) > MOST_MAPS else ""
    return without_schema(chart.properties(title=f"Where the sparsity lies, by map, measured{left}"))


def training(rows: list[Row], look: dict) -> Spec | None:
    """Loss while fitting, one line per run and stage (each has a loss of its own); of seeds the first."""
    cells = [
        {"series": same[0].series, "run": f"{same[0].label}, {stage}", "stage": stage, "step": step, "loss": loss}
        for same in repeats([r for r in rows if (r.record.get("extra") or {}).get("training")])[:MOST_LINES]
        for stage, step, loss in losses(same[0].record["extra"]["training"])
    ]  # fmt: skip
    x = alt.X("step:Q", title="step, stages one after the other")
    y = alt.Y(
        "loss:Q", title="training loss", scale=quality_scale([c["loss"] for c in cells]) if cells else alt.Scale()
    )
    return lines_over(cells, x, y, "Training loss, by stage", look, dash="stage")


def losses(history: list[dict]) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of a training history, steps of later stages counted on; thinned to what a chart can show."""
    stages: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        name = next((k for k in entry if k.endswith("/step")), None)
        loss = entry.get(f"{name.removesuffix('/step')}/loss") if name else None
        if name and isinstance(loss, (int, float)) and math.isfinite(loss):
            stages.setdefault(name.removesuffix("/step"), []).append((int(entry[name]), loss))
    every, before = [], 0
    for stage, steps in stages.items():
        every += [(stage, before + step, loss) for step, loss in steps]
        before = every[-1][1]
    thin = -(-len(every) // MOST_STEPS) if every else 1
    return every[::thin]


def estimates(group: Group, look: dict) -> Spec | None:
    """Predicted times over those measured on the target, where the records hold both."""
    cells = []
    for row in group.rows:
        estimate = row.record.get("estimate")
        real = on_target(row, group) if estimate else None
        for side in ("dense", "sparse") if estimate and real else ():
            times = {"measured": real.decode[side], "estimated": estimate["decode"][f"{side}_ms"]}
            cells.append({"series": row.series, "run": f"{row.label}, {side}", **times})
    if not cells:
        return None
    values = [c[k] for c in cells for k in ("measured", "estimated")]
    x, y = alt.X("measured:Q", title="measured ms"), alt.Y("estimated:Q", title="estimated ms")
    ends = alt.Chart(alt.InlineData([{"measured": v, "estimated": v} for v in (min(values), max(values))]))
    colours = palette(look, list(dict.fromkeys(c["series"] for c in cells)))
    tips = [alt.Tooltip("run:N"), alt.Tooltip("measured:Q", format=".3f"), alt.Tooltip("estimated:Q", format=".3f")]
    base = alt.Chart(alt.InlineData(cells))
    marks = base.mark_point(size=55, filled=True, opacity=1).encode(x, y, **colours, tooltip=tips)
    return finished(alt.layer(ends.mark_line(color="#9aa4b1").encode(x, y), marks), "Estimates beside measurements")


def of_group(
    group: Group, look: dict[str, tuple[str, str]], link: Callable[[Row], str | None]
) -> tuple[dict[str, Spec], Spec]:
    """(name -> chart, their common data by name), for what the group's rows hold."""
    drawn = [] if group.random else points(group, link)
    charts: dict[str, Spec | None] = {
        "sparsity": against(group, look, drawn, "sparsity", "Quality against measured sparsity",
                            "sparsity, model-wide, measured on test data", 0.0, sign=-1),
        "macs": against(group, look, drawn, "work", "Quality against work", "MACs over the scored tokens, share of dense", 1.0),
        "ffn-macs": against(group, look, drawn, "ffn", "Quality against the work of the FFNs",
                            "MACs of FFN maps and routers, share of dense", 1.0),
    }  # fmt: skip
    for number, machine in enumerate(dict.fromkeys(r.machine for r in group.rows if r.times)):
        here = [p for p in drawn if p["machine"] == machine]
        dense = [
            r.decode["dense"] for r in group.rows if r.machine == machine and r.decode.get("speedup") and not r.noisy
        ]
        charts[f"time-{number}"] = timed(group, look, here, machine, statistics.median(dense) if dense else None)
        charts |= {f"{k}-{number}": v for k, v in of_machine(group.rows, drawn, look, machine).items()}
    charts["patterns"] = patterns.ladder(group)
    charts |= {"maps": heat_map(group), "training": training(group.rows, look), "estimates": estimates(group, look)}
    charts |= {"union": unions.over_batch(group.rows, look), "chunk": unions.over_chunk(group.rows, look)}
    return {name: spec for name, spec in charts.items() if spec is not None}, {"points": drawn}


def timed(group: Group, look: dict, here: list[dict], machine: str, dense: float | None) -> Spec | None:
    """Quality over the measured time on one machine."""
    title = f"Quality against time, {machine.partition(',')[0]}"
    spec = against(group, look, here, "sparse", title, "ms, median", dense, form=".3~g")
    for layer in spec["layer"] if spec else []:  # the group's points hold all machines
        for step in layer.get("transform", []):
            step["filter"] += f" && datum.machine == {quoted(machine)}"
    return spec
