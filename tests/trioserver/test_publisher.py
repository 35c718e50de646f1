"""Publishing, on a real Redis: what one publisher promises, all three keep."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import attrs
import msgspec
import pytest
import trio

from tests.redis_server import RedisServer, free_port, wait_until
from tests.toxic import Toxic
from tests.trioserver.ledger_calls import Caller, Ears
from tests.trioserver.publishing import FRONTS, Front, plain_asyncio
from trioserver import kept_topics, ledger
from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable, SettingsError
from trioserver.ledger import Accepted, Command, Owner, Topic
from trioserver.publisher import (
    AsyncioPublisher,
    Ephemeral,
    IdempotencyConflict,
    PayloadMisfit,
    Publisher,
    PublishInterrupted,
    PublishRefused,
    RateLimited,
    TopicRules,
    TrioPublisher,
)
from trioserver.publisher.asking import BATCH_COMMANDS, HEARD_SECONDS, Asking
from trioserver.publisher.attempts import Exchange, Outcome, Steps
from trioserver.redis_direct import BlockingLink
from trioserver.redis_link import open_link
from trioserver.settings import Settings
from trioserver.topics import Patterns

LIMIT: Final = 30.0
DEFAULTS: Final = Settings(data_dir=Path("/"))

Open = Callable[..., Front]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(params=FRONTS)
def open_front(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Make publishers of one kind; they are closed afterwards."""
    opened: list[Front] = []

    def make(where: str | Endpoint, **options: Any) -> Front:
        opened.append(FRONTS[request.param](where, **options))
        return opened[-1]

    yield make
    for front in opened:
        front.close()


@pytest.fixture
def front(open_front: Open, redis: RedisServer) -> Front:
    """A publisher for the test's Redis."""
    return open_front(redis.url)


@pytest.fixture
def publisher(redis: RedisServer) -> Iterator[Publisher]:
    """The plain publisher, where one stands for all."""
    with Publisher(redis.url) as publisher:
        yield publisher


