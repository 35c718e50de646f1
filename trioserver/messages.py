"""The messages of wire protocol v1: one JSON object per text frame, told apart by ``type``.

``decode`` turns a client's text into a typed message, ``encode`` a server's message into JSON.
Decoding raises nothing but `ClientError`, whatever the bytes. Unknown fields are ignored, an
unknown ``type`` is an error: a newer client may say more to an older server, but must know when
it was not understood.

Parsing and validation are msgspec's; 0.1 µs for a usual message. Payloads stay `msgspec.Raw`:
their syntax is checked, their values are nobody's business here.
"""

import datetime as dt
from typing import Annotated, Final

import msgspec

from trioserver.errors import ClientError
from trioserver.ledger import MAX_MARKED

Ref = Annotated[str, msgspec.Meta(max_length=64)]

MAX_DEVICE: Final = 64
MAX_POSITION: Final = 256

Device = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_DEVICE, pattern=r"^[!-~]+\Z")]
"""What a client calls itself, always the same on one device: visible ASCII without spaces."""

MAX_CLIENT_TYPE: Final = 32

ClientType = Annotated[
    str, msgspec.Meta(min_length=1, max_length=MAX_CLIENT_TYPE, pattern=r"^[A-Za-z0-9._-]+\Z")
]
"""What kind of client it is, in its own words; for operators and presence."""

NotificationId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9-]+\Z")]
Seq = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]

NULL: Final = msgspec.Raw(b"null")

RESERVED_TYPES: Final = frozenset(
    {
        # What the server says...
        *("connection_established", "gap", "update", "message_response", "heartbeat", "pong"),
        *("token_expiring", "token_refreshed", "subscribed", "unsubscribed", "presence"),
        *("error", "goodbye"),
        # ... and what clients say: publishing any of these would let a publisher speak as us.
        *("auth", "refresh", "message", "ack", "read", "subscribe", "unsubscribe", "publish"),
        "ping",
    }
)

MAX_TYPE_LENGTH: Final = 64


class Auth(msgspec.Struct, frozen=True, gc=False, tag="auth"):
    """The first message of a client that brought no credential in its handshake."""

    token: str
    device: Device | None = None
    position: Annotated[str, msgspec.Meta(max_length=MAX_POSITION)] | None = None
    ack: bool = False
    client_type: ClientType | None = None
    ref: Ref | None = None


class Refresh(msgspec.Struct, frozen=True, gc=False, tag="refresh"):
    """A new token for the same user, on the open connection."""

    token: str
    ref: Ref | None = None


class Message(msgspec.Struct, frozen=True, gc=False, tag="message"):
    """Counted and answered with `MessageResponse`."""

    payload: msgspec.Raw = NULL
    ref: Ref | None = None


class Ping(msgspec.Struct, frozen=True, gc=False, tag="ping"):
    """Answered with `Pong`; for clients that cannot see WebSocket pings."""

    ref: Ref | None = None


class Ack(msgspec.Struct, frozen=True, gc=False, tag="ack"):
    """All notifications up to this one have been handled."""

    seq: Seq | None = None
    id: NotificationId | None = None
    ref: Ref | None = None


class Read(msgspec.Struct, frozen=True, gc=False, tag="read"):
    """These were read on this device, or all up to one."""

    ids: Annotated[list[NotificationId], msgspec.Meta(max_length=MAX_MARKED)] = []
    up_to: Seq | NotificationId | None = None
    ref: Ref | None = None


ClientMessage = Auth | Refresh | Message | Ping | Ack | Read


class ConnectionEstablished(
    msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="connection_established"
):
    """The first message on every connection."""

    connection_id: str
    user: str
    resumed: bool
    count: int
    heartbeat_seconds: float
    expires_in: int
    """Seconds until the token expires."""
    server_time: str
    position: str | None = None
    """The point from which this connection is served: before what it has missed."""
    reason: str | None = None


class TokenExpiring(msgspec.Struct, frozen=True, gc=False, tag="token_expiring"):
    """The token is about to expire: `Refresh` it, or be closed some time after."""

    expires_in: int
    """Seconds until the token expires."""


class TokenRefreshed(
    msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="token_refreshed"
):
    """The answer to `Refresh`."""

    expires_in: int
    ref: str | None = None


class MessageResponse(
    msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="message_response"
):
    """The answer to `Message`."""

    count: int
    payload: msgspec.Raw
    timestamp: str
    ref: str | None = None


class Pong(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="pong"):
    """The answer to `Ping`."""

    ref: str | None = None


class Acked(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="ack"):
    """The answer to an `Ack` with a ``ref``."""

    seq: int
    """All up to here has been acknowledged on this device."""
    ref: str


class Marked(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="read"):
    """The answer to a `Read` with a ``ref``."""

    unread: int
    ref: str


class Gap(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="gap"):
    """Something was lost and cannot come."""

    from_seq: int
    to_seq: int
    missing: int
    reason: str
    stream: str | None = None
    """``all`` if it is about the stream of everyone."""


class Update(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="update"):
    """A notification was read on another device, or withdrawn, or has expired."""

    id: str
    state: str
    position: str
    unread: int | None = None
    stream: str | None = None


