"""Hypercorn's HTTP/1.1, accepted and guarded by us.

Hypercorn parses, calls the application and writes. Its own accept loop is not used: an error in one
connection would end the nursery around all of them, it would wait without limit for clients that do
not read, and nothing could stand between its parser and the socket. Here every connection has an
end of its own, and the guard of `trioserver.gateway.guard` in front.

Nobody can shut others out by taking up connections: see `trioserver.gateway.crowd`.

HTTP/2 is turned off, with and without asking: who calls here are back ends and monitors next door,
with a request at a time; it would be a second parser with faults of its own, its streams would
escape the limits that hold per request, and requests in it cannot be guarded by looking at heads.

The socket belongs to the supervisor and outlives us: what is closed here is a duplicate.
"""

import logging
import math
import os
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from hypercorn.utils import wrap_app

from trioserver import handshake, logs
from trioserver.gateway.body import LINGER_BYTES
from trioserver.gateway.client_rate import ClientRate
from trioserver.gateway.crowd import MAX_CONNECTIONS, Crowd
from trioserver.gateway.front import Application
from trioserver.gateway.guarded import GuardedConnection, GuardedStream, part
from trioserver.handshake import Refusal
from trioserver.peers import UNKNOWN, Peers, peer_address
from trioserver.rate_limit import RateLimited

KEEP_ALIVE_SECONDS: Final = 5.0
"""For the head of a request, and between requests."""

HEAD_SECONDS: Final = 0.5
"""At the end, for the head of a request that a client is about to send: it has been let in."""

LOG_SECONDS: Final = 10.0
"""Of what is refused for one and the same reason there is a line so often."""

_FULL: Final = Refusal(503, "too many connections to this port", (("Retry-After", "1"),))
"""Only ever asked for its response, never raised."""
_FULL_SECONDS: Final = 1.0
_MAX_PARTING: Final = 64
"""So many who were turned away may still say what they wanted; each has a descriptor."""

# A client that acknowledges nothing for so long is gone; without this one that has vanished while
# we write is held for a quarter of an hour, and one whose window stays closed for ever.
_STUCK_MILLISECONDS: Final = 10_000


