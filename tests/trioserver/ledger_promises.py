"""What the ledger promises, in lists and dicts: the model that the scripts are held against.

It knows nothing of streams, hashes or Lua. What it cannot know it is told: names of epochs and the
milliseconds of a place, which it checks to be possible. Everything else it foresees.

    World     all histories and notifications, what is due; can be copied (for a failover)
    History   what was published to one owner (a user, or everyone), and what became of it
    Note      one notification
    Update    one entry that says: these were read, cancelled, or have expired
    Record    how far one device is

What readers are promised is in `tests.trioserver.ledger_readers`.
"""

import copy
from collections.abc import Container, Sequence
from typing import Final

import attrs

from trioserver.ledger import Accepted

Place = tuple[int, int]
"""Where an entry is: milliseconds and number."""

Owner = str | None
"""A user, or None for everyone."""

START: Final[Place] = (0, 0)
PER_SEQ: Final = 4096
IDS_PER_UPDATE: Final = 64
MINUTE: Final = 60_000_000
"""In microseconds."""
FORGIVEN: Final = 2 * MINUTE
"""Who seems to owe more than that owes nothing: it was written by another clock."""
MAX_DEVICES: Final = 32
RANK: Final = {"accepted": 0, "sent": 1, "received": 2, "acked": 3, "read": 4}
OVER: Final = frozenset({"read", "expired", "cancelled"})
"""States that nothing follows."""


def place_of(text: str) -> Place:
    """Return the place that a stream id or a point says."""
    milliseconds, number = text.rpartition(".")[2].split("-")
    return int(milliseconds), int(number)


