"""The listener: who comes in. Takes accepted sockets to a connection, or to a refusal.

A socket that has not proved itself is an `arrival.Arrival`.

Order of the questions, cheapest first: is the head well formed, is the path ours, is it a
WebSocket handshake, whose web page is it from, is there room and does it come too fast (for the
server and for its address), is the token good. Whoever is refused gets an HTTP answer at once and
is never queued.

Beside WebSocket, the public port answers three small GETs about this worker: ``/healthz``,
``/readyz`` and ``/health``. All other HTTP is the gateway's.
"""

import contextlib
import itertools
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import attrs
import trio

from trioserver import handshake, health
from trioserver.arrival import CROWDED, RETRY_AFTER_SECONDS, Arrival
from trioserver.auth import Claims
from trioserver.caller import Caller, caller
from trioserver.connection import Connection
from trioserver.errors import AuthError, ClientError
from trioserver.handshake import Refusal, Request
from trioserver.origins import Origins
from trioserver.peers import Peers, peer_address
from trioserver.response_heads import request_id
from trioserver.shared import Shared
from trioserver.wish import Wish, of_request

_FULL: Final = Refusal.for_now(503, "the server is full", RETRY_AFTER_SECONDS)
"""Only ever asked for its response, never raised: a raised one would collect tracebacks."""

_LIMITS: Final = {
    "connections": "the server is full",
    "address_connections": "too many connections from this address",
    "handshakes": "too many handshakes, come again",
    "address_handshakes": "too many handshakes from this address",
}
"""What a client is told about the limits of `board`."""

TLS_PER_ROUND: Final = 8
"""Steps of TLS handshakes in one round of the pump. One costs 0.2 (ECDSA) to 0.7 ms (RSA), and
those who are connected are not to wait for hundreds of them."""

_CHALLENGE: Final = (("WWW-Authenticate", 'Bearer realm="trioserver"'),)


