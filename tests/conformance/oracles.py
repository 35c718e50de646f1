"""Judges that are not ours: what independent readers make of the same bytes.

`difference` holds the decoder against wsproto. `head_faults` reads an accepted request head again,
in the plainest way, against the MUSTs of RFC 6455 4.2.1.
"""

import base64
import binascii
from typing import Final

from wsproto.connection import SERVER, Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate

from trioserver.deflate import ACCEPTED
from trioserver.errors import CloseReason
from trioserver.frames import BINARY, CLOSE, PING, PONG, TEXT, Decoder, Event

DIFFERENCES: Final = {
    "limits": "wsproto bounds neither messages nor fragments; they are compared without limits",
    "assembly": "wsproto hands out parts of messages; they are put together here",
    "early 1002": "we judge a frame by its first two bytes; wsproto waits for mask and payload",
    "early 1007": "wsproto reads text within an unfinished frame; we read it frame by frame",
    "1014": "Bad Gateway is registered with IANA since 2016; wsproto does not know it",
}
"""Where we and wsproto may differ; all of it is made up for in `difference`."""

CODES: Final = {
    None: None,
    CloseReason.PEER_CLOSED: None,
    CloseReason.PROTOCOL_ERROR: 1002,
    CloseReason.INVALID_UTF8: 1007,
    CloseReason.TOO_BIG: 1009,
}

UNBOUNDED: Final = 1 << 62
_PADDING: Final = bytes(64)
_BAD_GATEWAY: Final = b"\x03\xf6"
_UNKNOWN_CODE: Final = "CLOSE with unknown reserved code"
_PATIENCE: Final = 1 << 20
"""Bytes we add at most to complete a frame; one that announces more stays unfinished."""


def _agreed() -> PerMessageDeflate:
    extension = PerMessageDeflate()
    extension.accept(ACCEPTED)
    return extension


class WsprotoReader:
    """wsproto as a reader of the same kind as `Decoder`."""

    def __init__(self, *, deflated: bool = False) -> None:
        self.events: list[Event] = []
        self.code: int | None = None
        """The close code with which it failed, if it did."""
        self.why = ""
        self._connection = Connection(SERVER, [_agreed()] if deflated else [])
        self._text = ""
        self._binary = b""

    def receive(self, data: bytes) -> None:
        """Read on, unless it has ended."""
        if self.code is not None or self._connection.state is not ConnectionState.OPEN:
            return
        self._connection.receive_data(data)
        for event in self._connection.events():
            match event:
                case TextMessage():
                    self._text += event.data
                    if event.message_finished:
                        self.events.append((TEXT, self._text.encode()))
                        self._text = ""
                case BytesMessage():
                    self._binary += event.data
                    if event.message_finished:
                        self.events.append((BINARY, self._binary))
                        self._binary = b""
                case Ping():
                    self.events.append((PING, bytes(event.payload)))
                case Pong():
                    self.events.append((PONG, bytes(event.payload)))
                case CloseConnection():
                    self._closed(event)

    def _closed(self, event: CloseConnection) -> None:
        if self._connection.state is ConnectionState.OPEN:
            # Its own verdict, not the client's word.
            self.code = int(event.code)
            self.why = event.reason or ""
            return
        reason = (event.reason or "").encode()
        payload = b"" if event.code == 1005 else int(event.code).to_bytes(2, "big") + reason
        self.events.append((CLOSE, payload))


def difference(pieces: list[bytes]) -> str | None:
    """Return where we and wsproto differ about a stream beyond `DIFFERENCES`, or None."""
    ours, theirs = Decoder(0, UNBOUNDED), WsprotoReader()
    events: list[Event] = []
    for piece in pieces:
        events += ours.receive(piece)
        theirs.receive(piece)
    if ours.failure is CloseReason.PROTOCOL_ERROR and theirs.code is None:
        theirs.receive(_PADDING)
    elif theirs.code == 1007 and ours.failure is None:
        missing = ours._needed - len(ours._tail or b"")
        if missing > _PATIENCE:
            return None if events == theirs.events else f"events: {events} != {theirs.events}"
        # The mask key may be missing too; then theirs would not have failed.
        events += ours.receive(bytes(missing))
    code = CODES[ours.failure]
    if theirs.why == _UNKNOWN_CODE and _took_bad_gateway(ours, events):
        code = 1002
        events = [event for event in events if event[0] != CLOSE]
    if (code, events) == (theirs.code, theirs.events):
        return None
    return f"({code}, {events}) != ({theirs.code}, {theirs.events})"


def _took_bad_gateway(ours: Decoder, events: list[Event]) -> bool:
    """Tell whether we accepted a Close with 1014, or looked at the reason behind it."""
    if ours.failure is CloseReason.PEER_CLOSED:
        return events[-1][1].startswith(_BAD_GATEWAY)
    return ours.failure is CloseReason.INVALID_UTF8


def announced(data: bytes) -> list[tuple[int, int]]:
    """Return how many bytes each message announces, and of how many frames all bytes are there.

    Walks from header to header and believes every one; ends behind a Close frame.
    """
    messages: list[tuple[int, int]] = []
    while len(data) >= 2:
        opcode, length = data[0] & 0x0F, data[1] & 0x7F
        start = 2
        if length >= 126:
            start += 2 if length == 126 else 8
            if len(data) < start:
                break
            length = int.from_bytes(data[2:start], "big")
        if opcode < CLOSE:
            size, count = messages.pop() if opcode == 0 and messages else (0, 0)
            messages.append((size + length, count + (len(data) >= start + 4 + length)))
        if opcode == CLOSE:
            break
        data = data[start + 4 + length :]
    return messages


def head_faults(head: bytes) -> list[str]:
    """Return which MUSTs of RFC 6455 4.2.1 (and 9112 for the form) a request head breaks."""
    if not head.endswith(b"\r\n\r\n"):
        return ["no end"]
    # RFC 9112 2.2: empty lines before the request line may be ignored.
    first, *lines = head.removesuffix(b"\r\n\r\n").lstrip(b"\r\n").split(b"\r\n")
    # RFC 9112 3: a reader may split the line at runs of spaces.
    words = [word for word in first.split(b" ") if word]
    faults: list[str] = []
    if len(words) != 3 or words[0] != b"GET" or words[2] != b"HTTP/1.1" or words[1][:1] != b"/":
        faults.append("request line")
    if b"\n" in head.replace(b"\r\n", b"") or b"\r" in head.replace(b"\r\n", b"") or b"\0" in head:
        faults.append("control characters")
    fields: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip() or line[:1] in b" \t":
            faults.append("header line")
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    tokens = {
        name: {part.strip(b" \t").lower() for part in b",".join(fields.get(name, [])).split(b",")}
        for name in (b"upgrade", b"connection")
    }
    rules = {
        "host": len(fields.get(b"host", [])) == 1 and fields[b"host"] != [b""],
        "upgrade": b"websocket" in tokens[b"upgrade"],
        "connection": b"upgrade" in tokens[b"connection"],
        "version": fields.get(b"sec-websocket-version") == [b"13"],
        "key": _is_key(fields.get(b"sec-websocket-key", [])),
        "body": fields.get(b"content-length", [b"0"]) == [b"0"]
        and b"transfer-encoding" not in fields,
    }
    return faults + [rule for rule, kept in rules.items() if not kept]


def _is_key(values: list[bytes]) -> bool:
    if len(values) != 1 or len(values[0]) != 24:
        return False
    try:
        return len(base64.b64decode(values[0], validate=True)) == 16
    except binascii.Error:
        return False
