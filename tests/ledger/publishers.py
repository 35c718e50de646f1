"""Publishers that write down what they were told about each publish.

Every way in is taken at the same time, each on a thread of its own: the blocking publisher, the
one for asyncio, the one for Trio, and HTTP. Every other publish has an idempotency key, and is
repeated when nobody knows what became of it, as a back end would.
"""

import asyncio
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final

import attrs
import trio

from tests.ledger.records import (
    ALL,
    EVERYONE,
    NOWHERE,
    OWN,
    Journal,
    Outcome,
    Publish,
    now,
    places,
)
from tests.ledger.stage import API_KEY
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Accepted
from trioserver.publisher import AsyncioPublisher, Publisher, PublishRefused, TrioPublisher
from trioserver.publisher.fronts import AsyncPublisher

HTTP_SECONDS: Final = 10.0
REPETITIONS: Final = 3
REPETITION_SECONDS: Final = 0.3
TASKS: Final = 4
"""Publishes that an asynchronous publisher has under way at the same time."""

PATIENCE: Final = 20.0
"""Seconds for the last publish of a publisher that was told to stop."""


@attrs.frozen(kw_only=True)
class Turn:
    """One thing to publish."""

    number: int
    user: str
    key: str | None
    """The idempotency key; with one it may be repeated."""
    began: float


@attrs.frozen(kw_only=True)
class Answer:
    """What a publisher was told."""

    outcome: Outcome
    id: str = ""
    position: str = ""
    note: str = ""


class Turns:
    """Who is to get the next notification, and when; for one publisher.

    Args:
        journal: Where numbers come from and results go to.
        name: Of the publisher.
        users: Among whom the dice choose; `EVERYONE` may be one of them.
        rate: Publishes per second; if they cannot be had, none are made up for.
        stop: Set when it is enough.
    """

    def __init__(
        self,
        journal: Journal,
        name: str,
        users: Sequence[str],
        rate: float,
        stop: threading.Event,
    ) -> None:
        self._journal = journal
        self._name = name
        self._users = users
        self._interval = 1 / rate
        self._stop = stop
        self._dice = random.Random(name)
        self._due = now() + self._dice.uniform(0, self._interval)

    def pause(self) -> float | None:
        """Return the seconds until the next turn; None if there is none."""
        return None if self._stop.is_set() else max(0.0, self._due - now())

    def take(self, user: str | None = None) -> Turn:
        """Return the next turn: the dice choose, unless a user is given; then there is a key."""
        began = now()
        self._due = max(self._due + self._interval, began)
        number = self._journal.number()
        repeatable = user is not None or self._dice.random() < 0.5
        return Turn(
            number=number,
            user=self._dice.choice(self._users) if user is None else user,
            key=f"{self._journal.name}-{number}" if repeatable else None,
            began=began,
        )

    def done(self, turn: Turn, answer: Answer) -> None:
        """Write down what became of it."""
        stream = ALL if turn.user == EVERYONE else OWN
        self._journal.publishes.append(
            Publish(
                number=turn.number,
                user=turn.user,
                outcome=answer.outcome,
                by=self._name,
                id=answer.id,
                place=places(answer.position).get(stream, NOWHERE),
                note=answer.note,
                began=turn.began,
                ended=now(),
            )
        )


Speak = Callable[[Turns], None]
"""Publishes until there are no more turns; blocks."""


def blocking(url: str) -> Speak:
    """Return who publishes with the blocking publisher."""

    def speak(turns: Turns) -> None:
        with Publisher(url) as publisher:
            _in_turns(turns, lambda turn: say(publisher, turn.number, turn.user, turn.key))

    return speak


def by_http(api: tuple[str, int]) -> Speak:
    """Return who publishes with HTTP requests to the gateway."""
    return lambda turns: _in_turns(turns, lambda turn: post(api, turn.number, turn.user, turn.key))


def by_asyncio(url: str) -> Speak:
    """Return who publishes with the publisher for asyncio, several at a time."""

    async def speak(turns: Turns) -> None:
        async with AsyncioPublisher(url) as publisher, asyncio.TaskGroup() as group:
            for _ in range(TASKS):
                group.create_task(_in_turns_async(turns, publisher, asyncio.sleep))

    return lambda turns: asyncio.run(speak(turns))


def by_trio(url: str) -> Speak:
    """Return who publishes with the publisher for Trio, several at a time."""

    async def speak(turns: Turns) -> None:
        async with TrioPublisher.open(url) as publisher, trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(_in_turns_async, turns, publisher, trio.sleep)

    return lambda turns: trio.run(speak, turns)


def every_way(url: str, api: tuple[str, int]) -> dict[str, Speak]:
    """Return one publisher of each kind, by name."""
    return {
        "blocking": blocking(url),
        "http": by_http(api),
        "asyncio": by_asyncio(url),
        "trio": by_trio(url),
    }


