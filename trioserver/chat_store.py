"""The stored count of chat sessions: commands for its scripts, and what the replies say. No I/O.

Theory
    A *session* counts messages, whichever connections they come through one after the other. One
    connection at a time is its *holder*, and counts in memory; what it has counted it writes down
    (`commit`) before it answers. What is written is absolute (the count, not one more), so a
    write whose outcome is unknown is simply repeated.

    Old writes may still arrive late, out of a buffer of a connection that was given up. Two
    numbers tell them from the present:

        version   grows with each write of one holder: what is not newer changes nothing.
        turn      grows with each holder: a write of an earlier one is refused, he was superseded.

    What nobody waits for any more must not happen: each command says until when it may, by the
    clock of Redis, which its answers tell (`clock`). So a client that was told that a message is
    not counted is wrong only if Redis has counted it in time and could not say so.

    Redis may lose what it knew, all of it or the latest. The holder knows what it has answered,
    so a session that is not there, or whose turn is an older one, becomes what its holder says.

    The ids of the latest `REMEMBERED` messages stand beside the count, with the count of each:
    who sends a message again because the answer was lost gets that answer.

Two scripts write (``lua/chat_attach.lua``, ``lua/chat_commit.lua``). Each session is one key, in a
slot of its own, so on a cluster each needs a command of its own.
"""

from collections.abc import Sequence
from typing import Final, cast

import attrs

from trioserver.ledger import Command, Script
from trioserver.resp import Argument

REMEMBERED: Final = 32
"""Messages whose ids a session knows."""

SESSIONS_PER_COMMAND: Final = 128
"""So that nobody waits for Redis much longer than a third of a millisecond."""


# ---- Scripts


ATTACH: Final = Script.of("chat_attach")
COMMIT: Final = Script.of("chat_commit")

LOADS: Final[tuple[Command, ...]] = tuple(script.load for script in (ATTACH, COMMIT))
"""The commands that make the scripts known to Redis."""


def key(session_id: str) -> str:
    """Return the name of the key with a session."""
    return f"ts:session:{{{session_id}}}"


# ---- Moments

ALWAYS: Final = 0
"""As a moment: whenever it comes."""


def clock(reply: object) -> int:
    """Return the moment by the clock of Redis, ms, at which it has run one of the commands."""
    return cast("list[int]", reply)[0]


def was_late(reply: object) -> bool:
    """Return whether one of the commands came after its moment, and so has done nothing."""
    told = cast("list[object]", reply)
    return len(told) == _LATE and told[1] == b"late"


_LATE: Final = 2
"""Elements of that reply."""


# ---- attach

RESUMED: Final = "resumed"
CREATED: Final = "created"
UNKNOWN: Final = "unknown"
FORBIDDEN: Final = "forbidden"
SUPERSEDED: Final = "superseded"


@attrs.frozen(kw_only=True)
class Attached:
    """What came of `attach`."""

    outcome: str
    """`RESUMED` or `CREATED`; or it was not attached: `UNKNOWN` if it does not exist and may not
    be created, `FORBIDDEN` if it is somebody else's, `SUPERSEDED` if somebody has taken it from
    this connection before."""
    count: int
    ids: str
    """See `remember`."""
    turn: int
    """For `Commit`."""
    before: str
    """The holder that has lost it; empty if there is none."""


def attach(
    session_id: str,
    *,
    until: int,
    holder: str,
    user: str,
    may_create: bool,
    ttl_ms: int,
    channels: str,
    life: str,
) -> Command:
    """Return the command by which somebody becomes the holder. Answered with `attached`.

    To repeat it is harmless. The holder before, if it is of another life, is named on its life's
    channel.

    Args:
        session_id: Of which session.
        until: After that moment it does nothing; see `clock`.
        holder: ``<life>-<n>``. Whoever was the holder and is not any more never is again.
        user: Whose it is; empty for an anonymous client. A session without an owner becomes his.
        may_create: Whether the session begins if it does not exist.
        ttl_ms: How long it lives without another word.
        channels: What comes before a life in the names of channels.
        life: Of the holder.
    """
    may = b"1" if may_create else b"0"
    opening = ("EVALSHA", ATTACH.sha, 1, key(session_id))
    return (*opening, until, holder, user, may, ttl_ms, channels, life)


def attached(reply: object) -> Attached:
    """Return what came of `attach`."""
    _, outcome, count, ids, turn, before = cast("tuple[int, bytes, int, bytes, int, bytes]", reply)
    return Attached(
        outcome=outcome.decode(),
        count=count,
        ids=ids.decode(errors="replace"),
        turn=turn,
        before=before.decode(errors="replace"),
    )


# ---- commit

Commit = tuple[str, str, int, int, int, str, str, bytes]
"""Key, holder, turn, version, count, owner (empty if none is known), ids, whether it leaves (`b"1"`
or `b"0"`): what the holder of one session says, in the order of the script's arguments."""

STAYS: Final = b"0"
LEAVES: Final = b"1"


def per_command(*, together: bool) -> int:
    """Return how many sessions one `commit` may write; one where each is in another slot."""
    return SESSIONS_PER_COMMAND if together else 1


def commit(said: Sequence[Commit], ttl_ms: int, *, until: int) -> Command:
    """Return the command that writes down what holders say. Answered with `faults`.

    Args:
        said: About sessions that are all different, at most as many as `per_command` says.
        ttl_ms: How long they live without another word.
        until: After that moment it does nothing; see `clock`.
    """
    command: list[Argument] = ["EVALSHA", COMMIT.sha, len(said)]
    command += [one[0] for one in said]
    command += (until, ttl_ms)
    for one in said:
        command += one[1:]
    return tuple(command)


def faults(reply: object) -> dict[int, str]:
    """Return which sessions of a command were not written, from 0, and why.

    `SUPERSEDED`: another connection holds it. `FORBIDDEN`: it is somebody else's.
    """
    told = cast("list[int | bytes]", reply)
    return {
        cast("int", number) - 1: cast("bytes", fault).decode()
        for number, fault in zip(told[1::2], told[2::2], strict=True)
    }


# ---- The ids of the latest messages: one text, as it is stored: "\n<id> <count>\n<id> <count>..."

NONE_LEFT: Final = "\n"
"""No ids, where there have been some: an empty text would leave those in Redis."""


def remember(ids: str, message_id: str, count: int) -> str:
    """Return ``ids`` with one more message, and without the oldest if they are too many.

    Args:
        ids: What `Attached` or this has said.
        message_id: Visible ASCII, no spaces.
        count: What it was counted as.
    """
    if ids == NONE_LEFT:
        ids = ""
    elif ids.count(" ") >= REMEMBERED:
        ids = ids[ids.index("\n", 1) :]
    return f"{ids}\n{message_id} {count}"


def recall(ids: str, message_id: str) -> int | None:
    """Return what a message was counted as; None if it is not among the latest."""
    place = f"\n{message_id} "
    found = ids.rfind(place)
    if found < 0:
        return None
    start = found + len(place)
    end = ids.find("\n", start)
    digits = ids[start : end if end >= 0 else len(ids)]
    return int(digits) if digits.isdecimal() else None
