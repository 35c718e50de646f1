"""The guard: takes the bytes of a connection apart into requests before Hypercorn sees them. Pure.

Two parsers that disagree about where a request ends let one caller write another's request. So
nothing of a request passes that could be read in two ways: of the head what
`trioserver.handshake` refuses on the public port, too; of the body everything but exactly one
``Content-Length`` in digits, or ``Transfer-Encoding: chunked`` alone, with chunks of digits and
CR LF, without extensions and without trailers. The limits on a head hold however it arrives.

What passes goes on unchanged, a head in one piece, except for the offer of HTTP/2 that some
clients (Java's) make with every request: it is taken out. Hypercorn would go over to HTTP/2, which
no guard here reads; who offers it gets HTTP/1.1, as the offer allows, and a connection of its own.

After a request that is the last of its connection, and after a refusal, nothing passes any more.
"""

import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

from trioserver import handshake, response_heads
from trioserver.handshake import Refusal, Request

BAD: Final = HTTPStatus.BAD_REQUEST

_LENGTH: Final = re.compile(rb"0|[1-9][0-9]{0,14}")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
_MAX_CHUNK_LINE: Final = 10
_OFFER_OF_HTTP2: Final = re.compile(rb"(?im)^(?:upgrade|http2-settings):[^\r\n]*\r\n")


class Guard:
    """Guards one connection: bytes go in with `receive`, what may pass comes out of `take`."""

    __slots__ = ("_buffer", "_known", "_last", "_left", "_step", "request_id", "within")

    def __init__(self) -> None:
        self.within = False
        """Whether a head has passed whose body has not, entirely."""
        self.request_id = ""
        """Of the request whose head came last; empty before the first."""
        self._buffer = bytearray()
        self._known = 0
        """Bytes of an incomplete head that were looked at."""
        self._left = 0
        """Bytes of a body, or of a chunk, that are still to come."""
        self._last = False
        """Whether no request may follow this one."""
        self._step: Callable[[], bytes] = self._head

    @property
    def begun(self) -> bool:
        """Whether something is there of a request that is not complete."""
        return self.within or bool(self._buffer)

    def receive(self, data: bytes) -> None:
        """Note what has come."""
        if self._step != self._nothing:
            self._buffer += data

    def take(self) -> bytes:
        """Return what may pass now: a whole head, or what is there of a body; else nothing.

        Raises:
            Refusal: The request ends here, and so must the connection.
        """
        try:
            return self._take_body() if self.within else self._step()
        except Refusal:
            self._close()
            raise

    def _take_body(self) -> bytes:
        parts = []
        while self.within and (part := self._step()):
            parts.append(part)
        return b"".join(parts)

    def end(self) -> None:
        """Note that nothing more comes.

        Raises:
            Refusal: 400, something was begun and has no end.
        """
        if self.within or self._buffer.strip(b"\r\n"):
            if not self.within:
                self.request_id = response_heads.request_id_in(self._buffer)
            self._close()
            raise Refusal(BAD, "the request ended early")

    def _close(self) -> None:
        self._buffer.clear()
        self._step = self._nothing

    def _nothing(self) -> bytes:
        return b""

    def _head(self) -> bytes:
        buffer = self._buffer
        try:
            end = handshake.head_end(buffer, self._known)
            if not end:
                self._known = len(buffer)
                return b""
            request = handshake.parse_any(head := bytes(buffer[:end]))
        except Refusal:
            self.request_id = response_heads.request_id_in(buffer)
            raise
        given = request.headers.get(b"x-request-id")
        self.request_id = response_heads.request_id([] if given is None else [given])
        head = self._judge(request, head)
        del buffer[:end]
        self._known = 0
        if not self.within:
            self._finish()
        return head

    def _judge(self, request: Request, head: bytes) -> bytes:
        """Decide what comes after this head; return it as it may pass."""
        if request.method == "CONNECT":
            # What follows it belongs to the tunnel, say those who take the answer for a 2xx.
            raise Refusal(BAD, "this is no proxy")
        # RFC 9112, 2.2: some clients send one more than they should behind a body.
        head = head.removeprefix(b"\r\n")
        headers = request.headers
        chunked, self._left = _framing(request)
        self.within = chunked or self._left > 0
        _check_expectation(headers.get(b"expect"), has_body=self.within)
        self._last = request.minor == 0 or _lists(headers, b"connection", b"close")
        upgrade = headers.get(b"upgrade")
        if upgrade is not None:
            if upgrade.lower() != b"h2c":
                raise _wrong_upgrade(has_body=self.within)
            self._last = True
            head = _OFFER_OF_HTTP2.sub(b"", head)[:-2] + b"Connection: close\r\n\r\n"
        if self.within:
            self._step = self._chunk_line if chunked else self._body
        return head

    def _finish(self) -> None:
        self.within = False
        if self._last:
            self._close()
        else:
            self._step = self._head

    def _some(self) -> bytes:
        """Take what is there of the bytes that are counted."""
        part = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(part)
        return part

    def _body(self) -> bytes:
        part = self._some()
        if not self._left:
            self._finish()
        return part

    def _chunk_line(self) -> bytes:
        buffer = self._buffer
        end = buffer.find(b"\n", 0, _MAX_CHUNK_LINE) + 1
        if not end and len(buffer) < _MAX_CHUNK_LINE:
            return b""
        line = bytes(buffer[:end])
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Refusal(BAD, "a chunk begins with its size in hexadecimal digits and CR LF")
        del buffer[:end]
        self._left = int(match[1], 16)
        self._step = self._chunk if self._left else self._last_line
        return line

    def _chunk(self) -> bytes:
        part = self._some()
        if not self._left:
            self._step = self._chunk_end
        return part

    def _chunk_end(self) -> bytes:
        line = self._line_end("a chunk ends with CR LF behind as many bytes as it announced")
        if line:
            self._step = self._chunk_line
        return line

    def _last_line(self) -> bytes:
        line = self._line_end("trailers are not accepted here")
        if line:
            self._finish()
        return line

    def _line_end(self, problem: str) -> bytes:
        line = bytes(self._buffer[:2])
        if not b"\r\n".startswith(line):
            raise Refusal(BAD, problem)
        if len(line) < len(b"\r\n"):
            return b""
        del self._buffer[:2]
        return line


