"""The ledger seen from Python: commands for its scripts, and what their replies say. No I/O.

What the ledger does is in ``trioserver/lua``: each script is one atomic step, and only scripts
write its keys. Here is how a script is called: a function per script returns the command
(`Command`, to be sent by whoever has a connection), another reads the reply.

    command = ledger.publish(notification, rules=rules)
    ...
    accepted = ledger.accepted(reply)

Redis may not know the scripts (it forgets them when it restarts): then it answers with an error
that `is_noscript` recognises, nothing has happened, and `loads` says what to send first. Other
errors of the scripts begin with `BAD_REQUEST`, `REUSED_KEY` or `RATE_LIMITED` and had no effect
either.

All keys of one user lie in one slot of a cluster, because their names begin with the user's
partition in braces. A script is told one key and makes the others from it.

Beside the users' inboxes there are streams that many read: the one for everyone, and one for each
durable topic (`Topic`). Of their notifications nobody counts what is unread, and no device has a
place of its own in them.
"""

import functools
import hashlib
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias, cast

import attrs
import msgspec

from trioserver.position import join, seq_of
from trioserver.resp import Argument
from trioserver.settings import Settings
from trioserver.topics import Patterns

Command: TypeAlias = tuple[Argument, ...]

EVERYONE: Final = "all"
"""Partition, and name in keys, of what is published to everyone."""

PARTITIONS: Final = tuple(f"p{number:02d}" for number in range(64))
"""The users' partitions; `EVERYONE` is one more, and then there are those of the topics."""

TOPIC_PARTITIONS: Final = tuple(f"t{number:02d}" for number in range(16))
"""The topics' partitions."""

BAD_REQUEST: Final = "BADREQUEST "
"""Begins the error for what cannot be done as asked; the rest is for a person."""
REUSED_KEY: Final = "IDEMPOTENCY "
"""Begins the error for an idempotency key that was used for something else."""
RATE_LIMITED: Final = "RATELIMITED "
"""Begins the error for one more than a user may get per minute; the rest says how long to wait."""

DAY_MS: Final = 86_400_000
MIN_TTL_MS: Final = 1000
MAX_TTL_MS: Final = 30 * DAY_MS
MAX_DELAY_MS: Final = 30 * DAY_MS
MAX_KEY_BYTES: Final = 128
"""Of idempotency and collapse keys."""
MAX_MARKED: Final = 100
"""Ids in one `mark`."""
MAX_DEVICES: Final = 32
"""Of one user; more push out those that were seen longest ago."""
NAMELESS: Final = "-"
"""Stands for the device without a name, in keys."""


# ---- Whose a stream is


@attrs.frozen
class Topic:
    """A topic, where a user may stand as well."""

    name: str


Owner: TypeAlias = str | Topic | None
"""Of a stream: a user by his id, a topic, or None for everyone."""


def topic_channel(prefix: str, name: str) -> str:
    """Return the channel on which a topic is live.

    Args:
        prefix: The setting ``CHANNEL_PREFIX``.
        name: Of the topic.
    """
    return f"{prefix}topic:{name}"


# ---- Rules: what an operator has chosen


@attrs.frozen(kw_only=True)
class Rules:
    """Limits that the scripts keep; 0 is no limit for the sizes."""

    max_length: int = 1000
    """Entries of one inbox."""
    events_max_length: int = 10_000
    """Entries of one partition's events, approximately."""
    max_payload: int = 10_240
    """Bytes."""
    idempotency_ttl_ms: int = 300_000
    rate: int = 0
    """Notifications to one user per minute, all of a minute's worth at once; 0 is no limit. What
    has priority, what is for everyone, and what was there already is not counted."""

    @classmethod
    def of(cls, settings: Settings) -> "Rules":
        """Return those that the settings ask for."""
        return cls(
            max_length=settings.inbox_max_length,
            events_max_length=settings.events_max_length,
            max_payload=settings.notification_max_size,
            idempotency_ttl_ms=round(settings.idempotency_ttl * 1000),
            rate=settings.notifications_per_minute_per_user,
        )


