"""The hot subscription, on a real Redis."""

import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from tests.redis_server import RedisServer, make_certificates, supports_tls, wait_until
from tests.toxic import Toxic
from tests.trioserver.slow_names import SlowResolver
from trioserver import subscription as module
from trioserver.endpoint import Endpoint, Tls
from trioserver.resp import pack
from trioserver.subscription import MESSAGES_PER_TURN, SILENCE_SECONDS, Batch, Subscription

LIMIT = 20.0
"""Seconds after which a test is stuck."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


class Dice(random.Random):
    """Lets nobody wait, and remembers for how long they might have had to."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        """Return the lower bound."""
        self.pauses.append(b)
        return a


class Waiter:
    """Somebody who waits for a batch, without a task."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls = calls
        self._name = name

    def followed(self) -> None:
        """Note it down; one of us has a bug."""
        self._calls.append(self._name)
        if self._name == "raises":
            raise ZeroDivisionError


class Listener:
    """A subscription, and what it said."""

    def __init__(self, where: Endpoint, *, linger: float = 0.05, silence: float = 2.7) -> None:
        self.where = where
        self.heard: list[tuple[bytes, bytes]] = []
        self.changes: list[bool] = []
        self.subscription = Subscription(
            where,
            self.deliver,
            lambda: self.changes.append(self.subscription.up),
            client_name="trioserver-test",
            linger=linger,
            silence=silence,
            jitter=random.Random(7),
        )

    def deliver(self, channel: bytes, payload: bytes) -> Awaitable[None] | None:
        """Remember a message."""
        self.heard.append((channel, payload))
        return None

    async def up(self, seconds: float = 2.0) -> None:
        """Return when the subscription is up."""
        await wait_until(lambda: self.subscription.up, seconds)

    async def follow(self, *channels: bytes) -> None:
        """Return when ``channels`` are confirmed."""
        for channel in channels:
            batch = self.subscription.follow(channel)
            if batch is not None:
                await batch.wait()


@asynccontextmanager
async def running(listener: Listener) -> AsyncIterator[Subscription]:
    """Run a listener's subscription for the time of the block."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.subscription.run)
            yield listener.subscription
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def proxied(redis: RedisServer) -> AsyncIterator[tuple[Toxic, Endpoint]]:
    """Run a proxy in front of ``redis``."""
    async with trio.open_nursery() as nursery:
        proxy = Toxic(("127.0.0.1", redis.port))
        await nursery.start(proxy.run)
        yield proxy, Endpoint(host="127.0.0.1", port=proxy.port)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(
    handler: Callable[[trio.SocketStream], Awaitable[object]],
) -> AsyncIterator[Endpoint]:
    """Run a server that is no Redis."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        yield Endpoint(host="127.0.0.1", port=listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def unix(redis: RedisServer) -> Endpoint:
    """Return the endpoint of the Unix socket."""
    return Endpoint(path=str(redis.path), password=redis.password)


