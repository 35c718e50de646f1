"""Pages of who is there, on a real Redis, with the living and the dead."""

from collections.abc import AsyncIterator, Sequence

import pytest
import trio

from tests.redis_server import RedisServer
from tests.trioserver.presence_stage import call
from trioserver import fleet, presence, presence_page
from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused
from trioserver.messages import Presence
from trioserver.presence import PAGE
from trioserver.presence_page import look, members
from trioserver.redis_link import RedisLink, open_link

LIMIT = 30.0
"""Seconds after which a test is stuck."""

TOPIC = "room:7"
ALIVE, ALSO, DEAD = "aa.1.1", "bb.1.1", "cc.1.1"


@pytest.fixture
async def link(redis: RedisServer) -> AsyncIterator[RedisLink]:
    """A link to a Redis where two workers live."""
    redis.command("FLUSHALL")
    for load in presence.LOADS:
        call(redis, load)
    clock = redis.command("TIME")
    assert isinstance(clock, list)
    for life in (ALIVE, ALSO):
        redis.command("ZADD", fleet.LIVES_KEY, int(clock[0]) * 1000 + 600_000, life)
    with trio.fail_after(LIMIT):
        async with open_link(Endpoint(path=str(redis.path))) as link:
            yield link


def come(redis: RedisServer, life: str, *users: str) -> None:
    """Have one connection of each user subscribe."""
    what = presence.about("", "web", 1_763_630_000)
    entries = [
        (presence.entry(presence.who(user), life, f"{life}-{user}", what), "") for user in users
    ]
    call(redis, presence.come(TOPIC, "", entries))


async def pages(link: RedisLink) -> list[Presence]:
    """Return all pages."""
    found = [await members(link, TOPIC)]
    while found[-1].next is not None:
        found.append(await members(link, TOPIC, found[-1].next))
    return found


def users(found: Sequence[Presence]) -> list[str]:
    """Return who is on them."""
    return [one.user for page in found for one in page.members]


async def test_nobody_is_there(link: RedisLink) -> None:
    """A topic that nobody knows has one empty page."""
    assert [Presence(TOPIC, 0, 0, [])] == await pages(link)


async def test_everybody_is_on_one_page_once(redis: RedisServer, link: RedisLink) -> None:
    """In the order of users, `PAGE` at a time, with the numbers of all."""
    names = [f"u{number:04}" for number in range(2 * PAGE + 10)]
    come(redis, ALIVE, *names)
    come(redis, ALSO, *names[:5])
    found = await pages(link)
    assert [PAGE, PAGE, 15] == [len(page.members) for page in found]
    assert sorted(names + names[:5]) == users(found)
    assert {(2 * PAGE + 15, 2 * PAGE + 10)} == {(one.connections, one.users) for one in found}


async def test_a_full_page_may_be_the_last(redis: RedisServer, link: RedisLink) -> None:
    """Nobody is sent for a page that has nothing on it."""
    come(redis, ALIVE, *(f"u{number:04}" for number in range(PAGE)))
    assert [PAGE] == [len(page.members) for page in await pages(link)]


async def test_pages_are_stable(redis: RedisServer, link: RedisLink) -> None:
    """Who comes or goes between two pages moves nobody else from one to the other."""
    names = [f"u{number:04}" for number in range(2 * PAGE)]
    come(redis, ALIVE, *names)
    first = await members(link, TOPIC)
    come(redis, ALIVE, "a", "u0010b")
    entry = presence.entry(
        presence.who("u0099"), ALIVE, f"{ALIVE}-u0099", presence.about("", "web", 1_763_630_000)
    )
    call(redis, presence.go(TOPIC, "", [entry]))
    second = await members(link, TOPIC, first.next)
    assert names == users([first, second])


async def test_the_dead_do_not_count(redis: RedisServer, link: RedisLink) -> None:
    """Right numbers at once, although their entries are still there."""
    come(redis, DEAD, *(f"u{number:04}" for number in range(20)))
    come(redis, ALIVE, "u0003", "u0004")
    come(redis, ALSO, "u0004", "zoe")
    page, left_behind = await look(link, TOPIC, None)
    assert left_behind
    assert ["u0003", "u0004", "u0004", "zoe"] == users([page])
    assert (4, 3, None) == (page.connections, page.users, page.next)


async def test_many_dead_among_many(redis: RedisServer, link: RedisLink) -> None:
    """On every page the users are those who live, counted one by one."""
    names = [f"u{number:04}" for number in range(1500)]
    come(redis, DEAD, *names)
    come(redis, ALIVE, *names[::10])
    found = await pages(link)
    assert names[::10] == users(found)
    assert {(150, 150)} == {(page.connections, page.users) for page in found}


async def test_a_page_looks_at_a_bounded_number(
    redis: RedisServer, link: RedisLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nearly all are dead a page is short, but whoever goes on finds the others."""
    monkeypatch.setattr(presence_page, "MOST_READS", 2)
    come(redis, DEAD, *(f"u{number:04}" for number in range(1500)))
    come(redis, ALIVE, "u0000", "u1400")
    found = await pages(link)
    assert 2 < len(found) < 6
    assert ["u0000", "u1400"] == users(found)


async def test_beyond_a_bound_users_are_an_upper_bound(
    redis: RedisServer, link: RedisLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting them ends somewhere; there are no more of them than connections."""
    monkeypatch.setattr(presence_page, "MOST_COUNTS", 1)
    monkeypatch.setattr(presence, "COUNTED", 100)
    come(redis, DEAD, *(f"u{number:04}" for number in range(50)))
    come(redis, ALIVE, *(f"v{number:04}" for number in range(120)))
    come(redis, ALSO, *(f"v{number:04}" for number in range(120)))
    page = await members(link, TOPIC)
    assert (240, 170) == (page.connections, page.users)


async def test_garbage_is_the_first_page(redis: RedisServer, link: RedisLink) -> None:
    """Whoever makes up a cursor begins at the beginning."""
    come(redis, ALIVE, "ann")
    for cursor in ("x", "!!", "YQ==", "\x00", "ä"):
        assert ["ann"] == users([await members(link, TOPIC, cursor)])


async def test_somebody_elses_key(redis: RedisServer, link: RedisLink) -> None:
    """A key of the wrong type is one that is not there; what is not ours is not shown."""
    redis.command("SET", presence.members_key(TOPIC), "what?")
    redis.command("SET", presence.counts_key(TOPIC), "what?")
    assert [Presence(TOPIC, 0, 0, [])] == await pages(link)
    redis.command("FLUSHALL")
    redis.command("ZADD", presence.members_key(TOPIC), 0, b"\xff\x00 stranger")
    assert [Presence(TOPIC, 0, 0, [])] == await pages(link)


@pytest.mark.parametrize("command", ["zrangebylex", "evalsha"])
async def test_a_redis_that_refuses(redis: RedisServer, link: RedisLink, command: str) -> None:
    """The caller hears of it, be it about the page or about the number of users."""
    come(redis, ALIVE, *(f"u{number:04}" for number in range(PAGE + 1)))
    come(redis, DEAD, "ann")
    redis.command("ACL", "SETUSER", "default", f"-{command}")
    try:
        with pytest.raises(RedisRefused, match="NOPERM"):
            await members(link, TOPIC)
    finally:
        redis.command("ACL", "SETUSER", "default", "+@all")
