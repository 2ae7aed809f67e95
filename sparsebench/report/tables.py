"""The report's tables as plain rows of text, the same in HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from sparsebench.config.identity import NOT_IDENTITY, digest
from sparsebench.records.terminal import scaled
from sparsebench.report import escape
from sparsebench.report.rows import Group, Row, differences, over_seeds

DASH = "–"


@dataclass
class Table:
    """head and rows of text; `numeric` columns stand right; marked rows are set off."""

    head: list[str]
    rows: list[list[str]]
    numeric: set[int]
    marked: set[int]
    note: str = ""


def number(value: float | None, form: str = ".4g", suffix: str = "") -> str:
    return DASH if value is None else f"{value:{form}}{suffix}"


def comparison(group: Group) -> Table:
    """The rows of one group, by method and sparsity; those on the Pareto front (sparsity, quality) are marked."""
    metric = group.protocol["metric"]
    head = ["run", "asked", "sparsity", "dense", metric, "change", "MACs", "executed", "bytes", "dense ms", "sparse ms",
            "speed-up", "roofline", "kernel", "fit s"]  # fmt: skip
    rows, marked = [], set()
    for i, row in enumerate(group.rows):
        time = row.decode
        if row.on_front:
            marked.add(i)
        rows.append([
            row.label + (" ◆" if row.on_front else ""), number(row.requested, ".0%"), number(row.sparsity, ".1%"),
            number(row.dense), number(row.sparse), number(row.change, ".3f", "x"), number(row.macs, ".1%"),
            number(row.executed, ".1%"), number(row.bytes, ".1%"), spread(time, "dense"), spread(time, "sparse"),
            speedup(row), number(row.roofline, ".2f", "x"),
            kernels(time), number(row.fit_seconds, ".1f"),
        ])  # fmt: skip
    note = (
        "◆ on the Pareto front of measured sparsity and quality. Sparsity is measured on test tokens and model-wide, asked is "
        "what was set. MACs and bytes are shares of the dense model's per decoded "
        "token: MACs counted, executed as the kernel ran, bytes of weights and cache read. Roofline: the speed-up that "
        "the bytes promise. Times are medians with p10 and p90 in brackets; dense is the fastest dense engine of the run "
        "on the untouched model, named before the kernel. “simulated” means that no kernel skipped work, so no speed-up "
        "is claimed; “noisy” that spread or load of the machine make the times worthless."
    )
    return Table(head, rows, set(range(1, 13)) | {14}, marked, note)


def spread(time: dict, side: str) -> str:
    """median [p10, p90] in ms."""
    median, low, high = (time.get(key) for key in (side, f"{side}_p10", f"{side}_p90"))
    return number(median, ".3f") + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def kernels(time: dict) -> str:
    """The dense engine and the kernel, where they are known."""
    return " / ".join(filter(None, (time.get("dense_engine"), time.get("kernel")))) or DASH


def speedup(row: Row) -> str:
    if row.decode.get("speedup"):
        return f"{row.decode['speedup']:.2f}x" + (" (noisy)" if row.noisy else "")
    return "simulated" if row.decode.get("kernel") and row.method != "dense" else DASH


def metrics(group: Group) -> Table | None:
    """Every further metric of the group's records, dense and sparse; None where there is only the main one."""
    names = list(dict.fromkeys(m for r in group.rows for m in (r.record.get("quality") or {})))
    names = [m for m in names if m not in (group.protocol["metric"], "nll")]
    if not names:
        return None
    rows = []
    for row in group.rows:
        quality = row.record.get("quality") or {}
        cells = [
            f"{number(quality[m]['dense'])} → {number(quality[m]['sparse'])}" if m in quality else DASH for m in names
        ]
        rows.append([row.label, *cells])
    return Table(["run", *names], rows, set(range(1, len(names) + 1)), set())


def seeds(group: Group) -> Table | None:
    means = over_seeds(group.rows)
    rows = [
        [
            s["label"],
            str(s["seeds"]),
            f"{s['sparsity']:.1%} ± {s['sparsity_sd']:.1%}",
            f"{s['mean']:.4g} ± {s['sd']:.2g}",
        ]
        for s in means
    ]
    head = ["setting", "seeds", "sparsity, mean ± s.d.", f"{group.protocol['metric']}, mean ± s.d."]
    return Table(head, rows, {1, 2, 3}, set()) if rows else None


def estimates(group: Group) -> Table | None:
    """Predicted times of absent targets, beside the same run measured on the target where the records hold one."""
    rows = []
    for row in group.rows:
        estimate = row.record.get("estimate")
        if not estimate:
            continue
        decode, real = estimate["decode"], on_target(row, group)
        rows.append([
            row.label, estimate["target"], f"≈ {decode['dense_ms']:.3f}", f"≈ {decode['sparse_ms']:.3f}",
            f"≈ {decode['speedup']:.2f}x", estimate["fitted_on"]["device"],
            f"{spread(real.decode, 'dense')}, {spread(real.decode, 'sparse')}, {speedup(real)}" if real else DASH,
            "; ".join(estimate["cautions"]) or DASH,
        ])  # fmt: skip
    head = ["run", "target", "dense ms", "sparse ms", "speed-up", "fitted on", "measured on the target", "caution"]
    note = "Estimates, not measurements: the target's roofline over the efficiency measured on the present device."
    return Table(head, rows, {2, 3, 4}, set(), note) if rows else None