@attrs.frozen(kw_only=True)
class TopicRules:
    """Which topics are kept, and how much of them."""

    durable: Patterns = attrs.field(factory=Patterns)
    """Those that are kept; all others are live only."""
    max_length: int = 100
    """Notifications of one topic."""
    ttl_ms: int = 3_600_000
    """For how long each of them is kept."""
    max_payload: int = 10_240
    """Bytes; 0 is no limit."""
    idempotency_ttl_ms: int = 300_000

    @classmethod
    def of(cls, settings: Settings) -> "TopicRules":
        """Return those that the settings ask for."""
        return cls(
            durable=Patterns.of(settings.durable_topics),
            max_length=settings.topic_history_length,
            ttl_ms=round(settings.topic_history_ttl * 1000),
            max_payload=settings.notification_max_size,
            idempotency_ttl_ms=round(settings.idempotency_ttl * 1000),
        )


# ---- Scripts


@attrs.frozen
class Script:
    """One script as Redis gets it."""

    name: str
    text: bytes
    sha: str
    """By which it is called."""

    @classmethod
    def of(cls, name: str, library: str = "") -> "Script":
        """Return the script in the file of this name, behind the library that it needs, if any."""
        folder = Path(__file__).parent / "lua"
        parts = [f"{part}.lua" for part in (library, name) if part]
        text = b"\n".join((folder / part).read_bytes() for part in parts)
        return cls(name, text, hashlib.sha1(text, usedforsecurity=False).hexdigest())

    @property
    def load(self) -> Command:
        """The command that makes it known to Redis."""
        return ("SCRIPT", "LOAD", self.text)


SCRIPTS: Final = {
    name: Script.of(name, "lib") for name in ("publish", "read", "report", "mark", "cancel", "due")
}
"""By name. The text of a script is ``lib.lua``, a newline, and the script's own file."""


def loads() -> list[Command]:
    """Return the commands that make the scripts known to Redis."""
    return [script.load for script in SCRIPTS.values()]


def is_noscript(error: str) -> bool:
    """Return whether this error reply means: send `loads` first, nothing has happened."""
    return error.startswith("NOSCRIPT")


# ---- Keys


_plain = re.compile(r"[A-Za-z0-9_.@-]*", re.ASCII).fullmatch


def encoded(name: str) -> str:
    """Return a user or a publisher's key as it is written in names of keys."""
    if _plain(name):
        return name
    return "".join(chr(byte) if _plain(chr(byte)) else f"%{byte:02X}" for byte in name.encode())


def partition(owner: Owner) -> str:
    """Return the partition of a user, of a topic, or the one of everyone."""
    if isinstance(owner, str):
        return PARTITIONS[zlib.crc32(owner.encode()) & 63]
    if owner is None:
        return EVERYONE
    return TOPIC_PARTITIONS[zlib.crc32(owner.name.encode()) & 15]


def partition_of(notification_id: str) -> str | None:
    """Return the partition that an id begins with, or None if that is no id."""
    match = _id_shape(notification_id)
    return match[1] if match else None


def owner_of(notification_id: str, name: str) -> Owner:
    """Return whose a notification is.

    Args:
        notification_id: Its id.
        name: What its life says: the user's id, or the name of the topic.
    """
    home = notification_id.partition("-")[0]
    if home in TOPIC_PARTITIONS:
        return Topic(name)
    return None if home == EVERYONE else name


def key(kind: str, owner: Owner) -> str:
    """Return the name of an owner's key: ``meta``, ``inbox``, ``holes`` or ``cursors``.

    Args:
        kind: Which.
        owner: The user's id, the topic, or None for what belongs to everyone.
    """
    if isinstance(owner, str):
        return f"ts:{{{partition(owner)}}}:{kind}:{encoded(owner)}"
    if owner is None:
        return f"ts:{{{EVERYONE}}}:{kind}:{EVERYONE}"
    return f"ts:{{{partition(owner)}}}:{kind}:{encoded(owner.name)}"


def notification_key(notification_id: str) -> str | None:
    """Return the name of the hash that tells the life of a notification; None if that is no id."""
    home = partition_of(notification_id)
    return None if home is None else f"ts:{{{home}}}:n:{notification_id}"


def due_key(home: str) -> str:
    """Return the name of a partition's schedule."""
    return f"ts:{{{home}}}:due"


def events_key(home: str) -> str:
    """Return the name of a partition's stream of events."""
    return f"ts:{{{home}}}:events"


# ---- Ids: <partition>-<UUID version 7>


