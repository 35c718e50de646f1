"""Who is connected where, over all workers of all servers: lives, leases, entries. No I/O.

Theory
    A *life* is one worker process from its start to its end: ``<server>.<boot>.<n>``, a name that
    is never given twice. It has a *lease* in Redis, which it renews every `RENEW_SECONDS` and
    which ends `LEASE_SECONDS` after the last time. Each connection of a user is an *entry* under
    that user's key, with the life it belongs to. Who is killed leaves entries behind; they count
    no more because their life is over:

        its lease has ended           killed with its whole machine, paused, or cut off
        somebody has said so          its supervisor has reaped it, or it has ended in order
        its server has booted again   its supervisor was killed, too
        Redis knows of no lease       any of these a while ago, or Redis has lost its memory

    No entry is written before its life has a lease, so whoever has none when the entry has been
    seen before is over. A lease that was lost is never taken up again: others have seen that it
    was over, and may remove the entries. Instead the worker goes on under a new life,
    ``<life>+<how many before>``, and enters everybody anew; then whatever has gone wrong with the
    old entries does not matter. Who ends a life ends these, too.

    Somebody is too many only if those before him are there: their lives have renewed their leases
    since he came (`Doubt`). That takes a moment if they live and a lease if not, and meanwhile he
    stays.

    An entry counts for `ENTRY_SECONDS` after it was last written; those of connections that stay
    are written again every `REFRESH_SECONDS`. So nothing that has been left behind counts for
    ever, whatever happens.

Two scripts write (``lua/enter.lua``, ``lua/lease.lua``), each in one slot of a cluster.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Final, cast

import attrs
import msgspec

from trioserver import ledger
from trioserver.ledger import Command, Script

LEASE_SECONDS: Final = 10.0
RENEW_SECONDS: Final = 3.0

ENTRY_SECONDS: Final = 3000
"""How long an entry counts after it was written."""
REFRESH_SECONDS: Final = 1200
"""After so long it is written again."""

LIVES_KEY: Final = "ts:{fleet}:lives"

MOST_CONNECTIONS: Final = 1000
"""Of one user, that are looked at together, and that presence shows about."""
MOST_PAGES: Final = 50
"""Of entries that presence looks at: most of them may be of the dead."""


# ---- Scripts


ENTER: Final = Script.of("enter")
LEASE: Final = Script.of("lease")

LOADS: Final[tuple[Command, ...]] = tuple(script.load for script in (ENTER, LEASE))
"""The commands that make the scripts known to Redis."""


# ---- Lives


def revived(life: str) -> str:
    """Return the life under which a worker goes on that has lost the lease of ``life``."""
    base, _, times = life.partition("+")
    return f"{base}+{int(times or 0) + 1}"


def _boot(life: str) -> tuple[str, tuple[int, str]]:
    """Return the server of a life, and its boot as something that grows; empty if it has none."""
    server, _, rest = life.partition(".")
    boot, _, _ = rest.partition(".")
    # Hexadecimal, and others may write more digits.
    return server, (len(boot), boot)


class Lives:
    """The lives of the fleet at one moment. Unchanging."""

    def __init__(self, now_ms: int = 0, scores: Mapping[str, float] | None = None) -> None:
        """Take note of what Redis has said.

        Args:
            now_ms: When that was, by Redis' clock, since 1970.
            scores: When each lease ends, by the same clock.
        """
        self.now_ms = now_ms
        self.scores: Final[Mapping[str, float]] = scores or {}
        self._boots: dict[str, tuple[int, str]] = {}
        for life in self.scores:
            server, boot = _boot(life)
            if boot > self._boots.get(server, (0, "")):
                self._boots[server] = boot

    @classmethod
    def of(cls, now_ms: int, members: Sequence[object]) -> "Lives":
        """Return what a reply says: life, score, life, score... What is none is left out."""
        pairs = zip(members[::2], members[1::2], strict=False)
        scores = (
            (_text(life), _number(score))
            for life, score in cast("list[tuple[bytes, bytes]]", pairs)
        )
        return cls(now_ms, {life: score for life, score in scores if life and score is not None})

    @functools.cached_property
    def living(self) -> frozenset[str]:
        """The names of those that are not over."""
        return frozenset(life for life in self.scores if not self.is_over(life))

    def is_over(self, life: str) -> bool:
        """Return whether entries of this life that are older than this count no more."""
        if self.scores.get(life, 0.0) <= self.now_ms:
            return True
        server, boot = _boot(life)
        return boot < self._boots.get(server, (0, ""))

    def renewed_since(self, life: str, then_ms: int) -> bool:
        """Return whether this life has renewed its lease at that moment or later."""
        return self.scores.get(life, 0.0) - LEASE_SECONDS * 1000 >= then_ms


@attrs.frozen(kw_only=True)
class Lease:
    """What came of `renew`."""

    life: str
    """Which has a lease now; empty if none was asked for."""
    lives: Lives

    @property
    def ends_ms(self) -> int:
        """When it ends, by Redis' clock."""
        return int(self.lives.scores.get(self.life, 0))


