"""One topic of one connection: from the wish to the answer, and where it stands in what is kept.

    coming      Redis has not confirmed the channel. Nothing is delivered
    unread      of a durable topic: in the hub, and the ledger is being read for the first time.
                What is published meanwhile is held by its `Track`
    there       ``subscribed`` has been said, and what is published comes behind it

A membership enters the hub only when Redis has confirmed, in the same breath as ``subscribed`` of
a live topic is sent: so nothing comes before it, and nothing is missed after it. It may also be
given up before that, when its `Owner` finds that `ANSWER_SECONDS` are over.

Of a durable topic every connection has a place, as in the stream for everyone (see `feed`); but all
that are up to date are sent the same frame, because the position in it is the topic's own. When it
is read is up to its `Owner`, who bounds that for all of a connection together. A topic whose policy
is to spill stays in the ledger when its client does not keep up, until that has taken what it got.

Who asks once more for what he has is answered when Redis has confirmed it once more: at once while
the link lives, else when the next one is up.

All of it is synchronous; nothing here may raise into those who call for many.
"""

import math
from typing import Final, Protocol

from trioserver import ledger, messages, position
from trioserver.desk import Member, Particulars
from trioserver.envelope import Change, Entry, Notice
from trioserver.errors import CloseReason
from trioserver.ledger import Command, Page
from trioserver.outbox import Outbox
from trioserver.shared import Pending, Shared
from trioserver.slow_policies import Policy
from trioserver.topic_frames import frame_of, render
from trioserver.track import Track, Verdict

ANSWER_SECONDS: Final = 5.0
"""How long a client waits for Redis to confirm a topic before it is told ``unavailable``."""

MAX_READS: Final = 4
"""Topics of one connection that are read at a time."""

PAGE_ENTRIES: Final = 64
"""Entries of the ledger in one page of what was missed."""

START: Final = "start"
"""As ``since``: all that is kept."""


class Subscriber(Member, Protocol):
    """The connection, as each of its memberships sees it."""

    shared: Shared
    outbox: Outbox
    reason: CloseReason | None

    def answer(self, message: bytes) -> None:
        """Send a message that the client has asked for."""

    def failed(self, bug: Exception) -> None:
        """End after a bug."""


class Owner(Protocol):
    """The topics of a connection, as each of its memberships sees them; all synchronous."""

    own: dict[str, None] | None
    """Ids of what the client has published and does not want to get itself."""

    def answered(self, count: int) -> None:
        """Take note that so many requests are being answered."""

    def want(self, kept: "KeptMembership") -> None:
        """Call `KeptMembership.read` when it is its turn."""

    def was_read(self) -> None:
        """Take note that a durable topic has its page, or does not want it any more."""

    def read_some(self) -> None:
        """Have those read whose turn it is."""


