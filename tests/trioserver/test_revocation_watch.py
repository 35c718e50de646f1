"""Workers hear of revocations, on a real Redis that comes and goes."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from trioserver import revocation
from trioserver.auth import Claims
from trioserver.endpoint import Endpoint
from trioserver.errors import CloseReason, RedisRefused, RedisUnavailable
from trioserver.redis_link import RedisLink, open_link
from trioserver.resp import pack
from trioserver.revocation import (
    ENDS_KEY,
    ENTRIES_KEY,
    MAX_ENTRIES,
    ORDER_KEY,
    SEQ_KEY,
    Outcome,
    Revocation,
    RevocationRefused,
    Revoked,
)
from trioserver.revocation_watch import (
    INTERVAL_SECONDS,
    PAGE,
    RevocationWatch,
    end_covered,
    revoke,
)

LIMIT: Final = 45.0
"""Seconds after which a test is stuck."""

NEVER: Final = 1000.0
"""An interval after which no test waits: what happens, happens for another reason."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def by_hand(redis: RedisServer, **asked: Any) -> Outcome:
    """Revoke, as a back end would."""
    return Outcome.of(redis.command(*revocation.revoke(**asked)))


def claims(user: str = "ann", jti: str = "", issued_at: float = 0.0) -> Claims:
    """Return what a token says."""
    return Claims(user=user, expires_at=2e9, jti=jti, issued_at=issued_at)


@attrs.define(eq=False)
class Socket:
    """Somebody who is connected."""

    claims: Claims | None
    ended: list[CloseReason] = attrs.field(factory=list)
    broken: bool = False

    def end(self, reason: CloseReason) -> None:
        """Take note."""
        self.ended.append(reason)
        if self.broken:
            raise RuntimeError("no")


@attrs.define(eq=False)
class Worker:
    """A table, its watch, and who is connected."""

    revoked: Revoked
    watch: RevocationWatch
    sockets: list[Socket]
    trouble: list[str]
    walks: int = 0

    @classmethod
    def make(cls, wall: Callable[[], float] = time.time, **options: Any) -> "Worker":
        """Return one that does not run yet."""
        revoked = Revoked(wall)
        sockets: list[Socket] = []
        trouble: list[str] = []

        async def walk() -> None:
            worker.walks += 1
            await end_covered(sockets, revoked, lambda _doing, _bug: None)

        watch = RevocationWatch(revoked, walk, trouble.append, prefix="test:", **options)
        worker = cls(revoked, watch, sockets, trouble)
        return worker

    def knows(self, *jtis: str) -> bool:
        """Return whether all of these are revoked."""
        return all(self.revoked.covers(claims(jti=jti)) for jti in jtis)


