"""The command `sparsebench`: Hydra composes, everything wrong with the configuration is said at once, runs are isolated.

No torch here before it is needed, so that --help, --cfg, completion and the answer from a finished record are instant.
Each run is a forked child: whatever kills it, the parent still writes its record and goes on with the next.

Exit codes: 0 finished; 1 a run failed (in a sweep: any run failed or was not reached); 2 the configuration is wrong;
130 interrupted by Ctrl-C; 143 by SIGTERM or SIGHUP.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hydra
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sparsebench import cache, config, ranks, sweep
from sparsebench.config import completion, early
from sparsebench.config.arguments import read
from sparsebench.config.compose import CONFIG_MODULE, Plan, plan, to_dict
from sparsebench.config.identity import identity_of
from sparsebench.records import files, machine, record, stopping

log = logging.getLogger("sparsebench")
OK, FAILED, WRONG = 0, 1, 2
FAILED_BESIDE = "result.failed.json"  # a forced run that failed, beside the finished record of before


def main() -> None:
    """Entry point of the console script."""
    files.speak_utf8()
    sys.exit(guarded(command))


def guarded(body: Callable[[], int]) -> int:
    """The exit code of a command's body, with everything it printed delivered, or one line on why it could not be."""
    if sys.stdout is None:
        complain("standard output is closed")
        return WRONG
    stopping.listen()
    cache.provide_home()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook took its place
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = body()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else FAILED if end.code else OK
        except config.ConfigError as error:
            for line in error.problems:
                complain(line)
            code = WRONG
        except KeyboardInterrupt:
            print(f"interrupted: {stopping.reason()}", file=sys.stderr, flush=True)
            code = stopping.exit_code()
        except Exception as error:  # a slip of this program's, or a library that the environment upsets
            if isinstance(error, OSError) or os.environ.get("HYDRA_FULL_ERROR"):
                raise
            complain(f"{record.explain(error)} (HYDRA_FULL_ERROR=1 shows where)")
            code = FAILED
        sys.stdout.flush()
    except BrokenPipeError:  # its reader went away, as `| head` does
        code = FAILED
    except OSError as error:
        complain(f"standard output: {error}")
        code = FAILED if "torch" in sys.modules else WRONG  # a run was made, or there was only an answer to print
    else:
        return code
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is said about it at exit
    return code


def command() -> int:
    """The body of `sparsebench`. Returns the exit code."""
    given = sys.argv[1:]
    arguments = read("sparsebench", given)
    if problem := ranks.problem():
        raise config.ConfigError([problem])
    sys.argv[1:] = given  # Hydra reads them again
    if arguments.info is None:  # which Hydra prints by logging
        set_up_logging()
    app = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config")
    if arguments.shell_completion and arguments.overrides and arguments.overrides[0].startswith("query="):
        shell = arguments.overrides[0].partition("=")[2]
        print(completion.completed(shell, app(job)))
        return OK
    if arguments.hydra_help or arguments.shell_completion:
        app(job)()
        return OK
    planned = plan(arguments.overrides, arguments.multirun, arguments.config_dir)
    if arguments.cfg or arguments.info:
        sys.stdout.write(completion.printed(app(job)))
        return OK
    check_all(planned.configurations)
    if arguments.multirun:
        return many(app, planned, arguments.overrides)
    codes: list[int] = []
    app(lambda composed: codes.append(task(to_dict(composed))))()
    return max(codes, default=OK)


def complain(line: str) -> None:
    """One line of error for the user, whatever is in it."""
    print(files.one_line(files.scrub(f"error: {line}")), file=sys.stderr, flush=True)


