"""The frame codec: tables, random streams, and the `websockets` protocol as oracle."""

import codecs
import itertools
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from tests.trioserver.wire import BINARY, CLOSE, PING, PONG, TEXT, close, frame, split_frames
from trioserver import frames
from trioserver.errors import CloseReason
from trioserver.frames import Decoder, Event

LIMIT = 1000

OK = None
CLOSED = CloseReason.PEER_CLOSED
FAULT = CloseReason.PROTOCOL_ERROR
BIG = CloseReason.TOO_BIG
GARBLED = CloseReason.INVALID_UTF8

EURO = "€".encode()

CASES: dict[str, tuple[bytes, list[Event], CloseReason | None]] = {
    "nothing": (b"", [], OK),
    "empty text": (frame(TEXT), [(TEXT, b"")], OK),
    "short text": (frame(TEXT, b"hi"), [(TEXT, b"hi")], OK),
    "125 bytes": (frame(TEXT, b"x" * 125), [(TEXT, b"x" * 125)], OK),
    "126 bytes": (frame(TEXT, b"x" * 126), [(TEXT, b"x" * 126)], OK),
    "at the limit": (frame(TEXT, b"x" * LIMIT), [(TEXT, b"x" * LIMIT)], OK),
    "past the limit": (frame(TEXT, b"x" * (LIMIT + 1)), [], BIG),
    "binary": (frame(BINARY, b"\xff"), [(BINARY, b"\xff")], OK),
    "ping, pong": (frame(PING, b"a") + frame(PONG, b"b"), [(PING, b"a"), (PONG, b"b")], OK),
    "ping of 125": (frame(PING, b"x" * 125), [(PING, b"x" * 125)], OK),
    "ping of 126": (frame(PING, b"x" * 126), [], FAULT),
    "ping in fragments": (frame(PING, b"x", fin=False), [], FAULT),
    "two texts": (frame(TEXT, b"a") + frame(TEXT, b"b"), [(TEXT, b"a"), (TEXT, b"b")], OK),
    "fragments": (
        frame(TEXT, b"a", fin=False) + frame(0, b"b", fin=False) + frame(0, b"c"),
        [(TEXT, b"abc")],
        OK,
    ),
    "binary fragments": (
        frame(BINARY, b"\xff", fin=False) + frame(0, b"\xfe"),
        [(BINARY, b"\xff\xfe")],
        OK,
    ),
    "ping between fragments": (
        frame(TEXT, b"a", fin=False) + frame(PING, b"p") + frame(0, b"b"),
        [(PING, b"p"), (TEXT, b"ab")],
        OK,
    ),
    "text between fragments": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [], FAULT),
    "binary between fragments": (frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), [], FAULT),
    "continuation of nothing": (frame(0, b"a"), [], FAULT),
    "continuation after the end": (
        frame(TEXT, b"a", fin=False) + frame(0, b"b") + frame(0, b"c"),
        [(TEXT, b"ab")],
        FAULT,
    ),
    "fragments past the limit": (
        frame(TEXT, b"a" * 600, fin=False) + frame(0, b"a" * 401, fin=False),
        [],
        BIG,
    ),
    "128 fragments": (
        frame(TEXT, b"", fin=False) + frame(0, b"", fin=False) * 126 + frame(0, b"x"),
        [(TEXT, b"x")],
        OK,
    ),
    "129 fragments": (frame(TEXT, b"", fin=False) + frame(0, b"", fin=False) * 128, [], BIG),
    "character across fragments": (
        frame(TEXT, EURO[:1], fin=False) + frame(0, EURO[1:]),
        [(TEXT, EURO)],
        OK,
    ),
    "half a character at the end": (frame(TEXT, EURO[:1], fin=False) + frame(0), [], GARBLED),
    "garbage in an unfinished fragment": (
        frame(TEXT, b"a", fin=False) + frame(0, b"\xff", fin=False),
        [],
        GARBLED,
    ),
    "garbage in a short text": (frame(TEXT, b"\xff"), [], GARBLED),
    "garbage in a long text": (frame(TEXT, b"x" * 200 + b"\xff"), [], GARBLED),
    "a surrogate": (frame(TEXT, b"\xed\xa0\x80"), [], GARBLED),
    "overlong": (frame(TEXT, b"\xc0\xaf"), [], GARBLED),
    "past the last character": (frame(TEXT, b"\xf4\x90\x80\x80"), [], GARBLED),
    "unmasked": (b"\x81\x01x", [], FAULT),
    "unmasked, header only": (b"\x81\x01", [], FAULT),
    "rsv1": (frame(TEXT, b"x", rsv=4), [], FAULT),
    "rsv2": (frame(TEXT, b"x", rsv=2), [], FAULT),
    "rsv3 on a ping": (frame(PING, b"x", rsv=1), [], FAULT),
    "126 not minimal": (b"\x81\xfe\x00\x7d", [], FAULT),
    "127 not minimal": (b"\x81\xff" + (0xFFFF).to_bytes(8, "big"), [], FAULT),
    "2**63": (b"\x81\xff" + (1 << 63).to_bytes(8, "big"), [], FAULT),
    "2**63 - 1": (b"\x82\xff" + ((1 << 63) - 1).to_bytes(8, "big"), [], BIG),
    "2**32": (b"\x81\xff" + (1 << 32).to_bytes(8, "big"), [], BIG),
    "empty close": (frame(CLOSE), [(CLOSE, b"")], CLOSED),
    "close with reason": (close(1000, b"bye"), [(CLOSE, b"\x03\xe8bye")], CLOSED),
    "close with 123": (close(1000, b"x" * 123), [(CLOSE, b"\x03\xe8" + b"x" * 123)], CLOSED),
    "close of one byte": (frame(CLOSE, b"x"), [], FAULT),
    "close, reason garbled": (close(1000, b"\xff"), [], GARBLED),
    "close in fragments": (
        frame(TEXT, b"a", fin=False) + close(1000),
        [(CLOSE, b"\x03\xe8")],
        CLOSED,
    ),
    "text after close": (close(1000) + frame(TEXT, b"x"), [(CLOSE, b"\x03\xe8")], CLOSED),
    "two closes": (close(1000) + close(1001), [(CLOSE, b"\x03\xe8")], CLOSED),
    "text after a fault": (frame(3) + frame(TEXT, b"x"), [], FAULT),
    "text before a fault": (frame(TEXT, b"x") + frame(3), [(TEXT, b"x")], FAULT),
    **{f"opcode {op}": (frame(op), [], FAULT) for op in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
}


