"""The canary, on a real Redis, with a short temper."""

import random
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.toxic import Toxic
from trioserver.canary import LINK_DOWN, NOT_YET, OVERDUE, REFUSED, Canary
from trioserver.endpoint import Endpoint
from trioserver.redis_link import RedisLink, open_link
from trioserver.resp import pack
from trioserver.subscription import Subscription

LIMIT = 20.0
"""Seconds after which a test is stuck."""

INTERVAL = 0.4
PATIENCE = 0.25


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@attrs.define(eq=False)
class Worker:
    """What a worker wires together: a subscription behind a proxy, a link, a canary."""

    subscription: Subscription
    canary: Canary
    proxy: Toxic
    heard: list[bytes]
    changes: list[tuple[bool, str]]
    seconds_per_message: float = 0.0
    """How long the worker is at work with one message."""

    async def _work(self) -> None:
        await trio.sleep(self.seconds_per_message)


@asynccontextmanager
async def working(
    redis: RedisServer,
    *,
    user: str | None = None,
    way_out: Endpoint | None = None,
    with_canary: bool = True,
) -> AsyncIterator[Worker]:
    """Run such a worker for the time of the block."""
    heard: list[bytes] = []
    changes: list[tuple[bool, str]] = []
    worker: Worker | None = None

    def deliver(channel: bytes, payload: bytes) -> Awaitable[None] | None:
        if channel == canary.channel:
            canary.returned(payload, trio.current_time())
        else:
            heard.append(payload)
            if worker is not None and worker.seconds_per_message:
                return worker._work()
        return None

    def changed() -> None:
        canary.link_changed()

    proxy = Toxic(("127.0.0.1", redis.port))
    way_out = way_out or Endpoint(path=str(redis.path), username=user, password=user and "pw")
    with trio.fail_after(LIMIT):
        async with open_link(way_out) as link, trio.open_nursery() as nursery:
            await nursery.start(proxy.run)
            way_back = Endpoint(host="127.0.0.1", port=proxy.port)
            subscription = Subscription(way_back, deliver, changed, jitter=random.Random(7))
            canary = make_canary(link, subscription, changes)
            await nursery.start(subscription.run)
            if with_canary:
                await nursery.start(canary.run)
            batch = subscription.follow(b"a")
            assert batch is not None
            await batch.wait()
            worker = Worker(subscription, canary, proxy, heard, changes)
            yield worker
            nursery.cancel_scope.cancel()


def make_canary(
    link: RedisLink, subscription: Subscription, changes: list[tuple[bool, str]]
) -> Canary:
    """Return a canary that notes down its changes."""
    canary = Canary(
        link,
        subscription,
        "worker-3",
        prefix="test:",
        interval=INTERVAL,
        patience=PATIENCE,
        on_change=lambda: changes.append((canary.fresh, canary.why)),
    )
    return canary


async def make_deaf(worker: Worker, redis: RedisServer) -> None:
    """Unsubscribe everything behind the worker's back; PING goes on being answered."""
    worker.proxy.mute_to_client = True
    await worker.proxy.inject(pack("UNSUBSCRIBE"))
    await wait_until(lambda: redis.command("PUBSUB", "CHANNELS") == [], 2)
    await trio.sleep(0.02)
    worker.proxy.mute_to_client = False


async def test_a_canary_comes_back(redis: RedisServer) -> None:
    """Shortly after the start the worker is fresh, and stays so, canary after canary."""
    async with working(redis) as worker:
        canary = worker.canary
        assert canary.channel == b"test:canary:worker-3"
        await wait_until(lambda: canary.fresh, 1)
        first = canary.round_trip
        assert first is not None
        assert 0 < first < PATIENCE
        age = canary.age(trio.current_time())
        assert age is not None
        assert age < PATIENCE
        redis.command("CONFIG", "RESETSTAT")
        await trio.sleep(3 * INTERVAL)
        assert 2 <= redis.commands_seen("publish") <= 4
        assert worker.changes == [(True, "")]
        assert worker.subscription.statistics().faults == 0