class Membership:
    """One topic of one connection; as it stands here, a live one."""

    __slots__ = (
        "_host",
        "_is_counted",
        "_is_joined",
        "_pending",
        "_whose",
        "asked",
        "give_up_at",
        "here",
        "lasting",
        "topic",
    )

    def __init__(self, whose: Owner, host: Subscriber, topic: Particulars) -> None:
        self._whose = whose
        self._host = host
        self.topic = topic
        self.asked: tuple[messages.Subscribe, ...] = ()
        """What is not answered."""
        self.give_up_at = math.inf
        """When that is answered ``unavailable``; on the pump's clock."""
        self.lasting = False
        """Whether the topic stays wanted then: the client knows of it, or its token joins it."""
        self.here = False
        """Whether it is in the hub."""
        self._is_joined = False
        """Whether the client is to be told that its token joins this."""
        self._is_counted = False
        """Whether it is kept that this connection is subscribed."""
        self._pending: Pending | None = None
        """Set while Redis has not confirmed the channel."""

    @property
    def point(self) -> str:
        """Up to where it was sent; empty if nobody knows, and of a live topic."""
        return ""

    # Coming.

    def come(self, message: messages.Subscribe | None, now: float) -> None:
        """Enter the hub as soon as Redis has confirmed the channel, which may be at once.

        Args:
            message: Who wants it; None is the token.
            now: On the pump's clock.
        """
        if message is None:
            self._is_joined = self.lasting = True
        else:
            self._wait(message, now)
        self._follow()

    def ask(self, message: messages.Subscribe, now: float) -> None:
        """Answer one more who wants what is wanted already."""
        self._wait(message, now)
        if self._pending is None:
            self._follow()

    def _follow(self) -> None:
        """Arrive as soon as Redis has confirmed the channel; at once if it has."""
        shared, channel = self._host.shared, self.topic.channel
        pending = shared.follower.follow(channel)
        if pending is None:
            self._arrive()
        else:
            self._pending = pending
            shared.desk.coming(channel)
            pending.notify(self)

    def _wait(self, message: messages.Subscribe, now: float) -> None:
        self.asked = (*self.asked, message)
        self.put_off(now)

    def put_off(self, now: float) -> None:
        """Wait for the answer from now on, as if it had only just been asked for."""
        self.give_up_at = now + ANSWER_SECONDS

    def followed(self) -> None:
        """Take note that Redis has confirmed the channel."""
        self._confirmed()
        self._arrive()

    def _confirmed(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.forget(self)
            self._host.shared.desk.came(self.topic.channel)

    def _arrive(self) -> None:
        self._host.shared.tally.topic_subscriptions += not self.here
        self.here = True
        self._host.shared.hub.add(self.topic.channel, self._host.outbox)
        self._begin()

    def _begin(self) -> None:
        """Say that it is there; what is published from now on comes."""
        self._say_subscribed()

    def _say_subscribed(
        self, where: str | None = None, reason: str | None = None, *, resumed: bool = False
    ) -> None:
        """Answer whoever has asked; see `messages.Subscribed`."""
        host, name = self._host, self.topic.name
        refs = [message.ref for message in self.drop_asked()]
        if self._is_joined:
            self._is_joined = False
            refs.insert(0, None)
        self.lasting = True
        for ref in refs:
            host.answer(messages.encode(messages.Subscribed(name, ref, where, resumed, reason)))
        if self.topic.attended and not self._is_counted and host.reason is None:
            self._is_counted = True
            host.shared.desk.attendance.enter(host, name)

    def drop_asked(self) -> tuple[messages.Subscribe, ...]:
        """Return what is not answered; it is not waited for any more."""
        asked, self.asked = self.asked, ()
        self.give_up_at = math.inf
        self._whose.answered(len(asked))
        return asked

    @property
    def is_held_up(self) -> bool:
        """Whether it is the client that has to do something first."""
        return False

    # There.

    def entered(self, entry: Entry, frame: bytes) -> bool:
        """Send what was just published, if it is next."""
        # Whoever has published it keeps the topic, as nobody does here: so it is what is live.
        return self._deliver(entry, frame)

    def _deliver(self, entry: Entry, frame: bytes) -> bool:
        outbox = self._host.outbox
        # A change may be several frames, which cannot be held together with others.
        one = isinstance(entry, Notice)
        return self._count(entry, frame, outbox.deliver(frame) if one else outbox.offer(frame))

    def _count(self, entry: Entry, frame: bytes, accepted: bool) -> bool:  # noqa: FBT001 - as it is
        """Count what was offered; return whether it was accepted."""
        tally = self._host.shared.tally
        tally.bytes_out += len(frame) * accepted
        if isinstance(entry, Notice):
            tally.notifications_delivered["live"] += accepted
            tally.messages_out += accepted
            tally.failed += not accepted
        return accepted

    def catch_up(self) -> None:
        """Look for what may not have come; of a live topic that is nowhere."""

    # The end.

    def leave(self) -> None:
        """Leave the hub, and let go of the channel."""
        host, topic = self._host, self.topic
        shared = host.shared
        self._confirmed()
        if self.here:
            self.here = False
            shared.tally.topic_subscriptions -= 1
            shared.hub.remove(topic.channel, host.outbox)
        shared.desk.release(topic.channel, shared)
        if self._is_counted:
            self._is_counted = False
            shared.desk.attendance.leave(host, topic.name)


class KeptMembership(Membership):
    """A durable topic of one connection."""

    __slots__ = (
        "_is_over",
        "_is_reading",
        "_is_spilled",
        "_is_stale",
        "_is_wanted",
        "_since",
        "_track",
        "_wished",
    )

    def __init__(self, whose: Owner, host: Subscriber, topic: Particulars) -> None:
        super().__init__(whose, host, topic)
        self._track: Track[Entry] = Track()
        self._since: str | None = None
        """Where the client wants to begin, while the track has no point; None is the end."""
        self._wished: messages.Subscribe | None = None
        """Who has said so."""
        self._is_spilled = host.shared.policies.of_topic(topic.name) is Policy.SPILL
        """Whether what its client does not take stays in the ledger."""
        self._is_wanted = False
        """Whether it waits for its turn to be read..."""
        self._is_reading = False
        """... or is being read."""
        self._is_stale = False
        """Whether the page that is under way is not the one that is wanted."""
        self._is_over = False

    @property
    def point(self) -> str:
        """Up to where it was sent; empty if nobody knows."""
        return self._track.point

    def _begin(self) -> None:
        """Read from where it begins, unless that is known: `answered` says that it is there."""
        # Only now: what was answered `unavailable` is not wanted any more.
        wished = next((one for one in reversed(self.asked) if one.since is not None), None)
        if wished is not None and wished is not self._wished:
            self._wished = wished
            self._since = wished.since
            self._track.forget()
            if self._is_reading:
                self._is_stale = True
        point = self._track.point
        if point:
            self._say_subscribed(position.join("", point))
        else:
            self.want()

    # Reading.

    def want(self) -> None:
        """Have it read as soon as it is its turn."""
        if not self._is_wanted and not self._is_reading:
            self._is_wanted = True
            self._whose.want(self)

    def read(self) -> bool:
        """Ask for a page, for it is its turn; return whether it is still wanted."""
        self._is_wanted = False
        self._is_reading = not self._is_over
        if self._is_reading:
            self._host.shared.reader.want(self, everyone=True)
        return self._is_reading

    def question(self, *, everyone: bool) -> Command | None:  # noqa: ARG002 - as all who read
        """Return what to ask the ledger; None if the topic is not wanted any more."""
        host = self._host
        if self._is_over or host.reason is not None:
            return None
        self._is_stale = False
        point, garbage = self._track.point, False
        if not point and self._since not in {None, START}:
            where = position.parse(self._since or "")
            point = "" if where is None else where.all
            garbage = not point
        return ledger.read(
            ledger.Topic(self.topic.name),
            point=point,
            garbage=garbage,
            head=not point and self._since is None,
            limit=PAGE_ENTRIES,
            max_bytes=host.shared.page_bytes // MAX_READS,
        )

    def answered(self, page: Page, *, everyone: bool) -> None:  # noqa: ARG002 - as all who read
        """Take a page of the ledger; never raises."""
        if self._is_over or self._host.reason is not None:
            return
        self._is_reading = False
        self._whose.was_read()
        try:
            if self._is_stale:
                self.want()
            else:
                self._take(page)
        except Exception as bug:  # noqa: BLE001 - would spoil the pages of others
            self._host.shared.log_bug("topic", bug)
            self._host.failed(bug)
        self._whose.read_some()

    def _take(self, page: Page) -> None:
        host = self._host
        if self.asked or self._is_joined:
            known = self._since not in {None, START}
            self._say_subscribed(
                position.join("", page.start_point),
                (page.why or None) if known else None,
                resumed=known and not page.why,
            )
        data = self._frames_of(page)
        if data and host.outbox.offer(data):
            host.shared.tally.bytes_out += len(data)
        if host.reason is None:
            self._turn(page)

    def _turn(self, page: Page) -> None:
        """Go on behind ``page``: with the next one, or live."""
        track = self._track
        following, again = track.reached(page.reached_point, more=page.more)
        track.point = page.reached_point
        for entry in following:
            # What was held may be much, so each counts; what is not sent is read later.
            if self._is_spilled and self._host.outbox.lags():
                self._spill()
                return
            track.point = entry.point
            if not self._is_own(entry):
                frame = frame_of(entry, self.topic.name, self._host.shared.stamp)
                self._count(entry, frame, self._host.outbox.offer(frame))
        if page.more:
            self.want()
        elif again:
            self._read_again()

    def catch_up(self) -> None:
        """Look whether something was published that did not come."""
        if self.here and self._track.begin():
            self._read_again()

    def _read_again(self) -> None:
        """Read what may have been missed: now, or when the client keeps up."""
        if self._is_spilled and self._host.outbox.lags():
            self._spill()
        else:
            self.want()

    # Sending.

    def entered(self, entry: Entry, frame: bytes) -> bool:
        """Send what was just published, if it is next."""
        track = self._track
        if self._is_spilled and track.live and self._host.outbox.lags():
            self._spill()
            return False
        verdict = track.take(entry)
        if verdict is Verdict.DELIVER:
            return not (self._whose.own and self._is_own(entry)) and self._deliver(entry, frame)
        if verdict is Verdict.READ:
            self.catch_up()
        return False

    def _spill(self) -> None:
        """Leave the rest in the ledger until the client has taken what it got."""
        if self._track.live:
            self._track.begin()
        lagging = messages.Lagging(position.join("", self._track.point), self.topic.name)
        self._host.answer(messages.encode(lagging))
        self._host.shared.outbox_limits.on_given_up(Policy.SPILL, 1)
        self.want()

    def _is_own(self, entry: Entry | ledger.Notice) -> bool:
        """Return whether the client has published this and does not want it."""
        return not isinstance(entry, Change) and entry.id in (self._whose.own or ())

    def _frames_of(self, page: Page) -> bytes:
        """Return the frames of a page, and count what is in it."""
        name, shared = self.topic.name, self._host.shared
        own = self._whose.own
        if own and any(isinstance(one, ledger.Notice) and one.id in own for one in page.items):
            rendering = render(page, name, shared.stamp, self._is_own)
        else:
            rendering = shared.desk.rendering(page, name, shared.stamp)
        tally = shared.tally
        tally.notifications_delivered["backlog"] += rendering.notices
        tally.messages_out += rendering.notices
        for reason in rendering.gaps:
            tally.gap(reason)
        return rendering.data

    # The end.

    def leave(self) -> None:
        """Leave the hub, and let go of the channel."""
        super().leave()
        self._is_over = True
        if self._is_reading:
            self._is_reading = False
            self._whose.was_read()
            self._whose.read_some()

    @property
    def is_held_up(self) -> bool:
        """Whether it is the client that has to do something first: take what was read before."""
        return self._is_wanted and not self._host.outbox.empty
