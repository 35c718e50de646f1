"""Workers with an attendance and a lease each, on a real Redis, for the tests of presence."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.redis_server import RedisServer, wait_until
from trioserver import envelope, fleet, presence
from trioserver.attendance import Attendance
from trioserver.caller import Caller
from trioserver.endpoint import Endpoint
from trioserver.envelope import Came
from trioserver.ledger import Command
from trioserver.messages import Error, Presence
from trioserver.presence import BEGINNING
from trioserver.redis_link import open_link
from trioserver.registry import Registry
from trioserver.subscription import Subscription
from trioserver.topics import Patterns

SECONDS = 15.0
"""For what takes a moment."""


class Guest:
    """A connection, as far as presence knows it; takes answers."""

    def __init__(self, name: str, user: str | None = "ann", device: str = "") -> None:
        self.connection_id = name
        self.user = user
        self.device = device
        self.caller = Caller(1, 1, "Firefox", "web")
        self.answers: list[Presence | Error] = []

    def attended(self, answer: Presence | Error) -> None:
        """Take note."""
        self.answers.append(answer)


class Worker:
    """An attendance as in a worker, its links, and what it complains of."""

    def __init__(self, redis: RedisServer, life: str = "aa.1.1") -> None:
        self.redis = redis
        self.bugs: list[tuple[str, BaseException]] = []
        self.troubles: list[str] = []
        self.trips = 0
        self.registry = Registry(
            life,
            (),
            0,
            prefix="test:",
            log_bug=lambda what, bug: self.bugs.append((what, bug)),
            log_trouble=lambda _: None,
        )
        self.attendance = Attendance(
            announced=Patterns.of(["loud.**"]),
            prefix="test:",
            give_up=self.registry.link_lost,
            log_bug=lambda what, bug: self.bugs.append((what, bug)),
            log_trouble=self.troubles.append,
        )
        self.registry.watch(self.attendance)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Worker"]:
        """Run it for the time of the block, with a lease."""
        where = Endpoint(path=str(self.redis.path))
        hints = Subscription(where, self._receive, self._link_changed)
        hints.follow(self.registry.channel)
        self.hints = hints
        async with (
            open_link(where) as self.lease_link,
            open_link(where, observe=self._observe) as self.link,
            trio.open_nursery() as all_,
        ):
            all_.start_soon(hints.run)
            all_.start_soon(self.registry.run, self.lease_link)
            all_.start_soon(self.attendance.run, self.link)
            await wait_until(lambda: self.registry.holds and hints.up, SECONDS)
            yield self
            all_.cancel_scope.cancel()

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def _receive(self, _channel: bytes, payload: bytes) -> None:
        self.registry.hinted(payload)

    def _link_changed(self) -> None:
        if self.hints.up:
            self.registry.hinted()
        else:
            self.registry.link_lost()

    def enter(self, topic: str, *names: str, user: str | None = "ann") -> list[Guest]:
        """Have connections subscribe."""
        guests = [Guest(name, user) for name in names]
        for guest in guests:
            self.attendance.enter(guest, topic)
        return guests

    async def renewed(self) -> None:
        """Have it renew its lease now."""
        before = self.registry.lives
        self.registry.hinted()
        await wait_until(lambda: self.registry.lives is not before, SECONDS)

    async def ask(
        self, topic: str, after: str | None = None, ref: str | None = None
    ) -> Presence | Error:
        """Return the answer to a question."""
        guest = Guest("asks")
        self.attendance.ask(guest, topic, after, ref)
        await wait_until(lambda: guest.answers, SECONDS)
        (answer,) = guest.answers
        return answer


class Ear:
    """Hears what is told of a topic."""

    def __init__(self, redis: RedisServer, topic: str) -> None:
        self.events: list[tuple[str, str]] = []
        self.subscription = Subscription(
            Endpoint(path=str(redis.path)), self._receive, lambda: None
        )
        self.subscription.follow(f"test:topic:{topic}".encode())

    def _receive(self, _channel: bytes, payload: bytes) -> None:
        came = envelope.decode(payload)
        assert isinstance(came, Came)
        self.events.append((came.event, came.user))

    @property
    def told(self) -> set[str]:
        """Who is there, for somebody who believes what he is told."""
        there: set[str] = set()
        for event, user in self.events:
            (there.add if event == "join" else there.discard)(user)
        return there

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Ear"]:
        """Listen for the time of the block."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.subscription.run)
            await wait_until(lambda: self.subscription.up, SECONDS)
            yield self
            nursery.cancel_scope.cancel()

    async def hears(self, *events: tuple[str, str]) -> None:
        """Wait until it has heard exactly this, in this order."""
        await wait_until(lambda: list(events) == self.events, SECONDS)


def call(redis: RedisServer, command: Command) -> object:
    """Run a command; blocks for a moment."""
    return redis.command(*(part if isinstance(part, bytes) else str(part) for part in command))


def places(redis: RedisServer, topic: str) -> list[str]:
    """Return ``<user> <life>/<connection>`` of all entries."""
    reply = call(redis, presence.entries_read(topic, BEGINNING, 100_000))
    assert isinstance(reply, list)
    return [" ".join(one.decode().split(" ")[:2]) for one in reply]


async def are(redis: RedisServer, topic: str, *expected: str) -> None:
    """Wait until exactly these entries are there."""
    await wait_until(lambda: sorted(expected) == places(redis, topic), SECONDS)


def end(redis: RedisServer, life: str) -> None:
    """Have a lease end now, as if its owner had been killed and somebody had said so."""
    redis.command("ZREM", fleet.LIVES_KEY, life)