LOST: Final = 1 << 53
"""A lease that ended so late has been lost: nobody holds it."""


def renew(life: str, *, ends_ms: int = 0, over: Sequence[str] = ()) -> Command:
    """Return the command that renews the lease of ``life``. Answered with `lease`.

    Args:
        life: Whose. Empty for none, only to say who is over.
        ends_ms: When it ends, as it was said the last time; 0 before the first. `LOST` gives the
            life up, and goes on under the next one.
        over: Lives that are known to be over.
    """
    lasts = int(LEASE_SECONDS * 1000)
    anew = revived(life) if life else ""
    return ("EVALSHA", LEASE.sha, 1, LIVES_KEY, lasts, life, anew, ends_ms, *over)


def lease(reply: object) -> Lease:
    """Return what came of `renew`."""
    now_ms, life, members = cast("tuple[int, bytes, list[object]]", reply)
    return Lease(life=life.decode(), lives=Lives.of(now_ms, members))


# ---- Entries


class Card(msgspec.Struct, frozen=True, gc=False):
    """What is written down about a connection. The script reads ``seen``, which must be last."""

    device: str
    client_type: str
    agent: str
    ip: str
    since: int
    """Seconds since 1970, as the next."""
    seen: int
    """When this was written."""


def key(user: str) -> str:
    """Return the name of the key with a user's connections."""
    return ledger.key("conns", user)


encode: Final = msgspec.json.Encoder().encode
"""Makes JSON of a `Card`."""


def enter(
    user: str,
    field: str,
    card: bytes,
    limit: int,
    over: Sequence[str] = (),
    *,
    settled: bool = False,
) -> Command:
    """Return the command that enters a connection. Answered with `answer`.

    Args:
        user: Whose.
        field: ``<life>/<connection id>``.
        card: From `encode`.
        limit: How many the user may have, with this one; 0 is no limit. Who is there already is
            never too many.
        over: Lives whose entries do not count.
        settled: Whether all others are known to live. Then the oldest connection of the same
            device makes way: most likely it is the same client, whose earlier connection nobody
            has found dead yet.
    """
    last = b"1" if settled else b"0"
    return ("EVALSHA", ENTER.sha, 1, key(user), field, card, limit, ENTRY_SECONDS, last, *over)


class InTheWay(msgspec.Struct, frozen=True, kw_only=True):
    """What `enter` was answered by those who fill the limit."""

    lives: tuple[str, ...] = ()
    """Of those who are not of the newcomer's life."""
    own: tuple[str, ...] = ()
    """Connection ids of those who are."""


def answer(reply: object) -> InTheWay | str | None:
    """Return what came of `enter`.

    Returns:
        None if the connection was entered; the field of the one that made way for it; or who is
        there instead.
    """
    if isinstance(reply, bytes):
        return _text(reply)
    if not isinstance(reply, list):
        return None
    names = [_text(name).partition("/") for name in reply]
    return InTheWay(
        lives=tuple(life for life, slash, _ in names if not slash),
        own=tuple(connection_id for _, slash, connection_id in names if slash),
    )


