"""The scheduler on a real Redis: what is due is done, once, whatever happens meanwhile."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.ledger_calls import Caller
from tests.trioserver.readable_log import readable_log
from trioserver import ledger, scheduler
from trioserver.endpoint import Endpoint
from trioserver.ledger import Notification, Owner, Rules, Topic, TopicRules
from trioserver.redis_link import open_link
from trioserver.scheduler import Scheduler

RULES = Rules()
TOPIC_RULES = TopicRules()
DAY_MS = 86_400_000


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of one's own, which forgets nothing when it is killed."""
    with RedisServer(tmp_path / "redis", config={"appendfsync": "always"}) as server:
        yield server


class Counts:
    """One scheduler and what it has said."""

    def __init__(self) -> None:
        self.settled = 0
        self.failed = 0
        self.rounds = 0

    async def run(
        self, redis: RedisServer, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a scheduler on a link of its own until cancelled."""
        async with open_link(Endpoint(path=str(redis.path))) as link:
            task_status.started()
            await Scheduler(link, RULES, settled=self._settled, failed=self._failed).run()

    def _settled(self, count: int) -> None:
        self.settled += count
        self.rounds += 1

    def _failed(self) -> None:
        self.failed += 1


def publish(
    redis: RedisServer,
    *users: Owner,
    deliver_in: float | None = None,
    fallback_in: float | None = None,
    ttl: float = 3600.0,
) -> list[str]:
    """Publish to each; return the ids. Seconds count from now."""
    ids = []
    with Caller(redis.path) as caller:
        for user in users:
            now = caller.now()
            home = ledger.partition(user)
            notification = Notification(
                user=user,
                payload=b"1",
                ttl_ms=round(ttl * 1000),
                id=ledger.new_id(home, now),
                deliver_at_ms=None if deliver_in is None else now + round(deliver_in * 1000),
                fallback_after_ms=None if fallback_in is None else round(fallback_in * 1000),
            )
            rules = TOPIC_RULES if isinstance(user, Topic) else RULES
            caller.run(ledger.publish(notification, rules=rules))
            ids.append(notification.id)
    return ids


def events(redis: RedisServer) -> Counter[tuple[str, str]]:
    """Return how often each kind of event was written about each notification."""
    found: Counter[tuple[str, str]] = Counter()
    with Caller(redis.path) as caller:
        for home in (*ledger.PARTITIONS, ledger.EVERYONE, *ledger.TOPIC_PARTITIONS):
            for _, fields in caller.ask("XRANGE", ledger.events_key(home), "-", "+"):
                event = dict(zip(fields[::2], fields[1::2], strict=True))
                found[event[b"event"].decode(), event[b"id"].decode()] += 1
    return found


def kinds(redis: RedisServer) -> Counter[str]:
    """Return how many events of each kind were written."""
    found: Counter[str] = Counter()
    for (kind, _), count in events(redis).items():
        found[kind] += count
    return found


def length(redis: RedisServer, owner: Owner) -> int:
    """Return how many entries an inbox has."""
    count = redis.command("XLEN", ledger.key("inbox", owner))
    assert isinstance(count, int)
    return count


USERS = [f"user-{number}" for number in range(120)]


async def test_later_means_later_and_once(redis: RedisServer, nursery: trio.Nursery) -> None:
    """What is to be delivered at a time is, by one of two schedulers, and not before."""
    both = [Counts(), Counts()]
    published = time.monotonic()
    ids = publish(redis, *USERS, None, deliver_in=1.5)
    for one in both:
        await nursery.start(one.run, redis)
    before = sum(length(redis, owner) for owner in (*USERS, None))
    checked = time.monotonic()
    await wait_until(lambda: sum(one.settled for one in both) >= len(ids))
    nursery.cancel_scope.cancel()

    assert checked - published < 1.5
    assert 0 == before
    assert [1] * len(ids) == [length(redis, owner) for owner in (*USERS, None)]
    assert {("accepted", name): 1 for name in ids} == events(redis)
    assert len(ids) == sum(one.settled for one in both)


async def test_topics_too(redis: RedisServer, nursery: trio.Nursery) -> None:
    """What is due in a topic, in whatever partition it is, is published and expires."""
    topics = [Topic(f"room.{number}") for number in range(100)]
    assert set(ledger.TOPIC_PARTITIONS) == {ledger.partition(topic) for topic in topics}
    counts = Counts()
    publish(redis, *topics, ttl=1.0)
    publish(redis, *topics, deliver_in=0.3)
    await nursery.start(counts.run, redis)
    await wait_until(lambda: counts.settled >= 2 * len(topics))
    with Caller(redis.path) as caller:
        pages = [ledger.page(caller.run(ledger.read(topic))) for topic in topics]
    nursery.cancel_scope.cancel()

    assert [1] * len(topics) == [length(redis, topic) for topic in topics]
    assert [1] * len(topics) == [len(page.items) for page in pages]
    assert not events(redis)


async def test_nobody_has_received_it(redis: RedisServer, nursery: trio.Nursery) -> None:
    """One ``undelivered`` event per notification, with two schedulers at work."""
    both = [Counts(), Counts()]
    ids = publish(redis, *USERS, fallback_in=0.3)
    for one in both:
        await nursery.start(one.run, redis)
    await wait_until(lambda: sum(one.settled for one in both) >= len(ids))
    nursery.cancel_scope.cancel()

    assert {("undelivered", name): 1 for name in ids} == {
        event: count for event, count in events(redis).items() if event[0] == "undelivered"
    }
    assert [1] * len(USERS) == [length(redis, owner) for owner in USERS]


async def test_what_has_expired_goes(redis: RedisServer, nursery: trio.Nursery) -> None:
    """Behind its ttl a notification leaves the inbox, with one event."""
    both = [Counts(), Counts()]
    ids = publish(redis, *USERS[:20], None, ttl=1.0)
    kept = publish(redis, "user-0")
    for one in both:
        await nursery.start(one.run, redis)
    await wait_until(lambda: kinds(redis)["expired"] >= len(ids))
    nursery.cancel_scope.cancel()

    assert {("expired", name): 1 for name in ids} == {
        event: count for event, count in events(redis).items() if event[0] == "expired"
    }
    assert [0] * 19 == [length(redis, owner) for owner in USERS[1:20]]
    assert 0 == events(redis)["expired", kept[0]]


async def test_it_sleeps_no_longer_than_until_the_next_is_due(
    redis: RedisServer, nursery: trio.Nursery
) -> None:
    """A moment that is known beforehand is met to a few milliseconds, not to a second."""
    publish(redis, "u", deliver_in=0.4)
    published = time.monotonic()
    await nursery.start(Counts().run, redis)
    await wait_until(lambda: length(redis, "u"))
    took = time.monotonic() - published
    nursery.cancel_scope.cancel()

    assert 0.35 < took < 0.8


async def test_it_does_not_ask_for_nothing(redis: RedisServer, nursery: trio.Nursery) -> None:
    """With nothing to do it asks about once a second, all partitions in one round trip."""
    counts = Counts()
    publish(redis, "u")
    await nursery.start(counts.run, redis)
    await wait_until(lambda: counts.rounds >= 3)
    redis.command("CONFIG", "RESETSTAT")
    asked = counts.rounds
    await wait_until(lambda: counts.rounds >= asked + 2)
    calls = redis.commands_seen("evalsha")
    nursery.cancel_scope.cancel()

    assert 65 <= calls <= 3 * 65
    assert (0, 0) == (counts.settled, counts.failed)


async def test_a_full_batch_is_followed_at_once(redis: RedisServer, nursery: trio.Nursery) -> None:
    """Where more is due than one call does, nobody waits a second for the rest."""
    count = 6 * scheduler.BATCH
    publish(redis, *["u"] * count, deliver_in=0.5)
    with Caller(redis.path) as caller:
        caller.wait_past(caller.now() + 500)
    counts = Counts()
    began = time.monotonic()
    await nursery.start(counts.run, redis)
    await wait_until(lambda: length(redis, "u") == count)
    took = time.monotonic() - began
    await wait_until(lambda: counts.settled == count)
    nursery.cancel_scope.cancel()

    assert took < scheduler.IDLE_SECONDS
    assert counts.rounds >= 6


async def test_what_became_due_while_nobody_was_there(
    redis: RedisServer, nursery: trio.Nursery
) -> None:
    """A scheduler that comes late does what was left, once."""
    first = Counts()
    async with trio.open_nursery() as early:
        await early.start(first.run, redis)
        await wait_until(lambda: first.rounds >= 1)
        early.cancel_scope.cancel()
    ids = publish(redis, *USERS[:30], deliver_in=0.2, fallback_in=0.1)
    with Caller(redis.path) as caller:
        caller.wait_past(caller.now() + 500)
    second = Counts()
    await nursery.start(second.run, redis)
    await wait_until(lambda: second.settled >= 2 * len(ids))
    nursery.cancel_scope.cancel()

    assert Counter(accepted=len(ids), undelivered=len(ids)) == kinds(redis)
    assert [1] * 30 == [length(redis, owner) for owner in USERS[:30]]


async def test_it_survives_an_outage(
    redis: RedisServer, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Redis is killed and comes back: what was scheduled is done, and the log says it twice."""
    with readable_log(tmp_path) as log:
        counts = Counts()
        await nursery.start(counts.run, redis)
        ids = publish(redis, *USERS[:30], deliver_in=1.0)
        redis.kill()
        await wait_until(lambda: counts.failed >= 1)
        redis.start()
        await wait_until(lambda: counts.settled >= len(ids), 8.0)
        nursery.cancel_scope.cancel()
        said = [line for line in log.lines if "schedule" in line]

    assert {("accepted", name): 1 for name in ids} == events(redis)
    assert 2 == len(said)
    assert '"the schedule is not kept"' in said[0]
    assert '"the schedule is kept again"' in said[1]


async def test_a_deaf_redis_is_waited_for(
    redis: RedisServer, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that is not answered is given up, and the next one is made on a new connection."""
    monkeypatch.setattr(scheduler, "ROUND_SECONDS", 0.3)
    counts = Counts()
    await nursery.start(counts.run, redis)
    ids = publish(redis, *USERS[:30], deliver_in=0.5)
    redis.pause()
    await wait_until(lambda: counts.failed >= 1)
    redis.resume()
    await wait_until(lambda: length(redis, USERS[29]) == 1)
    nursery.cancel_scope.cancel()

    assert {("accepted", name): 1 for name in ids} == events(redis)


async def test_forgotten_scripts_are_loaded_again(
    redis: RedisServer, nursery: trio.Nursery
) -> None:
    """A Redis that has lost its scripts gets them, and no round is lost."""
    counts = Counts()
    await nursery.start(counts.run, redis)
    await wait_until(lambda: counts.rounds >= 1)
    redis.command("SCRIPT", "FLUSH")
    await wait_until(lambda: counts.rounds >= 3)
    nursery.cancel_scope.cancel()

    assert 0 == counts.failed


async def test_one_broken_partition_holds_up_no_other(
    redis: RedisServer, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """What Redis refuses in one partition is said once; the others are served."""
    broken = ledger.partition("u")
    others = [user for user in USERS[:20] if ledger.partition(user) != broken]
    redis.command("SET", ledger.due_key(broken), "not a schedule")
    with readable_log(tmp_path) as log:
        counts = Counts()
        publish(redis, *others, deliver_in=0.1)
        await nursery.start(counts.run, redis)
        await wait_until(lambda: counts.settled >= len(others))
        await wait_until(lambda: counts.failed >= 2)
        nursery.cancel_scope.cancel()
        said = [line for line in log.lines if "schedule" in line]

    assert [1] * len(others) == [length(redis, owner) for owner in others]
    assert 1 == len(said)
    assert "WRONGTYPE" in said[0]
