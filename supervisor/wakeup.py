"""Signals as something that a selector can wait for.

The handlers do nothing. They exist so that a signal neither kills the process nor is ignored; the
C part of Python's handler writes the signal's number into a socket (``signal.set_wakeup_fd``), and
the loop reads it there when it is ready to. So nothing ever runs between two lines of the program.
"""

import signal
import socket
from typing import Final

_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGCHLD,
)


class Wakeup:
    """The signals of this process. One at a time, made in the main thread."""

    def __init__(self) -> None:
        """Take the signals over; until it is closed, none of them does anything by itself."""
        # Room for tens of thousands of numbers. Were it full, the surplus would be lost: the
        # loop turns every second and merges nothing more important than a repetition.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._before = {number: signal.signal(number, _exist) for number in _SIGNALS}
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._receiver.fileno()

    def came(self) -> list[signal.Signals]:
        """Return the signals since the last call, in order; equal ones may have merged."""
        try:
            numbers = self._receiver.recv(4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in numbers]

    def close(self) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._receiver.close()
        self._sender.close()


def _exist(_number: int, _frame: object) -> None:
    """See the module's docstring."""