def on_target(row: Row, group: Group) -> Row | None:
    """A measured row of the same settings on the device that `row` estimates, or None."""

    def settings(each: Row) -> dict:
        return {k: v for k, v in each.record["config"].items() if k not in (*NOT_IDENTITY, "hardware")}

    device = row.record["config"]["hardware"]["requires"]
    return next(
        (r for r in group.rows if device and device in r.machine and r.decode and not r.record.get("estimate")
         and digest(settings(r)) == digest(settings(row))), None,
    )  # fmt: skip


def protocols(groups: list[Group]) -> Table | None:
    """What keeps the groups apart; None where there is one group."""
    values = differences(groups)
    rows = [[k, *(shown(v) for v in each)] for k, each in values.items()]
    head = ["protocol", *(f"group {i + 1}" for i in range(len(groups)))]
    return Table(head, rows, set(), set()) if rows else None


def shown(value) -> str:
    text = DASH if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def machines(group: Group) -> list[str]:
    """The machines whose times stand in one table."""
    return list(dict.fromkeys(r.machine for r in group.rows if r.times))


def busy(group: Group) -> str | None:
    """A warning where times were taken on a machine that had more to do than it has cores."""
    loads = [
        (env["load_average"][0], env.get("cores"))
        for env in (r.record.get("env") or {} for r in group.rows if r.times)
        if env.get("load_average") and env.get("cores") and "cuda" not in str((env.get("hardware") or {}).get("device"))
    ]
    over = [(load, cores) for load, cores in loads if load > cores]
    if not over:
        return None
    load, cores = max(over)
    return (
        f"{len(over)} of {len(loads)} runs started on a busy machine (load average up to {load:.1f} on {cores} cores): "
        "their times and speed-ups are not to be trusted."
    )


def beside(lines: list) -> Table | None:
    """Published figures about the very model of the row, one to a line."""
    rows = [
        [b.row.label, b.metric, b.ours, b.published, b.source, "; ".join(b.differs) or "nothing"]
        for b in lines
        if b.exact
    ]
    return (
        Table(["run", "metric", "measured", "published", "source", "what differs"], rows, set(), set())
        if rows
        else None
    )


def beside_other_models(lines: list) -> Table | None:
    """Published figures about other models, those of one run and metric together on a line."""
    by_run: dict[tuple, list] = {}
    for each in sorted((b for b in lines if not b.exact), key=lambda b: (b.metric, b.row.label, str(b.row.path))):
        by_run.setdefault((each.metric, each.row.path), []).append(each)
    rows = []
    for same in by_run.values():
        first, figures = (
            same[0],
            "; ".join(f"{b.model}: {b.published}{' (unverified)' * ('unverified' in b.source)}" for b in same),
        )
        settings = dict.fromkeys(d for b in same for d in b.differs if not d.startswith("model "))
        sources = dict.fromkeys(b.source.rpartition("; ")[0] for b in same)
        rows.append(
            [first.row.label, first.metric, first.ours, figures, "; ".join(sources), "; ".join(settings) or "nothing"]
        )
    head = ["run", "metric", "measured", "published, by model", "source", "what else differs"]
    return Table(head, rows, set(), set()) if rows else None


def failures(failed: list) -> Table:
    rows = [[r["name"], r["status"], (r.get("error") or {}).get("message") or DASH, str(path)] for path, r in failed]
    return Table(["run", "status", "reason", "record"], rows, set(), set())


def as_markdown(table: Table, foreign: bool = False) -> str:
    """The table as Markdown. foreign: the cells are anybody's text; else they may hold links and the like."""

    def cells(row: list[str]) -> str:
        shown = escape.markdown if foreign else escape.in_cell
        return "| " + " | ".join(map(shown, row)) + " |"

    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.head))]
    lines = [cells(table.head), "|" + "|".join(rule) + "|", *map(cells, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def as_csv(groups: list[Group]) -> str:
    """One line per finished record, numbers unrounded, empty where not measured."""
    file = io.StringIO()
    columns = ["group", "name", "label", "method", "model", "dataset", "metric", "dense", "sparse", "sparsity_requested",
               "sparsity_measured", "macs_share", "executed_share", "bytes_share", "dense_ms", "sparse_ms", "speedup",
               "dense_p10_ms", "dense_p90_ms", "sparse_p10_ms", "sparse_p90_ms", "dense_engine", "noisy",
               "roofline", "kernel", "machine", "fit_seconds", "seconds", "seed", "estimate_target", "estimate_sparse_ms",
               "config_hash", "record"]  # fmt: skip
    writer = csv.writer(file)
    writer.writerow(columns)
    for i, group in enumerate(groups):
        for row in group.rows:
            settings, time = row.record["config"], row.decode
            estimate = row.record.get("estimate") or {}
            writer.writerow(map(escape.csv_cell, [
                i + 1, row.record["name"], row.label, row.method, settings["model"]["name"], settings["dataset"]["name"],
                row.metric, row.dense, row.sparse, row.requested, row.sparsity, row.macs, row.executed, row.bytes,
                time.get("dense"), time.get("sparse"), time.get("speedup"), time.get("dense_p10"), time.get("dense_p90"),
                time.get("sparse_p10"), time.get("sparse_p90"), time.get("dense_engine"), row.noisy,
                row.roofline, time.get("kernel"), row.machine,
                row.fit_seconds, row.record["seconds"], settings["seed"], estimate.get("target"),
                (estimate.get("decode") or {}).get("sparse_ms"), row.record["config_hash"], row.path,
            ]))  # fmt: skip
    return file.getvalue()


def totals(rows: list[Row]) -> str:
    """How long the finished runs took together."""
    return scaled(sum(r.record["seconds"] for r in rows), "s")
