"""Being told to stop: where it is heard, what waits, what insists, and that no orphan works on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sparsebench.records import stopping

pytestmark = pytest.mark.usefixtures("listening")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_is_heard_where_the_process_is(number, code):
    with pytest.raises(stopping.Stopped, match=f"told to stop by {number.name}"):
        os.kill(os.getpid(), number)
    assert stopping.exit_code() == code and stopping.name() == number.name
    os.kill(os.getpid(), signal.SIGTERM)  # told already: what ends the work is not cut


def test_what_must_not_be_cut_ends_first_and_a_second_ctrl_c_insists():
    done = []
    with pytest.raises(stopping.Stopped), stopping.held():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(1)
    assert done == [1]
    stopping.listen()
    with pytest.raises(stopping.Stopped), stopping.held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(2)
        os.kill(os.getpid(), signal.SIGINT)
        done.append(3)
    assert done == [1, 2]


def test_a_fork_is_not_cut():
    with pytest.raises(stopping.Stopped), stopping.blocked():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.name() is None
    assert stopping.name() == "SIGTERM"


def test_others_at_work_are_told_first_and_what_nohup_ignores_stays_ignored():
    order = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.listen(before=lambda: order.append("others"))
    os.kill(os.getpid(), signal.SIGHUP)
    assert stopping.name() is None
    with pytest.raises(stopping.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    assert order == ["others"]


def test_a_worker_ends_with_the_process_that_started_it():
    """The parent is killed; its child, which would sleep for a minute, is gone within seconds."""
    child = "from sparsebench.records import stopping; import os, time; stopping.die_with(os.getppid()); time.sleep(60)"
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(process.stdout.readline()))
    time.sleep(1)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([orphan], timeout=20)
    assert not alive
