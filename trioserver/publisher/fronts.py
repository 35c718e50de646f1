"""Publishers: for callers that block, for asyncio and for Trio. Thin: they only perform steps."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar, Unpack, overload

from trioserver.endpoint import Endpoint
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Accepted, Command, TopicRules
from trioserver.life import Standing, Trace
from trioserver.publisher.asking import Asking, Result
from trioserver.publisher.attempts import DEADLINE_SECONDS, Outcome, Pause, Steps
from trioserver.publisher.request import Options
from trioserver.redis_direct import AsyncioLink, BlockingLink, Reply
from trioserver.settings import Settings

T = TypeVar("T")


class Publisher:
    """Publishes, for callers that may block; for any number of threads, survives forks.

        publisher = Publisher("redis://redis.internal:6379/0")
        accepted = publisher.publish({"order": 1017}, user="42", type="order.shipped")
        print(accepted.id)

    Nothing is connected before the first call. `close` when done, or use it as a context manager.
    """

    def __init__(
        self,
        where: str | Endpoint,
        *,
        settings: Settings | None = None,
        deadline: float = DEADLINE_SECONDS,
        topics: TopicRules | None = None,
    ) -> None:
        """Remember where Redis is.

        Args:
            where: REDIS_URL, or what `trioserver.endpoint.endpoint` has made of the settings.
            settings: The server's own, if channels, limits or lifetimes differ from the defaults.
                The file of PAYLOAD_SCHEMAS is read here, once.
            deadline: Seconds for one call, all repetitions included.
            topics: Which topics are durable. Without it, those of the settings; if they name none,
                those of the servers, which have said so in Redis.

        Raises:
            SettingsError: The URL is not understood, or PAYLOAD_SCHEMAS cannot be used.
        """
        self._asking = Asking.of(settings, deadline, topics)
        self._link = BlockingLink(self._asking.endpoint(where), client_name="publisher")

    @overload
    def publish(self, payload: object, *, user: str, **options: Unpack[Options]) -> Accepted: ...

    @overload
    def publish(
        self, payload: object, *, everyone: Literal[True], **options: Unpack[Options]
    ) -> Accepted: ...

    @overload
    def publish(self, payload: object, *, topic: str, **options: Unpack[Options]) -> Accepted: ...

    @overload
    def publish(
        self, payload: object, *, users: Iterable[str], **options: Unpack[Options]
    ) -> list[Result]: ...

    @overload
    def publish(
        self, payload: object, *, topics: Iterable[str], **options: Unpack[Options]
    ) -> list[Result]: ...

    def publish(
        self,
        payload: object,
        *,
        user: str | None = None,
        users: Iterable[str] | None = None,
        everyone: bool = False,
        topic: str | None = None,
        topics: Iterable[str] | None = None,
        **options: Unpack[Options],
    ) -> Accepted | list[Result]:
        """Publish a notification to one user, to several, to everyone, or to topics.

            publisher.publish("Hello", user="42")
            publisher.publish({"sale": True}, everyone=True, ttl=3600)
            publisher.publish({"n": 1}, users=["42", "43"], idempotency_key="invoice-7")
            publisher.publish({"price": 7}, topic="ticker.acme", key="acme")

        Args:
            payload: Anything that can be JSON; bytes and `msgspec.Raw` are JSON already.
            user: The user's id.
            users: Several ids; each gets a notification of its own.
            everyone: Every user there is, those who are away included.
            topic: The name of a topic. If that is durable, the notification is kept for those who
                come later; else it is for those who are subscribed now.
            topics: Several names.
            options: See `Options`.

        Returns:
            What Redis has accepted; ``outcome`` is accepted, scheduled, or duplicate, which means
            that the idempotency key was used before and this is the answer of then. With ttl
            0, and for live topics, an `Ephemeral`. For ``users`` and ``topics`` a list in their
            order; refusals that concern one of them alone are values in it.

        Raises:
            PublishRefused: The request is wrong; nothing was published.
            IdempotencyConflict: The key was used a short time ago, for something else.
            RateLimited: The user gets NOTIFICATIONS_PER_MINUTE_PER_USER already (50, unless the
                settings say otherwise), and this has no priority. The error knows how long to
                wait; nothing is repeated by itself.
            PayloadMisfit: The payload does not fit its type's schema.
            RedisUnavailable: Redis did not answer, also not when asked again. Whether the
                notification was published is unknown; with an idempotency key it may be published
                again in any case. For ``users`` and ``topics`` it is a `PublishInterrupted`.
            RedisRefused: Redis takes no commands (out of memory, no permission); nothing was
                published.
        """
        steps = self._asking.publish(
            payload, user, users, options, everyone=everyone, topic=topic, topics=topics
        )
        return self._perform(steps)

    def cancel(self, notification: str) -> str:
        """Withdraw a notification: whoever has not got it never will, whoever shows it is told.

        Args:
            notification: Its id.

        Returns:
            ``cancelled``; ``too late`` if it has been read or has expired or has been cancelled
            before; ``unknown`` if there is none.

        Raises:
            PublishRefused: That is no notification's id.
            RedisUnavailable: Redis did not answer; whether it is cancelled is unknown.
            RedisRefused: Redis takes no commands.
        """
        return self._perform(self._asking.cancel(notification))

    def why(self, user: str) -> Standing:
        """Say how a user stands: devices, what each has received, what is outstanding.

        Raises:
            PublishRefused: That is no user's id.
            RedisUnavailable: Redis did not answer.
            RedisRefused: Redis takes no commands.
        """
        return self._perform(self._asking.why(user))

    def notification(self, notification: str) -> Trace | None:
        """Return the life of a notification; None if nothing is known of it.

        Args:
            notification: Its id. It is forgotten a day after it has expired.

        Raises:
            PublishRefused: That is no notification's id.
            RedisUnavailable: Redis did not answer.
            RedisRefused: Redis takes no commands.
        """
        return self._perform(self._asking.notification(notification))

    def topic_rules(self) -> TopicRules | None:
        """Return which topics are durable, as `publish` goes by it.

        That is what this publisher was told or, if it was told nothing, what the servers say: asked
        for again after five seconds. None if no server has said anything in a day, or if that may
        not be read: then every topic is live.

        Raises:
            RedisUnavailable: Redis did not answer.
            RedisRefused: Redis takes no commands.
        """
        return self._perform(self._asking.topic_rules())

    def close(self) -> None:
        """Close the connections that are idle. Idempotent."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _perform(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: T = end.value
                return answer
            outcome = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                continue
            try:
                outcome = self._link.pipeline(step.commands, timeout=step.seconds)
            except RedisUnavailable as problem:
                outcome = problem


