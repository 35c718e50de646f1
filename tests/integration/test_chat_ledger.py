"""Counters over everything that can be killed: what is answered is counted once, and for good."""

import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio

from supervisor.processes import raise_descriptor_limit
from tests.integration.chatting import Chatter, Ledger, PlainLedger
from tests.integration.measuring import address
from tests.redis_server import RedisServer, wait_until
from tests.running import Running, running

STAGE_SECONDS = 30.0
"""Absolute limit of one stage; in peace it takes one or two."""


class Crowd:
    """All chatters of one server, and what is done to them."""

    def __init__(self, server: Running, redis: RedisServer, *, sessions: int, pause: float) -> None:
        self.server = server
        self.redis = redis
        where = address(server)
        # Every other one is anonymous, and of both every other one says everything without ids.
        self.chatters = [
            Chatter(
                where,
                user="" if number % 2 else f"user-{number}",
                pause=pause,
                plain=number % 4 > 1,
            )
            for number in range(sessions)
        ]

    @property
    def connections(self) -> int:
        """How many connections there have been."""
        return sum(one.connections for one in self.chatters)

    @property
    def refusals(self) -> int:
        """How many messages have been refused."""
        return sum(one.refusals for one in self.chatters)

    async def answered(self, more: int = 4) -> None:
        """Return when everybody has so many more answers than now."""
        goals = [(one.ledger, len(one.ledger.counts) + more) for one in self.chatters]
        await wait_until(
            lambda: all(len(ledger.counts) >= goal for ledger, goal in goals), STAGE_SECONDS
        )

    async def kill_a_worker(self) -> None:
        """SIGKILL for one of the workers; its clients come back and go on."""
        before = self.connections
        self._kill_worker()
        await wait_until(lambda: self.connections > before, STAGE_SECONDS)
        await self.answered()

    def _kill_worker(self) -> None:
        status = self.server.status()
        assert status is not None
        os.kill(status["workers"][0]["pid"], signal.SIGKILL)

    async def kill_redis(self) -> None:
        """SIGKILL for Redis; it comes back when clients have been refused. Nobody is cut off."""
        before, refused = self.connections, self.refusals
        self.redis.kill()
        await wait_until(lambda: self.refusals > refused, STAGE_SECONDS)
        await trio.to_thread.run_sync(self.redis.start)
        await self.answered()
        assert before == self.connections

    async def kill_a_worker_while_redis_is_deaf(self) -> None:
        """SIGKILL for a worker that does not know what has become of all it has written."""
        before, refused = self.connections, self.refusals
        self.redis.pause()
        await wait_until(lambda: self.refusals > refused, STAGE_SECONDS)
        self._kill_worker()
        self.redis.resume()
        await wait_until(lambda: self.connections > before, STAGE_SECONDS)
        await self.answered()

    async def reload(self) -> None:
        """Replace all workers; everybody comes back and goes on."""
        before = {one: one.connections for one in self.chatters}
        done = await trio.to_thread.run_sync(self.server.run, "reload")
        assert (0, "") == (done.returncode, done.stderr)
        await wait_until(
            lambda: all(one.connections > count for one, count in before.items()), STAGE_SECONDS
        )
        await self.answered()

    def stored(self, chatter: Chatter) -> int:
        """Return the count of a session that Redis has."""
        count = self.redis.command("HGET", f"ts:session:{{{chatter.session_id}}}", "n")
        return int(count) if isinstance(count, bytes) else 0


Stage = Callable[[Crowd], Awaitable[None]]

STAGES: Sequence[Stage] = (Crowd.kill_a_worker, Crowd.kill_redis, Crowd.reload)


async def prove(
    directory: Path, *, sessions: int, pause: float, stages: Sequence[Stage] = STAGES
) -> None:
    """Kill and replace what there is while all sessions count; then compare the ledgers."""
    with (
        # What it has said is on the disk: there is no second machine here that would lose it.
        RedisServer(directory / "redis", config={"appendfsync": "always"}) as redis,
        running(directory / "server", environ={"REDIS_URL": redis.url}) as server,
    ):
        crowd = Crowd(server, redis, sessions=sessions, pause=pause)
        async with trio.open_nursery() as nursery:
            for chatter in crowd.chatters:
                nursery.start_soon(chatter.run)
            await crowd.answered()
            for stage in stages:
                await stage(crowd)
            for chatter in crowd.chatters:
                chatter.finish()
        faults = {
            number: found
            for number, one in enumerate(crowd.chatters)
            if (found := one.ledger.faults(crowd.stored(one)))
        }
    assert {} == faults
    # Whoever came back has asked for an old answer, and has got it.
    assert sum(one.ledger.repeats for one in crowd.chatters) >= sessions // 2


