"""permessage-deflate: what is agreed on, what comes through, what a bomb costs."""

import socket
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trioserver.wire import frame as masked
from trioserver import deflate, frames
from trioserver.envelope import Entry
from trioserver.errors import CloseReason
from trioserver.outbox import DeflatingOutbox, OutboxLimits

OFFERS = {
    "permessage-deflate": True,
    "permessage-deflate; client_max_window_bits": True,
    "permessage-deflate; client_max_window_bits=12": True,
    'permessage-deflate; client_max_window_bits="9"': True,
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover": True,
    "permessage-deflate; server_max_window_bits=15": True,
    "permessage-deflate; server_max_window_bits=10": False,
    "permessage-deflate; server_max_window_bits": False,
    "permessage-deflate; server_max_window_bits=10, permessage-deflate": True,
    "x-webkit-deflate-frame": False,
    "permessage-deflate; unknown": False,
    "permessage-deflate; client_max_window_bits=16": False,
    "permessage-deflate; client_max_window_bits=7": False,
    "permessage-deflate; server_no_context_takeover=1": False,
    "permessage-deflate; server_no_context_takeover; server_no_context_takeover": False,
    'x; y="a, permessage-deflate, b"': False,
    "": False,
    ";;;,,,": False,
}


@pytest.mark.parametrize(("offers", "agreed"), OFFERS.items())
def test_an_offer_is_taken_only_if_one_compression_can_serve_all(
    offers: str, *, agreed: bool
) -> None:
    """What would need a window of its own, or is not understood, is declined."""
    answer = deflate.answer(offers)
    assert agreed == (answer is not None)
    assert ("server_max_window_bits=15" in offers) == ("=15" in (answer or ""))


@given(st.binary(max_size=5000))
def test_what_is_deflated_is_inflated(payload: bytes) -> None:
    """Both directions are each other's inverse, and raw deflate as zlib knows it."""
    packed = deflate.deflate(payload)
    assert payload == deflate.inflate(packed, 0)
    assert payload == zlib.decompressobj(-15).decompress(packed + b"\x00\x00\xff\xff")


def test_the_limit_is_on_what_was_inflated() -> None:
    """Exactly the limit passes, one byte more does not."""
    assert b"x" * 100 == deflate.inflate(deflate.deflate(b"x" * 100), 100)
    assert CloseReason.TOO_BIG is deflate.inflate(deflate.deflate(b"x" * 101), 100)


