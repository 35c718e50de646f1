"""Heads of the PROXY protocol: whole, in pieces, broken, and never asked for from strangers."""

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trioserver.peers import address_of
from trioserver.proxy_head import MAX_V1, MAX_V2, NoHead, ProxyHead, proxy_head

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = bytes([203, 0, 113, 7, 10, 0, 0, 1]) + struct.pack("!HH", 4711, 443)
V6 = ipaddress.IPv6Address("2001:db8::7").packed + bytes(16) + struct.pack("!HH", 4711, 443)
CLIENT = address_of("203.0.113.7")
V6_CLIENT = address_of("2001:db8::7")
TLVS = b"\x01\x00\x02h2" + b"\x04\x00\x00" + b"\xea\xff\xff"


def binary(
    body: bytes = V4, *, command: int = 0x21, family: int = 0x11, size: int | None = None
) -> bytes:
    """Return a head of version 2."""
    length = len(body) if size is None else size
    return SIGNATURE + struct.pack("!BBH", command, family, length) + body


GOOD: dict[str, tuple[bytes, int | None]] = {
    "TCP4": (b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\n", CLIENT),
    "TCP6": (b"PROXY TCP6 2001:db8::7 ::1 4711 443\r\n", V6_CLIENT),
    "TCP6 in another spelling": (b"PROXY TCP6 2001:0DB8:0::7 ::1 0 65535\r\n", V6_CLIENT),
    "TCP6, mapped": (b"PROXY TCP6 ::ffff:203.0.113.7 ::1 1 1\r\n", CLIENT),
    "unknown": (b"PROXY UNKNOWN\r\n", None),
    "unknown with anything": (b"PROXY UNKNOWN ff:: what\0ever \xff 1\r\n", None),
    "longest": (b"PROXY UNKNOWN " + b"f" * (MAX_V1 - 16) + b"\r\n", None),
    "binary IPv4": (binary(), CLIENT),
    "binary IPv6": (binary(V6, family=0x21), V6_CLIENT),
    "binary with extensions": (binary(V4 + TLVS), CLIENT),
    "binary with broken extensions": (binary(V6 + b"\x01\xff", family=0x21), V6_CLIENT),
    "local": (binary(b"", command=0x20, family=0), None),
    "local with addresses": (binary(command=0x20), None),
    "local with nonsense": (binary(b"abc", command=0x20, family=0xFF), None),
    "unspecified": (binary(b"", family=0), None),
    "unspecified with bytes": (binary(b"abc", family=0), None),
    "unspecified transport": (binary(family=0x10), None),
    "UDP": (binary(family=0x12), None),
    "UDP6": (binary(V6, family=0x22), None),
    "Unix": (binary(bytes(216), family=0x31), None),
    "longest binary": (binary(V4 + bytes(MAX_V2 - 28)), CLIENT),
}


@pytest.mark.parametrize(("head", "source"), GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("rest", [b"", b"G", b"GET / HTTP/1.1\r\n", b"PROXY TCP4 1.1.1.1 1.1"])
def test_a_head_is_read_and_not_a_byte_more(head: bytes, source: int | None, rest: bytes) -> None:
    """What the client sent begins right behind it."""
    expected = ProxyHead(len(head), source)
    assert expected == proxy_head(head + rest)
    assert expected == proxy_head(bytearray(head + rest))


@pytest.mark.parametrize("head", [head for head, _ in GOOD.values()], ids=GOOD)
def test_every_beginning_of_a_head_asks_for_more(head: bytes) -> None:
    """However the bytes are cut."""
    assert {NoHead.MORE} == {proxy_head(head[:size]) for size in range(len(head))}


INVALID: dict[str, bytes] = {
    "UDP4": b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
    "lower case": b"PROXY tcp4 1.2.3.4 1.2.3.4 1 1\r\n",
    "no family": b"PROXY \r\n",
    "unknown and more": b"PROXY UNKNOWNS\r\n",
    "too few": b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
    "too many": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n",
    "two spaces": b"PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n",
    "tab": b"PROXY TCP4\t1.2.3.4 1.2.3.4 1 1\r\n",
    "space at the end": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 \r\n",
    "IPv6 as TCP4": b"PROXY TCP4 ::1 ::1 1 1\r\n",
    "IPv4 as TCP6": b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
    "mixed": b"PROXY TCP4 1.2.3.4 ::1 1 1\r\n",
    "no address": b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n",
    "no destination": b"PROXY TCP4 1.2.3.4 1.2.3 1 1\r\n",
    "no IPv6 address": b"PROXY TCP6 1::2::3 ::1 1 1\r\n",
    "no IPv6 destination": b"PROXY TCP6 ::1 1::2::3 1 1\r\n",
    "octal": b"PROXY TCP4 01.2.3.4 1.2.3.4 1 1\r\n",
    "name": b"PROXY TCP4 localhost 1.2.3.4 1 1\r\n",
    "port beyond": b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
    "port with a zero": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 01\r\n",
    "port negative": b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 1\r\n",
    "line feed alone": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\n",
    "carriage return alone": b"PROXY UNKNOWN \r \r\n",
    "endless": b"PROXY UNKNOWN " + b"f" * (MAX_V1 - 14),
    "one byte too long": b"PROXY UNKNOWN " + b"f" * (MAX_V1 - 15) + b"\r\n",
    "version 1": binary(command=0x11),
    "version 3": binary(command=0x31),
    "command 2": binary(command=0x22),
    "family 4": binary(family=0x41),
    "transport 3": binary(family=0x13),
    "too short for IPv4": binary(V4[:-1]),
    "too short for IPv6": binary(V6[:-1], family=0x21),
    "too short for Unix": binary(bytes(215), family=0x31),
    "announced beyond the limit": binary(size=MAX_V2 - 15),
    "64 KiB announced": binary(size=0xFFFF),
    "64 KiB of a local one announced": binary(command=0x20, size=0xFFFF),
}


@pytest.mark.parametrize("head", INVALID.values(), ids=INVALID)
def test_what_only_begins_like_a_head_is_invalid(head: bytes) -> None:
    """And is so at the byte that makes it so, whatever comes behind."""
    assert NoHead.INVALID is proxy_head(head)
    assert NoHead.INVALID is proxy_head(head + b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"GET / HTTP/1.1\r\n",
            b"G",
            b"\r\nGET / HTTP/1.1",
            b"\r\n\r\nGET",
            b"PROPFIND / HTTP/1.1",
        ),
        *(b"PROXY", b"proxy TCP4 ")[1:],
        *(b"PROXY: x", b"PROXY\r\n", b"\x16\x03\x01\x02\x00", b"\0", b" PROXY UNKNOWN\r\n"),
        SIGNATURE[:11] + b"\r",
    ],
)
def test_what_begins_otherwise_is_the_clients(data: bytes) -> None:
    """HTTP, TLS and anything else."""
    assert NoHead.ABSENT is proxy_head(data)