async def test_before_the_first(redis: RedisServer) -> None:
    """Nothing has been proved yet: not fresh, and without an age."""
    async with working(redis, with_canary=False) as worker:
        assert not worker.canary.fresh
        assert worker.canary.why == NOT_YET
        assert worker.canary.age(0) is None
        assert worker.canary.round_trip is None


async def test_a_link_that_is_down_is_known_at_once(redis: RedisServer) -> None:
    """Nobody waits for a canary to learn that Redis is gone; it is fresh soon after the return."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        redis.kill()
        await wait_until(lambda: not worker.canary.fresh, PATIENCE)
        assert worker.canary.why == LINK_DOWN
        await trio.sleep(2 * INTERVAL)
        assert not worker.canary.fresh

        redis.start()
        await wait_until(lambda: worker.subscription.up)
        await wait_until(lambda: worker.canary.fresh, PATIENCE)
        assert worker.canary.why == ""
        assert [fresh for fresh, _ in worker.changes] == [True, False, True]


async def test_a_deaf_subscription_is_found_and_cured(redis: RedisServer) -> None:
    """Connected, answering PING, delivering nothing: found within interval + patience."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        await make_deaf(worker, redis)
        await wait_until(lambda: not worker.canary.fresh, INTERVAL + PATIENCE + 0.2)
        assert (False, OVERDUE) in worker.changes
        await wait_until(lambda: worker.canary.fresh, 2)
        redis.command("PUBLISH", "a", "heard again")
        await wait_until(lambda: worker.heard == [b"heard again"], 1)
        assert worker.subscription.statistics().fault == "canary lost"


async def test_a_burst_is_not_thrown_away(redis: RedisServer) -> None:
    """A worker that is behind is unready until it has caught up, and loses nothing meanwhile."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        worker.seconds_per_message = 0.02
        payloads = [b"%d" % number for number in range(70)]
        for payload in payloads:
            assert redis.command("PUBLISH", "a", payload) == 1
        await wait_until(lambda: not worker.canary.fresh, INTERVAL + PATIENCE + 0.2)
        assert worker.canary.why == OVERDUE
        assert len(worker.heard) < len(payloads) - PATIENCE / 0.02
        await wait_until(lambda: worker.canary.fresh, 3)
        await wait_until(lambda: len(worker.heard) == len(payloads), 1)

        assert payloads == worker.heard
        assert worker.subscription.statistics().faults == 0


async def test_a_canary_that_goes_elsewhere(redis: RedisServer, tmp_path: Path) -> None:
    """What is published reaches another Redis: found, although the old one has much to say."""
    with RedisServer(tmp_path / "other") as other:
        async with (
            working(redis, way_out=Endpoint(path=str(other.path))) as worker,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(chatter, redis)
            await wait_until(lambda: worker.subscription.statistics().fault == "canary lost", 2)
            assert len(worker.heard) > 5
            assert not worker.canary.fresh
            nursery.cancel_scope.cancel()


async def chatter(redis: RedisServer) -> None:
    """Publish something all the time."""
    while True:
        redis.command("PUBLISH", "a", "x")
        await trio.sleep(0.005)


async def test_without_a_canary_a_deaf_subscription_starves(redis: RedisServer) -> None:
    """The negative control: nothing else notices, and everything published is lost."""
    async with working(redis, with_canary=False) as worker:
        await make_deaf(worker, redis)
        for _ in range(5):
            await trio.sleep((INTERVAL + PATIENCE) / 2)
            redis.command("PUBLISH", "a", "unheard")

        assert worker.subscription.up
        assert worker.subscription.statistics().faults == 0
        assert worker.heard == []


async def test_silence_is_found_by_the_canary_too(redis: RedisServer) -> None:
    """A black hole between Redis and us is a lost canary before it is a lost PING."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        worker.proxy.mute_to_client = True
        await wait_until(lambda: not worker.canary.fresh, INTERVAL + PATIENCE + 0.2)
        assert worker.subscription.statistics().fault in {"", "canary lost"}
        worker.proxy.mute_to_client = False
        await wait_until(lambda: worker.canary.fresh, 5)