@contextlib.contextmanager
def publishing(
    journal: Journal, speakers: Mapping[str, Speak], users: Sequence[str], rate: float
) -> Iterator[None]:
    """Publish for the time of the block; when it is left, every answer has been written down.

    Args:
        journal: Where to.
        speakers: By name.
        users: To whom.
        rate: Publishes per second, of all of them together.
    """
    stop = threading.Event()
    failures: list[BaseException] = []

    def run(speak: Speak, turns: Turns) -> None:
        try:
            speak(turns)
        except BaseException as failure:  # noqa: BLE001 - raised again in the test's own thread
            failures.append(failure)

    threads = [
        threading.Thread(
            target=run,
            args=(speak, Turns(journal, name, users, rate / len(speakers), stop)),
            name=name,
            daemon=True,
        )
        for name, speak in speakers.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a publisher does not come to an end"
    if failures:
        raise failures[0]


def say(
    publisher: Publisher, number: int, user: str, key: str | None = None, *, padding: str = ""
) -> Answer:
    """Publish one notification with the blocking publisher."""
    payload = {"n": number, "padding": padding}
    try:
        if user == EVERYONE:
            told = publisher.publish(payload, everyone=True, idempotency_key=key)
        else:
            # Many to few users: without priority most would be too many for a minute.
            told = publisher.publish(payload, user=user, idempotency_key=key, priority=True)
    except _NOT_ACCEPTED as error:
        return _not_accepted(error)
    return accepted(told)


async def say_async(
    publisher: AsyncPublisher, number: int, user: str, key: str | None = None
) -> Answer:
    """Publish one notification with one of the other publishers."""
    try:
        if user == EVERYONE:
            told = await publisher.publish({"n": number}, everyone=True, idempotency_key=key)
        else:
            told = await publisher.publish(
                {"n": number}, user=user, idempotency_key=key, priority=True
            )
    except _NOT_ACCEPTED as error:
        return _not_accepted(error)
    return accepted(told)


def post(api: tuple[str, int], number: int, user: str, key: str | None = None) -> Answer:
    """Publish one notification with an HTTP request; blocks."""
    body: dict[str, object] = {
        "to": {"all": True} if user == EVERYONE else {"user": user},
        "payload": {"n": number},
    }
    if key is not None:
        body["idempotency_key"] = key
    headers = {"X-API-Key": API_KEY, "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(*api, timeout=HTTP_SECONDS)
    try:
        with contextlib.closing(connection):
            connection.request("POST", "/api/v1/notifications", json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
    except (OSError, http.client.HTTPException) as error:
        return Answer(outcome=Outcome.UNKNOWN, note=repr(error))
    if response.status == 202:
        answer = json.loads(text)
        return Answer(outcome=Outcome.ACCEPTED, id=answer["id"], position=answer["position"])
    refused = 400 <= response.status < 500
    outcome = Outcome.REFUSED if refused else Outcome.UNKNOWN
    return Answer(outcome=outcome, note=f"{response.status} {text!r}")


def publish_many(
    url: str, journal: Journal, users: Sequence[str], count: int, *, padding: str = ""
) -> None:
    """Publish ``count`` notifications to ``users`` in turn, as fast as it goes. Blocks."""
    turns = Turns(journal, "many", users, 1.0, threading.Event())
    with Publisher(url) as publisher:
        for index in range(count):
            turn = turns.take(users[index % len(users)])
            turns.done(turn, say(publisher, turn.number, turn.user, padding=padding))


def publish_last(url: str, journal: Journal, users: Sequence[str]) -> dict[str, int]:
    """Publish to each of ``users`` until it is accepted; return the numbers. Blocks."""
    turns = Turns(journal, "the last", users, 1.0, threading.Event())
    numbers: dict[str, int] = {}
    deadline = now() + PATIENCE
    with Publisher(url) as publisher:
        for user in users:
            turn = turns.take(user)
            numbers[user] = turn.number
            while (
                answer := say(publisher, turn.number, user, turn.key)
            ).outcome is Outcome.UNKNOWN:
                assert now() < deadline, answer
            turns.done(turn, answer)
    return numbers


_NOT_ACCEPTED: Final = (RedisUnavailable, RedisRefused, PublishRefused)


def accepted(told: Accepted) -> Answer:
    """Return what the publisher was told when it was told well."""
    return Answer(outcome=Outcome.ACCEPTED, id=told.id, position=told.position, note=told.outcome)


def _not_accepted(error: Exception) -> Answer:
    unknown = isinstance(error, RedisUnavailable)
    return Answer(outcome=Outcome.UNKNOWN if unknown else Outcome.REFUSED, note=repr(error))


def _again(turn: Turn, answer: Answer, attempt: int) -> bool:
    """Whether a back end would ask once more."""
    unknown = answer.outcome is Outcome.UNKNOWN
    return unknown and turn.key is not None and attempt < REPETITIONS


def _in_turns(turns: Turns, publish: Callable[[Turn], Answer]) -> None:
    while (pause := turns.pause()) is not None:
        time.sleep(pause)
        turn = turns.take()
        attempt = 1
        while _again(turn, answer := publish(turn), attempt):
            attempt += 1
            time.sleep(REPETITION_SECONDS)
        turns.done(turn, answer)


async def _in_turns_async(
    turns: Turns, publisher: AsyncPublisher, sleep: Callable[[float], Awaitable[object]]
) -> None:
    while (pause := turns.pause()) is not None:
        await sleep(pause)
        turn = turns.take()
        attempt = 1
        while _again(
            turn, answer := await say_async(publisher, turn.number, turn.user, turn.key), attempt
        ):
            attempt += 1
            await sleep(REPETITION_SECONDS)
        turns.done(turn, answer)
