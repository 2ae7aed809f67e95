"""What a person sees of a record: a table on the terminal and one line of JSON as the last line."""

from __future__ import annotations

import json
import math
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


def rounded(value: float, stderr: float | None) -> str:
    """A figure to the digit its standard error reaches (its first, or its second where that starts with 1); 4 digits
    where it has none."""
    if not stderr or not math.isfinite(stderr):
        return f"{value:.4g}"
    return f"{value:.{digits(stderr)}f}"


def digits(stderr: float) -> int:
    """Decimals that a figure of this standard error can have."""
    first = math.floor(math.log10(stderr))
    return max(0, -first + (stderr / 10**first < 1.95))


def uncertain(value: float, stderr: float | None, unit: str = "", sign: str = "") -> str:
    """10.98 ± 0.03, in significant digits only."""
    if not stderr or not math.isfinite(stderr):
        return f"{value:{sign}.4g}{unit}"
    return f"{value:{sign}.{digits(stderr)}f} ± {stderr:.{digits(stderr)}f}{unit}"


def change(name: str, metric: dict) -> str:
    """From dense to sparse, with its paired standard error: a ratio, of shares a difference in points."""
    if name == "accuracy":
        stderr = metric.get("difference_stderr")
        points = 100 * (metric["sparse"] - metric["dense"])
        return uncertain(points, 100 * stderr, " points", "+") if stderr else f"{points:+.2f} points"
    if metric.get("ratio") is not None:
        return uncertain(metric["ratio"], metric.get("ratio_stderr"), "x")
    return ratio(metric["dense"], metric["sparse"])


def in_words(name: str, metric: dict) -> str:
    """The sparse model's figure and the change: 10.98 ± 0.03 (1.093 ± 0.003x)."""
    mark = ", little text" if metric.get("little_text") else ""
    return f"{uncertain(metric['sparse'], metric.get('sparse_stderr'))} ({change(name, metric)}{mark})"


def headline(found: dict, path: Path) -> str:
    """One line of JSON for scripts: the main figures of a record and where it lies."""
    quality, latency = found.get("quality") or {}, found.get("latency") or {}
    name = "accuracy" if "accuracy" in quality else "perplexity"
    metric = quality.get(name) or {}
    content = {
        "status": found["status"],
        "name": found["name"],
        "record": str(path),
        **{f"{name}_{side}": significant(metric, side) for side in ("dense", "sparse")},
        "sparsity_model_wide": (found.get("sparsity") or {}).get("model_wide"),
    }
    if metric.get("sparse") is not None:
        content[name] = in_words(name, metric)
    if "forward" in latency:
        content["forward_speedup"] = latency["forward"]["1"].get("speedup")
    else:
        content["decode_speedup"] = (latency.get("decode") or {}).get("speedup")
    if found["error"]:
        content["error"] = found["error"]["message"]
    return json.dumps(content, ensure_ascii=False)


def significant(metric: dict, side: str) -> float | None:
    """A figure of either model without digits that even the (paired) error of the difference does not reach."""
    value, errors = metric.get(side), [metric.get(f"{side}_stderr"), metric.get("difference_stderr")]
    if value is None or not any(errors):
        return value
    return float(rounded(value, min(e for e in errors if e)))


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
        if name == "nll":
            continue
        label = f"{name}, {metric['tokens']} tokens: LITTLE TEXT" if metric.get("little_text") else name
        both = (uncertain(metric[side], metric.get(f"{side}_stderr")) for side in ("dense", "sparse"))
        grid.add_row(label, *both, change(name, metric))
    sparsity_rows(grid, found["sparsity"])
    macs, traffic = found["macs"], found["bytes"]
    per = f"per {macs.get('per', 'decoded token')}"
    grid.add_row(f"MACs {per}", scaled(macs["dense"]), scaled(macs["sparse"]), ratio(macs["dense"], macs["sparse"]))
    scored = macs.get("scored")
    if scored and scored["sparse"] != macs["sparse"]:  # a prompt policy left some of the scored tokens dense
        change_scored = ratio(scored["dense"], scored["sparse"])
        grid.add_row("MACs, over the scored tokens", scaled(scored["dense"]), scaled(scored["sparse"]), change_scored)
    grid.add_row("FLOPs (2 x MACs)", scaled(2 * macs["dense"]), scaled(2 * macs["sparse"]), "")
    grid.add_row(
        "MACs the kernel executed",
        scaled(macs["dense"]),
        scaled(macs["executed"]),
        ratio(macs["dense"], macs["executed"]),
    )
    grid.add_row(
        f"bytes {per}",
        scaled(traffic["dense"], "B"),
        scaled(traffic["sparse"], "B"),
        ratio(traffic["dense"], traffic["sparse"]),
    )
    latency_rows(grid, found["latency"] or {})
    if found.get("estimate"):
        guess = found["estimate"]["decode"]
        grid.add_row(
            f"decode on {found['estimate']['target']} (ms), ESTIMATE", f"~{guess['dense_ms']:.3f}", f"~{guess['sparse_ms']:.3f}",
            f"estimated {guess['speedup']:.2f}x",
        )  # fmt: skip
    memory = found["memory"]
    grid.add_row(
        "weights in memory", scaled(memory["dense_weight_bytes"], "B"), scaled(memory["weight_bytes"], "B"), ""
    )
    grid.add_row("peak memory of the run", "", scaled(memory["peak_bytes"], "B"), "")
    return grid


