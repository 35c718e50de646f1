"""Limits of the whole server, on the real command: who is one too many, and who never is."""

import functools
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.integration.crowds import GONE, Crowd, Visit, Visitor
from tests.integration.measuring import address
from tests.redis_server import RedisServer
from tests.running import Running, eventually, running
from trioserver import fleet

ROOM: Final = 40
PER_ADDRESS: Final = 10
PER_USER: Final = 10
OTHERS: Final = 1
"""Workers beside the one that admits: so many may be one too many where they are counted."""

HURRY: Final = {"HANDSHAKES_PER_SECOND": "0", "HANDSHAKES_PER_SECOND_PER_IP": "0"}
"""Nobody comes too fast, only too many."""

PROXY: Final = "127.9.0.1"
SECONDS: Final = 20.0
"""For what takes a moment."""

_addresses = itertools.count(1)


def fresh() -> str:
    """Return an address of the loopback that nobody has come from."""
    return "127.1.{}.{}".format(*divmod(next(_addresses), 250))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Where the fleet's register is."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Running]:
    """Two workers with little room; nobody may hurry too much."""
    environ = HURRY | {
        "REDIS_URL": redis.url,
        "WS_MAX_CONNECTIONS": str(ROOM),
        "MAX_CONNECTIONS_PER_IP": str(PER_ADDRESS),
        "MAX_CONNECTIONS_PER_USER": str(PER_USER),
        "LIMIT_LOOPBACK": "true",
        "TRUSTED_PROXIES": "127.9.0.0/16",
    }
    with running(tmp_path_factory.mktemp("server"), environ=environ) as started:
        yield started
        assert "Traceback" not in started.log


