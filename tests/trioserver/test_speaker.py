"""The speaker on a real Redis: in order, together, never twice, and everybody gets an answer."""

import itertools
import json
from collections.abc import AsyncIterator, Iterator

import attrs
import msgspec
import pytest
import trio

from tests.redis_server import RedisServer, wait_until
from tests.trioserver.ledger_calls import Caller
from trioserver import envelope, ledger, position, speaker
from trioserver.endpoint import Endpoint
from trioserver.envelope import Said
from trioserver.ledger import Notice, Topic, TopicRules
from trioserver.messages import MAX_DEPTH, Error, Published
from trioserver.redis_link import open_link
from trioserver.speaker import RETRY_AFTER_MS, Saying, Speaker
from trioserver.topics import Patterns

LIMIT = 40.0
"""Seconds after which a test is stuck."""

PATIENCE = 20.0
"""Seconds in which everything is answered, also after an outage."""

RULES = TopicRules(durable=Patterns.of(["kept.**"]), max_payload=100, max_length=1000)


class Client:
    """Keeps its answers; one that is told to chokes on them."""

    def __init__(self) -> None:
        self.answers: list[Published | Error | None] = []
        self.chokes = False

    def published(self, answer: Published | Error | None) -> None:
        """Keep it."""
        self.answers.append(answer)
        if self.chokes:
            raise ValueError("choked")

    @property
    def errors(self) -> list[tuple[str, int | None, str | None]]:
        """Return the codes of the errors, when to try again, and the refs."""
        return [
            (one.code, one.retry_after_ms, one.ref)
            for one in self.answers
            if isinstance(one, Error)
        ]


class Ears:
    """Hears what is published on all channels, as it was published."""

    def __init__(self, redis: RedisServer) -> None:
        self._connection = Caller(redis.path)
        self._connection.send("PSUBSCRIBE", "*")
        self._connection.next()

    def hear(self, count: int) -> list[tuple[str, bytes]]:
        """Return the next so many publications, but for the one that warms up."""
        found: list[tuple[str, bytes]] = []
        while len(found) < count:
            reply = self._connection.next()
            assert isinstance(reply, list)
            _, _, channel, data = reply
            if channel != b"app:topic:warm":
                found.append((channel.decode(), data))
        return found

    def close(self) -> None:
        """Listen no more."""
        self._connection.close()


class Stage:
    """A speaker, a link to a Redis of its own, and what they complain of."""

    def __init__(self, redis: RedisServer, caller: Caller) -> None:
        self.redis = redis
        self.caller = caller
        self.bugs: list[str] = []
        self.troubles: list[str] = []
        self.trips = 0
        self.speaker = Speaker(
            RULES,
            prefix="app:",
            log_bug=lambda what, bug: self.bugs.append(f"{what}: {bug}"),
            log_trouble=self.troubles.append,
        )
        self._clock = itertools.count(1_763_630_000_000)

    def say(
        self,
        client: Client,
        topic: str = "room.1",
        payload: object = None,
        ref: str | None = None,
        *,
        raw: bytes = b"",
        key: str | None = None,
        exclude: bool = False,
    ) -> str:
        """Publish to a topic as ann."""
        saying = Saying(
            topic=topic,
            durable=RULES.durable.matches(topic),
            payload=msgspec.Raw(raw or msgspec.json.encode(payload)),
            user="ann",
            connection_id="w0-1",
            key=key,
            exclude=exclude,
            ref=ref,
        )
        return self.speaker.say(saying, client, next(self._clock))

    async def run(self) -> None:
        """Run it on a link of its own."""
        async with open_link(Endpoint(path=str(self.redis.path)), observe=self._observe) as link:
            await self.speaker.run(link)

    async def finish(self) -> None:
        """Publish what is left."""
        async with open_link(Endpoint(path=str(self.redis.path)), observe=self._observe) as link:
            await self.speaker.finish(link)

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def kept(self, topic: str) -> list[Notice]:
        """Return what the ledger has of a topic."""
        page = ledger.page(self.caller.run(ledger.read(Topic(topic), limit=1000)))
        return [item for item in page.items if isinstance(item, Notice)]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for all; every test ends with it running."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def idle(redis: RedisServer) -> AsyncIterator[Stage]:
    """A speaker that does not run, and an empty Redis that has the scripts."""
    redis.command("FLUSHALL")
    with trio.fail_after(LIMIT), Caller(redis.path) as caller:
        for command in ledger.loads():
            caller.run(command)
        yield Stage(redis, caller)


