"""The pump: one task per worker that accepts, reads and flushes every socket of the worker.

Why not a task per connection that awaits ``recv``: Trio's way costs two system calls and a task
switch per message (arm the one-shot epoll entry, wait, be scheduled) and keeps a suspended
``recv`` of several kilobytes per connection. Here each socket is registered once in an epoll of
our own; Trio waits for that epoll's file descriptor, which is readable when anything in it is.
One wake-up of the pump then serves up to `EVENTS_PER_ROUND` sockets with plain calls.

Rules
    * One task runs `Pump.run`, and only this module touches the epoll.
    * The pump never awaits a peer. A peer that has too much pending asks not to be read.
    * An exception out of a peer's callback is that peer's end (`Peer.failed`), nobody else's.
    * Work per round is bounded, then Trio's other tasks have their turn.
    * A descriptor is unregistered before it is closed: while a duplicate of it lives elsewhere,
      epoll would go on reporting it under a number that may mean another socket by then.

Hang-ups (EPOLLHUP, EPOLLERR) cannot be masked: a peer that is not being read is told by
`Peer.hung_up`, otherwise a dead socket would spin the loop.
"""

import errno
import select
import socket
from collections.abc import Callable
from typing import Final, NoReturn, Protocol

import trio

from trioserver.timers import IDLE, Timed, Wheel

EVENTS_PER_ROUND: Final = 128
"""Sockets served before other tasks have their turn: about 1 ms of echoes."""

ACCEPTS_PER_ROUND: Final = 64
"""Connections taken from a listening socket in one round."""

READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
_HANG_UP: Final = select.EPOLLHUP | select.EPOLLERR

LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 1 << 20
"""What a closing socket may still send before we stop reading politely. See `Linger`."""

ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting after the kernel refused a descriptor or memory."""

_TRANSIENT: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR})
"""Errors of accept(2) that concern one client, which is gone: take the next."""


class Peer(Protocol):
    """One registered socket, as the pump sees it. Nothing here awaits."""

    fd: int

    def readable(self) -> None:
        """Read once; there are bytes, or the end of the stream, or an error."""

    def writable(self) -> None:
        """The socket takes bytes again."""

    def hung_up(self) -> None:
        """The connection is dead in both directions."""

    def failed(self, bug: Exception) -> None:
        """A callback raised: this peer must end. Must not raise."""


class TimedPeer(Timed, Protocol):
    """Something with a next moment; see `Wheel`."""

    def due(self, now: float) -> None:
        """Do what the moment asks for, and schedule the next. An ended owner does nothing."""

    def failed(self, bug: Exception) -> None:
        """`due` raised: this owner must end. Must not raise."""


class Pump:
    """The epoll of a worker, its round clock and its timer wheel.

    Args:
        on_bug: Called with every exception that a peer's callback let escape, before the peer
            is told. Must not raise.
    """

    def __init__(self, on_bug: Callable[[Exception], None]) -> None:
        self._epoll = select.epoll()
        self._peers: dict[int, Peer] = {}
        self._on_bug = on_bug
        self._awaited: set[Peer] = set()
        self._settled = trio.Event()
        self.now = trio.current_time()
        """Trio's clock as of this round, in seconds: one reading serves all its events."""
        self.wheel: Wheel[TimedPeer] = Wheel(self.now)

    def register(self, peer: Peer, interest: int = READ) -> None:
        """Begin to watch ``peer.fd``."""
        self._epoll.register(peer.fd, interest)
        self._peers[peer.fd] = peer

    def replace(self, peer: Peer) -> None:
        """Let ``peer`` take over its descriptor from whoever is registered for it."""
        if self._awaited and self._peers[peer.fd] in self._awaited:
            # It is the socket that is waited for.
            self._awaited.discard(self._peers[peer.fd])
            self._awaited.add(peer)
        self._peers[peer.fd] = peer

    def watch(self, peer: Peer, interest: int) -> None:
        """Change what ``peer`` is called for: `READ`, `WRITE`, both, or 0."""
        self._epoll.modify(peer.fd, interest)

    def forget(self, peer: Peer) -> None:
        """Stop watching ``peer``; must precede the close of its socket. Idempotent."""
        if self._peers.get(peer.fd) is peer:
            del self._peers[peer.fd]
            self._epoll.unregister(peer.fd)
            if self._awaited:
                self._awaited.discard(peer)
                if not self._awaited:
                    self._settled.set()

    def holds(self, peer: Peer) -> bool:
        """Return whether ``peer`` is who is registered for its descriptor."""
        return self._peers.get(peer.fd) is peer

    def linger(self, sock: socket.socket, peer: Peer) -> None:
        """Close ``sock``, which ``peer`` held until now, so that its last bytes arrive."""
        Linger(self, sock, peer)

    def close(self) -> None:
        """Close the epoll; when nothing runs any more."""
        self._epoll.close()

    def __len__(self) -> int:
        return len(self._peers)

    async def wait_settled(self, *staying: Peer) -> None:
        """Return when every socket that is registered now is gone, except those ``staying``.

        Who comes meanwhile is not waited for.
        """
        self._awaited = set(self._peers.values()).difference(staying)
        self._settled = trio.Event()
        if self._awaited:
            await self._settled.wait()

    async def run(self) -> NoReturn:
        """Serve all registered sockets until cancelled.

        Cancellation:
            Takes effect between rounds. Sockets and the epoll stay open: peers that are
            cancelled in the same moment have still to unregister.
        """
        poll = self._epoll.poll
        peers = self._peers
        descriptor = self._epoll.fileno()
        wait_readable = trio.lowlevel.wait_readable
        current_time = trio.current_time
        while True:
            await wait_readable(descriptor)
            self.now = current_time()
            for fd, events in poll(0, EVENTS_PER_ROUND):
                # None: an earlier event of this very round ended this peer.
                peer = peers.get(fd)
                if peer is None:
                    continue
                try:
                    if events & WRITE:
                        peer.writable()
                    if events & READ:
                        peer.readable()
                    if events & _HANG_UP and peers.get(fd) is peer:
                        peer.hung_up()
                except Exception as bug:  # noqa: BLE001 - one peer's bug is one peer's end
                    self._on_bug(bug)
                    peer.failed(bug)

    async def run_timers(self, granularity: float = 0.1) -> NoReturn:
        """Fire what is due on the wheel, every ``granularity`` seconds, until cancelled."""
        while True:
            await trio.sleep(granularity)
            self.now = trio.current_time()
            for count, owner in enumerate(self.wheel.advance(self.now)):
                if owner.bucket != IDLE:
                    # An earlier one of this batch has scheduled it anew.
                    continue
                try:
                    owner.due(self.now)
                except Exception as bug:  # noqa: BLE001 - as in run()
                    self._on_bug(bug)
                    owner.failed(bug)
                if count % EVENTS_PER_ROUND == EVENTS_PER_ROUND - 1:
                    await trio.lowlevel.checkpoint()


