"""Being told to stop: where it is heard, what waits, what insists."""

import os
import signal

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
