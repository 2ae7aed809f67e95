"""How the report's charts look and are drawn: Vega-Lite by Altair, as SVG and PNG by vl-convert, live on the page by Vega-Embed.

Colour and marker stand for a curve, the same on the whole page.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import altair as alt
import vl_convert

WIDTH, HEIGHT = 400, 260
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#5f6b7a", "#bcbd22", "#17becf")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")  # 7 by 10 colours
MOST_STEPS = 60  # points of a curve: more can't be read
VERSION = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
LOOK = {
    "background": "white", "font": "system-ui, Liberation Sans, DejaVu Sans, sans-serif", "view": {"stroke": None},
    "axis": {"gridColor": "#e6e9ed", "domainColor": "#9aa4b1", "tickColor": "#9aa4b1", "labelFontSize": 11,
             "titleFontSize": 11, "titleFontWeight": "normal", "labelColor": "#3c4653", "titleColor": "#3c4653",
             "labelOverlap": "greedy", "tickCount": 6},
    "title": {"anchor": "start", "fontSize": 13, "fontWeight": 600, "color": "#1c2430", "offset": 8},
    "legend": {"orient": "bottom", "columns": 2, "labelLimit": 210, "labelFontSize": 10.5, "title": None, "symbolLimit": 0,
               "symbolOpacity": 1},
}  # fmt: skip
Spec = dict[str, Any]
alt.data_transformers.enable(
    "default", consolidate_datasets=False, max_rows=None
)  # a chart's own data stay where they are


def styles(series: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by the name of a curve."""
    return {name: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(sorted(series))}


def as_svg(spec: Spec) -> str:
    """The chart as it stands without scripts; links and labels for screen readers are left to the page."""
    still = {**spec, "config": {**LOOK, "aria": False}}
    return re.sub(r"<a [^>]*>|</a>", "", vl_convert.vegalite_to_svg(still, vl_version=VERSION))


def as_png(svg: str) -> bytes:
    return vl_convert.svg_to_png(svg, scale=2)


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`."""
    return vl_convert.javascript_bundle(vl_version=VERSION)


def palette(look: dict[str, tuple[str, str]], series: list[str]) -> dict[str, Any]:
    """Encodings of colour and marker by curve, with one legend; a click on it sets a curve off."""
    order = sorted(series)
    colour = alt.Scale(domain=order, range=[look[name][0] for name in order])
    shape = alt.Scale(domain=order, range=[look[name][1] for name in order])
    return {"color": alt.Color("series:N", scale=colour), "shape": alt.Shape("series:N", scale=shape)}


def finished(chart: alt.LayerChart | alt.Chart, title: str, **size: int) -> Spec:
    size = {"width": WIDTH, "height": HEIGHT, **size}
    return without_schema(chart.properties(title=title, **size))


def without_schema(chart: alt.TopLevelMixin) -> Spec:
    """The chart's description, looking as all of them do and naming no address."""
    spec = chart.configure(**LOOK).to_dict(validate=False)
    spec.pop("$schema", None)
    return spec


def lines_over(cells: list[dict], x: alt.X, y: alt.Y, title: str, look: dict, dash: str | None = None) -> Spec | None:
    """Lines by curve with a point at each measurement and bars where cells have low and high."""
    if not cells:
        return None
    series = list(dict.fromkeys(c["series"] for c in cells))
    colours = palette(look, series)
    base = alt.Chart(alt.InlineData(cells))
    tips = [
        alt.Tooltip(f"{k}:{'Q' if isinstance(v, (int, float)) else 'N'}")
        for k, v in cells[0].items()
        if k not in ("low", "high")
    ]
    dashed = {"strokeDash": alt.StrokeDash(f"{dash}:N")} if dash else {}
    layers = [base.mark_line(strokeWidth=1.5).encode(x, y, color=colours["color"], detail="run:N", **dashed)]
    if "low" in cells[0]:
        layers.append(base.mark_rule(strokeWidth=1.2).encode(x, y="low:Q", y2="high:Q", color=colours["color"]))
    if len(cells) <= MOST_STEPS * 2:
        layers.append(base.mark_point(size=40, filled=True, opacity=1).encode(x, y, **colours, tooltip=tips))
    return finished(alt.layer(*layers), title)


def tooltip(metric: str) -> list[alt.Tooltip]:
    """What is said of a point that stands for a setting."""
    shares = (("sparsity", "sparsity"), ("work", "MACs"), ("ffn", "MACs of FFNs"))
    return [
        alt.Tooltip("run:N"), alt.Tooltip("figure:N", title=metric), alt.Tooltip("seeds:Q"),
        *(alt.Tooltip(f"{name}:Q", title=title, format=".1%") for name, title in shares),
        alt.Tooltip("sparse:Q", title="ms", format=".3f"), alt.Tooltip("per_s:Q", title="per second", format=".1f"),
        alt.Tooltip("speedup:Q", title="speed-up", format=".2f"), alt.Tooltip("kernel:N"), alt.Tooltip("machine:N"),
        alt.Tooltip("of_limit_dense:Q", title="dense, of the bytes limit", format=".0%"),
        alt.Tooltip("of_limit_sparse:Q", title="sparse, of the bytes limit", format=".0%"),
    ]  # fmt: skip


def quoted(text: str) -> str:
    """A text inside a Vega expression."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
