"""The command ``presence``, on a real Redis."""

import json
from functools import partial

import pytest

from tests.redis_server import RedisServer, free_port
from tests.trioserver.presence_stage import call
from tests.trioserver.terminal import Ran, Run
from trioserver import fleet, presence, users
from trioserver.fleet import Card
from trioserver.presence import PAGE

ALIVE, ALSO, DEAD = "aa.1.1", "bb.2.1", "cc.3.1"
SINCE = 1_763_630_000


@pytest.fixture
def run(run: Run, redis: RedisServer) -> Run:
    """Run ``trioserver presence`` in a fleet of two workers."""
    for load in (*presence.LOADS, *fleet.LOADS, *users.LOADS):
        call(redis, load)
    for life in (ALIVE, ALSO):
        redis.command("ZADD", fleet.LIVES_KEY, now(redis) * 1000 + 600_000, life)
    return partial(run, "presence")


def now(redis: RedisServer) -> int:
    """Return the seconds since 1970."""
    clock = redis.command("TIME")
    assert isinstance(clock, list)
    return int(clock[0])


def subscribe(redis: RedisServer, life: str, *names: str) -> None:
    """Have a phone of each user subscribe to a room."""
    what = presence.about("phone", "web", SINCE)
    entries = [
        (presence.entry(presence.who(name), life, f"{life}-{name}", what), "") for name in names
    ]
    call(redis, presence.come("room:7", "", entries))


def connect(redis: RedisServer, life: str, user: str) -> None:
    """Have a user connect."""
    card = Card("phone", "web", "Firefox", "::1", SINCE, now(redis))
    call(redis, fleet.enter(user, f"{life}/{life}-1", fleet.encode(card), 0))


def test_a_topic(run: Run, redis: RedisServer) -> None:
    """Who is subscribed, of those who live; as text and as JSON."""
    subscribe(redis, ALIVE, "ann")
    subscribe(redis, ALSO, "ann", "bob")
    subscribe(redis, DEAD, "cy")
    about = "since 2025-11-20T09:13:20.000Z, device phone, web"
    lines = [
        "topic room:7: 3 connections of 2 users",
        *(f"  {user} {about}" for user in ("ann", "ann", "bob")),
    ]
    assert Ran(0, "\n".join(lines) + "\n", "") == run("--topic", "room:7")
    page = json.loads(run("--topic", "room:7", "--json").out)
    assert (3, 2, 3) == (page["connections"], page["users"], len(page["members"]))


def test_a_long_list(run: Run, redis: RedisServer) -> None:
    """All pages are shown."""
    subscribe(redis, ALIVE, *(f"u{number:03}" for number in range(PAGE + 1)))
    assert PAGE + 2 == len(run("--topic", "room:7").out.splitlines())
    assert 2 == len(run("--topic", "room:7", "--json").out.splitlines())


def test_a_user(run: Run, redis: RedisServer) -> None:
    """Where he is connected, on workers that live."""
    connect(redis, ALIVE, "ann")
    connect(redis, DEAD, "ann")
    line = "aa.1.1-1 since 2025-11-20T09:13:20.000Z, device phone, web, ::1, Firefox"
    assert Ran(0, f"user ann: 1 connection\n  {line}\n", "") == run("--user", "ann")
    assert Ran(0, "user bob: 0 connections\n", "") == run("--user", "bob")
    shown = json.loads(run("--user", "ann", "--json").out)
    assert ("ann", ["aa.1.1-1"]) == (
        shown["user"],
        [one["connection_id"] for one in shown["connections"]],
    )


def test_the_fleet(run: Run, redis: RedisServer) -> None:
    """Servers, workers, and users of all of them; connections only if a server runs here."""
    for life, names in ((ALIVE, ("ann", "bob")), (ALSO, ("bob", "cy")), (DEAD, ("di",))):
        redis.command("PFADD", users.key(life), *names)
    expected = (
        "2 workers on 2 servers, about 3 users connected\n"
        "  server aa: 1 worker\n"
        "  server bb: 1 worker\n"
    )
    assert Ran(0, expected, "") == run()
    assert {
        "servers": 2,
        "workers": 2,
        "unique_users": 3,
        "connections_here": None,
        "lives": [ALIVE, ALSO],
    } == json.loads(run("--json").out)


def test_wrong_use(run: Run) -> None:
    """One line says what is wrong."""
    assert 2 == run("--user", "ann", "--topic", "room").code
    ran = run("--topic", "no name")
    assert (1, "trioserver: 'no name' is no name of a topic\n") == (ran.code, ran.err)


def test_a_topic_nobody_keeps(
    run: Run, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That nobody is known to be there is not taken for that nobody is there."""
    empty = run("--topic", "room:7")
    monkeypatch.setenv("PRESENCE_TOPICS", "lobby")
    unknown = run("--topic", "room:7")
    subscribe(redis, ALIVE, "ann")
    known = run("--topic", "room:7")

    doubt = "trioserver: nobody, or it is not among the PRESENCE_TOPICS of the server\n"
    assert Ran(0, "topic room:7: 0 connections of 0 users\n", doubt) == empty
    problem = "trioserver: nobody keeps who is subscribed to room:7: PRESENCE_TOPICS does not name"
    assert (1, "", f"{problem} it\n") == (unknown.code, unknown.out, unknown.err)
    assert (0, "") == (known.code, known.err)


def test_no_redis(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown if it is not known."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    ran = run()
    assert (1, "") == (ran.code, ran.out)
    assert ran.err.startswith("trioserver: ")
