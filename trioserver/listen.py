"""``trioserver listen``: a client for the terminal; shows what a user would get.

It comes back by itself: at once after a first loss, then with full jitter up to `PAUSE_CAP`
seconds, or when the server's goodbye asks for. It goes on from the last position that it saw, so
what was published meanwhile arrives, once. A close code that says "do not come back unchanged" (a
refused token, say) ends it. Where it can make tokens itself, it shows a new one each time, and when
the server says that the present one expires.

The WebSocket is trio-websocket's: an independent implementation on the other end.
"""

import random
import ssl
from collections.abc import Callable
from typing import Final
from urllib.parse import urlencode

import attrs
import msgspec
import trio
import trio_websocket

from trioserver.errors import CloseReason, CommandError

PAUSE_FIRST: Final = 0.5
PAUSE_CAP: Final = 20.0
CONNECT_SECONDS: Final = 10.0
STABLE_SECONDS: Final = 5.0
"""A connection that lasted so long was a success: the next loss starts from `PAUSE_FIRST`."""

_FINAL: Final = {
    reason.code: reason
    for reason in CloseReason
    if not reason.reconnect and reason is not CloseReason.PEER_CLOSED
}
"""Close codes after which coming back unchanged would change nothing."""

_FINAL_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 426, 431})


class _Seen(msgspec.Struct, gc=False):
    """What matters here of a message; everything else is only shown."""

    type: str = ""
    id: str = ""
    position: str = ""
    topic: str = ""
    reconnect_in_ms: int = 0


class _Problem(msgspec.Struct, gc=False):
    """A refusal before the upgrade."""

    detail: str


@attrs.define(eq=False, kw_only=True)
class Listening:
    """What is asked for, and how far we are; lives through all connections."""

    url: str
    """Of the server, such as ``ws://127.0.0.1:8081/ws``."""
    token: str
    """Sent as a header, so that it is in no log of addresses."""
    device: str = ""
    """The name under which the server remembers what has arrived; empty for none."""
    position: str = ""
    """From where to go on; empty leaves it to the server."""
    ack: bool = False
    """Acknowledge each notification that was shown; those that were not come again."""
    renew: Callable[[], str] | None = None
    """Makes another token of the same user; None if there is but the one."""
    topics: dict[str, str] = attrs.field(factory=dict)
    """Those that are wanted, and the newest position in each; empty while there is none."""

    def address(self) -> str:
        """Return the URL to connect to now."""
        asked = {"device": self.device, "position": self.position, "ack": "1" if self.ack else ""}
        query = urlencode({name: value for name, value in asked.items() if value})
        return f"{self.url}{'&' if '?' in self.url else '?'}{query}" if query else self.url

    def credential(self) -> str:
        """Return the token to show now."""
        if self.renew is not None:
            self.token = self.renew()
        return self.token

    def shown(self, text: str | bytes) -> tuple[list[bytes], float | None]:
        """Take note of a message that was shown.

        Returns:
            What to answer, a message each; and the seconds after which to come back, if the
            message is a goodbye.
        """
        try:
            seen = msgspec.json.decode(text, type=_Seen)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return [], None
        if seen.type == "token_expiring" and self.renew is not None:
            return [msgspec.json.encode({"type": "refresh", "token": self.credential()})], None
        if seen.type == "goodbye":
            return [], seen.reconnect_in_ms / 1000
        if seen.topic:
            if seen.position and seen.topic in self.topics:
                self.topics[seen.topic] = seen.position
            return [], None
        self.position = seen.position or self.position
        return self._answers(seen), None

    def _answers(self, seen: _Seen) -> list[bytes]:
        if seen.type == "connection_established":
            return [_subscribe(name, since) for name, since in self.topics.items()]
        # Only a notification has both; nobody acknowledges an update.
        if not (self.ack and seen.id and seen.position) or seen.type == "update":
            return []
        return [msgspec.json.encode({"type": "ack", "id": seen.id})]


async def listen(
    listening: Listening,
    show: Callable[[str], None],
    note: Callable[[str], None],
    tls: ssl.SSLContext | None = None,
) -> None:
    """Show every message until cancelled.

    Args:
        listening: Where, as whom, and from where on.
        show: Called with each message as it came.
        note: Called with what a person should know: connected, lost, coming back.
        tls: For ``wss``; the default trusts the system's authorities.

    Raises:
        CommandError: The server has refused for good; coming back would change nothing.
    """
    attempts = 0
    while True:
        began = trio.current_time()
        pause = await _once(listening, show, note, tls)
        if trio.current_time() - began > STABLE_SECONDS:
            attempts = 0
        if pause is None:
            pause = random.uniform(0, min(PAUSE_CAP, PAUSE_FIRST * 2.0**attempts))  # noqa: S311
        attempts = min(attempts + 1, 16)
        note(f"coming back in {pause:.1f} s")
        await trio.sleep(pause)


async def _once(
    listening: Listening,
    show: Callable[[str], None],
    note: Callable[[str], None],
    tls: ssl.SSLContext | None,
) -> float | None:
    """Live through one connection; return the pause the server asked for, if it did."""
    url = listening.url
    asked: float | None = None
    try:
        async with trio_websocket.open_websocket_url(
            listening.address(),
            tls,
            extra_headers=[(b"Authorization", b"Bearer " + listening.credential().encode())],
            connect_timeout=CONNECT_SECONDS,
            disconnect_timeout=1,
            message_queue_size=256,
        ) as connection:
            note(f"connected to {url}")
            while True:
                text = await connection.get_message()
                show(text if isinstance(text, str) else repr(text))
                answers, asked = listening.shown(text)
                for answer in answers:
                    await connection.send_message(answer.decode())
    except BrokenPipeError:
        # Whoever reads our output has gone; the command line knows what that means.
        raise
    except trio_websocket.ConnectionClosed as closed:
        code = closed.reason.code if closed.reason else CloseReason.PEER_LOST.code
        if code in _FINAL:
            raise CommandError(f"the server closed with {code}: {_FINAL[code].text}") from None
        note(f"connection lost ({code})")
        return asked
    except trio_websocket.ConnectionRejected as rejected:
        if rejected.status_code in _FINAL_STATUSES:
            what = "token" if rejected.status_code in {401, 403} else "address"
            problem = f"{url} refused with HTTP {rejected.status_code}: check the {what}"
            raise CommandError(problem + _detail(rejected.body)) from None
        note(f"{url} refused with HTTP {rejected.status_code}")
    except (OSError, trio_websocket.HandshakeError) as error:
        note(f"cannot connect to {url}: {_root(error)}")
    return None


def _subscribe(topic: str, since: str) -> bytes:
    """Return the request for a topic, from where it was left if that is known."""
    request = {"type": "subscribe", "topic": topic}
    return msgspec.json.encode(request | {"since": since} if since else request)


def _detail(body: bytes | None) -> str:
    """Return what the server has said about its refusal, if it did."""
    try:
        return f" ({msgspec.json.decode(body or b'', type=_Problem).detail})"
    except msgspec.MsgspecError:
        return ""


def _root(error: BaseException) -> str:
    """Return what lies under the wrappings, such as "Connection refused"."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, BaseExceptionGroup):
        return _root(error.exceptions[0])
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