class Link(Protocol):
    """What an `AsyncPublisher` needs of a link to Redis."""

    async def pipeline(
        self,
        commands: Iterable[Command],
        *,
        timeout: float,  # noqa: ASYNC109 - as the links have it
    ) -> list[Reply | RedisRefused]:
        """Run several commands in one round trip; raises RedisUnavailable."""


class AsyncPublisher:
    """What `AsyncioPublisher` and `TrioPublisher` have in common: `Publisher`, awaited.

    Cancellation:
        Safe at any time; whether a notification was published is unknown then.
    """

    def __init__(
        self, link: Link, sleep: Callable[[float], Awaitable[object]], asking: Asking
    ) -> None:
        self._asking = asking
        self._link = link
        self._sleep = sleep

    @overload
    async def publish(
        self, payload: object, *, user: str, **options: Unpack[Options]
    ) -> Accepted: ...

    @overload
    async def publish(
        self, payload: object, *, everyone: Literal[True], **options: Unpack[Options]
    ) -> Accepted: ...

    @overload
    async def publish(
        self, payload: object, *, topic: str, **options: Unpack[Options]
    ) -> Accepted: ...

    @overload
    async def publish(
        self, payload: object, *, users: Iterable[str], **options: Unpack[Options]
    ) -> list[Result]: ...

    @overload
    async def publish(
        self, payload: object, *, topics: Iterable[str], **options: Unpack[Options]
    ) -> list[Result]: ...

    async def publish(
        self,
        payload: object,
        *,
        user: str | None = None,
        users: Iterable[str] | None = None,
        everyone: bool = False,
        topic: str | None = None,
        topics: Iterable[str] | None = None,
        **options: Unpack[Options],
    ) -> Accepted | list[Result]:
        """Publish a notification to one user, to several, to everyone, or to topics.

        See `Publisher.publish`.
        """
        steps = self._asking.publish(
            payload, user, users, options, everyone=everyone, topic=topic, topics=topics
        )
        return await self._perform(steps)

    async def cancel(self, notification: str) -> str:
        """Withdraw a notification; see `Publisher.cancel`."""
        return await self._perform(self._asking.cancel(notification))

    async def why(self, user: str) -> Standing:
        """Say how a user stands; see `Publisher.why`."""
        return await self._perform(self._asking.why(user))

    async def notification(self, notification: str) -> Trace | None:
        """Return the life of a notification; see `Publisher.notification`."""
        return await self._perform(self._asking.notification(notification))

    async def topic_rules(self) -> TopicRules | None:
        """Return which topics are durable; see `Publisher.topic_rules`."""
        return await self._perform(self._asking.topic_rules())

    async def _perform(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                answer: T = end.value
                return answer
            outcome = None
            if isinstance(step, Pause):
                await self._sleep(step.seconds)
                continue
            try:
                outcome = await self._link.pipeline(step.commands, timeout=step.seconds)
            except RedisUnavailable as problem:
                outcome = problem


class AsyncioPublisher(AsyncPublisher):
    """Publishes from asyncio, with at most 10 connections.

        async with AsyncioPublisher("redis://redis.internal:6379/0") as publisher:
            await publisher.publish({"order": 1017}, user="42")

    Nothing is connected before the first call. `aclose` when done, or use it as a context manager.
    """

    def __init__(
        self,
        where: str | Endpoint,
        *,
        settings: Settings | None = None,
        deadline: float = DEADLINE_SECONDS,
        topics: TopicRules | None = None,
    ) -> None:
        """Remember where Redis is; the arguments are those of `Publisher`.

        Raises:
            SettingsError: The URL is not understood, or PAYLOAD_SCHEMAS cannot be used.
        """
        asking = Asking.of(settings, deadline, topics)
        self._connections = AsyncioLink(asking.endpoint(where), client_name="publisher")
        super().__init__(self._connections, asyncio.sleep, asking)

    async def aclose(self) -> None:
        """Close the connections that are idle. Idempotent."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class TrioPublisher(AsyncPublisher):
    """Publishes from Trio, through a `trioserver.redis_link.RedisLink`.

    async with TrioPublisher.open("redis://redis.internal:6379/0") as publisher:
        await publisher.publish({"order": 1017}, user="42")
    """

    def __init__(
        self,
        link: Link,
        *,
        settings: Settings | None = None,
        deadline: float = DEADLINE_SECONDS,
        topics: TopicRules | None = None,
    ) -> None:
        """Publish through a link that somebody else has opened.

        Args:
            link: A `trioserver.redis_link.RedisLink`.
            settings: The server's own, if channels, limits or lifetimes differ from the defaults.
                The file of PAYLOAD_SCHEMAS is read here, once.
            deadline: Seconds for one call, all repetitions included.
            topics: Which topics are durable. Without it, those of the settings; if they name none,
                those of the servers, which have said so in Redis.

        Raises:
            SettingsError: PAYLOAD_SCHEMAS cannot be used.
        """
        import trio  # noqa: PLC0415 - callers without Trio do not pay for it

        super().__init__(link, trio.sleep, Asking.of(settings, deadline, topics))

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        where: str | Endpoint,
        *,
        settings: Settings | None = None,
        deadline: float = DEADLINE_SECONDS,
        topics: TopicRules | None = None,
    ) -> AsyncIterator[Self]:
        """Open a link of its own for the time of the block; the arguments are `Publisher`'s.

        Raises:
            SettingsError: The URL is not understood, or PAYLOAD_SCHEMAS cannot be used.
        """
        # Not above: importing trio-asyncio replaces functions of asyncio in the whole process.
        from trioserver.redis_link import open_link  # noqa: PLC0415

        endpoint = Asking.of(settings, deadline, topics).endpoint(where)
        async with open_link(endpoint, client_name="publisher") as link:
            yield cls(link, settings=settings, deadline=deadline, topics=topics)
