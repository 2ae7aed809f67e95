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
from sparsebench.report import tables
from sparsebench.report.rows import Collection, groups

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
    """The tables, plots and page of the report as one W&B run."""
    tracker = tracking.start(settings, f"report of {len(collection)} records", folder, {})
    if isinstance(tracker, tracking.NullTracker):
        return
    try:
        content = {p.stem: wandb.Image(str(p)) for p in sorted(folder.glob("group-*.png"))}
        for i, group in enumerate(groups(collection.finished)):
            table = tables.comparison(group)
            content[f"table-{i + 1}"] = wandb.Table(columns=table.head, data=table.rows)
        content["report"] = wandb.Html((folder / "report.html").read_text(), inject=False)
        tracker.run.log(content)
        tracker.run.finish()
    except Exception as error:
        log.warning("W&B: %s", error)
