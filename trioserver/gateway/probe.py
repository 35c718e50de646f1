"""One question for all who ask at the same time.

A hundred monitors that ask for readiness in the same instant cost one question to the supervisor,
and one that asks again and again gets an answer that is at most a moment old. The question is asked
by a task of its own: a caller that goes away does not take the answer away from the others, and a
question that hangs is cut off without hanging anybody.
"""

from collections.abc import Awaitable, Callable
from typing import Generic, NoReturn, TypeVar

import trio

from trioserver import logs

T = TypeVar("T")


class Probe(Generic[T]):
    """Shares the answers to one question. One task runs `run`, any task may `get`."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        *,
        unknown: T,
        fresh_seconds: float,
        timeout_seconds: float,
    ) -> None:
        """Prepare to ask.

        Args:
            ask: The question. It may be cancelled; what it raises is logged, and means unknown.
            unknown: The answer when there is none.
            fresh_seconds: How old an answer may be and still be given.
            timeout_seconds: How long the question may take.
        """
        self._ask = ask
        self._unknown = unknown
        self._fresh_seconds = fresh_seconds
        self._timeout_seconds = timeout_seconds
        self._answer = unknown
        self._fresh_until = float("-inf")
        self._asking = False
        self._wanted = trio.Event()
        self._answered = trio.Event()

    async def get(self) -> T:
        """Return the answer, a fresh one or the one that is on its way.

        Returns ``unknown`` once the question has taken too long.
        """
        if trio.current_time() < self._fresh_until:
            await trio.lowlevel.checkpoint()
            return self._answer
        if not self._asking:
            self._wanted.set()
        # Also when `run` is not running: nobody hangs because of a probe.
        with trio.move_on_after(self._timeout_seconds):
            await self._answered.wait()
            return self._answer
        return self._unknown

    async def run(self) -> NoReturn:
        """Ask whenever somebody wants to know, until cancelled."""
        while True:
            await self._wanted.wait()
            self._asking = True
            self._answer = await self._answer_in_time()
            self._fresh_until = trio.current_time() + self._fresh_seconds
            self._asking = False
            self._wanted = trio.Event()
            self._answered.set()
            self._answered = trio.Event()

    async def _answer_in_time(self) -> T:
        with trio.move_on_after(self._timeout_seconds):
            try:
                return await self._ask()
            except Exception:  # noqa: BLE001 - whatever is wrong with one question, the gateway lives
                logs.get_logger().exception("a probe failed")
        return self._unknown
