"""Fetching a JWKS: one bounded GET, and the task that keeps a `jwks.Keyring` fresh.

HTTP is h11's, TLS and sockets are Trio's; between them there is little to do for one GET of one
document. What is refused is more: redirects (the setting says where the keys are, nobody else),
any status but 200, encodings that have to be inflated, more bytes than a key set has. One deadline
is for everything, from the name lookup to the last byte, so dripping does not help.

Certificates are checked against the system's authorities, or those in ``SSL_CERT_FILE``. Plain
``http`` is for loopback and for meshes that do their own TLS: whoever can change the answer on its
way can make tokens (`Target.is_plain`, to warn).
"""

import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn
from urllib.parse import urlsplit

import attrs
import h11
import trio

from trioserver import __version__
from trioserver.errors import SettingsError, TrioserverError
from trioserver.jwks import MAX_DOCUMENT, Keyring, KeySetError, key_set

SETTING: Final = "JWT_JWKS_URL"
EXAMPLE: Final = "https://login.example.com/.well-known/jwks.json"

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


@attrs.frozen(kw_only=True)
class Target:
    """Where a document is."""

    host: str
    port: int
    is_plain: bool
    """Whether it is ``http``."""
    path: str
    """With the query."""
    authority: str
    """For the ``Host`` header."""

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Return what a URL says.

        Raises:
            SettingsError: It is no URL for a JWKS.
        """
        try:
            # Printable ASCII: urlsplit() leaves out line ends, and others are not for the wire.
            if not re.fullmatch(r"[!-~]+", url):
                raise ValueError("has characters that no URL has")  # noqa: TRY301 - one table
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise SettingsError(SETTING, str(error), EXAMPLE) from None
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
            raise SettingsError(SETTING, "is no URL with https:// (or http://)", EXAMPLE)
        if "@" in parts.netloc or parts.fragment:
            raise SettingsError(SETTING, "has a user name or a fragment", EXAMPLE)
        plain = parts.scheme == "http"
        return cls(
            host=parts.hostname,
            port=port or (80 if plain else 443),
            is_plain=plain,
            path=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
            authority=parts.netloc,
        )


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

    Its clock is Trio's: whoever asks the keyring passes ``trio.current_time()``.

    Args:
        keyring: Whose keys they are.
        get: Returns the document or raises `FetchError`.
        report: Called after every fetch with what went wrong, or None. Must not raise.
    """
    wanted = trio.Event()

    def want() -> None:
        wanted.set()

    keyring.on_wanted = want
    while True:
        while trio.current_time() < keyring.due_at:
            wanted = trio.Event()
            with trio.move_on_at(keyring.due_at):
                await wanted.wait()
        keyring.began(trio.current_time())
        try:
            keys = key_set(await get(), keyring.algorithms)
        except (FetchError, KeySetError) as problem:
            keyring.failed(trio.current_time())
            report(str(problem))
        else:
            keyring.succeeded(keys, trio.current_time())
            report("; ".join(keys.skipped) or None)
