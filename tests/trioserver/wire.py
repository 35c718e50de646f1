"""Both ends of the wire for tests: byte-level clients, and a small worker for them to talk to.

The client side builds its own frames and parses the server's with code of its own, so that a
mistake in the product's codec does not cancel itself out here. The worker is the real hot path
(pump, hub, listener, connections) on a real loopback socket; only Redis is replaced, by a
`Follower` whose confirmations the test gives.
"""

import contextlib
import json
import random
import select
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final, Self, TypedDict, Unpack

import attrs
import trio

from trioserver import health
from trioserver.auth import Verifier, sign
from trioserver.board import Board, Limits
from trioserver.buckets import Buckets
from trioserver.chats import Chats
from trioserver.connection import Connection
from trioserver.delivery import Delivery
from trioserver.desk import Asking, Desk, Member
from trioserver.errors import CloseReason
from trioserver.hub import Hub
from trioserver.ledger import Item, Page, Rules, TopicRules
from trioserver.listener import Listener
from trioserver.metrics import Tally
from trioserver.origins import Origins
from trioserver.outbox import OutboxLimits
from trioserver.peers import Peers
from trioserver.pump import Door, Peer, Pump
from trioserver.receipts import Receipts
from trioserver.revocation import Revoked
from trioserver.session import UNLIMITED
from trioserver.settings import Settings
from trioserver.shared import UNLIMITED_BOARD, Followed, Pace, Shared, Waiting
from trioserver.speaker import Speaker
from trioserver.topics import Patterns

LIMIT: Final = 15.0
"""Absolute limit of a network test, in seconds of its clock."""

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

SECRET: Final = "a secret of at least thirty-two bytes"
SETTINGS: Final = Settings(jwt_secret_key=SECRET, jwt_leeway=0.0)
BROADCAST: Final = b"channels:broadcast"
KEY: Final = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT: Final = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The answer to `KEY`, from RFC 6455 1.3."""

CALM: Final = Pace(
    ping_interval=0,
    pong_wait=0,
    heartbeat_interval=0,
    idle_timeout=0,
    write_wait=0,
    auth_timeout=0,
)
"""Nothing happens by itself."""


def token(user: str = "ann", seconds: float = 3600) -> str:
    """Return a good token."""
    return sign(SETTINGS, user, time.time() + seconds)


def topic(user: str) -> bytes:
    """Return the topic of a user."""
    return b"user_noti:" + user.encode()


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes = b"\1\2\3\4"
) -> bytes:
    """Return a client's frame, masked."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 1 << 16:
        length = bytes((0x80 | 126,)) + struct.pack("!H", size)
    else:
        length = bytes((0x80 | 127,)) + struct.pack("!Q", size)
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes((fin << 7 | rsv << 4 | opcode,)) + length + mask + masked


def text(message: object) -> bytes:
    """Return a client's text frame with this as JSON."""
    return frame(TEXT, json.dumps(message).encode())


def close(code: int, reason: bytes = b"") -> bytes:
    """Return a client's Close frame."""
    return frame(CLOSE, struct.pack("!H", code) + reason)


