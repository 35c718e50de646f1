"""The opening handshake (RFC 6455 section 4), server side: a request head in, a verdict out.

`parse` judges the bytes of one request head; `upgrade` judges a parsed request as a WebSocket
handshake. Both answer with a value or raise `Refusal`, which carries the HTTP answer. The
grammar of HTTP is httptools' (llhttp); what it tolerates and this server does not is checked
here, row by row in `tests/trioserver/test_handshake.py`: whitespace before a colon, bare line
feeds, folded lines, bodies, absolute targets, doubled singletons.

Limits on a head, applied to complete heads as well as to growing ones: 16 KiB in all, 8 KiB for
one line, 100 header lines (gunicorn: 8,190 bytes and 100; websockets: 8,192 and 128).
"""

import base64
import binascii
import hashlib
import re
from typing import Final
from urllib.parse import unquote_plus

import attrs
import httptools

from trioserver import deflate, health

SUBPROTOCOL: Final = "trioserver.v1"
"""The one sub-protocol this server selects."""

BEARER_PREFIX: Final = "bearer."
"""A sub-protocol that starts so carries a token; it is never selected and never echoed."""

MAX_HEAD: Final = 16 << 10
MAX_LINE: Final = 8 << 10
MAX_HEADERS: Final = 100
MAX_PARAMETERS: Final = 16

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_SINGLETONS: Final = frozenset(
    {
        b"host",
        b"content-length",
        b"authorization",
        b"origin",
        b"sec-websocket-key",
        b"sec-websocket-version",
    }
)
# What may stand in a head; everything else is a control character.
_ALLOWED: Final = bytes({0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0x100)})
_REQUEST_LINE: Final = re.compile(rb"(?:\r\n)*[A-Z]+ [^ \r\n]+ HTTP/1\.([01])\r\n")
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*")
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


@attrs.frozen
class Refusal(Exception):  # noqa: N818 - reads as what is sent
    """The request is answered over HTTP and the connection closed.

    Attributes:
        status: HTTP status.
        problem: One sentence for whoever wrote the client; never echoes their bytes.
        headers: More header lines, such as ``Retry-After``.
    """

    status: int
    problem: str
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def for_now(cls, status: int, problem: str, retry_after: int) -> "Refusal":
        """Make the refusal of a client that may come again after so many seconds."""
        return cls(status, problem, (("Retry-After", str(retry_after)),))

    def response(self, *, request_id: str = "", secure: bool = False, head: bool = False) -> bytes:
        """Return the whole HTTP answer.

        Args:
            head: Whether the request was HEAD: no body.
            request_id: See `response_heads.request_id`; a new one without.
            secure: Whether it goes out through our own TLS.
        """
        return health.small_response(
            self.status,
            health.problem_body(self.status, self.problem),
            health.PROBLEM_JSON,
            headers=dict(self.headers),
            request_id=request_id,
            secure=secure,
            head=head,
        )


