"""The WebSocket frame codec (RFC 6455 section 5), server side: bytes in, events out.

Theory of operation
    A `Decoder` is fed whatever the socket gave and returns the complete *messages* and control
    frames in it, in order. It knows neither sockets nor time. After a Close frame or a protocol
    error nothing more is processed: `Decoder.failure` says which error, and what arrived before
    it has still been returned.

    Nearly every frame a notification server receives is one complete, unfragmented, short text
    frame. That case takes a short path through `Decoder.receive`: one header check, one unmask,
    no state touched. Everything else (long lengths, fragments, control frames) goes through
    `Decoder._frame`.

    What a client announces is judged on the header, before its payload is buffered: a frame that
    would pass the message limit fails at once. The bytes kept for an incomplete frame are
    therefore at most the limit plus one read of the socket.

    Fragments are counted, empty ones too, because each costs work while adding no bytes. Text is
    checked as UTF-8 fragment by fragment, so that garbage fails when it arrives, not at the end.

Compressed messages (where permessage-deflate was negotiated) take the long path. They are bounded
    twice: as they come by what was announced, and inflated by the same limit.

What must change together
    `Decoder` and `tests/trioserver/test_frames.py`, which holds it against the `websockets`
    Sans-I/O protocol.
"""

import codecs
from collections.abc import Callable
from typing import Final

from trioserver.errors import CloseReason


def unmask_slowly(data: bytes, mask: bytes) -> bytes:
    """XOR ``data`` with the repeated four bytes of ``mask``, by integer arithmetic."""
    size = len(data)
    key = int.from_bytes((mask * ((size + 3) >> 2))[:size], "little")
    return (int.from_bytes(data, "little") ^ key).to_bytes(size, "little")


unmask: Callable[[bytes, bytes], bytes]
try:
    # A C loop; 0.7 µs per short message cheaper.
    from websockets.speedups import apply_mask as unmask
except ImportError:  # pragma: no cover - builds without the extension
    unmask = unmask_slowly


CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

Event = tuple[int, bytes]
"""An opcode and its payload: TEXT (valid UTF-8), BINARY, PING, PONG or CLOSE."""

MAX_FRAGMENTS: Final = 128
"""Frames of one message. ``websockets`` allows 4,096; nobody needs more than 128 for 16 KiB."""

INFLATED_MESSAGES: Final = 8
"""How many messages of the largest size one read may inflate to. Each is bounded by itself, but
hundreds of bombs fit into one read."""

