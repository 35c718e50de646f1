"""Scripts on a real Redis that forgets them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer
from trioserver import ledger, scripting
from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Command, Notification, Rules
from trioserver.redis_link import RedisLink, Reply, open_link

LIMIT = 20.0
"""Seconds after which a test is stuck."""

RULES = Rules()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, which knows no scripts."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


class Trips:
    """Counts answered requests of a link."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _seconds: float) -> None:
        """Count."""
        self.count += 1


@pytest.fixture
def trips() -> Trips:
    """The round trips of the link."""
    return Trips()


@pytest.fixture
async def link(redis: RedisServer, trips: Trips) -> AsyncIterator[RedisLink]:
    """A link to it."""
    with trio.fail_after(LIMIT):
        async with open_link(Endpoint(path=str(redis.path)), observe=trips) as link:
            yield link


async def well(link: RedisLink) -> None:
    """Return as soon as the link has noticed that Redis is another process now."""
    while True:
        with suppress(RedisUnavailable):
            await link.ping()
            return


def publish(number: int, user: str = "ann") -> Command:
    """Return the command that publishes a number."""
    one = Notification(
        user=user,
        payload=b"%d" % number,
        ttl_ms=60_000,
        id=ledger.new_id(ledger.partition(user), 1_763_630_000_000 + number),
    )
    return ledger.publish(one, rules=RULES)


def seqs(replies: list[Reply | RedisRefused]) -> list[int]:
    """Return the seqs of accepted notifications."""
    return [ledger.accepted(reply).seq for reply in replies]


async def test_a_redis_that_knows_no_scripts_is_given_them(
    redis: RedisServer, link: RedisLink, trips: Trips
) -> None:
    """Three round trips the first time, one ever after; each command has run once, in order."""
    assert list(range(1, 6)) == seqs(await scripting.run(link, [publish(i) for i in range(5)]))
    assert 3 == trips.count
    assert list(range(6, 11)) == seqs(await scripting.run(link, [publish(i) for i in range(5)]))
    assert 4 == trips.count
    assert len(ledger.SCRIPTS) == redis.commands_seen("script|load")
    assert 10 == redis.command("XLEN", ledger.key("inbox", "ann"))


@pytest.mark.parametrize("known", sorted(ledger.SCRIPTS))
async def test_replies_stay_in_their_places_if_only_one_script_is_known(
    redis: RedisServer, link: RedisLink, known: str
) -> None:
    """What ran at once and what had to run again are told apart by nobody."""
    redis.command("SCRIPT", "LOAD", ledger.SCRIPTS[known].text)
    commands = [
        publish(1),
        ("ECHO", "between"),
        ledger.read("bob", nonce="bobbob00"),
        ledger.due("p00", rules=RULES),
        ledger.mark("bob", device="", by="", up_to=1, rules=RULES),
        ledger.cancel("bob", "p00-none", rules=RULES),
        ledger.report("bob", device="d", rules=RULES),
        publish(2),
    ]
    replies = await scripting.run(link, commands)
    assert [1, 2] == seqs([replies[0], replies[-1]])
    assert b"between" == replies[1]
    # Whichever of these came first has made the epoch.
    assert 0 == ledger.page(replies[2]).unread
    assert (0, -1) == ledger.settled(replies[3])
    assert (0, 0) == ledger.marked(replies[4])
    assert "unknown" == ledger.cancelled(replies[5])
    assert 0 == ledger.acked(replies[6])


async def test_scripts_may_be_forgotten_at_any_time(redis: RedisServer, link: RedisLink) -> None:
    """Flushed or restarted, nothing is lost and nothing happens twice."""
    for number in range(1, 6):
        assert [number] == seqs(await scripting.run(link, [publish(number)]))
        redis.command("SCRIPT", "FLUSH")
    redis.stop()
    redis.start()
    await well(link)
    assert [6] == seqs(await scripting.run(link, [publish(6)]))


async def test_other_refusals_are_values_and_nothing_is_repeated(
    redis: RedisServer, link: RedisLink, trips: Trips
) -> None:
    """Only for want of a script is a command run again."""
    await scripting.run(link, [publish(1)])
    trips.count = 0
    redis.command("CONFIG", "RESETSTAT")
    bad = ("EVALSHA", ledger.SCRIPTS["publish"].sha, 1, ledger.key("meta", "ann"), "nonsense", "1")
    replies = await scripting.run(link, [bad, publish(2), ("INCR", ledger.key("meta", "ann"))])
    refused = [str(reply) for reply in (replies[0], replies[2]) if isinstance(reply, RedisRefused)]
    assert [True, True] == [
        refused[0].startswith(ledger.BAD_REQUEST),
        refused[1].startswith("WRONGTYPE"),
    ]
    assert [2] == seqs([replies[1]])
    assert (1, 2, 0) == (
        trips.count,
        redis.commands_seen("evalsha"),
        redis.commands_seen("script|load"),
    )


async def test_a_redis_that_takes_no_scripts(
    redis: RedisServer, link: RedisLink, trips: Trips
) -> None:
    """Not allowed to load them: the refusal is the reply, after three round trips and no more."""
    redis.command("ACL", "SETUSER", "default", "-script")
    (reply,) = await scripting.run(link, [publish(1)])
    assert isinstance(reply, RedisRefused)
    assert ledger.is_noscript(str(reply))
    assert 3 == trips.count


async def test_nothing_to_run(link: RedisLink, trips: Trips) -> None:
    """No commands, no round trip; and any iterable will do, once."""
    assert [] == await scripting.run(link, [])
    assert 0 == trips.count
    assert [1, 2, 3] == seqs(await scripting.run(link, (publish(i) for i in range(3))))


async def test_redis_is_away(redis: RedisServer, link: RedisLink) -> None:
    """Gone or silent, it is unavailable after the time that was given."""
    redis.pause()
    started = trio.current_time()
    with pytest.raises(RedisUnavailable):
        await scripting.run(link, [publish(1)], timeout=0.2)
    assert 0.2 <= trio.current_time() - started < 1.0
    redis.resume()
    redis.kill()
    with pytest.raises(RedisUnavailable):
        await scripting.run(link, [publish(1)])
    redis.start()
    await well(link)
    assert 1 == len(await scripting.run(link, [publish(1)]))
