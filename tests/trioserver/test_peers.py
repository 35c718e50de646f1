"""Whose address it is: who is believed, how far, and what is counted as one."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioserver.errors import SettingsError
from trioserver.peers import (
    MAX_HOPS,
    UNIX,
    UNKNOWN,
    Peers,
    address_key,
    address_of,
    address_text,
    is_loopback,
    peer_address,
    proxy_list,
)

TRUSTED = "10.0.0.0/8, 192.0.2.1 2001:db8:f::/48,127.0.0.1,unix"
PROXY = "10.0.0.1"
CLIENT = "203.0.113.7"
V6_CLIENT = "2001:db8:1::7"


def number(text: str) -> int:
    """Return the number of an address, which ``text`` is."""
    address = address_of(text)
    assert address is not None
    return address


class TestAddresses:
    """Text to number and back, keys, loopback."""

    @pytest.mark.parametrize(
        ("text", "usual"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::FFFF:c000:201", "192.0.2.1"),
            ("0.0.0.0", "0.0.0.0"),
            ("255.255.255.255", "255.255.255.255"),
            ("2001:DB8::0:1", "2001:db8::1"),
            ("::1", "::1"),
            ("::", "::"),
            ("fe80::1%eth0", "fe80::1"),
        ],
    )
    def test_one_address_has_one_number(self, text: str, usual: str) -> None:
        """Whatever its spelling, and IPv4 on a dual-stack socket is IPv4."""
        assert usual == address_text(number(text))
        assert number(text) == number(usual)

    @pytest.mark.parametrize(
        "text",
        [
            *("", " ", "unknown", "localhost", "1.2.3", "1.2.3.4.5", "256.0.0.1", "1.2.3.04"),
            *("0x7f.0.0.1", "2130706433", "1.2.3.4 ", " 1.2.3.4", "1.2.3.4\n", "1.2.3.4/8"),
            *("[::1]", ":::", "1::2::3", "::g", "%eth0", ":%", "1.2.3.4:80", "\ud800", "::\0"),
            *("1.2.3.4\0", "\u0661.2.3.4", "::ffff:1.2.3", "a" * 10_000),
        ],
    )
    def test_what_is_no_address_is_none(self, text: str) -> None:
        """No spelling that only some programs take for an address."""
        assert address_of(text) is None

    @given(st.text())
    def test_text_never_raises(self, text: str) -> None:
        """Whatever the characters."""
        address_of(text)
        address_of(f"::{text}")

    @given(st.ip_addresses())
    def test_numbers_agree_with_the_library(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address
    ) -> None:
        """Each address comes back, and two have one number only if they are one."""
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        expected = address if mapped is None else mapped
        assert expected == ipaddress.ip_address(address_text(number(str(address))))
        assert expected.is_loopback == is_loopback(number(str(address)))

    def test_peers_of_every_kind_have_a_number(self) -> None:
        """What accept() returns for each family, and what nobody understands."""
        assert number(CLIENT) == peer_address((CLIENT, 4711))
        assert number(CLIENT) == peer_address((f"::ffff:{CLIENT}", 4711, 0, 0))
        assert number("fe80::1") == peer_address(("fe80::1%eth0", 4711, 0, 2))
        assert [UNIX, UNIX, UNIX] == [peer_address(name) for name in ("", b"\0abc", None)]
        assert UNKNOWN == peer_address(("?", 1))
        left, right = socket.socketpair()
        with left, right:
            assert UNIX == peer_address(left.getpeername())
        assert "unix" == address_text(UNIX)

    @pytest.mark.parametrize(
        ("one", "other", "same"),
        [
            ("192.0.2.1", "192.0.2.1", True),
            ("192.0.2.1", "192.0.2.2", False),
            ("192.0.2.1", "::ffff:192.0.2.1", True),
            ("192.0.2.1", "64:ff9b::192.0.2.1", True),
            ("64:ff9b::192.0.2.1", "64:ff9b::192.0.2.2", False),
            ("64:ff9b:1::192.0.2.1", "64:ff9b:1::192.0.2.2", True),
            ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
            ("2001:db8::1", "2001:db8:0:1::1", False),
            ("2001:db8::1", "2001:db9::1", False),
            ("0.0.0.1", "::1", False),
            ("0.0.0.0", "::", False),
        ],
    )
    def test_a_key_is_an_ipv4_address_or_a_64(self, one: str, other: str, *, same: bool) -> None:
        """Who rotates through his /64 stays one; IPv4 is never lumped together."""
        assert same is (address_key(number(one)) == address_key(number(other)))

    @given(st.ip_addresses())
    def test_keys_fit_into_64_bits(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address
    ) -> None:
        """Of whatever address."""
        assert 0 <= address_key(number(str(address))) < 1 << 64

    def test_loopback_has_no_key_unless_asked_for(self) -> None:
        """A proxy, a bench or a test on the same machine is not one client."""
        local = [number(text) for text in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1")]
        free, limited = Peers(), Peers(limit_loopback=True)
        assert [None] * 4 == [free.key(address) for address in local]
        assert [address_key(address) for address in local] == [limited.key(it) for it in local]
        assert (None, None) == (free.key(UNIX), limited.key(UNIX))
        for text in ("128.0.0.1", "126.255.255.255", "::2", "0.0.0.1", "::127.0.0.1"):
            assert free.key(number(text)) == address_key(number(text))
        assert UNKNOWN == free.key(UNKNOWN)


WALKS: dict[str, tuple[str, str | None, str]] = {
    # what: the peer, X-Forwarded-For, who it is
    "direct": (CLIENT, None, CLIENT),
    "direct, forged": (CLIENT, "198.51.100.1", CLIENT),
    "direct, forged as local": (CLIENT, "127.0.0.1", CLIENT),
    "direct, forged as a proxy": (CLIENT, PROXY, CLIENT),
    "one proxy": (PROXY, CLIENT, CLIENT),
    "one proxy that is an address": ("192.0.2.1", CLIENT, CLIENT),
    "one proxy, seen on a dual-stack socket": (f"::ffff:{PROXY}", CLIENT, CLIENT),
    "one proxy, IPv6": ("2001:db8:f:1::1", CLIENT, CLIENT),
    "a Unix socket": ("unix", CLIENT, CLIENT),
    "one proxy without the header": (PROXY, None, PROXY),
    "one proxy, empty header": (PROXY, "", PROXY),
    "one proxy, forged behind it": (PROXY, f"198.51.100.1, {CLIENT}", CLIENT),
    "one proxy, forged as local behind it": (PROXY, f"127.0.0.1, {CLIENT}", CLIENT),
    "one proxy, garbage behind it": (PROXY, f'"for, \0, %s, {CLIENT}', CLIENT),
    "two proxies": (PROXY, f"{CLIENT}, 10.0.0.2", CLIENT),
    "three proxies, forged": (PROXY, f"::1,{CLIENT},2001:db8:f::9,\t10.0.0.2", CLIENT),
    "two proxies, one not trusted": (PROXY, f"{CLIENT}, 198.51.100.9", "198.51.100.9"),
    "proxies only": (PROXY, "10.0.0.3, 10.0.0.2", "10.0.0.3"),
    "the proxy does not know": (PROXY, f"{CLIENT}, unknown", PROXY),
    "the proxy says nothing": (PROXY, f"{CLIENT}, ", PROXY),
    "a later proxy does not know": (PROXY, f"{CLIENT}, unknown, 10.0.0.2", "10.0.0.2"),
    "port": (PROXY, f"{CLIENT}:4711", CLIENT),
    "IPv6": (PROXY, V6_CLIENT, V6_CLIENT),
    "IPv6 in brackets": (PROXY, f"[{V6_CLIENT}]", V6_CLIENT),
    "IPv6 and port": (PROXY, f"[{V6_CLIENT}]:4711", V6_CLIENT),
    "IPv6 with a zone": (PROXY, "fe80::1%eth0", "fe80::1"),
    "mapped": (PROXY, f"::ffff:{CLIENT}", CLIENT),
    "IPv4 in brackets": (PROXY, f"[{CLIENT}]", PROXY),
    "open bracket": (PROXY, f"[{V6_CLIENT}", PROXY),
    "behind the bracket": (PROXY, f"[{V6_CLIENT}]x", PROXY),
    "port no number": (PROXY, f"{CLIENT}:http", PROXY),
    "port of another script": (PROXY, f"{CLIENT}:\u0663", PROXY),
    "no port": (PROXY, f"{CLIENT}:", PROXY),
    "name": (PROXY, "client.example", PROXY),
    "too long": (PROXY, " " * 300 + CLIENT, PROXY),
    "8 KiB of commas": (PROXY, "," * 8_000 + CLIENT, CLIENT),
    "8 KiB of proxies": (PROXY, "10.0.0.9," * 900 + "10.0.0.2", "10.0.0.9"),
    "as many hops as looked at": (
        *(PROXY, f"{CLIENT}," + ",".join(["10.0.0.2"] * (MAX_HOPS - 1))),
        CLIENT,
    ),
    "more hops than are looked at": (
        *(PROXY, f"{CLIENT},198.51.100.1," + ",".join(["10.0.0.2"] * MAX_HOPS)),
        "10.0.0.2",
    ),
}


def who(peers: Peers, peer: str, header: str | None) -> str:
    """Return the client's address as text."""
    return address_text(peers.client(UNIX if peer == "unix" else number(peer), header))


