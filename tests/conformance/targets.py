"""What is fuzzed: three parsers of hostile bytes, and the rules their results must keep.

Each `Target` has two functions of one input. ``feed`` calls the product and nothing else: its time
and memory are measured. ``check`` feeds the same bytes in several ways and holds the results
against the rules; it raises `AssertionError`, or whatever undeclared exception the product let
escape.
"""

import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from tests.conformance.oracles import announced, difference, head_faults
from trioserver import handshake, messages, session
from trioserver.deflate import inflate
from trioserver.errors import ClientError, CloseReason
from trioserver.frames import BINARY, CLOSE, MAX_FRAGMENTS, PING, PONG, TEXT, Decoder, Event
from trioserver.handshake import Refusal
from trioserver.messages import BadPublish

CORPUS: Final = Path(__file__).parent / "corpus"


@attrs.frozen(kw_only=True)
class Target:
    """Something to fuzz."""

    name: str
    feed: Callable[[bytes], object]
    check: Callable[[bytes], None]
    outcome: Callable[[bytes], str]
    """What became of an input, in a few words: another outcome is something new."""
    max_bytes: int
    """Inputs that are longer say nothing new."""
    words: tuple[bytes, ...]
    """Bytes worth inserting."""

    @property
    def directory(self) -> Path:
        """Where its corpus is."""
        return CORPUS / self.name

    def corpus(self) -> Iterator[tuple[str, bytes]]:
        """Yield the committed inputs by name."""
        for path in sorted(self.directory.iterdir()):
            yield path.name, path.read_bytes()


def cut(data: bytes, step: int) -> list[bytes]:
    """Cut into pieces of ``step`` bytes."""
    return [data[i : i + step] for i in range(0, len(data), step)]


def torn(data: bytes) -> list[bytes]:
    """Cut at random places, always the same ones for the same data."""
    rng = random.Random(zlib.crc32(data))
    places = sorted(rng.randrange(len(data) + 1) for _ in range(5))
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


# Frames.

LIMITS: Final = ((100, 8), (16 << 10, MAX_FRAGMENTS))
"""Bytes and fragments of a message: so small that they are met, and as shipped."""

_HEADER: Final = 14
_CONTROL_FRAME: Final = 6 + 125

Stream = tuple[list[Event], CloseReason | None]


def retained(decoder: Decoder) -> int:
    """Return the bytes a decoder keeps of what is not complete."""
    return len(decoder._tail or b"") + sum(map(len, decoder._parts or ()))


def decode(
    pieces: list[bytes], limit: int, max_fragments: int, *, deflated: bool = False
) -> Stream:
    """Decode a stream; what is kept in between stays within its bound."""
    decoder = Decoder(limit, max_fragments, inflate if deflated else None)
    events: list[Event] = []
    for piece in pieces:
        events += decoder.receive(piece)
        assert retained(decoder) <= limit + _HEADER + _CONTROL_FRAME, "keeps too much"
        assert decoder.failure is not None or len(decoder._parts or ()) <= max_fragments
    if decoder.failure is not None:
        assert decoder.receive(b"\x81\x80\0\0\0\0") == [], "goes on after its end"
    return events, decoder.failure


def feed_frames(data: bytes) -> object:
    """Decode in one piece, and byte by byte as far as that is not the same thing over and over."""
    whole = decode([data], *LIMITS[1], deflated=True)
    return whole, decode([*cut(data[:2048], 1), data[2048:]], *LIMITS[1])


def check_frames(data: bytes) -> None:
    """Cuts change nothing, events are what they should be, wsproto agrees."""
    bytewise = [*cut(data[:2048], 1), data[2048:]]
    for (limit, max_fragments), deflated in itertools.product(LIMITS, (False, True)):
        stream = decode([data], limit, max_fragments, deflated=deflated)
        for pieces in (bytewise, torn(data)):
            again = decode(pieces, limit, max_fragments, deflated=deflated)
            assert stream == again, "cuts matter"
        _check_events(*stream, limit)
        if not deflated:
            _check_limits(*stream, announced(data), limit, max_fragments)
    for pieces in ([data], torn(data)):
        found = difference(pieces)
        assert found is None, found


def _check_limits(
    events: list[Event],
    failure: CloseReason | None,
    messages_announced: list[tuple[int, int]],
    limit: int,
    max_fragments: int,
) -> None:
    """Nothing is refused that is within the limits, and nothing else is let through."""
    beyond = [size > limit or count > max_fragments for size, count in messages_announced]
    if failure is CloseReason.TOO_BIG:
        taken = sum(opcode < CLOSE for opcode, _ in events)
        assert beyond[taken], f"message {taken} of {messages_announced}"
    elif failure in {None, CloseReason.PEER_CLOSED}:
        assert not any(beyond), messages_announced