@asynccontextmanager
async def proxied(redis: RedisServer) -> AsyncIterator[tuple[Toxic, Endpoint]]:
    """Run a proxy in front of ``redis``."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            proxy = Toxic(("127.0.0.1", redis.port))
            await nursery.start(proxy.run)
            yield proxy, Endpoint(host="127.0.0.1", port=proxy.port)
            nursery.cancel_scope.cancel()


def inbox(redis: RedisServer, user: Owner) -> list[dict[bytes, bytes]]:
    """Return what is kept for a user, in order."""
    entries = redis.command("XRANGE", ledger.key("inbox", user), "-", "+")
    assert isinstance(entries, list)
    return [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in entries]


# One, many, everyone


def test_one_user(front: Front, redis: RedisServer) -> None:
    """It is kept in the user's inbox, said on the user's channel, and the answer names it."""
    with Ears(redis.path) as ears:
        accepted = front.publish({"order": 1017}, user="ann", type="order.shipped", ttl=60)
        [heard] = ears.heard()
    [kept] = inbox(redis, "ann")

    assert isinstance(accepted, Accepted)
    assert ("accepted", 1) == (accepted.outcome, accepted.seq)
    assert accepted.id.startswith(f"{ledger.partition('ann')}-")
    assert accepted.position == f"1.{heard.point}"
    assert ("user_noti:ann", accepted.id) == (heard.channel, heard.rest[0])
    assert (b'{"order":1017}', b"order.shipped") == (kept[b"p"], kept[b"t"])
    assert 55 < int(kept[b"x"]) / 1000 - time.time() < 65


def test_everyone(front: Front, redis: RedisServer) -> None:
    """It is kept once, in the stream for everyone."""
    accepted = front.publish("Hello", everyone=True)

    assert accepted.id.startswith("all-")
    assert [b'"Hello"'] == [kept[b"p"] for kept in inbox(redis, None)]


def test_many_users(front: Front, redis: RedisServer) -> None:
    """Each gets one of its own; whoever is no user is a value, and costs nobody anything."""
    users = ["ann", "", "bob", "ann", "c" * 129]
    ann, nobody, bob, again, too_long = front.publish(7, users=iter(users))

    assert (1, 1) == (ann.seq, bob.seq)
    assert ann.id != bob.id
    assert ann is again
    assert {PublishRefused} == {type(nobody), type(too_long)}
    assert [1, 1] == [len(inbox(redis, user)) for user in ("ann", "bob")]
    assert [] == front.publish(7, users=[])


def test_ephemeral(front: Front, redis: RedisServer) -> None:
    """With ttl 0 it is a plain PUBLISH, and Redis keeps nothing at all."""
    with Caller(redis.path) as listener:
        listener.ask("SUBSCRIBE", "user_noti:ann")
        result = front.publish({"n": 1}, user="ann", type="typing", ttl=0)
        _, channel, data = cast("list[bytes]", listener.next())
    many = front.publish(1, users=["ann", "bob"], ttl=0)

    assert Ephemeral("", "", 0, "ephemeral", 1) == result
    assert b"user_noti:ann" == channel
    assert {"type": "typing", "payload": {"n": 1}} == msgspec.json.decode(data)
    assert [0, 0] == [one.receivers for one in many]
    assert 0 == front.publish(1, everyone=True, ttl=0).receivers
    assert 0 == redis.command("DBSIZE")


@pytest.mark.parametrize(
    "recipients",
    [
        {},
        {"user": "ann", "everyone": True},
        {"user": "ann", "users": ["bob"]},
        {"users": "ann"},
        {"user": ""},
        {"user": 42},
        {"everyone": False},
        {"topic": "room", "user": "ann"},
        {"topic": "room", "topics": ["room"]},
        {"topic": "room", "everyone": True},
        {"topics": "room"},
        {"topic": ""},
        {"topic": "a b"},
        {"topic": "x" * 129},
        {"topic": 42},
    ],
)
def test_wrong_recipients(
    publisher: Publisher, redis: RedisServer, recipients: dict[str, Any]
) -> None:
    """One of five ways to say it; a mistake is refused and nothing is sent."""
    untyped: Any = publisher
    with pytest.raises(PublishRefused):
        untyped.publish(1, **recipients)
    assert 0 == redis.command("DBSIZE")


def test_a_mistake_costs_nobody_anything(front: Front, redis: RedisServer) -> None:
    """What is wrong for all is refused before anything is sent."""
    for options in ({"type": "goodbye"}, {"ttl": -1}, {"tll": 5}, {"ttl": 0.5}):
        with pytest.raises(PublishRefused):
            front.publish(1, user="ann", **options)
    with pytest.raises(PublishRefused, match="payload"):
        front.publish(object(), users=["ann", "bob"])
    assert 0 == redis.command("DBSIZE")


def test_what_only_the_script_refuses(front: Front, redis: RedisServer) -> None:
    """Its sentence is what the caller reads; for many users it is a value."""
    with pytest.raises(PublishRefused, match=r"^fallback_after is no whole number from 1 "):
        front.publish(1, user="ann", fallback_after=0)
    results = front.publish(1, users=["ann", "bob"], fallback_after=0)

    assert [PublishRefused] * 2 == [type(one) for one in results]
    assert 0 == redis.command("DBSIZE")


def test_an_idempotency_key(front: Front, redis: RedisServer) -> None:
    """The same once more gets the same answer; something else is a conflict."""
    first = front.publish({"n": 1}, user="ann", idempotency_key="k")
    again = front.publish({"n": 1}, user="ann", idempotency_key="k")

    assert attrs_of(first) | {"outcome": "duplicate"} == attrs_of(again)
    with pytest.raises(IdempotencyConflict):
        front.publish({"n": 2}, user="ann", idempotency_key="k")
    ann, bob = front.publish({"n": 2}, users=["ann", "bob"], idempotency_key="k")
    assert isinstance(ann, IdempotencyConflict)
    assert "accepted" == bob.outcome
    assert 1 == len(inbox(redis, "ann"))


def attrs_of(accepted: Accepted) -> dict[str, Any]:
    """Return the fields of an answer."""
    return msgspec.structs.asdict(accepted)


def test_options_reach_the_script(publisher: Publisher, redis: RedisServer) -> None:
    """Whatever may be said arrives: the key of a life tells."""
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    due = time.time() + 3600
    accepted = publisher.publish(
        [1], user="ann", deliver_at=due, fallback_after=600, collapse_key="c", traceparent=trace
    )
    life = publisher.notification(accepted.id)

    assert ("scheduled", "", 0) == (accepted.outcome, accepted.position, accepted.seq)
    assert life is not None
    assert life.due == round(due * 1000)
    assert life.fallback == life.due + 600_000
    assert life.expires == life.due + 7 * 86_400_000
    key = ledger.notification_key(accepted.id)
    assert key is not None
    stored = redis.command("HGETALL", key)
    assert isinstance(stored, list)
    assert {b"c", trace.encode()} <= set(stored)


def test_the_servers_own_settings(open_front: Open, redis: RedisServer) -> None:
    """Channels, lifetime and limits are those of the settings."""
    settings = Settings(
        user_channel="user:{user}",
        channel_prefix="stage:",
        notification_ttl=60,
        inbox_max_length=2,
        notification_max_size=10,
    )
    front = open_front(Endpoint(path=str(redis.path)), settings=settings)
    with Ears(redis.path) as ears:
        for number in range(3):
            front.publish(number, user="ann")
        front.publish(1, everyone=True)
        channels = [heard.channel for heard in ears.heard() if heard.kind == "n"]

    assert [*["stage:user:ann"] * 3, "stage:channels:broadcast"] == channels
    assert [b"1", b"2"] == [kept[b"p"] for kept in inbox(redis, "ann")]
    assert 55 < int(inbox(redis, "ann")[0][b"x"]) / 1000 - time.time() < 65
    with pytest.raises(PublishRefused, match="larger than 10 bytes"):
        front.publish("123456789", user="ann")


def test_what_the_server_said_about_channels_counts(
    publisher: Publisher, redis: RedisServer
) -> None:
    """Who knows only the URL publishes where the user's worker is known to listen."""
    with Caller(redis.path) as caller, Ears(redis.path) as ears:
        caller.run(ledger.read("ann", connect=True, channel="stage:ann", limit=1))
        publisher.publish(1, user="ann")
        [heard] = ears.heard()

    assert "stage:ann" == heard.channel


