"""What the ledger has for one client: what it missed, what is new, and what it is known to have.

A feed belongs to a connection and has no life of its own. It stands in two streams, its user's and
everyone's (`trioserver.track`), asks the worker's reader for what lies behind, turns entries into
frames, and keeps the `Progress` that the worker's receipts report.

    coming      the connection is in the hub and Redis has confirmed its topic. Then the user's own
                stream is read, which also says where the device stopped in everyone's; if nobody
                can say, everyone's begins at its head. Then `Host.establish`, with the first page
    backlog     the next page is asked for when the client has taken the one before
    live        what is published goes out as it comes, if it is next; else the stream is read
    lagging     if the policy is to spill and half of what may wait does: what is published stays in
                the ledger, and the client is told so. When it has taken what it got, the stream is
                read, page by page, until it is live again

Receipts need no code on the client's side: a ping that names the newest point goes out in the same
write as a notification, if none is unanswered and the last is `CONFIRM_SECONDS` ago. Its pong
proves that all before it has arrived. A client that has asked for it is sent again what it does not
acknowledge: the stream is read once more from where the acknowledged ends.

All of it is synchronous; nothing here may raise into those who call for many.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
import trio

from trioserver import frames, ledger, messages, position
from trioserver.envelope import Change, Entry, Notice
from trioserver.errors import CloseReason
from trioserver.ledger import Command, Page
from trioserver.outbox import Outbox
from trioserver.position import Position
from trioserver.receipts import Progress
from trioserver.shared import Shared
from trioserver.slow_policies import Policies, Policy
from trioserver.track import Track, Verdict
from trioserver.wish import Wish

CONFIRM_SECONDS: Final = 1.0
"""Least time between two pings that ask for the receipt of notifications."""

REMIND_SECONDS: Final = 1.5
"""After the last ping, one goes out by itself if no notification has come that could carry it: a
write of its own costs as much as the notification did."""

PAGE_ENTRIES: Final = 64
"""Entries of the ledger in one page of what was missed."""

MAX_PING: Final = 125
"""Bytes of a ping's payload (RFC 6455 5.5)."""

MAX_ASKS: Final = 32
"""Requests to the ledger that one client may have under way; then it is not read until they are
answered. What came in the same read is taken all the same."""

_OWN, _EVERYONE = 1, 2


class Host(Protocol):
    """The connection, as its feed sees it."""

    shared: Shared
    outbox: Outbox
    connection_id: str
    reason: CloseReason | None
    pinged: bytes | None
    """The payload of the ping that is unanswered."""

    @property
    def user(self) -> str | None:
        """Who it is."""

    def establish(self, where: str, why: str, backlog: bytes) -> None:
        """Send the first message, with its position and why it is no other, then ``backlog``."""

    def answer(self, message: bytes) -> None:
        """Send a message that the client has asked for."""

    def hasten(self, when: float) -> None:
        """Call `Feed.due` then, or before."""

    def resume(self) -> None:
        """Read from the client again, if it was not because of `Feed.asks_too_much`."""

    def failed(self, bug: Exception) -> None:
        """End after a bug."""