@pytest.mark.parametrize(("peer", "header", "client"), WALKS.values(), ids=WALKS)
def test_the_header_is_walked_from_the_right(peer: str, header: str | None, client: str) -> None:
    """Only while the hop is trusted: what the client itself wrote counts for nothing."""
    peers = Peers.parse(TRUSTED)
    assert b"x-forwarded-for" == peers.header
    assert client == who(peers, peer, header)


FORWARDED: dict[str, tuple[str, str]] = {
    "IPv4": (f"for={CLIENT}", CLIENT),
    "in another case": (f"FOR={CLIENT};Proto=https", CLIENT),
    "last of the pairs": (f"by=10.0.0.1; host=example.com ;proto=https; for={CLIENT}", CLIENT),
    "quoted": (f'for="{CLIENT}"', CLIENT),
    "quoted with a port": (f'for="{CLIENT}:4711"', CLIENT),
    "IPv6": (f'for="[{V6_CLIENT}]"', V6_CLIENT),
    "IPv6 and port": (f'for="[{V6_CLIENT}]:4711";proto=https', V6_CLIENT),
    "IPv6 and a hidden port": (f'for="[{V6_CLIENT}]:_x"', PROXY),
    "two proxies": (f"for={CLIENT}, for=10.0.0.2", CLIENT),
    "quoted pieces around it": (f'host="example.com";for={CLIENT};by="x"', CLIENT),
    "forged behind it": (f"for=198.51.100.1, for={CLIENT}", CLIENT),
    "an open quotation mark behind it": (f'for="198.51.100.1, for={CLIENT}', CLIENT),
    "a comma in what the client chose": ('for=1.2.3.4;host="x,for=198.51.100.1"', PROXY),
    "pairs in what the client chose": ('host="x,for=198.51.100.1;y=";by="z"', PROXY),
    "semicolons in what the client chose": ('host="x;for=198.51.100.1;y"', PROXY),
    "escapes in what the client chose": (r'host="x\",for=198.51.100.1;y=\""', PROXY),
    "unknown": ("for=unknown", PROXY),
    "hidden": ("for=_hidden", PROXY),
    "no for": ("proto=https", PROXY),
    "empty for": ("for=", PROXY),
    "only quotation marks": ('for=""', PROXY),
    "one quotation mark": ('for="', PROXY),
    "something behind the quotation marks": (f'for="{CLIENT}"x', PROXY),
    "two for": (f"for={CLIENT};for=198.51.100.1", PROXY),
    "port without quotation marks": (f"for={CLIENT}:4711", PROXY),
    "IPv6 without quotation marks": (f"for={V6_CLIENT}", PROXY),
    "bare address": (CLIENT, PROXY),
    "empty": ("", PROXY),
    "too long": (f"for={CLIENT};by={'x' * 300}", PROXY),
}