class Server:
    """Serves an ASGI application until told to stop. Used once."""

    def __init__(
        self,
        app: Application,
        listen_fd: int,
        *,
        peers: Peers | None = None,
        rate: ClientRate | None = None,
        refused: Callable[[int], object] = lambda _status: None,
        places: int = MAX_CONNECTIONS,
    ) -> None:
        """Prepare; nothing is accepted yet.

        Args:
            app: What answers.
            listen_fd: A listening TCP socket; it stays the caller's.
            peers: Tells whose address a connection comes from; None is nobody's.
            rate: Bounds what the guard refuses of one address, too; None is no limit.
            refused: Called with the status of each request that the application never sees.
            places: How many may be connected at once.
        """
        self._peers = peers
        self._rate = rate
        self._lines = RateLimited(LOG_SECONDS)
        self._config = config = make_config()
        # Both say the same about ASGI, each in types of its own.
        self._app = wrap_app(cast("ASGIFramework", app), config.wsgi_max_body_size, "asgi")
        self._listen_fd = listen_fd
        self._refused = refused
        self._hypercorn = WorkerContext(None)
        self._open: Crowd[GuardedStream] = Crowd(places)
        self._parting = 0
        self._none_open = trio.Event()
        self._stop = trio.Event()
        self._grace_seconds = 0.0
        self.accepting = False
        """Whether a client that comes now is served."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`; return when the last request is answered, or its time is over.

        Reports `task_status.started` when it accepts.

        Raises:
            OSError: This is no listening TCP socket.

        Cancellation:
            Stops accepting at once, and cuts off whoever is there.
        """
        bound_stuck_clients(self._listen_fd)
        duplicate = socket.socket(fileno=os.dup(self._listen_fd))
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(duplicate))
        async with trio.open_nursery() as connections:
            try:
                await self._accept(listener, connections, task_status)
                await self._finish()
            finally:
                # Cancelling alone would leave those that do not read.
                connections.cancel_scope.cancel()
                for stream in self._open:
                    stream.abort()

    def stop(self, grace_seconds: float) -> None:
        """Stop accepting now, and give requests that are under way so long. Idempotent."""
        self._grace_seconds = grace_seconds
        self._stop.set()

    async def _finish(self) -> None:
        """Let everybody have the answer that is due, within the grace."""
        self._config.keep_alive_max_requests = 0  # answers say that they are the last
        for stream in self._open:
            if stream.expects_nothing:
                stream.abort()
        with trio.move_on_after(self._grace_seconds):
            with trio.move_on_after(HEAD_SECONDS):
                await self._wait_none_open()
            await self._hypercorn.terminated.set()
            await self._wait_none_open()

    async def _accept(
        self,
        listener: trio.SocketListener,
        connections: trio.Nursery,
        task_status: trio.TaskStatus[None],
    ) -> None:
        async with listener, trio.open_nursery() as door:

            async def accept() -> None:
                await trio.serve_listeners(self._serve, [listener], handler_nursery=connections)

            door.start_soon(accept)
            self.accepting = True
            try:
                task_status.started()
                await self._stop.wait()
            finally:
                self.accepting = False
                door.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        """Serve one client. Nothing but cancellation leaves it."""
        guarded = GuardedStream(stream, self._address(stream), self._refusal)
        if not self._open.admit(guarded):
            await self._turn_away(stream)
            return
        if self._open.is_full and self._lines.due("full", trio.current_time()) is not None:
            logs.get_logger().warning("newcomers take the places of idle connections")
        try:
            await GuardedConnection(self._app, self._config, self._hypercorn, guarded).run()
        except Exception:  # noqa: BLE001 - a bug in one connection ends that one, nothing else
            logs.get_logger().exception("a connection failed")
        finally:
            guarded.abort()
            self._open.leave(guarded)
            if not len(self._open):
                self._none_open.set()

    async def _turn_away(self, stream: trio.SocketStream) -> None:
        self._note_refused(_FULL)
        self._parting += 1
        try:
            # A fresh socket has room for an answer. A request that is not read would make the
            # kernel destroy it, but not for each of any number there can be a descriptor.
            linger_bytes = LINGER_BYTES if self._parting <= _MAX_PARTING else 0
            with trio.move_on_after(_FULL_SECONDS):
                await part(stream, _FULL.response(), linger_bytes)
        finally:
            self._parting -= 1
            await trio.aclose_forcefully(stream)

    def _address(self, stream: trio.SocketStream) -> int | None:
        """Return under which key limits count a client; None if they do not."""
        if self._peers is None:
            return None
        try:
            peer = peer_address(stream.socket.getpeername())
        except OSError:
            peer = UNKNOWN  # it is gone already
        # Behind a proxy are many clients, of which nothing is known before a whole head is.
        return None if self._peers.trusts(peer) else self._peers.key(peer)

    def _refusal(self, address: int | None, refusal: Refusal, request_id: str) -> Refusal:
        """Count what the guard refuses; return what is answered."""
        rate = self._rate
        wait = 0.0 if rate is None else rate.take_refused(address, trio.current_time())
        if rate is not None and wait:
            retry_after = ("Retry-After", str(math.ceil(wait)))
            refusal = Refusal(HTTPStatus.TOO_MANY_REQUESTS, rate.detail, (retry_after,))
        self._note_refused(refusal, request_id)
        return refusal

    def _note_refused(self, refusal: Refusal, request_id: str = "") -> None:
        self._refused(refusal.status)
        held_back = self._lines.due(refusal.problem, trio.current_time())
        if held_back is not None:
            logs.get_logger().info(
                "a request was refused",
                request_id=request_id,
                status=refusal.status,
                problem=refusal.problem,
                held_back=held_back,
            )

    async def _wait_none_open(self) -> None:
        while len(self._open):
            self._none_open = trio.Event()
            await self._none_open.wait()


def make_config() -> Config:
    """Return what Hypercorn is told about every connection."""
    config = Config()
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    config.h11_max_incomplete_size = handshake.MAX_HEAD
    config.include_server_header = False
    # Without a logger of ours it would write to standard error in a format of its own. What it
    # says below a warning is where it runs, which the supervisor knows better; requests are
    # logged in `front`.
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    config.errorlog.setLevel(logging.WARNING)
    return config


def bound_stuck_clients(listen_fd: int) -> None:
    """Have the kernel end connections of clients that take nothing; accepted sockets inherit it."""
    with socket.socket(fileno=os.dup(listen_fd)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MILLISECONDS)
