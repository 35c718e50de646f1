"""The ledger's scripts called as a worker, a publisher and the scheduler call them, blocking.

    with Caller(redis.path) as caller, Ears(redis.path) as ears:
        accepted = ledger.accepted(caller.run(ledger.publish(notification, rules=RULES)))
        [heard] = ears.heard()

`Caller` is one connection with the scripts, `Ears` hears every envelope that Redis publishes.
"""

import json
import re
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import attrs
import hiredis

from trioserver import ledger
from trioserver.resp import Argument, pack

SECONDS: Final = 10.0
"""For one answer."""

BARRIER: Final = b"~until-here:"
"""Begins a channel of one listener: what was published before it has been heard when it is."""

Address = Path | tuple[str, int]


class _Connection:
    """One blocking connection: a socket and a parser."""

    def __init__(self, address: Address) -> None:
        if isinstance(address, Path):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(SECONDS)
            self._socket.connect(str(address))
        else:
            self._socket = socket.create_connection(address, SECONDS)
        self._reader = hiredis.Reader(notEnoughData=Ellipsis)

    def send(self, *command: Argument) -> None:
        self._socket.sendall(pack(*command))

    def next(self) -> object:
        """Return the next reply; an error reply is a value."""
        while (reply := self._reader.gets()) is Ellipsis:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("Redis closed the connection")
            self._reader.feed(data)
        return reply

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Caller(_Connection):
    """Runs commands one after another, and the ledger's scripts among them."""

    def run(self, command: Sequence[Argument]) -> Any:
        """Return the reply to one command; scripts that Redis does not know are loaded first.

        Raises:
            RuntimeError: Redis answered with an error, whose text this is.
        """
        reply = self._ask(command)
        if isinstance(reply, hiredis.ReplyError) and ledger.is_noscript(str(reply)):
            for load in ledger.loads():
                self._ask(load)
            reply = self._ask(command)
        if isinstance(reply, hiredis.ReplyError):
            raise RuntimeError(str(reply))  # noqa: TRY004 - it is a value that means failure
        return reply

    def ask(self, *command: Argument) -> Any:
        """Return the reply to one command."""
        return self.run(command)

    def now(self) -> int:
        """Return Redis's own time in ms, which is the scripts' time."""
        seconds, micros = self.run(("TIME",))
        return int(seconds) * 1000 + int(micros) // 1000

    def wait_past(self, moment: int) -> None:
        """Return when Redis's own time is later than ``moment``, which is a few ms away."""
        assert moment - self.now() < SECONDS * 1000
        while self.now() <= moment:
            pass

    def _ask(self, command: Sequence[Argument]) -> object:
        self.send(*command)
        return self.next()


@attrs.frozen(kw_only=True)
class Heard:
    """One envelope, taken apart."""

    channel: str
    kind: str
    """``n`` a notification, ``u`` an update."""
    prev: str
    point: str
    unread: int
    rest: tuple[Any, ...]
    """n: id, type, payload, expires, traceparent; u: state, ids, by."""


class Ears(_Connection):
    """Hears everything that is published on one server, unless told not to listen."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._messages: list[Heard] = []
        self._barrier = BARRIER + uuid.uuid4().bytes
        self._switch(b"subscribe", self._barrier)
        self.listen()
        self._speaker = Caller(address)

    def listen(self) -> None:
        """Hear everything from now on."""
        self._switch(b"psubscribe", b"*")

    def unlisten(self) -> None:
        """Hear nothing from now on; Redis counts nobody as listening."""
        self._switch(b"punsubscribe", b"*")

    def heard(self) -> list[Heard]:
        """Return what was published since the last time."""
        self._speaker.ask("PUBLISH", self._barrier, b"")
        self._collect(b"message")
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Close both connections."""
        self._speaker.close()
        super().close()

    def _switch(self, verb: bytes, what: bytes) -> None:
        self.send(verb, what)
        self._collect(verb)

    def _collect(self, until: bytes) -> None:
        """Take what comes, until something of this kind does."""
        while True:
            reply = self.next()
            assert isinstance(reply, list)
            if reply[0] == until:
                return
            _, _, channel, message = reply
            if not channel.startswith(BARRIER):
                self._messages.append(decode(channel, message))


def decode(channel: bytes, envelope: bytes) -> Heard:
    """Return what an envelope says; it has no other form than the two that are documented."""
    assert re.match(rb"\x01[nu]\[", envelope), envelope
    prev, point, unread, *rest = json.loads(envelope[2:])
    return Heard(
        channel=channel.decode(),
        kind=envelope[1:2].decode(),
        prev=prev,
        point=point,
        unread=unread,
        rest=tuple(rest),
    )