class Feed:
    """One connection's share of the ledger.

    Args:
        host: The connection.
        wish: Where its client wants to go on.
    """

    __slots__ = (
        "_asks",
        "_everyone",
        "_host",
        "_own",
        "_page",
        "_pages",
        "_progress",
        "_spills",
        "_wish",
    )

    def __init__(self, host: Host, wish: Wish) -> None:
        self._host = host
        self._wish = wish
        self._own: Track[Entry] = Track()
        self._everyone: Track[Entry] = Track()
        self._page: Page | None = None
        """The first of its own stream, while the head of everyone's is being looked up."""
        self._pages = 0
        """Streams of which more is to be read as soon as the client has taken what it got."""
        self._progress: Progress | None = None
        """None until the ledger had something for it."""
        self._asks = 0
        """Requests of the client that are not answered."""
        self._spills = _spills(host.shared.policies)
        """Streams that stay in the ledger while the client does not keep up."""

    # Reading.

    def begin(self) -> None:
        """Read for the first time; what is published from now on comes."""
        self._host.shared.reader.want(self, everyone=False)

    def catch_up(self) -> None:
        """Look into both streams: something may have been published that did not come."""
        self._catch_up(everyone=False)
        self._catch_up(everyone=True)

    def read_on(self) -> None:
        """Ask for the next pages, now that the client has taken what it got."""
        pages, self._pages = self._pages, 0
        for bit in (_OWN, _EVERYONE):
            if pages & bit:
                self._host.shared.reader.want(self, everyone=bit == _EVERYONE)

    def question(self, *, everyone: bool) -> Command | None:
        """Return what to ask the ledger; None if the connection has ended."""
        host = self._host
        user, shared = host.user, host.shared
        if host.reason is not None or user is None:
            return None
        if everyone:
            point = self._everyone.point
            return ledger.read(
                None, point=point, head=not point, limit=PAGE_ENTRIES, max_bytes=shared.page_bytes
            )
        wish, point, progress = self._wish, self._own.point, self._progress
        if not point:
            return self._first_question(user, wish)
        if progress is not None and progress.rewinding:
            point = ""
        return ledger.read(
            user,
            device=wish.device,
            point=point,
            ack=wish.ack,
            limit=PAGE_ENTRIES,
            max_bytes=shared.page_bytes,
        )

    def _first_question(self, user: str, wish: Wish) -> Command:
        shared = self._host.shared
        where = self._said()
        head = shared.head
        return ledger.read(
            user,
            device=wish.device,
            point=where.user if where is not None else "",
            garbage=bool(wish.position) and where is None,
            connect=True,
            # Stored if nothing is: else who gets nothing now would begin at a later head next time.
            all_point=(where.all if where is not None else "") or (head.live and head.point) or "",
            ack=wish.ack,
            channel=shared.user_topic(user).decode(),
            nonce=f"{shared.rng.getrandbits(40):08x}"[-8:],
            limit=PAGE_ENTRIES,
            max_bytes=shared.page_bytes,
        )

    def _said(self) -> Position | None:
        """Return where the client says it is; None if nobody understands it, or it says nothing."""
        return position.parse(self._wish.position) if self._wish.position else None

    def answered(self, page: Page, *, everyone: bool) -> None:
        """Take a page of the ledger; never raises."""
        if self._host.reason is not None:
            return
        try:
            if everyone:
                self._take_everyones(page)
            else:
                self._take_own(page)
        except Exception as bug:  # noqa: BLE001 - would spoil the pages of others
            self._host.shared.log_bug("feed", bug)
            self._host.failed(bug)
        # What has come meanwhile and was next is held; this is no turn of the subscription.
        self._host.outbox.release()

    def _take_own(self, page: Page) -> None:
        first = not self._own.point
        if first and not self._find_everyone(page):
            self._page = page
        else:
            self._serve(page, first=first)

    def go_alone(self) -> bool:
        """Give up waiting for everyone's stream; return whether its own can be served without."""
        page, self._page = self._page, None
        if page is None:
            return False
        self._serve(page, first=True)
        self._host.outbox.release()
        return True

    def _serve(self, page: Page, *, first: bool) -> None:
        if first:
            self._begin_progress(page)
        elif self._progress is not None:
            self._progress.rewinding = False
            if self._is_another_history(page):
                self._progress.new_epoch()
        # Once: what is read while that waits for something else comes behind it.
        if first and self._host.outbox.corked:
            where = position.join(page.start_point, self._everyone.point)
            self._host.shared.tally.resumed += not page.why
            self._host.establish(where, page.why, self._frames_of(page, everyone=False))
        else:
            self._offer(self._frames_of(page, everyone=False))
        self._turn(page, everyone=False)
        head = self._host.shared.head
        if first and head.live and self._everyone.point == head.point:
            self._go_live(head.point, everyone=True)

    def _begin_progress(self, page: Page) -> None:
        """Take note of what the client has from before, as far as it says so itself."""
        wish = self._wish
        said = wish.position and not page.why
        if not (wish.ack or said):
            return
        progress = self._progress or self._make_progress()
        if wish.ack:
            # It is read from where the acknowledged ends, or where it says that it is.
            progress.acked_seq = position.seq_of(page.start)
        if said:
            progress.sent = progress.received = page.start_point
            progress.everyone_sent = progress.everyone_received = self._everyone.point
            self._host.shared.receipts.soon(progress)

    def _is_another_history(self, page: Page) -> bool:
        """Return whether the seqs of ``page`` are others than those that were acknowledged."""
        if position.epoch_of(self._own.point) != page.epoch:
            return True
        gaps = [item for item in page.items if isinstance(item, ledger.Gap)]
        return any(gap.reason == "failover" for gap in gaps)

    def _find_everyone(self, page: Page) -> bool:
        """Find out where to go on in everyone's stream; return whether that is known now."""
        if self._everyone.point:
            return True
        head = self._host.shared.head
        where = self._said()
        point = (where.all if where is not None else "") or page.all_point
        known = head.point if head.live else ""
        self._everyone.point = point or known
        if not known or self._everyone.point != known:
            self._host.shared.reader.want(self, everyone=True)
        return bool(self._everyone.point)

    def _take_everyones(self, page: Page) -> None:
        head = self._host.shared.head
        reached = page.reached_point
        if not page.more and (not head.live or position.is_after(reached, head.point)):
            head.reached(reached, more=False)
        if not self._everyone.point:
            self._everyone.point = page.start_point
            progress = self._progress or self._make_progress()
            progress.everyone_sent = progress.everyone_received = self._everyone.point
            self._host.shared.receipts.soon(progress)
        own, self._page = self._page, None
        if own is not None:
            self._take_own(own)
        if self._host.reason is None and not self._everyone.live:
            self._offer(self._frames_of(page, everyone=True))
            self._turn(page, everyone=True)

    def _turn(self, page: Page, *, everyone: bool) -> None:
        """Go on behind ``page``: with the next one, or live."""
        host = self._host
        if host.reason is not None:
            return
        point = page.reached_point
        if not page.more:
            self._go_live(point, everyone=everyone)
            return
        self._track(everyone=everyone).reached(point, more=True)
        if host.outbox.empty:
            host.shared.reader.want(self, everyone=everyone)
        else:
            self._pages |= _EVERYONE if everyone else _OWN

    def _go_live(self, point: str, *, everyone: bool) -> None:
        track = self._track(everyone=everyone)
        if track.live:
            return
        following, again = track.reached(point, more=False)
        newest, track.point = track.point, point
        for entry in following:
            if self._lags(everyone=everyone):
                track.begin()
                self._spill(everyone=everyone)
                return
            track.point = entry.point  # each frame names its own
            self._deliver(entry, everyone=everyone)
            if self._host.reason is not None:
                return
        track.point = newest
        if again:
            self._read(everyone=everyone)

    def _catch_up(self, *, everyone: bool) -> None:
        track = self._track(everyone=everyone)
        # Without a point the first read is on its way; the track takes care of another behind it.
        if track.begin() and track.point:
            self._read(everyone=everyone)

    def _read(self, *, everyone: bool) -> None:
        """Read a stream whose track is waiting for that: now, or when the client keeps up."""
        if self._lags(everyone=everyone):
            self._spill(everyone=everyone)
        else:
            self._host.shared.reader.want(self, everyone=everyone)

    def _stays(self, *, everyone: bool) -> bool:
        """Return whether what has just been published stays in the ledger.

        It does while the next read has not begun: that will bring it.
        """
        if self._track(everyone=everyone).live and self._lags(everyone=everyone):
            self._catch_up(everyone=everyone)
        return bool(self._pages & (_EVERYONE if everyone else _OWN))

    def _lags(self, *, everyone: bool) -> bool:
        """Return whether the client is to be left behind in this stream."""
        if not self._spills & (_EVERYONE if everyone else _OWN):
            return False
        return self._host.outbox.lags()

    def _spill(self, *, everyone: bool) -> None:
        """Leave a stream, whose track is not live, in the ledger until `read_on`."""
        self._pages |= _EVERYONE if everyone else _OWN
        lagging = messages.Lagging(self._where(), stream=_stream(everyone=everyone))
        self._offer(frames.encode_text(messages.encode(lagging)))
        self._host.shared.outbox_limits.on_given_up(Policy.SPILL, 1)

    def _track(self, *, everyone: bool) -> Track[Entry]:
        return self._everyone if everyone else self._own

    # Sending.

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """Send what was just published, if it is next; see `outbox.Owner.entered`."""
        track = self._everyone if everyone else self._own
        if (self._pages or self._spills) and self._stays(everyone=everyone):
            return False
        verdict = track.take(entry)
        if verdict is Verdict.DELIVER:
            return self._deliver(entry, everyone=everyone)
        if verdict is Verdict.READ:
            self._catch_up(everyone=everyone)
        return False

    def _deliver(self, entry: Entry, *, everyone: bool) -> bool:
        """Send a published entry, at which the track stands already."""
        unread = None if everyone else entry.unread
        if isinstance(entry, Change):
            if entry.by == self._host.connection_id:
                return False  # it has its answer
            # A frame each: what is held may be joined to others.
            updates = self._updates(entry.state, entry.ids, unread, everyone=everyone)
            accepted = False
            for one in updates:
                accepted = self._offer_kept(one, is_notice=False, compress=False)
            return accepted
        tally = self._host.shared.tally
        frame = self._frame(entry, entry.point, entry.payload, unread, attempt=1, everyone=everyone)
        # Each connection has a frame of its own; compressing ten thousand of them is too much.
        # A broadcast is not acknowledged, so it does not start the clock for that either.
        if not self._offer_kept(frame, is_notice=not everyone, compress=not everyone):
            tally.failed += 1
            return False
        tally.notifications_delivered["live"] += 1
        tally.messages_out += 1
        return True

    def _frame(
        self,
        item: Notice | ledger.Notice,
        place: str,
        payload: msgspec.Raw,
        unread: int | None,
        *,
        attempt: int,
        everyone: bool,
    ) -> bytes:
        """Return the frame of a notification, at which its track stands already."""
        milliseconds, number = position.order(place)
        return frames.encode_text(
            messages.encode(
                messages.Durable(
                    item.type,
                    item.id,
                    number // position.SEQ_SPAN,
                    payload,
                    self._host.shared.stamp.at(milliseconds),
                    self._where(),
                    attempt,
                    unread,
                    _stream(everyone=everyone),
                    item.traceparent,
                )
            )
        )

    def _where(self) -> str:
        """Return the position of a client that has got everything up to where both tracks stand."""
        return position.join(self._own.point, self._everyone.point)

    def _offer_kept(self, frame: bytes, *, is_notice: bool, compress: bool) -> bool:
        """Offer what the ledger keeps, with a ping if it is time to ask for a receipt."""
        host = self._host
        shared = host.shared
        progress = self._sent(is_notice=is_notice)
        ping = b""
        if host.pinged is None and shared.pace.ping_interval:
            now = trio.current_time()
            if now - progress.pinged_at >= CONFIRM_SECONDS:
                ping = self.ping(now)
            else:
                host.hasten(progress.pinged_at + REMIND_SECONDS)
        outbox = host.outbox
        # Both leave when the turn is over, in one write.
        if not (outbox.deliver(frame) if compress else outbox.hold(frame)):
            return False
        if ping:
            outbox.hold(ping)
        shared.tally.bytes_out += len(frame) + len(ping)
        return True

    def _offer(self, data: bytes) -> bool:
        if not data or not self._host.outbox.offer(data):
            return False
        self._host.shared.tally.bytes_out += len(data)
        return True

    def _sent(self, *, is_notice: bool) -> Progress:
        """Take note that everything up to where both tracks stand is being sent.

        Args:
            is_notice: Whether there is a notification of its own in it, to be acknowledged.
        """
        host = self._host
        progress = self._progress
        if progress is None:
            progress = self._make_progress()
            progress.everyone_sent = progress.everyone_received = self._everyone.point
        progress.sent = self._own.point
        progress.everyone_sent = self._everyone.point
        if not progress.urgency:
            host.shared.receipts.late(progress)
        wait = host.shared.pace.ack_wait
        if is_notice and self._wish.ack and wait and progress.redeliver_at == math.inf:
            progress.redeliver_at = host.shared.pump.now + wait
            host.hasten(progress.redeliver_at)
        return progress

    def _make_progress(self) -> Progress:
        self._progress = Progress(self._host.user or "", self._wish.device)
        return self._progress

    # Frames of what was read.

    def _frames_of(self, page: Page, *, everyone: bool) -> bytes:
        """Return the frames of a page; the track moves along, for each names its position."""
        track = self._track(everyone=everyone)
        unread = None if everyone else page.unread
        found: list[bytes] = []
        notices = 0
        for item in page.items:
            if isinstance(item, ledger.Gap):
                found.append(self._gap(item, everyone=everyone))
                continue
            track.point = f"{page.epoch}.{item.place}"
            if isinstance(item, ledger.Change):
                found.extend(self._updates(item.state, item.ids, unread, everyone=everyone))
                continue
            notices += 1
            payload = messages.checked(item.payload)
            found.append(
                self._frame(
                    item, item.place, payload, unread, attempt=item.attempt, everyone=everyone
                )
            )
            if item.state == "read":
                # On another device, while this one was away.
                found.extend(self._updates("read", [item.id], unread, everyone=everyone))
        track.point = page.reached_point
        if found:
            self._sent_page(page, notices, everyone=everyone)
            if self._host.pinged is None and self._host.shared.pace.ping_interval:
                found.append(self.ping(trio.current_time()))
        return b"".join(found)

    def _sent_page(self, page: Page, notices: int, *, everyone: bool) -> None:
        tally = self._host.shared.tally
        tally.notifications_delivered["backlog"] += notices
        tally.messages_out += notices
        progress = self._sent(is_notice=notices > 0 and not everyone)
        if everyone or notices or not self._wish.ack:
            return
        if progress.acked_seq >= position.seq_of(page.start):
            # Nothing in it to be acknowledged: the same gap must not come with every connection.
            progress.acked_seq = position.seq_of(page.reached)

    def _updates(
        self, state: str, ids: Sequence[str], unread: int | None, *, everyone: bool
    ) -> list[bytes]:
        """Return a frame for each."""
        where, stream = self._where(), _stream(everyone=everyone)
        updates = [messages.Update(one, state, where, unread, stream) for one in ids]
        return [frames.encode_text(messages.encode(update)) for update in updates]

    def _gap(self, gap: ledger.Gap, *, everyone: bool) -> bytes:
        self._host.shared.tally.gap(gap.reason)
        message = messages.Gap(
            from_seq=gap.from_seq,
            to_seq=gap.to_seq,
            missing=gap.missing,
            reason=gap.reason,
            stream=_stream(everyone=everyone),
        )
        return frames.encode_text(messages.encode(message))

    # Receipts.

    def ping(self, now: float) -> bytes:
        """Return a ping; its pong proves that all that was sent has arrived."""
        progress = self._progress
        payload = b""
        if progress is not None and progress.unconfirmed:
            progress.pinged, progress.everyone_pinged = progress.sent, progress.everyone_sent
            progress.pinged_at = now
            payload = position.join(progress.sent, progress.everyone_sent).encode()[:MAX_PING]
        self._host.pinged = payload
        return frames.encode(frames.PING, payload)

    def last_ping(self, now: float) -> bytes:
        """Return a ping for the end of the connection; nothing if all is confirmed."""
        progress = self._progress
        wanted = progress is not None and progress.unconfirmed
        return self.ping(now) if wanted and self._host.shared.pace.ping_interval else b""

    def dropped(self) -> None:
        """Take note that what was not confirmed may never have been written."""
        progress = self._progress
        if progress is not None:
            progress.sent, progress.everyone_sent = progress.received, progress.everyone_received

    def confirmed(self, now: float) -> None:
        """Take note that the pong has come."""
        progress = self._progress
        if progress is None:
            return
        shared = self._host.shared
        newest = progress.everyone_pinged
        if progress.pinged and progress.pinged != progress.received:
            newest = progress.pinged
        progress.received, progress.everyone_received = progress.pinged, progress.everyone_pinged
        if newest:
            age = shared.wall() - position.order(newest)[0] / 1000
            shared.tally.notification_age.observe(max(0.0, age))
        shared.receipts.soon(progress)
        if progress.unconfirmed:
            self._host.hasten(max(now, progress.pinged_at + REMIND_SECONDS))

    @property
    def asks_too_much(self) -> bool:
        """Whether its client has to wait for answers before it may ask for more."""
        return self._asks >= MAX_ASKS

    def _answered_one(self) -> None:
        self._asks -= 1
        if self._asks == MAX_ASKS - 1:
            self._host.resume()

    def acknowledge(self, seq: int, which: str, ref: str | None) -> None:
        """Tell the ledger that the client has handled all up to this one."""
        progress = self._progress or self._make_progress()
        self._asks += 1
        # What was not sent cannot have been handled, and must not count when it is sent.
        seq = min(seq, position.seq_of(self._own.point or position.NOWHERE))
        advanced = seq > progress.acked_seq
        self._host.shared.receipts.acked(progress, self, seq, which, ref)
        if advanced:
            self._put_off(progress)

    def mark_read(self, ids: Sequence[str], up_to: int | str, ref: str | None) -> None:
        """Tell the ledger, and with it the other devices, what was read."""
        host = self._host
        self._asks += 1
        command = ledger.mark(
            host.user or "",
            device=self._wish.device,
            by=host.connection_id,
            ids=ids,
            up_to=up_to if isinstance(up_to, int) else 0,
            up_to_id=up_to if isinstance(up_to, str) else "",
            rules=host.shared.rules,
        )
        host.shared.receipts.mark(command, self, ref)

    def acked(self, seq: int, ref: str | None) -> None:
        """Take note that the ledger knows of an ack; see `receipts.Asker`."""
        self._answered_one()
        progress = self._progress
        known = min(seq, position.seq_of(self._own.point or position.NOWHERE))
        if progress is not None and known > progress.acked_seq:
            progress.acked_seq = known
            self._put_off(progress)
        if ref is not None:
            self._host.answer(messages.encode(messages.Acked(seq, ref)))

    def marked(self, unread: int, ref: str | None) -> None:
        """Take note that the ledger knows what was read; see `receipts.Asker`."""
        self._answered_one()
        if ref is not None:
            self._host.answer(messages.encode(messages.Marked(unread, ref)))

    def untold(self, ref: str | None) -> None:
        """Say that the ledger could not be told; see `receipts.Asker`."""
        self._answered_one()
        if ref is None:
            return  # nobody has asked for an answer; what was acknowledged is told later
        self._host.shared.tally.error("unavailable")
        problem = "the ledger cannot be told now; try again"
        self._host.answer(messages.encode(messages.Error("unavailable", problem, ref=ref)))

    # Time.

    def due(self, now: float) -> None:
        """Ask for a receipt, or send again what is not acknowledged, if it is time."""
        progress = self._progress
        if progress is None:
            return
        if self._wants_receipt(progress) and now >= progress.pinged_at + REMIND_SECONDS:
            self._offer(self.ping(now))
        if now >= progress.redeliver_at:
            self._redeliver(progress, now)

    def next_moment(self) -> float:
        """Return when `due` has something to do."""
        progress = self._progress
        if progress is None:
            return math.inf
        if self._wants_receipt(progress):
            return min(progress.redeliver_at, progress.pinged_at + REMIND_SECONDS)
        return progress.redeliver_at

    def _wants_receipt(self, progress: Progress) -> bool:
        host = self._host
        return host.pinged is None and progress.unconfirmed and bool(host.shared.pace.ping_interval)

    def _put_off(self, progress: Progress) -> None:
        """Give the client time again, for it has acknowledged more than before."""
        shared = self._host.shared
        wait = shared.pace.ack_wait
        progress.redeliveries = 0
        progress.redeliver_at = math.inf
        if self._wish.ack and wait and progress.acked_seq < position.seq_of(self._own.point):
            progress.redeliver_at = shared.pump.now + wait
            self._host.hasten(progress.redeliver_at)

    def _redeliver(self, progress: Progress, now: float) -> None:
        pace = self._host.shared.pace
        progress.redeliver_at = math.inf
        if progress.redeliveries >= pace.max_redeliveries:
            return
        progress.redeliver_at = now + pace.ack_wait
        if self._host.outbox.empty and self._own.begin():
            progress.redeliveries += 1
            progress.rewinding = True
            self._host.shared.tally.redeliveries += 1
            self._host.shared.reader.want(self, everyone=False)


def _spills(policies: Policies) -> int:
    """Return the streams that are spilled."""
    own = _OWN if policies.inbox is Policy.SPILL else 0
    return own | (_EVERYONE if policies.broadcast is Policy.SPILL else 0)


def _stream(*, everyone: bool) -> str | None:
    """Return what frames say of their stream; nothing of the user's own."""
    return ledger.EVERYONE if everyone else None
