"""Whether Redis answers: a ping every second, for whoever asks.

Asking here costs nobody a ping and never waits: with Redis away, health and metrics are answered as
fast as ever. What they say is a second old, two if Redis does not answer.
"""

from typing import Final, NoReturn

import attrs
import trio

from trioserver.errors import RedisError
from trioserver.log_redaction import redact
from trioserver.redis_link import RedisLink

PING_SECONDS: Final = 1.0
"""Between pings, and for the answer to one."""

_MAX_ERROR: Final = 200


@attrs.frozen(kw_only=True)
class RedisPing:
    """How one ping of Redis went."""

    seconds: float | None
    """Until it was answered; None if it was not."""

    error: str = ""
    """Why it was not, without credentials."""


class RedisWatch:
    """Pings, and remembers how the last ping went."""

    def __init__(self) -> None:
        self.latest = RedisPing(seconds=None, error="not asked yet")
        """How the last ping went."""

    async def run(self, link: RedisLink) -> NoReturn:
        """Ping until cancelled. There is never more than one ping under way."""
        while True:
            due = trio.current_time() + PING_SECONDS
            self.latest = await self._ping(link)
            await trio.sleep_until(due)

    async def _ping(self, link: RedisLink) -> RedisPing:
        try:
            seconds = await link.ping(timeout=PING_SECONDS)
        except RedisError as error:
            return RedisPing(seconds=None, error=redact(str(error))[:_MAX_ERROR])
        return RedisPing(seconds=seconds)
