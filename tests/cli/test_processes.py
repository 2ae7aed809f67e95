"""Processes on one folder, in this process and forks of it: a stale lock, four on one run, another user, signals, disks.

What a run itself does is stood in for; whole runs are in test_reliability.py.
"""

import contextlib
import errno
import io
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from inspect import signature
from pathlib import Path
from unittest import mock

import psutil
import pytest

from sparsebench import cli, ranks, runner, sweep
from sparsebench.config.compose import compose_all
from sparsebench.records import record, stopping
from sparsebench.report import __main__ as report
from sparsebench.report import charts
from tests.helpers import laid, vision

OTHER_USER = 12345
ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def configuration(tmp_path):
    return compose_all([f"output_dir={tmp_path}/outputs", "dataset=digits", "model=lenet5", "wandb.mode=disabled"])[0]


SHARED = bool(os.environ.get("PYTEST_XDIST_WORKER"))  # a worker of pytest-xdist has threads of its own


@pytest.fixture
def heard(request):
    """`listening`, only where this is the process's one thread: a signal that it blocks is otherwise heard through another."""
    if SHARED:
        pytest.skip("test_signals_pass_in_a_process_of_their_own runs it")
    request.getfixturevalue("listening")


def finish(configuration: dict, folder: Path, identity: str) -> tuple[dict, Path]:
    """A run that finished, with its trace in `made`."""
    with open(Path(configuration["output_dir"]) / "made", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    content = record.Record(identity, "a/b", configuration, status="finished", started_at="2026-01-01T00:00:00+00:00")
    record.write(content, folder / "result.json")
    return record.read(folder / "result.json"), folder / "result.json"


def test_a_stale_lock_holds_nobody(configuration, monkeypatch):
    """What a killed process left is a file, no lock."""
    monkeypatch.setattr(cli, "isolated", finish)
    folder = cli.location(configuration)[0]
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("")
    os.utime(folder / ".lock", (1, 1))
    assert cli.obtain(configuration)[0]["status"] == "finished"
    assert (folder / ".lock").stat().st_mode & 0o777 == 0o644 or ranks.MODE != 0o644


def test_four_processes_on_one_run_make_it_once(configuration, monkeypatch):
    monkeypatch.setattr(cli, "isolated", finish)
    Path(configuration["output_dir"]).mkdir()

    def body(number):
        content, _ = cli.obtain(configuration)
        Path(configuration["output_dir"], f"{number}.json").write_text(json.dumps(content))
        os._exit(0)

    processes = [FORK.Process(target=body, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(Path(configuration["output_dir"], "made").read_text().split()) == 1
    answers = [Path(configuration["output_dir"], f"{i}.json").read_text() for i in range(4)]
    assert len(set(answers)) == 1 and json.loads(answers[0])["status"] == "finished"


def test_another_user_reads_what_is_finished_and_is_told_the_rest_in_one_line(configuration, monkeypatch):
    """Two users on one output_dir, which the second one can't write."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    monkeypatch.setattr(cli, "isolated", finish)
    base = Path(tempfile.mkdtemp(prefix="two-users-"))
    base.chmod(0o755)
    configuration["output_dir"] = str(base / "outputs")
    (base / "outputs").mkdir()
    first, _ = cli.obtain(configuration)
    receive, send = FORK.Pipe()

    def body():
        os.setgid(OTHER_USER)
        os.setuid(OTHER_USER)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            finished, other = cli.obtain(configuration), cli.obtain({**configuration, "seed": 7})
        send.send((finished[0], other[0], said.getvalue()))
        os._exit(0)

    process = FORK.Process(target=body)
    process.start()
    assert receive.poll(60)
    answered, other, said = receive.recv()
    process.join()
    shutil.rmtree(base)
    assert answered == first and other is None
    assert said.startswith(f"error: output_dir={base}/outputs: ") and "Permission denied" in said
    assert len(said.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A run's own process


def at_once(configuration, result, folder, track):
    result.started_at = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def run(configuration, monkeypatch):
    """A function body -> (the record of a run whose work is `body`, its file)."""

    def start(body):
        monkeypatch.setattr(runner, "timed_run", body)
        folder, identity = cli.location(configuration)
        folder.mkdir(parents=True, exist_ok=True)
        return cli.isolated(configuration, folder, identity)

    return start


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_a_run_with_a_record_that_says_so(run, heard, number):
    parent = os.getpid()

    def body(*arguments):
        os.kill(parent, number)
        time.sleep(60)

    content, _ = run(body)
    assert content["status"] == "interrupted" and content["error"]["type"] == "Stopped"
    assert content["error"]["message"] == "told to stop by SIGTERM"  # the parent passes all of them on as one
    assert stopping.exit_code() == (130 if number == signal.SIGINT else 143)


def test_a_run_that_hears_nothing_is_killed_and_recorded(run, heard, monkeypatch):
    """Stuck in a long computation outside Python, say."""
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.5)
    parent = os.getpid()

    def body(*arguments):
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
        os.kill(parent, signal.SIGTERM)
        time.sleep(60)

    content, path = run(body)
    assert content["status"] == "interrupted" and content["error"]["message"] == "told to stop by SIGTERM"
    assert record.read(path) == content


def test_a_signal_to_the_runs_own_process_alone(run, heard):
    def body(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    content, _ = run(body)
    assert content["status"] == "interrupted" and stopping.name() is None


def test_a_signal_before_the_run_began(run, configuration, heard, monkeypatch):
    """While torch is imported, say."""

    def start(self):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)

    monkeypatch.setattr(stopping, "blocked", contextlib.nullcontext)
    monkeypatch.setattr(FORK.Process, "start", start)
    content, _ = run(at_once)
    assert content["status"] == "interrupted" and content["error"]["message"] == "told to stop by SIGHUP"


def test_a_finished_run_stays_finished_when_it_is_told_to_stop_at_its_end(run, heard, monkeypatch):
    """The signal comes while the record is being written."""
    write = record.write

    def tell(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(record, "write", tell)
    content, _ = run(at_once)
    assert content["status"] == "finished"


def test_a_full_disk_where_the_record_is_written(run, capfd, monkeypatch):
    """The run's own record does not fit; the parent's smaller one says what happened."""
    write, parent = record.write, os.getpid()

    def full(content, path):
        if os.getpid() != parent:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(content, path)

    monkeypatch.setattr(record, "write", full)
    with caught() as lines:
        content, _ = run(at_once)
    assert content["status"] == "failed" and "ended without a record" in content["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err and not lines


def test_a_full_disk_in_the_middle_of_a_run(run):
    def body(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")

    content, _ = run(body)
    assert content["error"]["message"] == "[Errno 28] No space left on device: 'state.safetensors'"


def report_without_charts():
    with mock.patch.object(charts, "of_group", return_value=({}, {})):
        report.main()


def report_on_a_full_disk():
    """The disk takes CSV and Markdown, and is full in the middle of the page."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    report_without_charts()


def test_a_full_disk_in_the_middle_of_a_report(forked, tmp_path):
    """One line, no half file, and the page of before is whole; with space again the same command writes it."""
    folder = laid(tmp_path / "runs", vision())
    assert forked("runs", main=report_without_charts).returncode == 0
    page = (folder / "report" / "report.html").read_bytes()
    laid(tmp_path / "runs" / "more", vision(0.5))
    full = forked("runs", main=report_on_a_full_disk)
    assert full.returncode == 1 and not full.stdout
    assert full.stderr == "error: runs/report can't be written: [Errno 27] File too large\n"
    assert (folder / "report" / "report.html").read_bytes() == page and not list(folder.rglob("*.partial"))
    assert len((folder / "report" / "report.csv").read_text().splitlines()) == 3
    again = forked("runs", main=report_without_charts)
    assert again.returncode == 0 and (folder / "report" / "report.html").read_bytes() != page


@contextlib.contextmanager
def caught():
    """Warnings of the parent, which there should be none of."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: lines.append(entry.getMessage())
    logging.getLogger("sparsebench").addHandler(handler)
    yield lines
    logging.getLogger("sparsebench").removeHandler(handler)


# ---------------------------------------------------------------------------------------------------------------------
# Workers of a sweep


def test_a_sweep_tells_its_workers_first_and_waits_for_what_they_keep(tmp_path, heard, monkeypatch):
    """The worker's run is interrupted and noted before the sweep itself hears of the signal; it takes no further job."""
    monkeypatch.setenv(sweep.MAIN, str(os.getpid()))

    def worker():
        try:
            with sweep.at_work(tmp_path):
                (tmp_path / "begun").touch()
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    time.sleep(0.3)  # its record
                    (tmp_path / "kept").touch()
                    raise
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt), sweep.at_work(tmp_path):
                (tmp_path / "another").touch()
        os._exit(0)

    process = FORK.Process(target=worker)
    process.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    stopping.listen(before=lambda: sweep.end_workers(tmp_path))
    with pytest.raises(stopping.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / "kept").exists() and not list(tmp_path.glob("worker-*"))
    process.join(20)
    assert process.exitcode == 0 and not (tmp_path / "another").exists()


def test_no_worker_of_a_sweep_outlives_a_kill(tmp_path):
    """Also one that never had a job: before, such a worker of joblib's was found twenty minutes after its sweep's end."""
    code = """
import os, signal, subprocess, sys
from sparsebench import sweep
os.environ[sweep.MAIN] = str(os.getpid())
sweep.guard_workers()
print(subprocess.Popen(["sleep", "300"]).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    worker, last = int(killed.stdout), time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < last, "the worker is still there"
        time.sleep(0.1)


def pytest_alone():
    sys.exit(pytest.main(sys.argv[1:]))


@pytest.mark.skipif(not SHARED, reason="this is a process of their own")
def test_signals_pass_in_a_process_of_their_own(forked):
    names = [n for n, test in globals().items() if n.startswith("test_") and "heard" in signature(test).parameters]
    here = {"PYTEST_XDIST_WORKER": "", "PYTEST_CURRENT_TEST": ""}
    tests = [f"{__file__}::{name}" for name in names]
    process = forked("-n", "0", "-q", "-p", "no:cacheprovider", *tests, folder=ROOT, env=here, main=pytest_alone)
    assert names and process.returncode == 0 and "skipped" not in process.stdout, process.stdout[-3000:]