def test_a_url_that_is_none(open_front: Open) -> None:
    """It is refused like the setting."""
    with pytest.raises(SettingsError, match="REDIS_URL"):
        open_front("http://example.com").publish(1, user="ann")


# Topics

NEWS: Final = TopicRules(durable=Patterns.of(("news.**",)), max_length=2, ttl_ms=60_000)


def test_a_durable_topic(open_front: Open, redis: RedisServer) -> None:
    """It is kept in the topic's stream, as long and as many as the rules say."""
    front = open_front(redis.url, topics=NEWS)
    with Ears(redis.path) as ears:
        first, _, last = (front.publish(n, topic="news.eu", type="flash") for n in range(3))
        heard = ears.heard()
    kept = inbox(redis, Topic("news.eu"))

    assert ("accepted", 1, 3) == (first.outcome, first.seq, last.seq)
    assert ledger.partition(Topic("news.eu")) == ledger.partition_of(first.id)
    assert f"1.0.0-0.{heard[2].point}" == last.position
    assert {"topic:news.eu"} == {one.channel for one in heard}
    assert [b"1", b"2"] == [one[b"p"] for one in kept]
    assert last.id.encode() == kept[1][b"i"]
    assert 55 < int(kept[1][b"x"]) / 1000 - time.time() < 65
    assert b"f" not in kept[1]


def test_a_live_topic(front: Front, redis: RedisServer) -> None:
    """It is a plain PUBLISH, with the key if there is one; Redis keeps nothing at all."""
    with Caller(redis.path) as listener:
        listener.ask("SUBSCRIBE", "topic:ticker.acme")
        result = front.publish(7, topic="ticker.acme", type="price", key="acme")
        _, channel, data = cast("list[bytes]", listener.next())
        many = front.publish(8, topics=["ticker.acme", "", "ticker.acme", "other"], ttl=0)
        _, _, plain = cast("list[bytes]", listener.next())

    assert Ephemeral("", "", 0, "accepted", 1) == result
    assert b"topic:ticker.acme" == channel
    assert {"type": "price", "payload": 7, "key": "acme"} == msgspec.json.decode(data)
    assert {"type": "notification", "payload": 8} == msgspec.json.decode(plain)
    assert [1, 1, 0] == [many[number].receivers for number in (0, 2, 3)]
    assert isinstance(many[1], PublishRefused)
    assert 0 == redis.command("DBSIZE")


def test_topics_of_both_kinds(open_front: Open, redis: RedisServer) -> None:
    """Each is served in its way, and what one of them cannot have is a value."""
    front = open_front(redis.url, topics=NEWS)
    live, durable = front.publish(1, topics=["room", "news.eu"])
    no, yes = front.publish(2, topics=["room", "news.eu"], idempotency_key="k")
    again = front.publish(2, topic="news.eu", idempotency_key="k")

    assert (("", 0), ("accepted", 1)) == ((live.id, live.receivers), (durable.outcome, durable.seq))
    assert ("idempotency_key means nothing for room, which is a live topic", 2) == (
        str(no),
        yes.seq,
    )
    assert (yes.id, "duplicate") == (again.id, again.outcome)
    assert [b"1", b"2"] == [one[b"p"] for one in inbox(redis, Topic("news.eu"))]


@pytest.mark.parametrize(
    ("options", "recipient", "problem"),
    [
        ({"fallback_after": 9}, {"topic": "news.eu"}, "fallback_after means nothing for a topic"),
        ({"priority": True}, {"topic": "room"}, "priority means nothing for a topic"),
        ({"ttl": 60}, {"topic": "room"}, "ttl means nothing for room, which is a live topic"),
        ({"collapse_key": "k"}, {"topic": "room"}, "collapse_key means nothing for room"),
        ({"deliver_at": 1}, {"topic": "room"}, "deliver_at means nothing for room"),
        ({"key": "k"}, {"topic": "news.eu"}, "key is for live topics, and news.eu is durable"),
        ({"key": "k"}, {"user": "ann"}, "key is for live topics"),
        ({"key": "k"}, {"everyone": True, "ttl": 0}, "key is for live topics"),
        ({"key": "k" * 65}, {"topic": "room"}, "key has 1 to 64 bytes"),
        ({"key": ""}, {"topic": "room"}, "key has 1 to 64 bytes"),
    ],
)
def test_what_means_nothing_for_a_topic(
    redis: RedisServer, options: dict[str, Any], recipient: dict[str, Any], problem: str
) -> None:
    """It is refused with a sentence, before anything is sent."""
    with Publisher(redis.url, topics=NEWS) as publisher:
        untyped: Any = publisher
        with pytest.raises(PublishRefused, match=f"^{problem}"):
            untyped.publish(1, **recipient, **options)
    assert 0 == redis.command("DBSIZE")


