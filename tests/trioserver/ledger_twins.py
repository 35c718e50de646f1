"""The ledger and the model of its promises, side by side.

Whatever is done is done to both, and after each step all that is in Redis is held against the
model. Time does not pass in here: what shall have expired or become due is made so in Redis, as
if much time had passed, and everything else stays far from its moment.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import attrs
import msgspec
import pytest

from tests.redis_server import RedisServer
from tests.trioserver.ledger_calls import Caller, Ears
from tests.trioserver.ledger_comparison import DAY, Comparison, home, owned, usual_channel
from tests.trioserver.ledger_keys import Copy, Look, age
from tests.trioserver.ledger_promises import (
    FORGIVEN,
    IDS_PER_UPDATE,
    MAX_DEVICES,
    START,
    History,
    Note,
    Owner,
    Place,
    World,
    cost_of_one,
    place_of,
    seq_of,
    show,
)
from tests.trioserver.ledger_readers import Reading, beginning
from trioserver import ledger
from trioserver.ledger import Notification, Page, Rules

USERS: Final = ("ann", "bob70", "ü b:{%}*")
"""The first two share a partition; the last has what names of keys must not have."""

OWNERS: Final[tuple[Owner, ...]] = (*USERS, None)
DEVICES: Final = ("a", "b", "c-ü", "")

FAR: Final = DAY
"""When what is scheduled is due (ms from now)."""

SKEW: Final = 20_000
"""How far a clock goes back (ms)."""

ENOUGH: Final = 100_000
"""Events that are kept: all of them."""


class Stage:
    """A Redis that many runs share, and the two connections to it."""

    def __init__(self, directory: Path) -> None:
        # Otherwise a killed Redis may lack the last second.
        self.server = RedisServer(directory, config={"appendfsync": "always"})
        self.server.start()
        self._connect()

    def reset(self) -> None:
        """Empty it, for another run."""
        self.caller.ask("FLUSHALL")
        self.ears.listen()
        self.ears.heard()

    def restart(self) -> None:
        """Kill Redis and start it again."""
        self._disconnect()
        self.server.kill()
        self.server.start()
        self._connect()

    def end(self) -> None:
        """Kill Redis."""
        self._disconnect()
        self.server.kill()

    def _connect(self) -> None:
        self.caller = Caller(self.server.path)
        self.ears = Ears(self.server.path)

    def _disconnect(self) -> None:
        self.caller.close()
        self.ears.close()


@attrs.frozen(kw_only=True)
class Reader:
    """Who reads, and how."""

    owner: Owner
    device: str = "a"
    point: str = ""
    garbage: bool = False
    ack: bool = False
    head: bool = False
    limit: int = 5
    size: int = 10_000
    pages: int = 2
    usual: bool = True
    """Whether its worker listens where workers usually do."""


class Twins:
    """A ledger and its model: what is done to one is done to the other."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.reset()
        self.world = World(OWNERS)
        self.seen: dict[Owner, list[str]] = {owner: [] for owner in OWNERS}
        """All points that anybody ever got, also those that a failover has undone."""
        self.listening = True
        self.copy: tuple[Copy, World] | None = None
        self.soon = stage.caller.now() + FAR // 2
        """Lies between what is due and what is not, however long this takes."""
        self._past = stage.caller.now() - FAR
        self._epochs: set[str] = set()
        self._crowds = 0

    @property
    def caller(self) -> Caller:
        """The connection for scripts."""
        return self.stage.caller

    def history(self, owner: Owner) -> History:
        """Return the model's history of one owner."""
        return self.world.histories[owner]

    # --- publishers ------------------------------------------------------------------------------

    def note(self, owner: Owner, *, later: int = 0, **fields: object) -> Note:
        """Return a new notification, to be delivered in ``later`` ms."""
        now = self.caller.now()
        given: dict[str, object] = {"payload": b"1", "type": "notification", "ttl": DAY} | fields
        return Note(
            id=ledger.new_id(home(owner), now),
            owner=owner,
            deliver_at=now + later if later else 0,
            **given,  # type: ignore[arg-type] # as the fields are declared
        )

    def publish(
        self,
        note: Note,
        *,
        repeat: str | None = None,
        room: int = 5,
        rate: int = 0,
        priority: bool = False,
    ) -> None:
        """Publish, perhaps with an idempotency key that was used before, perhaps too much."""
        history = self.history(note.owner)
        command = _publishing(note, repeat, room, rate=rate, priority=priority)
        counted = 0 if priority or note.owner is None or repeat in history.repeatable else rate
        before, began = self.caller.now(), self._micros()
        first = history.repeatable.get(repeat or "")
        if first is not None and first[0] != _fingerprint(note):
            with pytest.raises(RuntimeError, match=f"^{ledger.REUSED_KEY}"):
                self.caller.run(command)
            self.compare(before)
            return
        try:
            answer = ledger.accepted(self.caller.run(command))
        except RuntimeError as refusal:
            self._check_wait(history, counted, began, str(refusal))
            self.compare(before)
            return
        if first is not None:
            assert msgspec.structs.replace(first[1], outcome="duplicate") == answer
            self.compare(before)
            return
        history.open()
        if counted:
            self._count(history, counted, began)
        self.world.notes[note.id] = note
        if repeat:
            history.repeatable[repeat] = (_fingerprint(note), answer)
        self._accept(note, room, before)
        self.compare(before)
        outcome = "scheduled" if note.deliver_at else "accepted"
        assert (note.id, note.seq, outcome) == (answer.id, answer.seq, answer.outcome)
        assert _last_place(answer.position) == (show(note.place) if note.seq else "")

    def publish_again(self, note: Note) -> None:
        """Publish what was published, with its id: the outcome was not heard."""
        before = self.caller.now()
        self.history(note.owner).open()
        answer = ledger.accepted(self.caller.run(_publishing(note, None, 4, rate=1)))
        assert (note.id, "duplicate", note.seq) == (answer.id, answer.outcome, answer.seq)
        assert _last_place(answer.position) == (show(note.place) if note.seq else "")
        self.compare(before)

    def flood(self, user: str) -> None:
        """Publish and read more at once than an update has room for."""
        history = self.history(user)
        history.open()
        before = self.caller.now()
        for _ in range(IDS_PER_UPDATE + 2):
            note = self.note(user)
            self.caller.run(_publishing(note, None, 200))
            self.world.notes[note.id] = note
            self._accept(note, 200, before)
        self.compare(before)
        self.read(user, "a", up_to=history.seq)

    def withdraw(self, note: Note, owner: Owner) -> None:
        """Cancel what may be the owner's, or somebody else's."""
        history = self.history(owner)
        before = self.caller.now()
        if owner != note.owner:
            expected = "unknown"
        elif note.state in {"read", "expired", "cancelled"}:
            expected = "too late"
        else:
            expected = "cancelled"
            history.open()
            history.withdraw(note, "cancelled")
            note.deliver_at = 0
        command = ledger.cancel(owner, note.id, rules=_rules(4))
        assert expected == ledger.cancelled(self.caller.run(command))
        self.compare(before)

    def _check_wait(self, history: History, rate: int, began: int, refusal: str) -> None:
        """One more was refused: it was one too many, and the answer says for how long it is."""
        assert rate
        assert refusal.startswith(ledger.RATE_LIMITED)
        told = int(refusal.split()[1])
        least = history.wait(rate, self._micros()) / 1000
        assert max(1, least) <= told <= history.wait(rate, began) / 1000 + 1

    def _count(self, history: History, rate: int, began: int) -> None:
        """One more was accepted: it was none too many; learn when it is made up for."""
        latest = self._micros()
        assert 0 == history.wait(rate, latest)
        even = int(self.caller.ask("HGET", ledger.key("meta", history.owner), "pace"))
        owed = history.even if history.even <= latest + FORGIVEN else 0
        cost = cost_of_one(rate)
        assert max(owed, began) + cost <= even <= max(owed, latest) + cost
        history.even = even

    def _micros(self) -> int:
        """Return Redis's own time in µs: in a ms two notifications may have been published."""
        seconds, micros = self.caller.ask("TIME")
        return int(seconds) * 1_000_000 + int(micros)

    def _accept(self, note: Note, room: int, before: int) -> None:
        life = self.caller.ask("HGET", ledger.notification_key(note.id) or "", "expires")
        note.expires = int(life)
        latest = max(self.caller.now(), note.deliver_at) + note.ttl
        assert max(before, note.deliver_at) + note.ttl <= note.expires <= latest
        if not note.deliver_at:
            self.history(note.owner).post(note, room, before)
        note.tell("accepted")

    # --- devices ---------------------------------------------------------------------------------

    def come(self, reader: Reader) -> Place:
        """Connect, read so many pages, and return the place that was reached."""
        history = self.history(reader.owner)
        before = self.caller.now()
        history.open()
        channel = usual_channel(reader.owner) if reader.usual else f"x:{history.name}"
        command = ledger.read(
            reader.owner,
            device=reader.device,
            point=reader.point,
            garbage=reader.garbage,
            connect=True,
            ack=reader.ack,
            head=reader.head and reader.owner is None,
            channel=channel,
            nonce=f"nonce{len(self._epochs):03d}",
            limit=reader.limit,
            max_bytes=reader.size,
        )
        page = ledger.page(self.caller.run(command))
        history.channel = channel
        self._learn_epoch(history, page.epoch)
        record = history.records.get(reader.device)
        assert (record.everyone if record else "") == page.all_point
        elsewhere = self._check(page, reader, before)
        if reader.device and reader.owner is not None:
            history.connect(reader.device, place_of(page.start), elsewhere=elsewhere)
        self.compare(before)
        for _ in range(reader.pages - 1):
            if page.more:
                page = self._turn(page, reader)
        return place_of(page.reached)

    def _turn(self, page: Page, reader: Reader) -> Page:
        """Read the next page, from where the last one ended."""
        point = f"{page.epoch}.{page.reached}"
        reader = attrs.evolve(reader, point=point, garbage=False)
        before = self.caller.now()
        command = ledger.read(
            reader.owner,
            device=reader.device,
            point=point,
            limit=reader.limit,
            max_bytes=reader.size,
        )
        following = ledger.page(self.caller.run(command))
        assert place_of(following.reached) > place_of(page.reached)
        assert not self._check(following, reader, before)
        self.compare(before)
        return following

    def _check(self, page: Page, reader: Reader, now: int) -> bool:
        """Hold a page against what this reader is promised; return whether it is elsewhere."""
        history = self.history(reader.owner)
        begin = beginning(
            history,
            device=reader.device,
            point=reader.point,
            garbage=reader.garbage,
            ack=reader.ack,
            head=reader.head and reader.owner is None,
        )
        reading = Reading(history, page, begin, now)
        reading.check(reader.device)
        self._remember(history, place_of(page.start), place_of(page.reached))
        return reading.elsewhere

    def crowd(self, user: str) -> None:
        """Let more devices come than are kept: those that were seen longest ago are forgotten."""
        history = self.history(user)
        history.open()
        self._crowds += 1
        before = self.caller.now()
        self.caller.wait_past(before)
        for number in range(MAX_DEVICES + 1):
            reader = Reader(owner=user, device=f"crowd-{self._crowds}-{number}")
            command = ledger.read(user, device=reader.device, connect=True, limit=1)
            page = ledger.page(self.caller.run(command))
            self._learn_epoch(history, page.epoch)
            self._check(page, reader, before)
        self.caller.wait_past(self.caller.now())
        history.records.clear()
        known = self.caller.ask("HKEYS", ledger.key("cursors", user))
        assert MAX_DEVICES == sum(name.startswith(b"d:") for name in known)
        self.compare(before)

    def report(
        self,
        user: str,
        device: str,
        *,
        sent: str = "",
        received: str = "",
        acked_seq: int = 0,
        acked: Note | None = None,
        everyone: str = "",
    ) -> None:
        """Say how far a device is."""
        history = self.history(user)
        history.open()
        before = self.caller.now()
        command = ledger.report(
            user,
            rules=_rules(4),
            device=device,
            sent=sent,
            received=received,
            acked_seq=acked_seq,
            acked_id=acked.id if acked else "",
            all_point=everyone,
        )
        reply = self.caller.run(command)
        self._learn_epoch(history)
        own = acked if acked and acked.owner == user else None
        record = history.report(
            device, sent=sent, received=received, acked_seq=acked_seq, acked=own
        )
        if everyone:
            record.everyone = _further(record.everyone, everyone)
        assert seq_of(record.acked) == ledger.acked(reply)
        self.compare(before)

    def read(
        self,
        user: str,
        device: str,
        *,
        notes: Sequence[Note] = (),
        up_to: int = 0,
        last: Note | None = None,
    ) -> None:
        """Mark as read what is the user's: these, and all up to a seq or to one of them."""
        history = self.history(user)
        history.open()
        before = self.caller.now()
        command = ledger.mark(
            user,
            rules=_rules(4),
            device=device,
            by="me",
            ids=[note.id for note in notes],
            up_to=up_to,
            up_to_id=last.id if last else "",
        )
        reply = self.caller.run(command)
        if last is not None and last.owner == user:
            up_to = max(up_to, last.seq)
        wanted = [note for note in notes if note.owner == user]
        wanted += [note for note in history.box if isinstance(note, Note) and note.seq <= up_to]
        count = history.read(list(dict.fromkeys(wanted)))
        assert (history.unread, count) == ledger.marked(reply)
        self.compare(before)

    def stay_away(self, user: str) -> None:
        """All devices of a user that are known were away for longer than they are remembered."""
        before = self.caller.now()
        key = ledger.key("cursors", user)
        for field, value in Look(self.caller).fields(key).items():
            if field.startswith("d:"):
                *places, seen = value.split(" ")
                self.caller.ask("HSET", key, field, " ".join([*places, f"{int(seen) - 31 * DAY}"]))
        self.history(user).records.clear()
        self.compare(before)

    def listen(self) -> None:
        """Let workers come, or go: somebody hears what is published, or nobody does."""
        self.listening = not self.listening
        if self.listening:
            self.stage.ears.listen()
        else:
            self.stage.ears.unlisten()

    # --- time ------------------------------------------------------------------------------------

    def rest(self, user: str, seconds: int) -> None:
        """Let so much time pass in which nothing is published to a user."""
        history = self.history(user)
        before = self.caller.now()
        if history.even:
            history.even -= seconds * 1_000_000
            self.caller.ask("HSET", ledger.key("meta", user), "pace", history.even)
        self.compare(before)

    def age(self, note: Note) -> None:
        """Let a notification that is there have expired, and what ends with it."""
        if note.expires < self.soon:
            return
        note.expires = self._long_ago()
        age(self.caller, note.owner, note.id, note.expires)
        collapsible = self.history(note.owner).collapsible
        for key in [key for key, latest in collapsible.items() if latest is note]:
            del collapsible[key]
            self.caller.ask("DEL", owned("collapse", note.owner, key))

    def fall_due(self, note: Note, *, too_late: bool) -> None:
        """Let the moment come for which something was scheduled, or be long past."""
        kind = "d" if note.deliver_at > self.soon else "f"
        moment = self._long_ago()
        self.caller.ask("ZADD", ledger.due_key(home(note.owner)), moment, f"{kind}:{note.id}")
        if kind == "f":
            note.fallback_at = moment
            return
        note.deliver_at = moment
        if too_late:
            note.expires = self._long_ago()
            life = ledger.notification_key(note.id) or ""
            self.caller.ask("HSET", life, "expires", note.expires)

    def settle(self, where: str, *, limit: int, room: int) -> None:
        """Do what is due in a partition."""
        before = self.caller.now()
        self.caller.wait_past(before)
        waiting = sorted((at, member) for member, at in self.schedule(where).items())
        now = [member for at, member in waiting if at <= before][:limit]
        for member in now:
            self.world.settle(member, room, before)
            if self.listening and member.startswith("d"):
                # What collapses into the next one of the same call has been announced by then.
                note = self.world.notes[member[2:]]
                note.shown |= note.seq > 0
        reply = self.caller.run(ledger.due(where, rules=_rules(room), limit=limit))
        done, wait = ledger.settled(reply)
        assert len(now) == done
        following = min(self.schedule(where).values(), default=None)
        if following is None:
            assert wait == -1
        else:
            assert max(0, following - self.caller.now()) <= wait <= max(0, following - before)
        self.compare(before)

    def schedule(self, where: str) -> dict[str, int]:
        """Return what is on a partition's schedule, and when it is due."""
        return self.world.schedule([owner for owner in OWNERS if home(owner) == where])

    def _long_ago(self) -> int:
        """Return a moment that has passed, later than the one before.

        So what is due is due in the order in which it became so, and not by chance.
        """
        self._past += 1
        return self._past

    # --- accidents -------------------------------------------------------------------------------

    def vanish(self, owner: Owner, *, evicted: bool) -> None:
        """All have expired long ago and Redis lets go of the inbox; or it does so of its own."""
        history = self.history(owner)
        before = self.caller.now()
        for note in [] if evicted else history.box:
            if isinstance(note, Note):
                self.age(note)
        if history.begun and not evicted:
            self.caller.ask("HSET", ledger.key("meta", owner), "ends", self._past)
        self.caller.ask("DEL", ledger.key("inbox", owner))
        history.vanish()
        self.compare(before)

    def lose(self, owner: Owner, *, inbox: bool) -> None:
        """Redis has lost what it knew of somebody, with or without the notifications."""
        history = self.history(owner)
        before = self.caller.now()
        # What is from before an epoch is told by its time. A clock that went back as well, at
        # the same time, is a second catastrophe, which is not provided for.
        if not history.begun or history.last[0] > before + SKEW // 2:
            return
        self.caller.wait_past(before + 5)
        self.caller.ask("DEL", ledger.key("meta", owner))
        history.begun = False
        if inbox:
            self.caller.ask("DEL", ledger.key("inbox", owner))
            history.vanish()
        self.compare(before)

    def turn_clock_back(self, owner: Owner) -> None:
        """The clock goes back, which is: what there is was written in the future."""
        history = self.history(owner)
        if not history.begun or not history.remembers:
            return
        before = self.caller.now()
        history.last = (max(history.last[0], before) + SKEW, history.last[1])
        history.timeline.add(history.last)
        history.newest = None
        self.caller.ask("XSETID", ledger.key("inbox", owner), show(history.last))
        self.caller.ask("HSET", ledger.key("meta", owner), "last", show(history.last))
        if history.even:
            history.even += SKEW * 1000
            self.caller.ask("HSET", ledger.key("meta", owner), "pace", history.even)
        self.compare(before)

    def flush(self) -> None:
        """Redis has lost everything."""
        self.caller.wait_past(self.caller.now() + 5)
        self.caller.ask("FLUSHALL")
        self.world.forget()
        self.copy = None

    def replicate(self) -> None:
        """A replica hears the last of its master."""
        self.copy = (Copy(self.caller), self.world.copy())

    def fail_over(self) -> None:
        """The replica takes over: what came later has never been."""
        assert self.copy is not None
        copy, world = self.copy
        before = self.caller.now()
        # No failover is that fast: places of before and after differ in time.
        self.caller.wait_past(before + 5)
        copy.restore(self.caller)
        undone, self.world = self.world, world.copy()
        for owner, history in self.world.histories.items():
            history.undo(undone.histories[owner])
        self.compare(before)

    def kill(self) -> None:
        """Redis is killed and starts again: nothing is lost, only the scripts."""
        before = self.caller.now()
        self.stage.restart()
        if not self.listening:
            self.stage.ears.unlisten()
        self.compare(before)

    # --- what must hold --------------------------------------------------------------------------

    def compare(self, before: int) -> None:
        """Hold everything against the model, after a step that began at ``before`` (ms)."""
        for history in self.world.histories.values():
            if history.begun:
                self._learn_epoch(history)
        fresh = {owner: list(self.history(owner).fresh) for owner in OWNERS}
        Comparison(
            world=self.world,
            after=self.caller.now(),
            look=Look(self.caller),
            heard=self.stage.ears.heard() if self.listening else None,
            before=before,
            devices=DEVICES,
        ).compare()
        for owner, entries in fresh.items():
            self._remember(self.history(owner), *(entry.place for entry in entries))

    def _learn_epoch(self, history: History, name: str | None = None) -> None:
        """Learn how a new epoch is called; none has ever been called so."""
        if history.epoch:
            return
        if name is None:
            name = self.caller.ask("HGET", ledger.key("meta", history.owner), "epoch").decode()
        assert 1 <= len(name) <= 16
        assert name not in self._epochs
        self._epochs.add(name)
        history.epoch = name

    def _remember(self, history: History, *places: Place) -> None:
        """Keep points that somebody got, or may have got."""
        points = self.seen[history.owner]
        for at in places:
            point = history.point(at)
            if at != START and point not in points[-3:]:
                points.append(point)


def _rules(room: int, rate: int = 0) -> Rules:
    return Rules(max_length=room, events_max_length=ENOUGH, rate=rate)


def _publishing(
    note: Note, repeat: str | None, room: int, *, rate: int = 0, priority: bool = False
) -> ledger.Command:
    notification = Notification(
        user=note.owner,
        payload=note.payload,
        type=note.type,
        ttl_ms=note.ttl,
        id=note.id,
        idempotency_key=repeat,
        collapse_key=note.collapse_key,
        deliver_at_ms=note.deliver_at or None,
        fallback_after_ms=note.fallback_after or None,
        traceparent=note.traceparent,
        priority=priority,
    )
    return ledger.publish(notification, rules=_rules(room, rate))


def _fingerprint(note: Note) -> bytes:
    """Return what must be the same if an idempotency key is used again."""
    return note.type.encode() + b"\n" + note.payload


def _last_place(position: str) -> str:
    """Return the place in a position of one stream; empty if it is empty."""
    return position.rpartition(".")[2]


def _further(one: str, other: str) -> str:
    """Return the later point, or the other one if they are of different epochs."""
    if one.partition(".")[0] != other.partition(".")[0]:
        return other
    return max(one, other, key=place_of)
