"""All topics of a connection: what is allowed, how much at a time, and what its token asks for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.redis_server import RedisServer
from tests.trioserver.topic_stage import (
    Claim,
    Stage,
    channel,
    credential,
    notice,
    place,
    point,
    quiet,
    seqs,
    staged,
    subscribe,
    told,
    unsubscribe,
)
from tests.trioserver.wire import LIMIT, close, head, page, text, until
from trioserver import envelope, ledger, membership, messages
from trioserver.endpoint import Endpoint
from trioserver.errors import CloseReason
from trioserver.membership import MAX_READS
from trioserver.memberships import MAX_ASKS
from trioserver.reader import Reader
from trioserver.redis_link import open_link
from trioserver.subscription import Subscription


@pytest.mark.parametrize(
    ("claim", "name", "is_allowed"),
    [
        (["room.*"], "room.1", True),
        (["room.*"], "room.1.secret", False),
        ({"publish": ["room.*"]}, "room.1", False),
        ((), "room.1", False),
        ((), "public.news", True),
        ({"join": ["room.1"]}, "room.1", True),
    ],
)
async def test_who_may_subscribe_is_said_by_the_token_and_by_the_operator(
    claim: Claim,
    name: str,
    is_allowed: bool,  # noqa: FBT001 - a row of the table
) -> None:
    """Everybody else is told ``forbidden``, and nothing is asked of Redis."""
    async with staged() as stage:
        client = await stage.come(claim)
        await client.send(subscribe(name, "r1"))
        answer = await client.until("subscribed" if is_allowed else "error")
        if not is_allowed:
            assert ("forbidden", "r1") == (answer["code"], answer["ref"])
            assert channel(name) not in stage.worker.follower.followed


async def test_one_topic_too_many_is_refused() -> None:
    """Those that the connection has stay; when it has left one, it may have another."""
    async with staged(max_topics=2) as stage:
        client = await stage.come()
        for name in ("a", "b", "c", "b"):
            await client.send(subscribe(name, name))
        codes = [(one["ref"], one.get("code")) for one in [await client.message() for _ in "1234"]]
        assert [("a", None), ("b", None), ("c", "too_many_topics"), ("b", None)] == codes
        await client.send(unsubscribe("a") + subscribe("c", "c"))
        await client.until("subscribed")


async def test_what_redis_does_not_confirm_in_time_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not wanted any more: when Redis is back, nothing comes."""
    monkeypatch.setattr(membership, "ANSWER_SECONDS", 0.05)
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        stage.worker.only().topics.due(0.0)
        await client.send(subscribe("room.1", "r1") + subscribe("room.1", "r2"))
        errors = [await client.message() for _ in "12"]
        assert [("unavailable", "r1"), ("unavailable", "r2")] == [
            (one["code"], one["ref"]) for one in errors
        ]
        assert [channel("room.1")] == stage.worker.follower.released
        stage.worker.follower.confirm(channel("room.1"))
        assert channel("room.1") not in stage.worker.hub
        await quiet(client)


async def test_a_topic_that_the_ledger_does_not_tell_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if Redis had not confirmed it."""
    monkeypatch.setattr(membership, "ANSWER_SECONDS", 0.05)
    async with staged() as stage:
        client = await stage.come()
        stage.worker.reading.patient = True
        await client.send(subscribe("kept.1", "r1"))
        answer = await client.message()
        assert ("unavailable", "r1") == (answer["code"], answer["ref"])
        assert (channel("kept.1") in stage.worker.hub, ()) == (
            False,
            stage.worker.only().topics.names(),
        )
        ((waiter, _),) = stage.worker.reading.wanted
        assert waiter.question(everyone=True) is None


async def test_the_end_of_a_connection_leaves_everything() -> None:
    """The hub, the channels, presence, and what is still waited for."""
    async with staged() as stage:
        client = await stage.subscribed("room.1")
        await client.send(subscribe("kept.1"))
        await client.until("subscribed")
        stage.worker.follower.patient = True
        await client.send(subscribe("room.2"))
        await until(lambda: channel("room.2") in stage.worker.follower.pending)
        await client.send(close(1000))
        assert 8 == (await client.frame())[0]
        await client.aclose()
        await stage.worker.settled()
        assert [("ann", "room.1"), ("ann", "kept.1")] == stage.presences.left
        assert {channel("room.1"), channel("room.2"), channel("kept.1")} < set(
            stage.worker.follower.released
        )
        assert [] == stage.worker.follower.pending[channel("room.2")].waiters


async def test_a_client_that_asks_too_much_is_not_read_until_it_is_answered() -> None:
    """What came in the same read is taken."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        await client.send(b"".join(subscribe(f"t{number}") for number in range(MAX_ASKS)))
        await until(lambda: len(stage.worker.follower.pending) == MAX_ASKS)
        await client.send(text({"type": "ping"}))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert stage.worker.only().topics.asks_too_much
        stage.worker.follower.confirm(channel("t0"))
        assert ["subscribed", "pong"] == [(await client.message())["type"] for _ in "12"]


