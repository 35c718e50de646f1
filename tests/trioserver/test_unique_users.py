"""How many users the fleet has: several workers on a real Redis, and what becomes of them."""

import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.fleet_stage import SECONDS, Worker
from tests.trioserver.users_stage import lifetimes, number, run
from trioserver import fleet, registry, users
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.users import COUNT_KEY, LASTS_SECONDS

LIMIT = 40.0
"""Seconds after which a test is stuck."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are few workers here, and one Redis for them alone."""
    monkeypatch.setattr(registry, "SPREAD_SECONDS", 0.05)
    monkeypatch.setattr(registry, "HINT_SECONDS", 0.05)


@pytest.fixture(autouse=True)
async def bounded() -> AsyncIterator[None]:
    """No test waits for ever."""
    with trio.fail_after(LIMIT):
        yield


def count(redis: RedisServer) -> int:
    """Return the number of users now."""
    commands = users.lives()
    replies = [redis.command(*cast("tuple[str | int, ...]", one)) for one in commands]
    command = users.counts(replies)
    return 0 if command is None else cast("int", run(redis, command))


async def are(redis: RedisServer, expected: int) -> None:
    """Wait until there are so many."""
    await wait_until(lambda: expected == count(redis), SECONDS)


def let_go(worker: Worker, guests: Iterable[registry.Member]) -> None:
    """Have connections go."""
    for guest in guests:
        worker.registry.leave(guest)


async def renewed_until(worker: Worker, condition: Callable[[], bool]) -> None:
    """Have a worker renew its lease until something is so."""
    with trio.fail_after(SECONDS):
        while not condition():
            await worker.renewed()


async def test_a_user_of_two_workers_counts_once(redis: RedisServer) -> None:
    """And is there until he has left both."""
    async with (
        Worker(redis, "aa.1.1").running() as here,
        Worker(redis, "bb.1.1").running() as there,
    ):
        ann = here.enter("c1", "c2")
        bob = here.enter("c3", user="bob")
        also_ann = there.enter("c4")
        there.enter("c5", user="cat")
        await are(redis, 3)
        let_go(here, [*ann, *bob])
        await here.renewed()
        await are(redis, 2)
        let_go(there, also_ann)
        await there.renewed()
        await are(redis, 1)
        assert ([], []) == (here.troubles, there.troubles)


async def test_who_is_turned_away_does_not_count(redis: RedisServer) -> None:
    """A user of whom all connections were too many is none of ours for long."""
    async with (
        Worker(redis, "aa.1.1", limit=1).running() as here,
        Worker(redis, "bb.1.1", limit=1).running() as there,
    ):
        here.enter("c1")
        await are(redis, 1)
        (two,) = there.enter("c2")
        await wait_until(lambda: two.ended, SECONDS)
        await renewed_until(there, lambda: not number(redis, "bb.1.1"))
        assert 1 == count(redis)


async def test_who_was_killed_has_no_users(redis: RedisServer) -> None:
    """As soon as its lease is over; what it left behind is not counted, and ends by itself."""
    async with Worker(redis, "aa.1.1").running() as here:
        here.enter("c1")
        async with Worker(redis, "bb.1.1").running() as there:
            there.enter("c2", user="bob")
            await are(redis, 2)
        assert 2 == count(redis)
        redis.command("ZREM", fleet.LIVES_KEY, "bb.1.1")
        assert 1 == count(redis)
        assert 2 == len(lifetimes(redis))
        assert all(0 < lasts <= LASTS_SECONDS * 1000 for lasts in lifetimes(redis))


async def test_the_end_of_a_worker(redis: RedisServer) -> None:
    """In order, it takes its users with it."""
    async with Worker(redis).running() as worker:
        worker.enter("c1")
        await are(redis, 1)
        await worker.finish()
        assert (0, []) == (count(redis), lifetimes(redis))