_id_shape = re.compile(
    r"(p[0-5][0-9]|p6[0-3]|t0[0-9]|t1[0-5]|all)"
    r"-[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
).fullmatch


def new_id(home: str, now_ms: int) -> str:
    """Return a new id.

    Whoever publishes makes it, so that publishing again after an unknown outcome is harmless.

    Args:
        home: The partition.
        now_ms: Since 1970.
    """
    bits = (now_ms & 0xFFFFFFFFFFFF) << 80 | int.from_bytes(os.urandom(10))
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    text = f"{bits:032x}"
    return f"{home}-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


# ---- publish


@attrs.frozen(kw_only=True)
class Notification:
    """Something to publish. Times and durations are milliseconds, moments since 1970."""

    user: Owner
    """To whom: a user, a topic, or None for everyone."""
    payload: bytes
    """JSON."""
    type: str = "notification"
    ttl_ms: int
    id: str
    """From `new_id`, for the recipient's partition."""
    idempotency_key: str | None = None
    collapse_key: str | None = None
    deliver_at_ms: int | None = None
    fallback_after_ms: int | None = None
    traceparent: str | None = None
    channel: str | None = None
    """Where to announce it; None is where the user's worker is known to listen."""
    sender: str | None = None
    """The user who publishes it to a topic; None if a back end does."""
    priority: bool = False
    """Whether it comes through when the user has got all that `Rules.rate` allows."""


class Accepted(msgspec.Struct, frozen=True, gc=False):
    """A notification is in the ledger."""

    id: str
    """Of the first one, if this was a repetition."""
    position: str
    """Of a client that has got everything including this one; empty if it is not yet due."""
    seq: int
    """0 if it is not yet due."""
    outcome: str
    """``accepted``, ``scheduled``, or ``duplicate``: it was there already."""


def publish(notification: Notification, *, rules: Rules | TopicRules) -> Command:
    """Return the command that publishes. Answered with `accepted`, or an error without effect.

    Args:
        notification: What, and to whom.
        rules: The operator's; those of topics, if it is to one.
    """
    one = notification
    command: list[Argument] = [
        *_opening("publish", key("meta", one.user)),
        *("id", one.id, "payload", one.payload, "type", one.type, "ttl", one.ttl_ms),
        *("max", rules.max_length, "max_size", rules.max_payload),
        *("idempotency_ttl", rules.idempotency_ttl_ms),
    ]
    rate = None
    if isinstance(rules, Rules):
        command += ("events", rules.events_max_length)
        rate = rules.rate or None
    optional: tuple[tuple[str, str | int | None], ...] = (
        ("idempotency_key", one.idempotency_key),
        ("collapse_key", one.collapse_key),
        ("deliver_at", one.deliver_at_ms),
        ("fallback_after", one.fallback_after_ms),
        ("traceparent", one.traceparent),
        ("channel", one.channel),
        ("rate", rate),
        ("sender", one.sender),
        ("priority", 1 if one.priority else None),
    )
    for name, value in optional:
        if value is not None:
            command += (name, value)
    return tuple(command)


def accepted(reply: object) -> Accepted:
    """Return what came of `publish`."""
    name, point, seq, outcome = cast("tuple[bytes, bytes, int, bytes]", reply)
    position = point.decode()
    if position:
        is_users = name.startswith(b"p")
        position = join(position, "") if is_users else join("", position)
    return Accepted(name.decode(), position, seq, outcome.decode())


def wait_of(error: str) -> float | None:
    """Return after how many seconds one more would be taken; None if this error says no such thing.

    Args:
        error: The text of an error reply to `publish`.
    """
    if not error.startswith(RATE_LIMITED):
        return None
    milliseconds = error.removeprefix(RATE_LIMITED).partition(" ")[0]
    return int(milliseconds) / 1000 if milliseconds.isdecimal() else 1.0


# ---- read


class Notice(msgspec.Struct, frozen=True, gc=False):
    """A notification, read from an inbox."""

    place: str
    id: str
    type: str
    payload: bytes
    """JSON."""
    expires: int
    """Milliseconds since 1970."""
    attempt: int
    """How often this device has been given it by a reading, with this one."""
    state: str
    traceparent: str | None
    sender: str | None = None
    """The user who published it to a topic; None if a back end did."""

    @property
    def seq(self) -> int:
        """Its number."""
        return seq_of(self.place)


