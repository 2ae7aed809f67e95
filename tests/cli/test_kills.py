"""Killed at random moments of working time: a two-process sweep, a fit, training, a report. What was lost, as a table.

    pytest -m slow -s tests/cli/test_kills.py          (SPARSEBENCH_KILLS=20 kill -9 and half as many SIGTERM for each)

The command runs in a fork of this process, which has imported everything, so nearly all of its time is work. After each
kill no process may be left, what lies there is whole, and what had finished is still there; the last start completes.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sparsebench import cli, runner  # noqa: F401 - imported before the forks
from sparsebench.records import record, state, stopping
from sparsebench.report import __main__ as report
from sparsebench.training import loop
from tests.helpers import laid, made

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
COUNT = int(os.environ.get("SPARSEBENCH_KILLS", "4"))
KILLS = [signal.SIGKILL] * COUNT + [signal.SIGTERM] * ((COUNT + 1) // 2)
SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8",
         "measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1")  # fmt: skip
HEADINGS = f"{'killed':32} {'signal':8} {'moments':>7} {'at work':>7} {'lost':>5} {'half read':>9} {'orphans':>7}"
FORK = multiprocessing.get_context("fork")


class Command:
    """A command in a fork of this process; `log` is what it says."""

    def __init__(self, folder: Path, log: Path, main: Callable[[], None], arguments: list[str]):
        log.unlink(missing_ok=True)
        self.log = log
        self.process = FORK.Process(target=self.body, args=(folder, main, arguments))
        self.process.start()

    def body(self, folder: Path, main: Callable[[], None], arguments: list[str]) -> None:
        os.setsid()
        os.chdir(folder)
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        handle = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        logging.getLogger().handlers.clear()
        sys.argv = ["sparsebench", *arguments]
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        os._exit(code)

    def wait_for(self, marker: str) -> None:
        """Until the command works: `marker` stands in its log."""
        while self.process.is_alive() and not (self.log.exists() and marker in self.log.read_text(errors="replace")):
            time.sleep(0.01)

    def end(self, number: int) -> tuple[bool, int]:
        """(whether it was still at work, how many processes outlive it) after this signal."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
            os.kill(self.process.pid, number)
        except (psutil.NoSuchProcess, ProcessLookupError):
            self.process.join()
            return False, 0
        self.process.join(60)
        if number == signal.SIGTERM:
            assert self.process.exitcode in (0, 1, 143), self.log.read_text()
            assert "Traceback" not in self.log.read_text()
        _, alive = psutil.wait_procs(children, timeout=20)
        return True, len([p for p in alive if "resource_tracker" not in " ".join(p.cmdline())])


def trial(
    name: str, start: Callable[[], Command], marker: str, look: Callable[[], tuple[dict, int]], length: float
) -> None:
    """Kill `start()` at random moments after `marker`, look at what lies there, and let the last start complete.

    look: ({what is finished: how to know it again}, how many things are half-written and would be read).
    length: seconds after the marker among which moments are drawn.
    """
    chosen, kept = random.Random(name), {}
    for number in (signal.SIGKILL, signal.SIGTERM):
        moments = at_work = lost = half = orphans = 0
        while at_work < KILLS.count(number) and moments < 3 * KILLS.count(number):
            command = start()
            command.wait_for(marker)
            end = time.monotonic() + chosen.uniform(0, length)
            while command.process.is_alive() and time.monotonic() < end:
                time.sleep(0.01)
            working, left = command.end(number)
            finished, torn = look()
            lost += sum(finished.get(what) != sign for what, sign in kept.items())
            print(f"{len(finished)} finished, {torn} half-written, {left} left", flush=True)
            half, orphans, moments, at_work, kept = (
                half + torn,
                orphans + left,
                moments + 1,
                at_work + working,
                finished,
            )
        print(
            f"\n{HEADINGS}\n{name:32} {number.name:8} {moments:7} {at_work:7} {lost:5} {half:9} {orphans:7}", flush=True
        )
        assert at_work == KILLS.count(number) and (lost, half, orphans) == (0, 0, 0)
    command = start()
    command.process.join(600)
    assert command.process.exitcode == 0, command.log.read_text()
    last, torn = look()
    assert not torn and all(last.get(what) == sign for what, sign in kept.items())


