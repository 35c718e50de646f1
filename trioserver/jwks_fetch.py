"""Fetching a JWKS: one bounded GET, and the loop that keeps a `jwks.Keyring` fresh.

HTTP is h11's, TLS and sockets are Trio's; between them there is little to do for one GET of one
document. What is refused is more: redirects (the setting says where the keys are, nobody else),
any status but 200, encodings that have to be inflated, more bytes than a key set has. One deadline
is for everything, from the name lookup to the last byte, so dripping does not help.

Certificates are checked against the system's authorities, or those in ``SSL_CERT_FILE``.
"""

import ssl
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import h11
import trio

from trioserver import __version__
from trioserver.errors import TrioserverError
from trioserver.jwks import MAX_DOCUMENT, Keyring, KeySetError, key_set
from trioserver.jwks_url import Target

FETCH_SECONDS: Final = 5.0
"""For all of it. A login server that takes longer is in trouble, and the known keys stay good."""

_READ: Final = 16 << 10
_OVERHEAD: Final = 64 << 10
"""Bytes beside the document: heads, chunk sizes."""
_OK: Final = 200
_INTERIM: Final = 8
"""Answers before the answer."""


class FetchError(TrioserverError):
    """The document could not be had; the text says why, on one line."""


async def fetch(
    target: Target, *, seconds: float = FETCH_SECONDS, context: ssl.SSLContext | None = None
) -> bytes:
    """Return the document.

    Args:
        target: Where it is.
        seconds: For everything.
        context: Whom to trust; by default the system's authorities, at least TLS 1.2.

    Raises:
        FetchError: There is none to be had.

    Cancellation:
        Closes the connection.
    """
    try:
        with trio.fail_after(seconds):
            stream = await _connected(target, context)
            try:
                return await _get(stream, target)
            finally:
                await trio.aclose_forcefully(stream)
    except trio.TooSlowError:
        raise FetchError(f"no whole answer within {seconds:g} s") from None
    except trio.BrokenResourceError as error:
        raise FetchError(f"the connection broke: {error.__cause__ or error}") from None
    except h11.RemoteProtocolError as error:
        raise FetchError(f"the answer is not HTTP: {error}") from None
    except OSError as error:
        raise FetchError(f"cannot connect: {error}") from None


async def _connected(target: Target, context: ssl.SSLContext | None) -> trio.abc.Stream:
    stream = await trio.open_tcp_stream(target.host, target.port)
    if target.is_plain:
        return stream
    secured = trio.SSLStream(
        stream,
        context or ssl.create_default_context(),
        server_hostname=target.host,
        https_compatible=True,
    )
    try:
        await secured.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(secured)
        raise
    return secured


async def _get(stream: trio.abc.Stream, target: Target) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(
        method="GET",
        target=target.path,
        headers=[
            ("Host", target.authority),
            ("Accept", "application/jwk-set+json, application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", f"trioserver/{__version__}"),
            ("Connection", "close"),
        ],
    )
    await stream.send_all(connection.send(request) or b"")
    await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
    document = bytearray()
    interim = 0
    room = MAX_DOCUMENT + _OVERHEAD
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(_READ)
            room -= len(data)
            if room < 0:
                raise FetchError(f"the answer is longer than {MAX_DOCUMENT} bytes")
            connection.receive_data(bytes(data))
        elif isinstance(event, h11.Response):
            _check(event)
        elif isinstance(event, h11.Data):
            document += event.data
        elif isinstance(event, h11.EndOfMessage):
            return bytes(document)
        else:
            # A 1xx, which says nothing yet.
            interim += 1
            if interim > _INTERIM:
                raise FetchError("there is no end of interim answers")


def _check(response: h11.Response) -> None:
    """Refuse what will not become a document."""
    if response.status_code != _OK:
        raise FetchError(f"the answer is {response.status_code}, not 200")
    headers = dict(response.headers)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise FetchError("the answer is compressed")
    length = headers.get(b"content-length", b"0")
    if int(length) > MAX_DOCUMENT:
        raise FetchError(f"the answer is longer than {MAX_DOCUMENT} bytes")


async def keep_fresh(
    keyring: Keyring,
    get: Callable[[], Awaitable[bytes]],
    report: Callable[[str | None], None],
) -> NoReturn:
    """Fetch whenever the keyring wants it, one fetch at a time, until cancelled.

    Args:
        keyring: Whose keys they are.
        get: Returns the document or raises `FetchError`.
        report: Called after every fetch with what went wrong, or None. Must not raise.
    """
    clock = keyring.clock
    wanted = trio.Event()

    def want() -> None:
        wanted.set()

    keyring.on_wanted = want
    while True:
        while (delay := keyring.due_at - clock()) > 0:
            wanted = trio.Event()
            with trio.move_on_after(delay):
                await wanted.wait()
        await fetch_once(keyring, get, report)


async def fetch_once(
    keyring: Keyring,
    get: Callable[[], Awaitable[bytes]],
    report: Callable[[str | None], None],
) -> None:
    """Fetch once and tell the keyring. For the arguments see `keep_fresh`."""
    keyring.began(keyring.clock())
    try:
        keys = key_set(await get(), keyring.algorithms)
    except (FetchError, KeySetError) as problem:
        keyring.failed(keyring.clock())
        report(str(problem))
    else:
        keyring.succeeded(keys, keyring.clock())
        report("; ".join(keys.skipped) or None)