def feed(decoder: Decoder, pieces: list[bytes]) -> list[Event]:
    """Return all events of these pieces."""
    events: list[Event] = []
    for piece in pieces:
        events += decoder.receive(piece)
    return events


@pytest.mark.parametrize("step", [1 << 20, 1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES)
def test_frames_give_their_events_however_they_are_cut(case: str, step: int) -> None:
    """Each row gives the same events and verdict in one piece and in small ones."""
    data, events, failure = CASES[case]
    decoder = Decoder(LIMIT)
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert (events, failure) == (feed(decoder, pieces), decoder.failure)
    assert [] == decoder.receive(frame(TEXT, b"more") if failure else b"")


def test_close_codes_are_judged_one_by_one() -> None:
    """Of 0 to 4999 those pass that the RFC, IANA or the private range allow, and 5000+ fail."""
    right = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
    passed = set()
    for code in [*range(5010), 65535]:
        decoder = Decoder(LIMIT)
        events = decoder.receive(close(code, b"x"))
        assert decoder.failure is (CLOSED if events else FAULT)
        if events:
            passed.add(code)
    assert right == passed
    assert right == {code for code in range(5010) if frames.is_valid_close_code(code)}


@pytest.mark.parametrize(
    ("header", "failure"),
    [
        (b"\x81\xfe" + struct.pack("!H", LIMIT + 1), BIG),
        (b"\x82\xff" + struct.pack("!Q", 1 << 20), BIG),
        (b"\x81\xff" + struct.pack("!Q", 1 << 63), FAULT),
        (b"\x81\xfe" + struct.pack("!H", 125), FAULT),
        (b"\x89\xfe", FAULT),
        (b"\x01\x00", FAULT),
    ],
)
def test_a_frame_is_judged_on_its_header(header: bytes, failure: CloseReason) -> None:
    """The last byte of the length is enough; neither mask nor payload is waited for."""
    whole = Decoder(LIMIT)
    whole.receive(header)
    assert failure is whole.failure
    dribbled = Decoder(LIMIT)
    feed(dribbled, [bytes((byte,)) for byte in header])
    assert failure is dribbled.failure


def test_a_small_limit_holds_for_short_frames_and_none_means_none() -> None:
    """The short path knows the limit too; zero is no limit."""
    strict, free = Decoder(3), Decoder(0)
    assert [(TEXT, b"abc")] == strict.receive(frame(TEXT, b"abc") + frame(TEXT, b"abcd"))
    assert BIG is strict.failure
    assert 1 << 17 == len(free.receive(frame(BINARY, bytes(1 << 17)))[0][1])


def test_incomplete_tells_whether_something_has_begun() -> None:
    """A frame or a message that has begun is incomplete, whole ones are not."""
    decoder = Decoder(LIMIT)
    for data, incomplete in (
        (b"", False),
        (b"\x81", True),
        (frame(TEXT, b"abc")[1:], False),
        (frame(TEXT, b"a", fin=False), True),
        (frame(PING), True),
        (frame(0, b"b"), False),
    ):
        decoder.receive(data)
        assert incomplete is decoder.incomplete


def test_what_is_kept_of_an_incomplete_frame_is_bounded() -> None:
    """A frame in one-byte pieces keeps one buffer of its own size."""
    decoder = Decoder(LIMIT)
    data = frame(TEXT, b"x" * LIMIT)
    for i in range(len(data) - 1):
        assert [] == decoder.receive(data[i : i + 1])
        assert decoder._tail is not None
        assert len(decoder._tail) <= LIMIT + 14
    assert [(TEXT, b"x" * LIMIT)] == decoder.receive(data[-1:])


# Random streams.

payloads = st.one_of(
    st.text(max_size=40).map(str.encode), st.integers(120, 130).map(lambda n: b"x" * n)
)
masks = st.binary(min_size=4, max_size=4)


@st.composite
def fragmented(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """A message in fragments with control frames between them."""
    payload = draw(payloads)
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=4)))
    parts = [payload[a:b] for a, b in itertools.pairwise([0, *cuts, len(payload)])]
    data, events = b"", list[Event]()
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        data += frame(0 if i else TEXT, part, fin=last, mask=draw(masks))
        if not last and draw(st.booleans()):
            data += frame(PING, b"p", mask=draw(masks))
            events.append((PING, b"p"))
    return data, [*events, (TEXT, payload)]


