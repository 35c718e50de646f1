"""Everything that is in Redis, held against the model of the ledger's promises."""

import json
from collections.abc import Collection, Sequence
from typing import Final

import attrs

from tests.trioserver.ledger_calls import Heard
from tests.trioserver.ledger_keys import Look
from tests.trioserver.ledger_promises import (
    MAX_DEVICES,
    OVER,
    START,
    History,
    Note,
    Owner,
    Update,
    World,
    place_of,
    show,
)
from trioserver import ledger

DAY: Final = 86_400_000
LONGEST: Final = 61 * DAY
"""Scheduled for in 30 days, and there for 30 more; a day more, so that it can be asked about."""

UNNOTICED: Final = 45 * DAY
"""By so much longer may a key be there whose end nobody has noticed."""

REMEMBERED: Final = 30 * DAY
"""A device that was away for longer is forgotten."""

KINDS: Final = {
    "meta": "hash",
    "inbox": "stream",
    "holes": "hash",
    "cursors": "hash",
    "idem": "string",
    "collapse": "string",
    "n": "hash",
    "due": "zset",
    "events": "stream",
}
WITHOUT_END: Final = frozenset({"due", "events"})
"""Keys that have a bound instead of a lifetime."""


def home(owner: Owner) -> str:
    """Return the owner's partition."""
    return "all" if owner is None else ledger.partition(owner)


def owned(kind: str, owner: Owner, key: str) -> str:
    """Return the name of what belongs to an owner and a publisher's key."""
    return f"{ledger.key(kind, owner)}:{ledger.encoded(key)}"


def usual_channel(owner: Owner) -> str:
    """Return where workers listen if nobody says otherwise."""
    return "channels:broadcast" if owner is None else f"user_noti:{owner}"


