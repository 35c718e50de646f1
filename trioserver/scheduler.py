"""What the clock does in the ledger: deliver later, notice that nobody received, expire.

All of it is decided and done by one script per partition, atomically, on Redis's own clock; here is
only who calls it, and when. So any number of schedulers may run, stop in the middle and start
again: what is due is done once, by whichever comes first.

A round asks all partitions in one round trip. Each says when it has the next thing to do; the
scheduler sleeps until the earliest, but for a second at most, because others put new things there
and do not tell. Where more was due than one call does, the next round follows at once.
"""

from collections.abc import Callable
from typing import Final, NoReturn

import attrs
import trio

from trioserver import ledger, scripting
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Rules
from trioserver.logs import get_logger
from trioserver.redis_link import RedisLink

IDLE_SECONDS: Final = 1.0
"""Longest sleep between rounds, and the pause after one that failed."""

BREATH_SECONDS: Final = 0.01
"""Shortest sleep after a round in which nothing was done."""

ROUND_SECONDS: Final = 5.0
"""For the replies of one round."""

BATCH: Final = 50
"""Things that one call does at most: a few milliseconds in which Redis does nothing else."""

_HOMES: Final = (*ledger.PARTITIONS, ledger.EVERYONE, *ledger.TOPIC_PARTITIONS)


@attrs.frozen(kw_only=True)
class _Round:
    """How a round went."""

    settled: int = 0
    pause_seconds: float = IDLE_SECONDS
    problem: str = ""
    """Why some partition was not served; empty if all were."""


class Scheduler:
    """Does what is due, while `run` runs."""

    def __init__(
        self,
        link: RedisLink,
        rules: Rules,
        *,
        settled: Callable[[int], object] = lambda _count: None,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            link: To Redis.
            rules: The operator's.
            settled: Called with how many things a round has done.
            failed: Called for each round that could not serve every partition.
        """
        self._link = link
        self._commands = [ledger.due(home, rules=rules, limit=BATCH) for home in _HOMES]
        self._settled = settled
        self._failed = failed
        self._said = ""
        self._log = get_logger()

    async def run(self) -> NoReturn:
        """Do what is due, round after round; an absent Redis is waited for.

        Cancellation:
            Safe. A round under way may have had its effect or not; the next one takes it up.
        """
        while True:
            done = await self._round()
            self._settled(done.settled)
            if done.problem:
                self._failed()
            self._say(done.problem)
            await trio.sleep(done.pause_seconds)

    async def _round(self) -> _Round:
        try:
            replies = await scripting.run(self._link, self._commands, timeout=ROUND_SECONDS)
        except RedisUnavailable as error:
            return _Round(problem=str(error))
        counts = [ledger.settled(reply) for reply in replies if not isinstance(reply, RedisRefused)]
        refusals = [str(reply) for reply in replies if isinstance(reply, RedisRefused)]
        settled = sum(count for count, _ in counts)
        waits = [wait / 1000 for _, wait in counts if wait >= 0]
        if any(count >= BATCH for count, _ in counts):
            pause = 0.0
        else:
            pause = min(IDLE_SECONDS, max(BREATH_SECONDS, min(waits, default=IDLE_SECONDS)))
        return _Round(settled=settled, pause_seconds=pause, problem=refusals[0] if refusals else "")

    def _say(self, problem: str) -> None:
        # An outage is one event, however many rounds it takes.
        if problem and not self._said:
            self._log.warning("the schedule is not kept", problem=problem)
        elif self._said and not problem:
            self._log.info("the schedule is kept again")
        self._said = problem
