"""One WebSocket connection, from the 101 answer to the last byte.

Two halves meet here. The pump calls the synchronous half: bytes came, the socket is writable, a
moment on the timer wheel is due, Redis has confirmed the user's topic, the ledger has a new entry
or an answer to what was asked. The connection's own task,
in its own nursery, does whatever awaits; so far that is the close handshake. The end of the task
is the end of the connection, and cancelling its nursery is how it is ended.

Life
    nameless    no credential yet; nothing but ``auth`` is processed
    corked      subscribed in the hub, but what is offered waits: ``connection_established``
                has to come first, and with it what the client has missed. So: hub, then Redis
                confirms the topic, then the ledger is read, then both tracks go live
                A chat connection also waits for its stored session, an anonymous one for
                nothing else
    live        frames go out as they come
    leaving     a `CloseReason` is set; nothing more is offered or processed. The farewell
                (goodbye and Close frame) goes out, the client's Close frame is awaited
    lingering   the socket is the pump's (`pump.Linger`), the connection is gone

Rules
    * `Connection.end` may be called from anywhere, at any time, any number of times: the first
      reason counts. It is synchronous: after it returns, the hub does not know the connection.
    * Expected ends are values (`CloseReason`), bugs are exceptions: they end this connection
      with 1011, are logged with their traceback, and go no further.
    * A client that does not read its answers is not read (`Outbox.crowded`).
    * What happens to thousands at once (a confirmed batch of topics) must not wake a task each.
    * Each deadline is one entry on the wheel, the nearest; `Connection.due` asks all of them.
"""

import math
import socket
from typing import Final

import attrs
import trio

from trioserver import frames, messages, session
from trioserver.auth import Claims
from trioserver.caller import Caller
from trioserver.deflate import inflate
from trioserver.envelope import Entry
from trioserver.errors import AuthError, CloseReason
from trioserver.feed import Feed
from trioserver.memberships import Memberships
from trioserver.outbox import DeflatingOutbox, Outbox
from trioserver.pump import READ, WRITE
from trioserver.shared import Pending, Shared
from trioserver.sitting import Sitting
from trioserver.timers import IDLE
from trioserver.wish import NO_WISH, Wish

READ_BYTES: Final = 16 << 10
"""Bytes taken from a socket in one turn: a bound on the work one client can ask for at once."""

CONTROLS_PER_SECOND: Final = 5.0
CONTROL_BURST: Final = 20
"""Pings and unasked pongs a client may send: one client sending 200,000 per second would have a
core to itself."""

MESSAGE_SECONDS: Final = 10.0
"""Time for a message to arrive whole, from its first byte."""

FOLLOW_SECONDS: Final = 5.0
"""How long ``connection_established`` waits for Redis before it says ``unavailable``."""

GREETING_SECONDS: Final = 0.1
"""How long the 101 answer waits for Redis, so that both usually leave in one write: a client that
is connected wants ``connection_established`` anyway, and a write is the dearest part of a
handshake after the token."""

CLOSE_SECONDS: Final = 5.0
"""Time for the farewell to go out and the client's Close frame to come back."""

SLOW_CLOSE_SECONDS: Final = 1.0
"""The same for a client that was too slow: its farewell queues behind what it does not read."""

LEAVING_BYTES: Final = 64 << 10
"""What may still come from a client that is leaving, in search of its Close frame: one that
floods on would otherwise have `CLOSE_SECONDS` of a core."""

EXPIRY_GRACE_SECONDS: Final = 25.0
"""How long a connection outlives its token: time for a client to come with a new one."""

EXPIRY_NOTICE_SECONDS: Final = 30.0
"""How long before its token expires a client is told so."""

REFRESH_WEIGHT: Final = 100
"""How many requests a ``refresh`` is: a signature is to be checked, and tokens last longer."""

TOPIC_WEIGHT: Final = 4
"""How many requests one about a topic is: it costs Redis about as much."""

LATENCY_SAMPLE: Final = 0b111
"""One answer in eight is timed: looking at the clock again costs as much as reading the message."""

NOBODY: Final = Caller()

_JUDGED: Final = frozenset({CloseReason.UNAUTHORIZED, CloseReason.OVERLOAD})
"""How a connection without a user ends whose credential has been looked at."""

RECONNECT_JITTER_MS: Final = 1000
"""``reconnect_in_ms`` of an unplanned goodbye: at random up to this."""


