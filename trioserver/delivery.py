"""From the subscription to the outboxes: each publication is parsed once, here.

A raw one becomes one frame for all who get it, and so does what is published to a topic. An entry
of a user's or of everyone's stream goes to the feeds, which make a frame for each connection: it
names that client's position.

`Delivery.receive` is what the subscription calls with every message. It is synchronous where a
handful of outboxes is concerned: these hold what they get until `Delivery.turn_over`, so that what
comes together leaves together. For many it returns the fan-out to be awaited, which the
subscription does before it looks at the next message: so order holds, and the loop has its turn
every `OFFERS_PER_TURN` outboxes.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from trioserver import envelope, frames, messages, topic_frames
from trioserver.clock import Stamp
from trioserver.envelope import Came, Entry, Said
from trioserver.hub import Hub
from trioserver.metrics import Tally
from trioserver.outbox import Outbox, Turn
from trioserver.slow_policies import NO_POLICIES, Policies, Policy
from trioserver.soft import EVERYONE, Soft
from trioserver.track import Track, Verdict

_ENVELOPE: Final = envelope.VERSION[0]

OFFERS_PER_TURN: Final = 256
"""Writes between two checkpoints of a fan-out: about 1 ms."""

_SOFT: Final = frozenset({Policy.CONFLATE, Policy.DROP_OLDEST})


@attrs.define(eq=False, kw_only=True)
class Delivery:
    """Brings what is published to the connections of this worker."""

    hub: Hub
    tally: Tally
    broadcast_topic: bytes
    topic_prefix: bytes = b"topic:"
    """Of the channels that bring what is published to topics."""
    max_payload: int
    """Bytes of a notification's payload; 0 means no limit."""
    log_malformed: Callable[[bytes, str], None]
    """Called with the topic and what is wrong; limits its own rate."""
    head: Track[Entry]
    """Where everyone's stream stands; moved here."""
    turn: Turn = attrs.field(factory=Turn)
    """What was delivered and not written; the outboxes' own."""
    policies: Policies = NO_POLICIES
    """What becomes of those who do not keep up."""
    outbox_of: Callable[[str], Outbox | None] = lambda _connection: None
    """Returns the outbox of a connection that may not want what it has published itself."""
    stamp: Stamp = attrs.field(factory=Stamp)
    _choosy: bool = attrs.field(init=False)
    """Whether there is any policy: looked at for every message."""
    _arrived: list[float] = attrs.field(factory=list, init=False)
    """When what is held came."""

    def __attrs_post_init__(self) -> None:
        self._choosy = bool(self.policies)

    def receive(self, topic: bytes, data: bytes) -> Awaitable[None] | None:
        """Deliver one publication; return what remains to be awaited, if anything.

        A publication that is no notification is counted and logged, and that is all.
        """
        if data and data[0] == _ENVELOPE:
            return self._enter(topic, data)
        present = self.hub.find(topic)
        if present is None:
            # Released and still subscribed for a moment, or a broadcast: nobody here wants it.
            self.tally.published["nobody"] += 1
            return None
        arrived = time.perf_counter()
        try:
            published = messages.publication(data, self.max_payload)
        except messages.BadPublish as problem:
            self._malformed(topic, problem)
            return None
        if topic.startswith(self.topic_prefix):
            said = Said("", "", published.type, published.key, published.payload)
            frame = self._topical(topic, said)
            many = True
        else:
            frame = frames.encode_text(messages.notification(published, self.stamp()))
            if self._choosy:
                frame = self._softened(topic, frame, published)
            many = topic == self.broadcast_topic
        if many or isinstance(present, set):
            return self._deliver(topic, frame, arrived)
        if present.deliver(frame):
            # The usual one: a user with one connection. Counted here: a call costs 60 ns.
            tally = self.tally
            tally.published["delivered"] += 1
            tally.notifications_delivered["ephemeral"] += 1
            tally.messages_out += 1
            tally.bytes_out += len(frame)
            self._arrived.append(arrived)
        else:
            self._count(0, 1, len(frame))
            self._held(0, arrived)
        return None

    def _softened(self, topic: bytes, frame: bytes, published: messages.RawPublication) -> bytes:
        """Return what a user or everyone gets as the policy for its type wants it."""
        kind = published.type
        if topic == self.broadcast_topic:
            return _soft(frame, self.policies.of_broadcast(kind), EVERYONE, kind, published.key)
        return _soft(frame, self.policies.of_type(kind), "", kind, published.key)

    def turn_over(self) -> None:
        """Let go out what was delivered since the last time; never raises."""
        self.tally.failed += self.turn.over()
        arrived = self._arrived
        if arrived:
            self._arrived = []
            now = time.perf_counter()
            for moment in arrived:
                self.tally.delivery.observe(now - moment)

    def _topical(self, topic: bytes, said: Said) -> bytes:
        """Return the frame of what was published to a live topic."""
        name = topic[len(self.topic_prefix) :].decode()
        notification = messages.Topical(
            said.type, name, said.payload, self.stamp(), said.user or None, said.key
        )
        frame = frames.encode_text(messages.encode(notification))
        if not self._choosy:
            return frame
        return _soft(frame, self.policies.of_topic(name), name, said.type, said.key)

    def _deliver(
        self, topic: bytes, frame: bytes, arrived: float, skipped: Outbox | None = None
    ) -> Awaitable[None] | None:
        """Deliver a frame to all who want ``topic``, but one."""
        present = self.hub.find(topic)
        if isinstance(present, set) and len(present) > OFFERS_PER_TURN:
            return self._fan_out(topic, frame, arrived, skipped)
        accepted, refused = self.hub.deliver(topic, frame, skipped)
        self._count(accepted, refused, len(frame))
        self._held(accepted, arrived)
        return None

    def _enter(self, topic: bytes, data: bytes) -> Awaitable[None] | None:
        """Let those who want ``topic`` know of an envelope."""
        arrived = time.perf_counter()
        try:
            entry = envelope.decode(data)
            if topic.startswith(self.topic_prefix):
                return self._enter_topic(topic, entry, arrived)
            if isinstance(entry, Said | Came):
                raise messages.BadPublish("an envelope that is for topics only")  # noqa: TRY301
        except messages.BadPublish as problem:
            # Who waits for the next one will find the hole, and read.
            self._malformed(topic, problem)
            return None
        everyone = topic == self.broadcast_topic
        outboxes = self.hub.outboxes(topic)
        if not everyone:
            accepted = 0
            for outbox in outboxes:
                accepted += outbox.enter(entry, everyone=False)
            self._held(accepted, arrived)
            return None
        if self.head.take(entry) is Verdict.READ:
            self.head.forget()
        return self._enter_all(outboxes, lambda one: one.enter(entry, everyone=True), arrived)

    def _enter_topic(
        self, topic: bytes, entry: envelope.Envelope, arrived: float
    ) -> Awaitable[None] | None:
        """Let the subscribers of a topic know of what was said there, or who has come."""
        name = topic[len(self.topic_prefix) :].decode()
        if isinstance(entry, Said):
            skipped = self.outbox_of(entry.connection) if entry.exclude else None
            if entry.type in messages.RESERVED_TYPES:
                raise messages.BadPublish(f"the type {entry.type} is reserved")
            return self._deliver(topic, self._topical(topic, entry), arrived, skipped)
        if isinstance(entry, Came):
            event = messages.PresenceEvent(name, entry.event, entry.user, entry.users, self.stamp())
            return self._deliver(topic, frames.encode_text(messages.encode(event)), arrived)
        frame = topic_frames.frame_of(entry, name, self.stamp)
        outboxes = self.hub.outboxes(topic)
        if len(outboxes) > OFFERS_PER_TURN:
            return self._enter_all(
                outboxes, lambda one: one.enter_topic(topic, entry, frame), arrived
            )
        accepted = sum([outbox.enter_topic(topic, entry, frame) for outbox in outboxes])
        self._held(accepted, arrived)
        return None

    async def _enter_all(
        self, outboxes: tuple[Outbox, ...], enter: Callable[[Outbox], bool], arrived: float
    ) -> None:
        """Let ``outboxes`` know of an entry, in turns."""
        accepted = 0
        for start in range(0, len(outboxes), OFFERS_PER_TURN):
            turn = outboxes[start : start + OFFERS_PER_TURN]
            accepted += sum([enter(outbox) for outbox in turn])
            self.tally.failed += self.turn.over()
            await trio.lowlevel.checkpoint()
        self._done(accepted, arrived)

    def _malformed(self, topic: bytes, problem: messages.BadPublish) -> None:
        self.tally.notifications_malformed += 1
        self.tally.published["malformed"] += 1
        self.log_malformed(topic, str(problem))

    async def _fan_out(
        self, topic: bytes, frame: bytes, arrived: float, skipped: Outbox | None
    ) -> None:
        """Offer ``frame`` to a snapshot of many, in turns."""
        outboxes = [one for one in self.hub.outboxes(topic) if one is not skipped]
        delivered = 0
        has = self.hub.has
        for start in range(0, len(outboxes), OFFERS_PER_TURN):
            # Who has left meanwhile has perhaps been told so.
            turn = [one for one in outboxes[start : start + OFFERS_PER_TURN] if has(topic, one)]
            accepted = sum([outbox.deliver_now(frame) for outbox in turn])
            self._count(accepted, len(turn) - accepted, len(frame))
            delivered += accepted
            await trio.lowlevel.checkpoint()
        self._done(delivered, arrived)

    def _held(self, delivered: int, arrived: float) -> None:
        """Count a publication that goes out when the turn is over."""
        self.tally.published["delivered" if delivered else "nobody"] += 1
        if delivered:
            self._arrived.append(arrived)

    def _done(self, delivered: int, arrived: float) -> None:
        self.tally.published["delivered" if delivered else "nobody"] += 1
        if delivered:
            self.tally.delivery.observe(time.perf_counter() - arrived)

    def _count(self, accepted: int, refused: int, size: int) -> None:
        tally = self.tally
        tally.notifications_delivered["ephemeral"] += accepted
        tally.messages_out += accepted
        tally.bytes_out += accepted * size
        tally.failed += refused


def _soft(frame: bytes, policy: Policy, subject: str, of_type: str, key: str | None) -> bytes:
    """Return a frame that may be given up while it waits, if that is the policy."""
    return Soft(frame, policy, subject, of_type, key) if policy in _SOFT else frame
