"""What grows with the size of a model: figures over the number of parameters, of our records and of published results.

Published points come from assets/published.yaml and are drawn dashed, under names of their own: data, metric and prompt
policy are not those of our runs. Their sizes are those in the models' names (7b, 0.5b). Figures that were found in no
source that could be read are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import altair as alt

from sparsebench.report import equal_terms, published
from sparsebench.report.groups import Group, dtype_of
from sparsebench.report.rows import Row
from sparsebench.report.vega import Spec, lines_over, styles

TEXT = (
    "What is left of the dense quality at a measured sparsity of 50 %, read between measured levels, of pretrained models; "
    "published figures beside it were made on other data."
)
NAMED = re.compile(r"-?(\d+(?:\.\d+)?)([mb])$")
UNITS = {"m": 1e6, "b": 1e9}
HALF = 0.5


def size(row: Row) -> float:
    """Parameters of a row's model; 0 where the record doesn't say."""
    return float((row.record.get("model") or {}).get("num_parameters") or 0)


def nominal(model: str) -> tuple[str, float] | None:
    """(family, parameters) out of a name such as llama2-7b; None for a name without a size."""
    told = NAMED.search(model)
    return None if told is None else (model[: told.start()], float(told[1]) * UNITS[told[2]])


def points(metric: str, method: str | None = None) -> Iterable[tuple[dict, str, float, Any, float]]:
    """(entry, family, parameters, setting, figure) of published figures of one metric that were read in a source."""
    for entry in published.figures():
        place = nominal(entry["model"])
        if (
            entry["metric"] != metric
            or place is None
            or entry["seen"] == "recalled"
            or method not in (None, entry["method"])
        ):
            continue
        for setting, figure in entry["points"].items():
            if setting not in entry.get("recalled", ()):
                yield entry, *place, setting, figure


def cell(series: str, run: str, model: str, parameters: float, what: str, value: float, error: float = 0.0) -> dict:
    """One point, measured or published."""
    return {
        "series": series, "run": run, "model": model, "parameters": parameters, "source": what,
        "value": value, "low": value - error, "high": value + error,
    }  # fmt: skip


def drawn(cells: list[dict], y: alt.Y, title: str, note: str) -> Spec | None:
    """The chart over the number of parameters; None where our own points and the published ones are of one model in all."""
    if not any(c["source"] == "measured" for c in cells) or len({c["parameters"] for c in cells}) < 2:
        return None
    told = " (dashed: published, " + note + ")" if any(c["source"] == "published" for c in cells) else ""
    x = alt.X(
        "parameters:Q", title=f"parameters of the model{told}", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s")
    )
    return lines_over(cells, x, y, title, styles(list({c["series"] for c in cells})), dash="source")


def published_critical(method: str, targets: set[str], share: float) -> list[dict]:
    """Published critical sparsities of the tensors that our own searches are about, a line for each family."""
    return [
        cell(f"{method} {target}, published", f"{target} {family}", entry["model"], parameters, "published", figure)
        for entry, family, parameters, target, figure in points("critical_sparsity", method)
        if target in targets and entry["with"].get("eval.critical.share") == share
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Quality kept at half


def kept_at_half(parts: list[Group]) -> dict[str, Spec]:
    """Dense over sparse perplexity at a measured sparsity of 50 % against size, one chart for each prompt policy.

    Read off each curve of each pretrained model (equal_terms.at: between measured levels, never beyond them); of a model
    with several protocols the one that scored most text. Methods with one model alone are drawn, too.
    """
    chosen: dict[tuple[str, str], Group] = {}
    for group in parts:
        row = group.rows[0]
        if row.metric != "perplexity" or row.record["config"]["model"].get("weights") != "pretrained" or not size(row):
            continue
        key = (group.protocol.get("prompt_policy", "all"), group.protocol["model"])
        if key not in chosen or scored(group) > scored(chosen[key]):
            chosen[key] = group
    charts = {}
    for policy in sorted({policy for policy, _ in chosen}):
        own = [c for (each, _), group in chosen.items() if each == policy for c in of_group(group)]
        y = alt.Y("value:Q", title="dense / sparse perplexity", scale=alt.Scale(zero=False))
        every = own + published_half({c["run"].partition(" ")[0] for c in own})
        spec = drawn(every, y, f"Quality kept at 50 % sparsity, prompt={policy}", "other data and policies")
        if spec:
            charts[f"kept-at-half-{policy}"] = spec
    return charts


def scored(group: Group) -> int:
    return int(group.protocol.get("tokens") or 0)


def of_group(group: Group) -> list[dict]:
    """The points of one model in the number format that most of its runs have, a curve's name without that format."""
    usual = Counter(dtype_of(row) for row in group.rows).most_common(1)[0][0]
    same = Group(group.protocol, [row for row in group.rows if dtype_of(row) == usual])
    axis, model, parameters = equal_terms.SPARSITY, group.protocol["model"], size(group.rows[0])
    dense, cells = equal_terms.dense_point(same.rows), []
    for curve in equal_terms.curves(same, axis) if dense else []:
        point = equal_terms.at(curve, axis, HALF)
        if not point.problem:
            kept, name = dense.value / point.value, curve.series.removesuffix(f" {usual}")
            ratio = equal_terms.summed([1 / point.value, -kept / point.value], [dense.evidence, point.evidence])
            variance = point.seed_variance * (kept / point.value) ** 2
            error = equal_terms.error(ratio, variance, point.seeds) or 0.0
            cells.append(cell(name, name, model, parameters, "measured", kept, error))
    return cells


def published_half(methods: set[str]) -> list[dict]:
    """Published perplexities of these methods at 50 %, as a share kept."""
    return [
        cell(f"{entry['method']}, published", f"{entry['method']} {family} {entry['source']}", entry["model"], parameters,
             "published", entry["dense"] / figure)
        for entry, family, parameters, setting, figure in points("perplexity")
        if setting == HALF and entry["method"] in methods
    ]  # fmt: skip
