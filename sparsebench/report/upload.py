"""Late upload: records made without W&B (or whose server was away) become W&B runs, and the report a run of its own.

A run's id is its identity, so that sending the same records twice makes no second run. With WANDB_MODE=offline all of
it goes to files below the report, for `wandb sync`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import wandb

from sparsebench.records import tracking
from sparsebench.report import equal_terms, export, step_tables, tables
from sparsebench.report.groups import Group, groups
from sparsebench.report.rows import Collection

log = logging.getLogger(__name__)


def send(collection: Collection, folder: Path, project: str) -> int:
    """Send every record and the report in `folder`; returns how many records were taken."""
    mode = "offline" if os.environ.get("WANDB_MODE") == "offline" else "online"
    settings = {"mode": mode, "project": project, "entity": None, "group": None, "artifacts": False}
    sent = 0
    for path, content in [*((r.path, r.record) for r in collection.finished), *collection.failed]:
        own = {**settings, "group": (content["config"].get("wandb") or {}).get("group")}
        tracker = tracking.start(own, content["name"], folder, content["config"], run_id=content["config_hash"][:16])
        if isinstance(tracker, tracking.NullTracker):
            log.warning("not sent: %s", path)
            continue
        tracker.finish(content)
        sent += 1
    send_report(collection, folder, settings)
    wandb.teardown()  # waits until everything is written or sent
    return sent


def send_report(collection: Collection, folder: Path, settings: dict) -> None:
    """The report as one W&B run: its page, its charts, all figures as a table, and for each protocol its comparisons."""
    tracker = tracking.start(settings, f"report of {len(collection)} records", folder, {})
    if isinstance(tracker, tracking.NullTracker):
        return
    try:
        parts = groups(collection.finished)
        content = {
            p.stem: wandb.Image(str(p)) for p in sorted([*folder.glob("group-*.png"), *folder.glob("across-*.png")])
        }
        every = export.lines(parts)
        if every:
            content["runs"] = wandb.Table(columns=list(every[0]), data=[list(line.values()) for line in every])
        for i, group in enumerate(parts):
            content |= {f"{name}-{i + 1}": as_wandb(table) for name, table in comparisons(group).items()}
            content |= {f"{name}-{i + 1}": plot for name, plot in plots(group).items()}
        content["report"] = wandb.Html((folder / "report.html").read_text(), inject=False)
        tracker.run.log(content)
        tracker.run.finish()
    except Exception as error:
        log.warning("W&B: %s", error)


def as_wandb(table: tables.Table) -> wandb.Table:
    return wandb.Table(columns=table.head, data=table.rows)


def comparisons(group: Group) -> dict[str, tables.Table]:
    """A protocol's tables: its rows, its curves at equal terms, the comparisons that can be quoted, and its steps."""
    made = {"table": tables.comparison(group)}
    every = equal_terms.standings(group)
    quoted = tables.comparisons(every)
    if quoted is not None:
        by_axis: dict[str, list[equal_terms.Standing]] = {}
        for each in every:
            by_axis.setdefault(f"at equal {each.axis.name} {each.axis.machine}".strip(), []).append(each)
        made |= {"comparisons": quoted} | {name: tables.equal_terms(those) for name, those in by_axis.items()}
    steps = {
        "where a step's time goes": step_tables.where_time_goes(group),
        "over the batch": step_tables.batches(group),
    }
    return made | {name: table for name, table in steps.items() if table is not None}


def plots(group: Group) -> dict:
    """Quality over sparsity and over work as W&B's own plots, which its workspace can filter."""
    rows = [r for r in group.rows if r.metric and r.sparse is not None and not group.random]
    data = [[r.series, r.sparsity, r.scored_macs, r.sparse] for r in rows if None not in (r.sparsity, r.scored_macs)]
    if not data:
        return {}
    metric = group.protocol["metric"]
    table = wandb.Table(columns=["curve", "sparsity", "work", metric], data=data)
    return {
        f"{metric} over {x}": wandb.plot.scatter(table, x, metric, title=f"{metric} over {x}")
        for x in ("sparsity", "work")
    }