def publish_many(redis: RedisServer, channel: bytes, payloads: list[bytes]) -> None:
    """Publish all ``payloads`` in one write; returns when Redis has taken them."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(redis.path))
        connection.sendall(b"".join(pack("PUBLISH", channel, each) for each in payloads))
        connection.sendall(pack("QUIT"))
        while connection.recv(65536):
            pass


def connections(redis: RedisServer) -> int:
    """Return how many of our connections Redis sees."""
    reply = redis.command("CLIENT", "LIST")
    assert isinstance(reply, bytes)
    return reply.count(b"name=trioserver-test")


async def test_messages_arrive_in_order(redis: RedisServer) -> None:
    """What is published after the confirmation arrives, all of it, in order, and nothing else."""
    listener = Listener(unix(redis))
    payloads = [b"%d" % number for number in range(5000)]
    async with running(listener) as subscription:
        await listener.follow(b"a")
        assert subscription.follow(b"a") is None

        publish_many(redis, b"other", [b"x"])
        publish_many(redis, b"a", payloads)
        await wait_until(lambda: len(listener.heard) >= len(payloads))

    assert [(b"a", payload) for payload in payloads] == listener.heard
    assert subscription.statistics().messages == 5000


async def test_other_tasks_have_their_turn(redis: RedisServer) -> None:
    """A burst does not keep the rest of the worker waiting for more than 128 messages."""
    listener = Listener(unix(redis))
    seen = [0]

    async def somebody_else() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            seen.append(len(listener.heard))

    async with running(listener), trio.open_nursery() as nursery:
        await listener.follow(b"a")
        nursery.start_soon(somebody_else)
        publish_many(redis, b"a", [b"x"] * 3000)
        await wait_until(lambda: len(listener.heard) == 3000)
        nursery.cancel_scope.cancel()

    steps = [after - before for before, after in itertools.pairwise(seen)]
    # Trio's order is random: the reader may have had two turns between two of the other's.
    assert MESSAGES_PER_TURN <= max(steps) <= 2 * MESSAGES_PER_TURN


async def test_deliver_may_take_its_time(redis: RedisServer) -> None:
    """What deliver returns is awaited before the next message, so that order holds."""
    order: list[bytes] = []

    async def slowly(payload: bytes) -> None:
        await trio.sleep(0.001 if payload == b"first" else 0)
        order.append(payload)

    listener = Listener(unix(redis))
    subscription = Subscription(unix(redis), lambda _, payload: slowly(payload), lambda: None)
    listener.subscription = subscription
    async with running(listener):
        await listener.follow(b"a")
        publish_many(redis, b"a", [b"first", b"second"])
        await wait_until(lambda: len(order) == 2)

    assert order == [b"first", b"second"]


async def test_a_bug_in_deliver_costs_one_message(redis: RedisServer) -> None:
    """What deliver raises is counted; the link lives and the next message arrives."""
    heard: list[bytes] = []

    def deliver(_channel: bytes, payload: bytes) -> Awaitable[None] | None:
        if payload == b"poison":
            raise ZeroDivisionError
        heard.append(payload)
        return None

    listener = Listener(unix(redis))
    listener.subscription = Subscription(unix(redis), deliver, lambda: None)
    async with running(listener) as subscription:
        await listener.follow(b"a")
        publish_many(redis, b"a", [b"poison", b"good", b"poison", b"again"])
        await wait_until(lambda: len(heard) == 2)

    assert heard == [b"good", b"again"]
    assert subscription.statistics().deliver_failures == 2
    assert subscription.statistics().faults == 0


async def test_many_follows_share_few_commands(redis: RedisServer) -> None:
    """10,000 channels asked for in one turn cost about 20 SUBSCRIBE commands and one batch."""
    listener = Listener(unix(redis))
    async with running(listener) as subscription:
        await listener.up()
        redis.command("CONFIG", "RESETSTAT")
        batches: set[Batch] = set()
        for number in range(10_000):
            batch = subscription.follow(b"user_noti:%d" % number)
            assert batch is not None
            batches.add(batch)
        for batch in batches:
            await batch.wait()

        assert len(batches) == 1
        assert redis.commands_seen("subscribe") == 20
        assert redis.subscribers(b"user_noti:9999") == 1
        assert subscription.statistics().channels == 10_000


async def test_follows_during_a_round_share_the_next(redis: RedisServer) -> None:
    """While a SUBSCRIBE is on its way, who comes is collected."""
    listener = Listener(Endpoint())
    async with proxied(redis) as (proxy, where):
        listener = Listener(where)
        async with running(listener) as subscription:
            await listener.up()
            redis.command("CONFIG", "RESETSTAT")
            proxy.latency_seconds = 0.02
            for number in range(40):
                subscription.follow(b"c%d" % number)
                await trio.sleep(0.0005)
            await listener.follow(b"last")

    # At most one round per 5 ms, not one per caller.
    assert redis.commands_seen("subscribe") <= 20


async def test_waiters_are_told_once(redis: RedisServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Who waits without a task is called when the batch is confirmed, whatever others do."""
    listener = Listener(unix(redis))
    calls: list[str] = []
    waiters = {name: Waiter(calls, name) for name in ("a", "b", "forgotten", "raises")}
    async with running(listener) as subscription:
        await listener.up()
        batch = subscription.follow(b"a")
        assert batch is not None
        for waiter in waiters.values():
            batch.notify(waiter)
        batch.notify(waiters["a"])
        batch.forget(waiters["forgotten"])
        batch.forget(waiters["forgotten"])
        assert calls == []
        await batch.wait()

        assert sorted(calls) == ["a", "b", "raises"]
        batch.forget(waiters["a"])
        subscription.reconnect("once more")
        await listener.follow(b"b")
        await listener.up()
        assert len(calls) == 3
        assert subscription.statistics().fault == "once more"
    assert "a waiter failed" in capfd.readouterr().err


