"""Published figures beside measured ones, where the setting matches, with everything that differs said in words.

The figures, their sources and how surely they were read are in sparsebench/assets/published.yaml.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from sparsebench.report.rows import Row

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
    ours: str
    published: str
    source: str
    differs: list[str]
    model: str  # of the published figure
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
    return Beside(row, metric, ours, theirs, source, differs(row, entry, settings), entry["model"], exact)


def words(metric: str, dense: float | None, sparse: float) -> str:
    if metric == "speedup":
        return f"{sparse:.2f}x"
    if dense is None:
        return f"{sparse:.4g}"
    return f"{dense:.4g} → {sparse:.4g} ({sparse / dense:.3f}x)"


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