def outcome_frames(data: bytes) -> str:
    """Return what came out, and how it ended."""
    events, failure = decode([data], *LIMITS[0], deflated=True)
    return f"{len(events)} {sorted({opcode for opcode, _ in events})} {failure}"


def _check_events(events: list[Event], failure: CloseReason | None, limit: int) -> None:
    for opcode, payload in events:
        assert opcode in {TEXT, BINARY, PING, PONG, CLOSE}
        assert len(payload) <= (125 if opcode >= CLOSE else limit)
        if opcode == TEXT:
            payload.decode()
    closes = [event for event in events if event[0] == CLOSE]
    assert closes == (events[-1:] if failure is CloseReason.PEER_CLOSED else [])
    assert failure in {
        None,
        CloseReason.PEER_CLOSED,
        CloseReason.PROTOCOL_ERROR,
        CloseReason.INVALID_UTF8,
        CloseReason.TOO_BIG,
    }


# Request heads.

Verdict = tuple[int, bytes, handshake.Upgrade | None]
_WAIT: Final[Verdict] = (0, b"", None)
_FIELD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [\x20-\x7e]*")
_FORM: Final = frozenset({400, 431})
_STATUSES: Final = _FORM | {405, 426}


def judge(buffer: bytes) -> Verdict:
    """Return status, answer and what was understood; 0 while the head is not complete."""
    try:
        end = handshake.head_end(buffer)
        if not end:
            return _WAIT
        request = handshake.parse(buffer[:end])
        upgrade = handshake.upgrade(request, may_deflate=True)
        request.parameters()
    except Refusal as refusal:
        return refusal.status, refusal.response(request_id="r"), None
    return 101, upgrade.response(), upgrade


def arrive(pieces: list[bytes]) -> Verdict:
    """Return the same for a head that arrives in pieces."""
    buffer = bytearray()
    for piece in pieces:
        known = len(buffer)
        buffer += piece
        try:
            complete = handshake.head_end(buffer, known) > 0
        except Refusal as refusal:
            return refusal.status, refusal.response(request_id="r"), None
        if complete:
            return judge(bytes(buffer))
    return _WAIT


def feed_handshake(data: bytes) -> object:
    """Judge the whole, and the same arriving byte by byte."""
    return judge(data), arrive([*cut(data[:2048], 1), data[2048:]])


def check_handshake(data: bytes) -> None:
    """Cuts change nothing, answers are well-formed, and what is accepted keeps every MUST."""
    status, answer, upgrade = judge(data)
    for pieces in (cut(data, 1), cut(data, 10), torn(data)):
        early, early_answer, _ = arrive(pieces)
        # Of two faults in the form another one may be met first; a fault never becomes none.
        same = (early, early_answer) == (status, answer) or {early, status} <= _FORM
        assert same, f"{early} in pieces, {status} as a whole"
    if not status:
        return
    head, blank, body = answer.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status)
    assert blank
    assert all(_FIELD.fullmatch(field) for field in fields), answer
    if upgrade is None:
        assert status in _STATUSES
        assert b"Content-Length: %d" % len(body) in fields
        assert status == json.loads(body)["status"]
        return
    assert body == b""
    assert (b"permessage-deflate" in answer) is (upgrade.extension is not None)
    assert upgrade.extension is None or b"permessage-deflate" in data
    assert upgrade.subprotocol in {None, handshake.SUBPROTOCOL}
    assert b"bearer" not in answer.lower(), "a token is echoed"
    found = head_faults(data[: handshake.head_end(data)])
    assert not found, found


def outcome_handshake(data: bytes) -> str:
    """Return the status and the reason."""
    status, answer, upgrade = judge(data)
    agreed = upgrade and (upgrade.subprotocol, upgrade.token is None, upgrade.extension)
    return f"{status} {answer.splitlines()[-1:]} {agreed}"


# Messages.

_TIMESTAMP: Final = "2026-01-02T03:04:05.678Z"
_OVERHEAD: Final = 400
"""Bytes of an answer beside what it repeats of the message."""

_MAX_PAYLOAD: Final = 10 << 10


def feed_messages(data: bytes) -> object:
    """Take the bytes as a client's message, if the codec would let them through, and as news."""
    actions: list[session.Action | None] = []
    if _is_utf8(data):
        for user in (None, "ann"):
            talk = session.Session(user)
            actions += [talk.receive(data, 1.0, _TIMESTAMP) for _ in range(2)]
    return actions, _notified(data), _wrapped(data)


def check_messages(data: bytes) -> None:
    """Only declared errors escape, and whatever is sent on is JSON that others can read."""
    if _is_utf8(data):
        _check_decode(data)
        for user in (None, "ann"):
            action = session.Session(user).receive(data, 1.0, _TIMESTAMP)
            assert action == session.Session(user).receive(data, 1.0, _TIMESTAMP)
            _check_action(action, user, data)
    sent = _notified(data)
    if sent is not None:
        told = _object(sent)
        assert told["type"] not in messages.RESERVED_TYPES, "speaks as the server"
        assert set(told) == {"type", "payload", "timestamp"}
        assert len(sent) <= len(data) + _OVERHEAD
    wrapped = _wrapped(data)
    assert wrapped is None or set(_object(wrapped)) == {"type", "payload"}