@asynccontextmanager
async def running(
    redis: RedisServer, *workers: Worker, fresh: bool = True
) -> AsyncIterator[RedisLink]:
    """Run the watches for the time of the block, each on a link of its own; yield one of them."""
    links: list[RedisLink] = []

    async def work(
        worker: Worker, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with open_link(Endpoint(path=str(redis.path))) as link:
            links.append(link)
            task_status.started()
            await worker.watch.run(link)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for worker in workers:
                await nursery.start(work, worker)
            if fresh:
                await wait_until(lambda: all(worker.watch.fresh for worker in workers), 5)
            yield links[0]
            nursery.cancel_scope.cancel()


async def test_a_worker_begins_with_what_there_is(redis: RedisServer) -> None:
    """What was revoked before it came is known after its first look, and nobody else is hit."""
    by_hand(redis, token="7f")
    by_hand(redis, user="bob")
    worker = Worker.make(interval=NEVER)
    worker.sockets.extend(
        [Socket(claims("ann", "7f", 1e11)), Socket(claims("bob", issued_at=5)), Socket(None)]
    )
    worker.sockets.append(Socket(claims("ann", "7e")))
    async with running(redis, worker):
        ended = [socket.ended for socket in worker.sockets]
        assert [[CloseReason.UNAUTHORIZED], [CloseReason.UNAUTHORIZED], [], []] == ended
        assert 2 == len(worker.revoked)


async def test_every_worker_hears_of_it_without_a_hint(redis: RedisServer) -> None:
    """A hint may be lost: two workers look every second all the same, and end their sockets."""
    assert INTERVAL_SECONDS <= 1.0
    workers = [Worker.make(), Worker.make()]
    for worker in workers:
        worker.sockets.append(Socket(claims(issued_at=time.time() - 5)))
    async with running(redis, *workers):
        by_hand(redis, user="ann")
        await wait_until(lambda: all(worker.sockets[0].ended for worker in workers), 5)
        assert [1, 1] == [worker.walks for worker in workers]


async def test_a_hint_is_enough(redis: RedisServer) -> None:
    """The script publishes on the channel of the watch, which looks at once when it is told."""
    worker = Worker.make(interval=NEVER)
    async with running(redis, worker), subscribed(redis, worker.watch.channel) as heard:
        by_hand(redis, token="7f", prefix="test:")
        await heard()
        worker.watch.hint()
        await wait_until(lambda: worker.knows("7f"), 5)


def subscribed(
    redis: RedisServer, channel: bytes
) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
    """Subscribe for the time of the block; what it yields waits for a message."""

    @asynccontextmanager
    async def subscription() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        stream = await trio.open_unix_socket(str(redis.path))

        async def heard() -> None:
            seen = b""
            while b"message" not in seen:
                seen += await stream.receive_some()
            assert channel in seen

        async with stream:
            await stream.send_all(pack("SUBSCRIBE", channel))
            await stream.receive_some()
            yield heard

    return subscription()


async def test_many_hints_are_one_look(redis: RedisServer) -> None:
    """Whoever revokes ten thousand tokens in a row does not keep the workers walking."""
    worker = Worker.make(interval=NEVER)
    async with running(redis, worker):
        redis.command("CONFIG", "RESETSTAT")
        began = trio.current_time()
        for number in range(200):
            by_hand(redis, token=str(number))
            worker.watch.hint()
            await trio.lowlevel.checkpoint()
        await wait_until(lambda: worker.knows("199"), 5)
        looks = (trio.current_time() - began) / 0.05 + 2
        assert worker.walks <= looks
        assert worker.knows(*map(str, range(200)))


async def test_what_was_revoked_while_redis_was_away(redis: RedisServer) -> None:
    """Redis is killed and comes back with more: it is asked soon, and open sockets are ended.

    Meanwhile what is known stays applied, and nobody else is refused.
    """
    worker = Worker.make()
    by_hand(redis, token="known")
    async with running(redis, worker):
        worker.sockets.append(Socket(claims(issued_at=time.time() - 5)))
        redis.kill()
        await wait_until(lambda: worker.trouble, 5)
        assert not worker.watch.fresh
        assert worker.knows("known")
        assert not worker.revoked.covers(worker.sockets[0].claims or claims())
        redis.start()
        by_hand(redis, user="ann")
        await wait_until(lambda: worker.sockets[0].ended, 5)
        assert worker.knows("known")
        await wait_until(lambda: worker.watch.fresh, 5)


async def test_the_first_look_is_one_that_saw_everything(redis: RedisServer) -> None:
    """Whoever waits for it knows all that there is; a Redis that refuses tells nothing."""
    by_hand(redis, token="7f")
    redis.command("RENAME", SEQ_KEY, "aside")
    redis.command("SADD", SEQ_KEY, "x")
    worker = Worker.make()
    looked: list[bool] = []

    async def look() -> None:
        await worker.watch.first_look()
        looked.append(worker.knows("7f"))

    async with running(redis, worker, fresh=False), trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await wait_until(lambda: len(worker.trouble) > 1, 5)
        assert (False, []) == (worker.watch.fresh, looked)
        redis.command("RENAME", "aside", SEQ_KEY)
        await wait_until(lambda: looked, 5)
        assert [True] == looked
        await worker.watch.first_look()


async def test_whether_it_is_fresh_is_told(redis: RedisServer) -> None:
    """Once each time that it begins or ends: readiness depends on it."""
    told: list[bool] = []
    worker = Worker.make()
    worker.watch = watch = RevocationWatch(
        worker.revoked,
        trio.lowlevel.checkpoint,
        worker.trouble.append,
        interval=0.05,
        on_change=lambda: told.append(watch.fresh),
    )
    async with running(redis, worker):
        redis.command("SADD", SEQ_KEY, "x")
        await wait_until(lambda: len(worker.trouble) > 2, 5)
        assert not told[-1]
        redis.command("DEL", SEQ_KEY)
        await wait_until(lambda: told[-1], 5)
    # On a busy machine a look may fail without reason, so there may be more turns.
    assert told == [number % 2 == 0 for number in range(len(told))]


async def test_a_redis_that_hangs(redis: RedisServer) -> None:
    """A Redis that is silent and goes on later is asked again, too."""
    worker = Worker.make()
    async with running(redis, worker):
        by_hand(redis, token="7f")
        redis.pause()
        await wait_until(lambda: worker.trouble or worker.knows("7f"), 5)
        redis.resume()
        await wait_until(lambda: worker.knows("7f"), 5)


async def test_revocations_survive_a_kill_of_redis(redis: RedisServer) -> None:
    """What was answered is there after kill -9, for a worker that knows nothing."""
    for number in range(50):
        by_hand(redis, token=str(number))
    redis.kill()
    redis.start()
    worker = Worker.make(interval=NEVER)
    async with running(redis, worker):
        assert worker.knows(*map(str, range(50)))


async def test_a_redis_that_has_lost_its_data(redis: RedisServer) -> None:
    """What a worker knows stays applied, is not written back, and new ones are heard of."""
    worker = Worker.make(interval=0.1)
    by_hand(redis, token="old")
    async with running(redis, worker):
        redis.command("FLUSHALL")
        by_hand(redis, token="new")
        await wait_until(lambda: worker.knows("new"), 5)
        assert worker.knows("old")
        assert 1 == redis.command("ZCARD", ENDS_KEY)
        redis.command("FLUSHALL")
        redis.command("CONFIG", "RESETSTAT")
        await wait_until(lambda: redis.commands_seen("get") > 2, 5)
        assert worker.knows("old", "new")
        assert 0 == redis.command("DBSIZE")


async def test_an_older_copy_of_the_data(redis: RedisServer) -> None:
    """A Redis that has gone back is read anew: numbers that were given twice hide nothing."""
    worker = Worker.make(interval=0.1)
    by_hand(redis, token="first")
    async with running(redis, worker):
        seq = revocation.seq_in(redis.command("GET", SEQ_KEY))
        redis.command("HSET", ENTRIES_KEY, "t:back", f"0 {int(time.time()) + 100}")
        redis.command("ZADD", ORDER_KEY, seq - 1, "t:back")
        redis.command("SET", SEQ_KEY, seq - 1)
        await wait_until(lambda: worker.knows("back", "first"), 5)


async def test_everything_is_read_now_and_then(redis: RedisServer) -> None:
    """What was overlooked, for whatever reason, is found later."""
    worker = Worker.make(interval=0.02, whole=0.2)
    by_hand(redis, token="first")
    async with running(redis, worker):
        seq = revocation.seq_in(redis.command("GET", SEQ_KEY))
        redis.command("HSET", ENTRIES_KEY, "t:hidden", f"0 {int(time.time()) + 100}")
        redis.command("ZADD", ORDER_KEY, seq - 1, "t:hidden")
        await wait_until(lambda: worker.knows("hidden"), 5)


async def test_garbage_in_the_keys(redis: RedisServer) -> None:
    """It is said, hides nothing that can be read, and ends when it is removed."""
    worker = Worker.make(interval=0.1)
    by_hand(redis, token="good")
    redis.command("HSET", ENTRIES_KEY, "t:bad", "garbage")
    seq = revocation.seq_in(redis.command("GET", SEQ_KEY))
    for name in ("t:bad", "\xff", "t:gone", ""):
        redis.command("ZADD", ORDER_KEY, seq, name)
    redis.command("ZADD", ORDER_KEY, "+inf", "t:far")
    async with running(redis, worker):
        assert worker.knows("good")
        assert 1 == len(worker.revoked)
        redis.command("RENAME", SEQ_KEY, "aside")
        redis.command("SADD", SEQ_KEY, "x")
        await wait_until(lambda: any("WRONGTYPE" in one for one in worker.trouble), 5)
        assert worker.knows("good")
        redis.command("RENAME", "aside", SEQ_KEY)
        by_hand(redis, token="later")
        await wait_until(lambda: worker.knows("later"), 5)


async def test_after_a_failure_everything_is_read(redis: RedisServer) -> None:
    """The Redis that answers next may be another one: what it has is not taken for known."""
    worker = Worker.make(interval=0.1)
    by_hand(redis, token="first")
    async with running(redis, worker):
        redis.command("RENAME", SEQ_KEY, "aside")
        redis.command("SADD", SEQ_KEY, "x")
        await wait_until(lambda: worker.trouble, 5)
        redis.command("HSET", ENTRIES_KEY, "t:other", f"0 {int(time.time()) + 100}")
        redis.command("ZADD", ORDER_KEY, 5, "t:other")
        redis.command("RENAME", "aside", SEQ_KEY)
        await wait_until(lambda: worker.knows("first", "other"), 5)


async def test_what_has_lapsed_takes_no_room(redis: RedisServer) -> None:
    """A worker forgets it, without being told."""
    now = [time.time()]
    worker = Worker.make(wall=lambda: now[0], interval=0.05)
    by_hand(redis, token="7f")
    async with running(redis, worker):
        assert 1 == len(worker.revoked)
        now[0] += 31 * 86_400
        await wait_until(lambda: not len(worker.revoked), 5)


async def test_pages(redis: RedisServer) -> None:
    """What does not fit on one page is read on several, and nothing is left out between them."""
    until = int(time.time()) + 1000
    redis.command("EVAL", FILL, 0, 1501, until, 0)
    worker = Worker.make(interval=NEVER)
    async with running(redis, worker):
        assert 1501 == len(worker.revoked)
        assert 4 == worker.walks


async def test_the_newest_come_first(redis: RedisServer) -> None:
    """Who was revoked just now is gone before thousands of older ones are read."""
    redis.command("EVAL", FILL, 0, 1501, int(time.time()) + 1000, 0)
    by_hand(redis, token="just now")
    known: list[int] = []
    worker = Worker.make(interval=NEVER)

    async def walk() -> None:
        if worker.knows("just now"):
            known.append(len(worker.revoked))
            await trio.lowlevel.checkpoint()

    worker.watch = RevocationWatch(worker.revoked, walk, worker.trouble.append)
    async with running(redis, worker):
        assert [PAGE, 1502] == [known[0], known[-1]]


FILL: Final = """
for i = ARGV[3] + 1, ARGV[3] + ARGV[1] do
  local name = string.format('t:0b5f2c1e-7d4a-4b7e-9c3d-%012d', i)
  redis.call('HSET', 'ts:{revoked}:entries', name, '0 ' .. ARGV[2])
  redis.call('ZADD', 'ts:{revoked}:order', i, name)
  redis.call('ZADD', 'ts:{revoked}:ends', ARGV[2], name)
end
redis.call('SET', 'ts:{revoked}:seq', ARGV[3] + ARGV[1])
"""


@pytest.mark.slow
async def test_as_many_as_there_may_be(redis: RedisServer) -> None:
    """All are read, in pages: neither Redis nor the worker's loop stands still for it."""
    until = int(time.time()) + 1000
    for portion in range(10):
        redis.command("EVAL", FILL, 0, MAX_ENTRIES // 10, until, portion * MAX_ENTRIES // 10)
    with pytest.raises(RuntimeError, match="FULL there are 100000"):
        by_hand(redis, token="one more")
    redis.command("CONFIG", "RESETSTAT")
    worker = Worker.make(interval=NEVER)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while not worker.watch.fresh:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with running(redis, worker, fresh=False), trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        await wait_until(lambda: worker.watch.fresh, 40)
        assert MAX_ENTRIES == len(worker.revoked)
        assert turns > 400
        assert redis.commands_seen("hmget") >= MAX_ENTRIES // PAGE


async def test_a_watch_may_run_again(redis: RedisServer) -> None:
    """It is stopped, forgets nothing, and goes on."""
    worker = Worker.make(interval=0.1)
    by_hand(redis, token="first")
    async with running(redis, worker):
        assert worker.knows("first")
    worker.watch.fresh = False
    by_hand(redis, token="second")
    async with running(redis, worker):
        assert worker.knows("first", "second")


async def test_the_walk_gives_others_their_turn() -> None:
    """Thousands of connections are looked at in portions; nobody's bug saves the others."""
    revoked = Revoked()
    revoked.learn([Revocation("u:ann", 5, int(time.time()) + 100)])
    sockets = [Socket(claims(), broken=number % 3 == 0) for number in range(1000)]
    sockets.append(Socket(claims(issued_at=6)))
    bugs: list[str] = []
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        ended = await end_covered(sockets, revoked, lambda doing, _bug: bugs.append(doing))
        nursery.cancel_scope.cancel()
    assert 1000 == ended
    assert 334 == len(bugs)
    assert turns >= 3
    assert [1] * 1000 + [0] == [len(socket.ended) for socket in sockets]


async def test_revoking_on_a_link(redis: RedisServer) -> None:
    """The outcome is a value; refusals are told apart from a Redis that is away or ill."""
    async with open_link(Endpoint(path=str(redis.path))) as link:
        outcome = await revoke(link, revocation.revoke(token="7f", until=time.time() + 60))
        assert ("7f", True) == (outcome.revocation.token, outcome.new)
        with pytest.raises(RevocationRefused, match="until is over"):
            await revoke(link, revocation.revoke(token="7f", until=5))
        with pytest.raises(RevocationRefused, match="no room"):
            await revoke(link, revocation.revoke(token="other", max_entries=1))
        redis.command("DEL", SEQ_KEY)
        redis.command("SADD", SEQ_KEY, "x")
        with pytest.raises(RedisRefused, match="delete it"):
            await revoke(link, revocation.revoke(user="ann"))
        redis.kill()
        with pytest.raises(RedisUnavailable):
            await revoke(link, revocation.revoke(user="ann"))