def set_up_logging() -> None:
    """Messages to stderr, without secrets; also called in the worker processes of a launcher."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.raiseExceptions = False  # a log that can't be written is no reason for tracebacks
    logging.getLogger().handlers[0].addFilter(files.scrubbing)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    for name in ("accelerate", "httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def many(app, planned: Plan, overrides: list[str]) -> int:
    """A sweep: all jobs through Hydra's launcher and sweeper, then the table of outcomes. Returns the exit code.

    Of several processes (torchrun) the first one keeps the sweep's folder and tells how it went; the others follow.
    """
    # Hydra would refuse a key that not every combination has: `job` takes it away again where it is not known
    sys.argv[1:] = [f"++{each}" if each in planned.partial else each for each in sys.argv[1:]]
    if not ranks.first():
        app(job)()
        return OK
    output_dir = planned.configurations[0]["output_dir"]
    try:
        folder = sweep.new_folder(output_dir, overrides)
    except OSError as error:
        complain(f"output_dir={output_dir}: {error}")
        return FAILED
    chosen_later = any(o.startswith("hydra/sweeper=") for o in overrides)  # by a sweeper other than Hydra's own
    places = [] if chosen_later else [location(each)[0] / "result.json" for each in planned.configurations]
    runs = dict(zip(places, planned.overrides, strict=False))
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    sys.argv.append(f"hydra.sweep.dir='{quoted}'")
    log.info("sweep of %s runs in %s", len(places) or "chosen", folder)
    os.environ[sweep.MAIN] = str(os.getpid())
    stopping.listen(before=lambda: sweep.end_workers(folder))
    sweep.guard_workers()
    try:
        app(job)()
    except KeyboardInterrupt:
        log.info("interrupted: %s; what is finished stays, the same command goes on", stopping.reason())
        sweep.show(folder, runs)
        return stopping.exit_code()
    return OK if sweep.show(folder, runs) else FAILED


def job(composed) -> float:
    """One job of a sweep, in whatever process the launcher gave it. Returns what a sweeper maximises."""
    set_up_logging()
    hydra_config = HydraConfig.get()
    os.chdir(hydra_config.runtime.cwd)  # hydra.job.chdir would move what relative paths mean
    configuration = sweep.without_foreign(to_dict(composed), list(hydra_config.overrides.task))
    assert hydra_config.mode == RunMode.MULTIRUN
    folder, number = Path(hydra_config.sweep.dir), int(hydra_config.job.num)
    (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of the command line, secrets and all
    if not ranks.first():
        task(configuration)
        return sweep.FAILED_OBJECTIVE
    with sweep.at_work(folder):
        return one_of_many(configuration, folder, number, list(hydra_config.overrides.task))


def one_of_many(configuration: dict, folder: Path, number: int, given: list[str]) -> float:
    """Job `number` of the sweep in `folder`, with its overrides as given. Returns what a sweeper maximises."""
    overrides = [o for o in given if not o.startswith("hydra.")]
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
    outcome, path = (before, path) if before else obtain(configuration)
    if outcome is None:  # no record can be written
        sweep.note(folder, number, overrides, path, None, "failed")
        return sweep.FAILED_OBJECTIVE
    sweep.note(folder, number, overrides, path, outcome, sweep.BEFORE if before else outcome["status"])
    if outcome["status"] != "finished":
        error = outcome["error"] or {}
        trace = error.get("traceback") if outcome["status"] == "failed" else None
        print(f"{outcome['status']}: {error.get('message')}\n{trace or ''}".rstrip(), file=sys.stderr, flush=True)
    if outcome["status"] == "interrupted" or stopping.name():
        raise KeyboardInterrupt
    return sweep.objective(outcome, configuration["sweep"]["budget"])


def check_all(configurations: list[dict]) -> None:
    """As `check`, of every run of a sweep; all their problems together."""
    problems = [line for each in configurations for line in early.wrong_values(each, early.SETTINGS["config"])]
    if problems:  # said at once: all else takes the imports of torch and of what it is about
        raise config.ConfigError(problems)
    for configuration in configurations:
        try:
            check(configuration, announce=True)
        except config.ConfigError as error:
            problems += error.problems
    if problems:
        raise config.ConfigError(problems)


def check(configuration: dict, announce: bool = False) -> None:
    """Raise ConfigError where the configuration can't run. One that has run before is known to be good.

    Everything that can be known before weights are read is said here, all of it at once. announce: say what is loaded,
    since the imports alone take seconds.
    """
    problems = early.refused_paths(configuration)
    if not problems and finished(configuration) is None:
        problems += filter(None, [early.output_problem(configuration["output_dir"])])
        if announce and "torch" not in sys.modules and not problems:
            names = (configuration[group].get("name") for group in ("model", "dataset", "method"))
            log.info("loading model %s, data %s, method %s", *names)
        try:
            settings = config.build_settings(configuration)
        except config.ConfigError as error:
            problems += error.problems
        else:
            from sparsebench import tasks

            problems += tasks.load(settings.model.kind).problems(settings)
    if problems:
        raise config.ConfigError(problems)


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
    content, problem = record.read_any(path)
    if content is not None and problem is None and content["config_hash"] != identity:
        problem = f"it is the record of another run ({content['config_hash'][:10]})"
    if problem is not None:
        return None, problem if os.path.lexists(path) else None
    return (content if content["status"] == "finished" else None), None


def task(configuration: dict) -> int:
    """One run: answer from its record, or do it in a child process, and show it. Returns the exit code."""
    if HydraConfig.initialized():
        os.chdir(HydraConfig.get().runtime.cwd)  # hydra.job.chdir would move what relative paths mean
    folder, identity = location(configuration)
    if not ranks.first():
        return follow(configuration, folder / f"rank-{ranks.rank()}", identity)
    outcome, path = obtain(configuration)
    if outcome is None:
        return FAILED
    from sparsebench.records import terminal

    terminal.show(outcome, path)
    return {"finished": OK, "interrupted": stopping.exit_code()}.get(outcome["status"], FAILED)


def obtain(configuration: dict) -> tuple[dict | None, Path]:
    """(record of one run, its file), made in a child process where there is none; None where it can't be written."""
    folder, identity = location(configuration)
    path = folder / "result.json"
    outcome, problem = kept(folder, identity)  # before the lock, which a read-only disk would refuse
    if outcome is None or configuration["force"]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", mode=ranks.MODE):
                outcome, problem = kept(folder, identity)  # another process may have made it meanwhile
                if outcome is None or configuration["force"]:
                    if problem:
                        log.warning("%s is made again: %s", path, problem)
                    return isolated(configuration, folder, identity)
        except OSError as error:
            complain(f"output_dir={configuration['output_dir']}: {error}")
            return None, path
    log.info("finished before; force=true runs it again")
    return outcome, path


