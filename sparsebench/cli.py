"""The command `sparsebench`: Hydra composes, everything wrong with the configuration is said at once, runs are isolated.

No torch here before it is needed, so that --help, --cfg, completion and the answer from a finished record are instant.
Each run is a forked child: whatever kills it, the parent still writes its record and goes on with the next.

Exit codes: 0 finished; 1 a run failed (in a sweep: any run failed or was not reached); 2 the configuration is wrong;
130 interrupted.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

import hydra
from filelock import FileLock
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sparsebench import config, ranks, sweep
from sparsebench.config.compose import CONFIG_MODULE, compose_all, to_dict
from sparsebench.config.identity import identity_of
from sparsebench.records import files, machine, record

log = logging.getLogger("sparsebench")
OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Entry point of the console script."""
    set_up_logging()
    arguments = get_args_parser().parse_args()
    asks_only = arguments.help or arguments.hydra_help or arguments.cfg or arguments.info or arguments.shell_completion
    planned: list[dict] = []
    if not asks_only:
        try:
            planned = compose_all(arguments.overrides, arguments.multirun, arguments.config_dir)
            for configuration in planned:
                check(configuration)
        except config.ConfigError as error:
            for line in error.problems:
                complain(line)
            sys.exit(WRONG)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
    app = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config")
    if planned and arguments.multirun:
        sys.exit(many(app, planned, arguments.overrides))
    codes: list[int] = []
    app(lambda composed: codes.append(task(to_dict(composed))))()
    sys.exit(max(codes, default=OK))


def complain(line: str) -> None:
    """One line of error for the user."""
    print(files.scrub(f"error: {line}"), file=sys.stderr, flush=True)


def set_up_logging() -> None:
    """Messages to stderr, without secrets; also called in the worker processes of a launcher."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().handlers[0].addFilter(scrubbing)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    for name in ("accelerate", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def many(app, planned: list[dict], overrides: list[str]) -> int:
    """A sweep: all jobs through Hydra's launcher and sweeper, then the table of outcomes. Returns the exit code.

    Of several processes (torchrun) the first one keeps the sweep's folder and tells how it went; the others follow.
    """
    if not ranks.first():
        app(job)()
        return OK
    try:
        folder = sweep.new_folder(planned[0]["output_dir"], overrides)
    except OSError as error:
        complain(f"output_dir={planned[0]['output_dir']}: {error}")
        return FAILED
    chosen_later = any(o.startswith("hydra/sweeper=") for o in overrides)  # by a sweeper other than Hydra's own
    paths = [] if chosen_later else [location(each)[0] / "result.json" for each in planned]
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    sys.argv.append(f"hydra.sweep.dir='{quoted}'")
    log.info("sweep of %s runs in %s", len(paths) or "chosen", folder)
    try:
        app(job)()
    except KeyboardInterrupt:
        sweep.show(folder, paths)
        return INTERRUPTED
    return OK if sweep.show(folder, paths) else FAILED


def job(composed) -> float:
    """One job of a sweep, in whatever process the launcher gave it. Returns what a sweeper maximises."""
    set_up_logging()
    configuration, hydra_config = to_dict(composed), HydraConfig.get()
    assert hydra_config.mode == RunMode.MULTIRUN
    folder, number = Path(hydra_config.sweep.dir), int(hydra_config.job.num)
    (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of the command line, secrets and all
    if not ranks.first():
        task(configuration)
        return sweep.FAILED_OBJECTIVE
    overrides = [o for o in hydra_config.overrides.task if not o.startswith("hydra.")]
    path = location(configuration)[0] / "result.json"
    if configuration["wandb"]["group"] is None:
        configuration["wandb"]["group"] = sweep.group_of(folder)
    failure = sweep.first_failure(folder) if configuration["fail_fast"] else None
    if failure:
        log.info("not run, since %s failed (fail_fast): %s", failure, " ".join(overrides))
        sweep.note(folder, number, overrides, path, None, sweep.NOT_RUN)
        return sweep.FAILED_OBJECTIVE
    log.info("[%d] %s", number, " ".join(overrides))
    before = finished(configuration)
    found = before or obtain(configuration)
    if found is None:  # no record can be written
        sweep.note(folder, number, overrides, path, None, "failed")
        return sweep.FAILED_OBJECTIVE
    sweep.note(folder, number, overrides, path, found, sweep.BEFORE if before else found["status"])
    if found["status"] != "finished":
        error = found["error"] or {}
        print(f"{found['status']}: {error.get('message')}\n{error.get('traceback') or ''}", file=sys.stderr, flush=True)
    if found["status"] == "interrupted":
        raise KeyboardInterrupt
    return sweep.objective(found, configuration["sweep"]["budget"])


def check(configuration: dict) -> None:
    """Raise ConfigError where the configuration can't run. One that has run before is known to be good."""
    if finished(configuration) is None:
        config.build_settings(configuration)


def location(configuration: dict) -> tuple[Path, str]:
    """(folder of the run, its full identity)."""
    identity = identity_of(configuration, machine.machine())
    names = [str(configuration[group].get("name")) for group in ("model", "method")]
    return Path(configuration["output_dir"], *names, identity[:10]), identity


