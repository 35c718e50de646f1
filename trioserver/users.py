"""How many different users are connected to the whole fleet, about. No I/O.

Each life has a HyperLogLog in Redis of the users it serves; the number is that of the union over
the lives that have a lease (`fleet`). So who is connected to two workers counts once, and who was
served by a worker that was killed counts no more when its lease ends. The error is 0.8 % for many
users, and next to none for a few hundred. It costs 12 KiB of Redis for a worker, however many
users there are.

A worker that goes on under another life enters everybody anew, which takes seconds. Meanwhile the
users of its earlier lives count, too, as long as Redis keeps them (`LASTS_SECONDS`): so the number
does not drop because a link was cut, but who leaves just then may count for as long.

Nobody can be taken out of a HyperLogLog, so when some have left, another one is made, in portions,
and takes its place: after a few seconds on a small worker, at most once a minute on a large one.
Until then those who have left still count. Who comes meanwhile goes into both.

What is counted is kept for a moment for whoever asks next (`KEPT_MS`): the union of hundreds of
workers takes Redis milliseconds, and each server's gateway asks.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from trioserver.fleet import LEASE_SECONDS, LIVES_KEY, RENEW_SECONDS, Lives, clock_ms
from trioserver.ledger import Command, Script

LASTS_SECONDS: Final = 3 * LEASE_SECONDS
"""How long a life's users are kept after its last sign; they count only as long as it lives."""

PORTION: Final = 500
"""Users in one command."""

ANEW_SECONDS: Final = 60.0
"""A worker makes its own anew no more often than that, or with each renewal of its lease if it has
but a portion."""

EARLIER: Final = 3
"""Earlier lives of a worker that count: more than one if it has lost several within seconds."""

KEPT_MS: Final = 500
"""How old a number may be that is given again."""

_DIGITS: Final = 16
"""More than the number of any life has."""

COUNT_KEY: Final = "ts:{fleet}:users"
"""The latest number."""


USERS: Final = Script.of("users")

LOADS: Final[tuple[Command, ...]] = (USERS.load,)
"""The command that makes the script known to Redis."""


def key(life: str) -> str:
    """Return the name of the key with the users of a life."""
    return f"{COUNT_KEY}:{life}"


class Belongs(Protocol):
    """A connection, as far as it matters here."""

    @property
    def user(self) -> str | None:
        """Whose it is; None if nobody's."""


class Users:
    """What is written down of one worker's users, and when.

    Its commands are to be run in order. Those that were not answered need not be repeated: the
    worker goes on under another life then, and adds everybody anew.

    Args:
        life: The worker's.

    Attributes:
        left: Whether somebody has left since the latest count was begun; set by the owner.
    """

    def __init__(self, life: str) -> None:
        self.left = False
        self._life = life
        self._rest: list[Belongs] | None = None
        """Who is still to be added to the one that is being made; None if none is."""
        self._begun = False
        """Whether that one is there."""
        self._due = 0.0
        """When the next may be made, by Trio's clock."""

    @property
    def is_making(self) -> bool:
        """Whether there is something for `portion`."""
        return self._rest is not None

    def go_on(self, life: str) -> None:
        """Take note of another life: everybody will come once more."""
        self._life, self._rest, self.left = life, None, False

    def renewed(self, present: Iterable[Belongs], size: int, now: float) -> Command:
        """Return the command that goes with a renewal, for the count to live on.

        Args:
            present: Who is there.
            size: How many.
            now: By Trio's clock.
        """
        if self.left and self._rest is None and now >= self._due:
            self.left, self._begun, self._rest = False, False, list(present)
            # As the lease is renewed, so one portion each time, on an average.
            self._due = now + min(ANEW_SECONDS, RENEW_SECONDS * (size // PORTION))
        return self._command((), "")

    def lacking(self) -> None:
        """Take note that the count is not what it should be, as when somebody has removed it."""
        self.left, self._rest = True, None

    def came(self, members: Iterable[Belongs]) -> Command:
        """Return the command that adds those who have come, `PORTION` at most."""
        return self._command([one.user or "" for one in members], "")

    def portion(self) -> Command:
        """Return the command that makes the new count a little more complete."""
        rest = self._rest or []
        some, rest = rest[:PORTION], rest[PORTION:]
        step = "" if self._begun else "begin"
        if not rest:
            step = "end" if self._begun else "both"
        command = self._command({one.user or "": None for one in some}, step)
        self._begun, self._rest = True, rest or None
        return command

    def end(self) -> Command:
        """Return the command that removes all; for the end of a life."""
        return ("DEL", key(self._life), f"{key(self._life)}:anew")

    def _command(self, names: Iterable[str], step: str) -> Command:
        first = key(self._life)
        keys = (first,) if self._rest is None else (first, f"{first}:anew")
        return ("EVALSHA", USERS.sha, len(keys), *keys, int(LASTS_SECONDS * 1000), step, *names)


# ---- The number


def kept() -> Command:
    """Return the command that asks for a number that is fresh enough. Answered with `number`."""
    return ("GET", COUNT_KEY)


def lives() -> tuple[Command, ...]:
    """Return the commands that tell whose users count. Answered with `counts`."""
    return ("TIME",), ("ZRANGE", LIVES_KEY, 0, -1, "WITHSCORES")


def counts(replies: Sequence[object]) -> Command | None:
    """Return the command that counts the users of all who live, answered with a number.

    Args:
        replies: To `lives`, in that order.

    Returns:
        None if nobody lives.
    """
    clock, members = replies
    living = Lives.of(clock_ms(clock), members if isinstance(members, list) else []).living
    counted = living.union(*map(_earlier, living))
    return ("PFCOUNT", *map(key, sorted(counted))) if living else None


def _earlier(life: str) -> list[str]:
    """Return the lives after which a worker has gone on under this one, the latest of them."""
    base, _, times = life.partition("+")
    last = int(times) if times.isdecimal() and len(times) < _DIGITS else 0
    return [f"{base}+{at}" if at else base for at in range(max(0, last - EARLIER), last)]


def keep(number: int) -> Command:
    """Return the command that keeps a number for whoever asks next."""
    return ("SET", COUNT_KEY, number, "PX", KEPT_MS)


def number(reply: object) -> int | None:
    """Return the number that was kept; None if there is none, or it is none."""
    text = reply if isinstance(reply, bytes) else b""
    return int(text) if text.isdigit() else None
