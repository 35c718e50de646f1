"""The messages of wire protocol v1: one JSON object per text frame, told apart by ``type``.

``decode`` turns a client's text into a typed message, ``encode`` a server's message into JSON.
Decoding raises nothing but `ClientError`, whatever the bytes. Unknown fields are ignored, an
unknown ``type`` is an error: a newer client may say more to an older server, but must know when
it was not understood.

Parsing and validation are msgspec's; 0.1 µs for a usual message. Payloads stay `msgspec.Raw`:
their syntax is checked, their values are nobody's business here.
"""

import datetime as dt
import re
from typing import Annotated, Final

import msgspec

from trioserver.errors import ClientError
from trioserver.ledger import MAX_MARKED
from trioserver.topics import MAX_NAME, NAME_CHARACTERS

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

SessionId = Annotated[
    str,
    msgspec.Meta(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z"),
]
"""A UUID, as its canonical text in any case."""

Label = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[!-~]+\Z")]
"""What a client calls a chat connection in its path."""

MAX_MESSAGE_ID: Final = 64

MessageId = Annotated[
    str, msgspec.Meta(min_length=1, max_length=MAX_MESSAGE_ID, pattern=r"^[!-~]+\Z")
]
"""By which a client tells a message that it sends again from another one."""

TopicName = Annotated[
    str, msgspec.Meta(min_length=1, max_length=MAX_NAME, pattern=rf"^[{NAME_CHARACTERS}]+\Z")
]

MAX_KEY: Final = 64

Key = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY)]
"""What a notification is about: of those with one key only the newest matters."""

NotificationId = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9-]+\Z")]
Seq = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]

NULL: Final = msgspec.Raw(b"null")

MAX_DEPTH: Final = 512
"""Levels of a payload that a client publishes. It is read again by every worker, inside of more and
deeper in the stack, and must not turn out to be too deep there: Python's limit is about 1,000."""

RESERVED_TYPES: Final = frozenset(
    {
        # What the server says...
        *("connection_established", "gap", "update", "message_response", "heartbeat", "pong"),
        *("token_expiring", "token_refreshed", "subscribed", "unsubscribed", "presence"),
        *("error", "goodbye", "lagging"),
        # ... and what clients say: publishing any of these would let a publisher speak as us.
        *("auth", "refresh", "message", "ack", "read", "subscribe", "unsubscribe", "publish"),
        "ping",
    }
)

MAX_TYPE_LENGTH: Final = 64

MAX_CURSOR: Final = 512


class Auth(msgspec.Struct, frozen=True, gc=False, tag="auth"):
    """The first message of a client that brought no credential in its handshake."""

    token: str
    device: Device | None = None
    position: Annotated[str, msgspec.Meta(max_length=MAX_POSITION)] | None = None
    ack: bool = False
    client_type: ClientType | None = None
    ref: Ref | None = None
    batch: bool = False
    session_id: SessionId | None = None


class Refresh(msgspec.Struct, frozen=True, gc=False, tag="refresh"):
    """A new token for the same user, on the open connection."""

    token: str
    ref: Ref | None = None


class Message(msgspec.Struct, frozen=True, gc=False, tag="message"):
    """Counted and answered with `MessageResponse`."""

    payload: msgspec.Raw = NULL
    ref: Ref | None = None
    id: MessageId | None = None
    """On a chat session: what comes again with the same one is not counted again."""


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


class Subscribe(msgspec.Struct, frozen=True, gc=False, tag="subscribe"):
    """Send me what is published to this topic; answered with `Subscribed`."""

    topic: TopicName
    since: Annotated[str, msgspec.Meta(max_length=MAX_POSITION)] | None = None
    """Of a durable topic: the position where the client stopped, or ``start`` for all that is
    kept. Without one only what comes from now on."""
    ref: Ref | None = None


class Unsubscribe(msgspec.Struct, frozen=True, gc=False, tag="unsubscribe"):
    """No more of this topic; answered with `Unsubscribed`."""

    topic: TopicName
    ref: Ref | None = None


class Publish(msgspec.Struct, frozen=True, gc=False, tag="publish"):
    """Send this to all subscribers of a topic; answered with `Published` if there is a ref."""

    topic: TopicName
    payload: msgspec.Raw = NULL
    key: Key | None = None
    """See `Key`; for live topics only."""
    exclude_self: bool = False
    """Whether this connection does not get it."""
    ref: Ref | None = None


class AskPresence(msgspec.Struct, frozen=True, gc=False, tag="presence"):
    """Who is subscribed to this topic? Answered with `Presence`."""

    topic: TopicName
    after: Annotated[str, msgspec.Meta(max_length=MAX_CURSOR)] | None = None
    """Go on behind the page whose ``next`` this was."""
    ref: Ref | None = None


TopicMessage = Subscribe | Unsubscribe | Publish | AskPresence

ClientMessage = Auth | Refresh | Message | Ping | Ack | Read | TopicMessage


class ConnectionEstablished(
    msgspec.Struct,
    frozen=True,
    gc=False,
    omit_defaults=True,
    kw_only=True,
    tag="connection_established",
):
    """The first message on every connection."""

    connection_id: str
    label: str | None = None
    """What the client has called a chat connection in its path."""
    session_id: str | None = None
    """Of a chat session: come back with it."""
    user: str | None = None
    """Absent for who is anonymous."""
    resumed: bool
    count: int | None
    """Messages counted; null on a chat session that is not known yet."""
    heartbeat_seconds: float
    expires_in: int | None = None
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
    id: str | None = None
    repeated: bool = False
    """Whether it was counted before, and this is its count."""