def sparsity_rows(grid: Table, measured: dict) -> None:
    """Measured sparsity, model-wide and by role; with a baseline of its own (activation maps), both and the change."""
    base = measured.get("baseline")
    roles, base_roles = by_role(measured["per_site"]), by_role(base["per_site"]) if base else {}
    rows = [(measured.get("label", "sparsity, model-wide (measured)"), "model_wide")]
    rows += [(label, key) for key, label in measured.get("more", {}).items()]
    for label, key in rows:
        before = base.get(key) if base else None
        change = "" if before is None else gain(before, measured[key])
        grid.add_row(label, "-" if before is None else f"{before:.2%}", f"{measured[key]:.2%}", change)
    for role, (share, count) in roles.items():
        before = f"{base_roles[role][0]:.2%}" if role in base_roles else "-"
        grid.add_row(f"  {role} ({count} {measured.get('sites', 'maps')})", before, f"{share:.2%}", "")
    if measured.get("weights", 0) > 0.01:
        grid.add_row("weight sparsity (measured)", "-", f"{measured['weights']:.2%}", "")


def gain(before: float, after: float) -> str:
    """A change of a share in points and relative to where it started."""
    relative = f" ({(after - before) / before:+.1%})" if before else ""
    return f"{100 * (after - before):+.2f} points{relative}"


def latency_rows(grid: Table, latency: dict) -> None:
    """Dense and sparse times: decode and prefill of a language model, whole forward passes of a classifier."""
    for part in ("decode", "prefill"):
        if part not in latency:
            continue
        times = latency[part]
        dense, sparse = times["dense"]["median_ms"], times["sparse"]["median_ms"]
        label = (
            f"decode, context {times['context']} (ms)"
            if part == "decode"
            else f"prefill, {times['tokens']} tokens (ms)"
        )
        kernel = latency["kernel"] if part == "decode" else times["kernel"]
        label += f", {times['sparse_engine']}" if part == "decode" else ""
        claim = f"speed-up {times['speedup']:.2f}x" if "speedup" in times else "simulated" if kernel else "-"
        grid.add_row(f"{label}, {kernel or 'dense'}", f"{dense:.3f}", f"{sparse:.3f}", claim)
    if "break_even_sparsity" in latency.get("decode", {}):
        point = latency["decode"]["break_even_sparsity"]
        grid.add_row("decode break-even sparsity", "", "not reached" if point is None else f"{point:.0%}", "")
    for times in latency.get("forward", {}).values():
        dense, sparse = times["dense"]["median_ms"], times["sparse"]["median_ms"]
        claim = f"speed-up {times['speedup']:.2f}x" if "speedup" in times else "no speed-up claimed"
        label = f"forward, batch {times['batch']} (ms), {times['kernel'] or 'dense'}"
        grid.add_row(label, f"{dense:.3f}", f"{sparse:.3f}", claim)


def by_role(per_site: dict) -> dict[str, tuple[float, int]]:
    """Per kind of site: (sparsity over its sites by their weight, number of sites)."""
    groups: dict[str, list] = {}
    for name, site in per_site.items():
        groups.setdefault(site.get("role", name.rpartition(".")[2]), []).append(site)
    return {
        role: (sum(s["sparsity"] * s["weight"] for s in sites) / sum(s["weight"] for s in sites), len(sites))
        for role, sites in groups.items()
    }