def test_topics_by_the_servers_own_settings(open_front: Open, redis: RedisServer) -> None:
    """They say what is durable, how many are kept, and behind which prefix a topic is live."""
    settings = attrs.evolve(
        DEFAULTS, channel_prefix="stage:", durable_topics=("room.*",), topic_history_length=1
    )
    front = open_front(redis.url, settings=settings)
    with Ears(redis.path) as ears:
        front.publish(1, topic="room.7")
        last = front.publish(2, topic="room.7")
        front.cancel(last.id)
        assert {"stage:topic:room.7"} == {one.channel for one in ears.heard()}
    trace = front.notification(last.id)

    assert ("room.7", None, "cancelled") == (trace.topic, trace.user, trace.state)
    with Caller(redis.path) as listener:
        listener.ask("SUBSCRIBE", "stage:topic:news")
        assert 1 == front.publish(3, topic="news").receivers


def test_nothing_is_durable_if_nobody_says(publisher: Publisher, redis: RedisServer) -> None:
    """Without settings, rules and servers every topic is live."""
    assert isinstance(publisher.publish(1, topic="news.eu"), Ephemeral)
    assert publisher.topic_rules() is None
    assert 0 == redis.command("DBSIZE")


@pytest.mark.parametrize("settings", [None, DEFAULTS])
def test_who_was_told_nothing_goes_by_what_servers_say(
    open_front: Open, redis: RedisServer, settings: Settings | None
) -> None:
    """What is durable for them is kept, as many and as long; they are asked now and then."""
    redis.command(*kept_topics.said(NEWS))
    front = open_front(redis.url, settings=settings)
    redis.command("CONFIG", "RESETSTAT")
    for number in range(3):
        assert "accepted" == front.publish(number, topic="news.eu").outcome
    live, durable = front.publish(3, topics=["room", "news.eu"])

    assert 1 == redis.commands_seen("get")
    assert ("", 4) == (live.id, durable.seq)
    kept = inbox(redis, Topic("news.eu"))
    assert [b"2", b"3"] == [one[b"p"] for one in kept]
    assert 55 < int(kept[1][b"x"]) / 1000 - time.time() < 65
    assert NEWS == front.topic_rules()


@pytest.mark.parametrize(
    "own",
    [
        {"topics": TopicRules()},
        {"settings": attrs.evolve(DEFAULTS, durable_topics=("other",))},
    ],
)
def test_who_was_told_something_asks_nobody(redis: RedisServer, own: dict[str, Any]) -> None:
    """Rules and settings that name durable topics are good without the servers."""
    redis.command(*kept_topics.said(NEWS))
    redis.command("CONFIG", "RESETSTAT")
    with Publisher(redis.url, **own) as publisher:
        assert isinstance(publisher.publish(1, topic="news.eu"), Ephemeral)
        rules = publisher.topic_rules()
    assert rules is not None
    assert not rules.durable.matches("news.eu")
    assert 0 == redis.commands_seen("get")


def test_servers_may_change_their_mind() -> None:
    """After a while they are asked again; what needs no answer does not ask."""
    now = 100.0
    asked: list[str] = []
    word = kept_topics.said(NEWS)[2]

    def answer(step: Exchange) -> Outcome:
        [command] = step.commands
        asked.append(str(command[0]))
        return [word if command[0] == "GET" else 1]

    asking = attrs.evolve(Asking.of(None, 3.5), clock=lambda: now)
    perform(asking.publish(1, "ann", None, {"ttl": 0}), answer)
    perform(asking.publish(1, None, None, {"ttl": 0}, topic="news.eu"), answer)
    perform(asking.publish(1, None, None, {}, topic="room"), answer)
    perform(asking.publish(1, None, None, {}, topic="room"), answer)
    now += HEARD_SECONDS
    perform(asking.publish(1, None, None, {}, topic="room"), answer)

    assert ["PUBLISH"] * 2 + ["GET", "PUBLISH", "PUBLISH", "GET", "PUBLISH"] == asked


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (RedisUnavailable("no answer"), RedisUnavailable),
        ([RedisRefused("OOM")], RedisRefused),
    ],
)
def test_nothing_is_published_before_it_is_known_whether_to_keep_it(
    reply: Outcome, error: type[Exception]
) -> None:
    """A Redis that does not say is no reason to take a topic for a live one."""
    asked: list[Command] = []

    def answer(step: Exchange) -> Outcome:
        asked.extend(step.commands)
        return reply

    asking = Asking.of(None, 3.5)
    with pytest.raises(error):
        perform(asking.publish(1, None, None, {}, topic="news.eu"), answer)
    with pytest.raises(PublishInterrupted, match="0 of 2 recipients"):
        perform(asking.publish(1, None, None, {}, topics=["a", "news.b"]), answer)
    with pytest.raises(error):
        perform(asking.topic_rules(), answer)
    assert {kept_topics.asked()} == set(asked)


