"""Clients that write down what they get, are cut, and resume where they stopped.

The WebSocket is websockets' Sans-I/O client on a Trio socket. What arrives is written down before
anything is answered, also before the pong that follows it: whoever says "received" has received.
"""

import contextlib
import json
import random
import socket
import struct
from enum import Enum
from typing import Any, Final, NoReturn
from urllib.parse import urlencode

import trio
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.integration.clients import token
from tests.ledger.records import (
    ALL,
    NOWHERE,
    OWN,
    Connection,
    Ended,
    Established,
    Gap,
    Life,
    Receipt,
    now,
    places,
)

HANDSHAKE_SECONDS: Final = 10.0
PAUSE_CAP: Final = 0.5
"""Seconds before it comes back, unless a goodbye asks for more."""

GOODBYE_CAP: Final = 2.0
READ_BYTES: Final = 1 << 16

_BROKEN: Final = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    InvalidHandshake,
    EOFError,
)


class Memory(Enum):
    """How a client says where it stopped."""

    POSITION = "position"
    """It keeps the latest position and brings it along."""
    DEVICE = "device"
    """It has a name, and the server remembers."""
    NONE = "none"
    """Neither: what any connection of the user received is received."""


class Client:
    """One device of a user, always connected or about to be.

    Args:
        address: Host and port of the server.
        user: Whose notifications it gets.
        name: Of the device, unique in the run.
        memory: How it resumes.
        acks: Whether it asks for redelivery, and acknowledges.
        dice: Decides when it comes back.
    """

    def __init__(
        self,
        address: tuple[str, int],
        user: str,
        name: str,
        *,
        memory: Memory = Memory.POSITION,
        acks: bool = False,
        dice: random.Random | None = None,
    ) -> None:
        self.life = Life(name=name, user=user, acks=acks)
        self.numbers: set[int] = set()
        """What it has received so far, by number."""
        self.connected = False
        """Whether `Established` was the last that happened to the connection."""
        self.refusals: list[str] = []
        """Attempts to connect that came to nothing."""
        self.memory = memory
        self._address = address
        self._dice = dice or random.Random(name)
        self._position = ""
        self._token = token(user)
        self._stream: trio.SocketStream | None = None
        self._scope = trio.CancelScope()
        self._asked_pause = 0.0
        self._here = trio.Event()
        """Not set while it stays away on purpose."""
        self._here.set()
        self._reads = True

    async def run(self) -> NoReturn:
        """Be connected until cancelled."""
        while True:
            await self._here.wait()
            self._reads = True
            self._asked_pause = 0.0
            with trio.CancelScope() as self._scope:
                await self._connection()
            await trio.sleep(max(self._asked_pause, self._dice.uniform(0, PAUSE_CAP)))

    def cut(self, *, reset: bool) -> None:
        """Break the connection where it stands, with whatever is unread in it.

        Args:
            reset: By RST, as a device that has crashed; otherwise by a plain end.
        """
        if self._stream is None:
            return
        if reset:
            option = struct.pack("ii", 1, 0)
            self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self._scope.cancel()

    def freeze(self) -> None:
        """Read no more on this connection: what comes stays in the kernel until it is cut."""
        self._reads = False

    def leave(self) -> None:
        """Disconnect, and stay away."""
        self._here = trio.Event()
        self._scope.cancel()

    def come_back(self) -> None:
        """Connect again."""
        self._here.set()

    def _query(self) -> str:
        query: dict[str, str | int] = {}
        if self.memory is Memory.POSITION and self._position:
            query["position"] = self._position
        if self.memory is Memory.DEVICE:
            query["device"] = self.life.name
        if self.life.acks:
            query["ack"] = 1
        return f"?{urlencode(query)}" if query else ""

    async def _connection(self) -> None:
        """Connect, and live through the connection."""
        log: Connection = []
        why = "cut"
        try:
            async with await trio.open_tcp_stream(*self._address) as stream:
                self._stream = stream
                protocol = await self._upgrade(stream)
                self.life.connections.append(log)
                why = await self._listen(stream, protocol, log)
        except _BROKEN as error:
            why = repr(error)
            if not log:
                self.refusals.append(why)
        finally:
            self._stream = None
            self.connected = False
            log.append(Ended(why=why, at=now()))

    async def _upgrade(self, stream: trio.SocketStream) -> ClientProtocol:
        host, port = self._address
        protocol = ClientProtocol(parse_uri(f"ws://{host}:{port}/ws{self._query()}"))
        request = protocol.connect()
        request.headers["Authorization"] = f"Bearer {self._token}"
        protocol.send_request(request)
        with trio.fail_after(HANDSHAKE_SECONDS):
            await _say(stream, protocol)
            # The response is an event like a frame; nothing may follow it in the same list.
            while protocol.state is not State.OPEN:
                await _hear(stream, protocol)
                if protocol.handshake_exc is not None:
                    raise protocol.handshake_exc
        return protocol

    async def _listen(
        self, stream: trio.SocketStream, protocol: ClientProtocol, log: Connection
    ) -> str:
        """Write down what comes, then answer; return why it ended."""
        while True:
            for event in protocol.events_received():
                if isinstance(event, Response):
                    continue
                if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    self._take(json.loads(bytes(event.data)), protocol, log)
            await _say(stream, protocol)
            assert protocol.parser_exc is None, protocol.parser_exc
            if protocol.close_expected():
                return f"closed with {protocol.close_rcvd}"
            if not self._reads:
                await trio.sleep_forever()
            await _hear(stream, protocol)

    def _take(self, message: dict[str, Any], protocol: ClientProtocol, log: Connection) -> None:
        stream = message.get("stream", OWN)
        match message["type"]:
            case "connection_established":
                self._establish(message, log)
            case "gap":
                log.append(
                    Gap(
                        first=message["from_seq"],
                        last=message["to_seq"],
                        missing=message["missing"],
                        reason=message["reason"],
                        stream=stream,
                        at=now(),
                    )
                )
            case "goodbye":
                self._asked_pause = min(GOODBYE_CAP, message["reconnect_in_ms"] / 1000)
            case "notification" if "id" in message:
                self._receive(message, stream, protocol, log)
        self._position = message.get("position", self._position)

    def _establish(self, message: dict[str, Any], log: Connection) -> None:
        log.append(
            Established(
                position=message.get("position", ""),
                resumed=message["resumed"],
                reason=message.get("reason", ""),
                at=now(),
            )
        )
        self.connected = True

    def _receive(
        self, message: dict[str, Any], stream: str, protocol: ClientProtocol, log: Connection
    ) -> None:
        place = places(message["position"]).get(stream, NOWHERE)
        number = message["payload"]["n"]
        log.append(
            Receipt(
                number=number,
                id=message["id"],
                place=place,
                stream=stream,
                attempt=message["attempt"],
                at=now(),
            )
        )
        assert place.seq == message["seq"], message
        assert stream in {OWN, ALL}
        self.numbers.add(number)
        # What came in one read with the server's Close frame can only be taken.
        if self.life.acks and stream == OWN and protocol.state is State.OPEN:
            # Both ways of naming it.
            which = "seq" if number % 2 else "id"
            protocol.send_text(json.dumps({"type": "ack", which: message[which]}).encode())


async def _say(stream: trio.SocketStream, protocol: ClientProtocol) -> None:
    for data in protocol.data_to_send():
        if data:
            await stream.send_all(data)
        else:
            # The end of what we say; the other side may have gone already.
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                await stream.send_eof()


async def _hear(stream: trio.SocketStream, protocol: ClientProtocol) -> None:
    data = await stream.receive_some(READ_BYTES)
    if not data:
        raise EOFError
    protocol.receive_data(data)
