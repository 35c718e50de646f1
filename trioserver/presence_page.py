"""Reads who is subscribed to a topic, a page at a time."""

from collections.abc import Awaitable, Sequence
from typing import Final, cast

from trioserver import presence, scripting
from trioserver.errors import RedisRefused
from trioserver.ledger import Command
from trioserver.messages import Presence
from trioserver.presence import BEGINNING, PAGE, Attending, Counts
from trioserver.redis_link import RedisLink, Reply

MORE: Final = 500
"""Entries that are read together where most are of the dead."""

MOST_READS: Final = 20
"""For one page. It may be short then, but it is not the last."""

MOST_COUNTS: Final = 50
"""Commands that count users; beyond 100,000 entries their number is an upper bound while there are
entries of the dead."""


async def members(link: RedisLink, topic: str, after: str | None = None) -> Presence:
    """Return a page of who is subscribed to a topic, in the whole fleet.

    Args:
        link: To Redis.
        topic: Which.
        after: ``next`` of the page before; None for the first. Garbage is the first page.

    Raises:
        RedisUnavailable: No reply.
        RedisRefused: Redis does not let us look.
    """
    page, _ = await look(link, topic, after)
    return page


async def look(link: RedisLink, topic: str, after: str | None) -> tuple[Presence, bool]:
    """Return a page, and whether lives that are over have left something; see `members`."""
    start = presence.start_after(after)
    whole = start == BEGINNING
    counts, shown, cursor = await _read(link, topic, start)
    here = [one.shown for one in shown]
    users = max(counts.users, len({one.user for one in here}))
    if counts.over:
        whole = whole and cursor is None
        users = len({one.user for one in here}) if whole else await _count(link, topic, counts)
    page = Presence(
        topic=topic,
        connections=max(counts.connections, len(here)),
        users=users,
        members=here,
        next=cursor,
    )
    return page, bool(counts.over or counts.earlier)


async def _read(
    link: RedisLink, topic: str, start: str
) -> tuple[Counts, list[Attending], str | None]:
    """Return how many there are, who is next, and the cursor if there are more behind."""
    begin: str | bytes = start
    shown: list[Attending] = []
    counts: Counts | None = None
    most, cursor = PAGE + 1, None
    for _ in range(MOST_READS):
        reads = [presence.counts_read(topic), presence.entries_read(topic, begin, most)]
        # Who lives comes last: a life that has begun meanwhile must not seem to be over.
        how_many, entries, *alive = await ask(link, [*reads, *presence.lives_read()])
        lives = presence.lives(*alive)
        counts = counts or presence.counts(how_many, lives)
        texts = cast("list[bytes]", entries) if isinstance(entries, list) else []
        found = [one for one in map(presence.attending, texts) if one is not None]
        there = presence.workers(lives)
        shown += [one for one in found if presence.worker(one.life) in there]
        if len(shown) > PAGE:
            return counts, shown[:PAGE], shown[PAGE - 1].cursor
        cursor = found[-1].cursor if found else cursor
        if len(texts) < most:
            return counts, shown, None
        begin, most = b"(" + texts[-1], MORE
    return counts or Counts(), shown, cursor


async def _count(link: RedisLink, topic: str, counts: Counts) -> int:
    """Return how many different users are there, not counting those of the dead."""
    users, start, last = 0, BEGINNING, ""
    for _ in range(MOST_COUNTS):
        (reply,) = await run(link, [presence.count(topic, start, last, counts.over)])
        if isinstance(reply, RedisRefused):
            raise reply
        more, start, last = presence.counted(reply)
        users += more
        if not start:
            return users
    return min(counts.users, counts.connections)


def run(link: RedisLink, commands: list[Command]) -> Awaitable[list[Reply | RedisRefused]]:
    """Run commands that call the scripts; see `scripting.run`."""
    return scripting.run(link, commands, loads=lambda: presence.LOADS)


async def ask(link: RedisLink, commands: Sequence[Command]) -> list[Reply | RedisRefused]:
    """Run commands that read.

    Raises:
        RedisUnavailable: Not all replies came.
        RedisRefused: Redis does not let us look. A key of the wrong type is one that is not there.
    """
    replies = await link.pipeline(commands)
    for reply in replies:
        if isinstance(reply, RedisRefused) and not str(reply).startswith("WRONGTYPE"):
            raise reply
    return replies