def test_who_may_not_hear_the_servers(redis: RedisServer) -> None:
    """A publisher whose user in Redis may not read that key publishes as if none had spoken."""
    redis.command(*kept_topics.said(NEWS))
    redis.command("ACL", "SETUSER", "app", "on", ">pw", "allchannels", "+@all", "~ts:{t*")
    where = f"redis://app:pw@127.0.0.1:{redis.port}/0"
    with Publisher(where) as publisher:
        assert isinstance(publisher.publish(1, topic="news.eu"), Ephemeral)
        assert publisher.topic_rules() is None


def test_cancel_of_a_topic(open_front: Open, redis: RedisServer) -> None:
    """Withdrawn by its id alone, like any other."""
    front = open_front(redis.url, topics=NEWS)
    accepted = front.publish(1, topic="news.eu")

    assert ("cancelled", "too late") == (front.cancel(accepted.id), front.cancel(accepted.id))
    assert [b"cancelled"] == [one[b"u"] for one in inbox(redis, Topic("news.eu"))]


def test_what_is_live_is_not_repeated_beside_what_is_durable() -> None:
    """An unanswered PUBLISH might arrive twice; what is kept knows itself again."""
    asked: list[Exchange] = []

    def answer(step: Exchange) -> Outcome:
        asked.append(step)
        return RedisUnavailable("no answer")

    steps = Asking.of(None, 3.5, NEWS).publish(1, None, None, {}, topics=["a", "news.b"])
    with pytest.raises(PublishInterrupted, match="0 of 2 recipients"):
        perform(steps, answer)

    commands = [[str(command[0]) for command in step.commands] for step in asked]
    assert [["EVALSHA"]] * 4 == commands


# Round trips and repetitions


