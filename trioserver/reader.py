"""Reads the streams of those who have to catch up: many at a time, one command each.

Whoever comes, or has missed something, says so (`Reader.want`), and is asked for the command when
its turn comes, so that it is never out of date. What came at once goes as one pipeline, and those
who ask the same (the stream of everyone, from the same point) share one command.

A read is repeated until it is answered: a connection that does not know where it stands can do
nothing else, and reading changes nothing that a second read would spoil. While Redis is away the
pauses grow, for all of them together.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

import trio

from trioserver import ledger, scripting
from trioserver.errors import RedisRefused, RedisUnavailable
from trioserver.ledger import Command
from trioserver.pauses import Pauses
from trioserver.redis_link import RedisLink, Reply
from trioserver.shared import Waiting

BATCH: Final = 200
"""Reads in one pipeline: a few milliseconds of Redis, if nobody has missed much."""

LANES: Final = 3
"""Pipelines under way: one that brings much must not hold up those who have missed nothing."""

GATHER_SECONDS: Final = 0.002
"""How long questions are gathered when many come: reaching Redis costs 80 us, however many go."""

BUSY_SECONDS: Final = 0.02
"""Questions that come so soon after others are many."""

PAGES_PER_TURN: Final = 32
"""Answers between two checkpoints; each may be a page of frames to be sent."""

PAUSE_FIRST: Final = 0.1
PAUSE_CAP: Final = 2.0

_Who = tuple[Waiting, bool]
"""Who waits, and whether for everyone's stream."""


class Reader:
    """One worker's reads.

    Args:
        log_bug: Called with what was being done, and the bug.
        log_trouble: Called with what Redis said; limits its own rate.
    """

    def __init__(
        self, log_bug: Callable[[str, BaseException], None], log_trouble: Callable[[str], None]
    ) -> None:
        self._log_bug = log_bug
        self._log_trouble = log_trouble
        self._wanted: deque[_Who] = deque()
        """Each waiter at most once for each stream, which is the waiter's business."""
        self._refused: list[_Who] = []
        """Those whom Redis has refused; they are asked for again after a while, apart, so that
        one user with broken keys costs nobody else."""
        self._idle = trio.lowlevel.ParkingLot()
        """Lanes without work."""
        self._gathering = False
        """A lane is about to take what is wanted."""
        self._taken_at = -BUSY_SECONDS
        self._portion = BATCH
        """Reads in the next pipeline: fewer while they do not come in time."""
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._pauses = Pauses(PAUSE_FIRST, PAUSE_CAP, self._rng)

    def want(self, waiter: Waiting, *, everyone: bool) -> None:
        """Ask for a page of the user's own stream or of everyone's, as soon as possible."""
        self._wanted.append((waiter, everyone))
        self._rouse()

    async def run(self, link: RedisLink) -> NoReturn:
        """Read until cancelled; what is wanted and unanswered then is kept for another `run`."""
        async with trio.open_nursery() as nursery:
            for _ in range(LANES):
                nursery.start_soon(self._lane, link)
            nursery.start_soon(self._ask_refused_again)
        raise AssertionError  # pragma: no cover - lanes do not return

    async def _lane(self, link: RedisLink) -> NoReturn:
        while True:
            await self._gather()
            asked = self._take()
            if self._wanted:
                self._rouse()
            try:
                answered = await self._ask(link, asked)
            finally:
                # What has not been handed out; also if we are being stopped.
                self._put_back(asked)
            if answered:
                self._pauses.reset()
                self._portion = min(BATCH, self._portion * 2)
            else:
                self._portion = max(1, self._portion // 2)
                await trio.sleep(self._pauses.take())

    async def _gather(self) -> None:
        """Wait until something is wanted, and for more of it if there is much."""
        while not self._wanted or self._gathering:
            await self._idle.park()
        if trio.current_time() - self._taken_at < BUSY_SECONDS:
            self._gathering = True
            try:
                await trio.sleep(GATHER_SECONDS)
            finally:
                self._gathering = False
        self._taken_at = trio.current_time()

    def _rouse(self) -> None:
        if not self._gathering:
            self._idle.unpark()

    async def _ask_refused_again(self) -> NoReturn:
        while True:
            await trio.sleep(PAUSE_CAP * self._rng.uniform(0.5, 1.0))
            refused, self._refused = self._refused, []
            self._wanted.extend(refused)
            self._rouse()

    def _take(self) -> dict[Command, list[_Who]]:
        """Return who is next, by what they ask."""
        asked: dict[Command, list[_Who]] = {}
        wanted = self._wanted
        for _ in range(min(self._portion, len(wanted))):
            waiter, everyone = wanted.popleft()
            try:
                command = waiter.question(everyone=everyone)
            except Exception as bug:  # noqa: BLE001 - the others' questions are not to blame
                self._log_bug("asking the ledger", bug)
                continue
            if command is not None:
                asked.setdefault(command, []).append((waiter, everyone))
        return asked

    async def _ask(self, link: RedisLink, asked: dict[Command, list[_Who]]) -> bool:
        """Ask, and hand out what comes; return whether Redis answers. Empties ``asked``."""
        try:
            replies = await scripting.run(link, asked)
        except RedisUnavailable as problem:
            self._log_trouble(str(problem))
            return False
        refusal = ""
        handed = 0
        for command, reply in zip(list(asked), replies, strict=True):
            waiters = asked.pop(command)
            if isinstance(reply, RedisRefused):
                refusal = str(reply)
                self._refused.extend(waiters)
                continue
            self._hand_out(reply, waiters)
            handed += len(waiters)
            if handed >= PAGES_PER_TURN:
                handed = 0
                await trio.lowlevel.checkpoint()
        if refusal:
            self._log_trouble(refusal)
        return True

    def _hand_out(self, reply: Reply, waiters: Sequence[_Who]) -> None:
        try:
            page = ledger.page(reply)
        except Exception as bug:  # noqa: BLE001 - the others' pages are not to blame
            self._log_bug("reading the ledger", bug)
            self._refused.extend(waiters)
            return
        for waiter, everyone in waiters:
            try:
                waiter.answered(page, everyone=everyone)
            except Exception as bug:  # noqa: BLE001 - nor are those who get the same page
                self._log_bug("reading the ledger", bug)

    def _put_back(self, asked: Mapping[Command, Sequence[_Who]]) -> None:
        for waiters in asked.values():
            self._wanted.extend(waiters)
            self._rouse()