def _framing(request: Request) -> tuple[bool, int]:
    """Return how the body is framed: whether in chunks, else of how many bytes."""
    coding = request.headers.get(b"transfer-encoding")
    length = request.headers.get(b"content-length")
    if coding is None:
        if length is None:
            return False, 0
        if not _LENGTH.fullmatch(length):
            raise Refusal(BAD, "Content-Length must be a number in decimal digits")
        return False, int(length)
    if length is not None:
        raise Refusal(BAD, "a body has a length or is chunked, not both")
    if coding.lower() != b"chunked" or request.minor == 0:
        raise Refusal(BAD, "the only Transfer-Encoding here is chunked, in HTTP/1.1")
    return True, 0


def _check_expectation(expectation: bytes | None, *, has_body: bool) -> None:
    if expectation is None:
        return
    if expectation.lower() != b"100-continue":
        raise Refusal(HTTPStatus.EXPECTATION_FAILED, "only 100-continue can be expected")
    if not has_body:
        raise Refusal(BAD, "there is no body to continue with")


def _wrong_upgrade(*, has_body: bool) -> Refusal:
    if has_body:
        return Refusal(BAD, "a request with a body cannot change the protocol")
    return Refusal(HTTPStatus.FORBIDDEN, "this port speaks HTTP/1.1 only; WebSocket is elsewhere")


def _lists(headers: Mapping[bytes, bytes], name: bytes, token: bytes) -> bool:
    value = headers.get(name, b"").lower()
    return token in [part.strip() for part in value.split(b",")]