def head(path: str = "/ws", *extra: str, credential: str | None = None) -> bytes:
    """Return a good WebSocket request head."""
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY.decode()}",
        "Sec-WebSocket-Version: 13",
        *extra,
    ]
    if credential is not None:
        lines.append(f"Authorization: Bearer {credential}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def split_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the server's frames in ``data`` as (opcode, payload), and what is incomplete."""
    found: list[tuple[int, bytes]] = []
    while len(data) >= 2:
        first, second = data[0], data[1]
        assert first & 0xF0 == 0x80, f"not a final frame without extensions: {data[:16]!r}"
        assert not second & 0x80, "a server must not mask"
        start, size = 2, second
        if second == 126:
            start, size = 4, int.from_bytes(data[2:4], "big")
        elif second == 127:
            start, size = 10, int.from_bytes(data[2:10], "big")
        if len(data) < start + size:
            break
        found.append((first & 0x0F, data[start : start + size]))
        data = data[start + size :]
    return found, data


class Client:
    """A client that sends any bytes and sees every byte."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._data = b""
        self._frames: list[tuple[int, bytes]] = []

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    async def more(self) -> bool:
        """Read once; return False at the end of the stream."""
        data = await self.stream.receive_some(1 << 16)
        self._data += data
        return bool(data)

    async def response(self) -> tuple[int, bytes]:
        """Read an HTTP response head; return its status and all of it."""
        while b"\r\n\r\n" not in self._data:
            assert await self.more(), f"the end came before the response: {self._data!r}"
        answer, _, self._data = self._data.partition(b"\r\n\r\n")
        return int(answer.split(b" ", 2)[1]), answer

    async def rest(self) -> bytes:
        """Read to the end of the stream; a reset is an error."""
        while await self.more():
            pass
        data, self._data = self._data, b""
        return data

    async def frame(self) -> tuple[int, bytes]:
        """Read one frame."""
        while not self._frames:
            self._frames, self._data = split_frames(self._data)
            if not self._frames:
                assert await self.more(), f"the end came before a frame: {self._data!r}"
        return self._frames.pop(0)

    async def message(self) -> dict[str, object]:
        """Read one text frame and return its JSON object."""
        opcode, payload = await self.frame()
        assert opcode == TEXT, f"opcode {opcode}: {payload!r}"
        found = json.loads(payload)
        assert isinstance(found, dict)
        return found

    async def until(self, kind: str) -> dict[str, object]:
        """Read messages up to the first of a type; pings and other messages are skipped."""
        while True:
            opcode, payload = await self.frame()
            if opcode == TEXT and json.loads(payload)["type"] == kind:
                found = json.loads(payload)
                assert isinstance(found, dict)
                return found

    async def farewell(self) -> tuple[str, int]:
        """Read to the end and close; return the goodbye's reason and the close code, the last."""
        frames = self._frames
        tail, incomplete = split_frames(await self.rest())
        await self.aclose()
        frames = [*frames, *tail]
        self._frames = []
        assert incomplete == b""
        assert [TEXT, CLOSE] == [opcode for opcode, _ in frames[-2:]], frames
        goodbye = json.loads(frames[-2][1])
        assert goodbye["type"] == "goodbye"
        return goodbye["reason"], int.from_bytes(frames[-1][1][:2], "big")

    async def aclose(self) -> None:
        """Close the socket."""
        await self.stream.aclose()

    def reset(self) -> None:
        """Close the socket with RST."""
        linger = struct.pack("ii", 1, 0)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.hang_up()

    def hang_up(self) -> None:
        """Close the socket without awaiting anything."""
        self.stream.socket.close()


class Confirmation:
    """What connections wait for until their topic is followed."""

    def __init__(self) -> None:
        self.waiters: list[Followed] = []

    def notify(self, waiter: Followed) -> None:
        """Note who waits."""
        self.waiters.append(waiter)

    def forget(self, waiter: Followed) -> None:
        """Note who no longer waits."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)

    def confirm(self) -> None:
        """Tell them, as the subscription would."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.followed()


class Follower:
    """Stands where the subscription stands; confirms at once unless told otherwise."""

    def __init__(self) -> None:
        self.patient = False
        """Whether topics are confirmed only by `confirm`."""
        self.followed: list[bytes] = []
        self.released: list[bytes] = []
        self.pending: dict[bytes, Confirmation] = {}

    def follow(self, channel: bytes) -> Confirmation | None:
        """Note the wish."""
        self.followed.append(channel)
        return self.pending.setdefault(channel, Confirmation()) if self.patient else None

    def release(self, channel: bytes) -> None:
        """Note the end of the wish."""
        self.released.append(channel)

    def confirm(self, channel: bytes) -> None:
        """Confirm a topic."""
        self.pending.pop(channel).confirm()


class Reading:
    """Stands where the reader stands; nobody has missed anything, unless told otherwise."""

    def __init__(self) -> None:
        self.patient = False
        """Whether pages come only by `answer`."""
        self.wanted: list[tuple[Waiting, bool]] = []

    def want(self, waiter: Waiting, *, everyone: bool) -> None:
        """Answer at once, or note who waits."""
        if self.patient:
            self.wanted.append((waiter, everyone))
        elif waiter.question(everyone=everyone) is not None:
            waiter.answered(page(), everyone=everyone)

    def answer(self, found: Page) -> None:
        """Give a page to the one who has waited longest."""
        waiter, everyone = self.wanted.pop(0)
        waiter.answered(found, everyone=everyone)


class Register:
    """Stands where the register of the fleet stands; notes who is connected."""

    def __init__(self) -> None:
        self.entered: list[Connection] = []
        self.left: list[Connection] = []

    def enter(self, connection: Connection) -> None:
        """Note it."""
        self.entered.append(connection)

    def leave(self, connection: Connection) -> None:
        """Note its end."""
        self.left.append(connection)


class Attended:
    """Stands where presence is kept; notes who is subscribed to what."""

    def __init__(self) -> None:
        self.entered: list[tuple[str | None, str]] = []
        self.left: list[tuple[str | None, str]] = []

    def enter(self, member: Member, name: str) -> None:
        """Note it."""
        self.entered.append((member.user, name))

    def leave(self, member: Member, name: str) -> None:
        """Note its end."""
        self.left.append((member.user, name))

    def ask(self, waiter: Asking, name: str, after: str | None, ref: str | None) -> None:
        """Answer nothing."""


def desk(log_bug: Callable[[str, BaseException], None]) -> Desk:
    """Return what topics share where there is no Redis: nothing that is published goes out."""
    rules = TopicRules()
    return Desk(
        prefix="",
        rules=rules,
        public=Patterns.of(()),
        max_topics=10,
        presence=Patterns.of(("**",)),
        speaker=Speaker(rules, log_bug=log_bug, log_trouble=print),
        attendance=Attended(),
    )


def chats(log_bug: Callable[[str, BaseException], None]) -> Chats:
    """Return what counts on chat sessions; without Redis none is ever ours."""
    return Chats(life="w0", ttl=60.0, prefix="", log_bug=log_bug, log_trouble=print)


def page(
    *items: Item,
    start: str = "0-0",
    reached: str = "0-0",
    unread: int = 0,
    more: bool = False,
    why: str = "new",
    all_point: str = "",
) -> Page:
    """Return a page of the ledger; an empty one by default."""
    return Page("e0", start, reached, unread, more, why, all_point, list(items))


@attrs.define(eq=False, kw_only=True)
class Worker:
    """The hot path of one worker."""

    shared: Shared
    listener: Listener
    follower: Follower
    reading: Reading
    register: Register
    delivery: Delivery
    door: Door
    port: int
    nursery: trio.Nursery
    """Where its connections live."""
    machinery: trio.Nursery
    """Where the pump runs."""
    bugs: list[BaseException]
    ends: list[CloseReason]
    clients: list[Client] = attrs.field(factory=list)
    """Closed in the end, if the test has not."""

    @property
    def pump(self) -> Pump:
        """Return the pump."""
        return self.shared.pump

    @property
    def hub(self) -> Hub:
        """Return the hub."""
        return self.shared.hub

    @property
    def tally(self) -> Tally:
        """Return the counts."""
        return self.shared.tally

    async def dial(self, receive_buffer: int = 0) -> Client:
        """Connect, and say nothing."""
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        return self._client(sock)

    def _client(self, sock: trio.socket.SocketType) -> Client:
        client = Client(trio.SocketStream(sock))
        self.clients.append(client)
        return client

    async def join(self, user: str = "ann", receive_buffer: int = 0) -> Client:
        """Connect as ``user``; return after ``connection_established``."""
        client = await self.dial(receive_buffer)
        await client.send(head(credential=token(user)))
        status, _ = await client.response()
        assert status == 101
        established = await client.message()
        assert established["type"] == "connection_established"
        return client

    def start_pump(self) -> None:
        """Run what `running` was told to keep still."""
        self.machinery.start_soon(self.pump.run)
        self.machinery.start_soon(self.pump.run_timers)

    def admitted(self) -> tuple[Client, Peer]:
        """Admit a connected socket by hand; return its client and its peer in the pump."""
        with socket.create_server(("127.0.0.1", 0)) as door:
            ours = socket.create_connection(door.getsockname())
            theirs, _ = door.accept()
        theirs.setblocking(False)
        self.listener.admit(theirs, theirs.getpeername())
        return self._client(trio.socket.from_stdlib_socket(ours)), self.peer(theirs)

    def peer(self, sock: socket.socket) -> Peer:
        """Return who is registered for a socket now."""
        return self.pump._peers[sock.fileno()]

    async def nameless(self) -> Client:
        """Connect without a credential; return after the 101."""
        client = await self.dial()
        await client.send(head())
        status, _ = await client.response()
        assert status == 101
        return client

    async def publish(self, channel: bytes, payload: object, kind: str = "notification") -> None:
        """Do what the subscription does with one message from Redis."""
        remaining = self.receive(channel, json.dumps({"type": kind, "payload": payload}).encode())
        if remaining is not None:
            await remaining

    def receive(self, channel: bytes, data: bytes) -> Awaitable[None] | None:
        """Do what the subscription does with a message that comes alone."""
        remaining = self.delivery.receive(channel, data)
        self.delivery.turn_over()
        return remaining

    def only(self) -> Connection:
        """Return the one connection there is."""
        (connection,) = self.listener.connections
        return connection

    async def settled(self) -> None:
        """Wait until nothing of any client is left, anywhere."""
        await until(
            lambda: (
                len(self.listener.connections) == 0
                and len(self.pump) == 1
                and len(self.pump.wheel) == 0
            )
        )
        assert (len(self.hub), self.tally.connections, self.tally.users) == (0, 0, 0)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for a condition, by the wall clock; fail after ``seconds``."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition did not come true in time"
        await trio.sleep(0.002)


def sockets_of(peers: Iterator[Peer]) -> list[socket.socket]:
    """Return the sockets that peers of the pump hold."""
    return [
        sock for peer in peers if isinstance(sock := getattr(peer, "_sock", None), socket.socket)
    ]


class Doors(TypedDict, total=False):
    """What a worker's listener may be told beside; see `Listener`."""

    origins: Origins
    peers: Peers
    max_arrivals_per_address: int
    max_sockets: int
    tls: ssl.SSLContext | None


@contextlib.asynccontextmanager
async def running(
    *,
    pace: Pace = CALM,
    limits: OutboxLimits | None = None,
    max_message: int = 16 << 10,
    max_connections: int = 0,
    handshake_timeout: float = 5.0,
    query_token: bool = True,
    send_buffer: int = 0,
    pumping: bool = True,
    bugs_expected: bool = False,
    verifier: Verifier | None = None,
    rates: Buckets[str] = UNLIMITED,
    requests: Buckets[str] = UNLIMITED,
    revoked: Revoked | None = None,
    board: Limits = UNLIMITED_BOARD,
    **doors: Unpack[Doors],
) -> AsyncIterator[Worker]:
    """Run a small worker; everything is gone afterwards, and it had no bugs."""
    bugs: list[BaseException] = []
    ends: list[CloseReason] = []
    door_sock = socket.create_server(("127.0.0.1", 0), backlog=512)
    door_sock.setblocking(False)
    if send_buffer:
        door_sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    hub, tally, follower, reading, register = Hub(), Tally(), Follower(), Reading(), Register()
    pump = Pump(bugs.append)
    shared = Shared(
        pump=pump,
        hub=hub,
        follower=follower,
        reader=reading,
        receipts=Receipts(Rules(), tally, lambda _what, bug: bugs.append(bug), print),
        rules=Rules(),
        verifier=verifier or Verifier(SETTINGS),
        revoked=revoked or Revoked(),
        board=Board.alone(board),
        registry=register,
        chats=chats(lambda _what, bug: bugs.append(bug)),
        desk=desk(lambda _what, bug: bugs.append(bug)),
        rates=rates,
        requests=requests,
        tally=tally,
        pace=pace,
        outbox_limits=limits or OutboxLimits(),
        max_message=max_message,
        user_topic=topic,
        broadcast_topic=BROADCAST,
        wall=time.time,
        log_bug=lambda _what, bug: bugs.append(bug),
        log_end=lambda _connection, reason: ends.append(reason),
        rng=random.Random(1),
    )
    shared.outbox_limits.budget.on_exceeded = shared.cut_largest
    pages = {"/healthz": lambda: (200, health.JSON, health.liveness_body())}
    listener = Listener(
        shared=shared,
        worker_id="w0",
        max_connections=max_connections,
        handshake_timeout=handshake_timeout,
        query_token=query_token,
        pages=pages,
        **doors,
    )
    delivery = Delivery(
        hub=hub,
        head=shared.head,
        turn=shared.outbox_limits.turn,
        tally=tally,
        broadcast_topic=BROADCAST,
        max_payload=10 << 10,
        log_malformed=lambda _topic, _problem: None,
    )
    door = Door(pump, door_sock, listener.admit, bugs.append)
    clients: list[Client] = []
    try:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as machinery:
                async with trio.open_nursery() as connections:
                    listener.open(connections)
                    door.unlock()
                    worker = Worker(
                        shared=shared,
                        listener=listener,
                        follower=follower,
                        reading=reading,
                        register=register,
                        delivery=delivery,
                        door=door,
                        port=door_sock.getsockname()[1],
                        nursery=connections,
                        machinery=machinery,
                        bugs=bugs,
                        ends=ends,
                        clients=clients,
                    )
                    if pumping:
                        worker.start_pump()
                    yield worker
                    door.lock()
                    connections.cancel_scope.cancel()
                machinery.cancel_scope.cancel()
    finally:
        door_sock.close()
        for client in clients:
            client.hang_up()
        for sock in sockets_of(iter(list(pump._peers.values()))):
            sock.close()
    if not bugs_expected:
        assert bugs == []


def unread(sock: socket.socket) -> bool:
    """Return whether bytes or the end wait in a socket now."""
    return bool(select.select([sock], [], [], 0)[0])


class Pair:
    """A connected pair of TCP sockets on loopback with small buffers, both non-blocking."""

    def __init__(self, buffer: int = 4096) -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.client = socket.socket()
            for sock in (door, self.client):
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, buffer)
            self.client.connect(door.getsockname())
            self.server, _ = door.accept()
        self.server.setblocking(False)
        self.client.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()
