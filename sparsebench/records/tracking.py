"""The Weights & Biases mirror of a run, and its null twin. The record is the result; W&B is never the only copy.

Offline is the default: no account, no network, no prompt; `wandb sync <run folder>/wandb/offline-run-*` uploads later.
Whatever W&B does, a run goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsebench.records.files import plain, scrubbed

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


class NullTracker:
    """The same calls, no effect."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, record: dict[str, Any]) -> None:
        pass


class WandbTracker:
    """Logs config at the start, rows of history as they come, and the whole record as the summary."""

    def __init__(self, run: wandb.Run, artifact: Path | None = None):
        self.run, self.artifact = run, artifact

    def log(self, row: dict[str, Any]) -> None:
        try:
            self.run.log(scrubbed(row))
        except Exception as error:
            log.warning("W&B: %s", error)

    def finish(self, record: dict[str, Any]) -> None:
        import wandb

        try:
            sites = (record.get("sparsity") or {}).get("per_site") or {}
            costs = (record.get("macs") or {}).get("per_site") or {}
            table = wandb.Table(columns=["site", "sparsity", "weights", "dense MACs", "sparse MACs"])
            for name, site in sites.items():
                cost = costs.get(name, {})
                table.add_data(name, site["sparsity"], site["weight"], cost.get("dense_macs"), cost.get("sparse_macs"))
            self.run.log({"per_site": table})
            self.run.summary.update(summary(record))
            if self.artifact is not None and record["status"] == "finished":
                self.run.log_artifact(self.files(self.artifact, record))
            self.run.finish(exit_code=0 if record["status"] == "finished" else 1)
        except Exception as error:
            log.warning("W&B: %s", error)

    def files(self, folder: Path, record: dict[str, Any]) -> wandb.Artifact:
        """The run's folder as a W&B artifact: what `sparsebench.load` needs."""
        import wandb

        artifact = wandb.Artifact(f"run-{record['config_hash'][:10]}", type="sparse-model")
        for file in (folder / "result.json", folder / "state.safetensors"):
            if file.exists():
                artifact.add_file(str(file))
        return artifact


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """All figures of a record, flat, without raw samples and per-site values (they have a table); FLOPs beside MACs."""
    figures: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in ("samples_ms", "per_site", "losses", "config", "env"):
                    walk(f"{prefix}/{key}" if prefix else key, inner)
        elif isinstance(value, (int, float, str, bool)):
            figures[prefix] = value

    walk("", record)
    for name in ("dense", "sparse", "overhead"):
        if f"macs/{name}" in figures:
            figures[f"flops/{name}"] = 2 * figures[f"macs/{name}"]
    return figures


def start(
    settings: dict[str, Any], name: str, folder: Path, configuration: dict[str, Any], run_id: str | None = None
) -> NullTracker | WandbTracker:
    """A tracker for one run, with W&B's files inside the run's `folder`. Falls back to offline, then to none.

    run_id: W&B's id of the run, where sending it again must not make a second one.
    """
    if settings["mode"] == "disabled":
        return NullTracker()
    import wandb

    modes: list[Literal["online", "offline"]] = ["online", "offline"] if settings["mode"] == "online" else ["offline"]
    for mode in modes:
        try:
            run = wandb.init(
                project=settings["project"],
                entity=settings["entity"],
                group=settings["group"],
                name=scrubbed(name),
                id=run_id,
                resume="allow" if run_id and mode == "online" else None,
                dir=str(folder),
                config=scrubbed(plain(configuration)),
                mode=mode,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=20,
                    disable_git=True,
                    disable_code=True,
                    x_disable_stats=True,
                    x_disable_meta=True,  # the command line, secrets and all
                ),
            )
            return WandbTracker(run, folder if settings["artifacts"] else None)
        except Exception as error:
            log.warning("W&B %s: %s", mode, " ".join(str(error).split())[:200])
    return NullTracker()
