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
        self._topics: dict[bytes, Outbox | set[Outbox]] = {}
        """Most users have one connection, and a set of one costs 200 bytes more than the one."""
        self.find = self._topics.get
        """Returns who wants a topic: one, a set, or None; to be looked at, not to be changed."""

    def add(self, topic: bytes, outbox: Outbox) -> bool:
        """Subscribe ``outbox``; return whether it is the topic's first."""
        present = self._topics.get(topic)
        if present is None:
            self._topics[topic] = outbox
            return True
        if isinstance(present, set):
            present.add(outbox)
        elif present is not outbox:
            self._topics[topic] = {present, outbox}
        return False

    def remove(self, topic: bytes, outbox: Outbox) -> bool:
        """Unsubscribe ``outbox``; return whether it was the topic's last."""
        present = self._topics.get(topic)
        if isinstance(present, set):
            present.discard(outbox)
            if len(present) == 1:
                self._topics[topic] = present.pop()
            return False
        if present is not outbox:
            return False
        del self._topics[topic]
        return True

    def deliver(self, topic: bytes, frame: bytes, skipped: Outbox | None = None) -> tuple[int, int]:
        """Deliver ``frame`` to all of ``topic`` but one.

        For topics of a few outboxes: it does not pause. It goes out when the `Turn` is over.

        Returns:
            How many accepted, and how many refused.
        """
        # A snapshot, because an outbox that breaks or overflows removes itself meanwhile.
        snapshot = [outbox for outbox in self.outboxes(topic) if outbox is not skipped]
        accepted = sum([outbox.deliver(frame) for outbox in snapshot])
        return accepted, len(snapshot) - accepted

    def has(self, topic: bytes, outbox: Outbox) -> bool:
        """Return whether ``outbox`` wants ``topic`` now."""
        present = self._topics.get(topic)
        return outbox in present if isinstance(present, set) else present is outbox

    def outboxes(self, topic: bytes) -> tuple[Outbox, ...]:
        """Return a snapshot of who wants ``topic`` now."""
        present = self._topics.get(topic)
        if present is None:
            return ()
        return tuple(present) if isinstance(present, set) else (present,)

    def __contains__(self, topic: bytes) -> bool:
        return topic in self._topics

    def __len__(self) -> int:
        return len(self._topics)
