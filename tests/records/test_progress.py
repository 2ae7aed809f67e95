"""Progress of a long loop: lines where stderr is no terminal, a bar where it is, nothing of what is quick."""

import io
import logging

import pytest
from rich.console import Console

from sparsebench.records import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def taken(clock, count, seconds):
    """What a loop of `count` items of so many seconds says."""
    for _ in progress.shown(range(count), count, "windows"):
        list(progress.shown(range(3), 3))  # an inner loop says nothing of its own
        clock[0] += seconds


def test_lines_with_the_time_left(clock, caplog, monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=False))
    caplog.set_level(logging.INFO)
    progress.begin("dense model: evaluating")
    taken(clock, 100, 2.0)
    lines = [r.getMessage() for r in caplog.records]
    assert lines[:3] == [
        "dense model: evaluating",
        "dense model: evaluating, windows: 5 of 100, about 3:10 left",
        "dense model: evaluating, windows: 20 of 100, about 2:40 left",
    ]
    assert len(lines) == 8
    caplog.clear()
    taken(clock, 100, 0.01)
    assert not caplog.records


def test_a_bar_on_a_terminal_is_gone_at_the_end(clock, monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    progress.begin("teal: fitting")
    taken(clock, 10, 0.5)
    assert "teal: fitting, windows" in screen.getvalue() and "3/10" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[2K") and not capsys.readouterr().out
    screen.truncate(0)
    taken(clock, 10, 0.01)
    assert "windows" not in screen.getvalue()


def test_a_loop_that_is_left_early_gives_its_place_back(clock):
    for _ in progress.shown(range(5), 5):
        break
    assert not progress.Phase.shown
    with pytest.raises(ZeroDivisionError):
        [1 / i for i in progress.shown(range(5), 5)]
    assert not progress.Phase.shown


def test_times_are_short():
    assert [progress.clock(s) for s in (3, 125, 3725)] == ["0:03", "2:05", "1:02:05"]
