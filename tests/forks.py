"""Commands in a fork of a process that has imported everything: a whole run without the five seconds of its imports.

What is tested of the start itself (its answers, its signals, its environment) goes through the installed command.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from sparsebench import cli

IMPORTED = (
    "tests.forks", "sparsebench.runner", "sparsebench.engines.fused_cpu", "sparsebench.kernels.cpu_numba",
    "sparsebench.tasks.language_modeling", "transformers.models.llama.modeling_llama",
    "sparsebench.report.page", "sparsebench.records.archive", "sparsebench.bench.step",
)  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Start the process that imports everything, with the environment of now: some libraries read theirs at import."""
    CONTEXT.set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()


def become(main: Callable[[], None], arguments: Sequence[str], folder: Path, out: Path, err: Path) -> None:
    """Be a command in this process, in `folder`, with what it says in these files, to its exit."""
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    sys.argv = ["sparsebench", *arguments]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(environment: Mapping[str, str], *rest) -> None:
    os.environ.clear()
    os.environ.update(environment)
    become(*rest)


def begin(
    arguments: Sequence[str], folder: Path, said: Path, environment: Mapping[str, str], main: Callable[[], None]
) -> multiprocessing.Process:
    """The command, started; what it says goes to `out` and `err` in the folder `said`. `serve` comes first."""
    rest = (main, list(arguments), folder, said / "out", said / "err")
    process = CONTEXT.Process(target=command, args=(dict(environment), *rest))
    process.start()
    return process


def run(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    timeout: float,
    main: Callable[[], None] = cli.main,
) -> subprocess.CompletedProcess:
    """As subprocess.run of the installed command."""
    with tempfile.TemporaryDirectory() as said:
        process = begin(arguments, folder, Path(said), environment, main)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout, Path(said, "err").read_bytes())
        out, err = (Path(said, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out, err)
