"""Break one line at a time and see the named test fail: the proof that tests can fail (`make mutants`).

tests/mutants.yaml lists the breaks: file, old text (exactly once in the file), new text, the test that must fail, why.
Each is applied to a copy of the checkout in a temporary folder, never to the checkout itself. The tests named pass in an
unbroken copy first, once each. Torch is imported once; every run is a fork with the copy's own code. Exit code 1 where a
break survives, a pattern does not occur exactly once, or a test ends otherwise than by failing (syntax, collection, a
fixture, a skipped test).

    python scripts/mutants.py [--only TEXT] [--jobs N] [--check] [--bare] [--root FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import yaml

LIST = Path("tests", "mutants.yaml")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "outputs", "site", "build", "dist", "*.pyc", ".*_cache", "*.egg-info"
)
PRELOADED = ("torch", "transformers.models.llama.modeling_llama", "transformers.trainer_pt_utils", "accelerate", "numba",
             "scipy.optimize", "sklearn.cluster", "hydra", "safetensors.torch", "tokenizers")  # fmt: skip
BROKEN = (NameError, SyntaxError, ImportError)  # a test that ends so has not seen a wrong number
LIMIT = 400.0  # seconds of one run
BASELINE = "(unbroken)"


@dataclass(frozen=True)
class Mutant:
    """One broken line."""

    name: str
    file: str
    old: str
    new: str
    test: str  # a pytest node id
    why: str  # what would be wrong

    def problem(self, root: Path) -> str | None:
        """Why it can't be applied to the checkout at `root`, or None."""
        path = root / self.file
        if not path.is_file():
            return f"there is no {self.file}"
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            return f"the pattern occurs {count} times in {self.file}, not once: {self.old}"
        if "\n" in self.old + self.new or self.old == self.new:
            return "old and new must be two different parts of one line"
        try:
            if path.suffix == ".py":
                compile(text.replace(self.old, self.new), self.file, "exec")
        except SyntaxError as error:
            return f"{self.file} would not compile: {error.msg}"
        return None


@dataclass(frozen=True)
class Run:
    """What one pytest process found."""

    mutant: Mutant | None
    outcomes: dict[str, str]  # test -> passed | skipped | failed: <exception> | error: ...
    seconds: float


