"""A timer wheel: one pending moment per owner, cheap to set, move and cancel.

A worker has ten thousand connections, each with a next thing to do (ping, heartbeat, deadline)
that is almost always moved before it is due. A heap would pay a comparison per level on every
move and keep dead entries; the wheel hashes a moment into a bucket of `GRANULARITY` seconds and
keeps the owner in a set there, so every operation is O(1) and a cancelled owner is gone at once.

Firing is late by at most one bucket, never early. The clock is the caller's: `now` is passed in.
"""

import math
from typing import Final, Generic, Protocol, TypeVar

GRANULARITY: Final = 0.1
"""Seconds per bucket. The shortest deadline in the product is 1 s, the usual ones 5 to 60 s."""

IDLE: Final = -1
"""Value of ``Timed.bucket`` when nothing is scheduled."""


class Timed(Protocol):
    """What the wheel asks of its owners: a place to remember their bucket."""

    bucket: int
    """Written by the wheel only; starts as `IDLE`."""


OwnerT = TypeVar("OwnerT", bound=Timed)


class Wheel(Generic[OwnerT]):
    """Moments in the future and who waits for them."""

    def __init__(self, now: float) -> None:
        self._buckets: dict[int, set[OwnerT]] = {}
        self._turned = int(now / GRANULARITY)
        """Every bucket up to and including this one has been fired."""

    def schedule(self, owner: OwnerT, when: float) -> None:
        """Fire ``owner`` at ``when`` or up to one bucket later; replaces what was scheduled.

        Infinity means never: what was scheduled is cancelled.
        """
        if when == math.inf:
            self.cancel(owner)
            return
        # Rounded up: firing early would make owners ask "not yet?" and schedule again.
        bucket = max(int(when / GRANULARITY) + 1, self._turned + 1)
        previous = owner.bucket
        if previous == bucket:
            return
        if previous != IDLE:
            self._remove(owner, previous)
        owner.bucket = bucket
        waiting = self._buckets.get(bucket)
        if waiting is None:
            self._buckets[bucket] = {owner}
        else:
            waiting.add(owner)

    def hasten(self, owner: OwnerT, when: float) -> None:
        """Fire ``owner`` at ``when`` unless it is to be fired before that anyway."""
        if when == math.inf:
            return
        if owner.bucket == IDLE or int(when / GRANULARITY) + 1 < owner.bucket:
            self.schedule(owner, when)

    def cancel(self, owner: OwnerT) -> None:
        """Forget ``owner``; idempotent."""
        if owner.bucket != IDLE:
            self._remove(owner, owner.bucket)
            owner.bucket = IDLE

    def advance(self, now: float) -> list[OwnerT]:
        """Return the owners whose moment has come; they are no longer scheduled."""
        due: list[OwnerT] = []
        target = int(now / GRANULARITY)
        buckets = self._buckets
        if target - self._turned > len(buckets):
            # After a long pause (a stopped process) look at what there is, not at every bucket.
            expired = sorted(bucket for bucket in buckets if bucket <= target)
        else:
            expired = [b for b in range(self._turned + 1, target + 1) if b in buckets]
        for bucket in expired:
            for owner in buckets.pop(bucket):
                owner.bucket = IDLE
                due.append(owner)
        self._turned = max(target, self._turned)
        return due

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def _remove(self, owner: OwnerT, bucket: int) -> None:
        waiting = self._buckets[bucket]
        waiting.discard(owner)
        if not waiting:
            del self._buckets[bucket]
