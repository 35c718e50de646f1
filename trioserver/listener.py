"""The listener: who comes in. Takes accepted sockets to a connection, or to a refusal.

A socket that has not proved itself is an `Arrival`: an entry in the pump and one on the timer
wheel, no task, no nursery. The whole handshake, from accept to the last byte of the head, has one
deadline (``HANDSHAKE_TIMEOUT``), which trickling bytes do not extend.

Order of the questions, cheapest first: is the head well formed, is the path ours, is it a
WebSocket handshake, is there room, is the token good. Whoever is refused gets an HTTP answer at
once and is never queued.

Beside WebSocket, the public port answers three small GETs about this worker: ``/healthz``,
``/readyz`` and ``/health``. All other HTTP is the gateway's.
"""

import contextlib
import itertools
import math
import socket
from collections.abc import Callable, Mapping
from typing import Final

import attrs
import trio

from trioserver import handshake, health
from trioserver.auth import Claims
from trioserver.connection import Connection
from trioserver.errors import AuthError, ClientError
from trioserver.handshake import Refusal, Request
from trioserver.origins import Origins
from trioserver.shared import Shared
from trioserver.timers import IDLE
from trioserver.wish import NO_WISH, Wish, of_query

READ_BYTES: Final = 16 << 10

RETRY_AFTER_SECONDS: Final = 2
"""What a client is told that was refused for want of room."""

_FULL: Final = Refusal(503, "the server is full", (("Retry-After", str(RETRY_AFTER_SECONDS)),))
"""Only ever asked for its response, never raised: a raised one would collect tracebacks."""

_CHALLENGE: Final = (("WWW-Authenticate", 'Bearer realm="trioserver"'),)


@attrs.define(eq=False, kw_only=True)
class Listener:
    """Admits clients to one worker.

    Args:
        shared: What its connections share.
        worker_id: Begins the ids of its connections.
        max_connections: Admission ends here; 0 means no limit.
        max_sockets: Of all kinds, those in handshakes and those that linger included; beyond it
            newcomers are refused, so that descriptors are left for Redis. 0 means no limit.
        handshake_timeout: Seconds for a whole handshake; 0 means no limit.
        query_token: Whether ``?token=`` is looked at.
        origins: Whose web pages may connect.
        pages: Bodies of the small GETs: path to a function giving status, type and body.
    """

    shared: Shared
    worker_id: str
    max_connections: int
    max_sockets: int = 0
    handshake_timeout: float
    query_token: bool
    origins: Origins = attrs.field(factory=lambda: Origins(None))
    pages: dict[str, Callable[[], tuple[int, str, bytes]]]
    draining: bool = attrs.field(default=False, init=False)
    """Whether WebSocket handshakes are refused with 503."""
    arrivals: "set[Arrival]" = attrs.field(factory=set, init=False)
    """Sockets whose handshake is not finished."""
    _no_arrivals: trio.Event = attrs.field(factory=trio.Event, init=False)
    _nursery: trio.Nursery | None = attrs.field(default=None, init=False)
    _numbers: "itertools.count[int]" = attrs.field(factory=itertools.count, init=False)

    @property
    def connections(self) -> set[Connection]:
        """Every connection of this worker that has begun and is not released."""
        return self.shared.connections

    def open(self, nursery: trio.Nursery) -> None:
        """Give the connections their place to live; before the first `admit`."""
        self._nursery = nursery

    def admit(self, sock: socket.socket) -> None:
        """Take charge of an accepted, non-blocking socket; refuse it when descriptors run out."""
        if 0 < self.max_sockets <= len(self.shared.pump):
            # No lingering: that would keep the very descriptor that is needed.
            self.shared.tally.refused(_FULL.status)
            with contextlib.suppress(OSError):
                sock.send(_FULL.response())
            sock.close()
            return
        self.arrivals.add(Arrival(self, sock))

    def left(self, arrival: "Arrival") -> None:
        """Note that a handshake is over, whatever came of it. Idempotent."""
        self.arrivals.discard(arrival)
        if not self.arrivals:
            self._no_arrivals.set()

    async def wait_no_arrivals(self) -> None:
        """Return when no handshake is under way."""
        while self.arrivals:
            self._no_arrivals = trio.Event()
            await self._no_arrivals.wait()

    def answer(self, request: Request) -> bytes:
        """Return the HTTP answer to a request that is no WebSocket handshake.

        Raises:
            Refusal: 404 or 405.
        """
        page = self.pages.get(request.path)
        if page is None:
            raise Refusal(404, "nothing here; WebSocket is at /ws")
        if request.method not in {"GET", "HEAD"}:
            raise Refusal(405, "only GET is answered here", (("Allow", "GET, HEAD"),))
        status, content_type, body = page()
        return health.small_response(status, body, content_type, head=request.method == "HEAD")

    def judge(self, request: Request) -> tuple[handshake.Upgrade, Claims | None, Wish]:
        """Decide about a handshake on ``/ws``; None for claims if credentials must follow.

        Raises:
            Refusal: Anything but a yes.
        """
        upgrade = handshake.upgrade(request, may_deflate=self.shared.compressor is not None)
        host = request.header(b"host") or ""
        if not self.origins.allows(request.header(b"origin"), host):
            raise Refusal(403, "pages of this origin may not connect (WS_ALLOWED_ORIGINS)")
        if self.draining or 0 < self.max_connections <= len(self.connections):
            why = "the server is going away" if self.draining else "the server is full"
            raise Refusal(503, why, (("Retry-After", str(RETRY_AFTER_SECONDS)),))
        parameters = request.parameters()
        try:
            wish = of_query(parameters)
        except ClientError as error:
            raise Refusal(400, error.message) from None
        claims = self._authenticate(upgrade.token, parameters)
        if claims is None and upgrade.extension is not None:
            # Inflating is work, and nobody may ask for it who has not said who he is.
            upgrade = attrs.evolve(upgrade, extension=None)
        return upgrade, claims, wish

    def _authenticate(self, token: str | None, parameters: Mapping[str, str]) -> Claims | None:
        shared = self.shared
        auth = shared.tally.auth
        if token is None:
            token = parameters.get("token")
            if token is None:
                return None
            if not self.query_token:
                auth["invalid"] += 1
                raise Refusal(401, "tokens in the query are turned off", _CHALLENGE)
        try:
            claims = shared.verifier.verify(token, shared.wall())
        except AuthError as error:
            auth[error.outcome] += 1
            raise Refusal(401, "the token was not accepted", _CHALLENGE) from None
        auth["ok"] += 1
        return claims

    def start(
        self,
        sock: socket.socket,
        greeting: bytes,
        claims: Claims | None,
        early: bytes,
        wish: Wish = NO_WISH,
        *,
        deflate: bool = False,
    ) -> None:
        """Turn a registered socket into a connection with a task of its own.

        Args:
            sock: Registered in the pump; the connection takes over.
            greeting: The 101 answer.
            claims: Of its credential, or None if that must follow as a message.
            early: Bytes that came behind the request head.
            wish: Where the client wants to go on.
            deflate: Whether permessage-deflate was negotiated.
        """
        nursery = self._nursery
        assert nursery is not None  # noqa: S101 - for the type checker: open() came first
        connection = self.connection(sock, greeting, claims, wish, deflate=deflate)
        self.shared.pump.replace(connection)
        nursery.start_soon(connection.run)
        try:
            connection.begin(early)
        except Exception as bug:  # noqa: BLE001 - this connection's end, not that of the arrival
            self.shared.log_bug("handshake", bug)
            connection.failed(bug)

    def connection(
        self,
        sock: socket.socket,
        greeting: bytes,
        claims: Claims | None,
        wish: Wish,
        *,
        deflate: bool,
    ) -> Connection:
        """Make the connection for `start`; a test server makes one of its own kind."""
        connection_id = f"{self.worker_id}-{next(self._numbers):x}"
        return Connection(self.shared, sock, connection_id, greeting, claims, wish, deflate=deflate)