@attrs.frozen(kw_only=True)
class Doubt:
    """Why somebody who seems to be too many has not been ended yet."""

    rivals: tuple[str, ...] = ()
    """Lives of others who are in his way."""
    since_ms: int = 0
    """When it was first looked who lives, after he had come; 0 if it was not yet."""
    over: tuple[str, ...] = ()
    """Of the rivals, those who turned out to be dead."""
    settled: bool = False
    """Whether all the others have renewed their leases since."""

    def after(self, lives: Lives) -> "Doubt":
        """Return what it has become when it was looked who lives, later than it arose."""
        # Redis' clock may have been set back: nobody shall wait for the old time.
        since = min(self.since_ms or lives.now_ms, lives.now_ms)
        over = tuple(life for life in self.rivals if lives.is_over(life))
        waits = any(
            life not in over and not lives.renewed_since(life, since) for life in self.rivals
        )
        return Doubt(rivals=self.rivals, since_ms=since, over=over, settled=not waits)

    def again(self, rivals: Sequence[str]) -> "Doubt":
        """Return what it is now that others are in the way."""
        return Doubt(rivals=tuple(rivals), since_ms=self.since_ms)


def leave(user: str, field: str) -> Command:
    """Return the command that removes a connection."""
    return ("HDEL", key(user), field)


# ---- Presence


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that is there."""

    connection_id: str
    life: str
    device: str
    client_type: str
    agent: str
    ip: str
    since: int
    """Seconds since 1970."""


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """Where a user is connected."""

    connections: list[Connected]
    """The oldest first."""
    more: bool = False
    """Whether there are others: a user without a limit can have very many."""

    def joined(self, later: "Whereabouts") -> "Whereabouts":
        """Return this with what a later page shows."""
        # A table that is being resized may show an entry twice.
        found = {one.connection_id: one for one in (*self.connections, *later.connections)}
        connections = sorted(found.values(), key=lambda one: (one.since, one.connection_id))
        return Whereabouts(connections=connections, more=later.more)


def whereabouts_reads(user: str) -> tuple[Command, ...]:
    """Return the commands that tell where a user is. Answered with `whereabouts`."""
    return (
        ("TIME",),
        ("ZRANGE", LIVES_KEY, 0, -1, "WITHSCORES"),
        ("HSCAN", key(user), 0, "COUNT", MOST_CONNECTIONS),
    )


def whereabouts_more(user: str, page: object) -> tuple[Command, ...]:
    """Return the command for the page behind this one; nothing if it was the last."""
    cursor = _cursor(page)
    return (("HSCAN", key(user), cursor, "COUNT", MOST_CONNECTIONS),) if cursor != b"0" else ()


def whereabouts(replies: Sequence[object]) -> Whereabouts:
    """Return where a user is, as far as one page shows it.

    Args:
        replies: To `whereabouts_reads`, in that order; or the first two, and a later page. What
            was refused says nothing.
    """
    clock, members, page = replies
    now_ms = clock_ms(clock)
    lives = Lives.of(now_ms, members if isinstance(members, list) else [])
    entries = page[1] if isinstance(page, list) else []
    connections = [
        one
        for field, card in zip(entries[::2], entries[1::2], strict=False)
        if (one := connected(field, card, lives, now_ms // 1000 - ENTRY_SECONDS)) is not None
    ]
    return Whereabouts(connections=[]).joined(
        Whereabouts(connections=connections, more=_cursor(page) != b"0")
    )


def clock_ms(reply: object) -> int:
    """Return the milliseconds since 1970 of a reply to ``TIME``; 0 if it was refused."""
    seconds, micro = (_whole(part) for part in reply) if isinstance(reply, list) else (0, 0)
    return seconds * 1000 + micro // 1000


def _cursor(page: object) -> bytes:
    return cast("bytes", page[0]) if isinstance(page, list) else b"0"


def connected(field: bytes, card: bytes, lives: Lives, oldest: int) -> Connected | None:
    """Return the connection that an entry stands for; None if it does not count.

    Args:
        field: Of the hash.
        card: Its value.
        lives: Who lives.
        oldest: Entries seen before, in seconds since 1970, do not count.
    """
    life, _, connection_id = _text(field).partition("/")
    try:
        said = _decode(card)
    except msgspec.DecodeError:
        return None
    if not life or not connection_id or said.seen < oldest or lives.is_over(life):
        return None
    return Connected(
        connection_id=connection_id,
        life=life,
        device=said.device,
        client_type=said.client_type,
        agent=said.agent,
        ip=said.ip,
        since=said.since,
    )


_decode: Final = msgspec.json.Decoder(Card).decode


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _number(value: object) -> float | None:
    try:
        return float(cast("bytes", value))
    except (TypeError, ValueError):
        return None


def _whole(value: object) -> int:
    return int(_number(value) or 0)