@pytest.mark.parametrize(("header", "client"), FORWARDED.values(), ids=FORWARDED)
def test_forwarded_is_believed_instead_where_it_is_written(header: str, client: str) -> None:
    """The same walk; nothing that a client can get quoted passes for an entry."""
    peers = Peers.parse(f"{TRUSTED},Forwarded")
    assert b"forwarded" == peers.header
    assert client == who(peers, PROXY, header)
    assert CLIENT == who(peers, CLIENT, "for=198.51.100.1")


HEADERS = st.text() | st.lists(
    st.sampled_from([PROXY, "10.9.9.9", CLIENT, "for=1.2.3.4", "for=", '"', ";", "[::1]", ":1", ""])
).map(",".join)


@given(HEADERS, st.sampled_from(["", ",forwarded"]))
def test_no_header_raises_and_none_counts_from_a_stranger(header: str, more: str) -> None:
    """Whoever is not trusted is himself, and whoever is trusted ends in some address."""
    peers = Peers.parse(TRUSTED + more)
    assert number(CLIENT) == peers.client(number(CLIENT), header)
    address_text(peers.client(number(PROXY), header))
    entry = f"for={CLIENT}" if more else CLIENT
    assert number(CLIENT) == peers.client(number(PROXY), f"{header},{entry}")


