"""How a user stands, and the life of a notification: read from the ledger's keys. No I/O.

Reading changes nothing, so it may be done with any client at any time. The keys are written by
the ledger's scripts only; what is found in them is taken as it is, and nonsense as nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

import attrs

from trioserver import ledger
from trioserver.ledger import Command, Owner, Topic
from trioserver.position import join, order, seq_of

PAGE_ENTRIES: Final = 200
MAX_ENTRIES: Final = 5_000
"""Of an inbox are looked at; what lies behind is not counted."""

_START: Final = "0-0"


# ---- How a user stands


@attrs.frozen(kw_only=True)
class Device:
    """One device of a user. Moments are milliseconds since 1970, numbers are seqs."""

    name: str
    """Empty for connections without a name, which together are one device."""
    seen: int
    """When it was last heard of."""
    sent: int
    """All up to here was written to its connection."""
    received: int
    """All up to here has arrived there."""
    acked: int
    """All up to here was acknowledged by it."""
    all_received: int
    """All up to here has arrived of what was published to everyone."""
    outstanding: int
    """Kept for it, and not received yet."""


@attrs.frozen(kw_only=True)
class Standing:
    """What Redis knows about a user."""

    user: str
    now: int
    """When it was asked, in milliseconds since 1970, by Redis's own clock."""
    known: bool
    """Whether anything was published to the user, or a device came, within 45 days."""
    position: str
    """Of a client that has got everything; empty if the user is not known."""
    seq: int
    """Of the newest notification."""
    unread: int
    retained: int
    """Notifications that are kept: neither trimmed nor expired nor cancelled."""
    all_counted: bool
    """Whether there were no more than `MAX_ENTRIES` to count; else numbers are at least so big."""
    trimmed: int
    """The newest that was pushed out by newer ones."""
    devices: tuple[Device, ...]
    """The one that was heard of last comes first."""


@attrs.frozen
class _Cursor:
    """A device's record."""

    name: str
    sent: str
    received: str
    acked: str
    everyone: str
    seen: int


class Look:
    """Finds out how a user stands: send `questions`, give `answered` the replies, until none.

    Args:
        user: Who.
        counting: Whether to count what is kept, which reads the inbox.
    """

    def __init__(self, user: str, *, counting: bool = True) -> None:
        self._user = user
        self._counting = counting
        self._meta: Mapping[str, str] = {}
        self._epoch = ""
        self._cursors: tuple[_Cursor, ...] = ()
        self._now = 0
        self._next = "-"
        """From where the inbox is read on; empty when that is done."""
        self._looked_at = 0
        self._kept: list[tuple[int, int]] = []
        """Places of what is kept, in order."""
        self._all_counted = False

    def questions(self) -> list[Command]:
        """Return what to ask now."""
        inbox: Command = (
            *("XRANGE", ledger.key("inbox", self._user), self._next, "+"),
            *("COUNT", PAGE_ENTRIES),
        )
        if not self._now:
            hashes = [("HGETALL", ledger.key(kind, self._user)) for kind in ("meta", "cursors")]
            return [("TIME",), *hashes, *([inbox] if self._counting else [])]
        return [inbox] if self._next else []

    def answered(self, replies: Sequence[object]) -> None:
        """Take the replies to `questions`."""
        if not self._now:
            clock, meta, cursors = replies[:3]
            seconds, microseconds = cast("list[bytes]", clock)
            self._now = int(seconds) * 1000 + int(microseconds) // 1000
            self._meta = _pairs(meta)
            records = _pairs(cursors)
            self._epoch = records.get("epoch", "")
            self._cursors = tuple(_cursors(records))
        if not self._counting:
            self._next = ""
            return
        entries = cast("list[tuple[bytes, list[bytes]]]", replies[-1])
        for place, fields in entries:
            entry = _pairs(fields)
            if "i" in entry and _number(entry.get("x", "")) > self._now:
                self._kept.append(order(place.decode()))
        self._looked_at += len(entries)
        self._all_counted = len(entries) < PAGE_ENTRIES
        ended = self._all_counted or self._looked_at >= MAX_ENTRIES
        self._next = "" if ended else f"({entries[-1][0].decode()}"

    def standing(self) -> Standing:
        """Return what was found."""
        meta = self._meta
        epoch = meta.get("epoch", "")
        last = _place(meta.get("last", ""))
        return Standing(
            user=self._user,
            now=self._now,
            known=bool(epoch),
            position=join(f"{epoch}.{last}", "") if epoch else "",
            seq=_number(meta.get("seq", "")),
            unread=_number(meta.get("unread", "")),
            retained=len(self._kept),
            all_counted=self._all_counted,
            trimmed=seq_of(_place(meta.get("trimmed", ""))),
            devices=tuple(self._devices(epoch)),
        )

    def _devices(self, epoch: str) -> Iterator[Device]:
        for one in sorted(self._cursors, key=lambda cursor: -cursor.seen):
            # Places of another history say nothing about this one.
            here = epoch == self._epoch
            sent, received, acked = (
                place if here else _START for place in (one.sent, one.received, one.acked)
            )
            reached = order(received)
            yield Device(
                name=one.name,
                seen=one.seen,
                sent=seq_of(sent),
                received=seq_of(received),
                acked=seq_of(acked),
                all_received=seq_of(_place(one.everyone.rpartition(".")[2])),
                outstanding=sum(place > reached for place in self._kept),
            )


def _cursors(records: Mapping[str, str]) -> Iterator[_Cursor]:
    for field, record in records.items():
        name = field.removeprefix("d:")
        match record.split(" "):
            case [sent, received, acked, everyone, seen] if name != field:
                yield _Cursor(
                    name="" if name == ledger.NAMELESS else name,
                    sent=_place(sent),
                    received=_place(received),
                    acked=_place(acked),
                    everyone=everyone,
                    seen=_number(seen),
                )
            case _:
                pass  # the epoch, or nonsense


