"""What a person sees of a record: a table on the terminal and one line of JSON as the last line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsebench.records.files import printable, scrub, scrubbed
from sparsebench.records.wording import change, gain, in_words, percent, ratio, rounded, scaled, uncertain

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # of a console that prints text as it is


def headline(record: dict[str, Any], path: Path) -> str:
    """One line of JSON for scripts: the main figures of a record and where it lies."""
    quality, latency = record.get("quality") or {}, record.get("latency") or {}
    name = "accuracy" if "accuracy" in quality else "perplexity"
    metric = quality.get(name) or {}
    content = {
        "status": record["status"],
        "name": record["name"],
        "record": str(path),
        **{f"{name}_{side}": significant(metric, side) for side in ("dense", "sparse")},
        "sparsity_model_wide": (record.get("sparsity") or {}).get("model_wide"),
    }
    if metric.get("sparse") is not None:
        content[name] = in_words(name, metric)
    part, times = timed(latency)
    content[f"{part}_speedup"] = times.get("speedup")
    for side in ("dense", "sparse"):
        content[f"{part}_{side}_ms"] = quantiles(times[side]) if side in times else None
    content["dense_engine"], content["noisy"] = times.get("dense_engine"), latency.get("noisy")
    if record["error"]:
        content["error"] = record["error"]["message"]
    return json.dumps(content, ensure_ascii=False)


def significant(metric: dict[str, Any], side: str) -> float | None:
    """A figure of either model without digits that even the (paired) error of the difference does not reach."""
    value, errors = metric.get(side), [metric.get(f"{side}_stderr"), metric.get("difference_stderr")]
    if value is None or not any(errors):
        return value
    return float(rounded(value, min(e for e in errors if e)))


def timed(latency: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, times) of the pair that stands for a latency section: a decode step, or a forward pass of one example."""
    if "forward" in latency:
        return "forward", next(iter(latency["forward"].values()), {})  # the smallest batch stands first
    return "decode", latency.get("decode") or {}


def quantiles(times: dict[str, Any]) -> dict[str, float]:
    """Median, p10 and p90 in ms, without the samples."""
    return {name: times[name] for name in ("median_ms", "p10_ms", "p90_ms")}


