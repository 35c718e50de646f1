"""Signals for a selector."""

import os
import signal

from supervisor.wakeup import Wakeup


def test_signals_arrive_in_order_and_do_nothing_else() -> None:
    """Also those that would end this process, or are ignored."""
    wakeup = Wakeup()
    try:
        assert wakeup.came() == []
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert wakeup.came() == [number]
        for number in (signal.SIGQUIT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert wakeup.came() == [signal.SIGQUIT, signal.SIGHUP]
    finally:
        wakeup.close()


def test_signals_are_given_back() -> None:
    """Whoever had them before has them again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    Wakeup().close()

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