def runs(output: Path) -> tuple[dict, int]:
    """(start of every finished run, how many records, states and notes are not whole)."""
    finished, torn = {}, 0
    for file in output.rglob("result.json"):
        content, problem = record.read_any(file)
        torn += problem is not None
        if content and content["status"] == "finished":
            finished[file] = content["started_at"]
    torn += sum(state.read(file) is None for file in output.glob("states/*.safetensors"))
    for file in output.glob("sweeps/*/[0-9]*.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            torn += 1
    return finished, torn


@pytest.fixture
def arguments(model_folder, text_file):
    return ["model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL]


def test_a_two_process_sweep(arguments, tmp_path):
    """Always four points more than are finished."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs sparsebench[launchers]")

    def begin():
        points = ",".join(f"0.{10 + i:02}" for i in range(len(runs(tmp_path / "o")[0]) + 4))
        sweep = ["-m", *arguments, f"method.sparsity={points}", "output_dir=o",
                 "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]  # fmt: skip
        return Command(tmp_path, tmp_path / "log", cli.main, sweep)

    trial("a sweep in two processes", begin, "evaluating", lambda: runs(tmp_path / "o"), length=12)


def test_a_fit(arguments, tmp_path):
    """A search of some seconds, with another seed where the one before has finished."""

    def begin():
        seed = len(runs(tmp_path / "o")[0])
        fit = [*arguments, "output_dir=o", "method.allocation=greedy", "method.greedy.step=0.02", f"seed={seed}"]
        return Command(tmp_path, tmp_path / "log", cli.main, fit)

    trial("a fit", begin, "fitting", lambda: runs(tmp_path / "o"), length=4)


def test_training_between_checkpoints(tmp_path):
    """Each checkpoint is whole, and the weights are those of a training never killed."""
    given = ["model=lenet5", "dataset=digits", "method=fatrelu", "model.train.steps=400", "model.train.warmup=1",
             "model.train.batch_size=64", "model.train.micro_batch=64", "model.train.checkpoint_every=20",
             "model.train.log_every=1", "measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1"]  # fmt: skip

    def look():
        finished, torn = runs(tmp_path / "o")
        for folder in (tmp_path / "o").glob("models/*.checkpoints"):
            if (folder.with_suffix("") / "training.json").exists():
                continue  # trained: what is left of its checkpoints is cleared up, and not read
            torn += sum(loop.problem(folder / f"step-{step}") is not None for step in loop.steps_kept(folder))
        return finished, torn

    def begin(output="o"):
        seed = len(runs(tmp_path / output)[0])
        return Command(tmp_path, tmp_path / "log", cli.main, [*given, f"output_dir={output}", f"seed={seed}"])

    trial("training between checkpoints", begin, "train/lenet5 ", look, length=4)
    begin("whole").process.join(600)
    (never,) = (tmp_path / "whole").glob("models/*/model.safetensors")
    assert (tmp_path / "o" / never.relative_to(tmp_path / "whole")).read_bytes() == never.read_bytes()


def test_writing_a_report(tmp_path):
    """Each file is whole, and no record is touched."""
    sources = laid(tmp_path / "o", *(made(sparsity=s / 10, seed=s) for s in range(1, 9)))
    out = tmp_path / "report"
    ends = {".html": b"</html>", ".png": b"IEND\xaeB`\x82"}

    def look():
        written = [(file.suffix, file.read_bytes()) for file in out.glob("[!.]*")]
        torn = sum(not content or not content.rstrip().endswith(ends.get(suffix, b"")) for suffix, content in written)
        return {file: file.read_bytes() for file in sources.rglob("result.json")}, torn

    def begin():
        return Command(tmp_path, tmp_path / "log", main, [str(sources), "--output", str(out)])

    def main():
        print("working", flush=True)
        report.main()

    trial("writing a report", begin, "working", look, length=2)
    assert {"report.html", "report.md", "report.csv"} <= {p.name for p in out.iterdir()}