@pytest.fixture
async def stage(idle: Stage) -> AsyncIterator[Stage]:
    """A speaker that runs, and whose link has a connection."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(idle.run)
        warm = Client()
        idle.say(warm, "warm")
        await wait_until(lambda: warm.answers, PATIENCE)
        idle.trips = 0
        yield idle
        nursery.cancel_scope.cancel()


@pytest.fixture
def ears(redis: RedisServer) -> Iterator[Ears]:
    """They hear everything from now on."""
    ears = Ears(redis)
    yield ears
    ears.close()


async def test_what_is_said_to_a_live_topic_is_published_with_who_has_said_it(
    stage: Stage, ears: Ears
) -> None:
    """As an envelope on the topic's channel; whoever has given a ref is told."""
    client = Client()
    said = stage.say(client, payload={"n": 1}, ref="r1", key="k", exclude=True)
    await wait_until(lambda: client.answers, PATIENCE)
    ((channel, data),) = ears.hear(1)
    assert ("", "app:topic:room.1") == (said, channel)
    assert Said("w0-1", "ann", "notification", "k", msgspec.Raw(b'{"n":1}'), 1) == envelope.decode(
        data
    )
    assert [Published("room.1", "r1")] == client.answers


async def test_what_is_said_to_a_durable_topic_is_kept_with_who_has_said_it(
    stage: Stage, ears: Ears
) -> None:
    """The id is known before anybody gets it, and the answer has it with the position."""
    client = Client()
    which = stage.say(client, "kept.1", {"n": 1}, "r1")
    await wait_until(lambda: client.answers, PATIENCE)
    (kept,) = stage.kept("kept.1")
    assert (which, b'{"n":1}', "ann") == (kept.id, kept.payload, kept.sender)
    ((channel, data),) = ears.hear(1)
    entry = envelope.decode(data)
    assert isinstance(entry, envelope.Notice)
    assert ("app:topic:kept.1", which, "ann") == (channel, entry.id, entry.sender)
    where = position.join("", entry.point)
    assert [Published("kept.1", "r1", which, where)] == client.answers


async def test_who_gives_no_ref_is_told_nothing_but_errors(stage: Stage) -> None:
    """The one who waits learns that it is over, with nothing to say to the client."""
    client = Client()
    stage.say(client)
    stage.say(client, "kept.1")
    stage.say(client, payload="x" * 101)
    await wait_until(lambda: len(client.answers) == 3, PATIENCE)
    assert [None, None] == client.answers[1:]
    assert [("bad_message", None, None)] == client.errors


async def test_many_are_published_together_and_in_order(stage: Stage, ears: Ears) -> None:
    """What is said while a pipeline is under way shares the next one."""
    client = Client()
    for number in range(600):
        stage.say(client, "kept.1" if number % 3 == 0 else "room.1", number, str(number))
    await wait_until(lambda: len(client.answers) == 600, PATIENCE)
    refs = [one.ref for one in client.answers if isinstance(one, Published)]
    assert [str(number) for number in range(600)] == refs
    numbers = []
    for _, data in ears.hear(600):
        entry = envelope.decode(data)
        assert isinstance(entry, Said | envelope.Notice)
        numbers.append(int(bytes(entry.payload)))
    assert list(range(600)) == numbers
    assert stage.trips <= 10


