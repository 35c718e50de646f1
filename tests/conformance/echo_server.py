"""An echo server made of the product's own parts, for test suites that speak WebSocket.

    python -m tests.conformance.echo_server PORT
        [--max-message BYTES] [--max-fragments N] [--deflate]

It listens on 127.0.0.1:PORT, path ``/ws`` (port 0: any free one), says ``listening on PORT`` on
standard output and echoes until SIGTERM or SIGINT. Then it ends its connections as a draining
worker does and prints a `Summary` as one line of JSON. Exit code 1 means that it had bugs.

What is the product's: listening socket, pump, door, request heads, decoder, outbox, close
handshake, deadlines, lingering. `Echo` is a `Connection` that has no user and another
conversation: it replaces what is said (`Connection._process`, `Connection._goodbye`) and inherits
when and how. A peer composed of the parts would be free of those private names, but it would have
a close handshake, back-pressure and lingering of its own, and those are what a test suite tests.

Two differences remain, because a test suite wants to see each frame answered: every ping gets
its pong (the product answers only the latest ping of one read, RFC 6455 5.5.3), in the order of
the frames; and there is no ``goodbye`` message before the Close frame.
"""

import argparse
import contextlib
import json
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Final, Self

import attrs
import trio

from supervisor.doors import Address, Buffers, open_doors
from tests.trioserver.wire import chats, desk
from trioserver import frames
from trioserver.auth import Verifier
from trioserver.caller import caller
from trioserver.connection import Connection
from trioserver.deflate import Compressor, inflate
from trioserver.errors import CloseReason
from trioserver.handshake import Request, upgrade
from trioserver.hub import Hub
from trioserver.ledger import Rules
from trioserver.listener import Admitted, Listener
from trioserver.metrics import Tally
from trioserver.outbox import OutboxLimits
from trioserver.pump import Door, Pump
from trioserver.receipts import Receipts
from trioserver.settings import Settings
from trioserver.shared import Pace, Shared, Waiting
from trioserver.wish import NO_WISH

SHIPPED: Final = Settings()

CALM: Final = Pace(
    ping_interval=0,
    pong_wait=0,
    heartbeat_interval=0,
    idle_timeout=0,
    write_wait=SHIPPED.ws_write_wait,
    auth_timeout=0,
)
"""Test suites do not expect pings and heartbeats, and never say who they are."""

LAST_WORDS_SECONDS: Final = 3.0
"""For farewells and lingering sockets when it is told to end."""

ANSWERS: Final = {frames.TEXT: frames.TEXT, frames.BINARY: frames.BINARY, frames.PING: frames.PONG}


