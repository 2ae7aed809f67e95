"""The report's plots: quality against sparsity, MACs and measured time with the Pareto front, speed-up against what the
bytes promise, and where in the model the sparsity lies. Each function returns a matplotlib figure, or None where the
rows hold nothing to draw. Colours stand for methods and their variants, the same in every plot of a page; a point is the
mean over seeds, with bars of one standard deviation.
"""

from __future__ import annotations

import io
import statistics
import warnings
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter, PercentFormatter

from sparsebench.report.rows import Group, Row, pareto, repeats, sites_by_layer

matplotlib.rcParams["text.parse_math"] = False  # names and paths of records are no mathematics, dollars or not
SIZE, MARKERS = (4.8, 3.6), "osD^vPX<>hd"  # 11 beside 10 colours: 110 methods look different
MOST_LINES = 60  # rows of the heat map: more can't be read


def styles(series: list[str]) -> dict[str, dict]:
    """Colour and marker by the name of a curve."""
    colours = pyplot.get_cmap("tab10").colors
    return {
        name: {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(sorted(series))
    }


def canvas(title: str) -> tuple[Figure, pyplot.Axes]:
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def as_png(figure: Figure) -> bytes:
    return saved(figure, "png", dpi=144)


def as_svg(figure: Figure) -> bytes:
    return saved(figure, "svg", metadata={"Date": None})


def saved(figure: Figure, kind: str, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font has not is drawn as a box
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def metric_label(group: Group) -> str:
    direction = "higher" if group.rows[0].higher_is_better else "lower"
    return f"{group.protocol['metric']} ({direction} is better)"


def against(group: Group, look: dict, x: Callable[[Row], float | None], title: str, x_label: str, dense_x, sign=1):
    """Quality over x, one line per series, the dense model (median over the rows) as a star, the Pareto front in grey.

    sign: 1 where less of x is better, -1 where more is. Markers are hollow where the kernel skipped nothing (simulated).
    """
    rows = [r for r in group.rows if r.method != "dense" and x(r) is not None and r.sparse is not None]
    if not rows:
        return None
    figure, axes = canvas(title)
    dense = [(dense_x(r), r.dense) for r in rows if dense_x(r) is not None and r.dense is not None]
    dense = [tuple(map(statistics.median, zip(*dense, strict=True)))] if dense else []
    drawn = {
        series: [
            (centre([x(r) for r in same]), centre([r.sparse for r in same]), simulated(same[0]))
            for same in repeats([r for r in rows if r.series == series])
        ]
        for series in dict.fromkeys(r.series for r in rows)
    }
    points = [(sign * a, b) for mine in drawn.values() for (a, _), (b, _), _ in mine] + [
        (sign * a, b) for a, b in dense
    ]
    line = [points[i] for i in pareto(points, rows[0].higher_is_better)]
    if len(line) > 1:
        axes.step([sign * a for a, _ in line], [b for _, b in line], where="post" if sign > 0 else "pre",
                  color="#999999", linewidth=3, alpha=0.45, label="Pareto front", zorder=1)  # fmt: skip
    for series, mine in drawn.items():
        style = look[series]
        mine.sort()
        axes.plot([a for (a, _), _, _ in mine], [b for _, (b, _), _ in mine], color=style["color"], linewidth=1,
                  alpha=0.5, zorder=2)  # fmt: skip
        for hollow in (False, True):
            some = [(a, b) for a, b, flag in mine if flag == hollow]
            if some:
                axes.errorbar([a for (a, _), _ in some], [b for _, (b, _) in some], [e for _, (_, e) in some],
                              [e for (_, e), _ in some], linestyle="", markersize=5.5, zorder=3, elinewidth=0.8, **style,
                              markerfacecolor="white" if hollow else style["color"],
                              label=f"{shortened(series, 60)}{' (simulated)' if hollow else ''}")  # fmt: skip
    if dense:
        axes.plot(
            *zip(*dense, strict=True), linestyle="", marker="*", markersize=10, color="black", label="dense", zorder=4
        )
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(metric_label(group), fontsize=9)
    if worst_is_far(rows):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # the usual one writes mathematics
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7.5, frameon=False)
    return figure


def centre(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation; 0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def simulated(row: Row) -> bool:
    """Whether no kernel skipped work when the row was made."""
    return all(times["speedup"] is None for times in row.times.values())


def worst_is_far(rows: list[Row]) -> bool:
    values = [r.sparse for r in rows if r.sparse and r.sparse > 0]
    return len(values) > 1 and max(values) / min(values) > 20


def quality_plots(group: Group, look: dict) -> dict[str, Figure]:
    """name -> figure, for what the group's rows hold."""
    figures = {
        "sparsity": against(group, look, lambda r: r.sparsity, "Quality against measured sparsity",
                            "sparsity, model-wide, measured on test tokens", lambda r: 0.0, sign=-1),
        "macs": against(group, look, lambda r: r.scored_macs, "Quality against MACs",
                        "MACs over the scored tokens, share of the dense model's", lambda r: 1.0),
        "ffn-macs": against(group, look, lambda r: r.ffn_macs, "Quality against the MACs of the FFNs",
                            "MACs of FFN maps and routers, share of the dense FFNs'", lambda r: 1.0),
    }  # fmt: skip
    for number, machine in enumerate(dict.fromkeys(r.machine for r in group.rows)):
        here = Group(group.protocol, [r for r in group.rows if r.machine == machine and r.decode.get("speedup")])
        if here.rows:
            part = next(k for k, v in here.rows[0].times.items() if v is here.rows[0].decode)
            title = f"Quality against measured {part} time"
            label = f"{part}, ms (median) - {machine}"
            figures[f"latency-{number}"] = against(
                here, look, lambda r: r.decode["sparse"], title, label, lambda r: r.decode["dense"]
            )
    figures["roofline"] = roofline(group, look)
    figures["layers"] = heat_map(group)
    for name in ("sparsity", "macs", "ffn-macs"):
        if figures[name] is not None:
            axis = figures[name].axes[0].xaxis
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return {name: figure for name, figure in figures.items() if figure is not None}


def roofline(group: Group, look: dict) -> Figure | None:
    """Measured speed-up over the speed-up that the bytes promise; on the diagonal nothing is lost."""
    rows = [r for r in group.rows if r.decode.get("speedup") and r.roofline]
    if not rows:
        return None
    figure, axes = canvas("Speed-up against the bytes roofline")
    largest = max(max(r.roofline, r.decode["speedup"]) for r in rows) * 1.08
    smallest = min(0.9, *(r.decode["speedup"] * 0.95 for r in rows))
    axes.plot([smallest, largest], [smallest, largest], color="#999999", linewidth=1, label="roofline")
    axes.axhline(1, color="#bb3333", linewidth=0.8, linestyle=":")
    for series in dict.fromkeys(r.series for r in rows):
        mine = [(r.roofline, r.decode["speedup"]) for r in rows if r.series == series]
        axes.plot(*zip(*mine, strict=True), linestyle="", markersize=5.5, label=shortened(series, 60), **look[series])
    axes.set_xlabel("bytes of a dense step / bytes of a sparse step", fontsize=9)
    axes.set_ylabel("measured speed-up", fontsize=9)
    axes.legend(fontsize=7.5, frameon=False)
    return figure


def heat_map(group: Group) -> Figure | None:
    """Sparsity per layer (columns) and run (rows)."""
    rows = [(r, sites_by_layer(r.record)) for r in group.rows if r.method != "dense"]
    rows = [(r, layers) for r, layers in rows if layers][:MOST_LINES]
    if not rows:
        return None
    columns = list(dict.fromkeys(name for _, layers in rows for name in layers))
    values = [[layers.get(name, float("nan")) for name in columns] for _, layers in rows]
    figure, axes = pyplot.subplots(figsize=(SIZE[0], max(1.6, 0.9 + 0.21 * len(rows))), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    step = max(1, len(columns) // 16)
    shown = range(0, len(columns), step)
    long = any(len(columns[i]) > 4 for i in shown)
    axes.set_xticks(list(shown), [shortened(columns[i], 16) for i in shown], fontsize=7, rotation=60 if long else 0)
    axes.set_yticks(range(len(rows)), [shortened(r.label) for r, _ in rows], fontsize=7)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title("Sparsity per layer, measured", fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.02).ax.tick_params(labelsize=7)
    return figure


def shortened(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
