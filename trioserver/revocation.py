"""Tokens that are good no more although they are signed and have not expired. Pure.

A *revocation* is about one token, by its ``jti``; or about all tokens of a user, or of everybody,
that were issued in a certain second or earlier. It lapses at its own moment, ``until``: when nobody
can have a token left that it is about. Moments are whole seconds, as ``iat`` is in most tokens:
what was issued in the second of the revocation counts as revoked, for nobody can know which came
first. A token without ``iat`` is older than everything.

That second is one of the clock that ``iat`` comes from. Whoever means *now* has another clock, so
as much is added as clocks that are kept in step differ (`Ago`): what has been issued so far is
revoked, at the price that a token issued within that time is revoked, too.

Revocations are only ever added and joined (the later of both moments counts), never taken back, so
it does not matter in which order, or how often, a worker hears of them.

Redis has them (see ``lua/revoke.lua`` for the keys): `revoke` makes the command, `Outcome.of` reads
the reply. Each worker has a table of its own, `Revoked`, kept right by
`trioserver.revocation_watch`.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, TypeAlias, cast

import attrs

from trioserver.auth import MAX_JTI, Claims, check_user
from trioserver.errors import AuthError, TrioserverError

Command: TypeAlias = tuple[str | bytes | int, ...]

SCRIPT: Final = (Path(__file__).parent / "lua" / "revoke.lua").read_bytes()
"""Revokes. It is sent whole each time: that happens rarely, and Redis forgets scripts."""

SEQ_KEY: Final = "ts:{revoked}:seq"
ENTRIES_KEY: Final = "ts:{revoked}:entries"
ORDER_KEY: Final = "ts:{revoked}:order"
ENDS_KEY: Final = "ts:{revoked}:ends"

CHANNEL: Final = "revoked"
"""Where workers hear of it, behind CHANNEL_PREFIX."""

MAX_ENTRIES: Final = 100_000
"""In Redis; what comes beyond is refused."""

MAX_KNOWN: Final = 2 * MAX_ENTRIES
"""In a worker: those in Redis, and as many that a Redis has lost. Some 35 MB."""

LIFETIME_SECONDS: Final = 30 * 86_400
"""Until a revocation lapses, if nobody says when: nobody knows the ``exp`` of a token that he does
not have."""

LEEWAY_SECONDS: Final = 2
"""By how much the clock of an issuer may be ahead, if nobody says. Not JWT_LEEWAY: who has been
logged out everywhere wants to log in again before half a minute is over."""

FULL: Final = "FULL "
"""Begins Redis's error when there is no room for another one."""
BAD_REQUEST: Final = "BADREQUEST "
"""Begins its error for what cannot be done as asked; the rest is for a person."""

EVERYONE: Final = "all"
"""Name of the revocation that is about everybody; others are ``t:<jti>`` and ``u:<user>``."""

_DISTANT: Final = 100_000_000_000
"""Seconds since 1970 beyond which no sane moment lies."""

_NEVER: Final = (0, 0)
"""Of whom nothing is revoked."""

_MAX_NAME: Final = MAX_JTI + 2

_LARGEST_SEQ: Final = 1 << 53


class RevocationRefused(TrioserverError):  # noqa: N818 - a verdict
    """This cannot be revoked as asked; nothing has happened. The text is for a person."""


@attrs.frozen
class Revocation:
    """One revocation. Moments are whole seconds since 1970."""

    name: str
    """``t:<jti>``, ``u:<user>`` or `EVERYONE`."""
    before: int
    """Tokens issued in this second or earlier are revoked; means nothing for a jti."""
    until: int
    """When it lapses."""

    @property
    def token(self) -> str | None:
        """The jti that it is about, if it is about one token."""
        return self.name[2:] if self.name.startswith("t:") else None

    @property
    def user(self) -> str | None:
        """The user whom it is about, if it is about one."""
        return self.name[2:] if self.name.startswith("u:") else None


# ---- To Redis and back


@attrs.frozen
class Ago:
    """A moment by the clock of Redis, which is not the one that the tokens have their iat from."""

    seconds: float = 0.0
    """Before now."""
    leeway: float = LEEWAY_SECONDS
    """By how much the clock behind ``iat`` may be ahead. It is added."""


