"""The track: tables of what comes, and a model of a ledger, a subscription and slow reads."""

from collections import deque
from collections.abc import Sequence

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trioserver.position import SEQ_SPAN, epoch_of
from trioserver.track import MAX_HELD, Track, Verdict


@attrs.frozen
class Published:
    """An entry as it comes from the subscription."""

    previous: str
    point: str


def point(seq: int, epoch: str = "e0", milliseconds: int = 1000) -> str:
    """Return the point of a notification."""
    return f"{epoch}.{milliseconds}-{seq * SEQ_SPAN}"


def entry(seq: int, epoch: str = "e0") -> Published:
    """Return the entry of a notification, behind the one with the seq before."""
    return Published(point(seq - 1, epoch) if seq > 1 else f"{epoch}.0-0", point(seq, epoch))


def entries(first: int, last: int) -> list[Published]:
    """Return the entries of some notifications in a row."""
    return [entry(seq) for seq in range(first, last + 1)]


def live(seq: int) -> Track[Published]:
    """Return a track that has been read up to ``seq``."""
    track: Track[Published] = Track()
    assert ([], False) == track.reached(point(seq) if seq else "e0.0-0", more=False)
    assert track.live
    return track


def reading(seq: int) -> Track[Published]:
    """Return a track that stands at ``seq`` and is being read from there."""
    track = live(seq)
    assert track.begin()
    return track


@pytest.mark.parametrize(
    ("at", "coming", "verdict"),
    [
        (5, entry(6), Verdict.DELIVER),
        (0, entry(1), Verdict.DELIVER),
        (5, Published(point(5), f"e0.1000-{5 * SEQ_SPAN + 1}"), Verdict.DELIVER),
        (5, Published(point(5), f"e0.2000-{5 * SEQ_SPAN}"), Verdict.DELIVER),
        (5, entry(5), Verdict.SKIP),
        (5, entry(1), Verdict.SKIP),
        (5, Published(point(4), f"e0.999-{6 * SEQ_SPAN}"), Verdict.SKIP),
        (5, entry(7), Verdict.READ),
        (0, entry(2), Verdict.READ),
        (5, Published(f"e0.1000-{5 * SEQ_SPAN + 1}", point(6)), Verdict.READ),
        (5, Published(point(4), f"e0.1001-{5 * SEQ_SPAN}"), Verdict.READ),
        (5, entry(1, "e1"), Verdict.READ),
        (5, entry(6, "e1"), Verdict.READ),
        (5, entry(5, "e"), Verdict.READ),
        (9, Published("e0.1000-40960", "e0.1000-45056"), Verdict.READ),
        (10, Published("e0.1000-36864", "e0.1000-36865"), Verdict.SKIP),
    ],
)
def test_what_becomes_of_an_entry_while_live(at: int, coming: Published, verdict: Verdict) -> None:
    """The next goes out, the past is skipped, anything else asks for a read; by number."""
    track = live(at)
    assert verdict is track.take(coming)
    moved = verdict is Verdict.DELIVER
    assert (coming.point if moved else live(at).point) == track.point
    assert track.live, "only `begin` starts a read"


def test_entries_in_a_row_are_delivered_without_a_read() -> None:
    """The usual: one after the other, updates among them."""
    track = live(0)
    for seq in range(1, 1000):
        assert Verdict.DELIVER is track.take(entry(seq))
        update = Published(point(seq), f"e0.1000-{seq * SEQ_SPAN + 1}")
        assert Verdict.DELIVER is track.take(update)
        track.point = point(seq)


@pytest.mark.parametrize("coming", [entry(1), entry(6), entry(9), entry(1, "e1")])
def test_what_comes_before_the_first_read_is_held(coming: Published) -> None:
    """Whatever it is: nobody knows yet what is next."""
    track: Track[Published] = Track()
    assert ("", False) == (track.point, track.live)
    assert Verdict.SKIP is track.take(coming)
    assert ("", False) == (track.point, track.live)
    assert not track.begin(), "the first read is due anyway"


