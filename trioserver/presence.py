"""Who is subscribed to a topic, over all workers of all servers: entries, scripts, pages. No I/O.

Theory
    Each subscribed connection of a user is an *entry* of its topic. Its worker writes it when the
    connection subscribes and removes it when that ends. Who is killed leaves entries behind; they
    do not count any more once their worker is gone: none of its lives has a lease
    (`trioserver.fleet`). They are swept away by the workers that go on. A worker that goes on under
    another life is there: what it has written under an earlier one counts until it is written
    anew, or else removed. Otherwise each cut link would empty all rooms for a moment.

    Entries of one topic are sorted by user, so those of one user lie together: whether somebody
    is the first or the last of his user is one look, however many there are. How many users there
    are, and how many entries each life has, is counted with every change. So the number of
    connections is right as soon as it is known who lives. The number of users is right if no
    worker is gone; else the users of those that are there have to be counted (`count`).

    Where subscribers are told of comings and goings, the scripts do it, in the same step: a
    ``join`` when the first entry of a user is written, a ``leave`` when the last is removed, be it
    by a sweep. The two always alternate as long as Redis keeps its memory.

Keys of one topic lie in one slot of a cluster. Three scripts write them: ``lua/presence_come.lua``,
``presence_go.lua`` and ``presence_sweep.lua``.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Final, cast
from urllib.parse import unquote

import attrs

from trioserver import fleet, ledger
from trioserver.fleet import Lives
from trioserver.ledger import Command, Script, Topic
from trioserver.messages import Attendee, rfc3339

ENTRY_SECONDS: Final = 3000
"""How long the entries of a topic are kept after one was last written."""

PAGE: Final = 100
"""Entries that are shown together."""

SWEPT: Final = 500
"""Entries that one sweep looks at: half a millisecond of Redis, three if all are removed."""

COUNTED: Final = 2000
"""Entries that one `count` looks at: a millisecond."""

_USERS: Final = b"users"
"""The field of the counts that is no life: those have dots."""


# ---- Scripts


_COME: Final = Script.of("presence_come", "presence_lib")
_GO: Final = Script.of("presence_go", "presence_lib")
_SWEEP: Final = Script.of("presence_sweep", "presence_lib")
_COUNT: Final = Script.of("presence_count", "presence_lib")

LOADS: Final[tuple[Command, ...]] = tuple(script.load for script in (_COME, _GO, _SWEEP, _COUNT))
"""The commands that make the scripts known to Redis."""


# ---- Writing


def members_key(topic: str) -> str:
    """Return the name of the key with a topic's entries."""
    return ledger.key("members", Topic(topic))


def counts_key(topic: str) -> str:
    """Return the name of the key that says how many there are."""
    return ledger.key("counts", Topic(topic))


who: Final = ledger.encoded
"""Returns a user as entries name him."""


def about(device: str, client_type: str, since: int) -> str:
    """Return what an entry says of a connection, beside whose and where it is.

    Args:
        device: The device's name; empty if it has none.
        client_type: What kind of client it says it is.
        since: When it subscribed, in seconds since 1970.
    """
    return f"{ledger.encoded(device)} {ledger.encoded(client_type)} {since}"


def entry(whose: str, life: str, connection_id: str, what: str) -> str:
    """Return the entry of a connection.

    Args:
        whose: From `who`.
        life: Of its worker.
        connection_id: Which.
        what: From `about`.
    """
    return f"{whose} {life}/{connection_id} {what}"


def come(topic: str, channel: str, entries: Iterable[tuple[str, str]]) -> Command:
    """Return the command that writes entries; to repeat it is harmless.

    Args:
        topic: Of all of them.
        channel: Where comings and goings are told; empty if they are not.
        entries: Each with the one that it stands for now, or an empty string. That one is removed
            in the same moment, so that its user has not gone.
    """
    pairs = [text for pair in entries for text in pair]
    return (*_opening(_COME, topic), channel, ENTRY_SECONDS, *pairs)


def go(topic: str, channel: str, entries: Iterable[str]) -> Command:
    """Return the command that removes entries; to repeat it is harmless. Arguments as `come`."""
    return (*_opening(_GO, topic), channel, *entries)


def sweep(topic: str, channel: str, start: str, over: Iterable[str]) -> Command:
    """Return the command that removes entries of lives that are over. Answered with `swept`.

    Args:
        topic: Which.
        channel: Where goings are told; empty if they are not.
        start: Where to begin: `BEGINNING`, then what the sweep before has answered.
        over: The lives. Must be known to be over later than their entries were seen, see
            `trioserver.fleet`.
    """
    return (*_opening(_SWEEP, topic), channel, start, SWEPT, *over)


def swept(reply: object) -> str:
    """Return where to go on; empty if nothing is left to sweep."""
    return cast("bytes", reply).decode(errors="replace")