def show(record: dict[str, Any], path: Path) -> None:
    """Print a record: its table (or why it failed), where it lies, and the line of JSON. What it says is text: no markup,
    no secrets, no control characters."""
    record, path = printable(scrubbed(record)), Path(scrub(str(path)))
    console = Console(**PLAIN, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    if record["status"] != "finished":
        Console(**PLAIN, stderr=True, soft_wrap=True).print(
            f"{record['status']}: {(record['error'] or {}).get('message')}", style="red"
        )
    else:
        console.print(table(record))
        for line in said(record):
            console.print(line, markup=False)
        for line in notes(record):
            console.print(line, style="yellow")
    console.print(f"record: {path}")
    if record["status"] == "finished":
        console.print(next_step(path.parents[3] if len(path.parents) > 3 else path.parent))
    print(headline(record, path), flush=True)


def next_step(folder: Path) -> str:
    """What to do with records below `folder`."""
    return f"next: sparsebench-report {shlex.quote(str(folder))}  # all runs on one page, compared at equal terms"


def said(content: dict[str, Any]) -> list[str]:
    """What both models make of one prompt, one line each."""
    texts = (content.get("extra") or {}).get("continuation")
    if not texts:
        return []
    quoted = {side: json.dumps(texts[side]["text"], ensure_ascii=False) for side in ("dense", "sparse")}
    prompt = json.dumps(texts["dense"]["prompt"], ensure_ascii=False)
    return [f"prompt  {prompt}", *(f"{side:<7} {text}" for side, text in quoted.items())]


def notes(record: dict[str, Any]) -> list[str]:
    """What must be known before figures of the table are used, one line each."""
    latency, estimate = record.get("latency") or {}, record.get("estimate") or {}
    lines = [f"NOISY, times are not to be trusted: {'; '.join(latency['reasons'])}"] if latency.get("noisy") else []
    lines += [f"model: {caution}" for caution in (record.get("model") or {}).get("cautions", [])]
    section = (latency.get("decode") or {}).get("break_even")
    if section and section["reason"]:
        lines.append(f"no break-even: {section['reason']}")
    return lines + [f"estimate: {caution}" for caution in estimate.get("cautions", [])]


def toy(model: dict[str, Any]) -> str:
    """What is said beside the name of a model that ships with the package."""
    if not str(model.get("source")).startswith("builtin:"):
        return ""
    return f" (a toy of {scaled(model.get('num_parameters') or 0)} parameters: for comparing methods, not for their figures)"


def stored_as(model: dict[str, Any]) -> str:
    """What is said beside the name of a model whose weights are quantised: both columns are of it."""
    about = model.get("quantisation")
    if not about:
        return ""
    groups = f", groups of {about['group']}" if about.get("group") else ""
    kinds = about["bits"] if isinstance(about["bits"], list) else [about["bits"]]
    bits = f"{about['bits_per_weight']:.2f} bits a weight"
    return (
        f"\nblock maps in int{' and int'.join(map(str, kinds))}{groups} ({about['rounding']}, {bits}), in both columns"
    )


def table(record: dict[str, Any]) -> Table:
    """The run's figures, dense beside sparse."""
    model = record.get("model") or {}
    grid = Table(title=Text(record["name"]) + toy(model) + stored_as(model), title_justify="left")
    grid.add_column("")
    for name in ("dense", "sparse", "sparse / dense"):
        grid.add_column(name, justify="right")
    for name, metric in (record["quality"] or {}).items():
        if name == "nll":
            continue
        label = f"{name}, {metric['tokens']} tokens: LITTLE TEXT" if metric.get("little_text") else name
        both = (uncertain(metric[side], metric.get(f"{side}_stderr")) for side in ("dense", "sparse"))
        grid.add_row(label, *both, change(name, metric))
    corner_rows(grid, ((record["quality"] or {}).get("nll") or {}).get("corners"))
    if record["sparsity"]:
        sparsity_rows(grid, record["sparsity"])
    if (record.get("extra") or {}).get("critical"):
        critical_row(grid, record["extra"]["critical"])
    if record["macs"]:
        cost_rows(grid, record["macs"])
    if record["bytes"]:
        grid.add_row(f"bytes {per(record['macs'] or {})}", *sides(record["bytes"], "B"))
    latency_rows(grid, record["latency"] or {})
    if record.get("estimate"):
        guess = record["estimate"]["decode"]
        grid.add_row(
            f"decode on {record['estimate']['target']} (ms), ESTIMATE", f"~{guess['dense_ms']:.3f}", f"~{guess['sparse_ms']:.3f}",
            f"estimated {guess['speedup']:.2f}x",
        )  # fmt: skip
    if record["memory"]:
        memory_rows(grid, record["memory"])
    return grid


def corner_rows(grid: Table, corners: dict[str, Any] | None) -> None:
    """Of a quantised model: perplexity before it was quantised, and what quantisation and sparsity cost apart and together."""
    if not corners:
        return
    before, added = corners["perplexity"], corners["delta_nll"]
    cells = (f"{before[n]:.4g}" for n in ("dense", "sparse"))
    grid.add_row("  perplexity, not quantised", *cells, f"{before['sparse'] / before['dense']:.3f}x")
    both = (f"{added[name]:+.4f}" for name in ("quantised", "sparse_quantised"))
    grid.add_row("  NLL above dense, not quantised", *both, f"sparsity alone {added['sparse']:+.4f}")
    grid.add_row(
        "  interaction (0: errors add up)", "", uncertain(corners["interaction"], corners["interaction_stderr"]), ""
    )


def per(macs: dict[str, Any]) -> str:
    return f"per {macs.get('per', 'decoded token')}"


def sides(pair: dict[str, Any], unit: str = "") -> tuple[str, str, str]:
    """Dense, sparse, and sparse over dense."""
    return scaled(pair["dense"], unit), scaled(pair["sparse"], unit), ratio(pair["dense"], pair["sparse"])


def cost_rows(grid: Table, macs: dict[str, Any]) -> None:
    """MACs of a decoded token (or image, text), over the scored tokens where those are others, and as timed."""
    grid.add_row(f"MACs {per(macs)}", *sides(macs))
    scored = macs.get("scored")
    if scored and scored["sparse"] != macs["sparse"]:  # a prompt policy left some of the scored tokens dense
        grid.add_row("MACs, over the scored tokens", *sides(scored))
    twice = (None if macs[side] is None else 2 * macs[side] for side in ("dense", "sparse"))
    grid.add_row("FLOPs (2 x MACs)", *map(scaled, twice), "")
    timed = macs["executed"] is not None
    ran = (scaled(macs["executed"]), ratio(macs["dense"], macs["executed"])) if timed else ("not timed", "")
    grid.add_row("MACs executed while timed", scaled(macs["dense"]), *ran)


def memory_rows(grid: Table, memory: dict[str, Any]) -> None:
    """Weights, what each model's own call needs on a GPU, and the run's peak, which is of neither model alone."""
    both = ("dense_weight_bytes", "weight_bytes")
    grid.add_row(
        "weights in memory", *(scaled(memory.get(key), "B") for key in both), ratio(*(memory.get(key) for key in both))
    )
    if memory.get("unquantised_weight_bytes"):
        grid.add_row("  dense, not quantised", scaled(memory["unquantised_weight_bytes"], "B"), "", "")
    for name, peaks in (memory.get("peaks") or {}).items():
        cells = (scaled(peaks[side], "B") for side in ("dense", "sparse"))
        grid.add_row(f"peak memory, {name}", *cells, ratio(peaks["dense"], peaks["sparse"]))
    where = memory.get("peak_of", "run")
    of_model = memory.get("peak_ratio")
    times = f", {of_model:.2f} of the model with its cache" if of_model and where == "device" else ""
    grid.add_row(f"peak of the {where}, both models: {scaled(memory.get('peak_bytes'), 'B')}{times}", "", "", "")
    if memory.get("second_copy"):
        grid.add_row(f"  held twice: {memory['second_copy']}", "", "", "")


def sparsity_rows(grid: Table, measured: dict[str, Any]) -> None:
    """Measured sparsity, model-wide and by role; with a baseline of its own (activation maps), both and the change."""
    base = measured.get("baseline")
    roles, base_roles = by_role(measured["per_site"]), by_role(base["per_site"]) if base else {}
    rows = [(measured.get("label", "sparsity, model-wide (measured)"), "model_wide")]
    rows += [(label, key) for key, label in measured.get("more", {}).items()]
    for label, key in rows:
        before = base.get(key) if base else None
        after = measured.get(key)
        change = "" if before is None or after is None else gain(before, after)
        grid.add_row(label, percent(before), percent(after), change)
    for role, (share, count) in roles.items():
        before = percent(base_roles[role][0] if role in base_roles else None)
        grid.add_row(f"  {role} ({count} {measured.get('sites', 'maps')})", before, percent(share), "")
    if measured.get("weights", 0) > 0.01:
        grid.add_row("weight sparsity (measured)", "-", f"{measured['weights']:.2%}", "")


def critical_row(grid: Table, section: dict[str, Any]) -> None:
    """Critical sparsity with its interval, and the setting of the knob that gives it; never clipped."""
    label = f"critical sparsity on dev: {section['share']:.0%} of {section['metric'].replace('_', ' ')} kept"
    where = section["status"] if section["value"] is None else f"{section['knob']}={section['value']:.4g}"
    grid.add_row(label, "", critical(section), where)


def critical(section: dict[str, Any]) -> str:
    """42.0% [41.2%, 42.9%]; `at least` where the method's whole range passes, `unreachable` where none of it does."""
    if section["sparsity"] is None:
        return str(section["status"])
    least = "at least " if section["status"].startswith("beyond") else ""
    if section["low"] is None and section["high"] is None:
        return f"{least}{section['sparsity']:.1%}"
    low, high = ("?" if section[end] is None else f"{section[end]:.1%}" for end in ("low", "high"))
    return f"{least}{section['sparsity']:.1%} [{low}, {high}]"


def latency_rows(grid: Table, latency: dict[str, Any]) -> None:
    """Dense and sparse times with p10 and p90: decode and prefill of a language model, forward passes of a classifier."""
    for part in ("decode", "prefill"):
        if not latency.get(part):
            continue
        times = latency[part]
        if part == "decode":
            label, kernel = f"decode, context {times['context']} (ms), {times['sparse_engine']}", latency["kernel"]
        else:
            label, kernel = f"prefill, {times['tokens']} tokens (ms)", times["kernel"]
        add_times(grid, f"{label}, {kernel or 'dense'}", times, "simulated" if kernel else "-", latency.get("noisy"))
        if part == "decode":
            grid.add_row("  dense engine (others)", times["dense_engine"], "", engines_beside(times))
            if latency.get("limit"):
                grid.add_row("  of the bytes limit here", *limit_cells(latency["limit"]))
            if "unquantised" in times:
                whole = times["unquantised"]
                faster = whole["median_ms"] / times["sparse"]["median_ms"]
                label = f"  dense, not quantised: {whole['dtype']}, {whole['engine']}"
                grid.add_row(label, f"{whole['median_ms']:.3f}", "", f"sparse: {faster:.2f}x as fast")
    if "break_even" in (latency.get("decode") or {}):
        grid.add_row("decode break-even sparsity", "", *break_even_cells(latency["decode"]["break_even"]))
    for times in latency.get("forward", {}).values():
        label = f"forward, batch {times['batch']} (ms), {times['kernel'] or 'dense'}"
        add_times(grid, label, times, "no speed-up claimed", latency.get("noisy"))
    energy = latency.get("energy") or {}
    if energy.get("source"):
        joules = {side: energy[side]["joules"] for side in ("dense", "sparse")}
        grid.add_row(f"energy per {energy['per']}, {energy['source']}", *sides(joules, "J"))


def add_times(grid: Table, label: str, times: dict[str, Any], unclaimed: str, noisy: bool | None) -> None:
    """Medians, and the speed-up where one may be claimed; p10 and p90 of each in the row below; noise is marked."""
    claim = f"speed-up {times['speedup']:.2f}x" if "speedup" in times else unclaimed
    claim += " NOISY" * bool(noisy)
    grid.add_row(label, *(f"{times[side]['median_ms']:.3f}" for side in ("dense", "sparse")), claim)
    cells = (f"{times[side]['p10_ms']:.3f} - {times[side]['p90_ms']:.3f}" for side in ("dense", "sparse"))
    known = {"speedup_p10", "speedup_p90"} <= times.keys()
    within = f"{times['speedup_p10']:.2f} - {times['speedup_p90']:.2f}x" if known else ""
    grid.add_row("  p10 - p90", *cells, within)


def limit_cells(limit: dict[str, Any]) -> tuple[str, ...]:
    """Share of the bytes limit that each step reached, and the speed-up that the bytes allow."""
    shares = (limit["share"].get(side) for side in ("dense", "sparse"))
    cells = (percent(share) + " (cached)" * bool(share and share > 1) for share in shares)
    return *cells, f"the bytes allow {limit['speedup']:.2f}x" if "speedup" in limit else ""


def spread(times: dict[str, Any]) -> str:
    """median [p10, p90] in ms."""
    return f"{times['median_ms']:.3f} [{times['p10_ms']:.3f}, {times['p90_ms']:.3f}]"


def engines_beside(times: dict[str, Any]) -> str:
    """The other dense engines' medians, and those that could not be had."""
    others = [
        f"{name.partition('/')[2]} {each['median_ms']:.3f}"
        for name, each in times["engines"].items()
        if name.startswith("dense/") and name != f"dense/{times['dense_engine']}"
    ]
    return ", ".join([*others, *(f"no {name}" for name in times.get("refused", {}))])


def break_even_cells(section: dict[str, Any]) -> tuple[str, str]:
    """(sparsity, its p10 and p90); the reason where there is none is a note."""
    if section["sparsity"] is None:
        return "none", ""
    low, high = ("not reached" if section[key] is None else f"{section[key]:.0%}" for key in ("p10", "p90"))
    return f"{section['sparsity']:.0%}", f"{low} - {high}"


def by_role(per_site: dict[str, Any]) -> dict[str, tuple[float | None, int]]:
    """Per kind of site: (sparsity over its sites by their weight, None where nothing was counted; number of sites)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, site in per_site.items():
        groups.setdefault(site.get("role", name.rpartition(".")[2]), []).append(site)
    return {
        role: (weighted([s for s in sites if s["sparsity"] is not None]), len(sites)) for role, sites in groups.items()
    }


def weighted(sites: list[dict[str, Any]]) -> float | None:
    weight = sum(s["weight"] for s in sites)
    return sum(s["sparsity"] * s["weight"] for s in sites) / weight if weight else None