@attrs.frozen
class Request:
    """A request head that is well formed."""

    method: str
    path: str
    """As sent: starts with ``/``, percent-encoding kept."""
    query: str
    headers: dict[bytes, bytes]
    """Lower-case names; repeated list headers are joined with commas."""
    minor: int = 1
    """Of the version: HTTP/1.1, or 1.0."""

    def header(self, name: bytes) -> str | None:
        """Return a header's value as text, or None."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def parameters(self) -> dict[str, str]:
        """Return the query parameters; of a repeated one, the last.

        Raises:
            Refusal: 400, if there are more than `MAX_PARAMETERS`.
        """
        if not self.query:
            return {}
        pairs = self.query.split("&")
        if len(pairs) > MAX_PARAMETERS:
            raise Refusal(400, "too many query parameters")
        parameters: dict[str, str] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name:
                name = unquote_plus(name)
                if name in parameters and name == "token":
                    # Whoever looks at the first one in front of us would have let in the other.
                    raise Refusal(400, "the parameter token is repeated")
                parameters[name] = unquote_plus(value)
        return parameters


class _Head:
    """Collects httptools' callbacks."""

    __slots__ = ("headers", "lines", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.lines = 0

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.lines += 1
        name = name.lower()
        value = value.strip(b" \t")
        if name in self.headers:
            if name in _SINGLETONS:
                raise Refusal(400, f"the header {name.decode('ascii')} is repeated")
            value = self.headers[name] + b", " + value
        self.headers[name] = value


def head_end(buffer: bytes | bytearray, known: int = 0) -> int:
    """Return the length of the request head in ``buffer``, or 0 while it is incomplete.

    Args:
        buffer: What has come so far.
        known: How much of it an earlier call has seen, so that a head that comes byte by byte
            is not searched from its beginning each time.

    Raises:
        Refusal: 431 as soon as a limit is passed, complete or not; 400 if the bytes cannot be
            the beginning of an HTTP/1.1 request.
    """
    found = buffer.find(b"\r\n\r\n", max(0, known - 3))
    size = found + 4 if found >= 0 else len(buffer)
    if size > MAX_HEAD:
        raise Refusal(431, f"the request head is longer than {MAX_HEAD} bytes")
    if found >= 0:
        return size
    if buffer.find(b"\n", known) >= 0:
        if buffer.count(b"\n") > MAX_HEADERS + 1:
            raise Refusal(431, f"more than {MAX_HEADERS} header lines")
        if b"\n\n" in buffer or b"\n\r\n" in buffer:
            # Bare line feeds would otherwise wait for the deadline.
            raise Refusal(400, "lines must end with CR LF")
    if len(buffer) - (buffer.rfind(b"\n") + 1) > MAX_LINE:
        raise Refusal(431, f"a line is longer than {MAX_LINE} bytes")
    return 0


def parse(head: bytes) -> Request:
    """Parse one complete request head, blank line included.

    Raises:
        Refusal: 400 for what is not a well-formed HTTP/1.1 request without a body, 431 for one
            beyond the limits.
    """
    request = parse_any(head)
    if request.minor != 1:
        raise Refusal(400, "HTTP/1.1 is needed")
    headers = request.headers
    if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
        raise Refusal(400, "a request body is not accepted here")
    return request


def parse_any(head: bytes) -> Request:
    """Parse one complete request head, also of HTTP/1.0, also of a request with a body.

    How the body is framed is the caller's to judge.

    Raises:
        Refusal: 400 for what is not well formed, 431 for what is beyond the limits.
    """
    _check_bytes(head)
    collected = _Head()
    parser = httptools.HttpRequestParser(collected)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserCallbackError as error:
        if isinstance(error.__context__, Refusal):
            raise error.__context__ from None
        raise
    except httptools.HttpParserError:
        raise Refusal(400, "this is not an HTTP/1.1 request") from None
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise Refusal(400, "HTTP/1.1 is needed")
    minor = int(line[1])
    headers = collected.headers
    # Before HTTP/1.1 nobody had to send it, and some who only ask for health still do not.
    if not headers.get(b"host") and (minor or b"host" in headers):
        raise Refusal(400, "the Host header is missing")
    if not _TARGET.fullmatch(collected.target):
        raise Refusal(400, "the request target must be an ASCII path")
    path, _, query = collected.target.decode("ascii").partition("?")
    return Request(parser.get_method().decode("ascii"), path, query, headers, minor)


def _check_bytes(head: bytes) -> None:
    """Refuse what httptools would tolerate, before it sees it."""
    if head.count(b"\n") > MAX_HEADERS + 2:
        raise Refusal(431, f"more than {MAX_HEADERS} header lines")
    if len(head) > MAX_LINE and max(map(len, head.split(b"\n"))) > MAX_LINE:
        raise Refusal(431, f"a line is longer than {MAX_LINE} bytes")
    lines = head.count(b"\r\n")
    if (
        # Counting and deleting are ten times as fast as a regular expression that says the same.
        head.translate(None, _ALLOWED)
        or head.count(b"\r") != lines
        or head.count(b"\n") != lines
        or b"\r\n " in head
        or b"\r\n\t" in head
    ):
        raise Refusal(400, "the request head has control characters or folded lines")


@attrs.frozen
class Upgrade:
    """A valid WebSocket handshake: what the answer needs, and the credential it carried."""

    key: bytes
    subprotocol: str | None
    token: str | None
    """From ``Authorization: Bearer`` or the sub-protocol ``bearer.<jwt>``."""
    extension: str | None = None
    """Our answer to an offer of permessage-deflate, if it is taken."""

    def response(self) -> bytes:
        """Return the whole 101 answer."""
        accept = base64.b64encode(hashlib.sha1(self.key + _GUID).digest())  # noqa: S324 - RFC 6455
        chosen = (
            b""
            if self.subprotocol is None
            else b"Sec-WebSocket-Protocol: %b\r\n" % self.subprotocol.encode("ascii")
        )
        if self.extension is not None:
            chosen += b"Sec-WebSocket-Extensions: %b\r\n" % self.extension.encode("ascii")
        return (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n%b\r\n" % (accept, chosen)
        )


def upgrade(request: Request, *, may_deflate: bool = False) -> Upgrade:
    """Check ``request`` as a WebSocket handshake.

    Args:
        request: A well-formed one.
        may_deflate: Whether to agree on permessage-deflate if it is offered.

    Raises:
        Refusal: 405, 426 or 400, in this order of questions: is it a GET, does it ask for
            WebSocket, in the version we speak, with a right key?
    """
    if request.method != "GET":
        raise Refusal(405, "a WebSocket starts with GET", (("Allow", "GET"),))
    headers = request.headers
    if not (
        _lists(headers, b"upgrade", b"websocket") and _lists(headers, b"connection", b"upgrade")
    ):
        raise Refusal(
            426,
            "this path speaks WebSocket; send Connection: Upgrade and Upgrade: websocket",
            (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")),
        )
    if headers.get(b"sec-websocket-version") != b"13":
        raise Refusal(426, "WebSocket version 13 is needed", (("Sec-WebSocket-Version", "13"),))
    key = headers.get(b"sec-websocket-key", b"")
    try:
        right = len(base64.b64decode(key, validate=True)) == 16  # noqa: PLR2004 - RFC 6455 4.1
    except binascii.Error:
        right = False
    if not right:
        raise Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    subprotocol, token = _subprotocols(request.header(b"sec-websocket-protocol"))
    offers = request.header(b"sec-websocket-extensions") if may_deflate else None
    extension = None if offers is None else deflate.answer(offers)
    bearer = _bearer(request)
    return Upgrade(key, subprotocol, token if bearer is None else bearer, extension)


def _lists(headers: dict[bytes, bytes], name: bytes, token: bytes) -> bool:
    """Tell whether the comma-separated header ``name`` contains ``token`` in any case."""
    value = headers.get(name)
    if value is None:
        return False
    return value.lower() == token or token in [part.strip() for part in value.lower().split(b",")]


def _subprotocols(offered: str | None) -> tuple[str | None, str | None]:
    """Return what to select of the offered sub-protocols, and the token among them."""
    if offered is None:
        return None, None
    chosen = token = None
    for part in offered.split(","):
        name = part.strip(" \t")
        if not name:
            continue  # RFC 9110 5.6.1.2: empty elements do not count
        if not _TOKEN.fullmatch(name):
            raise Refusal(400, "Sec-WebSocket-Protocol is not a list of tokens")
        if name == SUBPROTOCOL:
            chosen = name
        elif token is None and name.startswith(BEARER_PREFIX):
            token = name.removeprefix(BEARER_PREFIX)
    return chosen, token


def _bearer(request: Request) -> str | None:
    value = request.header(b"authorization")
    if value is None:
        return None
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