async def in_thread(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call something that blocks."""
    return await trio.to_thread.run_sync(partial(call, *arguments, **options))


async def test_one_round_trip(open_front: Open, redis: RedisServer) -> None:
    """A publish is one round trip, whether to one user or to two hundred."""
    async with proxied(redis) as (proxy, where):
        front = open_front(where)
        await in_thread(front.publish, 1, user="ann")
        redis.command("CONFIG", "RESETSTAT")
        connections = proxy.connections
        await in_thread(front.publish, 1, user="ann")
        assert 1 == redis.commands_seen("evalsha")

        proxy.latency_seconds = 0.1
        started = time.monotonic()
        results = await in_thread(front.publish, 1, users=[f"u{n}" for n in range(200)])
        seconds = time.monotonic() - started

    assert {1} == {one.seq for one in results}
    assert connections == proxy.connections
    assert 0.2 <= seconds < 0.4


@asynccontextmanager
async def published_meanwhile(front: Front, payload: object) -> AsyncIterator[list[Accepted]]:
    """Publish to ann while the block runs; afterwards the list has the answer."""
    answers: list[Accepted] = []

    async def publish() -> None:
        answers.append(await in_thread(front.publish, payload, user="ann"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        yield answers


async def test_a_lost_answer_does_not_publish_twice(open_front: Open, redis: RedisServer) -> None:
    """An attempt whose answer was lost is repeated, and is one notification, accepted."""
    async with proxied(redis) as (proxy, where):
        front = open_front(where, deadline=8.0)
        await in_thread(front.publish, 0, user="ann")
        proxy.mute_to_client = True
        async with published_meanwhile(front, 1) as answers:
            await wait_until(lambda: len(inbox(redis, "ann")) == 2)
            proxy.mute_to_client = False
    [accepted] = answers

    assert ("accepted", 2) == (accepted.outcome, accepted.seq)
    assert [b"0", b"1"] == [kept[b"p"] for kept in inbox(redis, "ann")]


async def test_a_redis_that_is_away_for_a_moment(open_front: Open, redis: RedisServer) -> None:
    """A restart costs a publisher the time that it takes, nothing else."""
    async with proxied(redis) as (proxy, where):
        front = open_front(where, deadline=8.0)
        await in_thread(front.publish, 1, user="ann")
        redis.kill()
        tried = proxy.connections
        async with published_meanwhile(front, 2) as answers:
            await wait_until(lambda: proxy.connections > tried)
            await in_thread(redis.start)

    assert ["accepted"] == [one.outcome for one in answers]
    assert [b"1", b"2"] == [kept[b"p"] for kept in inbox(redis, "ann")]


def test_a_silent_redis(open_front: Open, redis: RedisServer) -> None:
    """Within the deadline it is said that nobody knows whether it was published."""
    front = open_front(redis.url, deadline=1.0)
    front.publish(1, user="ann")
    redis.pause()
    started = time.monotonic()
    with pytest.raises(RedisUnavailable, match=r"^whether it was published is unknown: .*127\.0"):
        front.publish(2, user="ann")
    assert time.monotonic() - started < 2
    with pytest.raises(RedisUnavailable):
        front.publish(2, user="ann", ttl=0)


def test_nobody_there(open_front: Open) -> None:
    """An address where nobody listens is tried for a while, then named."""
    where = Endpoint(host="127.0.0.1", port=free_port())
    front = open_front(where, deadline=0.5)
    started = time.monotonic()
    with pytest.raises(RedisUnavailable, match=where.target):
        front.publish(1, user="ann")
    with pytest.raises(RedisUnavailable):
        front.why("ann")
    assert time.monotonic() - started < 3


def test_unknown_scripts_are_loaded(front: Front, redis: RedisServer) -> None:
    """A Redis that has forgotten them gets them with the next publish, without a pause."""
    front.publish(1, user="ann")
    redis.command("SCRIPT", "FLUSH")
    redis.command("CONFIG", "RESETSTAT")
    started = time.monotonic()

    assert 2 == front.publish(2, user="ann").seq
    assert [3, 1] == [one.seq for one in front.publish(3, users=["ann", "bob"])]
    assert time.monotonic() - started < 0.5
    assert len(ledger.loads()) == redis.commands_seen("script|load")


def test_a_full_redis(front: Front, redis: RedisServer) -> None:
    """Out of memory is an answer: nothing was published, and it says so."""
    front.publish(1, users=["ann", "bob"])
    redis.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(RedisRefused, match=r"^OOM "):
        front.publish(2, user="ann")
    with pytest.raises(PublishInterrupted, match="0 of 2 recipients") as caught:
        front.publish(2, users=["ann", "bob"])
    redis.command("CONFIG", "SET", "maxmemory", "0")

    assert [RedisRefused] * 2 == [type(one) for one in caught.value.results]
    assert [1, 1] == [len(inbox(redis, user)) for user in ("ann", "bob")]


def test_batches(publisher: Publisher, redis: RedisServer) -> None:
    """Many users go in several round trips; the answers are in order all the same."""
    users = [f"u{number}" for number in range(2 * BATCH_COMMANDS + 7)]
    redis.command("CONFIG", "RESETSTAT")
    results = publisher.publish("x" * 100, users=users)

    for user, result in zip(users, results, strict=True):
        assert isinstance(result, Accepted)
        assert ledger.partition(user) == ledger.partition_of(result.id)
    assert len(users) + BATCH_COMMANDS == redis.commands_seen("evalsha")


def test_batches_are_bounded_in_bytes() -> None:
    """Large payloads make small batches."""
    steps = Asking.of(None, 1).publish(
        "x" * 10_000, None, [f"u{n}" for n in range(150)], {}, everyone=False
    )
    step = next(steps)

    assert isinstance(step, Exchange)
    assert 104 == len(step.commands)


def perform(steps: Steps[Any], answer: Callable[[Exchange], Outcome]) -> Any:
    """Return what the steps come to, if this is what Redis answers; pauses take no time."""
    outcome: Outcome = None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration as end:
            return end.value
        outcome = answer(step) if isinstance(step, Exchange) else None


def test_redis_goes_away_between_batches() -> None:
    """The exception knows what was accepted, what is unknown, and what was not tried."""
    users = [f"u{number}" for number in range(3 * BATCH_COMMANDS)]

    def answer(exchange: Exchange) -> Outcome:
        if ledger.key("meta", "u0") not in exchange.commands[0]:
            return RedisUnavailable("no answer")
        return [[str(command[5]).encode(), b"e.1-4096", 1, b""] for command in exchange.commands]

    steps = Asking.of(None, 3.5).publish(1, None, users, {}, everyone=False)
    with pytest.raises(PublishInterrupted, match="200 of 600 recipients") as caught:
        perform(steps, answer)
    results = caught.value.results

    assert len(users) == len(results)
    assert {Accepted} == {type(one) for one in results[:200]}
    assert {RedisUnavailable} == {type(one) for one in results[200:400]}
    assert {RedisRefused} == {type(one) for one in results[400:]}
    assert "not tried: whether" in str(results[-1])


def test_what_is_ephemeral_is_not_repeated() -> None:
    """After an attempt without an answer it might arrive twice; the deadline is for that one."""
    asked: list[Exchange] = []

    def answer(exchange: Exchange) -> Outcome:
        asked.append(exchange)
        return RedisUnavailable("no answer")

    steps = Asking.of(None, 3.5).publish(1, "ann", None, {"ttl": 0}, everyone=False)
    with pytest.raises(RedisUnavailable, match="whether it was published is unknown"):
        perform(steps, answer)
    assert 1 == len(asked)
    assert asked[0].seconds == pytest.approx(3.5, abs=0.1)


# Cancel, why, notification


def test_cancel(front: Front, redis: RedisServer) -> None:
    """It is withdrawn once; what is unknown and what is no id are told apart."""
    accepted = front.publish(1, user="ann")

    assert "cancelled" == front.cancel(accepted.id)
    assert [] == inbox(redis, "ann")
    assert "too late" == front.cancel(accepted.id)
    everyone = front.publish(1, everyone=True)
    assert "cancelled" == front.cancel(everyone.id)
    assert "unknown" == front.cancel(ledger.new_id("p07", 1))
    for wrong in ("", "p07", accepted.id.upper(), "p99" + accepted.id[3:]):
        with pytest.raises(PublishRefused, match="is no notification's id"):
            front.cancel(wrong)


def test_cancel_whose_answer_was_lost(publisher: Publisher, redis: RedisServer) -> None:
    """An attempt that was not answered has cancelled it: that is no "too late"."""
    accepted = publisher.publish(1, user="ann")
    lost = 0

    def answer(exchange: Exchange) -> Outcome:
        nonlocal lost
        outcome = link.pipeline(exchange.commands, timeout=5)
        if lost or ledger.SCRIPTS["cancel"].sha not in exchange.commands[-1]:
            return outcome
        lost += 1
        return RedisUnavailable("the answer was lost")

    with BlockingLink(Endpoint(path=str(redis.path))) as link:
        assert "cancelled" == perform(Asking.of(None, 5).cancel(accepted.id), answer)
        assert "too late" == perform(Asking.of(None, 5).cancel(accepted.id), answer)
    assert (1, []) == (lost, inbox(redis, "ann"))


def test_why(front: Front) -> None:
    """It tells how many wait for each device of a user, and where each is."""
    unknown = front.why("ann")
    assert (False, "", ()) == (unknown.known, unknown.position, unknown.devices)
    accepted = front.publish(1, user="ann")
    standing = front.why("ann")

    assert (True, accepted.position) == (standing.known, standing.position)
    assert (1, 1, 1) == (standing.seq, standing.unread, standing.retained)
    with pytest.raises(PublishRefused):
        front.why("")


def test_notification(front: Front) -> None:
    """It tells the life of a notification; None where there is none."""
    accepted = front.publish({"n": 1}, user="ann", type="order")
    life = front.notification(accepted.id)
    everyone = front.notification(front.publish(1, everyone=True).id)

    assert ("ann", "order", "accepted", 1) == (life.user, life.type, life.state, life.seq)
    assert (None, "accepted") == (everyone.user, everyone.state)
    assert front.notification(ledger.new_id("p07", 1)) is None
    with pytest.raises(PublishRefused):
        front.notification("p07-1")


# What each front is by itself


async def test_trio_publisher_on_an_open_link(redis: RedisServer) -> None:
    """The server's own processes publish through the link that they have."""
    async with open_link(Endpoint(path=str(redis.path))) as link:
        publisher = TrioPublisher(link)
        accepted = await publisher.publish(1, user="ann")
        with trio.move_on_after(0):
            await publisher.publish(2, user="ann")
        assert 1 == accepted.seq
        assert (await publisher.publish(3, user="ann")).outcome == "accepted"


def test_asyncio_publisher_as_a_context(redis: RedisServer) -> None:
    """Many tasks publish at once; when the block ends the connections are closed."""

    async def run() -> list[Accepted]:
        async with AsyncioPublisher(redis.url) as publisher:
            tasks = [publisher.publish(number, user="ann") for number in range(50)]
            return list(await asyncio.gather(*tasks))

    with plain_asyncio() as runner:
        results = runner.run(run())
    listed = redis.command("CLIENT", "LIST")
    assert isinstance(listed, bytes)
    assert list(range(1, 51)) == sorted(one.seq for one in results)
    assert b"name=publisher" not in listed


def test_threads_share_a_publisher(publisher: Publisher, redis: RedisServer) -> None:
    """Any number of threads publish at once, and each gets its own answer."""
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda n: publisher.publish(n, user="ann", priority=True), range(200))
        )

    assert list(range(1, 201)) == sorted(one.seq for one in results)
    by_id = {kept[b"i"].decode(): int(kept[b"p"]) for kept in inbox(redis, "ann")}
    assert list(range(200)) == [by_id[one.id] for one in results]


