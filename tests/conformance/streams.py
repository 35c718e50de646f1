"""Strategies for byte streams that are WebSocket frames, mostly."""

import itertools
import zlib
from typing import Final

from hypothesis import strategies as st

from tests.trioserver.wire import BINARY, CLOSE, PING, PONG, TEXT, close, frame
from trioserver.frames import Event

EDGES: Final = (0, 1, 2, 124, 125, 126, 127, 128, 255, 256)
CLOSE_CODES: Final = (
    *(0, 999, 1000, 1001, 1003, 1004, 1005, 1006, 1007, 1011, 1013, 1014, 1015, 1016),
    *(2999, 3000, 3999, 4000, 4999, 5000, 65535),
)
GARBLED: Final = (
    *(b"\xff", b"\x80", b"\xc0\xaf", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    *(b"\xf0\x9f\x92", b"ok\xf8\x88\x80\x80\x80", b"\xef\xbf\xbe", b"\xf0\x80\x80\xaf"),
)
HEADERS: Final = (
    *(b"\x81", b"\x81\x01x", b"\x01\x00", b"\x80\x80", b"\x89\xfe", b"\x09\x80", b"\xc1\x80"),
    *(b"\x81\xfe\x00\x7d", b"\x81\xfe", b"\x81\xff", b"\x82\xff\x00\x00\x00\x00\x00\x00\xff\xff"),
    *(b"\x81\xff" + n.to_bytes(8, "big") for n in (1 << 63, (1 << 63) - 1, 1 << 32, 1 << 16)),
)
"""Frames that are wrong, unfinished or huge, cut off behind what shows it."""

masks = st.binary(min_size=4, max_size=4)
texts = st.text(max_size=30).map(str.encode)
sized = st.sampled_from(EDGES).map(lambda size: b"x" * size)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message, mostly in fragments, mostly right, with control frames in between."""
    opcode = draw(st.sampled_from((TEXT, TEXT, TEXT, BINARY)))
    payload = draw(st.one_of(texts, sized, st.sampled_from(GARBLED), st.binary(max_size=30)))
    places = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=5)))
    parts = [payload[a:b] for a, b in itertools.pairwise([0, *places, len(payload)])]
    data = b""
    for number, part in enumerate(parts):
        if number:
            data += draw(st.one_of(st.just(b""), controls))
        fin = number == len(parts) - 1
        data += frame(0 if number else opcode, part, fin=fin, mask=draw(masks))
    return data


controls = st.builds(
    frame,
    st.sampled_from((PING, PONG)),
    st.one_of(st.binary(max_size=20), sized.filter(lambda payload: len(payload) <= 125)),
    mask=masks,
)
closes = st.one_of(
    st.just(frame(CLOSE)),
    st.just(frame(CLOSE, b"\x03")),
    st.builds(close, st.sampled_from(CLOSE_CODES), st.one_of(texts, st.sampled_from(GARBLED))),
).filter(lambda data: data[1] & 0x7F <= 125)
wrong = st.one_of(
    st.sampled_from(HEADERS),
    st.binary(max_size=20),
    st.builds(
        frame,
        st.integers(0, 15),
        st.binary(max_size=130),
        fin=st.booleans(),
        rsv=st.sampled_from((0, 0, 0, 1, 2, 4)),
        mask=masks,
    ),
)
items = st.one_of(messages(), messages(), controls, messages(), closes, wrong)


@st.composite
def pieces(draw: st.DrawFn) -> list[bytes]:
    """A stream of frames, perhaps unfinished, cut at random places or byte by byte."""
    data = b"".join(draw(st.lists(items, min_size=1, max_size=8)))
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return draw(cuts(data))


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """The same data at random places or byte by byte."""
    if draw(st.booleans()):
        return [data[i : i + 1] for i in range(len(data))]
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]


@st.composite
def deflated(draw: st.DrawFn) -> tuple[bytes, Event]:
    """A compressed message in one or more fragments, and what it says."""
    opcode, payload = draw(
        st.one_of(
            st.tuples(
                st.just(TEXT), st.one_of(texts, sized, st.text(max_size=300).map(str.encode))
            ),
            st.tuples(st.just(BINARY), st.binary(max_size=300)),
        )
    )
    deflater = zlib.compressobj(
        draw(st.integers(0, 9)),
        zlib.DEFLATED,
        -draw(st.integers(9, 15)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from((zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED))),
    )
    middle = draw(st.integers(0, len(payload)))
    packed = deflater.compress(payload[:middle])
    packed += deflater.flush(draw(st.sampled_from((zlib.Z_NO_FLUSH, zlib.Z_FULL_FLUSH))))
    packed += deflater.compress(payload[middle:]) + deflater.flush(zlib.Z_SYNC_FLUSH)
    packed = packed.removesuffix(b"\0\0\xff\xff")
    places = sorted(draw(st.lists(st.integers(0, len(packed)), max_size=3)))
    parts = [packed[a:b] for a, b in itertools.pairwise([0, *places, len(packed)])]
    data = b"".join(
        frame(
            0 if number else opcode,
            part,
            fin=number == len(parts) - 1,
            rsv=0 if number else 4,
            mask=draw(masks),
        )
        for number, part in enumerate(parts)
    )
    return data, (opcode, payload)
