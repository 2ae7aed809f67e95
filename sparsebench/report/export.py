"""The report's figures for other programs and for papers: every finished run with all of them, as CSV and as tidy
Parquet; tables as Markdown and as LaTeX (booktabs).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsebench.records import archive
from sparsebench.report import escape
from sparsebench.report.groups import Group
from sparsebench.report.rows import Row
from sparsebench.report.tables import Table


def figures(row: Row) -> dict[str, Any]:
    """Everything that a run's line holds: numbers unrounded, None where not measured."""
    record, time = row.record, row.decode
    settings, env, latency = record["config"], record.get("env") or {}, record.get("latency") or {}
    quality = (record.get("quality") or {}).get(row.metric or "") or {}
    costs, memory = record.get("macs") or {}, record.get("memory") or {}
    estimate, break_even = record.get("estimate") or {}, (latency.get("decode") or {}).get("break_even") or {}
    versions, load = env.get("versions") or {}, env.get("load_average") or [None]
    return {
        "name": record["name"], "label": row.label, "series": row.series, "method": row.method,
        "model": settings["model"]["name"], "dataset": settings["dataset"]["name"], "seed": settings.get("seed"),
        "metric": row.metric, "dense": row.dense, "sparse": row.sparse, "dense_stderr": row.dense_stderr,
        "sparse_stderr": row.sparse_stderr, "difference_stderr": row.difference_stderr,
        "higher_is_better": row.higher_is_better if row.metric else None, "little_text": quality.get("little_text"),
        "sparsity_requested": row.requested, "sparsity_measured": row.sparsity,
        "macs_share": row.macs, "scored_macs_share": row.scored_macs, "ffn_macs_share": row.ffn_macs,
        "executed_share": row.executed, "bytes_share": row.bytes, "scored_bytes_share": row.scored_bytes,
        "dense_flops": doubled(costs.get("dense")), "sparse_flops": doubled(costs.get("sparse")),
        "dense_ms": time.get("dense"), "dense_p10_ms": time.get("dense_p10"), "dense_p90_ms": time.get("dense_p90"),
        "sparse_ms": time.get("sparse"), "sparse_p10_ms": time.get("sparse_p10"), "sparse_p90_ms": time.get("sparse_p90"),
        "dense_per_s": row.per_second("dense"), "sparse_per_s": row.per_second("sparse"), "speedup": time.get("speedup"),
        "speedup_p10": time.get("speedup_p10"), "speedup_p90": time.get("speedup_p90"), "roofline": row.roofline,
        "dense_of_limit": row.of_limit.get("of_limit_dense"), "sparse_of_limit": row.of_limit.get("of_limit_sparse"),
        "read_bandwidth_gbs": (latency.get("limit") or {}).get("read_bandwidth_gbs"),
        "dense_joules": row.joules.get("dense"), "sparse_joules": row.joules.get("sparse"),
        "energy_source": (latency.get("energy") or {}).get("source"),
        "break_even_sparsity": break_even.get("sparsity"), "noisy": row.noisy,
        "dense_engine": time.get("dense_engine"), "sparse_engine": time.get("sparse_engine"), "kernel": time.get("kernel"),
        "weight_bytes_dense": memory.get("dense_weight_bytes"), "weight_bytes_sparse": memory.get("weight_bytes"),
        "peak_bytes": memory.get("peak_bytes"), "fit_seconds": row.fit_seconds, "seconds": record["seconds"],
        "machine": row.machine, "device": archive.device(env), "load_average": load[0], "cores": env.get("cores"),
        "sparsebench": versions.get("sparsebench"), "torch": versions.get("torch"),
        "transformers": versions.get("transformers"), "commit": env.get("git_commit"), "started_at": record.get("started_at"),
        "command": archive.command(env.get("argv") or [], False), "estimate_target": estimate.get("target"),
        "estimate_sparse_ms": (estimate.get("decode") or {}).get("sparse_ms"), "config_hash": record["config_hash"],
        "record": str(row.path),
    }  # fmt: skip


def doubled(macs: float | None) -> float | None:
    """FLOPs of so many multiply-accumulates."""
    return None if macs is None else 2 * macs