async def test_everything_was_lost(redis: RedisServer) -> None:
    """Redis without its memory has the users again when it has their connections."""
    async with Worker(redis, limit=0).running() as worker:
        for number_ in range(3):
            worker.enter(f"c{number_}", user=f"user-{number_}")
        await are(redis, 3)
        redis.command("FLUSHALL")
        worker.registry.hinted()
        await are(redis, 3)
        assert 3 == number(redis, worker.registry.life)
        assert "aa.1.1+1" == worker.registry.life


def goes_on(worker: Worker, life: str) -> bool:
    """Return whether a worker has the lease of this life."""
    return worker.registry.holds and worker.registry.life == life


async def test_a_cut_link_costs_no_users(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they were entered anew those of the life before count, and each once."""
    async with Worker(redis, limit=0).running() as worker:
        for number_ in range(3):
            worker.enter(f"c{number_}", user=f"user-{number_}")
        await are(redis, 3)
        # Nobody is entered anew for an hour.
        monkeypatch.setattr(registry, "GATHER_SECONDS", 3600.0)
        for times in (1, 2):
            worker.registry.link_lost()
            life = f"aa.1.1+{times}"
            await wait_until(functools.partial(goes_on, worker, life), SECONDS)
            assert (3, 0) == (count(redis), number(redis, life))


@pytest.mark.parametrize("loss", ["removed", "junk"])
async def test_only_the_count_was_lost(redis: RedisServer, loss: str) -> None:
    """It is made anew with the next renewal, without another life."""
    async with Worker(redis, limit=0).running() as worker:
        for number_ in range(3):
            worker.enter(f"c{number_}", user=f"user-{number_}")
        await are(redis, 3)
        redis.command("DEL", users.key("aa.1.1"))
        if loss == "junk":
            redis.command("RPUSH", users.key("aa.1.1"), "x")
            worker.enter("c3", user="user-0")
            await wait_until(
                lambda: redis.command("TYPE", users.key("aa.1.1")) == b"string", SECONDS
            )
            redis.command("DEL", users.key("aa.1.1"))
        await worker.renewed()
        await worker.renewed()
        await are(redis, 3)
        assert "aa.1.1" == worker.registry.life


async def test_redis_refuses_to_count(redis: RedisServer) -> None:
    """Connections are entered all the same; what counts them is made when it may be again."""
    redis.command("ACL", "SETUSER", "default", "-pfadd")
    async with Worker(redis).running() as worker:
        worker.enter("c1", "c2")
        await wait_until(lambda: redis.command("HLEN", fleet.key("ann")) == 2, SECONDS)
        await wait_until(lambda: worker.troubles, SECONDS)
        assert 0 == count(redis)
        redis.command("ACL", "SETUSER", "default", "+pfadd")
        await renewed_until(worker, lambda: count(redis) == 1)


async def test_a_number_is_kept_for_a_moment(redis: RedisServer) -> None:
    """Who asks again gets the same without Redis having to count; later a new one."""
    async with Worker(redis).running() as worker:
        worker.enter("c1")
        await are(redis, 1)
        assert worker.link is not None
        ask = functools.partial(registry.unique_users, worker.link)
        assert 1 == await ask()
        redis.command("SET", COUNT_KEY, 17, "PX", 60_000)
        assert 17 == await ask()
        redis.command("SET", COUNT_KEY, "junk")
        assert 1 == await ask()
        assert 0 < cast("int", redis.command("PTTL", COUNT_KEY)) <= users.KEPT_MS


async def test_nobody_is_there(redis: RedisServer) -> None:
    """Without a life there are no users; without an answer nothing is known."""
    async with Worker(redis).running() as worker:
        await worker.leased()
        assert worker.link is not None
        assert 0 == await registry.unique_users(worker.link)
        await worker.finish()
        redis.command("DEL", COUNT_KEY)
        assert await registry.unique_users(worker.link) is None
        redis.command("ACL", "SETUSER", "default", "-get")
        with pytest.raises(RedisRefused):
            await registry.unique_users(worker.link)
        redis.kill()
        with pytest.raises(RedisUnavailable):
            await registry.unique_users(worker.link)