# Too many, and what does not fit


def test_too_many_for_a_minute(open_front: Open, redis: RedisServer) -> None:
    """It is refused, not repeated, and told for how long; priority and everyone are not counted."""
    front = open_front(
        redis.url, settings=attrs.evolve(DEFAULTS, notifications_per_minute_per_user=1)
    )
    front.publish(1, user="ann")
    redis.command("CONFIG", "RESETSTAT")

    with pytest.raises(RateLimited, match="too many notifications") as caught:
        front.publish(1, user="ann")
    assert 0 < caught.value.retry_after <= 60
    assert 1 == calls(redis)
    assert "accepted" == front.publish(1, user="ann", priority=True).outcome
    ann, bob = front.publish(1, users=["ann", "bob"])
    assert isinstance(ann, RateLimited)
    assert "accepted" == bob.outcome
    for _ in range(2):
        assert "accepted" == front.publish(1, everyone=True).outcome
        assert "ephemeral" == front.publish(1, user="ann", ttl=0).outcome


def test_how_many_if_nobody_says(publisher: Publisher) -> None:
    """Fifty at once are taken, and a few more for the time that this takes."""
    began, count = time.monotonic(), 0

    def publish_all() -> None:
        nonlocal count
        while count < 1000:
            publisher.publish(1, user="ann")
            count += 1

    with pytest.raises(RateLimited):
        publish_all()
    assert 50 <= count <= 51 + (time.monotonic() - began) * 50 / 60