class Door:
    """A listening socket in the pump: accepts in batches.

    Args:
        pump: Where it is registered while open.
        sock: Non-blocking, listening. Not closed here: the supervisor owns its other copy.
        admit: Called with each accepted, non-blocking socket, and the address of its peer as
            accept(2) reports it.
        on_pause: Called with the error when the kernel refuses descriptors or memory, once per
            pause of `ACCEPT_PAUSE` seconds: the connection stays in the backlog, and trying
            again at once would spin.
    """

    def __init__(
        self,
        pump: Pump,
        sock: socket.socket,
        admit: Callable[[socket.socket, object], None],
        on_pause: Callable[[OSError], None],
    ) -> None:
        self._pump = pump
        self._sock = sock
        self._admit = admit
        self._on_pause = on_pause
        self.fd = sock.fileno()
        self.bucket = IDLE
        self.open = False

    def unlock(self) -> None:
        """Begin to accept."""
        self._pump.register(self)
        self.open = True

    def lock(self) -> None:
        """Stop accepting; idempotent."""
        self.open = False
        self._pump.wheel.cancel(self)
        self._pump.forget(self)

    def readable(self) -> None:
        """Accept up to `ACCEPTS_PER_ROUND` connections."""
        self._accept(ACCEPTS_PER_ROUND)

    def empty(self) -> None:
        """Accept everybody who waits now: closing a full queue would reset them."""
        self._accept(socket.SOMAXCONN)

    def _accept(self, most: int) -> None:
        accept = self._sock.accept
        for _ in range(most):
            try:
                sock, address = accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _TRANSIENT:
                    continue
                self._pump.watch(self, 0)
                self._pump.wheel.schedule(self, self._pump.now + ACCEPT_PAUSE)
                self._on_pause(error)
                return
            sock.setblocking(False)
            self._admit(sock, address)

    def due(self, now: float) -> None:  # noqa: ARG002 - the moment itself is the message
        """End a pause."""
        if self.open:
            self._pump.watch(self, READ)

    def writable(self) -> None:
        """Never asked for."""

    def hung_up(self) -> None:
        """Listening sockets do not hang up; if the kernel says so, do not spin on it."""
        self.lock()

    def failed(self, bug: Exception) -> None:
        """Stay open: whatever it was concerned one client."""


class Linger:
    """A socket on its way out: we have said all, the client may still be talking.

    Closing a socket while bytes lie unread in it makes the kernel send RST, which destroys what
    the client has not read yet: the goodbye, the Close frame, the refusal. So: shut down our
    direction, read and discard until the client closes, for a bounded time and a bounded
    number of bytes, then close.
    """

    __slots__ = ("_pump", "_room", "_sock", "bucket", "fd")

    def __init__(self, pump: Pump, sock: socket.socket, predecessor: Peer) -> None:
        self._pump = pump
        self._sock = sock
        self._room = LINGER_BYTES
        self.fd = sock.fileno()
        self.bucket = IDLE
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            # Reset already: nothing is left that could arrive.
            pump.forget(predecessor)
            sock.close()
            return
        pump.replace(self)
        pump.watch(self, READ)
        pump.wheel.schedule(self, pump.now + LINGER_SECONDS)

    def readable(self) -> None:
        """Discard what came; close at the end of the stream."""
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._room -= len(data)
        if not data:
            self._close()
        elif self._room < 0:
            # Closing now would be the RST that this is to avoid; let it run into its own window.
            self._pump.watch(self, 0)

    def due(self, now: float) -> None:  # noqa: ARG002 - the moment itself is the message
        """Close: the client had its time."""
        self._close()

    def writable(self) -> None:
        """Never asked for."""

    def hung_up(self) -> None:
        """Close: both directions are gone."""
        self._close()

    def failed(self, bug: Exception) -> None:  # noqa: ARG002 - logged by the pump
        """Close."""
        self._close()

    def _close(self) -> None:
        self._pump.wheel.cancel(self)
        self._pump.forget(self)
        self._sock.close()
