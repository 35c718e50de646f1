"""Crowds: many clients at once, at the level of bytes, from any addresses of the loopback.

    with Crowd(address(server)) as crowd:
        crowd.come([Visit(source="127.0.1.1", user="ann")] * 20)
        assert 10 == len(crowd.staying)

All of them live in one thread: `Crowd.listen` takes what has come for any of them.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Self

import attrs

from tests.integration.clients import token
from tests.integration.measuring import PATIENCE, Address
from tests.trioserver.wire import CLOSE, TEXT, frame, head, split_frames, text

GONE: Final = 0
"""The status of somebody who got no answer: the stream ended, or was reset."""


@attrs.frozen(kw_only=True)
class Visit:
    """Who comes from where."""

    user: str
    """Empty for a handshake without a credential."""
    source: str = "127.0.0.1"
    """An address of the loopback."""
    forwarded: str = ""
    """What a proxy would say about its client; empty for nothing."""
    receive_buffer: int = 0
    """Bytes; 0 leaves it to the kernel."""
    query: str = ""
    """Of the URL."""

    def head(self) -> bytes:
        """Return the handshake."""
        extra = [f"X-Forwarded-For: {self.forwarded}"] if self.forwarded else []
        path = f"/ws?{self.query}" if self.query else "/ws"
        return head(path, *extra, credential=token(self.user) if self.user else None)


class Visitor:
    """One client of a crowd."""

    def __init__(self, where: Address, visit: Visit) -> None:
        self.visit = visit
        self.status: int | None = None
        """Of the HTTP answer; None before it has come."""
        self.headers: dict[str, str] = {}
        self.why = ""
        """What the answer says, if it is a refusal."""
        self.code: int | None = None
        """Of the Close frame."""
        self.over = False
        """Whether the stream has ended."""
        self.messages: list[dict[str, Any]] = []
        self._sent = False
        self._closed = False
        self._data = b""
        self.socket = socket.socket()
        if visit.receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, visit.receive_buffer)
        self.socket.bind((visit.source, 0))
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.socket.connect(where)

    @property
    def established(self) -> bool:
        """Whether the first message has come."""
        return any(one["type"] == "connection_established" for one in self.messages)

    @property
    def judged(self) -> bool:
        """Whether it was let in or refused."""
        return self.over or self.established

    @property
    def staying(self) -> bool:
        """Whether it was let in, and nobody has said goodbye."""
        return self.established and self.code is None and not self.over

    @property
    def closing(self) -> tuple[int | None, str]:
        """The code of the Close frame and the reason in the goodbye."""
        goodbye = next((one for one in self.messages if one["type"] == "goodbye"), {"reason": ""})
        return self.code, goodbye["reason"]

    def writable(self) -> bool:
        """Say who it is, once; return whether that is done."""
        if not self._sent:
            try:
                self.socket.send(self.visit.head())
            except OSError:
                self._end()
            self._sent = True
        return self._sent

    def readable(self) -> None:
        """Take what has come."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._data += data
        if self.status is None and b"\r\n\r\n" in self._data:
            answer, _, self._data = self._data.partition(b"\r\n\r\n")
            first, *lines = answer.decode().split("\r\n")
            self.status = int(first.split(" ", 2)[1])
            self.headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
            }
        if self.status == 101:
            self._take_frames()
        if not data:
            self._end()

    def _take_frames(self) -> None:
        frames, self._data = split_frames(self._data)
        for opcode, payload in frames:
            if opcode == TEXT:
                self.messages.append(json.loads(payload))
            elif opcode == CLOSE:
                self.code = int.from_bytes(payload[:2], "big")
                self.close()

    def close(self) -> None:
        """Say goodbye, once. The server waits for it, and keeps the place as long as it does."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self.socket.send(frame(CLOSE, (1000).to_bytes(2, "big")))

    def _end(self) -> None:
        if self.status is None:
            self.status = GONE
        elif self.status != 101:
            self.why = json.loads(self._data)["detail"]
        self.over = True

    def say(self, message: object) -> None:
        """Send a message."""
        self.socket.send(text(message))


class Crowd:
    """Visitors of one server. They leave with the block."""

    def __init__(self, where: Address) -> None:
        self.where = where
        self.visitors: list[Visitor] = []
        self._by_descriptor: dict[int, Visitor] = {}
        self._poll = select.epoll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._poll.close()

    def _close(self) -> None:
        for visitor in self.visitors:
            visitor.socket.close()

    def scatter(self) -> None:
        """Close all their sockets, and forget them."""
        self._close()
        self.visitors = []
        self._by_descriptor = {}

    @property
    def staying(self) -> list[Visitor]:
        """Those who are connected."""
        return [one for one in self.visitors if one.staying]

    def send(self, visits: Iterable[Visit]) -> list[Visitor]:
        """Let them come; return at once."""
        come = []
        for visit in visits:
            visitor = Visitor(self.where, visit)
            come.append(visitor)
            self.visitors.append(visitor)
            self._by_descriptor[visitor.socket.fileno()] = visitor
            self._poll.register(visitor.socket, select.EPOLLIN | select.EPOLLOUT)
        return come

    def come(self, visits: Iterable[Visit], seconds: float = PATIENCE) -> list[Visitor]:
        """Let them all come at once; return when each was let in or refused."""
        come = self.send(visits)
        self.wait(lambda: all(one.judged for one in come), "everybody has an answer", seconds)
        return come

    def listen(self, seconds: float) -> None:
        """Take what comes; return after the first that came, or after so long."""
        for descriptor, events in self._poll.poll(seconds):
            visitor = self._by_descriptor[descriptor]
            if events & select.EPOLLOUT and visitor.writable():
                self._poll.modify(descriptor, select.EPOLLIN)
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                visitor.readable()
            if visitor.over:
                self._forget(visitor)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Listen until a condition is true.

        Raises:
            AssertionError: It is not within so many seconds.
        """
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"not within {seconds} s: {what}"
            self.listen(0.02)

    def leave(self, visitors: Iterable[Visitor]) -> None:
        """Let some go, in order: they say goodbye and wait for the answer."""
        going = list(visitors)
        for visitor in going:
            visitor.close()
        self.wait(lambda: all(one.over for one in going), "the server has closed")

    def stop_listening(self) -> None:
        """Read nothing more from anybody."""
        for descriptor in self._by_descriptor:
            self._poll.modify(descriptor, 0)

    def listen_again(self) -> None:
        """Read from everybody again."""
        for descriptor in self._by_descriptor:
            self._poll.modify(descriptor, select.EPOLLIN)

    def _forget(self, visitor: Visitor) -> None:
        self._poll.unregister(visitor.socket)
        del self._by_descriptor[visitor.socket.fileno()]
        visitor.socket.close()
