"""The body of a request: read to its end whether anybody wants it or not, kept only in part.

Hypercorn puts what arrives into a queue of ten pieces. If nobody takes them out, its reader waits
for room for ever and never sees the end of the connection. So one task per request takes whatever
comes, and what nobody wants, or what is too much, is thrown away.

Nor may a connection be closed while the client is still sending: unread input makes the kernel
answer with a reset, which destroys the response on its way. So a refusal is sent at once, and its
very end only after `linger`.
"""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

import trio

from trioserver.gateway.problem import Problem

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MAX_BYTES: Final = 64 << 10
"""Of a body that is wanted."""

READ_SECONDS: Final = 10.0
"""From the head of the request to the last byte of a body that is wanted."""

LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 1 << 20
"""How long, and how much, is still taken from a client that has its answer already."""


class Body:
    """What a client sends after the head. One task runs `run`, the others ask."""

    def __init__(
        self, receive: Receive, headers: Iterable[tuple[bytes, bytes]], *, wanted: bool
    ) -> None:
        """Prepare; nothing is received yet.

        Args:
            receive: Of ASGI.
            headers: Of the request.
            wanted: Whether `read` may be called: only then anything is kept.
        """
        self.ended = False
        """Whether nothing more can come."""
        self._receive = receive
        self._deadline = trio.current_time() + READ_SECONDS
        self._wanted = wanted
        declared = dict(headers).get(b"content-length", b"0")
        self._too_large = declared.isdigit() and int(declared) > MAX_BYTES
        self._whole = False
        self._size = 0
        self._parts: list[bytes] = []
        self._progress = trio.Event()

    async def run(self) -> None:
        """Take what comes; returns when the client is gone or has the whole response."""
        while (message := await self._receive())["type"] != "http.disconnect":
            part = message.get("body", b"")
            self._size += len(part)
            self._too_large = self._too_large or self._size > MAX_BYTES
            if self._too_large:
                self._parts.clear()
            elif part and self._wanted:
                self._parts.append(part)
            if not message.get("more_body", False):
                self._whole = self.ended = True
            self._tell()
        self.ended = True
        self._tell()

    async def read(self) -> bytes:
        """Return the body.

        Raises:
            Problem: It is larger than `MAX_BYTES` (413; known before it has arrived), was not
                complete after `READ_SECONDS` (408), or ended early (400).
        """
        with trio.move_on_at(self._deadline):
            while not (self._too_large or self.ended):
                await self._progress.wait()
        if self._too_large:
            detail = f"The body is larger than {MAX_BYTES} bytes."
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail)
        if not self.ended:
            detail = f"The body did not arrive within {READ_SECONDS:g} s."
            raise Problem(HTTPStatus.REQUEST_TIMEOUT, detail)
        if not self._whole:
            raise Problem(HTTPStatus.BAD_REQUEST, "The body ended early.")
        return b"".join(self._parts)

    async def linger(self) -> None:
        """Return when the client has sent everything, or enough of it to be cut off."""
        enough = self._size + LINGER_BYTES
        with trio.move_on_after(LINGER_SECONDS):
            while not self.ended and self._size < enough:
                await self._progress.wait()

    def _tell(self) -> None:
        self._progress.set()
        self._progress = trio.Event()
