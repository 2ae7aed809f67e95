"""Being told to stop: Ctrl-C, and the SIGTERM or SIGHUP by which a batch system takes its machine back.

The first signal raises `Stopped` where the process is. Inside `held` it waits for the end of what must not be cut: a
step of training, which then leaves a checkpoint. Later signals change nothing, but a second Ctrl-C insists. A process
that has others at work tells them first (`listen(before=...)`). No torch here.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

AGAIN_SECONDS = 0.05  # until a Stopped that was lost is raised again: destructors are short
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED, TERMINATED = 130, 143  # exit codes
GRACE_SECONDS = 25  # batch systems kill for good after 30 or more


class Stopped(KeyboardInterrupt):
    """The process was told to stop; the message says by what."""


@dataclass
class Told:
    """What this process has been told."""

    number: int | None = None  # the first signal
    held: int = 0  # depth of `held`
    lost: bool = False  # whether Python dropped the Stopped
    before: Callable[[], None] | None = None


told = Told()


def name() -> str | None:
    """The signal that told this process to stop, or None."""
    return None if told.number is None else signal.Signals(told.number).name


def reason() -> str:
    """Why this process ends, in words."""
    return f"told to stop by {name() or 'a signal'}"


def exit_code() -> int:
    return INTERRUPTED if told.number in (None, signal.SIGINT) else TERMINATED


def listen(before: Callable[[], None] | None = None) -> None:
    """Raise Stopped in this process when it is told to stop, after calling `before`. Forgets what was told before.

    What the caller of the process ignores (nohup, a job in the background of a shell) stays ignored.
    """
    global told  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return
    told = Told(before=before)
    sys.unraisablehook = dropped
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hear)


def ignore(*numbers: int) -> None:
    """Hear these signals no more (all of them without arguments): what follows is short and must be done."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers or SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def hear(number: int, frame: object) -> None:
    """The handler of all signals."""
    first, insists = told.number is None, number == told.number == signal.SIGINT
    again, told.lost = told.lost, False
    if first:
        told.number = number
        if told.before is not None:
            told.before()
    if insists or ((first or again) and not told.held):
        raise Stopped(reason())


hook = sys.unraisablehook  # of before this module


def dropped(what: sys.UnraisableHookArgs) -> None:
    """Python's hook for what was raised where nothing can catch it."""
    number = told.number
    if number is None or not issubclass(what.exc_type, Stopped):
        hook(what)
        return
    told.lost = True
    with suppress(RuntimeError):  # no threads while the interpreter ends, and nothing to stop
        threading.Timer(AGAIN_SECONDS, lambda: os.kill(os.getpid(), number)).start()


@contextmanager
def held() -> Iterator[None]:
    """Let nothing be cut here: who is told to stop meanwhile hears of it at the end, or looks at `name` on the way."""
    told.held += 1
    try:
        yield
    finally:
        told.held -= 1
    if told.number is not None and not told.held:
        raise Stopped(reason())


@contextmanager
def blocked() -> Iterator[None]:
    """As `held`, for the moment of a fork: in the processes forked here the signals wait in the kernel until `unblock`.

    Waiting in the kernel does not hold them here, where a thread of some library may take them.
    """
    with held():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """The end of `blocked` in a forked process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def die_with_parent() -> None:
    """End this process when its parent is gone, however that went, so that no orphan works on after a kill -9."""
    parent = multiprocessing.parent_process()
    if parent is None:  # nobody started it
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end(child: multiprocessing.Process) -> None:
    """Tell a run's process to stop and wait for its record and its checkpoint; kill it where it does not get there."""
    if child.pid is None:
        return
    child.terminate()
    last = time.monotonic() + GRACE_SECONDS
    while child.is_alive() and time.monotonic() < last:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C, which the child heard, too
            child.join(0.2)
    if child.is_alive():
        child.kill()
    child.join()