class Change(msgspec.Struct, frozen=True, gc=False):
    """Notifications were read, cancelled, or have expired."""

    place: str
    state: str
    ids: list[str]


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Notifications that cannot come any more."""

    from_seq: int
    to_seq: int
    """Both are included, and both 0 if nobody can say."""
    missing: int
    """How many of them; those withdrawn on purpose do not count. At least so many, if the reason
    is ``epoch`` or ``failover``."""
    reason: str
    """``trimmed``, ``expired``, ``epoch`` or ``failover``."""


Item: TypeAlias = Notice | Change | Gap


class Page(msgspec.Struct, frozen=True, gc=False):
    """What a reading found."""

    epoch: str
    start: str
    """Place from which was read."""
    reached: str
    """Place up to which this page tells everything."""
    unread: int
    more: bool
    """Whether something lies behind the page."""
    why: str
    """Empty if a known place was continued; ``new`` if there was none to continue. ``epoch``,
    ``failover``, ``trimmed`` or ``expired``: the reason of the first gap."""
    all_point: str
    """The device's point in the stream for everyone, as far as it is known."""
    items: list[Item]
    """In the order in which a client is to be told."""

    @property
    def start_point(self) -> str:
        """Point from which was read."""
        return f"{self.epoch}.{self.start}"

    @property
    def reached_point(self) -> str:
        """Point up to which this page tells everything."""
        return f"{self.epoch}.{self.reached}"


def read(  # noqa: PLR0913 - the script's arguments, each with its name
    owner: Owner,
    *,
    device: str = "",
    point: str = "",
    garbage: bool = False,
    connect: bool = False,
    ack: bool = False,
    head: bool = False,
    channel: str = "",
    nonce: str = "",
    all_point: str = "",
    limit: int = 64,
    max_bytes: int = 262_144,
) -> Command:
    """Return the command that reads an inbox from where its reader is. Answered with `page`.

    Args:
        owner: The user, the topic, or None for the stream for everyone.
        device: The reader's name; empty if it has none.
        point: Where it says it is; it beats what is stored.
        garbage: It has said something that nobody understands.
        connect: A client has come: its device is remembered, and the keys live on.
        ack: Continue where the device has acknowledged, not where it has received.
        head: A reader without a place begins at the end instead of with all there is. (Of a topic
            all there is comes without a gap for what is older.)
        channel: Where its worker listens; stored, for publishers that do not know.
        all_point: Where the device is in the stream for everyone; stored if nothing is yet.
        nonce: Name of the epoch, if one must begin: 8 random characters of a-z and 0-9.
        limit: Entries on the page.
        max_bytes: Of payloads on the page; the first one always fits.
    """
    arguments: list[Argument] = ["device", device] if device else []
    if point:
        arguments += ("point", point)
    if garbage:
        arguments += ("garbage", 1)
    if connect:
        arguments += ("connect", 1)
    if ack:
        arguments += ("ack", 1)
    if head:
        arguments += ("head", 1)
    if channel:
        arguments += ("channel", channel)
    if nonce:
        arguments += ("nonce", nonce)
    if all_point:
        arguments += ("all", all_point)
    return (
        *_opening("read", key("meta", owner)),
        *arguments,
        *("limit", limit, "bytes", max_bytes),
    )


def page(reply: object) -> Page:
    """Return what `read` has found."""
    epoch, start, reached, unread, more, why, everyone, *items = cast(
        "tuple[bytes, bytes, bytes, int, int, bytes, bytes, *tuple[list[object], ...]]", reply
    )
    return Page(
        epoch.decode(),
        start.decode(),
        reached.decode(),
        unread,
        more == 1,
        why.decode(),
        everyone.decode(),
        [_item(item) for item in items] if items else [],
    )


def _item(item: list[object]) -> Item:
    if item[0] == b"n":
        _, place, name, kind, payload, expires, attempt, state, trace, *sender = cast(
            "tuple[bytes, bytes, bytes, bytes, bytes, int, int, bytes, bytes, *tuple[bytes, ...]]",
            item,
        )
        return Notice(
            place.decode(),
            name.decode(errors="replace"),
            kind.decode(errors="replace"),
            payload,
            expires,
            attempt,
            state.decode(errors="replace"),
            trace.decode(errors="replace") or None,
            sender[0].decode(errors="replace") if sender else None,
        )
    if item[0] == b"u":
        _, place, state, ids = cast("tuple[bytes, bytes, bytes, bytes]", item)
        return Change(
            place.decode(), state.decode(errors="replace"), ids.decode(errors="replace").split()
        )
    _, first, last, missing, reason = cast("tuple[bytes, int, int, int, bytes]", item)
    return Gap(first, last, missing, reason.decode(errors="replace"))