def finished(configuration: dict) -> dict | None:
    """The record of this very run if it finished before and `force` is off."""
    return None if configuration["force"] else kept(*location(configuration))[0]


def kept(folder: Path, identity: str) -> tuple[dict | None, str | None]:
    """(the finished record of a run in its folder or None, what is wrong with a record that lies there)."""
    path = folder / "result.json"
    found, problem = record.read_any(path)
    if found is not None and problem is None and found["config_hash"] != identity:
        problem = f"it is the record of another run ({found['config_hash'][:10]})"
    if problem is not None:
        return None, problem if path.exists() else None
    return (found if found["status"] == "finished" else None), None


def task(configuration: dict) -> int:
    """One run: answer from its record, or do it in a child process, and show it. Returns the exit code."""
    folder, identity = location(configuration)
    if not ranks.first():
        return follow(configuration, folder / f"rank-{ranks.rank()}", identity)
    found = obtain(configuration)
    if found is None:
        return FAILED
    from sparsebench.records import terminal

    terminal.show(found, folder / "result.json")
    return {"finished": OK, "interrupted": INTERRUPTED}.get(found["status"], FAILED)


def obtain(configuration: dict) -> dict | None:
    """The record of one run, made in a child process where there is none; None where output_dir can't be written."""
    folder, identity = location(configuration)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            found, problem = kept(folder, identity)
            if found is None or configuration["force"]:
                if problem:
                    log.warning("%s is made again: %s", folder / "result.json", problem)
                return isolated(configuration, folder, identity)
    except OSError as error:
        complain(f"output_dir={configuration['output_dir']}: {error}")
        return None
    log.info("finished before; force=true runs it again")
    return found


def follow(configuration: dict, folder: Path, identity: str) -> int:
    """The part of a process that only helps to train: it leaves its log in `folder`, and its record if it failed."""
    if finished(configuration) is not None:
        return OK
    folder.mkdir(parents=True, exist_ok=True)
    found = isolated(configuration | {"wandb": configuration["wandb"] | {"mode": "disabled"}}, folder, identity)
    if found["status"] == "finished":
        (folder / "result.json").unlink()
        return OK
    return FAILED


def isolated(configuration: dict, folder: Path, identity: str) -> dict:
    """Run in a forked child and return the record it left, or one made here if it died without."""
    from sparsebench import runner  # noqa: F401  (imported before the fork, so that every child of a sweep has it)

    path = folder / "result.json"
    path.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=child_main, args=(configuration, folder, identity), name="sparsebench-run")
    child.start()
    status = "failed"
    try:
        child.join()
    except KeyboardInterrupt:
        status = "interrupted"
        child.join(timeout=20)
        if child.is_alive():
            child.kill()
            child.join()
    found, problem = record.read_any(path)
    if problem and found is not None:
        log.warning("%s: %s", path, problem)
    if found is None:
        code = child.exitcode
        signalled = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        message = f"the run's process ended without a record: {signalled}{hint}"
        name = f"{configuration['model']['name']}/{configuration['method']['name']}"
        failed = record.Record(identity, name, configuration, status=status)
        failed.error = {"type": "ProcessDied", "message": message, "traceback": None}
        record.write(failed, path)
        found = record.read(path)
    return found


def child_main(configuration: dict, folder: Path, identity: str) -> None:
    """The child's life: log file, tracker, run, record. Exits with the run's code."""
    from sparsebench import runner
    from sparsebench.records import tracking

    die_with_parent()
    name = f"{configuration['model']['name']}/{configuration['method']['name']}/{identity[:10]}"
    handler = logging.FileHandler(folder / "run.log", mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    handler.addFilter(scrubbing)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    found = record.Record(identity, name, configuration)
    tracker = tracking.NullTracker()
    code = FAILED
    try:
        tracker = tracking.start(configuration["wandb"], name, folder, configuration)
        runner.timed_run(configuration, found, folder, tracker.log)
        found.status, code = "finished", OK
    except BaseException as error:
        found.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
        found.error = {"type": type(error).__name__, "message": explain(error), "traceback": traceback.format_exc()}
        logging.getLogger("sparsebench.runner").debug("failed", exc_info=True)
        with open(folder / "run.log", "a") as file:
            file.write(files.scrub(traceback.format_exc()))
    record.write(found, folder / "result.json")
    tracker.finish(record.read_any(folder / "result.json")[0])
    logging.shutdown()
    os._exit(code)


def explain(error: BaseException) -> str:
    """What happened, in one line for the user."""
    text = files.scrub(" ".join(str(error).split()))
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory: {text or 'the process could not allocate more'}"
    if isinstance(error, (ValueError, FloatingPointError, ArithmeticError, OSError)) and text:
        return text
    return f"{kind}: {text}" if text else kind


def die_with_parent() -> None:
    """End this process when its parent is gone, however that went, so that no orphan works on after a kill -9."""
    import threading

    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def scrubbing(entry: logging.LogRecord) -> bool:
    """A logging filter that takes secrets out of messages."""
    entry.msg, entry.args = files.scrub(entry.getMessage()), None
    return True
