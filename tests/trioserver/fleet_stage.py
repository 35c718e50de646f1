"""Registries of several workers, and connections as far as these know them, on a real Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from tests.redis_server import RedisServer, wait_until
from trioserver.caller import Caller
from trioserver.endpoint import Endpoint
from trioserver.errors import CloseReason
from trioserver.redis_link import RedisLink, open_link
from trioserver.registry import Registry
from trioserver.subscription import Subscription

SECONDS: Final = 15.0
"""For what takes a moment."""


class Guest:
    """A connection, as far as a registry knows it."""

    def __init__(self, name: str, user: str | None = "ann", device: str = "") -> None:
        self.connection_id = name
        self.user = user
        self.device = device
        self.caller = Caller(1, 1, "Firefox", "web")
        self.since = 1_763_630_000.5
        self.ended: list[CloseReason] = []
        self.home: Registry | None = None

    def end(self, reason: CloseReason) -> None:
        """Take note, and leave as a connection does."""
        self.ended.append(reason)
        if self.home is not None:
            self.home.leave(self)


class Broken(Guest):
    """A connection with a bug."""

    def end(self, reason: CloseReason) -> None:
        """Fail."""
        super().end(reason)
        raise RuntimeError(self.connection_id)


class Worker:
    """A registry with links of its own as in a worker, and what they complain of."""

    def __init__(
        self, redis: RedisServer, life: str = "aa.1.1", *after: str, limit: int = 2
    ) -> None:
        self.redis = redis
        self.bugs: list[tuple[str, BaseException]] = []
        self.troubles: list[str] = []
        self.trips = 0
        self.registry = Registry(
            life,
            after,
            limit,
            prefix="test:",
            log_bug=lambda what, bug: self.bugs.append((what, bug)),
            log_trouble=self.troubles.append,
        )
        self.link: RedisLink | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Worker"]:
        """Run it for the time of the block."""
        where = Endpoint(path=str(self.redis.path))
        self.hints = Subscription(where, self._receive, self._link_changed)
        self.hints.follow(self.registry.channel)
        async with (
            open_link(where, observe=self._observe) as self.link,
            trio.open_nursery() as all_,
        ):
            all_.start_soon(self.hints.run)
            all_.start_soon(self.registry.run, self.link)
            yield self
            all_.cancel_scope.cancel()

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[RedisLink]:
        """Have a lease, but run nothing: the test does what the tasks would do."""
        async with open_link(Endpoint(path=str(self.redis.path))) as link:
            assert await self.registry._renew(link)
            yield link

    def _observe(self, _seconds: float) -> None:
        self.trips += 1

    def _receive(self, _channel: bytes, payload: bytes) -> None:
        self.registry.hinted(payload)

    def _link_changed(self) -> None:
        if self.hints.up:
            self.registry.hinted()
        else:
            self.registry.link_lost()

    def enter(self, *names: str, user: str | None = "ann", device: str = "") -> list[Guest]:
        """Let connections come."""
        guests = [Guest(name, user, device) for name in names]
        self.let_in(*guests)
        return guests

    def let_in(self, *guests: Guest) -> None:
        """Let them come."""
        for guest in guests:
            guest.home = self.registry
            self.registry.enter(guest)

    async def leased(self) -> None:
        """Wait until it has a lease, and hears hints."""
        await wait_until(lambda: self.registry.lives.now_ms and self.hints.up, SECONDS)

    async def renewed(self) -> None:
        """Have it renew its lease now."""
        before = self.registry.lives
        self.registry.hinted()
        await wait_until(lambda: self.registry.lives is not before, SECONDS)

    async def finish(self) -> None:
        """Let it end in order."""
        assert self.link is not None
        await self.registry.finish(self.link)
