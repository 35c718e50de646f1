"""What the ledger publishes on a channel, and its reading. Pure.

    byte 0x01, then a letter, then a JSON array:

    n   [previous point, point, unread, id, type, payload, expires, traceparent or null]
    u   [previous point, point, unread, state, [ids], by]

The version byte is none that a raw publication could begin with, which is how the two are told
apart. The scripts write envelopes (``trioserver/lua/lib.lua``); nobody else does.
"""

from typing import Final

import msgspec

from trioserver import position
from trioserver.messages import NULL, BadPublish

VERSION: Final = b"\x01"
_NOTICE: Final = b"\x01n"
_CHANGE: Final = b"\x01u"


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


class Change(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Notifications that were read, cancelled, or have expired."""

    previous: str
    point: str
    unread: int
    state: str
    ids: list[str]
    by: str = ""
    """The connection that asked for it; it knows already."""


Entry = Notice | Change

_decode_notice = msgspec.json.Decoder(Notice).decode
_decode_change = msgspec.json.Decoder(Change).decode


def decode(data: bytes) -> Entry:
    """Return what an envelope says.

    Raises:
        BadPublish: It is none that this version understands.
    """
    try:
        entry = _decode(data)
        position.order(entry.point)
    except ValueError:
        raise BadPublish("an envelope with a point that is none") from None
    return entry


def _decode(data: bytes) -> Entry:
    kind = data[:2]
    try:
        if kind == _NOTICE:
            if not data.isascii():
                # msgspec skips over a raw payload without looking at its characters.
                data.decode()
            return _decode_notice(memoryview(data)[2:])
        if kind == _CHANGE:
            return _decode_change(memoryview(data)[2:])
    except UnicodeDecodeError:
        return _without_payload(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadPublish(f"envelope: {error}") from None
    raise BadPublish("an envelope of a version that is not known here")


def _without_payload(data: bytes) -> Notice:
    """Return a notice whose payload is not UTF-8: such a frame would make clients hang up."""
    try:
        notice = _decode_notice(data[2:].decode(errors="replace"))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadPublish(f"envelope: {error}") from None
    return msgspec.structs.replace(notice, payload=NULL)