def test_a_bomb_costs_no_more_than_the_largest_message() -> None:
    """200 MiB in 200 KiB are refused without being made."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(200))
    bomb += deflater.flush(zlib.Z_SYNC_FLUSH)
    tracemalloc.start()
    try:
        verdict = deflate.inflate(bomb, 16 << 10)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CloseReason.TOO_BIG is verdict
    # zlib keeps what it has not consumed, which is as much as the client has sent.
    assert peak < 3 * len(bomb)


@given(st.binary(max_size=200))
def test_garbage_never_raises(data: bytes) -> None:
    """Whatever the bytes, the answer is a message or a reason."""
    assert isinstance(deflate.inflate(data, 1000), bytes | CloseReason)


def decoder(limit: int = 1000) -> frames.Decoder:
    """Return a decoder of a connection that negotiated compression."""
    return frames.Decoder(limit, inflate=deflate.inflate)


@given(st.text(max_size=400), st.integers(0, 400))
def test_compressed_messages_arrive_whole_and_in_fragments(text: str, cut: int) -> None:
    """RSV1 on the first frame compresses the message, however it is cut."""
    payload = text.encode()
    packed = deflate.deflate(payload)
    whole = masked(frames.TEXT, packed, rsv=4)
    halves = masked(frames.TEXT, packed[:cut], fin=False, rsv=4) + masked(0, packed[cut:])
    for data in (whole, halves):
        receiving = decoder(5000)
        assert [(frames.TEXT, payload)] == receiving.receive(data)
        assert receiving.failure is None


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (masked(frames.TEXT, b"\xff\xff\xff", rsv=4), CloseReason.PROTOCOL_ERROR),
        (masked(frames.TEXT, deflate.deflate(b"\xff\xfe"), rsv=4), CloseReason.INVALID_UTF8),
        (masked(frames.TEXT, deflate.deflate(b"x" * 5000), rsv=4), CloseReason.TOO_BIG),
        (masked(frames.PING, b"", rsv=4), CloseReason.PROTOCOL_ERROR),
        (masked(frames.TEXT, b"", rsv=2), CloseReason.PROTOCOL_ERROR),
        (masked(frames.TEXT, b"", rsv=6), CloseReason.PROTOCOL_ERROR),
        (
            masked(frames.TEXT, b"", fin=False) + masked(0, b"", rsv=4),
            CloseReason.PROTOCOL_ERROR,
        ),
    ],
)
def test_bad_compression_ends_the_connection(data: bytes, failure: CloseReason) -> None:
    """Garbage, bombs and misplaced bits have their close codes."""
    receiving = decoder()
    assert [] == receiving.receive(data)
    assert failure is receiving.failure


def test_many_bombs_in_one_read_are_one_too_many() -> None:
    """Each message is within the limit; what one read may become is bounded all the same."""
    bomb = masked(frames.TEXT, deflate.deflate(b"x" * 1000), rsv=4)
    receiving = decoder(1000)
    assert 8 == len(receiving.receive(bomb * 50))
    assert CloseReason.TOO_BIG is receiving.failure
    patient = decoder(1000)
    assert [1] * 50 == [len(patient.receive(bomb)) for _ in range(50)]


def test_without_negotiation_rsv1_is_a_protocol_error() -> None:
    """Nobody can compress who was not asked to."""
    receiving = frames.Decoder(1000)
    assert [] == receiving.receive(masked(frames.TEXT, deflate.deflate(b"hi"), rsv=4))
    assert CloseReason.PROTOCOL_ERROR is receiving.failure


def test_compressed_and_plain_messages_may_alternate() -> None:
    """Compression is a property of the message, not of the connection."""
    receiving = decoder()
    data = b"".join(
        [
            masked(frames.TEXT, b"plain"),
            masked(frames.TEXT, deflate.deflate(b"packed"), rsv=4),
            masked(frames.TEXT, b"pl", fin=False),
            masked(0, b"ain"),
        ]
    )
    assert [b"plain", b"packed", b"plain"] == [payload for _, payload in receiving.receive(data)]


def test_a_frame_is_compressed_once_for_all() -> None:
    """Everybody who negotiated gets the very same bytes; small frames stay as they are."""
    compressor = deflate.Compressor()
    large = frames.encode_text(b'{"payload":"' + b"x" * 5000 + b'"}')
    packed = compressor.of(large)
    assert packed is compressor.of(large)
    assert 0xC1 == packed[0]
    assert len(packed) < 100
    small = frames.encode_text(b"{}")
    assert small is compressor.of(small)


def test_a_deflating_outbox_compresses_what_many_get_and_nothing_else() -> None:
    """`deliver` sends the compressed frame, `offer` sends what it is given."""

    class Owner:
        def blocked(self) -> None: ...
        def overflowed(self) -> None: ...
        def broke(self) -> None: ...
        def entered(self, _entry: Entry, *, everyone: bool) -> bool:
            return everyone

        def entered_topic(self, _topic: bytes, _entry: Entry, _frame: bytes) -> bool:
            return False

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        outbox = DeflatingOutbox(ours, OutboxLimits(), Owner(), deflate.Compressor())
        large = frames.encode_text(b"x" * 2000)
        assert outbox.deliver(large)
        assert outbox.release()
        packed = theirs.recv(65536)
        assert b"x" * 2000 == deflate.inflate(frames.payload_of(packed), 0)
        assert outbox.offer(large)
        assert large == theirs.recv(65536)


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_the_payload_of_an_encoded_frame_is_found(size: int) -> None:
    """`payload_of` undoes `encode` for every length class."""
    assert b"y" * size == frames.payload_of(frames.encode(frames.TEXT, b"y" * size))