# What the token joins.


async def test_what_the_token_joins_is_said_right_after_the_first_message() -> None:
    """Without a ref, for nobody has asked; once Redis has confirmed, however late."""
    async with staged(max_topics=2) as stage:
        client = await stage.come({"join": ["room.1", "kept.1", "room.2"]})
        answers = [await client.message() for _ in "123"]
        assert [("subscribed", "room.1"), ("subscribed", "kept.1"), ("error", None)] == [
            (one["type"], one.get("topic")) for one in answers
        ]
        assert "too_many_topics" == answers[2]["code"]
        assert not any("ref" in answer for answer in answers)


async def test_what_is_asked_for_before_the_first_message_comes_behind_it() -> None:
    """It waits, and what the token joins as well is one membership."""
    async with staged() as stage:
        stage.worker.reading.patient = True
        client = await stage.worker.dial()
        claim = {"subscribe": ["**"], "join": ["room.1"]}
        early = subscribe("kept.1", "r1") + subscribe("room.1", "r2")
        await client.send(head(credential=credential(claim)) + early)
        await until(lambda: len(stage.worker.reading.wanted) == 1)
        stage.worker.reading.answer(page())
        stage.worker.reading.answer(page())  # the head of everyone's stream
        await client.response()
        assert ["connection_established"] == await told(client, "type")
        assert ["subscribed", "r2"] == await told(client, "type", "ref")
        assert [ledger.key("meta", ledger.Topic("kept.1"))] == [
            one["key"] for one in stage.questions()
        ]
        stage.worker.reading.answer(page())
        assert ["subscribed", "r1"] == await told(client, "type", "ref")
        assert 2 == len(stage.worker.only().topics.names())


