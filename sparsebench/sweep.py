"""Many runs in one command: the folder where a sweep notes its outcomes, the table that ends it, what a sweeper optimises.

Every job writes one small file into the sweep's folder when it ends, so the table is the same whether jobs ran here one
after another, in other processes (joblib), or on other machines (submitit, Ray). The records stay the results; a sweep
is resumed by giving its command again, since finished runs answer from their records. No torch here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from hydra import compose
from rich.console import Console
from rich.table import Table

from sparsebench.config.compose import to_dict
from sparsebench.config.identity import NOT_IDENTITY, digest
from sparsebench.records import files, stopping, terminal, wording

log = logging.getLogger("sparsebench")
FINISHED, BEFORE, NOT_RUN = "finished", "finished before", "not run"
HEADINGS = ("run", "settings", "outcome", "quality", "sparsity", "ms [p10, p90]", "speed-up", "seconds")
MAIN = "SPARSEBENCH_SWEEP"  # environment: the process of the sweep itself, for its workers
FAILED_OBJECTIVE = -1e9  # finite: a sweeper's model of the objective must be able to use it


def group_name(overrides: list[str]) -> str:
    """The name under which runs of one sweep stand together (W&B's group): the same when the command is given again."""
    return f"sweep-{digest(sorted(filter(matters, overrides)))[:8]}"


def group_of(folder: Path) -> str:
    """The group name inside a sweep folder's name."""
    return re.search(r"sweep-[0-9a-f]{8}", folder.name).group()


def matters(override: str) -> bool:
    """Whether an override says what is computed, not where to or through which launcher."""
    key = override.lstrip("+~").partition("=")[0].split(".")[0].split("/")[0]
    return key != "hydra" and key not in NOT_IDENTITY


def without_foreign(configuration: dict, overrides: list[str]) -> dict:
    """A job's configuration without the keys that `many` added and its options don't have; says so.

    Planning has refused keys that no combination knows, so what is taken away here applies elsewhere in the sweep.
    """
    added = [override for override in overrides if override.startswith("++")]
    if not added:
        return configuration
    base = to_dict(compose("config", overrides=[o for o in overrides if not o.startswith(("++", "hydra."))]))
    for override in added:
        *sections, leaf = override[2:].partition("=")[0].split(".")
        known, node = base, configuration
        for section in sections:
            known, node = (known.get(section) or {}), node[section]
        if leaf not in known:
            node.pop(leaf, None)
            name = base[sections[0]].get("name") if sections and isinstance(base.get(sections[0]), dict) else None
            log.info("%s=%s has no %s: %s does not apply", sections[0] if sections else "", name, leaf, override[2:])
    return configuration


def new_folder(output_dir: str, overrides: list[str]) -> Path:
    """A folder of this very call, created: <output_dir>/sweeps/<time>-<group>, numbered where the clock repeats itself."""
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{group_name(overrides)}"
    for number in range(1000):
        folder = Path(output_dir, "sweeps", stamp + (f"-{number}" if number else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{output_dir}/sweeps holds a thousand sweeps named {stamp}")


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """One job in this process. In a worker of a sweep (joblib): the sweep's end is the worker's, and it can be told so.

    A worker is told through the sweep's own process, so Ctrl-C, which reaches both, is left to that one. Raises
    stopping.Stopped where the worker was told to stop before.
    """
    main, marker = int(os.environ.get(MAIN, "0")), folder / f"worker-{os.getpid()}"
    if main in (0, os.getpid()):
        yield
        return
    if not Worker.ready:
        Worker.ready = True
        stopping.listen()
        if os.getppid() == main:
            stopping.ignore(signal.SIGINT)
    if stopping.name():
        raise stopping.Stopped(stopping.reason())
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


class Worker:
    """What a worker process did once."""

    ready = False


GUARD = """
import os, sys, psutil
name, sweep = sys.argv[1:]
sys.stdin.buffer.read()  # until the sweep's process is gone, however it went
for process in psutil.process_iter():
    try:
        if process.pid != os.getpid() and process.environ().get(name) == sweep:
            process.kill()
    except psutil.Error:
        pass
"""


guards: list[subprocess.Popen] = []  # held, for their pipe must not close before this process ends


def guard_workers() -> None:
    """Start a process that kills this sweep's workers once this process is gone, however that went: no orphan works on after
    a kill -9, be it one that had no job yet.

    It knows them by the environment that they were started with, so it begins after MAIN is set.
    """
    given = [sys.executable, "-c", GUARD, MAIN, os.environ[MAIN]]
    here = {key: value for key, value in os.environ.items() if key != MAIN}
    quiet = subprocess.DEVNULL
    guard = subprocess.Popen(given, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=here, start_new_session=True)
    guards.append(guard)


def end_workers(folder: Path) -> None:
    """Tell the workers of this process that have a job to stop, and wait for what they note and keep."""
    last = time.monotonic() + stopping.GRACE_SECONDS + 2
    told: set[int] = set()
    while time.monotonic() < last:
        own = {child.pid for child in psutil.Process().children(recursive=True)}
        busy = {int(marker.name.partition("-")[2]) for marker in folder.glob("worker-*")} & own
        if not busy:
            return
        for pid in busy - told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        told |= busy
        time.sleep(0.1)


def note(folder: Path, number: int, overrides: list[str], path: Path, record: dict | None, outcome: str) -> None:
    """Keep the outcome of job `number`; `path` is its record's, `record` its content or None where it was not run."""
    content = {"number": number, "overrides": overrides, "record": str(path), "outcome": outcome, **figures(record)}
    files.write_atomic(folder / f"{number}.json", json.dumps(files.scrubbed(files.plain(content))).encode())


def figures(record: dict | None) -> dict:
    """The few figures of a record that the table shows."""
    record = record or {}
    quality = record.get("quality") or {}
    name = main_metric(quality)
    latency = record.get("latency") or {}
    _, times = terminal.timed(latency)
    return {
        "name": record.get("name"),
        "error": (record.get("error") or {}).get("message"),
        "seconds": record.get("seconds"),
        "metric": name,
        "dense": quality[name]["dense"] if name else None,
        "sparse": quality[name]["sparse"] if name else None,
        "change": wording.change(name, quality[name])
        if name and None not in (quality[name]["dense"], quality[name]["sparse"])
        else None,
        "sparsity": (record.get("sparsity") or {}).get("model_wide"),
        "speedup": times.get("speedup"),
        "times": {side: terminal.quantiles(times[side]) for side in ("dense", "sparse") if side in times},
        "dense_engine": times.get("dense_engine"),
        "noisy": latency.get("noisy"),
    }


def main_metric(quality: dict) -> str | None:
    """The metric that stands for a record's quality: its first one."""
    return next(iter(quality), None)


def outcomes(folder: Path) -> list[dict]:
    """What was noted so far, in the order of the jobs."""
    notes = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("[0-9]*.json")]
    return sorted(notes, key=lambda each: each["number"])


def first_failure(folder: Path) -> str | None:
    """Name of a run that failed in this sweep, or None."""
    return next((each["name"] or each["record"] for each in outcomes(folder) if each["outcome"] == "failed"), None)


def show(folder: Path, planned: dict[Path, list[str]]) -> bool:
    """Print the table of outcomes and, as the last line, one line of JSON; True where every run finished.

    planned: the records that the sweep was to make with the overrides of each (empty where a sweeper chooses them as it
    goes); those that no job reported are listed as not run, with what tells them from the others.
    """
    notes = outcomes(folder)
    reported = Counter(each["record"] for each in notes)
    missing = {files.scrub(str(path)): overrides for path, overrides in planned.items()}
    missing = {path: overrides for path, overrides in missing.items() if not reported[path]}
    grid = Table(title=files.scrub(f"sweep {folder}"), title_justify="left")
    for name in HEADINGS:
        grid.add_column(name, justify="left" if name in HEADINGS[:3] else "right", overflow="fold")
    given = [set(overrides) for overrides in (*(each["overrides"] for each in notes), *missing.values())]
    common = set.intersection(*given) if len(given) > 1 else set()
    for each in notes:
        grid.add_row(*row(each, common), style="red" if each["outcome"] not in (FINISHED, BEFORE) else None)
    for path, overrides in missing.items():
        grid.add_row(Path(path).parent.name, files.scrub(settings(overrides, common)), NOT_RUN, *[""] * 5, style="red")
    console = Console(**terminal.PLAIN)
    if not console.is_terminal:
        console.width = 140
    console.print(grid)
    console.print(terminal.next_step(folder.parent.parent))
    counts = Counter(each["outcome"] for each in notes)
    counts[NOT_RUN] += len(missing)
    done = not any(n for outcome, n in counts.items() if outcome not in (FINISHED, BEFORE))
    summary = {
        "status": "finished" if done else "failed",
        "sweep": str(folder),
        "outcomes": {k: n for k, n in counts.items() if n},
        "records": [each["record"] for each in notes],
    }
    print(json.dumps(files.scrubbed(summary)), flush=True)
    return done


def settings(overrides: list[str], common: set[str]) -> str:
    """What tells a run from the others of its sweep."""
    return " ".join(o for o in overrides if o not in common and matters(o))


def row(each: dict, common: set[str]) -> list[str]:
    """The cells of one run; of its overrides those that are not `common` to all."""
    known = each["dense"] is not None and each["sparse"] is not None
    change = f", {each['change']}" if each.get("change") else ""
    quality = "" if not known else f"{each['dense']:.4g} -> {each['sparse']:.4g} ({each['metric']}{change})"
    problem = f": {each['error']}" if each["error"] else ""
    times = {side: terminal.spread(quantiles) for side, quantiles in each["times"].items()}
    return [
        each["name"] or Path(each["record"]).parent.name,
        settings(each["overrides"], common),
        each["outcome"] + problem,
        quality,
        "" if each["sparsity"] is None else f"{each['sparsity']:.1%}",
        f"{times['dense']} ({each['dense_engine']}) -> {times['sparse']}" if times else "",
        ("" if each["speedup"] is None else f"{each['speedup']:.2f}x") + (" NOISY" if each["noisy"] else ""),
        "" if each["seconds"] is None else f"{each['seconds']:.0f}",
    ]


def objective(record: dict, budget: float) -> float:
    """What a sweeper maximises: the measured model-wide sparsity while the main metric keeps the budget.

    budget: the worst allowed factor of the dense model, e.g. 1.05 = perplexity at most 5 % above dense, or an accuracy
    at most 5 % below. Past it the value falls below zero by the excess, so that a sweeper is led back.
    """
    quality = record.get("quality") or {}
    name = main_metric(quality)
    if record["status"] != "finished" or name is None or None in (quality[name]["dense"], quality[name]["sparse"]):
        return FAILED_OBJECTIVE
    metric = quality[name]
    better, worse = metric["dense"], metric["sparse"]
    if metric["higher_is_better"]:
        better, worse = worse, better
    factor = worse / better if better else math.inf
    if factor <= budget:
        return record["sparsity"]["model_wide"]
    return max(budget - factor, FAILED_OBJECTIVE)
