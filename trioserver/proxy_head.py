"""The head of the PROXY protocol: what a proxy says about a connection before its first byte.

A proxy that passes on bytes and not requests (HAProxy in TCP mode, a network load balancer) has no
header to put its client's address into. It sends a short head of its own instead, as text (version
1) or binary (version 2): https://www.haproxy.org/download/3.1/doc/proxy-protocol.txt. Pure; both
versions, byte by byte or at once.

The protocol warns of receivers that guess whether a head is there: whoever may leave it out, may
also forge it. So the caller asks only for peers in ``TRUSTED_PROXIES``; to all others a head is
the beginning of a malformed request. Neither version can begin an HTTP request or a TLS record.

What is read is the source address. Ports, the destination and the extensions (TLV) of version 2
are skipped; what says "no address" (``UNKNOWN``, ``LOCAL``, no family) means the proxy itself, for
instance for its health checks.
"""

import enum
import re
from typing import Final

import attrs

from trioserver.peers import address_of

MAX_V1: Final = 107
"""Bytes of a head of version 1, line end included; the protocol's own limit."""

MAX_V2: Final = 4096
"""Bytes of a head of version 2. The protocol allows 64 KiB; a few hundred are usual."""

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED: Final = 16
"""Bytes of version 2 up to and including the length."""
_LOCAL: Final = 0x20
_COMMANDS: Final = (_LOCAL, 0x21)
"""Version 2 with the commands LOCAL and PROXY."""
_IPV4, _IPV6 = 1, 2
_STREAM, _DATAGRAM = 1, 2

_LINE: Final = re.compile(
    rb"PROXY (TCP[46]) ([0-9a-fA-F.:]+) ([0-9a-fA-F.:]+) ([0-9]+) ([0-9]+)\r\n"
)
_UNKNOWN: Final = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")
_PORT: Final = re.compile(rb"0|[1-9][0-9]{0,4}")
_MAX_PORT: Final = 65_535

_ADDRESS_BYTES: Final = {0: 0, 1: 12, 2: 36, 3: 216}
"""Family to the bytes of both addresses and ports: none, IPv4, IPv6, Unix."""


class NoHead(enum.Enum):
    """Why there is no head to return."""

    MORE = "more"
    """So far these bytes may become one."""
    ABSENT = "absent"
    """They are something else: what the client sent begins here."""
    INVALID = "invalid"
    """They begin like one and are none: close, nothing is to be said to this peer."""


@attrs.frozen
class ProxyHead:
    """A complete head."""

    size: int
    """Its bytes; what the client sent begins behind them."""
    source: int | None
    """Whose connection it is (`peers.address_of`); None for the proxy's own."""


def proxy_head(data: bytes | bytearray) -> ProxyHead | NoHead:
    """Read the head that ``data``, the first bytes of a connection, may begin with.

    Never raises, and never asks for more than `MAX_V2` bytes.
    """
    if data.startswith(_V1):
        return _text(data)
    if data.startswith(_V2):
        return _binary(data)
    # Not even one byte: nobody knows yet.
    if _V1.startswith(data) or _V2.startswith(data):
        return NoHead.MORE
    return NoHead.ABSENT


def _text(data: bytes | bytearray) -> ProxyHead | NoHead:
    end = data.find(b"\n", 0, MAX_V1)
    if end < 0:
        return NoHead.MORE if len(data) < MAX_V1 else NoHead.INVALID
    line = bytes(data[: end + 1])
    if _UNKNOWN.fullmatch(line):
        return ProxyHead(end + 1, None)
    match = _LINE.fullmatch(line)
    source = None if match is None else _source(*match.groups())
    return NoHead.INVALID if source is None else ProxyHead(end + 1, source)


def _source(family: bytes, source: bytes, destination: bytes, *ports: bytes) -> int | None:
    """Return the source address of a line; None if any part of the line is wrong."""
    if not all(_PORT.fullmatch(port) and int(port) <= _MAX_PORT for port in ports):
        return None
    wants_ipv6 = family == b"TCP6"
    addresses = [
        address_of(text.decode("ascii")) if (b":" in text) == wants_ipv6 else None
        for text in (source, destination)
    ]
    return None if None in addresses else addresses[0]


def _binary(data: bytes | bytearray) -> ProxyHead | NoHead:
    if len(data) > len(_V2) and data[12] not in _COMMANDS:
        return NoHead.INVALID
    if len(data) < _FIXED:
        return NoHead.MORE
    size = _FIXED + int.from_bytes(data[14:16], "big")
    local, family, transport = data[12] == _LOCAL, data[13] >> 4, data[13] & 15
    # Of LOCAL the family means nothing, and whatever follows is to be skipped.
    needed = 0 if local else _ADDRESS_BYTES.get(family, MAX_V2)
    if size > MAX_V2 or size < _FIXED + needed or (transport > _DATAGRAM and not local):
        return NoHead.INVALID
    if len(data) < size:
        return NoHead.MORE
    # Nobody on a TCP port has come from a Unix socket or over UDP.
    known = transport == _STREAM and not local
    return ProxyHead(size, _packed_source(data, family) if known else None)


def _packed_source(data: bytes | bytearray, family: int) -> int | None:
    if family == _IPV4:
        return 0xFFFF << 32 | int.from_bytes(data[16:20], "big")
    return int.from_bytes(data[16:32], "big") if family == _IPV6 else None