def follow(configuration: dict, folder: Path, identity: str) -> int:
    """The part of a process that only helps to train: it leaves its log in `folder`, and its record if it failed."""
    if finished(configuration) is not None:
        return OK
    folder.mkdir(parents=True, exist_ok=True)
    outcome, _ = isolated(configuration | {"wandb": configuration["wandb"] | {"mode": "disabled"}}, folder, identity)
    if outcome["status"] == "finished":
        (folder / "result.json").unlink()
        return OK
    return FAILED


def file_for(folder: Path, status: str) -> Path:
    """Where the record of a run goes: a finished one is only ever replaced by a finished one."""
    before = record.read_any(folder / "result.json")[0]
    kept = before is not None and before["status"] == "finished" and status != "finished"
    return folder / (FAILED_BESIDE if kept else "result.json")


def isolated(configuration: dict, folder: Path, identity: str) -> tuple[dict, Path]:
    """Run in a forked child and return the record it left, or one made here if it died without, and its file."""
    (folder / FAILED_BESIDE).unlink(missing_ok=True)
    if file_for(folder, "failed").name == "result.json":  # no finished record stands there
        (folder / "result.json").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=child_main, args=(configuration, folder, identity), name="sparsebench-run")
    status = "failed"
    try:
        from sparsebench import runner  # noqa: F401  (imported before the fork, so that every child of a sweep has it)

        with stopping.blocked():
            child.start()
        child.join()
    except KeyboardInterrupt:
        status = "interrupted"
        stopping.end(child)
    code = child.exitcode if child.pid else None
    path = folder / "result.json" if code == OK else file_for(folder, status)
    outcome, problem = record.read_any(path)
    if problem and outcome is not None:
        log.warning("%s: %s", path, problem)
    if outcome is None:
        signalled = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        died = f"the run's process ended without a record: {signalled}{hint}"
        message = stopping.reason() if status == "interrupted" else died
        name = f"{configuration['model']['name']}/{configuration['method']['name']}"
        failed = record.Record(identity, name, configuration, status=status)
        failed.error = {"type": "ProcessDied", "message": message, "traceback": None}
        record.write(failed, path)
        outcome = record.read(path)
    if path.name == FAILED_BESIDE:
        log.info("the finished record of before stays; this run's is %s", path)
    return outcome, path


def child_main(configuration: dict, folder: Path, identity: str) -> None:
    """The child's life: log file, tracker, run, record. Exits with the run's code."""
    from sparsebench import runner
    from sparsebench.records import tracking

    stopping.die_with_parent()
    stopping.listen()
    name = f"{configuration['model']['name']}/{configuration['method']['name']}/{identity[:10]}"
    handler = logging.FileHandler(folder / "run.log", mode="w", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    handler.addFilter(files.scrubbing)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    outcome = record.Record(identity, name, configuration)
    tracker = tracking.NullTracker()
    code = FAILED
    try:
        stopping.unblock()
        tracker = tracking.start(configuration["wandb"], name, folder, configuration, identity[:16], alone=True)
        runner.timed_run(configuration, outcome, folder, tracker.log)
        outcome.status, code = "finished", OK
        stopping.ignore()  # the rest is short: a run that got here is kept
    except BaseException as error:
        stopping.ignore()
        if code != OK:
            outcome.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            trace = traceback.format_exc()
            outcome.error = {"type": type(error).__name__, "message": record.explain(error), "traceback": trace}
            with suppress(OSError), open(folder / "run.log", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(files.scrub(trace))
    path = file_for(folder, outcome.status)
    try:
        record.write(outcome, path)
    except OSError as error:  # a full disk, say: the parent tries a smaller one
        log.error("%s can't be written: %s", path, error)
        code = FAILED
    else:
        tracker.finish(record.read_any(path)[0])
    cache.seal_compiled()
    logging.shutdown()
    os._exit(code)
