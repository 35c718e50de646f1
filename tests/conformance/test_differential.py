"""Against other implementations: wsproto reads the same frames, websockets our negotiation."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.headers import build_extension, parse_extension

from tests.conformance.oracles import DIFFERENCES, WsprotoReader, difference
from tests.conformance.streams import CLOSE_CODES, GARBLED, HEADERS, cuts, deflated, pieces
from tests.trioserver.test_handshake import made
from tests.trioserver.wire import BINARY, CLOSE, PING, TEXT, close, frame
from trioserver.deflate import deflate, inflate
from trioserver.errors import CloseReason
from trioserver.frames import Decoder, Event
from trioserver.handshake import parse, upgrade


@settings(max_examples=500, deadline=None)
@given(pieces())
@example([frame(TEXT, b"\xc3", fin=False), frame(0, b"\xa4")])
@example([frame(TEXT, b"a", fin=False) + frame(BINARY, b"b")[:2]])
@example([frame(TEXT, b"\xffabc")[:-2]])
def test_random_streams_mean_the_same_to_wsproto(stream: list[bytes]) -> None:
    """Messages, control frames and close codes are the same, but for `DIFFERENCES`."""
    assert difference(stream) is None, DIFFERENCES


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=4000, deadline=None)
@given(pieces())
def test_many_random_streams_mean_the_same_to_wsproto(stream: list[bytes]) -> None:
    """The same, for longer."""
    assert difference(stream) is None, DIFFERENCES


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_known_hard_streams_mean_the_same_to_wsproto(step: int) -> None:
    """Wrong headers, every close code and every kind of garbled text, whole and in bytes."""
    streams = [
        *HEADERS,
        *(close(code, b"bye") for code in (*range(900, 3100), *CLOSE_CODES)),
        *(close(1000, garbled) for garbled in GARBLED),
        *(frame(TEXT, garbled) for garbled in GARBLED),
        *(frame(TEXT, garbled, fin=False) + frame(0, b"z") for garbled in GARBLED),
        *(frame(TEXT, bytes((byte,)), fin=False) + frame(0, b"\x80") for byte in range(256)),
    ]
    for stream in streams:
        cut = [stream[i : i + step] for i in range(0, len(stream), step)]
        assert difference(cut) is None, stream


@pytest.mark.parametrize("rsv", range(8))
@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING, CLOSE, 0])
def test_rsv1_marks_the_first_frame_of_a_message_and_nothing_else(opcode: int, rsv: int) -> None:
    """With compression on, every other use of the reserved bits is still 1002, for wsproto too."""
    stream = frame(TEXT, b"x", fin=False) if opcode == 0 else b""
    stream += frame(opcode, deflate(b"x") if opcode == TEXT and rsv & 4 else b"", rsv=rsv)
    ours, theirs = Decoder(0, inflate=inflate), WsprotoReader(deflated=True)
    events = ours.receive(stream)
    theirs.receive(stream)
    right = rsv == 0 or (rsv == 4 and opcode in {TEXT, BINARY})
    assert (right, right) == (len(events) == 1, len(theirs.events) == 1)
    if not right:
        assert (CloseReason.PROTOCOL_ERROR, 1002) == (ours.failure, theirs.code)


@pytest.mark.parametrize(
    "window",
    [
        *(None, 9, 15),
    ],
)
def test_a_client_can_live_with_what_was_agreed_on(window: int | None) -> None:
    """Whatever a client of `websockets` offers, it accepts our answer, or goes uncompressed."""
    yes_or_no = (False, True)
    for ours, theirs, bits in itertools.product(yes_or_no, yes_or_no, (None, True, 9, 15)):
        client = ClientPerMessageDeflateFactory(ours, theirs, window, bits)
        offer = build_extension([(client.name, client.get_request_params())])
        request = parse(made(b"Sec-WebSocket-Extensions: " + offer.encode()))
        agreed = upgrade(request, may_deflate=True)
        assert (agreed.extension is not None) is (window != 9)
        if agreed.extension is not None:
            answer = agreed.response().decode()
            (line,) = re.findall(r"\r\nSec-WebSocket-Extensions: (.*)\r\n", answer)
            ((_, parameters),) = parse_extension(line)
            client.process_response_params(parameters, [])


@settings(deadline=None)
@given(st.lists(deflated(), max_size=4), st.data())
def test_compressed_messages_mean_the_same_to_wsproto(
    messages: list[tuple[bytes, Event]], rest: st.DataObject
) -> None:
    """Whatever the level, strategy, window and fragments, both read what was compressed."""
    stream = b"".join(data + frame(PING) for data, _ in messages)
    expected = [event for _, said in messages for event in (said, (PING, b""))]
    ours, theirs = Decoder(0, inflate=inflate), WsprotoReader(deflated=True)
    found: list[Event] = []
    for piece in rest.draw(cuts(stream)):
        found += ours.receive(piece)
        theirs.receive(piece)
    assert (expected, None) == (found, ours.failure)
    assert (expected, None) == (theirs.events, theirs.code)