class Arrival:
    """A socket whose request head is not complete yet."""

    __slots__ = ("_buffer", "_listener", "_sock", "bucket", "fd")

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        self._listener = listener
        self._sock = sock
        self._buffer: bytearray | None = None
        """The beginning of a head whose end has not come."""
        self.fd = sock.fileno()
        self.bucket = IDLE
        pump = listener.shared.pump
        pump.register(self)
        pump.wheel.schedule(self, pump.now + (listener.handshake_timeout or math.inf))

    def readable(self) -> None:
        """Take bytes of the head; answer when it is complete."""
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop()
            return
        self._listener.shared.tally.bytes_in += len(data)
        known = 0
        buffer = self._buffer
        if buffer is not None:
            known = len(buffer)
            buffer += data
        try:
            end = handshake.head_end(data if buffer is None else buffer, known)
            if not end:
                self._buffer = bytearray(data) if buffer is None else buffer
                return
            if buffer is not None:
                data = bytes(buffer)
            self._complete(handshake.parse(data[:end]), data[end:])
        except Refusal as refusal:
            self._refuse(refusal)

    def _complete(self, request: Request, rest: bytes) -> None:
        listener = self._listener
        if request.path != "/ws":
            self._answer(listener.answer(request))
            return
        upgrade, claims, wish = listener.judge(request)
        listener.left(self)
        listener.shared.pump.wheel.cancel(self)
        listener.start(
            self._sock,
            upgrade.response(),
            claims,
            rest,
            wish,
            deflate=upgrade.extension is not None,
        )

    def _refuse(self, refusal: Refusal) -> None:
        self._listener.shared.tally.refused(refusal.status)
        self._answer(refusal.response())

    def _answer(self, response: bytes) -> None:
        """Say it and close. A fresh socket has room for the few hundred bytes of an answer."""
        pump = self._listener.shared.pump
        self._listener.left(self)
        pump.wheel.cancel(self)
        try:
            self._sock.send(response)
        except OSError:
            self._drop()
            return
        pump.linger(self._sock, self)

    def _drop(self) -> None:
        pump = self._listener.shared.pump
        self._listener.left(self)
        pump.wheel.cancel(self)
        pump.forget(self)
        self._sock.close()

    def due(self, now: float) -> None:  # noqa: ARG002 - the moment itself is the message
        """Give up on a head that does not come."""
        if not self._listener.shared.pump.holds(self):
            # It came, or the client went, while this moment was on its way.
            return
        self._refuse(Refusal(408, "the request head did not arrive in time"))

    def writable(self) -> None:
        """Never asked for."""

    def hung_up(self) -> None:
        """Note that the client is gone."""
        self._drop()

    def failed(self, bug: Exception) -> None:  # noqa: ARG002 - logged by the pump
        """End after a bug."""
        self._refuse(Refusal(500, "internal error"))