@pytest.mark.parametrize(
    ("topic", "payload", "key", "problem"),
    [
        ("room.1", "x" * 99, None, "the payload is larger than 100 bytes"),
        ("kept.1", "x" * 99, None, "the payload is larger than 100 bytes"),
        ("kept.1", 1, "k", "a key is for live topics; this one is durable"),
    ],
)
async def test_what_cannot_be_is_refused_at_once(
    idle: Stage, topic: str, payload: object, key: str | None, problem: str
) -> None:
    """Without asking Redis, which could not do better."""
    client = Client()
    assert "" == idle.say(client, topic, payload, "r1", key=key)
    assert [Error("bad_message", problem, None, "r1")] == client.answers
    assert 0 == len(idle.speaker)


@pytest.mark.parametrize("topic", ["room.1", "kept.1"])
async def test_what_is_nested_too_deeply_is_refused_at_once(
    idle: Stage, monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    """Redis would have it, and nobody would get it."""
    monkeypatch.setattr(idle.speaker, "_rules", attrs.evolve(RULES, max_payload=0))
    client = Client()
    deep = [b"[" * depth + b"]" * depth for depth in (MAX_DEPTH, MAX_DEPTH + 1)]
    for payload in deep:
        idle.say(client, topic, ref="r1", raw=payload)
    problem = "the payload is nested more than 512 deep"
    assert [Error("bad_message", problem, None, "r1")] == client.answers
    assert 1 == len(idle.speaker)


async def test_what_the_ledger_refuses_is_the_clients_own_fault_and_nobody_elses(
    stage: Stage,
) -> None:
    """Its words are passed on; what is said beside it is published."""
    client, other = Client(), Client()
    stage.say(client, "kept.1", raw=b"nope", ref="r1")
    stage.say(other, "kept.1", 1, "r2")
    await wait_until(lambda: other.answers, PATIENCE)
    assert [Error("bad_message", "the payload is not JSON", None, "r1")] == client.answers
    assert [b"1"] == [kept.payload for kept in stage.kept("kept.1")]


async def test_what_redis_refuses_is_not_tried_again(stage: Stage) -> None:
    """It has not happened, and whoever waits is told so; other topics are served."""
    stage.redis.command("SET", ledger.key("inbox", Topic("kept.broken")), "no stream")
    client, other = Client(), Client()
    stage.say(client, "kept.broken", 1, "r1")
    stage.say(other, "kept.1", 1, "r2")
    await wait_until(lambda: other.answers and client.answers, PATIENCE)
    assert [("unavailable", RETRY_AFTER_MS, "r1")] == client.errors
    assert ([], 1, 0) == (other.errors, len(stage.troubles), len(stage.speaker))


@pytest.mark.parametrize(("bound", "amount"), [("MAX_WAITING", 2), ("MAX_WAITING_BYTES", 20)])
async def test_what_waits_is_bounded(
    idle: Stage, monkeypatch: pytest.MonkeyPatch, bound: str, amount: int
) -> None:
    """By number and by size: one more is told to come again; and what was published makes room."""
    monkeypatch.setattr(speaker, bound, amount)
    client = Client()
    for number in range(3):
        stage_ref = str(number)
        idle.say(client, payload="x" * 10, ref=stage_ref)
    assert [("unavailable", RETRY_AFTER_MS, "2")] == client.errors
    await idle.finish()
    idle.say(client, ref="3")
    assert (1, 1) == (len(idle.speaker), len(client.errors))


async def test_a_live_one_is_never_published_twice(
    stage: Stage, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what a silent Redis has done: a live one is given up, a durable one repeated."""
    monkeypatch.setattr(speaker, "TRIED_SECONDS", PATIENCE)
    live, durable = Client(), Client()
    stage.redis.pause()
    try:
        stage.say(live, payload="live", ref="r1")
        which = stage.say(durable, "kept.1", "durable", "r2")
        await wait_until(lambda: live.answers, PATIENCE)
    finally:
        stage.redis.resume()
    assert [("unavailable", RETRY_AFTER_MS, "r1")] == live.errors
    await wait_until(lambda: durable.answers, PATIENCE)
    assert [which] == [one.id for one in durable.answers if isinstance(one, Published)]
    assert [which] == [kept.id for kept in stage.kept("kept.1")]
    after = Client()
    stage.say(after, payload="after")
    await wait_until(lambda: after.answers, PATIENCE)
    heard = [b""]
    while b"after" not in heard[-1]:
        ((_, data),) = ears.hear(1)
        heard.append(data)
    assert 1 == sum(b"durable" in data for data in heard)
    assert 1 >= sum(b"live" in data for data in heard)


async def test_less_is_said_at_once_to_a_redis_that_does_not_answer_in_time(
    stage: Stage, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was too much comes in smaller portions, and in the same order."""
    monkeypatch.setattr(speaker, "TRIED_SECONDS", PATIENCE)
    client = Client()
    stage.redis.pause()
    try:
        for number in range(400):
            stage.say(client, "kept.1", number, str(number))
        await wait_until(lambda: stage.troubles, PATIENCE)
        before = len(stage.speaker)
    finally:
        stage.redis.resume()
    await wait_until(lambda: len(client.answers) == 400, PATIENCE)
    assert (400, []) == (before, client.errors)
    assert list(range(400)) == [json.loads(kept.payload) for kept in stage.kept("kept.1")]
    assert 400 == len(ears.hear(400))
    assert stage.trips > 2, "two would do for so many, at once"


async def test_a_durable_one_is_given_up_after_a_while(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client waits for an answer: it is told, and may say it again."""
    monkeypatch.setattr(speaker, "TRIED_SECONDS", 0.0)
    client = Client()
    stage.redis.pause()
    try:
        stage.say(client, "kept.1", 1, "r1")
        await wait_until(lambda: client.answers, PATIENCE)
    finally:
        stage.redis.resume()
    assert [("unavailable", RETRY_AFTER_MS, "r1")] == client.errors
    assert (0, 1) == (len(stage.speaker), len(stage.troubles))


async def test_what_is_under_way_when_it_is_stopped_is_not_forgotten(
    idle: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable one is kept for the last round; a live one is answered."""
    monkeypatch.setattr(speaker, "TRIED_SECONDS", PATIENCE)
    live, durable = Client(), Client()
    idle.redis.pause()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle.run)
            idle.say(live, payload="live", ref="r1")
            idle.say(durable, "kept.1", "durable", "r2")
            await wait_until(lambda: len(idle.speaker) == 0, PATIENCE)
            nursery.cancel_scope.cancel()
    finally:
        idle.redis.resume()
    assert [("unavailable", RETRY_AFTER_MS, "r1")] == live.errors
    assert (1, []) == (len(idle.speaker), durable.answers)
    await idle.finish()
    assert [b'"durable"'] == [kept.payload for kept in idle.kept("kept.1")]
    assert 1 == len(durable.answers)


async def test_the_end_does_not_wait_for_a_redis_that_is_away(
    idle: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One attempt, and what is durable stays where it is."""
    monkeypatch.setattr(speaker, "TRIED_SECONDS", PATIENCE)
    client = Client()
    idle.redis.pause()
    try:
        idle.say(client, "kept.1", 1, "r1")
        await idle.finish()
    finally:
        idle.redis.resume()
    assert (1, [], 1) == (len(idle.speaker), client.answers, len(idle.troubles))


async def test_a_client_that_chokes_harms_nobody_else(stage: Stage) -> None:
    """It is logged, and the others are answered."""
    client, other = Client(), Client()
    client.chokes = True
    stage.say(client, ref="r1")
    stage.say(other, ref="r2")
    await wait_until(lambda: other.answers, PATIENCE)
    assert ["publishing to a topic: choked"] == stage.bugs
    assert [Published("room.1", "r2")] == other.answers
