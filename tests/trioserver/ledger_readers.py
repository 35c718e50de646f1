"""What the ledger promises its readers: from where they are served, and what is on a page.

A page accounts for every seq between its two ends: it is delivered, or it is in a gap that says
exactly how many are missing, or it was withdrawn on purpose.
"""

import attrs

from tests.trioserver.ledger_promises import (
    START,
    History,
    Note,
    Place,
    Update,
    place_of,
    seq_of,
)
from trioserver.ledger import Change, Gap, Item, Notice, Page


@attrs.frozen(kw_only=True)
class Begin:
    """From where a reader has to be served."""

    place: Place
    gap: str = ""
    """Reason of the gap that has to be announced first, whatever is there."""
    perhaps: str = ""
    """Reason of the gap that may be announced first."""
    fork: Place | None = None
    """If the place was undone by a failover: where what is there now begins to differ."""
    known: bool = True
    """Whether the place is one of this history, so that every number can be exact."""


def beginning(
    history: History,
    *,
    device: str,
    point: str = "",
    garbage: bool = False,
    ack: bool = False,
    head: bool = False,
) -> Begin:
    """Return from where a reader is to be served that says this of itself."""
    if point:
        return _from(history, place_of(point)) if _fits(history, point) else ELSEWHERE
    if garbage:
        return ELSEWHERE
    record = history.records.get(device)
    if record is not None and (device or ack):
        if record.epoch != history.epoch:
            return ELSEWHERE
        return _from(history, record.acked if ack else record.received)
    if history.received is not None:
        return _from(history, history.received)
    return Begin(place=history.last if head else START)


ELSEWHERE = Begin(place=START, gap="epoch")
"""What it knew is not of this epoch: it gets everything."""


def _fits(history: History, point: str) -> bool:
    return point.partition(".")[0] == history.epoch


def _from(history: History, at: Place) -> Begin:
    if at in history.timeline:
        return Begin(place=at)
    # Some place that this history does not have: undone by a failover, or made up. It can be seen
    # that they do not fit if something that came later has a seq which this reader thinks it has,
    # and it must be seen if that is still there.
    seq, fork = seq_of(at), history.undone.get(at)
    twice = [note for note in history.notes if note.place > at and note.seq <= seq]
    hidden = [note for note in history.notes if fork is not None and fork < note.place <= at]
    there = any(note in history.box for note in twice + hidden)
    if at > history.last or seq > history.seq or there:
        return Begin(place=at, gap="failover", fork=fork, known=False)
    perhaps = "failover" if twice or hidden else ""
    return Begin(place=at, perhaps=perhaps, fork=fork, known=False)


class Reading:
    """One page, to be held against the history.

    Args:
        history: As it was when the page was read.
        page: What was read.
        begin: From where it was to be read.
        now: At which time (ms): nothing expires between then and the reading.
    """

    def __init__(self, history: History, page: Page, begin: Begin, now: int) -> None:
        self._history = history
        self._page = page
        self._now = now
        self._items: list[Item] = list(page.items)
        self._start, self._reached = place_of(page.start), place_of(page.reached)
        if begin.perhaps and self._items and getattr(self._items[0], "reason", "") == begin.perhaps:
            begin = attrs.evolve(begin, gap=begin.perhaps)
        self._begin = begin

    @property
    def elsewhere(self) -> bool:
        """Whether the reader does not go on where it was."""
        return bool(self._begin.gap)

    def check(self, device: str) -> None:
        """Hold the page that this device got against all promises."""
        history, page, begin = self._history, self._page, self._begin
        if begin.gap:
            first = self._items.pop(0)
            assert isinstance(first, Gap)
            assert begin.gap == first.reason
            assert first.missing >= 0
            assert 0 <= first.from_seq <= first.to_seq
        self._check_start()
        if begin.known or begin.gap:
            self._check_walk()
        self._check_entries()
        for item in self._items:
            if isinstance(item, Notice):
                self._check_attempt(item, device)
        if not page.more:
            assert history.last == self._reached
        assert (history.epoch, history.unread) == (page.epoch, page.unread)

    def _check_start(self) -> None:
        begin, start = self._begin, self._start
        if begin.known:
            assert begin.place == start
        elif not begin.gap:
            assert start <= begin.place
        elif begin.fork is not None:
            later = [note for note in self._history.box if begin.fork < note.place]
            assert all(start < note.place for note in later), "the new history is not told"

    def _check_walk(self) -> None:
        """Each seq from start to end is there, or missing with the right number, or withdrawn."""
        seq = max(seq_of(self._start), self._history.base)
        for item in self._items:
            if isinstance(item, Notice):
                self._check_withdrawn(seq + 1, item.seq - 1)
                assert item.seq > seq, "out of order"
                seq = item.seq
            elif isinstance(item, Gap):
                self._check_withdrawn(seq + 1, item.from_seq - 1)
                self._check_gap(item, seq)
                seq = item.to_seq
        self._check_withdrawn(seq + 1, seq_of(self._reached))

    def _check_withdrawn(self, first: int, last: int) -> None:
        skipped = [note for note in self._history.notes if first <= note.seq <= last]
        silent = [note.seq for note in skipped if note.gone != "withdrawn"]
        assert not silent, f"neither delivered nor announced: {silent}"

    def _check_gap(self, gap: Gap, seq: int) -> None:
        history = self._history
        assert seq < gap.from_seq <= gap.to_seq <= history.seq
        inside = [note for note in history.notes if gap.from_seq <= note.seq <= gap.to_seq]
        lost = [note for note in inside if note.gone != "withdrawn"]
        assert all(note.lost_to(self._now) for note in lost), "something in the gap can still come"
        assert len(lost) == gap.missing
        assert gap.missing > 0
        if gap.reason == "trimmed":
            assert gap.to_seq <= history.trimmed
        else:
            assert gap.reason == "expired"
            assert gap.from_seq > history.trimmed

    def _check_entries(self) -> None:
        """What is there between start and end is what was read, in that order."""
        after = self._start if self._begin.known or self._begin.gap else self._begin.place
        there: list[tuple[object, ...]] = []
        for entry in self._history.box:
            if not after < entry.place <= self._reached:
                continue
            if isinstance(entry, Update):
                there.append((entry.place, entry.state, entry.ids))
            elif not entry.lost_to(self._now):
                there.append(_told(entry))
        came: list[tuple[object, ...]] = []
        for item in self._items:
            if isinstance(item, Change):
                came.append((place_of(item.place), item.state, item.ids))
            elif isinstance(item, Notice):
                came.append(_heard(item))
        assert there == came

    def _check_attempt(self, item: Notice, device: str) -> None:
        note = next(note for note in self._history.notes if note.id == item.id)
        note.shown = True
        if note.owner is None:
            assert item.attempt == 1
            return
        note.attempts[device] = note.attempts.get(device, 0) + 1
        assert note.attempts[device] == item.attempt


def _told(note: Note) -> tuple[object, ...]:
    at, trace = note.place, note.traceparent
    return (at, note.id, note.type, note.payload, note.expires, note.state, trace)


def _heard(item: Notice) -> tuple[object, ...]:
    at, trace = place_of(item.place), item.traceparent
    return (at, item.id, item.type, item.payload, item.expires, item.state, trace)