HELD: dict[str, tuple[Sequence[Published], Sequence[Published], bool]] = {
    "nothing came": ([], [], False),
    "the page has all of it": (entries(1, 5), [], False),
    "the next": ([entry(6)], [entry(6)], False),
    "some that it has, then the next ones": (entries(3, 8), entries(6, 8), False),
    "a hole": ([entry(7)], [], True),
    "a hole behind the next": ([entry(6), entry(8)], [entry(6)], True),
    "a hole, then what would fit": ([entry(7), entry(6), entry(7)], entries(6, 7), True),
    "another epoch": ([entry(6), entry(1, "e1")], [entry(6)], True),
    "as much as is remembered": (entries(6, 5 + MAX_HELD), entries(6, 5 + MAX_HELD), False),
    "more than is remembered": (entries(6, 6 + MAX_HELD), entries(6, 6 + MAX_HELD), True),
    "far more": (entries(6, 1000), entries(6, 6 + MAX_HELD), True),
    "far more, but nothing new": (entries(1, 5) * 20, [], True),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", HELD)
def test_what_was_held_follows_the_last_page(name: str, *, known: bool) -> None:
    """In order, without what the page had; with a hole among it one more read begins."""
    held, following, again = HELD[name]
    track: Track[Published] = reading(2) if known else Track()
    for one in held:
        assert Verdict.SKIP is track.take(one)
    assert (list(following), again) == track.reached(point(5), more=False)
    assert (following[-1].point if following else point(5)) == track.point
    assert again != track.live
    if again:
        # All of it was in the stream when it came, so the next read has it.
        assert ([], False) == track.reached(point(2000), more=False)
        assert track.live


def test_only_the_last_page_ends_a_read() -> None:
    """Until then everything is held, and each page moves the point."""
    track = reading(0)
    for seq in (2, 4, 6):
        assert Verdict.SKIP is track.take(entry(seq))
        assert ([], True) == track.reached(point(seq), more=True)
        assert (point(seq), False) == (track.point, track.live)
    assert Verdict.SKIP is track.take(entry(7))
    assert ([entry(7)], False) == track.reached(point(6), more=False)
    assert (point(7), True) == (track.point, track.live)


def test_one_read_at_a_time() -> None:
    """Several reasons to read are one read, if it has not begun."""
    track = live(5)
    assert [True, False, False] == [track.begin() for _ in range(3)]
    assert not track.live
    track.reached(point(5), more=False)


def test_a_reason_to_read_that_comes_during_a_read_is_not_forgotten() -> None:
    """The page under way may be older than the reason: then it says nothing about it."""
    track = live(5)
    assert track.begin()
    # Here the ledger has answered; what is published now is lost with the subscription, which
    # comes back before the page is here.
    assert not track.begin()
    assert ([], True) == track.reached(point(5), more=False)
    assert not track.live
    assert ([], False) == track.reached(point(6), more=False)
    assert track.live


def test_a_track_that_forgets_is_like_a_new_one() -> None:
    """It holds what comes until somebody has read."""
    for track in (live(5), reading(5)):
        track.take(entry(8))
        track.forget()
        assert ("", False) == (track.point, track.live)
        assert Verdict.SKIP is track.take(entry(9))
        assert ([entry(9)], False) == track.reached(point(8), more=False)


# The model.

PAGE = 4
"""Entries in one page of the modelled ledger."""


def number_of(where: str) -> int:
    """Return which epoch a point is of."""
    return int(epoch_of(where)[1:])


@attrs.frozen
class Page:
    """What the ledger has answered to a read."""

    entries: tuple[Published, ...]
    reached: str
    more: bool


class TrackMachine(RuleBasedStateMachine):
    """A ledger, a subscription that loses things, reads that return late, and one track.

    The track is driven as its connection does it. What the client was given is compared with what
    the ledger has had.
    """

    @initialize(known=st.integers(0, 5), more=st.integers(0, 9))
    def begin(self, known: int, more: int) -> None:
        """Connect: the ledger has entries, the client has said up to where it knows them."""
        self.epoch = 0
        self.milliseconds = 1000
        self.streams: list[list[Published]] = [[]]
        """What each epoch has had, ever."""
        self.wire: deque[Published] = deque()
        self.connected = True
        self.seq = 0
        for number in range(known + more):
            self.publish(notice=number % 3 != 2, later=False)
        self.wire.clear()
        self.given: list[Published] = []
        """What the client has got, in this order."""
        self.start = self.streams[0][known - 1].point if known else "e0.0-0"
        self.track: Track[Published] = Track()
        self.page: Page | None = None
        """An answer on its way."""
        self.wanted = True
        self.reads = self.excuses = 1
        self.held = 0
        """What has come since the read began, with all its pages."""
        self.unnoticed = False
        """Whether something was lost that nothing has told of yet."""

    # The ledger and the subscription.

    @rule(notice=st.booleans(), later=st.booleans())
    def publish(self, *, notice: bool, later: bool) -> None:
        """A notification, or an update of one: into the stream, then onto the wire."""
        stream = self.streams[self.epoch]
        name = f"e{self.epoch}"
        previous = stream[-1].point if stream else f"{name}.0-0"
        milliseconds, _, number = previous.partition(".")[2].partition("-")
        self.milliseconds += later
        if notice or not stream:
            self.seq += 1
            number = str(self.seq * SEQ_SPAN)
        else:
            same = self.milliseconds == int(milliseconds)
            number = str(int(number) + 1 if same else self.seq * SEQ_SPAN)
        one = Published(previous, f"{name}.{self.milliseconds}-{number}")
        stream.append(one)
        if self.connected:
            self.wire.append(one)
        else:
            self.unnoticed = True

    @rule(count=st.integers(MAX_HELD // 2, MAX_HELD + 5))
    def publish_many(self, count: int) -> None:
        """More than is remembered during a read."""
        for _ in range(count):
            self.publish(notice=True, later=False)
            if self.connected:
                self.arrive()

    @precondition(lambda self: self.wire)
    @rule()
    def arrive(self) -> None:
        """The next envelope comes."""
        one = self.wire.popleft()
        if not self.track.live:
            self.held += 1
        verdict = self.track.take(one)
        if verdict is Verdict.DELIVER:
            self.give(one)
        elif verdict is Verdict.READ:
            self.read()
        if not self.wire and self.streams[self.epoch][-1:] == [one]:
            self.unnoticed = False

    @precondition(lambda self: self.wire)
    @rule()
    def lose(self) -> None:
        """The next envelope does not come."""
        self.wire.popleft()
        self.excuses += 1
        self.unnoticed = True

    @rule()
    def wipe(self) -> None:
        """Redis has lost everything: another epoch begins."""
        self.epoch += 1
        self.seq = 0
        self.streams.append([])
        # Each envelope that is still on its way may look like one more epoch.
        self.excuses += 1 + len(self.wire)

    @precondition(lambda self: self.connected)
    @rule()
    def disconnect(self) -> None:
        """The subscription breaks; what is on its way is lost."""
        self.connected = False
        self.unnoticed = self.unnoticed or bool(self.wire)
        self.wire.clear()

    @precondition(lambda self: not self.connected)
    @rule()
    def reconnect(self) -> None:
        """The subscription is back, which is a reason to read."""
        self.connected = True
        self.excuses += 1
        self.unnoticed = False
        self.read()

    # The connection.

    def read(self) -> None:
        """Read, if that is not under way."""
        if self.track.begin():
            self.ask()

    def ask(self) -> None:
        """Ask for a read."""
        assert not self.wanted
        assert self.page is None
        self.wanted = True
        self.reads += 1

    @precondition(lambda self: self.wanted)
    @rule()
    def execute(self) -> None:
        """The ledger answers, as of now."""
        self.wanted = False
        stream = self.streams[self.epoch]
        name = f"e{self.epoch}"
        after = self.track.point or self.start
        points = [one.point for one in stream]
        known = points.index(after) + 1 if after in points else 0
        found = stream[known : known + PAGE]
        here = after if after in points else f"{name}.0-0"
        reached = found[-1].point if found else here
        self.page = Page(tuple(found), reached, known + PAGE < len(stream))

    @precondition(lambda self: self.wanted and self.connected)
    @rule(count=st.integers(1, MAX_HELD + 5), lost=st.integers(-1, MAX_HELD))
    def execute_long_ago(self, count: int, lost: int) -> None:
        """The answer is on its way, and meanwhile much comes, or all but one."""
        self.execute()
        for number in range(count):
            self.publish(notice=True, later=False)
            if number == lost:
                self.wire.rotate()
                self.lose()
        self.settle()

    @precondition(lambda self: self.page is not None)
    @rule()
    def answer(self) -> None:
        """The answer arrives, however old it is by now."""
        page, self.page = self.page, None
        assert page is not None
        for one in page.entries:
            self.give(one)
        self.excuses += page.more
        if not page.more:
            self.excuses += self.held > MAX_HELD
            self.held = 0
        following, again = self.track.reached(page.reached, more=page.more)
        assert again or not page.more
        for one in following:
            self.give(one)
        if again:
            self.ask()

    def give(self, one: Published) -> None:
        """Check that ``one`` is what the client has to get next."""
        last = self.given[-1].point if self.given else self.start
        assert last == one.previous or (
            one.previous.endswith(".0-0") and number_of(one.point) > number_of(last)
        ), f"{one} after {last}"
        self.given.append(one)

    @invariant()
    def one_more_read_for_each_event(self) -> None:
        """Reading is dear: one for whatever went wrong, and not one more."""
        assert self.reads <= self.excuses

    @invariant()
    def waits_for_nothing_in_vain(self) -> None:
        """It holds back what comes only while an answer will come."""
        assert self.track.live != (self.wanted or self.page is not None)

    @rule()
    def settle(self) -> None:
        """When all has arrived, the client has everything."""
        if not self.connected:
            self.reconnect()
        while self.wire:
            self.arrive()
        if self.unnoticed:
            self.publish(notice=True, later=True)
            self.arrive()
        for _ in range(1000):
            if self.wanted:
                self.execute()
            elif self.page is not None:
                self.answer()
            else:
                break
        assert self.track.live
        self.one_more_read_for_each_event()
        newest = self.streams[self.epoch][-1:]
        if newest and newest[0].point != self.start:
            assert newest == self.given[-1:]

    def teardown(self) -> None:
        """Whatever has happened."""
        if hasattr(self, "track"):
            self.settle()


TrackMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTrack = TrackMachine.TestCase