BEGINNING: Final = "-"
"""Before the first entry."""


def _opening(script: Script, topic: str) -> Command:
    return ("EVALSHA", script.sha, 2, members_key(topic), counts_key(topic))


# ---- Reading


@attrs.frozen(kw_only=True)
class Counts:
    """How many there are."""

    users: int = 0
    """Different ones; those of lives that are over included."""
    connections: int = 0
    """Of workers that are there."""
    over: tuple[str, ...] = ()
    """Lives that are over, of workers that are gone, and have left entries behind."""
    earlier: tuple[str, ...] = ()
    """Lives that are over and have entries, of workers that go on under another one."""


def counts_read(topic: str) -> Command:
    """Return the command that tells how many there are. Answered with `counts`."""
    return ("HGETALL", counts_key(topic))


def counts(reply: object, lives: Lives) -> Counts:
    """Return how many there are.

    Args:
        reply: To `counts_read`. A refusal says that there are none.
        lives: Read later than that.
    """
    fields = cast("list[bytes]", reply) if isinstance(reply, list) else []
    numbers = {
        name: int(number)
        for name, number in zip(fields[::2], fields[1::2], strict=False)
        if number.isdigit()
    }
    users = numbers.pop(_USERS, 0)
    by_life = {name.decode(errors="replace"): number for name, number in numbers.items()}
    there = workers(lives)
    over = tuple(life for life in by_life if worker(life) not in there)
    earlier = tuple(life for life in by_life if life not in over and lives.is_over(life))
    connections = sum(number for life, number in by_life.items() if life not in over)
    return Counts(users=users, connections=connections, over=over, earlier=earlier)


def lives_read() -> tuple[Command, Command]:
    """Return the commands that tell who lives. Answered with `lives`."""
    return (("TIME",), ("ZRANGE", fleet.LIVES_KEY, 0, -1, "WITHSCORES"))


def lives(clock: object, members: object) -> Lives:
    """Return who lives, from the two replies to `lives_read`."""
    return Lives.of(fleet.clock_ms(clock), members if isinstance(members, list) else [])


def worker(life: str) -> str:
    """Return the worker whose life it is: the part that its lives have in common."""
    return life.partition("+")[0]


def workers(lives: Lives) -> frozenset[str]:
    """Return the workers that are there: one of their lives has a lease."""
    return frozenset(map(worker, lives.living))


def entries_read(topic: str, start: str | bytes, most: int) -> Command:
    """Return the command for entries behind ``start``, at most so many. Answered with bytes."""
    return ("ZRANGEBYLEX", members_key(topic), start, "+", "LIMIT", 0, most)


@attrs.frozen(kw_only=True)
class Attending:
    """An entry, read."""

    user: str
    life: str
    place: str
    """``<life>/<connection id>``."""
    shown: Attendee

    @property
    def cursor(self) -> str:
        """What a client says to go on behind this one; visible ASCII."""
        return base64.urlsafe_b64encode(f"{self.user} {self.place}".encode()).decode()


def attending(text: bytes) -> Attending | None:
    """Return what an entry says; None if it is none of ours."""
    parts = text.decode(errors="replace").split(" ")
    if len(parts) != 5 or not parts[4].isdecimal() or len(parts[4]) > 11:  # noqa: PLR2004
        return None
    name, place, device, client_type, since = parts
    shown = Attendee(
        user=unquote(name),
        since=rfc3339(int(since) * 1000),
        device=unquote(device) or None,
        client_type=unquote(client_type) or None,
    )
    return Attending(user=shown.user, life=place.partition("/")[0], place=place, shown=shown)


def start_after(cursor: str | None) -> str:
    """Return where a page begins, for `entries_read`.

    Args:
        cursor: `Attending.cursor` of the last one on the page before. None is the first page, and
            so is what nobody understands.
    """
    try:
        user, _, place = base64.urlsafe_b64decode(cursor or "").decode().rpartition(" ")
    except ValueError:
        return BEGINNING
    # A space ends the place in every entry, and no name has anything before the "!" behind it.
    return f"({ledger.encoded(user)} {place}!" if user and place else BEGINNING


def count(topic: str, start: str, last: str, over: Sequence[str]) -> Command:
    """Return the command that counts users among some entries. Answered with `counted`.

    Args:
        topic: Which.
        start: Where to begin: `BEGINNING`, then where the count before has ended.
        last: The user who was counted last; empty at the beginning.
        over: Lives whose entries do not count.
    """
    return (*_opening(_COUNT, topic), "", start, COUNTED, last, *over)


def counted(reply: object) -> tuple[int, str, str]:
    """Return how many there are, where to go on (empty at the end), and who was counted last."""
    users, start, last = cast("tuple[int, bytes, bytes]", reply)
    return users, start.decode(errors="replace"), last.decode(errors="replace")