class Heartbeat(msgspec.Struct, frozen=True, gc=False, tag="heartbeat"):
    """A sign of life that clients can see, every ``HEARTBEAT_INTERVAL``."""

    ts: str


class Error(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="error"):
    """One request failed; the connection lives."""

    code: str
    message: str
    retry_after_ms: int | None = None
    ref: str | None = None


class Goodbye(msgspec.Struct, frozen=True, gc=False, tag="goodbye"):
    """Before every close by the server."""

    reason: str
    reconnect: bool
    reconnect_in_ms: int


class Durable(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A notification from the ledger as clients see it. Its ``type`` is the publisher's word."""

    type: str
    id: str
    seq: int
    payload: msgspec.Raw
    timestamp: str
    position: str
    attempt: int
    unread: int | None = None
    """The user's, now; absent for what goes to everyone."""
    stream: str | None = None
    traceparent: str | None = None


class _Notification(msgspec.Struct, frozen=True, gc=False):
    """An ephemeral notification as clients see it. Its ``type`` is the publisher's word."""

    type: str
    payload: msgspec.Raw
    timestamp: str


class _Published(msgspec.Struct, frozen=True, gc=False):
    """What a back end may say in a raw ``PUBLISH``; every other field is lost on purpose.

    So nobody can forge an ``id`` or a ``seq``.
    """

    payload: msgspec.Raw
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TYPE_LENGTH)] = "notification"


class _Lenient(msgspec.Struct, frozen=True, gc=False):
    """The two fields worth knowing about a message that could not be understood."""

    type: msgspec.Raw = NULL
    ref: Ref | None = None


_client_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_lenient_decoder = msgspec.json.Decoder(_Lenient)
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)
_published_decoder = msgspec.json.Decoder(_Published)
encode = msgspec.json.Encoder().encode
"""Return the JSON of any server message, as UTF-8 bytes."""

_known_types: Final = frozenset({"auth", "refresh", "message", "ping", "ack", "read"})


def decode(text: bytes) -> ClientMessage:
    """Return the message a client sent.

    Args:
        text: The payload of a text frame; valid UTF-8.

    Raises:
        ClientError: ``bad_json`` if it is no JSON object, ``unknown_type`` or ``bad_message``.
    """
    try:
        return _client_decoder.decode(text)
    except RecursionError:
        raise ClientError("bad_json", "the message is nested too deeply") from None
    except UnicodeDecodeError:
        raise ClientError("bad_json", "the message is not UTF-8") from None
    except msgspec.ValidationError as error:
        problem = str(error)
    except msgspec.DecodeError:
        raise ClientError("bad_json", "the message is not JSON") from None
    raise _diagnose(text, problem)


def _diagnose(text: bytes, problem: str) -> ClientError:
    """Say what is wrong with JSON that is no message of ours; off the hot path."""
    if text.lstrip()[:1] != b"{":
        return ClientError("bad_json", "a message is a JSON object")
    try:
        lenient = _lenient_decoder.decode(text)
        name = msgspec.json.decode(lenient.type)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return ClientError("bad_message", problem)
    if isinstance(name, str) and name not in _known_types:
        return ClientError("unknown_type", "this type is not known to the server", lenient.ref)
    return ClientError("bad_message", problem, lenient.ref)


def checked(payload: bytes) -> msgspec.Raw:
    """Return a stored payload as it may go into a frame; null if it is no JSON.

    The ledger takes what any publisher gives to its script, and a frame that is not UTF-8 would
    make every client hang up.
    """
    try:
        if not payload.isascii():
            payload.decode()
        return _raw_decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return NULL


class BadPublish(Exception):  # noqa: N818 - a verdict
    """What arrived on a channel is not a notification. ``str()`` says why, without its bytes."""


def notification_from_raw(data: bytes, timestamp: str, max_payload: int) -> bytes:
    """Return the JSON that clients get for a raw ``PUBLISH``.

    Args:
        data: What the publisher sent: ``{"type": …, "payload": …}``.
        timestamp: RFC 3339, when it reached this server.
        max_payload: Bytes the payload may have; 0 means no limit.

    Raises:
        BadPublish: Not JSON, no payload, a reserved type, or too big.
    """
    try:
        if not data.isascii():
            # msgspec skips over a raw payload without looking at its characters, and a frame
            # that is not UTF-8 would make every client hang up.
            data.decode()
        published = _published_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadPublish(str(error)) from None
    if published.type in RESERVED_TYPES:
        raise BadPublish(f"the type {published.type} is reserved")
    payload = published.payload
    if 0 < max_payload < len(memoryview(payload)):
        raise BadPublish(f"the payload is larger than {max_payload} bytes")
    return encode(_Notification(published.type, payload, timestamp))


def raw_publish(kind: str, payload: bytes) -> bytes:
    """Return what a raw ``PUBLISH`` must carry for a notification of this type.

    Raises:
        BadPublish: The payload is not JSON.
    """
    try:
        msgspec.json.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadPublish(f"the payload is not JSON: {error}") from None
    return encode({"type": kind, "payload": msgspec.Raw(payload)})


def rfc3339(milliseconds: int) -> str:
    """Return a moment as RFC 3339 UTC with milliseconds.

    Args:
        milliseconds: Since 1970.
    """
    seconds, rest = divmod(milliseconds, 1000)
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"
