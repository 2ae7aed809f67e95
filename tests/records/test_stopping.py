"""Being told to stop: where it is heard, what waits, what insists."""

import os
import signal
import threading
import time
import weakref

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
    """Also where a thread of a library takes the signal, which the mask of this one does not stop. Before: cut there."""
    done, over = [], threading.Event()
    threading.Thread(target=over.wait).start()
    with pytest.raises(stopping.Stopped), stopping.blocked():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        done.append(1)
    over.set()
    assert done == [1] and stopping.name() == "SIGTERM"


def test_others_at_work_are_told_first_and_what_nohup_ignores_stays_ignored():
    order = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.listen(before=lambda: order.append("others"))
    os.kill(os.getpid(), signal.SIGHUP)
    assert stopping.name() is None
    with pytest.raises(stopping.Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    assert order == ["others"]


class Finalised:
    """Is told to stop while it is taken away."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["destructor", "callback"])
def test_a_stop_that_python_drops_is_heard_a_moment_later(how, capfd):
    """Before: a SIGTERM inside a destructor (regex has one) printed `Exception ignored in` with a traceback, and was lost."""
    stopping.listen()  # some pytest puts a hook of its own before every test
    each = Finalised() if how == "destructor" else set()
    reference = weakref.ref(each, lambda _: os.kill(os.getpid(), signal.SIGTERM)) if how == "callback" else None
    with pytest.raises(stopping.Stopped):
        del each
        time.sleep(5)
    assert reference is None or reference() is None
    assert "Traceback" not in capfd.readouterr().err
