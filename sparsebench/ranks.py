"""One process or several of one run (torchrun, accelerate launch): they train together, the first one does the rest.

Every process starts the same command. All load and fit; then only the first evaluates, measures and writes. No torch
before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

T = TypeVar("T")
UMASK = os.umask(0)
os.umask(UMASK)
MODE = 0o666 & ~UMASK  # of files that others may use, too: locks, records


def rank() -> int:
    """This process's number among all of the run, as the launcher set it; 0 without a launcher.

    RANK alone is what some batch system left behind: a run of one process has no other that could be the first.
    """
    return int(os.environ.get("RANK") or "0") if count() > 1 else 0


def count() -> int:
    return int(os.environ.get("WORLD_SIZE") or "1")


def problem() -> str | None:
    """The line about a RANK and WORLD_SIZE of the environment that are not those of a launcher, or None."""
    for name in ("WORLD_SIZE", "RANK"):
        value = os.environ.get(name)
        if value and not (value.isascii() and value.isdigit() and int(value) >= (name == "WORLD_SIZE")):
            return f"{name} of the environment must be a whole number, as torchrun sets it, got {value!r}"
    return None if rank() < count() else f"RANK of the environment must be below WORLD_SIZE={count()}, got {rank()}"


def first() -> bool:
    return rank() == 0


def start(on_cpu: bool) -> None:
    """Join the other processes (gloo on CPUs, NCCL on GPUs) and take this process's own GPU; nothing for one process."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu)


def agreed(value: T) -> T:
    """The first process's `value`, in all of them."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock on a file against other runs, held by the first process for all of this run."""
    if not first():
        yield
        return
    with FileLock(path, mode=MODE):
        yield
