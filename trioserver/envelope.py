"""What the ledger publishes on a channel, and its reading. Pure.

    byte 0x01, then a letter, then a JSON array:

    n   [previous point, point, unread, id, type, payload, expires, traceparent or null, sender?]
    u   [previous point, point, unread, state, [ids], by]
    t   [connection id or "", user or "", type, key or null, payload, exclude: 0 or 1]
    p   [event, user, users]

The version byte is none that a raw publication could begin with, which is how the two are told
apart. The scripts write ``n`` and ``u`` (``trioserver/lua/lib.lua``) and, on the channels of
topics, ``p`` (who comes and goes); workers write ``t``, for what clients publish to live topics.
Nobody else writes envelopes.
"""

from typing import Final, TypeAlias

import msgspec

from trioserver import position
from trioserver.messages import NULL, BadPublish

VERSION: Final = b"\x01"
_NOTICE: Final = b"\x01n"
_CHANGE: Final = b"\x01u"
_SAID: Final = b"\x01t"
_CAME: Final = b"\x01p"


class Notice(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A notification that was just accepted."""

    previous: str
    """Point of the entry before it."""
    point: str
    unread: int
    """The user's, with this one."""
    id: str
    type: str
    payload: msgspec.Raw
    expires: int
    """Milliseconds since 1970."""
    traceparent: str | None = None
    sender: str | None = None
    """The user who published it to a topic; None if a back end did."""


class Change(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Notifications that were read, cancelled, or have expired."""

    previous: str
    point: str
    unread: int
    state: str
    ids: list[str]
    by: str = ""
    """The connection that asked for it; it knows already."""


class Said(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What a client has published to a live topic. Nothing of it is kept."""

    connection: str
    """Id of the client's connection; empty if none is to be known."""
    user: str
    """Who it is; empty if nobody is to be known."""
    type: str
    key: str | None
    payload: msgspec.Raw
    exclude: int = 0
    """1 if that connection does not get it."""


class Came(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A user has come to a topic or has left it, with all connections."""

    event: str
    """``join`` or ``leave``."""
    user: str
    users: int
    """How many are there now."""


Entry: TypeAlias = Notice | Change
"""What has a place in a stream."""

Envelope: TypeAlias = Entry | Said | Came

_decode_notice = msgspec.json.Decoder(Notice).decode
_decode_change = msgspec.json.Decoder(Change).decode
_decode_said = msgspec.json.Decoder(Said).decode
_decode_came = msgspec.json.Decoder(Came).decode
_encode = msgspec.json.Encoder().encode


def said(
    payload: bytes,
    *,
    type: str,  # noqa: A002 - the word of the protocol
    connection: str = "",
    user: str = "",
    key: str | None = None,
    exclude: bool = False,
) -> bytes:
    """Return the envelope of what a client publishes to a live topic.

    Args:
        payload: JSON.
        type: What kind of thing it is.
        connection: Id of the client's connection.
        user: Who it is.
        key: What it is about, if it has told.
        exclude: Whether its connection is not to get it.
    """
    return _SAID + _encode(
        Said(connection, user, type, key, msgspec.Raw(payload), 1 if exclude else 0)
    )


def decode(data: bytes) -> Envelope:
    """Return what an envelope says.

    Raises:
        BadPublish: It is none that this version understands.
    """
    entry = _decode(data)
    if isinstance(entry, Said | Came):
        return entry
    try:
        position.order(entry.point)
    except ValueError:
        raise BadPublish("an envelope with a point that is none") from None
    return entry


def _decode(data: bytes) -> Envelope:
    kind = data[:2]
    try:
        if kind == _NOTICE:
            if not data.isascii():
                # msgspec skips over a raw payload without looking at its characters.
                data.decode()
            return _decode_notice(memoryview(data)[2:])
        if kind == _CHANGE:
            return _decode_change(memoryview(data)[2:])
        if kind == _SAID:
            if not data.isascii():
                data.decode()
            return _decode_said(memoryview(data)[2:])
        if kind == _CAME:
            return _decode_came(memoryview(data)[2:])
    except UnicodeDecodeError:
        return _without_payload(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadPublish(f"envelope: {error}") from None
    raise BadPublish("an envelope of a version that is not known here")


def _without_payload(data: bytes) -> Notice | Said:
    """Return what has a payload that is not UTF-8: such a frame would make clients hang up."""
    decode_one = _decode_notice if data[:2] == _NOTICE else _decode_said
    try:
        one: Notice | Said = decode_one(data[2:].decode(errors="replace"))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadPublish(f"envelope: {error}") from None
    return msgspec.structs.replace(one, payload=NULL)
