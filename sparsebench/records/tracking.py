"""The Weights & Biases mirror of a run, and its null twin. The record is the result; W&B is never the only copy.

Offline is the default: no account, no network, no prompt; `wandb sync <run folder>/wandb/offline-run-*` uploads later.
Whatever W&B does, a run goes on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsebench.records import archive
from sparsebench.records.files import plain, scrub

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
            self.run.log(row)
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
            self.run.log({"per_site": table, **charts(record)})
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


def charts(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's page shows beside its figures: sparsity by layer, cost by part, times with their spread."""
    import wandb

    layers: dict[str, list[tuple[float, float]]] = {}
    for name, site in ((record.get("sparsity") or {}).get("per_site") or {}).items():
        layer = name.partition(".")[0]
        layers.setdefault(layer, []).append((site["sparsity"], site["weight"]))
    shares = [[k, sum(s * w for s, w in v) / sum(w for _, w in v)] for k, v in layers.items() if any(w for _, w in v)]
    costs = [
        [f"{kind} {side}", value]
        for kind in ("macs", "bytes") for side in ("dense", "sparse")
        if (value := (record.get(kind) or {}).get(side)) is not None
    ]  # fmt: skip
    times = [
        [name, *(t.get(f"{cut}_ms") for cut in ("median", "p10", "p90"))]
        for name, t in timed(record.get("latency") or {})
    ]
    shown: dict[str, Any] = {}
    if shares:
        by_layer = wandb.Table(columns=["layer", "sparsity"], data=shares)
        shown["sparsity by layer"] = wandb.plot.bar(by_layer, "layer", "sparsity", title="Sparsity by layer, measured")
    if costs:
        shown["cost"] = wandb.Table(columns=["what", "value"], data=costs)
    if times:
        shown["latency"] = wandb.Table(columns=["what", "median ms", "p10 ms", "p90 ms"], data=times)
    return shown


def timed(latency: dict[str, Any], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(name, quantiles) of everything that was timed, however it is nested."""
    times = []
    for name, content in latency.items():
        if isinstance(content, dict) and "median_ms" in content and "samples_ms" in content:
            times.append((f"{prefix}{name}", content))
        elif isinstance(content, dict):
            times += timed(content, f"{prefix}{name} ")
    return times


def machine(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's times belong to, for its summary."""
    env = record.get("env") or {}
    target = env.get("hardware") or {}
    facts = {
        "device": archive.device(env), "dtype": target.get("dtype"), "threads": target.get("threads"), "cores": env.get("cores"),
        "load": (env.get("load_average") or [None])[0], "commit": env.get("git_commit"),
        **{name: (env.get("versions") or {}).get(name) for name in ("sparsebench", "torch", "transformers")},
    }  # fmt: skip
    return {f"machine/{name}": value for name, value in facts.items() if value is not None}


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
    figures |= machine(record)
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
                name=name,
                id=run_id,
                resume="allow" if run_id and mode == "online" else None,
                dir=str(folder),
                config=json.loads(scrub(json.dumps(plain(configuration)))),
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
