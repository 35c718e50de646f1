"""A child's end of the control pair: signs of life one way, the order to finish the other way.

The beats are sent by a Trio task. That is their whole point: a thread or a timer signal would go
on beating while the loop hangs, and prove nothing. For the same reason a beat that does not fit
into the pair is dropped instead of waited for: the next one says the same, newer.

Three things tell a child to finish, and all of them become one `Drain`:

* the supervisor's own order;
* SIGTERM sent to the child by hand: drained the ordinary way, as configured;
* the end of the supervisor, seen as end of file on the pair, or as SIGTERM by way of
  ``PR_SET_PDEATHSIG``. Then the child hurries: while it holds its listening socket, no new
  supervisor can bind the port.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from trioserver.status import (
    CONTROL_FD,
    PACKET_BYTES,
    Beat,
    Drain,
    Report,
    Started,
    decode_order,
    encode,
)

BEAT_SECONDS: Final = 1.0
"""Time between two beats. The supervisor calls a child silent after several."""

_ORPHAN_SECONDS: Final = 1.5
"""Time to finish without a supervisor: long enough for a goodbye, short enough for a restart."""

_PR_SET_PDEATHSIG: Final = 1


def tie_to_parent(control_fd: int = CONTROL_FD) -> None:
    """Bind this process's life to the supervisor's. Call it first, from the main thread.

    Afterwards the kernel sends SIGTERM when the supervisor dies, Ctrl-C no longer interrupts (the
    terminal sends it to the whole group; only the supervisor acts on it), and SIGABRT prints the
    stacks of all threads to standard error before it kills.

    Raises:
        SystemExit: The supervisor is gone already.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(all_threads=True)
    # Should a sandbox forbid this, the end of file on the pair still tells.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # A parent that died before prctl() sends nothing any more, so look after setting it.
    if os.getppid() != _supervisor_pid(control_fd):
        raise SystemExit("the supervisor is gone")


def _supervisor_pid(control_fd: int) -> int:
    # The peer of a socket pair is whoever made the pair: no need to be told the pid.
    with socket.socket(fileno=os.dup(control_fd)) as pair:
        credentials = pair.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


class Lifeline:
    """The child's side of the control pair.

    One task runs `run`; everything else may be called from any task of the same loop.
    """

    def __init__(
        self,
        fd: int,
        report: Callable[[], Beat],
        *,
        drain_seconds: float,
        drain_propagation: float,
    ) -> None:
        """Take over the descriptor.

        Args:
            fd: This end of the pair; closed when `run` ends.
            report: Says how the child is. Called on each beat: cheap, does not raise.
            drain_seconds: What a SIGTERM sent by hand means, as `Drain.seconds`.
            drain_propagation: The same, as `Drain.propagation`.
        """
        self._pair = socket.socket(fileno=fd)
        self._report = report
        self._supervisor = _supervisor_pid(fd)
        # The supervisor replaces who ends by itself: the socket will be served.
        self._by_hand = Drain(seconds=drain_seconds, propagation=drain_propagation, replaced=True)
        self._order = self._by_hand
        self._drain = trio.Event()
        self._hurry = trio.Event()
        self._open = True
        self._owes_started = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Beat, and listen for orders, until cancelled.

        Reports `task_status.started` when SIGTERM is handled and the first beat is sent.

        Cancellation:
            Stops beating and closes the pair. The supervisor then waits for the process's end, and
            after a while takes it for hung.
        """
        try:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._listen)
                    nursery.start_soon(self._obey_signals, signals)
                    self.changed()
                    task_status.started()
                    while True:
                        await trio.sleep(BEAT_SECONDS)
                        self.changed()
        finally:
            self._open = False
            self._pair.close()

    def started(self) -> None:
        """Tell the supervisor that a client could connect now. Never blocks, never raises."""
        # Said once, so unlike a beat it must not be lost: tried again before each beat.
        self._owes_started = not self._send(Started())

    def changed(self) -> None:
        """Send a beat now: what `report` returns has changed. Never blocks, never raises."""
        if self._owes_started:
            self.started()
        self._send(self._report())

    async def wait_drain(self) -> Drain:
        """Wait until this child must finish; return how. Returns at once if it must already.

        A later order may ask for more haste, see `wait_hurry`.

        Cancellation:
            Safe; the order is not lost.
        """
        await self._drain.wait()
        return self._order

    async def wait_hurry(self) -> Drain:
        """Wait until this child must finish quickly; return how. It may have been draining before.

        Cancellation:
            Safe; the order is not lost.
        """
        await self._hurry.wait()
        return self._order

    async def _listen(self) -> None:
        pair = trio.socket.from_stdlib_socket(self._pair)
        # The end comes as a reset if the supervisor has not read all that was said.
        with contextlib.suppress(ConnectionError):
            while packet := await pair.recv(PACKET_BYTES):
                order = decode_order(packet)
                if order is not None:
                    self._finish(order)
        self._finish(_orphaned())

    async def _obey_signals(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            orphan = os.getppid() != self._supervisor
            self._finish(_orphaned() if orphan else self._by_hand)

    def _finish(self, order: Drain) -> None:
        # Haste is never taken back: a second, slower order changes nothing.
        if self._drain.is_set() and (self._order.quick or not order.quick):
            return
        self._order = order
        self._drain.set()
        if order.quick:
            self._hurry.set()

    def _send(self, report: Report) -> bool:
        if not self._open:
            return False
        try:
            self._pair.send(encode(report), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False  # The supervisor is busy or stopped.
        except ConnectionError:
            return False  # It is gone; `_listen` sees that too and acts on it.
        return True


def _orphaned() -> Drain:
    return Drain(seconds=_ORPHAN_SECONDS, quick=True)