def read(path: Path) -> list[Mutant]:
    """The list. Raises ValueError where an entry is not whole or a name stands twice."""
    keys = [field.name for field in fields(Mutant)]
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in entries:
        if list(entry) != keys or not all(isinstance(v, str) and v for v in entry.values()):
            raise ValueError(f"{path.name}: every entry needs the texts {', '.join(keys)}, got {entry}")
    names = [entry["name"] for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: names must be unique, got {', '.join(twice)} twice")
    return [Mutant(**entry) for entry in entries]


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = f"error: not collected: {report.longreprtext.strip().splitlines()[-1]}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and not self.outcomes.get(item.nodeid, "").startswith(("failed", "error")):
            broken = report.when != "call" or issubclass(call.excinfo.type, BROKEN)
            end = f"error: {report.when}: {call.excinfo.exconly()}" if broken else f"failed: {call.excinfo.typename}"
            self.outcomes[item.nodeid] = end
        elif report.skipped or (report.when == "call" and report.passed):
            self.outcomes.setdefault(item.nodeid, report.outcome)
        return report


def child(copy: Path, tests: list[str], results: Path) -> None:
    """Run tests in a copy, in a process of its own; what they print goes into a file beside the results."""
    os.setsid()
    with results.with_suffix(".log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # the commands that tests start
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    package = importlib.import_module("sparsebench")
    assert Path(package.__file__).resolve().is_relative_to(copy), f"another sparsebench is imported: {package.__file__}"
    plugin = Outcomes()
    code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[plugin])
    if not plugin.outcomes:
        plugin.outcomes = {" ".join(tests): f"error: no test ran (pytest's exit code {int(code)})"}
    results.write_text(json.dumps(plugin.outcomes))
    sys.stdout.flush()
    os._exit(0)


class Place:
    """A copy of the checkout in which one run at a time takes place."""

    def __init__(self, root: Path, folder: Path):
        self.copy, self.results = folder.resolve() / "checkout", folder.resolve() / "results.json"
        shutil.copytree(root, self.copy, symlinks=True, ignore=LEFT_OUT)
        conf = self.copy / "sparsebench" / "conf"
        if not conf.exists():
            conf.symlink_to(Path("..", "conf"))

    def start(self, mutant: Mutant | None, tests: list[str]) -> None:
        self.mutant, self.began = mutant, time.monotonic()
        self.results.unlink(missing_ok=True)
        if mutant:
            self.path = self.copy / mutant.file
            self.whole = self.path.read_text(encoding="utf-8")
            self.path.write_text(self.whole.replace(mutant.old, mutant.new), encoding="utf-8")
        self.process = multiprocessing.get_context("fork").Process(target=child, args=(self.copy, tests, self.results))
        self.process.start()

    def finish(self) -> Run:
        """Put the line back and read what was found."""
        late = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the child and whatever its tests left running
        self.process.join()
        if self.mutant:
            self.path.write_text(self.whole, encoding="utf-8")
        if self.results.exists():
            outcomes = json.loads(self.results.read_text())
        else:
            reason = f"it took more than {LIMIT:.0f} s" if late else f"exit code {self.process.exitcode}"
            log = self.results.with_suffix(".log")
            last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
            outcomes = {"": " ".join(["error: the run left no result:", reason, *last])}
        return Run(self.mutant, outcomes, time.monotonic() - self.began)


def runs(places: list[Place], tasks: Iterable[tuple[Mutant | None, list[str]]]) -> Iterator[Run]:
    """Carry out tasks (a mutant or None, its tests), as many at a time as there are places; runs as they end."""
    waiting, free, busy = list(tasks), list(places), []
    try:
        while waiting or busy:
            while waiting and free:
                busy.append(free.pop())
                busy[-1].start(*waiting.pop(0))
            wait([place.process.sentinel for place in busy], timeout=5)
            for place in list(busy):
                if not place.process.is_alive() or time.monotonic() - place.began > LIMIT:
                    busy.remove(place)
                    free.append(place)
                    yield place.finish()
    finally:
        for place in busy:
            place.finish()


def verdict(outcomes: dict[str, str]) -> str:
    """caught: <exception>, survived or error: ... from the outcomes of one test (of all its parameters)."""
    errors = [text for text in outcomes.values() if text.startswith("error")]
    if errors:
        return errors[0]
    if failures := [text for text in outcomes.values() if text.startswith("failed")]:
        return failures[0].replace("failed", "caught")
    return "survived" if "passed" in outcomes.values() else "error: the test was skipped"


def unsound(outcomes: dict[str, str]) -> str | None:
    """What is wrong with tests of the unbroken copy, or None."""
    return next((f"{test}: {text}" for test, text in outcomes.items() if text not in ("passed", "skipped")), None)


def by_file(tests: Iterable[str]) -> list[list[str]]:
    """The tests, each once, in one list per file."""
    groups: dict[str, list[str]] = {}
    for test in dict.fromkeys(tests):
        groups.setdefault(test.partition("::")[0], []).append(test)
    return list(groups.values())


def line(name: str, test: str, result: str, seconds: float | None = None) -> None:
    """A row of the table."""
    took = "" if seconds is None else f"{seconds:.1f}"
    word, _, how = result.partition(": ")
    note = f"  ({how})" if word == "caught" and how != "AssertionError" else ""
    print(f"{name:<44} {word:<9} {took:>6}  {test}{note}", flush=True)


def measure(root: Path, mutants: list[Mutant], jobs: int) -> dict[str, str]:
    """Verdict by name of mutants whose patterns fit; prints the table."""
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        places = [Place(root, Path(folder, str(i))) for i in range(jobs)]
        sound: set[str] = set()
        for run in runs(places, [(None, tests) for tests in by_file(m.test for m in mutants)]):
            bad = unsound(run.outcomes)
            sound |= {test.partition("[")[0] for test, text in run.outcomes.items() if text == "passed"}
            line(
                BASELINE, next(iter(run.outcomes)).partition("::")[0], f"error: {bad}" if bad else "passed", run.seconds
            )
            if bad:
                print(f"    {bad}")
        fit = [m for m in mutants if m.test.partition("[")[0] in sound]
        verdicts |= {m.name: "error: its test does not pass unbroken" for m in mutants if m not in fit}
        for run in runs(places, [(m, [m.test]) for m in fit]):
            verdicts[run.mutant.name] = verdict(run.outcomes)
            line(run.mutant.name, run.mutant.test, verdicts[run.mutant.name], run.seconds)
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names, files or tests that contain this text (or fit it, with *)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (all cores)")
    parser.add_argument("--check", action="store_true", help="see that the patterns occur once, run nothing")
    parser.add_argument("--bare", action="store_true", help="import nothing beforehand: quicker for a handful")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    given = parser.parse_args(arguments)
    mutants = [m for m in read(given.root / LIST) if chosen(m, given.only)]
    problems = {m.name: problem for m in mutants if (problem := m.problem(given.root))}
    verdicts = {name: f"no match: {problem}" for name, problem in problems.items()}
    if not mutants:
        print(f"no mutant fits --only {given.only}")
        return 1
    if not given.check:
        for name in () if given.bare else PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        print(f"{'mutant':<44} {'result':<9} {'s':>6}  test")
        verdicts |= measure(given.root.resolve(), [m for m in mutants if m.name not in verdicts], max(1, given.jobs))
    else:
        verdicts |= {m.name: "caught" for m in mutants if m.name not in verdicts}
    bad = [m for m in mutants if not verdicts[m.name].startswith("caught")]
    for m in bad:
        print(f"{m.name}: {verdicts[m.name]}\n    {m.file}: {m.old} -> {m.new}\n    {m.test}: {m.why}")
    print(f"{len(mutants) - len(bad)} of {len(mutants)} {'patterns fit' if given.check else 'caught'}")
    return 1 if bad else 0


def chosen(mutant: Mutant, only: str) -> bool:
    return any(only in text or fnmatch.fnmatch(text, only) for text in (mutant.name, mutant.file, mutant.test))


if __name__ == "__main__":
    sys.exit(main())