# ---- The life of a notification


@attrs.frozen(kw_only=True)
class DeviceLife:
    """What became of a notification on one device. Moments are milliseconds since 1970, or None."""

    name: str
    """Empty for connections without a name, which together are one device."""
    sent: int | None = None
    """Written to its connection."""
    received: int | None = None
    """It has arrived there."""
    acked: int | None = None
    read: int | None = None
    attempts: int = 0
    """How often it was read from the inbox for this device; 0 if it went out as it came."""
    why: str = ""
    """Why it has not been received, as far as that can be told."""


@attrs.frozen(kw_only=True)
class Event:
    """Something that back ends are told of."""

    kind: str
    """received, acked, read, expired, cancelled or undelivered."""
    at: int
    """Milliseconds since 1970."""


@attrs.frozen(kw_only=True)
class Trace:
    """The life of a notification. Moments are milliseconds since 1970, or None."""

    id: str
    user: str | None
    """None is everyone, or a topic."""
    type: str
    state: str
    """accepted, sent, received, acked, read, expired or cancelled."""
    why: str
    """Why it is cancelled or expired, if that has a reason beside itself."""
    seq: int
    """0 while it is not due."""
    place: str
    """Of its entry in the inbox; empty while it is not due."""
    accepted: int | None
    expires: int | None
    due: int | None
    """When it is to be published, if that was asked for."""
    fallback: int | None
    """When an ``undelivered`` event is due, if that was asked for."""
    events: tuple[Event, ...]
    """Those that were written about it after ``accepted``, in order."""
    devices: tuple[DeviceLife, ...]
    topic: str | None = None

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        return self.user if self.topic is None else Topic(self.topic)


_MOMENTS: Final = {"s": "sent", "r": "received", "a": "acked", "d": "read"}
"""First letter of a device's fields in the notification's hash, and what it is about."""


def trace(notification_id: str, reply: object) -> Trace | None:
    """Return what ``HGETALL`` of `ledger.notification_key` says; None if it is not there."""
    fields = _pairs(reply)
    if not fields:
        return None
    owner = ledger.owner_of(notification_id, fields.get("user", ""))
    return Trace(
        id=notification_id,
        user=owner if isinstance(owner, str) else None,
        topic=owner.name if isinstance(owner, Topic) else None,
        type=fields.get("type", ""),
        state=fields.get("state", ""),
        why=fields.get("why", ""),
        seq=_number(fields.get("seq", "")),
        place=fields.get("place", ""),
        accepted=_moment(fields, "at"),
        expires=_moment(fields, "expires"),
        due=_moment(fields, "due"),
        fallback=_moment(fields, "fallback"),
        events=_events(fields),
        devices=tuple(_device_lives(fields)),
    )


def explained(trace: Trace, standing: Standing) -> Trace:
    """Return the trace with all devices of the user in it, and why each has not received it."""
    lives = {life.name: life for life in trace.devices}
    for device in standing.devices:
        life = lives.get(device.name, DeviceLife(name=device.name))
        lives[device.name] = attrs.evolve(life, why=_why(trace, life, device))
    return attrs.evolve(trace, devices=tuple(lives.values()))


def _why(trace: Trace, life: DeviceLife, device: Device) -> str:
    reasons = {
        "": life.received is not None,
        "it is not due yet": not trace.seq,
        "it was written to the connection, which has not confirmed it": life.sent is not None,
        "the device has not come since": device.seen < (trace.accepted or 0),
        "the device went on from a later place": device.received >= trace.seq,
        f"it was {trace.state} first": trace.state in {"cancelled", "expired"},
    }
    return next((why for why, true in reasons.items() if true), "it has not been sent yet")


def _events(fields: Mapping[str, str]) -> tuple[Event, ...]:
    found = (
        Event(kind=field.removeprefix("e:"), at=_number(value))
        for field, value in fields.items()
        if field.startswith("e:")
    )
    return tuple(sorted(found, key=lambda event: event.at))


def _device_lives(fields: Mapping[str, str]) -> Iterator[DeviceLife]:
    found: dict[str, dict[str, int]] = {}
    for field, value in fields.items():
        letter, colon, name = field.partition(":")
        what = "attempts" if letter == "t" else _MOMENTS.get(letter)
        if colon and what is not None:
            found.setdefault(name, {})[what] = _number(value)
    for name, known in found.items():
        shown = "" if name == ledger.NAMELESS else name
        yield DeviceLife(
            name=shown,
            sent=known.get("sent"),
            received=known.get("received"),
            acked=known.get("acked"),
            read=known.get("read"),
            attempts=known.get("attempts", 0),
        )


# ---- What is in a hash


def _pairs(reply: object) -> dict[str, str]:
    """Return a flat list of names and values as a dictionary."""
    texts = [part.decode(errors="replace") for part in cast("list[bytes]", reply or [])]
    return dict(zip(texts[::2], texts[1::2], strict=False))


def _number(text: str) -> int:
    return int(text) if _digits(text) else 0


def _moment(fields: Mapping[str, str], name: str) -> int | None:
    return _number(fields.get(name, "")) or None


def _place(text: str) -> str:
    """Return ``text`` if it is a place in a stream, else the beginning."""
    milliseconds, _, number = text.partition("-")
    return text if _digits(milliseconds) and _digits(number) else _START


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST


_LONGEST: Final = 18
"""Digits of a number that fits into 64 bits, whatever they are."""
