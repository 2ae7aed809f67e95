"""The Weights & Biases mirror of a run, and its null twin. The record is the result; W&B is never the only copy.

Offline is the default: no account, no network, no prompt; `wandb sync <run folder>/wandb/offline-run-*` uploads later.
Whatever W&B does, a run goes on: a server that hangs, refuses or fails costs FINISH_SECONDS at most. All that W&B
stages lies in the run's folder, and a run has one id, that of its record, whatever the environment says.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsebench.records import archive
from sparsebench.records.files import plain, scrubbed

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)
START_SECONDS, FINISH_SECONDS, LAST_SECONDS = 20, 60, 10  # LAST_SECONDS: to finish a run that was told to stop


class NullTracker:
    """The same calls, no effect."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, record: dict[str, Any]) -> None:
        pass


class WandbTracker:
    """Logs config at the start, rows of history as they come, and the whole record as the summary."""

    def __init__(self, run: wandb.Run, artifact: Path | None = None, scratch: Path | None = None):
        self.run, self.artifact, self.scratch = run, artifact, scratch

    def log(self, row: dict[str, Any]) -> None:
        try:
            self.run.log(scrubbed(row))
        except Exception as error:
            log.warning("W&B: %s", error)

    def finish(self, record: dict[str, Any]) -> None:
        seconds = LAST_SECONDS if record["status"] == "interrupted" else FINISH_SECONDS
        try:
            within(seconds, lambda: self.send(record))
        except Exception as error:
            log.warning("W&B: %s", error)
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def send(self, record: dict[str, Any]) -> None:
        """The record's figures and the machine they belong to, and the end of the run."""
        import wandb

        sites = (record.get("sparsity") or {}).get("per_site") or {}
        costs = (record.get("macs") or {}).get("per_site") or {}
        with temporary_files(self.scratch):
            table = wandb.Table(columns=["site", "sparsity", "weights", "dense MACs", "sparse MACs"])
            for name, site in sites.items():
                cost = costs.get(name, {})
                table.add_data(name, site["sparsity"], site["weight"], cost.get("dense_macs"), cost.get("sparse_macs"))
            self.run.config.update({"machine": machine(record)}, allow_val_change=True)  # type: ignore[no-untyped-call]
            self.run.log({"per_site": table, **charts(record)})
            self.run.summary.update(summary(record))
            if self.artifact is not None and record["status"] == "finished":
                self.run.log_artifact(self.files(self.artifact, record))
            self.run.finish(exit_code=0 if record["status"] == "finished" else 1)
            if self.scratch is not None:  # the process ends here, and not by way of atexit
                wandb.teardown()

    def files(self, folder: Path, record: dict[str, Any]) -> wandb.Artifact:
        """The run's folder as a W&B artifact: what `sparsebench.load` needs."""
        import wandb

        artifact = wandb.Artifact(f"run-{record['config_hash'][:10]}", type="sparse-model")
        for file in (folder / "result.json", folder / "state.safetensors"):
            if file.exists():
                artifact.add_file(str(file))
        return artifact


def machine(record: dict[str, Any]) -> dict[str, Any]:
    """What a record's times were taken with: processor, GPU, dtype, threads, versions; without it a time says nothing."""
    account = {**(record.get("env") or {})}
    return {**account.pop("hardware", {}), **{key: value for key, value in account.items() if key != "argv"}}


def within(seconds: float, do: Callable[[], None]) -> None:
    """`do()`, or TimeoutError where it takes longer: it is then left to end with the process."""
    errors: list[Exception] = []

    def body() -> None:
        try:
            do()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(
            f"not everything was sent within {seconds:.0f} s; `wandb sync` sends what lies in the folder"
        )
    if errors:
        raise errors[0]


@contextmanager
def temporary_files(folder: Path | None) -> Iterator[None]:
    """Temporary files of Python go into `folder`; None leaves them where they are."""
    before = tempfile.tempdir
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def charts(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's page shows beside its figures: sparsity by layer, cost by part, times with their spread, a step by role."""
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
    roles = [
        [role, side, ms]
        for side, told in (((record.get("latency") or {}).get("decode") or {}).get("by_kernel") or {}).items()
        if isinstance(told, dict)
        for role, ms in told.get("ms", {}).items()
    ]
    if roles:
        shown["step by role"] = wandb.Table(columns=["role", "model", "ms"], data=roles)
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


def machine_summary(record: dict[str, Any]) -> dict[str, Any]:
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
    figures |= machine_summary(record)
    for name in ("dense", "sparse", "overhead"):
        if f"macs/{name}" in figures:
            figures[f"flops/{name}"] = 2 * figures[f"macs/{name}"]
    return figures


def start(
    settings: dict[str, Any],
    name: str,
    folder: Path,
    configuration: dict[str, Any],
    run_id: str | None = None,
    alone: bool = False,
) -> NullTracker | WandbTracker:
    """A tracker for one run, with W&B's files inside the run's `folder`. Falls back to offline, then to none.

    run_id: W&B's id of the run, where sending it again must not make a second one. alone: this process is for this run
    alone, so that W&B's temporary files are put into the folder, too, and removed at the end.
    """
    if settings["mode"] == "disabled":
        return NullTracker()
    files = folder.absolute() / "wandb"
    scratch = files / "tmp" if alone else None
    for kind in ("CACHE", "DATA", "ARTIFACT"):
        os.environ[f"WANDB_{kind}_DIR"] = str(files)
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if settings["mode"] == "online" else ["offline"]
    for mode in modes:
        try:
            with temporary_files(scratch):
                run = begin(mode, settings, name, folder, configuration, run_id)
            return WandbTracker(run, folder if settings["artifacts"] else None, scratch)
        except Exception as error:
            log.warning("W&B %s: %s", mode, " ".join(str(error).split())[:200])
    return NullTracker()


def begin(
    mode: Literal["online", "offline"],
    settings: dict[str, Any],
    name: str,
    folder: Path,
    configuration: dict[str, Any],
    run_id: str | None,
) -> wandb.Run:
    """W&B's run. Raises whatever W&B does."""
    import wandb

    return wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        name=scrubbed(name),
        id=run_id or uuid.uuid4().hex[:16],  # never WANDB_RUN_ID, which would be that of all runs of a sweep
        resume="allow" if run_id and mode == "online" else None,
        dir=str(folder),
        config=scrubbed(plain(configuration)),
        mode=mode,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=START_SECONDS,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,  # the command line, secrets and all
        ),
    )