def cost_of_one(rate: int) -> int:
    """Return for how long (µs) one notification is made up for, at so many per minute."""
    return max(1, MINUTE // rate)


def show(at: Place) -> str:
    """Return a place as a stream id."""
    return f"{at[0]}-{at[1]}"


def seq_of(at: Place) -> int:
    """Return the seq of the newest notification at or before a place."""
    return at[1] // PER_SEQ


@attrs.define(eq=False, kw_only=True)
class Note:
    """One notification and what became of it."""

    id: str
    owner: Owner
    payload: bytes
    type: str
    ttl: int
    traceparent: str | None = None
    collapse_key: str | None = None
    expires: int = 0
    place: Place = START
    """START as long as it is only scheduled."""
    deliver_at: int = 0
    """When it is due; 0 if it is not scheduled (any more)."""
    fallback_after: int = 0
    fallback_at: int = 0
    """When somebody wants to know that it has not arrived; 0 if nobody does (any more)."""
    watched: bool = False
    """Whether its expiry is on the schedule."""
    state: str = "accepted"
    gone: str = ""
    """Why it is not in the history any more: trimmed, expired, withdrawn, vanished."""
    why: str = ""
    shown: bool = False
    """Whether it was handed to somebody, who may have shown it."""
    attempts: dict[str, int] = attrs.Factory(dict)
    receivers: set[str] = attrs.Factory(set)
    events: list[str] = attrs.Factory(list)

    @property
    def seq(self) -> int:
        """Its number; 0 if it has none yet."""
        return seq_of(self.place)

    def lost_to(self, now: int) -> bool:
        """Whether a reader can have missed it for good."""
        return self.gone in {"trimmed", "expired", "vanished"} or self.expires <= now

    def tell(self, kind: str) -> None:
        """Write an event, unless there is one of this kind."""
        if kind not in self.events:
            self.events.append(kind)


@attrs.define(eq=False, kw_only=True)
class Update:
    """Some notifications have a new state."""

    state: str
    ids: list[str]
    place: Place = START


@attrs.define(kw_only=True)
class Record:
    """How far one device is in each respect."""

    epoch: str
    sent: Place = START
    received: Place = START
    acked: Place = START
    everyone: str = ""


@attrs.define(eq=False, kw_only=True)
class History:
    """What was published to one owner. Times are Redis's, in ms."""

    owner: Owner
    epoch: str = ""
    """Empty before it has begun, or once nobody knows its name any more."""
    begun: bool = False
    seq: int = 0
    base: int = 0
    """The epoch begins behind this seq."""
    last: Place = START
    trimmed: int = 0
    even: int = 0
    """When (µs) a whole minute's worth may be published again; 0 if that was never limited."""
    channel: str = ""
    received: Place | None = None
    """Up to where some device has received everything; None before the first."""
    notes: list[Note] = attrs.Factory(list)
    """All that had a place in this epoch, by seq, also those that are gone."""
    box: list[Note | Update] = attrs.Factory(list)
    """What is there, oldest first."""
    fresh: list[Note | Update] = attrs.Factory(list)
    """What was added last and has no place yet."""
    newest: Note | Update | None = None
    remembers: bool = False
    """Whether there is an inbox, even an empty one: it knows which place was the last."""
    timeline: set[Place] = attrs.Factory(lambda: {START})
    """All places that were given out in this epoch."""
    undone: dict[Place, Place] = attrs.Factory(dict)
    """Places that failovers have undone, and the last place before what was undone."""
    records: dict[str, Record] = attrs.Factory(dict)
    repeatable: dict[str, tuple[bytes, Accepted]] = attrs.Factory(dict)
    """By idempotency key: what was published, and the answer."""
    collapsible: dict[str, Note] = attrs.Factory(dict)
    """By collapse key."""

    @property
    def name(self) -> str:
        """Return the owner as keys and events name it."""
        return "all" if self.owner is None else self.owner

    @property
    def unread(self) -> int:
        """How many are there, neither read nor over; nobody counts for everyone."""
        if self.owner is None:
            return 0
        return sum(note.state not in OVER for note in self.notes)

    def point(self, at: Place) -> str:
        """Return a place as readers keep it."""
        return f"{self.epoch}.{show(at)}"

    def open(self) -> None:
        """Begin an epoch if there is none: what is still there stays, the rest is forgotten."""
        if self.begun:
            return
        self.begun = True
        self.epoch = ""
        if not self.remembers:
            self.seq, self.last = 0, START
        self.channel = ""
        self.even = 0
        self.received = None
        self.newest = None
        there = [entry for entry in self.box if isinstance(entry, Note)]
        self.base = there[0].seq - 1 if there else self.seq
        self.notes = [note for note in self.notes if note.seq > self.base] if there else []
        self.trimmed = 0
        self.undone = {}
        self.timeline = {START, self.last, *(entry.place for entry in self.box)}

    def wait(self, rate: int, now: int) -> int:
        """Return for how long (µs) one more at ``now`` is too much; 0 if it is taken.

        Each one is to be made up for, which takes its part of a minute. Nobody owes more than a
        minute, unless the clock has gone back; if it was by more than a minute, that is forgiven.
        """
        owed = max(0, self.even - now)
        if owed > FORGIVEN:
            owed = 0
        return max(0, owed + cost_of_one(rate) - MINUTE)

    def post(self, note: Note, room: int, now: int) -> None:
        """Put ``note`` into the history, which then has at most ``room`` entries."""
        older = self.collapsible.get(note.collapse_key or "")
        if older is not None and RANK.get(older.state, 9) < RANK["received"]:
            self.withdraw(older, f"collapsed by {note.id}")
        if note.collapse_key:
            self.collapsible[note.collapse_key] = note
        self.trim(room - 1)
        self.seq += 1
        note.watched = True
        if note.fallback_after:
            note.fallback_at = note.expires - note.ttl + note.fallback_after
        note.place = (now, self.seq * PER_SEQ)
        self.notes.append(note)
        self._append(note)

    def trim(self, room: int) -> None:
        """Let the oldest entries go until at most ``room`` are left."""
        excess = max(0, len(self.box) - room)
        for entry in self.box[:excess]:
            if isinstance(entry, Note):
                self._finish(entry, "expired", "trimmed")
                entry.gone = "trimmed"
                self.trimmed = entry.seq
        del self.box[:excess]

    def withdraw(self, note: Note, why: str) -> bool:
        """Take ``note`` back, if it is not too late; return whether it was not."""
        if not self._finish(note, "cancelled", why):
            return False
        if note in self.box or not note.seq:
            self._remove(note)
            note.gone = "withdrawn"
        if note.shown:
            self._announce("cancelled", [note.id])
        return True

    def expire(self, note: Note) -> None:
        """Let ``note`` go, because its time is over."""
        ended = self._finish(note, "expired", "")
        note.gone = "expired"
        self._remove(note)
        if ended and note.shown:
            self._announce("expired", [note.id])

    def read(self, notes: Sequence[Note]) -> int:
        """Mark ``notes`` as read where that is possible; return how many were."""
        changed = [note for note in notes if note.state not in OVER and note.seq]
        for note in changed:
            # Who has read it, has received it.
            note.state = "read"
            note.tell("received")
            note.tell("read")
        if changed:
            self._announce("read", [note.id for note in changed])
        return len(changed)

    def report(
        self, device: str, *, sent: str, received: str, acked_seq: int, acked: Note | None
    ) -> Record:
        """Take note of how far a device is; return what is known of it now."""
        record = self.records.get(device)
        if record is None or record.epoch != self.epoch:
            everyone = record.everyone if record else ""
            record = self._placed(self.received or START, everyone)
            self.records[device] = record
        before = attrs.evolve(record)
        record.received = self._advanced(received, record.received)
        record.sent = max(self._advanced(sent, record.sent), record.received)
        record.acked = self._acknowledged(record, acked_seq, acked)
        record.received = max(record.received, record.acked)
        for note in self.box:
            if isinstance(note, Note) and note.place <= record.sent:
                self._arrived(note, before, record, device)
        if record.received > (self.received or START):
            self.received = record.received
        return record

    def _placed(self, at: Place, everyone: str = "") -> Record:
        return Record(epoch=self.epoch, sent=at, received=at, acked=at, everyone=everyone)

    def _advanced(self, point: str, otherwise: Place) -> Place:
        epoch, _, at = point.partition(".")
        if epoch != self.epoch or place_of(at) > self.last:
            return otherwise
        return max(place_of(at), otherwise)

    def _acknowledged(self, record: Record, seq: int, note: Note | None) -> Place:
        """Everything up to this, as far as it was sent."""
        acked = record.acked
        if note is not None:
            acked = max(acked, min(note.place, record.sent))
        if seq > seq_of(acked):
            later = [one for one in self.box if isinstance(one, Note) and one.seq > seq]
            reached = record.sent
            if later and later[0].place <= record.sent:
                reached = (later[0].place[0], later[0].place[1] - 1)
                self.timeline.add(reached)
            acked = max(acked, reached)
        return acked

    @staticmethod
    def _arrived(note: Note, before: Record, after: Record, device: str) -> None:
        for kind in ("sent", "received", "acked"):
            if not getattr(before, kind) < note.place <= getattr(after, kind):
                continue
            if kind == "sent":
                note.attempts.setdefault(device, 1)
            else:
                note.receivers.add(device)
            if note.state in OVER:
                continue
            if kind != "sent":
                note.tell("received")
            if kind == "acked":
                note.tell("acked")
            if RANK[note.state] < RANK[kind]:
                note.state = kind

    def connect(self, device: str, start: Place, *, elsewhere: bool) -> None:
        """A device with a name has come: it stays known, and where it began."""
        record = self.records.get(device)
        if record is None or elsewhere:
            everyone = record.everyone if record else ""
            self.records[device] = self._placed(start, everyone)

    def vanish(self) -> None:
        """Lose all that is there at once, and its order."""
        for entry in self.box:
            if isinstance(entry, Note):
                entry.gone = "vanished"
        self.box.clear()
        self.remembers = False

    def undo(self, later: "History") -> None:
        """Go on from here, though ``later`` was already known."""
        if later.epoch == self.epoch:
            forks = [(at, self.last) for at in later.timeline - self.timeline]
            for at, fork in [*forks, *later.undone.items()]:
                self.undone[at] = min(fork, self.last, self.undone.get(at, fork))

    def _finish(self, note: Note, state: str, why: str) -> bool:
        note.watched, note.fallback_at = False, 0
        if note.state in OVER:
            return False
        note.shown |= note.state != "accepted"
        note.state, note.why = state, why
        note.tell(state)
        return True

    def _remove(self, note: Note) -> None:
        if note in self.box:
            self.box.remove(note)

    def _announce(self, state: str, ids: list[str]) -> None:
        for first in range(0, len(ids), IDS_PER_UPDATE):
            some = ids[first : first + IDS_PER_UPDATE]
            newest = self.newest
            if (
                isinstance(newest, Update)
                and newest in self.box
                and newest.state == state
                and len(newest.ids) + len(some) <= IDS_PER_UPDATE
            ):
                self.box.remove(newest)
                some = newest.ids + some
            self._append(Update(state=state, ids=some))

    def _append(self, entry: Note | Update) -> None:
        self.remembers = True
        self.box.append(entry)
        self.fresh.append(entry)
        self.newest = entry


class World:
    """Everything that was published, and what became of it."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        self.histories = {owner: History(owner=owner) for owner in owners}
        self.notes: dict[str, Note] = {}

    def copy(self) -> "World":
        """Return what a replica knows that hears no more from now on."""
        return copy.deepcopy(self)

    def schedule(self, owners: Container[Owner]) -> dict[str, int]:
        """Return what is on the schedule of these owners, and when it is due."""
        members: dict[str, int] = {}
        for note in self.notes.values():
            if note.owner not in owners:
                continue
            if note.watched:
                members[f"x:{note.id}"] = note.expires
            if note.fallback_at:
                members[f"f:{note.id}"] = note.fallback_at
            if note.deliver_at:
                members[f"d:{note.id}"] = note.deliver_at
        return members

    def settle(self, member: str, room: int, now: int) -> None:
        """Do what was due under this name."""
        note = self.notes[member[2:]]
        history = self.histories[note.owner]
        history.open()
        if member.startswith("x"):
            history.expire(note)
        elif member.startswith("f"):
            note.fallback_at = 0
            if RANK.get(note.state, 9) < RANK["received"]:
                note.tell("undelivered")
        else:
            note.deliver_at = 0
            if note.expires <= now:  # nobody has come by for that long
                note.state = "expired"
                note.tell("expired")
            else:
                history.post(note, room, now)

    def forget(self) -> None:
        """Forget everything."""
        self.histories = {owner: History(owner=owner) for owner in self.histories}
        self.notes = {}