def calls(redis: RedisServer) -> int:
    """Return how many scripts were run since the statistics were reset."""
    info = redis.command("INFO", "commandstats")
    assert isinstance(info, bytes)
    [line] = [line for line in info.splitlines() if line.startswith(b"cmdstat_evalsha:")]
    return int(line.partition(b"calls=")[2].partition(b",")[0])


@pytest.mark.parametrize("rate", [0, 2])
def test_the_settings_say_how_many(open_front: Open, redis: RedisServer, rate: int) -> None:
    """As many as the server's settings allow; 0 is no limit."""
    settings = attrs.evolve(DEFAULTS, notifications_per_minute_per_user=rate)
    front = open_front(redis.url, settings=settings)
    many = rate or 60

    for _ in range(many):
        front.publish(1, user="ann")

    if rate:
        with pytest.raises(RateLimited):
            front.publish(1, user="ann")
    assert many == len(inbox(redis, "ann"))


def test_a_repetition_is_not_too_many(open_front: Open, redis: RedisServer) -> None:
    """Who asks again with the same key gets the first answer, also when the minute is used up."""
    settings = attrs.evolve(DEFAULTS, notifications_per_minute_per_user=1)
    front = open_front(redis.url, settings=settings)
    first = front.publish(1, user="ann", idempotency_key="k")

    again = front.publish(1, user="ann", idempotency_key="k")

    assert (first.id, "duplicate") == (again.id, again.outcome)


def test_what_does_not_fit_its_schema(open_front: Open, redis: RedisServer, tmp_path: Path) -> None:
    """It is refused before anything is sent, ephemeral or not; other types are not checked."""
    schemas = tmp_path / "schemas.json"
    schemas.write_text('{"order": {"properties": {"n": {"type": "integer"}}}}')
    front = open_front(redis.url, settings=attrs.evolve(DEFAULTS, payload_schemas=schemas))
    schemas.write_text("{}")  # it is read once

    for options in ({"user": "ann"}, {"users": ["ann", "bob"]}, {"everyone": True, "ttl": 0}):
        with pytest.raises(PayloadMisfit, match='schema of "order": /n is not of') as caught:
            front.publish({"n": "x"}, type="order", **options)
        assert ("/n", "is not of type integer") == (caught.value.path, caught.value.reason)
    assert "accepted" == front.publish({"n": 1}, user="ann", type="order").outcome
    assert "accepted" == front.publish({"n": "x"}, user="ann").outcome
    assert 2 == len(inbox(redis, "ann"))


def test_schemas_that_cannot_be_used(open_front: Open, redis: RedisServer, tmp_path: Path) -> None:
    """There is no publisher with half of its settings."""
    settings = attrs.evolve(DEFAULTS, payload_schemas=tmp_path / "none.json")

    with pytest.raises(SettingsError, match="PAYLOAD_SCHEMAS"):
        open_front(redis.url, settings=settings)


def test_a_back_end_gets_no_trio() -> None:
    """Importing it leaves asyncio alone, which trio-asyncio does not, and brings nothing dear."""
    code = (
        "import asyncio, sys; before = asyncio.new_event_loop, asyncio.get_running_loop\n"
        "import trioserver.publisher\n"
        "assert before == (asyncio.new_event_loop, asyncio.get_running_loop)\n"
        "dear = {'trio', 'trio_asyncio', 'structlog', 'click', 'jsonschema'}\n"
        "print(*sorted(dear & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=LIMIT, text=True
    )
    assert "" == printed.stdout.strip()
