"""From the subscription to the outboxes: each publication is parsed once, here.

A raw one becomes one frame for all who get it. An entry of the ledger goes to the feeds, which make
a frame for each connection: it names that client's position.

`Delivery.receive` is what the subscription calls with every message. It is synchronous for a
user's own topic, which has a handful of outboxes. For a broadcast it returns the fan-out to be
awaited, which the subscription does before it looks at the next message: so order holds, and the
loop has its turn every `OFFERS_PER_TURN` outboxes.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from trioserver import envelope, frames, messages
from trioserver.clock import Stamp
from trioserver.envelope import Entry
from trioserver.hub import Hub
from trioserver.metrics import Tally
from trioserver.outbox import Outbox
from trioserver.track import Track, Verdict

_ENVELOPE: Final = envelope.VERSION[0]

OFFERS_PER_TURN: Final = 256
"""Writes between two checkpoints of a fan-out: about 1 ms."""


@attrs.define(eq=False, kw_only=True)
class Delivery:
    """Brings what is published to the connections of this worker."""

    hub: Hub
    tally: Tally
    broadcast_topic: bytes
    max_payload: int
    """Bytes of a notification's payload; 0 means no limit."""
    log_malformed: Callable[[bytes, str], None]
    """Called with the topic and what is wrong; limits its own rate."""
    head: Track[Entry]
    """Where everyone's stream stands; moved here."""
    stamp: Stamp = attrs.field(factory=Stamp)

    def receive(self, topic: bytes, data: bytes) -> Awaitable[None] | None:
        """Deliver one publication; return what remains to be awaited, if anything.

        A publication that is no notification is counted and logged, and that is all.
        """
        hub = self.hub
        if data and data[0] == _ENVELOPE:
            return self._enter(topic, data)
        if topic not in hub:
            # Released and still subscribed for a moment, or a broadcast: nobody here wants it.
            self.tally.published["nobody"] += 1
            return None
        arrived = time.perf_counter()
        try:
            notification = messages.notification_from_raw(data, self.stamp(), self.max_payload)
        except messages.BadPublish as problem:
            self._malformed(topic, problem)
            return None
        frame = frames.encode_text(notification)
        if topic == self.broadcast_topic:
            return self._fan_out(topic, frame, arrived)
        accepted, refused = hub.deliver(topic, frame)
        self._count(accepted, refused, len(frame))
        self._done(accepted, arrived)
        return None

    def _enter(self, topic: bytes, data: bytes) -> Awaitable[None] | None:
        """Let those who want ``topic`` know of an entry of the ledger."""
        arrived = time.perf_counter()
        try:
            entry = envelope.decode(data)
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
            self._done(accepted, arrived)
            return None
        if self.head.take(entry) is Verdict.READ:
            self.head.forget()
        return self._enter_all(outboxes, entry, arrived)

    async def _enter_all(self, outboxes: tuple[Outbox, ...], entry: Entry, arrived: float) -> None:
        """Let ``outboxes`` know of an entry of everyone's stream, in turns."""
        accepted = 0
        for start in range(0, len(outboxes), OFFERS_PER_TURN):
            turn = outboxes[start : start + OFFERS_PER_TURN]
            accepted += sum([outbox.enter(entry, everyone=True) for outbox in turn])
            await trio.lowlevel.checkpoint()
        self._done(accepted, arrived)

    def _malformed(self, topic: bytes, problem: messages.BadPublish) -> None:
        self.tally.notifications_malformed += 1
        self.tally.published["malformed"] += 1
        self.log_malformed(topic, str(problem))

    async def _fan_out(self, topic: bytes, frame: bytes, arrived: float) -> None:
        """Offer ``frame`` to a snapshot of ``topic``, in turns."""
        outboxes = self.hub.outboxes(topic)
        delivered = 0
        for start in range(0, len(outboxes), OFFERS_PER_TURN):
            turn = outboxes[start : start + OFFERS_PER_TURN]
            accepted = sum([outbox.deliver(frame) for outbox in turn])
            self._count(accepted, len(turn) - accepted, len(frame))
            delivered += accepted
            await trio.lowlevel.checkpoint()
        self._done(delivered, arrived)

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