async def test_a_milestone_is_behind_all_that_was_said(redis: RedisServer) -> None:
    """It is reached when what Redis had said before has been delivered, and not earlier."""
    order: list[bytes] = []

    async def slowly(payload: bytes) -> None:
        await trio.sleep(0.02)
        order.append(payload)

    listener = Listener(unix(redis), silence=0.3)
    listener.subscription = Subscription(
        unix(redis), lambda _, payload: slowly(payload), lambda: None, silence=0.3
    )
    reached: list[list[bytes]] = []
    async with running(listener) as subscription:
        assert not subscription.milestone(lambda: reached.append([]))
        await listener.follow(b"a")
        publish_many(redis, b"a", [b"1", b"2", b"3"])
        assert subscription.milestone(lambda: reached.append(list(order)))
        assert subscription.milestone(lambda: reached.append(list(order)))
        await wait_until(lambda: len(reached) == 2)
        await trio.sleep(0.5)  # the watch's own PINGs are nobody's milestone

    assert [[b"1", b"2", b"3"]] * 2 == reached


async def test_a_milestone_ends_with_its_link(redis: RedisServer) -> None:
    """What one link did not answer is not answered by the next."""
    reached: list[bool] = []
    async with proxied(redis) as (proxy, where):
        listener = Listener(where, silence=0.4)
        async with running(listener) as subscription:
            await listener.up()
            proxy.mute_to_client = True
            assert subscription.milestone(lambda: reached.append(True))
            await trio.sleep(0.05)
            proxy.mute_to_client = False
            proxy.cut()
            await wait_until(lambda: subscription.statistics().links == 2)
            await trio.sleep(0.3)
    assert reached == []


async def test_release_unsubscribes_later(redis: RedisServer) -> None:
    """A released channel lingers, is then unsubscribed, and can be followed again."""
    listener = Listener(unix(redis), linger=0.2)
    async with running(listener) as subscription:
        await listener.follow(b"a", b"b")
        subscription.release(b"a")
        subscription.release(b"a")
        await trio.sleep(0.05)
        assert redis.subscribers(b"a") == 1

        await wait_until(lambda: redis.subscribers(b"a") == 0)
        assert redis.subscribers(b"b") == 1
        assert subscription.statistics().channels == 1
        await listener.follow(b"a")
        assert redis.subscribers(b"a") == 1


async def test_a_follow_keeps_a_lingering_channel(redis: RedisServer) -> None:
    """Following a released channel in time costs Redis nothing."""
    listener = Listener(unix(redis), linger=0.1)
    async with running(listener) as subscription:
        await listener.follow(b"a")
        redis.command("CONFIG", "RESETSTAT")
        subscription.release(b"a")
        assert subscription.follow(b"a") is None
        await trio.sleep(0.5)

    assert redis.commands_seen("unsubscribe") == 0


async def test_a_follow_behind_an_unsubscribe(redis: RedisServer) -> None:
    """With UNSUBSCRIBE in flight, a follow is confirmed by its own SUBSCRIBE and by no other."""
    async with proxied(redis) as (proxy, where):
        listener = Listener(where, linger=0)
        async with running(listener) as subscription:
            await listener.follow(b"a")
            redis.command("CONFIG", "RESETSTAT")
            proxy.latency_seconds = 0.1
            subscription.release(b"a")
            await wait_until(lambda: subscription.statistics().channels == 0)
            batch = subscription.follow(b"a")
            assert batch is not None
            await batch.wait()

            assert redis.commands_seen("unsubscribe") == 1
            assert redis.subscribers(b"a") == 1
            assert subscription.follow(b"a") is None
            assert subscription.statistics().faults == 0


