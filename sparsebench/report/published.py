"""Published figures beside measured ones, where the setting matches, with everything that differs said in words.

The figures, their sources and how surely they were read are in sparsebench/assets/published.yaml.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from sparsebench.records.wording import ratio
from sparsebench.report.groups import dtype_of
from sparsebench.report.rows import Row
from sparsebench.report.tables import Table

FILE = Path(str(files("sparsebench") / "assets")) / "published.yaml"
SEEN = {
    "text": "read in the source",
    "transcription": "read in a public transcription",
    "recalled": "(unverified)",
}


@dataclass
class Beside:
    """One published figure beside one of ours."""

    row: Row
    metric: str
    values: tuple[float | None, float]  # ours: dense (None where there is none) and sparse
    ours: str
    published: str
    source: str
    differs: list[str]
    model: str  # of the published figure
    point: str  # the setting that both share, e.g. sparsity=0.5
    exact: bool  # whether it is the row's own model


@functools.cache
def figures() -> tuple[dict, ...]:
    """The entries of the data file."""
    return tuple(yaml.safe_load(FILE.read_text()))


def beside(rows: list[Row]) -> list[Beside]:
    """Every published figure whose method and operating point are those of a row and whose metric the row has.

    Where an entry is about the row's own model, entries about other models are left out.
    """
    lines = []
    for row in rows:
        mine, settings = [], row.settings
        for entry in figures():
            if entry["method"] != row.method or measured(row, entry["metric"]) is None:
                continue
            point = next((p for p in entry["points"] if same(settings.get(entry["key"]), p)), None)
            if point is not None:
                mine.append((entry, point, settings))
        model = row.record["config"]["model"]["name"]
        exact = [each for each in mine if each[0]["model"] == model]
        lines += [compare(row, *each) for each in exact or mine]
    return lines


def same(ours, published) -> bool:
    if isinstance(ours, (int, float)) and isinstance(published, (int, float)):
        return math.isclose(ours, published, abs_tol=1e-9)
    return ours == published


def measured(row: Row, metric: str) -> tuple[float | None, float] | None:
    """(dense, sparse) of a metric in our record; dense is None for a figure without one. None where it was not measured."""
    if metric == "speedup":
        value = row.decode.get("speedup")
        return None if value is None else (None, value)
    if metric == "x1_zero":
        neurons = ((row.record.get("extra") or {}).get("neurons") or {}).get("sparse") or {}
        return None if neurons.get(metric) is None else (None, neurons[metric])
    if metric == "critical_sparsity":
        channels = row.critical.get("channels")
        return None if channels is None else (None, channels)
    quality = (row.record.get("quality") or {}).get(metric)
    return None if quality is None or quality["sparse"] is None else (quality["dense"], quality["sparse"])


def compare(row: Row, entry: dict, point: float, settings: dict) -> Beside:
    metric, value = entry["metric"], entry["points"][point]
    dense, sparse = measured(row, metric)
    unsure = "recalled" if point in entry.get("recalled", ()) else entry["seen"]
    source = f"{entry['source']}; {SEEN[unsure]}"
    ours, theirs = words(metric, dense, sparse), words(metric, entry.get("dense"), value)
    exact = row.record["config"]["model"]["name"] == entry["model"]
    return Beside(row, metric, (dense, sparse), ours, theirs, source, differs(row, entry, settings), entry["model"],
                  f"{entry['key'].removeprefix('method.')}={point}", exact)  # fmt: skip


def words(metric: str, dense: float | None, sparse: float) -> str:
    if metric == "speedup":
        return f"{sparse:.2f}x"
    if dense is None:
        return f"{sparse:.4g}"
    return f"{dense:.4g} → {sparse:.4g} ({ratio(dense, sparse)})"


def differs(row: Row, entry: dict, settings: dict) -> list[str]:
    """What is not as published: model, weights, data, machine, settings."""
    model = row.record["config"]["model"]
    differences = []
    if model["name"] != entry["model"]:
        differences.append(f"model {model['name']} instead of {entry['model']}")
    elif entry["metric"] != "speedup" and model.get("weights", "pretrained") != "pretrained":
        differences.append(f"{model['weights']} weights")
    if model.get("num_layers"):
        differences.append(f"only {model['num_layers']} layers")
    if entry["metric"] == "speedup":
        if entry["hardware"].lower() not in row.machine.lower():
            differences.append(f"{row.machine.partition(',')[0]} instead of {entry['hardware']}")
    else:
        data = row.record["config"]["dataset"]
        ours = (
            f"{data['name']}, windows of {data.get('sequence_length')}" if "sequence_length" in data else data["name"]
        )
        differences.append(f"data {ours}; published: {entry.get('protocol', 'protocol not stated')}")
    for key, value in entry["with"].items():
        if not same(settings.get(key), value):
            differences.append(f"{key}={settings.get(key)} instead of {value}")
    return differences


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a line is a setting, whatever the seed, the number format and how often it was run

HEAD = ["setting", "model", "metric", "measured", "published", "source", "what differs"]


def tables(rows: list[Row]) -> list[tuple[str, Table | None]]:
    """(title, table) of figures about the very model of a run, about other models at its settings, and at others."""
    lines = beside(rows)
    exact = [b for b in lines if b.exact]
    same, other = ([b for b in lines if not b.exact and bool(told(b)) == flag] for flag in (False, True))
    return [("", table(exact)), ("Same setting, other model", table(same)), ("Other model and other settings", table(other))]  # fmt: skip


def table(lines: list[Beside]) -> Table | None:
    """One line for each setting and metric: what was measured over its runs, and what was published, by model."""
    by_run: dict[tuple, list[Beside]] = {}
    for each in lines:
        by_run.setdefault((each.metric, str(each.row.path)), []).append(each)
    merged: dict[tuple, list[list[Beside]]] = {}
    for mine in by_run.values():
        first = mine[0]
        model = first.row.record["config"]["model"]["name"]
        against = tuple((b.model, b.published, b.source, *told(b)) for b in mine)
        merged.setdefault((first.metric, model, setting(first), against), []).append(mine)
    body = []
    for (metric, model, name, _), runs in sorted(merged.items(), key=lambda item: item[0][:3]):
        mine = runs[0]
        cells = {
            "figures": [f"{b.model}: {b.published}{' (unverified)' * ('unverified' in b.source)}" for b in mine],
            "sources": dict.fromkeys(b.source.rpartition("; ")[0] for b in mine),
            "differs": dict.fromkeys(d for told_first in (True, False) for b in mine for d in b.differs
                                     if d.startswith("data ") == told_first and not d.startswith("model ")),
        }  # fmt: skip
        body.append([name, model, metric, over_runs([each[0] for each in runs]),
                     *("; ".join(part) for part in cells.values())])  # fmt: skip
        body[-1][-1] = body[-1][-1] or "nothing"
    return Table(HEAD, body, set(), set()) if body else None


def setting(one: Beside) -> str:
    """A run's name without its seed, number format and machine, with the point that it was published at."""
    words = re.sub(r" seed=[^ ,]+", "", one.row.label).partition(", ")[0].split(" ")
    words = [word for word in words if word != dtype_of(one.row)]
    return " ".join([*words, *([one.point] if one.point not in words else [])])


def over_runs(runs: list[Beside]) -> str:
    """What was measured, from the lowest to the highest of several runs."""
    low, high = (choose(runs, key=lambda b: b.values[1]) for choose in (min, max))
    if low.ours == high.ours:
        return low.ours + (f", {len(runs)} runs" if len(runs) > 1 else "")
    return f"{low.ours} to {high.ours}, {len(runs)} runs"


def told(beside: Beside) -> list[str]:
    """In what a published figure's setting differs, apart from the model and the data that go with it."""
    return [d for d in beside.differs if not d.startswith(("model ", "data "))]
