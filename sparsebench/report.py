"""What a person sees of a record: a table on the terminal and one line of JSON as the last line."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def scaled(value: float | None, unit: str = "") -> str:
    """1234567 -> 1.23 M."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def ratio(dense: float | None, sparse: float | None) -> str:
    return f"{sparse / dense:.3f}x" if dense and sparse is not None else "-"


def headline(found: dict, path: Path) -> str:
    """One line of JSON for scripts: the main figures of a record and where it lies."""
    quality = (found.get("quality") or {}).get("perplexity") or {}
    decode = (found.get("latency") or {}).get("decode") or {}
    content = {
        "status": found["status"],
        "name": found["name"],
        "record": str(path),
        "perplexity_dense": quality.get("dense"),
        "perplexity_sparse": quality.get("sparse"),
        "sparsity_model_wide": (found.get("sparsity") or {}).get("model_wide"),
        "decode_speedup": decode.get("speedup"),
    }
    if found["error"]:
        content["error"] = found["error"]["message"]
    return json.dumps(content)


def show(found: dict, path: Path) -> None:
    """Print a record: its table (or why it failed), where it lies, and the line of JSON."""
    console = Console(highlight=False, soft_wrap=True)
    if found["status"] != "finished":
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{found['status']}: {(found['error'] or {}).get('message')}", style="red", markup=False
        )
    else:
        console.print(table(found))
    console.print(f"record: {path}", markup=False)
    print(headline(found, path), flush=True)


def table(found: dict) -> Table:
    """The run's figures, dense beside sparse."""
    grid = Table(title=found["name"], title_justify="left")
    for name, justify in (("", "left"), ("dense", "right"), ("sparse", "right"), ("sparse / dense", "right")):
        grid.add_column(name, justify=justify)
    for name, metric in found["quality"].items():
        if name != "nll":
            grid.add_row(
                name, f"{metric['dense']:.4g}", f"{metric['sparse']:.4g}", ratio(metric["dense"], metric["sparse"])
            )
    measured = found["sparsity"]
    grid.add_row("sparsity, model-wide (measured)", "-", f"{measured['model_wide']:.2%}", "")
    for role, (share, count) in by_role(measured["per_site"]).items():
        grid.add_row(f"  {role} ({count} maps)", "-", f"{share:.2%}", "")
    if measured.get("weights", 0) > 0.01:
        grid.add_row("weight sparsity (measured)", "-", f"{measured['weights']:.2%}", "")
    macs, traffic = found["macs"], found["bytes"]
    grid.add_row(
        "MACs per decoded token", scaled(macs["dense"]), scaled(macs["sparse"]), ratio(macs["dense"], macs["sparse"])
    )
    grid.add_row("FLOPs (2 x MACs)", scaled(2 * macs["dense"]), scaled(2 * macs["sparse"]), "")
    grid.add_row(
        "MACs the kernel executed",
        scaled(macs["dense"]),
        scaled(macs["executed"]),
        ratio(macs["dense"], macs["executed"]),
    )
    grid.add_row(
        "bytes per decoded token",
        scaled(traffic["dense"], "B"),
        scaled(traffic["sparse"], "B"),
        ratio(traffic["dense"], traffic["sparse"]),
    )
    latency = found["latency"]
    if latency:
        for part in ("decode", "prefill"):
            times = latency[part]
            dense, sparse = times["dense"]["median_ms"], times["sparse"]["median_ms"]
            label = (
                f"decode, context {times['context']} (ms)"
                if part == "decode"
                else f"prefill, {times['tokens']} tokens (ms)"
            )
            kernel = latency["kernel"] if part == "decode" else times["kernel"]
            label += f", {times['sparse_engine']}" if part == "decode" else ""
            gain = f"speed-up {times['speedup']:.2f}x" if "speedup" in times else "simulated" if kernel else "-"
            grid.add_row(f"{label}, {kernel or 'dense'}", f"{dense:.3f}", f"{sparse:.3f}", gain)
        if "break_even_sparsity" in latency["decode"]:
            point = latency["decode"]["break_even_sparsity"]
            grid.add_row("decode break-even sparsity", "", "not reached" if point is None else f"{point:.0%}", "")
    memory = found["memory"]
    grid.add_row(
        "weights in memory", scaled(memory["dense_weight_bytes"], "B"), scaled(memory["weight_bytes"], "B"), ""
    )
    grid.add_row("peak memory of the run", "", scaled(memory["peak_bytes"], "B"), "")
    return grid


def by_role(per_site: dict) -> dict[str, tuple[float, int]]:
    """Per kind of projection: (sparsity over its maps weighted by parameters, number of maps)."""
    groups: dict[str, list] = {}
    for name, site in per_site.items():
        groups.setdefault(name.rpartition(".")[2], []).append(site)
    return {
        role: (sum(s["sparsity"] * s["weight"] for s in sites) / sum(s["weight"] for s in sites), len(sites))
        for role, sites in groups.items()
    }