async def test_what_the_token_joins_stays_wanted_without_redis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who asks for it meanwhile is told ``unavailable``, and gets it all the same."""
    monkeypatch.setattr(membership, "ANSWER_SECONDS", 0.05)
    async with staged() as stage:
        client = await stage.come()
        stage.worker.follower.patient = True
        stage.worker.only().topics.join(["room.1"])
        await client.send(subscribe("room.1", "r1"))
        assert ["unavailable", "r1"] == await told(client, "code", "ref")
        stage.worker.follower.confirm(channel("room.1"))
        assert {"type": "subscribed", "topic": "room.1"} == await client.message()


async def test_a_new_token_is_obeyed() -> None:
    """What it does not allow is left, what it joins is joined; but not what the client has left."""
    async with staged() as stage:
        client = await stage.come({"subscribe": ["a", "b"], "join": ["c", "d"]})
        await client.send(subscribe("a") + subscribe("b") + unsubscribe("d"))
        for kind in ("subscribed", "subscribed", "subscribed", "subscribed", "unsubscribed"):
            assert kind == (await client.message())["type"]
        claim = {"subscribe": ["b"], "join": ["d", "e"]}
        await client.send(text({"type": "refresh", "token": credential(claim), "ref": "r"}))
        said = [await client.message() for _ in "1234"]
        assert [
            ("unsubscribed", "c", "forbidden"),
            ("unsubscribed", "a", "forbidden"),
            ("subscribed", "e", None),
            ("token_refreshed", None, None),
        ] == [(one["type"], one.get("topic"), one.get("reason")) for one in said]
        assert {"b", "e"} == {name for name, _ in stage.worker.only().topics.names()}


async def test_a_new_token_refuses_what_is_not_there_yet() -> None:
    """Its client never had it: the request has failed."""
    async with staged() as stage:
        client = await stage.come(["a"])
        stage.worker.follower.patient = True
        await client.send(subscribe("a", "r1"))
        await client.send(text({"type": "refresh", "token": credential(["b"])}))
        assert ["forbidden", "r1"] == await told(client, "code", "ref")
        assert [channel("a")] == stage.worker.follower.released


# Reading.


async def test_few_topics_are_read_at_a_time_and_none_that_was_left() -> None:
    """So that a client with many is not sent all their histories at once."""
    async with staged() as stage:
        client = await stage.come()
        stage.worker.reading.patient = True
        names = [f"kept.{number}" for number in range(MAX_READS + 3)]
        await client.send(b"".join(subscribe(name, since="start") for name in names))
        await quiet(client)
        assert MAX_READS == len(stage.questions())
        # One that waits for its turn, and one that is being read.
        await client.send(unsubscribe(names[-1]) + unsubscribe(names[0]))
        for name in (names[-1], names[-1], names[0], names[0]):
            assert ["unsubscribed", name] == await told(client, "type", "topic")
        reading = stage.worker.reading
        assert MAX_READS == len([one for one, _ in reading.wanted if one.question(everyone=True)])
        answered = 0
        while reading.wanted:
            reading.answer(page())
            answered += 1
        assert len(names) - 1 == answered
        topics = [(await client.message())["topic"] for _ in names[1:-1]]
        assert names[1:-1] == topics


async def test_the_next_page_is_read_when_the_client_has_taken_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And who waits for that is not told that Redis is away."""
    async with staged(send_buffer=4096) as stage:
        client = await stage.come(small=True)
        stage.worker.reading.patient = True
        monkeypatch.setattr(membership, "ANSWER_SECONDS", 0.05)
        await client.send(subscribe("kept.1", "r1", since="start"))
        await until(lambda: bool(stage.worker.reading.wanted))
        bulky = [notice(seq, 9000) for seq in range(1, 21)]
        stage.worker.reading.answer(page(*bulky, reached=place(20), more=True))
        assert [] == stage.worker.reading.wanted
        stage.worker.only().topics.subscribe(messages.Subscribe("kept.2", "start", "r2"), 0.0)
        stage.worker.only().topics.due(1e12)
        assert [] == stage.worker.reading.wanted
        assert "subscribed" == (await client.message())["type"]
        assert list(range(1, 21)) == await seqs(client, 20)
        await until(lambda: len(stage.worker.reading.wanted) == 2)
        assert [point(20), None] == [one.get("point") for one in stage.questions()]
        stage.worker.reading.answer(page(notice(21), start=place(20), reached=place(21)))
        stage.worker.reading.answer(page())
        assert [21] == await seqs(client, 1)
        assert "r2" == (await client.message())["ref"]


# What clients publish, and who is there.


async def test_what_a_client_publishes_is_said_for_it() -> None:
    """With its user, its connection and its ref; the answer is whatever became of it."""
    async with staged() as stage:
        client = await stage.come()
        message = {"type": "publish", "topic": "room.1", "payload": {"a": 1}, "ref": "r1"}
        await client.send(text({**message, "key": "k", "exclude_self": True}))
        await until(lambda: len(stage.desk.speaker) == 1)
        (waiting,) = stage.desk.speaker._waiting
        _, _, data = waiting.command
        assert isinstance(data, bytes)
        expected = envelope.said(
            b'{"a": 1}',
            type="notification",
            connection=stage.worker.only().connection_id,
            user="ann",
            key="k",
            exclude=True,
        )
        assert expected == data
        waiting.asker.published(messages.Published("room.1", "r1"))
        assert {"type": "publish", "topic": "room.1", "ref": "r1"} == await client.message()
        await client.send(text({**message, "key": None}))
        await until(lambda: len(stage.desk.speaker) == 2)
        waiting.asker.published(None)
        await quiet(client)
        topics = stage.worker.only().topics
        stage.worker.only().end(CloseReason.GOING_AWAY)
        topics.published(messages.Error("unavailable", "too late", ref="r1"))
        topics.join(["room.2"])
        assert 0 == stage.worker.tally.errors["unavailable"]
        assert channel("room.2") not in stage.worker.hub
        assert "goodbye" == (await client.message())["type"]
        await client.aclose()


