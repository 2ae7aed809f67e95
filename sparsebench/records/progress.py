"""What a person sees of a long phase: a bar on a terminal, elsewhere a line now and then, both with the time left.

Everything goes to stderr: stdout holds the results alone. Nothing is shown of a phase that is over within seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
T = TypeVar("T")
SOON, FIRST, EVERY = 1.0, 10.0, 30.0  # seconds to the bar, to the first line, between lines


class Phase:
    """What the process does at the moment; the outermost loop in it is the one that is shown."""

    name = "working"
    shown = False
    spent: ClassVar[list[dict[str, Any]]] = []  # of the phases so far: name, seconds, cpu_seconds, peak_bytes
    start = (0.0, 0.0)
    peak: ClassVar[Callable[[], int] | None] = None  # most bytes in use since it was last asked


def begin(name: str) -> None:
    """A new phase: said in one line, and named by the progress of its loops."""
    end()
    Phase.name, Phase.start = name, clocks()
    log.info(name)


def end() -> None:
    """The end of the phase that runs, if one does: what it took is added to `Phase.spent`."""
    if any(Phase.start):
        seconds, cpu_seconds = (now - then for now, then in zip(clocks(), Phase.start, strict=True))
        spent = {"name": Phase.name, "seconds": seconds, "cpu_seconds": cpu_seconds}
        Phase.spent.append(spent | ({} if Phase.peak is None else {"peak_bytes": Phase.peak()}))
    Phase.start = (0.0, 0.0)


def clocks() -> tuple[float, float]:
    """Seconds that passed, and those that processors spent on this process (all of its threads)."""
    return time.perf_counter(), time.process_time()


def taken() -> list[dict[str, Any]]:
    """What each phase took since the last call, in order."""
    end()
    spent, Phase.spent, Phase.peak = Phase.spent, [], None
    return spent


def last() -> dict[str, Any]:
    """What the last phase took."""
    return Phase.spent[-1]


def with_peaks(peak: Callable[[], int]) -> None:
    """Let each phase from this one on say what memory it took."""
    Phase.peak = peak


def shown(items: Iterable[T], total: int, what: str = "") -> Iterator[T]:
    """`items` as they come, with the progress of taking them. total: how many; what: the loop's own name in its phase.

    The bar is drawn between items only, by this thread: nothing runs beside code that is timed.
    """
    if Phase.shown:  # an inner loop
        yield from items
        return
    Phase.shown = True
    label = f"{Phase.name}, {what}" if what else Phase.name
    console = Console(stderr=True)
    try:
        yield from (barred if console.is_terminal else lined)(items, total, label, console)
    finally:
        Phase.shown = False


def lined(items: Iterable[T], total: int, label: str, _: Console) -> Iterator[T]:
    """A line of log after FIRST seconds and every EVERY seconds from then on."""
    start = time.monotonic()
    due = start + FIRST
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now >= due:
            log.info("%s: %d of %d, about %s left", label, done, total, clock((now - start) / done * (total - done)))
            due = now + EVERY
        yield item


def barred(items: Iterable[T], total: int, label: str, console: Console) -> Iterator[T]:
    """A bar that vanishes at the end, from SOON seconds on and at most four times a second."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    task, due = bar.add_task(label, total=total), time.monotonic() + SOON
    started = False
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            bar.update(task, completed=done)
            if done and now >= due:
                bar.start()
                started = True
                bar.refresh()
                due = now + 0.25
            yield item
    finally:
        if started:
            bar.stop()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
