"""Keeps a worker's table of revocations right, and ends the connections that they are about.

Theory
    Whoever revokes publishes a hint, so a worker knows within milliseconds. A hint may be lost, so
    the newest number in Redis is asked for every second, too. What lies between the number that
    this worker has reached and the newest is read page by page.

        the number is lower     Redis has lost something: everything is read anew. What is known
                                stays known until it lapses, and is not written back
        Redis did not answer    what is known stays applied. As soon as it answers, first what is
                                new is read, then everything once more: nobody knows which Redis
                                that was
        every ten minutes       everything is read once more, whatever else was overlooked
        a look has failed       `fresh` says so: the worker is not ready, and goes on
        no look so far          the worker waits a little with its door closed (`first_look`)

    The newest page is read first, and after each page with something new the connections are walked
    over: who was revoked just now is gone before the rest is read.
"""

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, NoReturn, Protocol

import trio

from trioserver import revocation
from trioserver.auth import Claims
from trioserver.errors import CloseReason, RedisError, RedisRefused
from trioserver.redis_link import RedisLink
from trioserver.revocation import SEQ_KEY, Command, Outcome, Revoked

INTERVAL_SECONDS: Final = 1.0
"""Between two looks without a hint."""

RETRY_SECONDS: Final = 0.3
"""After Redis did not answer."""

GATHER_SECONDS: Final = 0.05
"""Least time between two looks, however many hints come: each may cost a walk."""

WHOLE_SECONDS: Final = 600.0
"""Between two readings of everything."""

PAGE: Final = 500
"""Revocations in one command: a millisecond here, less in Redis."""

WALK_PER_TURN: Final = 256
"""Connections between two checkpoints."""


class Holder(Protocol):
    """Who is here because of a token: a connection."""

    @property
    def claims(self) -> Claims | None:
        """Of the token; None while none has come."""

    def end(self, reason: CloseReason) -> None:
        """End it; any number of times."""


async def end_covered(
    holders: Iterable[Holder], revoked: Revoked, log_bug: Callable[[str, BaseException], None]
) -> int:
    """End those whose token is revoked; return how many.

    Who comes during the walk is not seen: ask `Revoked.covers` about every token that is accepted.

    Args:
        holders: Those there are; copied first, as they come and go meanwhile.
        revoked: What is known.
        log_bug: Called with what was being done, and the bug; the others are ended all the same.

    Cancellation:
        Some may not have been looked at.
    """
    ended = 0
    for number, holder in enumerate(tuple(holders)):
        if number % WALK_PER_TURN == 0:
            await trio.lowlevel.checkpoint()
        claims = holder.claims
        if claims is None or not revoked.covers(claims):
            continue
        try:
            holder.end(CloseReason.UNAUTHORIZED)
        except Exception as bug:  # noqa: BLE001 - the others are not to blame
            log_bug("ending a revoked connection", bug)
        ended += 1
    return ended


async def revoke(link: RedisLink, command: Command) -> Outcome:
    """Run a command of `trioserver.revocation.revoke`.

    Raises:
        RevocationRefused: This cannot be done as asked, or there is no room.
        RedisRefused: Redis refused for another reason; nothing has happened.
        RedisUnavailable: Whether it is revoked is unknown; asking again is harmless.
    """
    try:
        return Outcome.of(await link.execute(*command))
    except RedisRefused as refused:
        raise revocation.refusal(str(refused)) or refused from None


class RevocationWatch:
    """Keeps one worker's `Revoked` right.

    Wire it up: follow `channel`, and call `hint` for each message on it and whenever the
    subscription has come back.

    Args:
        revoked: What it keeps right.
        on_new: Awaited whenever something new is known: the walk (`end_covered`).
        log_trouble: Called with what Redis said; limits its own rate.
        prefix: CHANNEL_PREFIX.
        interval: Seconds between two looks without a hint.
        whole: Seconds between two readings of everything.
        on_change: Called whenever `fresh` has flipped. Must not raise.

    Attributes:
        channel: Where hints come.
        fresh: Whether the latest look has reached the end; False before the first. While it is
            not, who was revoked may get in: the worker is not fit to be called ready.
    """

    def __init__(
        self,
        revoked: Revoked,
        on_new: Callable[[], Awaitable[object]],
        log_trouble: Callable[[str], None],
        *,
        prefix: str = "",
        interval: float = INTERVAL_SECONDS,
        whole: float = WHOLE_SECONDS,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.channel = (prefix + revocation.CHANNEL).encode()
        self.fresh = False
        self._revoked = revoked
        self._on_new = on_new
        self._log_trouble = log_trouble
        self._interval = interval
        self._whole = whole
        self._on_change = on_change
        self._begun = trio.Event()
        """Set when the first look has reached the end."""
        self._whole_at = 0.0
        """When everything is to be read."""
        self._reached = 0
        """The number up to which everything is known."""
        self._hinted = trio.Event()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing

    def hint(self) -> None:
        """Look soon: something may be new."""
        self._hinted.set()

    async def first_look(self) -> None:
        """Wait until all that Redis has is known, for the first time; perhaps for ever.

        Cancellation:
            Safe.
        """
        await self._begun.wait()

    async def run(self, link: RedisLink) -> NoReturn:
        """Keep the table right until cancelled; it is kept for another `run`."""
        self._whole_at = trio.current_time() + self._whole if self._reached else 0.0
        while True:
            self._hinted = trio.Event()
            try:
                await self._look(link)
                self._begun.set()
                self._turn(fresh=True)
                pause = self._interval
            except RedisError as problem:
                # The next one to answer may be another Redis, with another history.
                self._whole_at = 0.0
                self._turn(fresh=False)
                self._log_trouble(str(problem))
                pause = RETRY_SECONDS
            self._revoked.purge()
            await trio.sleep(GATHER_SECONDS)
            with trio.move_on_after(pause * self._rng.uniform(0.8, 1.0)):
                await self._hinted.wait()

    def _turn(self, *, fresh: bool) -> None:
        if fresh != self.fresh:
            self.fresh = fresh
            self._on_change()

    async def _look(self, link: RedisLink) -> None:
        """Read what is new; everything, if that is due.

        Raises:
            RedisError: Redis did not answer, or has garbage in these keys.
        """
        newest = revocation.seq_in(await link.execute("GET", SEQ_KEY))
        reached = self._reached
        whole = newest < reached or trio.current_time() >= self._whole_at
        if newest > reached:
            count, _ = await self._learn(link, revocation.newest_after(reached, newest, PAGE))
            if count == PAGE:
                await self._read(link, reached, newest)
        if whole and reached:
            await self._read(link, 0, newest)
        if whole:
            self._whole_at = trio.current_time() + self._whole
        self._reached = newest

    async def _read(self, link: RedisLink, after: int, upto: int) -> None:
        """Read what lies between two numbers."""
        while after < upto:
            count, last = await self._learn(link, revocation.page_after(after, upto, PAGE))
            if not count or last <= after:
                return  # what stands there then was not written by the script
            if after == self._reached:
                self._reached = last  # so a Redis that stumbles does not cost what has been read
            after = last

    async def _learn(self, link: RedisLink, question: Command) -> tuple[int, int]:
        """Learn a page, and say so; return how many names it has, and the number of the last."""
        names, last = revocation.names_in(await link.execute(*question))
        if names:
            found = await link.execute(*revocation.entries_of(names))
            if self._revoked.learn(revocation.revocations_in(names, found)):
                await self._on_new()
        return len(names), last
