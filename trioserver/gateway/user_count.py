"""How many users the fleet has: asked every second, for whoever asks.

As with `redis_watch`, asking here costs nobody a question to Redis and never waits. With what is
kept in Redis for all gateways (`trioserver.users`) the number is two seconds old at most; after a
question without an answer there is none.
"""

from typing import Final, NoReturn

import trio

from trioserver import registry
from trioserver.errors import RedisError
from trioserver.redis_link import RedisLink

ASK_SECONDS: Final = 1.0
"""Between questions."""

ANSWER_SECONDS: Final = 0.5
"""For the answer to one."""


class UserCount:
    """Asks, and remembers the last answer."""

    def __init__(self) -> None:
        self.latest: int | None = None
        """The number; None if Redis did not say, or knows of no worker."""

    async def run(self, link: RedisLink) -> NoReturn:
        """Ask until cancelled. There is never more than one question under way."""
        while True:
            due = trio.current_time() + ASK_SECONDS
            self.latest = await self._ask(link)
            await trio.sleep_until(due)

    async def _ask(self, link: RedisLink) -> int | None:
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                return await registry.unique_users(link)
            except RedisError:
                return None  # The ping says why.
        return None