class Subscribed(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="subscribed"):
    """The answer to `Subscribe`, and the first that is said of a topic joined by the token.

    What is published to the topic from now on comes behind it; of a durable topic also what was
    missed since `position`.
    """

    topic: str
    ref: str | None = None
    position: str | None = None
    """Of a durable topic: from where this connection is served."""
    resumed: bool = False
    """Whether a known place was continued."""
    reason: str | None = None
    """Why it was not, if it was asked for."""


class Unsubscribed(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="unsubscribed"):
    """The answer to `Unsubscribe`; or a new token does not allow this topic any more."""

    topic: str
    ref: str | None = None
    reason: str | None = None
    """``forbidden`` if nobody has asked for it."""


class Published(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="publish"):
    """The answer to `Publish`: Redis has it."""

    topic: str
    ref: str
    id: str | None = None
    """Of a durable topic, as all subscribers see it."""
    position: str | None = None


class Attendee(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One connection that is subscribed to a topic."""

    user: str
    since: str
    """RFC 3339: when it subscribed."""
    device: str | None = None
    client_type: str | None = None


class Presence(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="presence"):
    """The answer to `AskPresence`: a page of who is subscribed, by user."""

    topic: str
    connections: int
    users: int
    """How many different ones."""
    members: list[Attendee]
    next: str | None = None
    """Ask again with this as ``after`` for more; absent on the last page."""
    ref: str | None = None


class PresenceEvent(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="presence"):
    """A user has come to a topic or has left it, with all connections."""

    topic: str
    event: str
    """``join`` or ``leave``."""
    user: str
    users: int
    """How many are there now."""
    timestamp: str


class Lagging(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="lagging"):
    """What follows in this stream waits in the ledger until the client has read what it got."""

    position: str
    """Up to where it was sent."""
    topic: str | None = None
    stream: str | None = None
    """``all`` for the stream of everyone; neither for the user's own."""


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


class Gap(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True, tag="gap"):
    """Something was lost and cannot come."""

    from_seq: int | None = None
    to_seq: int | None = None
    """None for what has no numbers."""
    missing: int
    reason: str
    stream: str | None = None
    """``all`` if it is about the stream of everyone."""
    topic: str | None = None
    """If it is about a topic."""
    of_type: str | None = None
    """If it is about ephemeral notifications of this type to the user."""


class Update(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag="update"):
    """A notification was read on another device, or withdrawn, or has expired."""

    id: str
    state: str
    position: str
    unread: int | None = None
    stream: str | None = None
    topic: str | None = None


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
    topic: str | None = None
    sender: str | None = msgspec.field(name="from", default=None)
    """The user who published it to a topic; None if a back end did."""


class _Notification(msgspec.Struct, frozen=True, gc=False):
    """An ephemeral notification as clients see it. Its ``type`` is the publisher's word."""

    type: str
    payload: msgspec.Raw
    timestamp: str


class Topical(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A notification of a live topic as clients see it."""

    type: str
    topic: str
    payload: msgspec.Raw
    timestamp: str
    sender: str | None = msgspec.field(name="from", default=None)
    """The user who published it; None if a back end did."""
    key: str | None = None


class RawPublication(msgspec.Struct, frozen=True, gc=False):
    """What a back end may say in a raw ``PUBLISH``; every other field is lost on purpose.

    So nobody can forge an ``id`` or a ``seq``.
    """

    payload: msgspec.Raw
    type: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TYPE_LENGTH)] = "notification"
    key: Key | None = None


class _Lenient(msgspec.Struct, frozen=True, gc=False):
    """The two fields worth knowing about a message that could not be understood."""

    type: msgspec.Raw = NULL
    ref: Ref | None = None


_client_decoder: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_lenient_decoder = msgspec.json.Decoder(_Lenient)
_raw_decoder = msgspec.json.Decoder(msgspec.Raw)
_no_strings: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"').sub
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_published_decoder = msgspec.json.Decoder(RawPublication)
encode = msgspec.json.Encoder().encode
"""Return the JSON of any server message, as UTF-8 bytes."""

_known_types: Final = frozenset(
    {
        *("auth", "refresh", "message", "ping", "ack", "read"),
        *("subscribe", "unsubscribe", "publish", "presence"),
    }
)


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


def is_too_deep(payload: msgspec.Raw) -> bool:
    """Return whether a payload that a client publishes is nested more than `MAX_DEPTH` deep.

    Args:
        payload: JSON.
    """
    if len(payload) <= 2 * MAX_DEPTH:
        return False
    text = bytes(payload)
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for opens in map(b"[{".__contains__, _no_strings(b"", text).translate(None, _NO_BRACKETS)):
        depth += 1 if opens else -1
        if depth > MAX_DEPTH:
            return True
    return False


class BadPublish(Exception):  # noqa: N818 - a verdict
    """What arrived on a channel is not a notification. ``str()`` says why, without its bytes."""


def publication(data: bytes, max_payload: int) -> RawPublication:
    """Return what a raw ``PUBLISH`` says.

    Args:
        data: What the publisher sent: ``{"type": …, "payload": …}``.
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
    return published


def notification(published: RawPublication, timestamp: str) -> bytes:
    """Return the JSON that clients get for a raw ``PUBLISH`` to a user or to everyone.

    Args:
        published: What it says.
        timestamp: RFC 3339, when it reached this server.
    """
    return encode(_Notification(published.type, published.payload, timestamp))


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