@attrs.frozen(kw_only=True)
class Comparison:
    """Redis and the model after one step."""

    world: World
    look: Look
    heard: Sequence[Heard] | None
    """What was published in this step; None if nobody listened."""
    before: int
    """Redis's time (ms) before the step."""
    after: int
    devices: Collection[str]
    """Names of the devices to look at; empty is the one without."""

    def compare(self) -> None:
        """Compare everything, and tell the model which places new entries have got."""
        unheard = list(self.heard or ())
        for history in self.world.histories.values():
            if not history.begun:
                assert {} == self.look.fields(ledger.key("meta", history.owner))
                continue
            channel = history.channel or usual_channel(history.owner)
            mine = [one for one in unheard if one.channel == channel]
            unheard = [one for one in unheard if one.channel != channel]
            self._compare_inbox(history)
            if self.heard is not None:
                self._compare_envelopes(history, mine)
            self._place_fresh(history)
            self._compare_meta(history)
            self._compare_records(history)
        assert [] == unheard
        for note in self.world.notes.values():
            self._compare_life(note)
        for where in {home(owner) for owner in self.world.histories}:
            owners = [owner for owner in self.world.histories if home(owner) == where]
            assert self.world.schedule(owners) == self.look.scores(ledger.due_key(where))
            self._compare_events(where)
        self._compare_keys()

    def _compare_inbox(self, history: History) -> None:
        """What is there is what the model says, in its order."""
        entries = self.look.entries(ledger.key("inbox", history.owner))
        there: list[object] = []
        for found in entries:
            state, ids = found.fields.get("u", b"").decode(), found.fields["i"].decode()
            there.append((state, ids.split()) if state else ids)
        assert [_shape(entry) for entry in history.box] == there
        for entry, found in zip(history.box, entries, strict=True):
            if entry in history.fresh:
                entry.place = place_of(found.place)

    @staticmethod
    def _compare_envelopes(history: History, heard: Sequence[Heard]) -> None:
        """Each new entry was announced once, and the announcement says which it follows."""
        assert len(history.fresh) == len(heard)
        previous = history.last
        for entry, envelope in zip(history.fresh, heard, strict=True):
            assert history.point(previous) == envelope.prev
            epoch, _, at = envelope.point.partition(".")
            assert history.epoch == epoch
            previous = entry.place = place_of(at)
            if isinstance(entry, Note):
                entry.shown = True
                payload = json.loads(entry.payload)
                told = (entry.id, entry.type, payload, entry.expires, entry.traceparent)
                assert told == envelope.rest
            else:
                state, ids, by = envelope.rest
                assert (entry.state, entry.ids[-len(ids) :]) == (state, ids)
                assert by == ("me" if state == "read" else "")
            assert envelope.unread >= 0

    def _place_fresh(self, history: History) -> None:
        """What is new came after what was there, and now."""
        for entry in history.fresh:
            if isinstance(entry, Note):
                life = self.look.fields(ledger.notification_key(entry.id) or "")
                entry.place = place_of(life["place"])
            if entry.place == START:
                continue  # it went before anybody could see where it was
            assert history.last < entry.place
            assert self.before <= entry.place[0] <= max(self.after, history.last[0] + 1)
            history.last = entry.place
            history.timeline.add(entry.place)
        history.fresh.clear()

    def _compare_meta(self, history: History) -> None:
        """What is known of the whole is what the model says."""
        meta = self.look.fields(ledger.key("meta", history.owner))
        assert history.epoch == meta["epoch"]
        assert history.seq == int(meta["seq"])
        assert show(history.last) == meta["last"]
        assert history.unread == int(meta["unread"])
        assert history.even == int(meta.get("pace", 0))

    def _compare_records(self, history: History) -> None:
        """Each device is as far as the model says; no more devices are known than may be."""
        fields = self.look.fields(ledger.key("cursors", history.owner))
        known = {name[2:]: value for name, value in fields.items() if name.startswith("d:")}
        assert len(known) <= MAX_DEVICES
        for device in self.devices:
            record, text = history.records.get(device), known.get(device or "-")
            if text is not None and int(text.split()[-1]) < self.after - REMEMBERED:
                text = None  # only not swept out yet
            assert (record is None) == (text is None)
            if record is None or text is None or record.epoch != history.epoch:
                continue
            *places, everyone, _ = text.split()
            if fields["epoch"] == history.epoch:
                assert [show(record.sent), show(record.received), show(record.acked)] == places
            assert (record.everyone or "-") == everyone

    def _compare_life(self, note: Note) -> None:
        """A notification's state is the model's, and so is who has received it."""
        life = self.look.fields(ledger.notification_key(note.id) or "")
        assert (note.state, note.why) == (life["state"], life.get("why", ""))
        assert note.expires == int(life["expires"])
        receivers = {name[2:] for name in life if name.startswith("r:")}
        assert {device or "-" for device in note.receivers} == receivers
        if note.seq:
            assert (note.seq, show(note.place)) == (int(life["seq"]), life["place"])

    def _compare_events(self, where: str) -> None:
        """Each kind of event at most once for each notification, and in order."""
        told: dict[str, list[str]] = {}
        for entry in self.look.entries(ledger.events_key(where)):
            name = entry.fields["id"].decode()
            told.setdefault(name, []).append(entry.fields["event"].decode())
        notes = [note for note in self.world.notes.values() if home(note.owner) == where]
        assert {note.id: note.events for note in notes} == told

    def _compare_keys(self) -> None:
        """No key is a stranger, and none is there for ever."""
        lives = {ledger.notification_key(note.id): note for note in self.world.notes.values()}
        expected = self._expected_keys()
        for key, kind in self.look.kinds.items():
            assert key in expected or key in lives
            name = key.split(":")[2]
            assert KINDS[name] == kind
            lifetime = self.look.lifetimes[key]
            assert (lifetime == -1) == (name in WITHOUT_END)
            assert lifetime <= LONGEST + UNNOTICED
            note = lives.get(key)
            if note is not None and not note.gone and note.state not in OVER - {"read"}:
                assert self.after + lifetime >= note.expires

    def _expected_keys(self) -> set[str]:
        expected: set[str] = set()
        for owner, history in self.world.histories.items():
            expected |= {ledger.due_key(home(owner)), ledger.events_key(home(owner))}
            expected |= {ledger.key(kind, owner) for kind in ("meta", "inbox", "holes", "cursors")}
            expected |= {owned("idem", owner, key) for key in history.repeatable}
            expected |= {owned("collapse", owner, key) for key in history.collapsible}
        return expected


def _shape(entry: Note | Update) -> object:
    """Return what can be seen of an entry."""
    return entry.id if isinstance(entry, Note) else (entry.state, entry.ids)
