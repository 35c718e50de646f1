"""Peers: from whose address a client comes, and under which key its address is counted. Pure.

An address is one integer of 128 bits, as IPv6 writes it; IPv4 is there as ``::ffff:a.b.c.d``, so
an address that a dual-stack socket reports in either form is one address. `UNIX` stands for a
peer on a Unix socket, `UNKNOWN` for one whose address nobody understands.

Proxies put the address of their client into a header, at the right end of a list. What stands
left of it is what the client itself has sent, true or forged. So the list is walked from the
right, and only as long as whoever wrote the entry is in ``TRUSTED_PROXIES``: the first that is not
is the client. An entry that is no address ends the walk as well: then the proxy that wrote it is
the last that is known.

One header is believed, the other never read: ``X-Forwarded-For``, or ``Forwarded`` (RFC 7239) if
``TRUSTED_PROXIES`` says ``forwarded``. A proxy that writes one of them passes the other on as the
client sent it, so whoever takes either believes the client.

A key is what limits per address count: an IPv4 address, or the /64 of an IPv6 address, because a
subscriber has a whole /64 and can take any address of it. Loopback has none unless asked for: a
proxy, a benchmark or a test on the same machine is not one client. So a local proxy that
does not say whose connection it forwards is not limited per address.
"""

import functools
import re
import socket
from collections.abc import Iterable
from typing import Final

from trioserver.errors import SettingsError

SETTING: Final = "TRUSTED_PROXIES"
EXAMPLE: Final = "10.0.0.0/8,2001:db8::/32,unix"

UNIX: Final = -1
"""A peer on a Unix socket."""

UNKNOWN: Final = 0
"""A peer whose address is not understood; they share one key. (The address ``::``.)"""

MAX_HOPS: Final = 16
"""Entries of a header that are looked at, from the right."""

_MAX_ENTRY: Final = 256
"""Bytes of one entry; an IPv6 address with port, quotes and all companions is shorter."""

_IPV4: Final = 0xFFFF
"""What an IPv4 address has in front of its 32 bits: ``::ffff:0:0/96``."""
_NAT64: Final = 0x64_FF9B << 64
"""And what it has behind a translator, in front of 32 bits: ``64:ff9b::/96`` (RFC 6052)."""
_LOOPBACK_IPV4: Final = _IPV4 << 8 | 127
_LOOPBACK_IPV6: Final = 1

_BRACKETS: Final = re.compile(r"\[([^\]]*)\](?::[0-9]{1,5})?")


@functools.lru_cache(maxsize=4096)
def address_of(text: str) -> int | None:
    """Return an IP address as a number; None if that is none. Never raises.

    Args:
        text: As the kernel reports it: without brackets or port; a zone (``%eth0``) is
            left out.
    """
    try:
        if ":" not in text:
            return _IPV4 << 32 | int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")
        bare = text.partition("%")[0]
        return int.from_bytes(socket.inet_pton(socket.AF_INET6, bare), "big")
    except (OSError, ValueError):  # ValueError: NUL, lone surrogates
        return None


def peer_address(name: object) -> int:
    """Return the address in what ``accept()`` or ``getpeername()`` gave, of any family."""
    if isinstance(name, tuple):
        address = address_of(name[0])
        return UNKNOWN if address is None else address
    return UNIX


@functools.lru_cache(maxsize=4096)
def address_text(address: int) -> str:
    """Return an address for people: IPv4 with dots, IPv6 in the usual form."""
    if address == UNIX:
        return "unix"
    if address >> 32 == _IPV4:
        return socket.inet_ntop(socket.AF_INET, (address & 0xFFFF_FFFF).to_bytes(4, "big"))
    return socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, "big"))


def is_loopback(address: int) -> bool:
    """Tell whether a peer is on this machine: 127.0.0.0/8, ``::1`` or a Unix socket."""
    return address >> 24 == _LOOPBACK_IPV4 or address in {_LOOPBACK_IPV6, UNIX}


def address_key(address: int) -> int:
    """Return the number of at most 64 bits under which limits count an address.

    An IPv4 address is its own key, also behind a NAT64 translator, where all of IPv4 would
    otherwise be one /64. Of IPv6 the upper half is the key. No IPv4 key equals an IPv6 one that is
    in use: theirs would be in ``0:0:ffff::/48``, which belongs to nobody.
    """
    high = address >> 32
    if high in (_IPV4, _NAT64):
        return _IPV4 << 32 | (address & 0xFFFF_FFFF)
    return (address >> 64) & 0xFFFF_FFFF_FFFF_FFFF


def proxy_list(text: str) -> tuple[str, ...]:
    """Return the entries of ``TRUSTED_PROXIES`` in their usual form.

    Args:
        text: Networks, addresses, ``unix`` and ``forwarded``, separated by commas or white
            space.

    Raises:
        ValueError: With the end of the sentence '"abc" ...'.
    """
    words = re.split(r"[,\s]+", text)
    return tuple(dict.fromkeys(_entry(word) for word in words if word))