async def test_who_has_no_user_has_no_topics() -> None:
    """Not even those that are for everybody with a token."""
    async with staged() as stage:
        client = await stage.worker.nameless()
        topics = stage.worker.only().topics
        topics.subscribe(messages.Subscribe("public.1"), 0.0)
        topics.publish(messages.Publish("public.1"))
        topics.reconsider()
        assert ["forbidden"] * 2 == [(await client.message())["code"] for _ in "12"]
        assert () == topics.names()


async def test_who_may_publish_is_said_by_the_token_alone() -> None:
    """Whoever may subscribe may not for that reason publish."""
    async with staged() as stage:
        client = await stage.come({"subscribe": ["**"], "publish": ["room.*"]})
        await client.send(text({"type": "publish", "topic": "public.1", "ref": "r1"}))
        answer = await client.message()
        assert ("forbidden", "r1") == (answer["code"], answer["ref"])
        await client.send(text({"type": "publish", "topic": "room.1"}))
        await until(lambda: len(stage.desk.speaker) == 1)


async def test_who_is_there_is_told_to_those_who_may_subscribe() -> None:
    """A page of it, or why not."""
    async with staged() as stage:
        client = await stage.come(["room.*", "other"])
        ask = {"type": "presence", "ref": "r1"}
        await client.send(text({**ask, "topic": "secret"}) + text({**ask, "topic": "other"}))
        assert ["forbidden"] * 2 == [(await client.message())["code"] for _ in "12"]
        await client.send(text({**ask, "topic": "room.1", "after": "cursor"}))
        await until(lambda: bool(stage.presences.asked))
        ((waiter, *question),) = stage.presences.asked
        assert ["room.1", "cursor", "r1"] == question
        waiter.attended(messages.Presence("room.1", 0, 0, [], ref="r1"))
        answer = await client.message()
        assert ("presence", "room.1", []) == (answer["type"], answer["topic"], answer["members"])
        waiter.attended(messages.Error("unavailable", "later", ref="r1"))
        assert "unavailable" == (await client.message())["code"]
        assert 1 == stage.worker.tally.errors["unavailable"]


# With a real Redis.


@asynccontextmanager
async def connected(stage: Stage, redis: RedisServer) -> AsyncIterator[Subscription]:
    """Have a worker's topics served by Redis."""
    worker, where = stage.worker, Endpoint(path=str(redis.path))
    bug = worker.bugs.append

    def changed() -> None:
        if subscription.up:
            for connection in tuple(worker.shared.connections):
                connection.catch_up()

    subscription = Subscription(
        where, worker.delivery.receive, changed, turn_over=worker.delivery.turn_over
    )
    reader = Reader(lambda _what, error: bug(error), print)
    async with open_link(where) as link, trio.open_nursery() as nursery:
        nursery.start_soon(subscription.run)
        nursery.start_soon(reader.run, link)
        nursery.start_soon(stage.desk.speaker.run, link)
        worker.delivery.outbox_of = lambda which: next(
            (one.outbox for one in worker.shared.connections if one.connection_id == which), None
        )
        worker.shared.follower = subscription
        worker.shared.reader = reader
        yield subscription
        nursery.cancel_scope.cancel()