def lines(groups: list[Group]) -> list[dict[str, Any]]:
    """One line per finished run, with the number of its group on the page (the dense model may stand in several)."""
    every = [(i + 1, row, roles(row)) for i, group in enumerate(groups) for row in group.rows]
    names = dict.fromkeys(name for _, _, told in every for name in told)
    return [{"group": i, **figures(row), **{name: told.get(name) for name in names}} for i, row, told in every]


def roles(row: Row) -> dict[str, float]:
    """Milliseconds of a step by side and role, e.g. `dense_gate_up_ms`, where marks were taken."""
    return {f"{side}_{role}_ms": ms for side, told in row.by_kernel.items() for role, ms in told["ms"].items()}


def as_csv(groups: list[Group]) -> str:
    """Numbers unrounded, empty where not measured."""
    file, every = io.StringIO(), lines(groups)
    writer = csv.DictWriter(file, list(every[0]) if every else ["group"])
    writer.writeheader()
    writer.writerows([{k: escape.csv_cell(v) for k, v in line.items()} for line in every])
    return file.getvalue()


WHOLE, SWITCHES = ("group", "seed", "cores"), ("higher_is_better", "little_text", "noisy")
TEXT = ("name", "label", "series", "method", "model", "dataset", "metric", "dense_engine", "sparse_engine", "kernel",
        "machine", "device", "sparsebench", "torch", "transformers", "commit", "started_at", "command", "estimate_target",
        "energy_source", "config_hash", "record")  # fmt: skip


def as_parquet(groups: list[Group]) -> bytes:
    """The same with types, for pandas, Polars or DuckDB."""
    every = lines(groups)
    kinds = dict.fromkeys(TEXT, pa.string()) | dict.fromkeys(WHOLE, pa.int64()) | dict.fromkeys(SWITCHES, pa.bool_())
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in (every[0] if every else ["group"])])
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(every, schema=schema), file)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Tables as text


def as_markdown(table: Table, foreign: bool = False) -> str:
    """The table as Markdown. foreign: the cells are anybody's text; else they may hold links and the like."""

    def cells(row: list[str]) -> str:
        shown = escape.markdown if foreign else escape.in_cell
        return "| " + " | ".join(map(shown, row)) + " |"

    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.head))]
    lines = [cells(table.head), "|" + "|".join(rule) + "|", *map(cells, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


PAGE_OF_ROWS = 40  # rows from which a table does not fit on a page
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
           "≈": r"$\approx$", "◆": r"$\blacklozenge$", "◇": r"$\lozenge$", "–": "--", "…": r"\ldots{}", "×": r"$\times$", "“": "``",
           "”": "''", **{c: f"\\{c}" for c in "&%$#_{}"}}  # fmt: skip


def escaped(text: str) -> str:
    r"""Text as LaTeX prints it. ◆ needs amssymb."""
    return "".join(SPECIAL.get(c, c) for c in " ".join(text.split()))


def as_latex(table: Table, caption: str) -> str:
    """A floating table in the manner of booktabs; one that no page holds goes on over several."""
    form = "".join("r" if i in table.numeric else "l" for i in range(len(table.head)))
    rows = [" & ".join(map(escaped, row)) + r" \\" for row in table.rows]
    if len(rows) > PAGE_OF_ROWS:
        return "\n".join([
            rf"\begin{{longtable}}{{{form}}}", rf"\caption{{{escaped(caption)}}}\\", r"\toprule",
            " & ".join(map(escaped, table.head)) + r" \\", r"\midrule", r"\endhead", *rows, r"\bottomrule", r"\end{longtable}",
        ]) + "\n"  # fmt: skip
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption)}}}", r"\small", rf"\begin{{tabular}}{{{form}}}",
        r"\toprule", " & ".join(map(escaped, table.head)) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}",
        r"\end{table}",
    ]) + "\n"  # fmt: skip


LATEX_HEAD = "% Made by sparsebench-report. Needs \\usepackage{booktabs,longtable,amssymb}.\n"


def latex_file(tables: Iterable[tuple[str, Table]]) -> str:
    """report.tex: tables with captions, to be taken in by \\input."""
    return LATEX_HEAD + "\n".join(as_latex(table, caption) for caption, table in tables)
