"""The hub: which outboxes want which topic, in this worker. Synchronous, knows no Redis.

A topic is the Redis channel it arrives on, as bytes, so that a message off the wire finds its
outboxes with one dictionary look-up and no parsing. The user's own channel and the broadcast
channel are topics like any other.

Rules
    * A topic without outboxes is not in the dictionary: what is there is what must be followed.
    * `Hub.add` and `Hub.remove` are idempotent, and say when the first came or the last went.
    * `Hub.deliver` never fails because of one outbox.
    * Long fan-outs must let the rest of the worker have its turn. The hub hands out a snapshot
      (`Hub.outboxes`); the loop with the pauses lives in the caller.
"""

from trioserver.outbox import Outbox


class Hub:
    """Topics and the outboxes subscribed to them."""

    def __init__(self) -> None:
        self._topics: dict[bytes, set[Outbox]] = {}

    def add(self, topic: bytes, outbox: Outbox) -> bool:
        """Subscribe ``outbox``; return whether it is the topic's first."""
        outboxes = self._topics.get(topic)
        if outboxes is None:
            self._topics[topic] = {outbox}
            return True
        outboxes.add(outbox)
        return False

    def remove(self, topic: bytes, outbox: Outbox) -> bool:
        """Unsubscribe ``outbox``; return whether it was the topic's last."""
        outboxes = self._topics.get(topic)
        if outboxes is None:
            return False
        outboxes.discard(outbox)
        if outboxes:
            return False
        del self._topics[topic]
        return True

    def deliver(self, topic: bytes, frame: bytes) -> tuple[int, int]:
        """Offer ``frame`` to all of ``topic``; return how many accepted and how many refused.

        For topics of a few outboxes: it does not pause.
        """
        outboxes = self._topics.get(topic)
        if outboxes is None:
            return 0, 0
        if len(outboxes) == 1:
            (outbox,) = outboxes
            return (1, 0) if outbox.deliver(frame) else (0, 1)
        # A snapshot, because an outbox that breaks or overflows removes itself meanwhile.
        snapshot = tuple(outboxes)
        accepted = sum([outbox.deliver(frame) for outbox in snapshot])
        return accepted, len(snapshot) - accepted

    def outboxes(self, topic: bytes) -> tuple[Outbox, ...]:
        """Return a snapshot of who wants ``topic`` now."""
        return tuple(self._topics.get(topic, ()))

    def size(self, topic: bytes) -> int:
        """Return how many outboxes want ``topic``."""
        return len(self._topics.get(topic, ()))

    def __contains__(self, topic: bytes) -> bool:
        return topic in self._topics

    def __len__(self) -> int:
        return len(self._topics)