async def test_clients_talk_to_each_other_through_redis(redis: RedisServer) -> None:
    """Live and durable, in order, with who has said it; and who comes later gets what is kept."""
    async with staged() as stage, connected(stage, redis):
        ann, bob = await stage.come(user="ann"), await stage.come(user="bob")
        for client in (ann, bob):
            await client.send(subscribe("kept.talk") + subscribe("room.talk"))
            assert {"kept.talk", "room.talk"} == {
                str((await client.until("subscribed"))["topic"]) for _ in "12"
            }
        for number in range(20):
            for name in ("kept.talk", "room.talk"):
                say = {"type": "publish", "topic": name, "payload": number, "exclude_self": True}
                await ann.send(text({**say, "ref": f"{name} {number}"}))
        heard: dict[object, list[object]] = {"kept.talk": [], "room.talk": []}
        last = ""
        for _ in range(40):
            message = await bob.until("notification")
            assert "ann" == message["from"]
            heard[message["topic"]].append(message["payload"])
            last = str(message.get("position", last))
        assert {"kept.talk": list(range(20)), "room.talk": list(range(20))} == heard
        answers = [await ann.message() for _ in range(40)]
        assert {"publish"} == {answer["type"] for answer in answers}
        assert {last} == {one["position"] for one in answers if one["ref"] == "kept.talk 19"}
        eve = await stage.come(user="eve")
        await eve.send(subscribe("kept.talk", since=str(answers[0]["position"])))
        assert True is (await eve.message())["resumed"]
        assert list(range(1, 20)) == [(await eve.message())["payload"] for _ in range(19)]


async def test_what_was_published_during_an_outage_comes_when_the_link_is_back(
    redis: RedisServer,
) -> None:
    """Of a durable topic; the channel stays followed whatever happens to the link."""
    async with staged() as stage, connected(stage, redis) as subscription:
        ann = await stage.come()
        await ann.send(subscribe("kept.out") + subscribe("room.out"))
        for _ in "12":
            await ann.until("subscribed")
        subscription.reconnect("a test")
        say = {"type": "publish", "topic": "kept.out", "ref": "r"}
        await ann.send(b"".join(text({**say, "payload": number}) for number in range(3)))
        for _ in range(3):
            await ann.until("publish")
        await until(lambda: subscription.statistics().links == 2)
        await ann.send(text({**say, "topic": "room.out", "payload": 3}))
        heard = [(await ann.until("notification"))["payload"] for _ in range(4)]
        assert [0, 1, 2, 3] == sorted(map(int, map(str, heard)))
        assert [0, 1, 2] == [number for number in heard if number != 3]
        assert CloseReason.INTERNAL_ERROR not in stage.worker.ends


async def test_a_redis_that_is_killed_costs_a_durable_topic_nothing(tmp_path: Path) -> None:
    """Whatever was answered gets to every subscriber, once and in order."""
    always = {"appendfsync": "always"}
    with RedisServer(tmp_path / "redis", config=always) as redis:
        async with staged() as stage, connected(stage, redis):
            readers = [await stage.subscribed("kept.1") for _ in "123"]
            writer = await stage.come(user="bob")
            answers: list[dict[str, object]] = []
            got: list[list[object]] = [[] for _ in readers]

            async def hear(which: int) -> None:
                while True:
                    got[which].append((await readers[which].until("notification"))["payload"])

            async def answered() -> None:
                while True:
                    answers.append(await writer.message())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answered)
                for which in range(len(readers)):
                    nursery.start_soon(hear, which)
                for first in (0, 60):
                    for number in range(first, first + 60):
                        say = {"type": "publish", "topic": "kept.1", "payload": number}
                        await writer.send(text({**say, "ref": str(number)}))
                    if first == 0:
                        await until(lambda: len(answers) > 0)
                        redis.kill()
                        redis.start()
                await until(lambda: len(answers) == 120, LIMIT)
                kept = {int(str(one["ref"])) for one in answers if one["type"] == "publish"}
                await until(lambda: all(kept <= set(numbers) for numbers in got), LIMIT)
                nursery.cancel_scope.cancel()
            assert kept
            for numbers in got:
                assert sorted(set(map(int, map(str, numbers)))) == numbers
