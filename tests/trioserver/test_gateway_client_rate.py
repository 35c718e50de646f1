"""The rate of requests: who is a client, and how much one may ask."""

import pytest

from tests.trioserver.gateway_process import Answer
from tests.trioserver.serving import serving
from trioserver.gateway.api_keys import ApiKeys
from trioserver.gateway.client_rate import EXEMPT, ClientRate
from trioserver.peers import Peers, peer_address

KEYS = ApiKeys(["first-key", "second-key"])
FAR = "192.0.2.1"


def rate(*trusted: str, limit_loopback: bool = False, per_second: float = 10.0) -> ClientRate:
    """Return a limit whose buckets are full."""
    return ClientRate(KEYS, Peers(trusted, limit_loopback=limit_loopback), per_second)


def allowed(limit: ClientRate, peer: str, *lines: tuple[bytes, bytes], now: float = 0.0) -> int:
    """Return how many requests pass at once, of a hundred."""
    scope = {"path": "/api/v1/notifications", "client": (peer, 1), "headers": [*lines]}
    return [limit.take(scope, now) for _ in range(100)].count(0.0)


def key(text: bytes) -> tuple[bytes, bytes]:
    """Return the header of a key."""
    return b"x-api-key", text


def test_two_seconds_worth_at_once_then_the_rate() -> None:
    """Exactly 20, a wait that is enough and no longer, then 10 in every second."""
    limit = rate()
    assert 20 == allowed(limit, FAR)
    scope = {"path": "/", "client": (FAR, 1), "headers": []}
    assert pytest.approx(0.1) == limit.take(scope, 0.0)
    assert 0.0 == limit.take(scope, 0.1)
    assert 10 == allowed(limit, FAR, now=1.1)
    assert 20 == allowed(limit, FAR, now=10.0)


def test_a_key_is_a_client_wherever_it_calls_from() -> None:
    """Several addresses share the key's bucket; one address has a bucket for each key."""
    limit = rate()
    assert 20 == allowed(limit, FAR, key(b"first-key"))
    assert 0 == allowed(limit, "192.0.2.2", key(b"first-key"))
    assert 20 == allowed(limit, FAR, key(b"second-key"))
    assert 20 == allowed(limit, FAR)


def test_guessing_keys_counts_against_the_address() -> None:
    """Every guess and no key at all come out of one bucket; the good key is none the worse."""
    limit = rate()
    assert 20 == sum(allowed(limit, FAR, key(b"guess-%d" % number)) for number in range(5))
    assert 0 == allowed(limit, FAR)
    assert 0 == allowed(limit, FAR, key(b"first-key"), key(b"first-key"))
    assert 20 == allowed(limit, FAR, key(b"first-key"))


def test_of_ipv6_a_subscriber_is_a_client() -> None:
    """All of a /64 shares a bucket, the next /64 has its own."""
    limit = rate()
    assert 20 == allowed(limit, "2001:db8::1") + allowed(limit, "2001:db8::2:3:4:5")
    assert 20 == allowed(limit, "2001:db8:0:1::1")


def test_the_client_behind_a_proxy_is_the_client() -> None:
    """Of a trusted proxy the header is believed, of nobody else; the other header of nobody."""
    forged = (b"x-forwarded-for", b"203.0.113.9")
    limit = rate("10.0.0.0/8")
    assert 20 == allowed(limit, "10.0.0.1", forged)
    assert 0 == allowed(limit, "10.0.0.2", (b"x-forwarded-for", b"1.1.1.1"), forged)
    assert 20 == allowed(limit, "10.0.0.1", (b"forwarded", b"for=203.0.113.9"))
    assert 20 == allowed(limit, FAR, forged)
    assert 0 == allowed(limit, FAR, (b"x-forwarded-for", b"203.0.113.10"))


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_is_limited_only_if_asked_for(peer: str) -> None:
    """With or without a key; a trusted proxy on it speaks for others."""
    assert 100 == allowed(rate(), peer)
    assert 100 == allowed(rate(), peer, key(b"first-key"))
    assert 100 == allowed(rate(), peer, key(b"wrong"))
    assert 20 == allowed(rate(limit_loopback=True), peer)
    assert 20 == allowed(rate(limit_loopback=True), peer, key(b"first-key"))
    assert 20 == allowed(rate("127.0.0.0/8", "::1"), peer, (b"x-forwarded-for", FAR.encode()))


@pytest.mark.parametrize("path", sorted(EXEMPT))
def test_monitors_are_not_counted(path: str) -> None:
    """Health, readiness and metrics are answered however much else is asked."""
    limit = rate()
    allowed(limit, FAR)
    scope = {"path": path, "client": (FAR, 1), "headers": []}

    assert 0.0 == limit.take(scope, 0.0)


def test_less_than_one_in_a_second_and_no_limit() -> None:
    """A small rate lets one through at once; 0 lets everything through."""
    assert 1 == allowed(rate(per_second=0.1), FAR)
    assert 100 == allowed(rate(per_second=0.0), FAR)


def test_what_was_no_request_counts_against_the_address() -> None:
    """It comes out of the same bucket as requests without a key; who has no address is not."""
    limit = rate()
    address = Peers().key(peer_address((FAR, 1)))

    assert 5 == [limit.take_refused(address, 0.0) for _ in range(5)].count(0.0)
    assert 15 == allowed(limit, FAR)
    assert pytest.approx(0.1) == limit.take_refused(address, 0.0)
    assert 0.0 == limit.take_refused(None, 0.0)
    assert 20 == allowed(limit, FAR, key(b"first-key"))


async def test_one_too_many_is_a_429_and_reaches_nothing() -> None:
    """A problem that says when to come back; the application is not asked, monitors are served."""
    limit = rate(limit_loopback=True, per_second=0.01)
    get = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with serving(limit) as served:
        first = Answer.parse(await served.ask(get % b"/a"))
        second = Answer.parse(await served.ask(get % b"/b"))
        health = Answer.parse(await served.ask(get % b"/healthz"))

    assert [200, 429, 200] == [answer.status for answer in (first, second, health)]
    assert 90 < int(second.headers["Retry-After"]) <= 100
    assert "application/problem+json" == second.headers["Content-Type"]
    assert b"requests a second" in second.body
    assert ["/a", "/healthz"] == served.paths