def _entry(word: str) -> str:
    if word.lower() in {"unix", "forwarded"}:
        return word.lower()
    import ipaddress  # noqa: PLC0415 - for those who have a proxy

    try:
        return str(ipaddress.ip_network(word))
    except ValueError as error:
        raise ValueError(f"has {word!r}, which is no network or address ({error})") from None


class Peers:
    """Decides from whose address a connection comes.

    Args:
        trusted: Entries of ``TRUSTED_PROXIES``.
        limit_loopback: Whether loopback has keys like everybody else.

    Raises:
        SettingsError: An entry is none.
    """

    def __init__(self, trusted: Iterable[str] = (), *, limit_loopback: bool = False) -> None:
        try:
            entries = {_entry(word) for word in trusted}
        except ValueError as error:
            raise SettingsError(SETTING, str(error), EXAMPLE) from None
        self._forwarded = "forwarded" in entries
        self.header: Final = b"forwarded" if self._forwarded else b"x-forwarded-for"
        """Lower-case name of the one header that is believed."""
        self._unix = "unix" in entries
        networks = [_shifted(entry) for entry in sorted(entries - {"unix", "forwarded"})]
        # Apart, because ::/0 means all of IPv6, but not also all of IPv4.
        self._ipv4 = tuple((bits, value) for ipv4, bits, value in networks if ipv4)
        self._ipv6 = tuple((bits, value) for ipv4, bits, value in networks if not ipv4)
        self._nobody = not (networks or self._unix)
        self._limit_loopback = limit_loopback

    @property
    def trusts_nobody(self) -> bool:
        """Whether there are no proxies whose word counts, so that no header need be looked at."""
        return self._nobody

    @classmethod
    def parse(cls, text: str, *, limit_loopback: bool = False) -> "Peers":
        """Return what the setting's text means.

        Raises:
            SettingsError: It is nonsense.
        """
        try:
            return cls(proxy_list(text), limit_loopback=limit_loopback)
        except ValueError as error:
            raise SettingsError(SETTING, f"{text!r} {error}", EXAMPLE) from None

    def trusts(self, address: int) -> bool:
        """Tell whether this peer's word about its clients counts."""
        if self._nobody:
            return False
        if address == UNIX:
            return self._unix
        networks = self._ipv4 if address >> 32 == _IPV4 else self._ipv6
        for bits, value in networks:  # noqa: SIM110 - any() takes three times as long
            if address >> bits == value:
                return True
        return False

    def client(self, peer: int, header: str | None) -> int:
        """Return the address of whoever began the request. Never raises.

        Args:
            peer: Who is connected to us; behind the PROXY protocol, whom that names.
            header: The value of `header`, all its lines joined with commas; None without.
        """
        if header is None or not self.trusts(peer):
            return peer
        hop = peer
        for entry in reversed(header.rsplit(",", MAX_HOPS)):
            address = (_forwarded_for if self._forwarded else _plain)(entry)
            if address is None:
                return hop
            hop = address
            if not self.trusts(hop):
                return hop
        return hop

    def key(self, address: int) -> int | None:
        """Return the key that limits count an address under; None if they do not."""
        if is_loopback(address) and (address == UNIX or not self._limit_loopback):
            return None
        return address_key(address)


def _shifted(entry: str) -> tuple[bool, int, int]:
    """Return of a network: whether it is IPv4, how many low bits are free, what is above them."""
    network, _, length = entry.partition("/")
    address = address_of(network)
    assert address is not None  # noqa: S101 - for the type checker: ipaddress wrote it
    ipv4 = address >> 32 == _IPV4
    bits = (128 if ":" in network else 32) - int(length)
    return ipv4, bits, address >> bits


def _plain(entry: str) -> int | None:
    """Return the address in an entry: bare, in brackets, in either case perhaps with a port."""
    if len(entry) > _MAX_ENTRY:
        return None
    entry = entry.strip(" \t")
    if entry[:1] == "[":
        match = _BRACKETS.fullmatch(entry)
        return None if match is None or ":" not in match[1] else address_of(match[1])
    if entry.count(":") == 1:
        entry, _, port = entry.partition(":")
        if not (port.isascii() and port.isdigit()):
            return None
    return address_of(entry)


def _forwarded_for(element: str) -> int | None:
    """Return the address in ``for=`` of one element of ``Forwarded``; None if there is none.

    The list was cut at every comma, quoted or not: a quotation mark that the client left open must
    not swallow what the proxy wrote behind it. Conversely a proxy may quote what the client chose,
    such as its ``Host``, with commas, semicolons and a ``for=`` in it. The pieces of a quoted
    string have an odd number of quotation marks, unless some are escaped: both are refused.
    """
    if len(element) > _MAX_ENTRY or "\\" in element:
        return None
    node = None
    for pair in element.split(";"):
        if pair.count('"') & 1:
            return None
        name, _, value = pair.partition("=")
        if name.strip(" \t").lower() == "for":
            if node is not None:
                return None
            node = value.strip(" \t")
    if not node:
        return None
    if node[0] == '"':
        return _plain(node[1:-1])
    # IPv6 and ports need quotation marks: otherwise it is not what the proxy meant to say.
    return None if ":" in node else _plain(node)
