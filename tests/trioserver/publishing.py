"""The three publishers as one blocking caller sees them, so that one test serves them all."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Final, Protocol, cast

import trio

from trioserver.publisher import AsyncioPublisher, Publisher, TrioPublisher


def plain_asyncio() -> asyncio.Runner:
    """Return asyncio as a back end has it.

    Once anything has imported trio-asyncio, the default loop of the process is another one.
    """
    return asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)


class Front(Protocol):
    """A publisher; see `trioserver.publisher.Publisher`."""

    def publish(self, payload: object, **options: Any) -> Any:
        """Publish."""

    def cancel(self, notification: str) -> str:
        """Withdraw."""

    def why(self, user: str) -> Any:
        """Say how a user stands."""

    def notification(self, notification: str) -> Any:
        """Return the life of a notification."""

    def topic_rules(self) -> Any:
        """Return which topics are durable."""

    def close(self) -> None:
        """Close what is open."""


class _Awaited:
    """What is awaited, run to its end by somebody else."""

    def __init__(self, run: Callable[[Callable[[Any], Awaitable[Any]]], Any]) -> None:
        self._run = run

    def publish(self, payload: object, **options: Any) -> Any:
        """Publish."""
        return self._run(lambda publisher: publisher.publish(payload, **options))

    def cancel(self, notification: str) -> Any:
        """Withdraw."""
        return self._run(lambda publisher: publisher.cancel(notification))

    def why(self, user: str) -> Any:
        """Say how a user stands."""
        return self._run(lambda publisher: publisher.why(user))

    def notification(self, notification: str) -> Any:
        """Return the life of a notification."""
        return self._run(lambda publisher: publisher.notification(notification))

    def topic_rules(self) -> Any:
        """Return which topics are durable."""
        return self._run(lambda publisher: publisher.topic_rules())


class _Looped(_Awaited):
    """An `AsyncioPublisher` and the event loop it lives in."""

    def __init__(self, where: Any, **options: Any) -> None:
        self._runner = plain_asyncio()
        self._publisher = AsyncioPublisher(where, **options)
        super().__init__(lambda ask: self._runner.run(_awaited(ask(self._publisher))))

    def close(self) -> None:
        """Close the publisher and the loop."""
        self._runner.run(self._publisher.aclose())
        self._runner.close()


class _Trio(_Awaited):
    """A `TrioPublisher`, open in a thread with a Trio of its own."""

    def __init__(self, where: Any, **options: Any) -> None:
        self._open: Future[tuple[TrioPublisher, trio.lowlevel.TrioToken, trio.Event]] = Future()
        self._thread = threading.Thread(target=trio.run, args=(self._live, where, options))
        self._thread.start()
        self._publisher, self._token, self._closing = self._open.result(10)
        super().__init__(
            lambda ask: trio.from_thread.run(ask, self._publisher, trio_token=self._token)
        )

    def close(self) -> None:
        """Close the link and end the thread."""
        trio.from_thread.run_sync(self._closing.set, trio_token=self._token)
        self._thread.join(10)

    async def _live(self, where: Any, options: Any) -> None:
        try:
            async with TrioPublisher.open(where, **options) as publisher:
                closing = trio.Event()
                self._open.set_result((publisher, trio.lowlevel.current_trio_token(), closing))
                await closing.wait()
        except Exception as error:
            if self._open.done():
                raise
            self._open.set_exception(error)


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


FRONTS: Final[dict[str, Callable[..., Front]]] = {
    "blocking": cast("Callable[..., Front]", Publisher),
    "asyncio": _Looped,
    "trio": _Trio,
}