@given(st.binary(max_size=64) | st.sampled_from([head for head, _ in GOOD.values()]), st.binary())
@example(SIGNATURE, b"\x21\x11")
@example(b"PROXY ", b"TCP4")
def test_bytes_in_any_cut_come_to_the_same_end(begin: bytes, rest: bytes) -> None:
    """More bytes never change a verdict once there is one, and none is asked for for ever."""
    data = begin + rest
    final = proxy_head(data)
    verdicts = [proxy_head(data[:size]) for size in range(len(data) + 1)]
    settled = [verdict for verdict in verdicts if verdict is not NoHead.MORE]
    assert all(final == verdict for verdict in settled)
    assert proxy_head(data + bytes(MAX_V2)) is not NoHead.MORE
    if isinstance(final, ProxyHead):
        assert final.size <= len(data)


ADDRESSES = st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)) | st.tuples(
    st.ip_addresses(v=6), st.ip_addresses(v=6)
)


@given(ADDRESSES, st.integers(0, 65_535), st.integers(0, 65_535), st.binary(max_size=99))
def test_both_versions_say_the_same(
    pair: tuple[ipaddress.IPv4Address, ipaddress.IPv4Address], port: int, ours: int, tail: bytes
) -> None:
    """The source comes back from what a proxy would write."""
    source, destination = pair
    version = source.version
    family = {4: 0x11, 6: 0x21}[version]
    text = f"PROXY TCP{version} {source} {destination} {port} {ours}\r\n".encode()
    packed = source.packed + destination.packed + struct.pack("!HH", port, ours)
    expected = address_of(str(source))
    for head in (text, binary(packed + tail, family=family)):
        assert ProxyHead(len(head), expected) == proxy_head(head + tail)
