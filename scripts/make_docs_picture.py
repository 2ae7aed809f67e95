"""Draws docs/assets/quality-speed.png from reference records: what sparsity costs in quality and brings on the clock."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sparsebench.records import archive

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "outputs" / "reference"
PICTURE = ROOT / "docs" / "assets" / "quality-speed.png"
METHODS = {  # in the order of the legend
    "teal": "TEAL",
    "rsparse": "R-Sparse",
    "wina_plain": "WINA without rotation",
    "wina": "WINA",
    "larosa": "LaRoSA",
    "duogpt": "DuoGPT (weights pruned too)",
}
MODEL = "smollm2-135m"
CLOCKS = {  # of one decode step, context 128: (experiment, dtype) of the record -> label, style
    ("bench_h200", "float16"): ("Llama-2-7B shape, fp16, one H200 (earlier dense step)", "o-"),
    ("bench_cpu", "float32"): ("one block of it, fp32, one CPU thread", "s-"),
}


def records(experiment: str) -> list[dict[str, Any]]:
    """All records of an experiment in outputs/reference."""
    return archive.read(REFERENCE / f"{experiment}.parquet")


def quality() -> dict[str, list[tuple[float, float]]]:
    """method -> (measured sparsity, perplexity over dense perplexity), means over seeds, in order of sparsity."""
    points: dict[str, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records("real_models"):
        method, perplexity = record["config"]["method"], record["quality"]["perplexity"]
        usual = method["prompt"] == "all" and method.get("null_space", "inputs") == "inputs"
        usual = usual and method.get("allocation", "uniform") == "uniform"
        usual = usual and record["env"]["hardware"]["dtype"] == "float16"  # three seeds
        if record["model"]["name"] == MODEL and method["name"] in METHODS and usual:
            point = record["sparsity"]["model_wide"], perplexity["sparse"] / perplexity["dense"]
            points[method["name"]][record["sparsity"]["requested"]].append(point)
    return {
        name: sorted((mean(x for x, _ in group), mean(y for _, y in group)) for group in levels.values())
        for name, levels in points.items()
    }


def speed(experiment: str, dtype: str) -> list[tuple[float, float]]:
    """(sparsity, speed-up over the fastest dense engine) of a decode step at context 128, Llama-2-7B's shape."""
    (record,) = (r for r in records(experiment) if r["model"] == "llama2-7b" and r["env"]["hardware"]["dtype"] == dtype)
    return sorted((row["sparsity"], row["speedup"]) for row in record["step"] if row["context"] == 128)


def draw() -> None:
    """Both panels, side by side."""
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    plt.rcParams |= {"grid.alpha": 0.25, "savefig.dpi": 160}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), constrained_layout=True)
    points = quality()
    for name, label in METHODS.items():
        x, y = zip(*points[name], strict=True)
        left.plot([100 * v for v in x], [100 * (v - 1) for v in y], marker="o", markersize=3.5, label=label)
    left.set(yscale="log", ylim=(1, 3000), xlim=(20, 75), xlabel="measured sparsity, % of (token, input channel) pairs")
    left.set_ylabel("perplexity above dense, %")
    left.set_title("What it costs: methods on SmolLM2-135M", fontweight="bold", loc="left")
    left.legend(frameon=False, fontsize=8)
    for (experiment, dtype), (label, style) in CLOCKS.items():
        x, y = zip(*speed(experiment, dtype), strict=True)
        right.plot([100 * v for v in x], y, style, markersize=4, label=label)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="sparsity, %", ylim=(0, None))
    right.set_ylabel("decode speed-up over the fastest dense engine")
    right.set_title("What it brings: one decode step on the clock", fontweight="bold", loc="left")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    draw()