# ---- report, mark, cancel, due


def report(
    user: str,
    *,
    rules: Rules,
    device: str,
    sent: str = "",
    received: str = "",
    acked_seq: int = 0,
    acked_id: str = "",
    all_point: str = "",
) -> Command:
    """Return the command that tells how far a device is. Answered with `acked`.

    Everything is cumulative, and what is behind what was told before changes nothing. Points of
    another epoch than the present are ignored.

    Args:
        user: Whose device.
        rules: The operator's.
        device: Its name; empty if it has none.
        sent: Point up to which everything was written to it.
        received: Point up to which everything has arrived there; it counts as sent, too.
        acked_seq: Seq up to which it has acknowledged; beyond what was sent it does not count.
        acked_id: The same, said by the id of a notification.
        all_point: Where it is in the stream for everyone.
    """
    arguments: list[Argument] = ["device", device, "events", rules.events_max_length]
    if sent:
        arguments += ("sent", sent)
    if received:
        arguments += ("received", received)
    if acked_seq:
        arguments += ("acked", acked_seq)
    if acked_id:
        arguments += ("acked_id", acked_id)
    if all_point:
        arguments += ("all", all_point)
    return (*_opening("report", key("meta", user)), *arguments)


def acked(reply: object) -> int:
    """Return the seq up to which a device has acknowledged, after `report`."""
    [seq] = cast("list[int]", reply)
    return seq


def mark(
    user: str,
    *,
    rules: Rules,
    device: str,
    by: str,
    ids: Sequence[str] = (),
    up_to: int = 0,
    up_to_id: str = "",
) -> Command:
    """Return the command that marks notifications as read. Answered with `marked`.

    Args:
        user: Whose they are.
        rules: The operator's.
        device: Where they were read; empty if it has no name.
        by: Comes back in the envelope, so that who asked knows its own.
        ids: Which, at most `MAX_MARKED`; unknown ones are ignored.
        up_to: And all up to this seq.
        up_to_id: And all up to this notification.
    """
    arguments: list[Argument] = ["device", device, "by", by, "events", rules.events_max_length]
    if ids:
        arguments += ("ids", " ".join(ids))
    if up_to:
        arguments += ("up_to", up_to)
    if up_to_id:
        arguments += ("up_to_id", up_to_id)
    return (*_opening("mark", key("meta", user)), *arguments)


def marked(reply: object) -> tuple[int, int]:
    """Return how many are unread now and how many were marked, after `mark`."""
    unread, count = cast("list[int]", reply)
    return unread, count


def cancel(owner: Owner, notification_id: str, *, rules: Rules) -> Command:
    """Return the command that withdraws a notification. Answered with `cancelled`.

    Args:
        owner: Whose it is (see `owner_of`).
        notification_id: Its id.
        rules: The operator's.
    """
    opening = _opening("cancel", key("meta", owner))
    return (*opening, "id", notification_id, "events", rules.events_max_length)


def cancelled(reply: object) -> str:
    """Return the outcome of `cancel`: ``cancelled``, ``too late`` or ``unknown``."""
    [outcome] = cast("list[bytes]", reply)
    return outcome.decode()


def due(home: str, *, rules: Rules, limit: int = 50) -> Command:
    """Return the command that does what is due in a partition. Answered with `settled`.

    Args:
        home: The partition.
        rules: The operator's.
        limit: Do at most so much at once.
    """
    return (
        *_opening("due", due_key(home)),
        *("limit", limit, "events", rules.events_max_length, "max", rules.max_length),
    )


def settled(reply: object) -> tuple[int, int]:
    """Return how much was done, and in how many ms the next is due (-1: nothing is waiting)."""
    count, wait = cast("list[int]", reply)
    return count, wait


@functools.cache
def _start(name: str) -> tuple[str, str, int]:
    return ("EVALSHA", SCRIPTS[name].sha, 1)


def _opening(name: str, first_key: str) -> tuple[str, str, int, str]:
    return (*_start(name), first_key)