@attrs.frozen(kw_only=True)
class Summary:
    """What an echo server has to say in the end."""

    connections: int
    bugs: int
    closes: dict[str, int]
    """Label of the `CloseReason` to the number of connections that ended so."""
    idle_rss: int
    """Resident bytes before the first connection."""
    peak_rss: int
    """Resident bytes at most."""

    def line(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        """Return what `line` made a line of."""
        return cls(**json.loads(line))


class Echo(Connection):
    """A connection that sends back what it gets."""

    __slots__ = ("_compressor",)

    def __init__(
        self,
        shared: Shared,
        sock: socket.socket,
        greeting: bytes,
        *,
        max_fragments: int,
        deflate: bool,
    ) -> None:
        super().__init__(shared, sock, "echo", greeting, None, deflate=deflate)
        self._compressor = shared.compressor if deflate else None
        # Again, because the product has no setting for fragments.
        self._decoder = frames.Decoder(
            shared.max_message, max_fragments, inflate if deflate else None
        )

    def _process(self, events: list[frames.Event], now: float) -> CloseReason | None:
        replies: list[bytes] = []
        for opcode, payload in events:
            if opcode == frames.CLOSE:
                self._peer_code = payload[:2]
            elif opcode in ANSWERS:
                reply = frames.encode(ANSWERS[opcode], payload)
                if opcode == frames.TEXT and self._compressor is not None:
                    reply = self._compressor.of(reply)
                replies.append(reply)
                if opcode != frames.PING:
                    self._message_since = None
        if replies:
            self.outbox.offer(b"".join(replies))
        return None

    def _goodbye(self, reason: CloseReason, reconnect_in_ms: int | None) -> bytes:
        return frames.encode_close(reason.code, reason.text)


@attrs.define(eq=False, kw_only=True)
class EchoListener(Listener):
    """Admits everybody to an `Echo`."""

    max_fragments: int

    def judge(self, request: Request, peer: int) -> Admitted:
        """Admit everybody, with compression if it may be; echoes have no users."""
        accepted = upgrade(request, may_deflate=self.shared.compressor is not None)
        return Admitted(accepted, None, NO_WISH, caller(peer, None, b"", ""))

    def connection(self, sock: socket.socket, admitted: Admitted) -> Connection:
        """Make an echo."""
        return Echo(
            self.shared,
            sock,
            admitted.upgrade.response(),
            max_fragments=self.max_fragments,
            deflate=admitted.upgrade.extension is not None,
        )


class Nobody:
    """A `Follower` that is never asked: echoes have no user."""

    def follow(self, channel: bytes) -> None:
        """Confirm at once."""

    def release(self, channel: bytes) -> None:
        """Do nothing."""

    def want(self, waiter: Waiting, *, everyone: bool) -> None:
        """Do nothing."""

    def enter(self, connection: Connection) -> None:
        """Do nothing."""

    def leave(self, connection: Connection) -> None:
        """Do nothing."""


class EchoServer:
    """The echoes of one process; made where Trio runs.

    Args:
        max_message: Bytes of payload a message may have; 0 means no limit.
        max_fragments: Frames a message may consist of.
        deflate: Whether clients may negotiate permessage-deflate.
    """

    def __init__(self, max_message: int, max_fragments: int, *, deflate: bool = False) -> None:
        self.bugs: list[BaseException] = []
        self.tally = Tally()
        self.pump = Pump(self._bug)
        shared = Shared(
            pump=self.pump,
            hub=Hub(),
            follower=Nobody(),
            reader=Nobody(),
            receipts=Receipts(Rules(), self.tally, lambda _doing, bug: self._bug(bug), print),
            rules=Rules(),
            registry=Nobody(),
            chats=chats(lambda _doing, bug: self._bug(bug)),
            desk=desk(lambda _doing, bug: self._bug(bug)),
            verifier=Verifier(attrs.evolve(SHIPPED, jwt_secret_key="x" * 32)),
            tally=self.tally,
            pace=CALM,
            outbox_limits=OutboxLimits(
                # An echo must be able to wait.
                max_bytes=max(SHIPPED.outbox_max_bytes, 2 * max_message),
                max_frames=SHIPPED.outbox_max_frames,
            ),
            max_message=max_message,
            user_topic=str.encode,
            broadcast_topic=b"",
            wall=time.time,
            log_bug=lambda _doing, bug: self._bug(bug),
            log_end=lambda _connection, _reason: None,
            compressor=Compressor() if deflate else None,
        )
        self.listener = EchoListener(
            shared=shared,
            worker_id="echo",
            max_connections=0,
            handshake_timeout=SHIPPED.handshake_timeout,
            query_token=False,
            pages={},
            max_fragments=max_fragments,
        )

    async def run(self, sock: socket.socket) -> Summary:
        """Serve ``sock`` until SIGTERM or SIGINT; return what has happened."""
        idle = resident("VmRSS")
        door = Door(self.pump, sock, self.listener.admit, self._bug)
        async with trio.open_nursery() as machinery:
            machinery.start_soon(self.pump.run)
            machinery.start_soon(self.pump.run_timers)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery(strict_exception_groups=True) as connections:
                    self.listener.open(connections)
                    door.unlock()
                    print(f"listening on {sock.getsockname()[1]}", flush=True)  # noqa: T201
                    await anext(signals)
                    door.lock()
                    for connection in tuple(self.listener.connections):
                        connection.end(CloseReason.GOING_AWAY)
                    connections.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await self.pump.wait_settled()
            machinery.cancel_scope.cancel()
        closes = {label: count for label, count in self.tally.closes.items() if count}
        return Summary(
            connections=self.tally.opened,
            bugs=len(self.bugs),
            closes=closes,
            idle_rss=idle,
            peak_rss=resident("VmHWM"),
        )

    def _bug(self, bug: BaseException) -> None:
        self.bugs.append(bug)
        traceback.print_exception(bug)


def resident(field: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (at most) of this process, in bytes."""
    found = re.search(
        rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    assert found is not None
    return int(found[1]) << 10


def main() -> int:
    """Run the server; return its exit code."""
    parser = argparse.ArgumentParser(prog="tests.conformance.echo_server", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--max-message", type=int, default=SHIPPED.ws_max_message_size)
    parser.add_argument("--max-fragments", type=int, default=frames.MAX_FRAGMENTS)
    parser.add_argument("--deflate", action="store_true")
    arguments = parser.parse_args()
    address = Address(
        host="127.0.0.1", port=arguments.port, host_setting="HOST", port_setting="PORT"
    )
    buffers = Buffers(receive=SHIPPED.ws_read_buffer_size, send=SHIPPED.ws_write_buffer_size)
    (door,) = open_doors(address, 1, buffers)

    async def serve() -> Summary:
        server = EchoServer(
            arguments.max_message, arguments.max_fragments, deflate=arguments.deflate
        )
        return await server.run(door)

    with contextlib.closing(door):
        summary = trio.run(serve)
    print(summary.line())  # noqa: T201
    return 1 if summary.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