class Admitted(NamedTuple):
    """A handshake that is accepted."""

    upgrade: handshake.Upgrade
    claims: Claims | None
    """None if a credential must follow as a message."""
    wish: Wish
    caller: Caller


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
        peers: From whose address a client comes.
        max_arrivals_per_address: Sockets of one address that may be in handshakes at once, so that
            nobody takes all descriptors by saying nothing. 0 means no limit.
        tls: How the public port speaks TLS; None if it does not.
        log_refused: Called with each refusal and the id of its request, if that is known.
        pages: Bodies of the small GETs: path to a function giving status, type and body.
    """

    shared: Shared
    worker_id: str
    max_connections: int
    max_sockets: int = 0
    handshake_timeout: float
    query_token: bool
    origins: Origins = attrs.field(factory=lambda: Origins(None))
    peers: Peers = attrs.field(factory=Peers)
    max_arrivals_per_address: int = 0
    tls: ssl.SSLContext | None = None
    pages: dict[str, Callable[[], tuple[int, str, bytes]]]
    log_refused: Callable[[Refusal, str], None] = lambda _refusal, _request_id: None
    draining: bool = attrs.field(default=False, init=False)
    """Whether WebSocket handshakes are refused with 503."""
    arrivals: set[Arrival] = attrs.field(factory=set, init=False)
    """Sockets whose handshake is not finished."""
    _arriving: Counter[int] = attrs.field(factory=Counter, init=False)
    """How many of them each address has that is limited."""
    _round: float = attrs.field(default=0.0, init=False)
    _steps: int = attrs.field(default=0, init=False)
    """Steps of TLS handshakes in the round that began then."""
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

    def admit(self, sock: socket.socket, name: object) -> None:
        """Take charge of an accepted socket, or refuse it when there is no room for its handshake.

        Args:
            sock: Non-blocking.
            name: The address of its peer, as accept(2) reports it.
        """
        peer = peer_address(name)
        # Who is connected may be a proxy with everybody's connections.
        key = None if self.peers.trusts(peer) else self.peers.key(peer)
        if 0 < self.max_sockets <= len(self.shared.pump):
            self._turn_away(sock, _FULL)
        elif self._crowded(key):
            self._turn_away(sock, CROWDED)
        else:
            try:
                arrival = Arrival(self, sock, peer)
            except OSError:
                # The kernel has no room for one more in the epoll.
                self._turn_away(sock, _FULL)
                return
            self.arrivals.add(arrival)
            self._count(arrival, key)

    def _crowded(self, key: int | None) -> bool:
        return key is not None and 0 < self.max_arrivals_per_address <= self._arriving[key]

    def _count(self, arrival: Arrival, key: int | None) -> None:
        arrival.key = key
        if key is not None:
            self._arriving[key] += 1

    def comes_from(self, arrival: Arrival, address: int) -> bool:
        """Count an arrival under the address that its proxy has named; return whether it may."""
        key = self.peers.key(address)
        if self._crowded(key):
            return False
        self._count(arrival, key)
        return True

    def _turn_away(self, sock: socket.socket, refusal: Refusal) -> None:
        """Refuse a socket at once, without lingering: that would keep its descriptor."""
        self.refused(refusal)
        with sock, contextlib.suppress(OSError):
            if self.tls is None:
                sock.send(refusal.response())

    def refused(self, refusal: Refusal, request_id: str = "") -> None:
        """Count a refusal, and have it logged."""
        self.shared.tally.refused(refusal.status)
        self.log_refused(refusal, request_id)

    def may_step(self) -> bool:
        """Return whether one more step of a TLS handshake fits into this round of the pump."""
        now = self.shared.pump.now
        if now != self._round:
            self._round = now
            self._steps = 0
        self._steps += 1
        return self._steps <= TLS_PER_ROUND

    def left(self, arrival: Arrival) -> None:
        """Note that a handshake is over, whatever came of it. Idempotent."""
        if arrival in self.arrivals:
            self.arrivals.discard(arrival)
            key = arrival.key
            if key is not None:
                self._arriving[key] -= 1
                if not self._arriving[key]:
                    del self._arriving[key]
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
            raise Refusal(404, "nothing here; WebSocket is at /ws and /ws/chat/")
        if request.method not in {"GET", "HEAD"}:
            raise Refusal(405, "only GET is answered here", (("Allow", "GET, HEAD"),))
        status, content_type, body = page()
        given = request.headers.get(b"x-request-id")
        return health.small_response(
            status,
            body,
            content_type,
            head=request.method == "HEAD",
            request_id=request_id([] if given is None else [given]),
            secure=self.tls is not None,
        )

    def judge(self, request: Request, peer: int) -> Admitted:
        """Decide about a WebSocket handshake. Nothing may be awaited between this and `start`.

        Args:
            request: The handshake.
            peer: Who is connected to us.

        Raises:
            Refusal: Anything but a yes.
        """
        upgrade = handshake.upgrade(request, may_deflate=self.shared.compressor is not None)
        host = request.header(b"host") or ""
        secure = self.tls is not None
        if not self.origins.allows(request.header(b"origin"), host, secure=secure):
            raise Refusal(403, "pages of this origin may not connect (WS_ALLOWED_ORIGINS)")
        peers = self.peers
        nobody = peers.trusts_nobody
        address = peer if nobody else peers.client(peer, request.header(peers.header))
        key = peers.key(address)
        self._make_room(key)
        parameters = request.parameters()
        try:
            wish = of_request(request.path, parameters)
        except ClientError as error:
            raise Refusal(400, error.message) from None
        claims = self._authenticate(upgrade.token, parameters)
        if claims is None and upgrade.extension is not None:
            # Inflating is work, and nobody may ask for it who has not said who he is.
            upgrade = attrs.evolve(upgrade, extension=None)
        agent = request.headers.get(b"user-agent", b"")
        return Admitted(upgrade, claims, wish, caller(address, key, agent, wish.client_type))

    def _make_room(self, key: int | None) -> None:
        """Refuse who is too many or too fast, by the address that counts; count who is not.

        Raises:
            Refusal: 503 or 429.
        """
        if self.draining or 0 < self.max_connections <= len(self.connections):
            why = "the server is going away" if self.draining else _LIMITS["connections"]
            raise Refusal.for_now(503, why, RETRY_AFTER_SECONDS)
        refused = self.shared.board.admit(key, time.monotonic())
        if refused is not None:
            raise Refusal.for_now(refused.status, _LIMITS[refused.why], refused.retry_after)

    def _authenticate(self, token: str | None, parameters: Mapping[str, str]) -> Claims | None:
        if token is None:
            token = parameters.get("token")
            if token is None:
                return None
            if not self.query_token:
                self.shared.tally.auth["invalid"] += 1
                raise Refusal(401, "tokens in the query are turned off", _CHALLENGE)
        try:
            return self.shared.verify(token)
        except AuthError as error:
            if error.retry_after:
                problem = "the key of this token is not known yet"
                raise Refusal.for_now(503, problem, error.retry_after) from None
            raise Refusal(401, "the token was not accepted", _CHALLENGE) from None

    def start(self, sock: socket.socket, admitted: Admitted, early: bytes) -> None:
        """Turn a registered socket into a connection with a task of its own.

        Args:
            sock: Registered in the pump; the connection takes over.
            admitted: What `judge` has said.
            early: Bytes that came behind the request head.
        """
        nursery = self._nursery
        assert nursery is not None  # noqa: S101 - for the type checker: open() came first
        connection = self.connection(sock, admitted)
        self.shared.pump.replace(connection)
        nursery.start_soon(connection.run)
        try:
            connection.begin(early)
        except Exception as bug:  # noqa: BLE001 - this connection's end, not that of the arrival
            self.shared.log_bug("handshake", bug)
            connection.failed(bug)

    def connection(self, sock: socket.socket, admitted: Admitted) -> Connection:
        """Make the connection for `start`; a test server makes one of its own kind."""
        upgrade, claims, wish, who = admitted
        return Connection(
            self.shared,
            sock,
            f"{self.worker_id}-{next(self._numbers):x}",
            upgrade.response(),
            claims,
            wish,
            who,
            deflate=upgrade.extension is not None,
        )