_FIN_TEXT: Final = 0x81
_MASKED: Final = 0x80
_SHORT_MASKED_END: Final = 0x80 | 126
_MAX_CONTROL: Final = 125
_MAX_REASON: Final = _MAX_CONTROL - 2
_TWO_BYTES: Final = 126
_EIGHT_BYTES: Final = 127

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Decoder:
    """Turns the bytes of one client into messages and control frames.

    Args:
        limit: Bytes of payload a message may have; 0 means no limit.
        max_fragments: Frames a message may consist of, empty ones included.
        inflate: Takes a compressed message and the limit, and returns it inflated, or why not.
            None where compression was not negotiated.
    """

    __slots__ = (
        "_compressed",
        "_count",
        "_inflate",
        "_inflated",
        "_limit",
        "_max_fragments",
        "_needed",
        "_opcode",
        "_parts",
        "_size",
        "_tail",
        "_utf8",
        "failure",
    )

    def __init__(
        self,
        limit: int,
        max_fragments: int = MAX_FRAGMENTS,
        inflate: "Callable[[bytes, int], bytes | CloseReason] | None" = None,
    ) -> None:
        self.failure: CloseReason | None = None
        """Why decoding has stopped for good; ``CloseReason.PEER_CLOSED`` after a Close frame."""
        self._limit = limit
        self._max_fragments = max_fragments
        self._inflate = inflate
        self._inflated = 0
        """Bytes that the present read has become."""
        self._compressed = False
        """Whether the message being assembled is compressed."""
        self._tail: bytearray | None = None
        """The beginning of a frame whose end has not arrived."""
        self._needed = 0
        """Length that ``_tail`` must reach before it is worth another look."""
        self._opcode = 0
        """Opcode of the message being assembled; 0 when none is."""
        self._parts: list[bytes] | None = None
        self._size = 0
        self._count = 0
        self._utf8: codecs.IncrementalDecoder | None = None

    @property
    def incomplete(self) -> bool:
        """Whether a frame or a fragmented message has begun and not ended."""
        return self._tail is not None or self._opcode != 0

    def receive(self, data: bytes) -> list[Event]:
        """Return what is complete now; see `failure` afterwards.

        ``data`` may be cut anywhere. Never raises.
        """
        events: list[Event] = []
        if self.failure is not None:
            return events
        self._inflated = 0
        tail = self._tail
        if tail is not None:
            tail += data
            if len(tail) < self._needed:
                return events
            data = bytes(tail)
            self._tail = None
        position = 0
        end = len(data)
        while end - position >= 2:  # noqa: PLR2004 - the shortest header
            second = data[position + 1]
            if (
                data[position] == _FIN_TEXT
                and _MASKED <= second < _SHORT_MASKED_END
                and not self._opcode
            ):
                # The short path. 125 bytes are under any sensible limit, but it may be set so.
                start = position + 6
                stop = start + second - _MASKED
                if stop > end or 0 < self._limit < second - _MASKED:
                    stop = self._frame(data, position, end, events)
                else:
                    payload = unmask(data[start:stop], data[start - 4 : start])
                    if not payload.isascii() and not _is_utf8(payload):
                        self.failure = CloseReason.INVALID_UTF8
                        return events
                    events.append((TEXT, payload))
            else:
                stop = self._frame(data, position, end, events)
            if stop == position or self.failure is not None:
                break
            position = stop
        else:
            self._needed = 2
        if position < end and self.failure is None:
            self._tail = bytearray(data[position:])
        return events

    def _frame(self, data: bytes, position: int, end: int, events: list[Event]) -> int:
        """Handle the frame at ``position``; return where the next begins.

        Returns ``position`` itself when the frame is incomplete (and sets ``_needed``) or when
        it failed on its header (and sets ``failure``).
        """
        first = data[position]
        second = data[position + 1]
        length = second & 0x7F
        header = 6
        if length == _TWO_BYTES:
            header = 8
        elif length == _EIGHT_BYTES:
            header = 14
        # First two bytes are enough to refuse these; waiting for more would be a favour.
        fault = self._header_fault(first, second)
        if fault is None and header > 6:  # noqa: PLR2004
            wide = header - 6
            if end - position < 2 + wide:
                self._needed = 2 + wide
                return position
            announced = int.from_bytes(data[position + 2 : position + 2 + wide], "big")
            if announced < (126 if wide == 2 else 1 << 16) or announced >> 63:  # noqa: PLR2004
                fault = CloseReason.PROTOCOL_ERROR
            length = announced
        if fault is None and first & 0x0F < CLOSE and 0 < self._limit < self._size + length:
            fault = CloseReason.TOO_BIG
        if fault is not None:
            self.failure = fault
            return position
        start = position + header
        stop = start + length
        if stop > end:
            self._needed = header + length
            return position
        payload = unmask(data[start:stop], data[start - 4 : start]) if length else b""
        if first & 0x0F >= CLOSE:
            self._control(first & 0x0F, payload, events)
        else:
            self._data(first, payload, events)
        return stop

    def _header_fault(self, first: int, second: int) -> CloseReason | None:
        """Judge the first two bytes of a frame."""
        opcode = first & 0x0F
        bad = (
            not second & _MASKED  # RFC 6455 5.1: a client must mask
            or (first & 0x70 and not self._may_be_compressed(first))  # reserved bits
            or opcode not in {CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG}
        )
        if not bad and opcode >= CLOSE:
            bad = not first & 0x80 or second & 0x7F > _MAX_CONTROL
        elif not bad:
            # A continuation needs a message to continue; a new message must wait for its end.
            bad = (opcode == CONTINUATION) == (self._opcode == 0)
        return CloseReason.PROTOCOL_ERROR if bad else None

    def _may_be_compressed(self, first: int) -> bool:
        """Whether the reserved bits are RSV1 alone, on the first frame of a message."""
        return self._inflate is not None and first & 0x7C == 0x40 and first & 0x03 != 0  # noqa: PLR2004

    def _control(self, opcode: int, payload: bytes, events: list[Event]) -> None:
        if opcode == CLOSE:
            self.failure = _close_fault(payload)
            if self.failure is not CloseReason.PEER_CLOSED:
                return
        events.append((opcode, payload))

    def _data(self, first: int, payload: bytes, events: list[Event]) -> None:
        """Take one data frame: a whole message, or a fragment of one."""
        final = bool(first & 0x80)
        opcode = first & 0x0F
        if opcode and final:
            self._whole(opcode, payload, events, compressed=bool(first & 0x40), checked=False)
            return
        if opcode:
            self._opcode = opcode
            self._parts = []
            self._compressed = bool(first & 0x40)
            self._utf8 = _utf8_decoder() if opcode == TEXT and not self._compressed else None
        self._count += 1
        if self._count > self._max_fragments:
            self.failure = CloseReason.TOO_BIG
            return
        if self._utf8 is not None:
            try:
                self._utf8.decode(payload, final)
            except UnicodeDecodeError:
                self.failure = CloseReason.INVALID_UTF8
                return
        parts = self._parts
        assert parts is not None  # noqa: S101 - for the type checker: a message is open
        if payload:
            parts.append(payload)
            self._size += len(payload)
        if final:
            opcode = self._opcode
            self._opcode = self._size = self._count = 0
            self._parts = self._utf8 = None
            self._whole(opcode, b"".join(parts), events, compressed=self._compressed, checked=True)

    def _whole(
        self, opcode: int, payload: bytes, events: list[Event], *, compressed: bool, checked: bool
    ) -> None:
        """Take a message that is complete; ``checked`` if its characters are known to be right."""
        if compressed and self._inflate is not None:
            inflated = self._inflate(payload, self._limit)
            if isinstance(inflated, CloseReason):
                self.failure = inflated
                return
            payload, checked = inflated, False
            self._inflated += len(payload)
            if 0 < self._limit * INFLATED_MESSAGES < self._inflated:
                self.failure = CloseReason.TOO_BIG
                return
        if opcode == TEXT and not checked and not _is_utf8(payload):
            self.failure = CloseReason.INVALID_UTF8
        else:
            events.append((opcode, payload))


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _close_fault(payload: bytes) -> CloseReason:
    """Judge the payload of a Close frame; ``PEER_CLOSED`` if it is right."""
    if not payload:
        return CloseReason.PEER_CLOSED
    if len(payload) == 1 or not is_valid_close_code(int.from_bytes(payload[:2], "big")):
        return CloseReason.PROTOCOL_ERROR
    return CloseReason.PEER_CLOSED if _is_utf8(payload[2:]) else CloseReason.INVALID_UTF8