class Connection:
    """One client's WebSocket.

    Args:
        shared: Of the worker.
        sock: Non-blocking; registered in the pump for this connection.
        connection_id: Unique in the fleet; shown to the client and in the logs.
        greeting: The 101 answer, not sent yet.
        claims: Of the credential in the handshake, or None if one must follow as a message.
        wish: Where the client wants to go on, if its handshake said so.
        caller: Who it is beside being a user.
        deflate: Whether permessage-deflate was negotiated.
    """

    __slots__ = (
        "_asked",
        "_beat_at",
        "_claims",
        "_control_at",
        "_controls",
        "_decoder",
        "_event",
        "_expires_at",
        "_feed",
        "_follow_by",
        "_greeting",
        "_heard",
        "_interest",
        "_leaving_bytes",
        "_message_since",
        "_opened",
        "_paused_until",
        "_peer_code",
        "_peer_done",
        "_pending",
        "_ping_at",
        "_progress_at",
        "_scope",
        "_session",
        "_sitting",
        "_sock",
        "_topics",
        "_warn_at",
        "_wish",
        "bucket",
        "caller",
        "connection_id",
        "fd",
        "outbox",
        "pinged",
        "reason",
        "shared",
    )

    def __init__(  # noqa: PLR0915 - each slot is set once
        self,
        shared: Shared,
        sock: socket.socket,
        connection_id: str,
        greeting: bytes,
        claims: Claims | None,
        wish: Wish = NO_WISH,
        caller: Caller = NOBODY,
        *,
        deflate: bool = False,
    ) -> None:
        now = shared.pump.now
        self.shared = shared
        self.caller = caller
        self._sock = sock
        self.fd = sock.fileno()
        self.bucket = IDLE
        self.connection_id = connection_id
        self.reason: CloseReason | None = None
        """Why the connection ends; None while it lives."""
        if deflate and shared.compressor is not None:
            self.outbox: Outbox = DeflatingOutbox(
                sock, shared.outbox_limits, self, shared.compressor
            )
            self._decoder = frames.Decoder(shared.max_message, inflate=inflate)
        else:
            self.outbox = Outbox(sock, shared.outbox_limits, self)
            self._decoder = frames.Decoder(shared.max_message)
        self.outbox.joins = wish.batch
        user = claims.user if claims else None
        self._sitting: Sitting | None = None
        if wish.chat:
            stranger = connection_id if shared.chat_anonymous else ""
            self._session: session.Session = session.ChatSession(user, stranger)
            self._sitting = Sitting(asked=wish.session_id)
        else:
            self._session = session.Session(user)
        self._topics: Memberships | None = None
        """None until the first one is asked for."""
        self._claims = claims
        self._greeting = greeting
        self._wish = wish
        self._feed: Feed | None = None
        """None while no credential has come."""
        self._pending: Pending | None = None
        """What Redis has not confirmed yet."""
        self._follow_by = math.inf
        self._expires_at = self._warn_at = math.inf
        """When the token and its grace are over, on the pump's clock; when the client is to be told
        that it is about to expire."""
        self._scope: trio.CancelScope | None = None
        self._event: trio.Event | None = None
        """What the task waits for while it says farewell."""
        self._interest = READ
        self._peer_done = False
        """Whether the client has said its last."""
        self._peer_code = b""
        """The code in the client's Close frame, as on the wire; it is echoed."""
        self._leaving_bytes = 0
        """What has come since it is leaving."""
        self._opened = self._heard = now
        self._message_since: float | None = None
        self.pinged: bytes | None = None
        """The payload of our ping that is unanswered."""
        self._asked = 0
        """Requests in the read that is being processed, by their weight."""
        self._paused_until = self._controls = 0.0
        """Until when the client is not read, because it has asked for too much, 0 if it is; how
        full its bucket of pings and unasked pongs is."""
        self._control_at = now
        self._progress_at = math.inf
        pace = shared.pace
        self._ping_at = now + shared.jittered(pace.ping_interval or math.inf)
        self._beat_at = now + shared.jittered(pace.heartbeat_interval or math.inf)

    @property
    def waiting_bytes(self) -> int:
        """Bytes that its client has still to take."""
        return self.outbox.waiting_bytes

    @property
    def user(self) -> str | None:
        """Who this is; None while no credential has come."""
        return self._session.user

    @property
    def claims(self) -> Claims | None:
        """What its token says; None while no credential has come."""
        return self._claims

    @property
    def device(self) -> str:
        """What the client calls itself; empty if it has no name."""
        return self._wish.device

    @property
    def since(self) -> float:
        """When it began, in seconds since 1970."""
        return self.shared.wall() - (self.shared.pump.now - self._opened)

    # The task's half: everything that awaits.

    async def run(self) -> None:
        """Be the connection's task until it ends, for whatever reason; never raises a bug.

        Cancellation:
            Ends the connection with a farewell that is sent but not waited for.
        """
        try:
            try:
                async with trio.open_nursery() as nursery:
                    self._scope = nursery.cancel_scope
                    # It may have ended before this task had its first turn.
                    if self.reason is None:
                        await trio.sleep_forever()
            except* Exception as bugs:  # noqa: BLE001 - one connection's bug is its own end
                self.shared.log_bug("connection", bugs)
                self.end(CloseReason.INTERNAL_ERROR)
            finally:
                self._scope = None
            await self._farewell()
        finally:
            self._release()

    async def _farewell(self) -> None:
        """Wait, for a bounded time, until all is said and the client has closed."""
        if self._settled():
            return
        slow = self.reason is CloseReason.TOO_SLOW
        self._event = trio.Event()
        with trio.move_on_after(SLOW_CLOSE_SECONDS if slow else CLOSE_SECONDS):
            await self._event.wait()

    def _settled(self) -> bool:
        return self.reason is CloseReason.PEER_LOST or (self.outbox.empty and self._peer_done)

    def _release(self) -> None:
        """Give everything back. The socket goes to the pump, to be closed without RST."""
        shared = self.shared
        self.end(CloseReason.GOING_AWAY)  # Only a cancelled task has no reason yet.
        reason = self.reason or CloseReason.GOING_AWAY
        shared.pump.wheel.cancel(self)
        shared.blocked.discard(self)
        self.outbox.abandon()
        if reason is CloseReason.PEER_LOST:
            shared.pump.forget(self)
            self._sock.close()
        else:
            shared.pump.linger(self._sock, self)
        shared.connections.discard(self)
        shared.board.closed(self.caller.key)
        shared.tally.connections -= 1
        shared.tally.chat_sessions -= self._sitting is not None
        shared.tally.closed(reason, shared.pump.now - self._opened)
        if reason is CloseReason.TOO_SLOW:
            shared.tally.slow_consumers["disconnect"] += 1
        if self._session.nameless and reason not in _JUDGED:
            shared.tally.auth["missing"] += 1
        shared.log_end(self, reason)

    # The pump's half: nothing here awaits.

    def begin(self, early: bytes) -> None:
        """Come to life: answer the handshake, or wait with that for Redis. Call it once.

        Args:
            early: Bytes that came behind the request head.
        """
        shared = self.shared
        shared.connections.add(self)
        shared.board.opened(self.caller.key)
        shared.tally.connections += 1
        shared.tally.opened += 1
        shared.tally.chat_sessions += self._sitting is not None
        if self._session.nameless:
            self.outbox.offer(self._take_greeting())
        else:
            self._enter()
        if early and self.reason is None:
            self._receive(early)
        if self.reason is None:
            shared.pump.wheel.schedule(self, self._next_moment())

    def _enter(self) -> None:
        """Find out what there is for the client, then say so."""
        outbox = self.outbox
        if not outbox.corked:
            outbox.cork()
        now = self.shared.pump.now
        self._follow_by = now + FOLLOW_SECONDS
        user = self._session.user
        if self._sitting is not None:
            self._sitting.sit(self, self.shared.chats, user)
            if self.reason is not None:
                return
        if user is not None:
            self._follow(user)
        if outbox.corked:
            self.shared.pump.wheel.hasten(self, now + GREETING_SECONDS)

    def seated(self, why: str) -> None:
        """Take note that the stored session is ours; see `chat.Host`."""
        sitting = self._sitting
        if self.reason is not None or sitting is None:
            return
        known, sitting.why = sitting.why, why
        if not self.outbox.corked:
            if known is None:
                # It was told that nobody knows; now somebody does.
                self._say(self._established(None, ""))
        elif self._feed is None:
            self.establish(None, "", b"")
        elif sitting.page is not None:
            self.establish(*sitting.page)

    def not_yours(self) -> None:
        """Take note that the stored session belongs to another user; see `chat.Host`."""
        sitting = self._sitting
        if self.reason is not None or sitting is None:
            return
        if self._session.user is not None:
            self.end(CloseReason.FORBIDDEN)
            return
        # It may still say that it is that user.
        sitting.lose(self.shared.pump.now)
        self._session.needs_user()
        self._follow_by = math.inf
        self.shared.tally.error("unauthenticated")
        error = messages.Error("unauthenticated", "this session belongs to a user: send auth")
        frame = frames.encode_text(messages.encode(error))
        if self.outbox.corked:
            self.outbox.uncork(self._take_greeting() + frame)
        else:
            self.outbox.offer(frame)
        self.hasten(self._next_moment())
        # It may not have been read for a reason that has gone meanwhile.
        self.resume()

    def _say(self, message: bytes) -> None:
        """Send a message that nobody has asked for."""
        frame = frames.encode_text(message)
        if self.outbox.offer(frame):
            self.shared.tally.bytes_out += len(frame)

    def _follow(self, user: str) -> None:
        """Subscribe, read what was missed: what is published after that arrives."""
        shared = self.shared
        outbox = self.outbox
        self._feed = Feed(self, self._wish)
        topic = shared.user_topic(user)
        if shared.hub.add(topic, outbox):
            shared.tally.users += 1
        shared.hub.add(shared.broadcast_topic, outbox)
        shared.registry.enter(self)
        self._pending = shared.follower.follow(topic)
        if self._pending is None:
            self._feed.begin()
        else:
            self._pending.notify(self)

    def followed(self) -> None:
        """Take note that Redis has confirmed the user's topic; never raises."""
        self._pending = None
        if self.reason is None and self._feed is not None:
            self._feed.begin()

    def establish(self, where: str | None, why: str, backlog: bytes) -> None:
        """Send the first message, what was missed, and what was held back for it.

        Args:
            where: The position from which this connection is served; None if nobody knows.
            why: It is not the one that was asked for; empty if it is.
            backlog: Frames.
        """
        sitting = self._sitting
        if sitting is not None and sitting.why is None and why != "unavailable":
            sitting.page = (where, why, backlog)
            return
        outbox = self.outbox
        self._follow_by = math.inf
        established = frames.encode_text(self._established(where, why))
        outbox.uncork(self._take_greeting() + established + backlog)
        if self.reason is None and self._claims is not None and self._claims.topics.join:
            self.topics.join(self._claims.topics.join)
        if self.reason is not None:
            return
        # What is asked for while the outbox is corked is not read before it has been emptied.
        if self._topics is not None:
            self._topics.read_on()
        if outbox.empty:
            if self._feed is not None:
                self._feed.read_on()
            self._watch(self._wanted())

    @property
    def topics(self) -> Memberships:
        """The topics of this connection; made when it is asked for the first time."""
        if self._topics is None:
            self._topics = Memberships(self)
        return self._topics

    def _wait_longer(self, now: float) -> None:
        """Answer the handshake although Redis has not, and give up waiting for it in the end."""
        greeting = self._take_greeting()
        if greeting and not self.outbox.send_past_cork(greeting):
            self.end(CloseReason.PEER_LOST)
        elif now >= self._follow_by and not (self._feed is not None and self._feed.go_alone()):
            # It stays wanted: as soon as Redis is back, it is told what it has missed.
            page = self._sitting.page if self._sitting is not None else None
            where, _, backlog = page or (None, "", b"")
            self.establish(where, "unavailable", backlog)

    def _take_greeting(self) -> bytes:
        """Return the 101 answer if it has not been sent, else nothing."""
        greeting, self._greeting = self._greeting, b""
        return greeting

    def _established(self, where: str | None, why: str) -> bytes:
        shared = self.shared
        claims, wish, sitting = self._claims, self._wish, self._sitting
        if sitting is not None and sitting.why is not None and why != "unavailable":
            why = sitting.why
        return messages.encode(
            messages.ConnectionEstablished(
                connection_id=self.connection_id,
                label=wish.label or None,
                session_id=None if sitting is None else sitting.session_id,
                user=self._session.user,
                resumed=not why,
                count=self._session.count if sitting is None else sitting.count,
                heartbeat_seconds=shared.pace.heartbeat_interval,
                expires_in=None if claims is None else self._live_until(claims.expires_at),
                server_time=shared.stamp(),
                position=where,
                reason=why or None,
            )
        )

    def _live_until(self, expires_at: float) -> int:
        """Let the connection live as long as a token; return its whole seconds from now."""
        now = self.shared.pump.now
        seconds = expires_at - self.shared.wall()
        before, self._expires_at = self._expires_at, now + seconds + EXPIRY_GRACE_SECONDS
        # Once for each end: a client that comes with the same token again has been told.
        if self._expires_at > before + 1 or before == math.inf:
            self._warn_at = now + max(seconds - EXPIRY_NOTICE_SECONDS, seconds / 2)
        return max(0, int(seconds))

    def entered(self, entry: Entry, *, everyone: bool) -> bool:
        """Give an entry of the ledger to the feed; see `outbox.Owner.entered`."""
        feed = self._feed
        return feed is not None and self.reason is None and feed.entered(entry, everyone=everyone)

    def entered_topic(self, topic: bytes, entry: Entry, frame: bytes) -> bool:
        """Give an entry of a durable topic to who wants it; see `outbox.Owner.entered_topic`."""
        topics = self._topics
        return topics is not None and self.reason is None and topics.entered(topic, entry, frame)

    def catch_up(self) -> None:
        """Look whether something was published that did not come."""
        if self.reason is not None:
            return
        if self._feed is not None:
            self._feed.catch_up()
        if self._topics is not None:
            self._topics.catch_up()

    def answer(self, message: bytes) -> None:
        """Send a message that the client has asked for."""
        frame = frames.encode_text(message)
        if self.reason is None and self.outbox.offer(frame):
            self.shared.tally.messages_out += 1
            self.shared.tally.bytes_out += len(frame)

    def answer_chat(self, answers: bytes, messages_out: int) -> None:
        """Send the answers to counted messages; see `chat.Host`.

        Args:
            answers: Frames.
            messages_out: How many messages they are.
        """
        if self.reason is None and self.outbox.offer(answers):
            self.shared.tally.messages_out += messages_out
            self.shared.tally.bytes_out += len(answers)

    def hasten(self, when: float) -> None:
        """Have `due` called then, or before."""
        if self.reason is None:
            self.shared.pump.wheel.hasten(self, when)

    def end(self, reason: CloseReason, *, reconnect_in_ms: int | None = None) -> None:
        """End the connection for ``reason``; idempotent, the first reason counts.

        Args:
            reason: Why; decides the close code.
            reconnect_in_ms: What to tell the client; by default a small random time.
        """
        if self.reason is not None:
            return
        self.reason = reason
        self._session.closed = True
        if self._pending is not None:
            self._pending.forget(self)
            self._pending = None
        if self._scope is not None:
            self._scope.cancel()
        self._leave()
        outbox = self.outbox
        if reason is CloseReason.PEER_LOST:
            outbox.abandon()
        elif reason is CloseReason.PEER_CLOSED:
            outbox.finish(self._take_greeting() + frames.encode(frames.CLOSE, self._peer_code))
        else:
            farewell = self._take_greeting() + self._goodbye(reason, reconnect_in_ms)
            slow = reason is CloseReason.TOO_SLOW
            if self._feed is not None and slow:
                self._feed.dropped()
            elif self._feed is not None:
                # What was sent in the last second has no receipt yet, and would come twice.
                farewell = self._feed.last_ping(self.shared.pump.now) + farewell
            outbox.finish(farewell, drop=slow)
        if not self._peer_done:
            # It may not have been read for a while; now its Close frame matters.
            self._watch(self._interest | READ)

    def shed(self) -> None:
        """Give up what waits for the client: end it as too slow; or, if it is leaving, just leave.

        Who is leaving keeps what waits until its farewell is over, and could hold the memory of
        the others with it.
        """
        if self.reason is None:
            self.end(CloseReason.TOO_SLOW)
        elif self.reason is not CloseReason.TOO_SLOW:
            self.outbox.finish(b"", drop=True)
            self._check_settled()

    def _goodbye(self, reason: CloseReason, reconnect_in_ms: int | None) -> bytes:
        if reconnect_in_ms is None:
            reconnect_in_ms = self.shared.rng.randrange(RECONNECT_JITTER_MS)
        goodbye = messages.Goodbye(
            reason.label, reason.reconnect, reconnect_in_ms if reason.reconnect else 0
        )
        return frames.encode_text(messages.encode(goodbye)) + frames.encode_close(
            reason.code, reason.text
        )

    def _leave(self) -> None:
        """Leave everything: nothing comes from anywhere any more."""
        if self._sitting is not None:
            self._sitting.leave()
        if self._topics is not None:
            self._topics.leave()
            self.shared.excluding.pop(self.connection_id, None)
        user = self._session.user
        if user is None:
            return
        shared = self.shared
        topic = shared.user_topic(user)
        shared.hub.remove(shared.broadcast_topic, self.outbox)
        shared.registry.leave(self)
        if shared.hub.remove(topic, self.outbox):
            shared.tally.users -= 1
            shared.follower.release(topic)

    def readable(self) -> None:
        """Take what the client sent, at most `READ_BYTES` of it."""
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._receive(data)
        else:
            self.hung_up()

    def _receive(self, data: bytes) -> None:
        shared = self.shared
        now = shared.pump.now
        self._heard = now
        shared.tally.bytes_in += len(data)
        decoder = self._decoder
        events = decoder.receive(data)
        if self.reason is not None:
            self._leaving_bytes += len(data)
            self._receive_last(events, now)
            return
        verdict = self._process(events, now)
        if decoder.failure is not None:
            verdict = verdict or decoder.failure
            self._peer_done = True
        if verdict is not None:
            self.end(verdict)
            self._check_settled()
        elif not decoder.incomplete:
            self._message_since = None
        elif self._message_since is None:
            self._message_since = now
            shared.pump.wheel.hasten(self, now + MESSAGE_SECONDS)
        if self._asked:
            self._pause(now)
        elif self._sitting is not None and not self._wanted():
            self._watch(self._interest & ~READ)
        if self.outbox.crowded and not self._session.closed:
            self._watch(0 if self.outbox.corked else WRITE)

    def _receive_last(self, events: list[frames.Event], now: float) -> None:
        """Process what comes while leaving: only a receipt and the Close frame matter."""
        for opcode, payload in events:
            if opcode == frames.PONG:
                self._take_receipt(payload, now)
        if self._decoder.failure is not None or self._leaving_bytes > LEAVING_BYTES:
            self._peer_done = True
            self._watch(self._interest & ~READ)
        self._check_settled()

    def _pause(self, now: float) -> None:
        """Stop reading a client that has asked for too much, until that has been made up for.

        It loses nothing by it, and need not know: it is only slowed down.
        """
        asked, self._asked = self._asked, 0
        wait = self.shared.requests.owe(self._session.payer, now, asked)
        if self.reason is not None:
            return
        if wait:
            self._paused_until = now + wait
            self.shared.pump.wheel.hasten(self, self._paused_until)
        if not self._wanted():
            self._watch(self._interest & ~READ)

    def _wanted(self) -> int:
        """Return what to watch the socket for while nothing waits to be sent."""
        if self._peer_done:
            return 0
        if self.reason is not None:
            return READ  # For its Close frame.
        if self._sitting is not None and (self._sitting.waits or self._sitting.crowded):
            return 0
        if self._paused_until or (self._feed is not None and self._feed.asks_too_much):
            return 0
        if self._topics is not None and self._topics.asks_too_much:
            return 0
        return READ

    def resume(self) -> None:
        """Read from the client again, unless there is another reason not to."""
        if self.reason is None and self.outbox.empty:
            self._watch(self._wanted())

    def _process(  # noqa: C901, PLR0912 - the hot loop; a call more costs 60 ns per message
        self, events: list[frames.Event], now: float
    ) -> CloseReason | None:
        """Answer what came in one read; return how the connection ends, if it does."""
        shared = self.shared
        tally = shared.tally
        replies: list[bytes] = []
        verdict = ping = None
        coming = iter(events)
        for opcode, payload in coming:
            if opcode == frames.TEXT:
                self._message_since = None
                tally.messages_in += 1
                action = self._session.receive(payload, now, shared.stamp(), shared.rates)
                if type(action) is session.Send:
                    # The usual one first, and by identity: a class pattern costs 0.3 µs.
                    tally.messages_out += 1
                    replies.append(frames.encode_text(action.data))
                    continue
                if type(action) is session.Count:
                    self._count(action)
                    continue
                verdict = self._perform(action, replies)
                if self._sitting is not None and self._sitting.waits:
                    self._sitting.rest.extend(coming)
            elif opcode == frames.CLOSE:
                self._peer_code = payload[:2]
            elif opcode == frames.BINARY:
                verdict = CloseReason.UNSUPPORTED_DATA
            else:
                if opcode == frames.PING:
                    ping = payload
                verdict = self._control(opcode, payload, now)
            if verdict is not None:
                break
        if ping is not None:
            # RFC 6455 5.5.3: of several pings only the latest needs its pong.
            replies.append(frames.encode(frames.PONG, ping))
        if replies:
            # One write for all that one read has asked for.
            answer = b"".join(replies) if len(replies) > 1 else replies[0]
            if self.outbox.offer(answer):
                tally.bytes_out += len(answer)
                if tally.messages_in & LATENCY_SAMPLE == 1:
                    tally.message_latency.observe(trio.current_time() - now)
        return verdict

    def _count(self, action: session.Count) -> None:
        """Have a message counted on the stored session, and answered then."""
        if self._sitting is not None and self._sitting.chat is not None:
            self._sitting.chat.message(action.payload, action.ref, action.id, self.shared.stamp())

    def _perform(self, action: session.Action | None, replies: list[bytes]) -> CloseReason | None:
        """Do what the session has decided; return how the connection ends, if it does."""
        match action:
            case session.Answer(data):
                self._asked += 1
                self.shared.tally.messages_out += 1
                replies.append(frames.encode_text(data))
            case session.SendError(data, code):
                replies.append(frames.encode_text(data))
                self.shared.tally.error(code)
            case session.Authenticate(token, wish):
                return self._authenticate(token, wish, replies)
            case session.Refresh(token, ref):
                return self._refresh(token, ref, replies)
            case session.Acknowledge() | session.MarkRead():
                self._tell(action)
            case session.Ask(message):
                self._ask(message)
            case session.Close(reason):
                return reason
        return None

    def _tell(self, action: session.Acknowledge | session.MarkRead) -> None:
        """Tell the ledger what the client has done with notifications."""
        feed = self._feed
        if isinstance(action, session.Acknowledge):
            self._asked += 1
            if feed is not None:
                feed.acknowledge(action.seq, action.id, action.ref)
        else:
            self._asked += max(1, len(action.ids))
            if feed is not None:
                feed.mark_read(action.ids, action.up_to, action.ref)

    def _ask(self, message: messages.TopicMessage) -> None:
        """Do what the client asks of a topic."""
        self._asked += TOPIC_WEIGHT
        match message:
            case messages.Subscribe():
                self.topics.subscribe(message, self.shared.pump.now)
            case messages.Unsubscribe():
                self.topics.unsubscribe(message)
            case messages.Publish():
                self.shared.tally.topic_publishes += 1
                if message.exclude_self:
                    self.shared.excluding[self.connection_id] = self.outbox
                self.topics.publish(message)
            case messages.AskPresence():
                self.topics.ask_presence(message)

    def _control(self, opcode: int, payload: bytes, now: float) -> CloseReason | None:
        """Count a ping or pong; return how the connection ends if there are too many.

        A leaky bucket: each costs one, `CONTROLS_PER_SECOND` leak away. The pong that we asked
        for is free.
        """
        if opcode == frames.PONG and self._take_receipt(payload, now):
            return None
        leaked = (now - self._control_at) * CONTROLS_PER_SECOND
        self._controls = max(0.0, self._controls - leaked) + 1
        self._control_at = now
        return CloseReason.POLICY if self._controls > CONTROL_BURST else None

    def _take_receipt(self, payload: bytes, now: float) -> bool:
        """Take a pong; return whether it is the one that we asked for."""
        if payload != self.pinged:
            return False
        self.pinged = None
        if payload and self._feed is not None:
            self._feed.confirmed(now)
        return True

    def _authenticate(self, token: str, wish: Wish, replies: list[bytes]) -> CloseReason | None:
        try:
            claims = self.shared.verify(token)
        except AuthError as error:
            if not error.retry_after:
                return CloseReason.UNAUTHORIZED
            # Its key is not known yet: the client is to come again, not to throw its token away.
            self.end(CloseReason.OVERLOAD, reconnect_in_ms=error.retry_after * 1000)
            return CloseReason.OVERLOAD
        self._claims = claims
        self._wish = wish.after(self._wish)
        self.outbox.joins = self._wish.batch
        if wish.client_type:
            self.caller = attrs.evolve(self.caller, client_type=wish.client_type)
        sitting = self._sitting
        if sitting is not None:
            sitting.logs_in(wish.session_id)
        # What was said to the nameless client goes out; what follows waits for the first message.
        if replies:
            self.outbox.offer(b"".join(replies))
            replies.clear()
        if self.reason is not None:
            # It was gone when we answered: what has ended must not enter anywhere.
            return None
        if self.outbox.empty or self.outbox.corked:
            self._log_in(claims)
        elif self._session.nameless or sitting is None:
            # Nameless, and it does not even read what was wrong with its messages.
            return CloseReason.TOO_SLOW
        else:
            # First it has to read what it was sent as a stranger.
            sitting.waits = True
            self._watch(self._interest & ~READ)
        return None

    def _go_on(self, sitting: Sitting, claims: Claims) -> None:
        """Log in now that everything before has been read, then process what came behind."""
        sitting.waits = False
        self._log_in(claims)
        rest, sitting.rest = sitting.rest, []
        verdict = None if self.reason is not None else self._process(rest, self.shared.pump.now)
        if verdict is not None:
            self.end(verdict)

    def _log_in(self, claims: Claims) -> None:
        self._session.authenticated(claims.user)
        self._enter()

    def _refresh(self, token: str, ref: str | None, replies: list[bytes]) -> CloseReason | None:
        """Go on with another token of the same user; a bad one changes nothing."""
        self._asked += REFRESH_WEIGHT
        error = None
        try:
            claims = self.shared.verify(token)
        except AuthError as problem:
            wait = problem.retry_after
            error = (
                messages.Error("unavailable", "its key is not known yet", wait * 1000, ref)
                if wait
                else messages.Error("invalid_token", "the token was not accepted", None, ref)
            )
        if error is not None:
            self.shared.tally.error(error.code)
            replies.append(frames.encode_text(messages.encode(error)))
            return None
        if claims.user != self._session.user:
            return CloseReason.FORBIDDEN
        self._claims = claims
        if self._topics is not None or claims.topics.join:
            self.topics.reconsider()
        if self.outbox.corked:
            # The first message will say how long this one lives.
            expires_in = max(0, int(claims.expires_at - self.shared.wall()))
        else:
            expires_in = self._live_until(claims.expires_at)
            self.hasten(self._next_moment())
        refreshed = messages.TokenRefreshed(expires_in, ref)
        replies.append(frames.encode_text(messages.encode(refreshed)))
        return None

    def writable(self) -> None:
        """Send what waited."""
        outbox = self.outbox
        if outbox.flush():
            # Taking bytes is a sign of life, and maybe the only one while we do not read.
            self._progress_at = self._heard = self.shared.pump.now
            if self._message_since is not None and not self._interest & READ:
                self._message_since = self._heard
        if outbox.empty:
            self._progress_at = math.inf
            self.shared.blocked.discard(self)
            sitting = self._sitting
            if sitting is not None and sitting.waits and self._claims and self.reason is None:
                self._go_on(sitting, self._claims)
            self._watch(self._wanted())
            self._check_settled()
            if self._feed is not None and self.reason is None:
                self._feed.read_on()
            if self._topics is not None and self.reason is None:
                self._topics.read_on()

    def hung_up(self) -> None:
        """Note that the client is gone."""
        self._peer_done = True
        self.end(CloseReason.PEER_LOST)
        # In the middle of leaving, an end without a Close frame is an end all the same; what
        # could not be flushed never will be.
        self.outbox.abandon()
        self._watch(0)
        if self._event is not None:
            self._event.set()

    def failed(self, bug: Exception) -> None:  # noqa: ARG002 - logged by the pump
        """End after a bug in one of these callbacks."""
        self.end(CloseReason.INTERNAL_ERROR)

    def blocked(self) -> None:
        """Note that the outbox waits for the socket."""
        pump = self.shared.pump
        self.shared.blocked.add(self)
        self._progress_at = pump.now
        self._watch(self._interest | WRITE)
        if self.shared.pace.write_wait:
            pump.wheel.hasten(self, pump.now + self.shared.pace.write_wait)

    def overflowed(self) -> None:
        """End a client that does not keep up."""
        self.end(CloseReason.TOO_SLOW)

    def broke(self) -> None:
        """Note that the socket failed while writing."""
        self.hung_up()

    def _watch(self, interest: int) -> None:
        if interest != self._interest:
            self._interest = interest
            self.shared.pump.watch(self, interest)

    def _check_settled(self) -> None:
        if self.reason is not None and self._event is not None and self._settled():
            self._event.set()

    # Time.

    def due(self, now: float) -> None:
        """Do what the clock asks for: deadlines first, then signs of life."""
        if self.reason is not None:
            return
        reason = self._overdue(now)
        if reason is not None:
            self.end(reason)
            return
        if self._paused_until and now >= self._paused_until:
            self._paused_until = 0.0
            self._heard = now
            if self._message_since is not None:
                self._message_since = now
            self.resume()
        if self.outbox.corked:
            self._wait_longer(now)
        elif self._feed is not None:
            self._feed.due(now)
            if self._topics is not None:
                self._topics.due(now)
        signs = self._signs_of_life(now)
        if signs:
            self.outbox.offer(signs)
        if self.reason is None:
            self.shared.pump.wheel.schedule(self, self._next_moment())

    def _signs_of_life(self, now: float) -> bytes:
        """Return the heartbeat and the ping that are due."""
        signs = b""
        pace = self.shared.pace
        live = not self.outbox.corked
        if now >= self._ping_at:
            self._ping_at = now + self.shared.jittered(pace.ping_interval)
            if live and self._feed is not None:
                signs = self._feed.ping(now)
            elif live:
                signs = frames.encode(frames.PING, b"")
                self.pinged = b""
        if now >= self._beat_at:
            self._beat_at = now + self.shared.jittered(pace.heartbeat_interval)
            if live:
                beat = messages.Heartbeat(self.shared.stamp())
                signs = frames.encode_text(messages.encode(beat)) + signs
        if live and now >= self._warn_at:
            left = self._expires_at - EXPIRY_GRACE_SECONDS - now
            self._warn_at = math.inf
            notice = messages.TokenExpiring(max(0, round(left)))
            signs = frames.encode_text(messages.encode(notice)) + signs
        return signs

    def _overdue(self, now: float) -> CloseReason | None:
        for moment, reason in self._deadlines():
            if now >= moment:
                return reason
        return None

    def _deadlines(self) -> list[tuple[float, CloseReason]]:
        """Return until when what must have happened, and how the connection ends if not."""
        pace = self.shared.pace
        deadlines = [(self._progress_at + (pace.write_wait or math.inf), CloseReason.TOO_SLOW)]
        deadlines.append((self._expires_at, CloseReason.UNAUTHORIZED))
        if self._session.nameless:
            patience = pace.auth_timeout or math.inf
            refused_at = None if self._sitting is None else self._sitting.refused_at
            if refused_at is None:
                deadlines.append((self._opened + patience, CloseReason.AUTH_TIMEOUT))
            else:
                deadlines.append((refused_at + patience, CloseReason.FORBIDDEN))
        if self._message_since is not None and not self._paused_until:
            deadlines.append((self._message_since + MESSAGE_SECONDS, CloseReason.POLICY))
        silence = pace.pong_wait if pace.ping_interval else pace.idle_timeout
        if silence:
            deadlines.append((self._heard + silence, CloseReason.NO_PONG))
        return deadlines

    def _next_moment(self) -> float:
        nearest = min([moment for moment, _ in self._deadlines()])
        if self.outbox.corked:
            patience = GREETING_SECONDS if self._greeting else FOLLOW_SECONDS
            nearest = min(nearest, self._follow_by - FOLLOW_SECONDS + patience)
        elif self._feed is not None:
            nearest = min(nearest, self._feed.next_moment())
            if self._topics is not None:
                nearest = min(nearest, self._topics.next_moment())
        if self._paused_until:
            nearest = min(nearest, self._paused_until)
        return min(nearest, self._ping_at, self._beat_at, self._warn_at)