@pytest.fixture
def crowd(server: Running) -> Iterator[Crowd]:
    """Nobody yet; nobody any more afterwards."""
    with Crowd(address(server)) as visitors:
        yield visitors
    eventually(lambda: not any(counts(server)), SECONDS, "everybody is gone")


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two workers with much room, where not many may come at once; of each address as shipped."""
    environ = {"LIMIT_LOOPBACK": "true", "HANDSHAKES_PER_SECOND": "60"}
    with running(tmp_path_factory.mktemp("strict"), environ=environ) as started:
        yield started
        assert "Traceback" not in started.log


def workers(server: Running) -> list[dict[str, Any]]:
    """Return what the supervisor says of its workers."""
    status = server.status()
    assert status is not None
    found: list[dict[str, Any]] = status["workers"]
    return found


def counts(server: Running) -> list[int]:
    """Return how many connections each worker has."""
    return [worker["connections"] for worker in workers(server)]


def entries(redis: RedisServer, user: str) -> int:
    """Return how many connections of a user the fleet knows of."""
    count = redis.command("HLEN", fleet.key(user))
    assert isinstance(count, int)
    return count


def all_known(redis: RedisServer, user: str) -> bool:
    """Return whether the fleet knows of as many connections of a user as there may be."""
    return entries(redis, user) == PER_USER


def kill_one(server: Running) -> int:
    """End a worker by SIGKILL; return how many it had, as soon as its successor is ready."""
    victim = next(one for one in workers(server) if one["connections"])
    slot, before = victim["slot"], victim["pid"]
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        worker = workers(server)[slot]
        return worker["pid"] not in {None, before} and worker["ready"]

    eventually(back, SECONDS, "the worker has a successor")
    had: int = victim["connections"]
    return had


def filling(room: int = ROOM) -> list[Visit]:
    """Return visits that take all the places there are: of the server, of addresses, of users."""
    sources = [fresh() for _ in range(room // PER_ADDRESS)]
    return [
        Visit(source=sources[number // PER_ADDRESS], user=f"u{number // PER_USER}")
        for number in range(room)
    ]


def strangers(count: int) -> list[Visit]:
    """Return visits that have nothing in common."""
    return [Visit(source=fresh(), user=f"stranger-{number}") for number in range(count)]


def refusals(visitors: list[Visitor]) -> set[tuple[int | None, str]]:
    """Return how those were refused who were: the status and the reason."""
    return {(one.status, one.why) for one in visitors if one.status != 101}


FULL: Final = (503, "the server is full")
CROWDED: Final = (429, "too many connections from this address")


def test_the_servers_connections_are_limited_over_all_workers(
    server: Running, crowd: Crowd
) -> None:
    """All who fit are let in, of many at once no more, and whoever leaves makes room."""
    come = crowd.come(strangers(ROOM + 20))
    let_in = len(crowd.staying)
    assert ROOM <= let_in <= ROOM + OTHERS
    assert {FULL} == refusals(come)
    assert all(int(one.headers["retry-after"]) >= 1 for one in come if one.status == 503)
    eventually(lambda: all(counts(server)), SECONDS, "both have some")
    crowd.leave(crowd.staying[: let_in - ROOM + 3])
    eventually(lambda: sum(counts(server)) == ROOM - 3, SECONDS, "they are gone")
    for _ in range(5):
        crowd.come(strangers(1))
    assert ROOM == len(crowd.staying)


def test_after_a_kill_all_who_were_there_can_come_back(server: Running, crowd: Crowd) -> None:
    """As soon as a successor is ready nothing is counted that is gone, and all that is there."""
    crowd.come(filling())
    assert ROOM == len(crowd.staying)
    eventually(lambda: sum(counts(server)) == ROOM, SECONDS, "all are counted")
    had = kill_one(server)
    crowd.wait(lambda: len(crowd.staying) == ROOM - had, "they have noticed")
    lost = [one.visit for one in crowd.visitors if one.over]
    assert 0 < len(lost) < ROOM
    # All places of the server, of each address and of each user are needed for that.
    come = crowd.come(lost)
    assert set() == refusals(come)
    assert {FULL} == refusals(crowd.come(strangers(1)))
    crowd.listen(0.5)
    assert ROOM == len(crowd.staying), Counter(one.closing for one in come)
    # Who survived is counted as ever.
    crowd.leave(crowd.staying[-1:])
    where = crowd.staying[0].visit.source
    assert {CROWDED} == refusals(crowd.come([Visit(source=where, user="somebody")]))
    (eleventh,) = crowd.come([Visit(source=fresh(), user=crowd.staying[0].visit.user)])
    crowd.wait(lambda: eleventh.over, "one too many")
    assert (4409, "superseded") == eleventh.closing


def test_an_addresss_connections_are_limited_over_all_workers(
    server: Running, crowd: Crowd
) -> None:
    """The one beyond gets 429 and when to come again; another address gets in."""
    source = fresh()
    for batch in range(4):
        # More at once may be too many handshakes instead, which is another limit.
        crowd.come(Visit(source=source, user=f"u{batch}-{number}") for number in range(5))
    come = crowd.visitors
    assert PER_ADDRESS <= len(crowd.staying) <= PER_ADDRESS + OTHERS
    assert {CROWDED} == refusals(come)
    assert all(int(one.headers["retry-after"]) >= 1 for one in come if one.status == 429)
    assert set() == refusals(crowd.come(strangers(3)))


@pytest.mark.parametrize(
    ("clients", "others"),
    [
        (["198.51.100.7"] * 20, ["198.51.100.8", "2001:db8:1:2::7"]),
        ([f"2001:db8:7:7:{number:x}::1" for number in range(20)], ["2001:db8:7:8::1"]),
        # What the client itself has written stands left of what the proxy has.
        ([f"198.51.100.{number}, 203.0.113.9" for number in range(20)], ["203.0.113.10"]),
    ],
    ids=["one address", "all of a /64", "forged"],
)
def test_a_proxys_clients_are_limited_each_on_its_own(
    crowd: Crowd, clients: list[str], others: list[str]
) -> None:
    """The address in the header of a trusted proxy counts, and of IPv6 the /64."""
    come = crowd.come(
        Visit(source=PROXY, forwarded=client, user=f"u{number}")
        for number, client in enumerate(clients)
    )
    assert PER_ADDRESS <= len(crowd.staying) <= PER_ADDRESS + OTHERS
    assert {CROWDED} == refusals(come)
    assert set() == refusals(
        crowd.come(Visit(source=PROXY, forwarded=other, user="other") for other in others)
    )


def test_nobody_else_says_whose_connection_it_is(crowd: Crowd) -> None:
    """Of a client that is no trusted proxy the header is not read, however it changes."""
    source = fresh()
    for batch in range(4):
        crowd.come(
            Visit(source=source, forwarded=f"198.51.100.{batch}{number}", user=f"u{batch}-{number}")
            for number in range(5)
        )
    assert PER_ADDRESS <= len(crowd.staying) <= PER_ADDRESS + OTHERS
    assert {CROWDED} == refusals(crowd.visitors)


def test_a_users_connections_are_limited_over_all_workers(
    server: Running, redis: RedisServer, crowd: Crowd
) -> None:
    """Of many at once exactly as many stay; the others are closed with 4409, wherever they are."""
    come = crowd.come(Visit(source=fresh(), user="ann") for _ in range(PER_USER + 14))
    assert set() == refusals(come), "who it is comes to light behind the door"
    crowd.wait(lambda: sum(one.over for one in come) >= 14, "those beyond are closed")
    assert (PER_USER, PER_USER) == (len(crowd.staying), entries(redis, "ann"))
    assert {(4409, "superseded")} == {one.closing for one in come if one.over}
    # Whichever worker they reach.
    late = crowd.come(Visit(source=fresh(), user="ann") for _ in range(10))
    crowd.wait(lambda: all(one.over for one in late), "those who come later, too")
    assert {(4409, "superseded")} == {one.closing for one in late}
    assert PER_USER == len(crowd.staying)
    # Somebody else is not concerned, and a place is free again as soon as somebody leaves it.
    crowd.come([Visit(source=fresh(), user="bob")])
    crowd.leave(crowd.staying[:1])
    eventually(lambda: entries(redis, "ann") == PER_USER - 1, SECONDS, "the place is free")
    crowd.come([Visit(source=fresh(), user="ann")])
    eventually(lambda: entries(redis, "ann") == PER_USER, SECONDS, "the place is taken")
    crowd.listen(0.1)
    assert PER_USER + 1 == len(crowd.staying)


def test_without_redis_no_user_has_too_many(
    server: Running, redis: RedisServer, crowd: Crowd
) -> None:
    """Whoever comes during an outage is let in and stays; afterwards the limit holds again."""
    crowd.come([Visit(source=fresh(), user="eve")])
    eventually(lambda: entries(redis, "eve") == 1, SECONDS, "she is known")
    redis.kill()
    try:
        come = crowd.send(Visit(source=fresh(), user="eve") for _ in range(15))
        crowd.wait(lambda: all(one.status is not None for one in come), "all are answered")
    finally:
        redis.start()
    assert set() == refusals(come)
    crowd.wait(lambda: entries(redis, "eve") == 16, "all are known", SECONDS)
    crowd.wait(lambda: len(crowd.staying) == 16, "all are served", SECONDS)
    eventually(lambda: all(one["ready"] for one in workers(server)), SECONDS, "ready again")
    (late,) = crowd.come([Visit(source=fresh(), user="eve")])
    crowd.wait(lambda: late.over, "one too many")
    assert (4409, "superseded") == late.closing
    assert 16 == len(crowd.staying)


def most(per_second: float, window: float, seconds: float) -> float:
    """Return how many handshakes may be let in at most within so many seconds."""
    # Whoever is in the middle of one, and once more where a window begins.
    return per_second * window + 1 + per_second * seconds + 2 * OTHERS


def test_a_thousand_handshakes_from_one_address_in_a_second(strict: Running) -> None:
    """Four seconds' worth get in at once, everybody else 429; another address is let in."""
    source = fresh()
    began = time.monotonic()
    with Crowd(address(strict)) as crowd:
        for batch in range(10):
            crowd.send(Visit(source=source, user=f"u{batch}-{n}") for n in range(100))
            crowd.listen(0.01)
        (other,) = crowd.come(strangers(1))
        assert 101 == other.status
        crowd.wait(lambda: all(one.judged for one in crowd.visitors), "all have an answer", 30.0)
        took = time.monotonic() - began
        statuses = Counter(one.status for one in crowd.visitors)
        assert 20 < statuses[101] < 1 + most(5, 4, took)
        # Too many sockets at once are turned away so early that the answer may get lost.
        assert {101, 429} <= set(statuses) <= {101, 429, GONE}, statuses
        refused = [one for one in crowd.visitors if one.status == 429]
        assert (429, "too many handshakes from this address") in refusals(refused)
        assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    eventually(lambda: not any(counts(strict)), SECONDS, "everybody is gone")