@pytest.mark.parametrize("seed", range(4))
async def test_races_of_follow_and_release(redis: RedisServer, seed: int) -> None:
    """Whatever comes, goes and breaks: after quiet, Redis has exactly what is wanted."""
    dice = random.Random(seed)
    channels = [b"c%d" % number for number in range(12)]
    wanted: set[bytes] = set()
    async with proxied(redis) as (proxy, where):
        listener = Listener(where, linger=0.01)
        async with running(listener) as subscription:
            for _ in range(250):
                channel = dice.choice(channels)
                if dice.random() < 0.5:
                    wanted.add(channel)
                    subscription.follow(channel)
                else:
                    wanted.discard(channel)
                    subscription.release(channel)
                if dice.random() < 0.3:
                    proxy.latency_seconds = dice.choice([0, 0.001, 0.01, 0.02])
                    await trio.sleep(dice.choice([0, 0.001, 0.02]))
                if dice.random() < 0.01:
                    proxy.cut()
            proxy.latency_seconds = 0
            await listener.follow(*wanted)
            await trio.sleep(0.3)

            reply = redis.command("PUBSUB", "CHANNELS")
            assert isinstance(reply, list)
            assert wanted == set(reply)
            assert all(subscription.follow(channel) is None for channel in wanted)


async def test_every_killed_connection_is_replaced(redis: RedisServer) -> None:
    """CLIENT KILL, 50 times: each time all channels are back within a second."""
    listener = Listener(unix(redis))
    channels = [b"c%d" % number for number in range(600)]
    slowest = 0.0
    async with running(listener) as subscription:
        for channel in channels:
            subscription.follow(channel)
        await listener.up()
        for kill in range(50):
            assert redis.command("CLIENT", "KILL", "TYPE", "pubsub") == 1
            started = time.monotonic()
            await wait_until(lambda: not subscription.up, 1)
            await listener.up()
            slowest = max(slowest, time.monotonic() - started)
            reply = redis.command("PUBSUB", "NUMSUB", *channels)
            assert isinstance(reply, list)
            assert set(reply[1::2]) == {1}
            publish_many(redis, channels[kill], [b"%d" % kill])
            await wait_until(lambda: len(listener.heard) > kill)  # noqa: B023 - awaited here

    assert slowest < 1.0
    assert [(channels[kill], b"%d" % kill) for kill in range(50)] == listener.heard
    assert subscription.statistics().faults == 50
    assert subscription.statistics().links == 51
    assert listener.changes == [True, False] * 50 + [True, False]