@st.composite
def single(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """One unfragmented frame."""
    opcode = draw(st.sampled_from([TEXT, BINARY, PING, PONG]))
    payload = draw(payloads)[: 125 if opcode >= PING else None]
    if opcode == TEXT:
        payload = payload.decode(errors="ignore").encode()
    return frame(opcode, payload, mask=draw(masks)), [(opcode, payload)]


streams = st.lists(st.one_of(single(), fragmented()), max_size=8)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut ``data`` at places given modulo its length."""
    where = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in itertools.pairwise([0, *where, len(data)])]


@given(streams, st.lists(st.integers(0, 1 << 16), max_size=12))
def test_random_streams_cut_at_random_places(
    stream: list[tuple[bytes, list[Event]]], places: list[int]
) -> None:
    """What was put in comes out, in order, wherever the bytes are cut."""
    decoder = Decoder(0)
    data = b"".join(one for one, _ in stream)
    expected = [event for _, events in stream for event in events]
    assert expected == feed(decoder, cut(data, places))
    assert decoder.failure is None
    assert not decoder.incomplete


nearly_frames = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.builds(
            frame,
            st.integers(0, 15),
            st.binary(max_size=130),
            fin=st.booleans(),
            rsv=st.sampled_from([0, 0, 0, 0, 1, 4]),
        ),
        single().map(lambda pair: pair[0]),
    ),
    max_size=6,
).map(b"".join)


@given(nearly_frames, st.lists(st.integers(0, 1 << 16), max_size=8))
def test_random_bytes_never_raise_and_cuts_do_not_matter(data: bytes, places: list[int]) -> None:
    """Hostile bytes give the same events and the same verdict in one piece and in many."""
    whole, pieces = Decoder(100), Decoder(100)
    assert whole.receive(data) == feed(pieces, cut(data, places))
    assert whole.failure is pieces.failure


def oracle(data: bytes, limit: int) -> tuple[list[Event], int | None]:
    """Return what `websockets` makes of ``data``, assembled here, and the close code if any.

    Documented differences, which are made up for here: it does not assemble fragments, does not
    check UTF-8 of data frames, tolerates any number of fragments (few here), and applies the
    message limit to control frames too (above 125 here). It judges some frames only when they
    are complete, so what follows a fault of ours is filled up with zeros.
    """
    protocol = ServerProtocol(state=OPEN, max_size=limit)
    protocol.receive_data(data)
    events: list[Event] = []
    opcode, parts = 0, b""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    for event in protocol.events_received():
        assert isinstance(event, Frame)
        kind, payload = int(event.opcode), bytes(event.data)
        if kind >= Opcode.CLOSE:
            events.append((kind, payload))
            continue
        opcode, parts = opcode or kind, parts + payload
        if opcode == TEXT:
            try:
                utf8.decode(payload, event.fin)
            except UnicodeDecodeError:
                return events, 1007
        if event.fin:
            events.append((opcode, parts))
            opcode, parts = 0, b""
    if protocol.parser_exc is None:
        return events, None
    assert protocol.close_sent is not None
    return events, protocol.close_sent.code


CODES = {FAULT: 1002, GARBLED: 1007, BIG: 1009, None: None}


@settings(max_examples=500)
@given(nearly_frames)
@example(b"\x00\x80")
@example(frame(TEXT, b"a" * 70, fin=False) + frame(0, b"a" * 70))
@example(close(999))
@example(frame(TEXT, bytes(8), fin=False) + frame(PING, b"x" * 121))
def test_the_same_as_the_websockets_protocol(data: bytes) -> None:
    """Events and close code are those of an independent implementation."""
    decoder = Decoder(128)
    ours = decoder.receive(data)
    failed = decoder.failure not in {None, CLOSED}
    theirs, code = oracle(data + bytes(150) if failed else data, 128)
    more = ours[len(theirs) :]
    if code == 1009 and more and more[0][0] >= CLOSE and ours[: len(theirs)] == theirs:
        # It reckons a control frame between fragments to the size of their message.
        return
    if decoder.failure is CLOSED:
        assert (CLOSE, ours[-1][0]) == (ours[-1][0], theirs[-1][0])
        assert ours == theirs
    else:
        assert ours == theirs
        # One frame may be wrong in several ways at once; any of them may be named.
        either = {CODES[decoder.failure], code}
        assert 1 == len(either) or (None not in either and either <= {1002, 1007, 1009})


# Unmasking and encoding.


@given(st.binary(max_size=300), masks)
def test_both_ways_of_unmasking_agree(data: bytes, mask: bytes) -> None:
    """Integer arithmetic, the C loop and the definition give the same bytes."""
    expected = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    assert expected == frames.unmask(data, mask)
    assert expected == frames.unmask_slowly(data, mask)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_encoded_frames_are_read_back(size: int) -> None:
    """Every length class is written as an independent reader expects it."""
    payload = b"x" * size
    assert ([(TEXT, payload)], b"") == split_frames(frames.encode_text(payload))
    assert ([(BINARY, payload)], b"") == split_frames(frames.encode(frames.BINARY, payload))


@pytest.mark.parametrize("reason", ["", "bye", "x" * 123, "x" * 124, "€" * 41, "x" + "€" * 41])
def test_a_close_reason_is_at_most_123_bytes_of_utf8(reason: str) -> None:
    """A long reason is cut between characters, not within one."""
    ((opcode, payload),), rest = split_frames(frames.encode_close(1000, reason))
    assert (CLOSE, b"", 1000) == (opcode, rest, int.from_bytes(payload[:2], "big"))
    assert len(payload) <= 125
    assert reason.startswith(payload[2:].decode())


def test_every_close_reason_fits_its_frame() -> None:
    """No text in the table of close reasons is too long to be sent whole."""
    for reason in CloseReason:
        assert len(reason.text.encode()) <= 123


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=400).map(lambda payload: (TEXT, b"%d" % len(payload))),
            st.sampled_from([(PING, b"p"), (PONG, b""), (BINARY, b"b")]),
        ),
        max_size=12,
    )
)
def test_joined_texts_are_arrays(run: list[tuple[int, bytes]]) -> None:
    """Texts that follow each other become an array, all else stays as it is, nothing is lost."""
    joined = frames.join_texts([frames.encode(opcode, payload) for opcode, payload in run])
    found, rest = split_frames(b"".join(joined))
    assert b"" == rest
    alone: list[tuple[int, bytes]] = []
    for opcode, payload in found:
        if opcode == TEXT and payload.startswith(b"["):
            items = payload[1:-1].split(b",")
            assert len(items) > 1
            alone.extend((TEXT, item) for item in items)
        else:
            alone.append((opcode, payload))
    assert run == alone
    texts = [opcode == TEXT for opcode, _ in found]
    assert not any(one and other for one, other in itertools.pairwise(texts))