def test_trust_is_for_what_is_written() -> None:
    """Networks are exact at both ends, and all of IPv6 does not include IPv4."""
    peers = Peers.parse("192.0.2.64/26,2001:db8::/33,198.51.100.1")
    yes = ("192.0.2.64", "192.0.2.127", "2001:db8::", "2001:db8:7fff:ffff::1", "198.51.100.1")
    no = ("192.0.2.63", "192.0.2.128", "2001:db8:8000::", "2001:db7:ffff::", "198.51.100.0")
    assert [True] * 5 == [peers.trusts(number(text)) for text in yes]
    assert [False] * 5 == [peers.trusts(number(text)) for text in no]
    assert not peers.trusts(UNIX)
    every6, every4 = Peers(["::/0"]), Peers(["0.0.0.0/0"])
    assert (True, False) == (every6.trusts(number("2001:db8::1")), every6.trusts(number(CLIENT)))
    assert (False, True) == (every4.trusts(number("2001:db8::1")), every4.trusts(number(CLIENT)))
    assert Peers(["::ffff:10.0.0.0/104"]).trusts(number(PROXY))
    assert not any(Peers().trusts(address) for address in (UNIX, UNKNOWN, number("127.0.0.1")))
    assert Peers(["unix"]).trusts(UNIX)


def test_proxies_are_kept_in_their_usual_form() -> None:
    """What `trioserver config` shows means the same again."""
    entries = proxy_list(" 10.0.0.0/8,192.0.2.1 UNIX,2001:DB8:0::/48,,10.0.0.0/8,forwarded")
    expected = ("10.0.0.0/8", "192.0.2.1/32", "unix", "2001:db8::/48", "forwarded")
    assert expected == entries
    assert entries == proxy_list(",".join(entries))
    assert () == proxy_list(" , ")


@pytest.mark.parametrize(
    "text", ["10.0.0.1/8", "10.0.0.0/33", "localhost", "*", "10.0.0.0/", "::1/129", "10.0.0.", "["]
)
def test_nonsense_ends_the_start(text: str) -> None:
    """One line names the setting and the entry."""
    with pytest.raises(ValueError, match="no network or address"):
        proxy_list(f"unix,{text}")
    with pytest.raises(SettingsError, match=r"TRUSTED_PROXIES: .*example: 10\.0\.0\.0/8"):
        Peers.parse(text)
    with pytest.raises(SettingsError, match="TRUSTED_PROXIES"):
        Peers([text])