async def test_links_that_die_young(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more of them in a row, the longer the pauses; a link that lived makes up for it."""
    dice = Dice()
    listener = Listener(unix(redis))
    where = Endpoint(host="127.0.0.1", port=redis.port)
    listener.subscription = Subscription(where, listener.deliver, lambda: None, jitter=dice)
    async with running(listener) as subscription:
        await listener.up()
        for number in range(130):
            subscription.reconnect("cut")
            await wait_until(lambda: subscription.statistics().links == number + 2)  # noqa: B023 - awaited here
        assert sorted(dice.pauses) == dice.pauses
        assert dice.pauses[0] < 0.11
        assert dice.pauses[49] < 0.6
        assert dice.pauses[-1] == 5.0

        monkeypatch.setattr(module, "STEADY_SECONDS", 0.05)
        await trio.sleep(0.06)
        subscription.reconnect("cut")
        await wait_until(lambda: subscription.statistics().links == 132)
        assert dice.pauses[-1] == 0.1


async def test_the_log_says_why_an_outage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another reason than the one that was logged is logged too, but not in floods."""
    monkeypatch.setattr(module, "FAULT_REPORT_SECONDS", 0.3)
    redis = RedisServer(tmp_path / "redis", password="old")
    with redis:
        listener = Listener(unix(redis))
        async with running(listener) as subscription:
            await listener.up()
            redis.kill()
            redis.password = "new"
            redis.start()
            await wait_until(lambda: "WRONGPASS" in subscription.statistics().fault)
            faults = subscription.statistics().faults
            await wait_until(lambda: subscription.statistics().faults >= faults + 6)
    log = capfd.readouterr().err
    assert log.count("redis subscription is down") == 1
    assert log.count("redis subscription is still down") == 1
    assert log.count("WRONGPASS") == 1


async def test_redis_dies_and_comes_back(redis: RedisServer) -> None:
    """A killed Redis is noticed at once; after its restart everything is subscribed again."""
    listener = Listener(unix(redis))
    async with running(listener) as subscription:
        await listener.follow(b"a")
        redis.kill()
        await wait_until(lambda: not subscription.up, 1)
        assert subscription.follow(b"a") is not None
        batch = subscription.follow(b"b")
        assert batch is not None
        await trio.sleep(0.3)
        assert not batch.confirmed

        redis.start()
        await batch.wait()
        assert subscription.up
        assert [redis.subscribers(b"a"), redis.subscribers(b"b")] == [1, 1]


async def test_redis_is_late(redis: RedisServer) -> None:
    """A worker may start before its Redis; what was followed meanwhile is subscribed."""
    redis.kill()
    listener = Listener(unix(redis))
    batch = listener.subscription.follow(b"a")
    assert batch is not None
    async with running(listener) as subscription:
        await wait_until(lambda: subscription.statistics().faults >= 2)
        assert "No such file" in subscription.statistics().fault or (
            "refused" in subscription.statistics().fault
        )
        redis.start()
        await batch.wait()
        assert redis.subscribers(b"a") == 1


@pytest.mark.parametrize(
    ("direction", "silence"), [("mute_to_client", SILENCE_SECONDS), ("mute_to_server", 0.6)]
)
async def test_a_black_hole_is_noticed(redis: RedisServer, direction: str, silence: float) -> None:
    """Silence in either direction ends the link within 3 s, although nothing is closed."""
    async with proxied(redis) as (proxy, where):
        listener = Listener(where, silence=silence)
        async with running(listener) as subscription:
            await listener.follow(b"a")
            setattr(proxy, direction, True)
            started = trio.current_time()
            await wait_until(lambda: not subscription.up, 3.5)
            noticed = trio.current_time() - started
            setattr(proxy, direction, False)
            await listener.up(6)

    assert silence * 3 / 4 < noticed <= silence + 0.3
    assert "silent" in subscription.statistics().fault or (
        "no connection" in subscription.statistics().fault
    )


async def test_a_stopped_redis_is_noticed_on_a_unix_socket(redis: RedisServer) -> None:
    """SIGSTOP: the socket is open, nobody answers."""
    listener = Listener(unix(redis), silence=0.5)
    async with running(listener) as subscription:
        await listener.follow(b"a")
        redis.pause()
        await wait_until(lambda: not subscription.up, 0.7)
        redis.resume()
        await listener.up(4)
        assert redis.subscribers(b"a") >= 1


async def test_an_idle_link_lives(redis: RedisServer) -> None:
    """Nothing to say is no silence: PING is answered, time after time."""
    listener = Listener(unix(redis), silence=0.2)
    async with running(listener) as subscription:
        await listener.follow(b"a")
        redis.command("CONFIG", "RESETSTAT")
        await wait_until(lambda: redis.commands_seen("ping") >= 8)
        assert subscription.statistics().faults == 0


async def test_our_own_absence_is_no_silence_of_redis(redis: RedisServer) -> None:
    """A loop that was blocked does not blame Redis."""
    listener = Listener(unix(redis), silence=0.4)
    async with running(listener) as subscription:
        await listener.follow(b"a")
        for _ in range(2):
            time.sleep(0.6)  # noqa: ASYNC251 - that is the fault
            await trio.sleep(0.05)
        assert subscription.statistics().faults == 0


async def test_a_slow_delivery_is_no_silence_of_redis(redis: RedisServer) -> None:
    """While we are busy with a message, nobody blames Redis."""

    async def slowly() -> None:
        await trio.sleep(0.8)

    subscription = Subscription(unix(redis), lambda *_: slowly(), lambda: None, silence=0.2)
    listener = Listener(unix(redis))
    listener.subscription = subscription
    async with running(listener):
        await listener.follow(b"a")
        redis.command("PUBLISH", "a", "x")
        await wait_until(lambda: subscription.statistics().messages == 1)
        await trio.sleep(0.9)
        assert subscription.statistics().faults == 0


async def test_a_bug_of_ours_ends_the_link_only(redis: RedisServer) -> None:
    """An exception where none is expected is logged and cured by a new link."""
    listener = Listener(unix(redis))
    calls = 0

    def changed() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError

    listener.subscription = Subscription(unix(redis), listener.deliver, changed)
    async with running(listener) as subscription:
        await wait_until(lambda: calls == 3)
        await listener.follow(b"a")
        assert subscription.statistics().fault == "internal error"
        assert subscription.statistics().faults == 1


async def test_a_bug_of_who_is_told(redis: RedisServer) -> None:
    """Who raises when told that the link is down does not end the subscription."""
    listener = Listener(unix(redis))

    def changed() -> None:
        if not listener.subscription.up:
            raise ZeroDivisionError

    listener.subscription = Subscription(unix(redis), listener.deliver, changed)
    async with running(listener) as subscription:
        await listener.up()
        subscription.reconnect("cut")
        await wait_until(lambda: subscription.statistics().links == 2)


async def test_a_host_that_cannot_be_looked_up() -> None:
    """What the resolver raises that is no OSError is one more failed attempt."""
    listener = Listener(Endpoint(host="a..b"))
    async with running(listener) as subscription:
        await wait_until(lambda: subscription.statistics().faults >= 2)
        assert subscription.statistics().fault == "internal error"


async def test_names_may_be_found_slowly(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding the address is not part of connecting; it has a limit of its own."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    trio.socket.set_custom_hostname_resolver(SlowResolver(0.3))
    listener = Listener(Endpoint(host="redis.test", port=redis.port))
    async with running(listener) as subscription:
        await listener.up()
        assert subscription.statistics().faults == 0

        monkeypatch.setattr(module, "RESOLVE_SECONDS", 0.1)
        subscription.reconnect("cut")
        await wait_until(lambda: subscription.statistics().faults >= 2)
        assert subscription.statistics().fault == "no address of redis.test within 0.1 s"


async def test_unsubscribed_behind_our_back(redis: RedisServer) -> None:
    """An unsubscribe that nobody asked for is a fault, and repaired."""
    async with proxied(redis) as (proxy, where):
        listener = Listener(where)
        async with running(listener) as subscription:
            await listener.follow(b"a")
            await proxy.inject(pack("UNSUBSCRIBE", "a"))
            await wait_until(lambda: not subscription.up, 1)
            await listener.up()
            assert redis.subscribers(b"a") == 1
            assert "unsubscribed unasked" in subscription.statistics().fault


async def test_a_batch_survives_a_fault(redis: RedisServer) -> None:
    """Who waits for a confirmation that is lost gets that of the next link."""
    async with proxied(redis) as (proxy, where):
        listener = Listener(where)
        async with running(listener) as subscription:
            await listener.up()
            proxy.mute_to_client = True
            batch = subscription.follow(b"a")
            again = subscription.follow(b"a")
            assert batch is not None
            assert again is batch
            await wait_until(lambda: redis.subscribers(b"a") == 1)
            assert subscription.follow(b"a") is batch
            assert not batch.confirmed

            proxy.mute_to_client = False
            proxy.cut()
            await batch.wait()
            assert subscription.follow(b"a") is None
            assert redis.subscribers(b"a") == 1


async def test_reconnect_drops_the_link(redis: RedisServer) -> None:
    """Whoever knows that the link is deaf can have another one at once."""
    listener = Listener(unix(redis))
    async with running(listener) as subscription:
        subscription.reconnect("nothing happens before there is a link")
        await listener.follow(b"a")
        subscription.reconnect("canary lost")
        subscription.reconnect("said twice")
        await wait_until(lambda: not subscription.up, 1)
        await listener.up()
        assert subscription.statistics().fault == "canary lost"
        assert subscription.statistics().faults == 1
        await wait_until(lambda: connections(redis) == 1)


async def test_cancellation_closes_the_connection(redis: RedisServer) -> None:
    """After the run has been cancelled Redis sees nobody, and a new run starts over."""
    listener = Listener(unix(redis))
    async with running(listener):
        await listener.follow(b"a")
        assert connections(redis) == 1
    assert not listener.subscription.up
    assert listener.changes == [True, False]
    assert listener.subscription.statistics().faults == 0
    await wait_until(lambda: connections(redis) == 0)

    async with running(listener):
        await listener.up()
        assert redis.subscribers(b"a") == 1


async def test_resp2_works_the_same(tmp_path: Path) -> None:
    """Where HELLO is unknown, the connection speaks RESP2: messages, PING, confirmations."""
    config = {"rename-command": "HELLO NO-HELLO"}
    with RedisServer(tmp_path / "redis", password="s3cret", config=config) as redis:
        listener = Listener(unix(redis), silence=0.3, linger=0)
        async with running(listener) as subscription:
            await listener.follow(b"a", b"b")
            assert redis.command("PUBLISH", "a", "1") == 1
            await wait_until(lambda: listener.heard)
            subscription.release(b"b")
            redis.command("CONFIG", "RESETSTAT")
            await wait_until(lambda: redis.commands_seen("ping") >= 4)
            await wait_until(lambda: redis.subscribers(b"b") == 0)
            reply = redis.command("CLIENT", "LIST", "TYPE", "pubsub")
            assert isinstance(reply, bytes)
            assert b"resp=2" in reply
            assert b"name=trioserver-test" in reply
            assert subscription.statistics().faults == 0


async def test_password(tmp_path: Path) -> None:
    """The right password is used; a wrong one is a fault that says so."""
    with RedisServer(tmp_path / "redis", password="s3cret") as redis:
        listener = Listener(unix(redis))
        async with running(listener):
            await listener.follow(b"a")

        wrong = Listener(Endpoint(path=str(redis.path), password="guess"))
        async with running(wrong) as subscription:
            await wait_until(lambda: subscription.statistics().faults >= 2)
            assert "WRONGPASS" in subscription.statistics().fault
            assert wrong.changes == []

        without = Listener(Endpoint(path=str(redis.path)))
        async with running(without) as subscription:
            await wait_until(lambda: subscription.statistics().faults >= 1)
            assert "NOAUTH" in subscription.statistics().fault


async def test_a_user_without_password(redis: RedisServer) -> None:
    """A user who needs no password is the one we are."""
    redis.command("ACL", "SETUSER", "open", "on", "nopass", "&*", "-@all", "+subscribe")
    redis.command("ACL", "SETUSER", "default", "off")
    listener = Listener(Endpoint(path=str(redis.path), username="open"))
    async with running(listener) as subscription:
        await listener.follow(b"a")
        assert subscription.statistics().faults == 0


async def test_channels_that_are_forbidden(redis: RedisServer) -> None:
    """A refused SUBSCRIBE is a fault that says what Redis said, again and again."""
    redis.command("ACL", "SETUSER", "poor", "on", ">pw", "+@all", "resetchannels", "&mine:*")
    listener = Listener(Endpoint(path=str(redis.path), username="poor", password="pw"))
    async with running(listener) as subscription:
        await listener.follow(b"mine:a")
        batch = subscription.follow(b"yours:a")
        assert batch is not None
        await wait_until(lambda: subscription.statistics().faults >= 3)
        assert "NOPERM" in subscription.statistics().fault
        redis.command("ACL", "SETUSER", "poor", "&yours:*")
        await batch.wait()


@pytest.mark.skipif(not supports_tls(), reason="this Redis was built without TLS")
async def test_tls(tmp_path: Path) -> None:
    """With TLS: trusted certificates work, others are a fault."""
    make_certificates(tmp_path)
    with RedisServer(tmp_path / "redis", certificates=tmp_path) as redis:
        trusting = Tls(ca_file=str(tmp_path / "ca.pem"))
        listener = Listener(Endpoint(host="127.0.0.1", port=redis.port, tls=trusting), silence=0.3)
        async with running(listener) as subscription:
            await listener.follow(b"a")
            payloads = [b"x" * 1000] * 2000
            publish_many(redis, b"a", payloads)
            await wait_until(lambda: len(listener.heard) == 2000)
            await trio.sleep(0.6)
            assert subscription.statistics().faults == 0

        doubting = Listener(Endpoint(host="127.0.0.1", port=redis.port, tls=Tls()))
        async with running(doubting) as subscription:
            await wait_until(lambda: subscription.statistics().faults >= 1)
            assert "certificate" in subscription.statistics().fault.lower()

        redis.command("CONFIG", "SET", "tls-auth-clients", "yes")
        known = attrs.evolve(
            trusting,
            cert_file=str(tmp_path / "server.pem"),
            key_file=str(tmp_path / "server.key"),
        )
        async with running(Listener(attrs.evolve(listener.where, tls=known))) as subscription:
            await wait_until(lambda: subscription.up)
        redis.command("CONFIG", "SET", "tls-auth-clients", "no")

        careless = Endpoint(host="127.0.0.1", port=redis.port, tls=Tls(verify=False))
        async with running(Listener(careless)) as subscription:
            await wait_until(lambda: subscription.up)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (b"", "during the greeting"),
        (b"nonsense\r\n", "Protocol error"),
        (b"%1\r\n*1\r\n+a\r\n+b\r\n", "internal error"),
        (b"+OK\r\n:1\r\n", "unexpected reply 1"),
        (b"+OK\r\n-LOADING dataset\r\n", "LOADING dataset"),
        (b"+OK\r\n>3\r\n$9\r\nsubscribe\r\n$1\r\nz\r\n:1\r\n", "subscribed unasked"),
        (b"+OK\r\n*0\r\n", "unexpected reply"),
    ],
)
async def test_strange_servers(said: bytes, fault: str) -> None:
    """Whatever the other side says, it is a fault with a name, and the next attempt follows."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        if said:
            await stream.send_all(said)
            await stream.receive_some(1000)

    async with serving(serve) as where:
        listener = Listener(where)
        async with running(listener) as subscription:
            await wait_until(lambda: subscription.statistics().faults >= 2)
            assert fault in subscription.statistics().fault


async def test_a_turn_is_over_before_a_fault_ends_the_link() -> None:
    """What came before it goes out, although no link may come for long."""
    seen: list[bytes] = []
    greeted = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        if greeted.is_set():
            return
        greeted.set()
        await stream.send_all(b"+OK\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n-ERR no\r\n")
        await stream.receive_some(1000)

    async with serving(serve) as where:
        subscription = Subscription(
            where,
            lambda _channel, payload: seen.append(payload),
            lambda: None,
            turn_over=lambda: seen.append(b"over") if seen else None,
        )
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscription.run)
                await wait_until(lambda: subscription.statistics().faults >= 1)
                assert "ERR no" in subscription.statistics().fault
                assert [b"m", b"over"] == seen[:2]
                nursery.cancel_scope.cancel()


async def test_nobody_answers() -> None:
    """A server that accepts and says nothing is given up after a second."""
    async with serving(_forever) as where:
        listener = Listener(where)
        started = trio.current_time()
        async with running(listener) as subscription:
            await wait_until(lambda: subscription.statistics().faults >= 1)
            assert 1.0 <= trio.current_time() - started < 1.5
            assert subscription.statistics().fault == "no connection within 1 s"


async def _forever(_stream: trio.SocketStream) -> None:
    await trio.sleep_forever()