async def test_a_canary_lost_with_its_link_is_no_second_fault(redis: RedisServer) -> None:
    """A link that ends with a canary on its way gets a successor that is left in peace."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        worker.proxy.latency_seconds = 0.1
        redis.command("CONFIG", "RESETSTAT")
        await wait_until(lambda: redis.commands_seen("publish") == 1)
        worker.proxy.latency_seconds = 0
        worker.proxy.cut()
        await wait_until(lambda: not worker.canary.fresh, 1)
        await wait_until(lambda: worker.canary.fresh, 1)
        await trio.sleep(2 * (INTERVAL + PATIENCE))
        assert worker.subscription.statistics().faults == 1


async def test_a_canary_that_redis_does_not_take(
    redis: RedisServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Publishing is forbidden: the public learns that, the log learns why; no new link."""
    redis.command("ACL", "SETUSER", "mute", "on", ">pw", "+@all", "&*", "~*")
    async with working(redis, user="mute") as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        redis.command("ACL", "SETUSER", "mute", "-publish")
        await wait_until(lambda: not worker.canary.fresh, 2 * INTERVAL)
        assert worker.canary.why == REFUSED
        await trio.sleep(2 * INTERVAL)
        assert capfd.readouterr().err.count("NOPERM") == 1
        assert worker.subscription.statistics().faults == 0
        redis.command("ACL", "SETUSER", "mute", "+publish")
        await wait_until(lambda: worker.canary.fresh, 3 * INTERVAL)


async def test_a_link_that_is_down_is_the_reason(redis: RedisServer) -> None:
    """Where Redis answers neither, that the subscription is down says more than the rest."""
    out = Toxic(("127.0.0.1", redis.port))
    async with trio.open_nursery() as nursery:
        await nursery.start(out.run)
        way_out = Endpoint(host="127.0.0.1", port=out.port)
        async with working(redis, way_out=way_out) as worker:
            await wait_until(lambda: worker.canary.fresh, 1)
            redis.command("CONFIG", "RESETSTAT")
            out.mute_to_client = True
            # Without the subscription, the canary only comes back by our own hand.
            worker.proxy.mute_to_client = True
            await wait_until(lambda: redis.commands_seen("publish") == 1)
            worker.proxy.cut()
            await wait_until(lambda: not worker.subscription.up, 1)
            assert worker.canary.why == LINK_DOWN
            await trio.sleep(2 * PATIENCE)
            assert worker.canary.why == LINK_DOWN
        nursery.cancel_scope.cancel()


async def test_only_the_canary_that_is_out_counts(redis: RedisServer) -> None:
    """Older ones, and those of a namesake, prove nothing."""
    async with working(redis) as worker:
        await wait_until(lambda: worker.canary.fresh, 1)
        before = worker.canary.age(0)
        await make_deaf(worker, redis)
        for stranger in (b"", b"0" * 32, b"worker-3"):
            worker.canary.returned(stranger, trio.current_time())
        assert before == worker.canary.age(0)
        await wait_until(lambda: not worker.canary.fresh, INTERVAL + PATIENCE + 0.2)
        worker.canary.returned(b"", trio.current_time())
        assert not worker.canary.fresh


async def test_cancellation_releases_the_channel(redis: RedisServer) -> None:
    """A canary that is stopped leaves no subscription behind."""
    async with working(redis, with_canary=False) as worker:
        with trio.move_on_after(0.2):
            await worker.canary.run()
        assert redis.subscribers(worker.canary.channel) == 1
        await wait_until(lambda: redis.subscribers(worker.canary.channel) == 0, 2)
