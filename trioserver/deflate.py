"""permessage-deflate (RFC 7692) without context takeover: negotiation, inflating, deflating.

Every message stands for itself in both directions. That costs some compression and buys what a
notification server needs: no 64 KiB of state per connection and direction, and *one* compression
of a notification for everybody who negotiated the extension, because the same bytes suit all.

Inflating is bounded by the message limit: zlib is told to stop one byte beyond it, so a bomb of
megabytes costs no more than the largest message that is allowed.

A client that insists on a smaller window for what we send (``server_max_window_bits`` below 15)
is served without compression: the shared bytes would not suit it.
"""

import zlib
from typing import Final

from trioserver import frames
from trioserver.errors import CloseReason

RSV1: Final = 0x40
"""Marks the first frame of a compressed message."""

ACCEPTED: Final = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"

MIN_BYTES: Final = 1 << 10
"""Smaller payloads fit into a packet as they are: compressing them saves nothing."""

_LEVEL: Final = 6
_RAW_WINDOW: Final = -15
_TAIL: Final = b"\x00\x00\xff\xff"
_FULL_WINDOW: Final = 15
_WINDOWS: Final = frozenset(map(str, range(8, _FULL_WINDOW + 1)))


def answer(offers: str) -> str | None:
    """Return the answer to the first offer of permessage-deflate that we can take, or None.

    Args:
        offers: The header ``Sec-WebSocket-Extensions``; what is malformed is not taken.
    """
    parts = offers.split(",")
    if any(part.count('"') % 2 for part in parts):
        # A comma inside quotes: no parameter we know has one.
        return None
    return next(filter(None, map(_answer, parts)), None)


def _answer(offer: str) -> str | None:
    name, *parameters = [part.strip(" \t") for part in offer.split(";")]
    if name != "permessage-deflate":
        return None
    seen: set[str] = set()
    for parameter in parameters:
        key, equals, value = (part.strip() for part in parameter.partition("="))
        value = value.removeprefix('"').removesuffix('"')
        if key in seen or not _fits(key, value if equals else None):
            return None
        seen.add(key)
    # RFC 7692 7.1.2.1: who asks for a window wants to see it in the answer.
    window = "; server_max_window_bits=15" if "server_max_window_bits" in seen else ""
    return ACCEPTED + window


def _fits(key: str, value: str | None) -> bool:
    match key:
        case "server_no_context_takeover" | "client_no_context_takeover":
            return value is None
        case "server_max_window_bits":
            return value == str(_FULL_WINDOW)
        case "client_max_window_bits":
            # It may use less than the full window, or says that it could be told to.
            return value is None or value in _WINDOWS
        case _:
            return False


def inflate(data: bytes, limit: int) -> bytes | CloseReason:
    """Return the message that was compressed to ``data``, or how the connection has to end.

    Args:
        data: The payload of all its frames.
        limit: Bytes it may have; 0 means no limit. Nothing beyond it is made.
    """
    inflater = zlib.decompressobj(_RAW_WINDOW)
    try:
        message = inflater.decompress(data + _TAIL, limit + 1 if limit else 0)
    except zlib.error:
        return CloseReason.PROTOCOL_ERROR
    return CloseReason.TOO_BIG if 0 < limit < len(message) else message


def deflate(payload: bytes) -> bytes:
    """Return ``payload`` compressed as one message."""
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW_WINDOW)
    packed = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return packed[: -len(_TAIL)]


class Compressor:
    """Compresses each frame once, however many connections it goes to. One per worker."""

    __slots__ = ("_packed", "_plain")

    def __init__(self) -> None:
        self._plain = b""
        self._packed = b""

    def of(self, frame: bytes) -> bytes:
        """Return the text frame ``frame`` compressed, or as it is if that would gain nothing.

        The latest one is remembered by identity: a fan-out offers the same object again and
        again.
        """
        if frame is not self._plain:
            self._plain = frame
            self._packed = self._pack(frame)
        return self._packed

    @staticmethod
    def _pack(frame: bytes) -> bytes:
        payload = frames.payload_of(frame)
        if len(payload) < MIN_BYTES:
            return frame
        packed = deflate(payload)
        if len(packed) >= len(payload):
            return frame
        return frames.encode(frames.TEXT | RSV1, packed)