@attrs.frozen
class Outcome:
    """What a revocation has become."""

    revocation: Revocation
    """As it stands now, joined with what was there."""
    entries: int
    """Revocations that there are."""
    new: bool
    """False if all of it was known already."""

    @classmethod
    def of(cls, reply: object) -> "Outcome":
        """Return what the reply to `revoke` says."""
        name, before, until, entries, new = cast("tuple[bytes, int, int, int, int]", reply)
        return cls(Revocation(name.decode(), before, until), entries, new == 1)


def revoke(
    *,
    token: str | None = None,
    user: str | None = None,
    everyone: bool = False,
    before: float | Ago | None = None,
    until: float | None = None,
    prefix: str = "",
    max_entries: int = MAX_ENTRIES,
) -> Command:
    """Return the command that revokes one token, those of a user, or everybody's.

    It may be repeated when its outcome is unknown. Redis answers with what `Outcome.of` reads or,
    without effect, with an error, which `refusal` explains.

    Args:
        token: A jti...
        user: ... or a user's id...
        everyone: ... or everybody: one of these.
        before: What was issued in this second or earlier, as its ``iat`` says, or so long ago;
            now, if not said. Does not go with ``token``.
        until: When it lapses; in `LIFETIME_SECONDS`, if not said. Seconds since 1970, both.
        prefix: CHANNEL_PREFIX of the server.
        max_entries: Beyond so many Redis refuses.

    Raises:
        RevocationRefused: That cannot be.
    """
    if (token is not None) + (user is not None) + everyone != 1:
        raise RevocationRefused("say one of token, user and everyone")
    if token is not None and before is not None:
        raise RevocationRefused("a token is revoked whenever it was issued")
    whom = ("all", "1")
    if token is not None:
        whom = ("token", _checked_token(token))
    elif user is not None:
        whom = ("user", _checked_user(user))
    given: dict[str, float | None] = {"until": until}
    if isinstance(before, Ago):
        # Both rounded towards the later moment: rather one token more than one too few.
        given |= {"ago": before.seconds, "leeway": -(-before.leeway // 1)}
    else:
        given["before"] = before
    moments: list[str | int] = []
    for name, moment in given.items():
        if moment is not None:
            moments += (name, _whole(name, moment))
    channel = (prefix + CHANNEL).encode()
    return "EVAL", SCRIPT, 1, SEQ_KEY, *whom, *moments, "channel", channel, "max", max_entries


def refusal(error: str) -> RevocationRefused | None:
    """Return what Redis's error to `revoke` means to who asked; None if it is nothing of his."""
    if error.startswith(FULL):
        return RevocationRefused(
            f"no room: {error.removeprefix(FULL)}; revoke by user, or for all, instead of token by"
            " token"
        )
    if error.startswith(BAD_REQUEST):
        return RevocationRefused(error.removeprefix(BAD_REQUEST))
    return None


def _checked_token(token: str) -> str:
    if not token or not token.isprintable() or len(token.encode()) > MAX_JTI:
        raise RevocationRefused(f"a jti has 1 to {MAX_JTI} bytes of printable text")
    return token


def _checked_user(user: str) -> str:
    try:
        return check_user(user)
    except AuthError:
        raise RevocationRefused("a user has 1 to 128 bytes of printable text") from None


def _whole(name: str, moment: float) -> int:
    if not 0 <= moment < _DISTANT:
        raise RevocationRefused(f"{name} is beyond all reason")
    return math.floor(moment)


# ---- Reading what there is


def page_after(seq: int, upto: int, count: int) -> Command:
    """Return the command that reads the names behind the number ``seq``; see `names_in`."""
    return (
        *("ZRANGEBYSCORE", ORDER_KEY, f"({seq}", upto),
        *("WITHSCORES", "LIMIT", 0, count),
    )


def newest_after(seq: int, upto: int, count: int) -> Command:
    """Return the command that reads the newest of these names; see `names_in`."""
    return (
        *("ZREVRANGEBYSCORE", ORDER_KEY, upto, f"({seq}"),
        *("WITHSCORES", "LIMIT", 0, count),
    )


def names_in(reply: object) -> tuple[list[bytes], int]:
    """Return the names on a page, and the number of the last one; 0 if there is none."""
    listed = cast("list[bytes]", reply)
    return listed[::2], seq_in(listed[-1]) if listed else 0


def seq_in(reply: object) -> int:
    """Return the number that stands in a reply: 0 if none does, or garbage."""
    try:
        seq = int(float(cast("bytes", reply))) if reply is not None else 0
    except (ValueError, OverflowError):
        return 0
    return seq if 0 <= seq < _LARGEST_SEQ else 0


def entries_of(names: Sequence[bytes]) -> Command:
    """Return the command that reads the revocations with these names; see `revocations_in`."""
    return ("HMGET", ENTRIES_KEY, *names)


_moments = re.compile(rb"([0-9]{1,11}) ([0-9]{1,11})").fullmatch


def revocations_in(names: Iterable[bytes], reply: object) -> Iterator[Revocation]:
    """Return the revocations that `entries_of` has found.

    Left out is what has lapsed meanwhile, and what is no revocation: whoever can write these keys
    by other means than the script does not end the reading.
    """
    for name, value in zip(names, cast("list[bytes | None]", reply), strict=True):
        match = _moments(value) if value is not None else None
        if match is None or not (name == b"all" or name[:2] in {b"t:", b"u:"}):
            continue
        if len(name) > _MAX_NAME:
            continue
        try:
            yield Revocation(name.decode(), int(match[1]), int(match[2]))
        except UnicodeDecodeError:
            continue


# ---- What a worker knows


class Revoked:
    """The revocations that one worker knows.

    Bounded: beyond ``bound`` the half that has been known longest is forgotten, and counted.

    Args:
        wall: The time, in seconds since 1970; asked only about tokens that seem to be revoked.
        bound: Most revocations.

    Attributes:
        forgotten: How many the bound has cost.
    """

    __slots__ = (
        "_bound",
        "_everyone",
        "_none",
        "_tokens",
        "_unseen",
        "_users",
        "_wall",
        "forgotten",
    )

    def __init__(self, wall: Callable[[], float] = time.time, *, bound: int = MAX_KNOWN) -> None:
        self.forgotten = 0
        self._wall = wall
        self._bound = bound
        self._none = True
        """Nothing is known, as on most days: whoever asks is told at once."""
        self._tokens: dict[str, int] = {}
        """jti to when its revocation lapses."""
        self._users: dict[str, tuple[int, int]] = {}
        """User to the first second that is good again, and when the revocation lapses."""
        self._everyone = _NEVER
        self._unseen: list[str] = []
        """Names that `purge` has still to look at."""

    def __len__(self) -> int:
        return len(self._tokens) + len(self._users) + (self._everyone[1] > 0)

    def covers(self, claims: Claims) -> bool:
        """Return whether a token is revoked, as far as this worker knows."""
        if self._none:
            return False
        until = self._tokens.get(claims.jti)
        if until is not None and until > self._wall():
            return True
        # "Not good" instead of "bad": no moment that compares with nothing gets through.
        good, until = self._users.get(claims.user, _NEVER)
        if not claims.issued_at >= good and until > self._wall():
            return True
        good, until = self._everyone
        return not claims.issued_at >= good and until > self._wall()

    def learn(self, revocations: Iterable[Revocation]) -> int:
        """Take note of revocations; return how many of them say something new."""
        now = self._wall()
        new = 0
        for one in revocations:
            if one.until > now:
                new += self._learn(one)
        self._none = not len(self)
        return new

    def purge(self, limit: int = 1000) -> None:
        """Forget what has lapsed; looks at ``limit`` revocations at most, going round and round."""
        now = self._wall()
        if not self._unseen:
            self._unseen = [*self._tokens, *self._users]
        seen = self._unseen[-limit:]
        del self._unseen[-limit:]
        for name in seen:
            if self._tokens.get(name, math.inf) <= now:
                del self._tokens[name]
            if name in self._users and self._users[name][1] <= now:
                del self._users[name]
        if self._everyone[1] <= now:
            self._everyone = _NEVER
        self._none = not len(self)

    def _learn(self, one: Revocation) -> bool:
        tokens, users = self._tokens, self._users
        if (token := one.token) is not None:
            until = tokens.get(token, 0)
            if one.until <= until:
                return False
            tokens[token] = one.until
        else:
            user = one.user
            known = self._everyone if user is None else users.get(user, _NEVER)
            joined = max(known[0], one.before + 1), max(known[1], one.until)
            if joined == known:
                return False
            if user is None:
                self._everyone = joined
            else:
                users[user] = joined
        if len(tokens) + len(users) > self._bound:
            self._make_room()
        return True

    def _make_room(self) -> None:
        table: dict[str, int] | dict[str, tuple[int, int]] = self._tokens
        if len(self._users) > len(self._tokens):
            table = self._users
        oldest = list(islice(table, (len(table) + 1) // 2))
        for name in oldest:
            del table[name]
        self.forgotten += len(oldest)