def outcome_messages(data: bytes) -> str:
    """Return what was understood, or what was wrong with it, without figures."""
    words = []
    for read in (messages.decode, lambda news: messages.publication(news, 0)):
        try:
            words.append(type(read(data)).__name__)
        except (ClientError, BadPublish) as error:
            words.append(re.sub(r"[0-9]+", "0", str(error)))
    return " / ".join(words)


def _check_decode(data: bytes) -> None:
    try:
        message: messages.ClientMessage | ClientError = messages.decode(data)
    except ClientError as error:
        message = error
    if isinstance(message, ClientError):
        assert message.code in {"bad_json", "unknown_type", "bad_message"}
    assert message.ref is None or len(message.ref) <= 64


def _check_action(action: session.Action | None, user: str | None, data: bytes) -> None:
    match action:
        case session.Send(answer) | session.Answer(answer):
            assert user is not None, "answers before there is a user"
        case session.SendError(answer, code):
            assert code == _object(answer)["code"]
        case session.Authenticate():
            assert user is None
            return
        case _:
            requests = session.Refresh | session.Acknowledge | session.MarkRead
            assert isinstance(action, requests)
            assert user is not None
            return
    assert _object(answer)["type"] in messages.RESERVED_TYPES
    # An escaped character of a ref may be as long as six bytes.
    assert len(answer) <= len(data) + 6 * 64 + _OVERHEAD


def _notified(data: bytes) -> bytes | None:
    try:
        return messages.notification(messages.publication(data, _MAX_PAYLOAD), _TIMESTAMP)
    except BadPublish:
        return None


def _wrapped(data: bytes) -> bytes | None:
    try:
        return messages.raw_publish("note", data)
    except BadPublish:
        return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _object(data: bytes) -> dict[str, object]:
    """Read JSON as strictly as the standard library can."""
    try:
        # Digits as text: Python refuses long integers, JavaScript does not.
        found = json.loads(data.decode(), parse_int=str, parse_float=str, parse_constant=_refuse)
    except RecursionError:
        # Deeper than this reader can go, which is no fault of the bytes.
        return {"type": "message_response", "payload": None, "timestamp": ""}
    assert isinstance(found, dict)
    return found


def _refuse(word: str) -> object:
    raise AssertionError(f"{word} is not JSON")


TARGETS: Final = {
    target.name: target
    for target in (
        Target(
            name="frames",
            feed=feed_frames,
            check=check_frames,
            outcome=outcome_frames,
            max_bytes=512,
            words=(
                *(bytes((first, 0x80)) for first in (0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88)),
                *(
                    b"\xc1\x80",
                    b"\x41\x80",
                    b"\x89\x80",
                    b"\x8a\x80",
                    b"\x81\xfe\x00\x7e",
                    b"\x81\xff",
                    b"\x88\x82\x03\xe8",
                ),
                *(b"\0\0\0\0", b"\xc3", b"\xa4", b"\xed\xa0\x80", b"\xf4\x8f\xbf\xbf"),
            ),
        ),
        Target(
            name="handshake",
            feed=feed_handshake,
            check=check_handshake,
            outcome=outcome_handshake,
            max_bytes=2048,
            words=(
                *(b"GET /ws HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n\r\n", b"Upgrade: websocket\r\n"),
                *(b"Connection: Upgrade\r\n", b"Sec-WebSocket-Version: 13\r\n", b"HTTP/1.0"),
                *(b"Sec-WebSocket-Protocol: ", b"trioserver.v1", b"bearer.", b"Content-Length: 0"),
                *(b"Sec-WebSocket-Extensions: permessage-deflate", b"; client_max_window_bits"),
                *(b"; server_max_window_bits=15", b"; server_no_context_takeover", b'="9"'),
                *(b"Transfer-Encoding: chunked\r\n", b"Authorization: Bearer ", b"\r\n ", b"\n"),
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            ),
        ),
        Target(
            name="messages",
            feed=feed_messages,
            check=check_messages,
            outcome=outcome_messages,
            max_bytes=1024,
            words=(
                *(b'{"type":"', b'"message"', b'"auth"', b'"ping"', b'"payload":', b'"ref":"'),
                *(b'"token":"', b"null", b"\\u0000", b"\\ud800", b"1e999", b"[[[[[[[[", b"]]]]]]"),
                *(b'"notification"', b'"goodbye"', b"NaN", b"-0", b'"a":', b"\\u00e4"),
            ),
        ),
    )
}