def test_the_servers_handshakes_are_limited_whoever_comes(strict: Running) -> None:
    """A second's worth get in at once, everybody else 503: a storm is spread out."""
    began = time.monotonic()
    with Crowd(address(strict)) as crowd:
        come = crowd.come(strangers(300), 30.0)
        took = time.monotonic() - began
        # Those of the second before may count still.
        assert 30 < len(crowd.staying) < most(60, 1, took)
        assert {(503, "too many handshakes, come again")} == refusals(come)
        assert all(int(one.headers["retry-after"]) >= 1 for one in come if one.status == 503)


@pytest.mark.slow
def test_after_a_kill_of_everything_users_can_come_back(tmp_path: Path, redis: RedisServer) -> None:
    """At once where the same server starts again, after two leases' time on any other."""
    environ = HURRY | {"REDIS_URL": redis.url, "MAX_CONNECTIONS_PER_USER": str(PER_USER)}
    homes = {"zoe": tmp_path / "one", "yan": tmp_path / "two"}
    for user, home in homes.items():
        doomed = Running(home, 2, environ)
        try:
            where = address_when_ready(doomed)
            with Crowd(where) as crowd:
                crowd.come([Visit(user=user)] * PER_USER)
                eventually(functools.partial(all_known, redis, user), SECONDS, "they are known")
                began = time.monotonic()
                doomed.process.kill()
        finally:
            doomed.end(signal.SIGKILL)
    with running(homes["zoe"], environ=environ) as again, Crowd(address(again)) as crowd:
        crowd.come([Visit(user="zoe")] * PER_USER)
        eventually(lambda: entries(redis, "zoe") == PER_USER, SECONDS, "they are back")
        crowd.listen(1.0)
        assert PER_USER == len(crowd.staying)
    with running(tmp_path / "other", environ=environ) as other, Crowd(address(other)) as crowd:
        while len(crowd.staying) < PER_USER:
            assert time.monotonic() - began < 2 * fleet.LEASE_SECONDS, "leases are over"
            crowd.come([Visit(user="yan")] * (PER_USER - len(crowd.staying)))
            crowd.listen(0.5)
        eventually(lambda: entries(redis, "yan") == PER_USER, SECONDS, "they are back")
        crowd.listen(1.0)
        assert PER_USER == len(crowd.staying)


def address_when_ready(server: Running) -> tuple[str, int]:
    """Return where a server is as soon as it is ready."""
    server.wait_ready()
    return address(server)