def is_valid_close_code(code: int) -> bool:
    """Tell whether ``code`` may stand in a Close frame on the wire (RFC 6455 7.4, IANA)."""
    if code < 3000:  # noqa: PLR2004 - below: defined by the RFC or IANA, or not at all
        return 1000 <= code <= 1014 and code not in {1004, 1005, 1006}  # noqa: PLR2004
    return code < 5000  # noqa: PLR2004


def encode(opcode: int, payload: bytes) -> bytes:
    """Return one unmasked, final frame."""
    size = len(payload)
    if size < _TWO_BYTES:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, _TWO_BYTES)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, _EIGHT_BYTES)) + size.to_bytes(8, "big") + payload


def payload_of(frame: bytes) -> bytes:
    """Return the payload of one whole unmasked frame, as `encode` makes it."""
    length = frame[1]
    return frame[2 if length < _TWO_BYTES else 4 if length == _TWO_BYTES else 10 :]


def encode_text(payload: bytes) -> bytes:
    """Return one text frame; the caller vouches that ``payload`` is UTF-8."""
    size = len(payload)
    if size < _TWO_BYTES:
        return bytes((_FIN_TEXT, size)) + payload
    return encode(TEXT, payload)


def join_texts(run: list[bytes]) -> list[bytes]:
    """Return whole frames with text frames that follow each other as one: an array of JSON.

    Args:
        run: Frames as `encode_text` makes them, of JSON, and others, which stay as they are.
    """
    joined: list[bytes] = []
    texts: list[bytes] = []
    for frame in run:
        if frame[0] == _FIN_TEXT:
            texts.append(frame)
            continue
        joined.extend(_array(texts))
        joined.append(frame)
        texts = []
    joined.extend(_array(texts))
    return joined


def _array(texts: list[bytes]) -> list[bytes]:
    if len(texts) <= 1:
        return texts
    return [encode_text(b"[%b]" % b",".join([payload_of(frame) for frame in texts]))]


def encode_close(code: int, reason: str = "") -> bytes:
    """Return a Close frame; the reason is cut to the 123 bytes that fit."""
    text = reason.encode()[:_MAX_REASON]
    # The cut may have gone through a character.
    return encode(CLOSE, code.to_bytes(2, "big") + text.decode(errors="ignore").encode())