async def test_no_count_is_skipped_or_doubled(tmp_path: Path) -> None:
    """150 sessions over a killed worker, a killed Redis and a reload: each counts 1, 2, 3, ...

    Half of them say everything without ids. Of these only what was under way when a connection
    ended may be counted without an answer.
    """
    with trio.fail_after(50):
        await prove(tmp_path, sessions=150, pause=0.1)


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_no_count_is_skipped_or_doubled_by_a_thousand(tmp_path: Path) -> None:
    """The same with 1,000 sessions, and with a Redis that is deaf while a worker is killed."""
    raise_descriptor_limit()
    stages = (Crowd.kill_a_worker_while_redis_is_deaf, *STAGES)
    with trio.fail_after(180):
        await prove(tmp_path, sessions=1_000, pause=0.5, stages=stages)


def plain(messages: int, *counts: int) -> PlainLedger:
    """Return a ledger of messages without ids that are all under way, and these answers."""
    ledger = PlainLedger()
    ledger.established(0, resumed=False)
    ledger.say(messages)
    ledger.sent(messages)
    for number, count in enumerate(counts, 1):
        ledger.answer(number, count, repeated=False)
    return ledger


def test_the_plain_ledger_is_content() -> None:
    """What was refused, or under way in the end, may be counted on another connection."""
    ledger = plain(4, 1, 2)
    ledger.refused(2)
    ledger.sent(1)
    ledger.answer(3, 3, repeated=False)
    ledger.sent(1)
    ledger.refused(1)
    ledger.sent(1)
    ledger.cut_off()
    ledger.established(None, resumed=True)
    ledger.established(5, resumed=True)
    ledger.sent(1)
    ledger.answer(4, 6, repeated=False)

    assert [] == ledger.faults(6)


@pytest.mark.parametrize(
    ("ruin", "stored", "fault"),
    [
        (lambda ledger: ledger.answer(3, 4, repeated=False), 4, "2 was followed by 4"),
        (lambda ledger: ledger.answer(3, 2, repeated=False), 2, "2 was followed by 2"),
        (lambda ledger: ledger.answer(3, 3, repeated=True), 3, "not said, or not again"),
        (lambda ledger: ledger.established(3, resumed=True), 3, "it had 2, and has 3"),
        (lambda ledger: come_back(ledger, 1), 1, "from 2 to 3, and says 1"),
        (lambda ledger: come_back(ledger, 4), 4, "from 2 to 3, and says 4"),
        (lambda ledger: ledger.established(2, resumed=False), 2, "forgotten"),
        (lambda ledger: None, 3, "the last was 2, and 3 are stored"),
    ],
)
def test_the_plain_ledger_complains(
    ruin: Callable[[PlainLedger], None], stored: int, fault: str
) -> None:
    """Of two that were answered and one under way, everything that must not happen is found."""
    ledger = plain(3, 1, 2)
    ruin(ledger)

    assert fault in str(ledger.faults(stored))


def come_back(ledger: PlainLedger, count: int) -> None:
    """Have a connection end, and another one that says this."""
    ledger.cut_off()
    ledger.established(count, resumed=True)


def said(messages: int, *answers: tuple[int, int, bool]) -> Ledger:
    """Return a ledger with so many messages and these answers: number, count, repeated."""
    ledger = Ledger()
    ledger.say(messages)
    for number, count, repeated in answers:
        ledger.answer(number, count, repeated=repeated)
    return ledger


GOOD = [(1, 1, False), (2, 3, True), (3, 2, False)]


def test_the_ledger_is_content() -> None:
    """Counts in any order are good, and so is the old answer to what was said again."""
    ledger = said(3, *GOOD)
    ledger.again(3, 2, repeated=True)
    ledger.established(3, resumed=True)
    ledger.established(None, resumed=True)

    assert [] == ledger.faults(3)
    assert 2 == ledger.repeats


@pytest.mark.parametrize(
    ("ruin", "stored", "fault"),
    [
        (lambda ledger: ledger.answer(4, 4, repeated=False), 3, "message 4 was never said"),
        (lambda ledger: ledger.answer(3, 4, repeated=True), 3, "message 3 was 2 and then 4"),
        (lambda ledger: ledger.again(3, 2, repeated=False), 3, "counted again"),
        (lambda ledger: ledger.established(3, resumed=False), 3, "forgotten"),
        (lambda ledger: ledger.established(2, resumed=True), 3, "it has 2"),
        (lambda ledger: ledger.established(4, resumed=True), 3, "it has 4"),
        (lambda ledger: ledger.say(1), 4, "never answered: [4]"),
        (lambda ledger: None, 4, "3 messages, and 4 are stored"),
    ],
)
def test_the_ledger_complains(ruin: Callable[[Ledger], None], stored: int, fault: str) -> None:
    """Everything that must not happen is found, and only that."""
    ledger = said(3, *GOOD)
    ruin(ledger)

    (found,) = ledger.faults(stored)

    assert fault in found


@pytest.mark.parametrize(
    ("counts", "fault"), [((1, 3), "skipped: [2]"), ((1, 1), "two messages with one count")]
)
def test_the_ledger_counts(counts: Sequence[int], fault: str) -> None:
    """A hole and a count that two messages have are found."""
    answers = [(number, count, False) for number, count in enumerate(counts, 1)]

    assert fault in str(said(2, *answers).faults(2))
